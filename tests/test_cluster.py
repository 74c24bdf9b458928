"Will it fit, what is missing, and how it is started: the planner against tensors that live, the doctor in made-up machines, the launcher's scripts run by a shell."
import importlib.metadata
import io
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
from rich.console import Console

from unify_rl import doctor
from unify_rl.cli import main, parse
from unify_rl.core import Prompt, UserError, generator_for
from unify_rl.mechanisms.tokens import _Decoder, encode_prefix
from unify_rl.policies.load import load_policy
from unify_rl.rewards import preference
from unify_rl.rewards.verifiable import build_rewards, per_sample
from unify_rl.run import Screen, _prepare
from unify_rl.train import plan as planner
from unify_rl.train.config import apply_overrides, load_config, to_yaml
from unify_rl.train.launch import (ATTACHED, Job, check_job, continue_command, environment, launch, launch_files, node_commands, node_script, read_hosts, remarks, slurm_script, ssh_script,
                                   summary, train_words)
from unify_rl.train.plan import (HOLLOW, Host, Layout, Live, advise, count, full_size, imagined, parse_gpus, plan, plan_record, plan_recipe, plan_table, ready, rehearse, reward_models,
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
    assert [(m.reward, m.model, m.device) for m in reward_models(cfg)] == [("semantic", "timm/ViT-SO400M-16-SigLIP2-384", "cuda"), ("knowledge", "Qwen/Qwen2.5-VL-3B-Instruct", "cuda")]
    gpu, host, unknown = planner.reward_bytes(cfg)
    assert gpu == 4 * 1.136e9 + 2 * 3.755e9 and host == 0 and not unknown                              # SigLIP 2 in fp32; Qwen as published, in bf16
    moved = apply_overrides(cfg, ["rewards.knowledge.settings={model: somebody/else, device: cuda}", "rewards.semantic.settings.device=cpu"])
    gpu, host, unknown = planner.reward_bytes(moved)
    assert gpu == 0 and host > 4e9 and unknown == ["somebody/else"]
    far = apply_overrides(cfg, ["rewards.knowledge.settings.url=http://judge:8000"])
    assert [m.reward for m in reward_models(far)] == ["semantic"]                                      # a server has its model elsewhere
    note, = planner._on_the_cpu(moved)
    assert "rewards.semantic.settings.device=cuda" in note and "serve-rewards" in note and not planner._on_the_cpu(cfg) and not planner._on_the_cpu(load_config("lvrpo", "tiny-bagel"))


def test_a_reward_model_on_cuda_is_on_this_process_gpu(monkeypatch):
    with pytest.raises(UserError, match="rewards.hps.settings.device=cpu"): build_rewards([dict(name="hps", settings=dict(device="cuda"))])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    asked = []
    monkeypatch.setattr(preference, "clip_judge", lambda model, pretrained, device, said=None: asked.append(device) or (lambda *a: None))
    for rank in (None, "3", "6"):                                                                      # 6: a launcher that shows each process other GPUs
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
        for device in ("cuda", "cuda:1", "cpu"): build_rewards([dict(name="hps", settings=dict(device=device))])
    assert asked == ["cuda:0", "cuda:1", "cpu", "cuda:3", "cuda:1", "cpu", "cuda:2", "cuda:1", "cpu"]


# -- what the host holds, and recipes of several stages --------------------------------------------------------------------

def test_the_host_is_planned():
    "Each process loads the policy and its reference; the first puts parameters and moments together to save; offloading stays."
    cfg = config("tiny-janus", "objective.beta=0.01")
    for lay in (Layout(1), Layout(4, 3), Layout(4, fsdp=True)):
        p = plan(cfg, 2**30, lay, 12)
        assert p.host == Host(4 * (p.counted.params + p.counted.trained), 0, 12 * p.counted.trained)
    lean = plan(apply_overrides(cfg, ["model.lora_rank=4"]), 2**30, Layout(1), 12)
    assert lean.host == Host(4 * lean.counted.params, 0, 4 * lean.counted.params)                      # no reference; the whole policy is written at the end
    policy = load_policy("tiny-janus"); policy.train_only(list(policy.trains)); policy.keep_reference()
    own = {id(w): nbytes([w]) for half in (policy, policy._reference) for w in half.parameters()}
    assert sum(own.values()) == plan(cfg, 2**30, Layout(1), 12).host.start
    off = plan(apply_overrides(cfg, ["engine.zero=1", "engine.offload=optimizer"]), 2**30, Layout(4, 1, "optimizer"), 12)
    assert off.host.stay == pytest.approx(12 * off.counted.trained / 4, rel=1e-5)
    big = planner.replace(off, host=Host(2**33, 2**32, 2**34))
    assert planner.host_lines(off) == [] and planner.host_lines(big) == [
        "host memory: 8.0 GiB for each process, 32.0 for 4 on one machine, while it loads (weights and reference in fp32, before they go to the GPU)",
        "host memory: 4.0 GiB for each process all the time (reward models on the CPU, and what is offloaded)",
        "host memory: 16.0 GiB more in the first process while it saves (parameters and moments in fp32)"]
    assert plan_record(big)["host"] == dict(start=2**33, stay=2**32, save=2**34)


def test_full_size_janus_is_trained_in_bf16_by_every_stage():
    for name in ("deepseek-community/Janus-Pro-1B", "deepseek-community/Janus-Pro-7B"):
        corl = load_config("corl", name)
        for _, c in planner.trained(corl):
            m = c.model
            assert (m.precision, m.checkpoint_activations, m.logp_chunk, c.rollout.cfg, c.rollout.max_text) == ("bf16", True, 1024, 5.0, 512), c.recipe
        assert corl.evaluate.cfg == 5.0
    for _, c in planner.trained(load_config("corl", "tiny-janus")): assert (c.model.precision, c.model.checkpoint_activations, c.rollout.cfg, c.optimizer.lr) == ("fp32", False, 1.0, 3e-4)


STAGES = ["stages.unified.settings=[rollout.prompts=4, rollout.group_size=2]", "stages.refined.settings=[task=both, rollout.prompts=4, rollout.group_size=2]"]

def test_stages_are_planned_each(tmp_path, capsys):
    file = tmp_path/"plan.json"
    assert main(["plan", "corl", "--gpus", "2x1GB", "--json", str(file), *STAGES]) == 0
    said, record = capsys.readouterr().out, json.loads(file.read_text())
    assert said.count("yes, it fits") == 2 and "stage unified" in said and "corl-refined on" in said and said.rstrip().endswith("all stages of corl fit")
    assert record["fits"] and record["changes"] == [] and list(record["stages"]) == ["unified", "refined"] and record["stages"]["refined"]["asked"]["fits"]
    assert list(plan_recipe("corl-separate", "tiny-janus", "1x1GB").asked) == ["pictures", "answers"]         # a merge trains nothing
    alone = plan_recipe("corl-refined", "tiny-janus", "2x1GB", overrides=["task=both", "rollout.prompts=4", "rollout.group_size=2"]).asked[""]
    assert alone.peak == record["stages"]["refined"]["asked"]["peak"]


@pytest.mark.parametrize("words", slow_but(["corl", *STAGES], [(["grpo", "rollout.prompts=4", "rollout.group_size=4"],), (["corl", *STAGES, "stages.refined.settings=[task=both, rollout.prompts=8, rollout.group_size=4]"],)]))
@pytest.mark.parametrize("share", [0.95, pytest.param(0.6, marks=pytest.mark.slow), pytest.param(0.4, marks=pytest.mark.slow)])
def test_what_is_printed_can_be_typed(words, share, capsys):
    "The changes that are said to help are words of the command line, with which it says yes."
    command = lambda memory, *more: ["plan", words[0], "--gpus", f"2x{memory / 2**30:.6f}GB", *words[1:], *more]
    peaks = [p.peak for p in plan_recipe(words[0], "tiny-janus", "2x8GB", overrides=words[1:]).asked.values()]
    memory = share * max(peaks) / planner.USABLE
    assert main(command(memory)) == 1
    said = capsys.readouterr().out
    found = re.findall("fits? with (.*?)(?:: [0-9.]+ of .*)?$", said, re.M)
    assert found, said
    assert main(command(memory, *shlex.split(found[-1]))) == 0, found[-1]
    assert "yes, it fits" in capsys.readouterr().out


def test_settings_of_a_staged_recipe_belong_to_its_stages(capsys):
    assert main(["plan", "corl", "model.lora_rank=16"]) == 2
    assert "corl consists of stages and has no model.lora_rank of its own; set it for a stage: 'stages.unified.settings=[\"model.lora_rank=16\"]'" in capsys.readouterr().err
    answer = plan_recipe("corl", "tiny-janus", lora=16, overrides=["stages.unified.settings=[rollout.prompts=8]", "stages.refined.settings=[task=both, rollout.prompts=8]"])
    assert [p.counted.trained < p.counted.params / 4 for p in answer.asked.values()] == [True, True]


def test_manuals_name_what_there_is(capsys):
    "The published models are those whose sizes are known; every example is a command line that can be read."
    for verb in ("plan", "doctor"):
        with pytest.raises(SystemExit): main([verb, "--help"])
        said = capsys.readouterr().out
        assert "full_size.yaml" not in said and "examples" in said and "Exit status" in said
        examples = [line.split("   ")[0].split(" | ")[0] for line in said.partition("examples\n")[2].splitlines()]
        assert len(examples) >= 4
        for line in examples:
            words = shlex.split(line)
            assert words[:2] == ["unify_rl", verb]
            args = parse(words[1:])
            if args.recipe: planner.trained(load_config(args.recipe, args.policy, overrides=[*([f"engine.zero={args.zero}"] if verb == "plan" else []), *args.settings]))
        if verb == "plan": assert set(re.findall(r"[\w-]+/[\w.-]+", said.partition("policies\n")[2].partition(":")[0])) == set(full_size())


@pytest.mark.slow
def test_a_rehearsal_keeps_torch_s_remarks_to_itself():
    done = subprocess.run([sys.executable, "-m", "unify_rl", "plan", "lvrpo", "--policy", "tiny-bagel", "--gpus", "1x8GB", "rollout.prompts=4", "rollout.group_size=2", "model.precision=bf16",
                           "model.checkpoint_activations=true"], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(HERE.parent)})
    assert done.returncode == 0 and "arning" not in done.stderr, done.stderr


