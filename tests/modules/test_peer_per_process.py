"""One peer in each process equals one process, and says clearly when a process is gone."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from lightning_kd.exchange import Fusion, Mutual
from lightning_kd.losses import Hint
from lightning_kd.models import MultiBranch
from lightning_kd.modules import PeerCohort
from lightning_kd.strategies import PeerPerProcess, divide
from tests.modules.test_distributed import launch

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, sys
import torch
from lightning.pytorch import Trainer
from torchvision.transforms import v2
from tests.conftest import TinyNet
from lightning_kd import PeerCohort
from lightning_kd.data import Digits
from lightning_kd.exchange import Codistillation, Collective, LeaveOneOut, Mutual

CASES = {
    "mutual": lambda: {"exchange": Mutual()},
    "adam": lambda: {"optimizer": torch.optim.Adam, "clip_norm": 0.1},
    "codistillation": lambda: {"exchange": Codistillation(refresh_every=3, burn_in=2)},
    "general": lambda: {"exchange": Collective("general")},
    "teacher": lambda: {"teachers": [TinyNet(16)], "exchange": LeaveOneOut()},
    "views": lambda: {"view": v2.RandomHorizontalFlip()},
}

def main(devices, path, name):
    torch.manual_seed(0)
    options = CASES[name]()
    module = PeerCohort([TinyNet(4), TinyNet(8)], **options)
    if os.environ.get("LOCAL_RANK", "0") != "0":  # processes need not begin with the same weights
        for p in module.parameters():
            p.data += 0.01
    data = Digits(batch_size=64, subset=256, val_split=101, labelled_fraction=0.5, crop_padding=1)
    data.shuffle_seed = 5

    def trainer(epochs):
        return Trainer(
            max_epochs=epochs, accelerator="cpu", devices=devices, logger=False,
            enable_progress_bar=False, precision="64-true", default_root_dir=path,
            strategy="peer_per_process" if devices > 1 else "auto", enable_checkpointing=False,
            enable_model_summary=False,
        )

    torch.manual_seed(1)
    first = trainer(1)
    first.fit(module, datamodule=data)
    first.save_checkpoint(path + ".ckpt")
    torch.manual_seed(2)
    module = PeerCohort([TinyNet(4), TinyNet(8)], **CASES[name]())
    second = trainer(2)
    second.fit(module, datamodule=data, ckpt_path=path + ".ckpt")
    second.save_checkpoint(path + ".ckpt")
    seen = {k: float(v) for k, v in second.callback_metrics.items()}
    second.test(module, datamodule=data, verbose=False)
    assert module.peers.own_index is None
    if second.is_global_zero:
        seen |= {k: float(v) for k, v in second.callback_metrics.items()}
        torch.save({"metrics": seen, "live": module.state_dict()}, path)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in CASES:
        main(int(sys.argv[1]), f"{sys.argv[2]}.{name}", name)
"""


def assert_same(one, two, path=""):
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for k, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{path}.{k}")
    elif torch.is_tensor(one):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-10, msg=path)
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-6), path
    else:
        assert one == two, path


def test_two_processes_equal_one(tmp_path):
    """Weights, optimizer state and measurements, with a new start in between."""
    for count in (1, 2):
        launch(SCRIPT, tmp_path, str(count), str(tmp_path / str(count)))
    for name in ("mutual", "adam", "codistillation", "general", "teacher", "views"):
        one, two = (torch.load(tmp_path / f"{c}.{name}", weights_only=True) for c in (1, 2))
        assert_same(one, two, name)
        one, two = (torch.load(tmp_path / f"{c}.{name}.ckpt", weights_only=True) for c in (1, 2))
        for key in ("state_dict", "optimizer_states", "epoch", "global_step"):
            assert_same(one[key], two[key], f"{name}.{key}")
        assert len(one["optimizer_states"][0]["state"]) > 10


DIFFERENT = """
import os
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset
from tests.conftest import TinyNet
from lightning_kd import PeerCohort

if __name__ == "__main__":
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
    data = TensorDataset(torch.rand(64, 1, 8, 8), torch.arange(64) % 10)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="peer_per_process", logger=False,
        enable_checkpointing=False, enable_progress_bar=False,
    )
    try:
        trainer.fit(PeerCohort([TinyNet(4), TinyNet(4)]), DataLoader(data, batch_size=32))
    except ValueError as error:
        assert "same batch" in str(error), error
        print("refused")
        raise SystemExit(0)
    raise SystemExit("different batches were taken")
"""


def test_different_batches_are_refused(tmp_path):
    launch(DIFFERENT, tmp_path)


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"exchange": Fusion("relu")}, 2, "Fusion"),
        ({"update": "sequential"}, 2, "sequential"),
        ({"losses": [Hint("relu", "relu")]}, 2, "layers"),
        ({}, 3, "--trainer.devices 2"),
    ],
)
def test_what_cannot_be_divided_is_refused(tiny, options, count, message):
    module = PeerCohort([tiny(4), tiny(4)], **options)
    with pytest.raises(ValueError, match=message):
        divide(module.distillation, 0, count)


def test_branches_are_refused(tiny):
    module = PeerCohort([MultiBranch(tiny(4), "relu", 2)], Mutual())
    with pytest.raises(ValueError, match="branches"):
        divide(module.distillation, 0, 2)


def test_other_modules_are_refused(make_module):
    strategy = PeerPerProcess()
    strategy._lightning_module = make_module()
    with pytest.raises(TypeError, match="PeerCohort"):
        strategy.setup(Trainer(logger=False, enable_checkpointing=False))


def command(folder, *more):
    code = "from lightning_kd.cli import main; main()"
    (folder / "run.py").write_text(code)
    return [
        sys.executable, str(folder / "run.py"), "fit", "-c",
        str(ROOT / "configs/digits/peer_per_process.yaml"), f"--trainer.default_root_dir={folder}",
        "--trainer.enable_progress_bar=false", "--trainer.logger=false", *more,
    ]  # fmt: skip


def environment(folder):
    return {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(folder),
            "OMP_NUM_THREADS": "1"}  # fmt: skip


@pytest.mark.parametrize("victim", ["other", "first"])
def test_killed_process_ends_the_run_and_it_resumes(tmp_path, victim):
    """``kill -9`` one of two: the other says so and ends; the last checkpoint carries on."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    broken.mkdir()
    whole.mkdir()
    process = subprocess.Popen(
        command(broken, "--trainer.max_epochs=1000"), env=environment(broken),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    last = broken / "checkpoints" / "last.ckpt"
    try:
        deadline = time.monotonic() + 60
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert last.exists(), "no checkpoint within a minute"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]) if victim == "other" else process.pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert re.search(r"The process of peer \d lost the others", said), said[-2000:]
    assert "last.ckpt. Resume with" in said
    if victim == "first":
        return
    epoch = torch.load(last, weights_only=True)["epoch"]
    more = [f"--trainer.max_epochs={epoch + 3}"]
    for folder, extra in ((broken, [f"--ckpt_path={last}", "--overwrite=true"]), (whole, [])):
        done = subprocess.run(
            command(folder, *more, *extra), env=environment(folder), capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    for name in ("peer_0", "peer_1"):
        resumed, through = (load_file(f / f"{name}.safetensors") for f in (broken, whole))
        for key in through:
            assert torch.equal(resumed[key], through[key]), (name, key)
