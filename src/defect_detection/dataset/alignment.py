"""Decides whether two images come from one photograph: aligns them and compares fine detail.

Parts of one design look alike, so matching keypoints prove nothing. Two images are aligned by their
SIFT keypoints [1] and the enhanced correlation coefficient [2], then compared in what no two
photographs share: the grain of the surface and every small spot.

[1] Lowe, Distinctive image features from scale-invariant keypoints, IJCV 60, 2004.
[2] Evangelidis and Psarakis, Parametric image alignment using enhanced correlation coefficient
    maximization, PAMI 30, 2008.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

SIDE = 192  # pixels of the longer side of the images that are compared
KEYPOINTS = 150  # of an image, the strongest
FIT = 2.5  # pixels between a keypoint and where the alignment puts it
ALIGNMENTS = 3  # tried for a pair: a symmetrical part fits in several ways

# Two images of one photograph fulfil all of these.
LEAST_OVERLAP = 0.6  # of the smaller one's area
LEAST_KEYPOINTS = 0.2
LEAST_DETAIL = 0.82
LEAST_GRAIN = 0.4  # of two photographs of one design 0.1 or less, of copies 0.55 or more
LEAST_GRAINY = 100  # pixels without edges
# The more keypoints agree, the larger a spot may be: pixels for the share 1.
LARGEST_SPOT = 15
WHITE = 252  # grey levels from which an image is overexposed

cv2.setNumThreads(1)  # several images at a time instead


@dataclass(frozen=True)
class Keypoints:
    """An image as it is compared.

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
    """How two aligned images agree.

    Attributes:
        keypoints: share of the keypoints in the overlap that lie on one of the other image.
        detail: correlation of the fine detail, strong edges clipped, at most 1.
        grain: correlation of the fine detail without edges, which all parts of a design share.
        spot: pixels of the largest spot that only one of them shows.
    """

    keypoints: float = 0
    detail: float = 0
    grain: float = 0
    spot: float = np.inf

    @property
    def same_photograph(self) -> bool:
        """Whether the two images come from one photograph."""
        return (
            self.keypoints >= LEAST_KEYPOINTS
            and self.detail >= LEAST_DETAIL
            and self.grain >= LEAST_GRAIN
            and self.spot <= LARGEST_SPOT * self.keypoints
        )


def describe(pixels: np.ndarray) -> Keypoints:
    """Find the strongest keypoints of a grey image, uint8 (height, width)."""
    finder = cv2.SIFT_create(KEYPOINTS, contrastThreshold=0.01)  # type: ignore[attr-defined]
    found, descriptors = finder.detectAndCompute(pixels, None)
    strongest = np.argsort([-point.response for point in found], kind="stable")[:KEYPOINTS]
    points = [(*found[i].pt, found[i].size, np.deg2rad(found[i].angle)) for i in strongest]
    if not points:
        descriptors = np.zeros((0, 128))
    return Keypoints(
        pixels,
        np.array(points, np.float32).reshape(-1, 4),
        descriptors[strongest].astype(np.uint8),
    )


def compare(a: Keypoints, b: Keypoints) -> Likeness:
    """Align two images, `a` also mirrored, and compare them in the best alignment."""
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


def _mirrored(features: Keypoints) -> Keypoints:
    """Return the keypoints of the mirrored image."""
    points = features.points.copy()
    points[:, 0] = features.pixels.shape[1] - 1 - points[:, 0]
    points[:, 3] = np.pi - points[:, 3]
    pixels = np.ascontiguousarray(features.pixels[:, ::-1])
    return Keypoints(pixels, points, mirrored_descriptors(features.descriptors))


def mirrored_descriptors(descriptors: np.ndarray) -> np.ndarray:
    """Return the SIFT descriptors, uint8 (n, 128), of the mirrored image."""
    histograms = descriptors.reshape(-1, 4, 4, 8)  # rows, columns, orientations
    return histograms[:, ::-1][..., -np.arange(8) % 8].reshape(-1, 128)


def root(descriptors: np.ndarray) -> np.ndarray:
    """Return unit vectors whose products are Hellinger kernels of the histograms (RootSIFT)."""
    shares = descriptors.astype(np.float32)
    return np.sqrt(shares / (shares.sum(1, keepdims=True) + 1e-6))


def _alignments(a: Keypoints, b: Keypoints) -> list[tuple[int, float, np.ndarray]]:
    """Find the likeliest affine maps from `a` to `b`.

    A keypoint has place, size and orientation, so that each match gives a map by itself; those
    that most other matches agree with are refined.

    Returns:
        For each: how many keypoints agree, their share of those in the overlap, matrix (2, 3).
    """
    if min(len(a.points), len(b.points)) < 4:
        return []
    likeness = root(a.descriptors) @ root(b.descriptors).T
    i = np.repeat(np.arange(len(a.points)), 2)
    j = np.argpartition(-likeness, 1, axis=1)[:, :2].ravel()  # the two most alike
    alike = likeness[i, j]
    i, j, alike = (one[alike > 0.75] for one in (i, j, alike))
    scale = b.points[j, 2] / a.points[i, 2]
    start = np.flatnonzero((scale > 0.4) & (scale < 2.5))
    start = start[np.argsort(-alike[start], kind="stable")][:200]
    # Places are complex numbers, so that rotation and scale are one product.
    p = a.points[:, 0] + 1j * a.points[:, 1]
    q = b.points[:, 0] + 1j * b.points[:, 1]
    turn = scale[start] * np.exp(1j * (b.points[j, 3] - a.points[i, 3])[start])
    shift = q[j[start]] - turn * p[i[start]]
    votes = (np.abs(turn[:, None] * p[i] + shift[:, None] - q[j]) < 4).sum(1)
    height, width = a.pixels.shape
    corners = turn[:, None] * np.array([0, width, 1j * height]) + shift[:, None]

    found: list[tuple[int, float, np.ndarray]] = []
    seen: list[np.ndarray] = []
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
    a: Keypoints, b: Keypoints, i: np.ndarray, j: np.ndarray, transform: np.ndarray
) -> tuple[int, float, np.ndarray] | None:
    """Fit an affine map to the matches (i, j) that agree with it; None if it distorts too much."""
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


