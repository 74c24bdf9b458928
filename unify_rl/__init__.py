"""Reinforcement learning for unified multimodal models."""

__version__ = "0.1.0"

from unify_rl import compat, train

compat.install()

_names = {"Run": "unify_rl.run", "load_policy": "unify_rl.policies.load"}


def __getattr__(name):
    "`unify_rl.Run` and `unify_rl.load_policy`: imported when they are first used."
    if name not in _names: raise AttributeError(f"module 'unify_rl' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(_names[name]), name)


def __dir__(): return sorted([*globals(), *_names])
