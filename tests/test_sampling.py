"""Loss, masks and sampling against closed forms, slow loops written from the paper, and spies."""

import math

import numpy as np
import pytest
import torch
from test_method import THREE, TOY, alpha_bar, latents, randomized

from avdit import (
    METHODS,
    SAMPLERS,
    AVDiT,
    NoiseSchedule,
    generate,
    sample_timesteps,
    self_condition,
    span_mask,
    task_mask,
    training_loss,
)

SCHEDULE = NoiseSchedule()


class Spy:
    """A made-up denoiser that keeps what it is shown. It mixes all elements, so that nothing given goes unnoticed."""

    def __init__(self, prediction="eps"):
        self.prediction, self.calls = prediction, []

    def __call__(self, z_t, t, z0_prev=None):
        keep = lambda x: None if x is None else {m: v.clone() for m, v in x.items()}
        self.calls.append((keep(z_t), keep(t), keep(z0_prev)))
        mean = sum(z.flatten(1).mean(1) for z in z_t.values())
        if z0_prev is not None:
            mean = mean + sum(z.flatten(1).mean(1) for z in z0_prev.values())
        out = {}
        for m, z in z_t.items():
            shape = (-1, *[1] * (z.ndim - 1))
            level = t[m].reshape(*t[m].shape, *[1] * (z.ndim - 2)) / 1000
            out[m] = torch.tanh(0.7 * z + 0.3 * mean.reshape(shape) + level)
        return out


def masks(modalities, batch, seed):
    g = torch.Generator().manual_seed(seed)
    return {m.name: torch.rand(batch, m.N, generator=g) < 0.5 for m in modalities}


def wide(mask, z):
    return mask.expand(z.shape[:2]).reshape(*z.shape[:2], *[1] * (z.ndim - 2)).expand(z.shape)


# --- Training loss --------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("conditioning", "power"), [(False, 0), (True, 0), (True, 1)])
def test_loss_is_eq_6(prediction, conditioning, power):
    spy, ab = Spy(prediction), torch.tensor(alpha_bar())
    z0, eps = latents(THREE, 3, 1, torch.float64), latents(THREE, 3, 2, torch.float64)
    t = sample_timesteps("ptm", THREE, 3, 1000, torch.Generator().manual_seed(0))
    t["audio"][1] = 0  # a given modality
    t["video"][1] = torch.tensor([1, 0, 2])  # the least noise is noise
    z_max = {"video": 1.5, "audio": 0.5, "touch": 2.5}
    loss, errors = training_loss(
        spy, SCHEDULE, z0, t, eps, self_conditioning=conditioning, z_max=z_max, noise_power=power, return_errors=True
    )
    assert len(spy.calls) == 1 + conditioning
    if not conditioning and not power:  # the defaults
        assert training_loss(Spy(prediction), SCHEDULE, z0, t, eps, z_max=z_max) == loss
    prev = None
    if conditioning:  # the pass without gradient sees none; its estimate, clamped, goes beside z_t
        assert spy.calls[0][2] is None
        first = Spy(prediction)(*spy.calls[0])
        prev = {}
        for m in z0:
            a, s = (wide(x[t[m]], z0[m]) for x in (ab.sqrt(), (1 - ab).sqrt()))
            z_t = a * z0[m] + s * eps[m]
            z0_hat = a * z_t - s * first[m] if prediction == "v" else (z_t - s * first[m]) / a
            prev[m] = torch.where(wide(t[m] == 0, z_t), z0[m], z0_hat.clamp(-z_max[m], z_max[m]))
            torch.testing.assert_close(spy.calls[1][2][m], prev[m], atol=1e-4, rtol=1e-4)
    total = count = 0.0
    for m in z0:
        for b in range(3):
            for n in range(z0[m].shape[1]):
                level = ab[t[m][b, n]]
                a, s = level.sqrt(), (1 - level).sqrt()
                target = eps[m][b, n] if prediction == "eps" else a * eps[m][b, n] - s * z0[m][b, n]
                out = Spy(prediction)(*spy.calls[-1])[m][b, n]
                square = ((out - target) ** 2).sum().item()
                assert abs(errors[m][b, n].item() - square / out.numel()) < 1e-5
                if t[m][b, n] > 0:
                    total, count = total + s.item() ** power * square, count + s.item() ** power * out.numel()
    assert abs(loss.item() - total / count) < 1e-5


