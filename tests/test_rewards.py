"Answer parsing as a table, each rule against scenes that satisfy and break it, and every way a reward can misbehave."
from dataclasses import replace

import numpy as np
import pytest
import torch

from unify_rl.core import Constraint, Detection, Prompt, Rollout, Scores, UserError, rng_for
from unify_rl.grpo.advantage import advantages
from unify_rl.rewards.verifiable import (REWARDS, RULES, Eyes, Reward, build_rewards, check_constraints, check_prompts,
                                         extract_answer, per_sample,
                                         same_answer, score, well_formed)
from unify_rl.world.detectors import detect_components, detect_templates
from unify_rl.world.prompts import draw_prompts, edit_prompts, riddle_prompts, scene_for
from unify_rl.world.questions import question_prompts, reply
from unify_rl.world.scenes import COLORS, SHAPES, Thing, World, render

# -- answers

COLORED = ("red", "blue", "green", "orange")
NUMBERS = ("2", "0", "3", "1")

@pytest.mark.parametrize("given", ["3", "three", "Three", "THREE.", "3.0", "3.", " 3 ", "(3)", "3 circles", "three circles", "+3",
                                   "**3**", "3!", "03"])
def test_says_three(given): assert same_answer(given, "3") and same_answer("3", given)

@pytest.mark.parametrize("given", ["4", "33", "-3", "3 or 4", "3 or four", "3, 4", "not 3", "3/1", "0.3", "1e3", "", ".", "thre",
                                   "2+1", "len('abc')",
                                   "__import__('os').system('true')", "3" * 5000, "nan", "inf", "²3", "x" * 10000])
def test_does_not_say_three(given): assert not same_answer(given, "3")

@pytest.mark.parametrize("given, truth", [("1,000", "1000"), ("-2.50", "-2.5"), ("50%", "50 %"), ("3 cm", "3 cm"), ("3", "3 cm"),
                                          ("Yes.", "yes"), ("a red", "red"), ("The Left Of", "left of"),
                                          ("left-of", "left of"), ("RED!", "red"), ("'no'", "no")])
def test_open_ended_right(given, truth): assert same_answer(given, truth)

@pytest.mark.parametrize("given, truth", [("3 cm", "3 m"), ("yes and no", "yes"), ("yes no", "yes"), ("no", "yes"),
                                          ("red or blue", "red"), ("left", "left of"), ("1,2", "12"), ("red", ""),
                                          (".5", "5"), ("-.5", ".5"), ("−3", "3"), ("-5 degrees celsius", "5 degrees celsius"),
                                          ("1/2", "1, 2"), ("-1, 2", "1, 2"), ("1-2", "1+2"), ("x=2", "x-2"), ("-x", "x"),
                                          ("[1,2)", "(1,2]"), ("|-3|", "-3"), ("<5", "5"), ("2x", "2"), ("2pi", "2"), ("2xy", "2"),
                                          ("$5", "€5"), ("A, B", "B"), ("A B", "B"), (r"-\infty", r"\infty"), ("1 2", "12"),
                                          ("5 m/s", "5 m"), ("2 1", "1 2"), ("5 cm^2", "5 cm")])
def test_open_ended_wrong(given, truth): assert not same_answer(given, truth)

@pytest.mark.parametrize("given", ["B", "b", "(B)", "[b]", "B.", "B)", "B:", "B. blue", "(B) blue", "B) Blue", "B.blue", "blue",
                                   "Blue.", "a blue", "`B`", "**B**", "\nB\n"])
def test_choice_right(given): assert same_answer(given, "B", COLORED)

@pytest.mark.parametrize("given", ["A", "red", "B. red", "A. blue", "A or B", "A, B", "AB", "A B C D", "A. B. C. D.", "B or A",
                                   "blue or red", "E", "Z", "", "(", "2", "not B", "B blue red"])
def test_choice_wrong(given): assert not same_answer(given, "B", COLORED)

def test_choices_that_are_numbers_words_or_letters():
    assert same_answer("C", "C", NUMBERS) and same_answer("three", "C", NUMBERS) and same_answer("C. 3", "C", NUMBERS)
    assert not same_answer("2", "C", NUMBERS)                      # the text of another option, not a letter's position
    assert same_answer("a circle", "B", ("square", "circle")) and not same_answer("a circle", "A", ("square", "circle"))
    assert same_answer("B", "circle", ("square", "circle"))        # the truth may be given as the option's text
    for truth in ("C", "triangle", ""):
        with pytest.raises(ValueError, match="none of the 2"): same_answer("A", truth, ("square", "circle"))

