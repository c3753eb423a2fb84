"""generate() against the one world where everything is known: jointly Gaussian latents.

There the best denoiser at ANY timestep vector is affine in z, so that a sampler's mean and covariance follow from its
steps exactly, and what it should have reached is the textbook conditional. `pytest -s tests/test_exact.py` prints what
the tests measure.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_method import alpha_bar

import avdit
from avdit import TASKS, Modality, NoiseSchedule, generate, task_mask

SCHEDULE, AB = NoiseSchedule(), alpha_bar()
WORLD = [
    Modality("video", (2,), 2, (0, 0.125, 0.625, 1.125)),
    Modality("audio", (), 3, (0, 0.125, 0.375, 0.625, 0.875, 1.125)),
]
SIZE = 3 * 2 * 2 + 5 * 3


def flat(z):
    """Dict of latents -> (B, SIZE)."""
    return torch.cat([z[m.name].flatten(1) for m in WORLD], 1)


def unflat(x):
    return {m.name: p.reshape(-1, *m.shape) for m, p in zip(WORLD, x.split([12, 15], 1))}


def per_element(t):
    """Dict of (B, N_m) -> (B, SIZE)."""
    return torch.cat([t[m.name].repeat_interleave(math.prod(m.shape) // m.N, 1) for m in WORLD], 1)


class Oracle:
    """E[eps | z] at any timestep vector: with z = D z0 + S eps it is S (D C D + S^2)^-1 (z - D mean).

    A plain callable with AVDiT's signature, which predicts eps. `alike`: so many examples in a row share their t.
    """

    def __init__(self, alike=1):
        g = torch.Generator().manual_seed(1)
        root = torch.randn(SIZE, SIZE, generator=g, dtype=torch.float64) / math.sqrt(SIZE)
        self.cov = root @ root.T + 0.1 * torch.eye(SIZE, dtype=torch.float64)  # no conditional variance is below 0.1
        self.mean = torch.randn(SIZE, generator=g, dtype=torch.float64)
        self.clean = self.mean + torch.randn(SIZE, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(self.cov).T
        self.alike, self.calls = alike, []

    def __call__(self, z_t, t, z0_prev=None):
        ab = torch.tensor(AB)[per_element({m: x[:: self.alike] for m, x in t.items()})]
        a, s = ab.sqrt(), (1 - ab).sqrt()
        gain = s[:, :, None] * torch.linalg.inv(a[:, :, None] * self.cov * a[:, None] + torch.diag_embed(s**2))
        z = flat(z_t).double().unflatten(0, (-1, self.alike)) - (a * self.mean)[:, None]
        out = unflat((z @ gain.mT).flatten(0, 1))
        self.calls.append(z_t)
        return out

    def conditional(self, held):
        """Mean and covariance of the other elements where those of the mask `held` (SIZE,) are self.clean."""
        gain = self.cov[~held][:, held] @ torch.linalg.inv(self.cov[held][:, held])
        mean = self.mean[~held] + gain @ (self.clean[held] - self.mean[held])
        return mean, self.cov[~held][:, ~held] - gain @ self.cov[held][:, ~held]


def recursion(mean, cov, steps, sampler):
    """Mean and covariance after every step of a sampler that has the exact denoiser of N(mean, cov), by the paper.

    Written for the conditional world alone, in which all elements share one t, from N(0, 1).
    """
    taus = [round(1000 - 1000 * k / steps) for k in range(steps + 1)]
    one = np.eye(len(mean))
    m, P = np.zeros(len(mean)), one
    for t, t2 in pairwise(taus):
        gain = math.sqrt(1 - AB[t]) * np.linalg.inv(AB[t] * cov + (1 - AB[t]) * one)  # eps_hat = gain (z - a mean)
        if sampler == "ddim":
            z0_hat = (one - math.sqrt(1 - AB[t]) * gain) / math.sqrt(AB[t])
            A, noise = math.sqrt(AB[t2]) * z0_hat + math.sqrt(1 - AB[t2]) * gain, 0
        else:
            beta = 1 - AB[t] / AB[t2]
            A = (one - beta / math.sqrt(1 - AB[t]) * gain) / math.sqrt(1 - beta)
            noise = beta if t2 else 0
        # at z = a mean the predicted noise is zero: a step takes the mean to a2 mean and what deviates from it by A
        m = math.sqrt(AB[t2]) * mean + A @ (m - math.sqrt(AB[t]) * mean)
        P = A @ P @ A.T + noise * one
    return m, P


def all_masks():
    """The five tasks and ten random masks: dict of bool (15, N_m)."""
    g = torch.Generator().manual_seed(2)
    named = [task_mask(task, WORLD) for task in TASKS if task != "continue-2s"]
    random = {m.name: torch.rand(10, m.N, generator=g) < 0.5 for m in WORLD}
    return {m.name: torch.cat([torch.stack([x[m.name] for x in named]), random[m.name]]) for m in WORLD}


def probe(oracle, given, monkeypatch, **kwargs):
    """generate() as the affine map it is: run it from zero and from every unit vector -> matrix, offset per mask.

    given: dict of bool (masks, N_m). Noise that is drawn later is put to zero, so that the map of the first remains.
    """
    count = len(given["video"])
    start = torch.cat([torch.zeros(1, SIZE), torch.eye(SIZE)]).double().repeat(count, 1)
    given = {m: x.repeat_interleave(SIZE + 1, 0) for m, x in given.items()}
    first = list(unflat(start).values())
    fake = lambda shape, **_: first.pop(0) if first else torch.zeros(shape, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(avdit.torch, "randn", fake)
        out = flat(generate(oracle, SCHEDULE, unflat(oracle.clean.expand(len(start), -1)), given, **kwargs))
    out = out.unflatten(0, (count, SIZE + 1))
    return (out[:, 1:] - out[:, :1]).mT, out[:, 0]


@pytest.mark.parametrize(("sampler", "steps", "alike", "bound"),
                         [("ddim", 250, 400, 0.03), ("ddpm", 50, 400, 0.1), ("ddpm", 1000, 100, 0.005)])  # fmt: skip
def test_samples_have_the_exact_conditional_mean_and_covariance(sampler, steps, alike, bound):
    """15 masks in one batch. The samples against the recursion (sampling error), the recursion against the truth (bias)."""
    oracle, given = Oracle(alike), all_masks()
    each = {m: x.repeat_interleave(alike, 0) for m, x in given.items()}
    z0 = unflat(oracle.clean.expand(15 * alike, -1))
    made = flat(generate(oracle, SCHEDULE, z0, each, steps=steps, sampler=sampler,
                         generator=torch.Generator().manual_seed(5))).unflatten(0, (15, alike))  # fmt: skip
    white, off_diagonal, bias = [], [], []
    for held, x in zip(per_element(given), made):
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


def test_ddim_is_the_exact_linear_map(monkeypatch):
    """No sampling error at all: generate()'s own matrix, for 15 masks in one batch, against the recursion's."""
    oracle, given = Oracle(), all_masks()
    matrix, offset = probe(oracle, given, monkeypatch, steps=50)
    for held, A, b in zip(per_element(given), matrix, offset):
        assert (A[held] == 0).all() and (A[:, held].abs() < 1e-12).all()  # neither moved nor used as noise
        mean, cov = oracle.conditional(held)
        m, P = recursion(mean.numpy(), cov.numpy(), 50, "ddim")
        np.testing.assert_allclose(b[~held], m, atol=1e-5)
        np.testing.assert_allclose((A @ A.T)[~held][:, ~held], P, atol=1e-5)


def test_ddim_converges_at_first_order(monkeypatch):
    """From the true marginal at T the covariance's error halves with every doubling of the steps, and the mean is exact
    at any number; from N(0, I) the mean keeps an error of a_T |C^(1/2) mean|."""
    oracle = Oracle()
    joint = {m.name: torch.zeros(1, m.N, dtype=torch.bool) for m in WORLD}
    a, s = math.sqrt(AB[1000]), math.sqrt(1 - AB[1000])
    marginal = a * a * oracle.cov + s * s * torch.eye(SIZE)
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


@pytest.mark.parametrize("drop", [None, ["audio"], ["video"]])
def test_guidance_extrapolates_between_two_exact_conditionals(drop):
    """Eq. 16: (1 + s) E[eps | z, all that is given] - s E[eps | z, what is not dropped], whole and per modality."""
    s, oracle, given = 1.5, Oracle(), task_mask("continue", WORLD)
    z0 = unflat(oracle.clean.expand(4, -1))
    made = flat(generate(oracle, SCHEDULE, z0, given, steps=2, guidance=s, guidance_drop=drop,
                         generator=torch.Generator().manual_seed(0)))  # fmt: skip
    held = per_element({m: x[None] for m, x in given.items()})[0]
    names = torch.tensor([m.name == "audio" for m in WORLD for _ in range(math.prod(m.shape))])
    dropped = held & {None: torch.ones(SIZE, dtype=torch.bool), "audio": names, "video": ~names}[drop and drop[0]]
    z = flat(oracle.calls[0])[:, ~held]
    for tau, tau2 in ((1000, 500), (500, 0)):
        eps = []
        for known in (held, held & ~dropped):
            mean, cov = oracle.conditional(known)
            wanted = ~held[~known]
            mean, cov = mean[wanted], cov[wanted][:, wanted]
            noisy = AB[tau] * cov + (1 - AB[tau]) * torch.eye(len(mean))
            eps.append(torch.linalg.solve(noisy, (z - math.sqrt(AB[tau]) * mean).T).T * math.sqrt(1 - AB[tau]))
        guided = (1 + s) * eps[0] - s * eps[1]
        z0_hat = (z - math.sqrt(1 - AB[tau]) * guided) / math.sqrt(AB[tau])
        z = math.sqrt(AB[tau2]) * z0_hat + math.sqrt(1 - AB[tau2]) * guided
    plain = flat(generate(oracle, SCHEDULE, z0, given, steps=2, generator=torch.Generator().manual_seed(0)))
    assert (made - plain)[:, ~held].abs().max() > 1  # it does something, and what it does is this
    # The oracle takes the noise in the place of what was dropped for 0.00635 of signal, which moves this by 0.02.
    torch.testing.assert_close(made[:, ~held], z, atol=0.03, rtol=0)


def test_guidance_of_zero_is_none():
    """Bit-identical, and without a second call."""
    oracle, z0 = Oracle(), unflat(Oracle().clean.expand(3, -1))
    given = task_mask("inpaint", WORLD)
    runs = [generate(oracle, SCHEDULE, z0, given, steps=3, generator=torch.Generator().manual_seed(0), **kwargs)
            for kwargs in ({}, {"guidance": 0.0, "guidance_drop": ["audio"]})]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in runs)))
    assert len(oracle.calls) == 2 * 3


@pytest.mark.parametrize("task", ["a2v", "v2a", "inpaint", "continue"])
def test_replacement_misses_the_conditional_that_masked_sampling_hits(task, monkeypatch):
    """The paper's point [Sec. 3.3, App. C.2], with the exact denoiser for both: only how the given part is held differs.

    Error of the mean in standard deviations (root mean square over whitened elements), of the covariance relative.
    """
    n, oracle, given, found = 1000, Oracle(), task_mask(task, WORLD), {}
    held = per_element({m: x[None] for m, x in given.items()})[0]
    mean, cov = oracle.conditional(held)
    (A,), (b,) = probe(oracle, {m: x[None] for m, x in given.items()}, monkeypatch, steps=100)
    found["monl"] = b[~held], (A @ A.T)[~held][:, ~held]  # without sampling error
    x = flat(generate(Oracle(alike=n), SCHEDULE, unflat(oracle.clean.expand(n, -1)), given, steps=100,
                      method="replacement", generator=torch.Generator().manual_seed(0)))[:, ~held]  # fmt: skip
    found["replacement"] = x.mean(0), x.T.cov()
    for k, (m, P) in found.items():
        shift = torch.linalg.solve(torch.linalg.cholesky(cov), m - mean).norm() / math.sqrt(len(mean))
        found[k] = shift.item(), ((P - cov).norm() / cov.norm()).item()
    print(f"\n{task}: " + ", ".join(f"{k} mean {v[0]:.3f} covariance {v[1]:.3f}" for k, v in found.items()))
    assert max(found["monl"]) < 0.05
    assert found["replacement"][0] > 0.5 and found["replacement"][1] > 0.25  # sampling alone: 0.03 and 0.1


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_steps_are_the_papers_to_a_millionth(name):
    """Every t to t - 1, and 200 random longer steps, element by element in float64."""
    g = torch.Generator().manual_seed(0)
    t = torch.cat([torch.arange(1, 1001), torch.randint(2, 1001, (200,), generator=g)])[None]
    t2 = t - 1
    t2[0, 1000:] = (t[0, 1000:] * torch.rand(200, generator=g)).long()
    z, z0_hat, eps, noise = (torch.randn(1, 1200, 1, generator=g, dtype=torch.float64) for _ in range(4))
    want = []
    for n in range(1200):
        ab, ab2, e = AB[t[0, n]], AB[t2[0, n]], eps[0, n].item()
        if name == "ddim":
            want.append(math.sqrt(ab2) * z0_hat[0, n].item() + math.sqrt(1 - ab2) * e)
        else:
            alpha = ab / ab2
            want.append((z[0, n].item() - (1 - alpha) / math.sqrt(1 - ab) * e) / math.sqrt(alpha))
            want[-1] += math.sqrt(1 - alpha) * noise[0, n].item() if t2[0, n] else 0
    got = avdit.SAMPLERS[name](SCHEDULE, z, t, t2, z0_hat, eps, noise)[0, :, 0]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-6)
