"""The data: a toy world, folders of clips, files of latents; and the tokenizers between clips and latents.

Clips are dicts {"video": uint8 (n, F, H, W, 3), "audio": float32 (n, samples)}. A .npz's latents stand in for clips.
First come the three kinds of data that `--data` can name; then the toy world, the tokenizers, and how files are read.
"""

import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from avdit import PRESETS, Layout, Modality, av_modalities

Media = namedtuple("Media", "fps size sample_rate")  # the format of clips; size is their height and width in pixels
TOY, FRAMES = Media(8, 32, 8000), 17  # of the toy world
HOPS = 8  # spectra in one audio segment

# --- The three kinds of data ------------------------------------------------------------------------------------------
# Each has a default preset and format. A checkpoint brings its layout: sampling needs no data if nothing is given.


def kind_of(path):
    """The class for what `--data` names."""
    return ToyWorld if path == "toy" else Latents if str(path).lower().endswith(".npz") else Folder


def open_data(path, media, layout=None):
    """An object of kind_of(path). Raises ValueError if the data or the format cannot be used."""
    kind = kind_of(path)
    if kind is not Folder and media != kind.media:
        raise ValueError(f"--fps, --size and --sample-rate are for a folder of clips, not for {path}")
    return kind(path, media, layout)


class ToyWorld:
    """4096 training clips (seed 0) and 1024 held-out clips (seed 1)."""

    preset, media, decodes = "toy", TOY, True  # decodes: latents become picture and sound

    def __init__(self, path, media, layout=None):
        self.layout = layout or Layout(PRESETS["toy"].modalities)

    def tokenizers(self):
        return media_tokenizers(self.layout, TOY, residual=False)  # the whole scene moves

    def training_clips(self):
        """-> clips, names of held-out files, a checksum by which the data are known again."""
        return toy_clips(4096, 0)[0], [], 0

    def held_out_clips(self, names, count, seconds):
        """-> clips: at most `count` of them, `seconds` long. `names` are those of the held-out files."""
        return toy_clips(min(count, 1024), 1, round(seconds * TOY.fps))[0]


class Folder:
    """Clips with picture and sound, in any container that ffmpeg reads. A tenth of the usable files is held out."""

    preset, media, decodes = "clips", Media(8, 64, 16000), True
    PATCH = 32  # pixels of a token

    def __init__(self, path, media, layout=None):
        self.path, self.media = Path(path), media
        if layout is None and not os.path.isdir(path):
            raise ValueError(f"--data {path} is neither toy nor a folder nor a .npz file")
        if media.size % self.PATCH:
            raise ValueError(f"--size {media.size} is not a multiple of {self.PATCH}")
        per_hop = HOPS * media.fps
        if media.sample_rate % per_hop or media.sample_rate < 8 * per_hop:
            nearest = per_hop * max(8, round(media.sample_rate / per_hop))
            raise ValueError(f"--sample-rate must be a multiple of {per_hop}, at least {8 * per_hop}: use {nearest}")
        side = media.size // self.PATCH
        # As in PRESETS["clips"]: few tokens with many channels cost a fraction of many small tokens, and show as much.
        self.layout = layout or Layout(av_modalities(media.fps, (side, side), 192, 1 / media.fps, 96))

    def tokenizers(self):
        return media_tokenizers(self.layout, self.media, residual=True)

    def training_clips(self):
        """A window starts at every frame; windows share memory."""
        paths = sorted(path for path in self.path.iterdir() if path.is_file() and not path.name.startswith("."))
        cores = os.cpu_count() // int(os.getenv("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes share them
        with ThreadPoolExecutor(max(1, cores)) as pool:  # each thread waits for one ffmpeg
            parts = dict(usable(paths, lambda path: clip_windows(path, self.layout, self.media, every=1), pool.map))
        if not parts:
            raise ValueError(f"no usable clip among the {len(paths)} files of {self.path}, without its subfolders")
        if len(parts) == 1:
            print(f"{next(iter(parts))} is the only usable file: it is trained on and held out")
        names, files = held_out(parts), [(path.name, path.stat().st_size) for path in paths if path.name in parts]
        clips = joined([parts[name] for name in parts if name not in names] or list(parts.values()))
        return clips, names, zlib.crc32(repr(files).encode())

    def held_out_clips(self, names, count, seconds):
        paths = [self.path.resolve(strict=True) / name for name in names]  # raises OSError if the folder is gone
        found = usable(paths, lambda path: clip_windows(path, self.layout, self.media, seconds))
        parts = [clips for _, clips in islice(found, count)]
        if not parts:
            raise ValueError(f"none of the {len(names)} held-out files is usable in {self.path}: use --data or --input")
        return {name: torch.stack(x[:count]) for name, x in joined(parts).items()}


