"""Renders the view of `adapmoe top` as text for a terminal."""

import math
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_adapmoe.top.view import LayerView, Span, View

BARS = (24, 12, 6, 0)
"""Lengths of a layer's bar in characters, longest first; shorter ones are used with many layers."""
GAP = 3
HEADER_LINES = 13


def render(view: View, width: int, height: int | None, note: str = "") -> RenderableType:
    """Renders a view for a window of `width` by `height` characters; `height` None: as many lines as needed.

    Layers are laid out in as many columns as needed to show all of them; those that do not fit are counted.
    """
    span = view.interval
    speed = "" if not span.seconds else f"   {span.output_tokens / span.seconds:.1f} tokens/s"
    parts: list[RenderableType] = [
        Text(view.model, "bold", no_wrap=True, overflow="ellipsis"),
        Text(
            f"{view.running:.0f} running, {view.waiting:.0f} waiting{speed}   "
            f"first token {_time(span.first_token_seconds)}, each further {_time(span.token_seconds)}"
        ),
        Text(f"{view.resident:.0f} of {view.slots:.0f} slots hold an expert" if view.slots else "no slots in use yet"),
        _totals(view),
        _layers(view.layers, width, None if height is None else max(2, height - HEADER_LINES - bool(note))),
    ]
    if note:
        parts.append(Text(note, "red"))
    return Group(*parts)


def _totals(view: View) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0))
    seconds = view.interval.seconds or 0.0
    for name in ("", f"last {seconds:.0f} s", "since the start"):
        table.add_column(Text(name), no_wrap=True)

    def row(name: str, show: Callable[[Span], str]) -> None:
        table.add_row(name, show(view.interval), show(view.start))

    row("hit rate", lambda span: _number(span.hit_rate, ".1%"))
    row("fetched", lambda span: _fetched(span.fetched_bytes, span.seconds))
    if view.start.in_host_memory is not None:
        row("  from host memory", lambda span: _number(span.in_host_memory, ".1%"))
    row("link, while fetching", lambda span: _number(span.bytes_per_second, ".2f", " GB/s", 1e-9))
    row("waiting for experts", lambda span: _stalled(span.stall_seconds, span.seconds))
    row("prefetches", lambda span: f"{span.prefetches:.0f}, used {span.prefetches_used:.0f}")
    row("  wasted, cancelled", lambda span: f"{span.prefetches_wasted:.0f}, {span.prefetches_cancelled:.0f}")
    if view.start.experts_per_token is not None:
        row("experts per token", lambda span: _number(span.experts_per_token, ".2f"))
        row("gating loss per token", lambda span: _number(span.loss_per_token, ".4f", " nats"))
    return table


def _layers(layers: list[LayerView], width: int, height: int | None) -> RenderableType:
    if not layers:
        return Text("no figures per layer yet: no request was served, or every expert is resident", "dim")
    gated = any(layer.experts_per_token is not None for layer in layers)
    cells = [[_cell(layer, gated, bar) for layer in layers] for bar in BARS]
    longest = [max(map(len, texts)) + GAP for texts in cells]
    rows_for = [math.ceil(len(layers) / max(1, (width + GAP) // length)) for length in longest]
    room = height if height is not None else max(rows_for[-1], 24)
    choice = next((number for number, rows in enumerate(rows_for) if rows <= room), len(BARS) - 1)
    rows, texts = rows_for[choice], cells[choice]
    shown = rows if rows <= room else room - 1  # the last line counts those that do not fit
    columns = [texts[start : start + rows][:shown] for start in range(0, len(texts), rows)]
    if shown < rows:  # fill the columns that fit with the first layers
        columns = [texts[start : start + shown] for start in range(0, len(columns) * shown, shown)]
    title = "layer: resident of experts, hit rate" + (", experts per token" if gated else "")
    lines = [Text(title, "bold", no_wrap=True, overflow="ellipsis")]
    for row in range(shown):
        line = "".join(column[row].ljust(longest[choice]) for column in columns if row < len(column))
        lines.append(Text(line.rstrip(), no_wrap=True))
    missing = len(layers) - sum(map(len, columns))
    if missing:
        lines.append(Text(f"and {missing} more layers: make the window larger", "dim"))
    return Group(*lines)


def _cell(layer: LayerView, gated: bool, bar: int) -> str:
    digits = len(f"{layer.experts:.0f}")
    text = f"{layer.layer:>2} "
    if bar:
        filled = round(bar * min(1.0, max(0.0, layer.resident / layer.experts))) if layer.experts > 0 else 0
        text += "█" * filled + "░" * (bar - filled) + " "
    text += f"{layer.resident:>{digits}.0f}/{layer.experts:.0f} {_number(layer.hit_rate, '.0%'):>4}"
    return text + (f" {_number(layer.experts_per_token, '.2f'):>4}" if gated else "")


def _number(value: float | None, form: str, unit: str = "", factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:{form}}{unit}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def _fetched(nbytes: float, seconds: float | None) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if seconds is None else f"{nbytes / 2**20 / max(seconds, 1e-9):.1f} MiB/s"


def _stalled(stall: float, seconds: float | None) -> str:
    return f"{stall:.1f} s" if seconds is None else f"{stall / max(seconds, 1e-9):.1%} of the time"
