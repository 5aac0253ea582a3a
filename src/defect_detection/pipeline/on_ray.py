"""Fits on a Ray cluster: each set, or each fold of a cross-validation, is a task.

A task is one process with TensorFlow, which takes as many cores as the smallest machine has. It
computes what a fit on this machine computes: the seed decides everything random. A task whose
machine dies is begun again on another.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from defect_detection import cluster
from defect_detection.dataset.split import Dataset
from defect_detection.pipeline import fit
from defect_detection.pipeline.fit import Fit, FitPlan, Fold, Observer
from defect_detection.progress import Progress
from defect_detection.runtime.decision import OperatingPoint

if TYPE_CHECKING:
    import keras

    from defect_detection.training.devices import Device

RETRIES = 3  # of a task whose machine dies


@dataclass(frozen=True)
class _Done:
    """What a task returns.

    Attributes:
        device: on which it was computed.
        epochs: number and metrics of each.
        result: a Fold; or of a fit the result, without its model.
        point: threshold and review band of a fit.
        model: of a fit, as the content of a file of Keras.
    """

    device: "Device"
    epochs: list[tuple[int, dict[str, float]]]
    result: Any
    point: OperatingPoint | None = None
    model: bytes = b""


class OnRay:
    """Fits as `pipeline.fit` does, on the connected cluster; all tasks begin at once."""

    def __init__(self, plans: Sequence[FitPlan], data: Dataset, folds: int | None = None):
        """Begin to fit each plan, or to cross-validate it with a number of folds."""
        # Mapped files are of this machine only.
        shared = ray.put(replace(data, images=np.array(data.images)))
        options = {"num_cpus": min(cluster.cores(), default=1), "max_retries": RETRIES}
        begin = ray.remote(_task).options(**options).remote
        numbers = [None] if folds is None else range(1, folds + 1)
        self._tasks = {
            one.name: [begin(one, shared, number, folds) for number in numbers] for one in plans
        }

    def fit(self, plan: FitPlan, data: Dataset, observer: Observer) -> Fit:
        """Wait for a fit; then do as `fit.fit` does."""
        done: _Done = ray.get(self._tasks[plan.name][0])
        observer.on_device(done.device)
        for number, values in done.epochs:
            observer.on_epoch(number, values)
        for part in (plan.frozen, plan.name):
            observer.progress.reached(part, 1.0)
        assert done.point is not None
        return Fit(plan, replace(done.result, model=_model_of(done.model)), done.point)

    def cross_validate(
        self, plan: FitPlan, data: Dataset, folds: int, observer: Observer
    ) -> list[Fold]:
        """Wait for the folds; then do as `fit.cross_validate` does."""

        def score(number: int) -> Fold:
            done: _Done = ray.get(self._tasks[plan.name][number - 1])
            if number == 1:
                observer.on_device(done.device)
            fold: Fold = done.result
            return fold

        scored = fit.collect(plan, folds, score, observer)
        observer.progress.reached(plan.frozen, 1.0)
        return scored


def _task(plan: FitPlan, data: Dataset, fold: int | None, folds: int | None) -> _Done:
    """Fit a plan, or a fold of it, in a process of the cluster."""
    devices: list[Device] = []
    epochs: list[tuple[int, dict[str, float]]] = []
    plan = replace(plan, sampling=replace(plan.sampling, cache=_cache(plan.sampling.cache)))
    silent = Progress(plan.name, fit.costs([plan]))
    observer = Observer(silent, devices.append, lambda *epoch: epochs.append(epoch))
    if fold is not None and folds is not None:
        scored = fit.one_fold(plan, data, (fold, folds), observer)
        return _Done(devices[0], [], scored)
    fitted = fit.fit(plan, data, observer)
    # The plan's functions are those of the script; they stay there.
    content, result = _content_of(fitted.result.model), replace(fitted.result, model=None)
    return _Done(devices[0], epochs, result, fitted.point, content)


def _cache(wanted: Path) -> Path:
    """Return the folder of the features, which another machine may have elsewhere."""
    return wanted if wanted.is_dir() else Path(tempfile.gettempdir()) / "defect-detection"


def _content_of(model: "keras.Model") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.keras"
        model.save(file)
        return file.read_bytes()


def _model_of(content: bytes) -> "keras.Model":
    import keras  # TensorFlow takes 4 s to import

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.keras"
        file.write_bytes(content)
        return keras.saving.load_model(file, compile=False, safe_mode=True)
