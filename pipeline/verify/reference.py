"""The plain loop that every layout is compared with: one unpadded sample at a time, torch's AdamW.

No Trainer, no accelerate, no collator's padding, no loss function of ours.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_pt_utils import get_parameter_names

from pipeline.config.schema import RunConfig
from pipeline.data import training_stream
from pipeline.dropout.concrete import PARAMETER, learned_rates_of
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.key import row_id
from pipeline.dropout.schedules import NO_DOMAIN
from pipeline.modality.bundle import modality_of
from pipeline.packing import documents_of
from pipeline.train import Parts
from pipeline.verify.compare import Record
from pipeline.verify.probe import Probe

INPUTS = "inputs"
FILES, SIGNALS = {"image", "audio"}, ("pixel_values", "input_values", "input_features")
NO_DECAY = ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def run_by_hand(parts: Parts, num_steps: int) -> Record:
    """The first steps of a run, by hand.

    Args:
        parts: data, model and plan, as training prepares them.
        num_steps: optimizer steps.
    """
    config, probe = parts.config, Probe()
    model = parts.model.to(parts.args.device).train()
    keyed = KeyedDropout(model, parts.plan, config.seed)
    keyed.observer = probe.observe
    size = config.train.global_batch_size
    stream = training_stream(config, parts.data.train, num_steps)
    optimizer = adamw(model, config)
    schedule = scheduler(optimizer, config, num_steps)
    collate = modality_of(config).collator(parts.processor, config)
    losses = {}
    for step in range(num_steps):
        taken = range(step * size, (step + 1) * size)
        rows = [one for k in taken for one in documents_of(with_inputs(stream[k], collate))]
        alpha = config.train.r_drop_alpha
        num_rows = len(parts.data.train) * len(rows) / size  # of documents, where rows are packed
        smoothing = config.train.label_smoothing_factor
        losses[str(step)] = one_step(model, keyed, rows, step, alpha, num_rows, smoothing)
        probe.keep_gradients(step, model)
        if config.train.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    keyed.release()
    weights = trained_weights(model)
    return Record(probe.masks, probe.changed, losses, weights, probe.gradients)


def one_step(
    model: nn.Module,
    keyed: KeyedDropout,
    rows: list[dict],
    step: int,
    alpha: float = 0.0,
    num_rows: float = 1,
    smoothing: float = 0.0,
) -> float:
    """Gradients of the mean loss over all items of a step; returns the loss.

    Args:
        alpha: weight of R-Drop's divergence; above 0, each row is seen in two views.
        num_rows: rows trained on, by which the term of learned rates is divided.
        smoothing: of the labels.
    """
    items = sum(num_items(row) for row in rows)
    total = 0.0
    for row in rows:
        views = [forward(model, keyed, row, step, view) for view in ((1, 2) if alpha else (0,))]
        loss = torch.stack([summed_loss(logits, row, smoothing) for logits in views]).mean() / items
        if alpha:
            loss = loss + alpha * divergence(views, row) / items
        loss.backward()
        total += float(loss.detach())
    rates = learned_rates_of(model)
    if rates is not None:
        term = rates.regulariser(model) * len(rows) / (items * num_rows)
        term.backward()
        total += float(term.detach())
    return total


def forward(model: nn.Module, keyed: KeyedDropout, row: dict, step: int, view: int) -> Tensor:
    """Logits of one row under the masks of one of its views."""
    ids = torch.tensor([row_id(row["sample_id"], view)])
    domains = torch.tensor([row.get("domain", NO_DOMAIN)])
    with keyed.context(purpose="train", index=step, row_ids=ids, domains=domains):
        logits: Tensor = model(**inputs_of(row, next(model.parameters()).device)).logits
    return logits


def divergence(views: list[Tensor], row: dict) -> Tensor:
    """(KL(p | q) + KL(q | p)) / 2 of two views, over the predicted tokens."""
    places = slice(None) if "labels" in row else predicting(row)
    p, q = (logits[0][places].log_softmax(-1) for logits in views)
    return ((p.exp() * (p - q)).sum() + (q.exp() * (q - p)).sum()) / 2


def with_inputs(row: dict, collate: Callable[[list[dict]], dict[str, Tensor]]) -> dict:
    """A row that is a file: what the model takes of it alone, which needs no padding.

    Of an image with text, what is made of the image; its tokens are there already. Where it is
    mixed with a partner, `mixed_labels` (1, 3): own class, partner's, own share.
    """
    if "input_ids" in row:
        signals = FILES & row.keys() and collate([row])
        return row | ({INPUTS: {n: signals[n] for n in SIGNALS if n in signals}} if signals else {})
    batch = collate([row])
    own = {name: row[name] for name in ("sample_id", "labels", "domain") if name in row}
    mixed = {"mixed_labels": batch["labels"]} if "partner" in row else {}
    inputs = {n: v for n, v in batch.items() if n not in (*own, "mask_step")}
    return {**own, **mixed, INPUTS: inputs}


def inputs_of(row: dict, device: torch.device) -> dict[str, Tensor]:
    """The model's arguments for one row, without padding."""
    made = {name: value.to(device) for name, value in row.get(INPUTS, {}).items()}
    if "input_ids" not in row:
        return made
    names = ("input_ids", "attention_mask", "token_type_ids")
    given = {name: torch.tensor([row[name]], device=device) for name in names if name in row}
    return {"attention_mask": torch.ones_like(given["input_ids"]), **given, **made}


