"""Merging: the rules against loops and hand-made numbers, whole folders in every layout, and what must be refused."""
import json
import math
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import unify_rl.train.merge as merge
from unify_rl.cli import main
from unify_rl.core import UserError
from unify_rl.policies.janus import new_janus
from unify_rl.policies.load import find_policy, load_policy
from unify_rl.train.merge import METHODS, average, gaussian, merge_policies, merge_tensor, norm_weighted, read_header, task_vectors
from unify_rl.train.pretrain import vocabulary

T = torch.tensor


def weights(folder): return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def child(base, out, seed, share=1.0, dtype=None):
    "A copy of a policy folder with noise on its weights, in one file."
    gen = torch.Generator().manual_seed(seed)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    noisy = lambda w: w + 0.01 * torch.randn(w.shape, generator=gen) * (torch.rand(w.shape, generator=gen) < share) if w.is_floating_point() else w
    moved = {k: noisy(w) for k, w in weights(base).items()}
    save_file({k: w.to(dtype) if dtype and w.is_floating_point() else w for k, w in moved.items()}, out/"model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    "A small base and two policies that come from it."
    home = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    new_janus(vocabulary(), layers=1, hidden=32).save_pretrained(home/"base")
    return home/"base", child(home/"base", home/"a", 1), child(home/"base", home/"b", 2)


# ---- the rules ----

def test_four_numbers_by_hand():
    a, b = T([8., 0., 1., -1.]), T([1., 0., -1., 4.])
    assert average([a, b]).tolist() == [4.5, 0, 0, 1.5] and task_vectors([a, b], 0.5).tolist() == [4.5, 0, 0, 1.5]
    assert task_vectors([a, b]).tolist() == [9, 0, 0, 3]
    assert gaussian([a, b]).tolist() == [8.5, 0, 0, 1.5]                                    # the bell reaches from -2.82 to 5.82
    assert gaussian([a, b], width=0.5).tolist() == [8.5, 0, -0.5, 3.0]                      # 0.42 to 2.58: only 1 and 1 are common
    na, nb = math.sqrt(66), math.sqrt(18)
    assert torch.allclose(norm_weighted([a, b]), (nb * a + na * b) / (na + nb))


def test_the_bell_by_hand():
    "Eight numbers, mean 1, deviation sqrt(8): one outlier."
    d, e = T([8., 0, 0, 0, 0, 0, 0, 0]), torch.zeros(8)
    assert gaussian([d, d]).tolist() == [16.] + [0] * 7                                     # the authors' rule adds up what both have learned
    assert gaussian([d, d], overlap="mean").tolist() == d.tolist()
    assert gaussian([d, e]).tolist() == d.tolist() and gaussian([d, e], overlap="mean").tolist() == d.tolist()
    assert gaussian([d, d], width=3.0).tolist() == d.tolist()                               # now nothing is special: an average


@pytest.mark.parametrize("overlap", ["add", "mean"])
@pytest.mark.parametrize("n", [2, 3])
def test_gaussian_against_a_loop(n, overlap):
    deltas = [torch.randn(500, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i in range(n)]
    mu = sum(sum(d.tolist()) / 500 for d in deltas) / n
    sigma = min(math.sqrt(sum((x - sum(d.tolist()) / 500) ** 2 for x in d.tolist()) / 499) for d in deltas)
    want = []
    for xs in zip(*(d.tolist() for d in deltas)):
        special = [not mu - 2 * sigma < x < mu + 2 * sigma for x in xs]
        want.append(sum(xs) / n if all(special) and overlap == "mean" else sum(x if s else x / n for x, s in zip(xs, special)))
    assert torch.allclose(gaussian(deltas, overlap=overlap), T(want), atol=1e-5)


@pytest.mark.parametrize("rule", [norm_weighted, gaussian, lambda d: gaussian(d, overlap="mean")])
def test_a_policy_that_did_not_move_has_no_say(rule):
    a, b, zero = T([3., 4., 0., 1.]), T([0., 0., 9., 1.]), torch.zeros(4)
    assert rule([a, zero]).tolist() == rule([zero, a]).tolist() == a.tolist() and rule([zero, zero]).tolist() == zero.tolist()
    assert torch.equal(rule([a, zero, b]), rule([a, b]))


SAME = dict(average=average, norm=norm_weighted, gaussian_mean=lambda d: gaussian(d, overlap="mean"), half_sum=lambda d: task_vectors(d, 0.5))

@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (30, 40), (4, 3, 3, 3)])
def test_a_policy_merged_with_itself_is_itself(name, shape):
    base, policy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(merge_tensor("w", base, [policy, policy], SAME[name]), policy, atol=1e-6)


