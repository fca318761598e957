"""Laws of the training step: each phase against plain autograd over the whole batch, and what a bad step may harm."""

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GENERATORS, RECIPE, STYLES
from hypothesis import given
from hypothesis import strategies as st

from dnnlib.config import merge, nested
from dnnlib.console import UserError
from torch_utils import checkpoint
from torch_utils.distributed import Processes
from torch_utils.images import to_uint8
from torch_utils.randomness import make_rng
from training import ema
from training.augment import augment, sample
from training.config import CONFIGS, read_recipe, resolve
from training.data import Batch, batches
from training.grids import choose_reals, choose_windows, generated_grid, grid_shape, real_grid, tile
from training.report import duration
from training.runs import open_images
from training.state import new_state
from training.trainer import Trainer

ALONE = Processes(0, 1, torch.device("cpu"))


def prepare(tiny, kind="creps", **settings):
    """(config, images, state, trainer) in float64; `settings` are dotted keys with __ for the dot."""
    native = "data__resolution" in settings
    path = tiny.images("large", size=(30, 27), labels=True) if native else tiny.labelled
    nest = merge(RECIPE | {"G": GENERATORS[kind]}, {"data": {"path": str(path)}, "train": {"precision": "float64"}})
    for key, value in settings.items():
        nest = merge(nest, nested(key.replace("__", "."), value))
    images = open_images(nest)
    config = resolve(nest, images, "test")
    state = new_state(config, ALONE.device)
    return config, images, state, Trainer(config, state, images, ALONE)


def batch_of(images, step: int, size: int):
    real, labels = zip(*(images[(step * size + i) % len(images)] for i in range(size)), strict=True)
    return Batch(torch.stack(real), torch.stack(labels))


def features_of(windows):
    v = np.log2(windows[:, :1])
    return torch.from_numpy(
        np.hstack([v**0, v, *(np.sin(np.pi * v * k) for k in (1, 2, 4)), *(np.cos(np.pi * v * k) for k in (1, 2, 4))])
    )


def shrunk(images, side):
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


