"""Images as batches: the processor's own pixels, varied and mixed by key, whoever loads them."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from scipy import stats

from pipeline.config.schema import RunConfig
from pipeline.data import TrainingStream, load_raw, prepare_data
from pipeline.errors import DataError, ModelError
from pipeline.modality import MODALITIES
from pipeline.modality.image_mixing import is_mixing, mixed
from pipeline.modality.losses import classification_loss
from pipeline.model_config import model_config

TASK = MODALITIES["image-classification"]
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def make_config(data=None, model=None, **image) -> RunConfig:
    return RunConfig(
        name="t",
        model={
            "task": "image-classification",
            "model_type": "vit",
            "config_overrides": VIT,
            **(model or {}),
        },
        data={"path": "builtin:digits", "augmentation": {"image": image}, **(data or {})},
        train={"global_batch_size": 8},
    )


@pytest.fixture(scope="module")
def prepared():
    config = make_config()
    return prepare_data(config, load_raw(config), TASK.load_processor(config))


def collated(config, rows):
    return TASK.collator(TASK.load_processor(config), config)(rows)


def stream(prepared, config, with_partners=False):
    return TrainingStream(prepared.train, config.seed, 20, 8, with_partners)


def test_pixels_are_those_that_the_processor_makes_of_the_files(prepared):
    config, rows = make_config(), [prepared.test[i] for i in range(5)]
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
    expected = TASK.load_processor(config)(images=images, return_tensors="pt")["pixel_values"]
    batch = collated(config, rows)
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [row["labels"] for row in rows]


def test_evaluation_sees_images_as_they_are(prepared):
    rows = [prepared.test[i] for i in range(5)]
    varied = make_config(horizontal_flip=1.0, shift_pixels=2)
    plain = collated(make_config(), rows)["pixel_values"]
    assert torch.equal(collated(varied, rows)["pixel_values"], plain)


MIXES = [{"shift_pixels": 1}, {"mixup_alpha": 0.4}, {"cutmix_alpha": 1.0},
         {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "rand_augment_operations": 2}]  # fmt: skip


@pytest.mark.parametrize("image", MIXES)
def test_a_sample_of_a_step_is_the_same_in_any_micro_batch(prepared, image):
    config = make_config(**image)
    rows = stream(prepared, config, is_mixing(config.data.augmentation.image))
    whole = collated(config, [rows[k] for k in range(8, 16)])
    for first, last in ((8, 12), (12, 16), (13, 14)):
        part = collated(config, [rows[k] for k in range(first, last)])
        assert torch.equal(part["pixel_values"], whole["pixel_values"][first - 8 : last - 8])
        assert torch.equal(part["labels"], whole["labels"][first - 8 : last - 8])


def test_partners_are_a_permutation_of_the_global_batch_and_change_with_the_step(prepared):
    config = make_config(mixup_alpha=0.4)
    rows = stream(prepared, config, with_partners=True)
    pairs = []
    for step in range(3):
        batch = [rows[k] for k in range(8 * step, 8 * step + 8)]
        own, others = ([row[f] for row in batch] for f in ("sample_id", "partner"))
        assert sorted(own) == sorted(other["sample_id"] for other in others)
        pairs.append([own.index(other["sample_id"]) for other in others])
    assert pairs[0] != pairs[1] != pairs[2]


def test_mixup_is_the_weighed_sum_of_both_images(prepared):
    config = make_config(mixup_alpha=0.4)
    rows = [stream(prepared, config, with_partners=True)[k] for k in range(8)]
    batch = collated(config, rows)
    plain = make_config()
    own = collated(plain, [{k: v for k, v in row.items() if k != "partner"} for row in rows])
    other = collated(plain, [row["partner"] for row in rows])
    share = batch["labels"][:, 2].float()[:, None, None, None]
    expected = share * own["pixel_values"] + (1 - share) * other["pixel_values"]
    assert torch.allclose(batch["pixel_values"], expected, atol=1e-6)
    assert batch["labels"][:, 0].tolist() == own["labels"].tolist()
    assert batch["labels"][:, 1].tolist() == other["labels"].tolist()


def test_cutmix_pixels_come_from_either_image_in_the_share_of_the_label(prepared):
    config = make_config(cutmix_alpha=1.0)
    rows = [stream(prepared, config, with_partners=True)[k] for k in range(8)]
    batch = collated(config, rows)
    plain = make_config()
    own = collated(plain, [{k: v for k, v in row.items() if k != "partner"} for row in rows])
    other = collated(plain, [row["partner"] for row in rows])
    for pixels, mine, theirs, label in zip(
        batch["pixel_values"], own["pixel_values"], other["pixel_values"], batch["labels"],
        strict=True,
    ):  # fmt: skip
        assert ((pixels == mine) | (pixels == theirs)).all()
        from_mine = (pixels == mine).double().mean()
        assert from_mine >= label[2] - 1e-9  # equal pixels of both count too


def test_shares_follow_the_beta_distribution(prepared):
    config = make_config(mixup_alpha=0.4)
    ids = list(range(1000))
    batch = {"pixel_values": torch.zeros(1000, 1, 2, 2), "labels": torch.zeros(1000).long()}
    shares = mixed(batch, batch, config, ids, step=0)["labels"][:, 2]
    assert stats.kstest(shares.numpy(), stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_the_loss_of_pairs_is_the_weighed_cross_entropy_over_all_items():
    torch.manual_seed(0)
    logits = torch.randn(6, 4)
    labels = torch.tensor([[0, 1, 0.3], [2, 2, 0.9], [3, 0, 1.0]] * 2, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    expected = torch.stack(
        [-(s * log_p[i, int(a)] + (1 - s) * log_p[i, int(b)]) for i, (a, b, s) in enumerate(labels)]
    ).sum()
    outputs, loss = {"logits": logits}, classification_loss(0.0)
    assert torch.allclose(loss(outputs, labels, torch.tensor(6 * 3 * 2)), expected / 12)
    assert torch.allclose(loss(outputs, labels), expected / 6)


# -- what cannot be --------------------------------------------------------------------------------


def files(*contents):
    return [{"bytes": content, "path": None} for content in contents]


@pytest.fixture
def saved(tmp_path):
    """A saved data set of images with some broken ones in the training rows."""

    def saved(num_broken, num_rows=200):
        buffer = io.BytesIO()
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")
        good, bad = buffer.getvalue(), buffer.getvalue()[:50]
        contents = [bad] * num_broken + [good] * (num_rows - num_broken)
        splits = {
            name: Dataset.from_dict({"image": files(*part), "label": ["a", "b"] * (len(part) // 2)})
            for name, part in (
                ("train", contents),
                ("validation", [good] * 20),
                ("test", [good] * 20),
            )
        }
        DatasetDict(splits).save_to_disk(tmp_path / "data")
        return make_config({"path": str(tmp_path / "data")})

    return saved


def test_a_few_broken_images_are_set_aside_with_their_ids(saved):
    config = saved(num_broken=2)
    data = prepare_data(config, load_raw(config), TASK.load_processor(config))
    assert [one.sample_id for one in data.set_aside] == [0, 1]
    assert data.train["sample_id"][:] == list(range(2, 200))
    assert "2 samples of train are set aside: see quarantine.jsonl" in data.notes


def test_many_broken_images_are_one_error(saved):
    config = saved(num_broken=10)
    with pytest.raises(DataError, match=r"10 of 200 samples cannot be used[\s\S]*broken image"):
        prepare_data(config, load_raw(config), TASK.load_processor(config))


def test_a_column_without_images_is_named():
    config = make_config({"image_column_name": "label"})
    with pytest.raises(DataError, match="column 'label' holds .*, not images"):
        load_raw(config)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({"image_size": 16}, "8 x 8 pixels"), ({"num_channels": 3}, "makes 1 channels")],
)
def test_a_processor_that_does_not_fit_is_named(overrides, said):
    processor = TASK.load_processor(make_config())
    other = make_config(model={"config_overrides": {**VIT, **overrides}})
    with pytest.raises(ModelError, match=said):
        TASK.fit(model_config(other, None), processor, other)
