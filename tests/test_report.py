"The report: safe, complete, and not stopped by a damaged part."
import base64
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from unify_rl.core import UserError
from unify_rl.inspect.report import (curves, embed, figure, pick_groups, samples_section, smooth, summary_table, svg, tag, thin,
                                     verdict, write_report)
from unify_rl.train.runlog import RunLog, read_groups, write_summary

EVIL = """<script>alert(1)</script><img src=x onerror="alert(2)">"'&"""
SUMMARY = {"recipe": "grpo", "policy": "tiny-janus", "seed": 3, "steps": 4, "seconds": 12.0, "suites": {"shapes-geneval": {
    "overall": {"before": .3, "after": .6, "ci95": [.25, .35], "n": 720},
    "categories": {"counting": {"before": .4, "after": .3, "ci95": [-.2, -.01], "n": 120}}}}}
VOID = {"meta", "img", "br"}

class Page(HTMLParser):
    "Checks that tags are balanced; collects elements, attributes and visible text."
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attrs, self.text, self.classes = [], [], [], [], []
        self.feed(text), self.close()
        assert self.open == []
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag), self.attrs.extend(attrs)
        if tag not in VOID: self.open.append(tag)
    def handle_startendtag(self, tag, attrs): self.tags.append(tag), self.attrs.extend(attrs)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)
    def values(self, name): return [v for k, v in self.attrs if k == name]
    def __contains__(self, text): return text in "".join(self.text)

def picture(seed, size=(8, 8)): return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)

def row(p=0, s=0, **kw):
    return dict(prompt_index=p, sample=s, prompt_id=f"x/{p}", task="generate", category="counting", prompt="two circles",
                reward=.5, group_mean=.25, group_std=.1, advantage=1.25, weight=1.0, valid=True, dead=False,
                raw_strict=.5, weighted_strict=.25, reason_strict="one circle") | kw

def make_run(path, steps=4, summary=True):
    log = RunLog(path)
    (path/"config.yaml").write_text("recipe: grpo\npolicy: tiny-janus\nseed: 3\nsteps: 4\n")
    for t in range(1, steps + 1):
        log.log(t, {"reward/total": t/10, "reward/strict": .1*t, "objective/kl": .01*t, "objective/clip_fraction": 0.,
                    "groups/dead": .5, "lr": 1e-3,
                    "seconds/sample": 1., "seconds/update": 2., "notes": ["judge: timed out"] if t > 2 else []})
    rows = [row(p, s) for p in range(2) for s in range(2)]
    log.log_groups(1, rows, [picture(i) for i in range(4)])
    log.log_groups(4, rows, [picture(i) for i in range(4)])
    for name in ("before", "after"):
        log.log_samples(name, [dict(prompt_id="x/1", prompt="two circles", caption=f"{name} caption")], [picture(9)])
    if summary: write_summary(path, SUMMARY)
    return log

def report(path): return Page(write_report(path).read_text(encoding="utf-8"))


# -- contents ------------------------------------------------------------------------------------------------------

def test_a_finished_run(tmp_path):
    make_run(tmp_path)
    assert write_report(tmp_path) == tmp_path/"report.html"
    page = report(tmp_path)
    for text in ("grpo · tiny-janus · seed 3", "4 steps in 12 seconds", "shapes-geneval", "+0.300", "+0.250 … +0.350", "up",
                 "counting", "-0.100", "down", "720", "reward parts", "strict", "KL to the reference", "share of clipped actions",
                 "share of dead groups", "seconds by phase", "learning rate", "judge: timed out (in 2 steps)", "before caption",
                 "after caption", "step 1", "step 4", "one circle", "advantage +1.250", "mean 0.250", "policy: tiny-janus"):
        assert text in page, text
    assert page.tags.count("img") == 2*4 + 2 and page.tags.count("svg") == 6
    assert page.tags.count("details") == 2

