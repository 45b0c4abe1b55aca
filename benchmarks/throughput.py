"""Images a second of CIFAR-10 distillation, over a compiled loop written by hand.

    python benchmarks/throughput.py --device cuda --precision bf16-mixed --compile
    python benchmarks/throughput.py --batch 64 --count 512              # on a CPU

A ResNet-20 learns from a ResNet-56 (Hinton, temperature 4) on random images of CIFAR-10's
shape with crops and flips. The loop by hand has all images on the device, student and teacher under
torch.compile if asked to; this package has what its users have: a data module in the memory of the
CPU, Lightning's Trainer and the callbacks ``ChannelsLast`` and ``Compile``. Sides take turns in one
process, each epoch's seconds are counted behind a first one, and the device is waited for at its
end only. ``--profile`` says where this package's epoch goes.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from common import Epochs, RandomImages, bare_trainer, now, quiet, with_statistics
from torch.profiler import ProfilerActivity, profile

from lightning_kd import MultiTeacher
from lightning_kd.callbacks import ChannelsLast, Compile
from lightning_kd.functional import crop_and_flip
from lightning_kd.losses import SoftTarget
from lightning_kd.models import resnet20, resnet56

TYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def by_hand(options: argparse.Namespace, data: RandomImages, epochs: int) -> list[float]:
    kind, device = TYPES[options.precision], options.device
    student = resnet20().to(device, memory_format=torch.channels_last).train()
    teacher = with_statistics(resnet56()).to(device, memory_format=torch.channels_last)
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device, enabled=options.precision == "16-mixed")
    ask = torch.compile(teacher) if options.compile else teacher
    learn = torch.compile(student) if options.compile else student
    images, labels = (part.to(device) for part in data.training)
    seconds = []
    for _ in range(epochs):
        start = now()
        total = torch.zeros((), device=device)
        for index in torch.randperm(len(labels), device=device).split(options.batch):
            draws = torch.rand(len(index), 3, device=device)
            x = crop_and_flip(images[index], draws, 4, True).float().div_(255)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, kind, enabled=kind != torch.float32):
                with torch.no_grad():
                    target = (ask(x).float() / 4).softmax(1)
                logits = learn(x).float()
            soft = F.kl_div((logits / 4).log_softmax(1), target, reduction="batchmean") * 16
            loss = 0.9 * soft + 0.1 * F.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
        seconds.append(now() - start)
    return seconds[1:]


def ours(options: argparse.Namespace, data: RandomImages, epochs: int) -> list[float]:
    clock = Epochs()
    callbacks = [clock, ChannelsLast(), *([Compile()] if options.compile else [])]
    module = MultiTeacher(
        resnet20(), [with_statistics(resnet56())], [SoftTarget(4.0, weight=0.9)], task_weight=0.1
    )
    bare_trainer(
        callbacks, "gpu" if options.device == "cuda" else "cpu", devices=1, max_epochs=epochs,
        precision=options.precision, log_every_n_steps=50,
    ).fit(module, datamodule=data)  # fmt: skip
    return clock.seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="32-true", choices=list(TYPES))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--count", type=int, default=50_176, help="images an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="of each turn, the first not counted")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    quiet()
    data = RandomImages(batch_size=options.batch, val_split=0.0, crop_padding=4, flip=True)
    data.count = options.count
    data.setup("fit")
    pairs = []
    for _ in range(options.turns):
        pairs.append(
            [statistics.median(side(options, data, options.epochs)) for side in (by_hand, ours)]
        )
    hand, package = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    ratios = [a / b for a, b in pairs]
    print("| device | precision | compiled | by hand, images/s | lightning_kd | ratio |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {options.device} | {options.precision} | {options.compile} "
        f"| {options.count / hand:.0f} | {options.count / package:.0f} "
        f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
    )
    if options.profile:
        kinds = [ProfilerActivity.CPU]
        kinds += [ProfilerActivity.CUDA] if options.device == "cuda" else []
        with profile(activities=kinds) as seen:
            ours(options, data, 2)
        key = f"self_{options.device}_time_total"
        print(seen.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60))


if __name__ == "__main__":
    main()
