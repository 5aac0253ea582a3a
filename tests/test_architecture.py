"""The rules of the house, read off the syntax trees and tried in child processes."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import architecture
import pytest

from conftest import ROOT

PACKAGE = architecture.PACKAGE
SCRIPTS = [*sorted((ROOT / "src").glob("*.py")), ROOT / "api.py", ROOT / "re_train/re_train.py"]
FILES = [*sorted(PACKAGE.rglob("*.py")), *SCRIPTS]
MOST_PARAMETERS, MOST_LINES = 6, 50
HEAVY = ("tensorflow", "keras", "mlflow", "scipy", "sklearn", "cv2", "pandas", "matplotlib")


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_modules_import_only_from_packages_above_their_own():
    upward = [
        f"{module} imports {imported}"
        for module, imports in architecture.imports().items()
        for imported in imports
        if architecture.level(imported) > architecture.level(module)
    ]
    assert not upward


def test_runtime_imports_nothing_of_the_project_but_itself():
    for module, imports in architecture.imports().items():
        if module.startswith("runtime."):
            assert all(name == "" or name.startswith("runtime") for name in imports), module


@pytest.mark.parametrize("heavy", [HEAVY])
def test_what_serves_loads_no_heavy_library(heavy):
    modules = [name for name in architecture.imports() if name.startswith("runtime.")]
    assert len(modules) > 5
    program = "import sys, importlib\n" + "".join(
        f"importlib.import_module('defect_detection.{name}')\n" for name in modules
    )
    program += f"print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("module", ["inference.judge", "inference.watch", "inference.rows"])
def test_the_way_to_a_verdict_loads_no_heavy_library(module):
    program = f"import sys, defect_detection.{module}\n"
    program += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_only_main_reads_the_environment_and_the_working_directory():
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        allowed = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and (path in SCRIPTS and node.name in ("main", "configuration"))
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Call)) else ""
            reads = text in ("os.environ", "os.getcwd()", "Path.cwd()", "settings.environment()")
            if (reads or text.startswith("os.getenv(")) and id(node) not in allowed:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {text}")
    setting = {
        "cluster.py",
        "registry/__init__.py",
        "registry/store.py",
        "runtime/native_output.py",
    }
    others = [one for one in found if not any(f"{name}:" in one for name in setting)]
    # The default of `settings.environment` itself.
    assert [one.split(":")[0] for one in others] == ["src/defect_detection/settings.py"], others
    for name in setting:
        source = (PACKAGE / name).read_text()
        written = re.findall(r"os\.environ(?:\.setdefault\(|\[\"\w+\"\] = )", source)
        assert source.count("os.environ") == len(written), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_set_the_environment_of_mlflow_before_it_is_imported(script):
    program = f"""
import importlib.abc, os, runpy, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "mlflow":
            print("telemetry disabled:", os.environ.get("MLFLOW_DISABLE_TELEMETRY"), flush=True)
            os._exit(0)  # the import itself takes seconds

sys.meta_path.insert(0, Finder())
sys.path.insert(0, {str(ROOT / "src")!r})
runpy.run_path({str(script)!r}, run_name="imported")
import defect_detection.pipeline.record
"""
    environment = {name: value for name, value in os.environ.items() if "MLFLOW" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "telemetry disabled: true\n", done.stderr


def test_functions_are_short_and_take_few_parameters():
    found = []
    for path in FILES:
        for node in functions(path):
            arguments = node.args
            given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = len([one for one in given if one.arg not in ("self", "cls")])
            lines = node.end_lineno - node.lineno + 1
            if count > MOST_PARAMETERS or lines > MOST_LINES:
                found.append(f"{path.relative_to(ROOT)}:{node.name} {count} {lines}")
    assert not found


def test_the_drawing_in_the_documentation_is_that_of_the_code():
    drawn = (ROOT / "docs" / "architecture.md").read_text()
    assert architecture.drawing() in drawn, "run 'python docs/architecture.py'"
