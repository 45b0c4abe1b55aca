from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_kd.features import find_layer
from lightning_kd.utils.seeds import drawn_globally


class Targets(ABC):
    """What the teacher is meant to predict for the images of a round."""

    def attach(self, teacher: nn.Module) -> None:  # noqa: B027
        """Inspect the teacher's weights; called once, before training."""

    @abstractmethod
    def sample(self, count: int, num_classes: int, random: torch.Generator) -> Tensor | None:
        """Labels (B,) or probabilities (B, K); ``None``: what it predicts anyway."""


class RandomLabels(Targets):
    """A class for each image, drawn with equal probabilities."""

    def sample(self, count: int, num_classes: int, random: torch.Generator) -> Tensor:
        """See ``Targets``."""
        return torch.randint(num_classes, (count,), generator=random, device=random.device)


class TeacherLabels(Targets):
    """The class that the teacher predicts, to make it more confident (DAFL)."""

    def sample(self, count: int, num_classes: int, random: torch.Generator) -> None:
        """See ``Targets``."""
        return


class SoftTransferTargets(Targets):
    r"""Soft targets drawn from a model of the output of a layer of the teacher.

    .. math:: f = \mu + \sigma \hat W \epsilon, \quad \epsilon \sim N(0, I), \quad
        y = \mathrm{softmax}(rest(f))

    :math:`\hat W` has the layer's weights with rows of length 1, so that units with similar weights
    have similar outputs: the covariance is :math:`\sigma^2` times the cosines of the rows.

    Args:
        layer: Dotted name of a linear layer of the teacher: the classifier, or one before it.
        rest: Dotted names of the layers that follow it, in order.
        sigma: Standard deviation of each unit, > 0; 1.5 to 2 as published.
        mean: Mean of each unit.

    Raises:
        ValueError: If ``sigma`` is not positive, or the layer is not linear.

    Source:
        Wang 2021, "Data-free knowledge distillation with soft targeted transfer set synthesis",
        AAAI, https://arxiv.org/abs/2104.04868. No code was released; the mean is left open there.
    """

    def __init__(
        self, layer: str, rest: Sequence[str] = (), sigma: float = 2.0, mean: float = 0.0
    ) -> None:
        if sigma <= 0:
            raise ValueError(f"Expected sigma > 0, got {sigma}.")
        self.layer, self.rest_names, self.sigma, self.mean = layer, list(rest), sigma, mean
        self._layer: nn.Linear | None = None
        self._rest: list[nn.Module] = []

    def attach(self, teacher: nn.Module) -> None:
        """Find the layers."""
        self._layer = _linear(teacher, self.layer)
        self._rest = [find_layer(teacher, name) for name in self.rest_names]

    @torch.no_grad()
    def sample(self, count: int, num_classes: int, random: torch.Generator) -> Tensor:
        """See ``Targets``."""
        assert self._layer is not None
        rows = F.normalize(self._layer.weight.float(), dim=1)
        noise = torch.randn(count, rows.shape[1], generator=random, device=random.device)
        output = self.mean + self.sigma * noise @ rows.T
        for layer in self._rest:
            output = layer(output)
        return output.softmax(1)


class DirichletTargets(Targets):
    """Soft targets that are similar if their classes are (zero-shot distillation).

    Each image gets a class, and its target is drawn from a Dirichlet distribution whose parameters
    are the class's similarities to all classes: cosines of the classifier's rows, scaled to [0, 1].

    Args:
        layer: Dotted name of the teacher's linear classifier.
        scales: Multipliers of the similarities, one drawn per image; large ones give even targets.

    Raises:
        ValueError: If a scale is not positive, or the layer is not linear.

    Source:
        Nayak et al. 2019 (ZSKD), https://arxiv.org/abs/1905.08114, section 3.2. Differs from the
        authors' code, which scales twice, so that its small multiplier has no effect.
    """

    def __init__(self, layer: str, scales: Sequence[float] = (1.0, 0.1)) -> None:
        if not scales or min(scales) <= 0:
            raise ValueError(f"Expected scales > 0, got {list(scales)}.")
        self.layer, self.scales = layer, list(scales)
        self._layer: nn.Linear | None = None

    def attach(self, teacher: nn.Module) -> None:
        """Find the classifier."""
        self._layer = _linear(teacher, self.layer)

    @torch.no_grad()
    def sample(self, count: int, num_classes: int, random: torch.Generator) -> Tensor:
        """See ``Targets``."""
        assert self._layer is not None
        rows = F.normalize(self._layer.weight.float().cpu(), dim=1)
        alike = rows @ rows.T
        low, high = alike.amin(1, keepdim=True), alike.amax(1, keepdim=True)
        alike = (alike - low) / (high - low).clamp(min=1e-12)
        with drawn_globally(random):  # the distribution takes no generator
            classes = torch.randint(num_classes, (count,))
            scales = torch.tensor(self.scales)[torch.randint(len(self.scales), (count, 1))]
            drawn = torch.distributions.Dirichlet(scales * alike[classes] + 1e-4).sample()
        return drawn.to(random.device)


def _linear(teacher: nn.Module, name: str) -> nn.Linear:
    layer = find_layer(teacher, name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"Expected layer {name!r} to be linear, got {type(layer).__name__}.")
    return layer
