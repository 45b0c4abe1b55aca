"""Two gloo processes equal one on the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import os, sys
import torch
from lightning.pytorch import Trainer
from tests.conftest import TinyNet
from lightning_kd import MultiTeacher
from lightning_kd.data import Digits
from lightning_kd.losses import Hint, SoftTarget
from lightning_kd.weighting import GradientSpace, LearnedGate, SelfPaced, Switching, Uniform

WEIGHTINGS = {
    "Uniform": Uniform, "GradientSpace": GradientSpace, "SelfPaced": SelfPaced,
    "LearnedGate": LearnedGate, "Switching": Switching,
}

class Net(TinyNet):  # BatchNorm sees a rank's share only, so two ranks cannot equal one with it
    def __init__(self, *args):
        super().__init__(*args)
        self.bn = torch.nn.GroupNorm(2, self.conv.out_channels)

def main(devices, path, name):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # a projection's BatchNorm too would see a rank's share only
    hint = Hint("relu", "relu", adapter=False)
    module = MultiTeacher(
        Net(8), [Net(8), Net(8)], losses=[SoftTarget(), hint], task_weight=0.5,
        weighting=WEIGHTINGS[name](),
    )
    data = Digits(
        batch_size=64 // devices, subset=256, val_split=101, labelled_fraction=0.2, crop_padding=1
    )
    data.shuffle_seed = 5
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=devices, logger=False, enable_progress_bar=False,
        strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        torch.save({"state": module.state_dict(), "metrics": metrics}, path)

if __name__ == "__main__":
    for name in WEIGHTINGS:
        main(int(sys.argv[1]), f"{sys.argv[2]}.{name}", name)
"""


COHORT = """
import sys
import torch
from lightning.pytorch import Trainer
from tests.conftest import TinyNet
from lightning_kd import PeerCohort
from lightning_kd.data import Digits
from lightning_kd.exchange import Codistillation, Mutual
from lightning_kd.losses import Hint, SoftTarget

class Net(TinyNet):  # see above
    def __init__(self, *args):
        super().__init__(*args)
        self.bn = torch.nn.GroupNorm(2, self.conv.out_channels)

CASES = {
    "mutual": {"clip_norm": 0.1},
    "sequential": {"update": "sequential"},
    "codistillation": {  # nobody teaches in the burn-in, and an adapter has nothing to do
        "exchange": Codistillation(3, 4), "losses": [SoftTarget(), Hint("relu", "relu", True)]
    },
}

def main(devices, path, name):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = PeerCohort([Net(4), Net(4)], **CASES[name])
    data = Digits(
        batch_size=64 // devices, subset=256, val_split=101, labelled_fraction=0.2, crop_padding=1
    )
    data.shuffle_seed = 5
    many = "ddp_find_unused_parameters_true" if name == "sequential" else "ddp"
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=devices, logger=False, precision="64-true",
        strategy=many if devices > 1 else "auto", enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    if trainer.is_global_zero:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        state = {k: v for k, v in module.state_dict().items() if "hint" not in k}
        torch.save({"state": state, "metrics": metrics}, path)

if __name__ == "__main__":
    for name in CASES:
        main(int(sys.argv[1]), f"{sys.argv[2]}.{name}", name)
"""


