"""Rewards asked over HTTP: the same numbers as at home, nobody uninvited, and every way the other side can fail.

Servers that have to be killed run in processes of their own; the others in threads of this one.
"""
import base64
import http.client
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import fields, replace

import numpy as np
import pytest

import unify_rl.run as R
from unify_rl.core import Constraint, Prompt, Rollout, Scores, UserError, rng_for
from unify_rl.policies.janus import new_janus
from unify_rl.rewards import server as S
from unify_rl.rewards.server import FORMAT, HEADER, TOKEN, Client, Refused, RewardServer, Scorer, Unserved, pack_request, read_request, remote_reward
from unify_rl.rewards.verifiable import REWARDS, Eyes, Reward, ask_ahead, build_rewards, check_prompts, per_sample, score
from unify_rl.train.pretrain import vocabulary
from unify_rl.train.runlog import read_metrics
from unify_rl.world.detectors import detect_templates
from unify_rl.world.prompts import draw_prompts, edit_prompts, with_references
from unify_rl.world.questions import joint_prompts, question_prompts, reply
from unify_rl.world.scenes import World, random_scene, render

SECRET = "a-secret-of-some-length"
ALL = ("generate", "answer", "edit", "joint")
SPECS = [dict(name=n) for n in ("constraints", "strict", "format", "given", "semantic", "grounding", "knowledge", "cycle", "hps", "clip_score")]
SPECS += [dict(name="accuracy", settings=dict(maths=True))]


@pytest.fixture(autouse=True)
def token(monkeypatch): monkeypatch.setenv(TOKEN, SECRET)


def drawing(*names): return render(random_scene(World(), rng_for("test server", *names), n=2))


def outputs(prompts, group=2):
    "(prompts_B, rollout): a group of outputs for each prompt, pictures and texts as its task has them."
    prompts_B = [p for p in prompts for _ in range(group)]
    texts = [None if p.task in ("generate", "edit") else reply(p.meta["question"] if p.task == "joint" else p) if b % 2 else "no idea" for b, p in enumerate(prompts_B)]
    return prompts_B, Rollout(prompts_B, 1, [], texts, [None if p.task == "answer" else drawing(b) for b, p in enumerate(prompts_B)])


PROMPTS = [*with_references(draw_prompts("train", 3)), *question_prompts("train", 3), *edit_prompts("train", 3), *joint_prompts("train", 2)]
BATCH = outputs(PROMPTS)
DRAWN = outputs(PROMPTS[:3])


def serving(*rewards, **settings): return RewardServer(list(rewards), token=SECRET, **settings)


def asked_at(server, *names, **settings):
    return build_rewards([dict(name=n, settings=dict(url=server if isinstance(server, str) else server.url, **settings)) for n in names])[0]


def paying(name="paying", value=1.0, tasks=ALL): return per_sample(name, lambda prompt, text, image: (value, "as always"), tasks)


def same(a, b): return np.array_equal(a, b) if isinstance(a, np.ndarray) else type(a) is type(b) and a == b


# -- the numbers ---------------------------------------------------------------------------------------------------

def test_every_reward_gives_the_same_there_as_here():
    here, _ = build_rewards(SPECS)
    served, settings = S.load_served([dict(s, settings=s.get("settings", {})) for s in SPECS])
    with serving(*served, settings=settings) as server:
        there, _ = build_rewards([dict(s, settings=s.get("settings", {}) | dict(url=server.url)) for s in SPECS])
        check_prompts(PROMPTS, here), check_prompts(PROMPTS, there)
        a, b = score(here, *BATCH), score(there, *BATCH)
    assert np.array_equal(a.scores_RB, b.scores_RB, equal_nan=True) and a.reasons == b.reasons
    assert a.applies_RB.equal(b.applies_RB) and a.applies_RB.any(1).all() and (a.errors, a.notes) == (b.errors, b.notes)
    assert [(r.name, r.tasks) for r in here] == [(r.name, r.tasks) for r in there] and all(r.remote for r in there)
    assert {p.task for p in PROMPTS} == set(ALL) and len({v for v in a.scores_RB[~a.scores_RB.isnan()].tolist()}) > 30


def test_a_request_is_read_as_it_was_written():
    params = dict(box=(1, 2, 3.5, -0.0), deep=[(1,), [None, {"a": ()}]], n=np.int64(3), yes=True)
    odd = Prompt("ü/\ud800", "generate", "a \x00 b", "c", drawing("odd"), (Constraint("kept", params),), "?", "", (), None, ("red",), "f", "pair",
                 0.1 + 0.2, dict(secret="not sent"))
    prompts = [*PROMPTS, odd]
    prompts_B, rollout = outputs(prompts)
    rollout.texts[-1] = "line\nline\u2028 😀 \udc00"
    body, pixels = pack_request("x", prompts_B, rollout)
    name, got_B, got = read_request(body, Scorer([]).look)
    assert b"not sent" not in body and name == "x" and got.group_size == 1 and got.texts == rollout.texts
    for p, q in zip(prompts_B, got_B):
        for f in fields(Prompt):
            if f.name != "meta": assert same(getattr(p, f.name), getattr(q, f.name)), f.name
    assert all(same(a, b) for a, b in zip(got.images, rollout.images)) and got_B[0] is got_B[1]
    assert type(got_B[-1].constraints[0].params["box"]) is tuple and got_B[-1].meta == {}
    assert pixels == 24 * 24 * len(json.loads(body)["pictures"])


