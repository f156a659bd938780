"""Spoken digits 0 to 7 learned, 8 and 9 never heard: accuracy, calibration, and every OOD score.

    python benchmarks/spoken_digits.py FOLDER [KEY=VALUE ...]

FOLDER holds train.parquet and test.parquet of the Free Spoken Digit Dataset, with the columns
audio, digit, speaker and transcript. The model is that of configs/speech/quickstart.yaml.
"""

import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config.load import ROOT, load_config
from pipeline.evaluation.stage import evaluate
from pipeline.records import RunFolder
from pipeline.train import train

NUM_KNOWN = 8
VALIDATION_SHARE = 10
SETTINGS = ("data.augmentation.audio.speed=0.1", "data.validation_split=validation")


def parts_of(folder: Path) -> dict[str, pa.Table]:
    """Rows by split; every tenth training row validates, digits 8 and 9 of the test are strange."""
    training, test = (_table(folder / f"{name}.parquet") for name in ("train", "test"))
    known = training.filter(pc.less(training["digit"], NUM_KNOWN))
    validates = [place % VALIDATION_SHARE == 0 for place in range(len(known))]
    is_known = pc.less(test["digit"], NUM_KNOWN)
    return {
        "train": known.filter(pc.invert(pa.array(validates))),
        "validation": known.filter(pa.array(validates)),
        "test": test.filter(is_known),
        "ood": test.filter(pc.invert(is_known)),
    }


def _table(path: Path) -> pa.Table:
    """The digit's word is the label; the digit itself stays beside it."""
    found = pq.read_table(path).replace_schema_metadata(None)
    return found.append_column("label", found["transcript"])


def main(folder: Path, overrides: list[str]) -> None:
    """Train, evaluate, print."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, table in parts_of(folder).items():
            pq.write_table(table, Path(scratch) / f"{name}.parquet")
        splits = ("train", "validation", "test")
        files = [f"data.data_files.{name}={scratch}/{name}.parquet" for name in splits]
        strange = [
            "data.ood.other_words.path=parquet",
            f"data.ood.other_words.data_files={scratch}/ood.parquet",
            "data.ood.other_words.split=train",
        ]
        own = ["name=spoken-digits", f"output_dir={scratch}", "data.path=parquet"]
        own += ["wandb.mode=disabled", *SETTINGS, *files, *strange, *overrides]
        config = load_config(ROOT / "configs" / "speech" / "quickstart.yaml", own)
        started = time.process_time()
        if train(config) != 0:
            raise SystemExit("the training was stopped")
        trained = time.process_time()
        report = evaluate(RunFolder(Path(scratch) / config.name), config)
        print(f"CPU seconds: {trained - started:.0f} training", end=", ")
        print(f"{time.process_time() - trained:.0f} evaluation")
    show(report)


def show(report: dict) -> None:
    """The figures as a table each."""
    print(f"rows: {report['num_samples']}")
    for way, quality in report["quality"].items():
        lower, upper = report["intervals"][f"{way}/accuracy"]
        print(f"{way:14} accuracy {quality['accuracy']:.3f} ({lower:.3f} to {upper:.3f})")
    for way in ("deterministic", "mc", "mc_temperature"):
        print(f"{way:14} ECE {report['calibration'][way]['ece']:.3f}")
    print(f"temperature {report['calibration']['temperature']:.2f}")
    scores = report["ood"]["other_words"]["scores"]
    for name in sorted(scores, key=lambda score: -scores[score]["auroc"]):
        lower, upper = scores[name]["auroc_interval"]
        print(f"{name:22} AUROC {scores[name]['auroc']:.3f} ({lower:.3f} to {upper:.3f})")
    for sentence in report["verdict"]:
        print(f"- {sentence}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("left out: name the folder of the Free Spoken Digit Dataset")
        raise SystemExit
    main(Path(sys.argv[1]), sys.argv[2:])
