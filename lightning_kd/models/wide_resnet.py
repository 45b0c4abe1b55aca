from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.utils.checks import check_positive


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice, around a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
        dropout: Dropout probability between the two convolutions.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.shortcut = (
            nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            if in_channels != channels or stride != 1
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C_in, H, W) to (B, C, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        # the shortcut of a widening block starts after the activation, as the authors' does
        skip = x if self.shortcut is None else self.shortcut(active)
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        summed: Tensor = out + skip
        return summed


class WideResNet(nn.Module):
    """Wide residual network for small images: three groups of ``(depth - 4) / 6`` blocks.

    Layers to tap: ``block1``, ``block2``, ``block3`` (before their activation) and ``relu``.

    Args:
        depth: 6 n + 4: 10, 16, 22, 28, 40.
        widen_factor: The groups have 16, 32 and 64 times as many channels.
        num_classes: Outputs; ``None``: from the data on the command line, else 10.
        in_channels: 1 or 3; ``None``: from the data on the command line, else 3.
        dropout: Dropout probability inside each block, in [0, 1).
        stem_stride: 2 halves the resolution at once and makes the network four times cheaper.

    Raises:
        ValueError: If ``depth`` is not 6 n + 4.

    Source:
        Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1605.07146, table 1.
    """

    def __init__(
        self,
        depth: int = 16,
        widen_factor: int = 2,
        num_classes: int | None = None,
        in_channels: int | None = None,
        dropout: float = 0.0,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"Expected depth 6 n + 4 (10, 16, 22, 28, 40), got {depth}.")
        check_positive(widen_factor, "widen_factor")
        check_positive(stem_stride, "stem_stride")
        self.init_args = {  # for rebuilding it from an export
            "depth": depth,
            "widen_factor": widen_factor,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "dropout": dropout,
            "stem_stride": stem_stride,
        }
        blocks = (depth - 4) // 6
        width = 16 * widen_factor
        self.conv1 = nn.Conv2d(in_channels or 3, 16, 3, stem_stride, 1, bias=False)

        def group(channels_in: int, channels: int, stride: int) -> nn.Sequential:
            first = WideBlock(channels_in, channels, stride, dropout)
            rest = (WideBlock(channels, channels, 1, dropout) for _ in range(blocks - 1))
            return nn.Sequential(first, *rest)

        self.block1 = group(16, width, 1)
        self.block2 = group(width, 2 * width, 2)
        self.block3 = group(2 * width, 4 * width, 2)
        self.bn = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(4 * width, num_classes or 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, K)."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.linear(self.relu(self.bn(out)).mean((2, 3)))
        return logits


def wide_resnet(
    depth: int = 16,
    widen_factor: int = 2,
    num_classes: int | None = None,
    in_channels: int | None = None,
    dropout: float = 0.0,
    stem_stride: int = 1,
) -> WideResNet:
    """Build a Wide ResNet; arguments as for ``WideResNet``."""
    return WideResNet(depth, widen_factor, num_classes, in_channels, dropout, stem_stride)
