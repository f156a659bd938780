"""Attention by transformers' interface: the masks, outputs and gradients of the eager door."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.config.schema import RunConfig
from pipeline.dropout.attention import uses_interface
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.plan import DropoutPlan
from pipeline.errors import LeakError, ModelError
from pipeline.model import build_model, plan_for

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
OTHERS = {  # families beside those of the other tests, for what only they have
    "gemma2": GROUPED | {"attn_logit_softcapping": 0.5, "sliding_window": 3},
    "gpt_oss": GROUPED | {"num_local_experts": 4, "sliding_window": 3},
    "cohere2": GROUPED | {"sliding_window": 3},
    "starcoder2": GROUPED,
    "olmo2": GROUPED,
}
INTERFACE = [
    *("bert", "roberta", "distilbert", "electra", "albert", "modernbert", "gpt2", "llama"),
    *("qwen3", "mistral", "mixtral", "gemma3_text", "opt", "bart", "t5", "gpt_neox", "phi3"),
]
OWN_ATTENTION = ["deberta-v2", "bloom", "xglm"]


@pytest.fixture
def attending(config_of):
    """A configuration with attention dropout alone, by one door or the chosen one."""

    def make(family: str, attention: str | None = None, rate: float = 0.2) -> RunConfig:
        model = {"attn_implementation": attention}
        if family in OTHERS:
            model["model_type"] = family
        base = "llama" if family in OTHERS else family
        overrides = {"sliding_window": 3} if family == "mistral" else OTHERS.get(family, {})
        return config_of(base, {"attention": rate}, model=model, overrides=overrides)

    return make


def rows_of(model) -> dict[str, torch.Tensor]:
    """Three rows: whole, padded right, padded left; each with one end-of-sequence token."""
    ids = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, :3] = 0
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < 61:
        ids[:, 5] = end
    return {"input_ids": ids, "attention_mask": mask}


def outcome(keyed, batch, step=1, compiled=None):
    """Logits and gradients of one training step, the tensors masked, and by which site and key."""
    masked, draws = [], []

    def observe(mask, active, key, x):
        masked.append(x.detach())
        draws.append((mask.call, key.tolist()))

    keyed.observer = None if compiled is not None else observe
    keyed.model.train().zero_grad()
    with keyed.context(purpose="train", index=step, row_ids=torch.arange(3) + 10) as active:
        logits = (keyed.model if compiled is None else compiled)(**batch).logits
        logits.float().square().sum().backward()
        assert not keyed.missing(active)
    gradients = [p.grad for p in keyed.model.parameters() if p.grad is not None]
    return [logits.detach(), *gradients], masked, draws


@pytest.mark.parametrize("family", [*INTERFACE, *OTHERS])
def test_the_interface_gives_what_the_eager_door_gives_bit_for_bit(attending, family):
    plan = plan_for(attending(family))
    assert plan.attn_implementation == "keyed"
    assert plan.digest == plan_for(attending(family, "eager")).digest
    eager = build_model(attending(family, "eager"), None, plan)
    keyed = build_model(attending(family), None, plan)
    assert (eager.config._attn_implementation, keyed.config._attn_implementation) == (
        "eager",
        "keyed",
    )
    batch = rows_of(eager)
    expected, found = (outcome(KeyedDropout(m, plan, 3), batch) for m in (eager, keyed))
    assert found[2] == expected[2]
    assert len(found[2]) == len(plan.in_force()) > 0
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_models_with_their_own_attention_keep_the_eager_door(attending, family):
    plan = plan_for(attending(family))
    assert plan.attn_implementation == "eager"
    assert build_model(attending(family), None, plan).config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="does not compute its attention through transformers"):
        plan_for(attending(family, "keyed"))


def test_the_choice_is_on_record_and_older_records_mean_eager(attending):
    plan = plan_for(attending("bert"))
    record = json.loads(json.dumps(plan.to_json()))
    assert record["attention"] == "keyed"
    assert DropoutPlan.from_json(record) == plan
    assert "interface" in plan.table()
    del record["attention"]
    assert DropoutPlan.from_json(record).attn_implementation == "eager"
    assert plan_for(attending("bert", rate=0)).attn_implementation is None


def test_other_rates_in_the_plan_leave_the_choice_to_the_sites_in_force(attending):
    plan = plan_for(attending("bert"))
    off = replace(plan, sites=tuple(replace(s, in_force=False) for s in plan.sites))
    assert off.attn_implementation is None


def test_outside_a_context_training_is_refused_and_evaluation_drops_nothing(attending):
    plan = plan_for(attending("bert"))
    model = build_model(attending("bert"), None, plan)
    KeyedDropout(model, plan, 3)
    batch = rows_of(model)
    states = torch.ones(3, 9, 24)
    with pytest.raises(LeakError, match=r"layer\.0\.attention\.self was asked to drop outside"):
        model.train().bert.encoder.layer[0].attention.self(states)
    first, second = (model.eval()(**batch).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_released_model_asks_nobody(attending):
    plan = plan_for(attending("bert"))
    model = build_model(attending("bert"), None, plan)
    before = {name for module in model.modules() for name in vars(module)}
    KeyedDropout(model, plan, 3).release()
    assert {name for module in model.modules() for name in vars(module)} == before


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_draws_the_same_masks(attending, family, reentrant):
    plan = plan_for(attending(family))
    model = build_model(attending(family), None, plan)
    keyed, batch = KeyedDropout(model, plan, 3), rows_of(model)
    expected, _, draws = outcome(keyed, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found, _, twice = outcome(keyed, batch)
    assert len(twice) > len(draws)
    assert {str(draw) for draw in twice} == {str(draw) for draw in draws}
    torch.testing.assert_close(found, expected)


def test_a_file_that_treats_eager_apart_keeps_the_eager_door(attending):
    plan = plan_for(attending("gpt2"))
    model = build_model(attending("gpt2"), None, plan)
    assert uses_interface(model)
    model.config = copy.deepcopy(model.config)
    model.config.reorder_and_upcast_attn = True
    assert not uses_interface(model)


@pytest.fixture
def compiled_anew():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(
    "family",
    ["bert", *(pytest.param(f, marks=pytest.mark.drill) for f in ("gpt2", "llama", "gpt_oss"))],
)
def test_a_whole_model_is_one_graph_and_compiled_once(attending, family, compiled_anew):
    plan = plan_for(attending(family))
    model = build_model(attending(family), None, plan)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    keyed, batch, seen = KeyedDropout(model, plan, 3), rows_of(model), []
    for step in range(3):
        found, expected = outcome(keyed, batch, step, compiled)[0], outcome(keyed, batch, step)[0]
        torch.testing.assert_close(found, expected)
        seen.append(found[0])
    assert not seen[0].equal(seen[1])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]
