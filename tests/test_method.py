"""avdit.py against closed forms and slow loops written from the paper."""

import math
import re
import runpy
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import baselines
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import avdit
from avdit import (
    MONL,
    PREDICTIONS,
    STRATEGIES,
    AVDiT,
    Block,
    Layout,
    Modality,
    NoiseSchedule,
    predict,
    sample_timesteps,
    task_mask,
)
from train import RECIPES

TOY = Layout(avdit.PRESETS["toy"].modalities)
# Three modalities of different lengths, widths and grids; the third has segments that straddle the reference's.
VIDEO = Modality("video", (2, 3), 4, (0, 0.125, 0.625, 1.125))
AUDIO = Modality("audio", (), 5, tuple(i / 16 for i in range(19)))
TOUCH = Modality("touch", (2,), 3, (0, 0.2, 0.9, 1.3, 1.5))
THREE = Layout([VIDEO, AUDIO, TOUCH])


def segments(layout):
    """(E,): the segment of each element, one element at a time."""
    owners, n = [], 0
    for m in layout.modalities:
        for _ in range(m.N):
            owners += [n] * (math.prod(m.grid) * m.channels)
            n += 1
    return torch.tensor(owners)


def randomized(model, seed=0):
    """Draw every parameter anew. A fresh model's residual branches are zero, so a test would see nothing of them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(p.shape[-1]))
    return model.eval()


def latents(layout, batch, seed=0, dtype=torch.float32):
    return torch.randn(batch, layout.E, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def alpha_bar():
    """Sec. 2 and App. B in a plain float64 loop: alpha_bar[t] for t = 0..1000."""
    out = [1.0]
    for t in range(1, 1001):
        out.append(out[-1] * (1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)))
    return np.array(out)


def tags(module):
    """All tags of a file. [Eq. 8 to 12] or [Alg. 3, Alg. 4, Eq. 7] counts for each part. A module's first docstring may
    have examples of tags, which do not count."""
    text, found = Path(module.__file__).read_text(encoding="utf-8").split('"""', 2)[2], set()
    number = r"(?:[A-F]|\d+)(?:\.\d+)?\b"
    for tag in re.findall(r"\[((?:Eq|Alg|Sec|App)\. [^]]+)\]", text):
        for kind, numbers in re.findall(rf"(Eq|Alg|Sec|App)\. ({number}(?:(?:, | to ){number})*)", tag):
            for part in numbers.split(", "):
                first, _, last = part.partition(" to ")
                found |= {f"{kind}. {n}" for n in (range(int(first), int(last) + 1) if last else [first])}
    return found


def test_every_equation_and_algorithm_has_its_tag():
    wanted = {f"Eq. {n}" for n in (*range(1, 8), *range(13, 18))} | {f"Alg. {n}" for n in range(1, 5)}
    wanted |= {"Sec. 2", "Sec. 3.1", "Sec. 3.2", "Sec. 3.3", "Sec. 4", "Sec. 6.2", "App. B", "App. E", "App. F"}
    missing = (wanted - tags(avdit)) | ({"App. C.2", *(f"Eq. {n}" for n in range(8, 13))} - tags(baselines))
    assert not missing


# --- Where things lie -------------------------------------------------------------------------------------------------


def test_layout_by_hand():
    assert (THREE.S, THREE.E) == (3 + 18 + 4, 3 * 6 * 4 + 18 * 5 + 4 * 2 * 3)
    assert (THREE.names, THREE.lengths, THREE.sizes) == (["video", "audio", "touch"], [3, 18, 4], [72, 90, 24])
    assert [(m.N, m.P, m.shape) for m in THREE.modalities] == [
        (3, 6, (3, 2, 3, 4)), (18, 1, (18, 5)), (4, 2, (4, 2, 3))]  # fmt: skip
    assert THREE.first_of_modality.tolist() == [0] * 3 + [3] * 18 + [21] * 4
    edges = [m.edges for m in (VIDEO, AUDIO, TOUCH)]
    assert THREE.starts.tolist() == [x for e in edges for x in e[:-1]]
    assert THREE.ends.tolist() == [x for e in edges for x in e[1:]]
    assert THREE.of(["audio"]).tolist() == [False] * 3 + [True] * 18 + [False] * 4
    assert THREE.of(["touch", "video"]).tolist() == [True] * 3 + [False] * 18 + [True] * 4
    assert not THREE.of([]).any() and THREE.of(["audio"]).dtype == torch.bool
    with pytest.raises(ValueError, match="'smell': use video, audio, touch"):
        THREE.of(["audio", "smell"])


