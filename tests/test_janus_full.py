"""Janus-Pro as it is published: its files, its tokenizer, its shapes (384 pixels, 576 tokens, codebook 16384), with one layer in each tower.

The folder is written here by hand, not by our own code: sharded bfloat16 weights, a configuration as transformers 4.52 wrote it, a byte-level
tokenizer that calls itself a Llama's, the image processor in a file of its own. Only depth is missing, and the weights are noise.
"""
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import unify_rl
from unify_rl.core import Prompt, UserError, generator_for
from unify_rl.policies.load import load_policy
from unify_rl.rewards.verifiable import per_sample

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE, BOI, EOI = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
PADS = {"Janus-Pro-1B": 100002, "Janus-Pro-7B": 100015}
SMALL = dict(hidden=64, heads=2, ffn=96, tower=32, base=32, latent=32)       # the same files and tokens, narrow
FULL = dict(hidden=2048, heads=16, ffn=5632, tower=1024, base=128, latent=256)


def write_tokenizer(folder, pad):
    "Byte-level BPE with 102400 ids, of which only bytes, a few merges and the special tokens can come up."
    merges = [("Ġ", "a"), ("Ġ", "c"), ("r", "e"), ("re", "d"), ("Ġ", "red")]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    special = {BOS: 100000, EOS: 100001, PAD: pad, BOI: 100016, IMAGE: 100581, "<|User|>": 100590, "<|Assistant|>": 100591, EOI: 100593}
    at = {i: t for t, i in special.items()} | dict(enumerate(tokens))
    vocab = {at.get(i, f"<unused {i}>"): i for i in range(102400)}
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special if "|" not in t or t == PAD])
    tok.add_tokens([AddedToken(t, normalized=False) for t in ("<|User|>", "<|Assistant|>")])
    tok.save(str(folder/"tokenizer.json"))
    named = dict(bos_token=BOS, eos_token=EOS, pad_token=PAD, image_token=IMAGE, boi_token=BOI, eoi_token=EOI)
    (folder/"tokenizer_config.json").write_text(json.dumps(named | dict(
        tokenizer_class="LlamaTokenizerFast", processor_class="JanusProcessor", legacy=True, add_bos_token=True, add_eos_token=False, model_max_length=16384,
        clean_up_tokenization_spaces=False, unk_token=None, extra_special_tokens=dict(image_token=IMAGE, boi_token=BOI, eoi_token=EOI))))
    (folder/"special_tokens_map.json").write_text(json.dumps(named))


def write_settings(folder, pad, hidden, heads, ffn, tower, base, latent):
    text = dict(model_type="llama", vocab_size=102400, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=1, num_attention_heads=heads,
                num_key_value_heads=heads, head_dim=hidden // heads, max_position_embeddings=16384, rms_norm_eps=1e-6, rope_theta=10000.0, hidden_act="silu",
                bos_token_id=100000, eos_token_id=100001, pad_token_id=pad, attention_bias=False, torch_dtype="bfloat16")
    vision = dict(model_type="janus_vision_model", hidden_size=tower, num_hidden_layers=1, num_attention_heads=16 if tower == 1024 else 2, image_size=384, patch_size=16,
                  mlp_ratio=4.0, projection_dim=hidden, depth=2, num_image_tokens=576, layer_norm_eps=1e-6, hidden_act="gelu", torch_dtype="bfloat16")
    vq = dict(model_type="janus_vqgan", base_channels=base, channel_multiplier=[1, 1, 2, 2, 4], num_res_blocks=1, latent_channels=latent, embed_dim=8,
              num_embeddings=16384, double_latent=False, num_patches=24, projection_dim=hidden, image_token_embed_dim=hidden, num_hidden_layers=2, torch_dtype="bfloat16")
    files = {"config.json": dict(architectures=["JanusForConditionalGeneration"], image_token_id=100581, model_type="janus", text_config=text, vision_config=vision,
                                 vq_config=vq, torch_dtype="bfloat16", transformers_version="4.52.0.dev0"),
             "generation_config.json": dict(bos_token_id=100000, eos_token_id=100001, pad_token_id=pad, guidance_scale=5, temperature=1, boi_token_id=100016,
                                            transformers_version="4.52.0.dev0"),
             "preprocessor_config.json": dict(background_color=[127, 127, 127], do_normalize=True, do_rescale=True, do_resize=True, image_mean=[.5] * 3, image_std=[.5] * 3,
                                              image_processor_type="JanusImageProcessor", min_size=14, processor_class="JanusProcessor", resample=3,
                                              rescale_factor=1 / 255, size=dict(height=384, width=384)),
             "processor_config.json": dict(num_image_tokens=576, processor_class="JanusProcessor", use_default_system_prompt=True)}
    for name, values in files.items(): (folder/name).write_text(json.dumps(values))


