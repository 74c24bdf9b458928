"""Recipes of several stages: what each starts from, what is the run's and what a stage's, interruption, merging, and what is left behind."""
import json
import signal

import numpy as np
import pytest
import torch

import unify_rl.run as R
from unify_rl.core import UserError
from unify_rl.policies.janus import new_janus
from unify_rl.run import Run, stage_configs, train
from unify_rl.train.config import load_config, to_yaml
from unify_rl.train.merge import merge_policies
from unify_rl.train.pretrain import vocabulary
from unify_rl.train.runlog import read_metrics

DRAW = ["rollout.prompts=2", "rollout.max_text=4", "optimizer.lr=1e-3", "objective.beta=0", "steps=2", "data.tasks={generate: 1}",
        "rewards=[{name: semantic, settings: {form: mean}}]"]                   # of random pictures no two are worth the same
PLAN = [dict(name="pictures", recipe="grpo", start="base", settings=DRAW), dict(name="others", recipe="grpo", start="base", settings=[*DRAW, "rollout.group_size=3"]),
        dict(name="merged", merge=["pictures", "others"], method="average"), dict(name="last", recipe="grpo", settings=[*DRAW, "steps=1"])]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")/"tiny"
    new_janus(vocabulary(), layers=1, hidden=32).save_pretrained(folder)
    return folder


def recipe(monkeypatch, tmp_path, stages):
    "A packaged recipe `staged` for this test."
    import yaml
    import unify_rl.train.config as C
    for name in ("grpo", "corl-refined"): (tmp_path/f"{name}.yaml").write_text((C._recipe_folder()/f"{name}.yaml").read_text())
    (tmp_path/"staged.yaml").write_text(yaml.safe_dump(dict(stages=stages, evaluate=dict(suites=["shapes-geneval"], prompts=4, batch=4))))
    monkeypatch.setattr(C, "_recipe_folder", lambda: tmp_path)


def weights(folder):
    from unify_rl.policies.load import load_policy
    return torch.cat([p.detach().flatten() for p in load_policy(folder).parameters()])


def test_the_whole_run(tiny, tmp_path, monkeypatch):
    recipe(monkeypatch, tmp_path, PLAN)
    run = train("staged", tiny, run_dir=tmp_path/"run", progress=False, log=dict(groups_every=1))
    assert run.finished and [m["stage"] for m in read_metrics(run.dir)] == ["pictures"] * 2 + ["others"] * 2 + ["last"]
    assert [m["step"] for m in read_metrics(run.dir)] == [1, 2, 3, 4, 5] and run.summary["steps"] == 5
    assert {k: v["start"] for k, v in run.summary["stages"].items()} == dict(pictures="base", others="base", merged="base", last="merged")
    assert torch.equal(weights(run.dir/"policy"), weights(run.dir/"last"/"policy")) and not torch.equal(weights(run.dir/"policy"), weights(tiny))
    merge_policies(tiny, [run.dir/"pictures"/"policy", run.dir/"others"/"policy"], tmp_path/"by hand", "average")
    assert torch.equal(weights(run.dir/"merged"/"policy"), weights(tmp_path/"by hand"))
    test = lambda folder, name: json.loads((run.dir/folder/"eval"/f"{name}.json").read_text())
    assert test("last", "before") == test("merged", "after") and test("", "after") == test("last", "after") and test("pictures", "before") == test("", "before")
    assert (run.dir/"eval"/"after"/"000.png").read_bytes() == (run.dir/"last"/"eval"/"after"/"000.png").read_bytes()
    assert Run(run.dir/"last").summary["steps"] == 1 and Run(run.dir/"last").steps and (run.dir/"report.html").stat().st_size > 1000


def test_stopped_in_the_second_stage_and_continued(tiny, tmp_path, monkeypatch, capsys):
    "Nothing finished is done again, and the end is the same to the last bit. What is said continues the whole, not the stage."
    recipe(monkeypatch, tmp_path, PLAN)
    whole = train("staged", tiny, run_dir=tmp_path/"whole", progress=False)
    log, calls = R.RunLog.log, []
    def stop(self, step, metrics):
        log(self, step, metrics)
        calls.append((self.dir.name, step))
        if calls[-1] == ("others", 1): signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(R.RunLog, "log", stop)
    stopped = train("staged", tiny, run_dir=tmp_path/"cut")
    said = capsys.readouterr().out.partition("stopped after step 1")[2]
    assert said.endswith(f"everything is saved. Continue with\n  unify_rl train staged --resume run_dir={tmp_path/'cut'}\n")
    assert not stopped.finished and calls[-1] == ("others", 1) and not list(stopped.dir.rglob(".lock"))
    calls.clear()
    again = train("staged", run_dir=tmp_path/"cut", resume=True, progress=False)
    assert again.finished and calls[0] == ("others", 2) and torch.equal(weights(again.dir/"policy"), weights(whole.dir/"policy"))
    plain = lambda run: [{k: v for k, v in m.items() if not k.startswith("seconds/")} for m in read_metrics(run.dir)]
    assert plain(again) == plain(whole)


