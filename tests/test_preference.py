"""CLIP score and HPSv2: conventions by hand, torchmetrics, the official preparation, files of the official names and shapes, and failures that stay failures."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF

import unify_rl.rewards.preference as P
from unify_rl.core import Prompt, Rollout, UserError, rng_for
from unify_rl.rewards.siglip import Referee
from unify_rl.rewards.verifiable import build_rewards, score
from unify_rl.world.prompts import captioned, draw_prompts
from unify_rl.world.scenes import World, render_batch

def ask(reward, texts, images):
    prompts = [Prompt(f"p/{i}", "generate", t) for i, t in enumerate(texts)]
    return score([reward], prompts, Rollout(prompts, 1, [], [None] * len(images), list(images)))

# -- a model that can be computed by hand

class Towers(torch.nn.Module):
    "A picture's vector is (red - blue, green - blue) of its first pixel, a text's is that of its name; both scaled to length one."
    names = {"east": (1.0, 0.0), "north": (0.6, 0.8), "a photo depicts east": (0.0, 1.0)}
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.texts, self.batches, self.modes = [], [], []
    def encode_text(self, ids, normalize):
        self.texts += [list(self.names)[i] for i in ids]
        return F.normalize(torch.tensor([list(self.names.values())[i] for i in ids]), dim=-1) + self.weight
    def encode_image(self, x, normalize):
        self.batches.append(len(x)); self.modes.append((self.training, torch.is_grad_enabled()))
        return F.normalize(x[:, :2, 0, 0] - x[:, 2:, 0, 0], dim=-1) + self.weight

LOOK = dict(size=(2, 2), mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bicubic", resize_mode="squash")
def towers(): return Referee(P.Clip(Towers(), lambda texts: torch.tensor([list(Towers.names).index(t) for t in texts]), "fake", LOOK))
def sheet(*color, size=(2, 2)): return np.full((*size, 3), color, np.uint8)
BY_HAND = [sheet(204, 153, 0), sheet(0, 153, 153), sheet(0, 255, 0)]          # (.8, .6), (-1, 0), (0, 1)

@pytest.mark.parametrize("name, east, north", [
    ("cosine", (.8, -1, 0), (.96, -.6, .8)), ("ulm_r1", (1.6, -2, 0), (1.92, -1.2, 1.6)),
    ("hessel", (2, 0, 0), (2.4, 0, 2)), ("torchmetrics", (80, 0, 0), (96, 0, 80))])
def test_conventions_by_hand(name, east, north):
    reward = P.match_reward("x", towers(), P.CONVENTIONS[name])
    table = ask(reward, ["east"] * 3 + ["north"] * 3, BY_HAND * 2)
    assert table.scores_RB[0].tolist() == pytest.approx([*east, *north], abs=1e-5)
    assert ("clamped" in table.reasons[0][1]) == (name in ("hessel", "torchmetrics")) and "clamped" not in table.reasons[0][0]

def test_the_scale_of_hps_is_one_or_a_hundred():
    got = {k: ask(P.match_reward("hps", towers(), c), ["east"] * 2, BY_HAND[:2]).scores_RB[0].tolist() for k, c in P.HPS_CONVENTIONS.items()}
    assert got["cosine"] == pytest.approx([.8, -1], abs=1e-5) and got["benchmark"] == pytest.approx([80, -100], abs=1e-3)

def test_a_prefix_is_part_of_the_text():
    judge = towers()
    reward = P.match_reward("x", judge, P.CONVENTIONS["cosine"], "A photo depicts")
    assert ask(reward, ["east"], BY_HAND[:1]).scores_RB.item() == pytest.approx(.6, abs=1e-5)
    assert judge.siglip.model.texts == ["a photo depicts east"]

def test_a_group_is_one_text_and_one_batch_and_a_text_is_remembered():
    judge = towers()
    reward = P.match_reward("x", judge, P.CONVENTIONS["cosine"])
    for _ in range(2): ask(reward, ["east"] * 4 + ["north"] * 4, [BY_HAND[i % 3] for i in range(8)])
    model = judge.siglip.model
    assert model.texts == ["east", "north"] and model.batches == [8, 8] and set(model.modes) == {(False, False)}

def test_sizes_are_mixed_in_one_batch():
    judge = towers()
    images = [sheet(204, 153, 0, size=s) for s in ((2, 2), (5, 3), (2, 2), (1, 9))]
    assert ask(P.match_reward("x", judge, P.CONVENTIONS["cosine"]), ["east"] * 4, images).scores_RB[0].tolist() == pytest.approx([.8] * 4, abs=1e-4)
    assert judge.siglip.model.batches == [4]

# -- the shipped model

def drawings(n=6):
    prompts = draw_prompts("test", n, seed=5)
    return prompts, list(render_batch(captioned(prompts, World(), rng_for("preference test")), World()))

def test_one_by_one_is_the_same_as_together():
    prompts, images = drawings()
    images[2] = np.kron(images[2], np.ones((2, 3, 1), np.uint8))
    (reward,), _ = build_rewards([dict(name="clip_score")])
    together = ask(reward, [p.text for p in prompts], images).scores_RB[0]
    alone = torch.cat([ask(reward, [p.text], [im]).scores_RB[0] for p, im in zip(prompts, images)])
    assert (together - alone).abs().max() < 1e-6 and together.std() > 0.01

def test_the_stand_in_is_the_global_semantic_reward():
    prompts, images = drawings()
    rewards, _ = build_rewards([dict(name="semantic", settings=dict(form="global")), dict(name="clip_score"), dict(name="hps")])
    table = score(rewards, prompts, Rollout(prompts, 1, [], [None] * 6, images))
    assert (table.scores_RB[1:] - table.scores_RB[0]).abs().max() < 1e-5
    assert "stand-in" in table.reasons[2][0] and all(r.cost == "model" and r.tasks == ("generate", "joint") for r in rewards)

def test_as_in_torchmetrics():
    from torchmetrics.functional.multimodal import clip_score
    prompts, images = drawings()
    clip = P.clip_judge("tiny-siglip", "", "cpu").siglip
    class Model(torch.nn.Module):
        config = None
        def get_image_features(self, x): return 3 * clip.model.encode_image(x, normalize=False)          # they normalise
        def get_text_features(self, ids, mask): return 5 * clip.model.encode_text(ids, normalize=False)
    def processor(text=None, images=None, **kw):
        if text is None: return dict(pixel_values=clip.prepare(np.stack([im.permute(1, 2, 0).numpy() for im in images])))
        return dict(input_ids=(ids := clip.tokenizer([t.lower() for t in text])), attention_mask=torch.ones_like(ids))
    (reward,), _ = build_rewards([dict(name="clip_score", settings=dict(convention="torchmetrics"))])
    texts, pictures = [p.text for p in prompts] * 2, images + images[::-1]
    with torch.no_grad():
        theirs = [clip_score(torch.from_numpy(im).permute(2, 0, 1), t, lambda: (Model(), processor)).item() for t, im in zip(texts, pictures)]
    ours = ask(reward, texts, pictures).scores_RB[0].tolist()
    assert ours == pytest.approx(theirs, abs=1e-3) and min(ours) == 0 < max(ours)

# -- pictures

@pytest.mark.parametrize("shape", [(24, 24), (30, 30), (31, 24), (24, 31), (7, 50), (101, 64), (13, 11)])
@pytest.mark.parametrize("mode", P.MODES)
def test_fitted_as_by_torchvision(shape, mode):
    x, h = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)), 24
    kw = dict(interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    if mode == "squash": want = TF.resize(x, (h, h), **kw)
    elif mode == "shortest": want = TF.center_crop(TF.resize(x, h, **kw), h)
    else:
        new = [round(side * (h / max(shape))) for side in shape]
        high, wide = h - new[0], h - new[1]
        want = TF.pad(TF.resize(x, new, **kw), [wide // 2, high // 2, wide - wide // 2, high - high // 2])
    assert torch.allclose(P.fit(x, (h, h), mode), want, atol=1e-5)

def test_a_long_thin_picture_keeps_a_pixel():
    y = P.fit(torch.ones(1, 3, 1, 500), (24, 24), "longest")
    assert y.shape == (1, 3, 24, 24) and (y.sum((1, 2, 3)) > 0).all() and P.fit(torch.ones(1, 3, 500, 1), (24, 24), "shortest").shape == (1, 3, 24, 24)

def test_gray_and_transparent_pictures_are_seen_as_a_person_sees_them():
    prompts, images = drawings(2)
    (reward,), _ = build_rewards([dict(name="clip_score")])
    text = prompts[0].text
    see = lambda *ims: ask(reward, [text] * len(ims), ims).scores_RB[0]
    gray = images[0].mean(2).astype(np.uint8)
    assert torch.allclose(*see(gray, gray[..., None].repeat(3, 2)).split(1), atol=1e-6)
    paper = (images[0] == 255).all(2)
    hidden = np.where(paper[..., None], 17, images[0]).astype(np.uint8)               # other colors where nothing is opaque
    glass = np.concatenate([hidden, np.where(paper, 0, 255).astype(np.uint8)[..., None]], 2)
    assert torch.allclose(*see(glass, images[0]).split(1), atol=1e-6) and not torch.allclose(*see(hidden, images[0]).split(1), atol=1e-3)

@pytest.mark.parametrize("image", [None, np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)],
                         ids=["none", "floats", "empty", "two channels", "a film"])
def test_no_picture_is_a_failure_with_a_reason(image):
    prompts, images = drawings(2)
    (reward,), _ = build_rewards([dict(name="clip_score")])
    table = ask(reward, [p.text for p in prompts], [images[0], image])
    assert table.scores_RB.isnan().tolist() == [[False, True]] and "no picture" in table.reasons[0][1] and table.errors == {"clip_score": 1}
    assert ask(reward, [prompts[0].text], [image]).scores_RB.isnan().all()

def test_an_empty_prompt_cannot_be_asked():
    for text in ("", "  \n"):
        with pytest.raises(UserError, match="the text is empty"): Prompt("e/0", "generate", text)

# -- HPSv2's files

ARCH = dict(embed_dim=16, vision_cfg=dict(image_size=28, layers=1, width=32, head_width=16, patch_size=14),
            text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=2))

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A model of HPSv2's kind, made by open_clip."
    import open_clip
    file = tmp_path_factory.mktemp("arch")/"small-hps.json"
    file.write_text(json.dumps(ARCH))
    open_clip.add_model_config(file)
    torch.manual_seed(3)
    return open_clip.create_model("small-hps").eval()

def written(folder, weights, version="v2.1"):
    torch.save(dict(epoch=3, name="x", state_dict=weights), folder/P.HPS_FILES[version])
    return folder

def load(path, version="v2.1"): return P.hps_judge(version, str(path), "cpu", "small-hps")

def official(model, image, text):
    "What the official scoring function computes, in its order, by torchvision: to tensor, longest side, bars, normalise."
    import open_clip
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    side = max(x.shape[1:])
    new = [round(n * (28 / side)) for n in x.shape[1:]]
    x = TF.resize(x, new, TF.InterpolationMode.BICUBIC, antialias=True)
    x = TF.pad(x, [(28 - new[1]) // 2, (28 - new[0]) // 2, 28 - new[1] - (28 - new[1]) // 2, 28 - new[0] - (28 - new[0]) // 2])
    x = TF.normalize(x, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    picture, words = model(x[None], open_clip.get_tokenizer("small-hps")([text]))[:2]
    return (picture @ words.T).item()

@pytest.mark.parametrize("form", ("file", "folder", "safetensors", "half"))
def test_the_score_is_the_official_one(small, tmp_path, form):
    from safetensors.torch import save_file
    weights = small.state_dict()
    if form == "safetensors": save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path/"HPS_v2.1_compressed.safetensors")
    else: written(tmp_path, {k: v.half() for k, v in weights.items()} if form == "half" else weights)
    judge = load(tmp_path/P.HPS_FILES["v2.1"] if form == "file" else tmp_path)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*s, 3), dtype=np.uint8) for s in ((28, 28), (40, 28), (28, 14), (24, 24), (9, 60))]
    texts = ["a cat with two horns on its head", "a cat with two horns on its head", "A Red Circle", "x", "a photo of " + "very " * 200 + "long"]
    table = ask(P.match_reward("hps", judge, P.HPS_CONVENTIONS["cosine"]), texts, images)
    with torch.no_grad(): want = [official(small, im, t) for im, t in zip(images, texts)]
    assert table.scores_RB[0].tolist() == pytest.approx(want, abs=2e-3 if form == "half" else 1e-5) and table.reasons[0][0].startswith("HPS v2.1")
    assert all(p.dtype == torch.float32 for p in judge.siglip.parameters()) and np.std(want) > 1e-3

def test_official_names_and_shapes(tmp_path):
    "A file of ViT-H-14 whose every tensor is one stored zero: the full network is filled, by the names the base model is known for."
    want = P.empty_clip("ViT-H-14").state_dict()
    assert {k: tuple(want[k].shape) for k in ("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "visual.proj", "visual.conv1.weight",
            "visual.positional_embedding", "visual.transformer.resblocks.31.mlp.c_fc.weight", "transformer.resblocks.23.attn.in_proj_weight")} == {
        "positional_embedding": (77, 1024), "text_projection": (1024, 1024), "logit_scale": (), "token_embedding.weight": (49408, 1024), "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14), "visual.positional_embedding": (257, 1280), "visual.transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
        "transformer.resblocks.23.attn.in_proj_weight": (3072, 1024)}
    folder = written(tmp_path, {k: torch.zeros(()).expand(v.shape) for k, v in want.items()})
    judge = P.hps_judge("v2.1", str(folder), "cpu")
    assert sum(p.numel() for p in judge.siglip.parameters()) == 986_109_441 and not any(t.is_meta for t in (*judge.siglip.parameters(), *judge.siglip.buffers()))
    assert judge.siglip.look["size"] in (224, (224, 224))
    P.hps_judge.cache_clear()

@pytest.mark.parametrize("harm, says", [
    (lambda w: w.pop("visual.proj"), "1 weights are missing, the first is 'visual.proj'"),
    (lambda w: w.update({"score_predictor.weight": torch.zeros(1)}), "1 weights are unknown, the first is 'score_predictor.weight'"),
    (lambda w: w.update({"visual.class_embedding": torch.zeros(31)}), r"'visual.class_embedding' is \[31\] and should be \[32\]"),
    (lambda w: w.update({"ln_final.bias": torch.full((16,), torch.inf)}), "'ln_final.bias' holds values that are no numbers"),
    (lambda w: [w.update({f"module.{k}": w.pop(k)}) for k in list(w)], "missing, the first is 'positional_embedding'.*unknown, the first is 'module."),
    (lambda w: w.update({"logit_scale": "a hundred"}), r"'logit_scale' is str and should be \[\]"),
])
def test_what_does_not_fit_is_named(small, tmp_path, harm, says):
    weights = dict(small.state_dict())
    harm(weights)
    with pytest.raises(UserError, match=says): load(written(tmp_path, weights))

def test_files_that_are_none(small, tmp_path):
    file = tmp_path/"HPS_v2.1_compressed.pt"
    with pytest.raises(UserError, match="neither HPS_v2.1_compressed.pt nor HPS_v2.1_compressed.safetensors"): load(tmp_path)
    with pytest.raises(UserError, match="there is no file"): load(file)
    with pytest.raises(UserError, match="there is no file"): load("gone")
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="could not be read as weights"): load(file)
    written(tmp_path, small.state_dict())
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(UserError, match="could not be read as weights"): load(file)
    torch.save(dict(model=1), file)
    with pytest.raises(UserError, match="no 'state_dict'; it holds \\['model'\\]"): load(file)
    (tmp_path/"x.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="could not be read as weights"): load(tmp_path/"x.safetensors")

def test_a_checkpoint_is_data_and_never_runs(tmp_path):
    class Evil:
        def __reduce__(self): return (tmp_path/"ran").touch, ()
    torch.save(dict(state_dict=Evil()), tmp_path/"HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match="could not be read as weights"): load(tmp_path)
    assert not (tmp_path/"ran").exists()

def test_versions_are_not_mixed_up(small, tmp_path, monkeypatch):
    written(tmp_path, small.state_dict(), "v2.0")
    with pytest.raises(UserError, match="name of v2.0's weights.*version: v2.0"): load(tmp_path/P.HPS_FILES["v2.0"], "v2.1")
    assert load(tmp_path, "v2.0").siglip.name == "HPS v2.0"
    asked = []
    def gone(repo, name): asked.append((repo, name)); raise OSError("no route to host")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", gone)
    for version in P.HPS_FILES:
        with pytest.raises(UserError, match="could not be had from xswu/HPSv2.*version: stand-in"): build_rewards([dict(name="hps", settings=dict(version=version))])
    assert asked == [("xswu/HPSv2", "HPS_v2_compressed.pt"), ("xswu/HPSv2", "HPS_v2.1_compressed.pt")]

@pytest.mark.parametrize("name, settings, says", [
    ("hps", dict(version="2.1"), "unknown version '2.1'.*'v2.1'"), ("hps", dict(version="standin"), "'stand-in'"), ("hps", dict(checkpoint="w.pt"), "needs its version"),
    ("hps", dict(convention="hessel"), "unknown convention 'hessel'"), ("hps", dict(convention="bench"), "Did you mean 'benchmark'"),
    ("clip_score", dict(convention="Hessel"), "Did you mean 'hessel'"), ("clip_score", dict(modle="x"), "Did you mean 'model'"),
    ("clip_score", dict(model="ViT-L-15"), "Did you mean 'ViT-L-1"), ("clip_score", dict(model="ViT-L-14", pretrained="opnai"), "could not be loaded"),
    ("clip_scor", {}, "Did you mean 'clip_score'")])
def test_mistakes_in_a_recipe(name, settings, says):
    with pytest.raises(UserError, match=says): build_rewards([dict(name=name, settings=settings)])
