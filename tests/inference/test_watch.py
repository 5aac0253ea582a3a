"""Images that arrive in a folder."""

import errno
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


def copy_away(folder: Path, to: Path) -> None:
    """Copy a folder with its times: other inodes, as after a share is mounted again."""
    shutil.copytree(folder, to, symlinks=True)


@pytest.mark.parametrize("in_its_place", [None, "empty", "an empty folder in it", "no image"])
def test_folder_that_goes_away_is_named_and_nothing_is_judged_twice(
    tmp_path, clock, caplog, in_its_place
):
    folder = tmp_path / "share"
    (folder / "below").mkdir(parents=True)
    for name in ("a.png", "below/b.png", "known.png"):
        (folder / name).write_bytes(name.encode())
    watch = Watch(str(folder), lambda path: path.endswith("known.png"))
    assert [name for name, *_ in look(watch)] == ["a.png", "b.png"]
    copy_away(folder, tmp_path / "again")
    folder.rename(tmp_path / "away")
    if in_its_place:
        folder.mkdir()
    if in_its_place == "an empty folder in it":
        (folder / "below").mkdir()
    elif in_its_place == "no image":
        (folder / "readme.txt").touch()
    for _ in range(5):
        clock.now += 1
        assert look(watch) == []
    (said,) = caplog.messages
    assert said.startswith(f"{folder} is away (") and said.endswith("Waiting until it is back")
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "again").rename(folder)
    (folder / "new.png").write_bytes(b"new")
    assert look(watch) == [("new.png", b"new", False)]
    assert caplog.messages[1:] == [f"{folder} is back"]
    (folder / "a.png").write_bytes(b"another")
    assert look(watch) == [("a.png", b"another", False)]
    # Whoever deletes an image from a folder that is there wants another verdict on it.
    (folder / "below" / "b.png").unlink()
    assert look(watch) == []
    (folder / "below" / "b.png").write_bytes(b"below/b.png")
    assert [name for name, *_ in look(watch)] == ["b.png"]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EACCES])
@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_share_that_does_not_answer_is_named(tmp_path, clock, monkeypatch, caplog, call, number):
    (tmp_path / "a.png").write_bytes(b"one")
    watch = Watch(str(tmp_path), lambda path: False)
    assert len(look(watch)) == 1

    def broken(path, *arguments, **options):
        raise OSError(number, os.strerror(number), path)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, broken)
        assert look(watch) == look(watch) == []
    assert caplog.messages == [
        f"{tmp_path} is away ({os.strerror(number)}). Waiting until it is back"
    ]
    assert look(watch) == []
    assert caplog.messages[1:] == [f"{tmp_path} is back"]


@pytest.mark.parametrize("calls", [["open"], ["stat", "open"]])
def test_share_that_fails_for_files_gets_no_rows_for_images_that_have_one(
    tmp_path, clock, monkeypatch, calls
):
    (tmp_path / "old.png").write_bytes(b"old")
    watch = Watch(str(tmp_path), lambda path: False)
    assert len(look(watch)) == 1
    (tmp_path / "new.png").write_bytes(b"new")

    def failing(call):
        def failed(path, *arguments, **options):
            if str(path).endswith(".png"):
                raise OSError(errno.EIO, "Input/output error", path)
            return call(path, *arguments, **options)

        return failed

    with monkeypatch.context() as patched:
        for call in calls:
            patched.setattr(os, call, failing(getattr(os, call)))
        assert look(watch) == []
        clock.now += GIVE_UP + 1
        ((name, why, final),) = look(watch)
        assert (name, final) == ("new.png", True) and "Input/output error" in str(why)
        clock.now += GIVE_UP + 1
        assert look(watch) == []
    clock.now += GIVE_UP + 1
    assert [(name, content) for name, content, _ in look(watch)] == [("new.png", b"new")]
    clock.now += GIVE_UP + 1
    assert look(watch) == []


def test_folder_that_goes_away_during_a_look_is_not_forgotten(tmp_path, clock):
    folder = tmp_path / "share"
    (folder / "below").mkdir(parents=True)
    for name in ("a.png", "below/b.png"):
        (folder / name).write_bytes(name.encode())
    watch = Watch(str(folder), lambda path: False)
    assert len(look(watch)) == 2
    (folder / "new.png").write_bytes(b"new")
    for arrival in watch.arrivals():
        folder.rename(tmp_path / "away")
        arrival.judged()
    (tmp_path / "away").rename(folder)
    assert look(watch) == []


