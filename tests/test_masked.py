"""Masked diffusion against enumeration: laws of the sampler, exact scores, shared draws; its invariances; every bad input."""
import itertools
import math

import pytest
import torch

from unify_rl.core import UserError
from unify_rl.mechanisms import masked as m
from unify_rl.mechanisms.flow import row_generators

V, MASK = 3, 3                                          # values 0, 1, 2 and the mask token
MAY = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1]]).bool()
ROWS = torch.tensor([11, 3, 8, 20])
NAMES = list(m.ESTIMATORS)


def gen(seed=0): return torch.Generator().manual_seed(seed)


def model(L=3, seed=0, sharp=1.5):
    "logits_of for states [B, L] of {0, 1, 2, MASK}: a table drawn at random, one entry for each state: orders disagree."
    logits = sharp * torch.randn(4**L, L, V, generator=gen(seed), dtype=torch.float64)
    power = 4 ** torch.arange(L - 1, -1, -1)
    return lambda x: logits[(x * power).sum(-1)]


def prob(logits_of, state, i, v): return logits_of(torch.tensor([state]))[0, i].softmax(-1)[v].item()


def any_order_product(logits_of, x, given=()):
    "Mean over orders of the product of conditionals, in plain Python; positions in `given` are not predicted."
    free = [i for i in range(len(x)) if i not in given]
    total = 0.0
    for order in itertools.permutations(free):
        state, p = [x[i] if i in given else MASK for i in range(len(x))], 1.0
        for i in order: p *= prob(logits_of, state, i, x[i]); state[i] = x[i]
        total += p
    return total / math.factorial(len(free))


def chi_square(samples, expected):
    "Statistic of [n, L] samples against {sequence: probability}."
    seen = {}
    for row in samples.tolist(): seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert set(seen) <= set(expected)
    return sum((seen.get(x, 0) - len(samples) * p)**2 / (len(samples) * p) for x, p in expected.items())


def most(df): return df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df)))**3           # chi-square exceeded once in 10,000


# ---- masking and the loss ----

def test_masking_hides_the_stated_share_and_never_the_prompt():
    t = torch.tensor([.1, .5, 1.0]).repeat_interleave(3000)
    may = torch.tensor([False, True, True, True]).expand(9000, -1)
    x = torch.randint(V, (9000, 4), generator=gen())
    state, hidden = m.mask_tokens(x, may, t, MASK, gen(1))
    assert torch.equal(state == MASK, hidden) and torch.equal(state[~hidden], x[~hidden]) and not hidden[:, 0].any()
    for value in (.1, .5, 1.0): assert abs(hidden[t == value][:, 1:].float().mean() - value) < .02


def test_expected_loss_is_the_mean_over_orders():
    "Integrate the 1/t-weighted loss over t and over masks, and compare with chains of conditionals."
    f, x = model(seed=4), [2, 0, 1]
    ts = (torch.arange(4000, dtype=torch.float64) + .5) / 4000
    total = 0.0
    for hide in itertools.product([False, True], repeat=3):
        hidden = torch.tensor([hide])
        chance = (ts**sum(hide) * (1 - ts)**(3 - sum(hide)))                                    # of this mask at each t
        state = torch.tensor([x]).masked_fill(hidden, MASK)
        loss = m.masked_loss(f(state), torch.tensor([x]), hidden, torch.ones(1), torch.ones(1, 3).bool()).item()
        total += (chance / ts).mean().item() * loss
    chains = [sum(-math.log(prob(f, [x[j] if j in o[:k] else MASK for j in range(3)], o[k], x[o[k]])) for k in range(3))
              for o in itertools.permutations(range(3))]
    assert math.isclose(total, sum(chains) / 6 / 3, rel_tol=1e-4)                               # / 3: for each token


@pytest.mark.parametrize("t", [0.0, -.1, 1.01, math.nan])
def test_masking_probability_out_of_range(t):
    x, may = torch.zeros(1, 2).long(), torch.ones(1, 2).bool()
    with pytest.raises(UserError, match="t must be above 0"): m.mask_tokens(x, may, torch.tensor([t]), MASK)


# ---- the schedule ----

