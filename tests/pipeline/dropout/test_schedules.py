"""Rates over layers, steps and domains: against the formulas, and in force in the masks."""

import math
import re

import pytest
import torch

from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.schedules import depth_share, layer_counts, layer_of, progress_share
from pipeline.errors import DropoutError
from pipeline.model import plan_for

CLOSE = {"rel": 1e-9, "abs": 1e-12}


def rates_of(config, role: str) -> list[float]:
    return [site.rate for site in plan_for(config).sites if site.role == role]


def test_the_layer_of_a_site_is_the_first_number_in_its_name():
    assert layer_of("transformer.encoder.block.3.layer.1.dropout") == (
        "transformer.encoder.block",
        3,
    )
    assert layer_of("bert.embeddings.dropout") is None
    assert layer_counts(["e.block.2.layer.9.x", "d.block.0.x", "d.block.4.x"]) == {
        "e.block": 3,
        "d.block": 5,
    }


@pytest.mark.parametrize(
    ("depth", "shares"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ("early", [1, 1, 0, 0, 0, 0]),
        ("late", [0, 0, 0, 0, 1, 1]),
    ],
)
def test_depth_gives_each_layer_its_share(depth, shares):
    found = [depth_share(depth, f"h.{layer}.mlp", {"h": 6}) for layer in range(6)]
    assert found == pytest.approx(shares)
    assert depth_share(depth, "pooler.dropout", {"h": 6}) == 1


@pytest.mark.parametrize("done", [0, 0.1, 0.5, 1])
def test_progress_follows_its_formula(done):
    assert progress_share("constant", 10, done) == 1
    assert progress_share("linear", 10, done) == done
    assert progress_share("curriculum", 7, done) == pytest.approx(1 - math.exp(-7 * done))


def test_a_plan_by_depth_lists_the_dead_layers_and_why(config_of):
    given = {"hidden": {"rate": 0.3, "depth": "linear"}, "attention": {"depth": "late"}}
    config = config_of("bert", given, overrides={"num_hidden_layers": 4})
    assert rates_of(config, "hidden") == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert rates_of(config, "attention") == pytest.approx([0, 0, 0.1, 0.1])
    dead = plan_for(config).sites[1]
    assert (dead.in_force, dead.reason) == (False, "rate 0 at this depth")


def test_an_override_is_the_rate_whatever_the_depth(config_of):
    given = {"hidden": {"rate": 0.3, "depth": "early"}, "overrides": {"*.layer.1.*": 0.25}}
    config = config_of("bert", given, overrides={"num_hidden_layers": 2})
    assert rates_of(config, "hidden") == [0.3, 0.3, 0.25, 0.25]


def test_depth_without_layers_is_an_error(config_of):
    with pytest.raises(DropoutError, match=r"dropout\.head changes with depth \(late\), but none"):
        plan_for(config_of("bert", {"head": {"depth": "late"}}))


def test_a_domain_with_a_role_that_the_model_lacks_is_an_error(config_of):
    given = {"domains": {"web": {"hiden": 0.1}}}
    with pytest.raises(DropoutError, match=r"dropout\.domains\.web\.hiden: this model has no hid"):
        plan_for(config_of("bert", given, data={"domain_column_name": "source"}))


def test_plans_with_schedules_survive_json_and_show_them(config_of):
    given = {"hidden": {"rate": 0.1, "progress": "curriculum", "variant": "block", "block_size": 4}}
    given |= {"domains": {"web": {"hidden": 0.3}}}
    plan = plan_for(config_of("bert", given, data={"domain_column_name": "source"})).for_steps(9)
    assert DropoutPlan.from_json(plan.to_json()) == plan
    assert re.search(r"block 4 +0\.1 \(curriculum, web 0\.3\)", plan.table())


def dropped(bound, index: int, purpose: str, **rows) -> dict[str, torch.Tensor]:
    """Share of dropped entries of each sample at each module, in a pass in eval mode."""
    ids = torch.full((8, 34), 5)
    with bound.recorded() as kept, torch.no_grad():
        row_ids = torch.arange(8)
        with bound.keyed.context(purpose=purpose, index=index, row_ids=row_ids, **rows):
            bound.model.eval()(input_ids=ids)
    return {site: 1 - calls[0].flatten(1).float().mean(1) for site, calls in kept.items()}


SITE = "bert.encoder.layer.0.output.dropout"


@pytest.mark.parametrize(
    ("index", "purpose", "rate"),
    [(0, "train", 0.0), (5, "train", 0.2), (10, "train", 0.4), (3, "mc", 0.4)],
)
def test_rates_rise_with_training_and_passes_use_the_last(bind, index, purpose, rate):
    bound = bind("bert", {"hidden": {"rate": 0.4, "progress": "linear"}, "attention": 0})
    bound.keyed.plan = bound.keyed.plan.for_steps(10)
    found = dropped(bound, index, purpose)[SITE].mean()
    assert found == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / (8 * 34 * 24)))


def test_progress_without_a_number_of_steps_is_an_error(bind):
    bound = bind("bert", {"hidden": {"rate": 0.4, "progress": "linear"}})
    with pytest.raises(DropoutError, match=r"does not say how many steps"):
        dropped(bound, 0, "train")


def test_rows_of_one_batch_have_the_rates_of_their_domains(bind):
    given = {"hidden": 0.1, "attention": 0, "domains": {"web": {"hidden": 0.5}, "lab": {}}}
    given["domains"]["lab"] = {"hidden": 0.0}
    bound = bind("bert", given, data={"domain_column_name": "source"})
    assert bound.plan.domains == ("lab", "web")
    codes = torch.tensor([0, 1, -1, 0, 1, -1, 0, 1])
    found = dropped(bound, 0, "mc", domains=codes)[SITE]
    wanted = torch.tensor([0.0, 0.5, 0.1])[codes]
    torch.testing.assert_close(found, wanted, atol=0.08, rtol=0)
    assert not found[codes == 0].any()


def test_a_sample_keeps_its_mask_among_samples_of_other_domains(bind):
    given = {"hidden": 0.1, "attention": 0, "domains": {"web": {"hidden": 0.5}}}
    bound = bind("bert", given, data={"domain_column_name": "source"})
    ids, batch = torch.arange(3), {"input_ids": torch.full((3, 7), 5)}
    context = {"purpose": "mc", "index": 1}
    with torch.no_grad(), bound.keyed.context(row_ids=ids, domains=ids - 1, **context):
        together = bound.model.eval()(**batch).logits
    for row in range(3):
        with (
            torch.no_grad(),
            bound.keyed.context(
                row_ids=ids[row : row + 1], domains=ids[row : row + 1] - 1, **context
            ),
        ):
            alone = bound.model(input_ids=batch["input_ids"][:1]).logits
        torch.testing.assert_close(alone[0], together[row])
