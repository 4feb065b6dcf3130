"""A backing file that cannot be read fails the requests that need it, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from conftest import TINY_MIXTRAL
from demo import DemoServer

from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.integration.measure.engine import Engine

pytestmark = pytest.mark.engine


def config(folder: Path) -> dict[str, object]:
    return {"cache_experts": 24, "store": "file", "store_dir": str(folder / "store")}


@contextmanager
def half_of_the_pack(folder: Path) -> Iterator[None]:
    """In the same file, for the engine has it open."""
    (pack,) = (folder / "store").rglob("*.pack")
    whole = pack.read_bytes()
    with pack.open("r+b") as file:
        file.truncate(len(whole) // 2)
    yield
    with pack.open("r+b") as file:
        file.write(whole)


def test_the_server_outlives_a_broken_pack(tmp_path):
    with DemoServer("server", tmp_path, config(tmp_path), "--enforce-eager", "--async-scheduling") as server:
        client = server.client()

        def ask() -> str:
            answer = client.completions.create(model="tiny-mixtral", prompt="def main(", max_tokens=24, temperature=0)
            return answer.choices[0].text

        before = ask()
        with half_of_the_pack(tmp_path):
            for _ in range(2):
                with pytest.raises(openai.InternalServerError):
                    ask()
            with pytest.raises(openai.APIError):  # after the first bytes of a stream, as an event
                list(client.completions.create(model="tiny-mixtral", prompt="import", max_tokens=24, stream=True))
        assert ask() == before  # and not from a prefix that the failed request left in the cache
        assert server.metrics()["vllm:adapmoe_slots"] == 24
    log = (tmp_path / "server.log").read_text()
    assert "Expert cache: request cmpl-" in log and "fails: " in log


def test_steps_that_are_not_scheduled_ahead(tmp_path):
    """The same without asynchronous scheduling, in an engine of this process."""
    asked, params = prompts(4, 2048, seed=3), greedy(logprobs=1)
    arguments = ENGINE_ARGS | {"enforce_eager": True, "async_scheduling": False}
    with Engine(TINY_MIXTRAL, VLLM_STEPS | config(tmp_path), **arguments) as engine:
        before = answers(engine, asked, params)
        with half_of_the_pack(tmp_path):
            for _ in range(2):
                failed = engine.llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)
                assert {request.outputs[0].finish_reason for request in failed} == {"error"}
        assert answers(engine, asked, params) == before
