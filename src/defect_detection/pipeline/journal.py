"""A run of a training, on disk first, so that nothing is lost if MLflow does not take it."""

import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES

from defect_detection import uris
from defect_detection.atomic import replace_atomically
from defect_detection.registry import runs, saved_model, store
from defect_detection.registry.store import first_line
from defect_detection.runtime.model_files import ServedModel

if TYPE_CHECKING:
    import keras
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

RUN, ENTRIES, FILES, MODEL = "run.json", "entries.jsonl", "files", "model"
DELIVERED = "delivered.json"  # what `RUN` becomes when MLflow has all of the run
KERAS, EXAMPLE = "model.keras", "example"


@dataclass(frozen=True)
class RunInfo:
    """What a run is called, and what MLflow has of it.

    Attributes:
        experiment: name of the experiment.
        name: of the run.
        description: of the run.
        tags: of the run.
        run_id: "" as long as MLflow has not made the run.
        model_uri: of its model; "" as long as MLflow has none.
    """

    experiment: str
    name: str
    description: str
    tags: Mapping[str, str]
    run_id: str = ""
    model_uri: str = ""

    def write(self, folder: Path) -> None:
        """Write it into the folder of the run."""
        with replace_atomically(folder / RUN) as temporary:
            temporary.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path, name: str = RUN) -> "RunInfo":
        """Read what `write` wrote."""
        return cls(**json.loads((folder / name).read_text()))


