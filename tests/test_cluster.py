"Will it fit, what is missing, and how it is started: the planner against tensors that live, the doctor in made-up machines, the launcher's scripts run by a shell."
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from unify_rl import doctor
from unify_rl.core import Prompt, UserError, generator_for
from unify_rl.mechanisms.tokens import _Decoder, encode_prefix
from unify_rl.policies.load import load_policy
from unify_rl.rewards.verifiable import per_sample
from unify_rl.run import Screen, _prepare
from unify_rl.train import plan as planner
from unify_rl.train.config import apply_overrides, load_config
from unify_rl.train.launch import Job, check_job, continue_command, environment, launch, launch_files, node_script, read_hosts, slurm_script, ssh_script
from unify_rl.train.plan import (HOLLOW, Layout, Live, advise, count, full_size, imagined, parse_gpus, plan, plan_record, plan_recipe, plan_table, ready, rehearse, reward_models,
                                 share_of, sizes, states, verdict)
from unify_rl.train.runlog import RunLog

HERE = Path(__file__).parent
TINY = ("tiny-janus", "tiny-bagel", "tiny-dimoo")
SMALL = ["rollout.prompts=4", "rollout.group_size=2", "optimizer.micro_batch=4", "rollout.max_text=12", "evaluate.suites=[]"]


def config(policy, *more, recipe="pairuni"):
    "A small step that draws and answers."
    given = ["data.source=shapes", "data.order=mixed"] if recipe == "pairuni" else []
    return load_config(recipe, policy, overrides=[*given, *SMALL, *more])


def nbytes(tensors): return sum(t.numel() * t.element_size() for t in tensors)


# -- the planner, against a trainer ----------------------------------------------------------------------------------------

dice = per_sample("dice", lambda prompt, text, image, roll=itertools.count(): float(next(roll)), tasks=("generate", "answer"))       # no group is dead
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)

def trained(policy, tmp_path, tasks, *more):
    "A trainer of the real policy on four real prompts."
    text = "is there a red circle above a blue square here now"
    prompts = [Prompt(f"{t}{i}", t, text, image=PICTURE if t == "answer" else None, answer="yes") for t in tasks for i in range(4)]
    cfg = config(policy, f"run_dir={tmp_path}/run", f"data.tasks={{{', '.join(f'{t}: 1.0' for t in tasks)}}}", *more)
    return _prepare(cfg, False, prompts, [dice], Screen(False))


def slow_but(first, rest): return [first, *(pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.slow) for x in rest)]


@pytest.mark.parametrize("policy", slow_but("tiny-janus", TINY[1:]))
def test_what_stays_is_counted_to_the_byte(policy, tmp_path):
    "Weights, gradients and AdamW's moments of a trainer after a step, and the reference, are exactly what the plan says."
    trainer, seen = trained(policy, tmp_path, ("generate", "answer"), "objective.beta=0.01"), {}
    step = trainer.engine.optimizer.step
    trainer.engine.optimizer.step = lambda *a, **k: (seen.update(gradients=nbytes(w.grad for w in trainer.engine.trained.values() if w.grad is not None)), step(*a, **k))[1]
    trainer.step()
    c = count(sizes(policy), trainer.cfg, share_of(trainer.cfg, 1), words=12)
    said = states(c.params, c.trained, Layout(1), reference=True)
    assert said["weights"] == nbytes(trainer.policy.parameters())
    moments = nbytes(t for s in trainer.engine.optimizer.state.values() for k, t in s.items() if k != "step")
    unused = nbytes(w for w in trainer.engine.trained.values() if w not in trainer.engine.optimizer.state)           # experts that this step's prompts did not need
    assert said["gradients"] == seen["gradients"] + unused and said["optimizer"] == moments + 2 * unused
    kept = trainer.policy._reference
    assert said["reference"] == nbytes(w for w in kept.parameters() if not any(w is v for v in trainer.policy.parameters()))


LEAN = ("model.precision=bf16", "model.checkpoint_activations=true")

@pytest.mark.parametrize("policy, more", slow_but(("tiny-janus", (*LEAN, "rollout.cfg=5")), [("tiny-janus", ()), ("tiny-bagel", ()), ("tiny-bagel", LEAN), ("tiny-dimoo", ()),
                                                                                          ("tiny-dimoo", ("model.checkpoint_activations=true", "model.logp_chunk=16"))]))
def test_a_rehearsal_without_numbers_is_one_with_numbers(policy, more):
    "Two hollow layers and three, extended to four, against the shipped policy with its weights and its tokenizer."
    cfg, real = config(policy, *more), load_policy(policy)
    tasks = share_of(cfg, 1)
    said = count(sizes(policy), cfg, tasks, words=12)
    assert said.params == sum(w.numel() for w in real.parameters())
    ready(real, cfg)
    family = HOLLOW[sizes(policy)["config"]["model_type"]]
    seen = rehearse(real, imagined(real, tasks, 12), cfg, family.sample)
    assert said.stages.keys() == seen.keys()
    print(policy, more, {k: f"{said.stages[k] / seen[k] - 1:+.1%}" for k in seen})
    for k in seen: assert abs(said.stages[k] / seen[k] - 1) < 0.15, (k, said.stages[k], seen[k])