def _likeness(a: np.ndarray, b: np.ndarray, transform: np.ndarray, keypoints: float) -> Likeness:
    a, b = a.astype(np.float32), b.astype(np.float32)
    fine_a, fine_b = _fine(a, 3), _fine(b, 3)
    maps = [cv2.invertAffineTransform(transform).astype(np.float32)]  # from b to a, as cv2 needs it
    try:
        steps = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 30, 1e-4)
        _, refined = cv2.findTransformECC(
            fine_b, fine_a, maps[0].copy(), cv2.MOTION_AFFINE, steps, None, 5
        )
        maps.append(refined)
    except cv2.error:  # it did not converge
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
    grain = _grain(a_on_b, b, overlap)
    if grain < LEAST_GRAIN:
        return Likeness(keypoints, detail, grain)
    # The corners of a rotated image are filled; only its centre is always real.
    centres = _centre(b.shape) & (_warped(_centre(a.shape).view(np.uint8), back, b.shape) > 0)
    if centres.sum() < 0.5 * _centre(b.shape).sum():
        return Likeness(keypoints, detail, grain)
    return Likeness(keypoints, detail, grain, _largest_spot(a_on_b, b, overlap & centres))


def _detail(a: np.ndarray, b: np.ndarray, overlap: np.ndarray) -> float:
    """Return the correlation of the fine detail of two aligned images, in its best three quarters.

    Edges are clipped to the strength of the grain: all parts of a design share them. The worst
    quarter may be what rotation filled the corners with.
    """
    clipped = []
    for pixels in (a, b):
        band = _band(pixels)
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


def _grain(a: np.ndarray, b: np.ndarray, overlap: np.ndarray) -> float:
    """Return the correlation of the fine detail of two aligned images away from edges.

    Parts that lie in the same place share all of a design: lines, holes, print. What is left is
    the surface of this part and the noise of this shot.
    """
    bands = [_band(pixels) for pixels in (a, b)]
    limits = [1.5 * np.quantile(np.abs(band[overlap]), 0.6) for band in bands]
    edges = np.any([np.abs(band) > limit for band, limit in zip(bands, limits, strict=True)], 0)
    where = _exposed(a, b, overlap) & (cv2.dilate(edges.astype(np.uint8), np.ones((3, 3))) == 0)
    if where.sum() < LEAST_GRAINY:
        return 1.0  # overexposed, or edges nearly everywhere: the other measures decide
    a, b = (band[where] - band[where].mean() for band in bands)
    return _correlation(a, b)


def _band(pixels: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(_fine(pixels, 2.5), (0, 0), 0.5)


def _largest_spot(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """Measure the largest spot, in pixels, that only one of two aligned images shows."""
    where = _exposed(a, b, where)
    if not where.any():
        return np.inf
    a, b = (cv2.GaussianBlur(_fine(pixels, 4), (0, 0), 0.7) for pixels in (a, b))
    a = a * np.sqrt(b[where] @ b[where] / max(a[where] @ a[where], 1e-9))  # the same contrast
    strength = np.maximum(np.abs(a), np.abs(b))
    # JPEG changes up to 10 grey levels, and edges between two pixels 0.6 of the strength.
    differ = (np.abs(a - b) > np.maximum(10, 0.6 * strength)) & where
    spots = cv2.morphologyEx(differ.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2)))
    areas = cv2.connectedComponentsWithStats(spots)[2][1:, cv2.CC_STAT_AREA]
    return float(areas.max(initial=0))


def _exposed(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Leave out overexposed places, which show nothing."""
    white = (np.maximum(a, b) >= WHITE).astype(np.uint8)
    return where & (cv2.dilate(white, np.ones((5, 5))) == 0)


def _fine(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return pixels - cv2.GaussianBlur(pixels, (0, 0), sigma)


def _warped(pixels: np.ndarray, back: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return cv2.warpAffine(pixels, back, shape[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def _overlap(a_shape: tuple[int, ...], b_shape: tuple[int, ...], back: np.ndarray) -> np.ndarray:
    inside = _warped(np.ones(a_shape, np.uint8), back, b_shape)
    return cv2.erode(inside, np.ones((9, 9)), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b) + 1e-9))


@lru_cache(maxsize=64)
def _centre(shape: tuple[int, ...]) -> np.ndarray:
    """Return a disc that no rotation about the centre fills, with some room for shifts."""
    height, width = shape
    y, x = np.ogrid[:height, :width]
    return np.hypot(x - (width - 1) / 2, y - (height - 1) / 2) < 0.42 * min(shape)
