"""How long until something happens? Seconds to import, and to the first training step.

    python benchmarks/startup.py

Each figure is the median of several new processes. Also printed: which large packages an import
loads. The first step is that of configs/digits/multi_teacher.yaml without the callbacks that write
files, from the start of the process to the end of the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

IMPORTS = (
    "torch",
    "lightning.pytorch",
    "lightning_kd",
    "lightning_kd.models",
    "lightning_kd; lightning_kd.MultiTeacher",
    "lightning_kd.cli",
)
HEAVY = ("torchvision", "torchmetrics", "lightning", "jsonargparse", "matplotlib", "sklearn",
         "tensorboard", "onnx", "scipy", "pandas")  # fmt: skip
LOADED = "import json, sys; print(json.dumps([n for n in {names} if n in sys.modules]))"
FIRST_STEP = """
import os, time
from lightning.pytorch import Callback
from lightning_kd.cli import main

class Stop(Callback):
    def on_train_batch_end(self, *_):
        print(time.time(), flush=True)
        os._exit(0)

cli = main(["-c", "configs/digits/multi_teacher.yaml"], run=False)
def writes_nothing(callback):
    return any(n in type(callback).__name__ for n in ("ModelSummary", "KeepFreedMemory"))

cli.trainer.callbacks = [*filter(writes_nothing, cli.trainer.callbacks), Stop()]
cli.trainer.fit(cli.model, datamodule=cli.datamodule)
"""


def seconds(code: str) -> tuple[float, str]:
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return time.time() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    nothing = statistics.median(seconds("pass")[0] for _ in range(options.turns))
    print("| what | seconds | loads |\n|---|---|---|")
    for name in IMPORTS:
        code = f"import {name}\n{LOADED.format(names=HEAVY)}"
        seconds(code)  # fills the file cache
        runs = [seconds(code) for _ in range(options.turns)]
        loaded = ", ".join(json.loads(runs[0][1].splitlines()[-1])) or "-"
        took = statistics.median(run[0] for run in runs) - nothing
        print(f"| `import {name}` | {took:.2f} | {loaded} |", flush=True)
    steps = []
    for _ in range(options.turns):
        start = time.time()
        _, out = seconds(FIRST_STEP)
        steps.append(float(out.splitlines()[-1]) - start)
    print(f"| first training step of the digits | {statistics.median(steps):.2f} | |")


if __name__ == "__main__":
    main()