@pytest.mark.parametrize("schedule", m.SCHEDULES)
def test_schedule_falls_at_every_step_and_ends_at_zero(schedule):
    for steps in (1, 2, 7, 35, 64):
        count = torch.arange(0, 300, 7)
        left = m.still_masked(count, steps, schedule)
        before = torch.cat([count[:, None], left[:, :-1]], 1)
        assert (left[:, -1] == 0).all() and (left >= 0).all()
        assert ((left < before) | (before == 0)).all()
        assert (left[count >= steps, :-1] > 0).all()                               # enough tokens: every step has something to do


def test_cosine_schedule_is_the_published_formula():
    for n, steps in ((1024, 64), (4096, 64), (1024, 35), (256, 12)):
        want = [math.floor(n * math.cos(math.pi / 2 * (k + 1) / steps) + 1e-9) for k in range(steps)]
        assert m.still_masked(torch.tensor([n]), steps)[0].tolist() == want


# ---- the sampler ----

def test_one_by_one_in_random_order_is_an_any_order_autoregressive_product():
    f = model(seed=1)
    expected = {x: any_order_product(f, x) for x in itertools.product(range(V), repeat=3)}
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-9)
    def statistic(logits_of):
        s = m.sample_masked(logits_of, torch.full((12_000, 3), MASK), MASK, 3, remask=math.inf, generator=gen(2))
        return chi_square(s.tokens_BL, expected)
    assert statistic(f) < most(26)
    assert statistic(model(seed=5)) > 10 * most(26)                                  # another model is told apart


