"""What a user may set, and what they are told when it cannot be."""

import json

import pytest

from vllm_adapmoe.cli.keys import fold_keys
from vllm_adapmoe.config import AdapMoEConfig, AdapMoEError


def test_a_dict_a_json_text_and_a_file_are_the_same(tmp_path):
    given = {"cache_gb": 8.0, "store": "file"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(given))
    parsed = [AdapMoEConfig.parse(value) for value in (given, json.dumps(given), file, str(file))]
    assert all(config == parsed[0] for config in parsed)
    assert AdapMoEConfig.parse(parsed[0].transport()) == parsed[0]


def test_the_transport_is_plain_json_and_holds_only_what_was_set():
    assert json.loads(json.dumps(AdapMoEConfig.parse({"cache_gb": 8}).transport())) == {"cache_gb": 8.0}
    assert AdapMoEConfig.parse(None).transport() == {}


@pytest.mark.parametrize(
    ("first", "later", "together"),
    [
        ({"cache_gb": 8.0, "store": "file"}, {"cache_gb": 4.0}, {"cache_gb": 4.0, "store": "file"}),
        ({"prefetch": {"lookahead": 2}}, {"prefetch": {"max_experts": 4}},
         {"prefetch": {"lookahead": 2, "max_experts": 4}}),
        ({"cache_gb": 8.0, "store": "file"}, {"cache_fraction": 0.5}, {"cache_fraction": 0.5, "store": "file"}),
        ({"cache_experts": 9}, {"cache_gb": "auto"}, {}),
        ({"cache_experts": 9, "store": "file"}, {"cache_experts": None}, {"store": "file"}),
        ({"profile": "p", "gating": {"mode": "token", "threshold": 0.1}}, {"gating": {"target_experts": 1.5}},
         {"profile": "p", "gating": {"mode": "token", "target_experts": 1.5}}),
        ({"profile": "p", "gating": {"mode": "token", "threshold": 0.1}}, {"gating": {"mode": "off"}},
         {"profile": "p"}),
        ({"profile": "p", "gating": {"mode": "token", "threshold": 0.1}}, {"gating": {"mode": "batch"}},
         {"profile": "p", "gating": {"mode": "batch", "threshold": 0.1}}),
    ],
)  # fmt: skip
def test_of_several_the_later_wins_key_by_key(first, later, together, tmp_path):
    """A budget takes the place of another kind of budget, and so does a limit of gating; nothing else is lost."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(first))
    for given in ([file, later], [first, json.dumps(later)], [str(file), {}, later], [{}, [str(file), later]]):
        assert AdapMoEConfig.parse(given).transport() == together
    assert AdapMoEConfig.parse([str(file)]) == AdapMoEConfig.parse(first)


def test_an_automatic_budget_is_none():
    for given in (None, {"cache_gb": "auto"}, '{"cache_gb": "auto"}'):
        config = AdapMoEConfig.parse(given)
        assert config.automatic and config.transport() == {}
    assert AdapMoEConfig.parse({"cache_gb": "auto", "cache_experts": 3}).transport() == {"cache_experts": 3}
    assert not AdapMoEConfig.parse({"cache_experts": 3}).automatic


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"cache_gbs": 1}, "'cache_gbs'"),
        ({"cache_gb": -1}, "cache_gb=-1"),
        ({"cache_gb": float("nan")}, "cache_gb=nan"),
        ({"cache_gb": "8"}, "cache_gb='8' is not usable: input should be a valid number or input should be 'auto'"),
        ({"cache_gb": None}, "cache_gb=None"),
        ({"cache_gb": True}, "cache_gb=True"),
        ({"cache_fraction": 1.5}, "cache_fraction=1.5"),
        ({"cache_experts": 2.5}, "cache_experts=2.5"),
        ({"cache_experts": 0}, "cache_experts=0"),
        ({"cache_gb": 1, "cache_experts": 3}, "cache_gb=1.0, cache_experts=3"),
        ({"store": "disk"}, "store='disk'"),
        ({"gating": {"mode": "expert"}}, "gating.mode='expert'"),
        ({"gating": {"modes": "token"}}, "'gating.modes' is not known; known keys: mode, threshold"),
        ({"gating": {"threshold": 0.1}}, "threshold=0.1 has no effect with mode=off"),
        ({"gating": {"mode": "token"}, "profile": "p"}, "exactly one of threshold, target_experts, max_loss_increase"),
        (
            {"gating": {"mode": "batch", "threshold": 0.1, "target_experts": 1.5}, "profile": "p"},
            "given: threshold=0.1, target_experts=1.5",
        ),
        ({"gating": {"mode": "token", "threshold": -1}, "profile": "p"}, "gating.threshold=-1"),
        ({"gating": {"mode": "token", "threshold": "0.1"}, "profile": "p"}, "gating.threshold='0.1'"),
        ({"gating": {"mode": "token", "threshold": 0.1}}, "needs a profile"),
        ({"eviction": "next_token"}, "eviction=next_token needs a profile"),
        ({"eviction": "fifo"}, "eviction='fifo'"),
        ({"allocation": "profile"}, "allocation=profile needs a profile"),
        ({"prefetch": {"ahead": 2}}, "'prefetch.ahead' is not known; known keys: lookahead, max_experts"),
        ({"prefetch": {"lookahead": 9}}, "prefetch.lookahead=9"),
        ({"prefetch": {"max_experts": 0}}, "prefetch.max_experts=0"),
        ({"link_gbps": 0}, "link_gbps=0"),
        ({"trace_mib": 0}, "trace_mib=0"),
        ("/no/such/file.json", "'/no/such/file.json'"),
        ("{cache_gb: 1}", "not valid JSON"),
        ([1], "1 is not a mapping"),
        ([{"cache_gb": 1}, "/no/such/file.json"], "'/no/such/file.json'"),
        ([{"cache_gb": 1}, {"cache_gb": 2, "cache_experts": 3}], "cache_gb=2.0, cache_experts=3"),
        ([{"prefetch": {"lookahead": 2}}, {"prefetch": 3}], "prefetch=3"),
        ([{"gating": 1}, {"gating": {"mode": "off", "x": 1}}], "'gating.x' is not known"),
        (["{}", {"store": "file"}, {"decode": "device"}], "set store=host"),
        ("", "''"),
        ({8: "cache_gb"}, "8=8 is not usable: keys should be strings"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(value, named):
    with pytest.raises(AdapMoEError) as error:
        AdapMoEConfig.parse(value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_single_keys_of_our_own_commands(tmp_path):
    """As vLLM's parser takes them: with a space or `=`, with underscores, nested; they come last."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"cache_gb": 8, "store": "file", "prefetch": {"lookahead": 5, "max_experts": 3}}))
    given = [
        "calibrate", "--adapmoe_config.cache_fraction", "0.5", "--adapmoe-config", str(file),
        "--adapmoe-config.prefetch.lookahead=2", "--adapmoe-config.store=host", "-o", "a.b",
    ]  # fmt: skip
    folded = [*fold_keys(given)]
    assert folded[:5] == ["calibrate", "--adapmoe-config", str(file), "-o", "a.b"]
    assert folded[5::2] == ["--adapmoe-config"] * 3
    assert AdapMoEConfig.parse([str(file), *folded[6::2]]).transport() == {
        "cache_fraction": 0.5, "store": "host", "prefetch": {"lookahead": 2, "max_experts": 3},
    }  # fmt: skip
