"""The configurations of a retraining, from its recipe."""

from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.records import sha256_of_file

SPLITS = ("train", "validation", "test")


def challenger_config(
    recipe: RunConfig, name: str, data: Path, champion: Path, start: Path | None = None
) -> RunConfig:
    """The recipe with the rows of this retraining, starting from other weights if there are any.

    A tokenizer that the recipe would train is the champion's: with another one, neither the blocks
    of a text nor what is said per token could be compared.

    Args:
        data: folder with train, validation and test.parquet.
        champion: the champion's model folder, which holds its tokenizer.
        start: folder with the champion's whole weights in Hugging Face format.
    """
    changed = recipe.model_dump(mode="json")
    changed["name"] = name
    changed["data"] |= _rows_of(data)
    model = changed["model"]
    if model["model_name_or_path"] is None and model["tokenizer_name_or_path"] is None:
        name_of = "processor_name_or_path" if model["channels"] else "tokenizer_name_or_path"
        model[name_of] = str(champion)
    if start is not None:
        model |= {
            "model_name_or_path": str(start),
            "model_type": None,
            "config_overrides": {},
            "weights_sha256": _sum_of(start / "model.safetensors"),
            "tokenizer_name_or_path": None,
        }
    return RunConfig.model_validate(changed)


def bench_config(champion: RunConfig, challenger: RunConfig, name: str) -> RunConfig:
    """The champion judged as the challenger is: same rows, same seed, same passes.

    What its weights were trained with stays its own; nothing of it is sent anywhere.
    """
    changed, other = (one.model_dump(mode="json") for one in (champion, challenger))
    own = {key: changed["data"][key] for key in ("max_length", "packing", "domain_column_name")}
    changed |= {"name": name, "seed": other["seed"], "evaluation": other["evaluation"]}
    changed["data"] = other["data"] | own
    changed["wandb"] |= {"mode": "disabled"}
    return RunConfig.model_validate(changed)


def _sum_of(weights: Path) -> str | None:
    """Checked whenever they are loaded; None where they are in several files."""
    return sha256_of_file(weights) if weights.is_file() else None


def _rows_of(folder: Path) -> dict[str, Any]:
    return {
        "path": "parquet",
        "name": None,
        "data_files": {split: str(folder / f"{split}.parquet") for split in SPLITS},
        "data_dir": None,
        "revision": None,
        "max_eval_samples": None,
        **{f"{split}_split": split for split in SPLITS},
    }
