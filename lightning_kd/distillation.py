"""The core: a student, its teachers, and the losses between them. It knows no Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_kd.base_distillation import BaseDistillation, cut_prefix
from lightning_kd.features import Tap, dry_run, ready_to_train
from lightning_kd.losses import DistillationLoss, SoftTarget, losses_by_name
from lightning_kd.losses.base import losses_of, refuse_unknown_classes
from lightning_kd.metrics import student_metrics, teacher_ensemble, update_student_metrics
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.tasks import Classification, Task
from lightning_kd.teachers import StochasticDepth, TeacherEnsemble
from lightning_kd.utils.checks import check_type
from lightning_kd.weighting import Uniform, Weighting
from lightning_kd.weighting.base import check_weights

if TYPE_CHECKING:
    from torchmetrics import Metric

Losses = Mapping[str, DistillationLoss] | Sequence[DistillationLoss]


class Distillation(BaseDistillation):
    r"""One student learns from labels and from any number of frozen teachers.

    .. math:: w_{task} L_{task}(z^S, y) + \sum_i w_i L_i(student, teachers)

    Args:
        student: The network to train.
        teachers: Trained networks, which are never modified; a single one needs no list.
        losses: What is transferred, each with its weight; as a mapping, under the names that are
            given. ``None``: ``SoftTarget`` at temperature 4, weight 0.9, if there is a teacher.
        weighting: How far each teacher is trusted; ``None``: all alike.
        task: What the networks are trained for; ``None``: ``Classification``.
        task_weight: Multiplier of the task loss; labels of -1 are left out.
        stochastic_depth: Leave out blocks of the student at random in training.

    Raises:
        TypeError: If a part is not what its place needs.
        ValueError: If student and teachers share weights.

    Source:
        Hinton et al. 2015, https://arxiv.org/abs/1503.02531; You et al., KDD 2017.

    Example:
        >>> from torch import nn
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> losses = Distillation(student, teacher)(torch.zeros(2, 4), torch.tensor([0, 2]))
        >>> sorted(losses)
        ['loss', 'output', 'soft_target', 'task']
    """

    def __init__(
        self,
        student: nn.Module | None,
        teachers: nn.Module | Sequence[nn.Module] = (),
        losses: Losses | None = None,
        weighting: Weighting | None = None,
        task: Task | None = None,
        task_weight: float = 0.1,
        stochastic_depth: StochasticDepth | None = None,
    ) -> None:
        super().__init__()
        ensemble = teachers if isinstance(teachers, TeacherEnsemble) else TeacherEnsemble(teachers)
        check_type(student, nn.Module, "student")
        check_type(weighting, Weighting, "weighting")
        check_type(task, Task, "task")
        if losses is None:
            losses = [SoftTarget(temperature=4.0, weight=0.9)] if len(ensemble) else []
        if losses and not len(ensemble):
            raise ValueError("Expected teachers with losses, got none: leave the losses out.")
        self.task, self.task_weight = task or Classification(), task_weight
        # None: a cohort's peers run elsewhere
        self.student = None if student is None else ready_to_train(student)
        self.losses = nn.ModuleDict(losses_by_name(losses))
        self.weighting = weighting or Uniform()
        self.wants_images = self.weighting.wants_images
        self.teachers, self.stochastic_depth = ensemble, stochastic_depth
        if student is not None:
            ensemble.refuse_weights_of([student])
        self.comparable = False  # whether teachers answer as the student does, and are measured
        self._tap: Tap | None = None
        self._trust: tuple[Sequence[int], Tensor] | None = None

    # ------------------------------------------------------------------ one batch

    def losses_and_output(
        self, x: Tensor, target: Tensor | None, teacher_logits: Tensor | None = None
    ) -> tuple[dict[str, Tensor], NetworkOutput]:
        """Weighted losses of a batch by name, each a scalar, and the student's output.

        Args:
            x: Images, shape (B, C, H, W).
            target: Labels (B, ...), -1 where unlabelled, or soft labels; None: none.
            teacher_logits: Of every teacher, (B, M, K), where they are cached; None: teachers run.
        """
        indices: Sequence[int] = ()
        teachers: list[NetworkOutput] = []
        if self.losses:
            indices = tuple(self.weighting.active(len(self.teachers)))
            if teacher_logits is not None:
                teachers = [NetworkOutput(teacher_logits[:, m]) for m in indices]
            else:
                need_logits = any(part.reads_logits for part in self._parts())
                teachers = self.teacher_outputs(x, indices, need_logits)
            self.before_student(teachers, indices)
        try:
            student = self.student_output(x)
        finally:
            for loss in losses_of(self.losses).values():
                loss.after_student()
        losses = {}
        if target is not None and self.task_weight:
            losses["task"] = self.task_weight * self.task.mean_loss(student, target)
        if teachers:
            losses |= self.distillation_losses(student, teachers, indices, target)
        if len(indices) < len(self.teachers) and self.losses:
            # DDP and optimizers see every adapter each step, whichever teachers ran
            rest = [p.sum() for p in self.losses.parameters() if p.requires_grad]
            rest += [student.logits.float().sum()]
            first = next(iter(self.losses))
            losses[first] = losses.get(first, 0.0) + 0.0 * torch.stack(rest).sum()
        return losses, student

    def student_output(self, x: Tensor) -> NetworkOutput:
        """The student's output for images (B, C, H, W), with the features that are read."""
        if self._tap is None:
            raise RuntimeError("Expected a Trainer, or build(images), before the student is run.")
        if self.stochastic_depth is None or not self.training:
            return self._tap(x)
        with self.stochastic_depth.one_path():
            return self._tap(x)

    @torch.no_grad()  # here, not inside Teacher: data-free methods need the gradient
    def teacher_outputs(
        self, x: Tensor, indices: Sequence[int] | None = None, need_logits: bool = True
    ) -> list[NetworkOutput]:
        """Outputs of the teachers of these indices (None: all), without gradient.

        Without ``need_logits`` they run only as far as their layers are read.
        """
        outputs: list[NetworkOutput] = self.teachers(x, indices, need_logits)
        return outputs

    def before_student(self, teachers: Sequence[NetworkOutput], indices: Sequence[int]) -> None:
        """Pass outputs of the teachers of these indices to losses before the student runs."""
        for loss in losses_of(self.losses).values():
            loss.before_student(teachers, indices)

    def distillation_losses(
        self,
        student: NetworkOutput,
        teachers: Sequence[NetworkOutput],
        indices: Sequence[int],
        target: Tensor | None,
    ) -> dict[str, Tensor]:
        """Weigh the teachers, and compute the weighted distillation losses by name.

        Args:
            student: The student's output.
            teachers: Outputs of the teachers of these ``indices``.
            indices: Which teachers ran.
            target: Labels (B, ...), -1 where unlabelled, or soft labels; None: none.
        """
        target = self.task.hard_target(target)
        trust = self.weighting(student, teachers, target)
        check_weights(trust, self.weighting, len(teachers), len(student.logits))
        outputs = TeacherOutputs(teachers, trust, self.weighting.space, indices)
        losses: dict[str, Tensor] = {}
        if trust.requires_grad:  # not every loss uses it, and DDP wants a gradient
            losses["gate"] = 0.0 * trust.sum()
        for name, loss in losses_of(self.losses).items():
            losses[name] = loss.weight * self.weighting.strength * loss(student, outputs, target)
        gate = self.weighting.loss(outputs, target)
        losses |= {} if gate is None else {"gate": gate}
        self._trust = (indices, trust.detach())
        return losses

    def scalars(self) -> dict[str, Tensor]:
        """Mean trust in each teacher, where it changes."""
        found, self._trust = self._trust, None
        if found is None or not self.weighting.varies:
            return {}
        indices, trust = found
        shares = trust.mean(1) if trust.dim() == 2 else trust
        logged = {f"trust_{m}": trust.new_zeros(()) for m in range(len(self.teachers))}
        return logged | {f"trust_{m}": w for m, w in zip(indices, shares, strict=True)}

    # ------------------------------------------------------------------ sizes and layers

    def build(self, x: Tensor, num_classes: int | None = None) -> None:
        """Size adapters and gates by a dry run; see ``BaseDistillation.build``."""
        if self.built:
            return
        assert self.student is not None
        if self.stochastic_depth is not None:
            self.stochastic_depth.prepare(self.student, x[:1])
        tap = Tap(self.student, self.student_layers())
        student = dry_run("the student", self.student, tap, x)
        teachers = self.teachers.build(self.teacher_layers, x)
        read = any(part.reads_logits for part in self._parts())
        self.task.check({"the student": student}, teachers if read else (), num_classes)
        outputs = {(output.logits.shape[1:]) for output in (student, *teachers)}
        self.comparable = len(self.teachers) > 0 and len(outputs) == 1
        self.build_parts(student, teachers)
        self.example, self.input_shape, self._tap = student, tuple(x.shape[1:]), tap
        self.attach()

    def build_parts(self, student: NetworkOutput, teachers: Sequence[NetworkOutput]) -> None:
        """Size losses and weighting by outputs of a dry run, after a look at the teachers."""
        if len({teacher.logits.shape[1:] for teacher in teachers}) == 1:
            refuse_unknown_classes(losses_of(self.losses).values(), teachers, self.weighting.space)
        self.weighting.active(len(self.teachers))  # reports a wrong number of weights
        for part in self._parts():
            part.build(student, teachers)
            part.to(student.logits)
            part._sized = True

    def student_layers(self) -> list[str]:
        """Layers of the student that are read."""
        return [layer for part in self._parts() for layer in part.student_layers()]

    def teacher_layers(self, index: int) -> list[str]:
        """Layers of teacher ``index`` that are read."""
        return [layer for part in self._parts() for layer in part.teacher_layers(index)]

    def attach(self, student: nn.Module | None = None) -> None:
        """Find layers again where some were replaced; a cohort gives the peer that learns."""
        if self._tap is not None:
            self._tap.hook()
        student = student or self.student
        if student is not None:
            for loss in losses_of(self.losses).values():
                loss.attach(student, self.teachers.networks())

    def _parts(self) -> list[DistillationLoss | Weighting]:
        return [*losses_of(self.losses).values(), self.weighting]

    # ------------------------------------------------------------------ what is kept and measured

    def trainable_modules(self) -> list[nn.Module]:
        """Student, adapters and gates."""
        student = [] if self.student is None else [self.student]
        return [*student, self.losses, self.weighting]

    def exported_networks(self) -> dict[str, nn.Module]:
        """The student."""
        assert self.student is not None
        return {"student": self.student}

    def exported_state(self, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The student's weights."""
        return cut_prefix(state, "student.")

    def exported_config(self, name: str, options: Mapping[str, Any]) -> Any:
        """The student's configuration."""
        return options.get("student")

    def compilable_networks(self) -> list[nn.Module]:
        """The student."""
        depth = "a student with stochastic depth, whose path changes at each step"
        if why := (depth if self.stochastic_depth else self.teachers.why_not_compiled):
            raise ValueError(why)
        return super().compilable_networks()

    def output(self, x: Tensor) -> NetworkOutput:
        """The student's logits."""
        assert self.student is not None
        return NetworkOutput.read(self.student(x))

    def metrics(self) -> dict[str, Metric]:
        """Metrics of the student; with teachers, the watched one of theirs and the agreement."""
        return student_metrics(self.task, self.example, self.comparable * len(self.teachers))

    @torch.no_grad()
    def update_metrics(
        self, metrics: Mapping[str, Metric], x: Tensor, target: Tensor | None, observe: bool
    ) -> NetworkOutput:
        """Measure the student, its teachers and their agreement."""
        student = self.student_output(x)
        teachers = self.teacher_outputs(x) if self.comparable else []
        ensemble = teacher_ensemble(self.task, self.weighting, student, teachers)
        update_student_metrics(self.task, metrics, student, teachers, ensemble, target)
        if target is not None and observe:
            self.weighting.observe(student, teachers, target)
        return student

    def calibrate(self, images: Sequence[Tensor]) -> None:
        """Let the weighting look at batches of training images (B, C, H, W) once."""
        self.weighting.calibrate(images, self.teachers.networks())

    def after_validation(self) -> None:
        """Let the weighting learn from what it observed."""
        self.weighting.after_validation()
