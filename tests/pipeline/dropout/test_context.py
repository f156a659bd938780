"""Keyed dropout bound to a model: what draws, what must not, and what changes no mask."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.dropout import kernels
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.kernels import reference
from pipeline.dropout.key import derive_key, signed
from pipeline.dropout.philox import scale, threshold
from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.sites import Site
from pipeline.errors import DropoutError, LeakError

ALL = {"embedding": 0.1, "hidden": 0.2, "attention": 0.2}
ROWS = torch.tensor([70, 12, 2**40])


class Twice(nn.Module):
    """Calls one dropout two times."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.4)

    def forward(self, x):
        return self.dropout(x), self.dropout(x)


def plan_by_hand(*calls: int) -> DropoutPlan:
    common = {"door": "module", "role": "hidden", "variant": "element", "rate": 0.4}
    common |= {"in_force": True, "reason": "", "layout": "sample-first", "shape": (5, 9)}
    return DropoutPlan(tuple(Site(site="dropout", call=call, **common) for call in calls))


def mask_by_hand(call: int, index: int = 4, purpose: str = "train") -> torch.Tensor:
    key, t = derive_key(99, purpose, index, "element", "dropout", call), threshold(0.4)
    rows = ROWS[:, None].expand(3, 5)
    shared = [torch.tensor(v).expand(3, 5) for v in (signed(key), t, scale(t))]
    positions = torch.arange(5).expand(3, 5)
    return kernels.rows(torch.ones(3, 5, 9), shared[0], rows, positions, *shared[1:])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def state_of(module: nn.Module) -> tuple:
    """Everything that keyed dropout touches in a module."""
    hooks = (*module._forward_hooks, *module._forward_pre_hooks)
    return type(module), hooks, getattr(module, "_gradient_checkpointing_func", None)


def backward(bound, batch, in_thread=False, times=1):
    """Gradients of one step, with backward where and as often as asked."""
    bound.model.train().zero_grad()
    with bound.keyed.context(purpose="train", index=3, row_ids=ROWS):
        loss = bound.model(**batch).logits.square().sum()

        def run() -> None:
            for _ in range(times):
                bound.model.zero_grad()
                loss.backward(retain_graph=times > 1)

        if in_thread:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()
    return gradients(bound.model)


def test_calls_of_one_site_are_numbered_within_a_forward():
    model = Twice().train()
    keyed = KeyedDropout(model, plan_by_hand(0, 1), 99)
    with keyed.context(purpose="train", index=4, row_ids=ROWS):
        for _ in range(2):  # a second forward begins at call 0 again
            first, second = model(torch.ones(3, 5, 9))
            assert torch.equal(first, mask_by_hand(0))
            assert torch.equal(second, mask_by_hand(1))


def test_a_draw_in_training_outside_a_context_is_an_error():
    model = Twice()
    KeyedDropout(model, plan_by_hand(0, 1), 99)
    with pytest.raises(LeakError, match=r"Site dropout .* outside a mask context"):
        model.train()(torch.ones(3, 5, 9))


def test_evaluation_without_a_context_is_the_identity(bind, tokens):
    bound, batch = bind("bert", ALL), tokens()
    with torch.no_grad():
        bound_logits = bound.model.eval()(**batch).logits
        bound.keyed.release()
        assert torch.equal(bound.model(**batch).logits, bound_logits)


def test_a_call_that_was_not_planned_is_an_error():
    model = Twice().train()
    keyed = KeyedDropout(model, plan_by_hand(0), 99)
    with (
        pytest.raises(LeakError, match="dropout#1 dropped with rate 0.4 but is not in the"),
        keyed.context(purpose="train", index=4, row_ids=ROWS),
    ):
        model(torch.ones(3, 5, 9))


def test_a_functional_dropout_that_was_not_planned_is_an_error(bind, tokens):
    bound = bind("bert", ALL)
    bound.keyed._known = {s for s in bound.keyed._known if "attention.self" not in s[1]}
    bound.keyed._live = {k: m for k, m in bound.keyed._live.items() if k in bound.keyed._known}
    with (
        pytest.raises(LeakError, match="attention.self#0"),
        bound.keyed.context(purpose="train", index=0, row_ids=ROWS),
    ):
        bound.model.train()(**tokens())


