"""Rules over the measures of windows: thresholds, changes, k of the last n."""

import pytest

from monitoring.history import WindowRecord
from monitoring.rules import broken_rules, silent_rules
from pipeline.config.monitoring import MonitoringConfig, RuleConfig


def windows(*values, metric="drift/clicks/mean", num_rows=100):
    return [
        WindowRecord(str(n), "", num_rows, "quiet", measures={} if v is None else {metric: v})
        for n, v in enumerate(values)
    ]


def findings(rule, past, reference=None):
    rules = {"mine": RuleConfig(**{"metric": "drift/clicks/mean"} | rule)}
    return broken_rules(rules, past, reference or {})


@pytest.mark.parametrize(
    ("rule", "value", "said"),
    [
        ({"above": 2.0}, 3.0, "drift/clicks/mean is 3, above 2"),
        ({"above": 2.0}, 2.0, None),
        ({"below": 2.0}, 1.5, "drift/clicks/mean is 1.5, below 2"),
        ({"below": 2.0, "above": 9.0}, 5.0, None),
        ({"falls_by": 0.1}, 8.9, "more than 0.1 of it below the reference's 10"),
        ({"falls_by": 0.1}, 9.1, None),
        ({"rises_by": 0.5}, 15.1, "more than 0.5 of it above the reference's 10"),
        ({"rises_by": 0.5}, 5.0, None),
    ],
)
def test_a_threshold_or_change_is_broken_only_beyond_its_bound(rule, value, said):
    found = findings(rule, windows(value), {"drift/clicks/mean": 10.0})
    assert [said in one.said for one in found] == ([True] if said else [])


def test_a_change_of_a_negative_baseline_goes_the_right_way():
    reference = {"drift/clicks/mean": -10.0}
    assert findings({"falls_by": 0.1}, windows(-12.0), reference)
    assert not findings({"falls_by": 0.1}, windows(-8.0), reference)


def test_k_of_the_last_n_windows_counts_this_one_among_them():
    rule = {"above": 1.0, "in_windows": 2, "of_windows": 3}
    assert not findings(rule, windows(2, 0, 0, 2))
    assert findings(rule, windows(0, 2, 0, 2))[0].broken_in == 2
    assert not findings(rule, windows(2, 2, 0)), "this window is in order"


def test_windows_without_the_measure_or_with_few_rows_do_not_count():
    rule = {"above": 1.0, "in_windows": 2, "of_windows": 2}
    assert findings(rule, windows(2, None, None, 2))
    small = windows(2, num_rows=5) + windows(2)
    assert not findings(rule | {"min_rows": 10}, small)
    assert findings(rule, small)


def test_few_labels_say_nothing_about_quality_however_many_rows_there_are():
    metric = "drift/performance/accuracy"
    rule = {"metric": metric, "below": 0.5, "min_rows": 50}
    for num_labelled, broken in ((3, False), (50, True)):
        measures = {metric: 0.1, "drift/num_labelled": num_labelled}
        assert (
            bool(findings(rule, [WindowRecord("", "", 200, "quiet", measures=measures)])) == broken
        )


def test_previous_windows_are_a_baseline_once_there_are_three():
    rule = {"falls_by": 0.5, "baseline": "previous"}
    assert not findings(rule, windows(10, 10, 1))
    assert findings(rule, windows(10, 12, 14, 5))[0].baseline == 12
    assert not findings(rule, windows(*[100] * 5, *[2] * 11)), "what stays low is the new normal"


def test_a_pattern_is_about_every_measure_it_matches():
    past = [
        WindowRecord("", "", 9, "quiet", measures={"drift/a/p_value": 0.1, "drift/b/p_value": 0})
    ]
    rules = {"any": RuleConfig(metric="drift/*/p_value", below=0.05)}
    assert [one.metric for one in broken_rules(rules, past, {})] == ["drift/b/p_value"]


def test_rules_of_the_user_that_match_nothing_are_named_and_switched_off_ones_are_not():
    typo, off = {"metric": "drift/clickz", "above": 1.0}, {"enabled": False}
    rules = MonitoringConfig(rules={"typo": typo, "off": {**typo, **off}}).rules
    assert silent_rules(rules, windows(1.0)[0]) == ["typo"]
    always = {"off": RuleConfig(metric="*", above=-1.0, enabled=False)}
    assert broken_rules(always, windows(1.0), {}) == []