def write_weights(folder):
    "Noise of a size that keeps activations of order one, in two files."
    from transformers import JanusConfig, JanusForConditionalGeneration
    with torch.device("meta"): shapes = {k: v.shape for k, v in JanusForConditionalGeneration(JanusConfig.from_pretrained(folder)).state_dict().items()}
    noise, weights = torch.randn(2**20 + 7, generator=generator_for("noise")).bfloat16(), {}
    for k, shape in shapes.items():
        n = math.prod(shape)
        x = noise.repeat(n // len(noise) + 1)[:n].view(shape).roll(len(weights))
        if len(shape) == 1: x = torch.ones(shape) if k.endswith("norm.weight") or "norm" in k and k.endswith("weight") else torch.zeros(shape)
        elif "embed" not in k.split(".")[-2] or "patch" in k: x = x * math.prod(shape[1:]) ** -0.5
        weights[k] = x.bfloat16().contiguous()
    names = list(weights)
    assert "lm_head.weight" in names
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in shards.items(): save_file({k: weights[k] for k in mine}, folder/file, {"format": "pt"})
    (folder/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map={k: f for f, mine in shards.items() for k in mine})))


def official(folder, pad, **shape):
    folder.mkdir()
    write_tokenizer(folder, pad); write_settings(folder, pad, **shape); write_weights(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory): return official(tmp_path_factory.mktemp("janus")/"small", 100002, **SMALL)

@pytest.fixture(scope="module")
def policy(small): return load_policy(small)


def picture(height=384, width=384): return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)

DRAW = Prompt("d", "generate", "a red cat and a dog")
ASK = Prompt("q", "answer", "What is  this?\nA red cat?", image=picture())


# -- the folder ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PADS)
def test_pad_comes_from_the_tokenizer(name, tmp_path):
    policy = load_policy(official(tmp_path/name, PADS[name], **SMALL))
    context = policy._draw_context([DRAW, Prompt("e", "generate", "a cat")])
    assert set(context["ids"][~context["mask"]].tolist()) == {PADS[name]}
    blank = policy._unconditional(context)["ids"][0]
    assert blank[0] == 100000 and blank[-1] == 100016 and set(blank[1:-1].tolist()) == {PADS[name]}


def test_prompts_are_the_files_tokens(policy, small):
    "transformers reads a tokenizer that calls itself a Llama's as if it were sentencepiece: spaces are lost, and so is the first token."
    raw = Tokenizer.from_file(str(small/"tokenizer.json"))
    ids = lambda text: [100000, *raw.encode(text, add_special_tokens=False).ids]
    draw, ask = policy._draw_context([DRAW]), policy._answer_context([ASK])
    assert draw["ids"][0].tolist() == ids(f"<|User|>: {DRAW.text}\n\n<|Assistant|>:{BOI}")
    assert ask["ids"][0].tolist() == ids(f"<|User|>: {BOI}{IMAGE * 576}{EOI}\n{ASK.text}\n\n<|Assistant|>:")
    said = raw.encode("a red cat", add_special_tokens=False).ids + [100001, policy.tokenizer.pad_token_id]
    assert policy._show("text", torch.tensor([said])) == ["a red cat"]
    given = policy.encode([ASK], ["a red cat"], [None]).parts[0]
    assert given.actions[0].tolist() == said[:-1]
    states = policy.token_states([ASK.image], ["a red cat"])
    assert int(states[2].sum()) == 576 and int((states[1] & ~states[2]).sum()) == len(said) - 2


