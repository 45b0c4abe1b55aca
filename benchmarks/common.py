"""What benchmarks share: quiet runs, and one line a run in a file, so that none is made twice."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


def quiet(threads: int = 1) -> None:
    """Say nothing but results, and use so many cores."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)


def bare_trainer(
    callbacks: Iterable[Callback] = (), accelerator: str = "cpu", **options: Any
) -> Trainer:
    """A trainer that writes and prints nothing."""
    return Trainer(
        accelerator=accelerator,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


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
    """Call ``run(*job)`` for the jobs of this part of which no row tells, and append what it found.

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
