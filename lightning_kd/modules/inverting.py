from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_kd.adapters import InputStatistics
from lightning_kd.functional.augment import crop_and_flip
from lightning_kd.inversion import InversionTerm, Inverted
from lightning_kd.inversion.base import Unread, terms_by_name
from lightning_kd.knowledge import Knowledge
from lightning_kd.modules.dry_run import ask
from lightning_kd.modules.manual import ManualSteps
from lightning_kd.modules.one_student import OneStudent
from lightning_kd.ranks import average_gradients
from lightning_kd.replay import Remembers
from lightning_kd.sources import ImageSource, RandomLabels, Targets


class Inverting(ManualSteps, OneStudent):
    """The first paragraph of ``DataFree``: images are made that a teacher knows something about."""

    round_images: int
    source_steps: int
    crop_padding: int
    flip: bool

    def take_source(
        self, source: ImageSource, terms: Sequence[InversionTerm], targets: Targets | None
    ) -> None:
        """Take over what makes images; call it once, after ``take``."""
        for name, part, kind in (
            ("source", source, ImageSource),
            ("targets", targets or RandomLabels(), Targets),
            ("terms", terms, list),
        ):
            if not isinstance(part, kind):
                got = (
                    f"{part.__name__}, the class" if isinstance(part, type) else type(part).__name__
                )
                if name == "source" and isinstance(part, nn.Module):
                    got += ": wrap it in Generator or MetaGenerator"
                raise TypeError(f"Expected {name} of type {kind.__name__}, got {got}.")
        self.source, self.targets = source, targets or RandomLabels()
        self.terms = nn.ModuleDict(terms_by_name(terms))
        self.memory: Remembers | None = None
        self._random = torch.Generator()
        self._share: Tensor | None = None
        self._statistics: InputStatistics | None = None
        self._learning: list[str] = []  # parts with an optimizer beside the student's, in order

    @property
    def warming_up(self) -> bool:
        """Whether the student does not learn yet."""
        raise NotImplementedError

    def invert(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Make the images of a round: those of the least loss, and the last loss's terms."""
        self.student.eval()
        optimizer, wishing = self._own_optimizer("source"), self._own_optimizer("terms")
        learned = [p for p in self.terms.parameters() if p.requires_grad]
        assert self.input_shape is not None
        self.source.begin(self.round_images, self.input_shape, self._random)
        assert self.num_classes is not None
        target = self.targets.draw(self.round_images, self.num_classes, self._random)
        # the memory does not change within a round, and asking it talks to all processes
        self._share = self.memory.class_share() if self.memory is not None else None
        best, least = torch.empty(0), torch.empty(0)
        terms: dict[str, Tensor] = {}
        with self.full_precision_if_scaled():
            for step in range(self.source_steps):
                images = self.source()
                terms = self.judge(images, target)
                loss = torch.stack(list(terms.values())).sum() if terms else None
                now = images.detach()
                if loss is None:  # nobody judges noise
                    best = now
                    continue
                # on the device: asking which is better would wait for it
                best = now if step == 0 else torch.where(loss < least, now, best)
                least = loss.detach() if step == 0 else torch.minimum(loss.detach(), least)
                if wishing is not None and loss.requires_grad:
                    wishing.zero_grad()
                    torch.autograd.backward(loss, inputs=learned, retain_graph=True)
                    average_gradients(learned)
                self.source.descend(loss, optimizer)
                if wishing is not None:  # not before, since both need the same weights
                    wishing.step()
        self.source.end(optimizer)
        with torch.no_grad():
            for _, term in self._named():
                term.after_round(best, self._describe)
        return best, {f"invert/{name}": value.detach() for name, value in terms.items()}

    def judge(self, images: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Weighted terms of the source's loss by name, for images (B, C, H, W) with gradient."""
        asked = {n: t for n, t in self._named() if not (self.warming_up and t.waits)}
        if not asked:
            return {}
        if images.shape[1:] != self.input_shape:
            raise ValueError(
                f"Expected images of shape {self.input_shape}, which the teacher takes, got "
                f"{tuple(images.shape[1:])} from {type(self.source).__name__}: build its network "
                f"for that shape."
            )
        looked = self.augment(images)
        assert self._statistics is not None
        found: Any = Unread("statistics", "reads_statistics")
        parts: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if any(term.reads_statistics for term in asked.values()):
                found = stack.enter_context(self._statistics.measured())
            if any(term.reads_descriptions for term in asked.values()):
                parts = stack.enter_context(self._statistics.described())
            teacher: Knowledge = self.teachers[0](looked)
        student: Any = Unread("student", "reads_student")
        if any(term.reads_student for term in asked.values()):
            student = self.learn(looked)
        if target is None:
            target = teacher.logits.detach().argmax(1)
        seen = Inverted(
            looked, target, teacher, student, found, self._share,
            torch.cat(parts, 1) if parts else None, self._describe, self._random,
        )  # fmt: skip
        return {name: term.weight * self._scalar(name, term, seen) for name, term in asked.items()}

    @staticmethod
    def _scalar(name: str, term: InversionTerm, seen: Inverted) -> Tensor:
        value: Any = term(seen)
        if not isinstance(value, Tensor) or value.dim():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"Expected a scalar tensor of term {name}, got {got}: return the mean over images."
            )
        if seen.images.requires_grad and not value.requires_grad:
            raise ValueError(
                f"Expected a term that depends on the images, but no gradient reaches them from "
                f"{name}: compute it from seen.images, seen.teacher or what else it reads."
            )
        return value

    def augment(self, images: Tensor) -> Tensor:
        """Random crops and flips of images (B, C, H, W), differentiable; themselves if unasked."""
        if not (self.crop_padding or self.flip):
            return images
        draws = torch.rand(len(images), 3, generator=self._random, device=images.device)
        return crop_and_flip(images, draws, self.crop_padding, self.flip)

    def _describe(self, images: Tensor) -> Tensor:
        assert self._statistics is not None
        with self._statistics.described() as found:
            self.teachers[0](images)
        return torch.cat(found, 1)

    def _own_optimizer(self, part: str) -> torch.optim.Optimizer | None:
        """That of the source or the terms, if it has one; Lightning does not count its steps."""
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        return optimizers[1 + self._learning.index(part)] if part in self._learning else None

    def _named(self) -> list[tuple[str, InversionTerm]]:
        return [(n, t) for n, t in self.terms.items() if isinstance(t, InversionTerm)]

    # ------------------------------------------------------------------ Lightning's hooks

    def prepare(self, x: Tensor) -> None:
        """Size what must be sized from a dry run on images (B, C, H, W); once.

        Raises:
            ValueError: If a network cannot take these images, or the numbers of classes differ.
        """
        if self.prepared:
            return
        super().prepare(x)
        (teacher,) = self._teachers()
        if teacher.classes is not None:
            raise ValueError(
                "Expected a teacher that knows all classes, got one that knows some only: images "
                "of the others cannot be made. Give its network itself and a student of as many "
                "classes."
            )
        self._statistics = InputStatistics(teacher.network)
        self.targets.attach(teacher.network)
        readers = [n for n, t in self._named() if t.reads_statistics or t.reads_descriptions]
        if readers and not self._statistics.layers:
            rank_zero_warn(
                f"The teacher has no BatchNorm layers with statistics, so {', '.join(readers)} is "
                f"left out: images may be poor."
            )
            for name in readers:
                del self.terms[name]
        if any(term.reads_descriptions for _, term in self._named()):
            with torch.no_grad():
                like = self._describe(x[:1]).to(x.dtype)
            for _, term in self._named():
                term.build(like)
        layers = [n for loss in self._losses() for n in loss.teacher_layers(0)]
        layers += [n for _, term in self._named() for n in term.teacher_layers()]
        teacher.listen(layers)
        if self.num_classes is None:
            answer = ask("the student", self.student, self.learn, x)
            self.num_classes = answer.logits.shape[1]

    def configure_optimizers(self) -> Any:
        """The student's optimizer, then the source's and that of the terms, if they have one."""
        first: Any = super().configure_optimizers()
        first = first if isinstance(first, dict) else {"optimizer": first}
        groups = [
            {"params": learned, "lr": term.learning_rate}
            for _, term in self._named()
            if (learned := [p for p in term.parameters() if p.requires_grad])
        ]
        own = {
            "source": self.source.make_optimizer(),
            "terms": torch.optim.Adam(groups) if groups else None,
        }
        made = {name: {"optimizer": each} for name, each in own.items() if each is not None}
        self._learning = list(made)
        return [first, *made.values()]
