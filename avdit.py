"""AVDiT: one diffusion transformer for video and audio whose timestep is a vector.

The method of "A Versatile Diffusion Transformer with Mixture of Noise Levels for
Audiovisual Generation", in the paper's order. A tag in brackets names the equation, algorithm
or section beside the line that does it; `python avdit.py` lists them all. DIFFERS FROM PAPER
marks every line that departs from a formula as printed.

Letters, the same in comments, code and tests
    B      batch                         M      modalities (video, audio, ...)
    N_m    time-segments of modality m   P_m    tokens of one segment: h * w of video, 1 of audio
    d_m    latent channels of m          d      width of the transformer
    S      segments, sum of N_m          L      tokens, sum of N_m P_m
    T      diffusion steps               tau    the one timestep all wanted segments share
    z      latents, (B, N_m, *grid, d_m) t      timestep vector, int64 (B, N_m), 0 = clean
    a, s   sqrt(alpha_bar), sqrt(1 - alpha_bar): how much signal and noise z_t holds
Collections over modalities are plain dicts in a fixed order: {"video": ..., "audio": ...}.
"""

import ast
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class Modality:
    """One kind of latent [Sec. 3.1]: (B, N, *grid, channels); a list of them starts with the time reference.

    name      key in every dict
    grid      tokens of one segment: (h, w) for video, () for audio
    channels  d_m
    edges     N + 1 times in seconds; segment n covers edges[n]..edges[n+1]
    """

    name: str
    grid: tuple
    channels: int
    edges: tuple

    @property
    def N(self):
        return len(self.edges) - 1

    @property
    def P(self):
        return math.prod(self.grid)

    @property
    def shape(self):
        return (self.N, *self.grid, self.channels)

    @property
    def midpoints(self):
        edges = torch.tensor(self.edges, dtype=torch.float64)
        return (edges[:-1] + edges[1:]) / 2


def check_choice(what, value, valid):
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}: use {', '.join(valid)}")


def per_segment(x, z):
    """View x, (B, N_m) or (N_m,), so that it broadcasts over z, (B, N_m, *grid, d_m)."""
    return x.expand(z.shape[:2]).reshape(*z.shape[:2], *[1] * (z.ndim - 2))


# ---------------------------------------------------------------------------------------
# Noise levels [Sec. 2, App. B]
# ---------------------------------------------------------------------------------------


class NoiseSchedule(nn.Module):
    """Linear beta schedule [App. B]; `alpha_bar` is (T + 1,), so that t = 0 means no noise at all.

    The product runs in float64: in float32 it would drift, and 1 - alpha_bar lose its digits at small t.
    """

    def __init__(self, T=1000, beta_min=1e-4, beta_max=0.02):
        super().__init__()
        self.T = T
        beta = torch.linspace(beta_min, beta_max, T, dtype=torch.float64)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
        self.register_buffer("alpha_bar", alpha_bar.float())
        self.register_buffer("a", alpha_bar.sqrt().float())
        self.register_buffer("s", (1 - alpha_bar).sqrt().float())
        log = alpha_bar.log()  # in two float32 halves: the difference of two, a small step's, would lose its digits
        self.register_buffer("log_alpha_bar", torch.stack([log.float(), (log - log.float()).float()]))
        self.register_buffer("log_snr", (log - (1 - alpha_bar).log()).float())

    def scales(self, t, z):
        """(a, s) at t, (B, N_m), shaped to multiply z, (B, N_m, *grid, d_m)."""
        return per_segment(self.a[t], z), per_segment(self.s[t], z)

    def add_noise(self, z0, eps, t):
        """z_t of one modality [Eq. 5]; t (B, N_m), every segment at its own level."""
        a, s = self.scales(t, z0)
        return a * z0 + s * eps  # DIFFERS FROM PAPER: Eq. 5 prints alpha_t for alpha_bar_t

    def target(self, z0, eps, t, prediction):
        """What the network learns to output: the noise [Eq. 6], or v = a eps - s z0 (as in W.A.L.T [Sec. 4])."""
        a, s = self.scales(t, z0)
        return a * eps - s * z0 if prediction == "v" else eps

    def estimates(self, z_t, t, out, prediction):
        """Turn the network's output for one modality into its estimates of (z0, eps); at t = 0, z0 is z_t itself."""
        a, s = self.scales(t, z_t)
        if prediction == "v":
            return a * z_t - s * out, s * z_t + a * out
        return (z_t - s * out) / a, out


