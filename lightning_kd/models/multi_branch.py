from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_kd.features import find_layer, modes_kept
from lightning_kd.models.branching import Branching


class _Cut(fx.Tracer):
    """Traces into the modules that contain the named layer, and treats all others as leaves."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self.layer.startswith(module_qualified_name + ".")


class _Divide(torch.autograd.Function):
    """Identity whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0] / ctx.by, None


def fresh(network: nn.Module) -> nn.Module:
    """Build the same architecture with new initial weights."""
    options = getattr(network, "init_args", None)
    if isinstance(options, dict) and not any(isinstance(v, nn.Module) for v in options.values()):
        return type(network)(**options)
    twin = copy.deepcopy(network)
    for module in twin.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    return twin


def _trace(network: nn.Module, layer: str) -> fx.Graph:
    graphs = []
    with modes_kept(network):
        for training in (False, True):
            network.train(training)
            graphs.append(_Cut(layer).trace(network))
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError(
            f"Expected {type(network).__name__} to be the same graph in train() and eval(), but a "
            f"function in its forward reads the mode: use modules such as nn.Dropout instead."
        )
    return graphs[0]


def split_at(network: nn.Module, layer: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a network after a named layer into what leads up to it and what follows.

    Parameters keep their names and are shared with ``network``.

    Raises:
        ValueError: If there is no such layer, or a later layer reads something from before the cut.
    """
    find_layer(network, layer)  # reports an unknown name with similar ones
    graph = _trace(network, layer)
    calls = [n for n in graph.nodes if n.op == "call_module" and n.target == layer]
    if len(calls) != 1:
        raise ValueError(f"Expected layer {layer!r} to be called once, got {len(calls)} calls.")
    trunk = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    nodes = list(graph.nodes)
    cut = nodes.index(calls[0])
    for node in nodes[: cut + 1]:
        copied[node] = trunk.node_copy(node, lambda n: copied[n])
    trunk.output(copied[calls[0]])
    branch = fx.Graph()
    after: dict[fx.Node, fx.Node] = {calls[0]: branch.placeholder("features")}

    def find(node: fx.Node) -> fx.Node:
        if node not in after:
            raise ValueError(
                f"Expected everything after layer {layer!r} to read from it alone, but "
                f"{node.name!r} from before it is read too: cut at another layer."
            )
        return after[node]

    for node in nodes[cut + 1 :]:
        after[node] = branch.node_copy(node, find)
    return fx.GraphModule(network, trunk), fx.GraphModule(network, branch)


class MultiBranch(Branching):
    """Several networks that share everything up to a layer.

    The trunk runs once. Each branch is the part of the given network after the cut, with initial
    weights of its own; trunk and one branch together have the parameters of the given network, by
    name, which is how a branch is exported.

    Args:
        network: Any network that ``torch.fx`` can trace down to the cut.
        layer: Dotted name of the last shared layer.
        branches: Number of branches, at least 2.
        scale_gradient: Divide the gradient at the cut by the number of branches, so that the trunk
            gets their mean instead of their sum.
        same_weights: Start all branches from the given network's weights, instead of new ones.

    Raises:
        ValueError: If the layer does not exist or the network cannot be cut there.

    Source:
        Lan et al. 2018 (ONE), https://arxiv.org/abs/1806.04606; Song & Chai 2018 (CL-ILR),
        https://arxiv.org/abs/1805.11761, section 3.2 (scaling).
    """

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        branches: int = 3,
        scale_gradient: bool = False,
        same_weights: bool = False,
    ) -> None:
        super().__init__()
        if branches < 2:
            raise ValueError(f"Expected at least 2 branches, got {branches}.")
        self.init_args = {
            "network": network, "layer": layer, "branches": branches,
            "scale_gradient": scale_gradient, "same_weights": same_weights,
        }  # fmt: skip
        self.trunk, first = split_at(network, layer)
        if same_weights:
            others = [copy.deepcopy(first) for _ in range(branches - 1)]
        else:
            others = [split_at(fresh(network), layer)[1] for _ in range(branches - 1)]
        self.branches = nn.ModuleList([first, *others])
        self.layer, self.scale_gradient = layer, scale_gradient
        self._plain = (network,)  # a tuple: it shares its parameters and is not registered twice

    def shared(self, x: Tensor) -> Tensor:
        """Output of the trunk for images (B, C, H, W)."""
        return self.branch_input(self.trunk(x))

    def branch_input(self, features: Tensor) -> Tensor:
        """Trunk's output, with its gradient divided if ``scale_gradient``."""
        if self.scale_gradient:
            features = _Divide.apply(features, float(len(self.branches)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Mean probabilities of all branches as logits, shape (B, K)."""
        return self.branch_logits(x).log_softmax(2).logsumexp(0)

    def branch_logits(self, x: Tensor) -> Tensor:
        """Logits of each branch, shape (branches, B, K); their disagreement is the uncertainty."""
        features = self.shared(x)
        return torch.stack([branch(features) for branch in self.branches])

    def branch_network(self, index: int) -> nn.Module:
        """The given network, whose architecture each branch has."""
        return copy.deepcopy(self._plain[0])

    def branch_state(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of trunk and one branch, under the names of the given network."""
        found: dict[str, Tensor] = {}
        for prefix in ("trunk.", f"branches.{index}."):
            found |= {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        return found

    def branch_config(self, index: int, config: Any) -> Any:
        """Configuration of the given network."""
        return config["init_args"]["network"]