def test_self_conditioning_carries_no_gradient():
    model = randomized(AVDiT(THREE, 16, 1, 2))
    z0, eps = latents(THREE, 2, 1), latents(THREE, 2, 2)
    t = sample_timesteps("ptm", THREE, 2, 1000, torch.Generator().manual_seed(0))
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append((args[2], torch.is_grad_enabled())))
    training_loss(model, SCHEDULE, z0, t, eps, self_conditioning=True).backward()
    assert [grad for _, grad in seen] == [False, True] and seen[0][0] is None
    assert not any(z.requires_grad for z in seen[1][0].values())
    assert all(p.grad is not None for p in model.parameters())


# --- Masks ----------------------------------------------------------------------------


def test_task_masks_by_hand():
    """In seconds, from Sec. 6.2 and App. F."""
    spans = {
        "joint": [],
        "continue": [(0, 0.625)],
        "continue-2s": [(0, 0.125)],
        "inpaint": [(0, 0.125), (1.625, 2.125)],
    }
    for task, given in spans.items():
        for m in TOY:
            want = [any(a <= m.edges[n] and m.edges[n + 1] <= b for a, b in given) for n in range(m.N)]
            assert task_mask(task, TOY)[m.name].tolist() == want, (task, m.name)
    assert task_mask("inpaint", TOY)["video"].tolist() == [True, False, False, False, True]
    assert task_mask("a2v", TOY)["audio"].all() and not task_mask("a2v", TOY)["video"].any()
    assert task_mask("v2a", TOY)["video"].all() and not task_mask("v2a", TOY)["audio"].any()
    with pytest.raises(ValueError, match="use joint, a2v"):
        task_mask("a2a", TOY)


def test_span_mask_takes_whole_segments_only():
    video = TOY[0]
    assert span_mask(video, 0, 0.624).tolist() == [True, False, False, False, False]
    assert span_mask(video, 0, 0.625 - 5e-7).tolist() == [True, True, False, False, False]
    assert span_mask(video, 0.01, 2.125).tolist() == [False, True, True, True, True]


# --- Sampling -------------------------------------------------------------------------


def drawn(generator_seed, modalities, batch):
    """The noises generate() draws, in their order: dicts, without end."""
    g = torch.Generator().manual_seed(generator_seed)
    while True:
        yield {m.name: torch.randn(batch, *m.shape, generator=g, dtype=torch.float64) for m in modalities}


