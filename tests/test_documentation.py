"""The documentation: its links lead somewhere, its commands exist, it is as short as promised."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MAKE = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands() -> list[str]:
    """Return the lines of all code blocks without a language, those that are commands."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", text(page), re.M | re.S):
            joined = block.replace("\\\n", " ")
            found += [line.split("  #")[0].strip() for line in joined.splitlines()]
    starts = ("python", "make", "./", "mlflow", "curl", "nohup", ".venv/", "git", "python3")
    return sorted({line for line in found if line.split(" ")[0].startswith(starts)})


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.M)
    return {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}


def test_readme_is_a_front_door():
    assert len(text(ROOT / "README.md").encode()) <= 10_000
    for section in ("Results", "Features", "Setup", "Workflow Diagram", "Running Locally"):
        assert f"\n## {section}\n" in text(ROOT / "README.md")
    for section in ("Model Retraining API", "GitHub Actions", "Project Structure"):
        assert f"\n## {section}\n" in text(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_local_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def test_there_are_commands():
    assert len(commands()) >= 25


@pytest.mark.parametrize("command", commands())
def test_every_command_names_what_there_is(command):
    """Scripts exist and know the options, targets of make exist, files that are read exist."""
    words = command.replace("'", " ").split()
    if words[0] == "make":
        assert set(re.findall(r"make ([a-z-]+)", command)) <= set(MAKE)
    scripts = [word for word in words if re.fullmatch(r"[\w./]+\.(py|sh)", word)]
    for script in scripts:
        assert (ROOT / script).is_file(), command
    for file in re.findall(r"requirements[\w-]*\.txt", command):
        assert (ROOT / file).is_file(), command
    options = re.findall(r"(--[a-z-]+)", command)
    if (
        scripts
        and scripts[0].endswith(".py")
        and words[0].endswith(("python", "python3"))
        and options
    ):
        known = help_of(scripts[0])
        assert all(option in known for option in options), command


HELP: dict[str, str] = {}


def help_of(script: str) -> str:
    if script not in HELP:
        command = [sys.executable, str(ROOT / script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        HELP[script] = done.stdout
    return HELP[script]


@pytest.mark.parametrize(
    "script", ["src/audit.py", "src/train.py", "src/evaluation.py", "src/inference.py"]
)
def test_options_of_a_script_are_documented(script):
    documented = "".join(map(text, PAGES))
    options = set(re.findall(r"(--[a-z-]+)", help_of(script))) - {"--help"}
    assert options and not [option for option in options if f"{option}" not in documented]
