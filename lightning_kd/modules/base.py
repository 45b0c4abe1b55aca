from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_kd.base_distillation import BaseDistillation, total_loss
from lightning_kd.distributed import gather_objects
from lightning_kd.modules.checkpoint_io import load_checked
from lightning_kd.modules.evaluation import end_evaluation, evaluate
from lightning_kd.modules.example_input import example_input, plain_defaults, training_images
from lightning_kd.modules.loss_tracker import LossTracker
from lightning_kd.modules.metric_logging import collect
from lightning_kd.modules.optimizers import make_optimizer, warn_of_untrained
from lightning_kd.modules.options import keep_options, plain_options
from lightning_kd.modules.release import release_teachers
from lightning_kd.modules.rng import rng_state, set_rng_state
from lightning_kd.modules.unpack import unpack_pair
from lightning_kd.tasks import Classification, Task
from lightning_kd.teachers import TeacherCache, TeacherEnsemble
from lightning_kd.utils.checks import check_one_of


class Distiller(LightningModule):
    """Base of all paradigms: a core that knows no Lightning, and what it needs of Lightning.

    A paradigm's ``__init__`` calls this one and sets ``distillation``. Override one of these:

    - ``unpack(batch)``: the only line that knows the layout of a batch;
    - ``compute_losses(x, target)``: the named, weighted losses of a step;
    - ``configure_metrics()``: metrics of your own;
    - ``trainable_modules()``: what the optimizer trains.

    Args:
        task: What the networks are trained for; ``None``: ``Classification``.
        optimizer: ``None``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: Learning rate schedule; ``None``: constant.
        scheduler_interval: ``"epoch"`` or ``"step"``: when the schedule moves.
        metrics: Metrics of your own by name; updated with the logits and labels of labelled
            samples, and logged as ``val/<name>`` and ``test/<name>``.
        num_classes: Of the data, checked against the networks; the command line fills it in.

    Raises:
        ValueError: If an option is out of range.
    """

    distillation: BaseDistillation
    _own_names: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        task: Task | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "epoch",
        metrics: dict[str, Metric] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if type(self) is Distiller:
            raise TypeError("Distiller is the base of the paradigms: use MultiTeacher, say.")
        self.save_hyperparameters()
        self._arguments = set(self.hparams)
        check_one_of(scheduler_interval, ("epoch", "step"), "scheduler_interval")
        self.task = task or Classification()
        self.num_classes = num_classes
        self.loss_tracker = LossTracker()
        self._optimizer, self._scheduler = optimizer, scheduler
        self._scheduler_interval = scheduler_interval
        self._own_metrics = dict(metrics or {})
        self._ready = False  # whether a dry run was made
        self._rng: list[dict[str, Any]] | None = None
        self._last_scores: list[float] = []

    # ------------------------------------------------------------------ what a subclass overrides

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Read images (B, C, H, W) and labels (B,) out of a batch; None: there are no labels."""
        return unpack_pair(batch)

    def compute_losses(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Weighted losses of a batch by name, each a scalar; their sum is minimised."""
        return self.distillation.losses_and_output(x, target)[0]

    def configure_metrics(self) -> dict[str, Metric]:
        """Metrics of your own by name, beside those of the task."""
        return self._own_metrics

    def trainable_modules(self) -> Sequence[nn.Module]:
        """Parts that the optimizer trains; never a teacher."""
        return self.distillation.trainable_modules()

    def exported_networks(self) -> dict[str, nn.Module]:
        """Networks that are trained, each under the name of the file that it is exported to."""
        return self.distillation.exported_networks()

    # ------------------------------------------------------------------ networks

    @property
    def student(self) -> nn.Module:
        """The network that is kept; of several the best at the last validation."""
        networks = self.exported_networks()
        return networks[self.distillation.best_network(self._scores())]

    @property
    def teachers(self) -> TeacherEnsemble:
        """The frozen teachers."""
        return self.distillation.teachers

    @property
    def losses(self) -> Any:
        """The distillation losses by name; of a cohort, those of each peer."""
        return self.distillation.losses

    def forward(self, x: Tensor) -> Tensor:
        """Logits for images (B, C, H, W): the student's, or those of a cohort's answer."""
        return self.distillation.output(x).logits

    def _scores(self) -> list[float]:
        logged = {} if self._trainer is None else self.trainer.callback_metrics
        return self.distillation.scores(logged) or self._last_scores

    # ------------------------------------------------------------------ steps

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step; returns the loss and its named parts, detached for callbacks."""
        x, target = self.unpack(batch)
        losses = self.compute_losses(x, target)
        return {"loss": total_loss(losses), **self._track(losses, len(x), x)}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure what the networks know, and where they agree."""
        evaluate(self, batch, "val", dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure what the networks know, and where they agree."""
        evaluate(self, batch, "test", dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """What the task predicts: for classification probabilities, shape (B, K)."""
        return self.task.predict(self.distillation.output(self.unpack(batch)[0]))

    def _track(
        self, losses: dict[str, Tensor], samples: int, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Count the losses of a step into ``train/<name>``, and check that they are finite."""
        parts = {name: value.detach() for name, value in losses.items()}
        self.loss_tracker.add(parts, self.distillation.scalars(), samples)
        every = getattr(self.trainer, "log_every_n_steps", 0) or 1
        # on a CPU looking costs nothing, on a GPU it waits for the device
        if self.device.type == "cpu" or self.trainer.global_step % every == 0:
            self.loss_tracker.raise_if_not_finite(self, x)
        if self.trainer.is_last_batch:  # not at the epoch's end, where callbacks come first
            self.loss_tracker.log(self)
        return parts

    # ------------------------------------------------------------------ optimizers

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimize the parts that are trained; never a teacher."""
        schedule = self._scheduler, self._scheduler_interval, self.task
        return make_optimizer(self.trainable_modules(), self._optimizer, *schedule)

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Freeze the teachers, which an earlier run may have released."""
        self.teachers.freeze()

    def configure_model(self) -> None:
        """Dry run on the shape of the data, before the optimizer and any copy is made."""
        if self._trainer is None:  # weights are loaded without a Trainer
            return
        if not self._ready:
            self._build(self._like_input(example_input(self, self.unpack)))
        self.distillation.attach()  # a fit with sync_batchnorm puts plain layers back

    def configure_callbacks(self) -> list[Callback]:
        """Give the teachers back where a run breaks off, too."""
        return release_teachers(self.trainer)

    def teardown(self, stage: str) -> None:
        """Give the teachers back as they were."""
        self.teachers.release()

    def _build(self, x: Tensor) -> None:
        with plain_defaults(x.device):
            self.distillation.build(x, self.num_classes)
        own = self.configure_metrics()
        self.metrics = collect(self.distillation.metrics(), own)
        self._own_names, self._ready = tuple(own), True

    def _like_input(self, x: Tensor) -> Tensor:
        """Images on the module's device and in its precision, for a dry run."""
        floats = (p.dtype for p in self.parameters() if p.is_floating_point())
        precision = next(floats, torch.float32) if x.is_floating_point() else x.dtype
        return x.to(self.device, precision)

    def on_fit_start(self) -> None:
        """Begin with nothing that an earlier run has left."""
        self.loss_tracker = LossTracker()  # without what a run that broke off has left
        self.distillation.attach()  # sync_batchnorm replaces layers after the dry run
        cache = getattr(self.trainer.datamodule, "teacher_cache", None)  # type: ignore[attr-defined]
        if cache is not None and self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            cache.close()
            cache = None
        self._use_cache(cache)
        for part in self.distillation.random_parts():
            part.seed = self._common_seed(part.seed)
        if self.distillation.wants_images:
            with torch.no_grad():
                images = [x.to(self.device) for x in training_images(self, self.unpack)]
                self.distillation.calibrate(images)
        for metrics in self.metrics.values():  # states of a validation are inference tensors
            assert isinstance(metrics, MetricCollection)
            metrics.reset()

    def _use_cache(self, cache: TeacherCache | None) -> None:
        """Take teachers' outputs for the training images from a cache, if there is one."""
        if cache is not None:
            raise ValueError(
                f"Expected MultiTeacher with the data's teacher_cache, got {type(self).__name__}: "
                f"leave the cache out."
            )

    def _common_seed(self, seed: int | None) -> int:
        """A seed of draws that all processes make alike: this one, or else the run's."""
        own = torch.initial_seed() % 2**31 if seed is None else seed
        return int(self.trainer.strategy.broadcast(own))

    def on_train_start(self) -> None:
        """Go on with the random numbers of the run that is resumed."""
        warn_of_untrained(self, self.trainable_modules())
        # a checkpoint that was only loaded, not resumed, leaves the user's seed alone
        if self._rng is not None and self.trainer.ckpt_path is not None:
            own = self.global_rank if len(self._rng) == self.trainer.world_size else 0
            set_rng_state(self._rng[own])
        self._rng = None

    def on_train_epoch_end(self) -> None:
        """Log what an epoch that ended early has left."""
        self.loss_tracker.log(self)

    def on_validation_epoch_end(self) -> None:
        """Let weightings and exchanges learn from what a validation inside a fit showed."""
        end_evaluation(self, "val")
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.distillation.after_validation()

    def on_test_epoch_end(self) -> None:
        """Take back what nothing was measured of."""
        end_evaluation(self, "test")

    def on_validation_end(self) -> None:
        """Remember the scores, which a test clears."""
        self._last_scores = self._scores()

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, *arguments: Any, trust: Sequence[str] = (), **options: Any
    ) -> Any:
        """Lightning's own, for a file that somebody else may have made: it runs no code.

        Args:
            checkpoint_path: The file.
            arguments: As Lightning has them.
            trust: Packages whose classes the file may name, besides ``TRUSTED_OPTIONS``.
            options: As Lightning has them; those of ``__init__`` replace the file's own.

        Raises:
            ValueError: If the file is damaged, needs pickle, or names other code.
        """
        load = super().load_from_checkpoint
        return load_checked(load, checkpoint_path, *arguments, trust=trust, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the input's shape (for adapters) and the random state; refuse a broken state."""
        self.loss_tracker.raise_if_not_finite(self)
        keep_options(checkpoint.get("hyper_parameters", {}), self._arguments)
        checkpoint["input_shape"] = self.distillation.input_shape
        checkpoint["rng"] = gather_objects(rng_state())
        checkpoint["scores"] = self._scores()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Size adapters before their weights are loaded."""
        if not self._ready and checkpoint.get("input_shape"):
            self._build(self._like_input(torch.zeros(1, *checkpoint["input_shape"])))
        self._rng = checkpoint.get("rng")
        self._last_scores = checkpoint.get("scores", [])

    def _set_hparams(self, hp: Any) -> None:
        """Keep plain values: with live objects a checkpoint does not load with ``weights_only``."""
        super()._set_hparams(hp if "_instantiator" in hp else plain_options(hp))
