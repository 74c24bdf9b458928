"The run folder under faults, and its reading side without training code."
import errno
import json
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from unify_rl.core import UserError
from unify_rl.train.runlog import (RunLog, held, logged_steps, picture_path, read_groups, read_metrics, read_samples, read_summary,
                                   write_summary)


def picture(seed): return np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)

def rows_of(n_prompts=2, G=2):
    return [dict(prompt_index=p, sample=s, prompt_id=f"x/{p}", task="generate", prompt="a <b>red</b> circle", reward=p + s/10,
                 advantage=np.float32(s), weight=1.0, valid=np.bool_(True), dead=False,
                 raw_strict=float(s), weighted_strict=s/2, reason_strict="found")
            for p in range(n_prompts) for s in range(G)]

def open_png(path):
    from PIL import Image
    return np.asarray(Image.open(path))


# -- starting ------------------------------------------------------------------------------------------------------

def test_an_occupied_folder_is_refused_and_untouched(tmp_path):
    (tmp_path/"thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds a run.*--resume.*run_dir"): RunLog(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

def test_an_empty_or_missing_folder_is_fine(tmp_path):
    (tmp_path/"empty").mkdir()
    RunLog(tmp_path/"a"/"b"), RunLog(tmp_path/"empty")
    assert read_metrics(tmp_path/"a"/"b") == [] == logged_steps(tmp_path/"empty")

def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"): RunLog(tmp_path/"missing", resume=True)
    assert not (tmp_path/"missing").exists()

@pytest.mark.parametrize("deeper", [False, True])
def test_an_unwritable_place_is_a_user_error(deeper, tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*file.*run_dir"):
        RunLog(tmp_path/"file"/"run" if deeper else tmp_path/"file")

def test_a_folder_without_permission_is_a_user_error(tmp_path, monkeypatch):
    def refuse(*a, **k): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot write .*Permission denied"): RunLog(tmp_path/"run")


# -- one writer ------------------------------------------------------------------------------------------------------

def holder(folder):
    "Another process that holds the folder until it is killed."
    code = f"import time; from unify_rl.train.runlog import held\nwith held({str(folder)!r}): print('held', flush=True); time.sleep(600)"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "held\n"
    return p

def test_a_held_folder_is_refused_by_name_and_free_when_its_process_is_killed(tmp_path):
    other = holder(tmp_path/"run")
    with pytest.raises(UserError, match=rf"in use: process {other.pid} on {socket.gethostname()}, since 20..-..-.. ..:..:.., writes into it.*run_dir"):
        with held(tmp_path/"run"): pass
    other.kill(); other.wait()
    with held(tmp_path/"run"): RunLog(tmp_path/"run")
    assert (tmp_path/"run"/"metrics.jsonl").exists() and not (tmp_path/"run"/".lock").exists()

def test_a_folder_is_let_go_after_a_mistake_and_an_interrupt(tmp_path):
    for mistake in (UserError("no"), KeyboardInterrupt()):
        with pytest.raises(type(mistake)):
            with held(tmp_path/"a"/"run"): raise mistake
        assert list(tmp_path.iterdir()) == []
    with held(tmp_path/"a"), held(tmp_path/"a"/"stage"): pass

def test_without_locks_a_run_goes_on(tmp_path, monkeypatch):
    import fcntl
    def none(*_): raise OSError(errno.ENOLCK, "No locks available")
    with monkeypatch.context() as m:
        m.setattr(fcntl, "flock", none)
        with held(tmp_path/"run"), held(tmp_path/"run"): pass
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with held(tmp_path/"run"), held(tmp_path/"run"): pass

def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path/"file").write_text("in the way")
    for folder in (tmp_path/"file", tmp_path/"file"/"deeper"):
        with pytest.raises(UserError, match="cannot write .*run_dir"):
            with held(folder): pass


# -- metrics -------------------------------------------------------------------------------------------------------

def test_metrics_are_strict_json_one_object_a_line(tmp_path):
    log = RunLog(tmp_path)
    log.log(1, {"reward": torch.tensor(0.5), "kl": math.nan, "big": np.float32(np.inf), "n": np.int64(3), "text": "a\nb",
                "list": torch.arange(2)})
    log.log(2, {})
    lines = (tmp_path/"metrics.jsonl").read_text().splitlines()
    def no(x): raise AssertionError(f"{x} is not JSON")
    assert [json.loads(x, parse_constant=no) for x in lines] == read_metrics(tmp_path) == [
        {"step": 1, "reward": 0.5, "kl": None, "big": None, "n": 3, "text": "a\nb", "list": [0, 1]}, {"step": 2}]

def test_every_line_is_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path)
    for s in range(3):
        log.log(s, {"x": s})
        assert len(read_metrics(tmp_path)) == s + 1

@pytest.mark.parametrize("cut", range(1, 23))
def test_a_line_cut_anywhere_is_left_out_and_repaired_on_resume(cut, tmp_path):
    log = RunLog(tmp_path)
    log.log(1, {"x": 1})
    log.log(2, {"x": 2, "y": 3})
    f = tmp_path/"metrics.jsonl"
    f.write_bytes(f.read_bytes()[:-cut])
    assert [m["step"] for m in read_metrics(tmp_path)] == [1]
    RunLog(tmp_path, resume=True).log(2, {"x": 9})
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1}, {"step": 2, "x": 9}]

def test_zeros_after_a_power_cut_are_left_out(tmp_path):
    RunLog(tmp_path).log(1, {"x": 1})
    with open(tmp_path/"metrics.jsonl", "ab") as f: f.write(b"\0"*512)
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1}]

def test_a_broken_line_in_the_middle_is_named(tmp_path):
    RunLog(tmp_path)
    (tmp_path/"metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2 is not JSON"): read_metrics(tmp_path)

def test_a_full_disk_is_a_user_error_and_the_log_can_go_on(tmp_path):
    "The operating system refuses to let the file grow; what is there stays readable."
    code = f"""
        import resource
        from unify_rl.core import UserError
        from unify_rl.train.runlog import RunLog
        log = RunLog({str(tmp_path/'run')!r})
        log.log(1, {{"x": "a"*900}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        try: log.log(2, {{"x": "b"*900}})
        except UserError as e: print("refused:", e)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "refused: cannot write" in out.stdout and "metrics.jsonl" in out.stdout, out.stderr
    assert [m["step"] for m in read_metrics(tmp_path/"run")] == [1]
    RunLog(tmp_path/"run", resume=True).log(2, {"x": "c"})
    assert [m["step"] for m in read_metrics(tmp_path/"run")] == [1, 2]

def test_truncate_forgets_lines_groups_and_pictures_after_a_step(tmp_path):
    log = RunLog(tmp_path)
    for s in (1, 2, 3):
        log.log(s, {"x": s})
        log.log_groups(s, rows_of(), [picture(0)]*4)
    (tmp_path/"groups"/".tmp-step-000004").mkdir()
    log.truncate(2)
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2] == logged_steps(tmp_path)
    left = {"step-000001", "step-000001.parquet", "step-000002", "step-000002.parquet"}
    assert {p.name for p in (tmp_path/"groups").iterdir()} == left
    log.truncate(0)
    assert read_metrics(tmp_path) == [] and list((tmp_path/"groups").iterdir()) == []


# -- groups --------------------------------------------------------------------------------------------------------

def test_groups_come_back_with_their_pictures(tmp_path):
    log, rows = RunLog(tmp_path), rows_of()
    images, source = [picture(0), picture(1), None, picture(3)], picture(9)
    log.log_groups(10, rows, images, [None, None, source, source])
    df = read_groups(tmp_path, 10)
    assert df["step"].tolist() == [10]*4 and df["prompt_index"].tolist() == [0, 0, 1, 1] and df["valid"].dtype == bool
    at = "groups/step-000010"
    assert df["image"].tolist() == [f"{at}/00-00.png", f"{at}/00-01.png", None, f"{at}/01-01.png"]
    assert df["source"].tolist() == [None, None] + [f"{at}/01-source.png"]*2
    for path, want in zip(df["image"], images):
        if path: assert np.array_equal(open_png(picture_path(tmp_path, path)), want)
    assert np.array_equal(open_png(tmp_path/df["source"][2]), source)
    assert df["reason_strict"].tolist() == ["found"]*4 and df["advantage"].tolist() == [0, 1, 0, 1]
    assert "image" not in rows[0] and df["answer"].tolist() == [None]*4 and df["kl"].isna().all()

def test_groups_without_pictures_make_no_folder(tmp_path):
    RunLog(tmp_path).log_groups(1, rows_of())
    assert [p.name for p in (tmp_path/"groups").iterdir()] == ["step-000001.parquet"]
    assert read_groups(tmp_path, 1)["image"].tolist() == [None]*4

def test_tables_of_different_steps_have_one_schema(tmp_path):
    import pyarrow.parquet as pq
    log = RunLog(tmp_path)
    full, bare = rows_of(), [{**r, "raw_strict": None, "reason_strict": None, "answer": "A", "kl": 0.1} for r in rows_of()]
    log.log_groups(1, full), log.log_groups(2, bare)
    a, b = (pq.read_schema(tmp_path/"groups"/f"step-00000{s}.parquet") for s in (1, 2))
    assert a.equals(b)

def test_logging_a_step_again_replaces_it(tmp_path):
    log = RunLog(tmp_path)
    log.log_groups(1, rows_of(3), [picture(0)]*6)
    log.log_groups(1, rows_of(1), [picture(1)]*2)
    assert len(read_groups(tmp_path, 1)) == 2
    assert sorted(p.name for p in (tmp_path/"groups"/"step-000001").iterdir()) == ["00-00.png", "00-01.png"]

def test_a_misspelt_column_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'group_mean'"):
        RunLog(tmp_path).log_groups(1, [dict(prompt_index=0, sample=0, group_men=1)])

def test_a_picture_of_floats_is_an_error(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(ValueError, match="must be uint8"): log.log_groups(1, rows_of(1), [picture(0)/255]*2)
    assert logged_steps(tmp_path) == []

def test_a_step_is_listed_only_when_complete(tmp_path, monkeypatch):
    log = RunLog(tmp_path)
    def full(*a, **k): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)                       # pictures are in place, the table is not
    with pytest.raises(UserError, match="step-000001.parquet: No space left on device"):
        log.log_groups(1, rows_of(), [picture(0)]*4)
    assert logged_steps(tmp_path) == [] and not list((tmp_path/"groups").glob(".tmp-*"))
    monkeypatch.undo()
    log.log_groups(1, rows_of(), [picture(0)]*4)
    assert logged_steps(tmp_path) == [1]

def test_unknown_steps_name_the_nearest(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(UserError, match="no logged groups.*groups_every"): read_groups(tmp_path, 1)
    for s in range(10, 110, 10): log.log_groups(s, rows_of(1))
    with pytest.raises(UserError, match=r"no groups of step 52\. Nearest: 40, 50, 60, 70 \(10 logged\)"):
        read_groups(tmp_path, 52)

@pytest.mark.parametrize("harm", [lambda b: b[:40], lambda b: b"", lambda b: b[:-20] + bytes(20)])
def test_a_damaged_table_is_named(harm, tmp_path):
    log = RunLog(tmp_path)
    log.log_groups(1, rows_of()), log.log_groups(2, rows_of())
    f = tmp_path/"groups"/"step-000001.parquet"
    f.write_bytes(harm(f.read_bytes()))
    with pytest.raises(UserError, match="step-000001.parquet cannot be read"): read_groups(tmp_path, 1)
    assert len(read_groups(tmp_path, 2)) == 4


# -- samples, summary, paths ---------------------------------------------------------------------------------------

def test_samples_of_an_evaluation(tmp_path):
    log = RunLog(tmp_path)
    log.log_samples("before", [{"caption": "é <b>", "score": math.nan}, {"text": "no picture"}], [picture(0), None])
    back = read_samples(tmp_path, "before")
    assert back == [{"caption": "é <b>", "score": None, "image": "eval/before/000.png"}, {"text": "no picture", "image": None}]
    assert np.array_equal(open_png(tmp_path/back[0]["image"]), picture(0)) and read_samples(tmp_path, "after") == []
    log.log_samples("before", [{"caption": "again"}])
    assert read_samples(tmp_path, "before") == [{"caption": "again", "image": None}]
    assert not (tmp_path/"eval"/"before"/"000.png").exists()
    for bad in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="plain folder name"): log.log_samples(bad, [])

def test_summary_round_trip_and_missing(tmp_path):
    with pytest.raises(UserError, match="has not finished"): read_summary(tmp_path)
    write_summary(tmp_path, {"seconds": np.float64(1.5), "suites": {"s": {"overall": {"before": math.nan, "ci95": (0, 1)}}}})
    assert read_summary(tmp_path) == {"seconds": 1.5, "suites": {"s": {"overall": {"before": None, "ci95": [0, 1]}}}}
    (tmp_path/"summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json is not JSON"): read_summary(tmp_path)

@pytest.mark.parametrize("bad", ["../x.png", "/etc/passwd", "groups/../../x", "link/x.png"])
def test_pictures_are_confined_to_the_run_folder(bad, tmp_path):
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out of the run folder"): picture_path(tmp_path/"run", bad)

def test_a_missing_run_folder_names_its_neighbours(tmp_path):
    RunLog(tmp_path/"grpo-tiny-janus-s0")
    for read in (read_metrics, logged_steps, read_summary):
        with pytest.raises(UserError, match="no run folder.*Did you mean 'grpo-tiny-janus-s0'"):
            read(tmp_path/"grpo-tiny-janus-s1")
    with pytest.raises(UserError, match="no run folder"): read_metrics(tmp_path/"a"/"b"/"c")

def test_reading_needs_no_training_code(tmp_path):
    RunLog(tmp_path).log_groups(1, rows_of())
    code = (f"import sys; from unify_rl.train.runlog import read_groups; assert len(read_groups({str(tmp_path)!r}, 1)) == 4; "
            "print(sorted(m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr
