"""The inspector of reward groups: reading, recomputing, views, widgets moved by hand, bad input, and that looking needs no training code."""
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from unify_rl.core import Part, UserError
from unify_rl.grpo.advantage import advantages
from unify_rl.inspect.groups import (LoggedRun, Settings, carried_over, clipped, disagreement, follow, is_whole, logged_settings, overview, recompute,
                                     reward_names, select)
from unify_rl.inspect.panel import CELL, Inspector, open_lab, write_groups, write_notebook
from unify_rl.inspect.views import captions_of, group_view, layers_for, model_maps, moments, path_html, strip, tokens_html, twin
from unify_rl.train.runlog import RunLog, action_columns, path_frames, read_rows

LAMBDA = dict(constraints=1.0, tidy=0.5)
RAW = {1: dict(constraints=[1, .5, .75, 0], tidy=[.2, .6, math.nan, 1]), 2: dict(constraints=[1, .5, .75, 0], tidy=[.2, .6, .3, 1]),
       3: dict(constraints=[1, 1, 1, 1], tidy=[.5, .5, .5, .5])}


def picture(k, side=24):
    img = np.full((side, side, 3), 255, np.uint8)
    img[2:10, 2:10 + 3 * k] = (220, 40, 40)
    return img


def rows_of(step, prompt=0, prompt_id=None, **more):
    a = advantages(torch.tensor([RAW[step][n] for n in LAMBDA]), torch.tensor(list(LAMBDA.values())), 4)
    rows = []
    for i in range(4):
        row = dict(prompt_index=prompt, sample=i, prompt_id=prompt_id or f"p{prompt}", task="generate", category="count", prompt=f"two red squares {prompt}", reward=a.reward_B[i].item(),
                   group_mean=a.mean_N[0].item(), group_std=a.std_N[0].item(), advantage=a.adv_B[i].item(), weight=1.0, valid=bool(a.valid_B[i]), dead=bool(a.dead_N[0]),
                   clip_fraction=0.0, kl=0.01, logp_image=[-.1, -.2, -3.0, -.4], ratio_image=[1.0, 1.3, 1.0, 0.7])
        for n, w in LAMBDA.items():
            x = float(RAW[step][n][i])
            row |= {f"raw_{n}": x, f"weighted_{n}": w * x, f"reason_{n}": "timed out" if math.isnan(x) else f"says {x}"}
        rows.append(row | more)
    return rows


def make(folder, steps=(1, 2, 3), config=True, pictures=True):
    log = RunLog(folder)
    for s in steps: log.log_groups(s, rows_of(s) + rows_of(s, 1, f"only/{s}"), [picture(i % 4) if pictures else None for i in range(8)])
    known = dict(recipe="grpo", policy="tiny-janus", rewards=[dict(name=n, weight=w) for n, w in LAMBDA.items()], advantage=dict(eps=1e-8), objective=dict(clip_low=.2, clip_high=.2))
    if config: (log.dir / "config.yaml").write_text(yaml.safe_dump(known))
    return log.dir


@pytest.fixture
def run(tmp_path): return LoggedRun(make(tmp_path / "run"))


# ---- what the run log keeps of actions ----

def test_actions_of_tokens():
    part = Part("text", torch.tensor([7, 8]), torch.tensor([[5, 6, 0], [5, 5, 5]]), torch.tensor([[True, True, False], [True] * 3]), {}, torch.tensor([0, 0]),
                logp_old=torch.tensor([[-1., -2., 0.], [-1., -1., -1.]]))
    got = action_columns([part], 7, {(id(part), 7): torch.tensor([-1., -1., 0.])}, lambda ids: [f"<{i}>" for i in ids])
    assert got["tokens"] == ["<5>", "<6>"] and got["logp_text"] == [-1, -2] and got["ratio_text"] == pytest.approx([1, math.e])
    assert "order_text" not in got or got["order_text"] is None
    assert "ratio_text" not in action_columns([part], 8, {}, lambda ids: [""] * len(ids))         # no update needed it


def test_actions_of_masked_diffusion_are_averaged_over_draws():
    actions = torch.tensor([[[3, 1], [4, 0]]])                                 # tokens 3, 4; filled in steps 1, 0
    part = Part("image", torch.tensor([0]), actions, torch.tensor([[True, True, True, False]]), {}, torch.tensor([0]), logp_old=torch.tensor([[-1., -2., -3., 9.]]))
    got = action_columns([part], 0, {(id(part), 0): part.logp_old[0]}, None)
    assert got == dict(logp_image=[-2, -2], ratio_image=[1, 1], order_image=[1, 0])


