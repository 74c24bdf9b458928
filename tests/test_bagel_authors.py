"""Our BAGEL against its authors' code, where that is at hand: set BAGEL_CODE to a clone of github.com/ByteDance-Seed/Bagel.

Their classes are loaded from a folder written by ours, run one prompt at a time in fp32 with a plain stand-in for flash attention,
and must give the same latents and the same greedy answers."""
import copy
import importlib.machinery
import os
import sys
import types

import numpy as np
import pytest
import torch

import unify_rl
from unify_rl.mechanisms.flow import sample_flow, timesteps
from unify_rl.policies.bagel import Guidance, new_bagel
from unify_rl.world.prompts import draw_prompts, edit_prompts
from unify_rl.world.questions import question_prompts

CODE = os.environ.get("BAGEL_CODE")
pytestmark = pytest.mark.skipif(not CODE, reason="BAGEL_CODE does not point to a clone of the authors' repository")

def attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=False, **_):
    "flash_attn_varlen_func, slowly."
    out = torch.empty_like(q)
    for a, b, c, d in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:]):
        Q, K, V = q[a:b].transpose(0, 1), *(x[c:d].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        s, behind = Q @ K.transpose(1, 2) * Q.shape[-1]**-0.5, K.shape[1] - Q.shape[1]
        if causal: s = s.masked_fill(torch.ones(s.shape[1:], dtype=torch.bool).triu(behind + 1), -torch.inf)
        out[a:b] = (s.softmax(-1) @ V).transpose(0, 1)
    return out

@pytest.fixture(scope="module")
def both(tmp_path_factory):
    words = {w for p in draw_prompts("train", 300) for w in p.text.split()}
    ours, folder = new_bagel(sorted(words | set("what is the of in a how many are there".split())), hidden=64, layers=2), tmp_path_factory.mktemp("bagel")
    torch.manual_seed(1)
    torch.nn.init.normal_(ours.net.llm2vae.weight, std=0.1)
    for n, w in ours.model.named_parameters():
        if "norm" in n and n.endswith("weight"): torch.nn.init.uniform_(w, 0.5, 1.5)
    ours.save_pretrained(folder)

    import transformers.modeling_rope_utils as rope
    from safetensors.torch import load_file
    for name in ("flash_attn", "cv2"):
        sys.modules.setdefault(name, types.ModuleType(name)).__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["flash_attn"].flash_attn_varlen_func = attention
    rope.ROPE_INIT_FUNCTIONS.setdefault("default", lambda config=None, device=None, **_: (1e6 ** -(torch.arange(0, 32, 2).float() / 32), 1.0))
    sys.path.insert(0, CODE)
    from data.transforms import ImageTransform
    from inferencer import InterleaveInferencer
    from modeling.autoencoder import AutoEncoder, AutoEncoderParams
    from modeling.bagel import Bagel, BagelConfig, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
    llm, vit = Qwen2Config.from_json_file(folder/"llm_config.json"), SiglipVisionConfig.from_json_file(folder/"vit_config.json")
    llm.qk_norm, llm.tie_word_embeddings, llm.layer_module, llm.pad_token_id, llm.rope_theta = True, False, "Qwen2MoTDecoderLayer", None, 1e6
    vit.rope = False; vit.num_hidden_layers -= 1
    sizes = types.SimpleNamespace(downsample=4, z_channels=8)
    theirs = Bagel(Qwen2ForCausalLM(llm), SiglipVisionModel(vit), BagelConfig(llm_config=llm, vit_config=vit, vae_config=sizes, vit_max_num_patch_per_side=6, max_latent_size=3))
    theirs.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit)
    theirs.load_state_dict(load_file(folder/"ema.safetensors"), strict=True)
    ae = AutoEncoder(AutoEncoderParams(24, 3, 4, 32, 3, [1, 1, 1], 1, 8, 1.0, 0.0))
    ae.load_state_dict(load_file(folder/"ae.safetensors"), strict=True)
    ae.reg.forward = lambda z: z.chunk(2, 1)[0]                             # the mean: a draw could not be compared
    tok = types.SimpleNamespace(encode=lambda t: ours.tokenizer(t, add_special_tokens=False)["input_ids"], decode=ours.tokenizer.decode)
    ids = dict(bos_token_id=ours.ids["bos"], eos_token_id=ours.ids["eos"], start_of_image=ours.ids["start"], end_of_image=ours.ids["end"])
    half, torch.bfloat16 = torch.bfloat16, torch.float32                    # they cast to bf16 in many places
    yield ours, theirs.eval(), InterleaveInferencer(theirs, ae.eval(), tok, ImageTransform(24, 24, 8), ImageTransform(24, 24, 4), ids), ids
    torch.bfloat16 = half; sys.path.remove(CODE)

@pytest.mark.parametrize("task, guidance", [("generate", Guidance()), ("edit", Guidance(2.0, (0.0, 1.0), "text_channel")),
                                            ("edit", Guidance(2.0, (0.2, 0.9), "channel")), ("edit", Guidance(2.0, (0.2, 0.9), "global", 0.3))])
@torch.no_grad()
def test_same_latents(both, task, guidance):
    from PIL import Image
    ours, theirs, inf, ids = both
    for p in (draw_prompts if task == "generate" else edit_prompts)("train", 2):
        noise, full = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)), inf.init_gen_context()
        no_image = copy.deepcopy(full)
        if task == "edit": full = inf.update_context_image(Image.fromarray(p.image), full)
        no_text = copy.deepcopy(full)
        full, no_image = inf.update_context_text(p.text, full), inf.update_context_text(p.text, no_image)
        inputs = theirs.prepare_vae_latent(full["kv_lens"], full["ropes"], [(24, 24)], ids) | dict(packed_init_noises=noise.clone())
        for name, c in (("cfg_text", no_text), ("cfg_img", no_image)):
            place = theirs.prepare_vae_latent_cfg(c["kv_lens"], c["ropes"], [(24, 24)])
            inputs |= {k.replace("cfg", name, 1): x for k, x in place.items()} | {f"{name}_past_key_values": c["past_key_values"]}
        out = theirs.generate_image(past_key_values=full["past_key_values"], num_timesteps=8, timestep_shift=3.0, cfg_text_scale=4.0, cfg_img_scale=guidance.image,
                                    cfg_interval=guidance.interval, cfg_renorm_min=guidance.renorm_min, cfg_renorm_type=guidance.renorm, **inputs)[0]
        context, index = ours._draw_context([p], ours._look([p.image if task == "edit" else None], vae=True), None, 1)
        mine = sample_flow(ours.velocity(context, index, (3, 3), 4.0, guidance), noise[None], timesteps(7, 3.0).tolist()).final
        assert (mine[0] - out).abs().max() < 1e-4
        assert np.abs(np.asarray(inf.decode_image(out, (24, 24))).astype(int) - ours.pictures(mine, (3, 3))[0]).max() <= 1     # they cut, we round

def test_same_answers(both):
    from PIL import Image
    ours, _, inf, _ = both
    for p in question_prompts("train", 3):
        c = inf.update_context_text(p.text, inf.update_context_image(Image.fromarray(p.image), inf.init_gen_context(), vae=False))
        said = [t for t in inf.gen_text(c, max_length=9, do_sample=False).split() if not t.startswith("<|")]
        assert ours.sample([p], 1, temperature=0.0, max_text=8).texts[0].split() == said
