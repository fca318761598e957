"""Videos: every frame is kept as a lossless file, `000000.png` and so on, in the directory of unfinished.py."""

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.console import UserError, progress
from dnnlib.files import atomic_write
from rendering.unfinished import Unfinished

SIDE = 16384  # the limit of libx264
CODEC = "libx264"
CRF = 18  # constant quality: 18 is hard to tell from the source, 23 is libx264's default, -6 doubles the file
THREADS = 4  # fixed, because the bytes of H.264 depend on the number of threads


def import_av():
    """Import PyAV. Raises UserError if it, or its encoder of H.264, is missing."""
    try:
        import av
        import av.video.reformatter

        av.codec.Codec(CODEC, "w")
    except (ImportError, OSError, ValueError) as error:  # the last: it was built without this codec
        raise UserError(f"writing videos needs PyAV with {CODEC} ({error}); run: pip install av") from error
    return av


class Film(Unfinished):
    """An MP4 file to be filled by frames."""

    def __init__(self, path: Path, job: dict, *, size: tuple[int, int], channels: int, frames: int, fps: float):
        """Describe a video of size = (height, width) and `fps` frames per second, touching nothing.

        job: plain JSON values, everything that the frames depend on. Raises UserError when H.264 cannot hold it.
        """
        super().__init__(path, job)
        self.size, self.channels, self.frames, self.fps = size, channels, frames, fps
        height, width = size
        if path.suffix != ".mp4":
            raise UserError(f"{path}: videos are MP4 files; choose a name that ends in .mp4")
        if channels not in (1, 3):
            raise UserError(f"a video has 1 channel (grey) or 3 (RGB) and no alpha; this one would have {channels}")
        if height % 2 or width % 2:
            even = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
            raise UserError(f"a video needs even sides, and {width}x{height} has an odd one; choose {even}")
        if max(size) > SIDE:
            raise UserError(
                f"a video of {width}x{height} pixels cannot be written; H.264 allows at most {SIDE} per side"
            )
        if not 0 < fps < 1000:
            raise UserError(f"{fps} frames per second cannot be played; choose for example 30")
        import_av()

    @property
    def missing(self) -> list[int]:
        """Return the numbers of the frames still to be written."""
        return [index for index in range(self.frames) if not self.frame(index).exists()]

    def frame(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def write(self, index: int, pixels: np.ndarray) -> None:
        """Finish frame `index` from uint8 [H,W,C]. Raises UserError when the disk is full."""
        shape = (*self.size, self.channels)
        if pixels.shape != shape or pixels.dtype != np.uint8 or not 0 <= index < self.frames:
            raise ValueError(f"frame {index} of {self.frames} needs uint8 {shape}, got {pixels.dtype} {pixels.shape}")
        image = Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)
        with self.writing(), atomic_write(self.frame(index)) as temporary:
            image.save(temporary, compress_level=1)

    def encode(self, folder: Path) -> Path:
        """Encode H.264 with 4:2:0 colour in BT.709, with the index at the front so that it plays while it loads."""
        target, av = folder / "film.mp4", import_av()
        matrix = av.video.reformatter.Colorspace.ITU709
        limited = av.video.reformatter.ColorRange.MPEG
        try:
            with av.open(str(target), "w", options={"movflags": "+faststart"}) as file:
                rate = Fraction(self.fps).limit_denominator(1001)  # 29.97 is 2997/100
                stream = file.add_stream(CODEC, rate=rate, options={"crf": str(CRF), "preset": "medium"})
                stream.height, stream.width = self.size
                stream.pix_fmt = "yuv420p"
                context = stream.codec_context
                context.thread_count = THREADS
                context.color_range = limited
                context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709 in H.264's tables
                for index in progress(range(self.frames), desc=f"encoding {self.path.name}", unit="frame"):
                    pixels = np.asarray(Image.open(self.frame(index)).convert("RGB"))
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=limited)
                    frame.pts = index
                    file.mux(stream.encode(frame))
                file.mux(stream.encode(None))
        except av.FFmpegError as error:
            raise self.interrupted(error.strerror or str(error)) from error
        return target
