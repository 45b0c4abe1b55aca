"""The Python blocks of README and CONTRIBUTING run as they stand there."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_kd import MultiTeacher
from lightning_kd.models import resnet8

ROOT = Path(__file__).parents[1]


def blocks(file):
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.S)


def block(file, having):
    (found,) = [text for text in blocks(file) if having in text]
    return found


def network(width=4):
    return resnet8(num_classes=10, in_channels=1, width=width)


def test_the_plain_loop_of_readme_trains():
    torch.manual_seed(0)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    student = network()
    names = {
        "torch": torch, "student": student, "a": network(8), "b": network(6), "images": images,
        "loader": [(images, labels)] * 12,
    }  # fmt: skip
    before = float(nn.functional.cross_entropy(student(images), labels))
    code = block("README.md", "optimizer.step()")
    assert len(code[code.index("losses =") :].splitlines()) <= 10
    exec(code, names)
    assert list(names["losses"]) == ["loss", "task", "kd", "hint", "output"]
    assert float(nn.functional.cross_entropy(student(images), labels)) < before


class Stub:
    """Stands for what a block of README has from its reader."""

    def __init__(self, *_, **__):
        pass

    def fit(self, module, datamodule):
        module._build(torch.rand(2, *datamodule.image_shape))
        self.built = module


def test_the_data_free_block_of_readme_builds():
    student, teacher = (resnet8(num_classes=10) for _ in range(2))
    names = {"student": student, "teacher": teacher, "Trainer": Stub}
    exec(block("README.md", "MetaGenerator("), names)
    assert names["trainer"].built.distillation.built


def test_the_classes_of_contributing_train(make_trainer, digits):
    from typing import Any

    from lightning_kd import Distillation
    from lightning_kd.data_free import image_losses
    from lightning_kd.features import Projection
    from lightning_kd.losses import LayerLoss
    from lightning_kd.modules import Distiller
    from lightning_kd.weighting import Weighting

    names = {
        "torch": torch, "nn": nn, "Projection": Projection, "LayerLoss": LayerLoss, "Any": Any,
        "Weighting": Weighting, "ImageLoss": image_losses.ImageLoss, "Distiller": Distiller,
        "Distillation": Distillation,
    }  # fmt: skip
    for code in blocks("CONTRIBUTING.md"):
        exec(code, names)
    losses = {"mine": names["Mine"]("layer3", "layer3")}
    teachers = [network(8), network(6)]
    module = MultiTeacher(network(), teachers, losses, names["Trusting"]())
    noisy = names["Noisy"](network(), teachers, sigma=0.2)
    for made, key in ((module, "train/mine"), (noisy, "train/soft_target")):
        trainer = make_trainer(max_epochs=1)
        trainer.fit(made, datamodule=digits())
        assert float(trainer.callback_metrics[key]) > 0
    assert noisy.hparams["sigma"] == 0.2
    assert names["Bright"]().name == "bright"


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_every_block_is_python(file):
    assert len(blocks(file)) >= 3
    for code in blocks(file):
        compile(code, file, "exec")


def test_trainer_takes_the_line_of_readme():
    from lightning_kd.callbacks import KeepFreedMemory, SaveOnSigterm
    from lightning_kd.modules import DurableCheckpointIO

    line = re.search(r"`(Trainer\(callbacks=\[SaveOnSigterm.*?)`", (ROOT / "README.md").read_text())
    trainer = eval(line[1], {"Trainer": Trainer, **locals()})
    assert isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO)
    assert {SaveOnSigterm, KeepFreedMemory} <= {type(c) for c in trainer.callbacks}
