"""The child process of `production`: asks the registry and fetches the version in production.

It reads a `Source` as JSON from standard input and prints the version, or an error, as JSON.
"""

import gc
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from defect_detection import PipelineError, StoreError, cli, uris
from defect_detection.atomic import replace_atomically
from defect_detection.inference.production import LocalVersion, Source, short_hash
from defect_detection.runtime.model_files import ServedModel

if TYPE_CHECKING:
    from defect_detection.registry.versions import Version

VERSIONS_KEPT = 4


def main() -> None:
    """Read the source, fetch, print."""
    gc.disable()  # MLflow is imported a fifth faster; this process lives for two seconds
    source = Source(**json.load(sys.stdin))
    try:
        answer = asdict(fetch(source))
    except PipelineError as error:
        answer = {"error": str(error), "store": isinstance(error, StoreError)}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # a regular exit would take MLflow a quarter of a second


def fetch(source: Source) -> LocalVersion:
    """Return the version in production; fetch its files if they are not here.

    Raises:
        PipelineError: no version is in production, or its files cannot be fetched.
        StoreError: the registry cannot be reached.
    """
    from defect_detection.registry import saved_model, store, versions

    with store.connected(source.store):
        version = versions.in_production(source.name)
        if version is None:
            raise PipelineError(_nothing_in_production(source))
        # Other stores count versions from 1 too, but no two versions have the same source.
        folder = source.models / f"{version.name}-{version.number}-{short_hash(version.source)}"
        checksum = version.tags.get(saved_model.CHECKSUM, "")
        if not _is_whole(folder, checksum):
            _fetch_files(version, folder)
        moved = _moved_outside(source, folder)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = LocalVersion(
        version.name, version.number, version.acc, str(folder), now, checksum, moved
    )
    with replace_atomically(source.last_file) as temporary:
        temporary.write_text(json.dumps(asdict(found)))
    os.utime(folder)
    _delete_old(source.models)
    return found


def _moved_outside(source: Source, folder: Path) -> str:
    """Return a warning if the alias was moved without a record.

    It costs 25 ms, so it is asked only if that was not so or not known at the last call.
    """
    last = source.last_known()
    if last is not None and last.folder == str(folder) and not last.moved_outside:
        return ""
    from defect_detection.registry import promotion

    return promotion.moved_outside(source.name)


def _nothing_in_production(source: Source) -> str:
    """Return why no version is in production, and what to do."""
    from defect_detection.registry import versions

    start = f"No version of {source.name} has the alias {versions.PRODUCTION_ALIAS}"
    for name in filter(None, (source.name, source.testing)):
        held_back = [one for one in versions.with_accuracy(name) if not one.released]
        if held_back:
            newest = held_back[-1]
            if newest.why_not_released == versions.UNFINISHED:
                return (
                    f"{start}. {name} version {newest.number} is not released: "
                    f"{newest.why_not_released}. Run src/evaluation.py again"
                )
            return (
                f"{start}, since none is released. {name} version {newest.number}: "
                f"{newest.why_not_released}. What to try is in its report, {_report(newest)}"
            )
    return f"{start}. Train one with src/train.py, then evaluate it with src/evaluation.py"


def _report(version: "Version") -> str:
    """Return where the report of a version is."""
    import mlflow
    from mlflow.exceptions import MlflowException

    from defect_detection.registry import versions

    run = version.tags.get(versions.EVALUATED_BY, "unknown")
    try:
        uri = str(mlflow.get_run(run).info.artifact_uri)
        return f"{uris.without_password(uri)}/report.html"
    except MlflowException:  # the run was deleted
        return f"report.html of the run {run}"


def _is_whole(folder: Path, checksum: str) -> bool:
    """Return whether a version was fetched before, and its files are still those of the store."""
    try:
        ServedModel.load(folder, checksum)
    except PipelineError:
        return False
    return True


def _fetch_files(version: "Version", folder: Path) -> None:
    """Fetch the files of a version; a folder of that name is replaced.

    Raises:
        StoreError: they cannot be fetched, or are damaged.
    """
    from defect_detection.registry import saved_model

    folder.parent.mkdir(parents=True, exist_ok=True)
    with saved_model.fetched(version.uri) as files:
        try:
            ServedModel.load(files)  # versions from before checksums show damage only here
        except PipelineError as error:
            raise StoreError(f"{version.uri}: {error}") from error
        with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as beside:
            copied = shutil.copytree(files, Path(beside) / folder.name)
            if folder.is_dir():
                folder.rename(Path(beside) / "damaged")
            try:
                copied.rename(folder)
            except OSError:
                if not folder.is_dir():  # not a race with another process
                    raise


def _delete_old(models: Path) -> None:
    kept = [path for path in models.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for old in sorted(kept, key=lambda path: -path.stat().st_mtime)[VERSIONS_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main)
