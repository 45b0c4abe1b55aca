from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_kd.adapters import Tap
from lightning_kd.functional import hard
from lightning_kd.knowledge import Ensemble, Knowledge
from lightning_kd.losses import DistillationLoss
from lightning_kd.losses.base import by_name
from lightning_kd.modules.base import Distiller, cut_prefix
from lightning_kd.modules.dry_run import ask, check_classes, training_images
from lightning_kd.modules.lessons import lesson, refuse_shared_weights
from lightning_kd.modules.measure import make_metrics, update_metrics
from lightning_kd.teachers import Teacher
from lightning_kd.weighting import Uniform, Weighting


class OneStudent(Distiller):
    """One student and any number of teachers: ask the teachers, compute named losses.

    Subclass a paradigm and override one of these:

    - ``unpack(batch)``: the only line that knows the batch layout;
    - ``teach(x, indices, logits)``: how teachers are asked;
    - ``learn(x)``: the student's answer;
    - ``step(x, target)``: the named, weighted terms of the loss.
    """

    student: nn.Module
    teachers: nn.ModuleList
    losses: nn.ModuleDict
    weighting: Weighting

    def take(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module] = (),
        losses: Sequence[DistillationLoss] = (),
        weighting: Weighting | None = None,
        task_weight: float = 1.0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "epoch",
        num_classes: int | None = None,
    ) -> None:
        """Take over the parts; call it once, straight from a paradigm's ``__init__``.

        Raises:
            TypeError: If a part is not what its place needs.
            ValueError: If student and teachers share weights, or an option is out of range.
        """
        frame = inspect.currentframe()
        assert frame is not None
        for name, part in (("teachers", teachers), ("losses", losses)):
            if not isinstance(part, (list, tuple, nn.ModuleList)):
                raise TypeError(f"Expected a list of {name}, got {type(part).__name__}.")
        for name, value, kind in (
            ("student", [student], nn.Module),
            ("teachers", teachers, nn.Module),
            ("losses", losses, DistillationLoss),
            ("weighting", [weighting or Uniform()], Weighting),
        ):
            for item in value:
                if not isinstance(item, kind):
                    raise TypeError(
                        f"Expected {name} of type {kind.__name__}, got {type(item).__name__}."
                    )
        self.assemble(
            frame.f_back,
            task_weight,
            label_smoothing,
            optimizer,
            scheduler,
            scheduler_interval,
            num_classes,
        )
        self.student = student.train()  # of ``pretrained`` it is in eval mode, and stays so
        if len({id(t) for t in teachers}) < len(teachers) and any(
            isinstance(t, Teacher) for t in teachers
        ):
            raise ValueError(
                "Expected each Teacher once, got one twice: wrap its network anew in each place."
            )
        self.teachers = nn.ModuleList(t if isinstance(t, Teacher) else Teacher(t) for t in teachers)
        refuse_shared_weights([student], self._teachers())
        self.losses = nn.ModuleDict(by_name(losses))
        self.weighting = weighting or Uniform()
        self._student_tap: Tap | None = None
        self._trust: tuple[Sequence[int], Tensor] | None = None

    # ------------------------------------------------------------------ what a subclass overrides

    def teach(self, x: Tensor, indices: Sequence[int], logits: bool = True) -> list[Knowledge]:
        """Ask the teachers of these indices; nothing is differentiated.

        Without ``logits`` they run only as far as somebody reads them.
        """
        with torch.no_grad():  # here, not inside Teacher: other paradigms need the gradient
            return [self.teachers[m](x, logits) for m in indices]

    def learn(self, x: Tensor) -> Knowledge:
        """Ask the student."""
        if self._student_tap is None:
            raise RuntimeError(
                "The student was not prepared: Trainer does it, or call prepare(images) by hand."
            )
        return self._student_tap(x)

    def step(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss by name, each a scalar."""
        indices: Sequence[int] = ()
        members: list[Knowledge] = []
        if self.losses:
            indices = tuple(self.weighting.active(self.voices))
            readers = (*self._losses(), self.weighting)
            members = self.teach(x, indices, any(part.reads_logits for part in readers))
            for each in self._losses():
                each.before(members, indices)
        student = self.learn(x)
        terms = {}
        if target is not None and self.task_weight:
            terms["task"] = self.task_weight * self.task_loss(student.logits, target)
        if members:
            losses = dict(zip(self.losses, self._losses(), strict=True))
            more, weights = lesson(student, members, indices, losses, self.weighting, hard(target))
            self._trust = (indices, weights.detach())
            terms |= more
        if len(indices) < self.voices and self.losses:
            # DDP and optimizers see every adapter each step, whoever was asked
            rest = [p.sum() for p in self.losses.parameters() if p.requires_grad]
            rest.append(student.logits.sum())
            first = next(iter(self.losses))
            terms[first] = terms.get(first, 0.0) + 0.0 * torch.stack(rest).sum()
        return terms

    # ------------------------------------------------------------------ parts

    def forward(self, x: Tensor) -> Tensor:
        """Student's logits for images (B, C, H, W)."""
        return Knowledge.of(self.student(x)).logits

    @property
    def voices(self) -> int:
        """How many answers there are to learn from."""
        return len(self.teachers)

    @property
    def prepared(self) -> bool:
        """Whether the dry run has been made."""
        return self._student_tap is not None

    def trained(self) -> Sequence[nn.Module]:
        """Student, adapters and gates."""
        return (self.student, self.losses, self.weighting)

    def learners(self) -> dict[str, nn.Module]:
        """The student."""
        return {"student": self.student}

    def learner_state(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The student's weights."""
        return cut_prefix(state, "student.")

    def learner_config(self, name: str) -> Any:
        """The student's configuration."""
        return dict(self.hparams).get("student")

    def prepare(self, x: Tensor) -> None:
        """Size adapters and metrics from a dry run on images (B, C, H, W); once.

        Raises:
            ValueError: If a network cannot take these images, a layer does not exist, or the
                numbers of classes differ.
        """
        if self._student_tap is not None:
            return
        parts: list[DistillationLoss | Weighting] = [*self._losses(), self.weighting]
        tap = Tap(self.student, [layer for part in parts for layer in part.student_layers()])
        student = ask("the student", self.student, tap, x)
        teachers = self.meet(parts, x)
        check_classes(student, teachers, self.num_classes)
        partial = any(bool((t.logits == -torch.inf).any()) for t in teachers)
        for loss in self._losses():
            if partial and not loss.takes_unknown_classes:
                raise ValueError(
                    f"Expected teachers that know all classes with {type(loss).__name__}, got one "
                    f"that knows some only: use SubsetTarget, or leave it out."
                )
        self.weighting.active(self.voices)  # a wrong number of weights is told now
        for part in parts:
            part.build(student, teachers)
            part.to(x.device)
        self._find_layers()
        self.input_shape = tuple(x.shape[1:])
        classes = student.logits.shape[1]
        self.metrics = nn.ModuleDict(
            {stage: make_metrics(classes, len(teachers), stage) for stage in ("val", "test")}
        )
        self._student_tap = tap

    def meet(self, parts: Sequence[DistillationLoss | Weighting], x: Tensor) -> list[Knowledge]:
        """Listen to the layers that these parts read, and ask every teacher about one batch."""
        said = []
        for index, teacher in enumerate(self._teachers()):
            teacher.listen([n for part in parts for n in part.teacher_layers(index)])
            said.append(ask(f"teacher {index}", teacher.network, teacher, x))
        return said

    def _find_layers(self) -> None:
        if self._student_tap is not None:
            self._student_tap.hook()
        for loss in self._losses():
            loss.attach(self.student, self.networks())

    def networks(self) -> list[nn.Module]:
        """The network behind each answer."""
        return [teacher.network for teacher in self._teachers()]

    def _teachers(self) -> Iterator[Teacher]:
        for teacher in self.teachers:
            assert isinstance(teacher, Teacher)
            yield teacher

    def _losses(self) -> Iterator[DistillationLoss]:
        for loss in self.losses.values():
            assert isinstance(loss, DistillationLoss)
            yield loss

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Dry run on the shape of the data, before the optimizer is made."""
        super().setup(stage)
        self._find_layers()  # a fit with sync_batchnorm puts plain layers back

    def beside(self) -> dict[str, Tensor]:
        """Mean trust in each teacher, where it changes."""
        found, self._trust = self._trust, None
        if found is None or not self.weighting.varies:
            return {}
        indices, weights = found
        shares = (weights.mean(1) if weights.dim() == 2 else weights).unbind()
        # who was not asked counted for nothing
        logged = {f"trust_{m}": weights.new_zeros(()) for m in range(self.voices)}
        return logged | {f"trust_{m}": w for m, w in zip(indices, shares, strict=True)}

    def evaluate(self, batch: Any, stage: str) -> None:
        """Measure student, teachers and their agreement."""
        x, target = self.unpack(batch)
        metrics = self.metrics[stage]
        assert isinstance(metrics, MetricCollection)
        student = self.learn(x)
        members: list[Knowledge] = []
        answer = None
        if self.teachers:
            members = self.teach(x, range(self.voices))
            indices = tuple(self.weighting.active(len(members)))
            asked = [members[m] for m in indices]
            # without labels: an answer that was weighed by the right one would be no measurement
            weights = self.weighting(asked, student, None)
            answer = Ensemble(asked, weights, self.weighting.space, indices).log_probabilities()
        if self.trainer.sanity_checking:
            return  # its batches come again in the first epoch and must not count twice
        update_metrics(metrics, student.logits, target, members, answer)
        if target is not None and stage == "val" and self.trainer.state.fn == "fit":
            self.weighting.observe(student, members, target)
        self.log_metrics(metrics, f"{stage}/accuracy")

    def on_validation_epoch_end(self) -> None:
        """Let the weighting learn from what a validation inside a fit showed."""
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.weighting.update()

    def on_fit_start(self) -> None:
        """Find layers again, and let the weighting look at the data."""
        super().on_fit_start()
        self._find_layers()  # sync_batchnorm replaces layers after the dry run
        if self.weighting.wants_images:
            with torch.no_grad():
                images = [x.to(self.device) for x in training_images(self, self.unpack)]
                self.weighting.calibrate(images, self.networks())
