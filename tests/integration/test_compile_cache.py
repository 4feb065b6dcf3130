"""One compile cache, and a model that fits at one start and not at the next: what is traced differs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_memory import answer

pytestmark = pytest.mark.engine

EXPERTS, EXPERT_BYTES = 24, 3 * 128 * 128 * 2
ARGUMENTS = {"enforce_eager": False, "kv_cache_memory_bytes": 8 << 20}
SCRIPT = Path(__file__).parent / "run_vllm_compiled.py"
FOUND = "Directly load AOT compilation"


def compiled(model: Path, config: dict[str, Any] | None, slots: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, model, json.dumps(config), json.dumps(ARGUMENTS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOM", str(slots * EXPERT_BYTES))
        return subprocess.run(command, capture_output=True, text=True)


def test_what_was_compiled_for_a_resident_model_is_not_used_for_the_same_one_offloaded(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "root"))
    config: dict[str, Any] = {"cache_gb": "auto", "store": "file", "store_dir": str(tmp_path / "packs")}
    first = compiled(model, config, EXPERTS)
    resident = answer(first)
    assert resident["stats"] == {}, "not every expert was resident"
    assert FOUND not in first.stdout + first.stderr

    offloaded = answer(compiled(model, config, EXPERTS // 2))
    assert offloaded["stats"]["slots"] == EXPERTS // 2
    assert offloaded["stats"]["misses"] > 0, "the offloaded path did not run"
    assert offloaded["tokens"] == resident["tokens"]

    again = compiled(model, config, EXPERTS)
    assert FOUND in again.stdout + again.stderr, "the same model was not found again: nothing was tested"
    assert answer(again) == resident | {"peak": answer(again)["peak"]}
