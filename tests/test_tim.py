"""Text-image matching: by hand, by a loop, wherever the padding is, whoever stands beside it; frozen and live referees; the trainer's hook."""
import numpy as np
import pytest
import torch
from PIL import Image

import unify_rl.run as R
from unify_rl.core import Prompt, Rollout, UserError
from unify_rl.policies.base import Policy
from unify_rl.policies.janus import new_janus
from unify_rl.policies.load import load_policy
from unify_rl.rewards.tim import both_ways, match_maps, tim_reward
from unify_rl.rewards.verifiable import build_rewards, score
from unify_rl.train.pretrain import vocabulary
from unify_rl.world.prompts import draw_prompts

TEXTS = ["a red circle", "draw two blue squares left of a green cross", "a cross"]

@pytest.fixture(scope="module")
def policy(): return new_janus(vocabulary(), layers=2, hidden=32, seed=1)

def pictures(n=3): return list(np.random.default_rng(0).integers(0, 256, (n, 24, 24, 3), dtype=np.uint8))
def ask(reward, texts, images):
    prompts = [Prompt(str(i), "generate", t) for i, t in enumerate(texts)]
    return reward(prompts, Rollout(prompts, 1, [], [None] * len(images), images))

def loop(states, mask, is_image):
    unit = [s / s.norm() for s in states.double()]
    image, text = ([u for u, m, i in zip(unit, mask, is_image) if m and i == side] for side in (True, False))
    return tuple(sum(max(float(a @ b) for b in other) for a in one) / len(one) for one, other in ((image, text), (text, image)))

def test_four_cosines_by_hand():
    states = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [4.0, 3.0]]])                 # cosines 1, .8 / 0, .6
    seen, said = both_ways(states, torch.ones(1, 4).bool(), torch.tensor([[True, True, False, False]]))
    assert float(seen) == pytest.approx(0.8) and float(said) == pytest.approx(0.9)

@pytest.mark.parametrize("seed", range(3))
def test_as_in_a_loop_wherever_the_tokens_stand(seed):
    g = torch.Generator().manual_seed(seed)
    states, mask, is_image = torch.randn(4, 11, 6, generator=g), torch.rand(4, 11, generator=g) < 0.7, torch.rand(4, 11, generator=g) < 0.5
    mask[:, :2], is_image[:, 0], is_image[:, 1] = True, True, False
    for b, got in enumerate(zip(*both_ways(states, mask, is_image))): assert [float(x) for x in got] == pytest.approx(loop(states[b], mask[b], is_image[b]), abs=1e-5)
    order = torch.randperm(11, generator=g)
    for a, b in zip(both_ways(states, mask, is_image), both_ways(states[:, order], mask[:, order], is_image[:, order])): assert torch.allclose(a, b, atol=1e-6)

@pytest.mark.parametrize("filling", [0.0, 1e4, float("nan")])
def test_padding_on_either_side_changes_nothing(filling):
    real, pad = torch.randn(2, 7, 5), torch.full((2, 4, 5), filling)
    yes, no = torch.ones(2, 7).bool(), torch.zeros(2, 4).bool()
    image = torch.arange(7).expand(2, 7) < 3
    alone = both_ways(real, yes, image)
    for k in (1, -1):
        padded = both_ways(*(torch.cat(x[::k], 1) for x in ([pad, real], [no, yes], [~no, image])))
        for a, b in zip(alone, padded): assert torch.allclose(a, b, atol=1e-6)

def test_a_side_without_tokens_has_no_score():
    states, mask = torch.randn(3, 4, 5), torch.ones(3, 4).bool()
    mask[2] = False
    is_image = torch.tensor([[True] * 4, [False] * 4, [True, True, False, False]])
    assert all(x.isnan().all() for x in both_ways(states, mask, is_image))

def test_half_precision_is_not_compared_in_half_precision():
    states = torch.randn(1, 6, 64)
    image = torch.tensor([[True] * 3 + [False] * 3])
    a, b = (torch.stack(both_ways(s, torch.ones(1, 6).bool(), image)) for s in (states.bfloat16(), states.bfloat16().float()))
    assert torch.equal(a, b)

# -- the policy's states

def test_states_of_the_right_tokens(policy):
    states, mask, is_image = policy.token_states(pictures(), TEXTS)
    words = [len(t.split()) for t in TEXTS]
    assert is_image.sum(1).tolist() == [36] * 3 and (mask & ~is_image).sum(1).tolist() == words and states.isfinite().all()
    assert not policy.token_states(pictures(1), [""])[1][0].logical_and(~policy.token_states(pictures(1), [""])[2][0]).any()

def test_neighbors_and_their_lengths_do_not_matter(policy):
    together = policy.token_states(pictures(), TEXTS)
    for b, (im, t) in enumerate(zip(pictures(), TEXTS)):
        states, mask, is_image = (x[0] for x in policy.token_states([im], [t]))
        assert torch.allclose(together[0][b][together[1][b]], states[mask], atol=1e-4)
        assert torch.equal(together[2][b][together[1][b]], is_image[mask])

