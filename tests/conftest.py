import os

os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn

from lightning_kd import MultiTeacher
from lightning_kd.data import Digits


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """One thread and one seed, so that float sums come out the same on every machine."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("LIGHTNING_KD_DATA", raising=False)


class TinyNet(nn.Module):
    """Convolution, BatchNorm, dropout and a linear layer: all that training can get wrong."""

    def __init__(self, width: int = 4, num_classes: int = 10, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 2, 1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width * 16, num_classes)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return self.linear(self.dropout(x.flatten(1)))


@pytest.fixture
def tiny():
    return TinyNet


@pytest.fixture
def make_module():
    """A student of two teachers; equal arguments give equal weights."""

    def make(**options):
        torch.manual_seed(1)
        options.setdefault("student", TinyNet(dropout=0.3))
        options.setdefault("teachers", [TinyNet(8), TinyNet(6)])
        return MultiTeacher(**options)

    return make


@pytest.fixture
def digits():
    def make(**options):
        return Digits(
            **({"batch_size": 64, "subset": 256, "val_split": 64, "crop_padding": 1} | options)
        )

    return make


@pytest.fixture
def make_trainer(tmp_path):
    def make(**options):
        defaults = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**(defaults | options))

    return make


class Frozen(Callback):
    """Looks at the teachers after each batch of training."""

    def on_train_batch_end(self, trainer, module, *args):
        for teacher in module.teachers:
            assert not any(part.training for part in teacher.network.modules())
            assert not any(p.requires_grad for p in teacher.network.parameters())


def state_of(network):
    """Deep copy of weights and buffers."""
    return {k: v.clone() for k, v in network.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# ---------------------------------------------------- the table of tests/conformance


def pytest_runtest_logreport(report):
    if report.when == "call" and "test_battery.py" in report.nodeid:
        name, _, rest = report.nodeid.rpartition("::")[2].partition("[")
        mark = {"passed": "+", "failed": "FAIL", "skipped": "-"}[report.outcome]
        RESULTS.setdefault(rest.partition("]")[0], {})[name.removeprefix("test_")] = mark


def pytest_terminal_summary(terminalreporter):
    rows = {k: RESULTS[k] for k in sorted(RESULTS)}
    columns = sorted({column for row in rows.values() for column in row})
    if not rows:
        return
    terminalreporter.section("conformance: + holds, - does not apply")
    width = max(map(len, rows))
    for number, column in enumerate(columns, 1):
        terminalreporter.line(f"{number:3} {column.replace('_', ' ')}")
    head = " ".join(f"{n:>4}" for n in range(1, len(columns) + 1))
    terminalreporter.line(f"{'':{width}} {head}")
    for name, row in rows.items():
        cells = " ".join(f"{row.get(column, ''):>4}" for column in columns)
        terminalreporter.line(f"{name:{width}} {cells}")


RESULTS: dict[str, dict[str, str]] = {}
