"""The evaluation stage on tiny runs: its files, against scikit-learn and plain loops over them."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from monitoring.profile import read_profile
from pipeline.config.roles import RoleDropout
from pipeline.data import load_raw, prepare_data
from pipeline.errors import ConfigError, DataError, RunFolderError
from pipeline.evaluation import stage
from pipeline.evaluation.stage import evaluate
from pipeline.exhibits import Picture, Table
from pipeline.modality.tokenizer import load_tokenizer
from pipeline.model import load_trained, plan_for
from pipeline.records import RunFolder, read_jsonl
from pipeline.trained import model_version

CLASSES = "text-classification"


def changed(config, **values):
    evaluation = config.evaluation.model_copy(update=values)
    return config.model_copy(update={"evaluation": evaluation})


# -- what is written -----------------------------------------------------------------------------

SECTIONS = {
    "schema",
    "run",
    "task",
    "created",
    "seed",
    "versions",
    "num_samples",
    "mc",
    "quality",
    "intervals",
    "calibration",
    "uncertainty",
    "ood",
    "verdict",
}
WAYS = {"deterministic", "mc"}
SEPARATION = {"auroc", "auroc_interval", "aupr_in", "aupr_out", "fpr95", "fpr95_interval"}


def test_the_report_has_its_sections(evaluated):
    report = json.loads(evaluated.run.report_json.read_text())
    has_classes = evaluated.config.model.task == CLASSES
    assert set(report) == SECTIONS | ({"chance"} if has_classes else set())
    assert set(report["quality"]) == WAYS
    assert set(report["calibration"]) == WAYS | (
        {"mc_temperature", "temperature"} if has_classes else set()
    )
    assert set(report["mc"]) == {
        "num_passes",
        "head_only",
        "num_sites",
        "seconds",
        "deterministic_seconds",
    }
    far = report["ood"]["far"]
    assert all(set(figures) == SEPARATION for figures in far["scores"].values())
    assert {far["best_deterministic"], far["best_mc"]} <= set(far["scores"])
    assert report["verdict"][-1] == far["verdict"]


def test_the_samples_table_has_a_row_a_sample(evaluated):
    report, samples = evaluated.report, evaluated.samples
    sizes = samples["split"].value_counts().to_dict()
    assert sizes == {"test": report["num_samples"]["test"], "ood:far": sizes["ood:far"]}
    assert sizes["ood:far"] == report["num_samples"]["ood"]["far"]
    own = {"sample_id", "split", "text", "predictive_entropy", "mutual_information"}
    assert own | set(report["ood"]["far"]["scores"]) <= set(samples.columns)
    assert samples["text"].str.len().min() > 0
    test = samples[samples["split"] == "test"]
    assert sorted(test["sample_id"]) == list(range(len(test)))


def test_a_user_reads_what_is_going_on(evaluated):
    sizes = evaluated.report["num_samples"]
    assert evaluated.said == [
        f"Predicting {sizes['validation']} rows: validation.",
        f"Predicting {sizes['test']} rows: test.",
        f"Predicting {sizes['ood']['far']} rows: ood:far.",
        "metrics.jsonl: 1 rows written.",
    ]


# -- the numbers ---------------------------------------------------------------------------------


def test_quality_agrees_with_scikit_learn(classifier):
    test = classifier.samples[classifier.samples["split"] == "test"]
    quality = classifier.report["quality"]["mc"]
    assert quality["accuracy"] == accuracy_score(test["label"], test["prediction"])
    assert quality["f1"] == pytest.approx(
        f1_score(test["label"], test["prediction"], average="macro")
    )
    assert (test["correct"] == (test["label"] == test["prediction"])).all()
    assert classifier.report["chance"] == test["label"].value_counts(normalize=True).max()
    errors = classifier.report["uncertainty"]["error_auroc"]
    for score in ("mutual_information", "disagreement"):
        expected = roc_auc_score(~test["correct"].astype(bool), test[score])
        assert errors[score] == pytest.approx(expected)


def test_ood_figures_agree_with_scikit_learn(evaluated):
    is_far = evaluated.samples["split"] == "ood:far"
    for name, figures in evaluated.report["ood"]["far"]["scores"].items():
        assert figures["auroc"] == pytest.approx(roc_auc_score(is_far, evaluated.samples[name]))
    if "label" in evaluated.samples:
        assert evaluated.samples[is_far]["label"].isna().all()
        assert evaluated.samples[is_far]["correct"].isna().all()


def test_perplexity_equals_a_plain_loop(language_model):
    config, run = language_model.config, language_model.run
    own = config.model.model_copy(update={"tokenizer_name_or_path": str(run.model)})
    tokenizer = load_tokenizer(config.model_copy(update={"model": own}), [])
    rows = prepare_data(config, load_raw(config), tokenizer).test
    plan = plan_for(config, None, tokenizer)
    model = load_trained(run.model, config, None, plan, tokenizer).eval()
    total, count = 0.0, 0
    for ids in rows["input_ids"][:]:
        with torch.no_grad():
            log = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        total += log.gather(1, torch.tensor(ids)[1:, None]).sum().item()
        count += len(ids) - 1
    perplexity = language_model.report["quality"]["deterministic"]["perplexity"]
    assert perplexity == pytest.approx(math.exp(-total / count), rel=1e-6)
    assert language_model.samples["num_tokens"].where(
        language_model.samples["split"] == "test"
    ).sum() == pytest.approx(count)


def test_evaluating_again_gives_the_same_report(evaluated):
    again, first = evaluate(evaluated.run, evaluated.config), copy.deepcopy(evaluated.report)
    for report in (first, again):
        del report["created"], report["mc"]["seconds"], report["mc"]["deterministic_seconds"]
    assert again == first
    pd.testing.assert_frame_equal(pd.read_parquet(evaluated.run.samples), evaluated.samples)


def test_the_batch_size_changes_no_sample(evaluated):
    evaluate(evaluated.run, changed(evaluated.config, batch_size=5))
    found = pd.read_parquet(evaluated.run.samples)
    pd.testing.assert_frame_equal(found, evaluated.samples, atol=1e-5)


# -- trackers ------------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args: self.calls.append((name, *args)) or f"{name}ed."


def test_numbers_exhibits_and_files_reach_one_tracker_session(classifier, monkeypatch, tmp_path):
    recorder, said = Recorder(), []
    monkeypatch.setattr(stage, "open_tracker", lambda config, folder, is_main: recorder)

    def exhibits(run):
        assert run.report_json.is_file()
        run.report_html.write_text("a page")
        return {"reliability": Picture(tmp_path / "a.png")}

    evaluate(classifier.run, classifier.config, said.append, exhibits)
    names = [name for name, *_ in recorder.calls]
    assert names == ["start", "log", "show", "artifact", "summary", "finish"]
    (_, numbers, step), (_, name, picture), artifact = recorder.calls[1:4]
    assert (step, name, picture) == (40, "reliability", Picture(tmp_path / "a.png"))
    assert artifact[1:] == ("report", classifier.run.report_html)
    assert numbers["eval/mc_accuracy"] == classifier.report["quality"]["mc"]["accuracy"]
    assert {key.split("/")[0] for key in numbers} == {"eval", "calibration", "uncertainty", "ood"}
    assert said[-1] == "finished."


def test_rows_stay_here_where_they_are_not_to_be_shared(classifier, monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr(stage, "open_tracker", lambda config, folder, is_main: recorder)
    wandb = classifier.config.wandb.model_copy(update={"share_rows": False})
    config = classifier.config.model_copy(update={"wandb": wandb})
    shown = {"picture": Picture(tmp_path / "a.png"), "rows": Table(["text"], [["the cow"]])}

    stage._track(classifier.run, config, classifier.report, shown)
    assert [name for name, *_ in recorder.calls] == ["start", "log", "show", "summary", "finish"]
    assert recorder.calls[2][1] == "picture"


def test_the_headline_numbers_are_a_row_of_the_metrics(evaluated):
    row = next(row for row in read_jsonl(evaluated.run.metrics) if "eval/mc_loss" in row)
    assert row["step"] == 40
    assert row["eval/mc_loss"] == evaluated.report["quality"]["mc"]["loss"]


# -- several processes ---------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[3]
EVALUATED_AND_SCORED = """
import contextlib, sys, torch
from pipeline.__main__ import main