def measured(trainer):
    "Peaks of a real step's rollout and update (up to the optimizer's step, which the plan counts as a phase of its own), and how long the outputs were."
    seen, sample, update, step, now = {}, trainer._sample, trainer._update, trainer._step, []
    there = [*trainer.policy.parameters(), *trainer.policy.buffers()]
    def watch(name, f):
        def run(*args):
            with Live(there) as live:
                now.append(live)
                out = f(*args)
            seen.setdefault(name, live.peak)
            if name == "sample": seen["length"] = max(p.actions.shape[1] for p in out.parts)
            return out
        return run
    trainer._sample, trainer._update = watch("sample", sample), watch("update", update)
    def stepped(passes):
        seen.setdefault("update", now[-1].peak)
        seen["gradients"] = nbytes(w.grad for w in trainer.engine.trained.values() if w.grad is not None)       # an answer leaves the experts that draw without one
        return step(passes)
    trainer._step = stepped
    trainer.step()
    return seen


@pytest.mark.parametrize("policy, task", slow_but(("tiny-janus", "answer"), [("tiny-janus", "generate"), *((p, t) for p in TINY[1:] for t in ("generate", "answer"))]))
def test_a_real_step_needs_what_was_planned(policy, task, tmp_path):
    "The trainer itself: the rollout's peak, and the update's with the gradients in it."
    trainer = trained(policy, tmp_path, (task,), "objective.betas={}", "objective.beta=0", "rollout.cfg=1")
    seen = measured(trainer)
    said = lambda cfg, *of: max(v for k, v in count(sizes(policy), cfg, {task: 4}, words=11).stages.items() if k.startswith(of))
    shorter = [f"rollout.max_text={seen['length']}"] if task == "answer" and policy != "tiny-dimoo" else []
    update = said(apply_overrides(trainer.cfg, shorter), "update") + seen["gradients"]
    rollout = said(trainer.cfg, "sample", "decode")
    print(policy, task, f"update {update / seen['update'] - 1:+.1%}, rollout {rollout / seen['sample'] - 1:+.1%}")
    assert abs(update / seen["update"] - 1) < 0.15, (update, seen)
    assert abs(rollout / seen["sample"] - 1) < 0.15, (rollout, seen)


def test_activations_are_what_autograd_saves(tmp_path):
    "Another way to count: everything autograd keeps for the backward pass, each storage once."
    policy, cfg = load_policy("tiny-janus"), config("tiny-janus")
    ready(policy, cfg)
    prompts, own, saved = imagined(policy, {"answer": 4}, 12), {w.untyped_storage().data_ptr() for w in policy.parameters()}, {}
    part = policy.sample(prompts, 2, generator_for(0), max_text=12).parts[0]
    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own: saved[s.data_ptr()] = s
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): policy(part.select(torch.arange(4))).sum()
    cfg = apply_overrides(cfg, [f"rollout.max_text={part.actions.shape[1]}"])
    c = count(sizes("tiny-janus"), cfg, {"answer": 4}, words=12)
    kept = sum(s.nbytes() for s in saved.values())
    assert abs(c.stages["update text"] / kept - 1) < 0.15, (c.stages["update text"], kept)


@pytest.mark.slow
def test_the_key_value_cache_grows_as_counted():
    "The decoder's own tensors against what the plan adds for each further token."
    policy = load_policy("tiny-janus")
    lm, context = policy.janus.model.language_model, policy._draw_context(imagined(policy, {"generate": 4}, 12))
    with torch.no_grad(): cache = lambda T: sum(x.nbytes for x in (lambda d: (d.K, d.V))(_Decoder(lm, encode_prefix(lm, policy._embed(context), context["mask"]), 2, T)))
    stage = lambda T: count(sizes("tiny-janus"), config("tiny-janus", f"rollout.max_text={T}"), {"answer": 4}, words=12).stages["sample text"]
    grown, counted = cache(200) - cache(100), stage(200) - stage(100)
    assert grown == 2 * 4 * 8 * 128 * 100 * 4 and abs(counted / grown - 1) < 0.15, (grown, counted)


# -- the planner's arithmetic ----------------------------------------------------------------------------------------------

