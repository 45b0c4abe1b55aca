"""What makes teachers cheaper? An epoch with each option over an epoch without.

    python benchmarks/lean_teachers.py
    python benchmarks/lean_teachers.py --device cuda

A ResNet-20 learns from three ResNet-56 on random images of 32 x 32 in batches of 64; then a tiny
student from eight tiny teachers on 8 x 8, which is where batched teachers can pay. All kinds of
epoch take turns in one process; medians of their ratios to the plain epoch. Compilation comes
before the first batch is over, and is not counted. Also printed: how far the teachers' logits
moved, as the largest difference over the largest logit.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from common import RandomImages, bare_trainer, quiet, with_statistics
from step_overhead import Clock
from torch import nn

from lightning_kd import MultiTeacher
from lightning_kd.callbacks import ChannelsLast, Compile, LeanTeachers
from lightning_kd.models import resnet8, resnet20, resnet56

BATCH, STEPS = 64, 6
KINDS = {
    "plain": lambda: [],
    "ChannelsLast": lambda: [ChannelsLast()],
    "LeanTeachers(dtype=bfloat16)": lambda: [LeanTeachers(dtype="bfloat16")],
    "both": lambda: [ChannelsLast(), LeanTeachers(dtype="bfloat16")],
    "Compile(students=False)": lambda: [Compile(students=False)],
    "Compile()": lambda: [Compile()],
    "all three": lambda: [ChannelsLast(), LeanTeachers(dtype="bfloat16"), Compile()],
    "LeanTeachers(batched=True)": lambda: [LeanTeachers(batched=True)],
    "LeanTeachers(offload=True)": lambda: [LeanTeachers(offload=True)],
}


class Few(RandomImages):
    count = BATCH * STEPS


class Tiny(Few):
    image_shape = (1, 8, 8)


def big() -> tuple[nn.Module, list[nn.Module], Few]:
    teachers = [with_statistics(resnet56()) for _ in range(3)]
    return resnet20(), teachers, Few(batch_size=BATCH, val_split=0.0)


def tiny() -> tuple[nn.Module, list[nn.Module], Few]:
    make = {"in_channels": 1, "width": 4}
    teachers = [with_statistics(resnet20(**make), (1, 8, 8)) for _ in range(8)]
    return resnet8(**make), teachers, Tiny(batch_size=BATCH, val_split=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    quiet()
    accelerator = "gpu" if options.device == "cuda" else "cpu"
    print("| networks | option | times as fast (lowest to highest) | answers moved |")
    print("|---|---|---|---|")
    for name, make in {"3 ResNet-56": big, "8 tiny ResNet-20": tiny}.items():
        torch.manual_seed(0)
        student, teachers, data = make()
        x = torch.rand(64, *data.image_shape)
        with torch.no_grad():
            expected = torch.stack([teacher(x) for teacher in teachers])
        modules, moved = {}, {}
        for kind in options.kinds:
            module = MultiTeacher(copy.deepcopy(student), copy.deepcopy(teachers))
            modules[kind] = (module, KINDS[kind]())

        def epoch(kind: str, modules=modules, data=data) -> float:
            module, callbacks = modules[kind]
            clock = Clock()
            bare_trainer([clock, *callbacks], accelerator, max_epochs=1, devices=1).fit(
                module, datamodule=data
            )
            return clock.seconds

        times: list[dict[str, float]] = []
        for turn in range(options.turns + 1):
            order = options.kinds if turn % 2 else options.kinds[::-1]
            times.append({kind: epoch(kind) for kind in order})
        for kind, (module, _) in modules.items():
            outputs = module.cpu().distillation.teacher_outputs(x)
            logits = torch.stack([output.logits for output in outputs])
            off = float((logits - expected).abs().max() / expected.abs().max())
            moved[kind] = "" if "Compile" in kind else f"{off:.1g}"  # plain again behind the fit
        for kind in options.kinds:
            ratios = [row["plain"] / row[kind] for row in times[1:]]
            print(
                f"| {name} | {kind} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                f"{max(ratios):.2f}) | {moved[kind]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
