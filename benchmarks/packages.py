"""The same distillation under this package, torchdistill, KD_Lib and a plain loop: images a second.

    pip install -e '.[benchmarks]' && pip install --no-deps KD-Lib
    python benchmarks/packages.py                # all in one process, turn by turn
    python benchmarks/packages.py --apart        # each in a process of its own, turn by turn

A ResNet-8 learns from a ResNet-20 (Hinton, temperature 4), then two ResNet-8 learn from each other.
Data: the first images of CIFAR-10's training set, shuffled, cropped and mirrored: torchvision's
data set, transforms and DataLoader for the packages that expect them (``--workers`` for it), the
same images in memory for the plain loop and for this package. Seconds from the second batch of an
epoch to its end; the median of the turns' ratios to each of the others is printed.

``--apart`` is what a user of each package sees. In one process all of them gain from the memory
that this package's callback ``KeepFreedMemory`` has glibc keep between steps. KD_Lib (2021) no
longer imports as it is: its part for texts wants a transformers of its time, and is left out here.
As it comes, it runs its teacher with gradients on, and each peer again for every other.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from common import bare_trainer, quiet
from step_overhead import Clock
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import v2

from lightning_kd import MultiTeacher, PeerCohort
from lightning_kd.callbacks import ChannelsLast
from lightning_kd.data import CIFAR10
from lightning_kd.functional import crop_and_flip
from lightning_kd.losses import SoftTarget
from lightning_kd.models import resnet8, resnet20

BATCH, STEPS, TEMPERATURE, LABELS = 128, 12, 4.0, 0.1
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


class Marked:
    """A loader that notes when its second batch was requested, and when it ended."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.dataset, self.start, self.end = loader, loader.dataset, 0.0, 0.0

    def __iter__(self) -> Iterator:
        batches = iter(self.loader)
        yield next(batches)
        self.start = time.perf_counter()
        yield from batches
        self.end = time.perf_counter()

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Setting:
    """Data in the form that each package expects."""

    def __init__(self, workers: int) -> None:
        count = BATCH * STEPS
        self.module = CIFAR10(batch_size=BATCH, val_split=0.0, crop_padding=4, flip=True)
        self.module.prepare_data()
        self.module.setup("fit")
        self.module._train = tuple(part[:count] for part in self.module._train)
        crop = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        transform = v2.Compose([*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        whole = datasets.CIFAR10(self.module.root, train=True, transform=transform)
        self.folder = Subset(whole, range(count))
        self.workers = workers

    def loader(self) -> DataLoader:
        return DataLoader(self.folder, BATCH, shuffle=True, num_workers=self.workers)


def plain(setting: Setting, teachers: int) -> float:
    """By hand, on images in memory."""
    images, labels = setting.module._train
    teacher = resnet20().eval().requires_grad_(False)
    networks = [resnet8() for _ in range(1 if teachers else 2)]
    optimizers = [torch.optim.SGD(network.parameters(), **SGD) for network in networks]
    order, total, start = torch.randperm(len(labels)), torch.zeros(()), 0.0
    for step, index in enumerate(order.split(BATCH)):
        if step == 1:
            start = time.perf_counter()
        draws = torch.rand(len(index), 3)
        x = crop_and_flip(images[index], draws, 4, True).float().div_(255)
        y = labels[index]
        logits = [network(x) for network in networks]
        if teachers:
            with torch.no_grad():
                given = [teacher(x)]
        else:
            given = [peer.detach() for peer in reversed(logits)]
        temperature = TEMPERATURE if teachers else 1.0
        loss = torch.zeros(())
        for mine, other in zip(logits, given, strict=True):
            target = (other / temperature).softmax(1)
            soft = F.kl_div((mine / temperature).log_softmax(1), target, reduction="batchmean")
            task = F.cross_entropy(mine, y)
            parts = (1 - LABELS, LABELS) if teachers else (1.0, 1.0)
            loss = loss + parts[0] * temperature**2 * soft + parts[1] * task
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        total += loss.detach()
    return time.perf_counter() - start


def lightning_kd(setting: Setting, teachers: int, last: bool = False) -> float:
    clock = Clock()
    callbacks = [clock, ChannelsLast()] if last else [clock]
    if teachers:
        losses = [SoftTarget(TEMPERATURE, weight=1 - LABELS)]
        module = MultiTeacher(resnet8(), [resnet20()], losses, task_weight=LABELS)
    else:
        module = PeerCohort([resnet8(), resnet8()])
    bare_trainer(callbacks, max_epochs=1).fit(module, datamodule=setting.module)
    return clock.seconds


def channels_last(setting: Setting, teachers: int) -> float:
    """This package with its callback ``ChannelsLast``."""
    return lightning_kd(setting, teachers, last=True)


def torchdistill(setting: Setting, teachers: int) -> float:
    """As its example for CIFAR-10 has the loop."""
    import logging

    from torchdistill.core.training import get_training_box  # noqa: F401  # fills registries
    from torchdistill.core.distillation import get_distillation_box  # isort: skip
    from torchdistill.misc.log import MetricLogger, SmoothedValue

    logging.disable(logging.INFO)
    paths = {"student_module_path": ".", "student_module_io": "output"}
    paths |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "cifar10",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": setting.workers},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {
                "sub_terms": {
                    "kd": {
                        "criterion": {
                            "key": "KDLoss",
                            "kwargs": {**paths, "temperature": TEMPERATURE, "alpha": LABELS},
                        },
                        "weight": 1.0,
                    }
                }
            },
        },
    }
    device = torch.device("cpu")
    box = get_distillation_box(
        resnet20(), resnet8(), {"cifar10": setting.folder}, config, device, None, False, 1
    )
    box.train_data_loader = Marked(box.train_data_loader)
    log = MetricLogger(delimiter="  ")
    log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    log.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
    box.pre_epoch_process(epoch=0)
    for x, targets, more in log.log_every(box.train_data_loader, 1000, "Epoch: [0]"):
        start = time.time()
        x, targets = x.to(device), targets.to(device)
        loss = box.forward_process(x, targets, more)
        box.post_forward_process(loss=loss)
        log.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        log.meters["img/s"].update(len(x) / (time.time() - start))
        if torch.isnan(loss) or torch.isinf(loss):
            raise FloatingPointError
    return box.train_data_loader.seconds


