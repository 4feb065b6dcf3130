"""The help of every command at 80 columns: complete, and as it was written."""

import re

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import commands as benchmarks
from vllm_adapmoe.cli import app as cli

PROGRAMS = {"adapmoe": cli.app, "python -m benchmarks": benchmarks.app}
OF_TYPER = re.compile(r"<list\[\w+\]>|\[(OPTIONS|ARGS|required|default: [^][]*|[\w.<>=-]*x[\w.<>=-]*)\]")
"""What typer itself writes with brackets, the bounds of a number included."""


def with_subcommands(command, names=()):
    yield names, command
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from with_subcommands(subcommand, (*names, name))


COMMANDS = {
    " ".join((program, *names)): (program, names, command)
    for program, app in PROGRAMS.items()
    for names, command in with_subcommands(typer.main.get_command(app))
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    program, names, command = COMMANDS[name]
    run = CliRunner(env={"COLUMNS": "80"}).invoke(PROGRAMS[program], [*names, "--help"], prog_name=program)
    assert run.exit_code == 0 and run.exception is None, run.exception
    assert max(map(len, run.output.splitlines())) <= 80
    assert "…" not in run.output, "a text is cut off"

    words = run.output.replace("│", " ").split()
    rest = OF_TYPER.sub("", " ".join(words))
    for parameter in command.params:
        rest = rest.replace(f"[{parameter.name}]", "")  # an argument that may be left out
    assert not re.search(r"[][\\]", rest), "markup is left"

    written = [command.help, *(parameter.help for parameter in command.params)]
    for subcommand in getattr(command, "commands", {}).values():
        written.append(subcommand.help and subcommand.help.split("\n\n")[0])
    for text in written:
        assert text and text.strip(), "something has no help"
        shown = iter(words)  # names and types of options stand between the words of a text
        assert all(word in shown for word in text.split()), f"not shown as written: {text}"
