"""Keys, canonical names of sites, row ids."""

import json
from hashlib import blake2b
from pathlib import Path

import pytest

from pipeline.dropout.key import canonical_site, derive_key, derive_keys, row_id, signed
from pipeline.errors import DropoutError

VECTORS = json.loads(Path(__file__).with_name("mask_vectors.json").read_text())


@pytest.mark.parametrize("case", VECTORS["keys"], ids=lambda case: case["key"])
def test_a_key_is_the_published_one(case):
    assert f"{derive_key(*case['arguments']):016x}" == case["key"]


def test_a_key_is_the_hash_of_its_coordinates_joined_by_zero_bytes():
    text = "\0".join(["masklock-v1", "3", "mc", "12", "token", "a.b", "1"])
    expected = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    assert derive_key(3, "mc", 12, "token", "a.b", 1) == expected


def test_keys_of_a_whole_step_equal_keys_made_one_by_one():
    sites = [("element", "a.b", 0), ("attention", "a.c", 0), ("element", "a.b", 1)]
    one_by_one = [derive_key(7, "train", 3, *site) for site in sites]
    assert derive_keys(7, "train", 3, sites) == one_by_one


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp",
        "module.model.layers.0.mlp",
        "_orig_mod.module.model.layers.0.mlp",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.mlp",
        "model.layers.0._checkpoint_wrapped_module.mlp",
        "base_model.model.model.layers.0.mlp",
        "module.base_model.model.model.layers.0.mlp.base_layer",
        "base_model.model.model.layers.0.modules_to_save.default.mlp",
        "base_model.model.model.layers.0.mlp.modules_to_save.other",
    ],
)
def test_a_site_has_one_name_whatever_wraps_its_model(name):
    assert canonical_site(name) == "model.layers.0.mlp"


@pytest.mark.parametrize(
    "name", ["", "submodule.x", "a.module", "base_model.encoder.x", "x.lora_dropout.default"]
)
def test_names_that_only_resemble_wrappers_stay(name):
    assert canonical_site(name) == name


def test_a_row_id_holds_sample_and_view():
    assert row_id(5) == 5
    assert row_id(5, view=254) == 5 + (254 << 56)


@pytest.mark.parametrize(("sample", "view"), [(-1, 0), (2**56, 0), (0, 255), (0, -1)])
def test_a_row_id_that_would_be_anothers_is_refused(sample, view):
    with pytest.raises(DropoutError, match=r"lie between 0 and"):
        row_id(sample, view)


@pytest.mark.parametrize("value", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_signed_keeps_all_64_bits(value):
    assert signed(value) % 2**64 == value
    assert -(2**63) <= signed(value) < 2**63
