"""Fixtures shared by all tests, and the order of their files."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

EVERY_CORE = os.sched_getaffinity(0)
if "PYTEST_XDIST_WORKER" in os.environ:
    # A core for each test process, before torch counts its threads: those of two engines that share their cores would
    # spin for one another.
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(EVERY_CORE)[number % len(EVERY_CORE)]})

import pytest  # noqa: E402  # as torch, which is to see one core
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("shared machine", deadline=None, print_blob=True)
settings.load_profile("shared machine")

ROOT = Path(__file__).parent.parent
if torch.cpu._is_amx_tile_supported():  # or stock vLLM may die of its first request (`AdapMoECPUWorker.init_device`)
    torch.cpu._init_amx()
# Triton runs our kernels on CPU tensors if that is set before it is imported; vLLM's CPU backend uses none of it.
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]
TINY_MIXTRAL = ROOT / "examples" / "tiny_mixtral" / "model"
MINUTES = (
    "soak", "ray_serve", "gated_engine", "ranks", "memory", "quantised", "exactness", "switches", "architectures",
    "device_path", "commands", "compile_cache", "read_errors", "backends",
)  # fmt: skip
"""Files of `tests/integration` that take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, and those without an engine last: the workers end together."""
    places = {f"test_{name}.py": place for place, name in enumerate(MINUTES)}
    engines = {item.path for item in items if item.get_closest_marker("engine")}

    def place(item: pytest.Item) -> int:
        return places.get(item.path.name, len(places) + (item.path not in engines))

    items.sort(key=place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets vLLM inspect model classes in this process, where they are loaded anyway.

    It starts a process for each architecture, which imports all of vLLM, so that CUDA is not initialised too early.
    """
    if item.get_closest_marker("engine"):
        from vllm.model_executor.models import registry

        registry._run_in_subprocess = lambda inspect: inspect()


@pytest.fixture(scope="session", autouse=True)
def vllm_folders(tmp_path_factory: pytest.TempPathFactory):
    """VLLM's caches, and so the default place of packed files, are the test run's own."""
    settings = {
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache")),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tests send functions to the worker, to look at its tensors
        "HF_HUB_OFFLINE": "1",
        "ADAPMOE_STRICT": "1",  # a prediction that fails is a bug of ours, and not to be served over
        # With the engine core in this process all requests of a batch are there before the first step. Otherwise it
        # is a race which of them the first steps hold, and stock vLLM does not repeat its own tokens where kernels
        # depend on the batch.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, os.environ.get(name, value) if name == "VLLM_CACHE_ROOT" else value)
        yield


@pytest.fixture(scope="module")
def every_core() -> Iterator[list[int]]:
    """Lets tests with more than one engine process use all cores; gives their numbers."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, EVERY_CORE)
    yield sorted(EVERY_CORE)
    os.sched_setaffinity(0, own)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """Makes (once) and returns the folder of a tiny random model of an architecture."""
    from tiny_models import save_tiny_model

    from tests.apart import apart

    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = apart(save_tiny_model, architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return make
