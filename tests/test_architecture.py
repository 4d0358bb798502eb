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
        ("field_types", "rendering", "config"),
        ("field_tables",),
        ("recipe_file",),
        ("fingerprints", "cache_format", "cache_rows", "cache", "cache_writer"),
        ("metrics",),
        ("losses",),
        ("head", "trl_private", "modeling"),
        ("rows",),
        ("folds",),
        ("encoding",),
        ("load_errors",),
        ("run_folder",),
        ("redaction", "run_log"),
        ("failures",),
        ("accelerators",),
        ("sharding",),
    ),
    (  # 1: one idea each
        ("recipe_rules", "dataset_rules", "recipe_keys", "recipe_sections", "recipe"),
        ("data", "choices"),
        ("scoring",),
        ("server_scoring",),
        ("calibration", "family"),
        ("abstention", "figures", "verdict", "report"),
        ("card_text", "hub", "card"),
        ("cache_identity",),
        ("cache_run",),
        ("footprint",),
    ),
    (  # 2: parts joined
        ("first_config", "trainer"),
        ("training",),
        ("evaluation", "controls"),
        ("cache_inspection",),
        ("cache_verification",),
        ("cache_hub",),
        ("pipeline", "stage_command"),
        ("plan_rows",),
        ("plan_machine",),
    ),
    (  # 3: commands
        ("stages.sft",),
        ("stages.cache",),
        ("stages.calibrate",),
        ("stages.distill",),
        ("stages.evaluate",),
        ("stages.push",),
        ("cache_commands",),
        ("prediction",),
        ("merging",),
        ("plan_sources", "plan_memory", "plan", "plan_command"),
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
    packages = {"", "stages"}  # these two only make folders importable
    assert set(modules()) - packages - set(PLACES) == set(), "give these modules a floor"
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
