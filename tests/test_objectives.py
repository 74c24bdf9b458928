"""What a recipe may ask of a policy beside log-probabilities: exact KL, router balance, a teacher's features; and given outputs."""
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import unify_rl
from unify_rl.core import Rollout, UserError, generator_for
from unify_rl.grpo.objective import objective, token_weights
from unify_rl.policies.bagel import BagelPolicy, new_bagel
from unify_rl.rewards.siglip import load_siglip
from unify_rl.rewards.verifiable import build_rewards
from unify_rl.train.config import load_config
from unify_rl.train.pretrain import vocabulary
from unify_rl.world.prompts import draw_prompts, edit_prompts

NO_TEST = dict(evaluate={"suites": []}, progress=False, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A small BAGEL with random weights; its last matrix is not zero, so that it has something to say."
    policy = new_bagel(vocabulary(), hidden=32, layers=2, seed=3)
    torch.nn.init.normal_(policy.net.llm2vae.weight, std=.1)
    policy.save_pretrained(path := tmp_path_factory.mktemp("bagel"))
    return path


def moved(folder, by=.02):
    "The policy, and the same one with other weights."
    a, b = unify_rl.load_policy(folder), unify_rl.load_policy(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in b.net.parameters(): p.add_(by * torch.randn_like(p))
    return a, b


def drawn(policy, **drawing):
    return policy.sample(draw_prompts("train", 2) + edit_prompts("train", 1), 6, generator_for(0), steps=6, **drawing).parts


@pytest.mark.parametrize("form", ["flow_sde", "dance"])
@pytest.mark.parametrize("weighting", ["none", "flat"])
def test_exact_kl_of_steps_is_the_mean_log_ratio(folder, form, weighting):
    "In many draws of one step: the mean of logp - logp_ref, sampled from the policy itself."
    policy, ref = moved(folder)
    prompts, exact, sampled = draw_prompts("train", 1), [], []
    with torch.no_grad():
        part = policy.sample(prompts, 400, generator_for(1), steps=4, window=1, estimator="sde", form=form, weighting=weighting, reduction="sum").parts[0]
        part.targets["location"] = ref(part, ("location",))[1]["location"]
        logp, said = policy(part, ("kl",))
        exact, sampled = said["kl"], logp - ref(part)
    noise = float((sampled - exact).std()) / math.sqrt(exact.numel())
    assert exact.shape == logp.shape and (exact > 0).all()
    assert abs(float(exact.mean() - sampled.mean())) < 5 * noise


@pytest.mark.parametrize("drawing", [dict(estimator="sde", window=2), dict(estimator="forward", draws=3)])
def test_exact_kl_is_zero_at_the_reference_and_survives_cutting(folder, drawing):
    policy, ref = moved(folder)
    for part in drawn(policy, **drawing):
        with torch.no_grad():
            part.targets["location"] = policy(part, ("location",))[1]["location"]
            assert policy(part, ("kl",))[1]["kl"].abs().max() == 0
            part.targets["location"] = ref(part, ("location",))[1]["location"]
            whole = policy(part, ("kl",))[1]["kl"]
            pieces = torch.cat([policy(p, ("kl",))[1]["kl"] for p in part.split(5)])
        assert whole.min() > 0 and torch.allclose(whole, pieces, atol=1e-5)


def test_velocity_kl_by_hand(folder):
    policy, ref = moved(folder)
    part = drawn(policy, estimator="forward", draws=2, reduction="mean")[0]
    with torch.no_grad():
        v, v_ref = (p(part, ("location",))[1]["location"] for p in (policy, ref))
        part.targets["location"] = v_ref
        assert torch.allclose(policy(part, ("kl",))[1]["kl"], ((v - v_ref) ** 2).mean((2, 3)) / 2, atol=1e-7)


def test_a_known_kl_replaces_the_estimate_and_has_a_gradient():
    logp, kl = torch.zeros(3, 2, requires_grad=True), torch.full((3, 2), .5, requires_grad=True)
    w = token_weights(torch.ones(3, 2, dtype=torch.bool))
    loss, stats = objective(logp, None, torch.ones(3, 2), w, torch.zeros(3), beta=2.0, kl_BT=kl)
    loss.backward()
    assert stats["kl"] == .5 and loss == 1.0 and torch.allclose(kl.grad, 2 * w)


def test_lvrpo_runs_with_each_estimator(folder, tmp_path):
    for estimator in ("forward", "sde"):
        run = unify_rl.train("lvrpo", folder, steps=2, run_dir=str(tmp_path / estimator), rollout={"prompts": 4, "group_size": 2, "max_text": 8,
                             "drawing": {"estimator": estimator, "steps": 4}}, objective={"betas": {"image": 1.0}}, **NO_TEST)
        assert list(run.metrics["step"]) == [1, 2] and run.metrics["objective/kl"].iloc[0] >= 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_file_of_16_bits_is_trained_in_32(folder, tmp_path, precision):
    "BAGEL's official weights are bf16, of which a step of 1e-6 changes next to none."
    BagelPolicy.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path/"half")
    unify_rl.train("lvrpo", tmp_path/"half", steps=1, run_dir=str(tmp_path/"run"), rollout={"prompts": 4, "group_size": 2, "max_text": 8}, data={"tasks": {"generate": 1.0}},
                   optimizer={"lr": 1e-6, "warmup": 0}, model={"precision": precision}, **NO_TEST)
    before, after = load_file(tmp_path/"half"/"ema.safetensors"), load_file(tmp_path/"run"/"policy"/"ema.safetensors")
    name = "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
    assert before[name].dtype == torch.bfloat16 and after[name].dtype == torch.float32
    assert (before[name] != after[name]).float().mean() > .9

def test_a_learned_router_is_balanced_by_its_loss(folder, tmp_path):
    "The same short run with and without a price on imbalance; the router is saved with the policy."
    def last(weight):
        run = unify_rl.train("grpo", folder, steps=12, run_dir=str(tmp_path / str(weight)), data={"tasks": {"generate": 1.0}}, model={"experts": 8},
                             rollout={"prompts": 2, "group_size": 2, "drawing": {"estimator": "forward", "steps": 3}},
                             optimizer={"lr": .01, "schedule": "linear"}, objective={"beta": .01, "further": {"balance": weight}}, **NO_TEST)
        assert all(layer.experts is not None for layer in run.policy().body.layers)
        return run.metrics["objective/balance"]
    free, held = last(0.0), last(1.0)
    assert free.iloc[0] == held.iloc[0] > 1 and held.iloc[-1] < free.iloc[-1] - .02


def test_repa_pulls_hidden_states_to_the_teacher(folder, tmp_path):
    run = unify_rl.train("repa", folder, steps=25, run_dir=str(tmp_path / "run"), rollout={"prompts": 12}, objective={"further": {"repa": 1.0}},
                         optimizer={"lr": 3e-3}, **NO_TEST)
    repa = run.metrics["objective/repa"]
    share = run.metrics["reward/given"]
    assert (share == 1).all() and repa.iloc[-3:].mean() < .8 * repa.iloc[:3].mean()
    assert run.metrics["objective/ratio_mean"].sub(1).abs().max() < 1e-5              # given, not sampled: always on-policy
    saved = {k for k, _ in run.policy().named_parameters()}
    assert not any("projector" in k for k in saved)


def test_repa_gradient_reaches_the_layers_below_and_only_those(folder):
    policy = unify_rl.load_policy(folder)
    policy.train_only(list(policy.trains))
    policy.learn_from(lambda images: torch.randn(len(images), 9, 5, generator=generator_for(0)), 0)
    part = policy.encode(draw_prompts("train", 3), [None] * 3, [p.reference for p in edit_prompts("train", 3)]).parts[0]
    part.targets["features"] = policy.teacher([0, 0, 0])
    _, said = policy(part, ("repa",))
    said["repa"].backward()
    touched = {int(n.split("layers.")[1].split(".")[0]) for n, p in policy.named_parameters() if "layers." in n and p.grad is not None and p.grad.abs().max() > 0}
    assert touched == {0} and policy.net.vae2llm.weight.grad.abs().max() > 0 and policy.projector[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("over, says", [
    (dict(further={"repa": .5}), "no further loss 'repa'"),
    (dict(exact=["image"]), "only estimate the KL of 'image'"),
    (dict(further={"balanse": .5}), "no further loss 'balanse'"),
])
def test_a_policy_refuses_what_it_cannot_say(tmp_path, over, says):
    with pytest.raises(UserError, match=says):
        unify_rl.train("grpo", "tiny-janus", run_dir=str(tmp_path / "run"), steps=1, objective=over, **NO_TEST)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("over, says", [
    ({"objective.further": {"balance": -1}}, "objective.further.balance is -1"),
    ({"objective.exact": ["picture"]}, "not a kind of action"),
    ({"rollout.outputs": "given"}, "rollout.group_size is 8; it must be 1"),
    ({"rollout.group_size": 1}, "must be at least 2"),
    ({"advantage.baseline": "none"}, "advantage.scale is 'std'"),
])
def test_settings_that_do_not_fit(over, says):
    with pytest.raises(UserError, match=says): load_config("grpo", overrides=[f"{k}={v}" for k, v in over.items()])


def test_layers_that_do_not_exist(folder, tmp_path):
    with pytest.raises(UserError, match="there is no layer 9: .* has layers 0 ... 1"):
        unify_rl.train("repa", folder, run_dir=str(tmp_path / "run"), steps=1, objective={"teacher_layer": 9}, **NO_TEST)
    with pytest.raises(UserError, match="no experts to route to"):
        unify_rl.train("grpo", "tiny-janus", run_dir=str(tmp_path / "run"), steps=1, model={"experts": 4}, **NO_TEST)


# -- a referee that learns along -----------------------------------------------------------------------------------

LEARNS = [{"name": "semantic", "settings": {"form": "mean", "learn": 3e-4}}]
SHORT = {"prompts": 3, "group_size": 2, "drawing": {"estimator": "forward", "steps": 3}}

def weights_of(siglip): return torch.cat([p.flatten() for p in siglip.parameters()]).clone()

def test_a_referee_that_learns_leaves_the_shared_one_alone_and_resumes(folder, tmp_path):
    shared = load_siglip("tiny-siglip")
    before = weights_of(shared)
    same = dict(data={"tasks": {"generate": 1.0}}, rollout=SHORT, overrides=[f"rewards={json.dumps(LEARNS)}"], **NO_TEST)
    whole = unify_rl.train("grpo", folder, steps=4, run_dir=str(tmp_path / "whole"), **same)
    half = unify_rl.train("grpo", folder, steps=2, run_dir=str(tmp_path / "half"), **same)
    rest = unify_rl.train("grpo", folder, resume=True, overrides=["steps=4", f"run_dir={half.dir}"], progress=False)
    for name in ("objective/semantic_loss", "reward/semantic", "objective/loss"):
        assert list(rest.metrics[name]) == list(whole.metrics[name])
    assert len(set(whole.metrics["objective/semantic_loss"])) == 4
    assert torch.equal(before, weights_of(shared)) and not any(p.grad is not None for p in shared.parameters())

def test_a_learning_referee_comes_to_like_what_it_is_shown():
    reward, wrong = build_rewards(LEARNS)[0][0], draw_prompts("train", 6, seed=1)
    images = [np.full((24, 24, 3), 20 * b, np.uint8) for b in range(6)]
    shown = Rollout(wrong, 1, [], [None] * 6, images)
    first = reward(wrong, shown).values.mean()
    for _ in range(25): reward.learner.learn(wrong, shown)
    assert reward(wrong, shown).values.mean() > first + .2
    assert reward.learner.learn(wrong, Rollout(wrong, 1, [], [None] * 6, [None] * 6)) == {}

@pytest.mark.parametrize("rate", [-1e-4, math.inf, math.nan, True])
def test_a_referees_learning_rate_is_a_rate(rate):
    with pytest.raises(UserError, match="is no learning rate"): build_rewards([{"name": "semantic", "settings": {"learn": rate}}])