def test_types_and_odd_tensors():
    one = torch.ones(3)
    assert merge_tensor("w", one.bfloat16(), [one * 3, one], average).tolist() == [2, 2, 2]
    assert merge_tensor("w", one.bfloat16(), [one * 3, one], average).dtype == torch.bfloat16
    assert merge_tensor("w", one.double(), [one.double() + 1e-12] * 2, average).tolist() == [1 + 1e-12] * 3       # 64 bits stay 64 bits
    assert merge_tensor("w", T([1, 2]), [T([1, 2])] * 2, average).tolist() == [1, 2]
    assert merge_tensor("w", torch.zeros(0), [torch.zeros(0)] * 2, gaussian).shape == (0,)
    for other in (T([1, 3]), T([1., 2.]), T([1, 2], dtype=torch.int32)):
        with pytest.raises(UserError, match="ids holds torch.int64.*cannot be merged"): merge_tensor("ids", T([1, 2]), [other], average)
    with pytest.raises(UserError, match="w is not finite"): merge_tensor("w", one, [one, one * math.nan], average)


# ---- whole folders ----

@pytest.mark.parametrize("method", METHODS)
def test_a_base_merged_with_itself_is_itself_bit_for_bit(method, family, tmp_path):
    base, _, _ = family
    done = merge_policies(base, [base, base], tmp_path/"out", method)
    assert (tmp_path/"out"/"model.safetensors").read_bytes() == (base/"model.safetensors").read_bytes() and done["changed"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_the_rule_applied_to_every_tensor(method, family, tmp_path):
    base, a, b = family
    merge_policies(base, [a, b], tmp_path/"out", method)
    own, wa, wb, got = (weights(f) for f in (base, a, b, tmp_path/"out"))
    assert got.keys() == own.keys()
    for k, w in own.items():
        want = w + METHODS[method]([wa[k] - w, wb[k] - w]) if w.is_floating_point() else w
        assert torch.equal(got[k], want), k
    state = load_policy(tmp_path/"out").state_dict()
    assert all(torch.equal(state[f"model.{k}"], v) for k, v in got.items() if f"model.{k}" in state)


def test_the_shipped_policy(tmp_path):
    from transformers import JanusForConditionalGeneration
    a, b = (child(find_policy("tiny-janus"), tmp_path/n, i, share=0.1) for i, n in enumerate("ab"))
    done = merge_policies("tiny-janus", [a, b], tmp_path/"out")
    policy = load_policy(tmp_path/"out")
    assert policy.tasks == load_policy("tiny-janus").tasks and done["changed"] > 0
    model = JanusForConditionalGeneration.from_pretrained(tmp_path/"out")
    assert not torch.equal(model.state_dict()["lm_head.weight"], JanusForConditionalGeneration.from_pretrained(a).state_dict()["lm_head.weight"])
    assert json.loads((tmp_path/"out"/"merge.json").read_text())["base"] == "tiny-janus"


def shard(folder, out, size="20KB"):
    "The same policy in several files with an index."
    policy = load_policy(folder)
    policy.model.save_pretrained(out, max_shard_size=size)
    policy.processor.save_pretrained(out)
    assert len(list(out.glob("*.safetensors"))) > 2 and (out/"model.safetensors.index.json").exists()
    return out


def test_shards_stay_as_they_are_in_the_base(family, tmp_path):
    base, a, b = family
    merge_policies(base, [a, b], tmp_path/"whole")
    cut = shard(base, tmp_path/"cut")
    merge_policies(cut, [a, shard(b, tmp_path/"b", "50KB")], tmp_path/"out")
    files = lambda f: sorted(p.name for p in f.iterdir())
    assert files(tmp_path/"out") == sorted([*files(cut), "merge.json"])
    assert (tmp_path/"out"/"model.safetensors.index.json").read_bytes() == (cut/"model.safetensors.index.json").read_bytes()
    for f in cut.glob("*.safetensors"): assert read_header(f) == read_header(tmp_path/"out"/f.name)
    one, many = weights(tmp_path/"whole"), weights(tmp_path/"out")
    assert one.keys() == many.keys() and all(torch.equal(one[k], many[k]) for k in one)
    load_policy(tmp_path/"out")


@pytest.mark.parametrize("own, other", [(torch.bfloat16, None), (None, torch.bfloat16), (torch.float16, torch.bfloat16)])
def test_the_types_of_the_base_are_kept(own, other, family, tmp_path):
    base = child(family[0], tmp_path/"base", 0, share=0, dtype=own)
    a, b = (child(family[0], tmp_path/n, i, dtype=other) for i, n in enumerate("ab"))
    done = merge_policies(base, [a, b], tmp_path/"out", "average")
    got, was = weights(tmp_path/"out"), weights(base)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in was.items()}
    assert done["other_types"] == sum(v.is_floating_point() for v in was.values())