@pytest.mark.parametrize("kwargs, message", [
    (dict(recipe="lvrpro"), "unknown recipe 'lvrpro'. Did you mean 'lvrpo'"), (dict(policy="tiny-jan"), "Did you mean 'tiny-janus'"), (dict(policy="some/other"), "hf download some/other"),
    (dict(gpus="8 big ones"), "such as 8x80GB"), (dict(gpus="0x80GB"), "such as 8x80GB"), (dict(zero=4), "--zero is 4"), (dict(offload="optimizer"), "give --zero 1, 2 or 3"),
    (dict(offload="params", zero=2), "ZeRO-3 only"), (dict(offload="disk", zero=2), "Known: none, optimizer, params"), (dict(words=0), "--words is 0"), (dict(fsdp=True, zero=3), "leave out --zero 3"), (dict(fsdp=True, offload="params"), "leave out --offload params"),
    (dict(gpus="3x80GB"), "must be a multiple of 3; the nearest is rollout.prompts=24"), (dict(overrides=["rollout.promts=8"]), "rollout.promts: unknown key"), (dict(recipe="corl", overrides=["steps=9"]), "set it for a stage")])
def test_bad_plans(kwargs, message):
    with pytest.raises(UserError, match=re.escape(message)): plan_recipe(**(dict(recipe="grpo", policy="tiny-janus", overrides=["rollout.prompts=25"] if "3x" in kwargs.get("gpus", "") else []) | kwargs))


def test_gpus_are_read():
    assert parse_gpus("8x80GB") == (8, 80 * 2**30) and parse_gpus("1x141GB") == (1, 141 * 2**30) and parse_gpus("24gb") == (1, 24 * 2**30)


@pytest.mark.slow
@pytest.mark.parametrize("recipe, policy", [("lvrpo", "ByteDance-Seed/BAGEL-7B-MoT"), ("corl", "deepseek-community/Janus-Pro-1B"), ("pairuni", "deepseek-community/Janus-Pro-1B"),
                                            ("pairuni", "deepseek-community/Janus-Pro-7B")])
