"""Imports go one way, the core needs no Lightning, and the public names stay."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import LightningModule

import lightning_kd
from lightning_kd import modules as paradigms

PACKAGE = Path(lightning_kd.__file__).parent
# lower rooms first: a room imports from itself and from those before it
ORDER = [
    "utils", "atomic_files", "functional", "distributed", "outputs", "schedules", "features",
    "models", "tasks", "losses", "weighting", "exchange", "teachers", "base_distillation",
    "metrics", "distillation", "peers", "cohort", "data_free", "data", "modules", "strategies",
    "callbacks", "cli",
]  # fmt: skip
CORE = ORDER[: ORDER.index("data")]
PARADIGMS = [
    name
    for name in paradigms.__all__
    if name != "Distiller" and hasattr(getattr(paradigms, name), "training_step")
]


def modules():
    """Every module of the package by its dotted name, and its syntax tree."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, path, ast.parse(path.read_text())


def imported(tree, everywhere=True):
    """Dotted names that a module imports; ``everywhere``: inside functions, too."""
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_downward_only():
    seen = set()
    for name, path, tree in modules():
        room = name.split(".")[1] if "." in name else ""
        if room in ("", "__main__"):
            continue
        for other in imported(tree):
            if other.startswith("lightning_kd."):
                below = other.split(".")[1]
                assert ORDER.index(below) <= ORDER.index(room), f"{path} imports {other}"
                seen.add(below)
    assert len(seen) > 15


def test_no_modules_import_each_other_in_a_circle():
    known = {name for name, _, _ in modules()}
    graph = {}
    for name, _, tree in modules():
        found = {o if o in known else o.rpartition(".")[0] for o in imported(tree)}
        # a package's __init__ exports what its parts give; the parts import each other directly
        graph[name] = {o for o in found & known if not name.startswith(f"{o}.") and o != name}

    def walk(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                walk(other, [*path, name])
            done.add(name)

    done = set()
    for name in graph:
        walk(name, [])


@pytest.mark.parametrize("package", ["lightning", "torchvision", "torchmetrics"])
def test_the_core_needs_neither_lightning_nor_torchvision(package):
    """In a process of its own, where importing that package is impossible."""
    code = f"""
import sys
sys.modules["{package}"] = None  # its import raises
import importlib, torch
for room in {CORE}:
    importlib.import_module("lightning_kd." + room)
from lightning_kd import Cohort, Distillation, Teacher
from torch import nn
losses = Distillation(nn.Linear(4, 3), nn.Linear(4, 3))(torch.rand(2, 4), torch.tensor([0, 2]))
losses["loss"].backward()
Cohort([nn.Linear(4, 3), nn.Linear(4, 3)])(torch.rand(2, 4), None)["loss"].backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_stay():
    assert {
        "Cohort", "DataFree", "Distillation", "Distiller", "MultiTeacher", "NetworkOutput",
        "PeerCohort", "SubTeacher", "Supervised", "Teacher", "TeacherOutputs", "main", *PARADIGMS,
    } <= set(lightning_kd.__all__)  # fmt: skip
    for name in lightning_kd.__all__:
        assert getattr(lightning_kd, name).__doc__
    assert lightning_kd.losses.SoftTarget
    assert {"losses", "weighting", "exchange", "callbacks", "data"} <= set(dir(lightning_kd))


@pytest.mark.parametrize("name", PARADIGMS)
def test_paradigms_are_shallow_and_narrow(name):
    paradigm = getattr(lightning_kd, name)
    own = [c.__name__ for c in paradigm.__mro__ if c.__module__.startswith("lightning_kd")]
    assert own == [name, "Distiller"]
    lightnings = set(dir(LightningModule))
    public = [n for n in dir(paradigm) if not n.startswith("_") and n not in lightnings]
    assert len(public) <= 10, public


def test_the_tests_that_contributing_links_are_there():
    root = PACKAGE.parent
    links = re.findall(r"\[([^\]]+)\]\((tests/[^)]+)\)", (root / "CONTRIBUTING.md").read_text())
    assert len(links) > 12
    for name, file in links:
        assert (root / file).exists(), file
        assert not name.startswith("test_") or f"def {name}(" in (root / file).read_text(), name


def test_files_are_short():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := p.read_text().count("\n")) > 300}
    assert not long
