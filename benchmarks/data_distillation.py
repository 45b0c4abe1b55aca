"""Data distillation with few labels: pseudo-labels of one view or several, hard or soft.

    python benchmarks/data_distillation.py run
    python benchmarks/data_distillation.py table

Setting: 5,000 training images of Fashion-MNIST, of which 250 have a label, the test images once at
the end. Teacher and students are ResNet-8 of width 16, 1,820 steps of 64 images, with flips and
crops; the teacher learns from the labels alone. The two views are the image and its mirror image; a
batch of a student has 38 labelled and 26 pseudo-labelled images. A seed sets initial weights, the
order of the batches, the images and which of them have a label. Results are appended to
benchmarks/results/data_distillation.jsonl; give ``--part 0 2`` and ``--part 1 2`` to two processes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import add_part, bare_trainer, gain, quiet, read, run_missing, spread
from lightning.pytorch import seed_everything
from torch import nn

from lightning_kd import SubTeacher, Supervised
from lightning_kd.callbacks import PseudoLabels
from lightning_kd.data import FashionMNIST, PseudoLabelled
from lightning_kd.models import Averaged, Mirror, Plain, resnet8
from lightning_kd.teachers import MultiView

RESULTS = Path("benchmarks/results/data_distillation.jsonl")
STEPS = 1820
VIEWS = {"one view": [Plain()], "two views": [Plain(), Mirror()]}
ARMS = {
    "teacher: labels alone": None,
    "labels alone again": None,
    "hard, one view": ("hard", "one view"),
    "hard, two views": ("hard", "two views"),
    "soft, one view": ("soft", "one view"),
    "soft, two views": ("soft", "two views"),
    "asked at each step, two views": ("online", "two views"),
}


def images(seed: int, **more: Any) -> FashionMNIST:
    return FashionMNIST(
        batch_size=64, val_split=500, subset=5000, split_seed=seed, labelled_fraction=0.05,
        flip=True, crop_padding=2, **more,
    )  # fmt: skip


def network() -> nn.Module:
    return resnet8(num_classes=10, in_channels=1, width=16, stem_stride=2)


def options() -> dict[str, Any]:
    return {
        "optimizer": lambda p: torch.optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        ),
        "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS),
        "scheduler_interval": "step",
    }


def fit(module: Any, source: Any) -> None:
    bare_trainer(
        max_steps=STEPS, max_epochs=-1, gradient_clip_val=5.0, limit_val_batches=0
    ).fit(module, datamodule=source)  # fmt: skip


def test(student: nn.Module, seed: int) -> float:
    (scores,) = bare_trainer().test(Supervised(student), datamodule=images(seed), verbose=False)
    return 100 * scores["test/accuracy"]


def run(seed: int) -> list[dict[str, Any]]:
    """Every arm of one seed, with one teacher."""
    seed_everything(seed, verbose=False)
    teacher = network()
    fit(Supervised(teacher, **options()), images(seed, keep_unlabelled=False))
    found = {"teacher: labels alone": test(teacher, seed)}
    right: dict[str, float] = {}
    for arm, how in ARMS.items():
        if arm in found:
            continue
        seed_everything(seed + 1000, verbose=False)
        student = network()
        if how is None:
            fit(Supervised(student, **options()), images(seed, keep_unlabelled=False))
        elif how[0] == "online":
            views = MultiView(VIEWS[how[1]])
            fit(SubTeacher(student, teacher, views, task_weight=0.1, **options()), images(seed))
        else:
            with tempfile.TemporaryDirectory() as folder:
                mean = Averaged([teacher], VIEWS[how[1]])
                bare_trainer([PseudoLabels(folder)]).predict(
                    Supervised(mean),
                    datamodule=images(seed, predict_split="train"),
                    return_predictions=False,
                )
                source = PseudoLabelled(images(seed), folder, how[0])
                fit(Supervised(student, **options()), source)
                right[arm] = right_labels(source, seed)
        found[arm] = test(student, seed)
    return [
        {"arm": arm, "seed": seed, "accuracy": accuracy, "right": right.get(arm)}
        for arm, accuracy in found.items()
    ]


def right_labels(source: PseudoLabelled, seed: int) -> float:
    """Share of the pseudo-labels that are right, of those that are used, in percent."""
    truth = FashionMNIST(val_split=500, subset=5000, split_seed=seed)
    truth.setup("fit")
    known = source.data.training[1]
    assert source.targets is not None
    soft = source.targets.is_floating_point()
    given = source.targets.argmax(1) if soft else source.targets
    used = (known < 0) & (given >= 0)
    return 100 * float((given[used] == truth.training[1][used]).float().mean())


def table() -> str:
    rows = read(RESULTS)
    base = {r["seed"]: r["accuracy"] for r in rows if r["arm"] == "labels alone again"}
    lines = [
        "| student learns from | test accuracy % | over labels alone | pseudo-labels right % |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = {r["seed"]: r["accuracy"] for r in rows if r["arm"] == arm}
        right = [r["right"] for r in rows if r["arm"] == arm and r["right"]]
        more = "" if arm == "labels alone again" else gain(mine, base)
        share = spread(right) if right else ""
        lines.append(f"| {arm} | {spread(list(mine.values()))} | {more} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add_part(parser)
    chosen = parser.parse_args()
    quiet()
    if chosen.what == "run":
        jobs = [(seed,) for seed in chosen.seeds]
        run_missing(RESULTS, ("seed",), jobs, run, chosen.part)
    else:
        print(table())
