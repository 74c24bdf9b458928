"Configuration: layers, strictness, the command line, ranges, and the manual."
import math
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Literal, get_args, get_origin

import pytest
import yaml

from unify_rl.core import UserError
from unify_rl.train import config as C
from unify_rl.train.config import (Config, apply_overrides, check, describe, from_dict, leaves, load_config, read_layer, recipes,
                                   to_yaml)

LEAVES = {path: (f, kind) for path, f, kind in leaves(Config)}

def nested(path, value):
    for part in reversed(path.split(".")): value = {part: value}
    return value

def get(cfg, path):
    for part in path.split("."): cfg = getattr(cfg, part)
    return cfg


# -- the contract with the trainer ---------------------------------------------------------------------------------

def test_the_defaults_are_valid_and_as_documented():
    c = check(Config())
    assert (c.seed, c.threads, c.on_error, c.run_dir) == (0, 0, "mask", "runs/{recipe}-{policy}-s{seed}")
    assert (c.rollout.prompts, c.rollout.group_size, c.rollout.logp, c.rollout.max_text) == (16, 8, "conditional", 64)
    o = c.objective
    assert (o.clip_low, o.clip_high, o.beta, o.kl, o.average, o.updates) == (.2, .2, .01, "k3", "sequence", 1)
    assert (c.optimizer.beta2, c.optimizer.micro_batch, c.model.logp_chunk) == (.95, 64, 4096)
    assert (c.checkpoint.keep, c.evaluate.prompts) == (2, 720)

def test_defaults_are_not_shared():
    a, b = Config(), Config()
    a.data.tasks["answer"] = 1.0
    a.evaluate.suites.append("x")
    assert b == Config()

def test_advantage_and_objective_take_these_settings():
    import torch
    from unify_rl.grpo.advantage import advantages
    from unify_rl.grpo.objective import objective, token_weights
    c, x = Config(), torch.zeros(4, 3)
    adv = advantages(torch.tensor([[1., 0, 1, 0]], dtype=torch.float64), torch.ones(1), 2, **vars(c.advantage))
    o = vars(c.objective) | {"updates": None}
    weights = token_weights(torch.ones(4, 3, dtype=torch.bool), o.pop("average"))
    for k in ("updates", "betas", "exact", "further", "teacher", "teacher_layer"): o.pop(k)
    loss, _ = objective(x, x, x, weights, adv.adv_B.float(), **o)
    assert loss.isfinite()


# -- strictness ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [p for p in LEAVES if "." in p])
def test_a_misspelt_key_anywhere_names_its_path_and_the_nearest(path):
    section, key = path.rsplit(".", 1)
    wrong = key[:-1] + "_" + key[-1]
    for act in (lambda: from_dict(Config, nested(f"{section}.{wrong}", 1)),
                lambda: apply_overrides(Config(), [f"{section}.{wrong}=1"])):
        with pytest.raises(UserError) as e: act()
        assert str(e.value).startswith(f"{section}.{wrong}: unknown key.") and key in str(e.value)

@pytest.mark.parametrize("key,place", [("lr", "optimizer.lr"), ("group_size", "rollout.group_size"), ("beta", "objective.beta"),
                                       ("clip_low", "objective.clip_low")])
def test_a_key_in_the_wrong_place_names_the_right_one(key, place):
    for act in (lambda: apply_overrides(Config(), [f"{key}=1"]), lambda: from_dict(Config, {key: 1})):
        with pytest.raises(UserError, match=f"Did you mean.*{place}"): act()

WRONG = {int: [1.5, "ten", True, None, [1], {}, math.inf], float: ["fast", True, None, [1.0], {}, math.nan, "nan"],
         bool: [1, "true", None], str: [1, 1.5, True, None, ["a"]],
         list: ["a", 1, None, {}], dict: ["a", 1, None, []], Literal: ["other", 1, None, True, []]}

@pytest.mark.parametrize("path", LEAVES)
def test_wrong_types_name_path_and_expectation(path):
    kind = LEAVES[path][1]
    for value in WRONG[get_origin(kind) or kind]:
        with pytest.raises(UserError) as e: from_dict(Config, nested(path, value))
        assert str(e.value).startswith(f"{path}: ") and repr(value) in str(e.value)

