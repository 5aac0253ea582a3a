"""Draw the packages, what is in them and who imports whom into docs/architecture.md.

python docs/architecture.py
"""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "defect_detection"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/architecture.py -->\n", "<!-- end of the drawing -->\n"

# Each may import from itself, from those before it, and from the modules beside the packages.
ORDER = (
    "runtime",
    "dataset",
    "registry",
    "evaluation",
    "training",
    "inference",
    "pipeline",
    "service",
    "operations",
)


def main() -> None:
    """Replace the drawing in the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + drawing() + after, encoding="utf-8")


def imports() -> dict[str, list[str]]:
    """Return what each module imports of the project, inside functions too; "" is the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = _name(path)
        found[name] = sorted(set(_imported(ast.parse(path.read_text(encoding="utf-8")))))
    return found


def level(module: str) -> int:
    """Return the place of a module's package in the order, -1 for modules beside the packages.

    `pyfunc` is an entry point, by which MLflow loads versions.
    """
    package = module.split(".")[0]
    if package == "pyfunc":
        return len(ORDER)
    return ORDER.index(package) if package in ORDER else -1


def drawing() -> str:
    """Return the drawing: a graph of the packages, and a table of the modules of each."""
    return BEGIN + "\n" + _graph() + "\n\n" + _tables() + "\n" + END


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _imported(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("defect_detection"):
            base = node.module.removeprefix("defect_detection").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".removeprefix(".")
                found.append(full if _exists(full) else base)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("defect_detection."):
                    found.append(alias.name.removeprefix("defect_detection."))
    return found


def _exists(module: str) -> bool:
    path = PACKAGE.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _graph() -> str:
    edges: Counter[tuple[str, str]] = Counter()
    for module, imported in imports().items():
        for other in imported:
            ends = module.split(".")[0], other.split(".")[0]
            if ends[0] in ORDER and ends[1] in ORDER and ends[0] != ends[1]:
                edges[ends] += 1
    lines = ["```mermaid", "flowchart BT"]
    lines += [f"    {package}" for package in ORDER]
    lines += [
        f"    {a} --> {b}"
        for a, b in sorted(edges, key=lambda one: (ORDER.index(one[0]), ORDER.index(one[1])))
    ]
    return "\n".join([*lines, "```"])


def _tables() -> str:
    lines = ["| module | what it does |", "| --- | --- |"]
    packages = ["", *ORDER]
    for package in packages:
        folder = PACKAGE / package
        if package:
            lines.append(f"| **{package}/** | {_sentence(folder / '__init__.py')} |")
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"| `{path.relative_to(PACKAGE)}` | {_sentence(path)} |")
    return "\n".join(lines)


def _sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0]


if __name__ == "__main__":
    main()
