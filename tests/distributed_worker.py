"""One process of tests/test_distributed.py, started by torchrun: makes the runs that a JSON file lists, with an accident in one of them if it says so."""
import errno
import json
import os
import signal
import sys
import time

import torch

import unify_rl.run as runs
from unify_rl.core import UserError
from unify_rl.train import checkpoint, loop
from unify_rl.train.engine import ranks


def lighten(put) -> None:
    "Leave out what these tests are not about and what takes nine tenths of their time: a hundred of the shapes' prompts will do, read once, and no report is drawn. `put(module, name, value)`."
    load, known = runs.load_prompts, {}
    def some(source, split, tasks, path, reading):
        key = source, split, tasks, str(path)
        if key not in known: known[key] = load(source, split, tasks, path, reading)
        return known[key][::41] if source == "shapes" else known[key]
    put(runs, "load_prompts", some)
    put(runs, "write_report", lambda folder, *_: folder)


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
    if where == "evaluate": return told_in_a_test(step)
    inner = getattr(loop.Trainer, where)
    def outer(trainer, *args, **kw):
        if trainer.done != step: return inner(trainer, *args, **kw)
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if how == "term": os.kill(os.getpid(), signal.SIGTERM)
        if how == "group": os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getppid(), signal.SIGTERM), time.sleep(2)       # as node.sh does, and torchrun, which tells all processes
        if how == "raise": raise UserError("the scorer's disk is gone")
        if how == "full": checkpoint.write_file = half_a_file
        if how == "nan":
            forward, trainer.engine.forward = trainer.engine.forward, lambda *a: forward(*a) * float("nan")
            try: return inner(trainer, *args, **kw)
            finally: trainer.engine.forward = forward
        return inner(trainer, *args, **kw)
    setattr(loop.Trainer, where, outer)


def told_in_a_test(number: int) -> None:
    "SIGTERM in the suite of that number, before its first batch."
    inner, suites = runs.evaluate, []
    def outer(*args, **kw):
        suites.append(1)
        if len(suites) == number: os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args, **kw)
    runs.evaluate = outer


def main() -> int:
    with open(sys.argv[1]) as f: work = json.load(f)
    if "accident" in work: accident(**work["accident"])
    say_where_it_goes_on()
    lighten(setattr)
    code = 0
    for run in work["runs"]:
        try: runs.train(**dict(progress=False) | run)
        except UserError as e:
            print(f"process {ranks()[0]}: {e}", file=sys.stderr)
            code = 2
            sys.stderr.flush(), time.sleep(1)       # torchrun ends the others when the first has ended: let them say what they know
            break
    if not code and torch.distributed.is_initialized(): torch.distributed.barrier()
    sys.stdout.flush(), sys.stderr.flush()
    return code


if __name__ == "__main__":
    code = main()
    os._exit(code)                  # gloo and DeepSpeed now and then abort while the interpreter shuts down, after all is done
