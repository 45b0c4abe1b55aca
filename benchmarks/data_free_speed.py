"""What does a round cost over the usual way to write it?

    python benchmarks/data_free_speed.py

One round of ``DataFree`` (invert, remember, distil) against a plain loop with the same networks,
batch and numbers of steps that does what public code does: images go to PNG files, the pool is read
from disk through a new ``ImageFolder`` loader each round, the teacher is asked at every draw, and
hooks on its BatchNorm layers compute statistics in every forward pass. Sides take turns in one
process; the median of the turns' ratios is printed, and that of this package without its cache of
the teacher's answers.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.utils import save_image

from lightning_kd import DataFree
from lightning_kd.callbacks import ChannelsLast, ReplayBuffer
from lightning_kd.data import Rounds
from lightning_kd.inversion import Adversarial, BatchNormStatistics, OneHot
from lightning_kd.models import ImageGenerator, wide_resnet
from lightning_kd.replay import Prioritized
from lightning_kd.sources import Generator

IMAGES, SOURCE_STEPS, STUDENT_STEPS, BATCH = 64, 2, 20, 64


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
        for _ in range(SOURCE_STEPS):
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


def ours(rounds: int, cached: bool = True) -> float:
    """Seconds a round of this package."""
    generator, teacher, student = networks()
    module = DataFree(
        student, teacher, Generator(generator),
        [BatchNormStatistics(), OneHot(0.5, modulate=True), Adversarial()], temperature=4.0,
        round_images=IMAGES, source_steps=SOURCE_STEPS, student_steps=STUDENT_STEPS,
        batch_size=BATCH, warm_up=0,
    )  # fmt: skip
    buffer, clock = ReplayBuffer(1000, Prioritized()), Clock()
    if not cached:
        sample = buffer.sample

        def forgetful(count, random):
            drawn = sample(count, random)
            return type(drawn)(drawn.indices, drawn.images, None, drawn.weights)

        buffer.sample = forgetful
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[buffer, clock, ChannelsLast()],
    )  # fmt: skip
    trainer.fit(module, datamodule=Rounds(rounds + 1, num_classes=10, image_shape=(3, 32, 32)))
    return clock.seconds / rounds


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
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ours(1)
    times = [
        (plain(options.rounds), ours(options.rounds), ours(options.rounds, cached=False))
        for _ in range(options.turns)
    ]
    names = ("plain loop, pool on disk", "lightning_kd", "the same, teacher asked at every draw")
    for side, name in enumerate(names):
        seconds = statistics.median(t[side] for t in times)
        ratio = statistics.median(t[0] / t[side] for t in times)
        print(f"{name:<40}{1e3 * seconds:8.0f} ms a round   {ratio:5.2f} times as fast")


if __name__ == "__main__":
    main()
