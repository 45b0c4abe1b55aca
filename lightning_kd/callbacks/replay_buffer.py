from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_kd.data_free import synthesizer_of
from lightning_kd.data_free.replay import Memory, ReplayBatch, Sampler, Uniform
from lightning_kd.distillation import Distillation
from lightning_kd.distributed import broadcast_buffers, gather_objects, sum_over_ranks, world_size
from lightning_kd.functional import kl_divergence
from lightning_kd.modules import Distiller
from lightning_kd.utils.checks import check_one_of

ROWS = ("images", "logits", "priorities")


class ReplayBuffer(Callback):
    """Remembers the images that ``DataFree`` makes, and draws the student's batches from them.

    A ring of bytes on the module's device, with the teacher's logits, priorities and counts of
    classes. Of several processes each keeps its share of the capacity; a checkpoint holds all of
    it, and any number of processes can resume from it.

    Args:
        capacity: Images that are kept, of all processes together (the "data scale"); ``None``: all
            that were ever made.
        sampler: How the student's batches are drawn; ``None``: ``Uniform``.
        evict: What to drop when it is full: ``"oldest"`` or ``"lowest_priority"``.
        refresh: Before each round run the student on every image and update all priorities; else
            an image's priority is updated when it is drawn.

    Raises:
        ValueError: If ``capacity`` is not positive or ``evict`` is neither.
        TypeError: If the module does not synthesize images, as ``DataFree`` does.

    Source:
        Liu et al. 2024 (SSD-KD), https://arxiv.org/abs/2403.19539, section 3.3.
    """

    def __init__(
        self,
        capacity: int | None = 5000,
        sampler: Sampler | None = None,
        evict: Literal["oldest", "lowest_priority"] = "oldest",
        refresh: bool = False,
    ) -> None:
        if capacity is not None and (not isinstance(capacity, int) or capacity < 1):
            raise ValueError(
                f"Expected a whole number as capacity, >= 1, or null, got {capacity!r}."
            )
        check_one_of(evict, ("oldest", "lowest_priority"), "evict")
        self.capacity, self.sampler, self.evict = capacity, sampler or Uniform(), evict
        self.refresh = refresh
        self.memory: Memory | None = None
        self._owner: weakref.ref[Any] | None = None
        self._saved: dict[str, Any] | None = None

    def extend(self, images: Tensor, logits: Tensor, priorities: Tensor) -> None:
        """Remember images (B, C, H, W) in [0, 1], logits (B, K) and priorities (B,)."""
        self._here.extend(images, logits, priorities)

    def sample(self, count: int, random: torch.Generator) -> ReplayBatch:
        """Draw a batch."""
        return self._here.sample(count, random)

    def update_priorities(self, batch: ReplayBatch, divergences: Tensor) -> None:
        """Update the priorities of the images drawn, from divergences (B,)."""
        self._here.update_priorities(batch, divergences)

    def class_share(self) -> Tensor:
        """Share of each class among the images of all processes, shape (K,); 0 if empty."""
        counts = sum_over_ranks(self._here.counts)
        return counts / counts.sum().clamp(min=1)

    def _is_owner(self, module: LightningModule) -> bool:
        return self._owner is not None and self._owner() is module

    def __getstate__(self) -> dict[str, Any]:
        """What can be pickled."""
        return {**self.__dict__, "_owner": None}

    @property
    def _here(self) -> Memory:
        if self.memory is None:
            raise RuntimeError("Expected a running fit: the replay buffer is made when it starts.")
        return self.memory

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        synthesizer_of(pl_module, "ReplayBuffer")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        assert pl_module.num_classes is not None
        self._batch_size = int(getattr(pl_module, "batch_size", 256))
        if self.memory is not None and self._saved is None and self._is_owner(pl_module):
            return  # a second fit continues with what the first made
        self._owner = weakref.ref(pl_module)  # another module's logits are another teacher's
        capacity = None if self.capacity is None else self.capacity // world_size()
        self.memory = Memory(
            capacity, self.sampler, self.evict, pl_module.num_classes, pl_module.device
        )
        if trainer.ckpt_path is None:  # a checkpoint that was only validated gives weights alone
            self._saved = None
        if self._saved is None:
            return
        sizes, rank = self._saved["sizes"], trainer.global_rank
        places = torch.split(torch.arange(sum(sizes)), sizes)
        positions = self._saved["positions"]
        if len(sizes) == world_size():  # as it was
            own, position = places[rank], positions[rank]
        else:  # the oldest of all processes first, dealt out in turn
            aged = [p.roll(-k) for p, k in zip(places, positions, strict=True)]
            age = torch.cat([torch.arange(size) for size in sizes])
            order = torch.cat(aged)[age.argsort(stable=True)]
            if capacity is not None:  # it may not divide by the number of processes
                order = order[-capacity * world_size() :]
            own, position = order[rank :: world_size()], 0
        rows = {name: self._saved[name][own] for name in ROWS}
        self.memory.load_state_dict({**rows, "position": position})
        self._saved = None

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.refresh:
            return
        assert isinstance(pl_module, Distiller)
        core, student = pl_module.distillation, pl_module.student
        assert isinstance(core, Distillation)
        student.eval()
        broadcast_buffers(student)  # the same network in all processes
        like = next(student.parameters())

        def distance(images: Tensor, logits: Tensor) -> Tensor:
            return kl_divergence(core.student_output(images.to(like)).logits, logits)

        with torch.no_grad(), trainer.precision_plugin.forward_context():
            self._here.renew(distance, self._batch_size)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.memory is None:
            return self._saved or {}
        state = self.memory.state_dict()
        own = {n: v.cpu().clone() if isinstance(v, Tensor) else v for n, v in state.items()}
        shards = gather_objects(own)
        return {
            **{name: torch.cat([shard[name] for shard in shards]) for name in ROWS},
            "sizes": [len(shard["images"]) for shard in shards],
            "positions": [shard["position"] for shard in shards],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None
