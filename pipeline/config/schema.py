"""The shape of a run's YAML file. Single fields are checked here, pairs in `RunConfig`; files and models are not touched.

The string under a field is its documentation: `masklock schema` hands it to editors.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config.augmentation import Augmentation
from pipeline.config.channels import (
    ChannelConfig,
    channel_problems,
    column_problems,
    is_multimodal,
    rate_problems,
    with_column_names,
)
from pipeline.config.dropout import DropoutConfig
from pipeline.config.generation import SequenceConfig
from pipeline.config.monitoring import MonitoringConfig
from pipeline.config.roles import (
    NonNegativeFloat,
    PositiveInt,
    Rate,
    Section,
)
from pipeline.config.task_problems import conversation_problems, memorisation_problems
from pipeline.config.training import TrainConfig

Task = Literal[
    "text-classification",
    "text-generation",
    "image-classification",
    "image-text-to-text",
    "audio-classification",
    "multimodal-classification",
]


class ModelConfig(Section):
    """Which model, for which task."""

    task: Task
    """Hugging Face pipeline task name."""
    model_name_or_path: str | None = None
    """Hub name, local folder, or `package:NAME/FOLDER` for weights that an installed Python package carries."""
    model_type: str | None = None
    """Architecture to train from scratch (`llama`, `gpt2`, ...), instead of `model_name_or_path`."""
    config_overrides: dict[str, Any] = {}
    """Fields of the model's own configuration to set, such as `{num_hidden_layers: 4}`."""
    channels: dict[str, ChannelConfig] = {}
    """multimodal-classification: an encoder for each named channel of a row, instead of one model; `config_overrides` are then those of what joins them."""
    model_revision: str = "main"
    """Branch, tag or commit on the hub."""
    weights_sha256: str | None = None
    """If given, the sha256 that `model.safetensors` must have; checked before it is loaded."""
    tokenizer_name_or_path: str | None = None
    """Defaults to the model's. Without either, a byte-level BPE is trained on the training text."""
    processor_name_or_path: str | None = None
    """Image processor or feature extractor; defaults to the model's. A model from scratch gets one of its size."""
    sampling_rate: PositiveInt | None = None
    """Of audio, in Hz, for a model from scratch (default 16,000); others have their extractor's."""
    tokenizer_vocab_size: PositiveInt = 4096
    """Vocabulary size of a tokenizer trained here."""
    trust_remote_code: bool = False
    """Run code from the hub repository. Leave off unless you have read it."""
    attn_implementation: str | None = None
    """`eager`, `sdpa`, `flash_attention_2`, ...; by default `keyed` (or `eager`) where attention dropout is live, else the model's own."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type the weights are loaded in."""
    quantization_config: dict[str, Any] | None = None
    """Quantize pretrained weights under an adapter (QLoRA): `{quant_method: bitsandbytes, load_in_4bit: true, ...}`, the fields of the installed transformers' class; needs a peft section."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelConfig":
        given = [self.model_name_or_path is not None, self.model_type is not None]
        if self.channels and any(given):
            raise ValueError("each channel names its own model: leave out that of the whole")
        if not self.channels and given[0] == given[1] and not is_multimodal(self.task):
            raise ValueError(
                "give exactly one of model_name_or_path (pretrained) and model_type (from scratch)"
            )
        if problems := channel_problems(self.task, self.channels):
            raise ValueError("; ".join(problems))
        named = self.processor_name_or_path or self.model_name_or_path
        if self.sampling_rate is not None and named is not None:
            raise ValueError(
                f"sampling_rate has no effect: the feature extractor of {named} has its own"
            )
        return self


class DataSource(Section):
    """One data set: what `datasets.load_dataset` takes, or `builtin:NAME`."""

    path: str
    """Hub data set, `parquet` / `json` / `csv` / `text` with data_files, a saved folder, or `builtin:python-stdlib`."""
    name: str | None = None
    """Configuration of the data set."""
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    """Files, or files by split."""
    data_dir: str | None = None
    """Folder that the data set script or loader reads."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str | None = None
    """Split to read, where one is read (OOD sets); default: the only one, or `test`."""
    text_column_name: str = "text"
    """Column with the text."""
    image_column_name: str = "image"
    """Column with the image: encoded bytes, a path, or a data set's Image feature."""
    audio_column_name: str = "audio"
    """Column with the audio: encoded bytes, a path, or a data set's Audio feature."""
    channel_column_names: dict[str, str] = {}
    """Column of each channel (multimodal-classification); by default the one that has the channel's name, in an OOD set the one of the run's data."""
    label_column_name: str = "label"
    """Column with the label (classification)."""
    messages_column_name: str | None = None
    """Column with conversations (text-generation, image-text-to-text): lists of `{role, content}`. Makes a row a sample; the loss is on assistant turns."""
    prompt_column_name: str | None = None
    """Column with prompts, instead of messages: lists of messages, or plain text; goes with completion_column_name."""
    completion_column_name: str | None = None
    """Column with completions, which alone are learned."""
    tools_column_name: str | None = None
    """Column with the tools that a conversation may call: a list of JSON schemas, or such a list as JSON text."""

    @property
    def is_conversation(self) -> bool:
        """Whether rows are conversations."""
        return self.messages_column_name is not None or self.prompt_column_name is not None

    @model_validator(mode="after")
    def _one_form(self) -> "DataSource":
        problems = []
        if (self.prompt_column_name is None) != (self.completion_column_name is None):
            problems.append("prompt_column_name and completion_column_name go together")
        if self.messages_column_name is not None and self.prompt_column_name is not None:
            problems.append("give messages_column_name, or prompt_ and completion_column_name")
        if self.tools_column_name is not None and not self.is_conversation:
            problems.append("tools_column_name needs messages_column_name or prompt_column_name")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class CanaryConfig(Section):
    """Sequences of random tokens planted in the training rows (text-generation), for the memorisation probe."""

    num_canaries: PositiveInt = 16
    """Different sequences."""
    num_tokens: Annotated[int, Field(ge=4)] = 32
    """Length of each; the probe asks for the second half."""
    repeats: PositiveInt = 1
    """Copies of each among the rows."""


