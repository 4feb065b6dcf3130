"""`python -m tests.vllm_scan WHEEL_OR_FOLDER...`: what of the plugin does not fit a vLLM, read without importing it.

In a minute after a release: `pip download --no-deps vllm==VERSION`, then this with the wheel. It compares with the
installed vLLM to know which of its methods ours take the place of. Exit code 1: something does not fit.
"""

import argparse
import importlib.util
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .damage import Scan
from .tree import Tree


def installed() -> Tree | None:
    """The vLLM of this environment, if there is one; it is not imported."""
    spec = importlib.util.find_spec("vllm")
    places = None if spec is None else spec.submodule_search_locations
    return Tree(Path(places[0])) if places else None


def main() -> None:
    """Prints a table for each vLLM."""
    parser = argparse.ArgumentParser(prog="python -m tests.vllm_scan", description=__doc__)
    parser.add_argument("vllm", nargs="+", type=Path, help="a wheel, or a folder with the package in it")
    console, reference, found = Console(), installed(), 0
    for path in parser.parse_args().vllm:
        start = time.perf_counter()
        scan = Scan(Tree(path))
        damage = scan.damage(reference)
        seconds = time.perf_counter() - start
        console.print(f"vLLM {scan.tree.version}: {scan.checked} uses, {len(damage)} do not fit ({seconds:.0f} s)")
        if damage:
            table = Table("kind", "where", "what")
            for one in damage:
                table.add_row(one.kind, one.place, one.what)
            console.print(table)
        found += len(damage)
    raise SystemExit(found > 0)


if __name__ == "__main__":
    main()
