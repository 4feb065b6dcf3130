"""Ray Serve LLM: two replicas on this machine behind one endpoint, from one pack; each kind of loss, and its end."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, TINY_MIXTRAL

from benchmarks.server import free_port

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # Ray's own

BIN = Path(sys.executable).parent
PROMPTS = ["#include <", "def main(", "import os", "class A", "for i in", "// The"]
NEW_SIGNS = {"engine": "abcde", "replica": "vwxyz"}
LONG, LONG_TOKENS = "template <typename T>", 500
ENGINE = {"enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20}
THREADS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
REFERENCE = f"""
import json
import torch
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # stock vLLM leaves it to others (`AdapMoECPUWorker.init_device`)
    llm = LLM({str(TINY_MIXTRAL)!r}, **{ENGINE!r})
    prompts = dict.fromkeys({PROMPTS!r}, 32) | {{{LONG!r}: {LONG_TOKENS}}}
    told = {{}}
    for prompt, count in prompts.items():  # one by one, as they are asked of the replicas
        (output,) = llm.generate(prompt, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
        told[prompt] = list(output.outputs[0].token_ids)
    print(json.dumps(told))
"""


@dataclass
class Replica:
    """Processes of a replica: the actor, the engine core, the worker."""

    actor: psutil.Process
    core: psutil.Process
    worker: psutil.Process

    def bytes_read(self) -> int:
        return self.worker.io_counters().read_chars

    def packs(self) -> set[tuple[int, str]]:
        """Inode and name of every pack that the worker holds open."""
        files = [Path(os.readlink(fd)) for fd in Path(f"/proc/{self.worker.pid}/fd").iterdir() if os.path.exists(fd)]
        return {(file.stat().st_ino, file.name) for file in files if ".pack" in file.name}


class Cluster:
    """Ray with two CPUs, and the example on it by `serve run`, in a session of processes of its own."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self.http, self.metrics, gcs, client = (free_port() for _ in range(4))
        self.address = f"127.0.0.1:{gcs}"
        self.log, self.store = logs / "serve.log", logs / "store"
        start = [
            "ray", "start", "--head", "--port", str(gcs), "--ray-client-server-port", str(client), "--num-cpus", "2",
            "--node-ip-address", "127.0.0.1", "--include-dashboard", "false", "--object-store-memory", str(80 << 20),
            "--metrics-export-port", str(self.metrics), "--temp-dir", str(folder / "ray"), "--disable-usage-stats",
        ]  # fmt: skip
        port = ["serve", "start", "--http-port", str(self.http)]
        run = [
            "serve", "run", "examples.ray_serve_app:build", f"model={TINY_MIXTRAL}", "name=tiny-mixtral",
            f"adapmoe_config={json.dumps({'cache_experts': 48, 'store_dir': str(self.store)})}",
            f"engine_kwargs={json.dumps(ENGINE)}",
        ]  # fmt: skip
        code = " && ".join(shlex.join(command) for command in (start, port, ["exec", *run]))
        self.process = subprocess.Popen(
            ["bash", "-c", code], cwd=ROOT, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_ADDRESS": self.address},
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """All that are left of the session, zombies apart."""
        left = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return left

    def replicas(self) -> list[Replica]:
        """Those whose worker runs."""
        found = []
        for worker in self.processes():
            try:
                if worker.cmdline()[:1] == ["VLLM::Worker"]:
                    core = worker.parent()
                    found.append(Replica(core.parent(), core, worker))
            except psutil.NoSuchProcess:
                continue
        return found

    def wait(self, seconds: float = 400) -> list[Replica]:
        """Until Serve says that both replicas run; returns them."""
        from ray import serve

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            application = serve.status().applications.get("default")
            if application is not None and application.status == "RUNNING":
                (states,) = [
                    deployment.replica_states
                    for name, deployment in application.deployments.items()
                    if name.startswith("LLMServer")
                ]
                if states == {"RUNNING": 2}:
                    replicas = self.replicas()
                    assert len(replicas) == 2
                    return replicas
            time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-4000:])

    def stop(self) -> None:
        """As Ctrl-C, then Ray's own processes, then whatever is left."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for how in ("terminate", "kill"):
            for process in self.processes():
                try:
                    getattr(process, how)()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(self.processes(), timeout=10)


def needs_ray():
    return pytest.importorskip("ray", reason="Ray is not installed; make ray")


@pytest.fixture(scope="module")
def reference():
    needs_ray()
    run = subprocess.run(
        [sys.executable, "-c", REFERENCE], capture_output=True, text=True, env=os.environ | THREADS, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cluster(reference, every_core, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token into the home folder
        patch.setenv("RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK", "0")  # imports vLLM where nobody needs it
        ray = needs_ray()
        folder = Path(tempfile.mkdtemp(prefix="ray-"))  # names of sockets must be short
        cluster = Cluster(folder, tmp_path_factory.mktemp("serve"))
        try:
            deadline = time.monotonic() + 120
            while "Started Serve" not in cluster.log.read_text():
                assert cluster.process.poll() is None and time.monotonic() < deadline, cluster.log.read_text()
                time.sleep(0.5)
            ray.init(cluster.address, namespace="serve", log_to_driver=False, configure_logging=False)
            cluster.wait()
            yield cluster
        finally:
            ray.shutdown()
            cluster.stop()
            left = cluster.processes()
            shutil.rmtree(folder, ignore_errors=True)
        assert left == []


def complete(cluster: Cluster, prompt: str, count: int = 32, retries: int = 0, stream: bool = False):
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{cluster.http}/v1", api_key="none", max_retries=retries, timeout=120)
    return client.completions.create(
        model="tiny-mixtral", prompt=prompt, max_tokens=count, temperature=0, stream=stream,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip


def ask(cluster: Cluster, prompt: str) -> tuple[list[int], int]:
    """The answer, and the process id of the worker that gave it."""
    before = {replica.worker.pid: replica.bytes_read() for replica in cluster.replicas()}
    tokens = complete(cluster, prompt).choices[0].token_ids
    read = {r.worker.pid: r.bytes_read() - before[r.worker.pid] for r in cluster.replicas() if r.worker.pid in before}
    return tokens, max(read, key=read.__getitem__)


def misses(cluster: Cluster) -> dict[str, float]:
    """Misses of the expert cache, by replica."""
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    counters = [line for line in lines if line.startswith("ray_vllm_adapmoe_expert_misses")]
    return {re.search('ReplicaId="([^"]+)"', line)[1]: float(line.split()[-1]) for line in counters}


def test_the_ray_executor_is_refused_on_the_cpu():
    needs_ray()
    run = subprocess.run(
        [BIN / "vllm", "serve", TINY_MIXTRAL, "--moe-method", "adapmoe", "--distributed-executor-backend", "ray"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert run.returncode != 0
    (line,) = [line for line in run.stderr.splitlines() if "vllm-adapmoe: error:" in line]
    assert "distributed_executor_backend='ray' does not work with moe_method='adapmoe': vLLM's Ray executor" in line
    assert "Traceback" not in run.stderr


def test_engines_with_gpus_run_on_the_ray_executor():
    """What Ray Serve LLM makes of the example with GPUs, as far as that can be seen without any."""
    needs_ray()
    from ray_serve_app import Arguments, engine

    config = engine(Arguments(model=str(TINY_MIXTRAL), gpus=2, adapmoe_config='{"cache_gb": 1}')).get_engine_config()
    arguments = config.get_initialization_kwargs()
    assert arguments["distributed_executor_backend"] == "ray"
    assert arguments["tensor_parallel_size"] == 2
    assert arguments["adapmoe_config"] == {"store": "file", "cache_gb": 1.0}
    assert config.placement_bundles == [{"GPU": 1}] * 2


def test_the_old_ray_executor_is_refused(monkeypatch):
    """On a GPU: the platform is the one thing that is not real here."""
    needs_ray()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError
    from vllm_adapmoe.integration.entry.model_check import check_model

    config = EngineArgs(model=str(TINY_MIXTRAL), distributed_executor_backend="ray").create_engine_config()
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    check_model(AdapMoEConfig(cache_experts=48), config)
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    with pytest.raises(AdapMoEError, match="VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 does not work"):
        check_model(AdapMoEConfig(cache_experts=48), config)


def test_two_replicas_answer_from_one_pack(cluster, reference):
    answered = {}
    for prompt in PROMPTS:
        tokens, answered[prompt] = ask(cluster, prompt)
        assert tokens == reference[prompt]
    replicas = cluster.replicas()
    assert set(answered.values()) == {replica.worker.pid for replica in replicas}
    # What begins alike goes where it was.
    assert [ask(cluster, prompt) for prompt in PROMPTS[:2]] == [(reference[p], answered[p]) for p in PROMPTS[:2]]
    # One pack: both started at once with an empty folder, one packed, and the other waited for it.
    (first,), (second,) = [replica.packs() for replica in replicas]
    assert first == second
    assert [path.name for path in cluster.store.iterdir()] == ["experts-0-of-1.pack"]
    # The counters are on Ray's metrics page, by replica.
    deadline = time.monotonic() + 60
    while len(told := misses(cluster)) < 2:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert all(count > 0 for count in told.values())


def finished(stream) -> bool:
    """Reads a stream to its end; whether that is the end of the answer."""
    from openai import APIError

    reason = None
    try:
        for chunk in stream:
            reason = chunk.choices[0].finish_reason
    except APIError:
        return False
    return reason is not None


@pytest.mark.parametrize("lost", ["engine", "replica"])
def test_a_lost_replica_comes_back(cluster, reference, lost):
    """The engine alone: its replica tells why, and is replaced when it has failed its health checks. All of it: the
    stream just ends, without a finish reason, and no request goes there any more."""
    before = cluster.wait()
    packs = before[0].packs()
    answered = {prompt: ask(cluster, prompt)[1] for prompt in PROMPTS}
    assert len(set(answered.values())) == 2
    read = {replica.worker.pid: replica.bytes_read() for replica in before}
    stream = iter(complete(cluster, LONG, LONG_TOKENS, stream=True))
    for _ in range(5):
        next(stream)
    victim = max(before, key=lambda replica: replica.bytes_read() - read[replica.worker.pid])
    for process in [victim.core, victim.worker] + [victim.actor] * (lost == "replica"):
        process.kill()
    assert not finished(stream)
    # The other answers in the meantime.
    prompt = next(prompt for prompt in PROMPTS if answered[prompt] != victim.worker.pid)
    assert complete(cluster, prompt).choices[0].token_ids == reference[prompt]
    # A client that tries again gets its whole answer, before the lost one is back.
    assert complete(cluster, LONG, LONG_TOKENS, retries=8).choices[0].token_ids == reference[LONG]
    assert len([replica for replica in cluster.replicas() if replica.worker.pid in read]) == 1

    after = cluster.wait()
    (new,) = [replica for replica in after if replica.worker.pid not in read]
    # Texts that begin like none before go where the fewest have been.
    assert new.worker.pid in [ask(cluster, sign * 9)[1] for sign in NEW_SIGNS[lost]]
    assert [complete(cluster, prompt).choices[0].token_ids for prompt in PROMPTS] == [reference[p] for p in PROMPTS]
    assert {pack for replica in after for pack in replica.packs()} == packs  # nothing was packed anew
