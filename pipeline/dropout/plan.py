"""The dropout plan: the record of traced forwards, before any weight is loaded.

Every rate-carrying field of the model's configuration gets a rate of its own (a tag); the rate seen
at a site then says which field it comes from, and so which role the site plays. Two batches of
different shapes say which axes are samples and positions.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.dropout import DropoutConfig
from pipeline.dropout import doors
from pipeline.dropout.attention import KEYED, uses_interface
from pipeline.dropout.audit import Leak
from pipeline.dropout.mixing import mixing_notes
from pipeline.dropout.modality import modality_notes, with_channels
from pipeline.dropout.neighbours import learning_problems, linear_neighbours, with_linears
from pipeline.dropout.positions import is_stack
from pipeline.dropout.rates import problems_of, with_rates
from pipeline.dropout.sites import (
    AUGMENTATION,
    JITTER,
    ROLE_OF_ATTRIBUTE,
    ROLE_OF_DOOR,
    SAMPLE_FIRST,
    SHARED,
    Site,
    role_of,
)
from pipeline.dropout.trace import Call, trace
from pipeline.errors import DropoutError, ModelError, RunFolderError

_FIRST, _SECOND = (3, 8), (5, 7)  # samples and tokens of the traced batches; no multiples
SiteCall = tuple[str, str, int]


@dataclass(frozen=True)
class DropoutPlan:
    """Every dropout site of a model, in the order of its forward pass."""

    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()
    attributes: tuple[tuple[str, float | None], ...] = ()
    """Rates to build the model with, so that every live site exists: (field, rate)."""
    domains: tuple[str, ...] = ()
    """Data domains with rates of their own, by the code that rows carry."""
    attention: str | None = None
    """The door of attention dropout, as an `attn_implementation`; all draw the same masks."""
    num_steps: int | None = None
    """Steps of the whole training, for rates that change with progress."""

    def for_steps(self, num_steps: int) -> "DropoutPlan":
        """The plan of a training of so many steps."""
        return replace(self, num_steps=num_steps)

    @property
    def digest(self) -> str:
        """Hash of what decides masks: sites, calls, variants, rates and how they change."""
        live = [
            (s.door, s.site, s.call, s.variant, s.rate)
            + ((s.block_size,) if s.block_size > 1 else ())
            + ((s.progress, s.gamma, s.domains, s.learned) if s.changes else ())
            + ((s.channels, s.in_passes) if s.channels else ())
            for s in self.in_force()
        ]
        return hashlib.sha256(json.dumps(live).encode()).hexdigest()[:16]

    def in_force(self, door: str | None = None) -> list[Site]:
        """The sites that draw, of one door or of all."""
        return [s for s in self.sites if s.in_force and door in (None, s.door)]

    def in_passes(self) -> list[Site]:
        """The sites that draw in Monte-Carlo passes too: all but augmentation."""
        live = [site for site in self.in_force() if site.door not in AUGMENTATION]
        return [site for site in live if site.in_passes]

    @property
    def attn_implementation(self) -> str | None:
        """What the model must be built with; None where no attention probability is dropped."""
        is_live = any(site.role == "attention" for site in self.in_force())
        return (self.attention or "eager") if is_live else None

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "sites": [site.to_json() for site in self.sites],
            "notes": list(self.notes),
            "attributes": dict(self.attributes),
            "domains": list(self.domains),
            "attention": self.attn_implementation,
            "num_steps": self.num_steps,
        }

    @staticmethod
    def read(file: Path) -> "DropoutPlan":
        """The plan that a training wrote.

        Raises:
            RunFolderError: there is none, or it is damaged.
        """
        if not file.is_file():
            raise RunFolderError(f"{file.parent} has no {file.name}: train the run first.")
        try:
            return DropoutPlan.from_json(json.loads(file.read_bytes()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"{file} was to hold a dropout plan, but it is damaged ({error}). Train the run "
                "again under another name, or bring the file back."
            ) from None

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "DropoutPlan":
        return DropoutPlan(
            sites=tuple(Site.from_json(site) for site in data["sites"]),
            notes=tuple(data["notes"]),
            attributes=tuple(data["attributes"].items()),
            domains=tuple(data.get("domains", ())),
            attention=data.get("attention"),
            num_steps=data.get("num_steps"),
        )

    def table(self) -> str:
        """The plan for a terminal: one line a site, those in force first."""
        rows = [("site#call", "role", "variant", "rate", "door", "in force")]
        for site in sorted(self.sites, key=lambda s: not s.in_force):
            state = "yes" if site.in_force else f"no: {site.reason}"
            name = site.label
            variant = f"{site.variant} {site.block_size}" * (site.variant == "block")
            rate = f"{site.rate:g}" + f" ({site.detail})" * bool(site.detail)
            is_keyed = site.role == "attention" and self.attention == KEYED
            door = "interface" if is_keyed and site.in_force else site.door
            rows.append((name, site.role, variant or site.variant, rate, door, state))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, [*widths, 0], strict=True)) for r in rows]
        live = f"{len(self.in_force())} of {len(self.sites)} sites in force, digest {self.digest}"
        return "\n".join([*lines, "", live, *self.notes])


@dataclass(frozen=True)
class Blueprint:
    """What the plan needs to know of a model that is not loaded yet.

    Attributes:
        build: rates by configuration field -> model without weights (any device).
        example: batch size, length -> arguments of its forward.
        defaults: the rate-carrying fields and their own rates (None: the model falls back to
            another field).
        body_prefix: name of the body inside a model with a head, or "".
        has_classification_head: whether there is one.
        insertable: modules by role (`embedding`, `hidden`) whose output can get an inserted site.
        attention_refusal: why attention dropout cannot be in force, or "".
        build_keyed: as `build`, with `attn_implementation: keyed`; None where eager was asked for.
        channels: names of the model's channels, in its order; empty where it has one input.
    """

    build: Callable[[Mapping[str, float | None]], nn.Module]
    example: Callable[[int, int], dict[str, Any]]
    defaults: dict[str, float | None]
    body_prefix: str
    has_classification_head: bool
    insertable: Callable[[nn.Module], dict[str, list[str]]]
    attention_refusal: str = ""
    build_keyed: Callable[[Mapping[str, float | None]], nn.Module] | None = None
    channels: tuple[str, ...] = ()


def make_plan(blueprint: Blueprint, config: DropoutConfig) -> DropoutPlan:
    """Trace the model and decide every site's role and rate.

    Raises:
        DropoutError: a rate reaches no site, a live site cannot be keyed, or randomness leaks past
            the doors.
    """
    traces = _trace_thrice(blueprint, config)
    found = [_site_of(call, traces, blueprint) for call in traces.live_calls()]
    rated = with_channels(with_rates(found, config), config, blueprint.channels)
    sites = _with_neighbours(rated, traces, blueprint)
    problems = problems_of(sites, traces.leaks, config, blueprint.attention_refusal)
    problems += learning_problems(sites)
    attention = _attention_door(sites, traces, blueprint)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise DropoutError(f"The dropout plan cannot be made:\n{listed}")
    leaks = tuple(f"randomness outside the plan: {leak}" for leak in traces.leaks)
    notes = (*leaks, *traces.mixing, *_door_notes(sites))
    build_rates = _build_rates(sites, traces, blueprint)
    return DropoutPlan(
        sites, notes, build_rates, domains=tuple(sorted(config.domains)), attention=attention
    )


_DOOR_NOTES = {
    "layer": "LayerDrop leaves a layer out for all samples of a step, under every engine, and in "
    "Monte-Carlo passes; its parameters then get gradients of zero (DDP finds none unused).",
    "spectrogram": "SpecAugment masks spans in training only: Monte-Carlo passes see all features.",
    JITTER: "A router's jitter is drawn in training only.",
}


def _door_notes(sites: Sequence[Site]) -> list[str]:
    live = {site.door for site in sites if site.in_force}
    return [note for door, note in _DOOR_NOTES.items() if door in live] + modality_notes(sites)


def _attention_door(sites: Sequence[Site], traces: "_Traces", blueprint: Blueprint) -> str | None:
    """By the interface, where that draws what eager attention draws."""
    if not any(site.in_force and site.role == "attention" for site in sites):
        return None
    if blueprint.build_keyed is None:
        return "eager"
    try:
        model = blueprint.build_keyed(traces.tags)
        if not uses_interface(model):
            return "eager"
        found, _ = trace(model, blueprint.example(*_FIRST), traces.inserted)
    except (DropoutError, ModelError):  # an eager function that is not called as others are
        return "eager"
    return KEYED if found == traces.tagged else "eager"


@dataclass(frozen=True)
class _Traces:
    """What three forwards drew: two with tagged rates, of two shapes; one as configured."""

    tagged: list[Call]
    second_shapes: dict[SiteCall, tuple[int, ...]]
    own_rates: dict[SiteCall, float]
    leaks: list[Leak]
    mixing: list[str]
    """What mixes samples, in sentences."""
    inserted: dict[str, str]
    """Site -> role."""
    stacks: set[str]
    tags: dict[str, float]
    """Rate-carrying field -> the rate that marks it."""

    def live_calls(self) -> list[Call]:
        """Those that some configuration reaches."""
        return [call for call in self.tagged if call.door == doors.INSERTED or call.rate > 0]

    def attribute(self, call: Call) -> str | None:
        """The field that a call's rate comes from."""
        if call.door == JITTER:
            return None
        if call.door == doors.PATH:  # a share of its field's rate, which no other door reads
            paths = (n for n in self.tags if ROLE_OF_ATTRIBUTE[_field_name(n)] == "path")
            return next(paths, None)
        return next((name for name, tag in self.tags.items() if tag == call.rate), None)

    def share(self, call: Call) -> float:
        """The part of its field's rate that the model gives this call."""
        attribute = self.attribute(call)
        return round(call.rate / self.tags[attribute], 9) if attribute is not None else 1.0

    def is_first_of_stack(self, call: Call) -> bool:
        """Whether a stack draws here itself, before all its other sites: on its embeddings."""
        parent = call.site.rpartition(".")[0]
        stack = call.site if call.site in self.stacks else parent
        inside = [
            c for c in self.live_calls() if f"{c.site}.".startswith(f"{stack}." * bool(stack))
        ]
        return stack in self.stacks and inside[0] == call


