"""The cycle reward: perceptual distance, scene graphs, captioners with a memory, and every way a half can fail without becoming a zero."""
import re
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

import unify_rl.rewards.cycle as C
from unify_rl.core import Prompt, Rollout, UserError, rng_for
from unify_rl.data.stream import load_prompts
from unify_rl.rewards.siglip import load_siglip
from unify_rl.rewards.verifiable import build_rewards, check_constraints, check_prompts, score
from unify_rl.world.detectors import detect_templates
from unify_rl.world.prompts import CATEGORIES, draw_prompts, riddle_prompts, with_references
from unify_rl.world.scenes import Thing, World, random_scene, render

def noise(n, size=24, seed=0): return list(np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8))
def ask(reward, prompts, images): return reward(prompts, Rollout(prompts, 1, [], [None] * len(images), images))

# -- real pictures

def test_real_pictures_are_right_shared_and_the_same_in_every_run():
    prompts = with_references([*draw_prompts("train", 30, seed=3), *riddle_prompts("test", 6)])
    found = detect_templates([p.reference for p in prompts], World())
    assert all(ok for p, f in zip(prompts, found) for ok, _ in check_constraints(p, f, (24, 24)))
    assert [p.reference.tobytes() for p in with_references(prompts)] == [p.reference.tobytes() for p in prompts]
    with pytest.raises(ValueError): prompts[0].reference[:] = 0

def test_the_shapes_source_brings_them_along():
    assert all(p.reference.shape == (24, 24, 3) for p in load_prompts("shapes", "test", ("generate",))[:50])

# -- pictures against pictures

def test_layer_distance_by_a_loop():
    rng = np.random.default_rng(0)
    real, drawn = ([rng.normal(size=(2, 3, 4)) for _ in range(2)] for _ in range(2))
    for b in range(2):
        total = 0.0
        for layer in range(2):
            for p in range(3):
                x, y = real[layer][b, p], drawn[layer][b, p]
                total += 0.5 * sum((x / np.sqrt(sum(x * x)) - y / np.sqrt(sum(y * y)))**2) / 3 / 2
        got = C.layer_distance([torch.tensor(x) for x in real], [torch.tensor(x) for x in drawn])
        assert abs(float(got[b]) - total) < 1e-12

def test_trunk_distance_looks_at_every_layer_and_at_nobody_elses_picture():
    siglip = load_siglip("tiny-siglip")
    d, seen = C.load_distance("tiny-siglip", "cpu"), []
    hooks = [b.register_forward_hook(lambda m, i, o: seen.append(o.detach())) for b in siglip.trunk.blocks]
    real, drawn = noise(2), [*noise(1, seed=1), *noise(1, 48, seed=2)]
    try: got = C.TrunkDistance(siglip, "x")(real[:1], drawn[:1])
    finally: [h.remove() for h in hooks]
    layers = [(siglip.trunk.norm(o)[:1], siglip.trunk.norm(o)[1:2]) for o in seen]
    assert len(layers) == 3 and torch.allclose(got, C.layer_distance(*zip(*layers)).float(), atol=1e-5)
    both = d(real, drawn)
    assert torch.allclose(both, torch.cat([d(real[:1], drawn[:1]), d(real[1:], drawn[1:])]), atol=1e-5)      # of two sizes
    assert torch.allclose(both, d(drawn, real), atol=1e-5) and float(d(real, [im.copy() for im in real]).max()) < 1e-5 < both.min()

def test_a_shared_real_picture_is_looked_at_once():
    class Counts:
        prepare = staticmethod(lambda x: torch.from_numpy(x).permute(0, 3, 1, 2).float())
        n = 0
        def __init__(self): self.trunk = self
        def forward_intermediates(self, x, **kw): self.n += len(x); return [x.flatten(2).mT]
    siglip, (real, *drawn) = Counts(), noise(5)
    assert C.TrunkDistance(siglip, "x")([real] * 4, drawn).shape == (4,) and siglip.n == 5

@pytest.fixture
def lpips(monkeypatch):
    from torchvision.models import squeezenet1_1
    torch.manual_seed(0)
    weights = squeezenet1_1(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: weights)
    C.load_distance.cache_clear()
    yield C.load_distance("lpips-squeeze", "cpu")
    C.load_distance.cache_clear()

def test_lpips_of_the_library_in_batches(lpips):
    real, drawn = noise(3), [*noise(2, seed=1), *noise(1, 40, seed=2)]
    got = lpips(real, drawn)
    assert got.shape == (3,) and (got > 0).all() and float(lpips(real, real).max()) < 1e-6
    assert torch.allclose(got, torch.cat([lpips([a], [b]) for a, b in zip(real, drawn)]), atol=1e-5)

