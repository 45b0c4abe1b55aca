from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_kd.features import find_layer
from lightning_kd.features.paths import Branches, Paths
from lightning_kd.outputs import NetworkOutput
from lightning_kd.teachers.sub_teachers import SubTeachers
from lightning_kd.teachers.teacher import Teacher
from lightning_kd.utils.checks import check_one_of
from lightning_kd.utils.seeds import seeded


class StochasticDepth(SubTeachers):
    r"""Paths through one teacher that leave out blocks at random, new for each batch.

    .. math:: y_k = x_k + \frac{b_k}{p_k} (f_k(x_k) - x_k), \quad b_k \sim \mathrm{Bernoulli}(p_k)

    Paths share what they have in common, so that m of them cost less than m teachers. The teacher
    must have been trained this way: pass the same object to ``Supervised``. Its weights then work
    without it, too, since what a block adds is divided by its probability.

    Args:
        count: Paths per batch.
        survival: Probability :math:`p` that the last block is taken, in (0, 1].
        decay: ``"linear"``: from 1 before the first block down to ``survival``, as published;
            ``"constant"``: all blocks alike.
        blocks: Dotted names of the blocks; ``None``: all elements of ``nn.Sequential`` that have
            parts of their own and keep the shape of their input.
        seed: Of the paths; ``None``: that of the run.

    Raises:
        ValueError: If a number is out of range, a block does not exist or changes the shape, or a
            recorded layer is inside a block.

    Source:
        Lee et al. 2020, "Stochasticity and skip connections improve knowledge transfer", EUSIPCO;
        Huang et al. 2016, https://arxiv.org/abs/1603.09382, equations 2 to 5. Differs from the
        paper: what a block adds after its last activation is divided by :math:`p` in training,
        not multiplied in validation, so that networks need no changes.
    """

    def __init__(
        self,
        count: int = 1,
        survival: float = 0.5,
        decay: Literal["linear", "constant"] = "linear",
        blocks: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(count, seed)
        if not 0 < survival <= 1:
            raise ValueError(f"Expected survival in (0, 1], got {survival}.")
        check_one_of(decay, ("linear", "constant"), "decay")
        self.survival, self.decay, self.blocks = survival, decay, blocks
        self._paths: Paths | None = None
        self._layers: dict[str, nn.Module] = {}

    def prepare(self, network: nn.Module, x: Tensor) -> None:
        """Find the blocks of a network by running it on an image (1, C, H, W)."""
        self._paths = Paths(network, self.blocks, x)

    @property
    def names(self) -> list[str]:
        """Names of the blocks, in the order in which they run."""
        assert self._paths is not None
        return self._paths.names

    def probabilities(self) -> list[float]:
        """Probability that each block is taken."""
        count = len(self.names)
        if self.decay == "constant":
            return [self.survival] * count
        return [1 - (k + 1) / count * (1 - self.survival) for k in range(count)]

    def draw(self, count: int, seed: int) -> list[list[bool]]:
        """For each of ``count`` paths, which blocks it takes."""
        # on the CPU, so as not to wait for the device
        draws = torch.rand(count, len(self.names), generator=seeded(seed))
        kept: list[list[bool]] = (draws < torch.tensor(self.probabilities())).tolist()
        return kept

    @contextlib.contextmanager
    def on(self, kept: Sequence[Sequence[bool]]) -> Iterator[Branches]:
        """Inside, the network takes these paths."""
        assert self._paths is not None
        with self._paths.taken(kept, self.probabilities()) as branches:
            yield branches

    @contextlib.contextmanager
    def one_path(self) -> Iterator[None]:
        """Inside, the network takes one random path, new each time: how it is trained."""
        with self.on(self.draw(1, self.next_seed())):
            yield

    def attach(self, teacher: Teacher, layers: Sequence[str], x: Tensor) -> None:
        """Find the teacher's blocks, and refuse layers inside one."""
        self.prepare(teacher.network, x[:1])
        inside = {
            part: name
            for name in self.names
            for part in list(find_layer(teacher.network, name).modules())[1:]
        }
        self._layers = {layer: find_layer(teacher.network, layer) for layer in layers}
        for layer, part in self._layers.items():
            if part in inside:
                raise ValueError(
                    f"Expected layers that run on every path, got {layer!r} inside block "
                    f"{inside[part]!r}, which may be left out: record the block itself."
                )

    def outputs(
        self, teacher: Teacher, x: Tensor, indices: Sequence[int], need_logits: bool, seed: int
    ) -> list[NetworkOutput]:
        """See ``SubTeachers.outputs``."""
        kept = self.draw(self.count, seed)
        with (
            self.on([kept[index] for index in indices]) as branches,
            branches.watched(self._layers),
        ):
            output = teacher(x, need_logits)
        logits = branches.of(output.logits) if need_logits else [output.logits] * len(indices)
        features = {n: branches.of(output.feature(n), branches.seen[n]) for n in self._layers}
        return [
            NetworkOutput(own, {name: values[k] for name, values in features.items()})
            for k, own in enumerate(logits)
        ]
