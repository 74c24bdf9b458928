"""What a recipe gains on held-out prompts: several seeds, against the base at its best guidance and against equal-compute supervised training.

    python tests/benchmarks/held_out_gain.py --seeds 0 1 2 --out runs/held-out-gain

Finished runs in --out are not repeated. Prints Markdown and writes OUT/results.json.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import unify_rl
from unify_rl.core import rng_for
from unify_rl.evaluate.stats import paired_ci
from unify_rl.evaluate.suites import Result, evaluate, load_suite


def supervised(policy_name: str, seconds: float, lr: float, seed: int):
    "The base, trained on for `seconds` on the captions and replies it was pretrained on (same prompts, same noise)."
    from unify_rl.train.pretrain import supervised_loss, training_batch
    from unify_rl.world.scenes import World
    policy = unify_rl.load_policy(policy_name)
    policy.train_only(list(policy.trains))
    params = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.95))
    start, step = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        loss, _ = supervised_loss(policy, training_batch(policy, World(), rng_for(seed, "supervised", step), 48, 24), conclude=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        step += 1
    return policy


def kept(path: Path, make) -> Result:
    "A result from disk, or made and written."
    if not path.exists(): path.write_text(make().to_json())
    return Result.from_json(path.read_text())


def tested(folder: Path, prefix: str, suites: dict) -> dict:
    "How a run's policy does in each suite, from disk where it has been tested."
    policy, out = None, {}
    for s, suite in suites.items():
        path = folder.parent / f"{prefix}-{s}.json"
        if not path.exists(): policy = policy or unify_rl.load_policy(folder / "policy")
        out[s] = kept(path, lambda: evaluate(policy, suite))
    return out


def by_stage(out: Path, seeds: list, suites: dict, before: dict) -> dict:
    "What each stage adds to what it starts from: stage -> (start, suite -> interval). Prints a table."
    stages = unify_rl.Run(out / f"seed-{seeds[0]}").summary.get("stages", {})
    results, at = {}, {"base": [before] * len(seeds)}
    if stages: print("\n| stage | from | " + " | ".join(suites) + " |\n|---|---|" + "---|" * len(suites))
    for stage, about in stages.items():
        at[stage] = [tested(out / f"seed-{seed}" / stage, f"tested-{stage}", suites) for seed in seeds]
        change = {s: paired_ci(np.zeros(len(before[s].rows)), np.stack([new[s].values("correct") - old[s].values("correct") for new, old in zip(at[stage], at[about["start"]])])) for s in suites}
        results[stage] = dict(start=about["start"], suites={s: dict(change=c.mean, ci95=[c.lo, c.hi]) for s, c in change.items()})
        print(f"| {stage} | {about['start']} | " + " | ".join(f"{c.mean:+.3f} ({c.lo:+.3f} to {c.hi:+.3f})" for c in change.values()) + " |")
    return results


def against(other: Path, seeds: list, after: dict) -> dict:
    "Suite -> how much better than another recipe's runs, paired over prompts and seeds. Prints a table."
    print(f"\n| suite | better than {other.name}, 95 % interval |\n|---|---|")
    out = {}
    for s, results in after.items():
        theirs = [Result.from_json((other / f"seed-{seed}-{s}.json").read_text()) for seed in seeds]
        assert all([r["id"] for r in a.rows] == [r["id"] for r in b.rows] for a, b in zip(results, theirs)), f"{other} has other prompts of {s}"
        ci = paired_ci(np.stack([r.values() for r in theirs]), np.stack([r.values() for r in results]))
        out[s] = dict(change=ci.mean, ci95=[ci.lo, ci.hi])
        print(f"| {s} | {ci.mean:+.3f} ({ci.lo:+.3f} to {ci.hi:+.3f}) |")
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", default="grpo")
    p.add_argument("--policy", default="tiny-janus")
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe, as on the command line of `unify_rl train`")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--suites", nargs="+", default=["shapes-geneval", "shapes-qa", "shapes-wise"])
    p.add_argument("--guidance", type=float, nargs="*", default=[1.0, 1.5, 2.0, 3.0], help="guidance scales the base is tried at")
    p.add_argument("--rates", type=float, nargs="*", default=[1e-3, 3e-4], help="learning rates of the supervised comparison")
    p.add_argument("--prompts", nargs="*", default=["shapes-qa=2160"], help="suites with more prompts than usual, for narrower intervals")
    p.add_argument("--threads", type=int, default=1, help="CPU threads; sums are rounded differently with another number")
    p.add_argument("--out", default="runs/held-out-gain")
    p.add_argument("--against", metavar="OUT", help="the --out of another recipe with the same seeds, suites and prompts: print the paired differences to it")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    sizes = {name: int(n) for name, n in (x.split("=") for x in a.prompts)}
    suites = {s: load_suite(s, sizes.get(s, 720)) for s in a.suites}
    base = unify_rl.load_policy(a.policy)
    before = {s: kept(out / f"base-{s}.json", lambda: evaluate(base, suites[s])) for s in suites}

    seconds, after = [], {s: [] for s in suites}
    for seed in a.seeds:
        folder = out / f"seed-{seed}"
        if not (folder / "summary.json").exists(): unify_rl.train(a.recipe, a.policy, seed=seed, run_dir=str(folder), threads=a.threads, evaluate={"suites": []}, overrides=a.set)
        run = unify_rl.Run(folder)
        seconds.append(sum(v for m in run.metrics.to_dict("records") for k, v in m.items() if k.startswith("seconds/")))
        for s, result in tested(folder, f"seed-{seed}", suites).items(): after[s].append(result)

    others = {f"base, guidance {w:g}": {s: kept(out / f"base-{s}-cfg{w:g}.json", lambda: evaluate(base, suites[s], cfg=w))
                                        for s in suites if suites[s].task == "generate"} for w in a.guidance}
    for lr in a.rates:
        policy, others[f"supervised, lr {lr:g}"] = None, {}
        for s in suites:
            path = out / f"sft{lr:g}-{s}.json"
            if not path.exists(): policy = policy or supervised(a.policy, float(np.mean(seconds)), lr, 0)
            others[f"supervised, lr {lr:g}"][s] = kept(path, lambda: evaluate(policy, suites[s]))

    results = {"recipe": a.recipe, "policy": a.policy, "settings": a.set, "seeds": a.seeds, "training_seconds": seconds, "suites": {}, "others": {}}
    print(f"\n{' '.join([a.recipe, *a.set])} on {a.policy}, {len(a.seeds)} seeds, {np.mean(seconds):.0f} s of training each\n")
    print("| suite | scorer | base | trained (each seed) | change, 95 % interval | scorers agree |")
    print("|---|---|---|---|---|---|")
    for s in suites:
        rows = {}
        for key in ("correct", "second"):
            ci = paired_ci(before[s].values(key), np.stack([r.values(key) for r in after[s]]))
            each = [float(r.mean(key)) for r in after[s]]
            agree = float(np.mean([r.agreement for r in after[s]]))
            rows[key] = dict(before=before[s].mean(key), after=each, change=ci.mean, ci95=[ci.lo, ci.hi], n=len(before[s].rows), agreement=agree)
            print(f"| {s} | {'first' if key == 'correct' else 'second'} | {before[s].mean(key):.3f} | {' '.join(f'{x:.3f}' for x in each)} "
                  f"| {ci.mean:+.3f} ({ci.lo:+.3f} to {ci.hi:+.3f}) | {agree:.3f} |")
        results["suites"][s] = rows | {"categories": {c: dict(before=before[s].mean("correct", c), after=float(np.mean([r.mean("correct", c) for r in after[s]])))
                                                      for c in before[s].categories}}
    print("\n| category | base | trained, mean of seeds |\n|---|---|---|")
    for s, r in results["suites"].items():
        for c, v in r["categories"].items(): print(f"| {s}: {c} | {v['before']:.3f} | {v['after']:.3f} |")
    for choice in (True, False) if "shapes-qa" in before else ():           # the same questions by form: options are written " A. "
        form = lambda results: np.mean([float(x["correct"]) for r in results for x in r.rows if (" A. " in x["prompt"]) == choice])
        print(f"| shapes-qa: {'multiple choice' if choice else 'open'} | {form([before['shapes-qa']]):.3f} | {form(after['shapes-qa']):.3f} |")
    if others: print("\n| without RL | " + " | ".join(suites) + " |\n|---|" + "---|" * len(suites))
    for name, r in others.items():
        results["others"][name] = {s: x.overall for s, x in r.items()}
        print(f"| {name} | " + " | ".join(f"{r[s].overall:.3f}" if s in r else "–" for s in suites) + " |")
    results["stages"] = by_stage(out, a.seeds, suites, before)
    if a.against: results["against"] = {a.against: against(Path(a.against), a.seeds, after)}
    (out / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