# ---------------------------------------------------------------------------------------
# The timestep vector [Sec. 3.1, Sec. 3.2, Alg. 1]
# ---------------------------------------------------------------------------------------

STRATEGIES = ("vanilla", "pm", "pt", "ptm")
TASKS = ("joint", "a2v", "v2a", "inpaint", "continue", "continue-2s")


def correspondence(modality, reference):
    """(N_m,) index of the reference segment that contains each midpoint [Sec. 3.1, footnote 4].

    Midpoints beyond either end belong to the nearest segment.
    """
    inner = torch.tensor(reference.edges[1:-1], dtype=torch.float64)
    return torch.bucketize(modality.midpoints, inner, right=True)


def parse_mixture(mixture):
    """Turn "pt+pm*2" into {"pt": 1.0, "pm": 2.0}; "monl" is the four strategies in equal shares."""
    weights = {}
    for term in mixture.split("+"):
        name, _, factor = term.strip().partition("*")
        names = STRATEGIES if name == "monl" else (name,)
        if name not in (*STRATEGIES, "monl", *(f"task:{task}" for task in TASKS)):
            raise ValueError(f"unknown strategy {name!r} in mixture {mixture!r}: use monl, {', '.join(STRATEGIES)}, "
                             f"task:NAME ({', '.join(TASKS)}), sums a+b and weights a*2+b")  # fmt: skip
        try:
            weight = float(factor) if factor else 1.0
        except ValueError:
            weight = -1.0
        if not 0 < weight < math.inf:
            raise ValueError(f"weight {factor!r} in mixture {mixture!r} is not a positive number")
        for each in names:
            weights[each] = weights.get(each, 0) + weight / len(names)
    return weights


def sample_timesteps(mixture, modalities, batch, T, generator=None):
    """Draw a timestep vector for every example [Alg. 1]: dict of int64 (B, N_m) in 1..T.

    mixture  "vanilla", "pm", "pt", "ptm", "monl", a sum ("pt+pm+ptm"), weights ("vanilla*2+ptm": the weighting that
             App. A leaves to future work), or "task:a2v" ...: Table 1's conditional models [Eq. 3], which hold t = 0
             on the given part. ValueError names the valid ones.
    """
    weights = parse_mixture(mixture)
    # One strategy per example, not per batch: Alg. 1 is called for one z_0.
    choice = torch.multinomial(torch.tensor(list(weights.values())), batch, replacement=True, generator=generator)
    # DIFFERS FROM PAPER: Alg. 1 line 4 draws t_ref only inside its MoNL branch; every strategy needs it.
    t_ref = {m.name: torch.randint(1, T + 1, (batch, m.N), generator=generator) for m in modalities}
    first = t_ref[modalities[0].name]  # (B, N_1), the time reference's draw
    masks = {k: task_mask(k.removeprefix("task:"), modalities) for k in weights if k.startswith("task:")}
    t = {}
    for m in modalities:
        own = t_ref[m.name]
        shared = first[:, :1].expand(-1, m.N)
        candidates = {
            "vanilla": shared,  # t^(m,n) = t_ref^(1,1)
            "pm": own[:, :1].expand(-1, m.N),  # t_ref^(m,1)
            "pt": first[:, correspondence(m, modalities[0])],  # t_ref^(1,n), n by time
            "ptm": own,  # t_ref^(m,n)
            **{k: shared.masked_fill(mask[m.name], 0) for k, mask in masks.items()},
        }
        options = torch.stack([candidates[k] for k in weights], 1)  # (B, strategies, N_m)
        t[m.name] = options[torch.arange(batch), choice]
    return t


