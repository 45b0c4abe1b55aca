from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_kd.atomic_files import write_atomically

Run = Callable[[list[str]], Any]


def generations(args: Sequence[str], run: Run) -> list[dict[str, Any]]:
    """Train a network, then another that it teaches, and so on (born-again networks).

    Each generation is one ``lightning-kd fit`` in a process and a folder of its own. Finished ones
    are not trained again, and an interrupted one is resumed.

    Args:
        args: Those of the command line after ``generations``.
        run: Takes arguments of ``lightning-kd``, returns the command line object.

    Returns:
        For each generation ``student``, a file, and ``accuracy`` on validation images.

    Raises:
        ValueError: If the configuration has no teacher, or does not export its student.
        FileExistsError: If a folder holds a generation trained with other options.
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
        "continues where the first one stopped.",
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
    given = config["model"]["init_args"]
    teacher = next((k for k in ("teachers", "teacher") if given.get(k)), None)
    if teacher is None:
        raise ValueError(
            f"Expected a model that learns from a teacher, such as MultiTeacher, got "
            f"{config['model']['class_path']}."
        )
    _look_for_export(config)
    root = Path(config["trainer"]["default_root_dir"] or ".")
    taught_by = given[teacher] if isinstance(given[teacher], list) else [given[teacher]]
    last = _measure(config, taught_by, root / "teachers.yaml", run)
    if options.until_worse and last is None:
        raise ValueError("Expected validation images with --until_worse, got none: set val_split.")
    print(f"teachers:     {_percent(last)} on val")
    found: list[dict[str, Any]] = []
    for number in range(1, options.count + 1):
        folder = root / f"generation_{number}"
        _train(_generation(config, number, folder, teacher, found), folder)
        student = str(folder / "student.safetensors")
        accuracy = _measure(config, [_network(student)], folder / "measure.yaml", run)
        found.append({"student": student, "accuracy": accuracy})
        print(f"generation {number}: {_percent(accuracy)} on val, {student}")
        if options.until_worse and not (accuracy or 0) > (last or 0):
            break
        last = accuracy
    path = root / "ensemble.yaml"
    together = _measure(config, [_network(each["student"]) for each in found], path, run)
    content = json.dumps({"generations": found, "ensemble": together}, indent=2).encode()
    write_atomically(root / "generations.json", content + b"\n")
    print(f"ensemble:     {_percent(together)} on val, lightning-kd test -c {path}")
    return found


def _generation(
    config: dict[str, Any], number: int, folder: Path, teacher: str, found: list[dict[str, Any]]
) -> dict[str, Any]:
    """The full configuration of one generation, so that nothing leaks in from another."""
    own = copy.deepcopy(config)
    own["trainer"]["default_root_dir"] = str(folder)
    if type(own["seed_everything"]) is int:  # not true, which draws one
        own["seed_everything"] += number
    if found:
        checkpoint = found[-1]["student"]
        # with its hash, so that a generation is trained again if its teacher was
        last = _network(checkpoint, hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest())
        own["model"]["init_args"][teacher] = [last] if teacher == "teachers" else last
    cache = (own.get("data") or {}).get("init_args", {}).get("teacher_cache")
    if cache:  # other teachers, other outputs
        cache["init_args"]["folder"] += f"/generation_{number}"
    return own


def _look_for_export(config: dict[str, Any]) -> None:
    for callback in config["trainer"].get("callbacks") or []:
        if callback["class_path"].rpartition(".")[2] == "ExportStudent":
            if callback["init_args"].get("folder") is None:
                return
            raise ValueError(
                "Expected ExportStudent without a folder: each generation has its own."
            )
    raise ValueError(
        "Expected the callback lightning_kd.callbacks.ExportStudent in trainer.callbacks, which "
        "writes the teacher of the next generation; found none."
    )


def _configuration(args: list[str], run: Run) -> dict[str, Any]:
    """The configuration that ``fit`` would use."""
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


def _network(checkpoint: str, sha256: str | None = None) -> dict[str, Any]:
    return {
        "class_path": "lightning_kd.models.pretrained",
        "init_args": {"checkpoint": checkpoint, "sha256": sha256},
    }


def _train(config: dict[str, Any], folder: Path) -> None:
    """Train one generation, or resume it, unless it is finished.

    Raises:
        FileExistsError: If it was trained with other options.
    """
    path = folder.with_suffix(".yaml")
    before = yaml.safe_load(path.read_text()) if path.is_file() else None
    again = bool(config.pop("overwrite", False))
    if before is not None and not again:
        if before != config:
            raise FileExistsError(
                f"{folder} holds a generation with other options, or another teacher: choose "
                f"another folder (--trainer.default_root_dir), or replace it (--overwrite true)."
            )
        if (folder / "student.json").is_file():  # written last
            print(f"{folder} is finished.")
            return
    write_atomically(path, yaml.safe_dump(config, sort_keys=False).encode())
    last = folder / "checkpoints" / "last.ckpt"
    # a folder without a checkpoint is a run that failed before its first
    how = f"--ckpt_path={last}" if last.is_file() and not again else "--overwrite=true"
    command = [sys.executable, "-m", "lightning_kd", "fit", "-c", str(path), how]
    try:
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        sys.exit(f"Stopped in {folder}: the same command resumes it.")
    if code:
        raise ChildProcessError(
            f"Training in {folder} failed (see above); the generations before it are kept, and "
            f"the same command continues here."
        )


def _measure(
    config: dict[str, Any], networks: list[dict[str, Any]], path: Path, run: Run
) -> float | None:
    """Validation accuracy of an ensemble of networks; its configuration stays at ``path``."""
    averaged = {
        "class_path": "lightning_kd.models.Averaged",
        "init_args": {"networks": networks},
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
