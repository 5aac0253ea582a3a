"""YAML that means one thing only."""

import json
import time

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given

from conftest import ROOT
from defect_detection import PipelineError, strict_yaml

LAUGHS = "a: &a [x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is written twice. Delete one"),
        ("a:\n  b: 1\n  b: 1", "line 3: 'b' is written twice. Delete one"),
        ("{a: 1, 'a': 2}", "line 1: 'a' is written twice. Delete one"),
        ('"a\\nb": 1\n"a\\nb": 1', "line 2: 'a\\nb' is written twice. Delete one"),
        (LAUGHS, "line 1: & and * are not read here. Write the value out"),
        ("a: &a [*a]", "line 1: & and * are not read here. Write the value out"),
        ("a: 1\nb: *c", "line 2: & and * are not read here. Write the value out"),
        ("&key a: 1", "line 1: & and * are not read here. Write the value out"),
        ("a: !!int '012'", "line 1: tags such as !!int are not read here. Write the value"),
        ("a: !!python/name:os.system", "line 1: tags such as"),
        ("a: 1\n---\na: 2", "line 2: a second document begins here. Keep one"),
        ("? [a]\n: 1", "line 1: expected a name before the colon"),
        ("a:\n\tb: 1", "line 2: is not YAML: found character"),
        ("a: [1", "line 1: is not YAML: expected ',' or ']'"),
        ("a: 1\nb: \x07", "line 2: is not YAML: special characters are not allowed"),
        ("[" * 100_000, "line 1: more than 20 levels"),
        ("- " * 100_000, "line 1: more than 20 levels"),
        ("{a: " * 100_000, "line 1: more than 20 levels"),
    ],
)
def test_what_is_not_read_is_one_line_with_its_place(text, expected):
    began = time.monotonic()
    with pytest.raises(PipelineError) as raised:
        strict_yaml.read(text, "some.yaml")
    assert str(raised.value).startswith(f"some.yaml {expected}")
    assert "\n" not in str(raised.value)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("# nothing", None),
        ("a:\nb: ~\nc: null", {"a": None, "b": None, "c": None}),
        ("[true, False, yes, no, on, 'true']", [True, False, "yes", "no", "on", "true"]),
        ("[1, -2, +3, 0, '4']", [1, -2, 3, 0, "4"]),
        ("[1.5, 1e-4, -.5, 2., 1.0E+2]", [1.5, 1e-4, -0.5, 2.0, 100.0]),
        ("[012, 0x1f, 1_0, 1:30, 2024-01-02, .inf, 1.2.3, -, e5]".replace("-,", "'-',"), None),
        ("1: a", {"1": "a"}),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
    ],
)
def test_values_are_those_of_yaml_1_2_without_other_bases(text, expected):
    found = strict_yaml.read(text, "some.yaml")
    if expected is None and text.startswith("["):
        assert all(isinstance(one, str) for one in found)
    else:
        assert found == expected
        assert list(map(type, found or ())) == list(map(type, expected or ()))


@pytest.mark.parametrize("name", ["src/config.yaml", "re_train/re_train.yaml"])
def test_the_files_of_the_project_mean_what_they_meant(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert strict_yaml.read(text, name) == yaml.safe_load(text)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**17), 10**17),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(max_codepoint=0xD7FF), max_size=20),
)


@given(
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
        ),
        max_leaves=10,
    )
)
def test_json_is_read_as_what_it_is(value):
    found = strict_yaml.read(json.dumps(value), "some.yaml")
    assert json.dumps(found) == json.dumps(value)


@given(st.text("ab01.e:-+,[]{}&*!|>#'\"?%@`~\\ \n\t\x00\u2028\ufeff", max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        strict_yaml.read(text, "some.yaml")
    except PipelineError as error:
        assert str(error).startswith("some.yaml line ") and len(str(error).splitlines()) == 1
