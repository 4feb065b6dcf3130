"""Profiles that come with the package: a name leads to one, and a path to its file."""

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from vllm_adapmoe.cli.app import app
from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.profile.model_profile import ModelProfile
from vllm_adapmoe.profile.shipped import find_profile, shipped_profiles

NAMES = ["mixtral_8x22b", "mixtral_8x7b", "tiny_mixtral", "tiny_qwen3moe"]


def test_every_shipped_profile_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_profiles() == NAMES
    for name in NAMES:
        path = find_profile(name)
        assert path.resolve() == ROOT / "configs" / f"{name}.json"
        assert ModelProfile.load(path).layers


def test_an_existing_file_wins_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mixtral_8x7b").mkdir()
    (tmp_path / "tiny_mixtral").write_text("{}")
    assert find_profile("mixtral_8x7b").resolve() == ROOT / "configs" / "mixtral_8x7b.json"
    assert find_profile("tiny_mixtral").resolve() == tmp_path / "tiny_mixtral"
    assert find_profile("~/tiny_mixtral") == tmp_path / "tiny_mixtral"


@pytest.mark.parametrize(
    "name", ["mixtral", "mixtral_8x7b.json", "/no/such/profile.json", "", ".", "~nobody/p", "x" * 300]
)
def test_what_is_neither_is_refused_with_the_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapMoEError, match=", ".join(NAMES)) as error:
        find_profile(name)
    assert str(error.value).startswith(f"profile={name!r} is neither") and "\n" not in str(error.value)


def test_a_shell_completes_the_names():
    for words, completed in (("adapmoe plan M --profile tiny", NAMES[2:]), ("adapmoe plan M --profile own", [])):
        environment = {"_ADAPMOE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
        run = CliRunner(env=environment).invoke(app, prog_name="adapmoe")
        assert run.output.split() == completed