def test_zero_divides():
    n, N = 1_000_000, 8
    s = {z: states(2 * n, n, Layout(N, z), True) for z in range(4)}
    keep = lambda z: (s[z]["weights"], s[z]["gradients"], s[z]["optimizer"], s[z]["reference"])
    assert keep(0) == (8 * n, 4 * n, 8 * n, 4 * n) and s[0]["buckets"] == 0 and s[1]["buckets"] == 8 * n
    assert keep(1) == (8 * n, 4 * n, 12 * n // 8, 4 * n) and keep(2) == (8 * n, 4 * n // 8, 12 * n // 8, 4 * n) and keep(3) == (n, n // 2, 12 * n // 8, n // 2)
    assert s[3]["gathered to sample"] == 8 * n
    half = states(2 * n, n, Layout(N, 2), True, half=True)
    assert (half["weights"], half["gradients"], half["optimizer"]) == (4 * n, 2 * n // 8, 12 * n // 8) and states(2 * n, n, Layout(N), True, half=True)["weights"] == 8 * n
    off = states(2 * n, n, Layout(N, 3, "params"), False)
    assert off["weights"] == off["optimizer"] == 0 and states(2 * n, n, Layout(N, 2, "optimizer"), False)["weights"] == 8 * n
    alone = states(2 * n, n, Layout(1), False)
    assert sum(alone.values()) == 8 * n + 12 * n
    cut = states(2 * n, n, Layout(N, fsdp=True), True, half=True, largest=1000, rest=5000)
    assert (cut["weights"], cut["gradients"], cut["optimizer"], cut["reference"]) == (n, n // 2, n, n)             # fp32 pieces, which are their own masters
    assert (cut["gathered"], cut["buckets"], cut["gathered to sample"]) == (4 * 5000 + 2 * 1000, 4 * 1000, 8 * n)


def test_fsdp_is_planned_like_zero_3():
    "Less than data parallel needs, about what ZeRO 3 does; what is outside of the layers is gathered as a whole."
    plans = {lay: planner.plan(config("tiny-janus"), 2**30, lay, 12) for lay in (Layout(4), Layout(4, 3), Layout(4, fsdp=True))}
    ddp, zero, fsdp = plans.values()
    assert fsdp.peak < ddp.peak and fsdp.phases["sample"]["weights"] == zero.phases["sample"]["weights"] and fsdp.phases["sample"]["optimizer"] < zero.phases["sample"]["optimizer"]
    c = fsdp.counted
    assert c.rest + load_policy("tiny-janus").janus.config.text_config.num_hidden_layers * c.largest == c.params and fsdp.phases["update"]["gathered"] == 4 * (c.rest + c.largest)
    for lay, pieces in ((Layout(4, 3, gather="layer"), zero), (Layout(4, fsdp=True, gather="layer"), fsdp)):          # to sample, one layer beside what is outside of the layers
        light = planner.plan(config("tiny-janus"), 2**30, lay, 12)
        assert light.phases["sample"]["gathered"] == 4 * (c.rest + c.largest) and light.phases["update"] == pieces.phases["update"]
        saved = pieces.phases["sample"]["caches, logits, pictures"] - light.phases["sample"]["caches, logits, pictures"]
        assert saved == pytest.approx(2 * 4 * (3 * 128 * 128 + 2 * 128 * 352), rel=0.05)         # joined weights (q, k, v; gate, up) of two layers instead of four: one is made before the last is let go
    assert "FSDP" in str(plan_table(fsdp).columns[0].header) and plan_record(fsdp)["layout"]["fsdp"]


@pytest.mark.parametrize("name, billions", [("deepseek-community/Janus-Pro-1B", 2.077), ("deepseek-community/Janus-Pro-7B", 7.408), ("ByteDance-Seed/BAGEL-7B-MoT", 14.659), ("Alpha-VLLM/Lumina-DiMOO", 8.229)])
def test_full_sizes(name, billions):
    "Counted with all layers, on the meta device, from the sizes that come with the package."
    spec = sizes(name)
    family = HOLLOW[spec["config"]["model_type"]]
    with torch.device("meta"): policy = family.build(spec, family.depth(spec))
    assert round(sum(w.numel() for w in policy.parameters()) / 1e9, 3) == billions
    assert set(full_size()) >= {name}


def test_lora_trains_little_and_keeps_no_reference():
    cfg = config("tiny-janus", "objective.beta=0.01")
    lean = apply_overrides(cfg, ["model.lora_rank=4"])
    a, b = plan(cfg, 2**30), plan(lean, 2**30)
    assert a.phases["update"]["reference"] > 0 == b.phases["update"]["reference"] and b.phases["update"]["gradients"] < a.phases["update"]["gradients"] / 5
    real = load_policy("tiny-janus"); real.add_lora(4, 32, list(real.lora_targets))
    assert b.counted.trained == sum(w.numel() for w in real.parameters() if w.requires_grad)


@pytest.mark.slow
def test_advice_is_tried_out_and_has_nothing_to_spare():
    cfg = config("tiny-janus", "optimizer.micro_batch=64", "rollout.prompts=16", "rollout.group_size=4", "rollout.max_text=40")
    roomy, none = advise(cfg, 2**30, Layout(2), 12)
    assert roomy.fits and none is None
    for share in (0.9, 0.7, 0.5):
        memory = int(roomy.peak * share / planner.USABLE)
        asked, better = advise(cfg, memory, Layout(2), 12)
        assert not asked.fits and better.fits and better.changes, share
        text = verdict(asked, better)
        assert "no, it does not fit" in text and " ".join(better.changes) in text
    tight, none = advise(cfg, 2**20, Layout(2), 12)
    assert not tight.fits and none is None and "take more GPUs" in verdict(tight, none)
    assert json.loads(json.dumps(plan_record(tight)))["fits"] is False and plan_table(tight).row_count > 5


def test_reward_models_are_named_and_placed():
    cfg = load_config("lvrpo", "ByteDance-Seed/BAGEL-7B-MoT")
    assert [(m.reward, m.model, m.device) for m in reward_models(cfg)] == [("semantic", "timm/ViT-SO400M-16-SigLIP2-384", "cpu"), ("knowledge", "Qwen/Qwen2.5-VL-3B-Instruct", "cpu")]
    gpu, host, unknown = planner.reward_bytes(cfg)
    assert gpu == 0 and host > 15e9 and not unknown
    moved = apply_overrides(cfg, ["rewards.knowledge.settings={model: somebody/else, device: cuda}", "rewards.semantic.settings.device=cuda"])
    gpu, host, unknown = planner.reward_bytes(moved)
    assert gpu > 4e9 and host == 0 and unknown == ["somebody/else"]


@pytest.mark.parametrize("kwargs, message", [
    (dict(recipe="lvrpro"), "unknown recipe 'lvrpro'. Did you mean 'lvrpo'"), (dict(policy="tiny-jan"), "Did you mean 'tiny-janus'"), (dict(policy="some/other"), "hf download some/other"),
    (dict(gpus="8 big ones"), "such as 8x80GB"), (dict(gpus="0x80GB"), "such as 8x80GB"), (dict(zero=4), "--zero is 4"), (dict(offload="optimizer"), "give --zero 1, 2 or 3"),
    (dict(offload="params", zero=2), "ZeRO-3 only"), (dict(offload="disk", zero=2), "Known: none, optimizer, params"), (dict(words=0), "--words is 0"), (dict(fsdp=True, zero=3), "leave out --zero 3"), (dict(fsdp=True, offload="params"), "leave out --offload params"),
    (dict(gpus="3x80GB"), "must be a multiple of 3; the nearest is rollout.prompts=24"), (dict(overrides=["rollout.promts=8"]), "rollout.promts: unknown key"), (dict(recipe="corl", policy="tiny-janus"), "consists of stages")])
def test_bad_plans(kwargs, message):
    with pytest.raises(UserError, match=re.escape(message)): plan_recipe(**(dict(recipe="grpo", policy="tiny-janus", overrides=["rollout.prompts=25"] if "3x" in kwargs.get("gpus", "") else []) | kwargs))


def test_gpus_are_read():
    assert parse_gpus("8x80GB") == (8, 80 * 2**30) and parse_gpus("1x141GB") == (1, 141 * 2**30) and parse_gpus("24gb") == (1, 24 * 2**30)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, policy", [("lvrpo", "ByteDance-Seed/BAGEL-7B-MoT"), ("corl-unified", "deepseek-community/Janus-Pro-1B"), ("pairuni", "deepseek-community/Janus-Pro-1B"),
                                            ("pairuni", "deepseek-community/Janus-Pro-7B")])
@pytest.mark.parametrize("gpus", ["8x80GB", "1x141GB"])
def test_the_full_scale_recipes_have_an_answer(recipe, policy, gpus):
    asked, better = plan_recipe(recipe, policy, gpus)
    assert asked.fits or better is None or better.fits


# -- the launcher ----------------------------------------------------------------------------------------------------------

def job(tmp_path, *settings, **kwargs):
    recipe, policy = kwargs.pop("recipe", "grpo"), kwargs.pop("policy", "tiny-janus")
    return Job(recipe, policy, settings=[f"run_dir={tmp_path}/run", *settings], **kwargs)


def dry(tmp_path, the_job, **kwargs):
    "What a dry run says, with this machine's paths taken out."
    said = []
    assert launch(the_job, dry_run=True, say=said.append, **kwargs) == 0
    assert not (tmp_path/"run").exists()
    return "\n".join(said).replace(f"VENV-{sys.prefix if sys.prefix != sys.base_prefix else ''}}}", "VENV-}").replace(str(tmp_path), "/scratch").replace(os.getcwd(), "/home/me")


@pytest.mark.parametrize("name", ["slurm", "hosts", "cpu", "fsdp"])
def test_dry_runs_read_as_they_did(name, tmp_path):
    "Golden texts in tests/fixtures; UPDATE_GOLDEN=1 writes them anew, for a person to read."
    if name == "slurm": said = dry(tmp_path, job(tmp_path, recipe="lvrpo", policy="ByteDance-Seed/BAGEL-7B-MoT", gpus=8, nodes=4, zero=3), slurm=tmp_path/"job.sbatch", deepspeed_config=lambda cfg: {"zero_optimization": {"stage": 3}})
    if name == "hosts":
        (tmp_path/"hosts").write_text("node1 slots=8\nnode2 slots=8\n")
        said = dry(tmp_path, job(tmp_path, "rollout.prompts=32", gpus=8, nodes=2, zero=2, lora=16), hostfile=tmp_path/"hosts")
    if name == "cpu": said = dry(tmp_path, job(tmp_path, gpus=0, processes=2))
    if name == "fsdp": said = dry(tmp_path, job(tmp_path, "rollout.prompts=32", "model.precision=bf16", gpus=8, nodes=2, fsdp=True), slurm=tmp_path/"job.sbatch")
    golden = HERE/"fixtures"/f"launch_{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"): golden.write_text(said + "\n", encoding="utf-8")
    assert said + "\n" == golden.read_text(encoding="utf-8")
    assert str(tmp_path) not in said and "/work" not in said


