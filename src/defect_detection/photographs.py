"""Which pictures were made from one photograph: by rotation, flips, zoom, shift, light or JPEG.

Parts of one design look alike, so that matching keypoints prove nothing. Two pictures are aligned
by their SIFT keypoints [1] and the enhanced correlation coefficient [2], then compared in what no
two photographs share: the grain of the surface and every small spot. Only likely pairs are
compared: those that share hashes [3] of keypoints which few others have. Pairs that agree join.

[1] Lowe, Distinctive image features from scale-invariant keypoints, IJCV 60, 2004.
[2] Evangelidis and Psarakis, Parametric image alignment using enhanced correlation coefficient
    maximization, PAMI 30, 2008.
[3] Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002.
"""

import logging
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from scipy import sparse
from scipy.cluster.hierarchy import DisjointSet
from threadpoolctl import threadpool_limits

from defect_detection import PipelineError, images

log = logging.getLogger(__name__)

METHOD = "photographs-1"  # names the cache: change it whenever another answer is possible

SIDE = 192  # pixels of the longer side of the pictures that are compared
KEYPOINTS = 150  # of a picture, the strongest
FIT = 2.5  # pixels between a keypoint and where the alignment puts it
ALIGNMENTS = 3  # tried for a pair: a symmetrical part fits in several ways

# What two pictures of one photograph have, all of it.
LEAST_OVERLAP = 0.6  # of the smaller one's area
LEAST_KEYPOINTS = 0.2
LEAST_DETAIL = 0.82
# The more keypoints agree, the larger a spot is forgiven: pixels for the share 1.
LARGEST_SPOT = 15
WHITE = 252  # grey levels from which a picture is overexposed

HASHES = 16  # of a keypoint
BITS = 16  # of a hash
COMMONEST = 64  # pictures with the same hash: more say nothing about a photograph, and cost
PARTNERS = 64  # likely ones that are kept for a picture
SEARCHES = 3  # pairs that a group asks for in a round; also rounds without success at the end
COMPARISONS = 8  # a picture, at most, so that the cost stays linear
BLOCK = 1024  # pictures at a time

cv2.setNumThreads(1)  # several pictures at a time instead

Pair = tuple[int, int]


@dataclass(frozen=True)
class Features:
    """What pictures are compared by.

    Attributes:
        pixels: uint8 (height, width), the longer one SIDE.
        points: float32 (n, 4): x, y, diameter in pixels, orientation in radians.
        descriptors: uint8 (n, 128), SIFT's.
    """

    pixels: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray


@dataclass(frozen=True)
class Likeness:
    """How two aligned pictures agree.

    Attributes:
        keypoints: share of the keypoints in the overlap that lie on one of the other picture.
        detail: correlation of the fine detail, strong edges clipped, at most 1.
        spot: pixels of the largest spot that only one of them shows.
    """

    keypoints: float = 0
    detail: float = 0
    spot: float = np.inf

    @property
    def same_photograph(self) -> bool:
        """Whether all of it speaks for one photograph."""
        return (
            self.keypoints >= LEAST_KEYPOINTS
            and self.detail >= LEAST_DETAIL
            and self.spot <= LARGEST_SPOT * self.keypoints
        )


def find(contents: Mapping[str, Path], cache: Path) -> dict[str, int]:
    """Group pictures by the photograph they were made from.

    What was found is kept by content: a second call is quick, a new picture costs one picture.

    Args:
        contents: a readable picture for each content's SHA-256.
        cache: folder of what is known already.

    Returns:
        The number of its photograph for each content, from 0.

    Raises:
        PipelineError: the cache cannot be used.
    """
    digests = sorted(contents)
    with _known(cache) as known:
        new = known.lacking(digests)
        if new:
            log.info("Comparing %d new pictures with %d", len(new), len(digests))
        started = time.perf_counter()
        for start in range(0, len(new), BLOCK):
            block = new[start : start + BLOCK]
            known.keep_features(block, _parallel(_describe_file, map(contents.get, block)))
        numbers = _group(digests, known)
        if new:
            seconds = time.perf_counter() - started
            log.info("%d photographs found in %.0f s", len(set(numbers)), seconds)
    return dict(zip(digests, numbers, strict=True))


