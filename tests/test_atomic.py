"""Whole writes."""

import os
import shutil

import hypothesis
import pytest
from hypothesis import strategies as st

from defect_detection import PipelineError, atomic
from defect_detection.atomic import replace_atomically, require_writable


def test_file_is_there_only_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "file"
    with replace_atomically(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), replace_atomically(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_old_file_is_replaced_not_overwritten(tmp_path):
    target, reader = tmp_path / "file", tmp_path / "opened before"
    target.write_text("old")
    os.link(target, reader)
    with replace_atomically(target) as temporary:
        temporary.write_text("new")
    assert (target.read_text(), reader.read_text()) == ("new", "old")


def test_new_file_gets_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with replace_atomically(tmp_path / "file"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PipelineError, match="file/.writable: cannot be written"):
        require_writable(tmp_path / "file")


def test_writable_folder_is_left_as_it_was(tmp_path):
    require_writable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_mapping_comes_back_as_it_was_written(tmp_path):
    rows = {"train/ok_front/a, b.jpeg": "7", 'with "quotes".png': "8"}
    atomic.write_mapping(tmp_path / "a.csv", "path", "photo", rows)
    assert atomic.read_mapping(tmp_path / "a.csv", "path", "photo") == rows
    with_mark = b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes()  # as Excel writes it
    (tmp_path / "a.csv").write_bytes(with_mark)
    assert atomic.read_mapping(tmp_path / "a.csv", "path", "photo") == rows


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
FILES = st.binary(min_size=1, max_size=60).filter(
    lambda name: not {0, ord("/")} & {*name} and name not in (b".", b"..")
)


@hypothesis.given(st.dictionaries(NAMES, NAMES))
def test_any_mapping_comes_back_as_it_was_written(tmp_path_factory, rows):
    file = tmp_path_factory.getbasetemp() / "any.csv"
    atomic.write_mapping(file, "path", "photo", rows)
    assert atomic.read_mapping(file, "path", "photo") == rows


@hypothesis.given(st.sets(FILES))
def test_names_of_any_files_come_back_as_they_were_written(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("any")
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb"):
            pass
    rows = {os.fsdecode(name): "1" for name in names}
    atomic.write_mapping(folder / ".csv", "path", "photo", rows)
    assert atomic.read_mapping(folder / ".csv", "path", "photo") == rows
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["a\rb", "a\r\nb", "\r", "a\nb", 'a"b', '"', "a,b", " a ", "=1"])
def test_names_that_a_csv_file_must_quote_come_back(tmp_path, name):
    rows = {f"ok/{name}": "1", name: "2"}
    atomic.write_mapping(tmp_path / "a.csv", "path", "photo", rows)
    assert atomic.read_mapping(tmp_path / "a.csv", "path", "photo") == rows


def test_table_to_log_is_utf8_whatever_the_names():
    text = atomic.csv_text([("path",), (os.fsdecode(b"part_\xff.png"),), ("a\rb",)])
    assert text.encode() == b'path\npart_\\udcff.png\n"a\rb"\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "must name the columns path,photo"),
        ("path;photo\na;1\n", "must name the columns path,photo"),
        ("path,photo\na,\n", "line 2: path or photo is empty"),
        ("path,photo\na\n", "line 2: path or photo is empty"),
        ("path,photo\na,1\na,2\n", "line 3: a has two values"),
        ("path,photo\na,1\n\xff,1\n", "line 3: .* is not UTF-8, and no file has this name. Save"),
        ('path,photo\n"a,1\nb,1\n', "cannot be read"),  # a quote that does not end
        ('path,photo\n"a"b,1\n', "cannot be read"),
    ],
)
def test_mapping_that_is_none_is_one_line(tmp_path, content, expected):
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(PipelineError, match=expected) as raised:
        atomic.read_mapping(tmp_path / "a.csv", "path", "photo")
    assert str(tmp_path / "a.csv") in str(raised.value)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@a", "\ta", "\ra", "\na", "'a", "''=a", "'"])
def test_name_that_begins_like_a_formula_is_defused_and_restored(name):
    assert atomic.defused(name) == f"'{name}"
    assert atomic.restored(f"'{name}") == name


@pytest.mark.parametrize("name", ["-", "", "a=1", "test/=1.png"])
def test_other_names_are_written_as_they_are(name):
    assert atomic.defused(name) == atomic.restored(name) == name


def test_name_with_an_apostrophe_of_its_own_from_before_is_kept():
    assert atomic.restored("'a.png") == "'a.png"
