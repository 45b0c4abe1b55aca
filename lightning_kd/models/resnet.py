from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.utils.checks import check_one_of, check_positive

Shortcut = Literal["pad", "projection"]


class PadShortcut(nn.Module):
    """Option A of the paper: every second pixel, new channels zero on both sides.

    Args:
        channels: Number of channels to add.
        stride: Step between the pixels that are kept.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, H, W) to (B, C + channels, H / stride, W / stride)."""
        before = self.channels // 2
        return F.pad(
            x[:, :, :: self.stride, :: self.stride],
            (0, 0, 0, 0, before, self.channels - before),
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
        shortcut: ``"pad"`` (option A) or ``"projection"`` (option B: 1x1 convolution).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = (
                PadShortcut(channels - in_channels, stride)
                if shortcut == "pad"
                else nn.Sequential(
                    nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                    nn.BatchNorm2d(channels),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Residual network for small images: three stages of ``(depth - 2) / 6`` blocks.

    Layers to tap: ``layer1``, ``layer2``, ``layer3``.

    Args:
        depth: 6 n + 2: 8, 14, 20, 32, 44, 56, 110.
        num_classes: Outputs; ``None``: from the data on the command line, else 10.
        in_channels: 1 or 3; ``None``: from the data on the command line, else 3.
        width: Channels of the first stage; the next two have twice and four times as many.
        shortcut: ``"pad"`` (option A, as published for CIFAR) or ``"projection"`` (option B).
        stem_stride: 2 halves the resolution at once and makes the network four times cheaper.

    Raises:
        ValueError: If ``depth`` is not 6 n + 2.

    Source:
        He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int | None = None,
        in_channels: int | None = None,
        width: int = 16,
        shortcut: Shortcut = "pad",
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"Expected depth 6 n + 2 (8, 14, 20, 32, ...), got {depth}.")
        check_positive(width, "width")
        check_positive(stem_stride, "stem_stride")
        check_one_of(shortcut, ("pad", "projection"), "shortcut")
        self.init_args = {  # for rebuilding it from an export
            "depth": depth,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
            "shortcut": shortcut,
            "stem_stride": stem_stride,
        }
        self.conv1 = nn.Conv2d(in_channels or 3, width, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = (depth - 2) // 6

        def stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
            first = BasicBlock(channels_in, channels, stride, shortcut)
            rest = (BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        self.layer1 = stage(width, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, num_classes or 10)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def _of_depth(depth: int) -> Callable[..., CifarResNet]:
    """Make the factory of one depth; a real signature, because jsonargparse reads it."""

    def build(
        num_classes: int | None = None,
        in_channels: int | None = None,
        width: int = 16,
        shortcut: Shortcut = "pad",
        stem_stride: int = 1,
    ) -> CifarResNet:
        return CifarResNet(depth, num_classes, in_channels, width, shortcut, stem_stride)

    build.__name__ = build.__qualname__ = f"resnet{depth}"
    build.__doc__ = f"""Build a CIFAR ResNet of depth {depth}.

    Args:
        num_classes: Outputs; ``None``: from the data on the command line, else 10.
        in_channels: 1 or 3; ``None``: from the data on the command line, else 3.
        width: Channels of the first stage; the next two have twice and four times as many.
        shortcut: ``"pad"`` (option A, as published for CIFAR) or ``"projection"`` (option B).
        stem_stride: 2 halves the resolution at once and makes the network four times cheaper.
    """
    return build


resnet8 = _of_depth(8)
resnet14 = _of_depth(14)
resnet20 = _of_depth(20)
resnet32 = _of_depth(32)
resnet44 = _of_depth(44)
resnet56 = _of_depth(56)
resnet110 = _of_depth(110)
