"""Render letters in many fonts and colours: labelled images of any size, without a download. Needs matplotlib."""

import colorsys
import functools
import random
import string
import unicodedata
from pathlib import Path

import matplotlib
from fontTools.agl import toUnicode  # matplotlib depends on fontTools
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.ft2font import FT2Font, LoadFlags
from matplotlib.path import Path as Outline
from matplotlib.transforms import Affine2D
from PIL import Image

from dnnlib.console import UserError
from training.colours import to_channels
from training.labels import Table
from training.sources import PillowSize

EXTENT = (0.65, 0.85)  # the longer side of a letter's box, in shorter sides of the image
MARGIN = 0.06  # the least distance of that box, made square, from the edge, in the same unit
ROTATION = 5  # degrees, to either side
CONTRAST = 4.5  # the least ratio of ink to ground: what WCAG 2.1 asks of text
FLATTENED_AT = 4096  # pixels per em: curves become polygons that deviate by less than a pixel at this size

Colour = tuple[int, int, int]  # sRGB, 0..255


class Letters:
    """Renders characters as a Source of images.

    characters  one class each, in this order; composed characters (NFC) may be given decomposed
    size        width and height in pixels: the same drawing at any size
    drawings    per character, in one font after the other
    seed        determines size, place, rotation and colours, with the character and the drawing's number

    Other releases of matplotlib may contain other fonts, and so give other drawings.
    Raises UserError when there are no characters, one is repeated, or no font has all of them.
    """

    def __init__(self, characters: str, size: PillowSize, drawings: int, seed: int = 0):
        self.path = Path(matplotlib.get_data_path(), "fonts", "ttf")
        self._size, self._drawings, self._seed = size, drawings, seed
        self._characters = unicodedata.normalize("NFC", characters)
        if not self._characters:
            raise UserError("characters is empty; give at least one, e.g. ABC")
        for character in self._characters:
            if self._characters.count(character) > 1:
                raise UserError(
                    f"characters {characters!r} holds {character!r} twice; give each class's character once"
                )
        faces = [face for face in sorted(self.path.glob("*.ttf")) if is_text_face(face)]
        missing = {face: "".join(c for c in self._characters if not has_outline(face, c)) for face in faces}
        self._faces = [face for face in faces if not missing[face]]
        if not self._faces:
            fewest = min(missing.values(), key=len, default=self._characters)
            raise UserError(f"no font in {self.path} has all of {characters!r}; leave out {fewest!r}")

    def names(self) -> list[str]:
        """List CHARACTER/NUMBER, the first drawing of every character before the second of any."""
        return [f"{character}/{number}" for number in range(self._drawings) for character in self._characters]

    def labels(self) -> Table:
        """Return one class per character, in the given order."""
        rows = [[name, self._characters.index(name[0])] for name in self.names()]
        return Table("letters", rows, list(self._characters))

    def image(self, name: str, channels: int) -> Image.Image:
        """Render one of names()."""
        rng = random.Random(f"{self._seed} {name}")
        face = self._faces[int(name[2:]) % len(self._faces)]
        mask = coverage(outline(face, name[0]), self._size, rng)
        ink, ground = two_colours(rng)
        image = Image.new("RGB", self._size, ground)
        image.paste(ink, mask=mask)
        return to_channels(image, channels)

    def unchanged(self, name: str, channels: int) -> None:
        """Return no file."""

    def notes(self, channels: int) -> list[str]:
        return []


@functools.cache
def glyph_names(face: Path) -> dict[int, str]:
    """Read the PostScript name of the glyph at each code point."""
    font = FT2Font(str(face))
    return {code: font.get_glyph_name(index) for code, index in font.get_charmap().items()}


def has_glyph(face: Path, character: str) -> bool:
    """Tell whether the glyph at a character's code point also has its name, by the Adobe Glyph List.

    The code point does not suffice: cmex10 has brackets at the letters, cmr10 bare accents at the umlauts, and
    LastResort one box for each alphabet.
    """
    name = glyph_names(face).get(ord(character), "")
    return unicodedata.normalize("NFC", toUnicode(name)) == character  # the list has the ohm sign for Omega


def is_text_face(face: Path) -> bool:
    """Tell whether a font has A to Z, a to z and 0 to 9, unlike fonts of symbols or mathematical italics."""
    return all(has_glyph(face, character) for character in string.ascii_letters + string.digits)


def has_outline(face: Path, character: str) -> bool:
    """Tell whether a font has a character with an outline, which a space lacks."""
    return has_glyph(face, character) and len(curves(face, character).vertices) > 0


@functools.cache
def outline(face: Path, character: str) -> Outline:
    """Return a character's outline as polygons.

    They are made once, at a large size: rendering would flatten curves to within half a pixel of the image, which gives
    another shape at each size.
    """
    return curves(face, character).cleaned()


def curves(face: Path, character: str) -> Outline:
    """Read a character's outline, FLATTENED_AT pixels per em; it is empty for a space."""
    font = FT2Font(str(face))
    font.set_size(FLATTENED_AT, dpi=72)
    font.load_char(ord(character), flags=LoadFlags.NO_HINTING)
    return Outline(*font.get_path())


def coverage(shape: Outline, size: PillowSize, rng: random.Random) -> Image.Image:
    """Rotate, scale and place an outline at random; return how much of each pixel it covers, 0..255.

    Agg integrates the polygon's area in each pixel, so a drawing equals the box-filtered drawing of a larger size.
    """
    side, extent = min(size), rng.uniform(*EXTENT)
    room = (1 - extent) / 2 - MARGIN
    placed = Affine2D().rotate_deg(rng.uniform(-ROTATION, ROTATION))
    box = shape.get_extents(placed)
    placed.translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
    placed.scale(extent / max(box.width, box.height))
    placed.translate(rng.uniform(-room, room), rng.uniform(-room, room))
    placed.scale(side).translate(size[0] / 2, size[1] / 2)

    renderer = RendererAgg(*size, dpi=72)
    pen = renderer.new_gc()
    pen.set_linewidth(0)
    pen.set_snap(False)
    renderer.draw_path(pen, shape, placed, rgbFace=(1, 1, 1))
    return Image.frombuffer("RGBA", size, renderer.buffer_rgba(), "raw", "RGBA", 0, 1).getchannel("A")


def two_colours(rng: random.Random) -> tuple[Colour, Colour]:
    """Sample a saturated ink, and a dark or light ground (even odds), with a contrast of CONTRAST or more."""
    lightness = rng.choice([(0.06, 0.25), (0.78, 0.95)])
    while True:
        ink = random_colour(rng, lightness=(0.2, 0.8), saturation=(0.7, 1))
        ground = random_colour(rng, lightness, saturation=(0.2, 0.8))
        if contrast(ink, ground) >= CONTRAST:
            return ink, ground


def random_colour(rng: random.Random, lightness: tuple[float, float], saturation: tuple[float, float]) -> Colour:
    """Sample a colour, uniform in hue, lightness and saturation (HLS)."""
    red, green, blue = colorsys.hls_to_rgb(rng.random(), rng.uniform(*lightness), rng.uniform(*saturation))
    return round(255 * red), round(255 * green), round(255 * blue)


def contrast(first: Colour, second: Colour) -> float:
    """Compute the contrast ratio of two colours, 1..21 (WCAG 2.1)."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: Colour) -> float:
    """Compute the relative luminance of an sRGB colour, 0..1 (WCAG 2.1)."""
    parts = [value / 255 for value in colour]
    red, green, blue = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
