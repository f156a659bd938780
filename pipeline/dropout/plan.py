"""The dropout plan: the record of traced forwards, before any weight is loaded.

Every rate-carrying field of the model's configuration gets a rate of its own (a tag); the rate seen at a site then
says which field it comes from, and so which role the site plays. Two batch sizes say where the sample axis is.
"""

import fnmatch
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pipeline.config.schema import DropoutConfig
from pipeline.dropout import doors
from pipeline.dropout.audit import Leak
from pipeline.dropout.sites import ROLE_OF_ATTRIBUTE, Site, role_of
from pipeline.dropout.trace import Call, trace
from pipeline.errors import DropoutError

_FIRST_BATCH, _SECOND_BATCH = 3, 5


@dataclass(frozen=True)
class DropoutPlan:
    """Every dropout site of a model, in the order of its forward pass."""

    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()
    attributes: tuple[tuple[str, float | None], ...] = ()
    """Rates to build the model with, so that every live site exists: (configuration field, rate)."""

    @property
    def digest(self) -> str:
        """Hash of what decides masks: sites, calls, variants, rates."""
        live = [(s.door, s.site, s.call, s.variant, s.rate) for s in self.in_force()]
        return hashlib.sha256(json.dumps(live).encode()).hexdigest()[:16]

    def in_force(self, door: str | None = None) -> list[Site]:
        """The sites that draw, of one door or of all."""
        return [s for s in self.sites if s.in_force and door in (None, s.door)]

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "sites": [site.to_json() for site in self.sites],
            "notes": list(self.notes),
            "attributes": dict(self.attributes),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "DropoutPlan":
        return DropoutPlan(
            sites=tuple(Site.from_json(site) for site in data["sites"]),
            notes=tuple(data["notes"]),
            attributes=tuple(data["attributes"].items()),
        )

    def table(self) -> str:
        """The plan for a terminal: one line a site, those in force first."""
        rows = [("site#call", "role", "variant", "rate", "door", "in force")]
        for site in sorted(self.sites, key=lambda s: not s.in_force):
            state = "yes" if site.in_force else f"no: {site.reason}"
            name = f"{site.site}#{site.call}"
            rows.append((name, site.role, site.variant, f"{site.rate:g}", site.door, state))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r[:5], widths, strict=True)) + f"  {r[5]}"
            for r in rows
        ]
        count = len(self.in_force())
        return "\n".join(
            [
                *lines,
                "",
                f"{count} of {len(self.sites)} sites in force, digest {self.digest}",
                *self.notes,
            ]
        )


@dataclass(frozen=True)
class Blueprint:
    """What the plan needs to know of a model that is not loaded yet.

    Attributes:
        build: rates by configuration field -> model without weights (any device).
        example: batch size -> arguments of its forward.
        defaults: the rate-carrying fields and their own rates (None: the model falls back to another field).
        body_prefix: name of the body inside a model with a head, or "".
        has_classification_head: whether there is one.
        insertable: modules by role (`embedding`, `hidden`) whose output can get an inserted site.
        attention_refusal: why attention dropout cannot be in force, or "".
    """

    build: Callable[[dict[str, float | None]], nn.Module]
    example: Callable[[int], dict[str, Any]]
    defaults: dict[str, float | None]
    body_prefix: str
    has_classification_head: bool
    insertable: Callable[[nn.Module], dict[str, list[str]]]
    attention_refusal: str = ""


def make_plan(blueprint: Blueprint, config: DropoutConfig) -> DropoutPlan:
    """Trace the model and decide every site's role and rate.

    Raises:
        DropoutError: a rate reaches no site, a live site cannot be keyed, or randomness leaks past the doors.
    """
    traced, leaks = _traced(blueprint, config)
    traced = [_with_rate(one, config) for one in traced]
    sites = [one.site for one in traced]
    problems = [
        *_rates_without_sites(sites, config),
        *_sites_that_cannot(sites, blueprint),
        *_overrides_without_sites(sites, config),
        *_leak_problems(leaks, config),
    ]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise DropoutError(f"The dropout plan cannot be made:\n{listed}")
    decided = tuple(
        replace(site, in_force=site.rate > 0, reason="" if site.rate > 0 else "rate 0")
        for site in sites
    )
    notes = tuple(f"randomness outside the plan: {leak}" for leak in leaks)
    return DropoutPlan(decided, notes, _build_rates(traced, blueprint))


@dataclass(frozen=True)
class _Traced:
    """A site with its own rate, and the configuration field that the rate came from."""

    site: Site
    attribute: str | None


def _traced(blueprint: Blueprint, config: DropoutConfig) -> tuple[list[_Traced], list[Leak]]:
    tags: dict[str, float | None] = {
        name: 0.25 + place / 1024 for place, name in enumerate(blueprint.defaults)
    }
    tagged = blueprint.build(tags)
    insert_role = _insert_roles(blueprint.insertable(tagged), config)
    inserted = set(insert_role)
    first, _ = trace(tagged, blueprint.example(_FIRST_BATCH), inserted)
    second, _ = trace(tagged, blueprint.example(_SECOND_BATCH), inserted)
    own, leaks = trace(
        blueprint.build(blueprint.defaults), blueprint.example(_FIRST_BATCH), inserted
    )
    shapes = {_key(call): call.shape for call in second}
    own_rates = {_key(call): call.rate for call in own}
    attribute_of = {rate: name for name, rate in tags.items()}
    sites = []
    for call in first:
        if call.door != doors.INSERTED and call.rate == 0:
            continue  # a rate that no configuration reaches
        attribute = attribute_of.get(call.rate)
        role = insert_role.get(call.site) if call.door == doors.INSERTED else None
        role = role or role_of(
            attribute or "",
            call.site,
            call.call,
            len(call.shape),
            blueprint.body_prefix,
            blueprint.has_classification_head,
        )
        site = Site(
            site=call.site,
            call=call.call,
            door=call.door,
            role=role,
            variant="attention" if role == "attention" else config.variants.get(role, "element"),
            rate=own_rates.get(_key(call), 0.0),
            in_force=False,
            reason="",
            layout=_layout(call.shape, shapes.get(_key(call))),
            shape=call.shape[1:],
        )
        sites.append(_Traced(site, attribute))
    return sites, leaks