# ---------------------------------------------------------------------------------------
# The network [Sec. 4, Fig. 5]
# ---------------------------------------------------------------------------------------


def sinusoid(x, dim):
    """(..., dim) sines and cosines of x (...,) at periods from 2 pi to 2 pi 10000; x is a timestep or milliseconds."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x[..., None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulate(x, shift, scale, modalities):
    """Scale and shift tokens x, (B, L, d), by their segment's vectors, (B, S, d), without copying those per token."""
    parts = []
    segments = [m.N for m in modalities]
    tokens = x.split([m.N * m.P for m in modalities], 1)
    for m, x_m, shift_m, scale_m in zip(modalities, tokens, shift.split(segments, 1), scale.split(segments, 1)):
        x_m = x_m.unflatten(1, (m.N, m.P)) * (1 + scale_m[:, :, None]) + shift_m[:, :, None]  # (B, N_m, P_m, d)
        parts.append(x_m.flatten(1, 2))
    return torch.cat(parts, 1)


def attention(q, k, v):
    """(B, heads, L, d / heads) each. In float32 where a CPU would do few tokens in bf16: that gradient is slow."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < 512:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Transformer layer with AdaLN: every segment's scale and shift come from its own timestep [Sec. 4]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.ada = nn.Linear(dim, 4 * dim)  # two (shift, scale) pairs, no gates: the paper's 420 M parameters say so
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)  # a bias on keys would have exactly zero gradient
        self.attend = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for out in (self.attend, self.mlp[-1]):  # each residual branch starts at zero, in place of adaLN-Zero's gates
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)

    def forward(self, x, c, modalities):
        # x (B, L, d) tokens, c (B, S, d) one vector per segment
        shift1, scale1, shift2, scale2 = self.ada(c).chunk(4, -1)
        h = modulate(self.norm(x), shift1, scale1, modalities)
        q, k, v = rearrange(self.qkv(h), "b l (three h e) -> three b h l e", three=3, h=self.heads)
        h = attention(q, k, v)  # every token sees all tokens of all modalities
        x = x + self.attend(rearrange(h, "b h l e -> b l (h e)"))
        return x + self.mlp(modulate(self.norm(x), shift2, scale2, modalities))


class AVDiT(nn.Module):
    """The joint noise prediction network [Sec. 4].

    modalities   list of Modality, the time reference first
    dim          d, divisible by heads and by 2
    prediction   "eps" regresses the noise [Eq. 6]; "v" regresses a eps - s z0
    """

    def __init__(self, modalities, dim, depth, heads, prediction="eps"):
        super().__init__()
        check_choice("prediction", prediction, ("eps", "v"))
        if dim % heads or dim % 2:
            raise ValueError(f"dim {dim} must be even and divisible by heads {heads}")
        self.modalities, self.dim, self.prediction = list(modalities), dim, prediction
        # z_t and the self-conditioning estimate enter side by side, hence 2 d_m.
        self.project_in = nn.ModuleDict({m.name: nn.Linear(2 * m.channels, dim) for m in modalities})
        self.project_out = nn.ModuleDict({m.name: nn.Linear(dim, m.channels) for m in modalities})
        # Temporal positions start as sinusoids of the segment's midpoint, so that segments of two modalities that
        # happen together start alike; spatial positions (one for audio) also tell the modalities apart. They start as
        # large as the temporal ones: at a tenth of that the model is slow to see where in the picture a token lies.
        self.time = nn.ParameterDict({m.name: nn.Parameter(sinusoid(1000 * m.midpoints, dim)) for m in modalities})
        self.space = nn.ParameterDict({m.name: nn.Parameter(0.5 * torch.randn(m.P, dim)) for m in modalities})
        self.embed = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.ada = nn.Linear(dim, 2 * dim)
        for m in modalities:
            nn.init.zeros_(self.project_out[m.name].weight)
            nn.init.zeros_(self.project_out[m.name].bias)

    def forward(self, z_t, t, z0_prev=None):
        """Dicts z_t (B, N_m, *grid, d_m), t (B, N_m), z0_prev like z_t or None (zeros) -> dict like z_t."""
        x, c = [], []
        for m in self.modalities:
            z = z_t[m.name]
            prev = torch.zeros_like(z) if z0_prev is None else z0_prev[m.name]
            z = torch.cat([z, prev], -1).reshape(len(z), m.N, m.P, 2 * m.channels)
            z = self.project_in[m.name](z) + self.time[m.name][:, None] + self.space[m.name]  # (B, N_m, P_m, d)
            x.append(z.flatten(1, 2))
            time = self.time[m.name].expand(len(z), -1, -1) + self.space[m.name].mean(0)
            c.append(torch.cat([sinusoid(t[m.name], self.dim), time], -1))  # (B, N_m, 2 d)
        x = torch.cat(x, 1)  # (B, L, d)
        c = self.embed(torch.cat(c, 1))  # (B, S, d): the embedding of the timestep vector
        for block in self.blocks:
            x = block(x, c, self.modalities)
        x = modulate(self.norm(x), *self.ada(c).chunk(2, -1), self.modalities)
        x = x.split([m.N * m.P for m in self.modalities], 1)
        return {m.name: self.project_out[m.name](x_m).reshape(-1, *m.shape) for m, x_m in zip(self.modalities, x)}


# ---------------------------------------------------------------------------------------
# Training [Sec. 3.1, Alg. 2]
# ---------------------------------------------------------------------------------------


def self_condition(z0_hat, z_t, t, z_max):
    """What the next pass is shown beside z_t: the estimate of z0, and the clean value only where t is 0 [App. B].

    The estimate at high noise divides by a tiny `a` under eps-prediction, so it is clamped to z_max[m], the largest
    |z| seen when the tokenizer was fitted (None: not clamped).
    """
    if z_max is not None:
        z0_hat = {m: z0_hat[m].clamp(-z_max[m], z_max[m]) for m in z0_hat}
    return {m: torch.where(per_segment(t[m], z_t[m]) == 0, z_t[m], z0_hat[m]) for m in z_t}


def predict(model, schedule, z_t, t, z0_prev=None):
    """One pass of the model, turned into dicts (z0_hat, eps_hat). A callable without .prediction predicts eps."""
    out = model(z_t, t, z0_prev)
    kind = getattr(model, "prediction", "eps")
    pairs = {m: schedule.estimates(z_t[m], t[m], out[m], kind) for m in z_t}
    return {m: z0 for m, (z0, _) in pairs.items()}, {m: eps for m, (_, eps) in pairs.items()}


def loss_weights(schedule, t, noise_power=0.0):
    """Weight of every segment in the loss, a dict (B, N_m) like t: s^noise_power, and 0 where it is given [Eq. 3].

    A power of 0 is Eq. 6; 1 cares less for the last faint noise and more for what only the other segments can tell.
    """
    return {m: torch.where(x > 0, schedule.s[x] ** noise_power, 0) for m, x in t.items()}


def training_loss(model, schedule, z0, t, eps, *, self_conditioning=False, z_max=None, noise_power=0.0, t_batch=None,
                  return_errors=False):  # fmt: skip
    """Lines 5 to 11 of Alg. 2 [Eq. 6]: mean squared error of the model's output over all elements with t > 0.

    z0, eps            dicts (B, N_m, *grid, d_m);  t: dict (B, N_m)
    self_conditioning  first run the model without gradient and feed its estimate; the caller tosses the coin, one a
                       step, true at rate 0.9 [App. B]
    noise_power        see loss_weights
    t_batch            where z0 is a part of a batch, the t of all of it: the parts' losses add up to the batch's
    return_errors      also return the mean squared error of every segment, a dict (B, N_m), without gradient
    """
    z_t = {m: schedule.add_noise(z0[m], eps[m], t[m]) for m in z0}
    z0_prev = None
    if self_conditioning:
        with torch.no_grad():
            z0_hat, _ = predict(model, schedule, z_t, t)
            z0_prev = self_condition(z0_hat, z_t, t, z_max)
    out = model(z_t, t, z0_prev)
    weights, all_weights = (loss_weights(schedule, x, noise_power) for x in (t, t_batch or t))
    total, count, errors = 0, 0, {}
    for m in z0:
        square = (out[m] - schedule.target(z0[m], eps[m], t[m], getattr(model, "prediction", "eps"))).square()
        errors[m] = square.detach().flatten(2).mean(-1)
        total = total + (per_segment(weights[m], square) * square).sum()
        count = count + all_weights[m].sum() * square[0, 0].numel()
    loss = total / count.clamp(min=1e-8)
    return (loss, errors) if return_errors else loss


# ---------------------------------------------------------------------------------------
# Tasks are masks [Sec. 3.3, Sec. 6.2]
# ---------------------------------------------------------------------------------------


def span_mask(modality, start, end):
    """(N_m,) bool: the segments wholly inside start..end seconds (to a microsecond)."""
    edges = torch.tensor(modality.edges, dtype=torch.float64)
    return (edges[:-1] >= start - 1e-6) & (edges[1:] <= end + 1e-6)


def task_mask(task, modalities):
    """Which segments a task gives: dict of bool (N_m,), True = given. ValueError names the valid tasks.

    "joint" gives nothing, "a2v" all audio, "v2a" all video, "continue" the first two segments of the time reference
    (5 frames, 0.625 s), "continue-2s" the first (1 frame, 0.125 s) [App. F], "inpaint" the first and the last.
    """
    e = modalities[0].edges
    if task in ("a2v", "v2a"):
        given = {"a2v": "audio", "v2a": "video"}[task]
        if given not in [m.name for m in modalities]:
            raise ValueError(f"task {task} needs a modality named {given}")
        return {m.name: torch.full((m.N,), m.name == given) for m in modalities}
    spans = {"joint": [], "continue": [e[:3]], "continue-2s": [e[:2]], "inpaint": [e[:2], e[-2:]]}
    if task not in spans:
        raise ValueError(f"unknown task {task!r}: use {', '.join(TASKS)}")
    none = {m.name: torch.zeros(m.N, dtype=torch.bool) for m in modalities}
    return {m.name: sum((span_mask(m, s[0], s[-1]) for s in spans[task]), none[m.name]) for m in modalities}


# ---------------------------------------------------------------------------------------
# Sampling [Sec. 3.3, Alg. 3, Alg. 4, App. E]
# ---------------------------------------------------------------------------------------


def ddpm_step(schedule, z, t, t_next, z0_hat, eps_hat, noise, last=None):
    """Line 5 of Alg. 3, line 7 of Alg. 4, from t to t_next <= t: every element steps down from its own t [Eq. 4]."""
    (a, s), (a_next, _) = schedule.scales(t, z), schedule.scales(t_next, z)
    # DIFFERS FROM PAPER: the factor in front is 1 / sqrt(alpha), Sec. 2 prints sqrt(alpha_bar); the noise's divisor is
    # sqrt(1 - alpha_bar), Alg. 3 and 4 print alpha. A respaced step's alpha is alpha_bar[t] / alpha_bar[t_next]; its
    # beta, 1 - alpha, would lose its digits at small t if it were subtracted in float32.
    log_alpha = (schedule.log_alpha_bar[:, t] - schedule.log_alpha_bar[:, t_next]).sum(0)
    beta = per_segment(-torch.expm1(log_alpha), z)
    mean = a_next / a * (z - beta / s.clamp(min=1e-8) * eps_hat)
    return mean + torch.where(per_segment(t_next, z) > 0, beta.sqrt() * noise, 0)  # sigma^2 = beta


def ddim_step(schedule, z, t, t_next, z0_hat, eps_hat, noise=None, last=None):
    """DDIM with eta = 0, the paper's sampler [App. B]: keep the estimated noise, lower its share."""
    a_next, s_next = schedule.scales(t_next, z)
    return a_next * z0_hat + s_next * eps_hat


