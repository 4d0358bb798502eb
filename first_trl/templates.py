"""Fill a prompt or completion template from one row of a dataset.

Templates look like Python format strings (`"{question}\\nA. {choices[text][0]}"`), because every user of Python can
read them. They come from a recipe and their values from a downloaded dataset, so this is not `str.format`: that would
follow attributes (`{text.__class__}`) into the interpreter. Here a field is a column name followed by indices into
dictionaries and lists, and nothing else; no attribute of a value is ever looked up.
"""

import difflib
import math
import re
import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from .errors import FirstTrlError

# column[index][index]...: no dot (attribute), no brace (nested field).
_FIELD = re.compile(r"([^\W\d][\w -]*)((?:\[[^\[\]{}]+\])*)")
_INDEX = re.compile(r"\[([^\[\]{}]+)\]")


class Piece(NamedTuple):
    """Literal text followed by at most one field; `column` is None where the template ends in plain text."""

    literal: str
    column: str | None = None
    indices: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        return (self.column or "") + "".join(f"[{index}]" for index in self.indices)


@lru_cache(maxsize=256)
def parse_template(template: str) -> tuple[Piece, ...]:
    """Split a template into pieces; ValueError where it holds anything but plain text, columns and indices."""
    if not isinstance(template, str):
        raise FirstTrlError(f"a template must be text, got {template!r}; quote it in the recipe")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise FirstTrlError(
            f"template {template!r} cannot be read: {error}. Write {{{{ and }}}} for braces that are plain text"
        ) from error
    return tuple(_parse_piece(template, *part) for part in parts)


def _parse_piece(template: str, literal: str, field: str | None, spec: str | None, conversion: str | None) -> Piece:
    if field is None:
        return Piece(literal)
    match = _FIELD.fullmatch(field)
    if match is None:
        raise FirstTrlError(
            f"template {template!r}: the field {{{field}}} is not allowed. A field is the name of a column, with "
            "indices into lists and dictionaries where needed, such as {text} or {choices[text][0]}; attributes, "
            "positions and empty fields are refused. A column whose name holds a dot can be renamed under `columns`"
        )
    if conversion is not None or spec:
        raise FirstTrlError(
            f"template {template!r}: {{{field}}} has a format or a conversion, which is not allowed; write "
            f"{{{field}}} and format the column beforehand"
        )
    return Piece(literal, match[1], tuple(_INDEX.findall(match[2])))


def template_fields(template: str) -> list[str]:
    """The columns that a template reads, each once, in order of appearance."""
    return list(dict.fromkeys(piece.column for piece in parse_template(template) if piece.column is not None))


def text_around_field(template: str) -> tuple[str, str]:
    """The plain text before and after the last field of a template; all of it is after where there is no field."""
    pieces = parse_template(template)
    ends = [i + 1 for i, piece in enumerate(pieces) if piece.column is not None]
    end = ends[-1] if ends else 0
    return "".join(p.literal for p in pieces[:end]), "".join(p.literal for p in pieces[end:])


def render_template(template: str, row: Mapping[str, Any]) -> str:
    """Fill the template from the row's columns.

    Values must be text, numbers or booleans (True renders as "True"). ValueError for a missing column, an index that
    is not there, a missing value (None, NaN) or a value of another type, naming template, field and remedy.
    """
    return "".join(render_piece(template, piece, row) for piece in parse_template(template))


def render_piece(template: str, piece: Piece, row: Mapping[str, Any]) -> str:
    """The text of one piece: its literal, then its field's value."""
    if piece.column is None:
        return piece.literal
    return piece.literal + _format_value(template, piece, _look_up(template, piece, row))


def _look_up(template: str, piece: Piece, row: Mapping[str, Any]) -> Any:
    columns = [str(name) for name in row.keys()]
    if piece.column not in columns:
        near = difflib.get_close_matches(piece.column or "", columns, n=1, cutoff=0.5)
        hint = f"did you mean {{{near[0]}}}? " if near else ""
        raise FirstTrlError(
            f"template {template!r} reads the column {piece.column!r}, which the dataset does not have; {hint}"
            f"its columns are {', '.join(columns) or 'none'}. Correct the template, or name the column under `columns`"
        )
    value = row[piece.column]
    for index in piece.indices:
        value = _take_index(template, piece, value, index)
    return value


def _take_index(template: str, piece: Piece, value: Any, index: str) -> Any:
    where = f"template {template!r}: {{{piece.field}}}"
    if type(value) is dict:
        if index in value:
            return value[index]
        raise FirstTrlError(
            f"{where}: there is no key {index!r}; choose among {', '.join(map(str, value)) or 'none'}, or drop the row"
        )
    if type(value) is list:
        if re.fullmatch(r"[0-9]{1,9}", index) is None:
            raise FirstTrlError(f"{where}: a list is indexed by a whole number, got {index!r}")
        if int(index) < len(value):
            return value[int(index)]
        raise FirstTrlError(
            f"{where}: index {index} is past the end of a list of {len(value)}; correct it or drop the row"
        )
    raise FirstTrlError(
        f"{where}: [{index}] needs a list or a dictionary, found {type(value).__name__}; drop the index"
    )


def _format_value(template: str, piece: Piece, value: Any) -> str:
    """One value as text. Exact types only: a subclass could run code of its own when it is formatted."""
    where = f"template {template!r}: {{{piece.field}}}"
    if value is None or (type(value) is float and math.isnan(value)):
        raise FirstTrlError(f"{where} is missing ({value}) in this row; fill it or drop the row from the dataset")
    if type(value) is bool:
        value = str(value)
    if type(value) not in (str, int, float):
        raise FirstTrlError(
            f"{where} is a {type(value).__name__}, not text or a number; index into it, as in {{{piece.field}[0]}}, "
            "or store it as text"
        )
    try:
        return str(value)
    except ValueError as error:  # a whole number of more than 4,300 digits
        raise FirstTrlError(f"{where}: {error}; store it as text") from error
