"""Commands of `python -m benchmarks`."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.serve_commands import serve, soak
from vllm_adapmoe.cli.options import (
    Batch,
    HeldOut,
    Model,
    Output,
    OutputTokens,
    Plot,
    Profile,
    PromptTokens,
    Rounds,
    Text,
    checkpoint_folder,
    model_argument,
    numbers,
    precisions,
    profile_option,
    quieten_vllm,
)
from vllm_adapmoe.cli.report import report
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import check_named_model
from vllm_adapmoe.units import parse_bytes

TINY_MIXTRAL = Path(__file__).parent.parent / "examples" / "tiny_mixtral" / "model"
CONTENDERS = (
    "llama.cpp,llama.cpp-q8_0,llama.cpp-q4_k_m,llama.cpp-q4_0,transformers,vllm,adapmoe-lru,adapmoe,adapmoe-8,adapmoe-4"
)

EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="As of `vllm serve`: without torch.compile.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Side-by-side measurements of real engines; each can write a JSON result.",
)
app.command()(serve)
app.command()(soak)


@app.command()
def overhead(
    model: Model,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 7,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 64,
    enforce_eager: EnforceEager = False,
) -> None:
    """Compares the plugin with stock vLLM when no expert has to be fetched."""
    from benchmarks.overhead import print_overhead, run_overhead
    from benchmarks.workload import Workload

    workload = Workload(
        model=checkpoint_folder(model),
        text=text,
        rounds=rounds,
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    report(run_overhead(workload, enforce_eager), print_overhead, output)


def _models(models: list[str] | None) -> list[str]:
    return [check_named_model(model) for model in models or [str(TINY_MIXTRAL)]]


@app.command("host_path")
def host_path(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoint folders, or names of models on the hub.",
            show_default="examples/tiny_mixtral/model",
            callback=_models,
        ),
    ] = None,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 3,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests per batch; can be repeated.", show_default="1, 16")
    ] = None,
    prompt_tokens: PromptTokens = 32,
    output_tokens: OutputTokens = 64,
    profile: Annotated[Path | None, profile_option("; default: none, so no next-token heads")] = None,
) -> None:
    """Measures the main thread's time in decode steps outside the expert kernel, by part, beside stock vLLM's."""
    quieten_vllm()
    from benchmarks.host_path import HostPathSpec, print_host_path, run_host_path

    spec = HostPathSpec(
        models=[checkpoint_folder(name) for name in model or ()], profile=profile, text=text, rounds=rounds,
        batches=batch or [1, 16], prompt_tokens=prompt_tokens, output_tokens=output_tokens,
    )  # fmt: skip
    report(run_host_path(spec), print_host_path, output)


@app.command("big_shapes")
def big_shapes(
    output: Output = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests per batch; can be repeated.", show_default="1, 16, 64")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps per batch.")] = 20,
    resident: Annotated[float, typer.Option(min=0.1, max=0.99, help="Fraction of the experts with a slot.")] = 0.5,
) -> None:
    """Measures decisions per step and bookkeeping for the shapes of Kimi-K2 and Qwen3-Next; needs no model."""
    quieten_vllm()
    from benchmarks.big_shapes import SHAPES, print_big_shapes, run_big_shapes

    report(run_big_shapes(SHAPES, batch or [1, 16, 64], steps, resident), print_big_shapes, output)


@app.command("decode_cost")
def decode_cost(
    output: Output = None,
    host_gbps: Annotated[
        str, typer.Option(help="Bandwidths of host memory for llama.cpp, 1e9 bytes/s, comma-separated.")
    ] = "60,200",
) -> None:
    """Computes ms per token by hit rate for four models on two GPUs, beside UVA and llama.cpp; measures nothing."""
    from benchmarks.decode_cost import DecodeCostSpec, print_decode_cost, run_decode_cost

    bandwidths = numbers("--host-gbps", host_gbps)
    if min(bandwidths) <= 0:
        raise AdapMoEError(f"--host-gbps {host_gbps} is not usable; more than 0, e.g. 60,200")
    report(run_decode_cost(DecodeCostSpec(bandwidths)), print_decode_cost, output)


@app.command()
def schedule(
    model: Model,
    output: Output = None,
    text: Text = None,
    load_ms: Annotated[float, typer.Option(min=0, help="Time of one expert fetch, ms.")] = 0.47,
    layer_ms: Annotated[float, typer.Option(min=0, help="Time a layer computes in a step, ms.")] = 0.1,
    rounds: Rounds = 2,
) -> None:
    """Compares orders in which a loaded server may run its requests: recorded routing, replayed on a slow link."""
    from benchmarks.schedule import ScheduleSpec, print_schedule, run_schedule

    spec = ScheduleSpec(checkpoint_folder(model), text, load_ms, layer_ms, rounds)
    report(run_schedule(spec), print_schedule, output)


@app.command()
def residency(
    model: Model,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 64,
    precision: Annotated[
        str | None,
        typer.Option(help="Bits per expert weight to compare with 16, comma-separated: 8,4."),
    ] = None,
    stores: Annotated[str, typer.Option(help="Backing stores, comma-separated: file, host.")] = "file,host",
    enforce_eager: EnforceEager = False,
) -> None:
    """Measures throughput with 25, 50, 75 and 100 % of the experts' bytes resident, for each store and precision."""
    from benchmarks.residency import STORES, print_residency, run_residency
    from benchmarks.workload import Workload

    workload = Workload(
        model=checkpoint_folder(model),
        text=text,
        rounds=rounds,
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )
    chosen = [name.strip() for name in stores.split(",")]
    if unknown := [name for name in chosen if name not in STORES]:
        raise AdapMoEError(f"--stores {unknown[0]} is not known; use {', '.join(STORES)}")
    bits = precisions("--precision", precision)
    report(run_residency(workload, chosen, bits, enforce_eager), print_residency, output)


