"""avdit.py against closed forms and slow loops written from the paper."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

import avdit
from avdit import AVDiT, Modality, NoiseSchedule, sample_timesteps, task_mask

TOY = avdit.PRESETS["toy"].modalities
# Three modalities of different lengths, widths and grids; the third has segments that straddle the reference's.
THREE = [
    Modality("video", (2, 3), 4, (0, 0.125, 0.625, 1.125)),
    Modality("audio", (), 5, tuple(i / 16 for i in range(19))),
    Modality("touch", (2,), 3, (0, 0.2, 0.9, 1.3, 1.5)),
]


def randomized(model, seed=0):
    """At initialisation the residual branches are zero and a test would see nothing: draw every parameter anew."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(p.shape[-1]))
    return model.eval()


def latents(modalities, batch, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {m.name: torch.randn(batch, *m.shape, generator=g, dtype=dtype) for m in modalities}


def alpha_bar():
    """Sec. 2 and App. B in a plain float64 loop: alpha_bar[t] for t = 0..1000."""
    out = [1.0]
    for t in range(1, 1001):
        out.append(out[-1] * (1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)))
    return np.array(out)


# --- Noise levels ---------------------------------------------------------------------


def test_schedule():
    truth, schedule = alpha_bar(), NoiseSchedule()
    assert schedule.alpha_bar.shape == (1001,) and schedule.alpha_bar[0] == 1
    np.testing.assert_allclose(schedule.alpha_bar.numpy(), truth, rtol=2e-7)
    np.testing.assert_allclose(schedule.a.numpy(), np.sqrt(truth), rtol=2e-7)
    np.testing.assert_allclose(schedule.s.numpy(), np.sqrt(1 - truth), rtol=2e-7)
    assert abs(math.sqrt(truth[1000]) - 0.00635) < 1e-5  # the signal that is left at T


def test_add_noise_is_eq_5_per_segment():
    truth, m = alpha_bar(), THREE[0]
    z0, eps = latents([m], 2, 1)["video"], latents([m], 2, 2)["video"]
    t = torch.tensor([[0, 1, 1000], [17, 500, 999]])
    z_t = NoiseSchedule().add_noise(z0, eps, t)
    for b in range(2):
        for n in range(3):
            ab = truth[t[b, n]]
            want = math.sqrt(ab) * z0[b, n].double() + math.sqrt(1 - ab) * eps[b, n].double()
            torch.testing.assert_close(z_t[b, n].double(), want, atol=1e-6, rtol=1e-6)
    assert torch.equal(z_t[0, 0], z0[0, 0])  # t = 0 is no noise at all


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_estimates_invert_the_target(prediction):
    schedule, (z0, eps) = NoiseSchedule(), (latents(TOY, 4, s)["audio"] for s in (1, 2))
    t = torch.randint(0, 700, (4, TOY[1].N), generator=torch.Generator().manual_seed(0))
    out = schedule.target(z0, eps, t, prediction)
    ab = torch.tensor(alpha_bar())[t][..., None]
    want = eps.double() if prediction == "eps" else ab.sqrt() * eps - (1 - ab).sqrt() * z0
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    got_z0, got_eps = schedule.estimates(schedule.add_noise(z0, eps, t), t, out, prediction)
    torch.testing.assert_close(got_z0, z0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got_eps, eps, atol=1e-4, rtol=1e-4)


# --- The timestep vector --------------------------------------------------------------


def slow_correspondence(m, reference):
    out = []
    for n in range(m.N):
        middle = (m.edges[n] + m.edges[n + 1]) / 2
        inside = [k for k in range(reference.N) if reference.edges[k] <= middle < reference.edges[k + 1]]
        out.append(inside[0] if inside else reference.N - 1)
    return out


def test_correspondence():
    on_an_edge = Modality("odd", (), 1, (0, 0.25, 1))  # its first midpoint is the edge 0.125, where a segment begins
    for m in (*THREE, *TOY, on_an_edge):
        assert avdit.correspondence(m, THREE[0]).tolist() == slow_correspondence(m, THREE[0])
    assert avdit.correspondence(THREE[2], THREE[0]).tolist() == [0, 1, 2, 2]  # by hand; the last lies past the end