@pytest.mark.parametrize("gpus", ["8x80GB", "1x141GB"])
def test_the_full_scale_recipes_have_an_answer(recipe, policy, gpus):
    answer = plan_recipe(recipe, policy, gpus)
    assert answer.fits or answer.better and all(p.fits for p in answer.better.values())


# -- the launcher ----------------------------------------------------------------------------------------------------------

def job(tmp_path, *settings, **kwargs):
    recipe, policy = kwargs.pop("recipe", "grpo"), kwargs.pop("policy", "tiny-janus")
    return Job(recipe, policy, settings=[f"run_dir={tmp_path}/run", *settings], **kwargs)


def dry(tmp_path, the_job, **kwargs):
    "What a dry run says, with this machine's paths taken out."
    said = []
    assert launch(the_job, dry_run=True, say=said.append, **kwargs) == 0
    assert not (tmp_path/"run").exists()
    text = "\n".join(said).replace(f"VENV={shlex.quote(sys.prefix)}", "VENV=''").replace(str(tmp_path), "/scratch").replace(os.getcwd(), "/home/me")
    return re.sub(r'"(environment|script)": "\w+"', r'"\1": "..."', text)


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
    (dict(grace=60), [], "--grace is 60; it must be from 120"),
    (dict(gpus=1), ["rollout.prompts=x"], "rollout.prompts: expected a whole number"), (dict(gpus=1), ["engine.zero=2"], "give --zero instead"),
    (dict(gpus=1), ["engine.fsdp=true"], "give --fsdp instead"), (dict(gpus=2, zero=3, fsdp=True), [], "--fsdp and --zero 3: give one of the two"), (dict(gpus=2, fsdp=True), ["model.precision=fp16"], "fp32 or bf16"),
    (dict(recipe="pairuni", gpus=8), ["data.path=nowhere", "rollout.prompts=16"], "nowhere"), (dict(resume=True), [], "--resume: there is no run"), (dict(gpus=1, config_file="no.yaml"), [], "no.yaml")])
def test_bad_jobs(kwargs, settings, message, tmp_path):
    with pytest.raises(UserError) as e: check_job(job(tmp_path, *settings, **kwargs))
    assert message in str(e.value)


def test_pairs_are_divided_whole(tmp_path):
    with pytest.raises(UserError, match="must be a multiple of 16; the nearest is rollout.prompts=32"): check_job(job(tmp_path, "rollout.prompts=24", recipe="pairuni", gpus=8), strict=False)


def test_uneven_prompts_are_a_waste_and_no_mistake(tmp_path):
    "The trainer deals them out as they come; only a note says so, and what it says to type makes it go away."
    note, = check_job(job(tmp_path, "rollout.prompts=3", gpus=0, processes=2))
    assert note == "grpo: with 3 prompts a step some of 2 processes have 1 and wait for those with more; to use all: rollout.prompts=4"
    note, = check_job(job(tmp_path, "rollout.prompts=20", gpus=8, nodes=4))
    assert "with 20 prompts a step 12 of 32 processes only keep the others company" in note and check_job(job(tmp_path, note.rpartition(" ")[2], gpus=8, nodes=4)) == []


@pytest.mark.slow
def test_more_processes_than_prompts_train_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(doctor.__file__).parents[1]))
    for name, n in (("one", 1), ("two", 2)):
        assert launch(job(tmp_path, "rollout.prompts=1", "rollout.group_size=4", "rollout.max_text=8", "steps=2", "evaluate.suites=[]", f"run_dir={tmp_path}/{name}", gpus=0, processes=n)) == 0
    for a, b in zip(metrics(tmp_path/"one"), metrics(tmp_path/"two"), strict=True):
        assert all(b[k] == (v if v is None or isinstance(v, (str, list)) else pytest.approx(v, rel=2e-5, abs=2e-5)) for k, v in a.items())


def typed(text): return shlex.split(text)[0]                # as a shell gives it


@pytest.mark.parametrize("recipe, policy, asked", [("lvrpo", "ByteDance-Seed/BAGEL-7B-MoT", None), ("corl", "deepseek-community/Janus-Pro-1B", None),
    ("pairuni", "deepseek-community/Janus-Pro-1B", "rollout.prompts=64"), ("pairuni", "deepseek-community/Janus-Pro-7B", "rollout.prompts=64")])
def test_full_scale_recipes_start_on_32_gpus(recipe, policy, asked, tmp_path, capsys):
    "As they are, or with exactly what the message says."
    from unify_rl.cli import main
    words = ["launch", recipe, "--policy", policy, "--gpus", "8", "--nodes", "4", "--torchrun", "--dry-run", f"run_dir={tmp_path}/run"]
    assert main(words) == (2 if asked else 0)
    said = capsys.readouterr()
    if asked: assert asked == said.err.split()[-1] and main([*words, asked]) == 0
    if recipe == "corl":                                    # its stages have settings of their own, and keep them
        better = [typed(n.partition("to use all: ")[2]) for n in said.out.splitlines() if n.startswith("note: stage")]
        assert better == ['stages.unified.settings=["rollout.prompts=32"]', 'stages.refined.settings=["task=both", "rollout.prompts=32"]']
        assert main([*words, *better]) == 0 and "note: stage" not in (again := capsys.readouterr().out) and "a step of stage refined: 32 prompts (1 a process)" in again


def test_a_setting_of_training_is_of_the_stages(tmp_path):
    with pytest.raises(UserError, match="corl consists of stages and has no rollout.prompts of its own") as e: check_job(job(tmp_path, "rollout.prompts=32", recipe="corl", gpus=8))
    better = [typed(t) for t in str(e.value).partition("for a stage: ")[2].split(", or ")]
    j = job(tmp_path, *better, recipe="corl", gpus=8)
    assert check_job(j) == [] and j.cfg.stages[1].settings == ["task=both", "rollout.prompts=32"]


def staged(tmp_path, monkeypatch, *stages):
    "A recipe of such stages."
    (tmp_path/"mine.yaml").write_text(json.dumps(dict(stages=list(stages))))
    return dict(recipe="corl", config_file=str(tmp_path/"mine.yaml"))


