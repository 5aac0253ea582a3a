"""Writes into a project all the time: versions, verdicts, labels. Runs until it is killed.

python tests/busy.py KIND ROOT
"""

import io
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

NAME = "Production_Reg"
NOTE = "note.txt"
PAUSE = 0.05  # seconds


def register_versions(root: Path) -> None:
    """Register one model again and again, each time from a run with an artifact."""
    import mlflow

    from defect_detection.registry import store, versions

    with store.connected(f"sqlite:///{root}/mlflow.db"):
        model = versions.with_accuracy(NAME)[0]
        experiment = store.open_experiment("busy")
        for number in numbers():
            with mlflow.start_run(experiment_id=experiment) as run:
                mlflow.log_text(f"{number}\n" * 10_000, NOTE)
                run_id = run.info.run_id
                tags = {"released": "false", "not_released": "busy", "busy": run_id}
                versions.register(model.source, run_id, 0.5, "busy", NAME, tags)


def log_verdicts(root: Path) -> None:
    """Judge one image again and again."""
    from defect_detection.inference.judge import Item, Judged, NamedModel
    from defect_detection.inference.verdict_log import Origin, Rules, VerdictLog
    from defect_detection.registry import saved_model, store
    from defect_detection.runtime.classifier import Verdict

    with store.connected(f"sqlite:///{root}/mlflow.db"):
        with saved_model.fetched(f"models:/{NAME}/1") as files:
            model = NamedModel.load(f"{NAME}/1", str(files))
    log = VerdictLog(root / ".line", Rules())
    for number in numbers():
        content = noise(number)
        verdict = Verdict("defect", 0.9, True, "", np.zeros((4, 4), np.float32))
        log.add([Judged(Item(f"{number}.png", content), verdict, model, 1)], [Origin("predict")])


def label(root: Path) -> None:
    """Label images, and approve, reject and take back by turns."""
    from defect_detection.dataset.inbox import Inbox, Seen

    inbox = Inbox(root / "data")
    for number in numbers():
        seen = Seen(number, "defect", 0.9, f"{NAME}/1", "review", str(number))
        made = inbox.add("ok_front", "Ada", seen, noise(number), blind=False)
        if number % 4 == 0:
            inbox.approve(made.id, "Grace")
        elif number % 4 == 1:
            inbox.reject(made.id, "Grace")
        elif number % 4 == 2:
            inbox.take_back(made.id, "Ada")


def numbers() -> Iterator[int]:
    """Count, slowly enough that a test of many backups can end."""
    for number in itertools.count():
        yield number
        time.sleep(PAUSE)


def noise(number: int) -> bytes:
    """Return a PNG that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 255, (64, 64), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


KINDS = {"versions": register_versions, "verdicts": log_verdicts, "labels": label}

if __name__ == "__main__":
    KINDS[sys.argv[1]](Path(sys.argv[2]))
