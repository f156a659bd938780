"""A window of scored rows against a profile: what drifts, what does not, what cannot be judged."""

import json

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import false_discovery_control

from monitoring.drift import DriftSettings, judge_window
from monitoring.drift.result import ColumnDrift
from monitoring.drift.verdict import adjust, judge_counts, judge_embeddings, judge_numeric
from monitoring.profile import profile_of
from monitoring.scored import Window

NAMES = np.array(["asyncio", "email", "json"])
SETTINGS = DriftSettings(num_permutations=199)


def scored(num_rows, seed, shift=0.0, labelled=True, **own):
    """Scored rows; `shift` makes inputs stranger and the model less sure, and wrong more often."""
    random = np.random.default_rng(seed)
    confidence = random.beta(6, 1 + 3 * shift, num_rows)
    label = NAMES[random.integers(0, 3, num_rows)]
    wrong = NAMES[(np.searchsorted(NAMES, label) + 1) % 3]
    prediction = np.where(random.random(num_rows) < confidence, label, wrong)
    embedding = random.normal(shift, 1, (num_rows, 4)).astype(np.float32)
    return pa.table(
        {
            "sample_id": np.arange(num_rows),
            "label": pa.array(label.tolist() if labelled else [None] * num_rows, pa.string()),
            "prediction": prediction.tolist(),
            "correct": pa.array(
                (label == prediction) if labelled else [None] * num_rows, pa.bool_()
            ),
            "label_log_probability": np.log(random.uniform(0.5, 1, num_rows)),
            "confidence": confidence,
            "num_tokens": random.integers(3, 60, num_rows),
            "disagreement": random.binomial(10, min(0.02 + 0.2 * shift, 1), num_rows) / 10,
            "energy": random.normal(shift, 1, num_rows),
            "embedding": pa.array(list(embedding), pa.list_(pa.float32())),
            **own,
        }
    )


def judged(table, settings=SETTINGS, reference=None):
    profile = profile_of(scored(1500, 1) if reference is None else reference, model_version="v1")
    return judge_window(profile, Window(table, (), "", {}), settings)


def test_rows_like_the_reference_are_quiet():
    found = judged(scored(300, 2))
    assert found.drifted == []
    assert {column.column for column in found.columns} == {
        *("label", "prediction", "confidence", "num_tokens", "disagreement", "energy"),
        "embedding",
    }


def test_strange_rows_show_in_scores_embedding_and_quality():
    found = judged(scored(300, 3, shift=1.0))
    drifted = {column.column for column in found.drifted}
    assert drifted == {"confidence", "disagreement", "energy", "embedding"}
    accuracy, estimated = found.performance["accuracy"], found.performance["estimated_accuracy"]
    assert accuracy.upper < accuracy.reference
    assert accuracy.p_value < 1e-3
    assert estimated.upper < estimated.reference
    assert estimated.estimate == pytest.approx(accuracy.estimate, abs=0.1)


def test_without_labels_quality_is_estimated_only():
    found = judged(scored(300, 4, labelled=False).drop_columns(["label_log_probability"]))
    assert (found.num_labelled, set(found.performance)) == (0, {"estimated_accuracy"})
    label = next(column for column in found.columns if column.column == "label")
    assert label.note.startswith("0 values in the window")


def test_a_few_rows_that_do_not_belong_are_found_by_the_tails():
    table = pa.concat_tables([scored(450, 5), scored(50, 6, shift=6.0)])
    energy = next(one for one in judged(table).columns if one.column == "energy")
    assert energy.drifted
    assert energy.effect_name == "tails"
    assert energy.effect == pytest.approx(0.1, abs=0.03)
    assert energy.tests["ks"].p_value > 100 * energy.p_value


def test_columns_of_the_user_are_judged_missing_values_included():
    price = np.random.default_rng(7).normal(10, 1, 1500)
    shop = [f"shop {n % 4}" for n in range(1500)]
    order = [f"order {n}" for n in range(1500)]
    own = {"price": price, "shop": shop, "order": order}
    reference = scored(1500, 1, **own)
    partly = pa.array([None if n < 30 else value + 1 for n, value in enumerate(price[:300])])
    own = {"price": partly, "shop": ["shop 1"] * 300, "order": order[:300], "extra": shop[:300]}
    window = scored(300, 8, **own)
    found = judged(window, reference=reference)
    assert {one.column for one in found.drifted} == {"price", "price.missing", "shop"}
    assert found.not_compared == {"extra": "not in the reference profile"}
    assert any(one.column == "order" and "hardly repeat" in one.note for one in found.columns)
    quiet = judged(window, DriftSettings(ignore=["price", "shop"]), reference)
    assert quiet.drifted == []