def describe(pixels: np.ndarray) -> Features:
    """Find the strongest keypoints of a grey picture, uint8 (height, width)."""
    finder = cv2.SIFT_create(KEYPOINTS, contrastThreshold=0.01)
    found, descriptors = finder.detectAndCompute(pixels, None)
    strongest = np.argsort([-point.response for point in found], kind="stable")[:KEYPOINTS]
    points = [(*found[i].pt, found[i].size, np.deg2rad(found[i].angle)) for i in strongest]
    if not points:
        descriptors = np.zeros((0, 128))
    return Features(
        pixels,
        np.array(points, np.float32).reshape(-1, 4),
        descriptors[strongest].astype(np.uint8),
    )


def compare(a: Features, b: Features) -> Likeness:
    """Align two pictures, `a` as it is and mirrored, and compare them in the best alignment."""
    mirrored = _mirrored(a)
    found = [(*one, side) for side in (a, mirrored) for one in _alignments(side, b)]
    found.sort(key=lambda one: -one[0])
    best = Likeness()
    for agreeing, share, transform, side in found[:ALIGNMENTS]:
        if share >= LEAST_KEYPOINTS and agreeing >= 0.6 * found[0][0]:
            likeness = _likeness(side.pixels, b.pixels, transform, share)
            if likeness.same_photograph:
                return likeness
            best = max(best, likeness, key=lambda one: one.detail)
    return best


# --- Alignment -----------------------------------------------------------------------------------


def _mirrored(features: Features) -> Features:
    """Return the features of the picture mirrored left to right."""
    points = features.points.copy()
    points[:, 0] = features.pixels.shape[1] - 1 - points[:, 0]
    points[:, 3] = np.pi - points[:, 3]
    pixels = np.ascontiguousarray(features.pixels[:, ::-1])
    return Features(pixels, points, _mirrored_descriptors(features.descriptors))


def _mirrored_descriptors(descriptors: np.ndarray) -> np.ndarray:
    histograms = descriptors.reshape(-1, 4, 4, 8)  # rows, columns, orientations
    return histograms[:, ::-1][..., -np.arange(8) % 8].reshape(-1, 128)


def _root(descriptors: np.ndarray) -> np.ndarray:
    """Make unit vectors whose products compare the histograms by Hellinger's kernel (RootSIFT)."""
    shares = descriptors.astype(np.float32)
    return np.sqrt(shares / (shares.sum(1, keepdims=True) + 1e-6))


def _alignments(a: Features, b: Features) -> list[tuple[int, float, np.ndarray]]:
    """Find the likeliest affine maps from `a` to `b`.

    A keypoint has place, size and orientation, so that each match gives a map by itself; those
    that most other matches agree with are refined.

    Returns:
        For each: how many keypoints agree, their share of those in the overlap, matrix (2, 3).
    """
    if min(len(a.points), len(b.points)) < 4:
        return []
    likeness = _root(a.descriptors) @ _root(b.descriptors).T
    i = np.repeat(np.arange(len(a.points)), 2)
    j = np.argpartition(-likeness, 1, axis=1)[:, :2].ravel()  # the two most alike
    alike = likeness[i, j]
    i, j, alike = (one[alike > 0.75] for one in (i, j, alike))
    scale = b.points[j, 2] / a.points[i, 2]
    start = np.flatnonzero((scale > 0.4) & (scale < 2.5))
    start = start[np.argsort(-alike[start], kind="stable")][:200]
    # Places as complex numbers: rotation and scale are one product.
    p = a.points[:, 0] + 1j * a.points[:, 1]
    q = b.points[:, 0] + 1j * b.points[:, 1]
    turn = scale[start] * np.exp(1j * (b.points[j, 3] - a.points[i, 3])[start])
    shift = q[j[start]] - turn * p[i[start]]
    votes = (np.abs(turn[:, None] * p[i] + shift[:, None] - q[j]) < 4).sum(1)
    height, width = a.pixels.shape
    corners = turn[:, None] * np.array([0, width, 1j * height]) + shift[:, None]

    found, seen = [], []
    for k in np.argsort(-votes, kind="stable"):
        if votes[k] < 4 or len(seen) == ALIGNMENTS:
            break
        if all(np.abs(corners[k] - other).max() >= 15 for other in seen):
            seen.append(corners[k])
            real, imaginary = turn[k].real, turn[k].imag
            similar = [[real, -imaginary, shift[k].real], [imaginary, real, shift[k].imag]]
            refined = _refined(a, b, i, j, np.array(similar))
            if refined is not None:
                found.append(refined)
    return found


