"""Which images are asked about, and which have arrived."""

from pathlib import Path

import pytest

from defect_detection import PipelineError
from defect_detection.inference import sources


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
