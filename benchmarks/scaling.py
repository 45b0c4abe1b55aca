"""Samples a second with one process and with two, one core each.

    python benchmarks/scaling.py

Each case is a run of its own (Lightning's ``ddp``, gloo), a ResNet-20 student of three ResNet-14
teachers and a cohort of two ResNet-20, batches of 64 for each process; the median of several epochs
after the first. ``peer_per_process`` trains the cohort with one peer in each process, on one batch.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

import torch
from common import Epochs, RandomImages, bare_trainer, quiet

from lightning_kd import MultiTeacher, PeerCohort
from lightning_kd.models import resnet14, resnet20

STEPS, EPOCHS = 10, 4


CASES = {
    "three teachers": (lambda: MultiTeacher(resnet20(), [resnet14() for _ in range(3)]), "ddp"),
    "cohort of two": (lambda: PeerCohort([resnet20(), resnet20()]), "ddp"),
    "cohort of two, peer_per_process": (
        lambda: PeerCohort([resnet20(), resnet20()]),
        "peer_per_process",
    ),
}


def run(name: str, devices: int) -> None:
    make, strategy = CASES[name]
    torch.manual_seed(0)
    data = RandomImages(batch_size=64, val_split=0.0)
    shared = strategy == "peer_per_process" or devices == 1
    data.count = 64 * STEPS * (1 if shared else devices)
    epochs = Epochs()
    trainer = bare_trainer(
        [epochs], max_epochs=EPOCHS, devices=devices, strategy=strategy if devices > 1 else "auto"
    )
    trainer.fit(make(), datamodule=data)
    if trainer.is_global_zero:
        print(data.count / statistics.median(epochs.seconds[1:]), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.case:
        run(options.case[0], int(options.case[1]))
        sys.exit()
    print("| what | 1 process, images a second | 2 processes | times |\n|---|---|---|---|")
    for name in CASES:
        found: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(options.turns):
            for devices, rates in found.items():
                command = [sys.executable, __file__, "--case", name, str(devices)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rates.append(float(done.stdout.splitlines()[-1]))
        one, two = (statistics.median(found[devices]) for devices in (1, 2))
        print(f"| {name} | {one:.0f} | {two:.0f} | {two / one:.2f} |", flush=True)
