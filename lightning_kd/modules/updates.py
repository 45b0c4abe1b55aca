"""How the peers of a cohort take their steps where one sum and one optimizer do not do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kd.cohort import Cohort
from lightning_kd.exchange import Adversarial
from lightning_kd.peers import frozen_statistics

#: backward through the sum of some losses and a step of an optimizer, on these peers
Step = Callable[[Any, dict[str, Tensor], Iterable[nn.Module]], None]


def sequential_update(
    cohort: Cohort, optimizer: Any, step: Step, x: Tensor, target: Tensor | None
) -> dict[str, Tensor]:
    """Step every peer by itself; those after it learn from its new output."""
    views = cohort.peer_inputs(x)
    teachers = cohort.before_peers(views)
    peers = cohort.peers(views)
    losses: dict[str, Tensor] = {}
    for k in range(len(peers)):
        taught = cohort.exchange(peers, cohort.task.hard_target(target))[k]
        own = cohort.peer_losses(k, peers[k], taught, target, teachers[k])
        step(optimizer, own, [cohort.peers.networks[k]])
        losses |= own
        if k + 1 < len(peers):
            peers[k] = cohort.peers.refresh(k, views[k])
    return losses


def alternating_update(
    cohort: Cohort, optimizers: Sequence[Any], step: Step, x: Tensor, target: Tensor | None
) -> dict[str, Tensor]:
    """Step all peers together, then let them and the discriminators play on the same batch."""
    learner, player, judge = optimizers
    losses, _ = cohort.losses_and_output(x, target)
    step(learner, losses, cohort.peers.networks)
    with frozen_statistics(cohort.peers):  # a second look at the same batch
        peers = cohort.peers(cohort.peer_inputs(x))
    exchange = cohort.exchange
    fooling, judging = exchange.adversarial_losses(peers), exchange.discriminator_losses(peers)
    step(player, fooling, cohort.peers.networks)
    step(judge, judging, ())
    return losses | fooling | judging


def game_optimizers(cohort: Cohort) -> list[torch.optim.Optimizer]:
    """Optimizers of a game: of the peers with what shapes their features, of discriminators."""
    exchange = cohort.exchange
    assert isinstance(exchange, Adversarial)
    sides = [
        [*cohort.peers.parameters(), *exchange.transfers.parameters()],
        list(exchange.discriminators.parameters()),
    ]
    rate = exchange.learning_rate
    return [torch.optim.Adam(side, lr=rate, betas=(0.5, 0.999)) for side in sides]
