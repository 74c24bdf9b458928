"""Pairing against Algorithm 1 by brute force, and everything that can go wrong between two data sets and a table of pairs."""
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product

import numpy as np
import pytest
import torch

import unify_rl.cli as cli
import unify_rl.data.pairs as pairs
from unify_rl.core import Prompt, UserError
from unify_rl.data.pairs import (Asking, Down, Endpoint, Failed, Log, PairSettings, ShapesRules, augment_all, build_pairs, hang, load_augmenter,
                                 load_encoder, local_model, make_pairs, neighbors, pair_weight, parse_reply, ranked_members, retrieve, scene_questions,
                                 unit, unlike)
from unify_rl.data.stream import Reading, load_prompts
from unify_rl.world.scenes import COLORS, SHAPES, Thing, World, render

WORLD = World()
QUESTION = dict(question="What is it?", choices=dict(A="one", B="two", C="three", D="four"), answer="C")
CAPTION = dict(caption="a red circle in the corner")


def half(i, task, image=None):
    "A question about a picture of one thing, or a sentence that draws it; every i another picture."
    place, color, shape = i % 25, (i // 25) % 6, (i // 150) % 4
    scene = (Thing(SHAPES[shape], list(COLORS)[color], 4 * (place % 5), 4 * (place // 5)),)
    image = render(scene, WORLD) if image is None else image
    own = dict(image=image, answer="yes") if task == "answer" else dict(reference=image)
    return Prompt(f"{task}/{i}", task, f"{task} {i}", category=SHAPES[shape], meta=dict(scene=scene), **own)


@pytest.fixture(autouse=True)
def no_figure(request, monkeypatch):
    "The figure takes longer than all the rest; one test draws it."
    if "draws" not in request.node.name: monkeypatch.setattr(pairs, "report", lambda *args: None)


@pytest.fixture(scope="module")
def sides(): return [half(3 * i, "answer") for i in range(40)], [half(3 * i + 1, "generate") for i in range(40)]


def random_features(n, d=6, seed=0): return unit(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


# ---- Algorithm 1, by brute force in plain Python and float64 ----

def brute_medoids(x, assign, center):
    best = {}
    for i in range(len(x)):
        k = int(assign[i])
        if k not in best or float(x[i].double() @ center[k].double()) > float(x[best[k]].double() @ center[k].double()): best[k] = i
    return best


def brute_retrieval(x_G, x_U, n, delta):
    "Again and again the most similar pair of free pictures of which one is among the n nearest of the other."
    s = (x_G.double() @ x_U.double().T).numpy()
    near = [set(np.argsort(-row)[:n]) for row in s]
    free_G, free_U, out = set(range(len(s))), set(range(s.shape[1])), []
    while True:
        left = [(s[g, u], g, u) for g, u in product(free_G, free_U) if u in near[g] and s[g, u] > delta]
        if not left: return out
        v, g, u = max(left)
        out.append((g, u)); free_G.remove(g); free_U.remove(u)


@pytest.mark.parametrize("n", [1, 4, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_retrieval_is_the_brute_force_one(n, seed):
    x_G, x_U = random_features(40, seed=seed), random_features(30, seed=seed + 10)
    ours = retrieve(x_G, x_U, n, 0.5)
    assert [(g, u) for g, u, _ in ours] == brute_retrieval(x_G, x_U, n, 0.5)
    assert all(s == pytest.approx(float(x_G[g] @ x_U[u]), abs=1e-6) and s > 0.5 for g, u, s in ours)


@pytest.mark.parametrize("n", [1, 4, 30])
def test_unlike_pairs_are_the_brute_force_ones(n):
    x_G, x_U = random_features(40), random_features(30, seed=10)
    ours = unlike(x_G, x_U, n)
    assert [(g, u) for g, u, _ in ours] == brute_retrieval(-x_G, x_U, n, -2)
    assert all(s == pytest.approx(float(x_G[g] @ x_U[u]), abs=1e-6) for g, u, s in ours)


def test_random_pairs_use_every_picture_of_the_smaller_side_and_know_nothing_of_likeness():
    x_G, x_U = random_features(40), random_features(30, seed=10)
    ours = pairs.at_random(x_G, x_U, 1)
    assert sorted(u for _, u, _ in ours) == list(range(30)) and len({g for g, _, _ in ours}) == 30
    assert all(s == pytest.approx(float(x_G[g] @ x_U[u]), abs=1e-6) for g, u, s in ours)
    same = lambda made: [(g, u) for g, u, _ in made]
    assert same(ours) == same(pairs.at_random(random_features(40, seed=3), random_features(30, seed=4), 1)) != same(pairs.at_random(x_G, x_U, 2))


@pytest.mark.parametrize("match", ["random", "unlike"])
@pytest.mark.parametrize("clusters", [0, 6])
def test_controls_are_whole_rows_of_weight_1_with_their_true_similarity(match, clusters, sides, tmp_path):
    done = build_pairs(*sides, tmp_path, PairSettings(clusters=clusters, match=match, neighbors=40, delta=0.99), "layout")
    rows = table(tmp_path)
    assert (done["aligned"] > 0) == (clusters > 0) and done["retrieved"] == 0 and len(rows) == done["aligned"] + done[match] > 30
    features = {p.id: unit(load_encoder("layout")([pairs.picture_of(p)]))[0] for p in (*sides[0], *sides[1])}
    for r in rows:
        assert r["weight"] == 1.0 and r["kind"] in ("aligned", match) and r["id"].startswith(r["kind"] + "/")
        assert r["similarity"] == pytest.approx(float(features[r["und_id"]] @ features[r["gen_id"]]), abs=1e-5)
    used = [d for r in rows for d in {r["und_digest"], r["gen_digest"]}]
    assert len(used) == len(set(used))


def test_medoids_are_the_brute_force_ones():
    x = random_features(150)
    assign, center = pairs.cluster(x, 11, seed=3)
    assert {int(assign[m[0]]): m[0] for m in ranked_members(x, assign, center)} == brute_medoids(x, assign, center)


def test_an_empty_cluster_has_no_medoid():
    x = random_features(5)
    assert ranked_members(x, torch.tensor([0, 0, 2, 2, 2]), random_features(3, seed=1))[0][0] in (0, 1)
    assert len(ranked_members(x, torch.tensor([0, 0, 2, 2, 2]), random_features(3, seed=1))) == 2


@pytest.mark.parametrize("block", [(1, 1), (7, 4), (1000, 3), (3, 1000)])
def test_blocks_change_nothing(block):
    x_G, x_U = random_features(20), random_features(33, seed=1)
    s, i = neighbors(x_G, x_U, 5, block)
    want = (x_G @ x_U.T).topk(5)
    assert torch.equal(i, want.indices) and torch.allclose(s, want.values)


def test_asking_for_more_neighbors_than_there_are(): assert neighbors(random_features(3), random_features(2), 10)[1].shape == (3, 2)


def test_weights_are_exact():
    assert pair_weight("aligned", 0.1) == 1.0 and pair_weight("retrieved", 0.81) == 0.9
    assert pair_weight("retrieved", 0.7) == 0.7 ** 0.5
    assert pair_weight("random", 0.1) == pair_weight("unlike", -0.2) == 1.0


def test_every_picture_once_and_every_row_complete(sides, tmp_path):
    done = build_pairs(*sides, tmp_path, PairSettings(clusters=6), "layout")
    rows = table(tmp_path)
    assert done["aligned"] and done["retrieved"] and len(rows) == done["aligned"] + done["retrieved"]
    used = [d for r in rows for d in {r["und_digest"], r["gen_digest"]}]
    assert len(used) == len(set(used))
    features = {p.id: unit(load_encoder("layout")([pairs.picture_of(p)]))[0] for p in (*sides[0], *sides[1])}
    for r in rows:
        s = float(features[r["und_id"]] @ features[r["gen_id"]])
        assert r["similarity"] == pytest.approx(s, abs=1e-5)
        assert r["weight"] == (1.0 if r["kind"] == "aligned" else r["similarity"] ** 0.5)
        assert (r["und_id"] == r["gen_id"]) == (r["kind"] == "aligned") == bool(r["written"])
        assert r["caption"] and r["question"] and r["answer"] and (tmp_path/r["gen_image"]).is_file() and (tmp_path/r["und_image"]).is_file()
    assert json.loads((tmp_path/"summary.json").read_text())["summary"] == done


def test_the_report_draws_all_kinds_and_none(sides, tmp_path):
    for name, settings in (("both", dict(clusters=6)), ("aligned", dict(clusters=6, neighbors=0)), ("retrieved", dict(clusters=0)), ("random", dict(clusters=0, match="random"))):
        build_pairs(*sides, tmp_path/name, PairSettings(**settings), "layout")
        assert (tmp_path/name/"report.png").read_bytes().startswith(b"\x89PNG")


def table(folder):
    import pyarrow.parquet as pq
    return pq.read_table(folder/"pairs.parquet").to_pylist()


def test_the_table_is_a_data_source(sides, tmp_path):
    build_pairs(*sides, tmp_path, PairSettings(clusters=6), "layout")
    rows, prompts = {r["id"]: r for r in table(tmp_path)}, load_prompts("pairs", "train", ("answer", "generate"), str(tmp_path))
    assert len(prompts) == 2 * len(rows) and len({p.id for p in prompts}) == len(prompts)
    by_id = {p.id: p for side in sides for p in side}
    for p in prompts:
        r = rows[p.pair_id]
        assert p.weight == r["weight"] and p.text == (r["caption"] if p.task == "generate" else r["question"])
        source = by_id[r["gen_id" if p.task == "generate" else "und_id"]]
        assert np.array_equal(pairs.picture_of(p), pairs.picture_of(source))
        if p.task == "generate" and r["written"] == "caption": assert p.constraints[0].kind == "total" and p.key_phrases


def test_the_same_again_whatever_the_order_of_the_generation_side(sides):
    x_G, x_U = random_features(30), random_features(30, seed=5)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert sorted((int(order[g]), u) for g, u, _ in retrieve(x_G[order], x_U, 4, 0.3)) == sorted((g, u) for g, u, _ in retrieve(x_G, x_U, 4, 0.3))


# ---- what is wrong with the pictures ----

def test_unreadable_and_duplicate_pictures_are_counted_and_named(sides, tmp_path):
    class Gone(Prompt):
        def __getattribute__(self, name):
            if name == "image": raise UserError("row 7, x.png: damaged")
            return super().__getattribute__(name)
    und = sides[0] + [half(0, "answer"), replace(half(999, "answer"), id="empty", image=None), Gone("gone", "answer", "what?", answer="x")]
    twice = replace(half(0, "generate"), id="elsewhere", reference=half(0, "answer").image)       # the same picture on the other side
    done = build_pairs(und, sides[1] + [twice], tmp_path, PairSettings(clusters=6), "layout")
    left_out = json.loads((tmp_path/"summary.json").read_text())["left_out"]
    assert (done["unreadable"], done["duplicates"]) == (2, 2)
    assert left_out["unreadable"] == ["empty: it has no picture", "row 7, x.png: damaged"]
    assert left_out["duplicates"] == [f"{i}: the same picture as answer/0" for i in ("answer/0", "elsewhere")]


def test_a_picture_that_breaks_the_encoder_is_left_out(sides):
    encode = lambda images: torch.stack([torch.full((3,), float("nan") if im.std() == 0 else 1.0) for im in images])
    blank = replace(half(1, "answer"), id="blank", image=np.full((24, 24, 3), 255, np.uint8))
    seen = hang([*sides[0][:3], blank], encode)
    assert len(seen.prompts) == 3 and seen.skipped == ["blank: the encoder gives no finite numbers"]


@pytest.mark.parametrize("und, gen, side", [(0, 5, "understanding"), (5, 0, "generation"), (0, 0, "understanding")])
def test_an_empty_side_is_named(und, gen, side, sides, tmp_path):
    with pytest.raises(UserError, match=f"no {side} picture"): build_pairs(sides[0][:und], sides[1][:gen], tmp_path, encoder="layout")


def test_a_side_that_cannot_be_read_says_why(sides, tmp_path):
    with pytest.raises(UserError, match="no understanding picture to pair. The first problem: empty: it has no picture"):
        build_pairs([replace(half(1, "answer"), id="empty", image=None)], sides[1], tmp_path, encoder="layout")


def test_a_delta_too_high_names_the_highest_similarity(sides, tmp_path):
    gallery = hang([*sides[0], *sides[1]], load_encoder("layout"))
    asks = gallery.asks_N
    top = float((gallery.x_ND[~asks] @ gallery.x_ND[asks].T).max())
    with pytest.raises(UserError, match=rf"delta = 0.9999: the highest similarity of all is {top:.4f}"):
        build_pairs(*sides, tmp_path, PairSettings(clusters=0, delta=0.9999), "layout")
    assert not (tmp_path/"pairs.parquet").exists()


def test_medoids_that_use_a_whole_side_leave_none_to_retrieve(sides, tmp_path):
    reply = lambda image, request: json.dumps(CAPTION if "caption" in request else QUESTION)
    with pytest.raises(UserError, match="no .* picture is left to match.*clusters"):
        build_pairs(sides[0][:3], sides[1][:3], tmp_path, PairSettings(clusters=6), "layout", Asking(reply, "m"))


BAD_SETTINGS = [(dict(delta=1.0), "delta is 1.0"), (dict(delta=-0.1), "delta is -0.1"), (dict(clusters=-1), "clusters is -1"), (dict(neighbors=-1), "neighbors is -1"),
                (dict(clusters=0, neighbors=0), "no pairs at all"), (dict(candidates=0), "candidates is 0"), (dict(match="randon"), "Did you mean 'random'")]

@pytest.mark.parametrize("given, said", BAD_SETTINGS)
def test_settings_that_cannot_be(given, said):
    with pytest.raises(UserError, match=said): PairSettings(**given)


def test_more_clusters_than_pictures(sides, tmp_path):
    with pytest.raises(UserError, match="1000 clusters are more than the 80 different pictures"):
        build_pairs(*sides, tmp_path, PairSettings(clusters=1000), "layout")


def test_one_kind_only(sides, tmp_path):
    assert build_pairs(*sides, tmp_path/"a", PairSettings(clusters=6, neighbors=0), "layout")["retrieved"] == 0
    assert build_pairs(*sides, tmp_path/"b", PairSettings(clusters=0), "layout")["aligned"] == 0


def test_encoders_by_name(monkeypatch):
    for name, said in (("resnet50", "kind:model"), ("timn:x", "Did you mean 'timm'"), ("timm:", "lacks a model")):
        with pytest.raises(UserError, match=said): load_encoder(name)
    def offline(*args): raise OSError("no route to host")
    monkeypatch.setitem(pairs.ENCODERS, "timm", offline)
    with pytest.raises(UserError, match="timm:resnet50 could not be loaded: OSError: no route to host"): load_encoder("timm:resnet50")


# ---- the rules ----

def test_every_question_of_a_scene_has_its_one_true_answer():
    scene = (Thing("circle", "red", 0, 0), Thing("circle", "blue", 12, 0), Thing("cross", "blue", 0, 12))
    said = {q[2]: q[3] for q in scene_questions(scene, WORLD)}
    assert said["how many blue circles are there?"] == "1" and said["is there a red cross?"] == "no" and said["what color is the cross?"] == "blue"
    assert said["what shape is the red thing?"] == "circle" and said["how many more circles than crosses are there?"] == "1"
    assert said["where is the red circle, seen from the blue circle?"] == "left of"
    assert "what color is the circle?" not in said and "what shape is the blue thing?" not in said


def test_the_rules_stay_on_their_side_of_the_split():
    from unify_rl.world.prompts import is_held_out
    for i in range(0, 60, 7):
        scene = half(i, "generate").meta["scene"]
        truth = {q[2]: (q[1], q[3]) for q in scene_questions(scene, WORLD)}
        for split in ("train", "test"):
            try: f = ShapesRules(split)(half(i, "generate"))
            except Failed: continue
            combination, answer = truth[f["question"].split("?")[0] + "?"]
            given = f["choices"]["ABCD".index(f["answer"])] if f["choices"] else f["answer"]
            assert given == answer and is_held_out(combination) == (split == "test")


def test_a_medoid_that_fails_gives_way_to_the_next_of_its_cluster(sides):
    gallery = hang([*sides[0], *sides[1]], load_encoder("layout"))
    ranked = ranked_members(gallery.x_ND, *pairs.cluster(gallery.x_ND, 4))
    firsts = {m[0] for m in ranked}
    made, failed = make_pairs(gallery, lambda places: [Failed("no") if i in firsts else CAPTION for i in places], PairSettings(clusters=4, neighbors=0))
    assert [p.und for p in made] == [m[1] for m in ranked if len(m) > 1] and len(failed) == len(firsts)


def test_no_picture_can_be_augmented(sides):
    gallery = hang([*sides[0], *sides[1]], load_encoder("layout"))
    with pytest.raises(UserError, match="no picture could be augmented.*too dark"):
        make_pairs(gallery, lambda places: [Failed("too dark") for _ in places], PairSettings(clusters=4, neighbors=0))


# ---- replies ----

def changed(**kwargs): return json.dumps(QUESTION | kwargs)

BROKEN = {
    "prose": "I think it is a cat.", "prose before": "Sure! " + changed(), "cut short": changed()[:-5], "a list": "[1]", "empty": "", "deep": "[" * 100_000,
    "a field too few": json.dumps({k: QUESTION[k] for k in ("question", "answer")}), "a field too many": changed(hint="x"), "answer E": changed(answer="E"),
    "answer in words": changed(answer="three"), "answer a number": changed(answer=3), "five options": changed(choices=QUESTION["choices"] | dict(E="five")),
    "options in a list": changed(choices=["a", "b", "c", "d"]), "an empty option": changed(choices=QUESTION["choices"] | dict(B=" ")),
    "two options alike": changed(choices=QUESTION["choices"] | dict(B="ONE")), "no question": changed(question=""), "a key twice": changed()[:-1] + ', "answer": "A"}',
    "too long": changed(question="x" * 30_000)}

@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reply_is_refused(name):
    with pytest.raises(Failed): parse_reply(BROKEN[name], "generate")


def test_good_replies():
    assert parse_reply(changed(), "generate") == dict(question="What is it?\nA. one\nB. two\nC. three\nD. four", choices=["one", "two", "three", "four"], answer="C")
    assert parse_reply("```json\n" + json.dumps(CAPTION) + "\n```", "answer") == CAPTION
    with pytest.raises(Failed): parse_reply(json.dumps(CAPTION), "generate")


def test_broken_replies_are_asked_for_again_then_counted(tmp_path):
    asked = []
    def ask(image, request): asked.append(request); return "no" if len(asked) < 3 else json.dumps(CAPTION)
    assert Asking(ask, "m")(half(0, "answer")) == CAPTION
    assert len(asked) == 3 and "could not be used" not in asked[0] and "could not be used: not one JSON object" in asked[2]
    got = augment_all([half(0, "answer")], ["d"], Asking(lambda image, request: "no", "m", tries=2), Log(tmp_path/"log"))
    assert isinstance(got[0], Failed) and "2 replies, none of use" in str(got[0])


def test_a_model_that_never_gives_json_is_stopped(tmp_path):
    many, log = [half(i, "answer") for i in range(50)], Log(tmp_path/"log")
    asked = []
    def ask(image, request): asked.append(1); return json.dumps(CAPTION) if len(asked) <= 3 else "no"
    with pytest.raises(UserError, match="20 pictures in a row.*3 augmentations are saved"):
        augment_all(many, [p.id for p in many], Asking(ask, "m", tries=1), log)
    assert len(asked) == 23 and len(Log(tmp_path/"log").done) == 3                # the row of failures is not held against the pictures


# ---- resuming ----

def test_a_stopped_command_repeats_nothing(sides, tmp_path):
    asked, encoded = [], []
    def ask(image, request):
        if len(asked) == 3: raise KeyboardInterrupt
        asked.append(image.tobytes())
        return json.dumps(CAPTION if "caption" in request else QUESTION)
    run = lambda: build_pairs(*sides, tmp_path, PairSettings(clusters=6), "layout", Asking(ask, "m"))
    with pytest.raises(KeyboardInterrupt): run()
    first = list(asked)
    assert len(first) == 3 and not (tmp_path/"pairs.parquet").exists()
    asked.append(None)                                                        # past the interruption
    run()
    assert len(asked) == 7 and len({*asked}) == 7                             # three, the mark, and the other three
    before = (tmp_path/"pairs.parquet").read_bytes()
    asked.clear(); asked.extend([None] * 9)
    run()
    assert len(asked) == 9 and (tmp_path/"pairs.parquet").read_bytes() == before


def test_features_are_not_made_twice(sides, tmp_path):
    made = []
    def encode(images): made.extend(images); return torch.stack([torch.tensor(im).flatten().float() for im in images])
    first = hang(sides[0], encode, "e", tmp_path, batch=16)
    again = hang(sides[0], encode, "e", tmp_path, batch=16)
    assert len(made) == 40 and torch.equal(first.x_ND, again.x_ND) and first.digests == again.digests
    hang(sides[0], encode, "another", tmp_path, batch=16)
    assert len(made) == 80


def test_a_line_that_was_cut_short_is_asked_for_again(tmp_path):
    log = Log(tmp_path/"log")
    log.put("a", "1", CAPTION); log.put("b", "2", Failed("why"))
    whole = (tmp_path/"log").read_bytes()
    (tmp_path/"log").write_bytes(whole + b'{"key": "c", "fie')
    again = Log(tmp_path/"log")
    assert set(again.done) == {"a", "b"} and str(again.done["b"]) == "why" and (tmp_path/"log").read_bytes() == whole
    (tmp_path/"log").write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match="not what this command writes"): Log(tmp_path/"log")


# ---- an endpoint ----

@pytest.fixture
def server(monkeypatch):
    "A server on this machine whose answers are functions of the request; `server.said` are the requests."
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            here.said.append((self.path, dict(self.headers), body))
            code, text = here.answer(len(here.said), body)
            self.send_response(code)
            if code == 302: self.send_header("Location", f"http://127.0.0.1:{here.server_port}/elsewhere")
            self.end_headers()
            self.wfile.write(text if isinstance(text, bytes) else json.dumps(dict(choices=[dict(message=dict(content=text))])).encode())
        do_GET = do_POST
        def log_message(self, *args): pass
    here = HTTPServer(("127.0.0.1", 0), Handler)
    here.said, here.answer = [], lambda n, body: (200, json.dumps(CAPTION))
    here.url = f"http://127.0.0.1:{here.server_port}/v1"
    threading.Thread(target=here.serve_forever, args=(0.01,), daemon=True).start()
    yield here
    here.shutdown(); here.server_close()


def endpoint(server, **kwargs): return Endpoint(server.url, "m", wait=0.001, **kwargs)


def test_an_endpoint_gets_the_picture_and_the_request(server, monkeypatch):
    import base64, io
    from PIL import Image
    monkeypatch.setenv("UNIFY_RL_API_KEY", "secret")
    p = half(3, "answer")
    assert Asking(endpoint(server), "m")(p) == CAPTION
    (path, headers, body), = server.said
    text, image = body["messages"][0]["content"]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "m" and text["text"] == pairs.WRITE_CAPTION
    sent = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.array(Image.open(io.BytesIO(sent))), p.image)


def test_the_key_does_not_travel_in_the_clear(monkeypatch):
    monkeypatch.setenv("UNIFY_RL_API_KEY", "secret")
    with pytest.raises(UserError, match="not encrypted"): Endpoint("http://example.org/v1", "m")
    Endpoint("https://example.org/v1", "m")


def test_a_server_that_stumbles_is_waited_for(server):
    server.answer = lambda n, body: (500, b"") if n < 3 else (429, b"") if n == 3 else (200, "fine")
    assert endpoint(server)(half(0, "answer").image, "?") == "fine" and len(server.said) == 4


def test_a_server_that_answers_500_stops_with_what_was_done_saved(server, tmp_path):
    server.answer = lambda n, body: (200, json.dumps(CAPTION)) if n <= 2 else (500, b"")
    three, digests = [half(i, "answer") for i in range(3)], ["a", "b", "c"]
    with pytest.raises(UserError, match="did not serve in 5 attempts; the last: HTTP 500.* 2 augmentations are saved"):
        augment_all(three, digests, Asking(endpoint(server), "m"), Log(tmp_path/"log"))
    assert len(server.said) == 2 + 5
    server.answer = lambda n, body: (200, json.dumps(CAPTION))
    assert augment_all(three, digests, Asking(endpoint(server), "m"), Log(tmp_path/"log")) == [CAPTION] * 3
    assert len(server.said) == 8                                              # the two that were done are not asked for again


def test_a_server_that_is_down(server, tmp_path):
    server.shutdown(); server.server_close()
    with pytest.raises(Down, match="did not serve in 3 attempts.*refused"): endpoint(server, attempts=3)(half(0, "answer").image, "?")
    server.shutdown = server.server_close = lambda: None


def test_a_server_that_says_nothing(server):
    server.answer = lambda n, body: threading.Event().wait(0.4) or (200, "late")
    with pytest.raises(Down, match="in 2 attempts; the last: .*timed out"): endpoint(server, attempts=2, timeout=0.05)(half(0, "answer").image, "?")


@pytest.mark.parametrize("code", [302, 401, 404])
def test_what_waiting_cannot_mend_stops_at_once(code, server):
    server.answer = lambda n, body: (code, b"")
    with pytest.raises(Down, match=f"HTTP {code}"): endpoint(server)(half(0, "answer").image, "?")
    assert len(server.said) == 1                                              # and a redirection is not followed


@pytest.mark.parametrize("code, text", [(400, b""), (413, b""), (200, b"not json"), (200, b'{"choices": []}'), (200, b"[]")])
def test_a_picture_that_the_server_refuses_is_a_failed_picture(code, text, server):
    server.answer = lambda n, body: (code, text)
    with pytest.raises(Failed): Asking(endpoint(server), "m")(half(0, "answer"))


def test_requests_side_by_side_keep_their_order(server, tmp_path):
    server.answer = lambda n, body: (200, json.dumps(dict(caption=f"picture {len(body['messages'][0]['content'][1]['image_url']['url'])}")))
    many = [half(i, "answer") for i in range(10)]
    alone = [Asking(endpoint(server), "m")(p) for p in many]
    assert augment_all(many, [p.id for p in many], Asking(endpoint(server), "m", workers=4), Log(tmp_path/"log")) == alone


def test_a_model_of_transformers_is_asked_as_it_wants(monkeypatch):
    import sys
    from types import SimpleNamespace
    said = []
    def pipe(text, **settings): said.append((text, settings)); return [dict(generated_text=json.dumps(CAPTION))]
    load = lambda task, model, device: pipe if (task, model) == ("image-text-to-text", "owner/vlm") else 1 / 0
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(pipeline=load))
    assert local_model("owner/vlm")(half(0, "answer")) == CAPTION
    assert [c["type"] for c in said[0][0][0]["content"]] == ["image", "text"] and said[0][1]["return_full_text"] is False
    with pytest.raises(UserError, match="the model nobody/none could not be loaded"): local_model("nobody/none")


def test_augmenters_by_name():
    assert load_augmenter("rules").name == "rules" and load_augmenter("http://localhost:1/v1", "m").name == "endpoint:m"
    for name in ("gpt", "transformers:", "ftp://x"):
        with pytest.raises(UserError, match="unknown augmenter"): load_augmenter(name)


# ---- the command ----

def shell(capsys, *words):
    try: code = cli.main(["pairs", "build", *map(str, words)])
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()


def test_the_command_from_files_to_prompts(tmp_path, capsys):
    from PIL import Image
    folder = tmp_path/"data"
    folder.mkdir()
    lines = []
    for i in range(24):
        p = half(3 * i + i % 2, "answer" if i % 2 else "generate")
        Image.fromarray(pairs.picture_of(p)).save(folder/f"{i}.png")
        lines.append(dict(id=p.id, task=p.task, text=p.text, image=f"{i}.png") | (dict(answer="yes") if p.answer else {}))
    (folder/"broken.png").write_bytes(b"\x89PNG no")
    lines.append(dict(id="broken", task="answer", text="?", answer="x", image="broken.png"))
    (folder/"train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    data = ("--und", f"jsonl:{folder}", "--gen", f"jsonl:{folder}", "--encoder", "layout", "--out", tmp_path/"out")
    code, out, err = shell(capsys, *data)
    assert code == 2 and "rules knows only the shapes world" in err
    code, out, err = shell(capsys, *data, "--clusters", 0, "--delta", 0)
    assert code == 0, err
    assert "retrieved pairs" in out and "unify_rl train pairuni data.path=" in out
    code, out, err = shell(capsys, *data[:-1], tmp_path/"random", "--clusters", 0, "--match", "random")
    assert code == 0 and "random pairs" in out and "retrieved pairs" not in out, err
    summary = json.loads((tmp_path/"out"/"summary.json").read_text())
    assert summary["summary"]["bad_rows"] == 1 and "row 25" in summary["left_out"]["bad_rows"][0]
    prompts = load_prompts("pairs", "train", ("answer", "generate"), str(tmp_path/"out"), Reading())
    assert len(prompts) == 2 * summary["summary"]["retrieved"] > 0
    row = table(tmp_path/"out")[0]
    assert (tmp_path/"out"/row["und_image"]).read_bytes() in [(folder/f"{i}.png").read_bytes() for i in range(24)]      # as it was, not encoded anew


MISTAKES = {"--match alike": "unknown match 'alike'", "--delta 2": "delta is 2.0", "--samples 0": "--samples is 0; it must be at least 1", "--encoder resnet50": "unknown encoder 'resnet50'",
            "--encoder layout --augment gpt": "unknown augmenter 'gpt'", "--encoder layout --augment http://localhost:1/v1": "say which one",
            "--encoder layout --clusters 0 --und jsonk:x": "Did you mean 'jsonl'"}

@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_message(line, capsys, tmp_path):
    code, _, err = shell(capsys, *line.split(), "--out", tmp_path/"out")
    assert code == 2 and MISTAKES[line] in err and not (tmp_path/"out").exists()


def test_the_manual_names_what_can_be_chosen(capsys):
    code, out, _ = shell(capsys, "--help")
    assert code == 0 and all(word in out for word in ("torchvision:resnet50", "UNIFY_RL_API_KEY", "report.png", "--delta D", "train pairuni", *pairs.ENCODERS, *pairs.MATCHES))
