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
    choices: tuple[str, ...]
    help: str
    default: Any


@cache
def known_fields(class_name: str) -> dict[str, FieldSpec]:
    """The fields of one of [`CLASSES`], inherited ones too; RuntimeError where a class is no longer in its file."""
    specs: dict[str, FieldSpec] = {}
    for package, file, name in CLASSES[class_name]:
        if name not in _classes(package, file):
            raise RuntimeError(f"{package}/{file} no longer defines {name}; install the versions that first-trl names")
        for node in _classes(package, file)[name].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                specs[node.target.id] = _field_spec(ast.unparse(node.annotation), node.value)
    return specs


def _field_spec(annotation: str, value: ast.expr | None) -> FieldSpec:
    given = {k.arg: k.value for k in value.keywords} if isinstance(value, ast.Call) else {"default": value}
    metadata = given.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    said = {_literal(key): _literal(item) for key, item in pairs}  # {"help": ..., "choices": [...]}
    members = [value for enum, values in _enums().items() if enum in annotation.split(" | ") for value in values]
    help = " ".join((said.get("help") or "").split())
    return FieldSpec(annotation, tuple(said.get("choices") or members), help, _literal(given.get("default")))


@cache
def _enums() -> dict[str, list[str]]:
    """Enum class -> its values, of the enums that TrainingArguments uses as types."""
    nodes = [node for package, file in _ENUM_FILES for node in _classes(package, file).values()]
    enums = [node for node in nodes if "ExplicitEnum" in [ast.unparse(base) for base in node.bases]]
    return {node.name: [_literal(s.value) for s in node.body if isinstance(s, ast.Assign)] for node in enums}


def _literal(node: ast.expr | None) -> Any:
    """The value of an expression that is written out, else None."""
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


@cache
def _classes(package: str, file: str) -> dict[str, ast.ClassDef]:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; run `pip install {package}`", name=package)
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
