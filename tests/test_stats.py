"""Bootstrap intervals against SciPy's, what must not change them, and every bad input."""
import numpy as np
import pytest
from scipy import stats

from unify_rl.core import UserError
from unify_rl.evaluate.stats import mean_ci, paired_ci, prompts_needed, spread_seeds


def test_mean_ci_agrees_with_scipys_bootstrap():
    x = np.random.default_rng(0).beta(.5, .9, 300)
    got = mean_ci(x, draws=20_000)
    want = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert (got.lo, got.hi) == pytest.approx((want.low, want.high), abs=1.5e-3)
    assert got.hi - got.lo > .05


def test_paired_ci_agrees_with_scipys_paired_bootstrap():
    rng = np.random.default_rng(0)
    before = rng.random(300); after = np.clip(before + rng.normal(.05, .1, 300), 0, 1)
    difference = lambda a, b, axis: np.mean(b, axis=axis) - np.mean(a, axis=axis)
    want = stats.bootstrap((before, after), difference, paired=True, vectorized=True, n_resamples=20_000, method="percentile",
                           rng=np.random.default_rng(1)).confidence_interval
    got = paired_ci(before, after, draws=20_000)
    assert (got.lo, got.hi) == pytest.approx((want.low, want.high), abs=1e-3)


def test_runs_that_only_differ_by_a_constant_get_students_interval():
    "With no other noise than the seeds', the interval must be about as wide as Student's t for three values."
    runs = np.array([[.1], [.2], [.3]]) + np.zeros((3, 400))
    got, t = mean_ci(runs, draws=20_000), stats.t.ppf(.975, 2) * .1 / 3 ** .5
    assert got.mean == pytest.approx(.2)
    assert .85 * t < (got.hi - got.lo) / 2 < 1.3 * t


def test_seeds_count_as_clusters_and_alike_runs_are_not_spread():
    x = np.random.default_rng(0).random(200)
    one, thrice = mean_ci(x), mean_ci(np.stack([x, x, x]))
    assert (thrice.hi - thrice.lo) == pytest.approx(one.hi - one.lo, rel=.1), "the same run three times is not more evidence"
    def stretched(seed_sd):     # how much further apart the rows are, on the median of 99 tables
        tables = [rng.normal(size=(3, 50)) + rng.normal(0, seed_sd, (3, 1)) for rng in map(np.random.default_rng, range(99))]
        return np.median([spread_seeds(t).mean(1).std() / t.mean(1).std() for t in tables])
    assert stretched(0) < 1.1 and stretched(5) > 2.5


def test_order_of_prompts_and_seeds_of_the_draw():
    x = np.random.default_rng(0).random((3, 200))
    assert mean_ci(x) == mean_ci(x.tolist()) != mean_ci(x, seed=1)
    swapped = mean_ci(x[::-1, ::-1])
    assert (swapped.lo, swapped.hi) == pytest.approx((mean_ci(x).lo, mean_ci(x).hi), abs=.005)


def test_failed_scores_leave_their_prompt_out_of_every_run():
    x = np.random.default_rng(0).random((2, 50))
    holes = x.copy(); holes[0, 3] = np.nan; holes[1, 7] = np.inf
    got = mean_ci(holes)
    assert (got.n, got.dropped) == (48, 2)
    assert got.mean == pytest.approx(np.delete(x, [3, 7], axis=1).mean())
    assert paired_ci(x, holes).n == 48


def test_a_single_prompt_has_a_mean_and_no_interval():
    got = mean_ci([.5])
    assert got.mean == .5 and np.isnan([got.lo, got.hi]).all() and got.n == 1


@pytest.mark.parametrize("call, says", [
    (lambda: mean_ci([]), "nothing to average"),
    (lambda: mean_ci([[1, np.nan], [np.nan, 1]]), "nothing to average"),
    (lambda: mean_ci([1, 2], level=95), "between 0 and 1"),
    (lambda: paired_ci([1, 2], [1, 2, 3]), "same prompts"),
    (lambda: paired_ci(np.ones((2, 3)), np.ones((4, 3))), "as many runs"),
    (lambda: prompts_needed(.5, 0), "above 0"),
    (lambda: prompts_needed(-1, .1), "at least 0"),
])
def test_bad_input(call, says):
    with pytest.raises(UserError, match=says): call()
