"""The full grid: each recipe that has an overlay for every shipped policy, on every shipped policy, by its name alone.

Only sizes are set, never what is learned or how. Questions and prompts are few, since making them all takes longer than the twelve runs.
"""
import math
from functools import lru_cache, partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

import unify_rl.run as R
from unify_rl.cli import main
from unify_rl.core import UserError, generator_for
from unify_rl.data import stream
from unify_rl.data.pairs import build_pairs, shapes_asked, shapes_drawn
from unify_rl.policies.load import FAMILIES, find_policy, load_policy, policies
from unify_rl.rewards.verifiable import build_rewards
from unify_rl.run import train
from unify_rl.train.config import _recipe_folder, load_config, read_layer, recipes
from unify_rl.train.runlog import read_metrics
from unify_rl.world.prompts import draw_prompts

POLICIES = policies()
OVERLAYS = {r: read_layer(_recipe_folder()/f"{r}.yaml")[1]["policies"] for r in recipes()}
EVERYWHERE = [r for r, of in OVERLAYS.items() if set(POLICIES) <= set(of)]
SMALL = dict(steps=2, threads=1, rollout=dict(prompts=4, group_size=4), evaluate=dict(suites=[]), checkpoint=dict(every=0),
             objective=dict(updates=1))                          # one update: every ratio is one of the first update


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    build_pairs(shapes_asked(40), shapes_drawn(40), folder)
    return folder

@pytest.fixture(scope="module", autouse=True)
def quick():
    "Few prompts, made once; and no drawing of curves, which test_report.py is about."
    few = lru_cache(partial(stream.shapes_prompts, questions=24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "draw_prompts", lambda split: draw_prompts(split, 60))
        patch.setitem(stream.SOURCES, "shapes", lambda split, tasks, path="": few(split, tasks))
        patch.setattr(R, "write_report", lambda run_dir: run_dir/"report.html")
        yield

def weights(folder) -> dict: return {k: w for f in Path(folder).rglob("*.safetensors") for k, w in load_file(f).items()}


def test_the_grid_is_complete():
    assert {"grpo", "lvrpo", "pairuni", "vanilla-mixed"} <= set(EVERYWHERE)
    assert len(POLICIES) >= len(FAMILIES) == 3

@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("recipe", EVERYWHERE)
def test_a_recipe_trains_a_policy(recipe, policy, pairs, tmp_path):
    data = dict(path=str(pairs)) if load_config(recipe, policy).data.source == "pairs" else {}
    run = train(recipe, policy, progress=False, run_dir=tmp_path/"run", data=data, **SMALL)
    metrics = read_metrics(run.dir)
    assert run.finished and len(metrics) == 2
    judges, _ = build_rewards([dict(name=r.name, weight=r.weight, settings=r.settings) for r in run.config.rewards])
    given = [t for t, share in run.config.data.tasks.items() if share > 0]
    assert {"generate", "answer"} <= set(given)
    for m in metrics:
        assert m["samples/failed"] == 0 and m["steps/skipped"] == 0
        assert all(math.isfinite(m[k]) for k in ("reward/total", "objective/loss", "objective/grad_norm"))
        assert m["objective/ratio_mean"] == pytest.approx(1, abs=1e-4)
        silent = [r.name for r in judges if set(r.tasks) & set(given) and not math.isfinite(m[f"reward/{r.name}"])]
        assert not silent, "a reward had no samples, or said nothing of them"
    assert set(run.groups().task) == set(given)
    before, after = weights(find_policy(policy)), weights(run.dir/"policy")
    assert set(before) == set(after) and all(w.isfinite().all() for w in after.values())
    assert any(m["groups/dead"] < 1 for m in metrics) and any((before[k] != after[k]).any() for k in before)

@pytest.mark.parametrize("recipe", ["pairuni", "vanilla-mixed"])
def test_the_papers_numbers_for_lumina_dimoo(recipe):
    "PairUni, appendix B.1; a small one can do with them what the large one will."
    cfg = load_config(recipe, "Alpha-VLLM/Lumina-DiMOO")
    r, small = cfg.rollout, load_policy("tiny-dimoo")
    assert (r.group_size, r.drawing["text_steps"], r.drawing["steps"], r.cfg, cfg.objective.beta) == (2, 2, 35, 5.0, 0.0)
    assert r.max_text <= r.drawing["block"]                        # one block, or the steps of a text were more
    out = small.sample([*shapes_drawn(1), *shapes_asked(1)], r.group_size, generator_for("test"), cfg=r.cfg, max_text=8, **r.drawing)
    assert [(p.settings["steps"], p.mask.any().item(), small(p).isfinite().all().item()) for p in out.parts] == [(35, True, True), (2, True, True)]


# -- what does not fit is said at once -----------------------------------------------------------------------------

def test_a_task_that_a_policy_cannot_do():
    with pytest.raises(UserError, match=r"tiny-janus cannot do the task 'edit' \(prompt '.*'\); it can: generate, answer, joint"):
        train("lvrpo", "tiny-janus", progress=False, run_dir="never", data=dict(tasks=dict(generate=0.5, edit=0.5)), **SMALL)
    assert not Path("never").exists()

def test_pairs_that_were_not_built(tmp_path, monkeypatch, capsys):
    "The command that builds them, before anything is loaded."
    for name in ("load_policy", "load_suite", "build_rewards", "load_prompts"): monkeypatch.delattr(R, name)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "pairuni"]) == 2
    assert "no file or folder runs/pairs-shapes. Such data are made by: unify_rl pairs build --out runs/pairs-shapes" in capsys.readouterr().err
    assert main(["train", "pairuni", "data.path=my pairs"]) == 2 and "--out 'my pairs'" in capsys.readouterr().err
    (tmp_path/"half").mkdir()                                       # `pairs build` was interrupted
    assert main(["train", "pairuni", "data.path=half"]) == 2 and "unify_rl pairs build --out half" in capsys.readouterr().err
    assert not list(tmp_path.rglob("config.yaml"))
