"""The loop: train, evaluate, quiet windows, drift, alert, replay, retrain, gate, promote, rollback.

Tests go on from each other.
"""

import contextlib
import io
import json
import random
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch.retrain.load import load_plan
from launch.retrain.tick import tick
from pipeline import __main__ as command_line

WORDS = {
    "weather": "rain snow wind sunny cloudy storm degrees umbrella forecast cold",
    "music": "song album guitar concert melody singer loud playlist band dance",
    "food": "recipe bread cheese dinner hungry spicy kitchen oven salad lunch",
}
STRANGE = "zyx qwv kjh 77 ## jklm vbnx pqrs wqwq zzzz yxyx mkmk"
COMMON = "please tell me about the some my what is a and"
CONFIG = """
name: small
output_dir: {folder}/runs
model:
  task: text-classification
  model_type: bert
  config_overrides: {{hidden_size: 32, num_attention_heads: 4, num_hidden_layers: 2,
                      intermediate_size: 48, max_position_embeddings: 40}}
  tokenizer_vocab_size: 400
data:
  path: json
  data_files: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl,
               test: {folder}/test.jsonl}}
  max_length: 24
  ood: {{strange: {{path: json, data_files: {folder}/strange.jsonl}}}}
dropout: {{hidden: 0.1, head: 0.1}}
train: {{global_batch_size: 32, max_steps: 60, learning_rate: 0.003, use_cpu: true,
        disable_tqdm: true}}
evaluation: {{num_mc_passes: 6, num_bootstrap_resamples: 50, max_fit_samples: 200}}
monitoring: {{drift: {{num_permutations: 100}}}}
wandb: {{mode: disabled}}
"""


