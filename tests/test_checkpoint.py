"Checkpoints under faults: truncation, tampering, a full disk, a kill, an unwritable folder; and a bit-exact resume."
import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from unify_rl.core import UserError
from unify_rl.train import checkpoint as C
from unify_rl.train.checkpoint import checkpoints, load_checkpoint, pack, problem, rng_state, save_checkpoint, set_rng_state


def through_disk(obj, tmp_path):
    save_checkpoint(tmp_path/"ck", 1, obj)
    return load_checkpoint(tmp_path/"ck")[1]


def three(folder):
    "Three saved steps, two kept."
    for s in (10, 20, 30): save_checkpoint(folder, s, {"at": s, "w": torch.full((5,), float(s))})
    return folder


# -- pack / unpack -------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
          torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_of_a_dtype_survives(dtype, tmp_path):
    raw = torch.randint(256, (64*8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    t = raw.bool() if dtype == torch.bool else raw.view(dtype).reshape(4, -1)
    back = through_disk({"t": t}, tmp_path)["t"]
    assert back.dtype == t.dtype and back.shape == t.shape
    assert torch.equal(back.contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))

@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f2", "?", "<u4", "<u8", "<i2", "<c16"])
def test_numpy_arrays_and_scalars_survive(dtype, tmp_path):
    raw = np.random.default_rng(0).integers(256, size=96, dtype=np.uint8)
    a = (raw > 127 if dtype == "?" else raw.view(dtype)).reshape(2, -1)
    back = through_disk({"a": a, "t": a.T, "s": a.flat[0], "none": a[:0], "zero_d": a[0, 0].reshape(())}, tmp_path)
    for got, want in ((back["a"], a), (back["t"], a.T), (back["none"], a[:0])):
        assert got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()
    assert isinstance(back["s"], np.generic) and back["s"].tobytes() == a.flat[0].tobytes()
    assert back["zero_d"].shape == () and back["a"].flags.writeable

def test_scalars_containers_and_keys_survive(tmp_path):
    obj = {"": None, 0: "int key", "0": "text key", (1, "a"): True, "x": [(), [], {}, (1, (2.5, [None]))], "big": -2**200,
           "tiny": 5e-324, "third": 1/3, "neg0": -0.0, "inf": -math.inf, "nan": math.nan, "text": "é\u2028\n\"",
           "$tensor": 1, "tags": {"$tuple": [1]}}
    back = through_disk(obj, tmp_path)
    assert math.isnan(back.pop("nan")) and math.isnan(obj.pop("nan"))
    assert back == obj and list(back) == list(obj) and math.copysign(1, back["neg0"]) == -1
    assert type(back["x"][0]) is tuple and type(back["x"][3][1]) is tuple and back[(1, "a")] is True

def test_names_cannot_collide(tmp_path):
    one, two, three, four, five = torch.arange(1, 6)
    back = through_disk({"a/b": one, "a": {"b": two}, 0: three, "0": four, "__metadata__": five}, tmp_path)
    assert [back["a/b"], back["a"]["b"], back[0], back["0"], back["__metadata__"]] == [1, 2, 3, 4, 5]

def test_tied_tensors_stay_tied_and_views_are_independent(tmp_path):
    lm = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    lm["head"].weight = lm["embed"].weight
    w = lm["embed"].weight
    back = through_disk({"model": lm.state_dict(), "flat": w.view(-1), "row": w[2], "t": w.t()}, tmp_path)
    assert back["model"]["embed.weight"] is back["model"]["head.weight"]
    assert torch.equal(back["flat"], w.view(-1)) and torch.equal(back["row"], w[2]) and torch.equal(back["t"], w.t())
    assert len(pack({"model": lm.state_dict()})[0]) == 1
    back["row"].zero_()
    assert torch.equal(back["model"]["embed.weight"], w)

def test_pack_does_not_alias_a_changed_tensor_after_saving(tmp_path):
    w = torch.ones(3)
    save_checkpoint(tmp_path, 1, {"w": w})
    w.zero_()
    assert load_checkpoint(tmp_path)[1]["w"].tolist() == [1, 1, 1]

@pytest.mark.parametrize("bad", [object(), {1, 2}, b"bytes", np.array(["text"]), np.array([object()]), lambda: 0])
def test_what_cannot_be_saved_is_named_and_nothing_is_left(bad, tmp_path):
    three(tmp_path)
    with pytest.raises(TypeError, match="state/deep/0: a checkpoint cannot hold"): save_checkpoint(tmp_path, 40, {"deep": [bad]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]

def test_shards_cover_everything(tmp_path, monkeypatch):
    real = C.shards
    monkeypatch.setattr(C, "shards", lambda tensors: real(tensors, size=100))
    obj = {f"w{i}": torch.arange(i*7) for i in range(9)}
    path = save_checkpoint(tmp_path, 1, obj)
    assert len(list(path.glob("tensors-*.safetensors"))) > 3
    back = load_checkpoint(tmp_path)[1]
    assert all(torch.equal(back[k], v) for k, v in obj.items()) and list(back) == list(obj)

def test_files_are_written_and_read_some_at_a_time(tmp_path, monkeypatch):
    "Several at once, and never more than THREADS files' bytes beside the tensors."
    real, read, parse, write, held, lock = C.shards, C.read_file, C.tensors_from_bytes, C.write_file, [0, 0, set()], threading.Lock()
    monkeypatch.setattr(C, "shards", lambda tensors: real(tensors, size=100))
    def count(n):
        with lock: held[0] += n; held[1] = max(held[1], held[0])
    def reading(path, entry, deep=True):
        if path.suffix == ".safetensors": count(1); time.sleep(.01)
        return read(path, entry, deep)
    def writing(path, data):
        held[2].add(threading.get_ident()); time.sleep(.01)
        return write(path, data)
    obj = {f"w{i}": torch.arange(99.) + i for i in range(12)}
    monkeypatch.setattr(C, "write_file", writing)
    path = save_checkpoint(tmp_path, 1, obj)
    monkeypatch.setattr(C, "read_file", reading)
    monkeypatch.setattr(C, "tensors_from_bytes", lambda raw: (parse(raw), count(-1))[0])
    back = C.read_state(path)[1]
    assert list(back) == list(obj) and all(torch.equal(back[k], v) for k, v in obj.items())
    assert 1 < held[1] <= C.THREADS and 1 < len(held[2]) <= C.THREADS + 1

def test_after_a_mistake_no_further_file_is_begun(monkeypatch):
    begun = []
    def work(i):
        begun.append(i); time.sleep(.01)
        if i == 1: raise OSError("full")
    with pytest.raises(OSError, match="full"): C.each(work, range(100))
    assert len(begun) < 20


# -- random streams ------------------------------------------------------------------------------------------------

def draws(): return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()

def test_random_streams_resume_in_mid_pair(tmp_path):
    random.gauss(0, 1), np.random.randn()          # both keep a second normal number in hand: it must survive too
    save_checkpoint(tmp_path, 1, {"rng": rng_state()})
    want = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    set_rng_state(load_checkpoint(tmp_path)[1]["rng"])
    assert draws() == want


# -- resume --------------------------------------------------------------------------------------------------------

def make_run():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    opt = torch.optim.AdamW(net.parameters(), lr=0.01, amsgrad=True)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: 1/(1 + s))
    def step():
        loss = net(torch.randn(8, 4) + random.random() + np.random.rand()).square().mean()
        opt.zero_grad(), loss.backward(), opt.step(), sched.step()
        return loss.item()
    return net, opt, sched, step

def test_interrupted_and_resumed_equals_uninterrupted_to_the_last_bit(tmp_path):
    random.seed(0), np.random.seed(0)
    net, opt, sched, step = make_run()
    first = [step() for _ in range(7)]
    parts = {"model": net, "opt": opt, "sched": sched}
    save_checkpoint(tmp_path, 7, {k: v.state_dict() for k, v in parts.items()} | {"rng": rng_state()})
    rest, want = [step() for _ in range(7)], [p.detach().clone() for p in net.parameters()]
    random.seed(9), np.random.seed(9)
    net, opt, sched, step = make_run()
    step()
    at, state, notes = load_checkpoint(tmp_path)
    for name, part in {"model": net, "opt": opt, "sched": sched}.items(): part.load_state_dict(state[name])
    set_rng_state(state["rng"])
    assert (at, notes) == (7, []) and len(first) == 7
    assert [step() for _ in range(7)] == rest
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), want))


# -- faults on disk ------------------------------------------------------------------------------------------------

def truncate(f): f.write_bytes(f.read_bytes()[:-1])
def empty(f): f.write_bytes(b"")
def grow(f): f.write_bytes(f.read_bytes() + b"\0")
def remove(f): f.unlink()
def flip_middle(f): b = bytearray(f.read_bytes()); b[len(b)//2] ^= 1; f.write_bytes(b)
def into_folder(f): f.unlink(); f.mkdir()

@pytest.mark.parametrize("harm", [truncate, empty, grow, remove, flip_middle, into_folder])
@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(harm, name, tmp_path):
    three(tmp_path)
    harm(tmp_path/"step-00000030"/name)
    at, state, notes = load_checkpoint(tmp_path)
    assert (at, state["at"], state["w"].tolist()) == (20, 20, [20.0]*5)
    assert "step-00000030" in notes[0] and "step 20" in notes[1]
    if harm is not flip_middle: assert name in notes[0]        # a changed manifest may accuse the file it describes
    with pytest.raises(UserError, match="These verify: 20"): load_checkpoint(tmp_path, step=30)

def test_every_flipped_byte_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": torch.arange(3), "k": {0: 1.5}})
    for f in path.iterdir():
        good = f.read_bytes()
        for i in range(len(good)):
            f.write_bytes(good[:i] + bytes([good[i] ^ 0x80]) + good[i+1:])
            assert problem(path), f"byte {i} of {f.name}"
        f.write_bytes(good)
    assert problem(path) == ""

def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    path = save_checkpoint(tmp_path/"ck", 1, {"w": torch.ones(2)})
    m = json.loads((path/"manifest.json").read_text())
    shutil.copy(path/"tensors-00000.safetensors", tmp_path/"out.safetensors")
    m["files"]["../../out.safetensors"] = m["files"].pop("tensors-00000.safetensors")
    (path/"manifest.json").write_text(json.dumps(m))
    assert problem(path) == "manifest.json is damaged"

def test_a_newer_format_says_so(tmp_path):
    path = save_checkpoint(tmp_path, 1, {})
    (path/"manifest.json").write_text((path/"manifest.json").read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="its format is 2, this version reads 1"): load_checkpoint(tmp_path)

def test_no_good_checkpoint_names_each_and_why(tmp_path):
    three(tmp_path)
    truncate(tmp_path/"step-00000020"/"state.json")
    remove(tmp_path/"step-00000030"/"tensors-00000.safetensors")
    with pytest.raises(UserError) as e: load_checkpoint(tmp_path)
    for part in ("step-00000020", "state.json has", "step-00000030", "tensors-00000.safetensors is missing", "restore a copy"):
        assert part in str(e.value)

@pytest.mark.parametrize("make", [lambda f: None, lambda f: f.mkdir(), lambda f: f.write_text("a file")])
def test_no_checkpoint_at_all(make, tmp_path):
    make(tmp_path/"ck")
    with pytest.raises(UserError, match="no checkpoint in .*without --resume"): load_checkpoint(tmp_path/"ck")

def test_an_unknown_step_lists_those_there(tmp_path):
    with pytest.raises(UserError, match="There are: 20, 30"): load_checkpoint(three(tmp_path), step=31)

def test_strange_names_in_the_folder_are_ignored(tmp_path):
    three(tmp_path)
    (tmp_path/"step-last").mkdir(), (tmp_path/"step-00000099.bak").mkdir(), (tmp_path/"notes.txt").write_text("mine")
    assert load_checkpoint(tmp_path)[0] == 30
    save_checkpoint(tmp_path, 40, {})
    mine = {"step-last", "step-00000099.bak", "notes.txt"}
    assert {p.name for p in tmp_path.iterdir()} == mine | {"step-00000030", "step-00000040"}


# -- faults while saving -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["write", "fsync", "rename", "json"])
def test_disk_full_keeps_the_old_ones_and_removes_the_temporary(where, tmp_path, monkeypatch):
    three(tmp_path)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    full = OSError(errno.ENOSPC, "No space left on device")
    def fail(*a, **k): raise full
    def half_write(path, data):
        Path(path).write_bytes(data[:len(data)//2])
        raise full
    if where == "write": monkeypatch.setattr(C, "write_file", half_write)
    if where == "fsync": monkeypatch.setattr(os, "fsync", fail)
    if where == "rename": monkeypatch.setattr(Path, "rename", fail)
    if where == "json":
        real = C.write_file
        monkeypatch.setattr(C, "write_file", lambda p, d: half_write(p, d) if p.name == "state.json" else real(p, d))
    with pytest.raises(UserError, match="No space left on device.*Older checkpoints are untouched"):
        save_checkpoint(tmp_path, 40, {"w": torch.ones(9)})
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert not list(tmp_path.glob(".tmp-*"))
    monkeypatch.undo()
    save_checkpoint(tmp_path, 40, {"at": 40})
    assert list(checkpoints(tmp_path)) == [30, 40]

def test_a_real_write_limit(tmp_path):
    "The operating system itself refuses to write more than 64 KiB."
    code = f"""
        import resource, torch
        from unify_rl.core import UserError
        from unify_rl.train.checkpoint import save_checkpoint
        save_checkpoint({str(tmp_path)!r}, 1, {{"w": torch.ones(10)}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try: save_checkpoint({str(tmp_path)!r}, 2, {{"w": torch.ones(100_000)}})
        except UserError as e: print("refused:", e)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "refused: cannot save the checkpoint" in out.stdout and "File too large" in out.stdout, out.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and load_checkpoint(tmp_path)[0] == 1

def killed(tmp_path, patch, step=40):
    "Save in another process that dies, as by SIGKILL, where `patch` says."
    code = f"""
        import os, pathlib, torch
        from unify_rl.train import checkpoint as C
        {patch}
        C.save_checkpoint({str(tmp_path)!r}, {step}, {{"at": {step}, "new": True}})
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert out.returncode == 9, out.stderr

def test_a_kill_before_the_rename_leaves_the_old_ones_and_the_next_save_cleans_up(tmp_path):
    three(tmp_path)
    killed(tmp_path, "C.swap_in = lambda tmp, new: os._exit(9)")
    assert (tmp_path/".tmp-step-00000040"/"manifest.json").exists()        # complete, but never named
    assert load_checkpoint(tmp_path)[::2] == (30, [])
    save_checkpoint(tmp_path, 40, {"at": 40})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]

def test_a_kill_after_the_rename_and_before_rotation_loses_nothing(tmp_path):
    three(tmp_path)
    killed(tmp_path, "C.rotate = lambda *a: os._exit(9)")
    assert list(checkpoints(tmp_path)) == [20, 30, 40] and load_checkpoint(tmp_path)[0] == 40

def test_a_kill_while_replacing_the_only_checkpoint_leaves_it(tmp_path):
    save_checkpoint(tmp_path, 40, {"at": 40, "new": False}, keep=1)
    killed(tmp_path, "real = pathlib.Path.rename; "
                     "pathlib.Path.rename = lambda a, b: os._exit(9) if a.name.startswith('.tmp') else real(a, b)")
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    at, state, notes = load_checkpoint(tmp_path)
    assert (at, state["new"], notes) == (40, False, [])
    save_checkpoint(tmp_path, 40, {"new": True}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000040"] and load_checkpoint(tmp_path)[1]["new"]

def test_a_checkpoint_that_does_not_read_back_is_refused_and_the_old_ones_stay(tmp_path, monkeypatch):
    three(tmp_path)
    real = C.swap_in
    def rot(tmp, new):
        real(tmp, new)
        flip_middle(new/"tensors-00000.safetensors")          # the disk lied
    monkeypatch.setattr(C, "swap_in", rot)
    with pytest.raises(UserError, match="does not read back: tensors-00000.safetensors is not what was written"):
        save_checkpoint(tmp_path, 40, {"w": torch.ones(9)})
    assert list(checkpoints(tmp_path)) == [20, 30] and load_checkpoint(tmp_path)[0] == 30

def test_an_interrupt_while_writing_removes_the_temporary(tmp_path, monkeypatch):
    three(tmp_path)
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(C, "write_file", stop)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(tmp_path, 40, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]

def test_an_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path/"file").write_text("in the way")
    for folder in (tmp_path/"file", tmp_path/"file"/"deeper"):
        with pytest.raises(UserError, match="cannot save the checkpoint .*run_dir"): save_checkpoint(folder, 1, {})


# -- rotation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keep,left", [(1, [30]), (2, [20, 30]), (5, [10, 20, 30])])
def test_rotation_keeps_the_newest(keep, left, tmp_path):
    for s in (10, 20, 30): save_checkpoint(tmp_path, s, {}, keep=keep)
    assert list(checkpoints(tmp_path)) == left

def test_rotation_does_not_count_a_broken_one(tmp_path):
    three(tmp_path)
    truncate(tmp_path/"step-00000030"/"state.json")
    save_checkpoint(tmp_path, 40, {"at": 40})
    assert list(checkpoints(tmp_path)) == [20, 40] and not any(map(problem, checkpoints(tmp_path).values()))

def test_going_back_abandons_the_later_ones(tmp_path):
    three(tmp_path)
    save_checkpoint(tmp_path, 25, {"at": 25})
    assert list(checkpoints(tmp_path)) == [20, 25] and load_checkpoint(tmp_path)[0] == 25

def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="at least 1"): save_checkpoint(tmp_path, 1, {}, keep=0)
