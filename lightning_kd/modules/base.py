from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_kd.files import DurableCheckpointIO
from lightning_kd.functional import task_cross_entropy
from lightning_kd.modules.allocator import keep_freed_memory
from lightning_kd.modules.dry_run import example_input
from lightning_kd.modules.options import remember_options
from lightning_kd.modules.rng import rng_state, set_rng_state
from lightning_kd.modules.termination import SaveOnSigterm
from lightning_kd.modules.terms import Terms
from lightning_kd.ranks import gather_objects, mean_over_labelled
from lightning_kd.strategies import last_checkpoint
from lightning_kd.teachers import TeacherCache

Scheduler = torch.optim.lr_scheduler.LRScheduler | ReduceLROnPlateau


class Distiller(LightningModule):
    """Base of all paradigms: what every one of them needs of Lightning.

    It reads batches, makes a dry run before training that sizes what must be sized, watches for
    broken losses, and keeps random numbers in the checkpoint. It has no ``__init__``, since
    ``load_from_checkpoint`` filters arguments by the signature of the class; a paradigm's calls
    ``assemble``.
    """

    num_classes: int | None
    metrics: nn.ModuleDict

    def assemble(
        self,
        frame: FrameType | None,
        task_weight: float = 1.0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "epoch",
        num_classes: int | None = None,
    ) -> None:
        """Take over the options; call it once.

        Args:
            frame: Of the paradigm's ``__init__``, whose arguments are kept in checkpoints.
            task_weight: Multiplier of the cross-entropy with the labels.
            label_smoothing: Probability mass spread over all classes, in [0, 1).
            optimizer: ``None``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
            scheduler: Learning rate schedule; ``None``: constant.
            scheduler_interval: ``"epoch"`` or ``"step"``: when the schedule moves.
            num_classes: Of the data, checked against the networks.

        Raises:
            ValueError: If an option is out of range.
        """
        remember_options(self, frame)
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(
                f'Expected scheduler_interval "epoch" or "step", got {scheduler_interval!r}.'
            )
        self.task_weight, self.label_smoothing = task_weight, label_smoothing
        self._optimizer, self._scheduler = optimizer, scheduler
        self._scheduler_interval = scheduler_interval
        self.num_classes = num_classes
        self.input_shape: tuple[int, ...] | None = None
        self._rng: list[dict[str, Any]] | None = None
        self._terms = Terms()

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

    def samples_in(self, batch: Any) -> int:
        """Images in a training batch of this process, for the rate that is reported."""
        return len(self.unpack(batch)[0])

    @abstractmethod
    def step(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss by name, each a scalar."""

    @abstractmethod
    def prepare(self, x: Tensor) -> None:
        """Size adapters and metrics from a dry run on images (B, C, H, W); once.

        Raises:
            ValueError: If a network cannot take these images, a layer does not exist, or the
                numbers of classes differ.
        """

    @property
    @abstractmethod
    def prepared(self) -> bool:
        """Whether the dry run has been made."""

    @abstractmethod
    def trained(self) -> Sequence[nn.Module]:
        """Parts that the optimizer trains."""

    def task_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy averaged over the labelled samples (in training: of all ranks)."""
        values = task_cross_entropy(logits, target, self.label_smoothing)
        return mean_over_labelled(values, target)

    # ------------------------------------------------------------------ what is kept of a run

    @abstractmethod
    def learners(self) -> dict[str, nn.Module]:
        """Networks that are trained, each under the name of the file that it is exported to."""

    @abstractmethod
    def learner_state(self, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of one learner, under its own names, out of a module's state."""

    @abstractmethod
    def learner_config(self, name: str) -> Any:
        """Configuration of one learner under the command line, else None."""

    def best_learner(self, accuracies: Sequence[float]) -> str:
        """Name of the learner to keep, given ``learner_accuracies`` of one moment."""
        return next(iter(self.learners()))

    def learner_accuracies(self) -> list[float]:
        """Accuracy of each learner at the last validation, as far as measured."""
        return []

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Dry run on the shape of the data, before the optimizer is made."""
        DurableCheckpointIO.install(self.trainer)
        if not self.prepared:
            self.prepare(self.like_input(example_input(self, self.unpack)))

    def configure_callbacks(self) -> list[Callback]:
        """What every run needs."""
        return [SaveOnSigterm()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimize the parts that are trained; never a teacher."""
        parameters = [p for part in self.trained() for p in part.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("Expected a network with parameters to train, got none.")
        optimizer = self.make_optimizer(parameters)
        scheduler = self.make_scheduler(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # type: ignore[return-value]

    def make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer that was asked for, over these parameters."""
        if self._optimizer is None:
            return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
        return self._optimizer(parameters)

    def make_scheduler(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """The schedule that was asked for, as Lightning wants it."""
        if self._scheduler is None:
            return None
        scheduler: Scheduler = self._scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self._scheduler_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return config

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step; returns the loss and its named terms, detached for callbacks."""
        x, target = self.unpack(batch)
        terms = self.step(x, target)
        return {"loss": self.total(terms), **self.note(terms, len(x))}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Sum of the terms of a step.

        Raises:
            ValueError: If there is none.
        """
        if not terms:
            raise ValueError(
                "Expected at least one term in the loss, got none: the batch has no labels and "
                "there are no distillation losses (or task_weight is 0)."
            )
        return torch.stack(list(terms.values())).sum()

    def like_input(self, x: Tensor) -> Tensor:
        """Images on the module's device and in its precision, for a dry run."""
        floats = (p.dtype for p in self.parameters() if p.is_floating_point())
        return x.to(self.device, next(floats, torch.float32))

    def note(self, terms: dict[str, Tensor], batch_size: int) -> dict[str, Tensor]:
        """Count the terms of a step into ``train/<name>``, and look whether they are finite.

        Returns:
            The terms, detached.
        """
        parts = {name: value.detach() for name, value in terms.items()}
        more = {"loss": torch.stack(list(parts.values())).sum(), **self.beside()}
        self._terms.add({**parts, **more}, batch_size, watched=len(parts))
        every = getattr(self.trainer, "log_every_n_steps", 0) or 1
        # on a CPU looking costs nothing, on a GPU it waits for the device
        if self.device.type == "cpu" or self.trainer.global_step % every == 0:
            self._raise_if_not_finite()
        if self.trainer.is_last_batch:  # not at the epoch's end, where callbacks come first
            self.publish()
        return parts

    def publish(self) -> None:
        """Log the means of the steps so far as ``train/<name>``; every process must ask."""
        for name, (value, samples) in self._terms.take().items():
            self.log(
                f"train/{name}", value, on_step=False, on_epoch=True, batch_size=samples,
                sync_dist=True,
            )  # fmt: skip

    def on_train_epoch_end(self) -> None:
        """Log what an epoch that ended early has left."""
        self.publish()

    def beside(self) -> dict[str, Tensor]:
        """More scalars of the last step to log, by name."""
        return {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure what the networks know, and where they agree."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure what the networks know, and where they agree."""
        self.evaluate(batch, "test")

    @abstractmethod
    def evaluate(self, batch: Any, stage: str) -> None:
        """Measure on one batch of ``"val"`` or ``"test"``."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities of the network that is kept, shape (B, K)."""
        probabilities: Tensor = self(self.unpack(batch)[0]).float().softmax(1)
        return probabilities

    def log_metrics(self, metrics: MetricCollection, bar: str) -> None:
        """Log metrics as objects, not values: Lightning computes and resets them over all ranks."""
        for key, metric in metrics.items(keep_base=False):
            assert isinstance(metric, Metric)
            if metric.update_called:
                self.log(key, metric, on_step=False, on_epoch=True, prog_bar=key == bar)

    def on_fit_start(self) -> None:
        """On a CPU, keep memory between steps: faulting it in again is the largest overhead."""
        if self.device.type == "cpu":
            keep_freed_memory()
        self._terms = Terms()  # without what a run that broke off has left
        cache = getattr(self.trainer.datamodule, "teacher_cache", None)  # type: ignore[attr-defined]
        if cache is not None and self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            cache.close()
            cache = None
        self.use_cache(cache)
        # a validation of its own leaves states behind that were made in inference mode
        for metrics in self.metrics.values():
            assert isinstance(metrics, MetricCollection)
            metrics.reset()

    def use_cache(self, cache: TeacherCache | None) -> None:
        """Take what teachers said of the training images from a cache, if there is one.

        Raises:
            ValueError: If this paradigm cannot.
        """
        if cache is None:
            return
        raise ValueError(
            f"Expected MultiTeacher with the data's teacher_cache, got {type(self).__name__}: "
            f"leave the cache out."
        )

    def common_seed(self, seed: int | None) -> int:
        """A seed of draws that all processes make alike: this one, or else the run's."""
        mine = torch.initial_seed() % 2**31 if seed is None else seed
        return int(self.trainer.strategy.broadcast(mine))

    def on_train_start(self) -> None:
        """Go on with the random numbers of the run that is resumed."""
        # a checkpoint that was only loaded, not resumed, leaves the user's seed alone
        if self._rng is not None and self.trainer.ckpt_path is not None:
            mine = self.global_rank if len(self._rng) == self.trainer.world_size else 0
            set_rng_state(self._rng[mine])
        self._rng = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the input's shape (for adapters) and the random state; refuse a broken state."""
        self._raise_if_not_finite()
        checkpoint["input_shape"] = self.input_shape
        checkpoint["rng"] = gather_objects(rng_state())
        checkpoint["accuracies"] = self.learner_accuracies()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Size adapters before their weights are loaded."""
        if not self.prepared and checkpoint.get("input_shape"):
            self.prepare(self.like_input(torch.zeros(1, *checkpoint["input_shape"])))
        self._rng = checkpoint.get("rng")

    def _raise_if_not_finite(self) -> None:
        broken = self._terms.broken()
        if broken:
            clip = ""
            if self.automatic_optimization:
                clip = ", or clip gradients (--trainer.gradient_clip_val 1)"
            raise FloatingPointError(
                f"Loss term {', '.join(broken)} became NaN or infinite in epoch "
                f"{self.current_epoch}, at or before step {self.trainer.global_step}. Lower the "
                f"learning rate{clip}."
                f"{last_checkpoint(self.trainer)}"
            )


def cut_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries of a state whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
