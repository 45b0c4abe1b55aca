import pytest
import torch
import torch.nn.functional as F

from lightning_kd.functional import decoupled_kl, kl_divergence, standardize
from tests import reference


@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (1, 5), (4, 2), (4, 6)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_decoupled_equals_the_reference(batch, classes, temperature):
    s = (3 * torch.randn(batch, classes, dtype=torch.float64)).requires_grad_()
    t = 3 * torch.randn(batch, classes, dtype=torch.float64)
    y = torch.randint(0, classes, (batch,))
    results = []
    for function in (decoupled_kl, reference.decoupled_kl):
        value = function(s, t, y, temperature, 1.5, 8.0)
        results.append((value.detach(), torch.autograd.grad(value.sum(), s)[0]))
    torch.testing.assert_close(*results)


def test_decoupled_with_the_teachers_own_share_is_plain_distillation():
    """KL = TCKD + (1 - p_y) NCKD, equation 5 of the paper."""
    s, t = torch.randn(1, 5).double(), torch.randn(1, 5).double()
    y = torch.tensor([2])
    share = 1 - float(t.softmax(1)[0, 2])
    torch.testing.assert_close(decoupled_kl(s, t, y, 1.0, 1.0, share), kl_divergence(s, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoupled_is_finite_where_the_public_code_is_not(dtype):
    """megvii-research/mdistiller takes log(p) and log(1 - p) of softmax: -inf at sure teachers."""
    s = torch.tensor([[30.0, -30.0, 0.0], [-30.0, 30.0, 0.0]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[-30.0, 30.0, 0.0], [300.0, -30.0, 0.0]], dtype=dtype)
    value = decoupled_kl(s, t, torch.tensor([0, 0]), 1.0)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()
    public = torch.log((t.float().softmax(1) * torch.tensor([0.0, 1.0, 1.0])).sum(1))
    assert not torch.isfinite(public).all()


def test_an_unlabelled_sample_takes_the_teachers_class():
    s, t = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(
        decoupled_kl(s, t, torch.tensor([-1, -1])), decoupled_kl(s, t, t.argmax(1))
    )


def test_standardize_equals_the_reference_and_survives_constant_logits():
    z = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    results = []
    for function in (standardize, reference.standardize):
        value = function(z)
        results.append((value.detach(), torch.autograd.grad((value**3).sum(), z)[0]))
    torch.testing.assert_close(*results)
    flat = torch.ones(2, 4, requires_grad=True)
    F.mse_loss(standardize(flat), torch.randn(2, 4)).backward()
    assert torch.isfinite(flat.grad).all()
