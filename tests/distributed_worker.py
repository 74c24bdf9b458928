"""One process of tests/test_distributed.py, started by torchrun: makes the runs that a JSON file lists, with an accident in one of them if it says so."""
import errno
import json
import os
import signal
import sys
import time

import torch

from unify_rl.core import UserError
from unify_rl.run import train
from unify_rl.train import checkpoint, loop
from unify_rl.train.engine import ranks


def half_a_file(path, data: bytes) -> None:
    "What a disk that is full does to a file."
    path.write_bytes(data[:len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def say_where_it_goes_on() -> None:
    "Let each process tell the step it continues after, and what it was told of damaged checkpoints."
    load = loop.Trainer.load
    def told(trainer):
        notes = load(trainer)
        print(f"process {ranks()[0]} continues after step {trainer.done}: {'; '.join(notes) or 'no remark'}", file=sys.stderr)
        return notes
    loop.Trainer.load = told


def accident(rank: int, step: int, where: str, how: str) -> None:
    "Let process `rank` meet its fate in `step` (the steps before it are finished) inside the trainer's method `where`."
    if ranks()[0] != rank: return
    inner = getattr(loop.Trainer, where)
    def outer(trainer, *args, **kw):
        if trainer.done != step: return inner(trainer, *args, **kw)
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if how == "term": os.kill(os.getpid(), signal.SIGTERM)
        if how == "raise": raise UserError("the scorer's disk is gone")
        if how == "full": checkpoint.write_file = half_a_file
        if how == "nan":
            forward, trainer.engine.forward = trainer.engine.forward, lambda *a: forward(*a) * float("nan")
            try: return inner(trainer, *args, **kw)
            finally: trainer.engine.forward = forward
        return inner(trainer, *args, **kw)
    setattr(loop.Trainer, where, outer)


with open(sys.argv[1]) as f: work = json.load(f)
if "accident" in work: accident(**work["accident"])
say_where_it_goes_on()
code = 0
for run in work["runs"]:
    try: train(progress=False, **run)
    except UserError as e:
        print(f"process {ranks()[0]}: {e}", file=sys.stderr)
        code = 2
        sys.stderr.flush(), time.sleep(1)       # torchrun ends the others when the first has ended: let them say what they know
        break
if not code and torch.distributed.is_initialized(): torch.distributed.barrier()
sys.stdout.flush(), sys.stderr.flush()
os._exit(code)                  # gloo and DeepSpeed now and then abort while the interpreter shuts down, after all is done