def test_lpips_without_its_weights_says_so(monkeypatch):
    def gone(*a, **k): raise OSError("no route to host")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", gone)
    C.load_distance.cache_clear()
    with pytest.raises(UserError, match="no route to host.*perceptual: tiny-siglip"): C.load_distance("lpips-vgg", "cpu")
    with pytest.raises(UserError, match="lpips-vgg"): C.load_distance("lpips-vg", "cpu")

# -- texts against texts

GRAPHS = {
    "a red circle": "circle, circle red", "three blue crosses": "cross, cross 3, cross blue", "1 dog": "dog", "": "", "draw a picture of": "",
    "please draw two green squares on white paper": "square, square 2, square green, paper, paper white, square on paper",
    "a square right of a circle": "square, circle, circle left of square", "a square to the right of a red circle": "square, circle, circle red, circle left of square",
    "a cross below a circle": "cross, circle, circle above cross", "a circle on top of a cross.": "cross, circle, circle above cross",
    "a circle in the top left and a cross": "circle, circle in top left, cross", "a circle in the top left corner": "circle, circle in top left",
    "a dog, no cats": "dog", "a dog without a red leash, and a cat": "dog, cat", "The glasses are red": "glass, glass red", "there is a bus": "bus",
    "a circle. a cross left of a square": "circle, cross, square, cross left of square", "a circle, left of it": "circle",
}

@pytest.mark.parametrize("text", GRAPHS)
def test_scene_graph(text): assert {" ".join(t) for t in C.scene_graph(text)} == {t for t in GRAPHS[text].split(", ") if t}

def test_scene_graph_f1_by_hand():
    got = C.spice_like(["two red circles and a square"] * 3, ["a red circle", "two red circles and a square", "a dog"])
    # prompt: circle, 2, red, square
    assert [v for v, _ in got] == pytest.approx([2 * 2 / (4 + 2), 1.0, 0.0])
    assert "missing circle 2, square" in got[0][1]

