"""What benchmarks share: quiet runs, and one line a run in a file, so that none is made twice."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_kd.callbacks import KeepFreedMemory
from lightning_kd.data import ImageData


def quiet(threads: int = 1) -> None:
    """Say nothing but results, and use so many cores."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)


def bare_trainer(
    callbacks: Iterable[Callback] = (), accelerator: str = "cpu", **options: Any
) -> Trainer:
    """A trainer that writes and prints nothing, and keeps freed memory as the command line does."""
    return Trainer(
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[KeepFreedMemory(), *callbacks],
        **options,
    )


class Epochs(Callback):
    """Seconds of each epoch, and when the first began; a GPU is waited for at both ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.start = now()
        self.began = self.began or self.start

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(now() - self.start)


def now() -> float:
    """Seconds, when all that a GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class RandomImages(ImageData):
    """Nothing to learn: the cost does not depend on what is on the images."""

    num_classes = 10
    image_shape = (3, 32, 32)
    count = 1024

    def load(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        shape = (self.count, *self.image_shape)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
        return images, torch.arange(self.count) % 10


def with_statistics(network: nn.Module, shape: tuple[int, ...] = (3, 32, 32)) -> nn.Module:
    """Untrained, but for its BatchNorm statistics, without which deep networks overflow."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        network.train()(torch.rand(64, *shape))
    return network.eval()


def add_part(parser: argparse.ArgumentParser) -> None:
    """Let several processes share the work: ``--part 0 2`` and ``--part 1 2``."""
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1], metavar=("WHICH", "OF"))


def read(results: Path) -> list[dict]:
    """Rows of a file with one JSON a line; none if there is no file."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) for line in lines]


def run_missing(
    results: Path,
    keys: Sequence[str],
    jobs: Sequence[tuple],
    run: Callable[..., dict | list[dict]],
    part: Sequence[int] = (0, 1),
) -> None:
    """Call ``run(*job)`` for the jobs of this part that have no row yet, and append what it found.

    Args:
        results: File of rows.
        keys: What a job's values are called in a row.
        jobs: Arguments of ``run``.
        run: Returns a row, or several.
        part: Which of how many parts of the jobs.
    """
    for job in jobs[part[0] :: part[1]]:
        if job in {tuple(row.get(key) for key in keys) for row in read(results)}:
            continue
        found = run(*job)
        results.parent.mkdir(exist_ok=True)
        with results.open("a") as file:
            for row in found if isinstance(found, list) else [found]:
                print(row, flush=True)
                file.write(json.dumps(row) + "\n")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    error = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {error:.2f} (n={len(values)})"


def gain(values: dict[int, float], base: dict[int, float]) -> str:
    """Mean difference of runs with equal seeds, and its standard error."""
    pairs = [values[seed] - base[seed] for seed in values if seed in base]
    if len(pairs) < 2:
        return ""
    return f"{statistics.mean(pairs):+.2f} ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.2f}"
