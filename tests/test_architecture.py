"""The floors of the package: a module imports only from floors below its own, so that no import forms a circle.

Run with -s to see the graph.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "first_trl"
FLOORS = (  # a folder stands for its files, which import one another in the order of their own dependence
    ("constants", "errors"),
    ("losses", "head", "metrics", "first_config", "templates", "files", "log", "demo"),
    ("settings", "calibration", "modeling", "hub", "vllm_scoring"),
    ("data", "scoring"),
    ("recipe", "training", "cache"),
    ("run", "collator", "evaluation", "cache_tools", "plan", "model_checks"),
    ("trainer", "checks", "predict", "merging", "report"),
    ("stages", "__main__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> set[Path]:
    """The files of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("first_trl")):
            base = path.parents[node.level - 1] if node.level else PACKAGE.parent
            module = base.joinpath(*(node.module or "").split(".")) if node.module else base
            names = [module / alias.name for alias in node.names] if module.is_dir() else [module]
            found |= {
                file for name in names for file in (name.with_suffix(".py"), name / "__init__.py") if file.is_file()
            }
            found |= {module / "__init__.py"} if module.is_dir() and not found else set()
    return found - {path, PACKAGE / "__init__.py"}


def floor(path: Path) -> int:
    return FLOOR[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]


def test_imports_lead_downwards_and_never_in_a_circle():
    graph = {path: imports(path) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
    assert len(graph) > 40 and sum(map(len, graph.values())) > 100
    for number, names in enumerate(FLOORS):
        print(number, *names)
    inside = {}
    upward = []
    for path, found in graph.items():
        inside[path] = {
            other for other in found if other.parent == path.parent != PACKAGE and floor(other) == floor(path)
        }
        upward += [f"{path.stem} -> {other.stem}" for other in found - inside[path] if floor(other) >= floor(path)]
    assert not upward, upward
    while done := [path for path in inside if not inside[path] & inside.keys()]:
        for path in done:
            del inside[path]
    assert not inside, f"a circle among {[path.stem for path in inside]}"