def test_weights_are_float32_and_untied(policy, small):
    "bfloat16 on disk; in training weights stay float32, as model.precision says, or steps of a small learning rate would be rounded away."
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    files = [load_file(f) for f in sorted(small.glob("*.safetensors"))]
    own = policy.janus.state_dict()
    assert all(torch.equal(own[k], w.float()) for f in files for k, w in f.items()) and len(own) == sum(map(len, files))
    assert not torch.equal(own["lm_head.weight"], own["model.language_model.embed_tokens.weight"])


# -- saved and loaded ----------------------------------------------------------------------------------------------

def inputs(policy):
    "A question about a picture, as transformers' own forward wants it."
    context = policy._answer_context([ASK])
    return dict(input_ids=context["ids"], attention_mask=context["mask"].long(), pixel_values=policy._pixels([ASK.image]))


def theirs(folder):
    "The folder as transformers reads it, with nothing missing and nothing left over."
    from transformers import JanusForConditionalGeneration
    model, info = JanusForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def test_saved_is_what_transformers_loads(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    model = theirs(tmp_path)
    assert all(torch.equal(w, model.state_dict()[k]) for k, w in policy.janus.state_dict().items())
    assert torch.equal(model(**inputs(policy)).logits, policy.janus(**inputs(policy)).logits)
    assert not torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)
    again = load_policy(tmp_path)
    assert again._answer_context([ASK])["ids"].equal(policy._answer_context([ASK])["ids"]) and again.tokenizer.pad_token_id == 100002
    from transformers import AutoProcessor
    other = AutoProcessor.from_pretrained(tmp_path)
    assert other.num_image_tokens == 576 and other.tokenizer.decode(other.tokenizer("a red cat", add_special_tokens=False)["input_ids"]) == "a red cat"


def test_bfloat16_if_asked_for(small):
    policy = load_policy(small, dtype=torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    parts = policy.encode([DRAW, ASK], [None, "a red cat"], [picture(), None]).parts + policy.sample([ASK], 2, generator_for(0), max_text=4).parts
    for part in parts: assert policy(part).isfinite().all() and policy(part).dtype == torch.float32


# -- pictures of any size ------------------------------------------------------------------------------------------

def test_pictures_go_through_the_image_processor(policy):
    "A picture that fits is scaled here; the processor must agree with that, and makes others fit: the longest side 384, the rest grey."
    theirs = lambda *images: policy.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
    fits, wide, tall = picture(), picture(100, 300), picture(1000, 20)
    torch.testing.assert_close(policy._pixels([fits]), theirs(fits), atol=1e-6, rtol=0)
    assert torch.equal(policy._pixels([fits, wide, tall]), theirs(fits, wide, tall))
    assert policy._pixels([wide]).shape == (1, 3, 384, 384) and policy._pixels([wide])[:, :, :127].abs().max() < .01
    asked = [Prompt(str(i), "answer", "a cat?", image=im) for i, im in enumerate((fits, wide, tall))]
    part = policy.sample(asked, 2, generator_for(0), max_text=3).parts[0]
    assert policy._see(part.context["pixels"]).shape == (3, 576, 64)
    with torch.no_grad(): torch.testing.assert_close(policy(part), part.logp_old, atol=1e-4, rtol=1e-5)
    drawn = policy.encode([DRAW], [None], [wide]).parts[0].actions
    assert drawn.shape == (1, 576) and drawn.max() < 16384


def test_the_shipped_policys_processor_is_the_one_it_was_trained_with():
    "Whoever reads tiny-janus with transformers alone sees pictures as it does."
    tiny = load_policy("tiny-janus")
    images = [picture(24, 24), picture(24, 24)]
    torch.testing.assert_close(tiny._pixels(images), tiny.processor.image_processor(images, return_tensors="pt")["pixel_values"], atol=1e-6, rtol=0)


# -- what is missing -----------------------------------------------------------------------------------------------

def linked(small, folder):
    "A copy that takes no space."
    shutil.copytree(small, folder, copy_function=lambda a, b: shutil.copy(a, b) if a.endswith(".json") else os.link(a, b))
    return folder

@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "config.json",
                                  "model-00002-of-00002.safetensors"])
