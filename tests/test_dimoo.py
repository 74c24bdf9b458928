"""Lumina-DiMOO: the same numbers as transformers' Llama without its causal mask, padding that nobody sees, and folders that are read whole or not at all."""
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unify_rl.core import Prompt, UserError, generator_for
from unify_rl.mechanisms.masked import ESTIMATORS
from unify_rl.policies.dimoo import BLANK, LLADA, DimooPolicy, dimoo_shapes, llada_name, new_dimoo
from unify_rl.policies.load import load_policy
from unify_rl.world.prompts import draw_prompts, edit_prompts
from unify_rl.world.questions import joint_prompts, question_prompts

PROMPTS = [*draw_prompts("train", 2), *question_prompts("train", 2), *edit_prompts("train", 1), *joint_prompts("train", 1)]
WORDS = sorted({w for p in PROMPTS for w in re.findall(r"\w+|[^\w\s]+", p.text + " " + p.question)})


@pytest.fixture(scope="module")
def policy(): return new_dimoo(WORDS, hidden=64, layers=2)


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dimoo")
    policy.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path): return Path(shutil.copytree(saved, tmp_path / "dimoo"))


def rollout(policy, prompts=PROMPTS, G=2, **more): return policy.sample(prompts, G, generator_for("test"), **dict(max_text=6, steps=4, text_steps=3) | more)


# ---- the body

def test_states_are_those_of_transformers_llama_that_sees_everything(policy):
    context = policy._context(PROMPTS[:1], "generate")
    frame, places = policy._frame("image", (6, 6))
    codes = torch.randint(0, policy.codes, (1, 36))
    ours = policy.states(context, torch.tensor([0]), "image", (6, 6), codes)
    ids = torch.cat([context["ids"], frame[None]], 1)
    ids[0, context["ids"].shape[1] + places] = codes[0] + policy.ids.image
    everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    theirs = policy.model.model(input_ids=ids, attention_mask=everything, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).last_hidden_state
    assert torch.allclose(ours, theirs[:, context["ids"].shape[1] + places], atol=1e-4)
    causal = policy.model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert not torch.allclose(ours, causal[:, context["ids"].shape[1] + places], atol=1e-2)


def test_a_sequence_is_laid_out_as_the_authors_do(policy):
    i, tok = policy.ids, policy.tokenizer
    frame, places = policy._frame("image", (2, 3))
    assert frame.tolist() == [i.boa, i.boi, BLANK, BLANK, BLANK, i.newline, BLANK, BLANK, BLANK, i.newline, i.eoi, i.eoa]
    assert policy._frame("text", (2,))[0].tolist() == [i.boa, BLANK, BLANK, i.eoa]
    ids = policy._context(PROMPTS[2:3], "answer")["ids"][0].tolist()
    end = tok.convert_tokens_to_ids("</user>")
    codes = (policy.encode_images([PROMPTS[2].image])[0] + i.image).tolist()
    assert ids[-1] == end and ids[-2] == i.eoi                                        # the picture stands just before </user>
    assert ids[ids.index(i.boi):-1] == [i.boi, *sum(([*row, i.newline] for row in codes), []), i.eoi]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_do_not_depend_on_what_is_beside_them(policy, estimator):
    prompts = [replace(PROMPTS[0], text="a red circle"), replace(PROMPTS[1], text="a red circle and a very small blue square left of it"), *PROMPTS[2:]]
    whole = rollout(policy, prompts, estimator=estimator)
    for part in whole.parts:
        with torch.no_grad():
            batched, single = policy(part), torch.cat([policy(p) for p in part.split(1)])
        assert torch.allclose(batched, single, atol=1e-4), part.kind
    for i, p in enumerate(prompts):                                                   # drawn alone: another padding, the same output
        alone = rollout(policy, [p], estimator=estimator)
        same = lambda a, b: a is None and b is None or np.array_equal(a, b)
        assert all(same(a, b) for a, b in zip(alone.images, whole.images[2 * i:2 * i + 2])) and alone.texts == whole.texts[2 * i:2 * i + 2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_those_of_the_batch_and_ratios_are_one(policy, estimator):
    part = rollout(policy, estimator=estimator).parts[0]
    policy.zero_grad()
    logp = policy(part)
    assert torch.equal(logp, policy(part)) and (logp[~part.mask] == 0).all() and (logp[part.mask] < 0).all()
    logp.sum().backward()
    whole = {n: w.grad.clone() for n, w in policy.named_parameters() if w.grad is not None}
    policy.zero_grad()
    for piece in part.split(3): policy(piece).sum().backward()
    assert whole and all(torch.allclose(w.grad, whole[n], atol=2e-3, rtol=1e-3) for n, w in policy.named_parameters() if n in whole)
    policy.zero_grad()


def test_trajectory_scores_are_those_of_the_states_that_were_drawn_from(policy):
    context, index = policy._context(PROMPTS[:1], "generate"), torch.tensor([0])
    part = rollout(policy, PROMPTS[:1], 1, estimator="trajectory").parts[0]
    tokens, order = part.actions[0].unbind(-1)
    with torch.no_grad():
        byhand = torch.zeros(36)
        for step in range(4):
            state = torch.where(order < step, tokens, BLANK)[None]
            logits = policy._head("image")(policy.states(context, index, "image", (6, 6), state))[0]
            byhand = torch.where(order == step, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], byhand)
        assert torch.allclose(policy(part)[0], byhand, atol=1e-4)


