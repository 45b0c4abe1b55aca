from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.files import write_atomically
from lightning_kd.functional.seeds import seeded

FACTS = "facts.json"


class TeacherCache:
    """What teachers say of each training image, computed once and read ever after.

    Give it to a data module of this package as ``teacher_cache``. When ``MultiTeacher`` starts to
    train, teachers are asked about every image in every view, or an earlier run's answers are
    found; after that no teacher runs in training. Epoch e shows view e modulo ``views``: its crops
    and flips depend on seed, view and image alone. Answers are half precision, in a memory-mapped
    file that all processes of a machine share.

    Args:
        folder: Where answers lie; each combination of teachers, images and options needs its own.
        views: How many differently cropped and flipped views there are of each image.
        top_k: Keep the k largest logits of each answer only; the others share what probability is
            left equally. ``null``: keep all.
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

    def facts(self, teachers: Sequence[nn.Module], data: str, classes: int) -> dict[str, Any]:
        """What answers depend on.

        Args:
            teachers: The networks.
            data: Hash of images, and of how they are cropped and flipped.
            classes: Number of classes.
        """
        return {
            "teachers": [_hash(network) for network in teachers],
            "data": data,
            "classes": classes,
            "views": self.views,
            "top_k": self.top_k,
            "seed": self.seed,
        }

    @property
    def ready(self) -> bool:
        """Whether answers are complete and open."""
        return self._ready

    def find(self, facts: dict[str, Any], images: int) -> bool:
        """Open an earlier run's answers; False if there are none yet.

        Raises:
            ValueError: If they were computed of other teachers, images or options, or are damaged.
        """
        path = self.folder / FACTS
        if not path.is_file():
            return False
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged: delete {self.folder}. ({error})") from error
        wanted = {**facts, "images": images}
        changed = [k for k in wanted if not isinstance(found, dict) or found.get(k) != wanted[k]]
        if changed:
            raise ValueError(
                f"Expected the answers in {self.folder} to be of these teachers and images, but "
                f"{', '.join(changed)} changed since: delete the folder, or choose another."
            )
        self._open(facts, images, new=False)
        self._ready = True
        return True

    def create(self, facts: dict[str, Any], images: int) -> None:
        """Make room for answers, or write beside the process that has."""
        self._ready = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open(facts, images, new=True)

    def finish(self, facts: dict[str, Any], images: int) -> None:
        """Declare the answers complete; by one process, when all have written."""
        content = json.dumps({**facts, "images": images}, indent=2)
        write_atomically(self.folder / FACTS, content.encode())

    def write(self, view: int, indices: Tensor, said: Tensor) -> None:
        """Keep the teachers' logits (M, B, K) of these images.

        Raises:
            ValueError: If a logit is not finite, or too large for half precision.
        """
        logits = said.movedim(0, 1).float().cpu()
        largest = float(logits[logits != -torch.inf].abs().max())  # that one: an unknown class
        if not largest <= torch.finfo(torch.half).max:
            raise ValueError(
                f"Expected teachers whose logits half precision can hold (up to 65504) with "
                f"teacher_cache, got {largest:.3g}: are they trained? Else leave the cache out."
            )
        if self.top_k is not None:
            logits, places = logits.log_softmax(2).topk(self.top_k)
            self._places[view, indices] = places.int()
        self._values[view, indices] = logits.half()

    def read(self, view: int, indices: Tensor) -> Tensor:
        """Logits (B, M, K) of these images, half precision, on the CPU."""
        values = self._values[view, indices]
        if self.top_k is None:
            return values
        known = values.float()
        left = (1 - known.exp().sum(2, keepdim=True)).clamp(min=1e-6)
        others = (left / (self._classes - self.top_k)).log().repeat(1, 1, self._classes)
        return others.scatter(2, self._places[view, indices].long(), known).half()

    def draws(self, view: int, images: int, columns: int) -> Tensor:
        """Random numbers in [0, 1) that make a view of each image, shape (N, columns)."""
        if self._draws is None or self._draws[0] != view:
            random = seeded(self.seed, view)
            self._draws = (view, torch.rand(images, columns, generator=random))
        return self._draws[1]

    def _open(self, facts: dict[str, Any], images: int, new: bool) -> None:
        classes, teachers = facts["classes"], len(facts["teachers"])
        if self.top_k is not None and self.top_k >= classes:
            raise ValueError(
                f"Expected top_k below the number of classes, {classes}, got {self.top_k}: leave "
                f"it out."
            )
        self._classes = classes
        shape = (self.views, images, teachers, self.top_k or classes)
        self._values = self._map("logits.f16", shape, torch.float16, new)
        if self.top_k is not None:
            self._places = self._map("classes.i32", shape, torch.int32, new)

    def _map(self, name: str, shape: tuple[int, ...], kind: torch.dtype, new: bool) -> Tensor:
        path, size = self.folder / name, math.prod(shape)
        expected = size * kind.itemsize
        found = path.stat().st_size if path.is_file() else 0
        if new and found > expected:
            path.unlink()
        if not new and found != expected:
            raise ValueError(
                f"Expected {path} to hold {expected} bytes, got {found}: delete {self.folder}."
            )
        return torch.from_file(str(path), shared=new, size=size, dtype=kind).view(shape)


def _hash(network: nn.Module) -> str:
    """Of a network's weights and buffers, and of what it is."""
    found = hashlib.sha256(type(network).__qualname__.encode())
    for name, value in network.state_dict().items():
        found.update(name.encode())
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous().flatten()
            found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
