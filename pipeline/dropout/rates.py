"""Which rate a site gets from the configuration, and everything that stands against it.

A rate that would reach no site is an error, and so is a site that could not be locked: what the
configuration says is in force, or nothing runs.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.config.dropout import DropoutConfig
from pipeline.config.roles import RoleDropout
from pipeline.dropout.audit import Leak
from pipeline.dropout.doors import INSERTED
from pipeline.dropout.layer_drop import LAYER
from pipeline.dropout.schedules import depth_share, layer_counts, layer_of
from pipeline.dropout.sites import JITTER, MODALITY, ROLE_OF_DOOR, SAMPLE_FIRST, SHARED, Site


def with_rates(sites: Sequence[Site], config: DropoutConfig) -> tuple[Site, ...]:
    """The sites with rate, variant and schedule of their role, or of the last override's rate."""
    counts = layer_counts(site.site for site in sites)
    return tuple(_with_rate(site, config, counts) for site in sites)


def given_for(site: Site, config: DropoutConfig) -> RoleDropout | None:
    """What the configuration says of a site's role."""
    if site.door == INSERTED:
        given: RoleDropout | None = getattr(config.insert, site.role)
        return given
    return config.by_role().get(site.role)


def _with_rate(site: Site, config: DropoutConfig, counts: Mapping[str, int]) -> Site:
    given = given_for(site, config) or RoleDropout()
    share = depth_share(given.depth, site.site, counts)
    full = site.rate if given.rate is None else _shared_out(given.rate, site.share)
    rate, learned = full * share, given.learned
    of_domains = {name: rates.get(site.role) for name, rates in config.domains.items()}
    domains = {
        name: _shared_out(own, site.share) * share
        for name, own in of_domains.items()
        if own is not None
    }
    for pattern, override in config.overrides.items():
        if _matches(pattern, site):
            rate, domains, learned = override, {}, False
    is_live = rate > 0 or any(domains.values())
    return replace(
        site,
        rate=float(rate),
        in_force=is_live,
        reason="" if is_live else f"rate 0{' at this depth' * (full > 0 and share == 0)}",
        variant=given.variant or _own_variant(site),
        block_size=given.block_size or 1,
        progress=given.progress,
        gamma=given.gamma,
        domains=tuple(sorted(domains.items())),
        learned=learned,
    )


def _own_variant(site: Site) -> str:
    """PatchDropout leaves out whole patches: Liu et al., WACV 2023."""
    return "token" if site.door == INSERTED and site.role == "patch" else site.variant


def _shared_out(rate: float, share: float) -> float:
    """A role's rate where the model's own rule gives the site a part of it."""
    return rate if share == 1 else round(rate * share, 6)


def problems_of(
    sites: Sequence[Site], leaks: Iterable[Leak], config: DropoutConfig, attention_refusal: str
) -> list[str]:
    """Everything because of which this plan cannot be kept, one sentence each.

    Args:
        sites: with their rates.
        leaks: randomness past the doors.
        config: the `dropout` section.
        attention_refusal: why attention dropout cannot be in force, or "".
    """
    return [
        *_rates_without_sites(sites, config),
        *_insertions_without_modules(sites, config),
        *_wrong_variants(config),
        *_schedules_without_layers(sites, config),
        *_wrong_domains(sites, config),
        *_overrides_without_sites(sites, config),
        *_sites_that_cannot(sites, attention_refusal),
        *(_leaks(leaks) if config.strict else ()),
    ]


def _matches(pattern: str, site: Site) -> bool:
    if site.door == MODALITY:  # its rates are by channel: one for all would say nothing
        return False
    is_whole = "#" in pattern or site.door in (LAYER, JITTER)
    name = site.label if is_whole else site.site
    return fnmatch.fnmatchcase(name, pattern)


def _rates_without_sites(sites: Sequence[Site], config: DropoutConfig) -> list[str]:
    roles = sorted({site.role for site in sites if site.door != INSERTED})
    return [
        f"dropout.{role} is {rate:g}, but this model has no {role} dropout "
        f"(it has: {', '.join(roles) or 'none'}){_hint(role)}."
        for role, rate in config.rates().items()
        if rate > 0 and role not in roles
    ]


def _hint(role: str) -> str:
    if role in ("embedding", "hidden"):
        return f"; to add it, use dropout.insert.{role}"
    if role == "adapter":
        return "; it needs a peft method with lora_dropout"
    if role == "spectrogram":
        return "; it needs an audio model with apply_spec_augment"
    return ""


_PLACES = {
    "embedding": "embed_tokens",
    "hidden": "self_attn, mlp",
    "patch": "patch_embeddings of images",
    "head": "the layernorm or pooler behind the layers of an image model",
}


