"""A retraining as the files in its folder tell it, also where some of them are damaged."""

import json
import os
import re
from dataclasses import asdict, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from defect_detection.atomic import replace_atomically

T = TypeVar("T")

JOB, PROCESS, PROGRESS, ENDED = "job.json", "process.json", "progress.json", "ended.json"
PREPARED, RESULT = "result.next", "result.json"
LOG = "log"
LAST_LINES = 5

ID = r"^[0-9]{8}-[0-9]{6}-[0-9]{6}-[0-9a-f]{4}$"
_STRICT = ConfigDict(strict=True)


def _moment(text: str) -> str:
    datetime.fromisoformat(text)
    return text


Moment = Annotated[str, AfterValidator(_moment)]  # ISO 8601


@dataclass(frozen=True)
class Job:
    """One retraining.

    Attributes:
        id: sorts by the time of its start.
        state: "running" as long as its process lives, then "succeeded", "failed" or "cancelled".
        created_at: ISO 8601, UTC.
        ended_at: likewise, None while it runs.
        parameters: those that replace re_train.yaml's values.
        progress: `epoch` of `epochs`, from 0; empty before the fit starts.
        run_id: the MLflow run, None before there is one.
        result: `registry`, `version`, `acc`; empty until it has registered its model.
        message: why it failed or was ended, and which of its files are damaged; else empty.
        started_by: address, right and program of the caller; empty where it is not known.
        ended_by: likewise, of the one who cancelled it.
    """

    id: str
    state: str
    created_at: str
    ended_at: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)
    run_id: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    started_by: str = ""
    ended_by: str = ""


@dataclass(frozen=True, config=_STRICT)
class Created:
    """`job.json`; its fields are those of `Job`."""

    created_at: Moment
    parameters: dict[str, int | FiniteFloat]
    started_by: str = ""


@dataclass(frozen=True, config=_STRICT)
class Process:
    """`process.json`.

    Attributes:
        pid: of the job's process, which leads a group of its own.
        started: seconds of `time.monotonic`, which counts from the start of the machine, as the
            job does not outlive that; None in files of former versions.
    """

    pid: Annotated[int, Field(gt=1, lt=2**31)]
    started: FiniteFloat | None = None


@dataclass(frozen=True, config=_STRICT)
class Progress:
    """`progress.json`: `epoch` of `epochs` has ended, in an MLflow run."""

    epoch: int
    epochs: int
    run_id: str | None = None


@dataclass(frozen=True, config=_STRICT)
class Result:
    """`result.json`: what was registered. The same in `result.next`, before it is in force."""

    registry: str
    version: int
    acc: FiniteFloat


@dataclass(frozen=True, config=_STRICT)
class Ended:
    """`ended.json`: why a job was ended, by whom and when; former versions wrote neither."""

    state: Literal["failed", "cancelled"]
    message: str
    by: str = ""
    at: Moment | None = None


class Damaged(Exception):
    """A file of a job is there but cannot be read."""


def new_id(now: datetime, random: str) -> str:
    """Return the id of a job that starts now, in UTC; `random` are four hexadecimal digits."""
    return f"{now:%Y%m%d-%H%M%S-%f}-{random}"


def is_id(text: str) -> bool:
    """Return whether a text has the form of an id."""
    return re.fullmatch(ID, text) is not None


def ids(folder: Path) -> list[str]:
    """Return the ids of the jobs in a folder, newest first."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if is_id(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(found, reverse=True)


def write(path: Path, content: Any) -> None:
    """Write a dataclass as a file of a job, atomically.

    Raises:
        PipelineError: the disk is full, or the folder cannot be written.
    """
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps(asdict(content)))


def read(path: Path, kind: type[T]) -> T | None:
    """Read a file of a job into the dataclass `kind`; None if there is no such file.

    Raises:
        Damaged: it is no file or holds something else.
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise Damaged(path.name)
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError:  # deleted in this moment
        return None
    except (OSError, ValidationError) as error:
        raise Damaged(path.name) from error


