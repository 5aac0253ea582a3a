"""Images that arrive in a folder."""

import os
import shutil
from pathlib import Path

import pytest

from defect_detection.inference import watch
from defect_detection.inference.watch import GIVE_UP, Watch


class Clock:
    """A clock that stands still."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch.time, "monotonic", clock)
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
