"""The bench of the transfer engine, on a pack of a few hundred KiB: which bytes it moves, not how fast."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.transfer import AHEAD, EXPERTS, LAYERS, run_transfer, synthetic_pack
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.store.file import open_pack

KIB = 1 / 1024


def test_every_way_moves_the_records_it_says(tmp_path):
    result = run_transfer(None, [12 * KIB, 48 * KIB], tmp_path, rounds=2, pass_mib=0)
    assert [pack["record_bytes"] for pack in result["packs"]] == [12 << 10, 48 << 10]
    assert list(tmp_path.iterdir()) == []
    for pack in result["packs"]:
        assert pack["records"] == LAYERS * EXPERTS
        whole = pack["records"] * pack["record_bytes"]
        points = {point["method"]: point for point in pack["points"]}
        assert pack["best_plain"].startswith("plain")
        assert points["plain, 1 reader"]["of_plain"] == {"median": 1.0, "min": 1.0, "max": 1.0, "runs": 2}
        for method, point in points.items():
            # Prefetches are for later layers than the first.
            share = (LAYERS - 1) / LAYERS if method.startswith("prefetch") else 1
            assert point["bytes"] == share * whole, method
            assert point["gbps"]["runs"] == 2 and point["gbps"]["min"] > 0
            if not method.startswith("plain"):
                assert point["busy_gbps"]["median"] >= point["gbps"]["min"]
        assert {f"prefetch, {count} at a time" for count in range(1, AHEAD + 1)} <= set(points)


def test_a_synthetic_pack_has_the_size_asked_for(tmp_path):
    synthetic_pack(tmp_path / "experts.pack", 12 << 10, 1 << 20)
    store = open_pack(tmp_path / "experts.pack", {})
    assert store.num_layers * EXPERTS * (12 << 10) >= 1 << 20
    assert [piece.nbytes for piece in store.layouts[0].pieces] == [8 << 10, 4 << 10]
    store.close()
    with pytest.raises(AdapMoEError, match="are free; free some space"):
        synthetic_pack(tmp_path / "big.pack", 12 << 10, 1 << 60)


def test_the_command_writes_a_result(tmp_path):
    output = tmp_path / "transfer.json"
    arguments = ["transfer", "--record-mib", "0.01171875", "--pass-mib", "1", "--rounds", "1"]
    run = CliRunner(env={"COLUMNS": "100"}).invoke(app, [*arguments, "--store-dir", str(tmp_path), "-o", str(output)])
    assert run.exit_code == 0, run.output
    assert "demand, 8 at a time" in run.output and "prefetch, 2 at a time" in run.output
    content = json.loads(output.read_text())
    assert content["benchmark"] == "transfer" and content["environment"]["versions"]["torch"]
