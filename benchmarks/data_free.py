"""How much does a student learn without data, and which part of SSD-KD does it?

    lightning-kd fit -c configs/mnist/teacher.yaml
    python benchmarks/data_free.py run --seeds 0 1 2
    python benchmarks/data_free.py table
    python benchmarks/data_free.py plot

Setting: MNIST; the teacher is a ResNet-8 of width 16 (75,002 parameters), the student one of width
8 (19,074). Every arm takes the same number of student steps of the same batch, and every arm that
inverts images the same number of generator steps; the student is measured on the test images at
fixed numbers of its steps, and the last measurement counts. ``real images`` distils from the
training images and is the ceiling. A seed sets all weights but the teacher's, and all draws.
``run`` appends one line a run to benchmarks/results/data_free.jsonl and skips those there.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_kd import DataFree
from lightning_kd.callbacks import ReplayBuffer
from lightning_kd.data import MNIST, Rounds
from lightning_kd.inversion import (
    Activation,
    Adversarial,
    BatchNormStatistics,
    ClassBalance,
    OneHot,
)
from lightning_kd.models import ImageGenerator, pretrained, resnet8
from lightning_kd.replay import Prioritized, Uniform
from lightning_kd.sources import Generator, ImageSource, MetaGenerator, Noise, TeacherLabels

RESULTS = Path("benchmarks/results/data_free.jsonl")
TEACHER = "runs/mnist/teacher/student.safetensors"
ROUNDS, WARM_UP, STEPS, IMAGES, BATCH = 46, 6, 25, 128, 64
SCALE = 1000  # images remembered, where the memory is a ring


class Real(ImageSource):
    """Training images, for the ceiling."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self._images = (images,)

    def begin(self, count, shape, random):
        self._now = self.draw(count, shape, random)

    def forward(self):
        return self._now

    def descend(self, loss, optimizer):
        pass

    def draw(self, count, shape, random):
        (images,) = self._images
        return images[torch.randint(len(images), (count,), generator=random)].float().div_(255)


def generator() -> ImageGenerator:
    return ImageGenerator((1, 28, 28), latent=64, width=16)


def terms(modulate: bool) -> list:
    return [
        BatchNormStatistics(1.0),
        OneHot(0.5, modulate=modulate),
        Adversarial(1.0, masked=True),
    ]


def inverted(sampler, capacity: int | None = SCALE, modulate: bool = False):
    def make(data):
        options = {"source": MetaGenerator(generator()), "terms": terms(modulate)}
        return options, [ReplayBuffer(capacity, sampler())]

    return make


def dafl(data):
    wishes = [OneHot(1.0), ClassBalance(5.0), Activation("layer3", 0.1)]
    return {"source": Generator(generator()), "terms": wishes, "targets": TeacherLabels()}, []


def real(data):
    data.setup("fit")
    return {"source": Real(data._train[0]), "terms": []}, []


ARMS = {
    "noise": lambda data: ({"source": Noise(), "terms": []}, [ReplayBuffer(SCALE, Uniform())]),
    "DAFL, no memory": dafl,
    "Fast: all kept, uniform": inverted(Uniform, None),
    "ring, uniform": inverted(Uniform),
    "ring, priority": inverted(Prioritized),
    "ring, priority, phi (SSD-KD)": inverted(Prioritized, modulate=True),
    "real images": real,
}


class Curve(Callback):
    """Test accuracy, seconds and student steps, every so many rounds; measuring is not counted."""

    def __init__(self, data: MNIST, every: int = 10) -> None:
        data.setup("test")
        images, labels = data._test
        self.images, self.labels, self.every = images, labels, every
        self.rows: list[list[float]] = []
        self.measuring = 0.0

    def on_train_start(self, trainer, module):
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        learned = module.rounds - WARM_UP
        if learned <= 0 or learned % self.every:
            return
        begun = time.perf_counter()
        module.student.eval()
        with torch.no_grad():
            right = [
                (module.student(x.float().div(255)).argmax(1) == y).sum().item()
                for x, y in zip(self.images.split(500), self.labels.split(500), strict=True)
            ]
        seconds = begun - self.start - self.measuring
        self.rows.append([learned * STEPS, round(seconds, 1), sum(right) / len(self.labels)])
        self.measuring += time.perf_counter() - begun


def run(arm: str, seed: int, capacity: int | None = None) -> dict:
    """Train and test one student."""
    seed_everything(seed, verbose=False)
    data = MNIST(batch_size=BATCH)
    student = resnet8(num_classes=10, in_channels=1, width=8, stem_stride=2)
    options, callbacks = ARMS[arm](data)
    if capacity is not None:
        callbacks = [ReplayBuffer(capacity, callbacks[0].sampler)]
    curve = Curve(data)
    module = DataFree(
        student, pretrained(TEACHER), temperature=4.0, round_images=IMAGES, source_steps=5,
        student_steps=STEPS, batch_size=BATCH, warm_up=WARM_UP,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=ROUNDS - WARM_UP),
        scheduler_interval="step", **options,
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, curve],
    )  # fmt: skip
    trainer.fit(module, datamodule=Rounds(ROUNDS, num_classes=10, image_shape=(1, 28, 28)))
    scale = callbacks[0].capacity if callbacks else None
    return {"arm": arm, "seed": seed, "scale": scale, "curve": curve.rows}


def rows() -> list[dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def spread(values: list[float]) -> str:
    error = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {error:.2f} (n={len(values)})"


def table() -> str:
    """Test accuracy at fixed numbers of student steps, and the seconds of the whole run."""
    found = rows()
    points = [row[0] for row in found[0]["curve"]]
    lines = [
        "| arm | images kept | " + " | ".join(f"{p} steps, %" for p in points) + " | seconds |",
        "|---|---|" + "---|" * (len(points) + 1),
    ]
    for arm in ARMS:
        scales = sorted({r["scale"] or 0 for r in found if r["arm"] == arm})
        for scale in scales:
            runs = [r["curve"] for r in found if r["arm"] == arm and (r["scale"] or 0) == scale]
            cells = [spread([100 * c[k][2] for c in runs]) for k in range(len(points))]
            seconds = statistics.mean(c[-1][1] for c in runs)
            kept = scale or ("all" if "Fast" in arm else "-")
            lines.append(f"| {arm} | {kept} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def plot() -> None:
    """Draw test accuracy over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for index, arm in enumerate(ARMS):
        runs = [r["curve"] for r in rows() if r["arm"] == arm and r["scale"] in (None, SCALE)]
        if not runs:
            continue
        seconds = [statistics.mean(c[k][1] for c in runs) for k in range(len(runs[0]))]
        means = [100 * statistics.mean(c[k][2] for c in runs) for k in range(len(runs[0]))]
        axes.plot(seconds, means, marker="o", markersize=3, color=f"C{index}", label=arm)
    axes.set(xlabel="seconds of training (one core)", ylabel="test accuracy, %", ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "table", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--scale", type=int, help="images kept, where the memory is a ring")
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1])
    options = parser.parse_args()
    if options.what == "run":
        warnings.filterwarnings("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
        for arm, seed in jobs[options.part[0] :: options.part[1]]:
            done = {(r["arm"], r["seed"]) for r in rows() if options.scale in (None, r["scale"])}
            if (arm, seed) in done:
                continue
            result = run(arm, seed, options.scale)
            print(result, flush=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
    if options.what == "plot":
        plot()
    else:
        print(table())
