"""Where the seconds of a training step go: sample, score, reference, update, as the run itself counts them.

    python tests/benchmarks/step_phases.py
    python tests/benchmarks/step_phases.py --recipe grpo --policy tiny-janus
    python tests/benchmarks/step_phases.py rollout.drawing.estimator=forward

A run without evaluation in a folder of its own, `--repeats` times; its first step is not counted.
"""
import argparse
import tempfile
import types
from pathlib import Path
from statistics import median

import unify_rl
from common import options
from unify_rl.core import UserError
from unify_rl.train import loop
from unify_rl.train.runlog import read_metrics


def run(a) -> list[dict]:
    "Phase -> seconds, for each step of one run but the first."
    with tempfile.TemporaryDirectory() as folder:
        unify_rl.train(a.recipe, a.policy, run_dir=str(Path(folder)/"run"), progress=False,
                       overrides=[f"steps={a.steps + 1}", f"threads={a.threads}", "evaluate.suites=[]", "log.groups_every=0", *a.overrides])
        steps = read_metrics(Path(folder)/"run")[1:]
    return [{k.removeprefix("seconds/"): v for k, v in m.items() if k.startswith("seconds/")} for m in steps]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("overrides", nargs="*", help="settings of the run, e.g. rollout.group_size=16")
    p.add_argument("--recipe", default="lvrpo")
    p.add_argument("--policy", default="tiny-bagel", help="a policy's name or folder (default: tiny-bagel)")
    p.add_argument("--steps", type=int, default=6, help="steps of a run that are counted (default: 6)")
    a = options(p, repeats=1)
    loop.time = types.SimpleNamespace(perf_counter=a.clock)         # the loop's own stopwatch, with the clock asked for
    try: steps = [s for _ in range(a.repeats) for s in run(a)]
    except UserError as e: p.error(str(e))

    whole = [sum(s.values()) for s in steps]
    print(f"\n{a.recipe} on {a.policy}{''.join(f', {o}' for o in a.overrides)}: {len(steps)} steps, median {median(whole):.2f} s")
    print(f"{a.about}\n")
    print("| phase | median s | share, median (range) |\n|---|---|---|")
    for phase in steps[0]:
        share = sorted(s[phase] / w for s, w in zip(steps, whole))
        print(f"| {phase} | {median(s[phase] for s in steps):.3f} | {median(share):.0%} ({share[0]:.0%} to {share[-1]:.0%}) |")


if __name__ == "__main__": main()
