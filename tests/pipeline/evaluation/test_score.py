"""Scoring: the numbers of the evaluation without its data, and the same bits once more."""

import json
import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitoring.profile import profile_of
from monitoring.scored import read_window, require_matches
from pipeline.errors import DataError, RunFolderError
from pipeline.evaluation import score as scoring
from pipeline.evaluation.fitted import fitted_file
from pipeline.evaluation.samples import scored_names
from pipeline.evaluation.score import as_scored, rescore, score
from pipeline.modality.bundle import modality_of
from pipeline.records import RunFolder, write_json
from pipeline.trained import model_version

WRITE = {
    "parquet": lambda rows, path: rows.to_parquet(path),
    "csv": lambda rows, path: rows.to_csv(path, index=False),
    "jsonl": lambda rows, path: path.write_text(rows.to_json(orient="records", lines=True)),
}


@pytest.fixture
def score_rows(classifier, tmp_path):
    """Scores rows of a data frame, as a file of the kind that is asked for."""

    def make(rows, kind="parquet", **changed):
        path = tmp_path / f"rows.{kind}"
        WRITE[kind](rows, path)
        config = classifier.config.model_copy(update=changed)
        return score(classifier.run, config, [path], tmp_path / "scored.parquet")

    return make


def own(table):
    """Scored columns, without those of the user."""
    return table.drop_columns([name for name in ("price", "place") if name in table.column_names])


def raw_rows(classifier):
    return pd.read_parquet(classifier.test_file)


# -- the numbers of the evaluation ---------------------------------------------------------------


def test_scoring_the_test_rows_gives_what_the_evaluation_gave(evaluated, tmp_path):
    said, output = [], tmp_path / "scored.parquet"
    nowhere = evaluated.config.data.model_copy(update={"data_files": {"train": "gone.parquet"}})
    config = evaluated.config.model_copy(update={"data": nowhere})
    table = score(evaluated.run, config, [evaluated.test_file], output, said.append)
    assert table.equals(evaluated.reference, check_metadata=True)
    assert pq.read_table(output).equals(table)
    assert said == [f"Scoring {len(table)} rows."]
    samples = evaluated.samples[evaluated.samples["split"] == "test"].drop(columns="split")
    found = table.select(samples.columns).to_pandas()
    pd.testing.assert_frame_equal(
        found, samples.reset_index(drop=True), check_exact=True, check_dtype=False
    )


def test_scored_rows_have_their_columns_and_say_where_they_come_from(evaluated):
    table, has_classes = evaluated.reference, "label" in evaluated.reference.column_names
    assert set(own(table).column_names) == scored_names(modality_of(evaluated.config), has_classes)
    about = json.loads(table.schema.metadata[b"masklock"])
    assert about["schema"] == "masklock-scored-v1"
    assert about["model_version"] == model_version(evaluated.run)
    assert (about["seed"], about["num_mc_passes"], about["batch_size"]) == (42, 5, 8)
    assert about["label_names"] == (["animal", "colour"] if has_classes else None)
    assert about["carried"] == (["price", "place"] if has_classes else [])


def test_a_window_that_was_scored_matches_the_profile_of_the_evaluation(evaluated, tmp_path):
    output = tmp_path / "scored.parquet"
    score(evaluated.run, evaluated.config, [evaluated.test_file], output)
    profile = profile_of(evaluated.reference, model_version=model_version(evaluated.run))
    window = read_window([output])
    require_matches(window, profile)
    assert window.embeddings().shape == (len(evaluated.reference), 16)
    assert profile.task == evaluated.config.model.task


def test_label_columns_agree_with_plain_arithmetic(classifier):
    rows = classifier.reference.to_pandas()
    assert (rows["correct"] == (rows["label"] == rows["prediction"])).all()
    right = rows[rows["correct"]]
    assert right["label_log_probability"].map(pow_e).tolist() == pytest.approx(
        right["confidence"].tolist()
    )
    assert (rows["unknown_token_share"] == 0).all()
    assert rows["num_tokens"].between(3, 12).all()


def pow_e(value):
    return 2.718281828459045**value


# -- rows of production --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_every_format_gives_the_same_scores(classifier, score_rows, kind):
    rows = raw_rows(classifier)
    assert own(score_rows(rows, kind)).equals(own(classifier.reference))