def test_guided_scores_are_of_guided_logits(policy):
    part = rollout(policy, PROMPTS[:1], 1, cfg=3.0, logp="guided", estimator="diffu_grpo").parts[0]
    blank, index = torch.full((1, 36), BLANK), torch.tensor([0])
    draws, _ = policy._draws(part)
    hidden = draws.hidden_BnKL[:, 0, 0, :part.context["ids"].shape[1]]
    with torch.no_grad():
        head, states = policy._head("image"), lambda h, free: policy.states(part.context, index, "image", (6, 6), blank, h, free)
        c, u = head(states(hidden, False)), head(states(None, True))
        want = (u + 3 * (c - u)).log_softmax(-1).gather(-1, part.actions[..., :1])[..., 0]
        assert torch.allclose(policy(part), want, atol=1e-4)


def test_an_answer_ends_where_it_ends(policy):
    i = policy.ids
    tokens = torch.tensor([[30, i.eos, 31, i.eos], [30, 31, 32, 33]])
    assert policy._read(tokens).tolist() == [[True, True, False, False], [True] * 4]
    out = policy.encode(PROMPTS[2:4], ["a", "a b c"], [None, None])
    assert out.parts[0].actions[0, :, 0].tolist()[1:] == [i.eos] * 3 and out.parts[0].mask.shape == (2, 2 * 4)

def test_no_place_of_an_answer_tells_its_length(policy):
    "What comes after the end is hidden like the rest: else a visible end would tell how long the answer is, which a sampler cannot know."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        part = policy.encode(PROMPTS[2:4], ["a", "a b c"], [None, None]).parts[0]
    part.settings |= dict(low=1.0, high=1.0, draws=1)
    draws, _ = policy._draws(part)
    P = part.context["ids"].shape[1]
    assert draws.hidden_BnKL[..., P:].all() and draws.scored_BnKL[..., P:].all()


def test_what_cannot_be_drawn_is_not(policy):
    never = {policy.ids.mask, policy.ids.pad}
    for r in (rollout(policy, PROMPTS[2:4], 8), rollout(policy, PROMPTS[2:4], 1, temperature=0.0)):
        tokens = r.parts[0].actions[..., 0]
        assert not never & set(tokens.flatten().tolist()) and int(tokens.max()) < policy.ids.image


def test_lora_adapts_the_layers_and_is_merged_when_saved(tmp_path):
    policy = new_dimoo(WORDS, hidden=64, layers=2)
    part = rollout(policy, PROMPTS[:1]).parts[0]
    with torch.no_grad(): before = policy(part)
    policy.add_lora(4, 8, list(policy.lora_targets))
    trains = [n for n, w in policy.named_parameters() if w.requires_grad]
    assert trains and all("lora" in n and ".layers." in n for n in trains)
    with torch.no_grad():
        for n, w in policy.named_parameters():
            if "lora_B" in n: w.normal_(std=0.05)
        after = policy(part)
        with policy.reference() as ref: assert torch.allclose(ref(part), before, atol=1e-5)
        policy.save_pretrained(tmp_path)
        assert torch.allclose(DimooPolicy.from_pretrained(tmp_path)(part), after, atol=1e-4) and not torch.allclose(after, before, atol=1e-3)


# ---- folders

def test_one_file_or_shards_with_the_same_keys(folder, policy):
    state = load_file(folder / "model.safetensors")
    assert set(state) == {llada_name(k) for k in policy.model.state_dict()} == {k for k in dimoo_shapes(folder) if k.startswith("model.transformer.")}
    names = sorted(state)
    where = {k: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, k in enumerate(names)}
    for file in set(where.values()): save_file({k: state[k] for k in names if where[k] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    loaded = load_policy(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), policy.state_dict().values()))
    loaded.save_pretrained(folder / "again")
    assert set(load_file(folder / "again" / "model.safetensors")) == set(names)