@pytest.mark.parametrize("kwargs, settings, message", [
    (dict(zero=4), [], "--zero is 4"), (dict(nodes=0), [], "--nodes is 0"), (dict(gpus=-1), [], "--gpus is -1"), (dict(gpus=2, processes=2), [], "--processes 2 is for machines without GPUs"),
    (dict(lora=-1), [], "--lora is -1"), (dict(hours=0), [], "--hours is 0"), (dict(recipe="gropo"), [], "Did you mean 'grpo'"), (dict(policy="tiny-janos"), [], "Did you mean 'tiny-janus'"),
    (dict(gpus=8, nodes=4), ["rollout.prompts=20"], "for 32 processes it must be a multiple of 32; the nearest is rollout.prompts=32"),
    (dict(gpus=5), ["rollout.prompts=16"], "must be a multiple of 5; the nearest is rollout.prompts=15"),
    (dict(gpus=1), ["rollout.prompts=x"], "rollout.prompts: expected a whole number"), (dict(gpus=1), ["engine.zero=2"], "give --zero instead"),
    (dict(gpus=1), ["engine.fsdp=true"], "give --fsdp instead"), (dict(gpus=2, zero=3, fsdp=True), [], "--fsdp and --zero 3: give one of the two"), (dict(gpus=2, fsdp=True), ["model.precision=fp16"], "fp32 or bf16"),
    (dict(recipe="pairuni", gpus=8), ["data.path=nowhere", "rollout.prompts=16"], "nowhere"), (dict(resume=True), [], "--resume: there is no run"), (dict(gpus=1, config_file="no.yaml"), [], "no.yaml")])
