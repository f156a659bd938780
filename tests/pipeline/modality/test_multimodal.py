"""Rows of several channels: what each modality makes of them by itself, locked, judged, refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from pydantic import ValidationError

from pipeline.check import check
from pipeline.config.load import dump_config, load_config
from pipeline.config.schema import RunConfig
from pipeline.corpora import BUILTIN
from pipeline.data import load_raw, prepare_data
from pipeline.dropout.context import KeyedDropout
from pipeline.errors import DataError, InputError, ModelError
from pipeline.modality.bundle import modality_of
from pipeline.modality.channels import channel_run
from pipeline.modality.image_processor import load_image_processor
from pipeline.model import build_model, plan_for
from pipeline.trained import trained_processor
from pipeline.verify import stage, worker
from pipeline.verify.compare import compare
from pipeline.verify.layouts import parse_layouts

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24}
CHANNELS = {
    "image": {"modality": "image", "model_type": "convnext",
              "config_overrides": {"image_size": 8, "num_channels": 1, "patch_size": 1,
                                   "num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 1]}},
    "text": {"modality": "text", "model_type": "bert", "tokenizer_vocab_size": 300,
             "config_overrides": {"max_position_embeddings": 32, **SMALL}},
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """Some of the named digits, saved, with a column named by another name too."""
    folder, found = tmp_path_factory.mktemp("digits") / "rows", BUILTIN["builtin:named-digits"]()
    sizes = {"train": 48, "validation": 16, "test": 20, "photographs": 12}
    parts = {name: found[name].select(range(size)) for name, size in sizes.items()}
    DatasetDict(parts).map(lambda row: {"note": row["text"]}).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def make_config(digits, tmp_path):
    def make(channels=None, dropout=None, **data) -> RunConfig:
        return RunConfig.model_validate(
            {
                "name": "run",
                "output_dir": str(tmp_path / "runs"),
                "model": {
                    "task": "multimodal-classification",
                    "channels": channels or CHANNELS,
                    "config_overrides": {"projection_dim": 8, "fusion_dim": 12},
                },
                "data": {"path": digits, "max_length": 32, **data},
                "dropout": {"modality": {"image": 0.3, "text": 0.3}, **(dropout or {})},
                "train": {"global_batch_size": 16, "use_cpu": True, "max_steps": 2},
            }
        )

    return make


def opened(config):
    raw = load_raw(config)
    processor = modality_of(config).load_processor(config, raw.train)
    return raw, processor, prepare_data(config, raw, processor)


def test_a_batch_holds_what_each_modality_makes_of_its_column(make_config):
    config = make_config()
    raw, processor, data = opened(config)
    rows = [data.test[i] for i in (3, 0, 7)]
    batch = modality_of(config).collator(processor, config)(rows)
    images = load_image_processor(channel_run(config, "image"))
    tokens = processor.parts["text"]([raw.test[i]["text"] for i in (3, 0, 7)])["input_ids"]
    width = batch["text.input_ids"].shape[1]
    assert batch["text.input_ids"].tolist() == [t + [0] * (width - len(t)) for t in tokens]
    assert batch["text.attention_mask"].sum(1).tolist() == [len(t) for t in tokens]
    from pipeline.modality.images import decode_image

    pictures = [decode_image(raw.test[i]["image"], "L") for i in (3, 0, 7)]
    expected = images(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["image.pixel_values"], expected)
    assert batch["labels"].tolist() == [raw.test[i]["label"] for i in (3, 0, 7)]
    assert set(batch) == {"text.input_ids", "text.attention_mask", "image.pixel_values",
                          "labels", "sample_id"}  # fmt: skip


def test_other_columns_by_name_and_text_beside_text(make_config):
    two = {"text": CHANNELS["text"], "context": CHANNELS["text"]}
    config = make_config(two, {"modality": {"context": 0.5}},
                         channel_column_names={"context": "note"})  # fmt: skip
    assert config.data.channel_column_names == {"text": "text", "context": "note"}
    _, processor, data = opened(config)
    batch = modality_of(config).collator(processor, config)([data.train[0]])
    assert torch.equal(batch["text.input_ids"], batch["context.input_ids"])
    live = {site.site for site in plan_for(config, data.label_names, processor).in_force()}
    assert {"encoders.text_model.embeddings.dropout", "encoders.context_model.embeddings.dropout",
            "fusion.modality", "fusion.dropout"} < live  # fmt: skip


def test_out_of_distribution_sets_read_the_columns_of_the_run(make_config, digits):
    ood = {"photographs": {"path": digits, "split": "photographs"}}
    config = make_config(ood=ood, channel_column_names={"text": "note"})
    assert config.data.ood["photographs"].channel_column_names == {"image": "image", "text": "note"}
    assert len(opened(config)[2].ood["photographs"]) == 12


def test_a_configuration_comes_back_from_its_dump(make_config, tmp_path):
    config = make_config()
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.yaml") == config


@pytest.mark.parametrize("layout", ["single", "accumulate:4", "checkpointing"])
def test_masks_gradients_and_weights_are_those_of_a_plain_loop(make_config, tmp_path, layout):
    config = make_config(dropout={"hidden": 0.2, "attention": 0.2, "head": 0.2})
    expected = stage.reference(config, tmp_path)
    (wanted,) = parse_layouts(layout)
    folder = tmp_path / "layout"
    folder.mkdir()
    worker.run(stage.short_run(config, wanted, folder), folder, wanted)
    outcome = compare(layout, stage.gather(folder), expected, 0.0)
    assert outcome.equal, outcome
    assert any("fusion.modality#0" in site for site in expected.masks["0"])
    assert outcome.gradient_difference < 1e-5


def logits(config, plan, data, processor, model, ids):
    keyed = KeyedDropout(model.train(), plan, config.seed)
    batch = modality_of(config).collator(processor, config)([data.train[i] for i in ids])
    rows = batch.pop("sample_id")
    batch.pop("labels")
    with keyed.context(purpose="train", index=0, row_ids=rows) as active:
        found = model(**batch).logits.detach()
    assert keyed.missing(active) == []
    keyed.release()
    return found


def test_a_sample_has_the_same_logits_beside_any_others(make_config):
    config = make_config()
    _, processor, data = opened(config)
    plan = plan_for(config, data.label_names, processor)
    model = build_model(config, data.label_names, plan, processor)
    whole = logits(config, plan, data, processor, model, range(8))
    part = logits(config, plan, data, processor, model, (5, 2))
    assert torch.allclose(part, whole[[5, 2]], atol=1e-6)


def test_processors_come_back_from_the_folder_of_a_run(make_config, tmp_path):
    from pipeline.records import RunFolder

    config = make_config()
    _, processor, data = opened(config)
    run = RunFolder(tmp_path / "saved")
    processor.save_pretrained(run.model)
    again = trained_processor(run, config)
    rows = [data.test[i] for i in range(4)]
    one, other = (modality_of(config).collator(p, config)(rows) for p in (processor, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_pretrained_encoders_keep_their_weights(make_config, tmp_path):
    from transformers import AutoModel

    from pipeline.modality.tokenizer import load_tokenizer

    plain = make_config()
    _, processor, data = opened(plain)
    text_run = channel_run(plain, "text")
    sub = plan_model_config(plain, data, processor).text_config
    torch.manual_seed(9)
    encoder = AutoModel.from_config(sub)
    encoder.save_pretrained(tmp_path / "bert")
    load_tokenizer(text_run, data.train["text"][:]).save_pretrained(tmp_path / "bert")
    named = {"modality": "text", "model_name_or_path": str(tmp_path / "bert")}
    config = make_config({**CHANNELS, "text": named})
    plan = plan_for(config, data.label_names, processor)
    model = build_model(config, data.label_names, plan, processor)
    found = model.encoders.text_model.state_dict()
    expected = encoder.state_dict()
    assert found.keys() == {name for name in expected if not name.startswith("pooler.")}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def saved_encoders(folder, config, data, processor) -> dict:
    """The encoders of a run from scratch with their processors, and channels that name them."""
    from transformers import AutoModel

    hf_config = plan_model_config(config, data, processor)
    channels = {}
    for name, channel in CHANNELS.items():
        AutoModel.from_config(hf_config.of_channel(name)).save_pretrained(folder / name)
        processor.parts[name].save_pretrained(folder / name)
        place = str(folder / name)
        channels[name] = {"modality": channel["modality"], "model_name_or_path": place}
    return channels


def test_an_adapter_trains_what_joins_the_channels_too(make_config, tmp_path):
    plain = make_config()
    _, processor, data = opened(plain)
    channels = saved_encoders(tmp_path, plain, data, processor)
    given = make_config(channels).model_dump()
    given["peft"] = {"target_modules": ["query", "value"], "r": 2}
    config = RunConfig.model_validate(given)
    plan = plan_for(config, data.label_names, processor)
    model = build_model(config, data.label_names, plan, processor)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {"lora" if "lora_" in n else "fusion" if ".fusion." in n else n for n in trained}
    assert parts == {"lora", "fusion"}
    assert "fusion.modality" in {site.site for site in plan.in_force()}
    given["model"]["channels"] = CHANNELS
    with pytest.raises(ValidationError, match="peft adapts pretrained weights"):
        RunConfig.model_validate(given)


def plan_model_config(config, data, processor):
    from pipeline.model_config import model_config

    hf_config = model_config(config, data.label_names)
    modality_of(config).fit(hf_config, processor, config)
    return hf_config


def test_scored_rows_describe_every_channel(make_config):
    config = make_config()
    raw, processor, data = opened(config)
    modality = modality_of(config)
    found = modality.described(data.test, processor)
    assert set(found) == set(modality.described_names)
    assert found["text"].to_pylist() == raw.test["text"][:]
    assert np.all(found["image_width"].to_numpy() == 8)
    assert modality.lengths(data.test) == found["text_num_tokens"].to_pylist()


WRONG = {
    "an unknown channel's rate": (
        {"dropout": {"modality": {"sound": 0.1}}},
        r"dropout.modality.sound: the model has no such channel \(it has: image, text\)",
    ),
    "rates above one": (
        {"dropout": {"modality": {"image": 0.6, "text": 0.6}}},
        "add up to 1.2, above 1",
    ),
    "an unknown channel's column": (
        {"channel_column_names": {"sound": "a"}},
        "data.channel_column_names.sound: the model has no such channel",
    ),
    "one channel alone": ({"channels": {"text": CHANNELS["text"]}}, "there is one only"),
    "a name that is none": (
        {"channels": {**CHANNELS, "my text": CHANNELS["text"]}},
        "'my text' cannot be a name",
    ),
    "a channel without a model": (
        {"channels": {**CHANNELS, "text": {"modality": "text"}}},
        "give exactly one of model_name_or_path",
    ),
    "mixed images": (
        {"augmentation": {"image": {"mixup_alpha": 0.2}}},
        "mixes images and labels: not those of channels",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_configuration_is_refused(make_config, wrong):
    given, said = WRONG[wrong]
    with pytest.raises(ValidationError, match=said):
        make_config(**given)


def test_modality_dropout_needs_channels(run_config):
    with pytest.raises(ValidationError, match=r"no such channel \(it has: none\)"):
        run_config(dropout={"modality": {"text": 0.1}})
    with pytest.raises(ValidationError, match="channels are for multimodal-classification"):
        run_config(model={"channels": CHANNELS})


def test_a_missing_column_and_a_column_of_another_kind_are_named(make_config):
    missing = make_config(channel_column_names={"text": "words"})
    with pytest.raises(DataError, match=r"no column 'words'.*channel_column_names.text"):
        load_raw(missing)
    with pytest.raises(DataError, match="channel image: column 'label' holds"):
        load_raw(make_config(channel_column_names={"image": "label"}))


def test_a_broken_image_is_set_aside_with_its_channel(make_config, digits, tmp_path):
    from datasets import load_from_disk

    rows = load_from_disk(digits)
    broken = [{"bytes": b"no image", "path": None} if i == 2 else row["image"]
              for i, row in enumerate(rows["test"])]  # fmt: skip
    columns = {name: rows["test"][name][:] for name in ("text", "label")} | {"image": broken}
    rows["test"] = Dataset.from_dict(columns, features=rows["test"].select_columns(
        ["text", "label", "image"]).features)  # fmt: skip
    rows.save_to_disk(tmp_path / "broken")
    config = make_config(path=str(tmp_path / "broken"), quarantine_budget=0.1)
    (aside,) = opened(config)[2].set_aside
    assert (aside.split, aside.sample_id) == ("test", 2)
    assert aside.reason.startswith("channel image: ")


def test_an_error_about_an_encoder_names_its_channel(make_config):
    odd = {**CHANNELS["image"], "config_overrides": {"image_siz": 8}}
    said = "Channel image: model.channels.image.config_overrides: convnext has no image_siz"
    with pytest.raises(ModelError, match=said):
        plan_for(make_config({**CHANNELS, "image": odd}))
    reads_text = {**CHANNELS["text"], "modality": "image"}
    with pytest.raises(InputError, match="channel"):
        check(make_config({"image": reads_text, "text": CHANNELS["text"]}))


def test_a_text_longer_than_its_encoder_allows_is_refused(make_config):
    with pytest.raises(InputError, match=r"data.max_length is 64.*allows 32 positions"):
        check(make_config(max_length=64))
