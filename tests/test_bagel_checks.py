"BAGEL once more, by other means: log-probabilities and their gradients in float64 from whole sequences, mixed batches, a full-size folder, bad files and pictures."
import copy
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import unify_rl.policies.bagel as bagel
from test_bagel import LLM, VIT, folder, gen, official_keys, plain, policy, prompts, segments  # noqa: F401 (fixtures too)
from unify_rl.core import Prompt, UserError
from unify_rl.policies.bagel import Bagel, BagelPolicy, Guidance, bagel_shapes, new_vae, vae_state
from unify_rl.policies.load import check_folder, load_policy
from unify_rl.world.questions import question_prompts

# -- log-probabilities of drawn steps, written out in float64 without the flow's own functions

def exact_velocity(twin, p, x, t, thought=None, **keep):
    "The velocity of one latent at one time, from the whole sequence: no cache, no batch, no padding, no sorting."
    net, tokens = twin.net, twin.net.language_model.model.embed_tokens.weight
    angle = torch.tensor([t * 10000.0 ** (-k / 128) for k in range(128)], dtype=torch.float64)
    w1, b1, w2, b2 = (net.time_embedder.mlp[i].get_parameter(n) for i in (0, 2) for n in ("weight", "bias"))
    time = F.silu(torch.cat([angle.cos(), angle.sin()]) @ w1.T + b1) @ w2.T + b2
    noisy = x @ net.vae2llm.weight.T + net.vae2llm.bias + time + net.latent_pos_embed.pos_embed
    ids = twin.ids
    segs = segments(twin, p, thought=thought, **keep) + [("latent", torch.cat([tokens[[ids["start"]]], noisy, tokens[[ids["end"]]]]))]
    return plain(net, segs, 11)[1:-1] @ net.llm2vae.weight.T + net.llm2vae.bias

def exact_guided(twin, p, x, t, scale, image, low, high):
    "Text guidance (and, for edits, image guidance) with the renorm of p's task."
    v = exact_velocity(twin, p, x, t)
    if scale == 1 or not low < t <= high: return v
    u = exact_velocity(twin, p, x, t, text=False, full=False)
    g = u + scale * (v - u)
    if p.task == "edit":
        g = g * (v.norm(dim=-1, keepdim=True) / (g.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1)
        i = exact_velocity(twin, p, x, t, picture=False, full=False)
        return i + image * (g - i)
    return g * (v.norm() / (g.norm() + 1e-8)).clamp(max=1)

def exact_step_logp(v, x, x_next, t, t_next, eta):
    "Flow-SDE: mean over dimensions of log N(x_next; mean, std) of the Euler-Maruyama step."
    s, span = eta * math.sqrt(t / (1 - (t_next if t == 1 else t))), t - t_next
    score = -(x + (1 - t) * v) / t                                      # of the Gaussian around (1 - t) times the predicted data
    mean, std = x - span * (v - s * s / 2 * score), s * math.sqrt(span)
    return (-(x_next - mean) ** 2 / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))).mean()

@pytest.fixture(scope="module")
def twin(policy):
    t = copy.deepcopy(policy).double()
    t.requires_grad_(False); t.latents = lambda pixels: policy.latents(pixels.float()).double()
    return t

@pytest.mark.parametrize("i, kw", [(0, {}), (5, {}), (0, dict(cfg=3.0, logp="guided")), (5, dict(cfg=3.0, logp="guided"))])
@torch.no_grad()
def test_sde_logp_in_float64(policy, twin, prompts, i, kw):
    "The rollout's own log-probabilities, for a picture and an edit, without and with guidance."
    shift, steps, p = 3.0, policy.drawing.steps, prompts[i]
    part = policy.sample(prompts, 2, gen(2), max_text=2, **kw).parts
    part = next(q for q in part if q.kind == "image" and 2 * i in q.rows.tolist())
    row = part.rows.tolist().index(2 * i)
    times = [shift * u / (1 + (shift - 1) * u) for u in (1 - k / steps for k in range(steps + 1))]
    g = policy.guidance["edit" if p.task == "edit" else "generate"]
    now = policy(part)[row]
    for k, step in enumerate(part.settings["window"]):
        x, x_next = part.actions[row, k].double()
        v = exact_guided(twin, p, x, times[step], kw.get("cfg", 1.0), g.image, *g.interval)
        want = float(exact_step_logp(v, x, x_next, times[step], times[step + 1], policy.drawing.noise_level))
        assert abs(float(part.logp_old[row, k]) - want) < 1e-4 and abs(float(now[k]) - want) < 1e-4

