"""AVDiT: one diffusion transformer for video and audio whose timestep is a vector.

This is the method of "A Versatile Diffusion Transformer with Mixture of Noise Levels for Audiovisual Generation". Read
it from top to bottom with the paper beside it. A tag such as [Eq. 5] stands beside the line that implements it. DIFFERS
FROM PAPER marks a misprint of the paper; README.md lists our own choices. `python avdit.py` draws timestep vectors.

Letters in comments and tests (the code writes `batch` for B, `channels` for d_m and `dim` for d):
    B      batch size                        M      number of modalities (video, audio, ...)
    N_m    time-segments of modality m       S      time-segments of all modalities, sum of N_m
    P_m    tokens per segment of m           L      tokens of all modalities, sum of N_m P_m
    d_m    latent channels of m              E      latent elements of one clip, sum of N_m P_m d_m
    T      diffusion steps                   d      width of the transformer
    z      latents, (B, E)                   t      timestep vector, int64 (B, S); 0 is clean, T is noise
    a, s   signal scale sqrt(alpha_bar) and noise scale sqrt(1 - alpha_bar) at the timestep of each element
    tau    the timestep that all wanted segments, those that are not given, share during sampling
z stores a clip modality by modality and segment by segment; a Layout knows what lies where. A mask over segments,
(B, S) or (S,), is called `given`; the same mask over elements, (B, E), is `given_e`.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

# --- Modalities and their time-segments [Sec. 3.1] --------------------------------------------------------------------


@dataclass(frozen=True)
class Modality:
    """One kind of latent: each clip has an array of shape (N, *grid, channels)."""

    name: str
    grid: tuple  # tokens of one segment: (h, w) for video, () for audio
    channels: int  # d_m
    edges: tuple  # N + 1 times in seconds; segment n covers edges[n] to edges[n + 1]

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
    """Where each modality and segment lies in z (B, E) and in t (B, S). The first modality is the time reference:
    strategy Pt draws a timestep for each of its segments, and other segments take that of the one at their midpoint."""

    def __init__(self, modalities):
        self.modalities = tuple(modalities)
        self.names = [m.name for m in self.modalities]
        self.lengths = [m.N for m in self.modalities]
        self.sizes = [math.prod(m.shape) for m in self.modalities]  # elements of each modality
        self.S, self.E = sum(self.lengths), sum(self.sizes)
        edges = [torch.tensor(m.edges, dtype=torch.float64) for m in self.modalities]
        self.starts = torch.cat([e[:-1] for e in edges])  # (S,) seconds
        self.ends = torch.cat([e[1:] for e in edges])
        first = accumulate([0, *self.lengths])  # first segment of each modality, then of each segment's modality
        self.first_of_modality = torch.cat([torch.full((n,), k) for n, k in zip(self.lengths, first)])  # (S,)

    def per_token(self, x):
        """(B, S, c) -> (B, L, c): repeat each segment's row for all of its tokens."""
        parts = zip(self.modalities, x.split(self.lengths, 1))
        return torch.cat([repeat(x_m, "b n c -> b (n p) c", p=m.P) for m, x_m in parts], 1)

    def per_element(self, x):
        """(..., S) -> (..., E): repeat each segment's value for all of its elements."""
        parts = zip(self.modalities, x.split(self.lengths, -1))
        return torch.cat([x_m.repeat_interleave(m.P * m.channels, -1) for m, x_m in parts], -1)

    def pack(self, latents):
        """Dict of (B, N_m, *grid, d_m) -> z (B, E)."""
        return torch.cat([latents[name].flatten(1) for name in self.names], -1)

    def unpack(self, z):
        """z (B, E) -> dict of (B, N_m, *grid, d_m)."""
        parts = zip(self.modalities, z.split(self.sizes, -1))
        return {m.name: z_m.unflatten(-1, m.shape) for m, z_m in parts}

    def split(self, x):
        """(..., S) -> dict of (..., N_m)."""
        return dict(zip(self.names, x.split(self.lengths, -1)))

    def of(self, names):
        """bool (S,): the segments of the named modalities. Raises ValueError if a name is unknown."""
        for name in names:
            check_choice("modality", name, self.names)
        return torch.cat([torch.full((m.N,), m.name in names) for m in self.modalities])

    def within(self, start, end):
        """bool (S,): the segments that lie wholly inside start..end seconds, with a tolerance of one microsecond."""
        return (self.starts >= start - 1e-6) & (self.ends <= end + 1e-6)


def check_choice(what, value, valid):
    if value not in valid:
        raise ValueError(f"unknown {what} {value!r}: use {', '.join(valid)}")


# --- Noise levels [Sec. 2, App. B] ------------------------------------------------------------------------------------


class NoiseSchedule(nn.Module):
    """The linear beta schedule [App. B]. The paper does not give its ends; these are DDPM's. The tables a and s have
    T + 1 entries, and entry 0 is clean. They are computed in float64, because 1 - alpha_bar cancels at small t."""

    def __init__(self, T=1000, beta_min=1e-4, beta_max=0.02):
        super().__init__()
        self.T = T
        beta = torch.linspace(beta_min, beta_max, T, dtype=torch.float64)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
        self.register_buffer("a", alpha_bar.sqrt().float())
        self.register_buffer("s", (1 - alpha_bar).sqrt().float())

    def scales(self, layout, t):
        """t (B, S) -> a and s of every element, (B, E) each."""
        return layout.per_element(self.a[t]), layout.per_element(self.s[t])


# --- A task is a mask over segments [Sec. 3.3, Sec. 6.2] --------------------------------------------------------------

TASKS = ("joint", "a2v", "v2a", "inpaint", "continue", "continue-2s")


def task_mask(task, layout):
    """bool (S,): True where a task gives the segment. Raises ValueError if the task or a modality it needs is unknown.

    continue     gives the reference's first two segments (5 frames, 0.625 s) and all that lies in their time
    continue-2s  the same for its first one (1 frame, 0.125 s) [App. F]
    inpaint      gives its first and its last one (1 and 4 frames, 0.125 and 0.5 s)
    """
    check_choice("task", task, TASKS)
    edges = layout.modalities[0].edges
    if task == "joint":
        return torch.zeros(layout.S, dtype=torch.bool)
    if task in ("a2v", "v2a"):
        return layout.of(["audio"] if task == "a2v" else ["video"])
    if task == "inpaint":
        return layout.within(*edges[:2]) | layout.within(*edges[-2:])
    end = edges[1] if task == "continue-2s" else edges[min(2, len(edges) - 1)]
    return layout.within(edges[0], end)


# --- The timestep vector [Sec. 3.1, Sec. 3.2, Alg. 1] -----------------------------------------------------------------


def coincident(layout):
    """(S,): index of the reference's segment at each segment's midpoint, or nearest to it [Sec. 3.1, footnote 4]."""
    boundaries = layout.starts[1 : layout.lengths[0]]  # the reference comes first
    return torch.bucketize((layout.starts + layout.ends) / 2, boundaries, right=True)


# Each strategy turns independent timesteps t_ref (B, S) into timestep vectors (B, S) [Alg. 1, lines 6 to 17].
STRATEGIES = {
    "vanilla": lambda t_ref, layout: t_ref[:, :1].expand_as(t_ref),  # t^(m,n) = t_ref^(1,1)
    "pt": lambda t_ref, layout: t_ref[:, coincident(layout)],  # t^(m,n) = t_ref^(1,n), with n matched by time
    "pm": lambda t_ref, layout: t_ref[:, layout.first_of_modality],  # t^(m,n) = t_ref^(m,1)
    "ptm": lambda t_ref, layout: t_ref,  # t^(m,n) = t_ref^(m,n)
}
MONL = ("vanilla", "pt", "pm", "ptm")
for name in TASKS:  # task-specific training [Eq. 3, Table 1]: t = 0 where the task gives, one shared t elsewhere
    STRATEGIES[f"task:{name}"] = lambda t_ref, layout, task=name: torch.where(task_mask(task, layout), 0, t_ref[:, :1])


def sample_timesteps(mixture, layout, batch, T, generator=None):
    """Draw one timestep vector per example [Alg. 1]: int64 (B, S), from 1 to T (0 where a task:NAME gives).

    `mixture` is "monl" (its four strategies), a name in STRATEGIES, or a sum such as "pt+pm+pm" with equally likely
    terms. Raises ValueError if a name is unknown.
    """
    names = []
    for name in mixture.replace(" ", "").split("+"):
        check_choice("strategy", name, ("monl", *STRATEGIES))
        names += MONL if name == "monl" else (name,)
    t_ref = torch.randint(1, T + 1, (batch, layout.S), generator=generator)  # line 4
    choice = torch.randint(len(names), (batch,), generator=generator)  # line 3; Alg. 1 runs once per example
    t = torch.stack([STRATEGIES[name](t_ref, layout) for name in names])  # (strategies, B, S)
    return t[choice, torch.arange(batch)]


# --- The network [Sec. 4, Fig. 5] -------------------------------------------------------------------------------------


def sinusoid(x, dim):
    """x (...) -> (..., dim): cosines and sines of x with periods from 2 pi to 2 pi 10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=x.device) / (dim // 2))
    angles = x[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class Block(nn.Module):
    """A transformer layer whose AdaLN shifts and scales come from each segment's own timestep [Sec. 4]."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        # Two shifts, two scales and no gates as DiT has: with these the blocks alone would exceed the paper's 420 M.
        self.ada = nn.Linear(dim, 4 * dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attend = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for p in (*self.attend.parameters(), *self.mlp[-1].parameters()):
            nn.init.zeros_(p)  # each residual branch starts at zero, which replaces DiT's gates

    def forward(self, x, cond, layout):
        """Tokens x (B, L, d), timestep embeddings cond (B, S, d) -> (B, L, d)."""
        shift1, scale1, shift2, scale2 = layout.per_token(self.ada(cond)).chunk(4, -1)  # (B, L, d) each
        y = self.norm(x) * (1 + scale1) + shift1
        q, k, v = rearrange(self.qkv(y), "b l (three h e) -> three b h l e", three=3, h=self.heads)
        # Query-key normalisation (ViT-22B, Dehghani et al. 2023), without parameters, bounds the attention logits.
        q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        if x.shape[1] < 256:  # every token attends to all tokens of all modalities
            y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        else:  # the same, but fused: it keeps no (L, L) matrices, and takes longer where these are small
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attend(rearrange(y, "b h l e -> b l (h e)"))
        return x + self.mlp(self.norm(x) * (1 + scale2) + shift2)


PREDICTIONS = ("eps", "v", "z0")  # what a network may regress, see predict()


class AVDiT(nn.Module):
    """The paper's joint noise prediction network [Sec. 4], which regresses `prediction`, one of PREDICTIONS. Raises
    ValueError if that is unknown, or if dim is odd or not divisible by heads."""

    def __init__(self, layout, dim, depth, heads, prediction="eps"):
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS)
        if dim % heads or dim % 2:
            raise ValueError(f"dim {dim} must be even and divisible by heads {heads}")
        self.layout, self.dim, self.prediction = layout, dim, prediction
        modalities = layout.modalities
        # z_t and the self-conditioning estimate of z0 enter side by side, hence 2 d_m channels.
        self.project_in = nn.ModuleDict({m.name: nn.Linear(2 * m.channels, dim) for m in modalities})
        self.project_out = nn.ModuleDict({m.name: nn.Linear(dim, m.channels) for m in modalities})
        # Temporal position embeddings start as sinusoids of a segment's midpoint, so segments of two modalities at the
        # same time start alike. The unit is milliseconds, because sinusoid()'s periods suit values in the thousands.
        middle = layout.split(1000 * (layout.starts + layout.ends) / 2)
        self.time = nn.ParameterDict({name: nn.Parameter(sinusoid(x, dim)) for name, x in middle.items()})
        # Spatial position embeddings also tell the modalities apart. They start about as large as the temporal ones.
        self.space = nn.ParameterDict({m.name: nn.Parameter(0.5 * torch.randn(m.P, dim)) for m in modalities})
        self.embed = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.ada = nn.Linear(dim, 2 * dim)
        for p in self.project_out.parameters():
            nn.init.zeros_(p)

    def forward(self, z, t, z0_prev=None):
        """z_t (B, E), t (B, S), previous estimate of z0 (B, E) or None -> prediction (B, E)."""
        # The first estimates can be far off, above all at t = T. The clamp keeps them from drowning everything else.
        z0_prev = torch.zeros_like(z) if z0_prev is None else z0_prev.clamp(-10, 10)
        latents, estimates = self.layout.unpack(z), self.layout.unpack(z0_prev)
        tokens, positions = [], []
        for m in self.layout.modalities:
            x = torch.cat([latents[m.name], estimates[m.name]], -1)
            x = self.project_in[m.name](x).reshape(-1, m.N, m.P, self.dim)
            x = x + (self.time[m.name][:, None] + self.space[m.name]).to(x.dtype)  # (B, N_m, P_m, d), bf16 if autocast
            tokens.append(x.flatten(1, 2))
            positions.append(self.time[m.name] + self.space[m.name].mean(0))  # (N_m, d); the mean tells the modality
        # Sec. 4 embeds timesteps together with positions: a segment or modality may treat a noise level in its own way.
        positions = torch.cat(positions).expand(len(t), -1, -1)
        cond = self.embed(torch.cat([sinusoid(t, self.dim), positions], -1))  # (B, S, d)
        x = torch.cat(tokens, 1)  # (B, L, d)
        for block in self.blocks:
            x = block(x, cond, self.layout)
        shift, scale = self.layout.per_token(self.ada(cond)).chunk(2, -1)
        x = self.norm(x) * (1 + scale) + shift
        parts = zip(self.layout.names, x.split([m.N * m.P for m in self.layout.modalities], 1))
        return torch.cat([self.project_out[name](x_m).flatten(1) for name, x_m in parts], 1)


def predict(model, schedule, layout, z, t, z0_prev=None):
    """Call the model and turn its prediction into estimates of z0 and eps, (B, E) each.

    The paper regresses eps. W.A.L.T, on which it builds, regresses v = a eps - s z0; our small presets z0. Given
    z_t = a z0 + s eps, any one of them gives the other two. Where t = 0, the estimate of z0 is z itself.
    """
    out, (a, s) = model(z, t, z0_prev), schedule.scales(layout, t)
    if model.prediction == "eps":
        return (z - s * out) / a, out
    if model.prediction == "v":
        return a * z - s * out, s * z + a * out
    z0_hat = torch.where(s > 0, out, z)
    return z0_hat, (z - a * z0_hat) / s.clamp(min=1e-3)  # s is at least 0.01 where t > 0


# --- Training [Sec. 3.1, Alg. 2] --------------------------------------------------------------------------------------


def training_loss(model, schedule, layout, z0, t, eps, self_conditioning=False):
    """Lines 5 to 11 of [Alg. 2]. z0, eps (B, E) and t (B, S) -> the loss, and all squared errors (B, E) for a log.

    With one shared t the loss is [Eq. 1, Eq. 2]; with t from a mixture task:NAME it is [Eq. 3]. The loss is a mean over
    examples, so the losses of equal parts of a batch average to the loss of the batch.

    self_conditioning  first call the model without gradient, and show it its own estimate of z0. The caller decides at
                       random, once per step, with probability 0.9 [App. B].
    """
    a, s = schedule.scales(layout, t)
    z_t = a * z0 + s * eps  # [Eq. 5]
    z0_prev = None
    if self_conditioning:
        with torch.no_grad():
            z0_prev, _ = predict(model, schedule, layout, z_t, t)
    target = {"eps": eps, "v": a * eps - s * z0, "z0": z0}[model.prediction]
    # eps and v: all noisy elements count alike, as in Eq. 6. z0: elements with s < 0.4 count less than noisier ones of
    # the same example, because they lack only detail (no effect where all t are equal). Elements at t = 0 never count.
    weight = (6.25 * s**2).clamp(max=1) if model.prediction == "z0" else (s > 0).float()
    error = (model(z_t, t, z0_prev) - target) ** 2
    loss = ((weight * error).sum(1) / weight.sum(1).clamp(min=1e-8)).mean()  # [Eq. 6], there with eps and no weight
    return loss, error.detach()


# --- Samplers [Alg. 3, Alg. 4, App. B] --------------------------------------------------------------------------------
# One step down, elementwise [Eq. 4]: `now` is (a, s) at t and `then` is (a, s) at t_next, (B, E) each. `noise()` draws
# standard normal noise like z. generate() puts the given elements back before the next step.


def ddpm_step(z, z0_hat, eps_hat, now, then, noise):
    """Line 5 of [Alg. 3] and line 7 of [Alg. 4], with sigma^2 = beta.

    DIFFERS FROM PAPER: Sec. 2 prints the factor sqrt(alpha) in mu. The algorithms print 1 / sqrt(alpha), which is
    right. Line 5 of Alg. 3 prints alpha_bar with index t where tau is meant.
    """
    (a, s), (a_next, s_next) = now, then
    alpha = (a / a_next) ** 2  # of a step from t to t_next, which may skip timesteps
    mean = (z - (1 - alpha) / s.clamp(min=1e-8) * eps_hat) / alpha.sqrt()
    return mean + torch.where(s_next > 0, (1 - alpha).sqrt() * noise(), 0)


def ddim_step(z, z0_hat, eps_hat, now, then, noise):
    """DDIM with eta = 0, the paper's sampler [App. B]: mix both estimates again at the next noise level."""
    a_next, s_next = then
    return a_next * z0_hat + s_next * eps_hat


SAMPLERS = {"ddim": ddim_step, "ddpm": ddpm_step}


def noise_like(z, generator=None):
    """Standard normal noise, drawn on the generator's device, so that a seed gives the same noise on every device."""
    device = generator.device if generator else z.device
    return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=device).to(z.device)


def respaced(T, steps, device=None):
    """`steps` timesteps from T down, then 0; steps = T is Alg. 3. Raises ValueError if steps > T. They are tensors: XLA
    would compile a new program for every Python number."""
    if not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}: use 1 to {T}")
    taus = torch.linspace(T, 0, steps + 1, dtype=torch.float64).round().long()
    return [torch.tensor(tau, device=device) for tau in taus.tolist()]


# --- Sampling [Sec. 3.3, Alg. 3, Alg. 4], guidance for free [App. E] --------------------------------------------------


def guide(model, schedule, layout, z, t, z0_prev, dropped, guidance, noise):
    """Classifier-free guidance for free [App. E]: extrapolate from the unconditional through the conditional estimates.

    The unconditional pass replaces the `dropped` segments (B, S) by pure noise at t = T [Fig. 10, Fig. 11], a kind of
    input that the network knows from training. z0_prev is zero there too; elsewhere both passes see the same z0_prev.

    DIFFERS FROM PAPER: [Eq. 15] puts noise in the wanted part; by the prose and Fig. 10 it belongs in the GIVEN part.
    """
    dropped_e = layout.per_element(dropped)
    z = torch.cat([z, torch.where(dropped_e, noise(), z)])
    t = torch.cat([t, torch.where(dropped, schedule.T, t)])
    z0_prev = torch.cat([z0_prev, torch.where(dropped_e, 0, z0_prev)])
    pairs = [x.chunk(2) for x in predict(model, schedule, layout, z, t, z0_prev)]
    return [(1 + guidance) * cond - guidance * uncond for cond, uncond in pairs]  # [Eq. 13, Eq. 14, Eq. 16, Eq. 17]


@torch.no_grad()
def generate(model, schedule, layout, z0, given, *, steps=250, sampler="ddim", guidance=0.0, guidance_drop=None,
             generator=None, on_step=None):  # fmt: skip
    """Generate the wanted segments, all that are not given [Alg. 3, Alg. 4, Eq. 7] -> (B, E). Raises ValueError.
    Comments name the lines of Alg. 4; Alg. 3 is the same with nothing given.

    model          an AVDiT, or any callable (z, t, z0_prev) -> (B, E) with an attribute `prediction`
    z0             (B, E): clean latents where given, anything elsewhere
    given          bool (S,) or (B, S); given segments come back bit-identical
    sampler        a name in SAMPLERS
    guidance       the scale g in (1 + g) cond - g uncond. The paper calls it s; others write w = 1 + g. 0 is none.
    guidance_drop  names of the modalities that the unconditional pass drops; None drops all that is given
    on_step        called as on_step(i, steps) after step i = 1..steps, for a progress line
    """
    check_choice("sampler", sampler, SAMPLERS)
    taus, noise = respaced(schedule.T, steps, z0.device), partial(noise_like, z0, generator)
    given = given.to(z0.device, torch.bool).expand(len(z0), -1)  # (B, S)
    given_e = layout.per_element(given)  # (B, E)
    dropped = given & layout.of(layout.names if guidance_drop is None else guidance_drop).to(z0.device)
    guided = guidance and dropped.any()
    z, z0_prev = noise(), torch.zeros_like(z0)  # line 1
    for i, (tau, tau_next) in enumerate(pairwise(taus)):  # line 3
        # DIFFERS FROM PAPER: "tau I" in line 5, and in line 4 of Alg. 3, means that every wanted entry of t is tau.
        # "(m_c + 1 : M, N)" in line 6 means all N segments.
        t, t_next = torch.where(given, 0, tau), torch.where(given, 0, tau_next)  # lines 2 and 5
        z = torch.where(given_e, z0, z)  # line 6's [z_0, z_tau]
        if guided:
            z0_hat, eps_hat = guide(model, schedule, layout, z, t, z0_prev, dropped, guidance, noise)
        else:
            z0_hat, eps_hat = predict(model, schedule, layout, z, t, z0_prev)  # line 6
        now, then = schedule.scales(layout, t), schedule.scales(layout, t_next)
        z = SAMPLERS[sampler](z, z0_hat, eps_hat, now, then, noise)  # lines 4 and 7
        z0_prev = torch.where(given_e, z0, z0_hat)  # guidance extrapolates, which is meaningless where z0 is given
        if on_step:
            on_step(i + 1, steps)
    return torch.where(given_e, z0, z)


# --- Presets [App. B] -------------------------------------------------------------------------------------------------


def av_modalities(fps, grid, video_channels, segment, audio_channels, frames=17):
    """Video of 1 + 4 k frames, with segments of 1, 4, 4, ... frames; audio with segments of `segment` seconds."""
    if frames % 4 != 1:
        raise ValueError(f"{frames} frames are not 1 + 4 k")
    edges = (0, *range(1, frames + 1, 4))
    count = int(frames / fps / segment + 1e-6)
    return [
        Modality("video", grid, video_channels, tuple(edge / fps for edge in edges)),
        Modality("audio", (), audio_channels, tuple(n * segment for n in range(count + 1))),
    ]


@dataclass(frozen=True)
class Preset:
    """A network's size, the latents it is made for, what it predicts, its sampler. Training recipes are in train.py."""

    modalities: list
    dim: int
    depth: int
    heads: int
    prediction: str
    sampler: str
    sampling_steps: int

    def model(self, layout):
        return AVDiT(layout, self.dim, self.depth, self.heads, self.prediction)


PRESETS = {
    # The toy world. It predicts z0: eps leaves picture and sound unrelated, and eps and v both leave noise in
    # the picture, probably because a network of width 128 cannot pass on the noise of a token's 128 channels.
    "toy": Preset(av_modalities(8, (2, 2), 128, 0.125, 64), dim=128, depth=4, heads=4, prediction="z0",
                  sampler="ddpm", sampling_steps=40),
    # Some hundreds of real clips of 64 x 64 pixels, as data.py reads them.
    "clips": Preset(av_modalities(8, (2, 2), 192, 0.125, 96), dim=256, depth=4, heads=4, prediction="z0",
                    sampler="ddim", sampling_steps=20),
    # App. B: 17 frames of 128 x 128 at 8 fps through MAGVIT-v2; 16 kHz sound through SoundStream, 20 ms per segment.
    "paper": Preset(av_modalities(8, (16, 16), 8, 0.02, 1024), dim=1024, depth=24, heads=16, prediction="eps",
                    sampler="ddim", sampling_steps=250),
}  # fmt: skip


# --- python avdit.py --------------------------------------------------------------------------------------------------


def tour():
    """Print timestep vectors of the strategies and of the tasks, and the presets."""
    layout, shades = Layout(PRESETS["toy"].modalities), " .:-=+*#%@"

    def draw(title, t):
        for m, row in zip(layout.modalities, layout.split(t).values()):
            widths = [round((end - start) * 32) for start, end in pairwise(m.edges)]
            picture = "".join(shades[math.ceil(x * 9 / 1000)] * width for x, width in zip(row.tolist(), widths))
            print(f"  {title:12} {m.name:6} |{picture}|")
            title = ""

    print("Training: a timestep vector of each strategy, from ' ' (clean, t = 0) to '@' (noise, t = T).")
    for strategy in MONL:
        draw(strategy, sample_timesteps(strategy, layout, 1, 1000, torch.Generator().manual_seed(7))[0])
    print("\nSampling: t = 0 where a task gives a segment, t = tau (here 600 of 1000) where it wants one.")
    for task in TASKS:
        draw(task, torch.where(task_mask(task, layout), 0, 600))
    for name, preset in PRESETS.items():
        with torch.device("meta"):  # shapes only, no memory
            count = sum(p.numel() for p in preset.model(Layout(preset.modalities)).parameters())
        latents = ", ".join(f"{m.name} {m.shape}" for m in preset.modalities)
        print(f"\npreset {name}: {count / 1e6:.1f} M parameters, {preset.depth} layers, d = {preset.dim}, {latents}")


if __name__ == "__main__":
    tour()
