from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_kd.data_free.replay.samplers import Sampler


@dataclass(frozen=True)
class ReplayBatch:
    """A batch from a memory.

    Args:
        indices: Places in the memory, shape (B,).
        images: In [0, 1], shape (B, C, H, W).
        logits: The teacher's, from when they were stored, shape (B, K); ``None``: not computed.
        weights: Of each in the loss, shape (B,); ``None``: all the same.
    """

    indices: Tensor
    images: Tensor
    logits: Tensor | None = None
    weights: Tensor | None = None


@runtime_checkable
class ReplayMemory(Protocol):
    """What ``DataFree`` needs of a memory: ``lightning_kd.callbacks.ReplayBuffer``, or another."""

    def extend(self, images: Tensor, logits: Tensor, priorities: Tensor) -> None:
        """Remember images (B, C, H, W) with the teacher's logits (B, K) and priorities (B,)."""

    def sample(self, count: int, random: torch.Generator) -> ReplayBatch:
        """Draw a batch."""

    def update_priorities(self, batch: ReplayBatch, divergences: Tensor) -> None:
        """Report the student's divergences from its teacher on a batch, shape (B,)."""

    def class_share(self) -> Tensor:
        """Share of each class among the images of all processes, shape (K,); 0 if empty."""


class Memory:
    """A ring of images as bytes, with the teacher's logits, on one device.

    Args:
        capacity: Images to keep; ``None``: all, and the memory grows.
        sampler: How to draw.
        evict: What to drop when it is full: ``"oldest"`` or ``"lowest_priority"``.
        num_classes: K.
        device: Where it is kept.
    """

    def __init__(
        self,
        capacity: int | None,
        sampler: Sampler,
        evict: str,
        num_classes: int,
        device: torch.device,
    ) -> None:
        self.capacity, self.sampler, self.evict = capacity, sampler, evict
        self.size = self.position = 0
        self.counts = torch.zeros(num_classes, dtype=torch.float32, device=device)
        self.images = torch.empty(0, dtype=torch.uint8, device=device)
        self.logits = torch.empty(0, dtype=torch.float32, device=device)
        self.priorities = torch.empty(0, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return self.size

    def extend(self, images: Tensor, logits: Tensor, priorities: Tensor) -> None:
        """Remember a batch.

        Args:
            images: In [0, 1], shape (B, C, H, W); kept rounded to bytes.
            logits: Of the teacher on them, shape (B, K).
            priorities: Shape (B,).

        Raises:
            ValueError: If the batch is larger than the memory.
        """
        count = len(images)
        if self.capacity is not None and count > self.capacity:
            raise ValueError(
                f"Expected at most {self.capacity} images at once, the memory's capacity, got "
                f"{count}: raise capacity, or make fewer images (or views) per round."
            )
        self._make_room(images, logits)
        free = min(count, len(self.images) - self.size)
        device = self.counts.device
        fresh = torch.arange(self.size, self.size + free, device=device)
        evicted = self._evicted(count - free)
        self.counts.index_add_(0, self.logits[evicted].argmax(1), -torch.ones_like(evicted).float())
        places = torch.cat([fresh, evicted])
        self.images[places] = images_to_bytes(images)
        kept = logits.to(self.logits.dtype)  # rounding may change the class
        self.logits[places] = kept
        self.priorities[places] = priorities.to(self.priorities.dtype)
        self.counts.index_add_(
            0, kept.argmax(1), torch.ones(count, device=device, dtype=self.counts.dtype)
        )
        self.size += free

    def sample(self, count: int, random: torch.Generator) -> ReplayBatch:
        """Draw a batch with the sampler.

        Raises:
            ValueError: If the memory is empty.
        """
        if not self.size:
            raise ValueError("Expected images in the memory, got none: extend it first.")
        indices, weights = self.sampler(self.priorities[: self.size], count, random)
        images = images_from_bytes(self.images[indices])
        return ReplayBatch(indices, images, self.logits[indices], weights)

    def update_priorities(self, batch: ReplayBatch, divergences: Tensor) -> None:
        """Set the priorities of drawn images to their weighted divergences, shape (B,)."""
        if self.sampler.prioritizes and batch.weights is not None:
            self.priorities[batch.indices] = (batch.weights * divergences).to(self.priorities.dtype)

    def renew(self, distance: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
        """Set the priority of every image to its current divergence, ``count`` at a time.

        Args:
            distance: Divergences (B,) of images (B, C, H, W) and the teacher's logits (B, K).
            count: Images per call.
        """
        for start in range(0, self.size, count):
            rows = slice(start, min(start + count, self.size))
            found = distance(images_from_bytes(self.images[rows]), self.logits[rows])
            self.priorities[rows] = found.to(self.priorities.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Contents, place by place, and the place of the oldest."""
        rows = {n: getattr(self, n)[: self.size] for n in ("images", "logits", "priorities")}
        return {**rows, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load contents, of several memories one after the other.

        Raises:
            ValueError: If they do not fit.
        """
        self._check(state)
        images, logits = state["images"], state["logits"]
        if self.capacity is not None and len(images) > self.capacity:
            raise ValueError(
                f"Expected at most {self.capacity} remembered images, the memory's capacity, got "
                f"{len(images)} from the checkpoint: set capacity to that or more."
            )
        self.size, self.position = 0, state.get("position", 0)
        self.counts.zero_()
        if not len(images):
            return
        device = self.counts.device
        priorities = state["priorities"]
        if len(images) != self.capacity:  # there is room now, after the newest
            rows = (images, logits, priorities)
            images, logits, priorities = (row.roll(-self.position, 0) for row in rows)
            self.position = 0
        self._make_room(images, logits)
        self.size = len(images)
        self.images[: self.size] = images.to(device)
        self.logits[: self.size] = logits.to(device)
        self.priorities[: self.size] = priorities.to(device)
        classes = self.logits[: self.size].argmax(1)
        self.counts.index_add_(
            0, classes, torch.ones(self.size, device=device, dtype=self.counts.dtype)
        )

    # ------------------------------------------------------------------ parts

    def _check(self, state: dict[str, Any]) -> None:
        images, logits, priorities = (state.get(n) for n in ("images", "logits", "priorities"))
        if not isinstance(images, Tensor) or not len(images):
            return
        fits = (
            isinstance(logits, Tensor)
            and isinstance(priorities, Tensor)
            and images.dtype == torch.uint8
            and images.dim() == 4
            and logits.is_floating_point()
            and logits.shape == (len(images), len(self.counts))
            and priorities.is_floating_point()
            and priorities.shape == (len(images),)
            and bool(torch.isfinite(logits).all() and torch.isfinite(priorities).all())
            and isinstance(state.get("position", 0), int)
        )
        if not fits:
            raise ValueError(
                f"Expected remembered images (N, C, H, W) as bytes, finite logits (N, "
                f"{len(self.counts)}) and priorities (N,) in the checkpoint, got others: it is "
                f"damaged, or of another data set."
            )

    def _make_room(self, images: Tensor, logits: Tensor) -> None:
        wanted = self.capacity or self.size + len(images)
        if len(self.images) >= wanted:
            return
        if self.capacity is None:
            wanted = max(wanted, 2 * len(self.images))
        for name, like in (("images", images), ("logits", logits), ("priorities", logits[:, 0])):
            old = getattr(self, name)
            new = torch.zeros(wanted, *like.shape[1:], dtype=old.dtype, device=self.counts.device)
            if self.size:
                new[: self.size] = old[: self.size]
            setattr(self, name, new)

    def _evicted(self, count: int) -> Tensor:
        """Places to overwrite, found without waiting for the device."""
        if self.evict == "lowest_priority":
            return self.priorities[: self.size].topk(count, largest=False).indices
        places = torch.arange(self.position, self.position + count, device=self.counts.device)
        if count:
            self.position = (self.position + count) % len(self.images)
        return places % len(self.images)


def images_to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as bytes, rounded."""
    return images.mul(255).round().clamp_(0, 255).to(torch.uint8)


def images_from_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] from bytes."""
    return images.float().div_(255)