def test_a_planned_site_that_does_not_draw_is_named():
    model = nn.Sequential()
    model.dropout = nn.Dropout(0.4)
    keyed = KeyedDropout(model, plan_by_hand(0, 1), 99)
    with keyed.context(purpose="train", index=0, row_ids=ROWS) as active:
        model(torch.ones(3, 5, 9))
        assert keyed.missing(active) == ["dropout#1"]


def test_a_plan_for_another_model_is_refused(bind):
    with pytest.raises(DropoutError, match="1 site.* that this model lacks: dropout"):
        KeyedDropout(nn.Linear(2, 2), plan_by_hand(0), 99)


def test_a_model_is_bound_once_at_a_time():
    model = Twice()
    keyed = KeyedDropout(model, plan_by_hand(0), 99)
    with pytest.raises(DropoutError, match="bound already"):
        KeyedDropout(model, plan_by_hand(0), 99)
    keyed.release()
    KeyedDropout(model, plan_by_hand(0), 99)


def test_release_leaves_the_model_as_it_was(bind, tokens):
    bound, batch = bind("llama", {"insert": {"hidden": 0.2}, "attention": 0.1}), tokens()
    bound.keyed.release()
    bound.model.activation_checkpointing_enable()
    before = [state_of(module) for module in bound.model.modules()]
    bound.keyed = KeyedDropout(bound.model, bound.plan, 1)
    backward(bound, batch)
    assert [state_of(module) for module in bound.model.modules()] != before
    bound.keyed.release()
    assert [state_of(module) for module in bound.model.modules()] == before
    assert nn.functional.dropout.__module__ == "torch.nn.functional"


def test_a_released_dropout_draws_as_before():
    model, plain = Twice().train(), Twice().train()
    KeyedDropout(model, plan_by_hand(0, 1), 99).release()
    assert type(model.dropout) is nn.Dropout
    assert vars(model.dropout).keys() == vars(plain.dropout).keys()
    results = []
    for one in (model, plain):
        torch.manual_seed(0)
        results.append(one(torch.ones(3, 5, 9))[1])
    assert torch.equal(*results)


def test_passes_stacked_on_the_batch_axis_equal_passes_run_apart(bind, tokens):
    bound, batch = bind("bert", ALL), tokens()
    apart = torch.cat([bound.logits(index=t, **batch) for t in (0, 5)])
    twice = {name: value.repeat(2, 1) for name, value in batch.items()}
    ids = (torch.arange(3) + 70).repeat(2)
    stacked = bound.logits(index=[0, 0, 0, 5, 5, 5], row_ids=ids, **twice)
    torch.testing.assert_close(stacked, apart)
    assert not torch.allclose(apart[:3], apart[3:], atol=1e-3)


def test_packed_samples_draw_the_masks_that_they_draw_alone(bind, tokens):
    bound = bind("gpt2", {"embedding": 0.3, "hidden": 0.3})
    ids = tokens(1, 9)["input_ids"]
    with bound.recorded() as packed:
        places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        rows = torch.tensor([[8] * 4 + [5] * 5])
        bound.logits(row_ids=rows, input_ids=ids, position_ids=places)
    for row, part in ((8, slice(0, 4)), (5, slice(4, 9))):
        with bound.recorded() as alone:
            bound.logits(row_ids=[row], input_ids=ids[:, part])
        for name in alone:
            assert torch.equal(packed[name][0][:, part], alone[name][0]), name


def test_packed_ids_that_do_not_fit_the_tensor_are_refused(bind, tokens):
    bound = bind("bert", {"head": 0.5})
    with pytest.raises(DropoutError, match="Packed row ids have 7 positions"):
        bound.logits(row_ids=torch.zeros(3, 7, dtype=torch.long), **tokens())


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_masks_do_not_depend_on_precision_or_kernel(bind, tokens, monkeypatch, model_type):
    bound, batch = bind(model_type, {"embedding": 0.1, "hidden": 0.2}), tokens()
    with bound.recorded() as single:
        logits = bound.logits(**batch)
    bound.model.bfloat16()
    with bound.recorded() as half:
        bound.logits(**batch)
    bound.model.float()
    assert all(torch.equal(single[name][0], half[name][0]) for name in single)
    monkeypatch.setattr(kernels, "active", lambda device="cpu": reference)
    assert torch.allclose(bound.logits(**batch), logits, atol=0.05)  # weights went through bfloat16
    with bound.recorded() as plain:
        bound.logits(**batch)
    assert all(torch.equal(single[name][0], plain[name][0]) for name in single)


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_checkpointing_changes_no_gradient(bind, tokens, model_type, use_reentrant, in_thread):
    dropout = {"attention": 0.2} | ({"insert": {"hidden": 0.2}} if model_type == "llama" else ALL)
    bound, batch = bind(model_type, dropout), tokens()
    plain = backward(bound, batch)
    bound.model.enable_input_require_grads()
    bound.model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in backward(bound, batch, in_thread).items():
        torch.testing.assert_close(gradient, plain[name])


