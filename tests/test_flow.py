"""The flow mechanism against arithmetic written out in float64 and distributions known in closed form; its invariances; every bad input."""
import math

import pytest
import torch
from torch import nn

from unify_rl.core import Part, UserError
from unify_rl.grpo.objective import objective, token_weights
from unify_rl.mechanisms import flow

LEVELS = dict(flow_sde=.7, dance=.3, cps=.8)
F64 = torch.float64


def gen(seed=0): return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    "A small velocity on [b, 3, 4] latents whose output for a row depends on nothing but that row."
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(.4 * torch.randn(4, 4, generator=gen(seed), dtype=dtype))
        self.u = nn.Parameter(.4 * torch.randn(4, generator=gen(seed + 1), dtype=dtype))

    def forward(self, x, t): return torch.tanh(x @ self.w + t[:, None, None] * self.u)


# ---- a step, number by number ----

def reference_step(x, v, t, t_next, eta, form):
    "Mean and standard deviation of one coordinate, from the predicted data, the predicted noise and the score."
    data, noise, span = x - t * v, x + (1 - t) * v, t - t_next
    if form == "cps":
        std = t_next * math.sin(eta * math.pi / 2)
        return (1 - t_next) * data + math.sqrt(t_next**2 - std**2) * noise, std
    score = -(x - (1 - t) * data) / t**2
    s = eta if form == "dance" else eta * math.sqrt(t / (1 - (t_next if t == 1 else t)))
    return x - span * (v - s * s / 2 * score), s * math.sqrt(span)


def reference_logp(x_next, mean, std): return -(x_next - mean)**2 / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize("t, t_next", [(1., .9), (.9, .6), (.5, .45), (.2, .05)])
@pytest.mark.parametrize("dtype, eps", [(F64, 1e-11), (torch.float32, 1e-4)])
def test_step_and_logp_equal_written_out_arithmetic(form, t, t_next, dtype, eps):
    x, v = torch.randn(2, 3, 2, 4, generator=gen(3), dtype=F64).to(dtype)
    x_next, mean, std = flow.sde_step(x, v, t, t_next, LEVELS[form], form, gen(4))
    want = [reference_step(a, b, t, t_next, LEVELS[form], form) for a, b in zip(x.flatten().tolist(), v.flatten().tolist())]
    assert mean.dtype == dtype and (mean.double().flatten() - torch.tensor([m for m, _ in want], dtype=F64)).abs().max() < eps
    logs = [reference_logp(a, *ms) for a, ms in zip(x_next.flatten().tolist(), want)]
    for reduction, n in (("sum", 1), ("mean", 8)):
        got = flow.step_logp(x_next, mean, std, reduction).tolist()
        for row in range(3): assert math.isclose(got[row], math.fsum(logs[8 * row:8 * row + 8]) / n, rel_tol=10 * eps, abs_tol=10 * eps)


@pytest.mark.parametrize("form", LEVELS)
def test_rows_may_stand_at_different_times(form):
    x, v = torch.randn(2, 3, 4, generator=gen(), dtype=F64)
    t, t_next = torch.tensor([.9, .5, .2]), torch.tensor([.8, .3, .1])
    _, mean, std = flow.sde_step(x, v, t, t_next, LEVELS[form], form)
    for i in range(3):
        _, one, std_one = flow.sde_step(x[i:i+1], v[i:i+1], t[i].item(), t_next[i].item(), LEVELS[form], form)
        assert torch.allclose(mean[i:i+1], one, atol=1e-7) and math.isclose(std[i].item(), std_one.item(), rel_tol=1e-6)


def test_half_precision_inputs_are_computed_in_float32():
    x = torch.randn(2, 8, generator=gen()).bfloat16()
    x_next, mean, _ = flow.sde_step(x, x, .5, .4, .7, "flow_sde", gen())
    assert x_next.dtype == mean.dtype == flow.ode_step(x, x, .5, .4).dtype == torch.float32


def test_bagel_schedule():
    "BAGEL: linspace(1, 0, N), then s t / (1 + (s - 1) t); N = 50 points are 49 steps."
    want = [3 * p / (1 + 2 * p) for p in (1 - i / 49 for i in range(50))]
    assert torch.allclose(flow.timesteps(49, 3).double(), torch.tensor(want, dtype=F64), atol=1e-6)
    t = flow.training_times(torch.rand(20_000, generator=gen(), dtype=F64))
    assert abs(t.logit().mean()) < .03 and abs(t.logit().std() - 1) < .03           # the logit is N(0, 1)


# ---- the distribution a sampler ends in ----

