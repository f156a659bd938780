"""Clips as batches: the extractor's own numbers, locked to the sample whatever batch it is in."""

import io

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset, DatasetDict

from pipeline.config.schema import RunConfig
from pipeline.data import TrainingStream, load_raw, prepare_data
from pipeline.dropout.context import KeyedDropout
from pipeline.errors import DataError, ModelError
from pipeline.modality import MODALITIES
from pipeline.model import build_model, plan_for
from pipeline.model_config import model_config
from pipeline.verify.probe import Probe

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")  # WavLM
TASK = MODALITIES["audio-classification"]
RATE = 8000
WAVES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
WAVES |= {"intermediate_size": 40, "conv_dim": [16, 16], "conv_kernel": [20, 8]}
WAVES |= {"conv_stride": [10, 8], "num_feat_extract_layers": 2, "feat_extract_norm": "layer"}
WAVES |= {"do_stable_layer_norm": True, "conv_bias": True, "num_conv_pos_embeddings": 5}
WAVES |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
WAVES |= {"mask_time_length": 3, "mask_feature_length": 4, "mask_feature_min_masks": 1}
RATES = {"feature": 0.1, "hidden": 0.15, "attention": 0.1, "activation": 0.1}
RATES |= {"layer": 0.3, "spectrogram": 0.3}
VARIED = {"noise_snr_db": [5, 20], "speed": 0.1, "gain_db": 6}


def wav(seconds: float, pitch: float, rate: int = RATE) -> bytes:
    wave = 0.5 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * pitch / rate)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.astype(np.float32), rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def clips(count: int) -> list[bytes]:
    """High and low ones in turn, of 0.2 to 0.3 s."""
    return [wav(0.2 + 0.01 * (n * 7 % 11), 300 + 20 * n + 900 * (n % 2)) for n in range(count)]


def save(folder, train: list[bytes]) -> str:
    parts = {"train": train, "validation": clips(8), "test": clips(12)}
    DatasetDict(
        {
            name: Dataset.from_dict(
                {
                    "audio": [{"bytes": data, "path": None} for data in part],
                    "label": ["low", "high"] * (len(part) // 2),
                    "number": list(range(len(part))),
                    "text": [f"tone {n}" for n in range(len(part))],
                }
            )
            for name, part in parts.items()
        }
    ).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("tones") / "data", clips(40))


@pytest.fixture(scope="module")
def make_config(saved):
    def make(model_type="wav2vec2", overrides=WAVES, audio=None, **sections) -> RunConfig:
        model = {"task": TASK.task, "model_type": model_type, "config_overrides": overrides}
        rate = {} if "whisper" in model_type else {"sampling_rate": RATE}
        data = {"path": saved, "augmentation": {"audio": audio or {}}} | sections.pop("data", {})
        values = {"train": {"global_batch_size": 16}, "dropout": RATES} | sections
        return RunConfig(name="tones", model=model | rate, data=data, **values)

    return make


def prepared_by(config):
    return prepare_data(config, load_raw(config), TASK.load_processor(config))


def collated(config, rows):
    return TASK.collator(TASK.load_processor(config), config)(rows)


