"""The kernel that computes on slots, for every expert format and compute capability: what is set, what comes of it.

vLLM's own Python answers, with the platform played (`played_platform.py`, `run_backends.py`): the real front end,
quantisation configurations, oracles and classes of kernels. Of 0.32, all Python of the CPU wheel is that of the CUDA
wheel, byte by byte, but for `_version.py`, `platforms/__init__.py` (which distribution has the version) and
`utils/cpu_triton_utils.py`.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import vllm

from tests.integration.backend_table import CAPABILITIES, ROOT, TAKES_MAPS, ask, markdown
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.entry.backends import (
    FORMATS,
    FP8,
    INT_WEIGHTS,
    MXFP4,
    MXFP4_COMPRESSED,
    MXFP8,
    NVFP4,
    UNQUANTISED,
    W4A8,
    choose_backend,
)  # fmt: skip
from vllm_adapmoe.integration.layers.slot_kernels import KERNELS

HOPPER = (9, 0)
REFUSED = {
    "W4A8, FP8 (compressed-tensors)": set(CAPABILITIES),
    "MXFP4 (compressed-tensors)": {"10.0"},  # vLLM's method takes CUTLASS there whatever is set
    "FP8, channel, while loading": {"8.0", "8.6"},
}
"""Formats that no kernel of vLLM computes on slots, and where."""
NOT_IN_VLLM = {
    "GPTQ, 4 bit, act-order": set(CAPABILITIES),  # 0.30 to 0.33: "no longer supported"
    "NVFP4 while loading": {"8.0", "8.6", "8.9", "9.0", "12.0"},
}


@pytest.fixture(scope="module")
def matrix():
    """What vLLM builds at a compute capability: all are asked when the first is, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        asked = {capability: pool.submit(ask, capability) for capability in CAPABILITIES}
        yield lambda capability: asked[capability].result()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("capability", "experts", "packages", "kernel"),
    [
        ("9.0", "FP8, tensor (compressed-tensors)", "with", "FlashInferExperts"),
        ("9.0", "FP8, tensor (compressed-tensors)", "without", "TritonOrCutlassExperts"),
        ("12.0", "FP8, tensor (compressed-tensors)", "with", "FlashInferExperts"),
        ("9.0", "MXFP4 (gpt-oss)", "without", "OAITritonMxfp4ExpertsMonolithic"),
        ("12.0", "NVFP4 (ModelOpt)", "with", "FlashInferExperts"),
        ("12.0", "NVFP4 (ModelOpt)", "without", "CutlassExpertsFp4"),
        ("9.0", "AWQ", "with", "HummingIndexedExperts"),
        ("10.0", "bf16", "with", "TrtLlmBf16ExpertsMonolithic"),
    ],
)
def test_by_itself_vllm_chooses_kernels_without_maps(matrix, capability, experts, packages, kernel):
    told = matrix(capability)[experts][packages]
    assert told["stock"]["kernel"] == kernel
    assert kernel not in KERNELS
    assert told["ours"]["kernel"] in KERNELS


@pytest.mark.engine
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_format_gets_a_kernel_with_maps(matrix, capability):
    for experts, cell in matrix(capability).items():
        if experts == "wishes":
            continue
        for packages in ("with", "without"):
            told = cell[packages]["ours"]
            where = f"{experts}, {packages} FlashInfer: {told}"
            if capability in REFUSED.get(experts, ()):
                assert f"compute capability {capability}" in told["refused"], where
            elif capability in NOT_IN_VLLM.get(experts, ()):
                assert "failed" in told and "failed" in cell[packages]["stock"], where
            else:
                assert told.get("kernel") in KERNELS and not told["monolithic"], where
                assert told["backend"] in ("triton", "marlin"), where


