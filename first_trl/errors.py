"""The class of the errors whose message was written for the user: what is wrong, where, and what to do about it."""


class FirstTrlError(ValueError):
    """A mistake in a recipe, a file or an argument; its message names the value, the place and the remedy."""


def shorten(text: str, length: int = 200) -> str:
    """A text of others in a message or a page: one line of printable characters, cut where it is long."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: length + 1])
    return text if len(text) <= length else f"{text[: length - 3]}..."
