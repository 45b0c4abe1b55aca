from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_kd.losses import DistillationLoss
from lightning_kd.modules import Distiller
from lightning_kd.weighting import Weighting


class LeanTeachers(Callback):
    """Teachers at lower cost: half precision, memory for one at a time, or all in one pass.

    For ``MultiTeacher`` and ``PeerCohort``. Measure what helps (``benchmarks/lean_teachers.py``);
    where images repeat, ``TeacherCache`` of the data module saves more than all of this.

    Args:
        dtype: ``bfloat16`` or ``float16``: cast teachers to it, except BatchNorm; their outputs
            stay float32, and change in the third digit. On a CPU with bfloat16 instructions
            (avx512_bf16) about twice as fast. ``None``: leave them.
        offload: Keep teachers in CPU memory, and move each to the GPU for its forward pass only:
            there need only be room for the largest.
        batched: Run teachers of one architecture as one network with one more dimension: faster for
            many tiny ones, slower if one fills the device. With ``MultiTeacher`` only.

    Raises:
        ValueError: If options exclude each other, or something in the module reaches into teachers.
    """

    def __init__(
        self,
        dtype: str | None = None,
        offload: bool = False,
        batched: bool = False,
    ) -> None:
        if dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f'Expected dtype "bfloat16", "float16" or null, got {dtype!r}.')
        if batched and (dtype or offload):
            raise ValueError("Expected batched=True alone, got dtype or offload with it.")
        self.dtype, self.offload, self.batched = dtype, offload, batched

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, Distiller) or not len(pl_module.teachers):
            raise ValueError(
                f"Expected a module with teachers for {self._named}, got "
                f"{type(pl_module).__name__}: leave it out."
            )
        why = pl_module.teachers.why_not_whole
        if why:
            raise ValueError(
                f"Expected teachers that are run whole with {self._named}, got "
                f"{type(pl_module).__name__} with {why}: leave it out."
            )
        for part in pl_module.modules():
            reaches = (isinstance(part, DistillationLoss) and part.uses_networks) or (
                isinstance(part, Weighting) and part.wants_images
            )
            if reaches:
                raise ValueError(
                    f"Expected losses and weightings that read outputs with {self._named}, got "
                    f"{type(part).__name__}, which reaches into the networks: leave one of them "
                    f"out."
                )
        if self.dtype and trainer.precision in ("64-true", "bf16-true", "16-true"):
            raise ValueError(
                f"Expected precision 32-true, bf16-mixed or 16-mixed with {self._named}, got "
                f"{trainer.precision}, which casts teachers, too: leave dtype out."
            )
        rank_zero_info(f"Teachers at lower cost: {self._named}")
        if not self.batched:
            dtype = getattr(torch, self.dtype) if self.dtype else None
            for teacher in pl_module.teachers:
                teacher.reduce_cost(dtype, self.offload)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.batched and isinstance(pl_module, Distiller):
            pl_module.teachers.run_batched()

    @property
    def _named(self) -> str:
        return f"LeanTeachers(batched={self.batched}, offload={self.offload}, dtype={self.dtype})"
