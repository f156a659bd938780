"""Modality dropout: a whole channel of a sample masked, by one keyed draw a sample.

The draw's uniform number falls into the part of [0, 1) that belongs to a channel, or into none:
with rates p_0, p_1, ... channel c is masked when p_0 + ... + p_{c-1} <= u < p_0 + ... + p_c. So at
most one channel of a sample is masked, each exactly as often as its rate says, and never all of
them; of two channels there is no other way to have both. After Neverova et al., "ModDrop", TPAMI
2016, whose independent draws can mask every channel at once.

What is masked is replaced by the model, not scaled: nothing else is made larger for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from pipeline.config.dropout import DropoutConfig
from pipeline.dropout.doors import Draw
from pipeline.dropout.sites import MODALITY, Site

_TRACED = 1.0  # no rate of a model's own: the site is there to be found


class ModalityDropout(nn.Module):
    """Says which channels of each sample are there; all of them until a door is opened here."""

    def forward(self, present: Tensor) -> Tensor:
        """Ones [B, channels], zero where a channel is masked."""
        return present


def open_modality(
    names: dict[nn.Module, str], draw: Draw, sites: set[str] | None = None
) -> Callable[[], None]:
    """Route modality dropout through `draw`; returns the function that undoes it.

    Args:
        names: modules by name.
        draw: receives ones [B, channels].
        sites: the modules that are routed; in the others every channel is there. Default: all.
    """
    opened = [m for m in names if isinstance(m, ModalityDropout)]
    opened = [module for module in opened if sites is None or names[module] in sites]
    for module in opened:
        module.__dict__["forward"] = _forward(names[module], draw)

    def close() -> None:
        for module in opened:
            del module.__dict__["forward"]

    return close


def _forward(site: str, draw: Draw) -> Callable[[Tensor], Tensor]:
    return lambda present: draw(MODALITY, site, present, _TRACED)


def with_channels(
    sites: Sequence[Site], config: DropoutConfig, channels: Sequence[str]
) -> tuple[Site, ...]:
    """The sites, those of modality dropout with the rate of every channel, in the model's order."""
    return tuple(
        _with_channels(site, config, channels) if site.door == MODALITY else site for site in sites
    )


def _with_channels(site: Site, config: DropoutConfig, channels: Sequence[str]) -> Site:
    rates = tuple((name, float(config.modality.get(name, 0.0))) for name in channels)
    total = min(1.0, sum(rate for _, rate in rates))
    return replace(
        site,
        rate=total,
        channels=rates,
        in_force=total > 0,
        reason="" if total > 0 else "rate 0",
        in_passes=config.modality_in_passes,
    )


def modality_notes(sites: Sequence[Site]) -> list[str]:
    """What a user should know of modality dropout where it is in force."""
    live = [site for site in sites if site.door == MODALITY and site.in_force]
    seen = "too" if any(site.in_passes for site in live) else "not: they see every channel there is"
    return [
        "Modality dropout masks one channel of a sample at most, in training; in Monte-Carlo "
        f"passes {seen}."
    ][: len(live)]