class Straightforward:
    """The four phases of StyleGAN2-ADA with CREPS' schedule, without micro-batches, processes or statistics."""

    def __init__(self, config, images, state):
        self.config, self.images = config, images
        self.G, self.D, self.average = (copy.deepcopy(n) for n in (state.G, state.D, state.G_ema))
        self.teacher = state.teacher
        self.G_opt = self.adam(self.G, config.optim.g_lr, config.loss.pl_weight, config.loss.pl_interval)
        self.D_opt = self.adam(self.D, config.optim.d_lr, config.loss.r1_gamma, config.loss.r1_interval)
        self.rates = {o: [group["lr"] for group in o.param_groups] for o in (self.G_opt, self.D_opt)}
        self.p, self.a, self.signs = config.augment.p, 0.0, []

    def adam(self, network, lr, weight, interval):
        k = interval / (interval + 1) if weight else 1
        o = self.config.optim
        rest, mapping = (
            [p for n, p in network.named_parameters() if n.startswith("mapping.layers.") == mapped]
            for mapped in (False, True)
        )
        groups = [{"params": rest}, {"params": mapping, "lr": lr * k * o.mapping_lr * 100}]
        return torch.optim.Adam(groups, lr=lr * k, betas=(o.beta1**k, o.beta2**k), eps=o.eps)

    def random(self, step, purpose):
        return make_rng(self.config.train.seed, step, purpose)

    def styles(self, step, purpose, count):
        """(ws, labels, seeds of noise)"""
        random, G, mixing = self.random(step, purpose), self.config.G, self.config.loss.style_mixing
        z = torch.randn(count, G.z_dim, generator=random).double()
        chosen = torch.randint(len(self.images), [count], generator=random)
        c = torch.stack([self.images.label(int(i)) for i in chosen]).double()
        seeds = torch.randint(2**62, [count], generator=random)
        self.seen = z, c
        ws = self.G.mapping(z, c)
        if mixing:
            others = self.G.mapping(torch.randn(count, G.z_dim, generator=random).double(), c)
            cuts = torch.randint(1, G.num_ws, [count], generator=random).tolist()
            mixed = (torch.rand(count, generator=random) < mixing).tolist()
            choices = zip(ws, others, cuts, mixed, strict=True)
            ws = torch.stack([torch.cat([w[:cut], other[cut:]]) if mix else w for w, other, cut, mix in choices])
        return ws, c, seeds

    def augmented(self, x, step, purpose):
        draws = sample(
            self.config.augment,
            len(x),
            self.p,
            image_shape=self.config.G.img_shape,
            rng=self.random(step, f"{purpose} augmentation"),
        )
        return augment(x, draws)

    def descend(self, network, optimizer, loss):
        """One Adam step on the network alone."""
        weights = list(network.parameters())
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()

    def rendered(self, ws, seeds, windows, side):
        """Render each image by itself; without windows, the whole image."""
        if windows is None:
            return self.G.synthesis(ws, noise=seeds)
        pixels = (torch.arange(side).double() + 0.5) / side
        positions = [[corner + pixels / zoom for corner in (y, x)] for zoom, y, x in windows.tolist()]
        return torch.cat([self.G.synthesis(w[None], *axes) for w, axes in zip(ws, positions, strict=True)])

    def judged(self, sized, c, windows):
        """Judge images, and images of half the side, and so on, each told its scale: one logit for each."""
        logits, zoom = [], torch.ones(len(c), 1).double() if windows is None else windows[:, :1]
        taps = torch.tensor([1, 3, 3, 1]).double() / 8
        for images in sized:
            x = images
            for level in range(self.config.loss.pyramid):
                if level:
                    edge = F.pad(x, (1, 1, 1, 1), mode="replicate")
                    x = (edge.unfold(3, 4, 2) @ taps).unfold(2, 4, 2) @ taps
                scale = zoom * x.shape[2] / self.config.G.img_shape[0]
                told = [c, features_of(scale.numpy())] if self.config.D.scale_aware else [c]
                logits.append(self.D(x, torch.hstack(told)))
        return torch.hstack(logits)

    def sides(self, step, side):
        """One side of the images of a step, or two."""
        scales = self.config.scales
        if scales.larger == 1:
            return [side]
        pair, size = torch.rand(2, generator=self.random(step, "sizes")) if step else (0, 1)
        large = int(side * scales.larger)
        return [side, large] if pair < scales.pairs else [side] if size < 0.5 else [large]

    def mixed(self, sized, step, purpose):
        """Exchange a rectangle of two sizes, then channels."""
        if len(sized) == 1:
            return sized
        random, results = self.random(step, f"{purpose} mixing"), []
        for own, other in (sized, sized[::-1]):
            other = shrunk(other, own.shape[2])
            side = own.shape[2]
            (top, bottom), (left, right) = (
                sorted(torch.randperm(side + 1, generator=random)[:2].tolist()) for _ in "yx"
            )
            box = (..., slice(top, bottom), slice(left, right))
            one, two = own.clone(), other.clone()
            one[box], two[box] = other[box], own[box]
            channels = (torch.rand(own.shape[1], generator=random) < 0.5).tolist()
            results.append(torch.stack([(two if swap else one)[:, i] for i, swap in enumerate(channels)], 1))
        return results

    def from_teacher(self, w, image, window):
        """Compare a window with the pixels that the teacher has there: L1."""
        zoom, y, x = window
        side = image.shape[1]
        q = round(side / zoom)
        fine = image.repeat_interleave(q, 1).repeat_interleave(q, 2)  # of side·q pixels, which both divide
        areas = fine.unflatten(2, (q, side)).unflatten(1, (q, side)).mean((2, 4))
        pixels = (torch.arange(q).double() + 0.5) / q
        return (areas - self.teacher.synthesis(w[None], y + pixels / zoom, x + pixels / zoom)[0]).abs().mean()

    def step(self, s, real, c, windows):
        config, n = self.config, len(real)
        real, c, side = real.double() / 127.5 - 1, c.double(), config.G.img_shape[0]
        sides = self.sides(s, side)
        hinge, pairs = (config.loss.kind == kind for kind in ("hinge", "relativistic"))
        reals = [real if k == real.shape[2] else shrunk(real, k) for k in sides]
        for network in (self.G, self.D):
            network.requires_grad_(True)
        end, decay = config.train.kimg * 1000, config.optim.lr_decay
        left = np.interp(s * n, [end * (1 - decay), end], [1, 0]) if decay else 1
        for optimizer, rates in self.rates.items():
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * left

        ws, labels, seeds = self.styles(s, "generator", n)
        sized = [self.rendered(ws, seeds, windows, k) for k in sides]
        images, side = sized[0], sides[0]
        logits = self.judged(
            [self.augmented(x, s, "generator") for x in self.mixed(sized, s, "generator")], labels, windows
        )
        if pairs:
            logits = logits - self.judged([self.augmented(x, s, "generator real") for x in reals], c, windows).detach()
        loss = (-logits if hinge else torch.log1p(torch.exp(-logits))).mean()
        if config.scales.consistency:
            halved = images.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
            other = self.rendered(ws, seeds, windows, side // 2)
            loss = loss + config.scales.consistency * (halved - other).pow(2).mean()
        if config.scales.teacher:
            distances = map(self.from_teacher, self.teacher.mapping(*self.seen), images, windows.tolist())
            loss = loss + config.scales.teacher * sum(distances) / n
        self.descend(self.G, self.G_opt, loss)
        decay = config.train.w_avg_decay
        self.G.mapping.w_avg.copy_(decay * self.G.mapping.w_avg + (1 - decay) * ws[:, 0].detach().mean(0))

        if config.loss.pl_weight and s % config.loss.pl_interval == 0:
            ws, _, seeds = self.styles(s, "path", n // 2)
            image = self.G.synthesis(ws, noise=seeds)
            noise = [
                torch.randn(image.shape[1:], generator=self.random(s, f"path noise {i}"), dtype=torch.float64)
                for i in range(n // 2)
            ]
            y = (image * torch.stack(noise)).sum() / math.sqrt(image.shape[2] * image.shape[3])
            (g,) = torch.autograd.grad(y, ws, create_graph=True)
            lengths = g.pow(2).sum(2).mean(1).sqrt()
            a = self.a + config.loss.pl_decay * (lengths.mean() - self.a)
            penalty = (lengths - a).pow(2).mean()
            self.descend(self.G, self.G_opt, penalty * config.loss.pl_weight * config.loss.pl_interval)
            self.a = float(a.detach())

        ws, labels, seeds = self.styles(s, "critic", n)
        sized = self.mixed([self.rendered(ws, seeds, windows, k).detach() for k in sides], s, "critic")
        on_fake = self.judged([self.augmented(x, s, "critic") for x in sized], labels, windows)
        on_real = self.judged([self.augmented(x, s, "critic real") for x in reals], c, windows)
        if hinge:
            loss = (1 + on_fake).clamp(min=0).mean() + (1 - on_real).clamp(min=0).mean()
        elif pairs:
            loss = torch.log1p(torch.exp(on_fake - on_real)).mean()
        else:
            loss = F.softplus(on_fake).mean() + F.softplus(-on_real).mean()
        self.descend(self.D, self.D_opt, loss)
        self.signs.append(on_real.detach().sign().mean().item())

        if config.loss.r1_gamma and s % config.loss.r1_interval == 0:
            penalised = [(reals[0], c, "r1")]
            if config.loss.r2:
                ws, labels, seeds = self.styles(s, "r2", n)
                penalised.append((self.rendered(ws, seeds, windows, sides[0]).detach(), labels, "r2"))
            penalty = 0
            for images, labels, purpose in penalised:
                x = images.clone().requires_grad_()
                logits = self.judged([self.augmented(x, s, purpose)], labels, windows)
                (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
                penalty = penalty + g.pow(2).flatten(1).sum(1).mean() * config.loss.r1_gamma / 2
            self.descend(self.D, self.D_opt, penalty * config.loss.r1_interval)

        if (s + 1) % 4 == 0:
            if config.augment.mode == "ada":
                direction = np.sign(np.mean(self.signs) - config.augment.target)
                self.p = float(np.clip(self.p + direction * 4 * n / (config.augment.kimg * 1000), 0, 1))
            self.signs = []

        half_life = config.train.ema_kimg * 1000
        if config.train.ema_rampup is not None:
            half_life = min(half_life, (s + 1) * n * config.train.ema_rampup)
        keep = 0.5 ** (n / half_life)
        with torch.no_grad():
            for average, own in zip(self.average.state_dict().items(), self.G.state_dict().items(), strict=True):
                buffer = any(name in own[0] for name in ("w_avg", "freqs", "noise_const"))
                average[1].copy_(own[1] if buffer else keep * average[1] + (1 - keep) * own[1])


SETTINGS = {
    "labels, mirror, fixed augmentation, micro-batches": {
        "data__cond": True,
        "data__mirror": True,
        "augment__mode": "fixed",
        "augment__p": 0.6,
        "train__batch_gpu": 4,
    },
    "ada from a half": {"augment__mode": "ada", "augment__p": 0.5, "augment__kimg": 0.2, "augment__target": 0.0},
    "ada down to nothing, no lazy phases": {
        "augment__mode": "ada",
        "augment__p": 0.1,
        "augment__kimg": 0.1,
        "augment__target": 1.0,
        "loss__r1_gamma": 0.0,
        "loss__pl_weight": 0.0,
    },
    "stylegan2, style mixing": {"kind": "stylegan2", "loss__style_mixing": 0.6, "train__batch_gpu": 4},
    "other rates": {
        "optim__g_lr": 0.01,
        "optim__d_lr": 0.005,
        "optim__beta1": 0.5,
        "optim__lr_decay": 0.5,
        "train__kimg": 0.08,
        "loss__r1_gamma": 3.0,
        "loss__pl_weight": 0.7,
        "loss__pl_decay": 0.3,
        "train__ema_rampup": None,
        "train__ema_kimg": 0.02,
        "train__w_avg_decay": 0.9,
    },
    "windows, a scale-aware D, micro-batches": {
        "data__cond": True,
        "data__resolution": 8,
        "G__coords": "centers",
        "scales__max": 3.0,
        "scales__windows": 0.7,
        "scales__consistency": 2.0,
        "train__batch_gpu": 4,
    },
    "hinge over a pyramid, windows": {
        "data__resolution": 8,
        "G__coords": "centers",
        "scales__max": 3.0,
        "loss__kind": "hinge",
        "loss__pyramid": 3,
    },
    "relativistic, R2, a faster mapping, fixed augmentation, micro-batches": {
        "data__cond": True,
        "optim__mapping_lr": 0.3,
        "augment__mode": "fixed",
        "augment__p": 0.6,
        "loss__kind": "relativistic",
        "loss__r2": True,
        "train__batch_gpu": 4,
    },
    "relativistic, R2, windows of two sizes, micro-batches": {
        "data__cond": True,
        "data__resolution": 8,
        "G__coords": "centers",
        "scales__max": 1.7,
        "scales__larger": 1.5,
        "scales__pairs": 0.3,
        "loss__kind": "relativistic",
        "loss__r1_interval": 3,
        "loss__r2": True,
        "train__batch_gpu": 4,
    },
    "a teacher, uniform zooms, micro-batches": {
        "data__cond": True,
        "data__resolution": 8,
        "G__coords": "centers",
        "scales__max": 5.0,
        "scales__sampling": "uniform",
        "scales__teacher": 3.0,
        "train__batch_gpu": 4,
    },
    "two sizes, pairs, micro-batches": {
        "data__cond": True,
        "data__resolution": 8,
        "G__coords": "centers",
        "scales__max": 1.7,
        "scales__windows": 1.0,
        "scales__larger": 1.5,
        "scales__pairs": 0.3,
        "loss__r1_interval": 1,
        "train__batch_gpu": 4,
    },
    "a pyramid of whole images, micro-batches": {
        "data__cond": True,
        "loss__pyramid": 2,
        "augment__mode": "fixed",
        "augment__p": 0.6,
        "train__batch_gpu": 4,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_four_phases_are_those_of_plain_autograd(tiny, settings):
    config, images, state, trainer = prepare(tiny, **settings)
    if state.teacher:
        for p in state.teacher.parameters():
            p += 0.3 * torch.randn(p.shape, generator=make_rng(0, 0, "teacher"))
    plain = Straightforward(config, images, state)
    strengths = {plain.p}
    for s in range(9):
        batch = batch_of(images, s, config.train.batch)
        if config.scales.max > 1:
            batch = next(batches(images, batch=8, start=8 * s, workers=0, scales=config.scales))
        plain.step(s, *batch)
        trainer.step(batch)
        for network, expected in ((state.G, plain.G), (state.D, plain.D), (state.G_ema, plain.average)):
            for (name, got), want in zip(network.state_dict().items(), expected.state_dict().values(), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10, err_msg=f"step {s}, {name}")
        assert float(state.pl_mean) == pytest.approx(plain.a, rel=1e-9)
        assert state.augment_p == pytest.approx(plain.p, rel=1e-12)
        strengths.add(state.augment_p)
    assert state.step == 9
    assert (len(strengths) > 1) == (config.augment.mode == "ada")


SMALL = {
    "G": STYLES | {"channel_base": 256, "channel_max": 8, "depth": 2},
    "D": {"channel_base": 256, "channel_max": 16, "mapping_layers": 1},
    "train": {"batch": 4, "precision": "float32"},
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_takes_a_step(tiny, path):
    """At 32×32, with thin layers."""
    settings = merge(read_recipe(path.stem), SMALL)
    settings = merge(settings, {"data": {"path": str(tiny.images("large", size=(112, 104), count=4))}})
    for group in ("G", "D"):
        settings[group].pop("img_resolution", None)
    if settings["G"].get("kind", "creps") != "creps":
        del settings["G"]["depth"]
    settings["data"]["resolution"] = 32
    images = open_images(settings)
    config = resolve(settings, images, path.stem)
    state = new_state(config, ALONE.device)
    before = {name: p.clone() for name, p in state.G.named_parameters()}
    trainer = Trainer(config, state, images, ALONE)
    scales = config.scales if config.scales.max > 1 else None
    trainer.step(next(batches(images, batch=4, workers=0, scales=scales)))
    assert all(p.isfinite().all() for network in (state.G, state.D) for p in network.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in state.G.named_parameters())
    assert not any(state.bad_steps.values())


def test_the_state_before_the_first_step_depends_on_the_seed_alone(tiny):
    before = torch.random.get_rng_state()
    a, b, other = (prepare(tiny, train__seed=seed)[2] for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a.D.epilogue.out.weight, b.D.epilogue.out.weight)
    assert not torch.equal(a.D.epilogue.out.weight, other.D.epilogue.out.weight)
    for (name, weight), average in zip(a.G.state_dict().items(), a.G_ema.state_dict().values(), strict=True):
        assert torch.equal(weight, average), name


def test_latents_of_the_same_seed_are_not_the_weights(tiny):
    """Numbers of torch.manual_seed(seed) in the first layer would single out the latents that they equal."""
    G = prepare(tiny, train__seed=3)[2].G
    numbers = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    for name, weight in G.mapping.named_parameters():
        if weight.ndim == 2:
            both = torch.stack([weight.detach().float().flatten(), numbers[: weight.numel()]])
            assert torch.corrcoef(both)[0, 1].abs() < 0.5, name


def test_a_state_restored_is_the_state_saved(tiny, tmp_path):
    config, images, state, trainer = prepare(tiny, augment__mode="ada", augment__p=0.5)
    for s in range(3):
        trainer.step(batch_of(images, s, 8))
    checkpoint.save(state.state_dict(), tmp_path, 3)
    other = new_state(config, ALONE.device)
    other.load_state_dict(checkpoint.load(checkpoint.found(tmp_path)[0]), ALONE)
    for s in range(3, 6):
        trainer.step(batch_of(images, s, 8))
        Trainer(config, other, images, ALONE).step(batch_of(images, s, 8))
    assert bytes_of(other.state_dict()) == bytes_of(state.state_dict())
    assert other.stats.collect(ALONE) == state.stats.collect(ALONE)


# --- steps that are not finite ---------------------------------------------------------------------------------------


def bytes_of(nest):
    """A nest with tensors as bytes, in which NaN equals NaN."""
    if isinstance(nest, torch.Tensor):
        return nest.numpy().tobytes()
    if isinstance(nest, dict):
        return {key: bytes_of(value) for key, value in nest.items()}
    return [bytes_of(v) for v in nest] if isinstance(nest, (list, tuple)) else nest


BAD = {
    "a weight of G is NaN": lambda s: s.G.synthesis.lines.input.weight.data.fill_(math.nan),
    "a weight of D is NaN": lambda s: s.D.from_rgb.weight.data.fill_(math.nan),
}


@pytest.mark.parametrize("harm", BAD.values(), ids=BAD)
def test_gradients_that_are_not_finite_change_nothing_but_the_count(tiny, harm):
    _, images, state, trainer = prepare(tiny, augment__mode="ada", augment__p=0.5)
    for s in range(2):  # moments, pl_mean and w_avg are no longer zero
        trainer.step(batch_of(images, s, 8))
    harm(state)
    g_is_whole = all(p.isfinite().all() for p in state.G.parameters())
    kept = {n: bytes_of(v) for n, v in state.state_dict().items() if n in ("D", "D_opt", "augment_p")}
    if g_is_whole:  # the path length does not use D, so it continues
        state.G_opt.param_groups[0]["initial_lr"] = 0.0
    else:
        kept |= {n: bytes_of(v) for n, v in state.state_dict().items() if n in ("G", "G_opt", "pl_mean")}
    w_avg = state.G.mapping.w_avg.clone()
    weights = bytes_of(state.G.state_dict())
    trainer.step(batch_of(images, 2, 8))
    assert {n: bytes_of(state.state_dict()[n]) for n in kept} == kept
    assert bytes_of(state.G.state_dict()) == weights
    assert torch.equal(state.G.mapping.w_avg, w_avg)
    summary = state.stats.collect(ALONE)
    assert summary["Progress/bad_gradients_D"]["mean"] * summary["Progress/bad_gradients_D"]["num"] == 1
    assert summary["Progress/bad_gradients_G"]["mean"] > 0
    assert 0 <= state.augment_p <= 1


def test_too_many_bad_steps_in_a_row_end_the_run_and_a_good_one_begins_the_count_again(tiny):
    _, images, state, trainer = prepare(tiny, train__max_bad_steps=3, loss__pl_weight=0.0, loss__r1_gamma=0.0)
    good = state.D.epilogue.out.weight.data.clone()
    for s in range(8):  # three steps in a row at the end of the second four, when they are looked at
        state.D.epilogue.out.weight.data.copy_(good if s in (2, 4) else torch.full_like(good, math.nan))
        if s < 7:
            trainer.step(batch_of(images, s, 8))
        assert (state.bad_steps["G loss"] == 0) == (s in (2, 4))
        if s in (2, 4):
            good = state.D.epilogue.out.weight.data.clone()
    with pytest.raises(
        UserError, match=r"gradients of G loss were not finite in 3 updates in a row.*step 8.*optim.g_lr"
    ):
        trainer.step(batch_of(images, 7, 8))


def test_a_huge_finite_gradient_does_not_stop_a_weight_for_ever(tiny):
    """In float32 the square of 1e20 is infinite, and Adam divides by its root from then on."""
    _, images, state, trainer = prepare(tiny, train__precision="float32", loss__pl_weight=0.0, loss__r1_gamma=0.0)
    trainer.step(batch_of(images, 0, 8))
    for p in state.D.parameters():
        p.grad = torch.full_like(p, 1e20)
    trainer.update(next(phase for phase in trainer.phases if phase.network == "D"))
    before = [p.clone() for p in state.D.parameters()]
    for s in range(1, 4):
        trainer.step(batch_of(images, s, 8))
    assert any(not torch.equal(a, b) for a, b in zip(before, state.D.parameters(), strict=True))


def test_a_diverged_run_says_so_and_ends_with_exit_code_2(tiny):
    folder = tiny.run("--kimg", 0.032, "-o", "train.max_bad_steps=4")
    path = checkpoint.found(folder)[0]
    state = checkpoint.load(path)
    state["D"]["epilogue.out.weight"].fill_(math.nan)
    torch.save(state, path)
    result = tiny.call("--resume", folder, "--kimg", 0.2)
    assert result.exit_code == 2
    assert re.search(r"Error: the gradients of . .* were not finite in 4 updates in a row", result.output)
    log = (folder / "log.txt").read_text()
    assert re.search(r"gradients not finite, updates skipped [1-9]", log)
    for line in (folder / "stats.jsonl").read_text().splitlines():
        assert json.loads(line)["Progress/kimg"] > 0


# --- the average -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.floats(0.1, 100))
def test_after_its_half_life_half_of_the_old_average_is_left(batch, kimg):
    steps = kimg * 1000 / batch
    assert ema.decay(batch, 10**9, kimg) ** steps == pytest.approx(0.5, rel=1e-6)


def test_an_early_average_forgets_faster():
    """At 640 images a rampup of 5 % makes the half-life 32 images: one step of 32 keeps a half."""
    assert ema.decay(32, 640, 10.0, 0.05) == pytest.approx(0.5)
    assert ema.decay(32, 1280, 10.0, 0.05) == pytest.approx(0.5**0.5)
    assert ema.decay(32, 640, 10.0, None) == pytest.approx(0.5 ** (32 / 10000))
    assert ema.decay(32, 0, 10.0) == 0
    assert ema.decay(32, 640, 0.0) == 0


@given(st.floats(0, 1))
def test_an_average_moves_by_the_share_it_does_not_keep_and_buffers_are_copied(keep):
    average, model = torch.nn.BatchNorm1d(2).double(), torch.nn.BatchNorm1d(2).double()
    model.weight.data.copy_(torch.tensor([3.0, -5.0]))
    model.running_mean.fill_(7)
    ema.track(average, model, keep)
    expected = [keep * 1 + (1 - keep) * 3, keep * 1 + (1 - keep) * -5]
    assert average.weight.tolist() == pytest.approx(expected, abs=1e-12)
    assert average.running_mean.tolist() == [7, 7]


# --- logs ----------------------------------------------------------------------------------------------


def test_to_uint8_is_that_of_stylegan():
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, -1.0 + 1 / 127.5])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255, 1]


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (8, 12)), ((256, 256), (4, 7)), ((128, 1024), (8, 4))])
def test_a_grid_fills_a_screen(size, expected):
    assert grid_shape(*size) == expected


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 4]), st.integers(1, 4), st.integers(1, 4))
def test_a_tile_of_a_grid_is_its_image(rows, columns, channels, height, width):
    shape = (rows * columns, channels, height, width)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=make_rng(0, 0, "tiles"))
    grid = tile(images, rows)
    assert grid.shape == (rows * height, columns * width, channels)
    for i, image in enumerate(images):
        r, c = divmod(i, columns)
        window = grid[r * height : (r + 1) * height, c * width : (c + 1) * width]
        assert np.array_equal(window, image.permute(1, 2, 0).numpy())


