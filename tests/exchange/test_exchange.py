import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_kd.exchange import (
    Attention,
    Codistillation,
    Collective,
    Fusion,
    Gate,
    LeaveOneOut,
    Mutual,
    PeerCollaborative,
)
from lightning_kd.exchange.shadow import Shadow
from lightning_kd.functional import global_average_pool, min_logits, simplex_cross_entropy_weights
from lightning_kd.losses import SoftTarget
from lightning_kd.outputs import NetworkOutput
from tests import reference


def cohort(count=3, batch=4, classes=5, width=6, size=2):
    return [
        NetworkOutput(
            (2 * torch.randn(batch, classes, dtype=torch.float64)).requires_grad_(),
            {"a": torch.randn(batch, width, size, size, dtype=torch.float64, requires_grad=True)},
        )
        for _ in range(count)
    ]


def gradient(loss, of):
    return torch.autograd.grad(loss, of, retain_graph=True)[0]


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4])
def test_mutual_has_the_papers_gradient_by_one_averaged_teacher(count, batch):
    """The claim that averaging the teachers is worse holds of logits only."""
    peers = cohort(count, batch)
    logits = [p.logits for p in peers]
    for k, teachers in enumerate(Mutual()(peers, None)):
        mine = gradient(SoftTarget(1.0)(peers[k], teachers, None), logits[k])
        paper = gradient(reference.dml_loss(k, logits), logits[k])
        torch.testing.assert_close(mine, paper)
        assert [m for m in range(count) if m != k] == list(teachers.indices)
        of_logits = LeaveOneOut()(peers, None)[k]
        other = gradient(SoftTarget(1.0)(peers[k], of_logits, None), logits[k])
        assert torch.allclose(mine, other) == (count == 2)


def test_gate_weighs_logits_and_learns_with_the_branches_from_the_ensemble_alone():
    peers, y = cohort(3, 6), torch.tensor([0, 1, 2, 3, 4, -1])
    gate = Gate("a").double()
    gate.build(peers)
    gate.double()
    ensembles = gate(peers, y)
    x = peers[0].features["a"].mean((2, 3))
    linear, norm, _ = gate.gate
    z = linear(x)
    scores = F.relu((z - z.mean(0)) / (z.var(0, unbiased=False) + norm.eps).sqrt())
    shares = scores.float().softmax(1)
    torch.testing.assert_close(ensembles[0].weights, shares.T.detach())
    mixed = sum(shares[:, k, None] * p.logits for k, p in enumerate(peers))
    (term,) = gate.extra_losses(peers, y).values()
    torch.testing.assert_close(term, F.cross_entropy(mixed[:5], y[:5]))
    assert not ensembles[0].weights.requires_grad
    term.backward()
    assert all(p.logits.grad.abs().sum() > 0 for p in peers)
    assert all(p.grad is not None for p in gate.parameters())


def test_attention_to_others_leaves_a_peer_itself_out():
    """The same shares as published, without one's own, scaled up to 1."""
    peers = cohort(4)
    published, others = Attention("a"), Attention("a", attend_self=False)
    for exchange in (published, others):
        exchange.build(peers)
        exchange.double()
    others.load_state_dict(published.state_dict())
    for k, (all_, rest) in enumerate(zip(published(peers, None), others(peers, None), strict=True)):
        if k == 3:
            assert torch.equal(all_.weights, rest.weights)  # the leader's
            continue
        wanted = all_.weights.clone()
        wanted[k] = 0
        torch.testing.assert_close(rest.weights, wanted / wanted.sum(0))


def test_attention_targets_equal_the_reference_and_only_attention_learns():
    peers = cohort(4)
    attention = Attention("a")
    attention.build(peers)
    attention.double()
    ensembles = attention(peers, None)
    features = [p.features["a"].mean((2, 3)).detach() for p in peers[:-1]]
    wanted = reference.attention_targets(
        attention.left.weight, attention.right.weight, features,
        [p.logits.detach() for p in peers[:-1]],
    )  # fmt: skip
    for k in range(3):
        torch.testing.assert_close(
            ensembles[k].log_probabilities(2.0), (wanted[k] / 2).log_softmax(1),
            atol=1e-6, rtol=1e-5,
        )  # fmt: skip
    mean = sum(p.logits.detach() for p in peers[:-1]) / 3
    torch.testing.assert_close(
        ensembles[3].log_probabilities(1.0), mean.log_softmax(1), atol=1e-6, rtol=1e-5
    )
    SoftTarget(3.0)(peers[0], ensembles[0], None).backward()
    assert attention.left.weight.grad.abs().sum() > 0
    assert peers[1].logits.grad is None
    assert peers[0].features["a"].grad is None


