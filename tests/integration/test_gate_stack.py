"""Gates of later layers, and a next-token head, on the experts' input; which routers are such gates, and which not."""

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from vllm_adapmoe.integration.worker.gate_stack import GateStack
from vllm_adapmoe.integration.worker.gate_trial import LinearGate, Unpredictable, try_gate
from vllm_adapmoe.integration.worker.routers import ranges

CPU = torch.device("cpu")
HIDDEN, EXPERTS = 64, 8


@pytest.fixture(autouse=True)
def as_in_a_worker():
    with torch.inference_mode():
        yield


def tried(gate, hidden, experts, dtype=torch.float32):
    return try_gate(gate, hidden, experts, dtype, CPU)


def stack(gates, hidden, head=None):
    return GateStack(gates, head, hidden, CPU)


def test_input_that_a_kernel_has_padded():
    """gpt-oss on Marlin: the experts' input has columns of zeros that neither gate nor head takes."""
    gate = torch.nn.Linear(6, 4)
    head = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    x = torch.randn(2, 6)
    outputs = stack([tried(gate, 8, 4)], 8, head).outputs(torch.nn.functional.pad(x, (0, 2)))
    assert np.allclose(outputs[:, :4], gate(x), atol=1e-5)
    assert np.allclose(outputs[:, 4:], x.numpy() @ head[:-1] + head[-1], atol=1e-6)


def test_a_head_that_was_made_for_a_padded_input():
    head = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    x = torch.randn(2, 6)
    assert np.allclose(stack([], 6, head).outputs(x), x.numpy() @ head[:6] + head[-1], atol=1e-6)


def test_a_gate_that_says_nothing_has_no_columns():
    made = stack([None, tried(torch.nn.Linear(6, 4), 6, 4)], 6)
    assert made.slices == [None, slice(0, 4)] and made.outputs(torch.zeros(1, 6)).shape == (1, 4)
    assert stack([None], 6).weight is None


def test_ranges_of_layers():
    assert ranges([0, 2, 3, 4, 7, 8]) == "0, 2 to 4, 7 to 8" and ranges([5]) == "5"


class Router(torch.nn.Module):
    """A linear map and what a subclass makes of its logits."""

    def __init__(self, experts: int = EXPERTS, bias: float = 0.0) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(HIDDEN, experts)
        self.gate.requires_grad_(False).bias += torch.randn(experts) * bias

    def forward(self, x):
        return self.made_of(self.gate(x))

    def made_of(self, logits):
        return logits


class WithScores(Router):
    """As the Transformers backend's: logits, weights, ids."""

    def made_of(self, logits):
        return logits, *logits.softmax(-1).topk(2)


class ByRows8(Router):
    """FP8: the weights once, the input row by row."""

    def forward(self, x):
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-6).float() / 448
        quantised = (x / scale).to(torch.float8_e4m3fn).float() * scale
        return linear(quantised, self.gate.weight.to(torch.float8_e4m3fn).float(), self.gate.bias.float())


@pytest.mark.parametrize(
    ("router", "dtype"),
    [
        (Router(), torch.bfloat16),
        (Router(bias=4.0), torch.bfloat16),
        (Router(bias=4.0), torch.float16),
        (WithScores(), torch.bfloat16),
        (ByRows8().to(torch.float32), torch.float32),
    ],
    ids=["bf16", "large bias", "fp16", "tuple", "fp8"],
)
def test_linear_routers_are_read_off(router, dtype):
    """The map's error on new inputs is the format's own rounding."""
    router = router.to(dtype)
    gate = tried(router, HIDDEN, EXPERTS, dtype)
    x = torch.randn(100, HIDDEN, generator=torch.Generator().manual_seed(1))
    true = linear(x, router.gate.weight.float(), router.gate.bias.float())
    error = (torch.addmm(gate.bias, x, gate.weight) - true).square().mean().sqrt() / (true - gate.bias).std()
    assert gate.weight.dtype == gate.bias.dtype == torch.float32 and error < (
        0.03 if isinstance(router, ByRows8) else 0.01
    )


def test_a_router_of_another_dtype():
    """Ling: its model widens the router's input, which the router itself does not."""
    router = Router()
    gate = tried(router, HIDDEN, EXPERTS, torch.bfloat16)
    assert torch.allclose(gate.weight, router.gate.weight.T, atol=1e-5)


class Softmax(Router):
    def made_of(self, logits):
        return logits.softmax(-1)


class Capped(Router):
    def made_of(self, logits):
        return 2 * (logits / 2).tanh()


class Normalised(Router):
    """Gemma-4: linear, as long as all inputs have one length."""

    def forward(self, x):
        return self.gate(torch.nn.functional.rms_norm(x, x.shape[1:]))


class Noisy(Router):
    def made_of(self, logits):
        return logits + torch.randn_like(logits)


class NotANumber(Router):
    def made_of(self, logits):
        return logits * float("nan")


class ThreeDimensional(Router):
    """ZAYA, of the Transformers backend."""

    def made_of(self, logits):
        return logits.gather(2, logits.argmax(-1, keepdim=True))


class Ids(Router):
    def made_of(self, logits):
        return logits.topk(2).indices


class MoreArguments(Router):
    def forward(self, x, states):
        return self.gate(x)


class OfOneToken(Router):
    def made_of(self, logits):
        return logits[0]


@pytest.mark.parametrize(
    ("router", "why"),
    [
        (Softmax(), "not linear"),
        (Capped(), "not linear"),
        (Normalised(), "not linear"),
        (Noisy(), "not linear"),
        (NotANumber(), "not linear"),
        (ThreeDimensional(), "IndexError"),
        (MoreArguments(), "TypeError"),
        (Ids(), "no logits"),
        (OfOneToken(), "no logits"),
        (Router(EXPERTS + 2), f"{EXPERTS + 2} logits for {EXPERTS} experts"),
        (torch.nn.Linear(2 * HIDDEN, EXPERTS), f"{2 * HIDDEN} values per token, the experts' {HIDDEN}"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_other_routers_are_not(router, why):
    with pytest.raises(Unpredictable, match=why):
        tried(router, HIDDEN, EXPERTS)


class WithMemory(Router):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(EXPERTS))
        self.register_buffer("last", torch.zeros(1))
        self.calls = 0

    def made_of(self, logits):
        self.calls += 1
        self.last = logits
        self.seen += logits.sum(0)
        self.gate.bias += 1
        return logits + torch.rand(1)


def test_a_trial_leaves_nothing_behind():
    """Neither in the router nor in the random numbers that tokens are sampled with."""
    router = WithMemory()
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    torch.manual_seed(3)
    with pytest.raises(Unpredictable):
        tried(router, HIDDEN, EXPERTS)
    sampled = torch.rand(5)
    torch.manual_seed(3)
    assert torch.equal(sampled, torch.rand(5))
    assert router.calls == 0 and router.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in router.state_dict().items())


def test_replaced_weights_are_copied_to_where_graphs_read_them():
    gates = [LinearGate(torch.full((4, 3), float(value)), torch.zeros(3)) for value in (1, 2)]
    old, new, wider = (
        GateStack(some, None, 4, torch.device("cpu")) for some in ([gates[0], None], [gates[1], None], gates)
    )
    assert old.weight is not None and wider.weight is not None
    address = old.weight.data_ptr()
    assert old.follow(new)
    assert old.weight.data_ptr() == address and (old.product(torch.ones(1, 4)) == 8).all()
    assert not old.follow(wider) and (old.weight == 2).all()
