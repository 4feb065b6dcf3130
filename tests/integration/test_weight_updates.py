"""Weights that are replaced in a running engine, or written out: what stock vLLM serves and writes of the same ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCABULARY, save_tiny_model
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from tests.apart import apart
from tests.integration.scenarios import ENGINE_ARGS, VLLM_STEPS, answers, greedy, prompts
from vllm_adapmoe.integration.measure.engine import Engine

pytestmark = pytest.mark.engine

ARGS = ENGINE_ARGS | {"enforce_eager": True, "enable_prefix_caching": False}
ASKED = prompts(4, VOCABULARY, seed=1)
EXPERT = "model.layers.2.mlp.experts.15.down_proj.weight"


class FromFiles(NCCLWeightTransferEngine):
    """VLLM's own engine, but for the network: an update names a checkpoint, and of its tensors every n-th."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        tensors = list(read(update_info["folder"]))
        self.model.load_weights(tensors[update_info["start"] :: update_info["step"]])


WeightTransferEngineFactory.register_engine("files", FromFiles)


def read(folder: Any, without: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(Path(folder).glob("*.safetensors")):
        yield from ((name, tensor) for name, tensor in load_file(file).items() if name != without)


def load_as_trainers_do(worker: Any, weights: list[tuple[str, torch.Tensor]]) -> None:
    for named in weights:
        worker.model_runner.model.load_weights([named])


def served(engine: Engine) -> list[Any]:
    return answers(engine, ASKED, greedy(logprobs=1))


def call(engine: Engine, method: Any, **arguments: Any) -> None:
    engine.llm.collective_rpc(method, kwargs=arguments)


def refusal(engine: Engine, method: Any, **arguments: Any) -> str:
    """What a call says that fails: one line."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever vLLM makes of it
        call(engine, method, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def stock(tiny_model, tmp_path_factory):
    """Two checkpoints of one shape with nothing in common: of each folder stock vLLM's answers and sharded state."""
    folders = [tiny_model("qwen3_moe"), apart(save_tiny_model, "qwen3_moe", tmp_path_factory.mktemp("other"), seed=1)]
    found = []
    for folder in folders:
        saved = tmp_path_factory.mktemp("state")
        with Engine(folder, None, **ARGS) as engine:
            tokens = served(engine)
            call(engine, "save_sharded_state", path=str(saved))
            found.append((folder, tokens, dict(read(saved))))
    assert found[0][1] != found[1][1]
    return found


def test_every_way_with_experts_in_a_pack(stock, tmp_path):
    """In a pack that was there already: then no expert is read from the checkpoint, but every one of an update."""
    (one, of_one, state), (other, of_other, other_state) = stock
    config = VLLM_STEPS | {"cache_fraction": 0.5, "store": "file", "store_dir": str(tmp_path / "store")}
    Engine(one, config, **ARGS).close()
    with Engine(one, config, weight_transfer_config=WeightTransferConfig(backend="files"), **ARGS) as engine:
        (pack,) = (tmp_path / "store").iterdir()
        packed = pack.read_bytes()
        assert served(engine) == of_one
        misses = engine.cache_stats()["misses"]
        assert "old weights are served" in refusal(engine, "reload_weights", weights_path=str(tmp_path / "nowhere"))
        assert "start with a slot for every expert" in refusal(engine, "save_tensorized_model")
        said = refusal(engine, "reload_weights", weights_iterator=list(state.items()), is_checkpoint_format=False)
        assert "(is_checkpoint_format=False) writes weights into parameters, and experts are in slots" in said
        said = refusal(engine, load_as_trainers_do, weights=list(read(other)))
        assert "call reload_weights with weights_iterator; nothing has changed" in said
        assert served(engine) == of_one
        for number, (folder, tokens) in enumerate(((other, of_other), (other, of_other), (one, of_one))):
            call(engine, "reload_weights", weights_path=str(folder))
            assert served(engine) == tokens, number
            assert engine.cache_stats()["misses"] > misses, "counters go on"
        check_saved(engine, tmp_path / "saved", state)

        call(engine, "start_weight_update")
        for start in range(3):
            call(engine, "update_weights", update_info={"folder": str(other), "start": start, "step": 3})
        call(engine, "finish_weight_update")
        assert served(engine) == of_other
        check_saved(engine, tmp_path / "saved again", other_state)

        call(engine, "start_weight_update")
        assert "is in progress" in refusal(engine, "reload_weights", weights_path=str(other))
        said = refusal(engine, "update_weights", update_info={"folder": str(tmp_path / "nowhere")})
        assert "old weights are served" in said
        assert served(engine) == of_other

        said = refusal(engine, "reload_weights", weights_iterator=list(read(one, without=EXPERT)))
        assert "w2_weight of expert 15" in said
        assert served(engine) == [([], [])] * len(ASKED), "no token of experts of two checkpoints"
        call(engine, "reload_weights", weights_path=str(one))
        assert served(engine) == of_one
        assert list((tmp_path / "store").iterdir()) == [pack]
        assert pack.read_bytes() == packed


def check_saved(engine: Engine, folder: Path, expected: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    call(engine, "save_sharded_state", path=str(folder), max_size=1 << 18)
    saved = dict(read(folder))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name


def test_weights_that_replace_made_up_ones(stock):
    """As reinforcement learning starts an engine: the checkpoint comes later. In host memory, over and over."""
    (one, of_one, _), (other, of_other, _) = stock
    config = VLLM_STEPS | {"cache_fraction": 0.5, "store": "host"}
    with Engine(one, config, load_format="dummy", **ARGS) as engine:
        assert served(engine) != of_one
        call(engine, "update_config", overrides={"load_config": {"load_format": "auto"}})
        for folder, tokens in ((one, of_one), (other, of_other), (one, of_one)):
            call(engine, "reload_weights", weights_path=str(folder))
            assert served(engine) == tokens


def test_every_expert_resident(stock):
    """VLLM 0.32's own reloading packs no experts for a CPU, and serves what is neither."""
    (one, of_one, _), (other, of_other, _) = stock
    with Engine(one, VLLM_STEPS | {"cache_experts": 48}, **ARGS) as engine:
        assert served(engine) == of_one
        call(engine, "reload_weights", weights_path=str(other))
        assert served(engine) == of_other
