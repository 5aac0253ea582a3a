"""Runs that end, whatever becomes of the process that opened them.

A process that opens a run holds a lock on a file that names it. The lock ends with the process, so
the next one on this machine finds what those that were killed, or failed, have left half done.
"""

import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from defect_detection import locks, uris
from defect_detection.registry import store, versions
from defect_detection.registry.store import first_line

log = logging.getLogger(__name__)

FOLDER = "open-runs"  # below the cache
CLAIM = "process"  # tag of a run by which it is found before its id was written down

_folder: Path | None = None  # of the files of the runs that this process opens


@dataclass(frozen=True)
class _Claim:
    """A run that a process has opened, or is going to.

    Attributes:
        store: name of the tracking store, as `uris.name` gives it.
        experiment_id: of the run; "" if the run is known by its id.
        run_id: "" if the run is known by the tag `CLAIM`.
    """

    store: str
    experiment_id: str = ""
    run_id: str = ""


@contextmanager
def watched(cache: Path) -> Iterator[None]:
    """End the runs of processes that were killed, then watch over those of the block.

    Args:
        cache: folder below which the processes of this machine know of each other.
    """
    global _folder
    _heal(cache / FOLDER)
    before, _folder = _folder, cache / FOLDER
    try:
        yield
    finally:
        _folder = before


@contextmanager
def opened(experiment_id: str, name: str, tags: Mapping[str, str], after: int = 0) -> Iterator[Run]:
    """Open a run for the block, within the active one if there is one.

    Args:
        experiment_id: of the run.
        name: of the run.
        tags: of the run.
        after: milliseconds since 1970 at or after which it begins, whatever the clock says.
    """
    token, active = uuid.uuid4().hex, mlflow.active_run()
    tags = {**tags, CLAIM: token} | ({MLFLOW_PARENT_RUN_ID: active.info.run_id} if active else {})
    claim = _Claim(store.connected_name(), experiment_id=experiment_id)
    with store.patience(), _claimed(token, claim):
        made = MlflowClient().create_run(
            experiment_id,
            start_time=max(after, int(time.time() * 1000)),
            tags=resolve_tags(tags),
            run_name=name,
        )
        end_doubles(made)
        with mlflow.start_run(run_id=made.info.run_id, nested=True) as run:
            yield run
            if uris.is_server(mlflow.get_tracking_uri()):
                _delete(versions.half_registered(made.info.run_id))  # likewise


def end_doubles(run: Run) -> None:
    """End what was made beside a run: MLflow's client repeats a call whose answer is lost."""
    token = run.data.tags.get(CLAIM)
    if token is None or not uris.is_server(mlflow.get_tracking_uri()):
        return
    for one in with_claim(run.info.experiment_id, token):
        if one.info.run_id != run.info.run_id and one.info.status == "RUNNING":
            MlflowClient().set_terminated(one.info.run_id, "KILLED")


@contextmanager
def reopened(run_id: str) -> Iterator[Run]:
    """Open a run that had ended again, for the block."""
    claim = _Claim(store.connected_name(), run_id=run_id)
    with store.patience(), _claimed(uuid.uuid4().hex, claim):
        with mlflow.start_run(run_id=run_id) as run:
            yield run


def with_claim(experiment_id: str, token: str) -> list[Run]:
    """Return the runs of an experiment with a value of the tag `CLAIM`, the newest first."""
    return MlflowClient().search_runs([experiment_id], f"tags.{CLAIM} = '{token}'")


@contextmanager
def _claimed(token: str, claim: _Claim) -> Iterator[None]:
    """Hold the lock on a file that names a run for the block."""
    if _folder is None:
        yield
        return
    _folder.mkdir(parents=True, exist_ok=True)
    file, hidden = _folder / f"{token}.json", _folder / f".{token}"
    with hidden.open("w") as held:
        locks.take(held.fileno())  # nobody else knows the file yet
        json.dump(asdict(claim), held)
        held.flush()
        hidden.rename(file)  # it is locked when others see it
        yield
        # After an error it stays: what the run had begun may be half done.
        file.unlink(missing_ok=True)


def _find(token: str, claim: _Claim) -> Run | None:
    if not claim.run_id:
        return next(iter(with_claim(claim.experiment_id, token)), None)
    try:
        return mlflow.get_run(claim.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _heal(folder: Path) -> None:
    """End what processes left in the connected store that were killed, and say so."""
    for file in sorted(folder.glob("*.json")):
        with locks.held(file) as free:
            claim = _read(file) if free else None
            if claim is None or claim.store != store.connected_name():
                continue
            try:
                _end(_find(file.stem, claim))
            except store.FAILURES as error:
                log.warning("A run that was left cannot be ended now (%s)", first_line(error))
            else:
                file.unlink(missing_ok=True)


def end_all() -> None:
    """End all open runs of the connected store, and delete all half registered versions.

    For a store in which nobody works yet, such as one that was just restored.
    """
    wanted = "attributes.status = 'RUNNING'"
    while found := mlflow.search_runs(
        search_all_experiments=True, filter_string=wanted, output_format="list"
    ):
        for run in found:
            MlflowClient().set_terminated(run.info.run_id, "KILLED")
            log.warning("The run %s was open. It is ended", run.info.run_name)
    _delete(versions.half_registered())


def _end(run: Run | None) -> None:
    if run is None:
        return
    end_doubles(run)
    if run.info.status == "RUNNING":
        MlflowClient().set_terminated(run.info.run_id, "KILLED")
        name = run.info.run_name
        log.warning("The run %s of a process that was killed was still open. It is ended", name)
    _delete(versions.half_registered(run.info.run_id))


def _delete(half: Iterable[versions.Version]) -> None:
    for version in half:
        done = versions.withdraw(version)
        log.warning("%s %s: its evaluation did not end", version.uri, done)


def _read(file: Path) -> _Claim | None:
    try:
        return _Claim(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be read (%s). Delete it", file, error)
        return None