torch.distributed.init_process_group("gloo")
run, rows = sys.argv[1:]
for words in (["evaluate", run], ["score", run, "--input", rows]):
    sys.argv[1:] = words
    with contextlib.suppress(SystemExit):
        main()
torch.distributed.destroy_process_group()  # gloo may abort an interpreter that ends with it open
"""
TWICE = """
import contextlib, os, torch
from pipeline.__main__ import main
from pipeline.errors import ModelError
from pipeline.evaluation.predict import Predictor

def fail(self, batch, plain):
    raise ModelError("these logits are broken")

torch.distributed.init_process_group("gloo")  # is kept, as that of a training
with contextlib.suppress(SystemExit):
    main()
if os.environ["RANK"] == "1":
    Predictor._passes = fail
main()
"""


def run_two(folder, *words):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    command += ["--config_file", str(ROOT / "configs/accelerate/ddp.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100
    )


def without_times(report):
    mc = {name: value for name, value in report["mc"].items() if "seconds" not in name}
    return {**report, "mc": mc, "created": None}


def forget_files(evaluated):
    evaluated.run.report_json.unlink()
    evaluated.run.samples.unlink()


def assert_same_files(evaluated):
    """Written by two processes, equal those of one to the last bit, but for times."""
    found = json.loads(evaluated.run.report_json.read_text())
    assert without_times(found) == without_times(json.loads(json.dumps(evaluated.report)))
    pd.testing.assert_frame_equal(pd.read_parquet(evaluated.run.samples), evaluated.samples)


def test_two_processes_write_the_files_of_one(classifier, tmp_path):
    forget_files(classifier)
    (tmp_path / "child.py").write_text(EVALUATED_AND_SCORED)
    done = run_two(tmp_path, "child.py", str(classifier.run.path), str(classifier.test_file))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Predicting 21 rows: test.") == done.stdout.count("report.json") == 1
    assert_same_files(classifier)
    scored = pq.read_table(tmp_path / "scored.parquet")
    assert scored.equals(classifier.reference)
    assert scored.schema.metadata == classifier.reference.schema.metadata
    assert done.stdout.count("21 scored rows: scored.parquet") == 1
    version = model_version(classifier.run)
    assert read_profile(classifier.run, version).num_rows == len(classifier.reference) == 21


def test_two_processes_judge_tokens_as_one_and_fail_together(language_model, tmp_path):
    forget_files(language_model)
    (tmp_path / "child.py").write_text(TWICE)
    done = run_two(tmp_path, "child.py", "evaluate", str(language_model.run.path))
    assert done.returncode != 0  # of the second time, when one process failed; and no hang
    assert done.stderr.count("masklock: these logits are broken") == 1, done.stderr[-3000:]
    assert_same_files(language_model)


# -- refusals and odd data -----------------------------------------------------------------------


def test_a_run_without_a_model_is_refused(classifier, tmp_path):
    with pytest.raises(RunFolderError, match="training has not finished. Train it first"):
        evaluate(RunFolder(tmp_path), classifier.config)


def test_data_that_names_other_classes_is_refused(classifier):
    trained = classifier.run.labels.read_text()
    classifier.run.labels.write_text('["colour", "animal"]')
    try:
        with pytest.raises(RunFolderError, match="the same names in another order"):
            evaluate(classifier.run, classifier.config)
    finally:
        classifier.run.labels.write_text(trained)


def test_what_the_training_settled_cannot_be_changed(classifier):
    dropout = classifier.config.dropout.model_copy(
        update={"hidden": RoleDropout(rate=0.5), "strict": False}
    )
    config = classifier.config.model_copy(update={"dropout": dropout})
    with pytest.raises(ConfigError, match=r"dropout\.hidden: 0\.1 -> 0\.5: settled") as caught:
        evaluate(classifier.run, config)
    assert len(caught.value.problems) == 1


def test_more_neighbours_than_rows_are_refused_before_anything_runs(classifier):
    said = []
    with pytest.raises(DataError, match="neighbour 31, but there are 30 training rows"):
        evaluate(classifier.run, changed(classifier.config, knn_neighbours=31), said.append)
    assert said == []


def test_one_row_of_one_class_is_enough_to_validate_and_test(classifier):
    data = classifier.config.data.model_copy(
        update={"validation_split": "validation[:1]", "test_split": "test[:1]", "ood": {}}
    )
    report = evaluate(classifier.run, classifier.config.model_copy(update={"data": data}))
    assert report["num_samples"]["validation"] == report["num_samples"]["test"] == 1
    assert report["ood"] == {}
    assert set(report["uncertainty"]["error_auroc"].values()) == {None}
    assert "nothing can be said" in " ".join(report["verdict"])
