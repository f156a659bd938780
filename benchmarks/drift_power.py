"""Power on windows of queries of which a few are out of scope, at 1 % false alarms.

Run: python benchmarks/drift_power.py RUN, an evaluated run of configs/language/intents.yaml on
CLINC150; minutes. Half of the test rows are the reference. Windows of n rows are
drawn from the other half, of which a share is replaced by out-of-scope queries. Every statistic
gets the threshold that 1 % of 1,000 windows without such queries exceed.

The e-detector looks at ten windows, one a run; with an average run length of 1,000 runs, at most
1 % of ten windows alarm without change. "any column" is the verdict over all columns: tests `ks`
and `tails`, Benjamini-Hochberg at 1 %, effects that count.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer

from monitoring.bounds import SCORES
from monitoring.drift.binning import binned
from monitoring.drift.embeddings import gaussian_kernel, median_distance
from monitoring.drift.result import ColumnDrift, DriftSettings
from monitoring.drift.statistics import TESTS
from monitoring.drift.verdict import adjust
from monitoring.sequential import EDetector

SIZES, SHARES = (100, 200, 500, 1000), (0.0, 0.02, 0.05, 0.10)
NUM_STILL, NUM_MOVED, NUM_VERDICTS, NUM_DETECTORS, NUM_RUNS = 1000, 300, 100, 300, 10
COLUMN = "energy"
Windows = Callable[[int, float, int], list[np.ndarray]]


def generator(*place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((11, *place))))


def window_maker(inside: np.ndarray, outside: np.ndarray) -> Windows:
    """Row numbers of windows with a share of rows from outside."""

    def make(size: int, share: float, count: int) -> list[np.ndarray]:
        random, strange = generator(size, round(100 * share)), round(size * share)
        return [
            np.concatenate(
                [
                    random.choice(inside, size - strange, replace=False),
                    random.choice(outside, strange, replace=False),
                ]
            )
            for _ in range(count)
        ]

    return make


def power(statistic: Callable[[np.ndarray], float], windows: Windows) -> list[list[float]]:
    """Share of windows above the threshold, [size][share]; without strange rows 1 % by choice."""
    found = []
    for size in SIZES:
        still = [statistic(rows) for rows in windows(size, 0.0, NUM_STILL)]
        threshold = np.quantile(still, 0.99)
        moved = [[statistic(w) for w in windows(size, s, NUM_MOVED)] for s in SHARES[1:]]
        found.append([float(np.mean(np.array(one) > threshold)) for one in [still, *moved]])
    return found


def column_statistic(test: str, values: np.ndarray, reference: np.ndarray):
    """The statistic of one test of one column."""
    each = TESTS[test]

    def statistic(rows: np.ndarray) -> float:
        pair = values[reference], values[rows]
        return each.run(*(binned(*pair) if each.on_counts else pair)).statistic

    return statistic


def mmd_statistic(embeddings: np.ndarray, reference: np.ndarray):
    """MMD^2 without what does not depend on the window, from one kernel matrix of all rows."""
    kernel = gaussian_kernel(embeddings, median_distance(embeddings[reference]))
    to_reference = kernel[:, reference].mean(axis=1, dtype=np.float64)

    def statistic(rows: np.ndarray) -> float:
        inside = kernel[np.ix_(rows, rows)].sum(dtype=np.float64) / (len(rows) * (len(rows) - 1))
        return inside - 2 * float(to_reference[rows].mean())

    return statistic


def verdicts(columns: dict[str, np.ndarray], reference: np.ndarray, windows: Windows):
    """Share of windows in which any column drifted, by the product's own thresholds."""
    settings = DriftSettings()

    def judged(name: str, values: np.ndarray, rows: np.ndarray) -> ColumnDrift:
        found = {t: TESTS[t].run(values[reference], values[rows]) for t in settings.numeric_tests}
        first = min(found, key=lambda test: found[test].p_value)
        p_value = min(1.0, len(found) * found[first].p_value)
        effect, least = found[first].effect, TESTS[first].min_effect
        return ColumnDrift(
            name, "numeric", len(rows), p_value=p_value, effect=effect, min_effect=least
        )

    def drifted(rows: np.ndarray) -> bool:
        found = [judged(name, values, rows) for name, values in columns.items()]
        return any(one.drifted for one in adjust(found, settings))

    return [
        [float(np.mean([drifted(w) for w in windows(size, s, NUM_VERDICTS)])) for s in SHARES]
        for size in SIZES
    ]


def detectors(kind: str, values: np.ndarray, reference: np.ndarray, windows: Windows):
    """Share of detectors that alarm within ten runs."""
    score = SCORES[kind](values[reference])
    start = EDetector.start(
        mean_lower=score.lower, mean_upper=score.upper, spread=score.spread, average_run_length=1000
    )

    def alarms(stream: list[np.ndarray]) -> bool:
        state = start
        for rows in stream:
            state = state.update(score.of(values[rows]))
            if state.alarm:
                return True
        return False

    found = []
    for size in SIZES:
        streams = [windows(size, share, NUM_RUNS * NUM_DETECTORS) for share in SHARES]
        found.append(
            [
                float(np.mean([alarms(s[i::NUM_DETECTORS]) for i in range(NUM_DETECTORS)]))
                for s in streams
            ]
        )
    return found


@torch.no_grad()
def embed(run: Path, texts: list[str]) -> np.ndarray:
    """First-token features of the run's model, [N, D]."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModel.from_pretrained(run / "model").eval()
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
        found.append(model(**batch).last_hidden_state[:, 0].numpy())
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?")
    run = parser.parse_args().run
    if run is None:
        print("Name an evaluated run of configs/language/intents.yaml to measure the power on.")
        return
    table = pq.read_table(run / "evaluation" / "samples.parquet")
    is_outside = np.array([split.startswith("ood:") for split in table["split"].to_pylist()])
    order = generator(0).permutation(np.flatnonzero(~is_outside))
    reference, pool = np.sort(order[: len(order) // 2]), order[len(order) // 2 :]
    windows = window_maker(pool, np.flatnonzero(is_outside))
    texts = table["text"].to_pylist()
    scores = {
        field.name: table[field.name].to_numpy()
        for field in table.schema
        if str(field.type) == "double" and "disagreement" not in field.name
    }
    values = scores[COLUMN]

    print("| statistic | out of scope | " + " | ".join(f"n = {n}" for n in SIZES) + " |")
    print("|---|---|" + "---|" * len(SIZES))

    def show(name: str, found: list[list[float]]) -> None:
        for share, sizes in zip(SHARES, zip(*found, strict=True), strict=True):
            cells = [name, f"{100 * share:.0f} %", *(f"{100 * one:.1f} %" for one in sizes)]
            print("| " + " | ".join(cells) + " |", flush=True)

    for test in ("ks", "tails", "chi2", "wasserstein"):
        show(f"{test} of {COLUMN}", power(column_statistic(test, values, reference), windows))
    show("MMD of embeddings", power(mmd_statistic(embed(run, texts), reference), windows))
    show("any column, nominal", verdicts(scores, reference, windows))
    for kind, column in (("tail", COLUMN), ("rank", COLUMN), ("value", "msp")):
        found = detectors(kind, scores[column], reference, windows)
        show(f"e-detector, {kind} of {column}, ten windows", found)


if __name__ == "__main__":
    main()
