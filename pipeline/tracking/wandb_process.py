"""The process that talks to Weights & Biases, so that the one that trains never has to wait for it.

Run as a script by `WandbClient`. One JSON request a line on standard input, one reply a line on
standard output. Imports nothing of Masklock.
"""

import json
import os
import signal
from pathlib import Path
from typing import Any, TextIO

_ALERT_LEVELS = {"info": "INFO", "warning": "WARN", "critical": "ERROR"}
_ALERT_TITLE_LENGTH = 63
_ABANDONED_SECONDS = 120


def main() -> None:
    """Answer requests until there are no more; end the run also when the trainer has died."""
    # A terminal's Ctrl-C or a scheduler's SIGTERM is for the trainer, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    requests, replies = _take_standard_streams()
    session = Session()
    for line in requests:
        request = json.loads(line)
        try:
            reply = getattr(session, request.pop("do"))(**request) or {}
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    session.abandon()


def _take_standard_streams() -> tuple[TextIO, TextIO]:
    """Both pipes for us alone: wandb's service must not hold them, nor a print be a reply."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    return requests, replies


class Session:
    """One run of Weights & Biases. Each method is one request."""

    def __init__(self) -> None:
        self._run: Any = None
        self._step: int | None = None

    def start(
        self,
        axis: str,
        namespaces: list[str],
        first_step: int | None,
        finish_seconds: float,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Open the run, or go on with the one of this id; its metrics have this x axis."""
        import wandb

        # A git address may hold a token. The processor load to show is the trainer's.
        # What cannot be sent in time stays in its file whole; a killed process would lose some.
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, save_code=False,
            x_stats_pid=os.getppid(), finish_timeout=finish_seconds,
        )  # fmt: skip
        self._run = wandb.init(settings=settings, **arguments)
        self._step = first_step
        self._run.define_metric(axis, hidden=True)
        for namespace in namespaces:
            self._run.define_metric(f"{namespace}/*", step_metric=axis)
        url = "" if self._run.offline else self._run.url
        return {"folder": str(Path(self._run.dir).parent), "url": url}

    def log(self, row: dict[str, Any]) -> None:
        """Add one row of history."""
        self._log(row)

    def show_picture(self, name: str, row: dict[str, Any], png: str) -> None:
        """Add one picture to the history."""
        import wandb

        self._log({**row, name: wandb.Image(png)})

    def show_curve(
        self, name: str, row: dict[str, Any], title: str, x: str, lines: dict[str, Any]
    ) -> None:
        """Add a chart of lines, with its points as a table `<name>_table`."""
        import wandb

        xs, ys = ([[point[i] for point in line] for line in lines.values()] for i in (0, 1))
        chart = wandb.plot.line_series(xs, ys, keys=list(lines), title=title, xname=x)
        self._log({**row, name: chart})

    def show_table(
        self, name: str, row: dict[str, Any], columns: list[Any], rows: list[list[Any]]
    ) -> None:
        """Add a table."""
        import wandb

        table = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        self._log({**row, name: table})

    def _log(self, row: dict[str, Any]) -> None:
        if self._step is None:
            self._run.log(row)
        else:
            self._run.log(row, step=self._step, commit=True)
            self._step += 1

    def artifact(self, name: str, kind: str, path: str) -> None:
        """Log a version of a file or folder; an unchanged one stays the version it was."""
        import wandb

        artifact = wandb.Artifact(name, type=kind)
        add = artifact.add_dir if Path(path).is_dir() else artifact.add_file
        add(path, skip_cache=True)
        self._run.log_artifact(artifact)

    def alert(self, title: str, text: str, severity: str) -> None:
        """Have W&B tell people; a repeated one is our caller's to hold back, not W&B's."""
        short = title[:_ALERT_TITLE_LENGTH]
        self._run.alert(short, text, _ALERT_LEVELS[severity], wait_duration=0.001)

    def summary(self, values: dict[str, Any]) -> None:
        """Set final numbers."""
        self._run.summary.update(values)

    def save_view(
        self, entity: str | None, project: str, name: str, title: str, specification: Any
    ) -> dict[str, Any]:
        """Save a workspace, over the one of this name if there is one."""
        import wandb
        from wandb_workspaces._graphql import get_app_url
        from wandb_workspaces.workspaces import internal

        api = wandb.Api()
        owner = entity or api.default_entity or ""
        query_name = name.removeprefix("nw-").removesuffix("-v")
        try:
            known = internal.get_view_dict(owner, project, query_name)["id"]
        except ValueError:  # no such view, or no such project: saving tells which
            known = ""
        view = internal.View(
            entity=owner, project=project, display_name=title, name=name, id=known,
            spec=internal.WorkspaceViewspec.model_validate(specification),
        )  # fmt: skip
        internal.upsert_view2(view)
        return {"url": f"{get_app_url(api).rstrip('/')}/{owner}/{project}?nw={query_name}"}

    def finish(self) -> None:
        """Close the run; everything is on the disk, and sent if there was time, at the return."""
        run, self._run = self._run, None
        run.finish()

    def abandon(self) -> None:
        """Close a run whose trainer has died without a word; not for ever."""
        signal.alarm(_ABANDONED_SECONDS)
        if self._run is not None:
            self._run.finish(exit_code=1)


if __name__ == "__main__":
    main()