# ---- one tensor at a time ----

def test_no_more_than_one_tensor_of_each_model_is_alive(family, tmp_path, monkeypatch):
    base, a, b = family
    alive, most, reads, real = set(), [0], [0], merge.read_tensor
    def spy(file, name):
        x = real(file, name)
        alive.add(id(x))
        weakref.finalize(x, alive.discard, id(x))
        reads[0] += 1
        most[0] = max(most[0], len(alive))
        return x
    monkeypatch.setattr(merge, "read_tensor", spy)
    done = merge_policies(base, [a, b], tmp_path/"out")
    assert reads[0] == 3 * done["tensors"] and most[0] == 3


def test_memory_stays_far_below_one_model(tmp_path):
    "A base of about 40 MB in many tensors: the peak must grow by less than half of that."
    probe = f"""
import resource, shutil, sys
from pathlib import Path
import torch
from unify_rl.policies.janus import new_janus
from unify_rl.train.merge import merge_policies
from unify_rl.train.pretrain import vocabulary
home = Path({str(tmp_path)!r})
if sys.argv[1] == "make":
    for name, layers, hidden in (("small", 1, 32), ("large", 12, 256)): new_janus(vocabulary(), layers=layers, hidden=hidden).save_pretrained(home/name)
else:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    merge_policies(home/"small", [home/"small"] * 2, home/"out-small")          # loads every library
    before = peak()
    merge_policies(home/"large", [home/"large"] * 2, home/"out-large")
    print(sum(f.stat().st_size for f in (home/"large").glob("*.safetensors")) / 2**20, peak() - before)
"""
    run = lambda *args: subprocess.run([sys.executable, "-c", probe, *args], capture_output=True, text=True, timeout=300)
    assert run("make").returncode == 0
    done = run("merge")
    assert done.returncode == 0, done.stderr
    size, grown = map(float, done.stdout.split())
    assert size > 30 and grown < size / 2, (size, grown)


# ---- what is refused ----

def refused(match, base, policies, out, *args, **kwargs):
    before = set(out.parent.iterdir())
    with pytest.raises(UserError, match=match): merge_policies(base, policies, out, *args, **kwargs)
    assert set(out.parent.iterdir()) == before                              # nothing is left behind


def test_settings(family, tmp_path):
    base, a, b = family
    out = tmp_path/"out"
    refused("Did you mean 'gaussian'", base, [a, b], out, "gauss")
    refused("no setting 'scale'", base, [a, b], out, "gaussian", scale=1.0)
    refused("overlap is 'both'", base, [a, b], out, overlap="both")
    refused("width is -1; it must be at least 0", base, [a, b], out, width=-1)
    refused("scale is nan", base, [a, b], out, "sum", scale=math.nan)
    refused("1 policies are given", base, [a], out)


