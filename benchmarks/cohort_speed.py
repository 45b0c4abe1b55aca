"""What does a cohort cost over training its networks one by one?

    python benchmarks/cohort_speed.py
    python benchmarks/cohort_speed.py --device cuda --compile

K networks are trained by a plain PyTorch loop one after the other, then as a cohort that teaches
itself (``Mutual``, one process), peers apart and peers batched. The ratio is the time of the K
plain runs over the cohort's: 1 means that mutual learning costs nothing over separate trainings.
Sides take turns in one process, and the median of the turns' ratios is printed. On a CPU the
callback ``KeepFreedMemory`` has glibc keep freed memory between steps; the plain loop, in the same
process, gains from it too.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from common import bare_trainer, quiet
from step_overhead import Clock, Noise

from lightning_kd import PeerCohort
from lightning_kd.models import resnet8

SETTINGS = {  # width, batch, shape of images, stride of the first layer
    "ResNet-8 of width 4, 8 x 8": (4, 64, (1, 8, 8), 1),
    "ResNet-8 of width 8, 28 x 28": (8, 64, (1, 28, 28), 2),
    "ResNet-8 of width 16, 32 x 32": (16, 128, (3, 32, 32), 1),
}


def network(width: int, shape: tuple[int, ...], stride: int) -> torch.nn.Module:
    return resnet8(num_classes=10, in_channels=shape[0], width=width, stem_stride=stride)


def plain(student: torch.nn.Module, data: Noise, device: str) -> float:
    """Train one network for one epoch by hand; seconds without the first step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    images, labels = data._train
    order, total, start = torch.randperm(len(labels)), torch.zeros((), device=device), 0.0
    for step in range(data.steps):
        index = order[step * data.batch_size : (step + 1) * data.batch_size]
        x, y = images[index].to(device).float().div_(255), labels[index].to(device)
        loss = F.cross_entropy(student(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if not start:
            total.item()
            start = time.perf_counter()
    total.item()
    return time.perf_counter() - start


def cohort(count: int, batched: bool, make, data: Noise, options: argparse.Namespace) -> float:
    """Train a cohort for one epoch of the Trainer; seconds without the first step."""
    clock = Clock()
    module = PeerCohort([make() for _ in range(count)], batched=batched)
    accelerator = "gpu" if options.device == "cuda" else "cpu"
    trainer = bare_trainer([clock], accelerator, max_epochs=1, devices=1)
    trainer.fit(torch.compile(module) if options.compile else module, datamodule=data)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile for the cohorts")
    options = parser.parse_args()
    quiet(options.threads)
    print("| networks | peers | plain, ms a step of all | apart, ratio | batched, ratio |")
    print("|---|---|---|---|---|")
    for name, (width, batch, shape, stride) in SETTINGS.items():
        data = Noise(batch_size=batch, val_split=0.0)
        data.image_shape = shape
        data.load = lambda train, n=batch * data.steps, s=shape: (
            torch.randint(0, 256, (n, *s), dtype=torch.uint8),
            torch.randint(0, 10, (n,)),
        )
        data.setup("fit")

        def make(width=width, shape=shape, stride=stride):
            return network(width, shape, stride)

        for count in options.peers:
            cohort(count, False, make, data, options)  # warm up
            times: list[tuple[float, ...]] = []
            for _ in range(options.turns):
                alone = sum(
                    plain(make().to(options.device), data, options.device) for _ in range(count)
                )
                both = [cohort(count, b, make, data, options) for b in (False, True)]
                times.append((alone, *both))
            ratios = [statistics.median(t[0] / t[side] for t in times) for side in (1, 2)]
            step = 1e3 * statistics.median(t[0] for t in times) / (data.steps - 1)
            print(
                f"| {name} | {count} | {step:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