@pytest.mark.parametrize("d,message", [
    ({"rewards": ["strict"]}, "rewards.0: expected keys and values, got 'strict'"),
    ({"rewards": [{"name": "a"}, {"name": "b", "wieght": 2}]}, "rewards.1.wieght: unknown key. Did you mean 'weight'"),
    ({"rewards": [{"weight": 2}]}, "rewards.0.name is missing"),
    ({"data": {"tasks": {"generate": "much"}}}, "data.tasks.generate: expected a number, got 'much'"),
    ({"evaluate": {"suites": [1]}}, "evaluate.suites.0: expected a text, got 1"),
    ({"log": {"trackers": ["wandbb"]}}, "log.trackers.0: 'wandbb' is not one of the choices. Did you mean 'wandb'"),
    ({"rollout": 8}, "rollout: expected keys and values, got 8"),
    ({1: 2}, "1: unknown key"),
    ([], "the configuration: expected keys and values"),
])
def test_mistakes_in_nested_values(d, message):
    with pytest.raises(UserError) as e: from_dict(Config, d)
    assert str(e.value).startswith(message)

@pytest.mark.parametrize("text,value", [("1e-3", 1e-3), ("1.0e-3", 1e-3), ("1E-3", 1e-3), ("2", 2.0), (".5", .5), ("5e-6", 5e-6),
                                        ("'1e-3'", 1e-3)])
def test_every_spelling_of_a_number_reaches_a_float(text, value):
    assert from_dict(Config, yaml.safe_load(f"optimizer: {{lr: {text}}}")).optimizer.lr == value
    got = apply_overrides(Config(), [f"optimizer.lr={text}"]).optimizer.lr
    assert got == value and type(got) is float

@pytest.mark.parametrize("text,value", [("300", 300), ("1e3", 1000), ("64.0", 64), ("'7'", 7), ("1_000", 1000)])
def test_every_spelling_of_a_whole_number_reaches_an_int(text, value):
    got = apply_overrides(Config(), [f"steps={text}"]).steps
    assert got == value and type(got) is int

def test_a_big_seed_keeps_every_digit():
    for text in ("9007199254740993", "'9007199254740993'"):
        assert apply_overrides(Config(), [f"seed={text}"]).seed == 9007199254740993

def test_free_settings_keep_their_types_and_get_their_floats():
    d = {"name": "x", "settings": yaml.safe_load("{a: 1e-3, b: [2E5, text, 3], c: {d: -1.5e+2}, e: e3, f: '12'}")}
    got = from_dict(Config, {"rewards": [d]}).rewards[0].settings
    assert got == {"a": 1e-3, "b": [2e5, "text", 3], "c": {"d": -150.0}, "e": "e3", "f": "12"}


# -- ranges --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("override", [
    "rollout.group_size=1", "rollout.group_size=0", "steps=0", "steps=-1", "optimizer.lr=0", "optimizer.lr=-1e-3",
    "optimizer.lr=.inf", "rollout.temperature=0", "rollout.top_p=0", "rollout.top_p=1.5", "rollout.prompts=0",
    "objective.beta=-1", "objective.clip_low=-.1", "objective.updates=0", "advantage.eps=0", "optimizer.beta1=1",
    "optimizer.micro_batch=0", "model.logp_chunk=0", "model.lora_rank=-1", "checkpoint.keep=0",
    "checkpoint.every=-1", "evaluate.prompts=0",
    "evaluate.batch=0", "threads=-1", "seed=-1", "rollout.cfg=.inf", "policy=", "run_dir=", "optimizer.grad_norm=0",
    "model.lora_alpha=0"])
def test_out_of_range_names_the_key(override):
    path, value = override.split("=")
    with pytest.raises(UserError) as e: apply_overrides(Config(), [override])
    assert str(e.value).startswith(f"{path} is ") and "must be" in str(e.value)

def test_a_group_of_one_is_explained():
    with pytest.raises(UserError, match="at least 2: a group of one has no advantage"):
        apply_overrides(Config(), ["rollout.group_size=1"])

@pytest.mark.parametrize("override,message", [
    ("data.tasks={}", "data.tasks: give at least one task"), ("data.tasks={generate: 0}", "data.tasks: give at least one task"),
    ("data.tasks={draw: 1}", "data.tasks.draw: unknown task"), ("data.tasks.anwser=1", "Did you mean 'answer'"),
    ("data.tasks.answer=-1", "data.tasks.answer is -1"), ("data.tasks.answer=.inf", "data.tasks.answer is inf"),
    ("objective.betas={picture: 1}", "objective.betas.picture"), ("objective.betas.image=-1", "objective.betas.image is -1"),
    ("rewards=[{name: a, weight: 0}]", "every weight is 0"), ("rewards=[{name: a}, {name: a}]", "given twice"),
    ("rewards=[{name: a, weight: .inf}]", "must be finite")])
