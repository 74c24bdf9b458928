"""Suites with a policy whose right answers are known, one by one; every way a comparison can be refused."""
import json

import numpy as np
import pytest
import torch

from unify_rl.core import Detection, Prompt, Rollout, UserError, rng_for
from unify_rl.evaluate import suites
from unify_rl.evaluate.suites import SUITES, Result, compare, evaluate, load_suite, said_last, table
from unify_rl.policies.base import Policy
from unify_rl.train.runlog import RunLog, read_samples
from unify_rl.world.prompts import scene_for
from unify_rl.world.questions import reply
from unify_rl.world.scenes import PLACES, World, render


class Known(Policy):
    "Right where the die says so; `calls` and `luck` remember what it was asked and what it did."
    tasks, name = ("generate", "answer", "edit"), "known"

    def __init__(self, p):
        super().__init__()
        self.p, self.one, self.luck, self.calls = p, torch.nn.Parameter(torch.ones(1)), [], []

    def sample(self, prompts, group_size, generator=None, **settings):
        self.check_tasks(prompts)
        luck = (torch.rand(len(prompts), generator=generator) < self.p).tolist()
        self.luck += luck; self.calls.append((len(prompts), group_size, settings))
        texts = [self.say(q, ok) if q.task == "answer" else None for q, ok in zip(prompts, luck)]
        images = [None if q.task == "answer" else self.draw(q, ok) for q, ok in zip(prompts, luck)]
        return Rollout(prompts, group_size, [], texts, images)

    def draw(self, q, right):
        if q.task == "edit": return q.reference if right else q.image
        scene = scene_for(*(q.meta.get("plain") or (q.category, q.meta["combination"])), World(), rng_for("known", q.id))
        return render(scene if right else scene[:-1])

    def say(self, q, right):
        wrong = "ABCD"[("ABCD".index(q.answer) + 1) % 4] if q.choices else "nothing"
        return reply(q, answer=None if right else wrong)


@pytest.mark.parametrize("name", SUITES)
def test_every_verdict_is_the_known_one(name):
    suite, policy = load_suite(name, 240), Known(.6)
    res = evaluate(policy, suite, batch=100, cfg=2.0, temperature=.9)
    np.testing.assert_array_equal(res.values(), np.array(policy.luck, float))
    np.testing.assert_array_equal(res.values("second"), res.values())
    assert res.agreement == 1 and (res.values("lenient") >= res.values()).all() and res.supported
    assert abs(res.overall - .6) < 4 * (.24 / 240) ** .5 and .4 < res.overall < .8
    assert [r["id"] for r in res.rows] == [p.id for p in suite.prompts]
    assert sum(c["n"] for c in res.by_category().values()) == 240
    for c, v in res.by_category().items():
        assert v["correct"] == np.mean([ok for ok, p in zip(policy.luck, suite.prompts) if p.category == c])
    assert [(n, g) for n, g, _ in policy.calls] == [(100, 1), (100, 1), (40, 1)]
    greedy = name == "shapes-qa"
    assert policy.calls[0][2] == dict(temperature=0.0 if greedy else .9, cfg=2.0, max_text=64)


def test_noise_depends_on_seed_suite_and_batch_only():
    suite = load_suite("shapes-wise", 60)
    right = lambda **kw: evaluate(Known(.5), suite, batch=30, **kw).values().tolist()
    torch.manual_seed(1); one = right()
    torch.manual_seed(2); assert right() == one
    assert right(seed=1) != one
    assert one[:30] != one[30:], "batches must not share their noise"
    assert evaluate(Known(.5), load_suite("shapes-geneval", 60), batch=30).values().tolist() != one


def test_scorers_that_differ_are_seen_to_differ(monkeypatch):
    "A first detector that is fooled: it sees what the prompt wants in every picture."
    suite = load_suite("shapes-geneval", 60)
    colors = [p for p in suite.prompts if p.category == "colors"]
    wanted = [p.meta["combination"] for p in colors]
    def box(place): y, x = divmod(PLACES.index(place), 3); return 8 * x, 8 * y, 8 * x + 8, 8 * y + 8
    def fooled(images, world): return [[Detection(shape, color, box(place))] for color, shape, place in wanted]
    monkeypatch.setattr(suites, "detect_templates", fooled)
    res = evaluate(Known(0.0), suites.Suite("shapes-geneval", "generate", colors))
    assert (res.overall, res.mean("second"), res.agreement) == (1.0, 0.0, 0.0)


