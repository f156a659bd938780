"""Ticks that are killed at seeded points, each in a process of its own; prints what came of them.

Run by `test_retrain_kills.py` without the libraries of the tests, so that a fork costs little, and
with pandas, which pyarrow would import in every fork.
"""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pandas  # noqa: F401
from retraining_doubles import World, be_quick

from launch.retrain.store import Store
from launch.retrain.tick import tick
from pipeline.errors import MasklockError

KILLED = 137


class Drill:
    def __init__(self, folder: Path, seed: int) -> None:
        be_quick()
        self.draw = random.Random(seed)
        self.world = World(folder, num_frozen=30)
        self.world.make_champion(0.5)
        self.world.policy["gate"]["metrics"]["accuracy"]["margin"] = 0.3
        self.plan = self.world.plan()
        self.plan.folder.mkdir(parents=True)
        self.triggers = 0
        self.faults: list[str] = []
        self.killed_at: Counter[str] = Counter()

    def run(self, num_ticks: int) -> dict:
        for _ in range(num_ticks):
            self.move_the_world()
            self.tick()
            self.look_at_the_registry()
        while self.last() is not None and self.last().is_open:
            self.tick(deadly=0.0)
        self.look_at_the_registry(newest=10_000)
        return self.summary()

    def move_the_world(self) -> None:
        """A new trigger, or windows after a promotion, when the line has nothing else to do."""
        last, world = self.last(), self.world
        if last is not None and last.is_open:
            return
        world.wait(hours=2)
        if last is not None and "watch" in last.facts:
            if len(world.windows(Path(last.facts["run"]))) == 0:
                severities = self.draw.choice([("critical", "critical"), (None, None, None)])
                for severity in severities:
                    world.add_window(Path(last.facts["run"]), severity)
        elif last is None or self.triggers == last.number:
            world.next_model_is(self.draw.choice([0.1, 0.5, 0.6, 0.9]))
            self.triggers += 1
            for _ in range(3):
                world.add_window(world.champion_run(), "warning")

    def tick(self, deadly: float = 0.25) -> None:
        seed = self.draw.random()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            self.live_and_die(random.Random(seed), deadly, write)
        os.close(write)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as said:
            point = said.read()
        code = os.waitstatus_to_exitcode(status)
        if code == KILLED:
            self.killed_at[point] += 1
        elif code not in (0, 75):
            self.faults.append(f"a tick ended with {code}: {point}")

    def live_and_die(self, draw: random.Random, deadly: float, write: int) -> None:
        def reach(point: str) -> None:
            if draw.random() < deadly:
                os.write(write, point.encode())
                os._exit(KILLED)

        def stage(words, log) -> int:
            reach(f"before {words[0]}")
            code = self.world.run(words, log)
            reach(f"after {words[0]}")
            return code

        try:
            code = tick(self.plan, now=self.world.now, starter=lambda lock: stage, reach=reach)
        except MasklockError as error:
            os.write(write, str(error).encode())
            code = error.exit_code
        os._exit(code)

    def last(self):
        store = Store(self.plan.folder / "state.sqlite", self.world.now)
        try:
            return (store.retrainings() or [None])[-1]
        finally:
            store.close()

    def look_at_the_registry(self, newest: int = 2) -> None:
        """What anybody may see at any time, right after a kill too."""
        registry = self.world.registry
        aliases = registry.aliases()
        for version in registry.versions()[-newest:]:
            registry.verify(version)
        numbers = [change["number"] for change in registry.journal()]
        if numbers != list(range(1, len(numbers) + 1)):
            self.faults.append(f"the journal has the changes {numbers}")
        if aliases.number - len(numbers) not in (0, 1):
            self.faults.append(f"{aliases.number} changes, {len(numbers)} in the journal")
        registry.get("champion")

    def summary(self) -> dict:
        store = Store(self.plan.folder / "state.sqlite", self.world.now)
        ends = store.retrainings()
        store.close()
        words = [line.split() for line in self.world.stages()]
        trained = {config for name, config in (line[:2] for line in words) if name == "train"}
        kept = [version.origin.get("retraining") for version in self.world.registry.versions()]
        return {
            "faults": self.faults,
            "triggers": self.triggers,
            "retrainings": len(ends),
            "states": Counter(one.state for one in ends),
            "trained": len(trained),
            "twice": [key for key, count in Counter(kept).items() if key and count > 1],
            "killed_at": self.killed_at,
            "champion": self.world.registry.aliases().champion,
            "expected": next(
                (one.facts["version"] for one in reversed(ends) if one.state == "promoted"), None
            ),
        }


if __name__ == "__main__":
    drill = Drill(Path(sys.argv[1]), seed=int(sys.argv[3]))
    print(json.dumps(drill.run(int(sys.argv[2]))))  # noqa: T201
