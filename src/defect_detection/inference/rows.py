"""Verdicts as rows of files that can be resumed after an interruption."""

import csv
import io
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import get_args

from defect_detection import PipelineError, locks
from defect_detection.atomic import defused, replace_atomically, restored
from defect_detection.names import printable
from defect_detection.runtime.classifier import Verdict, VerdictName

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """The verdict on one image, as it is written.

    Attributes:
        path: of the image, as the user named it.
        verdict: "defect", "ok", "unknown" or "error".
        probability: of a defect, in [0, 1]; None with an error.
        review: whether a person should look.
        reason: why it is unknown or an error, else "".
        model: which model judged it.
    """

    path: str
    verdict: VerdictName
    probability: float | None
    review: bool
    reason: str
    model: str

    @classmethod
    def of(cls, path: str, verdict: Verdict, model: str) -> "Row":
        """Return the row of a verdict, with the probability rounded to six places."""
        values = verdict.as_dict()
        if values["probability"] is not None:
            values["probability"] = round(values["probability"], 6)
        return cls(path=path, **values, model=model)

    def __str__(self) -> str:
        """Return the row in a line for a terminal."""
        verdict = Verdict(self.verdict, self.probability, self.review, self.reason)
        return printable(f"{self.path}  {verdict}")

    def coloured(self) -> str:
        """Return the row in a line, in the colour of its verdict for a terminal."""
        return f"\033[{COLOURS[kind(self.verdict, self.review)]}m{self}\033[0m"


def kind(verdict: str, review: bool) -> str:
    """Return how a verdict is shown: as itself, or as "review" if it is near the threshold."""
    return "review" if review and verdict in ("defect", "ok") else verdict


# As terminals number them: red, green, yellow, magenta.
COLOURS = {"defect": 31, "ok": 32, "review": 33, "unknown": 35, "error": 35}
COLUMNS = [field.name for field in fields(Row)]
VERDICTS = get_args(VerdictName)
LONGEST = 1 << 16  # bytes of a row
REST = 20  # after a rewrite, the next one waits at least for so many times its duration


