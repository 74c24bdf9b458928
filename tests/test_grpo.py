"""GRPO's three modules against independent code (TRL), their invariances, and every bad input."""
from types import SimpleNamespace

import pytest
import torch

from unify_rl.core import UserError
from unify_rl.grpo.advantage import OPTIONS, advantages
from unify_rl.grpo.kl import kl_estimate, kl_gaussian
from unify_rl.grpo.objective import objective, token_weights

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def trl():
    "TRL's GRPO trainer class; its loss is called on a stand-in for the trainer, so no model is built."
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer
    return GRPOTrainer


def random_batch(seed=0, B=8, T=11):
    "Log-probabilities with stale ratios, ragged masks (one answer of a single token), and advantages of both signs."
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (B,), generator=gen)
    lengths[:2] = torch.tensor([1, T])
    logp = -randn(B, T).abs()
    return SimpleNamespace(logp=logp, old=logp + .4 * randn(B, T), ref=logp + .4 * randn(B, T), adv=randn(B),
                           mask=torch.arange(T) < lengths[:, None])


def trl_loss(trl, batch, loss_type, beta, low, high, old):
    "TRL's own `_compute_loss` on these tensors: (loss, gradient, its logged metrics)."
    from collections import defaultdict
    logp = batch.logp.clone().requires_grad_()
    metrics = {"train": defaultdict(list)}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        beta=beta, loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, _metrics=metrics, model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x))
    B, T = logp.shape
    inputs = dict(prompt_ids=torch.zeros(B, 1).long(), prompt_mask=torch.ones(B, 1).long(), completion_ids=torch.zeros(B, T).long(),
                  completion_mask=batch.mask.long(), advantages=batch.adv, ref_per_token_logps=batch.ref)
    if old: inputs["old_per_token_logps"] = batch.old
    loss = trl._compute_loss(stub, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics["train"]


@pytest.mark.parametrize("loss_type, average", [("grpo", "sequence"), ("bnpo", "token")])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("low, high", [(.2, .2), (.1, .28)])
@pytest.mark.parametrize("old", [True, False])
def test_loss_and_gradient_equal_trl(trl, loss_type, average, beta, low, high, old):
    batch = random_batch()
    want, want_grad, metrics = trl_loss(trl, batch, loss_type, beta, low, high, old)
    logp = batch.logp.clone().requires_grad_()
    loss, stats = objective(logp, batch.old if old else None, batch.ref, token_weights(batch.mask, average), batch.adv, low, high, beta)
    grad, = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-8)
    assert want_grad.abs().max() > .01
    if average == "token":              # TRL logs token means, whatever its loss averages
        assert stats["clip_fraction"].item() == pytest.approx(metrics["clip_ratio/region_mean"][0], abs=1e-6)
        if beta: assert stats["kl"].item() == pytest.approx(metrics["kl"][0], rel=1e-6)
    assert (stats["clip_fraction"] > .1) == old, "clipping must be active in this test when ratios are stale, and cannot be when fresh"


def test_advantages_equal_trls_formula_with_missing_rewards(trl):
    from trl.trainer.utils import nanstd
    gen = torch.Generator().manual_seed(0)
    rewards = torch.rand(5, 8, generator=gen, dtype=torch.float64)
    rewards[torch.rand(5, 8, generator=gen) < .2] = NAN
    want = (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    got = advantages(rewards.flatten()[None], torch.ones(1), 8, eps=1e-4)
    torch.testing.assert_close(got.adv_B.view(5, 8), want.nan_to_num(0), rtol=1e-6, atol=1e-9)
    assert got.valid_B.view(5, 8).equal(rewards.isfinite()) and not got.valid_B.all()


# Properties of advantages, for every combination of switches

SWITCHES = [dict(normalize=n, baseline=b, scale=s) for n in OPTIONS["normalize"] for b in OPTIONS["baseline"] for s in OPTIONS["scale"] if b != "none"]
every_switch = pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(s.values()))
WEIGHTS = torch.tensor([1.0, 0.5, 2.0])


def random_scores(seed=0, R=3, N=6, G=8): return torch.rand(R, N * G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_switch
def test_a_permutation_inside_a_group_permutes_the_advantages(switches):
    s = random_scores()
    order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(n)) + 8 * n for n in range(6)]).flatten()
    a, b = (advantages(x, WEIGHTS, 8, **switches) for x in (s, s[:, order]))
    torch.testing.assert_close(b.adv_B, a.adv_B[order])
    torch.testing.assert_close(b.std_N, a.std_N)


@every_switch
def test_groups_do_not_see_each_other(switches):
    s = random_scores()
    whole, last = advantages(s, WEIGHTS, 8, **switches), advantages(s[:, 40:], WEIGHTS, 8, **switches)
    torch.testing.assert_close(whole.adv_B[40:], last.adv_B)


