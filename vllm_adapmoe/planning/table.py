"""Prints the result of `adapmoe plan`: a table for each number of bits, and a plot."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_adapmoe.units import GiB, MiB


def _size(nbytes: float) -> str:
    return f"{nbytes / GiB:.2f} GiB" if nbytes >= GiB else f"{nbytes / MiB:.1f} MiB"


def print_plan(result: dict[str, Any], console: Console) -> None:
    """Prints one table per variant, and the assumptions behind the figures."""
    for variant in result["variants"]:
        _print_variant(result, variant, console)
    compute = result["compute"]
    console.print("hits, loads: experts per token, all layers together, that are resident, and that a layer waits for")
    legend = ["MiB: fetched per token"]
    if any(variant["gating"] is not None for variant in result["variants"]):
        legend.append("gated: loads with gating")
    if result["memory"] is not None:
        legend.append(">: --memory")
    console.print("; ".join(legend))
    reserve = result["reserve"]
    share = f"{reserve['share']:.0%} of the memory and " if reserve["share"] else ""
    parts = ", ".join(f"{_size(nbytes)} {name}" for name, nbytes in reserve["parts"].items())
    console.print(
        f"memory: other weights, {share}{parts or _size(reserve['nbytes'])} reserved (--reserve), and the slots",
        markup=False,
    )
    console.print(f"loads: {result['basis']}", markup=False)
    if compute["ms_per_layer"] is not None:
        console.print(f"compute: {compute['ms_per_layer']:g} ms a layer, as given, gated or not")
    else:
        console.print(f"compute: {compute['source']}, {compute['weights_gbps']:.1f} GB/s, each once a token")


def _print_variant(result: dict[str, Any], variant: dict[str, Any], console: Console) -> None:
    size, link = variant["size"], variant["link"]
    table = Table(
        title=f"{result['model']}: experts{_format(variant, ' of {}')}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    gating = variant["gating"]
    gated = gating is not None
    columns = ["", "memory", "slots", "resident", "hits", "loads", "MiB", "tok/s"]
    for column in columns + (["gated", "MiB", "tok/s"] if gated else []):
        table.add_column(column, justify="right", no_wrap=True)
    for point in variant["points"]:
        requested = point["asked"]
        memory = result["memory"] if requested else point["memory"]
        row = [">" if requested else "", _size(memory), str(point["slots"]), f"{point['resident']:.0%}"]
        estimate = point["ungated"]
        row += [f"{estimate['hits']:.1f}", f"{estimate['loads']:.2f}", *_cost(estimate)]
        if gated:
            row += [f"{point['gated']['loads']:.2f}", *_cost(point["gated"])]
        table.add_row(*row, style="bold" if requested else None)
    console.print(table)
    experts = size["num_layers"] * size["num_experts"]
    console.print(
        f"{experts} experts of {_size(size['expert_bytes'])}, {_size(experts * size['expert_bytes'])} in all, and "
        f"{_size(size['other_bytes'])} of other weights; link: {link['gbps']:.2f} GB/s, {link['source']}"
    )
    if (host := variant["host"]) is not None:
        console.print(
            f"{host['experts']} experts in {_size(host['bytes'])} of host memory; disk: {host['disk_gbps']:.2f} GB/s, "
            f"{host['source']}"
        )
    if (decode := variant["decode"])["decided_by"] is not None:
        console.print(
            f"decode: decided by the {decode['decided_by']}, {decode['layer_us']:g} us a MoE layer; fetched at "
            f"{decode['fetch_gbps']:.2f} GB/s"
        )
    if result["max_loss_increase"] is not None and not gated:
        console.print(f"not gated: precision {variant['precision']} alone exceeds +{result['max_loss_increase']:.2%}")
    if gated:
        console.print(
            f"gated: {gating['mean_experts']:.2f} experts per token and layer, predicted loss "
            f"+{result['max_loss_increase']:.2%}" + _rounding(variant)
        )
    for point in variant["points"]:
        shares = point["ungated"]["shares"]
        if point["asked"] and shares is not None and result["allocation"] in ("profile", "uniform"):
            console.print(f"slots of each layer: {', '.join(map(str, shares))}")


def _rounding(variant: dict[str, Any]) -> str:
    """Returns what of the predicted loss is that of fewer bits; empty at those of the checkpoint."""
    if variant["precision"] in (None, 16):
        return ""
    share = variant["gating"]["rounding_loss_increase"]
    if share is None:
        return f", without that of precision {variant['precision']} (adapmoe calibrate --precision)"
    return f", {share:.2%} of it by precision {variant['precision']}"


def _cost(estimate: dict[str, Any]) -> list[str]:
    speed = estimate["tokens_per_second"]
    return [f"{estimate['fetched_bytes'] / MiB:.1f}", f"{speed:.{2 if speed < 1000 else 0}f}"]


def _format(variant: dict[str, Any], text: str) -> str:
    """Returns the text with the experts' format; empty if it is the checkpoint's."""
    if variant["precision"] is not None:
        return text.format(f"precision {variant['precision']}")
    return "" if variant["expert_bits"] is None else text.format(f"{variant['expert_bits']:g} bits")


def plot_plan(result: dict[str, Any], path: Path) -> None:
    """Plots tokens/s against memory, a line per number of bits, dashed if gated; --memory is a dotted vertical line."""
    from vllm_adapmoe.plot import figure

    max_memory = max(point["memory"] for variant in result["variants"] for point in variant["points"])
    unit, name = (GiB, "GiB") if max_memory >= GiB else (MiB, "MiB")
    with figure(path, f"memory, {name}", "tokens/s") as axes:
        for number, variant in enumerate(result["variants"]):
            label = _format(variant, "{}, ")
            memory = [point["memory"] / unit for point in variant["points"]]
            for key, style in (("ungated", "o-"), ("gated", "s--")):
                if variant["points"][0][key] is not None:
                    speed = [point[key]["tokens_per_second"] for point in variant["points"]]
                    axes.plot(memory, speed, style, color=f"C{number}", markersize=4, label=label + key)
        if result["memory"] is not None:
            axes.axvline(result["memory"] / unit, color="grey", linestyle=":", label="--memory")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