def _with_neighbours(
    sites: tuple[Site, ...], traces: _Traces, blueprint: Blueprint
) -> tuple[Site, ...]:
    if not any(site.learned for site in sites):
        return sites
    model, example = blueprint.build(traces.tags), blueprint.example(*_FIRST)
    return with_linears(sites, linear_neighbours(model, example, traces.inserted))


def _trace_thrice(blueprint: Blueprint, config: DropoutConfig) -> _Traces:
    tags = {name: 0.25 + place / 1024 for place, name in enumerate(blueprint.defaults)}
    model, example = blueprint.build(tags), blueprint.example(*_FIRST)
    inserted = _inserted_roles(blueprint.insertable(model), config)
    tagged, _ = trace(model, example, inserted)
    second, _ = trace(model, blueprint.example(*_SECOND), inserted)
    own, leaks = trace(blueprint.build(blueprint.defaults), example, inserted)
    return _Traces(
        tagged=tagged,
        second_shapes={_key(call): call.shape for call in second},
        own_rates={_key(call): call.rate for call in own},
        leaks=leaks,
        mixing=mixing_notes(model, doors.site_names(model)),
        inserted=inserted,
        stacks={name for module, name in doors.site_names(model).items() if is_stack(module)},
        tags=tags,
    )


def _site_of(call: Call, traces: _Traces, blueprint: Blueprint) -> Site:
    """A traced call as a site, at its own rate."""
    shape, second = call.shape, traces.second_shapes.get(_key(call))
    if shape == second:  # no axis of samples
        shape = (1, *shape)
    if shape and shape[0] % _FIRST[0] == 0 and shape[0] > _FIRST[0]:
        shape = (_FIRST[0], shape[0] // _FIRST[0], *shape[1:])
    role = traces.inserted.get(call.site) if call.door == doors.INSERTED else None
    role = role or ROLE_OF_DOOR.get(call.door) or _role(call, shape[1:], traces, blueprint)
    return Site(
        site=call.site,
        call=call.call,
        door=call.door,
        role=role,
        variant=role if role == "attention" or call.door in ROLE_OF_DOOR else "element",
        rate=traces.own_rates.get(_key(call), 0.0),
        in_force=False,
        reason="",
        layout=_layout(call.shape, second, role),
        shape=shape[1:],
        share=traces.share(call),
    )


def _role(call: Call, shape: tuple[int, ...], traces: _Traces, blueprint: Blueprint) -> str:
    attribute = _field_name(traces.attribute(call))
    is_folded = len(shape) == len(call.shape) == 3  # older attention: [samples x heads, Q, K]
    is_attention_rate = ROLE_OF_ATTRIBUTE.get(attribute) == "attention"
    body = blueprint.body_prefix
    is_in_body = not body or f"{call.site}.".startswith(f"{body}.")
    return role_of(
        attribute,
        call.site,
        has_heads=len(call.shape) == 4 or (is_folded and is_attention_rate),
        is_outside_body=blueprint.has_classification_head and not is_in_body,
        is_first_of_stack=traces.is_first_of_stack(call),
    )


def _field_name(attribute: str | None) -> str:
    """`drop_path_rate` of `backbone_config.drop_path_rate`."""
    return (attribute or "").rpartition(".")[2]


def _key(call: Call) -> SiteCall:
    return call.door, call.site, call.call


def _inserted_roles(insertable: dict[str, list[str]], config: DropoutConfig) -> dict[str, str]:
    return {
        site: role
        for role, given in config.insert
        if given is not None
        for site in insertable.get(role, [])
    }


def _layout(first: tuple[int, ...], second: tuple[int, ...] | None, role: str) -> str:
    """Where the sample axis is, from the shapes of a call in two batches; or why nowhere."""
    (B1, T1), (B2, T2) = _FIRST, _SECOND
    if second is None or len(second) != len(first):
        return "its calls depend on the batch"
    if role in ("layer", "spectrogram"):
        return SAMPLE_FIRST
    if first == second:
        return SHARED
    if first[1:2] == (B1,) and second[1:2] == (B2,):
        return "the sample is its second axis (time-major)"
    (m1, rest1), (m2, rest2) = divmod(first[0], B1), divmod(second[0], B2)
    if rest1 or rest2 or (m1 != m2 and m1 * T2 != m2 * T1):
        return f"its mask, of shape {first}, is shared by samples"
    if role == "attention":
        if first[-1] != first[-2] or second[-1] != second[-2]:
            return f"its shape {first} is not (samples, heads, queries, keys)"
    elif role != "path" and first[-1] != second[-1]:
        return f"the last axis of its shape {first} is the sequence, not features"
    return SAMPLE_FIRST


def _build_rates(
    sites: Sequence[Site], traces: _Traces, blueprint: Blueprint
) -> tuple[tuple[str, float | None], ...]:
    """Rates to build the model with: the largest of a field's sites, so each live site exists."""
    rates = dict(blueprint.defaults)
    calls = traces.live_calls()
    for name in rates:
        of_field = [
            site.highest_rate
            for site, call in zip(sites, calls, strict=True)
            if traces.attribute(call) == name
        ]
        if of_field:
            rates[name] = max(of_field)
    return tuple(rates.items())
