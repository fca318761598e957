"""Decode image files to upright 8-bit images in sRGB."""

import contextlib
import functools
import io
import sys
import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

ENDINGS = (
    "png", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "tga", "jp2",
)  # fmt: skip
# Only these decoders are tried on the bytes: a file named .png may hold PostScript, which Pillow would execute.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "JPEG2000")
if features.check("avif"):
    ENDINGS, FORMATS = (*ENDINGS, "avif"), (*FORMATS, "AVIF")
with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    ENDINGS, FORMATS = (*ENDINGS, "heic", "heif"), (*FORMATS, "HEIF")
# What it takes to read other endings.
HINTS = {
    "avif": "update Pillow",
    "heic": "pip install pillow-heif",
    "heif": "pip install pillow-heif",
    "svg": "dataset_tool.py draws them with --resolution",
}
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
Turn = Image.Transpose
TURNS = {  # of each EXIF orientation but 1
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}  # fmt: skip
SAME = 2  # levels of 255: a profile that moves no colour by more counts as sRGB
DEPTHS = (8, 10, 12, 14, 16)  # of the values in files of 16 bits
# Pillow warns above its limit and refuses twice that. 0.54 billion pixels are 1.6 GB in RGB.
Image.MAX_IMAGE_PIXELS = 2**29
# Bytes of text and profiles in a PNG; 1 MB by default, and programs that generate images add more.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # damaged EXIF data, once per file


def looks_like_image(data: bytes) -> bool:
    """Check the first bytes of a file."""
    bitmap = data.startswith(b"BM") and data[6:10] == bytes(4)
    return data.startswith(MAGIC) or data[4:8] == b"ftyp" or bitmap


def open_image(file: BinaryIO) -> Image.Image:
    """Read the header of an image file. Raises as Image.open, and ValueError when the file is empty."""
    if not file.read(1):
        raise ValueError("the file is empty")
    file.seek(0)
    return Image.open(file, formats=FORMATS)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the size that an opened image has once it is turned upright."""
    return image.size[::-1] if orientation(image) in (5, 6, 7, 8) else image.size


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation in the header, 1 to 8. 1, upright, for TIFFs: Pillow turns them itself."""
    # PngImageFile.getexif would decode the pixels first.
    return 1 if image.format == "TIFF" else Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)


def is_upright_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and orientation(image) == 1  # MPO: a JPEG with further images after it


