"""Titles, plain explanations and rounding: how the report says things."""

from typing import Any

from monitoring.run import is_number

NOTHING = "–"

WAYS = {
    "deterministic": "Deterministic",
    "mc": "Monte-Carlo",
    "mc_temperature": "Monte-Carlo + temperature",
}

_TITLES = {
    "msp": "Max probability (MSP)",
    "max_logit": "Max logit",
    "energy": "Energy",
    "entropy": "Entropy",
    "mahalanobis": "Mahalanobis distance",
    "knn": "k-nearest neighbours",
    "surprise": "Surprise",
    "token_entropy": "Token entropy",
    "predictive_entropy": "Predictive entropy",
    "expected_entropy": "Expected entropy",
    "mutual_information": "Mutual information",
    "disagreement": "Disagreement",
    "confidence": "Confidence",
    "generated_log_probability": "Log-probability a token",
    "generated_mutual_information": "Mutual information",
    "generated_predictive_entropy": "Predictive entropy",
    "weighted_semantic_entropy": "Semantic entropy, weighted",
    "generated_chrf": "chrF",
    "generated_token_f1": "Token F1",
    "chrf": "chrF",
    "token_f1": "Token F1",
    "ece": "ECE",
    "ece_equal_mass": "ECE, equal mass",
    "f1": "F1",
    "top_5_accuracy": "Top-5 accuracy",
    "image-classification": "Image classification",
    "nll": "NLL",
    "mc_msp": "MC max probability",
    "memory_mb": "Memory (MB)",
    "grad_norm": "Gradient norm",
    "text-classification": "Text classification",
    "text-generation": "Text generation",
    "multimodal-classification": "Multimodal classification",
    "image-text-to-text": "Images and text to text",
}
_MC_MEASURES = ("predictive_entropy", "expected_entropy", "mutual_information", "disagreement")
_SHARES = ("accuracy", "top_5_accuracy", "f1", "confidence", "disagreement", "fpr95")

EXPLANATIONS = {
    "accuracy": "Share of rows whose most likely label is the right one.",
    "top_5_accuracy": "Share of rows whose right label is among the five most likely.",
    "f1": "Mean over labels of the balance between precision and recall.",
    "loss": "Mean negative log-probability of the right answer; lower is better.",
    "perplexity": "How many tokens the model hesitates between, on average; lower is better.",
    "ece": "Expected calibration error: mean gap between confidence and accuracy, over bins of "
    "equal width.",
    "ece_equal_mass": "The same gap over bins that hold equally many rows.",
    "brier": "Mean squared distance between the predicted probabilities and the truth.",
    "nll": "Mean negative log-probability of the right answer.",
    "predictive_entropy": "Total uncertainty: entropy of the mean prediction.",
    "expected_entropy": "The part that comes from the data: mean entropy of single passes.",
    "mutual_information": "The part that comes from the model: how much the passes differ.",
    "disagreement": "Share of passes that vote against the majority.",
    "confidence": "Probability of the predicted label.",
}


def title_of(name: str) -> str:
    """A score's or measure's name for people; `mc_` says that it needs Monte-Carlo passes."""
    if name in _TITLES:
        return _TITLES[name]
    if name.startswith("mc_"):
        title = title_of(name.removeprefix("mc_"))
        return f"MC {title[0].lower()}{title[1:]}" if title[1:2].islower() else f"MC {title}"
    return sentence_title(name)


def sentence_title(name: str) -> str:
    """`samples_per_second` as `Samples per second`."""
    if name in _TITLES:
        return _TITLES[name]
    text = name.replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def needs_mc(score: str) -> bool:
    """Whether an OOD score needs Monte-Carlo passes, by its name."""
    return score.startswith("mc_") or score in _MC_MEASURES


def percent(value: Any, digits: int = 1) -> str:
    """0.8403 as `84.0 %`."""
    return f"{100 * value:.{digits}f} %" if is_number(value) else NOTHING


def decimal(value: Any, digits: int = 3) -> str:
    """0.84031 as `0.840`."""
    return f"{value:.{digits}f}" if is_number(value) else NOTHING


def quantity(value: Any) -> str:
    """About three digits, with thousands separated: `3,712`, `58.1`, `0.0412`, `4e-05`."""
    if not is_number(value):
        return NOTHING
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{value:.3g}"


def duration(seconds: Any) -> str:
    """`41 s`, `3 min 20 s`, `2 h 5 min`."""
    if not is_number(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def interval(pair: Any, name: str = "") -> str:
    """`0.790 – 0.880`, in the form of the measure; empty where there is none."""
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(is_number, pair)):
        return ""
    return f"{measure(pair[0], name)} – {measure(pair[1], name)}"


def measure(value: Any, name: str) -> str:
    """A value in the usual form of its measure: shares in percent, perplexity to one digit."""
    if name in _SHARES:
        return percent(value)
    return decimal(value, 1 if name == "perplexity" else 3)
