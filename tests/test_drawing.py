"""The policy's own settings of drawing: from the configuration to `sample`, in training and in tests."""
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import unify_rl.run as R
from unify_rl.core import UserError
from unify_rl.data.stream import PromptStream
from unify_rl.evaluate.suites import evaluate, load_suite
from unify_rl.policies.bagel import BagelPolicy, new_bagel
from unify_rl.policies.base import Policy
from unify_rl.policies.janus import new_janus
from unify_rl.rewards.verifiable import per_sample
from unify_rl.run import train
from unify_rl.train.config import Config, from_dict
from unify_rl.train.loop import Trainer
from unify_rl.train.pretrain import vocabulary
from unify_rl.train.runlog import RunLog, read_rows
from unify_rl.world.prompts import draw_prompts, edit_prompts
from unify_rl.world.questions import question_prompts

redness = per_sample("redness", lambda prompt, text, image: float(image[..., 0].mean()) / 255, tasks=("generate", "edit"))
wordy = per_sample("wordy", lambda prompt, text, image: float(len(text)), tasks=("answer",))
PROMPTS = [*draw_prompts("train", 4), *question_prompts("train", 4), *edit_prompts("train", 4)]


def bagel():
    policy = new_bagel(vocabulary(), hidden=32, layers=1)
    torch.manual_seed(0); torch.nn.init.normal_(policy.net.llm2vae.weight, std=0.1)
    return policy


@pytest.fixture
def calls(monkeypatch):
    "Every call of BAGEL's `sample`: its keywords."
    seen, real = [], BagelPolicy.sample
    def spy(self, *args, **kw): seen.append(kw); return real(self, *args, **kw)
    monkeypatch.setattr(BagelPolicy, "sample", spy)
    return seen


def trainer(folder, drawing, **over):
    cfg = from_dict(Config, dict(recipe="x", steps=2, rollout=dict(prompts=3, group_size=2, max_text=4, drawing=drawing)) | over)
    stream = PromptStream(PROMPTS, dict(generate=1.0, answer=1.0, edit=1.0))
    return Trainer(cfg, bagel(), stream, [redness, wordy], torch.ones(2, dtype=torch.float64), RunLog(folder))


@pytest.mark.parametrize("drawing, actions", [(dict(estimator="sde", steps=4, window=3), 3), (dict(estimator="forward", steps=3, draws=5), 5)])
def test_the_trainer_hands_them_on(tmp_path, calls, monkeypatch, drawing, actions):
    t, widths = trainer(tmp_path/"a", drawing), []
    update = t._update
    monkeypatch.setattr(t, "_update", lambda rollout, adv: [widths.extend(p.actions.shape[1] for p in rollout.parts if p.kind == "image"), update(rollout, adv)][1])
    before = [p.clone() for p in t.engine.trained.values()]
    m = t.step()
    assert {k: calls[0][k] for k in drawing} == drawing and widths and set(widths) == {actions}
    assert any(not torch.equal(a, b) for a, b in zip(before, t.engine.trained.values()))
    assert abs(m["objective/ratio_mean"] - 1) < 1e-4 and m["samples/failed"] == 0


@pytest.mark.parametrize("drawing", [dict(estimator="forward", steps=3), dict(estimator="sde", steps=4, window=2)])
def test_the_log_shows_how_its_pictures_came_about_and_nobody_watches_otherwise(tmp_path, monkeypatch, drawing):
    watched, real = [], BagelPolicy.sample
    monkeypatch.setattr(BagelPolicy, "sample", lambda self, *a, **kw: watched.append(self.watch[0]) or real(self, *a, **kw))
    t = trainer(tmp_path/"a", drawing, log=dict(groups_every=2, groups_max=2))
    for _ in range(4): t.step()
    assert [len(w) for w in watched] == [4, 4, 0, 4] and t.policy.watch == ((), 0)             # the first step, and every second; two groups of two
    rows, S = [r for s in (1, 2, 4) for r in read_rows(t.log.dir, s) if r["image"]], drawing["steps"]
    assert rows and all(r["order_path"] == list(range(S)) and r["time_path"][0] == 1 for r in rows)
    for r in rows:
        with Image.open(t.log.dir/r["frames"]) as im: assert im.size == (24 * S, 24)
        noisy = [k for k, x in enumerate(r["std_path"]) if x > 0]
        assert [not np.isnan(x) for x in r["logp_path"]] == [k in noisy for k in range(S)]
        assert [r["logp_path"][k] for k in noisy] == (r["logp_image"] if noisy else []) and len(noisy) == drawing.get("window", 0)


