"""Loss, masks and sampling against closed forms, slow loops written from the paper, and spies."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from baselines import generate_baseline
from test_method import AUDIO, THREE, TOUCH, TOY, VIDEO, alpha_bar, latents, ptm_timesteps, randomized, segments

from avdit import (
    PREDICTIONS,
    SAMPLERS,
    AVDiT,
    Layout,
    Modality,
    NoiseSchedule,
    ddim_step,
    generate,
    noise_like,
    respaced,
    task_mask,
    training_loss,
)

SCHEDULE = NoiseSchedule()
SHORT, SHORT_AB = NoiseSchedule(100, 1e-3, 0.2), np.cumprod([1, *(1 - np.linspace(1e-3, 0.2, 100))])  # few steps
ETA = 0.7


class Spy:
    """A made-up denoiser that records its inputs. It mixes all elements, so that every given value has an effect."""

    def __init__(self, layout, prediction="eps"):
        self.prediction, self.segments, self.calls = prediction, segments(layout), []

    def out(self, z, t, z0_prev=None):
        seen = z if z0_prev is None else z + z0_prev
        return torch.tanh(0.7 * z + 2 * seen.mean(1, keepdim=True) + t[:, self.segments] / 1000)

    def __call__(self, *inputs):
        self.calls.append([None if x is None else x.detach().clone() for x in inputs])
        return self.out(*inputs)


def masks(layout, batch, seed):
    return torch.rand(batch, layout.S, generator=torch.Generator().manual_seed(seed)) < 0.5


def drawn(seed, layout, batch):
    """The noises of a sampler in their order, without end."""
    g = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(batch, layout.E, generator=g, dtype=torch.float64)


def ddim_eta_step(z, z0_hat, eps_hat, now, then, noise):
    """A sampler that a fork may add: DDIM with eta > 0. It needs this function and a name in SAMPLERS."""
    (a, s), (a_next, s_next) = now, then
    sigma = ETA * s_next / s.clamp(min=1e-8) * (1 - (a / a_next) ** 2).sqrt()
    return a_next * z0_hat + (s_next**2 - sigma**2).sqrt() * eps_hat + sigma * noise()


def slow_step(sampler, z, eps, ab, ab2, noise):
    """A step from alpha_bar = ab to ab2, as the papers print it."""
    a, s, a2, s2 = (math.sqrt(x) for x in (ab, 1 - ab, ab2, 1 - ab2))
    z0_hat = (z - s * eps) / a
    if sampler == "ddpm":  # Eq. 11 of the DDPM paper
        mean = (z - (1 - ab / ab2) / s * eps) / math.sqrt(ab / ab2)
        return mean + (math.sqrt(1 - ab / ab2) if ab2 < 1 else 0) * next(noise)
    sigma = ETA * s2 / s * math.sqrt(1 - ab / ab2) if sampler == "ddim_eta" else 0  # Eq. 12 and 16 of the DDIM paper
    return a2 * z0_hat + math.sqrt(s2**2 - sigma**2) * eps + (sigma * next(noise) if sampler == "ddim_eta" else 0)


# --- Training loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("conditioning", [False, True])
def test_loss_is_eq_6(prediction, conditioning):
    spy, ab, t, owner = Spy(THREE, prediction), alpha_bar(), ptm_timesteps(THREE, 3), segments(THREE)
    z0, eps = (latents(THREE, 3, seed, torch.float64) for seed in (1, 2))
    loss, errors = training_loss(spy, SCHEDULE, THREE, z0, t, eps, conditioning)
    if not conditioning:  # the default
        assert training_loss(Spy(THREE, prediction), SCHEDULE, THREE, z0, t, eps)[0] == loss
    level = torch.tensor(ab)[t[:, owner]]
    a, s = level.sqrt(), (1 - level).sqrt()
    z, prev = a * z0 + s * eps, None  # Eq. 5
    target = {"eps": eps, "v": a * eps - s * z0, "z0": z0}[prediction]
    assert len(spy.calls) == 1 + conditioning
    for z_seen, t_seen, _ in spy.calls:
        torch.testing.assert_close(z_seen, z, atol=1e-6, rtol=1e-6)
        assert torch.equal(t_seen, t)
    if conditioning:  # the first pass sees no estimate; the second sees the first's, and the clean value where t = 0
        assert spy.calls[0][2] is None
        out = spy.out(z, t)
        z0_hat = {"eps": (z - s * out) / a, "v": a * z - s * out, "z0": out}[prediction]
        prev = torch.where(t[:, owner] == 0, z0, z0_hat)
        torch.testing.assert_close(spy.calls[1][2], prev, atol=1e-4, rtol=1e-4)
    squares, examples = (spy.out(z, t, prev) - target) ** 2, []
    torch.testing.assert_close(errors, squares, atol=1e-4, rtol=1e-4)
    for b in range(3):  # each example has a weighted mean of its own
        total = weights = 0.0
        for square, n in zip(squares[b].tolist(), owner.tolist()):
            if t[b, n] > 0:  # with z0 the weight is 6.25 times the variance of the noise, and 1 at most
                weight = min(1, 6.25 * (1 - ab[t[b, n]])) if prediction == "z0" else 1
                total, weights = total + weight * square, weights + weight
        examples.append(total / weights)
    assert max(examples) - min(examples) > 0.01
    assert abs(loss.item() - sum(examples) / 3) < 1e-5


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_losses_of_equal_parts_average_to_the_loss(prediction):
    """Also where examples have different numbers of noisy elements. Where all is given, the loss is 0."""
    t, z0, eps = ptm_timesteps(THREE, 4), latents(THREE, 4, 1), latents(THREE, 4, 2)
    model = randomized(AVDiT(THREE, 16, 1, 2, prediction))
    part = lambda *rows: training_loss(model, SCHEDULE, THREE, z0[[*rows]], t[[*rows]], eps[[*rows]])[0].item()
    ones, whole = [part(b) for b in range(4)], part(0, 1, 2, 3)
    assert sum(ones) / 4 == pytest.approx(whole, rel=1e-5)
    assert (part(0, 2) + part(3, 1)) / 2 == pytest.approx(whole, rel=1e-5)
    assert max(ones) - min(ones) > 0.01 * whole
    assert training_loss(model, SCHEDULE, THREE, z0, 0 * t, eps)[0] == 0


def test_self_conditioning_carries_no_gradient():
    model, t = randomized(AVDiT(THREE, 16, 1, 2)), ptm_timesteps(THREE, 2)
    z0, eps = latents(THREE, 2, 1), latents(THREE, 2, 2)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append((args[2], torch.is_grad_enabled())))
    loss, errors = training_loss(model, SCHEDULE, THREE, z0, t, eps, self_conditioning=True)
    loss.backward()
    assert [grad for _, grad in seen] == [False, True] and seen[0][0] is None
    assert not seen[1][0].requires_grad and not errors.requires_grad
    assert all(p.grad is not None for p in model.parameters())


# --- Masks ------------------------------------------------------------------------------------------------------------


def test_task_masks_by_hand():
    """In seconds, from Sec. 6.2 and App. F."""
    spans = {
        "joint": [],
        "continue": [(0, 0.625)],
        "continue-2s": [(0, 0.125)],
        "inpaint": [(0, 0.125), (1.625, 2.125)],
    }
    edges = [pair for m in TOY.modalities for pair in pairwise(m.edges)]
    for task, given in spans.items():
        want = [any(a <= start and end <= b for a, b in given) for start, end in edges]
        assert task_mask(task, TOY).tolist() == want, task
    assert task_mask("inpaint", TOY)[:5].tolist() == [True, False, False, False, True]
    assert task_mask("a2v", TOY).tolist() == [False] * 5 + [True] * 17
    assert task_mask("v2a", TOY).tolist() == [True] * 5 + [False] * 17
    short = Layout([Modality("video", (), 1, (0, 1)), AUDIO])  # the reference has no second segment
    assert task_mask("continue", short).tolist() == [True] * 17 + [False] * 2
    with pytest.raises(ValueError, match="use joint, a2v"):
        task_mask("a2a", TOY)
    with pytest.raises(ValueError, match="'audio': use video, touch"):
        task_mask("a2v", Layout([VIDEO, TOUCH]))


# --- Sampling ---------------------------------------------------------------------------------------------------------


def test_noise_is_drawn_where_the_generator_lives():
    """So a seed gives the same noise for a tensor on another device."""
    z, g, same = torch.zeros(2, 5, dtype=torch.float64), *(torch.Generator().manual_seed(3) for _ in "ab")
    for device in ("cpu", "meta", "cpu"):
        noise = noise_like(z.to(device), g)
        want = torch.randn(2, 5, generator=same, dtype=torch.float64)
        assert noise.device.type == device and noise.dtype == want.dtype
        assert device == "meta" or torch.equal(noise, want)
    assert noise_like(z).shape == z.shape and noise_like(z.to("meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("sampler", "steps", "prediction"),
    [
        ("ddpm", 100, "eps"),
        ("ddpm", 7, "z0"),
        ("ddim", 7, "eps"),
        ("ddim", 7, "v"),
        ("ddim", 7, "z0"),
        ("ddim_eta", 7, "eps"),
    ],
)
@pytest.mark.parametrize(("layout", "task"), [(TOY, "joint"), (TOY, "a2v"), (TOY, "continue"), (THREE, "each its own")])
def test_generate_is_algorithms_3_and_4(layout, task, sampler, steps, prediction, monkeypatch):
    """The paper's loop by hand, with every call of the model. It takes other samplers too, such as a fork's."""
    monkeypatch.setitem(SAMPLERS, "ddim_eta", ddim_eta_step)
    z0, spy, noise = latents(layout, 2, 1, torch.float64), Spy(layout, prediction), drawn(7, layout, 2)
    given = masks(layout, 2, 3) if task == "each its own" else task_mask(task, layout)
    got = generate(spy, SHORT, layout, z0, given, steps=steps, sampler=sampler,
                   generator=torch.Generator().manual_seed(7))  # fmt: skip
    given = given.expand(2, -1)
    given_e = given[:, segments(layout)]
    taus = [round(100 - 100 * k / steps) for k in range(steps + 1)]
    z, prev = next(noise), torch.zeros_like(z0)
    assert len(spy.calls) == steps and taus[-1] == 0
    for call, (tau, tau2) in zip(spy.calls, pairwise(taus)):
        z, t, ab = torch.where(given_e, z0, z), torch.where(given, 0, tau), SHORT_AB[tau]
        assert torch.equal(call[1], t)
        for x, seen in ((z, call[0]), (prev, call[2])):
            torch.testing.assert_close(seen, x, atol=1e-4, rtol=1e-5)  # coefficients are float32
        z, _, prev = call  # their errors must not add up
        eps = spy.out(z, t, prev)
        if prediction == "v":
            eps = math.sqrt(1 - ab) * z + math.sqrt(ab) * eps
        if prediction == "z0":
            eps = (z - math.sqrt(ab) * eps) / math.sqrt(1 - ab)
        # self-conditioning: the estimate, and the clean value where it is given
        prev = torch.where(given_e, z0, (z - math.sqrt(1 - ab) * eps) / math.sqrt(ab))
        z = slow_step(sampler, z, eps, ab, SHORT_AB[tau2], noise)
    torch.testing.assert_close(got, torch.where(given_e, z0, z), atol=1e-4, rtol=1e-5)


WAYS = [(generate, {"guidance": s}) for s in (0.0, 1.5)] + [(generate_baseline, {"strength": s}) for s in (0.0, 0.3)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("way", "kwargs"), WAYS)
def test_given_comes_back_bit_identical_and_nan_elsewhere_changes_nothing(way, kwargs, sampler):
    model = randomized(AVDiT(THREE, 16, 1, 2, "v"))
    for seed in range(3):  # a different mask for every example
        z0, given = latents(THREE, 4, seed), masks(THREE, 4, seed)
        keep = given[:, segments(THREE)]
        a, b = (way(model, SCHEDULE, THREE, z, given, steps=4, sampler=sampler,
                    generator=torch.Generator().manual_seed(1), **kwargs)
                for z in (z0, torch.where(keep, z0, math.nan)))  # fmt: skip
        assert torch.equal(a[keep], z0[keep])
        assert torch.equal(a, b) and a.isfinite().all() and not a.requires_grad  # no graph is kept
        assert not (a == z0)[~keep].any()


@pytest.mark.parametrize("way", [generate, generate_baseline])
def test_one_mask_for_all_equals_the_same_mask_for_each(way):
    model, z0, given = randomized(AVDiT(THREE, 16, 1, 2)), latents(THREE, 3), masks(THREE, 1, 5)
    one, each = (way(model, SCHEDULE, THREE, z0, g, steps=3, generator=torch.Generator().manual_seed(1))
                 for g in (given[0], given.expand(3, -1)))  # fmt: skip
    assert torch.equal(one, each)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "ddim_eta"])
@pytest.mark.parametrize("drop", [None, ["audio"], ["video", "touch"]])
def test_guidance_is_eq_16_and_leaks_nothing(drop, sampler, monkeypatch):
    """One call per step with two halves. The second half knows nothing of what is dropped, and the estimate is
    (1 + s) cond - s uncond, except that self-conditioning shows the clean value where it is given."""
    monkeypatch.setitem(SAMPLERS, "ddim_eta", ddim_eta_step)
    s, spy, noise = 2.5, Spy(THREE), drawn(2, THREE, 2)
    z0, given = latents(THREE, 2, 1, torch.float64), masks(THREE, 2, 3)
    got = generate(spy, SHORT, THREE, z0, given, steps=4, sampler=sampler, guidance=s, guidance_drop=drop,
                   generator=torch.Generator().manual_seed(2))  # fmt: skip
    owner = segments(THREE)
    given_e = given[:, owner]
    dropped = given & torch.tensor([drop is None or m.name in drop for m in (VIDEO, AUDIO, TOUCH) for _ in m.edges[1:]])
    dropped_e = dropped[:, owner]
    assert [len(call[0]) for call in spy.calls] == [4] * 4
    z, prev = next(noise), torch.zeros_like(z0)
    for call, tau in zip(spy.calls, (100, 75, 50, 25)):
        (z_c, z_u), (t_c, t_u), (prev_c, prev_u) = (x.chunk(2) for x in call)
        z, t = torch.where(given_e, z0, z), torch.where(given, 0, tau)
        torch.testing.assert_close(z_c, z, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(prev_c, prev, atol=1e-4, rtol=1e-4)
        assert torch.equal(t_c, t) and torch.equal(t_u, torch.where(dropped, 100, t))
        assert torch.equal(z_u, torch.where(dropped_e, next(noise), z_c))  # nothing of the condition but noise
        assert torch.equal(prev_u, torch.where(dropped_e, 0, prev_c))
        eps = (1 + s) * spy.out(z_c, t_c, prev_c) - s * spy.out(z_u, t_u, prev_u)  # Eq. 16
        prev = torch.where(given_e, z0, (z_c - math.sqrt(1 - SHORT_AB[tau]) * eps) / math.sqrt(SHORT_AB[tau]))
        z = slow_step(sampler, z_c, eps, SHORT_AB[tau], SHORT_AB[tau - 25], noise)
    torch.testing.assert_close(got, torch.where(given_e, z0, z), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "ddim_eta"])
def test_replacement_shows_the_noised_truth_and_the_models_own_estimate(sampler, monkeypatch):
    """All segments share one timestep. Each step draws new noise for the truth."""
    monkeypatch.setitem(SAMPLERS, "ddim_eta", ddim_eta_step)
    z0, given = latents(THREE, 2, 1, torch.float64) + 9, masks(THREE, 2, 3)  # so far that the signal left at T shows
    spy, noise, given_e = Spy(THREE), drawn(2, THREE, 2), given[:, segments(THREE)]
    got = generate_baseline(spy, SHORT, THREE, z0, given, steps=4, sampler=sampler,
                            generator=torch.Generator().manual_seed(2))  # fmt: skip
    z, prev = next(noise), torch.zeros_like(z0)
    truth = lambda ab: math.sqrt(ab) * z0 + math.sqrt(1 - ab) * next(noise)
    shown = truth(SHORT_AB[100])
    assert len(spy.calls) == 4
    for call, tau in zip(spy.calls, (100, 75, 50, 25)):
        z = torch.where(given_e, shown, z)
        assert (call[1] == tau).all()
        for x, seen in ((z, call[0]), (prev, call[2])):
            torch.testing.assert_close(seen, x, atol=1e-4, rtol=1e-4)
        z, _, prev = call
        eps = spy.out(*call)
        prev = (z - math.sqrt(1 - SHORT_AB[tau]) * eps) / math.sqrt(SHORT_AB[tau])  # also where it is given
        z = slow_step(sampler, z, eps, SHORT_AB[tau], SHORT_AB[tau - 25], noise)
        shown = truth(SHORT_AB[tau - 25])
    torch.testing.assert_close(got, torch.where(given_e, z0, z), atol=1e-4, rtol=1e-4)


def test_reconstruction_guidance_moves_by_eqs_9_to_12():
    """One step with self-conditioning against numerical derivatives of the squared error with respect to its input."""
    strength, z0, given = 0.3, latents(TOY, 2, 1, torch.float64), task_mask("continue", TOY)
    spy, ab, tau, tau2, noise = Spy(TOY, "v"), alpha_bar(), 667, 333, drawn(2, TOY, 2)
    generate_baseline(spy, SCHEDULE, TOY, z0, given, steps=3, strength=strength,
                      generator=torch.Generator().manual_seed(2))  # fmt: skip
    first, (z, t, prev), (after, _, _) = spy.calls
    a, s, a2, s2 = (math.sqrt(x) for x in (ab[tau], 1 - ab[tau], ab[tau2], 1 - ab[tau2]))
    own = math.sqrt(ab[1000]) * first[0] - math.sqrt(1 - ab[1000]) * spy.out(*first)
    torch.testing.assert_close(prev, own, atol=1e-4, rtol=1e-4)  # the model's own estimate everywhere, nothing clean
    given_e = given[segments(TOY)]
    *_, fresh = (next(noise) for _ in range(4))  # of the start, and of the truth at 1000, 667 and 333
    truth = a2 * z0 + s2 * fresh
    torch.testing.assert_close(after[:, given_e], truth[:, given_e], atol=1e-5, rtol=1e-5)

    def step(z):
        v = spy.out(z, t, prev)
        return a2 * (a * z - s * v) + s2 * (s * z + a * v)

    error = lambda z: ((step(z) - truth)[:, given_e] ** 2).sum()
    for place in ((0, 1600), (0, 2560 + 9 * 64 + 11), (1, 2560 + 12 * 64 + 3)):  # video, audio, another example's audio
        shift = torch.zeros_like(z)
        shift[place] = 1e-4
        gradient = ((error(z + shift) - error(z - shift)) / 2e-4).item()
        assert not given_e[place[1]] and abs(gradient) > 1e-3
        want = step(z)[place] - strength * s2 * gradient
        torch.testing.assert_close(after[place], want, atol=abs(strength * gradient) * 1e-3, rtol=1e-5)


@pytest.mark.parametrize(("way", "kwargs"), WAYS)
def test_masks_of_numbers_and_inference_mode_change_nothing(way, kwargs):
    """Reconstruction guidance needs a gradient, even of tensors that were made in inference mode."""
    model, z0, given = randomized(AVDiT(THREE, 16, 1, 2, "v")), latents(THREE, 3), masks(THREE, 3, 5)
    run = lambda z0, given: way(model, SCHEDULE, THREE, z0, given, steps=3,
                                generator=torch.Generator().manual_seed(1), **kwargs)  # fmt: skip
    want = run(z0, given)
    for kind in (torch.int64, torch.uint8, torch.float32):
        assert torch.equal(run(z0, given.to(kind)), want)
    with torch.inference_mode():
        assert torch.equal(run(z0, given), want) and torch.equal(run(z0 + 0, given | given), want)


@pytest.mark.parametrize("T", [1000, 20_000])
def test_no_timestep_repeats_when_all_are_taken(T):
    assert torch.equal(torch.stack(respaced(T, T)), torch.arange(T, -1, -1))


def test_timesteps_are_tensors_on_the_device():
    """XLA would compile a new program for every Python number."""
    for steps in (1, 3, 250):
        taus = respaced(1000, steps)
        assert [tau.item() for tau in taus] == [round(1000 - 1000 * k / steps) for k in range(steps + 1)]
        assert all(tau.dtype == torch.int64 and tau.shape == () for tau in taus)
        assert {tau.device.type for tau in respaced(1000, steps, "meta")} == {"meta"}


@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), ddim_eta_step])
def test_what_is_clean_stays_as_it_is(sampler):
    """From t = 0 to t = 0 a step changes nothing, whatever the estimate of eps is. DDIM draws no noise."""
    z, eps, clean = torch.randn(2, 5), torch.randn(2, 5), (torch.ones(2, 5), torch.zeros(2, 5))
    noise = None if sampler is ddim_step else lambda: torch.randn(2, 5)
    assert torch.equal(sampler(z, z, eps, clean, clean, noise), z)


def test_wrong_arguments_are_named():
    for way, kwargs, message in (
        (generate, {"sampler": "euler"}, "unknown sampler 'euler': use ddim, ddpm"),
        (generate, {"steps": 0}, "use 1 to 1000"),
        (generate, {"steps": 1001}, "use 1 to 1000"),
        (generate, {"guidance": 1.0, "guidance_drop": ["smell"]}, "use video, audio"),
        (generate_baseline, {"sampler": "euler"}, "unknown sampler 'euler': use ddim, ddpm"),
        (generate_baseline, {"steps": 0}, "use 1 to 1000"),
        (generate_baseline, {"steps": 1001}, "use 1 to 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            way(Spy(TOY), SCHEDULE, TOY, latents(TOY, 1), task_mask("joint", TOY), **kwargs)


@pytest.mark.parametrize(("way", "none"), [(generate, {"guidance": 0.0}), (generate_baseline, {"strength": 0.0})])
def test_defaults_and_on_step(way, none):
    """The defaults are 250 DDIM steps [App. B] without guidance. on_step counts the steps. One step is possible."""
    z0, given, seen = latents(THREE, 1), masks(THREE, 1, 3), []
    run = lambda **kwargs: way(Spy(THREE), SCHEDULE, THREE, z0, given, generator=torch.Generator().manual_seed(1),
                               on_step=lambda *a: seen.append(a), **kwargs)  # fmt: skip
    assert torch.equal(run(), run(steps=250, sampler="ddim", **none))
    assert seen == [(i, 250) for i in range(1, 251)] * 2
    run(steps=1)
    assert seen[500:] == [(1, 1)]