def test_forward_logp_and_gradient_in_float64(policy, twin, prompts):
    "Two rows of one prompt, with the same draws: minus the flow loss there; and its gradient, through the shared prompt, to weights of every kind."
    part = policy.sample(prompts[5:6], 2, gen(4), estimator="forward", draws=1).parts[0]
    drawn = bagel.forward_draws(part.actions[:, 0], part.settings["seed"], part.targets["draw"], 1, part.settings["draw_shift"])
    assert torch.equal(drawn.noise[0], drawn.noise[1])
    names = ["language_model.model.embed_tokens.weight", "language_model.model.layers.0.self_attn.k_proj.weight",
             "language_model.model.layers.0.mlp.down_proj.weight", "language_model.model.layers.1.self_attn.v_proj_moe_gen.bias",
             "vae2llm.weight", "llm2vae.bias", "time_embedder.mlp.0.weight"]
    mine, theirs = ([m.net.get_parameter(n) for n in names] for m in (policy, twin))
    for w in (*mine, *theirs): w.requires_grad_(True)
    want = []
    for row in range(2):
        x0, e, t = part.actions[row, 0].double(), drawn.noise[row, 0].double(), float(drawn.t[row, 0])
        want.append(-((exact_velocity(twin, prompts[5], (1 - t) * x0 + t * e, t) - (e - x0)) ** 2).mean())
    got = policy(part)[:, 0]
    assert (got.double() - torch.stack(want)).abs().max() < 1e-4
    weights = torch.tensor([1.0, -2.0])
    for n, a, b in zip(names, torch.autograd.grad(got @ weights, mine), torch.autograd.grad(torch.stack(want) @ weights.double(), theirs)):
        assert b.abs().max() > 0 and (a.double() - b).norm() < 1e-3 * b.norm(), n
    for w in theirs: w.requires_grad_(False)

# -- one batch of everything, against one prompt at a time

@pytest.fixture(scope="module")
def mixed(prompts):
    joint = [replace(p, id=f"joint/{i}", task="joint", question="what is it ?") for i, p in enumerate(prompts[:2])]
    return [prompts[4], prompts[2], prompts[0], joint[0], prompts[5], prompts[3], prompts[1], joint[1]]

def by_sample(rollout, i):
    "(kind, final latents or tokens, recorded log-probabilities) of prompt i's samples."
    G, out = rollout.group_size, []
    for g in range(G):
        for part in rollout.parts:
            for b in (part.rows == i * G + g).nonzero()[:, 0]:
                out.append((part.kind, part.actions[b][part.mask[b]], None if part.logp_old is None else part.logp_old[b][part.mask[b]]))
    return out

@pytest.mark.parametrize("kw", [dict(estimator="sde"), dict(estimator="forward", cfg=2.0), dict(estimator="forward", think=True),
                                dict(estimator="sde", think=True, cfg=2.0, logp="guided")])
def test_a_mixed_batch_equals_one_prompt_at_a_time(policy, mixed, kw):
    "Pictures, edits, answers, both, and thoughts before pictures: latents and log-probabilities to 1e-4, greedy texts and pictures alike."
    run = lambda ps: policy.sample(ps, 2, gen(6), temperature=0.0, max_text=5, **kw)
    together = run(mixed)
    for i, p in enumerate(mixed):
        alone = run([p])
        assert alone.texts == together.texts[2 * i:2 * i + 2]
        pairs = list(zip(by_sample(alone, 0), by_sample(together, i), strict=True))
        kinds = {"generate": {"image"}, "edit": {"image"}, "answer": {"text"}, "joint": {"image", "text"}}[p.task]
        assert {k for (k, *_), _ in pairs} == kinds | ({"text"} if kw.get("think") and p.task != "answer" else set())
        for (k, a, old), (k2, a2, old2) in pairs:
            assert k == k2 and a.shape == a2.shape and (a.float() - a2.float()).abs().max() <= 1e-4, (p.task, k)
            assert (old is None) == (k == "image" and kw["estimator"] == "forward")         # its draws are another row's anyway
            assert old is None or (old - old2).abs().max() <= 1e-4, (p.task, k)
        for im, im2 in zip(alone.images, together.images[2 * i:2 * i + 2]):
            assert (im is None) == (im2 is None) and (im is None or np.abs(im.astype(int) - im2).max() <= 1)

