"""Image rollouts of BAGEL: a whole batch against one output at a time, what a prompt costs its group, and the autoencoder apart.

The one-by-one side is the same `BagelPolicy.sample` with one prompt and a group of one, `--alone` times; its seconds are scaled
to the whole batch. Both include tokenizing, encoding the prompt, log-probabilities and decoding the pictures. The second table
edits pictures with text and image guidance, so each prompt is run three times: whole, without its text, without its picture.

    python tests/benchmarks/flow_rollouts.py
    python tests/benchmarks/flow_rollouts.py --policy random --threads 1
"""
import argparse
import math
from statistics import median

import torch

import unify_rl
from common import interleave, options, ratio, timed
from unify_rl.core import UserError
from unify_rl.world.prompts import draw_prompts, edit_prompts


def load(name: str):
    "A policy by name, or 'random': the shipped architecture with random weights."
    if name != "random": return unify_rl.load_policy(name)
    from unify_rl.policies.bagel import new_bagel
    from unify_rl.train.pretrain import vocabulary
    return new_bagel(vocabulary())


def prompt_cost(policy, draw, clock) -> tuple[int, float]:
    "Prompt tokens that go through the body in one rollout (padding included), and the seconds this takes."
    tokens, seconds, real = [], [], policy.prefix
    count = lambda module, args: tokens.append(args[0].shape[0] * args[0].shape[1])
    def prefix(*args):
        hook, out = policy.body.register_forward_pre_hook(count), []
        try: seconds.append(timed(lambda: out.append(real(*args)), clock))
        finally: hook.remove()
        return out[0]
    policy.prefix = prefix
    try: draw()
    finally: del policy.prefix
    return sum(tokens), sum(seconds)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", default="tiny-bagel", help="a policy's name or folder, or 'random' (default: tiny-bagel)")
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16], help="group sizes of the second table")
    p.add_argument("--steps", type=int, default=15)
    p.add_argument("--cfg", type=float, default=2.0, help="text guidance (default: 2)")
    p.add_argument("--alone", type=int, default=16, help="outputs drawn one by one, scaled to all (default: 16)")
    a = options(p, repeats=3)
    try: policy = load(a.policy)
    except UserError as e: p.error(str(e))

    prompts, B, generator = draw_prompts("train", a.prompts), a.prompts * a.group, lambda: torch.Generator().manual_seed(0)
    alone = [prompts[i % a.prompts] for i in range(min(a.alone, B))]
    def draw(prompts, G, estimator): return policy.sample(prompts, G, generator(), cfg=a.cfg, estimator=estimator, steps=a.steps)
    jobs = {("batched", e): lambda e=e: draw(prompts, a.group, e) for e in ("sde", "forward")}
    jobs |= {("one by one", e): lambda e=e: [draw([q], 1, e) for q in alone] for e in ("sde", "forward")}
    seconds = interleave(jobs, a.repeats, a.clock)
    for e in ("sde", "forward"): seconds["one by one", e] = [s * B / len(alone) for s in seconds["one by one", e]]

    print(f"\n{a.policy}: {a.prompts} prompts x G {a.group}, {a.steps} steps, guidance {a.cfg:g}; one by one: {len(alone)} outputs, scaled to {B}")
    print(f"{a.about}\n")
    print("| estimator | drawn | median s | images/s | times as fast |\n|---|---|---|---|---|")
    for e in ("sde", "forward"):
        for how in ("one by one", "batched"):
            faster = ratio(seconds["one by one", e], seconds[how, e]) if how == "batched" else ""
            print(f"| {e} | {how} | {median(seconds[how, e]):.3f} | {B / median(seconds[how, e]):.0f} | {faster} |")

    side = policy._grid(prompts[0])
    x = torch.randn(B, math.prod(side), policy.net.vae2llm.in_features, generator=generator())
    vae = interleave({"vae": lambda: policy.pictures(x, side)}, a.repeats, a.clock)["vae"]
    print(f"\nThe autoencoder decodes these {B} pictures in {median(vae):.3f} s ({B / median(vae):.0f} images/s), "
          f"{median(vae) / median(seconds['batched', 'sde']):.0%} of the batched sde rollout.\n")

    edits = edit_prompts("train", a.prompts)
    times, cost = {G: [] for G in a.groups}, {G: [] for G in a.groups}
    for k in range(a.repeats + 1):                      # in turn; the first round is not counted
        for G in a.groups:
            whole = timed(lambda: cost[G].append(prompt_cost(policy, lambda: draw(edits, G, "sde"), a.clock)), a.clock)
            times[G].append(whole)
    print(f"{a.prompts} edits, text guidance {a.cfg:g}, image guidance {policy.guidance['edit'].image:g}:\n")
    print("| G | prompt tokens run | s for the prompts | s for the rollout | of it, prompts |\n|---|---|---|---|---|")
    for G in a.groups:
        tokens, s = cost[G][0][0], median(s for _, s in cost[G][1:])
        print(f"| {G} | {tokens} | {s:.3f} | {median(times[G][1:]):.3f} | {s / median(times[G][1:]):.0%} |")


if __name__ == "__main__": main()
