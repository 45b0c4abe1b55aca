"""Hydra: each head learns from a teacher of its own, and heads are kept."""

import copy

import pytest
import torch

from lightning_kd import MultiTeacher
from lightning_kd.losses import HeadTarget
from lightning_kd.models import MultiBranch, resnet8
from lightning_kd.weighting import Fixed
from tests import reference

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def network(seed, width=4):
    torch.manual_seed(seed)
    return resnet8(in_channels=1, width=width).double().eval()


def build(heads=3, teachers=3, **options):
    student = MultiBranch(network(0), "layer2", 3, same_weights=True)
    others = [network(seed, 8) for seed in range(1, teachers + 1)]
    return MultiTeacher(student, others, [HeadTarget(heads, 3.0)], task_weight=0.0, **options)


@pytest.mark.parametrize("shares", [None, [0.5, 0.3, 0.2]])
def test_each_head_learns_from_its_teacher(shares):
    """Values and gradients by hand: mean over samples of T^2 KL(p_m || h_m), weighted over m."""
    module = build(weighting=None if shares is None else Fixed(shares))
    module.student.eval()
    twin = copy.deepcopy(module.student)
    module._build(IMAGES)
    loss = module.compute_losses(IMAGES, None)["head_target"]
    slow = 0.0
    for m, head in enumerate(twin.branch_logits(IMAGES)):
        said = module.teachers[m].network(IMAGES).detach()
        gap = reference.soft_target(head, said[None], torch.ones(1).double(), 3.0)
        slow = slow + (1 / 3 if shares is None else shares[m]) * gap
    torch.testing.assert_close(loss, slow)
    mine = torch.autograd.grad(loss, list(module.student.parameters()))
    theirs = torch.autograd.grad(slow, list(twin.parameters()))
    torch.testing.assert_close(mine, theirs)


def test_heads_begin_alike_and_part(make_trainer, digits):
    student = MultiBranch(resnet8(in_channels=1, width=4), "layer2", 2, same_weights=True)
    one, two = (list(branch.parameters()) for branch in student.branches)
    assert all(torch.equal(a, b) and a is not b for a, b in zip(one, two, strict=True))
    teachers = [network(seed, 8).float() for seed in (1, 2)]
    module = MultiTeacher(student, teachers, [HeadTarget(2)])
    make_trainer(max_epochs=1).fit(module, datamodule=digits())
    assert not any(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a.dim() > 1)
    answers = student.eval().branch_logits(IMAGES.float())
    assert answers.shape == (2, 5, 10)
    mean = answers.softmax(2).mean(0)
    torch.testing.assert_close(student(IMAGES.float()).softmax(1), mean)


def test_a_pretrained_student_is_trained_not_only_evaluated(make_trainer, digits):
    """``pretrained`` gives networks in eval mode, and Lightning leaves modes as they are."""
    student = resnet8(in_channels=1, width=4).eval()
    module = MultiTeacher(student, [network(1).float()])
    before = student.bn1.running_mean.clone()
    make_trainer(max_epochs=1).fit(module, datamodule=digits())
    assert not torch.equal(student.bn1.running_mean, before)


def test_a_copy_reads_its_own_heads():
    """Branches are graph modules, whose copies lose their hooks."""
    module = build(teachers=3)
    module._build(IMAGES)
    twin = copy.deepcopy(module)
    target = torch.arange(5)
    mine, theirs = (m.train().compute_losses(IMAGES, target) for m in (module, twin))
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value)
    theirs["head_target"].backward()
    assert all(p.grad is None for p in module.student.parameters())


def test_wrong_heads_are_reported():
    with pytest.raises(ValueError, match="head for each of 2 teachers, got heads=3"):
        build(teachers=2)._build(IMAGES)
    with pytest.raises(ValueError, match=r"branches\.3"):
        build(heads=4, teachers=4)._build(IMAGES)
    three = MultiBranch(network(0).float(), "layer2", 3)
    module = MultiTeacher(three, [network(s).float() for s in (1, 2)], [HeadTarget(2)])
    with pytest.raises(ValueError, match="student of 2 branches, got 3"):
        module._build(IMAGES.float())
    with pytest.raises(ValueError, match="temperature"):
        HeadTarget(2, temperature=0.0)
