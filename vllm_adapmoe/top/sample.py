"""One reading of a server's `/metrics`."""

import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from vllm_adapmoe.config import AdapMoEError

TIMEOUT = 5.0
CACHE = "vllm:adapmoe_"


@dataclass(frozen=True)
class Sample:
    """Counters and gauges, each summed over the engines of the server."""

    at: float
    """Seconds of a monotonic clock."""
    model: str = ""
    values: dict[str, float] = field(default_factory=dict)
    """By name, without what is said of single layers and without histograms' buckets."""
    layers: dict[str, dict[int, float]] = field(default_factory=dict)
    """Of single layers, by name without `vllm:adapmoe_layer_`."""


def parse_sample(text: str, at: float) -> Sample:
    """Reads Prometheus' text format.

    Raises:
        ValueError: it is not that.
    """
    sample = Sample(at)
    model = ""
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name.endswith(("_bucket", "_created")):
                continue
            if "layer" in labels and name.startswith(CACHE):
                by_layer = sample.layers.setdefault(name.removeprefix(CACHE + "layer_"), {})
                layer = int(labels["layer"])
                by_layer[layer] = by_layer.get(layer, 0.0) + value
            else:
                sample.values[name] = sample.values.get(name, 0.0) + value
            if name == CACHE + "slots":
                model = labels.get("model_name", "")
    return Sample(at, model, sample.values, sample.layers)


def metrics_url(address: str) -> str:
    """Where the metrics of a server are, whose address may be short: `host:port`."""
    url = address if "://" in address else f"http://{address}"
    return url.rstrip("/").removesuffix("/metrics").removesuffix("/v1").rstrip("/") + "/metrics"


def read_sample(address: str) -> Sample:
    """Asks the server.

    Raises:
        AdapMoEError: nobody answers, it is not vLLM, or it serves without the method.
    """
    url = metrics_url(address)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            text = answer.read().decode()
        sample = parse_sample(text, time.monotonic())
    except urllib.error.HTTPError as error:
        raise AdapMoEError(f"{url} answers {error.code}: no vLLM server; give the address of one") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise AdapMoEError(f"{url} cannot be read ({reason}); give the address of a running vLLM server") from None
    if not any(name.startswith("vllm:") for name in sample.values):
        raise AdapMoEError(f"{url} has no metrics of vLLM; give the address of a vLLM server")
    if CACHE + "slots" not in sample.values:
        raise AdapMoEError(f"{url} serves without the expert cache; start it with --moe-method adapmoe")
    return sample
