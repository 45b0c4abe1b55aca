"""Small networks that torchvision lacks, and pretrained weights; importable without Lightning."""

from lightning_kd.models.averaged import Averaged
from lightning_kd.models.branching import Branching
from lightning_kd.models.generator import ImageGenerator
from lightning_kd.models.multi_branch import MultiBranch
from lightning_kd.models.normalized import Normalized
from lightning_kd.models.pretrained import pretrained
from lightning_kd.models.resized import Resized
from lightning_kd.models.resnet import (
    CifarResNet,
    resnet8,
    resnet14,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
)
from lightning_kd.models.tree import Tree
from lightning_kd.models.views import Mirror, Plain, Scale, View
from lightning_kd.models.wide_resnet import WideResNet, wide_resnet

__all__ = [
    "Averaged",
    "Branching",
    "CifarResNet",
    "ImageGenerator",
    "Mirror",
    "MultiBranch",
    "Normalized",
    "Plain",
    "Resized",
    "Scale",
    "Tree",
    "View",
    "WideResNet",
    "pretrained",
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "wide_resnet",
]
