"""A backing file that cannot be read fails the requests that need it, and nothing else."""

import openai
import pytest
from demo import DemoServer

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("scheduling", ["--async-scheduling", "--no-async-scheduling"])
def test_the_server_outlives_a_broken_pack(tmp_path, scheduling):
    config = {"cache_experts": 24, "store": "file", "store_dir": str(tmp_path / "store")}
    with DemoServer("server", tmp_path, config, "--enforce-eager", scheduling) as server:
        client = server.client()

        def ask() -> str:
            answer = client.completions.create(model="tiny-mixtral", prompt="def main(", max_tokens=24, temperature=0)
            return answer.choices[0].text

        before = ask()
        (pack,) = (tmp_path / "store").rglob("*.pack")
        whole = pack.read_bytes()
        with pack.open("r+b") as file:
            file.truncate(len(whole) // 2)
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                ask()
        with pytest.raises(openai.APIError):  # after the first bytes of a stream, as an event
            list(client.completions.create(model="tiny-mixtral", prompt="import", max_tokens=24, stream=True))
        with pack.open("r+b") as file:  # the same file: the server has it open
            file.write(whole)
        assert ask() == before  # and not from a prefix that the failed request left in the cache
        assert server.metrics()["vllm:adapmoe_slots"] == 24
    log = (tmp_path / "server.log").read_text()
    assert "Expert cache: request cmpl-" in log and "fails: " in log
