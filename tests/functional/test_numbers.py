"""Numbers at their limits: opposite samples, rows of zeros, empty batches, weights of zero."""

import math

import pytest
import torch
from torch import nn

from lightning_kd import Distillation, Teacher
from lightning_kd import functional as K
from lightning_kd.data_free.replay.samplers import Prioritized
from lightning_kd.losses import DecoupledKL, LogitStandardization, SoftTarget
from lightning_kd.weighting import Uniform


def test_opposite_samples_have_finite_probabilities():
    """At lengths at which rounding takes their cosine below -1."""
    torch.manual_seed(0)
    rows = torch.randn(400, 64)
    s = torch.stack([rows, -rows], 1)
    for pair in s:
        pair = pair.clone().requires_grad_()
        value = K.probabilistic_distance(pair, torch.randn(2, 8))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(pair.grad).all()


RELATIONS = [
    K.similarity_distance, K.probabilistic_distance, K.relational_distance, K.relational_angle,
    K.log_euclidean_distance, K.unit_distance, K.info_nce,
]  # fmt: skip


@pytest.mark.parametrize("distance", RELATIONS)
def test_rows_of_zeros_have_bounded_gradients(distance):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 8), torch.randn(6, 8)
    student[2:4] = 0
    student.requires_grad_()
    distance(student, teacher).sum().backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e6


@pytest.mark.parametrize("distance", RELATIONS)
def test_lengths_do_not_matter_above_the_floor(distance):
    """So that the floor changes nothing for features as networks have them."""
    scale = 0.1 if distance in (K.relational_distance, K.relational_angle) else 0.01
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 32), torch.randn(6, 32)
    small = distance(scale * student, teacher)
    torch.testing.assert_close(small, distance(student, teacher), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("distance", RELATIONS[:5])
def test_an_empty_batch_is_refused(distance):
    with pytest.raises(ValueError, match="B >= 1"):
        distance(torch.empty(0, 4), torch.empty(0, 4))


@pytest.mark.parametrize(
    ("shape", "value"), [((2, 3, 1, 4), 1.0), ((2, 3, 4, 1), 1.0), ((1, 1, 1, 1), 0.0)]
)
def test_images_of_one_row_or_column_vary_along_the_other(shape, value):
    images = torch.arange(math.prod(shape)).view(shape).float().requires_grad_()
    varies = K.total_variation(images)
    assert float(varies) == value
    varies.backward()
    assert torch.isfinite(images.grad).all()


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_a_weight_of_zero_has_the_gradient_of_a_small_one(space):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5)
    target = torch.tensor([1, 2, 3, 4])

    def gradient(least):
        weights = torch.tensor([1 - least, least, 0.0]).requires_grad_()
        answer = K.combine_teachers(logits, weights, 2.0, space)
        torch.nn.functional.nll_loss(answer, target).backward()
        return weights.grad

    torch.testing.assert_close(gradient(0.0), gradient(1e-6), rtol=1e-3, atol=1e-4)
    logits[1, :, 0] = -torch.inf  # a class that it does not know
    at_zero = gradient(0.0)
    assert torch.isfinite(at_zero).all()
    assert (at_zero != 0).all()


def test_two_classes_cannot_be_standardised():
    with pytest.raises(ValueError, match="at least three classes"):
        LogitStandardization()(torch.randn(4, 2), torch.randn(4, 2))
    value = LogitStandardization()(torch.randn(4, 3), torch.randn(4, 3))
    assert torch.isfinite(value)


def net():
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("classes", "space", "loss"),
    [
        ([[0], [1]], "logit", SoftTarget),
        ([[0], [1, 2]], "logit", DecoupledKL),
        ([[0, 1], [1, 2]], "logit", DecoupledKL),
        ([[1], [1]], "probability", DecoupledKL),
    ],
)
def test_teachers_of_too_few_common_classes_are_refused_at_the_start(classes, space, loss):
    teachers = [Teacher(nn.Linear(4, len(own)), own, 3) for own in classes]
    parts = Distillation(net(), teachers, [loss()], Uniform(space))
    with pytest.raises(ValueError, match="of the classes together"):
        parts(torch.randn(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("classes", "space", "loss"),
    [
        ([[0], [1]], "probability", SoftTarget),
        ([[0], [0, 1]], "logit", SoftTarget),
        ([[0], [1]], "probability", DecoupledKL),
        ([[0, 1], [0, 1, 2]], "logit", DecoupledKL),
    ],
)
def test_teachers_of_enough_common_classes_teach(classes, space, loss):
    teachers = [Teacher(nn.Linear(4, len(own)), own, 3) for own in classes]
    parts = Distillation(net(), teachers, [loss()], Uniform(space))
    losses = parts(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert all(torch.isfinite(p.grad).all() for p in parts.student.parameters())


def test_nothing_needs_float64_where_there_is_none(monkeypatch):
    """As on Apple's MPS: the same values in float32, within its precision."""

    def values():
        torch.manual_seed(0)
        features, gradients = torch.rand(6, 4), torch.randn(3, 20)
        _, weights = Prioritized()(torch.rand(50), 8, torch.Generator().manual_seed(0))
        return [
            K.log_euclidean_distance(features, torch.rand(6, 4)),
            K.min_norm_weights(gradients),
            weights,
        ]

    wide = values()
    monkeypatch.setattr("lightning_kd.functional.precision.WITHOUT_FLOAT64", ("cpu",))

    def no_double(self):
        raise TypeError("no float64")

    monkeypatch.setattr(torch.Tensor, "double", no_double)
    narrow = values()
    for a, b in zip(narrow[:2], wide[:2], strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-2, atol=1e-3)
    assert torch.isfinite(narrow[2]).all()