@pytest.mark.parametrize("layout", [TOY, THREE])
def test_packed_latents_run_modality_by_modality_segment_by_segment(layout):
    g = torch.Generator().manual_seed(0)
    parts = {m.name: torch.randn(2, *m.shape, generator=g) for m in layout.modalities}
    z = layout.pack(dict(reversed(parts.items())))  # the dict's own order does not matter
    for b in range(2):
        want = [part[b, n].reshape(-1) for part in parts.values() for n in range(part.shape[1])]
        assert torch.equal(z[b], torch.cat(want))
    back = layout.unpack(z)
    assert list(back) == layout.names and all(torch.equal(back[name], part) for name, part in parts.items())


@pytest.mark.parametrize("layout", [TOY, THREE])
def test_segments_have_tokens_and_elements(layout):
    """per_token and per_element, one by one, and split."""
    x, owners = torch.rand(2, layout.S), [m for m in layout.modalities for _ in range(m.N)]
    rows, values = torch.rand(2, layout.S, 3), layout.per_element(x)
    tokens, place, element = layout.per_token(rows), 0, 0
    for n, m in enumerate(owners):
        for _ in range(math.prod(m.grid)):
            assert torch.equal(tokens[:, place], rows[:, n])
            place += 1
            for _ in range(m.channels):
                assert torch.equal(values[:, element], x[:, n])
                element += 1
    assert tokens.shape == (2, place, 3) and values.shape == (2, element) == (2, layout.E)
    for other in (x > 0.5, (9 * x).long(), x[0], x[None]):  # any dtype, any axes in front
        assert torch.equal(layout.per_element(other), other[..., segments(layout)])
    for y in (x, x[0]):
        assert torch.equal(torch.cat(list(layout.split(y).values()), -1), y)
        assert {k: v.shape[-1] for k, v in layout.split(y).items()} == {m.name: m.N for m in layout.modalities}


def test_within_takes_whole_segments_only():
    video = lambda *span: TOY.within(*span)[:5].tolist()
    assert video(0, 0.624) == [True, False, False, False, False]
    assert video(0, 0.625 - 5e-7) == video(5e-7, 0.625) == [True, True, False, False, False]
    assert video(0.01, 2.125) == [False, True, True, True, True]
    assert video(5e-6, 0.625) == [False, True, False, False, False]
    assert TOY.within(0.5, 0.8)[5:].tolist() == [n in (4, 5) for n in range(17)]  # segments of 0.125 s


def slow_coincident(layout):
    reference, out = layout.modalities[0], []
    for m in layout.modalities:
        for n in range(m.N):
            middle = (m.edges[n] + m.edges[n + 1]) / 2
            inside = [k for k in range(reference.N) if reference.edges[k] <= middle < reference.edges[k + 1]]
            out.append(inside[0] if inside else reference.N - 1)
    return out


def test_coincident():
    on_an_edge = Modality("odd", (), 1, (0, 0.25, 1))  # its first midpoint is the edge 0.125, where a segment begins
    for layout in (TOY, THREE, Layout([VIDEO, on_an_edge]), Layout([AUDIO, VIDEO]), Layout([TOUCH, on_an_edge, AUDIO])):
        assert avdit.coincident(layout).tolist() == slow_coincident(layout)
    assert avdit.coincident(THREE)[-4:].tolist() == [0, 1, 2, 2]  # by hand; the last lies past the end


# --- Noise levels -----------------------------------------------------------------------------------------------------


def test_schedule():
    truth, schedule = alpha_bar(), NoiseSchedule()
    assert schedule.T == 1000 and schedule.a.shape == schedule.s.shape == (1001,)
    assert schedule.a[0] == 1 and schedule.s[0] == 0  # t = 0 is exactly clean
    np.testing.assert_allclose(schedule.a.numpy(), np.sqrt(truth), rtol=2e-7)
    np.testing.assert_allclose(schedule.s.numpy(), np.sqrt(1 - truth), rtol=2e-7)
    assert abs(math.sqrt(truth[1000]) - 0.00635) < 1e-5  # the signal that is left at T
    own = NoiseSchedule(4, 0.1, 0.4)
    np.testing.assert_allclose(own.a.numpy() ** 2, np.cumprod([1, 0.9, 0.8, 0.7, 0.6]), rtol=1e-6)