def test_rows_keep_their_numbers_in_any_order_and_batch(classifier, score_rows):
    rows = raw_rows(classifier)
    rows["sample_id"] = rows.index
    evaluation = classifier.config.evaluation.model_copy(update={"batch_size": 5})
    shuffled = score_rows(rows.sample(frac=1, random_state=1), evaluation=evaluation)
    found = own(shuffled).to_pandas().sort_values("sample_id", ignore_index=True)
    kept = ["text", "num_tokens", "label", "prediction", "confidence", "knn", "mahalanobis"]
    expected = classifier.reference.to_pandas()[kept]
    pd.testing.assert_frame_equal(found[kept], expected, rtol=1e-4, atol=1e-5)


def test_rows_without_labels_are_scored_and_own_columns_carried(classifier, score_rows):
    rows = raw_rows(classifier).drop(columns="label")
    rows["when"] = pd.Timestamp("2026-05-04", tz="UTC")
    table = score_rows(rows)
    assert table["label"].null_count == table["correct"].null_count == len(rows)
    assert table["price"].to_pylist() == rows["price"].tolist()
    assert pa.types.is_timestamp(table.schema.field("when").type)
    assert table["confidence"].equals(classifier.reference["confidence"])


def test_rows_without_their_domain_have_the_rates_of_their_roles(classifier, score_rows):
    found = score_rows(raw_rows(classifier).drop(columns="place"))
    both = zip(found["confidence"], classifier.reference["confidence"], strict=True)
    is_same = [one == other for one, other in both]
    in_forum = [place == "forum" for place in classifier.reference["place"].to_pylist()]
    assert is_same == [not one for one in in_forum]


def test_some_labels_may_be_missing(classifier, score_rows):
    rows = raw_rows(classifier)
    rows.loc[3, "label"] = None
    table = score_rows(rows)
    assert table["label"].null_count == table["label_log_probability"].null_count == 1


def test_several_files_are_scored_as_one(classifier, tmp_path):
    rows, paths = raw_rows(classifier), [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    WRITE["jsonl"](rows[:9], paths[0])
    rows[9:].reset_index(drop=True).to_parquet(paths[1])
    table = score(classifier.run, classifier.config, paths, tmp_path / "scored.parquet")
    assert own(table).equals(own(classifier.reference))


def test_nothing_is_left_in_the_cache_of_data_sets(classifier, tmp_path, monkeypatch):
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    score(classifier.run, classifier.config, [classifier.test_file], tmp_path / "scored.parquet")
    assert not list(cache.rglob("*.arrow"))


# -- the same bits once more ---------------------------------------------------------------------


def test_chosen_rows_are_scored_again_to_the_last_bit(evaluated):
    table, places = evaluated.reference, [5, 0, 3]
    again = rescore(evaluated.run, evaluated.config, table, places)
    assert again.equals(own(table).take(places))


def test_only_the_batches_of_the_chosen_rows_run(classifier, monkeypatch):
    ran, predict = [], scoring.Predictor.predict

    def watched(self, rows, batches):
        ran.append(batches)
        return predict(self, rows, batches)

    monkeypatch.setattr(scoring.Predictor, "predict", watched)
    rescore(classifier.run, classifier.config, classifier.reference, [4])
    assert len(ran[0]) == 1
    assert 4 in ran[0][0]


def test_rows_between_others_find_their_batch_again(classifier, score_rows):
    other = score_rows(raw_rows(classifier)[:6].assign(sample_id=range(100, 106)))
    both = pa.concat_tables([other, classifier.reference])
    again = rescore(classifier.run, classifier.config, both, [2, 20])
    assert again.equals(own(both).take([2, 20]))


def test_rows_whose_batch_is_not_whole_cannot_be_replayed(classifier):
    table = classifier.reference
    others = [
        n for n, key in enumerate(table["batch_key"]) if n < 4 or key != table["batch_key"][4]
    ]
    with pytest.raises(DataError, match="scored together with rows that are missing"):
        rescore(classifier.run, classifier.config, table.take([*others, 4]), [len(others)])


def test_rows_that_production_scored_are_batched_by_length(classifier):
    table = classifier.reference.drop_columns(["batch_key"])
    again = rescore(classifier.run, classifier.config, table, [7])
    assert again.equals(own(classifier.reference).take([7]))


def test_another_seed_or_number_of_passes_gives_other_numbers(classifier):
    table, about = (
        classifier.reference,
        json.loads(classifier.reference.schema.metadata[b"masklock"]),
    )
    for name, value in (("seed", 43), ("num_mc_passes", 6)):
        config = as_scored(classifier.config, about | {name: value})
        again = rescore(classifier.run, config, table, [4])
        assert again["confidence"] != table["confidence"].take([4])
        assert again["energy"].to_pylist() == table["energy"].take([4]).to_pylist()
    config = as_scored(classifier.config.model_copy(update={"seed": 43}), about)
    assert rescore(classifier.run, config, table, [4]).equals(own(table).take([4]))


# -- another model -------------------------------------------------------------------------------


@pytest.fixture
def copied(classifier, tmp_path):
    return RunFolder(shutil.copytree(classifier.run.path, tmp_path / "copy"))


def test_other_weights_or_another_plan_need_another_evaluation(classifier, copied):
    weights = copied.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(RunFolderError, match="trained again since. Evaluate it"):
        rescore(copied, classifier.config, classifier.reference, [0])
    shutil.copy(classifier.run.model / "model.safetensors", weights)
    rescore(copied, classifier.config, classifier.reference, [0])
    plan = json.loads(copied.plan.read_text())
    site = next(one for one in plan["sites"] if one["in_force"])
    write_json(copied.plan, plan | {"sites": [*plan["sites"], site | {"call": 7}]})
    with pytest.raises(RunFolderError):
        rescore(copied, classifier.config, classifier.reference, [0])


def test_a_run_that_was_not_evaluated_or_whose_file_is_damaged_says_so(classifier, copied):
    path = fitted_file(copied)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunFolderError, match="damaged"):
        rescore(copied, classifier.config, classifier.reference, [0])
    path.unlink()
    with pytest.raises(RunFolderError, match="has not been evaluated.*masklock evaluate"):
        rescore(copied, classifier.config, classifier.reference, [0])