class Journal:
    """A run that is written to disk and, as long as MLflow answers, sent there at once.

    Has the calls of `mlflow` by which a training is recorded.

    Attributes:
        folder: of the run; nothing but `DELIVERED` is left there when MLflow has all of it.
        info: what MLflow has of the run.
    """

    def __init__(self, folder: Path, info: RunInfo):
        """Begin a run in a new folder."""
        # By the tag it is found if the process is killed before the run's id is written.
        token = f"{folder.parent.name}-{folder.name}"
        info = replace(info, tags={**info.tags, runs.CLAIM: token})
        self.folder, self.info = folder, info
        (folder / FILES).mkdir(parents=True)
        self.info.write(folder)
        self._entries = (folder / ENTRIES).open("a")
        self._online = True
        try:
            self._know(_start(info))
        except store.FAILURES as error:
            self._go_on_alone(error)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log parameters."""
        self._add("params", values={key: str(value) for key, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics of a step."""
        self._add("metrics", values={key: float(v) for key, v in metrics.items()}, step=step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._add("tags", values=dict(tags))

    def log_text(self, text: str, name: str) -> None:
        """Log an artifact."""
        (self.folder / FILES / name).write_text(text, encoding="utf-8")
        self._add("file", name=name)

    def log_figure(self, figure: "Figure", name: str) -> None:
        """Log a figure as an artifact."""
        figure.savefig(self.folder / FILES / name)
        self._add("file", name=name)

    def log_data(self, shape: list[int], source: str, name: str, digest: str, context: str) -> None:
        """Log a data set of uint8 images of a shape."""
        data = {"shape": shape, "source": source, "name": name, "digest": digest}
        self._add("data", data=data, context=context)

    def log_model(self, model: "keras.Model", served: ServedModel, example: bytes) -> str:
        """Log a model as `saved_model.log` does; return its URI, "" if MLflow does not take it."""
        kept = self.folder / MODEL
        kept.mkdir()
        model.save(kept / KERAS)
        (kept / EXAMPLE).write_bytes(example)
        served.save_alone(kept)
        self._add("model")  # marks that the files above are complete
        if self._online:
            try:
                self._know(replace(self.info, model_uri=saved_model.log(model, served, example)))
            except store.FAILURES as error:
                self._go_on_alone(error)
        return self.info.model_uri

    def end(self, status: str) -> None:
        """End the run with one of MLflow's statuses."""
        try:
            self._add("end", status=status)
        finally:  # or, on a full disk, MLflow ends it as FINISHED when the process ends
            self._end_in_mlflow(status)
        if self._online:
            _delete(self.folder)
        else:
            with suppress(*store.FAILURES):
                self.info = deliver(self.folder)
        self._entries.close()

    def _end_in_mlflow(self, status: str) -> None:
        if self._online:
            try:
                mlflow.end_run(status)
            except store.FAILURES as error:
                self._go_on_alone(error)

    def _know(self, info: RunInfo) -> None:
        self.info = info
        info.write(self.folder)

    def _add(self, call: str, **arguments: Any) -> None:
        entry = {"call": call, "at": int(time.time() * 1000)} | arguments
        self._entries.write(json.dumps(entry) + "\n")
        self._entries.flush()
        if self._online:
            try:
                _send(entry, self.folder)
            except store.FAILURES as error:
                self._go_on_alone(error)

    def _go_on_alone(self, error: Exception) -> None:
        log.warning(
            "MLflow does not take the run %s (%s). It goes on and is kept in %s",
            *(self.info.name, first_line(error), self.folder),
        )
        self._online = False
        _leave_run()


def deliver(folder: Path) -> RunInfo:
    """Send a run to MLflow; delete what is kept of it when MLflow has all of it.

    What MLflow has already is sent again, which changes nothing; the model is not. A run that has
    finished lacks nothing: what is kept of it may be older, from a backup.

    Raises:
        MlflowException, SQLAlchemyError, OSError: MLflow does not take it; it is kept.
        ValueError, TypeError, KeyError: the files are damaged.
    """
    _require_answer()
    info = _found(RunInfo.read(folder))
    if info.run_id and mlflow.get_run(info.run_id).info.status == "FINISHED":
        info = replace(info, model_uri=info.model_uri or saved_model.logged_by(info.run_id))
        info.write(folder)
    else:
        info = _sent(info, folder)
    _delete(folder)
    return info


def _sent(info: RunInfo, folder: Path) -> RunInfo:
    """Send all that is kept of a run to MLflow, and end it."""
    info = _start(info)
    try:
        info.write(folder)
        entries = list(_entries(folder))
        for entry in entries:
            _send(entry, folder)
        calls = {entry["call"]: entry for entry in entries}
        if "model" in calls and not info.model_uri:
            uri = saved_model.logged_by(info.run_id) or _send_model(folder / MODEL)
            info = replace(info, model_uri=uri)
            info.write(folder)
        # Whoever was killed has not written how the run ended.
        status = "FINISHED" if "model" in calls else "KILLED"
        mlflow.end_run(calls["end"]["status"] if "end" in calls else status)
    except BaseException:
        _leave_run()
        raise
    return info


def _delete(folder: Path) -> None:
    (folder / RUN).rename(folder / DELIVERED)  # first, since it makes a folder that of a run
    (folder / ENTRIES).unlink(missing_ok=True)
    for name in (FILES, MODEL):
        shutil.rmtree(folder / name, ignore_errors=True)


def _send_model(kept: Path) -> str:
    import keras  # TensorFlow takes 4 s to import

    model = keras.saving.load_model(kept / KERAS, compile=False, safe_mode=True)
    return saved_model.log(model, ServedModel.load(kept), (kept / EXAMPLE).read_bytes())


def _leave_run() -> None:
    """Make this process forget the active run; MLflow, which may not answer, is asked once."""
    before = MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
    try:
        with suppress(*store.FAILURES):
            mlflow.end_run("FAILED")
    finally:
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(before)


def _require_answer() -> None:
    if uris.is_server(mlflow.get_tracking_uri()):
        store.require_server(mlflow.get_tracking_uri())  # MLflow would try for half a minute


def _start(info: RunInfo) -> RunInfo:
    _require_answer()
    if info.run_id:
        mlflow.start_run(run_id=info.run_id)
        return info
    run = mlflow.start_run(
        experiment_id=store.open_experiment(info.experiment),
        run_name=info.name,
        description=info.description,
        tags=dict(info.tags),
    )
    runs.end_doubles(run)
    return replace(info, run_id=run.info.run_id)


def _found(info: RunInfo) -> RunInfo:
    """Return a run with its id, if MLflow has made it and the process was killed then."""
    token = info.tags.get(runs.CLAIM)
    if info.run_id or token is None:
        return info
    found = runs.with_claim(store.open_experiment(info.experiment), token)
    return replace(info, run_id=found[0].info.run_id) if found else info


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / ENTRIES).open() as file:
        for line in file:
            with suppress(ValueError):  # the last line of a process that was killed
                yield json.loads(line)


def _send(entry: Mapping[str, Any], folder: Path) -> None:
    call, run = entry["call"], mlflow.active_run()
    assert run is not None
    if call == "params":
        mlflow.log_params(entry["values"])
    elif call == "metrics":
        of_step = entry["at"], entry["step"]
        metrics = [Metric(key, value, *of_step) for key, value in entry["values"].items()]
        MlflowClient().log_batch(run.info.run_id, metrics=metrics)
    elif call == "tags":
        mlflow.set_tags(entry["values"])
    elif call == "file":
        mlflow.log_artifact(str(folder / FILES / entry["name"]))
    elif call == "data":
        log_data(**entry["data"], context=entry["context"])


def log_data(shape: list[int], source: str, name: str, digest: str, context: str) -> None:
    """Log a data set of uint8 images of a shape in the active run; `context` as in MLflow."""
    with warnings.catch_warnings():  # two of MLflow's classes fit a folder
        warnings.filterwarnings("ignore", "The specified dataset source can be interpreted")
        described = mlflow.data.from_numpy(
            np.zeros((1, *shape), np.uint8),  # for the schema
            source=source,
            name=name,
            digest=digest,
        )
    mlflow.log_input(described, context)
