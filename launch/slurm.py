"""Renders a job as an `sbatch` script, and hands it to Slurm.

The script warns the training before the time limit (`--signal=B:USR1@60`): it finishes its step,
saves, and the job is queued again, where it goes on.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from launch.job import JobSpec
from launch.templates import render_template
from pipeline.errors import InputError

_OPTION = re.compile(r"--([a-z][a-z-]*)(?:=([^\s'\"`$\\]+))?")
# Settled by the resources, or by the way the script stops and goes on.
_TAKEN = {"job-name", "nodes", "ntasks-per-node", "ntasks", "cpus-per-task", "gpus-per-node", "mem",
          "time", "signal", "requeue", "no-requeue", "open-mode", "output"}  # fmt: skip


def render(
    job: JobSpec,
    preset_file: str,
    directory: str,
    programs: str,
    options: Sequence[str] = (),
    setup: Sequence[str] = (),
) -> str:
    """The script.

    Args:
        job: what to run.
        preset_file: the accelerate configuration, as a path on the nodes.
        directory: where it runs, on a file system that all nodes see.
        programs: the folder with `accelerate` on the nodes, such as a virtual environment's `bin`.
        options: more `#SBATCH` options, such as `--partition=a100`.
        setup: shell lines before the training, such as `source .venv/bin/activate`.
    """
    if wrong := [f"{option}: {why}" for option in options if (why := _problem(option))]:
        raise InputError("Slurm options:\n  - " + "\n  - ".join(wrong))
    words = job.accelerate_words(preset_file, "$SLURM_PROCID", "$first_node")
    unquoted = {"$SLURM_PROCID", "$first_node"}
    command = "exec"
    for word in words:
        command += " \\\n    " if word.startswith("--") else " "
        command += f'"{word}"' if word in unquoted else shlex.quote(word)
    return render_template(
        "slurm.sbatch.j2",
        job=job,
        directory=directory,
        options=options,
        setup=setup,
        programs=programs,
        command=f"\n  {command}\n",
    )


def submit(script: str) -> str:
    """Test the script where Slurm can, then queue it; the job's number.

    Raises:
        InputError: no Slurm here, or it refuses the script.
    """
    if shutil.which("sbatch") is None:
        raise InputError(
            "There is no sbatch on this machine. Write the script with --dry-run > job.sbatch, and "
            "run `sbatch job.sbatch` where Slurm is installed."
        )
    _sbatch(["--test-only"], script)
    return _sbatch(["--parsable"], script).strip()


def _sbatch(options: list[str], script: str) -> str:
    done = subprocess.run(["sbatch", *options], input=script, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"sbatch {' '.join(options)} refuses the job: {done.stderr.strip()}")
    return done.stdout


def _problem(option: str) -> str:
    found = _OPTION.fullmatch(option)
    if found is None:
        return "write --name or --name=value, without spaces and quotes"
    return "follows from the resources or the way a job stops" if found[1] in _TAKEN else ""
