"""Sequences under one dropout network: held against a loop of full passes over one bare sample."""

import copy

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare

from pipeline.config.dropout import DropoutConfig
from pipeline.dropout import positions
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.key import derive_key
from pipeline.dropout.philox import philox4x32_10
from pipeline.dropout.plan import Blueprint, make_plan
from pipeline.errors import DataError, DropoutError, ModelError
from pipeline.evaluation.decoding import KeyedGumbel, gumbel
from pipeline.evaluation.generation import Decoding, Generator, Rows

SEED, IDS = 1234567, torch.tensor([70, 5, 2**40])
NARROW = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
LLAMA = NARROW | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 40}
GPT2 = NARROW | {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 40}
OPT = NARROW | {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "ffn_dim": 40}
OPT |= {"word_embed_proj_dim": 24, "max_position_embeddings": 40}
XGLM = NARROW | {"d_model": 24, "attention_heads": 3, "num_layers": 2, "ffn_dim": 40}
T5 = NARROW | {"d_model": 24, "num_heads": 3, "d_kv": 8, "d_ff": 40, "num_layers": 2}
T5 |= {"decoder_start_token_id": 0}
BART = NARROW | {"d_model": 24, "max_position_embeddings": 40, "decoder_start_token_id": 1}
BART |= {"forced_eos_token_id": None}
BART |= {f"{part}_{name}": n for part in ("encoder", "decoder")
         for name, n in {"layers": 2, "attention_heads": 3, "ffn_dim": 40}.items()}  # fmt: skip
OWN = {"hidden": 0.2, "attention": 0.2}
INSERT = {"attention": 0.2, "insert": {"embedding": 0.1, "hidden": 0.2}}
ATTENTION = ("attention_dropout",)
FAMILIES = {
    # model class and configuration, its rate-carrying fields, rates by role
    "gpt2": ("GPT2LMHeadModel", GPT2, ("embd_pdrop", "resid_pdrop", "attn_pdrop"), OWN),
    "llama": ("LlamaForCausalLM", LLAMA, ATTENTION, INSERT),
    "sliding": ("MistralForCausalLM", LLAMA | {"sliding_window": 5}, ATTENTION, INSERT),
    "opt": ("OPTForCausalLM", OPT, ("dropout", "attention_dropout", "layerdrop"),
            OWN | {"layer": 0.5}),
    "xglm": ("XGLMForCausalLM", XGLM, ("dropout", "attention_dropout", "activation_dropout"),
             OWN | {"activation": 0.2}),
    "t5": ("T5ForConditionalGeneration", T5, ("dropout_rate",), OWN | {"activation": 0.2}),
    "bart": ("BartForConditionalGeneration", BART,
             ("dropout", "attention_dropout", "activation_dropout"), OWN | {"activation": 0.2}),
}  # fmt: skip
CAUSAL = [name for name in FAMILIES if name not in ("t5", "bart")]
WAYS = [Decoding(8), Decoding(8, num_beams=3), Decoding(8, temperature=0.9)]


class Words:
    """A tokenizer that spells numbers."""

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


def example(batch_size, length, is_encoded):
    ones = torch.ones(batch_size, length, dtype=torch.long)
    return {"input_ids": ones, "attention_mask": ones} | (
        {"decoder_input_ids": ones} if is_encoded else {}
    )


def insertable(model):
    names = [name for name, _ in model.named_modules()]
    return {
        "embedding": [n for n in names if n.endswith("embed_tokens")],
        "hidden": [n for n in names if n.endswith(("self_attn", "mlp"))],
    }


def bound(family):
    """A small model of random, sharpened weights under keyed dropout."""
    name, options, fields, dropout = FAMILIES[family]
    model_class = getattr(transformers, name)

    def build(rates):
        config = model_class.config_class(**copy.deepcopy(options))
        for field, rate in rates.items():
            setattr(config, field, rate)
        torch.manual_seed(0)
        return model_class._from_config(config, attn_implementation="eager")

    encoded = build({}).config.is_encoder_decoder
    defaults = dict.fromkeys(fields, 0.0)
    print_of = Blueprint(
        build, lambda B, T: example(B, T, encoded), defaults, "", False, insertable
    )
    plan = make_plan(print_of, DropoutConfig.model_validate(dropout))
    model = build(dict(plan.attributes))
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 5 if weight.dim() > 1 else 1
    return KeyedDropout(model, plan, SEED)


@pytest.fixture(params=FAMILIES)
def keyed(request):
    return bound(request.param)


def generator_of(keyed):
    return Generator(keyed.model, keyed, Words(), SEED)


def prompts(keyed):
    """Rows of 9, 5 and 2 tokens, padded where the model expects it."""
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in (9, 5, 2)])
    mask = mask if keyed.model.config.is_encoder_decoder else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(batch, row):
    kept = batch["attention_mask"][row].bool()
    return {name: value[row : row + 1, kept] for name, value in batch.items()}


def by_full_passes(keyed, prompt, sample_id, index, decoding):
    """One unpadded sample, token by token, every step a pass over all of it: no cache, no beams."""
    encoded, said, log_p = keyed.model.config.is_encoder_decoder, [], []
    start = (
        [keyed.model.config.decoder_start_token_id] if encoded else prompt["input_ids"].tolist()[0]
    )
    name = "decoder_input_ids" if encoded else "input_ids"
    given = dict(prompt) if encoded else {}
    while len(said) < decoding.max_new_tokens and said[-1:] != [1]:
        given[name] = torch.tensor([start + said])
        with torch.no_grad(), keyed.context(purpose="mc", index=index, row_ids=sample_id[None]):
            logits = keyed.model.eval()(**given, use_cache=False).logits[0, -1].double()
        scores = logits.clone()
        if decoding.temperature:
            scores = logits / decoding.temperature
            scores += torch.from_numpy(gumbel(SEED, index, [int(sample_id)], len(said), 61)[0])
        said.append(int(scores.argmax()))
        log_p.append(float(logits.log_softmax(-1)[said[-1]]))
    return tuple(said), log_p


