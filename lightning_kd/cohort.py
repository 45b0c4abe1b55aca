"""The core of peer learning: several students that teach each other. It knows no Lightning."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_kd.base_distillation import BaseDistillation, cut_prefix
from lightning_kd.distillation import Distillation, Losses
from lightning_kd.exchange import Exchange, Mutual
from lightning_kd.features import dry_run
from lightning_kd.losses import SoftTarget, losses_by_name
from lightning_kd.losses.base import losses_of, refuse_losses
from lightning_kd.metrics import cohort_metrics, update_cohort_metrics
from lightning_kd.outputs import NetworkOutput, TeacherOutputs
from lightning_kd.peers import Peers
from lightning_kd.tasks import Classification, Task
from lightning_kd.teachers import TeacherEnsemble
from lightning_kd.utils.checks import check_type
from lightning_kd.weighting import Uniform, Weighting
from lightning_kd.weighting.base import refuse_memory

if TYPE_CHECKING:
    from torchmetrics import Metric


class Cohort(BaseDistillation):
    r"""Untrained networks learn together, each from the labels and from its peers.

    .. math:: \sum_k \Big[ w_{task} L_{task}(z_k, y) + w(t) \sum_i w_i L_i(k, peers) \Big]

    Args:
        peers: Two or more networks of the same classes, or exactly one ``MultiBranch`` or ``Tree``.
        exchange: Who teaches whom; ``None``: ``Mutual``.
        losses: What is transferred; every peer gets its own copy. ``None``: ``SoftTarget`` at
            temperature 1.
        teachers: Trained networks that every peer learns from beside its peers.
        teacher_losses: What these transfer; ``None``: ``SoftTarget`` at temperature 4.
        weighting: How far each teacher is trusted; ``None``: all alike.
        batched: Run peers of one architecture as one network.
        view: A random transform of a batch of images, drawn anew for each peer.
        task: What the networks are trained for; ``None``: ``Classification``.
        task_weight: Multiplier of the task loss.

    Raises:
        ValueError: If there are fewer than two peers, or two networks share weights.

    Source:
        Zhang et al. 2018 (DML), https://arxiv.org/abs/1706.00384, equations 4 to 8.
    """

    def __init__(
        self,
        peers: Sequence[nn.Module],
        exchange: Exchange | None = None,
        losses: Losses | None = None,
        teachers: Sequence[nn.Module] | None = None,
        teacher_losses: Losses | None = None,
        weighting: Weighting | None = None,
        batched: bool = False,
        view: nn.Module | None = None,
        task: Task | None = None,
        task_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_type(exchange, Exchange, "exchange")
        self.task, self.task_weight = task or Classification(), task_weight
        self.peers, self.exchange, self.view = Peers(peers, batched), exchange or Mutual(), view
        if len(self.peers) < 2:
            raise ValueError(
                f"Expected at least two peers (or one MultiBranch), got {len(self.peers)}."
            )
        named = losses_by_name([SoftTarget(temperature=1.0)] if losses is None else losses)
        outputs = "losses that compare outputs of peers (others: in teacher_losses)"
        refuse_losses(named.values(), operator.attrgetter("uses_networks"), outputs)
        self.losses = nn.ModuleList(nn.ModuleDict(copy.deepcopy(named)) for _ in self.names)
        if not teachers and (teacher_losses or weighting):
            raise ValueError("Expected teachers with teacher_losses or weighting, got none.")
        refuse_memory(weighting or Uniform())
        given = losses_by_name(
            [SoftTarget(temperature=4.0)] if teacher_losses is None else teacher_losses
        )
        if self.peers.branching or batched:
            apart = "peers that run apart, not as branches or batched, with losses inside networks"
            which = "uses_networks" if self.peers.branching else "changes_student"
            refuse_losses(given.values(), operator.attrgetter(which), apart)
        self.teachers = TeacherEnsemble(teachers or [])
        self.teachers.refuse_weights_of(self.peers.networks)
        self.teacher_distillations = nn.ModuleList(  # what each peer learns from trained teachers
            Distillation(None, self.teachers, *copy.deepcopy((given, weighting)), self.task)
            for _ in (self.names if teachers else ())
        )
        self.update = "simultaneous"  # how peers step, as ``PeerCohort`` has it

    @property
    def names(self) -> list[str]:
        """Names of the peers in the log."""
        return [f"peer_{k}" for k in range(len(self.peers))]

    # ------------------------------------------------------------------ one batch

    def losses_and_output(
        self, x: Tensor, target: Tensor | None
    ) -> tuple[dict[str, Tensor], NetworkOutput]:
        """Weighted losses of all peers by name, each a scalar, and their logits (K, B, ...)."""
        views = self.peer_inputs(x)
        teachers = self.before_peers(views)
        peers = self.peers(views)
        losses: dict[str, Tensor] = {}
        for k, taught in enumerate(self.exchange(peers, self.task.hard_target(target))):
            if self.peers.own_index in (None, k):
                losses |= self.peer_losses(k, peers[k], taught, target, teachers[k])
        if self.peers.own_index is not None:
            losses = self.peers.with_others(losses)
        else:
            losses |= self.exchange.extra_losses(peers, target)
        return losses, NetworkOutput(torch.stack([peer.logits for peer in peers]))

    def peer_inputs(self, x: Tensor) -> list[Tensor]:
        """What each peer sees of images (B, C, H, W)."""
        if self.view is None or self.peers.branching:
            return [x if self.view is None else self.view(x)] * len(self.peers)
        return [self.view(x) for _ in self.names]

    def _same_input(self, x: Tensor) -> list[NetworkOutput]:
        return list(self.peers([x] * len(self.peers)))

    def before_peers(self, views: Sequence[Tensor]) -> list[dict[int, NetworkOutput]]:
        """Run trained teachers on each peer's images (B, C, H, W), none twice on the same ones.

        Returns:
            For each peer, outputs of its trained teachers by their index.
        """
        self.exchange.before_peers(views)
        asked: dict[tuple[int, int], NetworkOutput] = {}
        answers: list[dict[int, NetworkOutput]] = [{} for _ in views]
        for k, distillation in enumerate(self.distillations()):
            for m in distillation.weighting.active(len(self.teachers)):
                if (m, id(views[k])) not in asked:
                    (asked[m, id(views[k])],) = distillation.teacher_outputs(views[k], [m])
                answers[k][m] = asked[m, id(views[k])]
            distillation.before_student(list(answers[k].values()), tuple(answers[k]))
        return answers

    def peer_losses(
        self,
        k: int,
        peer: NetworkOutput,
        taught: TeacherOutputs | None,
        target: Tensor | None,
        teachers: Mapping[int, NetworkOutput],
    ) -> dict[str, Tensor]:
        """Weighted losses of one peer by name.

        Args:
            k: Which peer.
            peer: Its output.
            taught: Outputs that its peers teach it; None: nothing now.
            target: Labels (B, ...), -1 where unlabelled, or soft labels; None: none.
            teachers: Outputs of trained teachers, by their index.
        """
        losses: dict[str, Tensor] = {}
        if target is not None and self.task_weight:
            losses["task"] = self.task_weight * self.task.mean_loss(peer, target)
        hard = self.task.hard_target(target)
        for name, loss in losses_of(self.losses[k]).items():
            value = 0.0 * peer.logits.float().sum()
            if taught is not None:
                value = loss.weight * loss(peer, taught, hard)
            adapters = [p.sum() for p in loss.parameters()]
            if adapters:  # DDP wants a gradient of each in every step
                value = value + 0.0 * torch.stack(adapters).sum()
            losses[name] = value
        if teachers:
            outputs, asked = list(teachers.values()), tuple(teachers)
            more = self.distillations()[k].distillation_losses(peer, outputs, asked, target)
            losses |= {f"teacher/{name}": value for name, value in more.items()}
        return {f"peer_{k}/{name}": value for name, value in losses.items()}

    # ------------------------------------------------------------------ sizes and layers

    def build(self, x: Tensor, num_classes: int | None = None) -> None:
        """Size adapters and gates by a dry run; see ``BaseDistillation.build``."""
        if self.built:
            return
        distillations = self.distillations()
        layers = [*self.exchange.layers()]
        layers += [name for each in distillations[:1] for name in each.student_layers()]
        own = losses_of(self.losses[0])
        for loss in own.values():
            layers += loss.student_layers()
            layers += [n for k in range(len(self.peers)) for n in loss.teacher_layers(k)]
        self.peers.record_layers(list(dict.fromkeys(layers)))
        peers = dry_run("a peer", self.peers, self._same_input, x)
        self.task.check({f"peer {k}": p for k, p in enumerate(peers)}, num_classes=num_classes)
        self.exchange.attach(self.peers)
        self.exchange.build(peers)
        if not self.exchange.teaches_features:
            logits = f"losses on logits with {type(self.exchange).__name__}"
            refuse_losses(own.values(), lambda loss: loss.teacher_layers(0), logits)
        for k, peer in enumerate(peers):
            for loss in losses_of(self.losses[k]).values():
                loss.build(peer, peers)
                loss._sized = True
        if distillations:
            teachers = self.teachers.build(distillations[0].teacher_layers, x)
            self.task.check({"a peer": peers[0]}, teachers)
            for distillation, peer in zip(distillations, peers, strict=True):
                distillation.build_parts(peer, teachers)
        self.losses.to(peers[0].logits)
        self.exchange.to(peers[0].logits)
        self.input_shape, self._example = tuple(x.shape[1:]), peers[0]
        self.attach()

    def attach(self) -> None:
        """Find layers again, where some were replaced."""
        self.peers.hook()
        self.exchange.attach(self.peers)
        if not self.peers.branching:
            for distillation, peer in zip(self.distillations(), self.peers.networks, strict=False):
                distillation.attach(peer)

    def after_step(self) -> None:
        """Let the exchange see the peers after a step; see ``BaseDistillation.after_step``."""
        self.exchange.after_step(self.peers)

    def distillations(self) -> list[Distillation]:
        """What each peer learns from trained teachers; empty without them."""
        return [part for part in self.teacher_distillations if isinstance(part, Distillation)]

    # ------------------------------------------------------------------ what is kept and measured

    def trainable_modules(self) -> list[nn.Module]:
        """Peers, adapters, gates, and what the exchange learns outside of a game."""
        parts: list[nn.Module] = [self.peers, self.losses, self.teacher_distillations]
        return parts if self.exchange.plays_a_game else [*parts, self.exchange]

    def exported_networks(self) -> dict[str, nn.Module]:
        """The peers; each branch of a ``MultiBranch`` as a network of its own."""
        return {name: self.peers.network(k) for k, name in enumerate(self.names)}

    def exported_state(self, name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One peer's weights."""
        return self.peers.state_of(self.names.index(name), cut_prefix(state, "peers."))

    def exported_config(self, name: str, options: Mapping[str, Any]) -> Any:
        """One peer's configuration."""
        configs = options.get("peers")
        return None if configs is None else self.peers.config(self.names.index(name), configs)

    def scores(self, logged: Mapping[str, Any]) -> list[float]:
        """The watched metric of each peer at the last validation; empty if there was none."""
        keys = [f"val/{name}/{self.task.watched}" for name in self.names]
        return [float(logged[key]) for key in keys] if all(k in logged for k in keys) else []

    def best_network(self, scores: Sequence[float]) -> str:
        """The peer of the best score; the last one (a leader) where nothing was measured."""
        if not scores:
            return self.names[-1]
        sign = 1 if self.task.higher_is_better else -1
        return self.names[max(range(len(scores)), key=lambda k: sign * scores[k])]

    def compilable_networks(self) -> list[nn.Module]:
        """The peers, or trunk and branches; see ``BaseDistillation.compilable_networks``."""
        return self.peers.whole_networks()

    def output(self, x: Tensor) -> NetworkOutput:
        """Log-probabilities of the cohort as an ensemble."""
        return self._ensemble(self._same_input(x))

    def _ensemble(self, peers: Sequence[NetworkOutput]) -> NetworkOutput:
        if self.task.class_logits(peers[0]) is None:
            return self.task.ensemble(TeacherOutputs.uniform(peers))
        return NetworkOutput(self.exchange.log_probabilities(peers))

    def metrics(self) -> dict[str, Metric]:
        """Metrics of the ensemble, the watched one of each peer, agreement of each pair."""
        return cohort_metrics(self.task, self._example, self.names)

    @torch.no_grad()
    def update_metrics(
        self, metrics: Mapping[str, Metric], x: Tensor, target: Tensor | None, observe: bool
    ) -> NetworkOutput:
        """Measure every peer, their ensemble, and how far peers agree."""
        peers = self._same_input(x)
        answer = self._ensemble(peers)
        named = dict(zip(self.names, peers, strict=True))
        update_cohort_metrics(self.task, metrics, named, answer, target)
        if target is not None and observe:
            self.exchange.observe(peers, target)
        return answer

    def after_validation(self) -> None:
        """Let the exchange learn from what it observed."""
        self.exchange.after_validation()
