"""LayerDrop: one decision a step, in training and Monte-Carlo passes, under every engine."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.dropout.audit import audited
from pipeline.dropout.key import STEP_ROW_ID, derive_key
from pipeline.dropout.layer_drop import open_layers, stacks_keep_layers
from pipeline.dropout.philox import uniform
from pipeline.errors import DropoutError, LeakError

SEED, LAYER = 1234567, "model.decoder.layers.0"
ONLY_LAYERS = {"layer": 0.5, "hidden": 0, "attention": 0}


def left_out(index: int, purpose: str = "mc") -> bool:
    return uniform(derive_key(SEED, purpose, index, "layer", LAYER, 0), STEP_ROW_ID) < 0.5


def without_layer(bound, batch):
    """The logits of a model whose layer is the identity."""
    layer = bound.model.model.decoder.layers[0]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", lambda x, **kwargs: x)
        with bound.keyed.context(purpose="train", index=0, row_ids=torch.arange(3)):
            return bound.model(**batch).logits


def test_a_step_leaves_a_layer_out_for_all_samples_or_none(bind, tokens):
    bound, batch = bind("opt", ONLY_LAYERS), tokens()
    layer = bound.model.model.decoder.layers[0]
    found = [bound.logits(index, **batch) for index in range(4)]
    assert {left_out(index) for index in range(4)} == {True, False}
    bound.keyed.release()
    with torch.no_grad():
        whole = bound.model(**batch).logits
        layer.forward = lambda x, **kwargs: x
        skipped = bound.model(**batch).logits
    for index, logits in enumerate(found):
        torch.testing.assert_close(logits, skipped if left_out(index) else whole)


def test_the_decision_needs_neither_batch_nor_mode(bind, tokens):
    bound, batch = bind("opt", ONLY_LAYERS), tokens()
    bound.model.train()
    for index in range(6):
        decisions = []
        for rows in (slice(0, 1), slice(1, 3)):
            ids = torch.arange(3)[rows]
            with bound.keyed.context(purpose="train", index=index, row_ids=ids) as active:
                output = bound.model(**{name: x[rows] for name, x in batch.items()}).logits
                decisions.append(output.allclose(without_layer(bound, batch)[rows], atol=1e-6))
            assert bound.keyed.missing(active) == []
        assert decisions == [left_out(index, "train")] * 2


def test_rows_of_several_passes_have_each_its_own_layers(bind, tokens):
    bound, batch = bind("opt", ONLY_LAYERS), tokens(1)
    indices = list(range(6))
    assert len({left_out(index) for index in indices}) == 2
    stacked = {name: x.repeat(6, 1) for name, x in batch.items()}
    together = bound.logits(indices, row_ids=[70] * 6, **stacked)
    alone = torch.cat([bound.logits(index, row_ids=[70], **batch) for index in indices])
    torch.testing.assert_close(together, alone)


def test_parameters_of_a_layer_left_out_get_gradients_of_zero(bind, tokens):
    bound = bind("opt", ONLY_LAYERS | {"layer": 1.0})
    bound.model.train()
    with bound.keyed.context(purpose="train", index=0, row_ids=torch.arange(3)):
        for _ in range(2):  # first run whole, then left out
            bound.model(**tokens()).logits.sum().backward()
    gradients = [p.grad for p in bound.model.model.decoder.layers.parameters()]
    assert all(g is not None and g.eq(0).all() for g in gradients)
    assert bound.model.model.decoder.embed_tokens.weight.grad.abs().sum() > 0


def test_ddp_waits_for_no_parameter_of_a_layer_left_out(bind, tokens, tmp_path):
    bound = bind("opt", ONLY_LAYERS | {"layer": 1.0})
    bound.model.train()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(bound.model, find_unused_parameters=False)
        for index in range(3):  # DDP complains in the step after
            with bound.keyed.context(purpose="train", index=index, row_ids=torch.arange(3)):
                model(**tokens()).logits.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    layer = bound.model.model.decoder.layers[0]
    assert all(p.grad.eq(0).all() for p in layer.parameters())


def test_a_layer_left_out_that_runs_all_the_same_draws_no_masks(bind, tokens):
    bound, seen = bind("opt", {"layer": 1.0, "hidden": 0.2, "attention": 0.2}), []
    bound.keyed.observer = lambda mask, active, key, x: seen.append(mask.site.label)
    bound.model.train()
    for layer in bound.model.model.decoder.layers:
        next(layer.parameters()).ds_id = 1  # as under ZeRO-3
    with bound.keyed.context(purpose="train", index=0, row_ids=torch.arange(3)) as active:
        bound.model(**tokens())
    assert bound.keyed.missing(active) == []
    assert f"{LAYER}#layer" in seen
    assert not [site for site in seen if LAYER in site and not site.endswith("#layer")]


class Layer(nn.Linear):
    ran = 0

    def forward(self, x, cache=None):
        self.ran += 1
        return super().forward(x)


def opened(is_dropped, **attributes) -> Layer:
    layer = Layer(4, 4)
    for name, value in attributes.items():
        setattr(layer.weight, name, value)
    open_layers({layer: "layers.0"}, {"layers.0"}, lambda name: is_dropped)
    return layer


def test_a_layer_left_out_does_not_run(monkeypatch):
    layer, x = opened(torch.tensor([True])), torch.randn(2, 3, 4)
    assert layer(x).equal(x)
    ran = layer.ran  # once, to see what it returns
    assert layer(x).equal(x)
    assert (ran, layer.ran) == (1, 1)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_a_sharded_layer_runs_and_counts_for_nothing(engine):
    layer = opened(torch.tensor([True]), **({"ds_id": 3} if engine == "zero3" else {}))
    if engine == "fsdp":
        layer.__class__ = type("FSDPLayer", (type("FSDPModule", (), {}), Layer), {})
    x = torch.randn(2, 3, 4, requires_grad=True)
    for _ in range(2):
        output = layer(x)
        output.sum().backward()
    assert layer.ran == 2
    assert output.equal(x)
    assert layer.weight.grad.eq(0).all()
    assert x.grad.eq(2).all()


def test_rows_are_left_out_one_by_one():
    layer, x = opened(torch.tensor([True, False])), torch.randn(4, 4)
    assert layer(x)[:2].equal(x[:2])
    assert layer(x)[2:].equal(nn.functional.linear(x, layer.weight, layer.bias)[2:])


def test_a_layer_that_changes_shape_is_not_left_out_for_some_rows():
    layer = Layer(4, 2)
    open_layers({layer: "layers.0"}, {"layers.0"}, lambda name: torch.tensor([True, False]))
    with pytest.raises(DropoutError, match=r"layers\.0 turns a tensor of shape \(2, 4\) into \(2,"):
        layer(torch.randn(2, 4))


def test_a_model_released_is_as_it_was(bind):
    bound = bind("opt", ONLY_LAYERS)
    bound.keyed.release()
    assert all("forward" not in module.__dict__ for module in bound.model.modules())


class Stack(nn.Module):
    """LayerDrop as modelling files draw it."""

    def __init__(self, draw):
        super().__init__()
        self.layers, self.layerdrop = nn.ModuleList([nn.Identity()]), 0.5
        self.draw = draw

    def forward(self):
        for _layer in self.layers:
            if self.draw() < self.layerdrop:
                return "dropped"
        return "kept"


class TorchStack(Stack):
    def forward(self):
        for _layer in self.layers:
            if torch.rand([]) < self.layerdrop:
                return "dropped"
        return "kept"


class NumpyStack(Stack):
    def forward(self):
        for _layer in self.layers:
            if np.random.random() < self.layerdrop:  # noqa: NPY002
                return "dropped"
        return "kept"


class PythonStack(Stack):
    def forward(self):
        for _layer in self.layers:
            if random.uniform(0, 1) < self.layerdrop:
                return "dropped"
        return "kept"


@pytest.mark.parametrize("stack_class", [TorchStack, NumpyStack, PythonStack])
def test_a_stack_is_told_to_keep_its_layers(stack_class):
    stack, seen = stack_class(None), []
    names = {module: name for name, module in stack.named_modules()}
    with audited(stack) as leaks, stacks_keep_layers(names, lambda *found: seen.append(found)):
        assert [stack() for _ in range(8)] == ["kept"] * 8
        assert torch.rand(3).shape == (3,)
    assert seen == [("layers.0", 0.5)] * 8
    assert [leak.site for leak in leaks] == [""] * len(leaks)


def test_a_native_draw_left_in_place_is_found_by_the_audit(bind, tokens):
    bound = bind("opt", ONLY_LAYERS)
    bound.keyed._has_layer_drop = False
    bound.model.train()
    context = bound.keyed.context(purpose="train", index=0, row_ids=torch.arange(3))
    with context, audited(bound.model) as leaks:
        bound.model(**tokens())
    assert "model.decoder (aten.rand.default)" in map(str, leaks)


def test_a_layer_outside_a_context_is_an_error_in_training(bind, tokens):
    bound = bind("opt", ONLY_LAYERS)
    bound.model.train()
    with pytest.raises(LeakError, match=r"model\.decoder\.layers\.0#layer was asked to drop out"):
        bound.model(**tokens())


def test_overrides_name_a_whole_layer_by_itself(config_of):
    from pipeline.model import plan_for

    dropout = {"hidden": 0.1, "overrides": {f"{LAYER}#layer": 0.3, f"{LAYER}#0": 0.2}}
    rates = {site.label: site.rate for site in plan_for(config_of("opt", dropout)).in_force()}
    assert rates == {
        f"{LAYER}#layer": 0.3,
        "model.decoder.layers.0#0": 0.2,
        "model.decoder.layers.0#1": 0.1,
    }


@pytest.mark.parametrize("model_type", ["bart", "xglm"])
def test_other_families_leave_out_layers_too(bind, tokens, model_type):
    bound, batch = bind(model_type, {"layer": 0.5}), tokens()
    batch["input_ids"][:, -1] = bound.model.config.eos_token_id
    layers = [site for site in bound.plan.in_force() if site.role == "layer"]
    assert {site.site.rpartition(".")[0] for site in layers} <= {
        "model.encoder.layers",
        "model.decoder.layers",
        "model.layers",
    }
    assert len({bound.logits(index, **batch).sum().item() for index in range(4)}) > 1