def test_what_is_the_runs_and_what_a_stages():
    cfg = load_config("corl", overrides=["seed=3", "threads=1", "evaluate.prompts=8", "log.groups_every=7", "run_dir=here", "stages.refined.settings=[task=t2i, steps=9]"])
    (_, unified), (_, refined) = stage_configs(cfg)
    for c in (unified, refined): assert (c.seed, c.threads, c.evaluate.prompts, c.log.groups_every) == (3, 1, 8, 7)
    assert (unified.policy, refined.policy, refined.run_dir) == ("tiny-janus", "here/unified/policy", "here/refined")
    assert (refined.task, refined.steps, refined.optimizer.lr) == ("t2i", 9, load_config("corl-refined", overrides=["task=t2i"]).optimizer.lr)    # the overlay of the run's policy
    with pytest.raises(UserError, match="corl consists of stages and has no optimizer.lr of its own.*stages.unified.settings"):
        stage_configs(load_config("corl", overrides=["optimizer.lr=1e-3"]))


@pytest.mark.parametrize("stages, says", [
    ([dict(name="a", recipe="grop")], "stages.0 .a.: unknown recipe 'grop'.*Did you mean 'grpo'"),
    ([dict(name="a", recipe="grpo"), dict(name="a", recipe="grpo")], "must be new"),
    ([dict(name="../a", recipe="grpo")], "fit a folder"),
    ([dict(name="a", recipe="grpo", start="b"), dict(name="b", recipe="grpo")], "'b' is no stage before it"),
    ([dict(name="a")], "give either the recipe"),
    ([dict(name="a", recipe="grpo"), dict(name="m", merge=["a"])], "needs two"),
    ([dict(name="a", recipe="grpo"), dict(name="m", merge=["a", "base"])], "'base' is no stage"),
    ([dict(name="a", recipe="grpo"), dict(name="b", recipe="grpo"), dict(name="m", merge=["a", "b"], start="a")], "leave start out"),
    ([dict(name="a", recipe="corl-refined")], "needs a task, e.g. task=both"),
    ([dict(name="a", recipe="corl-refined", settings=["task=t3i"])], "no such task. Did you mean 't2i'"),
    ([dict(name="a", recipe="grpo", settings=["stepz=3"])], "stepz: unknown key"),
])
def test_mistakes_are_named_before_anything_is_made(tiny, tmp_path, monkeypatch, stages, says):
    recipe(monkeypatch, tmp_path, stages)
    with pytest.raises(UserError, match=says): train("staged", tiny, run_dir=tmp_path/"run", progress=False)
    assert not (tmp_path/"run").exists()


def test_prompts_of_your_own_are_for_one_recipe(tiny, tmp_path):
    with pytest.raises(UserError, match="consists of stages"): train("corl", tiny, prompts=[], run_dir=tmp_path/"run", progress=False)


def test_a_recipe_with_tasks():
    t2i, mcq, oe = (load_config("corl-refined", overrides=[f"task={t}"]) for t in ("t2i", "mcq", "oe"))
    assert (t2i.data.tasks, [r.name for r in t2i.rewards if r.weight]) == ({"generate": 1.0}, ["cycle", "tim"])
    assert (mcq.data.questions, oe.data.questions) == ("choice", "open") and mcq.rewards == oe.rewards and mcq.run_dir == "runs/corl-refined-mcq-tiny-janus-s0"
    cycle_only = load_config("corl-refined", overrides=["task=t2i", "rewards.tim.weight=0"])       # a setting of what only the task has
    assert {r.name: r.weight for r in cycle_only.rewards} == {"cycle": 1.0, "tim": 0.0, "strict": 0.0}
    full = load_config("corl-refined", "deepseek-community/Janus-Pro-1B", overrides=["task=mcq"])
    assert (full.optimizer.lr, full.objective.beta, full.rollout.group_size, full.rollout.prompts) == (1e-6, .02, 16, 32)       # Table 5
    with pytest.raises(UserError, match="'grpo' has no such task"): load_config("grpo", overrides=["task=mcq"])
    unified = load_config("corl-unified", "deepseek-community/Janus-Pro-1B")
    assert (unified.optimizer.lr, unified.objective.beta, unified.rollout.group_size, unified.rollout.prompts) == (4e-6, 0, 8, 16)
    assert {r.name: r.weight for r in unified.rewards} == dict(cycle=1, tim=1, accuracy=.8, format=.8, strict=0)                 # C5