def test_tasks_and_rewards_make_sense(override, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")): apply_overrides(Config(), [override])

@pytest.mark.parametrize("overrides,message", [
    (["engine.zero=4"], "engine.zero is 4"), (["engine.zero=3", "engine.fsdp=true"], "choose one of the two"), (["engine.fsdp=true", "model.precision=fp16"], "model.precision is 'fp16'; it must be fp32 or bf16"),
    (["engine.fsdp=true", "engine.offload=optimizer"], "engine.offload"), (["engine.fsdp=true", "log.agreement_every=2"], "0 with engine.fsdp: it compares whole gradients"),
    (["engine.zero=1", "log.agreement_every=2"], "0 with engine.zero=1"), (["engine.fsdp=true", "model.experts=4"], "model.experts is 4; it must be 0 with engine.fsdp"),
    (["engine.zero=3", "model.experts=4"], "0 with engine.zero=3")])
def test_what_does_not_go_with_how_a_run_is_spread(overrides, message):
    with pytest.raises(UserError, match=message): apply_overrides(Config(), overrides)

def test_experts_go_with_whole_copies(): assert apply_overrides(Config(), ["engine.zero=2", "model.experts=4"]).engine.zero == 2

@pytest.mark.parametrize("key", C.MAY_BE_INFINITE)
def test_infinity_where_it_means_no_limit(key):
    assert get(apply_overrides(Config(), [f"{key}=.inf"]), key) == math.inf == get(apply_overrides(Config(), [f"{key}=inf"]), key)

def test_every_number_has_a_range():
    "A new setting that is a number must be given a range."
    ranged = {p for paths in C.AT_LEAST.values() for p in paths} | set(C.ABOVE_0)
    assert {p for p, (f, kind) in LEAVES.items() if kind in (int, float)} == ranged


# -- the command line ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text,message", [
    ("optimizer.lr", "not key=value"), ("", "not key=value"), ("=3", "unknown key"), ("optimizer.=3", "unknown key"),
    ("steps.x=1", "steps.x: steps is a single value"), ("rewards.7.weight=1", "rewards.7: there is no such item. Known: strict"),
    ("rewards.strct.weight=1", "rewards.strct: .*Did you mean 'strict'"), ("rewards.strict.wieght=1", "Did you mean 'weight'"),
    ("rewards.-1.weight=1", "rewards.-1: there is no such item"), ("seed=[1", "seed: .* is not a YAML value"),
    ("seed={a: 1}", "seed: expected a whole"),
    ("rewards.strict=1", "rewards.0: expected keys and values"), ("optimizer=1", "optimizer: expected keys and values"),
    ("rewards.0.settings.a.b.c=1", "rewards.0.settings.a.b.*single value")])
def test_bad_overrides(text, message):
    cfg = from_dict(Config, {"rewards": [{"name": "strict", "settings": {"a": {"b": 1}}}]})
    with pytest.raises(UserError, match=message): apply_overrides(cfg, [text])

def test_overrides_of_every_kind_leave_the_original_alone():
    a = from_dict(Config, {"rewards": [{"name": "x"}, {"name": "y"}]})
    before = to_yaml(a)
    b = apply_overrides(a, ["rewards.0.weight=2", "rewards.y.weight=3", "rewards.y.settings={k: [1e-3]}",
                            "rewards.y.settings.new=1e-3", "data.tasks.answer=1", "model.train=[a, b]",
                            "model.checkpoint_activations=true", "objective.kl=k1", "run_dir=on",
                            "data.path=a=b # c", "evaluate={suites: [s], prompts: 9}"])
    assert to_yaml(a) == before
    assert [r.weight for r in b.rewards] == [2, 3] and b.rewards[1].settings == {"k": [1e-3], "new": 1e-3}
    assert b.data.tasks == {"generate": 1, "answer": 1} and b.model.train == ["a", "b"] and b.model.checkpoint_activations is True
    assert (b.objective.kl, b.run_dir, b.evaluate.suites, b.evaluate.prompts) == ("k1", "on", ["s"], 9)

@pytest.mark.parametrize("raw,value", [("007", "007"), ("1e-3", "1e-3"), ("true", "true"), ("null", "null"),
                                       ("'quoted'", "quoted"),
                                       ("a b", "a b"), ("x: y", "x: y"), ("[1", "[1"), ("~/runs/x", "~/runs/x"), ("@x", "@x")])
