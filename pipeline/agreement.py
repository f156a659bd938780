"""What all processes must agree on before a run starts: configuration, code, data, plan and masks.

A process that differs would not fail: it would train another model into the same weights.
"""

import hashlib
import math
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from pipeline import parallel
from pipeline.config.load import config_diff
from pipeline.config.schema import RunConfig
from pipeline.dropout.kernels import attention, rows
from pipeline.dropout.key import derive_key, signed
from pipeline.dropout.philox import scale, threshold
from pipeline.dropout.plan import DropoutPlan
from pipeline.dropout.sites import Site
from pipeline.dropout.variants import find_variant
from pipeline.errors import LayoutError

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "tokenizers")
NUM_PROBED_SITES = 4
_SOURCES = Path(__file__).resolve().parent


def agree(facts: Mapping[str, str]) -> None:
    """Compare facts over all processes; each of them raises the same error where one differs.

    Raises:
        LayoutError: the differences, by process and host.
    """
    mine = {"host": socket.gethostname(), **facts}
    if lines := differences(parallel.from_all(mine)):
        listed = "\n".join(f"  - {line}" for line in lines)
        raise LayoutError(
            f"The processes do not agree, so none of them goes on:\n{listed}\nStart all of them "
            "with the same checkout, packages, configuration, overrides and data."
        )


def differences(every: Sequence[Mapping[str, str]]) -> list[str]:
    """How the facts of other processes differ from those of the first."""
    first = every[0]
    lines = []
    for rank, facts in enumerate(every):
        where = f"process {rank} on {facts['host']}"
        for name, value in facts.items():
            if name == "host" or value == first.get(name):
                continue
            if name == "config":
                both = (RunConfig.model_validate_json(each[name]) for each in (first, facts))
                lines += [f"{where}: {line}" for line in config_diff(*both)]
            else:
                lines.append(f"{where}: {name} {value}, process 0 has {first.get(name)}")
    return lines


def start_facts(config: RunConfig) -> dict[str, str]:
    """What can be told before anything is loaded."""
    return {
        "config": config.model_dump_json(),
        "code": code_digest(),
        **{name: version(name) for name in LIBRARIES},
    }


def run_facts(
    plan: DropoutPlan, seed: int, data_fingerprint: str, step: int, device: torch.device
) -> dict[str, str]:
    """What is known once data and plan are there; `seed` as the masks use it."""
    return {
        "seed": str(seed),
        "plan digest": plan.digest,
        "data fingerprint": data_fingerprint[:16],
        "mask digest": mask_digest(plan, seed, step, device),
    }


def code_digest() -> str:
    """A hash of the sources that run, committed or not."""
    whole = hashlib.sha256()
    for path in sorted(_SOURCES.rglob("*")):
        if path.suffix in (".py", ".cpp"):
            whole.update(path.relative_to(_SOURCES).as_posix().encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def mask_digest(plan: DropoutPlan, seed: int, step: int, device: torch.device) -> str:
    """A hash of mask bits that this process's kernel draws at coordinates that all agree on."""
    whole = hashlib.sha256()
    sites = [s for s in plan.in_force() if find_variant(s.variant).kernel in ("rows", "attention")]
    for site in sites[:: max(1, len(sites) // NUM_PROBED_SITES)][:NUM_PROBED_SITES]:
        key = derive_key(seed, "train", step, site.variant, site.site, site.call)
        whole.update(f"{site.site}#{site.call}".encode() + _bits(site, signed(key), device))
    return whole.hexdigest()[:16]


def _bits(site: Site, key: int, device: torch.device) -> bytes:
    """The bits of three samples, for the shape that was traced."""
    variant, t = find_variant(site.variant), threshold(site.rate)

    def number(value: float) -> Tensor:
        return torch.tensor([[value]], device=device)

    ids = torch.tensor([[0], [1], [2**40 + 7]], device=device)
    limits = number(t), number(scale(t))
    if variant.kernel == "attention":
        queries, keys = (torch.arange(size, device=device)[None] for size in site.shape[-2:])
        ones = torch.ones(len(ids), *site.shape, device=device)
        drawn = attention(ones, number(key), ids, queries, keys, *limits)
    else:
        *places, features = site.shape
        length = math.prod(places)
        positions = torch.tensor([[variant.position(place) for place in range(length)]]).to(device)
        ones = torch.ones(len(ids), length, features, device=device)
        group = variant.group(features, getattr(site, "block_size", 1))
        drawn = rows(ones, number(key), ids, positions, *limits, group)
    return (drawn != 0).cpu().numpy().tobytes()
