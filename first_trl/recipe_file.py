"""From a recipe's text to plain values, with the line of every key and what is wrong with the text.

YAML as people mean it: a key written twice is an error and not a silent replacement, `${NAME}` and `${NAME:-default}`
are read from the environment, `extends` is followed, and only texts, numbers, booleans, lists and mappings come out.
What the keys mean is decided in `first_trl.recipe`.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from .constants import SECRET_VALUE
from .errors import FirstTrlError

# A recipe is a page. These bounds stop aliases that unfold into millions of nodes, and files that are something else.
_MAX_BYTES, _MAX_NODES, _MAX_DEPTH = 100_000, 20_000, 32
_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
_VARIABLE_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_SECRET_NAME = r"token|secret|pass|password|passwd|passphrase|pwd|pat|auth|dsn|api_?key|private_?key|credentials?"
_SECRET_KEY = re.compile(rf"(?!eos_token|pad_token|bos_token)(.*_)?({_SECRET_NAME})", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(rf"(^|_)({_SECRET_NAME}|key)(_|$)|(pass|passwd|password|token|secret)$", re.IGNORECASE)


class RecipeError(FirstTrlError):
    """Everything that is wrong with a recipe, at once. `.problems` lists the lines of the message."""

    def __init__(self, file: str, problems: list[str]):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{file}: {count} in this recipe:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.file, self.problems = file, problems


def is_secret(path: tuple, value: Any) -> bool:
    """Whether a key or a value looks like a credential."""
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    named = value is not None and _SECRET_KEY.fullmatch(key) is not None
    return named or (isinstance(value, str) and SECRET_VALUE.search(value) is not None)


def read_value(text: str) -> Any:
    """A command-line value or a variable, read as YAML would; text that is not plain YAML stays text."""
    try:
        value = yaml.safe_load(text)
        json.dumps(value)  # refuses dates, and aliases that hold themselves
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text
    return value


class RecipeFile:
    """The values of a recipe file, and of the one that it extends, with variables replaced.

    `places`: path of a key -> (rank of its file, line, both in words); `problems`: path -> what is wrong; what to do.
    RecipeError where there is no YAML mapping to read; `below` is the name of the recipe that extends this one.
    """

    def __init__(self, path: Path, below: str = ""):
        self.name, self.rank, self.prefix = below or str(path), 2 if below else 1, f"{path.name}, " if below else ""
        self.places: dict[tuple, tuple[int, int, str]] = {}
        self.problems: dict[tuple, str] = {}
        self._count = 0
        self.values: dict[str, Any] = self._value(self._root(path), ())
        extends = self.values.get("extends")
        if extends is None or below:
            return
        if not isinstance(extends, str) or not (path.parent / extends).is_file():
            self.problems["extends",] = "there is no such recipe; give the path of one, relative to this file"
            return
        other = RecipeFile(path.parent / extends, below=self.name)
        if "extends" in other.values:
            self.problems["extends",] = "that recipe extends another, and only one level is read; extend the last one"
            return
        del self.values["extends"]
        other.values.pop("name", None)  # two recipes under one name would share a folder
        self.values = _merged(other.values, self.values)
        self.problems |= {where: why for where, why in other.problems.items() if where not in self.places}
        self.places = other.places | self.places

    def _root(self, path: Path) -> yaml.MappingNode:
        line, why = 1, "a recipe is a mapping of sections; start with e.g. `name: my-run`"
        try:
            if path.is_file() and path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has {path.stat().st_size} bytes, more than a recipe can")
            self._loader: Any = yaml.SafeLoader(path.read_text(encoding="utf-8"))
            root = self._loader.get_single_node()
            if isinstance(root, yaml.MappingNode):
                return root
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            line = mark.line + 1 if mark else 1
            what = " ".join(filter(None, (getattr(error, "context", ""), getattr(error, "problem", "")))) or str(error)
            why = f"this is not YAML ({' '.join(what.split())}); look at the indentation, colons and quotes here"
        except (OSError, ValueError) as error:
            why = f"it cannot be read ({getattr(error, 'strerror', None) or error}); give a recipe, a YAML file"
        raise RecipeError(self.name, [f"{self.prefix}line {line}: {why}."]) from None

    def _value(self, node: yaml.Node, path: tuple) -> Any:
        self._count += 1
        if self._count > _MAX_NODES or len(path) > _MAX_DEPTH:
            why = "this recipe unfolds into too many values; remove nested aliases (*name)."
            raise RecipeError(self.name, [f"{self.prefix}line {node.start_mark.line + 1}: {why}"])
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._value(item, (*path, i)) for i, item in enumerate(node.value)]
        try:
            value = self._loader.construct_object(node)
            if not isinstance(value, bool | int | float | str | None):
                raise ValueError(f"as {type(value).__name__}")
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            reason = getattr(error, "problem", None) or error
            self.problems[path] = f"YAML cannot read it as text or a number ({reason}); put it in quotes"
            return node.value if isinstance(node, yaml.ScalarNode) else f"!!{kind}"
        if not isinstance(value, str) or "${" not in value:
            return value
        expanded = _VARIABLE.sub(lambda match: self._expanded(match, path), value)
        if path in self.problems:
            return value
        whole = _VARIABLE.fullmatch(value)
        if whole is None or whole[1] is None or isinstance(node, yaml.ScalarNode) and node.style is not None:
            return expanded
        plain = read_value(expanded)  # an unquoted `${ROWS:-100}` means what an unquoted 100 would
        return expanded if isinstance(plain, list | dict) else plain

    def _mapping(self, node: yaml.MappingNode, path: tuple) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            where, line = (*path, key), key_node.start_mark.line + 1
            kind = key_node.tag.rpartition(":")[2]
            if kind == "merge":
                self.problems[where] = "merge keys (<<) are not read; write the keys out"
            elif not isinstance(key_node, yaml.ScalarNode):
                self.problems[where] = "a key must be text; quote it, or indent what follows it"
            elif kind != "str":
                self.problems[where] = f"YAML reads this key as {kind}, not as text; quote it"
            else:
                result[where[-1]] = self._value(value_node, where)
                if where in self.places:
                    self.problems[where] = f"it is written twice, first on line {self.places[where][1]}; remove one"
            self.places[where] = (self.rank, line, f"{self.prefix}line {line}")
        return result

    def _expanded(self, match: re.Match, path: tuple) -> str:
        if match[1] is None:
            return "${"
        if (variable := _VARIABLE_NAME.fullmatch(match[1])) is None:
            why = f"{match[0]} is not a variable; write ${{NAME}} or ${{NAME:-default}}, or $${{ for a literal ${{"
        elif _SECRET_VARIABLE.search(variable[1]):
            why = f"{variable[1]} looks like a secret, and recipes are published; remove it and run `hf auth login`"
        elif variable[2] is None and variable[1] not in os.environ:
            why = f"the environment variable {variable[1]} is not set; set it, or write ${{{variable[1]}:-default}}"
        else:
            return os.environ.get(variable[1]) or variable[2] or ""  # as in a shell, `:-` also replaces an empty one
        self.problems[path] = why
        return ""


def _merged(below: Any, above: Any) -> Any:
    """Mappings key by key; anything else from above."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    rest = {key: value for key, value in below.items() if key not in above}
    return {key: _merged(below.get(key), value) for key, value in above.items()} | rest
