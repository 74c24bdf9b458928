"""SigLIP rewards and the shipped referee: parity with open_clip and timm, independence of batch mates, faults, and what the asset knows."""
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import unify_rl
from unify_rl.core import Prompt, Rollout, UserError, rng_for
from unify_rl.rewards.siglip import NO_PHRASES, PATHS, Referee, load_siglip, new_siglip, patch_vectors, register_trunks, siglip_reward
from unify_rl.rewards.verifiable import build_rewards, score
from unify_rl.train.config import RewardConfig
from unify_rl.train.pretrain import pretrain
from unify_rl.train.referee import NEGATIVES, hard_accuracy, hard_pairs, near_misses, referee_batch
from unify_rl.world.prompts import CATEGORIES, captioned, combinations, draw_prompts, is_held_out, split_combinations
from unify_rl.world.scenes import World, render_batch

ASSET = Path(unify_rl.__file__).parent/"assets"/"tiny-siglip"
WORDS = "a red blue green circle square left of".split()

@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("referee")
    new_siglip(WORDS, folder, seed=3)
    return folder

@pytest.fixture(scope="module")
def random_siglip(random_folder): return load_siglip(str(random_folder))

# -- the patch map

@pytest.mark.parametrize("norm", [None, torch.nn.LayerNorm])
def test_patch_map_is_the_full_head_on_one_token(norm):
    from timm.layers import AttentionPoolLatent
    torch.manual_seed(0)
    head = AttentionPoolLatent(48, num_heads=4, mlp_ratio=4.0, norm_layer=norm).double()
    for p in head.parameters(): torch.nn.init.normal_(p, std=0.3)
    tokens = torch.randn(2, 5, 48, dtype=torch.float64)
    alone = torch.stack([head(tokens[:, p:p+1]) for p in range(5)], 1)
    assert (patch_vectors(head, tokens) - alone).abs().max() < 1e-12
    assert (patch_vectors(head, tokens, "value") - alone).abs().max() > 1e-2
    assert (patch_vectors(head, tokens).mean(1) - head(tokens)).abs().max() > 1e-2           # pooling is not a mean of patches

def test_value_path_is_linear(random_siglip):
    pool, x = random_siglip.trunk.attn_pool, torch.randn(2, 3, 96)
    f = lambda z: patch_vectors(pool, z, "value") - patch_vectors(pool, torch.zeros_like(z), "value")
    assert torch.allclose(f(2 * x[:1]) + f(x[1:]), f(2 * x[:1] + x[1:]), atol=1e-5)

# -- parity with open_clip