def _insertions_without_modules(sites: Sequence[Site], config: DropoutConfig) -> list[str]:
    inserted = {site.role for site in sites if site.door == INSERTED}
    return [
        f"dropout.insert.{role} is {given.rate:g}, but this model has no modules to put it on "
        f"({_PLACES[role]})."
        for role, given in config.insert
        if given is not None and given.rate and role not in inserted
    ]


def _wrong_variants(config: DropoutConfig) -> list[str]:
    whole = [(role, config.by_role()[role]) for role in ROLE_OF_DOOR if role in config.by_role()]
    problems = [
        f"dropout.{role} takes a rate, depth and progress, but was given "
        f"{'learned' if asked.learned else 'a variant'}: what it drops is no tensor's entries. "
        "Leave it out."
        for role, asked in whole
        if asked.learned or asked.variant is not None
    ]
    return problems + _wrong_for_attention(config)


def _wrong_for_attention(config: DropoutConfig) -> list[str]:
    given = config.by_role().get("attention")
    if given is None or (given.variant is None and not given.learned):
        return []
    asked = "learned" if given.learned else f"the variant {given.variant}"
    return [
        f"dropout.attention asks for {asked}, but attention probabilities are masked one by one, "
        "at a rate that is set. Leave it out."
    ]


def _schedules_without_layers(sites: Sequence[Site], config: DropoutConfig) -> list[str]:
    inserted = [(f"insert.{role}", given) for role, given in config.insert if given is not None]
    problems = []
    for name, given in [*config.by_role().items(), *inserted]:
        mine = [site for site in sites if given_for(site, config) is given]
        if given.depth != "constant" and mine and not any(layer_of(s.site) for s in mine):
            problems.append(
                f"dropout.{name} changes with depth ({given.depth}), but none of its sites is in a "
                f"layer (such as {mine[0].site}). Leave depth out."
            )
    return problems


_FOR_ALL_SAMPLES = ("layer", "spectrogram", JITTER, MODALITY)


def _wrong_domains(sites: Sequence[Site], config: DropoutConfig) -> list[str]:
    roles = sorted({site.role for site in sites})
    unknown = [
        f"dropout.domains.{name}.{role}: this model has no {role} dropout (it has: "
        f"{', '.join(roles) or 'none'})."
        for name, rates in config.domains.items()
        for role in rates
        if role not in roles
    ]
    together = sorted({s.role for s in sites if s.role in _FOR_ALL_SAMPLES and s.domains})
    unknown += [
        f"dropout.domains gives rates for {role}, but what it drops is decided for all samples of "
        "a step, by channel, or by the model's own rate. Leave them out."
        for role in together
    ]
    learned = sorted({site.role for site in sites if site.learned and site.domains})
    return unknown + [
        f"dropout.domains gives rates for {role}, whose rate is learned. Leave one of them out."
        for role in learned
    ]


def _overrides_without_sites(sites: Sequence[Site], config: DropoutConfig) -> list[str]:
    return [
        f"dropout.overrides pattern {pattern!r} matches no site; `masklock plan` lists them."
        for pattern in config.overrides
        if not any(_matches(pattern, site) for site in sites)
    ]


def _sites_that_cannot(sites: Sequence[Site], attention_refusal: str) -> list[str]:
    live = [site for site in sites if site.highest_rate > 0]
    problems = [
        f"site {s.label} (rate {s.highest_rate:g}) cannot be locked to samples: "
        f'{s.layout}; set its rate to 0 (dropout.overrides: {{"{s.label}": 0}}).'
        for s in live
        if s.layout not in (SAMPLE_FIRST, SHARED)
    ]
    attention = [site.highest_rate for site in live if site.role == "attention"]
    if attention and attention_refusal:
        problems.append(f"attention dropout is {attention[0]:g}: {attention_refusal}")
    return problems


_SAMPLED_EXPERTS = ("exponential_", "rand_like", "uniform_")


def _leaks(leaks: Iterable[Leak]) -> list[str]:
    """What leaked and what to do; a router that samples its experts (Phi-MoE) is one entry."""
    leaks = list(leaks)
    sampling = sorted({leak.site for leak in leaks if "exponential_" in leak.operator})
    others = [
        leak
        for leak in leaks
        if leak.site not in sampling or leak.operator.split(".")[1] not in _SAMPLED_EXPERTS
    ]
    problems = [
        f"randomness outside the plan in {leak}; set its rate in model.config_overrides to 0, or "
        "dropout.strict to false."
        for leak in others
    ]
    return problems + [
        f"randomness outside the plan in {site}: it samples which experts take a token, always in "
        "training, inside a function of its own where no door is. Choose a model that takes the "
        "likeliest ones, or set dropout.strict to false."
        for site in sampling
    ]
