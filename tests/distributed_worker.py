"""One process of tests/test_distributed.py, started by torchrun: makes the runs that a JSON file lists, with an accident in one of them if it says so."""
import json
import os
import signal
import sys

import torch

from unify_rl.core import UserError
from unify_rl.run import train
from unify_rl.train import loop
from unify_rl.train.engine import ranks


def accident(rank: int, step: int, where: str, how: str) -> None:
    "Let process `rank` meet its fate in `step` (the steps before it are finished) inside the trainer's method `where`."
    if ranks()[0] != rank: return
    inner = getattr(loop.Trainer, where)
    def outer(trainer, *args, **kw):
        if trainer.done != step: return inner(trainer, *args, **kw)
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if how == "term": os.kill(os.getpid(), signal.SIGTERM)
        if how == "raise": raise UserError("the scorer's disk is gone")
        if how == "nan":
            forward, trainer.engine.forward = trainer.engine.forward, lambda *a: forward(*a) * float("nan")
            try: return inner(trainer, *args, **kw)
            finally: trainer.engine.forward = forward
        return inner(trainer, *args, **kw)
    setattr(loop.Trainer, where, outer)


with open(sys.argv[1]) as f: work = json.load(f)
if "accident" in work: accident(**work["accident"])
code = 0
for run in work["runs"]:
    try: train(progress=False, **run)
    except UserError as e:
        print(f"process {ranks()[0]}: {e}", file=sys.stderr)
        code = 2
        break
if not code and torch.distributed.is_initialized(): torch.distributed.barrier()
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)                  # gloo and DeepSpeed now and then abort while the interpreter shuts down, after all is done
