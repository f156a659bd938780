"""Errors a user can act on. Each message says what was asked, what was found and what to do.

MasklockError
├── InputError              exit 2: nothing was written
│   ├── ConfigError         the YAML or an override (all problems at once)
│   ├── DataError           rows, columns, labels
│   ├── ModelError          model, tokenizer, adapter
│   ├── DropoutError        a rate or a site that cannot be in force
│   ├── RunFolderError      the run folder holds something else
│   └── RegistryError       the registry has no such version, or one that was changed
├── BusyError               exit 75: another process is at work; try again later
├── LayoutError             exit 2: processes or engine are not the ones asked for
├── LeakError               exit 1: randomness was drawn outside the plan
├── NonFiniteLossError      exit 1: stopped before the update
├── CheckpointError         exit 1: a checkpoint could not be written
├── HistoryError            exit 1: the history of monitoring cannot be read or written
└── TrackingError           exit 1: Weights & Biases did not take what it was to keep
"""


class MasklockError(Exception):
    """Base of every error that the command line shows without a traceback."""

    exit_code = 1


class InputError(MasklockError):
    """What the user gave cannot be used; nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """One or more problems of a configuration, all listed, each with its place.

    Args:
        problems: one full sentence each, beginning with the dotted place (`train.max_steps: ...`).
        source: the file, or what else the configuration came from.
    """

    def __init__(self, problems: list[str], source: str = "configuration") -> None:
        self.problems = list(problems)
        self.source = source
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{source}: {count}\n{lines}")


class DataError(InputError):
    """Rows, columns or labels are not what the configuration says."""


class ModelError(InputError):
    """The model, its tokenizer or its adapter cannot be loaded or used as asked."""


class DropoutError(InputError):
    """A dropout rate that no site would obey, or a site that cannot be keyed."""


class RunFolderError(InputError):
    """The run folder is missing something, or belongs to another configuration."""


class RegistryError(InputError):
    """The registry of models lacks what was asked for, or holds files that were changed."""


class BusyError(MasklockError):
    """Another process holds the lock; nothing was changed."""

    exit_code = 75


class LayoutError(MasklockError):
    """World size or engine asked for are not the ones running."""

    exit_code = 2


class LeakError(MasklockError):
    """A forward pass drew randomness that no planned site accounts for."""


class NonFiniteLossError(MasklockError):
    """The loss became NaN or infinite; the update was not applied."""


class CheckpointError(MasklockError):
    """A checkpoint could not be written; the one before it is intact."""


class HistoryError(MasklockError):
    """The history of monitoring is damaged, or could not take a window; it holds what it held."""


class TrackingError(MasklockError):
    """Weights & Biases was asked for something that only it can do, and did not do it."""
