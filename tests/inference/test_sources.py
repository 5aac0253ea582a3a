"""Which images are asked about, and which have arrived."""

import io
import os
import sys
from pathlib import Path

import pytest

from defect_detection import PipelineError
from defect_detection.inference import sources
from defect_detection.runtime.preprocessing import UnreadableImage


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.png", "a.jpeg", "in/c.JPG", "in/deep/d.jpg", ".hidden/x.png", "in/.y.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["."], ["./a.jpeg", "./b.png", "./in/c.JPG", "./in/deep/d.jpg"]),
        (["in", "b.png"], ["in/c.JPG", "in/deep/d.jpg", "b.png"]),
        (["**/*.jp*"], ["a.jpeg", "in/deep/d.jpg"]),
        (["in/*"], ["in/c.JPG", "in/deep/d.jpg"]),
        (["i[n]"], ["in/c.JPG", "in/deep/d.jpg"]),
        (["**"], ["a.jpeg", "b.png", "in/c.JPG", "in/deep/d.jpg"]),
        (["in/.*"], ["in/.y.png"]),
        (["gone.png", "in/notes.txt"], ["gone.png", "in/notes.txt"]),
    ],
)
def test_files_folders_and_globs_are_expanded(tree, given, found):
    assert [item.path for item in sources.expand(given)] == found


def test_file_with_the_letters_of_a_glob_is_that_file(tree):
    (tree / "a[1].png").touch()
    assert [item.path for item in sources.expand(["a[1].png"])] == ["a[1].png"]


@pytest.mark.parametrize(
    ("given", "message"), [("empty", "empty holds no .jpeg"), ("*.gif", r"\*.gif matches no")]
)
def test_what_holds_no_pictures_is_refused_before_the_first_path(tree, given, message):
    with pytest.raises(PipelineError, match=message):
        sources.expand(["a.jpeg", given])


def test_list_leaves_empty_lines_out_and_keeps_spaces():
    assert list(sources.listed(["a.png\n", "\n", " \t\n", " b c.png \r\n", "d.png"])) == [
        "a.png",
        " b c.png ",
        "d.png",
    ]


def reasons(given: list[str]) -> dict[str, str]:
    """Return why what is asked about cannot be judged."""
    items = list(sources.items(given, None))
    assert len({os.path.normpath(item.path) for item in items}) == len(items)
    return {
        item.path: str(item.source) for item in items if isinstance(item.source, UnreadableImage)
    }


def test_images_of_other_kinds_are_errors_also_if_they_are_named(tree):
    (tree / "raw.DNG").write_bytes(b"raw")
    (tree / "list").write_text("raw.DNG\n")
    why = "is none of JPEG, PNG, BMP, TIFF, WEBP"
    assert reasons(["raw.DNG"]) == {"raw.DNG": why}
    (item,) = sources.items([], "list")
    assert str(item.source) == why


@pytest.mark.parametrize("given", [".", "*"])
def test_images_of_other_kinds_and_links_that_lead_nowhere_are_errors(tree, given):
    (tree / "in" / "a.HEIC").write_bytes(b"heic")
    (tree / "raw.dng").write_bytes(b"raw")
    (tree / "shared").symlink_to(tree / "gone")
    (tree / "round").symlink_to("round")
    found = {os.path.normpath(path): why for path, why in reasons([given]).items()}
    assert found == {
        "in/a.HEIC": "is none of JPEG, PNG, BMP, TIFF, WEBP",
        "raw.dng": "is none of JPEG, PNG, BMP, TIFF, WEBP",
        "shared": "does not exist",
        "round": "cannot be read (Too many levels of symbolic links)",
    }


@pytest.mark.parametrize("given", [".", "*", "**", "**/*", "in/*/*", "**/*.jpg"])
def test_folder_that_cannot_be_entered_is_an_error(tree, monkeypatch, given):
    (tree / "in" / "open").mkdir()
    (tree / "in" / "open" / "e.jpg").touch()
    scandir = os.scandir

    def locked(path):
        if isinstance(path, str) and os.path.normpath(path) == "in/deep":  # not for `glob`
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    found = {os.path.normpath(path): why for path, why in reasons([given]).items()}
    assert found == {"in/deep": "cannot be read (Permission denied)"}


def test_folder_that_vanishes_while_it_is_searched_is_an_error(tree):
    items = sources.expand(["."])
    assert next(items).path == "./a.jpeg"
    (tree / "in").rename(tree / ".away")
    (error,) = [item for item in items if isinstance(item.source, UnreadableImage)]
    assert (error.path, str(error.source)) == ("./in", "does not exist")


def test_files_that_are_no_images_are_named_once(tree, caplog):
    list(sources.items(["in", "in/*"], None))
    assert caplog.messages == ["in: not judged: 1 .txt", "in/*: not judged: 1 .txt"]


@pytest.mark.parametrize("content", ["", "\n", " \r\n\t\n"])
def test_list_of_nothing_is_refused(tree, monkeypatch, content):
    (tree / "list").write_text(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    for files_from in ("list", "-"):
        with pytest.raises(PipelineError, match="names no images"):
            sources.items(["a.jpeg"], files_from)


def test_list_without_ends_of_lines_is_refused(tree, monkeypatch):
    (tree / "list").write_text("a.jpeg\n" + "a" * 100_000)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        for files_from, where in (("list", "list: line 2"), ("-", "standard input: line 1")):
            with pytest.raises(PipelineError, match=f"{where} is longer than any path"):
                list(sources.items([], files_from))


@pytest.mark.parametrize("stdin", [None, io.TextIOWrapper(io.BytesIO(b""))])
def test_standard_input_without_an_image_is_refused(monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(PipelineError, match="standard input holds no image"):
        sources.items(["-"], None)


def test_standard_input_without_an_end_is_an_error(monkeypatch):
    monkeypatch.setattr(sources, "MOST_BYTES", 2**22)
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        (item,) = sources.items(["-"], None)
    assert isinstance(item.source, UnreadableImage) and "is larger than" in str(item.source)
