"""How much does a student learn without data, and which part of SSD-KD does it?

    lightning-kd fit -c configs/mnist/teacher.yaml
    python benchmarks/data_free.py run --seeds 0 1 2 3 4
    python benchmarks/data_free.py frozen --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/data_free.py table
    python benchmarks/data_free.py plot

Two settings: ``--setting mnist`` (teacher ResNet-8 of width 16, student of width 8) and
``--setting cifar10 --teacher FILE`` (the file's ResNet-20 teaches a ResNet-14 of width 8). Every
arm takes the same number of student steps of the same batch, and every arm that inverts images the
same number of generator steps, but for the larger data scales, which need more images to fill the
memory; the student is measured on the test images at fixed numbers of its steps, and the last
measurement counts. ``real images`` distils from the training images and is the ceiling. A seed sets
all weights but the teacher's, and all draws. ``frozen`` runs SSD-KD once a seed, keeps its images,
and then trains students that differ in the draws alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import add_part, bare_trainer, gain, quiet, read, run_missing, spread
from lightning.pytorch import Callback, seed_everything
from torch import nn

from lightning_kd import DataFree
from lightning_kd.callbacks import ChannelsLast, ReplayBuffer
from lightning_kd.data import CIFAR10, MNIST, Rounds
from lightning_kd.data_free.generators import BaseGenerator, Generator, MetaGenerator, Noise
from lightning_kd.data_free.image_losses import (
    Activation,
    Adversarial,
    BatchNormStatistics,
    ClassBalance,
    OneHot,
)
from lightning_kd.data_free.replay import Prioritized, Uniform
from lightning_kd.data_free.targets import TeacherLabels
from lightning_kd.models import ImageGenerator, pretrained, resnet8, resnet14, resnet20

RESULTS = Path("benchmarks/results/data_free.jsonl")
FROZEN = Path("benchmarks/results/data_free_frozen.jsonl")


@dataclass(frozen=True)
class Setting:
    """A pair of networks and the budget of a run."""

    data: type
    student: Callable[[], nn.Module]
    generator: Callable[[], nn.Module]
    rounds: int
    warm_up: int
    generator_steps: int
    student_steps: int
    images: int
    batch: int
    scale: int
    every: int  # rounds between two measurements
    batch_norm: float
    momentum: float = 0.0
    one_hot: float = 0.5
    adversarial: float = 1.0
    temperature: float = 4.0
    rate: float = 0.1
    views: int | None = None  # each image and its mirror image

    def images_of(self, share: float) -> int:
        """How many images a share of the real training images is."""
        return round(share * {MNIST: 60_000, CIFAR10: 50_000}[self.data])

    def teacher(self, file: str | None) -> nn.Module:
        """The teacher that ``file`` holds."""
        if self.data is MNIST:
            return pretrained(file or "runs/mnist/teacher/student.safetensors")
        return pretrained(file or "teachers/cifar10_resnet20.safetensors", resnet20())


SETTINGS = {
    "mnist": Setting(
        MNIST,
        lambda: resnet8(num_classes=10, in_channels=1, width=8, stem_stride=2),
        lambda: ImageGenerator((1, 28, 28), latent=64, width=16),
        rounds=46, warm_up=6, generator_steps=5, student_steps=25, images=128, batch=64, scale=1000,
        every=10, batch_norm=1.0,
    ),
    "cifar10": Setting(
        CIFAR10,
        lambda: resnet14(num_classes=10, width=8),
        lambda: ImageGenerator((3, 32, 32), latent=128, width=16),
        rounds=60, warm_up=10, generator_steps=5, student_steps=40, images=64, batch=64, scale=1500,
        every=10, batch_norm=10.0, momentum=0.9, one_hot=0.4, adversarial=1.1, temperature=20.0,
        views=2,
    ),
}  # fmt: skip
SCALES = (0.01, 0.05, 0.10, 0.25)  # of the real training images
BATCH_NORM = (0.0, 0.2, 5.0)


class Real(BaseGenerator):
    """Training images, for the ceiling."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self._images = (images,)

    def start_round(self, count, shape, random):
        self._now = self.sample(count, shape, random)

    def forward(self):
        return self._now

    def step(self, loss, optimizer):
        pass

    def sample(self, count, shape, random):
        (images,) = self._images
        return images[torch.randint(len(images), (count,), generator=random)].float().div_(255)


