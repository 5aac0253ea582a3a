"""How audit, training, evaluation and judging grow with the number of images.

    python tests/benchmarks/growth.py [STEP ...] [--images 1000 10000]

The scripts are run as users run them, on drawn castings with four copies of each photograph:
rotated, flipped, zoomed, lit, compressed. The audit finds the photographs by itself; the other
steps are told them by `groups.csv`, so that its time does not count twice. 100,000 images take
hours.
"""

import argparse
import csv
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("src", "tests", "data")]

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402

import drawings  # noqa: E402
import sample  # noqa: E402

COPIES = 4  # of each photograph
SIZES = (1_000, 10_000, 100_000)
STEPS = {
    "audit": ["src/audit.py", "--groups", "groups.csv"],
    "train": ["src/train.py", "--set", "local"],
    "evaluation": ["src/evaluation.py"],
    "inference": ["src/inference.py", "--csv", "verdicts.csv"],
}


def main() -> None:
    """Print a line for each step and each number of images, then how each step grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--images", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "growth")
    options = parser.parse_args()
    steps = options.steps or list(STEPS)
    costs: dict[str, dict[int, Cost]] = {step: {} for step in steps}
    print(f"{'step':11}{'images':>8}{'seconds':>9}{'CPU s':>9}{'MB':>7}{'MB with files':>15}")
    for images in options.images:
        folder = options.folder / str(images)
        draw(folder / "data", images)
        for step in steps:
            groups = folder / "data" / "groups.csv"
            if step == "audit":
                groups.unlink(missing_ok=True)
            else:
                write_groups(groups)
            found = costs[step][images] = measure(folder, STEPS[step])
            print(
                f"{step:11}{images:8}{found.seconds:9.0f}{found.cpu:9.0f}{found.own:7.0f}"
                f"{found.all:15.0f}",
                flush=True,
            )
            if step == "audit":
                print(f"{'':11}precision {{:.4f}}, recall {{:.4f}}".format(*scored(folder)))
    for step, by_images in costs.items():
        few, many = min(by_images), max(by_images)
        if few < many:
            ratio = by_images[many].cpu / by_images[few].cpu
            exponent = math.log(ratio) / math.log(many / few)
            print(f"{step}: from {few} to {many} images, CPU time grows as n^{exponent:.2f}")


def draw(out: Path, images: int) -> None:
    """Draw a data folder, a tenth of it for testing; one that is there stays."""
    done = out.with_name("drawn")
    if not done.exists():
        out.mkdir(parents=True, exist_ok=True)
        numbers = range(images // COPIES)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_draw, [out] * len(numbers), numbers, chunksize=64))
        done.touch()


def _draw(out: Path, number: int) -> None:
    rng = np.random.default_rng([7, number])
    name = "def_front" if number % 2 == 0 else "ok_front"
    kind = rng.choice(list(sample.DEFECTS)) if number % 2 == 0 else None
    part = np.asarray(sample.draw(rng, kind))
    folder = out / ("test" if number % 20 < 2 else "train") / name
    folder.mkdir(parents=True, exist_ok=True)
    for copy in range(COPIES):
        made = drawings.variant(rng, part) if copy else part
        Image.fromarray(made).save(folder / f"{number:06}_{copy}.jpeg", quality=90)


def write_groups(file: Path) -> None:
    """Write which photograph each image comes from."""
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["path", "photo"])
        for image in sorted(file.parent.rglob("*.jpeg")):
            rows.writerow([image.relative_to(file.parent).as_posix(), photograph(image)])


def photograph(image: Path) -> str:
    """Return the photograph that an image is a copy of, which begins its name."""
    return image.name.partition("_")[0]


@dataclass(frozen=True)
class Cost:
    """What a run took.

    Attributes:
        seconds: until it ended.
        cpu: seconds of all its processes.
        own: most MB of all its processes together, without files, which the system can take back.
        all: most MB of the largest one, with the files it has mapped.
    """

    seconds: float
    cpu: float
    own: float
    all: float


def measure(folder: Path, call: list[str]) -> Cost:
    """Run a script in a process of its own, with all that it keeps below a folder."""
    config = yaml.safe_load((ROOT / "src" / "config.yaml").read_text())
    paths = {"cache": str(folder / "cache"), "best_model": str(folder / "best_model.json")}
    config["paths"].update(paths)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(folder / "config.yaml")]
    if "inference" in call[0]:  # with the model of `train`, released or not
        (model,) = (folder / "mlruns" / "models").glob("*/artifacts")
        options += ["--model", str(model), str(folder / "data")]
    else:
        options += ["--data", str(folder / "data")]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / call[0]), *call[1:], *options],
        cwd=folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"},
        stdout=(folder / "log").open("a"),
        stderr=subprocess.STDOUT,
    )
    peak = [0.0]
    threading.Thread(target=_watch, args=(process.pid, peak), daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, (folder / "log").read_text()
    mb = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    seconds = time.perf_counter() - started
    return Cost(seconds, usage.ru_utime + usage.ru_stime, peak[0], mb)


def _watch(process: int, peak: list[float]) -> None:
    """Note the most memory of a process and its children."""
    while Path(f"/proc/{process}").exists():
        peak[0] = max(peak[0], sum(map(_own, [process, *_children(process)])))
        time.sleep(0.2)


def _children(process: int) -> list[int]:
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, found) for one in (child, *_children(child))]


def _own(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def scored(folder: Path) -> tuple[float, float]:
    """Return precision and recall of the pairs of images that the audit says are copies."""
    with (folder / "groups.csv").open(newline="") as file:
        rows = [(row["photo"], photograph(Path(row["path"]))) for row in csv.DictReader(file)]

    def pairs(keys: list) -> int:
        return sum(math.comb(n, 2) for n in Counter(keys).values())

    both = pairs(rows)
    return both / pairs([found for found, _ in rows]), both / pairs([true for _, true in rows])


if __name__ == "__main__":
    main()
