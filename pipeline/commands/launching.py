"""`launch`: a training as a job of this machine, Slurm or Kubernetes; retraining on a timer."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.shell import Config, Overrides, load, say

if TYPE_CHECKING:
    from launch.job import JobSpec, Resources
    from launch.timer import Retraining

launch = typer.Typer(
    name="launch",
    help="Start a training as a job, or retraining on a timer; --dry-run shows what is sent.",
    no_args_is_help=True,
)

Nodes = Annotated[int, typer.Option("--nodes", help="Machines.")]
Gpus = Annotated[int, typer.Option("--gpus-per-node", help="GPUs on each; 0: the CPU.")]
Processes = Annotated[
    int | None, typer.Option("--processes-per-node", help="Default: one a GPU, or one.")
]
Cpus = Annotated[int, typer.Option("--cpus-per-process", help="Cores of each process.")]
Memory = Annotated[str | None, typer.Option("--memory", help="Of each node, such as 64G.")]
Time = Annotated[str | None, typer.Option("--time", help="Limit: [days-]hours:minutes:seconds.")]
Preset = Annotated[str, typer.Option("--accelerate-config", help="Preset or file.")]
Secrets = Annotated[
    list[str] | None, typer.Option("--secret", help="Variable that the job needs; by name only.")
]
Grace = Annotated[int, typer.Option("--grace", help="Seconds to save in before the end.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print, start nothing.")]
Image = Annotated[str, typer.Option("--image", help="Container image with Masklock.")]
Claim = Annotated[str, typer.Option("--claim", help="PersistentVolumeClaim with data and runs.")]
Namespace = Annotated[str, typer.Option("--namespace")]
SecretObject = Annotated[str, typer.Option("--secret-object", help="Secret with the variables.")]
Policy = Annotated[Path, typer.Argument(metavar="POLICY", help="A retraining policy (YAML).")]
Every = Annotated[str, typer.Option("--every", help="How often to look: 15m, 1h, 6h, 1d, ...")]


@launch.command("local")
def local_job(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 0,
    processes_per_node: Processes = None,
    accelerate_config: Preset = "ddp",
    dry_run: DryRun = False,
) -> None:
    """Train on this machine."""
    from launch import local
    from launch.job import Resources

    resources = Resources(nodes, gpus_per_node, processes_per_node)
    job = _job(config, overrides, resources, accelerate_config)
    if dry_run:
        say(local.render(job).rstrip())
    else:
        raise typer.Exit(local.submit(job))


@launch.command()
def slurm(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 0,
    processes_per_node: Processes = None,
    cpus_per_process: Cpus = 4,
    memory: Memory = None,
    time: Time = None,
    accelerate_config: Preset = "ddp",
    option: Annotated[
        list[str] | None, typer.Option("--sbatch", help="More options: --sbatch=--partition=a100")
    ] = None,
    setup: Annotated[
        list[str] | None, typer.Option("--setup", help="Shell line before: 'source .venv/bin/...'")
    ] = None,
    secret: Secrets = None,
    grace: Grace = 60,
    dry_run: DryRun = False,
) -> None:
    """Queue a training with Slurm; before the time limit it saves and is queued again."""
    from launch import slurm as scheduler
    from launch.job import Resources
    from pipeline.engines import find_preset

    resources = Resources(nodes, gpus_per_node, processes_per_node, cpus_per_process, memory, time)
    job = _job(str(Path(config).resolve()), overrides, resources, accelerate_config, secret, grace)
    preset = str(find_preset(accelerate_config).resolve())
    here, programs = str(Path.cwd()), str(Path(sys.executable).parent)
    script = scheduler.render(job, preset, here, programs, option or (), setup or ())
    say(script.rstrip() if dry_run else f"Queued as job {scheduler.submit(script)}.")


@launch.command()
def kubernetes(
    config: Config,
    image: Image,
    claim: Claim,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: Gpus = 0,
    processes_per_node: Processes = None,
    cpus_per_process: Cpus = 4,
    memory: Memory = None,
    time: Time = None,
    accelerate_config: Preset = "ddp",
    namespace: Namespace = "default",
    secret_object: SecretObject = "masklock",
    secret: Secrets = None,
    grace: Grace = 60,
    dry_run: DryRun = False,
) -> None:
    """Run a training as a Kubernetes Job."""
    from launch import kubernetes as cluster
    from launch.job import Resources, job_of
    from pipeline.config.load import dump_config
    from pipeline.engines import find_preset

    resources = Resources(nodes, gpus_per_node, processes_per_node, cpus_per_process, memory, time)
    inside = f"{cluster.CONFIG_FOLDER}/config.yaml"
    loaded = load(config, overrides)  # the cluster gets the resolved file, overrides and all
    job = job_of(loaded, inside, (), resources, accelerate_config, secret or (), grace)
    preset = find_preset(accelerate_config).read_text(encoding="utf-8")
    where = cluster.Cluster(image, claim, namespace, secret_object)
    text = cluster.render(job, dump_config(loaded), preset, where)
    say(text.rstrip() if dry_run else cluster.submit(text))


@launch.command()
def systemd(
    policy: Policy,
    every: Every = "1h",
    output: Annotated[
        Path | None, typer.Option(help="Folder of units; default: ~/.config/systemd/user.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Retraining on a systemd timer of this user."""
    from launch.timer import systemd_units
    from pipeline.records import write_text

    job = _retraining(policy, every)
    folder = output or Path.home() / ".config" / "systemd" / "user"
    for name, text in systemd_units(job).items():
        if dry_run:
            say(text)
        else:
            write_text(folder / name, text)
            say(str(folder / name))
    if not dry_run:
        say(f"systemctl --user daemon-reload && systemctl --user enable --now {job.unit}.timer")


@launch.command()
def cron(policy: Policy, every: Every = "1h") -> None:
    """Print the lines for `crontab -e` that retrain by schedule."""
    from launch.timer import cron_lines

    say(cron_lines(_retraining(policy, every)).rstrip())


@launch.command()
def cronjob(
    policy: Policy,
    image: Image,
    claim: Claim,
    every: Every = "1h",
    namespace: Namespace = "default",
    secret_object: SecretObject = "masklock",
    secret: Secrets = None,
    dry_run: DryRun = False,
) -> None:
    """Retraining as a Kubernetes CronJob."""
    from launch import kubernetes as cluster

    job = _retraining(policy, every)
    where = cluster.Cluster(image, claim, namespace, secret_object)
    text = cluster.render_retraining(
        job.name, job.policy.read_text(encoding="utf-8"), job.schedule, where, secret or ()
    )
    say(text.rstrip() if dry_run else cluster.submit(text))


def _job(
    source: str,
    overrides: list[str] | None,
    resources: "Resources",
    preset: str,
    secrets: list[str] | None = None,
    grace_seconds: int = 60,
) -> "JobSpec":
    from launch.job import job_of

    config = load(source, overrides)
    return job_of(config, source, overrides or (), resources, preset, secrets or (), grace_seconds)


def _retraining(policy: Path, every: str) -> "Retraining":
    from launch.retrain.load import load_plan
    from launch.schedule import Schedule
    from launch.timer import Retraining

    name = load_plan(policy).policy.name  # a timer must not find out what is wrong with it
    masklock = Path(sys.executable).with_name("masklock")
    return Retraining(name, policy.resolve(), Path.cwd(), masklock, Schedule(every))