def image_losses(setting: Setting, modulate: bool, batch_norm=None, normalize=False) -> list:
    weight = setting.batch_norm if batch_norm is None else batch_norm
    losses = [
        OneHot(setting.one_hot, modulate=modulate, normalize=normalize),
        Adversarial(setting.adversarial, masked=True),
    ]
    return [BatchNormStatistics(weight, setting.momentum), *losses] if weight else losses


def inverted(sampler, keep_all: bool = False, modulate: bool = False, **changes):
    def make(setting, scale):
        options = {
            "generator": MetaGenerator(setting.generator()),
            "image_losses": image_losses(setting, modulate, **changes),
            "round_images": max(setting.images, -(-scale // (setting.rounds - setting.warm_up))),
        }
        kept = None if keep_all else scale * (setting.views or 1)
        return options, [ReplayBuffer(kept, sampler())]

    return make


def dafl(setting, scale):
    losses = [OneHot(1.0), ClassBalance(5.0), Activation("layer3", 0.1)]
    generator = Generator(setting.generator(), learning_rate=3e-2)
    return {"generator": generator, "image_losses": losses, "targets": TeacherLabels()}, []


def noise(setting, scale):
    return {"generator": Noise(), "image_losses": []}, [ReplayBuffer(scale, Uniform())]


def real(setting, scale):
    data = setting.data(val_split=0.0)
    data.setup("fit")
    return {"generator": Real(data._train[0]), "image_losses": []}, []


ARMS: dict[str, Callable] = {
    "noise": noise,
    "DAFL, no memory": dafl,
    "Fast: all kept, uniform": inverted(Uniform, keep_all=True),
    "ring, uniform": inverted(Uniform),
    "ring, priority": inverted(Prioritized),
    "ring, priority, phi (SSD-KD)": inverted(Prioritized, modulate=True),
    "real images": real,
}
FULL, BASE = "ring, priority, phi (SSD-KD)", "ring, uniform"
SWEEP = {
    f"SSD-KD, BatchNorm weight {weight:g}": inverted(Prioritized, modulate=True, batch_norm=weight)
    for weight in BATCH_NORM
}
SWEEP["SSD-KD, phi over its mean"] = inverted(Prioritized, modulate=True, normalize=True)
EVERY = {**ARMS, **SWEEP}


class Curve(Callback):
    """Student steps, seconds of the processor and test accuracy, every so many rounds.

    Measuring is not counted.
    """

    def __init__(self, setting: Setting) -> None:
        data = setting.data()
        data.setup("test")
        (self.images, self.labels), self.setting = data._test, setting
        self.rows: list[list[float]] = []
        self.measuring = 0.0

    def on_train_start(self, trainer, module):
        self.start = time.process_time()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        learned = module.rounds - self.setting.warm_up
        if learned <= 0 or learned % self.setting.every:
            return
        begun = time.process_time()
        module.student.eval()
        with torch.no_grad():
            right = [
                (module.student(x.float().div(255)).argmax(1) == y).sum().item()
                for x, y in zip(self.images.split(500), self.labels.split(500), strict=True)
            ]
        seconds = begun - self.start - self.measuring
        steps = learned * module.student_steps
        self.rows.append([steps, round(seconds, 1), sum(right) / len(self.labels)])
        self.measuring += time.process_time() - begun


def fit(setting: Setting, teacher: nn.Module, parts: dict, callbacks: list[Callback], **more: Any):
    """Train one student; returns the rows of its ``Curve``."""
    curve, learned = Curve(setting), setting.rounds - setting.warm_up
    options = {
        "round_images": setting.images, "generator_steps": setting.generator_steps,
        "student_steps": setting.student_steps, "batch_size": setting.batch,
        "warm_up": setting.warm_up, "temperature": setting.temperature,
        "flip": setting.views is not None, "views": setting.views if callbacks else None,
        **parts, **more,
    }  # fmt: skip
    module = DataFree(
        setting.student(), teacher,
        optimizer=lambda p: torch.optim.SGD(p, setting.rate, momentum=0.9, weight_decay=5e-4),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=learned),
        scheduler_interval="step", **options,
    )  # fmt: skip
    rounds = Rounds(setting.rounds, num_classes=10, image_shape=setting.data.image_shape)
    faster = [ChannelsLast()] if setting.data is CIFAR10 else []
    bare_trainer([*callbacks, curve, *faster], max_epochs=1).fit(module, datamodule=rounds)
    return curve.rows


def run(name: str, arm: str, scale: int, seed: int, file: str | None) -> dict:
    """Train and test one student."""
    seed_everything(seed, verbose=False)
    setting = SETTINGS[name]
    parts, callbacks = EVERY[arm](setting, scale)
    curve = fit(setting, setting.teacher(file), parts, callbacks)
    return {"setting": name, "arm": arm, "scale": scale, "seed": seed, "curve": curve}


# ------------------------------------------------------------------ frozen images

DRAWS = {
    "uniform": Uniform(),
    "priority (1, 0.4)": Prioritized(),
    "priority (0.6, 0.4), weights over max": Prioritized(alpha=0.6, normalize="max"),
    "priority (0.6, 1)": Prioritized(alpha=0.6, beta=1.0),
}
KEPT, STEPS = (500, 2000), (400, 1600)


class Frozen(ReplayBuffer):
    """A memory that takes nothing in."""

    def extend(self, images, logits, priorities):
        pass


def frozen(name: str, seed: int, file: str | None) -> list[dict]:
    """Make images once, then train a student on them by each way to draw."""
    seed_everything(seed, verbose=False)
    setting = SETTINGS[name]
    teacher, found = setting.teacher(file), []
    for kept in KEPT:
        parts, (memory,) = EVERY[FULL](setting, kept)
        fit(setting, teacher, parts, [memory])
        state = memory.state_dict()
        # nobody has learned from them yet
        state["priorities"] = torch.ones_like(state["priorities"])
        for steps in STEPS:
            for draws, sampler in DRAWS.items():
                seed_everything(1000 + seed, verbose=False)
                pool = Frozen(kept, sampler)
                pool.load_state_dict(state)
                short = Setting(**{**vars(setting), "rounds": 4, "warm_up": 0, "every": 4})
                curve = fit(
                    short, teacher, {"generator": Noise(), "image_losses": []}, [pool],
                    round_images=1, student_steps=steps // 4, flip=False, views=None,
                )  # fmt: skip
                row = {"setting": name, "kept": kept, "steps": steps, "draws": draws}
                found.append({**row, "seed": seed, "accuracy": curve[-1][2]})
    return found


# ------------------------------------------------------------------ tables


def runs_of(name: str, arm: str, scale: int) -> dict[int, list]:
    """Curves by seed."""
    return {
        r["seed"]: r["curve"]
        for r in read(RESULTS)
        if (r["setting"], r["arm"], r["scale"]) == (name, arm, scale)
    }


def table(name: str) -> str:
    """Test accuracy at fixed numbers of student steps, and the seconds of the whole run."""
    setting = SETTINGS[name]
    last = (setting.rounds - setting.warm_up) * setting.student_steps
    points = range(setting.every * setting.student_steps, last + 1,
                   setting.every * setting.student_steps)  # fmt: skip
    lines = [
        "| arm | images kept | "
        + " | ".join(f"{p} steps, %" for p in points)
        + " | over ring, uniform | seconds |",
        "|---|---|" + "---|" * (len(points) + 2),
    ]
    scales = {setting.scale, *(setting.images_of(share) for share in SCALES)}
    for scale in [setting.scale, *sorted(scales - {setting.scale})]:
        base = {s: 100 * c[-1][2] for s, c in runs_of(name, BASE, scale).items()}
        for arm in EVERY:
            curves = runs_of(name, arm, scale)
            if not curves:
                continue
            cells = [spread([100 * c[k][2] for c in curves.values()]) for k, _ in enumerate(points)]
            over = gain({s: 100 * c[-1][2] for s, c in curves.items()}, base) if arm != BASE else ""
            seconds = statistics.mean(c[-1][1] for c in curves.values())
            kept = "all" if "Fast" in arm else scale if "ring" in arm or "SSD" in arm else "-"
            lines.append(f"| {arm} | {kept} | {' | '.join(cells)} | {over} | {seconds:.0f} |")
    return "\n".join(lines)


def frozen_table(name: str) -> str:
    """Test accuracy by draws from the same images, and what is gained over uniform draws."""
    found = [r for r in read(FROZEN) if r["setting"] == name]
    lines = ["| images | steps | draws | test accuracy % | over uniform |", "|---|---|---|---|---|"]
    for kept in KEPT:
        for steps in STEPS:
            by_draws = {
                draws: {
                    r["seed"]: 100 * r["accuracy"]
                    for r in found
                    if (r["kept"], r["steps"], r["draws"]) == (kept, steps, draws)
                }
                for draws in DRAWS
            }
            for draws, values in by_draws.items():
                if values:
                    over = "" if draws == "uniform" else gain(values, by_draws["uniform"])
                    accuracy = spread(list(values.values()))
                    lines.append(f"| {kept} | {steps} | {draws} | {accuracy} | {over} |")
    return "\n".join(lines)


def plot(name: str) -> None:
    """Draw test accuracy over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for index, arm in enumerate(ARMS):
        curves = list(runs_of(name, arm, SETTINGS[name].scale).values())
        if not curves:
            continue
        seconds = [statistics.mean(c[k][1] for c in curves) for k in range(len(curves[0]))]
        means = [100 * statistics.mean(c[k][2] for c in curves) for k in range(len(curves[0]))]
        axes.plot(seconds, means, marker="o", markersize=3, color=f"C{index}", label=arm)
    axes.set(xlabel="seconds of one core", ylabel="test accuracy, %", ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS.with_name(f"data_free_{name}.png"), dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "frozen", "table", "plot"])
    parser.add_argument("--setting", default="mnist", choices=list(SETTINGS))
    parser.add_argument("--teacher", help="file of the teacher's weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(EVERY))
    parser.add_argument("--scales", type=float, nargs="+", help="shares of the training images")
    add_part(parser)
    options = parser.parse_args()
    quiet()
    setting = SETTINGS[options.setting]
    if options.what == "run":
        scales = [setting.images_of(s) for s in options.scales or ()] or [setting.scale]
        jobs = [
            (options.setting, arm, scale, seed)
            for seed in options.seeds
            for scale in scales
            for arm in options.arms
        ]
        run_missing(
            RESULTS, ("setting", "arm", "scale", "seed"), jobs,
            lambda *job: run(*job, options.teacher), options.part,
        )  # fmt: skip
    elif options.what == "frozen":
        seeds = [(options.setting, seed) for seed in options.seeds]
        run_missing(
            FROZEN, ("setting", "seed"), seeds, lambda *job: frozen(*job, options.teacher),
            options.part,
        )  # fmt: skip
    if options.what == "plot":
        plot(options.setting)
    else:
        print(table(options.setting))
        print("\nFrozen images:\n")
        print(frozen_table(options.setting))
