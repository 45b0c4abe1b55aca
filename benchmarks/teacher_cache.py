"""What does an epoch cost with live teachers, with their outputs cached, and without any?

    python benchmarks/teacher_cache.py

ResNet-20 learns from one and from three ResNet-56 on 1,024 random images of 32 x 32, batch 128, no
validation. The three kinds of epoch take turns in one process; medians of their ratios to the
student alone. The first, filling pass is reported by itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from common import Epochs, RandomImages, bare_trainer, quiet, with_statistics

from lightning_kd import MultiTeacher, Supervised
from lightning_kd.models import resnet20, resnet56
from lightning_kd.teachers import TeacherCache


def epoch(teachers: list[torch.nn.Module], cache: TeacherCache | None) -> tuple[float, float]:
    """Seconds of an epoch, and of all that came before it."""
    student = resnet20()
    module = MultiTeacher(student, teachers) if teachers else Supervised(student)
    clock = Epochs()
    start = time.perf_counter()
    data = RandomImages(
        batch_size=128, val_split=0.0, crop_padding=4, flip=True, teacher_cache=cache
    )
    bare_trainer([clock], max_epochs=1).fit(module, datamodule=data)
    return clock.seconds[0], clock.began - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    quiet()
    print("| teachers | live over student alone | cached over student alone | filling, epochs |")
    print("|---|---|---|---|")
    for count in (1, 3):
        teachers = [with_statistics(resnet56()) for _ in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            _, filling = epoch(teachers, TeacherCache(folder))
            rows = []
            for _ in range(options.turns):
                alone, _ = epoch([], None)
                live, _ = epoch(teachers, None)
                cached, _ = epoch(teachers, TeacherCache(folder))
                rows.append((live / alone, cached / alone, filling / alone))
        cells = " | ".join(f"{statistics.median(column):.2f}" for column in zip(*rows, strict=True))
        print(f"| {count} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
