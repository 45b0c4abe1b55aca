"""What does the package cost over a hand-written loop? Training samples per second, as a ratio.

    python benchmarks/step_overhead.py

A student learns from one and from three teachers, and two and four students from each other. Both
sides train like networks on the same data in the same process, turn by turn (so that both see the
same machine), and the median of the turns' ratios is printed. The plain loop does what any correct
loop must: shuffle, cut a batch, convert it, run the teachers under no_grad, KL at temperature 4 to
their mean, cross-entropy, step, and add up the losses that it reports. On a CPU the callback
``KeepFreedMemory`` has glibc keep freed memory between steps, and the plain loop in the same
process then gains from it too; its time before that is printed first.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

import torch
import torch.nn.functional as F
from common import RandomImages, bare_trainer, quiet
from lightning.pytorch import Callback
from torch import nn

from lightning_kd import MultiTeacher, PeerCohort
from lightning_kd.losses import SoftTarget
from lightning_kd.models import resnet8, resnet14, wide_resnet

BATCH = 128


class Noise(RandomImages):
    steps = 20
    count = BATCH * steps


class Clock(Callback):
    """Seconds of an epoch: from the end of its first batch to that of its last, and in all."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.begin, self.start = time.perf_counter(), None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = time.perf_counter()
        self.start = self.start or now
        self.seconds = now - self.start

    def on_train_epoch_end(self, trainer, pl_module):
        self.epoch = time.perf_counter() - self.begin


def teachers(count: int, scale: int) -> list[nn.Module]:
    """One, or three different ones."""
    made = [resnet8(width=16 * scale), resnet14(width=8 * scale), wide_resnet(10, scale)]
    return [network.eval().requires_grad_(False) for network in made[:count]]


class Plain:
    """An epoch by hand: students that learn from teachers, or from each other."""

    def __init__(self, students: list[nn.Module], teachers: list[nn.Module], data: Noise) -> None:
        self.students, self.teachers, self.data = students, teachers, data
        options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
        self.optimizers = [torch.optim.SGD(s.parameters(), **options) for s in students]

    def losses(self, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        if self.teachers:
            with torch.no_grad():
                target = sum((t(x) / 4).softmax(1) for t in self.teachers) / len(self.teachers)
            logits = self.students[0](x)
            soft = F.kl_div((logits / 4).log_softmax(1), target, reduction="batchmean") * 16
            return [0.9 * soft, 0.1 * F.cross_entropy(logits, y)]
        outputs = [student(x) for student in self.students]
        targets = [logits.detach().softmax(1) for logits in outputs]
        losses = [F.cross_entropy(logits, y) for logits in outputs]
        for k, logits in enumerate(outputs):
            log = logits.log_softmax(1)
            others = targets[:k] + targets[k + 1 :]
            divergences = [F.kl_div(log, t, reduction="batchmean") for t in others]
            losses.append(sum(divergences) / len(others))
        return losses

    def __call__(self) -> tuple[float, float]:
        images, labels = self.data._train
        for student in self.students:
            student.train()
        begin, start = time.perf_counter(), 0.0
        order = torch.randperm(len(labels))
        sums: list[torch.Tensor] = []
        for index in order.split(BATCH):
            x, y = images[index].float().div_(255), labels[index]
            losses = self.losses(x, y)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            for optimizer in self.optimizers:
                optimizer.step()
            values = torch.stack(losses).detach()
            sums = [sums[0] + values] if sums else [values]
            start = start or time.perf_counter()
        end = time.perf_counter()
        return end - start, end - begin


class Ours:
    """The same with this package: one epoch of Trainer.fit."""

    def __init__(self, students: list[nn.Module], teachers: list[nn.Module], data: Noise) -> None:
        self.students, self.teachers, self.data = students, teachers, data

    def __call__(self) -> tuple[float, float]:
        clock = Clock()
        if self.teachers:
            losses = [SoftTarget(4.0, weight=0.9)]
            module = MultiTeacher(self.students[0], self.teachers, losses)
        else:
            module = PeerCohort(self.students)
        bare_trainer([clock], max_epochs=1).fit(module, datamodule=self.data)
        return clock.seconds, clock.epoch


TASKS = {  # students, teachers
    "1 teacher": (1, 1),
    "3 teachers": (1, 3),
    "2 peers (DML)": (2, 0),
    "4 peers (DML)": (4, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scale", type=int, default=1, help="width of all networks")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    options = parser.parse_args()
    quiet(options.threads)
    data = Noise(batch_size=BATCH, val_split=0.0)
    data.setup("fit")
    steps = data.steps - 1
    print(
        f"{options.turns} turns, {options.threads} threads, torch {torch.__version__}\n\n"
        "| task | plain, ms a step | plain after glibc keeps memory | lightning_kd "
        "| plain over lightning_kd, steps | whole epoch |\n|---|---|---|---|---|---|"
    )
    alone: dict[str, float] = {}
    sides = {}
    for task in options.tasks:  # before the first run of this package, which changes the process
        count, trained = TASKS[task]
        sides[task] = [
            side(
                [resnet8(width=8 * options.scale) for _ in range(count)],
                teachers(trained, options.scale),
                data,
            )
            for side in (Plain, Ours)
        ]
        alone[task] = statistics.median(sides[task][0]()[0] for _ in range(3)) / steps
    for task in options.tasks:
        plain, ours = sides[task]
        ours()
        pairs = []
        for turn in range(options.turns):
            both = (plain, ours) if turn % 2 else (ours, plain)
            times = {side: side() for side in both}
            pairs.append((times[plain], times[ours]))
        ratios = [[p[kind] / o[kind] for p, o in pairs] for kind in (0, 1)]
        each = [1e3 * statistics.median(pair[side][0] for pair in pairs) / steps for side in (0, 1)]
        shown = [f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in ratios]
        print(
            f"| {task} | {1e3 * alone[task]:.1f} | {each[0]:.1f} | {each[1]:.1f} | {shown[0]} "
            f"| {shown[1]} |",
            flush=True,
        )
        if options.profile:
            profile_of(ours, data.steps)


def profile_of(ours: Ours, steps: int) -> None:
    with cProfile.Profile() as profile:
        ours()
    stats = pstats.Stats(profile)
    rest = [
        (own, calls, f"{file.rpartition('/')[2]}:{line} {name}")
        for (file, line, name), (_, calls, own, _, _) in stats.stats.items()
    ]
    print("\nwhere the time goes (own time; a profiler slows Python down, not torch):")
    for own, calls, name in sorted(rest, reverse=True)[:15]:
        print(f"{1e3 * own / steps:9.3f} ms a step {calls / steps:8.1f} calls  {name}")
    print()


if __name__ == "__main__":
    main()
