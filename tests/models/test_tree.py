"""A tree of networks: its leaves, what it shares, how it is cut down, and how it learns."""

import copy

import pytest
import torch
from torch import nn

from lightning_kd import PeerCohort
from lightning_kd.exchange import Hierarchical
from lightning_kd.losses import SoftTarget
from lightning_kd.models import Tree, pretrained, resnet14
from tests import reference
from tests.modules.test_distributed import launch

LAYERS = ["layer1", "layer2"]
IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def tree(models=None, layers=LAYERS):
    torch.manual_seed(0)
    return Tree(resnet14(in_channels=1, width=4), layers, models)


@pytest.fixture
def grown():
    made = tree().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return made


def test_each_leaf_is_a_whole_network(grown):
    """Leaf n goes through branch n // 4, n // 2 and n; by hand, in the given architecture."""
    leaves = list(grown.leaves(IMAGES))
    assert len(leaves) == 4
    for n, leaf in enumerate(leaves):
        network, state = resnet14(in_channels=1, width=4).eval(), {}
        for level, place in enumerate((n // 4, n // 2, n)):
            state |= grown.trunk.levels[level][place].state_dict()
        network.load_state_dict(state)
        torch.testing.assert_close(leaf, network(IMAGES))
    assert not torch.allclose(leaves[0], leaves[1])


def test_blocks_are_shared_as_in_a_tree():
    made = tree()
    assert [len(level) for level in made.trunk.levels] == [1, 2, 4]
    whole = resnet14(in_channels=1, width=4)
    size = {n: sum(p.numel() for p in m.parameters()) for n, m in whole.named_children()}
    rest = size["layer3"] + size["fc"] if "fc" in size else None
    counts = [sum(p.numel() for p in level[0].parameters()) for level in made.trunk.levels]
    assert sum(counts) == sum(p.numel() for p in whole.parameters())
    assert rest is None or counts[2] == rest
    total = sum(p.numel() for p in made.parameters())
    assert total == counts[0] + 2 * counts[1] + 4 * counts[2]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_first_leaves_are_averaged_and_no_other_runs(grown, count):
    ran = []
    for leaf in grown.trunk.levels[-1]:
        leaf.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        found = grown(IMAGES, count)
    assert len(ran) == count
    torch.testing.assert_close(found, torch.stack(list(grown.leaves(IMAGES))[:count]).mean(0))


def test_shared_blocks_run_once(grown):
    ran = {}
    for level, parts in enumerate(grown.trunk.levels):
        for part in parts:
            part.register_forward_hook(
                lambda *_, level=level: ran.__setitem__(level, ran.get(level, 0) + 1)
            )
    grown(IMAGES, 3)
    assert ran == {0: 1, 1: 2, 2: 3}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_smaller_tree_answers_as_the_first_leaves(grown, index):
    small = grown.branch_network(index).eval()
    small.load_state_dict(grown.branch_state(index, grown.state_dict()))
    torch.testing.assert_close(small(IMAGES), grown(IMAGES, 2**index))
    assert small.models == 2**index


def test_any_number_of_models():
    made = tree(models=3).eval()
    assert [len(level) for level in made.trunk.levels] == [1, 2, 3]
    assert len(made.branches) == 3
    with torch.no_grad():
        assert made(IMAGES).shape == (5, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": 5}, "models from 1 to 4"),
        ({"models": 0}, "models from 1 to 4"),
        ({"layers": []}, "a list of layers"),
        ({"layers": "layer1"}, "a list of layers"),
        ({"layers": ["layer9"]}, "name of a layer"),
        ({"layers": ["layer2", "layer1"]}, "in the order in which they run"),
    ],
)
def test_wrong_trees_are_reported(options, message):
    with pytest.raises(ValueError, match=message):
        tree(**options)
    with pytest.raises(ValueError, match="num_models from 1 to 4"):
        tree()(IMAGES, 7)


@pytest.mark.parametrize("leaf_weight", [0.0, 0.7])
def test_hierarchical_loss_equals_the_reference_with_gradients(leaf_weight):
    """By hand: cross-entropy of each ensemble, and the full one teaches the smaller ones."""
    made = tree().double().eval()
    twin, images, target = copy.deepcopy(made), IMAGES.double(), torch.tensor([1, 0, 3, -1, 9])
    module = PeerCohort(
        [made], Hierarchical(leaf_weight), [SoftTarget(2.0, weight=0.4)], task_weight=0.6
    )
    module.eval()._build(images)  # a cohort puts its peers into train mode
    terms = module.compute_losses(images, target)
    loss = torch.stack(list(terms.values())).sum()
    leaves = list(twin.leaves(images))
    nested = [torch.stack(leaves[:count]).mean(0) for count in (1, 2, 4)]
    slow = reference.hierarchical(nested, target, 0.4, 2.0, leaves, leaf_weight)
    torch.testing.assert_close(loss, slow)
    mine = torch.autograd.grad(loss, list(made.parameters()))
    theirs = torch.autograd.grad(slow, list(twin.parameters()))
    torch.testing.assert_close(mine, theirs)


def test_leaves_without_labels_or_with_a_negative_weight():
    module = PeerCohort([tree()], Hierarchical(0.5), [SoftTarget(2.0)], task_weight=0.0)
    module._build(IMAGES)
    assert "leaves/task" in module.compute_losses(IMAGES, torch.zeros(5, dtype=torch.int64))
    assert "leaves/task" not in module.compute_losses(IMAGES, None)
    with pytest.raises(ValueError, match="leaf_weight >= 0"):
        Hierarchical(-1.0)


def test_leaves_learn_soft_and_dense_labels():
    soft = torch.rand(5, 10).softmax(1)
    module = PeerCohort([tree()], Hierarchical(1.0), [SoftTarget(2.0)], task_weight=0.0)
    module.eval()._build(IMAGES)
    terms = module.compute_losses(IMAGES, soft)
    leaves = module.peers.branching_network.leaves(IMAGES)
    expected = sum(-(soft * leaf.log_softmax(1)).sum(1).mean() for leaf in leaves)
    torch.testing.assert_close(terms["leaves/task"], expected)
    dense = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    module = PeerCohort([Tree(dense, ["1"])], Hierarchical(1.0), [SoftTarget(2.0)])
    module.eval()._build(IMAGES)
    places = torch.randint(0, 3, (5, *IMAGES.shape[2:]))
    expected = sum(
        nn.functional.cross_entropy(leaf, places)
        for leaf in module.peers.branching_network.leaves(IMAGES)
    )
    torch.testing.assert_close(module.compute_losses(IMAGES, places)["leaves/task"], expected)


def test_every_leaf_learns_whatever_their_number():
    made = tree(models=3)
    assert made.sizes == [1, 2, 3]
    module = PeerCohort([made], Hierarchical(), [SoftTarget(2.0)])
    module._build(IMAGES)
    torch.stack(
        list(module.compute_losses(IMAGES, torch.zeros(5).long()).values())
    ).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    smaller = made.eval().branch_network(2)
    smaller.load_state_dict(made.branch_state(2, made.state_dict()))
    torch.testing.assert_close(smaller.eval()(IMAGES), made(IMAGES))


def test_the_full_ensemble_learns_nothing_from_teaching():
    made = tree()
    module = PeerCohort([made], Hierarchical(), [SoftTarget(2.0)], task_weight=0.0)
    module._build(IMAGES)
    loss = torch.stack(list(module.compute_losses(IMAGES, None).values())).sum()
    loss.backward()
    last = made.trunk.levels[-1][3]  # in the full ensemble alone
    assert not any(p.grad.any() for p in last.parameters())
    assert any(p.grad.any() for p in made.trunk.levels[-1][0].parameters())


def fit(trainer, module, data, **options):
    trainer.fit(module, datamodule=data, **options)
    return module


def cohort():
    torch.manual_seed(1)
    made = Tree(resnet14(in_channels=1, width=4), LAYERS)
    return PeerCohort([made], Hierarchical(), [SoftTarget(2.0, weight=0.5)], task_weight=0.5)


def test_resumed_run_equals_the_uninterrupted_one(make_trainer, digits, tmp_path):
    whole = fit(make_trainer(max_epochs=2), cohort(), digits())
    trainer = make_trainer(max_epochs=1)
    fit(trainer, cohort(), digits())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = fit(make_trainer(max_epochs=2), cohort(), digits(), ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bf16(make_trainer, digits):
    trainer = make_trainer(max_epochs=1, precision="bf16-mixed")
    fit(trainer, cohort(), digits())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert {f"val/peer_{k}/accuracy" for k in range(3)} <= set(trainer.callback_metrics)


def test_every_size_is_exported(make_trainer, digits, tmp_path):
    from lightning_kd.callbacks import ExportStudent

    trainer = make_trainer(max_epochs=1, callbacks=[ExportStudent(str(tmp_path))])
    module = fit(trainer, cohort(), digits())
    grown = module.peers.branching_network.eval()
    for k in range(3):
        network = pretrained(str(tmp_path / f"peer_{k}.safetensors"))
        assert network.models == 2**k
        with torch.no_grad():
            torch.testing.assert_close(network(IMAGES), grown(IMAGES, 2**k))


RANKS = """
import sys
import torch
from lightning.pytorch import Trainer
from torch import nn
from lightning_kd import PeerCohort
from lightning_kd.data import Digits
from lightning_kd.exchange import Hierarchical
from lightning_kd.losses import SoftTarget
from lightning_kd.models import Tree

def fit(devices):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in ((1, 8), (8, 8), (8, 8)):  # no BatchNorm: it sees half a batch
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(2, outputs), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10)).double()
    tree = Tree(network, ["2", "5"]).double()
    module = PeerCohort([tree], Hierarchical(), [SoftTarget(2.0, weight=0.5)], task_weight=0.5)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", devices=devices, logger=False, precision="64-true",
        strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=Digits(batch_size=64 // devices, subset=256, val_split=0.0))
    return trainer, tree

if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer, tree = fit(2)
    if trainer.is_global_zero:
        torch.save(tree.state_dict(), sys.argv[1] + "/tree.pt")
"""


def test_two_processes_equal_one(tmp_path):
    launch(RANKS, tmp_path, str(tmp_path))
    scope = {}
    exec(RANKS, scope)
    _, tree = scope["fit"](1)
    saved = torch.load(tmp_path / "tree.pt", weights_only=True)
    for name, value in tree.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-10)