def dpmpp_2m_step(schedule, z, t, t_next, z0_hat, eps_hat, noise=None, last=None):
    """DPM-Solver++(2M) [Lu et al. 2022]: DDIM from the estimate as it should be half a step later.

    `last`, the (t, z0_hat) of the step before or None, tells how it moves: in a straight line over log(a^2 / s^2), of
    every element from its own t. The first step, and the one to t = 0, which has no end there, are plain DDIM.
    """
    if last:
        t_last, z0_last = last
        before, now, after = (schedule.log_snr[x] for x in (t_last, t, t_next))
        ratio = torch.where(t_next > 0, (after - now) / (now - before) / 2, 0)  # half this step, in last steps
        change = per_segment(ratio, z) * (z0_hat - z0_last)
        a, s = schedule.scales(t, z)
        z0_hat, eps_hat = z0_hat + change, eps_hat - a / s.clamp(min=1e-8) * change  # still z = a z0_hat + s eps_hat
    return ddim_step(schedule, z, t, t_next, z0_hat, eps_hat)


def unconditional(z, t, z0_prev, dropped, noise, T):
    """The inputs (z, t, z0_prev) as they are without a condition: pure noise at t = T where `dropped` [App. E].

    DIFFERS FROM PAPER: [Eq. 15] noises the wanted part; by the prose and [Fig. 10] it is the GIVEN part. Its clean
    value is withheld from self-conditioning too, or the condition would leak.
    """
    t = {m: torch.where(dropped[m].flatten(1), T, t[m]) for m in z}
    z0_prev = z0_prev and {m: torch.where(dropped[m], 0, z0_prev[m]) for m in z}
    return {m: torch.where(dropped[m], noise[m], z[m]) for m in z}, t, z0_prev