def known(path: Path, kind: type[T]) -> T | None:
    """Read a file of a job as `read` does; None also if it is damaged."""
    try:
        return read(path, kind)
    except Damaged:
        return None


def tail(path: Path, most: int) -> tuple[int, str]:
    """Return how many bytes of a file are left out, and its last `most` bytes as text.

    What is no file or cannot be read counts as empty.
    """
    try:
        if not path.is_file():
            return 0, ""
        with path.open("rb") as file:
            left_out = max(0, os.fstat(file.fileno()).st_size - most)
            file.seek(left_out)
            return left_out, file.read(most).decode(errors="replace")
    except OSError:
        return 0, ""


def read_job(folder: Path, alive: bool, said: Ended | None = None) -> Job:
    """Return the job of a folder.

    Args:
        folder: of the job, whose name is the id.
        alive: whether the job's process lived just before this call; if not, it has written its
            last file.
        said: why it was ended, if that is not on the disk; None reads the disk.
    """
    damaged: list[str] = []

    def part(name: str, kind: type[T]) -> T | None:
        try:
            return read(folder / name, kind)
        except Damaged:
            damaged.append(name)
            return None

    created, progress = part(JOB, Created), part(PROGRESS, Progress)
    result, prepared = part(RESULT, Result), part(PREPARED, Result)
    ended = said or part(ENDED, Ended)
    part(PROCESS, Process)
    if created is None and JOB not in damaged:
        damaged.append(JOB)
    state = "running" if alive else "succeeded" if result else ended.state if ended else "failed"
    told = [] if alive else _message(folder, ended, result, prepared)
    if damaged:
        told.append(_damage(damaged))
    return Job(
        id=folder.name,
        state=state,
        created_at=created.created_at if created else iso(_time_of(folder.name)),
        ended_at=None if alive else _ended_at(folder, ended, result),
        parameters=created.parameters if created else {},
        progress={"epoch": progress.epoch, "epochs": progress.epochs} if progress else {},
        run_id=progress.run_id if progress else None,
        result=asdict(result) if result else {},
        message="\n".join(told),
        started_by=created.started_by if created else "",
        ended_by=ended.by if ended else "",
    )


def iso(moment: datetime) -> str:
    """Return a moment as text, in milliseconds."""
    return moment.isoformat(timespec="milliseconds")


def _message(
    folder: Path, ended: Ended | None, result: Result | None, prepared: Result | None
) -> list[str]:
    """Return why a job ended as it did, in lines."""
    lines = [line for line in tail(folder / LOG, 4096)[1].splitlines() if line.strip()]
    if result:
        late = "but too late: it had registered its model by then"
        if ended:
            return [f"{ended.message}, {late}"]
        return [line for line in lines[-1:] if line.startswith("error: ")]  # after it
    told = [ended.message] if ended else lines[-LAST_LINES:]
    if prepared:
        told.append(
            f"It had registered {prepared.registry} version {prepared.version}; "
            f"'python src/promote.py --list' shows whether prod moved"
        )
    return told


def _damage(names: list[str]) -> str:
    told = f"Damaged or missing in its folder: {', '.join(names)}"
    if RESULT in names or PREPARED in names:
        told += ". It had registered a version; 'python src/promote.py --list' shows them"
    return told


def _ended_at(folder: Path, ended: Ended | None, result: Result | None) -> str | None:
    if ended and ended.at and not result:
        return ended.at
    last = folder / (RESULT if result else ENDED if ended else LOG)
    try:
        return iso(datetime.fromtimestamp(last.stat().st_mtime, timezone.utc))
    except (OSError, ValueError, OverflowError):
        return None


def _time_of(job_id: str) -> datetime:
    """Return the time in an id; years and months that there are not count as 1970."""
    try:
        return datetime.strptime(job_id[:22], "%Y%m%d-%H%M%S-%f").replace(tzinfo=timezone.utc)
    except ValueError:
        return datetime.fromtimestamp(0, timezone.utc)