@pytest.mark.parametrize("text, answer", [("<answer>B</answer>", "B"), ("<think> hm </think>\n<answer>\n 3 \n</answer> bye", "3"),
                                          ("<answer> a<b </answer>", "a<b")])
def test_extracted(text, answer): assert extract_answer(text) == (answer, "")

@pytest.mark.parametrize("text, why", [(None, "no <answer>"), ("", "no <answer>"), ("B", "no <answer>"),
                                       ("<answer>B", "no <answer>"), ("B</answer>", "no <answer>"),
                                       ("<ANSWER>B</ANSWER>", "no <answer>"), ("<answer>  </answer>", "empty"),
                                       ("<answer>A</answer> <answer>B</answer>", "2 answers")])
def test_not_extracted(text, why):
    answer, reason = extract_answer(text)
    assert answer is None and why in reason

T, A = "<think>{}</think>".format, "<answer>{}</answer>".format

@pytest.mark.parametrize("text", [T("a") + A("B"), f" {T('a')} \n\n {A('B')} ", T("") + A("B"), T("two\nlines") + A("3 < 4"),
                                  T("1 < 2 > 0") + A("B")])
def test_well_formed(text): assert well_formed(text) == (True, "")

@pytest.mark.parametrize("text", [None, "", "B", T("a"), A("B"), A("B") + T("a"), T("a") + A("B") + A("B"),
                                  T("a") + T("b") + A("B"), T(T("a")) + A("B"), T("a") + A(A("B")),
                                  T("a" + A("B")), T("a") + A("B") + "!", "so " + T("a") + A("B"), T("a") + " hm " + A("B"),
                                  "<think>a<answer>B</answer>", "<think>a</think><answer>B",
                                  T("a").upper() + A("B")])
def test_not_well_formed(text):
    ok, why = well_formed(text)
    assert not ok and why

def test_long_malformed_text_is_judged_quickly():
    import time
    start = time.process_time()
    for text in ("<think>" * 3000, "<answer>" * 3000, "<think>" + "a<" * 5000, T("x") + "<answer>" + "<" * 9000,
                 "</think>" * 3000): assert not well_formed(text)[0]; extract_answer(text)
    assert time.process_time() - start < 2

# -- rules

BOX = lambda x, y: (x, y, x + 8, y + 8)
FOUND = [Detection("circle", "red", BOX(0, 0)), Detection("circle", "red", BOX(16, 0)), Detection("square", "blue", BOX(0, 16))]

def holds(kind, found=FOUND, size=(24, 24), text="", **params):
    ok, why = check_constraints(Prompt("t", "generate", "t", constraints=(Constraint(kind, params),)), found, size, text)[0]
    assert why
    return ok

@pytest.mark.parametrize("kind, right, wrong", [
    ("total", dict(n=3), dict(n=2)), ("total", dict(n=3), dict(n=4)),
    ("count", dict(shape="circle", n=2), dict(shape="circle", n=1)), ("count", dict(shape="cross", n=0),
                                                                      dict(shape="cross", n=1)),
    ("color", dict(shape="circle", color="red", n=2), dict(shape="circle", color="red", n=1)), ("color",
            dict(shape="square", color="blue"), dict(shape="square", color="red")),
    ("absent", dict(color="green"), dict(color="red")), ("absent", dict(shape="square", color="red"), dict(shape="square")),
    ("place", dict(shape="square", place="bottom left"), dict(shape="square", place="top left")), ("place",
            dict(shape="circle", place="top right"), dict(shape="cross", place="top right")),
    ("relation", dict(a="circle", relation="above", b="square"), dict(a="circle", relation="below", b="square")),
    ("relation", dict(a="circle", relation="left of", b="circle"), dict(a="square", relation="left of", b="square")),
    ("kept", dict(shape="square", color="blue", box=BOX(1, 15)), dict(shape="square", color="blue", box=BOX(4, 16))),
    ("kept", dict(shape="square", color="blue", box=BOX(0, 16)), dict(shape="square", color="red", box=BOX(0, 16))),
    ("size", dict(height=24, width=24), dict(height=24, width=32)), ("aspect", dict(ratio=1.0), dict(ratio=16 / 9)),
    ("text", dict(contains="Stop"), dict(contains="go")), ("format", dict(pattern="a STOP .*"), dict(pattern="STOP"))])