def test_folder_that_is_unmounted_just_before_it_is_listed_is_not_forgotten(
    tmp_path, clock, monkeypatch
):
    folder, scandir = tmp_path / "share", os.scandir
    folder.mkdir()
    (folder / "a.png").write_bytes(b"one")
    watch = Watch(str(folder), lambda path: False)
    assert len(look(watch)) == 1

    def unmounted(path):
        folder.rename(tmp_path / "away")
        folder.mkdir()
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", unmounted)
        assert look(watch) == []
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    assert look(watch) == []


def test_what_is_kept_of_a_folder_that_was_replaced_is_bounded(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("defect_detection.inference.watch.REMEMBERED", 5)
    folder = tmp_path / "today"
    watch = Watch(str(folder), lambda path: False)
    for day in range(4):
        folder.mkdir()
        for number in range(4):
            (folder / f"{day}-{number}.png").write_bytes(b"one")
        assert len(look(watch)) == 4
        assert look(watch) == []
        assert len(watch._seen) <= 4 + 5
        folder.rename(tmp_path / f"day {day}")


def test_folder_below_that_cannot_be_searched_is_named_once_and_not_forgotten(
    tmp_path, clock, monkeypatch, caplog
):
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "a.png").write_bytes(b"one")
    watch = Watch(str(tmp_path), lambda path: False)
    assert len(look(watch)) == 1
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("line"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", locked)
        assert [look(watch) for _ in range(4)] == [[]] * 4
    assert caplog.messages == [f"{tmp_path / 'line'}: not searched (Permission denied)"]
    assert look(watch) == []


def test_what_cannot_be_read_is_given_up_once_and_returned_when_it_can(tmp_path, clock):
    watch = Watch(str(tmp_path), lambda path: False)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photo.heic").write_bytes(b"heic")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    assert look(watch) == []
    clock.now += GIVE_UP - 0.1
    assert look(watch) == []
    clock.now += 0.2
    assert [(name, str(why), final) for name, why, final in look(watch)] == [
        ("fifo.png", "is a named pipe; only regular files are read", True),
        ("photo.heic", "is none of JPEG, PNG, BMP, TIFF, WEBP", True),
        ("zero.png", "is a device; only regular files are read", True),
        ("gone.png", "does not exist", True),
    ]
    for _ in range(3):
        clock.now += GIVE_UP + 1
        assert look(watch) == []
    (tmp_path / "elsewhere").write_bytes(b"one")
    (tmp_path / "fifo.png").unlink()
    (tmp_path / "fifo.png").write_bytes(b"two")
    found = look(watch)
    assert [(name, content) for name, content, _ in found] == [
        ("fifo.png", b"two"),
        ("gone.png", b"one"),
    ]


def test_image_that_is_overwritten_with_a_broken_one_is_given_up_too(tmp_path, clock):
    watch = Watch(str(tmp_path), lambda path: False)
    picture = tmp_path / "latest.png"
    picture.write_bytes(b"one")
    assert len(look(watch)) == 1
    picture.write_bytes(b"broken")
    assert look(watch, judge=False) == [("latest.png", b"broken", False)]
    clock.now += GIVE_UP + 1
    assert look(watch) == [("latest.png", b"broken", True)]
    clock.now += GIVE_UP + 1
    assert look(watch) == []


def test_folder_that_hangs_is_named_and_named_again_when_it_answers(
    tmp_path, clock, monkeypatch, caplog
):
    (tmp_path / "a.png").write_bytes(b"one")
    watch = Watch(str(tmp_path), lambda path: False)
    looking = watch.arrivals()
    next(looking)  # it is being judged, however long that takes
    clock.now += 100
    watch.say_whether_it_answers()
    assert caplog.messages == []

    def slow(path: str) -> None:
        clock.now += 10
        watch.say_whether_it_answers()
        watch.say_whether_it_answers()

    monkeypatch.setattr(watch, "_look", slow)
    for _ in watch.arrivals():
        pass
    watch.say_whether_it_answers()
    assert caplog.messages == [f"{tmp_path} does not answer", f"{tmp_path} answers again"]
