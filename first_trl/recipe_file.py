"""From a recipe's text to plain values, with the line of every key, and the list of all problems found.

YAML as people mean it: a key written twice is an error and not a silent replacement, `${NAME}` and `${NAME:-default}`
are read from the environment, and only texts, numbers, booleans, lists and mappings come out. What the keys mean is
decided in `first_trl.recipe`.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from .constants import SECRET_VALUE
from .errors import FirstTrlError
from .settings import MISSING

# A recipe is a page. These bounds stop aliases that unfold into millions of nodes, and files that are something else.
_MAX_BYTES, _MAX_NODES, _MAX_DEPTH = 100_000, 20_000, 32
_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
_VARIABLE_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_SECRET_NAME = r"token|secret|pass|password|passwd|passphrase|pwd|pat|auth|dsn|api_?key|private_?key|credentials?"
_SECRET_KEY = re.compile(rf"(?!eos_token|pad_token|bos_token)(.*_)?({_SECRET_NAME})", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(rf"(^|_)({_SECRET_NAME}|key)(_|$)|(pass|passwd|password|token|secret)$", re.IGNORECASE)
COMMAND_LINE = (0, 0, "command line")


class RecipeError(FirstTrlError):
    """Everything that is wrong with a recipe, at once. `.problems` lists the lines of the message."""

    def __init__(self, file: str, problems: list[str]):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{file}: {count} in this recipe:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.file, self.problems = file, problems


class ErrorCollector:
    """Collects problems with their place, to raise them together as one [`RecipeError`]."""

    def __init__(self, file: str):
        self.file = file
        self.places: dict[tuple, tuple[int, int, str]] = {}  # path of a key -> (rank of its file, line, in words)
        self.overridden: set[tuple] = set()  # paths set on the command line
        self.settled: set[tuple] = set()  # paths that have their problem: one each is enough
        self._found: dict[str, tuple[int, int]] = {}

    def add(self, path: tuple, value: Any, what: str, remedy: str, settle: bool = False) -> None:
        """Record that `value` at `path` is wrong. Values that may be secrets are not repeated."""
        if path in self.settled:
            return
        if settle:
            self.settled.add(path)
        shown = "" if value is MISSING or isinstance(value, dict) or not path else f" = {_shown(path, value)}"
        name = ".".join(map(str, path))
        self.add_at(self._place(path), f"{name}{shown}: {what}" if name else what, remedy)

    def add_at(self, place: tuple[int, int, str], what: str, remedy: str) -> None:
        """Record a problem of the text itself, or of the command line."""
        text = f"{place[2]}: {what}; {remedy}{'' if remedy.endswith('?') else '.'}"
        self._found.setdefault(SECRET_VALUE.sub("(not shown)", text), place[:2])

    def _place(self, path: tuple) -> tuple[int, int, str]:
        for over in self.overridden:
            above = path and over[: len(path)] == path and path not in self.places
            if above or path[: len(over)] == over:
                return COMMAND_LINE
        known = (self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places)
        return next(known, (0, 0, "recipe"))

    def raise_if_any(self) -> None:
        """Raise the [`RecipeError`] of everything recorded, in the order of the file."""
        if self._found:
            raise RecipeError(self.file, sorted(self._found, key=lambda text: self._found[text])) from None


def is_secret(path: tuple, value: Any) -> bool:
    """Whether a key or a value looks like a credential."""
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    named = value is not None and _SECRET_KEY.fullmatch(key) is not None
    return named or (isinstance(value, str) and SECRET_VALUE.search(value) is not None)


def _shown(path: tuple, value: Any) -> str:
    text = repr(value)
    if is_secret(path, value) or SECRET_VALUE.search(text):
        return "(not shown)"
    return text if len(text) <= 100 else text[:97] + "..."


def read_recipe_file(path: Path, errors: ErrorCollector, rank: int = 1) -> dict:
    """The recipe as nested dicts and lists; lines and problems go to `errors`.

    Args:
        rank: 1 for the recipe itself, 2 for the one that it extends, whose name its places carry.

    Raises:
        RecipeError: the file cannot be read as one YAML mapping; every other problem is only recorded.
    """
    reader = _Reader(errors, rank, "" if rank == 1 else f"{path.name}, ")
    what, remedy, root = "a recipe is a mapping of sections", "start with e.g. `name: my-run`", None
    place = reader.place(None)
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than a recipe can")
        reader.loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = reader.loader.get_single_node()
    except (yaml.YAMLError, RecursionError) as error:
        place = reader.place(getattr(error, "problem_mark", None))
        why = " ".join(filter(None, (getattr(error, "context", ""), getattr(error, "problem", "")))) or type(error)
        what, remedy = f"this is not YAML ({why})", "look at the indentation, colons and quotes here"
    except (OSError, ValueError) as error:
        what, remedy = f"it cannot be read ({getattr(error, 'strerror', None) or error})", "give a recipe, a YAML file"
        place = rank, 0, f"{reader.prefix}file"
    if isinstance(root, yaml.MappingNode):
        return reader.value(root, ())
    errors.add_at(place, what, remedy)
    errors.raise_if_any()
    raise AssertionError("a problem was just added")


def read_value(text: str) -> Any:
    """A command-line value or a variable, read as YAML would; text that is not plain YAML stays text."""
    try:
        value = yaml.safe_load(text)
        json.dumps(value)  # refuses dates, and aliases that hold themselves
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text
    return value


class _Reader:
    """Walks the nodes of one document: records lines, refuses duplicates, expands variables."""

    loader: Any

    def __init__(self, errors: ErrorCollector, rank: int, prefix: str):
        self.errors, self.rank, self.prefix = errors, rank, prefix
        self.count = 0

    def place(self, mark: yaml.Mark | None) -> tuple[int, int, str]:
        line = mark.line + 1 if mark else 1
        return self.rank, line, f"{self.prefix}line {line}"

    def value(self, node: yaml.Node, path: tuple) -> Any:
        self.count += 1
        if self.count > _MAX_NODES or len(path) > _MAX_DEPTH:
            what, remedy = "this recipe unfolds into too many values", "remove nested aliases (*name)"
            self.errors.add_at(self.place(node.start_mark), what, remedy)
            self.errors.raise_if_any()
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if not isinstance(node, yaml.ScalarNode) and kind not in ("map", "seq"):
            return self.errors.add(path, f"!!{kind}", "a recipe holds no objects", "remove the tag", settle=True)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: tuple) -> dict:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place, where = self.place(key_node.start_mark), (*path, str(key_node.value))
            if key_node.tag == "tag:yaml.org,2002:merge":
                self.errors.add_at(place, "merge keys (<<) are not read", "write the keys out")
            elif not isinstance(key_node, yaml.ScalarNode):
                self.errors.add_at(place, "a key must be text", "quote it, or indent what follows it")
            elif key_node.tag != "tag:yaml.org,2002:str":
                kind = key_node.tag.rpartition(":")[2]
                self.errors.add_at(place, f"YAML reads the key {key_node.value} as {kind}, not as text", "quote it")
            elif key_node.value in result:
                what = f"{'.'.join(map(str, where))} is written twice, first on line {self.errors.places[where][1]}"
                self.errors.add_at(place, what, "remove one")
            else:
                self.errors.places[where] = place
                result[key_node.value] = self.value(value_node, where)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: tuple) -> Any:
        try:
            value = self.loader.construct_object(node)
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError(f"as {type(value).__name__}")
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            what = f"YAML cannot read it as text or a number ({getattr(error, 'problem', None) or error})"
            return self.errors.add(path, node.value, what, "put it in quotes", settle=True)
        if not isinstance(value, str) or "${" not in value:
            return value
        expanded = _VARIABLE.sub(lambda match: self._expand(match, value, path), value)
        if path in self.errors.settled:
            return None
        whole = _VARIABLE.fullmatch(value)
        if whole is None or whole[1] is None or node.style is not None:
            return expanded
        plain = read_value(expanded)  # an unquoted `${ROWS:-100}` means what an unquoted 100 would
        return expanded if isinstance(plain, list | dict) else plain

    def _expand(self, match: re.Match, text: str, path: tuple) -> str:
        if match[1] is None:
            return "${"
        if (variable := _VARIABLE_NAME.fullmatch(match[1])) is None:
            what, remedy = (
                f"{match[0]} is not a variable",
                "write ${NAME} or ${NAME:-default}, or $${ for a literal ${",
            )
        elif _SECRET_VARIABLE.search(variable[1]):
            what = f"{variable[1]} looks like a secret, and recipes are published"
            remedy = "remove it and run `hf auth login`"
        elif variable[2] is None and variable[1] not in os.environ:
            what = f"the environment variable {variable[1]} is not set"
            remedy = f"set it, or write ${{{variable[1]}:-default}}; a literal ${{ is written $${{"
        else:
            return os.environ.get(variable[1]) or variable[2] or ""  # as in a shell, `:-` also replaces an empty one
        self.errors.add(path, text, what, remedy, settle=True)
        return ""
