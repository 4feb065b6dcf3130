"""Three equal ways to switch the method on, nothing without them, and one line for each mistake.

Each check runs in a fresh process, for what matters is what was imported before what.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MIXTRAL

pytestmark = [pytest.mark.engine, pytest.mark.versions]

TINY_QWEN = ROOT / "examples" / "tiny_qwen3moe" / "model"
BIN = Path(sys.executable).parent
VERSION = importlib.metadata.version("vllm")
PATCHES = sorted((ROOT / "patches" / f"vllm-{VERSION.rpartition('.')[0]}").glob("*.patch"))
CONFIG = {"cache_experts": 48, "store": "host", "prefetch": {"lookahead": 2, "max_experts": 3}}
FILE = {"cache_fraction": 0.1, "store": "host", "prefetch": {"lookahead": 5, "max_experts": 3}}
KEYS = ("--adapmoe-config.cache_experts", "48", "--adapmoe-config.prefetch.lookahead", "2")
"""Single keys that make `CONFIG` of `FILE`."""
SUMMARY = """
import json
from vllm_adapmoe.integration.entry.edits import EDITS
def summary(config):
    return [config.additional_config, config.parallel_config.worker_cls,
            str(config.scheduler_config.scheduler_cls), config.compute_hash()]
"""


def python(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | environment
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


def last_json(run: subprocess.CompletedProcess[str]):
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


WAYS = (
    SUMMARY
    + f"""
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
import dataclasses, os, pickle
MODEL, CONFIG, FILE, KEYS = {str(TINY_MIXTRAL)!r}, {CONFIG!r}, {FILE!r}, {KEYS!r}
from pathlib import Path
from tempfile import mkdtemp
import yaml
folder = Path(mkdtemp(dir=os.environ.get("TMPDIR")))
file, whole, nested, single = (folder / name for name in ("f.json", "whole.yaml", "nested.yaml", "single.yaml"))
file.write_text(json.dumps(FILE))
whole.write_text(yaml.safe_dump({{"moe_method": "adapmoe", "adapmoe-config": str(file)}}))
nested.write_text(yaml.safe_dump({{"moe-method": "adapmoe", "adapmoe_config": FILE}}))
single.write_text(yaml.safe_dump({{"moe-method": "adapmoe", "adapmoe-config": str(file),
                                  "adapmoe-config.cache_experts": 48, "adapmoe-config.prefetch.lookahead": 2}}))
JSON_KEYS = json.dumps({{"cache_experts": 48, "prefetch": {{"lookahead": 2}}}})

def from_flags(*flags):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", MODEL, *flags]))

python = EngineArgs(model=MODEL, moe_method="adapmoe", adapmoe_config=CONFIG)
ways = {{
    "python": python,
    "replaced": dataclasses.replace(python),
    "asdict": EngineArgs(**{{f.name: getattr(python, f.name) for f in dataclasses.fields(python)}}),
    "pickled": pickle.loads(pickle.dumps(python)),
    "additional": EngineArgs(model=MODEL, additional_config={{"adapmoe": CONFIG}}),
    "json flag": from_flags("--moe-method", "adapmoe", "--adapmoe-config", json.dumps(CONFIG)),
    "dotted flags": from_flags("--moe-method", "adapmoe", "--adapmoe-config.cache_experts", "48",
                               "--adapmoe-config.store", "host", "--adapmoe-config.prefetch",
                               json.dumps(CONFIG["prefetch"])),
    "file, then keys": from_flags("--moe-method", "adapmoe", "--adapmoe-config", str(file), *KEYS),
    "keys, then file": from_flags(*KEYS, f"--adapmoe-config={{file}}", "--moe-method=adapmoe"),
    "json, then keys": from_flags("--moe_method", "adapmoe", "--adapmoe_config", json.dumps(FILE),
                                  "--adapmoe_config.cache_experts=48", "--adapmoe_config.prefetch.lookahead=2"),
    "file, then json": from_flags("--moe-method", "adapmoe", "--adapmoe-config", str(file),
                                  "--adapmoe-config", JSON_KEYS),
    "file named in yaml": from_flags("--config", str(whole), *KEYS),
    "yaml": from_flags("--config", str(nested), *KEYS),
    "yaml, then json": from_flags("--config", str(nested), "--adapmoe-config", JSON_KEYS),
    "keys in yaml": from_flags("--config", str(single)),
    "python, file and keys": EngineArgs(model=MODEL, moe_method="adapmoe",
                                        adapmoe_config=[str(file), json.loads(JSON_KEYS)]),
    "additional, file and keys": EngineArgs(model=MODEL,
                                            additional_config={{"adapmoe": [str(file), json.loads(JSON_KEYS)]}}),
    "underscores": from_flags("--moe_method", "adapmoe", "--adapmoe_config", json.dumps(CONFIG)),
}}
stock = summary(EngineArgs(model=MODEL).create_engine_config())
print(json.dumps({{
    "stock": stock,
    "ways": {{name: summary(way.create_engine_config()) for name, way in ways.items()}},
    "fields": [f.name for f in dataclasses.fields(AsyncEngineArgs)],
    "edited": EngineArgs.create_engine_config.__module__ + "." + str(hasattr(EngineArgs.__init__, "__wrapped__")),
    "scheduler": type(EngineArgs(model=MODEL).create_engine_config().scheduler_config.get_scheduler_cls()).__name__,
}}))
"""
)


@pytest.fixture(scope="module")
def unpatched():
    return last_json(python(WAYS))


def test_the_ways_are_equal(unpatched):
    ways = unpatched["ways"]
    expected = ways["python"]
    assert expected[0] == {"adapmoe": CONFIG}
    assert expected[1].endswith("AdapMoECPUWorker")
    assert all(way == expected for way in ways.values()), ways
    assert {"moe_method", "adapmoe_config"} < set(unpatched["fields"])
    assert unpatched["edited"].endswith("True")


def test_without_the_flag_nothing_changes(unpatched):
    """Same classes, same compile-cache key as a vLLM that loads no plugins; and our layers are not even imported."""
    code = f"""
