"""Brings one layer of every expert format into its kernel's format, as after loading on a GPU; says what came of it.

Arguments: capability, a folder for checkpoints. vLLM's own `process_weights_after_loading` runs, on random weights,
under our loading; one line of JSON tells for each format what an expert's record is made of, what the layer's experts
share, and what still has a row for each expert after slots have taken the place of the experts.

Operations that only a GPU has are played: those that repack weights for Marlin as in
`csrc/quantization/marlin/gptq_marlin_repack.cu` and `awq_marlin_repack.cu`, to the shape
`[k / 16, n * 16 / (32 / bits)]`, with the values in another order (here: their own); those that quantise as in
`csrc/quantization/w8a8/fp8/common.cu`.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, ClassVar

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}

from tests.integration.played_platform import install

CAPABILITY = tuple(int(part) for part in sys.argv[1].split("."))
install(CAPABILITY)  # type: ignore[arg-type]

import torch  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402

from tests.integration.played_layers import EXPERTS, build, configure, save, start  # noqa: E402
from tests.integration.quantised_configs import CHECKPOINTS, ONLINE, OVERRIDDEN  # noqa: E402
from vllm_adapmoe.config import AdapMoEError  # noqa: E402
from vllm_adapmoe.integration.layers.expert_tensors import own_tensors  # noqa: E402
from vllm_adapmoe.integration.loading import expert_loading as loading_module  # noqa: E402
from vllm_adapmoe.integration.loading.expert_loading import ExpertLoading, expert_loading  # noqa: E402
from vllm_adapmoe.integration.settings import EngineSettings  # noqa: E402

SLOTS = 5
torch.cuda.get_device_properties().multi_processor_count = EXPERTS // 4
"""Marlin's locks, four for each multiprocessor, are as many as the experts: on a 4090 512, as Qwen3-Next has."""
CPU = torch.device("cpu")


def repack(b_q_weight, size_k, size_n, num_bits, is_a_8bit):
    shape = size_k // 16, size_n * 16 // (32 // num_bits)
    assert b_q_weight.numel() == shape[0] * shape[1], (b_q_weight.shape, shape)
    return b_q_weight.contiguous().reshape(shape).clone()


def static_fp8(output, values, scale, group_shape=None):
    output.copy_((values.float() / scale).clamp(-448, 448))


def fp8_by_row(output, values, scale, scale_ub=None):
    scale.copy_(values.float().abs().amax(1, keepdim=True) / 448)
    output.copy_(values.float() / scale)


def fp8_by_tensor(output, values, scale):
    scale.copy_(values.float().abs().amax().view(scale.shape) / 448)
    output.copy_(values.float() / scale)


OPERATIONS = {
    "gptq_marlin_repack(Tensor b, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit) -> Tensor": repack,
    "awq_marlin_repack(Tensor b, SymInt size_k, SymInt size_n, int num_bits, bool is_a_8bit) -> Tensor": repack,
    "static_scaled_fp8_quant(Tensor! out, Tensor values, Tensor scale, (int, int)? group_shape=None) -> ()": static_fp8,
    "dynamic_per_token_scaled_fp8_quant(Tensor! out, Tensor values, Tensor! scale, Tensor? ub) -> ()": fp8_by_row,
    "dynamic_scaled_fp8_quant(Tensor! out, Tensor values, Tensor! scale) -> ()": fp8_by_tensor,
}


def play_operations() -> list[torch.library.Library]:
    """They last as long as what is returned."""
    library = torch.library.Library("_C", "FRAGMENT")
    for signature, operation in OPERATIONS.items():
        library.define(signature.replace("(int, int)?", "int[]?"))
        library.impl(signature.partition("(")[0], operation, "CPU")
    from vllm.model_executor.layers.quantization.utils import mxfp8_utils

    online = torch.library.Library("vllm", "FRAGMENT")
    online.impl("mxfp8_quantize", mxfp8_utils._mxfp8_e4m3_quantize_torch, "CPU")
    torch.accelerator.empty_cache = lambda: None
    return [library, online]


class Captured(ExpertLoading):
    """Loading that has begun, on the CPU, with fewer slots than experts."""

    packed: ClassVar[dict[str, torch.Tensor] | None] = None
    """What a pack holds of each expert, where it does."""

    def __init__(self, config: Any, vllm_config: Any) -> None:
        super().__init__(config, vllm_config)
        self._began, self.pools.slots, self._restored = True, [SLOTS], self.packed is not None
        self.records: dict[str, torch.Tensor] = {}
        self.shared: list[str] = []

    def record_names(self, layer):
        return list(self.packed)

    def check(self, layer, blank):
        self.records = {name: tensor.clone() for name, tensor in blank.items()}

    def put(self, layer, tensors):
        self.records = {name: tensor.clone() for name, tensor in tensors.items()}

    def check_shared(self, layer, names):
        self.shared = list(names)


