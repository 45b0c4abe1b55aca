"""Peers that teach each other: gradients, counts, both updates against a slow loop, resume."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_kd.callbacks import LossWeightScheduler
from lightning_kd.exchange import (
    Adversarial,
    Attention,
    Codistillation,
    Collective,
    Fusion,
    Gate,
    LeaveOneOut,
    Mutual,
    PeerCollaborative,
)
from lightning_kd.losses import Hint, KnowledgeFlow, SoftTarget
from lightning_kd.models import MultiBranch
from lightning_kd.modules import PeerCohort
from lightning_kd.peers import frozen_statistics
from lightning_kd.schedules import Linear
from lightning_kd.weighting import LearnedGate, SelfPaced
from tests.conftest import assert_same_state, state_of

EXCHANGES = {
    "adversarial": lambda: Adversarial("relu", learning_rate=1e-3),
    "attention": lambda: Attention("relu"),
    "codistillation": lambda: Codistillation(refresh_every=3, burn_in=2),
    "collective": Collective,
    "fusion": lambda: Fusion("relu"),
    "general": lambda: Collective("general"),
    "gate": lambda: Gate("relu"),
    "leave_one_out": LeaveOneOut,
    "linear": lambda: Collective("linear"),
    "mutual": Mutual,
    "naive": lambda: Collective("naive"),
    "peer_collaborative": lambda: PeerCollaborative("relu"),
}


@pytest.fixture
def build(tiny):
    def make(exchange="mutual", count=3, seed=1, dropout=0.3, **options):
        torch.manual_seed(seed)
        if exchange == "adversarial" and options.get("update", "simultaneous") == "simultaneous":
            options["update"] = "alternating"
        peers = [tiny(4, dropout=dropout) for _ in range(count)]
        return PeerCohort(peers, EXCHANGES[exchange](), **options)

    return make


def batches(count=5):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(16, 1, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, 10, (16,), generator=generator),
        )
        for _ in range(count)
    ]


def distance(z, others):
    """Mean KL from every other peer's probabilities, summed over classes."""
    return sum(
        F.kl_div(z.log_softmax(1), o.detach().softmax(1), reduction="batchmean") for o in others
    ) / len(others)


