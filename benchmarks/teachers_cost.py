"""What do more teachers cost? Time of a training step and peak memory, 1 to 8 teachers.

    python benchmarks/teachers_cost.py          # prints a table, draws results/teachers_cost.png

The student is ResNet-8, each teacher a ResNet-20, on CIFAR-sized images, batch 64, one thread. Each
case runs in a process of its own, for its memory; time is the median of the steps after the first
three. ``Uniform`` runs all teachers, ``Switching`` one of them each step.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lightning_kd import MultiTeacher
from lightning_kd.models import resnet8, resnet20
from lightning_kd.weighting import Switching, Uniform

COUNTS = (1, 2, 4, 8)
WEIGHTINGS = {"Uniform": Uniform, "Switching": Switching}
RESULTS = Path("benchmarks/results")


def measure(name: str, count: int, steps: int = 15) -> dict:
    """Milliseconds of a step, and memory in MiB, of this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    module = MultiTeacher(resnet8(), [resnet20() for _ in range(count)], None, WEIGHTINGS[name]())
    module.distillation.build(torch.zeros(1, 3, 32, 32))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    x, y = torch.rand(64, 3, 32, 32), torch.randint(0, 10, (64,))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.stack(list(module.compute_losses(x, y).values())).sum().backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"milliseconds": statistics.median(times[3:]), "mebibytes": memory}


def plot(found: dict[str, dict[int, dict]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, label in zip(
        figure.subplots(1, 2), ("milliseconds", "mebibytes"),
        ("time of a step in ms", "peak memory above the start in MiB"), strict=True,
    ):  # fmt: skip
        for name, values in found.items():
            axes.plot(COUNTS, [values[c][key] for c in COUNTS], marker="o", label=name)
        axes.set(xlabel="teachers", ylabel=label, ylim=(0, None), xticks=COUNTS)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "teachers_cost.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case[0], int(options.case[1]))))
        sys.exit()
    found: dict[str, dict[int, dict]] = {}
    for name in WEIGHTINGS:
        for count in COUNTS:
            command = [sys.executable, __file__, "--case", name, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(name, {})[count] = json.loads(done.stdout.splitlines()[-1])
    print("| teachers | " + " | ".join(f"{n}: ms a step | MiB" for n in WEIGHTINGS) + " |")
    print("|---" * (1 + 2 * len(WEIGHTINGS)) + "|")
    for count in COUNTS:
        cells = [
            f"{found[n][count]['milliseconds']:.0f} | {found[n][count]['mebibytes']:.0f}"
            for n in WEIGHTINGS
        ]
        print(f"| {count} | " + " | ".join(cells) + " |")
    ratio = found["Switching"][8]["milliseconds"] / found["Uniform"][1]["milliseconds"]
    print(f"Switching among 8 teachers over one teacher: {ratio:.2f}")
    plot(found)