def test_rule(kind, right, wrong):
    assert holds(kind, text=" a STOP sign ", **right) is True and holds(kind, text=" a STOP sign ", **wrong) is False

def test_every_rule_is_tested():
    import inspect
    kinds = {a[0] for a in next(m for m in test_rule.pytestmark if m.name == "parametrize").args[1]}
    assert kinds == set(RULES) and all(len(inspect.signature(r).parameters) >= 2 for r in RULES.values())

@pytest.mark.parametrize("eyes", [detect_templates, detect_components])
@pytest.mark.parametrize("make", [draw_prompts, riddle_prompts])
def test_right_pictures_get_one_and_pictures_of_other_prompts_do_not(make, eyes):
    prompts, rng = make("test", 120, seed=5), rng_for("right pictures")
    pictures = [render(scene_for(*(p.meta.get("plain") or (p.category, p.meta["combination"])), World(), rng)) for p in prompts]
    strict, lenient = (REWARDS[n](Eyes(eyes)) for n in ("strict", "constraints"))
    right, shifted = Rollout(prompts, 1, [], [None] * 120, pictures), Rollout(prompts, 1, [], [None] * 120,
            pictures[1:] + pictures[:1])
    assert strict(prompts, right).values.tolist() == lenient(prompts, right).values.tolist() == [1.0] * 120
    assert strict(prompts, shifted).values.mean() < 0.1
    assert 0.1 < lenient(prompts, shifted).values.mean() < 0.8

def test_an_edit_must_change_the_one_thing_and_keep_the_rest():
    prompts = edit_prompts("test", 80)
    strict, empty = REWARDS["strict"](Eyes()), np.full((24, 24, 3), 255, np.uint8)
    get = lambda pictures: strict(prompts, Rollout(prompts, 1, [], [None] * 80, pictures)).values
    assert get([p.reference for p in prompts]).tolist() == [1.0] * 80
    assert get([p.image for p in prompts]).tolist() == [0.0] * 80                       # nothing was done
    assert get([empty] * 80).tolist() == [0.0] * 80                                     # everything was removed
    moved = [np.roll(p.reference, 4, axis=1) for p in prompts]                          # right things, wrong places
    assert get(moved).tolist() == [0.0] * 80

@pytest.mark.parametrize("size", [16, 24, 32, 40, 48, 64])
def test_larger_worlds_are_read(size):
    eyes, world = Eyes(), World(size=size, cell=dict({16: 4, 24: 4, 32: 4, 40: 8, 48: 8, 64: 8})[size])
    scene = (Thing("circle", "red", 0, 0), Thing("cross", "blue", size - world.sprite, size - world.sprite))
    assert {(d.label, d.color) for d in eyes([render(scene, world)])[0]} == {("circle", "red"), ("cross", "blue")}

def test_a_world_given_is_the_world_used():
    world = World(size=48, cell=4)
    assert len(Eyes(world=world)([render((Thing("circle", "red", 4, 4),), world)])[0]) == 1
    with pytest.raises(UserError, match="384 pixels"): Eyes()([np.zeros((384, 384, 3), np.uint8)])

def test_one_detection_for_two_rewards_also_beside_questions():
    calls = []
    eyes = Eyes(lambda images, world: calls.append(len(images)) or detect_templates(images, world))
    draw, ask = draw_prompts("train", 3), question_prompts("train", 2)
    mixed = [draw[0], ask[0], draw[1], ask[1], draw[2]]
    pic = [render((Thing("circle", "red", 0, 4 * i),)) for i in range(3)]
    ro = Rollout(mixed, 1, [], [None, "x", None, "x", None], [pic[0], None, pic[1], None, pic[2]])
    score([REWARDS["constraints"](eyes), REWARDS["strict"](eyes)], mixed, ro)
    assert calls == [3]
    score([REWARDS["strict"](eyes)], mixed, replace(ro, images=[p if p is None else p.copy() for p in ro.images]))
    assert calls == [3, 3]                                                               # new pictures are looked at again

def test_a_missing_picture_masks_its_own_sample():
    prompts = draw_prompts("train", 3)
    ro = Rollout(prompts, 1, [], [None] * 3, [render((Thing("circle", "red", 0, 0),)), None,
                                              render((Thing("circle", "red", 0, 0),), World(size=32))])
    t = score([REWARDS["constraints"](Eyes())], prompts, ro)
    assert t.scores_RB[0].isnan().tolist() == [False, True,
                                               False] and "no picture" in t.reasons[0][1] and t.errors == {"constraints": 1}