def guide(model, schedule, cond, uncond, s):
    """Classifier-free guidance, on all channels [Eq. 13, Eq. 14, Eq. 16, Eq. 17]; z0 and eps are guided alike.

    cond, uncond: the inputs (z, t, z0_prev) of the two passes, which are one call of the model, of twice the batch.
    """
    both = [c and {m: torch.cat([c[m], u[m]]) for m in c} for c, u in zip(cond, uncond)]
    halves = [{m: x.chunk(2) for m, x in out.items()} for out in predict(model, schedule, *both)]
    return [{m: (1 + s) * c - s * u for m, (c, u) in out.items()} for out in halves]


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "dpmpp_2m": dpmpp_2m_step}
METHODS = ("monl", "replacement", "reconstruction")


@torch.no_grad()
def generate(model, schedule, z0, given, *, steps=250, sampler="ddim", guidance=0.0, guidance_drop=None,
             method="monl", strength=0.02, z_max=None, generator=None, on_step=None):  # fmt: skip
    """Generate the segments that are not given [Alg. 3, Alg. 4, Eq. 7] -> dict like z0.

    model          any callable (z_t, t, z0_prev) -> dict; without .prediction it predicts eps
    z0             dict (B, N_m, *grid, d_m): clean values where given; whatever lies elsewhere is never used
    given          dict of bool (N_m,) or (B, N_m); given segments come back bit-identical
    steps          K: t = round(linspace(T, 0, K + 1)); K = T is Alg. 3
    sampler        "ddim", "ddpm" or "dpmpp_2m", which needs few steps
    guidance       s of Eq. 16: (1 + s) cond - s uncond, 0 is none (others write w = 1 + s)
    guidance_drop  names of the modalities whose given part the unconditional pass noises (None: all) [Fig. 11]
    method         "monl" [Sec. 3.3], or what a model without MoNL needs: "replacement", "reconstruction" [App. C.2]
    strength       lambda of reconstruction guidance [Eq. 9]
    z_max          see self_condition
    on_step        on_step(i, steps) after step i = 1..steps: progress, an accelerator's step mark
    ValueError where an argument is none of these.
    """
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("method", method, METHODS)
    for m in guidance_drop or ():
        check_choice("modality to drop", m, z0)
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps is {steps}: use 1 to {schedule.T}")
    monl, reconstruct = method == "monl", method == "reconstruction"
    if guidance and not monl:
        raise ValueError(f"guidance tells the given part by its t = 0: use method monl, not {method}")
    device = next(iter(z0.values())).device
    fixed = {m: per_segment(given[m].to(device), z0[m]) for m in z0}  # bool (B, N_m, 1, ...)
    dropped = {m: fixed[m] & (guidance_drop is None or m in guidance_drop) for m in z0}
    guided = guidance and any(x.any() for x in dropped.values())  # away from nothing there is nothing to guide
    clean = {m: torch.where(fixed[m], z0[m], 0) for m in z0}

    def noise():  # drawn where the generator lives, so that every device sees the same
        kind = {"generator": generator, "device": generator.device if generator else device}
        return {m: torch.randn(z.shape, dtype=z.dtype, **kind).to(device) for m, z in z0.items()}

    def pick(mask, yes, no):
        return {m: torch.where(mask[m], yes[m], no[m]) for m in z0}

    def levels(tau):  # the timestep vector: tau on all that is wanted, 0 on what MoNL is given [Eq. 7]
        return {m: torch.where(fixed[m] & monl, 0, tau).flatten(1) for m in z0}  # (B, N_m)

    def truth(t):  # the given part as the model sees it: clean at t = 0, or noised to the level of the rest
        return clean if monl else {m: schedule.add_noise(clean[m], eps, t[m]) for m, eps in noise().items()}

    taus = torch.linspace(schedule.T, 0, steps + 1).round().long().tolist()
    taus = [torch.tensor(tau, device=device) for tau in taus]  # tensors: Python numbers would recompile an XLA graph
    step, z, z0_prev, last = SAMPLERS[sampler], noise(), None, dict.fromkeys(z0)  # line 1 of Alg. 3 and 4
    shown = truth(levels(taus[0]))
    for i in range(steps):
        # DIFFERS FROM PAPER: Alg. 3 and 4 print t = tau I where every entry of the vector equals tau.
        t, t_next = levels(taus[i]), levels(taus[i + 1])
        z = pick(fixed, shown, z)
        fresh = noise() if sampler == "ddpm" else dict.fromkeys(z0)
        with torch.set_grad_enabled(reconstruct):
            z = {m: z[m].requires_grad_(reconstruct) for m in z0}
            inputs = z, t, z0_prev
            if guided:
                free = unconditional(*inputs, dropped, noise(), schedule.T)
                z0_hat, eps_hat = guide(model, schedule, inputs, free, guidance)
            else:
                z0_hat, eps_hat = predict(model, schedule, *inputs)
            # [Eq. 4, Eq. 7, Eq. 8, Eq. 10]: one step down, of every element from its own t
            z_next = {m: step(schedule, z[m], t[m], t_next[m], z0_hat[m], eps_hat[m], fresh[m], last[m]) for m in z0}
        shown = truth(t_next)
        if reconstruct:  # [Eq. 9, Eq. 11, Eq. 12]: move the wanted part so that the given part comes out true
            with torch.enable_grad():
                error = sum(torch.where(fixed[m], z_next[m] - shown[m], 0).square().sum() for m in z0)
            # DIFFERS FROM PAPER: the gradient is taken in the step's input; in its output, as printed, it is zero.
            grad = dict(zip(z0, torch.autograd.grad(error, list(z.values()))))
            z_next = {m: z_next[m] - strength * schedule.scales(t_next[m], z[m])[1] * grad[m] for m in z0}
        z0_prev = self_condition(z0_hat, z, t, z_max)
        z, last = z_next, {m: (t[m], z0_hat[m].detach()) for m in z0}
        if on_step:
            on_step(i + 1, steps)
    return pick(fixed, z0, z)


