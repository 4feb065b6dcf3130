"""`adapmoe top`: what two readings of `/metrics` come to, and that it fits a terminal."""

import http.server
import io
import json
import threading

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_adapmoe.cli.app import app
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.top.render import render
from vllm_adapmoe.top.sample import metrics_url, parse_sample, read_sample
from vllm_adapmoe.top.view import make_view


def page(hits: int, layers: int = 2, engines: int = 1, experts: int = 8) -> str:
    """A page of `/metrics` where everything counted is a multiple of `hits`."""
    lines = []
    totals = {
        "adapmoe_expert_hits_total": 3 * hits, "adapmoe_expert_misses_total": hits,
        "adapmoe_fetched_bytes_total": hits * 2**20, "adapmoe_fetch_seconds_total": hits / 1000,
        "adapmoe_prefetches_total": hits, "adapmoe_prefetch_hits_total": hits / 2,
        "adapmoe_prefetches_late_total": hits / 4, "adapmoe_prefetches_wasted_total": hits / 8,
        "adapmoe_prefetches_cancelled_total": hits / 8, "adapmoe_fetch_stall_seconds_sum": hits / 100,
        "adapmoe_fetch_stall_seconds_count": hits, "adapmoe_slots": 12, "adapmoe_resident_experts": 11,
        "adapmoe_gated_tokens_total": 10 * hits, "adapmoe_kept_experts_total": 15 * hits,
        "adapmoe_gating_loss_nats_total": hits / 10, "generation_tokens_total": 5 * hits,
        "num_requests_running": 2, "num_requests_waiting": 1, "time_to_first_token_seconds_sum": hits / 10,
        "time_to_first_token_seconds_count": hits / 5,
    }  # fmt: skip
    for engine in range(engines):
        labels = f'engine="{engine}",model_name="m"'
        lines += [f"vllm:{name}{{{labels}}} {value}" for name, value in totals.items()]
        lines.append(f'vllm:adapmoe_fetch_stall_seconds_bucket{{{labels},le="0.1"}} 1e9')
        for layer in range(layers):
            for name, value in {
                "hits_total": hits * layer, "misses_total": hits, "resident_experts": min(layer, experts),
                "experts": experts,
            }.items():  # fmt: skip
                lines.append(f'vllm:adapmoe_layer_{name}{{{labels},layer="{layer}"}} {value}')
    return "\n".join(lines) + "\n"


def test_a_sample_sums_over_engines_and_layers():
    values = parse_sample(page(100, layers=3, engines=2), 0.0).values
    assert values["vllm:adapmoe_layer_hits_total"] == 2 * 100 * (0 + 1 + 2)
    assert values["vllm:adapmoe_expert_misses_total"] == 200
    assert not any(name.endswith("_bucket") for name in values)


def test_rates_are_of_the_interval_and_totals_of_the_start():
    view = make_view(parse_sample(page(100), 10.0), parse_sample(page(300), 14.0))
    assert (view.model, view.running, view.waiting, view.slots, view.resident) == ("m", 2, 1, 12, 11)
    late, start = view.interval, view.start
    assert late.seconds == 4 and start.seconds is None
    assert late.output_tokens == 1000 and start.output_tokens == 1500
    assert late.hit_rate == start.hit_rate == 0.75
    assert late.fetched_bytes == 200 * 2**20 and late.bytes_per_second == pytest.approx(1000 * 2**20)
    assert late.stall_seconds == pytest.approx(2) and start.stall_seconds == pytest.approx(3)
    assert (late.prefetches, late.prefetches_used, late.prefetches_wasted, late.prefetches_cancelled) == (
        200,
        150,
        25,
        25,
    )
    assert late.experts_per_token == 1.5 and late.loss_per_token == pytest.approx(0.02), "two layers"
    assert late.first_token_seconds == 0.5 and late.token_seconds is None
    assert [(one.layer, one.resident, one.experts, one.hit_rate) for one in view.layers] == [
        (0, 0, 8, 0),
        (1, 1, 8, 0.5),
    ]


def test_engines_are_summed_and_a_new_server_begins_anew():
    view = make_view(parse_sample(page(100), 0.0), parse_sample(page(300, engines=2), 1.0))
    assert view.slots == 24 and view.interval.prefetches == 500 and view.layers[1].experts == 16
    restarted = make_view(parse_sample(page(100), 0.0), parse_sample(page(40), 1.0))
    assert restarted.interval.prefetches == 40
    quiet = make_view(parse_sample(page(100), 0.0), parse_sample(page(100), 1.0))
    assert quiet.interval.hit_rate is None and quiet.layers[1].hit_rate == 0.5, "of the start, where nothing was asked"


@pytest.mark.parametrize("layers", [0, 1, 12, 32, 48, 94, 200])
@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("height", [24, 40, None])
def test_it_fits(layers, width, height):
    now = parse_sample(page(300, layers, experts=128), 1.0)
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(make_view(parse_sample(page(100, layers, experts=128), 0.0), now), width, height))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    if height is not None:
        assert len(lines) <= height
    shown = sum(line.count("/128") for line in lines)
    more = [line for line in lines if "more layers" in line]
    assert shown + (int(more[0].split()[1]) if more else 0) == layers
    if height is None or layers <= (94 if height == 40 else 32):
        assert not more, "every layer of any model there is, in a window of 40 lines"


def test_addresses():
    assert metrics_url("localhost:8000") == metrics_url("http://localhost:8000/v1/") == "http://localhost:8000/metrics"
    assert metrics_url("https://h/x/metrics") == "https://h/x/metrics"


@pytest.fixture
def server():
    """Serves whatever text the test sets."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            text = self.server.pages.pop(0) if len(self.server.pages) > 1 else self.server.pages[0]
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "answers 404: no vLLM server"),
        ("<html>", "cannot be read"),
        ("up 1\n", "has no metrics of vLLM"),
        ('vllm:num_requests_running{engine="0"} 0\n', "serves without the expert cache; start it with --moe-method"),
    ],
)
def test_others_than_a_server_with_the_method(server, text, message):
    server.pages = [text]
    with pytest.raises(AdapMoEError, match=message):
        read_sample(f"127.0.0.1:{server.server_port}")


def test_nobody_there():
    with pytest.raises(AdapMoEError, match=r"http://127\.0\.0\.1:1/metrics cannot be read \(.*refused"):
        read_sample("127.0.0.1:1")


def test_json_for_programs(server):
    server.pages = [page(100), page(300)]
    run = CliRunner().invoke(app, ["top", f"127.0.0.1:{server.server_port}", "--once", "--json", "--interval", "0.1"])
    assert run.exit_code == 0, run.output
    view = json.loads(run.output)
    assert view["interval"]["prefetches"] == 200 and view["layers"][1]["hit_rate"] == 0.5


def test_a_host_tier_has_a_line_of_its_own():
    def rendered(text: str) -> str:
        console = Console(width=100, file=io.StringIO())
        console.print(render(make_view(parse_sample(page(100), 0.0), parse_sample(text, 5.0)), 100, None))
        return console.file.getvalue()

    labels = '{engine="0",model_name="m"}'
    tiered = f"vllm:adapmoe_host_hits_total{labels} 30\nvllm:adapmoe_host_misses_total{labels} 90\n"
    assert "from host memory" not in rendered(page(200))
    (line,) = (line for line in rendered(page(200) + tiered).splitlines() if "from host memory" in line)
    assert line.split()[-2:] == ["25.0%", "25.0%"]
