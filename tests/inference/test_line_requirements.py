"""`requirements-line.txt`: all that a small PC at the line needs for a verdict."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, draw_part, encoded

LARGEST = 400e6  # bytes
FILE = ROOT / "requirements-line.txt"


def pins(file: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\w.]+)", file.read_text(), re.M))


def test_versions_are_those_of_the_whole():
    whole, line = pins(ROOT / "requirements.in"), pins(ROOT / "requirements-line.in")
    assert len(line) == 5
    assert line.items() <= whole.items()


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Python of a fresh environment with nothing else installed."""
    folder = tmp_path_factory.mktemp("line") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "-q", "-r", FILE]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the packages cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "python"


def test_it_is_small_and_has_neither_tensorflow_nor_mlflow(python):
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())
    assert size < LARGEST
    names = {path.name.split("-")[0].lower() for path in packages.glob("*.dist-info")}
    assert "ai_edge_litert" in names and not names & {"tensorflow", "mlflow", "keras", "scipy"}


@pytest.mark.parametrize("arguments", [["part.jpeg"], ["--model", "DIR"], []])
def test_what_it_cannot_do_is_one_line_with_the_way_out(python, model_folder, arguments):
    given = [str(model_folder) if one == "DIR" else one for one in arguments]
    command = [str(python), str(ROOT / "src/inference.py"), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith("error: ") and "is not installed. Name images and a model" in said


def test_a_model_folder_gives_a_verdict_and_a_heatmap(python, model_folder, tmp_path):
    part = tmp_path / "part.jpeg"
    part.write_bytes(encoded(draw_part(np.random.default_rng(2), defect=True)))
    command = [python, ROOT / "src/inference.py", "--model", model_folder, part]
    command += ["--heatmaps", tmp_path / "heatmaps", "--csv", tmp_path / "rows.csv"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"1 images judged: 1 (defect|ok)", done.stdout)
    assert len(list((tmp_path / "heatmaps").rglob("part.jpeg.png"))) == 1
