"""The `train:` section: the Trainer's own names, with their types and pairs."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.roles import NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class TrainConfig(Section):
    """The Trainer's own names, and `global_batch_size`, from which accumulation follows."""

    global_batch_size: PositiveInt = 32
    """Samples per optimizer step, over all processes and micro-batches."""
    per_device_train_batch_size: PositiveInt | None = None
    """Micro-batch of one process; default: the global batch divided by the processes."""
    per_device_eval_batch_size: PositiveInt = 32
    """Evaluation batch of one process."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training rows; ignored when max_steps is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    learning_rate: NonNegativeFloat = 5e-5
    """Peak learning rate."""
    lr_scheduler_type: str = "linear"
    """A transformers scheduler name."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Arguments of the scheduler."""
    warmup_steps: NonNegativeFloat = 0
    """Warm-up in steps, or as a share of all steps when below 1."""
    optim: str = "adamw_torch"
    """A transformers optimizer name."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay (biases and norms excepted)."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradient clipping; 0 switches it off."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of the training loss."""
    r_drop_alpha: NonNegativeFloat = 0.0
    """R-Drop: above 0, every sample is seen under two masks, and their divergence, times this, joins the loss."""
    bf16: bool = False
    """Mixed precision in bfloat16."""
    fp16: bool = False
    """Mixed precision in float16 (CUDA)."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward; masks stay the same."""
    use_cpu: bool | None = None
    """Default: true where there is no accelerator."""
    train_sampling_strategy: Literal["sequential", "group_by_length"] = "sequential"
    """`group_by_length`: the rows of a global batch are taken shortest first, so that those of like length share micro-batches; which rows a step takes stays the same."""
    dataloader_num_workers: NonNegativeInt = 0
    """Worker processes for loading."""
    logging_steps: PositiveInt = 10
    """Log every so many steps."""
    eval_steps: PositiveInt | None = None
    """Evaluate every so many steps; default: only at the end."""
    save_steps: PositiveInt | None = None
    """Save a checkpoint every so many steps; default: only at the end."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept (the best one is always kept too)."""
    load_best_model_at_end: bool = False
    """Keep the weights of the best evaluation; needs eval_steps."""
    metric_for_best_model: str = "loss"
    """A metric of evaluation during training: `loss`, `accuracy`, `ece`, `perplexity`."""
    greater_is_better: bool | None = None
    """Default: true for accuracy and f1, false otherwise."""
    early_stopping_patience: PositiveInt | None = None
    """Stop after so many evaluations without improvement; needs eval_steps."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """Smallest change that counts as an improvement."""
    disable_tqdm: bool = False
    """No progress bar."""
    extra: dict[str, Any] = {}
    """Any other `TrainingArguments` field, checked against the installed class."""

    @model_validator(mode="after")
    def _evaluation_pairs(self) -> "TrainConfig":
        problems = []
        if self.load_best_model_at_end and self.eval_steps is None:
            problems.append("load_best_model_at_end needs eval_steps")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            problems.append("early_stopping_patience needs eval_steps")
        if self.bf16 and self.fp16:
            problems.append("bf16 and fp16 exclude each other")
        micro = self.per_device_train_batch_size
        if micro is not None and self.global_batch_size % micro:
            problems.append(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"per_device_train_batch_size {micro}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self
