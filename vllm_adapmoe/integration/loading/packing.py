"""Packs a model without serving it, by starting and stopping a vLLM engine on it."""

from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor import Executor

from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.left_out import check_not_left_out
from vllm_adapmoe.integration.loading.identity import source_files
from vllm_adapmoe.integration.loading.pack_store import pack_folder
from vllm_adapmoe.printable import OneLineError, reason


def pack_experts(model: str, store_dir: str | None, precision: int = 16, **engine_args: Any) -> Path:
    """Writes the packed files of all ranks, unless valid ones exist; returns their folder.

    Raises:
        AdapMoEError: for the same reasons as when serving.
    """
    check_not_left_out()
    try:
        described = EngineArgs(model=model, **engine_args).create_model_config()
    except OneLineError:
        raise
    except Exception as error:  # vLLM, transformers and hubs raise errors of any type
        raise AdapMoEError(f"model={model!r}: vLLM cannot load it: {reason(error, lines=2)}") from None
    experts, top_k = described.get_num_experts(), described.get_num_experts_per_tok() or 1
    # The fewest slots that one token needs: any cache with fewer slots than experts has a store.
    fraction = top_k / experts if top_k < experts else 0.5
    config: dict[str, Any] = {"cache_fraction": fraction, "store": "file", "precision": precision}
    if store_dir is not None:
        config["store_dir"] = store_dir
    engine_args |= {"moe_method": "adapmoe", "adapmoe_config": config, "enforce_eager": True}
    engine_args["kv_cache_memory_bytes"] = 1 << 20  # never allocated; without it vLLM requires most memory to be free
    arguments = EngineArgs(model=model, **engine_args)
    vllm_config = arguments.create_engine_config()
    executor = Executor.get_class(vllm_config)(vllm_config)
    executor.shutdown()
    sources = source_files(vllm_config.model_config, vllm_config.load_config)
    return pack_folder(AdapMoEConfig.parse(config), sources)
