"""Measure `src/inference.py --ray` with one worker and with two, of a core each, in one run.

    python tests/benchmarks/ray_workers.py

With the model and the images of inference_speed.py. A call is timed as a user waits for it, with
what Ray needs to begin; and between its first and its last row. What the same machine does with one
process and with two, without Ray, is printed beside: two cores may share what makes them fast.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "data", "tests", "tests/benchmarks")]

import inference_speed  # noqa: E402

from defect_detection.inference.judge import CHUNK, Item, NamedModel, judge  # noqa: E402

REPEATS = 3


def main() -> None:
    """Judge by turns on a cluster of one node and on one of two; print rates and ratios."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = inference_speed.prepare_pictures(folder)
        model, _ = inference_speed.prepare_model(folder, sorted(images.rglob("*.jpeg")))
        found: dict[int, list[tuple[float, float, float]]] = {1: [], 2: []}
        for number in range(REPEATS):
            for nodes, measured in found.items():
                with_ray = measure(nodes, images, model, folder / f"rows-{nodes}-{number}")
                measured.append((*with_ray, without_ray(nodes, images, model)))
    for part, title in enumerate(("a call", "judging", "without Ray")):
        rates = {of: statistics.median(one[part] for one in every) for of, every in found.items()}
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


def without_ray(processes: int, images: Path, model: Path) -> float:
    """Return the images a second of processes that have loaded a model each."""
    paths = sorted(images.rglob("*.jpeg"))
    batches = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawned, _load, (str(model),)) as pool:
        list(pool.map(_judge, batches[: 2 * processes]))
        started = time.perf_counter()
        judged = sum(pool.map(_judge, batches))
        return judged / (time.perf_counter() - started)


def _load(model: str) -> None:
    global _model
    _model = NamedModel.load(model, model)


def _judge(paths: list[Path]) -> int:
    return len(judge(_model, [Item(str(path), path) for path in paths]))


if __name__ == "__main__":
    main()