class DataConfig(DataSource):
    """Training, validation and test rows, and named out-of-distribution sets."""

    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split for evaluation during training and for fitting the temperature."""
    test_split: str = "test"
    """Split that the evaluation stage reports on."""
    max_length: PositiveInt = 512
    """Longest sequence in tokens; longer text is cut (classification, conversations), and the block size of text-generation."""
    packing: bool = False
    """text-generation: pack documents whole into training rows of at most max_length (a row is then the unit of the global batch), instead of joining them and cutting blocks."""
    chat_template: str | None = None
    """File with the Jinja chat template of conversations, instead of the tokenizer's; `{% generation %}` marks what is learned."""
    max_train_samples: PositiveInt | None = None
    """Use only this many training rows, chosen by key."""
    max_eval_samples: PositiveInt | None = None
    """Use only this many rows of each evaluation split, chosen by key."""
    domain_column_name: str | None = None
    """Column with the name of each row's domain, for `dropout.domains`."""
    augmentation: Augmentation = Augmentation()
    """How training samples of images and audio are varied; the variation follows from step and sample."""
    min_seconds: NonNegativeFloat = 0.1
    """Shorter clips of audio are set aside."""
    max_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Longer clips of audio are set aside."""
    quarantine_budget: Rate = 0.01
    """Largest share of a split's images, clips or conversations that may be unusable; they are set aside, and listed in quarantine.jsonl."""
    canaries: CanaryConfig | None = None
    """Plant canaries in the training rows."""
    ood: dict[str, DataSource] = {}
    """Named out-of-distribution sets, for the evaluation stage."""


