"""Stock vLLM and the plugin under model runner V2 on the CPU: prints tokens and counters as JSON.

First with vLLM's experts of the CPU, then with its Triton experts, and steps in which the GPU would decide.

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
import torch  # noqa: E402
from vllm import SamplingParams  # noqa: E402
from vllm.model_executor.layers.fused_moe import override_config  # noqa: E402
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput  # noqa: E402
from vllm.v1.worker.cpu_worker import CPUWorker  # noqa: E402

from tests.integration.played_gpu import interpret_kernels, interpret_triton_experts, use_maps  # noqa: E402
from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts  # noqa: E402
from vllm_adapmoe.device import decode  # noqa: E402
from vllm_adapmoe.device.residency import COUNTERS  # noqa: E402
from vllm_adapmoe.integration.compat import requests_of_step  # noqa: E402
from vllm_adapmoe.integration.layers.mapped_experts import kernel_of  # noqa: E402
from vllm_adapmoe.integration.measure.engine import Engine  # noqa: E402
from vllm_adapmoe.integration.worker.gpu_steps import GpuSteps  # noqa: E402

ARGS = ENGINE_ARGS | {"enforce_eager": True}
ASKED, PARAMS = prompts(4, 2048, seed=4), greedy(logprobs=2)
# The interpreter would multiply the bits of bfloat16 as integers (`create_dot`).
TRITON_ARGS = ARGS | {"dtype": "float16", "moe_backend": "triton", "max_num_seqs": 2}
# Few, for each program takes milliseconds; yet two columns of the first product, two steps of the second one's sums.
TILES = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "SPLIT_K": 1,
         "num_warps": 4, "num_stages": 2}  # fmt: skip
SHORT = {4: [11, 12, 13, 14, 15], 2: [700, 701, 702, 703, 704, 705], 3: [21, 22, 23, 24, 25]}
"""Prompts by their number of output tokens; the third begins when the second has ended, beside the first."""


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


def short(engine, asked):
    params = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False, logprobs=2)
              for count in asked]  # fmt: skip
    return answers(engine, list(asked.values()), params)


steps = []
"""Tokens of each step, and whether the GPU decided in it."""


def note_steps(patch):
    step = GpuSteps.step

    def noted(self, tokens, *rest):
        steps.append([tokens, self.decides(tokens)])
        return step(self, tokens, *rest)

    patch.setattr(GpuSteps, "step", noted)


def kernels(worker):
    """Names of the layers' kernels that run on slots."""
    return [type(kernel).__name__ for kernel in map(kernel_of, worker.moe_layers) if "apply" in vars(kernel)]


def misses_of_last_steps(worker):
    """Returns the misses that the device has counted since the host last gave it the cache."""
    return sum(int(pool.counters[len(COUNTERS) + 1 :: 2].sum()) for pool in worker.gpu_steps.decode.pools)


def swap_rows(patch):
    """Plants a fault: in steps that the GPU decides, experts run with each other's weights."""
    experts = decode.DeviceDecode.experts

    def swapped(*args):
        row_of, ids = experts(*args)
        return torch.cat((row_of[:-1].flip(0), row_of[-1:])), ids

    patch.setattr(decode.DeviceDecode, "experts", swapped)


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
with pytest.MonkeyPatch.context() as patch, override_config(TILES):
    interpret_triton_experts(patch)
    with Engine(model, None, **TRITON_ARGS) as engine:
        results["triton"] = short(engine, SHORT)
    use_maps(patch)
    interpret_kernels(patch)
    patch.setattr(decode, "MAX_TOKENS", 4)
    note_steps(patch)
    with Engine(
        model, VLLM_STEPS | {"cache_fraction": 0.5, "store": "host", "decode": "device"}, **TRITON_ARGS
    ) as engine:
        engine.llm.collective_rpc(warm_up)
        results["gpu_warmed_up"] = engine.cache_stats()["misses"]
        results["on_gpu"] = short(engine, SHORT)
        results["steps"] = list(steps)
        results["gpu_misses"] = engine.llm.collective_rpc(misses_of_last_steps)[0]
        results["kernels"] = engine.llm.collective_rpc(kernels)[0]
        swap_rows(patch)
        results["planted"] = short(engine, {2: SHORT[4]})
print(json.dumps(results))
