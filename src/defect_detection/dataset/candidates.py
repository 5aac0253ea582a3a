"""Finds pairs of images that probably come from one photograph, to be aligned.

They share hashes of keypoints which few other images have (Charikar, Similarity estimation
techniques from rounding algorithms, STOC 2002).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from scipy import sparse

from defect_detection.dataset.alignment import mirrored_descriptors, root

HASHES = 16  # of a keypoint
BITS = 16  # of a hash
COMMONEST = 64  # images with the same hash: more say nothing about a photograph, and cost time
PARTNERS = 64  # likely ones that are kept for an image
PROPOSALS = 3  # pairs that a group asks for in a round
BLOCK = 1024  # images at a time

Pair = tuple[int, int]


class Described(Protocol):
    """Returns hashes and descriptors of images by their digests."""

    def hashes(self, digests: Sequence[str]) -> Iterator[np.ndarray]:
        """Return the hashes of each image's keypoints, uint16 (n, HASHES)."""

    def descriptors(self, digests: Sequence[str]) -> Iterator[np.ndarray]:
        """Return the descriptors of each image, uint8 (n, 128)."""


def hash_descriptors(descriptors: np.ndarray) -> np.ndarray:
    """Hash keypoints so that similar ones often agree; return uint16 (n, HASHES).

    Each bit is the side of a random plane that a descriptor lies on.
    """
    sides = (root(descriptors) - np.float32(0.07)) @ _planes() > 0  # 0.07: about their mean
    return np.packbits(sides.reshape(-1, BITS), axis=1).view(np.uint16).reshape(-1, HASHES)


@lru_cache(maxsize=1)
def _planes() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(128, BITS * HASHES)).astype(np.float32)


class PairSearch:
    """Finds likely partners of new images among all images, plain or mirrored.

    Attributes:
        images: (m,) places of the new images.
        partners: (m, k) places of the likeliest partners of each, the likeliest first.
        similarity: (m, k) weight of the hashes that the two share; 0 = none.
    """

    def __init__(self, known: Described, digests: Sequence[str], new: Sequence[str]):
        everything = _counts(known.hashes(digests))
        frequency = everything.getnnz(axis=0)
        told = np.flatnonzero((frequency > 1) & (frequency <= COMMONEST))
        # Rare hashes weigh more: squared inverse document frequency.
        weight = np.log(1 + len(digests) / frequency[told]) ** 2
        everything = _normed(everything[:, told], weight)
        by_hash = everything.T.tocsr()
        place = {digest: i for i, digest in enumerate(digests)}
        self.images = np.array([place[digest] for digest in new])
        kept = min(PARTNERS, len(digests))
        self.partners = np.empty((len(new), kept), int)
        self.similarity = np.empty((len(new), kept), np.float32)
        for start in range(0, len(new), BLOCK):
            rows = slice(start, start + BLOCK)
            mirrored = _counts(
                hash_descriptors(mirrored_descriptors(one)) for one in known.descriptors(new[rows])
            )
            shared = np.maximum(
                (everything[self.images[rows]].multiply(weight) @ by_hash).toarray(),
                (_normed(mirrored[:, told], weight).multiply(weight) @ by_hash).toarray(),
            )
            best = np.argpartition(-shared, kept - 1, axis=1)[:, :kept]
            order = np.argsort(-np.take_along_axis(shared, best, 1), axis=1, kind="stable")
            self.partners[rows] = np.take_along_axis(best, order, 1)
            self.similarity[rows] = np.take_along_axis(shared, self.partners[rows], 1)

    def propose(self, groups: np.ndarray, tested: set[Pair]) -> list[Pair]:
        """Return the likeliest pairs to compare next, the likeliest first.

        Each new image proposes its likeliest partner that is neither in its group nor tested
        with it; of the proposals of a group the best few are taken.
        """
        images = np.broadcast_to(self.images[:, None], self.partners.shape)
        low, high = np.minimum(images, self.partners), np.maximum(images, self.partners)
        numbered = np.array([a * len(groups) + b for a, b in tested], int)
        untested = (groups[images] != groups[self.partners]) & (self.similarity > 0)
        untested &= ~np.isin(low * len(groups) + high, numbered)
        rows = np.flatnonzero(untested.any(1))
        first = untested[rows].argmax(1)
        proposals: Counter[int] = Counter()
        pairs: dict[Pair, None] = {}  # a set in order
        for k in np.argsort(-self.similarity[rows, first], kind="stable").tolist():
            group = groups[self.images[rows[k]]]
            if proposals[group] < PROPOSALS:
                proposals[group] += 1
                pairs[int(low[rows[k], first[k]]), int(high[rows[k], first[k]])] = None
        return list(pairs)


def _counts(hashes: Iterable[np.ndarray]) -> sparse.csr_matrix:
    """Return which hashes each image has, (images, HASHES * 2**BITS)."""
    columns = [np.unique(one + (np.arange(HASHES) << BITS)) for one in hashes]
    starts = np.cumsum([0, *map(len, columns)])
    columns = np.concatenate(columns)
    shape = (len(starts) - 1, HASHES << BITS)
    return sparse.csr_matrix((np.ones(len(columns), np.float32), columns, starts), shape=shape)


def _normed(counts: sparse.csr_matrix, weight: np.ndarray) -> sparse.csr_matrix:
    """Scale the rows so that an image's similarity to itself is 1."""
    lengths = np.sqrt(counts @ weight)
    return sparse.diags(1 / np.maximum(lengths, 1e-9)).dot(counts).tocsr()
