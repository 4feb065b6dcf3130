"""Reads a server's `/metrics`."""

import http.client
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.printable import printable

TIMEOUT = 5.0
"""Seconds within which the complete answer must arrive."""
ANSWER_BYTES = 64 << 20
MAX_VALUE = 1e18
"""Largest value accepted for a counter; bytes fetched would take years to reach it."""
LAYERS = 4096
"""Maximum number of layers accepted, more than any model has; each is a line of the view."""
CACHE = "vllm:adapmoe_"


@dataclass(frozen=True)
class Sample:
    """One reading of counters and gauges, each summed over the server's engines."""

    at: float
    """Time of the reading, seconds of a monotonic clock."""
    model: str = ""
    values: dict[str, float] = field(default_factory=dict)
    """Values by metric name, those per layer summed too, without histogram buckets."""
    layers: dict[str, dict[int, float]] = field(default_factory=dict)
    """Values per layer, by metric name without `vllm:adapmoe_layer_`."""


def parse_sample(text: str, at: float) -> Sample:
    """Parses Prometheus' text format.

    Raises:
        ValueError: `text` is not in that format, or names an impossible layer.
    """
    sample = Sample(at)
    model = ""
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name.endswith(("_bucket", "_created")):
                continue
            if not abs(value) < MAX_VALUE:  # NaN, too
                value = 0.0
            if "layer" in labels and name.startswith(CACHE):
                by_layer = sample.layers.setdefault(name.removeprefix(CACHE + "layer_"), {})
                layer = int(labels["layer"])
                if not 0 <= layer < LAYERS:
                    raise ValueError(f"layer {layer}, more than the maximum of {LAYERS}")
                by_layer[layer] = by_layer.get(layer, 0.0) + value
            sample.values[name] = sample.values.get(name, 0.0) + value
            if name == CACHE + "slots":
                model = printable(labels.get("model_name", ""))
    return Sample(at, model, sample.values, sample.layers)


def metrics_url(address: str) -> str:
    """Returns the URL of a server's metrics; `address` may be just `host:port`."""
    url = address if "://" in address else f"http://{address}"
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1").rstrip("/") + "/metrics"


def read_sample(address: str) -> Sample:
    """Requests the metrics of a server and parses them.

    Raises:
        AdapMoEError: no answer, not a vLLM server, or one without the expert cache.
    """
    url = metrics_url(address)
    if not url.startswith(("http://", "https://")):
        raise AdapMoEError(f"{url} is not the address of a server; give one like http://localhost:8000")
    try:
        sample = parse_sample(_answer(url).decode(), time.monotonic())
    except urllib.error.HTTPError as error:
        raise AdapMoEError(f"{url} answers {error.code}: no vLLM server; give the address of one") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise AdapMoEError(f"{url} cannot be read ({reason}); give the address of a running vLLM server") from None
    if not any(name.startswith("vllm:") for name in sample.values):
        raise AdapMoEError(f"{url} has no metrics of vLLM; give the address of a vLLM server")
    if not {CACHE + "slots", CACHE + "resident_experts"} <= sample.values.keys():
        raise AdapMoEError(f"{url} serves without the expert cache; start it with --moe-method adapmoe")
    return sample


def _answer(url: str) -> bytes:
    """Returns the body at a URL; limits time and size, since the server may answer slowly or endlessly."""
    end = time.monotonic() + TIMEOUT
    data = b""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        while part := answer.read1(1 << 16):
            data += part
            if len(data) > ANSWER_BYTES:
                raise ValueError(f"more than {ANSWER_BYTES} bytes")
            if time.monotonic() > end:
                raise ValueError(f"no complete answer in {TIMEOUT:.0f} s")
    return data