@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square two dogs and of the".split()
    (folder/"vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, initializer_range=0.5)).save_pretrained(folder)
    return str(folder)

def test_bertscore_as_in_torchmetrics_and_alone_as_in_a_batch(bert):
    from torchmetrics.functional.text import bert_score          # one pair at a time: in batches of unequal lengths it mixes the pairs up
    prompts, captions = ["a red circle", "two dogs and a blue square", "a circle"], ["the red square and a circle", "two dogs", "a circle"]
    ours = C.load_bertscore(bert, "cpu")
    got = [v for v, _ in ours(prompts, captions)]
    assert got == pytest.approx([float(torch.as_tensor(bert_score([c], [p], model_name_or_path=bert)["f1"])) for p, c in zip(prompts, captions)], abs=1e-4)
    assert got == pytest.approx([ours([p], [c])[0][0] for p, c in zip(prompts, captions)], abs=1e-5) and got[2] == pytest.approx(1)

def test_bertscore_without_its_model(tmp_path):
    with pytest.raises(UserError, match="text_cycle: spice"): C.load_bertscore(str(tmp_path), "cpu")

def test_java_spice_says_what_is_missing_and_passes_on_what_is_there(monkeypatch):
    monkeypatch.setattr(C.shutil, "which", lambda name: None)
    monkeypatch.setattr(C, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="Java .* and the package pycocoevalcap"): build_rewards([dict(name="cycle", settings=dict(text_cycle="java-spice", visual=0))])
    class Spice:
        def compute_score(self, gts, res): return 0.0, [{"All": {"f": float(gts[i] == res[i])}} for i in sorted(res)]
    for name in ("pycocoevalcap", "pycocoevalcap.spice", "pycocoevalcap.spice.spice"): monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["pycocoevalcap.spice.spice"].Spice = Spice
    monkeypatch.setattr(C.shutil, "which", lambda name: "/bin/java"); monkeypatch.setattr(C, "find_spec", lambda name: True)
    assert [v for v, _ in C.load_java_spice()(["a", "b"], ["a", "c"])] == [1.0, 0.0]

# -- captioners

class Counting:
    def __init__(self, says=lambda im: f"a {im[0, 0, 0]} thing"): self.seen, self.calls, self.says = [], 0, says
    def __call__(self, images): self.calls += 1; self.seen += images; return [self.says(im) for im in images]

def test_no_picture_is_captioned_twice():
    a, b, c = (np.full((4, 4, 3), v, np.uint8) for v in range(3))
    captions = C.Captions(counting := Counting(), memory=2)
    assert captions([a, b, a.copy(), a]) == ["a 0 thing", "a 1 thing", "a 0 thing", "a 0 thing"] and len(counting.seen) == 2
    assert captions([b, a]) == ["a 1 thing", "a 0 thing"] and counting.calls == 1
    assert captions([a.reshape(2, 8, 3)]) and len(counting.seen) == 3                          # the same bytes, another picture
    captions([c]); captions([b])
    assert len(counting.seen) == 5 and len(captions._known) == 2                               # the memory is bounded

def test_a_whole_group_of_equal_drawings_costs_one_caption_in_the_reward():
    prompt, counting = Prompt("1", "generate", "a 7 thing", reference=np.zeros((4, 4, 3), np.uint8)), Counting()
    reward = C.cycle_reward(None, C.Captions(counting), C.spice_like, visual=0)
    images = [np.full((4, 4, 3), 7, np.uint8) for _ in range(8)]
    assert (ask(reward, [prompt] * 8, images).values == 1).all() and len(counting.seen) == 1
    ask(reward, [prompt] * 8, images)
    assert len(counting.seen) == 1

def test_the_interviewed_base_sees_single_things_and_minds_no_neighbors():
    captions = C.load_captioner("tiny-janus", "cpu")
    things = [random_scene(World(), rng_for("one", i), n=1)[0] for i in range(12)]
    pictures = [render((t,)) for t in things]
    said = captions.captioner(pictures)
    assert np.mean([{(t.shape,), (t.shape, t.color)} <= C.scene_graph(s) for t, s in zip(things, said)]) >= 0.75
    assert captions.captioner(pictures[:1]) == said[:1] and captions.captioner(pictures[::-1][:2]) == said[::-1][:2]
    assert not any(p.requires_grad for p in captions.captioner.policy.parameters())

def test_statements_are_put_to_the_vote_and_do_not_overlap():
    things = C.seen_things(["red circle 0 0 so", "red circle 0 0 ; blue cross 0 1", "red square 0 0 ; blue cross 4 4"])
    assert things == [Thing("circle", "red", 0, 0), Thing("cross", "blue", 16, 16)] and C.seen_things(["nothing", ""]) == []
    assert C.tell([]) == "" and C.tell([Thing("cross", "orange", 8, 0)]) == "an orange cross in the top center"
    assert C.tell([Thing("cross", "red", 0, 0), Thing("cross", "red", 12, 0), Thing("circle", "blue", 0, 12)]) == "2 red crosses and a blue circle"

def test_say_keeps_words_out_and_stops():
    from unify_rl.policies.load import load_policy
    policy = load_policy("tiny-janus")
    prompts = [Prompt(str(i), "answer", f"what shape is the {c} thing? think first, then answer.", image=render((Thing("cross", "red", 4, 4),))) for i, c in enumerate(("red", "blue"))]
    free, kept = policy.say(prompts, 24), policy.say(prompts, 24, without=("looking",), until="so")
    assert "looking" in " ".join(free) and not any("looking" in t for t in kept) and all(t.endswith("so") and t.count("so") == 1 for t in kept)
    assert policy.say(prompts, 24) == policy.sample(prompts, 1, temperature=0.0, max_text=24).texts
    assert kept == [policy.say([p], 24, ("looking",), "so")[0] for p in prompts]

def test_blip_by_folder(tmp_path):
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor, BlipTextConfig, BlipVisionConfig
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC] a red circle on the".split()
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text = BlipTextConfig(vocab_size=len(words), encoder_hidden_size=32, bos_token_id=5, eos_token_id=3, sep_token_id=3, pad_token_id=0, is_decoder=True, **small)
    torch.manual_seed(0)
    BlipForConditionalGeneration(BlipConfig(text_config=text.to_dict(), vision_config=BlipVisionConfig(image_size=16, patch_size=8, **small).to_dict())).save_pretrained(tmp_path)
    BlipProcessor(BlipImageProcessor(size=dict(height=16, width=16)), BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})).save_pretrained(tmp_path)
    captions = C.load_captioner(str(tmp_path), "cpu")
    images = noise(3)
    assert isinstance(captions.captioner, C.VlmCaptioner)
    said = captions(images)
    assert len(said) == 3 and all(isinstance(s, str) for s in said) and captions.captioner(images[1:2]) == said[1:2]

