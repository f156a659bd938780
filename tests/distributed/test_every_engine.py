"""Two processes of every preset train as one process does."""

import json

import pytest

ROUNDING = 1e-6
ZERO = ("zero1", "zero2", "zero3", "zero3_offload")


@pytest.fixture
def engine(request):
    if request.param in ZERO:
        request.getfixturevalue("needs_deepspeed")
    return request.param


@pytest.mark.parametrize("engine", ["cpu", "fsdp2", *ZERO], indirect=True)
def test_two_processes_of_an_engine_train_as_one_process(folder, engine):
    ended = folder.train(engine, engine=engine)
    assert ended.code == 0, ended.text
    assert folder.distance(engine) < ROUNDING
    assert losses(folder, engine) == [pytest.approx(v, rel=1e-5) for v in losses(folder, "one")]
    manifest = json.loads((folder.run(engine) / "checkpoint-4" / "manifest.json").read_text())
    assert (manifest["world_size"], manifest["step"]) == (2, 4)
    assert manifest["zero_stage"] == (int(engine[4]) if engine in ZERO else None)
    if engine in ZERO:
        assert any(name.endswith("_optim_states.pt") for name in manifest["files"])


LAYER_DROP = (
    "model.model_type=opt",
    "model.task=text-generation",
    "model.config_overrides={hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 2, "
    "ffn_dim: 64, max_position_embeddings: 32, word_embed_proj_dim: 32}",
    "dropout={layer: 0.5, hidden: 0.1}",
)


@pytest.mark.drill
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"], indirect=True)
def test_two_processes_leave_out_the_layers_that_the_plain_loop_leaves_out(folder, engine):
    """No process waits for the gradient of a layer left out; sharded layers run for nothing."""
    assert folder.verify_sync(f"{engine}:2", *LAYER_DROP) == [(f"{engine}:2", "equal", [])]


def losses(folder, name):
    lines = (folder.run(name) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row.get("train/loss", row.get("eval/loss")) for row in rows]