class Loop:
    """A folder of data, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "runs" / "small"
        self.config = folder / "small.yaml"
        self.config.write_text(CONFIG.format(folder=folder))

    def masklock(self, *arguments) -> tuple[int, str]:
        """Exit code, and what stdout was told."""
        before, sys.argv = sys.argv, ["masklock", *map(str, arguments)]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
                command_line.main()
        finally:
            sys.argv = before
        return ended.value.code or 0, said.getvalue()

    def write(self, name: str, num_rows: int, seed: int, share=0.0, labelled=True) -> Path:
        """Rows of the three kinds of text; a share of them of a kind never seen."""
        path, draw = self.folder / f"{name}.jsonl", random.Random(seed)
        rows = []
        for number in range(num_rows):
            label = draw.choice(sorted(WORDS))
            words = STRANGE if draw.random() < share else f"{WORDS[label]} {WORDS[label]} {COMMON}"
            row = {"text": " ".join(draw.choices(words.split(), k=draw.randint(6, 12)))}
            row |= {"label": label} if labelled else {}
            rows.append(row | {"clicks": draw.randint(0, 9), "sample_id": 1000 * seed + number})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def alerts(self) -> list[dict]:
        return json.loads(self.masklock("alerts", self.run, "list", "--json")[1])


@pytest.fixture(scope="module")
def loop(tmp_path_factory) -> Loop:
    """A run that was trained and evaluated."""
    loop = Loop(tmp_path_factory.mktemp("loop"))
    for name, num_rows, seed, share in (
        ("train", 400, 1, 0), ("validation", 60, 2, 0), ("test", 300, 3, 0), ("strange", 60, 4, 1),
    ):  # fmt: skip
        loop.write(name, num_rows, seed, share)
    assert loop.masklock("train", loop.config)[0] == 0
    assert loop.masklock("evaluate", loop.run)[0] == 0
    return loop


def test_windows_like_the_training_are_quiet(loop):
    for seed in (10, 11, 12):
        window = loop.write(f"quiet-{seed}", 80, seed, labelled=False)
        code, said = loop.masklock("monitor", loop.run, "--window", window)
        assert (code, said) == (0, f"Window {seed - 9}: 80 rows, quiet\n")
    assert loop.alerts() == []


def test_a_window_seen_before_is_known_without_scoring_it_again(loop):
    code, said = loop.masklock("monitor", loop.run, "--window", loop.folder / "quiet-10.jsonl")
    assert code == 0
    assert said.startswith("Window 1: 80 rows, quiet, judged before, at ")


def test_scored_rows_are_judged_like_raw_ones(loop):
    scored, raw = loop.folder / "scored.parquet", loop.write("quiet-13", 80, 13)
    assert loop.masklock("score", loop.run, "--input", raw, "--output", scored)[0] == 0
    code, said = loop.masklock("monitor", loop.run, "--window", scored, "--json")
    assert code == 0
    assert json.loads(said)["window"]["measures"]["drift/performance/accuracy"] > 0.9


def test_drift_raises_alerts_that_are_listed_and_acknowledged(loop):
    window = loop.write("drift", 80, 20, share=0.6, labelled=False)
    code, said = loop.masklock("monitor", loop.run, "--window", window)
    assert code == 3
    assert "out_of_distribution" in said
    listed = loop.alerts()
    assert {alert["state"] for alert in listed} == {"open"}
    assert {one["deliveries"]["json_lines"]["state"] for one in listed} == {"sent"}
    first = listed[0]["id"]
    assert loop.masklock("alerts", loop.run, "ack", first[:8], "--by", "ann")[0] == 0
    assert next(one for one in loop.alerts() if one["id"] == first)["acknowledged"]["by"] == "ann"
    assert json.loads(Path(listed[0]["file"]).read_text())["state"] == "acknowledged"


def test_every_alert_replays_to_the_same_bits(loop):
    for alert in loop.alerts():
        code, said = loop.masklock("replay", alert["file"], "--json")
        found = json.loads(said)
        assert (code, found["equal"], found["differences"]) == (0, True, [])
        assert found["num_scores"] > 100


def test_a_replay_of_a_changed_alert_says_what_differs(loop, tmp_path):
    file = Path(loop.alerts()[0]["file"])
    whole = file.read_text()
    alert = json.loads(whole)
    alert["replay"]["scores"]["energy"][0] += 1e-12
    alert["replay"]["masks_digest"] = "0" * 64
    sample = alert["rows"][0]["sample_id"]
    try:
        file.write_text(json.dumps(alert))
        code, said = loop.masklock("replay", file)
    finally:
        file.write_text(whole)
    assert code == 1
    assert "masks_digest was 000" in said
    assert f"energy of sample {sample} was " in said
    assert said.startswith("2 differences:")


def test_bad_input_ends_with_2_and_leaves_no_window(loop, capsys):
    odd = loop.folder / "odd.jsonl"
    odd.write_text('{"words": "rain"}\n')
    num_windows = len(list((loop.run / "monitoring" / "windows").iterdir()))
    for arguments in (
        ("monitor", loop.run, "--window", odd),
        ("monitor", loop.run, "--window", loop.folder / "absent.parquet"),
        (
            "monitor",
            loop.run,
            "--window",
            loop.folder / "scored.parquet",
            loop.folder / "drift.jsonl",
        ),
        ("monitor", loop.run, "--watch", loop.folder, "--every", "soon"),
        ("monitor", loop.run),
        ("alerts", loop.run, "ack"),
        ("replay", odd),
    ):
        assert loop.masklock(*arguments)[0] == 2, arguments
        assert "Traceback" not in capsys.readouterr().err
    assert len(list((loop.run / "monitoring" / "windows").iterdir())) == num_windows


def test_copies_of_windows_hold_what_a_replay_needs(loop):
    [kept] = (loop.run / "monitoring" / "windows").iterdir()
    assert {"text", "sample_id"} <= set(pq.read_schema(kept).names)


# -- and retrain, gate, promote, bad windows, rollback --------------------------------------------

POLICY = """
name: small
recipe: {folder}/small.yaml
registry: {folder}/registry
work_dir: {folder}/retrain
triggers: {{drift: {{at_least: 2, of_windows: 3}}}}
data: {{new: ["{folder}/labels-*.jsonl"]}}
gate:
  metrics: {{accuracy: {{margin: 0.1}}, nll: {{margin: 0.3}}, ood/strange/energy: {{margin: 0.3}}}}
  slices: {{margin: 0.3}}
  retention: {{rainy: {{files: ["{folder}/rainy.jsonl"], margin: 0.2}}}}
