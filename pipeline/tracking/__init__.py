"""Where the numbers of a run go: JSON lines (the truth), Weights & Biases, or nowhere.

The only place that reads the environment for Weights & Biases. A tracker other than JSON lines can
fail in any way without changing a training.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.config.schema import RunConfig, WandbConfig
from pipeline.errors import TrackingError
from pipeline.exhibits import Curve, Exhibit, Notice, Picture, Table, View
from pipeline.records import RunFolder
from pipeline.tracking.json_lines import JsonLinesTracker
from pipeline.tracking.tracker import NullTracker, Tracker, TrackerGroup
from pipeline.tracking.wandb_client import WandbClient
from pipeline.tracking.weights_and_biases import MONITORING, WandbTracker

__all__ = [
    "Curve",
    "Exhibit",
    "JsonLinesTracker",
    "Notice",
    "NullTracker",
    "Picture",
    "Table",
    "Tracker",
    "TrackerGroup",
    "View",
    "WandbTracker",
    "open_tracker",
    "open_window_tracker",
    "save_views",
    "wandb_mode",
    "wandb_sink",
]

# Older names that Weights & Biases still documents.
_WANDB_MODES = {"dryrun": "offline", "run": "online"}


def wandb_mode(config: RunConfig) -> str:
    """`offline`, `online` or `disabled`: the environment's `WANDB_MODE`, else the configuration."""
    mode = os.environ.get("WANDB_MODE") or config.wandb.mode
    return _WANDB_MODES.get(mode, mode)


def open_tracker(config: RunConfig, folder: RunFolder, is_main: bool) -> Tracker:
    """JSON lines and, unless disabled, Weights & Biases; nothing but on the main process."""
    if not is_main:
        return NullTracker()
    trackers: list[Tracker] = [JsonLinesTracker(folder.metrics)]
    if (mode := wandb_mode(config)) != "disabled":
        trackers.append(WandbTracker(config.wandb, folder, mode=mode))
    return TrackerGroup(trackers)


def open_window_tracker(config: RunConfig, folder: RunFolder) -> Tracker:
    """Production monitoring: a W&B run of its own, whose steps are windows; none if disabled.

    Its numbers are in the history of monitoring, so there is no file of JSON lines.
    """
    if (mode := wandb_mode(config)) == "disabled":
        return NullTracker()
    return WandbTracker(config.wandb, folder, mode=mode, part=MONITORING)


def wandb_sink(tracker: Tracker) -> Callable[[Mapping[str, Any]], None]:
    """What sends one alert (`Alert.to_json()`: title, severity, text or evidence, runbook) by W&B.

    The callable returns once W&B has taken the alert, and raises ConnectionError with the reason
    where it has not.
    """

    def send(alert: Mapping[str, Any]) -> None:
        tracker.alert(Notice(alert["title"], _alert_text(alert), alert["severity"]))

    return send


def save_views(config: WandbConfig, folder: RunFolder, views: Sequence[View]) -> list[str]:
    """Save workspaces, each in the place of the one that had its name; their addresses.

    Raises:
        TrackingError: W&B did not take one.
    """
    client = WandbClient(folder.wandb)
    where = {"do": "save_view", "entity": config.entity, "project": config.project}
    try:
        messages = [where | asdict(view) for view in views]
        replies = [client.request(message, config.timeout_seconds) for message in messages]
    except Exception as error:
        raise TrackingError(
            f"{len(views)} views were to be saved to the project {config.project!r} of Weights & "
            f"Biases, but: {str(error).rstrip('.')}. It needs the network, a key (`wandb login`), "
            "and a project with a run."
        ) from None
    finally:
        client.kill()
    return [str(reply["url"]) for reply in replies]


def _alert_text(alert: Mapping[str, Any]) -> str:
    """Evidence first, then what to do; names where the replayable alert is."""
    evidence = ", ".join(f"{name} {_short(value)}" for name, value in alert["evidence"].items())
    lines = [evidence, alert.get("runbook", ""), f"Alert {alert['id']} of {alert['run']}."]
    return "\n".join(filter(None, lines))


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {_short(item)}" for name, item in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
