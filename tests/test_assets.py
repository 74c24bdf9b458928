"""The shipped tiny models: that they are what they say, and that sampler and scorer agree on them to rounding."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import unify_rl
from unify_rl.core import Rollout, generator_for, rng_for
from unify_rl.rewards.verifiable import build_rewards, score
from unify_rl.world.detectors import detect_components, detect_templates
from unify_rl.world.prompts import CATEGORIES, captioned, draw_prompts, edit_prompts
from unify_rl.world.questions import question_prompts
from unify_rl.world.scenes import World, random_scene, render_batch

ASSETS = Path(unify_rl.__file__).parent / "assets"


@pytest.fixture(scope="module")
def policy(): return unify_rl.load_policy("tiny-janus")


@pytest.fixture(scope="module")
def prompts(): return [*draw_prompts("test", 6), *question_prompts("test", 6)]


def test_small():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) < 25e6


def test_no_pickle():
    assert {f.suffix for f in (ASSETS / "tiny-janus").iterdir()} <= {".safetensors", ".json", ".jinja"}


def test_transformers_reads_it(policy):
    from transformers import JanusForConditionalGeneration, JanusProcessor
    model, info = JanusForConditionalGeneration.from_pretrained(ASSETS / "tiny-janus", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = policy.janus.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in model.state_dict().items())
    assert JanusProcessor.from_pretrained(ASSETS / "tiny-janus").num_image_tokens == 36


def sees(found, scene):
    return sorted((d.label, d.color) for d in found) == sorted((t.shape, t.color) for t in scene)


@pytest.mark.parametrize("detect", [detect_templates, detect_components])
def test_detectors_on_decoded_pictures(policy, detect):
    scenes = [random_scene(World(), rng_for("decoded", i)) for i in range(400)]
    vq = policy.janus.model.vqmodel
    with torch.no_grad():
        codes = vq.encode(policy._pixels(list(render_batch(scenes)))).image_tokens.view(400, -1)
    decoded = policy._show("image", codes)
    assert np.mean([sees(f, s) for f, s in zip(detect(decoded), scenes)]) >= 0.99


def right_padded(part):
    "The same part with its prompts padded on the right."
    context = dict(part.context)
    order = torch.argsort(context["mask"].int(), dim=1, descending=True, stable=True)
    context |= {k: context[k].gather(1, order) for k in ("ids", "mask")}
    return replace(part, context=context)


@pytest.mark.parametrize("cfg, logp", [(1.0, "conditional"), (3.0, "conditional"), (3.0, "guided")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_teacher_forcing_equals_sampler(policy, prompts, cfg, logp, side):
    rollout = policy.sample(prompts, 4, generator_for("exact"), cfg=cfg, logp=logp, temperature=0.9)
    assert {p.kind for p in rollout.parts} == {"image", "text"}
    atol = 1e-5 * (2 * cfg - 1 if logp == "guided" else 1)      # u + w (c - u) magnifies the rounding of both branches by 2 w - 1
    for part in rollout.parts:
        assert not part.context["mask"].all()                                   # there is padding to get wrong
        with torch.no_grad(): again = policy(right_padded(part) if side == "right" else part)
        torch.testing.assert_close(again, part.logp_old, atol=atol, rtol=4e-6)       # rtol: float32 near log p = -19


def test_a_single_prompt(policy, prompts):
    "One drawing prompt: there attention's reshapes are views."
    alone = policy.sample(prompts[:1], 3, generator_for("one"), temperature=0.9)
    with torch.no_grad(): torch.testing.assert_close(policy(alone.parts[0]), alone.parts[0].logp_old, atol=1e-5, rtol=1e-6)


def hf_logp(policy, part, r):
    "transformers' own forward over prompt and output, position t predicting token t + 1."
    model, c, n = policy.janus, int(part.context_index[r]), int(part.mask[r].sum())
    ids = part.context["ids"][c][part.context["mask"][c]][None]
    x = model.model.language_model.embed_tokens(ids)
    if "features" in part.context or "pixels" in part.context:
        seen = part.context["features"][c:c+1] if "features" in part.context else policy._see(part.context["pixels"][c:c+1])
        x = x.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
    embed, head = policy._ends(part.kind)
    hidden = model.model.language_model(inputs_embeds=torch.cat([x, embed(part.actions[r:r+1, :n])], 1)).last_hidden_state[0]
    logp = head(hidden).log_softmax(-1)
    take = lambda start: logp[start:start + n].gather(-1, part.actions[r, :len(logp[start:start + n]), None])[:, 0]
    return take(ids.shape[1] - 1), take(ids.shape[1])


def test_logp_is_aligned(policy, prompts):
    "The public CoRL trainer scores image tokens with the state *after* them; ours must differ from that and equal the aligned form."
    rollout = policy.sample(prompts, 2, generator_for("aligned"))
    for part in rollout.parts:
        for r in (0, len(part) - 1):
            with torch.no_grad(): aligned, shifted = hf_logp(policy, part, r)
            ours = part.logp_old[r, :len(aligned)]
            assert (ours - aligned).abs().max() <= 1e-4
            assert (ours[:len(shifted)] - shifted).abs().max() > 0.1


def test_guided_greedy_equals_generate(policy):
    "Our guidance means what transformers' does: greedy decoding picks the same codes."
    from transformers import GenerationConfig
    tok, prompt = policy.tokenizer, draw_prompts("test", 1)[0]
    inputs = tok([policy.template.format(prompt.text) + tok.boi_token], return_tensors="pt")
    config = GenerationConfig(do_sample=False, guidance_scale=3.0, pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
                              max_length=inputs["input_ids"].shape[1] + 36)
    config.generation_kwargs = {"boi_token_id": tok.convert_tokens_to_ids(tok.boi_token)}
    theirs = policy.janus.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_mode="image", generation_config=config)
    ours = policy.sample([prompt], 1, cfg=3.0, temperature=0.0).parts[0].actions
    assert torch.equal(theirs.view(1, -1), ours)


def test_first_update_is_on_policy(policy, prompts):
    rollout = policy.sample(prompts, 4, generator_for("ratio"))
    with torch.no_grad(): ratios = [(policy(p) - p.logp_old).exp()[p.mask] for p in rollout.parts]
    assert all((r - 1).abs().max() < 1e-4 for r in ratios)


@pytest.mark.slow
def test_base_is_honest(policy):
    "Every category is above chance and leaves something to find (about two minutes)."
    from unify_rl.evaluate.suites import evaluate, load_suite
    draw = evaluate(policy, load_suite("shapes-geneval")).by_category()
    assert all(0.10 <= v["correct"] <= 0.70 for v in draw.values()), draw
    qa = evaluate(policy, load_suite("shapes-qa")).by_category()
    chance = dict(existence=0.5, count=0.25, color=0.21, shape=0.25, relation=0.25, compare=0.25)     # half multiple choice of four, half open
    assert all(v["correct"] > chance[k] for k, v in qa.items()), qa


# -- tiny-bagel ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bagel(): return unify_rl.load_policy("tiny-bagel")


@pytest.fixture(scope="module")
def mixed(): return [*draw_prompts("test", 4), *edit_prompts("test", 3), *question_prompts("test", 4)]


def test_tiny_bagel_has_the_official_files(bagel, tmp_path):
    "The names of the official folder, and what we load is what we write."
    names = {f.name for f in (ASSETS / "tiny-bagel").iterdir()}
    assert {"ema.safetensors", "ae.safetensors", "config.json", "llm_config.json", "vit_config.json"} <= names
    assert {Path(n).suffix for n in names} <= {".safetensors", ".json", ".txt"}
    bagel.save_pretrained(tmp_path)
    for name in ("ema.safetensors", "ae.safetensors"):
        a, b = load_file(ASSETS / "tiny-bagel" / name), load_file(tmp_path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("detect", [detect_templates, detect_components])
def test_detectors_on_what_the_autoencoder_shows(bagel, detect):
    scenes = [random_scene(World(), rng_for("decoded", i)) for i in range(400)]
    with torch.no_grad(): shown = bagel.pictures(bagel.latents(torch.from_numpy(render_batch(scenes)).permute(0, 3, 1, 2) / 127.5 - 1), (3, 3))
    assert np.mean([sees(f, s) for f, s in zip(detect(shown), scenes)]) >= 0.99


@pytest.mark.parametrize("drawing", [dict(estimator="forward"), dict(estimator="sde", window=3), dict(estimator="forward", think=True)])
def test_tiny_bagel_is_on_policy(bagel, mixed, drawing):
    rollout = bagel.sample(mixed, 3, generator_for("ratio"), max_text=24, **drawing)
    assert {p.kind for p in rollout.parts} == {"image", "text"}
    for part in rollout.parts:
        with torch.no_grad(): pieces = torch.cat([bagel(piece) for piece in part.split(7)])
        recorded = pieces if part.logp_old is None else part.logp_old
        with torch.no_grad(): ratio = (bagel(part) - recorded).exp()[part.mask]
        assert (ratio - 1).abs().max() < 1e-4


def chances():
    "Category -> how often a picture drawn for another prompt of the same category is right for this one."
    out = {}
    for category in CATEGORIES:
        prompts = draw_prompts("test", 120, seed=7, categories=(category,))
        others = prompts[1:] + prompts[:1]
        pictures = list(render_batch(captioned(others, World(), rng_for("chance", category))))
        judged = score(build_rewards([{"name": "strict"}])[0], prompts, Rollout(prompts, 1, [], [None] * len(prompts), pictures))
        out[category] = float(judged.scores_RB[0].mean())
    return out


@pytest.mark.slow
def test_tiny_bagels_base_is_honest(bagel):
    "Above chance in every category and far from perfect, in drawing, riddles with and without thinking, edits and questions (about six minutes)."
    from unify_rl.evaluate.suites import evaluate, load_suite
    test = lambda name, **kw: {k: v["correct"] for k, v in evaluate(bagel, load_suite(name), **kw).by_category().items()}
    draw, by_chance = test("shapes-geneval"), chances()
    assert all(by_chance[c] < v <= 0.70 for c, v in draw.items()), (draw, by_chance)
    for think in (False, True):
        riddles = test("shapes-wise", drawing=dict(think=think))
        assert all(v > 0.03 for v in riddles.values()), riddles
    edits = test("shapes-edit")
    assert all(v > 0 for v in edits.values()), edits
    qa = test("shapes-qa")
    chance = dict(existence=0.5, count=0.25, color=0.21, shape=0.25, relation=0.25, compare=0.25)
    assert all(v > chance[k] for k, v in qa.items()), qa


# -- tiny-dimoo ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def dimoo(): return unify_rl.load_policy("tiny-dimoo")


def test_tiny_dimoo_draws_as_its_recipe_says(dimoo):
    from unify_rl.train.pretrain_dimoo import DRAWING
    assert {k: getattr(dimoo.drawing, k) for k in DRAWING} == DRAWING


def test_tiny_dimoo_is_what_it_writes(dimoo, tmp_path):
    dimoo.save_pretrained(tmp_path)
    files = {f.relative_to(ASSETS / "tiny-dimoo") for f in (ASSETS / "tiny-dimoo").rglob("*") if f.is_file()}
    assert files == {f.relative_to(tmp_path) for f in tmp_path.rglob("*") if f.is_file()}
    assert {f.suffix for f in files} == {".safetensors", ".json"}
    for name in (f for f in files if f.suffix == ".safetensors"):
        a, b = load_file(ASSETS / "tiny-dimoo" / name), load_file(tmp_path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("detect", [detect_templates, detect_components])
def test_detectors_on_what_tiny_dimoos_codes_show(dimoo, detect):
    scenes = [random_scene(World(), rng_for("decoded", i)) for i in range(400)]
    codes = torch.stack(dimoo.encode_images(list(render_batch(scenes))))
    shown = dimoo.pictures(codes.flatten(1), tuple(codes.shape[1:]))
    assert np.mean([sees(f, s) for f, s in zip(detect(shown), scenes)]) >= 0.99


@pytest.mark.parametrize("drawing", [dict(), dict(estimator="trajectory", visits=3)])
def test_tiny_dimoo_is_on_policy(dimoo, mixed, drawing):
    "The draws are part of the rollout: whoever asks again, in whichever pieces, is told the same."
    rollout = dimoo.sample(mixed, 3, generator_for("ratio"), max_text=24, **dict(steps=6, text_steps=6) | drawing)
    assert {p.kind for p in rollout.parts} == {"image", "text"}
    for part in rollout.parts:
        with torch.no_grad(): ratio = (dimoo(part) - torch.cat([dimoo(piece) for piece in part.split(7)])).exp()[part.mask]
        assert (ratio - 1).abs().max() < 1e-4


def test_the_shipped_subspace_is_the_one_its_command_finds(tmp_path):
    "As a subspace: the sign and, for equal sizes, the order of directions are nobody's business."
    from unify_rl.cli import main
    from unify_rl.policies.bagel import read_subspace
    assert main(["subspace", "tiny-bagel", "--out", str(tmp_path/"again.safetensors")]) == 0
    shipped, again = read_subspace("tiny-bagel"), read_subspace(str(tmp_path/"again.safetensors"))
    assert shipped.shape == again.shape == (64, 288)
    assert (shipped.T @ shipped - again.T @ again).norm() < 0.05
    assert (shipped.T @ shipped - again[:63].T @ again[:63]).norm() > 0.9