FILES = """
import time
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from tests.conftest import TinyNet
from lightning_kd import MultiTeacher
from lightning_kd.callbacks import DistillationReport, ExportStudent
from lightning_kd.cli import SaveRunConfig, main
from lightning_kd.data import Digits
from lightning_kd.losses import Hint
from lightning_kd.weighting import Fixed

on_fit_start = SaveRunConfig.on_fit_start

def late(self, trainer, pl_module):
    time.sleep(trainer.global_rank)  # rank 0 is the first to look, and to write
    on_fit_start(self, trainer, pl_module)

SaveRunConfig.on_fit_start = late

def in_python():
    module = MultiTeacher(
        TinyNet(), [TinyNet(), TinyNet()], losses=[Hint("relu", "relu")],
        weighting=Fixed([1.0, 0.0]),  # the second projection gets no gradient
    )
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=CSVLogger("logs"),
        callbacks=[DistillationReport(plot=False), ExportStudent()], enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )
    data = Digits(batch_size=64, subset=256)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)

def on_the_command_line():
    callbacks = ("DistillationReport", "ExportStudent")
    main([
        "fit", "--model=lightning_kd.Supervised", "--model.student=lightning_kd.models.resnet8",
        "--model.student.width=4", "--data=lightning_kd.data.Digits", "--data.subset=256",
        "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.devices=2",
        "--trainer.strategy=ddp", "--trainer.logger=false", "--trainer.default_root_dir=fresh",
        "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false",
        *[f"--trainer.callbacks+=lightning_kd.callbacks.{name}" for name in callbacks],
    ])

if __name__ == "__main__":
    torch.set_num_threads(1)
    in_python()
    on_the_command_line()
"""


def launch(script, folder, *args):
    """Run a script whose Trainer starts the other ranks."""
    path = folder / "train.py"
    # else gloo's threads may abort the interpreter when it ends
    end = "    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()"
    path.write_text(f"{script.rstrip()}\n{end}\n")
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(path), *args],
        env={"PYTHONPATH": root, "PATH": "", "MASTER_ADDR": "127.0.0.1", "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


WEIGHTINGS = ("Uniform", "GradientSpace", "SelfPaced", "LearnedGate", "Switching")


def test_cohort_on_two_ranks_equals_one(tmp_path):
    for count in (1, 2):
        launch(COHORT, tmp_path, str(count), str(tmp_path / f"{count}.pt"))
    for name in ("mutual", "sequential", "codistillation"):
        one, two = (torch.load(tmp_path / f"{c}.pt.{name}", weights_only=True) for c in (1, 2))
        loose = 1e-2 if name == "codistillation" else 1e-10  # the adapter's BatchNorm
        for key, value in one["state"].items():
            if torch.is_tensor(value):
                torch.testing.assert_close(
                    two["state"][key], value, rtol=1e-6, atol=loose, msg=f"{name}: {key}"
                )
        assert two["metrics"] == pytest.approx(one["metrics"], abs=max(loose, 1e-6))


def test_two_ranks_equal_one(tmp_path):
    for count in (1, 2):
        launch(SCRIPT, tmp_path, str(count), str(tmp_path / f"{count}.pt"))
    for name in WEIGHTINGS:
        one, two = (torch.load(tmp_path / f"{c}.pt.{name}", weights_only=True) for c in (1, 2))
        for key, value in one["state"].items():
            if torch.is_tensor(value):
                torch.testing.assert_close(
                    two["state"][key], value, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}"
                )
            else:
                assert two["state"][key] == value, (name, key)
        got, wanted = two["metrics"], one["metrics"]
        assert got.keys() == wanted.keys()
        for key in got:
            train = key.startswith("train/") or key in ("val/loss", "val/ece")
            assert got[key] == pytest.approx(wanted[key], abs=1e-4 if train else 1e-6), (name, key)


def test_two_ranks_share_a_folder_and_end_with_all_files(tmp_path):
    launch(FILES, tmp_path)
    written = {"report.json", "student.json", "student.safetensors"}
    logged = tmp_path / "logs" / "lightning_logs" / "version_0"
    assert written < {p.name for p in logged.iterdir()}
    report = json.loads((logged / "report.json").read_text())
    assert json.loads((logged / "report_test.json").read_text())["split"] == "test"
    assert report["student"]["accuracy"] is not None
    assert report["history"][0]["train/hint"] > 0
    fresh = tmp_path / "fresh"
    assert {p.name for p in fresh.iterdir()} == written | {"config.yaml", "report.png"}
