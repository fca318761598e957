"""Move the window and the transform of a Shot along paths."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from dnnlib.console import UserError
from rendering.grid import Shot
from rendering.transforms import rotation, translation, zoom

Stop = tuple[float, ...]


def parse_number(text: str) -> float | None:
    """Return a finite number, or None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def parse_path(name: str, text: str, count: int, example: str) -> list[Stop]:
    """Return the stops of "a,b,…" (`count` numbers) or of a path "a,b:c,d:…". Raises UserError."""
    path = []
    for stop in text.split(":"):
        values = [parse_number(part) for part in stop.split(",")]
        if len(values) != count or None in values:
            raise UserError(f"{name}={text}: cannot read {stop!r}; write for example {name}={example}")
        path.append(tuple(values))
    return path


def follow(path: list[Stop], t: float, between: Callable[[Stop, Stop, float], Stop]) -> Stop:
    """Return the point of `path` at t in [0,1]; each leg takes the same time and follows between(a, b, t)."""
    leg = min(int(t * (len(path) - 1)), len(path) - 2)
    return path[0] if len(path) == 1 else between(path[leg], path[leg + 1], t * (len(path) - 1) - leg)


def linear(a: Stop, b: Stop, t: float) -> Stop:
    return tuple(x + (y - x) * t for x, y in zip(a, b, strict=True))


def geometric(a: Stop, b: Stop, t: float) -> Stop:
    return tuple(x * (y / x) ** t for x, y in zip(a, b, strict=True))


def approach(a: Stop, b: Stop, t: float) -> Stop:
    """Zoom from window a to window b at a constant rate, about the point that both show at the same position."""
    edges = []
    for low, high in ((0, 2), (1, 3)):
        before, after = a[high] - a[low], b[high] - b[low]
        now = before * (after / before) ** t
        done = t if math.isclose(before, after) else (before - now) / (before - after)
        middle = (a[low] + a[high]) / 2 * (1 - done) + (b[low] + b[high]) / 2 * done
        edges.append((middle - now / 2, middle + now / 2))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


class Camera(NamedTuple):
    """Paths of the window (fractions), translation (longer sides), rotation (degrees) and zoom (factors)."""

    window: list[Stop]
    translate: list[Stop]
    rotate: list[Stop]
    zoom: list[Stop]

    @classmethod
    def parse(
        cls,
        window: str | None = None,
        translate: str | None = None,
        rotate: str | None = None,
        zoom: str | None = None,
    ) -> "Camera":
        """Read paths "A:B:…"; None shows the image as it is. Raises UserError."""
        camera = cls(
            parse_path("window", window or "0,0,1,1", 4, "0.25,0.25,0.5,0.5"),
            parse_path("translate", translate or "0,0", 2, "0.3,0"),
            parse_path("rotate", rotate or "0", 1, "30"),
            parse_path("zoom", zoom or "1", 1, "2"),
        )
        for x0, y0, x1, y1 in camera.window:
            if not (x0 < x1 and y0 < y1):
                raise UserError(f"window={window}: give left,top,right,bottom with left < right and top < bottom")
        if min(factor for (factor,) in camera.zoom) <= 0:
            raise UserError(f"zoom={zoom}: give a factor above 0, for example 2")
        return camera

    @property
    def moves(self) -> bool:
        return any(len(path) > 1 for path in self)

    @property
    def closes(self) -> bool:
        """Return whether the path ends where it starts, up to full turns."""
        turns = (self.rotate[-1][0] - self.rotate[0][0]) % 360 == 0
        return self.moves and turns and all(path[0] == path[-1] for path in (self.window, self.translate, self.zoom))

    def aim(self, shot: Shot, t: float) -> Shot:
        """Return `shot` with the window and the transform at t in [0,1]: zoom, then rotate, then translate."""
        (x, y), (degrees,) = follow(self.translate, t, linear), follow(self.rotate, t, linear)
        (factor,) = follow(self.zoom, t, geometric)
        matrix = translation(x, y) @ rotation(degrees) @ zoom(factor)
        still = torch.equal(matrix, zoom(1))
        return replace(shot, window=follow(self.window, t, approach), transform=None if still else matrix)