def test_sampled_texts_are_as_likely_alone(policy, mixed):
    "At temperature 1 the random numbers are the batch's, but how likely a text is, is the prompt's alone."
    r = policy.sample(mixed, 3, gen(8), temperature=1.0, top_p=0.9, max_text=6)
    text = next(p for p in r.parts if p.kind == "text")
    for i, p in enumerate(mixed):
        rows = [j for j, b in enumerate(text.rows.tolist()) if b // 3 == i]
        if not rows: continue
        own = next(q for q in policy.sample([p], 3, gen(), max_text=6).parts if q.kind == "text")
        own = replace(own, actions=text.actions[rows], mask=text.mask[rows], settings=text.settings)
        assert (policy(own) - text.logp_old[rows]).abs().max() < 1e-4

@pytest.mark.parametrize("kw", [dict(estimator="sde", think=True, cfg=3.0, logp="guided"), dict(estimator="forward", think=True, cfg=3.0),
                                dict(estimator="sde", form="dance", cfg=3.0, weighting="flat"), dict(estimator="sde", same_start=True, subspace="tiny-bagel")])
def test_ratio_is_one_and_only_as_it_was_drawn(policy, mixed, kw):
    "Log-probabilities of thoughts and pictures come back in any micro-batch; scored with another guidance, noise or temperature they do not."
    r = policy.sample(mixed, 2, gen(9), temperature=0.7, max_text=5, **kw)
    off = lambda piece: float(((policy(piece) - piece.logp_old).exp() - 1).abs().max())
    with torch.no_grad():
        for part in r.parts:
            if part.logp_old is None: part.logp_old = policy(part)
            assert max(off(piece) for piece in part.select(torch.randperm(len(part), generator=gen())).split(3)) < 1e-4
            s = part.settings
            wrong = dict(temperature=1.3) if part.kind == "text" else dict(cfg=2.0) | (dict(seed=s["seed"] + 1) if kw["estimator"] == "forward" else {})
            assert off(replace(part, settings=s | wrong)) > 1e-3

# -- the full size

@pytest.fixture(scope="module")
def full_size(folder, tmp_path_factory):
    "A folder with the official names, shapes and types and 28 layers; its weight files are holes (zeros that take no space)."
    import struct
    d = tmp_path_factory.mktemp("full")
    with torch.device("meta"): net, vae = Bagel(LLM, VIT, 64, 64), new_vae((128, 256, 512, 512), 2, 16)
    shapes = {k: tuple(w.shape) for k, w in (net.state_dict() | vae_state(vae)).items()}
    for file, keys, kind, size in zip(bagel.FILES, official_keys(), ("BF16", "F32"), (2, 4)):
        at, header = 0, {}
        for k in sorted(keys):
            n = math.prod(shapes[k]) * size
            header[k] = dict(dtype=kind, shape=list(shapes[k]), data_offsets=[at, at + n])
            at += n
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(d/file, "wb") as f: f.write(struct.pack("<Q", len(text)) + text); f.truncate(8 + len(text) + at)
    top = dict(model_type="bagel", architectures=["BagelForConditionalGeneration"], latent_patch_size=2, max_latent_size=64, connector_act="gelu_pytorch_tanh",
               interpolate_pos=False, vit_max_num_patch_per_side=70, vae_config=dict(z_channels=16, downsample=8))
    for name, x in dict(config=top, llm_config=LLM, vit_config=VIT).items(): (d/f"{name}.json").write_text(json.dumps(x))
    for name in ("tokenizer.json", "tokenizer_config.json"): shutil.copy(folder/name, d/name)
    return d

def lazily(file):
    "`load_file` whose tensors are views of the file, mapped for reading only, so that 29 GB need no memory."
    raw, n = np.memmap(file, np.uint8, "r"), int.from_bytes(open(file, "rb").read(8), "little")
    kinds = dict(BF16=torch.bfloat16, F32=torch.float32)
    view = lambda x, a, b: torch.from_numpy(raw[8 + n + a:8 + n + b]).view(kinds[x["dtype"]]).view(x["shape"])
    return {k: view(x, *x["data_offsets"]) for k, x in json.loads(bytes(raw[8:8 + n])).items()}

@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_full_size_folder_loads_and_saves_the_same_keys(full_size, tmp_path, monkeypatch):
    "Load, save: the same names, shapes and types in both files, and settings as published."
    import safetensors.torch
    monkeypatch.setattr(safetensors.torch, "load_file", lazily)
    check_folder(full_size)
    policy = BagelPolicy.from_pretrained(full_size)
    assert all(w.device.type == "cpu" for w in policy.state_dict().values())
    assert len(policy.body.layers) == 28 and policy.unit == 16 and (policy.vae_scale, policy.vae_shift) == (0.3611, 0.1159)
    assert policy.drawing.steps == 49 and policy.guidance["generate"].interval == (0.4, 1.0) and policy._grid(Prompt("p", "generate", "x")) == (64, 64)
    assert sum(w.numel() for w in policy.net.parameters()) > 14e9
    written = {}
    monkeypatch.setattr(safetensors.torch, "save_file", lambda state, file, metadata=None: written.update({file.name: {k: (tuple(w.shape), w.dtype) for k, w in state.items()}}))
    policy.save_pretrained(tmp_path)
    for file, kind in zip(bagel.FILES, (torch.bfloat16, torch.float32)):
        assert written[file] == {k: (s, kind) for k, s in bagel.file_shapes(full_size/file).items()}
    again = bagel.read_config(tmp_path)
    assert again["llm_config"] == LLM and again["vit_config"] == VIT and again["config"]["vae_config"]["z_channels"] == 16

@pytest.mark.parametrize("old, new, says", [
    ("layers.27.mlp_moe_gen.up_proj", "layers.28.mlp_moe_gen.up_proj", "layers.27.mlp_moe_gen.up_proj.weight is missing"),
    ("encoder.layers.25.mlp.fc1.bias", "encoder.layers.26.mlp.fc1.bias", "encoder.layers.25.mlp.fc1.bias is missing"),
    ('[3584,64]', '[64,3584]', r"vae2llm.weight"),
])
def test_a_wrong_full_size_folder_is_refused(full_size, tmp_path, old, new, says):
    "One name or shape of the header changed: refused before anything is read."
    for f in full_size.iterdir():
        if f.name != bagel.FILES[0]: (tmp_path/f.name).symlink_to(f)
    with open(full_size/bagel.FILES[0], "rb") as f: n = int.from_bytes(f.read(8), "little"); head = f.read(n).decode()
    compact = json.dumps(json.loads(head), separators=(",", ":")).ljust(n)
    changed = compact.replace(old, new)
    assert changed != compact and len(changed) == n
    with open(tmp_path/bagel.FILES[0], "wb") as f:
        f.write(n.to_bytes(8, "little") + changed.encode()); f.truncate((full_size/bagel.FILES[0]).stat().st_size)
    for load in (load_policy, BagelPolicy.from_pretrained):
        with pytest.raises(UserError, match=says): load(tmp_path)

# -- files that do not belong together, settings, pictures

def other_vae(channels, z):
    def change(d):
        from safetensors.torch import save_file
        save_file({k: w.contiguous() for k, w in vae_state(new_vae(channels, 1, z)).items()}, d/"ae.safetensors")
    return change

def in_ae(name, *shape):
    def change(d):
        from safetensors.torch import load_file, save_file
        save_file(load_file(d/"ae.safetensors") | {name: torch.zeros(shape)}, d/"ae.safetensors")
    return change

def in_config(section, **settings):
    def change(d):
        x = json.loads((d/"config.json").read_text())
        at = x
        for k in section.split("."): at = at[k] if k else at
        at.update(settings)
        (d/"config.json").write_text(json.dumps(x))
    return change

@pytest.mark.parametrize("load", [load_policy, BagelPolicy.from_pretrained])
@pytest.mark.parametrize("change, says", [
    (other_vae((32, 32, 32), 4), "ae.safetensors has latents of 4 channels.*holds 16 numbers.*vae2llm.weight.*takes 32.*Copy the ae.safetensors"),
    (other_vae((32, 32), 8), "ae.safetensors has downsample 2, but vae_config in config.json says 4. Copy"),
    (other_vae((32, 32, 32, 32), 8), "ae.safetensors has downsample 8.*says 4"),
    (in_ae("encoder.down.1.block.0.conv1.weight", 48, 32, 3, 3), "ae.safetensors.*48.*no multiples of 32"),
    (in_ae("decoder.mid.block_1.conv1.weight", 64, 64, 3, 3), "decoder.mid.block_1.conv1.weight is"),
    (in_config("guidance.generate", interval=[1.0, 0.4]), "config.json, guidance.generate: the guidance interval is .1.0, 0.4.; it must be .low, high"),
    (in_config("guidance.generate", interval=[1.0]), "guidance.generate: the guidance interval"),
    (in_config("guidance.generate", interval="all"), "guidance.interval is 'all'; it must be of type tuple"),
    (in_config("guidance.edit", renrom="global"), "unknown setting 'renrom' in guidance.edit. Did you mean 'renorm'"),
    (in_config("guidance", edits={}), "guidance of 'edits'.*Did you mean 'edit'"),
    (in_config("drawing", stepz=3), "unknown setting 'stepz' in drawing. Did you mean 'steps'"),
    (in_config("drawing", steps="3"), "config.json, drawing: drawing.steps is '3'"),
    (lambda d: (d/"tokenizer.json").unlink(), "tokenizer.json"),
])
def test_files_that_do_not_fit_are_refused(folder, tmp_path, load, change, says):
    "The message names the folder, what in it, and what to do."
    bad = tmp_path/"bad"; shutil.copytree(folder, bad)
    change(bad)
    with pytest.raises(UserError, match=says) as e: load(bad)
    assert str(bad) in str(e.value)

def test_a_wider_autoencoder_of_the_same_latents_is_fine(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"wide"); other_vae((64, 64, 64), 8)(tmp_path/"wide")
    assert load_policy(tmp_path/"wide").vae.config.block_out_channels == (64, 64, 64)

@pytest.mark.parametrize("image, got", [
    (np.zeros((24, 24), np.uint8), r"ndarray \[24, 24\] of uint8"), (np.zeros((24, 24, 4), np.uint8), r"\[24, 24, 4\]"),
    (np.zeros((3, 24, 24), np.uint8), r"\[3, 24, 24\]"), (np.zeros((0, 24, 3), np.uint8), r"\[0, 24, 3\]"),
    (np.zeros((24, 24, 3), np.float32), "of float32"), (torch.zeros(24, 24, 3, dtype=torch.uint8), "Tensor"), ([[[0, 0, 0]]], "list"),
])
def test_what_is_no_picture_is_refused(policy, image, got):
    "In edits, questions and given outputs, by the prompt's name; a picture of floats would have been read as nearly black."
    for task in ("edit", "answer"):
        with pytest.raises(UserError, match=f"prompt 'p7': a picture must be.*height, width, 3.*{got}.*convert"):
            policy.sample([Prompt("p7", task, "what is it ?", image=image)], 2)
    with pytest.raises(UserError, match=f"given for prompt 'p7'.*{got}"): policy.encode([Prompt("p7", "generate", "red")], [None], [image])

@pytest.mark.parametrize("size", [-8, 4, 20, 64])
def test_sizes_that_do_not_fit(policy, size):
    with pytest.raises(UserError, match=f"pictures of {size} x {size} pixels.*multiples of 8, at most 24"): policy.sample([Prompt("p", "generate", "red")], 2, size=size)

@pytest.mark.parametrize("shape", [(1, 300, 3), (300, 2, 3), (23, 25, 3), (512, 512, 3)])
def test_pictures_of_any_shape_are_read(policy, shape):
    im = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    r = policy.sample([Prompt("e", "edit", "red", image=im), Prompt("q", "answer", "what is it ?", image=im)], 2, gen(), max_text=2)
    h, w = r.images[0].shape[:2]
    assert max(h, w) <= 24 and (h < w) == (shape[0] < shape[1] - 8) and (w < h) == (shape[1] < shape[0] - 8)
    assert all(torch.isfinite(policy(part)).all() for part in r.parts)
