"""The floors of the package: a module imports only from floors below its own, so that no import forms a circle.

Run with -s to see the graph.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "first_trl"
FLOORS = (  # seven between the ground and the command line
    ("constants", "errors"),
    ("losses", "loss_rules", "head", "metrics", "templates", "files", "redaction", "interrupts", "trl_fields"),
    ("log", "failures", "settings", "calibration", "modeling", "first_config", "vllm_scoring"),
    ("data", "scoring", "student", "checkpoints", "hub", "demo"),
    ("recipe", "training", "cache", "generation"),
    ("run", "collator", "evaluation", "cache_tools", "plan", "model_checks"),
    ("trainer", "checks", "prediction", "merging", "report", "schema"),
    ("stages",),
    ("__main__",),
)
# A folder stands for its files, and `recipe` for recipe_file and recipe_rules; among these there is no circle either.
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> set[Path]:
    """The files of the package that a file imports when it runs, anywhere in it; not those for the type checker."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {inner for node in for_types for inner in ast.walk(node)}
    for node in (node for node in ast.walk(tree) if node not in skipped):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("first_trl")):
            base = path.parents[node.level - 1] if node.level else PACKAGE.parent
            module = base.joinpath(*(node.module or "").split(".")) if node.module else base
            names = [module / alias.name for alias in node.names] if module.is_dir() else [module]
            found |= {
                file for name in names for file in (name.with_suffix(".py"), name / "__init__.py") if file.is_file()
            }
            found |= {module / "__init__.py"} if module.is_dir() and not found else set()
    return found - {path, PACKAGE / "__init__.py"}


def part(path: Path) -> str:
    """The folder or file of the table that a file belongs to."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "recipe" if name in ("recipe_file", "recipe_rules") else name


def test_imports_lead_downwards_and_never_in_a_circle():
    graph = {path: imports(path) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
    assert len(graph) > 40 and sum(map(len, graph.values())) > 100
    for number, names in enumerate(FLOORS):
        print(number, *names)
    upward, inside = [], {}
    for path, found in graph.items():
        inside[path] = {other for other in found if part(other) == part(path)}
        too_high = [other for other in found - inside[path] if FLOOR[part(other)] >= FLOOR[part(path)]]
        upward += [f"{path.stem} -> {other.stem}" for other in too_high]
    assert not upward, upward
    while done := [path for path in inside if not inside[path] & inside.keys()]:
        for path in done:
            del inside[path]
    assert not inside, f"a circle among {[path.stem for path in inside]}"
