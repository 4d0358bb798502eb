"""The teacher cache: start at `format`; `writer` and `reader` keep to it, the rest is done with a whole cache.

`open_cache` is offered here and loads on first use: the command line reads this page and must answer `--help` at once.
"""

__all__ = ["open_cache"]


def __getattr__(name: str):
    if name != "open_cache":
        raise AttributeError(f"module 'first_trl.cache' has no attribute '{name}'")
    from .reader import open_cache

    return open_cache
