"""What a user may set, and what they are told when it cannot be."""

import json

import pytest

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
        ({"gating": {"threshold": 0.1}}, "threshold=0.1 has no meaning with mode=off"),
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
        ([1], "[1]"),
        ("", "''"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(value, named):
    with pytest.raises(AdapMoEError) as error:
        AdapMoEConfig.parse(value)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
