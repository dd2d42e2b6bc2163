"""Video files and cameras as RGB frames, and frames as a video file."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.io.paths import regular_file

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
WRITTEN = (".mp4", ".mkv", ".mov", ".avi", ".m4v")
"""Those that hold MPEG-4 part 2."""

_MIN_RATE, _MAX_RATE = 0.01, 1000
"""Frames a second that MPEG-4 holds."""


def is_video(source: str) -> bool:
    """Whether `source` names a video file by its suffix, or a camera as camera:0."""
    return source.startswith("camera:") or Path(source).suffix.lower() in SUFFIXES


def read_frames(source: str) -> tuple[float, Iterator[NDArray[np.uint8]]]:
    """Frames a second, and the frames, uint8 [H, W, 3] RGB, until it ends.

    25 where the source says none, or such as MPEG-4 does not hold.
    """
    camera = source.removeprefix("camera:") if source.startswith("camera:") else None
    if camera is not None and not camera.isdecimal():
        raise ValueError(f"{source!r} names no camera; camera:0 is the first, camera:1 the second; correct the number")
    if camera is None and Path(source).exists():  # else an address, or nothing
        regular_file(source)
    capture = cv2.VideoCapture(_unmistakable(source) if camera is None else int(camera))
    if not capture.isOpened():
        raise ValueError(
            f"{source} cannot be opened as a video; a {'/'.join(s[1:] for s in SUFFIXES)} file or a camera that is "
            "plugged in is needed; check the path, or convert it with ffmpeg"
        )
    told = capture.get(cv2.CAP_PROP_FPS)
    return told if _MIN_RATE <= told <= _MAX_RATE else 25.0, _frames(capture)


def count_frames(source: str) -> int | None:
    """How many frames a video file says it has; None for cameras and files that do not say."""
    if source.startswith("camera:"):
        return None
    capture = cv2.VideoCapture(_unmistakable(source))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return count if count > 0 else None


def cut_short(source: str, num_read: int, total: int | None) -> str | None:
    """What is to be told of a video of which so many frames could be read; None: it is whole.

    total: as `count_frames` gives it
    """
    if not total or num_read >= 0.98 * total - 1:  # some files count a frame too many
        return None
    return (
        f"{source} says it has {total} frames, and {num_read} can be read; a whole file is needed; fetch it again, or "
        "convert it with ffmpeg"
    )


def whole_frames(source: str) -> Iterator[NDArray[np.uint8]]:
    """The frames of a video or camera, as `read_frames` gives them; a ValueError after the last of one cut short."""
    _, frames = read_frames(source)

    def checked() -> Iterator[NDArray[np.uint8]]:
        num_read = 0
        for frame in frames:
            yield frame
            num_read += 1
        if told := cut_short(source, num_read, count_frames(source)):
            raise ValueError(told)

    return checked()


def _unmistakable(source: str) -> str:
    """A file's absolute path: "x:y.mp4" alone would be the address of a stream."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def _frames(capture: cv2.VideoCapture) -> Iterator[NDArray[np.uint8]]:
    try:
        while True:
            is_read, frame = capture.read()
            if not is_read:
                return
            yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
    finally:
        capture.release()


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], frames_per_s: float) -> int:
    """Write an .mp4 (MPEG-4 part 2) and return the number of frames; without frames no file.

    All get the size of the first, made even: later ones are cut, or padded with white at the bottom right.
    frames_per_s: 0.01 to 1000. Raises ValueError for others, and where the file that was written cannot be read again,
    as on a full disk; it is removed then.
    """
    if path.suffix.lower() not in WRITTEN:
        raise ValueError(f"{path} is to be a video; {' '.join(WRITTEN)} can be written; choose such an ending")
    if not _MIN_RATE <= frames_per_s <= _MAX_RATE:
        raise ValueError(
            f"{path} is to have {frames_per_s:g} frames a second; MPEG-4 holds 0.01 to 1000; choose such a rate"
        )
    writer: cv2.VideoWriter | None = None
    count = 0
    try:
        for frame in frames:
            if writer is None:
                height, width = (side - side % 2 for side in frame.shape[:2])
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = cv2.VideoWriter(
                    str(path.absolute()), cv2.VideoWriter.fourcc(*"mp4v"), frames_per_s, (width, height)
                )
                if not writer.isOpened():
                    raise ValueError(
                        f"{path} cannot be written as a video; a writable folder is needed; choose another"
                    )
            sheet = np.full((height, width, 3), 255, np.uint8)
            part = frame[:height, :width]
            sheet[: part.shape[0], : part.shape[1]] = part
            writer.write(cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
            count += 1
    finally:  # also of a camera that is stopped: what was recorded stays
        if writer is not None:
            writer.release()
    # neither `write` nor `release` tells of a full disk
    if writer is not None and (num_read := count_frames(str(path))) != count:
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path} holds {num_read or 0} of {count} frames and is removed; room for the whole file is needed; make "
            "room, or choose another disk"
        )
    return count
