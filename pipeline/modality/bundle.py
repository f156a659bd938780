"""What differs from one modality to the next, as one value a task; nobody else asks further."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pipeline.config.schema import DataSource, RunConfig
from pipeline.dropout.philox import permutation

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedConfig

LabelNames = tuple[str, ...] | None
CONVERSATIONS = "conversations"
Predicts = Literal["classes", "next_tokens"]

# Which samples a limit keeps is the same under every seed, so that runs with different seeds train
# and are judged on the same ones. Epoch -1 comes before every epoch of training: the draw is used
# for nothing else.
CHOICE_SEED, CHOICE_EPOCH = 0, -1


class Prepare(Protocol):
    """Raw rows to model inputs; see `Modality.prepare`."""

    def __call__(
        self,
        rows: "Dataset",
        source: DataSource,
        config: RunConfig,
        processor: Any,
        label_names: LabelNames,
        /,
        *,
        max_samples: int | None = None,
    ) -> "Dataset": ...


class LoadProcessor(Protocol):
    """See `Modality.load_processor`."""

    def __call__(self, config: RunConfig, rows: "Dataset | None" = None, /) -> Any: ...


@dataclass(frozen=True)
class Prompt:
    """A prepared row cut where generation starts."""

    row: dict[str, Any]
    reference: list[int]
    """The tokens that really followed."""


@dataclass(frozen=True)
class Modality:
    """Everything one task does its own way."""

    task: str
    """Hugging Face pipeline task name, or `conversations`: text-generation on rows of messages."""
    auto_class: str
    """Name of the model class in transformers."""
    predicts: Predicts
    """`classes`: logits [B, C]. `next_tokens`: logits [B, L, V], each place of which predicts the
    label one place on."""
    metric_names: tuple[str, ...]
    """Metrics of evaluation during training."""
    one_sample_a_row: bool
    """Whether a raw row is a sample (else only preparing tells how many samples there are)."""
    needs_labels: bool
    """Whether training, validation and test rows carry a label column."""
    inputs: Callable[[DataSource], dict[str, str]]
    """The columns that rows must have beside the label, by the configuration's name for each."""
    label_names: Callable[["Dataset", DataSource], LabelNames]
    """Names of the classes, from the training rows; None for tasks without."""
    problems: Callable[["Dataset", DataSource, LabelNames], Iterator[str]]
    """A sentence for each thing wrong in rows with the needed columns; labels only with names."""
    load_processor: LoadProcessor
    """What makes model inputs of rows: the model's own tokenizer, image processor or feature
    extractor, or one made from the training rows; without rows, one that is named."""
    fit: Callable[["PreTrainedConfig", Any, RunConfig], None]
    """Give a model's configuration what follows from the processor; refuse one unfit for it."""
    example: Callable[["PreTrainedConfig", int, int, str], dict[str, "Tensor"]]
    """Inputs of a forward pass to trace: batch size, length (or side), device."""
    lengths: Callable[["Dataset"], list[int]]
    """How long each prepared sample is: those of like length share batches."""
    judge: Callable[[Mapping[str, Any], RunConfig], Any] | None
    """Refuses a prepared sample that cannot be used, by `BadSample`; None where none is broken."""
    described: Callable[["Dataset", Any], dict[str, "pa.Array"]]
    """From prepared samples and the processor: what scored rows say of their input, `text` among
    it, and what it takes to make it again (`image`, `audio`, `input_ids`)."""
    described_names: tuple[str, ...]
    """The columns that `described` gives."""
    prepare: Prepare
    """Adds model inputs and `sample_id`, the sample's number in its whole split, and keeps `text`.

    At most `max_samples` are chosen by key *after* they are numbered: a sample keeps its id, and so
    its masks, under every limit. No labels are added without label names (an OOD set).
    """
    collator: Callable[[Any, RunConfig], Callable[[list[dict[str, Any]]], dict[str, "Tensor"]]]
    """Rows to one padded batch: inputs, labels, `sample_id`, and `mask_step` if rows have it."""
    loss: Callable[[float], Callable[[Any, "Tensor", "Tensor | int | None"], "Tensor"]]
    """From the label smoothing: the Trainer's `compute_loss_func`, sum / items of the batch."""
    eval_sums: Callable[["Tensor", "Tensor"], dict[str, "Tensor"]]
    """From logits and labels of a batch: sums that add over batches and processes."""
    eval_metrics: Callable[[Mapping[str, "Tensor"]], dict[str, float]]
    """From the added sums: one number for each of `metric_names`."""
    notes: Callable[[Any], list[str]]
    """From the processor: what the user should know about how rows are prepared."""
    optional_inputs: Callable[[DataSource], tuple[str, ...]] = lambda source: ()
    """Columns that are read where rows have them, such as transcripts."""
    freeze: Callable[[Any], None] | None = None
    """Freeze what the task never reads of a model, before adapters come in."""
    prompt: Callable[[Mapping[str, Any], int], Prompt | None] | None = None
    """From a prepared row and a number of tokens (of plain text): where generation starts; None for
    a row in which nothing follows. No function: the task's models generate nothing."""
    prompt_collator: (
        Callable[[Any, RunConfig], Callable[[list[dict[str, Any]]], dict[str, "Tensor"]]] | None
    ) = None
    """Rows of prompts to one batch that `generate` takes: without labels, padded on the left."""
    channels: tuple[str, ...] = ()
    """Names of the channels of a row, in the model's order; none where a row has one input."""
    of_run: Callable[["Modality", RunConfig], "Modality"] = lambda modality, config: modality
    """The bundle for one run, where what rows hold follows from its configuration."""


MODALITIES: dict[str, Modality] = {}


def register(modality: Modality) -> Modality:
    """Makes a task known; a second bundle for the same task is a mistake."""
    if modality.task in MODALITIES:
        raise ValueError(
            f"The task {modality.task!r} is registered twice. "
            f"Tasks so far: {', '.join(MODALITIES)}. Give the new bundle its own task name."
        )
    MODALITIES[modality.task] = modality
    return modality


def modality_of(config: RunConfig) -> Modality:
    """The bundle of a run: that of its task, as this configuration wants it."""
    found = MODALITIES[config.model.task]
    return found.of_run(found, config)


def of_rows(modality: Modality, config: RunConfig) -> Modality:
    """The bundle of conversations where rows are such (`Modality.of_run` of text-generation)."""
    return MODALITIES[CONVERSATIONS] if config.data.is_conversation else modality


def chosen(num_samples: int, max_samples: int | None) -> list[int] | None:
    """Numbers of the samples that a limit keeps, in rising order; None for all of them."""
    if max_samples is None or max_samples >= num_samples:
        return None
    keep = permutation(CHOICE_SEED, CHOICE_EPOCH, num_samples)[:max_samples]
    return sorted(int(number) for number in keep)


def kept_numbers(num_samples: int, max_samples: int | None) -> list[int]:
    """Numbers of the samples that are kept, all of them where there is no limit."""
    keep = chosen(num_samples, max_samples)
    return list(range(num_samples)) if keep is None else keep


def kept_rows(rows: "Dataset", max_samples: int | None) -> "tuple[Dataset, list[int]]":
    """Rows of which each is a sample, as many as a limit keeps, and their numbers."""
    numbers = kept_numbers(len(rows), max_samples)
    return (rows if len(numbers) == len(rows) else rows.select(numbers)), numbers
