"""Judge generators independently of training: python -m benchmarks.judges --data=letters.zip --network=net.safetensors

- Class accuracy. A small CNN learns the classes of a labelled archive, in about two minutes on one core, and is tested
  on a held-out tenth of the images. Then it classifies images generated with each class.
- Fréchet distance in its penultimate features, between generated images and its training images. As many are generated
  as are held out; a perfect generator would have the distance of the held-out images.
- Nearest neighbours. The distance from each generated image to the nearest image of the archive is compared with the
  distance from each image of the archive to the nearest other one. The ratio of the medians is about 1 if nothing is
  memorised, and 0 for copies.
  Distances are Euclidean, between pixels at 32² and between Lite0's features (metrics.features.Lite0Means).

Without labels, only neighbours are measured.

Legend: N images, K classes, F features.
"""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.machine import describe
from dnnlib.console import UserError, progress
from dnnlib.files import atomic_write, check_writable
from metrics import cache
from metrics.distances import frechet_distance
from metrics.features import Detector
from metrics.generated import Generated
from metrics.images import cut
from metrics.moments import Moments
from metrics.resize import fit
from torch_utils.command import command
from torch_utils.randomness import make_rng
from training.data import ImageArchive, epoch_order, index_at
from training.networks import Generator
from training.snapshot import load_generator

SIDE = 32  # pixels, for the classifier and the pixel distances
WIDTHS = (32, 64, 128)  # channels of the classifier's convolutions; the last is its number of features
SEEN = 60_000  # images that the classifier is trained on, counting repetitions
SHIFT = 3  # largest shift in pixels
BATCH = 64
MIN_IMAGES = 100  # labelled
CHOSEN = 16  # generated images whose neighbours are found
MAX_IMAGES = 1000  # generated images, held-out images, and archive images whose neighbours are found


# --- the classifier --------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Map [N,3,32,32] in [-1,1] to logits [N,K]; `features` returns the previous layer, [N,128]."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers = []
        for wide, wider in itertools.pairwise((3, *WIDTHS)):
            conv = nn.Conv2d(wide, wider, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(wider), nn.ReLU(), nn.MaxPool2d(2)]
        flat = WIDTHS[-1] * (SIDE // 2 ** len(WIDTHS)) ** 2
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(flat, WIDTHS[-1]), nn.ReLU())
        self.last = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


