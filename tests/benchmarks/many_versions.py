"""How long the registry takes to answer with 100, 1,000 and 10,000 versions in a sqlite store.

python tests/benchmarks/many_versions.py [N ...]
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from defect_detection.registry import promotion, runs, store, versions  # noqa: E402
from defect_detection.registry.promotion import Election  # noqa: E402
from defect_detection.service import models  # noqa: E402

from mlflow import MlflowClient  # noqa: E402  isort: skip

NAME = "Production_Reg"
COUNTS = (100, 1000, 10_000)
TAGS = {  # as many and as long as an evaluation writes
    "test_digest": "d" * 64,
    "released": "true",
    "qualified": "true",
    **{f"figure_{number}": "0 of 8 (0.0%, 95% bounds 0.0% to 36.9%)" for number in range(20)},
}


def main() -> None:
    """Fill a store, ask it, print the seconds."""
    counts = [int(one) for one in sys.argv[1:]] or COUNTS
    titles = ("versions", "champion", "without rival", "promotion", "/models", "promote --list")
    print(("{:>15}" * len(titles)).format(*titles))
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        with store.connected(uri, create=True), runs.watched(Path(folder)):
            client, known = MlflowClient(), 0
            client.create_registered_model(NAME)
            for count in counts:
                for number in range(known, count):
                    acc = 0.5 + (number * 7919 % count) / (2 * count)
                    tags = TAGS | {"acc": repr(acc)}
                    client.create_model_version(NAME, f"file://{folder}/{number}", tags=tags)
                known = count
                election = Election(NAME, TAGS["test_digest"], lambda version: True)
                champion = seconds(election.result)
                alone = seconds(lambda: versions.highest(NAME, TAGS["test_digest"], is_none))
                before = versions.in_production(NAME)
                # A second call would find that nothing is to be moved.
                promoted = seconds(lambda e=election: promotion.promote(e, "benchmark"), calls=1)
                assert versions.in_production(NAME) != before
                page = seconds(lambda: models._registry(NAME))
                listed = seconds(lambda u=uri: list_versions(u))
                took = (champion, alone, promoted, page, listed)
                print(f"{count:15}" + "".join(f"{one:15.2f}" for one in took), flush=True)


def is_none(version: versions.Version) -> bool:
    """Refuse every version."""
    return False


def seconds(call: Callable[[], object], calls: int = 2) -> float:
    """Return how long the fastest of some calls takes."""
    took = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return min(took)


def list_versions(uri: str) -> None:
    """Run `src/promote.py --list`."""
    subprocess.run(
        [sys.executable, str(ROOT / "src" / "promote.py"), "--list"],
        env={"MLFLOW_TRACKING_URI": uri},
        stdout=subprocess.DEVNULL,
        check=True,
    )


if __name__ == "__main__":
    main()
