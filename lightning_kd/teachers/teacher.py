from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakIdKeyDictionary

from lightning_kd.features import OutputError, Tap, Tapped, put_in_eval
from lightning_kd.outputs import NetworkOutput

#: requires_grad of each parameter, mode of each part, and its tensors where they were cast, as they
#: were before they were frozen
_TRAINABLE, _TRAINING, _UNCAST = (WeakIdKeyDictionary() for _ in range(3))


class Teacher(nn.Module):
    """A frozen network that is run but never changed.

    Its network stays outside the module tree: it moves with ``.to()``, but no optimizer,
    ``state_dict``, ``train()``, ``apply()`` or DDP broadcast ever reaches it. Gradients may
    flow *through* it to its input (data-free methods need that), so ``no_grad`` belongs at the call
    site. ``release`` restores the network to its former state, precision included; a Trainer does
    so at the end of a run.

    Args:
        network: Any classifier; it is put in eval mode and its parameters are frozen.
        classes: Which classes its outputs stand for, in their order, if it does not know all of
            them; for the others its logits are minus infinity. Distil such teachers with
            ``lightning_kd.losses.SubsetTarget``.
        num_classes: Number of classes in all; needed with ``classes``, where the command line
            fills it in.

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
        self._given = (network,)
        self._parts = tuple(network.modules())  # walking the tree at each step would be slow
        self._lent = False
        self.num_classes = num_classes
        places = None if classes is None else torch.tensor(classes)
        self.register_buffer("classes", places, persistent=False)
        self._dtype: torch.dtype | None = None  # of a network that was cast
        self._offloaded = False
        self.tap = Tap(network)
        self.freeze()

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self._given[0]

    def freeze(self) -> None:
        """Put the network in eval mode and freeze its parameters, until ``release``."""
        for parameter in self.network.parameters():
            if parameter not in _TRAINABLE:
                _TRAINABLE[parameter] = parameter.requires_grad
        for part in self.network.modules():
            if part not in _TRAINING:
                _TRAINING[part] = part.training
        put_in_eval(self.network)
        for parameter in self.network.parameters():  # a scripted network has no such method
            parameter.requires_grad_(False)

    def release(self) -> None:
        """Give the network back as it was: modes, ``requires_grad``, values that were cast."""
        for parameter in self.network.parameters():
            if parameter in _TRAINABLE:
                parameter.requires_grad_(_TRAINABLE[parameter])
                del _TRAINABLE[parameter]
        for part in self.network.modules():
            if part in _TRAINING:
                part.training = _TRAINING[part]
                del _TRAINING[part]
            if part in _UNCAST:
                named = {**part._parameters, **part._buffers}
                for name, value in _UNCAST[part].items():
                    if (own := named.get(name)) is not None:
                        own.data = value.to(own.device)
                del _UNCAST[part]
        precision = next(
            (p.dtype for p in self.network.parameters() if p.is_floating_point()), None
        )
        self._dtype = precision if self._offloaded else None

    def record_layers(self, layers: Sequence[str]) -> None:
        """Record the outputs of ``layers`` from now on, instead of those recorded before.

        Raises:
            ValueError: If a layer does not exist.
        """
        if not self._lent:  # else they are the original's
            self.tap.remove()
        self.tap = Tap(self.network, layers)

    def reduce_cost(self, dtype: torch.dtype | None = None, offload: bool = False) -> None:
        """Hold the network at lower cost; outputs have the images' own precision and device.

        Args:
            dtype: Cast weights to it, except those of BatchNorm, whose statistics would suffer,
                and incoming images; ``None``: as they are. ``release`` undoes it.
            offload: Keep weights in CPU memory; they are on the images' device only during a
                forward pass, one network after the other.
        """
        floats = [
            values
            for part in self._parts
            if not isinstance(part, nn.modules.batchnorm._BatchNorm)
            for values in (*part.parameters(False), *part.buffers(False))
            if values.is_floating_point()
        ]
        if dtype is not None:
            self._keep_values()
            for values in floats:
                values.data = values.data.to(dtype)
        self._dtype = floats[0].dtype if floats else torch.float32
        self._offloaded = offload
        if offload:
            for values in (*self.network.parameters(), *self.network.buffers()):
                here = values.data.cpu()  # copies from pinned memory do not wait
                values.data = here.pin_memory() if torch.cuda.is_available() else here

    def forward(self, x: Tensor, need_logits: bool = True) -> NetworkOutput:
        """Output for images, shape (B, C, H, W).

        Args:
            x: Images.
            need_logits: Run to the end; else only as far as layers are recorded.
        """
        self.keep_in_eval()
        plain = self._dtype is None
        output = self.tap(x, need_logits) if plain else self._cast_forward(x, need_logits)
        return self.over_all_classes(output) if need_logits else output

    def keep_in_eval(self) -> None:
        """Put the network back in eval mode: other owners of it may have called train()."""
        if any(part.training for part in self._parts):
            self.freeze()

    def _cast_forward(self, x: Tensor, need_logits: bool) -> NetworkOutput:
        images = x.to(self._dtype)
        if self._offloaded and x.device.type != "cpu":
            weights = {
                f"network.{name}": value.to(x.device, non_blocking=True)
                for name, value in (*self.network.named_parameters(), *self.network.named_buffers())
            }
            output = functional_call(Tapped(self.tap), weights, (images, need_logits))
        else:
            output = self.tap(images, need_logits)
        features = {name: value.to(x.dtype) for name, value in output.features.items()}
        return NetworkOutput(output.logits.to(x.dtype), features)

    def over_all_classes(self, output: NetworkOutput) -> NetworkOutput:
        """Logits over all classes, if the network knows only some.

        Raises:
            ValueError: If its number of outputs is not that of ``classes``.
        """
        if self.classes is None:
            return output
        if output.logits.shape[1] != len(self.classes):
            raise OutputError(
                f"Expected a teacher of {len(self.classes)} outputs, one for each of its classes, "
                f"got {output.logits.shape[1]}."
            )
        shape = (len(output.logits), self.num_classes, *output.logits.shape[2:])
        everywhere = output.logits.new_full(shape, -torch.inf)
        logits = everywhere.index_copy(1, self.classes, output.logits)
        return NetworkOutput(logits, output.features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        """Move the network along with the module that holds this teacher."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._offloaded:
            return self
        here = next((v for v in self.network.parameters() if v.is_floating_point()), torch.empty(0))
        probe = here.new_empty(0)
        there = fn(probe)
        moved = (there.dtype, there.device) != (probe.dtype, probe.device)
        if self._lent and moved:  # from here on a network of its own
            self._give(copy.deepcopy(self.network))
        if there.dtype != probe.dtype:
            self._keep_values()
        if not self._lent:
            self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _keep_values(self) -> None:
        """Remember values that are about to be cast, until ``release``; those of the first cast."""
        for part in self._parts:
            if part not in _UNCAST:
                named = {**part._parameters, **part._buffers}
                _UNCAST[part] = {name: v.data for name, v in named.items() if v is not None}

    def _give(self, network: nn.Module) -> None:
        self._given, self._parts, self._lent = (network,), tuple(network.modules()), False
        self.tap = Tap(network, self.tap.layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """Share the network: copies (for weight averaging, say) need no second set of weights.

        A copy that is moved or cast, or records other layers, takes a network or taps of its own.
        """
        twin = copy.copy(self)
        twin._lent, twin._buffers = True, dict(self._buffers)
        memo[id(self)] = twin
        # whatever else refers to parts of the network, in its copy too
        memo.update((id(part), part) for part in self._parts)
        return twin

    def extra_repr(self) -> str:
        """Name the network in ``print``."""
        return f"{type(self.network).__name__}, frozen"
