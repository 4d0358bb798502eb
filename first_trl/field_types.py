"""Does a value fit a field? The one place that compares what a user wrote with what a setting accepts.

Types are the annotation strings of dataclass fields (`"int | None"`), so that the settings of TRL can be checked from
their source, without importing it. Members of an annotation that are neither a plain type nor one of the enums passed
as `choices` are left to the dataclass itself. This is not a general validator: it knows what YAML can produce.
"""

import difflib
import math
import re
from dataclasses import dataclass, fields
from typing import Any

_PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one setting: where (`key`, dotted), what was written, what is wrong, what to do."""

    key: str
    value: Any
    problem: str
    remedy: str


class MisfitError(ValueError):
    """A value that a field does not accept."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


class SettingsError(ValueError):
    """Every problem of one settings object, as `.problems`, and all of them in the message."""

    def __init__(self, owner: str, problems: list[Problem]):
        super().__init__("\n".join(f"{owner}.{p.key} = {p.value!r}: {p.problem}; {p.remedy}." for p in problems))
        self.problems = problems


def union_members(annotation: str) -> list[str]:
    """Split `"dict[str, Any] | str | None"` at its top level."""
    members, depth, start = [], 0, 0
    for i, character in enumerate(annotation):
        depth += (character == "[") - (character == "]")
        if character == "|" and depth == 0:
            members.append(annotation[start:i].strip())
            start = i + 1
    return members + [annotation[start:].strip()]


def describe(annotation: str, choices: tuple = ()) -> str:
    """What a field accepts, in words."""
    if choices:
        return "one of " + ", ".join(map(str, choices))
    words = []
    for member in union_members(annotation):
        base, _, inner = member.partition("[")
        if base == "list":
            words.append(f"a list of {'texts' if inner.startswith('str') else 'values'}")
        elif base in _PLAIN:
            words.append(_PLAIN[base])
    return " or ".join(words) or f"a value of type {annotation}"


def fit_value(
    value: Any, annotation: str, choices: tuple = (), minimum=None, maximum=None, above=None, below=None
) -> Any:
    """The value as the field wants it, or a [`MisfitError`].

    Two conversions only, both of what people write every day: `1e-4`, which YAML reads as text, for a number, and a
    lone text for a list of texts. A boolean is never a number, a list of one number is never a number.

    Args:
        annotation: the field's type, as source text.
        choices: the values that a text may take.
        minimum, maximum, above, below: bounds of a number; the last two exclude the bound itself.
    """
    members = union_members(annotation)
    fitted, fits = _fit_members(value, members)
    if not fits:
        wanted = describe(annotation, choices)
        raise MisfitError(f"it needs {wanted}, not {_describe_value(value)}", _hint(value, members, wanted))
    if isinstance(fitted, str) and choices and fitted not in choices and not _is_exotic(members):
        close = difflib.get_close_matches(fitted, choices, n=1)
        guess = f"did you mean {close[0]}? Choose " if close else "choose "
        raise MisfitError("it is not a value of this setting", guess + describe(annotation, choices))
    if isinstance(fitted, int | float) and not isinstance(fitted, bool):
        _check_range(fitted, minimum, maximum, above, below)
    return fitted


def _fit_members(value: Any, members: list[str]) -> tuple[Any, bool]:
    """(value as the type wants it, whether it fits)."""
    bases = {member.partition("[")[0] for member in members}
    if value is None:
        return None, "None" in bases
    if isinstance(value, bool):
        return value, "bool" in bases or (value is False and "Literal[False]" in members) or _only_exotic(bases)
    if isinstance(value, int | float):
        wanted = {"int", "float"} if isinstance(value, int) else {"float"}
        return value, (bool(wanted & bases) and math.isfinite(value)) or _only_exotic(bases)
    if isinstance(value, str):
        if "str" in bases or _only_exotic(bases):
            return value, True
        if "float" in bases and _NUMBER.fullmatch(value.strip()):
            return float(value), True
        if any(member.startswith("list[str") for member in members):
            return [value], True
        return value, False
    if isinstance(value, list):
        lists = [member for member in members if member.partition("[")[0] in ("list", "tuple")]
        if not lists:
            return value, _only_exotic(bases)
        inner = lists[0].partition("[")[2][:-1] or "Any"
        return value, all(_fit_members(item, union_members(inner))[1] for item in value)
    if isinstance(value, dict):
        return value, "dict" in bases or _only_exotic(bases)
    return value, _only_exotic(bases)


_KNOWN = {"None", "int", "float", "bool", "str", "list", "tuple", "dict", "Literal"}


def _only_exotic(bases: set[str]) -> bool:
    return not (bases - {"None"}) & _KNOWN


def _is_exotic(members: list[str]) -> bool:
    return _only_exotic({member.partition("[")[0] for member in members})


def _check_range(value, minimum, maximum, above, below) -> None:
    for bound, broken, words in (
        (minimum, minimum is not None and value < minimum, "{} or more"),
        (maximum, maximum is not None and value > maximum, "{} or less"),
        (above, above is not None and value <= above, "more than {}"),
        (below, below is not None and value >= below, "less than {}"),
    ):
        if broken:
            raise MisfitError("it is out of range", f"write {words.format(bound)}")


def _describe_value(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "a whole number", float: "a number with decimals", str: "text", dict: "a mapping"}
    if isinstance(value, float) and not math.isfinite(value):
        return "an infinite or undefined number"
    if isinstance(value, list):
        kinds = sorted({_describe_value(item) for item in value if not isinstance(item, list)})
        return f"a list that holds {' and '.join(kinds)}" if kinds else "a list"
    return names.get(type(value), f"a {type(value).__name__}")


def _hint(value: Any, members: list[str], wanted: str) -> str:
    """The remedy for the mistakes that YAML invites."""
    text = any(member.partition("[")[0] in ("str", "list") and "str" in member for member in members)
    items = value if isinstance(value, list) else [value]
    if text and any(isinstance(item, bool) for item in items):
        return "YAML reads an unquoted yes, no, on, off, true or false as a boolean: put it in quotes"
    if text and any(isinstance(item, int | float) for item in items):
        return "put it in quotes"
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list | dict):
        return f"write {value[0]!r} without the brackets"
    if isinstance(value, str):
        return f"write {wanted}, without quotes"
    if value is None:
        return f"write {wanted}, or remove the line to keep the default"
    return f"write {wanted}"


class Settings:
    """Base of this package's settings: every field is checked, by type and by its metadata, when an object is made.

    A field's metadata holds `help` and, where they apply, `choices`, `minimum`, `maximum`, `above`, `below`.

    Raises:
        SettingsError: one problem per setting that does not fit.
    """

    def __post_init__(self):
        problems = []
        for field in fields(self):
            limits = {key: limit for key, limit in field.metadata.items() if key != "help"}
            value = getattr(self, field.name)
            try:
                setattr(self, field.name, fit_value(value, field.type, **limits))
            except MisfitError as misfit:
                problems.append(Problem(field.name, value, misfit.problem, misfit.remedy))
        # Rules between settings assume that each one has its type.
        problems = problems or self.broken_rules()
        if problems:
            raise SettingsError(type(self).__name__, problems)

    def broken_rules(self) -> list[Problem]:
        """What is wrong between settings that are each of the right type."""
        return []