def training_rows(config):
    stream = TrainingStream(prepared_by(config).train, config.seed, 20, 16)
    return [stream[k] for k in range(16, 32)]


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_mask", [True, False])
def test_inputs_are_those_that_the_extractor_makes_of_the_clips(make_config, has_mask):
    norm = {"feat_extract_norm": "layer" if has_mask else "group"}
    config = make_config(overrides=WAVES | norm | {"do_stable_layer_norm": has_mask})
    rows, extractor = list(prepared_by(config).test), TASK.load_processor(config)
    waves = [soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")[0] for row in rows]
    own = extractor(waves, sampling_rate=RATE, padding=True, return_attention_mask=True)
    batch = collated(config, rows)
    assert np.allclose(batch["input_values"], own["input_values"], atol=1e-5)
    assert ("attention_mask" in batch) == has_mask
    if has_mask:
        assert np.array_equal(batch["attention_mask"], own["attention_mask"])
    assert batch["labels"].tolist() == [row["labels"] for row in rows]


def test_clips_come_at_the_rate_of_the_extractor(make_config):
    config = make_config()
    rows = [{"audio": {"bytes": wav(0.5, 440, rate=22_050), "path": None}, "sample_id": 0}]
    assert collated(config, rows)["input_values"].shape == (1, RATE // 2)


def test_evaluation_hears_clips_as_they_are(make_config):
    rows = list(prepared_by(make_config()).test)
    plain, varied = (collated(make_config(audio=a), rows) for a in (None, VARIED))
    assert torch.equal(plain["input_values"], varied["input_values"])


def test_a_varied_sample_of_a_step_is_the_same_in_any_micro_batch(make_config):
    config = make_config(audio=VARIED)
    rows = training_rows(config)
    whole, plain = (collated(c, rows)["input_values"] for c in (config, make_config()))
    assert whole.shape != plain.shape
    for first, last in ((0, 4), (4, 8), (9, 10)):
        part = collated(config, rows[first:last])["input_values"]
        length = part.shape[1]
        assert torch.equal(part, whole[first:last, :length])
        assert not whole[first:last, length:].any()


def test_scored_rows_say_what_was_heard(make_config):
    config = make_config()
    described = TASK.described(prepared_by(config).test, TASK.load_processor(config))
    assert described["text"].to_pylist()[:2] == ["tone 0", "tone 1"]
    assert described["audio"].to_pylist()[3]["bytes"] == clips(4)[3]
    assert np.allclose(described["seconds"].to_numpy()[:3], [0.2, 0.27, 0.23], atol=2e-4)
    assert np.allclose(described["rms_db"].to_numpy(), 20 * np.log10(0.5 / np.sqrt(2)), atol=0.1)


# -- masks -----------------------------------------------------------------------------------------


def trained_by_hand(config, groups: list[list[dict]]):
    """Logits, accumulated gradients and masks of one step, in micro-batches."""
    names = load_raw(config).label_names
    plan = plan_for(config, names, TASK.load_processor(config))
    model = build_model(config, names, plan, TASK.load_processor(config)).double().train()
    keyed, logits, num_items = KeyedDropout(model, plan, config.seed), [], sum(map(len, groups))
    probe = Probe()
    keyed.observer = probe.observe
    for rows in groups:
        batch = collated(config, rows)
        labels, ids = batch.pop("labels"), batch.pop("sample_id")
        step = int(batch.pop("mask_step")[0])
        before = batch["input_values"].clone()
        with keyed.context(purpose="train", index=step, row_ids=ids):
            outputs = model(**batch | {"input_values": batch["input_values"].double()})
            TASK.loss(0.0)(outputs, labels, torch.tensor(num_items)).backward()
        assert torch.equal(batch["input_values"], before)
        logits.append(outputs.logits.detach())
    return torch.cat(logits), {n: p.grad for n, p in model.named_parameters()}, probe.masks


@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm"])
def test_sixteen_clips_at_once_are_sixteen_alone_and_four_times_four(make_config, model_type):
    config = make_config(model_type, audio=VARIED)
    rows = training_rows(config)
    assert len({len(collated(config, [row])["input_values"][0]) for row in rows}) > 8
    logits, gradients, masks = trained_by_hand(config, [rows])
    for size in (1, 4):
        parts = [rows[first : first + size] for first in range(0, 16, size)]
        other_logits, other_gradients, other_masks = trained_by_hand(config, parts)
        assert other_masks == masks
        assert torch.allclose(other_logits, logits, atol=1e-9)
        for name, gradient in gradients.items():
            assert (gradient is None) == (other_gradients[name] is None), name
            if gradient is not None:
                assert torch.allclose(other_gradients[name], gradient, atol=1e-9), name


def wave_sites(body: str, layers_left_out: tuple[int, ...] = (0, 1)) -> list[tuple[str, str]]:
    sites = [
        (f"{body}.feature_projection.dropout#0", "feature"),
        (f"{body}#0", "spectrogram"),
        (f"{body}#1", "spectrogram"),
        (f"{body}.encoder.dropout#0", "hidden"),
    ]
    for layer in range(2):
        at = f"{body}.encoder.layers.{layer}"
        sites += [(f"{at}#layer", "layer")] if layer in layers_left_out else []
        sites += [
            (f"{at}.attention#0", "attention"),
            (f"{at}.dropout#0", "hidden"),
            (f"{at}.feed_forward.intermediate_dropout#0", "activation"),
            (f"{at}.feed_forward.output_dropout#0", "hidden"),
        ]
    return sites


def whisper_sites() -> list[tuple[str, str]]:
    sites = [("encoder#0", "hidden")]
    for layer in range(2):
        at = f"encoder.layers.{layer}"
        sites += [
            (f"{at}#layer", "layer"),
            (f"{at}.self_attn#0", "attention"),
            (f"{at}#0", "hidden"),
            (f"{at}#1", "activation"),
            (f"{at}#2", "hidden"),
        ]
    return sites


def ast_sites() -> list[tuple[str, str]]:
    body = "audio_spectrogram_transformer"
    sites = [(f"{body}.embeddings.dropout#0", "embedding")]
    for layer in range(2):
        at = f"{body}.layers.{layer}"
        sites += [(f"{at}.attention#0", "attention")]
        sites += [(f"{at}.dropout#{call}", "hidden") for call in range(2)]
    return sites


WHISPER = {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 3, "decoder_layers": 1}
WHISPER |= {"encoder_ffn_dim": 40, "decoder_attention_heads": 3, "max_source_positions": 50}
WHISPER |= {"num_mel_bins": 16, "classifier_proj_size": 16, "decoder_ffn_dim": 40}
AST = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 8}
AST |= {"intermediate_size": 40, "max_length": 40, "num_mel_bins": 16, "time_stride": 8}
AST |= {"frequency_stride": 8}
SMALL = {
    "wav2vec2": (WAVES, RATES, wave_sites("wav2vec2")),
    "hubert": (WAVES, RATES, wave_sites("hubert")),
    "wavlm": (WAVES, RATES, wave_sites("wavlm", layers_left_out=(1,))),
    "whisper": (WHISPER, {"hidden": 0.1}, whisper_sites()),
    "audio-spectrogram-transformer": (AST, {"hidden": 0.1, "embedding": 0.1}, ast_sites()),
}


@pytest.mark.parametrize("model_type", SMALL)
def test_the_plan_lists_the_sites_of_a_list_made_by_hand(make_config, model_type):
    overrides, rates, sites = SMALL[model_type]
    config = make_config(model_type, overrides, dropout=rates)
    plan = plan_for(config, ("low", "high"), TASK.load_processor(config))
    assert [(site.label, site.role) for site in plan.sites] == sites


@pytest.mark.parametrize("model_type", SMALL)
def test_a_model_answers_a_batch_of_clips_with_the_extractor_made_for_it(make_config, model_type):
    overrides, rates, _ = SMALL[model_type]
    config = make_config(model_type, overrides, dropout=rates)
    batch = collated(config, list(prepared_by(config).test)[:3])
    extractor = TASK.load_processor(config)
    plan = plan_for(config, ("low", "high"), extractor)
    model = build_model(config, ("low", "high"), plan, extractor).eval()
    inputs = {n: v for n, v in batch.items() if n not in ("labels", "sample_id")}
    assert model(**inputs).logits.shape == (3, 2)


# -- what cannot be --------------------------------------------------------------------------------


def test_clips_that_cannot_be_used_are_set_aside_with_their_ids_and_reasons(make_config, tmp_path):
    broken = [b"RIFF", wav(0.05, 440), wav(0.0, 440), wav(0.3, 0)]
    path = save(tmp_path / "data", [*broken, *clips(76)])
    config = make_config(data={"path": path, "quarantine_budget": 0.05})
    data = prepared_by(config)
    assert [one.sample_id for one in data.set_aside] == [0, 1, 2, 3]
    found = " ".join(one.reason for one in data.set_aside)
    for reason in ("broken audio", "0.05 s long, asked for 0.1 to 30 s", "empty", "silent"):
        assert reason in found
    with pytest.raises(DataError, match=r"train: 4 of 80 samples cannot be used"):
        prepared_by(make_config(data={"path": path}))


def test_a_column_without_audio_is_named(make_config):
    with pytest.raises(DataError, match="column 'number' holds .*, not audio"):
        load_raw(make_config(data={"audio_column_name": "number"}))


@pytest.mark.parametrize(
    ("of", "to", "said"),
    [
        ("whisper", "wav2vec2", "makes input_features of 16 x 100, .* wav2vec2 takes input_values"),
        ("wav2vec2", "whisper", "makes input_values of waves, .* takes input_features of 16 x 100"),
    ],
)
def test_an_extractor_that_does_not_fit_is_named(make_config, of, to, said):
    extractor = TASK.load_processor(make_config(of, SMALL[of][0]))
    config = make_config(to, SMALL[to][0])
    with pytest.raises(ModelError, match=said):
        TASK.fit(model_config(config, None), extractor, config)


def test_a_model_without_attention_mask_is_said_to_hear_padding(make_config):
    group = make_config(overrides=WAVES | {"feat_extract_norm": "group"})
    assert "it hears the padding" in TASK.notes(TASK.load_processor(group))[0]
    assert TASK.notes(TASK.load_processor(make_config())) == []


def test_a_rate_beside_a_named_model_is_refused():
    with pytest.raises(ValueError, match="sampling_rate has no effect"):
        RunConfig(
            name="t",
            model={"task": TASK.task, "model_name_or_path": "x", "sampling_rate": RATE},
            data={"path": "unused"},
        )
