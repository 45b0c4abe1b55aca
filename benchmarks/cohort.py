"""Do untrained networks learn more together than alone?

    python benchmarks/cohort.py run --seeds 0 1 2 3 4
    python benchmarks/cohort.py table
    python benchmarks/cohort.py plot

Setting: 5,000 labelled images of Fashion-MNIST, ten epochs (780 steps of 64), the test images once
at the end; ResNet-8 of width 8 in cohorts of two to five. ``independent`` trains the same networks
side by side without any exchange. In the cohort of size 0 a small network (ResNet-8 of width 4) and
a large one (ResNet-20 of width 16) teach each other, and both are measured after each epoch on
5,000 images that nobody is trained on. A seed sets initial weights, order of batches and the choice
of the images. ``run`` appends one line a run to benchmarks/results/cohort.jsonl and skips those
that are there; give ``--part 0 2`` and ``--part 1 2`` to two processes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from common import add_part, bare_trainer, gain, quiet, read, run_missing, spread
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_kd import PeerCohort
from lightning_kd.callbacks import LossWeightScheduler
from lightning_kd.data import FashionMNIST
from lightning_kd.exchange import (
    Attention,
    Collective,
    Fusion,
    Gate,
    LeaveOneOut,
    Mutual,
    PeerCollaborative,
)
from lightning_kd.losses import SoftTarget
from lightning_kd.models import MultiBranch, resnet8, resnet20
from lightning_kd.schedules import SigmoidRampUp

RESULTS = Path("benchmarks/results/cohort.jsonl")
EPOCHS, BATCH, IMAGES = 10, 64, 5000


def network() -> torch.nn.Module:
    return resnet8(num_classes=10, in_channels=1, width=8, stem_stride=2)


def small_and_large() -> list[torch.nn.Module]:
    options = {"num_classes": 10, "in_channels": 1, "stem_stride": 2}
    return [resnet8(width=4, **options), resnet20(width=16, **options)]


def branches(count: int) -> list[torch.nn.Module]:
    return [MultiBranch(network(), "layer2", count)]


def soft(temperature: float, weight: float = 1.0) -> list:
    return [SoftTarget(temperature, weight=weight)]


def arm(exchange=Mutual, losses=None, **options):
    return lambda: {
        "exchange": exchange(),
        "losses": soft(1.0) if losses is None else losses,
        **options,
    }


COMMON = {
    "independent": arm(losses=[]),
    "Mutual, simultaneous": arm(),
    "Mutual, sequential": arm(update="sequential"),
    "Collective (min-logit)": arm(Collective, soft(2.0)),
    "Fusion": arm(lambda: Fusion("layer3"), soft(3.0)),
    "PeerCollaborative": arm(lambda: PeerCollaborative("layer3", 0.99), soft(3.0)),
}
MIXED = 0
ARMS = {
    2: {
        **COMMON,
        "two branches, Gate": lambda: {
            "peers": branches(2), "exchange": Gate("layer2"), "losses": soft(3.0)
        },
    },
    4: {
        **COMMON,
        "LeaveOneOut (logits averaged)": arm(LeaveOneOut),
        "Attention": arm(lambda: Attention("layer3"), soft(3.0)),
        "Attention to others": arm(lambda: Attention("layer3", attend_self=False), soft(3.0)),
        "four branches, Gate": lambda: {
            "peers": branches(4), "exchange": Gate("layer2"), "losses": soft(3.0)
        },
    },
    **{size: {n: COMMON[n] for n in ("independent", "Mutual, simultaneous")} for size in (3, 5)},
    MIXED: {n: COMMON[n] for n in ("independent", "Mutual, simultaneous")},
}  # fmt: skip

RAMPED = (
    "Fusion",
    "PeerCollaborative",
    "Attention",
    "Attention to others",
    "two branches, Gate",
    "four branches, Gate",
)  # as published


def run(size: int, name: str, seed: int) -> dict:
    """Train and test one cohort; accuracies in [0, 1]."""
    seed_everything(seed, verbose=False)
    options = ARMS[size][name]()
    if size == MIXED:
        options["peers"] = small_and_large()
    options.setdefault("peers", [network() for _ in range(size)])

    def scheduler(optimizer):
        steps = EPOCHS * (IMAGES // BATCH)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)

    module = PeerCohort(
        optimizer=lambda p: torch.optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        ),
        scheduler=scheduler,
        scheduler_interval="step",
        clip_norm=5.0,
        **options,
    )
    ramp = (
        [LossWeightScheduler(SigmoidRampUp(0.0, 2.0 if name == "PeerCollaborative" else 1.0, 3))]
        if name in RAMPED
        else []
    )
    curves = Curves()
    trainer = bare_trainer([*ramp, curves], max_epochs=EPOCHS, num_sanity_val_steps=0)
    images = FashionMNIST(
        batch_size=BATCH,
        val_split=5000 if size == MIXED else 0.0,
        subset=IMAGES,
        split_seed=seed,
        drop_last=True,
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=images)
    seconds = time.perf_counter() - start
    (scores,) = trainer.test(module, datamodule=images, verbose=False)
    return {
        "size": size,
        "arm": name,
        "seed": seed,
        "peers": [scores[f"test/{peer}/accuracy"] for peer in module.distillation.names],
        "ensemble": scores["test/ensemble/accuracy"],
        "agreement": scores["test/agreement_0_1"],
        "seconds": round(seconds, 1),
        **({"curves": curves.seen} if curves.seen else {}),
    }


class Curves(Callback):
    """Accuracy of each peer after each epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: PeerCohort) -> None:
        scores = pl_module.distillation.scores(trainer.callback_metrics)
        self.seen.append([round(score, 4) for score in scores])


