from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_kd.data.batches import NUM_DRAWS, Batches, Order, as_bits
from lightning_kd.functional import crop_and_flip
from lightning_kd.teachers import TeacherCache
from lightning_kd.utils.seeds import seeded

Labelled = tuple[Tensor, Tensor]


class ImageData(LightningDataModule):
    """Images held in memory as one uint8 tensor; batches are sliced from it, without workers.

    Batches reach the module as (images in [0, 1], labels), shape (B, C, H, W) and (B,); -1 means
    "unlabelled". Shuffle and augmentation depend on (seed, epoch, step) alone, so a resumed run
    continues as if it had never stopped. A subclass defines ``load``, ``num_classes`` and
    ``image_shape``.

    Args:
        root: Folder of the data; ``None``: the variable LIGHTNING_KD_DATA, else ``data``.
        batch_size: Images per batch and process.
        val_split: Held out of the training images for validation: a fraction below 1, or a count.
        subset: Use only this many training images: a fraction up to 1, or a count; ``None``: all.
        labelled_fraction: Share of each class whose labels are kept; the others become -1.
        keep_unlabelled: Keep images without a label in training; a baseline leaves them out.
        crop_padding: Random crops after padding by this many pixels; 0: none.
        flip: Random horizontal flips.
        drop_last: Drop a last training batch that is not full.
        download: Fetch the data if it is not there.
        split_seed: Chooses validation images, subset and labelled images; not the run's seed.
        classes: Keep these classes only, renumbered in this order, for an expert on some classes
            (``lightning_kd.Teacher`` then takes the same list); ``None``: all.
        predict_split: Images that ``predict`` runs on: ``"test"``, or ``"train"``, in order and
            without augmentation (for ``PseudoLabels``).
        teacher_cache: Run the teachers of ``MultiTeacher`` once for each training image and
            view; ``None``: at each step.

    Raises:
        ValueError: If a number is out of its range.
    """

    num_classes: int
    image_shape: tuple[int, int, int]

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        val_split: float = 0.1,
        subset: float | None = None,
        labelled_fraction: float = 1.0,
        keep_unlabelled: bool = True,
        crop_padding: int = 0,
        flip: bool = False,
        drop_last: bool = False,
        download: bool = True,
        split_seed: int = 0,
        classes: list[int] | None = None,
        predict_split: Literal["test", "train"] = "test",
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1, got {batch_size}.")
        if val_split < 0:
            raise ValueError(f"Expected val_split >= 0, got {val_split}.")
        if crop_padding < 0:
            raise ValueError(f"Expected crop_padding >= 0, got {crop_padding}.")
        if subset is not None and subset <= 0:
            raise ValueError(f"Expected subset > 0 or null, got {subset}.")
        if not 0 <= labelled_fraction <= 1:
            raise ValueError(f"Expected labelled_fraction from 0 to 1, got {labelled_fraction}.")
        self.root = Path(root or os.environ.get("LIGHTNING_KD_DATA") or "data").expanduser()
        self.batch_size, self.val_split, self.subset = batch_size, val_split, subset
        self.labelled_fraction, self.keep_unlabelled = labelled_fraction, keep_unlabelled
        self.crop_padding, self.flip, self.drop_last = crop_padding, flip, drop_last
        self.download, self.split_seed = download, split_seed
        self.classes = classes
        self.predict_split, self.teacher_cache = predict_split, teacher_cache
        if classes is not None:
            known = range(self.num_classes)
            if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(known):
                raise ValueError(
                    f"Expected distinct classes from 0 to {self.num_classes - 1}, got {classes}."
                )
            self.num_classes = len(classes)
        self.shuffle_seed: int | None = None
        self._train: Labelled | None = None
        self._val: Labelled | None = None
        self._test: Labelled | None = None

    @abstractmethod
    def load(self, train: bool) -> Labelled:
        """Read the training or test images: uint8 (N, C, H, W) and int64 labels (N,)."""

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Read and split what ``stage`` needs; later calls reuse it."""
        predicted = "fit" if self.predict_split == "train" else "test"
        part = predicted if stage == "predict" else stage
        if part in ("fit", "validate") and self._train is None:
            self._train, self._val = self._split(*self._checked(True))
        if part == "test" and self._test is None:
            self._test = self._checked(False)
        if stage == "fit" and self.shuffle_seed is None:
            seed = torch.initial_seed() % 2**31
            self.shuffle_seed = self.trainer.strategy.broadcast(seed) if self.trainer else seed

    def train_dataloader(self) -> Batches:
        """Shuffled batches of (images, labels, random draws)."""
        return self._batches(self._train, train=True)

    def val_dataloader(self) -> Batches | list[Any]:
        """Held-out training images in order; nothing if ``val_split`` is 0."""
        return self._batches(self._val) if self._val and len(self._val[1]) else []

    def test_dataloader(self) -> Batches:
        """Test images in order."""
        return self._batches(self._test)

    def predict_dataloader(self) -> Batches:
        """Test or training images in order, by ``predict_split``."""
        return self._batches(self._train if self.predict_split == "train" else self._test)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scale to [0, 1] and augment, on the device and for the whole batch at once."""
        images, labels, *bits = batch
        cached = bits[1:]
        if bits and (self.crop_padding or self.flip):
            draws = bits[0].view(torch.float32)
            images = crop_and_flip(images, draws, self.crop_padding, self.flip)
        images = images.float().div_(255)
        if self.trainer is not None:  # Lightning converted the batch while it was still integers
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels, *cached

    def state_dict(self) -> dict[str, Any]:
        """The seed of the shuffle, so that a resumed run keeps the order."""
        return {"shuffle_seed": self.shuffle_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seed of the run that is resumed."""
        self.shuffle_seed = state_dict["shuffle_seed"]

    # ------------------------------------------------------------------ parts

    @property
    def training(self) -> Labelled:
        """Training images and their labels, -1 where hidden; after ``setup("fit")``."""
        if self._train is None:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call setup('fit') first.")
        return self._train

    def fingerprint(self) -> str:
        """Hash of the training images and labels in their order."""
        images, labels = self.training
        found = hashlib.sha256(labels.numpy().tobytes())
        found.update(self.content(images))
        return found.hexdigest()

    def content(self, images: Any) -> bytes:
        """Bytes that identify the images, for ``fingerprint``."""
        found: bytes = images.numpy().tobytes()
        return found

    def fetch(self, source: Labelled, plan: Iterator[Tensor]) -> Iterator[Labelled]:
        """Yield (images, labels) for each tensor of indices in ``plan``."""
        images, labels = source
        for indices in plan:
            yield images[indices], labels[indices]

    def processes(self) -> dict[str, int]:
        """Number of this process and of all, as ``Order`` takes them."""
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        return {"rank": share.get("rank", 0), "world_size": share.get("num_replicas", 1)}

    def _batches(self, source: Labelled | None, train: bool = False) -> Batches:
        if source is None:
            raise RuntimeError(
                f"{type(self).__name__} has no data yet: call setup('fit') or setup('test') first."
            )
        order = Order(
            len(source[1]),
            self.batch_size,
            shuffle=train,
            seed=lambda: self.shuffle_seed or 0,
            drop_last=self.drop_last,
            **self.processes(),
        )
        ranks = order.world_size
        if not len(order) or len(source[1]) < ranks:
            raise ValueError(
                f"Expected at least one batch for each of {ranks} processes, got "
                f"{len(source[1])} images for batches of {self.batch_size} with "
                f"drop_last={self.drop_last}."
            )
        return Batches(
            order,
            lambda plan: self.fetch(source, plan),
            train,
            self._seen_by_teachers if train and self.teacher_cache is not None else None,
        )

    def _seen_by_teachers(self, indices: Tensor, epoch: int) -> tuple[Tensor, ...]:
        """Draws of this epoch's view of these images, and cached teacher outputs for it."""
        cache = self.teacher_cache
        assert cache is not None
        view = epoch % cache.views
        draws = as_bits(cache.draws(view, len(self.training[1]), NUM_DRAWS)[indices])
        return (draws, as_bits(cache.read(view, indices))) if cache.ready else (draws,)

    def views(self, plan: list[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor, Any]]:
        """Yield view, indices and raw batch for each view and indices (B,) of training images."""
        cache = self.teacher_cache
        assert cache is not None
        batches = self.fetch(self.training, (indices for _, indices in plan))
        for (view, indices), batch in zip(plan, batches, strict=True):
            draws = cache.draws(view, len(self.training[1]), NUM_DRAWS)[indices]
            yield view, indices, (*batch, as_bits(draws))

    def _checked(self, train: bool) -> Labelled:
        images, labels = self.load(train)
        name = f"{type(self).__name__} ({'training' if train else 'test'} images)"
        if not len(labels):
            raise ValueError(f"Expected images in {name}, found none under {self.root}.")
        low, high = int(labels.min()), int(labels.max())
        known = self.num_classes if self.classes is None else type(self).num_classes
        if low < -1 or high >= known:
            raise ValueError(
                f"Expected labels of {name} from 0 to {known - 1}, or -1 for unlabelled, got {low} "
                f"to {high}."
            )
        if self.classes is None:
            return images, labels
        numbers = torch.full((known + 1,), -1)  # the last entry is that of label -1
        numbers[self.classes] = torch.arange(len(self.classes))
        kept = (numbers[labels] >= 0).nonzero()[:, 0]
        return self.take(images, numbers[labels], kept)

    def _split(self, images: Any, labels: Tensor) -> tuple[Labelled, Labelled]:
        order = torch.randperm(len(labels), generator=seeded(self.split_seed))
        held = self._count(self.val_split, len(order), "val_split")
        if held >= len(order):
            raise ValueError(
                f"Expected val_split to leave images to train on, got {self.val_split} of "
                f"{len(order)}."
            )
        val, train = order[:held], order[held:]
        if self.subset is not None:
            train = train[: max(1, self._count(self.subset, len(train), "subset"))]
        hidden = labels.clone()
        hidden[train] = self._hide(labels[train])
        if not self.keep_unlabelled:
            train = train[hidden[train] >= 0]
        if not len(train):
            raise ValueError(
                "Expected training images, got none: no image has a label and keep_unlabelled is "
                "false."
            )
        return self.take(images, hidden, train), self.take(images, labels, val)

    def take(self, images: Any, labels: Tensor, indices: Tensor) -> Labelled:
        """Part of the data, in the given order."""
        return images[indices], labels[indices]

    def _hide(self, labels: Tensor) -> Tensor:
        """Keep the labels of the first share of each class, at least one, and hide the rest."""
        if self.labelled_fraction == 1:
            return labels
        classes = labels[:, None] == torch.arange(self.num_classes)
        rank = (classes.cumsum(0) - 1)[classes.any(1)].gather(1, labels[labels >= 0, None])[:, 0]
        quota = (classes.sum(0) * self.labelled_fraction).round()
        quota = quota.clamp(min=1) if self.labelled_fraction else quota
        hidden = labels.clone()
        known = hidden[labels >= 0]
        hidden[labels >= 0] = torch.where(rank < quota[known], known, -1)
        return hidden

    @staticmethod
    def _count(amount: float, total: int, name: str) -> int:
        count = (
            round(amount * total) if amount <= 1 and not isinstance(amount, int) else int(amount)
        )
        if count > total:
            raise ValueError(f"Expected {name} of at most {total} images, got {count}.")
        return count
