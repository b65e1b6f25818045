"""Pictures that are the same, or nearly: by their bytes, and by 9 x 8 grey values.

The dHash of a picture (a bit for each of the 8 x 8 pairs of neighbours in a row: is the left one
brighter?) survives scaling, recompression and light; the grey values themselves tell flat pictures
apart, whose bits are all 0.
"""

from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 9, 8  # of the thumbnail
NEAR_BITS = 3  # of 64 in which near-duplicates may differ; four bands of 16 then share one
NEAR_GREY = 12.0  # mean difference of the grey values, of 255
MAX_BUCKET = 4000  # pictures that share a band and are compared each with each


def difference_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """(n,) of uint64 from (n, 8, 9) of uint8."""
    bits = thumbnails[:, :, :-1] > thumbnails[:, :, 1:]
    return np.packbits(bits.reshape(-1, 64), axis=1).view(">u8").astype(np.uint64).ravel()


def near_pairs(thumbnails: np.ndarray) -> np.ndarray:
    """(m, 2) indices i < j of the pictures that look the same, sorted.

    Args:
        thumbnails: (n, 8, 9) of uint8.
    """
    hashes = difference_hashes(thumbnails)
    pairs = [np.empty((0, 2), int)]
    for shift in range(0, 64, 16):
        bands = (hashes >> np.uint64(shift)) & np.uint64(0xFFFF)
        order = np.argsort(bands, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(bands[order])) + 1):
            pairs.append(_near_in(bucket, hashes, thumbnails))
    return np.unique(np.concatenate(pairs), axis=0)


def _near_in(bucket: np.ndarray, hashes: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """Those among pictures of one band; of a very large bucket, neighbours by hash alone."""
    bucket = bucket[np.argsort(hashes[bucket], kind="stable")]
    reach = len(bucket) if len(bucket) <= MAX_BUCKET else MAX_BUCKET // 100
    found = [np.empty((0, 2), int)]
    for step in range(1, min(reach, len(bucket))):
        left, right = bucket[:-step], bucket[step:]
        differ = (hashes[left] ^ hashes[right]).view(np.uint8).reshape(-1, 8)
        near = np.unpackbits(differ, axis=1).sum(axis=1) <= NEAR_BITS
        left, right = left[near], right[near]
        grey = thumbnails[left].astype(np.int16) - thumbnails[right]
        near = np.abs(grey).mean(axis=(1, 2)) <= NEAR_GREY
        found.append(np.sort(np.stack((left[near], right[near]), axis=1), axis=1))
    return np.concatenate(found)


def groups(digests: Sequence[bytes], thumbnails: np.ndarray) -> np.ndarray:
    """(n,) the lowest index among those that a picture is equal or near to, over any steps.

    Args:
        digests: of the files, one per picture.
        thumbnails: (n, 8, 9) of uint8.
    """
    parents = list(range(len(digests)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    first: dict[bytes, int] = {}
    equal = [(first.setdefault(digest, i), i) for i, digest in enumerate(digests)]
    for i, j in [*equal, *near_pairs(thumbnails).tolist()]:
        low, high = sorted((root(i), root(j)))
        parents[high] = low
    return np.array([root(i) for i in range(len(parents))], int)
