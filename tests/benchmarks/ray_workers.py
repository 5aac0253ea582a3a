"""Measure `src/inference.py --ray` with one worker and with two, of a core each, in one run.

    python tests/benchmarks/ray_workers.py

With the model and the images of inference_speed.py. A call is timed as a user waits for it, with
what Ray needs to begin; and between its first and its last row.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "data", "tests", "tests/benchmarks")]

import inference_speed  # noqa: E402

REPEATS = 3


def main() -> None:
    """Judge by turns on a cluster of one node and on one of two; print rates and ratios."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = inference_speed.prepare_pictures(folder)
        model, _ = inference_speed.prepare_model(folder, sorted(images.rglob("*.jpeg")))
        found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for number in range(REPEATS):
            for nodes, measured in found.items():
                measured.append(measure(nodes, images, model, folder / f"rows-{nodes}-{number}"))
    calls, judging = (
        {nodes: statistics.median(one[part] for one in every) for nodes, every in found.items()}
        for part in (0, 1)
    )
    for title, rates in (("a call", calls), ("judging", judging)):
        print(
            f"{title}: one worker {rates[1]:.1f} images a second, two {rates[2]:.1f}: "
            f"{rates[2] / rates[1]:.2f} times as many"
        )


def measure(nodes: int, images: Path, model: Path, out: Path) -> tuple[float, float]:
    """Return the images a second of a whole call, and between its first and its last file."""
    from pyarrow import parquet
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(1, nodes):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        call = [sys.executable, "src/inference.py", images, "--model", model]
        call += ["--ray", made.address, "--parquet", out]
        started = time.perf_counter()
        subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    finally:
        made.shutdown()
    written = sorted(
        (file.stat().st_mtime, len(parquet.read_table(file))) for file in out.rglob("*.parquet")
    )
    every = sum(rows for _, rows in written)
    # The first files, one of each worker, begin before what is measured.
    first = nodes - 1
    judged = sum(rows for _, rows in written[first + 1 :])
    return every / seconds, judged / (written[-1][0] - written[first][0])


if __name__ == "__main__":
    main()