def test_a_score_that_repeats_another_column_is_judged_once():
    twins = {"mc_msp": 1 - np.linspace(0, 1, 300), "predictive_entropy": np.linspace(0, 1, 300)}
    twins["mc_predictive_entropy"] = twins["predictive_entropy"]
    table = scored(300, 1, **twins)
    names = [column.column for column in judged(table, reference=scored(300, 2, **twins)).columns]
    assert "predictive_entropy" in names
    assert not {"mc_predictive_entropy", "mc_msp"} & set(names)


@pytest.mark.parametrize("num_rows", [1, 2, 49])
def test_small_windows_say_that_they_are_small(num_rows):
    found = judged(scored(num_rows, 9))
    assert found.drifted == []
    assert all(f"{num_rows} values in the window" in column.note for column in found.columns)
    accuracy = found.performance["accuracy"]
    assert 0 <= accuracy.lower <= accuracy.estimate <= accuracy.upper <= 1


def test_a_judged_window_is_json_and_numbers():
    found = judged(scored(300, 10))
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["num_rows"] == 300
    metrics = found.metrics()
    assert all(type(value) is float for value in metrics.values())
    measures = {"p_value", "adjusted_p_value", "effect", "mean", "ks", "psi", "wasserstein"}
    assert {f"drift/energy/{measure}" for measure in measures} <= metrics.keys()
    assert {"drift/embedding/mmd", "drift/performance/accuracy"} <= metrics.keys()


def test_the_same_window_is_judged_the_same_twice():
    assert judged(scored(200, 11)).to_json() == judged(scored(200, 11)).to_json()


def column(p_value, effect):
    return ColumnDrift("x", "numeric", 99, p_value=p_value, effect=effect, min_effect=0.05)


def test_p_values_are_adjusted_over_the_columns_that_have_one():
    p_values = [0.001, 0.02, 0.004, 0.5]
    judged_columns = [column(p_value, 0.1) for p_value in p_values]
    unjudged = ColumnDrift("y", "numeric", 3, note="too few")
    found = adjust([judged_columns[0], unjudged, *judged_columns[1:]], SETTINGS)
    adjusted = [one.adjusted_p_value for one in found if one.p_value is not None]
    assert adjusted == pytest.approx(false_discovery_control(p_values))
    assert [one.drifted for one in found] == [True, False, False, True, False]


def test_an_effect_too_small_to_matter_is_no_drift():
    found = adjust([column(1e-9, 0.01), column(1e-9, 0.05)], SETTINGS)
    assert [one.drifted for one in found] == [False, True]
    stricter = DriftSettings(numeric_tests=["ks"], min_effects={"ks": 0.3})
    assert judge_numeric("x", np.arange(99.0), np.arange(99.0), stricter).min_effect == 0.3


@pytest.mark.parametrize(
    "window",
    [np.zeros(100), np.array([np.nan] * 100), np.array([np.inf] * 60 + [0.0] * 60)],
    ids=["constant", "nothing", "infinite"],
)
def test_columns_without_information_are_quiet(window):
    found = adjust([judge_numeric("x", np.zeros(300), window, SETTINGS)], SETTINGS)[0]
    assert not found.drifted
    assert found.p_value in (None, 1.0)


def test_a_constant_that_moves_is_drift():
    found = adjust([judge_numeric("x", np.zeros(300), np.full(100, -1.0), SETTINGS)], SETTINGS)[0]
    assert found.drifted


def test_categories_that_the_reference_never_had_are_drift():
    found = judge_counts("x", np.array([100, 100, 0]), np.array([50, 50, 20]), SETTINGS)
    assert adjust([found], SETTINGS)[0].drifted


def test_large_windows_give_as_many_embeddings_as_are_allowed():
    rows = np.random.default_rng(12).normal(size=(500, 3))
    found = judge_embeddings(rows, rows, DriftSettings(max_embedding_rows=100, num_permutations=19))
    assert found.num_rows == 100


def test_the_share_of_quiet_windows_with_a_finding_is_below_the_rate():
    reference, findings = np.random.default_rng(13).normal(size=(5, 400)), 0
    random = np.random.default_rng(14)
    settings = DriftSettings(false_discovery_rate=0.1, min_effects={"ks": 0, "tails": 0})
    for _ in range(60):
        found = [judge_numeric("x", r, random.normal(size=60), settings) for r in reference]
        findings += any(one.drifted for one in adjust(found, settings))
    assert findings <= 6 + 3 * 2.4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"numeric_tests": ["psi"]}, "numeric column is judged by"),
        ({"numeric_tests": []}, "at least one test"),
        ({"categorical_test": "ks"}, "categorical column is judged by"),
        ({"min_effects": {"kss": 0.1}}, "got 'kss'"),
    ],
)
def test_settings_that_cannot_be_in_force_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DriftSettings(**wrong)
