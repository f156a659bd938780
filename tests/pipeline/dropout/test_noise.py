"""NEFTune's noise: by sample and position, scaled by the sample's own length, in training only."""

import numpy as np
import pytest
import torch

from pipeline.arguments import training_arguments
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import lanes, philox_words
from pipeline.errors import DropoutError
from pipeline.evaluation.mc_dropout import MonteCarlo
from pipeline.model import build_model, plan_for

SEED, SITE = 1234567, "model.embed_tokens"
TRAIN = {"train": {"extra": {"neftune_noise_alpha": 5.0}, "use_cpu": True}}


@pytest.fixture
def noisy(config_of):
    """A small Llama whose embeddings get noise, and nothing else drops."""
    config = config_of("llama", {"attention": 0}, **TRAIN)
    plan = plan_for(config)
    model = build_model(config, None, plan).train()
    return KeyedDropout(model, plan, SEED)


def embeddings(keyed, ids, attended, rows, step=2):
    seen = []
    layer = keyed.model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with keyed.context(purpose="train", index=step, row_ids=torch.tensor(rows)) as active:
        keyed.model(input_ids=ids, attention_mask=attended)
    handle.remove()
    assert keyed.missing(active) == []
    return seen[0]


def noise_by_hand(row, length, step=2):
    key = derive_key(SEED, "augment", step, "noise", SITE, 0)
    words = philox_words(key, np.arange(3)[None], np.arange(length)[:, None], row)
    drawn = lanes(words).reshape(length, 24)
    return torch.from_numpy((2.0 * drawn + 1) / 65536 - 1) * 5 / np.sqrt(length * 24)


@pytest.mark.parametrize("pads_left", [False, True])
def test_a_sample_has_the_same_noise_however_it_is_padded(noisy, pads_left):
    ids, attended = torch.full((2, 9), 7), torch.ones(2, 9, dtype=torch.long)
    attended[1, slice(0, 3) if pads_left else slice(6, 9)] = 0
    found = embeddings(noisy, ids, attended, [40, 41])
    clean = noisy.model.model.embed_tokens.weight[7].detach()
    for place, (row, length) in enumerate([(40, 9), (41, 6)]):
        own = found[place][attended[place] == 1] - clean
        torch.testing.assert_close(own.double(), noise_by_hand(row, length), atol=1e-6, rtol=0)


def test_noise_is_uniform_and_changes_with_the_step():
    key = derive_key(SEED, "augment", 0, "noise", SITE, 0)
    other = derive_key(SEED, "augment", 1, "noise", SITE, 0)
    first, second = (
        lanes(philox_words(k, np.arange(5000)[None], 0, 3)).ravel() for k in (key, other)
    )
    assert abs(first.mean() / 32767.5 - 1) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_monte_carlo_passes_and_evaluation_have_no_noise(noisy):
    noisy.model.eval()
    ids = torch.full((2, 5), 7)
    with noisy.context(purpose="mc", index=0, row_ids=torch.arange(2)) as active:
        in_pass = noisy.model(input_ids=ids).logits
    assert noisy.missing(active) == []
    assert in_pass.equal(noisy.model(input_ids=ids).logits)


def test_noise_alone_makes_no_monte_carlo_passes(noisy):
    assert MonteCarlo(noisy, 4).num_passes == 1


def test_the_plan_lists_the_noise_and_the_trainer_does_not_see_it(config_of):
    config = config_of("llama", {"attention": 0}, **TRAIN)
    (site,) = plan_for(config).in_force()
    assert (site.label, site.variant, site.rate) == (f"{SITE}#0", "noise", 5.0)
    assert training_arguments(config, "out", 1).neftune_noise_alpha is None


def test_noise_on_a_table_of_encoder_and_decoder_is_refused(config_of):
    with pytest.raises(DropoutError, match=r"neftune_noise_alpha is 5, but T5.* Leave it out"):
        plan_for(config_of("t5", **TRAIN))