def test_actions_of_a_flow_have_times_and_deviations():
    settings = dict(times=[1.0, .8, .5, 0.0], window=(1,), noise_level=.7, form="flow_sde", grid=(1, 1))
    path = torch.arange(4.).view(1, 1, 2, 1, 2)
    part = Part("image", torch.tensor([3]), path, torch.tensor([[True]]), {}, torch.tensor([0]), logp_old=torch.tensor([[-.5]]), settings=settings)
    got = action_columns([part], 3, {(id(part), 3): torch.tensor([-.5])}, None)
    from unify_rl.mechanisms.flow import step_coefficients
    assert got["time_image"] == [.8] and got["std_image"][0] == pytest.approx(float(step_coefficients(torch.tensor(.8), torch.tensor(.5), .7, "flow_sde")[2]), abs=1e-6)
    frames = path_frames([part], 3, picture(0), lambda x, grid: [np.full((24, 24, 3), int(v.sum()), np.uint8) for v in x], 10**6)
    assert frames.shape == (24, 48, 3) and frames[0, 0, 0] == 1 and frames[0, 30, 0] == 5
    assert path_frames([part], 3, picture(0), None, 10**6) is None and path_frames([part], 3, picture(0), lambda *_: 1 / 0, 24 * 24) is None


def test_times_of_the_forward_estimator_are_those_it_used():
    from unify_rl.mechanisms.flow import forward_draws
    x0 = torch.randn(2, 6, 3)
    part = Part("image", torch.tensor([5, 9]), x0[:, None].expand(-1, 4, -1, -1), torch.ones(2, 4, dtype=torch.bool), {}, torch.tensor([0, 1]), logp_old=-torch.ones(2, 4),
                settings=dict(estimator="forward", window=(), seed=11, group_size=4, draw_shift=1.0))
    want = forward_draws(x0, 11, part.rows // 4, 4, 1.0).t
    for i, b in enumerate((5, 9)): assert action_columns([part], b, {}, None)["time_image"] == pytest.approx(want[i].tolist(), abs=1e-6)


def test_frames_and_lists_are_logged(tmp_path):
    log = RunLog(tmp_path / "r")
    log.log_groups(1, [dict(prompt_index=0, sample=0, tokens=["a"], logp_text=[-.5], std_image=[.1], phrases=[])], [picture(0)], [None], [np.zeros((24, 72, 3), np.uint8)])
    row = read_rows(log.dir, 1)[0]
    assert Image.open(log.dir / row["frames"]).size == (72, 24) and row["tokens"] == ["a"] and row["std_image"] == pytest.approx([.1]) and row["kl"] is None


# ---- reading ----

def test_overview_counts_what_is_there(run):
    facts = overview(run)
    assert [(f["step"], f["prompt_index"]) for f in facts] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert [f["errors"] for f in facts] == [1, 1, 0, 0, 0, 0] and [f["dead"] for f in facts][-2:] == [True, True]
    assert facts[2]["disagreement"] == 1.0 and math.isnan(facts[4]["disagreement"]) and facts[2]["reward"] == pytest.approx(.825)


@pytest.mark.parametrize("raw, want", [([[1, 2, 3], [3, 2, 1]], 1), ([[1, 2, 3], [4, 5, 6]], 0), ([[1, 2], [1, 1]], math.nan), ([[1, math.nan, 3], [3, 2, 4]], 0), ([[1, 2]], math.nan)])
def test_disagreement(raw, want): assert disagreement(raw) == pytest.approx(want, nan_ok=True)


def test_filters_and_sorts(run):
    facts = overview(run)
    assert {f["step"] for f in select(facts, only="dead")} == {3} and {f["step"] for f in select(facts, only="live")} == {1, 2}
    assert {f["step"] for f in select(facts, only="with errors")} == {1} and {f["step"] for f in select(facts, only="rewards disagree")} == {1, 2}
    for key in ("reward", "spread", "errors"):
        got = [f[key] for f in select(facts, sort=key, down=True)]
        assert got == sorted(got, reverse=True)
    assert [f["step"] for f in select(facts, sort="disagreement")][-2:] == [3, 3]                  # NaN is last
    assert [f["prompt_id"] for f in select(facts, text="ONLY/2")] == ["only/2"] and select(facts, task="edit") == []


def test_a_run_that_is_still_written(run):
    assert run.steps == [1, 2, 3] and len(run.facts(3)) == 2
    with open(run.dir / "groups" / ".tmp-step-000004.parquet", "wb") as f: f.write(b"PAR1half")     # not yet renamed
    (run.dir / "groups" / "step-000004").mkdir()
    assert run.steps == [1, 2, 3]
    RunLog(run.dir, resume=True).log_groups(3, rows_of(2))                                            # a resumed run writes a step again
    assert len(run.facts(3)) == 1 and len(run.rows(3)) == 4 and not run.facts(3)[0]["dead"]


def test_a_table_that_is_cut_short_while_we_look_hides_no_other(run):
    shown, path = Inspector(run.dir), run.dir / "groups" / "step-000002.parquet"
    path.write_bytes(path.read_bytes()[:1500])
    assert {f["step"] for f in overview(run)} == {1, 3} and "cannot be read" in run.problems[2]
    shown.scope.value = "all steps"
    assert len(shown.prompt.options) == 4 and "step-000002.parquet" in shown.message.value
    shown.scope.value, shown.step.value = "this step", 2
    assert shown.prompt.options == () and "No group fits" in shown.view.value
    shown.step.value = 1
    assert "two red squares" in shown.view.value
    again = Inspector(run.dir)                                           # whoever comes later is told, and not shown it
    assert again.step.options == (1, 3) and "step-000002.parquet is not whole" in again.message.value


def test_a_long_run_is_opened_without_a_look_into_its_old_tables(run):
    for s in range(4, 15): (run.dir / "groups" / f"step-{s:06d}.parquet").write_bytes(b"")
    assert LoggedRun(run.dir).steps == [1, 2, 3, 4, 5, 6]               # the last eight are checked


# ---- following ----

def test_what_is_whole(tmp_path):
    data = (make(tmp_path / "r", steps=(1,)) / "groups" / "step-000001.parquet").read_bytes()
    for n in (0, 3, 4, 8, 12, len(data) // 2, len(data) - 1, len(data)):
        (tmp_path / "x").write_bytes(data[:n])
        assert is_whole(tmp_path / "x") == (n == len(data))
    (tmp_path / "x").write_bytes(data[:4] + data[-8:])                    # an end without its middle
    assert not is_whole(tmp_path / "x")
    (tmp_path / "x").write_bytes(data + bytes(100))                      # room that was set aside, not yet filled
    assert not is_whole(tmp_path / "x") and not is_whole(tmp_path / "gone")


def test_refresh_takes_up_what_is_whole_and_rereads_nothing(run, monkeypatch):
    import unify_rl.inspect.groups as groups
    seen, read = [], groups.read_rows
    monkeypatch.setattr(groups, "read_rows", lambda folder, step, *columns: seen.append(step) or read(folder, step, *columns))
    overview(run), run.rows(3), run.rows(2)
    log = RunLog(run.dir, resume=True)
    log.log_groups(4, rows_of(2), [picture(1)] * 4)
    four = run.dir / "groups" / "step-000004.parquet"
    data = four.read_bytes()
    seen.clear()
    for part, new in (data[:900], 0), (data[:-2], 0), (data, 1), (data, 0):
        four.write_bytes(part)
        assert run.refresh() == new and overview(run)[-1]["step"] == 3 + (part == data)
        assert (4 in run.problems) == (part != data)
    assert set(seen) == {4}
    log.log_groups(3, rows_of(1))                                          # written again, and somebody looks at it
    assert run.refresh() == 1 and run.refresh() == 0 and run.rows(3)[0]["raw_tidy"] == .2
    log.truncate(2)
    assert run.refresh() == 0 and run.steps == [1, 2]
    log.log_groups(3, rows_of(2))
    assert run.refresh() == 1 and not run.facts(3)[0]["dead"]


def test_following_keeps_what_was_chosen(run):
    shown = Inspector(run.dir)
    log = RunLog(run.dir, resume=True)
    shown.step.value = 2
    shown.prompt.value, shown.weights["tidy"].value, shown.at.value = (2, 1), 2.0, 2
    seen = shown.view.value
    log.log_groups(4, rows_of(2) + rows_of(2, 1))
    assert shown.tick() and shown.step.options == (1, 2, 3, 4) and "4 steps, 1 new" in shown.news.value
    assert (shown.step.value, shown.prompt.value, shown.at.value, shown.view.value) == (2, (2, 1), 2, seen)
    shown.step.value = 4
    assert (shown.prompt.value, shown.at.value, shown.weights["tidy"].value) == ((4, 1), 2, 2.0)
    log.log_groups(5, rows_of(1, 7) + rows_of(1, 9, "p1"))                # the same prompt stands elsewhere
    shown.tick()
    assert shown.step.value == 5 and shown.prompt.value == (5, 9) and shown.weights["tidy"].value == 2.0
    log.truncate(2)                                                         # the step that is shown is gone
    shown.tick()
    assert shown.step.options == (1, 2) and shown.step.value == 2
    (run.dir / "summary.json").write_text("{}")
    assert not shown.tick() and "The run has ended" in shown.news.value
    log.log_groups(3, rows_of(3))                                           # no: it was resumed
    assert shown.tick() and shown.step.value == 3


def test_following_by_a_task_and_its_end(run, tmp_path):
    import asyncio
    import shutil

    async def until(true):
        for _ in range(1000):
            if true(): return True
            await asyncio.sleep(.005)

    async def go():
        shown = Inspector(run.dir, every=.005)
        shown.follow.value = True
        log = RunLog(run.dir, resume=True)
        log.log_groups(4, rows_of(2))
        assert await until(lambda: shown.step.value == 4) and "step 4" in shown.view.value
        task = shown.task_of_follow
        shown.follow.value = False
        await asyncio.sleep(.02)
        assert task.cancelled() and shown.task_of_follow is None
        log.log_groups(5, rows_of(2))
        await asyncio.sleep(.03)
        assert shown.step.value == 4                                       # nobody looks
        shown.follow.value = True
        assert await until(lambda: shown.step.value == 5)
        task = shown.task_of_follow
        shown.box.close()
        await asyncio.sleep(.02)
        assert task.cancelled() and not shown.follow.value
        other = Inspector(run.dir, every=.005)
        other.follow.value = True
        shutil.rmtree(run.dir)
        assert await until(lambda: not other.follow.value) and "no run folder" in other.news.value
    asyncio.run(go())


def test_without_an_event_loop_nothing_is_followed(run):
    shown = Inspector(run.dir)
    shown.follow.value = True
    assert "look again" in shown.news.value and shown.task_of_follow is None


def test_a_run_without_pictures_and_one_without_groups(tmp_path):
    bare = LoggedRun(make(tmp_path / "bare", pictures=False))
    view = group_view(bare, bare.group(2, 0), layer="detector boxes", at=1)
    assert "<img" not in view and "says 0.5" in view
    empty = RunLog(tmp_path / "empty").dir
    shown = Inspector(empty)
    assert "No groups have been logged yet" in shown.message.value
    RunLog(empty, resume=True).log_groups(7, rows_of(2), [picture(0)] * 4)
    shown.refresh.click()
    assert shown.step.value == 7 and "two red squares" in shown.view.value and shown.message.value == ""
    with pytest.raises(UserError, match="no run folder"): Inspector(tmp_path / "nowhere")


def test_a_missing_picture_is_said(run):
    (run.dir / run.group(1, 0)[0]["image"]).unlink()
    (run.dir / run.group(1, 0)[1]["image"]).write_bytes(b"\x89PNG broken")
    assert group_view(run, run.group(1, 0)).count("picture cannot be read") == 2
    assert "cannot be shown" in group_view(run, run.group(1, 0), layer="detector boxes")


def test_an_older_run_opens(tmp_path):
    "No lists, no phrases, no reasons, no config: what is there is shown, and what can be computed is."
    import pyarrow.parquet as pq
    folder = make(tmp_path / "old", config=False)
    for path in (folder / "groups").glob("*.parquet"):
        t = pq.read_table(path)
        pq.write_table(t.drop_columns([c for c in t.column_names if c.startswith(("logp_", "ratio_", "reason_", "frames", "tokens", "phrases", "dead", "weight"))
                                       and not c.startswith("weighted_")]), path)
    run = LoggedRun(folder)
    rows = run.group(2, 0)
    assert rows[0]["tokens"] is None and moments(rows[0]) == 0
    s = logged_settings(run, rows)
    assert s.weights == LAMBDA                                                     # from weighted over raw
    assert recompute(rows, s).adv == pytest.approx([r["advantage"] for r in rows])
    assert Inspector(folder).view.value.count("<img") == 8 - 4 and run.facts(3)[0]["dead"]


def test_a_run_from_before_rewards_were_logged_one_by_one(tmp_path):
    log = RunLog(tmp_path / "r")
    log.log_groups(1, [{k: v for k, v in r.items() if not k.startswith(("raw_", "weighted_", "reason_"))} for r in rows_of(2)])
    run = LoggedRun(log.dir)
    view = group_view(run, run.group(1, 0), Settings(eps=1.0))
    assert "did not log its rewards one by one" in view and "1.100" in view


@pytest.mark.parametrize("text", ["just words", "a: [", ""])
def test_a_broken_config_is_no_obstacle(run, text):
    (run.dir / "config.yaml").write_text(text)
    assert logged_settings(run, run.group(2, 0)).weights == LAMBDA


# ---- recomputing ----

def test_recompute_is_the_trainers_function(run):
    rows = run.group(2, 0)
    for s in (Settings(LAMBDA), Settings(dict(constraints=.3, tidy=2.0), normalize="each", eps=1e-4), Settings(LAMBDA, baseline="leave_one_out", scale="none", pair=.5)):
        want = advantages(torch.tensor([RAW[2][n] for n in LAMBDA]), torch.tensor([s.weights[n] for n in LAMBDA]), 4, None, torch.full((4,), s.pair or 1.0), s.normalize, s.baseline, s.scale, s.eps)
        got = recompute(rows, s)
        assert got.adv == pytest.approx(want.adv_B.tolist()) and got.reward == pytest.approx(want.reward_B.tolist())
    assert recompute(rows, Settings(LAMBDA)).flips == []


def test_recompute_keeps_what_does_not_apply_apart_from_what_failed(run):
    rows = run.group(1, 0)
    got = recompute(rows, Settings(LAMBDA))
    assert got.valid == [True, True, False, True] and got.adv[2] == 0 and got.rank[2] == 3
    unfailed = recompute(rows, Settings(dict(constraints=1.0, tidy=0.0)))            # weight 0 only observes
    assert all(unfailed.valid) and [f[0] for f in unfailed.flips if f[0] == 2] == [2]
    spared = recompute([r | dict(raw_tidy=None if r["sample"] == 2 else r["raw_tidy"]) for r in rows], Settings(LAMBDA))
    assert all(spared.valid) and spared.reward[2] == .75                              # null: it does not apply; NaN: it failed
    other = [r | dict(raw_accuracy=None) for r in rows]
    assert reward_names(other) == ["constraints", "tidy"] and recompute(other, Settings(LAMBDA | dict(accuracy=9.0))).adv == got.adv


def test_clipping_by_the_range_and_by_the_side():
    row = dict(ratio_image=[1.0, 1.3, 1.0, .7], ratio_text=None)
    assert clipped(row, 1.0, Settings()) == (.5, .25) and clipped(row, -1.0, Settings()) == (.5, .25)
    assert clipped(row, 1.0, Settings(clip_high=.4)) == (.25, 0) and clipped(row, 0.0, Settings()) == (.5, 0) and clipped({}, 1.0, Settings()) is None


# ---- views ----

def test_evil_texts_stay_texts(run):
    evil = '"><script>alert(1)</script>'
    keys = ("prompt", "prompt_id", "task", "category", "answer", "text", "reason_tidy")
    rows = [r | dict.fromkeys(keys, evil) | dict(tokens=[evil, evil, "x"], logp_text=[-.1] * 3) for r in run.group(2, 0)]
    for view in (group_view(run, rows), strip(run, rows), twin(run, rows, run, 3)): assert "<script" not in view


def test_tokens_show_what_was_unlikely_and_what_is_blank():
    row = dict(tokens=["two", "red", "<e>", "<e>", "<e>", "<e>"], logp_text=[-.1, -4, 0, 0, 0, 0], ratio_text=[1, 1.5, 1, 1, 1, 1], order_text=[1, 0, 2, 2, 2, 2])
    shown = tokens_html(row, Settings())
    assert shown.count("&lt;e&gt;") == 1 and "×4" in shown and 'class="cut"' in shown and "rgba(214,60,50,1.00)" in shown
    early = tokens_html(row, Settings(), at=1)
    assert "red" in early and "two" not in early and early.count("▢") == 2 and moments(row) == 3


def test_a_flow_shows_its_frames_and_steps(tmp_path):
    log = RunLog(tmp_path / "r")
    flow = dict(time_image=[.9, .8], std_image=[.5, .4], logp_image=[-.7, -.6], ratio_image=[1.0, 1.0])
    log.log_groups(1, [r | flow for r in rows_of(2)], [picture(0)] * 4, [None] * 4, [np.zeros((24, 72, 3), np.uint8)] * 4)
    run = LoggedRun(log.dir)
    rows = run.group(1, 0)
    end, middle = group_view(run, rows), group_view(run, rows, at=1)
    assert 'class="frame"' not in end and middle.count('class="frame"') == 4 and "50.000% 0/300% 100%" in middle and 'class="now"' in middle
    assert moments(rows[0]) == 2 and layers_for(run, rows, "order")[0] == [None] * 4


def bare(html): return re.sub(r' title="[^"]*"', "", html)


def flowing(folder, **more):
    log = RunLog(folder)
    flow = dict(order_path=[0, 1, 2, 3], time_path=[1., .9, .8, .4], std_path=[0., .5, .4, 0.], logp_path=[math.nan, -.7, -.6, math.nan],
                time_image=[.9, .8], std_image=[.5, .4], logp_image=[-.7, -.6], ratio_image=[1.0, 1.25]) | more
    rows = [{k: v for k, v in (r | flow).items() if v is not None} for r in rows_of(2)]
    log.log_groups(1, rows, [picture(0)] * 4, [None] * 4, [np.zeros((24, 24 * 4, 3), np.uint8)] * 4)
    return LoggedRun(log.dir)


def test_a_flow_shows_all_of_its_steps(tmp_path):
    run = flowing(tmp_path / "r")
    rows = run.group(1, 0)
    assert [moments(r) for r in rows] == [4] * 4
    for at in range(4): assert group_view(run, rows, at=at).count(f"{at / 3 * 100:.3f}% 0/400% 100%") == 4
    assert 'class="frame"' not in group_view(run, rows, at=4)
    table = bare(path_html(rows[0], 2))
    assert "<tr class=\"now\"><td>3</td><td>0.80</td><td>0.400</td><td>-0.60</td><td>1.250</td></tr>" in table
    assert "<tr><td>4</td><td>0.40</td><td>0.000</td><td>–</td><td>–</td></tr>" in table
    assert "2 with noise" in group_view(run, rows) and "draws" not in group_view(run, rows)
    shown = Inspector(run.dir)
    shown.at.value = 1
    assert shown.at.max == 4 and shown.view.value.count('class="frame"') == 4


def test_an_ode_says_that_its_steps_have_no_log_probability(tmp_path):
    run = flowing(tmp_path / "r", std_path=[0.] * 4, logp_path=[math.nan] * 4, std_image=None, time_image=[.7, .2])
    view = bare(group_view(run, run.group(1, 0), at=0))
    assert view.count('class="frame"') == 4 and "no step has a log-prob" in view and "<th>−loss</th>" in view and "log p<" not in view
    assert "<tr class=\"now\"><td>1</td><td>1.00</td><td>0.000</td></tr>" in view


def test_a_film_strip_follows_a_prompt_or_its_category(run):
    assert [f["step"] for f in follow(run, run.group(1, 0)[0])[0]] == [1, 2, 3] and "3 steps of this prompt" in strip(run, run.group(1, 0))
    facts, what = follow(run, run.group(1, 1)[0])
    assert len(facts) == 3 and "came once" in what
    assert "2 of them shown" in strip(run, run.group(1, 0), most=2)


def test_twins_in_two_runs(run, tmp_path):
    other = LoggedRun(make(tmp_path / "other", steps=(2,)))
    both = twin(run, run.group(1, 0), other, 2)
    assert both.count('class="side"') == 2 and "other, step 2" in both
    assert "It is there in step 1" in twin(run, run.group(1, 1), run, 2) or "logged in no other step" in twin(run, run.group(1, 1), run, 2)


def test_a_twin_keeps_its_own_settings(run, tmp_path):
    other = make(tmp_path / "other", steps=(2,))
    known = yaml.safe_load((other / "config.yaml").read_text())
    known["rewards"][1]["weight"] = 0.1
    (other / "config.yaml").write_text(yaml.safe_dump(known))
    rows, other = run.group(2, 0), LoggedRun(other)
    ours, theirs = logged_settings(run, rows), logged_settings(other, other.group(2, 0))
    assert carried_over(ours, ours, theirs) == theirs
    moved = carried_over(Settings(dict(constraints=2.0, tidy=.5), eps=.1), ours, theirs)
    assert moved.weights == dict(constraints=2.0, tidy=.1) and moved.eps == .1
    both = twin(run, rows, other, 2, ours)
    assert "λ 0.5" in both and "λ 0.1" in both


def test_detector_grounding_match_and_captions(tmp_path):
    "The models are asked once a picture; a caption that was logged is not asked for again."
    from unify_rl.world.scenes import Thing, render
    log = RunLog(tmp_path / "r")
    log.log_groups(1, [r | dict(prompt="a red circle") for r in rows_of(2)], [render((Thing("circle", "red", 4 * i, 8),)) for i in range(4)])
    run = LoggedRun(log.dir)
    rows = run.group(1, 0)
    shown, _ = layers_for(run, rows, "detector boxes")
    assert all("red circle" in x for x in shown)
    shown, said = layers_for(run, rows, "grounding")
    assert "red circle" in said and len(run.maps) == 4
    words, maps = model_maps(run, rows[2], "grounding")
    assert maps[0].argmax() % maps.shape[2] >= maps.shape[2] // 3                       # the third circle stands in the middle
    shown, said = layers_for(run, rows, "text-image match", which=1)
    assert "'red'" in said and all("<rect" in x for x in shown)
    assert all("circle" in c for c in captions_of(run, rows))
    assert captions_of(run, [r | dict(reason_cycle="perceptual 0.1; caption 'a dog': spice-like 0.2") for r in rows]) == ["a dog"] * 4


# ---- widgets ----

def test_moving_widgets(run):
    shown = Inspector(run.dir)
    assert shown.step.value == 3 and "Dead" in shown.view.value
    shown.step.value = 2
    assert "Changes sides" not in shown.view.value and shown.settings == Settings(LAMBDA)
    shown.weights["tidy"].value = 2.0
    assert "sample 0 (+ → −)" in shown.view.value and shown.view.value.index("sample 3</small>") < shown.view.value.index("sample 0</small>")
    shown.reset.click()
    assert shown.settings == Settings(LAMBDA) and "Changes sides" not in shown.view.value
    shown.eps.value = 10.0
    assert "was" in shown.view.value and "Changes sides" not in shown.view.value
    shown.pair.value = 2.0
    assert "2.000" in shown.view.value and shown.settings.pair == 2.0
    shown.reset.click()
    shown.scale.value = "none"
    assert shown.settings.scale == "none"
    shown.baseline.value, shown.scale.value = "none", "std"
    assert "scale must be &#x27;none&#x27; too" in shown.view.value
    shown.reset.click()
    before = shown.view.value
    shown.clip_high.value = 0.4
    assert "50.0%" in before and "25.0%" in shown.view.value
    shown.clip_low.value = shown.clip_high.value = 1.0
    assert shown.settings.clip_low == shown.settings.clip_high == math.inf and "25.0%" not in shown.view.value


def test_the_pair_weight_goes_with_its_group(tmp_path):
    log = RunLog(tmp_path / "r")
    log.log_groups(1, rows_of(2) + [r | dict(weight=4.5, advantage=4.5 * r["advantage"]) for r in rows_of(2, 1)])
    shown = Inspector(log.dir)
    shown.prompt.value = (1, 1)
    assert shown.pair.value == 4.5 and shown.settings.pair is None and "pair weight 4.500" in shown.view.value and " was " not in shown.view.value
    shown.pair.value = 2.0                                                 # moved by hand: it stays
    shown.prompt.value = (1, 0)
    assert shown.settings.pair == 2.0 and "pair weight 2.000" in shown.view.value
    shown.reset.click()
    assert shown.settings.pair is None


def test_sorting_by_one_reward(run):
    shown = Inspector(run.dir)
    shown.scope.value = "all steps"
    assert shown.sort.options[-2:] == ("constraints", "tidy")
    shown.sort.value, shown.down.value = "tidy", True
    assert [v[0] for _, v in shown.prompt.options] == [1, 1, 2, 2, 3, 3]      # means .6, .525, .5
    shown.low.value = ".51"
    assert {v[0] for _, v in shown.prompt.options} == {1, 2}


def test_another_run_is_opened_once(run, tmp_path, monkeypatch):
    import unify_rl.inspect.panel as panel
    make(tmp_path / "other", steps=(2,))
    opened, real = [], panel.LoggedRun
    monkeypatch.setattr(panel, "LoggedRun", lambda folder: opened.append(folder) or real(folder))
    shown = Inspector(run.dir)
    shown.step.value, shown.mode.value = 2, "compare"
    shown.other_step.value, shown.other.value = 2, "../other"
    assert shown.view.value.count('class="side"') == 2
    shown.weights["tidy"].value = 2.0
    assert shown.view.value.count("Changes sides") == 2 and len(opened) == 2
    RunLog(tmp_path / "other", resume=True).log_groups(9, rows_of(2))
    shown.other_step.value = 9                                              # it goes on, too
    assert shown.view.value.count('class="side"') == 2 and "other, step 9" in shown.view.value


def test_choosing_with_widgets(run):
    shown = Inspector(run.dir)
    shown.scope.value, shown.only.value = "all steps", "live"
    assert [v for _, v in shown.prompt.options] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    shown.sort.value, shown.down.value = "reward", True
    assert shown.prompt.options[0][1] == (2, 0)
    shown.low.value = ".81"
    assert [v for _, v in shown.prompt.options] == [(2, 0), (2, 1)]
    shown.high.value = "much"
    assert "'much' is not a number" in shown.message.value.replace("&#x27;", "'")
    shown.low.value = shown.high.value = ""
    shown.text.value = "only/2"
    assert [v for _, v in shown.prompt.options] == [(2, 1)] and "squares 1" in shown.view.value
    shown.text.value, shown.only.value, shown.scope.value = "", "all", "this step"
    shown.mode.value = "film strip"
    assert "table class=\"strip\"" in shown.view.value
    shown.mode.value, shown.other_step.value = "compare", 1
    assert shown.view.value.count('class="side"') == 2 or "no group of this prompt" in shown.view.value
    shown.other.value = "nowhere"
    assert "there is no run folder" in shown.view.value
    shown.mode.value, shown.layer.value = "group", "log-probability"
    assert "<rect" in shown.view.value
    shown.layer.value, shown.at.value = "nothing", 2
    assert shown.at.max == 4 and 'class="layer cover"' in shown.view.value and shown.view.value.count("<rect x") == 4 * 2


def test_a_long_list_is_cut(run):
    shown = Inspector(run.dir, most=2)
    shown.scope.value = "all steps"
    assert len(shown.prompt.options) == 2 and "first 2 of 6 groups" in shown.message.value


# ---- files ----

def test_a_page_without_scripts(run):
    page = write_groups(run.dir, run.dir / "page.html").read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "") and page.count('class="side"') == 6 and 'href="#g0"' in page
    with pytest.raises(UserError, match="no groups that can be shown"): write_groups(RunLog(run.dir.parent / "none").dir)


def test_a_notebook_that_runs(run):
    book = json.loads(write_notebook(run.dir).read_text())
    assert book["cells"][1]["source"] == CELL and all(c["id"] for c in book["cells"])
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    done = nbclient.NotebookClient(nbformat.read(run.dir / "inspect.ipynb", 4), timeout=120, resources=dict(metadata=dict(path=str(run.dir)))).execute()
    assert any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in done.cells[1].outputs)


