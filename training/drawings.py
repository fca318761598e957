"""Draws SVG files, each in a process of its own with limits: a file can ask for any work and any memory.

librsvg, the library behind libvips, follows no reference to other files or addresses when it is given bytes.
"""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from dnnlib.vips import import_vips

SECONDS = 60  # for one drawing; 16384² pixels of 22 shapes take 11
MEMORY = 2**32
PIXELS = 2**29  # of one drawing: 2 GiB
SCALES = 1e5, 1e3, 10, 0.1  # at which to ask for the size, because libvips rounds it to pixels


def draw(data: bytes, cover: tuple[int, int]) -> Image.Image:
    """Draw an SVG in its own proportions, at the least size that covers `cover`, (width, height). Return RGBA.

    Raises ValueError, with the reason, for data that are no SVG or ask for more than the limits.
    """
    command = [sys.executable, "-m", "training.drawings", *map(str, cover)]
    root, environment = Path(__file__).parents[1], os.environ | {"VIPS_CONCURRENCY": "1"}  # threads reserve memory
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, cwd=root, env=environment)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"drawing it takes more than {SECONDS} seconds") from error
    line = done.stdout[: done.stdout.find(b"\n")]  # of sizes, before the pixels, or of the reason
    if done.returncode == 2:
        raise ValueError(line.decode())
    if done.returncode:
        *_, last = ["no message", *done.stderr.decode(errors="replace").splitlines()]
        raise ValueError(f"drawing it failed, perhaps because it takes more than {MEMORY >> 30} GiB ({last.strip()})")
    pixels = memoryview(done.stdout)[len(line) + 1 :]
    return Image.frombuffer("RGBA", tuple(map(int, line.split())), pixels, "raw", "RGBA", 0, 1)


def render(data: bytes, cover: tuple[int, int]) -> tuple[int, int, bytes]:
    """Do the work of `draw` in this process. Return width, height and pixels. Raises ValueError."""
    vips = import_vips()

    def load(scale: float):  # parses, and draws nothing yet
        return vips.Image.svgload_buffer(data, scale=scale, fail_on="error")

    try:
        for scale in SCALES:
            with contextlib.suppress(vips.Error):
                image = load(scale)
                if min(image.width, image.height) > 1:  # libvips fails, or says 1, above 10⁸
                    break
        else:
            load(1)
            raise ValueError("its sides are not between 1 and 10⁹ pixels")
        enlarged = max(cover[0] / image.width, cover[1] / image.height)
        width, height = round(enlarged * image.width), round(enlarged * image.height)
        if width * height > PIXELS:
            raise ValueError(f"it covers {cover[0]}x{cover[1]} only with {width}x{height}, too many pixels")
        image = load(scale * enlarged)
        return image.width, image.height, image.write_to_memory()
    except vips.Error as error:
        raise ValueError(" ".join(re.split("of data: |glib: |svgload_buffer: ", str(error))[-1].split())) from error


if __name__ == "__main__":
    with contextlib.suppress(ImportError, ValueError):  # Windows, macOS
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        width, height, pixels = render(sys.stdin.buffer.read(), tuple(map(int, sys.argv[1:])))
    except ValueError as error:
        sys.stdout.buffer.write(f"{error}\n".encode())
        sys.exit(2)
    sys.stdout.buffer.write(f"{width} {height}\n".encode())
    sys.stdout.buffer.write(pixels)
