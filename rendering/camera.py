"""Where the camera is: it stands still in a picture and follows paths in a film."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from dnnlib.console import UserError
from rendering.grid import rotation, translation, zoom


def number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse_path(option: str, text: str, count: int, example: str) -> list[tuple[float, ...]]:
    """Numbers "a,b,…" (`count` of them), or the path "a,b:c,d:…". Raises UserError."""
    path = []
    for stop in text.split(":"):
        values = [number(part) for part in stop.split(",")]
        if len(values) != count or None in values:
            raise UserError(f"--{option}={text}: cannot read {stop!r}; write for example --{option}={example}")
        path.append(tuple(values))
    return path


def along(path: list[tuple[float, ...]], t: float, between: Callable) -> tuple[float, ...]:
    """The point of `path` at t in [0,1], each leg taking the same time; between(a, b, t) on a leg."""
    leg = min(int(t * (len(path) - 1)), len(path) - 2)
    return path[0] if len(path) == 1 else between(path[leg], path[leg + 1], t * (len(path) - 1) - leg)


def linear(a: tuple[float, ...], b: tuple[float, ...], t: float) -> tuple[float, ...]:
    return tuple(x + (y - x) * t for x, y in zip(a, b, strict=True))


def geometric(a: tuple[float, ...], b: tuple[float, ...], t: float) -> tuple[float, ...]:
    return tuple(x * (y / x) ** t for x, y in zip(a, b, strict=True))


def approach(a: tuple[float, ...], b: tuple[float, ...], t: float) -> tuple[float, ...]:
    """From window to window at a constant rate of zoom, about the point that both have in the same place."""
    edges = []
    for low, high in ((0, 2), (1, 3)):
        before, after = a[high] - a[low], b[high] - b[low]
        now = before * (after / before) ** t
        done = t if math.isclose(before, after) else (before - now) / (before - after)
        middle = (a[low] + a[high]) / 2 * (1 - done) + (b[low] + b[high]) / 2 * done
        edges.append((middle - now / 2, middle + now / 2))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


class Camera(NamedTuple):
    """Paths of the window and of the transforms."""

    window: list[tuple[float, ...]]
    translate: list[tuple[float, ...]]
    rotate: list[tuple[float, ...]]
    zoom: list[tuple[float, ...]]

    @classmethod
    def parse(cls, window: str | None, translate: str | None, rotate: str | None, zoom: str | None) -> "Camera":
        """From the options of these names. Raises UserError."""
        camera = cls(
            parse_path("window", window or "0,0,1,1", 4, "0.25,0.25,0.5,0.5"),
            parse_path("translate", translate or "0,0", 2, "0.3,0"),
            parse_path("rotate", rotate or "0", 1, "30"),
            parse_path("zoom", zoom or "1", 1, "2"),
        )
        for x0, y0, x1, y1 in camera.window:
            if not (x0 < x1 and y0 < y1):
                raise UserError(f"--window={window}: give left,top,right,bottom with left < right and top < bottom")
        if min(factor for (factor,) in camera.zoom) <= 0:
            raise UserError(f"--zoom={zoom}: give a factor above 0, for example 2")
        return camera

    @property
    def moves(self) -> bool:
        return any(len(path) > 1 for path in self)

    @property
    def closes(self) -> bool:
        """Whether the last picture of the path looks like the first: full turns, and the rest in its old place."""
        turns = (self.rotate[-1][0] - self.rotate[0][0]) % 360 == 0
        return self.moves and turns and all(path[0] == path[-1] for path in (self.window, self.translate, self.zoom))

    def at(self, t: float) -> dict:
        """The arguments `window` and `transform` of rendering.plan at t in [0,1]."""
        window = along(self.window, t, approach)
        (x, y), (degrees,) = along(self.translate, t, linear), along(self.rotate, t, linear)
        (factor,) = along(self.zoom, t, geometric)
        move = translation(x, y) @ rotation(degrees) @ zoom(factor)
        return {"window": window, "transform": None if torch.equal(move, zoom(1)) else move}
