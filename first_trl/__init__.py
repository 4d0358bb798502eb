"""first-trl: distil a teacher into a small model whose stated confidence is true.

The names below load on first use, so that `import first_trl` costs nothing. Nothing inside the package imports from
here: modules import each other directly, lower floors only.
"""

import importlib

__version__ = "0.2.0"

_HOME = {
    "FIRSTConfig": "first_trl.first_config",
    "FIRSTTrainer": "first_trl.trainer",
    "Predictor": "first_trl.prediction",
    "open_cache": "first_trl.cache",
    "predict": "first_trl.prediction",
}

__all__ = ["FIRSTConfig", "FIRSTTrainer", "Predictor", "open_cache", "predict", "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'first_trl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