MEANS, SHARES, SD = torch.tensor([[-1.5, -1], [-1.5, 1], [1.5, 0]], dtype=F64), torch.tensor([.2, .3, .5], dtype=F64), .3


def mixture(n, seed):
    k = torch.multinomial(SHARES, n, True, generator=gen(seed))
    return MEANS[k] + SD * torch.randn(n, 2, generator=gen(seed + 1), dtype=F64)


def mixture_velocity(x, t):
    "E[noise - data | x_t = x] when the data is the mixture: each component is a Gaussian regression."
    t = t[:, None, None]
    var = (1 - t)**2 * SD**2 + t**2
    off = x[:, None] - (1 - t) * MEANS                                              # [n, k, 2]
    share = (SHARES.log() - (off**2 / var).sum(-1) / 2).softmax(1)[..., None]
    return (share * (t / var * off - MEANS - (1 - t) * SD**2 / var * off)).sum(1)


def ks(a, b):
    "Two-sample Kolmogorov-Smirnov statistic."
    a, b = a.sort().values, b.sort().values
    at = torch.cat([a, b])
    return (torch.searchsorted(a, at, right=True) / len(a) - torch.searchsorted(b, at, right=True) / len(b)).abs().max().item()


def agree(x, y):
    "Do two samples look alike along eight directions and in their distance from the nearest mode? (Level about 1e-5 for each test.)"
    angle = torch.arange(8, dtype=F64) * math.pi / 8
    axes = torch.stack([angle.cos(), angle.sin()])
    near = lambda z: torch.cdist(z, MEANS).amin(1)
    worst = max([ks(x @ d, y @ d) for d in axes.T] + [ks(near(x), near(y))])
    return worst < math.sqrt(-math.log(1e-5 / 2) / 2) * math.sqrt(1 / len(x) + 1 / len(y))


N, STEPS = 4000, 120
FINE = LEVELS | dict(cps=.8 * math.sqrt(10 / STEPS))        # cps agrees only if its noise shrinks with the step


def end(form=None, velocity=mixture_velocity, seed=5, levels=FINE):
    noise = torch.randn(N, 2, generator=gen(seed), dtype=F64)
    window = () if form is None else range(STEPS - 1)
    return flow.sample_flow(velocity, noise, flow.timesteps(STEPS), window, levels.get(form, 0), form or "flow_sde", generator=gen(seed + 1)).final


@pytest.mark.parametrize("form", [None, *LEVELS])
def test_every_sampler_ends_in_the_data(form): assert agree(end(form), mixture(N, 11))


@pytest.mark.parametrize("form", LEVELS)
def test_sde_and_ode_end_alike(form): assert agree(end(form), end())


@pytest.mark.parametrize("form, fault", [
    ("flow_sde", lambda a, b, std: (2 - a, b, std)),                # the drift along x with the wrong sign
    ("dance", lambda a, b, std: (2 - a, b, std)),
    ("flow_sde", lambda a, b, std: (a, b, 2**.5 * std)),            # noise without the drift that belongs to it
    ("flow_sde", lambda a, b, std: (a, b, 0 * std)),                # drift without its noise
    ("cps", lambda a, b, std: (a, b, 0 * std + 1e-9)),
])
def test_a_wrong_step_ends_elsewhere(form, fault, monkeypatch):
    right = flow.FORMS[form]
    monkeypatch.setitem(flow.FORMS, form, lambda *args: fault(*right(*args)))
    monkeypatch.setattr(flow, "step_logp", lambda x, mean, *args: mean[:, 0])
    assert not agree(end(form), mixture(N, 11))


def test_cps_with_its_usual_noise_narrows_the_modes():
    "A known bias: however fine the steps, the spread around the modes ends near 3/4 of the data's (lesson 11)."
    x = end("cps", levels=LEVELS)
    spread = torch.cdist(x, MEANS).amin(1).square().mean().div(2).sqrt().item()
    assert .6 * SD < spread < .9 * SD and not agree(x, mixture(N, 11))


def test_a_wrong_velocity_ends_elsewhere():
    assert not agree(end(velocity=lambda x, t: mixture_velocity(x, t) + .1), mixture(N, 11))


# ---- noise in a subspace ----

TILTED = torch.tensor([[.6, .8]], dtype=F64)


@pytest.mark.parametrize("form", LEVELS)
def test_noise_along_one_direction_ends_in_the_data_too(form):
    noise = torch.randn(N, 2, generator=gen(5), dtype=F64)
    x = flow.sample_flow(mixture_velocity, noise, flow.timesteps(STEPS), range(STEPS - 1), FINE[form], form, generator=gen(6), basis=TILTED).final
    assert agree(x, mixture(N, 11)) and not torch.allclose(x, end(form))


