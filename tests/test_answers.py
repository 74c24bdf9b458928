"Answers compared by meaning: lists, units, percent, mathematics, and a check that can neither hang nor lose a run."
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from unify_rl.core import Prompt, Rollout, UserError
from unify_rl.rewards import answers
from unify_rl.rewards.answers import (LONGEST, MathsCheck, Unreadable, _same_expression, looks_like_maths, normalize, readings,
                                      same_answer, same_meaning, to_latex)
from unify_rl.rewards.verifiable import build_rewards, check_prompts, score

@pytest.mark.parametrize("given, truth", [
    ("5 cm", "5cm"), ("5 meters", "5 m"), ("5", "5 m"), ("20 degrees", "20°"), ("20^\\circ", "20°"), ("3 hours", "3 h"), ("12 square meters", "12 m²"),
    ("60 kph", "60 km/h"), ("$5", "5 dollars"), ("€5", "5 euros"), ("50%", "0.5"), ("0.125", "12.5 %"), ("50\\%", "50%"), ("1,234,567.5", "1234567.5"),
    ("1{,}000", "1000"), ("1e3", "1000"), ("2.5e-1", ".25"), ("\\boxed{7}", "7"), ("$7$", "7"), ("\\text{red}", "red"), ("-.5", "-0.50"), ("½", "1/2"),
    ("1, 2 and 3", "1,2,3"), ("1; 2; 3", "1, 2, 3"), ("1, 2, and 3", "1,2,3"), ("(1, 2)", "1,2"), ("[1, 2]", "1, 2"), ("{1, 2}", "{2, 1}"), ("2, 1", "{1, 2}"),
    ("\\{1,2\\}", "{1, 2}"), ("{1, 1, 2}", "{1, 2}"), ("(1, 2), (3, 4)", "(1,2),(3,4)"), ("100, 200", "100,200"), ("1,000, 2,000", "1000, 2000"),
    ("red, blue", "red and blue"), ("3 cm, 4 cm", "3cm and 4cm"), ("0.1", "0.10"), ("Washington D.C.", "Washington, D.C.")])
def test_same(given, truth): assert same_answer(given, truth)

@pytest.mark.parametrize("given, truth", [
    ("5 m", "5 cm"), ("5 km/h", "5 m/s"), ("5 m", "5 m2"), ("20 °C", "20 °F"), ("$5", "€5"), ("50%", "0.05"), ("50%", "500"), ("1,23", "123"), ("1e3", "100"),
    ("3, 2, 1", "1, 2, 3"), ("1, 2", "1, 2, 3"), ("1, 2, 3", "1, 2"), ("1, 2", "1"), ("1", "1, 2"), ("{1, 2}", "{1, 3}"), ("{1}", "{1, 2}"), ("{1, 1}", "{1, 2}"),
    ("{2, 1}", "1, 2"), ("(1, 2)", "[1, 2]"), ("[1, 2)", "1, 2"), ("(1, 2), (4, 3)", "(1,2),(3,4)"), ("blue, red", "red, blue"), ("3 cm, 4 cm", "3 cm, 4 m"),
    ("1, 2", "1 2"), ("0.30000000000000004", "0.3"), ("", "{}"), (",", "1, 2")])
def test_not_the_same(given, truth): assert not same_answer(given, truth)

@pytest.mark.parametrize("text", ["(" * 5000, "{" * 400 + "}" * 400, "1," * 5000, "$" * 5000, "a " * 5000, "3" * 5000 + " cm", "0." + "3" * 5000, "1e999999",
                                  "\\text{" * 900, "\\a" * 3000, "(1, " * 120 + "2" + ")" * 120, "\x00", "\ud800", "\\", "%", "°", "1" + ",000" * 4000])
def test_hostile_text_is_compared_quickly(text):
    start = time.process_time()
    for other in ("3", "1, 2", "{1, 2}", "red"): assert not same_answer(text, other) and not same_answer(other, text)
    assert time.process_time() - start < 2

# -- mathematics, in this process: only what is known to be harmless

maths = pytest.importorskip("math_verify") and (lambda given, truth: same_meaning(given, truth, _same_expression))