def table() -> str:
    """Mean peer and ensemble, and the paired difference of the mean peer from independent ones."""
    lines = [
        "| peers | arm | mean peer % | over independent | best peer % | together % | agreement % |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in [*sorted(set(ARMS) - {MIXED}), MIXED]:
        found = {
            name: {r["seed"]: r for r in read(RESULTS) if r["size"] == size and r["arm"] == name}
            for name in ARMS[size]
        }
        for name, runs in found.items():
            if len(runs) < 2:
                continue
            means = {s: 100 * statistics.mean(r["peers"]) for s, r in runs.items()}
            alone = {s: 100 * statistics.mean(r["peers"]) for s, r in found["independent"].items()}
            over = gain(means, alone) if name != "independent" else ""
            best = statistics.mean(100 * max(r["peers"]) for r in runs.values())
            together = statistics.mean(100 * r["ensemble"] for r in runs.values())
            agreement = statistics.mean(100 * r["agreement"] for r in runs.values())
            lines.append(
                f"| {size or 'small, large'} | {name} | {spread(list(means.values()))} | {over} | "
                f"{best:.2f} | {together:.2f} | {agreement:.1f} |"
            )
    return "\n".join(lines)


def plot() -> None:
    """Draw what cohort size does, and how a small and a large peer learn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    styles = {"independent": ("C7", "alone"), "Mutual, simultaneous": ("C0", "mutual")}
    for name, (color, label) in styles.items():
        means: dict[int, list[float]] = {}
        together: dict[int, list[float]] = {}
        for row in read(RESULTS):
            if row["arm"] == name and row["size"] != MIXED:
                means.setdefault(row["size"], []).append(100 * statistics.mean(row["peers"]))
                together.setdefault(row["size"], []).append(100 * row["ensemble"])
        if name == "independent":  # a cohort of one
            firsts = [
                100 * r["peers"][0] for r in read(RESULTS) if r["arm"] == name and r["size"] == 5
            ]
            means[1] = together[1] = firsts
        for values, dashes, what in ((means, "-", "mean peer"), (together, "--", "together")):
            sizes = sorted(values)
            left.errorbar(
                sizes,
                [statistics.mean(values[s]) for s in sizes],
                [statistics.stdev(values[s]) / len(values[s]) ** 0.5 for s in sizes],
                color=color, linestyle=dashes, marker="o", capsize=3, label=f"{label}, {what}",
            )  # fmt: skip
        curves = [r["curves"] for r in read(RESULTS) if r["size"] == MIXED and r["arm"] == name]
        for k, (dashes, what) in enumerate((("-", "small"), ("--", "large"))):
            ends = [100 * statistics.mean(c[e][k] for c in curves) for e in range(EPOCHS)]
            right.plot(
                range(1, EPOCHS + 1), ends, color=color, linestyle=dashes, label=f"{label}, {what}"
            )
    left.set(xlabel="networks in the cohort", ylabel="test accuracy, %", xticks=range(1, 6))
    right.set(xlabel="epoch", ylabel="accuracy on held-out images, %", ylim=(65, None))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "table", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 3, 5, MIXED])
    add_part(parser)
    options = parser.parse_args()
    if options.what == "run":
        quiet()
        jobs = [
            (size, name, seed)
            for size in options.sizes
            for seed in options.seeds
            for name in ARMS[size]
        ]
        run_missing(RESULTS, ("size", "arm", "seed"), jobs, run, options.part)
    if options.what == "plot":
        plot()
    else:
        print(table())
