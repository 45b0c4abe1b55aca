"""Kill training with SIGKILL at random moments, and go on each time.

    python benchmarks/faults.py            # 20 kills of each paradigm, about a minute each

Each run is ``lightning-kd fit`` of one YAML with a checkpoint every second step, resumed from the
newest one after each kill. After every kill all checkpoints of the folder must load with
``weights_only``, and no run may fall behind the one before. A run that ends is started anew, and
the last one must come to its end. Prints one row for each paradigm.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
from common import quiet

from lightning_kd.cli import main

CONFIGS = ("multi_teacher", "sub_teacher", "cohort", "data_free", "stochastic_teacher")


def start(args: list[str]) -> int:
    """Run the command line in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        log = os.open(os.environ["FAULTS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        main(args)
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def newest(folder: Path) -> Path | None:
    found = sorted(folder.glob("checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    return found[-1] if found else None


def steps_in(path: Path) -> int:
    """Batches that a checkpoint has seen; raises if it is not whole."""
    content = torch.load(path, weights_only=True)
    progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    return int(progress["completed"])


def torture(name: str, kills: int, dice: random.Random) -> str:
    """Kill one YAML's training so often; returns a row of the table."""
    folder = Path(tempfile.mkdtemp())
    os.environ["FAULTS_LOG"] = str(folder / "log")
    args = [
        "fit", "-c", f"configs/digits/{name}.yaml", f"--trainer.default_root_dir={folder / 'run'}",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.filename=often",
        "--trainer.callbacks.enable_version_counter=false",
    ]  # fmt: skip
    done = ended = before = 0
    last = 0
    while done < kills:
        checkpoint = newest(folder / "run")
        resume = [f"--ckpt_path={checkpoint}"] if checkpoint else ["--overwrite=true"]
        child = start([*args, *resume])
        time.sleep(dice.uniform(1.5, 6.0))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it was faster
            if os.WEXITSTATUS(status):
                raise SystemExit(f"{name} failed: {(folder / 'log').read_text()[-2000:]}")
            ended += 1
            shutil.rmtree(folder / "run")
            last = 0
            continue
        done += 1
        seen = [steps_in(path) for path in (folder / "run").glob("checkpoints/*.ckpt")]
        if not seen:
            before += 1
            continue
        if max(seen) < last:
            raise SystemExit(f"{name} went back from batch {last} to {max(seen)}.")
        last = max(seen)
    checkpoint = newest(folder / "run")
    resume = [f"--ckpt_path={checkpoint}"] if checkpoint else ["--overwrite=true"]
    _, status = os.waitpid(start([*args, *resume]), 0)
    if status:
        raise SystemExit(f"{name} did not finish: {(folder / 'log').read_text()[-2000:]}")
    left = [p.name for p in folder.rglob(".*partial")]
    shutil.rmtree(folder)
    return f"| {name} | {done} | {before} | {ended} | {last} | {len(left)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet()
    dice = random.Random(options.seed)
    print(
        "| YAML | kills | before the first checkpoint | runs that ended before | batches | left |"
    )
    print("|---|---|---|---|---|---|")
    for name in options.configs:
        print(torture(name, options.kills, dice), flush=True)