def test_the_grids_of_windows_show_real_and_generated_images_at_the_same_places(tiny):
    settings = {
        "data__path": str(tiny.native_images()),
        "data__resolution": 8,
        "scales__max": 3.0,
        "G__coords": "centers",
    }
    config, images, state, _ = prepare(tiny, **settings)
    windows = choose_windows(images, 0, config.scales)
    assert 1 <= windows[:, 0].min() < 1.5 < windows[:, 0].max() <= 3
    reals = real_grid(images, 0, config.scales)
    fakes = generated_grid(state.G_ema, images, 0, 7, config.scales)
    z = torch.randn(96, config.G.z_dim, generator=make_rng(0, 0, "grid of fakes")).double()
    for k in (0, 29, 95):
        place = np.s_[k // 12 * 8 :, k % 12 * 8 :]
        zoom, *corner = windows[k].tolist()
        rows, cols = (start + (torch.arange(8, dtype=torch.float64) + 0.5) / (8 * zoom) for start in corner)
        expected = to_uint8(state.G_ema(z[k : k + 1], rows=rows, cols=cols))[0].int()
        assert np.abs(fakes[place][:8, :8] - expected.permute(1, 2, 0).numpy()).max() <= 1
        real = images.window(choose_reals(images, 0)[k], *windows[k].tolist())
        assert np.array_equal(reals[place][:8, :8], real.permute(1, 2, 0).numpy())


def test_durations_are_rounded_to_two_units():
    seconds = {0: "0s", 59.4: "59s", 59.6: "1m 00s", 185: "3m 05s", 3599.9: "1h 00m", 3720: "1h 02m", 183600: "2d 03h"}
    assert [duration(s) for s in seconds] == list(seconds.values())
