"""Scoring a batch with rewards on reward servers: one after another, against asking the far ones ahead; and what the way there costs.

Each far reward has a server process of its own. `sleep:0.5` is a scorer that takes half a second and no CPU here, as one on another
machine would; real rewards (`--far semantic,knowledge`) share this machine's cores, so that on one core nothing can be gained.
Equal in all rows: prompts, pictures, scores (checked). Every call has pictures of its own, because servers remember their answers.

    python tests/benchmarks/reward_server.py
    python tests/benchmarks/reward_server.py --far semantic,knowledge --near cycle --threads 1
"""
import argparse
import os
import secrets
import subprocess
import sys
from dataclasses import replace
from itertools import count
from statistics import median

import numpy as np

from common import interleave, options, ratio, timed
from unify_rl.core import Rollout, rng_for
from unify_rl.rewards.server import TOKEN, pack_request
from unify_rl.rewards.verifiable import build_rewards, score
from unify_rl.world.prompts import draw_prompts, with_references

SERVER = """
import sys, time
import numpy as np
import torch
from unify_rl.core import Scores
from unify_rl.rewards.server import RewardServer, find_token, load_served
from unify_rl.rewards.verifiable import Reward
torch.set_num_threads(int(sys.argv[2]))
kind, _, seconds = sys.argv[1].partition(":")
def sleep(prompts_B, rollout): time.sleep(float(seconds)); return Scores(np.ones(len(rollout)), [""] * len(rollout))
rewards, settings = ([Reward(sys.argv[1], sleep, ("generate",))], {}) if kind == "sleep" else load_served([dict(name=kind, settings={})])
server = RewardServer(rewards, token=find_token(), settings=settings)
print(server.url, flush=True)
server.forever()
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--far", default="sleep:0.5,sleep:0.4", help="rewards on servers (default: %(default)s)")
    p.add_argument("--near", default="constraints", help="rewards in this process (default: %(default)s)")
    p.add_argument("--prompts", type=int, default=24)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--side", type=int, default=384, help="pixels of the pictures that only travel (default: %(default)s)")
    a = options(p, repeats=5)
    os.environ[TOKEN] = secrets.token_urlsafe()
    prompts_B = [q for q in with_references(draw_prompts("train", a.prompts)) for _ in range(a.group)]
    fresh = count()
    def batch(side: int = 24) -> Rollout:
        rng = rng_for("benchmark", next(fresh))
        images = [np.kron(rng.integers(0, 256, (side // 8, side // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in prompts_B]
        return Rollout(prompts_B, 1, [], [None] * len(prompts_B), images)

    processes = []
    def serve(name: str) -> str:
        processes.append(subprocess.Popen([sys.executable, "-c", SERVER, name, str(a.threads)], stdout=subprocess.PIPE, text=True,
                                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}))
        return processes[-1].stdout.readline().strip()
    try:
        far = [r for name in a.far.split(",") for r in build_rewards([dict(name=name, settings=dict(url=serve(name)))])[0]]
        near, _ = build_rewards([dict(name=n) for n in filter(None, a.near.split(","))])
        def scoring(remote: bool) -> None: score([*[replace(r, remote=remote) for r in far], *near], prompts_B, batch())
        one = batch()
        tables = [score([*[replace(r, remote=remote) for r in far], *near], prompts_B, one) for remote in (False, True)]
        assert tables[0].scores_RB.nan_to_num(-9).equal(tables[1].scores_RB.nan_to_num(-9))
        seconds = interleave({"one after another": lambda: scoring(False), "far ones ahead": lambda: scoring(True)}, a.repeats, a.clock)

        print(f"\nfar: {a.far}; near: {a.near}; {len(prompts_B)} pictures\n{a.about}\n")
        print("| scoring | median s | times as fast |\n|---|---|---|")
        for name, s in seconds.items(): print(f"| {name} | {median(s):.3f} | {ratio(seconds['one after another'], s)} |")

        way, = build_rewards([dict(name="given", settings=dict(url=serve("given")))])[0]
        packed, asked, sizes = [], [], []
        for _ in range(a.repeats):
            large = batch(a.side)
            packed.append(timed(lambda: sizes.append(len(pack_request("given", prompts_B, large)[0])), a.clock))
            asked.append(timed(lambda: way(prompts_B, large), a.clock))               # encoded already
        n = len(prompts_B)
        print(f"\nthe way of {n} pictures of {a.side} x {a.side}: encoding {1000 * median(packed) / n:.1f} ms a picture, there and back "
              f"{1000 * median(asked) / n:.1f} ms, {median(sizes) / n / 1024:.0f} KB")
    finally:
        for it in processes: it.kill(); it.wait()


if __name__ == "__main__": main()
