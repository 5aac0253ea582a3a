"""Takes a sqlite store over into a server's database, whole."""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from defect_detection import PipelineError, uris
from defect_detection.operations import stores
from defect_detection.operations.stores import Relocation
from defect_detection.registry import runs, store

log = logging.getLogger(__name__)

FOLDER = "taken-over"  # of the server's artifacts


@dataclass(frozen=True)
class TakenOver:
    """What was copied.

    Attributes:
        rows: of each table.
        files: how many artifacts.
        size: their bytes.
    """

    rows: dict[str, int]
    files: int
    size: int

    def __str__(self) -> str:
        """Return it in words."""
        what = {"experiments": "experiments", "runs": "runs", "model_versions": "versions"}
        counted = ", ".join(f"{self.rows.get(name, 0)} {said}" for name, said in what.items())
        every = f"{sum(self.rows.values())} rows of {len(self.rows)} tables"
        return f"{counted} ({every}), {self.files} files of {self.size / 2**20:.1f} MB"


def take_over(source: Path, root: Path, database: str, artifacts: str) -> TakenOver:
    """Copy the tables and the artifacts of a sqlite store; the store stays as it is.

    What is written into the store after the beginning is not copied.

    Args:
        source: file of the store.
        root: folder from which relative paths of its artifacts count.
        database: URI of the server's database.
        artifacts: URI or folder of the server's artifacts.

    Raises:
        PipelineError: the database holds runs already, or the store cannot be copied.
    """
    with tempfile.TemporaryDirectory() as folder, stores.opened(database) as target:
        if stores.is_filled(target):
            raise PipelineError(
                f"{uris.without_password(database)} holds runs or models already. Nothing was "
                f"copied, since both stores count from 1: name an empty database with "
                f"SERVER_DATABASE, or delete the server's folder"
            )
        copied = Path(folder) / "mlflow.db"
        stores.copy_sqlite(source, copied)
        with store.connected(f"{uris.SQLITE}{copied}"):
            runs.end_all()  # what is open here goes on here, and never ends there
        with stores.opened(f"{uris.SQLITE}{copied}") as read:
            places, files, size = [], 0, 0
            for number, uri in enumerate(stores.local_places(read)):
                here, name = stores.folder_of(uri, root), f"{FOLDER}/{number}"
                count, total = stores.upload(here, artifacts, name)
                log.info("%d files of %s", count, here)
                files, size = files + count, size + total
                places.append(Relocation(uri, f"mlflow-artifacts:/{name}"))
            return TakenOver(stores.copy_tables(read, target, places), files, size)