def test_a_subspace_without_its_drift_ends_elsewhere(monkeypatch):
    monkeypatch.setattr(flow, "step_mean", lambda x, v, t, t_next, level, form, basis: (flow.ode_step(x, v, t, t_next), flow.step_coefficients(torch.tensor(t), torch.tensor(t_next), level, form)[2].reshape(1, 1)))
    noise = torch.randn(N, 2, generator=gen(5), dtype=F64)
    assert not agree(flow.sample_flow(mixture_velocity, noise, flow.timesteps(STEPS), range(STEPS - 1), .7, "flow_sde", generator=gen(6), basis=TILTED).final, mixture(N, 11))


@pytest.mark.parametrize("reduction, n", [("sum", 1), ("mean", 3)])
def test_a_subspace_has_the_density_of_its_coordinates(reduction, n):
    "Against torch's multivariate normal over the coordinates; all directions are the same as none named; what is stored scores as it was drawn."
    basis, net = torch.linalg.qr(torch.randn(12, 12, generator=gen(1)))[0], Net()
    x, v = noise(), net(noise(), torch.full((5,), .6)).detach()
    x_next, mean, std = flow.sde_step(x, v, .6, .5, generator=gen(2), basis=basis[:3])
    coordinates = lambda z: z.flatten(1) @ basis[:3].T
    want = torch.distributions.MultivariateNormal(coordinates(mean), std.item()**2 * torch.eye(3)).log_prob(coordinates(x_next)) / n
    assert torch.allclose(flow.step_logp(x_next, mean, std, reduction, basis[:3]), want, atol=1e-5)
    whole, free = flow.sde_step(x, v, .6, .5, generator=gen(2), basis=basis), flow.sde_step(x, v, .6, .5, generator=gen(2))
    assert torch.allclose(whole[0], free[0], atol=1e-5) and torch.allclose(flow.step_logp(*whole, "sum", basis), flow.step_logp(*free, "sum"), atol=1e-4)
    s = settings(reduction=reduction, basis=basis[:3])
    got = flow.sample_flow(net, noise(), generator=gen(), **s)
    assert torch.equal(flow.sde_logp(net, got.states, **s), got.logp) and not torch.allclose(flow.sde_logp(net, got.states, **s | dict(basis=basis[3:6])), got.logp)
    moved, one = Net(seed=3), {k: s[k] for k in ("times", "window", "noise_level", "form", "basis")}
    means, other = flow.sde_means(net, got.states, **one), flow.sde_means(moved, got.states, **one)
    kl = flow.means_kl(means, other, **s)[:, 0]
    b, sd = (z.item() for z in flow.step_coefficients(torch.tensor(s["times"][1]), torch.tensor(s["times"][2]), .7)[1:])
    apart = coordinates(net(got.states[:, 0, 0], torch.full((5,), s["times"][1])) - moved(got.states[:, 0, 0], torch.full((5,), s["times"][1])))
    assert torch.allclose(kl, b**2 * apart.square().sum(1) / (2 * sd**2) / n, rtol=1e-3)


# ---- what the objective relies on ----

def settings(form="flow_sde", window=(1, 2, 5), **kw):
    return dict(times=flow.timesteps(8, 3).tolist(), window=window, noise_level=LEVELS[form], form=form) | kw


def noise(b=5, seed=7): return torch.randn(b, 3, 4, generator=gen(seed))


@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize("reduction", flow.REDUCTIONS)
@pytest.mark.parametrize("weighting", flow.WEIGHTINGS)
def test_on_policy_ratio_is_exactly_one(form, reduction, weighting):
    net, s = Net(), settings(form, reduction=reduction, weighting=weighting)
    got = flow.sample_flow(net, noise(), generator=gen(), **s)
    logp = flow.sde_logp(net, got.states, **s)
    assert logp.requires_grad and torch.equal(logp, got.logp) and got.logp.shape == (5, 3)
    weights = token_weights(torch.ones(5, 3, dtype=torch.bool))
    _, stats = objective(logp, got.logp, None, weights, torch.randn(5, generator=gen()))
    assert abs(stats["ratio_mean"].item() - 1) < 1e-6 and stats["clip_fraction"] == 0
    assert not torch.equal(flow.sde_logp(net, got.states.bfloat16().float(), **s), got.logp)     # states rounded after the fact: off-policy


