"""The phases of a training step, as in StyleGAN2-ADA: each is a term of the loss with its own update of one network.

A loss yields one or two scalars per micro-batch, and their gradients add up to those of the batch.

Legend: t the trainer, z latents, c labels, ws styles, windows of images (training.scales).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from training import losses
from training.config import LossConfig
from training.data import Batch
from training.scales import mix, parts, resized

if TYPE_CHECKING:
    from training.trainer import Latents, Trainer


@dataclass(frozen=True)
class Phase:
    """Every `interval` steps, an update of `network` by the gradient of `loss`."""

    network: Literal["G", "D"]
    term: str
    interval: int
    loss: Callable[[Trainer, Batch], Iterator[Tensor]]

    def __str__(self) -> str:
        return f"{self.network} {self.term}"  # the key of bad_steps in training states


def phases(config: LossConfig) -> list[Phase]:
    """List the phases in the order of a step."""
    path_length = [Phase("G", "path length", config.pl_interval, path_length_loss)] if config.pl_weight else []
    r1 = [Phase("D", "R1", config.r1_interval, r1_loss)] if config.r1_gamma else []
    return [Phase("G", "loss", 1, generator_loss), *path_length, Phase("D", "loss", 1, discriminator_loss), *r1]


def generator_loss(t: Trainer, real: Batch) -> Iterator[Tensor]:
    """Yield the adversarial loss of G, on the windows of the real images. w_avg tracks the mean style of the batch."""
    latents = t.sample_latents("generator", t.batch)
    augmentations = t.sample_augmentations("generator")
    of_real = t.sample_augmentations("generator real") if t.adversarial.pairs else None
    average, sizes = 0, t.sizes()
    for part, (x, c, windows) in zip(t.parts, t.split(real), strict=True):
        own = latents.part(part)
        with t.autocast():
            ws = t.styles(own)
            sized = [t.synthesise(ws, own.noise, windows, size) for size in sizes]
            mixed = mix(sized, t.rng("generator mixing"))
            logits = t.judge([augmentations[part].apply(images) for images in mixed], own.c, windows)
        if t.adversarial.pairs:
            with torch.no_grad(), t.autocast():
                real_logits = t.judge([of_real[part].apply(resized(x, size)) for size in sizes], c, windows)
            loss = t.adversarial.G(logits, real_logits)
        else:
            loss = t.adversarial.G(logits)
        average = average + ws[:, 0].detach().mean(dim=0) / len(t.parts)
        t.state.stats.report("Loss/G/loss", loss)
        for name, term in WINDOW_TERMS.items():
            if weight := getattr(t.config.scales, name):
                difference = term(t, own, ws, sized[0], windows)
                t.state.stats.report(f"Loss/G/{name}", difference)
                loss = loss + weight * difference
        yield loss.mean() / len(t.parts)
    w_avg = t.state.G.mapping.w_avg
    t.set_after_update(w_avg, w_avg.lerp(t.procs.mean_(average), 1 - t.config.train.w_avg_decay))


def consistency(t: Trainer, own: Latents, ws: Tensor, images: Tensor, windows: Tensor) -> Tensor:
    """Return the mean squared differences [N] between images, halved, and the same windows of half as many pixels."""
    half = t.synthesise(ws, own.noise, windows, [side // 2 for side in images.shape[2:]])
    return (F.avg_pool2d(images, 2) - half).square().mean(dim=(1, 2, 3))


def teacher(t: Trainer, own: Latents, ws: Tensor, images: Tensor, windows: Tensor) -> Tensor:
    """Return the mean absolute differences [N] between images, reduced to pixels of whole images, and the teacher's.

    AnyresGAN (Chai et al., ECCV 2022), without its LPIPS: the teacher renders the same latents at these pixels.
    """
    (rows, of_rows), (cols, of_cols) = parts(windows, images.shape[2:])
    of_rows, of_cols = of_rows[:, None].to(images), of_cols[:, None].to(images)
    with torch.no_grad(), t.autocast():
        wanted = t.state.teacher.synthesis(t.styles(own, t.state.teacher), rows, cols, own.noise)
    counted = of_rows.sum(dim=3, keepdim=True) * of_cols.sum(dim=3)[:, :, None]
    difference = (of_rows @ images @ of_cols.mT - wanted).abs() * counted
    return difference.sum(dim=(1, 2, 3)) / (counted.sum(dim=(1, 2, 3)) * images.shape[1])


WINDOW_TERMS = {"consistency": consistency, "teacher": teacher}  # by the settings in `scales` that are their weights


def path_length_loss(t: Trainer, real: Batch) -> Iterator[Tensor]:
    """Yield the path length penalty on half a batch, as in the released code (StyleGAN2, section 3.2)."""
    s, config = t.state, t.config.loss
    count = max(t.batch // 2, 1)
    parts = [part for part in t.parts if range(count)[part]]  # half of a batch may leave the last ones empty …
    scale = t.procs.world if parts else 0  # the mean of the gradients over the processes divides by their number
    parts = parts or [slice(0, 1)]  # … and a process without any contributes zeros
    latents = t.sample_latents("path", count)

    def measure(part: slice) -> Tensor:
        own = latents.part(part)
        synthesise = functools.partial(t.synthesise, noise=own.noise)
        return losses.path_lengths(synthesise, t.styles(own), t.sample_path_noise(range(count)[part]))

    # The penalty compares each length with a mean over the whole batch. With several micro-batches, the lengths are
    # measured first and computed again one micro-batch at a time, so that only one graph is ever held.
    whole = measure(parts[0]) if len(parts) == 1 else None
    lengths = torch.zeros(count, device=t.procs.device, dtype=t.dtype)
    for part in parts:
        if scale:
            lengths[part] = (measure(part) if whole is None else whole).detach()
    t.procs.sum_(lengths).requires_grad_()
    penalty, mean = losses.path_penalty(lengths, s.pl_mean, config.pl_decay)
    (slopes,) = torch.autograd.grad(penalty.mean() * (config.pl_weight * config.pl_interval), lengths)
    s.stats.report("Loss/path_length/penalty", penalty[t.own])
    s.stats.report("Loss/path_length/length", lengths[t.own])
    for part in parts:
        yield ((measure(part) if whole is None else whole) * (slopes[part] * scale)).sum()
    t.set_after_update(s.pl_mean, mean)


def discriminator_loss(t: Trainer, real: Batch) -> Iterator[Tensor]:
    """Yield the adversarial loss of D. Reports what it says of real and generated images."""
    s, sizes = t.state, t.sizes()
    latents = t.sample_latents("critic", t.batch)
    of_fake, of_real = t.sample_augmentations("critic"), t.sample_augmentations("critic real")
    for part, (x, c, windows) in zip(t.parts, t.split(real), strict=True):
        own = latents.part(part)
        with t.autocast():
            with torch.no_grad():
                ws = t.styles(own)
                sized = [t.synthesise(ws, own.noise, windows, size) for size in sizes]
                fakes = mix(sized, t.rng("critic mixing"))
            reals = [resized(x, size) for size in sizes]
            both = [
                torch.cat([of_fake[part].apply(fake), of_real[part].apply(real)])
                for fake, real in zip(fakes, reals, strict=True)
            ]
            logits = t.judge(both, torch.cat([own.c, c]), windows, batches=2)
            fake_logits, real_logits = logits.chunk(2)
        loss = t.adversarial.D(real_logits, fake_logits)
        signs = losses.per_image(real_logits.detach().sign())
        s.signs += torch.stack([signs.sum(), signs.new_full((), len(signs))])
        s.stats.report("Loss/D/loss", loss)
        s.stats.report("Loss/scores/fake", fake_logits)
        s.stats.report("Loss/scores/real", real_logits)
        s.stats.report("Loss/signs/real", real_logits.sign())
        if len(x) > 1:
            s.stats.report("Spread/fake", fakes[0].var(dim=0))
            s.stats.report("Spread/real", reals[0].var(dim=0))
        yield loss.mean() / len(t.parts)


def r1_loss(t: Trainer, real: Batch) -> Iterator[Tensor]:
    """Yield γ/2 · R1 times its interval, and with loss.r2 the same of R2. In a pair, of the smaller images."""
    config, size = t.config.loss, t.sizes()[0]
    weight = config.r1_gamma / 2 * config.r1_interval / len(t.parts)

    def penalty(name: str, images: Tensor, c: Tensor, windows: Tensor | None, augment: Callable) -> Tensor:
        def judge(images: Tensor) -> Tensor:
            with t.autocast():
                return t.judge([augment(images)], c, windows, regularised=True)

        penalty = losses.r1(judge, images)
        t.state.stats.report(f"Loss/{name}_penalty", penalty)
        return penalty.mean() * weight

    augmentations = t.sample_augmentations("r1")
    for part, (x, c, windows) in zip(t.parts, t.split(real), strict=True):
        yield penalty("r1", resized(x, size), c, windows, augmentations[part].apply)
    if config.r2:
        latents, augmentations = t.sample_latents("r2", t.batch), t.sample_augmentations("r2")
        for part, (_, _, windows) in zip(t.parts, t.split(real), strict=True):
            own = latents.part(part)
            with torch.no_grad(), t.autocast():
                fake = t.synthesise(t.styles(own), own.noise, windows, size)
            yield penalty("r2", fake, own.c, windows, augmentations[part].apply)
