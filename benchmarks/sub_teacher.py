"""Several teachers out of one against as many real teachers: what they teach, and what they cost.

    python benchmarks/sub_teacher.py teachers    # 10 networks a seed, about a minute each
    python benchmarks/sub_teacher.py students    # every arm, with all labels and 1 % of them
    python benchmarks/sub_teacher.py trees       # hierarchical ensembles against real teachers
    python benchmarks/sub_teacher.py table
    python benchmarks/sub_teacher.py plot        # benchmarks/results/sub_teacher.png, tree.png

Setting: 5,000 training images of Fashion-MNIST, the test images once at the end. Teachers are
ResNet-20 of 20 epochs with crops and flips: eight as they are, one with blocks left out (stochastic
depth, survival 0.8), one whose learning rate falls to 0 four times (snapshots). Students are
ResNet-8 of width 8, ten epochs. A seed sets initial weights, the order of the batches, the choice
of the 5,000 images and of those with a label; no network is shared between seeds. Costs are seconds
of one core, by the clock of the process. Results are in benchmarks/results/sub_teacher*.jsonl; what
is there is not made again; give ``--part 0 2`` and ``--part 1 2`` to two processes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import add_part, bare_trainer, gain, quiet, read, run_missing, spread
from lightning.pytorch import Callback, seed_everything
from safetensors.torch import save_file
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, OneCycleLR

from lightning_kd import MultiTeacher, PeerCohort, SubTeacher, Supervised
from lightning_kd.data import FashionMNIST
from lightning_kd.exchange import Hierarchical
from lightning_kd.losses import SoftTarget
from lightning_kd.models import Mirror, Plain, Scale, Tree, pretrained, resnet8, resnet20
from lightning_kd.teachers import (
    MultiView,
    NoisyTeacher,
    Snapshot,
    StochasticDepth,
)

TEACHERS = Path("benchmarks/results/sub_teacher_teachers.jsonl")
STUDENTS = Path("benchmarks/results/sub_teacher.jsonl")
TREES = Path("benchmarks/results/tree.jsonl")
WEIGHTS = Path("runs/sub_teacher")
IMAGES, BATCH = 5000, 64
STEPS = IMAGES // BATCH
TEACHER_EPOCHS, STUDENT_EPOCHS, CYCLES = 20, 10, 4
REAL = [f"plain_{k}" for k in range(8)]
#: kinds of ensembles: weights of the labels for each leaf and for the nested ensembles
KINDS = {
    "tree": (0.25, 0.25),
    "tree, labels for ensembles only": (0.0, 0.5),
    "independent": (1.0, 0.0),
}
LABELS = {"all labels": 1.0, "1 % of the labels": 0.01}
CUTS = ["bn1", "layer1", "layer2"]


def teacher_network() -> nn.Module:
    return resnet20(num_classes=10, in_channels=1, stem_stride=2)


def data(seed: int, labelled: float = 1.0, augment: bool = False) -> FashionMNIST:
    return FashionMNIST(
        batch_size=BATCH, val_split=500, subset=IMAGES, split_seed=seed, drop_last=True,
        labelled_fraction=labelled, keep_unlabelled=True,
        flip=augment, crop_padding=2 if augment else 0,
    )  # fmt: skip


def recipe(epochs: int, cycles: int = 1) -> dict[str, Any]:
    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        if cycles > 1:
            return CosineAnnealingWarmRestarts(optimizer, epochs * STEPS // cycles)
        return OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * STEPS)

    return {
        "optimizer": lambda p: torch.optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        ),
        "scheduler": schedule,
        "scheduler_interval": "step",
    }


def fit(module: Any, source: FashionMNIST, epochs: int, *callbacks: Callback) -> float:
    """Train; returns seconds of one core."""
    trainer = bare_trainer(
        callbacks,
        max_epochs=epochs, gradient_clip_val=5.0, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(module, datamodule=source)
    return time.process_time() - start


def accuracy(network: nn.Module, seed: int) -> float:
    (scores,) = bare_trainer().test(Supervised(network), datamodule=data(seed), verbose=False)
    return 100 * scores["test/accuracy"]


# ---------------------------------------------------------------------- teachers


class KeepCycles(Callback):
    """Write the weights each time the learning rate has fallen to 0."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        cycle, rest = divmod(trainer.current_epoch + 1, TEACHER_EPOCHS // CYCLES)
        if not rest:
            save(pl_module.student, f"{self.name}_{cycle}", self.seed)


