"""How the peers of a cohort take their steps where one sum and one optimizer do not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_kd.exchange import Adversarial
from lightning_kd.functional import hard
from lightning_kd.modules.peers import frozen_statistics

if TYPE_CHECKING:
    from lightning_kd.modules.peer_cohort import PeerCohort


def one_after_the_other(
    cohort: PeerCohort, optimizer: Any, x: Tensor, target: Tensor | None
) -> dict[str, Tensor]:
    """Step every peer by itself; those behind it learn from its new answer."""
    views = cohort.look(x)
    cohort.exchange.before(views)
    lessons = cohort.lessons.ask(views)
    peers = cohort.peers(views)
    terms: dict[str, Tensor] = {}
    for k in range(len(peers)):
        teachers = cohort.exchange(peers, hard(target))[k]
        mine = cohort.terms_of(k, peers[k], teachers, target, lessons[k])
        cohort.advance(optimizer, mine, [cohort.peers.networks[k]], cohort.clip_norm)
        terms |= mine
        if k + 1 < len(peers):
            peers[k] = cohort.peers.refresh(k, views[k])
    return terms


def play(
    cohort: PeerCohort, optimizers: Sequence[Any], x: Tensor, target: Tensor | None
) -> dict[str, Tensor]:
    """Step all peers together, then let them and the discriminators play on the same batch."""
    learner, player, judge = optimizers
    terms = cohort.step(x, target)
    cohort.advance(learner, terms, cohort.peers.networks, cohort.clip_norm)
    with frozen_statistics(cohort.peers):  # a second look at the same batch
        peers = cohort.peers(cohort.look(x))
    fooled, told = cohort.exchange.fool(peers), cohort.exchange.tell_apart(peers)
    cohort.advance(player, fooled, cohort.peers.networks, cohort.clip_norm)
    cohort.advance(judge, told)
    return terms | fooled | told


def players(cohort: PeerCohort) -> list[torch.optim.Optimizer]:
    """Optimizers of a game: of the peers with what shapes their features, of discriminators."""
    exchange = cohort.exchange
    assert isinstance(exchange, Adversarial)
    sides = [
        [*cohort.peers.parameters(), *exchange.transfers.parameters()],
        list(exchange.discriminators.parameters()),
    ]
    rate = exchange.learning_rate
    return [torch.optim.Adam(side, lr=rate, betas=(0.5, 0.999)) for side in sides]