# ---------------------------------------------------------------------------------------
# Presets [App. B] and the tour
# ---------------------------------------------------------------------------------------


def av_modalities(fps, grid, video_channels, segment, audio_channels, frames=17):
    """Video of 1 + 4 k frames, a segment for the first and one for every 4 later; sound in segments of `segment` s."""
    if frames % 4 != 1:  # a causal video tokenizer would drop the rest without a word
        fewer = frames - (frames - 1) % 4
        raise ValueError(f"{frames} frames are not 1 + 4 k: use {fewer} or {fewer + 4}")
    starts = (0, *range(1, frames + 1, 4))
    count = int(frames / fps / segment + 1e-6)
    return [
        Modality("video", grid, video_channels, tuple(start / fps for start in starts)),
        Modality("audio", (), audio_channels, tuple(n * segment for n in range(count + 1))),
    ]


@dataclass(frozen=True)
class Preset:
    modalities: list
    dim: int
    depth: int
    heads: int
    prediction: str
    batch: int
    steps: int
    optimizer: str
    lr: float
    warmup: int
    ema: float  # decay of the averaged weights that are sampled from
    noise_power: float  # see training_loss
    sampler: str
    sampling_steps: int

    def model(self, modalities=None, prediction=None):
        """The network at this preset's size, for its own modalities or for others."""
        return AVDiT(modalities or self.modalities, self.dim, self.depth, self.heads, prediction or self.prediction)


