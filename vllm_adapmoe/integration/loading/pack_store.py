"""Locates a model's packed files, decides which are valid, and repacks those that are not."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.loading.identity import check_identifiable, load_identity, source_files
from vllm_adapmoe.store.base import StoreError
from vllm_adapmoe.store.file import FileStore, PackInvalid, PackMissing, PackOfAnother, PackOutdated, open_pack
from vllm_adapmoe.store.file_hash import hash_bytes
from vllm_adapmoe.store.folder import others_who_may_write, packs_root, why_not_writable
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.source_files import SourceFiles
from vllm_adapmoe.units import GiB

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format


def store_kind(config: AdapMoEConfig) -> str:
    """Returns the kind of store, `host` or `file`, resolving `auto` by the platform."""
    if config.store != "auto":
        return config.store
    return "file" if current_platform.is_cpu() or config.host_gb is not None else "host"


def pack_folder(config: AdapMoEConfig, sources: SourceFiles) -> Path:
    """Returns the folder of a model's packed files: `store_dir`, or one named after the model's location."""
    if config.store_dir is not None:
        return packs_root(config.store_dir)
    origin = Path(sources.origin)
    # A snapshot in a hub's cache is named by its commit: models--org--name/snapshots/commit.
    name = origin.parents[1].name.split("--")[-1] if origin.parent.name == "snapshots" else origin.name
    return packs_root(config.store_dir) / f"{name}-{hash_bytes(sources.origin.encode())[:12]}"


def pack_names(config: AdapMoEConfig, vllm_config: VllmConfig) -> list[str]:
    """Returns the names of the packed files of all ranks."""
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    spread = parallel.enable_expert_parallel and ranks > 1
    strategy = f"{parallel.expert_placement_strategy}-" if spread else ""
    return [pack_name(config, f"{strategy}{rank}", ranks) for rank in range(ranks)]


def pack_name(config: AdapMoEConfig, shard: str, ranks: int) -> str:
    """Returns the name of the packed file of one rank's shard of the experts; each precision has a file of its own."""
    precision = "" if config.bits == 16 else f"-int{config.bits}"
    return f"experts-{shard}-of-{ranks}{precision}.pack"


def open_valid(path: Path, identity: dict[str, str], sources: SourceFiles) -> FileStore:
    """Opens a pack that was made with these settings, from these files as they are now.

    Raises:
        StoreError: there is no such pack; the subclass gives the reason.
    """
    store = open_pack(path, identity)
    try:
        store.check_sources(sources)
    except StoreError:
        store.close()
        raise
    return store


def open_or_pack(
    config: AdapMoEConfig, path: Path, identity: dict[str, str], sources: SourceFiles, experts: int, expert_bytes: int
) -> FileStore | PackWriter:
    """Opens a valid pack, or returns the writer of a new one.

    An invalid pack, or one whose source files have changed, is overwritten, because no engine can use it. Another
    model's pack in a folder that the user named is not touched.

    Raises:
        AdapMoEError: `store_dir` holds another model's pack.
        StoreError: the folder cannot be written, or has too little space.
    """
    try:
        store = open_valid(path, identity, sources)
        logger.info("Expert cache: using the packed experts in %s", path)
        return store
    except PackMissing:
        logger.info("Expert cache: packing %d experts (%.2f GiB) into %s", experts, expert_bytes / GiB, path)
    except PackOfAnother as error:
        if config.store_dir is not None:
            raise AdapMoEError(f"store_dir={config.store_dir!r}: {error}") from None
        logger.info("Expert cache: packing %d experts again: %s", experts, error)
    except (PackInvalid, PackOutdated) as error:
        logger.warning("Expert cache: packing %d experts again: %s", experts, error)
    return PackWriter(path, identity, expert_bytes, sources)


