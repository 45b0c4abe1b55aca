from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_kd.outputs import NetworkOutput
from lightning_kd.teachers.teacher import Teacher
from lightning_kd.utils.seeds import mixed_seed


class SubTeachers(nn.Module, ABC):
    """Several outputs of one teacher. Subclass it and implement ``outputs``.

    Random numbers depend on the seed and on how many batches were seen in training, both kept in
    checkpoints, so that a resumed run continues as if it had never stopped.

    Args:
        count: Number of sub-teachers.
        seed: Of random numbers; ``None``: that of the run.

    Raises:
        ValueError: If ``count`` is not positive.
    """

    def __init__(self, count: int, seed: int | None = None) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"Expected at least one sub-teacher, got {count}.")
        self.count, self.seed, self.times = count, seed, 0

    def attach(self, teacher: Teacher, layers: Sequence[str], x: Tensor) -> None:
        """Inspect the teacher, whose ``layers`` are recorded, and images ``x``; called once."""

    def networks(self, teacher: Teacher) -> list[nn.Module]:
        """The network behind each of them."""
        return [teacher.network] * self.count

    @abstractmethod
    def outputs(
        self, teacher: Teacher, x: Tensor, indices: Sequence[int], need_logits: bool, seed: int
    ) -> list[NetworkOutput]:
        """Outputs of the sub-teachers with these indices for images (B, C, H, W).

        Args:
            teacher: The one teacher.
            x: Images.
            indices: Which sub-teachers.
            need_logits: Run to the end; else only as far as layers are recorded.
            seed: Of the random numbers of this batch, equal in all processes.
        """

    def forward(
        self, teacher: Teacher, x: Tensor, indices: Sequence[int], need_logits: bool = True
    ) -> list[NetworkOutput]:
        """Outputs of these; in training with new random numbers each time, else always the same."""
        seed = self.next_seed() if self.training else mixed_seed(self.seed or 0, 0)
        return self.outputs(teacher, x, indices, need_logits, seed)

    def next_seed(self) -> int:
        """Seed of the next training batch."""
        self.times += 1
        return mixed_seed(self.seed or 0, self.times)

    def get_extra_state(self) -> dict[str, Any]:
        """Seed and count, for the checkpoint."""
        return {"seed": self.seed, "times": self.times}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.seed, self.times = state["seed"], state["times"]
