"""The pinned packages: what people ask for in the .in files, with hashes, for every machine."""

import re

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

from conftest import ROOT

FILES = [
    "requirements",
    "requirements-line",
    "requirements-tests",
    "requirements-server",
    "requirements-ray",
]
MACHINES = [
    {
        "python_version": python,
        "python_full_version": f"{python}.5",
        "sys_platform": system,
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    for python in ("3.10", "3.11", "3.12")
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
]
HASH = r"\s*--hash=sha256:[0-9a-f]{64}"


def asked(name: str) -> list[Requirement]:
    text = (ROOT / f"{name}.in").read_text(encoding="utf-8")
    lines = (line.split("  #")[0] for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(name: str) -> list[tuple[Requirement, str]]:
    """Return the requirements of a generated file, each with the text of its hashes."""
    text = (ROOT / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = [line.partition("--hash") for line in lines]
    return [(Requirement(one), separator + rest) for one, separator, rest in found]


def on(machine: dict[str, str], requirements: list[Requirement]) -> dict[str, str]:
    """Return the versions that are installed on a machine."""
    found: dict[str, str] = {}
    for one in requirements:
        if one.marker is None or Marker(str(one.marker)).evaluate(machine):
            assert found.setdefault(one.name.lower(), str(one.specifier)) == str(one.specifier)
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_package_has_a_version_and_hashes(name):
    """With hashes for one of them, pip demands them for all."""
    requirements = pinned(name)
    assert len(requirements) >= 10
    for one, hashes in requirements:
        assert re.fullmatch(r"==[\w.]+", str(one.specifier)), one
        assert re.fullmatch(f"({HASH})+", hashes), one


@pytest.mark.parametrize("name", FILES)
def test_what_is_asked_for_is_what_is_pinned_on_every_machine(name):
    """Otherwise 'make requirements' has not been run since a change."""
    requirements = [one for one, _ in pinned(name)]
    for machine in MACHINES:
        wanted = on(machine, asked(name))
        assert wanted and wanted.items() <= on(machine, requirements).items()


def test_line_has_the_versions_of_the_whole_on_every_machine():
    whole, small = ([one for one, _ in pinned(name)] for name in FILES[:2])
    for machine in MACHINES:
        assert on(machine, small).items() < on(machine, whole).items()


@pytest.mark.parametrize("name", FILES)
def test_generated_file_says_from_what_and_how_and_names_no_host(name):
    text = (ROOT / f"{name}.txt").read_text(encoding="utf-8")
    assert f"make requirements, from {name}.in" in "".join(text.splitlines()[:3])
    assert not re.search(r"://|--(extra-)?index-url|--find-links|/tmp|/home", text)
