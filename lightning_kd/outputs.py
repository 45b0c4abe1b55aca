from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_kd.functional import combine_teachers


@dataclass(frozen=True)
class NetworkOutput:
    """What one network returned for one batch.

    Args:
        logits: Shape (B, K, ...).
        features: Layer name to its output, shape (B, ...).
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, output: Any, features: dict[str, Tensor] | None = None) -> NetworkOutput:
        """Read a network's output: a tensor, a mapping or an object with ``logits`` (or ``out``).

        Raises:
            TypeError: If no logits can be found in ``output``.
        """
        if not isinstance(output, Tensor):
            for key in ("logits", "out"):
                named = (
                    output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
                )
                if isinstance(named, Tensor):
                    output = named
                    break
            else:
                raise TypeError(
                    f"Expected a network to return logits as a tensor, or as `logits` or `out` of "
                    f"a mapping or object, got {type(output).__name__}: wrap the network."
                )
        return cls(output, features or {})

    def feature(self, layer: str) -> Tensor:
        """Output of ``layer``, shape (B, ...).

        Raises:
            KeyError: If that layer was not recorded.
        """
        if layer not in self.features:
            raise KeyError(
                f"Layer {layer!r} was not recorded, only {sorted(self.features)}: name it in the "
                f"loss's student_layers() or teacher_layers()."
            )
        return self.features[layer]

    def detach(self) -> NetworkOutput:
        """The same output without gradient."""
        features = {layer: feature.detach() for layer, feature in self.features.items()}
        return NetworkOutput(self.logits.detach(), features)


@dataclass(frozen=True)
class TeacherOutputs:
    """What several teachers returned for one batch, and how much each is trusted.

    Args:
        outputs: Output of each teacher that ran.
        weights: Trust, shape (M,) or (M, B), summing to 1 over M.
        space: ``"probability"`` or ``"logit"``: the space in which outputs are averaged.
        indices: Position of each teacher that ran in the list of teachers; empty: all ran.
    """

    outputs: Sequence[NetworkOutput]
    weights: Tensor
    space: str = "probability"
    indices: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Fill in the default: all teachers ran."""
        if not self.indices:
            object.__setattr__(self, "indices", tuple(range(len(self.outputs))))

    @classmethod
    def uniform(
        cls,
        outputs: Sequence[NetworkOutput],
        space: str = "probability",
        indices: Sequence[int] = (),
    ) -> TeacherOutputs:
        """Teachers that are all trusted equally."""
        count = len(outputs)
        weights = torch.full((count,), 1 / count, device=outputs[0].logits.device)
        return cls(outputs, weights, space, indices)

    def log_probabilities(self, temperature: float = 1.0) -> Tensor:
        """Weighted mean output at a temperature, as log-probabilities, shape (B, K, ...)."""
        if len(self.outputs) == 1:  # the weights sum to 1, so there is nothing to average
            return combine_teachers(
                self.outputs[0].logits[None], self.weights.new_ones(1), temperature, "logit"
            )
        logits = torch.stack([output.logits for output in self.outputs])
        return combine_teachers(logits, self.weights, temperature, self.space)

    def average(self, values: Sequence[Tensor]) -> Tensor:
        """Weighted mean over teachers, then mean over the batch.

        Args:
            values: For each teacher one per-sample tensor (B,), or a scalar of the whole batch.

        Returns:
            A scalar.
        """
        stacked = torch.stack(list(values))
        weights = self.weights.to(stacked)
        if stacked.dim() == 1:  # one per batch: each teacher's mean weight in it
            with torch.autocast(stacked.device.type, enabled=False):  # losses are float32
                return (weights.flatten(1).mean(1) if weights.dim() == 2 else weights) @ stacked
        return ((weights if weights.dim() == 2 else weights[:, None]) * stacked).sum(0).mean()