def test_every_embedded_picture_is_the_picture(tmp_path):
    from PIL import Image
    make_run(tmp_path)
    log = RunLog(tmp_path, resume=True)
    log.log_groups(4, [row(0, 0)], [picture(77)], [picture(78)])
    data = [v for v in report(tmp_path).values("src")]
    got = [np.asarray(Image.open(io.BytesIO(base64.b64decode(v.partition(",")[2])))) for v in data]
    for want in (picture(77), picture(78)): assert any(np.array_equal(g, want) for g in got)

def test_a_large_picture_is_scaled_down(tmp_path):
    from PIL import Image
    RunLog(tmp_path).log_samples("before", [{}], [picture(0, (900, 600))])
    src = re.search(r"data:image/jpeg;base64,([^\"]+)", embed(tmp_path, "eval/before/000.png"))[1]
    assert Image.open(io.BytesIO(base64.b64decode(src))).size == (171, 256) and len(src) < 60_000

def test_a_run_that_is_being_written(tmp_path):
    make_run(tmp_path, summary=False)
    with open(tmp_path/"metrics.jsonl", "a") as f: f.write('{"step": 5, "rew')
    (tmp_path/"groups"/".tmp-step-000005").mkdir()
    page = report(tmp_path)
    assert "Step 4 of 4. The run has not finished" in page and "Before and after" not in page and "reward parts" in page

def test_a_run_that_has_only_just_begun(tmp_path):
    RunLog(tmp_path/"fresh")
    page = report(tmp_path/"fresh")
    assert "fresh" in page and "has not finished" in page and "svg" not in page.tags and "h2" not in page.tags

def test_one_step_and_missing_measurements(tmp_path):
    log = RunLog(tmp_path)
    log.log(1, {"reward/a": math.nan, "reward/b": 1.0, "text": "x"})
    assert "svg" in report(tmp_path).tags
    log.log(2, {"reward/c": 2.0, "kl": math.inf})
    assert "svg" in report(tmp_path).tags

def test_a_run_without_pictures(tmp_path):
    log = RunLog(tmp_path)
    log.log_groups(1, [row(0, 0, task="answer", text="<answer>3</answer>", answer="3", category=None)])
    log.log_samples("before", [dict(prompt_id=1, prompt="how many?", text="3")])
    page = report(tmp_path)
    assert "img" not in page.tags and "<answer>3</answer>" in page and "right answer: 3" in page and "how many?" in page

def test_a_failed_scorer_and_a_dead_group_are_shown_as_such(tmp_path):
    log = RunLog(tmp_path)
    log.log_groups(1, [row(0, 0, valid=False, raw_strict=math.nan, reward=math.nan, advantage=0., reason_strict="timed out"),
                       row(0, 1, dead=True, raw_strict=None, reason_strict=None, raw_format=1., weighted_format=.1,
                           reason_format="ok")])
    page = report(tmp_path)
    for text in ("masked: a scorer failed", "timed out", "format"): assert text in page
    assert "nan" not in page

def test_samples_are_paired_by_prompt_and_gaps_are_left_open(tmp_path):
    log = RunLog(tmp_path)
    log.log_samples("before", [dict(prompt_id=i, prompt=f"p{i}", caption=f"b{i}") for i in (0, 1)])
    log.log_samples("after", [dict(prompt_id=i, prompt=f"p{i}", caption=f"a{i}") for i in (1, 2)])
    pairs = re.findall(r'<div class="pair">(.*?)</div>', samples_section(tmp_path))
    assert [re.sub("<.*?>", " ", p).split() for p in pairs] == [
        ["p0", "before:", "b0", "after"], ["p1", "before:", "b1", "after:", "a1"], ["p2", "before", "after:", "a2"]]

