from __future__ import annotations

import torch.nn.functional as F
from torch import Size, Tensor, nn


class Projection(nn.Module):
    """Learned map from a student's feature shape to a teacher's.

    Feature maps are resized (average pooling down, bilinear up), then pass a 1x1 convolution and
    BatchNorm; flat features (B, D) and token sequences (B, N, D) pass a linear layer.

    Args:
        student: Shape of the student's features, batch first.
        teacher: Shape of the teacher's features, batch first.

    Raises:
        ValueError: If the two cannot be mapped to each other.

    Source:
        Romero et al. (FitNets), https://arxiv.org/abs/1412.6550, section 2.2. Differs from the
        paper: resizing instead of unpadded convolutions, so that any two resolutions fit; no
        ReLU, so that features from before an activation can be matched too.
    """

    def __init__(self, student: Size, teacher: Size) -> None:
        super().__init__()
        self.size: tuple[int, int] | None = None
        self.map: nn.Module
        if len(student) != len(teacher) or len(student) not in (2, 3, 4):
            raise ValueError(
                f"Expected two feature tensors of the same kind, (B, D), (B, N, D) or "
                f"(B, C, H, W), got {tuple(student)} and {tuple(teacher)}: choose other layers."
            )
        if len(student) == 4:
            self.size = (teacher[2], teacher[3])
            self.map = nn.Sequential(
                nn.Conv2d(student[1], teacher[1], 1, bias=False), nn.BatchNorm2d(teacher[1])
            )
        else:
            if student[1:-1] != teacher[1:-1]:
                raise ValueError(
                    f"Expected sequences of one length, got {student[1]} and {teacher[1]} tokens."
                )
            self.map = nn.Linear(student[-1], teacher[-1])

    def forward(self, features: Tensor) -> Tensor:
        """Map student features, shape (B, ...), to the teacher's shape."""
        if self.size is not None and tuple(features.shape[2:]) != self.size:
            if features.shape[2] >= self.size[0] and features.shape[3] >= self.size[1]:
                features = F.adaptive_avg_pool2d(features, self.size)
            else:
                features = F.interpolate(
                    features, size=self.size, mode="bilinear", align_corners=False
                )
        mapped: Tensor = self.map(features)
        return mapped