@pytest.mark.parametrize("decoding", [WAYS[0], WAYS[2]], ids=["greedy", "sampled"])
def test_a_cached_batch_says_what_full_passes_over_single_samples_say(keyed, decoding):
    batch = prompts(keyed)
    found = generator_of(keyed).generate(batch, Rows(IDS, 2), decoding, draw=2)
    for row, one in enumerate(found):
        tokens, log_p = by_full_passes(keyed, alone(batch, row), IDS[row], 2, decoding)
        assert one.tokens == tokens
        assert one.token_log_probabilities == pytest.approx(log_p, abs=1e-4)
        assert one.mean_log_probability == pytest.approx(np.mean(log_p), abs=1e-4)


@pytest.mark.parametrize("decoding", WAYS, ids=["greedy", "beams", "sampled"])
def test_a_sample_says_the_same_alone_and_in_any_order(keyed, decoding):
    batch, order = prompts(keyed), [2, 0, 1]
    generator = generator_of(keyed)
    together = generator.generate(batch, Rows(IDS, 4), decoding)
    moved = {name: value[order] for name, value in batch.items()}
    assert [one.tokens for one in generator.generate(moved, Rows(IDS[order], 4), decoding)] == [
        together[row].tokens for row in order
    ]
    for row, one in enumerate(together):
        single = generator.generate(alone(batch, row), Rows(IDS[row : row + 1], 4), decoding)[0]
        assert single.tokens == one.tokens
        assert single.log_probability == pytest.approx(one.log_probability, abs=1e-3)


def test_the_logits_of_cached_steps_are_those_of_one_pass(keyed):
    generator, batch, rows = generator_of(keyed), prompts(keyed), Rows(IDS, 1)
    decoding = Decoding(6, ends=False)
    found = generator._decode(batch, rows, decoding, [], output_logits=True)
    said = found.sequences[:, -6:]
    whole = generator.whole(batch, said.tolist())
    with generator.context(rows):
        expected = whole.logits(keyed.model)
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, atol=1e-4, rtol=1e-4)


def test_beams_without_a_cache_are_those_with_one(keyed):
    generator, batch = generator_of(keyed), prompts(keyed)
    cached = generator.generate(batch, Rows(IDS, 3), Decoding(8, num_beams=3))
    plain = generator.generate(batch, Rows(IDS, 3), Decoding(8, num_beams=3, use_cache=False))
    assert [one.tokens for one in cached] == [one.tokens for one in plain]


def test_passes_differ_and_the_network_without_dropout_is_another_one():
    keyed = bound("llama")
    generator, batch = generator_of(keyed), prompts(keyed)
    found = {
        tuple(one.tokens for one in generator.generate(batch, Rows(IDS, index), Decoding(8)))
        for index in (0, 1, 2, None)
    }
    assert len(found) == 4
    torch.manual_seed(1)
    plain = keyed.model.generate(**batch, max_new_tokens=8, do_sample=False)[:, 9:].tolist()
    ours = generator.generate(batch, Rows(IDS), Decoding(8))
    assert [list(one.tokens) for one in ours] == [
        row[: row.index(1) + 1] if 1 in row else row for row in plain
    ]


def test_sampled_tokens_follow_the_model_s_distribution():
    """Gumbel-max by key: 6000 samples of one distribution, chi-square at the level 1e-4."""
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, 2.0])
    noise = KeyedGumbel(SEED, 3, list(range(6000)), temperature=0.7)
    scores = noise(torch.zeros(6000, 4), logits.expand(6000, 5))
    counts = torch.bincount(scores.argmax(1), minlength=5)
    assert chisquare(counts, 6000 * (logits.double() / 0.7).softmax(0)).pvalue > 1e-4


def test_the_noise_is_that_of_the_specification():
    key = derive_key(SEED, "decode", 2, "gumbel", "token", 0)
    word = int(philox4x32_10(key, [17 // 4, 6, 70, 0])[17 % 4])
    expected = -np.log(-np.log((word + 0.5) / 2**32))
    assert gumbel(SEED, 2, [5, 70], 6, 19)[1, 17] == pytest.approx(expected, rel=1e-12)
    assert gumbel(SEED, 2, [5, 70], 6, 19).shape == (2, 19)


def test_a_cache_that_moves_masks_is_found_and_refused(monkeypatch):
    keyed = bound("t5")
    monkeypatch.setattr(positions, "_length_of", lambda cache: 0)
    with pytest.raises(DropoutError, match=r"T5ForConditionalGeneration .*use_cache to false"):
        generator_of(keyed).generate(prompts(keyed), Rows(IDS, 0), Decoding(8))
    generator_of(keyed).generate(prompts(keyed), Rows(IDS, 0), Decoding(8, use_cache=False))


def test_what_cannot_be_generated_is_said():
    keyed = bound("gpt2")
    batch = {name: value.flip(1) for name, value in prompts(keyed).items()}
    with pytest.raises(DataError, match="padded on the left, but these are padded on the right"):
        generator_of(keyed).generate(batch, Rows(IDS, 0), Decoding(4))
    with pytest.raises(ValueError, match="Sampling takes one beam"):
        Decoding(4, num_beams=2, temperature=1.0)
    with pytest.raises(ModelError, match="Linear was to generate text"):
        Generator(torch.nn.Linear(2, 2), None, Words(), SEED)
