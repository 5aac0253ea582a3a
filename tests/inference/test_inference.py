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


def command(line, *arguments) -> list[str]:
    words = [sys.executable, line.root / SCRIPT, "--model", line.root / "model", *arguments]
    return [one if isinstance(one, bytes) else str(one) for one in words]


def infer(line, *arguments, input: bytes = b"", cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(line, *arguments),
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
        ["a.png", "--json", "x"],
        ["a.png", "--csv", "x", "--jsonl", "./x"],
        ["--fail-on-defect"],
        ["--files-from", ""],
        ["--watch", ""],
        ["a.png", "--heatmaps", ""],
        ["src", "--ray", ""],
        ["src", "--ray", "", "--parquet", ""],
        ["--\x1b[31m"],
    ],
)
def test_options_that_contradict_each_other_are_refused(line, arguments):
    done = infer(line, *arguments)
    assert done.returncode == 2
    assert b"error: " in done.stderr and b"\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "gone"], "gone is not a folder"),
        (["re_train"], "re_train holds no .jpeg"),
        ([".", "--heatmaps", "below"], "--heatmaps lies in .: heatmaps would be taken"),
        (["s*", "--heatmaps", "src/heat"], "--heatmaps lies in src: heatmaps would be taken"),
        (["--watch", ".", "--heatmaps", "below"], "--heatmaps lies in ."),
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
    process = subprocess.Popen(
        command(line, pictures), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
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


@pytest.fixture
def black(tmp_path) -> Path:
    """An image that no model for parts calls ok."""
    Image.new("L", (96, 96)).save(tmp_path / "black.png")
    return tmp_path / "black.png"


def test_rows_that_are_kept_count_for_the_exit_code(line, pictures, black):
    judged = dict(out.split("  ")[:2] for out in infer(line, pictures).stdout.decode().splitlines())
    ok = [path for path, verdict in judged.items() if verdict == "ok"]
    files = ["--csv", pictures / "rows.csv", "--jsonl", pictures / "rows.jsonl", "--resume"]
    assert infer(line, black, *ok, *files, "--fail-on-defect").returncode == 3
    done = infer(line, black, *ok, *files, "--fail-on-defect")
    assert done.returncode == 3
    said = f"0 images judged: none; {1 + len(ok)} images have a row: "
    assert done.stdout.decode().startswith(said) and "1 unknown" in done.stdout.decode()
    if ok:  # only the images that are asked about count
        assert infer(line, *ok, *files, "--fail-on-defect").returncode == 0


def test_error_row_fails_again_until_the_image_is_repaired(line, pictures, parts):
    broken, file = pictures / "0" / "00.jpeg", pictures.with_name("rows.csv")
    broken.write_bytes(b"")
    for resume in ([], ["--resume"]):
        done = infer(line, pictures, "--csv", file, *resume)
        assert done.returncode == 1
        assert done.stderr.decode().startswith("error: 1 of 20 images cannot be read")
    before = file.read_text().splitlines()
    assert len(before) == 21 and before[-1].startswith(f"{broken},error")
    broken.write_bytes(parts[0])
    assert infer(line, pictures, "--csv", file, "--resume").returncode == 0
    after = file.read_text().splitlines()
    assert after[:-1] == before[:-1] and after[-1].startswith(f"{broken},")
    assert ",error," not in after[-1]


@pytest.mark.parametrize("fail", [[], ["--fail-on-defect"]])
@pytest.mark.parametrize(
    ("arguments", "input"),
    [(["--files-from", "-"], b""), (["--files-from", "-"], b"\n \n")] + [(["-"], b"")],
)
def test_nothing_to_judge_is_not_ok(line, arguments, input, fail):
    done = infer(line, *arguments, *fail, input=input)
    assert done.returncode == 1 and done.stdout == b""
    assert re.fullmatch(r"error: standard input (names|holds) no image.*\n", done.stderr.decode())


def test_images_that_cannot_be_read_here_are_not_ok(line, pictures, parts):
    first = next(pictures.rglob("*.jpeg"))
    folder = pictures / "other"
    folder.mkdir()
    shutil.copy(first, folder / "a.jpeg")
    with Image.open(first) as image:
        image.save(folder / "anim.gif")
        image.save(folder / "raw.tiff")
    (folder / "raw.tiff").rename(folder / "raw.DNG")  # its thumbnail passes for a TIFF
    (folder / "gone").symlink_to(folder / "share")
    (folder / "notes.txt").touch()
    for given in (folder, folder / "*"):
        done = infer(line, given)
        assert done.returncode == 1
        lines = dict(out.split("  ", 1) for out in done.stdout.decode().splitlines())
        assert {Path(path).name: said for path, said in lines.items() if "error" in said} == {
            "anim.gif": "error  review  is none of JPEG, PNG, BMP, TIFF, WEBP",
            "raw.DNG": "error  review  is none of JPEG, PNG, BMP, TIFF, WEBP",
            "gone": "error  review  does not exist",
        }
        assert len(lines) == 4 and "not judged: 1 .txt\n" in done.stderr.decode()
        assert infer(line, given, "--fail-on-defect").returncode == 3


def test_second_run_on_the_same_file_is_refused_and_no_row_is_lost(line, pictures):
    file = pictures.with_name("rows.csv")
    words = command(line, pictures, "--csv", file)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(words, **pipes) for _ in range(3)]
    ended = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert sorted(code for *_, code in ended) == [0, 1, 1]
    for _, err, code in ended:
        # One may begin after another has ended.
        refused = "another run writes rows there" in err or "holds 20 rows: continue" in err
        assert refused == (code == 1) == len(err.splitlines())
    with file.open(newline="") as rows_written:
        names = [row["path"] for row in csv.DictReader(rows_written)]
    assert sorted(names) == sorted(map(str, pictures.rglob("*.jpeg")))


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_rows_never_overwrite_what_is_there(line, pictures, resume):
    first = next(pictures.rglob("*.jpeg"))
    before = first.read_bytes()
    done = infer(line, first, "--csv", first, *resume)
    assert done.returncode == 1 and first.read_bytes() == before
    assert done.stderr.decode().startswith(f"error: {first}: row 1 is no verdict")
    assert len(done.stderr.splitlines()) == 1