def test_same_as_open_clip_from_the_same_folder(random_folder, random_siglip):
    import open_clip
    from PIL import Image
    register_trunks()
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{random_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{random_folder}")
    rng = np.random.default_rng(0)
    texts = ["a red circle", "a square left of a circle"]
    for shape in ((24, 24), (40, 56)):
        images = rng.integers(0, 256, (2, *shape, 3), dtype=np.uint8)
        smooth = np.stack([np.asarray(Image.fromarray(i).resize((6, 6)).resize(shape[::-1], Image.BICUBIC)) for i in images])
        with torch.no_grad():
            want = model.encode_image(torch.stack([preprocess(Image.fromarray(i)) for i in smooth]), normalize=True)
            got = random_siglip.pooled(random_siglip.tokens(smooth))
            assert torch.allclose(random_siglip.texts(texts), model.encode_text(tokenizer(texts), normalize=True), atol=1e-6)
        assert torch.allclose(got, want, atol=1e-6 if shape == (24, 24) else 0.02)           # PIL rounds to bytes after resizing

def test_save_and_load_give_the_same_model(random_folder, random_siglip, tmp_path):
    random_siglip.save_pretrained(tmp_path, random_folder)
    again = load_siglip(str(tmp_path))
    a, b = random_siglip.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.tokenizer(["a red circle"]).tolist() == random_siglip.tokenizer(["a red circle"]).tolist()

# -- the rewards

def _batch(n=7):
    prompts = draw_prompts("test", n, seed=5)
    prompts[1] = replace(prompts[1], key_phrases=())
    images = list(render_batch(captioned(prompts, World(), rng_for("test siglip"), 0.5), World()))
    images[2] = np.kron(images[2], np.ones((2, 2, 1), np.uint8))
    return prompts, images

@pytest.mark.parametrize("form", ("dense", "global", "mean"))
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_formula_one_sample_at_a_time(random_siglip, form, path):
    from unify_rl.rewards.siglip import phrases_of
    prompts, images = _batch()
    got = siglip_reward("x", Referee(random_siglip), form, path)(prompts, Rollout(prompts, 1, [], [None] * 7, images)).values
    want, s = [], random_siglip
    with torch.no_grad():
        for p, im in zip(prompts, images):
            tokens = s.tokens(im[None])
            whole = float(s.pooled(tokens)[0] @ s.texts([p.text])[0])
            best = [max(float(v @ s.texts([k])[0]) for v in s.patches(tokens, path)[0]) for k in phrases_of(p)]
            want.append(dict(dense=np.mean(best), **{"global": whole}, mean=(np.mean(best) + whole) / 2)[form])
    assert np.abs(got - want).max() < 1e-5

def test_a_score_does_not_depend_on_neighbours(random_siglip):
    prompts, images = _batch()
    reward = siglip_reward("x", Referee(random_siglip), "mean")
    together = reward(prompts, Rollout(prompts, 1, [], [None] * 7, images)).values
    order = [4, 0, 6]
    some = reward([prompts[i] for i in order], Rollout([prompts[i] for i in order], 1, [], [None] * 3, [images[i] for i in order])).values
    assert np.abs(together[order] - some).max() < 1e-5

def test_no_phrases_and_no_picture_are_counted_not_zero(random_siglip):
    prompts, images = _batch(3)
    prompts[0] = Prompt("empty/0", "generate", "the of")
    images[1] = None
    reward = siglip_reward("grounding", Referee(random_siglip))
    table = score([reward], prompts, Rollout(prompts, 1, [], [None] * 3, images))
    assert table.scores_RB.isnan().tolist() == [[True, True, False]] and table.errors == {"grounding": 2}
    assert table.reasons[0][:2] == [NO_PHRASES, "there is no picture"]
    with pytest.raises(UserError, match="empty/0"): score([reward], prompts, Rollout(prompts, 1, [], [None] * 3, images), "stop")

def test_all_prompts_without_phrases(random_siglip):
    prompts = [Prompt(f"e/{i}", "generate", "the of") for i in range(2)]
    images = list(np.zeros((2, 24, 24, 3), np.uint8))
    for form in ("dense", "mean"):
        got = siglip_reward("x", Referee(random_siglip), form)(prompts, Rollout(prompts, 1, [], [None] * 2, images))
        assert np.isnan(got.values).all() and NO_PHRASES in got.reasons[0]

def test_from_a_recipe(random_folder):
    specs = [asdict(RewardConfig("semantic", 1.0, dict(model=str(random_folder), form="global"))), asdict(RewardConfig("grounding", 0.5, dict(model=str(random_folder))))]
    rewards, weights = build_rewards(specs)
    prompts, images = _batch()
    table = score(rewards, prompts, Rollout(prompts, 1, [], [None] * 7, images))
    assert table.scores_RB.shape == (2, 7) and table.scores_RB.isfinite().all() and weights.tolist() == [1.0, 0.5]
    assert all(r.cost == "model" for r in rewards)

# -- faults

def _broken(folder, tmp_path, harm):
    shutil.copytree(folder, tmp_path/"m")
    harm(tmp_path/"m")
    return str(tmp_path/"m")

def _not_siglip(folder):
    config = json.loads((folder/"open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = dict(image_size=24, patch_size=4, width=64, layers=1, head_width=32)
    config["model_cfg"]["embed_dim"] = 32
    (folder/"open_clip_config.json").write_text(json.dumps(config))
    import open_clip
    from safetensors.torch import save_file
    model = open_clip.CustomTextCLIP(**{k: v for k, v in config["model_cfg"].items() if k != "custom_text"})
    save_file(model.state_dict(), folder/"open_clip_model.safetensors")

@pytest.mark.parametrize("harm, says", [
    (lambda f: (f/"open_clip_config.json").unlink(), "no open_clip_config.json"),
    (lambda f: (f/"open_clip_config.json").write_text("{"), "could not be loaded"),
    (lambda f: (f/"open_clip_model.safetensors").unlink(), "could not be loaded"),
    (lambda f: (f/"open_clip_model.safetensors").write_bytes((f/"open_clip_model.safetensors").read_bytes()[:5000]), "could not be loaded"),
    (lambda f: (f/"tokenizer.json").unlink(), "could not be loaded"),
    (_not_siglip, "not of SigLIP's type"),
])
def test_broken_folders_are_one_sentence(random_folder, tmp_path, harm, says):
    with pytest.raises(UserError, match=says): load_siglip(_broken(random_folder, tmp_path, harm))

def test_weights_that_are_no_numbers(random_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    def harm(folder):
        file = folder/"open_clip_model.safetensors"
        w = load_file(file)
        w["visual.trunk.attn_pool.kv.weight"][0, 0] = float("nan")
        save_file(w, file)
    with pytest.raises(UserError, match="not all finite"): load_siglip(_broken(random_folder, tmp_path, harm))

# -- the split, and the recipe

def test_training_batches_hold_no_held_out_combination(monkeypatch):
    from unify_rl.train import referee
    seen = []
    monkeypatch.setattr(referee, "caption", lambda cat, c, rng: seen.append((cat, c)) or "x")
    for s in range(20): referee_batch(World(), rng_for("split", s))
    assert len(seen) > 1000 and not any(is_held_out(c) for _, c in seen)
    assert all(is_held_out(c) for cat in CATEGORIES for c in split_combinations(cat, "test"))

def test_phrases_hold_no_held_out_combination():
    from unify_rl.train.referee import known_phrases
    from unify_rl.world.prompts import key_phrases, phrase
    held = {k for cat in ("counting", "position") for c in split_combinations(cat, "test") for k in (*key_phrases(cat, c), phrase(cat, c)) if len(k.split()) > 2}
    assert len(held) > 20 and not held & set(known_phrases())

def test_swapped_captions_are_in_every_batch():
    _, texts, truth_BT, patch_BPF = referee_batch(World(), rng_for("swaps"))
    swapped = sum(a != b and sorted(a.split()) == sorted(b.split()) for a, b in _plain_pairs(texts))
    assert swapped >= 16 and truth_BT.shape == (160, 128) and patch_BPF.shape == (160, 36, 19)

def _plain_pairs(texts):
    "The captions at the head of each family and the first near miss, without template words."
    frame = set("a an photo picture image drawing sketch of draw paint show me please create on white paper in simple style".split())
    plain = [" ".join(w for w in t.split() if w not in frame) for t in texts]
    return zip(plain[::4], plain[1::4])

@pytest.mark.parametrize("text", ("circle", "red circle", "left of", "a circle left of", "left of a square", "two red circle", "top left"))
def test_phrases_are_where_their_things_are(text):
    "Patch labels against the scene itself, in words that share no code with them."
    from unify_rl.train.referee import patch_facts, phrase_truth
    from unify_rl.world.scenes import place, random_scene, relations
    world, rng = World(), rng_for("labels", text)
    says = {"circle": lambda t, s: t.shape == "circle", "red circle": lambda t, s: (t.shape, t.color) == ("circle", "red"),
            "left of": lambda t, s: any("left of" in relations(t.box(world), u.box(world)) for u in s if u is not t),
            "a circle left of": lambda t, s: t.shape == "circle" and any("left of" in relations(t.box(world), u.box(world)) for u in s if u is not t),
            "left of a square": lambda t, s: any(u.shape == "square" and "left of" in relations(t.box(world), u.box(world)) for u in s if u is not t),
            "two red circle": lambda t, s: (t.shape, t.color) == ("circle", "red") and sum((u.shape, u.color) == ("circle", "red") for u in s) == 2,
            "top left": lambda t, s: place(t.box(world), world.size) == "top left"}[text]
    seen = 0
    for _ in range(300):
        scene = random_scene(world, rng, kinds=[("circle", "red")] * int(rng.integers(0, 3)) + [("square", "blue")] * int(rng.integers(0, 2)) + [("cross", "green")])
        want = np.zeros((24, 24), bool)
        for t in scene: want[t.y:t.y + 8, t.x:t.x + 8] = says(t, scene)
        got = phrase_truth(patch_facts(scene, world)[None], (text,))[0, :, 0].reshape(6, 6).repeat(4, 0).repeat(4, 1)
        assert (got == want).all(), scene
        seen += want.any()
    assert seen > 10

def test_every_combination_has_a_near_miss_that_is_another_one():
    for cat in CATEGORIES:
        for c in combinations(cat):
            misses = near_misses(cat, c)
            assert misses and all(m != c and m in combinations(cat) for ms in misses.values() for m in ms)

def test_pretrain_rebuilds_and_continues(tmp_path):
    stages = []
    out = pretrain("tiny-siglip", tmp_path/"out", seed=1, work=tmp_path/"work", steps=1, track=lambda stage, s, total, l: stages.append((stage, s, total)))
    assert stages == [("referee", 0, 1)] and load_siglip(str(out)).tokenizer(["red"]).shape == (1, 20)
    pretrain("tiny-siglip", tmp_path/"again", seed=1, work=tmp_path/"work", steps=1, track=lambda *a: stages.append(a))
    assert len(stages) == 1
    assert (tmp_path/"again"/"open_clip_model.safetensors").read_bytes() == (out/"open_clip_model.safetensors").read_bytes()

# -- the asset

def test_the_asset_is_small_and_plain():
    files = {f.name: f.stat().st_size for f in ASSET.iterdir()}
    assert set(files) == {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) < 3 * 2**20

@pytest.mark.parametrize("kind", NEGATIVES)
def test_the_asset_tells_hard_negatives_apart_on_held_out_combinations(kind):
    pairs = hard_pairs(kind, 3)
    assert all(right != wrong and not np.array_equal(a, b) for right, wrong, a, b in pairs)
    text, picture = hard_accuracy(load_siglip("tiny-siglip"), (kind,), n=300)[kind]
    assert text >= 0.9 and picture >= 0.9, f"{kind}: picture -> text {text:.3f}, text -> picture {picture:.3f}"

def test_a_random_referee_does_not(random_siglip):
    assert max(hard_accuracy(random_siglip, ("relation",), n=100)["relation"]) < 0.75

@pytest.mark.parametrize("form", ("dense", "global"))
def test_the_reward_prefers_right_pictures(form):
    prompts = draw_prompts("test", 120, seed=9)
    right = render_batch(captioned(prompts, World(), rng_for("right")), World())
    other = [right[(i + len(CATEGORIES)) % len(right)] for i in range(len(right))]
    reward = siglip_reward("x", Referee(load_siglip("tiny-siglip")), form)
    a, b = (reward(prompts, Rollout(prompts, 1, [], [None] * 120, list(x))).values for x in (right, other))
    assert (a > b).mean() > 0.9

# -- the judge of the knowledge reward

JANUS = str(ASSET.parent/"tiny-janus")
WORDING = dict(yes="yes", no="no", question="is there a {phrase}?")

def test_a_judge_by_transformers_does_not_depend_on_padding():
    from unify_rl.rewards.knowledge import Wording, load_judge
    judge = load_judge(JANUS, Wording(**WORDING))
    images = list(np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8))
    questions = ["is there a red circle?", "how many green crosses are there? think first, then answer.", "what shape is the red thing?"]
    together = judge(questions, images)
    alone = torch.cat([judge([q], [im]) for q, im in zip(questions, images)])
    assert (together - alone).abs().max() < 1e-5 and ((0 < together) & (together < 1)).all()
    assert not torch.allclose(together, judge(questions, images[::-1]), atol=1e-6)             # it looks at the pictures

@pytest.mark.parametrize("no", ["no", "there is none"])
def test_a_policy_judge_says_what_its_own_forward_says(no):
    from unify_rl.policies.load import load_policy
    from unify_rl.rewards.knowledge import PolicyJudge, Wording
    policy, word = load_policy("tiny-janus"), Wording("{phrase}", "<answer> {} </answer>", "yes", no, "ratio")
    image = np.full((24, 24, 3), 255, np.uint8)
    got = PolicyJudge(policy, word)(["is there a red circle?"], [image])
    def logp(text):
        part = policy.encode([Prompt("x", "answer", "is there a red circle?", image=image)], [text], [None]).parts[0]
        return float(policy(part).sum())
    y, n = logp("<answer> yes </answer>"), logp(f"<answer> {no} </answer>")
    assert abs(float(got) - np.exp(y) / (np.exp(y) + np.exp(n))) < 1e-5
    assert not any(p.requires_grad for p in policy.parameters())

def test_a_judge_is_asked_only_what_it_knows():
    from unify_rl.rewards.knowledge import WORDINGS, questions_of
    asks = lambda *phrases: questions_of(Prompt("x", "generate", "?", key_phrases=phrases), WORDINGS["tiny-janus"])
    assert asks("three orange cross", "orange cross", "left of", "circle") == ["is there an orange cross? think first, then answer."]
    reward, _ = build_rewards([dict(name="knowledge")])
    prompts, images = _batch(3)
    prompts = [replace(prompts[0], key_phrases=("left of", "circle")), replace(prompts[0], key_phrases=("red circle", "left of"))]
    table = score(reward, prompts, Rollout(prompts, 1, [], [None] * 2, images[:2]))
    assert table.scores_RB.isfinite().tolist() == table.applies_RB.tolist() == [[False, True]] and not table.errors

def test_a_judge_without_a_yes_token_and_other_faults(tmp_path):
    with pytest.raises(UserError, match="no single token for 'Yes'"): build_rewards([dict(name="knowledge", settings=dict(model=JANUS))])
    with pytest.raises(UserError, match="could not be loaded as an image-text-to-text model"):
        build_rewards([dict(name="knowledge", settings=dict(model=str(tmp_path)))])
    rewards, _ = build_rewards([dict(name="knowledge", settings=dict(model=JANUS, **WORDING))])
    prompts, images = _batch(3)
    assert score(rewards, prompts, Rollout(prompts, 1, [], [None] * 3, [images[0]] * 3)).scores_RB.isfinite().tolist() == [[True, False, True]]
