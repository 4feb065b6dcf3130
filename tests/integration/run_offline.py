"""One engine in this process, for tests that watch a whole process: prints tokens, peak anonymous memory, statistics.

python run_offline.py MODEL CONFIG-OR-null [ENGINE-ARGUMENTS]
"""

import json
import sys
import threading
import time
from pathlib import Path


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Peak(threading.Thread):
    """Highest anonymous memory of this process, sampled every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.start()

    def run(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.005)


def main() -> None:
    peak = Peak()
    from vllm_adapmoe.integration.measure.engine import Engine

    model, config = sys.argv[1], json.loads(sys.argv[2])
    args = {"kv_cache_memory_bytes": 8 << 20} if len(sys.argv) < 4 else json.loads(sys.argv[3])
    engine = Engine(model, config, max_model_len=128, max_num_seqs=4, **({"enforce_eager": True} | args))
    prompts = [[5 + number, 17, 301, 42, 88, 7] * 4 for number in range(3)]
    run = engine.generate(prompts, 24)
    print(json.dumps({"tokens": run.tokens, "peak": peak.bytes, "stats": engine.cache_stats()}))
    engine.close()


if __name__ == "__main__":
    main()