def test_restart_without_resume_wipes_nothing(line, pictures):
    file = pictures / "rows.jsonl"
    infer(line, pictures, "--jsonl", file)
    before = file.read_bytes()
    for arguments in ([pictures], ["--watch", pictures]):
        done = infer(line, *arguments, "--jsonl", file)
        assert done.returncode == 1 and file.read_bytes() == before
        assert "holds 20 rows: continue with --resume, or delete it first" in done.stderr.decode()


def test_names_with_codes_reach_files_exactly_and_terminals_never(line, tmp_path):
    names = [b"\x1b]0;owned\x07.png", b"a\nerror: b.png", "\u202egnp.png".encode(), b"\x9b1m.png"]
    folder = tmp_path / "in"
    folder.mkdir()
    for name in names:
        (folder / os.fsdecode(name)).touch()
    (folder / "x.\x1b[31mtxt").touch()
    done = infer(line, folder)
    text = (done.stdout + done.stderr).decode()
    assert not re.search(r"[^\n -~]", text)
    assert len(done.stdout.splitlines()) == 4 and len(done.stderr.splitlines()) == 2
    for shown in (r"\x1b]0;owned\x07.png", r"a\nerror: b.png", r"\u202egnp.png", r"\x9b1m.png"):
        assert shown in text
    assert r"not judged: 1 .\x1b[31mtxt" in text
    infer(line, folder, "--csv", tmp_path / "csv", "--jsonl", tmp_path / "json")
    paths = [os.path.join(os.fsencode(folder), name) for name in names]
    assert {os.fsencode(row["path"]) for row in rows(tmp_path / "json")} == set(paths)
    assert all(path in (tmp_path / "csv").read_bytes() for path in paths)


def test_what_never_ends_is_an_error(line, tmp_path, parts):
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "fifo.jpeg")
    (folder / "zero.jpeg").symlink_to("/dev/zero")
    (folder / "part.jpeg").write_bytes(parts[0])
    for given in ([folder], [folder / "*"], sorted(folder.iterdir())):
        done = infer(line, *given)
        assert done.returncode == 1
        lines = dict(out.split("  ", 1) for out in done.stdout.decode().splitlines())
        assert len(lines) == 3
        for name, kind in (("fifo", "named pipe"), ("zero", "device")):
            said = f"error  review  is a {kind}; only regular files are read"
            assert lines[str(folder / f"{name}.jpeg")] == said


