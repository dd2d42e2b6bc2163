"""Files that cannot be read: tried again, named, and how many of them a training bears."""

import time
from collections.abc import Callable
from typing import TypeVar

import cv2
from pydantic import Field

from visionmtl.config.registry import Spec
from visionmtl.io.remote import StoreError

FIRST_PAUSE_S = 0.25
"""Before the second attempt; before each further one it is four times as long."""
READ_ERRORS = (ValueError, OSError, cv2.error)
"""What readers raise for files that are damaged or missing."""

Value = TypeVar("Value")


class BadFiles(Spec):
    """What happens when a file cannot be read."""

    limit: float = Field(0.001, ge=0, lt=1)
    """Share of a training data set's images that may be left out, each named in bad_files.jsonl; one more is an error.
    Of a data set of fewer than 1 / limit images that is none. In evaluation none ever is."""
    retries: int = Field(3, ge=0, le=10)
    """Further attempts where the disk gave an error, after 0.25, 1, 4, ... seconds; a damaged file gets one."""

    def allowed(self, num_images: int) -> int:
        """How many images of a data set of this many may be left out."""
        return int(self.limit * num_images + 1e-9)


class UnreadableSample(ValueError):
    """A sample that could not be read, with its file."""

    def __init__(self, text: str) -> None:
        # out of a worker, DataLoader hands on the text of the traceback in place of the error's
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


def read_persistently(read: Callable[[], Value], retries: int, place: Callable[[], str]) -> Value:
    """What `read` returns. place: names the sample, for messages.

    Raises StoreError where a server does not answer, and UnreadableSample when it fails each time: where the disk gives
    an error 1 + retries times, with pauses that grow; where the content is wrong twice, since a network disk may have
    given half of a file.
    """
    attempt = 0
    while True:
        try:
            return read()
        except StoreError:  # which was asked often enough; a server that is down makes no file bad
            raise
        except READ_ERRORS as error:
            if attempt >= (retries if _of_the_disk(error) else min(retries, 1)):
                raise UnreadableSample(with_place(str(error), place())) from error
        time.sleep(FIRST_PAUSE_S * 4**attempt)
        attempt += 1


def _of_the_disk(error: BaseException) -> bool:
    """Whether the system could not read a file; readers pass that on as the cause of a ValueError."""
    system_error = error if isinstance(error, OSError) else error.__cause__
    return isinstance(system_error, OSError) and system_error.errno is not None  # Pillow's errors have none


def with_place(text: str, place: str) -> str:
    """The text of an error, with its place where it names no file."""
    return text if "/" in text or "\\" in text else f"{place}: {text}"