def test_a_captioner_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="tiny-janus"): C.load_captioner("tiny-janos", "cpu")
    with pytest.raises(UserError, match="could not be loaded"): C.load_captioner(str(tmp_path), "cpu")

# -- the reward

class Fixed:
    name = "fixed"
    def __call__(self, real, drawn): return torch.tensor([float(im[0, 0, 0]) / 100 for im in drawn])

REAL = np.zeros((4, 4, 3), np.uint8)
PROMPT = Prompt("1", "generate", "two red circles", reference=REAL)
def made(says, **kw): return C.cycle_reward(Fixed(), C.Captions(Counting(says)), C.spice_like, **kw)

def test_the_sum_and_its_weights():
    images, says = [np.full((4, 4, 3), v, np.uint8) for v in (0, 20)], lambda im: "a red circle" if im[0, 0, 0] else "two red circles"
    f1 = np.array([1, 2 * 2 / (3 + 2)])
    assert ask(made(says), [PROMPT] * 2, images).values == pytest.approx([1 + f1[0], 0.8 + f1[1]])
    assert ask(made(says, visual=0.5, textual=2), [PROMPT] * 2, images).values == pytest.approx([0.5 + 2, 0.4 + 2 * f1[1]])
    assert ask(made(says, textual=0), [PROMPT] * 2, images).values == pytest.approx([1, 0.8])
    assert ask(C.cycle_reward(None, C.Captions(Counting(says)), C.spice_like, visual=0), [PROMPT] * 2, images).values == pytest.approx(f1)

@pytest.mark.parametrize("says, change, why", [("", {}, "the captioner said nothing"), ("  ", {}, "the captioner said nothing"), ("image of", {}, "no object .* caption"),
                                              ("a dog", dict(reference=None), "no real picture"), ("a dog", dict(text="draw"), "no object .* prompt"), (None, {}, "said nothing")])
def test_what_cannot_be_judged_is_skipped_and_counted_never_zero(says, change, why):
    prompts, images = [PROMPT, replace(PROMPT, **change), PROMPT], [np.full((4, 4, 3), v, np.uint8) for v in (1, 2, 3)]
    table = score([made(lambda im: says if im[0, 0, 0] == 2 else "a red circle")], prompts, Rollout(prompts, 1, [], [None] * 3, images))
    assert table.scores_RB.isfinite().tolist() == [[True, False, True]] and table.errors == {"cycle": 1}
    assert re.search(why, table.reasons[0][1]) and "1 of 3" in table.notes[0]
    with pytest.raises(UserError, match="1 of 3"): score([made(lambda im: says if im[0, 0, 0] == 2 else "a red circle")], prompts, Rollout(prompts, 1, [], [None] * 3, images), "stop")

def test_no_picture_and_a_captioner_that_breaks():
    assert np.isnan(ask(made(lambda im: "a dog"), [PROMPT], [None]).values).all()
    for broken in (lambda images: ["one"] * 5, lambda images: 1 / 0):
        table = score([C.cycle_reward(Fixed(), C.Captions(broken), C.spice_like)], [PROMPT] * 2, Rollout([PROMPT] * 2, 1, [], [None] * 2, [REAL, REAL + 1]))
        assert table.scores_RB.isnan().all() and table.errors == {"cycle": 2}

@pytest.mark.parametrize("settings, why", [(dict(text_cycle="spyce"), "spice"), (dict(visual=-1), "no weight"), (dict(textual="much"), "no weight"), (dict(visual=True), "no weight"),
                                           (dict(visual=0, textual=0), "nothing is left"), (dict(perceptual="lpips-vg", textual=0), "lpips-vgg"), (dict(captionr="x"), "captioner")])
def test_bad_settings(settings, why):
    with pytest.raises(UserError, match=why): build_rewards([dict(name="cycle", settings=settings)])

def test_a_prompt_without_a_real_picture_is_found_before_the_run():
    (reward,), _ = build_rewards([dict(name="cycle", settings=dict(textual=0))])
    check_prompts([PROMPT], [reward])
    with pytest.raises(UserError, match="'7' has no real picture.*visual: 0"): check_prompts([PROMPT, replace(PROMPT, id="7", reference=None)], [reward])

def test_right_drawings_get_more_than_others():
    prompts = with_references(draw_prompts("test", 24, seed=4))
    (reward,), _ = build_rewards([dict(name="cycle")])
    right = [p.reference for p in prompts]
    k = len(CATEGORIES)
    a, b = ask(reward, prompts, right).values, ask(reward, prompts, right[k:] + right[:k]).values
    assert (a > b).mean() > 0.8