class PeftConfig(BaseModel):
    """Any PEFT configuration: `peft_type` and the fields of its class, checked against the installed peft."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    peft_type: str = "LORA"
    """LORA, IA3, ADALORA, PROMPT_TUNING, ..."""


class MemorisationConfig(Section):
    """Prompts from training rows: how many greedy continuations repeat the row, beside those of test rows."""

    num_prompts: PositiveInt = 100
    """Rows of each kind, chosen by key."""
    prompt_tokens: PositiveInt = 32
    """Tokens that the model is given, from the start of a row."""
    continuation_tokens: PositiveInt = 32
    """Tokens that it goes on by."""
    k: PositiveInt = 16
    """Tokens in a row, the same as in what followed, that count as repeated."""

    @model_validator(mode="after")
    def _reachable(self) -> "MemorisationConfig":
        if self.k > self.continuation_tokens:
            raise ValueError("k tokens cannot be repeated in fewer continuation_tokens")
        return self


class EvaluationConfig(Section):
    """The evaluation stage: Monte-Carlo passes, calibration, out-of-distribution scores."""

    num_mc_passes: Annotated[int, Field(ge=2)] = 20
    """Monte-Carlo dropout passes T."""
    batch_size: PositiveInt = 32
    """Rows a forward pass; the numbers do not depend on it."""
    num_bins: PositiveInt = 15
    """Bins of the calibration error."""
    knn_neighbours: PositiveInt = 10
    """k of the k-nearest-neighbour OOD score."""
    num_bootstrap_resamples: PositiveInt = 1000
    """Resamples behind each interval."""
    confidence_level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of each interval."""
    max_fit_samples: PositiveInt = 5000
    """Training rows, chosen by key, whose features fit Mahalanobis and kNN."""
    memorisation: MemorisationConfig | None = None
    """Probe whether training rows are repeated verbatim (text-generation)."""
    generation: SequenceConfig | None = None
    """Let the model go on from test rows; off unless given."""


class WandbConfig(Section):
    """Weights & Biases; nothing leaves the machine unless mode is online."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "masklock"
    entity: str | None = None
    tags: list[str] = []
    share_rows: bool = True
    """Whether rows go along: the table of the most uncertain ones, report.html, the profile."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long the end of a stage waits for an answer before it goes on without Weights & Biases."""


class RunConfig(Section):
    """One run: serves every stage from training to the report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is `output_dir/name`."""
    output_dir: str = "runs"
    """Where run folders are made."""
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] = 42
    """The one seed: masks, order, initial weights of new layers."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    dropout: DropoutConfig = DropoutConfig()
    peft: PeftConfig | None = None
    """Parameter-efficient fine-tuning; without it all weights are trained."""
    evaluation: EvaluationConfig = EvaluationConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="before")
    @classmethod
    def _columns_of_channels(cls, values: Any) -> Any:
        return with_column_names(values)

    @model_validator(mode="after")
    def _pairs(self) -> "RunConfig":
        problems = _channel_pairs(self)
        origins: list[ModelConfig | ChannelConfig] = [self.model, *self.model.channels.values()]
        if self.peft is not None and any(one.model_type is not None for one in origins):
            problems.append(
                "peft adapts pretrained weights: with model.model_type (from scratch) leave peft out"
            )
        if self.model.quantization_config is not None and self.model.model_type is not None:
            problems.append(
                "model.quantization_config quantizes pretrained weights: with model.model_type (from "
                "scratch) leave it out"
            )
        elif self.model.quantization_config is not None and self.peft is None:
            problems.append(
                "model.quantization_config needs a peft section: quantized weights are not trained, "
                "an adapter on them is"
            )
        if self.dropout.adapter is not None and self.peft is None:
            problems.append("dropout.adapter needs a peft section")
        problems += conversation_problems(self.model.task, self.data)
        problems += memorisation_problems(self)
        if bool(self.dropout.domains) != (self.data.domain_column_name is not None):
            problems.append(
                "dropout.domains and data.domain_column_name go together: give both or neither"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _channel_pairs(config: RunConfig) -> list[str]:
    """Rates and columns of channels that are there; nothing that mixes whole samples."""
    channels, data = config.model.channels, config.data
    sources = {"data": data} | {f"data.ood.{name}": one for name, one in data.ood.items()}
    problems = rate_problems(config.dropout.modality, channels)
    for place, source in sources.items():
        problems += column_problems(place, source.channel_column_names, channels)
    image = data.augmentation.image
    if channels and (image.mixup_alpha or image.cutmix_alpha):
        problems.append("data.augmentation.image mixes images and labels: not those of channels")
    return problems
