"""Groups images by the photograph they come from, however rotated, flipped, zoomed or lit.

Only likely pairs (`candidates`) are compared (`alignment`); pairs that agree join. What was found
is kept (`photograph_cache`).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from defect_detection import progress
from defect_detection.dataset import photograph_cache, workers
from defect_detection.dataset.candidates import Pair, PairSearch
from defect_detection.dataset.photograph_cache import Damaged, PhotographCache
from defect_detection.dataset.workers import Map
from defect_detection.runtime.opening import MOST_PIXELS

log = logging.getLogger(__name__)

FRUITLESS_ROUNDS = 3  # without a join, after which the search ends
BLOCK = 64  # images, or pairs of images, at a time
DESCRIPTION = 1.0  # cost of finding an image's keypoints, where that of a comparison is 1
COMPARISONS = 8  # for each image, at most, so that the cost stays linear


def find(
    contents: Mapping[str, Path], cache: Path, most_pixels: int = MOST_PIXELS
) -> dict[str, int]:
    """Group images by the photograph they come from.

    Results are cached by content: a second call is fast, and only new images are searched for.

    Args:
        contents: a readable image for each content's SHA-256.
        cache: folder of what is known already.
        most_pixels: that the images may have.

    Returns:
        The number of its photograph for each content, from 0.

    Raises:
        PipelineError: the cache cannot be used, or an image was changed meanwhile.
    """
    try:
        return _find(contents, cache, most_pixels)
    except Damaged as error:
        log.warning("%s: the images are compared again", error)
        return _find(contents, cache, most_pixels)


def _find(contents: Mapping[str, Path], cache: Path, most_pixels: int) -> dict[str, int]:
    digests = sorted(contents)
    describe = partial(photograph_cache.describe_file, most_pixels)
    with photograph_cache.opened(cache) as known:
        new = known.lacking(digests)
        searched, at_least = known.searched(digests)
        unsearched = [digest for digest in digests if digest not in searched]
        if new:
            log.info("Comparing %d new images with %d", len(new), len(digests))
        started = time.perf_counter()
        costs = {"describe": DESCRIPTION * len(new), "compare": float(len(new))}
        with (
            progress.shown("Comparing images", costs) as shown,
            workers.started(len(unsearched)) as mapped,
        ):
            for start in range(0, len(new), BLOCK):
                block = new[start : start + BLOCK]
                files = [contents[one] for one in block]
                found = list(mapped(describe, block, files))
                known.keep_features(block, found)
                shown.reached("describe", min(1, (start + BLOCK) / len(new)))
            on_compared = partial(shown.counted, "compare")
            numbers = _group(digests, unsearched, at_least, known, mapped, on_compared)
        if new:
            seconds = time.perf_counter() - started
            log.info("%d photographs found in %.0f s", len(set(numbers)), seconds)
    return dict(zip(digests, numbers, strict=True))


def _group(
    digests: Sequence[str],
    new: Sequence[str],
    at_least: int,
    known: PhotographCache,
    mapped: Map,
    on_compared: Callable[[int, int], None],
) -> list[int]:
    """Compare likely pairs in rounds until no groups join any more; return numbers of groups.

    Args:
        digests: all images.
        new: those that are to be compared with all others.
        at_least: how many pairs are stored at least.
        known: stores keypoints and pairs.
        mapped: compares several pairs at once.
        on_compared: is called with the number of comparisons, and how many there will be if no
            more groups join.
    """
    place = {digest: i for i, digest in enumerate(digests)}
    joined, tested = _compared(place, known, at_least)

    def numbers() -> np.ndarray:
        # By the first image of each group, since its root depends on the order of the merges.
        first: dict[str, int] = {}
        return np.array([first.setdefault(joined[one], len(first)) for one in digests], int)

    if new and len(digests) > 1:
        search = PairSearch(known, digests, new)
        compared, most, fruitless = 0, COMPARISONS * len(new), 0
        while fruitless < FRUITLESS_ROUNDS and compared < most:
            joins = 0
            pairs = search.propose(numbers(), tested)
            expected = min(most, compared + (FRUITLESS_ROUNDS - fruitless) * len(pairs))
            for start in range(0, len(pairs), BLOCK):
                block = [(digests[i], digests[j]) for i, j in pairs[start : start + BLOCK]]
                # Skip pairs that have joined meanwhile.
                block = [pair for pair in block if not joined.connected(*pair)]
                tested.update((place[a], place[b]) for a, b in block)
                compared += len(block)
                on_compared(compared, max(expected, compared))
                for pair, same in zip(block, known.compare(block, mapped), strict=True):
                    joins += int(same and joined.merge(*pair))
            fruitless = 0 if joins else fruitless + 1
        known.keep_searched(digests)
    return numbers().tolist()


def _compared(
    place: Mapping[str, int], known: PhotographCache, at_least: int
) -> tuple[DisjointSet, set[Pair]]:
    """Return the groups of images, by their digests, and the pairs that were compared before."""
    joined, tested = DisjointSet(place), set()
    for a, b, same in known.pairs(at_least):  # also through images that were deleted
        if same:
            joined.add(a)
            joined.add(b)
            joined.merge(a, b)
        if a in place and b in place:
            tested.add((place[a], place[b]))
    return joined, tested