def randomise(layer, seed: int, changed: int | None) -> None:
    """Random weights, the same for each seed; with `changed`, those of this expert are others."""
    for name, parameter in sorted(layer.named_parameters(recurse=False)):
        if parameter.is_meta:
            continue
        generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
        _fill(parameter.data, generator, name)
        if changed is not None and parameter.dim() and len(parameter) == EXPERTS:
            generator = torch.Generator().manual_seed(seed + 1000 + sum(map(ord, name)))
            _fill(parameter.data[changed], generator, name)
            if parameter.is_floating_point():
                parameter.data[changed] = (parameter.data[changed].float() * 4).to(parameter.dtype)
                # More than in any other, so that a maximum over experts tells.


def _fill(data: torch.Tensor, generator: torch.Generator, name: str) -> None:
    if data.dtype in (torch.int32, torch.uint8, torch.int8) and "g_idx" not in name and "sort" not in name:
        low, high = (120, 128) if data.dtype == torch.uint8 and "scale" in name else (0, 100)
        data.copy_(torch.randint(low, high, data.shape, generator=generator))
    elif data.is_floating_point():
        data.copy_(torch.rand(data.shape, generator=generator) + 0.5)


def process(name: str, folder: Path, changed: int | None, **args: Any) -> dict[str, Any]:
    vllm_config = configure(folder, moe_method="adapmoe", adapmoe_config={"cache_fraction": 0.5}, **args)
    loading_module.slots_device = lambda: CPU
    original, loading_module.ExpertLoading = loading_module.ExpertLoading, Captured
    try:
        with expert_loading(EngineSettings.of(vllm_config), vllm_config) as loading, \
                set_default_torch_dtype(torch.bfloat16):  # fmt: skip
            layer = build(vllm_config, name)
            with set_current_vllm_config(vllm_config), torch.no_grad():
                materialise(layer)
                randomise(layer, 0, changed)
                layer.finish_loading()
    finally:
        loading_module.ExpertLoading = original
    return {"layer": layer, "loading": loading}


def materialise(layer) -> None:
    """Online quantisation makes weights without memory first."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if parameter.is_meta:
            setattr(layer, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), False))


def tell(name: str, folder: Path, **args: Any) -> dict[str, Any]:
    plain, other = process(name, folder, None, **args), process(name, folder, 2, **args)
    records, others = plain["loading"].records, other["loading"].records
    Captured.packed = records
    blank = process(name, folder, None, **args)["loading"].records
    Captured.packed = None
    moved = {
        key: [row for row in range(EXPERTS) if not torch.equal(_bytes(records[key][row]), _bytes(others[key][row]))]
        for key in records
    }
    shared = {key: _held(plain, key) for key in plain["loading"].shared}
    reduced = [key for key, value in shared.items() if not torch.equal(_bytes(value), _bytes(_held(other, key)))]
    reduced += [key for key, value in numbers(plain["layer"]).items() if numbers(other["layer"])[key] != value]
    layer = plain["layer"]
    pools = {key: torch.zeros((SLOTS, *record.shape[1:]), dtype=record.dtype) for key, record in records.items()}
    layer.expert_tensors.replace(pools)
    left = [path for path, tensor in own_tensors(layer).items() if tensor.dim() and len(tensor) == EXPERTS]
    left = [path for path in left if path != "workspace"]  # Marlin's locks, until 0.30
    return {
        "kernel": type(layer.quant_method.moe_kernel.fused_experts).__name__,
        "records": describe(records),
        "changed": {key: rows for key, rows in moved.items() if rows not in ([], [2])},
        "shared": {key: f"{tuple(value.shape)}" for key, value in shared.items()},
        "reduced": reduced,
        "left": left,
        "blank": describe(blank),
    }


def describe(records: dict[str, torch.Tensor]) -> dict[str, str]:
    return {key: f"{tuple(record.shape[1:])} {record.dtype}" for key, record in records.items()}


def numbers(layer) -> dict[str, float]:
    """What the kernel and its configuration hold as plain numbers."""
    kernel = layer.quant_method.moe_kernel.fused_experts
    holders = {"kernel": kernel, "quant_config": kernel.quant_config}
    return {
        f"{holder}.{key}": value
        for holder, of in holders.items()
        for key, value in vars(of).items()
        if isinstance(value, float)
    }


def _held(processed: dict[str, Any], path: str) -> torch.Tensor:
    return own_tensors(processed["layer"])[path]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def main() -> None:
    folder = Path(sys.argv[2])
    start(folder)
    played = play_operations()
    cases = {name: (name, {}) for name in CHECKPOINTS} | {name: ("bf16", args) for name, args in ONLINE.items()}
    told: dict[str, Any] = {}
    for name, (checkpoint, args) in (cases | OVERRIDDEN).items():
        path = save(name, CHECKPOINTS[checkpoint], folder / checkpoint.replace("/", "-"))
        try:
            told[name] = tell(name, path, **args)
        except AdapMoEError as error:
            told[name] = {"refused": str(error)}
        except Exception as error:  # of vLLM, of any kind
            told[name] = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
    print(json.dumps(told))
    del played


main()
