from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lightning_kd.adapters import Tap
from lightning_kd.functional import task_cross_entropy
from lightning_kd.knowledge import Ensemble, Knowledge
from lightning_kd.losses import DistillationLoss
from lightning_kd.modules.rng import rng_state, set_rng_state
from lightning_kd.teachers import Teacher
from lightning_kd.weighting import Uniform, Weighting

# arguments that are live objects in Python; the command line records their configuration instead
LIVE = ("student", "teachers", "losses", "weighting", "optimizer", "scheduler")

Scheduler = torch.optim.lr_scheduler.LRScheduler | ReduceLROnPlateau


def describe(error: Exception) -> str:
    """First line of an exception's message."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Distiller(LightningModule):
    """Base of all paradigms: unpack a batch, ask the teachers, compute named losses.

    Subclass a paradigm and override one of these:

    - ``unpack(batch)``: the only line that knows the batch layout;
    - ``teach(x)``: who is asked, and how;
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
        self._remember(frame.f_back)
        for name, value, kind in (
            ("student", [student], nn.Module),
            ("teachers", teachers, nn.Module),
            ("losses", losses, DistillationLoss),
            ("weighting", [weighting or Uniform()], Weighting),
        ):
            for item in value:  # type: ignore[attr-defined]
                if not isinstance(item, kind):
                    raise TypeError(
                        f"Expected {name} of type {kind.__name__}, got {type(item).__name__}."
                    )
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(
                f'Expected scheduler_interval "epoch" or "step", got {scheduler_interval!r}.'
            )
        self.student = student
        self.teachers = nn.ModuleList(
            t if isinstance(t, Teacher) else Teacher(t) for t in teachers
        )
        mine = {p.data_ptr() for p in student.parameters()}
        for index, teacher in enumerate(self.teachers):
            assert isinstance(teacher, Teacher)
            if any(p.data_ptr() in mine for p in teacher.network.parameters()):
                raise ValueError(
                    f"Expected student and teacher {index} to be separate networks, got shared "
                    f"weights: give one of them as copy.deepcopy(network)."
                )
        self.losses = nn.ModuleDict(self._named(losses))
        self.weighting = weighting or Uniform()
        self.task_weight, self.label_smoothing = task_weight, label_smoothing
        self._optimizer, self._scheduler = optimizer, scheduler
        self._scheduler_interval = scheduler_interval
        self.num_classes = num_classes
        self.input_shape: tuple[int, ...] | None = None
        self._student_tap: Tap | None = None
        self._rng: dict[str, Any] | None = None
        self._finite: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ what a subclass overrides

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Read images (B, C, H, W) and labels (B,) out of a batch; None: there are no labels."""
        if isinstance(batch, Tensor):
            return batch, None
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        raise TypeError(
            f"Expected batches of (images, labels), got {got}: override unpack(batch)."
        )

    def teach(self, x: Tensor, target: Tensor | None = None) -> Ensemble:
        """Ask the teachers that the weighting wants; nothing is differentiated."""
        indices = tuple(self.weighting.active(len(self.teachers)))
        with torch.no_grad():  # here, not inside Teacher: other paradigms need the gradient
            members = [self.teachers[m](x) for m in indices]
        weights = self.weighting(members, None, target)
        return Ensemble(members, weights, self.weighting.space, indices)

    def learn(self, x: Tensor) -> Knowledge:
        """Ask the student."""
        if self._student_tap is None:
            raise RuntimeError(
                "The student was not prepared: Trainer does it, or call prepare(images) by hand."
            )
        return self._student_tap(x)

    def step(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss by name, each a scalar."""
        student = self.learn(x)
        terms = {}
        if target is not None and self.task_weight:
            terms["task"] = self.task_weight * self.task_loss(student.logits, target)
        if self.losses:
            teachers = self.teach(x, target)
            for name, loss in self.losses.items():
                terms[name] = loss.weight * loss(student, teachers, target)
        return terms

    # ------------------------------------------------------------------ parts

    def task_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy averaged over the labelled samples of the batch (of all ranks)."""
        values = task_cross_entropy(logits, target, self.label_smoothing)
        labelled = (target >= 0).flatten(1).any(1) if target.dim() > 1 else target >= 0
        count = labelled.sum().to(values.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # DDP averages gradients over ranks; ranks with few labels must not count for more
            torch.distributed.all_reduce(count)
            count = count / torch.distributed.get_world_size()
        return values.sum() / count.clamp(min=1e-6)

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
        layers = [layer for loss in self._losses() for layer in loss.student_layers()]
        tap = Tap(self.student, layers)
        for index, teacher in enumerate(self.teachers):
            assert isinstance(teacher, Teacher)
            teacher.listen([n for loss in self._losses() for n in loss.teacher_layers(index)])
        modes = [(module, module.training) for module in self.student.modules()]
        self.student.eval()
        with torch.no_grad():
            student = self._answer("the student", self.student, tap, x)
            teachers = [
                self._answer(f"teacher {index}", teacher.network, teacher, x)  # type: ignore[union-attr, arg-type]
                for index, teacher in enumerate(self.teachers)
            ]
        for module, mode in modes:
            module.training = mode
        self._check_classes(student, teachers)
        self.weighting.active(len(self.teachers))  # a wrong number of weights is told now
        for loss in self._losses():
            loss.build(student, teachers)
            loss.to(x.device)
        self.input_shape = tuple(x.shape[1:])
        self._make_metrics(student.logits.shape[1])
        self._student_tap = tap

    def _answer(self, who: str, network: nn.Module, ask: Any, x: Tensor) -> Knowledge:
        try:
            answer: Knowledge = ask(x)
        except RuntimeError as error:
            convolution = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
            hint = ""
            if convolution is not None and convolution.in_channels != x.shape[1]:
                hint = (
                    f" Its first convolution expects {convolution.in_channels} channels, got "
                    f"{x.shape[1]}: build it with in_channels={x.shape[1]}, or change the data."
                )
            raise ValueError(
                f"Expected {who} ({type(network).__name__}) to take images of shape "
                f"{tuple(x.shape[1:])}, got: {describe(error)}.{hint}"
            ) from error
        return answer

    def _check_classes(self, student: Knowledge, teachers: Sequence[Knowledge]) -> None:
        mine = student.logits.shape[1]
        if self.num_classes is not None and mine != self.num_classes:
            raise ValueError(
                f"Expected a student with {self.num_classes} classes, as the data has, got {mine}: "
                f"set the student's num_classes to {self.num_classes}."
            )
        for index, teacher in enumerate(teachers):
            if teacher.logits.shape[1] != mine:
                raise ValueError(
                    f"Expected teacher {index} and the student to have the same classes, got "
                    f"{teacher.logits.shape[1]} and {mine}: set num_classes, or leave this teacher "
                    f"out."
                )

    def _make_metrics(self, num_classes: int) -> None:
        def accuracy() -> MulticlassAccuracy:
            return MulticlassAccuracy(
                num_classes, average="micro", ignore_index=-1, validate_args=False
            )

        def collection(stage: str) -> MetricCollection:
            metrics: dict[str, Any] = {
                "accuracy": accuracy(),
                "ece": MulticlassCalibrationError(
                    num_classes, n_bins=15, ignore_index=-1, validate_args=False
                ),
            }
            if self.teachers:
                metrics["agreement"] = accuracy()
                metrics["ensemble/accuracy"] = accuracy()
                for index in range(len(self.teachers)):
                    metrics[f"teacher_{index}/accuracy"] = accuracy()
            # each metric reads other tensors, so no two may share a state
            return MetricCollection(metrics, prefix=f"{stage}/", compute_groups=False)

        self.metrics = nn.ModuleDict({stage: collection(stage) for stage in ("val", "test")})

    @staticmethod
    def _named(losses: Sequence[DistillationLoss]) -> dict[str, DistillationLoss]:
        """Key each loss by its name in the log; equal names are numbered."""
        named: dict[str, DistillationLoss] = {}
        for loss in losses:
            same = sum(key == loss.name or key.startswith(f"{loss.name}_") for key in named)
            named[f"{loss.name}_{same + 1}" if same else loss.name] = loss
        return named

    def _losses(self) -> Iterator[DistillationLoss]:
        for loss in self.losses.values():
            assert isinstance(loss, DistillationLoss)
            yield loss

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Dry run on the shape of the data, before the optimizer is made."""
        if self._student_tap is None:
            self.prepare(self._example())

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
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value, typeddict-item]

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
        self._check_finite(parts)
        logged = {"train/loss": loss.detach(), **{f"train/{k}": v for k, v in parts.items()}}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(x))
        return {"loss": loss, **parts}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure student, teachers and their agreement."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure student, teachers and their agreement."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Student's probabilities, shape (B, K)."""
        return self(self.unpack(batch)[0]).float().softmax(1)

    def _evaluate(self, batch: Any, stage: str) -> None:
        x, target = self.unpack(batch)
        metrics = self.metrics[stage]
        assert isinstance(metrics, MetricCollection)
        logits = self(x)
        if self.teachers:
            with torch.no_grad():
                members = [teacher(x) for teacher in self.teachers]
                active = tuple(self.weighting.active(len(members)))
                asked = [members[m] for m in active]
                weights = self.weighting(asked, None, target)
            answer = Ensemble(asked, weights, self.weighting.space, active).log_probabilities()
            metrics["agreement"].update(logits, answer.argmax(1))
            if target is not None:
                metrics["ensemble/accuracy"].update(answer, target)
                for index, member in enumerate(members):
                    metrics[f"teacher_{index}/accuracy"].update(member.logits, target)
        if target is not None:
            metrics["accuracy"].update(logits, target)
            metrics["ece"].update(logits, target)
            loss = self.task_loss(logits, target)
            self.log(f"{stage}/loss", loss, batch_size=len(x), sync_dist=True)
        if not self.trainer.sanity_checking:
            # the objects, not values: Lightning computes and resets them over all ranks
            bar = {f"{stage}/accuracy"}
            for key, metric in metrics.items(keep_base=False):
                if metric.update_called:
                    self.log(key, metric, on_step=False, on_epoch=True, prog_bar=key in bar)

    def on_train_start(self) -> None:
        """Go on with the random numbers of the run that is resumed."""
        if self._rng is not None:
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

    # ------------------------------------------------------------------ NaN and Inf

    def _check_finite(self, terms: dict[str, Tensor]) -> None:
        """Note terms that are not finite, on the device; look every ``log_every_n_steps``."""
        for name, value in terms.items():
            bad = ~torch.isfinite(value)
            self._finite[name] = self._finite[name] | bad if name in self._finite else bad
        on_cpu = self.device.type == "cpu"  # where looking costs nothing
        if on_cpu or self.trainer.global_step % max(self.trainer.log_every_n_steps, 1) == 0:
            self._raise_if_not_finite()

    def _raise_if_not_finite(self) -> None:
        bad = [name for name, flag in self._finite.items() if bool(flag)]
        self._finite = {}
        if bad:
            last = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
            kept = f" The last good checkpoint is {last}." if last else ""
            raise FloatingPointError(
                f"Loss term {', '.join(bad)} became NaN or infinite in epoch "
                f"{self.current_epoch}, at or before step {self.trainer.global_step}. Lower the "
                f"learning rate, or clip gradients (--trainer.gradient_clip_val 1).{kept}"
            )

    # ------------------------------------------------------------------ helpers

    def _example(self) -> Tensor:
        """One image batch of the shape that the data has, without disturbing any generator."""
        shape = getattr(self.trainer.datamodule, "image_shape", None)  # type: ignore[attr-defined]
        if shape is not None:
            return torch.zeros(1, *shape)
        if isinstance(self.example_input_array, Tensor):
            return self.example_input_array
        trainer = self.trainer
        loops = {
            "fit": trainer.fit_loop,
            "validate": trainer.validate_loop,
            "test": trainer.test_loop,
            "predict": trainer.predict_loop,
        }
        loop = loops["fit" if trainer.training or trainer.sanity_checking else str(trainer.state.fn.value)]  # type: ignore[union-attr]
        source = trainer.fit_loop._data_source if trainer.state.fn == "fit" else loop._data_source  # type: ignore[union-attr]
        with isolate_rng():
            loader = source.dataloader()
            while isinstance(loader, (list, tuple)):
                loader = loader[0]
            dataset = getattr(loader, "dataset", None)
            if hasattr(dataset, "__getitem__") and getattr(loader, "collate_fn", None):
                if not len(dataset):
                    raise ValueError("Expected data to train on, got an empty dataset.")
                batch = loader.collate_fn([dataset[0]])  # starts no worker processes
            else:
                batch = next(iter(loader), None)
                if batch is None:
                    raise ValueError("Expected data to train on, got a loader without a batch.")
            holder = trainer.datamodule or self  # type: ignore[attr-defined]
            batch = holder.on_after_batch_transfer(batch, 0)
            return self.unpack(batch)[0][:1]

    def _remember(self, frame: Any) -> None:
        """Save options: the plain configuration under the command line, plain values in Python.

        Live objects would be pickled into the checkpoint, which then loads no more with
        ``weights_only``; and without their configuration a checkpoint of the command line could not
        rebuild them.
        """

        def plain(value: Any) -> bool:
            if isinstance(value, (list, tuple)):
                return all(plain(v) for v in value)
            if isinstance(value, dict):
                return all(isinstance(k, str) and plain(v) for k, v in value.items())
            return value is None or type(value) in (bool, int, float, str)

        self.save_hyperparameters(ignore=LIVE, frame=frame)
        if "_instantiator" in self.hparams:
            self.save_hyperparameters(frame=frame)
        else:
            options = {k: v for k, v in self.hparams.items() if plain(v)}
            self._hparams = type(self.hparams)(options)
            self._hparams_initial = type(self.hparams)(options)
