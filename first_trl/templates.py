"""Fill a prompt or completion template from one row of a dataset.

Templates look like Python format strings (`"{question}\\nA. {choices[text][0]}"`), because every user of Python can
read them. They come from a recipe and their values from a downloaded dataset, so this is not `str.format`: that would
follow attributes (`{text.__class__}`) into the interpreter. Here a field is a column name followed by indices into
dictionaries and lists, and nothing else; no attribute of a value is ever looked up.
"""

import re
import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from .errors import FirstTrlError

# column[index][index]...: no dot (attribute), no brace (nested field).
_FIELD = re.compile(r"([^\W\d][\w -]*)((?:\[[^\[\]{}]+\])*)")


class Piece(NamedTuple):
    """Literal text followed by at most one field; `column` is None where there is none."""

    literal: str
    column: str | None = None
    indices: tuple[str, ...] = ()


@lru_cache(maxsize=256)
def parse_template(template: str) -> tuple[Piece, ...]:
    """Split a template into pieces; FirstTrlError where it holds anything but plain text, columns and indices."""
    if not isinstance(template, str):
        raise FirstTrlError(f"a template must be text, got {template!r}; quote it in the recipe")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise FirstTrlError(
            f"template {template!r} cannot be read: {error}; write {{{{ and }}}} for braces"
        ) from error
    pieces = []
    for literal, field, spec, conversion in parts:
        match = None if field is None else _FIELD.fullmatch(field)
        if field is not None and (match is None or spec or conversion):
            raise FirstTrlError(
                f"template {template!r}: the field {{{field}}} is not allowed; write a column and its indices, as in "
                "{text} or {choices[text][0]}: attributes, a format or a conversion are refused"
            )
        indices = re.findall(r"\[([^\]]+)\]", match[2]) if match else ()
        pieces.append(Piece(literal, match[1] if match else None, tuple(indices)))
    return tuple(pieces)


def template_fields(template: str) -> list[str]:
    """The columns that a template reads, each once, in order of appearance."""
    return list(dict.fromkeys(piece.column for piece in parse_template(template) if piece.column is not None))


def text_around_field(template: str) -> tuple[str, str]:
    """The plain text before and after the last field of a template; all of it is after where there is no field."""
    pieces = parse_template(template)
    end = max((number + 1 for number, piece in enumerate(pieces) if piece.column is not None), default=0)
    return "".join(piece.literal for piece in pieces[:end]), "".join(piece.literal for piece in pieces[end:])


def render_template(template: str, row: Mapping[str, Any]) -> str:
    """Fill the template from the row's columns.

    Raises:
        FirstTrlError: a column or index is not there, or its value is missing (None, NaN) or no text, number or
            boolean.
    """
    return "".join(piece.literal + _value(template, piece, row) for piece in parse_template(template))


def _value(template: str, piece: Piece, row: Mapping[str, Any]) -> str:
    if piece.column is None:
        return ""
    place = f"template {template!r}: {{{piece.column}{''.join(f'[{index}]' for index in piece.indices)}}}"
    value: Any = dict(row)
    # Exact types only: a subclass could run code of its own
    for index in (piece.column, *piece.indices):
        if type(value) is dict and index in value:
            value = value[index]
        elif type(value) is list and re.fullmatch("[0-9]{1,9}", index) and int(index) < len(value):
            value = value[int(index)]
        else:
            known = f"{len(value)} entries" if type(value) is list else f"a {type(value).__name__}"
            known = ", ".join(map(str, value)) if type(value) is dict else known
            raise FirstTrlError(
                f"{place}: there is no {index!r}, only {known}; correct it, or name the column under `columns`"
            )
    if type(value) not in (str, int, float, bool) or value != value:
        what = "missing in this row" if type(value) in (float, type(None)) else f"a {type(value).__name__}, no text"
        raise FirstTrlError(f"{place} is {what}; fill it or index into it, or drop the row")
    return str(value)
