"""Verdicts as rows of a file, written as they come; a file that was cut off is gone on with."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from types import TracebackType

from defect_detection import PipelineError
from defect_detection.classifier import Verdict


@dataclass(frozen=True)
class Row:
    """One picture's outcome.

    Attributes:
        path: as it was given.
        verdict: "defect", "ok", "unknown" or "error".
        probability: of a defect, in [0, 1]; None with an error.
        review: whether a person should look.
        reason: why it is unknown or an error, else "".
        model: that judged it.
    """

    path: str
    verdict: str
    probability: float | None
    review: bool
    reason: str
    model: str

    @classmethod
    def of(cls, path: str, verdict: Verdict, model: str) -> "Row":
        """Make the row of a verdict, the probability to six places."""
        values = verdict.as_dict()
        if values["probability"] is not None:
            values["probability"] = round(values["probability"], 6)
        return cls(path=path, **values, model=model)

    def __str__(self) -> str:
        """Say it in a line."""
        verdict = Verdict(self.verdict, self.probability, self.review, self.reason)
        return f"{self.path}  {verdict}"


COLUMNS = [field.name for field in fields(Row)]


class RowFile:
    """A file of rows, written out as they come."""

    def __init__(self, path: Path, resume: bool):
        """Open a file; what is in it is replaced, unless it is to be gone on with.

        With `resume`, a last row that was cut off is taken away.

        Raises:
            PipelineError: it cannot be written, or is to be gone on with and holds something else.
        """
        self._known: set[str] = set()
        kept = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                with path.open("rb") as file:
                    kept = self._read(file, path)
            self._file = path.open("r+b" if kept else "wb")
            if kept:
                self._file.truncate(kept)
                self._file.seek(kept)
        except OSError as error:
            raise PipelineError(f"{path}: cannot be written ({error.strerror})") from error
        self._path = path
        if not kept:
            self._write(self._head())

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

    def holds(self, path: str) -> bool:
        """Say whether there was a row of a picture when the file was opened."""
        return path in self._known

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows out, but of pictures that the file had one of when it was opened."""
        self._write("".join(self._line(row) for row in rows if row.path not in self._known))

    def _write(self, text: str) -> None:
        try:
            # File names need not be UTF-8; what is not comes out as it came in.
            self._file.write(text.encode("utf-8", "surrogateescape"))
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # else whoever closes it tries to write the same again
                self._file.close()
            raise PipelineError(f"{self._path}: cannot be written ({error.strerror})") from error

    def _read(self, file: Iterable[bytes], path: Path) -> int:
        """Note the paths of the whole rows; return where the last of them ends."""
        end, read, whole, cut_off = 0, 0, True, False

        def lines() -> Iterator[str]:
            nonlocal read, whole
            for line in file:
                read, whole = read + len(line), line.endswith(b"\n")
                yield line.decode("utf-8", "surrogateescape")

        for number, found in enumerate(self._paths(lines()), start=1):
            if cut_off or (found is None and whole):
                raise PipelineError(
                    f"{path}: row {number} is no verdict with the columns {','.join(COLUMNS)}. "
                    f"Give another file, or leave --resume out to write it anew"
                )
            cut_off = not whole  # which only the last can be
            if not cut_off:
                self._known.add(found)
                end = read
        return end

    def _head(self) -> str:
        raise NotImplementedError

    def _line(self, row: Row) -> str:
        raise NotImplementedError

    def _paths(self, lines: Iterator[str]) -> Iterator[str | None]:
        """Return the path of each row, None of what is no row; "" of the head."""
        raise NotImplementedError


class JsonLines(RowFile):
    """A JSON object a line."""

    def _head(self) -> str:
        return ""

    def _line(self, row: Row) -> str:
        return json.dumps(asdict(row)) + "\n"

    def _paths(self, lines: Iterator[str]) -> Iterator[str | None]:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row["path"] if isinstance(row, dict) and list(row) == COLUMNS else None


class Csv(RowFile):
    """Comma-separated values with a head; `review` is yes or no."""

    def _head(self) -> str:
        return self._joined(COLUMNS)

    def _line(self, row: Row) -> str:
        return self._joined(
            "yes" if value is True else "no" if value is False else value for value in astuple(row)
        )

    @staticmethod
    def _joined(values: Iterable[object]) -> str:
        text = io.StringIO()
        csv.writer(text).writerow(values)
        return text.getvalue()

    def _paths(self, lines: Iterator[str]) -> Iterator[str | None]:
        for number, row in enumerate(csv.reader(lines)):
            if number == 0:
                yield "" if row == COLUMNS else None
            else:
                yield row[0] if len(row) == len(COLUMNS) else None
