"""The worker with a seed that depends on the rank; started by its name, as the worker is."""

import sys

from pipeline import parallel
from pipeline.verify.worker import main


def rank_dependent_seed(trainer):
    trainer.keyed.seed += parallel.rank()


if __name__ == "__main__":
    sys.exit(main(also=rank_dependent_seed))
