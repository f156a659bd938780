"""What dropout adds to the loss: R-Drop and learned rates, against plain loops; whole trainings."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline.arguments import check_learned
from pipeline.config.training import TrainConfig
from pipeline.data import load_raw, prepare_data
from pipeline.dropout.concrete import FILE, PARAMETER, learned_rates_of
from pipeline.dropout.context import KeyedDropout
from pipeline.dropout.key import row_id
from pipeline.errors import DropoutError
from pipeline.modality.losses import causal_loss, classification_loss
from pipeline.modality.tokenizer import load_tokenizer
from pipeline.model import build_model, load_trained, plan_for
from pipeline.objective import Objective
from pipeline.records import RunFolder, read_jsonl
from pipeline.train import train

R_DROP = TrainConfig(r_drop_alpha=0.7)


class Outputs(dict):
    pass


def kl(p, q):
    return float((p * (p / q).log()).sum())


def test_r_drop_of_classes_is_the_mean_of_both_views_and_their_divergence():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4).double(), torch.tensor([0, 2, 3])
    objective = Objective(classification_loss(0.0), R_DROP, torch.nn.Module(), 100)
    found = objective({"logits": logits}, labels.repeat(2), 5)
    total = 0.0
    for row in range(3):
        first, second = (logits[place].softmax(-1) for place in (row, row + 3))
        label = labels[row]
        total += -float(first[label].log() + second[label].log()) / 2
        total += 0.7 * (kl(first, second) + kl(second, first)) / 2
    assert found.item() == pytest.approx(total / 5)


def test_r_drop_of_tokens_counts_predicted_tokens_only():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7).double()
    labels = torch.tensor([[-100, 3, 4, 6, -100]])
    objective = Objective(causal_loss(0.0), R_DROP, torch.nn.Module(), 100)
    found = objective({"logits": logits}, labels.repeat(2, 1), 3)
    total = 0.0
    for place, label in ((0, 3), (1, 4), (2, 6)):
        first, second = (view[place].softmax(-1) for view in logits)
        total += -float(first[label].log() + second[label].log()) / 2
        total += 0.7 * (kl(first, second) + kl(second, first)) / 2
    assert found.item() == pytest.approx(total / 3)


def weights_of(config, file="model.safetensors"):
    return load_file(RunFolder(f"{config.output_dir}/{config.name}").model / file)


def small(run_config, name="run", dropout=None, **train_):
    values = {"global_batch_size": 8, "max_steps": 3, "use_cpu": True, "learning_rate": 1e-2}
    values |= {"adam_epsilon": 1e-4, "logging_steps": 1, "disable_tqdm": True}
    return run_config(
        name=name,
        dropout=dropout or {"hidden": 0.3},
        train=values | train_,
        wandb={"mode": "disabled"},
    )


LEARNED = {"hidden": {"rate": 0.3, "learned": True}, "concrete": {"length_scale": 0.1}}


def by_hand(config, dropout_term: bool):
    """The same steps, row by row, in plain torch; only masks come from keyed dropout."""
    raw = load_raw(config)
    tokenizer = load_tokenizer(config, raw.train["text"])
    rows = prepare_data(config, raw, tokenizer).train
    plan = plan_for(config, raw.label_names, tokenizer)
    model = build_model(config, raw.label_names, plan, tokenizer).train()
    keyed, rates = KeyedDropout(model, plan, config.seed), learned_rates_of(model)
    weights = [p for name, p in model.named_parameters() if "learned" not in name]
    groups = [{"params": weights, "lr": 1e-2}]
    if rates:
        groups.append({"params": [rates.logits], "lr": 0.01})
    optimizer = torch.optim.AdamW(groups, eps=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 3)
    from pipeline.data import TrainingStream

    stream, layers = TrainingStream(rows, config.seed, 3, 8), dict(model.named_modules())
    for step in range(3):
        optimizer.zero_grad()
        for k in range(step * 8, step * 8 + 8):
            item, views = stream[k], []
            for view in (1, 2) if config.train.r_drop_alpha else (0,):
                ids = torch.tensor([row_id(item["sample_id"], view)])
                with keyed.context(purpose="train", index=step, row_ids=ids):
                    logits = model(input_ids=torch.tensor([item["input_ids"]])).logits
                views.append(logits.log_softmax(-1)[0])
            loss = -sum(view[item["labels"]] for view in views) / len(views)
            if len(views) == 2:
                a, b = views
                kls = (a.exp() * (a - b)).sum() + (b.exp() * (b - a)).sum()
                loss = loss + config.train.r_drop_alpha * kls / 2
            (loss / 8).backward()
        if dropout_term:
            for place, site in enumerate(rates.sites):
                p = rates.logits[place].sigmoid()
                entropy = -p * p.log() - (1 - p) * (1 - p).log()
                squares = sum((layers[name].weight ** 2).sum() for name in site.linears)
                ((0.1**2 / 2 * squares / (1 - p) - 24 * entropy) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["r-drop", "learned"])
def test_training_equals_the_plain_loop_for_any_micro_batch(run_config, kind):
    more = {"r_drop_alpha": 0.7} if kind == "r-drop" else {}
    dropout = LEARNED if kind == "learned" else None
    config = small(run_config, dropout=dropout, **more)
    wanted = by_hand(config, kind == "learned")
    for micro_batch in (8, 2):
        one = small(
            run_config, f"m{micro_batch}", dropout, per_device_train_batch_size=micro_batch, **more
        )
        assert train(one) == 0
        found = weights_of(one)
        if kind == "learned":
            found |= weights_of(one, FILE)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], atol=3e-5, rtol=1e-4, msg=name)


def test_learned_rates_are_logged_resumed_and_used_by_the_trained_model(run_config):
    whole = small(run_config, "whole", LEARNED, save_steps=2)
    assert train(whole) == 0
    run = RunFolder(f"{whole.output_dir}/whole")
    logged = [line for line in read_jsonl(run.metrics) if "train/loss" in line]
    names = [name for name in logged[0] if name.startswith("dropout/")]
    assert len(names) == 4
    assert logged[0][names[0]] != logged[2][names[0]]
    assert "bert.encoder.layer.0.output.dropout#0" in names[1]

    for folder in (run.model, run.checkpoint(3)):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink()
        folder.rmdir()
    before = load_file(run.checkpoint(2) / FILE)[PARAMETER]
    assert train(whole) == 0
    assert not before.equal(weights_of(whole, FILE)[PARAMETER])
    again = [line for line in read_jsonl(run.metrics) if "train/loss" in line]
    assert again[2][names[0]] == logged[2][names[0]]

    plan = plan_for(whole, ("animal", "colour"))
    tokenizer = load_tokenizer(
        whole.model_copy(
            update={
                "model": whole.model.model_copy(update={"tokenizer_name_or_path": str(run.model)})
            }
        ),
        [],
    )
    model = load_trained(run.model, whole, ("animal", "colour"), plan, tokenizer)
    assert learned_rates_of(model).logits.equal(weights_of(whole, FILE)[PARAMETER])
    assert json.loads((run.model / "config.json").read_text())["model_type"] == "bert"


def test_learned_rates_are_refused_where_weights_are_cut_up(run_config):
    plan = plan_for(run_config(dropout={"hidden": {"rate": 0.2, "learned": True}}))
    for engine, zero_stage in (("plain", 0), ("DEEPSPEED", 2)):
        check_learned(plan, engine, zero_stage)
    for engine, zero_stage, name in (("FSDP", 0, "FSDP2"), ("DEEPSPEED", 3, "ZeRO-3")):
        with pytest.raises(DropoutError, match=f"dropout.hidden: learned rates .* on {name}"):
            check_learned(plan, engine, zero_stage)
