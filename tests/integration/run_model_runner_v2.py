"""Stock vLLM and the plugin under model runner V2 on the CPU: prints tokens and counters as JSON.

vLLM takes Triton for missing on a CPU without Triton's CPU backend. The interpreter does as well, for the few small
kernels of this runner; so that backend is announced, before vLLM looks for it.
"""

import json
import os
import sys
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
               "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # fmt: skip

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

import pytest  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput  # noqa: E402
from vllm.v1.worker.cpu_worker import CPUWorker  # noqa: E402

from tests.integration.played_gpu import interpret_kernels, play_gpu, stand_in  # noqa: E402
from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts  # noqa: E402
from vllm_adapmoe.integration.compat import requests_of_step  # noqa: E402
from vllm_adapmoe.integration.measure.engine import Engine  # noqa: E402

ARGS = ENGINE_ARGS | {"enforce_eager": True}
ASKED, PARAMS = prompts(4, 2048, seed=4), greedy(logprobs=2)


def order_of_rows(worker):
    runner = worker.model_runner
    states = SimpleNamespace(req_id_to_index={"a": 0, "b": 1, "c": 2}, num_computed_tokens_np=[0, 2, 5])
    fake = SimpleNamespace(req_states=states, decode_query_len=runner.decode_query_len)
    scheduled = SimpleNamespace(num_scheduled_tokens={"a": 3, "b": 1, "c": 1}, scheduled_spec_decode_tokens={})
    return requests_of_step(fake, scheduled)


def steps_of_a_made_up_request(worker):
    """A GPU's `compile_or_warm_up_model` runs such (`warmup_kernels` of vllm/v1/worker/gpu/warmup.py), a CPU's none."""
    ids = list(range(4))
    request = NewRequestData(
        req_id="_warmup_0_", prompt_token_ids=ids, mm_features=[], pooling_params=None, lora_request=None,
        sampling_params=SamplingParams(max_tokens=2, temperature=0.0), block_ids=([1],), num_computed_tokens=0,
        prefill_token_ids=ids,
    )  # fmt: skip
    step, end = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [request]
    step.num_scheduled_tokens = {request.req_id: len(ids)}
    step.total_num_scheduled_tokens = len(ids)
    end.finished_req_ids = {request.req_id}
    worker.execute_model(step)
    worker.sample_tokens(None)
    worker.execute_model(end)


def warm_up(worker):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUWorker, "compile_or_warm_up_model", steps_of_a_made_up_request)
        worker.compile_or_warm_up_model()


model, profile = sys.argv[1:]
results = {}
with Engine(model, None, **ARGS) as engine:
    results["stock"] = [tokens for tokens, _ in answers(engine, ASKED, PARAMS)]
with Engine(model, VLLM_STEPS | {"cache_fraction": 0.5, "profile": profile}, **ARGS) as engine:
    engine.llm.collective_rpc(warm_up)
    results["warmed_up"] = engine.cache_stats()
    results["cached"] = [tokens for tokens, _ in answers(engine, ASKED, PARAMS)]
    results["stats"] = engine.cache_stats()
    results["runner"] = engine.llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)[0]
    results["requests"] = engine.llm.collective_rpc(order_of_rows)[0]
with pytest.MonkeyPatch.context() as patch:
    stand_in(patch)
    with Engine(model, None, **ARGS) as engine:
        results["mapped"] = [tokens for tokens, _ in answers(engine, ASKED, PARAMS)]
    play_gpu(patch)
    interpret_kernels(patch)
    with Engine(model, VLLM_STEPS | {"cache_fraction": 0.5, "store": "host", "decode": "device"}, **ARGS) as engine:
        engine.llm.collective_rpc(warm_up)
        results["gpu_warmed_up"] = engine.cache_stats()["misses"]
        results["on_gpu"] = [tokens for tokens, _ in answers(engine, ASKED, PARAMS)]
        results["gpu_stats"] = engine.cache_stats()
        results["gpu_decided"] = engine.llm.collective_rpc(lambda worker: int(worker.gpu_steps.decode.owns))[0]
print(json.dumps(results))