def test_the_likelihood_of_a_trajectory_summed_over_trajectories_is_the_likelihood():
    "exp(sum of the trajectory's log-probabilities), averaged over the six orders, equals the any-order product of each sequence."
    f = model(seed=1)
    x = torch.tensor(list(itertools.product(range(V), repeat=3)))
    total = torch.zeros(27, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        order_BL = torch.tensor([order]).expand(27, -1)
        d = m.mask_draws("trajectory", torch.ones(27, 3).bool(), 0, torch.arange(27), order_BL=order_BL, steps=3)
        total += m.draws_logp(m.token_scores(f, MASK), x, d, MASK).double().sum(1).exp() / 6
    want = torch.tensor([any_order_product(f, row) for row in x.tolist()], dtype=torch.float64)
    assert (total - want).abs().max() < 1e-6


def test_all_at_once_is_a_product_of_marginals():
    f = model(seed=3)
    p = f(torch.full((1, 3), MASK))[0].softmax(-1)
    expected = {x: math.prod(p[i, v].item() for i, v in enumerate(x)) for x in itertools.product(range(V), repeat=3)}
    assert chi_square(m.sample_masked(f, torch.full((8000, 3), MASK), MASK, 1, generator=gen()).tokens_BL, expected) < most(26)


def test_token_temperature():
    f, tau = model(1, seed=6), .5
    p = (f(torch.tensor([[MASK]]))[0, 0] / tau).softmax(-1)
    s = m.sample_masked(f, torch.full((5000, 1), MASK), MASK, 1, temperature=tau, generator=gen())
    assert chi_square(s.tokens_BL, {(v,): p[v].item() for v in range(V)}) < most(2)
    assert torch.allclose(s.logp_BL[:, 0].double(), p.log()[s.tokens_BL[:, 0]], atol=1e-6)


@pytest.mark.parametrize("remask", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("schedule", m.SCHEDULES)
def test_every_position_is_revealed_exactly_once_and_the_prompt_never_changes(remask, schedule):
    x = torch.randint(V, MAY.shape, generator=gen(1)).masked_fill(MAY, MASK)
    states = []
    def f(state): states.append(state.clone()); return torch.randn(*state.shape, V, generator=gen(len(states)))
    s = m.sample_masked(f, x, MASK, 4, schedule, remask=remask, generator=gen())
    assert torch.equal(s.order_BL >= 0, MAY) and torch.equal(s.tokens_BL[~MAY], x[~MAY]) and not (s.tokens_BL == MASK).any()
    left = m.still_masked(MAY.sum(1), 4, schedule)
    for k, state in enumerate(states):                                              # what was shown to the model at each step
        assert torch.equal(state == MASK, MAY & (s.order_BL >= k))
        assert torch.equal(state[state != MASK], s.tokens_BL[state != MASK])        # a revealed token stays as it is
        assert torch.equal((MAY & (s.order_BL > k)).sum(1), left[:, k])
    assert torch.equal(x == MASK, MAY)                                              # the canvas that was given is left alone


def test_the_surest_stay():
    "Two steps, confidence without noise: at each step the positions kept are those of the likeliest drawn tokens."
    p = torch.tensor([.9, .6, .8, .5, .7])
    logits = torch.stack([p.log(), (1 - p).log()], -1)
    def order(remask, seed):
        canvas, f = torch.full((1, 5), 2), lambda x: logits.expand(len(x), -1, -1)
        return tuple(m.sample_masked(f, canvas, 2, 5, "linear", 0, remask, generator=gen(seed)).order_BL[0].tolist())
    assert order(0, 0) == (0, 3, 1, 4, 2)
    assert len({order(2.0, seed) for seed in range(30)}) > 5                          # noise changes the order


def test_the_mask_token_is_never_drawn():
    "A text model's vocabulary holds the mask token itself: it may like it as much as it wants."
    logits = torch.zeros(1, 4, V + 1); logits[..., MASK] = 50.0
    s = m.sample_masked(lambda x: logits.expand(len(x), -1, -1), torch.full((64, 4), MASK), MASK, 2, generator=gen())
    assert not (s.tokens_BL == MASK).any() and torch.allclose(s.logp_BL, torch.full((64, 4), -math.log(3)))
    d = m.mask_draws("diffu_grpo", torch.ones(64, 4).bool(), 0, torch.arange(64))
    score = m.token_scores(lambda x: logits.expand(len(x), -1, -1), MASK)
    assert torch.allclose(m.draws_logp(score, s.tokens_BL, d, MASK), s.logp_BL)


def mixing(x):
    "Logits of a row that depend on that row alone, and on where its first blank column is only through the tokens themselves."
    feature = torch.nn.functional.one_hot(x, V + 1).double()
    w = torch.randn(V + 1, V, generator=gen(7), dtype=torch.float64)
    seen = feature.cumsum(1) + feature.flip(1).cumsum(1)
    return 2 * torch.tanh(seen @ w)


@pytest.mark.parametrize("how", [dict(steps=2), dict(steps=1, remask=0.0), dict(steps=2, block=2, schedule="linear"),
                                 dict(steps=2, remask=math.inf)])
def test_a_row_does_not_depend_on_its_neighbours(how):
    x = torch.randint(V, MAY.shape, generator=gen(1)).masked_fill(MAY, MASK)
    together = m.sample_masked(mixing, x, MASK, generator=row_generators(5, ROWS), **how)
    for pick in ([0], [1], [3, 0], [3, 1, 0]):
        some = m.sample_masked(mixing, x[pick], MASK, generator=row_generators(5, ROWS[pick]), **how)
        for a, b in zip((some.tokens_BL, some.order_BL), (together.tokens_BL, together.order_BL)): assert torch.equal(a, b[pick])
        assert torch.allclose(some.logp_BL, together.logp_BL[pick])


def test_greedy_blocks_are_decoded_one_after_the_other():
    x = torch.randint(V, MAY.shape, generator=gen(1)).masked_fill(MAY, MASK)
    s = m.sample_masked(mixing, x, MASK, 2, "linear", temperature=0, remask=0, block=3)
    again = m.sample_masked(mixing, x, MASK, 2, "linear", temperature=0, remask=0, block=3, generator=gen(9))
    assert torch.equal(s.tokens_BL, again.tokens_BL)                                # greedy: no luck in it
    rank = MAY.cumsum(1) - 1
    assert torch.equal((s.order_BL // 2)[MAY], (rank // 3)[MAY])
    state, order = x[1].tolist(), []                                                # row 1 by hand: two blocks of three
    for block in ([0, 1, 2], [3, 4, 5]):
        for keep in (2, 1):
            lp = mixing(torch.tensor([state]))[0].log_softmax(-1)
            left = sorted((i for i in block if state[i] == MASK), key=lambda i: -lp[i].max().item())[:keep]
            for i in left: state[i] = lp[i].argmax().item()
            order.append(left)
    assert s.tokens_BL[1].tolist() == state
    for k, positions in enumerate(order): assert sorted(positions) == (s.order_BL[1] == k).nonzero()[:, 0].tolist()


def test_nothing_to_fill():
    x = torch.randint(V, (2, 4), generator=gen())
    s = m.sample_masked(mixing, x, MASK, 1)
    assert torch.equal(s.tokens_BL, x) and (s.order_BL == -1).all() and not s.logp_BL.any()


# ---- guidance ----

def test_guidance():
    c, u = torch.randn(2, 5, 7, generator=gen(), dtype=torch.float64)
    for s in (0.0, .5, 4.0): assert torch.allclose(m.guide_logits(c, u, s), (1 + s) * c - s * u)
    assert torch.equal(m.guide_logits(c, None, 4.0), c)
    strong = m.guide_logits(c, u, 4.0).softmax(-1)                                  # p(c)^5 / p(u)^4, normalised
    want = c.softmax(-1)**5 / u.softmax(-1)**4
    assert torch.allclose(strong, want / want.sum(-1, keepdim=True))
    with pytest.raises(UserError, match="guidance scale is -1"): m.guide_logits(c, u, -1)


# ---- estimators ----

def draws_of(name, may=MAY, rows=ROWS, seed=0, **more):
    order = torch.where(may, (may.cumsum(1) - 1) % 3, -1)
    return m.mask_draws(name, may, seed, rows, order_BL=order, steps=3, **more)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_draws_are_well_formed(name, n):
    d = draws_of(name, draws=n)
    assert d.hidden_BnKL.shape == d.scored_BnKL.shape and d.hidden_BnKL.shape[:2] == (4, n)
    assert not (d.scored_BnKL & ~d.hidden_BnKL).any() and not (d.hidden_BnKL & ~MAY[:, None, None]).any()
    assert (d.scored_BnKL.sum(2) <= 1).all()
    assert (d.mask_BT.view(4, n, -1).any(-1)).all()                                 # every draw of every row scores something
    once = name in ("diffu_grpo", "coupled_grpo", "trajectory")
    assert not once or (d.scored_BnKL.sum(2) == MAY[:, None]).all()                 # each token exactly once


def test_coupled_masks_are_complements_and_neither_is_empty():
    may = torch.ones(500, 4).bool()
    d = m.mask_draws("coupled_grpo", may, 0, torch.arange(500), low=.01, high=1.0)
    one, two = d.hidden_BnKL[:, 0, 0], d.hidden_BnKL[:, 0, 1]
    assert torch.equal(one, ~two) and one.any(1).all() and two.any(1).all()


@pytest.mark.parametrize("name, low, high", [("unigrpo", .1, .9), ("unigrpo", .6, .6), ("coupled_grpo", .2, .8)])
def test_share_that_is_hidden(name, low, high):
    may = torch.ones(400, 200).bool()
    d = m.mask_draws(name, may, 0, torch.arange(400), 2, low, high)
    share = d.hidden_BnKL[:, :, 0].float().mean(-1)                                 # [400, 2 draws]
    assert abs(share.mean() - (low + high) / 2) < .02 and share.min() > low - .17 and share.max() < high + .17
    middle = (low + high) / 2
    assert (share[:, 0] < middle + .17).all() and (share[:, 1] > middle - .17).all()        # stratified


@pytest.mark.parametrize("fade", [False, True])
def test_mask_grpo_schedule(fade):
    may = torch.ones(300, 100).bool()
    d = m.mask_draws("mask_grpo", may, 0, torch.arange(300), 4, .4, 1.0, fade=fade)
    share = d.hidden_BnKL[:, :, 0].float().mean((0, 2))
    assert d.hidden_BnKL[:, 3].all() and (share[1:] > share[:-1]).all()
    want = torch.tensor([.55, .7, .85, 1.0])
    assert (share - want).abs().max() < .02
    early, late = d.hidden_BnKL[:, 1, 0, :30].float().mean(), d.hidden_BnKL[:, 1, 0, -30:].float().mean()
    assert (late - early > .3) if fade else abs(late - early) < .03


def test_diffu_grpo_hides_a_share_of_the_prompt_and_scores_none_of_it():
    prompt = torch.zeros(300, 60).bool(); prompt[:, 10:50] = True
    may = torch.zeros(300, 60).bool(); may[:, 50:] = True
    def hidden(name, **more):
        return m.mask_draws(name, may, 0, torch.arange(300), prompt_BL=prompt, order_BL=torch.where(may, 0, -1), steps=1, **more)
    d = hidden("diffu_grpo")
    assert abs(d.hidden_BnKL[..., 10:50].float().mean() - .3) < .02
    assert not d.hidden_BnKL[..., :10].any() and d.hidden_BnKL[..., 50:].all()
    assert not d.scored_BnKL[..., :50].any()
    assert not hidden("diffu_grpo", hide_prompt=0.0).hidden_BnKL[..., :50].any()
    for name in NAMES[1:]: assert not hidden(name).hidden_BnKL[..., :50].any()
    assert abs(hidden("unigrpo", hide_prompt=.5).hidden_BnKL[..., 10:50].float().mean() - .5) < .02


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_ratio_is_exactly_one_with_shared_draws(name):
    "Old, new and reference are asked at different times and in different micro-batches: same numbers to the last bit."
    f = model(6, seed=2)
    x = torch.randint(V, MAY.shape, generator=gen(3))
    def logp(pick, seed=0):
        d = draws_of(name, MAY[pick], ROWS[pick], seed, draws=2)
        return m.draws_logp(m.token_scores(f, MASK), x[pick], d, MASK), d.mask_BT
    (old, mask), n = logp([0, 1, 2, 3]), 0
    assert old[mask].lt(0).all() and not old[~mask].any()
    for pick in ([0, 1, 2, 3], [2], [3, 1], [1, 0, 2]):
        new, again = logp(pick)
        assert torch.equal(again, mask[pick]) and torch.equal((new - old[pick]).exp(), torch.ones_like(new))
    lucky = name not in ("diffu_grpo", "trajectory")
    assert torch.equal(logp([0, 1, 2, 3], seed=1)[0], old) != lucky                 # another seed, other masks


@pytest.mark.parametrize("name", NAMES)
def test_draws_do_not_depend_on_padding(name):
    "The same rows, three columns of padding further to the right."
    wide = torch.nn.functional.pad(MAY, (3, 2))
    a, b = draws_of(name), draws_of(name, wide)
    assert torch.equal(a.hidden_BnKL, b.hidden_BnKL[..., 3:-2]) and torch.equal(a.scored_BnKL, b.scored_BnKL[..., 3:-2])


@pytest.mark.parametrize("how", [dict(steps=3), dict(steps=2, block=2, remask=0.0), dict(steps=2, temperature=.7)])
def test_trajectory_scores_what_the_sampler_reported(how):
    x = torch.randint(V, MAY.shape, generator=gen(1)).masked_fill(MAY, MASK)
    s = m.sample_masked(mixing, x, MASK, generator=row_generators(0, ROWS), **how)
    steps = int(s.order_BL.max()) + 1
    score = m.token_scores(mixing, MASK, how.get("temperature", 1.0))
    d = m.mask_draws("trajectory", MAY, 0, ROWS, order_BL=s.order_BL, steps=steps)
    assert torch.allclose(m.draws_logp(score, s.tokens_BL, d, MASK), s.logp_BL, atol=1e-6)
    some = m.mask_draws("trajectory", MAY, 0, ROWS, draws=2, order_BL=s.order_BL, steps=steps, visits=1)
    part, mask = m.draws_logp(score, s.tokens_BL, some, MASK), some.mask_BT
    assert torch.allclose(part[mask], s.logp_BL.repeat(1, 2)[mask], atol=1e-6)
    for row in mask.view(4, 2, -1).unbind(1):                                       # one step of each row, not an idle one
        for b in range(4): assert len(set(s.order_BL[b][row[b]].tolist())) == 1


def test_a_random_step_is_every_step_in_turn():
    order = torch.tensor([[0, 1, 1, 3]]).expand(900, -1)                            # step 2 revealed nothing
    d = m.mask_draws("trajectory", torch.ones(900, 4).bool(), 0, torch.arange(900), order_BL=order, steps=4, visits=1)
    share = d.mask_BT.float().mean(0)
    assert (share - 1 / 3).abs().max() < .06


@pytest.mark.parametrize("name", NAMES)
def test_logp_is_written_out_arithmetic_and_differentiable(name):
    w = torch.randn(V + 1, V, generator=gen(), dtype=torch.float64, requires_grad=True)
    f = lambda s: torch.nn.functional.one_hot(s, V + 1).double().sum(1, keepdim=True).expand(-1, s.shape[1], -1) @ w
    x, d = torch.randint(V, MAY.shape, generator=gen(3)), draws_of(name, draws=2)
    got = m.draws_logp(m.token_scores(f, MASK), x, d, MASK).view(4, 2, 6)
    for b, j, k in itertools.product(range(4), range(2), range(d.hidden_BnKL.shape[2])):
        state = [MASK if d.hidden_BnKL[b, j, k, i] else x[b, i].item() for i in range(6)]
        z = [sum(w[s, v].item() for s in state) for v in range(V)]
        for i in range(6):
            if not d.scored_BnKL[b, j, k, i]: continue
            assert math.isclose(got[b, j, i].item(), z[x[b, i]] - math.log(sum(map(math.exp, z))), abs_tol=1e-5)
    got.sum().backward()
    assert w.grad.abs().sum() > 0


# ---- bad settings ----

CANVAS = torch.full((2, 6), MASK)


@pytest.mark.parametrize("how, complaint", [
    (dict(steps=7), "7 steps for 6 masked tokens: .* give 1 to 6"), (dict(steps=0), "give 1 to 6"),
    (dict(steps=4, block=3), "4 steps for a block of 3 tokens"), (dict(steps=2, schedule="cosinus"), "Did you mean 'cosine'"),
    (dict(steps=2, temperature=-1), "temperature is -1"), (dict(steps=2, remask=-.5), "remask is -0.5"),
    (dict(steps=2, block=-2), "block is -2"), (dict(steps=2, remask=math.nan), "remask is nan"),
    (dict(steps=2, generator=[gen()]), "1 generators for 2 rows")])
def test_bad_sampling(how, complaint):
    with pytest.raises(UserError, match=complaint): m.sample_masked(mixing, CANVAS, MASK, **how)


@pytest.mark.parametrize("how, complaint", [
    (dict(estimator="unigrop"), "Did you mean 'unigrpo'"), (dict(estimator="trajectories"), "Did you mean 'trajectory'"),
    (dict(draws=0), "0 draws"), (dict(low=0.0), "share hidden from 0.0"), (dict(low=.9, high=.1), "share hidden from 0.9 to 0.1"),
    (dict(high=1.2), "to 1.2"), (dict(hide_prompt=1.5, prompt_BL=~MAY), "hide_prompt is 1.5"),
    (dict(prompt_BL=MAY, hide_prompt=.3), "overlap"),
    (dict(rows_B=ROWS[:2]), "4 samples but 2 row numbers"), (dict(estimator="trajectory"), "needs `order_BL` and `steps`"),
    (dict(estimator="trajectory", steps=3, order_BL=torch.zeros(4, 6).long()), "does not fit"),
    (dict(estimator="trajectory", steps=3, order_BL=torch.where(MAY, 3, -1)), "does not fit"),
    (dict(estimator="trajectory", steps=3, order_BL=torch.where(MAY, 1, -1), visits=4), "4 visits, but the sampler made 3 steps"),
    (dict(estimator="trajectory", steps=3, order_BL=torch.where(MAY, 1, -1), visits=-1), "-1 visits")])
def test_bad_estimators(how, complaint):
    usual = dict(estimator="unigrpo", maskable_BL=MAY, seed=0, rows_B=ROWS)
    with pytest.raises(UserError, match=complaint): m.mask_draws(**(usual | how))
