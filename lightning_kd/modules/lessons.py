"""What trained teachers add to the loss of whoever learns from them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.knowledge import Ensemble, Knowledge
from lightning_kd.losses import DistillationLoss
from lightning_kd.losses.base import by_name
from lightning_kd.modules.dry_run import ask, check_classes
from lightning_kd.teachers import Teacher
from lightning_kd.weighting import Weighting


def lesson(
    student: Knowledge,
    members: Sequence[Knowledge],
    indices: Sequence[int],
    losses: Mapping[str, DistillationLoss],
    weighting: Weighting,
    target: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Weigh the teachers and compute the weighted losses of one student.

    Args:
        student: What the student says.
        members: What the teachers of these ``indices`` say.
        indices: Which teachers were asked.
        losses: Distillation losses by name.
        weighting: How far each teacher is trusted.
        target: Labels (B, ...), -1 where unlabelled, or None.

    Returns:
        Weighted terms by name, each a scalar, and the trust in each teacher, (M,) or (M, B).
    """
    weights = weighting(members, student, target)
    _check(weights, weighting, len(members), len(student.logits))
    teachers = Ensemble(members, weights, weighting.space, indices)
    terms: dict[str, Tensor] = {}
    if weights.requires_grad:  # not every loss asks for them, and DDP wants a gradient
        terms["gate"] = 0.0 * weights.sum()
    for name, loss in losses.items():
        terms[name] = loss.weight * weighting.strength * loss(student, teachers, target)
    gate = weighting.loss(teachers, target)
    if gate is not None:
        terms["gate"] = gate
    return terms, weights


def _check(weights: Any, weighting: Weighting, count: int, batch: int) -> None:
    """Look at the shape always, at the values once: that waits for the device."""
    name = type(weighting).__name__
    if not isinstance(weights, Tensor) or weights.shape not in ((count,), (count, batch)):
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"Expected {name} to return weights of shape ({count},) or ({count}, {batch}), one "
            f"row a teacher, got {got}."
        )
    if getattr(weighting, "_was_checked", False):
        return
    weighting._was_checked = True  # type: ignore[assignment]
    total = weights.detach().float().sum(0)
    if not bool((weights >= 0).all() & ((total - 1).abs() < 1e-2).all()):
        raise ValueError(
            f"Expected {name} to return weights >= 0 that sum to 1 over the teachers, got a "
            f"sum of {float(total.flatten()[0]):.3g} and a least weight of "
            f"{float(weights.min()):.3g}."
        )


def refuse_shared_weights(students: Iterable[nn.Module], teachers: Iterable[Teacher]) -> None:
    """Raise ``ValueError`` if a teacher, which stays as it is, has weights of a student."""
    mine = {p.data_ptr() for student in students for p in student.parameters()} - {0}  # empty ones
    for index, teacher in enumerate(teachers):
        if any(p.data_ptr() in mine for p in teacher.network.parameters()):
            raise ValueError(
                f"Expected student and teacher {index} to be separate networks, got shared "
                f"weights: give one of them as copy.deepcopy(network)."
            )


class Lessons(nn.Module):
    """Trained teachers that every peer of a cohort learns from, beside its peers.

    Args:
        teachers: Frozen networks of the peers' classes.
        losses: What is transferred; each peer gets its own copy.
        weighting: How far each teacher is trusted; each peer judges by its own copy.
        peers: Networks that learn, one entry for each branch.

    Raises:
        ValueError: If a peer and a teacher share weights, or the weighting looks at images or
            validation answers by itself.
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module],
        losses: Sequence[DistillationLoss],
        weighting: Weighting,
        peers: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        if weighting.wants_images or type(weighting).observe is not Weighting.observe:
            raise ValueError(
                f"Expected a weighting that judges by the batch alone for the teachers of a "
                f"cohort, such as Uniform or Confidence, got {type(weighting).__name__}."
            )
        self.teachers = nn.ModuleList(t if isinstance(t, Teacher) else Teacher(t) for t in teachers)
        self.losses = nn.ModuleList(
            nn.ModuleDict(by_name(copy.deepcopy(list(losses)))) for _ in peers
        )
        self.weightings = nn.ModuleList(copy.deepcopy(weighting) for _ in peers)

    def student_layers(self) -> list[str]:
        """Layers of every peer that are read."""
        return [layer for part in self._parts(0) for layer in part.student_layers()]

    def build(self, peers: Sequence[Knowledge], x: Tensor) -> None:
        """Listen to the teachers and size adapters from a dry run on images (B, C, H, W).

        Raises:
            ValueError: If a teacher cannot take these images, or has other classes.
        """
        if not self.teachers:
            return
        said = []
        for index, teacher in enumerate(self.all_teachers()):
            teacher.listen([n for part in self._parts(0) for n in part.teacher_layers(index)])
            said.append(ask(f"teacher {index}", teacher.network, teacher, x))
        for k, peer in enumerate(peers):
            check_classes(peer, said, None)
            for part in self._parts(k):
                part.build(peer, said)
        self.to(x.device)

    def attach(self, peers: Sequence[nn.Module]) -> None:
        """Let losses reach into the networks."""
        for k, peer in enumerate(peers):
            for loss in self._losses(k).values():
                loss.attach(peer, [teacher.network for teacher in self.all_teachers()])

    @torch.no_grad()
    def ask(self, views: Sequence[Tensor]) -> list[dict[int, Knowledge]]:
        """What teachers say of what each peer sees, by teacher; nobody is asked twice the same."""
        answers: dict[tuple[int, int], Knowledge] = {}
        said: list[dict[int, Knowledge]] = []
        for k, x in enumerate(views):
            mine: dict[int, Knowledge] = {}
            for m in self._weighting(k).active(len(self.teachers)):
                if (m, id(x)) not in answers:
                    answers[m, id(x)] = self.teachers[m](x)
                mine[m] = answers[m, id(x)]
            for loss in self._losses(k).values():
                loss.before(list(mine.values()), tuple(mine))
            said.append(mine)
        return said

    def terms(
        self, k: int, peer: Knowledge, said: dict[int, Knowledge], target: Tensor | None
    ) -> dict[str, Tensor]:
        """Weighted terms of peer ``k`` by name, each a scalar."""
        members, losses = list(said.values()), self._losses(k)
        return lesson(peer, members, tuple(said), losses, self._weighting(k), target)[0]

    def all_teachers(self) -> list[Teacher]:
        """Whom the peers learn from."""
        return [teacher for teacher in self.teachers if isinstance(teacher, Teacher)]

    def _losses(self, k: int) -> dict[str, DistillationLoss]:
        losses = self.losses[k]
        assert isinstance(losses, nn.ModuleDict)
        return {n: loss for n, loss in losses.items() if isinstance(loss, DistillationLoss)}

    def _weighting(self, k: int) -> Weighting:
        weighting = self.weightings[k]
        assert isinstance(weighting, Weighting)
        return weighting

    def _parts(self, k: int) -> list[DistillationLoss | Weighting]:
        return [*self._losses(k).values(), self._weighting(k)]
