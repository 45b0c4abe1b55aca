from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.functional import kl_divergence, logit_mse
from lightning_kd.functional.data_free import logit_l1
from lightning_kd.functional.seeds import mixed_seed, seeded
from lightning_kd.inversion import InversionTerm
from lightning_kd.knowledge import Knowledge
from lightning_kd.losses import DistillationLoss
from lightning_kd.modules.inverting import Inverting
from lightning_kd.modules.lessons import lesson
from lightning_kd.ranks import broadcast_buffers, gather_objects, world_size
from lightning_kd.replay import Drawn, Remembers
from lightning_kd.replay.memory import from_bytes, to_bytes
from lightning_kd.sources import ImageSource, Targets


class DataFree(Inverting):
    r"""A student learns from a teacher without any data: images are made from what it knows.

    Each training step is one round: images are inverted from the teacher, remembered by the
    callback ``ReplayBuffer`` if there is one, and the student distils from what is remembered (else
    from the images that the source has learned to make). Nothing but the teacher is needed;
    ``lightning_kd.data.Rounds`` says how many rounds make an epoch.

    Args:
        student: Network that learns.
        teacher: Trained network; frozen.
        source: Makes the images.
        terms: What images are to be like, each with its weight.
        targets: What the teacher is to see in them; ``null``: random labels.
        losses: More of what is transferred, beside ``distance``; the teacher is then asked on every
            draw.
        distance: Of student and teacher: ``"kl"`` (times the squared temperature), ``"l1"`` or
            ``"mse"`` of logits.
        temperature: Softening of both for ``"kl"``, > 0.
        round_images: Images made a round and process.
        source_steps: Steps of the source a round.
        student_steps: Steps of the student a round.
        batch_size: Images a step of the student and process.
        warm_up: Rounds in which images are made and remembered, but the student does not learn, and
            terms that wait for it (``Adversarial``) rest.
        reset_rounds: Rounds before which the source forgets its first layer, against collapse.
        reuse: Without a memory, learn all steps of a round from its own images; else from new ones.
        crop_padding: Random crops after padding by so many pixels, of all images; 0: none.
        flip: Random horizontal flips, likewise.
        views: Remember each image in so many augmented views, each with the teacher's answer, and
            draw from those; the memory's capacity counts views. ``null``: images are remembered as
            they are, augmented at each draw, and the teacher is asked each time.
        optimizer: Of the student; ``null``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: Learning rate schedule; ``null``: constant.
        scheduler_interval: ``"epoch"`` or ``"step"``: when the schedule moves; a step is a round.
        seed: Of images, targets, draws and augmentation; ``null``: that of the run.
        num_classes: Of the data, checked against the networks; the command line fills it in.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Liu et al. 2024 (SSD-KD), https://arxiv.org/abs/2403.19539, whose code was never released:
        constants that the paper leaves open follow Fast-Datafree (Fang et al. 2022) and prioritized
        replay (Schaul et al. 2016). See also the methods of ``configs/digits``.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        source: ImageSource,
        terms: list[InversionTerm],
        targets: Targets | None = None,
        losses: list[DistillationLoss] | None = None,
        distance: Literal["kl", "l1", "mse"] = "kl",
        temperature: float = 20.0,
        round_images: int = 256,
        source_steps: int = 2,
        student_steps: int = 20,
        batch_size: int = 256,
        warm_up: int = 20,
        reset_rounds: list[int] | None = None,
        reuse: bool = False,
        crop_padding: int = 0,
        flip: bool = False,
        views: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "epoch",
        seed: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        counts = {"round_images": round_images, "source_steps": source_steps,
                  "student_steps": student_steps, "batch_size": batch_size}  # fmt: skip
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"Expected {name} >= 1, got {value}.")
        if views is not None and (views < 1 or not (crop_padding or flip)):
            raise ValueError(
                f"Expected views >= 1 together with crop_padding or flip, got {views}: views of "
                f"images that nobody augments are all alike."
            )
        if distance not in ("kl", "l1", "mse"):
            raise ValueError(f'Expected distance "kl", "l1" or "mse", got {distance!r}.')
        if reset_rounds and isinstance(source, ImageSource) and not source.resets:
            raise ValueError(
                f"Expected no reset_rounds with this {type(source).__name__}, which has no linear "
                f"layer that learns over the rounds to forget, got {reset_rounds}."
            )
        if crop_padding < 0:
            raise ValueError(f"Expected crop_padding >= 0, got {crop_padding}.")
        if temperature <= 0:
            raise ValueError(f"Expected temperature > 0, got {temperature}.")
        self.take(
            student,
            [teacher],
            losses or [],
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_interval=scheduler_interval,
            num_classes=num_classes,
        )
        self.take_source(source, terms, targets)
        self.distance, self.temperature = distance, temperature
        self.round_images, self.source_steps = round_images, source_steps
        self.student_steps, self.batch_size = student_steps, batch_size
        self.warm_up, self.reset_rounds, self.reuse = warm_up, set(reset_rounds or ()), reuse
        self.crop_padding, self.flip, self.views = crop_padding, flip, views
        self.seed = seed
        self.automatic_optimization = False
        #: images of the last round, shape (B, C, H, W); None before the first
        self.latest: Tensor | None = None
        self.rounds = 0
        self._saved: dict[str, Any] | None = None

    # ------------------------------------------------------------------ one round

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One round: invert, remember, distil."""
        if not isinstance(batch, Tensor) or batch.dim():
            rank_zero_warn(
                "DataFree learns without data, but its training batches hold some, which are not "
                "used: give lightning_kd.data.Rounds."
            )
        self._begin_round()
        images, said = self.invert()
        self.latest = images
        if self.memory is not None:
            self.remember(images)
        if not self.warming_up:
            said |= self.distil(images)
            self.advance_schedules()  # not in the warm-up, which would spend the first rates
        self.rounds += 1
        return self.note(said, self.samples_in(batch)) if said else None

    @property
    def warming_up(self) -> bool:
        """Whether the student does not learn yet."""
        return self.rounds < self.warm_up

    @torch.no_grad()
    def remember(self, images: Tensor) -> None:
        """Put images into the memory, with the teacher's answer and the student's distance."""
        assert self.memory is not None
        if self.views is not None:
            images = self.augment(images.repeat(self.views, 1, 1, 1))
        kept = self.like_input(from_bytes(to_bytes(images)))  # as they will come back
        teacher, student = self.teachers[0](kept).logits, self.learn(kept).logits
        self.memory.extend(kept, teacher.float(), kl_divergence(student, teacher))

    def distil(self, images: Tensor) -> dict[str, Tensor]:
        """Student steps on remembered images, or without a memory on new ones (or these)."""
        self.student.train()
        optimizer: Any = self.optimizers()
        optimizer = optimizer[0] if isinstance(optimizer, list) else optimizer
        sums: list[Tensor] = []
        for _ in range(self.student_steps):
            drawn = self._draw(images)
            kept = self.like_input(drawn.images)
            x = kept if self.views is not None else self.augment(kept)
            if drawn.logits is None or x is not kept or self.losses:
                (teacher,) = self.teach(x, [0])
            else:
                teacher = Knowledge(drawn.logits)
            for loss in self._losses():
                loss.before([teacher], (0,))
            student = self.learn(x)
            apart = self._apart(student.logits, teacher.logits)
            value = (apart if drawn.weights is None else drawn.weights * apart).mean()
            if self.memory is not None:
                with torch.no_grad():
                    self.memory.update(
                        drawn, kl_divergence(student.logits.detach(), teacher.logits)
                    )
            total = value
            if self.losses:
                losses = dict(zip(self.losses, self._losses(), strict=True))
                more, _ = lesson(student, [teacher], (0,), losses, self.weighting, None)
                total = total + torch.stack(list(more.values())).sum()
            self.descend(optimizer, total, self.trained())
            sums.append(total.detach())
        return {"distil": torch.stack(sums).mean()}

    # ------------------------------------------------------------------ parts

    def _draw(self, images: Tensor) -> Drawn:
        if self.memory is not None:
            return self.memory.sample(self.batch_size, self._random)
        if not self.reuse:
            assert self.input_shape is not None
            images = self.source.draw(self.batch_size, self.input_shape, self._random)
        return Drawn(torch.empty(0), images)

    def _apart(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of each sample, shape (B,)."""
        if self.distance == "kl":
            t = self.temperature
            return t**2 * kl_divergence(student, teacher, t, t)
        return logit_l1(student, teacher) if self.distance == "l1" else logit_mse(student, teacher)

    def _begin_round(self) -> None:
        """Random numbers depend on the seed, the round and the process alone."""
        assert self.seed is not None
        if self._random.device != self.device:
            self._random = torch.Generator(self.device)
        # without its own backward pass DDP does not do it
        broadcast_buffers(self.student, self.source)
        self._random.manual_seed(mixed_seed(self.seed, self.rounds, self.global_rank))
        if self.rounds in self.reset_rounds:
            # equal in all processes, unlike the images
            self.source.reset(seeded(self.seed, self.rounds, device=self.device))

    # ------------------------------------------------------------------ Lightning's hooks

    def on_fit_start(self) -> None:
        """Find the memory, and agree on a seed."""
        super().on_fit_start()
        callbacks: list[Any] = list(self.trainer.callbacks)  # type: ignore[attr-defined]
        self.memory = next((c for c in callbacks if isinstance(c, Remembers)), None)
        if self.memory is None and self.views is not None:
            raise ValueError("Expected the callback ReplayBuffer with views, which it remembers.")
        if self.memory is None and not self.reuse and self.source.slow:
            raise ValueError(
                f"Expected the callback ReplayBuffer (or reuse=True) with "
                f"{type(self.source).__name__}, which cannot draw images at once."
            )
        # of a checkpoint that was only loaded, nothing but the weights goes on
        if self.trainer.ckpt_path is not None and self._saved is not None:
            self.rounds, self.seed = self._saved["rounds"], self._saved["seed"]
            seen = self._saved["seen"]
            if len(seen) == world_size():  # else all go on with what the first has seen
                for name, state in seen[self.global_rank].items():
                    self.terms[name].set_extra_state(state)
        self._saved = None
        self.seed = self.common_seed(self.seed)

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
        """Keep the number of rounds, the seed, and what terms have seen."""
        super().on_save_checkpoint(checkpoint)
        # the state holds what the first process has seen of its images, not the others
        stateful = nn.Module.get_extra_state
        seen = {
            name: term.get_extra_state()
            for name, term in self._named()
            if world_size() > 1 and type(term).get_extra_state is not stateful
        }
        checkpoint["data_free"] = {
            "rounds": self.rounds, "seed": self.seed, "seen": gather_objects(seen),
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        super().on_load_checkpoint(checkpoint)
        self._saved = checkpoint["data_free"]

    def samples_in(self, batch: Any) -> int:
        """Images that the student learns from in one round."""
        return self.student_steps * self.batch_size
