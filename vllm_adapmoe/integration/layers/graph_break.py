"""Splits MoE blocks that need the host out of CUDA graphs, by ops at which vLLM splits the compiled model."""

import torch
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner import moe_runner
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.utils.torch_utils import direct_register_custom_op

OPS = ["vllm::adapmoe_moe_into", "vllm::adapmoe_moe_shared_into"]

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, for its level and format

LayerName = moe_runner._layer_name_type


def is_capturing() -> bool:
    """Returns whether the current stream is being captured into a CUDA graph."""
    return torch.version.cuda is not None and torch.cuda.is_current_stream_capturing()


def _moe_into(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: LayerName,
) -> None:
    routed = moe_runner._moe_forward(hidden_states, router_logits, shared_experts_input, input_ids, layer_name, 0)
    output.copy_(routed)


def _moe_shared_into(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    layer_name: LayerName,
) -> None:
    shared, routed = moe_runner._moe_forward_shared(
        hidden_states, router_logits, shared_experts_input, input_ids, layer_name, 0
    )
    shared_output.copy_(shared)
    output.copy_(routed)


def _fake(*args: object, **kwargs: object) -> None:
    return None


direct_register_custom_op(
    op_name="adapmoe_moe_into", op_func=_moe_into, mutates_args=["hidden_states", "output"], fake_impl=_fake
)
direct_register_custom_op(
    op_name="adapmoe_moe_shared_into",
    op_func=_moe_shared_into,
    mutates_args=["shared_output", "output"],
    fake_impl=_fake,
)


def break_graph_at(runner: MoERunner) -> bool:
    """Makes a block run between two CUDA graphs, if vLLM splits the model at `OPS`; returns whether it can.

    The later graph reads the block's output at the address of its capture. So the op does not return its output but
    writes it into memory that the earlier graph has allocated, as attention does. A runner that uses an op of its own
    returns its output, and cannot be split (`TransformersMoERunner`).
    """
    if type(runner).forward is not MoERunner.forward:
        return False
    runner._forward_entry = _entry_shared if runner.shared_experts is not None else _entry
    return True


def _entry(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    layer_name: LayerName,
    hidden_dim_unpadded: int,
) -> torch.Tensor:
    output = torch.empty_like(hidden_states)
    torch.ops.vllm.adapmoe_moe_into(hidden_states, router_logits, shared_experts_input, input_ids, output, layer_name)
    return output


def _entry_shared(
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    shared_experts_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    layer_name: LayerName,
    hidden_dim_unpadded: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.empty_like(hidden_states)
    shared_output = torch.empty_like(hidden_states if shared_experts_input is None else shared_experts_input)
    torch.ops.vllm.adapmoe_moe_shared_into(
        hidden_states, router_logits, shared_experts_input, input_ids, shared_output, output, layer_name
    )
    return shared_output, output


def graphs_without_host(config: CompilationConfig, max_tokens: int, in_pieces: bool = True) -> int:
    """Configures full graphs for decode steps of at most `max_tokens`, and piecewise ones if `in_pieces`.

    Returns:
        Maximum tokens of a step that does not need the host: at most `max_tokens` when it is padded to a graph's size.
    """
    if config.cudagraph_mode == CUDAGraphMode.FULL:  # would capture prompts, too
        config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    if not in_pieces and config.cudagraph_mode.has_piecewise_cudagraphs():
        full = config.cudagraph_mode.has_full_cudagraphs()
        _drop_pieces(config, CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE)
    if config.cudagraph_mode.has_full_cudagraphs() and config.cudagraph_capture_sizes:
        sizes = [size for size in config.cudagraph_capture_sizes if size <= max_tokens]
        config.cudagraph_capture_sizes = sizes
        config.max_cudagraph_capture_size = max(sizes, default=0)
    sizes = sorted(config.cudagraph_capture_sizes or ())
    if config.cudagraph_mode != CUDAGraphMode.NONE and sizes and sizes[-1] > max_tokens:
        return max((size for size in sizes if size <= max_tokens), default=0)
    return max_tokens


def graphs_in_pieces(config: CompilationConfig, in_pieces: bool = True) -> None:
    """Configures piecewise graphs only, as every step needs the host; none if the model cannot be split."""
    mode = config.cudagraph_mode
    if mode.has_full_cudagraphs():
        pieces = mode == CUDAGraphMode.FULL or mode.has_piecewise_cudagraphs()
        config.cudagraph_mode = CUDAGraphMode.PIECEWISE if pieces else CUDAGraphMode.NONE
    if not in_pieces and config.cudagraph_mode != CUDAGraphMode.NONE:
        _drop_pieces(config, CUDAGraphMode.NONE)


def _drop_pieces(config: CompilationConfig, mode: CUDAGraphMode) -> None:
    logger.warning(
        "Expert cache: this model's MoE blocks cannot be split out of CUDA graphs: cudagraph_mode=%s instead of %s; "
        "set model_impl=vllm if vLLM implements this model itself",
        mode.name, config.cudagraph_mode.name,
    )  # fmt: skip
    config.cudagraph_mode = mode
