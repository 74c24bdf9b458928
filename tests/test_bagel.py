"BAGEL: the batched, cached policy against a plain one-sequence-at-a-time model; its files; what users get wrong."
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import unify_rl.policies.bagel as bagel
from unify_rl.core import Part, Prompt, UserError
from unify_rl.mechanisms.mot import GEN, upcycle
from unify_rl.policies.bagel import (Bagel, BagelPolicy, FULL, Guidance, NO_IMAGE, NO_TEXT, check_keys, guide_velocity, new_bagel, new_vae,
                                     patchify, read_config, vae_state)
from unify_rl.policies.load import load_policy
from unify_rl.world.prompts import draw_prompts, edit_prompts
from unify_rl.world.questions import question_prompts

WORDS = sorted({w for p in draw_prompts("train", 300) for w in p.text.split()} | set("what is the of in a ? how many are there".split()))
gen = lambda s=0: torch.Generator().manual_seed(s)

@pytest.fixture(scope="module")
def policy():
    p = new_bagel(WORDS, hidden=64, layers=2)
    torch.manual_seed(1)
    torch.nn.init.normal_(p.net.llm2vae.weight, std=0.1)         # a new model's velocity is 0: nothing could be compared
    for n, w in p.model.named_parameters():
        if "norm" in n and n.endswith("weight"): torch.nn.init.uniform_(w, 0.5, 1.5)
    p.drawing = replace(p.drawing, steps=5)
    return p

@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    d = tmp_path_factory.mktemp("bagel")
    policy.save_pretrained(d)
    return d

@pytest.fixture(scope="module")
def prompts(): return draw_prompts("train", 2) + question_prompts("train", 2) + edit_prompts("train", 2)

