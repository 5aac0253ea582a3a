"""Which pictures are asked about, and which have arrived."""

import os
import shutil
from pathlib import Path

import pytest

from defect_detection import PipelineError, sources
from defect_detection.sources import GIVE_UP, Watch


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.png", "a.jpeg", "in/c.JPG", "in/deep/d.jpg", ".hidden/x.png", "in/.y.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["."], ["./a.jpeg", "./b.png", "./in/c.JPG", "./in/deep/d.jpg"]),
        (["in", "b.png"], ["in/c.JPG", "in/deep/d.jpg", "b.png"]),
        (["**/*.jp*"], ["a.jpeg", "in/deep/d.jpg"]),
        (["in/*"], ["in/c.JPG"]),
        (["gone.png", "in/notes.txt"], ["gone.png", "in/notes.txt"]),
    ],
)
def test_files_folders_and_globs_are_expanded(tree, given, found):
    assert list(sources.expand(given)) == found


def test_file_with_the_letters_of_a_glob_is_that_file(tree):
    (tree / "a[1].png").touch()
    assert list(sources.expand(["a[1].png"])) == ["a[1].png"]


@pytest.mark.parametrize(
    ("given", "message"), [("empty", "empty holds no .jpeg"), ("*.gif", r"\*.gif matches no")]
)
def test_what_holds_no_pictures_is_refused_before_the_first_path(tree, given, message):
    with pytest.raises(PipelineError, match=message):
        sources.expand(["a.jpeg", given])


def test_list_leaves_empty_lines_out_and_keeps_spaces():
    assert list(sources.listed(["a.png\n", "\n", " b c.png \r\n", "d.png"])) == [
        "a.png",
        " b c.png ",
        "d.png",
    ]


class Clock:
    """A clock that stands still."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sources.time, "monotonic", clock)
    return clock


def look(watch: Watch, judge: bool = True) -> list[tuple[str, bytes, bool]]:
    found = []
    for arrival in watch.arrivals():
        found.append((Path(arrival.path).name, arrival.content, arrival.final))
        if judge:
            arrival.judged()
    return found


def test_picture_is_returned_at_each_change_until_it_is_judged(tmp_path, clock):
    watch = Watch(str(tmp_path), lambda path: False)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")
    assert look(watch, judge=False) == [("a.png", b"one", False)]
    assert look(watch, judge=False) == []
    picture.write_bytes(b"one, two")
    assert look(watch) == [("a.png", b"one, two", False)]
    assert look(watch) == []
    clock.now += 2 * GIVE_UP
    assert look(watch) == []


def test_picture_that_stays_broken_is_given_up_once(tmp_path, clock):
    watch = Watch(str(tmp_path), lambda path: False)
    (tmp_path / "a.png").write_bytes(b"")
    assert look(watch, judge=False) == [("a.png", b"", False)]
    clock.now += GIVE_UP - 0.1
    assert look(watch, judge=False) == []
    clock.now += 0.2
    assert look(watch) == [("a.png", b"", True)]
    clock.now += 2 * GIVE_UP
    assert look(watch) == []


def test_copy_that_gets_its_time_afterwards_is_not_returned_again(tmp_path, clock):
    watch = Watch(str(tmp_path), lambda path: False)
    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")
    assert len(look(watch)) == 1
    os.utime(picture, (1, 1))
    assert look(watch) == []


def test_another_picture_under_the_same_name_is_returned(tmp_path, clock):
    watch = Watch(str(tmp_path), lambda path: False)
    picture = tmp_path / "latest.png"
    for content in (b"one", b"two"):
        picture.write_bytes(content)
        os.utime(picture, ns=(clock_ns := int.from_bytes(content, "big"), clock_ns))
        assert look(watch) == [("latest.png", content, False)]
    shutil.move(picture, tmp_path / "kept.txt")
    assert look(watch) == []
    picture.write_bytes(b"two")
    assert look(watch) == [("latest.png", b"two", False)]


def test_pictures_with_a_row_are_skipped_until_they_change(tmp_path, clock):
    (tmp_path / "old.png").write_bytes(b"one")
    (tmp_path / "new.png").write_bytes(b"two")
    watch = Watch(str(tmp_path), lambda path: path.endswith("old.png"))
    assert look(watch) == [("new.png", b"two", False)]
    (tmp_path / "old.png").write_bytes(b"another")
    assert look(watch) == [("old.png", b"another", False)]
