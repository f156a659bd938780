"""Which rate a site gets from the configuration, and everything that stands against it.

A rate that would reach no site is an error, and so is a site that could not be locked: what the
configuration says is in force, or nothing runs.
"""

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline.config.schema import DropoutConfig
from pipeline.dropout.audit import Leak
from pipeline.dropout.doors import INSERTED
from pipeline.dropout.sites import ROLE_OF_ATTRIBUTE, SAMPLE_FIRST, Site


def with_rate(site: Site, config: DropoutConfig) -> Site:
    """The site with the rate of its role, or of the last override that matches it."""
    given = config.rates()
    if site.door == INSERTED:
        insert = config.insert
        given = {"embedding": insert.embedding or 0.0, "hidden": insert.hidden or 0.0}
    rate = given.get(site.role, site.rate)
    for pattern, override in config.overrides.items():
        if _matches(pattern, site):
            rate = override
    is_live = rate > 0
    return replace(site, rate=float(rate), in_force=is_live, reason="" if is_live else "rate 0")


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
        *_overrides_without_sites(sites, config),
        *_sites_that_cannot(sites, attention_refusal),
        *(_leaks(leaks) if config.strict else ()),
    ]


def _matches(pattern: str, site: Site) -> bool:
    name = f"{site.site}#{site.call}" if "#" in pattern else site.site
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
    return ""


def _insertions_without_modules(sites: Sequence[Site], config: DropoutConfig) -> list[str]:
    inserted = {site.role for site in sites if site.door == INSERTED}
    return [
        f"dropout.insert.{role} is {rate:g}, but this model has no modules to put it on "
        "(embed_tokens, self_attn, mlp)."
        for role, rate in config.insert
        if rate and role not in inserted
    ]


def _wrong_variants(config: DropoutConfig) -> list[str]:
    known = sorted(set(ROLE_OF_ATTRIBUTE.values()))
    unknown = [
        f"dropout.variants.{role}: unknown role; known: {', '.join(known)}."
        for role in config.variants
        if role not in known
    ]
    return unknown + [
        f"dropout.variants.{role} is {variant}: attention probabilities take the variant "
        "`attention`, all other roles element, channel or token."
        for role, variant in config.variants.items()
        if role in known and (role == "attention") != (variant == "attention")
    ]


def _overrides_without_sites(sites: Sequence[Site], config: DropoutConfig) -> list[str]:
    return [
        f"dropout.overrides pattern {pattern!r} matches no site; `masklock plan` lists them."
        for pattern in config.overrides
        if not any(_matches(pattern, site) for site in sites)
    ]


def _sites_that_cannot(sites: Sequence[Site], attention_refusal: str) -> list[str]:
    live = [site for site in sites if site.rate > 0]
    problems = [
        f"site {s.site}#{s.call} (rate {s.rate:g}) cannot be locked to samples: {s.layout}; "
        f'set its rate to 0 (dropout.overrides: {{"{s.site}#{s.call}": 0}}).'
        for s in live
        if s.layout != SAMPLE_FIRST
    ]
    attention = [site.rate for site in live if site.role == "attention"]
    if attention and attention_refusal:
        problems.append(f"attention dropout is {attention[0]:g}: {attention_refusal}")
    return problems


def _leaks(leaks: Iterable[Leak]) -> list[str]:
    return [
        f"randomness outside the plan in {leak}; set its rate in model.config_overrides to 0, or "
        "dropout.strict to false."
        for leak in leaks
    ]