def test_each_picture_travels_once():
    one = with_references(draw_prompts("train", 1))[0]
    twin = replace(one, id="twin", reference=one.reference.copy())
    prompts_B = [one] * 8 + [twin] * 8
    body, _ = pack_request("x", prompts_B, Rollout(prompts_B, 1, [], [None] * 16, [drawing("same") for _ in range(16)]))
    sent = json.loads(body)
    assert len(sent["pictures"]) == 2 and len(sent["prompts"]) == 2 and len(sent["samples"]) == 16


def test_what_cannot_be_sent_is_a_failed_sample_not_a_zero():
    with serving(paying()) as server:
        t = score(asked_at(server, "paying"), DRAWN[0], replace(DRAWN[1], images=[np.zeros((4, 4), np.uint8)] * 6))
    assert t.scores_RB.isnan().all() and "a picture is [H, W, 3] uint8, not [4, 4] uint8" in t.notes[0]


def test_a_failed_sample_is_null_and_costs_no_other():
    shaky = per_sample("shaky", lambda p, t, i: 1 / 0 if i[0, 0, 0] == 7 else float("inf") if i[0, 0, 0] == 8 else 0.5, ("generate",))
    images = [np.full((4, 4, 3), v, np.uint8) for v in (7, 8, 9, 9, 9, 9)]
    with serving(shaky) as server: t = score(asked_at(server, "shaky"), DRAWN[0], replace(DRAWN[1], images=images))
    assert t.scores_RB[0].isnan().tolist() == [True, True] + [False] * 4 and t.errors == {"shaky": 2} and "ZeroDivisionError" in t.reasons[0][0]


def test_rewards_of_one_server_never_work_at_once():
    "They may share a detector, a referee, a GPU."
    inside, most = [], []
    def judge(prompts_B, rollout):
        inside.append(1); time.sleep(0.05); most.append(len(inside)); inside.pop()
        return Scores(np.ones(len(rollout)), [""] * len(rollout))
    with serving(Reward("a", judge, ALL), Reward("b", judge, ALL)) as server:
        t = score(asked_at(server, "a", "b"), *DRAWN)
    assert t.scores_RB.tolist() == [[1.0] * 6] * 2 and most == [1, 1]


def test_rewards_of_one_server_share_a_look():
    "The second request about the same pictures brings the same arrays, so that a detector with a memory looks once."
    looks = []
    def look(images, world): looks.append(len(images)); return detect_templates(images, world)
    eyes = Eyes(look)
    with serving(*(REWARDS[n](eyes) for n in ("constraints", "strict"))) as server:
        t = score(asked_at(server, "constraints", "strict"), *DRAWN)
    assert looks == [6] and t.errors == {}


def test_a_reward_that_covers_some_prompts_covers_them_from_afar_too():
    picky = replace(paying("picky"), covers=lambda p: p.category == "counting", check=lambda p: None)
    prompts = [replace(PROMPTS[0], id=f"p/{i}", category=c) for i, c in enumerate(("counting", "colors"))]
    with serving(picky) as server:
        far, = asked_at(server, "picky")
        check_prompts(prompts, [far])
        asked = server.requests
        assert score([far], *outputs(prompts)).applies_RB.tolist() == [[True, True, False, False]] and server.requests == asked + 1
        assert far.covers(replace(prompts[0], id="a new one"))                            # asked for when it is met
        with pytest.raises(UserError, match="nothing to say about any of the 1 prompts"): check_prompts(prompts[1:], [far])


def test_prompts_are_checked_afar_without_their_pictures(tmp_path):
    from PIL import Image
    from unify_rl.data.readers import Picture
    from unify_rl.data.stream import load_prompts
    Image.fromarray(drawing("file")).save(tmp_path/"a.png")
    (tmp_path/"train.jsonl").write_text(json.dumps(dict(id="mine/3", task="generate", text="a red circle", reference="a.png")) + "\n")
    p, = load_prompts("jsonl", "train", ("generate",), str(tmp_path))
    (tmp_path/"a.png").unlink()                                                            # so that looking at it would fail
    assert isinstance(vars(p)["reference"], Picture)
    served, settings = S.load_served([dict(name="cycle", settings=dict(textual=0)), dict(name="strict", settings={})])
    with serving(*served, settings=settings) as server:
        check_prompts([p], asked_at(server, "cycle"))
        with pytest.raises(UserError, match="prompt 'mine/3' has no constraints.*says the reward server"): check_prompts([p], asked_at(server, "strict"))
        with pytest.raises(UserError, match="no real picture"): check_prompts([replace(PROMPTS[0], reference=None)], asked_at(server, "cycle"))


def test_a_users_mistake_ends_the_run_from_afar_as_at_home():
    def mistaken(prompts_B, rollout): raise UserError("pictures of this size cannot be read")
    reward = Reward("mistaken", mistaken, ALL)
    with serving(reward) as server:
        for r in (reward, *asked_at(server, "mistaken")):
            with pytest.raises(UserError, match="pictures of this size cannot be read"): score([r], *DRAWN)


# -- who may ask ---------------------------------------------------------------------------------------------------