class RowFile:
    """A file of rows, each written as soon as it is added, by one process at a time.

    Rows are appended. Before each write, the file must be as the last one left it.
    """

    def __init__(self, path: Path, resume: bool):
        """Open a new or empty file, or go on with one that holds rows.

        A last row that is incomplete is deleted.

        Raises:
            PipelineError: another process writes it, it holds something other than rows, it holds
                rows that are not to be resumed, or it cannot be written.
        """
        self._path = path
        self._kept: dict[str, str] = {}  # verdicts of earlier runs
        self._errors: set[str] = set()  # images whose last row is an error
        self._replaced: set[str] = set()  # those that have a newer row than an error
        self._size = 0
        self._rewritten, self._took = 0.0, 0.0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._regular = path.is_file() or not path.exists()  # else a pipe or a device
            self._file = _locked(path) if self._regular else path.open("wb", buffering=0)
            try:
                if self._regular:
                    self._go_on(resume)
                if not self._size:
                    self._write(self._header())
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> "RowFile":
        """Return the file."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def kept(self, path: str) -> str | None:
        """Return the verdict on an image by an earlier run; None if it is an error."""
        return self._kept.get(path)

    def forget(self, path: str) -> None:
        """Forget the verdict on an image by an earlier run, since the next is on another image."""
        self._kept.pop(path, None)

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows, except for images that have one from an earlier run.

        Raises:
            PipelineError: the file cannot be written, or something else has changed it.
        """
        new = [row for row in rows if self._kept.pop(row.path, None) is None]
        self._write("".join(map(self._line, new)))
        for row in new:
            self._note(row.path, row.verdict)

    def settle(self) -> None:
        """Delete the error rows of images that have a newer row.

        A file whose rewriting takes long is rewritten seldom; until then a call does nothing.

        Raises:
            PipelineError: something else has changed the file.
        """
        started = time.monotonic()
        resting = started < self._rewritten + REST * self._took
        if not self._regular or not self._replaced or resting:
            return
        self._check()
        try:
            self._rewrite()
        except (PipelineError, OSError) as error:  # such as a full disk; no row is lost
            log.warning("%s: error rows that have a newer row stay there: %s", self._path, error)
        self._replaced.clear()
        self._rewritten = time.monotonic()
        self._took = self._rewritten - started

    def _note(self, path: str, verdict: str) -> None:
        """Remember which error rows are to be deleted."""
        if path in self._errors:
            self._replaced.add(path)
        (self._errors.add if verdict == "error" else self._errors.discard)(path)

    def _rewrite(self) -> None:
        rows = enumerate(self._rows())
        newest = {values[0]: n for n, (_, values) in rows if values and values[0] in self._replaced}

        def wanted() -> Iterator[bytes]:
            for number, (raw, values) in enumerate(self._rows()):
                if not values or values[1] != "error" or number >= newest.get(values[0], 0):
                    yield raw

        before, copy = os.fstat(self._file.fileno()), None
        try:
            with replace_atomically(Path(os.path.realpath(self._path))) as temporary:
                with temporary.open("wb") as file:
                    file.writelines(wanted())
                copy = _locked(temporary, say=False)  # the lock goes with it
                self._check()
        except BaseException:
            if copy is not None:
                copy.close()
            raise
        self._file.close()
        self._file = copy
        self._size = os.fstat(copy.fileno()).st_size
        with suppress(OSError):
            os.fchmod(copy.fileno(), stat.S_IMODE(before.st_mode))
            os.fchown(copy.fileno(), before.st_uid, before.st_gid)

    def _write(self, text: str) -> None:
        # File names need not be UTF-8; other bytes are written as they were read.
        data, written = text.encode("utf-8", "surrogateescape"), 0
        self._check()
        try:
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            with suppress(OSError):  # whole rows only
                if self._regular and os.fstat(self._file.fileno()).st_size == self._size + written:
                    self._file.truncate(self._size)
            raise self._unwritable(error) from error
        self._size += written

    def _check(self) -> None:
        """Raise PipelineError unless the file is as it was left after the last write."""
        if not self._regular:
            return
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            what = "was moved or deleted"
        except OSError as error:
            raise self._unwritable(error) from error
        else:
            if not os.path.samestat(found, os.fstat(self._file.fileno())):
                what = "was replaced by another file"
            elif found.st_size != self._size:
                what = f"was changed, from {self._size} to {found.st_size} bytes,"
            else:
                return
        raise PipelineError(
            f"{self._path} {what} while rows were written. Images without a row in it were not "
            f"judged: start again with --resume"
        )

    def _unwritable(self, error: OSError) -> PipelineError:
        return PipelineError(f"{self._path}: cannot be written ({error.strerror})")

    def _go_on(self, resume: bool) -> None:
        """Remember the rows of the file, and delete a last one that is incomplete."""
        count, rest = 0, b""
        for number, (raw, values) in enumerate(self._rows(), start=1):
            if rest or (values is None and self._is_whole(raw)):
                raise self._foreign(number - bool(rest))
            if values is None:
                rest = raw  # the last row can be incomplete
                continue
            self._size += len(raw)
            if number > 1 or not self._header():
                count += 1
                path, verdict = values
                self._note(path, verdict)
                self.forget(path)
                if verdict != "error":
                    self._kept[path] = verdict
        if rest and not self._may_begin(rest):
            raise self._foreign(count + 1)
        if count and not resume:
            raise PipelineError(
                f"{self._path} holds {count} rows: continue with --resume, or delete it first"
            )
        if rest:
            log.warning(
                "%s: its last row is incomplete and is deleted: %s",
                *(self._path, printable(rest.decode(errors="replace"))),
            )
            self._file.truncate(self._size)

    def _foreign(self, number: int) -> PipelineError:
        return PipelineError(
            f"{self._path}: row {number} is no verdict with the columns {','.join(COLUMNS)}. "
            f"Correct it, or give another file"
        )

    def _may_begin(self, rest: bytes) -> bool:
        """Return whether an incomplete last row can be the beginning of one."""
        if len(rest) >= LONGEST or b"\r\n" in rest:
            return False
        first = self._beginning()
        return bool(self._size) or first.startswith(rest) or rest.startswith(first)

    def _rows(self) -> Iterator[tuple[bytes, tuple[str, str] | None]]:
        """Yield each row: its bytes; path and verdict, or None if it is no whole row.

        The header of a CSV file has neither path nor verdict.
        """
        raw, first = b"", True
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            while line := file.readline(LONGEST):
                raw += line
                whole = self._is_whole(raw)
                if whole or len(raw) >= LONGEST:
                    text = raw.decode("utf-8", "surrogateescape")
                    yield raw, self._parsed(text, first) if whole else None
                    raw, first = b"", False
        if raw:
            yield raw, None

    def _header(self) -> str:
        raise NotImplementedError

    def _beginning(self) -> bytes:
        """Return how a file with rows begins."""
        raise NotImplementedError

    def _line(self, row: Row) -> str:
        raise NotImplementedError

    def _is_whole(self, raw: bytes) -> bool:
        """Return whether lines are a row, not only the beginning of one."""
        raise NotImplementedError

    def _parsed(self, text: str, first: bool) -> tuple[str, str] | None:
        """Return path and verdict of a row, the first of the file or a later one."""
        raise NotImplementedError