def strategy_of(t):
    """Which strategies could have drawn this timestep vector, dict of (N_m,)."""
    first = t["video"].tolist()
    constant = {m.name: len(set(t[m.name].tolist())) == 1 for m in THREE}
    by_time = all(t[m.name].tolist() == [first[k] for k in slow_correspondence(m, THREE[0])] for m in THREE)
    if all(constant.values()):
        return "vanilla" if len({t[m.name][0].item() for m in THREE}) == 1 else "pm"
    return "pt" if by_time else "ptm"


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        ("vanilla", {"vanilla": 1}),
        ("pm", {"pm": 1}),
        ("pt", {"pt": 1}),
        ("ptm", {"ptm": 1}),
        ("monl", {"vanilla": 0.25, "pm": 0.25, "pt": 0.25, "ptm": 0.25}),
        ("pt+pm+ptm", {"pt": 1 / 3, "pm": 1 / 3, "ptm": 1 / 3}),
        ("vanilla*2+ptm", {"vanilla": 2 / 3, "ptm": 1 / 3}),
        ("monl+pm", {"vanilla": 1 / 8, "pm": 5 / 8, "pt": 1 / 8, "ptm": 1 / 8}),
    ],
)
def test_mixture_frequencies_and_equalities(mixture, shares):
    n = 4000
    t = sample_timesteps(mixture, THREE, n, 1000, torch.Generator().manual_seed(0))
    found = [strategy_of({m: x[i] for m, x in t.items()}) for i in range(n)]  # one example, one strategy
    for strategy in avdit.STRATEGIES:
        share = shares.get(strategy, 0)
        assert abs(found.count(strategy) / n - share) <= 4 * math.sqrt(share * (1 - share) / n) + 1e-9, strategy
    for m in THREE:
        assert t[m.name].dtype == torch.int64 and t[m.name].shape == (n, m.N)
        assert t[m.name].min() >= 1 and t[m.name].max() <= 1000


