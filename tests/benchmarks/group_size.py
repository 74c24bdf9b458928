"""Seconds of a GRPO step as the group grows: the prompt is encoded once for its group, so a step should grow slower than G.

    python tests/benchmarks/group_size.py
"""
import argparse
import copy
from statistics import median

import torch

from common import grpo_step, interleave, options, small_llama


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16])
    p.add_argument("--prompt-lengths", type=int, nargs="+", default=[16, 192], help="tokens of a prompt, short and long")
    p.add_argument("--length", type=int, default=36, help="tokens of an output")
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=4)
    a = options(p, repeats=3)

    base = small_llama(256, a.hidden, a.layers, a.hidden // 32, max(a.prompt_lengths) + a.length)
    def job(P, G):
        model, generator = copy.deepcopy(base), torch.Generator().manual_seed(0)
        ids = torch.randint(3, 256, (a.prompts, P), generator=generator)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        even = lambda tokens: (tokens % 2 == 0).double().mean(-1)
        return lambda: grpo_step(model, optimizer, ids, torch.ones_like(ids, dtype=torch.bool), G, a.length, even, generator)
    cases = [(P, G) for P in a.prompt_lengths for G in a.groups]
    seconds = interleave({case: job(*case) for case in cases}, a.repeats, a.clock)

    print(f"{a.prompts} prompts, outputs of {a.length} tokens; Llama of {a.layers} layers, width {a.hidden}")
    print(f"{a.about}\n")
    first = a.groups[0]
    print(f"| prompt tokens | G | median s a step | times G={first} | G grew by | growth / growth of G |")
    print("|---|---|---|---|---|---|")
    for P, G in cases:
        grew = median(x / y for x, y in zip(seconds[P, G], seconds[P, first]))
        print(f"| {P} | {G} | {median(seconds[P, G]):.3f} | {grew:.2f} | {G / first:.0f} | {grew / (G / first):.2f} |")


if __name__ == "__main__": main()