# A thread that asks a share whose server is gone hears no signal; nor does one in this mutex.
HANG = """
import ctypes, os, runpy, sys
scandir, stat = os.scandir, os.stat
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
libc.pthread_mutex_init(mutex, None)

def hanging(ask):
    def hang(path, *more, **options):
        if isinstance(path, str) and os.path.lexists(f"{path}/hangs"):
            libc.pthread_mutex_lock(mutex)
            print("hangs", file=sys.stderr, flush=True)
            libc.pthread_mutex_lock(mutex)
        return ask(path, *more, **options)
    return hang

os.scandir = hanging(scandir)
if os.environ.get("HANGS") == "stat":
    os.stat = hanging(stat)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("option", "hangs"), [([], "scandir"), (["--watch"], "scandir"), ([], "stat")]
)
def test_signal_ends_it_at_once_while_a_share_hangs(line, tmp_path, option, hangs, how):
    folder = tmp_path / "in"
    folder.mkdir()
    python, *words = command(line, *option, folder)
    (folder / "hangs").touch()
    log = tmp_path / "stderr"
    with log.open("w") as errors:
        env = os.environ | {"HANGS": hangs}
        process = subprocess.Popen([python, "-c", HANG, *words], stderr=errors, env=env)
    try:
        wait_for(lambda: ("does not answer" if option else "hangs") in log.read_text())
        process.send_signal(how)
        assert process.wait(20) == {signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    finally:
        process.kill()
        process.wait()


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
        self.command = command(line, "--watch", folder, "--jsonl", file)
        self.environment = line.environment()
        self.process = None

    def start(self, *arguments: str) -> None:
        self.log = self.file.with_name("stderr")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*self.command, *arguments], env=self.environment, stderr=log
            )
        wait_for(lambda: "Watching" in self.said())

    def said(self) -> str:
        return self.log.read_text()

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.wait(20)

    def names(self) -> list[str]:
        """Return the names of the images that have a row; the last may just be written."""
        whole = self.file.read_text().rpartition("\n")[0]
        return [Path(json.loads(row)["path"]).name for row in whole.splitlines()]


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
    assert sorted(Path(row["path"]).name for row in rows(watching.file)) == dropped


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_never_ends_neither_stops_a_watch_nor_outlives_a_signal(watching, parts, how):
    os.mkfifo(watching.folder / "fifo.jpeg")
    (watching.folder / "zero.jpeg").symlink_to("/dev/zero")
    watching.start()
    (watching.folder / "part.jpeg").write_bytes(parts[0])
    wait_for(watching.names)
    if how == signal.SIGTERM:  # else they still wait to be given up
        wait_for(lambda: len(watching.names()) == 3)
    watching.process.send_signal(how)
    assert watching.process.wait(20) == {signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    errors = [row["reason"] for row in rows(watching.file) if row["verdict"] == "error"]
    kinds = ("named pipe", "device") if how == signal.SIGTERM else ()
    assert errors == [f"is a {kind}; only regular files are read" for kind in kinds]


@pytest.mark.long
def test_error_row_of_a_watch_is_replaced_after_the_repair(watching, parts):
    broken = watching.folder / "broken.jpeg"
    broken.write_bytes(parts[0][:100])
    watching.start()
    wait_for(watching.names)
    assert rows(watching.file)[0]["verdict"] == "error"
    broken.write_bytes(parts[0])
    wait_for(lambda: [row["verdict"] != "error" for row in rows(watching.file)] == [True])
    # Images with a row are not judged again after a restart, those with an error are.
    (watching.folder / "second.jpeg").write_bytes(b"")
    wait_for(lambda: len(watching.names()) == 2)
    watching.end(signal.SIGKILL)
    (watching.folder / "second.jpeg").write_bytes(parts[1])
    watching.start("--resume")
    wait_for(lambda: [row["verdict"] != "error" for row in rows(watching.file)] == [True, True])
    assert watching.names() == ["broken.jpeg", "second.jpeg"]
    # An image that is overwritten after a restart gets another row.
    broken.write_bytes(parts[2])
    wait_for(lambda: watching.names() == ["broken.jpeg", "second.jpeg", "broken.jpeg"])


def test_watched_folder_that_goes_away_is_named_and_its_images_are_judged_once(watching, parts):
    watching.start()
    away = watching.folder.with_name("away")
    for number in range(3):
        (watching.folder / f"{number}.jpeg").write_bytes(parts[number])
    wait_for(lambda: len(watching.names()) == 3)
    shutil.copytree(watching.folder, away)
    shutil.rmtree(watching.folder)
    wait_for(lambda: "is away (" in watching.said(), seconds=10)
    watching.folder.mkdir()  # as the folder is where a share was mounted
    time.sleep(0.5)
    watching.folder.rmdir()
    away.rename(watching.folder)
    wait_for(lambda: "arriving is back\n" in watching.said(), seconds=10)
    (watching.folder / "new.jpeg").write_bytes(parts[3])
    wait_for(lambda: len(watching.names()) > 3)
    time.sleep(0.5)
    assert watching.names()[3:] == ["new.jpeg"]
    assert watching.said().count("is away (") == watching.said().count("arriving is back\n") == 1


@pytest.mark.parametrize("change", ["delete", "append", "truncate"])
def test_watch_ends_with_an_error_if_something_else_changes_its_rows(watching, parts, change):
    watching.start()
    (watching.folder / "a.jpeg").write_bytes(parts[0])
    wait_for(watching.names)
    if change == "delete":
        watching.file.unlink()
    else:
        kept = watching.file.read_bytes() if change == "append" else b""
        watching.file.write_bytes(kept + b"noted by hand\n")
    (watching.folder / "b.jpeg").write_bytes(parts[1])
    assert watching.process.wait(20) == 1
    assert watching.said().splitlines()[-1].startswith(f"error: {watching.file} was ")
    if change == "delete":
        assert not watching.file.exists()
    else:
        assert watching.file.read_bytes() == kept + b"noted by hand\n"
