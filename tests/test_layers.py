"""Imports go one way, and the public names stay."""

import ast
from pathlib import Path

import lightning_kd

PACKAGE = Path(lightning_kd.__file__).parent
# lower rooms first: a room imports from itself and from those before it
ORDER = [
    "files", "functional", "ranks", "strategies", "knowledge", "schedules", "adapters", "losses",
    "weighting", "exchange", "replay", "inversion", "sources", "models", "teachers", "modules",
    "callbacks", "data", "cli",
]  # fmt: skip


def rooms(path):
    """Rooms that a file imports at module level or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "lightning_kd":
                names = [f"lightning_kd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("lightning_kd."):
                yield name.split(".")[1]


def test_imports_go_downward_only():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for other in rooms(path):
            assert ORDER.index(other) <= ORDER.index(room), f"{path} imports {other}"
            seen.add(other)
    assert len(seen) > 8


def test_functional_and_losses_know_nothing_of_lightning():
    for room in ("functional", "losses", "weighting", "adapters", "teachers", "models"):
        for path in (PACKAGE / room).rglob("*.py"):
            assert "import lightning\n" not in path.read_text()
            assert "from lightning." not in path.read_text(), path


def test_public_names_stay():
    assert lightning_kd.__all__ == [
        "DataFree", "Distiller", "MultiTeacher", "NetworkOutput", "PeerCohort", "SubTeacher",
        "Supervised", "Teacher", "TeacherOutputs", "main",
    ]  # fmt: skip
    for name in lightning_kd.__all__:
        assert getattr(lightning_kd, name).__doc__
    assert lightning_kd.losses.SoftTarget


def test_files_are_short():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := p.read_text().count("\n")) > 360}
    assert not long
