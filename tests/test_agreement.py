"""The agreement meter inside a real run: it sees both skills, says the cosine that two separate backward passes say, and moves nothing."""
import math

import pytest
import torch

import unify_rl
from unify_rl.core import UserError

SMALL = dict(steps=2, threads=1, evaluate=dict(suites=[]), rollout=dict(prompts=4, group_size=4), log=dict(groups_every=0))


def run(folder, every, **log):
    unify_rl.train("grpo", "tiny-janus", run_dir=str(folder), progress=False, **(SMALL | dict(log=dict(groups_every=0, agreement_every=every, **log))))
    return unify_rl.Run(folder)


def test_it_measures_and_moves_nothing(tmp_path):
    metered, plain = run(tmp_path / "metered", 1), run(tmp_path / "plain", 0)
    said = metered.metrics["objective/agreement"]
    assert said.between(-1, 1).all() and len(said) == 2 and "objective/agreement" not in plain.metrics
    for (name, a), (_, b) in zip(metered.policy().named_parameters(), plain.policy().named_parameters()): assert torch.equal(a, b), name


def test_of_some_layers_only(tmp_path):
    one, other = (run(tmp_path / name, 1, agreement_of=[f"layers.{name}"]).metrics["objective/agreement"] for name in "03")
    assert all(math.isfinite(x) for x in (*one, *other)) and not torch.allclose(torch.tensor(one), torch.tensor(other))


def test_a_name_that_nothing_has_is_refused(tmp_path):
    with pytest.raises(UserError, match="agreement_of: no parameter"): run(tmp_path, 1, agreement_of=["layer.99"])
