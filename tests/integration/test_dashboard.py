"""The Grafana dashboard against a real server, and a real Prometheus where there is one."""

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import pytest
import yaml
from conftest import ROOT
from demo import DemoServer

from benchmarks.server import free_port

pytestmark = pytest.mark.engine

FOLDER = ROOT / "examples" / "grafana"
DASHBOARD = json.loads((FOLDER / "adapmoe.json").read_text())
SECONDS = 40


def queries() -> dict[str, str]:
    """Expressions by panel and legend, with Grafana's variables filled in."""
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"]
        .replace("$__rate_interval", "2m")
        .replace("$model", ".*")
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }


def check_names(page: str) -> None:
    """Every metric that the dashboard asks for is on the page, and every metric of ours is asked for."""
    names = {line.split("{")[0].split()[0] for line in page.splitlines() if line and not line.startswith("#")}
    asked = {name for expr in queries().values() for name in re.findall(r"vllm:\w+", expr)}
    assert asked <= names
    ours = {name for name in names if name.startswith("vllm:adapmoe_") and not name.endswith(("_created", "_count"))}
    assert ours <= asked


def test_the_dashboard_is_one_that_grafana_takes():
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert DASHBOARD["uid"] and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24 and panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
    taken = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken), "panels overlap"


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here")
def test_every_query_gives_data(tmp_path):
    config = {
        "cache_experts": 24,
        "store_dir": str(tmp_path / "store"),
        "profile": str(ROOT / "configs" / "tiny_mixtral.json"),
        "allocation": "profile",
        "gating": {"mode": "token", "target_experts": 1.6},
    }
    with DemoServer("server", tmp_path, config, "--enforce-eager") as server:
        port = free_port()
        scraping = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        scraping["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.port}"]
        scraping["scrape_configs"][0]["scrape_interval"] = "2s"
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(scraping))
        command = [
            "prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        with (
            (tmp_path / "prometheus.log").open("w") as log,
            subprocess.Popen(command, stdout=log, stderr=log) as prometheus,
        ):
            try:
                client = server.client()
                deadline = time.monotonic() + SECONDS
                number = 0
                while time.monotonic() < deadline or number < 3:
                    prompt = f"def f{number}("
                    client.completions.create(model="tiny-mixtral", prompt=prompt, max_tokens=24, temperature=0)
                    number += 1
                results = {name: ask(port, expr) for name, expr in queries().items()}
            finally:
                prometheus.terminate()
                prometheus.wait(timeout=20)
    empty = [name for name, result in results.items() if not result]
    assert empty == []
    wrong = [name for name, result in results.items() for one in result if one["value"][1] in ("NaN", "+Inf", "-Inf")]
    assert wrong == []
    for name, result in results.items():
        print(f"{name:45} {len(result):3} series, first {result[0]['value'][1]}")
    value = {name: float(result[0]["value"][1]) for name, result in results.items()}
    assert 0 < value["Hit rate: hit rate"] < 1 and 0 < value["Waiting for experts: "] < 1
    assert value["Experts per token: "] == pytest.approx(1.6, abs=0.2)
    assert value["Slots: slots"] == 24
    assert all(len(results[f"{title}: layer {{{{layer}}}}"]) == 12 for title in LAYER_PANELS)


LAYER_PANELS = [
    "Hit rate by layer",
    "Resident experts by layer",
    "Experts kept per token by layer",
    "Slot floors by layer",
]


def ask(port: int, expr: str) -> list[dict[str, Any]]:
    """An instant query."""
    url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expr})
    try:
        with urllib.request.urlopen(url) as answer:
            return json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expr}: {error.read().decode()}") from None
