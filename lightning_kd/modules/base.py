from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_kd.adapters import Tap
from lightning_kd.functional import task_cross_entropy
from lightning_kd.knowledge import Ensemble, Knowledge
from lightning_kd.losses import DistillationLoss
from lightning_kd.losses.base import by_name
from lightning_kd.modules.allocator import keep_freed_memory
from lightning_kd.modules.dry_run import ask, check_classes, example_input, training_images
from lightning_kd.modules.finite import FiniteWatch
from lightning_kd.modules.measure import make_metrics, update_metrics
from lightning_kd.modules.options import remember_options
from lightning_kd.modules.rng import rng_state, set_rng_state
from lightning_kd.ranks import mean_over_labelled
from lightning_kd.teachers import Teacher
from lightning_kd.weighting import Uniform, Weighting

Scheduler = torch.optim.lr_scheduler.LRScheduler | ReduceLROnPlateau


class Distiller(LightningModule):
    """Base of all paradigms: unpack a batch, ask the teachers, compute named losses.

    Subclass a paradigm and override one of these:

    - ``unpack(batch)``: the only line that knows the batch layout;
    - ``teach(x, indices)``: how teachers are asked;
    - ``learn(x)``: the student's answer;
    - ``step(x, target)``: the named, weighted terms of the loss.

    It has no ``__init__``, since ``load_from_checkpoint`` filters arguments by the signature of the
    class; a paradigm's calls ``assemble``.
    """

    student: nn.Module
    teachers: nn.ModuleList
    losses: nn.ModuleDict
    weighting: Weighting
    num_classes: int | None

    def assemble(
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
        remember_options(self, frame.f_back)
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
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(
                f'Expected scheduler_interval "epoch" or "step", got {scheduler_interval!r}.'
            )
        self.student = student
        self.teachers = nn.ModuleList(t if isinstance(t, Teacher) else Teacher(t) for t in teachers)
        mine = {p.data_ptr() for p in student.parameters()}
        for index, teacher in enumerate(self._teachers()):
            if any(p.data_ptr() in mine for p in teacher.network.parameters()):
                raise ValueError(
                    f"Expected student and teacher {index} to be separate networks, got shared "
                    f"weights: give one of them as copy.deepcopy(network)."
                )
        self.losses = nn.ModuleDict(by_name(losses))
        self.weighting = weighting or Uniform()
        self.task_weight, self.label_smoothing = task_weight, label_smoothing
        self._optimizer, self._scheduler = optimizer, scheduler
        self._scheduler_interval = scheduler_interval
        self.num_classes = num_classes
        self.input_shape: tuple[int, ...] | None = None
        self._student_tap: Tap | None = None
        self._rng: dict[str, Any] | None = None
        self._watch = FiniteWatch()
        self._trust: tuple[Sequence[int], Tensor] | None = None

    # ------------------------------------------------------------------ what a subclass overrides

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Read images (B, C, H, W) and labels (B,) out of a batch; None: there are no labels."""
        if isinstance(batch, Tensor):
            return batch, None
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return batch[0], None
        got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        raise TypeError(f"Expected batches of (images, labels), got {got}: override unpack(batch).")

    def teach(self, x: Tensor, indices: Sequence[int]) -> list[Knowledge]:
        """Ask the teachers of these indices; nothing is differentiated."""
        with torch.no_grad():  # here, not inside Teacher: other paradigms need the gradient
            return [self.teachers[m](x) for m in indices]

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
            indices = tuple(self.weighting.active(len(self.teachers)))
            members = self.teach(x, indices)
            for each in self._losses():
                each.before(members, indices)
        student = self.learn(x)
        terms = {}
        if target is not None and self.task_weight:
            terms["task"] = self.task_weight * self.task_loss(student.logits, target)
        if members:
            weights = self.weighting(members, student, target)
            teachers = Ensemble(members, weights, self.weighting.space, indices)
            self._trust = (indices, weights.detach())
            for name, loss in zip(self.losses, self._losses(), strict=True):
                value = loss(student, teachers, target)
                terms[name] = loss.weight * self.weighting.strength * value
            gate = self.weighting.loss(teachers, target)
            if gate is not None:
                terms["gate"] = gate
        if len(indices) < len(self.teachers) and self.losses:
            # DDP and optimizers see every adapter each step, whoever was asked
            rest = [p.sum() for p in self.losses.parameters() if p.requires_grad]
            rest = rest or [student.logits.sum()]
            first = next(iter(self.losses))
            terms[first] = terms.get(first, 0.0) + 0.0 * torch.stack(rest).sum()
        return terms

    # ------------------------------------------------------------------ parts

    def task_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy averaged over the labelled samples (in training: of all ranks)."""
        values = task_cross_entropy(logits, target, self.label_smoothing)
        return mean_over_labelled(values, target)

    def forward(self, x: Tensor) -> Tensor:
        """Student's logits for images (B, C, H, W)."""
        return Knowledge.of(self.student(x)).logits

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
        teachers = []
        for index, teacher in enumerate(self._teachers()):
            teacher.listen([n for part in parts for n in part.teacher_layers(index)])
            teachers.append(ask(f"teacher {index}", teacher.network, teacher, x))
        check_classes(student, teachers, self.num_classes)
        self.weighting.active(len(self.teachers))  # a wrong number of weights is told now
        for part in parts:
            part.build(student, teachers)
            part.to(x.device)
        for loss in self._losses():
            loss.attach(self.student, [teacher.network for teacher in self._teachers()])
        self.input_shape = tuple(x.shape[1:])
        classes = student.logits.shape[1]
        self.metrics = nn.ModuleDict(
            {stage: make_metrics(classes, len(teachers), stage) for stage in ("val", "test")}
        )
        self._student_tap = tap

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
        if self._student_tap is None:
            self.prepare(example_input(self, self.unpack).to(self.device))
        else:  # a fit with sync_batchnorm puts plain layers back at its end
            self._student_tap.hook()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimize the student, adapters and gates; never a teacher."""
        parts = (self.student, self.losses, self.weighting)
        parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("Expected a student with parameters to train, got none.")
        optimizer = (
            torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
            if self._optimizer is None
            else self._optimizer(parameters)
        )
        if self._scheduler is None:
            return optimizer
        scheduler: Scheduler = self._scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self._scheduler_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One step; returns the loss and its named terms, detached for callbacks."""
        x, target = self.unpack(batch)
        terms = self.step(x, target)
        if not terms:
            raise ValueError(
                "Expected at least one term in the loss, got none: the batch has no labels and "
                "there are no distillation losses (or task_weight is 0)."
            )
        loss = torch.stack(list(terms.values())).sum()
        parts = {name: value.detach() for name, value in terms.items()}
        self._watch.note(parts)
        every = getattr(self.trainer, "log_every_n_steps", 0) or 1
        # on a CPU looking costs nothing, on a GPU it waits for the device
        if self.device.type == "cpu" or self.trainer.global_step % every == 0:
            self._raise_if_not_finite()
        logged: dict[str, Any] = {
            "train/loss": loss.detach(),
            **{f"train/{k}": v for k, v in parts.items()},
        }
        if self._trust is not None and self.weighting.varies:
            indices, weights = self._trust
            shares = (weights.mean(1) if weights.dim() == 2 else weights).unbind()
            # who was not asked counted for nothing
            logged |= {f"train/trust_{m}": 0.0 for m in range(len(self.teachers))}
            logged |= {f"train/trust_{m}": w for m, w in zip(indices, shares, strict=True)}
        self._trust = None
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)
        return {"loss": loss, **parts}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure student, teachers and their agreement."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure student, teachers and their agreement."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Student's probabilities, shape (B, K)."""
        probabilities: Tensor = self(self.unpack(batch)[0]).float().softmax(1)
        return probabilities

    def _evaluate(self, batch: Any, stage: str) -> None:
        x, target = self.unpack(batch)
        metrics = self.metrics[stage]
        assert isinstance(metrics, MetricCollection)
        student = self.learn(x)
        members: list[Knowledge] = []
        answer = None
        if self.teachers:
            members = self.teach(x, range(len(self.teachers)))
            indices = tuple(self.weighting.active(len(members)))
            asked = [members[m] for m in indices]
            # without labels: an answer that was weighed by the right one would be no measurement
            weights = self.weighting(asked, student, None)
            answer = Ensemble(asked, weights, self.weighting.space, indices).log_probabilities()
        if self.trainer.sanity_checking:
            return  # its batches come again in the first epoch and must not count twice
        update_metrics(metrics, student.logits, target, members, answer)
        if target is not None and stage == "val":
            self.weighting.observe(student, members, target)
        # the objects, not values: Lightning computes and resets them over all ranks
        for key, metric in metrics.items(keep_base=False):
            if metric.update_called:
                bar = key == f"{stage}/accuracy"
                self.log(key, metric, on_step=False, on_epoch=True, prog_bar=bar)

    def on_validation_epoch_end(self) -> None:
        """Let the weighting learn from what validation showed."""
        if not self.trainer.sanity_checking:
            self.weighting.update()

    def on_fit_start(self) -> None:
        """On a CPU, keep memory between steps: faulting it in again is the largest overhead."""
        if self.device.type == "cpu":
            keep_freed_memory()
        if self._student_tap is not None:
            self._student_tap.hook()  # sync_batchnorm replaces layers after the dry run
        if self.weighting.wants_images:
            with torch.no_grad():
                images = [x.to(self.device) for x in training_images(self, self.unpack)]
                self.weighting.calibrate(images, [t.network for t in self._teachers()])

    def on_train_start(self) -> None:
        """Go on with the random numbers of the run that is resumed."""
        # a checkpoint that was only loaded, not resumed, leaves the user's seed alone
        if self._rng is not None and self.trainer.ckpt_path is not None:
            set_rng_state(self._rng)
        self._rng = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the input's shape (for adapters) and the random state; refuse a broken state."""
        self._raise_if_not_finite()
        checkpoint["input_shape"] = self.input_shape
        checkpoint["rng"] = rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Size adapters before their weights are loaded."""
        if self._student_tap is None and checkpoint.get("input_shape"):
            self.prepare(torch.zeros(1, *checkpoint["input_shape"], device=self.device))
        self._rng = checkpoint.get("rng")

    # ------------------------------------------------------------------ helpers

    def _raise_if_not_finite(self) -> None:
        broken = self._watch.broken()
        if broken:
            saver = self.trainer.checkpoint_callback
            last = getattr(saver, "last_model_path", "") or getattr(saver, "best_model_path", "")
            kept = f" The last good checkpoint is {last}." if last else ""
            raise FloatingPointError(
                f"Loss term {', '.join(broken)} became NaN or infinite in epoch "
                f"{self.current_epoch}, at or before step {self.trainer.global_step}. Lower the "
                f"learning rate, or clip gradients (--trainer.gradient_clip_val 1).{kept}"
            )