def test_places(family, tmp_path):
    base, a, b = family
    refused("is one of the inputs", base, [a, b], a)
    refused("is one of the inputs", base, [a, b], base/".."/"base")
    (tmp_path/"full").mkdir(); (tmp_path/"full"/"x").touch()
    refused("not empty", base, [a, b], tmp_path/"full")
    refused("not empty", base, [a, b], tmp_path/"full"/"x")
    refused("unknown policy", base, [a, "tiny-janos"], tmp_path/"out")
    refused("is missing", base, [a, tmp_path/"full"], tmp_path/"out")
    (tmp_path/"empty").mkdir()
    merge_policies(base, [a, b], tmp_path/"empty")
    assert (tmp_path/"empty"/"config.json").exists() and not list(tmp_path.glob(".tmp-*"))


def test_other_models(family, tmp_path):
    base, a, b = family
    new_janus(vocabulary(), layers=1, hidden=48).save_pretrained(tmp_path/"wide")
    new_janus(vocabulary(), layers=2, hidden=32).save_pretrained(tmp_path/"deep")
    refused(r"but \(.*\) in the base .* models of different sizes", base, [a, tmp_path/"wide"], tmp_path/"out")
    refused("have different tensors .*layers.1.* is in .*deep but not in", base, [tmp_path/"deep", a], tmp_path/"out")
    refused("have different tensors", tmp_path/"deep", [a, b], tmp_path/"out")
    own = weights(a)
    save_file(own | {"surplus.weight": torch.zeros(2)}, child(base, tmp_path/"more", 3)/"model.safetensors", metadata={"format": "pt"})
    refused("surplus.weight is in .*more but not in", base, [a, tmp_path/"more"], tmp_path/"out")
    kinds = {}
    for kind in ("janus", "bagel"):
        (tmp_path/kind).mkdir()
        (tmp_path/kind/"config.json").write_text(json.dumps(dict(model_type=kind)))
    with pytest.raises(UserError, match="is a bagel, but the base .* is a janus: different architectures"):
        merge.check_fit(tmp_path/"janus", tmp_path/"bagel", {}, {})


def test_damaged_policies(family, tmp_path):
    base, a, b = family
    child(base, tmp_path/"cut", 3)
    raw = (tmp_path/"cut"/"model.safetensors").read_bytes()
    (tmp_path/"cut"/"model.safetensors").write_bytes(raw[:len(raw) // 2])
    refused("damaged or cut short", base, [a, tmp_path/"cut"], tmp_path/"out")
    own = weights(a)
    key = next(k for k, w in own.items() if w.is_floating_point())
    own[key] = own[key] * math.nan
    save_file(own, child(base, tmp_path/"nan", 3)/"model.safetensors", metadata={"format": "pt"})
    refused(f"{key} is not finite", base, [a, tmp_path/"nan"], tmp_path/"out")


def test_an_interrupted_merge_leaves_nothing(family, tmp_path):
    base, a, b = family
    def stop(n, total, name):
        if n == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): merge_policies(base, [a, b], tmp_path/"out", track=stop)
    assert not list(tmp_path.iterdir())


def test_the_command(family, tmp_path, capsys):
    base, a, b = map(str, family)
    out = str(tmp_path/"out")
    assert main(["merge", a, b, "--base", base, "--out", out, "--method", "gaussian", "--width", "3", "--overlap", "mean"]) == 0
    assert "next    unify_rl eval --policy" in capsys.readouterr().out
    assert json.loads((tmp_path/"out"/"merge.json").read_text())["settings"] == {"width": 3.0, "overlap": "mean"}
    load_policy(out)
    capsys.readouterr()
    for words, match in {("merge", a, b, "--base", base, "--out", out): "not empty", ("merge", a, "--base", base, "--out", out + "2"): "it takes two",
                         ("merge", a, b, "--base", base, "--out", out + "2", "--method", "mean"): "unknown method 'mean'",
                         ("merge", a, b, "--base", base, "--out", out + "2", "--scale", "2"): "no setting 'scale'"}.items():
        assert main(list(words)) == 2
        err = capsys.readouterr().err
        assert err.startswith("unify_rl: ") and match in err and "Traceback" not in err
    with pytest.raises(SystemExit): main(["merge", a, b, "--out", out])                        # no base