def _refined(
    a: Features, b: Features, i: np.ndarray, j: np.ndarray, transform: np.ndarray
) -> tuple[int, float, np.ndarray] | None:
    """Fit a map to the matches (i, j) that agree with it; None if it distorts too much."""
    p = np.c_[a.points[:, :2], np.ones(len(a.points))]
    q = np.c_[b.points[:, :2], np.ones(len(b.points))]

    def agreeing(pixels: float) -> np.ndarray:
        return np.linalg.norm((p @ transform.T)[i] - q[j, :2], axis=1) < pixels

    fits = agreeing(2 * FIT)
    for _ in range(2):
        if len(np.unique(i[fits])) < 6:  # too few for six unknowns
            break
        transform = np.linalg.lstsq(p[i[fits]], q[j[fits], :2], rcond=None)[0].T
        fits = agreeing(FIT)
    largest, smallest = np.linalg.svd(transform[:, :2], compute_uv=False)
    if largest > 3 or smallest < 1 / 3 or largest > 1.4 * smallest:
        return None
    count = min(len(np.unique(i[fits])), len(np.unique(j[fits])))
    back = cv2.invertAffineTransform(transform)
    in_overlap = min(_inside(p @ transform.T, b.pixels), _inside(q @ back.T, a.pixels))
    return count, count / max(in_overlap, 1), transform


def _inside(points: np.ndarray, pixels: np.ndarray) -> int:
    height, width = pixels.shape
    return int(((points >= 0) & (points <= (width - 1, height - 1))).all(1).sum())


# --- Comparison ----------------------------------------------------------------------------------


def _likeness(a: np.ndarray, b: np.ndarray, transform: np.ndarray, keypoints: float) -> Likeness:
    a, b = a.astype(np.float32), b.astype(np.float32)
    fine_a, fine_b = _fine(a, 3), _fine(b, 3)
    maps = [cv2.invertAffineTransform(transform).astype(np.float32)]  # from b to a: as cv2 warps
    try:
        steps = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)
        _, refined = cv2.findTransformECC(
            fine_b, fine_a, maps[0].copy(), cv2.MOTION_AFFINE, steps, None, 5
        )
        maps.append(refined)
    except cv2.error:  # it found no better one
        pass
    overlaps = [_overlap(a.shape, b.shape, back) for back in maps]
    fits = [
        _correlation(_warped(fine_a, back, b.shape)[overlap], fine_b[overlap])
        for back, overlap in zip(maps, overlaps, strict=True)
    ]
    back, overlap = maps[np.argmax(fits)], overlaps[np.argmax(fits)]
    area_of_a = a.size / abs(np.linalg.det(back[:, :2]))  # in pixels of b
    if overlap.sum() < LEAST_OVERLAP * min(b.size, area_of_a):
        return Likeness(keypoints)
    a_on_b = _warped(a, back, b.shape)
    detail = _detail(a_on_b, b, overlap)
    if detail < LEAST_DETAIL:
        return Likeness(keypoints, detail)
    # Rotation fills the corners of a picture with something; its centre is always real.
    centres = _centre(b.shape) & (_warped(_centre(a.shape).view(np.uint8), back, b.shape) > 0)
    if centres.sum() < 0.5 * _centre(b.shape).sum():
        return Likeness(keypoints, detail)
    return Likeness(keypoints, detail, _largest_spot(a_on_b, b, overlap & centres))


def _detail(a: np.ndarray, b: np.ndarray, overlap: np.ndarray) -> float:
    """Correlate the fine detail of two aligned pictures, in the best three quarters of it.

    Edges are clipped to the strength of the grain: all parts of a design share them. The worst
    quarter may be what rotation filled the corners with.
    """
    clipped = []
    for pixels in (a, b):
        band = cv2.GaussianBlur(_fine(pixels, 2.5), (0, 0), 0.5)
        limit = max(2, np.quantile(np.abs(band[overlap][::4]), 0.6))  # 2 grey levels: noise
        clipped.append(np.where(overlap, np.clip(band / limit, -1, 1), 0))
    a, b = clipped
    ab, aa, bb = (
        cv2.boxFilter(product, -1, (16, 16))[8::16, 8::16].ravel()
        for product in (a * b, a * a, b * b)
    )
    best = np.argsort(-ab / np.sqrt(aa * bb + 1e-12))
    strength = np.cumsum((aa + bb)[best])
    kept = best[: 1 + np.searchsorted(strength, 0.75 * strength[-1])]
    return float(ab[kept].sum() / np.sqrt(aa[kept].sum() * bb[kept].sum() + 1e-12))


