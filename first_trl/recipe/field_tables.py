"""Which settings TRL, transformers and FIRSTConfig know, read from their source without importing them.

Importing TRL takes seconds; a misspelt key should not. So the fields of the dataclasses are taken from the syntax tree
of the installed files. A test holds this against the real classes; a class that moved is an error here, not a guess.
"""

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Each class and its parents, oldest first: (package, file, class).
_TRAINING = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
CLASSES = {
    "SFTConfig": _TRAINING,
    "FIRSTConfig": (*_TRAINING, ("first_trl", "first_config.py", "FIRSTConfig")),
    "ModelConfig": (("trl", "trainer/model_config.py", "ModelConfig"),),
}
_ENUM_FILES = (("transformers", "training_args.py"), ("transformers", "trainer_utils.py"))


@dataclass(frozen=True)
class FieldSpec:
    """One setting of a dataclass: its type as source text, and the texts that it may be."""

    name: str
    annotation: str
    choices: tuple[str, ...] = ()


@cache
def known_fields(class_name: str) -> dict[str, FieldSpec]:
    """The fields of one of [`CLASSES`], inherited ones included.

    Raises:
        ModuleNotFoundError: a package is not installed.
        RuntimeError: a class is no longer where this module looks for it.
    """
    specs: dict[str, FieldSpec] = {}
    parent = None
    for package, file, name in CLASSES[class_name]:
        node = _class_node(package, file, name)
        if parent is not None and parent not in [ast.unparse(base) for base in node.bases]:
            raise RuntimeError(f"{name} in {package}/{file} no longer derives from {parent}; update field_tables.py")
        specs |= {spec.name: spec for spec in map(_field_spec, node.body) if spec is not None}
        parent = name
    return specs


def _class_node(package: str, file: str, name: str) -> ast.ClassDef:
    for node in _tree(package, file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise RuntimeError(f"{package}/{file} no longer defines {name}; install the versions that first-trl names")


@cache
def _tree(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; run `pip install {package}`", name=package)
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


def _field_spec(node: ast.stmt) -> FieldSpec | None:
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return None
    annotation = ast.unparse(node.annotation)
    choices = _declared_choices(node.value) or tuple(
        value for enum, values in _enums().items() if enum in annotation.split(" | ") for value in values
    )
    return FieldSpec(node.target.id, annotation, choices)


def _declared_choices(default: ast.expr | None) -> tuple[str, ...]:
    """The literal list of `field(metadata={"choices": [...]})`, if there is one."""
    if not isinstance(default, ast.Call):
        return ()
    for keyword in default.keywords:
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value == "choices"
                    and isinstance(value, ast.List | ast.Tuple)
                ):
                    return tuple(ast.literal_eval(value))
    return ()


@cache
def _enums() -> dict[str, tuple[str, ...]]:
    """Enum class -> its values, of the enums that TrainingArguments uses as types."""
    found: dict[str, tuple] = {}
    for package, file in _ENUM_FILES:
        for node in _tree(package, file).body:
            if isinstance(node, ast.ClassDef) and "ExplicitEnum" in [ast.unparse(base) for base in node.bases]:
                values = [s.value for s in node.body if isinstance(s, ast.Assign)]
                found[node.name] = tuple(v.value for v in values if isinstance(v, ast.Constant))
    return found
