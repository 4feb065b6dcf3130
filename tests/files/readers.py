"""Every reader of files, with a sound file of each kind, and what is done with what it gives."""

import json
import os
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from conftest import ROOT, TINY_MIXTRAL

from vllm_adapmoe.calibrate.progress import Progress
from vllm_adapmoe.calibrate.text import text_of
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError, GatingConfig
from vllm_adapmoe.model_folder import read_model_config, vocabulary_size
from vllm_adapmoe.planning.from_trace import gated
from vllm_adapmoe.policy.cache_setup import CacheSetup
from vllm_adapmoe.policy.prediction import PredictedExperts
from vllm_adapmoe.prefetch.heads import NextTokenHeads
from vllm_adapmoe.printable import MAX_CHARACTERS, OneLineError
from vllm_adapmoe.profile.expected_loads import curves_of_profile
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.profile.thresholds import describe, plan_gating
from vllm_adapmoe.simulate.compare import slots_of_pools
from vllm_adapmoe.simulate.replay import belady, replay
from vllm_adapmoe.simulate.trace import Step, TraceInfo, TraceWriter
from vllm_adapmoe.simulate.trace_file import read_trace
from vllm_adapmoe.simulate.virtual_link import Machine
from vllm_adapmoe.store.file import open_pack
from vllm_adapmoe.store.pack_index import decode_head, encode_head
from vllm_adapmoe.store.pack_writer import PackWriter
from vllm_adapmoe.store.record import ALIGNMENT, align

LAYERS, HIDDEN, EXPERTS, TOP_K = 3, 4, 5, 2
SETTINGS = {"model": "m"}
MEMORY = 64 << 20
"""Bytes that reading a small file may take for a moment."""


def config_file(path: Path) -> None:
    profile = str(ROOT / "configs" / "tiny_mixtral.json")
    gating = {"mode": "token", "max_loss_increase": 0.005}
    given = {"cache_gb": 8.0, "store_dir": "/a/folder", "prefetch": {"lookahead": 2}, "profile": profile}
    path.write_text(json.dumps(given | {"gating": gating, "scheduler": {"enabled": True}, "link_gbps": 1.5}))


def profile_file(path: Path) -> None:
    """A part of a real one."""
    profile = json.loads((ROOT / "configs" / "tiny_mixtral.json").read_text())
    profile["layers"] = profile["layers"][:LAYERS]
    profile["model"]["num_layers"] = LAYERS
    path.write_text(json.dumps(profile))


def heads_arrays() -> dict[str, np.ndarray]:
    names = [*(f"layer.{index}" for index in range(LAYERS)), "first"]
    return {name: np.full((HIDDEN + 1, EXPERTS), 0.1, dtype=np.float32) for name in names}


def heads_file(path: Path) -> None:
    arrays = heads_arrays()
    NextTokenHeads([arrays[f"layer.{index}"] for index in range(LAYERS)], arrays["first"]).save(path)


INFO = TraceInfo("m", [EXPERTS] * LAYERS, TOP_K, 2, [100] * LAYERS, [0, 0, 1])


def trace_steps() -> list[Step]:
    random = np.random.default_rng(0)
    steps = []
    for number in range(6):
        rows = 1 + number % 3
        ids = random.permuted(np.tile(np.arange(EXPERTS), (LAYERS, rows, 1)), axis=2)[:, :, :TOP_K]
        predicted = {
            (layer, distance): PredictedExperts(ids[layer + distance][:, ::-1], np.ones((rows, TOP_K), dtype=bool))
            for layer, distance in ((-1, 1), (0, 1), (0, 2), (1, 1))
        }
        expected = {layer: random.random(EXPERTS).astype(np.float16) for layer in range(LAYERS)}
        begin = random.random((2, EXPERTS)).astype(np.float16) if number else None
        weights = np.full(ids.shape, 0.5, dtype=np.float16)
        names = [f"request-{row}" for row in range(rows)]
        positions = np.arange(rows, dtype=np.int32)
        drafted = np.arange(rows) > 0 if number % 2 else None
        steps.append(Step(float(number), names, positions, ids, weights, predicted, expected, begin, drafted))
    return steps


def trace_file(path: Path) -> None:
    writer = TraceWriter(path, INFO, 1 << 30)
    for number, step in enumerate(trace_steps()):
        writer.add(step)
        if number % 3 == 2:
            writer.flush()
    writer.close()


def progress_file(path: Path) -> None:
    progress = Progress(path, SETTINGS, 1 << 20)
    progress.add("routing/0", {"loss": np.array(1.5), "0.used": np.ones(3)})


def model_config_file(path: Path) -> None:
    path.write_bytes((TINY_MIXTRAL / "config.json").read_bytes())


def text_file(path: Path) -> None:
    path.write_text("Some text.\n" * 10)


def pack_file(path: Path) -> None:
    """One layer of two records, and one of records with another layout."""
    writer = PackWriter(path, {"model": "m"}, 1 << 16)
    writer.put_layer(0, {"w1": torch.arange(2 * 600, dtype=torch.int64).view(2, 20, 30), "scale": torch.ones(2, 3)})
    writer.put_layer(1, {"w1": torch.ones(3, 8, dtype=torch.bfloat16)})
    writer.seal().close()