@pytest.mark.engine
def test_what_a_user_sets_is_kept_or_refused_with_what_works(matrix):
    told = {(wish["format"], wish["wish"], wish["cache"]): wish for wish in matrix("9.0")["wishes"]}
    assert told["MXFP4 (gpt-oss)", "marlin", 0.5]["kernel"] == "MarlinExperts"
    assert told["FP8, tensor, static", "marlin", 0.5]["kernel"] == "MarlinExperts"
    for experts, wish, works in (
        ("MXFP4 (gpt-oss)", "triton", "--moe-backend marlin"),
        ("FP8, tensor, static", "flashinfer_cutlass", "--moe-backend triton, marlin"),
        ("NVFP4 (ModelOpt)", "cutlass", "--moe-backend marlin"),
        ("AWQ", "triton", "--moe-backend marlin"),
        ("bf16", "flashinfer_trtllm", "--moe-backend triton"),
        ("bf16", "marlin", "--moe-backend triton"),
    ):
        refusal = told[experts, wish, 0.5]["refused"]
        assert f"moe_backend={wish}" in refusal and works in refusal and "9.0" in refusal and "\n" not in refusal
    resident = told["MXFP4 (gpt-oss)", "triton", 1.0]  # with every expert resident it is the user's affair
    assert resident["kernel"] == "OAITritonMxfp4ExpertsMonolithic" and resident["backend"] == "triton"


@pytest.mark.engine
def test_the_page_is_current(matrix):
    page = (ROOT / "docs" / "backends.md").read_text()
    version = vllm.__version__.partition("+")[0]
    if f"vLLM {version}'s" not in page:
        pytest.skip(f"the page is about another version than {version}")
    assert markdown({at: matrix(at) for at in CAPABILITIES}, version) == page


def test_the_kernels_that_the_table_trusts_are_those_that_the_worker_does():
    assert TAKES_MAPS == KERNELS


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_served_or_says_what_to_do(name):
    for capability in ((7, 0), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        try:
            assert choose_backend({name}, capability, "auto") in ("triton", "marlin")
        except AdapMoEError as error:
            told = str(error)
            assert name in told and f"{capability[0]}.{capability[1]}" in told
            assert any(told.partition("; ")[2].startswith(verb) for verb in ("use a", "set ", "remove ")), told


@pytest.mark.parametrize(
    ("formats", "capability", "wish", "backend"),
    [
        ({UNQUANTISED}, (8, 0), "auto", "triton"),
        ({FP8}, (8, 6), "auto", "marlin"),
        ({FP8}, (8, 9), "auto", "triton"),
        ({FP8}, None, "auto", "marlin"),  # where the device is not known: what every device runs
        ({MXFP8, NVFP4}, HOPPER, "auto", "marlin"),
        ({FP8, NVFP4}, HOPPER, "auto", "marlin"),
        ({FP8}, HOPPER, "marlin", "marlin"),
    ],
)
def test_choices(formats, capability, wish, backend):
    assert choose_backend(formats, capability, wish) == backend


@pytest.mark.parametrize(
    ("formats", "capability", "wish", "remedy"),
    [
        ({MXFP4}, HOPPER, "triton", "set --moe-backend marlin, or leave it out"),
        ({FP8}, (8, 0), "triton", "set --moe-backend marlin, or leave it out"),
        ({INT_WEIGHTS}, (7, 0), "auto", "use a device of compute capability 7.5 or later"),
        ({UNQUANTISED, NVFP4}, HOPPER, "auto", "use a checkpoint with one format for all experts"),
        ({W4A8}, HOPPER, "auto", "use a W4A16 or FP8 checkpoint"),
        ({MXFP4_COMPRESSED}, (10, 0), "auto", "use an NVFP4 or FP8 checkpoint"),
        ({MXFP4_COMPRESSED}, (10, 3), "marlin", "use an NVFP4 or FP8 checkpoint"),
    ],
)
def test_refusals(formats, capability, wish, remedy):
    with pytest.raises(AdapMoEError) as error:
        choose_backend(formats, capability, wish)
    assert remedy in str(error.value) and f"moe_backend={wish}" in str(error.value) and "\n" not in str(error.value)