def _key(call: Call) -> tuple[str, str, int]:
    return call.door, call.site, call.call


def _insert_roles(insertable: dict[str, list[str]], config: DropoutConfig) -> dict[str, str]:
    wanted = {"embedding": config.insert.embedding, "hidden": config.insert.hidden}
    return {
        site: role
        for role, rate in wanted.items()
        if rate is not None
        for site in insertable.get(role, [])
    }


def _layout(first: tuple[int, ...], second: tuple[int, ...] | None) -> str:
    """Where the sample axis is, from the shapes at two batch sizes."""
    if second is None:
        return "its calls depend on the batch size"
    a, b = _FIRST_BATCH, _SECOND_BATCH
    if first == second:
        return "shared by all samples of a batch"
    if first[0] % a == 0 and second[0] % b == 0 and first[0] // a == second[0] // b:
        return "sample-first"
    if len(first) > 1 and first[1] == a and second[1] == b:
        return "time-major: the sample is the second axis"
    return f"its shape {first} mixes samples"


def _with_rate(traced: _Traced, config: DropoutConfig) -> _Traced:
    site = traced.site
    given = config.rates()
    if site.door == doors.INSERTED:
        given = {"embedding": config.insert.embedding or 0.0, "hidden": config.insert.hidden or 0.0}
    rate = given.get(site.role, site.rate)
    for pattern, override in config.overrides.items():
        if _matches(pattern, site):
            rate = override
    return replace(traced, site=replace(site, rate=float(rate)))


def _matches(pattern: str, site: Site) -> bool:
    name = f"{site.site}#{site.call}" if "#" in pattern else site.site
    return fnmatch.fnmatchcase(name, pattern)


def _rates_without_sites(sites: list[Site], config: DropoutConfig) -> list[str]:
    own_roles = sorted({s.role for s in sites if s.door != doors.INSERTED})
    inserted = {s.role for s in sites if s.door == doors.INSERTED}
    problems = []
    for role, rate in config.rates().items():
        if rate > 0 and role not in own_roles:
            problems.append(
                f"dropout.{role} is {rate:g}, but this model has no {role} dropout "
                f"(it has: {', '.join(own_roles) or 'none'}){_hint(role)}."
            )
    for role in ("embedding", "hidden"):
        if getattr(config.insert, role) and role not in inserted:
            problems.append(
                f"dropout.insert.{role} is {getattr(config.insert, role):g}, but this model has no modules to put it on "
                "(embed_tokens, self_attn, mlp)."
            )
    for role, variant in config.variants.items():
        if role not in ROLE_OF_ATTRIBUTE.values():
            problems.append(
                f"dropout.variants.{role}: unknown role; known: {', '.join(sorted(set(ROLE_OF_ATTRIBUTE.values())))}."
            )
        elif (role == "attention") != (variant == "attention"):
            problems.append(
                f"dropout.variants.{role} is {variant}: attention probabilities take the variant `attention`, all other "
                "roles element, channel or token."
            )
    return problems


def _hint(role: str) -> str:
    if role in ("embedding", "hidden"):
        return f"; to add it, use dropout.insert.{role}"
    if role == "adapter":
        return "; it needs a peft method with lora_dropout"
    return ""


def _sites_that_cannot(sites: list[Site], blueprint: Blueprint) -> list[str]:
    problems = [
        f"site {s.site}#{s.call} (rate {s.rate:g}) cannot be locked to samples: {s.layout}; set its rate to 0"
        for s in sites
        if s.rate > 0 and s.layout != "sample-first"
    ]
    live_attention = [s for s in sites if s.role == "attention" and s.rate > 0]
    if live_attention and blueprint.attention_refusal:
        problems.append(
            f"attention dropout is {live_attention[0].rate:g}: {blueprint.attention_refusal}"
        )
    return problems


def _overrides_without_sites(sites: list[Site], config: DropoutConfig) -> list[str]:
    return [
        f"dropout.overrides pattern {pattern!r} matches no site; `masklock plan` lists them"
        for pattern in config.overrides
        if not any(_matches(pattern, site) for site in sites)
    ]


def _leak_problems(leaks: list[Leak], config: DropoutConfig) -> list[str]:
    if not config.strict:
        return []
    return [
        f"randomness outside the plan in {leak}; set its rate in model.config_overrides to 0, or dropout.strict=false"
        for leak in leaks
    ]


def _build_rates(
    traced: list[_Traced], blueprint: Blueprint
) -> tuple[tuple[str, float | None], ...]:
    """Rates to build the model with: the largest of a field's sites, so that each live site exists."""
    rates = dict(blueprint.defaults)
    for name in rates:
        of_field = [t.site.rate for t in traced if t.attribute == name]
        if of_field:
            rates[name] = max(of_field)
    return tuple(rates.items())