def index_of(pack: bytes) -> tuple[int, bytes]:
    """Where the index of a pack is, and what it is."""
    offset, size, _ = decode_head(pack[:ALIGNMENT], len(pack))
    return offset, pack[offset : offset + size]


def with_index(pack: bytes, index: bytes) -> bytes:
    """A pack with another index, and checksums that are right."""
    offset, _ = index_of(pack)
    return encode_head(offset, index) + pack[ALIGNMENT:offset] + index.ljust(align(len(index)), b"\0")


def use_pack(path: Path) -> int:
    store = open_pack(path, {"model": "m"})
    try:
        for layer, layout in enumerate(store.layouts):
            for expert in range(store.num_experts(layer)):
                into = [torch.empty(piece.nbytes, dtype=torch.uint8) for piece in layout.pieces]
                store.read((layer, expert), into)
        return store.num_layers
    finally:
        store.close()


def use_profile(path: Path) -> ModelProfile:
    profile = ModelProfile.load(path)
    for gating in (
        GatingConfig(mode="token", threshold=0.01),
        GatingConfig(mode="token", target_experts=1.5),
        GatingConfig(mode="token", max_loss_increase=0.005),
        GatingConfig(mode="batch", max_loss_increase=0.005),
    ):
        try:
            plan = plan_gating(gating, profile)
            json.dumps(plan.model_dump(), allow_nan=False)
            describe(plan, profile)
            curves_of_profile(profile, plan.threshold, 2)
        except AdapMoEError as error:
            assert_one_line(error)
    return profile


def use_heads(path: Path) -> NextTokenHeads:
    digest = ""
    if os.path.isfile(path) and os.access(path, os.R_OK, effective_ids=True) and path.stat().st_size < MEMORY:
        digest = blake3(path.read_bytes()).hexdigest()
    heads = NextTokenHeads.load(path, digest, LAYERS, HIDDEN, EXPERTS)
    heads.check([len(one) - 1 for one in heads.layers], len(heads.first) - 1)
    return heads


def use_trace(path: Path) -> int:
    info, steps = read_trace(path)
    assert len(steps) == sum(1 for _ in steps)
    if sum(info.num_experts) > 1000 or len(steps) > 100:
        return len(steps)
    slots = slots_of_pools(info, max(sum(info.num_experts) // 2, 1))
    if min(slots) >= info.top_k:
        for eviction, allocation in (("lru", "trace"), ("next_token", "uniform")):
            setup = CacheSetup(slots, eviction, allocation, None, 3, 2)
            replay(info, steps, setup, Machine(1e9, 1e-3))
        belady(info, steps, slots)
        for step in steps:
            gated(step, [0.1] * len(info.num_experts), 0.01)
    return len(steps)


def use_progress(path: Path) -> dict[str, Any]:
    return Progress(path, SETTINGS, 1 << 20).done


def use_model_config(path: Path) -> int:
    read_model_config(path.parent)
    return vocabulary_size(path.parent)


@dataclass(frozen=True)
class Reader:
    """One kind of file."""

    write: Callable[[Path], None]
    """Makes a sound one."""
    read: Callable[[Path], Any]
    """Reads it, and does what is done with it."""
    absent: str = "No such file or directory"
    """What is said of a file that is not there."""
    inside: str = ""
    """Name of the file, where it is the folder that is named."""

    def at(self, folder: Path, name: str = "file") -> Path:
        """A place for such a file."""
        if not self.inside:
            return folder / name
        (folder / name).mkdir(exist_ok=True)
        return folder / name / self.inside


READERS = {
    "config": Reader(config_file, lambda path: AdapMoEConfig.parse(path).transport()),
    "profile": Reader(profile_file, use_profile),
    "heads": Reader(heads_file, use_heads),
    "trace": Reader(trace_file, use_trace),
    "pack": Reader(pack_file, use_pack, absent="does not exist"),
    "progress": Reader(progress_file, use_progress, absent=""),
    "model_config": Reader(model_config_file, use_model_config, inside="config.json"),
    "text": Reader(text_file, text_of),
}


def assert_one_line(error: Exception) -> None:
    message = str(error)
    assert isinstance(error, OneLineError)
    assert message.isprintable() and len(message) <= MAX_CHARACTERS
    assert ";" in message or "should" in message or "known keys" in message, f"no remedy: {message}"


def try_reading(kind: str, path: Path) -> str:
    """Reads whatever is there; the error, or nothing. Whatever else is raised is a failure of the test."""
    tracemalloc.start()
    try:
        READERS[kind].read(path)
    except OneLineError as error:
        assert_one_line(error)
        return str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY, f"{peak} bytes for a moment"
    return ""


def info_json() -> dict[str, Any]:
    return asdict(INFO)


def frame_of(arrays: bytes) -> bytes:
    """A frame of a trace, whose sizes are right."""
    data = zlib.compress(arrays, 1)
    return len(data).to_bytes(4, "little") + data