from vllm.engine.arg_utils import EngineArgs
import json, sys
config = EngineArgs(model={str(TINY_MIXTRAL)!r}).create_engine_config()
from vllm.model_executor.custom_op import op_registry_oot
print(json.dumps([
    [config.additional_config, config.parallel_config.worker_cls, str(config.scheduler_config.scheduler_cls),
     config.compute_hash()],
    sorted(op_registry_oot),
    [name for name in sys.modules if name.startswith("vllm_adapmoe")],
]))
"""
    with_plugin, registered, imported = last_json(python(code))
    without_plugin, _, nothing = last_json(python(code, VLLM_PLUGINS=""))
    assert with_plugin == without_plugin == unpatched["stock"]
    assert registered == []
    assert nothing == []
    integration = "vllm_adapmoe.integration"
    needed = {
        "vllm_adapmoe",
        integration,
        *(f"{integration}.{name}" for name in ("compat", "entry", "entry.plugin", "entry.edits")),
    }
    assert set(imported) <= needed


@pytest.mark.parametrize(
    "first",
    [
        "from vllm import LLM",
        "from vllm import EngineArgs",
        "from vllm.engine.arg_utils import EngineArgs",
        "import vllm.entrypoints.openai.api_server",
        "from vllm.v1.metrics.stats import SchedulerStats",
    ],
)
def test_the_fields_are_there_whatever_is_imported_first(first):
    code = f"""
{first}
import dataclasses, json
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
stats = SchedulerStats(num_running_reqs=3, worker_stats={{"hits": 2.0, "layer_hits": [1.0, 1.0]}})
back = MsgpackDecoder(SchedulerStats).decode(MsgpackEncoder().encode(stats))
args = EngineArgs(model={str(TINY_MIXTRAL)!r}, moe_method="adapmoe")
print(json.dumps([args.moe_method, back.worker_stats, back.num_running_reqs]))
"""
    assert last_json(python(code)) == ["adapmoe", {"hits": 2.0, "layer_hits": [1.0, 1.0]}, 3]


def test_patched_vllm_uses_its_own_fields(tmp_path, unpatched):
    """The patches apply without fuzz, give the same configurations, and leave the plugin nothing to edit."""
    import importlib.util

    (package,) = importlib.util.find_spec("vllm").submodule_search_locations
    subprocess.run(["cp", "-rs", package, tmp_path / "vllm"], check=True)  # a tree of links
    lines = [line for patch in PATCHES for line in patch.read_text().splitlines()]
    touched = {line.split()[1][2:] for line in lines if line.startswith("+++ b/")}
    for name in touched:
        real = (tmp_path / name).resolve()
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(real.read_bytes())
    for patch in PATCHES:
        applied = subprocess.run(
            ["patch", "-p1", "--fuzz=0", "-i", str(patch)], cwd=tmp_path, capture_output=True, text=True
        )
        assert applied.returncode == 0, applied.stdout
        assert "fuzz" not in applied.stdout and "offset" not in applied.stdout
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + WAYS
    patched = last_json(python(code))
    assert patched["edited"] == "vllm.engine.arg_utils.False"
    assert {key: patched[key] for key in ("ways", "stock")} == {key: unpatched[key] for key in ("ways", "stock")}


PARSE_ERRORS = {
    "unknown key": (["--adapmoe-config", '{"cache": 1}'], "'cache'"),
    "wrong type": (["--adapmoe-config.cache_gb", "big"], "cache_gb='big'"),
    "larger than the device": (["--adapmoe-config.cache_experts", "48", "--kv-cache-memory-bytes", "1T"], " bytes ("),
    "two budgets": (["--adapmoe-config", '{"cache_gb": 1, "cache_experts": 8}'], "cache_gb=1.0, cache_experts=8"),
    "missing file": (["--adapmoe-config", "/no/such.json"], "/no/such.json"),
    "two budgets in single keys": (
        ["--adapmoe-config.cache_gb", "1", "--adapmoe-config.cache_experts", "8"],
        "cache_gb=1.0, cache_experts=8",
    ),
    "unknown nested key": (
        ["--adapmoe-config", '{"cache_experts": 48}', "--adapmoe-config.prefetch.ahead", "2"],
        "'prefetch.ahead' is not known",
    ),
    "too few slots": (["--adapmoe-config.cache_experts", "1"], "cache_experts=1"),
    "too many slots": (["--adapmoe-config.cache_experts", "97"], "cache_experts=97"),
    "store_dir is a file": (["--adapmoe-config.store_dir", __file__], "store_dir="),
    "no such method": (["--moe-method", "other"], "moe_method='other'"),
    "adapters": (["--enable-lora"], "enable_lora=True"),
    "trace of half of the experts": (
        ["--tensor-parallel-size", "2", "--enable-expert-parallel", "--adapmoe-config.trace_out", "/tmp/trace"],
        "trace_out='/tmp/trace' does not work with enable_expert_parallel=True",
    ),
    "shares of whole layers": (
        [
            "--tensor-parallel-size",
            "2",
            "--enable-expert-parallel",
            "--adapmoe-config.profile",
            str(ROOT / "configs" / "tiny_mixtral.json"),
            "--adapmoe-config.allocation",
            "profile",
        ],
        "allocation='profile' does not work with enable_expert_parallel=True",
    ),
    "more slots than a rank has experts": (
        ["--tensor-parallel-size", "2", "--enable-expert-parallel", "--adapmoe-config.cache_experts", "49"],
        "cache_experts=49",
    ),
    "pipeline parallelism": (["--pipeline-parallel-size", "2"], "pipeline_parallel_size=2"),
    "gating by batch on two ranks": (
        [
            "--tensor-parallel-size",
            "2",
            "--adapmoe-config.profile",
            str(ROOT / "configs" / "tiny_mixtral.json"),
            "--adapmoe-config.gating.mode",
            "batch",
            "--adapmoe-config.gating.max_loss_increase",
            "0.005",
        ],
        "gating.mode=batch does not work with tensor_parallel_size=2",
    ),
    "weight offloading": (["--cpu-offload-gb", "1"], "cpu_offload_gb=1"),
}


@pytest.fixture(scope="module")
def refusals():
    """What each of the mistakes is told, through the parser and configuration of `vllm serve`."""
    code = f"""
