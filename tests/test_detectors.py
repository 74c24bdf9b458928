"Both detectors on many random scenes, clean and degraded; pictures of every kind a policy might make; independence."
import ast
import inspect

import numpy as np
import pytest
from scipy import ndimage

from unify_rl.core import UserError, rng_for
from unify_rl.world import detectors
from unify_rl.world.detectors import detect_components, detect_templates, same_scene
from unify_rl.world.scenes import COLORS, SHAPES, Thing, World, random_scene, relations, render, render_batch

DETECTORS = [detect_templates, detect_components]
WORLDS = {"default": World(), "free": World(free=True), "hard": World(size=48, cell=8, free=True),
          "many": World(size=64, max_objects=8, free=True)}

def degrade(images, rng, noise=10, blur=0.5):
    soft = ndimage.gaussian_filter(images.astype(float), (0, blur, blur, 0))
    return np.clip(np.round(soft + rng.normal(0, noise, soft.shape)), 0, 255).astype(np.uint8)

@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("detect", DETECTORS)
def test_right_on_random_scenes(detect, world):
    rng = rng_for("test detectors", str(world))
    scenes = [random_scene(world, rng) for _ in range(600 if world.size == 24 else 150)]
    images = render_batch(scenes, world)
    share = lambda pictures: np.mean([same_scene(f, s) for f, s in zip(detect(pictures, world), scenes)])
    assert share(images) >= 0.995
    assert share(degrade(images, rng)) >= 0.99

@pytest.mark.parametrize("detect", DETECTORS)
def test_every_shape_color_and_place(detect):
    scenes = [(Thing(s, c, int(x), int(y)),) for s in SHAPES for c in COLORS for x in World().anchors for y in World().anchors]
    assert all(same_scene(f, s, tol=0) for f, s in zip(detect(render_batch(scenes)), scenes))

@pytest.mark.parametrize("detect", DETECTORS)
def test_touching_shapes_of_two_colors(detect):
    pairs = [((s, c), (s2, c2)) for s in SHAPES for s2 in SHAPES for c in COLORS for c2 in COLORS if c != c2]
    scenes = [(Thing(*a, 4, 8), Thing(*b, 12, 8)) for a, b in pairs] + [(Thing(*a, 8, 4), Thing(*b, 8, 12)) for a, b in pairs]
    assert all(same_scene(f, s) for f, s in zip(detect(render_batch(scenes)), scenes))

@pytest.mark.parametrize("detect", DETECTORS)
def test_relations_read_from_pictures_are_those_of_the_scene(detect):
    rng = rng_for("relations")
    world, agree = World(), []
    for _ in range(200):
        a, b = scene = random_scene(world, rng, kinds=[("circle", "red"), ("cross", "blue")])
        found = {d.label: d.box for d in detect([render(scene)])[0]}
        agree.append(relations(found["circle"], found["cross"]) == relations(a.box(world), b.box(world)))
    assert all(agree)

@pytest.mark.parametrize("detect", DETECTORS)
def test_pictures_nobody_drew(detect):
    rng = rng_for("garbage")
    blank, black = np.full((24, 24, 3), 255, np.uint8), np.zeros((24, 24, 3), np.uint8)
    grey = blank.copy(); grey[8:16, 8:16] = 120
    flat = np.tile(np.array(COLORS["red"], np.uint8), (24, 24, 1))
    tiny = np.full((4, 5, 3), 255, np.uint8)
    assert detect([blank, black, grey, tiny]) == [[]] * 4
    assert {d.label for d in detect([flat])[0]} == ({"square"} if detect is detect_templates else set())    # a red sheet
    noise = rng.integers(0, 256, (200, 24, 24, 3)).astype(np.uint8)
    assert sum(map(len, detect(noise))) <= 10
    assert detect([]) == []

@pytest.mark.parametrize("detect", DETECTORS)
def test_changes_of_the_scene_are_seen(detect):
    "The test of `same_scene` and of the detectors: one changed thing must make it false."
    rng = rng_for("changes")
    for _ in range(100):
        scene = random_scene(World(), rng)
        t, rest = scene[0], scene[1:]
        for other in [Thing(s, t.color, t.x, t.y) for s in SHAPES if s != t.shape] + [Thing(t.shape, c, t.x, t.y) for c in COLORS
                if c != t.color]:
            assert not same_scene(detect([render((other,) + rest)])[0], scene)
        assert not same_scene(detect([render(rest)])[0], scene)

@pytest.mark.parametrize("detect", DETECTORS)
def test_lists_of_many_sizes_and_batches_agree(detect):
    rng = rng_for("sizes")
    images = [render(random_scene(World(size=z), rng), World(size=z)) for z in (24, 32, 24, 64)]
    assert detect(images) == [detect([im])[0] for im in images]

def test_templates_do_not_depend_on_the_batch():
    rng = rng_for("batches")
    images = render_batch([random_scene(World(), rng) for _ in range(10)])
    a, b = detect_templates(images), detect_templates(images, batch=3)
    assert [[(d.label, d.color, d.box) for d in f] for f in a] == [[(d.label, d.color, d.box) for d in f] for f in b]

@pytest.mark.parametrize("bad", [np.zeros((2, 24, 24, 3), np.float32), np.zeros((2, 24, 24), np.uint8), np.zeros((2, 24, 24, 4),
        np.uint8)])
@pytest.mark.parametrize("detect", DETECTORS)
def test_what_is_no_picture_is_refused(detect, bad):
    with pytest.raises(UserError, match="uint8"): detect(bad)

def test_the_detectors_share_no_code():
    "No function of the module is reachable from both."
    defs = {n: f for n, f in vars(detectors).items() if inspect.isfunction(f) and f.__module__ == detectors.__name__}
    defs |= {n: f.__wrapped__ for n, f in vars(detectors).items() if hasattr(f, "__wrapped__")
             and f.__module__ == detectors.__name__}
    def reach(name, seen):
        for node in ast.walk(ast.parse(inspect.getsource(defs[name]))):
            if isinstance(node, ast.Name) and node.id in defs and node.id not in seen: seen.add(node.id); reach(node.id, seen)
        return seen
    a, b = reach("detect_templates", set()), reach("detect_components", set())
    assert "match_maps" in a and "form" in b and not (a & b)
