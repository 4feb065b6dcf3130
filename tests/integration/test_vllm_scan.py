"""The scan finds what a release can do to us: faults planted in the installed vLLM's Python."""

import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.version import Version

from tests.integration.test_versions import TREE, other_vllm
from tests.vllm_scan.damage import Scan
from tests.vllm_scan.tree import Tree
from vllm_adapmoe.integration.compat import REBOUND
from vllm_adapmoe.integration.layers import slot_kernels

pytestmark = pytest.mark.engine  # not that it starts one: each fault takes two seconds


class Planted(Tree):
    """The installed vLLM with text of some files replaced."""

    def __init__(self, *faults: tuple[str, str, str]) -> None:
        self.faults = faults
        super().__init__(TREE.path)

    def _text(self, name: str) -> str | None:
        text = super()._text(name)
        for file, old, new in self.faults:
            if file == name and text is not None:
                assert old in text, f"{file} has no {old!r}"
                text = text.replace(old, new)
        return text


FAULTS = {
    "name": (
        ("vllm/utils/torch_utils.py", "def direct_register_custom_op(", "def register_custom_op("),
        "vllm.utils.torch_utils.direct_register_custom_op is missing",
    ),
    "attribute of a module": (
        ("vllm/model_executor/layers/fused_moe/runner/moe_runner.py", "def _moe_forward_shared(", "def _shared("),
        "moe_runner._moe_forward_shared is missing",
    ),
    "member of an enumeration": (
        ("vllm/v1/request.py", "FINISHED_ERROR", "FINISHED_FAILED"),
        "vllm.v1.request.RequestStatus.FINISHED_ERROR is missing",
    ),
    "abstract method": (
        (
            "vllm/v1/outputs.py",
            "    @abstractmethod\n    def get_output(self)",
            "    @abstractmethod\n    def get_more(self): ...\n\n    @abstractmethod\n    def get_output(self)",
        ),
        "ReportedAsyncOutput has no AsyncModelRunnerOutput.get_more",
    ),
    "parameter of an overridden method": (
        ("vllm/v1/core/sched/scheduler.py", "throttle_prefills: bool", "step: int, throttle_prefills: bool"),
        "Scheduler.schedule: step comes where we have throttle_prefills",
    ),
    "overridden method": (
        ("vllm/model_executor/layers/fused_moe/routed_experts.py", "def forward_modular(", "def forward_kernel("),
        "CachedExperts.forward_modular takes the place of nothing",
    ),
    "method called through super()": (
        ("vllm/model_executor/layers/fused_moe/routed_experts.py", "def _get_quant_method(", "def _quant_method("),
        "super()._get_quant_method is missing",
    ),
    "attribute of our own object": (
        ("vllm/v1/core/sched/scheduler.py", "max_num_scheduled_tokens", "max_scheduled_tokens"),
        "ExpertCacheScheduler.max_num_scheduled_tokens is missing",
    ),
    "key of a configuration": (
        ("vllm/config/parallel.py", "enable_dbo", "enable_two_batches"),
        "ParallelConfig.enable_dbo is missing",
    ),
    "argument of a function": (
        ("vllm/utils/torch_utils.py", "    fake_impl: Callable", "    fake: Callable"),
        "direct_register_custom_op: got an unexpected keyword argument 'fake_impl'",
    ),
    "field of what we make": (
        ("vllm/v1/engine/__init__.py", "    finish_reason: FinishReason", "    reason: FinishReason"),
        "EngineCoreOutput: got an unexpected keyword argument 'finish_reason'",
    ),
    "name that a function is run with another meaning of": (
        ("vllm/model_executor/layers/fused_moe/experts/marlin_moe.py", "M = math.ceil(", "M = ceil("),
        "fused_marlin_moe does not use math",
    ),
    "what is edited": (
        ("vllm/engine/arg_utils.py", "def create_engine_config(", "def create_config("),
        "vllm.engine.arg_utils.EngineArgs.create_engine_config is missing",
    ),
    "old name in a new release": (
        ("vllm/_version.py", "version = '", "version = '99."),
        "kv_cache_counting: vllm.v1.core.kv_cache_utils.max_memory_usage_bytes is there",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_scan_finds_a_planted(fault):
    planted, told = FAULTS[fault]
    if "_version.py" in planted[0] and Version(TREE.version) >= Version("0.33"):
        pytest.skip("nothing of the old is left")
    found = [one.what for one in Scan(Planted(planted)).damage(TREE)]
    assert any(told in what for what in found), found


def test_the_scan_as_a_command(tmp_path):
    folder = other_vllm(tmp_path, "0.33.0")
    run = subprocess.run(
        [sys.executable, "-m", "tests.vllm_scan", folder, TREE.path], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == (Version(TREE.version) < Version("0.33")), run.stderr
    assert "vLLM 0.33.0:" in run.stdout and f"vLLM {TREE.version}:" in run.stdout


def test_names_that_slot_kernels_binds_again(monkeypatch):
    """What the scan looks for is what is bound."""
    bound: dict[str, set[str]] = {}

    def note(function, names):
        bound.setdefault(f"{function.__module__}.{function.__qualname__}", set()).update(names)
        return function

    monkeypatch.setattr(slot_kernels, "_rebound", note)
    for kernel in slot_kernels._BINDINGS:
        slot_kernels.run_on_slots(kernel.__new__(kernel), 4)
    assert bound == REBOUND
