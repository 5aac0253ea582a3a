"""Finds pairs of images that probably come from one photograph, to be aligned.

They share hashes of keypoints which few other images have (Charikar, Similarity estimation
techniques from rounding algorithms, STOC 2002).
"""

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Protocol

import numpy as np
from scipy import sparse

from defect_detection.dataset.alignment import mirrored_descriptors, root

HASHES = 16  # of a keypoint
BITS = 16  # of a hash
COMMONEST = 64  # images with the same hash: more say nothing about a photograph, and cost time
PARTNERS = 64  # likely ones that are kept for an image
PROPOSALS = 3  # pairs that a group asks for in a round
BLOCK = 256  # images at a time
ENOUGH = 8192  # images up to which the bits of a hash are enough; twice as many need two more

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
        index = _Index(known.hashes(digests), len(digests))
        place = {digest: i for i, digest in enumerate(digests)}
        self.images = np.array([place[digest] for digest in new], np.int32)
        kept = min(PARTNERS, len(digests))
        self.partners = np.repeat(self.images[:, np.newaxis], kept, axis=1)
        self.similarity = np.zeros((len(new), kept), np.float32)
        for start in range(0, len(new), BLOCK):
            block = new[start : start + BLOCK]
            mirrored = map(hash_descriptors, map(mirrored_descriptors, known.descriptors(block)))
            shared = index.shared(known.hashes(block)).maximum(index.shared(mirrored))
            shared.sort_indices()
            for row, (low, high) in enumerate(pairwise(shared.indptr), start):
                weights, others = shared.data[low:high], shared.indices[low:high]
                if len(weights) > kept:
                    best = np.argpartition(-weights, kept - 1)[:kept]
                    weights, others = weights[best], others[best]
                order = np.lexsort((others, -weights))
                self.partners[row, : len(order)] = others[order]
                self.similarity[row, : len(order)] = weights[order]

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


class _Index:
    """Which images have a hash, for the hashes that two images have, and not too many."""

    def __init__(self, hashes: Iterable[np.ndarray], images: int):
        """Index the hashes of each of some images."""
        # With more bits, a hash has few images however many there are.
        self._more = min(BITS, 2 * max(0, math.ceil(math.log2(images / ENOUGH))))
        with tempfile.TemporaryFile() as file:  # 5 kB for each image, of which a table is a part
            counts = []
            for one in hashes:
                one.tofile(file)
                counts.append(len(one))
            file.flush()
            kept = np.memmap(file, np.uint16, "r") if sum(counts) else np.empty(0, np.uint16)
            of = np.repeat(np.arange(images, dtype=np.uint64), counts)
            tables = [self._table(one, of) for one in self._values(kept.reshape(-1, HASHES))]
        self._told = [told for told, _, _ in tables]
        ends = np.cumsum([0, *chain.from_iterable(frequency for _, frequency, _ in tables)])
        self._starts = np.cumsum([0, *map(len, self._told)])
        owners = np.concatenate([one for _, _, one in tables])
        del tables
        frequency = np.diff(ends)
        # Rare hashes weigh more: squared inverse document frequency.
        self._weight = (np.log(1 + images / frequency) ** 2).astype(np.float32)
        every = np.ones(len(owners), np.float32)
        self._by_hash = sparse.csr_matrix((every, owners, ends), shape=(len(frequency), images))
        self._lengths = _length(self._by_hash.T @ self._weight)

    def shared(self, hashes: Iterable[np.ndarray]) -> sparse.csr_matrix:
        """Return the similarity of other images, by their hashes, to those of the index.

        That of an image to itself is 1.
        """
        counts, every = [], []
        for one in hashes:
            counts.append(len(one))
            every.append(one)
        of = np.repeat(np.arange(len(counts)), counts)
        rows, columns = [], []
        for number, values in enumerate(self._values(np.concatenate(every))):
            told = self._told[number]
            if len(told):
                at = np.minimum(np.searchsorted(told, values), len(told) - 1)
                has = told[at] == values
                rows.append(of[has])
                columns.append(self._starts[number] + at[has])
        if not rows:
            return sparse.csr_matrix((len(counts), len(self._lengths)), dtype=np.float32)
        keys = np.concatenate(rows) * len(self._weight) + np.concatenate(columns)
        row, column = np.divmod(np.unique(keys), len(self._weight))
        shape = len(counts), len(self._weight)
        having = sparse.csr_matrix((self._weight[column], (row, column)), shape=shape)
        found = having @ self._by_hash
        lengths = _length(having.sum(axis=1).A1)
        found.data /= np.repeat(lengths, np.diff(found.indptr)) * self._lengths[found.indices]
        return found

    def _values(self, hashes: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the values of each table, uint32 (n,), of hashes uint16 (n, HASHES).

        The bits beyond those of a hash are the first ones of the next, as independent.
        """
        for number in range(HASHES):
            first = np.asarray(hashes[:, number], np.uint32)
            more = np.asarray(hashes[:, (number + 1) % HASHES], np.uint32)
            yield first << self._more | more >> (BITS - self._more)

    @staticmethod
    def _table(values: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the values that are told, how many images have each, and these images."""
        keys = np.unique(values.astype(np.uint64) << np.uint64(32) | of)
        told, frequency = np.unique((keys >> np.uint64(32)).astype(np.uint32), return_counts=True)
        chosen = (frequency > 1) & (frequency <= COMMONEST)
        owners = (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)
        return told[chosen], frequency[chosen], owners[np.repeat(chosen, frequency)]


def _length(squares: np.ndarray) -> np.ndarray:
    return np.maximum(np.sqrt(squares), np.float32(1e-9))
