from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.files import write_atomically

Run = Callable[[list[str]], Any]


def generations(args: Sequence[str], run: Run) -> list[dict[str, Any]]:
    """Train a network, then another that it teaches, and so on (born-again networks).

    Each generation is one ``lightning-kd fit`` in a process and a folder of its own. What is
    finished is not trained again, and what was interrupted goes on.

    Args:
        args: Of the command line, after ``generations``.
        run: Takes arguments of ``lightning-kd``, returns the command line object.

    Returns:
        For each generation ``student``, a file, and ``accuracy`` on validation images.

    Raises:
        ValueError: If the configuration has no teacher, or does not export its student.
        ChildProcessError: If a generation's training failed.

    Source:
        Furlanello et al. 2018, https://arxiv.org/abs/1805.04770, section 3.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-kd generations",
        allow_abbrev=False,
        description="Train generations of networks, each taught by the last (born-again networks), "
        "and measure them and their ensemble on validation images.",
        epilog="All other options are those of `lightning-kd fit`. The first generation learns "
        "from the configuration's own teachers. Generations are in the folders generation_1, "
        "generation_2 ... of trainer.default_root_dir, each with a seed of its own; a second call "
        "goes on where the first one stopped.",
    )
    parser.add_argument("--count", type=int, default=3, help="Generations (default: 3).")
    parser.add_argument(
        "--until_worse",
        action="store_true",
        help="Stop as soon as one is no better on validation images than the last.",
    )
    options, rest = parser.parse_known_args(args)
    if options.count < 1:
        parser.error(f"expected --count >= 1, got {options.count}")
    config = _configuration(rest, run)
    teacher = next((k for k in ("teachers", "teacher") if k in config["model"]["init_args"]), None)
    if teacher is None:
        raise ValueError(
            f"Expected a model that learns from a teacher, such as MultiTeacher, got "
            f"{config['model']['class_path']}."
        )
    root = Path(config["trainer"]["default_root_dir"] or ".")
    found: list[dict[str, Any]] = []
    for number in range(1, options.count + 1):
        folder = root / f"generation_{number}"
        own = [f"--trainer.default_root_dir={folder}"]
        if isinstance(config["seed_everything"], int):
            own.append(f"--seed_everything={config['seed_everything'] + number - 1}")
        if found:
            last = _network(found[-1]["student"])
            own.append(f"--model.{teacher}={json.dumps([last] if teacher == 'teachers' else last)}")
        _train(folder, [*rest, *own])
        student = str(folder / "student.safetensors")
        accuracy = _measure(config, [student], folder / "measure.yaml", run)
        found.append({"student": student, "accuracy": accuracy})
        print(f"generation {number}: {_percent(accuracy)} on val, {student}")
        if options.until_worse and len(found) > 1 and not accuracy > found[-2]["accuracy"]:
            break
    path = root / "ensemble.yaml"
    together = _measure(config, [each["student"] for each in found], path, run)
    content = json.dumps({"generations": found, "ensemble": together}, indent=2).encode()
    write_atomically(root / "generations.json", content + b"\n")
    print(f"ensemble:     {_percent(together)} on val, lightning-kd test -c {path}")
    return found


def _configuration(args: list[str], run: Run) -> dict[str, Any]:
    """What ``fit`` would be configured by."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            run(["fit", *args, "--print_config"])
    except SystemExit as done:
        if done.code:
            raise
    found = yaml.safe_load(text.getvalue())
    if not isinstance(found, dict) or not found.get("model"):
        raise ValueError("Expected options of lightning-kd fit with a model: give -c file.yaml.")
    return found


def _network(checkpoint: str) -> dict[str, Any]:
    return {
        "class_path": "lightning_kd.models.pretrained", "init_args": {"checkpoint": checkpoint},
    }  # fmt: skip


def _train(folder: Path, args: list[str]) -> None:
    """Train one generation, or go on with it, unless it is finished."""
    if (folder / "student.json").is_file():  # written last
        print(f"{folder} is finished.")
        return
    last = folder / "checkpoints" / "last.ckpt"
    resume = [f"--ckpt_path={last}"] if last.is_file() else []
    # a configuration without a checkpoint is a run that broke off before its first
    again = [] if resume else ["--overwrite=true"]
    command = [sys.executable, "-m", "lightning_kd", "fit", *args, *resume, *again]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise ChildProcessError(
            f"Training in {folder} failed (see above); the generations before it are kept, and "
            f"the same command goes on here."
        )
    if not (folder / "student.json").is_file():
        raise ValueError(
            f"Expected {folder} to hold student.safetensors, found none: add the callback "
            f"lightning_kd.callbacks.ExportStudent."
        )


def _measure(config: dict[str, Any], networks: list[str], path: Path, run: Run) -> float | None:
    """Validation accuracy of networks together, by a configuration that is left at ``path``."""
    averaged = {
        "class_path": "lightning_kd.models.Averaged",
        "init_args": {"networks": [_network(name) for name in networks]},
    }
    trainer = {k: config["trainer"].get(k) for k in ("accelerator", "precision")}
    content = {
        "model": {"class_path": "lightning_kd.Supervised", "init_args": {"student": averaged}},
        "data": config["data"],
        "trainer": {
            **trainer, "devices": 1, "logger": False, "enable_progress_bar": False,
            "default_root_dir": str(path.parent),
        },
    }  # fmt: skip
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())
    cli = run(["validate", "-c", str(path), "--verbose=false"])
    accuracy = cli.trainer.callback_metrics.get("val/accuracy")
    return None if accuracy is None else float(accuracy)


def _percent(accuracy: float | None) -> str:
    return "not measured" if accuracy is None else f"{100 * accuracy:.1f} %"
