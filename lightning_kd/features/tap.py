from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_kd.outputs import NetworkOutput


def find_layer(network: nn.Module, layer: str) -> nn.Module:
    """Look up a layer by its dotted name, inside wrappers (``Normalized``, ``Resized``) too.

    Raises:
        ValueError: If there is no such layer; the message lists similar names.
    """
    named: dict[str, nn.Module] = dict(network.named_modules())
    wrappers = ["", "network.", "network.network."]
    for prefix in wrappers:
        if layer and prefix + layer in named:
            return named[prefix + layer]
    names = [re.sub(r"^(network\.)+", "", name) for name in named if name]
    near = difflib.get_close_matches(layer, names, n=6, cutoff=0.4) or names[:12]
    raise ValueError(
        f"Expected the name of a layer of {type(network).__name__}, got {layer!r}. "
        f"Near names: {', '.join(near)}."
    )


class _Pass:
    """Progress of one forward pass."""

    def __init__(self) -> None:
        self.on = False  # else features of a validation batch, or a whole graph, would stay alive
        self.calls = 0  # of tapped layers so far; a layer may run more than once
        self.stop = 0  # number of calls to stop after; 0: run to the end


class _EarlyStop(Exception):
    """All requested layers have run, and what follows is not needed."""


class _Record:
    """A forward hook that records one layer's output and that output's version."""

    def __init__(self, store: dict[str, tuple[Tensor, int]], layer: str, now: _Pass) -> None:
        self.store, self.layer, self.now = store, layer, now

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.now.on:
            return
        if not isinstance(output, Tensor):
            raise TypeError(
                f"Layer {self.layer!r} returns {type(output).__name__}, not one tensor: choose a "
                f"layer inside or after it."
            )
        # inference mode, which Lightning uses in test, keeps no version; compiled passes follow an
        # eager one, which has checked
        unversioned = torch.compiler.is_compiling() or output.is_inference()
        version = -1 if unversioned else output._version
        self.store[self.layer] = (output, version)
        self.now.calls += 1
        if self.now.calls == self.now.stop:
            raise _EarlyStop


class Tap:
    """Runs a network and returns its ``NetworkOutput``: logits and the outputs of named layers.

    Args:
        network: Any network; it keeps one forward hook for each layer.
        layers: Dotted names as ``named_modules()`` gives them.

    Raises:
        ValueError: If a layer does not exist.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] = ()) -> None:
        self.network = network
        self.layers = tuple(dict.fromkeys(layers))
        self._store: dict[str, tuple[Tensor, int]] = {}
        self._now, self._calls = _Pass(), 0
        self._records = [_Record(self._store, layer, self._now) for layer in self.layers]
        self._hooked: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self.hook()

    def hook(self) -> None:
        """Hook the named layers, again if one was replaced (as by SyncBatchNorm)."""
        layers = [find_layer(self.network, layer) for layer in self.layers]
        pairs = list(zip(layers, self._records, strict=True))
        kept = all(any(h is r for h in layer._forward_hooks.values()) for layer, r in pairs)
        same = all(a is b for a, b in zip(layers, self._hooked, strict=False))
        if not (kept and same and self._hooked):
            self.remove()
            self._hooked = layers
            self._handles = [layer.register_forward_hook(record) for layer, record in pairs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        """Hook the copy of the network: a copied ``GraphModule`` has lost its hooks."""
        twin = Tap.__new__(Tap)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.hook()
        return twin

    def __call__(self, x: Tensor, need_logits: bool = True) -> NetworkOutput:
        """Run the network on images, shape (B, C, H, W).

        Args:
            x: Images.
            need_logits: Run to the end; else the network stops after the last call of a named layer
                in the last full pass, and the logits are empty, shape (B, 0).

        Raises:
            RuntimeError: If a tapped layer did not run, or its output was changed in place.
        """
        self._now.on, self._now.calls = True, 0
        self._now.stop = 0 if need_logits else self._calls
        try:
            try:
                output = self.network(x)
                self._calls = self._now.calls
            except _EarlyStop:
                output = x.new_empty(len(x), 0)
            return NetworkOutput.read(
                output, {layer: self._recorded(layer) for layer in self.layers}
            )
        finally:  # nothing of this batch may stay alive
            self._store.clear()
            self._now.on = False

    def _recorded(self, layer: str) -> Tensor:
        if layer not in self._store:
            raise RuntimeError(f"Layer {layer!r} did not run in this forward pass.")
        feature, version = self._store[layer]
        if version >= 0 and feature._version != version:
            raise RuntimeError(
                f"The output of layer {layer!r} was changed in place by the layer after it "
                f"(usually an in-place ReLU): name that layer instead."
            )
        return feature

    def remove(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()


class Tapped(nn.Module):
    """A network with its tap as one module, whose weights can be swapped for one call."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self.network, self.tap = tap.network, tap

    def forward(self, x: Tensor, need_logits: bool = True) -> NetworkOutput:
        """See ``Tap``."""
        return self.tap(x, need_logits)
