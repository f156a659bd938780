"""From a configuration and resources to a job; what would fail after the wait in a queue."""

import pytest

from launch.job import Resources, job_of
from launch.schedule import Schedule
from pipeline.errors import InputError, LayoutError


def test_one_process_takes_one_gpu_on_every_node(job):
    spec = job(nodes=2, gpus_per_node=8)
    words = spec.accelerate_words("zero3.yaml", "1", "node-a")
    assert spec.resources.num_processes == 16
    assert words[words.index("--num_processes") + 1] == "16"
    assert words[words.index("--num_machines") + 1] == "2"
    assert words[words.index("--machine_rank") + 1] == "1"
    assert words[words.index("--main_process_ip") + 1] == "node-a"
    assert words[-4:] == ["pipeline", "train", spec.config, "train.max_steps=5"]


def test_accelerate_itself_understands_the_words(job):
    from accelerate.commands.launch import launch_command_parser

    words = job(nodes=2, gpus_per_node=4).accelerate_words("zero3.yaml", "1", "node-a")
    parsed = launch_command_parser().parse_args(words[2:])
    assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 8, 1)
    assert (parsed.main_process_ip, parsed.module) == ("node-a", True)
    assert parsed.training_script_args == ["train", words[-2], words[-1]]


def test_without_gpus_the_run_is_told_to_use_the_cpu(job):
    assert job().train_words[-1] == "train.use_cpu=true"
    assert "train.use_cpu=true" not in job(gpus_per_node=1).train_words


def test_everything_wrong_with_the_resources_is_said_at_once(job):
    with pytest.raises(LayoutError) as raised:
        job(nodes=0, gpus_per_node=2, processes_per_node=3, time_limit="ten", memory_per_node="64")
    for word in ("nodes", "3 processes a node on 2 GPUs", "'ten'", "'64'"):
        assert word in str(raised.value)


def test_a_batch_that_does_not_divide_names_the_nearest_that_does(job):
    with pytest.raises(LayoutError, match="64 does not divide over 24 processes; .* is 72"):
        job(nodes=3, gpus_per_node=8)


@pytest.mark.parametrize(
    ("text", "seconds"), [("1-00:00:30", 86_430), ("12:30:00", 45_000), ("00:01:00", 60)]
)
def test_a_time_limit_in_seconds(text, seconds):
    assert Resources(time_limit=text).seconds == seconds


def test_an_online_run_needs_its_key_by_name(config, config_file):
    wandb = config.wandb.model_copy(update={"mode": "online"})
    online = config.model_copy(update={"wandb": wandb})
    spec = job_of(online, "c.yaml", (), Resources(), "ddp", ("HF_TOKEN",))
    assert spec.secrets == ("WANDB_API_KEY", "HF_TOKEN")


def test_a_value_in_the_place_of_a_secrets_name_is_refused(job):
    with pytest.raises(LayoutError, match="give the name of a variable"):
        job(secrets=("HF_TOKEN=hf_abc",))


def test_an_interval_that_does_not_divide_the_day_is_refused():
    with pytest.raises(InputError, match="--every 7m: choose one of 5m, 10m"):
        Schedule("7m")