def test_bad_jobs(kwargs, settings, message, tmp_path):
    with pytest.raises(UserError) as e: check_job(job(tmp_path, *settings, **kwargs))
    assert message in str(e.value)


def test_pairs_are_divided_whole(tmp_path):
    with pytest.raises(UserError, match="must be a multiple of 16; the nearest is rollout.prompts=32"): check_job(job(tmp_path, "rollout.prompts=24", recipe="pairuni", gpus=8), strict=False)


def test_stages_are_checked_each(tmp_path):
    with pytest.raises(UserError, match="corl-unified: rollout.prompts is 12, for 8 processes"): check_job(job(tmp_path, recipe="corl", gpus=8))


def test_more_gpus_than_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="this machine has 2; use --gpus 2"): launch(job(tmp_path, gpus=4), say=lambda s: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="use --gpus 0 --processes N"): launch(job(tmp_path, gpus=1), say=lambda s: None)
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("text, message", [("node1 slots=4", "has slots=4, but 8 processes"), ("node1 slots=8\n\n# no\nnode1", "line 4: node1 is there twice"), ("node1 8", "line 1: 'node1 8' is not understood"),
                                           ("node1; rm -rf /", "is not understood"), ("$(hostname)", "is not understood"), ("-oProxyCommand=x", "is not understood"), ("\n# nobody\n", "names no machine")])
def test_bad_hostfiles(text, message, tmp_path):
    (tmp_path/"hosts").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)): read_hosts(tmp_path/"hosts", 8)


def test_other_mistakes(tmp_path):
    (tmp_path/"hosts").write_text("a\nb\n")
    with pytest.raises(UserError, match="cannot read the hostfile"): read_hosts(tmp_path/"none", 8)
    with pytest.raises(UserError, match="--nodes is 3, but .* names 2 machines"): launch(job(tmp_path, nodes=3), hostfile=tmp_path/"hosts", dry_run=True)
    with pytest.raises(UserError, match="not both"): launch(job(tmp_path), hostfile=tmp_path/"hosts", slurm=tmp_path/"s")
    (tmp_path/"s").write_text("mine")
    with pytest.raises(UserError, match="is there already and says something else"): launch(job(tmp_path, "rollout.prompts=32", gpus=8, nodes=2), slurm=tmp_path/"s", say=lambda s: None)
    assert (tmp_path/"s").read_text() == "mine" and not (tmp_path/"run").exists()
    (tmp_path/"run").mkdir(); (tmp_path/"run"/"config.yaml").touch()
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"): check_job(job(tmp_path))


def test_what_is_written(tmp_path):
    "A script job writes its files and starts nothing; the folder is still free for a run."
    said = []
    assert launch(job(tmp_path, "rollout.prompts=32", gpus=8, nodes=2, zero=2), slurm=tmp_path/"job.sbatch", say=said.append) == 0
    assert sorted(p.name for p in (tmp_path/"run"/"launch").iterdir()) == ["environment.sh", "job.json", "node.sh", "rank.py"] and f"sbatch {tmp_path}/job.sbatch" in said[-1]
    command = json.loads((tmp_path/"run"/"launch"/"job.json").read_text())["command"]
    assert command == ["unify_rl", "train", "grpo", "--policy", "tiny-janus", "engine.zero=2", "rollout.prompts=32", f"run_dir={tmp_path}/run"]
    RunLog(tmp_path/"run")
    with pytest.raises(UserError, match="already holds a run"): RunLog(tmp_path/"run")
    assert launch(job(tmp_path, "rollout.prompts=32", gpus=8, nodes=2, zero=2), slurm=tmp_path/"job.sbatch", say=said.append) == 0          # the same again is no conflict