@torch.enable_grad()
def train_classifier(images: Tensor, classes: Tensor, num_classes: int, seed: int, seen: int) -> Classifier:
    """Train on float [N,3,32,32] in [-1,1] and int64 [N]; on a CPU, the same arguments give the same weights.

    AdamW with a cosine schedule from 2e-3 to 0, random shifts, dropout of 0.5, and label smoothing of 0.1; without it,
    the features of training images are far from the features of other images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(num_classes).to(images.device)
        steps = max(1, seen // BATCH)
        adam = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for step in progress(range(steps), desc="classifier", unit="step"):
            indices = [index_at(position, len(images), seed) for position in range(step * BATCH, (step + 1) * BATCH)]
            x = F.pad(images[indices], [SHIFT] * 4, mode="replicate")
            top, left = torch.randint(2 * SHIFT + 1, (2, BATCH), generator=make_rng(seed, step, "shifts"))
            x = x.unfold(2, SIDE, 1).unfold(3, SIDE, 1)[torch.arange(BATCH), :, top, left]
            loss = F.cross_entropy(net(x), classes[indices], label_smoothing=0.1)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def apply(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part) for part in images.split(BATCH)])


def frechet(a: Tensor, b: Tensor) -> float:
    """Compute the Fréchet distance of features [N,F] and [M,F]."""
    both = Moments(a.shape[1]), Moments(a.shape[1])
    for moments, features in zip(both, (a, b), strict=True):
        moments.update(features)
    return frechet_distance(*both).value


def read_right(logits: Tensor, classes: Tensor) -> dict:
    """Compute the accuracy of logits [N,K] for `classes` [N], over all images and per class.

    A class counts as read right when more than half of its images are classified as it.
    """
    right = (logits.argmax(1) == classes).double()
    shares = [right[classes == k].mean().item() for k in range(logits.shape[1])]
    return {
        "share of images": right.mean().item(),
        "classes": sum(share > 0.5 for share in shares),
        "of classes": len(shares),
        "share of each class": shares,
    }


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def find_nearest(points: Tensor, others: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the nearest of `others` [M,F] to each point [N,F]; return its distance [N] and index [N].

    own: [N], the index in `others` of the point itself, which is skipped.
    """
    found = []
    for rows in torch.arange(len(points)).split(256):
        # From differences: the expanded square, |a|² − 2ab + |b|², has a rounding error if a copy's distance is 0.
        distances = torch.cdist(points[rows], others, compute_mode="donot_use_mm_for_euclid_dist")
        if own is not None:
            distances[torch.arange(len(rows)), own[rows]] = torch.inf
        found.append(distances.min(1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def compare_neighbours(fakes: Tensor, reals: Tensor, seed: int) -> dict:
    """Find the nearest of M real features [M,F] to each of N generated ones [N,F]; compare with the usual distance."""
    chosen = torch.from_numpy(epoch_order(len(reals), seed, 0)[:MAX_IMAGES].copy())
    usual, _ = find_nearest(reals[chosen], reals, chosen)
    distances, indices = find_nearest(fakes, reals)
    medians = [distances.median().item(), usual.median().item()]
    return {
        "ratio": medians[0] / medians[1] if medians[1] else None,  # None: most images are twice in the archive
        "median": medians[0],
        "median of the archive": medians[1],
        "distances": distances.tolist(),
        "images": indices.tolist(),
    }


# --- images ----------------------------------------------------------------------------------------------------------


def shrink(images: Tensor) -> Tensor:
    """Resize uint8 [N,1 or 3,H,W] to float [N,3,32,32] in [-1,1]."""
    x = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    return x.expand(-1, 3, -1, -1) / 127.5 - 1


def read_batches(images: ImageArchive) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the archive in batches: uint8 [N,3,H,W] and labels [N,K]."""
    for numbers in progress(cut([len(images)], BATCH), desc=images.name, unit="batch"):
        stack, labels = zip(*(images[i] for i in numbers), strict=True)
        yield torch.stack(stack), torch.stack(labels)


def lite0_of(images: ImageArchive, detector: Detector) -> Tensor:
    """Return Lite0's features of the archive, [N,496], from the cache if present."""
    content = cache.content_digest(images.contents())
    key = cache.cache_key(content, detector=detector.digest, shape=images.shape)
    features = cache.read("features", key)
    if features is None:
        features = torch.cat([detector(batch).features.cpu() for batch, _ in read_batches(images)])
        cache.write("features", key, features)
    return features


def arrange(rows: list[list[Tensor]]) -> Image.Image:
    """Arrange rows of uint8 [3,H,W] of one size as one image."""
    pixels = torch.cat([torch.cat(row, 2) for row in rows], 1)
    return Image.fromarray(pixels.movedim(0, 2).cpu().numpy())


def summarise(found: dict) -> str:
    """Return the findings in one line."""
    parts = []
    if read := found.get("read right"):
        parts += [
            f"{read['classes']} of {read['of classes']} classes read right, {read['share of images']:.0%} of images"
        ]
    if "Fréchet distance" in found:
        parts += [f"Fréchet distance {found['Fréchet distance']:.3g}"]
    ratios = (f"{name} {found[name]['ratio']:.2f}" for name in ("pixels", "lite0") if found[name]["ratio"])
    return "; ".join([*parts, f"distance to the nearest image over the usual one: {', '.join(ratios)}"])


# --- all judges ------------------------------------------------------------------------------------------------------


class Judges:
    """The classifier and features of an archive, used to judge generators."""

    def __init__(self, images: ImageArchive, seed: int, trunc: float, device: torch.device):
        self.images, self.seed, self.trunc = images, seed, trunc
        batches = [(shrink(batch), labels) for batch, labels in read_batches(images)]
        self.small, labels = (torch.cat(parts).to(device) for parts in zip(*batches, strict=True))
        self.detector = Detector("lite0", device=device)
        self.deep = lite0_of(images, self.detector).to(device)
        self.classifier, self.facts = None, None
        if not images.label_dim:
            return
        if len(images) < MIN_IMAGES:
            raise UserError(f"a classifier needs {MIN_IMAGES} labelled images or more, and there are {len(images)}")
        if not ((labels == 0) | (labels == 1)).all() or not (labels.sum(1) == 1).all():
            raise UserError("the labels are vectors; a classifier needs one class number per image")
        classes = labels.argmax(1)
        order = torch.from_numpy(epoch_order(len(images), 0, 0).copy())  # the same images are held out for every seed
        held, kept = order.tensor_split([len(images) // 10])
        began = time.perf_counter()
        self.classifier = train_classifier(self.small[kept], classes[kept], images.label_dim, seed, SEEN)
        seconds = time.perf_counter() - began
        self.features = apply(self.classifier.features, self.small[kept])
        accuracy = (apply(self.classifier, self.small[held]).argmax(1) == classes[held]).double().mean().item()
        held = held[:MAX_IMAGES]
        self.facts = {
            "classes": images.label_dim,
            "images": len(kept),
            "accuracy": accuracy,
            "seconds": seconds,
            "compared": len(held),
            "Fréchet distance": frechet(apply(self.classifier.features, self.small[held]), self.features),
        }

    def judge(self, G: Generator, samples: int) -> tuple[dict, list[list[Tensor]]]:
        """Return the findings, and rows of images: generated, their nearest by pixels, and by Lite0's features.

        samples: generated images per class for the accuracy. For the Fréchet distance, labels are sampled from the
        archive.
        """
        found = {}
        if self.classifier:
            conditional = G.config.c_dim > 0
            images, _ = self.generate(G, self.facts["compared"], self.images if conditional else None)
            found["Fréchet distance"] = frechet(apply(self.classifier.features, shrink(images)), self.features)
            if conditional:
                images, c = self.generate(G, samples * G.config.c_dim)
                found["read right"] = read_right(apply(self.classifier, shrink(images)), c.argmax(1))
        images, _ = self.generate(G, CHOSEN)
        rows = [list(images.expand(-1, 3, -1, -1))]
        spaces = {"pixels": (shrink(images), self.small), "lite0": (self.detector(images).features, self.deep)}
        for name, (fakes, reals) in spaces.items():
            found[name] = compare_neighbours(fakes.flatten(1), reals.flatten(1), self.seed)
            indices = found[name]["images"]
            rows.append([fit(self.images[i][0][None], G.config.img_shape, "lanczos")[0].to(images) for i in indices])
        return found, rows

    def generate(self, G: Generator, num: int, labelled: ImageArchive | None = None) -> tuple[Tensor, Tensor]:
        """Generate uint8 [num,C,H,W] with labels [num,K]: classes in turn, or sampled from `labelled`."""
        lists = cut([num], BATCH // 4)
        batches = Generated(G, seed=self.seed, trunc=self.trunc, labelled=labelled).batches(lists)
        batches = progress(batches, desc="generated", total=len(lists), unit="batch")
        images, labels = zip(*((batch.images(), batch.c) for batch in batches), strict=True)
        return torch.cat(images), torch.cat(labels)


def open_networks(paths: tuple[str, ...], images: ImageArchive, device: torch.device) -> dict[str, Generator]:
    """Load networks by path. Raises UserError for networks that this archive cannot judge."""
    networks = {}
    for path in paths:
        G = load_generator(path, device)
        if G.config.img_channels not in (1, 3):
            raise UserError(
                f"{path} generates images of {G.config.img_channels} channels, and only RGB and grey can be judged"
            )
        if images.label_dim and G.config.c_dim not in (0, images.label_dim):
            raise UserError(
                f"{path} takes {G.config.c_dim} classes, and the archive has {images.label_dim}; "
                "give the archive that it was trained on"
            )
        networks[path] = G
    return networks


@click.command()
@click.option("--data", required=True, metavar="ZIP|DIR", help="Training images of the networks.")
@click.option("--network", "networks", multiple=True, metavar="FILE", help="A snapshot to judge; may be repeated.")
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Generated images per class for the accuracy.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the classifier and the latents."
)
@click.option("--trunc", type=float, default=1, show_default=True, help="Truncation ψ of the generated images.")
@click.option("--grid", type=click.Path(path_type=Path), help="A PNG to write: generated, nearest by pixels, by Lite0.")
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results/judges.json", show_default=True)
@torch.no_grad()
@command()
def main(data, networks, samples, seed, trunc, grid, out):
    """Judge generators independently of training; write JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = ImageArchive(data, channels=3)
    if images.has_labels:
        images = ImageArchive(data, channels=3, use_labels=True)
    generators = open_networks(networks, images, device)
    if grid and len(generators) != 1:
        raise UserError("--grid shows one network; give one --network")
    for path in filter(None, (out, grid)):
        check_writable(path.parent)
    judges = Judges(images, seed, trunc, device)
    result = {"machine": describe(), "data": images.name, "images": len(images), "seed": seed, "trunc": trunc}
    if judges.facts:
        click.echo(json.dumps(judges.facts, ensure_ascii=False))
        result["classifier"] = judges.facts
    result["networks"] = []
    for path, G in generators.items():
        found, rows = judges.judge(G, samples)
        result["networks"].append({"network": Path(path).name, **found})
        click.echo(f"{Path(path).name}: {summarise(found)}")
        if grid:
            with atomic_write(grid) as temporary:
                arrange(rows).save(temporary)
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
