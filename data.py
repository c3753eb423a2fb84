"""Worlds and latents: the toy world and its readers, folders of clips, files of latents, closed-form tokenizers.

Clips are dicts like latents: {"video": uint8 (n, F, H, W, 3), "audio": float32 (n, samples)}; the clips of a .npz are
its latents. Every modality has a tokenizer, an nn.Module with fit(x), encode(x) -> z (n, N_m, *grid, d_m), decode(z)
and z_max; its state_dict travels in the checkpoint. Latents have zero mean and unit variance per channel [App. B].
"""

import math
import re
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from avdit import Modality

# ---------------------------------------------------------------------------------------
# The toy world: a ball you can hear. Pitch is height, timbre is colour.
# ---------------------------------------------------------------------------------------

FPS, RATE, FRAMES, SIZE = 8, 8000, 17, 32
PIXELS = torch.arange(SIZE) / (SIZE - 1)  # where pixel k lies, as a share of the picture
THIRDS = 2 * math.pi * torch.arange(3) / 3  # the three colour channels on the hue circle


def mirror(q):
    """Triangle wave: q mirrored into 0..1."""
    return 1 - (q % 2 - 1).abs()


def toy_clips(n, seed, frames=FRAMES):
    """-> clips, truth: n toy clips; truth {"position": (n, frames, 2) x and y in 0..1, "hue": (n,) in 0..1}."""
    draws = np.random.default_rng(seed).random((n, 6))
    parts = [render(torch.from_numpy(d), frames) for d in np.array_split(draws, math.ceil(n / 256))]
    return [{k: torch.cat([p[i][k] for p in parts]) for k in parts[0][i]} for i in (0, 1)]


