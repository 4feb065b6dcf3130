"""Commands that put load on real servers: `serve` and `soak`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_adapmoe.cli.options import (
    Model,
    Output,
    OutputTokens,
    Plot,
    Rounds,
    checkpoint_folder,
    numbers,
    profile_option,
)
from vllm_adapmoe.cli.report import report
from vllm_adapmoe.config import AdapMoEError

Texts = Annotated[
    Path | None,
    typer.Option(help="Folder of *.txt to take prompts from, one file per domain; default: the bundled held-out text.",
                 exists=True, file_okay=False),
]  # fmt: skip
Slots = Annotated[float, typer.Option(min=0.01, help="Expert slots; values up to 1 are fractions of all experts.")]
Store = Annotated[str, typer.Option(help="Backing store: auto, host or file.")]
LinkGbps = Annotated[float | None, typer.Option(help="Limit of the fetch bandwidth, 1e9 bytes/s.")]
MaxLossIncrease = Annotated[float, typer.Option(help="Relative loss increase allowed to gating.")]
ServeArgs = Annotated[str, typer.Option(help='Further arguments for `vllm serve`, e.g. "--dtype float32".')]


def cache_settings(slots: float, store: str, link_gbps: float | None, profile: Path | None) -> dict[str, Any]:
    """Returns the `adapmoe_config` for the options shared by both commands."""
    config: dict[str, Any] = {"cache_fraction": slots} if slots <= 1 else {"cache_experts": int(slots)}
    config |= {"store": store}
    if link_gbps is not None:
        config["link_gbps"] = link_gbps
    if profile is not None:
        config["profile"] = str(profile)
    return config


def serve(
    model: Model,
    output: Output = None,
    profile: Annotated[Path | None, profile_option()] = None,
    slots: Slots = 0.5,
    store: Store = "auto",
    link_gbps: LinkGbps = None,
    gating: Annotated[str, typer.Option(help="Gating mode: off, token or batch; needs --profile.")] = "off",
    max_loss_increase: MaxLossIncrease = 0.005,
    contenders: Annotated[
        str | None,
        typer.Option(help="Contenders, comma-separated: ours, vllm_order, ungated, on_demand_lru, stock. Default: "
                     "ours,stock with --slots 1.0, else all but stock."),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Maximum concurrent requests, comma-separated.")] = "1,4,16,64",
    requests: Annotated[int, typer.Option(min=2, help="Requests per load, for each concurrent request.")] = 6,
    rate: Annotated[
        float | None,
        typer.Option(help="Arrival rate, requests/s (Poisson). Default: 1.2 times the fastest contender's throughput."),
    ] = None,
    rounds: Rounds = 3,
    prompt_tokens: Annotated[str, typer.Option(help="Prompt length range, tokens: MIN,MAX.")] = "16,512",
    output_tokens: OutputTokens = 32,
    text: Texts = None,
    serve_args: ServeArgs = "",
    no_bound: Annotated[
        bool, typer.Option("--no-bound", help="Skip the runs that record routing for a lower bound on bytes.")
    ] = False,
    plot: Plot = None,
) -> None:  # fmt: skip
    """Compares servers under `vllm bench serve`: the plugin, the plugin in vLLM's order, on-demand LRU, stock vLLM."""
    from benchmarks.serve import ServeSpec, run_serve
    from benchmarks.serve_table import plot_serve, print_serve
    from benchmarks.server import end_cleanly

    end_cleanly()
    lengths = [int(number) for number in numbers("--prompt-tokens", prompt_tokens)]
    if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
        raise AdapMoEError(f"--prompt-tokens {prompt_tokens} is not MIN,MAX; give two lengths, the shorter first")
    loads = [int(number) for number in numbers("--concurrency", concurrency)]
    if min(loads) < 1:
        raise AdapMoEError(
            f"--concurrency {concurrency}: {min(loads)} is not a number of concurrent requests; set 1 or more"
        )
    if gating != "off" and profile is None:
        raise AdapMoEError(f"--gating {gating} needs a profile; set --profile, see adapmoe calibrate")
    spec = ServeSpec(
        model=checkpoint_folder(model), cache=cache_settings(slots, store, link_gbps, profile),
        gating=None if gating == "off" else {"mode": gating, "max_loss_increase": max_loss_increase},
        contenders=None if contenders is None else contenders.split(","), serve_args=shlex.split(serve_args),
        with_bound=not no_bound, concurrency=loads, requests=requests, rate=rate, rounds=rounds,
        output_tokens=output_tokens, prompt_tokens=(lengths[0], lengths[1]), text=text,
    )  # fmt: skip
    report(run_serve(spec), print_serve, output, plot_serve, plot)


def soak(
    model: Model,
    output: Output = None,
    profile: Annotated[Path | None, profile_option("; turns on gating by token")] = None,
    minutes: Annotated[float, typer.Option(min=0.2, help="Duration of the plugin's load, minutes.")] = 20,
    stock_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Duration of stock vLLM's load, run first. Default: a fifth of --minutes; 0: none."),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Concurrent clients.")] = 32,
    slots: Slots = 0.5,
    store: Store = "auto",
    link_gbps: LinkGbps = None,
    max_loss_increase: MaxLossIncrease = 0.005,
    replayed: Annotated[int, typer.Option(min=1, help="Maximum requests to repeat alone, to compare tokens.")] = 200,
    timeout: Annotated[float, typer.Option(min=1, help="Time limit per request, s.")] = 180,
    seed: Annotated[int, typer.Option(help="Random seed for the clients' behaviour.")] = 0,
    text: Texts = None,
    serve_args: ServeArgs = "",
) -> None:
    """Stresses a server with high load, aborts, bad requests and disconnects; exits with code 1 if a check fails."""
    from benchmarks.server import end_cleanly
    from benchmarks.soak import SoakSpec, print_soak, run_soak

    end_cleanly()
    config = cache_settings(slots, store, link_gbps, profile)
    if profile is not None:
        config["gating"] = {"mode": "token", "max_loss_increase": max_loss_increase}
    spec = SoakSpec(
        model=checkpoint_folder(model), config=config, text=text, seconds=60 * minutes,
        stock_seconds=60 * (minutes / 5 if stock_minutes is None else stock_minutes), clients=clients,
        replayed=replayed, timeout=timeout, seed=seed, serve_args=shlex.split(serve_args),
    )  # fmt: skip
    result = run_soak(spec)
    report(result, print_soak, output)
    if False in result["verdict"].values():
        raise typer.Exit(1)
