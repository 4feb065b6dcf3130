"""MODEL of a command line: what can be one, and what the model in a folder is called."""

from pathlib import Path

import pytest
from conftest import TINY_MIXTRAL

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.model_folder import check_named_model, model_name


@pytest.mark.parametrize("model", ["mistralai/Mixtral-8x7B-v0.1", "gpt2", "s3://bucket/a/b", str(TINY_MIXTRAL)])
def test_what_vllm_takes_is_left_to_it(model):
    assert check_named_model(model) == model


@pytest.mark.parametrize("model", ["/no/such/folder", "./checkpoint", "../checkpoint", "~/checkpoint", "a/b/c"])
def test_a_path_that_leads_nowhere_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapMoEError, match="does not exist; name a checkpoint folder, or a model on the hub"):
        check_named_model(model)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("cache/models--org--Mixtral-8x7B/snapshots/0123abc", "Mixtral-8x7B"),
        ("cache/models--gpt2/snapshots/0123abc", "gpt2"),
        ("snapshots/step-100", "step-100"),
        ("org/m", "m"),
        (".", Path.cwd().name),
    ],
)
def test_the_name_of_a_model_is_not_that_of_its_commit(folder, name):
    assert model_name(Path(folder)) == name
