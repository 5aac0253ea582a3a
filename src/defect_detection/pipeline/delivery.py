"""Trainings, each kept on disk until MLflow has all of it."""

import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from defect_detection import PipelineError, StoreError, locks
from defect_detection.atomic import replace_atomically
from defect_detection.pipeline import journal, record, tell
from defect_detection.pipeline.best_model import BestModel
from defect_detection.pipeline.journal import RunInfo
from defect_detection.pipeline.record import Trained
from defect_detection.registry import store
from defect_detection.registry.store import first_line

log = logging.getLogger(__name__)

FOLDER = "undelivered"  # below the cache
TRAINING, LOCK = "training.json", "lock"


@dataclass(frozen=True)
class Purpose:
    """What a training is for.

    Attributes:
        sets: how many sets are fitted.
        data_digest: of the training images.
        best_file: the file that names the best model, "" for a retraining, which writes none.
        sync: the call that delivers what is kept, for messages.
    """

    sets: int
    data_digest: str
    best_file: str
    sync: str


class Training:
    """A training: each set is a run, and the best of them becomes best_model.json.

    Attributes:
        folder: where it is kept.
        purpose: what it is for.
        store: name of its tracking store, as `uris.name` gives it.
        trained: the sets that were fitted, by the names of their runs' folders.
        fitted_at: when the last set was fitted, ISO 8601, UTC.
        finished: whether all of it is where it belongs.
    """

    def __init__(self, folder: Path, purpose: Purpose, store: str, trained: dict[str, Trained]):
        """Describe a training that is kept in a folder."""
        self.folder, self.purpose, self.store, self.trained = folder, purpose, store, trained
        self.fitted_at, self.finished = "", False

    @property
    def best(self) -> Trained:
        """The set with the highest validation accuracy, in a tie with the lowest loss."""
        return max(self.trained.values(), key=lambda one: (one.val_accuracy, -one.val_loss))

    @contextmanager
    def run(self, info: RunInfo) -> Iterator[list[Trained]]:
        """Open a run for the block, which puts what it fitted into the list that it gets."""
        name, fitted = f"{len(self.trained)}-{uuid.uuid4().hex[:6]}", list[Trained]()
        with record.kept_run(self.folder / name, info) as kept:
            yield fitted
            self.trained.update((name, one) for one in fitted)
            self.fitted_at = _now()
            self._write()
        self._know(name, kept.info)

    def finish(self, late: bool = False) -> str:
        """Send to MLflow what it lacks of the runs; write the file that names the best model.

        Args:
            late: whether another training may have written the file since; the later fit stays.

        Returns:
            What was written where, "" if no file is to be written.

        Raises:
            StoreError: MLflow does not take it; it is kept.
            PipelineError: the file cannot be written; what it says is kept.
        """
        for folder in sorted(path.parent for path in self.folder.glob(f"*/{journal.RUN}")):
            try:
                journal.deliver(folder)
            except (*store.FAILURES, PipelineError, ValueError, TypeError, KeyError) as error:
                lost = "" if self.purpose.best_file else ", but does not evaluate it"
                raise StoreError(
                    f"MLflow does not take what was fitted ({first_line(error)}). It is kept: "
                    f"'{self.purpose.sync}' delivers it{lost}. If nobody needs it, delete "
                    f"{self.folder}"
                ) from error
        for file in self.folder.glob(f"*/{journal.DELIVERED}"):
            self._know(file.parent.name, RunInfo.read(file.parent, file.name))
        if not self._names_best:
            self.finished = True
            return ""
        of, digest, file = self.best, self.purpose.data_digest, Path(self.purpose.best_file)
        fitted_at = self.fitted_at or _now()
        if late and BestModel.time_of(file) > fitted_at:
            log.warning("%s names a model that was fitted later, and stays", file)
            self.finished = True
            return ""
        BestModel(of.run_id, of.model_uri, of.val_accuracy, digest, fitted_at).write(file)
        self.finished = True
        return f"{of.name}, written to {file}"

    @property
    def _names_best(self) -> bool:
        return bool(self.purpose.best_file) and len(self.trained) == self.purpose.sets

    def delete_if_done(self) -> None:
        """Delete what is kept unless MLflow lacks a run, or the file that names the best model."""
        lacking = any(self.folder.glob(f"*/{journal.RUN}"))
        if not lacking and (self.finished or not self._names_best):
            shutil.rmtree(self.folder)

    def _know(self, name: str, info: RunInfo) -> None:
        """Note what MLflow has of a run."""
        if name in self.trained:
            known = replace(self.trained[name], run_id=info.run_id, model_uri=info.model_uri)
            if known != self.trained[name]:
                self.trained[name] = known
                self._write()

    def _write(self) -> None:
        trained = {name: asdict(one) for name, one in self.trained.items()}
        kept = {
            "purpose": asdict(self.purpose),
            "store": self.store,
            "trained": trained,
            "fitted_at": self.fitted_at,
        }
        with replace_atomically(self.folder / TRAINING) as temporary:
            temporary.write_text(json.dumps(kept))


@contextmanager
def training(cache: Path, purpose: Purpose) -> Iterator[Training]:
    """Keep a training below `cache`; delete it after the block if nothing is left to do."""
    name = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    made = Training(cache / FOLDER / name, purpose, store.connected_name(), {})
    made.folder.mkdir(parents=True)
    with locks.held(made.folder / LOCK, make=True):
        made._write()
        try:
            yield made
        finally:
            made.delete_if_done()


def deliver_all(cache: Path, strict: bool = False) -> None:
    """Deliver what former trainings left for the connected store, and print what was delivered.

    Trainings of processes that are still running are left alone, and so are those for other
    stores, which `strict` names. What MLflow does not take is kept, with a warning.

    Args:
        cache: as for `training`.
        strict: whether what MLflow does not take is an error; all others are delivered before.

    Raises:
        PipelineError: MLflow does not take something, or a file cannot be written, and `strict` is
            set.
    """
    failed = None
    for folder in sorted(path.parent for path in (cache / FOLDER).glob(f"*/{TRAINING}")):
        # Another process may have just delivered and deleted the folder.
        with locks.held(folder / LOCK, make=True) as free:
            former = _read(folder) if free else None
            if former is None:
                continue
            if former.store != store.connected_name():
                if strict:
                    log.warning("%s is for the store %s, and stays", folder, former.store)
                continue
            try:
                best = former.finish(late=True)
            except PipelineError as error:
                log.warning("%s", error)
                failed = error
            else:
                former.delete_if_done()
                if former.trained:
                    tell.delivered([one.name for one in former.trained.values()], best)
    if strict and failed is not None:
        raise failed


def move(cache: Path, before: str, after: str, best_file: str) -> None:
    """Let the trainings that are kept below `cache` be for another store.

    Args:
        cache: as for `training`.
        before: name of the store that they were for, as `uris.name` gives it.
        after: name of the other store.
        best_file: the file that names the best model from now on.
    """
    for folder in sorted(path.parent for path in (cache / FOLDER).glob(f"*/{TRAINING}")):
        found = _read(folder)
        if found is not None and found.store == before:
            if found.purpose.best_file:
                found.purpose = replace(found.purpose, best_file=best_file)
            found.store = after
            found._write()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _read(folder: Path) -> Training | None:
    try:
        known = json.loads((folder / TRAINING).read_text())
        trained = {name: Trained(**one) for name, one in known["trained"].items()}
        found = Training(folder, Purpose(**known["purpose"]), known["store"], trained)
        found.fitted_at = str(known.get("fitted_at", ""))  # former versions did not keep it
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read (%s). Delete it", folder / TRAINING, error)
        return None
