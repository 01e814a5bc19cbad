import math

import pytest
import torch
from torch.autograd import gradcheck

from mlkit.errors import InvalidValueError
from mlkit.sparsity import (
    aux_loss_scale,
    efficiency_loss,
    separability_loss,
    set_aux_loss_scale,
)
from mlkit.sparsity.losses import inject_aux_loss


def scores(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def test_eq4_and_eq5_by_hand():
    g = torch.tensor([[0.0, 1.0], [0.5, 0.25]], dtype=torch.float64)
    assert efficiency_loss(g).item() == pytest.approx((0 + 1 + 0.25 + 0.0625) / 4)
    expected = (2 / (0.25 + 1e-3) + 1 / 1e-3 + 1 / (0.0625 + 1e-3)) / 4
    assert separability_loss(g).item() == pytest.approx(expected)
    assert separability_loss(g, eps=1e-6, threshold=0.7).item() == pytest.approx(
        sum(1 / ((x - 0.7) ** 2 + 1e-6) for x in (0, 1, 0.5, 0.25)) / 4
    )


@pytest.mark.parametrize("loss", [efficiency_loss, separability_loss])
def test_padding_changes_neither_value_nor_gradient(loss):
    g = scores(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    spoiled = torch.where(mask[..., None], g, torch.nan).requires_grad_()
    short = g[mask].requires_grad_()
    value = loss(spoiled, mask=mask)
    assert value.item() == pytest.approx(loss(short).item())
    gradient = torch.autograd.grad(loss(g.requires_grad_(), mask=mask), g)[0]
    torch.testing.assert_close(gradient[mask], torch.autograd.grad(loss(short), short)[0])
    assert not gradient[~mask].any()


def test_no_valid_token_is_zero():
    mask = torch.zeros(2, dtype=torch.bool)
    assert efficiency_loss(scores(2, 3), mask).item() == 0
    assert efficiency_loss(scores(0, 3)).item() == 0


def test_gradcheck_of_both_losses():
    g = scores(3, 4).requires_grad_()
    mask = torch.tensor([True, False, True])
    assert gradcheck(lambda x: efficiency_loss(x, mask), (g,))
    assert gradcheck(lambda x: separability_loss(x, 0.5, 1e-2, mask), (g,))


def test_slope_of_the_separability_loss_is_bounded():
    for eps in (1e-1, 1e-3):
        g = (0.5 + torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)).requires_grad_()
        separability_loss(g[None], eps=eps).backward()
        steepest = g.grad.abs().max().item() * g.numel()
        bound = 9 / (8 * math.sqrt(3)) * eps**-1.5  # 0.65, at |G - tau| = sqrt(eps / 3)
        assert 0.99 * bound < steepest <= bound


def test_injection_is_an_identity_whose_gradient_is_that_of_the_sum():
    def path(g, is_injected):
        aux = 0.5 * efficiency_loss(g) + 0.25 * separability_loss(g, eps=1e-2)
        task = (inject_aux_loss(g, aux) if is_injected else g).sin().sum()
        return task if is_injected else task + aux

    left, right = scores(4, 3).requires_grad_(), scores(4, 3).requires_grad_()
    injected = path(left, True)
    assert injected.item() == pytest.approx(scores(4, 3).sin().sum().item())
    injected.backward()
    path(right, False).backward()
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_gradient_scaler_and_accumulated_batches(accumulated):
    """Half precision's way: both parts are scaled by the scaler and divided by the batches."""

    def gradient(scale):
        g = scores(4, 3).requires_grad_()
        for rows in g.split(4 // accumulated):
            aux = 0.5 * efficiency_loss(rows) + 0.25 * separability_loss(rows, eps=1e-2)
            with aux_loss_scale(scale / accumulated):
                injected = inject_aux_loss(rows, aux)
                (injected.sin().mean() * scale / accumulated).backward()
        return g.grad / scale

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    g = scores(4, 3).requires_grad_()
    aux = 0.5 * efficiency_loss(g) + 0.25 * separability_loss(g, eps=1e-2)
    (g.sin().mean() + aux).backward()
    torch.testing.assert_close(gradient(scaler.get_scale()), g.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(1.0), g.grad, rtol=1e-12, atol=0)


def test_scale_multiplies_the_auxiliary_gradient_only():
    g = torch.tensor([2.0], requires_grad=True)
    with aux_loss_scale(8.0):
        inject_aux_loss(g, g.square().sum()).sum().backward()
    assert g.grad.item() == 1 + 8 * 4
    assert set_aux_loss_scale(3.0) == 1.0
    assert set_aux_loss_scale(1.0) == 3.0
    with pytest.raises(InvalidValueError, match="must be at least 0, got -1"):
        set_aux_loss_scale(-1)