class Latents:
    """A .npz of latents. Every tenth clip is held out. Its name is a checksum: no other latents pass for held-out."""

    preset, media, decodes = "clips", TOY, False  # media: a placeholder, flags for it are refused

    def __init__(self, path, media, layout=None):
        self.path, self.layout = path, layout or read_latents(path)[1]

    def tokenizers(self):
        return Tokenizers(self.layout, {m.name: Standardize(m) for m in self.layout.modalities})

    def training_clips(self):
        latents, _, checksum = read_latents(self.path)
        return {name: x[torch.arange(len(x)) % 10 > 0] for name, x in latents.items()}, [checksum], checksum

    def held_out_clips(self, names, count, seconds):
        latents, _, checksum = read_latents(self.path)
        if [checksum] != names:
            raise ValueError(f"{self.path} does not hold the latents of the training: name their file with --data")
        return {name: x[::10][:count] for name, x in latents.items()}


def held_out(names):
    """A tenth of the names, by a hash, so that one more file does not move any other; but one at least, and not all."""
    rank = {name: zlib.crc32(os.fsencode(name)) for name in names}
    tenth = sorted(name for name in rank if rank[name] % 10 == 0)
    return tenth if 0 < len(tenth) < len(rank) else [min(rank, key=rank.get)]


def joined(parts):
    """Dicts of lists -> the dict of the joined lists."""
    return {name: [x for part in parts for x in part[name]] for name in parts[0]}


# --- The toy world: a ball you can hear. Pitch is height, timbre is colour. -------------------------------------------

PIXELS = torch.arange(TOY.size) / (TOY.size - 1)  # where pixel k lies, as a share of the picture
THIRDS = 2 * math.pi * torch.arange(3) / 3  # the three colour channels on the hue circle


def mirror(q):
    """Triangle wave: q reflected into 0..1."""
    return 1 - (q % 2 - 1).abs()


def toy_clips(n, seed, frames=FRAMES):
    """-> clips, truth: n toy clips; truth is {"position": (n, frames, 2) x and y in 0..1, "hue": (n,) in 0..1}."""
    draws = np.random.default_rng(seed).random((n, 6))
    parts = [render(torch.from_numpy(d), frames) for d in np.array_split(draws, math.ceil(n / 256))]  # pop frees them
    return tuple({name: torch.cat([part.pop(name) for part in some]) for name in list(some[0])} for some in zip(*parts))


