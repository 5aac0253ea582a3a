"""`src/inference.py` as a person or a line runs it, with a model's folder."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, Project, draw_part, encoded, wait_for

SCRIPT = "src/inference.py"


@pytest.fixture(scope="module")
def line(tmp_path_factory, model_folder):
    """A copy of the project with nothing that says where a store is."""
    project = Project(tmp_path_factory.mktemp("line") / "project")
    (project.root / ".env").unlink()
    (project.root / "src" / "config.yaml").unlink()
    shutil.copytree(model_folder, project.root / "model")
    return project


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encoded(draw_part(rng, defect=number % 2 == 0)) for number in range(20)]


@pytest.fixture
def pictures(tmp_path, parts) -> Path:
    for number, part in enumerate(parts):
        path = tmp_path / "pictures" / str(number % 3) / f"{number:02}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)
    return tmp_path / "pictures"


def infer(line, *arguments, input: bytes = b"", cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, line.root / SCRIPT, "--model", line.root / "model", *map(str, arguments)],
        cwd=cwd or line.root,
        env=line.environment(),
        input=input,
        capture_output=True,
        timeout=100,
    )


def rows(file: Path) -> list[dict]:
    return [json.loads(one) for one in file.read_text().splitlines()]


def test_folder_glob_list_and_standard_input_give_the_same_verdicts(line, pictures, parts):
    expected = sorted(pictures.rglob("*.jpeg"))
    by_folder = infer(line, pictures).stdout.decode().splitlines()
    assert [out.split("  ")[0] for out in by_folder] == [str(path) for path in expected]
    assert infer(line, pictures / "*" / "*.jpeg").stdout.decode().splitlines() == by_folder
    listed = "\n".join(map(str, expected)).encode()
    for arguments, stdin in ((["-"], listed), ([pictures / "list"], b"")):
        (pictures / "list").write_bytes(listed)
        done = infer(line, "--files-from", *arguments, input=stdin)
        assert done.stdout.decode().splitlines() == by_folder
    (alone,) = infer(line, "-", input=expected[4].read_bytes()).stdout.decode().splitlines()
    assert alone.split("  ")[1:] == by_folder[4].split("  ")[1:]


def test_neither_store_nor_settings_are_needed_with_a_model(line, pictures):
    done = infer(line, next(pictures.rglob("*.jpeg")))
    assert done.returncode == 0, done.stderr
    assert "No such file" not in done.stderr.decode()


def test_broken_pictures_are_rows_and_the_exit_code_says_so(line, pictures):
    (pictures / "1" / "00.png").write_bytes(b"")
    shutil.copy(ROOT / "README.md", pictures / "1" / "99.png")
    done = infer(line, pictures, "--csv", pictures / "rows.csv", "--jsonl", pictures / "rows.jsonl")
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: 2 of 22 images cannot be read. Replace")
    assert "22 images judged: " in done.stdout.decode() and "2 error" in done.stdout.decode()
    with (pictures / "rows.csv").open(newline="") as file:
        found = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    assert len(found) == 22
    assert found["00.png"]["verdict"] == found["99.png"]["verdict"] == "error"
    assert found["99.png"]["reason"] == "is none of JPEG, PNG, BMP, TIFF, WEBP"
    assert sum(row["verdict"] in ("defect", "ok") for row in found.values()) == 20
    assert [row["path"] for row in rows(pictures / "rows.jsonl")] == [
        row["path"] for row in found.values()
    ]


def test_exit_code_3_unless_every_picture_is_ok(line, pictures, tmp_path):
    judged = {}
    for out in infer(line, pictures).stdout.decode().splitlines():
        path, verdict, *_ = out.split("  ")
        judged.setdefault(verdict, path)
    # A model that learned nothing says one thing or the other.
    assert judged and judged.keys() <= {"defect", "ok"}
    for verdict, path in judged.items():
        done = infer(line, path, "--fail-on-defect")
        assert done.returncode == (3 if verdict == "defect" else 0)
    black = tmp_path / "black.png"
    Image.new("L", (96, 96)).save(black)
    done = infer(line, black)
    assert (done.returncode, done.stdout.decode().split("  ")[1]) == (0, "unknown")
    assert infer(line, black, "--fail-on-defect").returncode == 3
    assert infer(line, "gone.png", "--fail-on-defect").returncode == 3


def test_heatmaps_have_the_names_of_their_pictures(line, pictures, tmp_path):
    (pictures / "0" / "broken.png").write_bytes(b"")
    heat = tmp_path / "heat"
    # The absolute path leads to the same pictures.
    infer(line, "pictures", tmp_path / "pictures" / "0", "--heatmaps", heat, cwd=tmp_path)
    names = [path.name for path in pictures.rglob("*.jpeg")]
    assert len(set(names)) == len(names)
    assert {path.name for path in heat.iterdir()} == {f"{name}.png" for name in names}
    # A second picture of one name does not replace the first.
    other = tmp_path / "other" / names[0]
    other.parent.mkdir()
    shutil.copy(next(pictures.rglob(names[1])), other)
    done = infer(line, next(pictures.rglob(names[0])), other, "--heatmaps", tmp_path / "two")
    assert done.returncode == 0
    stem = Path(names[0]).stem
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(names) == 2 and names[1] == f"{stem}.jpeg.png"
    assert re.fullmatch(rf"{stem}-[0-9a-f]{{8}}\.jpeg\.png", names[0])
    # Nor does a later run, which draws each again into its own file.
    before = (tmp_path / "two" / f"{stem}.jpeg.png").read_bytes()
    infer(line, other, "--heatmaps", tmp_path / "two")
    infer(line, next(pictures.rglob(names[1].removesuffix(".png"))), "--heatmaps", tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    assert (tmp_path / "two" / f"{stem}.jpeg.png").read_bytes() == before


def test_heatmap_says_verdict_and_threshold_below_the_picture(line, pictures, tmp_path):
    part = next(pictures.rglob("*.jpeg"))
    infer(line, part, "--heatmaps", tmp_path / "heat")
    with Image.open(tmp_path / "heat" / f"{part.name}.png") as image:
        assert image.mode == "RGB" and image.width == 320 and image.height > 350
        caption = np.asarray(image)[320:]
    assert (caption == 255).all(-1).mean() > 0.5  # white
    assert (caption < 60).all(-1).sum() > 100  # and written on
    assert (caption[..., 0] - caption[..., 2].astype(int)).max() > 150  # with the scale


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.png", "--resume"],
        ["a.png", "--csv", "x", "--jsonl", "x"],
        ["-", "--files-from", "-"],
        ["a.png", "--watch", "."],
        ["--watch", ".", "--fail-on-defect"],
        [".", "--heatmaps", "below"],
        ["a.png", "--json", "x"],
    ],
)
def test_options_that_contradict_each_other_are_refused(line, arguments):
    done = infer(line, *arguments)
    assert done.returncode == 2
    assert b"error: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "gone"], "gone is not a folder"),
        (["re_train"], "re_train holds no .jpeg"),
        (["a.png", "--csv", "."], ".: cannot be written"),
        (["--files-from", "gone.txt"], "gone.txt: No such file"),
        (["a.png", "--model", "src"], "src holds no model"),
    ],
)
def test_what_is_wrong_is_one_line(line, arguments, message):
    done = infer(line, *arguments)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: ") and message in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


def test_reader_that_has_seen_enough_ends_it_without_a_word(line, pictures):
    command = [sys.executable, line.root / SCRIPT, "--model", line.root / "model", pictures]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(20) == 141


def test_resume_skips_what_the_file_holds(line, pictures):
    file = pictures / "rows.jsonl"
    infer(line, pictures, "--jsonl", file)
    whole = file.read_bytes()
    half = len(whole) // 2
    file.write_bytes(whole[:half])
    done = infer(line, pictures, "--jsonl", file, "--resume")
    assert file.read_bytes() == whole
    missing = 20 - len(whole[:half].splitlines()) + 1
    assert done.stdout.decode().startswith(f"{missing} images judged: ")


def test_nothing_heavy_is_imported(line, pictures):
    program = (
        "import atexit, runpy, sys;"
        "heavy = ('tensorflow', 'keras', 'mlflow', 'sklearn', 'scipy', 'cv2', 'matplotlib',"
        " 'pandas', 'tqdm');"
        "say = lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr);"
        "atexit.register(say); sys.path.insert(0, 'src');"
        f"sys.argv = ['inference.py', '--model', 'model', {str(pictures)!r}];"
        "runpy.run_path('src/inference.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=line.root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


class Watching:
    """`inference.py --watch` in the background."""

    def __init__(self, line, folder: Path, file: Path):
        folder.mkdir(exist_ok=True)
        self.folder, self.file = folder, file
        self.command = [sys.executable, line.root / SCRIPT, "--model", line.root / "model"]
        self.command += ["--watch", folder, "--jsonl", file]
        self.environment = line.environment()
        self.process = None

    def start(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*self.command, *arguments], env=self.environment, stderr=subprocess.PIPE, text=True
        )
        assert "Watching" in self.process.stderr.readline()

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.communicate(timeout=20)

    def names(self) -> list[str]:
        return [Path(row["path"]).name for row in rows(self.file)]


@pytest.fixture
def watching(line, tmp_path):
    made = Watching(line, tmp_path / "arriving", tmp_path / "rows.jsonl")
    yield made
    if made.process.poll() is None:
        made.end(signal.SIGKILL)


def test_picture_that_is_written_in_pieces_is_judged_once_when_it_is_whole(watching, parts):
    watching.start()
    with (watching.folder / "slow.jpeg").open("wb", buffering=0) as file:
        step = len(parts[0]) // 5
        for begin in range(0, len(parts[0]) - step, step):
            file.write(parts[0][begin : begin + step])
            time.sleep(0.3)
        assert watching.names() == []
        file.write(parts[0][begin + step :])
        wait_for(watching.names, seconds=3)
    os.utime(watching.folder / "slow.jpeg", (1, 1))
    (watching.folder / "next.jpeg").write_bytes(parts[1])
    wait_for(lambda: len(watching.names()) > 1, seconds=3)
    time.sleep(0.5)
    assert watching.names() == ["slow.jpeg", "next.jpeg"]
    assert rows(watching.file)[0]["verdict"] in ("defect", "ok")
    watching.end(signal.SIGTERM)
    assert watching.process.returncode == 143


def test_a_thousand_pictures_at_once_and_kills_lose_none_and_judge_none_twice(
    watching, parts, tmp_path
):
    dropped = [f"{number:04}.jpeg" for number in range(1000)]
    source = tmp_path / "prepared"
    source.mkdir()
    for number, name in enumerate(dropped):
        (source / name).write_bytes(parts[number % 20])
    watching.start()
    source.rename(watching.folder / "at once")
    for _ in range(3):  # killed at any moment, between rows or within one
        before = len(watching.names())
        wait_for(lambda: len(watching.names()) >= min(1000, before + 100))  # noqa: B023
        watching.end(signal.SIGKILL)
        watching.start("--resume")
    wait_for(lambda: len(watching.names()) >= 1000)
    time.sleep(0.5)
    assert sorted(watching.names()) == dropped
