"""Laws of the losses: closed forms, finite differences, and one value per image."""

import math

import numpy as np
import pytest
import torch

from training import losses


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softplus(x):
    """log(1 + eˣ) by the standard library, without overflow."""
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


LOGITS = [-700.0, -3.0, 0.0, 0.25, 40.0, 700.0]


def test_the_logistic_loss_of_G_is_softplus_of_minus_the_logit():
    got = losses.logistic_G(torch.tensor(LOGITS, dtype=torch.float64)[:, None])
    assert got.tolist() == pytest.approx([softplus(-x) for x in LOGITS], rel=1e-12)


def test_the_logistic_loss_of_D_is_the_sum_of_both_softpluses():
    real, fake = LOGITS, LOGITS[::-1]
    got = losses.logistic_D(*(torch.tensor(x, dtype=torch.float64)[:, None] for x in (real, fake)))
    assert got.tolist() == pytest.approx([softplus(-r) + softplus(f) for r, f in zip(real, fake, strict=True)])


def test_gradients_of_the_logits_are_probabilities():
    """d softplus(−x)/dx = −σ(−x): never more than 1, so one image cannot outvote a batch."""
    x = torch.tensor(LOGITS, dtype=torch.float64).requires_grad_()
    losses.logistic_G(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([-1 / (1 + math.exp(v)) for v in LOGITS])


@pytest.mark.parametrize(("real", "fake"), [((4,), (4, 1)), ((4, 1, 1), (4,)), ((4, 1), (4, 1, 1))])
def test_logits_of_any_shape_give_one_value_per_image(real, fake):
    a, b = noise(4), noise(4, seed=1)
    assert losses.logistic_G(a.view(real)).shape == (4,)
    got = losses.logistic_D(a.view(real), b.view(fake))
    assert got.shape == (4,)
    assert torch.equal(got, losses.logistic_D(a[:, None], b[:, None]))


# --- R1 -----------------------------------------------------------------------------------------------------------


def test_r1_of_a_linear_discriminator_is_its_squared_length():
    w = noise(3, 4, 5, seed=1)
    got = losses.r1(lambda x: (x * w).sum(dim=(1, 2, 3))[:, None] + 7, noise(6, 3, 4, 5))
    assert got.tolist() == pytest.approx([float(np.sum(w.numpy() ** 2))] * 6)


def test_r1_of_a_quadratic_discriminator_is_per_image():
    """D(x) = xᵀAx/2 with A symmetric has the gradient Ax."""
    A = noise(12, 12, seed=1)
    A = A + A.T
    real = noise(4, 3, 2, 2)
    got = losses.r1(lambda x: torch.einsum("ni,ij,nj->n", x.flatten(1), A, x.flatten(1)) / 2, real)
    expected = ((real.flatten(1).numpy() @ A.numpy()) ** 2).sum(axis=1)
    assert got.tolist() == pytest.approx(expected.tolist())


def test_r1_is_differentiable_in_the_discriminator_and_leaves_the_image_alone():
    real = noise(2, 1, 3, 3).requires_grad_()
    w = noise(1, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: losses.r1(lambda x: (x * v).tanh().sum(dim=(1, 2, 3)), real), w)
    losses.r1(lambda x: (x * w).tanh().sum(dim=(1, 2, 3)), real).sum().backward()
    assert real.grad is None


# --- Path lengths -------------------------------------------------------------------------------------------------


def linear_synthesis(A):
    """A [K,w,C,H,W]; ws [N,K,w] -> [N,C,H,W]."""
    return lambda ws: torch.einsum("nkv,kvchw->nchw", ws, A)


def test_path_lengths_of_a_linear_synthesis_are_a_closed_form():
    K, w, C, H, W = 5, 4, 3, 2, 6
    A, image, ws = noise(K, w, C, H, W), noise(3, C, H, W, seed=1), noise(3, K, w, seed=2).requires_grad_()
    got = losses.path_lengths(linear_synthesis(A), ws, image)
    expected = []
    for y in image.numpy():
        per_style = [sum(np.sum(A[k, v].numpy() * y) ** 2 for v in range(w)) / (H * W) for k in range(K)]
        expected.append(math.sqrt(sum(per_style) / K))
    assert got.tolist() == pytest.approx(expected)


def test_path_lengths_are_differentiable_in_the_synthesis():
    A, image = noise(2, 3, 1, 2, 2).requires_grad_(), noise(2, 1, 2, 2, seed=1)
    ws = noise(2, 2, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: losses.path_lengths(lambda v: linear_synthesis(a)(v).sin(), ws, image), A)
    assert torch.autograd.gradcheck(lambda v: losses.path_lengths(lambda u: linear_synthesis(A)(u).sin(), v, image), ws)


def test_the_lengths_of_a_batch_are_those_of_its_images():
    A, image = noise(2, 3, 1, 2, 2), noise(3, 1, 2, 2, seed=1)
    ws = noise(3, 2, 3, seed=2).requires_grad_()

    def synthesis(v):
        return linear_synthesis(A)(v).sin()

    together = losses.path_lengths(synthesis, ws, image)
    for n in range(3):
        alone = losses.path_lengths(synthesis, ws[n : n + 1].detach().requires_grad_(), image[n : n + 1])
        assert together[n].item() == pytest.approx(alone.item(), rel=1e-12)


def test_the_expected_squared_path_length_is_the_mean_square_of_the_jacobian():
    """E over noise of length² = ‖A‖²/(K·H·W), here over 4000 samples of noise to 5 %."""
    A = noise(2, 3, 3, 2, 2)
    ws = noise(4000, 2, 3, seed=1).requires_grad_()
    got = losses.path_lengths(linear_synthesis(A), ws, noise(4000, 3, 2, 2, seed=2)).square().mean().item()
    assert got == pytest.approx(A.square().sum().item() / (2 * 2 * 2), rel=0.05)


# --- Path penalty -------------------------------------------------------------------------------------------------


def penalty(lengths, mean, decay):
    """By hand, in numpy."""
    mean = mean + decay * (lengths.mean() - mean)
    return (lengths - mean) ** 2, mean


@pytest.mark.parametrize(("decay", "count"), [(0.01, 1), (0.3, 4), (1.0, 4)])
def test_the_penalty_and_its_gradient_flow_through_the_new_mean(decay, count):
    lengths = (noise(count) + 3).requires_grad_()
    weights = noise(count, seed=1)
    got, mean = losses.path_penalty(lengths, torch.tensor(1.7, dtype=torch.float64), decay)
    by_hand, mean_by_hand = penalty(lengths.detach().numpy(), 1.7, decay)
    assert got.tolist() == pytest.approx(by_hand.tolist(), abs=1e-14)
    assert mean.item() == pytest.approx(mean_by_hand)
    assert mean.shape == ()
    assert not mean.requires_grad

    (got * weights).sum().backward()
    step = 1e-5
    for n in range(count):
        moved = [lengths.detach().numpy().copy() for _ in range(2)]
        moved[0][n] -= step
        moved[1][n] += step
        low, high = ((penalty(x, 1.7, decay)[0] * weights.numpy()).sum() for x in moved)
        assert lengths.grad[n].item() == pytest.approx((high - low) / (2 * step), rel=1e-7, abs=1e-8)


def test_the_running_mean_settles_at_constant_lengths():
    lengths, mean = torch.full((3,), 5.0, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step in range(1, 200):
        got, mean = losses.path_penalty(lengths, mean, 0.01)
        assert mean.item() == pytest.approx(5 * (1 - 0.99**step))
        assert got[0].item() == pytest.approx((5 * 0.99**step) ** 2)


@pytest.mark.parametrize("kind", losses.ADVERSARIAL)
def test_several_logits_of_an_image_count_as_their_mean(kind):
    a, b, loss = noise(3, 4), noise(3, 4, seed=1), losses.ADVERSARIAL[kind]
    for term, logits in ((loss.G, (a, b) if loss.pairs else (a,)), (loss.D, (a, b))):
        each = [term(*(x[:, None] for x in image)).mean().item() for image in zip(*logits, strict=True)]
        assert term(*logits).tolist() == pytest.approx(each)


def test_levels_of_a_pyramid_keep_flat_images_and_waves_that_they_can_show():
    """A wave of 32 pixels loses cos²(2π/64)·cos(2π/32)... of its height at each level, and stays where it was."""
    flat = torch.full((1, 2, 12, 8), 0.7, dtype=torch.float64)
    for level, (height, width) in zip(losses.pyramid(flat, 3), [(12, 8), (6, 4), (3, 2)], strict=True):
        assert torch.allclose(level, flat[:, :, :height, :width])
    centres = torch.arange(256, dtype=torch.float64) + 0.5
    x = (2 * math.pi * centres / 32).sin().expand(1, 1, 256, 256)
    _, half, quarter = losses.pyramid(x, 3)
    # (1 + 3z + 3z² + z³)/8 = ((1 + z)/2)³, of which each factor is a cosine of half the phase of a pixel
    loss = math.cos(math.pi / 32) ** 3
    inner = slice(2, -2)
    expected = loss * (2 * math.pi * (torch.arange(128, dtype=torch.float64) + 0.5) / 16).sin()
    assert torch.allclose(half[0, 0, inner, inner], expected.expand(128, 128)[inner, inner])
    loss *= math.cos(math.pi / 16) ** 3
    expected = loss * (2 * math.pi * (torch.arange(64, dtype=torch.float64) + 0.5) / 8).sin()
    assert torch.allclose(quarter[0, 0, inner, inner], expected.expand(64, 64)[inner, inner])


def test_relativistic_losses_are_softpluses_of_the_difference_between_paired_logits():
    real, fake = torch.tensor(LOGITS, dtype=torch.float64)[:, None], noise(6, 1)
    differences = [r - f for r, f in zip(LOGITS, fake[:, 0].tolist(), strict=True)]
    assert losses.relativistic_D(real, fake).tolist() == pytest.approx([softplus(-d) for d in differences])
    assert losses.relativistic_G(fake, real).tolist() == pytest.approx([softplus(d) for d in differences])


def test_hinge_is_its_formula():
    real, fake = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (LOGITS, LOGITS[::-1]))
    expected = [max(0, 1 - r) + max(0, 1 + f) for r, f in zip(LOGITS, LOGITS[::-1], strict=True)]
    assert losses.hinge_D(real, fake).tolist() == pytest.approx(expected)
    assert losses.hinge_G(fake).tolist() == [-f for f in LOGITS[::-1]]
