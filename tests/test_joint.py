"""Joint prompts: a picture and an answer are one sample with one advantage. The trainer's loss and gradient, against plain loops over samples and tokens.

The loops know nothing of groups, caches or micro-batches: they score one sample at a time with transformers' own forward.
"""
import math
from dataclasses import replace

import pytest
import torch

import unify_rl
import unify_rl.policies.janus as J
from unify_rl.core import generator_for
from unify_rl.data.stream import PromptStream
from unify_rl.mechanisms.tokens import extend
from unify_rl.policies.janus import new_janus
from unify_rl.rewards.verifiable import per_sample
from unify_rl.train.config import load_config
from unify_rl.train.loop import Trainer
from unify_rl.train.pretrain import vocabulary
from unify_rl.train.runlog import RunLog
from unify_rl.world.questions import joint_prompts, question_prompts

redness = per_sample("redness", lambda prompt, text, image: float(image[..., 0].mean()) / 255, tasks=("joint",))
wordy = per_sample("wordy", lambda prompt, text, image: float(len(text)), tasks=("joint",))
WEIGHTS, EPS, CLIP = (1.0, 0.01), 1e-4, 0.05


def one_by_one(policy, part, r, shift=0):
    "Log-probabilities of one sample's tokens by transformers' forward over its whole sequence; `shift` 1: by the state after the token, the authors' mistake."
    model, c, n = policy.janus, int(part.context_index[r]), int(part.mask[r].sum())
    ids = part.context["ids"][c][part.context["mask"][c]][None]
    x = model.model.language_model.embed_tokens(ids)
    if part.kind == "text": x = x.masked_scatter((ids == model.config.image_token_id)[..., None], part.context["features"][c])
    embed, head = policy._ends(part.kind)
    states = model.model.language_model(inputs_embeds=torch.cat([x, embed(part.actions[r:r+1, :n])], 1)).last_hidden_state[0]
    logits, start = head(states), ids.shape[1] - 1 + shift
    return [logits[start + t].log_softmax(-1)[part.actions[r, t]] for t in range(n - shift)]


def by_hand(scores_RB, group_size, normalize):
    "One advantage for each sample: of its total reward, or the weighted sum of each reward's own."
    def relative(values):
        out = []
        for n in range(0, len(values), group_size):
            group = values[n:n + group_size]
            mean = sum(group) / len(group)
            std = math.sqrt(sum((x - mean) ** 2 for x in group) / (len(group) - 1))
            out += [(x - mean) / (std + EPS) for x in group]
        return out
    if normalize == "total": return relative([sum(w * s[b] for w, s in zip(WEIGHTS, scores_RB)) for b in range(len(scores_RB[0]))])
    return [sum(w * a for w, a in zip(WEIGHTS, column)) for column in zip(*map(relative, scores_RB))]


def half(policy, part, adv_B, old):
    "A half's loss: the mean over samples of the mean over tokens of the clipped gain. Keeps what the first update starts from in `old`."
    total = 0.0
    for r, b in enumerate(part.rows.tolist()):
        logp, gains = one_by_one(policy, part, r), []
        for t, lp in enumerate(logp):
            ratio = (lp - old.setdefault((part.kind, b, t), lp.detach())).exp()
            gains.append(torch.min(ratio * adv_B[b], ratio.clamp(1 - CLIP, 1 + CLIP) * adv_B[b]))
        total = total - sum(gains) / len(gains)
    return total / len(part)


class Watched(Trainer):
    "A trainer that does each update by hand as well, just before its own step."
    def _update(self, rollout, adv):
        self.parts, self.adv, self.old, self.by_hand, self.gaps, self.ratios = rollout.parts, adv, {}, [], [], []
        return super()._update(rollout, adv)

    def _step(self, passes):
        weights = [p for p in self.engine.trained.values() if p.grad is not None]
        advantages = by_hand(self.scores, self.cfg.rollout.group_size, self.cfg.advantage.normalize)
        image, text = (next(p for p in self.parts if p.kind == kind) for kind in ("image", "text"))
        loss = (half(self.policy, image, advantages, self.old) + half(self.policy, text, advantages, self.old)) / 2
        self.by_hand.append(float(loss))
        for p, g in zip(weights, torch.autograd.grad(loss, weights)): self.gaps.append(float((p.grad - g).abs().max() / g.abs().max().clamp(min=1e-3)))
        torch.testing.assert_close(self.adv.adv_B, torch.tensor(advantages, dtype=torch.float64), atol=1e-9, rtol=1e-9)
        return super()._step(passes)


