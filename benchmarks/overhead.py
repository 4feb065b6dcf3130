"""Measures the overhead of the plugin over stock vLLM when no expert has to be fetched, interleaved."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workload import Workload, measure, ratios
from vllm_adapmoe.results import rotated

FIGURES = ("prefill_tokens_per_second", "decode_tokens_per_second")


def run_overhead(workload: Workload, enforce_eager: bool = False) -> dict[str, Any]:
    """Starts the engines side by side and measures them in turn.

    `all_resident` has a slot for every expert. `one_short` has one slot less, so every step uses the slot map and the
    eviction policy while almost nothing is fetched: it shows the overhead of the machinery itself.
    """
    from vllm_adapmoe.integration.measure.engine import Engine, count_experts

    experts = count_experts(workload.model)
    configurations: dict[str, dict[str, Any] | None] = {
        "stock": None,
        "all_resident": {"cache_experts": experts},
        "one_short": {"cache_experts": experts - 1, "store": "host"},
    }
    prompts = workload.prompts()
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in configurations}
    engines = {
        name: Engine(workload.model, config, max_model_len=workload.length, enforce_eager=enforce_eager)
        for name, config in configurations.items()
    }
    try:
        for engine in engines.values():
            measure(engine, prompts, workload.output_tokens)
        for number in range(workload.rounds):
            for name in rotated(list(engines), number):
                results[name].append(measure(engines[name], prompts, workload.output_tokens))
    finally:
        for engine in engines.values():
            engine.close()
    tokens = {name: [result["tokens"] for result in measured] for name, measured in results.items()}
    return {
        "benchmark": "overhead",
        **workload.described(),
        "enforce_eager": enforce_eager,
        "experts": experts,
        "same_tokens": all(tokens[name] == tokens["stock"] for name in tokens),
        "ratio_to_stock": {
            name: {figure: ratios(results[name], results["stock"], figure) for figure in FIGURES}
            for name in configurations
            if name != "stock"
        },
        "rounds": {
            name: [{key: result[key] for key in FIGURES} for result in measured] for name, measured in results.items()
        },
    }


def print_overhead(result: dict[str, Any], console: Console) -> None:
    """Prints the result as a table."""
    table = Table(title=f"Throughput over stock vLLM, batch {result['batch']}, {result['model']}")
    for column in ("", "prefill", "min .. max", "decode", "min .. max"):
        table.add_column(column, justify="left" if not column else "right")
    for name, figures in result["ratio_to_stock"].items():
        cells = []
        for figure in FIGURES:
            ratio = figures[figure]
            cells += [f"{ratio['median']:.3f}", f"{ratio['min']:.3f} .. {ratio['max']:.3f}"]
        table.add_row(name.replace("_", " "), *cells)
    console.print(table)
    console.print("same tokens as stock:", "yes" if result["same_tokens"] else "[red]NO[/red]")