@app.command()
def gating(
    model: Model,
    profile: Profile,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    prompt_tokens: PromptTokens = 32,
    output_tokens: OutputTokens = 64,
    store: Annotated[str, typer.Option(help="Backing store: host or file.")] = "file",
) -> None:
    """Compares decode speed, kernel time and bytes per token with gating off and on, at 25 to 100 % residency."""
    quieten_vllm()
    from benchmarks.gating import GatingSpec, print_gating, run_gating

    spec = GatingSpec(
        model=checkpoint_folder(model),
        text=text, rounds=rounds, batch=batch, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        profile=profile, store=store,
    )  # fmt: skip
    report(run_gating(spec), print_gating, output)


@app.command()
def ablation(
    model: Model,
    profile: Profile,
    output: Output = None,
    text: Text = None,
    rounds: Rounds = 5,
    batch: Batch = 1,
    batches: Annotated[int, typer.Option(min=1, help="Batches per measurement, run one after another.")] = 6,
    prompt_tokens: PromptTokens = 16,
    output_tokens: OutputTokens = 40,
    resident: Annotated[float, typer.Option(min=0.01, max=0.99, help="Fraction of the experts with a slot.")] = 0.5,
    ratio: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Time to fetch one expert relative to one layer with all experts resident; sets the link bandwidth.",
        ),
    ] = 6.3,
    max_loss_increase: Annotated[float, typer.Option(help="Relative loss increase allowed to gating.")] = 0.005,
    loss_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens on which the loss of gating is measured; 0: not at all.")
    ] = 4096,
) -> None:
    """Measures gating, prefetch and cache policy, alone and together (the paper's and ours), on a limited link."""
    quieten_vllm()
    from benchmarks.ablation import AblationSpec, print_ablation, run_ablation

    spec = AblationSpec(
        model=checkpoint_folder(model),
        text=text, rounds=rounds, batch=batch, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        profile=profile, batches=batches, resident=resident, ratio=ratio, max_loss_increase=max_loss_increase,
        loss_tokens=loss_tokens,
    )  # fmt: skip
    report(run_ablation(spec), print_ablation, output)


