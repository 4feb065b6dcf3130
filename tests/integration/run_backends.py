"""Builds one MoE layer in every expert format as vLLM would on a GPU of a compute capability; prints what it chose.

Arguments: capability (`9.0`), a folder for checkpoints. One line of JSON: for each format, with FlashInfer and Humming
absent and present, what stock vLLM builds, what is built with `moe_method`, and the backend that it set; or what it
refused. Under `wishes`, what comes of backends that a user sets.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from tests.integration.played_platform import install, set_optional_packages

CAPABILITY = tuple(int(part) for part in sys.argv[1].split("."))
install(CAPABILITY)  # type: ignore[arg-type]

from vllm.config import VllmConfig  # noqa: E402

from tests.integration.played_layers import build, configure, save, start  # noqa: E402
from tests.integration.quantised_configs import CHECKPOINTS, ONLINE, OVERRIDDEN  # noqa: E402
from vllm_adapmoe.config import AdapMoEError  # noqa: E402

WISHES = (
    ("MXFP4 (gpt-oss)", "triton", 0.5), ("MXFP4 (gpt-oss)", "triton", 1.0), ("MXFP4 (gpt-oss)", "marlin", 0.5),
    ("FP8, tensor, static", "flashinfer_cutlass", 0.5), ("FP8, tensor, static", "marlin", 0.5),
    ("NVFP4 (ModelOpt)", "cutlass", 0.5), ("AWQ", "triton", 0.5), ("bf16", "flashinfer_trtllm", 0.5),
    ("bf16", "marlin", 0.5),
)  # fmt: skip
"""A checkpoint, what the user sets as `moe_backend`, and the share of experts that is to be resident."""


def kernel(vllm_config: VllmConfig, name: str) -> dict[str, Any]:
    method = build(vllm_config, name).quant_method
    cls = method.experts_cls
    return {
        "backend": vllm_config.kernel_config.moe_backend,
        "method": type(method).__name__,
        "kernel": cls.__name__,
        "bases": [base.__name__ for base in cls.__mro__],
        "monolithic": method.is_monolithic,
    }


def attempt(name: str, folder: Path, **args: Any) -> dict[str, Any]:
    try:
        return kernel(configure(folder, **args), name)
    except AdapMoEError as error:
        return {"refused": str(error)}
    except Exception as error:  # of vLLM, of any kind
        return {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    folder = Path(sys.argv[2])
    start(folder)
    cases = {name: (name, {}) for name in CHECKPOINTS} | {name: ("bf16", args) for name, args in ONLINE.items()}
    told: dict[str, Any] = {}
    for present in (False, True):
        set_optional_packages(present)
        for name, (checkpoint, args) in (cases | OVERRIDDEN).items():
            path = save(name, CHECKPOINTS[checkpoint], folder / checkpoint.replace("/", "-"))
            told.setdefault(name, {})["with" if present else "without"] = {
                "stock": attempt(name, path, **args),
                "ours": attempt(name, path, moe_method="adapmoe", adapmoe_config={"cache_fraction": 0.5}, **args),
            }
    told["wishes"] = [
        {"format": name, "wish": wish, "cache": fraction}
        | attempt(
            name, folder / name.replace("/", "-"), moe_backend=wish, moe_method="adapmoe",
            adapmoe_config={"cache_fraction": fraction},
        )
        for name, wish, fraction in WISHES
    ]  # fmt: skip
    print(json.dumps(told))


main()
