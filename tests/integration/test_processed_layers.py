"""What a quantised layer keeps once vLLM has brought it into its kernel's format, and whether slots can take its place.

vLLM's own `process_weights_after_loading` of every format, for the kernel that is set (`run_processed.py`).
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.backend_table import run_played
from tests.integration.test_backends import NOT_IN_VLLM, REFUSED
from vllm_adapmoe.integration.layers.slot_kernels import KERNELS

SHARED = {
    name: {"w13_input_scale", "w2_input_scale"}
    for name in ("FP8, tensor, static", "FP8, tensor (compressed-tensors)", "FP8 (ModelOpt)")
}
"""What all experts of a layer share; both are maxima over the experts, so a pack cannot hold them."""

NVFP4_SCALES = {"w13_weight_scale", "w13_weight_scale_2", "w2_weight_scale", "w2_weight_scale_2"}
"""For Marlin the scales of all experts of a layer are brought into range by one factor; each record holds both of what
is multiplied, so it does not depend on others once it is made."""


CAPABILITIES = ("8.0", "9.0")
"""At 8.0 FP8 is for Marlin, from 8.9 on for Triton."""


@pytest.fixture(scope="module")
def all_processed():
    with ThreadPoolExecutor(2) as pool:
        yield {capability: pool.submit(run_played, "run_processed", capability) for capability in CAPABILITIES}


@pytest.fixture(params=CAPABILITIES)
def processed(request, all_processed):
    """For each format, what came of it."""
    return request.param, all_processed[request.param].result()


@pytest.mark.engine
def test_slots_take_the_place_of_whatever_has_a_row_for_each_expert(processed):
    capability, formats = processed
    served = 0
    for name, told in formats.items():
        if capability in REFUSED.get(name, ()) or capability in NOT_IN_VLLM.get(name, ()):
            continue
        served += 1
        assert "records" in told, f"{name}: {told}"
        assert told["kernel"] in KERNELS, name
        assert told["left"] == [], f"{name}: rows of experts that no slot has replaced"
        scaled = NVFP4_SCALES if "NVFP4" in name else set()
        assert set(told["changed"]) <= scaled, f"{name}: one expert's weights are in another's record"
        assert "workspace" not in told["records"], name
        assert {"w13", "w2"} <= {key.partition("_")[0] for key in told["records"]}, name
    assert served > 25


@pytest.mark.engine
def test_what_experts_share_is_known(processed):
    for name, told in processed[1].items():
        if "records" in told:
            assert set(told["shared"]) == SHARED.get(name, set()), name
            assert set(told["reduced"]) == SHARED.get(name, set()), name


@pytest.mark.engine
def test_a_blank_expert_has_the_format_of_the_packed_ones(processed):
    for name, told in processed[1].items():
        if "records" in told:
            assert told["blank"] == told["records"], name
