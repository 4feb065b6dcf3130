"""Implements `adapmoe doctor`."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vllm_adapmoe.cli.options import Revision, quieten_vllm
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.doctor.finding import Finding, print_findings, serves
from vllm_adapmoe.integration.entry.version_check import explain_import_error
from vllm_adapmoe.model_folder import check_named_model
from vllm_adapmoe.printable import printable, reason


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder, or the name of a model on the hub, to check as well.")
    ] = None,
    revision: Revision = None,
    store_dir: Annotated[Path | None, typer.Option(help="Folder for packed files; default: vLLM's cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Checks installation, machine, disk and, with --model, a model: what works here, what does not, and how to fix it.

    Exits with code 1 if a problem prevents serving.
    """
    quieten_vllm()
    os.environ.setdefault("TQDM_DISABLE", "1")
    findings = list(_findings(model, revision, store_dir))
    if as_json:
        typer.echo(
            json.dumps({"serves": serves(findings), "findings": [asdict(finding) for finding in findings]}, indent=1)
        )
    else:
        print_findings(findings, Console())
    raise typer.Exit(0 if serves(findings) else 1)


def _findings(model: str | None, revision: str | None, store_dir: Path | None) -> Iterator[Finding]:
    from vllm_adapmoe.doctor.disk import check_disk
    from vllm_adapmoe.doctor.machine import check_extras, check_machine

    try:
        from vllm_adapmoe.integration.entry.doctor import check_installation, check_model, device_type
    except Exception as error:  # a mismatched installation may raise anything
        if isinstance(error, ImportError):
            try:
                explain_import_error(error)
            except AdapMoEError as unsupported:
                text, _, advice = str(unsupported).rpartition("; ")
                yield Finding("Installation", "problem", text, advice)
                return
        yield Finding(
            "Installation", "problem", f"vLLM cannot be imported ({reason(error)})",
            "install vLLM in the environment of this command, see README.md",
        )  # fmt: skip
        return
    yield from check_installation()
    device = device_type()
    if device in ("cpu", "cuda"):
        yield from check_machine(device)
        yield from check_disk(store_dir, needed=device == "cpu")
        if model is not None:
            try:
                check_named_model(model)
            except AdapMoEError as error:
                yield Finding(f"Model {printable(model)}", "problem", str(error), fails=f"serving {model}: {error}")
            else:
                yield from check_model(model, revision, store_dir)
    yield from check_extras()