def test_any_modality_can_be_the_time_reference():
    audio_first = [THREE[1], THREE[0]]  # the reference is the longer one now
    t = sample_timesteps("pt", audio_first, 50, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(t["video"], t["audio"][:, slow_correspondence(THREE[0], THREE[1])])


@pytest.mark.parametrize("mixture", [*avdit.STRATEGIES, "task:continue"])
def test_timesteps_are_uniform_and_independent(mixture):
    t = sample_timesteps(mixture, THREE, 20000, 5, torch.Generator().manual_seed(0))
    columns = torch.cat(list(t.values()), 1)  # every segment of every modality
    columns = columns[:, columns.any(0)]  # that is wanted
    counts = torch.stack([(columns == k).sum(0) for k in range(1, 6)])
    assert (counts.sum(0) == 20000).all()
    assert ((counts - 4000).abs() < 5 * math.sqrt(20000 * 0.2 * 0.8)).all()
    centred = columns.double() - 3  # uniform on 1..5 has variance 2
    assert ((centred[1:] * centred[:-1]).mean(0) / 2).abs().max() < 5 / math.sqrt(20000)  # from one example to the next
    if mixture == "ptm":
        off_diagonal = columns.double().T.corrcoef() - torch.eye(columns.shape[1])
        assert off_diagonal.abs().max() < 5 / math.sqrt(20000)


def test_task_mixtures_hold_zero_on_the_given_part():
    for task in avdit.TASKS:
        t, given = sample_timesteps(f"task:{task}", TOY, 50, 1000), task_mask(task, TOY)
        for i in range(50):
            wanted = torch.cat([t[m.name][i][~given[m.name]] for m in TOY])
            assert len(wanted.unique()) == 1 and wanted[0] >= 1
        assert all((t[m.name][:, given[m.name]] == 0).all() for m in TOY)


@pytest.mark.parametrize("mixture", ["", "mono", "pt+", "pt*0", "pt*x", "task:v2v", "pt*-1", "pt*nan", "pt*inf"])
def test_a_wrong_mixture_names_the_valid(mixture):
    with pytest.raises(ValueError, match=r"use monl, vanilla, pm, pt, ptm|positive number"):
        sample_timesteps(mixture, TOY, 1, 1000)


# --- The network ----------------------------------------------------------------------


def slow_forward(model, z_t, t, z0_prev):
    """AVDiT one example and one token at a time, with the modulation computed anew for every token [Sec. 4]."""
    d, heads = model.dim, model.blocks[0].heads
    result = {m.name: torch.zeros_like(z_t[m.name]) for m in model.modalities}

    def sinusoid(x):
        freqs = [10000 ** (-k / (d // 2)) for k in range(d // 2)]
        return torch.tensor([math.cos(x * f) for f in freqs] + [math.sin(x * f) for f in freqs], dtype=torch.float64)

    def mlp(net, x):  # GELU: x times the normal distribution function
        x = net[0](x)
        return net[2](0.5 * x * (1 + torch.erf(x / math.sqrt(2))))

    def embed(net, x):  # Linear, SiLU, Linear, SiLU
        for linear in net[::2]:
            x = linear(x)
            x = x / (1 + torch.exp(-x))
        return x

    def norm(x):
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()

    for b in range(len(t["video"])):
        x, c, where = [], [], []
        for m in model.modalities:
            for n in range(m.N):
                for p in range(m.P):
                    both = torch.cat([z[m.name][b, n].reshape(m.P, -1)[p] for z in (z_t, z0_prev)])
                    position = model.time[m.name][n] + model.space[m.name][p]
                    x.append(model.project_in[m.name](both) + position)
                    place = model.time[m.name][n] + model.space[m.name].mean(0)
                    c.append(embed(model.embed, torch.cat([sinusoid(t[m.name][b, n].item()), place])))
                    where.append((m, n, p))
        for block in model.blocks:
            ada = [block.ada(ci).chunk(4) for ci in c]
            h = [norm(xi) * (1 + scale) + shift for xi, (shift, scale, _, _) in zip(x, ada)]
            q, k, v = (torch.stack([block.qkv(hi) for hi in h]).reshape(len(x), 3, heads, -1)[:, i] for i in range(3))
            for i in range(len(x)):
                mixed = []
                for e in range(heads):
                    weight = (k[:, e] @ q[i, e] / math.sqrt(d // heads)).softmax(0)
                    mixed.append(weight @ v[:, e])
                x[i] = x[i] + block.attend(torch.cat(mixed))
            x = [xi + mlp(block.mlp, norm(xi) * (1 + scale) + shift) for xi, (_, _, shift, scale) in zip(x, ada)]
        for xi, ci, (m, n, p) in zip(x, c, where):
            shift, scale = model.ada(ci).chunk(2)
            result[m.name][b, n].view(m.P, -1)[p] = model.project_out[m.name](norm(xi) * (1 + scale) + shift)
    return result


def test_attention_in_bf16_is_float32_where_a_cpu_has_few_tokens(monkeypatch):
    """For speed; what comes out is attention either way, written out here."""
    seen, fused = [], torch.nn.functional.scaled_dot_product_attention
    spy = lambda q, k, v: (seen.append(q.dtype), fused(q, k, v))[1]
    monkeypatch.setattr(avdit.F, "scaled_dot_product_attention", spy)
    g = torch.Generator().manual_seed(0)
    for tokens, dtype in ((511, torch.float32), (512, torch.bfloat16)):
        q, k, v = torch.randn(3, 1, 2, tokens, 8, generator=g).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            out = avdit.attention(q, k, v)
        want = (q.float() @ k.float().mT / math.sqrt(8)).softmax(-1) @ v.float()
        assert out.dtype == seen[-1] == dtype
        torch.testing.assert_close(out.float(), want, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_network_equals_its_slow_form():
    model = randomized(AVDiT(THREE, 16, 2, 2)).double()
    z, prev = (latents(THREE, 2, s, torch.float64) for s in (1, 2))
    t = sample_timesteps("ptm", THREE, 2, 1000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        fast, slow = model(z, t, prev), slow_forward(model, z, t, prev)
        for m in THREE:
            torch.testing.assert_close(fast[m.name], slow[m.name], atol=1e-4, rtol=1e-4)  # float32 angles to 1000
        zeros = {m: torch.zeros_like(x) for m, x in z.items()}
        assert all(torch.equal(a, b) for a, b in zip(model(z, t).values(), model(z, t, zeros).values()))


def test_a_fresh_network():
    """It predicts zero, its layers change nothing, and it knows when and where a token lies."""
    torch.manual_seed(0)
    model, z = AVDiT(THREE, 32, 2, 2), latents(THREE, 2)
    t = sample_timesteps("ptm", THREE, 2, 1000)
    assert all((out == 0).all() for out in model(z, t).values())
    x, c = torch.randn(2, sum(m.N * m.P for m in THREE), 32), torch.randn(2, sum(m.N for m in THREE), 32)
    assert torch.equal(model.blocks[0](x, c, THREE), x)
    for m in THREE:
        for n, row in enumerate(model.time[m.name]):
            ms = 1000 * (m.edges[n] + m.edges[n + 1]) / 2
            angles = [ms / 10000 ** (k / 16) for k in range(16)]
            want = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
            torch.testing.assert_close(row.detach(), want, atol=1e-4, rtol=0)
    assert abs(torch.cat([x.flatten() for x in model.space.values()]).std() - 0.5) < 0.08


def test_a_segment_reaches_others_through_attention_alone():
    t = sample_timesteps("ptm", THREE, 1, 1000, torch.Generator().manual_seed(0))
    z = latents(THREE, 1)
    for attention in (True, False):
        model = randomized(AVDiT(THREE, 16, 2, 2))
        if not attention:
            for block in model.blocks:
                torch.nn.init.zeros_(block.attend.weight)
        for change in ("z", "t"):
            z2, t2 = ({m: x.clone() for m, x in y.items()} for y in (z, t))
            if change == "z":
                z2["audio"][:, 7] += 1
            else:
                t2["audio"][:, 7] = 1001 - t2["audio"][:, 7]
            with torch.no_grad():
                out, out2 = model(z, t), model(z2, t2)
            changed = {m: (out[m] != out2[m]).flatten(2).any(-1)[0] for m in out}
            assert changed["audio"][7]
            assert all(changed[m].all() for m in out) if attention else sum(int(c.sum()) for c in changed.values()) == 1


def test_order_of_modalities_does_not_matter():
    model = randomized(AVDiT(THREE, 16, 2, 2))
    other = AVDiT(THREE[::-1], 16, 2, 2)
    other.load_state_dict(model.state_dict())
    z, t = latents(THREE, 2), sample_timesteps("ptm", THREE, 2, 1000)
    with torch.no_grad():
        for m, out in other(z, t).items():
            torch.testing.assert_close(out, model(z, t)[m], atol=1e-5, rtol=1e-5)


def test_presets_have_the_stated_size():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in preset.model().parameters()) for name, preset in avdit.PRESETS.items()}
    assert 410e6 < counts["paper"] < 420e6  # the paper says 420 M
    d = 1024
    # a layer: q k v without bias; with it out, MLP up and down, scales and shifts
    layers = 24 * ((3 + 1 + 4 + 4 + 4) * d * d + (1 + 4 + 1 + 4) * d)
    around = 3 * d * d + 2 * d + 2 * d * d + 2 * d  # the timestep's MLP, the last scale and shift
    ends = sum(2 * c * d + d + d * c + c for c in (8, 1024))  # into the transformer, beside the estimate, and out
    positions = (5 + 256 + 106 + 1) * d
    assert counts["paper"] == layers + around + ends + positions
    shapes = {m.name: m.shape for m in avdit.PRESETS["paper"].modalities}
    assert shapes == {"video": (5, 16, 16, 8), "audio": (106, 1024)}


def test_the_paper_preset_is_app_b():
    """17 frames at 8 a second; 16 kHz sound, 320 samples a segment (r_ta)."""
    p = avdit.PRESETS["paper"]
    assert (p.dim, p.depth, p.heads, p.prediction, p.noise_power) == (1024, 24, 16, "eps", 0)
    assert (p.batch, p.steps, p.lr, p.warmup) == (256, 400_000, 5e-4, 5000)
    assert (p.sampler, p.sampling_steps) == ("ddim", 250) and p.ema == 0.9999
    video, audio = p.modalities
    assert video.edges == (0, 1 / 8, 5 / 8, 9 / 8, 13 / 8, 17 / 8) and video.grid == (16, 16)
    np.testing.assert_allclose(audio.edges, 320 / 16000 * np.arange(107), atol=1e-12)
    assert [m.shape for m in TOY] == [(5, 2, 2, 64), (17, 64)] and TOY[0].edges[-1] == TOY[1].edges[-1] == 17 / 8


def test_wrong_models_are_refused():
    with pytest.raises(ValueError, match="use eps, v"):
        AVDiT(TOY, 16, 1, 2, "x0")
    with pytest.raises(ValueError, match="divisible"):
        AVDiT(TOY, 16, 1, 3)
    for settings in (avdit.PRESETS["toy"], TOY[0]):  # everybody shares them
        with pytest.raises(FrozenInstanceError):
            settings.grid = settings.dim = 3
