"""A few bytes of each image that identify equal and nearly equal images."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from visionmtl.structures import as_rgb

THUMB_PX = 16
# 1111 photographs of NYUv2, COCO and Cityscapes, saved anew as JPEG of quality 20, at 0.37 times the size, or 8 levels
# brighter, stay below both limits in at least 99.3 %; different photographs are at least 7 bits, or 13 levels, apart
MAX_BITS = 4  # of 64 that may differ
MAX_DIFFERENCE = 4.0  # grey levels, mean over the thumbnail, whatever its brightness
MIN_CONTRAST = 4.0  # grey levels, standard deviation: flatter images all look alike at this size
_BANDS = MAX_BITS + 1  # with at most MAX_BITS that differ, one band is equal
_BAND_BITS = -(-64 // _BANDS)
_ONES = np.unpackbits(np.arange(2**16, dtype=np.uint16)[:, None].view(np.uint8), axis=1).sum(axis=1, dtype=np.uint8)


class Fingerprint(NamedTuple):
    """Of one image."""

    digest: bytes  # of the pixels and the size
    bits: int  # 64: brighter than the right neighbour, on 8x9 px
    thumb: bytes  # THUMB_PX x THUMB_PX, grey


def fingerprint(image: NDArray[np.uint8]) -> Fingerprint:
    """image: [H, W, C]; what is nearly the same is judged by what `as_rgb` shows."""
    content = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, salt=str(image.shape[:2]).encode()[:16])
    grey = cv2.cvtColor(as_rgb(image), cv2.COLOR_RGB2GRAY)
    coarse = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA)
    bits = int.from_bytes(np.packbits(coarse[:, :-1] > coarse[:, 1:]).tobytes(), "big")
    thumb = cv2.resize(grey, (THUMB_PX, THUMB_PX), interpolation=cv2.INTER_AREA)
    return Fingerprint(content.digest(), bits, thumb.tobytes())


def same_images(digests: Sequence[bytes]) -> list[list[int]]:
    """Positions of equal images, for each image that occurs more than once."""
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, digest in enumerate(digests):
        places[digest].append(place)
    return [group for group in places.values() if len(group) > 1]


def near_images(fingerprints: Sequence[Fingerprint]) -> Iterator[tuple[int, int, float]]:
    """Positions (earlier, later) of images that look alike but are not equal, and how many grey levels they differ.

    Alike: the same picture scaled or compressed anew; not mirrored, cropped or turned. Each image is compared with the
    first of those alike before it, so that a thousand frames of a resting camera are a thousand pairs, no more.
    """
    thumbs = np.frombuffer(b"".join(image.thumb for image in fingerprints), np.uint8).reshape(-1, THUMB_PX**2)
    levels = thumbs - thumbs.mean(axis=1, keepdims=True, dtype=np.float32)
    bits = np.array([image.bits for image in fingerprints], np.uint64)
    bands = [_Band(bits >> np.uint64(_BAND_BITS * band) & np.uint64(2**_BAND_BITS - 1)) for band in range(_BANDS)]
    is_first, seen = np.zeros(len(fingerprints), bool), set[bytes]()
    contrasts = thumbs.std(axis=1)
    for place, image in enumerate(fingerprints):
        if image.digest in seen or contrasts[place] < MIN_CONTRAST:
            continue
        seen.add(image.digest)
        others = np.concatenate([band.before(place) for band in bands])
        others = others[is_first[others]]
        others = np.unique(others[_count_ones(bits[others] ^ bits[place]) <= MAX_BITS])
        differences = abs(levels[others] - levels[place]).mean(axis=1)
        best = int(np.argmin(differences)) if len(others) else 0
        if len(others) and differences[best] <= MAX_DIFFERENCE:
            yield int(others[best]), place, float(differences[best])
        else:
            is_first[place] = True


class _Band:
    """Positions by some of their bits: by five bands, 118,287 images are compared in half a minute."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._start = np.searchsorted(keys[self._order], keys)
        self._end = np.empty_like(self._order)
        self._end[self._order] = np.arange(len(keys))

    def before(self, place: int) -> NDArray[np.int64]:
        """Earlier positions with the same key."""
        return self._order[self._start[place] : self._end[place]]


def _count_ones(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    return _ONES[values.view(np.uint16)].reshape(-1, 4).sum(axis=1, dtype=np.int64)
