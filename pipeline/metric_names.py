"""The one list of what goes to a tracker: its x axes and names, and what dashboards may show.

A `*` stands for what the user or the task names: a metric, an out-of-distribution set, a score, a
column. A test holds that a run logs nothing that is not listed and everything that is.
"""

from fnmatch import fnmatchcase

STEP = "train/global_step"
"""The x axis of a training and of its evaluation."""
WINDOW = "monitor/window"
"""The x axis of monitoring: the number of the window, from 1."""
NAMESPACES = (
    *("train", "eval", "calibration", "uncertainty", "ood", "drift", "system", "dropout"),
    "monitor",
)

TRAINING = {
    "train/loss": "mean loss since the last row, with this step's masks",
    "train/grad_norm": "norm of the gradients before clipping",
    "train/learning_rate": "of the first parameter group",
    "train/epoch": "steps over the steps of an epoch",
    STEP: "optimizer steps",
    "system/samples_per_second": "over all processes",
    "system/tokens_per_second": "over all processes, padding not counted",
    "system/memory_mb": "peak of the GPU; without one, what the main process holds",
    "dropout/*": "learned rate of a role or a site",
    "eval/*": "metrics of the validation rows while training, of the test rows after it",
}
EVALUATION = {
    "calibration/*": "calibration error, Brier score, likelihood and temperature",
    "uncertainty/*": "mean of a measure over the test rows",
    "ood/*/*_auroc": "how well a score tells a set of other rows from the test rows",
}
CURVES = {
    "calibration/reliability": "accuracy by confidence, each way of predicting",
    "uncertainty/*_histogram": "a measure for right and wrong answers",
    "ood/*/*_histogram": "a score for test rows and rows of a set",
}
PICTURES = {"figures/*": "the charts of the report"}
TABLES = {"uncertainty/most_uncertain": "the test rows whose answers deserve the least trust"}


def is_listed(key: str, *lists: dict[str, str]) -> bool:
    """Whether one of the lists names this key, literally or by a pattern."""
    return any(fnmatchcase(key, pattern) for names in lists for pattern in names)