def _locked(path: Path, say: bool = True) -> io.FileIO:
    """Open a file to read it and to append, once no other process does; make it if need be.

    Args:
        path: of the file.
        say: whether to log that there are no locks, as on some network shares.

    Raises:
        PipelineError: another process does.
        OSError: it cannot be opened.
    """
    while True:
        file = path.open("a+b", buffering=0)
        if not locks.take_on_share(file.fileno(), path, say):
            file.close()
            raise PipelineError(
                f"{path}: another run writes rows there. Wait for its end, or give another file"
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # it was replaced between opening and locking


class JsonLines(RowFile):
    """One JSON object in each line."""

    def _header(self) -> str:
        return ""

    def _beginning(self) -> bytes:
        return b'{"path": "'

    def _line(self, row: Row) -> str:
        return json.dumps(asdict(row)) + "\n"

    def _is_whole(self, raw: bytes) -> bool:
        return raw.endswith(b"\n")

    def _parsed(self, text: str, first: bool) -> tuple[str, str] | None:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict) or list(row) != COLUMNS or not isinstance(row["path"], str):
            return None
        return (row["path"], row["verdict"]) if row["verdict"] in VERDICTS else None


class Csv(RowFile):
    """Comma-separated values with a header; `review` is yes or no."""

    def _header(self) -> str:
        return self._joined(COLUMNS)

    def _beginning(self) -> bytes:
        return self._header().encode()

    def _line(self, row: Row) -> str:
        return self._joined(map(self._cell, astuple(row)))

    @staticmethod
    def _cell(value: object) -> object:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return defused(value) if isinstance(value, str) else value

    @staticmethod
    def _joined(values: Iterable[object]) -> str:
        text = io.StringIO()
        csv.writer(text).writerow(values)
        return text.getvalue()

    def _is_whole(self, raw: bytes) -> bool:
        return raw.endswith(b"\n") and raw.count(b'"') % 2 == 0  # a name may hold ends of lines

    def _parsed(self, text: str, first: bool) -> tuple[str, str] | None:
        try:
            row = next(csv.reader([text]))
        except csv.Error:
            return None
        if first:
            return ("", "") if row == COLUMNS else None
        if len(row) != len(COLUMNS) or row[1] not in VERDICTS:
            return None
        return restored(row[0]), row[1]


class Output:
    """Where rows go: into files, or to standard output if there are none."""

    def __init__(self, files: list[RowFile], coloured: bool = False):
        """Write rows into files, or to standard output, in colour if it is a terminal."""
        self._files, self._coloured = files, coloured
        self._writing = threading.Lock()

    def __bool__(self) -> bool:
        """Return whether rows go into files."""
        return bool(self._files)

    def kept(self, path: str) -> str | None:
        """Return the verdict of an earlier run on an image, if every file has it and no error.

        If the files differ, it is one that is not ok.
        """
        verdicts = [file.kept(path) for file in self._files]
        if not verdicts or None in verdicts:
            return None
        return max(verdicts, key=lambda verdict: verdict != "ok")

    def take(self, path: str) -> bool:
        """Return whether an earlier run has a verdict on an image, and forget it.

        The next row under this path is on another image.
        """
        has = self.kept(path) is not None
        if has:
            for file in self._files:
                file.forget(path)
        return has

    def put(self, rows: list[Row]) -> None:
        """Write rows.

        Raises:
            PipelineError: a file cannot be written.
        """
        with self._writing:
            for file in self._files:
                file.add(rows)
            if not self._files:
                lines = [row.coloured() if self._coloured else str(row) for row in rows]
                print(*lines, sep="\n", flush=True)

    def settle(self) -> None:
        """Delete error rows that have been replaced, as `RowFile.settle` does."""
        with self._writing:
            for file in self._files:
                file.settle()

    def pause(self) -> None:
        """Let no row be written from now on, so that none is cut off when the process ends."""
        self._writing.acquire(timeout=1)
