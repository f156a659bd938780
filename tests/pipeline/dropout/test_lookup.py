"""The mask of named coordinates is the mask that a pass draws."""

import json

import numpy as np
import pytest

from pipeline.dropout.lookup import mask_of_run
from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.sites import Site
from pipeline.errors import DropoutError, RunFolderError
from pipeline.records import RunFolder, write_json

DROPOUT = {
    "embedding": {"rate": 0.3, "variant": "token"},
    "hidden": {"rate": 0.2, "variant": "channel"},
    "attention": 0.25,
    "head": {"rate": 0.5, "variant": "block", "block_size": 3},
}


@pytest.fixture
def bound(bind):
    return bind("roberta", DROPOUT)


@pytest.fixture
def run(tmp_path, bound) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    write_json(folder.plan, bound.plan.to_json())
    return folder


def look_up(run, site, sample=71, step=9) -> np.ndarray:
    return np.array(mask_of_run(run, 1234567, step, site, sample, "mc")["keep"], dtype=bool)


def test_masks_of_modules_are_those_that_a_pass_draws(run, bound, tokens):
    with bound.recorded() as kept:
        bound.logits(index=9, **tokens(length=8))
    for site in bound.plan.in_force("module"):
        drawn = kept[site.site][site.call][1].numpy()
        found = look_up(run, f"{site.site}#{site.call}")
        assert np.array_equal(np.atleast_2d(drawn), found), site


def test_masks_of_attention_are_those_that_a_pass_draws(run, bound, tokens):
    drawn = []
    attention = next(s for s in bound.plan.in_force() if s.role == "attention")
    mask = bound.keyed._live[attention.door, attention.site, 0]
    original = mask.apply
    mask.apply = lambda *args: drawn.append(original(*args)) or drawn[-1]
    bound.logits(index=9, **tokens(length=8))
    assert np.array_equal(drawn[0][1].numpy() != 0, look_up(run, attention.site))


def test_attention_folded_into_the_batch_has_its_heads_told_apart(bind, tokens, tmp_path):
    bound = bind("xglm", {"attention": 0.25, "hidden": 0, "embedding": 0})
    write_json(tmp_path / "plan.json", bound.plan.to_json())
    (site,) = bound.plan.in_force()
    assert site.shape == (3, 8, 8)
    drawn, mask = [], bound.keyed._live["functional", site.site, 0]
    original = mask.apply
    mask.apply = lambda *args: drawn.append(original(*args)) or drawn[-1]
    bound.logits(index=9, **tokens(length=8))
    kept = drawn[0].view(3, 3, 8, 8)[1].numpy() != 0
    causal = np.tril(np.ones((8, 8), dtype=bool))
    assert np.array_equal(kept, look_up(RunFolder(tmp_path), site.site) & causal)


def test_the_coordinates_stand_beside_the_mask(run):
    found = mask_of_run(run, 1234567, 9, "roberta.embeddings.dropout", 71, "train")
    assert json.loads(json.dumps(found)) == found
    names = ("purpose", "index", "site", "call", "role", "rate", "sample_id", "variant")
    expected = ("train", 9, "roberta.embeddings.dropout", 0, "embedding", 0.3, 71, "token")
    assert tuple(found[name] for name in names) == expected
    assert found["kept"] == np.sum(found["keep"])


def test_tensors_folded_over_windows_are_flattened_row_by_row(tmp_path):
    site = Site("a", 0, "module", "hidden", "element", 0.5, True, "", "sample-first", (2, 3, 5))
    write_json(tmp_path / "plan.json", DropoutPlan((site,)).to_json())
    assert look_up(RunFolder(tmp_path), "a").shape == (6, 5)


def test_a_site_that_draws_twice_must_be_named_with_its_call(run):
    with pytest.raises(
        DropoutError, match=r"draws more than once: .*classifier.dropout#1 \(head\)"
    ):
        look_up(run, "classifier.dropout")


def test_an_unknown_site_is_answered_with_those_there_are(run):
    with pytest.raises(DropoutError, match="'nowhere' is in force.* roberta.embeddings.dropout#0"):
        look_up(run, "nowhere")


def test_a_folder_without_plan_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"has no plan.json: train the run first"):
        mask_of_run(RunFolder(tmp_path), 1, 0, "a", 0, "mc")


def test_a_domain_with_rates_of_its_own_is_looked_up_by_name(bind, tmp_path):
    domains = {"domains": {"web": {"hidden": 0.6}}}
    bound = bind("roberta", DROPOUT | domains, data={"domain_column_name": "source"})
    write_json(tmp_path / "plan.json", bound.plan.to_json())
    site = next(s.label for s in bound.plan.in_force() if s.role == "hidden")
    found = [
        mask_of_run(RunFolder(tmp_path), 1, 0, site, 7, "mc", domain) for domain in (None, "web")
    ]
    assert [(mask["domain"], mask["rate"]) for mask in found] == [(None, 0.2), ("web", 0.6)]
    with pytest.raises(DropoutError, match="No rates of the data domain 'wbe' .* those of web"):
        mask_of_run(RunFolder(tmp_path), 1, 0, site, 7, "mc", "wbe")
