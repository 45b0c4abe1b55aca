from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.data_free import ImageSynthesizer
from lightning_kd.data_free.generators import BaseGenerator
from lightning_kd.data_free.image_losses import ImageLoss
from lightning_kd.data_free.replay import ReplayBatch, ReplayMemory
from lightning_kd.data_free.replay.memory import images_from_bytes, images_to_bytes
from lightning_kd.data_free.targets import Targets
from lightning_kd.distillation import Distillation
from lightning_kd.distributed import broadcast_buffers, gather_objects, world_size
from lightning_kd.functional import kl_divergence, logit_l1, logit_mse
from lightning_kd.losses import DistillationLoss
from lightning_kd.modules import manual_steps
from lightning_kd.modules.base import Distiller
from lightning_kd.outputs import NetworkOutput
from lightning_kd.utils.checks import check_one_of, check_positive
from lightning_kd.utils.seeds import mixed_seed, seeded


class DataFree(Distiller):
    r"""A student learns from a teacher without any data: images are made from what it knows.

    Each training step is one round: images are synthesized from the teacher, remembered by the
    callback ``ReplayBuffer`` if there is one, and the student distils from what is remembered (else
    from the images that the generator has learned to make). Nothing but the teacher is needed;
    ``lightning_kd.data.Rounds`` says how many rounds make an epoch.

    Args:
        student: Network that learns.
        teacher: Trained network; frozen.
        generator: Makes the images.
        image_losses: What images should be like, each with its weight: a list, or a mapping of
            names of your own.
        targets: What the teacher should predict for them; ``None``: random labels.
        losses: Distillation losses besides ``distance``; the teacher then runs on every draw.
        distance: Of student and teacher: ``"kl"`` (times the squared temperature), ``"l1"`` or
            ``"mse"`` of logits.
        temperature: Softening of both for ``"kl"``, > 0.
        round_images: Images made a round and process.
        generator_steps: Steps of the generator a round.
        student_steps: Steps of the student a round.
        batch_size: Images a step of the student and process.
        warm_up: Rounds in which images are made and remembered, but the student does not learn, and
            image losses that wait for it (``Adversarial``) rest.
        reset_rounds: Rounds before which the generator forgets its first layer, against collapse.
        reuse: Without a memory, learn all steps of a round from its own images; else from new ones.
        crop_padding: Random crops after padding by so many pixels, of all images; 0: none.
        flip: Random horizontal flips, likewise.
        views: Remember each image in so many augmented views, each with the teacher's logits, and
            draw from those; the memory's capacity counts views. ``None``: images are remembered as
            they are and augmented at each draw, and the teacher runs each time.
        seed: Of images, targets, draws and augmentation; ``None``: that of the run.
        options: Of ``Distiller``: ``task``, ``optimizer`` (of the student), ``scheduler``,
            ``scheduler_interval`` (a step is a round), ``metrics``, ``num_classes``.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Liu et al. 2024 (SSD-KD), https://arxiv.org/abs/2403.19539, whose code was never released:
        constants that the paper leaves open follow Fast-Datafree (Fang et al. 2022) and prioritized
        replay (Schaul et al. 2016). See also the methods of ``configs/digits``.
    """

    distillation: Distillation

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        generator: BaseGenerator,
        image_losses: dict[str, ImageLoss] | list[ImageLoss],
        targets: Targets | None = None,
        losses: dict[str, DistillationLoss] | list[DistillationLoss] | None = None,
        distance: Literal["kl", "l1", "mse"] = "kl",
        temperature: float = 20.0,
        round_images: int = 256,
        generator_steps: int = 2,
        student_steps: int = 20,
        batch_size: int = 256,
        warm_up: int = 20,
        reset_rounds: list[int] | None = None,
        reuse: bool = False,
        crop_padding: int = 0,
        flip: bool = False,
        views: int | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        counts = {"round_images": round_images, "generator_steps": generator_steps,
                  "student_steps": student_steps, "batch_size": batch_size}  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"Expected {name} >= 1, got {value}.")
        if views is not None and (views < 1 or not (crop_padding or flip)):
            raise ValueError(f"Expected views >= 1, with crop_padding or flip, got {views}.")
        check_one_of(distance, ("kl", "l1", "mse"), "distance")
        if reset_rounds and isinstance(generator, BaseGenerator) and not generator.can_reset:
            raise ValueError(
                f"Expected no reset_rounds with this {type(generator).__name__}, which has no "
                f"linear layer that learns over the rounds to forget, got {reset_rounds}."
            )
        if crop_padding < 0:
            raise ValueError(f"Expected crop_padding >= 0, got {crop_padding}.")
        check_positive(temperature, "temperature")
        self.distillation = Distillation(student, [teacher], losses or [], task=self.task)
        self.teachers.why_not_whole = "a teacher whose layers are measured"
        self.synthesizer = ImageSynthesizer(
            generator, image_losses, targets, round_images, generator_steps, crop_padding, flip
        )
        self.distance, self.temperature = distance, temperature
        self.student_steps, self.batch_size = student_steps, batch_size
        self.warm_up, self.reset_rounds, self.reuse = warm_up, set(reset_rounds or ()), reuse
        manual_steps.refuse_own_losses(self)
        self.views, self.seed = views, seed
        self.automatic_optimization = False
        self.memory: ReplayMemory | None = None
        self.rounds = 0
        self._random = torch.Generator()
        self._optimizer_names: list[str] = []  # beside the student's, in order
        self._saved: dict[str, Any] | None = None

    # ------------------------------------------------------------------ one round

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One round: synthesize images, remember them, distil."""
        if not isinstance(batch, Tensor) or batch.dim():
            rank_zero_warn("DataFree uses no training data: give it lightning_kd.data.Rounds.")
        self._begin_round()
        warming_up = self.rounds < self.warm_up
        images, losses = self._synthesize(warming_up)
        if self.memory is not None:
            self._remember(images)
        if not warming_up:
            losses |= self._distil(images)
            # not in the warm-up, which would spend the first rates
            manual_steps.step_schedules(self, self._scheduler_interval)
        self.rounds += 1
        return self._track(losses, self.student_steps * self.batch_size) if losses else None

    def _begin_round(self) -> None:
        """Random numbers depend on the seed, the round and the process alone."""
        assert self.seed is not None
        if self._random.device != self.device:
            self._random = torch.Generator(self.device)
        # without its own backward pass DDP does not do it
        broadcast_buffers(self.student, self.synthesizer.generator)
        self._random.manual_seed(mixed_seed(self.seed, self.rounds, self.global_rank))
        if self.rounds in self.reset_rounds:
            # equal in all processes, unlike the images
            self.synthesizer.generator.reset(seeded(self.seed, self.rounds, device=self.device))

    def _synthesize(self, warming_up: bool) -> tuple[Tensor, dict[str, Tensor]]:
        self.student.eval()
        optimizers: Any = self.optimizers(use_pl_optimizer=False)  # Lightning does not count these
        named = {n: optimizers[1 + k] for k, n in enumerate(self._optimizer_names)}
        # the memory does not change within a round, and asking it talks to all processes
        share = self.memory.class_share() if self.memory is not None else None
        assert self.num_classes is not None
        with manual_steps.full_precision_if_scaled(self):
            images, losses = self.synthesizer.synthesize(
                self.distillation, named, self.num_classes, share, warming_up, self._random
            )
        self.synthesizer.after_round(self.distillation, images)
        return images, {f"invert/{name}": value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def _remember(self, images: Tensor) -> None:
        """Put images into the memory, with the teacher's output and the student's distance."""
        assert self.memory is not None
        if self.views is not None:
            images = self.synthesizer.augment(images.repeat(self.views, 1, 1, 1), self._random)
        kept = self._like_input(images_from_bytes(images_to_bytes(images)))  # as they come back
        teacher, student = self.teachers[0](kept), self.distillation.student_output(kept)
        priorities = kl_divergence(student.logits, teacher.logits)
        self.memory.extend(kept, teacher.logits.float(), priorities)

    def _distil(self, images: Tensor) -> dict[str, Tensor]:
        """Student steps on remembered images, or without a memory on new ones (or these)."""
        self.student.train()
        optimizer: Any = self.optimizers()
        optimizer = optimizer[0] if isinstance(optimizer, list) else optimizer
        core, sums = self.distillation, []
        for _ in range(self.student_steps):
            batch = self._draw(images)
            kept = self._like_input(batch.images)
            x = kept if self.views is not None else self.synthesizer.augment(kept, self._random)
            if batch.logits is None or x is not kept or core.losses:
                (teacher,) = core.teacher_outputs(x)
            else:
                teacher = NetworkOutput(batch.logits)
            core.before_student([teacher], (0,))
            student = core.student_output(x)
            distances = self._distances(student.logits, teacher.logits)
            loss = (distances if batch.weights is None else batch.weights * distances).mean()
            if self.memory is not None:
                with torch.no_grad():
                    divergences = kl_divergence(student.logits.detach(), teacher.logits)
                    self.memory.update_priorities(batch, divergences)
            if core.losses:
                more = core.distillation_losses(student, [teacher], (0,), None)
                loss = loss + torch.stack(list(more.values())).sum()
            manual_steps.step_modules(self, optimizer, loss, self.trainable_modules())
            sums.append(loss.detach())
        return {"distil": torch.stack(sums).mean()}

    def _draw(self, images: Tensor) -> ReplayBatch:
        if self.memory is not None:
            return self.memory.sample(self.batch_size, self._random)
        if not self.reuse:
            assert self.distillation.input_shape is not None
            images = self.synthesizer.generator.sample(
                self.batch_size, self.distillation.input_shape, self._random
            )
        return ReplayBatch(torch.empty(0), images)

    def _distances(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of each sample, shape (B,)."""
        if self.distance == "kl":
            t = self.temperature
            return t**2 * kl_divergence(student, teacher, t, t)
        return logit_l1(student, teacher) if self.distance == "l1" else logit_mse(student, teacher)

    # ------------------------------------------------------------------ Lightning's hooks

    def _build(self, x: Tensor) -> None:
        super()._build(x)
        self.synthesizer.build(self.distillation, x)
        if self.num_classes is None:
            self.num_classes = self.distillation.example.logits.shape[1]

    def configure_optimizers(self) -> Any:
        """The student's optimizer, then those of the generator and of what image losses learn."""
        first: Any = super().configure_optimizers()
        first = first if isinstance(first, dict) else {"optimizer": first}
        named = self.synthesizer.make_optimizers()
        self._optimizer_names = list(named)
        return [first, *({"optimizer": optimizer} for optimizer in named.values())]

    def on_fit_start(self) -> None:
        """Find the memory, and agree on a seed."""
        super().on_fit_start()
        callbacks: list[Any] = list(self.trainer.callbacks)  # type: ignore[attr-defined]
        self.memory = next((c for c in callbacks if isinstance(c, ReplayMemory)), None)
        if self.memory is None and self.views is not None:
            raise ValueError("Expected the callback ReplayBuffer with views, which it remembers.")
        if self.memory is None and not self.reuse and self.synthesizer.generator.needs_replay:
            raise ValueError(
                f"Expected the callback ReplayBuffer (or reuse=True) with "
                f"{type(self.synthesizer.generator).__name__}, which cannot sample images at once."
            )
        # of a checkpoint that was only loaded, nothing but the weights goes on
        if self.trainer.ckpt_path is not None and self._saved is not None:
            self.rounds, self.seed = self._saved["rounds"], self._saved["seed"]
            seen = self._saved["seen"]
            if len(seen) == world_size():  # else all go on with what the first has seen
                for name, state in seen[self.global_rank].items():
                    self.synthesizer.image_losses[name].set_extra_state(state)
        self._saved = None
        self.seed = self._common_seed(self.seed)

    def on_train_start(self) -> None:
        """Warn where the warm-up is all there is."""
        super().on_train_start()
        rounds = (self.trainer.max_epochs or 0) * self.trainer.num_training_batches
        trying = getattr(self.trainer, "fast_dev_run", False)
        if 0 < rounds <= self.warm_up and not trying:
            rank_zero_warn(
                f"This run has {rounds:.0f} rounds, all of them within the warm-up of "
                f"{self.warm_up}, in which the student does not learn: set warm_up lower, or make "
                f"more rounds."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of rounds, the seed, and what image losses have seen."""
        super().on_save_checkpoint(checkpoint)
        # the state holds what the first process has seen of its images, not the others
        stateful = nn.Module.get_extra_state
        seen = {
            name: loss.get_extra_state()
            for name, loss in self.synthesizer.named_losses()
            if world_size() > 1 and type(loss).get_extra_state is not stateful
        }
        checkpoint["data_free"] = {
            "rounds": self.rounds, "seed": self.seed, "seen": gather_objects(seen),
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        super().on_load_checkpoint(checkpoint)
        self._saved = checkpoint["data_free"]
