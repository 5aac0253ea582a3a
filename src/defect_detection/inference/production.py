"""The model in production, kept on this machine and followed when the alias prod moves.

A child process (`fetch`) asks the registry and fetches the files that are not here yet: MLflow
takes two seconds and 230 MB, which a process that judges images for months need not hold.
"""

import hashlib
import json
import logging
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defect_detection import PipelineError, uris

log = logging.getLogger(__name__)

FETCH = "defect_detection.inference.fetch"  # the module that the child process runs
ASK_EVERY = 60  # seconds, while a folder is watched
ANSWER_WITHIN = 120  # seconds


@dataclass(frozen=True)
class LocalVersion:
    """A version of a registered model whose files are on this machine.

    Attributes:
        name: of the registered model.
        number: of the version.
        acc: its test accuracy, in [0, 1].
        folder: of its files.
        asked_at: when the registry said that it has the alias prod; ISO 8601, UTC.
        checksum: the SHA-256 of its checksums, "" for versions from before there were any.
        moved_outside: what is wrong with the record of the alias, "" if nothing is.
    """

    name: str
    number: int
    acc: float
    folder: str
    asked_at: str
    checksum: str = ""
    moved_outside: str = ""

    def __str__(self) -> str:
        """Return its name in words."""
        return f"{self.name} version {self.number}"


@dataclass(frozen=True)
class Source:
    """Where a model in production comes from.

    Attributes:
        store: URI of the tracking store.
        name: of the registered model.
        cache: folder of the files on this machine.
        testing: the registered model of those below the accuracy that production takes.
    """

    store: str
    name: str
    cache: str
    testing: str = ""

    @property
    def models(self) -> Path:
        """The folder of fetched versions."""
        return Path(self.cache) / "models"

    @property
    def last_file(self) -> Path:
        """The file that says which version had the alias prod last."""
        return self.models / f"prod-{short_hash(uris.place(self.store))}-{self.name}.json"

    def last_known(self) -> LocalVersion | None:
        """Return the version that had the alias prod last, None if that is not known here."""
        try:
            last = LocalVersion(**json.loads(self.last_file.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return last if Path(last.folder).is_dir() else None


class Production:
    """Follows the version that has the alias prod."""

    def __init__(
        self, store: str, name: str, cache: Path, testing: str = "", every: float | None = None
    ):
        """Start to ask the registry; `current` waits for the answer.

        Args:
            store: URI of the tracking store.
            name: of the registered model.
            cache: folder of the files on this machine.
            testing: as in `Source`.
            every: seconds after which `moved` asks again by itself; None for `ASK_EVERY`.
        """
        self._source = Source(store, name, str(cache), testing)
        self._every = ASK_EVERY if every is None else every
        self._version: LocalVersion | None = None
        self._former: LocalVersion | None = None
        self._child: subprocess.Popen[str] | None = None
        self._lost = False  # whether it was logged that the registry does not answer
        self._said = ""  # what was logged about the record of the alias
        self._ask()

    def current(self) -> LocalVersion:
        """Return the version in production; if the registry cannot be reached, the last known one.

        Raises:
            PipelineError: there is no version in production, or the registry cannot be reached
                and no version is known.
        """
        if self._version is None:
            self._version = self._answer()
        return self._version

    def moved(self) -> bool:
        """Ask again from time to time, without waiting; return whether `current` changed."""
        if self._child is None:
            self.ask(self._every)
            return False
        late = time.monotonic() - self._asked > ANSWER_WITHIN
        if self._child.poll() is None and not late:
            return False
        before = self._former = self.current()
        try:
            self._version = self._answer()
        except PipelineError as error:  # for instance, the alias was deleted
            if not self._lost:
                log.warning("Continuing with %s: %s", before, error)
            self._lost = True
        return self.current().folder != before.folder

    def ask(self, after: float) -> bool:
        """Ask if the registry was not asked for some seconds; return whether it is asked now.

        `moved` tells what it says.
        """
        due = self._child is None and time.monotonic() - self._asked >= after
        if due:
            self._ask()
        return due

    def put_back(self) -> None:
        """Go on with the version before, whose model is still loaded; `moved` tells anew."""
        self._version = self._former

    def close(self) -> None:
        """Stop asking."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _ask(self) -> None:
        self._asked = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", FETCH],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._child = child
        assert child.stdin is not None
        # Not on the command line, which every user of the machine can read: a URI may hold a
        # password.
        with suppress(BrokenPipeError):  # a child that has died gives no answer
            child.stdin.write(json.dumps(vars(self._source)))
            child.stdin.close()
        child.stdin = None  # else `communicate` would flush it

    def _answer(self) -> LocalVersion:
        answer = self._read_answer()
        if "error" not in answer:
            self._lost = False
            found = LocalVersion(**answer)
            if found.moved_outside and found.moved_outside != self._said:
                log.warning("%s", found.moved_outside)
            self._said = found.moved_outside
            return found
        last = self._source.last_known()
        if not answer["store"] or last is None:
            raise PipelineError(answer["error"])
        if not self._lost:
            log.warning("%s. Using %s, in production on %s", answer["error"], last, last.asked_at)
        self._lost = True
        return last

    def _read_answer(self) -> dict[str, Any]:
        child, self._child = self._child, None
        assert child is not None
        with child:
            try:
                left = max(0, self._asked + ANSWER_WITHIN - time.monotonic())
                said, _ = child.communicate(timeout=left)
                answer: dict[str, Any] = json.loads(said)
                return answer
            except subprocess.TimeoutExpired:
                return {"error": f"No answer in {ANSWER_WITHIN} s", "store": True}
            except ValueError:
                return {"error": "The registry cannot be asked; see above", "store": False}
            finally:
                child.kill()


def short_hash(text: str) -> str:
    """Return a hash for file names."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
