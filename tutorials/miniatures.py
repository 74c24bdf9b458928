"""A paper's ablations in miniature: trains every variant of an experiment and tests it on held-out prompts.

    python tutorials/miniatures.py lvrpo                      # all experiments of tutorials/lvrpo.yaml
    python tutorials/miniatures.py lvrpo group-size --seeds 0 1 2

A paper's `pairs:` (name -> options of `unify_rl pairs build`) are made before, in OUT/pairs-NAME; a variant trains on them with `pairs: NAME`.
Finished runs and pairs in --out are not made again. The numbers go to tutorials/results/PAPER.json, some pictures beside it; the paper's notebook shows them.
"""
import argparse
import io
import json
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image

import unify_rl
from unify_rl import cli
from unify_rl.data.pairs import KINDS
from unify_rl.evaluate.stats import paired_ci
from unify_rl.evaluate.suites import Result, evaluate, load_suite
from unify_rl.train.runlog import picture_path

HERE = Path(__file__).parent


def kept(path: Path, make) -> Result:
    "A result from disk, or made and written."
    if not path.exists(): path.write_text(make().to_json())
    return Result.from_json(path.read_text())


def small(picture: Image.Image, colors: int = 64) -> Image.Image:
    "With few colors: a notebook keeps its pictures, and stays small."
    return picture.convert("RGB").quantize(colors, dither=Image.Dither.NONE)


def strip(run: unify_rl.Run, groups: int = 3, scale: int = 3) -> Image.Image | None:
    "The first pictures of the last reward groups that were kept, one row a group; None if they are all text."
    table = run.groups()
    framed = lambda name: np.pad(np.asarray(Image.open(picture_path(run.dir, name))), ((1, 1), (1, 1), (0, 0)), constant_values=128)
    rows = [[framed(name) for name in g["image"][:8] if name is not None] for _, g in table.groupby("prompt_index")]
    wide = max(map(len, rows))
    rows = [np.concatenate(r, 1) for r in rows if len(r) == wide > 0]
    return small(Image.fromarray(np.concatenate(rows[:groups]).repeat(scale, 0).repeat(scale, 1))) if rows[:groups] else None


def build(options: str, folder: Path) -> dict:
    "Pairs, made by `unify_rl pairs build` unless they are there already: how many of each kind, how alike, and with which options."
    if not (folder / "pairs.parquet").exists() and cli.main(["pairs", "build", *shlex.split(options), "--out", str(folder)]): raise SystemExit(2)
    done = json.loads((folder / "summary.json").read_text())["summary"]
    return dict(name=folder.name.removeprefix("pairs-"), options=options, similarity=done["similarity"]) | {k: done[k] for k in KINDS}


def train(spec: dict, variant: dict, seed: int, folder: Path, threads: int) -> dict:
    "One variant and seed, trained unless it is there already; an interrupted one continues. A run, or stage -> run."
    if not (folder / "summary.json").exists():
        same = dict(resume=True) if (folder / "config.yaml").exists() else {}
        fixed = [f"run_dir={folder}", f"seed={seed}", f"threads={threads}", "evaluate.suites=[]", "log.groups_every=20"]
        data = [f"data.path={folder.parent / ('pairs-' + variant['pairs'])}"] if variant["pairs"] else []
        unify_rl.train(variant["recipe"], spec["policy"], overrides=[*spec["settings"], *data, *variant["settings"], *fixed], **same)
    return {s: unify_rl.Run(folder / s) for s in unify_rl.Run(folder).summary.get("stages", {"": 0})}