def ptm_timesteps(layout, batch, T=1000):
    """Another t for every segment, with clean ones and both ends among them."""
    t = torch.randint(1, T + 1, (batch, layout.S), generator=torch.Generator().manual_seed(9))
    t[0, :3] = torch.tensor([0, 1, T])
    t[-1, layout.lengths[0] :] = 0  # all of the time reference is noisy, all else given
    return t


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_is_eq_5_and_estimates_invert_the_target(prediction):
    """Every segment has its own noise level."""
    truth, schedule, t = torch.tensor(alpha_bar()), NoiseSchedule(), ptm_timesteps(THREE, 3, 700)
    z0, eps = (latents(THREE, 3, seed, torch.float64) for seed in (1, 2))
    a, s = schedule.scales(THREE, t)
    z = a * z0 + s * eps
    v, owner = torch.zeros_like(z), segments(THREE)
    for b in range(3):
        for e in range(THREE.E):
            ab = truth[t[b, owner[e]]]
            want = math.sqrt(ab) * z0[b, e] + math.sqrt(1 - ab) * eps[b, e]
            assert abs(z[b, e] - want) < 1e-6
            v[b, e] = math.sqrt(ab) * eps[b, e] - math.sqrt(1 - ab) * z0[b, e]
    clean = (t == 0)[:, owner]
    model = lambda *_: {"eps": eps, "v": v, "z0": z0 + 9 * clean}[prediction]  # z0 may be wrong where it is given
    model.prediction = prediction
    z0_hat, eps_hat = predict(model, schedule, THREE, z, t)
    torch.testing.assert_close(z0_hat, z0, atol=1e-4, rtol=1e-4)
    unknown = clean if prediction == "z0" else torch.zeros_like(clean)  # without noise, z0 tells nothing about eps
    torch.testing.assert_close(eps_hat, torch.where(unknown, 0, eps), atol=1e-4, rtol=1e-4)
    assert clean.any() and torch.equal(z[clean], z0[clean])  # t = 0 means no noise at all,
    assert torch.equal(z0_hat[clean], z[clean])  # and the estimate is z itself


# --- The timestep vector ----------------------------------------------------------------------------------------------