def test_unsupported_task_is_a_result_with_a_sentence(tmp_path):
    policy = Known(1); policy.tasks, policy.name = ("generate", "answer"), "tiny-janus"
    edit = evaluate(policy, load_suite("shapes-edit", 8))
    assert not edit.supported and edit.why.startswith("tiny-janus cannot edit pictures") and not policy.calls
    assert Result.from_json(edit.to_json()) == edit and edit.by_category() == {} and np.isnan(edit.overall)
    change = compare(edit, edit)
    assert change == {"unsupported": edit.why}
    assert json.loads(json.dumps(change)) == change and table({"shapes-edit": change}).row_count == 1
    RunLog(tmp_path / "run").log_samples("before", *edit.samples())


def test_round_trip_through_json_keeps_the_comparison():
    suite = load_suite("shapes-geneval", 60)
    before, after = evaluate(Known(.4), suite), evaluate(Known(.7), suite)
    kept = Result.from_json(before.to_json())
    assert kept.rows == before.rows and kept.settings == before.settings and kept.pictures == {}
    assert compare(kept, after) == compare(before, after)
    for damaged in ("", "[]", "{}", before.to_json()[:-20], '{"suite": "x", "rows": [], "other": 1}'):
        with pytest.raises(UserError, match="evaluate again"): Result.from_json(damaged)


def test_comparison_has_the_shape_of_the_summary():
    suite = load_suite("shapes-wise", 120)
    before, after = evaluate(Known(.3), suite), evaluate(Known(.6), suite)
    c = compare(before, after)
    assert c["overall"]["before"] == before.overall and c["overall"]["after"] == after.overall and c["overall"]["n"] == 120
    lo, hi = c["overall"]["ci95"]
    assert 0 < lo < after.overall - before.overall < hi
    assert set(c["categories"]) == {p.category for p in suite.prompts}
    assert all(set(v) == {"before", "after", "ci95", "n"} for v in [c["overall"], c["second"], *c["categories"].values()])
    assert json.loads(json.dumps(c, allow_nan=False)) == c
    nothing = compare(before, before)["overall"]
    assert nothing["ci95"] == [0, 0], "the same outputs differ by exactly nothing"
    assert table({"shapes-wise": c}).row_count == 2 + len(c["categories"])


def test_comparing_different_prompts_is_refused():
    one, other = (evaluate(Known(1), load_suite("shapes-wise", 30, seed)) for seed in (0, 1))
    with pytest.raises(UserError, match="prompts differ"): compare(one, other)
    with pytest.raises(UserError, match="prompts differ"): compare(one, evaluate(Known(1), load_suite("shapes-geneval", 30)))


def test_unknown_suite_and_sizes():
    with pytest.raises(UserError, match="Did you mean 'shapes-geneval'"): load_suite("shapes-genval")
    with pytest.raises(UserError, match="at least one prompt"): load_suite("shapes-qa", 0)
    with pytest.raises(UserError, match="only"): load_suite("shapes-geneval", 10**6)


def test_samples_fit_the_run_log(tmp_path):
    seen = []
    for name in SUITES:
        res = evaluate(Known(.5), load_suite(name, 48), batch=20, progress=lambda done, total: seen.append((done, total)))
        rows, images = res.samples()
        assert len(rows) == len(images) == 2 * len(res.categories)
        assert all(r["caption"].startswith("right" if r["correct"] else "wrong") and r["suite"] == name for r in rows)
        log = RunLog(tmp_path / name); log.log_samples("before", rows, images)
        read = read_samples(tmp_path / name, "before")
        assert [r["prompt_id"] for r in read] == [r["prompt_id"] for r in rows] and all(r["image"] for r in read)
    assert seen[:3] == [(20, 48), (40, 48), (48, 48)]


@pytest.mark.parametrize("text, right", [
    ("<think> red circle 2 3 </think> <answer> 3 </answer>", True), ("3", True), (" 3 . ", True),
    ("<think> red circle 2 3", False), ("<answer> 13 </answer>", False), ("<answer> 3 </answer> or 2", False),
    ("<answer> </answer>", False), ("", False)])
def test_second_scorer_of_answers(text, right):
    assert said_last(text, Prompt("q", "answer", "how many?", answer="3")) == right
