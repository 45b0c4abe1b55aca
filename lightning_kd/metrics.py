"""What is measured of a student with its teachers and of a cohort, as their task defines it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.tasks import Task
from lightning_kd.weighting import Weighting

if TYPE_CHECKING:
    from torchmetrics import Metric


def student_metrics(task: Task, example: NetworkOutput, num_teachers: int) -> dict[str, Metric]:
    """Metrics of a student; with teachers, the watched one of theirs and the agreement.

    Args:
        task: Of the networks.
        example: An output of the student.
        num_teachers: How many teachers there are.
    """
    metrics = task.metrics(example)
    if num_teachers:
        metrics["agreement"] = task.agreement(example)
        names = ["ensemble", *(f"teacher_{m}" for m in range(num_teachers))]
        metrics |= {f"{n}/{task.watched}": task.metrics(example)[task.watched] for n in names}
    return metrics


def teacher_ensemble(
    task: Task, weighting: Weighting, student: NetworkOutput, teachers: Sequence[NetworkOutput]
) -> NetworkOutput | None:
    """The teachers' mean output as the weighting trusts them; None: there are no teachers."""
    if not teachers:
        return None
    indices = tuple(weighting.active(len(teachers)))
    asked = [teachers[m] for m in indices]
    # without labels: an ensemble that is weighed by the right answer measures nothing
    trust = weighting(student, asked, None)
    return task.ensemble(TeacherOutputs(asked, trust, weighting.space, indices))


def update_student_metrics(
    task: Task,
    metrics: Mapping[str, Metric],
    student: NetworkOutput,
    teachers: Sequence[NetworkOutput],
    ensemble: NetworkOutput | None,
    target: Tensor | None,
) -> None:
    """Add one batch to ``student_metrics``.

    Args:
        task: Of the networks.
        metrics: Of ``student_metrics``.
        student: The student's output.
        teachers: Output of each teacher.
        ensemble: The teachers' mean output; None: there are no teachers.
        target: Labels (B, ...), -1 where unlabelled; None: only the agreement is measured.
    """
    if ensemble is not None:
        task.update_agreement(metrics["agreement"], student, ensemble)
    if target is None:
        return
    own = {name: m for name, m in metrics.items() if "/" not in name and name != "agreement"}
    task.update(own, student, target)
    named = {f"teacher_{m}": output for m, output in enumerate(teachers)}
    for name, output in ({} if ensemble is None else {**named, "ensemble": ensemble}).items():
        task.update({task.watched: metrics[f"{name}/{task.watched}"]}, output, target)


def cohort_metrics(task: Task, example: NetworkOutput, names: Sequence[str]) -> dict[str, Metric]:
    """Metrics of a cohort's ensemble, the watched one of each peer, the agreement of each pair.

    Args:
        task: Of the networks.
        example: An output of a peer.
        names: Of the peers.
    """
    metrics = {n if n == "loss" else f"ensemble/{n}": m for n, m in task.metrics(example).items()}
    metrics |= {f"{name}/{task.watched}": task.metrics(example)[task.watched] for name in names}
    pairs = combinations(range(len(names)), 2)
    return metrics | {f"agreement_{j}_{k}": task.agreement(example) for j, k in pairs}


def update_cohort_metrics(
    task: Task,
    metrics: Mapping[str, Metric],
    peers: Mapping[str, NetworkOutput],
    answer: NetworkOutput,
    target: Tensor | None,
) -> None:
    """Add one batch to ``cohort_metrics``.

    Args:
        task: Of the networks.
        metrics: Of ``cohort_metrics``.
        peers: Output of each peer by its name.
        answer: The cohort's output as an ensemble.
        target: Labels (B, ...), -1 where unlabelled; None: only the agreement is measured.
    """
    for (j, one), (k, other) in combinations(enumerate(peers.values()), 2):
        task.update_agreement(metrics[f"agreement_{j}_{k}"], one, other)
    if target is None:
        return
    own = {
        name.removeprefix("ensemble/"): metric
        for name, metric in metrics.items()
        if name == "loss" or name.startswith("ensemble/")
    }
    task.update(own, answer, target)
    for name, peer in peers.items():
        task.update({task.watched: metrics[f"{name}/{task.watched}"]}, peer, target)
