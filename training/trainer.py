"""The training step.

Legend: N images of a micro-batch, z latents, c labels. A step takes one batch of real images over all processes.

Randomness is a function of (seed, step). Every rank samples it for the whole batch and uses its own part: image i
belongs to rank i mod world and to micro-batch i mod M, where M counts those of all ranks. So the split of a batch
changes only the order of float additions; minibatch-std groups stay whole (see minibatch_std).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dnnlib.console import UserError
from torch_utils.distributed import Processes
from torch_utils.randomness import make_rng
from torch_utils.transfer import send
from training import augment, diffaug, ema, losses
from training.config import RunConfig
from training.data import Batch, ImageArchive
from training.networks import Generator
from training.networks.discriminator import Epilogue, scale_features
from training.phases import Phase, phases
from training.scales import positions
from training.state import TrainState

CHECK_INTERVAL = 4  # steps between adjustments of p (ADA paper, section 3.1) and checks for divergence


class Latents(NamedTuple):
    """What N generated images come from. The first `cut` styles are those of z, the rest those of `other`, if given."""

    z: Tensor  # [N,z_dim]
    c: Tensor  # labels [N,c_dim]
    noise: Tensor  # int64 [N], seeds
    other: Tensor | None  # [N,z_dim]
    cut: Tensor | None  # int64 [N]

    def part(self, part: slice) -> "Latents":
        return Latents(*(None if x is None else x[part] for x in self))


class Trainer:
    """Runs training steps on a TrainState."""

    def __init__(self, config: RunConfig, state: TrainState, images: ImageArchive, procs: Processes):
        self.config, self.state, self.images, self.procs = config, state, images, procs
        self.batch = config.train.batch
        self.micro = config.micro_batch(procs.world)
        # Which images of a batch belong to this rank, and to each of its micro-batches.
        self.own = slice(procs.rank, None, procs.world)
        count = self.batch // self.micro
        self.parts = [slice(i, None, count) for i in range(procs.rank, count, procs.world)]
        whole = self.micro % config.mbstd_group == 0
        for module in state.D.modules():
            if isinstance(module, Epilogue):
                module.procs = None if whole else procs  # groups that no rank holds are computed together
        self.phases = phases(config.loss)
        self.dtype = next(state.G.parameters()).dtype
        self.adversarial = losses.ADVERSARIAL[config.loss.kind]
        self._pending: list[tuple[Tensor, Tensor]] = []

    def step(self, batch: Batch) -> None:
        """Take a step on the images of this rank. Raises UserError after divergence."""
        s, train, device = self.state, self.config.train, self.procs.device
        real = Batch(
            send(batch.images, device).to(self.dtype) / 127.5 - 1,  # to the device first: a quarter of the bytes
            send(batch.labels, device, self.dtype),
            None if batch.windows is None else send(batch.windows, device),
        )
        for phase in self.phases:
            if s.step % phase.interval == 0:
                self.run(phase, real)
        s.step += 1
        if s.step % CHECK_INTERVAL == 0:
            self._check_gradients()
            self._adapt_augmentation()
        ema.track(s.G_ema, s.G, ema.decay(self.batch, s.step * self.batch, train.ema_kimg, train.ema_rampup))

    def run(self, phase: Phase, real: Batch) -> None:
        """Accumulate the gradients of a phase, given real images in [-1,1], and update its network."""
        self.state.G.requires_grad_(phase.network == "G")
        self.state.D.requires_grad_(phase.network == "D")
        for loss in phase.loss(self, real):
            loss.backward()
        self.update(phase)

    def update(self, phase: Phase) -> None:
        """Average the gradients over the processes and apply them, unless they are not finite.

        Nothing here waits for the device: the fused Adam skips the step where `found_inf` is 1.
        """
        s = self.state
        network, optimizer = (s.G, s.G_opt) if phase.network == "G" else (s.D, s.D_opt)
        updated = [p for p in network.parameters() if p.grad is not None]
        flat = self.procs.mean_(torch.cat([p.grad.flatten() for p in updated]))
        # The squares too: one that overflows would make Adam's second moment infinite, and its weight would never move.
        bad = 1 - flat.dot(flat).isfinite().float()
        for p, mean in zip(updated, flat.split([p.numel() for p in updated]), strict=True):
            p.grad = mean.view_as(p)
        optimizer.found_inf = bad  # as torch.amp.GradScaler sets it
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * self.lr_decay()
        optimizer.step()
        for buffer, value in self._pending:
            buffer.copy_(torch.where(bad > 0, buffer, value))
        self._pending.clear()
        optimizer.zero_grad(set_to_none=True)
        s.bad_steps[str(phase)] = (s.bad_steps.get(str(phase), 0) + 1) * bad
        s.stats.report(f"Progress/bad_gradients_{phase.network}", bad)

    def lr_decay(self) -> float:
        """Return the factor, 1 to 0, of the learning rates in this step (optim.lr_decay)."""
        share = self.config.optim.lr_decay
        left = 1 - self.state.step * self.batch / (self.config.train.kimg * 1000)
        return max(min(left / share, 1), 0) if share else 1

    def set_after_update(self, buffer: Tensor, value: Tensor) -> None:
        """Set `buffer` to `value` if the update of this phase takes place."""
        self._pending.append((buffer, value))

    def _check_gradients(self) -> None:
        for name, bad in self.state.bad_steps.items():
            if bad >= self.config.train.max_bad_steps:
                raise UserError(
                    f"the gradients of {name} were not finite in {int(bad)} updates in a row, up to step "
                    f"{self.state.step}; the run has diverged; start a new run from an earlier training-state-*.pt, "
                    f"with a lower optim.{name[0].lower()}_lr"
                )

    def _adapt_augmentation(self) -> None:
        s, settings = self.state, self.config.augment
        total, count = self.procs.sum_(s.signs.clone()).tolist()
        s.signs.zero_()
        if settings.mode == "ada" and count:
            s.augment_p = augment.adjust(
                s.augment_p, total / count, images=int(count), target=settings.target, kimg=settings.kimg
            )

    # --- what the phases share ---------------------------------------------------------------------------------------

    def rng(self, purpose: str) -> torch.Generator:
        return make_rng(self.config.train.seed, self.state.step, purpose)

    def split(self, real: Batch) -> Iterator[Batch]:
        """Yield the images of this rank by micro-batches, in the order of `parts`."""
        count = len(self.parts)
        return (Batch(*(None if x is None else x[i::count] for x in real)) for i in range(count))

    def sample_latents(self, purpose: str, count: int) -> Latents:
        """Sample `count` latents, the same on every rank.

        The labels are those of random images, so that they are as frequent as in the archive. `cut` is uniform from 1
        to num_ws − 1 for the share loss.style_mixing of the images (StyleGAN, CVPR 2019, section 3.1), else num_ws.
        """
        G, mixing, rng = self.config.G, self.config.loss.style_mixing, self.rng(purpose)
        z = torch.randn(count, G.z_dim, generator=rng)
        chosen = torch.randint(len(self.images), [count], generator=rng).tolist()
        c = torch.stack([self.images.label(i) for i in chosen])
        noise, other, cut = torch.randint(2**62, [count], generator=rng), None, None
        if mixing:
            other = torch.randn(count, G.z_dim, generator=rng)
            cut = torch.randint(1, G.num_ws, [count], generator=rng)
            cut[torch.rand(count, generator=rng) >= mixing] = G.num_ws
            other, cut = send(other, self.procs.device, self.dtype), send(cut, self.procs.device)
        return Latents(
            send(z, self.procs.device, self.dtype), send(c, self.procs.device, self.dtype), noise, other, cut
        )

    def styles(self, latents: Latents, G: Generator | None = None) -> Tensor:
        """Return ws [N,num_ws,w_dim] of a generator, by default that of the state."""
        mapping, (z, c, _, other, cut) = (G or self.state.G).mapping, latents
        ws = mapping(z, c)
        if other is None:
            return ws
        mixed = torch.arange(ws.shape[1], device=ws.device) >= cut[:, None]
        return torch.where(mixed[..., None], mapping(other, c), ws)

    def sample_augmentations(self, purpose: str) -> augment.Augmentations | diffaug.Augmentations:
        """Sample what happens to each image of a batch, the same on every rank."""
        settings, shape, rng = self.config.augment, self.config.G.img_shape, self.rng(purpose + " augmentation")
        if settings.mode == "diffaug":
            return diffaug.sample(settings.policy, self.batch, shape, rng)
        return augment.sample(settings, self.batch, self.state.augment_p, image_shape=shape, rng=rng)

    def sample_path_noise(self, numbers: range) -> Tensor:
        """Sample N(0,1) [n,C,H,W] for the images of these numbers only: noise of a whole batch is large."""
        shape = (self.config.G.img_channels, *self.config.G.img_shape)
        noise = [torch.randn(shape, generator=self.rng(f"path noise {i}"), dtype=self.dtype) for i in numbers]
        return send(torch.stack(noise), self.procs.device)

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of the images that this step renders and judges: one size or, in a pair, two."""
        scales, shape = self.config.scales, self.config.G.img_shape
        if scales.larger == 1:
            return [shape]
        both = [shape, scales.larger_shape(shape)]
        # The first step, whose memory is measured, takes the most.
        pair, size = torch.rand(2, generator=self.rng("sizes")).tolist() if self.state.step else (0, 1)
        if pair < scales.pairs:
            return both
        return both[:1] if size < 0.5 else both[1:]

    def synthesise(
        self, ws: Tensor, noise: Tensor, windows: Tensor | None = None, shape: tuple[int, int] | None = None
    ) -> Tensor:
        """ws [N,num_ws,w_dim], noise [N], windows [N,3] of the (height, width) `shape` -> [N,C,H,W]: G under autocast.

        noise: seeds (see Synthesis). Without windows, whole images of the training size.
        """
        axes = (None, None) if windows is None else positions(windows, shape)
        with self.autocast():
            return self.state.G.synthesis(ws, *axes, noise)

    def judge(
        self, sized: list[Tensor], c: Tensor, windows: Tensor | None, batches: int = 1, *, regularised: bool = False
    ) -> Tensor:
        """Return the logits [N,K] of D for `batches` of images of labels c [N,c_dim] and the same windows.

        sized: [N,C,H,W] of every size of the step. The logits of all sizes, and of all levels of their pyramids, are
        side by side. A scale-aware D is told log2(n/R) of each, where n is the side of the whole image that it is a
        part of.
        regularised: only the logits that R1 regards.
        """
        D = self.state.D
        judge = D.regularised if regularised else functools.partial(D, batches=batches)
        zoom = c.new_ones(len(c)) if windows is None else windows[:, 0].repeat(batches)
        logits = []
        for level in (level for images in sized for level in losses.pyramid(images, self.config.loss.pyramid)):
            scale = zoom * (level.shape[2] / self.config.D.img_shape[0])
            told = torch.cat([c, scale_features(scale).to(c)], dim=1) if self.config.D.scale_aware else c
            logits.append(judge(level, told))
        return torch.cat(logits, dim=1)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.procs.device.type, torch.bfloat16, self.config.train.precision == "bfloat16")
