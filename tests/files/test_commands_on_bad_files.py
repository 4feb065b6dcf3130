"""Commands that are given a bad file say so in one line."""

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MIXTRAL
from readers import trace_file

from benchmarks import commands as benchmarks
from vllm_adapmoe.cli import app as cli
from vllm_adapmoe.model_folder import check_named_model
from vllm_adapmoe.top import sample
from vllm_adapmoe.top.render import render
from vllm_adapmoe.top.view import make_view

PROFILE = ROOT / "configs" / "tiny_mixtral.json"
TEXT = ROOT / "examples" / "tiny_mixtral" / "heldout"
SPEEDS = ("--link", 1, "--compute", 1)
COMMANDS = {
    "simulate": lambda bad: ("simulate", bad),
    "simulate --profile": lambda bad: ("simulate", bad.parent / "trace", "--policies", "lru/profile", "--profile", bad),
    "plan --profile": lambda bad: ("plan", TINY_MIXTRAL, "--profile", bad, *SPEEDS),
    "plan --trace": lambda bad: ("plan", TINY_MIXTRAL, "--trace", bad, *SPEEDS),
    "evaluate --profile": lambda bad: ("evaluate", TINY_MIXTRAL, "--profile", bad, "--data", TEXT),
    "evaluate --adapmoe-config": lambda bad: (
        "evaluate", TINY_MIXTRAL, "--profile", PROFILE, "--data", TEXT, "--adapmoe-config", bad,
    ),
    "calibrate --adapmoe-config": lambda bad: (
        "calibrate", TINY_MIXTRAL, "--data", TEXT, "-o", bad.parent / "out", "--adapmoe-config", bad,
    ),
}  # fmt: skip
BAD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "junk": lambda path: path.write_bytes(bytes(range(256))),
    "empty": lambda path: path.write_bytes(b""),
    "deep\n\x1b[31m": lambda path: path.write_text("[" * 50_000),
    "huge": lambda path: path.write_text('{"cache_gb": 1' + "0" * 6000 + "}\n"),
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command with these arguments; the exit code and what it says on stderr."""

    def run(*arguments, program=cli.app):
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")  # commands set it, for the whole process
        monkeypatch.setattr(sys, "argv", ["adapmoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.run(program, "adapmoe")
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_file_is_one_line(run, command, bad, tmp_path):
    BAD[bad](tmp_path / bad)
    trace_file(tmp_path / "trace")
    code, said = run(*COMMANDS[command](tmp_path / bad))
    (line,) = [line for line in said.splitlines() if line.startswith("adapmoe: error: ")]
    assert code == 1 and line.isprintable() and ("pipe" not in bad or "not a regular file" in line)
    assert "Traceback" not in said and said.splitlines()[-1] == line


@pytest.mark.parametrize("content", ["[" * 50_000, '{"num_hidden_layers": 1000000000}', "[]", None])
def test_a_bad_model_is_one_line(run, content, tmp_path):
    config = tmp_path / "config.json"
    if content is None:
        os.mkfifo(config)
    else:
        config.write_text(content)
    for program, command in (
        (cli.app, ("plan", tmp_path, *SPEEDS)),
        (cli.app, ("pack", tmp_path)),
        (benchmarks.app, ("overhead", tmp_path)),
        (benchmarks.app, ("transfer", tmp_path)),
    ):
        code, said = run(*command, program=program)
        assert code == 1 and said.startswith("adapmoe: error: ") and said.count("\n") == 1 and "config.json" in said
    assert check_named_model("org/model-of-a-hub") == "org/model-of-a-hub"


def test_a_pipe_among_a_models_files(run, tmp_path):
    (tmp_path / "config.json").write_bytes((TINY_MIXTRAL / "config.json").read_bytes())
    os.mkfifo(tmp_path / "tokenizer\n.json")
    code, said = run("calibrate", tmp_path, "--data", TEXT, "-o", tmp_path / "out")
    assert code == 1 and said.count("\n") == 1 and r"'tokenizer\n.json' in it is not a regular file" in said


def serve(answer: Callable[[socket.socket], None]) -> str:
    """A server that answers one request by itself; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            connection.recv(1 << 16)
            with suppress(OSError):  # the client may have had enough
                answer(connection)

    threading.Thread(target=accept, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(1000):
        connection.sendall(b"x")
        threading.Event().wait(0.05)


def pour(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x 1\n" * (1 << 18))


def reply(text: str) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + text.encode())


SLOTS = 'vllm:adapmoe_slots{model_name="m"} 3\n'
RESIDENT = "vllm:adapmoe_resident_experts 3\n"


@pytest.mark.parametrize(
    "answer",
    [
        drip, pour, lambda connection: connection.sendall(b"\xff\xfe\n\n"), lambda connection: None,
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort"),
        reply("\xff"), reply("vllm:x{"), reply(SLOTS),
        reply(SLOTS + RESIDENT + 'vllm:adapmoe_layer_experts{layer="x"} 1\n'),
        reply(SLOTS + RESIDENT + 'vllm:adapmoe_layer_experts{layer="999999999"} 1\n'),
    ],
)  # fmt: skip
def test_an_answer_of_no_server(run, answer, monkeypatch):
    monkeypatch.setattr(sample, "TIMEOUT", 1.0 if answer is drip else 30.0)
    monkeypatch.setattr(sample, "ANSWER_BYTES", 1 << 20)
    code, said = run("top", serve(answer), "--once")
    assert code == 1 and said.startswith("adapmoe: error: ") and said.count("\n") == 1 and ";" in said
    assert {drip: "no complete answer in 1 s", pour: "more than 1048576 bytes"}.get(answer, "") in said


@pytest.mark.parametrize("address", ["file:///etc/passwd", "a b", "host:80 80", "ftp://x", "http://[", "", "x\ny"])
def test_an_address_of_no_server(run, address):
    code, said = run("top", address, "--once")
    assert code == 1 and said.startswith("adapmoe: error: ") and said.count("\n") == 1


def test_figures_that_cannot_be_are_shown():
    lines = [SLOTS.replace('"m"', '"\x1b[31mm"'), RESIDENT]
    for layer, (resident, experts) in enumerate(
        (("NaN", "NaN"), ("+Inf", "+Inf"), ("1e308", "1"), ("-5", "-7"), ("3", "0"), ("1", "1e308"))
    ):
        lines.append(f'vllm:adapmoe_layer_resident_experts{{layer="{layer}"}} {resident}\n')
        lines.append(f'vllm:adapmoe_layer_experts{{layer="{layer}"}} {experts}\n')
    now = sample.parse_sample("".join(lines), 1.0)
    view = make_view(now, now)
    assert view.model == "\\x1b[31mm" and len(view.layers) == 6
    json.dumps(view.__dict__, default=vars, allow_nan=False)
    render(view, 80, 24)