def test_pairs_of_a_stage_are_divided_as_the_message_says(tmp_path, monkeypatch):
    recipe = staged(tmp_path, monkeypatch, dict(name="only", recipe="pairuni", settings=["rollout.prompts=24", "rewards=[{name: accuracy}, {name: strict}]"]))
    with pytest.raises(UserError, match=r"stage only \(pairuni\): rollout.prompts is 24") as e: check_job(job(tmp_path, gpus=8, **recipe), strict=False)
    better = typed(str(e.value).rpartition(", as ")[2])
    assert "rewards=[{name: accuracy}, {name: strict}]" in better
    assert [n for n in check_job(job(tmp_path, better, gpus=8, **recipe), strict=False) if "prompts" in n] == []


def test_lora_reaches_every_stage(tmp_path):
    "As settings that the trainer takes; and once more when the run is continued."
    from unify_rl.run import resumed_config, stage_configs
    j = job(tmp_path, "evaluate.suites=[]", recipe="corl", gpus=0, processes=2, lora=4)
    assert check_job(j) == [] and "LoRA of rank 4" in summary(j)
    cfg = load_config("corl", "tiny-janus", overrides=train_words(j)[4:])
    assert [c.model.lora_rank for _, c in stage_configs(cfg)] == [4, 4] and stage_configs(cfg)[1][1].task == "both"
    j.folder.mkdir(); (j.folder/"config.yaml").write_text(to_yaml(cfg))
    again = job(tmp_path, recipe="corl", gpus=0, processes=2, lora=4, resume=True)
    assert check_job(again) == [] and again.cfg == resumed_config("corl", "tiny-janus", None, again.overrides)


@pytest.mark.parametrize("how, message", [(dict(zero=3), "looks through the policy's own eyes .tim."), (dict(fsdp=True), "use --zero 2"), (dict(zero=2), None)])
def test_what_the_trainer_refuses_is_refused_before_the_queue(how, message, tmp_path, monkeypatch):
    try: assert check_job(job(tmp_path, recipe="corl", gpus=4, **how)) == [] and message is None
    except UserError as e: assert message and re.search(message, str(e))
    served = job(tmp_path, "rewards=[{name: tim, settings: {url: http://here}}, {name: format}]", gpus=4, **how)
    assert check_job(served) == []                          # elsewhere it looks through nothing of ours


def test_a_policy_that_zero_3_cannot_gather(tmp_path, monkeypatch):
    from unify_rl.policies.janus import JanusPolicy
    monkeypatch.setattr(JanusPolicy, "takes_weights", True)
    with pytest.raises(UserError, match="tiny-janus uses weights outside of their modules.*use --zero 2 or --fsdp"): check_job(job(tmp_path, gpus=2, zero=3))
    assert check_job(job(tmp_path, gpus=2, zero=2)) == check_job(job(tmp_path, gpus=2, fsdp=True)) == []


def test_a_reward_that_learns_wants_one_process(tmp_path):
    with pytest.raises(UserError, match="reward 'semantic' learns"): check_job(job(tmp_path, "rewards.semantic.settings.learn=1e-4", recipe="lvrpo", gpus=4))
    assert check_job(job(tmp_path, "rewards.semantic.settings.learn=1e-4", recipe="lvrpo", gpus=1)) == []


def test_the_names_of_rewards_that_look_through_the_policy():
    "All rewards, made: the launcher's list is complete."
    from unify_rl.rewards.verifiable import MODULES, REWARDS, Eyes, make_reward
    assert {n for n in (*REWARDS, *MODULES) if make_reward(n, {}, Eyes()).attach} == set(ATTACHED)


def test_a_resumed_job_is_the_run_it_continues(tmp_path):
    "What is said and checked is the run's configuration, not the recipe's."
    saved = load_config("grpo", overrides=["rollout.prompts=6", "rollout.group_size=2", "model.precision=bf16", f"run_dir={tmp_path}/run"])
    (tmp_path/"run").mkdir(); (tmp_path/"run"/"config.yaml").write_text(to_yaml(saved))
    j = job(tmp_path, gpus=2, zero=1, resume=True, policy=None)
    assert check_job(j) == [] and "a step: 6 prompts (3 a process) x 2 outputs" in summary(j) and j.cfg.model.precision == "bf16" and j.cfg.engine.zero == 1
    from unify_rl.cli import main
    assert main(["launch", "grpo", "--gpus", "2", "--resume", "--dry-run", f"run_dir={tmp_path}/run", "rollout.prompts=8"]) == 2           # the trainer would refuse it, in the queue
    assert main(["launch", "grpo", "--gpus", "2", "--resume", "--dry-run", f"run_dir={tmp_path}/run", "steps=300"]) == 0


