"""Films: frames are finished one by one as files, and encoded when all are there.

What is being made of `out/walk.mp4` lies in the directory `out/walk.mp4.part`, as in writers.py:

    job.json     what the film is made of; work goes on only with an equal job
    000000.png   the first frame, and so on; lossless
    encoding/    the final file while it is written
"""

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.console import UserError, progress
from dnnlib.files import atomic_write
from rendering.writers import check, interrupted, part, publish, start, writing

SIDE = 16384  # libx264 takes no more
CRF = 18  # constant quality: 18 is hard to tell from the source, 23 is libx264's default, -6 doubles the file
THREADS = 4  # the bytes of H.264 depend on the number of threads, so it does not follow the machine


def av():
    """The module av (PyAV). Raises UserError when it is missing."""
    try:
        import av
        import av.video.reformatter
    except (ImportError, OSError) as error:
        raise UserError(f"writing films needs PyAV ({error}); install it with: pip install av") from error
    return av


class Film:
    """The frames of an unfinished film, and which of them are done.

    One process creates it; others open it after that. Each writes frames that no other writes; then one finishes it.
    """

    @classmethod
    def create(
        cls, path: Path, *, size: tuple[int, int], channels: int, frames: int, fps: float, job: dict, resume: bool
    ) -> "Film":
        """A film for the MP4 file `path`, of `frames` pictures of size = (height, width), `fps` of them per second.

        job: plain JSON values, everything that the frames depend on.
        resume: go on with `<path>.part` if there is one; otherwise it is removed.
        Raises UserError when H.264 cannot hold the film, or the part is of another job, broken or cannot be written.
        """
        path = Path(path)
        check_film(size, channels, fps)
        folder = start(path, job, resume)
        shutil.rmtree(folder / "encoding", ignore_errors=True)
        return cls(path, size=size, channels=channels, frames=frames, fps=fps, job=job)

    def __init__(self, path: Path, *, size: tuple[int, int], channels: int, frames: int, fps: float, job: dict):
        """Opens the film that another process created, with the same arguments. Raises UserError as `create`."""
        self.path, self.size, self.channels, self.frames, self.fps = Path(path), size, channels, frames, fps
        self.folder = part(self.path)
        check(self.path, job)

    @property
    def missing(self) -> list[int]:
        """The frames that are still to be written."""
        return [index for index in range(self.frames) if not self.frame(index).exists()]

    def frame(self, index: int) -> Path:
        """The file of a finished frame."""
        return self.folder / f"{index:06d}.png"

    def write(self, index: int, pixels: np.ndarray) -> None:
        """Finishes frame `index`. pixels uint8 [H,W,C]. Any thread may call. Raises UserError when the disk is full."""
        shape = (*self.size, self.channels)
        if pixels.shape != shape or pixels.dtype != np.uint8 or not 0 <= index < self.frames:
            raise ValueError(f"frame {index} of {self.frames} needs uint8 {shape}, got {pixels.dtype} {pixels.shape}")
        picture = Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)
        with writing(self.path), atomic_write(self.frame(index)) as temporary:
            picture.save(temporary, compress_level=1)

    def finish(self) -> None:
        """Encodes the film, gives it its name and removes the unfinished state.

        H.264 with 4:2:0 colour in BT.709, the index at the front so that it plays while it loads.
        Raises UserError when it cannot be written: all frames are kept then, and the former file of this name too.
        """
        missing = self.missing
        if missing:
            raise ValueError(f"{self.path}: {len(missing)} frames are not written, the first is {missing[0]}")
        encoded = self.folder / "encoding" / "film.mp4"
        with writing(self.path):
            encoded.parent.mkdir(exist_ok=True)
        try:
            self._encode(encoded)
        except av().FFmpegError as error:
            raise interrupted(self.path, error.strerror or str(error)) from error
        publish(encoded, self.path)

    def _encode(self, target: Path) -> None:
        pyav = av()
        matrix = pyav.video.reformatter.Colorspace.ITU709
        limited = pyav.video.reformatter.ColorRange.MPEG
        with pyav.open(str(target), "w", options={"movflags": "+faststart"}) as file:
            stream = file.add_stream("libx264", rate=rate(self.fps), options={"crf": str(CRF), "preset": "medium"})
            stream.height, stream.width = self.size
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.thread_count = THREADS
            context.color_range = limited
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709 in H.264's tables
            for index in progress(range(self.frames), desc=f"encoding {self.path.name}", unit="frame"):
                with writing(self.path):
                    pixels = np.asarray(Image.open(self.frame(index)).convert("RGB"))
                frame = pyav.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=limited)
                frame.pts = index
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))


def check_film(size: tuple[int, int], channels: int, fps: float) -> None:
    """Raises UserError when pictures of size = (height, width) cannot be an H.264 film."""
    height, width = size
    if channels not in (1, 3):
        raise UserError(f"a film has 1 channel (grey) or 3 (RGB) and no alpha; this one would have {channels}")
    if height % 2 or width % 2:
        even = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
        raise UserError(f"a film needs even sides, and {width}x{height} has an odd one; choose {even}")
    if max(size) > SIDE:
        raise UserError(f"a film of {width}x{height} pixels cannot be written; H.264 ends at {SIDE} per side")
    if not 0 < fps < 1000:
        raise UserError(f"{fps} frames per second cannot be played; choose for example 30")
    av()


def rate(fps: float) -> Fraction:
    """Frames per second as the fraction that players know: 29.97 is 2997/100."""
    return Fraction(fps).limit_denominator(1001)
