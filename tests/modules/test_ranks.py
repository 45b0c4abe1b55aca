"""Two gloo processes equal one on the same global batch."""

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

class Net(TinyNet):  # BatchNorm sees a rank's share only, so two ranks cannot equal one with it
    def __init__(self, *args):
        super().__init__(*args)
        self.bn = torch.nn.GroupNorm(2, self.conv.out_channels)

def main(devices, path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hint = Hint("relu", "relu", adapter=False)
    module = MultiTeacher(Net(8), [Net(8), Net(8)], losses=[SoftTarget(), hint], task_weight=0.5)
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
    main(int(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("devices", [2])
def test_two_ranks_equal_one(devices, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    results = []
    for count in (1, devices):
        path = tmp_path / f"{count}.pt"
        done = subprocess.run(
            [sys.executable, str(script), str(count), str(path)],
            env={"PYTHONPATH": root, "PATH": "", "MASTER_ADDR": "127.0.0.1", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(path, weights_only=True))
    one, two = results
    for key, value in one["state"].items():
        torch.testing.assert_close(two["state"][key], value, rtol=1e-4, atol=1e-5, msg=key)
    for key in ("val/accuracy", "val/agreement", "val/ensemble/accuracy", "val/teacher_0/accuracy"):
        assert two["metrics"][key] == pytest.approx(one["metrics"][key], abs=1e-6), key
    assert two["metrics"]["val/ece"] == pytest.approx(one["metrics"]["val/ece"], abs=1e-4)
