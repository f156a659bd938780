"""Concrete dropout: the rates of sites are learned with the weights.

Gal, Hron, Kendall, "Concrete Dropout", NeurIPS 2017. While training, a value is multiplied by

    (1 - z) / (1 - p),   z = sigmoid((logit(p) - logit(u)) / temperature)        (equation 5)

where u is the uniform number under the hard mask of the same coordinates: as the temperature falls,
z becomes that mask (dropped when u < p), so that it is locked to the sample too. The loss grows by

    1 / N  sum over sites  [ length_scale^2 / 2  |W|^2 / (1 - p)  -  K H(p) ]    (equations 3, 4)

with W the weights of the linear layers next to the site, K its number of features, H the entropy
of a Bernoulli variable in nats, N the items trained on. The paper's variational mean is
M = W / (1 - p) here, since kept values are scaled up.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config.dropout import ConcreteConfig
from pipeline.dropout.doors import site_names
from pipeline.dropout.philox import NUM_LANES, lanes, philox_words
from pipeline.dropout.sites import Site
from pipeline.errors import RunFolderError

ATTRIBUTE = "learned_rates"
FILE = "dropout_rates.safetensors"
PARAMETER = f"{ATTRIBUTE}.logits"


class LearnedRates(nn.Module):
    """One rate a site, as a logit; lives in the model, so that optimizer and engines know it.

    Args:
        sites: the plan's learned sites; their rates are where learning starts.
        settings: the configuration's `dropout.concrete` section.
    """

    def __init__(self, sites: Sequence[Site], settings: ConcreteConfig) -> None:
        super().__init__()
        self.sites, self.settings = tuple(sites), settings
        self.logits = nn.Parameter(torch.logit(torch.tensor([site.rate for site in sites])))

    def rates(self) -> list[float]:
        """The rates as they are now."""
        return [float(rate) for rate in self.logits.detach().double().sigmoid()]

    def named_rates(self) -> dict[str, float]:
        """The same by `site#call`."""
        names = (f"{site.site}#{site.call}" for site in self.sites)
        return dict(zip(names, self.rates(), strict=True))

    def relaxed(
        self, place: int, x: Tensor, per_row: Sequence[Tensor], group: int, first: int = 0
    ) -> Tensor:
        """x `[B, M, D]` under the relaxed mask of a site; per_row are keys, ids, positions.

        `first` is the number of the first feature, where the tensor is a slice.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        logit = self.logits[place].to(device=x.device, dtype=wide)
        end = first + x.shape[2]
        u = uniforms(per_row, -(-end // group)).to(device=x.device, dtype=wide)
        u = (u.repeat_interleave(group, dim=2) if group > 1 else u)[..., first:end]
        z = torch.sigmoid((logit - torch.logit(u)) / self.settings.temperature)
        return (x.to(wide) * (1 - z) / (1 - logit.sigmoid())).to(x.dtype)

    def regulariser(self, model: nn.Module) -> Tensor:
        """The term of the loss, times N."""
        layers = {name: module for module, name in site_names(model).items() if is_linear(module)}
        terms = []
        for site, logit in zip(self.sites, self.logits, strict=True):
            p = logit.sigmoid()
            entropy = nn.functional.softplus(logit) - p * logit
            weights = [cast(Tensor, layers[name].weight).float() for name in site.linears]
            squares = torch.stack([weight.square().sum() for weight in weights]).sum()
            prior = self.settings.length_scale**2 / 2
            terms.append(prior * squares / (1 - p) - site.shape[-1] * entropy)
        return torch.stack(terms).sum()

    def save(self, folder: Path) -> None:
        """Write the side file of a checkpoint or a model."""
        names = json.dumps(list(self.named_rates()))
        logits = self.logits.detach().float().cpu().contiguous()
        save_file({PARAMETER: logits}, folder / FILE, metadata={"sites": names})

    def load(self, folder: Path) -> None:
        """Read it back.

        Raises:
            RunFolderError: it is missing or damaged, or belongs to other sites.
        """
        names, logits = _read(folder)
        if names != list(self.named_rates()):
            raise RunFolderError(
                f"{folder / FILE} holds the rates of other sites than the plan's: {names}. Train "
                "the run again under another name."
            )
        with torch.no_grad():
            self.logits.copy_(logits)


def saved_rates(folder: Path) -> dict[str, float]:
    """The rates that a training left in a checkpoint or a model, by `site#call`."""
    names, logits = _read(folder)
    return dict(zip(names, logits.double().sigmoid().tolist(), strict=True))


def _read(folder: Path) -> tuple[list[str], Tensor]:
    try:
        with safe_open(folder / FILE, "pt") as file:
            return json.loads(file.metadata()["sites"]), file.get_tensor(PARAMETER)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{folder} was to hold the learned dropout rates in {FILE}, but they cannot be "
            f"read: {error}. Bring the file back, or train the run again under another name."
        ) from None


def add_learned_rates(model: nn.Module, sites: Sequence[Site], settings: ConcreteConfig) -> None:
    """Give a model the rates of its learned sites; nothing where there are none."""
    learned = [site for site in sites if site.learned]
    if not learned:
        return
    model.add_module(ATTRIBUTE, LearnedRates(learned, settings))
    # They have a file of their own: the weights stay those of a plain Hugging Face model.
    kept = getattr(model, "_keys_to_ignore_on_save", None) or ()
    model._keys_to_ignore_on_save = {*kept, PARAMETER}  # type: ignore[assignment]


def learned_rates_of(model: nn.Module) -> LearnedRates | None:
    """The learned rates of a (wrapped) model; None where every rate is set."""
    return next((m for m in model.modules() if isinstance(m, LearnedRates)), None)


def is_linear(module: nn.Module) -> bool:
    """A linear layer, or the one that GPT-2 writes as a convolution."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def uniforms(per_row: Sequence[Tensor], num_features: int) -> Tensor:
    """The numbers under a hard mask, `[B, M, D]`: dropped where lane / 65536 < p."""
    keys, ids, positions = (
        row.detach().cpu().contiguous().numpy().view(np.uint64)[..., None] for row in per_row
    )
    words = philox_words(keys, np.arange(-(-num_features // 8)), positions, ids)
    drawn = lanes(words).reshape(*words.shape[:2], -1)[..., :num_features]
    return torch.from_numpy((drawn + 0.5) / NUM_LANES)