def variants(spec: dict) -> dict:
    "(experiment, variant) -> the name of its runs, and its recipe, settings and pairs; the same run under two names is trained once."
    found, names = {}, {}
    for name, variant, what in ((n, v, w) for n, e in spec["experiments"].items() for v, w in e.items()):
        what = dict(recipe=spec["recipe"], settings=[], pairs="") | (what if isinstance(what, dict) else dict(settings=what))
        if what["pairs"] and what["pairs"] not in spec.get("pairs", {}): raise SystemExit(f"{name}, {variant}: there are no pairs {what['pairs']!r}")
        key = names.setdefault(json.dumps(what), f"{name}-{variant}".replace(" ", "_").replace("=", ""))
        found[name, variant] = key, what
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paper", choices=sorted(f.stem for f in HERE.glob("*.yaml")))
    p.add_argument("experiments", nargs="*", help="some of the paper's; none: all")
    p.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    p.add_argument("--threads", type=int, default=1, help="CPU threads; sums are rounded differently with another number")
    p.add_argument("--out", help="run folders; default runs/miniatures-PAPER")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    spec = yaml.safe_load((HERE / f"{a.paper}.yaml").read_text())
    unknown = set(a.experiments) - set(spec["experiments"])
    if unknown: p.error(f"unknown experiment {sorted(unknown)}; {a.paper} has {', '.join(spec['experiments'])}")
    runs_of = variants(spec)
    out, seeds = Path(a.out or f"runs/miniatures-{a.paper}"), a.seeds or spec["seeds"]
    out.mkdir(parents=True, exist_ok=True)
    suites = {s: load_suite(s, n) for s, n in spec["suites"].items()}
    base = unify_rl.load_policy(spec["policy"])
    before = {s: kept(out / f"base-{s}.json", lambda: evaluate(base, suites[s])) for s in suites}
    results = HERE / "results" / f"{a.paper}.json"
    found = json.loads(results.read_text()) if results.exists() else {"experiments": {}}
    found |= {k: spec[k] for k in ("recipe", "policy", "settings")} | {"base": {s: r.overall for s, r in before.items()}}

    for name in a.experiments or spec["experiments"]:
        first, rows = {}, {}
        found["experiments"][name] = rows
        for variant in spec["experiments"][name]:
            key, what = runs_of[name, variant]
            made = build(spec["pairs"][what["pairs"]], out / f"pairs-{what['pairs']}") if what["pairs"] else {}
            seeded = [train(spec, what, seed, out / f"{key}-s{seed}", a.threads) for seed in seeds]
            for stage in seeded[0]:
                runs, after = [runs[stage] for runs in seeded], {s: [] for s in suites}
                for seed, run in zip(seeds, runs):
                    policy = None
                    for s in suites:
                        path = out / f"{'-'.join(filter(None, (key, stage)))}-s{seed}-{s}.json"
                        if not path.exists(): policy = policy or run.policy()
                        after[s].append(kept(path, lambda: evaluate(policy, suites[s])))
                changes = {s: paired_ci(before[s].values("correct"), np.stack([r.values("correct") for r in after[s]])) for s in suites}
                first = first or after                              # the row that the others are compared with, prompt by prompt
                beside = {s: paired_ci(np.mean([r.values("correct") for r in first[s]], 0), np.stack([r.values("correct") for r in after[s]])) for s in suites}
                row = ": ".join(filter(None, (variant, stage)))
                drawn = [curves(run) for run in runs]
                rows[row] = dict(recipe=what["recipe"], settings=what["settings"], pairs=made, seeds=list(seeds), agreement=agreement(drawn), curves=drawn, suites={
                    s: dict(after=[r.overall for r in after[s]], change=c.mean, ci95=[c.lo, c.hi], beside=[beside[s].mean, beside[s].lo, beside[s].hi]) for s, c in changes.items()})
                picture = strip(runs[0]) if runs[0].steps else None
                if picture: picture.save(HERE / "results" / f"{a.paper}-{name}-{row.replace(': ', '-').replace(' ', '_').replace('=', '')}.png")
                results.write_text(json.dumps(found, indent=1) + "\n")
                print(name, "|", row, "|", "  ".join(f"{s} {c.mean:+.3f} ({c.lo:+.3f}, {c.hi:+.3f})" for s, c in changes.items()), flush=True)


def curves(run: unify_rl.Run) -> dict:
    "What is drawn of a run: each measurement of rewards, objective and seconds, a number a step (None where there was none to take). Of a merge, nothing."
    m = run.metrics
    return {c: [None if pd.isna(v) else round(float(v), 4) for v in m[c]] for c in m if c.startswith(("reward/", "objective/", "seconds/"))}


def agreement(drawn: list) -> float | None:
    "The median cosine of the gradients of reading and drawing, over the steps and runs that measured it; None if none did."
    seen = [v for c in drawn for v in c.get("objective/agreement", ()) if v is not None]
    return round(float(np.median(seen)), 4) if seen else None


def table(found: dict, name: str) -> pd.DataFrame:
    "An experiment: change of each suite against the base with its interval, and the median seconds of a step."
    rows = {}
    for variant, r in found["experiments"][name].items():
        seconds = [sum(c[k][i] for k in c if k.startswith("seconds/")) for c in r["curves"] for i in range(1, len(c.get("reward/total", ())))]
        rows[variant] = {s.removeprefix("shapes-"): f"{v['change']:+.3f} ({v['ci95'][0]:+.3f}, {v['ci95'][1]:+.3f})" for s, v in r["suites"].items()}
        rows[variant] |= {"s/step": f"{np.median(seconds):.1f}" if seconds else "", "seeds": len(r["seeds"])}
    return pd.DataFrame(rows).T


def figure(found: dict, name: str, keys: dict, smooth: int = 9, width: float = 3.2) -> Image.Image:
    "Training curves of an experiment's variants, means over seeds and over `smooth` steps; keys: metric -> title."
    fig, axes = plt.subplots(1, len(keys), figsize=(width * len(keys), 2.4), dpi=70, squeeze=False)
    for ax, (key, title) in zip(axes[0], keys.items()):
        for i, (variant, r) in enumerate(found["experiments"][name].items()):
            line = pd.DataFrame([c[key] for c in r["curves"] if key in c], dtype=float).mean().rolling(smooth, min_periods=1, center=True).mean()
            if len(line): ax.plot(np.linspace(0, 1, len(line)), line, label=variant, color=f"C{i}")
        ax.set_title(title, fontsize=9); ax.set_xlabel("share of the run", fontsize=8); ax.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7)
    fig.tight_layout()
    png = io.BytesIO()
    fig.savefig(png)
    plt.close(fig)
    return small(Image.open(png), 32)


if __name__ == "__main__":
    main()
