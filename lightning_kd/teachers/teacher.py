from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.adapters import Tap
from lightning_kd.knowledge import Knowledge


class Teacher(nn.Module):
    """A frozen network that is asked but never touched.

    Its network stays outside the module tree: it moves with ``.to()``, but no optimizer,
    ``state_dict``, ``train()``, ``apply()`` or DDP broadcast ever reaches it. What was given is not
    part of what is learned. Gradient may flow *through* it to its input (data-free methods need
    that), so ``no_grad`` belongs at the call site.

    Args:
        network: Any classifier; it is put in eval mode and its parameters are frozen.
        classes: Which classes its outputs stand for, in their order, if it does not know all of
            them; for the others its logits are minus infinity. Distil such teachers with
            ``lightning_kd.losses.SubsetTarget``.
        num_classes: How many classes there are in all; needed with ``classes``, where the command
            line fills it in.

    Raises:
        ValueError: If ``classes`` are not distinct numbers from 0 to ``num_classes`` - 1.
    """

    _given: tuple[nn.Module]  # a tuple, because nn.Module would register a plain attribute

    classes: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        classes: list[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if classes is not None and (
            num_classes is None
            or len(set(classes)) < len(classes)
            or not all(0 <= c < num_classes for c in classes)
        ):
            raise ValueError(
                f"Expected distinct classes from 0 to num_classes - 1, got {classes} and "
                f"num_classes {num_classes}."
            )
        self._given = (network.eval().requires_grad_(False),)
        self._parts = tuple(network.modules())  # walking the tree at each step would be slow
        self._lent = False
        self.num_classes = num_classes
        places = None if classes is None else torch.tensor(classes)
        self.register_buffer("classes", places, persistent=False)
        self._tap = Tap(network)

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self._given[0]

    def listen(self, layers: Sequence[str]) -> None:
        """Record the outputs of ``layers`` from now on, instead of those recorded before.

        Raises:
            ValueError: If a layer does not exist.
        """
        self._tap.remove()
        self._tap = Tap(self.network, layers)

    def forward(self, x: Tensor, logits: bool = True) -> Knowledge:
        """Answer for images, shape (B, C, H, W).

        Args:
            x: Images.
            logits: Run to the end; else only as far as the layers that are listened to.
        """
        # somebody holds the network, or a part of it, and called train() on it
        if any(part.training for part in self._parts):
            self.network.eval()
        said = self._tap(x, logits)
        if self.classes is None or not logits:
            return said
        if said.logits.shape[1] != len(self.classes):
            raise ValueError(
                f"Expected a teacher of {len(self.classes)} outputs, one for each of its classes, "
                f"got {said.logits.shape[1]}."
            )
        shape = (len(said.logits), self.num_classes, *said.logits.shape[2:])
        everywhere = said.logits.new_full(shape, -torch.inf)
        return Knowledge(everywhere.index_copy(1, self.classes, said.logits), said.features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        """Move the network along with the module that holds this teacher."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self._lent:
            self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Share the network: copies (of weight averaging, say) need no second set of weights.

        A copy that is moved or cast leaves the network where its owner has it.
        """
        twin = copy.copy(self)
        twin._lent = True
        memo[id(self)] = twin
        # whatever else refers to parts of the network, in its copy too
        memo.update((id(part), part) for part in self._parts)
        return twin

    def extra_repr(self) -> str:
        """Name the network in ``print``."""
        return f"{type(self.network).__name__}, frozen"