def test_forward_ratio_is_exactly_one():
    net, x0 = Net(), noise()
    old = flow.forward_logp(net, x0, flow.forward_draws(x0, 1, torch.arange(5)))
    assert torch.equal(old, flow.forward_logp(net, x0, flow.forward_draws(x0, 1, torch.arange(5)))) and old.shape == (5, 4)
    assert not torch.equal(old, flow.forward_logp(net, x0, flow.forward_draws(x0, 2, torch.arange(5))))


def test_forward_logp_by_hand():
    net, x0, t = Net(dtype=F64), noise().double(), torch.tensor([[.1, .9], [.3, .4], [.5, .5], [.2, .7], [1., .6]], dtype=F64)
    e = torch.randn(5, 2, 3, 4, generator=gen(), dtype=F64)
    got = flow.forward_logp(net, x0, flow.Draws(t, e), "sum")
    for i in range(5):
        for k in range(2):
            x_t = (1 - t[i, k]) * x0[i] + t[i, k] * e[i, k]
            want = -sum(((net(x_t[None], t[i, k][None])[0] - (e[i, k] - x0[i])).flatten())**2)
            assert math.isclose(got[i, k].item(), want.item(), rel_tol=1e-12)


@pytest.mark.parametrize("form", LEVELS)
def test_batched_equals_one_by_one(form):
    net, s, rows, x = Net(), settings(form), torch.tensor([4, 0, 9, 2, 7]), noise()
    together = flow.sample_flow(net, x, generator=flow.row_generators(3, rows), **s)
    for i in range(5):
        alone = flow.sample_flow(net, x[i:i+1], generator=flow.row_generators(3, rows[i:i+1]), **s)
        for name in ("final", "states", "logp"):
            assert torch.allclose(getattr(alone, name)[0], getattr(together, name)[i], atol=1e-5), name
    drawn = flow.forward_draws(x, 3, rows)
    for i in range(5):
        alone = flow.forward_draws(x[i:i+1], 3, rows[i:i+1])
        assert torch.equal(alone.t[0], drawn.t[i]) and torch.equal(alone.noise[0], drawn.noise[i])
    assert len({x.sum().item() for x in drawn.noise.flatten(0, 1)}) == 20 and len(set(drawn.t.flatten().tolist())) == 20   # all rows and draws differ


def test_a_part_can_be_cut_without_changing_its_logp():
    "Both estimators through `Part.select`: nothing about a row is lost."
    net, rows = Net(), torch.arange(10, 16)
    s = settings()
    got = flow.sample_flow(net, noise(6), generator=flow.row_generators(3, rows), **s)
    sde = Part("image", rows, got.states, torch.ones(6, 3, dtype=torch.bool), {}, torch.zeros(6).long(), got.logp, settings=s)
    forward = Part("image", rows, got.final[:, None].expand(-1, 4, -1, -1), torch.ones(6, 4, dtype=torch.bool), {}, torch.zeros(6).long(),
                   settings=dict(seed=8))
    score_sde = lambda p: flow.sde_logp(net, p.actions, **p.settings)
    score_forward = lambda p: flow.forward_logp(net, p.actions[:, 0], flow.forward_draws(p.actions[:, 0], p.settings["seed"], p.rows))
    for part, score in ((sde, score_sde), (forward, score_forward)):
        pick = torch.tensor([5, 1, 2])
        assert torch.allclose(score(part.select(pick)), score(part)[pick], atol=1e-5)


def test_empty_window_is_the_pure_ode():
    net, times = Net(), flow.timesteps(8, 3)
    got = flow.sample_flow(net, noise(), times, (), generator=gen())
    x = noise()
    for a, b in zip(times, times[1:]): x = x + (b - a) * net(x, a.expand(5)).detach()
    assert torch.allclose(got.final, x, atol=1e-6) and got.states.shape == (5, 0, 2, 3, 4) and got.logp.shape == (5, 0)
    assert flow.sde_logp(net, got.states, times, ()).shape == (5, 0)


@pytest.mark.parametrize("form", LEVELS)
def test_no_noise_is_the_ode_step(form):
    x, v = torch.randn(2, 5, 4, generator=gen(), dtype=F64)
    x_next, mean, std = flow.sde_step(x, v, .6, .5, 0.0, form)
    assert torch.allclose(mean, flow.ode_step(x, v, .6, .5), atol=1e-12) and torch.equal(x_next, mean) and not std.any()


def test_states_chain_and_only_the_window_is_kept():
    got = flow.sample_flow(Net(), noise(), generator=gen(), **settings(window=(2, 3)))
    assert torch.equal(got.states[:, 0, 1], got.states[:, 1, 0]) and got.states.shape[1] == got.logp.shape[1] == 2


