"""Files of saved models that are no longer what was saved."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from conftest import draw_part, encoded
from defect_detection import PipelineError
from defect_detection.runtime import checksums
from defect_detection.runtime.classifier import Classifier

COPIES = int(os.environ.get("COPIES", "200"))


def zeroed(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content))
    length = min(len(content) - start, chance.choice((1, 64, 4096)))
    return content[:start] + bytes(length) + content[start + length :]


def scattered(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(20):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def lengthened(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.choice((1, 1000)))


DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    zeroed,
    scattered,
    flipped,
    cut,
    lengthened,
]


PARTS = [encoded(draw_part(np.random.default_rng(seed), defect=seed % 2 == 0)) for seed in range(4)]


def verdicts(folder: Path) -> list[dict]:
    return [one.as_dict() for one in Classifier.load(folder).classify_all(PARTS)]


def test_no_damaged_copy_of_a_model_gives_another_verdict(model_folder, tmp_path):
    """Every file in turn; nor is a damaged copy taken for whole where all files matter."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    expected, chance = verdicts(folder), random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    known = checksums._of((folder / checksums.FILE).read_bytes())
    checksums.verify(folder, known)
    refused = 0
    for number in range(COPIES):
        path, damage = files[number % len(files)], DAMAGES[number // len(files) % len(DAMAGES)]
        whole = path.read_bytes()
        damaged = damage(whole, chance)
        path.write_bytes(damaged)
        try:
            assert verdicts(folder) == expected
        except PipelineError:
            refused += 1
        if damaged != whole and path.name != "registered_model_meta":
            with pytest.raises(ValueError):
                checksums.verify(folder, known)
        path.write_bytes(whole)
    # Of MLmodel, model.tflite, scope.npz and the checksums, nearly every damage is seen.
    assert refused > COPIES * 4 / len(files) * 0.8


@pytest.mark.parametrize("name", ["MLmodel", "model.tflite", "scope.npz", checksums.FILE])
def test_missing_file_is_refused(model_folder, tmp_path, name):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / name).unlink()
    with pytest.raises(PipelineError, match=f"holds no model .*{name}"):
        Classifier.load(folder)


def test_whole_other_model_is_not_the_expected_one(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    with pytest.raises(PipelineError, match="is not the one that was saved with the model"):
        Classifier.load(folder, expected="0" * 64)


def test_checksums_are_those_of_sha256sum(model_folder):
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    done = subprocess.run(["sha256sum", "--check", checksums.FILE], cwd=model_folder)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "change",
    [
        {"operating_point": {"threshold": float("nan"), "review_low": 0.5, "review_high": 0.5}},
        {"operating_point": {"threshold": 2.0, "review_low": 0.5, "review_high": 0.5}},
        {"operating_point": {"threshold": 0.5, "review_low": -1, "review_high": 0.5}},
        {"operating_point": {"threshold": 0.5, "review_low": 0.7, "review_high": 0.5}},
        {"operating_point": {"threshold": "0.5", "review_low": 0.5, "review_high": 0.5}},
        {"operating_point": None},
        {"class_names": ["ok_front", "def_front"]},
        {"positive_class": "ok_front"},
        {"full_evidence": float("nan")},
        {"channels": 2},
        {"bits": 3},
        {"fit": "squash"},
        {"image_size": [0, 32]},
        {"data": "../model.tflite"},
        {"data": "/etc/hostname"},
        {"scope": "../../scope.npz"},
    ],
)
def test_value_that_no_training_gives_is_refused(model_folder, tmp_path, change):
    """Also in a model without checksums, as the first versions were."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    described = yaml.safe_load((folder / "MLmodel").read_text())
    entry = described["flavors"]["litert"]
    del entry["checksums"]
    (folder / checksums.FILE).unlink()
    (folder / "MLmodel").write_text(yaml.safe_dump(described))
    assert Classifier.load(folder)
    entry.update(change)
    (folder / "MLmodel").write_text(yaml.safe_dump(described))
    with pytest.raises(PipelineError, match="holds no model that this version can serve"):
        Classifier.load(folder)


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff\xfe", pytest.param(b"[" * 5000, id="deep"), b"a", b"- 1", b"flavors: 7"],
)
def test_broken_description_is_one_line(model_folder, tmp_path, content):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / checksums.FILE).unlink()
    (folder / "MLmodel").write_bytes(content)
    with pytest.raises(PipelineError, match="holds no model that this version can serve") as raised:
        Classifier.load(folder)
    assert "\n" not in str(raised.value)
