"""Implements `adapmoe top`."""

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from vllm_adapmoe.config import AdapMoEError


def top(
    url: Annotated[str, typer.Argument(help="vLLM server: http://host:port or host:port.")] = "localhost:8000",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show one interval, then exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per interval.")] = False,
) -> None:
    """Shows the expert cache of a running server live: hit rate, bytes fetched, stalls, prefetches, layers."""
    from vllm_adapmoe.top.render import render
    from vllm_adapmoe.top.sample import read_sample
    from vllm_adapmoe.top.view import make_view

    console = Console()
    height = console.height - 1 if console.is_terminal else None
    before = read_sample(url)
    try:
        if once or as_json:
            while True:
                time.sleep(interval)
                now = read_sample(url)
                view, before = make_view(before, now), now
                if as_json:
                    typer.echo(json.dumps(asdict(view)))
                else:
                    console.print(render(view, console.width, height), highlight=False)
                if once:
                    return
        view = make_view(before, before)
        with Live(render(view, console.width, height), console=console, screen=console.is_terminal) as live:
            while True:
                time.sleep(interval)
                note = ""
                try:
                    now = read_sample(url)
                    view, before = make_view(before, now), now
                except AdapMoEError as error:  # it may come back
                    note = str(error)
                height = console.height - 1 if console.is_terminal else None
                live.update(render(view, console.width, height, note), refresh=True)
    except KeyboardInterrupt:
        return
