"""From a recipe's text to plain values, with the line of every key, and the list of everything found wrong.

YAML as people mean it: a key written twice is an error and not a silent replacement, `${NAME}` and `${NAME:-default}`
are read from the environment, and nothing but texts, numbers, booleans, lists and mappings comes out. What the keys
mean is decided in `first_trl.recipe.loading`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MISSING = object()  # a problem about a value that is not there
# A recipe is a page. These bounds stop aliases that unfold into millions of nodes, and files that are something else.
_MAX_BYTES, _MAX_NODES, _MAX_DEPTH = 1_000_000, 20_000, 32
_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")
_VARIABLE_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_SECRET_VARIABLE = re.compile(r"(^|_)(token|secret|password|passwd|key|credentials?)(_|$)", re.IGNORECASE)
_SECRET_KEY = re.compile(r"(^|_)(token|api_key|secret|password|passwd|credentials?)$")
_SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_NOT_SECRET = {"eos_token", "pad_token", "bos_token"}


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, at once. `.problems` lists the lines of the message."""

    def __init__(self, file: str, problems: list[str]):
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{file}: {count} in this recipe:\n" + "\n".join(f"  {problem}" for problem in problems))
        self.file, self.problems = file, problems


class Findings:
    """Collects problems with their place, to raise them together as one [`RecipeError`]."""

    def __init__(self, file: str):
        self.file = file
        self.lines: dict[tuple, int] = {}  # path of a key -> its line in the file
        self.overridden: set[tuple] = set()  # paths set on the command line
        self.unreadable: set[tuple] = set()  # paths whose value could not be read: one problem each is enough
        self._found: list[tuple[int, str]] = []

    def add(self, path: tuple, value: Any, problem: str, remedy: str) -> None:
        """Record that `value` at `path` is wrong. Values that may be secrets are not repeated."""
        if path in self.unreadable:
            return
        place, line = self._place(path)
        shown = "" if value is MISSING or not path else f" = {_shown(path, value)}"
        name = ".".join(map(str, path))
        where = f"{place}: {name}{shown}" if name else place
        text = f"{where}: {problem}; {remedy}{'' if remedy.endswith('?') else '.'}"
        if (line, text) not in self._found:
            self._found.append((line, text))

    def _place(self, path: tuple) -> tuple[str, int]:
        for over in self.overridden:
            below, above = path[: len(over)] == over, over[: len(path)] == path and path not in self.lines
            if below or (above and path):
                return "command line", 0
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                line = self.lines[path[:length]]
                return f"line {line}", line
        return "recipe", 0

    def add_at_line(self, line: int, problem: str, remedy: str) -> None:
        """Record a problem of the text itself."""
        self._found.append((line, f"line {line}: {problem}; {remedy}."))

    def add_override(self, problem: str, remedy: str) -> None:
        """Record a problem of the command line that has no place in the recipe."""
        self._found.append((0, f"command line: {problem}; {remedy}{'' if remedy.endswith('?') else '.'}"))

    def raise_if_any(self) -> None:
        """Raise the [`RecipeError`] of everything recorded, in the order of the file."""
        if self._found:
            told = [text for _, text in sorted(self._found, key=lambda found: found[0])]
            raise RecipeError(self.file, [_SECRET_VALUE.sub("(not shown)", text) for text in told])


def is_secret(path: tuple, value: Any) -> bool:
    """Whether a key or a value looks like a credential."""
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    named = bool(_SECRET_KEY.search(key.lower())) and key not in _NOT_SECRET
    return (named and value is not None) or (isinstance(value, str) and bool(_SECRET_VALUE.search(value)))


def _shown(path: tuple, value: Any) -> str:
    if is_secret(path, value) or _SECRET_VALUE.search(repr(value)):
        return "(not shown)"
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def read_recipe_file(path: str | Path, findings: Findings, environment: Mapping[str, str] = os.environ) -> dict:
    """The recipe as nested dicts and lists; lines and problems go to `findings`.

    Raises:
        RecipeError: the file cannot be read as one YAML mapping; every other problem is only recorded.
    """
    text = _read_text(Path(path), findings)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(filter(None, (error.context, error.problem)))
        findings.add_at_line(line, f"this is not YAML ({problem})", "look at the indentation, colons and quotes here")
    except (yaml.YAMLError, RecursionError) as error:
        findings.add_at_line(1, f"this is not YAML ({type(error).__name__})", "write a YAML mapping, in UTF-8")
    findings.raise_if_any()
    if not isinstance(root, yaml.MappingNode):
        findings.add_at_line(1, "a recipe is a mapping of sections", "start with e.g. `name: my-run`")
        findings.raise_if_any()
    return _Reader(loader, findings, environment).value(root, ())