@pytest.mark.parametrize("task", ["joint", "a2v"])
def test_ddpm_is_algorithms_3_and_4(task):
    """The paper's loop with all T steps, by hand, with the two misprinted factors as DDPM's Eq. 11 has them."""
    T, betas = 100, np.linspace(1e-3, 0.2, 100)  # as much noise in fewer steps
    ab, given = np.cumprod([1, *(1 - betas)]), task_mask(task, TOY)
    z0 = latents(TOY, 2, 1, torch.float64)
    noise, spy = drawn(7, TOY, 2), Spy()
    z = next(noise)
    prev = None
    for tau in range(T, 0, -1):
        fresh = next(noise)
        z = {m: torch.where(wide(given[m], z[m]), z0[m], z[m]) for m in z}
        t = {m: torch.where(given[m], 0, tau).expand(2, -1) for m in z}
        eps = spy(z, t, prev)
        beta, alpha = betas[tau - 1], 1 - betas[tau - 1]
        new = {}
        for m in z:
            new[m] = (z[m] - beta / math.sqrt(1 - ab[tau]) * eps[m]) / math.sqrt(alpha)
            new[m] = new[m] + (math.sqrt(beta) * fresh[m] if tau > 1 else 0)
        z0_hat = {m: (z[m] - math.sqrt(1 - ab[tau]) * eps[m]) / math.sqrt(ab[tau]) for m in z}
        prev = {m: torch.where(wide(given[m], z[m]), z0[m], z0_hat[m].clamp(-3, 3)) for m in z}
        z = new
    got = generate(Spy(), NoiseSchedule(T, 1e-3, 0.2), z0, given, steps=T, sampler="ddpm", z_max={m: 3.0 for m in z0},
                   generator=torch.Generator().manual_seed(7))  # fmt: skip
    for m in z0:
        want = torch.where(wide(given[m], z0[m]), z0[m], z[m])
        torch.testing.assert_close(got[m], want, atol=1e-4, rtol=1e-4)  # coefficients are float32


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_ddim_step_by_step(prediction):
    """Every DDIM step is z0_hat and eps_hat mixed anew at the next level; the wanted part ends at t = 0."""
    ab, spy, steps = alpha_bar(), Spy(prediction), 7
    z0, given = latents(TOY, 2, 1, torch.float64), task_mask("continue", TOY)
    bound = {"video": 1.5, "audio": 0.5}  # of what is shown to the next pass, never of the sample itself
    got = generate(spy, SCHEDULE, z0, given, steps=steps, z_max=bound, generator=torch.Generator().manual_seed(3))
    taus = [round(1000 - 1000 * k / steps) for k in range(steps + 1)]
    assert taus[-1] == 0 and len(spy.calls) == steps
    states = [call[0] for call in spy.calls] + [got]
    for i, (z, t, prev) in enumerate(spy.calls):
        out = Spy(prediction)(z, t, prev)
        for m in z:
            assert (t[m] == torch.where(given[m], 0, taus[i])).all()
            a, s, a2, s2 = (math.sqrt(x) for x in (ab[taus[i]], 1 - ab[taus[i]], ab[taus[i + 1]], 1 - ab[taus[i + 1]]))
            z0_hat = (z[m] - s * out[m]) / a if prediction == "eps" else a * z[m] - s * out[m]
            eps_hat = out[m] if prediction == "eps" else s * z[m] + a * out[m]
            want = torch.where(wide(given[m], z[m]), z0[m], a2 * z0_hat + s2 * eps_hat)
            torch.testing.assert_close(states[i + 1][m], want, atol=1e-5, rtol=1e-4)
            if i + 1 < steps:  # self-conditioning: the estimate, and the clean value where given
                seen = torch.where(wide(given[m], z[m]), z0[m], z0_hat.clamp(-bound[m], bound[m]))
                torch.testing.assert_close(spy.calls[i + 1][2][m], seen, atol=1e-4, rtol=1e-4)
    assert spy.calls[0][2] is None


WAYS = [(method, sampler, 0.0) for method in METHODS for sampler in SAMPLERS] + [("monl", s, 1.5) for s in SAMPLERS]


@pytest.mark.parametrize(("method", "sampler", "guidance"), WAYS)
def test_given_comes_back_bit_identical_and_nan_elsewhere_changes_nothing(method, sampler, guidance):
    model = randomized(AVDiT(THREE, 16, 1, 2, "v"))
    for seed in range(3):  # a different mask for every example
        z0, given = latents(THREE, 4, seed), masks(THREE, 4, seed)
        poison = {m: torch.where(wide(given[m], z), z, math.nan) for m, z in z0.items()}
        kwargs = {"steps": 4, "sampler": sampler, "method": method, "guidance": guidance}
        a, b = (
            generate(model, SCHEDULE, z, given, generator=torch.Generator().manual_seed(1), **kwargs)
            for z in (z0, poison)
        )
        for m in z0:
            keep = wide(given[m], z0[m])
            assert torch.equal(a[m][keep], z0[m][keep])
            assert torch.equal(a[m], b[m]) and a[m].isfinite().all()
            assert not (a[m] == z0[m])[~keep].any()


