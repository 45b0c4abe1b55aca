"""Peers run as one batched network give what they give apart."""

import copy

import pytest
import torch

from lightning_kd.exchange import Adversarial, Codistillation, Fusion, Mutual
from lightning_kd.models import MultiBranch
from lightning_kd.modules import PeerCohort


@pytest.mark.parametrize("exchange", [Mutual, lambda: Fusion("relu")], ids=["mutual", "fusion"])
@pytest.mark.parametrize("view", [None, torch.nn.Dropout(0.0)], ids=["one_view", "own_views"])
def test_batched_step_equals_separate_ones(tiny, exchange, view):
    """Losses, gradients, features and running statistics, in float64."""
    torch.manual_seed(0)
    networks = [tiny(4) for _ in range(3)]
    apart = PeerCohort(networks, exchange(), view=view)
    together = PeerCohort(copy.deepcopy(networks), exchange(), view=view, batched=True)
    x, y = torch.rand(6, 1, 8, 8).double(), torch.tensor([0, 1, 2, -1, 3, 4])
    for module in (apart, together):
        module._build(x.float())
        module.double()
    together.load_state_dict(apart.state_dict())
    for module in (apart, together):
        for _ in range(2):
            terms = module.compute_losses(x, y)
        sum(terms.values()).backward()
    for (name, p), q in zip(apart.named_parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12, msg=name)
    for (name, p), q in zip(apart.named_buffers(), together.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-12, msg=name)
    said, alike = (module.eval().peers([x] * 3) for module in (apart, together))
    for one, two in zip(said, alike, strict=True):
        torch.testing.assert_close(two.logits, one.logits)
        assert two.features.keys() == one.features.keys()
    before = {n: b.clone() for n, b in together.named_buffers()}
    assert all(torch.equal(before[n], b) for n, b in apart.eval().named_buffers())


@pytest.mark.parametrize(
    ("exchange", "update", "precision"),
    [
        (Mutual, "simultaneous", "32-true"),
        (lambda: Codistillation(2, 1), "simultaneous", "bf16-mixed"),
        (lambda: Adversarial("relu"), "alternating", "32-true"),
    ],
)
def test_batched_run_equals_a_separate_one(tiny, make_trainer, digits, exchange, update, precision):
    ends = []
    for batched in (False, True):
        torch.manual_seed(1)
        module = PeerCohort([tiny(4), tiny(4)], exchange(), update=update, batched=batched)
        trainer = make_trainer(max_epochs=2, precision=precision)
        trainer.fit(module, datamodule=digits())
        trainer.test(module, datamodule=digits(), verbose=False)
        ends.append(copy.deepcopy(module.state_dict()))
    loose = {"rtol": 0.1, "atol": 0.05} if "bf16" in precision else {"rtol": 1e-3, "atol": 1e-4}
    for key, value in ends[0].items():
        if torch.is_tensor(value):
            torch.testing.assert_close(ends[1][key], value, **loose, msg=key)


def test_dropout_differs_between_batched_peers(tiny):
    network = tiny(4, dropout=0.5)
    module = PeerCohort([network, copy.deepcopy(network)], batched=True)
    module._build(torch.rand(2, 1, 8, 8))
    one, two = module.peers([torch.rand(4, 1, 8, 8)] * 2)
    assert not torch.equal(one.logits, two.logits)


@pytest.mark.parametrize(
    ("peers", "options", "message"),
    [
        (lambda tiny: [tiny(4), tiny(6)], {}, "one architecture"),
        (lambda tiny: [tiny(4), tiny(4)], {"update": "sequential"}, "sequential"),
        (lambda tiny: [MultiBranch(tiny(4), "relu", 2)], {}, "branches"),
    ],
)
def test_peers_that_cannot_be_batched_are_refused(tiny, peers, options, message):
    with pytest.raises(ValueError, match=message):
        PeerCohort(peers(tiny), batched=True, **options)._build(torch.rand(2, 1, 8, 8))
