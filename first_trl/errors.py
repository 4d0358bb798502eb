"""The class of the errors whose message was written for the user: what is wrong, where, and what to do about it."""


class FirstTrlError(ValueError):
    """A mistake in a recipe, a file or an argument; its message names the value, the place and the remedy."""