watch: {{at_least: 2, of_windows: 3, severity: warning}}
limits: {{cooldown: 0m}}
"""


class Registered(Loop):
    """The same folder, with a policy; stages run in this process, which has imported all of it."""

    def __init__(self, loop: Loop) -> None:
        self.folder, self.run, self.config = loop.folder, loop.run, loop.config
        self.policy = loop.folder / "policy.yaml"
        self.policy.write_text(POLICY.format(folder=loop.folder))

    def tick(self) -> int:
        return tick(load_plan(self.policy), starter=lambda lock: self.stage)

    def stage(self, words, log) -> int:
        return self.masklock(*words)[0]

    def registry(self, *words) -> str:
        code, said = self.masklock("registry", *words, "--registry", self.folder / "registry")
        assert code == 0
        return said

    def champion(self) -> dict:
        return json.loads(self.registry("show", "champion", "--verify"))


@pytest.fixture(scope="module")
def registered(loop) -> Registered:
    line = Registered(loop)
    line.registry("promote", line.registry("register", loop.run).strip())
    line.write("rainy", 40, 40)
    return line


def test_one_window_with_an_alert_retrains_nothing(registered):
    assert registered.tick() == 0
    assert registered.champion()["name"].startswith("v0001")
    said = registered.masklock("retrain", registered.policy, "--explain")[1]
    assert "drift       quiet: 1 of the last 3 windows raised an alert" in said


def test_drift_retrains_on_new_labels_and_promotes_what_passes_the_gate(registered):
    registered.write("labels-1", 120, 30, share=0.3)
    window = registered.write("drift-2", 80, 21, share=0.6, labelled=False)
    assert registered.masklock("monitor", registered.run, "--window", window)[0] == 3
    assert registered.tick() == 0
    champion = registered.champion()
    assert champion["name"].startswith("v0002"), registered.masklock(
        "retrain", registered.policy, "--explain"
    )
    assert {"profile/profile.json", "evaluation/samples.parquet"} <= champion["files"].keys()


def test_the_gate_has_judged_both_on_the_same_rows_and_masks(registered):
    [file] = (registered.folder / "retrain" / "small").glob("*/comparison.json")
    judged = json.loads(file.read_text())
    assert (judged["num_rows"], judged["num_unpaired"], judged["same_masks"]) == (300, 0, True)
    names = {one["metric"] for one in judged["metrics"]}
    assert {"accuracy", "nll", "ece", "ood/strange/energy", "retention/rainy/accuracy"} <= names
    assert judged["missing"] == {}


def test_the_two_are_compared_by_hand_as_the_gate_did(registered):
    [bench] = (registered.folder / "retrain" / "small").glob("*/champion")
    run = registered.champion()["origin"]["run"]
    code, said = registered.masklock("compare", bench, run, "--json")
    found = json.loads(said)
    assert (code, found["same_masks"], found["num_unpaired"]) == (0, True, 0)
    assert "nll " in registered.masklock("compare", bench, run)[1]


def test_bad_windows_after_the_promotion_roll_it_back(registered):
    run = registered.registry("show", "--run").strip()
    for seed in (50, 51):
        window = registered.write(f"bad-{seed}", 80, seed, share=0.9, labelled=False)
        registered.masklock("monitor", run, "--window", window)
    assert registered.tick() == 0
    assert registered.champion()["name"].startswith("v0001")
    assert "rollback" in registered.registry("journal")
    said = registered.masklock("retrain", registered.policy, "--explain")[1]
    assert "rolled back" in said