def test_groups_picked_are_live_and_of_every_task(tmp_path):
    log = RunLog(tmp_path)
    tasks = [("generate", True), ("generate", False), ("generate", False), ("answer", False), ("edit", True)]
    log.log_groups(1, [row(p, 0, task=t, dead=d) for p, (t, d) in enumerate(tasks)])
    assert [int(g.prompt_index.iloc[0]) for g in pick_groups(read_groups(tmp_path, 1), 4)] == [1, 3, 2, 4]

@pytest.mark.parametrize("ci,want", [([.01, .2], "up"), ([-.2, -.01], "down"), ([0, .2], "unclear"), ([-.1, .1], "unclear"),
                                     (None, "unclear"), ([None, None], "unclear")])
def test_verdict(ci, want): assert verdict(ci) == want

def test_a_summary_with_gaps():
    table = summary_table({"suites": {"s": {"overall": {"before": None, "after": .5, "ci95": [None, None], "n": 0}}, "t": {}}})
    assert Page(table).tags.count("tr") == 3 and "nan" not in table and "–" in table


# -- safety --------------------------------------------------------------------------------------------------------

def test_every_text_of_a_run_is_escaped(tmp_path):
    path = tmp_path/"a<b>&"
    log = RunLog(path)
    (path/"config.yaml").write_text(f"recipe: {json.dumps(EVIL)}\npolicy: {json.dumps(EVIL)}\n# {EVIL}\n")
    log.log(1, {f"reward/{EVIL}": 1.0, f"reward/b{EVIL}": 1.0, EVIL: 2.0, "notes": [EVIL], f"seconds/{EVIL}": 1.0})
    log.log_groups(1, [row(0, 0, prompt=EVIL, text=EVIL, answer=EVIL, category=EVIL, task=EVIL, reason_strict=EVIL)
                       | {f"raw_{EVIL}": 1.0, f"weighted_{EVIL}": 1.0, f"reason_{EVIL}": EVIL}])
    log.log_samples("before", [dict(prompt=EVIL, text=EVIL, caption=EVIL)])
    suites = {EVIL: {"overall": {"n": EVIL}, "categories": {EVIL: {}}}}
    write_summary(path, SUMMARY | {"recipe": EVIL, "seed": EVIL, "suites": suites})
    text = write_report(path).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags and not page.values("onerror") and "<script" not in text
    assert EVIL in page and "".join(page.text).count(EVIL) >= 15

def test_nothing_is_loaded_from_outside_and_scripts_are_forbidden(tmp_path):
    make_run(tmp_path)
    page, text = report(tmp_path), (tmp_path/"report.html").read_text(encoding="utf-8")
    policy = page.values("content")
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for value in page.values("src") + page.values("href") + page.values("xlink:href"):
        assert value.startswith(("data:image/", "#")), value
    assert {u for u in re.findall(r"https?://[^\s\"<]+", text)} <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text and not [k for k, _ in page.attrs if k.startswith("on")]

def test_a_picture_outside_the_run_folder_is_not_shown(tmp_path):
    from PIL import Image
    Image.fromarray(picture(5)).save(tmp_path/"secret.png")
    log = RunLog(tmp_path/"run")
    log.log_samples("before", [dict(prompt="p", caption="c")], [picture(1)])
    for path in ("../secret.png", str(tmp_path/"secret.png")):
        f = tmp_path/"run"/"eval"/"before"/"samples.json"
        f.write_text(json.dumps([{"prompt": "p", "image": path}]))
        page = report(tmp_path/"run")
        assert "img" not in page.tags and "picture cannot be read" in page


# -- faults --------------------------------------------------------------------------------------------------------

HARMS = [lambda f: f.write_bytes(f.read_bytes()[:40]), lambda f: f.write_bytes(b""), lambda f: f.write_text("no"),
         lambda f: f.unlink(), lambda f: (f.unlink(), f.mkdir())]

@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_picture_costs_only_itself(harm, tmp_path):
    make_run(tmp_path)
    harm(tmp_path/"groups"/"step-000004"/"00-00.png")
    page = report(tmp_path)
    assert "".join(page.text).count("picture cannot be read") == 1 and page.tags.count("img") == 9