def _largest_spot(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """Measure the largest spot, in pixels, that only one of two aligned pictures shows."""
    # Nothing is seen where one of them is overexposed.
    white = (np.maximum(a, b) >= WHITE).astype(np.uint8)
    where = where & (cv2.dilate(white, np.ones((5, 5))) == 0)
    if not where.any():
        return np.inf
    a, b = (cv2.GaussianBlur(_fine(pixels, 4), (0, 0), 0.7) for pixels in (a, b))
    a = a * np.sqrt(b[where] @ b[where] / max(a[where] @ a[where], 1e-9))  # the same contrast
    strength = np.maximum(np.abs(a), np.abs(b))
    # 10 grey levels: JPEG; 0.6: edges that fell between two pixels.
    differ = (np.abs(a - b) > np.maximum(10, 0.6 * strength)) & where
    spots = cv2.morphologyEx(differ.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2)))
    areas = cv2.connectedComponentsWithStats(spots)[2][1:, cv2.CC_STAT_AREA]
    return float(areas.max(initial=0))


def _fine(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return pixels - cv2.GaussianBlur(pixels, (0, 0), sigma)


def _warped(pixels: np.ndarray, back: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return cv2.warpAffine(pixels, back, shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _overlap(a_shape: tuple[int, int], b_shape: tuple[int, int], back: np.ndarray) -> np.ndarray:
    inside = _warped(np.ones(a_shape, np.uint8), back, b_shape)
    return cv2.erode(inside, np.ones((9, 9)), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b) + 1e-9))


@lru_cache(maxsize=64)
def _centre(shape: tuple[int, int]) -> np.ndarray:
    """Return a disc that rotation about the centre never fills, with some room for shifts."""
    height, width = shape
    y, x = np.ogrid[:height, :width]
    return np.hypot(x - (width - 1) / 2, y - (height - 1) / 2) < 0.42 * min(shape)


# --- Search --------------------------------------------------------------------------------------


def _group(digests: Sequence[str], known: "_Known") -> list[int]:
    """Compare likely pairs, round by round, until no more groups join; number the groups."""
    joined, place = DisjointSet(digests), {digest: i for i, digest in enumerate(digests)}
    tested: set[Pair] = set()
    for a, b, same in known.pairs():  # also through pictures that are not there any more
        if same:
            joined.add(a)
            joined.add(b)
            joined.merge(a, b)
        if a in place and b in place:
            tested.add((place[a], place[b]))

    def numbers() -> np.ndarray:
        # By the first picture of each group: its root depends on the order of the merges.
        first: dict[str, int] = {}
        return np.array([first.setdefault(joined[one], len(first)) for one in digests], int)

    searched = known.searched(digests)
    new = [digest for digest in digests if digest not in searched]
    if new and len(digests) > 1:
        search = _Search(known, digests, new)
        compared = fruitless = 0
        while fruitless < SEARCHES and compared < COMPARISONS * len(new):
            joins = 0
            pairs = search.propose(numbers(), tested)
            for start in range(0, len(pairs), 64):
                block = [(digests[i], digests[j]) for i, j in pairs[start : start + 64]]
                # What joined meanwhile need not be compared.
                block = [pair for pair in block if not joined.connected(*pair)]
                tested.update((place[a], place[b]) for a, b in block)
                compared += len(block)
                for pair, same in zip(block, known.compare(block), strict=True):
                    joins += int(same and joined.merge(*pair))
            fruitless = 0 if joins else fruitless + 1
        known.keep_searched(digests)
    return numbers().tolist()


def _hashes(descriptors: np.ndarray) -> np.ndarray:
    """Hash keypoints so that similar ones often agree: uint16 (n, HASHES).

    Each bit is the side of a random plane that a descriptor lies on.
    """
    sides = (_root(descriptors) - np.float32(0.07)) @ _planes() > 0  # 0.07: about their mean
    return np.packbits(sides.reshape(-1, BITS), axis=1).view(np.uint16).reshape(-1, HASHES)


@lru_cache(maxsize=1)
def _planes() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(128, BITS * HASHES)).astype(np.float32)


class _Search:
    """Finds the likely partners of new pictures among all, as they are or mirrored.

    Attributes:
        pictures: (m,) places of the new pictures.
        partners: (m, k) places of the likeliest partners of each, the likeliest first.
        similarity: (m, k) weight of the hashes that the two share; 0 = none.
    """

    def __init__(self, known: "_Known", digests: Sequence[str], new: Sequence[str]):
        everything = _counts(known.hashes(digests))
        frequency = everything.getnnz(axis=0)
        told = np.flatnonzero((frequency > 1) & (frequency <= COMMONEST))
        # The rarer, the more it tells: squared inverse document frequency.
        weight = np.log(1 + len(digests) / frequency[told]) ** 2
        everything = _normed(everything[:, told], weight)
        by_hash = everything.T.tocsr()
        place = {digest: i for i, digest in enumerate(digests)}
        self.pictures = np.array([place[digest] for digest in new])
        kept = min(PARTNERS, len(digests))
        self.partners = np.empty((len(new), kept), int)
        self.similarity = np.empty((len(new), kept), np.float32)
        for start in range(0, len(new), BLOCK):
            rows = slice(start, start + BLOCK)
            mirrored = _counts(
                _hashes(_mirrored_descriptors(one)) for one in known.descriptors(new[rows])
            )
            shared = np.maximum(
                (everything[self.pictures[rows]].multiply(weight) @ by_hash).toarray(),
                (_normed(mirrored[:, told], weight).multiply(weight) @ by_hash).toarray(),
            )
            best = np.argpartition(-shared, kept - 1, axis=1)[:, :kept]
            order = np.argsort(-np.take_along_axis(shared, best, 1), axis=1, kind="stable")
            self.partners[rows] = np.take_along_axis(best, order, 1)
            self.similarity[rows] = np.take_along_axis(shared, self.partners[rows], 1)

    def propose(self, groups: np.ndarray, tested: set[Pair]) -> list[Pair]:
        """Return the likeliest pairs to compare next, the likeliest first.

        Each new picture proposes its likeliest partner that is neither in its group nor tested
        with it; of the proposals of a group the best few are taken.
        """
        pictures = np.broadcast_to(self.pictures[:, None], self.partners.shape)
        low, high = np.minimum(pictures, self.partners), np.maximum(pictures, self.partners)
        numbered = np.array([a * len(groups) + b for a, b in tested], int)
        untested = (groups[pictures] != groups[self.partners]) & (self.similarity > 0)
        untested &= ~np.isin(low * len(groups) + high, numbered)
        rows = np.flatnonzero(untested.any(1))
        first = untested[rows].argmax(1)
        proposals: Counter[int] = Counter()
        pairs: dict[Pair, None] = {}  # in order, once each
        for k in np.argsort(-self.similarity[rows, first], kind="stable").tolist():
            group = groups[self.pictures[rows[k]]]
            if proposals[group] < SEARCHES:
                proposals[group] += 1
                pairs[int(low[rows[k], first[k]]), int(high[rows[k], first[k]])] = None
        return list(pairs)


def _counts(hashes: Iterable[np.ndarray]) -> sparse.csr_matrix:
    """Mark which hashes each picture has: (pictures, HASHES * 2**BITS)."""
    columns = [np.unique(one + (np.arange(HASHES) << BITS)) for one in hashes]
    starts = np.cumsum([0, *map(len, columns)])
    columns = np.concatenate(columns)
    shape = (len(starts) - 1, HASHES << BITS)
    return sparse.csr_matrix((np.ones(len(columns), np.float32), columns, starts), shape=shape)


def _normed(counts: sparse.csr_matrix, weight: np.ndarray) -> sparse.csr_matrix:
    """Scale the rows so that a picture's similarity to itself is 1."""
    lengths = np.sqrt(counts @ weight)
    return sparse.diags(1 / np.maximum(lengths, 1e-9)).dot(counts).tocsr()