def slow(peers, update, lr=0.1):
    """Algorithm 1 of the paper, with an optimizer for each peer; or all at once."""
    optimizers = [torch.optim.SGD(p.parameters(), lr, 0.9, weight_decay=1e-3) for p in peers]
    for x, y in batches():
        if update == "simultaneous":
            z = [p(x) for p in peers]
            losses = [
                F.cross_entropy(z[k], y) + distance(z[k], z[:k] + z[k + 1 :])
                for k in range(len(peers))
            ]
            for k, optimizer in enumerate(optimizers):
                optimizer.zero_grad()
                losses[k].backward()
            for optimizer in optimizers:
                optimizer.step()
            continue
        z = [p(x) for p in peers]
        for k, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            loss = F.cross_entropy(z[k], y) + distance(z[k], z[:k] + z[k + 1 :])
            loss.backward()
            optimizer.step()
            if k + 1 < len(peers):
                kept = copy.deepcopy(peers[k].bn.state_dict())
                with torch.no_grad():
                    z[k] = peers[k](x)
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    getattr(peers[k].bn, name).copy_(kept[name])


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("count", [2, 3])
def test_both_updates_equal_a_slow_loop_over_five_steps(update, count, build, make_trainer):
    module = build(
        count=count,
        dropout=0.0,
        update=update,
        optimizer=lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-3),
    ).double()
    twins = [copy.deepcopy(p).train() for p in module.peers.networks]
    slow(twins, update)
    trainer = make_trainer(max_epochs=1, precision="64-true")
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    for mine, twin in zip(module.peers.networks, twins, strict=True):
        for (key, a), b in zip(mine.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", EXCHANGES)
def test_nothing_flows_from_one_peers_loss_into_another_peer(name, build):
    module = build(name)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    module._build(x)
    if name == "codistillation":
        module.exchange.steps = 2  # the burn-in is over
    module.exchange.before_peers([x] * 3)
    peers = module.peers([x] * 3)
    ensembles = module.exchange(peers, y)
    for k in range(3):
        terms = module.distillation.peer_losses(k, peers[k], ensembles[k], y, {})
        module.zero_grad()
        torch.stack(list(terms.values())).sum().backward(retain_graph=True)
        for j, network in enumerate(module.peers.networks):
            grads = [p.grad for p in network.parameters() if p.grad is not None]
            moved = sum(float(g.abs().sum()) for g in grads)
            assert (moved > 0) == (j == k), (k, j)


@pytest.mark.parametrize(("update", "passes"), [("simultaneous", 3), ("sequential", 5)])
def test_forward_passes_of_a_batch_are_counted(update, passes, build, make_trainer):
    module = build(update=update)
    module._build(torch.rand(1, 1, 8, 8))
    calls = []
    for network in module.peers.networks:
        network.register_forward_hook(lambda *_: calls.append(1))
    loader = torch.utils.data.DataLoader([(x.float(), y) for x, y in batches(4)], batch_size=None)
    make_trainer(max_epochs=1).fit(module, loader)
    assert len(calls) == 4 * passes


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
@pytest.mark.parametrize("name", EXCHANGES)
def test_resumed_run_equals_the_uninterrupted_one(
    name, update, build, make_trainer, digits, tmp_path
):
    def make(seed):
        return build(name, seed=seed, update=update, clip_norm=1.0)

    if update == "sequential" and name in ("adversarial", "gate", "fusion", "peer_collaborative"):
        with pytest.raises(ValueError, match="Expected update="):
            make(1)
        return
    data, whole = digits(), make(1)
    data.shuffle_seed = 3
    make_trainer(max_epochs=3).fit(whole, datamodule=data)
    data, half = digits(), make(1)
    data.shuffle_seed = 3
    trainer = make_trainer(max_epochs=1)
    trainer.fit(half, datamodule=data)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make(7)
    make_trainer(max_epochs=3).fit(
        resumed, datamodule=digits(), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    got = resumed.state_dict()
    for key, value in whole.state_dict().items():
        same = torch.equal(got[key], value) if torch.is_tensor(value) else got[key] == value
        assert same, key


def test_peers_are_measured_alone_together_and_against_each_other(build, make_trainer, digits):
    module, data = build(), digits()
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    module.eval()
    right, same, together, seen = [0] * 3, 0, 0, 0
    for images, labels in data.val_dataloader():
        with torch.no_grad():
            z = [p(images.float() / 255) for p in module.peers.networks]
        for k in range(3):
            right[k] += int((z[k].argmax(1) == labels).sum())
        same += int((z[0].argmax(1) == z[2].argmax(1)).sum())
        together += int((sum(a.softmax(1) for a in z).argmax(1) == labels).sum())
        seen += len(labels)
    metrics = trainer.callback_metrics
    for k in range(3):
        assert float(metrics[f"val/peer_{k}/accuracy"]) == pytest.approx(right[k] / seen)
    assert float(metrics["val/agreement_0_2"]) == pytest.approx(same / seen)
    assert float(metrics["val/ensemble/accuracy"]) == pytest.approx(together / seen)


def test_one_scheduler_drives_the_loss_of_every_peer(build, make_trainer, digits):
    module = build()
    ramp = LossWeightScheduler(Linear(0.0, 1.0, 4))
    make_trainer(max_epochs=3, callbacks=[ramp]).fit(module, datamodule=digits())
    assert [losses["soft_target"].weight for losses in module.distillation.losses] == [0.5] * 3
    wrong = LossWeightScheduler(Linear(0.0, 1.0, 4), "hint")
    with pytest.raises(ValueError, match="there is no 'hint'"):
        make_trainer(callbacks=[wrong]).fit(build(), datamodule=digits())


def test_mixed_sizes_other_losses_and_views(tiny, make_trainer, digits):
    class Noise(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)

    module = PeerCohort(
        [tiny(4), tiny(9)], losses=[SoftTarget(1.0), Hint("relu", "relu")], view=Noise()
    )
    before = [state_of(p) for p in module.peers.networks]
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=digits())
    for network, state in zip(module.peers.networks, before, strict=True):
        assert not torch.equal(state["conv.weight"], network.conv.weight)
    assert torch.isfinite(trainer.callback_metrics["train/peer_1/hint"])
    views = module.distillation.peer_inputs(torch.zeros(2, 1, 8, 8))
    assert not torch.equal(views[0], views[1])


@pytest.mark.parametrize("name", ["gate", "leave_one_out", "mutual"])
def test_branches_share_a_trunk_that_runs_once(name, tiny, make_trainer, digits):
    network = MultiBranch(tiny(4), "conv", 3, scale_gradient=name == "leave_one_out")
    exchange = Gate("conv") if name == "gate" else EXCHANGES[name]()
    module = PeerCohort([network], exchange)
    module._build(torch.rand(1, 1, 8, 8))
    calls = []
    network.trunk.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    torch.stack(list(module.compute_losses(x, y).values())).sum().backward()
    assert len(calls) == 1
    assert all(p.grad is not None for p in network.parameters())
    make_trainer(max_epochs=1).fit(module, datamodule=digits())
    for k in range(3):
        plain = tiny(4).eval()
        plain.load_state_dict(module.peers.network(k).state_dict())
        module.eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(x), network.branches[k](network.shared(x)))
    with pytest.raises(ValueError, match="cannot step apart"):
        PeerCohort([MultiBranch(tiny(4), "conv", 2)], update="sequential")