def test_one_mask_for_all_equals_the_same_mask_for_each():
    model, z0, given = randomized(AVDiT(THREE, 16, 1, 2)), latents(THREE, 3), masks(THREE, 1, 5)
    one, each = (
        generate(model, SCHEDULE, z0, g, steps=3, generator=torch.Generator().manual_seed(1))
        for g in ({m: x[0] for m, x in given.items()}, {m: x.expand(3, -1) for m, x in given.items()})
    )
    assert all(torch.equal(one[m], each[m]) for m in z0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("drop", [None, ["audio"], ["video", "touch"]])
def test_guidance_is_eq_16_and_leaks_nothing(drop, sampler):
    """One call a step, of two halves; the result is (1 + s) cond - s uncond; the second knows nothing dropped."""
    s, spy, noise = 2.5, Spy(), drawn(2, THREE, 2)
    T, ab = 100, np.cumprod([1, *(1 - np.linspace(1e-3, 0.2, 100))])
    z0, given = latents(THREE, 2, 1, torch.float64), masks(THREE, 2, 3)
    got = generate(spy, NoiseSchedule(T, 1e-3, 0.2), z0, given, steps=4, sampler=sampler, guidance=s,
                   guidance_drop=drop, generator=torch.Generator().manual_seed(2))  # fmt: skip
    half = lambda call, rows: [x and {m: v[rows] for m, v in x.items()} for x in call]
    first, second = ([half(call, rows) for call in spy.calls] for rows in (slice(2), slice(2, 4)))
    states = [call[0] for call in first] + [got]
    assert [len(call[0]["video"]) for call in spy.calls] == [4] * 4
    next(noise)  # where it starts
    guided = None
    for i in range(4):
        (z, t, prev), (z_u, t_u, prev_u) = first[i], second[i]
        tau, tau2 = T - 25 * i, T - 25 * i - 25
        fresh = next(noise) if sampler == "ddpm" else None
        absent = next(noise)
        cond, uncond = Spy()(z, t, prev), Spy()(z_u, t_u, prev_u)
        for m in z0:
            dropped = wide(given[m] & (drop is None or m in drop), z[m])
            wanted = wide(~given[m], z0[m])
            assert (t_u[m] == torch.where(dropped.flatten(2)[..., 0], T, torch.where(given[m], 0, tau))).all()
            assert torch.equal(z_u[m], torch.where(dropped, absent[m], z[m]))  # nothing of the condition but noise
            if i:  # the estimate that was guided, and nothing of the condition where it was dropped
                torch.testing.assert_close(prev[m], torch.where(wanted, guided[m], z0[m]), atol=1e-4, rtol=1e-4)
                assert torch.equal(prev_u[m], torch.where(dropped, 0, prev[m]))
        eps = {m: (1 + s) * cond[m] - s * uncond[m] for m in z0}  # Eq. 16
        guided = {m: (z[m] - math.sqrt(1 - ab[tau]) * eps[m]) / math.sqrt(ab[tau]) for m in z0}
        for m in z0:
            if sampler == "ddim":
                step = math.sqrt(ab[tau2]) * guided[m] + math.sqrt(1 - ab[tau2]) * eps[m]
            else:
                alpha = ab[tau] / ab[tau2]
                step = (z[m] - (1 - alpha) / math.sqrt(1 - ab[tau]) * eps[m]) / math.sqrt(alpha)
                step = step + (math.sqrt(1 - alpha) * fresh[m] if tau2 else 0)
            want = torch.where(wide(given[m], z[m]), z0[m], step)
            torch.testing.assert_close(states[i + 1][m], want, atol=1e-4, rtol=1e-4)


def test_replacement_shows_the_noised_truth_and_the_models_own_estimate():
    z0, given, ab = latents(TOY, 200, 1, torch.float64), task_mask("inpaint", TOY), alpha_bar()
    z0 = {m: z + 9 for m, z in z0.items()}  # so far from zero that the little signal left at T shows
    spy, before = Spy(), None
    generate(spy, SCHEDULE, z0, given, steps=5, method="replacement", generator=torch.Generator().manual_seed(2))
    for i, (z, t, prev) in enumerate(spy.calls):
        tau, noise = 1000 - 200 * i, {}
        for m in z0:
            assert (t[m] == tau).all()  # the model is told one level for everything
            noise[m] = (z[m] - math.sqrt(ab[tau]) * z0[m])[:, given[m]] / math.sqrt(1 - ab[tau])
            assert abs(noise[m].mean()) < 0.03 and abs(noise[m].std() - 1) < 0.03
            if i:
                assert abs((noise[m] * before[m]).mean()) < 0.03  # drawn anew for every step
                z_, t_, prev_ = spy.calls[i - 1]
                own = (z_[m] - math.sqrt(1 - ab[tau + 200]) * Spy()(z_, t_, prev_)[m]) / math.sqrt(ab[tau + 200])
                torch.testing.assert_close(prev[m], own, atol=1e-4, rtol=1e-4)
        before = noise


def test_reconstruction_guidance_moves_by_eqs_9_to_12():
    """A step with self-conditioning, two examples, against numerical derivatives of the squared error in its input."""
    strength, z0, given = 0.3, latents(TOY, 2, 1, torch.float64), task_mask("continue", TOY)
    spy, ab, tau, tau2 = Spy("v"), alpha_bar(), 667, 333
    generate(spy, SCHEDULE, z0, given, steps=3, method="reconstruction", strength=strength,
             generator=torch.Generator().manual_seed(2))  # fmt: skip
    (z_, t_, _), (z, t, prev), (after, _, _) = spy.calls
    a, s, a2, s2 = (math.sqrt(x) for x in (ab[tau], 1 - ab[tau], ab[tau2], 1 - ab[tau2]))
    for m in z0:  # the model's own estimate everywhere, nothing clean
        own = math.sqrt(ab[1000]) * z_[m] - math.sqrt(1 - ab[1000]) * Spy()(z_, t_, None)[m]
        torch.testing.assert_close(prev[m], own, atol=1e-4, rtol=1e-4)

    def step(z):
        v = Spy()(z, t, prev)
        return {m: a2 * (a * z[m] - s * v[m]) + s2 * (s * z[m] + a * v[m]) for m in z}

    def error(z):  # the given part of the next call is the noised truth at the step's new t
        out = step(z)
        return sum(((out[m] - after[m])[:, given[m]] ** 2).sum().item() for m in z)

    plain = step(z)
    for m, place in (("video", (0, 3, 1, 0, 5)), ("audio", (0, 9, 11)), ("audio", (1, 12, 3))):
        up, down = ({k: v.clone() for k, v in z.items()} for _ in "ab")
        up[m][place] += 1e-4
        down[m][place] -= 1e-4
        gradient = (error(up) - error(down)) / 2e-4
        assert abs(gradient) > 1e-3
        want = plain[m][place] - strength * s2 * gradient
        torch.testing.assert_close(after[m][place], want, atol=abs(strength * gradient) * 1e-3, rtol=1e-5)


def test_wrong_arguments_are_named():
    z0, given = latents(TOY, 1), task_mask("joint", TOY)
    for kwargs, message in (
        ({"sampler": "euler"}, "use ddpm, ddim, dpmpp_2m"),
        ({"method": "magic"}, "use monl, replacement, reconstruction"),
        ({"steps": 0}, "use 1 to 1000"),
        ({"steps": 1001}, "use 1 to 1000"),
        ({"guidance": 1.0, "method": "replacement"}, "use method monl"),
        ({"guidance_drop": ["smell"]}, "use video, audio"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(Spy(), SCHEDULE, z0, given, **kwargs)


def test_on_step_counts_every_step():
    seen = []
    generate(Spy(), SCHEDULE, latents(TOY, 1), task_mask("joint", TOY), steps=3, on_step=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_defaults_are_the_papers():
    """250 DDIM steps [App. B]; reconstruction guidance of strength 0.02 [App. C.2]; no guidance. One step is possible."""
    z0, given, seen = latents(THREE, 1), masks(THREE, 1, 3), []
    generate(Spy(), SCHEDULE, z0, given, on_step=lambda *a: seen.append(a))
    generate(Spy(), SCHEDULE, z0, given, steps=1, on_step=lambda *a: seen.append(a))
    assert seen[-2:] == [(250, 250), (1, 1)]
    for kwargs, same in (({}, {"sampler": "ddim", "guidance": 0.0, "method": "monl"}),
                         ({"method": "reconstruction"}, {"method": "reconstruction", "strength": 0.02})):  # fmt: skip
        one, two = (generate(Spy(), SCHEDULE, z0, given, steps=3, generator=torch.Generator().manual_seed(1), **k)
                    for k in (kwargs, same))  # fmt: skip
        assert all(torch.equal(one[m], two[m]) for m in z0)


def test_clamp_never_touches_a_clean_value():
    z_t, t = {"audio": torch.full((1, 2, 1), 9.0)}, {"audio": torch.tensor([[0, 5]])}
    out = self_condition({"audio": torch.full((1, 2, 1), 9.0)}, z_t, t, {"audio": 2.0})
    assert out["audio"].flatten().tolist() == [9.0, 2.0]
