"""What finding the photographs of the real castings costs, and how right it is.

Half of the images, then all, each with a cache of its own, in a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("src", "tests", "data")]

import truth  # noqa: E402
from defect_detection.dataset import audit  # noqa: E402
from defect_detection.dataset.folder import DataFolder  # noqa: E402
from defect_detection.runtime.preprocessing import ImageFormat  # noqa: E402


def main() -> None:
    """Print a line for half of the castings, for all, for all again and for one more image."""
    if sys.argv[1:]:
        one(Path(sys.argv[1]), Path(sys.argv[2]))
        return
    if not truth.CASTINGS.is_dir():
        print("photographs: the real castings are not here (../shared/data/casting)")
        return
    paths = sorted(truth.photographs())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half = truth.link(paths[::2], folder / "half")
        most = truth.link(paths[:-1], folder / "most")
        print("pictures  seconds  MB peak  precision  recall")
        first = measure("half of them", half, folder / "a")
        measure("all but one", most, folder / "b")
        measure("one more", truth.CASTINGS, folder / "b")
        measure("all again", truth.CASTINGS, folder / "b")
        second = measure("all", truth.CASTINGS, folder / "c")
    print(f"twice the images take {second / first:.2f} times as long")


def measure(what: str, data: Path, cache: Path) -> float:
    """Audit in a process of its own, print a line, return the seconds."""
    started = time.perf_counter()
    command = [sys.executable, __file__, str(data), str(cache)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found = json.load(process.stdout)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert status == 0
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    precision, recall = truth.precision_and_recall(found)
    print(f"{len(found):8} {seconds:8.1f} {peak:8.0f} {precision:10.4f} {recall:7.4f}  {what}")
    return seconds


def one(data: Path, cache: Path) -> None:
    """Audit a data folder and print the photograph of each image as JSON."""
    json.dump(audit.inspect(DataFolder(data, cache), ImageFormat(128, 128)).groups(), sys.stdout)


if __name__ == "__main__":
    main()