def test_a_resumed_run_may_be_spread_in_another_way(tmp_path):
    "The saved configuration says how it was; the command says how it is now, in full."
    words = lambda **how: [w for w in job(tmp_path, "rollout.prompts=32", gpus=8, **how).overrides if w.startswith("engine")]
    assert words() == ["engine.zero=0"] and words(fsdp=True) == ["engine.zero=0", "engine.fsdp=true"] and words(zero=3, resume=True) == ["engine.zero=3", "engine.fsdp=false"]


def test_nasty_names_stay_words(tmp_path):
    "A folder with spaces and quotes is one word in every script."
    folder = tmp_path/"it's $HOME `here`"
    j = Job("grpo", "tiny-janus", gpus=2, nodes=2, zero=1, settings=[f"run_dir={folder}", "rollout.drawing={}"])
    check_job(j)
    for text in (node_script(j), slurm_script(j), ssh_script(j, ["a", "b"]), environment(j)):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    show = node_script(j).replace("torchrun", "printf '%s\\n'").split("agent=$!")[0].replace("$resume &", "").replace('. "$here/environment.sh"', "")
    out = subprocess.run(["bash"], input=show, text=True, capture_output=True, env=os.environ | dict(HEAD="a", BASH_ENV="")).stdout.splitlines()
    assert f"run_dir={folder}" in out and "rollout.drawing={}" in out


@pytest.mark.parametrize("how, start, words", [
    (dict(gpus=8, nodes=4, zero=3), "slurm", "--gpus 8 --nodes 4 --zero 3 --slurm '{at}/my job.sbatch'"), (dict(gpus=8, nodes=2, fsdp=True, hours=2.5), "slurm", "--gpus 8 --nodes 2 --slurm '{at}/my job.sbatch' --hours 2.5 --fsdp"),
    (dict(gpus=4, zero=1, lora=4), "hostfile", "--gpus 4 --nodes 2 --zero 1 --hostfile {at}/hosts"), (dict(gpus=0, processes=2, nodes=2), "torchrun", "--gpus 0 --processes 2 --nodes 2")])
def test_a_launched_run_says_how_it_is_continued(how, start, words, tmp_path):
    "The command that job.json gives is one that the launcher takes, and it asks for the same job."
    from unify_rl.cli import main, parse
    (tmp_path/"hosts").write_text("a\nb\n")
    assert continue_command(tmp_path/"run") is None
    at = {"slurm": dict(slurm=tmp_path/"my job.sbatch"), "hostfile": dict(hostfile=tmp_path/"hosts"), "torchrun": {}}[start]
    assert launch(job(tmp_path, "rollout.prompts=32", **how), say=lambda s: None, **at) == 0
    noted = json.loads((tmp_path/"run"/"launch"/"job.json").read_text())
    assert noted["start"] == start and continue_command(tmp_path/"run") == f"unify_rl launch grpo {words.format(at=tmp_path)} --resume run_dir={tmp_path}/run"
    args = parse(shlex.split(continue_command(tmp_path/"run"))[1:])
    assert all(getattr(args, k) == noted[k] for k in ("recipe", "gpus", "processes", "nodes", "zero", "fsdp", "hours", "slurm", "hostfile")) and args.resume
    (tmp_path/"run"/"launch"/"job.json").write_text("{")
    assert continue_command(tmp_path/"run") is None


def executable(path, text):
    path.write_text(text); path.chmod(path.stat().st_mode | stat.S_IXUSR)


RANK = """import signal, sys, time, pathlib
here = pathlib.Path({here!r})
def stop(*_): time.sleep(0.3); (here/"rank").write_text("saved"); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(here/"up").touch()
time.sleep(20)
"""
AGENT = """#!{python}
import pathlib, signal, subprocess, sys
here = pathlib.Path({here!r})
signal.signal(signal.SIGTERM, lambda *_: (here/"agent").write_text("signalled"))
(here/"words").write_text(" ".join(sys.argv[1:]))
sys.exit(subprocess.Popen([sys.executable, str(here/"rank.py")]).wait() or {code})
"""

def a_node(tmp_path, code=0, **kwargs):
    "A job's files with a torchrun that only starts one process."
    j = job(tmp_path, **kwargs)
    check_job(j)
    for path, text in launch_files(j).items():
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text)
    (tmp_path/"bin").mkdir()
    (tmp_path/"rank.py").write_text(RANK.format(here=str(tmp_path)))
    executable(tmp_path/"bin"/"torchrun", AGENT.format(python=sys.executable, here=str(tmp_path), code=code))
    return j, os.environ | dict(PATH=f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}", HEAD="node1")


def until(path, seconds=15):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


@pytest.mark.skipif(not any((Path(d)/"pgrep").exists() for d in os.environ["PATH"].split(os.pathsep)), reason="no pgrep here")
@pytest.mark.parametrize("code", [0, 3])
def test_a_wish_to_stop_reaches_the_ranks_and_not_torchrun(code, tmp_path):
    _, env = a_node(tmp_path, code, gpus=4, nodes=2)
    node = subprocess.Popen(["bash", str(tmp_path/"run"/"launch"/"node.sh")], env=env, stdout=subprocess.PIPE, text=True)
    until(tmp_path/"up")
    node.send_signal(signal.SIGTERM)
    assert node.wait(15) == code and "stopping after this step" in node.stdout.read()
    assert (tmp_path/"rank").read_text() == "saved" and not (tmp_path/"agent").exists() and not list((tmp_path/"run"/"launch").glob("pid.*"))
    words = (tmp_path/"words").read_text()
    assert words.startswith("--nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint node1:29500") and "--resume" not in words


