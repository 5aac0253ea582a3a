"""Fits a model once for each held-out fold of the photographs, and merges the fits."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from defect_detection import PipelineError
from defect_detection.dataset import holdout
from defect_detection.evaluation import metrics
from defect_detection.runtime.classifier import MAP, PROBABILITY
from defect_detection.runtime.decision import ACCURACY_THRESHOLD
from defect_detection.settings import FitParameters
from defect_detection.training import calibration, network, overall
from defect_detection.training.calibration import Calibration
from defect_detection.training.features import Features
from defect_detection.training.network import keras, tf
from defect_detection.training.overall import Overall

BATCH = 32  # for predictions
# Largest numbers of variants and of places for the features' mean and variance.
MEASURED, MEASURED_PLACES = 512, 2**17
STARTED = 64  # images by which the first weights of a map are scaled
AGREED = 512  # images on which the merged model is matched to the fits

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class HeldOut:
    """Plain images, each judged by the fit that did not see its photograph.

    Attributes:
        labels: (n,), 1 = defect.
        probabilities: float32 (n,) of a defect, calibrated.
        photographs: (n,) number of the photograph that each comes from.
        images: (n,) number of each image in the data set.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    photographs: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class TrainingResult:
    """A fitted model with the weights of its best epoch.

    Attributes:
        model: the model.
        best_epoch: counted from 1; lowest validation loss.
        history: per epoch `loss`, `accuracy`, `val_loss`, `val_accuracy`; the validation loss
            gives each photograph of a class the same weight.
        calibration: of the log-odds, fitted to the held-out images.
        held_out: the fits' probabilities for photographs that they did not see.
        fits: number of fits.
        seconds: wall time of the fit.
        good_only: whether it learned from good parts alone, so that the threshold is where the
            probability is 0.5.
    """

    model: keras.Model
    best_epoch: int
    history: dict[str, list[float]]
    calibration: Calibration
    held_out: HeldOut
    fits: int
    seconds: float
    good_only: bool = False

    @property
    def best(self) -> dict[str, float]:
        """The metrics of the best epoch by their names in `history`; `val_…` are calibrated."""
        found = {name: values[self.best_epoch - 1] for name, values in self.history.items()}
        return found | _validation(self.held_out)


def make_deterministic(seed: int) -> None:
    """Seed Python, NumPy and TensorFlow; on a CPU the same seed gives the same bits."""
    keras.utils.set_random_seed(seed)


def fit(
    model: keras.Model,
    features: Features,
    parameters: FitParameters,
    on_epoch: Report = lambda epoch, metrics: None,
) -> TrainingResult:
    """Fit the layers that are not frozen with AdamW and binary cross-entropy; calibrate the model.

    The photographs are divided into folds. For each fold, a copy of the model is fitted to the
    variants of the other folds and validated on the fold's plain images. The best epoch and the
    calibration are chosen by the validation of all folds together. The result has the mean of the
    fits' weights, with its log-odds matched to theirs. A model that was fitted before is
    fine-tuned and keeps its calibration: it may have seen every photograph, and would become more
    confident each time.

    Args:
        model: as `network.build` makes it or as it was registered; its weights are changed.
        features: of its frozen layers.
        parameters: learning rate, batch size, epochs, share held out; its seed decides the rest.
        on_epoch: is called after each epoch with its number, from 1, and its metrics.

    Raises:
        PipelineError: the loss is not a number, or there are too few photographs.
    """
    started = time.perf_counter()
    new = network.has_features(model) and _standardise(model, features)
    plain = np.flatnonzero(~features.varied)
    labels, photographs = features.labels[plain], features.photographs[plain]
    share, seed = parameters.validation_share, parameters.seed
    held_out = holdout.validation_folds(labels, photographs, share, seed)
    fits = _Fits(model, features, parameters, Folds(plain, held_out), new)
    best, history = _run(fits, on_epoch)
    fits.merge(best.states)
    calibrated = fits.calibrate(best) if new else Calibration(1, 0)
    probabilities = fits.calibrated(best.probabilities, calibrated)
    return TrainingResult(
        model=model,
        best_epoch=best.epoch,
        history=history,
        calibration=calibrated,
        held_out=HeldOut(labels, probabilities, photographs, features.images[plain]),
        fits=len(held_out),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class Folds:
    """How plain images are divided for validation.

    Attributes:
        plain: numbers of the plain images in the features.
        held_out: indices in `plain` that each fit holds out.
    """

    plain: np.ndarray
    held_out: list[np.ndarray]


@dataclass(frozen=True)
class _Best:
    """The best epoch, the states of the fits after it, and what they say of held-out images.

    Attributes:
        epoch: counted from 1.
        states: of the fits.
        probabilities: (n,), not calibrated.
        calibration: of a wide model.
    """

    epoch: int
    states: list[list[np.ndarray]]
    probabilities: np.ndarray
    calibration: Calibration


def _run(fits: "_Fits", on_epoch: Report) -> tuple[_Best, dict[str, list[float]]]:
    """Run all epochs; return the best one, and the metrics of all by name.

    Raises:
        PipelineError: the validation loss was never a number.
    """
    best, lowest = None, math.inf
    history: dict[str, list[float]] = {}
    plain = fits.folds.plain
    labels, photographs = fits.features.labels[plain], fits.features.photographs[plain]
    images = fits.features.images[plain]
    for epoch in range(1, fits.parameters.epochs + 1):
        figures = fits.run(epoch)
        found = fits.judge()
        calibrated = fits.combine(found)
        probabilities = fits.calibrated(found, calibrated)
        figures |= _validation(HeldOut(labels, probabilities, photographs, images))
        for name, value in figures.items():
            history.setdefault(name, []).append(value)
        if figures["val_loss"] < lowest:
            lowest, best = figures["val_loss"], _Best(epoch, fits.states(), found, calibrated)
        on_epoch(epoch, figures)
    if best is None:
        raise PipelineError(
            f"The fit diverged: its validation loss is not a number. Lower the learning_rate, "
            f"which is {fits.parameters.learning_rate}"
        )
    return best, history


def _validation(held_out: HeldOut) -> dict[str, float]:
    labels, found = held_out.labels, held_out.probabilities
    losses = -np.log(np.clip(np.where(labels == 1, found, 1 - found), 1e-7, 1))
    weights = photograph_weights(labels, held_out.photographs)
    right = metrics.is_right(labels, found, ACCURACY_THRESHOLD)
    return {"val_loss": float((weights * losses).sum()), "val_accuracy": float(right.mean())}


def photograph_weights(labels: np.ndarray, photographs: np.ndarray) -> np.ndarray:
    """Return weights (n,) that sum to 1 and are equal for all photographs of a class.

    The weights of each class sum to 1/2.
    """
    _, of, images = np.unique(
        np.stack([labels, photographs]), axis=1, return_inverse=True, return_counts=True
    )
    each = 1 / images[of.reshape(-1)]
    for label in np.unique(labels):
        each[labels == label] /= 2 * each[labels == label].sum()
    return each


def predict(judge: keras.Model, features: Features, numbers: np.ndarray) -> np.ndarray:
    """Return what a model makes of some features, (len(numbers), outputs)."""
    starts = range(0, len(numbers), BATCH)
    parts = (features.take(numbers[start : start + BATCH]).astype(np.float32) for start in starts)
    found = [judge.predict_on_batch(part) for part in parts]
    return np.concatenate(found) if found else np.empty((0, judge.output_shape[-1]), np.float32)


class _Fits:
    """The fits of a model, one for each fold of the photographs.

    The maps of a new model are fitted for all folds at once; what is seen in the image as a whole
    is fitted before. Other models are fitted one after another, each to its share of the variants,
    so that an epoch takes about as long.

    Attributes:
        features: of the images.
        parameters: of the fits.
        folds: which images each fit holds out.
        overall: of a new model, what is seen in the image as a whole.
    """

    def __init__(
        self,
        model: keras.Model,
        features: Features,
        parameters: FitParameters,
        folds: Folds,
        new: bool,
    ):
        self.features, self.parameters, self.folds = features, parameters, folds
        self._model, self._fitted, self._wide = model, network.fitted(model), network.is_wide(model)
        self._fits_to = _chosen(features, self._wide)
        photographs = features.photographs[folds.plain]
        parts = [np.unique(photographs[fold]) for fold in folds.held_out]
        self._weights = np.stack([self._weigh(part) for part in parts], axis=1)
        count = len(parts)

        self.overall: Overall | None = None
        head = [network.MAP, network.PROBABILITY]
        of_head = sum(len(model.get_layer(name).trainable_variables) for name in head)
        only_head = len(self._fitted.trainable_variables) == of_head
        self._at_once = network.has_features(model) and (only_head or new)
        self._learner = network.maps(model, count) if self._at_once else self._fitted
        if new:
            self.overall = self._start()

        columns = [np.arange(count)] if self._at_once else np.arange(count)[:, np.newaxis]
        self._columns = list(columns)
        steps = parameters.epochs * math.ceil(len(self._rows(1, 0)) / parameters.batch_size)
        rate = keras.optimizers.schedules.CosineDecay(
            0.1 * parameters.learning_rate,
            max(1, steps * 19 // 20),
            warmup_target=parameters.learning_rate,
            warmup_steps=steps // 20,
        )
        self._optimizer = keras.optimizers.AdamW(rate, weight_decay=parameters.weight_decay)
        self._optimizer.build(self._learner.trainable_variables)
        self._step = tf.function(self._one_step, reduce_retracing=True, autograph=False)
        self._states = [self._state() for _ in self._columns]

    def _start(self) -> Overall:
        """Fit what is seen in the image as a whole, and let the maps begin with its maxima.

        A map that begins with no weights may find nothing (docs/model-notes.md).
        """
        strengths = overall.STRENGTHS if self._wide else (0.01,)
        plain, folds = self.folds.plain, self.folds.held_out
        found = overall.fit(self.features, self._fits_to, self._weights, plain, folds, strengths)
        mean, deviation = network.standardisation(self._learner)
        kernels = found.of_maxima(deviation)
        some = self.features.take(self._fits_to[:: max(1, len(self._fits_to) // STARTED)])
        evidence = (some.astype(np.float32) - mean) / deviation @ kernels
        kernels /= evidence.std((0, 1, 2)) + 1e-9
        _, bias = self._learner.get_layer(MAP).get_weights()
        self._learner.get_layer(MAP).set_weights([kernels[np.newaxis, np.newaxis], bias])
        return found

    def combine(self, probabilities: np.ndarray) -> Calibration:
        """Weigh map and image as a whole by what both say of the held-out images."""
        if self.overall is None or not self._wide:
            return Calibration(1, 0)
        labels = self.features.labels[self.folds.plain]
        weights = photograph_weights(labels, self.features.photographs[self.folds.plain])
        return calibration.combine(labels, probabilities, self.overall.held_out, weights)

    def calibrate(self, best: _Best) -> Calibration:
        """Calibrate the merged model by the held-out images; return by what."""
        if self.overall is not None and self._wide:
            kernel, bias = self.overall.kernels.mean(1), float(self.overall.biases.mean())
            network.add_overall(self._model, kernel, bias, best.calibration)
            return best.calibration
        labels = self.features.labels[self.folds.plain]
        weights = photograph_weights(labels, self.features.photographs[self.folds.plain])
        found = calibration.calibrate(labels, best.probabilities, weights)
        network.calibrate(self._model, found)
        return found

    def calibrated(self, probabilities: np.ndarray, calibrated: Calibration) -> np.ndarray:
        """Return the probabilities (n,) of the held-out images after a calibration."""
        if self.overall is None:
            return calibrated.apply(probabilities)
        return calibrated.apply(probabilities, self.overall.held_out)

    def run(self, epoch: int) -> dict[str, float]:
        """Run an epoch of all fits; return loss and accuracy over its variants."""
        total = np.zeros(3)
        for number in range(len(self._columns)):
            self._restore(self._states[number])
            for batch in self._epoch(epoch, number):
                total += self._step(*batch).numpy()
            self._states[number] = self._state()
        loss, right, weight = total
        return {"loss": float(loss / weight), "accuracy": float(right / weight)}

    def judge(self) -> np.ndarray:
        """Return the probability of each plain image by the fit that held it out."""
        plain, folds = self.folds.plain, self.folds.held_out
        found = np.empty(len(plain), np.float32)
        if self._at_once:
            each = self._predict(plain)
            for number, fold in enumerate(folds):
                found[fold] = each[fold, number]
            return found
        for number, fold in enumerate(folds):
            self._restore(self._states[number])
            found[fold] = self._predict(plain[fold])[:, 0]
        return found

    def states(self) -> list[list[np.ndarray]]:
        """Return the present weights of the fits and optimizers, for `merge`."""
        return list(self._states)

    def merge(self, states: list[list[np.ndarray]]) -> None:
        """Give the model the mean of the fits' weights, and match its log-odds to theirs.

        A mean of weights has log-odds of another scale and shift than the fits, for which
        calibration, threshold and review band are chosen. They are matched to the mean log-odds of
        the fits that learned from an image. In a new wide model these are those of the map alone.

        Args:
            states: as `states` returned them.
        """
        plain, folds = self.folds.plain, self.folds.held_out
        some = np.linspace(0, len(plain) - 1, min(len(plain), AGREED)).astype(int)
        each = []
        for state in states:
            self._restore(state)
            each.append(self._predict(plain[some]))
        learned = np.stack([~np.isin(some, fold) for fold in folds], axis=1)
        together = calibration.mean_in_log_odds(np.concatenate(each, axis=1), learned)
        self._put_mean(states)
        found = predict(self._fitted, self.features, plain[some])[:, 0]
        labels, photographs = self.features.labels, self.features.photographs
        weights = photograph_weights(labels[plain[some]], photographs[plain[some]])
        network.calibrate(self._model, calibration.calibrate(together, found, weights))

    def _put_mean(self, states: list[list[np.ndarray]]) -> None:
        if not self._at_once:
            weights = [state[: len(self._learner.weights)] for state in states]
            self._fitted.set_weights([np.mean(one, axis=0) for one in zip(*weights, strict=True)])
            return
        self._restore(states[0])
        kernel, bias = (one.mean(-1) for one in self._learner.get_layer(MAP).get_weights())
        self._model.get_layer(MAP).set_weights([kernel[..., np.newaxis], bias[np.newaxis]])
        last = self._model.get_layer(PROBABILITY)
        scale, bias = (one.mean() for one in self._learner.get_layer(PROBABILITY).get_weights())
        of_map = np.zeros(last.kernel.shape)  # the image as a whole is added later
        of_map[0] = scale
        last.set_weights([of_map, bias[np.newaxis]])

    def _weigh(self, fold: np.ndarray) -> np.ndarray:
        """Return a fit's weights of the variants: 0 for its fold, equal sums for both classes."""
        labels = self.features.labels[self._fits_to]
        weights = (~np.isin(self.features.photographs[self._fits_to], fold)).astype(np.float32)
        half = weights.sum() / 2
        for label in (0, 1):
            of_class = weights[labels == label].sum()
            if not of_class:
                raise PipelineError(
                    f"{len(labels)} variants are too few: a fit would see one class only. "
                    f"Raise variants in src/config.yaml"
                )
            weights[labels == label] *= half / of_class
        return weights

    def _epoch(self, epoch: int, number: int) -> Iterator[tuple]:
        """Yield batches of features, labels and weights; the next one is read meanwhile."""
        columns, size = self._columns[number], self.parameters.batch_size
        rows = self._rows(epoch, number)

        def read(start: int) -> tuple:
            chosen = np.sort(rows[start : start + size])
            numbers = self._fits_to[chosen]
            weights = self._weights[np.ix_(chosen, columns)]
            return self.features.take(numbers), self.features.labels[numbers], weights

        with ThreadPoolExecutor(1) as reader:
            waiting = reader.submit(read, 0)
            for start in range(size, len(rows), size):
                coming = reader.submit(read, start)
                yield waiting.result()
                waiting = coming
            yield waiting.result()

    def _rows(self, epoch: int, number: int) -> np.ndarray:
        """Return the variants for an epoch of a fit, in random order."""
        rows = np.flatnonzero(self._weights[:, self._columns[number]].any(1))
        rng = np.random.default_rng([self.parameters.seed, epoch, number])
        return rng.permutation(rows)[: math.ceil(len(self._fits_to) / len(self._columns))]

    def _one_step(self, values: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        targets = labels[:, tf.newaxis] * tf.ones_like(weights)
        with tf.GradientTape() as tape:
            found = self._learner(tf.cast(values, tf.float32), training=True)
            losses = weights * keras.ops.binary_crossentropy(targets, found)
            loss = tf.reduce_sum(tf.reduce_mean(losses, axis=0))
        variables = self._learner.trainable_variables
        gradients = self._clipped(tape.gradient(loss, [v.value for v in variables]))
        self._optimizer.apply(gradients, variables)
        right = weights * tf.cast((found >= ACCURACY_THRESHOLD) == (targets == 1), tf.float32)
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(right), tf.reduce_sum(weights)])

    def _clipped(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Clip the gradient of each fit to length 1.

        Without clipping, some fits learned nothing (docs/model-notes.md).
        """
        if not self._at_once:
            return tf.clip_by_global_norm(gradients, 1.0)[0]
        squares = [tf.reduce_sum(tf.reshape(g, (-1, g.shape[-1])) ** 2, 0) for g in gradients]
        length = tf.sqrt(tf.add_n(squares))  # for each fit, along the last axis
        return [g / tf.maximum(length, 1.0) for g in gradients]

    def _predict(self, numbers: np.ndarray) -> np.ndarray:
        return predict(self._learner, self.features, numbers)

    def _variables(self) -> list:
        return [*self._learner.weights, *self._optimizer.variables]

    def _state(self) -> list[np.ndarray]:
        return [keras.ops.convert_to_numpy(v) for v in self._variables()]

    def _restore(self, state: list[np.ndarray]) -> None:
        for variable, value in zip(self._variables(), state, strict=True):
            variable.assign(value)


def _chosen(features: Features, wide: bool) -> np.ndarray:
    """Return the numbers of the features that a head is fitted to.

    What is seen in the image as a whole changes with strong variants: they are dark where a
    defect may be, and a blemish on a good part is none of its defects.
    """
    if wide:
        return np.flatnonzero(~features.varied | features.gentle & ~features.blemished)
    return np.flatnonzero(features.varied)


def _standardise(model: keras.Model, features: Features) -> bool:
    """Set the mean and variance of the head's input in a new model; they are never fitted.

    Returns:
        Whether the model is new; a model that was fitted before has them.
    """
    layer = model.get_layer(network.STANDARDISED)
    mean, _ = layer.get_weights()
    if mean.any():
        return False
    varied = np.flatnonzero(features.varied)
    count = min(len(varied), MEASURED, MEASURED_PLACES // math.prod(features.shape[1:3]) + 1)
    some = varied[np.linspace(0, len(varied) - 1, count).astype(int)]
    sums, squares, places = 0.0, 0.0, 0
    for start in range(0, len(some), BATCH):  # all at once would take half a gigabyte
        values = features.take(some[start : start + BATCH]).astype(np.float32)
        values = values.astype(float)
        sums, squares = sums + values.sum((0, 1, 2)), squares + (values**2).sum((0, 1, 2))
        places += math.prod(values.shape[:3])
    mean = sums / places
    layer.set_weights([mean, squares / places - mean**2])
    return True