def weights(name: str, seed: int) -> Path:
    return WEIGHTS / f"seed_{seed}" / f"{name}.safetensors"


def save(network: nn.Module, name: str, seed: int) -> None:
    weights(name, seed).parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), weights(name, seed))


def teacher(name: str, seed: int) -> nn.Module:
    return pretrained(str(weights(name, seed)), teacher_network())


def run_teacher(name: str, seed: int) -> dict[str, Any]:
    """Train one teacher and keep its weights."""
    number = int(name.split("_")[1]) if name in REAL else 0
    seed_everything(100 * seed + number, verbose=False)
    network = teacher_network()
    depth = StochasticDepth(survival=0.8) if name == "stochastic" else None
    cyclic = name == "cyclic"
    options = recipe(TEACHER_EPOCHS, CYCLES if cyclic else 1)
    module = Supervised(network, stochastic_depth=depth, **options)
    callbacks = [KeepCycles(name, seed)] if cyclic else []
    seconds = fit(module, data(seed, augment=True), TEACHER_EPOCHS, *callbacks)
    save(network, name, seed)
    return {
        "name": name,
        "seed": seed,
        "accuracy": accuracy(network, seed),
        "seconds": round(seconds, 1),
    }


# ---------------------------------------------------------------------- students


def sub(name: str, make: Callable[[int], Any]) -> Callable[[nn.Module, int], Any]:
    """SubTeacher with one teacher."""
    return lambda student, seed: SubTeacher(
        student, teacher(name, seed), make(seed), **recipe(STUDENT_EPOCHS)
    )


def real(*names: str) -> Callable[[nn.Module, int], Any]:
    return lambda student, seed: MultiTeacher(
        student, [teacher(name, seed) for name in names], **recipe(STUDENT_EPOCHS)
    )


def stochastic(count: int) -> Callable[[nn.Module, int], Any]:
    return sub("stochastic", lambda _: StochasticDepth(count, survival=0.8))


def snapshots(count: int) -> Callable[[nn.Module, int], Any]:
    def make(seed: int) -> Snapshot:
        return Snapshot([str(weights(f"cyclic_{CYCLES - k}", seed)) for k in range(1, count)])

    return sub("cyclic", make)


def views(*more: nn.Module) -> Callable[[nn.Module, int], Any]:
    return sub("plain_0", lambda _: MultiView([Plain(), *more]))


#: what a student learns from: how many teacher outputs, trained teachers, module
ARMS: dict[str, tuple[int, list[str], Callable[[nn.Module, int], Any]]] = {
    "labels alone": (0, [], lambda student, _: Supervised(student, **recipe(STUDENT_EPOCHS))),
    **{f"real teachers, m={m}": (m, REAL[:m], real(*REAL[:m])) for m in (1, 2, 4, 8)},
    "teacher trained with StochasticDepth, whole": (1, ["stochastic"], real("stochastic")),
    **{f"StochasticDepth, m={m}": (m, ["stochastic"], stochastic(m)) for m in (1, 2, 4, 8)},
    **{
        f"NoisyTeacher, m={m}": (m, ["plain_0"], sub("plain_0", lambda _, m=m: NoisyTeacher(m)))
        for m in (1, 4)
    },
    "MultiView, m=2": (2, ["plain_0"], views(Mirror())),
    "MultiView, m=4": (4, ["plain_0"], views(Mirror(), Scale(6 / 7), Scale(8 / 7))),
    "teacher of snapshots, last": (1, ["cyclic"], real("cyclic")),
    **{f"Snapshot, m={m}": (m, ["cyclic"], snapshots(m)) for m in (2, 4)},
}  # fmt: skip


def run_student(arm: str, labels: str, seed: int) -> dict[str, Any]:
    """Train and test one student."""
    seed_everything(seed, verbose=False)
    student = resnet8(num_classes=10, in_channels=1, width=8, stem_stride=2)
    module = ARMS[arm][2](student, seed)
    source = data(seed, LABELS[labels])
    if arm == "labels alone" and LABELS[labels] < 1:
        source.keep_unlabelled, source.drop_last = False, False
        epochs = STUDENT_EPOCHS * STEPS  # as many steps, of the few images there are
    else:
        epochs = STUDENT_EPOCHS
    seconds = fit(module, source, epochs)
    return {
        "arm": arm,
        "labels": labels,
        "seed": seed,
        "accuracy": accuracy(student, seed),
        "seconds": round(seconds, 1),
    }


# ---------------------------------------------------------------------- trees


