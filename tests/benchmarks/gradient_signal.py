"""How much of a drawing gradient is signal: the cosine between gradients of independent rollouts of the same prompts.

Two gradients of nothing but noise have cosine 0, two without noise 1. Run with one thread to compare with the README's numbers.
"""
import argparse
from dataclasses import asdict
from itertools import combinations

import numpy as np
import torch

import unify_rl
from unify_rl.core import generator_for
from unify_rl.data.stream import PromptStream, load_prompts
from unify_rl.grpo.advantage import advantages
from unify_rl.rewards.verifiable import build_rewards, score
from unify_rl.train.config import load_config

SDE = dict(estimator="sde", steps=10, same_start=True)
FLOW = {
    "forward, 4 draws": dict(estimator="forward", draws=4),
    "sde, 4 of the first 6 steps": dict(SDE, window=4, high=6),
    "sde, 4 of the first 6 steps, noise in 64 directions": dict(SDE, window=4, high=6, subspace="tiny-bagel"),
    "sde, all 9 of the first 9": dict(SDE, window=9, high=9),
    "sde, 5 of 5 longer steps": dict(SDE, steps=6, window=5, high=5),
    "sde, step 1 alone": dict(SDE, window=1, low=1, high=2),
    "sde, step 4 alone": dict(SDE, window=1, low=4, high=5),
    "sde, step 7 alone": dict(SDE, window=1, low=7, high=8),
}
ANY_ORDER = dict(steps=12, remask=float("inf"))
MASKED = {
    "unigrpo": dict(ANY_ORDER, estimator="unigrpo"),
    "coupled_grpo": dict(ANY_ORDER, estimator="coupled_grpo"),
    "mask_grpo, 4 draws": dict(ANY_ORDER, estimator="mask_grpo", draws=4),
    "mask_grpo, 2 draws": dict(ANY_ORDER, estimator="mask_grpo", draws=2),
    "diffu_grpo": dict(ANY_ORDER, estimator="diffu_grpo"),
    "trajectory": dict(ANY_ORDER, estimator="trajectory"),
}
DRAWINGS = dict(flow=FLOW, masked=MASKED)


def gradient(policy, rewards, weights_R, prompts: list, group_size: int, drawing: dict, seed: int, options: dict) -> tuple:
    "(the gradient as one vector, mean deviation of rewards within a group) of one rollout."
    rollout = policy.sample(prompts, group_size, generator_for("gradient-signal", seed), **drawing)
    prompts_B = [rollout.prompt(b) for b in range(len(rollout))]
    table = score(rewards, prompts_B, rollout)
    adv = advantages(table.scores_RB, weights_R, group_size, table.applies_RB, **options)
    policy.zero_grad()
    for part in rollout.parts:
        for rows in torch.arange(len(part.rows)).split(64):
            piece = part.select(rows)
            logp = policy(piece)
            (-(logp * adv.adv_B[piece.rows][:, None].to(logp)).sum() / logp.shape[1] / len(rollout)).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), float(adv.std_N.mean())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--recipe", default="lvrpo", help="whose rewards (default: %(default)s)")
    p.add_argument("--policy", default="tiny-bagel")
    p.add_argument("--drawings", choices=list(DRAWINGS), default="flow", help="ways of drawing, by mechanism (default: %(default)s)")
    p.add_argument("--prompts", type=int, default=32)
    p.add_argument("--group-size", type=int, default=8)
    p.add_argument("--repeats", type=int, default=6, help="independent rollouts of each way of drawing (default: %(default)s)")
    a = p.parse_args()
    cfg = load_config(a.recipe, a.policy)
    stream = PromptStream(load_prompts("shapes", "train", ("generate",)), dict(generate=1.0))
    rewards, weights_R = build_rewards([asdict(r) for r in cfg.rewards])
    policy = unify_rl.load_policy(a.policy)
    policy.train_only(list(policy.trains))
    for r in rewards:
        if getattr(r, "attach", None): r.attach(policy)
    print(f"{a.prompts} prompts x {a.group_size} outputs, {a.repeats} rollouts each\n\n| drawing | cosine of two gradients (standard error) | deviation of rewards in a group |\n|---|---|---|")
    for name, drawing in DRAWINGS[a.drawings].items():
        found = [gradient(policy, rewards, weights_R, stream.batch(0, a.prompts), a.group_size, drawing, seed, asdict(cfg.advantage)) for seed in range(a.repeats)]
        unit = [g / g.norm() for g, _ in found]
        cosines = [float(unit[i] @ unit[j]) for i, j in combinations(range(a.repeats), 2)]
        print(f"| {name} | {np.mean(cosines):+.3f} ({np.std(cosines) / a.repeats ** 0.5:.3f}) | {np.mean([s for _, s in found]):.3f} |", flush=True)


if __name__ == "__main__": main()