def render(draws, frames=FRAMES):
    """Six uniform numbers per clip, (n, 6) -> clips, truth. mirror() has period 2: a start is place and direction."""
    start, velocity, hue, phase = 2 * draws[:, None, :2], 2 * draws[:, None, 2:4] - 1, draws[:, 4:5], draws[:, 5:6]
    position = mirror(start + velocity * torch.arange(frames)[:, None] / TOY.fps)  # (n, frames, 2)
    x, y = (0.18 + 0.64 * position).float()[..., None, None, :].unbind(-1)
    distance = ((PIXELS - x) ** 2 + (PIXELS[:, None] - y) ** 2).sqrt()  # (n, frames, 32, 32)
    colour = 0.5 + 0.5 * torch.cos(2 * math.pi * hue + THIRDS).float()  # (n, 3)
    video = torch.sigmoid(30 * (0.16 - distance))[..., None] * colour[:, None, None, None]
    seconds = torch.arange(frames * TOY.sample_rate // TOY.fps) / TOY.sample_rate
    frequency = 300 * 2 ** (1.5 * (1 - mirror(start[..., 1] + velocity[..., 1] * seconds)))  # Hz; y points down
    turns = F.pad((frequency[:, 1:] + frequency[:, :-1]) / 2 / TOY.sample_rate, (1, 0)).cumsum(1)  # trapezoidal rule
    phi, angle = 2 * math.pi * (phase + turns), 2 * math.pi * hue
    second, third = (0.3 * (0.5 + 0.5 * f(angle)) for f in (torch.cos, torch.sin))
    audio = 0.8 * (0.5 * phi.sin() + second * (2 * phi).sin() + third * (3 * phi).sin())
    clips = {"video": (255 * video).round().byte(), "audio": audio.float()}
    return clips, {"position": position.float(), "hue": hue[:, 0].float()}


# --- Tokenizers in closed form, in place of the paper's MAGVIT-v2 and SoundStream [Sec. 4] ----------------------------
# Latents have zero mean and unit variance per channel [App. B]. The tokenizers travel in the checkpoint.


class Components(nn.Module):
    """Principal components, x (..., D) <-> z (..., C): z = (x - mean) V diag(sigma)^(-1/2) R diag(std)^(-1).

    The columns of V are components, sigma their standard deviations. Division by sigma would make faint components as
    large as strong ones; undivided, they would never be learned. The random rotation R makes the channels equally
    important, and std gives them unit variance. Channels beyond the data's rank are zero."""

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
            _, S, V = torch.svd_lowrank(x - self.mean, min(rank + 16, *x.shape), niter=4)  # x - mean = U diag(S) V^T
            rank = int((S[:rank] > 1e-5 * x.norm()).sum())  # fainter components are rounding errors
            R = torch.linalg.qr(torch.randn(rank, rank))[0]
        V = (V * V.gather(0, V.abs().argmax(0)[None]).sign())[:, :rank]  # makes the arbitrary signs unique
        root = (S[:rank] / len(x) ** 0.5).sqrt()  # sqrt(sigma)
        std = ((x - self.mean) @ V / root @ R).norm(dim=0) / len(x) ** 0.5
        self.into[:, :rank] = V / root @ R / std
        self.back[:rank] = std[:, None] * R.T @ (V * root).T  # the inverse on the space of the components

    def encode(self, x):
        return (x - self.mean) @ self.into

    def decode(self, z):
        return z @ self.back + self.mean


class PatchTokenizer(nn.Module):
    """uint8 video (n, 1 + 4 k, H, W, 3) <-> z (n, 1 + k, h, w, d): components of 1-frame, then of 4-frame patches.

    With `residual`, later segments encode the residual of a linear prediction from the first frame; a real clip's
    static scene would fill them otherwise. As in the paper's causal tokenizer, no segment depends on later frames."""

    def __init__(self, modality, size, residual):
        super().__init__()
        self.patch, self.residual = size // modality.grid[0], residual
        self.first = Components(self.patch**2 * 3, modality.channels)
        self.later = Components(4 * self.patch**2 * 3, modality.channels)
        self.register_buffer("slope", torch.zeros(modality.channels, 4 * self.patch**2 * 3))  # of the prediction

    def patches(self, video, frames):  # (n, k frames, H, W, 3) -> (n, k, h, w, D)
        pattern = "n (k f) (h p) (w q) c -> n k h w (f p q c)"
        return rearrange(video.float() / 255, pattern, f=frames, p=self.patch, q=self.patch)

    def pixels(self, x, frames):  # (n, k, h, w, D) -> (n, k frames, H, W, 3)
        pattern = "n k h w (f p q c) -> n (k f) (h p) (w q) c"
        return rearrange(x, pattern, f=frames, p=self.patch, q=self.patch, c=3)

    def fit(self, video):
        self.first.fit(features_of(lambda x: self.patches(x[:, ::4], 1), video))  # every frame can be a first one

        def pairs(x):  # the first frame's latents beside each later patch
            later, z = self.patches(x[:, 1:], 4), self.first.encode(self.patches(x[:, :1], 1))
            return torch.cat([z.expand(*later.shape[:-1], -1), later], -1)

        z, later = features_of(pairs, video).split(self.slope.shape, -1)
        if self.residual:
            self.slope.copy_(torch.linalg.pinv(z, rtol=1e-2) @ (later - later.mean(0)))
        self.later.fit(later - z @ self.slope)

    def encode(self, video):
        z = self.first.encode(self.patches(video[:, :1], 1))
        return torch.cat([z, self.later.encode(self.patches(video[:, 1:], 4) - z @ self.slope)], 1)

    def decode(self, z):
        first, later = self.first.decode(z[:, :1]), self.later.decode(z[:, 1:]) + z[:, :1] @ self.slope
        video = torch.cat([self.pixels(first, 1), self.pixels(later, 4)], 1)
        return (255 * video.clamp(0, 1)).round().byte()


class SpectrumTokenizer(nn.Module):
    """float32 sound (n, samples) <-> z (n, N, d): components of the square-root magnitudes of a segment's 8 spectra,
    one per hop, in windows of about two hops. Griffin-Lim finds the phases. Sound after the last segment is trimmed."""

    def __init__(self, modality, sample_rate):
        super().__init__()
        self.N = modality.N
        self.hop = int((modality.edges[1] - modality.edges[0]) * sample_rate + 1e-6) // HOPS
        self.size = 2 ** round(math.log2(2 * self.hop))
        self.bins = Components(HOPS * (self.size // 2 + 1), modality.channels)
        self.register_buffer("hann", torch.hann_window(self.size), persistent=False)

    def stft(self, sound):  # (n, (hops - 1) * hop + size) -> complex (n, lines, hops)
        return torch.stft(sound, self.size, self.hop, window=self.hann, center=False, return_complex=True)

    def istft(self, spectrum):
        """Overlap-add, divided by the sum of squared windows. torch.istft refuses windows that end in 0."""
        window, length = self.hann[:, None], (spectrum.shape[-1] - 1) * self.hop + self.size
        overlap_add = partial(F.fold, output_size=(1, length), kernel_size=(1, self.size), stride=(1, self.hop))
        sound = overlap_add(torch.fft.irfft(spectrum, self.size, dim=1) * window).flatten(1)
        return sound / overlap_add((window**2).expand(1, -1, spectrum.shape[-1])).flatten(1).clamp(min=1e-8)

    def griffin_lim(self, magnitude, rounds=60, momentum=0.99):
        """(n, lines, hops) -> (n, samples), by the fast Griffin-Lim algorithm (Perraudin et al. 2013)."""
        generator = torch.Generator().manual_seed(0)  # the same first phases for every clip, whatever the batch
        phase = 2 * math.pi * torch.rand(magnitude.mT.shape[1:], generator=generator).T.to(magnitude.device)
        angle, before = torch.polar(torch.ones_like(phase), phase), 0
        for _ in range(rounds):
            now = self.stft(self.istft(magnitude * angle))  # the spectrum of a real sound
            angle, before = now - before * momentum / (1 + momentum), now  # extrapolated
            angle = angle / angle.abs().clamp(min=1e-8)  # its phases, for the wanted magnitudes
        start = (self.size - self.hop) // 2
        return self.istft(magnitude * angle)[:, start : start + magnitude.shape[-1] * self.hop]

    def features(self, sound):
        start = torch.arange(self.N * HOPS) * self.hop - (self.size - self.hop) // 2
        start = start.clamp(0, self.N * HOPS * self.hop - self.size)  # windows at the ends move inside the clip
        frames = sound[:, start[:, None] + torch.arange(self.size)]  # (n, hops, size)
        magnitude = torch.fft.rfft(frames * self.hann).abs()
        return rearrange(magnitude.sqrt(), "n (k hops) lines -> n k (hops lines)", hops=HOPS)

    def fit(self, sound):
        self.bins.fit(features_of(self.features, sound))

    def encode(self, sound):
        return self.bins.encode(self.features(sound))

    def decode(self, z):  # any number of segments
        root = rearrange(self.bins.decode(z), "n k (hops lines) -> n lines (k hops)", hops=HOPS)
        return self.griffin_lim(root.clamp(min=0) ** 2).clamp(-1, 1)


class Standardize(nn.Module):
    """Latents of another tokenizer <-> z: zero mean and unit variance per channel, nothing else."""

    def __init__(self, modality):
        super().__init__()
        self.register_buffer("mean", torch.zeros(modality.channels))
        self.register_buffer("std", torch.ones(modality.channels))

    def fit(self, latents):
        flat = latents.flatten(0, -2)
        self.mean.copy_(flat.mean(0, dtype=torch.float64))  # exact, so that a constant channel becomes zero
        self.std.copy_((flat - self.mean).std(0).clamp(min=1e-6 * flat.std().item() or 1))

    def encode(self, latents):
        return (latents - self.mean) / self.std

    def decode(self, z):
        return z * self.std + self.mean


class Tokenizers(nn.ModuleDict):
    """One tokenizer per modality: clips <-> z (n, E)."""

    def __init__(self, layout, tokenizers):
        super().__init__(tokenizers)
        self.layout = layout

    def fit(self, clips):
        for name, tokenizer in self.items():
            tokenizer.fit(clips[name])

    def encode(self, clips):
        z = torch.empty(len(next(iter(clips.values()))), self.layout.E)
        for i in range(0, len(z), 32):  # in place, because many small results between large ones fragment the memory
            part = {name: self[name].encode(torch.stack([*x[i : i + 32]])) for name, x in clips.items()}
            z[i : i + 32] = self.layout.pack(part)
        return z

    def decode(self, z):
        return {name: in_chunks(self[name].decode, x) for name, x in self.layout.unpack(z).items()}


def media_tokenizers(layout, media, residual):
    """The tokenizers of clips with picture and sound."""
    video, audio = layout.modalities
    picture, sound = PatchTokenizer(video, media.size, residual), SpectrumTokenizer(audio, media.sample_rate)
    return Tokenizers(layout, {"video": picture, "audio": sound})


def in_chunks(function, x, size=32):
    """function(x) for x (n, ...), a few clips at a time, to bound memory."""
    return torch.cat([function(part) for part in x.split(size)])


def features_of(function, x, clips=1024, most=2**26):
    """function(x) as (n, D), to fit components on: of `clips` random clips, and not more than about 256 MiB."""
    generator = torch.Generator().manual_seed(0)
    chosen = [x[i] for i in torch.randperm(len(x), generator=generator)[:clips].sort().values]
    share = most / (len(chosen) * function(chosen[0][None]).numel())
    parts = (function(clip[None]).flatten(0, -2) for clip in chosen)
    return torch.cat([part[torch.rand(len(part), generator=generator) < share] for part in parts])


# --- Reading files ----------------------------------------------------------------------------------------------------


def ffmpeg(path, *arguments):
    """Run imageio's ffmpeg on one open file -> output, messages. It may open nothing else: it refuses playlists. No
    name is taken for an option or a pattern. It may not allocate blocks of more than 500 MB. Raises ValueError."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-v", "level+info"]
    command += ["-max_alloc", "500000000", "-protocol_whitelist", "fd", "-fd", "0", "-i", "fd:", *arguments]
    with open(path, "rb") as file:
        done = subprocess.run(command, stdin=file, capture_output=True, check=False)
    messages = done.stderr.decode(errors="replace")
    if done.returncode:
        wrong = [line for line in messages.splitlines() if "[error]" in line or "[fatal]" in line]
        raise ValueError(f"ffmpeg's status is {done.returncode}: {' ... '.join(dict.fromkeys(wrong[:1] + wrong[-1:]))}")
    return done.stdout, messages


def decode_clip(path, media):
    """-> uint8 (F, size, size, 3), float32 (samples,): its first hour, resampled and cropped; empty if there is none.

    ffmpeg chooses the streams. Its filters begin anew where a stream changes its format, so the first call only brings
    it to one format, and the others fill gaps. What starts late is preceded by its first frame, or by silence."""
    crop = "crop=min(iw\\,ih/sar):min(ih\\,iw*sar)"  # the sample aspect ratio, sar: pixels need not be square
    scale = f"scale={media.size}:{media.size}:out_color_matrix=bt709:out_primaries=bt709:out_transfer=bt709"  # HDR, too
    picture = f"fps={media.fps},{crop},{scale},setsar=1,format=rgb24"
    sound = f"aresample={media.sample_rate}:rematrix_maxval=1,aformat=channel_layouts=mono"  # at most as loud
    copy = ["-vf", picture, "-c:v", "rawvideo", "-fps_mode", "passthrough", "-af", sound, "-c:a", "pcm_f32le"]
    fill = {"rawvideo": ["-an", "-vf", f"fps={media.fps}:start_time=0", "-f", "rawvideo"],
            "pcm_f32le": ["-vn", "-af", "aresample=async=1:first_pts=0", "-f", "f32le"]}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder, "clip")
        _, messages = ffmpeg(path, *copy, "-t", "3600", "-f", "nut", clip)
        programmes = messages.split("Stream mapping:")[0].split("[info]   Program ")[1:]
        if sum("Stream #" in programme for programme in programmes) > 1:
            raise ValueError("it holds several programmes: keep one")
        raw = [f"-> {codec} " in messages and ffmpeg(clip, "-copyts", *fill[codec], "-")[0] for codec in fill]
    pixels, samples = (torch.from_numpy(np.frombuffer(x or b"", t).copy()) for x, t in zip(raw, (np.uint8, np.float32)))
    return pixels.view(-1, media.size, media.size, 3), samples.nan_to_num().clamp(-1, 1)


def clip_windows(path, layout, media, seconds=None, every=None, needed=("video", "audio")):
    """Decode a clip and cut it into windows -> {"video": list of views, "audio": list of views}. They last `seconds` or
    as long as the layout, and begin every `every` frames, or where the one before ends. What is not `needed` may end
    early or be absent: it goes on black or silent. Raises ValueError."""
    need, need_audio = [seconds or m.edges[-1] for m in layout.modalities]
    frames, samples = round(need * media.fps), round(need_audio * media.sample_rate)
    video, audio = decode_clip(path, media)
    have = f"{len(video) / media.fps:g} s of picture and {len(audio) / media.sample_rate:g} s of sound"
    if "video" not in needed:
        video = F.pad(video, (*[0] * 7, frames))
    if "audio" not in needed:
        audio = F.pad(audio, (0, samples))
    starts = [(k, round(k / media.fps * media.sample_rate)) for k in range(0, len(video) - frames + 1, every or frames)]
    parts = [(video[k : k + frames], audio[j : j + samples]) for k, j in starts if j + samples <= len(audio)]
    if not parts:
        raise ValueError(f"{have}, {need:g} s are needed")
    if "audio" in needed and audio.abs().max() < 1e-4:
        raise ValueError("its sound is silent all through")
    return dict(zip(("video", "audio"), map(list, zip(*parts))))


def usable(paths, read, mapper=map):
    """Yields (name, read(path)) for every file that can be read, names the others on stderr, and shows progress."""

    def attempt(path):
        try:
            return read(path)
        except (ValueError, OSError) as why:
            return why

    for done, (path, clips) in enumerate(zip(paths, mapper(attempt, paths)), 1):
        if isinstance(clips, Exception):
            print(f"skipped {path.name}: {clips}", file=sys.stderr)
        else:
            yield path.name, clips
        if done % 100 == 0:
            print(f"read {done} of {len(paths)} files", flush=True)


def read_latents(path):
    """-> latents, a dict of float32 (n, N_m, *grid, d_m); their Layout; a checksum of both. Raises ValueError.

    Every pair of arrays X and X_edges is a modality. "video", or else the first name, is the time reference."""
    with open(path, "rb") as file:
        try:
            arrays = dict(np.load(file, allow_pickle=False))
        except Exception as why:  # np.load raises many kinds on a file that is no .npz
            raise ValueError(f"{path} is no .npz of plain arrays ({why})") from None
    names = sorted((k for k in arrays if not k.endswith("_edges")), key=lambda name: name != "video")
    if not names or {*names, *(f"{name}_edges" for name in names)} != set(arrays):
        raise ValueError(f"{path} must hold pairs such as video and video_edges; it holds {', '.join(arrays)}")
    taken = (*dir(nn.ParameterDict()), *dir(Tokenizers), "layout", "condition", "file", "allow_pickle")
    latents, modalities, checksum = {}, [], 0
    for name in names:
        z, edges = arrays[name], arrays[f"{name}_edges"]
        if not name.isidentifier() or name in taken or name.startswith("given_") or name.endswith("_true"):
            raise ValueError(f"{path}: {name!r} cannot be a modality's name")
        if z.dtype.kind not in "fiu" or edges.dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} and {name}_edges must hold real numbers, not {z.dtype} and {edges.dtype}")
        if z.ndim < 3 or len(z) != max(2, len(arrays[names[0]])) or edges.shape != (z.shape[1] + 1,) or not z.size:
            raise ValueError(f"{path}: {name} {z.shape} must be (clips, segments, ..., channels), with the clips of "
                             f"{names[0]}, two at least, and the segments of {name}_edges {edges.shape}")  # fmt: skip
        with np.errstate(over="ignore"):  # numbers too large for float32 become infinite, and are named below
            z, edges = z.astype(np.float32, "C"), edges.astype(np.float64)
        if not (np.isfinite(z).all() and np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
            raise ValueError(f"{path}: {name} holds values that are not finite, or edges that do not rise")
        latents[name] = torch.from_numpy(z)
        modalities.append(Modality(name, z.shape[2:-1], z.shape[-1], tuple(edges.tolist())))
        checksum = zlib.crc32(z, zlib.crc32(repr(modalities[-1]).encode(), checksum))
    return latents, Layout(modalities), checksum
