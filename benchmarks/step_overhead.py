"""What does the package cost over a hand-written loop? Training samples per second, as a ratio.

    python benchmarks/step_overhead.py

Both sides train the same student from the same three teachers on the same data in the same process,
turn by turn (so that both see the same machine), and the median of the turns' ratios is printed.
The plain loop does what any correct loop must: shuffle, cut a batch, convert it, ask the teachers
under no_grad, KL at temperature 4 to their mean, cross-entropy, step, and add up the losses that
it reports. On a CPU the package asks glibc to keep freed memory between steps, and the plain loop
in the same process then gains from it too; what it did before is printed first.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

import torch
import torch.nn.functional as F
from common import bare_trainer, quiet
from lightning.pytorch import Callback
from torch import nn

from lightning_kd import MultiTeacher
from lightning_kd.data import ImageData
from lightning_kd.losses import SoftTarget
from lightning_kd.models import resnet8, resnet14, wide_resnet

BATCH = 128


class Noise(ImageData):
    """Random images of CIFAR's shape: the cost does not depend on what is on them."""

    num_classes = 10
    image_shape = (3, 32, 32)
    steps = 20

    def load(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        count = BATCH * self.steps
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        return images, torch.randint(0, 10, (count,))


class Clock(Callback):
    """Seconds between the first and the last batch of an epoch, the first one warm-up."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.start = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = time.perf_counter()
        self.start = self.start or now
        self.seconds = now - self.start


def networks(scale: int):
    """A student and three different teachers."""
    torch.manual_seed(0)
    teachers = [resnet8(width=16 * scale), resnet14(width=8 * scale), wide_resnet(10, scale)]
    return resnet8(width=8 * scale), [t.eval().requires_grad_(False) for t in teachers]


def make_plain(student: nn.Module, teachers: list[nn.Module], data: Noise):
    """A function that trains one epoch by hand and returns its seconds, without the first step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    images, labels = data._train
    student.train()

    def epoch() -> float:
        order = torch.randperm(len(labels))
        sums = torch.zeros(3)
        start = 0.0
        for step in range(data.steps):
            index = order[step * BATCH : (step + 1) * BATCH]
            x, y = images[index].float().div_(255), labels[index]
            with torch.no_grad():
                target = sum((t(x) / 4).softmax(1) for t in teachers) / len(teachers)
            logits = student(x)
            soft = F.kl_div((logits / 4).log_softmax(1), target, reduction="batchmean") * 16
            task = F.cross_entropy(logits, y)
            loss = 0.9 * soft + 0.1 * task
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack([loss, soft, task]).detach()
            start = start or time.perf_counter()
        return time.perf_counter() - start

    return epoch


def make_ours(student: nn.Module, teachers: list[nn.Module], data: Noise):
    """The same with this package: one epoch of Trainer.fit, without start-up."""

    def epoch() -> float:
        clock = Clock()
        module = MultiTeacher(student, teachers, [SoftTarget(4.0, weight=0.9)])
        trainer = bare_trainer([clock], max_epochs=1)
        trainer.fit(module, datamodule=data)
        return clock.seconds

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scale", type=int, default=1, help="width of all networks")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    options = parser.parse_args()
    quiet(options.threads)
    data = Noise(batch_size=BATCH, val_split=0.0)
    data.setup("fit")
    plain = make_plain(*networks(options.scale), data)
    ours = make_ours(*networks(options.scale), data)
    untouched = statistics.median(plain() for _ in range(3)) / (data.steps - 1)
    print(
        f"{'plain, alone':<14}{1e3 * untouched:8.2f} ms a step {BATCH / untouched:10.0f} samples/s"
    )
    ours()
    ratios, seconds = [], []
    for turn in range(options.turns):
        both = (plain, ours) if turn % 2 else (ours, plain)
        times = {function: function() for function in both}
        ratios.append(times[plain] / times[ours])
        seconds.append((times[plain], times[ours]))
    steps = data.steps - 1
    for side, name in enumerate(("plain loop", "lightning_kd")):
        median = statistics.median(pair[side] for pair in seconds)
        rate = BATCH * steps / median
        print(f"{name:<14}{1e3 * median / steps:8.2f} ms a step {rate:10.0f} samples/s")
    print(
        f"ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f}, "
        f"{options.turns} turns, {options.threads} threads, torch {torch.__version__})"
    )
    if options.profile:
        with cProfile.Profile() as profile:
            ours()
        stats = pstats.Stats(profile)
        rest = [
            (own, calls, f"{file.rpartition('/')[2]}:{line} {name}")
            for (file, line, name), (_, calls, own, _, _) in stats.stats.items()
        ]
        print("\nwhere the time goes (own time; a profiler slows Python down, not torch):")
        for own, calls, name in sorted(rest, reverse=True)[:15]:
            each = 1e3 * own / data.steps
            print(f"{each:9.3f} ms a step {calls / data.steps:8.1f} calls  {name}")


if __name__ == "__main__":
    main()
