"""Facts that processes compare, in one process: what differs is named, by process and host."""

import pytest
import torch

from pipeline import agreement
from pipeline.config.schema import RunConfig
from pipeline.dropout.kernels import active_kernel
from pipeline.dropout.plan import DropoutPlan
from pipeline.model import plan_for

CONFIG = RunConfig.model_validate(
    {
        "name": "run",
        "model": {
            "task": "text-classification",
            "model_type": "bert",
            "config_overrides": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
            | {"num_attention_heads": 2, "intermediate_size": 64},
        },
        "data": {"path": "json"},
        "dropout": {"hidden": 0.2, "attention": 0.1},
    }
)


@pytest.fixture(scope="module")
def plan() -> DropoutPlan:
    return plan_for(CONFIG, ["a", "b"])


def test_equal_facts_have_no_differences():
    facts = {"host": "a", **agreement.start_facts(CONFIG)}
    assert agreement.differences([facts, facts | {"host": "b"}]) == []


def test_a_difference_names_process_host_and_field():
    other = CONFIG.model_copy(update={"seed": 7})
    every = [
        {"host": host, **agreement.start_facts(config)} | {"code": code}
        for host, config, code in (("a", CONFIG, "x"), ("b", other, "y"))
    ]
    assert agreement.differences(every) == [
        "process 1 on b: seed: 42 -> 7",
        "process 1 on b: code y, process 0 has x",
    ]


def test_the_mask_digest_is_that_of_real_bits(plan, monkeypatch):
    def digest(plan=plan, seed=42, step=0):
        return agreement.mask_digest(plan, seed, step, torch.device("cpu"))

    assert digest() == digest()
    assert len({digest(), digest(seed=43), digest(step=1)}) == 3
    before = digest()
    monkeypatch.setenv("MASKLOCK_KERNEL", "numpy")
    assert digest() == before, active_kernel()


def test_a_kernel_that_draws_other_bits_is_noticed(plan, monkeypatch):
    before = agreement.mask_digest(plan, 42, 0, torch.device("cpu"))
    honest = agreement.rows
    monkeypatch.setattr(agreement, "rows", lambda x, keys, *rest: honest(x, keys + 1, *rest))
    assert agreement.mask_digest(plan, 42, 0, torch.device("cpu")) != before


def test_alone_there_is_nobody_to_disagree_with():
    agreement.agree(agreement.start_facts(CONFIG))