@torch.no_grad()
def ensemble_accuracy(networks: list[nn.Module], seed: int) -> float:
    """Of the mean of the networks' logits."""
    source = data(seed)
    source.setup("test")
    right = total = 0
    for batch in source.test_dataloader():
        x, y = source.on_after_batch_transfer(batch, 0)
        mean = torch.stack([network.eval()(x) for network in networks]).mean(0)
        right, total = right + int((mean.argmax(1) == y).sum()), total + len(y)
    return 100 * right / total


class Leaves(nn.Module):
    """The first leaves of a tree."""

    def __init__(self, tree: Tree, count: int) -> None:
        super().__init__()
        self.tree, self.count = tree, count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tree(x, self.count)


def multiply_adds(network: nn.Module) -> float:
    """Millions, for one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, 28, 28))
    return counter.get_total_flops() / 2e6


def run_tree(kind: str, seed: int) -> list[dict[str, Any]]:
    """Accuracy of 1, 2, 4, 8 members of one kind of ensemble."""
    counts = (1, 2, 4, 8)
    seconds: dict[int, float]
    if kind == "independent":
        trained = {row["name"]: row for row in read(TEACHERS) if row["seed"] == seed}
        networks = [teacher(name, seed) for name in REAL]
        seconds = {m: sum(trained[name]["seconds"] for name in REAL[:m]) for m in counts}
        cost = {m: m * multiply_adds(networks[0]) for m in counts}
        found = {m: ensemble_accuracy(networks[:m], seed) for m in counts}
    else:
        seed_everything(100 * seed, verbose=False)
        tree = Tree(teacher_network(), CUTS)
        leaf_weight, task_weight = KINDS[kind]
        module = PeerCohort(
            [tree],
            Hierarchical(leaf_weight),
            losses=[SoftTarget(2.0, weight=0.5)],
            task_weight=task_weight,
            **recipe(TEACHER_EPOCHS),
        )
        spent = fit(module, data(seed, augment=True), TEACHER_EPOCHS)
        seconds = dict.fromkeys(counts, spent)
        cost = {m: multiply_adds(Leaves(tree, m)) for m in counts}
        found = {m: ensemble_accuracy([Leaves(tree, m)], seed) for m in counts}
    return [
        {
            "kind": kind, "seed": seed, "models": m, "accuracy": found[m],
            "million multiply-adds": round(cost[m], 2), "seconds": round(seconds[m], 1),
        }
        for m in counts
    ]  # fmt: skip


# ---------------------------------------------------------------------- what was found


def by_arm(labels: str) -> dict[str, dict[int, dict[str, Any]]]:
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read(STUDENTS):
        if row["labels"] == labels:
            found.setdefault(row["arm"], {})[row["seed"]] = row
    return found


def teacher_seconds(arm: str) -> float:
    """Mean cost of the teachers that an arm needs."""
    spent: dict[str, list[float]] = {}
    for row in read(TEACHERS):
        spent.setdefault(row["name"], []).append(row["seconds"])
    return sum(statistics.mean(spent[name]) for name in ARMS[arm][1])


def table() -> str:
    found = {labels: by_arm(labels) for labels in LABELS}
    base = "real teachers, m=1"
    head = " | ".join(f"{labels}: test accuracy % | over one real teacher" for labels in LABELS)
    lines = [
        f"| student learns from | {head} | seconds for teachers | for the student |",
        "|---" * (2 * len(LABELS) + 3) + "|",
    ]
    for arm in ARMS:
        cells = []
        for labels in LABELS:
            runs = {s: r["accuracy"] for s, r in found[labels].get(arm, {}).items()}
            one = {s: r["accuracy"] for s, r in found[labels].get(base, {}).items()}
            cells += [spread(list(runs.values())), "" if arm == base else gain(runs, one)]
        spent = [r["seconds"] for r in found["all labels"][arm].values()]
        lines.append(
            f"| {arm} | {' | '.join(cells)} | {teacher_seconds(arm):.0f} | "
            f"{statistics.mean(spent):.0f} |"
        )
    lines += ["", "| teacher | test accuracy % |", "|---|---|"]
    rows = read(TEACHERS)
    for name, members in (("plain", REAL), ("stochastic", ["stochastic"]), ("cyclic", ["cyclic"])):
        lines.append(
            f"| {name} | {spread([r['accuracy'] for r in rows if r['name'] in members])} |"
        )
    lines += [
        "",
        "| members | "
        + " | ".join(f"{k}: test accuracy % | M multiply-adds" for k in KINDS)
        + " |",
        "|---" * (1 + 2 * len(KINDS)) + "|",
    ]
    trees = read(TREES)
    for count in (1, 2, 4, 8):
        cells = []
        for kind in KINDS:
            rows = [r for r in trees if r["kind"] == kind and r["models"] == count]
            if not rows:
                cells += ["", ""]
                continue
            cells += [
                spread([r["accuracy"] for r in rows]), f"{rows[0]['million multiply-adds']:.1f}",
            ]  # fmt: skip
        lines.append(f"| {count} | {' | '.join(cells)} |")
    for kind in KINDS:
        spent = [r["seconds"] for r in trees if r["kind"] == kind and r["models"] == 8]
        if spent:
            lines.append(f"\nTraining of 8, {kind}: {statistics.mean(spent):.0f} s of one core.")
    return "\n".join(lines)


def plain_ticks(axis: Any, values: tuple[int, ...]) -> None:
    axis.minorticks_off()
    axis.set_xticks(values, [str(value) for value in values])


def plot() -> None:
    """Accuracy against the cost of training, and of an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = ("real teachers", "StochasticDepth", "NoisyTeacher", "MultiView", "Snapshot")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, labels in zip(axes, LABELS, strict=True):
        found = by_arm(labels)
        for family in families:
            arms = [arm for arm in ARMS if arm.startswith(f"{family}, m=") and arm in found]
            values = [[r["accuracy"] for r in found[arm].values()] for arm in arms]
            cost = [
                teacher_seconds(arm) + statistics.mean(r["seconds"] for r in found[arm].values())
                for arm in arms
            ]
            error = [statistics.stdev(v) / len(v) ** 0.5 for v in values]
            means = [statistics.mean(v) for v in values]
            axis.errorbar(cost, means, error, marker="o", capsize=3, label=family)
            for arm, x, y in zip(arms, cost, means, strict=True):
                axis.annotate(
                    f"{ARMS[arm][0]}", (x, y), xytext=(4, 5), textcoords="offset points", fontsize=8
                )
        axis.set_xscale("log")
        plain_ticks(axis, (100, 200, 400, 700))
        axis.set_xlabel("training of teachers and student, seconds of one core")
        axis.set_title(labels)
    axes[0].set_ylabel("test accuracy %, mean ± standard error")
    axes[0].legend()
    figure.savefig(STUDENTS.with_suffix(".png"), dpi=120)

    figure, axis = plt.subplots(figsize=(6.5, 4.4), layout="constrained")
    rows = read(TREES)
    for kind in KINDS:
        points = []
        for count in (1, 2, 4, 8):
            mine = [r for r in rows if r["kind"] == kind and r["models"] == count]
            if len(mine) > 1:
                values = [r["accuracy"] for r in mine]
                points.append(
                    (
                        mine[0]["million multiply-adds"], statistics.mean(values),
                        statistics.stdev(values) / len(values) ** 0.5, count,
                    )
                )  # fmt: skip
        if not points:
            continue
        x, y, error, counts = zip(*points, strict=True)
        axis.errorbar(x, y, error, marker="o", capsize=3, label=kind)
        for count, a, b in zip(counts, x, y, strict=True):
            axis.annotate(
                f"{count}", (a, b), xytext=(4, -11), textcoords="offset points", fontsize=8
            )
    axis.set_xscale("log")
    plain_ticks(axis, (10, 20, 40, 70))
    axis.set_xlabel("million multiply-adds an image")
    axis.set_ylabel("test accuracy %, mean ± standard error")
    figure.legend(loc="outside upper center", ncols=len(KINDS))
    figure.savefig(TREES.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["teachers", "students", "trees", "table", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    add_part(parser)
    options = parser.parse_args()
    quiet()
    if options.what == "teachers":
        names = [*REAL, "stochastic", "cyclic"]
        jobs = [(name, seed) for seed in options.seeds for name in names]
        run_missing(TEACHERS, ("name", "seed"), jobs, run_teacher, options.part)
    elif options.what == "students":
        jobs = [
            (a, labels, seed) for seed in options.seeds for a in options.arms for labels in LABELS
        ]
        run_missing(STUDENTS, ("arm", "labels", "seed"), jobs, run_student, options.part)
    elif options.what == "trees":
        kinds = [(kind, seed) for seed in options.seeds for kind in options.kinds]
        run_missing(TREES, ("kind", "seed"), kinds, run_tree, options.part)
    elif options.what == "table":
        print(table())
    else:
        plot()