PRESETS = {
    # The toy world of data.py: four minutes on two CPU cores. With eps its two modalities stay strangers, hence v.
    "toy": Preset(av_modalities(8, (2, 2), 64, 0.125, 64), dim=128, depth=4, heads=4, prediction="v",
                  batch=64, steps=1900, optimizer="muon", lr=6e-3, warmup=100, ema=0.995, noise_power=1,
                  sampler="dpmpp_2m", sampling_steps=20),
    # App. B: 17 frames of 128 x 128 at 8 fps through MAGVIT-v2, 16 kHz sound through SoundStream (20 ms a segment).
    "paper": Preset(av_modalities(8, (16, 16), 8, 0.02, 1024), dim=1024, depth=24, heads=16, prediction="eps",
                    batch=256, steps=400_000, optimizer="adamw", lr=5e-4, warmup=5000, ema=0.9999, noise_power=0,
                    sampler="ddim", sampling_steps=250),
}  # fmt: skip


def tour():
    """Print the strategies as pictures, the presets, and where each equation lives in this file."""
    modalities, shades = PRESETS["toy"].modalities, " .:-=+*#%@"
    print("The timestep vector of one example, one character a segment, from ' ' (t near 0) to '@' (t near T):\n")
    for strategy in STRATEGIES:
        t = sample_timesteps(strategy, modalities, 1, 1000, torch.Generator().manual_seed(3))
        for m in modalities:  # each segment as wide as it lasts
            width = [round((b - a) * 32) for a, b in zip(m.edges, m.edges[1:])]
            row = "".join(shades[(x - 1) // 100] * w for x, w in zip(t[m.name][0].tolist(), width))
            print(f"  {strategy:8} {m.name:6} |{row}|")
        print()
    for name, preset in PRESETS.items():
        with torch.device("meta"):  # shapes alone, no memory
            count = sum(p.numel() for p in preset.model().parameters())
        shapes = ", ".join(f"{m.name} {m.shape}" for m in preset.modalities)
        print(f"preset {name}: {count / 1e6:.1f} M parameters, {preset.depth} layers, d = {preset.dim}, {shapes}")
    print(f"\n  {'where in the paper':30} {'function':20} line")
    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    scopes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    for number, line in enumerate(source.splitlines(), 1):
        around = [n for n in scopes if n.lineno <= number <= n.end_lineno]
        for tag in re.findall(r"\[((?:Eq|Alg|Sec|App|Fig)\. [^]]+)\]", line):
            name = max(around, key=lambda n: n.lineno).name if around else "-"
            print(f"  {tag:30} {name:20} {number}")


if __name__ == "__main__":
    tour()