@pytest.mark.parametrize("given, truth", [
    ("1/2", "0.5"), ("\\dfrac{1}{2}", "0.5"), ("x=1/2", "0.5"), ("0.5", "x = \\frac12"), ("-1/2", "-\\frac{1}{2}"), ("(1/2)", "\\frac12"), ("((1/2))", "0.5"),
    ("2**10", "1024"), ("2^(5+5)", "2^{10}"), ("sqrt(8)", "2\\sqrt2"), ("√8", "2 sqrt 2"), ("2*pi", "2\\pi"), ("2π", "2pi"), ("1 1/2", "\\frac32"), ("1½", "1.5"),
    ("1,000/2", "500"), ("3 × 10^3", "3000"), ("\\frac{1}{2}\\%", "0.5%"), ("\\frac{100}{2}%", "0.5"), ("1/2 cm", "0.5 cm"), ("1/2", "0.5 cm"), ("100!", "99! * 100"),
    ("[1/2, \\infty)", "[0.5, ∞)"), ("\\{1/2, 1\\}", "{1, 0.5}"), ("x >= 2", "2 ≤ x"), ("x = 4/2 = 2", "6/3")])
def test_equal_as_mathematics(given, truth): assert maths(given, truth)

@pytest.mark.parametrize("given, truth", [
    ("1/3", "0.333333"), ("0.3333333", "\\frac13"), ("x=2/1", "y=2"), ("4 = 5/1", "5"), ("1/2 m", "0.5 cm"), ("1/2, 1", "1, 0.5"), ("(1/2, 1)", "(0.5, 1]"),
    ("(-\\infty, 1)", "(\\infty, 1)"), ("tea", "eat"), ("2^10", "1023+2"), ("0.0000001", "1/10^{10}")])
def test_not_equal_as_mathematics(given, truth): assert not maths(given, truth)

@pytest.mark.parametrize("given", ["3 4", "5 or 1/2", "not sure", "1.2.3/2", "\\frac{1}{", "__import__('os').system('true')", "(1).__class__", "lambda: 0", "x" * 99])
def test_what_is_no_mathematics_is_not_guessed_at(given):
    with pytest.raises(Unreadable) as e: maths(given, "\\frac12")
    assert e.value.args[0] == "given"

def test_only_numbers_reach_eval(monkeypatch):
    "sympy reads strings by eval; the grammar gives it number tokens and nothing else."
    from sympy.parsing import sympy_parser
    read, seen = sympy_parser.parse_expr, []
    monkeypatch.setattr(sympy_parser, "parse_expr", lambda text, *a, **k: seen.append(text) or read(text, *a, **k))
    monkeypatch.setattr("math_verify.parser.parse_expr", lambda *_, **__: pytest.fail("the reader that evaluates"))
    assert maths("sqrt(18)/2+x", "x+\\frac{3}{2}\\sqrt{2}") and not maths("2\\sin(x)+f(3.5)", "\\frac12")
    assert seen and all(re.fullmatch(r"\d+|\d*\.\d+", text) for text in seen)

# -- the process

@pytest.fixture(scope="module")
def check():
    check = MathsCheck(2)
    yield check
    check.close()

def test_verdicts_from_the_process(check):
    assert check("1/2", "0.5") == (True, "equal as mathematics") and check("1/3", "\\frac12") == (False, "not equal as mathematics")
    verdict, why = check("\\frac{1}{", "\\frac12")
    assert verdict is False and "cannot be read" in why
    verdict, why = check("0.5", "\\frac{1}{")                                          # a key that never parses is nobody's wrong answer
    assert verdict is None and "cannot be read" in why
    assert check.key_problem("\\frac{1}{") and check.key_problem("1, \\frac{1}{")
    assert [check.key_problem(t) for t in ("red", "5", "5 cm", "left of", "\\frac12", "1, \\frac12", "x=2", "red, blue")] == [""] * 8

@pytest.mark.parametrize("given, verdict", [("", False), ("  ", False), (None, False), (3, False), ("1" * (LONGEST + 1), False)])
def test_bad_answers(check, given, verdict): assert check(given, "\\frac12")[0] is verdict

@pytest.mark.parametrize("truth", ["", None, 3, "1/" * LONGEST])
def test_bad_keys(check, truth): assert check("1/2", truth)[0] is None and check("1/2", truth)[1]

@pytest.mark.parametrize("given", ["9**9**9**9", "10^{10^{10}}", "(" * 60 + "1/2" + ")" * 59, "\\sqrt{" * 60 + "2" + "}" * 60, "x^" * 100 + "2", "{" * 200])
def test_enormous_expressions_end_in_time(check, given):
    check._known.clear()
    assert check("1/7", "\\frac{2}{14}")[0] is True                                    # it runs
    start = time.monotonic()
    assert check(given, "\\frac{10^2}{3}")[0] in (False, None) and time.monotonic() - start < 5 * check.seconds + 2
    assert check("3/6", "\\frac{1}{2}")[0] is True                                    # and goes on

