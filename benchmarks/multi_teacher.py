"""Every weighting and every loss of MultiTeacher on one setting: does it help?

Train the three teachers first (configs/fashion_mnist/teacher.yaml says how), then

    python benchmarks/multi_teacher.py run --seeds 0 1 2          # every arm
    python benchmarks/multi_teacher.py run --spoiled --seeds 0 1 2 3 4
    python benchmarks/multi_teacher.py table

Setting: 5,000 training images of Fashion-MNIST, all labelled, 500 more for validation, ten epochs
(780 steps of 64), the test images once at the end; ResNet-8 of width 8 learns from WideResNet-10-2,
ResNet-20 and ResNet-8 of width 32. A seed sets the initial weights, the order of the batches and
the choice of the 5,000 images. ``--spoiled`` puts a WideResNet-10-2 of random weights in the place
of the first teacher. ``run`` appends one line a run to benchmarks/results/multi_teacher.jsonl and
skips those that are there; give ``--part 0 2`` and ``--part 1 2`` to two processes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import add_part, bare_trainer, gain, quiet, read, run_missing, spread
from lightning.pytorch import seed_everything

from lightning_kd import MultiTeacher, Supervised
from lightning_kd.callbacks import LossWeightScheduler
from lightning_kd.data import FashionMNIST
from lightning_kd.losses import (
    FEED,
    MEAL,
    NST,
    PKT,
    AttentionTransfer,
    ConfidentHint,
    DecoupledKL,
    GramLoss,
    GraphDistillation,
    Hint,
    KnowledgeFlow,
    LogitMSE,
    LogitStandardization,
    Relational,
    SoftTarget,
)
from lightning_kd.models import pretrained, resnet8, wide_resnet
from lightning_kd.schedules import Linear
from lightning_kd.weighting import (
    AttentionOverLayers,
    Confidence,
    DomainSimilarity,
    Entropy,
    GradientSpace,
    LearnedGate,
    LowestLoss,
    SelfPaced,
    Switching,
    Uniform,
    save_domain,
)

RESULTS = Path("benchmarks/results/multi_teacher.jsonl")
TEACHERS = ("wide_resnet", "resnet20", "resnet8")
LAYERS = ["relu", "layer3", "layer3"]
EPOCHS, BATCH, IMAGES = 10, 64, 5000


def soft() -> list:
    return [SoftTarget(4.0, weight=0.9)]


def weighting(make: Callable, losses: Callable = soft) -> Callable:
    return lambda: {"weighting": make(), "losses": losses(), "task_weight": 0.1}


def feature(make: Callable, make_weighting: Callable = Uniform) -> Callable:
    return lambda: {"losses": [make()], "task_weight": 1.0, "weighting": make_weighting()}


L = ("layer3", LAYERS)
WEIGHTINGS = {
    "Uniform": weighting(Uniform),
    "Uniform, logit space": weighting(lambda: Uniform("logit")),
    "Switching": weighting(Switching),
    "DomainSimilarity": weighting(
        lambda: DomainSimilarity([f"runs/fashion_mnist/{t}.domain" for t in TEACHERS], LAYERS)
    ),
    "Confidence": weighting(Confidence),
    "Entropy": weighting(Entropy),
    "GradientSpace": weighting(GradientSpace),
    "LearnedGate": weighting(lambda: LearnedGate("layer3")),
    "SelfPaced": lambda: {**weighting(SelfPaced)(), "task_weight": 1.0},
    "SelfPaced, no fading": weighting(lambda: SelfPaced(fade=False)),
    "LowestLoss": weighting(LowestLoss),
    "AttentionOverLayers": weighting(lambda: AttentionOverLayers(*L)),
}
LOGIT_LOSSES = {
    "LogitMSE": weighting(Uniform, lambda: [LogitMSE(weight=1.0)]),
    "DecoupledKL": weighting(Uniform, lambda: [DecoupledKL(4.0, 1.0, 2.0, weight=0.9)]),
    "LogitStandardization": weighting(Uniform, lambda: [LogitStandardization(2.0, weight=9.0)]),
}
FEATURE_LOSSES = {
    "Hint": feature(lambda: Hint(*L, weight=100.0)),
    "Hint + LowestLoss": feature(lambda: Hint(*L, weight=10.0), LowestLoss),
    "Hint + AttentionOverLayers": feature(
        lambda: Hint(*L, weight=10.0), lambda: AttentionOverLayers(*L)
    ),
    "ConfidentHint": feature(lambda: ConfidentHint(*L, "linear", weight=50.0)),
    "AttentionTransfer": feature(lambda: AttentionTransfer(*L, weight=100.0)),
    "FEED": feature(lambda: FEED(*L, weight=1.0)),
    "GramLoss": feature(lambda: GramLoss(*L, weight=3000.0)),
    "GramLoss, learned trust": feature(lambda: GramLoss(*L, learn_weights=True, weight=3000.0)),
    "GramLoss, log-Euclidean": feature(lambda: GramLoss(*L, "log_euclidean", weight=30.0)),
    "Relational": feature(lambda: Relational(*L)),
    "NST": feature(lambda: NST(*L, weight=50.0)),
    "PKT": feature(lambda: PKT(*L, weight=30000.0)),
    "KnowledgeFlow": feature(lambda: KnowledgeFlow(*L, weight=0.01)),
    "MEAL + Switching": feature(lambda: MEAL(*L, adversarial_weight=0.02, weight=5.0), Switching),
    "SoftTarget + MEAL + Switching": lambda: {
        "weighting": Switching(),
        "losses": [SoftTarget(4.0, weight=0.9), MEAL(*L, adversarial_weight=0.1)],
        "task_weight": 0.1,
    },
    "GraphDistillation": lambda: {
        "losses": [GraphDistillation(*L, logit_weight=0.9)],
        "task_weight": 0.1,
    },
    "Confidence, SoftTarget + ConfidentHint": lambda: {
        "weighting": Confidence(),
        "losses": [SoftTarget(4.0), ConfidentHint(*L, "linear", weight=10.0)],
        "task_weight": 1.0,
    },
}
ARMS = {"labels alone": None, **WEIGHTINGS, **LOGIT_LOSSES, **FEATURE_LOSSES}
SPOILED = ("Uniform", "Confidence", "LearnedGate", "SelfPaced", "SelfPaced, no fading", "Entropy",
           "LowestLoss", "GradientSpace", "AttentionOverLayers")  # fmt: skip


def teachers(spoiled: bool) -> list[torch.nn.Module]:
    found = [pretrained(f"runs/fashion_mnist/{name}/student.safetensors") for name in TEACHERS]
    if spoiled:
        torch.manual_seed(12345)
        found[0] = wide_resnet(10, 2, num_classes=10, in_channels=1, stem_stride=2)
    return found


def data(seed: int) -> FashionMNIST:
    return FashionMNIST(
        batch_size=BATCH, val_split=500, subset=IMAGES, split_seed=seed, drop_last=True
    )


def run(arm: str, seed: int, spoiled: bool) -> dict:
    """Train and test one student; returns its accuracy and how far each teacher was trusted."""
    seed_everything(seed, verbose=False)
    student = resnet8(num_classes=10, in_channels=1, width=8, stem_stride=2)

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        steps = EPOCHS * (IMAGES // BATCH)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)

    options = {
        "optimizer": lambda p: torch.optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        ),
        "scheduler": scheduler,
        "scheduler_interval": "step",
    }
    make = ARMS[arm]
    module: MultiTeacher | Supervised
    if make is None:
        module = Supervised(student, **options)
    else:
        module = MultiTeacher(student, teachers(spoiled), **make(), **options)
    callbacks = []
    if arm == "KnowledgeFlow":
        callbacks.append(LossWeightScheduler(Linear(0.01, 10.0, EPOCHS // 2), "knowledge_flow"))
    trainer = bare_trainer(
        callbacks, max_epochs=EPOCHS, gradient_clip_val=5.0, num_sanity_val_steps=0
    )
    start = time.perf_counter()
    trainer.fit(module, datamodule=data(seed))
    seconds = time.perf_counter() - start
    trust = mean_trust(module, seed) if make is not None and "alone" not in arm else None
    (scores,) = bare_trainer().test(Supervised(student), datamodule=data(seed), verbose=False)
    return {
        "arm": arm,
        "seed": seed,
        "spoiled": spoiled,
        "accuracy": scores["test/accuracy"],
        "loss": scores["test/loss"],
        "trust": trust,
        "seconds": round(seconds, 1),
    }


@torch.no_grad()
def mean_trust(module: MultiTeacher, seed: int) -> list[float]:
    """Mean weight of each teacher on training batches with the trained student."""
    held = data(seed)
    held.setup("fit")
    module.train()
    module.student.eval()
    distillation, weighting = module.distillation, module.distillation.weighting
    total = torch.zeros(len(module.teachers))
    for _, batch in zip(range(8), held.train_dataloader(), strict=False):
        x, y = held.on_after_batch_transfer(batch, 0)
        indices = tuple(weighting.active(len(module.teachers)))
        if not indices:  # no teacher runs any more
            weighting.eval()
            indices = tuple(weighting.active(len(module.teachers)))
        outputs = distillation.teacher_outputs(x, indices)
        weights = weighting(distillation.student_output(x), outputs, y)
        weights = weights.mean(1) if weights.dim() == 2 else weights
        for index, weight in zip(indices, weights, strict=True):
            total[index] += weight / 8
    return [round(float(t), 4) for t in total]


def table(spoiled: bool = False) -> str:
    """Mean and standard deviation; paired differences with their standard errors."""
    found: dict[str, dict[int, dict]] = {}
    for row in read(RESULTS):
        if row["spoiled"] == spoiled:
            found.setdefault(row["arm"], {})[row["seed"]] = row

    def against(arm: str, base: str) -> str:
        if arm == base or base not in found:
            return ""
        mine, theirs = (
            {s: 100 * r["accuracy"] for s, r in found[name].items()} for name in (arm, base)
        )
        return gain(mine, theirs)

    lines = [
        "| arm | test accuracy % | cross-entropy | over labels alone | over Uniform | trust |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        if len(found.get(arm, {})) < 2:
            continue
        runs = found[arm]
        accuracy = [100 * r["accuracy"] for r in runs.values()]
        loss = statistics.mean(r["loss"] for r in runs.values())
        trust = [r["trust"] for r in runs.values() if r["trust"]]
        means = " / ".join(f"{statistics.mean(t):.2f}" for t in zip(*trust, strict=True))
        lines.append(
            f"| {arm} | {spread(accuracy)} | {loss:.3f} | {against(arm, 'labels alone')} | "
            f"{against(arm, 'Uniform')} | {means} |"
        )
    return "\n".join(lines)


def prepare() -> None:
    """Write each teacher's features of its training images, for DomainSimilarity."""
    source = FashionMNIST(batch_size=256, val_split=0.0)
    source.setup("fit")
    batches = [b for _, b in zip(range(2), source.train_dataloader(), strict=False)]
    images = [source.on_after_batch_transfer(batch, 0)[0] for batch in batches]
    for name, layer, network in zip(TEACHERS, LAYERS, teachers(False), strict=True):
        save_domain(f"runs/fashion_mnist/{name}.domain", network, layer, images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--spoiled", action="store_true")
    add_part(parser)
    options = parser.parse_args()
    if options.what == "run":
        quiet()
        prepare()
        arms = options.arms or (SPOILED if options.spoiled else list(ARMS))
        jobs = [(arm, seed, options.spoiled) for seed in options.seeds for arm in arms]
        run_missing(RESULTS, ("arm", "seed", "spoiled"), jobs, run, options.part)
    else:
        print(table())
        print("\nOne teacher spoiled (the first):\n")
        print(table(spoiled=True))