def kd_lib(setting: Setting, teachers: int) -> float:
    texts = types.ModuleType("KD_Lib.KD.text")  # the real one imports old transformers
    texts.BERT2LSTM = texts.get_essentials = object
    sys.modules.setdefault(texts.__name__, texts)
    from KD_Lib.KD.vision.DML import DML
    from KD_Lib.KD.vision.vanilla import VanillaKD

    loader = Marked(setting.loader())
    few = DataLoader(Subset(setting.folder, range(2)), 2)
    students = [resnet8() for _ in range(1 if teachers else 2)]
    optimizers = [torch.optim.SGD(network.parameters(), **SGD) for network in students]
    if teachers:
        teacher = resnet20()
        optimizer = torch.optim.SGD(teacher.parameters(), **SGD)
        tool = VanillaKD(
            teacher, students[0], loader, few, optimizer, optimizers[0], temp=TEMPERATURE,
            distil_weight=1 - LABELS,
        )  # fmt: skip
        tool.train_student(1, plot_losses=False, save_model=False)
    else:
        DML(students, loader, few, optimizers).train_students(
            1, plot_losses=False, save_model=False
        )
    return loader.seconds


TASKS = {"one teacher": 1, "two peers (DML)": 0}
SIDES: dict[str, Callable[[Setting, int], float]] = {
    "lightning_kd": lightning_kd,
    "lightning_kd, channels last": channels_last,
    "plain": plain,
    "torchdistill": torchdistill,
    "kd_lib": kd_lib,
}
MISSING = {("torchdistill", 0)}  # it has no mutual learning


def here(side: str, teachers: int, setting: Setting) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        return SIDES[side](setting, teachers)


def elsewhere(side: str, teachers: int, workers: int) -> float:
    command = [sys.executable, __file__, "--case", side, str(teachers), "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.case:
        setting = Setting(options.workers)
        print(json.dumps(here(options.case[0], int(options.case[1]), setting)))
        return
    setting = None if options.apart else Setting(options.workers)
    print("| task | side | images a second | lightning_kd over it (lowest to highest) |")
    print("|---|---|---|---|")
    for task, teachers in TASKS.items():
        sides = [side for side in options.sides if (side, teachers) not in MISSING]
        rows: list[dict[str, float]] = []
        for turn in range(options.turns + (setting is not None)):
            order = sides if turn % 2 else sides[::-1]
            rows.append(
                {
                    side: here(side, teachers, setting)
                    if setting is not None
                    else elsewhere(side, teachers, options.workers)
                    for side in order
                }
            )
        rows = rows[setting is not None :]  # the first turn in one process warms up
        for side in sides:
            speed = BATCH * (STEPS - 1) / statistics.median(row[side] for row in rows)
            ratios = [row[side] / row["lightning_kd"] for row in rows]
            print(
                f"| {task} | {side} | {speed:.0f} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
