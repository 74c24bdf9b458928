"""Whole runs: bad input is found early and named, failing rewards are masked and counted, an interrupted run is the same run.

The policy is a Janus with random weights and one layer; a reward on plain pixels or letters gives it something to learn from.
"""
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import unify_rl.run as R
from unify_rl.core import Prompt, Scores, UserError
from unify_rl.policies.janus import new_janus
from unify_rl.policies.load import load_policy, policies
from unify_rl.rewards.verifiable import Reward, per_sample
from unify_rl.run import Run, Screen, as_overrides, clock, line, resume_command, train
from unify_rl.train.checkpoint import checkpoints, load_checkpoint
from unify_rl.train.config import load_config
from unify_rl.train.pretrain import vocabulary
from unify_rl.train.runlog import read_metrics
from unify_rl.world.prompts import draw_prompts
from unify_rl.world.questions import question_prompts

FAST = dict(steps=3, seed=1, rollout=dict(prompts=2, group_size=3, max_text=4), optimizer=dict(lr=1e-3),
            evaluate=dict(prompts=3, batch=3))
BEFORE = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]      # SIGINT may be ignored, as in a background job
PROMPTS = [*draw_prompts("train", 6), *question_prompts("train", 4)]

redness = per_sample("redness", lambda prompt, text, image: float(image[..., 0].mean()) / 255, tasks=("generate",))
wordy = per_sample("wordy", lambda prompt, text, image: float(len(text)), tasks=("answer",))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A folder with a very small policy."
    folder = tmp_path_factory.mktemp("policies")/"tiny"
    new_janus(vocabulary(), layers=1, hidden=32).save_pretrained(folder)
    return folder


def go(tiny, run_dir, **settings):
    "A quiet run of three steps, with rewards that vary."
    rewards, prompts = settings.pop("rewards", [redness, (wordy, 0.1)]), settings.pop("prompts", PROMPTS)
    resume = settings.pop("resume", False)
    settings = dict(progress=False) | ({} if resume else FAST) | settings
    return train("grpo", None if resume else tiny, run_dir=run_dir, rewards=rewards, prompts=prompts, resume=resume, **settings)


@pytest.fixture(autouse=True)
def quick_report(monkeypatch):
    "Drawing curves takes longer than these runs; test_report.py is about the report, and `finished` has a real one."
    def stub(run_dir): (run_dir/"report.html").write_text("stub"); return run_dir/"report.html"
    monkeypatch.setattr(R, "write_report", stub)


# -- what is left behind -------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    "A finished run; do not change it."
    return go(tiny, tmp_path_factory.mktemp("runs")/"whole", log=dict(groups_every=2))

def test_summary_has_the_promised_layout(finished, tiny):
    s = finished.summary
    assert [s[k] for k in ("recipe", "policy", "seed", "steps")] == ["grpo", str(tiny), 1, 3] and s["seconds"] > 0
    assert set(s["suites"]) == {"shapes-geneval", "shapes-qa"}
    for suite in s["suites"].values():
        for r in [suite["overall"], *suite["categories"].values()]:
            assert set(r) == {"before", "after", "ci95", "n"} and len(r["ci95"]) == 2