@pytest.mark.skipif(not any((Path(d)/"pgrep").exists() for d in os.environ["PATH"].split(os.pathsep)), reason="no pgrep here")
def test_a_slurm_job_goes_back_into_the_queue_and_continues(tmp_path):
    j, env = a_node(tmp_path, gpus=4, nodes=2)
    executable(tmp_path/"bin"/"scontrol", f"#!/bin/bash\nif [ $1 = show ]; then printf 'node7\\nnode8\\n'; else echo \"$@\" >> {tmp_path}/scontrol; fi\n")
    executable(tmp_path/"bin"/"srun", '#!/bin/bash\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    (tmp_path/"job.sbatch").write_text(slurm_script(j))
    def start():
        for name in ("up", "rank"): (tmp_path/name).unlink(missing_ok=True)
        env.pop("HEAD", None)
        p = subprocess.Popen(["bash", str(tmp_path/"job.sbatch")], env=env | dict(SLURM_JOB_ID="42", SLURM_JOB_NODELIST="node[7-8]", VENV=""), stdout=subprocess.PIPE, text=True)
        until(tmp_path/"up")
        return p
    batch = start()
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(15) == 0 and (tmp_path/"rank").read_text() == "saved"
    assert (tmp_path/"scontrol").read_text() == "requeue 42\n" and "--rdzv_endpoint node7:20042 --rdzv_id 42.0" in (tmp_path/"words").read_text()
    (tmp_path/"run"/"config.yaml").touch()                                  # as a run leaves it
    batch = start()
    (tmp_path/"run"/"summary.json").touch()                                 # done in the time that was left
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(15) == 0 and (tmp_path/"words").read_text().endswith("--resume") and (tmp_path/"scontrol").read_text() == "requeue 42\n"


def metrics(folder): return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in (folder/"metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_one_process_started_is_one_process(tmp_path, monkeypatch):
    "The launcher's run, the command's and a notebook's have the same numbers; a stopped one saves, says so, and continues."
    import nbformat
    from nbclient import NotebookClient
    from unify_rl.cli import main
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(doctor.__file__).parents[1]))
    settings = ["steps=3", "rollout.prompts=4", "rollout.group_size=2", "evaluate.suites=[]"]
    assert launch(job(tmp_path, *settings, gpus=0, processes=1)) == 0
    assert main(["train", "grpo", *settings, f"run_dir={tmp_path}/other", "--quiet"]) == 0
    assert metrics(tmp_path/"run") == metrics(tmp_path/"other")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"from unify_rl.run import train\ntrain('grpo', overrides={[*settings, f'run_dir={tmp_path}/cell']!r})")])
    NotebookClient(nb, timeout=600, kernel_name="python3").execute()
    assert "3 steps in" in json.dumps(nb.cells[0].outputs) and metrics(tmp_path/"cell") == metrics(tmp_path/"run")
    long = ["steps=2000", *settings[1:], f"run_dir={tmp_path}/long"]
    code = f"import sys; from unify_rl.train.launch import Job, launch; sys.exit(launch(Job('grpo', 'tiny-janus', gpus=0, processes=1, settings={long!r})))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    until(tmp_path/"long"/"metrics.jsonl", 300)
    while not (tmp_path/"long"/"metrics.jsonl").read_text(): time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(300) == 130 and list((tmp_path/"long"/"checkpoints").iterdir())


# -- the doctor ------------------------------------------------------------------------------------------------------------

def named(findings, name): return next(f for f in findings if f.name == name)


def test_versions_against_what_is_required():
    has = {"torch": "2.1.0", "rich": "13.7", "numpy": "2.0.0rc1"}
    def version_of(name):
        if name in has: return has[name]
        raise importlib.metadata.PackageNotFoundError(name)
    found = doctor.check_versions(["torch>=2.6", "rich>=13", "numpy>=1.26", "gone>=1", "pytest; extra == 'dev'", "other; sys_platform == 'nowhere'"], version_of)
    assert {f.name: f.state for f in found[1:]} == {"torch": "missing", "rich": "ok", "numpy": "ok", "gone": "missing"}
    assert named(found, "torch").cure == "pip install 'torch>=2.6'" and "2.1.0, torch>=2.6 is needed" in named(found, "torch").found
    assert doctor.sick(found) and doctor._python("2.7.1").state == "missing" and doctor._python().state == "ok"
    assert not doctor.sick(doctor.check_versions([], version_of))
    installed = doctor.check_versions()
    assert {"torch", "transformers", "accelerate"} <= {f.name for f in installed}


def test_the_room_for_a_run(tmp_path, monkeypatch):
    assert doctor.check_room(tmp_path/"a"/"b")[0].state in ("ok", "warning") and not (tmp_path/"a").exists()
    (tmp_path/"file").touch()
    bad, = doctor.check_room(tmp_path/"file"/"run")
    assert bad.state == "missing" and "is a file" in bad.found
    def refuse(dir): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    bad, = doctor.check_room(tmp_path)
    assert bad.state == "missing" and "Permission denied" in bad.found and "run_dir=" in bad.cure
    monkeypatch.undo()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda at: type("U", (), dict(free=2**20))())
    assert doctor.check_room(tmp_path)[0].state == "warning"


def test_devices_and_compilers(monkeypatch):
    gpu = type("P", (), dict(name="H200", total_memory=140 * 2**30, major=9, minor=0))()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    assert named(doctor.check_devices(), "GPU 1").found == "H200, 140.0 GiB, compute capability 9.0"
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert named(doctor.check_talk(), "NCCL").state == "warning"
    found = doctor.check_compilers(lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert named(found, "gcc").state == "ok" and "CUDA toolkit" in named(found, "nvcc").cure and not doctor.sick(found)


def test_weights_in_a_cache(tmp_path):
    "Nothing, a download that was cut short, and a whole one."
    name = "somebody/model"
    gone = doctor.check_model("the policy", name, cached=lambda repo: None)
    assert gone.state == "missing" and gone.cure == f"hf download {name}" and doctor.sick([gone])
    assert not doctor.sick([doctor.check_model("rewards", name, False, lambda repo: None)])
    (tmp_path/"config.json").write_text("{}")
    (tmp_path/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map=dict(a="one.safetensors", b="two.safetensors"))))
    (tmp_path/"one.safetensors").touch()
    cut = doctor.check_model("the policy", name, cached=lambda repo: tmp_path)
    assert cut.state == "missing" and "two.safetensors is missing" in cut.found
    (tmp_path/"two.safetensors").touch()
    assert doctor.check_model("the policy", name, cached=lambda repo: tmp_path).state == "ok"
    (tmp_path/"config.json").write_text('{"model_type": "bagel"}')
    assert "llm_config.json is missing" in doctor.check_model("the policy", str(tmp_path)).found
    assert doctor.check_model("the policy", "tiny-bagel").state == "ok" and doctor.check_model("rewards", "ViT-B-32").state == "warning"


def test_an_empty_cache(tmp_path, monkeypatch):
    "The real client, offline, on an empty folder."
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, "HF_HUB_CACHE", str(tmp_path))
    assert doctor.cached_folder("somebody/model") is None
    f = doctor.check_file("reward hps", "somebody/model", "x.pt")
    assert f.state == "missing" and f.cure == "hf download somebody/model x.pt"


def test_a_recipe_and_what_it_needs(tmp_path):
    none = lambda repo: None
    mine = [f"run_dir={tmp_path}/run"]
    fine = doctor.examine("grpo", "tiny-janus", overrides=mine, cached=none)
    assert not [f for f in fine if f.state == "missing" and f.group in ("weights", "data", "disk")]
    far = doctor.examine("lvrpo", "ByteDance-Seed/BAGEL-7B-MoT", overrides=mine, cached=none)
    assert doctor.sick(far)
    todo = doctor.cures(far)
    for name in ("ByteDance-Seed/BAGEL-7B-MoT", "timm/ViT-SO400M-16-SigLIP2-384", "Qwen/Qwen2.5-VL-3B-Instruct"): assert f"hf download {name}" in todo
    pairs = doctor.examine("pairuni", "tiny-janus", overrides=[*mine, "data.path=nowhere", "log.trackers=[wandb]"], cached=none)
    assert named(pairs, "pairs").state == "missing" and named(pairs, "pairs").cure == "unify_rl pairs build"
    assert named(pairs, "wandb").cure in ("", "pip install wandb")
    two = doctor.examine("corl", "tiny-janus", overrides=mine, cached=none)
    assert [f for f in two if f.group == "weights"] and len(two) == len(set(two))
    with pytest.raises(UserError, match="Did you mean 'grpo'"): doctor.examine("gropo")
    everything = doctor.examine(cached=none)
    assert {f.name for f in everything} >= set(full_size()) and not doctor.sick(f for f in everything if f.group == "weights")
    assert doctor.sick(f for f in doctor.examine(policy="deepseek-community/Janus-Pro-7B", cached=none) if f.group == "weights")
    record = json.loads(json.dumps(doctor.doctor_record(far)))
    assert record["healthy"] is False and doctor.doctor_table(far).row_count > 20
    assert doctor.cures([]) == "nothing is missing"


def test_rewards_with_weights_of_their_own(tmp_path, monkeypatch):
    cfg = config("tiny-janus", "rewards=[{name: hps, settings: {version: v2.1}}, {name: cycle, settings: {perceptual: lpips-vgg, text_cycle: java-spice}}]")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, "HF_HUB_CACHE", str(tmp_path))
    found = doctor.check_rewards(cfg, cached=lambda repo: None)
    assert named(found, "xswu/HPSv2: HPS_v2.1_compressed.pt").cure == "hf download xswu/HPSv2 HPS_v2.1_compressed.pt"
    assert "vgg16-397923af.pth" in named(found, "lpips-vgg").cure and named(found, "java").state == "missing"
    (tmp_path/"checkpoints").mkdir(); (tmp_path/"checkpoints"/"vgg16-397923af.pth").touch()
    assert named(doctor.check_rewards(cfg, cached=lambda repo: None), "lpips-vgg").state == "ok"