def test_min_logits_equal_the_reference_and_are_never_worse_than_the_best_peer():
    y = torch.tensor([0, 4, 2, 1])
    logits = torch.stack([p.logits.detach() for p in cohort()])
    made = min_logits(logits, y)
    torch.testing.assert_close(made, reference.min_logits(logits, y).double())
    best = torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits]).amin(0)
    assert (F.cross_entropy(made, y, reduction="none") <= best + 1e-12).all()


def test_linear_weights_are_the_best_of_a_fine_grid():
    y = torch.arange(40) % 5
    right = F.one_hot(y, 5).double()
    logits = torch.stack(
        [a * right + b * torch.randn(40, 5).double() for a, b in ((3, 1), (2, 2), (1, 3))]
    )
    weights = simplex_cross_entropy_weights(logits, y)

    def loss(w):
        return float(F.cross_entropy(sum(w[k] * logits[k] for k in range(3)), y))

    grid = [
        (i / 40, j / 40, 1 - (i + j) / 40)
        for i, j in itertools.product(range(41), repeat=2)
        if i + j <= 40
    ]
    assert float(weights.sum()) == pytest.approx(1)
    assert loss(weights) <= min(map(loss, grid)) + 1e-4
    unlabelled = simplex_cross_entropy_weights(logits, torch.full((40,), -1))
    torch.testing.assert_close(unlabelled, torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("target", ["naive", "linear", "min_logit", "general"])
def test_collective_targets_are_common_detached_and_survive_missing_labels(target):
    peers, exchange = cohort(), Collective(target)
    exchange.build(peers)
    for y in (None, torch.tensor([0, 1, -1, 2])):
        ensembles = exchange(peers, y)
        answers = [e.log_probabilities(2.0) for e in ensembles]
        assert all(torch.equal(answers[0], a) for a in answers)
        assert not answers[0].requires_grad
        assert answers[0].isfinite().all()
    mean = torch.stack([p.logits.detach() for p in peers]).mean(0)
    if target == "min_logit":  # without a label: the mean
        torch.testing.assert_close(answers[0][2], (mean[2] / 2).log_softmax(0))


def test_general_shares_minimise_the_expected_error_and_stay_in_the_simplex():
    """Unconstrained they run to (4.1, -3.3, 0.2) where two peers are nearly the same."""
    exchange, peers = Collective("general", ridge=1e-6), cohort(3, 200)
    exchange.build(peers)
    y = torch.randint(0, 5, (200,))
    exchange.observe(peers, y)
    wrong = [(p.logits.detach().softmax(1) - F.one_hot(y, 5)).flatten() for p in peers]
    covariance = torch.stack([torch.stack([(a * b).sum() / 200 for b in wrong]) for a in wrong])
    free = torch.linalg.solve(covariance, torch.ones(3).double())
    free = free / free.sum()
    exchange.after_validation()
    assert (free > 0).all()
    torch.testing.assert_close(exchange.shares.double(), free, atol=1e-3, rtol=0)
    alike = [peers[0], NetworkOutput(peers[0].logits + 0.01 * torch.randn(200, 5)), peers[2]]
    exchange.observe(alike, y)
    exchange.after_validation()
    assert (exchange.shares >= 0).all()
    assert float(exchange.shares.sum()) == pytest.approx(1)


def test_fusion_teaches_and_is_taught():
    peers, y = cohort(2), torch.tensor([0, 1, 2, 3])
    fusion = Fusion("a", temperature=3.0)
    fusion.build(peers)
    fusion.double().eval()
    logits = fusion.classify(
        fusion.fuse(torch.cat([p.features["a"] for p in peers], 1)).mean((2, 3))
    )
    ensembles = fusion(peers, y)
    torch.testing.assert_close(ensembles[1].log_probabilities(), logits.log_softmax(1).detach())
    terms = fusion.extra_losses(peers, y)
    torch.testing.assert_close(terms["fusion/task"], F.cross_entropy(logits, y))
    mean = sum(p.logits.detach() for p in peers) / 2
    wanted = 9 * reference.kl_divergence(logits, mean, 3.0, 3.0).mean()
    torch.testing.assert_close(terms["fusion/soft_target"], wanted)
    wide = Fusion("a")
    wide.build([peers[0], NetworkOutput(peers[1].logits, {"a": torch.randn(4, 3, 7, 7).double()})])
    with pytest.raises(ValueError, match="to output maps"):
        Fusion("a").build(
            [NetworkOutput(p.logits, {"a": global_average_pool(p.features["a"])}) for p in peers]
        )


class Two(nn.Module):
    """Stands in for the networks of a cohort."""

    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleList(nn.Linear(3, 5) for _ in range(2))

    def forward(self, views):
        said = (n(v) for n, v in zip(self.networks, views, strict=True))
        return [NetworkOutput(z, {"a": z}) for z in said]


def test_moving_averages_are_the_analytic_ones():
    """KD_Lib's mean teacher has its decay the wrong way round, and never averages."""
    peers, exchange = Two(), PeerCollaborative("a", decay=0.9)
    exchange.attach(peers)
    wanted = peers.networks[0].weight.detach().clone()
    for step in range(1, 31):
        with torch.no_grad():
            peers.networks[0].weight += 0.1
        exchange.after_step(peers)
        decay = min(0.9, 1 - 1 / (step + 1))
        wanted = decay * wanted + (1 - decay) * peers.networks[0].weight.detach()
    torch.testing.assert_close(exchange.shadow.peers.networks[0].weight, wanted)
    assert not any(p.requires_grad for p in exchange.shadow.parameters())
    assert not exchange.train().shadow.peers.training


def test_a_peer_hears_the_joint_classifier_and_the_averages_of_the_others():
    peers, exchange = Two(), PeerCollaborative("a")
    exchange.attach(peers)
    views = [torch.randn(4, 3), torch.randn(4, 3)]
    said = peers(views)
    exchange.build(said)
    exchange.before_peers(views)
    ensembles = exchange(said, None)
    joint = exchange.classify(torch.cat([said[0].logits, said[1].logits], 1))
    wanted = (joint.softmax(1) + said[1].logits.softmax(1)) / 2
    torch.testing.assert_close(ensembles[0].log_probabilities().exp(), wanted)
    (term,) = exchange.extra_losses(said, torch.tensor([0, 1, 2, -1])).values()
    torch.testing.assert_close(term, F.cross_entropy(joint[:3], torch.tensor([0, 1, 2])))
    # the two halves, twice, are the paper's sum
    twice = gradient(2 * SoftTarget(3.0)(said[0], ensembles[0], None), said[0].logits)
    t = 9 * reference.kl_divergence(said[0].logits, joint.detach(), 3.0, 3.0).mean()
    t = t + 9 * reference.kl_divergence(said[0].logits, said[1].logits.detach(), 3.0, 3.0).mean()
    torch.testing.assert_close(twice, gradient(t, said[0].logits))


def test_snapshots_are_stale_until_it_is_time():
    peers, exchange = Two(), Codistillation(refresh_every=4, burn_in=2)
    exchange.attach(peers)
    views, heard = [torch.randn(2, 3)] * 2, []
    for _ in range(10):
        exchange.before_peers(views)
        ensemble = exchange(peers(views), None)[0]
        heard.append(None if ensemble is None else ensemble.outputs[0].logits.clone())
        with torch.no_grad():
            peers.networks[1].weight += 1.0
        exchange.after_step(peers)
    assert [h is None for h in heard] == [True] * 2 + [False] * 8
    assert torch.equal(heard[2], heard[3])  # taken at the end of the burn-in, after step 2
    assert not torch.equal(heard[3], heard[4])
    assert all(torch.equal(heard[4], heard[i]) for i in range(5, 8))
    assert not torch.equal(heard[7], heard[8])
    with pytest.raises(ValueError, match="refresh_every >= 1"):
        Codistillation(refresh_every=0)
    with pytest.raises(ValueError, match="decay in"):
        PeerCollaborative("a", decay=1.0)


def test_a_shadow_keeps_whole_numbers_whole():
    peers = nn.Sequential(nn.BatchNorm1d(3))
    shadow = Shadow(peers)
    peers[0].num_batches_tracked += 7
    shadow.follow(peers, 0.5)
    assert int(shadow.peers[0].num_batches_tracked) == 7


def test_unknown_spaces_and_too_few_peers_are_reported():
    for make in (lambda: Mutual("median"), lambda: Codistillation(space="median")):
        with pytest.raises(ValueError, match='"probability" or "logit"'):
            make()
    with pytest.raises(ValueError, match="at least two peers"):
        Mutual().build(cohort(1))