def test_deepspeed_files_are_those_of_the_nodes(tmp_path, monkeypatch):
    "Made on a machine without GPUs for one with: as the engine makes them there, for each stage."
    from unify_rl.train.engine import deepspeed_config
    told = lambda zero: lambda cfg: deepspeed_config(zero, cfg.model.precision, cfg.optimizer.grad_norm, cfg.engine.offload)
    settings = ["engine.offload=optimizer", "stages.unified.settings=[model.precision=bf16, optimizer.grad_norm=0.5]"]
    j = job(tmp_path, *settings, recipe="corl", gpus=4, zero=2)
    check_job(j)
    found = {p.name: json.loads(t) for p, t in launch_files(j, deepspeed_config=told(2)).items() if p.name.startswith("deepspeed")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert found == {"deepspeed-unified.json": deepspeed_config(2, "bf16", 0.5, "optimizer"), "deepspeed-refined.json": deepspeed_config(2, offload="optimizer")}
    cpu = job(tmp_path, gpus=0, processes=2, zero=2)
    check_job(cpu)
    files = {p.name: t for p, t in launch_files(cpu, deepspeed_config=told(2)).items()}
    assert json.loads(files["deepspeed.json"])["zero_optimization"]["overlap_comm"] is False and "editing it changes nothing" in files["README.md"] and "scancel" not in files["README.md"]
    assert any("editing it changes nothing" in n for n in remarks(cpu, {tmp_path/n: t for n, t in files.items()}, None))


def test_every_stage_has_its_fsdp_file(tmp_path):
    j = job(tmp_path, "stages=[{name: a, recipe: grpo}, {name: b, recipe: grpo, settings: [model.precision=bf16]}]", recipe="corl", gpus=4, fsdp=True)
    check_job(j)
    found = {p.name: json.loads(t)["mixed_precision"] for p, t in launch_files(j).items() if p.name.startswith("fsdp")}
    assert found == {"fsdp-a.json": {}, "fsdp-b.json": dict(param_dtype="bfloat16", reduce_dtype="float32")}


def test_time_to_save_grows_with_the_policy(tmp_path):
    "Five minutes and 12 bytes a trained number at 0.3 GB/s, in whole minutes; or as asked."
    before = lambda **how: re.search(r"--signal=B:USR1@(\d+) ", (check_job(j := job(tmp_path, **how)), slurm_script(j))[1])[1]
    big = dict(recipe="lvrpo", policy="ByteDance-Seed/BAGEL-7B-MoT", gpus=8, nodes=4)
    assert before(gpus=8) == "360" and before(**big, zero=3) == "900" and before(**big, zero=3, lora=16) == "360" and before(**big, grace=1234) == "1234"
    assert before(gpus=8, policy="some/where") == "300"
    with pytest.raises(UserError, match="--hours 0.1 is 360 s, and 900 s of it are for stopping"): before(**big, hours=0.1)


def test_an_environment_changed_by_hand_is_kept(tmp_path):
    said, own = [], tmp_path/"run"/"launch"/"environment.sh"
    start = lambda **how: launch(job(tmp_path, "rollout.prompts=32", gpus=8, nodes=2, **how), say=said.append)
    assert start() == 0 and start(zero=1) == 0 and not any("changed by hand" in t for t in said)
    text = own.read_text()
    if sys.prefix != sys.base_prefix: assert f"VENV={shlex.quote(sys.prefix)}" in text
    own.write_text(text + "export NCCL_DEBUG=INFO\n")
    (tmp_path/"run"/"config.yaml").write_text(to_yaml(load_config("grpo", overrides=["rollout.prompts=32", f"run_dir={tmp_path}/run"])))
    for _ in range(2):
        said.clear()
        assert start(resume=True) == 0 and any("environment.sh was changed by hand, and is kept" in t for t in said) and own.read_text().endswith("export NCCL_DEBUG=INFO\n")
    own.write_text(text)
    said.clear()
    assert start(resume=True) == 0 and own.read_text() == text and not any("by hand" in t for t in said)


def test_a_slurm_script_changed_by_hand_is_kept_when_the_run_goes_on(tmp_path):
    "And one that is as it was written follows the job."
    said, script = [], tmp_path/"job.sbatch"
    start = lambda **how: launch(job(tmp_path, "rollout.prompts=32", gpus=8, **how), slurm=script, say=said.append)
    assert start(nodes=2) == 0 and start(nodes=4) == 0 and "#SBATCH --nodes=4" in script.read_text()
    script.write_text(script.read_text().replace("##SBATCH --partition=", "#SBATCH --partition=big"))
    with pytest.raises(UserError, match="is there already and says something else"): start(nodes=2)
    (tmp_path/"run"/"config.yaml").write_text(to_yaml(load_config("grpo", overrides=["rollout.prompts=32", f"run_dir={tmp_path}/run"])))
    for _ in range(2): assert start(nodes=4, resume=True) == 0 and "#SBATCH --partition=big" in script.read_text() and any("job.sbatch was changed by hand, and is kept" in t for t in said)


def test_a_reward_servers_token_does_not_travel_by_ssh(tmp_path):
    asked = lambda **more: job(tmp_path, "rewards=[{name: semantic, settings: {url: http://there%s}}, {name: format}]" % more.get("file", ""), gpus=8, nodes=2)
    for j, n in ((asked(), 1), (asked(file=", token_file: /shared/token"), 0)):
        check_job(j)
        assert len([t for t in remarks(j, {}, None) if "rewards.semantic.settings.token_file=FILE" in t]) == n and remarks(j, {}, "job.sbatch") == []


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
    assert sorted(p.name for p in (tmp_path/"run"/"launch").iterdir()) == ["README.md", "environment.sh", "job.json", "node.sh", "rank.py"] and f"sbatch {tmp_path}/job.sbatch" in said[-1]
    command = json.loads((tmp_path/"run"/"launch"/"job.json").read_text())["command"]
    assert command == ["unify_rl", "train", "grpo", "--policy", "tiny-janus", "engine.zero=2", "rollout.prompts=32", f"run_dir={tmp_path}/run"]
    RunLog(tmp_path/"run")
    with pytest.raises(UserError, match="already holds a run"): RunLog(tmp_path/"run")
    assert launch(job(tmp_path, "rollout.prompts=32", gpus=8, nodes=2, zero=2), slurm=tmp_path/"job.sbatch", say=said.append) == 0          # the same again is no conflict


def test_a_resumed_run_may_be_spread_in_another_way(tmp_path):
    "The saved configuration says how it was; the command says how it is now, in full."
    words = lambda **how: [w for w in job(tmp_path, "rollout.prompts=32", gpus=8, **how).overrides if w.startswith("engine")]
    assert words() == ["engine.zero=0"] and words(fsdp=True) == ["engine.zero=0", "engine.fsdp=true"] and words(zero=3, resume=True) == ["engine.zero=3", "engine.fsdp=false"]


NASTY = """it's $HOME `here` "so" 100%"""

def test_nasty_names_stay_words(tmp_path):
    "A folder with spaces and quotes is one word in every script."
    folder = tmp_path/NASTY
    j = Job("grpo", "tiny-janus", gpus=2, nodes=2, zero=1, settings=[f"run_dir={folder}", "rollout.drawing={}"])
    check_job(j)
    for text in (node_script(j), slurm_script(j), ssh_script(j, ["a", "b"]), environment(j), *node_commands(j, ["a", "b"])):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    show = re.search(r"exec torchrun (.*) \) &", node_script(j), re.S)[1].replace("$resume", "").replace('"$here/', '"')
    out = subprocess.run(["bash"], input=f"printf '%s\\n' {show}", text=True, capture_output=True, env=os.environ | dict(HEAD="a", BASH_ENV="")).stdout.splitlines()
    assert f"run_dir={folder}" in out and "rollout.drawing={}" in out
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*?)(?:\s+# .*)?$", slurm_script(j), re.M))
    assert sbatch_value(header["job-name"]) == NASTY and sbatch_value(header["output"]) == f"{folder}/launch/slurm-%j.out".replace("100%", "100%%")


def sbatch_value(text):
    "What Slurm makes of a value in an #SBATCH line: `_get_argument` of its sbatch."
    out, quote, escaped = "", "", False
    for i, c in enumerate(text):
        if escaped: escaped, out = False, out + c
        elif c == "\\": escaped = True
        elif quote and c == quote: quote = ""
        elif quote: out += c
        elif c in "\"'": quote = c
        elif c == "#" or c.isspace(): break
        else: out += c
    assert not quote
    return out


@pytest.mark.parametrize("how, start, words", [
    (dict(gpus=8, nodes=4, zero=3), "slurm", "--gpus 8 --nodes 4 --zero 3 --slurm '{at}/my job.sbatch'"), (dict(gpus=8, nodes=2, fsdp=True, hours=2.5, grace=600), "slurm", "--gpus 8 --nodes 2 --slurm '{at}/my job.sbatch' --hours 2.5 --grace 600 --fsdp"),
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
    assert all(getattr(args, k) == noted[k] for k in ("recipe", "gpus", "processes", "nodes", "zero", "fsdp", "hours", "grace", "slurm", "hostfile")) and args.resume
    (tmp_path/"run"/"config.yaml").write_text(to_yaml(load_config("grpo", overrides=["rollout.prompts=32", *["model.lora_rank=4"] * (how.get("lora", 0) > 0), f"run_dir={tmp_path}/run"])))
    assert main(shlex.split(continue_command(tmp_path/"run"))[1:]) == 0                      # the scripts that are there are no conflict
    again = json.loads((tmp_path/"run"/"launch"/"job.json").read_text())
    assert continue_command(tmp_path/"run") and {k: again[k] for k in ("world", "nodes", "zero", "fsdp", "hosts")} == {k: noted[k] for k in ("world", "nodes", "zero", "fsdp", "hosts")}
    (tmp_path/"run"/"config.yaml").write_text("stages: [{name: first, recipe: grpo}]")
    assert continue_command(tmp_path/"run"/"first") == continue_command(tmp_path/"run") and continue_command(tmp_path/"run"/"other") is None
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

def a_node(tmp_path, code=0, hosts=None, folder=None, **kwargs):
    "A job's files with a torchrun that only starts one process."
    j = job(tmp_path, *([f"run_dir={folder}"] if folder else []), **kwargs)
    check_job(j)
    for path, text in launch_files(j, hosts).items():
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text)
    (tmp_path/"bin").mkdir()
    (tmp_path/"rank.py").write_text(RANK.format(here=str(tmp_path)))
    executable(tmp_path/"bin"/"torchrun", AGENT.format(python=sys.executable, here=str(tmp_path), code=code))
    return j, os.environ | dict(PATH=f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}", HEAD="node1", VENV="")


def until(path, seconds=15):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def signals_as_at_a_terminal():
    "What a script starts in its background ignores SIGINT and SIGQUIT, and so would the scripts here, which are sent some."
    old = {s: signal.signal(s, usual) for s, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)) if signal.getsignal(s) == signal.SIG_IGN}
    yield
    for s, handler in old.items(): signal.signal(s, handler)


