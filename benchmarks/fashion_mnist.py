"""Does distillation help? Labels alone, one teacher, three teachers; all labels and 1 % of them.

Train the three teachers first (configs/fashion_mnist/teacher.yaml says how), then

    python benchmarks/fashion_mnist.py run --seeds 0 1 2 3 4
    python benchmarks/fashion_mnist.py table

``run`` appends one line a run to benchmarks/results/fashion_mnist.jsonl and skips those that are
there. After every run it checks that the teachers are bit-identical to their files and that the
checkpoint holds none of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from common import read, run_missing
from safetensors.torch import load_file

from lightning_kd.cli import main

RESULTS = Path("benchmarks/results/fashion_mnist.jsonl")
METHODS = {
    "supervised": "labels alone",
    "single_teacher": "best single teacher",
    "multi_teacher": "three teachers, Uniform",
}
LABELS = {1.0: "all labels", 0.01: "1 % of the labels"}


def run(method: str, fraction: float, seed: int) -> dict:
    """Train and test one student; returns accuracies in [0, 1]."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["fit", "-c", f"configs/fashion_mnist/{method}.yaml", f"--seed_everything={seed}"]
        args += [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
        args += [f"--data.labelled_fraction={fraction}", f"--data.split_seed={seed}"]
        if method == "supervised" and fraction < 1:
            # 4 batches an epoch instead of 468: as many steps, all on labelled images
            args += ["--data.keep_unlabelled=false", "--trainer.max_epochs=468"]
        cli = main(args)
        assert cli.trainer.global_step == 1872
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        report = json.loads(Path(folder, "report.json").read_text())
        report |= json.loads(Path(folder, "report_test.json").read_text())
        for teacher, spec in zip(
            cli.model.teachers, cli.model.hparams.get("teachers", []), strict=True
        ):
            saved = load_file(spec["init_args"]["checkpoint"])
            state = teacher.network.state_dict()
            assert all(torch.equal(saved[key], state[key]) for key in state), "teacher changed"
        checkpoint = torch.load(
            next(Path(folder).rglob("*.ckpt")), weights_only=True, map_location="cpu"
        )
        assert not [key for key in checkpoint["state_dict"] if "teacher" in key]
    return {
        "method": method,
        "fraction": fraction,
        "seed": seed,
        "accuracy": report["student"]["accuracy"],
        "teachers": [t["accuracy"] for t in report["teachers"]],
        "ensemble": report["ensemble"]["accuracy"],
        "agreement": report["agreement"],
        "seconds": report["seconds"],
        "samples_per_second": report["samples_per_second"],
    }


def table() -> str:
    """Mean and standard deviation; gain over labels alone in standard errors.

    The error is that of two independent samples, and, in brackets, of the differences seed by seed
    (equal seeds share initial weights, order of batches and labelled images).
    """
    lines = ["| labels | student learns from | test accuracy % | gain | standard errors (paired) |"]
    lines.append("|---|---|---|---|---|")
    for fraction, labels in LABELS.items():
        base: dict[int, float] = {}
        for method, name in METHODS.items():
            values = {
                r["seed"]: 100 * r["accuracy"]
                for r in read(RESULTS)
                if r["method"] == method and r["fraction"] == fraction
            }
            if len(values) < 2:
                continue
            count, spread = len(values), statistics.stdev(values.values())
            gain = ""
            if method == "supervised":
                base = values
            else:
                pairs = [values[seed] - base[seed] for seed in values if seed in base]
                mean = statistics.mean(pairs)
                error = ((spread**2 + statistics.variance(base.values())) / count) ** 0.5
                paired = statistics.stdev(pairs) / len(pairs) ** 0.5
                gain = f"{mean:+.2f} | {mean / error:.1f} ({mean / paired:.1f})"
            lines.append(
                f"| {labels} | {name} | {statistics.mean(values.values()):.2f} ± {spread:.2f} "
                f"(n={count}) | {gain or '|'} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    options = parser.parse_args()
    if options.what == "run":
        jobs = [
            (method, fraction, seed)
            for seed in options.seeds
            for fraction in LABELS
            for method in options.methods
        ]
        run_missing(RESULTS, ("method", "fraction", "seed"), jobs, run)
    print(table())
