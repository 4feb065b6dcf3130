"""What forces tokens, under model runner V2 on the CPU: `evaluate`, `frontier` and `ablation`, each with few points.

    python run_v2_measurements.py MODEL PROFILE TEXT

Prints their results as JSON. Triton's CPU backend is announced as in `run_model_runner_v2`.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
               "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # fmt: skip

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

from benchmarks import ablation, frontier  # noqa: E402
from vllm_adapmoe.calibrate import evaluate  # noqa: E402
from vllm_adapmoe.integration.measure.engine import Engine  # noqa: E402
from vllm_adapmoe.integration.measure.losses import decode_losses, prefill_losses  # noqa: E402

model, profile, text = map(Path, sys.argv[1:])
LENGTH = 14

runners = []
start = Engine.__init__


def noted(self, *args, **kwargs):
    # The announced backend cannot compile, which `ablation` alone does.
    start(self, *args, **kwargs | {"enforce_eager": True})
    runners.append(self.llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)[0])


Engine.__init__ = noted  # type: ignore[method-assign]
sequence = list(range(20, 20 + LENGTH))
with Engine(model, None, forced=True, enforce_eager=True, max_model_len=LENGTH + 1) as stock:
    prefill, decode = prefill_losses(stock, [sequence]), decode_losses(stock, [sequence], 8)
    best = list(stock.best_tokens(sequence, 8))
results = {
    "prefill": prefill.nats[7:].tolist(), "decode": decode.nats.tolist(), "best": [decode.best.tolist(), best],
}  # fmt: skip

evaluate.points = lambda loaded, thresholds, points=evaluate.points: points(loaded, thresholds)[:2]
evaluate.DECODE_SEQUENCES, evaluate._compare = 2, lambda rows, top_k: None
results["evaluate"] = evaluate.run_evaluate(
    evaluate.EvaluateSpec(
        model=model, profile=profile, data=text, tokens=2 * LENGTH, sequence_length=LENGTH,
        cache={"cache_fraction": 0.5}, thresholds=[0.01],
    )
)  # fmt: skip
frontier.BATCHES, frontier.FRACTIONS = {2: 2}, (0.5,)
frontier.plans = lambda *asked, plans=frontier.plans, **kwargs: plans(*asked, **kwargs)[:2]
results["frontier"] = frontier.run_frontier(model, profile, text, LENGTH)
ablation.GRID = [[], ["gating"]]
results["ablation"] = ablation.run_ablation(
    ablation.AblationSpec(
        model=model, text=text, rounds=1, batch=1, prompt_tokens=4, output_tokens=3, profile=profile, batches=1,
        resident=0.5, ratio=1.0, max_loss_increase=0.01, loss_tokens=0,
    )
)  # fmt: skip
print(json.dumps(results | {"runners": runners}))