# -- refusals ------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_rows_is_said_at_once(score_rows):
    rows = pd.DataFrame({"text": ["a cow", " "], "label": ["tree", "animal"], "sample_id": [1, 1]})
    with pytest.raises(DataError) as caught:
        score_rows(rows)
    assert str(caught.value).split("\n  - ") == [
        "inputs: 3 problems",
        "column 'text' has no text in row 1; fill them or leave them out",
        "column 'label' has the label 'tree' in row 0, which is none of the model's 2 classes: "
        "animal, colour",
        "column 'sample_id' has 1 numbers more than once: 1",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"words": ["a cow"]}, "no column 'text'.*there are: words"),
        ({"text": []}, "there are no rows"),
        ({"text": ["a cow"], "sample_id": ["x7"]}, "whole numbers from 0 on; found 'x7' in row 0"),
        ({"text": ["a cow"], "sample_id": [-1]}, "found -1"),
        ({"text": ["a cow"], "energy": [1.0]}, "that scored rows have too: energy. Rename"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(score_rows, rows, message):
    with pytest.raises(DataError, match=message):
        score_rows(pd.DataFrame(rows))


def test_files_that_cannot_be_read_or_written_are_refused_first(classifier, tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "rows.xlsx").write_bytes(b"")
    pd.DataFrame({"text": ["a cow"]}).to_parquet(tmp_path / "less.parquet")
    run, config, out = classifier.run, classifier.config, tmp_path / "scored.parquet"
    for names, message in (
        (["none.csv"], "There is no file"),
        (["rows.xlsx"], "is not one of .parquet"),
        (["torn.parquet"], "cannot be read as parquet"),
        ([classifier.test_file, "less.parquet"], r"other columns \(label, place, price in"),
        ([], "nothing to score"),
    ):
        with pytest.raises(DataError, match=message):
            score(run, config, [tmp_path / name for name in names], out)
    with pytest.raises(DataError, match="with .parquet"):
        score(run, config, [classifier.test_file], tmp_path / "scored.csv")
    with pytest.raises(DataError, match="would be lost"):
        score(run, config, [out], out)
    assert not out.exists()


def test_texts_that_a_language_model_cuts_have_no_numbers_of_their_own(language_model, tmp_path):
    pd.DataFrame({"text": ["a cow"], "sample_id": [3]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="cuts rows into samples"):
        score(
            language_model.run,
            language_model.config,
            [tmp_path / "rows.parquet"],
            tmp_path / "scored.parquet",
        )