def test_the_lab_is_started_on_the_notebook(run, monkeypatch):
    seen = []
    monkeypatch.setattr(subprocess, "call", lambda command: seen.append(command) or 0)
    assert open_lab(run.dir, ["--no-browser"]) == 0
    assert seen[0][1:3] == ["-m", "jupyterlab"] and seen[0][-2:] == [str(run.dir / "inspect.ipynb"), "--no-browser"]


def test_looking_needs_no_training_code(run):
    code = """import sys
from unify_rl.inspect.panel import Inspector
shown = Inspector(sys.argv[1])
assert "two red squares" in shown.view.value
heavy = ("transformers", "accelerate", "deepspeed", "diffusers", "peft", "torch", "pandas", "matplotlib")
print([m for m in sys.modules if m in heavy or m.startswith(("unify_rl.train.", "unify_rl.policies", "unify_rl.rewards")) and m != "unify_rl.train.runlog"])
shown.step.value = 2; shown.weights["tidy"].value = 2.0
assert "Changes sides" in shown.view.value
print([m for m in sys.modules if m in heavy and m not in ("torch",) or m.startswith(("unify_rl.train.", "unify_rl.policies", "unify_rl.rewards")) and m != "unify_rl.train.runlog"])
"""
    done = subprocess.run([sys.executable, "-c", code, str(run.dir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_only_what_is_asked_for_is_read(run, monkeypatch):
    import unify_rl.inspect.groups as groups
    seen, read = [], groups.read_rows
    monkeypatch.setattr(groups, "read_rows", lambda folder, step, *columns: seen.append(step) or read(folder, step, *columns))
    shown = Inspector(run.dir)
    assert set(seen) == {3}
    shown.weights["tidy"].value = 2.0
    shown.step.value = 2
    assert set(seen) == {2, 3} and len(seen) == 4                       # the list of groups, and the group, of each
