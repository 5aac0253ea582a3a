"""Fits a model once for each part of the photographs that is held back; their mean remains."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from defect_detection import PipelineError, dataset, metrics
from defect_detection import model as network
from defect_detection.classifier import MAP, PROBABILITY
from defect_detection.features import Features
from defect_detection.metrics import Calibration
from defect_detection.model import keras, tf
from defect_detection.settings import Schedule

BATCH = 32  # of the pictures to validate on
TUNING = 0.02  # learning rate of pretrained blocks, by that of what follows them
# Variants, and places of them, that mean and variance of the features are taken of.
MEASURED, MEASURED_PLACES = 512, 2**17
AGREED = 512  # pictures that the mean of the fits is brought to agree with them on

Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class HeldBack:
    """Pictures as they are, each judged by the fit that saw nothing of its photograph.

    Attributes:
        labels: (n,), 1 = defect.
        probabilities: float32 (n,) of a defect, calibrated.
        photographs: (n,) number of the photograph that each was made from.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    photographs: np.ndarray


@dataclass(frozen=True)
class TrainingResult:
    """A fitted model with the weights of its best epoch.

    Attributes:
        model: the model.
        best_epoch: counted from 1; lowest validation loss.
        history: per epoch `loss`, `accuracy`, `val_loss`, `val_accuracy`; the validation loss
            gives each photograph of a class the same weight.
        calibration: what was done to the log-odds, so that they fit the held-back pictures.
        held_back: what the fits say of the photographs that they did not see.
        fits: how many there were.
        seconds: wall time of the fit.
    """

    model: keras.Model
    best_epoch: int
    history: dict[str, list[float]]
    calibration: Calibration
    held_back: HeldBack
    fits: int
    seconds: float

    @property
    def best(self) -> dict[str, float]:
        """The figures of the best epoch, by their names in `history`; `val_…` are calibrated."""
        found = {name: values[self.best_epoch - 1] for name, values in self.history.items()}
        return found | _validation(self.held_back)


def make_deterministic(seed: int) -> None:
    """Seed Python, NumPy and TensorFlow: on a CPU the same seed then gives the same bits."""
    keras.utils.set_random_seed(seed)


def fit(
    model: keras.Model,
    features: Features,
    schedule: Schedule,
    on_epoch: Report = lambda epoch, metrics: None,
) -> TrainingResult:
    """Fit what is not frozen in a model with AdamW and binary cross-entropy, then calibrate it.

    The photographs are divided into parts. For each part the model is fitted to the variants of
    all others; the part's pictures as they are say which epoch is best and, all parts together,
    how sure the probabilities may be. What remains is the mean of the fits' weights, which all
    began with the same ones, made as sure as the fits are. A model that was fitted before is
    fine-tuned, and is not calibrated again: it may have seen every photograph, and would be taken
    for surer each time.

    Args:
        model: as `model.build` makes it or as it was registered; its weights are changed.
        features: of its pretrained layers.
        schedule: learning rate, batch size, epochs, share held back; its seed decides the rest.
        on_epoch: is called after each epoch with its number, from 1, and its metrics.

    Raises:
        PipelineError: the loss was never a number, or there are too few photographs.
    """
    started = time.perf_counter()
    new = network.has_features(model) and _standardise(model, features)
    plain = np.flatnonzero(~features.varied)
    labels, photographs = features.labels[plain], features.photographs[plain]
    parts = dataset.validation_parts(labels, photographs, schedule.validation_share, schedule.seed)
    fits = _Fits(model, features, schedule, [np.unique(photographs[part]) for part in parts])
    history: dict[str, list[float]] = {}
    best_epoch, lowest = None, math.inf
    for epoch in range(1, schedule.epochs + 1):
        figures = fits.run(epoch)
        found = fits.judge(plain, parts)
        figures |= _validation(HeldBack(labels, found, photographs))
        for name, value in figures.items():
            history.setdefault(name, []).append(value)
        if figures["val_loss"] < lowest:
            best_epoch, lowest = epoch, figures["val_loss"]
            kept, probabilities = fits.states(), found
        on_epoch(epoch, figures)
    if best_epoch is None:
        raise PipelineError(
            f"The fit diverged: its validation loss is not a number. Lower the learning_rate, "
            f"which is {schedule.learning_rate}"
        )
    fits.merge(kept, plain, parts)
    calibration = Calibration(1, 0)
    if new:
        weights = photograph_weights(labels, photographs)
        calibration = metrics.calibration(labels, probabilities, weights)
    network.calibrate(model, calibration)
    held_back = HeldBack(labels, calibration.apply(probabilities), photographs)
    seconds = time.perf_counter() - started
    return TrainingResult(model, best_epoch, history, calibration, held_back, len(parts), seconds)


def _validation(held_back: HeldBack) -> dict[str, float]:
    labels, found = held_back.labels, held_back.probabilities
    losses = -np.log(np.clip(np.where(labels == 1, found, 1 - found), 1e-7, 1))
    weights = photograph_weights(labels, held_back.photographs)
    right = metrics.is_right(labels, found, metrics.THRESHOLD)
    return {"val_loss": float((weights * losses).sum()), "val_accuracy": float(right.mean())}


def photograph_weights(labels: np.ndarray, photographs: np.ndarray) -> np.ndarray:
    """Return weights (n,) that sum to 1, the same for each photograph of a class.

    Both classes have the same.
    """
    _, of, pictures = np.unique(
        np.stack([labels, photographs]), axis=1, return_inverse=True, return_counts=True
    )
    each = 1 / pictures[of.reshape(-1)]
    for label in (0, 1):
        each[labels == label] /= 2 * each[labels == label].sum()
    return each


class _Fits:
    """The fits of a model, one for each part of the photographs, an epoch of all at a time.

    A linear head is fitted for all parts at once, side by side. Fits of more are made in turn,
    each of them to its share of the variants, so that an epoch costs as much.
    """

    def __init__(
        self,
        model: keras.Model,
        features: Features,
        schedule: Schedule,
        parts: list[np.ndarray],
    ):
        self._model, self._features, self._schedule = model, features, schedule
        self._fitted = network.fitted(model)
        head = {MAP, PROBABILITY}
        heads = [v for layer in self._fitted.layers if layer.name in head for v in layer.variables]
        blocks = [v for v in self._fitted.trainable_variables if all(v is not h for h in heads)]
        self._at_once = not blocks and network.has_features(model)
        self._learner = network.several(model, len(parts)) if self._at_once else self._fitted

        self._varied = np.flatnonzero(features.varied)
        self._weights = np.stack([self._weigh(part) for part in parts], axis=1)
        columns = [np.arange(len(parts))] if self._at_once else np.arange(len(parts))[:, np.newaxis]
        self._columns = list(columns)

        count = math.ceil(len(self._rows(1, 0)) / schedule.batch_size)
        rate = keras.optimizers.schedules.CosineDecay(
            0.1,
            max(1, schedule.epochs * count * 19 // 20),
            warmup_target=1.0,
            warmup_steps=schedule.epochs * count // 20,
        )
        groups = [(self._learner.trainable_variables, 1.0)]
        if blocks and network.has_features(model):
            groups = [(heads, 1.0), (blocks, TUNING)]
        self._optimizers = []
        for variables, share in groups:
            optimizer = keras.optimizers.AdamW(
                _Scaled(rate, schedule.learning_rate * share),
                weight_decay=schedule.weight_decay,
            )
            optimizer.build(variables)
            self._optimizers.append((optimizer, variables))
        self._step = tf.function(self._one_step, reduce_retracing=True, autograph=False)
        self._states = [self._state() for _ in self._columns]

    def run(self, epoch: int) -> dict[str, float]:
        """Fit for an epoch; return the loss and the accuracy over its variants."""
        total = np.zeros(3)
        for number in range(len(self._columns)):
            self._restore(self._states[number])
            for batch in self._epoch(epoch, number):
                total += self._step(*batch).numpy()
            self._states[number] = self._state()
        loss, right, weight = total
        return {"loss": float(loss / weight), "accuracy": float(right / weight)}

    def judge(self, plain: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
        """Return the probabilities of pictures, each by the fit that held it back."""
        found = np.empty(len(plain), np.float32)
        if self._at_once:
            each = self._predict(plain)
            for number, part in enumerate(parts):
                found[part] = each[part, number]
            return found
        for number, part in enumerate(parts):
            self._restore(self._states[number])
            found[part] = self._predict(plain[part])[:, 0]
        return found

    def states(self) -> list[list[np.ndarray]]:
        """Return what the fits have learned so far, for `merge`."""
        return list(self._states)

    def merge(
        self, states: list[list[np.ndarray]], plain: np.ndarray, parts: list[np.ndarray]
    ) -> None:
        """Give the model the mean of the fits' weights, and make it as sure as they are.

        The mean of fits that tune a block has log-odds of another scale and shift than theirs,
        which calibration, threshold and review band are chosen for. They are moved to where they
        differ least from the mean log-odds of the fits that learned from a picture.

        Args:
            states: as `states` returned them.
            plain: numbers of the pictures as they are.
            parts: indices in `plain` of what each fit held back.
        """
        some = np.linspace(0, len(plain) - 1, min(len(plain), AGREED)).astype(int)
        each = []
        for state in states:
            self._restore(state)
            each.append(self._predict(plain[some]))
        learned = np.stack([~np.isin(some, part) for part in parts], axis=1)
        together = metrics.mean_in_log_odds(np.concatenate(each, axis=1), learned)
        self._put_mean(states)
        found = self._predict(plain[some], self._fitted)[:, 0]
        labels, photographs = self._features.labels, self._features.photographs
        weights = photograph_weights(labels[plain[some]], photographs[plain[some]])
        network.calibrate(self._model, metrics.calibration(together, found, weights))

    def _put_mean(self, states: list[list[np.ndarray]]) -> None:
        if not self._at_once:
            weights = [state[: len(self._learner.weights)] for state in states]
            self._fitted.set_weights([np.mean(one, axis=0) for one in zip(*weights, strict=True)])
            return
        self._restore(states[0])
        for name in (MAP, PROBABILITY):
            each = self._learner.get_layer(name).get_weights()
            self._model.get_layer(name).set_weights([one.mean(-1, keepdims=True) for one in each])

    def _weigh(self, part: np.ndarray) -> np.ndarray:
        """Return the weights of the variants for a fit: 0 for its part, both classes the same."""
        labels = self._features.labels[self._varied]
        weights = (~np.isin(self._features.photographs[self._varied], part)).astype(np.float32)
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
        """Yield batches of features, labels and weights, read while the one before is learned."""
        columns, size = self._columns[number], self._schedule.batch_size
        rows = self._rows(epoch, number)

        def read(start: int) -> tuple:
            chosen = np.sort(rows[start : start + size])
            numbers = self._varied[chosen]
            weights = self._weights[np.ix_(chosen, columns)]
            return self._features.take(numbers), self._features.labels[numbers], weights

        with ThreadPoolExecutor(1) as reader:
            waiting = None
            for start in range(0, len(rows), size):
                coming = reader.submit(read, start)
                if waiting is not None:
                    yield waiting.result()
                waiting = coming
            yield waiting.result()

    def _rows(self, epoch: int, number: int) -> np.ndarray:
        """Return the variants that a fit learns from in an epoch, in their order."""
        rows = np.flatnonzero(self._weights[:, self._columns[number]].any(1))
        rng = np.random.default_rng([self._schedule.seed, epoch, number])
        return rng.permutation(rows)[: math.ceil(len(self._varied) / len(self._columns))]

    def _one_step(self, values: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        targets = labels[:, tf.newaxis] * tf.ones_like(weights)
        with tf.GradientTape() as tape:
            found = self._learner(tf.cast(values, tf.float32), training=True)
            losses = weights * keras.ops.binary_crossentropy(targets, found)
            loss = tf.reduce_sum(tf.reduce_mean(losses, axis=0))
        every = [v for _, variables in self._optimizers for v in variables]
        gradients = iter(self._clipped(tape.gradient(loss, [v.value for v in every])))
        for optimizer, variables in self._optimizers:
            optimizer.apply([next(gradients) for _ in variables], variables)
        right = weights * tf.cast((found >= metrics.THRESHOLD) == (targets == 1), tf.float32)
        return tf.stack([tf.reduce_sum(losses), tf.reduce_sum(right), tf.reduce_sum(weights)])

    def _clipped(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Shorten the gradient of each fit to length 1, unless it is shorter.

        Unclipped, some fits found nothing (docs/model-notes.md).
        """
        if not self._at_once:
            return tf.clip_by_global_norm(gradients, 1.0)[0]
        squares = [tf.reduce_sum(tf.reshape(g, (-1, g.shape[-1])) ** 2, 0) for g in gradients]
        length = tf.sqrt(tf.add_n(squares))  # of each fit's, which its last axis counts
        return [g / tf.maximum(length, 1.0) for g in gradients]

    def _predict(self, numbers: np.ndarray, judge: keras.Model | None = None) -> np.ndarray:
        return np.concatenate(
            [
                (judge or self._learner).predict_on_batch(
                    self._features.take(numbers[start : start + BATCH]).astype(np.float32)
                )
                for start in range(0, len(numbers), BATCH)
            ]
        )

    def _variables(self) -> list:
        kept = [v for optimizer, _ in self._optimizers for v in optimizer.variables]
        return [*self._learner.weights, *kept]

    def _state(self) -> list[np.ndarray]:
        return [keras.ops.convert_to_numpy(v) for v in self._variables()]

    def _restore(self, state: list[np.ndarray]) -> None:
        for variable, value in zip(self._variables(), state, strict=True):
            variable.assign(value)


class _Scaled(keras.optimizers.schedules.LearningRateSchedule):
    """Another schedule times a constant."""

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, by: float):
        self.schedule, self.by = schedule, by

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        return self.by * self.schedule(step)


def _standardise(model: keras.Model, features: Features) -> bool:
    """Let a new model know mean and variance of what its head takes; they are never fitted.

    Returns:
        Whether the model is new: one that was fitted before knows them.
    """
    layer = model.get_layer(network.STANDARDISED)
    mean, _ = layer.get_weights()
    if mean.any():
        return False
    varied = np.flatnonzero(features.varied)
    count = min(len(varied), MEASURED, MEASURED_PLACES // math.prod(features.shape[1:3]) + 1)
    some = varied[np.linspace(0, len(varied) - 1, count).astype(int)]
    begin, between = model.get_layer(network.FEATURES).output, None
    if layer.input is not begin:  # blocks that are tuned come between
        between = keras.Model(begin, layer.input)
    sums, squares, places = 0.0, 0.0, 0
    for start in range(0, len(some), BATCH):  # not all at once: half a gigabyte
        values = features.take(some[start : start + BATCH]).astype(np.float32)
        if between is not None:
            values = between.predict_on_batch(values)
        values = values.astype(float)
        sums, squares = sums + values.sum((0, 1, 2)), squares + (values**2).sum((0, 1, 2))
        places += math.prod(values.shape[:3])
    mean = sums / places
    layer.set_weights([mean, squares / places - mean**2])
    return True
