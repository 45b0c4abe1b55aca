"""Every shipped method in miniature: built from its YAML, trained for six batches, kept."""

from __future__ import annotations

import copy
import os
import re
import signal
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_kd import DataFree, Teacher
from lightning_kd.callbacks import DistillationReport, ExportStudent
from lightning_kd.cli import main
from tests.conftest import Frozen
from tests.test_configs import ROOT, untrained

CONFIGS = sorted((ROOT / "configs" / "digits").glob("*.yaml"))
SMALLER = {  # a round without data
    "student_steps": 3, "generator_steps": 2, "warm_up": 0, "round_images": 24, "batch_size": 24,
    "capacity": 100,
}  # fmt: skip


class Terminator(Callback):
    """SIGTERM, as a scheduler sends it, in the middle of the second epoch."""

    def __init__(self, after: int = 4) -> None:
        self.left = after

    def on_train_batch_end(self, trainer, module, *_):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class Saver(Callback):
    """Write a checkpoint in the middle of the second epoch."""

    def __init__(self, path: Path, after: int = 4) -> None:
        self.path, self.left = path, after

    def on_train_batch_end(self, trainer, module, *_):
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


@dataclass
class Method:
    """One YAML, built once; ``fresh`` gives equal modules, data and callbacks."""

    name: str
    folder: Path
    module: object
    data: object
    callbacks: list
    parser: object = None
    config: object = None
    kept: dict = field(default_factory=dict)

    @property
    def data_free(self) -> bool:
        return isinstance(self.module, DataFree)

    def fresh(self):
        return copy.deepcopy((self.module, self.data, self.callbacks))

    def fit(self, resume=None, callbacks=(), export=None, **options):
        """Two epochs of three batches; returns the module and the trainer."""
        seed_everything(0, verbose=False)
        torch.set_num_threads(1)
        module, data, own = self.fresh()
        if export is not None:
            own = [*own, ExportStudent(str(export))]
        settings = {
            "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1,
            "num_sanity_val_steps": 0, "accelerator": "cpu", "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": self.folder / "runs",
        }  # fmt: skip
        trainer = Trainer(callbacks=[*own, *callbacks], **(settings | options))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return module, trainer

    @property
    def whole(self):
        """An uninterrupted run: module, trainer, what teachers were before."""
        if "whole" not in self.kept:
            self.kept["teachers"] = {
                f"{i}.{k}": v.clone()
                for i, n in enumerate(self.teacher_networks())
                for k, v in n.state_dict().items()
            }
            self.kept["whole"] = self.fit(
                callbacks=[Saver(self.checkpoint), Frozen()], export=self.folder / "export"
            )
        return self.kept["whole"]

    @property
    def checkpoint(self) -> Path:
        """Of the fourth batch."""
        return self.folder / "middle.ckpt"

    def teacher_networks(self):
        found = [m.network for m in self.module.modules() if isinstance(m, Teacher)]
        return list(dict.fromkeys(found))


@pytest.fixture(scope="session")
def built():
    return {}


@pytest.fixture(scope="session")
def method(request, built, tmp_path_factory):
    """One YAML of configs/digits."""
    path = request.param
    if path.stem not in built:
        built[path.stem] = build(path, tmp_path_factory.mktemp(path.stem))
    return built[path.stem]


def build(path: Path, folder: Path) -> Method:
    """Module, data and callbacks of a YAML, with nothing written outside ``folder``."""
    text = re.sub(
        r"(?<=checkpoint: )(runs/[\w/.]+\.safetensors)",
        lambda match: untrained(match[1], folder),
        path.read_text(),
    )
    text = re.sub(r"(?<=folder: )runs/", f"{folder}/", text)
    if "DataFree" in text:
        for name, value in SMALLER.items():
            text = re.sub(rf"\b{name}: \d+", f"{name}: {value}", text)
    (folder / "c.yaml").write_text(text)
    here = Path.cwd()
    os.chdir(ROOT)
    cli = main(["-c", str(folder / "c.yaml")], run=False)
    os.chdir(here)
    kept = [
        c for c in cli.trainer.callbacks
        if type(c).__module__.startswith("lightning_kd")
        and not isinstance(c, (ModelCheckpoint, DistillationReport, ExportStudent))
        and type(c).__name__ not in ("SaveRunConfig", "InversionReport")
    ]  # fmt: skip
    return Method(path.stem, folder, cli.model, cli.datamodule, kept, cli.parser, cli.config)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def pytest_generate_tests(metafunc):
    if "method" in metafunc.fixturenames:
        cases = [
            pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.stem))
            for path in CONFIGS
        ]
        metafunc.parametrize("method", cases, indirect=True, scope="session")