# --- What is known already -----------------------------------------------------------------------


def _describe_file(path: Path) -> Features:
    return describe(images.decode_within(path, SIDE))


def _parallel(function, *arguments) -> list:
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *arguments))


@contextmanager
def _known(cache: Path) -> Iterator["_Known"]:
    path = cache / f"{METHOD}.sqlite"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60)
        try:
            yield _Known(connection)
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        raise PipelineError(f"{path}: cannot be used ({error}). Delete it") from error


class _Known:
    """Features and compared pairs of all pictures that were ever grouped, by content."""

    def __init__(self, connection: sqlite3.Connection):
        self._db = connection
        with self._db:
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS features (digest TEXT PRIMARY KEY, height INT, "
                "points BLOB, descriptors BLOB, hashes BLOB, pixels BLOB)"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS pairs (a TEXT, b TEXT, same INT, PRIMARY KEY (a, b)) "
                "WITHOUT ROWID"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS searches (digests TEXT)")

    def lacking(self, digests: Sequence[str]) -> list[str]:
        """Return the pictures without features."""
        known = {digest for (digest,) in self._db.execute("SELECT digest FROM features")}
        return [digest for digest in digests if digest not in known]

    def searched(self, digests: Sequence[str]) -> set[str]:
        """Return those among which all pairs were searched: the most that ever were at once."""
        wanted = set(digests)
        return max((wanted & one for _, one in self._searches()), key=len, default=set())

    def keep_searched(self, digests: Sequence[str]) -> None:
        """Remember that all pairs among these pictures were searched."""
        wanted = set(digests)
        inside = [(row,) for row, one in self._searches() if one <= wanted]
        with self._db:
            self._db.executemany("DELETE FROM searches WHERE rowid = ?", inside)
            self._db.execute("INSERT INTO searches VALUES (?)", ("\n".join(digests),))

    def _searches(self) -> Iterator[tuple[int, set[str]]]:
        for row, digests in self._db.execute("SELECT rowid, digests FROM searches").fetchall():
            yield row, set(digests.split("\n"))

    def keep_features(self, digests: Sequence[str], features: Sequence[Features]) -> None:
        """Keep the features of pictures."""
        rows = (
            (
                digest,
                len(one.pixels),
                *(
                    array.tobytes()
                    for array in (
                        one.points,
                        one.descriptors,
                        _hashes(one.descriptors),
                        one.pixels,
                    )
                ),
            )
            for digest, one in zip(digests, features, strict=True)
        )
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO features "
                "(digest, height, points, descriptors, hashes, pixels) VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )

    def hashes(self, digests: Sequence[str]) -> Iterator[np.ndarray]:
        """Give the hashes of each picture's keypoints."""
        for digest in digests:
            (blob,) = self._one("hashes", digest)
            yield np.frombuffer(blob, np.uint16).reshape(-1, HASHES)

    def descriptors(self, digests: Sequence[str]) -> Iterator[np.ndarray]:
        """Give the descriptors of each picture."""
        for digest in digests:
            (blob,) = self._one("descriptors", digest)
            yield np.frombuffer(blob, np.uint8).reshape(-1, 128)

    def _features(self, digest: str) -> Features:
        height, points, descriptors, pixels = self._one(
            "height, points, descriptors, pixels", digest
        )
        return Features(
            np.frombuffer(pixels, np.uint8).reshape(height, -1),
            np.frombuffer(points, np.float32).reshape(-1, 4),
            np.frombuffer(descriptors, np.uint8).reshape(-1, 128),
        )

    def _one(self, columns: str, digest: str) -> tuple:
        query = f"SELECT {columns} FROM features WHERE digest = ?"
        return self._db.execute(query, (digest,)).fetchone()

    def pairs(self) -> Iterator[tuple[str, str, int]]:
        """Give all pairs that were ever compared, and whether they are of one photograph."""
        return self._db.execute("SELECT a, b, same FROM pairs")

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Compare pairs of pictures and keep whether each is of one photograph."""
        a, b = ([self._features(pair[side]) for pair in pairs] for side in (0, 1))
        same = [likeness.same_photograph for likeness in _parallel(compare, a, b)]
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO pairs VALUES (?, ?, ?)",
                [(*pair, one) for pair, one in zip(pairs, same, strict=True)],
            )
        return same
