"""Verdicts as rows of files that can be resumed after an interruption."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from types import TracebackType

from defect_detection import PipelineError
from defect_detection.runtime.classifier import Verdict, VerdictName


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
        """Return the row in a line."""
        verdict = Verdict(self.verdict, self.probability, self.review, self.reason)
        return f"{self.path}  {verdict}"

    def coloured(self) -> str:
        """Return the row in a line, in the colour of its verdict for a terminal."""
        colour = "review" if self.review and self.verdict in ("defect", "ok") else self.verdict
        return f"\033[{COLOURS[colour]}m{self}\033[0m"


# As terminals number them: red, green, yellow, magenta.
COLOURS = {"defect": 31, "ok": 32, "review": 33, "unknown": 35, "error": 35}
COLUMNS = [field.name for field in fields(Row)]


class RowFile:
    """A file of rows, each written as soon as it is added."""

    def __init__(self, path: Path, resume: bool):
        """Open a file and delete its content, or resume it.

        Resuming keeps the rows and deletes a last row that is incomplete.

        Raises:
            PipelineError: it cannot be written, or holds something else than rows to resume.
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
            self._write(self._header())

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
        """Return whether the file had a row for an image when it was opened."""
        return path in self._known

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows, except for images that had one when the file was opened."""
        self._write("".join(self._line(row) for row in rows if row.path not in self._known))

    def _write(self, text: str) -> None:
        try:
            # File names need not be UTF-8; other bytes are written as they were read.
            self._file.write(text.encode("utf-8", "surrogateescape"))
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # closing it later would write the same again
                self._file.close()
            raise PipelineError(f"{self._path}: cannot be written ({error.strerror})") from error

    def _read(self, file: Iterable[bytes], path: Path) -> int:
        """Remember the paths of the complete rows; return where the last of them ends."""
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
                    f"Give another file, or omit --resume to overwrite it"
                )
            cut_off = not whole  # only the last can be incomplete
            if not cut_off and found is not None:
                self._known.add(found)
                end = read
        return end

    def _header(self) -> str:
        raise NotImplementedError

    def _line(self, row: Row) -> str:
        raise NotImplementedError

    def _paths(self, lines: Iterator[str]) -> Iterator[str | None]:
        """Yield the path of each row, None for something else, "" for the header."""
        raise NotImplementedError


class JsonLines(RowFile):
    """One JSON object in each line."""

    def _header(self) -> str:
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
    """Comma-separated values with a header; `review` is yes or no."""

    def _header(self) -> str:
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


class Output:
    """Where rows go: into files, or to standard output if there are none."""

    def __init__(self, files: list[RowFile], coloured: bool = False):
        """Write rows into files, or to standard output, in colour if it is a terminal."""
        self._files, self._coloured = files, coloured

    def __bool__(self) -> bool:
        """Return whether rows go into files."""
        return bool(self._files)

    def holds(self, path: str) -> bool:
        """Return whether every file has a row for an image from an earlier run."""
        return bool(self._files) and all(file.holds(path) for file in self._files)

    def put(self, rows: list[Row]) -> None:
        """Write rows.

        Raises:
            PipelineError: a file cannot be written.
        """
        for file in self._files:
            file.add(rows)
        if not self._files:
            lines = [row.coloured() if self._coloured else str(row) for row in rows]
            print(*lines, sep="\n", flush=True)