def test_states_are_the_models_last_ones(policy):
    "Against transformers' own forward pass of the same sequence, put together by hand."
    im, text, tok = pictures(1)[0], TEXTS[0], policy.tokenizer
    ids = tok(f"<|User|>: {tok.boi_token}{tok.image_token * 36}{tok.eoi_token}\n{text}", return_tensors="pt")["input_ids"]
    pixels = torch.from_numpy(im)[None].permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad(): want = policy.janus(input_ids=ids, pixel_values=pixels, output_hidden_states=True).hidden_states[-1][0]
    states, mask, is_image = (x[0] for x in policy.token_states([im], [text]))
    n = len(text.split())
    assert torch.allclose(states[mask & ~is_image], want[-n:], atol=1e-4)
    assert torch.allclose(states[is_image], want[ids[0] == policy.janus.config.image_token_id], atol=1e-4)

def test_maps_hold_the_same_cosines(policy):
    words, maps = match_maps(policy, pictures(1)[0], TEXTS[0])
    seen, said = both_ways(*policy.token_states(pictures(1), TEXTS[:1]))
    assert words == TEXTS[0].split() and maps.shape == (3, 6, 6)
    assert float(said) == pytest.approx(maps.max((1, 2)).mean(), abs=1e-5) and float(seen) == pytest.approx(maps.max(0).mean(), abs=1e-5)

def test_a_text_beyond_the_context(policy):
    with pytest.raises(UserError, match="context of 256"): policy.token_states(pictures(1), ["circle " * 300])

# -- the reward

def test_missing_pictures_and_empty_prompts_are_skipped_and_counted(policy):
    reward = tim_reward("live", batch=2)
    reward.attach(policy)
    images = [*pictures(3), None]
    prompts = [Prompt(str(i), "generate", t) for i, t in enumerate([*TEXTS, "a dog"])]
    table = score([reward], prompts, Rollout(prompts, 1, [], [None] * 4, images))
    assert table.scores_RB.isfinite().tolist() == [[True, True, True, False]] and table.errors == {"tim": 1}
    assert "no picture" in table.reasons[0][3] and "picture to text" in table.reasons[0][0]
    singly = [ask(reward, [t], [im]).values[0] for t, im in zip(TEXTS, images)]
    assert table.scores_RB[0, :3].tolist() == pytest.approx(singly, abs=1e-5)
    object.__setattr__(prompts[0], "text", "\n")                     # a prompt that the tokenizer makes nothing of
    assert "no tokens" in reward(prompts[:1], Rollout(prompts[:1], 1, [], [None], images[:1])).reasons[0]

@pytest.mark.parametrize("lora", [False, True])
def test_the_frozen_referee_stays_and_the_live_one_moves(lora):
    policy = new_janus(vocabulary(), layers=1, hidden=32, seed=2)
    if lora: policy.add_lora(4, 8, ["q_proj", "o_proj", "down_proj"])
    else: policy.train_only(["language_model"])
    frozen, live = tim_reward(), tim_reward("live")
    frozen.attach(policy); live.attach(policy)
    before = ask(frozen, TEXTS, pictures()).values
    assert ask(live, TEXTS, pictures()).values == pytest.approx(before, abs=1e-5)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad: p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert ask(frozen, TEXTS, pictures()).values == pytest.approx(before, abs=1e-6)
    assert np.abs(ask(live, TEXTS, pictures()).values - before).min() > 1e-3

def test_faults(policy):
    with pytest.raises(UserError, match=r"attach\(policy\)"): ask(tim_reward(), TEXTS[:1], pictures(1))
    with pytest.raises(UserError, match="Did you mean 'frozen'"): build_rewards([dict(name="tim", settings=dict(referee="frozne"))])
    class Blind(Policy): name = "blind"
    with pytest.raises(UserError, match="blind has no common states"): tim_reward().attach(Blind())

def test_the_trainer_attaches_the_policy_and_its_reward_is_of_the_start(tmp_path, monkeypatch):
    folder = tmp_path/"tiny"
    new_janus(vocabulary(), layers=1, hidden=32).save_pretrained(folder)
    monkeypatch.setattr(R, "write_report", lambda run_dir: run_dir/"report.html")
    run = R.train("grpo", folder, run_dir=tmp_path/"run", progress=False, steps=2, seed=1, prompts=draw_prompts("train", 4), data=dict(tasks=dict(generate=1)),
                  rollout=dict(prompts=2, group_size=3), optimizer=dict(lr=1e-2), overrides=["rewards=[{name: tim}]", "evaluate.suites=[]", "log.groups_every=1", "objective.beta=0"])
    start = load_policy(folder)
    reward = tim_reward("live")
    reward.attach(start)
    rows = run.groups(2)
    images = [np.asarray(Image.open(run.dir/name).convert("RGB")) for name in rows["image"]]
    assert rows["raw_tim"].std() > 0 and ask(reward, list(rows["prompt"]), images).values == pytest.approx(rows["raw_tim"].to_numpy(), abs=1e-4)
    moved = tim_reward("live")
    moved.attach(run.policy())
    assert np.abs(ask(moved, list(rows["prompt"]), images).values - rows["raw_tim"].to_numpy()).max() > 1e-3