def render(draws, frames=FRAMES):
    """Six uniform numbers a clip, (n, 6) -> clips, truth."""
    start, velocity, hue, phase = 2 * draws[:, None, :2], 2 * draws[:, None, 2:4] - 1, draws[:, 4:5], draws[:, 5:6]
    position = mirror(start + velocity * torch.arange(frames)[:, None] / FPS)  # (n, frames, 2)
    x, y = (0.18 + 0.64 * position).float()[..., None, None, :].unbind(-1)
    distance = ((PIXELS - x) ** 2 + (PIXELS[:, None] - y) ** 2).sqrt()  # (n, frames, 32, 32)
    colour = 0.5 + 0.5 * torch.cos(2 * math.pi * hue + THIRDS).float()  # (n, 3)
    video = torch.sigmoid(30 * (0.16 - distance))[..., None] * colour[:, None, None, None]
    height = mirror(start[..., 1] + velocity[..., 1] * torch.arange(frames * RATE // FPS) / RATE)
    frequency = 300 * 2 ** (1.5 * (1 - height))  # (n, samples), Hz
    turns = F.pad((frequency[:, 1:] + frequency[:, :-1]) / 2 / RATE, (1, 0)).cumsum(1)  # its integral, trapezoidal
    phi, h = 2 * math.pi * (phase + turns), 2 * math.pi * hue
    second, third = (0.3 * (0.5 + 0.5 * f(h)) for f in (torch.cos, torch.sin))
    audio = 0.8 * (0.5 * phi.sin() + second * (2 * phi).sin() + third * (3 * phi).sin())
    clips = {"video": (255 * video).round().byte(), "audio": audio.float()}
    return clips, {"position": position.float(), "hue": hue[:, 0].float()}


# Readers: from pixels and samples alone, never from latents.


def read_video(video):
    """uint8 (n, F, 32, 32, 3) -> position (n, F, 2), hue (n,) of the whole clip, rms radius (n, F) of the picture."""
    video = video.float() / 255
    light = (video.sum(-1) - 0.15).clamp(min=0)  # (n, F, H, W)
    mass = light.sum((-1, -2)).clamp(min=1e-6)
    x = (light.sum(-2) * PIXELS).sum(-1) / mass
    y = (light.sum(-1) * PIXELS).sum(-1) / mass
    square = (PIXELS - x[..., None, None]) ** 2 + (PIXELS[:, None] - y[..., None, None]) ** 2
    radius = ((light * square).sum((-1, -2)) / mass).sqrt()
    colour = (video * light[..., None]).sum((1, 2, 3))  # (n, 3)
    hue = torch.atan2(-(colour * THIRDS.sin()).sum(-1), (colour * THIRDS.cos()).sum(-1)) / (2 * math.pi) % 1
    return (torch.stack([x, y], -1) - 0.18) / 0.64, hue, radius


def spectrum(audio, size, hop, count):
    """Magnitudes (n, count, size / 2 + 1) of Hann windows centred on samples 0, hop, 2 hop ...; silence outside."""
    frames = F.pad(audio, (size // 2, size)).unfold(-1, size, hop)[:, :count]
    return torch.fft.rfft(frames * torch.hann_window(size)).abs()


def pitch(magnitude):
    """The energy-weighted mean line between 250 and 900 Hz: (..., lines) -> (..., 1) Hz."""
    hz = torch.linspace(0, RATE / 2, magnitude.shape[-1])
    energy = magnitude**4 * ((hz >= 250) & (hz <= 900))
    return (energy * hz).sum(-1, keepdim=True) / energy.sum(-1, keepdim=True).clamp(min=1e-12)


def read_height(audio):
    """float (n, samples) -> (n, 17): the height heard at every frame, 0 at the top as in the picture."""
    hz = pitch(spectrum(audio, 1024, RATE // FPS, FRAMES))[..., 0]
    return 1 - torch.log2(hz.clamp(min=1) / 300) / 1.5


def read_timbre(audio):
    """float (n, samples) -> (n,): the hue heard."""
    magnitude = spectrum(audio, 512, 256, audio.shape[-1] // 256)[:, 1:]  # windows wholly inside the clip
    f, hz = pitch(magnitude), torch.linspace(0, RATE / 2, 257)
    near = [(magnitude**2 * ((hz - k * f).abs() < 0.3 * f)).sum(-1).sqrt() for k in (1, 2, 3)]
    cos, sin = ((near[k] / near[0].clamp(min=1e-6)).mean(-1) / 0.3 - 1 for k in (1, 2))
    return torch.atan2(sin, cos) / (2 * math.pi) % 1


def circular(a, b):
    """Distance of two hues on the circle, at most 0.5."""
    return ((a - b + 0.5) % 1 - 0.5).abs()


def read_motion(position):
    """(n, 17, 2) -> (n, 2): mean absolute residual of x and y from the best mirrored straight line."""
    time = torch.arange(FRAMES) / FPS
    path = rearrange(position, "n f xy -> (n xy) 1 f")
    grid = torch.cartesian_prod(torch.arange(0, 2, 0.025), torch.arange(-1.1, 1.11, 0.025))  # start, velocity
    fine = torch.cartesian_prod(*2 * [torch.linspace(-0.02, 0.02, 9)])
    best = []
    for p in path.split(64):
        lines = grid[None]
        for _ in range(2):  # the whole grid, then around its best point
            error = (p - mirror(lines[..., :1] + lines[..., 1:] * time)).abs().mean(-1)
            residual, at = error.min(-1)
            lines = lines.expand(len(p), -1, -1)[torch.arange(len(p)), at][:, None] + fine
        best.append(residual)
    return torch.cat(best).unflatten(0, (-1, 2))


# ---------------------------------------------------------------------------------------
# Tokenizers in closed form. They take the place of the paper's MAGVIT-v2 and SoundStream [Sec. 4].
# ---------------------------------------------------------------------------------------

HOPS = 8  # spectrum frames of one segment of sound


class Components(nn.Module):
    """Principal components: x (..., D) -> z (..., C), every channel with zero mean and unit variance.

    Brought to unit variance one by one, the faint components would weigh as much as the ball itself and the model
    would spend its time on them; left as they are, it would never learn them. So their variances are moved half way
    (to their square roots), and a random rotation then evens the channels out without changing any distance.
    Channels beyond the rank of the data stay zero.
    """

    def __init__(self, dim, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("into", torch.zeros(dim, channels))
        self.register_buffer("back", torch.zeros(channels, dim))

    def fit(self, x):
        rank = min(self.into.shape[1], *x.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mean.copy_(x.mean(0))
            _, scale, basis = torch.svd_lowrank(x - self.mean, min(rank + 16, *x.shape), niter=4)
            basis = basis * basis.gather(0, basis.abs().argmax(0)[None]).sign()  # of the two, always the same one
            rotation = torch.linalg.qr(torch.randn(rank, rank))[0]
        root = (scale[:rank] / len(x) ** 0.5).clamp(min=1e-4).sqrt()  # of the components' standard deviations
        std = (((x - self.mean) @ basis[:, :rank] / root) @ rotation).std(0)
        self.into[:, :rank] = (basis[:, :rank] / root) @ rotation / std
        self.back[:rank] = std[:, None] * rotation.T @ (basis[:, :rank] * root).T

    def encode(self, x):
        return (x - self.mean) @ self.into

    def decode(self, z):
        return z @ self.back + self.mean


class PatchTokenizer(nn.Module):
    """uint8 video (n, 1 + 4 k, H, W, 3) <-> z (n, 1 + k, h, w, d): components of 1-frame, then of 4-frame patches.

    A segment sees its own frames alone, so the paper's causal structure (no frame knows a later one) holds.
    """

    def __init__(self, modality, size):
        super().__init__()
        self.grid, self.patch = modality.grid, size // modality.grid[0]
        self.first = Components(self.patch**2 * 3, modality.channels)
        self.later = Components(4 * self.patch**2 * 3, modality.channels)
        self.register_buffer("z_max", torch.zeros(()))

    def patches(self, video, frames):  # (n, frames k, H, W, 3) -> (n, k, h, w, D)
        pattern = "n (k f) (h p) (w q) c -> n k h w (f p q c)"
        return rearrange(video.float() / 255, pattern, f=frames, p=self.patch, q=self.patch)

    def picture(self, x, frames):
        pattern = "n k h w (f p q c) -> n (k f) (h p) (w q) c"
        return rearrange(x, pattern, f=frames, p=self.patch, q=self.patch, c=3)

    def fit(self, video):
        self.first.fit(self.patches(video[:, ::4], 1).flatten(0, -2))  # any single frame may serve as a first one
        self.later.fit(self.patches(video[:, 1:], 4).flatten(0, -2))
        self.z_max.copy_(self.encode(video).abs().max())

    def encode(self, video):
        first, later = self.patches(video[:, :1], 1), self.patches(video[:, 1:], 4)
        return torch.cat([self.first.encode(first), self.later.encode(later)], 1)

    def decode(self, z):
        first, later = self.first.decode(z[:, :1]), self.later.decode(z[:, 1:])
        video = torch.cat([self.picture(first, 1), self.picture(later, 4)], 1)
        return (255 * video.clamp(0, 1)).round().byte()


class SpectrumTokenizer(nn.Module):
    """float32 sound (n, samples) <-> z (n, N, d): components of the square-root magnitudes of a segment's frames.

    A segment of 8 hops has 8 frames, one centred on each hop, in windows of about two hops: it hears half a hop beyond
    its ends. Phase is not kept; Griffin-Lim finds one that fits. Sound after the last whole segment is trimmed.
    """

    def __init__(self, modality, sample_rate):
        super().__init__()
        self.N = modality.N
        self.hop = int((modality.edges[1] - modality.edges[0]) * sample_rate + 1e-6) // HOPS
        self.size = 2 ** round(math.log2(2 * self.hop))
        self.bins = Components(HOPS * (self.size // 2 + 1), modality.channels)
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)
        self.register_buffer("z_max", torch.zeros(()))

    def stft(self, sound):  # (n, (hops - 1) * hop + size) -> complex (n, hops, lines)
        return torch.fft.rfft(sound.unfold(-1, self.size, self.hop) * self.window)

    def istft(self, frames):  # least squares: overlap-add, divided by the sum of squared windows
        def overlap(x):
            length = (x.shape[1] - 1) * self.hop + self.size
            return F.fold(x.mT, (1, length), (1, self.size), stride=(1, self.hop)).flatten(1)

        sound = overlap(torch.fft.irfft(frames, self.size) * self.window)
        return sound / overlap((self.window**2).expand(1, frames.shape[1], -1)).clamp(min=1e-8)

    def griffin_lim(self, magnitude, rounds=60, momentum=0.99):
        seed = torch.Generator().manual_seed(0)  # the same first guess for every clip, so that batches do not matter
        phase = 2 * math.pi * torch.rand(magnitude.shape[1:], generator=seed).to(magnitude.device)
        angle, before = torch.polar(torch.ones_like(phase), phase), 0
        for _ in range(rounds):
            now = self.stft(self.istft(magnitude * angle))
            angle, before = now - before * momentum / (1 + momentum), now
            angle = angle / angle.abs().clamp(min=1e-8)
        before = (self.size - self.hop) // 2
        return self.istft(magnitude * angle)[:, before : before + magnitude.shape[1] * self.hop]

    def features(self, sound):
        # A window that reached into the silence beyond the clip would hear a click: it is moved inside.
        start = torch.arange(self.N * HOPS) * self.hop - (self.size - self.hop) // 2
        start = start.clamp(0, self.N * HOPS * self.hop - self.size)
        frames = sound[:, start[:, None] + torch.arange(self.size)]  # (n, hops, size)
        magnitude = torch.fft.rfft(frames * self.window).abs()
        return rearrange(magnitude.sqrt(), "n (k hops) lines -> n k (hops lines)", hops=HOPS)

    def fit(self, sound):
        self.bins.fit(self.features(sound).flatten(0, 1))
        self.z_max.copy_(self.encode(sound).abs().max())

    def encode(self, sound):
        return self.bins.encode(self.features(sound))

    def decode(self, z):  # of any number of segments
        root = rearrange(self.bins.decode(z), "n k (hops lines) -> n (k hops) lines", hops=HOPS)
        return self.griffin_lim(root.clamp(min=0) ** 2).clamp(-1, 1)


class Standardize(nn.Module):
    """Latents of any other tokenizer <-> z: zero mean and unit variance per channel, nothing else."""

    def __init__(self, modality):
        super().__init__()
        self.register_buffer("mean", torch.zeros(modality.channels))
        self.register_buffer("std", torch.ones(modality.channels))
        self.register_buffer("z_max", torch.zeros(()))

    def fit(self, latents):
        flat = latents.flatten(0, -2)
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0).clamp(min=1e-6))
        self.z_max.copy_(self.encode(latents).abs().max())

    def encode(self, latents):
        return (latents - self.mean) / self.std

    def decode(self, z):
        return z * self.std + self.mean


# ---------------------------------------------------------------------------------------
# Folders of clips, files of latents
# ---------------------------------------------------------------------------------------


HOUR = ("-t", "3600")


def ffmpeg(path, *arguments):
    """Run imageio's ffmpeg on one file -> (stdout, stderr). The path is an argument of its own, never shell text.

    Of a clip the first hour counts; a file that claims more memory or time than a clip needs is refused by ValueError.
    """
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    source = ["-i", f"file:{Path(path).absolute()}"]  # "file:": a colon or dash is part of the name
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-max_alloc", "500000000"]
    try:
        done = subprocess.run([*command, *source, *arguments], capture_output=True, check=False, timeout=900)
    except subprocess.TimeoutExpired:
        raise ValueError("ffmpeg has not decoded it in 15 minutes") from None
    return done.stdout, done.stderr.decode(errors="replace")


def best_streams(path):
    """-> "0:i" of the largest picture, "0:j" of the finest sound; ValueError where one is missing."""
    _, text = ffmpeg(path)  # without an output ffmpeg lists the streams and stops
    best = {}
    for index, kind, line in re.findall(r"Stream #(0:\d+).*?: (Video|Audio): (.*)", text):
        size = re.search(r"\b([1-9]\d*)x(\d+)\b" if kind == "Video" else r"\b(\d+) Hz", line)
        if size and "attached pic" not in line:
            area = math.prod(int(x) for x in size.groups())
            best[kind] = max(best.get(kind, (0, "")), (area, index), key=lambda pair: pair[0])
    for kind, word in (("Video", "picture"), ("Audio", "sound")):
        if kind not in best:
            raise ValueError(f"no {word}" if best else "ffmpeg finds neither picture nor sound in it")
    return best["Video"][1], best["Audio"][1]


def decode_clip(path, fps, size, sample_rate):
    """-> uint8 (F, size, size, 3), float32 (samples,): resampled, centre cropped. ValueError says why not."""
    video, audio = best_streams(path)
    fit = f"fps={fps},scale={size}:{size}:force_original_aspect_ratio=increase,crop={size}:{size}"
    picture, error = ffmpeg(
        path, "-map", video, "-vf", fit, *HOUR, "-f", "rawvideo", "-pix_fmt", "rgb24", "-v", "error", "-"
    )
    align = "aresample=async=1:first_pts=0"  # sound that starts after the picture gets silence in front
    rate = str(sample_rate)
    sound, _ = ffmpeg(
        path, "-map", audio, "-af", align, *HOUR, "-ac", "1", "-ar", rate, "-f", "f32le", "-v", "error", "-"
    )
    frame = size * size * 3
    if len(picture) < frame or len(sound) < 4:
        raise ValueError(f"ffmpeg cannot decode it ({(error.splitlines() or ['no output'])[-1]})")
    frames = np.frombuffer(picture[: len(picture) // frame * frame], np.uint8).reshape(-1, size, size, 3)
    samples = np.frombuffer(sound[: len(sound) // 4 * 4], np.float32)
    return torch.from_numpy(frames.copy()), torch.from_numpy(samples.copy()).clamp(-1, 1)


def clip_windows(path, modalities, fps, size, sample_rate):
    """Decode a clip and cut it into windows of the model's length, end to end -> clips. ValueError if it is short."""
    video, audio = decode_clip(path, fps, size, sample_rate)
    frames = round(modalities[0].edges[-1] * fps)
    samples = round(modalities[1].edges[-1] * sample_rate)
    starts = [round(k * frames / fps * sample_rate) for k in range(len(video) // frames)]
    starts = [start for start in starts if start + samples <= len(audio)]
    if not starts:
        have, need = min(len(video) / fps, len(audio) / sample_rate), modalities[0].edges[-1]
        raise ValueError(f"{have:.2f} s of picture and sound, {need:.2f} s are needed")
    return {
        "video": video[: len(starts) * frames].unflatten(0, (-1, frames)),
        "audio": torch.stack([audio[start : start + samples] for start in starts]),
    }


def folder_clips(folder, split, modalities, fps, size, sample_rate):
    """Windows of every usable clip of a folder; split "held": every tenth file, "train": the rest (one file: both)."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file() and not path.name.startswith("."))
    held = files[::10]
    chosen = held if split == "held" else [path for path in files if path not in held or len(files) == 1]
    parts = []
    for path in chosen:
        try:
            parts.append(clip_windows(path, modalities, fps, size, sample_rate))
        except ValueError as why:
            print(f"skipped {path.name}: {why}", file=sys.stderr)
    if not parts:
        raise ValueError(f"no usable clip among the {len(chosen)} files of {folder} that are set aside to {split}")
    return {m: torch.cat([part[m] for part in parts]) for m in parts[0]}


def read_latents(path):
    """-> latents dict of float32 (n, N_m, *grid, d_m), modalities; ValueError says what is wrong with the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as why:  # np.load raises many kinds on a file that is no .npz
        raise ValueError(f"{path} is no .npz of plain arrays ({why})") from None
    names = [k for k in arrays if f"{k}_edges" in arrays]
    if sorted(names) != ["audio", "video"]:
        raise ValueError(f"{path} must hold video, audio, video_edges and audio_edges; it holds {', '.join(arrays)}")
    latents, modalities = {}, []
    for name in ("video", "audio"):
        z, edges = arrays[name], arrays[f"{name}_edges"]
        if z.dtype.kind not in "fiu" or edges.dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} and {name}_edges must hold real numbers, not {z.dtype} and {edges.dtype}")
        if (
            z.ndim != (5 if name == "video" else 3)
            or len(z) != len(arrays["video"])
            or edges.shape != (z.shape[1] + 1,)
        ):
            raise ValueError(f"{path}: {name} {z.shape} does not fit {name}_edges {edges.shape}, or video's clips")
        if len(z) < 2 or not z.size:
            raise ValueError(f"{path}: {name} {z.shape} is too little: two clips or more, and no axis of length 0")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named below
            z, edges = z.astype(np.float32), edges.astype(np.float64)
        if not (np.isfinite(z).all() and np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
            raise ValueError(f"{path}: {name} holds values that are not finite, or edges that do not rise")
        latents[name] = torch.from_numpy(z)
        modalities.append(Modality(name, z.shape[2:-1], z.shape[-1], tuple(edges.tolist())))
    return latents, modalities


# ---------------------------------------------------------------------------------------
# One door for all of them: `data` is "toy", a folder or a .npz
# ---------------------------------------------------------------------------------------


def is_latents(data):
    return str(data).endswith(".npz")


def load_clips(data, split, modalities, fps, size, sample_rate, count=None, frames=FRAMES):
    """-> clips of the split "train" (toy: 4096, seed 0) or "held" (toy: 1024, seed 1), the first `count` of them.

    The toy world goes on for as many frames as one likes; other clips last as long as the model's window.
    """
    if data == "toy":
        full, seed = {"train": (4096, 0), "held": (1024, 1)}[split]
        clips, _ = toy_clips(full if count is None else min(count, full), seed, frames)
    elif is_latents(data):
        latents, _ = read_latents(data)
        chosen = torch.arange(len(latents["video"])) % 10 == 0
        clips = {m: z[chosen if split == "held" else ~chosen] for m, z in latents.items()}
    else:
        clips = folder_clips(data, split, modalities, fps, size, sample_rate)
    return {m: x[:count] for m, x in clips.items()}


def make_tokenizers(data, modalities, size, sample_rate):
    """-> dict of tokenizers for this kind of data, not fitted."""
    if is_latents(data):
        return nn.ModuleDict({m.name: Standardize(m) for m in modalities})
    video, audio = modalities
    return nn.ModuleDict({"video": PatchTokenizer(video, size), "audio": SpectrumTokenizer(audio, sample_rate)})


def in_chunks(function, x, size=128):
    """Apply a tokenizer's encode or decode to a few clips at a time, to bound memory."""
    return torch.cat([function(part) for part in x.split(size)])
