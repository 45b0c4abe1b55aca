"""What does a round cost over the usual way to write it?

    python benchmarks/data_free_speed.py

One round of ``DataFree`` (synthesize, remember, distil) against a plain loop with the same
networks, batch and numbers of steps that does what public code does: images go to PNG files, the
pool is read from disk through a new ``ImageFolder`` loader each round, the teacher runs at every
draw, and hooks on its BatchNorm layers compute statistics in every forward pass. Sides take turns
in one process; the median of the turns' ratios is printed, and those of this package in half
precision, without channels last in memory, without its cache of the teacher's outputs, and then
with statistics measured in every forward pass. Two profiles say where the loop's time and ours
goes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import bare_trainer, quiet
from lightning.pytorch import Callback
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.utils import save_image

from lightning_kd import DataFree
from lightning_kd.callbacks import ChannelsLast, ReplayBuffer
from lightning_kd.data import Rounds
from lightning_kd.data_free.generators import Generator
from lightning_kd.data_free.image_losses import Adversarial, BatchNormStatistics, OneHot
from lightning_kd.data_free.replay import Prioritized
from lightning_kd.models import ImageGenerator, wide_resnet

IMAGES, GENERATOR_STEPS, STUDENT_STEPS, BATCH = 64, 2, 20, 64


def networks():
    torch.manual_seed(0)
    generator = ImageGenerator((3, 32, 32), latent=64, width=16)
    return generator, wide_resnet(40, 2), wide_resnet(16, 1)  # a pair that is published


class Plain:
    """The round as public code has it."""

    def __init__(self, folder: Path) -> None:
        self.generator, teacher, self.student = networks()
        self.teacher = teacher.eval().requires_grad_(False)
        self.folder, self.made = folder, 0
        self.found: list[torch.Tensor] = []
        for layer in self.teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(self.measure)
        adam = {"lr": 1e-3, "betas": (0.5, 0.999)}
        self.of_generator = torch.optim.Adam(self.generator.parameters(), **adam)
        self.of_student = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)

    def measure(self, layer, inputs, output):
        x = inputs[0]
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        self.found.append(
            (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
        )

    def round(self) -> None:
        self.student.eval()
        labels = torch.randint(10, (IMAGES,))
        best, least = None, float("inf")
        for _ in range(GENERATOR_STEPS):
            self.found.clear()
            x = self.generator(torch.randn(IMAGES, 64))
            t, s = self.teacher(x), self.student(x)
            kl = F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
            loss = sum(self.found) + 0.5 * F.cross_entropy(t, labels) - kl
            if loss.item() < least:
                best, least = x.detach(), loss.item()
            self.of_generator.zero_grad()
            loss.backward()
            self.of_generator.step()
        for image, label in zip(best, labels.tolist(), strict=True):
            place = self.folder / str(label)
            place.mkdir(parents=True, exist_ok=True)
            save_image(image, place / f"{self.made}.png")
            self.made += 1
        pool = ImageFolder(self.folder, v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, True)]))
        loader = DataLoader(
            pool, BATCH, sampler=torch.randint(len(pool), (BATCH * STUDENT_STEPS,)).tolist()
        )
        self.student.train()
        for x, _ in loader:
            with torch.no_grad():
                t = self.teacher(x)
            s = self.student(x)
            loss = 16 * F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")
            self.of_student.zero_grad()
            loss.backward()
            self.of_student.step()


class Clock(Callback):
    """Seconds of all rounds but the first."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.start


class HooksOn(Callback):
    """The teacher's statistics are measured in every forward pass, as hooks that stay do."""

    def on_train_start(self, trainer, pl_module):
        self.context = pl_module.synthesizer._statistics.measured()
        self.context.__enter__()


class Forgetful(ReplayBuffer):
    """A memory that does not keep the teacher's logits."""

    def sample(self, count, random):
        return replace(super().sample(count, random), logits=None)


def ours(
    rounds: int,
    cached: bool = True,
    hooks: bool = False,
    last: bool = True,
    precision: str = "32-true",
) -> tuple[float, dict[str, float]]:
    """Seconds a round of this package, and of its three parts."""
    generator, teacher, student = networks()
    module = DataFree(
        student, teacher, Generator(generator),
        [BatchNormStatistics(), OneHot(0.5, modulate=True), Adversarial()], temperature=4.0,
        round_images=IMAGES, generator_steps=GENERATOR_STEPS, student_steps=STUDENT_STEPS,
        batch_size=BATCH, warm_up=0,
    )  # fmt: skip
    parts = dict.fromkeys(("synthesize", "remember", "distil"), 0.0)

    def timed(name):
        plain = getattr(module, f"_{name}")

        def call(*args):
            start = time.perf_counter()
            found = plain(*args)
            parts[name] += time.perf_counter() - start
            return found

        return call

    for name in parts:
        setattr(module, f"_{name}", timed(name))
    clock = Clock()
    memory = ReplayBuffer if cached else Forgetful
    callbacks = [memory(1000, Prioritized()), clock]
    callbacks += [ChannelsLast()] * last + [HooksOn()] * hooks
    data = Rounds(rounds + 1, num_classes=10, image_shape=(3, 32, 32))
    bare_trainer(callbacks, max_epochs=1, precision=precision).fit(module, datamodule=data)
    return clock.seconds / rounds, {name: value / (rounds + 1) for name, value in parts.items()}


def plain(rounds: int) -> float:
    """Seconds a round of the plain loop, its pool as large as ours at the end."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Plain(Path(folder))
        loop.round()
        start = time.perf_counter()
        for _ in range(rounds):
            loop.round()
        return (time.perf_counter() - start) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    quiet(options.threads)
    ours(1)
    sides: dict[str, Callable[[], float]] = {
        "plain loop, pool on disk": lambda: plain(options.rounds),
        "lightning_kd": lambda: ours(options.rounds)[0],
        "... bf16-mixed": lambda: ours(options.rounds, precision="bf16-mixed")[0],
        "... channels first": lambda: ours(options.rounds, last=False)[0],
        "... teacher asked at every draw": lambda: ours(options.rounds, cached=False)[0],
        "... and measured at every draw": lambda: ours(options.rounds, False, hooks=True)[0],
    }
    times = [{name: side() for name, side in sides.items()} for _ in range(options.turns)]
    first = next(iter(sides))
    for name in sides:
        seconds = statistics.median(t[name] for t in times)
        ratio = statistics.median(t[first] / t[name] for t in times)
        print(f"{name:<34}{1e3 * seconds:8.0f} ms a round   {ratio:5.2f} times as fast")
    for side, run in {"the plain loop": lambda: plain(1), "lightning_kd": lambda: ours(1)}.items():
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            found = run()
        parts = found[1] if isinstance(found, tuple) else {}
        print(f"\nWhere two rounds of {side} go:")
        if parts:
            print(", ".join(f"{name} {value:.1f} s a round" for name, value in parts.items()))
        rows = sorted(seen.key_averages(), key=lambda each: -each.self_cpu_time_total)
        for each in rows[:8]:
            print(f"{each.key:<34}{each.self_cpu_time_total / 1e6:8.2f}{each.count:8d} calls")


if __name__ == "__main__":
    main()
