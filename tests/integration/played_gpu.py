"""What stands in for a GPU on the CPU: Triton's kernels in its interpreter, vLLM's own for experts among them.

Where that would be slow, an expert kernel of a few lines of PyTorch that knows its map. Experts keep the layout of the
checkpoint, as for vLLM's Triton kernel.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.fused_moe.experts import cpu_moe, triton_moe

from tests.integration import cuda_moe_ops, graph_recorder
from vllm_adapmoe.device import batch_gate
from vllm_adapmoe.device import claim as claiming
from vllm_adapmoe.device import fetch as fetching
from vllm_adapmoe.integration.entry import model_check
from vllm_adapmoe.integration.layers import mapped_experts
from vllm_adapmoe.integration.loading import layer_classes


def run_with_map(self: Any, output: torch.Tensor, hidden_states: torch.Tensor, **given: Any) -> None:
    """Expert by expert; the kernel's map says which row of the weights it has, -1: none."""
    tensors = [given[name] for name in ("w1", "w2", "topk_ids", "topk_weights", "expert_map")]
    launch(run_experts, output, hidden_states, given["global_num_experts"], *tensors)


def launch(kernel: Any, *args: Any) -> None:
    """Launches a kernel that is no operation of PyTorch; a graph that is being captured holds it as one call."""
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    if isinstance(mode, graph_recorder.Recorder):
        mode.launch(kernel, *args)
    else:
        kernel(*args)


def run_experts(
    output: torch.Tensor, hidden_states: torch.Tensor, num_experts: int, w1: torch.Tensor, w2: torch.Tensor,
    ids: torch.Tensor, weights: torch.Tensor, expert_map: torch.Tensor | None,
) -> None:  # fmt: skip
    rows = list(range(len(w1))) if expert_map is None else expert_map.tolist()
    assert len(rows) == num_experts + (expert_map is not None)
    total = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        if rows[expert] < 0:
            continue
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[token].float() @ w1[rows[expert]].float().T).chunk(2, 1)
        outputs = (torch.nn.functional.silu(gate) * up) @ w2[rows[expert]].float().T
        total.index_add_(0, token, outputs * weights[token, choice].unsqueeze(1))
    output.copy_(total)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_moe, "cpu_prepack_moe_weight", lambda weight, isa: weight)
    for cls in (cpu_moe.CPUUnquantizedExperts, cpu_moe.X86CPUUnquantizedExperts):
        monkeypatch.setattr(cls, "apply", run_with_map)


def play_gpu(patch: pytest.MonkeyPatch) -> None:
    stand_in(patch)
    patch.setattr(mapped_experts, "takes_slots", lambda kernel: kernel.apply.__func__ is run_with_map)
    patch.setattr(mapped_experts, "run_on_slots", lambda kernel, experts: None)
    use_maps(patch)


def use_maps(patch: pytest.MonkeyPatch) -> None:
    """The plugin builds a GPU's layers on the CPU."""
    patch.setattr(layer_classes, "experts_base", lambda: mapped_experts.MappedExperts)
    patch.setattr(model_check, "check_needs_no_gpu", lambda config: None)


class Interpreted:
    """A Triton kernel in the interpreter, which a graph that is being captured holds as one call."""

    # A thread of its own: at the depth of the engine's calls, Python 3.11 may map and unmap memory with every call.
    thread = ThreadPoolExecutor(1)

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **sizes: Any) -> None:
            self.thread.submit(self.kernel[grid], *args, **sizes).result()

        return lambda *args, **sizes: launch(partial(run, **sizes), *args)


def interpret_kernels(patch: pytest.MonkeyPatch) -> None:
    for module, name in ((claiming, "_claim"), (fetching, "_fetch"), (batch_gate, "_gate_batch")):
        patch.setattr(module, name, Interpreted(getattr(module, name)))
    patch.setattr(fetching, "PROGRAMS", 2)
    patch.setattr(fetching, "CHUNK", 1 << 18)


def interpret_triton_experts(patch: pytest.MonkeyPatch) -> None:
    """Lets vLLM choose its Triton experts on the CPU, in a process with the interpreter and `moe_backend=triton`.

    They refuse only the platform, and call, besides their kernel and `silu_and_mul`, two operations that only CUDA has.
    """
    patch.setattr(triton_moe.TritonExperts, "_supports_current_device", staticmethod(lambda: True))
    patch.setattr(fused_moe, "fused_moe_kernel", Interpreted(fused_moe.fused_moe_kernel))
    for name in ("moe_align_block_size", "moe_sum"):
        patch.setattr(_custom_ops, name, getattr(cuda_moe_ops, name))
