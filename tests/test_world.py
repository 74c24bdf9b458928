"The designed split holds for every kind of task: nothing held out is ever trained on, and there is enough of it."
from collections import Counter

import pytest

from unify_rl.world.prompts import (CATEGORIES, EDITS, RIDDLES, combinations, constraints, draw_prompts, edit_prompts,
                                    is_held_out,
                                    riddle_prompts, scene_for, split_combinations)
from unify_rl.world.questions import KINDS, joint_prompts, question_combinations, question_prompts
from unify_rl.world.scenes import World
from unify_rl.core import Rollout, rng_for
from unify_rl.rewards.verifiable import build_rewards, score

DRAWN = CATEGORIES + RIDDLES + EDITS

def meaning(p): return (p.category, tuple(p.meta["combination"]))

@pytest.mark.parametrize("category", DRAWN)
def test_combinations_are_split_in_two(category):
    train, test = set(split_combinations(category, "train")), set(split_combinations(category, "test"))
    assert not train & test and train | test == set(combinations(category))
    assert 0.15 < len(test) / len(train | test) < 0.35

@pytest.mark.parametrize("kind", KINDS)
def test_question_combinations_are_split_in_two(kind):
    train, test = (set(question_combinations(kind, s)) for s in ("train", "test"))
    assert train and test and not train & test

@pytest.mark.parametrize("make, names", [(draw_prompts, CATEGORIES), (riddle_prompts, RIDDLES)])
def test_every_drawing_prompt(make, names):
    "All there are, on both sides: unique, disjoint in words and in meaning, and 150 or more held out in each category."
    train, test = make("train"), make("test")
    assert not {p.text for p in train} & {p.text for p in test}
    assert not {p.id for p in train} & {p.id for p in test}
    assert not {meaning(p) for p in train} & {meaning(p) for p in test}
    for p in test: assert is_held_out(p.meta["combination"])
    held_out = Counter(category for category, _ in {(p.category, p.text) for p in test})
    assert set(held_out) == set(names) and min(held_out.values()) >= 150, held_out

def test_plain_and_riddle_splits_do_not_leak_into_each_other():
    "A riddle is a plain prompt in other words: what one side holds out, the other must not train on."
    plain = {(c, x) for c in CATEGORIES for x in split_combinations(c, "train")}
    asked = {(p.meta["plain"][0], tuple(p.meta["plain"][1])) for p in riddle_prompts("test")}
    assert not asked & plain

@pytest.mark.parametrize("make, names, n", [(edit_prompts, EDITS, 700), (question_prompts, KINDS, 960)])
def test_every_prompt_with_a_picture(make, names, n):
    key = lambda p: (p.text, p.image.tobytes())
    train, test = make("train", n), make("test", n)
    assert not {meaning(p) for p in train} & {meaning(p) for p in test}
    assert not {key(p) for p in train} & {key(p) for p in test}
    unique = Counter(category for category, _, _ in {(p.category, *key(p)) for p in test})
    assert set(unique) == set(names) and min(unique.values()) >= 150, unique

def test_a_prompt_does_not_depend_on_how_many_are_drawn_elsewhere():
    a, b = draw_prompts("test", 60, seed=3), draw_prompts("test", 60, seed=3)
    assert [p.id for p in a] == [p.id for p in b] != [p.id for p in draw_prompts("test", 60, seed=4)]
    assert [p.image.tobytes() for p in edit_prompts("test", 8)] == [p.image.tobytes() for p in edit_prompts("test", 12)][:8]

@pytest.mark.parametrize("category", CATEGORIES)
def test_every_held_out_combination_can_be_drawn(category):
    for c in split_combinations(category, "test"):
        assert scene_for(category, c, World(), rng_for("can be drawn", c)) and constraints(category, c)


@pytest.mark.parametrize("split", ["train", "test"])
def test_joint_prompts_agree_with_themselves(split):
    "The real picture satisfies the sentence, and the question about it has its answer."
    prompts = joint_prompts(split, 90, seed=3)
    rollout = Rollout(prompts, 1, [], [f"<think> x </think> <answer> {p.answer} </answer>" for p in prompts], [p.reference for p in prompts])
    judged = score(build_rewards([{"name": "strict"}, {"name": "accuracy"}])[0], prompts, rollout)
    assert (judged.scores_RB == 1).all()
    assert len({p.id for p in prompts}) == 90 and {p.task for p in prompts} == {"joint"}
    assert all(p.image is p.reference and is_held_out(p.meta["combination"]) == (split == "test") for p in prompts)
