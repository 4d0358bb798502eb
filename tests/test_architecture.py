"""The floors hold: a module imports from lower floors, or from an earlier page of its own idea, and from nothing else.

An idea is one line of the tables below: a module, or a few pages that are read in that order. A new module gets a
place here before it gets an import.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "first_trl"
FLOORS = (
    (  # 0: pure
        ("field_types", "data.rendering", "config"),
        ("recipe.field_tables",),
        ("recipe.file",),
        ("cache.fingerprints", "cache.format", "cache.shard", "cache.reader", "cache.writer"),
        ("metrics",),
        ("losses",),
        ("head", "trl_private", "modeling"),
        ("cache.arrays",),
        ("data.folds",),
        ("data.encoding",),
        ("data.load_errors",),
        ("running.folder",),
        ("running.redaction", "running.log"),
        ("running.failures",),
        ("plan.accelerators",),
        ("sharding",),
    ),
    (  # 1: one idea each
        ("recipe.rules", "recipe.dataset_rules", "recipe.keys", "recipe.sections", "recipe.loading"),
        ("data.examples", "data.choices"),
        ("scoring",),
        ("server_scoring",),
        ("calibration", "family"),
        ("abstention", "report.figures", "report.verdict", "report.writing"),
        ("hub.card_text", "hub.upload", "hub.card"),
        ("cache.identity",),
        ("cache.run",),
        ("plan.footprint",),
    ),
    (  # 2: parts joined
        ("first_config", "trainer"),
        ("training",),
        ("evaluation", "controls"),
        ("cache.inspection",),
        ("cache.verification",),
        ("cache.hub",),
        ("pipeline", "running.command"),
        ("plan.rows",),
        ("plan.machine",),
    ),
    (  # 3: commands
        ("stages.sft",),
        ("stages.cache",),
        ("stages.calibrate",),
        ("stages.distill",),
        ("stages.evaluate",),
        ("stages.push",),
        ("cache.commands",),
        ("prediction",),
        ("merging",),
        ("plan.sources", "plan.memory", "plan.estimate", "plan.command"),
        ("demo.task", "demo.models", "demo"),
    ),
    (("__main__",),),
)
# module -> (floor, idea, page)
PLACES = {
    module: (floor, idea[0], page)
    for floor, ideas in enumerate(FLOORS)
    for idea in ideas
    for page, module in enumerate(idea)
}
# Their __init__.py says what is in the folder, and `cache` offers `open_cache`: no code of a floor.
PACKAGES = {"", "stages", "cache", "data", "hub", "plan", "recipe", "report", "running"}
ROOT = "(root)"  # first_trl/__init__.py, and stages/__init__.py, which hold no code of a floor


def modules() -> dict[str, Path]:
    """Module, named from the package, -> its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file, inside functions too; modules of the package begin with first_trl."""
    package = ["first_trl", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def imported_modules(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, or `ROOT` for the package's own names."""
    for module, name in imports(path):
        if module.split(".")[0] != "first_trl":
            continue
        inner = module.removeprefix("first_trl").lstrip(".")
        submodule = f"{inner}.{name}".lstrip(".")
        yield submodule if submodule in known and name else inner or ROOT


def test_the_architecture_gives_every_module_a_place():
    assert set(modules()) - PACKAGES - set(PLACES) == set(), "give these modules a floor"
    assert len(modules()) > 25


def test_the_architecture_only_imports_downwards():
    known, looked, wrong = modules(), 0, []
    for module, path in known.items():
        if module not in PLACES:
            continue
        floor, idea, page = PLACES[module]
        for imported in imported_modules(path, known):
            looked += 1
            if imported not in PLACES:
                wrong.append(f"{module} imports {imported}")
                continue
            below, its_idea, its_page = PLACES[imported]
            if not (below < floor or (its_idea == idea and its_page < page)):
                wrong.append(f"{module} (floor {floor}) imports {imported} (floor {below})")
    assert wrong == []
    assert looked > 60


def test_the_architecture_keeps_stages_apart():
    known, looked = modules(), 0
    for module in (module for module in known if module.startswith("stages.")):
        assert not [name for name in imported_modules(known[module], known) if name.startswith("stages")], module
        looked += 1
    assert looked == 6


def test_the_architecture_imports_nothing_from_the_root():
    known, looked = modules(), 0
    for module, path in known.items():
        assert ROOT not in list(imported_modules(path, known)), module
        looked += 1
    assert looked == len(known) > 25


def test_the_architecture_keeps_the_root_lazy():
    assert {module for module, _ in imports(PACKAGE / "__init__.py")} <= {"importlib", "typing"}


def test_the_architecture_keeps_private_names_of_trl_in_one_module():
    looked, private = 0, []
    for module, path in modules().items():
        for imported, name in imports(path):
            if imported.split(".")[0] == "trl":
                looked += 1
                if (imported != "trl" or name.startswith("_") or not name) and module != "trl_private":
                    private.append(f"{module} imports {imported}.{name}")
    assert private == []
    assert looked > 5