def test_trunk_gets_the_mean_gradient_of_the_branches_when_scaled(tiny):
    torch.manual_seed(0)
    network, x = MultiBranch(tiny(4), "conv", 3), torch.rand(4, 1, 8, 8)
    grads = []
    for scale in (False, True):
        network.scale_gradient = scale
        network.zero_grad()
        features = network.shared(x)
        sum(branch(features).sum() for branch in network.branches).backward()
        grads.append(network.trunk.conv.weight.grad.clone())
    torch.testing.assert_close(grads[0], 3 * grads[1])


def test_frozen_statistics_uses_the_batch_and_learns_nothing(tiny):
    network, x = tiny(4).train(), torch.rand(8, 1, 8, 8)
    before = state_of(network)
    wanted = copy.deepcopy(network)(x)
    with frozen_statistics(network):
        got = network(x)
    torch.testing.assert_close(got, wanted)
    for key, value in before.items():
        assert torch.equal(network.state_dict()[key], value), key


def test_the_game_moves_only_those_whose_turn_it_is(build):
    module = build("adversarial", dropout=0.0)
    x = torch.rand(8, 1, 8, 8)
    module._build(x)
    exchange, peers = module.exchange, module.peers([x] * 3)
    judges = list(exchange.discriminators.parameters())
    exchange.discriminator_losses(peers)["discriminator"].backward()
    assert all(p.grad is not None for p in judges)
    assert all(
        p.grad is None for p in [*module.peers.parameters(), *exchange.transfers.parameters()]
    )
    exchange.adversarial_losses(peers)["adversarial"].backward()
    assert all(p.grad is not None for p in exchange.transfers.parameters())
    assert all(n.conv.weight.grad.abs().sum() > 0 for n in module.peers.networks)
    fake = [exchange.transfers[k](peers[k].feature("relu")) for k in range(3)]
    wanted = sum(float((1 - exchange.discriminators[k](fake[k])).square().mean()) for k in range(3))
    assert float(exchange.adversarial_losses(peers)["adversarial"]) == pytest.approx(
        wanted, rel=1e-5
    )
    real = [peers[k - 1].feature("relu") for k in range(3)]  # a ring
    wanted = sum(
        float((1 - exchange.discriminators[k](real[k])).square().mean())
        + float(exchange.discriminators[k](fake[k]).square().mean())
        for k in range(3)
    )
    assert float(exchange.discriminator_losses(peers)["discriminator"]) == pytest.approx(
        wanted, rel=1e-5
    )


