"""The layout that the README promises: floors, one subject a file, a tree that equals the disk."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "monitoring", "launch")
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "deepspeed"}
VAGUE = {"utils", "util", "helpers", "helper", "misc", "common", "tools", "base"}

# Imports go down only. Units of one floor may know each other, but never in a circle.
FLOORS = {
    "pipeline": 0,
    "pipeline.errors": 0,
    "pipeline.records": 0,
    "pipeline.locking": 0,
    "pipeline.metric_names": 0,
    "pipeline.exhibits": 0,
    "pipeline.config": 0,
    "pipeline.library_output": 1,
    "pipeline.parallel": 1,
    "pipeline.engines": 1,
    "pipeline.failure": 1,
    "pipeline.tracking": 1,
    "pipeline.dropout": 2,
    "pipeline.hub": 2,
    "pipeline.encoders": 2,
    "pipeline.fusion": 3,
    "pipeline.modality": 3,
    "pipeline.sources": 4,
    "pipeline.corpora": 4,
    "pipeline.canaries": 4,
    "pipeline.data": 4,
    "pipeline.packing": 4,
    "pipeline.quantization": 4,
    "pipeline.adapter": 4,
    "pipeline.blueprint": 4,
    "pipeline.model": 4,
    "pipeline.model_config": 4,
    "pipeline.trained": 4,
    "pipeline.checkpoint": 4,
    "pipeline.arguments": 5,
    "pipeline.objective": 5,
    "pipeline.agreement": 4,
    "pipeline.sharding": 5,
    "pipeline.zero": 5,
    "pipeline.callbacks": 5,
    "pipeline.trainer": 5,
    "pipeline.validation": 5,
    "pipeline.train": 5,
    "pipeline.evaluation": 5,
    "pipeline.check": 6,
    "pipeline.verify": 6,
    "pipeline.export": 6,
    "pipeline.rows": 6,
    "pipeline.doctor": 6,
    "pipeline.quickstart": 7,
    "pipeline.commands": 8,
    "pipeline.__main__": 9,
}
TRAINING = {
    "pipeline.sharding",
    "pipeline.zero",
    "pipeline.arguments",
    "pipeline.objective",
    "pipeline.callbacks",
    "pipeline.trainer",
    "pipeline.train",
    "pipeline.validation",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for package in PACKAGES for p in (ROOT / package).rglob("*.py")}


def unit_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(tree: ast.AST, module_level_only: bool = False) -> Iterator[str]:
    """Names that a module imports, `from a import b` as `a.b`; not those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not (module_level_only and is_function):
            yield from imports(node, module_level_only)


def known_module(name: str) -> str | None:
    """The module of ours that holds an imported name."""
    while name not in MODULES:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return name if name in MODULES else None
    return name


TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
OURS = {
    module: {found for name in imports(tree) if (found := known_module(name))} - {module}
    for module, tree in TREES.items()
}


def reachable(start: str) -> set[str]:
    seen, ahead = set(), [start]
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += OURS[module]
    return seen


def test_every_part_of_the_pipeline_has_a_floor():
    units = {unit_of(module) for module in MODULES if module.startswith("pipeline")}
    assert units - FLOORS.keys() == set(), "give it a floor in this test, and a line in the README"


def test_imports_go_down_only():
    floors = {module: FLOORS[unit_of(module)] for module in OURS if unit_of(module) in FLOORS}
    wrong = [
        f"{module} (floor {floor}) imports {other} (floor {floors[other]})"
        for module, floor in floors.items()
        for other in OURS[module]
        if floors.get(other, 0) > floor
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    circles = [
        f"{module} -> {other} -> ... -> {module}"
        for module in OURS
        for other in OURS[module]
        if module in reachable(other)
    ]
    assert circles == []


def test_training_and_evaluation_do_not_know_each_other():
    for module, others in OURS.items():
        units = {unit_of(other) for other in others}
        if unit_of(module) == "pipeline.evaluation":
            assert not units & TRAINING, module
        if unit_of(module) in TRAINING:
            assert "pipeline.evaluation" not in units, module


def test_only_the_top_of_the_pipeline_knows_monitoring():
    below = {module for module in OURS if FLOORS.get(unit_of(module), 9) < 5}
    assert [m for m in below if any(other.startswith("monitoring") for other in OURS[m])] == []


def test_monitoring_needs_no_torch_and_no_training_code():
    for module in MODULES:
        if unit_of(module).startswith("monitoring"):
            for other in reachable(module):
                assert FLOORS.get(unit_of(other), 0) == 0, f"{module} reaches {other}"
                heavy = HEAVY & {name.split(".")[0] for name in imports(TREES[other], True)}
                assert not heavy, f"{module} reaches {other}, which imports {heavy}"


def test_the_lowest_floor_loads_without_torch():
    for module, tree in TREES.items():
        if FLOORS.get(unit_of(module)) == 0:
            assert not HEAVY & {name.split(".")[0] for name in imports(tree, True)}, module


def test_files_are_named_after_their_subject():
    assert [path for path in MODULES.values() if path.stem in VAGUE] == []


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_outgrows_its_subject(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= 400


def test_every_package_has_an_init():
    folders = {path.parent for path in MODULES.values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_module_says_what_it_is_for():
    assert [module for module, tree in TREES.items() if not ast.get_docstring(tree)] == []


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_packages_in_pyproject_are_those_on_the_disk():
    on_disk = {module_name(path.parent / "__init__.py") for path in MODULES.values()}
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(on_disk)


def test_tested_versions_are_pinned_and_lie_in_the_supported_ranges():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    tested = {Requirement(line).name.lower(): line.split("==")[1] for line in lines}
    assert lines[0].startswith("torch==")
    for text in project()["project"]["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(tested[wanted.name.lower()]), text


def test_test_files_have_names_of_their_own_and_live_in_no_package():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def readme_tree() -> dict[Path, set[str]]:
    """Folder -> names below it, from the tree in the README; two spaces (or a branch) a level."""
    section = (ROOT / "README.md").read_text().partition("## Layout")[2]
    block = re.search(r"```\w*\n(.*?)```", section, re.DOTALL)
    assert block, "README.md has a section 'Layout' with a fenced tree"
    tree: dict[Path, set[str]] = {Path(): set()}
    path: list[str] = []
    for line in filter(str.strip, block[1].splitlines()):
        plain = re.sub(r"[│├└─]", " ", line)
        depth = (len(plain) - len(plain.lstrip())) // 2
        names = re.split(r"\s{2,}", plain.strip())[0].split(", ")
        folder = Path(*path[:depth])
        tree.setdefault(folder, set()).update(name.rstrip("/") for name in names)
        path[depth:] = [names[-1].rstrip("/")]
    return tree


def on_disk(folder: Path) -> set[str]:
    """What a reader finds in a folder: sources and folders, not what tools leave behind."""
    left_behind = {"__init__.py", "__pycache__", "build", "runs", "wandb", "conftest.py"}
    return {
        path.name
        for path in (ROOT / folder).iterdir()
        if path.name not in left_behind and not path.name.startswith(".")
        if path.suffix not in {".so", ".egg-info"} and (folder != Path() or path.is_dir())
        if path.is_file() or any(inner.is_file() for inner in path.rglob("[!.]*[!c]"))
    }


def test_the_tree_in_the_readme_equals_the_disk():
    tree = readme_tree()
    assert {*PACKAGES} <= tree[Path()]
    for folder, names in tree.items():
        assert names == on_disk(folder), f"in {folder}"
