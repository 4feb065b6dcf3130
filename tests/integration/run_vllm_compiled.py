"""`run_offline.py` as vLLM compiles on a GPU: split at attention, kept in its compile cache and loaded from there.

vLLM's CPU platform turns that mode (`CompilationMode.VLLM_COMPILE`) into another, whose artefacts it cannot load again
(`check_and_update_config` in `vllm/platforms/cpu.py` of 0.32), and one of its passes asks for operations that only the
CUDA build has (`fix_functionalization.py`): both are undone here. `ROOM` in the environment is the memory for slots, in
bytes: nothing in the configuration says how much there is.
"""

import os
import sys
from typing import Any

from run_offline import main
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CompilationMode
from vllm.platforms.cpu import CpuPlatform

from vllm_adapmoe.integration.loading.slot_pools import SlotPools
from vllm_adapmoe.planning.slot_budget import DeviceMemory

settle = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]


def keep_the_mode(cls: type[CpuPlatform], vllm_config: Any) -> None:
    compilation = vllm_config.compilation_config
    mode = compilation.mode
    settle(cls, vllm_config)
    if mode == CompilationMode.VLLM_COMPILE:
        compilation.mode, compilation.backend, compilation.compile_sizes = mode, "inductor", []


# Here, and not below, for the processes that vLLM starts: they import this file.
CpuPlatform.check_and_update_config = classmethod(keep_the_mode)  # type: ignore[assignment]
FixFunctionalizationPass.__call__ = lambda self, graph: None  # type: ignore[method-assign]
SlotPools._memory = (  # type: ignore[method-assign]
    lambda pools, resident=True: DeviceMemory(int(os.environ["ROOM"]))
)

if __name__ == "__main__":
    sys.exit(main())
