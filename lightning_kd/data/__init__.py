"""Data modules; images reach the networks in [0, 1]."""

from lightning_kd.data.base import ImageData
from lightning_kd.data.digits import Digits
from lightning_kd.data.folder import ImageFolder
from lightning_kd.data.pseudo_labelled import PseudoLabelled
from lightning_kd.data.rounds import Rounds
from lightning_kd.data.vision import CIFAR10, CIFAR100, MNIST, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Digits",
    "FashionMNIST",
    "ImageData",
    "ImageFolder",
    "PseudoLabelled",
    "Rounds",
]
