"""Offers vLLM's kernels for quantised experts on CPUs with AVX-512 alone.

vLLM 0.32 offers them only where there is AMX, though they compute without it. vLLM calls `register` in each process.
"""

from pathlib import Path

import torch

CAPABLE = torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()
"""Whether this CPU has the instructions that the kernels use in place of AMX."""


def register() -> None:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for cls in (cpu_moe.CPUExpertsInt8, cpu_moe.CPUExpertsInt4, cpu_moe.CPUExpertsFp8, cpu_moe.CPUExpertsMxfp4):
        cls._supports_current_device = staticmethod(lambda: CAPABLE)


def install(folder: Path) -> None:
    """Makes `folder`, once it is on the path, a package that vLLM finds `register` by."""
    info = folder / "kernels_without_amx-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels-without-amx\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkernels_without_amx = kernels_without_amx:register\n")