@pytest.mark.parametrize("sign, words", [(signal.SIGSTOP, "did not answer"), (signal.SIGKILL, "ended"), (signal.SIGPROF, "took more than")])
def test_a_hang_a_crash_and_too_long_are_no_verdict_in_any_thread(sign, words):
    check, got = MathsCheck(2), []
    assert check("x/2", "0.5x")[0] is True
    check.seconds = 0.3
    def ask():
        with check._lock: pass
        got.append(check("x/3", "0.5x"))
    os.kill(check._process.pid, sign); time.sleep(0.1)
    if sign != signal.SIGSTOP: check._process.poll = lambda: None                     # found out while asking, not before
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join(30)
    assert len(got) == 3 and got[0][0] is None and words in got[0][1] and got == [got[0]] * 3            # and remembered
    check.seconds = 2
    assert check("2x/4", "0.5x")[0] is True
    check.close()

def test_the_process_ends_with_its_parent():
    code = ("from unify_rl.rewards.answers import MathsCheck; import os, signal; c = MathsCheck(); c('x/2', '0.5x')\n"
            "print(c._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).stdout)
    for _ in range(100):
        try: os.kill(child, 0); time.sleep(0.1)
        except ProcessLookupError: return
        if " Z " in (open(f"/proc/{child}/stat").read() if os.path.exists(f"/proc/{child}/stat") else ""): return
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the process outlived its parent")

def test_a_broken_installation_masks_and_is_not_remembered(monkeypatch):
    check = MathsCheck(2)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert check("x/2", "0.5x")[0] is None and "could not be started" in check("x/2", "0.5x")[1]
    monkeypatch.undo()
    assert check("x/2", "0.5x")[0] is True
    check.close()

@pytest.mark.parametrize("seconds", [0, -1, "2", None, True, float("nan"), float("inf")])
def test_bad_seconds(seconds):
    with pytest.raises(UserError, match="number above 0"): MathsCheck(seconds)

def test_without_the_library_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(answers, "find_spec", lambda name: None)
    build_rewards([dict(name="accuracy")])
    with pytest.raises(UserError, match="pip install"): build_rewards([dict(name="accuracy", settings=dict(maths=True))])

def test_nothing_is_imported_unless_asked():
    code = ("import sys; from unify_rl.rewards.answers import same_answer; assert same_answer('0.5', '50%')\n"
            "assert not {'torch', 'sympy', 'math_verify', 'antlr4'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})

# -- the reward

def question(key, **more): return Prompt(f"q/{key}", "answer", "how much?", answer=key, **more)
def reply(answer): return f"<think></think><answer>{answer}</answer>"

def test_the_reward_masks_what_has_no_verdict():
    reward = build_rewards([dict(name="accuracy", settings=dict(maths=True, seconds=2))])[0]
    prompts = [question("\\frac{1}{2}"), question("\\frac{1}{2}"), question("\\frac{1}{"), question("\\frac{1}{"), question("B", choices=("1", "2"))]
    texts = [reply("2^{-1}"), reply("1/3"), reply("0.5"), reply("\\frac{1}{"), reply("4/2")]
    table = score(reward, prompts, Rollout(prompts, 1, [], texts, [None] * 5))
    assert table.scores_RB[0].isnan().tolist() == [False, False, True, False, False]
    assert table.scores_RB[0, [0, 1, 3, 4]].tolist() == [1, 0, 1, 0] and table.errors == {"accuracy": 1}
    assert "cannot be read" in table.reasons[0][2] and "equal as mathematics" in table.reasons[0][0]
    with pytest.raises(UserError, match="cannot be read"): check_prompts([question("\\frac{1}{")], reward)
    check_prompts([question("\\frac{1}{")], build_rewards([dict(name="accuracy")])[0])
    check_prompts([question("\\frac{1}{2}"), question("red"), question("5 cm")], reward)

def test_settings_are_checked():
    with pytest.raises(UserError, match="Did you mean 'maths'"): build_rewards([dict(name="accuracy", settings=dict(math=True))])
    with pytest.raises(UserError, match="seconds"): build_rewards([dict(name="accuracy", settings=dict(maths=True, seconds=0))])