# -- a model for one sequence, written from the description and not from the policy
def plain(net, segments, want):
    """Final hidden states of the last segment. A segment is (kind, embeddings [T, D]); kinds: 'text' (causal), 'picture' (plain weights),
    'latent' (generation weights); pictures see themselves whole, and first and last token of any picture use the plain weights."""
    body, D = net.language_model.model, net.vae2llm.out_features
    x, drawn, seg, pos, next_pos = [], [], [], [], 0
    for i, (kind, e) in enumerate(segments):
        for j in range(len(e)):
            x.append(e[j]); seg.append((i, kind)); drawn.append(kind == "latent" and 0 < j < len(e) - 1)
            pos.append(next_pos + (j if kind == "text" else 0))
        next_pos += len(e) if kind == "text" else 1
    x, N = torch.stack(x), len(x)
    sees = torch.tensor([[b <= a or (seg[a][0] == seg[b][0] and seg[a][1] != "text") for b in range(N)] for a in range(N)])
    pick = lambda module, name, j: getattr(module, name + (GEN if drawn[j] else ""))
    def turn(v, p):
        d = len(v) // 2
        angle = torch.tensor([p * 1e6 ** (-k / d) for k in range(d)], dtype=torch.float64)
        c, s = angle.cos().to(v), angle.sin().to(v)
        return torch.cat([v[:d] * c - v[d:] * s, v[d:] * c + v[:d] * s])
    for layer in body.layers:
        a, d = layer.self_attn, layer.self_attn.head_dim
        y = [pick(layer, "input_layernorm", j)(x[j]) for j in range(N)]
        q = [[turn(pick(a, "q_norm", j)(h), pos[j]) for h in pick(a, "q_proj", j)(y[j]).split(d)] for j in range(N)]
        k = [[turn(pick(a, "k_norm", j)(h), pos[j]) for h in pick(a, "k_proj", j)(y[j]).split(d)] for j in range(N)]
        v = [pick(a, "v_proj", j)(y[j]).split(d) for j in range(N)]
        share, out = len(q[0]) // len(k[0]), []
        for j in range(N):
            heads = []
            for h in range(len(q[0])):
                w = torch.stack([q[j][h] @ k[m][h // share] / d**0.5 if sees[j, m] else torch.tensor(-math.inf) for m in range(N)]).softmax(0)
                heads.append(sum(w[m] * v[m][h // share] for m in range(N)))
            out.append(pick(a, "o_proj", j)(torch.cat(heads)))
        x = x + torch.stack(out)
        x = x + torch.stack([pick(layer, "mlp", j)(pick(layer, "post_attention_layernorm", j)(x[j])) for j in range(N)])
    return torch.stack([pick(body, "norm", j)(x[j]) for j in range(N)])[-want:]

def segments(policy, p, full=True, text=True, picture=True, thought=None):
    "The prompt's segments as embeddings, for `plain`."
    net, ids, tok = policy.net, policy.ids, policy.tokenizer
    emb = lambda i: net.language_model.model.embed_tokens(torch.tensor(i))
    words = lambda t: ("text", emb([ids["bos"], *tok(t, add_special_tokens=False)["input_ids"], ids["eos"]]))
    wrap = lambda kind, e: (kind, torch.cat([emb([ids["start"]]), e, emb([ids["end"]])]))
    pixels = None if p.image is None else torch.from_numpy(p.image).permute(2, 0, 1)[None].float() / 127.5 - 1
    out = [words(policy.think_prompt)] if thought is not None else []
    if pixels is not None and picture:
        if p.task == "edit": out.append(wrap("latent", net.latent_tokens(policy.latents(pixels), torch.zeros(1), torch.arange(9))[0]))
        out.append(wrap("picture", net.see(patchify(pixels, 4), torch.arange(36)[None])[0]))
    if text: out.append(words(p.text))
    if thought is not None and full: out.append(("text", emb([ids["bos"], *thought])))
    return out

def noise_segment(policy, x, t):
    ids = policy.ids
    emb = policy.net.language_model.model.embed_tokens(torch.tensor([ids["start"], ids["end"]]))
    return "latent", torch.cat([emb[:1], policy.net.latent_tokens(x[None], torch.tensor([t]), torch.arange(9))[0], emb[1:]])

@torch.no_grad()
def test_cached_contexts_equal_whole_sequences(policy, prompts):
    "All three contexts of pictures, edits and thoughts, left-padded and batched, against one full sequence each."
    x, t = torch.randn(2, 9, 32, generator=gen()), 0.7
    for chosen, think in ((prompts[:2], False), (prompts[4:], False), (prompts[4:], True)):
        thought = [[7, 9, policy.ids["eos"]], [8, policy.ids["eos"]]]
        look = policy._look([p.image for p in chosen], vae=True)
        context, index = policy._draw_context(chosen, look, thought if think else None, 1)
        for bit, keep in ((FULL, dict()), (NO_TEXT, dict(text=False, full=False)), (NO_IMAGE, dict(picture=False, full=False))):
            batch = policy.velocity(context | dict(keep=((context["keep"] & bit) > 0) * FULL), index, (3, 3))(x, torch.full((2,), t))
            for i, p in enumerate(chosen):
                segs = segments(policy, p, thought=thought[i] if think else None, **keep) + [noise_segment(policy, x[i], t)]
                assert torch.allclose(batch[i], policy.net.llm2vae(plain(policy.net, segs, 11)[1:-1]), atol=1e-4), (p.task, bit, think)

@torch.no_grad()
def test_text_logp_equals_whole_sequences(policy, prompts):
    part = policy.sample(prompts[2:4], 2, gen(), max_text=4).parts[0]
    logp, emb = policy.logp(part), policy.net.language_model.model.embed_tokens
    for b in range(4):
        tokens = part.actions[b][part.mask[b]]
        segs = segments(policy, prompts[2 + b // 2]) + [("text", emb(torch.cat([torch.tensor([policy.ids["bos"]]), tokens[:-1]])))]
        states = plain(policy.net, segs, len(tokens))
        exact = policy.net.language_model.lm_head(states).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(logp[b][part.mask[b]], exact, atol=1e-4)

# -- batches
@pytest.mark.parametrize("kw", [{}, {"estimator": "forward"}, {"think": True, "temperature": 0.0}, {"cfg": 3.0}])
def test_outputs_do_not_depend_on_neighbours(policy, prompts, kw):
    "Alone, in another order, or among others: the same pictures (1e-4 in the latents) and greedy texts."
    drawn = [prompts[i] for i in (0, 1, 4, 5)]
    def run(ps):
        r = policy.sample(ps, 2, gen(3), max_text=5, **kw)
        finals = {}
        for part in r.parts:
            if part.kind == "image":
                for row, a in zip(part.rows.tolist(), part.actions): finals[r.prompt(row).id, row % 2] = a
        return finals, {(r.prompt(b).id, b % 2): t for b, t in enumerate(r.texts)}
    many, texts = run(drawn)
    for alone, said in [run([p]) for p in drawn] + [run(drawn[::-1])]:
        for key, a in alone.items():
            assert (a - many[key]).abs().max() <= 1e-4, (key, kw)
            assert said[key] == texts[key]

def test_answers_do_not_depend_on_neighbours(policy):
    ps = question_prompts("train", 4, seed=5)
    together = policy.sample(ps, 2, gen(), temperature=0.0, max_text=6).texts
    for i, p in enumerate(ps): assert policy.sample([p], 2, gen(), temperature=0.0, max_text=6).texts == together[2*i:2*i+2]

@pytest.mark.parametrize("kw", [{}, {"estimator": "forward"}, {"cfg": 3.0}, {"cfg": 3.0, "logp": "guided"}, {"think": True, "form": "cps"},
                                {"cfg": 3.0, "logp": "guided", "estimator": "forward", "think": True}])
def test_on_policy_ratio_is_one(policy, prompts, kw):
    r = policy.sample(prompts, 2, gen(1), max_text=5, temperature=0.8, **kw)
    assert {p.kind for p in r.parts} == {"image", "text"}
    for part in r.parts:
        if part.logp_old is None: part.logp_old = policy(part).detach()         # not recorded: then pieces must agree with the whole
        for piece in part.split(3):
            assert ((policy(piece) - piece.logp_old).exp() - 1).abs().max() < 1e-4

def test_gradients_reach_what_trains(policy, prompts):
    policy.requires_grad_(False); policy.train_only(list(policy.trains))
    r = policy.sample(prompts, 2, gen(), max_text=5, think=True)
    sum(policy(p).sum() for p in r.parts).backward()
    none = [n for n, w in policy.named_parameters() if w.requires_grad and w.grad is None]
    policy.zero_grad(set_to_none=True)
    assert none == []
    assert not any(n.startswith("vae.") for n, w in policy.named_parameters() if w.requires_grad)

def test_checkpointed_gradients_are_the_same(policy, prompts):
    r = policy.sample(prompts, 2, gen(), max_text=5, think=True)
    def grads():
        policy.zero_grad(set_to_none=True); sum(policy(p).sum() for p in r.parts).backward()
        return {n: w.grad.clone() for n, w in policy.named_parameters() if w.grad is not None}
    a = grads(); policy.remat = True
    try: b = grads()
    finally: policy.remat = False; policy.zero_grad(set_to_none=True)
    assert a.keys() == b.keys()
    for n in a: assert torch.allclose(a[n], b[n], atol=1e-4 * float(a[n].abs().max() + 1)), n

def test_prompt_is_run_once_a_group(policy, prompts):
    "The number of prompt tokens that go through the body does not grow with the group."
    def cost(G):
        seen, body = [], policy.body
        hook = body.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0] * args[0].shape[1]))
        try: policy.sample(prompts[4:], G, gen(), cfg=2.0, steps=1, window=0, estimator="none")
        finally: hook.remove()
        return seen
    for small, large in zip(cost(1)[:3], cost(4)[:3]): assert small == large             # three contexts
    assert cost(4)[3] == 4 * cost(1)[3]                                                  # the flow itself does

def test_encode_scores_given_outputs(policy, prompts):
    given = policy.encode(prompts[:1] + prompts[2:3] + prompts[4:5], ["a red circle", "red", None], [prompts[4].image, None, prompts[4].reference])
    assert sorted(p.kind for p in given.parts) == ["image", "image", "text", "text"]
    for part in given.parts: assert torch.isfinite(policy(part)).all()
    context = next(p for p in given.parts if p.kind == "image").context
    dropped = policy.without(context, torch.tensor([True]), NO_TEXT)
    assert ((dropped["keep"] & FULL) > 0).sum() < ((context["keep"] & FULL) > 0).sum()

def test_guidance_off_outside_its_interval(policy, prompts):
    context, index = policy._draw_context(prompts[:2], {}, None, 1)
    x, t, g = torch.randn(2, 9, 32, generator=gen()), torch.tensor([0.3, 0.4]), Guidance(interval=(0.3, 1.0))
    with torch.no_grad():
        free, guided = policy.velocity(context, index, (3, 3))(x, t), policy.velocity(context, index, (3, 3), 4.0, g)(x, t)
    assert torch.equal(free[0], guided[0]) and not torch.allclose(free[1], guided[1])

def test_only_sampling_leaves_guidance_out_for_good(policy, prompts, monkeypatch):
    "In training two processes have other times and must make the same passes: else one waits for the other's layers for ever."
    context, index = policy._draw_context(prompts[:2], {}, None, 1)
    x, g, passes, through = torch.randn(2, 9, 32, generator=gen()), Guidance(interval=(0.3, 1.0)), [], type(policy)._continue
    monkeypatch.setattr(type(policy), "_continue", lambda *a: passes.append(1) or through(*a))
    def count(t, **how):
        v = policy.velocity(context, index, (3, 3), 4.0, g, **how)
        passes.clear()
        with torch.no_grad(): out = v(x, torch.full((2,), t))
        return len(passes), out
    (low, a), (high, _), (lazy, b), (lazy_high, _) = count(0.2), count(0.4), count(0.2, lazy=True), count(0.4, lazy=True)
    assert (low, high, lazy, lazy_high) == (high, high, 1, high) and high > 1 and torch.equal(a, b)

def test_renorm_by_hand():
    v, u, w = torch.randn(3, 2, 4, 6, generator=gen())
    a = u + 3 * (v - u)
    for name, dims in (("global", (1, 2)), ("channel", (2,))):
        full = w + 2 * (a - w)
        by_hand = full * (v.norm(dim=dims, keepdim=True) / (full.norm(dim=dims, keepdim=True) + 1e-8)).clamp(0.2, 1)
        assert torch.allclose(guide_velocity(v, u, w, 3.0, Guidance(2.0, renorm=name, renorm_min=0.2)), by_hand, atol=1e-6)
    short = a * (v.norm(dim=2, keepdim=True) / (a.norm(dim=2, keepdim=True) + 1e-8)).clamp(0, 1)
    assert torch.allclose(guide_velocity(v, u, w, 3.0, Guidance(2.0, renorm="text_channel")), w + 2 * (short - w), atol=1e-6)

# -- the learned router
def test_upcycled_policy_is_the_same_and_survives_a_folder(folder, prompts, tmp_path):
    policy = BagelPolicy.from_pretrained(folder)
    policy.drawing = replace(policy.drawing, steps=3)
    before = policy.sample(prompts, 2, gen(), max_text=4)
    policy.upcycle(experts=8, top_k=2)
    for a, b in zip(before.parts, policy.sample(prompts, 2, gen(), max_text=4).parts):
        assert torch.allclose(a.actions.float(), b.actions.float(), atol=1e-4) and torch.allclose(a.logp_old, b.logp_old, atol=1e-4)
    policy.save_pretrained(tmp_path/"up")
    again = load_policy(tmp_path/"up")
    assert again.state_dict().keys() == policy.state_dict().keys()

# -- files
def official_keys(layers=28, vit_layers=26):
    "The names in BAGEL-7B-MoT's two weight files, written out from its description."
    both = lambda *names: [f"{n}{s}.{w}" for n, ws in names for s in ("", GEN) for w in ws]
    w, wb = ("weight",), ("weight", "bias")
    keys = ["language_model.lm_head.weight", "language_model.model.embed_tokens.weight", *(f"language_model.model.{k}" for k in both(("norm", w)))]
    for i in range(layers):
        inside = both(*((f"self_attn.{p}_proj", wb) for p in "qkv"), ("self_attn.o_proj", w), ("self_attn.q_norm", w), ("self_attn.k_norm", w),
                      ("input_layernorm", w), ("post_attention_layernorm", w))
        inside += [f"mlp{s}.{p}_proj.weight" for s in ("", GEN) for p in ("gate", "up", "down")]
        keys += [f"language_model.model.layers.{i}.{k}" for k in inside]
    keys += [f"{m}.{x}" for m in ("time_embedder.mlp.0", "time_embedder.mlp.2", "vae2llm", "llm2vae", "connector.fc1", "connector.fc2") for x in wb]
    keys += ["latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"]
    v = "vit_model.vision_model."
    keys += [v + k for k in ("embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias", "embeddings.position_embedding.weight",
                             "post_layernorm.weight", "post_layernorm.bias")]
    keys += [f"{v}encoder.layers.{i}.{m}.{x}" for i in range(vit_layers) for x in wb for m in (
        "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")))]
    block = lambda name, short: [f"{name}.{m}.{x}" for m in ("norm1", "conv1", "norm2", "conv2") + (("nin_shortcut",) if short else ()) for x in wb]
    mid = lambda side: block(f"{side}.mid.block_1", False) + block(f"{side}.mid.block_2", False) + [f"{side}.mid.attn_1.{m}.{x}" for m in ("norm", "q", "k", "v", "proj_out") for x in wb]
    ae = [f"{s}.{m}.{x}" for s in ("encoder", "decoder") for m in ("conv_in", "norm_out", "conv_out") for x in wb] + mid("encoder") + mid("decoder")
    for i in range(4):
        for j in range(2): ae += block(f"encoder.down.{i}.block.{j}", j == 0 and i in (1, 2))
        for j in range(3): ae += block(f"decoder.up.{i}.block.{j}", j == 0 and i in (0, 1))
        if i < 3: ae += [f"encoder.down.{i}.downsample.conv.{x}" for x in wb]
        if i > 0: ae += [f"decoder.up.{i}.upsample.conv.{x}" for x in wb]
    return keys, ae

LLM = dict(hidden_size=3584, vocab_size=152064, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
           rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32768)
VIT = dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14, image_size=980)

def test_full_size_keys_both_ways():
    with torch.device("meta"): net, vae = Bagel(LLM, VIT, 64, 64), new_vae((128, 256, 512, 512), 2, 16)
    keys, ae = official_keys()
    have, have_ae = net.state_dict(), vae_state(vae)
    assert len(keys) == len(set(keys)) and len(ae) == len(set(ae))
    assert set(keys) == set(have) and set(ae) == set(have_ae)
    shape = lambda k: tuple((have | have_ae)[k].shape)
    p = "language_model.model.layers.27."
    for k, s in {p + "self_attn.k_proj_moe_gen.bias": (512,), p + "mlp_moe_gen.down_proj.weight": (3584, 18944), p + "self_attn.q_norm.weight": (128,),
                 "latent_pos_embed.pos_embed": (4096, 3584), "vit_pos_embed.pos_embed": (4900, 3584), "vae2llm.weight": (3584, 64), "llm2vae.weight": (64, 3584),
                 "vit_model.vision_model.embeddings.patch_embedding.weight": (1152, 588), "vit_model.vision_model.embeddings.position_embedding.weight": (4900, 1152),
                 "encoder.conv_out.weight": (32, 512, 3, 3), "encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "decoder.conv_in.weight": (512, 16, 3, 3)}.items():
        assert shape(k) == s, k
    check_keys({k: have[k].shape for k in keys}, {k: w.shape for k, w in have.items()}, "ema.safetensors")

def test_round_trip(policy, folder, prompts, tmp_path):
    from safetensors.torch import load_file
    again = load_policy(folder)
    again.save_pretrained(tmp_path/"again")
    for name in bagel.FILES:
        a, b = load_file(folder/name), load_file(tmp_path/"again"/name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert read_config(folder) == read_config(tmp_path/"again")
    again.drawing = policy.drawing
    for x, y in zip(policy.sample(prompts, 2, gen(), max_text=4).parts, again.sample(prompts, 2, gen(), max_text=4).parts): assert torch.equal(x.actions, y.actions)

@pytest.mark.parametrize("loader", [load_policy, BagelPolicy.from_pretrained])
@pytest.mark.parametrize("change, says", [
    (lambda e, a: e.pop("language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"), "layers.1.self_attn.q_proj_moe_gen.weight is missing"),
    (lambda e, a: e.update({"language_model.model.layers.9.mlp.up_proj.weight": torch.zeros(2)}), "layers.9.mlp.up_proj.weight"),
    (lambda e, a: e.update({"vae2llm.weight": torch.zeros(64, 5)}), "vae2llm.weight"),
    (lambda e, a: a.pop("decoder.up.0.block.1.conv2.bias"), "decoder.up.0.block.1.conv2.bias is missing"),
    (lambda e, a: a.update({"encoder.quant.weight": torch.zeros(1)}), "encoder.quant.weight"),
    (lambda e, a: a.update({"decoder.conv_in.weight": torch.zeros(32, 4, 3, 3)}), "vae2llm.weight"),
])
def test_wrong_keys_are_named(folder, tmp_path, change, says, loader):
    from safetensors.torch import load_file, save_file
    bad = tmp_path/"bad"; shutil.copytree(folder, bad)
    e, a = (load_file(bad/f) for f in bagel.FILES)
    change(e, a)
    for x, f in zip((e, a), bagel.FILES): save_file(x, bad/f)
    with pytest.raises(UserError, match=says.replace(".", r"\.")): loader(bad)

@pytest.mark.parametrize("name", [*bagel.FILES, "config.json", "llm_config.json", "vit_config.json"])
def test_missing_and_cut_files_are_named(folder, tmp_path, name):
    bad = tmp_path/"bad"; shutil.copytree(folder, bad)
    (bad/name).write_bytes((bad/name).read_bytes()[:-20])
    with pytest.raises(UserError, match=name.split(".")[0]): load_policy(bad)
    (bad/name).unlink()
    with pytest.raises(UserError, match=name.split(".")[0]): load_policy(bad)

# -- what users get wrong
def test_users_mistakes(policy, prompts):
    with pytest.raises(UserError, match="low < high"): Guidance(interval=(1.0, 0.4))
    with pytest.raises(UserError, match="Did you mean 'global'"): Guidance(renorm="globl")
    with pytest.raises(UserError, match="Did you mean 'sde'"): policy.sample(prompts, 2, estimator="sd")
    with pytest.raises(UserError, match="unknown setting 'stepz'.*'steps'"): policy.sample(prompts, 2, stepz=3)
    with pytest.raises(UserError, match="multiples of 8, at most 24"): policy.sample(prompts[:1], 2, size=20)
    with pytest.raises(UserError, match="multiples of 8, at most 24"): policy.sample(prompts[:1], 2, size=64)
    with pytest.raises(UserError, match="at least 1"): policy.sample(prompts, 2, cfg=0.5)
    with pytest.raises(UserError, match="has no picture"): policy.sample([Prompt("e", "edit", "make it red")], 2)
    with pytest.raises(UserError, match="'long'.*positions"): policy.sample([Prompt("long", "generate", "red " * 600)], 2)
    with pytest.raises(UserError, match="height, width, 3"): policy.sample([Prompt("g", "answer", "what is it ?", image=np.zeros((24, 24), np.uint8))], 2)

def test_pictures_of_other_sizes(policy):
    "Sources of any size are resized; questions without a picture are fine; all in one batch."
    im = lambda h, w: np.random.default_rng(0).integers(0, 255, (h, w, 3), dtype=np.uint8)
    ps = [Prompt("a", "answer", "what is it ?", image=im(24, 24)), Prompt("b", "answer", "what is it ?", image=im(48, 30)), Prompt("c", "answer", "red ?"),
          Prompt("d", "edit", "red", image=im(30, 48)), Prompt("e", "edit", "red", image=im(24, 24))]
    r = policy.sample(ps, 2, gen(), max_text=3, temperature=0.0)
    assert [im.shape for im in r.images[6:]] == [(16, 24, 3)] * 2 + [(24, 24, 3)] * 2
    for i, p in enumerate(ps[:3]): assert policy.sample([p], 2, gen(), max_text=3, temperature=0.0).texts == r.texts[2*i:2*i+2]
    for part in r.parts: assert ((policy(part) - part.logp_old).exp() - 1).abs().max() < 1e-4

def test_lora_reference_and_merge(folder, prompts, tmp_path):
    policy = BagelPolicy.from_pretrained(folder)
    policy.drawing = replace(policy.drawing, steps=3)
    policy.add_lora(4, 8, ["q_proj_moe_gen", "mlp_moe_gen.up_proj"])
    names = [n for n, w in policy.named_parameters() if w.requires_grad]
    assert names and all("lora" in n and GEN in n for n in names)
    r = policy.sample(prompts[:2], 2, gen())
    with torch.no_grad():
        for n, w in policy.named_parameters():
            if "lora_B" in n: w.normal_(std=0.3)
        moved = policy(r.parts[0])
        with policy.reference() as ref: assert torch.allclose(ref(r.parts[0]), r.parts[0].logp_old, atol=1e-5)
        assert not torch.allclose(moved, r.parts[0].logp_old, atol=1e-3)
    policy.save_pretrained(tmp_path/"merged")
    assert torch.allclose(load_policy(tmp_path/"merged")(r.parts[0]), moved, atol=1e-4)

# -- what the log asks to be kept
def drawn(policy, prompts, watch, **drawing):
    policy.watch = watch
    try: return policy.sample(prompts, 2, gen(3), **drawing)
    finally: policy.watch = (), 0

@pytest.mark.parametrize("drawing", [dict(estimator="forward"), dict(estimator="sde", window=2, low=1, high=4), dict(estimator="sde", window=2, low=2, high=4, same_start=True),
                                     dict(estimator="forward", think=True)])
def test_watching_changes_nothing_and_sees_every_step(policy, drawing):
    "The states before each step: from noise, by the velocity that is asked again here, to the picture."
    prompts = draw_prompts("train", 2) + edit_prompts("train", 1)
    kw = dict(drawing, max_text=4)
    plain, seen = drawn(policy, prompts, ((), 0), **kw), drawn(policy, prompts, ([1, 2, 4], 10**9), **kw)
    for a, b in zip(plain.parts, seen.parts):
        assert torch.equal(a.actions, b.actions) and "path" not in a.settings
        assert a.logp_old is b.logp_old is None or torch.equal(a.logp_old, b.logp_old)
    assert all(np.array_equal(a, b) for a, b in zip(plain.images, seen.images))
    pictures = [p for p in seen.parts if p.kind == "image"]
    assert sorted(int(p.rows[i]) for p in pictures for i in p.settings["path"]["states"]) == [1, 2, 4]
    for part in pictures:
        s, path = part.settings, part.settings["path"]
        assert path["steps"] == list(range(5))
        v = policy.velocity(part.context, part.context_index, s["grid"], 1.0, Guidance(**s["guidance"]))
        for i, states in path["states"].items():
            b = int(part.rows[i])
            x = torch.zeros(len(part), *states.shape[1:])
            for k in range(5):
                x[i] = states[k]
                with torch.no_grad(): step = v(x, torch.full((len(part),), s["times"][k]))[i] * (s["times"][k + 1] - s["times"][k])
                after = states[k + 1] if k < 4 else None
                if k in s["window"]:
                    w = s["window"].index(k)
                    assert torch.equal(states[k], part.actions[i, w, 0]) and (after is None or torch.equal(after, part.actions[i, w, 1]))
                elif after is not None: assert torch.allclose(states[k] + step, after, atol=1e-5)
                else: assert np.abs(policy.pictures((states[k] + step)[None], s["grid"])[0].astype(int) - seen.images[b]).max() <= 1

def test_what_is_kept_fits_into_the_pixels(policy):
    prompts, h = draw_prompts("train", 4), 24 * 24
    kept = lambda rows, pixels, **kw: [(p.settings["path"]["steps"], list(p.settings["path"]["states"])) for p in drawn(policy, prompts, (rows, pixels), steps=12, **kw).parts if "path" in p.settings]
    assert kept([0, 1, 2, 3], 48 * h, estimator="forward") == [(list(range(12)), [0, 1, 2, 3])]
    (steps, rows), = kept([0, 1, 2, 3], 47 * h, estimator="forward")
    assert len(steps) == 11 and steps[0] == 0 and steps[-1] == 11 and rows == [0, 1, 2, 3]
    (steps, rows), = kept([0, 1, 2, 3], 20 * h, estimator="sde", window=3, low=4, high=7)          # rather eight steps of two than five of four
    assert len(steps) == 8 and {0, 4, 5, 6, 11} <= set(steps) and rows == [0, 1]
    (steps, rows), = kept([0, 1, 2, 3], 3 * h, estimator="sde", window=2, low=4, high=6)
    assert len(steps) == 3 and {4, 5} <= set(steps) and rows == [0]
    assert kept([0, 1], h - 1, estimator="forward") == kept([], 10**9, estimator="forward") == kept([77], 10**9, estimator="forward") == []