import json
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm_adapmoe.config import AdapMoEError
told = {{}}
for case, (flags, _) in {PARSE_ERRORS!r}.items():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    try:
        args = parser.parse_args(["--model", {str(TINY_MIXTRAL)!r}, "--moe-method", "adapmoe", *flags])
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except AdapMoEError as error:
        told[case] = str(error)
print(json.dumps(told))
"""
    return last_json(python(code))


@pytest.mark.parametrize("case", PARSE_ERRORS)
def test_a_mistake_is_named_in_one_line(case, refusals):
    assert PARSE_ERRORS[case][1] in refusals[case]
    assert "\n" not in refusals[case]


def assert_one_line(run: subprocess.CompletedProcess[str], named: str) -> None:
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if "vllm-adapmoe: error:" in line]
    assert named in line
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", [["serve"], ["bench", "throughput"]], ids=["serve", "bench"])
def test_the_real_commands_fail_in_one_line(command, tmp_path):
    model = [str(TINY_MIXTRAL)] if command == ["serve"] else ["--model", str(TINY_MIXTRAL)]
    extra = [] if command == ["serve"] else ["--input-len", "8", "--output-len", "8", "--num-prompts", "1"]
    run = subprocess.run(
        [BIN / "vllm", *command, *model, *extra, "--moe-method", "adapmoe", "--adapmoe-config.cache_experts", "1"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert_one_line(run, "cache_experts=1")


def test_a_dense_model_and_another_models_store_are_refused(tmp_path):
    code = f"""
