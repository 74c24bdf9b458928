"""Several processes do what one does: data parallel and ZeRO 1 to 3, resumed across numbers of processes and stages, with accidents. Two gloo processes on CPUs, started by torchrun."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unify_rl.run import train
from unify_rl.train.checkpoint import checkpoints
from unify_rl.train.runlog import read_metrics

pytestmark = pytest.mark.slow
SMALL = ["rollout.prompts=6", "rollout.group_size=4", "rollout.max_text=12", "evaluate.suites=[]", "log.groups_every=1", "log.groups_max=2", "checkpoint.every=1", "optimizer.schedule=constant"]
LVRPO = ["rollout.prompts=6", "rollout.group_size=2", "rollout.max_text=8", "evaluate.suites=[]", "log.groups_every=0", "checkpoint.every=0", "steps=2"]


def launch(tmp: Path, runs: list, processes: int = 2, timeout: float = 900, **more) -> tuple[int, str, float]:
    "torchrun of the worker: (exit code, stderr, seconds)."
    spec, start = tmp/f"work-{time.monotonic_ns()}.json", time.monotonic()
    spec.write_text(json.dumps(dict(runs=runs, **more)))
    port = 20000 + os.getpid() % 20000
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port),
                           str(Path(__file__).parent/"distributed_worker.py"), str(spec)],
                          capture_output=True, text=True, timeout=timeout, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return done.returncode, done.stderr, time.monotonic() - start


def run(folder: Path, *settings: str, recipe: str = "grpo", policy: str = "tiny-janus", resume: bool = False) -> dict:
    "One run, as `train` takes it."
    base = LVRPO if recipe == "lvrpo" else [*SMALL, "steps=3"]
    return dict(recipe=recipe, policy=policy, resume=resume, overrides=[f"run_dir={folder}", *base, *settings])


def numbers(folder: Path) -> list[dict]:
    "The metrics of each step, without times."
    return [{k: v for k, v in m.items() if not k.startswith("seconds/")} for m in read_metrics(folder)]


def same(a: Path, b: Path, tolerance: float = 2e-5) -> None:
    "The same numbers in each step; a `None` (nothing to average) is one on both sides."
    for x, y in zip(numbers(a), numbers(b), strict=True):
        assert x.keys() == y.keys()
        for k, v in x.items(): assert y[k] == (v if v is None or isinstance(v, (str, list)) else pytest.approx(v, rel=tolerance, abs=tolerance)), (k, x["step"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    "All runs without accidents, made by one torchrun after another, so that libraries are imported once."
    d = tmp_path_factory.mktemp("runs")
    for spec in (run(d/"janus"), run(d/"bagel", recipe="lvrpo", policy="tiny-bagel"), run(d/"uneven", "rollout.prompts=3"), run(d/"lora", "model.lora_rank=4"),
                 run(d/"one-two", "steps=2")): train(progress=False, **spec)
    two = [run(d/f"janus-{z}", f"engine.zero={z}") for z in range(4)] + [run(d/f"bagel-{z}", f"engine.zero={z}", recipe="lvrpo", policy="tiny-bagel") for z in range(4)]
    two += [run(d/f"uneven-{z}", "rollout.prompts=3", f"engine.zero={z}") for z in (0, 3)] + [run(d/"lora-3", "model.lora_rank=4", "engine.zero=3")]
    two += [run(d/f"halt-{z}", "steps=2", f"engine.zero={z}") for z in range(4)]
    code, err, _ = launch(d, two)
    assert code == 0, err[-3000:]
    again = [run(d/f"halt-{z}", f"engine.zero={z}", resume=True) for z in range(3)] + [run(d/"halt-3", "engine.zero=0", resume=True), run(d/"one-two", "engine.zero=3", resume=True)]
    code, err, _ = launch(d, again)
    assert code == 0, err[-3000:]
    return d


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("policy", ["janus", "bagel"])
def test_two_processes_do_what_one_does(runs, policy, zero): same(runs/policy, runs/f"{policy}-{zero}")


@pytest.mark.parametrize("name, other", [("uneven", "uneven-0"), ("uneven", "uneven-3"), ("lora", "lora-3")])
def test_uneven_shares_and_adapters(runs, name, other): same(runs/name, runs/other)


@pytest.mark.parametrize("zero", range(3))
def test_resumed_it_is_the_same_run(runs, zero):
    "Stopped after two steps and continued by as many processes in the same stage: the uninterrupted run's numbers, to the last bit."
    assert numbers(runs/f"halt-{zero}") == numbers(runs/f"janus-{zero}")


def test_resumed_in_another_stage_and_by_other_numbers_of_processes(runs):
    same(runs/"janus", runs/"halt-3")                       # ZeRO 3 on two, then data parallel on two
    same(runs/"janus", runs/"one-two")                      # one process, then ZeRO 3 on two


def test_one_process_goes_on_where_two_with_zero_3_stopped(runs, tmp_path):
    code, err, _ = launch(tmp_path, [run(tmp_path/"a", "steps=2", "engine.zero=3")])
    assert code == 0, err[-3000:]
    train(progress=False, **run(tmp_path/"a", "engine.zero=0", resume=True))
    same(runs/"janus", tmp_path/"a")


@pytest.mark.parametrize("zero", [0, 3])
def test_the_policy_is_written_in_its_own_layout(runs, zero):
    from safetensors.torch import load_file
    one, two = (load_file(runs/name/"policy"/"model.safetensors") for name in ("janus", f"janus-{zero}"))
    assert one.keys() == two.keys()
    assert max(float((one[k].float() - two[k].float()).abs().max()) for k in one) < 1e-5


# -- accidents: what happens, and what is lost
def healed(d: Path, *settings: str) -> list[dict]:
    "Continue the run of an accident by two processes, to its end."
    code, err, _ = launch(d, [run(d/"a", *settings, resume=True)])
    assert code == 0, err[-3000:]
    return numbers(d/"a")


@pytest.mark.parametrize("where, saved", [("_sample", 1), ("_update", 1), ("_metrics", 2), ("save", 1)])
def test_a_killed_process_costs_the_step_in_flight(runs, tmp_path, where, saved):
    "kill -9 of the second process while it samples, updates, has updated, or saves, in its second step: the other ends, and a resumed run is the uninterrupted one."
    step = 2 if where in ("save", "_metrics") else 1                    # in these two the counter has moved on
    code, err, seconds = launch(tmp_path, [run(tmp_path/"a")], accident=dict(rank=1, step=step, where=where, how="kill"))
    assert code != 0 and seconds < 120
    assert max(checkpoints(tmp_path/"a"/"checkpoints")) in (1, 2)
    assert healed(tmp_path) == numbers(runs/"janus-0")


def test_a_process_killed_while_it_scores(runs, tmp_path):
    code, _, seconds = launch(tmp_path, [run(tmp_path/"a", "engine.zero=2")], accident=dict(rank=0, step=1, where="_score_reference", how="kill"))
    assert code != 0 and seconds < 120
    assert healed(tmp_path, "engine.zero=2") == numbers(runs/"janus-2")


def test_a_signal_to_one_process_stops_all_and_saves(runs, tmp_path):
    code, err, _ = launch(tmp_path, [run(tmp_path/"a", "checkpoint.every=0")], accident=dict(rank=1, step=1, where="_update", how="term"))
    assert code == 0, err[-3000:]
    assert list(checkpoints(tmp_path/"a"/"checkpoints")) == [2] and len(numbers(tmp_path/"a")) == 2 and not (tmp_path/"a"/"summary.json").exists()
    assert healed(tmp_path) == numbers(runs/"janus-0")


def test_one_process_fails_and_the_other_does_not_wait_for_ever(tmp_path):
    code, err, seconds = launch(tmp_path, [run(tmp_path/"a")], accident=dict(rank=1, step=1, where="_metrics", how="raise"))
    assert code != 0 and seconds < 120 and "process 1: the scorer's disk is gone" in err


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path, zero):
    code, err, _ = launch(tmp_path, [run(tmp_path/"a", f"engine.zero={zero}")], accident=dict(rank=1, step=1, where="_update", how="nan"))
    assert code == 0, err[-3000:]
    assert [m["steps/skipped"] for m in numbers(tmp_path/"a")] == [0, 1, 0]