def test_a_text_setting_takes_what_was_typed(raw, value):
    assert apply_overrides(Config(), [f"run_dir={raw}"]).run_dir == value

def test_the_last_override_wins():
    assert apply_overrides(Config(), ["steps=3", "steps=5"]).steps == 5


# -- layers --------------------------------------------------------------------------------------------------------

def test_unknown_recipe_names_the_nearest():
    for bad in ("grop", "GRPO", "../grpo", "grpo.yaml", ""):
        with pytest.raises(UserError, match="unknown recipe.*grpo"): load_config(bad)

@pytest.mark.parametrize("name", recipes())
def test_every_packaged_recipe_resolves_and_reads_back(name):
    overlays = read_layer(C._recipe_folder()/f"{name}.yaml")[1]
    task = [f"task={t}" for t in list(overlays["tasks"])[:1]]
    for policy in [None, "some/other", *overlays["policies"]]:
        cfg = load_config(name, policy, overrides=task)
        assert from_dict(Config, yaml.safe_load(to_yaml(cfg))) == cfg and (cfg.rewards or cfg.stages) and "{" not in cfg.run_dir

def test_the_lvrpo_recipe():
    "Table 7 of the paper for the full-size policy; the exact KL of forward draws, and few-step clipping, for both."
    full, tiny = load_config("lvrpo", "ByteDance-Seed/BAGEL-7B-MoT"), load_config("lvrpo")
    o = full.optimizer
    assert (o.lr, o.weight_decay, o.grad_norm, o.warmup, o.schedule, full.steps) == (5e-6, .05, 1.0, 100, "cosine", 5000)
    assert full.rollout.prompts * full.rollout.group_size == 256
    assert (tiny.policy, tiny.rollout.group_size) == ("tiny-bagel", 8)
    for c in (full, tiny):
        assert (c.objective.exact, c.objective.clip_low, c.objective.clip_high, c.objective.beta) == (["image"], .05, .05, .01)
        assert c.rollout.drawing["estimator"] == "forward" and c.evaluate.drawing == {}
        assert set(c.data.tasks) == {"generate", "edit", "answer"}
        assert [r.name for r in c.rewards] == ["semantic", "constraints", "knowledge", "accuracy", "format"]

def test_the_repa_recipe():
    "Supervised: given outputs, each worth 1, and no baseline; REPA's teacher follows the policy."
    full, tiny = load_config("repa", "ByteDance-Seed/BAGEL-7B-MoT"), load_config("repa")
    for c in (full, tiny):
        assert (c.rollout.outputs, c.rollout.group_size, c.advantage.baseline, c.advantage.scale) == ("given", 1, "none", "none")
        assert {r.name: r.weight for r in c.rewards} == {"given": 1.0, "strict": 0.0, "accuracy": 0.0} and c.objective.further == {"repa": .5}
    assert (tiny.objective.teacher, full.objective.teacher) == ("tiny-siglip", "timm/ViT-SO400M-16-SigLIP2-384")

def test_the_grpo_recipe():
    cfg = load_config("grpo")
    assert {r.name: r.weight for r in cfg.rewards} == {"constraints": .5, "strict": .5, "accuracy": 1.0, "format": .1}
    assert (cfg.policy, cfg.data.tasks, cfg.objective.beta) == ("tiny-janus", {"generate": .35, "answer": .65}, .01)
    assert cfg.run_dir == "runs/grpo-tiny-janus-s0"

@pytest.fixture
def layered(tmp_path, monkeypatch):
    (tmp_path/"base.yaml").write_text("steps: 10\nseed: 1\nrollout: {prompts: 4, group_size: 4}\n"
                                      "rewards: [{name: a}]\npolicy: small\n"
                                      "data: {tasks: {generate: .5, answer: .5}}\n"
                                      "policies: {small: {steps: 20, seed: 2, rollout: {prompts: 5}}, Big-1B: {seed: 9}, team/Large-7B: {seed: 4}}\n")
    monkeypatch.setattr(C, "_recipe_folder", lambda: tmp_path)
    return tmp_path

def test_precedence_of_the_layers(layered):
    (layered/"my.yml").write_text("seed: 3\nrollout: {group_size: 6}\ndata: {tasks: {answer: 1}}\n")
    c = load_config("base", config_file=layered/"my.yml", overrides=["rollout.cfg=2"])
    assert (c.steps, c.seed, c.rollout.prompts, c.rollout.group_size, c.rollout.cfg, c.rollout.top_p) == (20, 3, 5, 6, 2.0, 1.0)
    assert [r.name for r in c.rewards] == ["a"] and c.data.tasks == {"answer": 1.0} and c.recipe == "base"
    assert load_config("base", overrides=["seed=4"]).seed == 4