def speak(server, method, path, body=None, **headers):
    "(status, text, headers) of a plain request; a header given as None is left out."
    conn = http.client.HTTPConnection("127.0.0.1", server.http.server_address[1], timeout=10)
    all_ = {"Authorization": f"Bearer {SECRET}", HEADER: FORMAT} | {k.replace("_", "-"): v for k, v in headers.items()}
    conn.request(method, path, body, {k: v for k, v in all_.items() if v is not None})
    got = conn.getresponse()
    out = got.status, got.read().decode(), dict(got.headers)
    conn.close()
    return out


@pytest.mark.parametrize("shown", [None, "", "Bearer", "Bearer ", "Bearer x", f"bearer {SECRET}", SECRET, f"Bearer {SECRET[:-1]}", f"Basic {SECRET}", "Bearer \xe9\xff"])
def test_without_the_token_nothing_is_answered(shown):
    scored = []
    with serving(per_sample("spy", lambda *a: scored.append(1) or 1.0)) as server:
        for method, path, body in (("GET", "/health", None), ("POST", "/score", pack_request("spy", *DRAWN)[0]), ("POST", "/check", b"{}")):
            status, text, _ = speak(server, method, path, body, Authorization=shown)
            assert (status, json.loads(text)) == (401, dict(error="the token is missing or wrong")) and not scored


def test_the_page_is_open_and_tells_no_secret():
    with serving(paying("<b>bold</b>"), device="cuda:1") as server:
        status, text, headers = speak(server, "GET", "/", Authorization=None, Unify_RL_Rewards=None)
    assert status == 200 and "&lt;b&gt;bold&lt;/b&gt;" in text and "<b>" not in text and "cuda:1" in text and SECRET not in text
    assert headers["Content-Type"].startswith("text/html")


def test_health_counts():
    with serving(paying(), device="cuda:1", settings=dict(paying=dict(form="x"))) as server:
        far, = asked_at(server, "paying")
        far(*DRAWN)
        with pytest.raises(UserError): asked_at(server, "missing")
        speak(server, "POST", "/score", b"{")
        h = json.loads(speak(server, "GET", "/health")[1])
    assert (h["requests"], h["errors"], h["device"], h["format"]) == (4, 1, "cuda:1", FORMAT) and h["seconds"] >= 0 and "not a request" in h["last_error"]
    assert h["rewards"]["paying"] == dict(tasks=list(ALL), cost="cheap", checks=False, covers=False, settings=dict(form="x"))


def test_who_only_looks_need_not_name_the_format():
    with serving(paying()) as server:
        body = pack_request("paying", *DRAWN)[0]
        assert speak(server, "GET", "/health", Unify_RL_Rewards=None)[0] == 200
        for method, path, sent, format in (("GET", "/health", None, "0"), ("POST", "/score", body, None), ("POST", "/check", b"{}", None), ("POST", "/score", body, "2")):
            status, text, _ = speak(server, method, path, sent, Unify_RL_Rewards=format)
            assert status == 400 and "speaks format 1" in text, (method, path, format)


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o620, True)])
def test_a_token_file_that_others_may_read_is_warned_of(mode, warned, tmp_path, capsys):
    (file := tmp_path/"to ken").write_text(SECRET)
    file.chmod(mode)
    assert S.find_token(str(file)) == SECRET
    said = capsys.readouterr().err
    assert (f"chmod 600 '{file}'" in said) == warned and SECRET not in said and (warned or not said)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.168.0.1", "example.org", "::"])
def test_other_machines_come_in_only_if_a_token_was_chosen(host, monkeypatch):
    monkeypatch.delenv(TOKEN)
    with pytest.raises(UserError, match="needs a token of your choosing"): RewardServer([paying()], host)
    with pytest.raises(UserError, match="needs a token of your choosing"): S.serve_rewards(["strict"], host=host)


def test_by_default_only_this_machine_comes_in(monkeypatch):
    monkeypatch.delenv(TOKEN)
    with RewardServer([paying()]) as server:
        assert server.http.server_address[0] == "127.0.0.1" and len(server.token) >= 32
        with pytest.raises(UserError, match=f"Set {TOKEN} to the token"): asked_at(server, "paying")
        monkeypatch.setenv("MINE", server.token)
        assert asked_at(server, "paying", token_env="MINE")[0](*DRAWN).values.tolist() == [1.0] * 6
    with RewardServer([paying()]) as another: assert another.token != server.token
    with RewardServer([paying()], "0.0.0.0", token=SECRET) as wide: assert wide.http.server_address[0] == "0.0.0.0"


def test_token_files(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN)
    (tmp_path/"token").write_text(f"{SECRET}\n")
    (tmp_path/"empty").write_text("\n")
    (tmp_path/"lines").write_text(f"{SECRET}\n{SECRET}\n")
    with serving(paying()) as server:
        asked_at(server, "paying", token_file=str(tmp_path/"token"))
        for name, words in (("none", "cannot be read"), ("empty", "is empty"), ("lines", "lines is not one line of plain")):
            with pytest.raises(UserError, match=words): asked_at(server, "paying", token_file=str(tmp_path/name))


@pytest.mark.parametrize("token", ["short", "with a space in it, long", "ümläute-in-a-long-token", "line\nbreak-in-a-long-token"])
def test_bad_tokens(token):
    with pytest.raises(UserError, match="at least 16 plain"): RewardServer([paying()], token=token)


# -- what may be asked ---------------------------------------------------------------------------------------------

def test_limits_of_bytes_and_pixels():
    scorer = dict(max_body=4000, max_pixels=24 * 24, max_all=24 * 24 * 3)
    with serving(paying(), **scorer) as server:
        send = lambda body, **h: speak(server, "POST", "/score", body, **h)[:2]
        assert send(bytes(4001)) == (413, '{"error": "a request of 4001 bytes; the limit is 4000"}')
        assert send(None, Content_Length="99999999999") == (413, '{"error": "a request of 99999999999 bytes; the limit is 4000"}')
        assert send(None, Content_Length="-1")[0] == send(None, Content_Length="1e3")[0] == send(iter([b"{}"]), Transfer_Encoding="chunked")[0] == 411
        plain = [replace(p, reference=None) for p in DRAWN[0]]
        batch = lambda *images: pack_request("paying", plain[:len(images)], Rollout(plain[:len(images)], 1, [], [None] * len(images), list(images)))[0]
        assert send(batch(np.zeros((24, 24, 3), np.uint8)))[0] == 200
        assert send(batch(np.zeros((24, 25, 3), np.uint8))) == (413, '{"error": "a picture of 25x24 pixels; the limit is 576"}')
        assert send(batch(*(np.full((24, 24, 3), i, np.uint8) for i in range(4)))) == (413, '{"error": "the pictures of a request have more than 1728 pixels in all"}')
        assert send(batch(*(np.full((24, 24, 3), 0, np.uint8) for i in range(4))))[0] == 200                # one picture
        assert send(batch(np.zeros((24, 24, 3), np.uint8)))[0] == 200                                        # it lives on


def test_more_than_fits_is_sent_in_parts():
    "Halves, and halves of halves, with the same numbers."
    here, _ = build_rewards([dict(name="constraints")])
    whole = pack_request("constraints", *DRAWN)
    for limit in (dict(max_body=len(whole[0]) // 2), dict(max_all=24 * 24 * 3)):
        with serving(*here, **limit) as server:
            far, = asked_at(server, "constraints")
            t = score([far], *DRAWN)
            assert t.scores_RB.equal(score(here, *DRAWN).scores_RB) and t.reasons == score(here, *DRAWN).reasons and server.requests > 3 and server.errors == 0
    with serving(*here, max_body=300) as server:
        assert "one sample takes" in score(asked_at(server, "constraints"), *DRAWN).notes[0] and server.errors == 0


class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path):
    loaded = pickle.dumps(Bomb(tmp_path/"made"))
    out = io.BytesIO()
    np.savez(out, pictures=np.array([Bomb(tmp_path/"made")], dtype=object))
    with serving(paying()) as server:
        for body in (loaded, out.getvalue()):
            for path in ("/score", "/check"): assert speak(server, "POST", path, body)[0] == 400
    with misbehaving(answer(loaded.decode("latin-1"))) as url:
        with pytest.raises(Unserved, match="not JSON"): Client(url, SECRET).ask("/score", b"{}", 0)
    assert not (tmp_path/"made").exists()
    pickle.loads(loaded); assert (tmp_path/"made").exists()                               # it would have gone off


BROKEN = [b"", b"null", b"[]", b"3", b'"text"', b"{}", b"[" * 100_000, b'{"reward": "paying", "prompts": [], "samples": [], "pictures": []}',
          b"\xff\xfe", b"{" + b'"a":' * 3000]

@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_a_body_that_makes_no_sense_is_refused(body):
    with serving(paying()) as server:
        assert speak(server, "POST", "/score", body)[0] == 400 and speak(server, "POST", "/check", body if body[:10] != b'{"reward":' else b"{")[0] == 400
        assert asked_at(server, "paying")[0](*DRAWN).values.tolist() == [1.0] * 6


def test_a_png_that_is_none_and_one_that_is_gray():
    from PIL import Image
    def png(mode, kind="PNG"): out = io.BytesIO(); Image.new(mode, (24, 24)).save(out, kind); return base64.b64encode(out.getvalue()).decode()
    asked = json.loads(pack_request("paying", *DRAWN)[0])
    with serving(paying()) as server:
        for bad, words in ((png("L"), "mode L, not RGB"), (png("RGBA"), "mode RGBA"), (png("RGB", "GIF"), "no PNG"), (png("RGB")[:40], "no PNG"),
                           ("****", "not a request"), (5, "not a request")):
            status, text, _ = speak(server, "POST", "/score", json.dumps(asked | dict(pictures=[bad] * len(asked["pictures"]))))
            assert status == 400 and words in text


def test_rewards_that_belong_beside_the_policy_are_not_served():
    learner = build_rewards([dict(name="semantic", settings=dict(learn=1e-4))])[0]
    for rewards, words in ((build_rewards([dict(name="tim")])[0], "looks through the policy"), (learner, "learns as the policy")):
        with pytest.raises(UserError, match=words): serving(*rewards)


# -- before a run --------------------------------------------------------------------------------------------------

def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


@pytest.mark.parametrize("settings, words", [
    (dict(url="http://127.0.0.1:9/x y"), "cannot be asked"), (dict(url="127.0.0.1:8000"), "is not the address"), (dict(url="ftp://a"), "is not the address"),
    (dict(url="http://"), "is not the address"), (dict(url="http://a:port"), "is not the address"), (dict(url=5), "is not the address"),
    (dict(timeout=0), "timeout is 0"), (dict(timeout="5"), "timeout is '5'"), (dict(retries=-1), "retries is -1"), (dict(retries=1.5), "retries is 1.5"),
    (dict(timout=3), "Did you mean 'timeout'"),
    (dict(form="dense"), "form='dense', but the server .* has form='global'"), (dict(reward="hue"), "no reward 'hue'. Did you mean 'hues'"),
    (dict(model="x"), "has no setting 'model'")])
def test_what_cannot_work_is_said_before_a_run(settings, words):
    with serving(paying("hues"), settings=dict(hues=dict(form="global"))) as server:
        asked_at(server, "hues", form="global", device="cuda:9")                           # the device is the server's business
        assert asked_at(server, "other", reward="hues")[0].name == "other"
        with pytest.raises(UserError, match=words): build_rewards([dict(name="hues", settings=dict(url=server.url) | settings)])


def test_a_run_without_its_server_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="reward 'strict' cannot be asked at .*refused.*unify_rl serve-rewards --rewards strict"):
        R.train("grpo", run_dir=tmp_path/"r", progress=False, overrides=[f"rewards.strict.settings.url=http://127.0.0.1:{closed_port()}"])
    assert not (tmp_path/"r").exists()


# -- a server that fails in the middle -----------------------------------------------------------------------------

def answer(body, status=200, header=f"{HEADER}: {FORMAT}", length=None):
    body = body.encode("latin-1")
    return f"HTTP/1.0 {status} X\r\n{header}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


class misbehaving:
    "A server that plays its acts, one a connection: bytes are said, a number is seconds to wait, None hangs up."
    def __init__(self, *acts): self.acts, self.played = acts, 0

    def __enter__(self):
        self.door = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.listen, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.door.getsockname()[1]}"
        return self.url

    def listen(self):
        for act in self.acts:
            try: conn = self.door.accept()[0]
            except OSError: return
            self.played += 1
            threading.Thread(target=self.play, args=(conn, act), daemon=True).start()
        self.door.close()

    def play(self, conn, act):
        with conn, conn.makefile("rb") as f:
            f.readline(); f.read(int(http.client.parse_headers(f).get("Content-Length", 0)))
            try:
                for piece in act if isinstance(act, list) else [act]:
                    if isinstance(piece, bytes): conn.sendall(piece)
                    elif piece is not None: time.sleep(piece)
            except OSError: pass

    def __exit__(self, *_): self.door.close()


ABOUT = dict(tasks=list(ALL), cost="cheap", checks=False, covers=False, settings={})
HEALTH = answer(json.dumps(dict(format=FORMAT, rewards=dict(far=ABOUT), limits=dict(body=2**20, pixels=2**20, all_pixels=2**20))))
GOOD = answer(json.dumps(dict(values=[0, 1.5, None, 1, 1, 1], reasons=list("abcdef"))))
said = lambda **k: answer(json.dumps(dict(dict(values=[1.0] * 6, reasons=[""] * 6), **k)))


def table_of(*acts, retries=2, timeout=5, on_error="mask"):
    "What `score` makes of a reward whose server plays these acts after it has introduced itself; and how often it was asked."
    server = misbehaving(HEALTH, *acts)
    with server as url:
        far = remote_reward("far", url, retries=retries, timeout=timeout)
        return score([far], *DRAWN, on_error), server.played - 1


@pytest.fixture
def no_wait(monkeypatch): monkeypatch.setattr(S.time, "sleep", lambda s: None)


WRONG = {
    "too few": (said(values=[1.0]), "it gave 1 values and 6 reasons for 6 samples"),
    "too many": (said(values=[1.0] * 7, reasons=[""] * 7), "7 values and 7 reasons for 6"),
    "no reasons": (answer('{"values": [1,1,1,1,1,1]}'), "no values and reasons"),
    "text": (said(values=["1"] * 6), "the value '1', which is neither"),
    "bool": (said(values=[True] * 6), "the value 'True'"),
    "nested": (said(values=[[1.0]] * 6), "neither a finite"),
    "NaN": (answer('{"values": [NaN,1,1,1,1,1], "reasons": ["","","","","",""]}'), "NaN is not JSON"),
    "infinity": (answer('{"values": [-Infinity,1,1,1,1,1], "reasons": ["","","","","",""]}'), "-Infinity is not JSON"),
    "1e999": (answer('{"values": [1e999,1,1,1,1,1], "reasons": ["","","","","",""]}'), "neither a finite"),
    "huge integer": (said(values=[10**400] * 6), "neither a finite"),
    "odd reason": (said(reasons=[5] * 6), "the reason '5', which is no text"),
    "a list": (answer("[1, 2]"), r"no mapping: b'\[1, 2\]'"),
    "not JSON": (answer("<html>hello</html>"), "not JSON: b'<html>hello"),
    "empty": (answer(""), "not JSON: b''"),
    "someone else": (answer("{}", header="Server: nginx"), "not as a reward server \\(status 200"),
    "another version": (answer("{}", header=f"{HEADER}: 2"), "format '2' of Unify-RL-Rewards, not 1"),
    "moved": (answer("", 302, "Location: http://example.org/"), "not as a reward server \\(status 302"),
    "token changed": (answer('{"error": "the token is missing or wrong"}', 401), "status 401: the token is missing or wrong"),
    "unknown reward": (answer('{"error": "gone"}', 404), "status 404: gone"),
    "huge": ([answer("", length=2**40), bytes(2**21)], "larger than 1048576 bytes"),
    "not HTTP, but an answer": (answer("x" * 300, header="A: b"), "not as a reward server"),
}

@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_a_failure_that_says_what_came(name, monkeypatch, no_wait):
    act, words = WRONG[name]
    monkeypatch.setattr(S, "MAX_ANSWER", 2**20)
    table, asked = table_of(act)
    assert table.scores_RB.isnan().all() and table.applies_RB.all() and table.errors == {"far": 6}
    assert re.search(words, table.notes[0]) and re.search(words, table.reasons[0][5])
    assert "http://127.0.0.1" in table.notes[0] and asked == 1                            # to ask again would not help
    with pytest.raises(UserError, match=f"failed on 6 of 6 samples: .*{words}.*set on_error=mask"): table_of(act, on_error="stop")


AGAIN = {
    "hangs up": (None, "closed|reset|disconnected|RemoteDisconnected"),
    "breaks off": (answer("{", length=99), "broke off after 1 of 99 bytes"),
    "503": (answer('{"error": "busy"}', 503), "status 503: busy"),
    "500": (answer('{"error": "reward \'far\' raised RuntimeError: out of memory"}', 500), "status 500: reward 'far' raised RuntimeError: out of memory"),
    "a proxy's 502": (answer("<html>", 502, "Server: nginx"), "not as a reward server \\(status 502"),
    "429": (answer('{"error": "slowly"}', 429), "status 429"),
    "not HTTP": (b"SSH-2.0-OpenSSH\r\n", "BadStatusLine"),
    "slow": (1.0, "no answer within 0.4 s"),
    "drips": ([answer("", length=99)] + [0.15, b" "] * 8, "no answer within 0.4 s"),
}

@pytest.mark.parametrize("name", AGAIN)
def test_a_server_that_may_recover_is_asked_again_but_not_for_ever(name, monkeypatch):
    act, words = AGAIN[name]
    monkeypatch.setattr(Client.__init__, "__defaults__", (*Client.__init__.__defaults__[:-1], 0.02))      # seconds of the first wait
    timeout = 0.4 if name in ("slow", "drips") else 5
    table, asked = table_of(act, GOOD, timeout=timeout)
    assert table.scores_RB[0].nan_to_num(-1).tolist() == [0, 1.5, -1, 1, 1, 1] and table.errors == {"far": 1} and asked == 2
    table, asked = table_of(act, act, act, timeout=timeout)
    assert table.scores_RB.isnan().all() and asked == 3 and re.search(rf"({words}).*\(asked 3 times\)", table.notes[0])


def test_waits_grow_between_attempts(monkeypatch):
    waits = []
    monkeypatch.setattr(S.time, "sleep", waits.append)
    with pytest.raises(Unserved, match=r"refused \(asked 5 times\)"): Client(f"http://127.0.0.1:{closed_port()}", retries=4).ask("/health")
    assert waits == [0.5, 1, 2, 4]


def test_a_question_asked_again_is_not_scored_again():
    work, slow = [], threading.Event()
    def judge(prompts_B, rollout): work.append(len(rollout)); slow.wait(1.0); return Scores(np.ones(len(rollout)), [""] * len(rollout))
    with serving(Reward("slow", judge, ALL)) as server:
        t = score(asked_at(server, "slow", timeout=0.6), *DRAWN)
        assert t.scores_RB.tolist() == [[1.0] * 6] and work == [6]


def test_a_scorer_that_raises_is_named_and_the_server_lives_on(no_wait):
    def odd(prompts_B, rollout): raise RuntimeError("out of memory")
    with serving(Reward("odd", odd, ALL), Reward("mute", lambda p, r: [1.0] * len(r), ALL), Reward("short", lambda p, r: Scores([1.0], [""]), ALL), paying()) as server:
        t = score(asked_at(server, "odd", "mute", "short", "paying"), *DRAWN)
        assert t.errors == dict(odd=6, mute=6, short=6) and t.scores_RB[3].tolist() == [1.0] * 6
        assert server.health()["errors"] == 12 and "raised" in server.health()["last_error"]
    for note, words in zip(t.notes, ("reward 'odd' raised RuntimeError: out of memory", "it returned list, not Scores", "1 values for 6 samples")): assert words in note


# -- at the same time ----------------------------------------------------------------------------------------------

def test_far_rewards_are_asked_while_near_ones_work():
    "Each of three waits until the other two have begun: one after another, they would wait for ever."
    meeting = threading.Barrier(3, timeout=20)
    def judge(prompts_B, rollout): meeting.wait(); return Scores(np.ones(len(rollout)), [""] * len(rollout))
    with serving(Reward("a", judge, ALL)) as one, serving(Reward("b", judge, ALL)) as two:
        t = score([*asked_at(one, "a"), Reward("near", judge, ALL), *asked_at(two, "b")], *DRAWN)
    assert t.scores_RB.tolist() == [[1.0] * 6] * 3 and t.errors == {}


def test_asked_ahead_is_asked_once():
    asked, near = [], []
    far = Reward("far", lambda p, r: asked.append(1) or Scores(np.arange(len(r)), [""] * len(r)), ALL, remote=True)
    rewards = [Reward("near", lambda p, r: near.append(1) or Scores(np.ones(len(r)), [""] * len(r)), ALL), far, replace(far, name="idle", tasks=("answer",))]
    ahead = ask_ahead(rewards, *DRAWN)
    ahead[1].result()
    assert list(ahead) == [1] and (asked, near) == ([1], [])
    t = score(rewards, *DRAWN, asked=ahead)
    assert (asked, near) == ([1], [1]) and t.scores_RB[1].tolist() == list(range(6)) and t.applies_RB.any(1).tolist() == [True, True, False]


def test_ctrl_c_does_not_wait_for_a_slow_server():
    free = threading.Event()
    def press(*_): raise KeyboardInterrupt
    far = Reward("far", lambda p, r: free.wait(60) and None, ALL, remote=True)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt): score([far, Reward("near", press, ALL)], *DRAWN)
    assert time.monotonic() - begin < 30 and all(t.daemon for t in threading.enumerate() if "_aside" in t.name)
    free.set()


# -- processes that are killed -------------------------------------------------------------------------------------

SLOW = """
    import time, os
    import numpy as np
    from unify_rl.core import Scores
    from unify_rl.rewards.server import RewardServer
    from unify_rl.rewards.verifiable import Reward, build_rewards
    calls = []
    def judge(prompts_B, rollout):
        calls.append(1)
        if len(calls) == DIE: os._exit(9)
        if len(calls) == SLEEP: print("scoring", flush=True); time.sleep(60)
        return Scores(0.5 + np.zeros(len(rollout)), ["half"] * len(rollout))
    server = RewardServer([Reward("half", judge, ("generate", "answer"))], port=PORT)
    print(server.url, flush=True)
    server.forever()
"""

class process:
    "A reward server in a process of its own: `half` pays 0.5, and dies or sleeps in its n-th call."
    def __init__(self, die=0, sleep=0, port=0): self.code = textwrap.dedent(SLOW).replace("DIE", str(die)).replace("SLEEP", str(sleep)).replace("PORT", str(port))

    def __enter__(self):
        code = self.code.replace("RewardServer([", "RewardServer(token=os.environ['" + TOKEN + "'], rewards=[")
        self.it = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        self.url = self.it.stdout.readline().strip()
        return self

    def kill(self): self.it.send_signal(signal.SIGKILL); self.it.wait()

    def __exit__(self, *_): self.kill(); self.it.stdout.close()


def test_a_server_killed_between_requests_and_back_again(monkeypatch):
    monkeypatch.setattr(Client.__init__, "__defaults__", (*Client.__init__.__defaults__[:-1], 0.02))
    with process() as p:
        far, = asked_at(p.url, "half", retries=1)
        assert score([far], *DRAWN).scores_RB.tolist() == [[0.5] * 6]
        p.kill()
        t = score([far], *DRAWN)
        assert t.scores_RB.isnan().all() and t.errors == {"half": 6} and "refused (asked 2 times)" in t.notes[0]
        with pytest.raises(UserError, match="refused .asked 2 times.*set on_error=mask"): score([far], *DRAWN, "stop")
        with process(port=p.url.rpartition(":")[2]): assert score([far], *DRAWN).scores_RB.tolist() == [[0.5] * 6]


def test_a_server_killed_within_a_request(monkeypatch):
    monkeypatch.setattr(Client.__init__, "__defaults__", (*Client.__init__.__defaults__[:-1], 0.02))
    with process(sleep=1) as p:
        far, = asked_at(p.url, "half", retries=1)
        asked = ask_ahead([far], *DRAWN)
        assert p.it.stdout.readline() == "scoring\n"
        p.kill()
        t = score([far], *DRAWN, asked=asked)
    assert t.scores_RB.isnan().all() and t.errors == {"half": 6} and "(asked 2 times)" in t.notes[0]


# -- training ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A folder with a very small policy."
    folder = tmp_path_factory.mktemp("policies")/"tiny"
    new_janus(vocabulary(), layers=1, hidden=32).save_pretrained(folder)
    return folder


@pytest.fixture
def quick_report(monkeypatch):
    def stub(run_dir): (run_dir/"report.html").write_text("stub"); return run_dir/"report.html"
    monkeypatch.setattr(R, "write_report", stub)


NAMES = ("constraints", "semantic", "accuracy", "format")

def trained(tiny, run_dir, rewards, **settings):
    run = R.train("grpo", tiny, run_dir=run_dir, progress=False, prompts=[*draw_prompts("train", 6), *question_prompts("train", 4)], steps=3, seed=1, threads=1,
                  overrides=[f"rewards={json.dumps(rewards)}"], **{"rollout.prompts": 3, "rollout.group_size": 3, "rollout.max_text": 4, "optimizer.lr": 1e-3,
                  "evaluate.suites": [], "log.groups_every": 1, "data.tasks": dict(generate=0.5, answer=0.5)} | settings)
    return run, [{k: v for k, v in m.items() if not k.startswith("seconds/")} for m in read_metrics(run.dir)]


def test_training_with_far_rewards_is_the_same_training(tiny, tmp_path, quick_report):
    rewards = [dict(name=n, weight=1.0) for n in NAMES]
    run, here = trained(tiny, tmp_path/"here", rewards)
    served, settings = S.load_served([dict(name=n, settings={}) for n in NAMES])
    with serving(*served, settings=settings) as server:
        far_run, there = trained(tiny, tmp_path/"there", [dict(r, settings=dict(url=server.url)) for r in rewards])
        assert server.requests > 3 * 3 and server.errors == 0
    assert repr(here) == repr(there) and len(here) == 3 and all(f"reward/{n}" in here[0] for n in NAMES)      # repr: NaN is NaN
    assert here[0]["objective/grad_norm"] > 0 and here[0]["groups/dead"] < 1 and run.groups(3).equals(far_run.groups(3))
    assert SECRET not in "".join(p.read_text(errors="replace") for p in (tmp_path/"there").rglob("*") if p.suffix in (".yaml", ".json", ".jsonl"))


def test_a_training_whose_server_dies_midway_ends_as_on_error_says(tiny, tmp_path, quick_report, monkeypatch):
    monkeypatch.setattr(Client.__init__, "__defaults__", (*Client.__init__.__defaults__[:-1], 0.02))
    rewards = lambda url: [dict(name="half", weight=1.0, settings=dict(url=url, retries=1))]
    with process(die=2) as p:
        run, m = trained(tiny, tmp_path/"mask", rewards(p.url))
        assert run.finished and [x["samples/failed"] for x in m] == [0, 1, 1] and m[0]["reward/half"] == 0.5 and m[1]["reward/half"] is None
        assert "notes" not in m[0] and all("reward 'half' failed on" in x["notes"][0] and "asked 2 times" in x["notes"][0] for x in m[1:])
        g = run.groups(3)
        assert not g.valid.any() and (g.advantage == 0).all() and g.raw_half.isna().all()
    with process(die=2) as p:
        with pytest.raises(UserError, match="reward 'half' failed on 9 of 9 samples.*asked 2 times.*set on_error=mask"):
            trained(tiny, tmp_path/"stop", rewards(p.url), on_error="stop", **{"checkpoint.every": 1})
        again = R.Run(tmp_path/"stop")
        assert not again.finished and len(again.metrics) == 1
        with process(port=p.url.rpartition(":")[2]):                                        # the server is back: the run goes on where it was
            done = R.train("grpo", run_dir=tmp_path/"stop", resume=True, progress=False, prompts=[*draw_prompts("train", 6), *question_prompts("train", 4)])
        assert done.finished and [x["samples/failed"] for x in read_metrics(done.dir)] == [0, 0, 0]


# -- the command ---------------------------------------------------------------------------------------------------

def test_the_command_serves_until_it_is_interrupted(tmp_path):
    (tmp_path/"mine.yaml").write_text("rewards:\n- {name: accuracy, weight: 2.0, settings: {url: 'http://a:1', timeout: 9, maths: false}}\n"
                                    "- {name: mine, settings: {url: 'http://a:1', reward: strict}}\n- {name: tim}\n")
    code = f"from unify_rl.rewards.server import serve_rewards; serve_rewards(['accuracy', 'strict'], config={str(tmp_path/'mine.yaml')!r}, port=0)"
    env = {k: v for k, v in os.environ.items() if k != TOKEN} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + code         # it may be ignored, as in a background job
    it = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    try:
        lines = [it.stdout.readline().strip() for _ in range(4)]
        url = lines[0].rpartition(" ")[2]
        assert lines[0].startswith("serving accuracy, strict (cpu) at http://127.0.0.1:")
        assert lines[2] == f"use     unify_rl train RECIPE rewards.accuracy.settings.url={url}"
        os.environ["MADE"] = re.fullmatch(rf"token   export {TOKEN}=(\S+)", lines[1])[1]
        assert asked_at(url, "accuracy", token_env="MADE", maths=False)[0].tasks == ("answer", "joint")
        with pytest.raises(UserError, match="maths=True, but the server"): asked_at(url, "accuracy", token_env="MADE", maths=True)
        it.send_signal(signal.SIGINT)
        assert it.wait(20) == 0 and "stopped after 2 requests, 0 of them errors" in it.stdout.read()
    finally: it.kill(); it.wait(); it.stdout.close(); os.environ.pop("MADE", None)


@pytest.mark.parametrize("text, names, words", [
    ("rewards: [{name: strict}]", ["strickt"], "Did you mean 'strict'"), ("rewards: {name: strict}", [], "expected a list `rewards`"),
    ("steps: 3", [], "expected a list"), ("- 3", [], "expected a list"),
    ("rewards: [{weight: 1}]", [], "expected a list"), ("a: [", [], "cannot be read"), ("rewards: []", [], "which rewards"),
    ("rewards: [{name: nobody}]", [], "unknown reward 'nobody'"),
    ("rewards: [{name: semantic, settings: {modle: x}}]", [], "no setting 'modle'")])
def test_bad_configurations_of_a_server(text, names, words, tmp_path):
    (tmp_path/"c.yaml").write_text(text)
    with pytest.raises(UserError, match=words): S.serve_rewards(names, str(tmp_path/"c.yaml"), port=0)


def test_bad_addresses_of_a_server():
    with pytest.raises(UserError, match="which rewards"): S.serve_rewards()
    with pytest.raises(UserError, match="--port is 70000"): S.serve_rewards(["strict"], port=70000)
    with serving(paying()) as server:
        with pytest.raises(UserError, match="Address already in use. Choose another --port"): S.serve_rewards(["strict"], port=server.http.server_address[1])


def test_the_device_is_given_to_rewards_that_have_one():
    assert S.load_served([dict(name="strict", settings={})], "cuda:7")[1] == {"strict": {}}
    with pytest.raises(Exception, match="(?i)device|nowhere"): S.load_served([dict(name="semantic", settings={})], "nowhere:0")
