from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_kd.features.tap import Tap, Tapped
from lightning_kd.outputs import NetworkOutput


class Batched:
    """Networks of one architecture, run as one network with an extra dimension.

    Their parameters stay where they are; each call stacks them, and gradient flows back into each.
    All run as the first one does: buffers must be changed in place, and attributes that a forward
    pass reads must be the same in all.

    Args:
        networks: Two or more networks, identical but for their weights.
        tap: Tap of the first one.
        kind: What they are, for error messages.

    Raises:
        ValueError: If the architectures differ.
    """

    def __init__(self, networks: Sequence[nn.Module], tap: Tap, kind: str = "peer") -> None:
        for index, network in enumerate(networks):
            if _description(network) != _description(networks[0]):
                raise ValueError(
                    f"Expected {kind}s of one architecture with batched=True, but {kind} {index} "
                    f"differs from {kind} 0: set batched=False."
                )
        self._networks = tuple(networks)
        self._parts = [list(network.modules()) for network in networks]
        self._tapped = Tapped(tap)

    def __call__(self, views: Sequence[Tensor]) -> list[NetworkOutput]:
        """Output of each network for its images (B, C, H, W); a shared tensor is not copied."""
        same = all(view is views[0] for view in views)
        modes = [[part.training for part in parts] for parts in self._parts]
        if any(mode != modes[0] for mode in modes):
            raise ValueError(
                "Expected all peers in one mode with batched=True, got some modules in train() "
                "whose counterparts are in eval(): set batched=False."
            )
        states = [dict(network.named_parameters()) for network in self._networks]
        buffers = [dict(network.named_buffers()) for network in self._networks]
        weights = {n: torch.stack([state[n] for state in states]) for n in states[0]}
        counts = {n: torch.stack([held[n] for held in buffers]) for n in buffers[0]}

        def call(lent: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            output: NetworkOutput = functional_call(self._tapped, lent, (x,))
            return output.logits, dict(output.features)

        logits, features = torch.vmap(call, (0, None if same else 0), randomness="different")(
            {f"network.{n}": value for n, value in {**weights, **counts}.items()},
            views[0] if same else torch.stack(list(views)),
        )
        if self._networks[0].training:  # statistics were written into the stack
            with torch.no_grad():
                for k, held in enumerate(buffers):
                    for n, buffer in held.items():
                        buffer.copy_(counts[n][k])
        return [
            NetworkOutput(logits[k], {n: value[k] for n, value in features.items()})
            for k in range(len(views))
        ]


def _description(network: nn.Module) -> list[object]:
    shapes = [(n, p.shape) for n, p in network.state_dict().items()]
    options = [str(getattr(part, "init_args", "")) for part in network.modules()]
    return [str(network), shapes, options]
