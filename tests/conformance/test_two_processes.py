"""Two gloo processes train every method to the weights that one trains it to."""

import json
import os

import pytest
import torch

from tests.conformance.conftest import CONFIGS, build
from tests.modules.test_distributed import launch
from tests.test_configs import ROOT

SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.conformance.test_two_processes import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        own = folder / name
        own.mkdir(exist_ok=True)
        train(name, 2, own)
"""


#: these compare the images of a batch with each other, of which a process has its share only
OF_THE_BATCH = ("gram_loss", "log_euclidean", "pkt", "relational")
#: trust that is computed in single precision
ROUNDED = {"domain_similarity": 1e-4, "gradient_space": 1e-6}


def without_batch_statistics(module):
    """A process has its share of a batch only, so BatchNorm cannot agree with one process."""
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
                learns = child.affine and child.weight.requires_grad
                other = torch.nn.GroupNorm(1, child.num_features).double()
                setattr(part, name, other.requires_grad_(learns).train(child.training))


def train(name, devices, folder):
    """Three batches of 64 images in all processes together; in double precision."""
    os.chdir(ROOT)  # files that a YAML names lie there
    method = build(next(p for p in CONFIGS if p.stem == name), folder)
    module, data = method.module, method.data  # a copy would leave teachers as they are
    data.batch_size, data.shuffle_seed = 64 // devices, 5
    torch.manual_seed(0)
    module.double()._build(torch.rand(2, *data.image_shape, dtype=torch.float64))
    without_batch_statistics(module)
    strategy = "ddp" if module.automatic_optimization else "ddp_find_unused_parameters_true"
    module, trainer = method.fit(
        max_epochs=1, limit_val_batches=0, precision="64-true", devices=devices,
        strategy=strategy if devices > 1 else "auto",
    )  # fmt: skip
    if trainer.is_global_zero:
        state = {k: v for k, v in module.state_dict().items() if torch.is_tensor(v)}
        torch.save(state, folder / f"{devices}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    names = [
        p.stem for p in CONFIGS if "DataFree" not in p.read_text() and p.stem not in OF_THE_BATCH
    ]
    for name in names:
        (tmp_path / name).mkdir()
        train(name, 1, tmp_path / name)
    launch(SCRIPT, tmp_path, str(tmp_path), *names)
    wrong = {}
    for name in names:
        one, two = (torch.load(tmp_path / name / f"{n}.pt", weights_only=True) for n in (1, 2))
        assert one.keys() == two.keys()
        gaps = {k: float((v.double() - two[k].double()).abs().max()) for k, v in one.items()}
        worst = max(gaps, key=lambda k: gaps[k])
        if gaps[worst] > ROUNDED.get(name, 1e-8):
            wrong[name] = (worst, gaps[worst])
    assert not wrong, wrong


LONELY = """
import sys
from pathlib import Path
import torch
from tests.conformance.test_two_processes import validate_unevenly

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        own = Path(sys.argv[1]) / name
        own.mkdir(exist_ok=True)
        validate_unevenly(name, 2, own)
"""


def validate_unevenly(name, devices, folder):
    """Of two processes the first has two batches to validate, the second one."""
    os.chdir(ROOT)
    method = build(next(p for p in CONFIGS if p.stem == name), folder)
    data = getattr(method.data, "measure", method.data)
    data.val_split, data.batch_size = 65, 32 * (2 // devices)
    strategy = "ddp" if method.module.automatic_optimization else "ddp_find_unused_parameters_true"
    _, trainer = method.fit(
        limit_val_batches=1.0, devices=devices, strategy=strategy if devices > 1 else "auto"
    )
    assert trainer.num_val_batches == [2 - trainer.global_rank]
    if trainer.is_global_zero:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        (folder / f"{devices}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_validation_batches(tmp_path):
    """Neither waits for the other forever, and every image counts once."""
    names = ("multi_teacher", "cohort", "self_paced", "fusion", "sub_teacher", "data_free",
             "lowest_loss", "adversarial", "teacher")  # fmt: skip
    launch(LONELY, tmp_path, str(tmp_path), *names)
    for name in names:
        found = json.loads((tmp_path / name / "2.json").read_text())
        accuracies = [value for key, value in found.items() if key.endswith("accuracy")]
        assert accuracies
        for value in accuracies:
            assert value * 65 == pytest.approx(round(value * 65), abs=1e-4)
