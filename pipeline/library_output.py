"""What the libraries underneath may say: warnings and errors that matter, but no bars, no old news.

Each function silences one thing that is expected where it is called; everything else stays visible.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_REPORTING_LOGGERS = ("transformers.modeling_utils", "transformers.modeling_layers")


def without_data_bars() -> None:
    """No bar of `datasets` for every set that is prepared; holds once it is imported after this."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def without_waiting_lines() -> None:
    """One sentence while the hub does not answer, instead of two a try; none on a lack of GPU.

    Nor on that of a faster kernel, which bitsandbytes would fetch from the hub.
    """
    logging.getLogger("huggingface_hub.utils._http").addFilter(_FirstRetry())
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def without_old_collectives() -> None:
    """No warning, in every step, that DeepSpeed calls collectives by names that torch will drop."""
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )


@contextmanager
def without_old_names() -> Iterator[None]:
    """No warning that peft asks a model by a name that transformers will drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """No bar of transformers over the weights that are read or written; those of downloads stay."""
    from transformers.utils import logging as library

    previous = library.set_tqdm_hook(_no_bar)
    try:
        yield
    finally:
        library.set_tqdm_hook(previous)


@contextmanager
def without_load_report() -> Iterator[None]:
    """No bar over the weights, and no table of new ones: the caller says what is unexpected.

    When loading fails, the table is shown: the error refers to it.
    """
    held: list[tuple[logging.Logger, logging.LogRecord]] = []
    filters = {logging.getLogger(name): _Holding(held) for name in _REPORTING_LOGGERS}
    for logger, one in filters.items():
        logger.addFilter(one)
    try:
        with without_bars():
            yield
    except BaseException:
        for logger, record in held:
            logger.callHandlers(record)
        raise
    finally:
        for logger, one in filters.items():
            logger.removeFilter(one)


class _FirstRetry(logging.Filter):
    """Turns the first failed request into a sentence and drops the others."""

    has_spoken = False

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "thrown while requesting" not in message and not message.startswith("Retrying in"):
            return True
        record.msg, record.args = (
            "The hub does not answer; trying for half a minute (not at all with HF_HUB_OFFLINE=1).",
            (),
        )
        is_first, self.has_spoken = not self.has_spoken, True
        return is_first


class _Holding(logging.Filter):
    """Holds back reports of loading."""

    def __init__(self, held: list[tuple[logging.Logger, logging.LogRecord]]) -> None:
        super().__init__()
        self.held = held

    def filter(self, record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return True
        self.held.append((logging.getLogger(record.name), record))
        return False


def _no_bar(factory: Any, args: Any, kwargs: Any) -> Any:
    from transformers.utils.logging import EmptyTqdm

    return EmptyTqdm(*args, **kwargs)