def test_a_picture_bomb_is_not_opened(tmp_path, monkeypatch):
    from PIL import Image
    make_run(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    page = report(tmp_path)
    assert "img" not in page.tags and "picture cannot be read" in page

def test_no_single_damaged_byte_of_a_picture_stops_the_report(tmp_path):
    from PIL import Image
    RunLog(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(file := tmp_path/"noise.png")
    raw, seen = file.read_bytes(), set()
    for i in range(len(raw)):
        file.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i+1:])
        seen.add("picture cannot be read" in embed(tmp_path, "noise.png"))
    assert seen == {True, False}                 # some are noticed, by whatever error Pillow has for them, and none gets through

def test_a_damaged_table_costs_only_its_section(tmp_path):
    make_run(tmp_path)
    f = tmp_path/"groups"/"step-000004.parquet"
    f.write_bytes(f.read_bytes()[:50])
    page = report(tmp_path)
    assert "This part cannot be shown" in page and "step-000004.parquet cannot be read" in page and "shapes-geneval" in page

def test_a_broken_configuration_is_shown_as_it_is(tmp_path):
    make_run(tmp_path, summary=False)
    (tmp_path/"config.yaml").write_bytes(b"recipe: [grpo\n\xff")
    assert "recipe: [grpo" in report(tmp_path)

def test_no_run_folder_and_an_unwritable_one(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no run folder"): write_report(tmp_path/"missing")
    make_run(tmp_path/"run")
    (tmp_path/"run"/"report.html").mkdir()
    with pytest.raises(UserError, match="cannot write .*report.html"): write_report(tmp_path/"run")

def test_writing_twice_gives_the_same_bytes(tmp_path):
    make_run(tmp_path)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


# -- curves --------------------------------------------------------------------------------------------------------

def test_smooth_is_the_corrected_average():
    x = np.random.default_rng(0).normal(size=50)
    w = .9 ** np.arange(50)[::-1]
    assert np.isclose(smooth(x)[-1], (w*x).sum()/w.sum())
    holes = x.copy(); holes[::3] = np.nan
    assert np.allclose(smooth(holes)[~np.isnan(holes)], smooth(x[~np.isnan(holes)])) and np.isnan(smooth(holes)[0])
    assert np.isnan(smooth(np.full(3, np.nan))).all()

def test_a_long_run_gives_a_small_figure():
    steps = np.arange(20_000)
    s, v = thin(steps, np.where(steps < 10_000, np.nan, steps))
    assert len(s) == len(v) == 300 and np.isnan(v[:150]).all() and np.isclose(v[-1], s[-1])
    assert len(svg(figure(steps, {"a": np.sin(steps/100), "b": np.cos(steps/100)}, "t"))) < 100_000

def test_curves_of_unknown_measurements_are_drawn():
    out = curves([{"step": t, "brand/new": t, "flag": True} for t in range(3)])
    assert "brand/new" in out and "flag" in out and Page(out).tags.count("svg") == 2

def test_dollars_are_no_formulas():
    assert "$x_{$" in svg(figure(np.arange(3), {"$x_{$": np.ones(3), "b": np.ones(3)}, "$\\broken{"))

def test_tag_escapes_unless_told():
    assert tag("p", "<", tag("b", ">"), title="'\"") == '<p title="&#x27;&quot;">&lt;<b>&gt;</b></p>'

def test_the_report_needs_no_training_code(tmp_path):
    make_run(tmp_path)
    code = (f"import sys; from unify_rl.inspect.report import write_report; write_report({str(tmp_path)!r}); "
            "print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "False False", out.stdout + out.stderr

def test_the_package_does_not_hide_the_standard_module():
    import inspect
    import unify_rl.inspect.report
    assert hasattr(inspect, "signature") and unify_rl.inspect is not inspect