def test_a_graph_can_be_recomputed_twice(bind, tokens):
    bound, batch = bind("bert", ALL), tokens()
    plain = backward(bound, batch)
    bound.model.activation_checkpointing_enable({"use_reentrant": False})
    for name, gradient in backward(bound, batch, times=2).items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recompute_that_was_not_captured_is_an_error(use_reentrant):
    layers = nn.Sequential(nn.Linear(9, 9), Twice()).train()
    keyed = KeyedDropout(layers[1], plan_by_hand(0, 1), 99)
    with keyed.context(purpose="train", index=0, row_ids=ROWS):
        x = torch.ones(3, 5, 9, requires_grad=True)
        out = checkpoint(layers, x, use_reentrant=use_reentrant)
        with pytest.raises(LeakError, match="in a recompute that was not captured"):
            out[0].sum().backward()


def test_an_encoder_alone_draws_as_inside_the_model(bind, tokens):
    bound, batch = bind("t5", {"hidden": 0.2, "attention": 0.2}), tokens()
    batch["input_ids"][:, -1] = 1  # the model reads the last end-of-sequence token
    encoder = bound.model.transformer.encoder
    kept = []
    encoder.register_forward_hook(lambda m, args, out: kept.append(out.last_hidden_state))
    bound.logits(row_ids=ROWS, **batch)
    with torch.no_grad(), bound.keyed.context(purpose="mc", index=0, row_ids=ROWS):
        encoder(**batch)
    assert torch.equal(*kept)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_decoding_with_a_cache_equals_the_whole_pass(bind, tokens, model_type, padding):
    own = {"embedding": 0.1, "hidden": 0.2}
    dropout = own if model_type == "gpt2" else {"insert": own}
    window = {} if model_type in ("llama", "gpt2") else {"overrides": {"sliding_window": 4}}
    bound, batch = bind(model_type, dropout | {"attention": 0.2}, **window), tokens(2, 10)
    batch["attention_mask"][1, :padding] = 0
    cache, parts = None, []
    places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    whole = bound.logits(position_ids=places, **batch)
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
        bound.model.eval()
        ids = torch.tensor([70, 71])
        with torch.no_grad(), bound.keyed.context(purpose="mc", index=0, row_ids=ids):
            out = bound.model(
                input_ids=batch["input_ids"][:, start:end],
                attention_mask=batch["attention_mask"][:, :end],
                position_ids=places[:, start:end],
                cache=cache,
                use_cache=True,
            )
        cache = out.past_key_values
        parts.append(out.logits)
    there = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[there], whole[there], atol=1e-4, rtol=0)


def test_a_plan_of_the_head_alone_leaves_the_body_still(bind, tokens):
    off = {"embedding": 0, "hidden": 0, "attention": 0}
    bound, batch = bind("bert", off | {"head": 0.5}), tokens()
    bodies = []
    bound.model.bert.register_forward_hook(lambda m, args, out: bodies.append(out[0]))
    first, second = bound.logits(index=0, **batch), bound.logits(index=1, **batch)
    assert torch.equal(*bodies)
    assert not torch.allclose(first, second)


def test_base_adapter_and_merged_model_draw_the_same_masks(bind, tokens, config_of):
    dropout = {"insert": {"embedding": 0.2, "hidden": 0.2}, "attention": 0.2}
    peft = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "r": 2}
    adapted, batch = bind("llama", dropout, peft=peft), tokens()
    with_adapter = adapted.logits(**batch)
    adapted.keyed.release()
    plan = adapted.plan
    merged = adapted.model.merge_and_unload()  # a fresh adapter adds nothing: this is the base
    wrapped = nn.Module()
    wrapped.add_module("module", merged)
    wrapped.forward = merged.forward
    for model in (merged, wrapped):
        keyed = KeyedDropout(model, plan, adapted.config.seed)
        model.eval()
        with torch.no_grad(), keyed.context(purpose="mc", index=0, row_ids=torch.arange(3) + 70):
            torch.testing.assert_close(model.forward(**batch).logits, with_adapter)
        keyed.release()