def test_portions_are_judged_far_away_while_the_next_is_drawn_and_change_nothing(tmp_path, monkeypatch):
    from dataclasses import replace
    events, threads = [], []
    def judge(prompts_B, rollout):
        events.append(("judged", len(rollout))); threads.append(threading.current_thread())
        return redness.judge(prompts_B, rollout)
    real = BagelPolicy.sample
    def sample(self, prompts, *args, **kw):
        if len(events): time.sleep(0.2)                                     # a slow portion: the one before is judged by then
        events.append(("drawn", len(prompts))); return real(self, prompts, *args, **kw)
    monkeypatch.setattr(BagelPolicy, "sample", sample)
    found = []
    for portions in (1, 2, 3):
        t = trainer(tmp_path/str(portions), dict(estimator="sde", steps=4, window=2), rollout=dict(prompts=3, group_size=2, max_text=4, portions=portions,
                    drawing=dict(estimator="sde", steps=4, window=2)), log=dict(groups_every=1))
        t.rewards[0] = replace(redness, judge=judge, remote=True)
        events.clear(); threads.clear()
        m = t.step()
        assert [n for what, n in events if what == "drawn"] == [-(-3 // portions)] * (3 // -(-3 // portions)) + [3 % -(-3 // portions)] * (3 % -(-3 // portions) > 0)
        last = max(i for i, (what, _) in enumerate(events) if what == "drawn")
        if portions == 3: assert any(what == "judged" for what, _ in events[:last])      # one of the first two has a picture
        assert all(th is not threading.main_thread() for th in threads)
        rows = read_rows(tmp_path/str(portions), 1)
        found.append(({k: v for k, v in m.items() if not k.startswith("seconds")}, [(r["prompt_id"], r["sample"], r["raw_redness"] if r["task"] != "answer" else None, r["text"], r["advantage"], len(r["order_path"] or ())) for r in rows]))
    for m, rows in found[1:]:
        assert rows == found[0][1] and m.keys() == found[0][0].keys()
        assert all(abs(v - found[0][0][k]) < 1e-5 or v != v for k, v in m.items() if isinstance(v, float))


def test_two_updates_with_a_reference(tmp_path):
    "The recipe's shape: forward draws, k2 towards the reference, two updates a rollout."
    t = trainer(tmp_path/"a", dict(estimator="forward", steps=3), objective=dict(updates=2, beta=.5, kl="k2", clip_low=.05, clip_high=.05),
                optimizer=dict(lr=1e-3))
    first, second = t.step(), t.step()
    assert first["objective/kl"] >= 0 and second["objective/kl"] > 0


def test_what_sampling_does_not_record_the_first_update_does(tmp_path):
    "Two updates with log-probabilities from sampling, and without: the same step; the second update sees ratios other than 1."
    after, metrics = [], []
    for record in (True, False):
        t = trainer(tmp_path/str(record), dict(estimator="forward", steps=3), objective=dict(updates=2, clip_low=.001, clip_high=.001), optimizer=dict(lr=1e-2))
        real = t._update
        def update(rollout, adv):
            for p in rollout.parts:
                if record and p.logp_old is None: p.logp_old = t.policy(p).detach()
            return real(rollout, adv)
        t._update = update
        metrics.append(t.step()); after.append(torch.cat([p.detach().flatten() for p in t.engine.trained.values()]))
    assert torch.allclose(*after, atol=1e-5) and metrics[1]["objective/ratio_mean"] != 1 and metrics[1]["objective/clip_fraction"] > 0
    assert abs(metrics[0]["objective/clip_fraction"] - metrics[1]["objective/clip_fraction"]) < 1e-3


def test_each_kind_of_action_has_its_own_kl(tmp_path):
    "A weight for pictures alone changes the step, keeps no reference log-probability of text, and equals `beta` where they agree."
    drawing, kl = dict(estimator="forward", steps=3), dict(updates=2, kl="k2")
    def after(name, **o):
        t = trainer(tmp_path/name, drawing, objective=kl | o, optimizer=dict(lr=1e-3))
        t.step(); t.step()
        return torch.cat([p.detach().flatten() for p in t.engine.trained.values()])
    both, apart = after("a", beta=3.0), after("b", beta=0.0, betas=dict(text=3.0, image=3.0))
    assert torch.equal(both, apart)
    assert not torch.equal(after("c", beta=0.0), after("d", beta=0.0, betas=dict(image=3.0)))
    t = trainer(tmp_path/"e", drawing, objective=kl | dict(beta=0.0, betas=dict(image=3.0)))
    parts, real = [], t._update
    t._update = lambda rollout, adv: [parts.extend(rollout.parts), real(rollout, adv)][1]
    t.step()
    assert {p.kind: p.logp_ref is not None for p in parts} == dict(image=True, text=False)


@pytest.mark.parametrize("drawing", [dict(estimator="forward", same_start=True), dict(estimator="none", same_start=True)])
def test_one_start_without_stochastic_steps_is_refused(drawing):
    "All pictures of a group would be equal, and no advantage left: said before a run starts."
    with pytest.raises(UserError, match="same_start without stochastic steps"): bagel().check_drawing(drawing)


def test_a_subspace_of_other_pictures_or_of_crooked_directions_is_refused(tmp_path):
    from unify_rl.policies.bagel import save_subspace
    save_subspace(tmp_path/"small", torch.eye(4)); save_subspace(tmp_path/"crooked", torch.ones(2, 288))
    with pytest.raises(UserError, match="directions of 4 numbers, but these pictures have 9 x 32"):
        trainer(tmp_path/"a", dict(estimator="sde", subspace=str(tmp_path/"small"))).step()
    with pytest.raises(UserError, match="not orthonormal"): bagel().check_drawing(dict(estimator="sde", subspace=str(tmp_path/"crooked")))


def test_a_subspace_that_was_found_anew_is_read_anew(tmp_path):
    import os
    from unify_rl.policies.bagel import read_subspace, save_subspace
    file = tmp_path/"file.safetensors"
    for n, time_ns in ((2, 10**18), (3, 2 * 10**18)):
        save_subspace(file, torch.eye(5)[:n]); os.utime(file, ns=(time_ns, time_ns))
        assert len(read_subspace(str(file))) == n


def test_a_reward_that_learns_is_refused_in_several_processes(tmp_path, monkeypatch):
    from unify_rl.train import engine
    from unify_rl.rewards.verifiable import Reward
    learner = type("Learner", (), {"learn": lambda *a: {}, "state_dict": dict, "load_state_dict": lambda *a: None})()
    monkeypatch.setattr(engine.Engine, "_prepare", lambda self, optimizer: setattr(self, "ranks", 2))
    cfg = from_dict(Config, dict(recipe="x", steps=1, rollout=dict(prompts=2, group_size=2, drawing=dict(estimator="forward", steps=2))))
    mine = Reward("mine", redness.judge, ("generate",), learner=learner)
    with pytest.raises(UserError, match="'mine' learns, and would learn something else in each process"):
        Trainer(cfg, bagel(), PromptStream(PROMPTS, dict(generate=1.0)), [mine], torch.ones(1, dtype=torch.float64), RunLog(tmp_path/"a"))


def test_training_without_actions_is_refused(tmp_path):
    with pytest.raises(UserError, match="kept no actions.*'estimator': 'none'"): trainer(tmp_path/"a", dict(estimator="none")).step()


def test_a_test_draws_without_noise_in_its_steps(calls):
    policy, suite = bagel(), load_suite("shapes-geneval", 6)
    policy.drawing = policy._with(dict(steps=2))
    evaluate(policy, suite)
    assert calls[-1]["estimator"] == "none"
    res = evaluate(policy, suite, drawing=dict(steps=3, shift=1.0))
    assert res.settings["drawing"] == dict(estimator="none", steps=3, shift=1.0)
    assert {k: calls[-1][k] for k in ("estimator", "steps", "shift")} == res.settings["drawing"]


def test_policies_without_settings_are_asked_as_before():
    class Plain(Policy):
        tasks = ("answer",)
        def sample(self, prompts, group_size, generator=None, **kw): assert set(kw) == {"temperature", "cfg", "max_text"}; raise StopIteration
    policy = Plain(); policy.one = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(StopIteration): evaluate(policy, load_suite("shapes-qa", 6))


@pytest.mark.parametrize("drawing, message", [
    (dict(stepz=3), "unknown setting 'stepz' of drawing. Did you mean 'steps'"),
    (dict(estimator="sed"), "Did you mean 'sde'"),
    (dict(steps="many"), "drawing.steps is 'many'; it must be of type int"),
    (dict(think=1), "drawing.think is 1; it must be of type bool"),
    (dict(steps=0), "0 sampling steps"),
    (dict(steps=3, window=5), "a window of 5 steps does not fit"),
    (dict(subspace="tiny-bagel", estimator="forward"), "estimator forward has none"),
    (dict(subspace="nowhere"), "there is no file nowhere. Make one: unify_rl subspace POLICY --out FILE"),
    (dict(subspace=__file__), "holds no directions"),
])
def test_mistakes_are_found_before_any_work(drawing, message):
    with pytest.raises(UserError, match=message): bagel().check_drawing(drawing)


@pytest.mark.parametrize("section", ["rollout", "evaluate"])
def test_a_run_refuses_them_before_its_folder_is_made(tmp_path, section):
    new_janus(vocabulary(), layers=1, hidden=32).save_pretrained(tmp_path/"tiny")
    with pytest.raises(UserError, match="tiny: unknown setting 'steps' of drawing. Known: \\(none\\)"):
        train("grpo", tmp_path/"tiny", run_dir=tmp_path/"run", progress=False, overrides=[f"{section}.drawing.steps=3"])
    assert not (tmp_path/"run").exists()