def _read_text(path: Path, findings: Findings) -> str:
    try:
        size = path.stat().st_size
        if path.is_file() and size <= _MAX_BYTES:
            return path.read_text(encoding="utf-8")
        problem = f"it has {size} bytes, more than a recipe can" if path.is_file() else "this is a folder, not a file"
    except UnicodeDecodeError as error:
        problem = f"it is not UTF-8 text (byte {error.start})"
    except (OSError, ValueError) as error:
        problem = f"it cannot be read ({getattr(error, 'strerror', None) or error})"
    findings.add((), MISSING, problem, "give the path of a recipe, a YAML file")
    findings.raise_if_any()
    raise AssertionError("a problem was just added")


def read_override(text: str) -> Any:
    """A command-line value, read as YAML would; text that is not YAML stays text."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    plain = value is None or isinstance(value, bool | int | float | str | list | dict)
    return value if plain else text


class _Reader:
    """Walks the nodes of one document: records lines, refuses duplicates, expands variables."""

    def __init__(self, loader: yaml.SafeLoader, findings: Findings, environment: Mapping[str, str]):
        self.loader, self.findings, self.environment = loader, findings, environment
        self.count = 0

    def value(self, node: yaml.Node, path: tuple) -> Any:
        self.count += 1
        if self.count > _MAX_NODES or len(path) > _MAX_DEPTH:
            line = node.start_mark.line + 1
            self.findings.add_at_line(
                line, "this recipe unfolds into too many values", "remove nested aliases (*name)"
            )
            self.findings.raise_if_any()
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if not isinstance(node, yaml.ScalarNode) and kind not in ("map", "seq"):
            return self._unreadable(path, f"!!{kind}", "a recipe holds no objects", "remove the tag")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: tuple) -> dict:
        result = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in result:
                first = self.findings.lines[(*path, key)]
                self.findings.add_at_line(
                    line, f"{'.'.join(map(str, (*path, key)))} is written twice, first on line {first}", "remove one"
                )
                continue
            self.findings.lines[(*path, key)] = line
            result[key] = self.value(value_node, (*path, key))
        return result

    def _key(self, node: yaml.Node, path: tuple) -> str | None:
        """The key as text; None, and a problem, for anything else."""
        line = node.start_mark.line + 1
        if node.tag == "tag:yaml.org,2002:merge":
            self.findings.add_at_line(line, "merge keys (<<) are not read", "write the keys out")
        elif not isinstance(node, yaml.ScalarNode):
            self.findings.add_at_line(line, "a key must be text", "quote it, or indent what follows it")
        elif node.tag != "tag:yaml.org,2002:str":
            kind = node.tag.rpartition(":")[2]
            self.findings.add_at_line(line, f"YAML reads the key {node.value} as {kind}, not as text", "quote it")
        else:
            return node.value
        return None

    def _scalar(self, node: yaml.ScalarNode, path: tuple) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            reason = getattr(error, "problem", None) or error
            return self._unreadable(path, node.value, f"YAML cannot read it ({reason})", "put it in quotes")
        if value is not None and not isinstance(value, bool | int | float | str):
            kind = type(value).__name__
            return self._unreadable(path, node.value, f"YAML reads it as {kind}", "put it in quotes")
        if not isinstance(value, str):
            return value
        expanded = self._expand(value, path)
        whole = _VARIABLE.fullmatch(value)
        # An unquoted `${ROWS:-100}` means what an unquoted 100 would.
        if whole and whole.group(1) is not None and node.style is None and expanded is not None:
            plain = read_override(expanded)
            return expanded if isinstance(plain, list | dict) else plain
        return expanded

    def _unreadable(self, path: tuple, value: str, problem: str, remedy: str) -> None:
        self.findings.add(path, value, problem, remedy)
        self.findings.unreadable.add(path)

    def _expand(self, text: str, path: tuple) -> str | None:
        """`text` with its variables in place; None, and a problem, where one is missing."""

        def replace(match: re.Match) -> str:
            if match.group(0) == "$${":
                return "${"
            problem, variable = self._broken_variable(match.group(1)), _VARIABLE_NAME.fullmatch(match.group(1))
            if problem is None and variable is not None:
                name, default = variable.groups()
                # As in a shell, `:-` also replaces a variable that is set to nothing.
                return self.environment.get(name) or default or ""
            assert problem is not None
            self._unreadable(path, text, *problem)
            return ""

        expanded = _VARIABLE.sub(replace, text)
        return None if path in self.findings.unreadable else expanded

    def _broken_variable(self, inner: str) -> tuple[str, str] | None:
        """(what is wrong with `${inner}`, the remedy), or None."""
        match = _VARIABLE_NAME.fullmatch(inner)
        if match is None:
            return f"${{{inner}}} is not a variable", "write ${NAME} or ${NAME:-default}, or $${ for a literal ${"
        name, default = match.groups()
        if _SECRET_VARIABLE.search(name):
            return f"{name} looks like a secret, and recipes are published", "remove it and run `hf auth login`"
        if default is None and name not in self.environment:
            remedy = f"set it, or write ${{{name}:-default}}; a literal ${{ is written $${{"
            return f"the environment variable {name} is not set", remedy
        return None
