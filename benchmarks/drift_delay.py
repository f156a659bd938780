"""False alarms and delays on a bounded score that moves, beside river's detectors.

Run: python benchmarks/drift_delay.py [--processes 2]; minutes. The score has a Beta(1, 8)
distribution of mean 0.111 and moves to Beta(1.2, 8), Beta(1.5, 8) or Beta(2, 8), of mean 0.130,
0.158 or 0.200. Every point is a run of its own.

False alarms: streams of 10,000 points without change that alarm. Delay: mean number of points from
the change, which comes after 2,000, to the alarm; streams that alarm before are left out. river's
settings are its defaults, and others that come near 5 % false alarms here.
"""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from river import drift

from monitoring.bounds import upper_mean_bound
from monitoring.sequential import EDetector

NUM_STREAMS, NUM_POINTS, NUM_BEFORE, NUM_AFTER = 2000, 10_000, 2000, 8000
RUN_LENGTH = 200_000  # 10,000 / 200,000: a false alarm in at most 5 % of the streams
MEAN, SPREAD = 1 / 9, (8 / 810) ** 0.5
SHAPES = {"0.130": 1.2, "0.158": 1.5, "0.200": 2.0}
# name: detector, streams; KSWIN takes 150 us a point, and remembers only 100
PEERS: dict[str, tuple[Callable[[], object], int]] = {
    "ADWIN": (lambda: drift.ADWIN(), 500),
    "ADWIN, delta 0.4": (lambda: drift.ADWIN(delta=0.4), 500),
    "PageHinkley": (lambda: drift.PageHinkley(), 500),
    "PageHinkley, threshold 9": (lambda: drift.PageHinkley(threshold=9, mode="up"), 500),
    "PageHinkley, delta 0.02, threshold 4.2": (
        lambda: drift.PageHinkley(delta=0.02, threshold=4.2, mode="up"),
        500,
    ),
    "KSWIN": (lambda: drift.KSWIN(seed=1), 20),
    "KSWIN, alpha 1e-5": (lambda: drift.KSWIN(alpha=1e-5, seed=1), 20),
}


@dataclass(frozen=True)
class Row:
    """What a line of the table says; alarms [streams], 0 where there was none."""

    name: str
    false_alarms: np.ndarray
    delays: list[np.ndarray]

    def text(self) -> str:
        delays = [f"{found.mean():.0f}" if len(found) else "-" for found in self.delays]
        share = 100 * (self.false_alarms > 0).mean()
        cells = [self.name, str(len(self.false_alarms)), f"{share:.1f} %", *delays]
        return "| " + " | ".join(cells) + " |"


def generator(*place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((7, *place))))


def moved(index: int, num_streams: int, num_before: int) -> np.ndarray:
    """Streams [num_streams, before + after] that change to the shape of this index."""
    random, shape = generator(1, index), list(SHAPES.values())[index]
    before = random.beta(1, 8, (num_streams, num_before))
    return np.concatenate([before, random.beta(shape, 8, (num_streams, NUM_AFTER))], axis=1)


# -- ours ----------------------------------------------------------------------------------------


def first_alarms(streams: np.ndarray, bounds: np.ndarray, bets: np.ndarray) -> np.ndarray:
    """Number of the first point with an alarm, 0 without: the recursion of all streams at once."""
    sums, found = np.zeros_like(bets), np.zeros(len(streams), dtype=np.int64)
    for place in range(streams.shape[1]):
        sums = (sums + 1) * (1 + bets * (streams[:, place] - bounds)[:, None])
        np.minimum(sums, 1e300, out=sums)
        found[(found == 0) & (sums.mean(axis=1) >= RUN_LENGTH)] = place + 1
        if found.all():
            break
    return found


def started(upper: float, spread: float) -> EDetector:
    return EDetector.start(
        mean_lower=0, mean_upper=upper, average_run_length=RUN_LENGTH, spread=spread
    )


def ours(num_reference: int | None) -> Row:
    """With the mean known, or bounded with error 0.01 from so many rows, others each stream."""

    def alarms(streams: np.ndarray, place: int) -> np.ndarray:
        detectors = []
        for number in range(len(streams)):
            if num_reference is None:
                detectors.append(started(MEAN, SPREAD))
            else:
                reference = generator(2, place, number).beta(1, 8, num_reference)
                detectors.append(started(upper_mean_bound(reference), float(reference.std())))
        bounds = np.array([detector.mean_upper for detector in detectors])
        return first_alarms(streams, bounds, np.array([detector.bets for detector in detectors]))

    still = generator(0).beta(1, 8, (NUM_STREAMS, NUM_POINTS))
    delays = []
    for index in range(len(SHAPES)):
        found = alarms(moved(index, 500, NUM_BEFORE), 1 + index)
        found = np.where(found == 0, NUM_BEFORE + NUM_AFTER, found) - NUM_BEFORE
        delays.append(found[found > 0])
    known = "mean known" if num_reference is None else f"mean from {num_reference:,} rows"
    return Row(f"e-detector, {known}", alarms(still, 0), delays)


def check_recursion() -> None:
    """The recursion above is the detector that is used in production."""
    stream = moved(2, 1, 100)[:, :300]
    state, found = started(MEAN, SPREAD), 0
    for place, value in enumerate(stream[0], start=1):
        state = state.update([value])
        found = found or (place if state.alarm else 0)
    assert first_alarms(stream, np.array([MEAN]), np.array([state.bets]))[0] == found > 100


# -- river's -------------------------------------------------------------------------------------


def peers_alarm(name: str, stream: np.ndarray, start: int = 0) -> int:
    """Points after `start` to the first alarm, 0 without one; -1 where one came before."""
    detector = PEERS[name][0]()
    for place, value in enumerate(stream.tolist(), start=1):
        detector.update(value)
        if detector.drift_detected:
            return place - start if place > start else -1
    return 0


def peer(name: str) -> Row:
    num_streams = PEERS[name][1]
    still = generator(0).beta(1, 8, (NUM_STREAMS, NUM_POINTS))[:num_streams]
    num_before = 200 if "KSWIN" in name else NUM_BEFORE
    delays = []
    for index in range(len(SHAPES)):
        streams = moved(index, num_streams, num_before)
        found = np.array([peers_alarm(name, stream, num_before) for stream in streams])
        found = found[found >= 0]
        delays.append(np.where(found == 0, NUM_AFTER, found))
    return Row(name, np.array([peers_alarm(name, stream) for stream in still]), delays)


def rows(num_processes: int) -> Iterator[Row]:
    with ProcessPoolExecutor(num_processes) as pool:
        both = [pool.submit(ours, size) for size in (None, 20_000, 2000)]
        both += [pool.submit(peer, name) for name in PEERS]
        yield from (row.result() for row in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    check_recursion()
    print(f"promise: false alarms in at most {100 * NUM_POINTS / RUN_LENGTH:.1f} % of the streams")
    print("| detector | streams | false alarms | " + " | ".join(f"to {m}" for m in SHAPES) + " |")
    print("|---|---|---|" + "---|" * len(SHAPES))
    for row in rows(parser.parse_args().processes):
        print(row.text(), flush=True)


if __name__ == "__main__":
    main()
