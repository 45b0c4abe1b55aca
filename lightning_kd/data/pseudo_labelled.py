from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_kd.data.base import ImageData
from lightning_kd.data.batches import NUM_DRAWS, Batches, Order
from lightning_kd.data.pseudo_labels import read_pseudo_labels
from lightning_kd.functional import balanced_labels, is_labelled
from lightning_kd.utils.checks import check_one_of
from lightning_kd.utils.seeds import seeded


class PseudoLabelled(LightningDataModule):
    """Labelled images, and unlabelled ones with pseudo-labels from a teacher.

    The last step of data distillation: ``PseudoLabels`` has written the labels, and any module
    learns from them as from true ones. Each batch has a fixed share of both; an epoch is one pass
    over the pseudo-labelled images, the labelled ones repeat as often as needed. Batches reach the
    module as (images, labels), labels (B,), or (B, K) if they are soft.

    Args:
        data: Images, of which some have no label (``labelled_fraction``).
        folder: Where ``PseudoLabels`` wrote its files.
        labels: ``"hard"``: the most probable class of the most confident images, in the class
            proportions of the labelled images, the others are left out; ``"soft"``: probabilities
            of all images.
        share: Share of pseudo-labelled images in each batch, in (0, 1).

    Raises:
        ValueError: If ``labels`` or ``share`` is invalid.

    Source:
        Radosavovic et al. 2018, https://arxiv.org/abs/1712.04440, sections 3.3 and 3.4 (hard
        labels; share 0.4).
    """

    def __init__(
        self,
        data: ImageData,
        folder: str,
        labels: Literal["hard", "soft"] = "hard",
        share: float = 0.4,
    ) -> None:
        super().__init__()
        check_one_of(labels, ("hard", "soft"), "labels")
        if not 0 < share < 1:
            raise ValueError(f"Expected share between 0 and 1, got {share}.")
        if data.teacher_cache is not None:
            raise ValueError("Expected data without teacher_cache under PseudoLabelled, got one.")
        self.data, self.folder, self.labels, self.share = data, Path(folder), labels, share
        self.num_classes, self.image_shape = data.num_classes, data.image_shape
        self.targets: Tensor | None = None

    def prepare_data(self) -> None:
        """Fetch the images."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Read images and pseudo-labels."""
        self.data.trainer = self.trainer
        self.data.setup(stage)
        if stage == "fit" and self.targets is None:
            self.targets = self._labelled()

    def _labelled(self) -> Tensor:
        _, known = self.data.training
        probabilities = read_pseudo_labels(self.folder, self.data.fingerprint())
        if probabilities.shape[1] != self.num_classes:
            raise ValueError(
                f"Expected pseudo-labels of {self.num_classes} classes in {self.folder}, got "
                f"{probabilities.shape[1]}."
            )
        hidden = known < 0
        if hidden.all() or not hidden.any():
            raise ValueError(
                f"Expected images with and without a label, got {int((~hidden).sum())} with and "
                f"{int(hidden.sum())} without: set labelled_fraction, and keep_unlabelled true."
            )
        one_hot = F.one_hot(known.clamp(min=0), self.num_classes).float()
        if self.labels == "soft":
            return torch.where(hidden[:, None], probabilities, one_hot)
        found = known.clone()
        found[hidden] = balanced_labels(probabilities[hidden], one_hot[~hidden].sum(0))
        return found

    def train_dataloader(self) -> Batches:
        """Shuffled batches of (images, labels, random draws)."""
        if self.targets is None:
            raise RuntimeError("PseudoLabelled has no data yet: call setup('fit') first.")
        images, known = self.data.training
        usable = is_labelled(self.targets)
        order = TwoKinds(
            (known >= 0).nonzero()[:, 0],
            ((known < 0) & usable).nonzero()[:, 0],
            self.data.batch_size,
            self.share,
            seed=lambda: self.data.shuffle_seed or 0,
            **self.data.processes(),
        )
        source = (images, self.targets)
        return Batches(order, lambda plan: self.data.fetch(source, plan), train=True)

    def val_dataloader(self) -> Any:
        """Held-out images."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Test images."""
        return self.data.test_dataloader()

    def predict_dataloader(self) -> Any:
        """As in the images' data module."""
        return self.data.predict_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scale and augment, as the images' data module does."""
        return self.data.on_after_batch_transfer(batch, dataloader_idx)

    def state_dict(self) -> dict[str, Any]:
        """The seed of the shuffle."""
        return self.data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seed of the run that is resumed."""
        self.data.load_state_dict(state_dict)


class TwoKinds(Order):
    """Batches that have a fixed number of samples of each of two kinds.

    An epoch is one pass over the second kind; the first repeats, reshuffled, as often as needed.

    Args:
        first: Indices of the first kind.
        second: Indices of the second kind.
        batch_size: Samples per batch and rank.
        share: Of the second kind in each batch.
        seed: Returns the seed when an epoch starts.
        rank: Of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If a batch has no room for one kind, or there are too few of the second.
    """

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        batch_size: int,
        share: float,
        seed: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        count = round(share * batch_size)
        super().__init__(len(second), count, True, seed, True, rank, world_size)
        if not 0 < count < batch_size:
            raise ValueError(
                f"Expected batches that hold both kinds of images, got share {share} of "
                f"{batch_size}: raise batch_size."
            )
        if len(second) < count * world_size:
            raise ValueError(
                f"Expected at least {count * world_size} pseudo-labelled images for one batch of "
                f"{world_size} processes, got {len(second)}: lower batch_size or share."
            )
        self.first, self.second, self.others = first, second, batch_size - count

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``Order``; samples of the first kind come first in each batch."""
        step_size = self.others * self.world_size
        rounds = -(-len(self) * step_size // len(self.first))
        seed = self.seed()
        again = [
            torch.randperm(len(self.first), generator=seeded(seed, self.epoch, number, 1))
            for number in range(rounds)
        ]
        stream = self.first[torch.cat(again)]
        own = slice(self.rank * self.others, (self.rank + 1) * self.others)
        for step, (places, draws) in enumerate(super().batches(start), start):
            chosen = stream[step * step_size : (step + 1) * step_size][own]
            random = seeded(seed, self.epoch, step, 2)
            more = torch.rand(step_size, NUM_DRAWS, generator=random)[own]
            yield torch.cat([chosen, self.second[places]]), torch.cat([more, draws])