@pytest.mark.parametrize("form", LEVELS)
def test_gradient_size_by_step(form):
    "'flat' makes the log-probability's gradient to the velocity equally large at all steps; unweighted it is |b| / std."
    for t, t_next in ((.9, .8), (.5, .4), (.15, .05)):
        v = torch.zeros(20_000, 1, dtype=F64, requires_grad=True)
        x_next, mean, std = flow.sde_step(torch.zeros_like(v), v, t, t_next, LEVELS[form], form, gen())
        size = torch.autograd.grad(flow.step_logp(x_next.detach(), mean, std, "sum").sum(), v)[0].std().item()
        assert math.isclose(size * flow.step_weight(t, t_next, LEVELS[form], form, "flat").item(), 1, rel_tol=.02)


@pytest.mark.parametrize("reduction", flow.REDUCTIONS)
def test_gaussian_kl_is_the_mean_log_ratio(reduction):
    mean, ref, std = torch.randn(1, 4, generator=gen(), dtype=F64), torch.randn(1, 4, generator=gen(1), dtype=F64), torch.tensor([[.8]], dtype=F64)
    x = mean + std * torch.randn(200_000, 4, generator=gen(2), dtype=F64)
    ratio = flow.step_logp(x, mean.expand_as(x), std, reduction) - flow.step_logp(x, ref.expand_as(x), std, reduction)
    assert math.isclose(flow.gaussian_kl(mean, ref, std, reduction).item(), ratio.mean().item(), rel_tol=.02)


def test_windows():
    seen = {flow.sde_window(10, 2, gen(i)) for i in range(300)}
    assert seen == {(i, i + 1) for i in range(8)}                                  # never the last step
    assert flow.sde_window(10, 0) == () and flow.sde_window(10, 3, low=2, high=5) == (2, 3, 4)
    assert flow.sde_window(10, 2, gen(3)) == flow.sde_window(10, 2, gen(3))


# ---- what a user can get wrong ----

def sample(**kw): return flow.sample_flow(Net(), noise(), **(settings() | kw))


@pytest.mark.parametrize("call, words", [
    (lambda: sample(window=(7, 8)), r"window \(7, 8\).*0 \.\.\. 7.*8 steps"),
    (lambda: sample(window=(-1,)), "window"),
    (lambda: sample(window=(3, 2)), "rise"),
    (lambda: sample(window=(2, 2)), "rise"),
    (lambda: sample(window=(6, 7), form="cps"), "step 7 ends at time 0"),
    (lambda: sample(noise_level=-.1), "noise_level is -0.1"),
    (lambda: sample(noise_level=math.nan), "noise_level is nan"),
    (lambda: sample(noise_level=0.), "raise noise_level"),
    (lambda: sample(noise_level=1.2, form="cps"), "between 0 and 1"),
    (lambda: sample(form="flow_sd"), "Did you mean 'flow_sde'"),
    (lambda: sample(form="dance_sde"), "Did you mean 'dance'"),
    (lambda: sample(reduction="means"), "Did you mean 'mean'"),
    (lambda: sample(weighting="flats"), "Did you mean 'flat'"),
    (lambda: sample(times=[0., .5, 1.], window=()), "fall from 1"),
    (lambda: sample(times=[1.], window=()), "fall from 1"),
    (lambda: sample(times=[1., .5, .5, 0.], window=()), "fall from 1"),
    (lambda: flow.sde_logp(Net(), torch.zeros(5, 2, 2, 3, 4), **settings()), "2 stored steps.*has 3"),
    (lambda: flow.timesteps(0), "0 sampling steps"),
    (lambda: flow.timesteps(5, 0), "time shift is 0"),
    (lambda: flow.sde_window(10, 10), "does not fit"),
    (lambda: flow.sde_window(10, 1, low=8, high=12), "does not fit"),
    (lambda: flow.forward_draws(noise(), 0, torch.arange(5), 0), "at least 1"),
    (lambda: flow.forward_draws(noise(), 0, torch.arange(4)), "5 samples but 4"),
    (lambda: flow.step_logp(noise(), noise(), 0.0), "without noise"),
    (lambda: sample(generator=flow.row_generators(0, torch.arange(4))), "4 generators for 5 rows"),
    (lambda: flow.flow_loss(Net(), noise(), noise(), torch.ones(5), "avg"), "unknown reduction"),
])
def test_bad_input(call, words):
    with pytest.raises(UserError, match=words): call()