from vllm.engine.arg_utils import EngineArgs
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.integration.loading.identity import Folder, load_identity, source_files
from vllm_adapmoe.store.pack_writer import PackWriter
from pathlib import Path
from transformers import LlamaConfig
import torch
folder = Path({str(tmp_path)!r})
LlamaConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "llama")
made = EngineArgs(model={str(TINY_MIXTRAL)!r}, skip_tokenizer_init=True).create_engine_config()
sources = source_files(Folder({str(TINY_QWEN)!r}), made.load_config)
writer = PackWriter(folder / "store" / "experts-0-of-1.pack", load_identity(made), 1, sources)
writer.put_layer(0, {{"w": torch.ones(2, 2)}})
writer.seal()
for model, config in (folder / "llama", {{}}), ({str(TINY_MIXTRAL)!r}, {{"store_dir": str(folder / "store")}}):
    try:
        EngineArgs(model=str(model), skip_tokenizer_init=True, moe_method="adapmoe", adapmoe_config=config).create_engine_config()
    except AdapMoEError as error:
        print("refused:", error)
"""  # noqa: E501
    run = python(code)
    refused = [line for line in run.stdout.splitlines() if line.startswith("refused:")]
    assert len(refused) == 2, run.stderr[-2000:]
    assert "has no routed experts; remove moe_method" in refused[0]
    assert f"another model ('{TINY_QWEN}': 'model.safetensors' has" in refused[1] and "store_dir" in refused[1]


def test_a_scheduler_that_does_not_listen_is_named():
    code = f"""
import logging
from vllm.engine.arg_utils import EngineArgs
from vllm_adapmoe.integration.scheduler.scheduler import ExpertCacheScheduler
from vllm_adapmoe.integration.scheduler.scheduler import is_cache_aware
class Derived(ExpertCacheScheduler): pass
for scheduler in ("vllm.v1.core.sched.scheduler.Scheduler", Derived):
    config = EngineArgs(
        model={str(TINY_MIXTRAL)!r}, skip_tokenizer_init=True, moe_method="adapmoe", scheduler_cls=scheduler
    ).create_engine_config()
    print("heeds:", is_cache_aware(config.scheduler_config.scheduler_cls))
"""
    run = python(code, VLLM_LOGGING_LEVEL="WARNING")
    assert [line for line in run.stdout.splitlines() if line.startswith("heeds:")] == ["heeds: False", "heeds: True"]
    warnings = [line for line in (run.stdout + run.stderr).splitlines() if "no vllm:adapmoe metrics" in line]
    assert len(warnings) == 1 and "scheduler_cls=vllm.v1.core.sched.scheduler.Scheduler" in warnings[0]


def test_front_end_and_scheduler_do_not_load_the_worker():
    """The API server and the engine core would hold numba, LLVM and vLLM's MoE kernels in memory for nothing."""
    profile = str(ROOT / "configs" / "tiny_mixtral.json")
    code = f"""
import json, sys
from vllm.engine.arg_utils import EngineArgs
config = {{"cache_fraction": 0.5, "profile": {profile!r}}}
EngineArgs(model={str(TINY_MIXTRAL)!r}, moe_method="adapmoe", adapmoe_config=config).create_engine_config()
import vllm_adapmoe.integration.scheduler.scheduler
names = ["numba", "vllm_adapmoe.integration.layers.cached_experts", "vllm_adapmoe.integration.worker.worker"]
print(json.dumps([name for name in names if name in sys.modules]))
"""
    assert last_json(python(code)) == []