# -- misbehaving rewards

@pytest.fixture
def batch():
    draw, ask = draw_prompts("train", 2), question_prompts("train", 2)
    prompts = [draw[0], ask[0], draw[1], ask[1]]
    pic = render((Thing("circle", "red", 0, 0),))
    return prompts, Rollout(prompts, 1, [], [None, reply(ask[0]), None, "no idea"], [pic, None, pic, None])

def boom(*_): raise RuntimeError("out of memory")
ALL = ("generate", "answer")
BAD = dict(
    raises=(Reward("x", boom, ALL), "RuntimeError: out of memory"),
    raises_each=(per_sample("x", boom, ALL), "RuntimeError: out of memory"),
    returns_none=(Reward("x", lambda p, r: None, ALL), "NoneType"),
    returns_a_list=(Reward("x", lambda p, r: [1.0] * len(p), ALL), "not Scores"),
    too_few=(Reward("x", lambda p, r: Scores([1.0], ["?"]), ALL), "1 values for 4"),
    too_many=(Reward("x", lambda p, r: Scores([1.0] * 9, ["?"] * 9), ALL), "9 values for 4"),
    none=(per_sample("x", lambda *_: None, ALL), "gave no number"),
    nan=(per_sample("x", lambda *_: float("nan"), ALL), "gave no number"),
    infinite=(per_sample("x", lambda *_: float("-inf"), ALL), "gave no number"),
    nan_with_reason=(per_sample("x", lambda *_: (float("nan"), "the model was silent"), ALL), "the model was silent"),
    a_word=(per_sample("x", lambda *_: "good", ALL), "good"),
    triples=(per_sample("x", lambda *_: (1, 2, 3), ALL), "unpack"),
)

@pytest.mark.parametrize("bad, words", BAD.values(), ids=BAD)
def test_failures_are_masked_counted_and_explained(bad, words, batch):
    prompts, ro = batch
    good = per_sample("good", lambda *_: (0.5, "fine"), ALL)
    t = score([bad, good], prompts, ro)
    assert t.scores_RB.dtype == torch.float64 and t.scores_RB[0].isnan().all() and t.applies_RB.all()
    assert t.scores_RB[1].tolist() == [0.5] * 4 and t.reasons[1] == ["fine"] * 4             # the other reward is untouched
    assert t.errors == {"x": 4} and len(t.notes) == 1 and words in t.notes[0] and "'x' failed on 4 of 4" in t.notes[0]
    with pytest.raises(UserError) as e: score([good, bad], prompts, ro, "stop")
    assert words in str(e.value) and "'x'" in str(e.value) and prompts[0].id in str(e.value)

def test_one_bad_sample_costs_one_sample(batch):
    prompts, ro = batch
    def picky(prompt, text, image):
        if prompt.id == prompts[2].id: raise KeyError("colour")
        return 1, "ok"
    t = score([per_sample("picky", picky, ALL)], prompts, ro)
    assert t.scores_RB[0].isnan().tolist() == [False, False, True,
                                               False] and t.errors == {"picky": 1} and "KeyError" in t.reasons[0][2]
    with pytest.raises(UserError, match=prompts[2].id): score([per_sample("picky", picky, ALL)], prompts, ro, "stop")

def test_a_failed_sample_never_moves_its_group():
    "The way from a failed scorer to the advantages: as if the sample had not been drawn, not as if it were bad."
    prompt = draw_prompts("train", 1)[0]
    pic = [render((Thing("circle", "red", 0, 4 * i),)) for i in range(4)]
    values = iter([1.0, 0.0, None, 1.0])
    t = score([per_sample("r", lambda *_: next(values))], [prompt] * 4, Rollout([prompt], 4, [], [None] * 4, pic))
    adv = advantages(t.scores_RB, torch.ones(1, dtype=torch.float64), 4, t.applies_RB)
    three = advantages(torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64), 3)
    assert adv.valid_B.tolist() == [True, True, False, True] and adv.adv_B[2] == 0
    assert adv.adv_B[[0, 1, 3]].tolist() == three.adv_B.tolist()

