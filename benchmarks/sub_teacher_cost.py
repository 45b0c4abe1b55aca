"""What do m random paths through one teacher cost over m teachers?

    python benchmarks/sub_teacher_cost.py

Forward passes of ResNet-20 and ResNet-56 on 64 images of 32 x 32, one thread, no gradient; both
sides in one process, in turns, the median of the ratios. "Reused" is the share of blocks' rows that
m teachers would run and the paths do not, because they have them in common or leave them out.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import quiet
from torch import nn

from lightning_kd import Teacher
from lightning_kd.models import resnet20, resnet56
from lightning_kd.teachers import StochasticDepth


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rows_through(network: nn.Module, call) -> int:
    """Images that go through convolutions, summed over them."""
    counted = [0]

    def count(module, inputs, output):
        counted[0] += len(output)

    handles = [
        m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d)
    ]
    call()
    for handle in handles:
        handle.remove()
    return counted[0]


@torch.no_grad()
def measure(make, count: int, survival: float, turns: int) -> tuple[float, float, float]:
    """Median ratio of time, milliseconds of one teacher, and the share that is reused."""
    torch.manual_seed(0)
    teacher, x = Teacher(make()), torch.rand(64, 3, 32, 32)
    source = StochasticDepth(count, survival)
    source.attach(teacher, [], x)
    apart = [Teacher(make()) for _ in range(count)]

    def paths():
        source(teacher, x, range(count))

    def teachers():
        for each in apart:
            each(x)

    paths(), teachers()
    times = [(seconds(paths), seconds(teachers)) for _ in range(turns)]
    rows = statistics.mean(rows_through(teacher.network, paths) for _ in range(turns))
    whole = count * rows_through(teacher.network, lambda: teacher(x))
    ratio = statistics.median(mine / theirs for mine, theirs in times)
    one = statistics.median(theirs for _, theirs in times) / count
    return ratio, 1e3 * one, 1 - rows / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    quiet(options.threads)
    print("| teacher | survival | paths | one teacher, ms | paths over teachers | reused % |")
    print("|---|---|---|---|---|---|")
    for make in (resnet20, resnet56):
        for survival in (0.8, 0.5):
            for count in options.counts:
                ratio, one, reused = measure(make, count, survival, options.turns)
                cells = f"{one:.0f} | {ratio:.2f} | {100 * reused:.0f}"
                print(f"| {make.__name__} | {survival} | {count} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