def log_packing_time(writer: PackWriter) -> None:
    """Logs how many bytes are to be packed, how fast the disk is, and advice if that takes too long."""
    if writer.bytes_packed:
        logger.info(
            "Expert cache: %d layers (%.2f GiB) were packed by an interrupted start; packing continues after them",
            len(writer.packed), writer.bytes_packed / GiB,
        )  # fmt: skip
    if not writer.bytes_left:
        return
    rate = writer.measure_rate()
    seconds, limit = writer.bytes_left / rate, envs.VLLM_ENGINE_READY_TIMEOUT_S
    log = logger.info if seconds < limit / 2 else logger.warning
    log(
        "Expert cache: %.2f GiB to pack at %.2f GB/s of disk writes: at least %.0f s, plus the time to read the model "
        "and convert it to the kernel's format. A server waits %d s for its engine: raise VLLM_ENGINE_READY_TIMEOUT_S, "
        "or pack first with `adapmoe pack`. An interrupted start continues where it stopped",
        writer.bytes_left / GiB, rate / 1e9, seconds, limit,
    )  # fmt: skip


def check_store(config: AdapMoEConfig, vllm_config: VllmConfig, needed: bool) -> None:
    """Checks, before any weight is read, that there is a valid pack or a writable folder for one.

    Args:
        config: the method's configuration; without `store_dir`, packs are in vLLM's cache.
        vllm_config: the engine's configuration.
        needed: whether there are certainly fewer slots than experts; if False, the default folder need not be writable.

    Raises:
        AdapMoEError: the folder cannot be written, or holds another model's pack; or the model cannot be identified.
    """
    if config.store_dir is not None:
        if config.store == "host":
            raise AdapMoEError(f"store_dir={config.store_dir!r} has no meaning with store='host'; remove one")
        if store_kind(config) == "host":
            raise AdapMoEError(f"store_dir={config.store_dir!r} needs a packed file; set store='file'")
    elif store_kind(config) == "host" or not needed:
        return
    check_identifiable(vllm_config.model_config, vllm_config.load_config)
    problem = why_not_writable(packs_root(config.store_dir))
    if config.store_dir is None and problem is None:
        return  # the worker repacks what is not valid
    packs_to_make = list(_packs_to_make(config, vllm_config))
    if problem is None:
        return
    for path, reason in packs_to_make:
        remedy = f"{'set' if config.store_dir is None else 'change'} store_dir to a writable folder"
        raise AdapMoEError(f"{_setting(config)} cannot be written ({problem}), and {path.name} {reason}; {remedy}")


def _setting(config: AdapMoEConfig) -> str:
    if config.store_dir is not None:
        return f"store_dir={config.store_dir!r}"
    return f"the folder of packed experts, {str(packs_root(config.store_dir))!r} (VLLM_CACHE_ROOT),"


def _packs_to_make(config: AdapMoEConfig, vllm_config: VllmConfig) -> Iterator[tuple[Path, str]]:
    """Yields the paths of packs that are missing or not valid, and why.

    Raises:
        AdapMoEError: `store_dir` holds another model's pack.
    """
    identity = load_identity(vllm_config)
    sources = None
    for name in pack_names(config, vllm_config):
        try:
            if config.store_dir is None:
                sources = sources or source_files(vllm_config.model_config, vllm_config.load_config)
                path = pack_folder(config, sources) / name
            else:
                path = packs_root(config.store_dir) / name
            store = open_pack(path, identity)
            sources = sources or source_files(vllm_config.model_config, vllm_config.load_config)
            store.check_sources(sources)
            store.close()
        except PackMissing:
            yield path, "does not exist"
        except (PackInvalid, PackOutdated) as error:
            yield path, f"has to be packed again: {error}"
        except StoreError as error:
            if config.store_dir is not None:
                raise AdapMoEError(f"store_dir={config.store_dir!r}: {error}") from None
            yield path, f"has to be packed again: {error}"


def warn_if_replaceable(path: Path) -> None:
    """Warns if other users can replace the pack, and so decide which weights are served."""
    writers = others_who_may_write(path)
    if writers is not None:
        logger.warning(
            "%s can be replaced by %s: they decide which experts are served; run chmod go-w on it, or set "
            "another store_dir", path, writers,
        )  # fmt: skip


def cores_of_user() -> set[int]:
    """Returns the cores that the user allowed for this process, or for its parent if it is a worker.

    vLLM binds the main thread of a CPU worker process to one core, which new threads inherit.
    """
    started = multiprocessing.parent_process()
    return os.sched_getaffinity(0 if started is None or started.pid is None else started.pid)
