"""Keep what belongs to one machine out of what is published: local paths, the user's name, tokens.

Paths are reduced to their last part, which is all that a reader elsewhere can use. What cannot be reduced safely is
refused; only from a log, which must go on, secrets are cut out.
"""

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from .constants import SECRET_VALUE
from .errors import FirstTrlError

# The words of prompts and answers may look like paths ("/", "~") and are none.
TEXT_KEYS = frozenset({"prompt", "completion", "choices", "chat_template_kwargs", "commit_message"})
# Where the files of a model name other files; all else in them (tokens, templates) is left alone.
MODEL_PATH_KEYS = frozenset(
    {"base_model_name_or_path", "_name_or_path", "name_or_path", "tokenizer_file", "vocab_file"}
)
_PATH_START = re.compile(r"[/~]|\.\.?/|[A-Za-z]:[\\/]|\\\\|file://")
_BEARER = re.compile(r"(?<=\b[Bb]earer )[\w.~+/-]{8,}=*")
_SECRET_NAME = re.compile(r"(^|_)(token|secret|password|passwd|key|credentials?)(_|$)", re.IGNORECASE)


def is_local_path(text: str) -> bool:
    """Whether a text is written as a path of this machine, or is one: a Hub id is neither."""
    if not text or "\n" in text:
        return False
    return bool(_PATH_START.match(text)) or os.path.exists(os.path.expanduser(text))


def path_name(text: str) -> str:
    """The last part of a path: `/home/me/models/small-llama/` -> `small-llama`."""
    return Path(os.path.normpath(text.removeprefix("file://").replace("\\", "/"))).name or "local"


def without_local_paths(value: Any, keys: frozenset[str] | None = None, key: str = "") -> Any:
    """A copy of nested plain data with every local path reduced to its name.

    Args:
        keys: look under these keys alone; None looks everywhere but under `TEXT_KEYS`.
    """
    if keys is None and key in TEXT_KEYS:
        return value
    if isinstance(value, dict):
        return {name: without_local_paths(item, keys, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item, keys, key) for item in value]
    looked_at = isinstance(value, str) and (keys is None or key in keys)
    return path_name(value) if looked_at and is_local_path(value) else value


def visible(text: str) -> str:
    """A text whose control characters, and those that reorder what stands beside them, are written as codes."""
    return "".join(
        one if one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf") else f"\\u{ord(one):04x}" for one in text
    )


def redacted(text: str) -> str:
    """A line for a log, without access tokens, passwords in addresses, and values of secret environment variables."""
    text = SECRET_VALUE.sub("(not shown)", _BEARER.sub("(not shown)", text))
    for secret in _secret_values():
        text = text.replace(secret, "(not shown)")
    return text


def _secret_values() -> dict[str, str]:
    """Value -> name of the environment variables that are named like secrets; short values are words."""
    return {value: name for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8}


def refuse_leaks(name: str, text: str) -> None:
    """Check a file that is about to be published.

    Raises:
        FirstTrlError: it holds an access token, the value of a secret environment variable, or a path of this machine.
            The message names the file and the kind of leak, and never repeats a secret.
    """
    here = {str(Path.home()), str(Path.cwd())} - {"/"}
    leaks = ["an access token; revoke it"] if SECRET_VALUE.search(text) else []
    leaks += [
        f"the value of the environment variable {key}" for value, key in _secret_values().items() if value in text
    ]
    leaks += [f"the path {path} of this machine" for path in here if re.search(re.escape(path) + r"(?![\w.-])", text)]
    if leaks:
        raise FirstTrlError(
            f"{name} holds {leaks[0]}; remove it from the recipe or the data, or write a relative path"
        )
