from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_kd.exchange import Exchange, Mutual
from lightning_kd.functional import hard
from lightning_kd.knowledge import Ensemble, Knowledge
from lightning_kd.losses import DistillationLoss, SoftTarget
from lightning_kd.losses.base import by_name
from lightning_kd.modules.cohort import Cohort
from lightning_kd.modules.dry_run import ask
from lightning_kd.modules.lessons import Lessons, refuse_shared_weights
from lightning_kd.modules.measure import make_cohort_metrics, update_cohort_metrics
from lightning_kd.modules.peers import Peers
from lightning_kd.modules.updates import one_after_the_other, play, players
from lightning_kd.ranks import gather_over_ranks
from lightning_kd.weighting import Uniform, Weighting

Update = Literal["simultaneous", "sequential", "alternating"]


class PeerCohort(Cohort):
    r"""Untrained networks learn together, each from the labels and from its peers.

    .. math:: \sum_k \Big[ w_{task} CE(z_k, y) + w(t) \sum_i w_i L_i(k, peers) \Big]

    What a peer teaches is detached, so this one sum, minimised by one optimizer with one group of
    parameters for each peer, is the simultaneous update of all peers by optimizers of their own
    (but clipping the norm of all gradients couples them).

    Args:
        peers: Two or more networks of the same classes, of any sizes and architectures, or exactly
            one ``lightning_kd.models.MultiBranch``.
        exchange: Who teaches whom; ``null``: ``Mutual``, every peer learns from all others.
        losses: What is transferred, each with its weight; every peer gets its own copy. ``null``:
            ``SoftTarget`` at temperature 1 (deep mutual learning).
        update: ``"simultaneous"``: one forward pass of each peer, all step together.
            ``"sequential"``: peers step one after the other, and each one's answer is refreshed
            after its step, as the paper's algorithm 1 has it (2 K - 1 forward passes).
            ``"alternating"``: simultaneous, then a game against discriminators on the same batch,
            for the exchange ``Adversarial`` (2 K forward passes; ``global_step`` counts three
            steps a batch, the sequential update K). These two need the strategy
            ``ddp_find_unused_parameters_true`` where Lightning's ``ddp`` is meant.
        teachers: Trained networks that every peer learns from beside its peers.
        teacher_losses: What these transfer; every peer gets its own copy. ``null``: ``SoftTarget``
            at temperature 4. In the log they are ``peer_0/teacher/soft_target``.
        weighting: How far each teacher is trusted; ``null``: all the same.
        batched: Run peers of one architecture as one network with a dimension more: faster for many
            small ones (benchmarks/cohort_speed.py), not for the sequential update.
        view: A random transform of a batch of images, drawn anew for each peer; ``null``: all
            peers see the same images. Branches share one view.
        task_weight: Multiplier of the cross-entropy with the labels; labels of -1 are left out.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        optimizer: ``null``: SGD with lr 0.05, momentum 0.9, weight decay 5e-4.
        scheduler: Learning rate schedule; ``null``: constant.
        scheduler_interval: ``"epoch"`` or ``"step"``: when the schedule moves.
        clip_norm: Clip each peer's gradient to this norm, by itself; ``null``: not. (The Trainer's
            option would couple the peers, and does not exist for the sequential update.)
        num_classes: Of the data, checked against the networks; the command line fills it in.

    Raises:
        ValueError: If there are less than two peers, they share weights, or the exchange and the
            update do not go together.

    Source:
        Zhang et al. 2018 (DML), https://arxiv.org/abs/1706.00384, equations 4 to 8 and algorithm 1.
    """

    def __init__(
        self,
        peers: list[nn.Module],
        exchange: Exchange | None = None,
        losses: list[DistillationLoss] | None = None,
        update: Update = "simultaneous",
        teachers: list[nn.Module] | None = None,
        teacher_losses: list[DistillationLoss] | None = None,
        weighting: Weighting | None = None,
        batched: bool = False,
        view: nn.Module | None = None,
        task_weight: float = 1.0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: str = "epoch",
        clip_norm: float | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.assemble(
            inspect.currentframe(),
            task_weight,
            label_smoothing,
            optimizer,
            scheduler,
            scheduler_interval,
            num_classes,
        )
        for name, part, kind in (
            ("exchange", exchange, Exchange),
            ("losses", losses, list),
            ("teacher_losses", teacher_losses, list),
            ("teachers", teachers, list),
        ):
            if part is not None and not isinstance(part, kind):
                raise TypeError(f"Expected {name} of type {kind.__name__}, got {part!r}.")
        self.peers = Peers(peers, batched)
        self.exchange = exchange or Mutual()
        if len(self.peers) < 2:
            raise ValueError(
                f"Expected at least two peers (or one MultiBranch), got {len(self.peers)}."
            )
        if update not in ("simultaneous", "sequential", "alternating"):
            raise ValueError(
                f'Expected update "simultaneous", "sequential" or "alternating", got {update!r}.'
            )
        if self.exchange.alternates != (update == "alternating"):
            raise ValueError(
                f'Expected update="alternating" with an exchange that plays a game, such as '
                f"Adversarial, and with no other, got {type(self.exchange).__name__} and "
                f"update={update!r}."
            )
        if update == "sequential" and (self.peers.branching or not self.exchange.steps_apart):
            raise ValueError(
                f'Expected update="simultaneous" with {type(self.exchange).__name__} on '
                f"{'branches' if self.peers.branching else 'networks'}: peers that share "
                f"parameters, or whose exchange learns through all of them, cannot step apart."
            )
        if batched and (update == "sequential" or self.peers.branching):
            raise ValueError(
                "Expected batched=False with update='sequential' and with branches: peers that "
                "step apart cannot run as one."
            )
        given = [SoftTarget(temperature=1.0)] if losses is None else losses
        for loss in given:
            if type(loss).attach is not DistillationLoss.attach:
                raise ValueError(
                    f"Expected losses that compare answers, got {type(loss).__name__}, which uses "
                    f"a teacher's layers: peers are being trained. Give it in teacher_losses."
                )
        self.losses = nn.ModuleList(
            nn.ModuleDict(by_name([copy.deepcopy(loss) for loss in given])) for _ in self.names
        )
        if not teachers and (teacher_losses or weighting):
            raise ValueError("Expected teachers with teacher_losses or weighting, got none.")
        self.lessons = Lessons(
            teachers or [],
            [SoftTarget(temperature=4.0)] if teacher_losses is None else teacher_losses,
            weighting or Uniform(),
            list(self.peers.branch.branches if self.peers.branching else self.peers.networks),
        )
        refuse_shared_weights(self.peers.networks, self.lessons.all_teachers())
        inside = [type(loss).__name__ for loss in teacher_losses or () if loss.changes_student]
        if inside and (self.peers.branching or batched):
            raise ValueError(
                f"Expected networks that run apart with {inside}, which flow into their forward "
                f"passes, got branches or batched=True."
            )
        self.update, self.view, self.clip_norm = update, view, clip_norm
        self.automatic_optimization = update == "simultaneous" and clip_norm is None

    # ------------------------------------------------------------------ what a subclass overrides

    def look(self, x: Tensor) -> list[Tensor]:
        """What each peer sees of images (B, C, H, W)."""
        if self.view is None:
            return [x] * len(self.peers)
        if self.peers.branching:
            return [self.view(x)] * len(self.peers)
        return [self.view(x) for _ in self.names]

    def step(self, x: Tensor, target: Tensor | None) -> dict[str, Tensor]:
        """Compute the weighted terms of all peers' losses by name, each a scalar."""
        views = self.look(x)
        self.exchange.before(views)
        lessons = self.lessons.ask(views)
        peers = self.peers(views)
        terms: dict[str, Tensor] = {}
        for k, teachers in enumerate(self.exchange(peers, hard(target))):
            if self.peers.mine in (None, k):
                terms |= self.terms_of(k, peers[k], teachers, target, lessons[k])
        if self.peers.mine is not None:
            return self._with_others(terms)
        return terms | self.exchange.terms(peers, target)

    def terms_of(
        self,
        k: int,
        peer: Knowledge,
        teachers: Ensemble | None,
        target: Tensor | None,
        lesson: dict[int, Knowledge] | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms of one peer's loss by name.

        Args:
            k: Which peer.
            peer: What it says.
            teachers: What its peers teach it; None: nothing now.
            target: Labels (B, ...), -1 where unlabelled, or None.
            lesson: What trained teachers say, by teacher.
        """
        terms: dict[str, Tensor] = {}
        if target is not None and self.task_weight:
            terms["task"] = self.task_weight * self.task_loss(peer.logits, target)
        for loss, name in self._losses(k).items():
            if teachers is not None:
                value = loss.weight * loss(peer, teachers, hard(target))
            else:
                value = 0.0 * peer.logits.float().sum()
            adapters = [p.sum() for p in loss.parameters()]
            if adapters:  # DDP wants a gradient of each, whoever teaches
                value = value + 0.0 * torch.stack(adapters).sum()
            terms[name] = value
        if lesson:
            more = self.lessons.terms(k, peer, lesson, hard(target))
            terms |= {f"teacher/{name}": value for name, value in more.items()}
        return {f"peer_{k}/{name}": value for name, value in terms.items()}

    def _with_others(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms of all peers, those of other processes without gradient."""
        if not mine:
            return mine  # nobody has a term, as ``total`` will say
        values = gather_over_ranks(torch.stack(list(mine.values())))
        prefix = f"peer_{self.peers.mine}/"
        terms: dict[str, Tensor] = {}
        for k, theirs in enumerate(values):
            names = [f"peer_{k}/{name.removeprefix(prefix)}" for name in mine]
            terms |= mine if k == self.peers.mine else dict(zip(names, theirs, strict=True))
        return terms

    # ------------------------------------------------------------------ parts

    def trained(self) -> Sequence[nn.Module]:
        """Peers, adapters, gates, and what the exchange learns outside of a game."""
        parts = (self.peers, self.losses, self.lessons)
        return parts if self.exchange.alternates else (*parts, self.exchange)

    def forward(self, x: Tensor) -> Tensor:
        """The cohort's answer as log-probabilities (B, K) for images (B, C, H, W)."""
        return self.exchange.answer(self.peers([x] * len(self.peers)))

    def prepare(self, x: Tensor) -> None:
        """Size adapters and metrics from a dry run on images (B, C, H, W); once.

        Raises:
            ValueError: If a network cannot take these images, a layer does not exist, or the
                numbers of classes differ.
        """
        if self.prepared:
            return
        layers = [*self.exchange.layers(), *self.lessons.student_layers()]
        for loss in self._losses(0):
            layers += loss.student_layers()
            layers += [n for k in range(len(self.peers)) for n in loss.teacher_layers(k)]
        self.peers.listen(list(dict.fromkeys(layers)))
        said: list[Knowledge] = []

        def answer(images: Tensor) -> Knowledge:
            said.extend(self.peers([images] * len(self.peers)))
            return said[0]

        ask("a peer", self.peers, answer, x)
        counts = [peer.logits.shape[1] for peer in said]
        wanted = self.num_classes or counts[0]
        if set(counts) != {wanted}:
            raise ValueError(
                f"Expected peers of {wanted} classes, got {counts}: set num_classes of each."
            )
        self.exchange.attach(self.peers)
        self.exchange.build(said)
        for k, peer in enumerate(said):
            for loss in self._losses(k):
                loss.build(peer, said)
        self.lessons.build(said, x)
        self.losses.to(x.device)
        self.exchange.to(x.device)
        self.input_shape = tuple(x.shape[1:])
        self.metrics = nn.ModuleDict(
            {s: make_cohort_metrics(counts[0], len(self.peers), s) for s in ("val", "test")}
        )

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, stage: str) -> None:
        """Dry run on the shape of the data, before the optimizer is made."""
        super().setup(stage)
        self._find_layers()

    def on_fit_start(self) -> None:
        """Find layers again, where some were replaced."""
        super().on_fit_start()
        self._find_layers()

    def _find_layers(self) -> None:
        self.peers.hook()
        if not self.peers.branching:
            self.lessons.attach(list(self.peers.networks))

    def configure_optimizers(self) -> Any:
        """One optimizer for all peers; with a game, two more: for it, and for discriminators."""
        first: Any = super().configure_optimizers()
        if not self.exchange.alternates:
            return first
        first = first if isinstance(first, dict) else {"optimizer": first}
        return [first, *({"optimizer": optimizer} for optimizer in players(self))]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """One step of every peer; returns the named terms, detached for callbacks."""
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        x, target = self.unpack(batch)
        optimizer: Any = self.optimizers()
        if self.update == "sequential":
            terms = one_after_the_other(self, optimizer, x, target)
        elif self.update == "alternating":
            terms = play(self, optimizer, x, target)
        else:
            terms = self.step(x, target)
            self.advance(optimizer, terms, self.peers.networks, self.clip_norm)
        self.exchange.after_step(self.peers)
        self.advance_schedules()
        return self.note(terms, len(x))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Let the exchange see the peers after each step, before a callback may save them."""
        super().optimizer_step(*args, **kwargs)
        self.exchange.after_step(self.peers)

    def evaluate(self, batch: Any, stage: str) -> None:
        """Measure every peer, the cohort's answer, and how far peers agree."""
        x, target = self.unpack(batch)
        metrics = self.metrics[stage]
        assert isinstance(metrics, MetricCollection)
        peers = self.peers([x] * len(self.peers))
        answer = self.exchange.answer(peers)
        if self.trainer.sanity_checking:
            return  # its batches come again in the first epoch and must not count twice
        update_cohort_metrics(metrics, peers, answer, target)
        if target is not None and stage == "val" and self.trainer.state.fn == "fit":
            self.exchange.observe(peers, target)
        self.log_metrics(metrics, f"{stage}/ensemble/accuracy")

    def on_validation_epoch_end(self) -> None:
        """Let the exchange learn from what a validation inside a fit showed."""
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.exchange.update()
