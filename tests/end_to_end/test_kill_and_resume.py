"""kill -9 in the middle of a save, for real, many times: the end is bit-equal to a whole run."""

import json
import multiprocessing
import time

import pytest

from pipeline.config.schema import RunConfig
from pipeline.records import RunFolder, read_jsonl
from pipeline.train import train

SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def forks():
    """Real processes from a server that has imported everything: each kill costs no new imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipeline.train", "transformers.models.bert.modeling_bert"])
        yield context


def config_of(folder, name):
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    for file in files.values():
        rows = [{"text": f"word {n} of {n % 3}", "label": "ab"[n % 2]} for n in range(24)]
        with open(file, "w") as lines:
            lines.write("\n".join(json.dumps(row) for row in rows))
    return RunConfig.model_validate(
        {
            "name": name,
            "output_dir": str(folder / "runs"),
            "model": {
                "task": "text-classification",
                "model_type": "bert",
                "config_overrides": SHAPE,
                "tokenizer_vocab_size": 300,
            },
            "data": {"path": "json", "data_files": files, "max_length": 16},
            "train": {
                "use_cpu": True,
                "global_batch_size": 8,
                "max_steps": 6,
                "learning_rate": 1e-3,
                "save_steps": 1,
                "logging_steps": 1,
                "save_total_limit": 3,
            },
            "dropout": {"hidden": 0.1, "attention": 0.1},
        }
    )


def run_in(forks, config):
    process = forks.Process(target=train, args=(config,))
    process.start()
    return process


def kill_in_the_middle_of_a_save(process, run, step, delay_seconds):
    """SIGKILL once `checkpoint-<step>` is there without its manifest, a little later each time."""
    folder = run.checkpoint(step)
    while process.is_alive() and not folder.exists():
        time.sleep(0.0002)
    time.sleep(delay_seconds)
    is_torn = not (folder / "manifest.json").exists()
    process.kill()  # SIGKILL
    process.join()
    return is_torn


def test_killed_in_the_middle_of_saves_a_run_ends_bit_equal(forks, tmp_path):
    whole, killed = config_of(tmp_path, "whole"), config_of(tmp_path, "killed")
    undisturbed = run_in(forks, whole)
    run, num_torn = RunFolder(tmp_path / "runs" / "killed"), 0
    for step, delay_seconds in ((1, 0.0), (2, 0.002), (3, 0.01), (4, 0.03)):
        process = run_in(forks, killed)
        num_torn += kill_in_the_middle_of_a_save(process, run, step, delay_seconds)
    last = run_in(forks, killed)
    for process in (undisturbed, last):
        process.join()
        assert process.exitcode == 0
    assert num_torn >= 2
    expected = RunFolder(tmp_path / "runs" / "whole")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run.model / name).read_bytes() == (expected.model / name).read_bytes()
    assert losses(run) == losses(expected)


def losses(run):
    return [(row["step"], row.get("train/loss")) for row in read_jsonl(run.metrics)]
