from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Size, Tensor, nn


class Projection(nn.Module):
    """Learned map from one network's feature shape to another's.

    Feature maps are resized (average pooling down, bilinear up), then go through a 1x1 convolution
    and BatchNorm; flat features (B, D) and token sequences (B, N, D) through a linear layer. With
    ``depth`` the map is non-linear: that many 3x3 convolutions, with BatchNorm and ReLU between
    them (linear layers and ReLU where there are no positions).

    Args:
        in_shape: Shape of the features to map, batch first; usually the student's.
        out_shape: Shape to map to, batch first; usually a teacher's.
        depth: 0 for the linear map, else the number of layers of a non-linear one.

    Raises:
        ValueError: If the two cannot be mapped to each other.

    Source:
        Romero et al. (FitNets), https://arxiv.org/abs/1412.6550, section 2.2. Differs from the
        paper: resizing instead of unpadded convolutions, so that any two resolutions fit; no
        ReLU, so that features from before an activation can be matched too. With ``depth``: Park &
        Kwak (FEED), https://arxiv.org/abs/1909.10754, section 3.
    """

    def __init__(self, in_shape: Size, out_shape: Size, depth: int = 0) -> None:
        super().__init__()
        self.size: tuple[int, ...] | None = None
        if len(in_shape) != len(out_shape) or len(in_shape) not in (2, 3, 4, 5):
            raise ValueError(
                f"Expected two feature tensors of the same kind, (B, D), (B, N, D), (B, C, H, W) "
                f"or (B, C, T, H, W), got {tuple(in_shape)} and {tuple(out_shape)}: choose other "
                f"layers."
            )
        maps, volumes = len(in_shape) > 3, len(in_shape) == 5
        convolution = nn.Conv3d if volumes else nn.Conv2d
        norm = nn.BatchNorm3d if volumes else nn.BatchNorm2d
        if maps:
            self.size = tuple(out_shape[2:])
        elif in_shape[1:-1] != out_shape[1:-1]:
            raise ValueError(
                f"Expected sequences of one length, got {in_shape[1]} and {out_shape[1]} tokens."
            )
        width, wanted = (in_shape[1], out_shape[1]) if maps else (in_shape[-1], out_shape[-1])
        # BatchNorm of 1x1 maps cannot take a batch of one sample, as the last batch may be
        spread = maps and set(out_shape[2:]) != {1}
        layers: list[nn.Module] = []
        for index in range(depth or 1):
            inputs = wanted if index else width
            if index:
                layers += [norm(wanted), nn.ReLU()] if spread else [nn.ReLU()]
            if not maps:
                layers.append(nn.Linear(inputs, wanted))
            elif depth:
                layers.append(convolution(inputs, wanted, 3, padding=1, bias=index == depth - 1))
            elif spread:
                layers += [convolution(inputs, wanted, 1, bias=False), norm(wanted)]
            else:
                layers.append(convolution(inputs, wanted, 1))
        self.map: nn.Module = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Map features, shape (B, ...), to ``out_shape``."""
        if self.size is not None and tuple(features.shape[2:]) != self.size:
            larger = all(n >= m for n, m in zip(features.shape[2:], self.size, strict=True))
            if larger:
                pool: Any = F.adaptive_avg_pool3d if features.dim() == 5 else F.adaptive_avg_pool2d
                features = pool(features, self.size)
            else:
                mode = "trilinear" if features.dim() == 5 else "bilinear"
                features = F.interpolate(features, size=self.size, mode=mode, align_corners=False)
        mapped: Tensor = self.map(features)
        return mapped