def trainer(folder, policy=None, kind=Watched, **over):
    cfg = load_config("grpo", overrides=["rollout.prompts=2", "rollout.group_size=3", "rollout.max_text=5", "data.tasks={joint: 1.0}", "objective.average=sequence",
                                         f"advantage.eps={EPS}", f"objective.clip_low={CLIP}", f"objective.clip_high={CLIP}", "objective.beta=0",
                                         "optimizer.micro_batch=4", "optimizer.grad_norm=1e9", *[f"{k}={v}" for k, v in over.items()]])
    stream = PromptStream(joint_prompts("train", 6), cfg.data.tasks, 0)
    t = kind(cfg, policy or new_janus(vocabulary(), layers=1, hidden=32), stream, [redness, wordy], torch.tensor(WEIGHTS, dtype=torch.float64), RunLog(folder))
    asked = {r.name: r.judge for r in t.rewards}
    t.scores = [[0.0] * 6 for _ in t.rewards]
    def listening(k, name):
        def judge(prompts_B, rollout):
            said = asked[name](prompts_B, rollout)
            t.scores[k] = [float(v) for v in said.values]
            return said
        return judge
    t.rewards = [replace(r, judge=listening(k, r.name)) for k, r in enumerate(t.rewards)]
    return t


@pytest.mark.parametrize("normalize", ["total", "each"])
def test_the_joint_loss_is_both_halves_with_one_advantage(normalize, tmp_path):
    "Value and gradient, in the first update (ratio 1) and in the second (another ratio, some of it clipped)."
    t = trainer(tmp_path/"r", **{"advantage.normalize": normalize, "objective.updates": 2, "optimizer.lr": .02, "optimizer.warmup": 0})
    metrics = t.step()
    assert {p.kind for p in t.parts} == {"image", "text"} and all(sorted(p.rows.tolist()) == list(range(6)) for p in t.parts)
    assert not t.adv.dead_N.any() and all(len(set(s)) > 2 for s in t.scores) and len(t.by_hand) == 2
    assert abs(metrics["objective/loss"] - sum(t.by_hand) / 2) < 1e-5
    assert t.gaps and max(t.gaps) < 1e-5, max(t.gaps)
    assert abs(metrics["objective/ratio_mean"] - 1) > 1e-4 and metrics["objective/clip_fraction"] > .01     # the mean of both updates: the second one moved
    assert abs(t.by_hand[1] - t.by_hand[0]) > 1e-3


def test_the_two_ways_to_normalize_differ():
    scores = [[.2, .4, .9, .5, .1, .3], [8.0, 2.0, 30.0, 1.0, 2.0, 4.0]]
    assert max(abs(a - b) for a, b in zip(by_hand(scores, 3, "total"), by_hand(scores, 3, "each"))) > .1


def test_image_scores_of_joint_prompts_that_are_one_off_are_caught():
    "The public CoRL trainer scores a picture's token with the state after it."
    policy = unify_rl.load_policy("tiny-janus")
    policy.train_only(["language_model"])
    rollout = policy.sample(joint_prompts("test", 3), 2, generator_for("shift"), max_text=12)
    assert [p.kind for p in rollout.parts] == ["image", "text"]
    with torch.no_grad():
        for part in rollout.parts:
            for r in range(len(part)):
                recorded = part.logp_old[r][part.mask[r]]
                aligned, shifted = (torch.stack(one_by_one(policy, part, r, shift)) for shift in (0, 1)) if len(recorded) > 1 else (recorded, recorded - 1)
                assert (aligned - recorded).abs().max() < 1e-4 and (shifted - recorded[:len(shifted)]).abs().max() > .1


def test_a_trainer_with_that_mistake_says_so_in_its_first_step(tmp_path, monkeypatch):
    "On-policy ratios are 1; scores one off show in the run's own metrics. (With a KL term, since rows that cannot teach anything are left out otherwise.)"
    ratio = lambda name: trainer(tmp_path/name, unify_rl.load_policy("tiny-janus"), Trainer, **{"objective.beta": 1e-3}).step()["objective/ratio_mean"]
    assert abs(ratio("right") - 1) < 1e-4
    monkeypatch.setattr(J, "states_before", extend)                         # the states after the tokens
    assert abs(ratio("wrong") - 1) > .05


@pytest.mark.parametrize("name", ["tiny-janus", "tiny-bagel"])
def test_answers_of_one_token_call_every_layer_as_often_as_longer_ones(name):
    "Where parameters are gathered layer by layer, a process that calls a layer less often than the others would leave them waiting."
    policy, prompts = unify_rl.load_policy(name), question_prompts("train", 2)
    calls, scores = [], []
    for T in (1, 3):
        part = policy.sample(prompts, 2, torch.Generator().manual_seed(0), max_text=T).parts[0]
        seen = []
        hooks = [m.register_forward_hook(lambda *_, n=n: seen.append(n)) for n, m in policy.named_modules()]
        scores.append((policy(part).exp() / part.logp_old.exp())[part.mask].detach())
        for h in hooks: h.remove()
        calls.append(sorted(seen))
    assert calls[0] == calls[1]
    assert all((r - 1).abs().max() < 1e-4 for r in scores)
