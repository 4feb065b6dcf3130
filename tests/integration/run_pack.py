"""Packs a model into each of several folders; or is killed, in earnest, when so many layers have been packed.

python run_pack.py MODEL LAYERS-OR-0 FOLDER...
"""

import os
import signal
import sys
from typing import Any

from vllm_adapmoe.integration.loading.packing import pack_experts
from vllm_adapmoe.store.pack_writer import PackWriter


def main() -> None:
    model, layers, *folders = sys.argv[1:]
    put_layer = PackWriter.put_layer
    put: list[int] = []

    def put_and_die(self: PackWriter, layer: int, tensors: Any) -> None:
        if len(put) == int(layers) > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        put_layer(self, layer, tensors)
        put.append(layer)

    PackWriter.put_layer = put_and_die  # type: ignore[method-assign]  # a kill at a known place
    for folder in folders:
        put.clear()
        pack_experts(model, folder)
        print(f"packed {len(put)} layers into {folder}", flush=True)


if __name__ == "__main__":
    main()