@app.command("server_memory")
def server_memory(
    model: Annotated[Path, typer.Argument(help="Folder of a small checkpoint.", exists=True)] = TINY_MIXTRAL,
    rounds: Rounds = 2,
    output: Output = None,
) -> None:
    """Measures the memory of a server's processes, beside those of stock vLLM and what importing vLLM takes."""
    from benchmarks.server_memory import print_server_memory, run_server_memory

    report(run_server_memory(model, rounds), print_server_memory, output)


@app.command()
def peers(
    model: Model,
    output: Output = None,
    text: Text = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory limits per contender, page cache included, comma-separated, e.g. 1.5GiB,3GiB. Default: none."
        ),
    ] = None,
    rounds: Rounds = 3,
    prompt_tokens: PromptTokens = 64,
    output_tokens: OutputTokens = 32,
    loss_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens whose loss is measured, for each format of the weights.")
    ] = 4096,
    files: Annotated[
        Path | None,
        typer.Option(help="Folder to keep GGUF files and packed experts in; default: a temporary folder."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Time limit per contender and run, s.")] = 900,
    contenders: Annotated[
        str,
        typer.Option(
            help="Contenders, comma-separated, one of the plugin's among them.",
            show_default=CONTENDERS.replace(",", ", "),
        ),
    ] = CONTENDERS,
    enforce_eager: EnforceEager = False,
    profile: Annotated[Path | None, profile_option("; adds the plugin with it, ungated and gated")] = None,
    plot: Plot = None,
) -> None:
    """Compares the plugin with llama.cpp, transformers (disk offload) and stock vLLM: same memory, model and tokens."""
    quieten_vllm()
    from benchmarks.peers import PeersSpec, run_peers
    from benchmarks.peers_table import plot_peers, print_peers

    spec = PeersSpec(
        model=checkpoint_folder(model),
        text=text, rounds=rounds, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        memory=[None] if memory is None else [parse_bytes("--memory", limit) for limit in memory.split(",")],
        loss_tokens=loss_tokens, files=files, timeout=timeout,
        contenders=[name.strip() for name in contenders.split(",")], enforce_eager=enforce_eager, profile=profile,
    )  # fmt: skip
    report(run_peers(spec), print_peers, output, plot_peers, plot)


@app.command()
def frontier(
    model: Model,
    profile: Profile,
    data: HeldOut,
    sequence_length: Annotated[int, typer.Option(min=16, help="Tokens per sequence.")] = 128,
    precision: Annotated[
        str | None, typer.Option(help="Bits per expert weight to compare with 16, comma-separated: 8,4.")
    ] = None,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measures loss against bytes fetched: by each gating rule, and with fewer bits."""
    quieten_vllm()
    from benchmarks.frontier import plot_frontier, print_frontier, run_frontier

    bits = precisions("--precision", precision)
    result = run_frontier(checkpoint_folder(model), profile, data, sequence_length, bits)
    report(result, print_frontier, output, plot_frontier, plot)


@app.command()
def transfer(
    model: Annotated[str | None, model_argument(", whose pack is read; default: synthetic packs")] = None,
    record_mib: Annotated[
        str, typer.Option(help="Record sizes of synthetic packs, MiB, comma-separated; not used with MODEL.")
    ] = "3,24,48",
    pass_mib: Annotated[int, typer.Option(min=1, help="Minimum size of a synthetic pack, MiB.")] = 768,
    rounds: Annotated[int, typer.Option(min=1, help="Passes over the pack per read method, interleaved.")] = 5,
    store_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for packs, on the disk to measure; default: vLLM's cache for a model, else temporary."
        ),
    ] = None,
    output: Output = None,
) -> None:
    """Compares the bandwidth of the transfer engine with plain sequential reads of the same records."""
    from benchmarks.transfer import print_transfer, run_transfer

    folder = None if model is None else checkpoint_folder(model)
    result = run_transfer(folder, numbers("--record-mib", record_mib), store_dir, rounds, pass_mib)
    report(result, print_transfer, output)