@every_switch
def test_shift_and_scale(switches):
    "A shift of rewards never matters; their unit does not where the std divides, and is a factor where it does not."
    s = random_scores()
    base = advantages(s, WEIGHTS, 8, **switches).adv_B
    shift = torch.arange(6.).repeat_interleave(8)               # another one for every group
    torch.testing.assert_close(advantages(s + shift, WEIGHTS, 8, **switches).adv_B, base, rtol=1e-6, atol=1e-8)
    factor = 1.0 if switches["scale"] == "std" else 7.0
    torch.testing.assert_close(advantages(7 * s, WEIGHTS, 8, **switches).adv_B, factor * base, rtol=1e-5, atol=1e-8)


@every_switch
def test_advantages_of_a_group_sum_to_zero_and_scaled_ones_have_unit_std(switches):
    adv_NG = advantages(random_scores(), WEIGHTS, 8, **switches).adv_B.view(6, 8)
    torch.testing.assert_close(adv_NG.sum(1), torch.zeros(6, dtype=torch.float64))
    if switches == dict(normalize="total", baseline="mean", scale="std"):
        torch.testing.assert_close(adv_NG.std(1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)


@every_switch
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_failed_score_masks_its_sample_and_only_that(switches, bad):
    s = random_scores()
    broken = s.clone(); broken[1, 3] = bad
    a, b = advantages(s, WEIGHTS, 8, **switches), advantages(broken, WEIGHTS, 8, **switches)
    assert b.valid_B.logical_not().nonzero().flatten().tolist() == [3]
    assert b.adv_B[3] == 0 and b.reward_B[3].isnan() and b.adv_B.isfinite().all() and b.mean_N.isfinite().all()
    torch.testing.assert_close(b.adv_B[8:], a.adv_B[8:])                    # other groups: untouched
    others = [0, 1, 2, 4, 5, 6, 7]
    without = advantages(s[:, others], WEIGHTS, 7, **switches)              # its siblings: as if it had never been drawn
    torch.testing.assert_close(b.adv_B[others], without.adv_B)


@every_switch
def test_the_weight_slot_multiplies_the_finished_advantage(switches):
    s, w = random_scores(), torch.tensor([1.0, .8, 0.0, .5, 1.0, 2.0]).repeat_interleave(8)
    a, b = advantages(s, WEIGHTS, 8, **switches), advantages(s, WEIGHTS, 8, weight_B=w, **switches)
    torch.testing.assert_close(b.adv_B, a.adv_B * w)
    torch.testing.assert_close(b.reward_B, a.reward_B)


@every_switch
def test_a_reward_that_does_not_apply_is_as_good_as_absent(switches):
    s = random_scores()
    s[2, :24] = NAN                                             # says nothing about the first three prompts ...
    applies = torch.ones(3, 48, dtype=torch.bool); applies[2, :24] = False      # ... because it does not apply there
    got = advantages(s, WEIGHTS, 8, applies, **switches)
    torch.testing.assert_close(got.adv_B[:24], advantages(s[:2, :24], WEIGHTS[:2], 8, **switches).adv_B)
    torch.testing.assert_close(got.adv_B[24:], advantages(s[:, 24:], WEIGHTS, 8, **switches).adv_B)
    assert got.valid_B.all()


@every_switch
def test_dead_groups_are_exactly_zero_even_with_rounding_noise(switches):
    s = torch.full((1, 12), .1, dtype=torch.float64)
    s[0, 4:8] = torch.tensor([.3, .1 + .2, .3, .3 * (1 + 1e-7)], dtype=torch.float64)
    s[0, 8:] = torch.tensor([0., 0, 0, 1])
    got = advantages(s, torch.ones(1), 4, eps=1e-12, **switches)
    assert got.dead_N.tolist() == [True, True, False]
    assert not got.adv_B[:8].any() and got.adv_B[8:].all()


def test_leave_one_out_is_the_mean_of_the_others():
    s = random_scores(R=1)
    got = advantages(s, torch.ones(1), 8, baseline="leave_one_out", scale="none").adv_B.view(6, 8)
    s_NG = s.view(6, 8)
    others = torch.stack([s_NG[:, [j for j in range(8) if j != i]].mean(1) for i in range(8)], 1)
    torch.testing.assert_close(got, s_NG - others)


def test_normalizing_each_reward_a_group_is_dead_only_if_all_its_rewards_are():
    s = torch.tensor([[.5, .5, .5, .5], [0, 1, 1, 1]])
    got = advantages(s, torch.ones(2), 2, normalize="each")
    assert got.dead_N.tolist() == [False, True]
    assert got.adv_B[:2].all() and not got.adv_B[2:].any()


def test_groups_with_one_or_no_survivor_are_dead():
    got = advantages(torch.tensor([[NAN, 1, NAN, NAN, NAN, NAN]]), torch.ones(1), 3)
    assert got.dead_N.all() and not got.adv_B.any()
    assert got.mean_N[0] == 1 and got.mean_N[1].isnan()


def test_a_reward_of_weight_zero_only_observes():
    s = random_scores(R=2)
    broken = s.clone(); broken[1, 0] = NAN
    for normalize in OPTIONS["normalize"]:
        got = advantages(broken, torch.tensor([1.0, 0.0]), 8, normalize=normalize)
        assert got.valid_B.all()
        torch.testing.assert_close(got.adv_B, advantages(s[:1], torch.ones(1), 8).adv_B)


S, W = torch.rand(2, 8), torch.ones(2)
@pytest.mark.parametrize("args, kw, says", [
    ((S, W, 1), {}, "Raise group_size"),
    ((S, W, 0), {}, "Raise group_size"),
    ((S, W, 3), {}, "groups of 3"),
    ((S[:, :0], W, 4), {}, "0 samples"),
    ((S[0], W, 4), {}, r"\[R, B\]"),
    ((S[:0], W[:0], 4), {}, "at least one reward"),
    ((S, torch.ones(3), 4), {}, r"\[R, B\]"),
    ((S, W, 4, torch.ones(8).bool()), {}, r"\[R, B\]"),
    ((S, W, 4), dict(weight_B=torch.ones(2)), r"\[R, B\]"),
    ((S, W, 4), dict(weight_B=-torch.ones(8)), "pair weights"),
    ((S, W, 4), dict(weight_B=torch.full((8,), NAN)), "pair weights"),
    ((S, torch.tensor([1, NAN]), 4), {}, "reward weights"),
    ((S, 0 * W, 4), {}, "no reward of non-zero weight applies to prompt 0"),
    ((S, W, 4, torch.tensor([[True] * 4 + [False] * 4] * 2)), {}, "applies to prompt 1"),
    ((S, W, 4), dict(normalize="eech"), "Did you mean 'each'"),
    ((S, W, 4), dict(baseline="loo"), "Known: leave_one_out, mean, none"),
    ((S, W, 4), dict(scale=None), "Known: none, std"),
    ((S, W, 4), dict(eps=0), "eps"),
    ((S, W, 4), dict(eps=NAN), "eps"),
])
def test_advantages_bad_input(args, kw, says):
    with pytest.raises(UserError, match=says): advantages(*args, **kw)


# The objective

@pytest.mark.parametrize("average", ["token", "sequence", "group"])
def test_micro_batches_add_up(average):
    "Loss, gradient and statistics of any cut of the rows sum to those of the whole, with clipping and a KL term."
    batch = random_batch(1)
    weights = token_weights(batch.mask, average, torch.arange(8) // 4)
    def run(sizes):
        logp, total = batch.logp.clone().requires_grad_(), {}
        for i in torch.arange(8).split(sizes):
            loss, stats = objective(logp[i], batch.old[i], batch.ref[i], weights[i], batch.adv[i], .2, .28, beta=.04)
            loss.backward()
            total = {k: total.get(k, 0) + v for k, v in stats.items()}
        return logp.grad, total
    whole, cut = run([8]), run([1, 4, 2, 1])
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-12, atol=1e-15)
    assert set(whole[1]) == {"loss", "policy_loss", "ratio_mean", "clip_fraction", "kl"}
    for k in whole[1]:
        torch.testing.assert_close(cut[1][k], whole[1][k], rtol=1e-12, atol=1e-15)
        assert not whole[1][k].requires_grad


def test_weights_of_rows_that_do_not_count():
    mask = torch.ones(4, 3, dtype=torch.bool); mask[1] = False
    for average in ("token", "sequence", "group"):
        w = token_weights(mask, average, torch.tensor([7, 7, 3, 3]))        # group ids may be any numbers
        assert w[1].sum() == 0 and w.sum().item() == pytest.approx(1)
    assert token_weights(mask, "group", torch.tensor([7, 7, 3, 3])).sum(1).tolist() == pytest.approx([.5, 0, .25, .25])
    assert not token_weights(mask & False).any()


def test_padding_may_hold_anything():
    batch = random_batch(2)
    w = token_weights(batch.mask)
    def run(fill):
        dirty = [x.masked_fill(~batch.mask, fill).requires_grad_() for x in (batch.logp, batch.old, batch.ref)]
        loss, stats = objective(*dirty, w, batch.adv, beta=.1)
        loss.backward()
        assert dirty[1].grad is None and dirty[2].grad is None              # sampler and reference are constants
        return loss, dirty[0].grad
    clean = run(0.0)
    for fill in (NAN, -INF, INF): assert all(a.equal(b) for a, b in zip(run(fill), clean))


def test_a_runaway_ratio_stays_finite():
    logp = torch.tensor([[200.0], [200.0]], requires_grad=True)
    loss, stats = objective(logp, torch.zeros(2, 1), None, token_weights(torch.ones(2, 1)), torch.tensor([0.0, -1.0]))
    loss.backward()
    assert loss.isfinite() and logp.grad.isfinite().all() and stats["ratio_mean"] > 1e8


def test_float64_advantages_do_not_change_the_dtype_of_the_loss():
    logp = torch.zeros(2, 3, dtype=torch.float32, requires_grad=True)
    loss, _ = objective(logp, None, None, token_weights(torch.ones(2, 3)), torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert loss.dtype == torch.float32


def test_no_clipping_is_inf():
    batch = random_batch(3)
    w = token_weights(batch.mask)
    loss, stats = objective(batch.logp, batch.old, None, w, batch.adv, INF, INF)
    assert loss.item() == pytest.approx(-(w * (batch.logp - batch.old).exp() * batch.adv[:, None]).sum().item(), rel=1e-9)
    assert stats["clip_fraction"] == 0


L, A2 = torch.zeros(2, 3), torch.ones(2)
@pytest.mark.parametrize("args, kw, says", [
    ((L, L[:, :2], None, L, A2), {}, "logp_old_BT is"),
    ((L, None, L[:1], L, A2), {}, "logp_ref_BT is"),
    ((L, None, None, L[0], A2), {}, "weights_BT is"),
    ((L, None, None, L, A2[:, None]), {}, "one advantage for each"),
    ((L, None, None, L, torch.ones(3)), {}, "one advantage for each"),
    ((L, None, None, L, A2), dict(beta=.1), "Pass logp_ref_BT"),
    ((L, None, L, L, A2), dict(beta=-1), "beta"),
    ((L, None, L, L, A2), dict(beta=NAN), "beta"),
    ((L, None, None, L, A2), dict(clip_low=-.1), "at least 0"),
    ((L, None, None, L, A2), dict(clip_high=NAN), "at least 0"),
    ((L, None, L, L, A2), dict(kl="k4"), "Did you mean 'k"),
])
def test_objective_bad_input(args, kw, says):
    with pytest.raises(UserError, match=says): objective(*args, **kw)


def test_token_weights_bad_input():
    with pytest.raises(UserError, match="Did you mean 'sequence'"): token_weights(torch.ones(2, 3), "sequences")
    with pytest.raises(UserError, match="group_index_B"): token_weights(torch.ones(2, 3), "group")


# The KL term

def test_kl_estimators_of_random_categoricals():
    "k1 and k3 have the right mean; k2's gradient is KL's, k3's that of the other direction, k1's is zero."
    for seed in range(5):
        gen = torch.Generator().manual_seed(seed)
        logits, logq = (torch.randn(9, generator=gen, dtype=torch.float64) for _ in range(2))
        logits.requires_grad_(); logq = torch.log_softmax(logq, 0)
        logp = torch.log_softmax(logits, 0); p = logp.exp()
        kl = torch.nn.functional.kl_div(logq, p, reduction="sum")
        for kind in ("k1", "k3"): torch.testing.assert_close((p * kl_estimate(logp, logq, kind)).sum(), kl)
        grad = lambda x: torch.autograd.grad(x, logits, retain_graph=True)[0]
        through = {k: grad((p.detach() * kl_estimate(logp, logq, k)).sum()) for k in ("k1", "k2", "k3")}
        other = grad(torch.nn.functional.kl_div(logp, logq.exp(), reduction="sum"))
        torch.testing.assert_close(through["k1"], torch.zeros_like(logits))
        torch.testing.assert_close(through["k2"], grad(kl))
        torch.testing.assert_close(through["k3"], other)


@pytest.mark.parametrize("std", [.7, torch.tensor([.5, 1., 2.]), torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) + .1])
def test_kl_gaussian_equals_torch(std):
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, 2, 5, 5, generator=gen), torch.randn(4, 3, 2, 5, 5, generator=gen)
    s = torch.as_tensor(std).expand(4, 3)[..., None, None, None]
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(a, s), normal(b, s)).flatten(2).sum(-1)
    torch.testing.assert_close(kl_gaussian(a, b, std), want)


def test_kl_bad_input():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(UserError, match="Known: k1, k2, k3"): kl_estimate(x, x, "exact")
    with pytest.raises(UserError, match="ODE"): kl_gaussian(x, x, torch.tensor([1., 0., 1.]))
    with pytest.raises(UserError, match="one shape"): kl_gaussian(x, x[:1], 1.0)
    with pytest.raises(UserError, match="one shape"): kl_gaussian(x[0], x[0], 1.0)
