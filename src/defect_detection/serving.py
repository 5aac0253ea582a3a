"""The model behind prod, kept on this machine and followed when the alias moves.

A process of its own asks the registry and fetches what is not yet here: MLflow takes two seconds
and 230 MB, which whoever judges pictures for months need not hold.
"""

import gc
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from defect_detection import PipelineError, StoreError, script, settings
from defect_detection.files import replacing
from defect_detection.settings import Config

if TYPE_CHECKING:
    from defect_detection.registry import Version

log = logging.getLogger(__name__)

ASK_EVERY = 60  # seconds, while pictures are watched for
ANSWER_WITHIN = 120  # seconds
VERSIONS_KEPT = 4


@dataclass(frozen=True)
class Served:
    """A version of which the files are here.

    Attributes:
        name: of the registered model.
        number: of the version.
        acc: its test accuracy, in [0, 1].
        folder: of its files.
        asked_at: when the registry said that it is behind prod; ISO 8601, UTC.
    """

    name: str
    number: int
    acc: float
    folder: str
    asked_at: str

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.name} version {self.number}"


class Production:
    """Follows the version behind prod."""

    def __init__(self, store: str, name: str, cache: Path):
        """Begin to ask the registry; `current` waits for the answer.

        Args:
            store: URI of the tracking store.
            name: of the registered model.
            cache: folder of what is kept.
        """
        self._last = _last(store, name, cache)
        self._served: Served | None = None
        self._lost = False  # whether it was said that the registry does not answer
        self._begin()

    def current(self) -> Served:
        """Return the version behind prod; without a registry, the one that was there last.

        Raises:
            PipelineError: there is none, or neither the registry nor a kept version.
        """
        if self._served is None:
            self._served = self._answer()
        return self._served

    def moved(self) -> bool:
        """Ask again from time to time, without waiting; say whether `current` is another now."""
        if self._asking is None:
            if time.monotonic() - self._asked >= ASK_EVERY:
                self._begin()
            return False
        late = time.monotonic() - self._asked > ANSWER_WITHIN
        if self._asking.poll() is None and not late:
            return False
        before = self.current()
        try:
            self._served = self._answer()
        except PipelineError as error:  # the alias was taken away, say: what is loaded goes on
            if not self._lost:
                log.warning("Going on with %s: %s", before, error)
            self._lost = True
        return self._served.folder != before.folder

    def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.kill()
            self._asking.communicate()
            self._asking = None

    def _begin(self) -> None:
        self._asked = time.monotonic()
        self._asking: subprocess.Popen | None = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _answer(self) -> Served:
        asking, self._asking = self._asking, None
        with asking:
            try:
                said, _ = asking.communicate(
                    timeout=max(0, self._asked + ANSWER_WITHIN - time.monotonic())
                )
                answer = json.loads(said)
            except subprocess.TimeoutExpired:
                answer = {"error": f"No answer in {ANSWER_WITHIN} s", "store": True}
            except ValueError:
                answer = {"error": "The registry cannot be asked; see above", "store": False}
            finally:
                asking.kill()
        if "error" not in answer:
            self._lost = False
            return Served(**answer)
        try:
            kept = Served(**json.loads(self._last.read_text()))
        except (OSError, ValueError, TypeError):
            kept = None
        if not answer["store"] or kept is None or not Path(kept.folder).is_dir():
            raise PipelineError(answer["error"])
        if not self._lost:
            log.warning("%s. Taking %s, behind prod on %s", answer["error"], kept, kept.asked_at)
        self._lost = True
        return kept


def main() -> None:
    """Ask which version is behind prod, fetch its files if they are not here, and print it."""
    gc.disable()  # for two seconds: MLflow is imported a fifth faster
    try:
        answer = asdict(_ask())
    except PipelineError as error:
        answer = {"error": str(error), "store": isinstance(error, StoreError)}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # all is written; taking MLflow down takes a quarter of a second


def _ask() -> Served:
    from defect_detection import registry, tracking

    env = settings.environment()
    config = settings.read_yaml(settings.CONFIG_FILE, Config)
    store, name = settings.tracking_uri(env), config.mlflow.production_model_name
    cache = settings.from_root(config.paths.cache)
    with tracking.connected(store):
        version = registry.production_version(config.mlflow)
        folder = _folder(version, cache)
        if not folder.is_dir():
            _fetch(version, folder)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    served = Served(name, version.number, version.acc, str(folder), now)
    with replacing(_last(store, name, cache)) as temporary:
        temporary.write_text(json.dumps(asdict(served)))
    os.utime(folder)
    _delete_old(folder.parent)
    return served


def _last(store: str, name: str, cache: Path) -> Path:
    """Return the file that says which version of a store was behind prod last."""
    return cache / "models" / f"prod-{_short(store)}-{name}.json"


def _folder(version: "Version", cache: Path) -> Path:
    # Other stores count from 1 as well: where a version was logged is its own.
    name = f"{version.name}-{version.number}-{_short(version.source)}"
    return cache / "models" / name


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fetch(version: "Version", folder: Path) -> None:
    from defect_detection import tracking

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tracking.fetched(version.uri) as files:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as beside:
            copied = shutil.copytree(files, Path(beside) / folder.name)
            try:
                copied.rename(folder)
            except OSError:
                if not folder.is_dir():  # no other process was quicker: a real error
                    raise


def _delete_old(folder: Path) -> None:
    kept = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for old in sorted(kept, key=lambda path: -path.stat().st_mtime)[VERSIONS_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    script.run(main)
