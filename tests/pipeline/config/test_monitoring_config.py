"""The `monitoring:` section: nothing to set, built-in rules to change, addresses refused."""

import pytest
from pydantic import ValidationError

from pipeline.config.load import dump_config, load_config
from pipeline.config.monitoring import (
    BUILT_IN_DETECTORS,
    BUILT_IN_RULES,
    MonitoringConfig,
    RuleConfig,
    WebhookConfig,
)
from pipeline.errors import ConfigError

MINIMAL = """
name: run
model: {task: text-classification, model_name_or_path: m}
data: {path: p}
"""


@pytest.fixture
def load(tmp_path):
    def load(*overrides):
        (tmp_path / "run.yaml").write_text(MINIMAL)
        return load_config(tmp_path / "run.yaml", overrides)

    return load


def test_nothing_has_to_be_set(load):
    config = load().monitoring
    assert config.rules.keys() == BUILT_IN_RULES.keys()
    assert config.sequential.detectors.keys() == BUILT_IN_DETECTORS.keys()
    assert config == MonitoringConfig()


def test_rules_of_the_user_stand_beside_the_built_in_ones_which_can_be_changed(load, tmp_path):
    mine = "monitoring.rules.mine={metric: drift/clicks/mean, below: 2}"
    config = load(mine, "monitoring.rules.accuracy_fell.falls_by=0.2")
    rules = config.monitoring.rules
    assert rules["mine"] == RuleConfig(metric="drift/clicks/mean", below=2.0)
    changed = BUILT_IN_RULES["accuracy_fell"] | {"falls_by": 0.2}
    assert rules["accuracy_fell"] == RuleConfig(**changed)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rules.mine.metric=a", "give at least one of above, below"),
        ("rules.mine={metric: a, above: 1, in_windows: 3}", "in_windows 3 is more than of_windows"),
        ("rules.accuracy_fell.sevrity=info", "did you mean severity?"),
        ("rules=3", "should be a valid dictionary"),
        ("sequential.detectors.mine.score=tail", "detectors.mine.column: is required but missing"),
        ("sequential.average_run_length=0", "greater than or equal to 1"),
        ("drift.min_effects.kss=0.1", "did you mean ks?"),
        ("sinks.commands.mine.argv=[]", "at least 1 item"),
    ],
)
def test_what_would_not_work_is_named(load, override, said):
    with pytest.raises(ConfigError, match="monitoring") as caught:
        load(f"monitoring.{override}")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one of url and url_env"),
        ({"url": "http://a.example/"}, "must be an https address"),
        ({"url": "https:///path"}, "must be an https address"),
        ({"url": "https://me:secret@a.example/"}, "no login and no query"),
        ({"url": "https://a.example/?token=secret"}, "no login and no query"),
        ({"url": "https://a.example/", "allowed_hosts": ["b.example"]}, "not among allowed_hosts"),
        ({"url_env": "HOOK"}, "url_env needs allowed_hosts"),
        ({"url_env": "a b", "allowed_hosts": ["b.example"]}, "match pattern"),
        ({"url": "https://a.example/", "allowed_networks": ["loopback"]}, "IPv4 or IPv6"),
    ],
)
def test_webhooks_are_https_to_named_hosts_and_hold_no_secret(given, said):
    with pytest.raises(ValidationError) as caught:
        WebhookConfig(**given)
    assert said in str(caught.value)


def test_the_host_of_an_address_is_allowed_by_itself():
    assert WebhookConfig(url="https://A.example/x").hosts == ["a.example"]
