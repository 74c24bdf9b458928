"""Several processes do what one does: data parallel, ZeRO 1 to 3, FSDP; resumed across numbers of processes and stages, with accidents. Two gloo processes on CPUs, started by torchrun."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_worker import lighten

from unify_rl.core import Prompt
from unify_rl.data.pairs import PairSettings, build_pairs
from unify_rl.run import train
from unify_rl.train.checkpoint import checkpoints, load_checkpoint, problem
from unify_rl.train.runlog import read_metrics
from unify_rl.world.scenes import COLORS, SHAPES, Thing, World, render

pytestmark = pytest.mark.slow
SMALL = ["rollout.prompts=6", "rollout.group_size=4", "rollout.max_text=12", "evaluate.suites=[]", "log.groups_every=1", "log.groups_max=2", "checkpoint.every=1", "optimizer.schedule=constant"]
LEAN = ["model.checkpoint_activations=true", "model.logp_chunk=16", "model.precision=bf16"]
ENGINES = {f"{z}": f"engine.zero={z}" for z in range(4)} | {"fsdp": "engine.fsdp=true"}
LVRPO = ["rollout.prompts=6", "rollout.group_size=2", "rollout.max_text=8", "evaluate.suites=[]", "log.groups_every=0", "checkpoint.every=0", "steps=2"]


def launch(tmp: Path, runs: list, processes: int = 2, timeout: float = 1750, **more) -> tuple[int, str, float]:
    "torchrun of the worker: (exit code, what was said, seconds)."
    spec, start = tmp/f"work-{time.monotonic_ns()}.json", time.monotonic()
    spec.write_text(json.dumps(dict(runs=runs, **more)))
    port = 20000 + os.getpid() % 20000
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port),
                           str(Path(__file__).parent/"distributed_worker.py"), str(spec)],
                          capture_output=True, text=True, timeout=timeout, env=os.environ | dict(OMP_NUM_THREADS="1"))
    return done.returncode, done.stderr + done.stdout, time.monotonic() - start


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


@pytest.fixture(scope="module", autouse=True)
def light():
    "As the worker's processes do."
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch.setattr)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    "What runs with an accident are compared with."
    d = tmp_path_factory.mktemp("runs")
    code, err, _ = launch(d, [run(d/"janus-0"), run(d/"janus-2", "engine.zero=2")])
    assert code == 0, err[-3000:]
    return d


@pytest.fixture(scope="module")
def runs(base) -> Path:
    "All runs without accidents, made by one torchrun after another, so that libraries are imported once."
    d = base
    for spec in (run(d/"janus"), run(d/"bagel", recipe="lvrpo", policy="tiny-bagel"), run(d/"uneven", "rollout.prompts=3"), run(d/"lora", "model.lora_rank=4"),
                 run(d/"lean", *LEAN), run(d/"dimoo", policy="tiny-dimoo"), run(d/"one-two", "steps=2"), run(d/"one-fsdp", "steps=2")): train(progress=False, **spec)
    two = [run(d/f"janus-{z}", how) for z, how in ENGINES.items() if z not in ("0", "2")] + [run(d/f"bagel-{z}", how, recipe="lvrpo", policy="tiny-bagel") for z, how in ENGINES.items()]
    two += [run(d/f"{name}-{z}", *more, ENGINES[z]) for name, more in (("uneven", ["rollout.prompts=3"]), ("lora", ["model.lora_rank=4"])) for z in ("0", "3", "fsdp")]
    two += [run(d/"lean-fsdp", *LEAN, ENGINES["fsdp"])]
    two += [run(d/"chunks-3", "model.logp_chunk=16", ENGINES["3"]), run(d/"dimoo-3", "model.logp_chunk=64", ENGINES["3"], policy="tiny-dimoo")]
    two += [run(d/f"uneven-{z}-layer", "rollout.prompts=3", ENGINES[z], "engine.gather=layer") for z in ("3", "fsdp")]
    two += [run(d/"lora-fsdp-layer", "model.lora_rank=4", ENGINES["fsdp"], "engine.gather=layer")]
    two += [run(d/"bagel-3-layer", ENGINES["3"], "engine.gather=layer", recipe="lvrpo", policy="tiny-bagel")]
    two += [run(d/f"halt-{z}", "steps=2", how) for z, how in ENGINES.items()] + [run(d/f"stay-{z}", "steps=2", ENGINES[z]) for z in ("3", "fsdp")]
    code, err, _ = launch(d, two)
    assert code == 0, err[-3000:]
    go_on = {f"halt-{z}": ENGINES[z] for z in "012"} | {f"stay-{z}": ENGINES[z] for z in ("3", "fsdp")}                    # as before
    go_on |= {"halt-3": "engine.zero=0", "halt-fsdp": "engine.zero=3", "one-two": "engine.zero=3", "one-fsdp": "engine.fsdp=true"}       # in another way
    again = [run(d/name, "engine.fsdp=false", "engine.zero=0", how, resume=True) for name, how in go_on.items()]
    code, err, _ = launch(d, again)
    assert code == 0, err[-3000:]
    return d


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("policy", ["janus", "bagel"])
def test_two_processes_do_what_one_does(runs, policy, engine): same(runs/policy, runs/f"{policy}-{engine}")


@pytest.mark.parametrize("engine", ["0", "3", "fsdp"])
@pytest.mark.parametrize("name", ["uneven", "lora"])
def test_uneven_shares_and_adapters(runs, name, engine): same(runs/name, runs/f"{name}-{engine}")


@pytest.mark.parametrize("name", ["uneven-3", "uneven-fsdp", "lora-fsdp", "bagel-3"])
def test_layer_by_layer_the_same_is_drawn(runs, name):
    "Weights gathered for a whole rollout, or each layer's while a pass is in it: the same numbers, to the last bit. Answers end at different times in the two processes, and of three prompts one has two."
    assert numbers(runs/name) == numbers(runs/f"{name}-layer")


@pytest.mark.parametrize("one, two", [("janus", "chunks-3"), ("dimoo", "dimoo-3")])
def test_a_head_that_is_asked_more_often_in_one_process(runs, one, two):
    "Log-probabilities in chunks: a process with longer answers has more of them, so that weights gathered by each call of the head made ZeRO 3 wait for ever."
    same(runs/one, runs/two)


def test_pieces_gathered_in_16_bits_and_activations_that_are_recomputed(runs):
    "FSDP sums gradients in fp32 that were made in bf16, piece by piece: 8 bits of a number are kept, so to a few percent of the gradient's norm."
    same(runs/"lean", runs/"lean-fsdp", 0.03)


@pytest.mark.parametrize("halted, whole", [("halt-0", "janus-0"), ("halt-1", "janus-1"), ("halt-2", "janus-2"), ("stay-3", "janus-3"), ("stay-fsdp", "janus-fsdp")])
def test_resumed_it_is_the_same_run(runs, halted, whole):
    "Stopped after two steps and continued by as many processes in the same stage: the uninterrupted run's numbers, to the last bit."
    assert numbers(runs/halted) == numbers(runs/whole)


def test_resumed_in_another_stage_and_by_other_numbers_of_processes(runs):
    same(runs/"janus", runs/"halt-3")                       # ZeRO 3 on two, then data parallel on two
    same(runs/"janus", runs/"one-two")                      # one process, then ZeRO 3 on two
    same(runs/"janus", runs/"halt-fsdp")                    # FSDP on two, then ZeRO 3 on two
    same(runs/"janus", runs/"one-fsdp")                     # one process, then FSDP on two


def test_one_process_goes_on_where_two_stopped(runs, tmp_path):
    "They had ZeRO 3, and FSDP."
    code, err, _ = launch(tmp_path, [run(tmp_path/z, "steps=2", ENGINES[z]) for z in ("3", "fsdp")])
    assert code == 0, err[-3000:]
    for z in ("3", "fsdp"):
        train(progress=False, **run(tmp_path/z, "engine.zero=0", "engine.fsdp=false", resume=True))
        same(runs/"janus", tmp_path/z)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_policy_is_written_in_its_own_layout(runs, engine):
    from safetensors.torch import load_file
    one, two = (load_file(runs/name/"policy"/"model.safetensors") for name in ("janus", f"janus-{engine}"))
    assert one.keys() == two.keys()
    assert max(float((one[k].float() - two[k].float()).abs().max()) for k in one) < 1e-5


@pytest.mark.parametrize("zero", ["2", "3"])
def test_the_written_policy_is_what_the_optimizer_works_on(tmp_path, zero):
    "ZeRO computes with copies of 16 bits; a learning rate whose work is below their last digit is in the written policy, as it is in the checkpoint. And no library warns of its future."
    from safetensors.torch import load_file
    code, err, _ = launch(tmp_path, [run(tmp_path/"a", "steps=1", "optimizer.lr=1e-6", "model.precision=bf16", ENGINES[zero], "evaluate.suites=[shapes-qa]", "evaluate.prompts=4")])
    assert code == 0 and "FutureWarning" not in err, err[-3000:]
    _, state, _ = load_checkpoint(tmp_path/"a"/"checkpoints")
    written = load_file(tmp_path/"a"/"policy"/"model.safetensors")
    same = [torch.equal(written[k], w) for name, w in state["params"].items() if (k := name.removeprefix("model.")) in written]
    assert len(same) > 10 and all(same)


# -- a test before and after, and pairs
TESTED = ["evaluate.suites=[shapes-geneval, shapes-qa]", "evaluate.prompts=12", "evaluate.batch=5", "steps=1"]
PAIRED = ["rollout.prompts=8", "evaluate.suites=[]", "optimizer.schedule=constant", "rollout.max_text=12", "rollout.group_size=4", "steps=2", "rewards=[{name: accuracy, weight: 1.0}, {name: hps, weight: 1.0}]"]


def verdicts(folder: Path, name: str) -> dict:
    "What was judged of each prompt of each suite."
    return json.loads((folder/"eval"/f"{name}.json").read_text())


def half(i: int, task: str) -> Prompt:
    "A question about a picture of one thing, or a sentence that draws it."
    scene = (Thing(SHAPES[i % 4], list(COLORS)[i % 6], 4 * (i % 5), 4 * (i // 5 % 5)),)
    image = render(scene, World())
    own = dict(image=image, answer="yes") if task == "answer" else dict(reference=image)
    return Prompt(f"{task}/{i}", task, f"is there a {SHAPES[i % 4]} here" if task == "answer" else f"a {SHAPES[i % 4]}", category=SHAPES[i % 4], meta=dict(scene=scene), **own)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    "A folder of pairs, as `unify_rl pairs build` makes them."
    folder = tmp_path_factory.mktemp("pairs")
    build_pairs([half(3 * i, "answer") for i in range(20)], [half(3 * i + 1, "generate") for i in range(20)], folder, PairSettings(clusters=6), "layout")
    return folder


@pytest.fixture(scope="module")
def further(tmp_path_factory, pairs) -> Path:
    "A run that is tested before and after, and one on pairs, by one process and by two."
    d = tmp_path_factory.mktemp("further")
    def both(where): return [run(d/f"tested-{where}", *TESTED), dict(recipe="pairuni", policy="tiny-janus", overrides=[f"run_dir={d}/pairs-{where}", *PAIRED, f"data.path={pairs}"])]
    for spec in both("one"): train(progress=False, **spec)
    code, err, _ = launch(d, [*both("two"), run(d/"tested-layer", *TESTED, ENGINES["fsdp"], "engine.gather=layer")])
    assert code == 0, err[-3000:]
    return d


def test_a_test_is_shared_out_and_its_verdicts_are_the_same(further):
    "12 prompts a suite in batches of 5, two for one process and one for the other: the verdicts of each prompt before and after, in the order that one process has them in."
    for other in ("two", "layer"):
        same(further/"tested-one", further/f"tested-{other}")
        for name in ("before", "after"):
            one, two = (verdicts(further/f"tested-{where}", name) for where in ("one", other))
            assert [len(s["rows"]) for s in one.values()] == [12, 12] and one == two


def test_pairs_by_two_processes_as_by_one(further): same(further/"pairs-one", further/"pairs-two")


# -- accidents: what happens, and what is lost
def healed(d: Path, *settings: str) -> list[dict]:
    "Continue the run of an accident by two processes, to its end."
    code, err, _ = launch(d, [run(d/"a", *settings, resume=True)])
    assert code == 0, err[-3000:]
    return numbers(d/"a")


@pytest.mark.parametrize("where, saved", [("_sample", 1), ("_update", 1), ("_metrics", 2), ("save", 1)])
def test_a_killed_process_costs_the_step_in_flight(base, tmp_path, where, saved):
    "kill -9 of the second process while it samples, updates, has updated, or saves, in its second step: the other ends, and a resumed run is the uninterrupted one."
    step = 2 if where in ("save", "_metrics") else 1                    # in these two the counter has moved on
    code, err, seconds = launch(tmp_path, [run(tmp_path/"a")], accident=dict(rank=1, step=step, where=where, how="kill"))
    assert code != 0 and seconds < 1200
    assert max(checkpoints(tmp_path/"a"/"checkpoints")) in (1, 2)
    assert healed(tmp_path) == numbers(base/"janus-0")


def test_a_process_killed_while_it_scores(base, tmp_path):
    code, _, seconds = launch(tmp_path, [run(tmp_path/"a", "engine.zero=2")], accident=dict(rank=0, step=1, where="_score_reference", how="kill"))
    assert code != 0 and seconds < 1200
    assert healed(tmp_path, "engine.zero=2") == numbers(base/"janus-2")


def test_a_signal_to_one_process_stops_all_and_saves(base, tmp_path):
    code, err, _ = launch(tmp_path, [run(tmp_path/"a", "checkpoint.every=0")], accident=dict(rank=1, step=1, where="_update", how="term"))
    assert code == 0, err[-3000:]
    assert list(checkpoints(tmp_path/"a"/"checkpoints")) == [2] and len(numbers(tmp_path/"a")) == 2 and not (tmp_path/"a"/"summary.json").exists()
    assert healed(tmp_path) == numbers(base/"janus-0")


def test_a_signal_to_the_whole_group_stops_all_and_saves(base, tmp_path):
    "As a queue sends it: a process is told, and torchrun, which tells all processes."
    launch(tmp_path, [run(tmp_path/"a", "checkpoint.every=0")], accident=dict(rank=1, step=1, where="_update", how="group"))
    assert list(checkpoints(tmp_path/"a"/"checkpoints")) == [2] and len(numbers(tmp_path/"a")) == 2
    assert healed(tmp_path) == numbers(base/"janus-0")


def test_a_signal_to_one_process_after_the_vote_counts_in_the_next(base, tmp_path):
    "While a checkpoint is saved: the process does not leave alone, and both stop after the next step."
    code, err, _ = launch(tmp_path, [run(tmp_path/"a")], timeout=400, accident=dict(rank=1, step=1, where="save", how="term"))
    assert code == 0, err[-3000:]
    assert list(checkpoints(tmp_path/"a"/"checkpoints")) == [1, 2] and len(numbers(tmp_path/"a")) == 2
    assert healed(tmp_path) == numbers(base/"janus-0")


@pytest.mark.parametrize("engine", ["0", "fsdp"])
def test_a_signal_to_one_process_in_a_test_stops_all_and_keeps_the_suites_that_are_done(further, tmp_path, engine):
    "In the second suite of the test before: no process is left waiting, one of them says how to continue, and nothing is tested twice."
    more = ["engine.gather=layer"] * (engine == "fsdp")
    code, err, _ = launch(tmp_path, [run(tmp_path/"a", *TESTED, ENGINES[engine], *more) | dict(progress=True)], accident=dict(rank=1, step=2, where="evaluate", how="term"))
    assert code == 0 and "Traceback" not in err, err[-3000:]
    assert list(verdicts(tmp_path/"a", "before")) == ["shapes-geneval"] and not numbers(tmp_path/"a")
    assert err.count("stopped in the test 'before', suite shapes-qa; what was finished is saved. Continue with") == 1
    assert f"\n  torchrun --nproc_per_node 2 -m unify_rl train grpo --resume run_dir={tmp_path/'a'}\n" in err and err.count("--resume") == 1
    kept = (tmp_path/"a"/"eval"/"before.json").read_bytes()
    healed(tmp_path, *TESTED, ENGINES[engine], *more)
    assert kept[:-1] == (tmp_path/"a"/"eval"/"before.json").read_bytes()[:len(kept) - 1]
    for name in ("before", "after"): assert verdicts(tmp_path/"a", name) == verdicts(further/"tested-two", name)


def test_a_disk_that_is_full_ends_all_and_costs_no_checkpoint(base, tmp_path):
    "Half of a file is written in the second checkpoint: all processes end with the same words, the first checkpoint is whole, and nothing half is left beside it."
    code, err, seconds = launch(tmp_path, [run(tmp_path/"a")], accident=dict(rank=0, step=2, where="save", how="full"))
    assert code != 0 and seconds < 1200
    for r in range(2): assert re.search(rf"process {r}: cannot save the checkpoint .*step-00000002: No space left on device. Older checkpoints are untouched", err), err[-3000:]
    (step, folder), = checkpoints(tmp_path/"a"/"checkpoints").items()
    assert step == 1 and not problem(folder) and [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert healed(tmp_path) == numbers(base/"janus-0")


def test_all_fall_back_to_the_same_checkpoint_and_say_so(base, tmp_path):
    "The newest checkpoint is cut short: both processes continue after the one before it, are told why, and come to the same end."
    shutil.copytree(base/"janus-0", tmp_path/"a")
    newest = max(checkpoints(tmp_path/"a"/"checkpoints").items())[1]
    file = newest/"tensors-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, err, _ = launch(tmp_path, [run(tmp_path/"a", resume=True)])
    assert code == 0, err[-3000:]
    for r in range(2): assert re.search(rf"process {r} continues after step 2: .*step-00000003 cannot be used: tensors-00000.safetensors has .* bytes.*went back to step 2", err), err[-3000:]
    assert numbers(tmp_path/"a") == numbers(base/"janus-0")
    assert [problem(p) for p in checkpoints(tmp_path/"a"/"checkpoints").values()] == ["", ""]


def test_no_checkpoint_that_verifies_ends_all(base, tmp_path):
    shutil.copytree(base/"janus-0", tmp_path/"a")
    for folder in checkpoints(tmp_path/"a"/"checkpoints").values(): (folder/"manifest.json").unlink()
    code, err, seconds = launch(tmp_path, [run(tmp_path/"a", resume=True)])
    assert code != 0 and seconds < 1200
    for r in range(2): assert re.search(rf"process {r}: .*manifest.json is missing.*None is left", err), err[-3000:]


def test_one_process_fails_and_the_other_does_not_wait_for_ever(tmp_path):
    code, err, seconds = launch(tmp_path, [run(tmp_path/"a")], accident=dict(rank=1, step=1, where="_metrics", how="raise"))
    assert code != 0 and seconds < 1200 and "process 1: the scorer's disk is gone" in err


@pytest.mark.parametrize("engine", ["0", "2", "3", "fsdp"])
def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path, engine):
    code, err, _ = launch(tmp_path, [run(tmp_path/"a", ENGINES[engine])], accident=dict(rank=1, step=1, where="_update", how="nan"))
    assert code == 0, err[-3000:]
    assert [m["steps/skipped"] for m in numbers(tmp_path/"a")] == [0, 1, 0]