def test_the_full_size_folder_has_the_official_names(tmp_path):
    config = dict(model_type="llada", **LLADA, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, embedding_size=134656, vocab_size=126464,
                  rope_theta=500000.0, max_sequence_length=4096, weight_tying=False)
    vq = dict(_class_name="VQModel", block_out_channels=[128, 256, 256, 512, 768], down_block_types=["DownEncoderBlock2D"] * 5, up_block_types=["UpDecoderBlock2D"] * 5,
              layers_per_block=2, latent_channels=64, num_vq_embeddings=8192, norm_num_groups=32, mid_block_add_attention=False, lookup_from_codebook=True)
    (tmp_path / "vqvae").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(config)); (tmp_path / "vqvae" / "config.json").write_text(json.dumps(vq))
    shapes = dimoo_shapes(tmp_path)
    body = {k: s for k, s in shapes.items() if k.startswith("model.transformer.")}
    assert len(body) == 32 * 9 + 3
    assert body["model.transformer.wte.weight"] == body["model.transformer.ff_out.weight"] == (134656, 4096)
    assert body["model.transformer.blocks.31.ff_out.weight"] == (4096, 12288) and body["model.transformer.blocks.0.attn_norm.weight"] == (4096,)
    assert shapes["quantize.embedding.weight"] == (8192, 64)


def edit(folder, name, change):
    file = folder / name
    x = json.loads(file.read_text())
    change(x)
    file.write_text(json.dumps(x))


def weights(folder, change, name="model.safetensors"):
    state = load_file(folder / name)
    change(state)
    save_file(state, folder / name)


@pytest.mark.parametrize("harm, message", [
    (lambda f: edit(f, "config.json", lambda c: c.update(alibi=True)), "alibi is True; only False is supported"),
    (lambda f: edit(f, "config.json", lambda c: c.pop("d_model")), "no whole number 'd_model'"),
    (lambda f: edit(f, "config.json", lambda c: c.update(embedding_size=50)), "the picture codes are tokens"),
    (lambda f: edit(f, "config.json", lambda c: c["tokens"].update(newlin=3)), "Did you mean 'newline'"),
    (lambda f: edit(f, "config.json", lambda c: c.update(drawing=dict(estimator="unigrp"))), "Did you mean 'unigrpo'"),
    (lambda f: edit(f, "vqvae/config.json", lambda c: c.update(lookup_from_codebook=False)), "lookup_from_codebook is not true"),
    (lambda f: (f / "vqvae" / "config.json").unlink(), "vqvae/config.json is missing"),
    (lambda f: (f / "vqvae" / "diffusion_pytorch_model.safetensors").unlink(), "diffusion_pytorch_model.safetensors is missing"),
    (lambda f: weights(f, lambda s: s.pop("model.transformer.ln_f.weight")), "model.transformer.ln_f.weight is missing"),
    (lambda f: weights(f, lambda s: s.update({"model.transformer.wpe.weight": torch.zeros(2)})), "wpe.weight belongs to no part"),
    (lambda f: weights(f, lambda s: s.update({"model.transformer.wte.weight": torch.zeros(2, 64)})), r"wte.weight is \(2, 64\), not"),
    (lambda f: weights(f, lambda s: s["model.transformer.ln_f.weight"].fill_(torch.nan)), "not all finite"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read as JSON"),
])
def test_a_harmed_folder_is_refused_with_its_reason(folder, harm, message):
    harm(folder)
    with pytest.raises(UserError, match=message): load_policy(str(folder))


@pytest.mark.parametrize("call, message", [
    (lambda p: rollout(p, [Prompt("x", "answer", "how many?")]), "prompt 'x': a picture must be a numpy array"),
    (lambda p: rollout(p, PROMPTS[:1], size=22), "sides must be multiples of 4"),
    (lambda p: rollout(p, PROMPTS[:1], steps=0), "drawing.steps is 0"),
    (lambda p: rollout(p, PROMPTS[:1], step=3), "Did you mean 'steps'"),
    (lambda p: rollout(p, PROMPTS[:1], top_p=0.9), "rollout.top_p must be 1"),
    (lambda p: rollout(p, PROMPTS[2:3], max_text=400), "the context has 256"),
    (lambda p: rollout(p, PROMPTS[:1], logp="giuded"), "it must be 'conditional' or 'guided'"),
])
def test_bad_requests_are_refused(policy, call, message):
    with pytest.raises(UserError, match=message): call(policy)
