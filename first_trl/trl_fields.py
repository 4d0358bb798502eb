"""The settings of TRL and of FIRSTConfig, from their source: importing TRL takes four seconds, too many for a typo.

A test compares them with the real classes, and a class that moved is an error here, not a guess.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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


class FieldSpec(NamedTuple):
    """One setting of a dataclass: its type as source text, the texts that it may be, its help and its default."""

    annotation: str
    choices: tuple[str, ...] = ()
    help: str = ""
    default: Any = None


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
        classes = {node.name: node for node in _tree(package, file).body if isinstance(node, ast.ClassDef)}
        if name not in classes:
            raise RuntimeError(f"{package}/{file} no longer defines {name}; install the versions that first-trl names")
        if parent is not None and parent not in [ast.unparse(base) for base in classes[name].bases]:
            raise RuntimeError(f"{name} in {package}/{file} no longer derives from {parent}; update trl_fields.py")
        for node in classes[name].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                specs[node.target.id] = _field_spec(ast.unparse(node.annotation), node.value)
        parent = name
    return specs


def _field_spec(annotation: str, value: ast.expr | None) -> FieldSpec:
    given: dict[str, Any] = {} if isinstance(value, ast.Call) else {"default": _literal(value)}
    for keyword in value.keywords if isinstance(value, ast.Call) else ():
        if isinstance(keyword.value, ast.Dict):  # metadata={"help": ..., "choices": [...]}
            pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
            given |= {_literal(key): _literal(item) for key, item in pairs}
        elif keyword.arg == "default":
            given["default"] = _literal(keyword.value)
    enums = [values for enum, values in _enums().items() if enum in annotation.split(" | ")]
    choices = given.get("choices") or [value for values in enums for value in values]
    return FieldSpec(annotation, tuple(choices), " ".join((given.get("help") or "").split()), given.get("default"))


def _literal(node: ast.expr | None) -> Any:
    """The value of an expression that is written out, else None."""
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


@cache
def _tree(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; run `pip install {package}`", name=package)
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))


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
