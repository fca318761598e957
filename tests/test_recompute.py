"""Laws of computing part by part: nothing changes but the memory."""

from collections import Counter

import torch
from helpers import noise
from torch.autograd import gradcheck, gradgradcheck

from torch_utils.recompute import by_parts
from training import losses
from training.networks import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, pixels
from training.networks.layers import compute_with


def saved_bytes(function) -> int:
    """How many bytes of distinct storage autograd keeps at most for backward passes while `function` runs."""
    holders: Counter = Counter()  # of each storage
    now = most = 0

    class Holder:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor, self.storage = tensor, tensor.untyped_storage()  # held, so that no other takes the same id
            now += 0 if holders[id(self.storage)] else self.storage.nbytes()
            most = max(most, now)
            holders[id(self.storage)] += 1

        def __del__(self):
            nonlocal now
            holders[id(self.storage)] -= 1
            now -= 0 if holders[id(self.storage)] else self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Holder, lambda holder: holder.tensor):
        function()
    return most


def network(weight, bias):
    """A function of x [n,3] and a style s [3] that reads a weight [3,3] and a bias [3]."""
    return lambda x, s: torch.tanh((x * s) @ weight + bias) ** 2


def parts_of(x, s):
    return [(part, s) for part in x.split(2)]


def test_derivatives_are_those_of_finite_differences():
    leaves = [noise(*shape, seed=i).requires_grad_() for i, shape in enumerate(((5, 3), (3,), (3, 3), (3,)))]

    def f(x, s, weight, bias):
        return torch.cat(by_parts(network(weight, bias), parts_of(x, s), [weight, bias]))

    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


def test_derivatives_reach_what_comes_before():
    """The tensors that a function reads need not be leaves."""
    x, s, weight, bias = (
        noise(*shape, seed=i).requires_grad_() for i, shape in enumerate(((5, 3), (3,), (3, 3), (3,)))
    )

    def through(compute):
        w, b = weight.sin(), bias.exp()
        y = compute(network(w, b), x * 2, s.cos(), [w, b])
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, s, weight, bias])

    expected = through(lambda f, x, s, _: f(x, s))
    found = through(lambda f, x, s, shared: torch.cat(by_parts(f, parts_of(x, s), shared)))
    torch.testing.assert_close(found, expected)


def test_a_function_may_ignore_tensors():
    x, s, unread = (noise(3, seed=i).requires_grad_() for i in range(3))
    (y,) = by_parts(lambda x, s: x.square(), [(x, s)], [unread])
    first = torch.autograd.grad(y.sum(), [x, s, unread], create_graph=True)
    assert [torch.equal(g, e) for g, e in zip(first, (2 * x, 0 * s, 0 * unread), strict=True)] == [True] * 3
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, s, unread], materialize_grads=True)
    torch.testing.assert_close(second, (8 * x.detach(), 0 * s, 0 * unread))


def test_what_needs_no_derivative_gets_none():
    x, s = noise(4, 3), noise(3, seed=1).requires_grad_()
    weight, bias = noise(3, 3, seed=2).requires_grad_(), noise(3, seed=3)
    torch.cat(by_parts(network(weight, bias), parts_of(x, s), [weight, bias])).sum().backward()
    assert x.grad is None
    assert bias.grad is None
    assert s.grad.shape == (3,)
    assert weight.grad.shape == (3, 3)


def test_the_graph_of_one_part_is_held_at_a_time():
    """In second derivatives too: with 16 parts, little more than a sixteenth."""

    def held(parts: int) -> int:
        x, w = noise(64, 10).requires_grad_(), noise(10, 10).requires_grad_()

        def deep(part):
            for _ in range(20):
                part = torch.tanh(part @ w)
            return part

        def second():
            y = torch.cat(by_parts(deep, [(part,) for part in x.split(64 // parts)], [w]))
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            first.square().sum().backward()

        return saved_bytes(second)

    assert held(16) < held(1) / 6


def test_a_generator_has_the_same_derivatives_whatever_it_recomputes(monkeypatch):
    """Pictures, gradients and the gradients of path lengths, to the last digits of float64.

    Parts are uneven numbers of rows, or two of the three images and the third.
    """
    shape = {"img_resolution": 16, "channel_base": 128, "channel_max": 16, "thickness": 3, "biline_channels": 4}
    made = {}
    for recompute, size in (("none", 0), ("pixels", 5 * 16), ("all", 2 * 16 * 16)):
        monkeypatch.setattr(pixels, "part_size", lambda device, size=size: size)
        torch.manual_seed(0)
        G = Generator(GeneratorConfig(**shape, z_dim=8, w_dim=8, mapping_layers=1)).double()
        compute_with(G, recompute=recompute)
        images = G(noise(3, 8))
        (images * noise(3, 3, 16, 16, seed=1)).sum().backward()
        losses.path_lengths(G.synthesis, G.mapping(noise(3, 8)), noise(3, 3, 16, 16, seed=2)).sum().backward()
        made[recompute] = torch.cat([t.flatten() for t in (images.detach(), *(p.grad for p in G.parameters()))])
    for recompute in ("pixels", "all"):
        assert (made[recompute] - made["none"]).abs().max() <= 1e-12 * made["none"].abs().max()


def test_a_generator_that_recomputes_keeps_less_than_a_third_of_the_memory(monkeypatch):
    monkeypatch.setattr(pixels, "part_size", lambda device: 1024)

    def kept(recompute: str) -> int:
        with torch.device("meta"):
            G = Generator(GeneratorConfig(img_resolution=64))
            compute_with(G, recompute=recompute)
            return saved_bytes(lambda: G(torch.empty(4, 512)).sum().backward()) - 4 * sum(
                p.numel() for p in G.parameters()
            )

    assert kept("all") < kept("none") / 3


def test_a_discriminator_that_recomputes_has_the_same_derivatives():
    """Of the logits and of R1, to the last digits of float64."""
    images, labels = noise(4, 3, 16, 16), torch.eye(2, dtype=torch.float64).repeat(2, 1)

    def made(recompute: str) -> torch.Tensor:
        torch.manual_seed(0)
        D = Discriminator(DiscriminatorConfig(img_resolution=16, channel_max=8, c_dim=2)).double()
        compute_with(D, recompute=recompute)
        logits = D(images, labels)
        (logits.sum() + losses.r1(lambda x: D(x, labels), images).sum()).backward()
        return torch.cat([t.flatten() for t in (logits.detach(), *(p.grad for p in D.parameters()))])

    expected = made("none")
    assert (made("all") - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_discriminator_that_recomputes_keeps_one_image_at_a_time():
    def kept(recompute: str, count: int) -> int:
        D = Discriminator(DiscriminatorConfig(img_resolution=32, channel_max=8))
        compute_with(D, recompute=recompute)
        return saved_bytes(lambda: losses.r1(D, torch.zeros(count, 3, 32, 32)).sum().backward())

    assert kept("none", 8) > 1.9 * kept("none", 4)
    assert kept("all", 8) < 1.3 * kept("all", 4)
    assert kept("all", 8) < kept("none", 8) / 3


def test_recomputing_keeps_the_types_of_autocast():
    torch.manual_seed(0)
    widths = {"channel_base": 128, "channel_max": 16, "z_dim": 8, "w_dim": 8}
    G = Generator(GeneratorConfig(img_resolution=16, **widths))
    compute_with(G, "reference")
    seen = []
    hook = G.synthesis.pixels.decoder_last.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        image = G(noise(1, 8, dtype=torch.float32))
    image.float().sum().backward()
    hook.remove()
    assert seen == [torch.bfloat16, torch.bfloat16]
