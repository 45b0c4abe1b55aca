from __future__ import annotations

import functools
from typing import Any, Literal

from torch import nn

from lightning_kd.cohort import Cohort
from lightning_kd.exchange import Exchange
from lightning_kd.losses import DistillationLoss
from lightning_kd.modules.base import Distiller
from lightning_kd.modules.manual_steps import refuse_own_losses, step, step_schedules
from lightning_kd.modules.updates import alternating_update, game_optimizers, sequential_update
from lightning_kd.peers import Peers
from lightning_kd.utils.checks import check_one_of, check_positive
from lightning_kd.weighting import Weighting

Update = Literal["simultaneous", "sequential", "alternating"]


class PeerCohort(Distiller):
    r"""Untrained networks learn together, each from the labels and from its peers.

    .. math:: \sum_k \Big[ w_{task} CE(z_k, y) + w(t) \sum_i w_i L_i(k, peers) \Big]

    What a peer teaches is detached, so this one sum, minimised by one optimizer with one group of
    parameters for each peer, is the simultaneous update of all peers by optimizers of their own
    (but clipping the norm of all gradients couples them).

    Args:
        peers: Two or more networks of the same classes, of any sizes and architectures, or exactly
            one ``lightning_kd.models.MultiBranch`` or ``Tree``.
        exchange: Who teaches whom; ``None``: ``Mutual``, every peer learns from all others.
        losses: What is transferred, each with its weight; every peer gets its own copy. ``None``:
            ``SoftTarget`` at temperature 1 (deep mutual learning).
        update: ``"simultaneous"``: one forward pass of each peer, all step together.
            ``"sequential"``: peers step one after the other, and each one's output is refreshed
            after its step, as the paper's algorithm 1 has it (2 K - 1 forward passes).
            ``"alternating"``: simultaneous, then a game against discriminators on the same batch,
            for the exchange ``Adversarial`` (2 K forward passes; ``global_step`` counts three
            steps a batch, the sequential update K). These two need the strategy
            ``ddp_find_unused_parameters_true`` where Lightning's ``ddp`` is meant.
        teachers: Trained networks that every peer learns from beside its peers.
        teacher_losses: What these transfer; every peer gets its own copy. ``None``: ``SoftTarget``
            at temperature 4. In the log they are ``peer_0/teacher/soft_target``.
        weighting: How far each teacher is trusted; ``None``: all the same.
        batched: Run peers of one architecture as one network with a dimension more: faster for many
            small ones (benchmarks/cohort_speed.py), not for the sequential update.
        view: A random transform of a batch of images, drawn anew for each peer; ``None``: all
            peers see the same images. Branches share one view.
        task_weight: Multiplier of the task loss; labels of -1 are left out.
        clip_norm: Clip each peer's gradient to this norm, by itself; ``None``: not. (The Trainer's
            option would couple the peers, and does not exist for the sequential update.)
        options: Of ``Distiller``: ``task``, ``optimizer``, ``scheduler``, ``scheduler_interval``,
            ``metrics``, ``num_classes``.

    Raises:
        ValueError: If there are fewer than two peers, they share weights, or the exchange and the
            update do not go together.

    Source:
        Zhang et al. 2018 (DML), https://arxiv.org/abs/1706.00384, equations 4 to 8 and algorithm 1.
    """

    distillation: Cohort

    def __init__(
        self,
        peers: list[nn.Module],
        exchange: Exchange | None = None,
        losses: dict[str, DistillationLoss] | list[DistillationLoss] | None = None,
        update: Update = "simultaneous",
        teachers: list[nn.Module] | None = None,
        teacher_losses: dict[str, DistillationLoss] | list[DistillationLoss] | None = None,
        weighting: Weighting | None = None,
        batched: bool = False,
        view: nn.Module | None = None,
        task_weight: float = 1.0,
        clip_norm: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.distillation = Cohort(
            peers, exchange, losses, teachers, teacher_losses, weighting, batched, view, self.task,
            task_weight,
        )  # fmt: skip
        self._refuse(update, batched)
        if update != "simultaneous":
            refuse_own_losses(self)
        if clip_norm is not None:
            check_positive(clip_norm, "clip_norm")
        self.clip_norm = clip_norm
        self.distillation.update = update
        self.automatic_optimization = update == "simultaneous" and clip_norm is None

    def _refuse(self, update: str, batched: bool) -> None:
        exchange, branching = self.exchange, self.peers.branching
        check_one_of(update, ("simultaneous", "sequential", "alternating"), "update")
        if exchange.plays_a_game != (update == "alternating"):
            raise ValueError(
                f'Expected update="alternating" with an exchange that plays a game, such as '
                f"Adversarial, and with no other, got {type(exchange).__name__} and "
                f"update={update!r}."
            )
        if update == "sequential" and (branching or not exchange.allows_sequential_update):
            raise ValueError(
                f'Expected update="simultaneous" with {type(exchange).__name__} on '
                f"{'branches' if branching else 'networks'}: peers that share parameters, or "
                f"whose exchange learns through all of them, cannot step apart."
            )
        if batched and (update == "sequential" or branching):
            raise ValueError(
                "Expected batched=False with update='sequential' and with branches: peers that "
                "step apart cannot run as one."
            )

    @property
    def peers(self) -> Peers:
        """The networks that learn."""
        return self.distillation.peers

    @property
    def exchange(self) -> Exchange:
        """Who teaches whom."""
        return self.distillation.exchange

    # ------------------------------------------------------------------ Lightning's hooks

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step of every peer; returns the named losses, detached for callbacks."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        x, target = self.unpack(batch)
        optimizer: Any = self.optimizers()
        by_hand = functools.partial(step, self, clip_norm=self.clip_norm)
        update = self.distillation.update
        if update == "sequential":
            losses = sequential_update(self.distillation, optimizer, by_hand, x, target)
        elif update == "alternating":
            losses = alternating_update(self.distillation, optimizer, by_hand, x, target)
        else:
            losses = self.compute_losses(x, target)
            by_hand(optimizer, losses, self.peers.networks)
        self.distillation.after_step()
        step_schedules(self, self._scheduler_interval)
        return self._track(losses, len(x), x)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the exchange see the peers after each step, before a callback may save them."""
        super().optimizer_step(*args, **kwargs)
        self.distillation.after_step()

    def configure_optimizers(self) -> Any:
        """One optimizer for all peers; with a game, two more: for it, and for discriminators."""
        first: Any = super().configure_optimizers()
        if not self.exchange.plays_a_game:
            return first
        first = first if isinstance(first, dict) else {"optimizer": first}
        more = game_optimizers(self.distillation)
        return [first, *({"optimizer": optimizer} for optimizer in more)]