def test_rewards_see_only_their_tasks(batch):
    prompts, ro = batch
    seen = []
    def spy(ps, r):
        seen.append(([p.id for p in ps], r.texts, [im is None for im in r.images]))
        return Scores(np.arange(len(ps)), [f"number {i}" for i in range(len(ps))])
    t = score([Reward("spy", spy, ("answer",)), Reward("idle", boom, ("edit",))], prompts, ro)
    assert seen == [([prompts[1].id, prompts[3].id], [ro.texts[1], ro.texts[3]], [True, True])]
    assert t.applies_RB.tolist() == [[False, True, False, True], [False] * 4] and t.errors == {}
    assert t.scores_RB[0, [1, 3]].tolist() == [0.0, 1.0] and t.scores_RB[0, [0, 2]].isnan().all() and t.reasons[0] == ["",
            "number 0", "", "number 1"]

def test_a_users_mistake_is_not_a_failed_sample(batch):
    prompts, ro = batch
    broken = [replace(p, constraints=(Constraint("colour", {}),)) if p.task == "generate" else p for p in prompts]
    with pytest.raises(UserError, match="Did you mean 'color'"): score([REWARDS["constraints"](Eyes())], broken, ro)

def test_ctrl_c_is_not_swallowed(batch):
    def stop(*_): raise KeyboardInterrupt
    for r in (Reward("x", stop, ALL), per_sample("x", stop, ALL)):
        with pytest.raises(KeyboardInterrupt): score([r], *batch)

# -- configuration

def test_building():
    rewards, weights = build_rewards([dict(name="constraints", weight=0.5), dict(name="accuracy")])
    assert [r.name for r in rewards] == ["constraints", "accuracy"] and weights.tolist() == [0.5,
            1.0] and weights.dtype == torch.float64
    assert all(build_rewards([dict(name=n)])[0][0].name == n for n in REWARDS)

@pytest.mark.parametrize("specs, words", [([dict(name="acuracy")], "Did you mean 'accuracy'"), ([], "nothing to learn"),
                                          ([dict(name="strict", settings={"loose": 1})], "loose")])
def test_bad_configurations(specs, words):
    with pytest.raises(UserError, match=words): build_rewards(specs)

def test_on_error_is_checked(batch):
    with pytest.raises(UserError, match="Did you mean 'stop'"): score([], *batch, "stopp")

@pytest.mark.parametrize("change, words", [
    (dict(constraints=(Constraint("colour", dict(shape="circle")),)), "Did you mean 'color'"),
    (dict(constraints=(Constraint("count", dict(shape="circle")),)), "wrong parameters"),
    (dict(constraints=(Constraint("count", dict(shape="circle", n=1, size=3)),)), "wrong parameters"),
    (dict(constraints=()), "no constraints")])
def test_prompts_that_can_not_be_judged_are_found_before_the_run(change, words):
    good = draw_prompts("train", 12)
    rewards, _ = build_rewards([dict(name="strict"), dict(name="accuracy")])
    check_prompts(good + question_prompts("train", 24) + edit_prompts("train", 8), rewards)
    with pytest.raises(UserError, match=words) as e: check_prompts([*good, replace(good[0], id="mine/7", **change)], rewards)
    assert "mine/7" in str(e.value)

@pytest.mark.parametrize("change, words", [(dict(answer=None), "has no answer"), (dict(answer="F", choices=COLORED),
        "none of the 4"), (dict(answer="pink", choices=COLORED), "none of the 4")])
def test_answers_that_can_not_be_judged_are_found_before_the_run(change, words):
    q = replace(question_prompts("train", 1)[0], id="mine/8", **change)
    with pytest.raises(UserError, match=words) as e: check_prompts([q], build_rewards([dict(name="accuracy")])[0])
    assert "mine/8" in str(e.value)

def test_every_question_of_the_world_accepts_its_own_answer_and_no_other():
    rewards, _ = build_rewards([dict(name="accuracy"), dict(name="format")])
    for q in question_prompts("test", 300):
        others = [c for c in ("ABCD" if q.choices else [*COLORS, *SHAPES, *"01234", "yes", "no"]) if c != q.answer]
        replies = [reply(q), *(reply(q, answer=o) for o in others)]
        if q.choices: replies += [reply(q, answer=o) for i, o in enumerate(q.choices) if "ABCD"[i] != q.answer]
        n = len(replies)
        t = score(rewards, [q] * n, Rollout([q], n, [], replies, [None] * n))
        assert t.scores_RB[0].tolist() == [1.0] + [0.0] * (n - 1), (q.answer, q.choices, t.reasons[0])
        assert t.scores_RB[1].tolist() == [1.0] * n
