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

UNCERTAINTIES = ("predictive_entropy", "expected_entropy", "mutual_information", "disagreement")
OOD_SCORES = (
    *("msp", "max_logit", "energy", "entropy", "surprise", "token_entropy", "mahalanobis", "knn"),
    *("mc_msp", "mc_predictive_entropy", "mc_expected_entropy", "mc_mutual_information"),
    *("mc_disagreement", "mc_surprise"),
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
MONITORING = {
    WINDOW: "the number of the window",
    "monitor/num_alerts": "alerts that this window raised",
    "drift/num_rows": "rows of the window",
    "drift/num_labelled": "rows of the window that have a label",
    "drift/num_drifted_columns": "columns that left the reference",
    "drift/performance/*": "quality with labels, and its estimate without",
    "drift/*/*": "of a column: mean, test statistics, p-values, effect size",
    "uncertainty/*": "mean of a measure over the rows of the window",
    "ood/*_mean": "mean of a score over the rows of the window",
}
CURVES = {
    "calibration/reliability": "accuracy by confidence, each way of predicting",
    "uncertainty/*_histogram": "a measure for right and wrong answers",
    "ood/best_score_histogram": "the best score for the test rows and each set of other rows",
    "drift/*_histogram": "a column of a window beside the reference",
}
PICTURES = {"figures/*": "the charts of the report"}
TABLES = {
    "uncertainty/most_uncertain": "the test rows whose answers deserve the least trust",
    "monitor/alerts": "the alerts of a window",
}


def is_listed(key: str, *lists: dict[str, str]) -> bool:
    """Whether one of the lists names this key, literally or by a pattern."""
    return any(fnmatchcase(key, pattern) for names in lists for pattern in names)
