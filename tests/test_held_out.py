"""What the results stand on: suites are large enough, and neither training nor pretraining ever meets one of their prompts."""
from collections import Counter

import pytest

from unify_rl.core import Prompt, rng_for
from unify_rl.evaluate.suites import SUITES, load_suite
from unify_rl.rewards.verifiable import check_constraints
from unify_rl.world.detectors import detect_templates
from unify_rl.world.prompts import (CATEGORIES, EDITS, RIDDLES, captioned, constraints, draw_prompts, edit_prompts, is_held_out,
                                    riddle_prompts, split_combinations)
from unify_rl.world.questions import KINDS, joint_prompts, question_prompts
from unify_rl.world.scenes import World, render_batch


def content(p): return (p.text, None if p.image is None else p.image.tobytes())
def meaning(p): return (p.category, tuple(p.meta["combination"]))


@pytest.fixture(scope="module")
def tested(): return {name: load_suite(name).prompts for name in SUITES}


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_large_held_out_and_reproducible(tested, name):
    prompts = tested[name]
    assert len({content(p) for p in prompts}) >= 700, "a few of the random edits may come twice"
    assert all(is_held_out(p.meta["combination"]) for p in prompts) and len({p.id for p in prompts}) == len(prompts)
    n = Counter(p.category for p in prompts)
    assert max(n.values()) - min(n.values()) <= 1
    assert [content(p) for p in load_suite(name).prompts] == [content(p) for p in prompts]
    assert [content(p) for p in load_suite(name, seed=1).prompts] != [content(p) for p in prompts]


def test_training_prompts_and_suites_share_nothing(tested):
    train = [*draw_prompts("train"), *riddle_prompts("train"), *edit_prompts("train", 1200), *question_prompts("train", 1200)]
    train += [half for p in joint_prompts("train", 600) for half in (p, p.meta["question"])]
    test = [p for prompts in tested.values() for p in prompts]
    assert not {meaning(p) for p in train} & {meaning(p) for p in test}
    assert not {content(p) for p in train} & {content(p) for p in test}


@pytest.fixture(scope="module")
def pretraining():
    "Every prompt that pretraining builds in twelve steps, caught on its way into the model."
    from unify_rl.policies.janus import JanusPolicy, new_janus
    from unify_rl.train.pretrain import training_batch, vocabulary
    caught = []
    class Spy(JanusPolicy):
        def _draw_context(self, prompts): caught.extend(prompts); return super()._draw_context(prompts)
        def _answer_context(self, prompts): caught.extend(prompts); return super()._answer_context(prompts)
    small = new_janus(vocabulary(), hidden=32, layers=1)
    spy = Spy(small.model, small.processor)
    for step in range(12): training_batch(spy, World(), rng_for(0, "pretrain", step), 96, 48)
    return caught


def test_pretraining_never_sees_a_held_out_prompt(tested, pretraining):
    assert len(pretraining) == 12 * (96 + 48)
    assert {p.category for p in pretraining} == {*CATEGORIES, *RIDDLES, *KINDS}
    assert not [p.id for p in pretraining if is_held_out(p.meta["combination"])]
    assert not {content(p) for p in pretraining} & {content(p) for prompts in tested.values() for p in prompts}


def test_the_flow_models_pretraining_never_sees_one_either(tested, monkeypatch):
    from unify_rl.policies.bagel import BagelPolicy, new_bagel
    from unify_rl.train.pretrain import vocabulary
    from unify_rl.train.pretrain_bagel import joint_batch
    caught, real = [], BagelPolicy._context
    def spy(self, prompts, *args, **kw): caught.extend(prompts); return real(self, prompts, *args, **kw)
    monkeypatch.setattr(BagelPolicy, "_context", spy)
    small = new_bagel(vocabulary(), hidden=32, layers=1)
    for step in range(8): joint_batch(small, World(), rng_for(0, "pretrain", step), 48, 24)
    assert {p.category for p in caught} == {*CATEGORIES, *RIDDLES, *EDITS, *KINDS}
    assert not [p.id for p in caught if is_held_out(p.meta["combination"])]
    assert not {content(p) for p in caught} & {content(p) for prompts in tested.values() for p in prompts}


def test_a_wrong_caption_of_pretraining_shows_no_held_out_scene():
    "A picture that does not fit its caption is the picture of another training prompt, not of a held-out one."
    prompts = [p for p in draw_prompts("train", 120) if p.category in ("colors", "counting", "color_attribution")]
    found = detect_templates(render_batch(captioned(prompts, World(), rng_for("wrong"), wrong=1.0)))
    rule = lambda c, k: Prompt("x", "generate", "x", constraints=constraints(c, k))
    rules = {c: [rule(c, k) for k in split_combinations(c, "test")] for c in CATEGORIES}
    fits = lambda rule, objects: all(ok for ok, _ in check_constraints(rule, objects, (24, 24)))
    shown = [p.id for p, objects in zip(prompts, found) if any(fits(r, objects) for r in rules[p.category])]
    assert len(prompts) == 60 and not shown