def decode(data: bytes, bits: Callable[[], int], reduce: int = 1) -> Image.Image:
    """Decode an image file (of an animation the first frame), turned upright by its EXIF orientation.

    Values of 16-bit files are scaled to 8 bits; where a file does not say how many bits they have, they have bits().
    `reduce`, 2, 4 or 8, decodes an upright JPEG at this fraction of its size (sides are rounded up), which is faster.
    Raises ValueError for 32-bit pixels, which have no standard range, and as Pillow.
    """
    image = open_image(io.BytesIO(data))
    if reduce > 1 and is_upright_jpeg(image):
        image.draft(None, tuple(max(side // reduce, 1) for side in image.size))
    if not is_deep(image):
        return load(image)
    depth, values = known_depth(image) or bits(), deep_values(image, data)
    largest, most = values.max(), (1 << depth) - 1
    if largest > most:
        raise ValueError(f"it holds the value {largest}, and {depth} bits end at {most}; give bits={depth_of(largest)}")
    values = values.astype(np.uint32)
    values *= 255
    values += most // 2
    values //= most
    mode = "L" if values.ndim == 2 else image.mode
    result = Image.frombytes(mode, values.shape[1::-1], values.astype(np.uint8).tobytes())
    result.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return result


def load(image: Image.Image) -> Image.Image:
    """Decode an opened image and turn it upright."""
    image.load()
    turn = TURNS.get(orientation(image))  # exif_transpose would write the EXIF data again, and fail where it is damaged
    return image if turn is None else image.transpose(turn)


# --- 16 bits ----------------------------------------------------------------------------------------------------------


def is_deep(image: Image.Image) -> bool:
    """Check the header for more than 8 bits per value. Raises ValueError for values that are not read rightly."""
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no agreed range: save it with 8 or 16 bits")
    deep = image.mode.startswith("I") or ";16" in str(image.tile)
    if image.format == "TIFF" and not deep and max(image.tag_v2.get(258, (1,))) > 8:  # BitsPerSample
        raise ValueError("16-bit TIFFs with a plane for each colour are not read: save it with interleaved colours")
    return deep


def known_depth(image: Image.Image) -> int | None:
    """Return how many bits the values of a deep image have, if its header says so."""
    if image.format in ("PPM", "JPEG2000"):  # Pillow scales these to 16 bits
        return 16
    if "I;12" in str(image.tile):
        return 12
    largest = image.tag_v2.get(281) if image.format == "TIFF" else None  # MaxSampleValue
    return depth_of(max(largest) if isinstance(largest, tuple) else largest) if largest else None


def depth_of(largest: int) -> int:
    """Return the least of DEPTHS that holds `largest`."""
    return next((bits for bits in DEPTHS if largest < 1 << bits), DEPTHS[-1])


def deep_values(image: Image.Image, data: bytes) -> np.ndarray:
    """Return the values in a deep image's file `data`, upright: [H,W] or [H,W,C]. Raises ValueError for 32 bits."""
    if image.mode.startswith("I"):
        values = np.asarray(load(image))
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels have no agreed range: save it with 8 or 16 bits")
        return values
    # Pillow keeps the upper byte of each value. With the other byte order, it keeps the lower one.
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    swapped = open_image(io.BytesIO(data))
    for number, tile in enumerate(swapped.tile):
        is_text = isinstance(tile.args, str)
        mode, *more = [tile.args] if is_text else tile.args
        if not mode.startswith(("RGB;", "RGBA;", "RGBX;", "CMYK;")):  # no such byte order: as if the bytes were equal
            return np.asarray(load(image)) * np.uint16(257)
        mode = mode[:-1] + other[mode[-1]]
        swapped.tile[number] = tile._replace(args=mode if is_text else (mode, *more))
    return np.asarray(load(image)) * np.uint16(256) + np.asarray(load(swapped))


# --- profiles ---------------------------------------------------------------------------------------------------------


def profile_of(image: Image.Image) -> tuple[str | None, ImageCms.ImageCmsTransform | None]:
    """Return the name of an image's ICC profile and the transform from it to sRGB; (None, None) if it is sRGB.

    A profile that is damaged, or of another colour space than the image, gets a name that says so. Reads the header
    alone.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return None, None
    name, space, transform = transform_of(profile)
    own = "CMYK" if image.mode == "CMYK" else "GRAY" if is_grey(image) else "RGB"
    if space not in ([own, "RGB"] if own == "GRAY" else [own]):
        return "unusable profiles (ignored)", None
    return (name, transform) if transform else (None, None)


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an 8-bit image from its ICC profile, if it has one, to sRGB. Grey stays grey."""
    _, transform = profile_of(image)
    if transform is None:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    base = image.convert("RGBA").convert(transform.inputMode) if image.mode != "CMYK" else image
    result = ImageCms.applyTransform(base, transform)
    result = result.convert("L") if is_grey(image) else result
    if alpha:
        result.putalpha(alpha)
    return result


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


@functools.lru_cache(maxsize=64)
def transform_of(profile: bytes) -> tuple[str, str, ImageCms.ImageCmsTransform | None]:
    """Return a profile's name, its colour space, and the transform to sRGB, None where it changes nothing visible."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"GRAY": "L"}.get(space, space)
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        name = " ".join(ImageCms.getProfileDescription(source).split())
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError):
        return "", "", None
    if mode != "CMYK":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        before = Image.fromarray(colours if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        after = np.asarray(ImageCms.applyTransform(before, transform)).astype(int)
        if np.abs(after - np.asarray(before.convert("RGB"))).max() <= SAME:
            transform = None
    return name, space, transform


# --- channels ---------------------------------------------------------------------------------------------------------


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert an 8-bit image to grey (1), RGB (3) or RGBA (4).

    Without an alpha channel in the result, transparent parts are composited over white. RGB becomes grey by the luma of
    ITU-R 601.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(MODES[channels])


def count_channels(image: Image.Image) -> int:
    """Return 1 for grey, 4 with an alpha channel or a transparent colour, else 3. Reads the header alone."""
    if image.has_transparency_data:
        return 4
    return 1 if is_grey(image) or image.mode == "F" else 3
