"""generate() against a world where everything is known: jointly Gaussian latents.

There the best denoiser is affine in z at any timestep vector. So the mean and covariance of samples follow exactly from
the sampler's formulas, and their goal is the textbook conditional. `pytest -s tests/test_exact.py` prints what the tests
measure.
"""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from baselines import generate_baseline
from test_method import alpha_bar, segments
from test_sampling import ETA, ddim_eta_step

import avdit
import data
from avdit import SAMPLERS, TASKS, Layout, Modality, NoiseSchedule, av_modalities, generate, task_mask

SCHEDULE, AB = NoiseSchedule(), alpha_bar()
WORLD = Layout(
    [
        Modality("video", (2,), 2, (0, 0.125, 0.625, 1.125)),
        Modality("audio", (), 3, (0, 0.125, 0.375, 0.625, 0.875, 1.125)),
    ]
)
E, SEGMENT = 3 * 4 + 5 * 3, torch.arange(8).repeat_interleave(torch.tensor([4] * 3 + [3] * 5))
AUDIO = SEGMENT >= 3


class Oracle:
    """E[eps | z] at any timestep vector: with z = D z0 + S eps it is S (D C D + S^2)^-1 (z - D mean).

    `alike` examples in a row must have the same t.
    """

    prediction = "eps"

    def __init__(self, alike=1):
        g = torch.Generator().manual_seed(1)
        root = torch.randn(E, E, generator=g, dtype=torch.float64) / math.sqrt(E)
        self.cov = root @ root.T + 0.1 * torch.eye(E, dtype=torch.float64)  # no conditional variance is below 0.1
        self.mean = torch.randn(E, generator=g, dtype=torch.float64)
        self.clean = self.mean + torch.randn(E, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(self.cov).T
        self.alike, self.calls = alike, []

    def __call__(self, z, t, z0_prev=None):
        self.calls.append(z)
        ab = torch.tensor(AB)[t[:: self.alike, SEGMENT]]
        a, s = ab.sqrt(), (1 - ab).sqrt()
        gain = s[:, :, None] * torch.linalg.inv(a[:, :, None] * self.cov * a[:, None] + torch.diag_embed(s**2))
        z = z.double().unflatten(0, (-1, self.alike)) - (a * self.mean)[:, None]
        return (z @ gain.mT).flatten(0, 1)

    def conditional(self, held):
        """Mean and covariance of the other elements where those of the mask `held` (E,) are self.clean."""
        gain = self.cov[~held][:, held] @ torch.linalg.inv(self.cov[held][:, held])
        mean = self.mean[~held] + gain @ (self.clean[held] - self.mean[held])
        return mean, self.cov[~held][:, ~held] - gain @ self.cov[held][:, ~held]


def recursion(mean, cov, steps, sampler):
    """Mean and covariance of the samples of a sampler that has the exact denoiser of N(mean, cov), from the papers.

    It knows the conditional world alone, in which all elements share one t, and starts from N(0, 1). At z = a mean the
    predicted noise is zero. X holds deviations from there: the one of the mean, and one per unit of noise.
    """
    taus = [round(1000 - 1000 * k / steps) for k in range(steps + 1)]
    one = np.eye(len(mean))
    X, extra = np.c_[-math.sqrt(AB[1000]) * mean, one], np.zeros_like(one)  # extra: of the noise drawn on the way
    for t, t2 in pairwise(taus):
        a, s, a2, s2 = (math.sqrt(x) for x in (AB[t], 1 - AB[t], AB[t2], 1 - AB[t2]))
        gain = s * np.linalg.inv(AB[t] * cov + (1 - AB[t]) * one)  # eps_hat = gain (z - a mean)
        z0_hat, var = (one - s * gain) / a, 1 - AB[t] / AB[t2]
        if sampler == "ddpm":
            A = (one - var / s * gain) / math.sqrt(1 - var)
        else:  # DDIM's Eq. 12, 16
            var *= (1 - AB[t2]) / (1 - AB[t]) * (ETA**2 if sampler == "ddim_eta" else 0)
            A = a2 * z0_hat + math.sqrt(s2**2 - var) * gain
        X, extra = A @ X, A @ extra @ A.T + (var if t2 else 0) * one
    return mean + X[:, 0], X[:, 1:] @ X[:, 1:].T + extra


def all_masks():
    """Five tasks and ten random masks: bool (15, S)."""
    named = [task_mask(task, WORLD) for task in TASKS if task != "continue-2s"]
    return torch.cat([torch.stack(named), torch.rand(10, 8, generator=torch.Generator().manual_seed(2)) < 0.5])


def probe(oracle, given, monkeypatch, **kwargs):
    """generate() as an affine map of its first noise -> matrix, offset per mask of `given`, bool (masks, S).

    It runs from zero and from every unit vector. Noise that is drawn later is replaced by zeros.
    """
    starts = torch.cat([torch.zeros(1, E), torch.eye(E)]).double().repeat(len(given), 1)
    noises = [starts]
    with monkeypatch.context() as patch:
        patch.setattr(avdit, "noise_like", lambda z, _: noises.pop() if noises else torch.zeros_like(z))
        out = generate(oracle, SCHEDULE, WORLD, oracle.clean.expand(len(starts), -1),
                       given.repeat_interleave(E + 1, 0), **kwargs).unflatten(0, (-1, E + 1))  # fmt: skip
    return (out[:, 1:] - out[:, :1]).mT, out[:, 0]


@pytest.mark.parametrize(("sampler", "steps", "alike", "bound"),
                         [("ddim", 250, 400, 0.03), ("ddpm", 50, 400, 0.1), ("ddpm", 1000, 100, 0.005),
                          ("ddim_eta", 250, 100, 0.05)])  # fmt: skip
def test_samples_have_the_exact_conditional_mean_and_covariance(sampler, steps, alike, bound, monkeypatch):
    """15 masks at once. Samples agree with the recursion (sampling error), and the recursion with the truth (bias)."""
    monkeypatch.setitem(SAMPLERS, "ddim_eta", ddim_eta_step)
    oracle, given = Oracle(alike), all_masks()
    made = generate(oracle, SCHEDULE, WORLD, oracle.clean.expand(15 * alike, -1), given.repeat_interleave(alike, 0),
                    steps=steps, sampler=sampler, generator=torch.Generator().manual_seed(5))  # fmt: skip
    white, off_diagonal, bias = [], [], []
    for held, x in zip(given[:, SEGMENT], made.unflatten(0, (15, alike))):
        assert (x[:, held] == oracle.clean[held]).all()
        if held.all():
            continue
        mean, cov = oracle.conditional(held)
        m, P = (torch.tensor(x) for x in recursion(mean.numpy(), cov.numpy(), steps, sampler))
        scale, scale_P = cov.diagonal().sqrt(), P.diagonal().sqrt()
        x = x[:, ~held]
        assert ((x.mean(0) - m).abs() < 5 * scale_P / math.sqrt(alike)).all()
        assert ((x.T.cov() - P).abs() < 7 * scale_P[:, None] * scale_P / math.sqrt(alike)).all()
        x = torch.linalg.solve_triangular(torch.linalg.cholesky(P), (x - m).T, upper=False)  # uncorrelated, if right
        off_diagonal.append((x @ x.T)[tuple(torch.triu_indices(len(x), len(x), 1))] / math.sqrt(alike))
        white.append(x.flatten())
        bias.append((((m - mean) / scale).abs().max(), ((P - cov) / scale[:, None] / scale).abs().max()))
    white, off_diagonal = torch.cat(white), torch.cat(off_diagonal)
    assert abs(white.mean()) < 5 / math.sqrt(len(white)) and abs(white.var() - 1) < 5 * math.sqrt(2 / len(white))
    assert abs(off_diagonal.var() - 1) < 5 * math.sqrt(2 / len(off_diagonal)) + 2 / alike
    worst = [max(b).item() for b in zip(*bias)]
    print(f"\n{sampler}, {steps} steps: worst bias of mean {worst[0]:.4f}, of covariance {worst[1]:.4f} standard units")
    assert max(worst) < bound


def test_generate_is_the_exact_linear_map(monkeypatch):
    """Without sampling error: generate()'s own matrix, for 15 masks at once, against the recursion's."""
    oracle, given = Oracle(), all_masks()
    matrix, offset = probe(oracle, given, monkeypatch, steps=50)
    for held, A, b in zip(given[:, SEGMENT], matrix, offset):
        assert (A[held] == 0).all() and (A[:, held].abs() < 1e-12).all()  # neither moved nor used as noise
        mean, cov = oracle.conditional(held)
        m, P = recursion(mean.numpy(), cov.numpy(), 50, "ddim")
        np.testing.assert_allclose(b[~held], m, atol=1e-5)
        np.testing.assert_allclose((A @ A.T)[~held][:, ~held], P, atol=1e-5)


def test_ddim_converges_at_first_order(monkeypatch):
    """With twice the steps the error of the covariance halves, if it starts from the true marginal at T. Then the mean
    is exact for any number of steps. From N(0, I) the mean keeps an error of a_T |C^(1/2) mean|."""
    oracle, joint = Oracle(), torch.zeros(1, 8, dtype=torch.bool)
    a, s = math.sqrt(AB[1000]), math.sqrt(1 - AB[1000])
    marginal = a * a * oracle.cov + s * s * torch.eye(E)
    values, vectors = torch.linalg.eigh(oracle.cov)
    root = vectors * values.sqrt() @ vectors.T
    left = a * (root @ oracle.mean).norm()  # what the exact flow makes of the mean that N(0, I) lacks at T
    errors = []
    print("\nsteps, error of covariance from the true marginal, of mean from the true marginal and from N(0, I)")
    for steps in (125, 250, 500, 1000):
        (A,), (b,) = probe(oracle, joint, monkeypatch, steps=steps)
        errors.append((A @ marginal @ A.T - oracle.cov).norm() / oracle.cov.norm())
        exact, from_zero = (b + A @ (a * oracle.mean) - oracle.mean).norm(), (b - oracle.mean).norm()
        print(f"{steps:5} {errors[-1]:.5f} {exact:.5f} {from_zero:.5f}")
        assert exact < 1e-4  # on the mean's own path there is no noise to get wrong
        assert abs(from_zero / left - 1) < 0.1
    print(f"level 0.00635 |C^(1/2) mean| = {left:.5f}")
    ratios = [big / small for big, small in pairwise(errors)]
    assert all(1.8 < r < 2.2 for r in ratios), ratios


@pytest.mark.parametrize(("drop", "names"), [(None, AUDIO | ~AUDIO), (["audio"], AUDIO), (["video"], ~AUDIO)])
def test_guidance_extrapolates_between_two_exact_conditionals(drop, names):
    """Eq. 16: (1 + s) E[eps | z, all that is given] - s E[eps | z, what is not dropped], whole and per modality."""
    s, oracle, given = 1.5, Oracle(), task_mask("continue", WORLD)
    made, plain = (generate(oracle, SCHEDULE, WORLD, oracle.clean.expand(4, -1), given, steps=2, guidance=scale,
                            guidance_drop=drop, generator=torch.Generator().manual_seed(0))
                   for scale in (s, 0.0))  # fmt: skip
    held = given[SEGMENT]
    z = oracle.calls[0][:4, ~held]  # the half of the call that has the condition
    for tau, tau2 in ((1000, 500), (500, 0)):
        eps = []
        for known in (held, held & ~names):
            mean, cov = oracle.conditional(known)
            wanted = ~held[~known]
            mean, cov = mean[wanted], cov[wanted][:, wanted]
            noisy = AB[tau] * cov + (1 - AB[tau]) * torch.eye(len(mean))
            eps.append(torch.linalg.solve(noisy, (z - math.sqrt(AB[tau]) * mean).T).T * math.sqrt(1 - AB[tau]))
        guided = (1 + s) * eps[0] - s * eps[1]
        z0_hat = (z - math.sqrt(1 - AB[tau]) * guided) / math.sqrt(AB[tau])
        z = math.sqrt(AB[tau2]) * z0_hat + math.sqrt(1 - AB[tau2]) * guided
    assert (made - plain)[:, ~held].abs().max() > 1  # it does something, and what it does is this
    # To the oracle, the noise in place of the condition has 0.00635 of signal, which moves this by 0.02.
    torch.testing.assert_close(made[:, ~held], z, atol=0.03, rtol=0)


@pytest.mark.parametrize(("task", "guidance", "drop"), [("inpaint", 0.0, ["audio"]), ("joint", 2.0, None),
                                                        ("a2v", 2.0, ["video"])])  # fmt: skip
def test_guidance_of_zero_or_away_from_nothing_is_none(task, guidance, drop):
    """The result is bit-identical to no guidance, and no call has a second half."""
    oracle = Oracle()
    runs = [generate(oracle, SCHEDULE, WORLD, oracle.clean.expand(3, -1), task_mask(task, WORLD), steps=3,
                     generator=torch.Generator().manual_seed(0), **kwargs)
            for kwargs in ({}, {"guidance": guidance, "guidance_drop": drop})]  # fmt: skip
    assert torch.equal(*runs) and [len(call) for call in oracle.calls] == [3] * 6


def distance(m, P, mean, cov):
    """Error of the mean in standard deviations (root mean square over whitened elements), of the covariance relative."""
    shift = torch.linalg.solve(torch.linalg.cholesky(cov), m - mean).norm() / math.sqrt(len(mean))
    return shift.item(), ((P - cov).norm() / cov.norm()).item()


@pytest.mark.parametrize("task", ["a2v", "v2a", "inpaint", "continue"])
def test_replacement_misses_the_conditional_that_masked_sampling_hits(task, monkeypatch):
    """The paper's point [Sec. 3.3, App. C.2]. Both have the exact denoiser and differ in how they keep what is given."""
    n, oracle, given, found = 1000, Oracle(), task_mask(task, WORLD), {}
    held = given[SEGMENT]
    mean, cov = oracle.conditional(held)
    (A,), (b,) = probe(oracle, given[None], monkeypatch, steps=100)
    found["monl"] = b[~held], (A @ A.T)[~held][:, ~held]  # without sampling error
    x = generate_baseline(Oracle(alike=n), SCHEDULE, WORLD, oracle.clean.expand(n, -1), given, steps=100,
                          generator=torch.Generator().manual_seed(0))[:, ~held]  # fmt: skip
    found["replacement"] = x.mean(0), x.T.cov()
    found = {k: distance(m, P, mean, cov) for k, (m, P) in found.items()}
    print(f"\n{task}: " + ", ".join(f"{k} mean {v[0]:.3f} covariance {v[1]:.3f}" for k, v in found.items()))
    assert max(found["monl"]) < 0.05
    assert found["replacement"][0] > 0.5 and found["replacement"][1] > 0.25  # sampling alone: 0.03 and 0.1


class TrainedFrom(Oracle):
    """The best denoiser of a training that never went below t = `least`. It takes t = 0 for that timestep."""

    def __init__(self, least):
        super().__init__(alike=E + 1)
        self.least = least

    def __call__(self, z, t, z0_prev=None):
        return super().__call__(z, torch.where(t == 0, self.least, t))


@pytest.mark.parametrize(("least", "most"), [(1, 0.003), (20, 0.1)])
def test_what_it_costs_to_give_t_0_where_training_began_later(least, most, monkeypatch):
    """Alg. 1 draws t from 1..T, and Alg. 3 gives t = 0. Such a network believes in a conditional that has a closed form,
    and generate() must reach it."""
    for task in ("a2v", "v2a", "inpaint", "continue"):
        oracle, given = TrainedFrom(least), task_mask(task, WORLD)
        held = given[SEGMENT]
        mean, cov = oracle.conditional(held)
        a, s = math.sqrt(AB[least]), math.sqrt(1 - AB[least])
        across, inside = a * oracle.cov[~held][:, held], a * a * oracle.cov[held][:, held]
        gain = across @ torch.linalg.inv(inside + s * s * torch.eye(len(inside)))
        believed = oracle.mean[~held] + gain @ (oracle.clean[held] - a * oracle.mean[held])
        believed_cov = oracle.cov[~held][:, ~held] - gain @ across.T
        (A,), (b,) = probe(oracle, given[None], monkeypatch, steps=250)
        assert ((b[~held] - believed) / believed_cov.diagonal().sqrt()).abs().max() < 0.03  # the sampler's own bias
        assert ((A @ A.T)[~held][:, ~held] - believed_cov).norm() / believed_cov.norm() < 0.03
        cost = distance(believed, believed_cov, mean, cov)
        print(f"\n{task}, t = 0 taken for {least}: mean {cost[0]:.4f} covariance {cost[1]:.4f}", end="")
        assert max(cost) < most


def test_a_clean_neighbour_leaves_less_to_learn_from_farther_away():
    """Gaussian latents with the toy world's covariance. What does the best denoiser of video gain by seeing more than a
    segment and those that touch it in time? The mean squared error of v or z0 falls by this much."""
    layout = Layout(av_modalities(8, (2, 2), 6, 0.125, 6))
    tokenizers, clips = data.media_tokenizers(layout, data.TOY, residual=False), data.toy_clips(512, 0)[0]
    tokenizers.fit(clips)
    cov = tokenizers.encode(clips).double().T.cov() + 1e-3 * torch.eye(layout.E)
    owner = segments(layout)
    touching = (layout.starts[:, None] < layout.ends + 1e-6) & (layout.ends[:, None] > layout.starts - 1e-6)

    def gain(t, segments, unit):
        """t (n, S) -> the mean over n and `segments` of the error without the farther ones, less that with all."""
        ab = torch.tensor(AB)[t][:, owner]
        noisy = ab[:, :, None].sqrt() * cov * ab[:, None].sqrt() + torch.diag_embed(1 - ab)
        lost = []
        for n in segments:
            own, seen = owner == n, touching[n][owner]
            error = [cov.diagonal()[own] - (x * torch.linalg.solve(M, x.mT).mT).sum(-1) for x, M in (
                (ab[:, None].sqrt() * cov[own], noisy),
                (ab[:, None, seen].sqrt() * cov[own][:, seen], noisy[:, seen][:, :, seen]))]  # fmt: skip
            lost.append(((error[1] - error[0]) / unit(1 - ab[:, own])).where(t[:, [n]] > 0, 0).mean())
        return torch.stack(lost).mean().item()

    draw = partial(avdit.sample_timesteps, layout=layout, batch=64, T=1000, generator=torch.Generator().manual_seed(0))
    by_mixture = {name: gain(draw(name), range(layout.lengths[0]), lambda var: var.clamp(min=1e-4))
                  for name in ("vanilla", "pt", "pm", "ptm", "task:continue")}  # fmt: skip
    print("\nmean error of v, all video:", {name: f"{value:.3f}" for name, value in by_mixture.items()})
    t = draw("ptm", batch=1000)
    t = t[t[:, 3] > 800]  # a segment in the middle that is noise
    neighbours = torch.minimum(t[:, 2], t[:, 4])
    clean, noisy = (gain(t[mask], [3], torch.ones_like) for mask in (neighbours < 100, neighbours > 500))
    print(f"error of z0 of a noisy segment, a neighbour nearly clean: {clean:.3f}, no neighbour clean: {noisy:.3f}")
    monl = sum(by_mixture[name] for name in avdit.MONL) / 4
    assert 0 < monl < 0.6 * by_mixture["task:continue"] and 0 < clean < 0.7 * noisy


def test_steps_are_the_papers():
    """All steps from t to t - 1, and 200 random longer ones, one element each, in float64. a and s are float32."""
    g = torch.Generator().manual_seed(0)
    t = torch.cat([torch.arange(1, 1001), torch.randint(2, 1001, (200,), generator=g)])
    t2 = torch.cat([torch.arange(1000), (t[1000:] * torch.rand(200, generator=g)).long()])
    z, z0_hat, eps, noise = torch.randn(4, 1200, generator=g, dtype=torch.float64)
    now, then = ((SCHEDULE.a[x], SCHEDULE.s[x]) for x in (t, t2))
    ab, ab2 = torch.tensor(AB)[t], torch.tensor(AB)[t2]
    alpha = ab / ab2
    want = {
        "ddim": ab2.sqrt() * z0_hat + (1 - ab2).sqrt() * eps,
        "ddpm": (z - (1 - alpha) / (1 - ab).sqrt() * eps) / alpha.sqrt() + (t2 > 0) * (1 - alpha).sqrt() * noise,
    }
    # Rounding moves alpha, the square of a quotient of two float32, by at most 5e-7. This moves the factors of eps and
    # of the noise by the following. At t = 1, where 1 - alpha is 1e-4, it is half a percent of them.
    error = 5e-7 * (eps.abs() / (1 - ab).sqrt() + noise.abs() / (2 * (1 - alpha).sqrt())) / alpha.sqrt()
    size = (z.abs() + eps.abs()) / alpha.sqrt() + noise.abs() + z0_hat.abs()
    for name, sampler in SAMPLERS.items():
        got = sampler(z, z0_hat, eps, now, then, lambda: noise)
        assert ((got - want[name]).abs() <= 1e-6 * size + (error if name == "ddpm" else 0)).all(), name
