"""A configuration and a job that launchers render."""

import pytest

from launch.job import Resources, job_of
from pipeline.config.load import load_config

YAML = """
name: Intents_2
model: {task: text-classification, model_name_or_path: some/model}
data: {path: csv, data_files: {train: train.csv, validation: dev.csv, test: test.csv}}
train: {global_batch_size: 64}
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "my run.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture
def config(config_file):
    return load_config(config_file)


@pytest.fixture
def job(config, config_file):
    """A job of the given resources (keywords of `Resources`)."""

    def job(overrides=("train.max_steps=5",), secrets=(), **resources):
        given = Resources(**resources)
        return job_of(config, str(config_file), overrides, given, "zero3", secrets)

    return job