def strategy_of(t, layout):
    """The strategy that drew this timestep vector, a list."""
    parts = [set(t[first : first + n]) for first, n in zip(np.cumsum([0, *layout.lengths]), layout.lengths)]
    if all(len(part) == 1 for part in parts):
        return "vanilla" if len(set(t)) == 1 else "pm"
    return "pt" if t == [t[n] for n in slow_coincident(layout)] else "ptm"


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        ("vanilla", {"vanilla": 1}),
        ("pm", {"pm": 1}),
        ("pt", {"pt": 1}),
        ("ptm", {"ptm": 1}),
        ("monl", {"vanilla": 0.25, "pm": 0.25, "pt": 0.25, "ptm": 0.25}),
        ("pt+pm+ptm", {"pt": 1 / 3, "pm": 1 / 3, "ptm": 1 / 3}),
        ("vanilla+ptm+vanilla", {"vanilla": 2 / 3, "ptm": 1 / 3}),
        ("monl+pm", {"vanilla": 1 / 5, "pm": 2 / 5, "pt": 1 / 5, "ptm": 1 / 5}),
    ],
)
def test_mixture_frequencies_and_equalities(mixture, shares):
    n = 4000
    t = sample_timesteps(mixture, THREE, n, 1000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.shape == (n, THREE.S) and t.min() >= 1 and t.max() <= 1000
    found = [strategy_of(row, THREE) for row in t.tolist()]  # one strategy per example
    for strategy in STRATEGIES:
        share = shares.get(strategy, 0)
        assert abs(found.count(strategy) / n - share) <= 4 * math.sqrt(share * (1 - share) / n) + 1e-9, strategy


def test_a_new_strategy_is_one_function_and_its_name(monkeypatch):
    """Later segments are noisier. It mixes with the others; "monl" remains the paper's four."""
    draw = lambda mixture: sample_timesteps(mixture, THREE, 2000, 1000, torch.Generator().manual_seed(0))
    before = draw("monl")
    monkeypatch.setitem(STRATEGIES, "later", lambda t_ref, layout: (t_ref[:, :1] * layout.ends / 1.5).ceil().long())
    ends = [edge for m in (VIDEO, AUDIO, TOUCH) for edge in m.edges[1:]]

    def is_later(t):  # whatever the largest was, t rises along the time of all modalities
        return [math.ceil(t[-1] * end / 1.5) for end in ends] == t

    assert all(is_later(t) for t in draw("later").tolist())
    found = [is_later(t) for t in draw("later+ptm+pm+later").tolist()]
    assert abs(sum(found) / 2000 - 1 / 2) < 4 * math.sqrt(1 / 4 / 2000)
    assert {strategy_of(t, THREE) for t, new in zip(draw("later+pm").tolist(), found) if not new} == {"ptm", "pm"}
    assert torch.equal(draw("monl"), before) and set(MONL) == {"vanilla", "pt", "pm", "ptm"}
    assert not any(is_later(t) for t in before.tolist())
    with pytest.raises(ValueError, match="use monl, .*, task:continue-2s, later"):
        draw("latter")


def test_any_modality_can_be_the_time_reference():
    layout = Layout([AUDIO, VIDEO])  # the reference is the longer one now
    t = sample_timesteps("pt", layout, 50, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(t, t[:, slow_coincident(layout)]) and len(t[0].unique()) > 10


@pytest.mark.parametrize("mixture", [*MONL, "task:continue"])
def test_timesteps_are_uniform_and_independent(mixture):
    t = sample_timesteps(mixture, THREE, 20000, 5, torch.Generator().manual_seed(0))
    t = t[:, t.any(0)]  # every segment that is wanted
    counts = torch.stack([(t == k).sum(0) for k in range(1, 6)])
    assert (counts.sum(0) == 20000).all()
    assert ((counts - 4000).abs() < 5 * math.sqrt(20000 * 0.2 * 0.8)).all()
    centred = t.double() - 3  # uniform on 1..5 has variance 2
    assert ((centred[1:] * centred[:-1]).mean(0) / 2).abs().max() < 5 / math.sqrt(20000)  # from one example to the next
    if mixture == "ptm":
        off_diagonal = t.double().T.corrcoef() - torch.eye(THREE.S)
        assert off_diagonal.abs().max() < 5 / math.sqrt(20000)


def test_task_mixtures_hold_zero_on_the_given_part():
    for task in avdit.TASKS:
        t, given = sample_timesteps(f"task:{task}", TOY, 50, 1000), task_mask(task, TOY)
        assert (t[:, given] == 0).all() and (t[:, ~given] >= 1).all()
        assert (t[:, ~given] == t[:, ~given][:, :1]).all() and len(t[:, ~given].unique()) > 10


@pytest.mark.parametrize("mixture", ["", "mono", "pt+", "pt*2", "+pt", "task:v2v", "task:"])
def test_a_wrong_mixture_names_the_valid(mixture):
    with pytest.raises(ValueError, match="unknown strategy .*: use ") as raised:
        sample_timesteps(mixture, TOY, 1, 1000)
    tasks = [f"task:{task}" for task in avdit.TASKS]
    assert set(str(raised.value).split(": use ")[1].split(", ")) == {"monl", "vanilla", "pm", "pt", "ptm", *tasks}


# --- The network ------------------------------------------------------------------------------------------------------


def slow_forward(model, modalities, z, t, z0_prev):
    """AVDiT [Sec. 4] for one example and one token at a time. Each token computes its own modulation."""
    d, heads, result = model.dim, model.blocks[0].heads, []

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

    for b in range(len(z)):
        x, c, names, e, s = [], [], [], 0, 0
        for m in modalities:
            for n in range(m.N):
                place = model.time[m.name][n] + model.space[m.name].mean(0)
                for p in range(m.P):
                    estimate = [max(-10, min(10, x)) for x in z0_prev[b, e : e + m.channels].tolist()]
                    both = torch.cat([z[b, e : e + m.channels], torch.tensor(estimate, dtype=z.dtype)])
                    x.append(model.project_in[m.name](both) + model.time[m.name][n] + model.space[m.name][p])
                    c.append(embed(model.embed, torch.cat([sinusoid(t[b, s].item()), place])))
                    names.append(m.name)
                    e += m.channels
                s += 1
        for block in model.blocks:
            ada = [block.ada(ci).chunk(4) for ci in c]
            h = [norm(xi) * (1 + scale) + shift for xi, (shift, scale, _, _) in zip(x, ada)]
            q, k, v = (torch.stack([block.qkv(hi) for hi in h]).reshape(len(x), 3, heads, -1)[:, i] for i in range(3))
            keys = [torch.stack([norm(key) for key in k[:, j]]) for j in range(heads)]
            for i in range(len(x)):
                mixed = []
                for j in range(heads):
                    weight = (keys[j] @ norm(q[i, j]) / math.sqrt(d // heads)).softmax(0)
                    mixed.append(weight @ v[:, j])
                x[i] = x[i] + block.attend(torch.cat(mixed))
            x = [xi + mlp(block.mlp, norm(xi) * (1 + scale) + shift) for xi, (_, _, shift, scale) in zip(x, ada)]
        for xi, ci, name in zip(x, c, names):
            shift, scale = model.ada(ci).chunk(2)
            result.append(model.project_out[name](norm(xi) * (1 + scale) + shift))
    return torch.cat(result).reshape(z.shape)


@pytest.mark.parametrize("layout", [THREE, Layout([Modality("video", (8, 8), 2, (0, 1, 2, 3, 4)), AUDIO])])
def test_network_equals_its_slow_form(layout):
    """The second has more than 256 tokens, for which attention is PyTorch's."""
    model = randomized(AVDiT(layout, 16, 2, 2)).double()
    z, prev = (latents(layout, 2, seed, torch.float64) for seed in (1, 2))
    t = ptm_timesteps(layout, 2)
    with torch.no_grad():
        slow = slow_forward(model, layout.modalities, z, t, 8 * prev)  # some of it beyond the clamp
        torch.testing.assert_close(model(z, t, 8 * prev), slow, atol=1e-4, rtol=1e-4)  # float32 angles to 1000
        assert torch.equal(model(z, t), model(z, t, torch.zeros_like(z)))


def test_the_estimate_is_clamped_and_nothing_else():
    model, t = randomized(AVDiT(THREE, 16, 2, 2)), ptm_timesteps(THREE, 2)
    z, prev = 20 * latents(THREE, 2, 1), 20 * latents(THREE, 2, 2)
    at_bound = torch.tensor([[max(-10.0, min(10.0, x)) for x in row] for row in prev.tolist()])
    with torch.no_grad():
        assert torch.equal(model(z, t, prev), model(z, t, at_bound))
        assert not torch.allclose(model(z, t, prev), model(z, t, 0.99 * at_bound), atol=0.01)  # 10 itself gets through
        assert not torch.allclose(model(z, t, prev), model(z.clamp(-10, 10), t, prev), atol=0.1)


def test_attention_is_fused_from_256_tokens_on(monkeypatch):
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: calls.append(qkv) or fused(*qkv))
    for tokens in (255, 256):
        layout = Layout([Modality("x", (tokens,), 1, (0, 1))])
        Block(8, 2)(torch.zeros(1, tokens, 8), torch.zeros(1, 1, 8), layout)
        assert len(calls) == (tokens == 256)


def test_queries_and_keys_are_normalised():
    """Their scale changes nothing, and the values' scale does. There are no parameters for it."""
    model = randomized(AVDiT(THREE, 16, 1, 2))
    z, t = latents(THREE, 2), ptm_timesteps(THREE, 2)
    weight = model.blocks[0].qkv.weight
    with torch.no_grad():
        before = model(z, t)
        for rows, same in ((slice(16), True), (slice(16, 32), True), (slice(32, 48), False)):
            weight[rows] *= 50
            assert torch.allclose(model(z, t), before, atol=1e-2) == same
            weight[rows] /= 50


def test_bf16_stays_bf16_between_the_blocks():
    """Position embeddings are float32 parameters. Added as such, they would make all later sums float32."""
    model, seen = randomized(AVDiT(THREE, 16, 2, 2)), []
    for module in (*model.blocks, model.norm):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    z, t = latents(THREE, 2), ptm_timesteps(THREE, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(z, t)
    assert seen == [torch.bfloat16] * 3


def test_a_fresh_network():
    """It predicts zero and its layers change nothing. Position embeddings tell when and where a token lies."""
    torch.manual_seed(0)
    model = AVDiT(THREE, 32, 2, 2)
    assert model.prediction == "eps"
    assert (model(latents(THREE, 2), ptm_timesteps(THREE, 2)) == 0).all()
    x, cond = torch.randn(2, 3 * 6 + 18 + 4 * 2, 32), torch.randn(2, THREE.S, 32)
    assert torch.equal(model.blocks[0](x, cond, THREE), x)
    for m in (VIDEO, AUDIO, TOUCH):
        for n, row in enumerate(model.time[m.name]):
            ms = 1000 * (m.edges[n] + m.edges[n + 1]) / 2
            angles = [ms / 10000 ** (k / 16) for k in range(16)]
            want = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
            torch.testing.assert_close(row.detach(), want, atol=1e-4, rtol=0)
    assert abs(torch.cat([x.flatten() for x in model.space.values()]).std() - 0.5) < 0.08


def test_a_segment_reaches_others_through_attention_alone():
    z, t, owner = latents(THREE, 1), ptm_timesteps(THREE, 2)[:1], segments(THREE)
    for attention in (True, False):
        model = randomized(AVDiT(THREE, 16, 2, 2))
        if not attention:
            for block in model.blocks:
                torch.nn.init.zeros_(block.attend.weight)
        for change in ("z", "t"):
            z2, t2, n = z.clone(), t.clone(), 3 + 7
            if change == "z":
                z2[:, owner == n] += 1
            else:
                t2[:, n] = 1001 - t2[:, n]
            with torch.no_grad():
                differs = (model(z, t) != model(z2, t2))[0]
            changed = [differs[owner == s].any().item() for s in range(THREE.S)]
            assert changed == [attention or s == n for s in range(THREE.S)]


def test_order_of_modalities_does_not_matter():
    model, other = randomized(AVDiT(THREE, 16, 2, 2)), AVDiT(Layout([TOUCH, AUDIO, VIDEO]), 16, 2, 2)
    other.load_state_dict(model.state_dict())
    z, t = latents(THREE, 2), ptm_timesteps(THREE, 2)
    turn = lambda x, *sizes: torch.cat(x.split(sizes, 1)[::-1], 1)
    with torch.no_grad():
        out = other(turn(z, 72, 90, 24), turn(t, 3, 18, 4))
        torch.testing.assert_close(turn(out, 24, 90, 72), model(z, t), atol=1e-5, rtol=1e-5)


def parameters(dim, depth, modalities):
    """Weights and biases, counted from the text of Sec. 4."""
    layer = (3 + 1 + 4 + 4 + 4) * dim * dim + (1 + 4 + 1 + 4) * dim  # q k v without bias, out, MLP up and down, AdaLN
    around = 3 * dim * dim + 2 * dim + 2 * dim * dim + 2 * dim  # the MLP of the timestep vector, the last AdaLN
    ends = sum(2 * m.channels * dim + dim + dim * m.channels + m.channels for m in modalities)  # beside the estimate
    positions = sum((len(m.edges) - 1 + math.prod(m.grid)) * dim for m in modalities)
    return depth * layer + around + ends + positions


def test_the_paper_preset_has_the_stated_size():
    preset = avdit.PRESETS["paper"]
    layout = Layout(preset.modalities)
    with torch.device("meta"):
        size = sum(p.numel() for p in preset.model(layout).parameters())
    assert 410e6 < size < 420e6  # the paper says 420 M
    assert size == parameters(1024, 24, preset.modalities)
    assert {m.name: m.shape for m in layout.modalities} == {"video": (5, 16, 16, 8), "audio": (106, 1024)}


def test_the_paper_preset_is_app_b():
    """17 frames at 8 Hz; 16 kHz sound with 320 samples per segment (r_ta)."""
    p, recipe = avdit.PRESETS["paper"], RECIPES["paper"]
    assert (p.dim, p.depth, p.heads, p.prediction) == (1024, 24, 16, "eps")
    assert (recipe["batch"], recipe["steps"], recipe["lr"], recipe["warmup"]) == (256, 400_000, 5e-4, 5000)
    assert (recipe["optimizer"], recipe["ema"], p.sampler, p.sampling_steps) == ("adamw", 0.9999, "ddim", 250)
    video, audio = p.modalities
    assert video.edges == (0, 1 / 8, 5 / 8, 9 / 8, 13 / 8, 17 / 8) and video.grid == (16, 16)
    np.testing.assert_allclose(audio.edges, 320 / 16000 * np.arange(107), atol=1e-12)
    assert [m.shape for m in TOY.modalities] == [(5, 2, 2, 128), (17, 64)]
    assert all(m.edges[-1] == 17 / 8 for m in TOY.modalities)


def test_a_presets_model_takes_another_layout():
    toy = avdit.PRESETS["toy"]
    model = toy.model(THREE)
    assert model.layout is THREE and model.prediction == toy.prediction
    assert (model.dim, len(model.blocks), model.blocks[0].heads) == (toy.dim, toy.depth, toy.heads)


@pytest.mark.parametrize("frames", [16, 3, 18])
def test_frames_that_a_causal_tokenizer_would_drop_are_refused(frames):
    with pytest.raises(ValueError, match=f"{frames} frames are not 1 \\+ 4 k"):
        avdit.av_modalities(8, (2, 2), 4, 0.125, 4, frames=frames)


def test_wrong_models_are_refused():
    with pytest.raises(ValueError, match="unknown prediction 'x0': use eps, v, z0"):
        AVDiT(TOY, 16, 1, 2, "x0")
    with pytest.raises(ValueError, match="divisible"):
        AVDiT(TOY, 16, 1, 3)
    with pytest.raises(ValueError, match="even"):
        AVDiT(TOY, 15, 1, 3)
    for settings in (avdit.PRESETS["toy"], VIDEO):  # everybody shares them
        with pytest.raises(FrozenInstanceError):
            settings.grid = settings.dim = 3


# --- python avdit.py --------------------------------------------------------------------------------------------------


def test_the_tour_draws_the_timestep_vectors(capsys, monkeypatch):
    """A character stands for 1/32 second and a ninth of the noise levels. The picture of each strategy shows what the
    strategy is, and the picture of each task shows what the task gives."""
    seen, original = [], avdit.sample_timesteps
    monkeypatch.setattr(avdit, "sample_timesteps", lambda *args: seen.append(original(*args)) or seen[-1])
    avdit.tour()
    printed = capsys.readouterr().out
    runpy.run_path(avdit.__file__, run_name="__main__")
    assert capsys.readouterr().out == printed
    rows = [re.fullmatch(r"  (.{12}) (video |audio ) \|(.*)\|", line) for line in printed.splitlines()]
    rows = [(row[1].strip(), row[2].strip(), row[3]) for row in rows if row]
    names = [*MONL, *avdit.TASKS]
    assert [row[:2] for row in rows] == [x for name in names for x in ((name, "video"), ("", "audio"))]
    drawn = {}  # name -> one character per segment
    for k, (_, modality, picture) in enumerate(rows):
        edges = [round(32 * edge) for edge in TOY.modalities[TOY.names.index(modality)].edges]
        row = [picture[start] for start in edges[:-1]]
        assert picture == "".join(c * (end - start) for c, (start, end) in zip(row, pairwise(edges)))
        drawn.setdefault(names[k // 2], []).extend(row)
    for strategy, t in zip(MONL, seen, strict=True):
        shades = [" .:-=+*#%@".index(c) for c in drawn[strategy]]
        assert shades == [math.ceil(x * 9 / 1000) for x in t[0].tolist()]  # only t = 0 looks clean
    video, audio = slice(5), slice(5, None)
    (vanilla,) = set(drawn["vanilla"])
    assert vanilla not in " @"  # neither clean nor pure noise, so that it shows something
    assert [len(set(drawn["pm"][m])) for m in (video, audio)] == [1, 1] and len(set(drawn["pm"])) == 2
    assert drawn["pt"] == [drawn["pt"][n] for n in slow_coincident(TOY)] and len(set(drawn["pt"])) > 2
    assert len(set(drawn["ptm"][video])) > 2 and strategy_of(drawn["ptm"], TOY) == "ptm"
    spans = [span for m in TOY.modalities for span in pairwise(m.edges)]
    given = {
        "joint": [False] * 22,
        "a2v": [n >= 5 for n in range(22)],
        "v2a": [n < 5 for n in range(22)],
        "inpaint": [end <= 0.125 or start >= 1.625 for start, end in spans],
        "continue": [end <= 0.625 for _, end in spans],
        "continue-2s": [end <= 0.125 for _, end in spans],
    }
    for task, mask in given.items():
        assert drawn[task] == [" " if clean else "*" for clean in mask], task
    for name, preset in avdit.PRESETS.items():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"preset {name}: "))
        count = parameters(preset.dim, preset.depth, preset.modalities)
        assert f"{count / 1e6:.1f} M parameters, {preset.depth} layers, d = {preset.dim}, " in line
        assert all(f"{m.name} ({m.N}, " in line for m in preset.modalities)