@pytest.mark.parametrize("policy,seed", [("small", 2), ("Big-1B", 9), ("org/Big-1B", 9), ("/models/Big-1B", 9), ("team/Large-7B", 4), ("/models/Large-7B", 4), ("other", 1)])
def test_the_overlay_follows_the_policy_wherever_it_is_chosen(policy, seed, layered):
    (layered/"my.yml").write_text(f"policy: {policy}\n")
    for c in (load_config("base", policy), load_config("base", config_file=layered/"my.yml"),
              load_config("base", overrides=[f"policy={policy}"])):
        assert (c.policy, c.seed) == (policy, seed)
    assert load_config("base", policy).run_dir == f"runs/base-{policy.split('/')[-1]}-s{seed}"

def test_a_saved_configuration_reproduces_the_run(layered):
    c = load_config("base", "Big-1B", overrides=["optimizer.lr=3e-5", "rewards.a.settings={x: 1e-9}"])
    (layered/"config.yml").write_text(to_yaml(c))
    assert load_config("base", config_file=layered/"config.yml") == c
    (layered/"other.yaml").write_text("steps: 1")
    with pytest.raises(UserError, match="the recipe is 'other', but the settings say recipe: 'base'"):
        load_config("other", config_file=layered/"config.yml")

@pytest.mark.parametrize("text,message", [
    ("optimzer: {lr: 1}", "my.yml: optimzer: unknown key. Did you mean 'optimizer'"),
    ("optimizer: {lr: fast}", "my.yml: optimizer.lr: expected a number"),
    ("policies: {small: {sed: 1}}", "my.yml: policies.small.sed: unknown key. Did you mean 'seed'"),
    ("- a\n- b", "my.yml: expected keys and values"), ("a: [1", "my.yml is not YAML"), ("\t", "my.yml is not YAML"),
    ("x: !!python/object/apply:os.getcwd []", "my.yml is not YAML")])
def test_a_mistake_in_a_file_names_the_file(text, message, layered):
    (layered/"my.yml").write_text(text)
    with pytest.raises(UserError) as e: load_config("base", config_file=layered/"my.yml")
    assert message in str(e.value) and str(layered) in str(e.value)

def test_unreadable_files(layered):
    (layered/"bytes.yml").write_bytes(b"\xff\xfe\x00")
    wrong = {"missing.yml": "cannot read the configuration .*missing.yml: No such file", "bytes.yml": "not a UTF-8 text"}
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message): load_config("base", config_file=layered/name)
    with pytest.raises(UserError, match="cannot read the configuration"): load_config("base", config_file=layered)

def test_an_empty_file_changes_nothing(layered):
    (layered/"my.yml").write_text("# nothing yet\n")
    assert load_config("base", config_file=layered/"my.yml") == load_config("base")


# -- out again -----------------------------------------------------------------------------------------------------

def test_yaml_round_trip_of_difficult_values():
    c = from_dict(Config, {"policy": "yes", "run_dir": "é: #1", "objective": {"clip_high": math.inf}, "optimizer": {"lr": 1/3e7},
                           "rewards": [{"name": "1e5", "settings": {"k": [None, True, "no", {"x": 1e-12}]}}]})
    assert from_dict(Config, yaml.safe_load(to_yaml(c))) == c

def sections(cls=Config):
    yield cls
    for kind in C.get_type_hints(cls).values():
        inner = get_args(kind)[0] if get_origin(kind) is list else kind
        if is_dataclass(inner): yield from sections(inner)

def test_every_setting_is_in_the_manual_with_its_comment():
    from fastcore.docments import docments
    manual = describe()
    for cls in sections():
        assert cls.__doc__ in manual
        for name, comment in docments(cls).items():
            if name == "return" or is_dataclass(C.get_type_hints(cls)[name]) or name in ("rewards", "stages"): continue
            assert comment and len(comment) > 5 and f"\n      {comment}\n" in manual, f"{cls.__name__}.{name} has no comment"
    for path in LEAVES:
        if path not in ("rewards", "stages"): assert f"\n  {path} = " in manual
    assert "conditional | guided" in manual and len(list(sections())) == 13

def test_the_configuration_needs_no_torch():
    code = "import sys; from unify_rl.train.config import load_config; load_config('grpo'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr
