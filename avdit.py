"""AVDiT: one diffusion transformer for video and audio whose timestep is a vector.

The method of "A Versatile Diffusion Transformer with Mixture of Noise Levels for Audiovisual Generation". A tag such as
[Eq. 5] stands beside the line that does it; DIFFERS FROM PAPER marks a line whose printed formula has a slip.

Letters, the same in comments, code and tests
    B      batch                             M      modalities (video, audio, ...)
    N_m    time-segments of modality m       S      time-segments of all modalities, sum of N_m
    P_m    tokens of one segment of m        L      tokens of all modalities, sum of N_m P_m
    d_m    latent channels of m              E      numbers in the latents of one clip, sum of N_m P_m d_m
    T      diffusion steps                   d      width of the transformer
    z      latents, (B, E)                   t      timestep vector, int64 (B, S), 0 = clean, T = noise
    a, s   sqrt(alpha_bar) and sqrt(1 - alpha_bar): how much signal and how much noise z_t holds
    tau    the one timestep that all segments to be generated share
z holds a clip's latents modality by modality, segment by segment; a Layout knows what lies where.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class Modality:
    """One kind of latent: (N, *grid, channels) numbers a clip [Sec. 3.1]."""

    name: str
    grid: tuple  # tokens of one segment: (h, w) for video, () for audio
    channels: int  # d_m
    edges: tuple  # N + 1 times in seconds; segment n covers edges[n]..edges[n + 1]

    @property
    def N(self):
        return len(self.edges) - 1

    @property
    def P(self):
        return math.prod(self.grid)

    @property
    def shape(self):
        return (self.N, *self.grid, self.channels)


class Layout:
    """Where everything lies in z, (B, E), and in t, (B, S).

    The first modality is the time reference: strategy Pt draws one timestep for each of its segments, and a segment of
    another modality takes the timestep of the one it coincides with.
    """

    def __init__(self, modalities):
        self.modalities = tuple(modalities)
        self.names = [m.name for m in self.modalities]
        self.lengths = [m.N for m in self.modalities]
        self.tokens = [m.N * m.P for m in self.modalities]
        self.S, self.E = sum(self.lengths), sum(math.prod(m.shape) for m in self.modalities)
        edges = [torch.tensor(m.edges, dtype=torch.float64) for m in self.modalities]
        self.starts = torch.cat([e[:-1] for e in edges])  # (S,) seconds
        self.ends = torch.cat([e[1:] for e in edges])
        offsets = accumulate([0, *self.lengths])
        self.first = torch.cat([torch.full((n,), k) for n, k in zip(self.lengths, offsets)])  # (S,) of its modality
        self.segment = self.per_element(torch.arange(self.S))  # (E,) which segment an element belongs to
        self.sizes = self.segment.bincount()  # (S,) elements of each segment

    def per_element(self, x):
        """(..., S) -> (..., E), x[..., segment], but faster, and with no index to keep on x's device."""
        parts = zip(self.modalities, x.split(self.lengths, -1))
        return torch.cat([part.repeat_interleave(m.P * m.channels, -1) for m, part in parts], -1)

    def per_segment(self, x):
        """(B, E) -> (B, S): the mean over each segment's elements."""
        return torch.cat([part.flatten(2).mean(-1) for part in self.unpack(x).values()], -1)

    def pack(self, latents):
        """Dict of (B, N_m, *grid, d_m) -> z (B, E)."""
        return torch.cat([latents[name].flatten(1) for name in self.names], -1)

    def unpack(self, z):
        """z (B, E) -> dict of (B, N_m, *grid, d_m)."""
        parts = zip(self.modalities, z.split([math.prod(m.shape) for m in self.modalities], -1))
        return {m.name: part.unflatten(-1, m.shape) for m, part in parts}

    def split(self, x):
        """(..., S) -> dict of (..., N_m)."""
        return dict(zip(self.names, x.split(self.lengths, -1)))

    def of(self, names):
        """(S,) bool: the segments of the named modalities. ValueError where there is no such modality."""
        for name in names:
            check_choice("modality", name, self.names)
        return torch.cat([torch.full((m.N,), m.name in names) for m in self.modalities])

    def within(self, start, end):
        """(S,) bool: the segments that lie wholly inside start..end seconds, to a microsecond."""
        return (self.starts >= start - 1e-6) & (self.ends <= end + 1e-6)


def check_choice(what, value, valid):
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}: use {', '.join(valid)}")


# --- Noise levels [Sec. 2, App. B] ----------------------------------------------------------------------------------


class NoiseSchedule(nn.Module):
    """Linear beta schedule [App. B]; its ends, which the paper does not give, are DDPM's. Tables are (T + 1,), entry 0
    is no noise at all. The product runs in float64: in float32 1 - alpha_bar would lose its digits at small t."""

    def __init__(self, T=1000, beta_min=1e-4, beta_max=0.02):
        super().__init__()
        self.T = T
        beta = torch.linspace(beta_min, beta_max, T, dtype=torch.float64)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
        self.register_buffer("alpha_bar", alpha_bar.float())
        self.register_buffer("a", alpha_bar.sqrt().float())
        self.register_buffer("s", (1 - alpha_bar).sqrt().float())
        log = alpha_bar.log()  # as a sum of two float32: the difference of two logarithms, a step's, needs the digits
        self.register_buffer("log_alpha_bar", torch.stack([log.float(), (log - log.float()).float()]))
        self.register_buffer("log_snr", (log - (1 - alpha_bar).log()).float())

    def scales(self, layout, t):
        """t (B, S) -> a, s of every element, (B, E) each."""
        return layout.per_element(self.a[t]), layout.per_element(self.s[t])


# --- Tasks are masks [Sec. 3.3, Sec. 6.2] ---------------------------------------------------------------------------

TASKS = ("joint", "a2v", "v2a", "inpaint", "continue", "continue-2s")


def task_mask(task, layout):
    """Which segments a task gives: bool (S,), True = given. ValueError names the valid tasks.

    "continue" gives the first two segments of the time reference (5 frames, 0.625 s) and what lies in their time,
    "continue-2s" the first (1 frame, 0.125 s) [App. F], "inpaint" the first and the last.
    """
    check_choice("task", task, TASKS)
    edges = layout.modalities[0].edges
    if task == "joint":
        return torch.zeros(layout.S, dtype=torch.bool)
    if task in ("a2v", "v2a"):
        return layout.of(["audio"] if task == "a2v" else ["video"])
    if task == "inpaint":
        return layout.within(*edges[:2]) | layout.within(*edges[-2:])
    return layout.within(edges[0], edges[1] if task == "continue-2s" else edges[:3][-1])  # [:3]: there may be one only


# --- The timestep vector [Sec. 3.1, Sec. 3.2, Alg. 1] ---------------------------------------------------------------


def coincident(layout):
    """(S,) the time reference's segment that contains each one's midpoint, or its last [Sec. 3.1, footnote 4]."""
    boundaries = layout.starts[1 : layout.lengths[0]]
    return torch.bucketize((layout.starts + layout.ends) / 2, boundaries, right=True)


# name -> function of t_ref (B, S) and the layout: the timestep vectors (B, S) [Alg. 1, lines 6 to 17]
STRATEGIES = {
    "vanilla": lambda t_ref, layout: t_ref[:, :1].expand_as(t_ref),  # t^(m,n) = t_ref^(1,1)
    "pm": lambda t_ref, layout: t_ref[:, layout.first],  # t_ref^(m,1)
    "pt": lambda t_ref, layout: t_ref[:, coincident(layout)],  # t_ref^(1,n), n by time
    "ptm": lambda t_ref, layout: t_ref,  # t_ref^(m,n)
}
MONL = ("vanilla", "pt", "pm", "ptm")
for task in TASKS:  # Table 1's conditional models [Eq. 3]: t = 0 on what the task gives, one t on the rest
    STRATEGIES[f"task:{task}"] = lambda t_ref, layout, task=task: torch.where(task_mask(task, layout), 0, t_ref[:, :1])


def parse_mixture(mixture):
    """ "pt+pm+pm" -> ["pt", "pm", "pm"]; "monl" stands for its four strategies. ValueError names what is valid."""
    names = []
    for name in mixture.replace(" ", "").split("+"):
        check_choice("strategy", name, ("monl", *STRATEGIES))
        names += MONL if name == "monl" else (name,)
    return names


def sample_timesteps(mixture, layout, batch, T, generator=None):
    """Draw a timestep vector for every example [Alg. 1]: int64 (B, S), in 1..T.

    mixture  "monl", a name in STRATEGIES, or a sum of names, in which a term counts as often as it is named
    """
    names = parse_mixture(mixture)
    t_ref = torch.randint(1, T + 1, (batch, layout.S), generator=generator)  # line 4
    # Line 3, once per example and not once per batch, since Alg. 1 is called for one z_0.
    choice = torch.randint(len(names), (batch,), generator=generator)
    drawn = torch.stack([STRATEGIES[name](t_ref, layout) for name in names])  # (strategies, B, S)
    return drawn[choice, torch.arange(batch)]


# --- The network [Sec. 4, Fig. 5] -----------------------------------------------------------------------------------


def sinusoid(x, dim):
    """x (...,) -> (..., dim): cosines and sines of x with periods from 2 pi to 2 pi 10000."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x[..., None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulate(x, affine, layout):
    """AdaLN: shift and scale tokens x (B, L, d) by `affine`, (B, S, 2 d), of which no copy per token is made."""
    parts = []
    for m, x_m, affine_m in zip(layout.modalities, x.split(layout.tokens, 1), affine.split(layout.lengths, 1)):
        shift, scale = affine_m[:, :, None].chunk(2, -1)  # (B, N_m, 1, d)
        parts.append((x_m.unflatten(1, (m.N, m.P)) * (1 + scale) + shift).flatten(1, 2))
    return torch.cat(parts, 1)


def attention(q, k, v):
    """(B, heads, L, d / heads) each. PyTorch's bf16 kernel for CPUs is slow on few tokens: there float32 is used."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < 512:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return F.scaled_dot_product_attention(q, k, v)


class Block(nn.Module):
    """Transformer layer with AdaLN: each segment's shift and scale come from its own timestep [Sec. 4]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        # Two (shift, scale) pairs and no gates: the paper names none, and has 420 M parameters. With gates the blocks
        # alone would have 453 M.
        self.ada = nn.Linear(dim, 4 * dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)  # a bias on keys would have exactly zero gradient
        self.attend = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for last in (self.attend, self.mlp[-1]):  # each residual branch starts at zero, as gates would make it
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x, cond, layout):
        # x (B, L, d) tokens; cond (B, S, d) the embedding of the timestep vector
        first, second = self.ada(cond).chunk(2, -1)  # a shift and a scale each
        y = modulate(self.norm(x), first, layout)
        q, k, v = rearrange(self.qkv(y), "b l (three h e) -> three b h l e", three=3, h=self.heads)
        y = attention(q, k, v)  # every token sees all tokens of all modalities
        x = x + self.attend(rearrange(y, "b h l e -> b l (h e)"))
        return x + self.mlp(modulate(self.norm(x), second, layout))


class AVDiT(nn.Module):
    """The joint noise prediction network [Sec. 4]; `prediction` is what it regresses, one of PREDICTIONS, and attention
    starts within `reach` ms, 0: anywhere; `peak` is for ask(). ValueError if prediction is none of them, and unless dim
    is even and divisible by heads."""

    def __init__(self, layout, dim, depth, heads, prediction="eps", reach=0, peak=0):
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS)
        if dim % heads or dim % 2:
            raise ValueError(f"dim {dim} must be even and divisible by heads {heads}")
        self.layout, self.dim, self.prediction, self.peak = layout, dim, prediction, peak
        modalities = layout.modalities
        # z_t and the self-conditioning estimate enter side by side, hence 2 d_m.
        self.project_in = nn.ModuleDict({m.name: nn.Linear(2 * m.channels, dim) for m in modalities})
        self.project_out = nn.ModuleDict({m.name: nn.Linear(dim, m.channels) for m in modalities})
        # Positions in time start as sinusoids of the midpoint, so that segments of two modalities that coincide start
        # alike. In milliseconds, because the sinusoid's periods suit numbers up to some thousands, such as t.
        middle = layout.split(1000 * (layout.starts + layout.ends) / 2)
        self.time = nn.ParameterDict({name: nn.Parameter(sinusoid(x, dim)) for name, x in middle.items()})
        # Positions in space tell the modalities apart too. They start about as large as those in time: at a tenth of it
        # the model is slow to learn where in the picture a token lies.
        self.space = nn.ParameterDict({m.name: nn.Parameter(0.5 * torch.randn(m.P, dim)) for m in modalities})
        self.embed = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        # With reach, queries start as the keys of tokens up to so many ms away, in every head another way: from random
        # ones it takes longer to find which sound moved a mouth. A rotation moves a sinusoid in time.
        if reach:
            away = reach * (2 * (torch.arange(heads) + 0.5) / heads - 1)
            cos, sin = sinusoid(away, dim)[:, None].chunk(2, -1)  # (heads, 1, d / 2)
            for block in self.blocks:
                query, key, _ = block.qkv.weight.data.view(3, heads, dim // heads, dim)
                x, y = key.chunk(2, -1)
                query.copy_(2 * torch.cat([x * cos + y * sin, y * cos - x * sin], -1))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.ada = nn.Linear(dim, 2 * dim)
        self.register_buffer("z_max", torch.full((layout.E,), math.inf))  # bound of the self-conditioning estimate
        for project in self.project_out.values():
            nn.init.zeros_(project.weight)
            nn.init.zeros_(project.bias)

    def forward(self, z, t, z0_prev=None):
        """z_t (B, E), t (B, S), the last estimate of z0 (B, E) or None for none -> prediction (B, E)."""
        z0_prev = torch.zeros_like(z) if z0_prev is None else z0_prev
        clean = self.layout.per_element(t == 0)  # what is given is shown as it is, an estimate within its bound
        z0_prev = torch.where(clean, z0_prev, z0_prev.clamp(-self.z_max, self.z_max))
        z, z0_prev = self.layout.unpack(z), self.layout.unpack(z0_prev)
        x, places = [], []
        for m in self.layout.modalities:
            both = torch.cat([z[m.name], z0_prev[m.name]], -1).reshape(-1, m.N, m.P, 2 * m.channels)
            x_m = self.project_in[m.name](both) + self.time[m.name][:, None] + self.space[m.name]  # (B, N_m, P_m, d)
            x.append(x_m.flatten(1, 2))
            places.append(self.time[m.name] + self.space[m.name].mean(0))  # (N_m, d)
        x = torch.cat(x, 1)  # (B, L, d)
        # The embedding of the timestep vector: Sec. 4 makes it from timesteps and positions, so that a layer can treat
        # the same noise level differently in different segments and modalities.
        places = torch.cat(places).expand(len(t), -1, -1)
        cond = self.embed(torch.cat([sinusoid(t, self.dim), places], -1))  # (B, S, d)
        for block in self.blocks:
            x = block(x, cond, self.layout)
        x = modulate(self.norm(x), self.ada(cond), self.layout).split(self.layout.tokens, 1)
        return torch.cat([self.project_out[name](x_m).flatten(1) for name, x_m in zip(self.layout.names, x)], 1)


# What a network may regress: the noise [Eq. 6]; v = a eps - s z0, as W.A.L.T does; or the clean latents. Any of them and
# z_t = a z0 + s eps give the others.
PREDICTIONS = ("eps", "v", "z0")


def ask(model, schedule, layout, z, t, z0_prev=None):
    """Call the model -> its prediction (B, E), and which one it is.

    One that regresses z0 and has a `peak` is shown z_t by a factor that falls to 0 with the signal in it: at t = T what
    is given must tell all, and noise would leak into the estimate. It is the root of the Wiener filter of a component
    with `peak` times the mean variance, a^2 / (a^2 + s^2 / peak).
    """
    prediction, peak = getattr(model, "prediction", "eps"), getattr(model, "peak", 0)
    if prediction == "z0" and peak:
        a, s = schedule.scales(layout, t)
        z = z * a / (a**2 + s**2 / peak).sqrt()
    return model(z, t, z0_prev), prediction


def predict(model, schedule, layout, z, t, z0_prev=None):
    """Turn the model's prediction into estimates of (z0, eps), (B, E) each. At t = 0, z0 is z itself."""
    out, prediction = ask(model, schedule, layout, z, t, z0_prev)
    a, s = schedule.scales(layout, t)
    if prediction == "eps":
        return (z - s * out) / a, out
    if prediction == "v":
        return a * z - s * out, s * z + a * out
    z0_hat = torch.where(s > 0, out, z)
    return z0_hat, (z - a * z0_hat) / s.clamp(min=1e-3)  # where s > 0 it is at least 0.01


# --- Training [Sec. 3.1, Alg. 2] ------------------------------------------------------------------------------------


def loss_weights(schedule, layout, t, noise_power=0.0):
    """Weight of each segment's mean squared error in the loss, (B, S): in all 1, and 0 where t = 0.

    Elements weigh s^noise_power. 0 is [Eq. 6], all alike; with 1 those at low noise, whose error is detail, count less.
    """
    weight = torch.where(t > 0, schedule.s[t] ** noise_power, 0) * layout.sizes.to(t.device)
    return weight / weight.sum().clamp(min=1e-8)


def training_loss(model, schedule, layout, z0, t, eps, weight=None, self_conditioning=False):
    """Lines 5 to 11 of [Alg. 2]: z0, eps (B, E), t (B, S) -> the loss [Eq. 6]; squared errors (B, S) without gradient.
    One t for all segments is [Eq. 1, Eq. 2], a mixture task:NAME [Eq. 3].

    weight             (B, S) of loss_weights (None: as in Eq. 6). For a part of a batch, its rows of the whole batch's:
                       then the losses of the parts add up to the batch's.
    self_conditioning  call the model once without gradient and show it its own estimate; the caller tosses the coin,
                       one a step, at rate 0.9 [App. B]
    """
    a, s = schedule.scales(layout, t)
    z_t = a * z0 + s * eps  # [Eq. 5]
    z0_prev = None
    if self_conditioning:
        with torch.no_grad():
            z0_prev, _ = predict(model, schedule, layout, z_t, t)  # where t = 0, z_t itself
    out, prediction = ask(model, schedule, layout, z_t, t, z0_prev)
    target = {"eps": eps, "v": a * eps - s * z0, "z0": z0}[prediction]
    # An error e in z0 is one of e / s in v, and counts as that. But at low noise all of the loss would be z_t's faintest
    # details, hence a bound; it is close to Min-SNR's with gamma = 5 [Hang et al. 2023].
    unit = s.clamp(min=0.4) if prediction == "z0" else 1
    errors = layout.per_segment(((out - target) / unit).square())
    weight = loss_weights(schedule, layout, t) if weight is None else weight
    return (weight * errors).sum(), errors.detach()


# --- Samplers [Alg. 3, Alg. 4, App. B] ----------------------------------------------------------------------------
# One step down, from t to t_next (B, S): every segment from its own level to its own [Eq. 4], and where both are 0 it
# stays. z and the estimates are (B, E); `last` is (t, z0_hat) of the step before, None in the first.


def noise_like(z, generator):
    """Standard normal noise, drawn where the generator lives, so that the same seed gives the same on every device."""
    device = generator.device if generator else z.device
    return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=device).to(z.device)


def ddpm_step(schedule, layout, z, t, t_next, z0_hat, eps_hat, last, generator):
    """Line 5 of [Alg. 3], line 7 of [Alg. 4], with sigma^2 = beta. alpha is that of a step from t to t_next.

    DIFFERS FROM PAPER: Sec. 2 prints the factor sqrt(alpha) in mu, the algorithms 1 / sqrt(alpha), which is right.
    Alg. 3 prints alpha_bar_t where its index is tau.
    """
    (a, s), (a_next, _) = schedule.scales(layout, t), schedule.scales(layout, t_next)
    log_alpha = (schedule.log_alpha_bar[:, t] - schedule.log_alpha_bar[:, t_next]).sum(0)
    beta = layout.per_element(-torch.expm1(log_alpha))  # 1 - alpha, without losing digits where alpha is close to 1
    mean = a_next / a * (z - beta / s.clamp(min=1e-8) * eps_hat)
    return mean + torch.where(layout.per_element(t_next) > 0, beta.sqrt() * noise_like(z, generator), 0)


def ddim_step(schedule, layout, z, t, t_next, z0_hat, eps_hat, last, generator):
    """DDIM with eta = 0, the paper's sampler [App. B]: mix the two estimates again, at the next level."""
    a_next, s_next = schedule.scales(layout, t_next)
    return a_next * z0_hat + s_next * eps_hat


def dpmpp_2m_step(schedule, layout, z, t, t_next, z0_hat, eps_hat, last, generator):
    """DPM-Solver++(2M) [Lu et al. 2022]: DDIM with z0_hat extrapolated half a step ahead.

    The extrapolation is linear in the log of the signal-to-noise ratio, through the last z0_hat and this one. The first
    step, and the one to t = 0, where that logarithm is infinite, are plain DDIM.
    """
    if last:
        t_last, z0_last = last
        before, now, after = (schedule.log_snr[x] for x in (t_last, t, t_next))
        ratio = torch.where(t_next > 0, (after - now) / (now - before) / 2, 0)  # half this step over the last one
        change = layout.per_element(ratio) * (z0_hat - z0_last)
        a, s = schedule.scales(layout, t)
        z0_hat, eps_hat = z0_hat + change, eps_hat - a / s.clamp(min=1e-8) * change  # z = a z0_hat + s eps_hat again
    return ddim_step(schedule, layout, z, t, t_next, z0_hat, eps_hat, last, generator)


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "dpmpp_2m": dpmpp_2m_step}


# --- Sampling [Sec. 3.3, Alg. 3, Alg. 4], guidance for free [App. E] ------------------------------------------------


def respaced(schedule, steps, device):
    """The timesteps of K = `steps` steps, round(linspace(T, 0, K + 1)); K = T is Alg. 3's own. ValueError if too many.

    As a list of tensors: Python numbers would make a new XLA program of every step.
    """
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps is {steps}: use 1 to {schedule.T}")
    taus = torch.linspace(schedule.T, 0, steps + 1, dtype=torch.float64).round().long()
    return [torch.tensor(tau, device=device) for tau in taus.tolist()]


def guide(model, schedule, layout, z, t, z0_prev, dropped, guidance, generator):
    """Classifier-free guidance for free: predict() with and without the `dropped` segments, (B, S), extrapolated.

    Without a segment means: pure noise in its place, at t = T [App. E, Fig. 10, Fig. 11]; its clean value is also
    withheld from self-conditioning. Both passes are one call of the model, of twice the batch.

    DIFFERS FROM PAPER: [Eq. 15] prints noise for the wanted part; by the prose and Fig. 10 it is the GIVEN part.
    """
    gone = layout.per_element(dropped)
    z = torch.cat([z, torch.where(gone, noise_like(z, generator), z)])
    t = torch.cat([t, torch.where(dropped, schedule.T, t)])
    z0_prev = torch.cat([z0_prev, torch.where(gone, 0, z0_prev)])
    halves = [x.chunk(2) for x in predict(model, schedule, layout, z, t, z0_prev)]
    return [(1 + guidance) * cond - guidance * uncond for cond, uncond in halves]  # [Eq. 13, Eq. 14, Eq. 16, Eq. 17]


@torch.no_grad()
def generate(model, schedule, layout, z0, given, *, steps=250, sampler="ddim", guidance=0.0, guidance_drop=None,
             generator=None, on_step=None):  # fmt: skip
    """Generate the segments that are not given [Alg. 3, Alg. 4, Eq. 7] -> (B, E).

    model          any callable like AVDiT, (z, t, z0_prev) -> (B, E); without .prediction it predicts eps
    z0             (B, E): clean values where given; the rest is never used
    given          bool (S,) or (B, S); given segments come back bit-identical
    sampler        a name in SAMPLERS; dpmpp_2m needs few steps
    guidance       Eq. 16's s, (1 + s) cond - s uncond: 0 is none. Others write w = 1 + s.
    guidance_drop  names of the modalities that the unconditional pass does without, None: all that is given
    on_step        on_step(i, steps) after step i = 1..steps: for progress, and for an accelerator's step mark
    ValueError where an argument is none of these.
    """
    check_choice("sampler", sampler, SAMPLERS)
    taus = respaced(schedule, steps, z0.device)
    given = given.to(z0.device, torch.bool).expand(len(z0), -1)  # (B, S)
    held = layout.per_element(given)  # (B, E)
    dropped = given & layout.of(layout.names if guidance_drop is None else guidance_drop).to(z0.device)
    guided = guidance and dropped.any()
    z, z0_prev, last = noise_like(z0, generator), torch.zeros_like(z0), None  # line 1
    for i, (tau, tau_next) in enumerate(pairwise(taus)):  # line 3
        # DIFFERS FROM PAPER: t = tau I in line 4 of Alg. 3 and line 5 of Alg. 4 means that these entries equal tau;
        # (m_c + 1 : M, N) in line 6 means all N segments.
        t, t_next = torch.where(given, 0, tau), torch.where(given, 0, tau_next)  # lines 2 and 5
        z = torch.where(held, z0, z)  # line 6's [z_0, z_tau]
        if guided:
            z0_hat, eps_hat = guide(model, schedule, layout, z, t, z0_prev, dropped, guidance, generator)
        else:
            z0_hat, eps_hat = predict(model, schedule, layout, z, t, z0_prev)  # line 6
        z = SAMPLERS[sampler](schedule, layout, z, t, t_next, z0_hat, eps_hat, last, generator)  # lines 4, 7
        z0_prev, last = torch.where(held, z0, z0_hat), (t, z0_hat)
        if on_step:
            on_step(i + 1, steps)
    return torch.where(held, z0, z)


# --- The baselines [App. C.2]: what a model must do that was never shown a timestep vector --------------------------


@torch.inference_mode(False)  # which would forbid the gradient
@torch.no_grad()
def generate_baseline(model, schedule, layout, z0, given, *, strength=0.0, steps=250, sampler="ddim",
                      generator=None, on_step=None):  # fmt: skip
    """As generate(), but with one t for all segments: before each step the given part is replaced by noised truth.

    strength  lambda of reconstruction guidance [Eq. 8, Eq. 9, Eq. 10, Eq. 11, Eq. 12], 0.02 in the paper: after a step
              the wanted part also moves against the gradient of the step's squared error in the given part. 0: none

    DIFFERS FROM PAPER: the norm in [Eq. 9] is squared, as in [Eq. 11, Eq. 12]. The gradient is taken in the step's
    input; in one output of the step, as printed, an error in the other output has none. The given part enters [Eq. 10]
    noised, as it does [Eq. 8].
    """
    check_choice("sampler", sampler, SAMPLERS)
    taus = respaced(schedule, steps, z0.device)
    given = given.to(z0.device, torch.bool).expand(len(z0), -1)  # (B, S)
    z0, given = z0.clone(), given.clone()  # those of an inference mode have no part in gradients either
    held = layout.per_element(given)
    clean = torch.where(held, z0, 0)
    z, z0_prev, last = noise_like(z0, generator), torch.zeros_like(z0), None
    a, s = schedule.scales(layout, taus[0].expand_as(given))
    truth = a * clean + s * noise_like(z, generator)
    for i, (tau, tau_next) in enumerate(pairwise(taus)):
        t, t_next = tau.expand_as(given), tau_next.expand_as(given)
        with torch.set_grad_enabled(strength > 0):
            z = torch.where(held, truth, z).requires_grad_(strength > 0)
            z0_hat, eps_hat = predict(model, schedule, layout, z, t, z0_prev)
            z_next = SAMPLERS[sampler](schedule, layout, z, t, t_next, z0_hat, eps_hat, last, generator)
            a, s = schedule.scales(layout, t_next)
            truth = a * clean + s * noise_like(z, generator)
            if strength:
                error = torch.where(held, z_next - truth, 0).square().sum()
                z_next = z_next - strength * s * torch.autograd.grad(error, z)[0]
        z, z0_prev, last = z_next.detach(), z0_hat.detach(), (t, z0_hat.detach())
        if on_step:
            on_step(i + 1, steps)
    return torch.where(held, z0, z)


# --- Presets [App. B] -----------------------------------------------------------------------------------------------


def av_modalities(fps, grid, video_channels, segment, audio_channels, frames=17):
    """Video of 1 + 4 k frames, one segment for the first and one for every 4 later; sound, `segment` seconds each."""
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
    reach: float  # see AVDiT
    peak: float  # see ask
    mixture: str
    batch: int
    steps: int
    optimizer: str
    lr: float
    warmup: int
    ema: float  # decay of the averaged weights that are sampled from
    noise_power: float  # see loss_weights
    sampler: str
    sampling_steps: int

    def model(self, layout, prediction=None):
        """The network at this preset's size, for its own modalities or for others."""
        return AVDiT(layout, self.dim, self.depth, self.heads, prediction or self.prediction, self.reach, self.peak)


PRESETS = {
    # The toy world of data.py: eight minutes on two CPU cores. Here eps leaves the two modalities unrelated, and v,
    # much of it noise, blurs the ball where a token has as many channels as the network is wide. Hence z0.
    "toy": Preset(av_modalities(8, (2, 2), 128, 0.125, 64), dim=128, depth=4, heads=4, prediction="z0", reach=0,
                  peak=0, mixture="monl", batch=64, steps=3800, optimizer="muon", lr=4e-3, warmup=100, ema=0.995,
                  noise_power=1, sampler="ddpm", sampling_steps=40),
    # Some hundreds of real clips as data.py cuts them, 64 x 64 pixels. That a mouth moves with the sound is learned
    # where the picture is noise and the sound is not, hence more of that. The largest component of these latents has
    # about 20 times the mean variance.
    "clips": Preset(av_modalities(8, (2, 2), 192, 0.125, 96), dim=256, depth=4, heads=4, prediction="z0", reach=250,
                    peak=20, mixture="monl+task:a2v+task:a2v+task:v2a", batch=64, steps=10_000, optimizer="muon",
                    lr=6e-3, warmup=100, ema=0.995, noise_power=2, sampler="dpmpp_2m", sampling_steps=10),
    # App. B: 17 frames of 128 x 128 at 8 fps through MAGVIT-v2, 16 kHz sound through SoundStream (20 ms a segment).
    "paper": Preset(av_modalities(8, (16, 16), 8, 0.02, 1024), dim=1024, depth=24, heads=16, prediction="eps", reach=0,
                    peak=0, mixture="monl", batch=256, steps=400_000, optimizer="adamw", lr=5e-4, warmup=5000,
                    ema=0.9999, noise_power=0, sampler="ddim", sampling_steps=250),
}  # fmt: skip


def tour():
    """Print the four strategies as pictures of a timestep vector, and the presets."""
    layout, shades = Layout(PRESETS["toy"].modalities), " .:-=+*#%@"
    print("A timestep vector, from ' ' (t near 0) to '@' (t near T); each segment is as wide as it lasts:\n")
    for strategy in MONL:
        t = layout.split(sample_timesteps(strategy, layout, 1, 1000, torch.Generator().manual_seed(3))[0])
        for m in layout.modalities:
            width = [round((end - start) * 32) for start, end in pairwise(m.edges)]
            row = "".join(shades[(x - 1) // 100] * w for x, w in zip(t[m.name].tolist(), width))
            print(f"  {strategy:8} {m.name:6} |{row}|")
        print()
    for name, preset in PRESETS.items():
        layout = Layout(preset.modalities)
        with torch.device("meta"):  # shapes alone, no memory
            count = sum(p.numel() for p in preset.model(layout).parameters())
        shapes = ", ".join(f"{m.name} {m.shape}" for m in preset.modalities)
        print(f"preset {name}: {count / 1e6:.1f} M parameters, {preset.depth} layers, d = {preset.dim}, {shapes}")


if __name__ == "__main__":
    tour()
