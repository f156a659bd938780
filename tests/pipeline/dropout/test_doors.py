"""The doors: every dropout goes through one function, under the site's name in the bare model."""

import copy

import pytest
import torch
from torch import nn

from pipeline.dropout import doors


class Block(nn.Module):
    """Drops by a module, by a function, and by a function that is no method."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.drop(x)
        x = nn.functional.dropout(x, 0.25, self.training)
        return free_function(self, x)


def free_function(module: nn.Module, x):
    return nn.functional.dropout(x, p=0.125, training=module.training)


class Log:
    """A draw function that masks nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, door, site, x, rate):
        self.calls.append((door, site, rate))
        return x + 1


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"a": Block(), "b": Block()})


def test_modules_and_functions_are_drawn_in_order_under_their_sites(model):
    names, log = doors.site_names(model), Log()
    doors.open_modules(names, log)
    with doors.open_functional(lambda m: (names[m], log) if m in names else None):
        assert model["b"](torch.zeros(2)).tolist() == [3, 3]
    assert log.calls == [("module", "b.drop", 0.5), ("functional", "b", 0.25)] + [
        ("functional", "b", 0.125)
    ]


def test_an_opened_module_is_still_the_module_that_it_was(model):
    drop, seen = model["a"].drop, []
    drop.register_forward_hook(lambda *args: seen.append(args))
    close = doors.open_modules(doors.site_names(model), Log())
    assert model["a"].drop is drop
    assert isinstance(drop, nn.Dropout)
    drop(torch.zeros(1))
    assert len(seen) == 1
    assert doors.is_bound(doors.site_names(model))
    close()
    assert type(drop) is nn.Dropout
    assert not doors.is_bound(doors.site_names(model))


def test_functions_called_from_elsewhere_keep_torchs_dropout():
    log = Log()
    with doors.open_functional(lambda module: None):
        torch.manual_seed(0)
        found = nn.functional.dropout(torch.ones(50))
    torch.manual_seed(0)
    assert torch.equal(found, nn.functional.dropout(torch.ones(50)))
    assert log.calls == []


def test_a_function_in_evaluation_asks_for_rate_zero(model):
    names, log = doors.site_names(model), Log()
    with doors.open_functional(lambda m: (names[m], log) if m in names else None):
        model.eval()["a"](torch.zeros(1))
    assert log.calls == [("functional", site, 0.0) for site in ("a.drop", "a", "a")]


def test_inserted_sites_draw_once_on_the_output_whatever_wraps_it():
    class Wrapper(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x):
            return 10 * self.base_layer(x), "cache"

    model = nn.ModuleDict({"mlp": Wrapper(nn.Identity())})
    log = Log()
    close = doors.open_inserted(doors.site_names(model), {"mlp"}, log)
    output, rest = model["mlp"](torch.zeros(1))
    assert (output.item(), rest) == (1, "cache")
    assert log.calls == [("inserted", "mlp", 0.0)]
    close()
    assert model["mlp"](torch.zeros(1))[0].item() == 0


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_a_wrapped_model_has_the_names_of_the_bare_one(model, wrapper):
    wrapped = nn.Module()
    wrapped.add_module(wrapper, model)
    assert set(doors.site_names(wrapped).values()) == set(doors.site_names(model).values())


def test_dropout_that_no_door_opens_is_named():
    model = nn.ModuleDict({"a": nn.Dropout2d(0.1), "b": nn.AlphaDropout(0.0), "c": nn.Dropout(0.1)})
    assert doors.unsupported_modules(doors.site_names(model)) == {"a": "Dropout2d"}


def test_checkpointed_segments_are_wrapped_once_and_unwrapped():
    module = nn.Identity()
    module._gradient_checkpointing_func = original = lambda body, x: body(x)
    for _ in range(2):
        doors.wrap_checkpointing([module], lambda body: lambda x: body(x) + 1)
    assert module._gradient_checkpointing_func(lambda x: x, 0) == 1
    doors.unwrap_checkpointing([module])
    assert module._gradient_checkpointing_func is original


def test_backward_is_told_from_forward():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(doors.in_backward()))
    x.sum().backward()
    assert seen == [True]
    assert not doors.in_backward()


def test_opened_models_can_be_copied(model):
    doors.open_modules(doors.site_names(model), Log())
    assert copy.deepcopy(model)["a"].drop(torch.zeros(1)).item() == 1
