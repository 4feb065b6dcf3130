"""Models and GPUs for `decode_cost`: dimensions from their published config.json, speeds from data sheets.

Weights besides the experts are those of attention (Q, K, V and output matrices), the router, and the output matrix;
norms, biases outside experts, and the KV cache are left out (together below 1 % for short requests).
"""

from dataclasses import dataclass

from vllm_adapmoe.planning.decode_cost import DecodeModel, GpuSpeed
from vllm_adapmoe.planning.memory_plan import ModelSize
from vllm_adapmoe.store.record import align
from vllm_adapmoe.units import GiB

BF16 = 16.0
AWQ = 4 + (16 + 4) / 128
"""Bits per weight: 4, and a float16 scale and a 4-bit zero for each 128."""
FP8 = 8 + 32 / 128**2
"""Bits per weight: 8, and a float32 scale for each block of 128 by 128."""
MXFP4 = 4 + 8 / 32
"""Bits per weight: 4, and an 8-bit exponent for each 32."""


@dataclass(frozen=True)
class Config:
    """Fields of a model's published config.json, and the format of its weights."""

    name: str
    layers: int
    hidden: int
    inner: int
    """Intermediate size of a routed expert."""
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    expert_bits: float
    attention_bits: float
    multiples: tuple[int, int] = (1, 1)
    """What the kernel pads hidden and inner size to."""
    biases: bool = False
    """Whether experts have biases, in bf16."""

    def model(self) -> DecodeModel:
        """Returns what a token reads, experts in the format of vLLM's kernel."""
        hidden, inner = (
            -(-size // unit) * unit for size, unit in zip((self.hidden, self.inner), self.multiples, strict=True)
        )
        expert = 3 * hidden * inner * self.expert_bits / 8 + 2 * (2 * inner + hidden) * self.biases
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads) * self.attention_bits / 8
        router = 2 * self.hidden * self.experts
        table = 2 * self.hidden * self.vocabulary
        read = round(self.layers * (attention + router) + table)
        size = ModelSize(
            num_layers=self.layers, num_experts=self.experts, top_k=self.top_k, expert_bytes=align(round(expert)),
            other_bytes=read + table, read_bytes=read, all_layers=self.layers,
        )  # fmt: skip
        return DecodeModel(self.name, size, router, self.hidden)


QWEN3 = Config("Qwen3-30B-A3B bf16", 48, 2048, 768, 128, 8, 32, 4, 128, 151_936, BF16, BF16)
MODELS = (
    Config("Mixtral-8x7B AWQ", 32, 4096, 14336, 8, 2, 32, 8, 128, 32_000, AWQ, AWQ).model(),
    Config("Qwen3-30B-A3B FP8", 48, 2048, 768, 128, 8, 32, 4, 128, 151_936, FP8, FP8).model(),
    QWEN3.model(),
    # Marlin pads hidden to 256s and inner to 128s (mxfp4_round_up_hidden_size_and_intermediate_size in vLLM 0.32):
    # 2880 to 3072 and 2944.
    Config(
        "gpt-oss-120b MXFP4", 36, 2880, 2880, 128, 4, 64, 8, 64, 201_088, MXFP4, BF16, multiples=(256, 128), biases=True
    ).model(),
)

GPUS = {
    GpuSpeed.of("RTX 4090", 1008e9, 25e9): 24 * GiB,
    GpuSpeed.of("H100 SXM", 3350e9, 55e9): 80 * GiB,
}
"""Device memory of each GPU. Its size and bandwidth: NVIDIA's data sheets. Links: 25 GB/s of PCIe 4.0's 32 is assumed;
55 was measured on an H200 with the same PCIe 5.0 (docs/gpu.md)."""
H200 = GpuSpeed.of("H200", 4800e9, 55.3e9)
"""Bandwidth of memory: NVIDIA's data sheet; of the link: measured (examples/benchmarks/gpu/device.json)."""
