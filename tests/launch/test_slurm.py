"""The sbatch script: read by bash and shellcheck, and run against a small stand-in for Slurm."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import slurm
from pipeline.errors import InputError

# sbatch's own long options that the script may use (man sbatch, 24.05).
KNOWN = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time",
         "signal", "requeue", "open-mode", "output", "partition", "account"}  # fmt: skip


@pytest.fixture
def script(job, tmp_path):
    def script(setup=(), options=("--partition=a100",), **resources):
        return slurm.render(
            job(**resources), "zero3.yaml", str(tmp_path), str(tmp_path / "bin"), options, setup
        )

    return script


def directives(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE)
    assert len(found) == text.count("#SBATCH"), "every directive has the one form"
    return dict(found)


def test_the_resources_become_directives_that_sbatch_knows(script):
    found = directives(
        script(nodes=2, gpus_per_node=8, memory_per_node="500G", time_limit="1-00:00:00")
    )
    assert found.keys() <= KNOWN
    assert (found["nodes"], found["gpus-per-node"], found["ntasks-per-node"]) == ("2", "8", "1")
    assert (found["cpus-per-task"], found["mem"], found["time"]) == ("32", "500G", "1-00:00:00")
    assert (found["signal"], found["partition"]) == ("B:USR1@60", "a100")
    assert "requeue" in found


def test_no_directive_comes_after_the_first_command(script):
    lines = script(nodes=2, gpus_per_node=8).splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])


def test_shellcheck_finds_nothing(script, tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(script(nodes=2, gpus_per_node=8))
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("option", ["--nodes=3", "partition=a100", "--comment=$(rm x)", "--signal"])
def test_options_that_cannot_be_are_refused(script, option):
    with pytest.raises(InputError, match=re.escape(option)):
        script(options=(option,))


def test_a_secret_is_asked_for_by_name(job, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    text = slurm.render(job(secrets=("HF_TOKEN",)), "ddp.yaml", str(tmp_path), "bin")
    assert ': "${HF_TOKEN:?' in text
    assert "canary" not in text


def test_without_slurm_the_error_says_where_to_go(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="--dry-run > job.sbatch"):
        slurm.submit("#!/bin/bash\n")


# -- run for real, with small programs in the place of Slurm's -------------------------------------


@pytest.fixture
def run(script, tmp_path, config_file):
    """Start the script; `srun` and `accelerate` are stand-ins that leave what they were told."""
    programs = {
        "srun": 'shift; export SLURM_PROCID=1; exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then printf "alpha\\nbeta\\n"; else echo "$@" > "{tmp_path}/requeued"; fi',  # noqa: E501
        "accelerate": (
            f'printf "%s\\n" "$@" > "{tmp_path}/words"\n'
            f"trap 'sleep 0.3; echo saved > \"{tmp_path}/saved\"; exit 75' TERM\n"
            f'touch "{tmp_path}/started"; if [ -n "$FAIL" ]; then exit 3; fi\n'
            "for i in $(seq 100); do sleep 0.1; done"
        ),
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = tmp_path / "job.sbatch"
    path.write_text(script(nodes=2, gpus_per_node=4))
    started = []

    def run(**variables) -> subprocess.Popen:
        environment = {"PATH": os.environ["PATH"], "FAIL": "", **variables}
        environment |= {"SLURM_JOB_NODELIST": "alpha,beta", "SLURM_JOB_ID": "77"}
        started.append(subprocess.Popen(["bash", str(path)], env=environment))
        while not (tmp_path / "started").exists():
            assert started[-1].poll() is None
            time.sleep(0.02)
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_every_node_launches_with_its_rank_and_the_first_nodes_name(run, tmp_path, config_file):
    run(FAIL="yes").wait(10)
    words = (tmp_path / "words").read_text().splitlines()
    assert words[words.index("--machine_rank") + 1] == "1"
    assert words[words.index("--main_process_ip") + 1] == "alpha"
    assert str(config_file) in words, "a name with a space stays one word"


def test_a_failure_is_the_jobs_and_not_queued_again(run, tmp_path):
    assert run(FAIL="yes").wait(10) == 3
    assert not (tmp_path / "requeued").exists()


def test_before_the_time_limit_it_saves_and_is_queued_again(run, tmp_path):
    process = run()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 75
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


def test_cancelled_it_saves_and_is_not_queued_again(run, tmp_path):
    process = run()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "requeued").exists()