def num_items(row: dict) -> int:
    """What the loss is a mean over: one label, or the predicted tokens."""
    return 1 if "labels" in row else len(predicting(row))


def predicting(row: dict) -> list[int]:
    """Places before a token that is learned: every token after the first, or of the assistant."""
    last = len(row["input_ids"]) - 1
    return [
        place for place in range(last) if "label_mask" not in row or row["label_mask"][place + 1]
    ]


def summed_loss(logits: Tensor, row: dict, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of the label (of both, by their shares), or of every token that is learned."""
    if "mixed_labels" in row:
        own, other, share = row["mixed_labels"][0].tolist()
        parts = ((share, own), (1 - share, other))
        of_both = [part * summed_loss(logits, {"labels": int(c)}, smoothing) for part, c in parts]
        return of_both[0] + of_both[1]
    if "labels" in row:
        scores, targets = logits, torch.tensor([row["labels"]])
    else:
        places = predicting(row)
        scores = logits[0, places]
        targets = torch.tensor([row["input_ids"][place + 1] for place in places])
    return nn.functional.cross_entropy(
        scores.float(), targets.to(scores.device), reduction="sum", label_smoothing=smoothing
    )


def adamw(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW as the Trainer sets it up: no decay on biases and norms."""
    train = config.train
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    rates = learned_rates_of(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n != PARAMETER]
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    if rates is not None:
        own = {"params": [rates.logits], "lr": rates.settings.learning_rate, "weight_decay": 0.0}
        groups.append(own)
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon)


def scheduler(
    optimizer: torch.optim.Optimizer, config: RunConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The run's learning rate schedule."""
    warmup = config.train.warmup_steps
    steps = int(warmup) if warmup >= 1 else -int(-warmup * num_steps // 1)
    return get_scheduler(
        config.train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=steps,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=config.train.lr_scheduler_kwargs,
    )


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights as the run would save them: of the adapter, or all, by the names of saved files."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(model).items()}
    copies: dict[Tensor, Tensor] = {}  # tied weights stay one tensor
    for value in model.state_dict(keep_vars=True).values():
        copies.setdefault(value, value.detach().cpu().clone())
    weights = {name: copies[value] for name, value in model.state_dict(keep_vars=True).items()}
    if isinstance(model, PreTrainedModel):  # some modules have other names than their weights
        weights = revert_weight_conversion(model, weights)
    return weights


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """Weights that a run saved in its `model/` folder."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights
