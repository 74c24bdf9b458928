"""The command line: exit codes, one message for a mistake, and what a signal does to a real process."""
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import unify_rl.cli as cli
from unify_rl.core import UserError
from unify_rl.policies.janus import new_janus
from unify_rl.policies.load import load_policy
from unify_rl.train.checkpoint import checkpoints
from unify_rl.train.config import Config, leaves
from unify_rl.train.pretrain import vocabulary
from unify_rl.train.runlog import read_metrics

# drawing only, since the questions of the training side take seconds to make
FAST = ["data.tasks={generate: 1}", "rewards=[{name: constraints}]", "rollout.prompts=2", "rollout.group_size=2",
        "evaluate.suites=[shapes-geneval]", "evaluate.prompts=3", "seed=1"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A folder with a very small policy."
    folder = tmp_path_factory.mktemp("policies")/"tiny"
    new_janus(vocabulary(), layers=1, hidden=32).save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope="session")
def run_dir(tiny, tmp_path_factory):
    "A finished run, made from the command line."
    folder = tmp_path_factory.mktemp("runs")/"one"
    assert cli.main(["train", "grpo", "--policy", tiny, *FAST, "steps=2", f"run_dir={folder}"]) == 0
    return folder

@pytest.fixture
def shell(capsys):
    "Run a command in this process: (exit code, stdout, stderr)."
    def run(*words):
        try: code = cli.main([str(w) for w in words])
        except SystemExit as e: code = e.code
        out, err = capsys.readouterr()
        return code, out, err
    return run


# -- mistakes: one message, code 2, no traceback -------------------------------------------------------------------

MISTAKES = {
    "train grop": "unknown recipe 'grop'. Did you mean 'grpo'",
    "train grpo stepz=3": "stepz: unknown key. Did you mean 'steps'",
    "train grpo rollout.grop_size=3": "rollout.grop_size: unknown key. Did you mean 'group_size'",
    "train grpo steps=many": "steps: expected a whole number",
    "train grpo steps": "'steps' is not key=value",
    "train grpo rollout.group_size=1": "a group of one has no advantage",
    "train grpo evaluate.suites=[shapes-ga] run_dir=RUN": "Did you mean 'shapes-qa'",
    "train grpo --policy tiny-janos run_dir=RUN": "unknown policy 'tiny-janos'",
    "train grpo --config none.yaml": "cannot read the configuration none.yaml",
    "train grpo --resume run_dir=RUN": "there is no run folder",
    "eval --suites shapes-ga": "unknown suite 'shapes-ga'. Did you mean 'shapes-qa'",
    "eval --policy tiny-janos": "unknown policy 'tiny-janos'",
    "eval --prompts 0": "--prompts is 0; it must be above 0",
    "pretrain tiny-janos": "unknown model 'tiny-janos'. Did you mean 'tiny-janus'",
    "pretrain tiny-janus --steps 0": "--steps is 0; it must be at least 1",
}

@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_message_and_code_2(line, shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = shell(*line.replace("RUN", str(tmp_path/"run")).split())
    assert code == 2 and err.startswith("unify_rl: ") and MISTAKES[line] in err
    assert "Traceback" not in err and not (tmp_path/"run").exists()

REFUSED = ["", "trian grpo", "train", "train grpo --polcy x", "eval steps=3", "eval --cfg wide", "recipes x"]

@pytest.mark.parametrize("line", REFUSED)
def test_what_argparse_refuses_is_code_2_too(line, shell):
    code, _, err = shell(*line.split())
    assert code == 2 and "usage: unify_rl" in err

def test_debug_shows_the_traceback(shell):
    with pytest.raises(UserError, match="unknown recipe"): shell("train", "grop", "--debug")

def test_our_own_mistakes_are_not_hidden(shell, monkeypatch):
    def broken(args): raise RuntimeError("a bug")
    monkeypatch.setattr(cli, "evaluate", broken)
    with pytest.raises(RuntimeError, match="a bug"): shell("eval")

def test_settings_may_stand_anywhere():
    want = ["seed=1", "steps=5", "run_dir=a b"]
    for words in (["grpo", *want, "--resume"], ["grpo", "seed=1", "--resume", *want[1:]], ["--resume", "grpo", *want],
                  ["grpo", "--policy", "p", *want]):
        assert cli.parse(["train", *words]).settings == want


# -- the manual ----------------------------------------------------------------------------------------------------

def test_the_manual_names_every_setting_and_recipe(shell):
    code, out, _ = shell("train", "--help")
    assert code == 0 and all(f"  {path} = " in out for path, _, _ in leaves(Config) if path not in ("rewards", "stages"))
    assert re.search(r"^  grpo +Plain GRPO", out, re.M) and "--resume run_dir=" in out

def test_recipes_are_listed(shell):
    code, out, _ = shell("recipes")
    assert code == 0 and re.search(r"^  grpo +Plain GRPO", out, re.M) and "  corl-refined " in out

@pytest.mark.parametrize("line", ["--help", "train --help", "eval --help", "recipes", "--version"])
def test_quick_commands_do_not_load_torch(line):
    code = (f"import sys; from unify_rl.cli import main\ntry: main({line.split()!r})\nexcept SystemExit: pass\n"
            "print('LOADED', *sorted(set(sys.modules) & {'torch', 'transformers'}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().splitlines()[-1] == "LOADED", done.stderr


# -- train ---------------------------------------------------------------------------------------------------------

def test_train_ends_with_a_table_the_report_and_the_next_command(shell, tiny, tmp_path):
    code, out, _ = shell("train", "grpo", "--policy", tiny, *FAST, "steps=2", f"run_dir={tmp_path/'my run'}")
    assert code == 0
    for said in ("recipe: grpo", "steps: 2", "before: shapes-geneval", "after: shapes-geneval", "step 2/2", "95 % interval",
                 f"report  {tmp_path/'my run'/'report.html'}"):
        assert said in out, said
    following = re.search(r"next +(unify_rl .+?)  +\(", out)[1]
    assert shlex.split(following)[:4] == ["unify_rl", "eval", "--policy", str(tmp_path/"my run"/"policy")]
    code, out, _ = shell(*shlex.split(following)[1:], "--prompts", "3")
    assert code == 0 and "shapes-wise" in out

def test_quiet_prints_the_report_only(shell, tiny, tmp_path):
    code, out, err = shell("train", "grpo", "--quiet", "--policy", tiny, *FAST, "steps=1", f"run_dir={tmp_path/'r'}")
    assert (code, out.strip()) == (0, str(tmp_path/"r"/"report.html"))

def test_a_file_of_settings_then_the_command_line(shell, tiny, tmp_path):
    file = tmp_path/"mine.yaml"
    file.write_text("steps: 5\nrollout: {prompts: 3, group_size: 2}\ndata: {tasks: {generate: 1}}\n"
                    "rewards: [{name: strict}]\nevaluate: {suites: []}\n")
    code, out, _ = shell("train", "grpo", "--policy", tiny, "--config", file, "steps=1", f"run_dir={tmp_path/'r'}")
    assert code == 0 and len(read_metrics(tmp_path/"r")) == 1
    assert "prompts: 3" in (tmp_path/"r"/"config.yaml").read_text()

def test_a_used_run_folder_says_how_to_go_on(shell, tiny, run_dir):
    code, _, err = shell("train", "grpo", "--policy", tiny, *FAST, f"run_dir={run_dir}")
    assert code == 2 and "--resume" in err

def test_resume_refuses_other_settings(shell, run_dir):
    code, _, err = shell("train", "grpo", "--resume", f"run_dir={run_dir}", "rollout.group_size=4")
    assert code == 2 and "rollout.group_size: 2 -> 4" in err

def test_resume_of_a_finished_run_shows_it_again(shell, run_dir):
    stamp = (run_dir/"eval"/"after.json").stat().st_mtime_ns
    code, out, _ = shell("train", "grpo", "--resume", f"run_dir={run_dir}")
    assert code == 0 and "95 % interval" in out and (run_dir/"eval"/"after.json").stat().st_mtime_ns == stamp


# -- signals, in a process of their own ----------------------------------------------------------------------------

COMMAND = str(Path(sys.executable).with_name("unify_rl"))

def started(*words):
    return subprocess.Popen([COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def wait_for(process, there, seconds=240):
    "Until `there()`; fail if the process ends or takes too long."
    end = time.monotonic() + seconds
    while not there():
        if process.poll() is not None: pytest.fail(f"ended with {process.returncode}: {process.communicate()}")
        if time.monotonic() > end: process.kill(); pytest.fail("took too long")
        time.sleep(0.1)

@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_says_how_to_continue(which, tiny, tmp_path, shell):
    run_dir = tmp_path/"a run"
    p = started("train", "grpo", "--policy", tiny, *FAST, "steps=100000", "checkpoint.every=0", f"run_dir={run_dir}")
    wait_for(p, lambda: (run_dir/"metrics.jsonl").exists() and (run_dir/"metrics.jsonl").stat().st_size)
    p.send_signal(which)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and "Traceback" not in err
    done = len(read_metrics(run_dir))
    assert list(checkpoints(run_dir/"checkpoints")) == [done] and not (run_dir/"summary.json").exists()
    command = re.search(r"^  (unify_rl train .+)$", out, re.M)[1]
    code, out, _ = shell(*shlex.split(command)[1:], f"steps={done + 1}")             # the printed command works
    assert code == 0 and f"continuing after step {done}" in out and len(read_metrics(run_dir)) == done + 1

def test_a_signal_during_the_first_test_says_how_to_continue(tiny, tmp_path):
    run_dir = tmp_path/"r"
    p = started("train", "grpo", "--policy", tiny, *FAST, "evaluate.prompts=1000", "evaluate.batch=1", f"run_dir={run_dir}")
    wait_for(p, lambda: (run_dir/"config.yaml").exists())
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and f"unify_rl train grpo --resume run_dir={run_dir}" in err and "Traceback" not in err


# -- eval and pretrain ---------------------------------------------------------------------------------------------

def test_eval_scores_every_suite_and_says_what_cannot_be_done(shell, tiny, tmp_path):
    code, out, _ = shell("eval", "--policy", tiny, "--prompts", 6, "--seed", 3, "--json", tmp_path/"scores.json")
    assert code == 0 and "cannot edit pictures" in out
    scores = json.loads((tmp_path/"scores.json").read_text())
    assert (scores["policy"], scores["seed"]) == (tiny, 3)
    assert set(scores["suites"]) == {"shapes-geneval", "shapes-qa", "shapes-wise", "shapes-edit"}
    overall = scores["suites"]["shapes-qa"]["overall"]
    assert overall["n"] == 6 and 0 <= overall["score"] <= 1 and set(scores["suites"]["shapes-edit"]) == {"unsupported"}

def test_eval_is_the_test_of_the_run(shell, run_dir, tmp_path):
    code, _, _ = shell("eval", "--policy", run_dir/"policy", "--suites", "shapes-geneval", "--prompts", 3, "--seed", 1,
                       "--json", tmp_path/"s.json")
    after = json.loads((run_dir/"summary.json").read_text())["suites"]["shapes-geneval"]["overall"]["after"]
    assert code == 0 and json.loads((tmp_path/"s.json").read_text())["suites"]["shapes-geneval"]["overall"]["score"] == after

def test_eval_cannot_write(shell, tiny, tmp_path):
    (tmp_path/"file").write_text("")
    code, _, err = shell("eval", "--policy", tiny, "--suites", "shapes-geneval", "--prompts", 1,
                         "--json", tmp_path/"file"/"s.json")
    assert code == 2 and "cannot write" in err

@pytest.mark.parametrize("name", ["tiny-janus", "tiny-bagel", "tiny-dimoo"])
def test_pretrain_passes_on_what_was_asked_and_says_where_the_model_is(shell, tmp_path, monkeypatch, name):
    import unify_rl.train.pretrain as P
    real = P.pretrain
    def short(name, out, seed, steps, track): return real(name, out, seed, tmp_path/"work", steps, vq_steps=1, track=track)
    monkeypatch.setattr(P, "pretrain", short)
    code, out, _ = shell("pretrain", name, "--steps", 1, "--out", tmp_path/"model")
    assert code == 0 and f"{name} is in {tmp_path/'model'}" in out
    assert load_policy(tmp_path/"model").tasks
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(P, "pretrain", stop)
    code, _, err = shell("pretrain", name)
    assert code == 130 and "the same command continues" in err