pgrep = pytest.mark.skipif(not any((Path(d)/"pgrep").exists() for d in os.environ["PATH"].split(os.pathsep)), reason="no pgrep here")

@pgrep
@pytest.mark.parametrize("code, whom", [(0, "it"), (3, "it"), (0, "all")])
def test_a_wish_to_stop_reaches_the_ranks_and_not_torchrun(code, whom, tmp_path):
    "Once, also if it comes to the whole process group, and again."
    _, env = a_node(tmp_path, code, gpus=4, nodes=2)
    node = subprocess.Popen(["bash", str(tmp_path/"run"/"launch"/"node.sh")], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    until(tmp_path/"up")
    (os.kill if whom == "it" else os.killpg)(node.pid, signal.SIGTERM)
    if whom == "all": time.sleep(0.1); os.killpg(node.pid, signal.SIGUSR1)
    assert node.wait(15) == code and node.stdout.read().count("stopping after this step") == 1
    assert (tmp_path/"rank").read_text() == "saved" and not (tmp_path/"agent").exists() and not list((tmp_path/"run"/"launch").glob("pid.*"))
    words = (tmp_path/"words").read_text()
    assert words.startswith("--nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint node1:29500") and "--resume" not in words


def test_a_wish_to_stop_before_there_are_ranks_ends_torchrun(tmp_path):
    "It waits for the other nodes, which may never come."
    _, env = a_node(tmp_path, gpus=4, nodes=2)
    executable(tmp_path/"bin"/"torchrun", f"#!{sys.executable}\nimport pathlib, time\npathlib.Path({str(tmp_path/'up')!r}).touch()\ntime.sleep(20)\n")
    node = subprocess.Popen(["bash", str(tmp_path/"run"/"launch"/"node.sh")], env=env, stderr=subprocess.DEVNULL)
    until(tmp_path/"up")
    node.send_signal(signal.SIGTERM)
    assert node.wait(15) == 128 + signal.SIGQUIT


COUNTS = """import signal, sys, time, pathlib, os
here, seen = pathlib.Path({here!r}), []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
(here/f"up{{os.environ['RANK']}}").touch()
while not seen: time.sleep(0.05)
time.sleep(1.5)
(here/f"seen{{os.environ['RANK']}}").write_text(str(len(seen)))
"""

@pgrep
def test_the_real_torchrun_lets_the_ranks_end(tmp_path):
    "Everything below node.sh gets the signal, torchrun too: it neither dies nor kills."
    j = job(tmp_path, gpus=0, processes=2)
    check_job(j)
    for path, text in launch_files(j).items():
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(COUNTS.format(here=str(tmp_path)) if path.name == "rank.py" else text)
    bin = Path(sys.executable).parent
    node = subprocess.Popen(["bash", str(tmp_path/"run"/"launch"/"node.sh")], env=os.environ | dict(PATH=f"{bin}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, start_new_session=True)
    for r in "01": until(tmp_path/f"up{r}", 60)
    agent, = subprocess.run(["pgrep", "-P", str(node.pid)], capture_output=True, text=True).stdout.split()
    os.killpg(node.pid, signal.SIGTERM); os.kill(int(agent), signal.SIGTERM)
    assert node.wait(60) == 0 and [(tmp_path/f"seen{r}").read_text() for r in "01"] == ["1", "1"]


SRUN = """#!/bin/bash
# As Slurm's: SIGUSR1 is passed on to the task, and a SIGTERM kills it.
echo "$@" > {here}/srun
while [ "${{1#--}}" != "$1" ]; do shift; done
set -m
"$@" &
task=$!
set +m
trap 'kill -USR1 $task' USR1
trap 'echo "srun: forcing job termination"; kill -KILL -- -$task' TERM
while :; do wait $task; code=$?; kill -0 $task 2>/dev/null || break; done
exit $code
"""
SCONTROL = """#!/bin/bash
case $2 in hostnames) printf 'node7\\nnode8\\n';; job) echo "JobState=$(cat {here}/state)";; *) echo "$@" >> {here}/scontrol;; esac
"""

def a_batch(tmp_path, **kwargs):
    "A Slurm job with stand-ins for Slurm: (job, start it)."
    j, env = a_node(tmp_path, gpus=4, nodes=2, **kwargs)
    executable(tmp_path/"bin"/"scontrol", SCONTROL.format(here=tmp_path))
    executable(tmp_path/"bin"/"srun", SRUN.format(here=tmp_path))
    (tmp_path/"state").write_text("RUNNING")
    (tmp_path/"job.sbatch").write_text(slurm_script(j))
    def start(script=tmp_path/"job.sbatch"):
        for name in ("up", "rank", "scontrol"): (tmp_path/name).unlink(missing_ok=True)
        env.pop("HEAD", None)
        p = subprocess.Popen(["bash", str(script)], env=env | dict(SLURM_JOB_ID="42", SLURM_JOB_NODELIST="node[7-8]", SLURM_CPUS_PER_TASK="6"), stdout=subprocess.PIPE, text=True)
        until(tmp_path/"up")
        return p
    return j, start


@pgrep
@pytest.mark.parametrize("name", ["run", NASTY])
def test_a_slurm_job_goes_back_into_the_queue_and_continues(name, tmp_path):
    j, start = a_batch(tmp_path, folder=tmp_path/name)
    asked = lambda: (tmp_path/"scontrol").read_text() if (tmp_path/"scontrol").exists() else ""
    batch = start()
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(15) == 0 and (tmp_path/"rank").read_text() == "saved"
    assert asked() == "requeue 42\n" and "--rdzv_endpoint node7:20042 --rdzv_id 42.0" in (tmp_path/"words").read_text() and "--cpus-per-task=6" in (tmp_path/"srun").read_text()
    (j.folder/"config.yaml").touch()                                        # as a run leaves it
    batch = start()
    (j.folder/"summary.json").touch()                                       # done in the time that was left
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(15) == 0 and (tmp_path/"words").read_text().endswith("--resume") and asked() == ""


@pgrep
@pytest.mark.parametrize("number, state, returns", [(signal.SIGTERM, "CANCELLED", False), (signal.SIGTERM, "RUNNING", True), (signal.SIGINT, "RUNNING", False)])
def test_a_cancelled_job_does_not_return(number, state, returns, tmp_path):
    "scancel and preemption both send a SIGTERM; either way the ranks may save."
    _, start = a_batch(tmp_path)
    batch = start()
    batch.send_signal(signal.SIGUSR1)                                       # time was nearly up, too
    time.sleep(0.2)
    (tmp_path/"state").write_text(state)
    batch.send_signal(number)
    assert batch.wait(15) == 0 and (tmp_path/"rank").read_text() == "saved" and (tmp_path/"scontrol").exists() is returns


@pgrep
def test_a_job_killed_in_the_middle_of_saving_returns(tmp_path):
    "A minute before the limit the script no longer waits for the checkpoint."
    j, start = a_batch(tmp_path)
    (tmp_path/"rank.py").write_text(RANK.format(here=str(tmp_path)).replace("time.sleep(0.3)", "time.sleep(4)"))
    (tmp_path/"hasty.sbatch").write_text(re.sub(r"sleep \d+ & wait", "sleep 0.5 & wait", slurm_script(j)))
    batch = start(tmp_path/"hasty.sbatch")
    batch.send_signal(signal.SIGUSR1)
    until(tmp_path/"scontrol")
    assert (tmp_path/"scontrol").read_text() == "requeue 42\n" and not (tmp_path/"rank").exists()
    (tmp_path/"state").write_text("COMPLETING")                             # Slurm then ends it, with a SIGTERM first
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(15) == 0 and (tmp_path/"scontrol").read_text() == "requeue 42\n"


SSH = """#!/bin/bash
# Another machine is this one under another name.
while [ "$1" = -o ]; do shift 2; done
mkdir -p {here}/$1
printf '#!/bin/bash\\necho %s\\n' "$1" > {here}/$1/hostname; chmod +x {here}/$1/hostname
echo "$2" >> {here}/$1/asked
[ ! -e {here}/$1/broken ] || exit 7
PATH="{here}/$1:$PATH" exec bash -c "$2"
"""

@pgrep
@pytest.mark.parametrize("name", ["run", NASTY])
def test_ssh_starts_stops_and_tells_how_it_ended(name, tmp_path):
    j, env = a_node(tmp_path, hosts=["alpha", "ada@beta"], folder=tmp_path/name, gpus=4, nodes=2)
    executable(tmp_path/"bin"/"ssh", SSH.format(here=tmp_path))
    (tmp_path/"rank.py").write_text(RANK.format(here=str(tmp_path)).replace('(here/"up").touch()', 'import os; (here/os.environ["WHO"]).touch()'))
    executable(tmp_path/"bin"/"torchrun", AGENT.format(python=sys.executable, here=str(tmp_path), code=0).replace("import pathlib", "import os; os.environ['WHO'] = os.popen('hostname').read().strip() + '.up'\nimport pathlib"))
    def start():
        p = subprocess.Popen(["bash", str(j.folder/"launch"/"start.sh")], env={k: v for k, v in env.items() if k != "HEAD"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        return p
    run = start()
    for h in ("alpha", "ada@beta"): until(tmp_path/f"{h}.up")
    run.send_signal(signal.SIGINT)
    assert run.wait(20) == 130 and (said := run.stdout.read()).count("stopping after this step") == 2 and "not done; the same command continues" in said, said
    assert f"RUN_ID={shlex.quote(name)} " in (tmp_path/"alpha"/"asked").read_text() and "HEAD=alpha" in (tmp_path/"ada@beta"/"asked").read_text() and not list((j.folder/"launch").glob("pid.*"))
    for h in ("alpha", "ada@beta"): (tmp_path/f"{h}.up").unlink()
    (tmp_path/"ada@beta"/"broken").touch()
    (tmp_path/"rank.py").write_text("")
    run = start()
    assert run.wait(20) == 7 and "ada@beta ended with 7" in run.stdout.read()
    (tmp_path/"ada@beta"/"broken").unlink(); (j.folder/"summary.json").touch()
    assert start().wait(20) == 0


def test_a_sites_own_scripts_need_not_know_about_set_u(tmp_path):
    "module load and activate, as sites write them; and a missing environment is said before anything starts."
    _, env = a_node(tmp_path, gpus=4, nodes=2)
    own, sbatch = tmp_path/"run"/"launch"/"environment.sh", tmp_path/"job.sbatch"
    own.write_text('echo "$NOT_SET_ANYWHERE"\n' + own.read_text())
    (tmp_path/"rank.py").write_text("")
    assert subprocess.run(["bash", str(tmp_path/"run"/"launch"/"node.sh")], env=env).returncode == 0
    no = subprocess.run(["bash", str(tmp_path/"run"/"launch"/"node.sh")], env=env | dict(VENV="/no/where"), capture_output=True, text=True)
    assert no.returncode == 1 and "there is no /no/where/bin/python; set VENV in environment.sh" in no.stderr
    j = job(tmp_path, gpus=2, nodes=2); check_job(j)
    assert slurm_script(j).index("module load") < slurm_script(j).index("set -u") and slurm_script(j).index("for your site") < slurm_script(j).index("--cpus-per-task=16")


def test_threads_are_of_the_cpus_that_may_be_used(tmp_path):
    _, env = a_node(tmp_path, gpus=0, processes=2)
    executable(tmp_path/"bin"/"nproc", "#!/bin/bash\necho 12\n")
    env.pop("OMP_NUM_THREADS", None)
    out = subprocess.run(["bash", "-c", f". {tmp_path}/run/launch/environment.sh; echo $OMP_NUM_THREADS"], env=env, capture_output=True, text=True).stdout
    assert out == "6\n"


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


@pytest.mark.parametrize("line", ["launch grpo --gpus 8 --nodes 3 --dry-run run_dir={at}/run", "launch lvrpo --gpus 8 --nodes 3 --dry-run run_dir={at}/run", "recipes"])
def test_an_output_that_nobody_reads_is_no_traceback(line, tmp_path):
    read, write = os.pipe()
    os.close(read)
    p = subprocess.run([sys.executable, "-m", "unify_rl", *line.format(at=tmp_path).split()], stdout=write, stderr=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONPATH=str(Path(doctor.__file__).parents[1])))
    os.close(write)
    assert p.returncode == 141 and "Traceback" not in p.stderr and "BrokenPipe" not in p.stderr


def test_the_manuals_examples_work(tmp_path, monkeypatch, capsys):
    "As they stand there, dry."
    from unify_rl.cli import LAUNCH_MANUAL, main
    monkeypatch.chdir(tmp_path)
    (tmp_path/"hosts").write_text("".join(f"node{i} slots=8\n" for i in range(2)))
    examples = [re.split(r"  +", line.strip())[0] for line in LAUNCH_MANUAL.splitlines() if line.startswith("  unify_rl")]
    assert len(examples) == 6
    for line in examples:
        assert main([*line.split()[1:], "--dry-run", *(["rollout.prompts=32"] if "pairuni" in line else [])]) == 0, (line, capsys.readouterr().err)


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


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_doctor_s_table_is_plain_words(width, monkeypatch, capsys):
    "No markup is printed as it is written, and no name is cut, on a terminal or in a file."
    monkeypatch.setenv("COLUMNS", str(width))
    name = "somebody-with-a-long-name/a-model-whose-name-does-not-end-soon-[v2]"
    found = [doctor.Finding("devices", "CPU", "info", "[a]"), doctor.Finding("weights", name, "missing", f"/cache/{'x' * 150}/[end]"), doctor.Finding("weights", "b", "ok", "there")]
    for terminal in (False, True):
        console = Console(file=(out := io.StringIO()), width=width, force_terminal=terminal, force_jupyter=False, color_system="standard" if terminal else None)
        console.print(doctor.doctor_table(found), highlight=False, markup=False)
        said = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
        assert "[/" not in said and "[bold]" not in said and "…" not in said and "MISSING" in said
        assert {len(line.rstrip()) <= width for line in said.splitlines()} == {True}
        letters = "".join(said.split())
        assert all(c in letters for c in ("[a]", "[end]")) and sum(letters.count(c) for c in "x") == 150
        assert ("\x1b[31m" in out.getvalue()) == terminal                            # MISSING is red where there are colours
    assert main(["doctor", "--policy", "tiny-janus"]) == 0
    said = capsys.readouterr().out
    assert "[/" not in said and "versions" in said and "…" not in said


@pytest.mark.parametrize("name, why", [("nosuch", "unknown policy 'nosuch'"), ("tiny-jnus", "Did you mean 'tiny-janus'?"), ("{at}/empty", "there is no config.json in it"), ("{at}/file", "there is no config.json in it")])
@pytest.mark.parametrize("recipe", [[], ["grpo"]])
def test_a_policy_that_is_nowhere_is_missing(name, why, recipe, tmp_path, capsys):
    (tmp_path/"empty").mkdir(); (tmp_path/"file").touch()
    assert main(["doctor", *recipe, "--policy", name.format(at=tmp_path), *[f"run_dir={tmp_path}/run"] * bool(recipe)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "MISSING" in said and why in said.replace("│", "") or why.replace(" ", "") in said.replace(" ", "")
    assert "needed: --policy" in said and "nothing is missing" not in said


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
