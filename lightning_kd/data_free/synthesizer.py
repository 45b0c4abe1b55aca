from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_kd.data_free.generators import BaseGenerator
from lightning_kd.data_free.image_losses import ImageLoss, ImageLossInputs
from lightning_kd.data_free.image_losses.base import Unread, image_losses_by_name
from lightning_kd.data_free.statistics import InputStatistics
from lightning_kd.data_free.targets import RandomLabels, Targets
from lightning_kd.distillation import Distillation
from lightning_kd.distributed import average_gradients
from lightning_kd.functional import crop_and_flip
from lightning_kd.outputs import NetworkOutput


class ImageSynthesizer(nn.Module):
    """Makes images that a teacher recognizes: the first half of a data-free round.

    Args:
        generator: Makes the images.
        image_losses: What images should be like, each with its weight: a list, or a mapping of
            names.
        targets: What the teacher is meant to predict for them; ``None``: ``RandomLabels``.
        images: Images per round.
        steps: Steps of the generator per round.
        crop_padding: Random crops of all images after padding by this many pixels; 0: none.
        flip: Random horizontal flips, likewise.

    Raises:
        TypeError: If a part is of the wrong type.
    """

    def __init__(
        self,
        generator: BaseGenerator,
        image_losses: Mapping[str, ImageLoss] | Sequence[ImageLoss],
        targets: Targets | None = None,
        round_images: int = 256,
        generator_steps: int = 2,
        crop_padding: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__()
        targets = RandomLabels() if targets is None else targets
        for name, part, kind in (
            ("generator", generator, BaseGenerator),
            ("targets", targets, Targets),
        ):
            if not isinstance(part, kind):
                got = (
                    f"{part.__name__}, the class" if isinstance(part, type) else type(part).__name__
                )
                if name == "generator" and isinstance(part, nn.Module):
                    got += ": wrap it in Generator or MetaGenerator"
                raise TypeError(f"Expected {name} of type {kind.__name__}, got {got}.")
        self.generator, self.targets = generator, targets
        self.image_losses = nn.ModuleDict(image_losses_by_name(image_losses))
        self.round_images, self.generator_steps, self.crop_padding, self.flip = (
            round_images,
            generator_steps,
            crop_padding,
            flip,
        )
        self._statistics: InputStatistics | None = None
        #: images of the last round, shape (B, C, H, W); None before the first
        self.latest: Tensor | None = None

    def build(self, distillation: Distillation, x: Tensor) -> None:
        """Inspect the teacher, and size what depends on the images (B, C, H, W).

        Raises:
            ValueError: If the teacher does not know all classes.
        """
        teacher = distillation.teachers[0]
        if teacher.classes is not None:
            raise ValueError(
                "Expected a teacher that knows all classes, got one that knows only some: images "
                "of the others cannot be made. Give its network itself and a student with as many "
                "classes."
            )
        self._statistics = InputStatistics(teacher.network)
        self.targets.attach(teacher.network)
        readers = [
            name
            for name, loss in self.named_losses()
            if loss.reads_statistics or loss.reads_descriptions
        ]
        if readers and not self._statistics.layers:
            warnings.warn(
                f"The teacher has no BatchNorm layers with statistics, so {', '.join(readers)} is "
                f"left out: images may be poor.",
                stacklevel=2,
            )
            for name in readers:
                del self.image_losses[name]
        if any(loss.reads_descriptions for _, loss in self.named_losses()):
            with torch.no_grad():
                like = self._describe(distillation, x[:1]).to(x.dtype)
            for _, loss in self.named_losses():
                loss.build(like)
        layers = distillation.teacher_layers(0)
        layers += [layer for _, loss in self.named_losses() for layer in loss.teacher_layers()]
        teacher.record_layers(layers)

    def named_losses(self) -> Iterator[tuple[str, ImageLoss]]:
        """Image losses and their names."""
        for name, loss in self.image_losses.items():
            assert isinstance(loss, ImageLoss)
            yield name, loss

    def make_optimizers(self) -> dict[str, Optimizer]:
        """Optimizers of the generator and of the image losses' own parameters, if any."""
        groups = [
            {"params": learned, "lr": loss.learning_rate}
            for _, loss in self.named_losses()
            if (learned := [p for p in loss.parameters() if p.requires_grad])
        ]
        own = {
            "generator": self.generator.make_optimizer(),
            "image_losses": torch.optim.Adam(groups) if groups else None,
        }
        return {name: optimizer for name, optimizer in own.items() if optimizer is not None}

    def synthesize(
        self,
        distillation: Distillation,
        optimizers: Mapping[str, Optimizer],
        num_classes: int,
        class_share: Tensor | None,
        student_waits: bool,
        random: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Make the images of a round.

        Args:
            distillation: Student and teacher.
            optimizers: Those of ``make_optimizers``.
            num_classes: K.
            class_share: Share of each class in the memory, (K,); ``None`` without one.
            student_waits: Whether the student is not training yet: losses that need it are skipped.
            random: Random numbers of this round.

        Returns:
            Images (B, C, H, W) with the lowest loss, and the last step's losses by name.
        """
        assert distillation.input_shape is not None
        self.generator.start_round(self.round_images, distillation.input_shape, random)
        target = self.targets.sample(self.round_images, num_classes, random)
        optimizer = optimizers.get("generator")
        loss_optimizer = optimizers.get("image_losses")
        learned = [p for p in self.image_losses.parameters() if p.requires_grad]
        best, least = torch.empty(0), torch.empty(0)
        losses: dict[str, Tensor] = {}
        for step in range(self.generator_steps):
            images = self.generator()
            losses = self.compute_losses(
                distillation, images, target, class_share, student_waits, random
            )
            loss = torch.stack(list(losses.values())).sum() if losses else None
            now = images.detach()
            if loss is None:  # noise, without image losses
                best = now
                continue
            # on the device, since a comparison in Python would wait for it
            best = now if step == 0 else torch.where(loss < least, now, best)
            least = loss.detach() if step == 0 else torch.minimum(loss.detach(), least)
            if loss_optimizer is not None and loss.requires_grad:
                loss_optimizer.zero_grad()
                torch.autograd.backward(loss, inputs=learned, retain_graph=True)
                average_gradients(learned)
            self.generator.step(loss, optimizer)
            if loss_optimizer is not None:  # not before, since both need the same weights
                loss_optimizer.step()
        self.generator.end_round(optimizer)
        self.latest = best
        return best, losses

    @torch.no_grad()
    def after_round(self, distillation: Distillation, images: Tensor) -> None:
        """Pass the images of a round that are kept, (B, C, H, W), to the image losses."""
        for _, loss in self.named_losses():
            loss.after_round(images, lambda other: self._describe(distillation, other))

    def compute_losses(
        self,
        distillation: Distillation,
        images: Tensor,
        target: Tensor | None,
        class_share: Tensor | None,
        student_waits: bool,
        random: torch.Generator,
    ) -> dict[str, Tensor]:
        """Weighted image losses by name, for images (B, C, H, W) with gradient."""
        active = {
            name: loss for name, loss in self.named_losses() if not (student_waits and loss.waits)
        }
        if not active:
            return {}
        if images.shape[1:] != distillation.input_shape:
            raise ValueError(
                f"Expected images of shape {distillation.input_shape}, which the teacher takes, "
                f"got {tuple(images.shape[1:])} from {type(self.generator).__name__}: build its "
                f"network for that shape."
            )
        images = self.augment(images, random)
        assert self._statistics is not None
        statistics: Any = Unread("statistics", "reads_statistics")
        descriptions: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if any(loss.reads_statistics for loss in active.values()):
                statistics = stack.enter_context(self._statistics.measured())
            if any(loss.reads_descriptions for loss in active.values()):
                descriptions = stack.enter_context(self._statistics.described())
            teacher: NetworkOutput = distillation.teachers[0](images)
        student: Any = Unread("student", "reads_student")
        if any(loss.reads_student for loss in active.values()):
            student = distillation.student_output(images)
        if target is None:
            target = teacher.logits.detach().argmax(1)
        inputs = ImageLossInputs(
            images, target, teacher, student, statistics, class_share,
            torch.cat(descriptions, 1) if descriptions else None,
            lambda other: self._describe(distillation, other), random,
        )  # fmt: skip
        return {name: loss.weight * _scalar(name, loss, inputs) for name, loss in active.items()}

    def augment(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Random crops and flips of images (B, C, H, W), differentiable; unchanged if unset."""
        if not (self.crop_padding or self.flip):
            return images
        draws = torch.rand(len(images), 3, generator=random, device=images.device)
        return crop_and_flip(images, draws, self.crop_padding, self.flip)

    def _describe(self, distillation: Distillation, images: Tensor) -> Tensor:
        assert self._statistics is not None
        with self._statistics.described() as found:
            distillation.teachers[0](images)
        return torch.cat(found, 1)


def _scalar(name: str, loss: ImageLoss, inputs: ImageLossInputs) -> Tensor:
    value: Any = loss(inputs)
    if not isinstance(value, Tensor) or value.dim():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"Expected a scalar tensor of image loss {name}, got {got}: return the mean over "
            f"images."
        )
    if inputs.images.requires_grad and not value.requires_grad:
        raise ValueError(
            f"Expected an image loss that depends on the images, but no gradient reaches them from "
            f"{name}: compute it from inputs.images, inputs.teacher or whatever else it reads."
        )
    return value


def synthesizer_of(module: nn.Module, who: str) -> ImageSynthesizer:
    """The part of a module that makes its images.

    Raises:
        TypeError: If there is none; ``who`` needs it.
    """
    synthesizer = getattr(module, "synthesizer", None)
    if not isinstance(synthesizer, ImageSynthesizer):
        raise TypeError(
            f"{who} expected a module that synthesizes images, such as DataFree, got "
            f"{type(module).__name__}."
        )
    return synthesizer