def test_a_missing_file_is_named(name, small, tmp_path):
    (linked(small, tmp_path/"bad")/name).unlink()
    with pytest.raises(UserError, match=re.escape(name)): load_policy(tmp_path/"bad")

def test_without_an_index_every_shard_is_needed(small, tmp_path):
    bad = linked(small, tmp_path/"bad")
    (bad/"model.safetensors.index.json").unlink(); (bad/"model-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"): load_policy(bad)

def test_a_tokenizer_without_its_tokens(small, tmp_path):
    bad = linked(small, tmp_path/"bad")
    c = json.loads((bad/"tokenizer_config.json").read_text())
    for gone in ("pad_token", "bos_token", "boi_token"):
        left = {k: v for k, v in c.items() if k != gone} | dict(extra_special_tokens={k: v for k, v in c["extra_special_tokens"].items() if k != gone})
        (bad/"tokenizer_config.json").write_text(json.dumps(left))
        (bad/"special_tokens_map.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match=f"tokenizer_config.json names no {gone}"): load_policy(bad)

def test_a_tokenizer_of_another_model(small, tmp_path):
    bad = linked(small, tmp_path/"bad")
    c = json.loads((bad/"config.json").read_text())
    (bad/"config.json").write_text(json.dumps(c | dict(image_token_id=100594)))
    with pytest.raises(UserError, match="is token 100581 of the tokenizer, but config.json has image_token_id 100594"): load_policy(bad)


# -- what trains ---------------------------------------------------------------------------------------------------

FROZEN = ("vision_model", "aligner", "vqmodel", "generation_embeddings", "generation_aligner", "generation_head", "lm_head")
HEADS = ["language_model", "lm_head", "generation_head", "generation_embeddings", "generation_aligner", "aligner"]

def test_a_name_stands_for_one_module(policy):
    "`aligner` is the one of the understanding tower, not `generation_aligner` as well."
    owner = lambda names: {n.split(".")[2] if n.startswith("model.model.") else n.split(".")[1] for n in names}
    assert owner(policy.train_only(list(policy.trains))) == {"language_model"} and policy.frozen_vision
    assert owner(n for n, p in policy.named_parameters() if not p.requires_grad) == set(FROZEN)
    for name in (*FROZEN, "language_model"): assert owner(policy.train_only([name])) == {name}
    assert owner(policy.train_only(HEADS)) == set(HEADS) and not policy.frozen_vision
    with pytest.raises(UserError, match="Did you mean 'generation_head'"): policy.train_only(["generation_heads"])


redness = per_sample("redness", lambda prompt, text, image: float(image[..., 0].mean()), tasks=("generate",))
letters = per_sample("letters", lambda prompt, text, image: float(sum(map(ord, text)) % 97), tasks=("answer",))     # no two texts are worth the same

@pytest.mark.parametrize("train", [pytest.param([], id="default"), pytest.param(HEADS, id="heads", marks=pytest.mark.slow)])
def test_a_step_moves_what_trains_and_nothing_else(train, small, tmp_path):
    "One step of a whole run on the published files; what it leaves behind is a Janus for transformers."
    before = load_policy(small).janus.state_dict()
    run = unify_rl.train("grpo", small, run_dir=str(tmp_path/"run"), prompts=[DRAW, ASK], rewards=[redness, letters], steps=1, progress=False,
                         rollout=dict(prompts=2, group_size=2, max_text=6, cfg=5.0), optimizer=dict(lr=1e-3), model=dict(train=train), evaluate=dict(suites=[]))
    after = theirs(run.dir/"policy").state_dict()
    moved = {k.removeprefix("model.").split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert moved == set(train or ["language_model"])
    assert load_policy(run.dir/"policy").tokenizer.pad_token_id == 100002


def lora_merges(policy, folder):
    "Adapters sit on the language model's linear layers only; what is saved has them merged, and is a plain Janus for transformers."
    policy.add_lora(2, 8, list(policy.lora_targets))
    adapted = [n for n, m in policy.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == 7 and all(".language_model.layers.0." in n for n in adapted)
    assert all("lora_" in n for n, p in policy.named_parameters() if p.requires_grad)
    for n, p in policy.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.02)
    question = inputs(policy)
    with torch.no_grad():
        ours = policy.model(**question).logits[:, -4:]
        with policy.model.disable_adapter(): assert (policy.model(**question).logits[:, -4:] - ours).abs().max() > 1e-2
        policy.save_pretrained(folder)
        torch.testing.assert_close(theirs(folder)(**question).logits[:, -4:], ours, atol=1e-3, rtol=1e-4)


def test_lora_adapts_the_language_model_and_is_merged_when_saved(small, tmp_path): lora_merges(load_policy(small), tmp_path)


# -- the shapes of Janus-Pro-1B ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = official(tmp_path_factory.mktemp("janus")/"full", 100002, **FULL)
    yield load_policy(folder)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_full_shapes_draw_answer_train_and_save(full, tmp_path):
    "One layer in each tower, everything else as in Janus-Pro-1B (a minute of one core, 6 GB): one test, because loading and drawing are dear."
    lm = full.janus.model.language_model
    assert (lm.embed_tokens.weight.shape, lm.layers[0].mlp.up_proj.weight.shape) == ((102400, 2048), (5632, 2048))
    assert full.janus.model.generation_head.vision_head.weight.shape == (16384, 2048) and full.janus.model.vqmodel.quantize.embedding.weight.shape == (16384, 8)

    assert all("language_model" in n for n in full.train_only(list(full.trains)))
    rollout = full.sample([DRAW, ASK], 1, generator_for("full"), cfg=5.0, max_text=6)
    image, text = rollout.parts
    assert image.actions.shape == (1, 576) and image.actions.max() > 12000 and rollout.images[0].shape == (384, 384, 3) and rollout.images[0].dtype == np.uint8
    assert isinstance(rollout.texts[1], str) and text.context["features"].shape == (1, 576, 2048) and text.context["ids"].shape[1] > 578

    frozen = {n: p.detach().clone() for n, p in full.named_parameters() if not p.requires_grad and "lm_head" not in n}
    head, trained = full.janus.lm_head.weight[::97].clone(), {n: p[:8].detach().clone() for n, p in full.named_parameters() if p.requires_grad}
    gaps = []
    for part in rollout.parts:
        logp = full(part)
        gaps.append(float((logp - part.logp_old).detach().abs().max()))
        logp.sum().backward()
    assert max(gaps) < 1e-3, gaps
    torch.optim.SGD([p for p in full.parameters() if p.requires_grad], lr=1e-3).step()
    full.zero_grad(set_to_none=True)
    own = dict(full.named_parameters())
    assert all(torch.equal(p, own[n]) for n, p in frozen.items()) and torch.equal(head, full.janus.lm_head.weight[::97])
    assert not any(torch.equal(p, own[n][:8]) for n, p in trained.items() if "embed_tokens" not in n)       # those tokens were not used
    del frozen, trained, own

    lora_merges(full, tmp_path)
    shutil.rmtree(tmp_path)
