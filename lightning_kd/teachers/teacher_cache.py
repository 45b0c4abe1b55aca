from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_kd.atomic_files import write_atomically
from lightning_kd.teachers.teacher import Teacher
from lightning_kd.utils.seeds import seeded

FACTS = "facts.json"
#: how far outputs may be from those in another precision
TOLERANCE = 0.05


class TeacherCache:
    """Teacher outputs for each training image, computed once and read from then on.

    Give it to a data module of this package as ``teacher_cache``. When ``MultiTeacher`` starts to
    train, teachers are run on every image in every view, or an earlier run's outputs are found;
    after that no teacher runs in training. Epoch e shows view e modulo ``views``: its crops and
    flips depend on seed, view and image alone. Outputs are half precision, in a memory-mapped file
    that all processes of a machine share.

    Args:
        folder: For the outputs; each combination of teachers, images and options needs its own.
        views: How many differently cropped and flipped views there are of each image.
        top_k: Keep only the k largest logits of each output; the others share the remaining
            probability equally. ``None``: keep all.
        seed: Of crops and flips.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(
        self, folder: str, views: int = 1, top_k: int | None = None, seed: int = 0
    ) -> None:
        if views < 1 or (top_k is not None and top_k < 1):
            raise ValueError(f"Expected views and top_k >= 1, got {views} and {top_k}.")
        self.folder, self.views, self.top_k, self.seed = Path(folder), views, top_k, seed
        self._values = self._places = torch.empty(0)
        self._classes = 0
        self._ready = False
        self._draws: tuple[int, Tensor] | None = None

    def facts(self, teachers: Sequence[Teacher], data: str, classes: int) -> dict[str, Any]:
        """What the outputs depend on.

        Args:
            teachers: Whose outputs they are.
            data: Hash of images, and of how they are cropped and flipped.
            classes: Number of classes of a teacher's output.

        Raises:
            ValueError: If ``top_k`` keeps all of them.
        """
        if self.top_k is not None and self.top_k >= classes:
            raise ValueError(
                f"Expected top_k below the number of classes, {classes}, got {self.top_k}: leave "
                f"it out."
            )
        return {
            "teachers": [_hash(teacher) for teacher in teachers],
            "data": data,
            "classes": classes,
            "views": self.views,
            "top_k": self.top_k,
            "seed": self.seed,
        }

    @property
    def ready(self) -> bool:
        """Whether the outputs are complete and open."""
        return self._ready

    def close(self) -> None:
        """Return no outputs until they are found again."""
        self._ready = False

    def find(self, facts: dict[str, Any], images: int) -> bool:
        """Open an earlier run's outputs; ``False`` if there are none yet.

        Raises:
            ValueError: If they are from other teachers, images or options, or are damaged.
        """
        path = self.folder / FACTS
        if not path.is_file():
            return False
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: delete {self.folder}. ({error})") from error
        wanted = {**facts, "images": images}
        found = found if isinstance(found, dict) else {}
        changed = [
            f"{k} ({found.get(k)}, now {v})" if k not in ("teachers", "data") else k
            for k, v in wanted.items()
            if found.get(k) != v
        ]
        if changed:
            raise ValueError(
                f"Expected the outputs in {self.folder} to be from these teachers and images, but "
                f"{', '.join(changed)} changed since: choose another folder "
                f"(--data.teacher_cache.folder), or delete this one."
            )
        self._open(self.folder, facts, images)
        self._ready = True
        return True

    def create(self, facts: dict[str, Any], images: int, token: str, first: bool) -> bool:
        """Make room for outputs in a temporary folder, or open what the first process made.

        Args:
            facts: What they depend on.
            images: How many there are.
            token: Names the temporary folder; each run has its own.
            first: Whether to make it.

        Returns:
            Whether it exists: processes may not share a disk.

        Raises:
            OSError: If there is no room.
        """
        self._ready = False
        aside = self._aside(token)
        if first:
            files = self._files(facts, images)
            sizes = [math.prod(shape) * kind.itemsize for _, shape, kind in files]
            try:
                aside.mkdir(parents=True, exist_ok=True)
                for (name, _, _), size in zip(files, sizes, strict=True):
                    with (aside / name).open("wb") as file:
                        if hasattr(os, "posix_fallocate"):  # else a full disk ends the process
                            os.posix_fallocate(file.fileno(), 0, size)
                        file.truncate(size)
            except OSError as error:
                shutil.rmtree(aside, ignore_errors=True)
                raise OSError(
                    f"Cannot write outputs of {sum(sizes)} bytes into {self.folder}: "
                    f"{error.strerror}. Free space, choose another folder "
                    f"(--data.teacher_cache.folder), or set top_k."
                ) from error
        if not aside.is_dir():
            return False
        self._open(aside, facts, images)
        return True

    def finish(self, facts: dict[str, Any], images: int, token: str) -> None:
        """Mark the outputs as complete; by one process, when all have written."""
        aside = self._aside(token)
        for name, _, _ in self._files(facts, images):
            with (aside / name).open("rb+") as file:
                os.fsync(file.fileno())  # before anything vouches for it
            (aside / name).replace(self.folder / name)
        aside.rmdir()
        content = json.dumps({**facts, "images": images}, indent=2)
        write_atomically(self.folder / FACTS, content.encode())

    def write(self, view: int, indices: Tensor, logits: Tensor) -> None:
        """Keep the teachers' logits (M, B, K) for these images.

        Raises:
            ValueError: If a logit is not finite, or too large for half precision; or if a teacher
                knows only some classes, with ``top_k``.
        """
        values, places = self._compress(logits)
        if places is not None:
            self._places[view, indices] = places
        self._values[view, indices] = values

    def read(self, view: int, indices: Tensor) -> Tensor:
        """Logits (B, M, K) for these images, half precision, on the CPU."""
        values = self._values[view, indices]
        return self._expand(values, None if self.top_k is None else self._places[view, indices])

    def check(self, view: int, indices: Tensor, logits: Tensor) -> None:
        """Compare the teachers' current logits (M, B, K) for these images with what is kept.

        Raises:
            ValueError: If they differ by more than rounding in half precision explains.
        """
        now = self._expand(*self._compress(logits)).float()
        kept = self.read(view, indices).float()
        off = (now.softmax(2) - kept.softmax(2)).abs().max()
        if self.top_k is None:  # with it, the smallest that is kept may differ
            known = (now != -torch.inf) & (kept != -torch.inf)
            scale = now[known].abs().max().clamp(min=1)
            off = torch.maximum(off, (now - kept)[known].abs().max() / scale)
        if not float(off) <= TOLERANCE:
            raise ValueError(
                f"Expected the outputs in {self.folder} to match those of the teachers, but they "
                f"differ by {float(off):.2g} (of the largest): teachers or images have since been "
                f"wrapped or read differently, or files are damaged. Delete the folder, or choose "
                f"another."
            )

    def draws(self, view: int, images: int, columns: int) -> Tensor:
        """Random numbers in [0, 1) that make a view of each image, shape (N, columns)."""
        if self._draws is None or self._draws[0] != view:
            random = seeded(self.seed, view)
            self._draws = (view, torch.rand(images, columns, generator=random))
        return self._draws[1]

    def _compress(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits.movedim(0, 1).float().cpu()
        unknown = logits == -torch.inf
        largest = float(logits[~unknown].abs().max())
        if not largest <= torch.finfo(torch.half).max:
            raise ValueError(
                f"Expected teachers whose logits half precision can hold (up to 65504) with "
                f"teacher_cache, got {largest:.3g}: are they trained? If so, leave the cache out."
            )
        if self.top_k is None:
            return logits.half(), None
        if bool(unknown.any()):
            raise ValueError(
                "Expected teachers that know all classes with top_k, got one that knows only "
                "some: leave top_k out."
            )
        values, places = logits.log_softmax(2).topk(self.top_k)
        return values.half(), places.int()

    def _expand(self, values: Tensor, places: Tensor | None) -> Tensor:
        if places is None:
            return values
        known = values.float()
        count = values.shape[2]
        left = (1 - known.exp().sum(2, keepdim=True)).clamp(min=1e-6)
        others = (left / (self._classes - count)).log().repeat(1, 1, self._classes)
        return others.scatter(2, places.long(), known).half()

    def _aside(self, token: str) -> Path:
        return self.folder / f".{token}"

    def _files(
        self, facts: dict[str, Any], images: int
    ) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        shape = (self.views, images, len(facts["teachers"]), self.top_k or facts["classes"])
        files: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("logits.f16", shape, torch.float16)
        ]
        return files if self.top_k is None else [*files, ("classes.i32", shape, torch.int32)]

    def _open(self, folder: Path, facts: dict[str, Any], images: int) -> None:
        self._classes = facts["classes"]
        opened = []
        for name, shape, kind in self._files(facts, images):
            path, size = folder / name, math.prod(shape)
            found = path.stat().st_size if path.is_file() else 0
            if found != size * kind.itemsize:
                raise ValueError(
                    f"Expected {path} to hold {size * kind.itemsize} bytes, got {found}: delete "
                    f"{self.folder}."
                )
            new = folder != self.folder
            opened.append(torch.from_file(str(path), shared=new, size=size, dtype=kind).view(shape))
        self._values = opened[0]
        if self.top_k is not None:
            self._places = opened[1]


def _hash(teacher: Teacher) -> str:
    """Hash of a teacher's weights and buffers, its structure and its classes."""
    inner, places = teacher.network, teacher.classes
    found = hashlib.sha256(f"{inner}{None if places is None else places.tolist()}".encode())
    for name, value in (*inner.named_parameters(), *inner.named_buffers()):
        found.update(name.encode())
        plain = value.detach().cpu().contiguous().flatten()
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