def test_bad_cohorts_are_reported(tiny):
    one = tiny(4)
    with pytest.raises(ValueError, match="at least two peers"):
        PeerCohort([one])
    with pytest.raises(ValueError, match="peers 0 and 1 share weights"):
        PeerCohort([one, one])
    with pytest.raises(ValueError, match='update="alternating" with an exchange that plays'):
        PeerCohort([tiny(4), tiny(4)], update="alternating")
    with pytest.raises(ValueError, match='"simultaneous", "sequential" or "alternating"'):
        PeerCohort([tiny(4), tiny(4)], update="parallel")
    with pytest.raises(ValueError, match="peer 1 and peer 0 to have the same classes"):
        PeerCohort([tiny(4), tiny(4, num_classes=3)])._build(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="two peers and a leader"):
        PeerCohort([tiny(4), tiny(4)], Attention("relu"))._build(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="equally wide"):
        PeerCohort([tiny(4), tiny(5), tiny(4)], Attention("relu"))._build(torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="min_logit"):
        Collective("median")
    with pytest.raises(ValueError, match="name of a layer"):
        MultiBranch(tiny(4), "nowhere")
    with pytest.raises(ValueError, match="at least 2 branches"):
        MultiBranch(tiny(4), "conv", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": [KnowledgeFlow("relu", "relu")]}, "teacher_losses"),
        ({"weighting": SelfPaced(), "teachers": True}, "batch alone"),
        ({"weighting": LearnedGate()}, "Expected teachers"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(tiny, options, message):
    if options.pop("teachers", False):
        options["teachers"] = [tiny(4)]
    with pytest.raises(ValueError, match=message):
        PeerCohort([tiny(4), tiny(4)], **options)


def test_teacher_that_is_a_peer_is_refused(tiny):
    peer = tiny(4)
    with pytest.raises(ValueError, match="separate networks"):
        PeerCohort([peer, tiny(4)], teachers=[peer])


# ------------------------------------------------------------------ trained teachers in a cohort


def test_teachers_in_a_cohort_equal_a_slow_sum(tiny):
    """Labels, peers and teachers: three terms for each peer, teachers asked once a batch."""
    torch.manual_seed(0)
    peers, teachers = [tiny(4), tiny(6)], [tiny(8), tiny(8)]
    module = PeerCohort(
        copy.deepcopy(peers), teachers=teachers, teacher_losses=[SoftTarget(3.0, weight=0.5)]
    ).double()
    x, y = torch.rand(6, 1, 8, 8).double(), torch.tensor([0, 1, 2, -1, 3, 4])
    module._build(x)
    asked = []
    for teacher in teachers:
        teacher.register_forward_hook(lambda *_: asked.append(1))
    terms = module.compute_losses(x, y)
    assert len(asked) == 2
    assert set(terms) == {
        f"peer_{k}/{name}"
        for k in (0, 1)
        for name in ("task", "soft_target", "teacher/soft_target")
    }
    sum(terms.values()).backward()
    for peer in peers:
        peer.double()
    said = [peer(x) for peer in peers]
    known = y >= 0
    slow = 0.0
    with torch.no_grad():
        taught = sum((t.double()(x) / 3).softmax(1) for t in teachers) / 2
    for k in (0, 1):
        other = said[1 - k].detach()
        slow = slow + F.cross_entropy(said[k][known], y[known])
        slow = slow + (other.softmax(1) * (other.log_softmax(1) - said[k].log_softmax(1))).sum() / 6
        soft = (said[k] / 3).log_softmax(1)
        slow = slow + 0.5 * 9 * (taught * (taught.log() - soft)).sum() / 6
    slow.backward()
    for peer, mine in zip(peers, module.peers.networks, strict=True):
        for (name, p), q in zip(peer.named_parameters(), mine.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())


@pytest.mark.parametrize("update", ["simultaneous", "sequential"])
def test_cohort_with_teachers_trains_and_resumes(tiny, make_trainer, digits, tmp_path, update):
    """Gates and adapters of teachers are trained and in the checkpoint; teachers are neither."""
    teacher = tiny(8)
    before = copy.deepcopy(teacher.state_dict())

    def make():
        torch.manual_seed(1)
        return PeerCohort(
            [tiny(4), tiny(6)], teachers=[teacher, tiny(4)], weighting=LearnedGate(),
            teacher_losses=[SoftTarget(4.0), Hint("relu", "relu", weight=0.1)], update=update,
        )  # fmt: skip

    whole = make()
    make_trainer(max_epochs=2).fit(whole, datamodule=digits())
    half = make()
    first = make_trainer(max_epochs=1)
    first.fit(half, datamodule=digits())
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert not [k for k in saved if "teachers.members" in k or ".teachers." in k]
    assert [k for k in saved if k.startswith("distillation.teacher_distillations.1.losses.hint")]
    again = make()
    make_trainer(max_epochs=2).fit(again, datamodule=digits(), ckpt_path=tmp_path / "half.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    state = whole.state_dict()
    assert state[
        "distillation.teacher_distillations.1.weighting.gate.weight"
    ].any()  # it begins with zeros


def test_the_best_peer_outlasts_a_test_and_a_checkpoint(build, make_trainer, digits, tmp_path):
    """``trainer.test`` clears the metrics of the last validation; so does a fresh process."""
    module = build(exchange="mutual", count=3, dropout=0.0)
    trainer = make_trainer(max_epochs=1)
    with torch.no_grad():
        for peer in module.peers.networks[1:]:  # the first alone has learnt anything
            peer.linear.weight.zero_()
            peer.linear.bias.zero_()
            peer.requires_grad_(False)
    trainer.fit(module, datamodule=digits())
    logged = trainer.callback_metrics
    scores = [float(logged[f"val/peer_{k}/accuracy"]) for k in range(3)]
    assert scores[0] > max(scores[1:])
    trainer.test(module, datamodule=digits(), verbose=False)
    assert "val/peer_0/accuracy" not in trainer.callback_metrics
    assert_same_state(state_of(module.student), state_of(module.peers.network(0)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = build(exchange="mutual", count=3, dropout=0.0, seed=2)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other.on_load_checkpoint(saved)
    other.load_state_dict(saved["state_dict"])
    assert_same_state(state_of(other.student), state_of(module.student))