def test_a_run_in_python(finished):
    assert finished.finished and finished.steps == [1, 2] and len(finished.metrics) == 3
    assert len(finished.groups(2)) == 6 and finished.groups().equals(finished.groups(2))
    assert (finished.dir/"report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert finished.config.rollout.group_size == 3 and [r.name for r in finished.config.rewards] == ["redness", "wordy"]
    assert "shapes-geneval" in finished._repr_html_() and "finished" in repr(finished)

def test_the_trained_policy_is_a_policy_and_has_moved(finished, tiny):
    before, after = load_policy(tiny).state_dict(), finished.policy().state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all("language_model" in k for k in moved)

def test_the_trained_policy_is_the_last_checkpoint(finished):
    step, state, notes = load_checkpoint(finished.dir/"checkpoints")
    assert (step, notes) == (3, [])
    own = finished.policy().state_dict()
    assert state["params"] and all(torch.equal(own[k], v) for k, v in state["params"].items())

def test_before_is_the_test_of_the_given_policy(finished, tiny):
    again = R.run_suites(load_policy(tiny), finished.config.evaluate, seed=1, max_text=4)
    texts = lambda results: {k: [row["text"] for row in r.rows] for k, r in results.items()}
    assert texts(again) == texts(R.read_verdicts(finished.dir, "before"))

def test_the_demo_policy_is_shipped_whole():
    for name in policies(): assert load_policy(name).name == name


# -- bad input: found before the run folder is made ----------------------------------------------------------------

BAD = {
    "unknown key": (dict(stepz=3), "Did you mean 'steps'"),
    "misplaced key": (dict(lr=1e-3), "'optimizer.lr'"),
    "unknown nested key": (dict(rollout=dict(grop_size=4)), "rollout.grop_size: unknown key. Did you mean 'group_size'"),
    "wrong type": (dict(steps="many"), "steps: expected a whole number, got 'many'"),
    "none": (dict(seed=None), "seed: expected a whole number"),
    "unknown suite": (dict(evaluate=dict(suites=["shapes-ga"])), "Did you mean 'shapes-qa'"),
    "a suite too large": (dict(evaluate=dict(prompts=99999)), "ask for fewer"),
    "a group of one": (dict(rollout=dict(group_size=1)), "a group of one has no advantage"),
    "unknown layer": (dict(model=dict(train=["langage_model"])), "Did you mean 'language_model'"),
    "no prompts of a task": (dict(prompts=PROMPTS[:6]), "no prompts for the task 'answer'"),
    "a task the policy cannot do": (dict(prompts=[Prompt("e/0", "edit", "make it red")], data=dict(tasks=dict(edit=1)),
                                         rewards=[per_sample("any", lambda p, t, i: 1.0)]), "cannot do the task 'edit'"),
    "empty data set": (dict(prompts=[]), "none at all"),
    "no reward for a task": (dict(rewards=[redness]), "no reward applies to the task 'answer'"),
    "no rewards": (dict(rewards=[]), "nothing to learn from"),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_leaves_nothing(name, tiny, tmp_path):
    settings, said = BAD[name]
    settings = FAST | dict(prompts=PROMPTS, rewards=[redness, wordy]) | settings
    with pytest.raises(UserError) as e: train("grpo", tiny, run_dir=tmp_path/"run", progress=False, **settings)
    assert said in str(e.value)
    assert not (tmp_path/"run").exists()

def test_unknown_recipe_and_policy(tmp_path):
    with pytest.raises(UserError, match="unknown recipe 'grop'. Did you mean 'grpo'"): train("grop", progress=False)
    with pytest.raises(UserError, match="unknown policy 'tiny-janos'.*tiny-janus"):
        train("grpo", "tiny-janos", run_dir=tmp_path/"r", progress=False)

def test_unknown_reward(tiny, tmp_path):
    with pytest.raises(UserError, match="unknown reward 'strct'. Did you mean 'strict'"):
        train("grpo", tiny, run_dir=tmp_path/"r", progress=False, overrides=["rewards=[{name: strct}]"])

def test_a_used_run_folder(finished, tiny):
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"): go(tiny, finished.dir)

def test_an_unwritable_run_folder(tiny, tmp_path):
    (tmp_path/"file").write_text("not a folder")
    with pytest.raises(UserError, match="choose another run_dir"): go(tiny, tmp_path/"file"/"run")
    with pytest.raises(UserError, match="run_dir"): go(tiny, tmp_path/"file")
    assert (tmp_path/"file").read_text() == "not a folder"

def test_a_prompt_longer_than_the_context(tiny, tmp_path):
    long = Prompt("d/long", "generate", "circle " * 400)
    with pytest.raises(UserError, match="'d/long' has .* exceeds the context of 256"):
        go(tiny, tmp_path/"r", prompts=[long], data=dict(tasks=dict(generate=1)), rewards=[redness], **{"evaluate.suites": []})


def test_a_tracker_that_is_not_installed(tiny, tmp_path, monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'trackio', which is not installed: pip install trackio"):
        go(tiny, tmp_path/"r", **{"log.trackers": ["trackio"]})
    assert not (tmp_path/"r").exists()


# -- ways to compute the same --------------------------------------------------------------------------------------

def test_recomputed_activations_train_the_same(finished, tiny, tmp_path):
    run = go(tiny, tmp_path/"r", log=dict(groups_every=2), **{"model.checkpoint_activations": True})
    for a, b in zip(read_metrics(finished.dir), read_metrics(run.dir)):
        assert a["objective/grad_norm"] == pytest.approx(b["objective/grad_norm"], rel=1e-3) and a["reward/total"] == b["reward/total"]

def test_mixed_precision_trains(tiny, tmp_path):
    run = go(tiny, tmp_path/"r", **{"model.precision": "bf16", "evaluate.suites": []})
    assert all(np.isfinite(m["objective/loss"]) and m["steps/skipped"] == 0 for m in read_metrics(run.dir))
    assert {p.dtype for p in run.policy().parameters()} == {torch.float32}


# -- damaged policies ----------------------------------------------------------------------------------------------

def cut(path, keep=-200): path.write_bytes(path.read_bytes()[:keep])

def tamper_header(path):
    data = path.read_bytes()
    path.write_bytes(data[:8] + data[8:].replace(b'"F32"', b'"F16"', 1))

def tamper_weights(path):
    data = bytearray(path.read_bytes()); data[-4:] = np.float32("nan").tobytes(); path.write_bytes(bytes(data))

def edit(path, change):
    x = json.loads(path.read_text()); change(x); path.write_text(json.dumps(x))

DAMAGE = {
    "no config": (lambda d: (d/"config.json").unlink(), "config.json is missing"),
    "config cut": (lambda d: cut(d/"config.json"), "config.json cannot be read as JSON"),
    "config a list": (lambda d: (d/"config.json").write_text("[]"), "config.json holds list"),
    "no model_type": (lambda d: edit(d/"config.json", lambda c: c.pop("model_type")), "config.json has no model_type"),
    "another model": (lambda d: edit(d/"config.json", lambda c: c.update(model_type="llama")), "'llama', which is not supported"),
    "a key is gone": (lambda d: edit(d/"config.json", lambda c: c["vq_config"].pop("num_embeddings")), "do not fit"),
    "a section is gone": (lambda d: edit(d/"config.json", lambda c: c.pop("vision_config")), "config.json"),
    "more layers": (lambda d: edit(d/"config.json", lambda c: c["text_config"].update(num_hidden_layers=2)),
                    "layers.1.* is missing"),
    "no weights": (lambda d: (d/"model.safetensors").unlink(), "has no weights"),
    "weights cut": (lambda d: cut(d/"model.safetensors"), "model.safetensors is damaged or cut short"),
    "weights empty": (lambda d: cut(d/"model.safetensors", 0), "model.safetensors is damaged or cut short"),
    "header changed": (lambda d: tamper_header(d/"model.safetensors"), "model.safetensors is damaged or cut short"),
    "weights not numbers": (lambda d: tamper_weights(d/"model.safetensors"), "not all finite"),
    "a shard is gone": (lambda d: (d/"model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
                        "model-2.safetensors is missing"),
    "no tokenizer": (lambda d: (d/"tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer cut": (lambda d: cut(d/"tokenizer.json"), "tokenizer.json cannot be read as JSON"),
    "tokenizer strange": (lambda d: (d/"tokenizer.json").write_text("{}"), "could not be loaded"),
    "no processor": (lambda d: (d/"processor_config.json").unlink(), "processor_config.json is missing"),
}

@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_policy_names_the_file(name, tiny, tmp_path):
    change, said = DAMAGE[name]
    shutil.copytree(tiny, tmp_path/"bad")
    change(tmp_path/"bad")
    with pytest.raises(UserError, match=said):
        train("grpo", tmp_path/"bad", run_dir=tmp_path/"run", progress=False, prompts=PROMPTS)
    assert not (tmp_path/"run").exists()

def test_an_index_cannot_lead_out_of_the_folder(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path/"bad"/"in")
    (tmp_path/"bad"/"in"/"model.safetensors").rename(tmp_path/"bad"/"x.safetensors")
    (tmp_path/"bad"/"in"/"model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(UserError, match="is missing"): load_policy(tmp_path/"bad"/"in")

def test_a_hub_name_without_a_network(monkeypatch):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no folder nobody/nothing .* hub .*hf download nobody/nothing"):
        load_policy("nobody/nothing")


def test_weights_of_prompts_count_unless_told_not_to(tiny, tmp_path):
    light = [replace(p, weight=0.25) for p in PROMPTS]
    runs = {w: go(tiny, tmp_path/str(w), prompts=light, steps=1, evaluate=dict(suites=[]), data=dict(weighted=w)) for w in (True, False)}
    rows = {w: run.groups(1) for w, run in runs.items()}
    assert set(rows[True].weight) == {0.25} and set(rows[False].weight) == {1.0} and rows[False].advantage.abs().max() > 0
    assert np.allclose(rows[True].advantage, 0.25 * rows[False].advantage) and light[0].weight == 0.25


def test_prompts_without_weights_keep_their_pictures_encoded(tmp_path):
    from PIL import Image
    from unify_rl.data.readers import FilePrompt, Picture
    from unify_rl.data.stream import load_prompts
    Image.fromarray(PROMPTS[-1].image).save(tmp_path/"a.png")
    (tmp_path/"train.jsonl").write_text(json.dumps(dict(id="a", task="answer", text="?", answer="x", image="a.png", weight=0.5)) + "\n")
    old, = load_prompts("jsonl", "train", ("answer",), str(tmp_path))
    new, = R.unweighted([old])
    assert (old.weight, new.weight) == (0.5, 1.0) and type(new) is FilePrompt and isinstance(vars(new)["image"], Picture)
    assert np.array_equal(new.image, PROMPTS[-1].image) and (new.id, new.answer) == (old.id, old.answer)


def test_a_prompt_that_no_rule_can_judge_is_found_before_the_run(tiny, tmp_path):
    from dataclasses import replace
    odd = replace(PROMPTS[0], id="mine/7", constraints=())
    with pytest.raises(UserError, match="mine/7"):
        train("grpo", tiny, run_dir=tmp_path/"r", prompts=[*PROMPTS, odd], progress=False, **FAST)
    assert not (tmp_path/"r").exists()


# -- rewards that fail ---------------------------------------------------------------------------------------------

def whole(judge): return Reward("odd", judge, ("generate", "answer"))

def fail(prompts_B, rollout): raise RuntimeError("the scorer is down")

FAILING = {
    "raises": (whole(fail), 1.0, "RuntimeError: the scorer is down"),
    "none": (per_sample("odd", lambda p, t, i: None), 1.0, "failed on"),
    "nan": (whole(lambda p, r: Scores([float("nan")] * len(r), ["no idea"] * len(r))), 1.0, "no idea"),
    "infinite": (per_sample("odd", lambda p, t, i: float("inf")), 1.0, "failed on"),
    "wrong length": (whole(lambda p, r: Scores([1.0], ["one"])), 1.0, "it returned 1 values for"),
    "not a number": (per_sample("odd", lambda p, t, i: "good"), 1.0, "ValueError"),
    "pictures only": (per_sample("odd", lambda p, t, i: None if i is not None else len(t)), 0.5, "failed on"),
}

@pytest.mark.parametrize("name", FAILING)
def test_failed_rewards_are_masked_and_counted(name, tiny, tmp_path):
    reward, share, said = FAILING[name]
    run = go(tiny, tmp_path/"r", rewards=[reward], data=dict(tasks=dict(generate=0.5, answer=0.5)),
             **{"evaluate.suites": [], "log.groups_every": 1})
    assert all(m["samples/failed"] == share and any(said in note for note in m["notes"]) for m in read_metrics(run.dir))
    g = run.groups(3)
    assert (~g.valid).mean() == share and (g.advantage[~g.valid] == 0).all() and g.raw_odd[~g.valid].isna().all()
    if share == 1.0:
        before = load_policy(tiny).state_dict()
        moved = [k for k, p in run.policy().state_dict().items() if not torch.equal(p, before[k])]
        assert not moved                                    # no verdict, no gradient (and the KL of no step is 0)

def test_failed_rewards_stop_the_run_if_asked_to(tiny, tmp_path):
    with pytest.raises(UserError, match="the scorer is down.*set on_error=mask"):
        go(tiny, tmp_path/"r", rewards=[whole(fail)], on_error="stop", **{"evaluate.suites": []})


# -- interrupted and continued -------------------------------------------------------------------------------------

def interrupting(step):
    "The reward `redness`, during which Ctrl-C is pressed in that step."
    calls = []
    def judge(prompts_B, rollout):
        calls.append(1)
        if len(calls) == step: signal.raise_signal(signal.SIGINT)
        return redness(prompts_B, rollout)
    return Reward("redness", judge, ("generate",))

def same(a, b):
    "Equal to the last bit, all the way down."
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray): return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)

def assert_same_run(a, b):
    step, state, _ = load_checkpoint(a.dir/"checkpoints")
    step_b, state_b, _ = load_checkpoint(b.dir/"checkpoints")
    assert step == step_b and state["params"] and same(state, state_b)
    timeless = lambda run: [{k: v for k, v in m.items() if not k.startswith("seconds/")} for m in read_metrics(run.dir)]
    assert timeless(a) == timeless(b)
    assert (a.dir/"policy"/"model.safetensors").read_bytes() == (b.dir/"policy"/"model.safetensors").read_bytes()
    verdicts = lambda run: [(run.dir/"eval"/f"{name}.json").read_bytes() for name in ("before", "after")]
    assert verdicts(a) == verdicts(b)
    assert a.steps == b.steps and all(a.groups(s).equals(b.groups(s)) for s in a.steps)
    assert {k: v for k, v in a.summary.items() if k != "seconds"} == {k: v for k, v in b.summary.items() if k != "seconds"}

LORA = {"model.lora_rank": 2, "optimizer.schedule": "cosine", "objective.updates": 2}

@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_interrupted_and_resumed_is_uninterrupted_to_the_last_bit(settings, tiny, tmp_path, capsys):
    a = go(tiny, tmp_path/"a", **settings)
    b = go(tiny, tmp_path/"b", rewards=[interrupting(2), (wordy, 0.1)], progress=True, **settings)
    said = capsys.readouterr().out
    assert "stopped after step 2" in said and resume_command(b.config) in said
    assert not b.finished and len(read_metrics(b.dir)) == 2 and not (b.dir/"policy").exists()
    before = (b.dir/"eval"/"before.json").stat().st_mtime_ns
    b = go(tiny, tmp_path/"b", resume=True)
    assert (b.dir/"eval"/"before.json").stat().st_mtime_ns == before            # the first test is not repeated
    assert_same_run(a, b)

def test_resuming_goes_back_past_a_damaged_checkpoint_and_says_so(tiny, tmp_path, capsys):
    a = go(tiny, tmp_path/"a", **{"checkpoint.every": 1})
    b = go(tiny, tmp_path/"b", rewards=[interrupting(2), (wordy, 0.1)], **{"checkpoint.every": 1})
    newest = checkpoints(b.dir/"checkpoints")[2]
    for file in newest.glob("*.safetensors"): cut(file)
    b = go(tiny, tmp_path/"b", resume=True, progress=True)
    said = capsys.readouterr().out
    assert "cannot be used" in said and "continuing after step 1" in said
    assert_same_run(a, b)

def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew_in_silence(tiny, tmp_path):
    b = go(tiny, tmp_path/"b", rewards=[interrupting(1), (wordy, 0.1)])
    for folder in checkpoints(b.dir/"checkpoints").values():
        for file in folder.glob("*.safetensors"): cut(file)
    with pytest.raises(UserError, match="None is left"): go(tiny, tmp_path/"b", resume=True)

def test_interrupted_in_the_first_test_and_resumed(tiny, tmp_path, monkeypatch):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(R, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt, match="--resume"): go(tiny, tmp_path/"b")
    assert_same_run(go(tiny, tmp_path/"a"), go(tiny, tmp_path/"b", resume=True))

def test_interrupted_while_it_loads_there_is_nothing_to_continue(tiny, tmp_path, monkeypatch):
    def stop(*args): signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(R, "load_policy", stop)
    with pytest.raises(KeyboardInterrupt, match="before there was anything to save"): go(tiny, tmp_path/"runs"/"b")
    assert not (tmp_path/"runs").exists()

def test_interrupted_in_the_last_test_and_resumed(tiny, tmp_path, monkeypatch, finished):
    real, calls = R.evaluate, []
    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt                             # two suites before, the second after
        return real(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(R, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt): go(tiny, tmp_path/"b", **{"log.groups_every": 2})
    assert not Run(tmp_path/"b").finished
    assert_same_run(finished, go(tiny, tmp_path/"b", resume=True))

def test_interrupted_between_two_suites_nothing_is_tested_twice(tiny, tmp_path, monkeypatch, finished):
    real, calls = R.evaluate, []
    def stop(policy, suite, **kwargs):
        if len(calls) == 1: raise KeyboardInterrupt
        calls.append(suite.name)
        return real(policy, suite, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(R, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt): go(tiny, tmp_path/"b", **{"log.groups_every": 2})
    again = []
    monkeypatch.setattr(R, "evaluate", lambda policy, suite, **kwargs: (again.append(suite.name), real(policy, suite, **kwargs))[1])
    b = go(tiny, tmp_path/"b", resume=True)
    suites = finished.config.evaluate.suites
    assert calls == suites[:1] and again == suites[1:] + suites
    assert_same_run(finished, b)
    samples = lambda run: {p.name: p.read_bytes() for p in (run.dir/"eval"/"before").iterdir()}
    assert samples(finished) == samples(b)                                      # pictures too

def test_a_signal_that_comes_three_times_is_one_wish(tiny, tmp_path, capsys):
    "A cluster's SIGTERM reaches a process from the queue, the node's script and torchrun; Ctrl-C from the terminal and torchrun."
    for numbers in ([signal.SIGTERM] * 3, [signal.SIGINT] * 2, [signal.SIGINT, signal.SIGTERM]):
        folder = tmp_path/f"{numbers[0].name}-{len(numbers)}-{len(set(numbers))}"
        def judge(prompts_B, rollout):
            for n in numbers: signal.raise_signal(n)
            return redness(prompts_B, rollout)
        b = go(tiny, folder, rewards=[Reward("redness", judge, ("generate",)), (wordy, 0.1)], **{"checkpoint.every": 0})
        assert list(checkpoints(b.dir/"checkpoints")) == [1] and not b.finished

def test_ctrl_c_again_after_a_while_interrupts_at_once(tiny, tmp_path):
    def judge(prompts_B, rollout):
        signal.raise_signal(signal.SIGINT); time.sleep(1.1); signal.raise_signal(signal.SIGTERM); signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="--resume"): go(tiny, tmp_path/"b", rewards=[Reward("redness", judge, ("generate",)), (wordy, 0.1)])
    assert not checkpoints(tmp_path/"b"/"checkpoints")

def test_sigterm_twice_outside_of_training_still_says_how_to_continue(tiny, tmp_path, monkeypatch):
    real = R.resume_command
    def again(*args): signal.raise_signal(signal.SIGTERM); return real(*args)
    monkeypatch.setattr(R, "resume_command", again)                             # the second arrives while the command is made
    monkeypatch.setattr(R, "evaluate", lambda *a, **k: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="--resume"): go(tiny, tmp_path/"b")
    assert signal.getsignal(signal.SIGTERM) == BEFORE[1]

def breaking(trainer_step):
    "`Trainer.step` with parameters that are ruined after the third."
    def step(trainer):
        metrics = trainer_step(trainer)
        if trainer.done == 3:
            for p in trainer.engine.trained.values(): p.data.fill_(1e30)
        return metrics
    return step

def test_a_run_that_breaks_keeps_what_was_saved_before_and_is_healed_by_a_lower_learning_rate(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(R.Trainer, "step", breaking(R.Trainer.step))
        with pytest.raises(UserError) as e: go(tiny, tmp_path/"b", steps=30, **{"checkpoint.every": 1, "log.groups_every": 0})
    assert list(checkpoints(tmp_path/"b"/"checkpoints")) == [2, 3] and all(m["steps/skipped"] for m in read_metrics(tmp_path/"b")[3:])
    said, broken = str(e.value), checkpoints(tmp_path/"b"/"checkpoints")[3]
    assert "newest checkpoint is of step 3" in said and f"delete {broken}: it then continues after step 2" in said
    assert said.endswith(f"unify_rl train grpo --resume run_dir={tmp_path/'b'} optimizer.lr=0.0001")
    shutil.rmtree(broken)
    b = go(tiny, tmp_path/"b", resume=True, steps=4, **{"optimizer.lr": 1e-4, "checkpoint.every": 1})
    assert b.finished and [m["lr"] for m in read_metrics(b.dir)][1:] != [1e-3] * 3 and [m["steps/skipped"] for m in read_metrics(b.dir)] == [0] * 4

def test_while_steps_are_skipped_nothing_is_rotated_and_a_resumed_run_counts_from_zero(tiny, tmp_path, monkeypatch):
    "Stopped by a signal in the fifth skipped step: its checkpoint is beside the two before; continued, ten more are given."
    step, monkey = R.Trainer.step, breaking(R.Trainer.step)
    def stopping(trainer):
        if trainer.skipped == 4: signal.raise_signal(signal.SIGTERM)
        return monkey(trainer)
    with monkeypatch.context() as m:
        m.setattr(R.Trainer, "step", stopping)
        go(tiny, tmp_path/"b", steps=30, **{"checkpoint.every": 1, "log.groups_every": 0})
    assert list(checkpoints(tmp_path/"b"/"checkpoints")) == [2, 3, 8]
    with pytest.raises(UserError, match="newest checkpoint is of step 8"): go(tiny, tmp_path/"b", resume=True, steps=30)
    assert len(read_metrics(tmp_path/"b")) == 17                                # the tenth skipped step is not logged

def test_a_run_that_breaks_before_the_first_checkpoint_says_so(tiny, tmp_path):
    with pytest.raises(UserError, match="No checkpoint was saved before: start again in another run_dir with a lower optimizer.lr"):
        go(tiny, tmp_path/"b", steps=30, **{"optimizer.lr": 1e30, "checkpoint.every": 0, "log.groups_every": 0})
    with pytest.raises(UserError, match="newest checkpoint is of step 1: .*If that stops as well, start again in another run_dir"):
        go(tiny, tmp_path/"c", steps=30, **{"optimizer.lr": 1e30, "checkpoint.every": 1, "log.groups_every": 0})

def test_a_second_start_on_one_folder_is_refused_and_harms_nothing(tiny, tmp_path, finished):
    refused = []
    def judge(prompts_B, rollout):
        if not refused:
            for resume in (True, False):
                code = f"from unify_rl.run import train; train('grpo', run_dir={str(tmp_path/'b')!r}, resume={resume}, progress=False)"
                refused.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr)
        return redness(prompts_B, rollout)
    b = go(tiny, tmp_path/"b", rewards=[Reward("redness", judge, ("generate",)), (wordy, 0.1)], **{"log.groups_every": 2})
    for said in refused: assert f"UserError: {tmp_path/'b'} is in use: process {os.getpid()} on {socket.gethostname()}, since" in said, said
    assert_same_run(finished, b)
    assert not (b.dir/".lock").exists()

def test_how_a_run_is_continued_depends_on_how_it_was_started(tiny, tmp_path, monkeypatch):
    cfg = load_config("grpo", overrides=[f"run_dir={tmp_path}/my run"])
    alone = f"train grpo --resume 'run_dir={tmp_path}/my run'"
    assert resume_command(cfg, "steps=9") == f"unify_rl {alone} steps=9"
    for k, v in dict(RANK=3, WORLD_SIZE=8, LOCAL_WORLD_SIZE=8).items(): monkeypatch.setenv(k, str(v))
    assert resume_command(cfg) == f"torchrun --nproc_per_node 8 -m unify_rl {alone}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command(cfg) == f"torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HEAD:29500 --nproc_per_node 4 -m unify_rl {alone}"
    monkeypatch.setenv("WORLD_SIZE", "1"); monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert resume_command(cfg) == f"unify_rl {alone}"
    assert resume_command(load_config("grpo", overrides=[f"run_dir={tmp_path}/my run", "engine.fsdp=true"])) == f"torchrun --nproc_per_node 1 -m unify_rl {alone}"
    (tmp_path/"my run"/"launch").mkdir(parents=True)
    (tmp_path/"my run"/"launch"/"job.json").write_text(json.dumps(dict(recipe="grpo", gpus=8, nodes=2, zero=2)))
    assert resume_command(cfg, "steps=9").startswith("unify_rl launch grpo --gpus 8 --nodes 2 --zero 2 --resume") and resume_command(cfg, "steps=9").endswith(" steps=9")

def test_resuming_a_finished_run_makes_only_what_is_missing(tiny, tmp_path, finished):
    shutil.copytree(finished.dir, tmp_path/"run")
    (tmp_path/"run"/"summary.json").unlink(); (tmp_path/"run"/"report.html").unlink(); shutil.rmtree(tmp_path/"run"/"policy")
    kept = [*(tmp_path/"run"/"eval").glob("*.json"), *(tmp_path/"run"/"checkpoints").rglob("*")]
    kept = {p: p.stat().st_mtime_ns for p in kept}
    run = go(tiny, tmp_path/"run", resume=True)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    assert (run.dir/"report.html").exists() and run.summary == finished.summary
    assert_same_run(finished, run)

def test_training_on_is_a_longer_run(tiny, tmp_path, finished):
    shutil.copytree(finished.dir, tmp_path/"run")
    b = go(tiny, tmp_path/"run", resume=True, steps=5)
    assert b.summary["steps"] == 5 and b.config.steps == 5
    assert_same_run(go(tiny, tmp_path/"a", **{"steps": 5, "log.groups_every": 2}), b)
    with pytest.raises(UserError, match="has 5 steps already"): go(tiny, tmp_path/"run", resume=True, steps=4)

def test_resuming_refuses_other_settings_by_name(tiny, finished):
    before = (finished.dir/"config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"seed: 1 -> 2; .*optimizer.warmup: 0 -> 1"):
        go(tiny, finished.dir, resume=True, seed=2, **{"optimizer.warmup": 1, "optimizer.lr": 0.1})
    with pytest.raises(UserError, match="redness"): go(tiny, finished.dir, resume=True, rewards=[redness, wordy])  # other weights
    with pytest.raises(UserError, match="data.source"): go(tiny, finished.dir, resume=True, prompts=PROMPTS[1:])
    with pytest.raises(UserError, match="policy: .* -> 'tiny-janus'"):
        train("grpo", "tiny-janus", run_dir=finished.dir, resume=True, progress=False)
    assert (finished.dir/"config.yaml").read_bytes() == before

def test_nothing_to_resume(tiny, tmp_path):
    (tmp_path/"rum").mkdir()
    with pytest.raises(UserError, match="no run folder .*Did you mean 'rum'"): go(tiny, tmp_path/"run", resume=True)
    with pytest.raises(UserError, match="not the folder of a run"): go(tiny, tmp_path/"rum", resume=True)

def test_a_moved_run_can_be_resumed(tiny, tmp_path, finished):
    shutil.copytree(finished.dir, tmp_path/"elsewhere")
    assert go(tiny, tmp_path/"elsewhere", resume=True).config.run_dir == str(tmp_path/"elsewhere")

def test_signals_are_left_as_they_were(finished):
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == BEFORE


# -- settings and the screen ---------------------------------------------------------------------------------------

def test_settings_from_python_mean_what_they_mean_on_the_command_line():
    given = {"steps": 7, "rollout": {"group_size": 4, "top_p": 0.9}, "optimizer.lr": 1e-7, "run_dir": "yes: no # {x}",
             "model": {"train": ["a", "b"]}, "objective.clip_high": float("inf"), "data": {"tasks": {"answer": 1}},
             "rewards.strict.weight": np.float32(0.25)}
    c = load_config("grpo", overrides=as_overrides(given))
    assert (c.steps, c.rollout.group_size, c.rollout.top_p, c.optimizer.lr) == (7, 4, 0.9, 1e-7)
    assert c.rollout.prompts == load_config("grpo").rollout.prompts             # the rest of a section is kept
    assert (c.run_dir, c.model.train, c.objective.clip_high) == ("yes: no # {x}", ["a", "b"], float("inf"))
    assert (c.data.tasks, c.rewards[1].weight) == ({"answer": 1.0}, 0.25)

def test_lines_and_clock():
    want = ["0 s", "59 s", "1:00 min", "59:59 min", "1:00 h", "25:00 h"]
    assert [clock(x) for x in (0, 59.4, 59.6, 3599.4, 3599.6, 90000)] == want
    said = line(2, 9, {"reward/total": .5, "reward/x": float("nan"), "objective/kl": .25, "seconds/sample": 1.5,
                       "seconds/update": 1.0, "lr": 1}, 70)
    assert said == "step 2/9  reward 0.500  KL 0.250  2.5 s (sample 1.5, update 1.0)  1:10 min left"

def test_live_screen_shows_the_numbers_and_the_time_left():
    from rich.console import Console
    screen, out = Screen(), io.StringIO()
    screen.console, screen.live = Console(file=out, force_terminal=True, force_jupyter=False, width=100), True
    with screen.training(10) as show:
        for step in (1, 2):
            show(step, {"reward/total": .25 * step, "groups/dead": .125, "seconds/sample": 2.0,
                        "notes": [f"reward 'x' failed on {step} of 2 samples: why"]})
    with screen.bar("suite") as track: track(3, 6)
    said = out.getvalue()
    assert all(x in said for x in ("step 2/10", "16 s left", "0.500", "0.375", "dead groups", "3/6"))
    assert said.count("why") == 1

def test_a_silent_run_prints_nothing(tiny, tmp_path, capfd):
    with contextlib.suppress(UserError): go(tiny, tmp_path/"r", rewards=[whole(fail)], on_error="stop")
    assert capfd.readouterr() == ("", "")
