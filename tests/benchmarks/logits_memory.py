"""Peak memory of log-probabilities and their gradient: all logits at once against `logp_chunk` tokens at a time, each in a fresh process.

    python tests/benchmarks/logits_memory.py            # the pictures of Janus-Pro-1B: 8 outputs of 576 tokens among 16,384 codes
"""
import argparse
import json
import os
import resource
import subprocess
import sys

import torch
from common import machine

from unify_rl.mechanisms.tokens import token_logp


def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10       # MiB


def measure(tokens: int, hidden: int, vocabulary: int, chunk: int) -> dict:
    "MiB above what inputs, head and the head's gradient take, and the loss."
    torch.manual_seed(0)
    head = torch.nn.Linear(hidden, vocabulary, bias=False)
    head.weight.grad = torch.empty_like(head.weight).zero_()        # written to, or its pages would be counted later
    state, ids = torch.randn(tokens, hidden, requires_grad=True), torch.randint(vocabulary, (tokens,))
    state.grad = torch.empty_like(state).zero_()
    before = peak()
    logp = token_logp(state, head, ids, chunk=chunk) if chunk else head(state).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    logp.mean().backward()
    return dict(mib=peak() - before, loss=float(logp.mean()), grad=float(state.grad.norm()))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--outputs", type=int, default=8)
    p.add_argument("--length", type=int, default=576)
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--vocabulary", type=int, default=16384)
    p.add_argument("--chunks", type=int, nargs="+", default=[4096, 1024, 256])
    p.add_argument("--one", type=int, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one is not None:
        torch.set_num_threads(1)
        return print(json.dumps(measure(a.outputs * a.length, a.hidden, a.vocabulary, a.one)))
    print(f"{machine()}\n\n{a.outputs} outputs x {a.length} tokens, hidden {a.hidden}, {a.vocabulary} logits each\n\n| logp_chunk | peak above inputs and weights, MiB | less than at once |\n|---|---|---|")
    at_once = None                              # the threshold below: what is freed goes back to the system, so that the peak is that of tensors
    for chunk in (0, *a.chunks):
        args = [sys.executable, __file__, "--one", str(chunk), *(f"--{k}={getattr(a, k)}" for k in ("outputs", "length", "hidden", "vocabulary"))]
        r = json.loads(subprocess.run(args, check=True, capture_output=True, text=True, env=os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536")).stdout)
        at_once = at_once or r
        assert abs(r["loss"] - at_once["loss"]) < 1e-4 and abs(r["grad"] / at_once["grad"] - 1) < 1e-4
        print(f"| {chunk or 'all'} | {r['mib']:.0f} | {at_once['mib'] / r['mib']:.1f} x |", flush=True)


if __name__ == "__main__":
    main()
