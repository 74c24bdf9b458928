"""The training loop, one module a lesson. The package is also a verb: `unify_rl.train("grpo")` starts a run (`unify_rl.run.train`)."""

import sys
from types import ModuleType


class _Verb(ModuleType):
    def __call__(self, *args, **kwargs):
        from unify_rl.run import train
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
