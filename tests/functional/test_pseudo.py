"""Pseudo-labels: which are kept, and how soft ones are learned."""

import pytest
import torch

from lightning_kd.functional import balanced_labels, hard_labels, task_cross_entropy
from tests import reference


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 5])
def test_labels_kept_equal_the_reference(seed, classes):
    random = torch.Generator().manual_seed(seed)
    said = (3 * torch.randn(200, classes, generator=random)).softmax(1)
    frequencies = torch.randint(1, 9, (classes,), generator=random)
    found = balanced_labels(said, frequencies)
    assert found.tolist() == reference.balanced(said, frequencies)
    kept = torch.bincount(found[found >= 0], minlength=classes).double()
    expected = frequencies.double() / frequencies.sum()
    # as many of each class as its frequency says, but for what cannot be halved
    assert ((kept / kept.sum()) - expected).abs().max() < 1 / kept.sum() * classes


def test_a_frequency_of_all_predictions_keeps_them_all():
    said = torch.eye(4).repeat(10, 1)
    assert torch.equal(balanced_labels(said, torch.ones(4)), said.argmax(1))


def test_the_surest_are_kept():
    said = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7]])
    assert balanced_labels(said, torch.tensor([1, 1])).tolist() == [0, -1, -1, 1]


def test_classes_without_labels_are_not_kept():
    said = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.0, 0.1, 0.9]])
    assert balanced_labels(said, torch.tensor([1, 1, 0])).tolist() == [0, 1, -1]


def test_a_class_without_labels_that_is_never_predicted_changes_nothing():
    said = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.2, 0.8, 0.0]])
    assert balanced_labels(said, torch.tensor([1, 1, 0])).tolist() == [0, 0, 1, 1]


def test_labels_of_another_kind_are_reported():
    with pytest.raises(ValueError, match="whole numbers as labels, or soft labels"):
        task_cross_entropy(torch.zeros(2, 3), torch.zeros(2))


def test_a_class_that_is_never_predicted_is_reported():
    with pytest.raises(ValueError, match="no sample of class 1"):
        balanced_labels(torch.tensor([[0.9, 0.1]]), torch.tensor([1, 1]))


def test_soft_labels_equal_the_reference_with_gradients():
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(6, 4, dtype=torch.float64).softmax(1)
    mine, theirs = task_cross_entropy(logits, target), reference.soft_cross_entropy(logits, target)
    torch.testing.assert_close(mine, theirs)
    for a, b in zip(
        torch.autograd.grad(mine.sum(), logits),
        torch.autograd.grad(theirs.sum(), logits),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_one_hot_labels_are_labels():
    logits, target = torch.randn(8, 3), torch.arange(8) % 3
    soft = torch.nn.functional.one_hot(target, 3).float()
    torch.testing.assert_close(task_cross_entropy(logits, soft), task_cross_entropy(logits, target))
    assert torch.equal(hard_labels(soft), target)
    assert torch.equal(hard_labels(target), target)
    assert hard_labels(None) is None
