"""Fits a model to good parts alone, for parts of which there are few or no defects yet.

Two things count as a defect: what looks like one of the blemishes that are drawn on good parts,
and a place that is unlike all places of good parts (Roth et al., PatchCore, CVPR 2022). Both are
measured by what they say of good photographs that were held out, so that the share of good parts
that are rejected is controlled. How many defects pass is not known.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from defect_detection.dataset import holdout
from defect_detection.settings import FitParameters
from defect_detection.training import fitting, network
from defect_detection.training.calibration import Calibration, log_odds
from defect_detection.training.features import Features
from defect_detection.training.fitting import HeldOut, Report, TrainingResult
from defect_detection.training.network import Memory

VALIDATED = 3  # of so many blemished variants one is validated on
PLACES = 60_000  # of good parts, at most, from which the memory is made
ITERATIONS = 20
BATCH = 32


def fit(
    model: network.keras.Model,
    features: Features,
    parameters: FitParameters,
    max_overkill_rate: float,
    on_epoch: Report,
) -> TrainingResult:
    """Fit the head "good" of a new model; the probability is 0.5 at the threshold.

    Args:
        model: as `network.build` makes it; its weights are changed.
        features: of its frozen layers. Real defects are only judged.
        parameters: as for `fitting.fit`.
        max_overkill_rate: share of the held-out good photographs' images that is rejected.
        on_epoch: as for `fitting.fit`.

    Raises:
        PipelineError: as `fitting.fit` raises it.
    """
    started = time.perf_counter()
    good = _of_good_parts(features)
    blemishes = fitting.fit(network.with_map(model), good, parameters, on_epoch)
    plain = np.flatnonzero(~features.varied & (features.labels == 0))
    distances, memory = _memories(blemishes.model, good, plain, parameters)
    of_good = blemishes.held_out.labels == 0
    weights = fitting.photograph_weights(np.zeros(len(plain)), features.photographs[plain])
    nicks = _Scale.of(log_odds(blemishes.held_out.probabilities[of_good]), weights)
    places = _Scale.of(distances, weights)
    surprise = np.maximum(nicks(nicks.values), places(places.values))
    limit = _limit(surprise, weights, max_overkill_rate)
    network.put_good(model, blemishes.model, memory, (nicks.affine, places.affine), limit)

    defects = np.flatnonzero(~features.varied & (features.labels == 1))
    labels = np.concatenate([np.zeros(len(plain)), np.ones(len(defects))])
    of_defects = fitting.predict(network.fitted(model), features, defects)[:, 0]
    found = np.concatenate([expit(surprise - limit), of_defects])
    judged = np.concatenate([plain, defects])
    return replace(
        blemishes,
        model=model,
        calibration=Calibration(1, 0),
        held_out=HeldOut(
            labels,
            found.astype(np.float32),
            features.photographs[judged],
            features.images[judged],
        ),
        seconds=time.perf_counter() - started,
        good_only=True,
    )


def _of_good_parts(features: Features) -> Features:
    """Return the features of good parts; some of those with a blemish are for validation."""
    rows = np.flatnonzero((features.labels == 0) | features.blemished)
    kept = features.choose(rows)
    validated = kept.blemished & (np.cumsum(kept.blemished) % VALIDATED == 0)
    return replace(kept, varied=kept.varied & ~validated)


@dataclass(frozen=True)
class _Scale:
    """Measures values in deviations above the median of good parts."""

    values: np.ndarray
    median: float
    deviation: float

    @classmethod
    def of(cls, values: np.ndarray, weights: np.ndarray) -> "_Scale":
        median, high = (_quantile(values, weights, share) for share in (0.5, 0.84))
        return cls(values, median, max(high - median, 1e-3))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return (values - self.median) / self.deviation

    @property
    def affine(self) -> tuple[float, float]:
        """The scale and the shift of the measure."""
        return 1 / self.deviation, -self.median / self.deviation


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """Return the weighted quantile of values."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order[min(int(np.searchsorted(reached, share)), len(order) - 1)]])


def _limit(surprise: np.ndarray, weights: np.ndarray, most: float) -> float:
    """Return the lowest limit that values with at most a share of the weights reach.

    It lies half-way between two values, so that rounding decides about none.
    """
    values, of = np.unique(surprise, return_inverse=True)
    each = np.bincount(of, weights) / weights.sum()
    above = 1 - np.cumsum(each)  # share of the weights of higher values
    passes = int(np.argmax(above <= most + 1e-9))
    if passes + 1 < len(values):
        return float(values[passes] + values[passes + 1]) / 2
    return float(values[passes]) + 0.5  # half a deviation


def _memories(
    model: network.keras.Model, good: Features, plain: np.ndarray, parameters: FitParameters
) -> tuple[np.ndarray, Memory]:
    """Return how far each plain good image is from the others' places, and the memory of all.

    Args:
        model: has the mean and variance of the features.
        good: features of good parts.
        plain: numbers of the plain good images in the file of the features.
        parameters: how photographs are divided.
    """
    shown = np.flatnonzero(~good.blemished & (good.gentle | ~good.varied))
    judged = np.flatnonzero(~good.varied & (good.labels == 0))
    assert len(judged) == len(plain)
    photographs = good.photographs[judged]
    parts = holdout.parts(photographs, parameters.validation_share, parameters.seed)
    distances = np.empty(len(judged))
    for part in parts:
        others = shown[~np.isin(good.photographs[shown], photographs[part])]
        memory = _remember(model, good, others, parameters.seed)
        distances[part] = memory.distances(_standardised(model, good, judged[part])).max((1, 2))
    return distances, _remember(model, good, shown, parameters.seed)


def _remember(model: network.keras.Model, good: Features, rows: np.ndarray, seed: int) -> Memory:
    """Summarise the places of good parts by cluster centres, where all directions count alike."""
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(seed)
    per_image = max(1, PLACES // len(rows))
    places = []
    for start in range(0, len(rows), BATCH):
        values = _standardised(model, good, rows[start : start + BATCH])
        values = values.reshape(len(values), -1, values.shape[-1])
        chosen = rng.integers(0, values.shape[1], (len(values), per_image))
        places.append(np.take_along_axis(values, chosen[..., np.newaxis], 1))
    seen = np.concatenate(places).reshape(-1, values.shape[-1])
    mean = seen.mean(0)
    _, strengths, directions = np.linalg.svd(
        (seen - mean)[: network.COMPONENTS * 100], full_matrices=False
    )
    count = min(network.COMPONENTS, len(strengths))
    scale = strengths[:count] / np.sqrt(min(len(seen), network.COMPONENTS * 100))
    whitening = np.zeros((seen.shape[1], network.COMPONENTS), np.float32)
    whitening[:, :count] = directions[:count].T / (scale + 1e-3)
    clusters = min(network.KEPT, len(seen))
    found = MiniBatchKMeans(
        clusters, batch_size=4096, n_init=1, max_iter=ITERATIONS, random_state=seed
    ).fit((seen - mean) @ whitening)
    centres = np.resize(found.cluster_centers_, (network.KEPT, network.COMPONENTS))
    return Memory(whitening, -mean @ whitening, centres.astype(np.float32))


def _standardised(model: network.keras.Model, good: Features, rows: np.ndarray) -> np.ndarray:
    mean, deviation = network.standardisation(model)
    return (good.take(rows).astype(np.float32) - mean) / deviation
