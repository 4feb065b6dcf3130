"""Lets vLLM's Python take this machine for one with an NVIDIA GPU of any compute capability, to ask what it chooses.

Written from vLLM 0.32's `platforms/cuda.py` and `platforms/interface.py` (the CUDA wheel's; the CPU wheel has the same
files). `install` has to run before vLLM is imported, in a process of its own. Nothing can be computed in it.
"""

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

NAMES = {
    (8, 0): "NVIDIA A100", (8, 6): "NVIDIA RTX 3090", (8, 9): "NVIDIA RTX 4090", (9, 0): "NVIDIA H100",
    (10, 0): "NVIDIA B200", (12, 0): "NVIDIA RTX 5090",
}  # fmt: skip
COMPILED = ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C", "vllm_flash_attn._vllm_fa2_C")
"""Of the CUDA wheel, imported for what they register with torch; the CPU wheel has none of them."""
SUPPORTS = {
    "cutlass_scaled_mm_supports_fp8": lambda capability: capability >= 89,
    "cutlass_scaled_mm_supports_block_fp8": lambda capability: capability >= 90,
    "cutlass_group_gemm_supported": lambda capability: 90 <= capability < 120,
    "cutlass_scaled_mm_supports_fp4": lambda capability: 100 <= capability < 130,
    "mxfp4_experts_quant_supported": lambda capability: 100 <= capability < 120,
}
"""What CUDA's operations answer in a build for CUDA 12.9 or later: `csrc/quantization/`, files
`w8a8/cutlass/scaled_mm_entry.cu`, `fp4/nvfp4_scaled_mm_entry.cu` and `fp4/mxfp4_experts_quant.cu`. The CPU wheel has
none of them."""
TOTAL = 80 << 30


def install(capability: tuple[int, int]) -> None:
    """Makes `vllm.platforms.current_platform` a CUDA device of this capability."""
    import torch

    _offer_triton()
    for name in COMPILED:
        sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name=NAMES[capability], major=capability[0], minor=capability[1], total_memory=TOTAL, multi_processor_count=132,
        warp_size=32, shared_memory_per_block_optin=101376, L2_cache_size=50 << 20, is_integrated=False, gcnArchName="",
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    )  # fmt: skip
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: capability
    cuda.get_device_name = lambda device=None: properties.name
    cuda.get_device_properties = lambda device=None: properties
    cuda.mem_get_info = lambda device=None: (TOTAL, TOTAL)
    import vllm.platforms as platforms

    def resolve() -> str:
        from vllm.plugins import PLATFORM_PLUGINS_GROUP, load_plugins_by_group

        for ask in load_plugins_by_group(PLATFORM_PLUGINS_GROUP).values():  # as vLLM does
            ask()
        return "vllm.platforms.cuda.NonNvmlCudaPlatform"

    platforms.resolve_current_platform_cls_qualname = resolve
    earlier, platforms._current_platform = platforms._current_platform, None  # 0.31 asks while it is imported
    current_platform = platforms.current_platform
    for module in [module for name, module in sys.modules.items() if name.startswith("vllm.")]:
        if vars(module).get("current_platform") is earlier is not None:
            module.current_platform = current_platform  # type: ignore[attr-defined]
    from vllm import _custom_ops

    for name, supports in SUPPORTS.items():
        setattr(_custom_ops, name, supports)
    assert current_platform.is_cuda() and current_platform.get_device_capability() == capability


def _offer_triton() -> None:
    """VLLM takes Triton for missing where no driver of it is active."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]


class GemmType(Enum):
    """Humming's, which its classes ask for when they are considered."""

    DENSE = "dense"
    INDEXED = "indexed"
    GROUPED_CONTIGUOUS = "grouped_contiguous"
    GROUPED_MASKED = "grouped_masked"


IN_WHEEL = ("has_deep_gemm", "has_triton_kernels")
"""Asks for packages that the CUDA wheel brings along (`vllm/third_party`)."""
REQUIRED = (
    "has_flashinfer", "has_flashinfer_moe", "has_flashinfer_trtllm_fused_moe", "has_flashinfer_cutlass_fused_moe",
    "has_flashinfer_cutedsl_grouped_gemm_nt_masked", "has_flashinfer_cutedsl_moe_nvfp4", "has_humming",
)  # fmt: skip
"""Asks for packages that the CUDA wheel requires, and that people build images without."""


def set_optional_packages(present: bool) -> None:
    """Lets vLLM find what its CUDA wheel brings along, and FlashInfer and Humming or not."""
    import vllm.utils.flashinfer
    import vllm.utils.humming
    import vllm.utils.import_utils  # where the others import these questions from

    vllm.utils.humming.GemmType = GemmType  # type: ignore[misc, assignment]
    answers = dict.fromkeys(IN_WHEEL, True) | dict.fromkeys(REQUIRED, present)
    for module in [module for name, module in sys.modules.items() if name.startswith("vllm.")]:
        for name, answer in answers.items():
            if name in vars(module):
                setattr(module, name, lambda answer=answer: answer)
