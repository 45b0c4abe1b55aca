"""Build networks without allocating more than the weights that they are built for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.modules import module as registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

#: what a small network may need besides its weights
SPARE = 2**22


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Look at the size of each result on the meta device before it is computed."""

    def __init__(self, elements: int, exceeded: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.exceeded = elements, exceeded

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not func._schema.is_mutable:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        takes_device = any(argument.name == "device" for argument in func._schema.arguments)
        more = {"device": "meta"} if takes_device else {}
        try:
            sketch = func(
                *tree_map_only(Tensor, _sketch, args),
                **{**tree_map_only(Tensor, _sketch, kwargs), **more},
            )
        except (NotImplementedError, RuntimeError):
            return  # reads a value, or is refused when it is run
        results = sketch if isinstance(sketch, (list, tuple)) else [sketch]
        self.left -= sum(each.numel() for each in results if isinstance(each, Tensor))
        if self.left < 0:
            _refuse("its tensors are far larger than the weights", self.exceeded)


def _refuse(why: str, exceeded: list[str]) -> NoReturn:
    """Raise ``ValueError``, and note it."""
    exceeded.append(why)
    raise ValueError(why)


def _sketch(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


@contextlib.contextmanager
def bounded(elements: int, tensors: int) -> Iterator[list[str]]:
    """Inside, networks may be built that are about as large as these weights, and no larger.

    Args:
        elements: How many numbers the weights hold, or bytes their file.
        tensors: In how many tensors.

    Yields:
        A list, empty until the error is raised, which may be caught on its way.

    Raises:
        ValueError: At the first tensor or layer that exceeds a generous multiple of them.
    """
    left, exceeded = 50 * tensors + 5_000, list[str]()

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            _refuse("it has far more layers than the weights", exceeded)

    hooks = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_module_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        with _Bounded(5 * elements + SPARE, exceeded):
            yield exceeded
    finally:
        for hook in hooks:
            hook.remove()


def bounded_by_memory() -> AbstractContextManager[list[str]]:
    """``bounded`` by what this machine can hold, where the size of the weights is not known."""
    return bounded(physical_memory() // 20, 20_000)


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return 2**40
