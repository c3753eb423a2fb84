"""Worlds and latents: the toy world, folders of clips, files of latents, tokenizers; and what a training step sees.

Clips are dicts: {"video": uint8 (n, F, H, W, 3), "audio": float32 (n, samples)}; the clips of a .npz are its latents.
`data` is everywhere "toy", a folder or a .npz.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from avdit import PRESETS, Layout, Modality, av_modalities, sample_timesteps


class Media(NamedTuple):
    """What clips are brought to."""

    fps: int
    size: int  # height and width in pixels
    sample_rate: int


TOY, FOLDER = Media(8, 32, 8000), Media(8, 64, 16000)
HOPS = 8  # spectrum frames of one sound segment, which lasts as long as a frame of video
PATCH = 32  # pixels: a token, of a folder's clips


def is_latents(data):
    return str(data).lower().endswith(".npz")


def default_media(data):
    return TOY if data == "toy" or is_latents(data) else FOLDER


def describe(data, media):
    """-> the Layout of this data's latents. ValueError says what does not fit."""
    if data == "toy" or is_latents(data):
        if media != TOY:
            raise ValueError(f"--fps, --size and --sample-rate are for a folder of clips, not for {data}")
        return Layout(PRESETS["toy"].modalities) if data == "toy" else read_latents(data)[1]
    if not Path(data).is_dir():
        raise ValueError(f"--data {data} is neither toy nor a folder nor a .npz file")
    if media.size % PATCH:
        raise ValueError(f"--size {media.size} is not a multiple of {PATCH}")
    per_hop = HOPS * media.fps
    if media.sample_rate % per_hop or media.sample_rate < 8 * per_hop:
        nearest = per_hop * max(8, round(media.sample_rate / per_hop))
        raise ValueError(f"--sample-rate {media.sample_rate} must be a multiple of {HOPS} x --fps = {per_hop}, and at "
                         f"least 8 of it: use {nearest}")  # fmt: skip
    side = media.size // PATCH
    # Real clips need more components than the ball to be recognised. Few wide tokens cost a fraction of many small ones,
    # and show as much.
    return Layout(av_modalities(media.fps, (side, side), 192, 1 / media.fps, 96))


# --- The toy world: a ball you can hear. Pitch is height, timbre is colour. -------------------------------------------

FRAMES = 17
PIXELS = torch.arange(TOY.size) / (TOY.size - 1)  # where pixel k lies, as a share of the picture
THIRDS = 2 * math.pi * torch.arange(3) / 3  # the three colour channels on the hue circle


def mirror(q):
    """Triangle wave: q mirrored into 0..1."""
    return 1 - (q % 2 - 1).abs()


def toy_clips(n, seed, frames=FRAMES):
    """-> clips, truth: n toy clips; truth {"position": (n, frames, 2) x and y in 0..1, "hue": (n,) in 0..1}."""
    draws = np.random.default_rng(seed).random((n, 6))
    parts = [render(torch.from_numpy(d), frames) for d in np.array_split(draws, math.ceil(n / 256))]
    clips, truth = zip(*parts)
    return joined(clips), joined(truth)


def joined(dicts):
    return {k: torch.cat([d.pop(k) for d in dicts]) for k in list(dicts[0])}  # pop: parts are freed one by one


def render(draws, frames=FRAMES):
    """Six uniform numbers a clip, (n, 6) -> clips, truth."""
    start, velocity, hue, phase = 2 * draws[:, None, :2], 2 * draws[:, None, 2:4] - 1, draws[:, 4:5], draws[:, 5:6]
    position = mirror(start + velocity * torch.arange(frames)[:, None] / TOY.fps)  # (n, frames, 2)
    x, y = (0.18 + 0.64 * position).float()[..., None, None, :].unbind(-1)
    distance = ((PIXELS - x) ** 2 + (PIXELS[:, None] - y) ** 2).sqrt()  # (n, frames, 32, 32)
    colour = 0.5 + 0.5 * torch.cos(2 * math.pi * hue + THIRDS).float()  # (n, 3)
    video = torch.sigmoid(30 * (0.16 - distance))[..., None] * colour[:, None, None, None]
    seconds = torch.arange(frames * TOY.sample_rate // TOY.fps) / TOY.sample_rate
    frequency = 300 * 2 ** (1.5 * (1 - mirror(start[..., 1] + velocity[..., 1] * seconds)))  # (n, samples), Hz
    turns = F.pad((frequency[:, 1:] + frequency[:, :-1]) / 2 / TOY.sample_rate, (1, 0)).cumsum(1)  # trapezoidal
    phi, angle = 2 * math.pi * (phase + turns), 2 * math.pi * hue
    second, third = (0.3 * (0.5 + 0.5 * f(angle)) for f in (torch.cos, torch.sin))
    audio = 0.8 * (0.5 * phi.sin() + second * (2 * phi).sin() + third * (3 * phi).sin())
    clips = {"video": (255 * video).round().byte(), "audio": audio.float()}
    return clips, {"position": position.float(), "hue": hue[:, 0].float()}


# --- Tokenizers in closed form, in place of the paper's MAGVIT-v2 and SoundStream [Sec. 4] ----------------------------
# Their latents have zero mean and unit variance per channel [App. B]. Their state_dict travels in the checkpoint.


class Components(nn.Module):
    """Principal components: x (..., D) -> z (..., C), every channel with zero mean and unit variance.

    If each component were brought to unit variance, the faint ones would weigh as much as the ball itself and the model
    would spend its time on them; if none were, it would never learn the faint ones. So their standard deviations become
    their square roots, and a random rotation then spreads the components evenly over the channels; it changes no
    distance. Channels beyond the rank of the data stay zero: all of them, where the data is constant.
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
            rank = int((scale[:rank] > 1e-5 * x.norm()).sum())  # what is fainter is rounding
            basis = basis * basis.gather(0, basis.abs().argmax(0)[None]).sign()  # of the two signs always the same one
            rotation = torch.linalg.qr(torch.randn(rank, rank))[0]
        root = (scale[:rank] / len(x) ** 0.5).sqrt()  # of the components' standard deviations
        std = (((x - self.mean) @ basis[:, :rank] / root) @ rotation).norm(dim=0) / len(x) ** 0.5
        self.into[:, :rank] = (basis[:, :rank] / root) @ rotation / std
        self.back[:rank] = std[:, None] * rotation.T @ (basis[:, :rank] * root).T

    def encode(self, x):
        return (x - self.mean) @ self.into

    def decode(self, z):
        return z @ self.back + self.mean


class PatchTokenizer(nn.Module):
    """uint8 video (n, 1 + 4 k, H, W, 3) <-> z (n, 1 + k, h, w, d): components of 1-frame, then of 4-frame patches.

    Of a scene that stays, pose and light would fill the later segments too, and a mouth's movement would be one part in
    a hundred of them. So what a linear regression on the first frame expects is taken off: what moves is left. The
    paper's causal structure (no frame knows a later one) holds. Where everything moves, `stays` is False.
    """

    def __init__(self, modality, size, stays=True):
        super().__init__()
        self.patch, self.stays = size // modality.grid[0], stays
        self.first = Components(self.patch**2 * 3, modality.channels)
        self.later = Components(4 * self.patch**2 * 3, modality.channels)
        self.register_buffer("expect", torch.zeros(self.later.into.mT.shape))  # (d, D)

    def patches(self, video, frames):  # (n, frames k, H, W, 3) -> (n, k, h, w, D)
        pattern = "n (k f) (h p) (w q) c -> n k h w (f p q c)"
        return rearrange(video.float() / 255, pattern, f=frames, p=self.patch, q=self.patch)

    def picture(self, x, frames):
        pattern = "n k h w (f p q c) -> n (k f) (h p) (w q) c"
        return rearrange(x, pattern, f=frames, p=self.patch, q=self.patch, c=3)

    def fit(self, video):
        self.first.fit(rows(lambda part: self.patches(part[:, ::4], 1), video))  # any frame may serve as a first one

        def both(part):  # the first frame's latents beside each later patch
            later, z = self.patches(part[:, 1:], 4), self.first.encode(self.patches(part[:, :1], 1))
            return torch.cat([z.expand(*later.shape[:-1], -1), later], -1)

        z, later = rows(both, video).split(self.expect.shape, -1)
        if self.stays:
            self.expect.copy_(torch.linalg.pinv(z, rtol=1e-2) @ (later - later.mean(0)))
        self.later.fit(later - z @ self.expect)

    def encode(self, video):
        z = self.first.encode(self.patches(video[:, :1], 1))
        return torch.cat([z, self.later.encode(self.patches(video[:, 1:], 4) - z @ self.expect)], 1)

    def decode(self, z):
        first, later = self.first.decode(z[:, :1]), self.later.decode(z[:, 1:]) + z[:, :1] @ self.expect
        video = torch.cat([self.picture(first, 1), self.picture(later, 4)], 1)
        return (255 * video.clamp(0, 1)).round().byte()


class SpectrumTokenizer(nn.Module):
    """float32 sound (n, samples) <-> z (n, N, d): components of the square-root magnitudes of a segment's frames.

    A segment has 8 frames, one centred on each hop, in windows of about two hops: it hears half a hop beyond its ends.
    Phase is not kept; Griffin-Lim finds one that fits. Sound after the last whole segment is trimmed.
    """

    def __init__(self, modality, sample_rate):
        super().__init__()
        self.N = modality.N
        self.hop = int((modality.edges[1] - modality.edges[0]) * sample_rate + 1e-6) // HOPS
        self.size = 2 ** round(math.log2(2 * self.hop))
        self.bins = Components(HOPS * (self.size // 2 + 1), modality.channels)
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)

    def stft(self, sound):  # (n, (hops - 1) * hop + size) -> complex (n, lines, hops)
        return torch.stft(sound, self.size, self.hop, window=self.window, center=False, return_complex=True)

    def istft(self, spectrum):
        """Least squares: overlap-add, over the sum of squared windows. (torch.istft refuses windows that end in 0.)"""

        def overlap(x):  # (n, size, hops) -> (n, samples)
            length = (x.shape[-1] - 1) * self.hop + self.size
            return F.fold(x, (1, length), (1, self.size), stride=(1, self.hop)).flatten(1)

        window = self.window[:, None]
        sound = overlap(torch.fft.irfft(spectrum, self.size, dim=1) * window)
        return sound / overlap((window**2).expand(1, -1, spectrum.shape[-1])).clamp(min=1e-8)

    def griffin_lim(self, magnitude, rounds=60, momentum=0.99):  # (n, lines, hops) -> (n, samples)
        seed = torch.Generator().manual_seed(0)  # the same first guess for every clip, whatever the batch
        phase = 2 * math.pi * torch.rand(magnitude.mT.shape[1:], generator=seed).T.to(magnitude.device)
        angle, before = torch.polar(torch.ones_like(phase), phase), 0
        for _ in range(rounds):
            now = self.stft(self.istft(magnitude * angle))
            angle, before = now - before * momentum / (1 + momentum), now
            angle = angle / angle.abs().clamp(min=1e-8)
        start = (self.size - self.hop) // 2
        return self.istft(magnitude * angle)[:, start : start + magnitude.shape[-1] * self.hop]

    def features(self, sound):
        # A window that reached into the silence beyond the clip would hear a click: it is moved inside.
        start = torch.arange(self.N * HOPS) * self.hop - (self.size - self.hop) // 2
        start = start.clamp(0, self.N * HOPS * self.hop - self.size)
        frames = sound[:, start[:, None] + torch.arange(self.size)]  # (n, hops, size)
        magnitude = torch.fft.rfft(frames * self.window).abs()
        return rearrange(magnitude.sqrt(), "n (k hops) lines -> n k (hops lines)", hops=HOPS)

    def fit(self, sound):
        self.bins.fit(rows(self.features, sound))

    def encode(self, sound):
        return self.bins.encode(self.features(sound))

    def decode(self, z):  # of any number of segments
        root = rearrange(self.bins.decode(z), "n k (hops lines) -> n lines (k hops)", hops=HOPS)
        return self.griffin_lim(root.clamp(min=0) ** 2).clamp(-1, 1)


class Standardize(nn.Module):
    """Latents of any other tokenizer <-> z: zero mean and unit variance per channel, nothing else."""

    def __init__(self, modality):
        super().__init__()
        self.register_buffer("mean", torch.zeros(modality.channels))
        self.register_buffer("std", torch.ones(modality.channels))

    def fit(self, latents):
        flat = latents.flatten(0, -2)
        self.mean.copy_(flat.mean(0, dtype=torch.float64))  # exact, so that a constant channel becomes zero
        self.std.copy_((flat - self.mean).std(0).clamp(min=1e-6))

    def encode(self, latents):
        return (latents - self.mean) / self.std

    def decode(self, z):
        return z * self.std + self.mean


class Tokenizers(nn.ModuleDict):
    """The tokenizer of every modality: clips <-> z (n, E)."""

    def __init__(self, data, layout, media):
        parts = {m.name: Standardize(m) for m in layout.modalities}
        if not is_latents(data):
            video, audio = layout.modalities
            parts = {"video": PatchTokenizer(video, media.size, stays=data != "toy")}
            parts["audio"] = SpectrumTokenizer(audio, media.sample_rate)
        super().__init__(parts)
        self.layout = layout

    def fit(self, clips):
        for name, tokenizer in self.items():
            tokenizer.fit(clips[name])

    def encode(self, clips):
        return self.layout.pack({name: in_chunks(self[name].encode, x) for name, x in clips.items()})

    def decode(self, z):
        return {name: in_chunks(self[name].decode, x) for name, x in self.layout.unpack(z).items()}


def in_chunks(function, x, size=32):
    """Apply a function to a few clips at a time, to bound memory. x: (n, ...), or n clips that may overlap in memory."""
    return torch.cat([function(torch.stack([*x[i : i + size]])) for i in range(0, len(x), size)])


def rows(features, x, clips=1024, most=2**26):
    """features(x) as (rows, D) to fit components on: of `clips` clips at random, for folders are in order, all rows or
    a random share of them that holds about `most` numbers (256 MiB)."""
    generator = torch.Generator().manual_seed(0)
    chosen = [x[i] for i in torch.randperm(len(x), generator=generator)[:clips].sort().values]
    share = most / (len(chosen) * features(chosen[0][None]).numel())

    def some(part):
        every = features(part).flatten(0, -2)
        return every[torch.rand(len(every), generator=generator) < share]

    return in_chunks(some, chosen)


# --- Folders of clips, files of latents -------------------------------------------------------------------------------


def ffmpeg(path, *arguments):
    """Run imageio's ffmpeg on one file -> what it says. ValueError for a file that takes too long.

    It reads an open file and may open nothing else: a playlist is refused, whatever it names, and no name is ever taken
    for an option or a pattern. It also refuses files with blocks of 500 MB.
    """
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-max_alloc", "500000000"]
    command += ["-protocol_whitelist", "fd", "-fd", "0", "-i", "fd:", *arguments]
    try:
        with open(path, "rb") as file:
            done = subprocess.run(command, stdin=file, capture_output=True, check=False, timeout=900)
    except subprocess.TimeoutExpired:
        raise ValueError("ffmpeg has not decoded it in 15 minutes") from None
    return done.stderr.decode(errors="replace")


def best_streams(path):
    """-> "0:i" of the largest picture, "0:j" of the finest sound; ValueError where one is missing."""
    text = ffmpeg(path)  # without an output ffmpeg lists the streams and stops; metadata stand further to the right
    best = {}
    for index, kind, line in re.findall(r"^  Stream #(0:\d+).*?: (Video|Audio): (.*)", text, re.MULTILINE):
        size = re.search(r"\b([1-9]\d*)x(\d+)\b" if kind == "Video" else r"\b(\d+) Hz", line)
        if size and "attached pic" not in line:
            area = math.prod(int(x) for x in size.groups())
            best[kind] = max(best.get(kind, (0, "")), (area, index), key=lambda pair: pair[0])
    for kind, word in (("Video", "picture"), ("Audio", "sound")):
        if kind not in best:
            raise ValueError(f"no {word}" if best else "ffmpeg finds neither picture nor sound in it")
    return best["Video"][1], best["Audio"][1]


def decode_clip(path, media):
    """-> uint8 (F, size, size, 3), float32 (samples,) of its first hour, resampled and centre cropped. ValueError.

    One call decodes both, and so measures their times from one origin. What starts later than the other is preceded by
    its first frame, or by silence.
    """
    video, audio = best_streams(path)
    square = "crop=min(iw\\,ih/sar):min(ih\\,iw*sar)"  # of what is seen: pixels need not be square
    picture = ["-map", video, "-vf", f"fps={media.fps}:start_time=0,{square},scale={media.size}:{media.size}"]
    picture += ["-t", "3600", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    sound = ["-map", audio, "-af", "aresample=async=1:first_pts=0,aformat=channel_layouts=mono|stereo"]
    sound += ["-t", "3600", "-ar", str(media.sample_rate), "-f", "wav", "-c:a", "pcm_f32le"]
    with tempfile.TemporaryDirectory() as folder:
        pixels, wav = Path(folder, "pixels"), Path(folder, "wav")
        error = ffmpeg(path, "-v", "error", *picture, pixels, *sound, wav)
        try:
            frames, shape = np.fromfile(pixels, np.uint8), (-1, media.size, media.size, 3)
            frames = frames[: frames.size - frames.size % math.prod(shape[1:])].reshape(shape)
            samples, _ = soundfile.read(wav, dtype="float32", always_2d=True)
        except (OSError, soundfile.SoundFileError):
            frames, samples = [], []
    if not len(frames) or not len(samples):
        raise ValueError(f"ffmpeg cannot decode it ({(error.splitlines() or ['no output'])[-1]})")
    left, right = torch.from_numpy(samples).nan_to_num().mT[[0, -1]]
    phase = 1 if left @ right >= 0 else -1  # or two channels that mirror each other would be silent
    return torch.from_numpy(frames), ((left + phase * right) / 2).clamp(-1, 1)


def clip_windows(path, layout, media, seconds=None, every=None):
    """Decode a clip and cut it into windows of the model's length, or as long as one likes -> clips, as lists of views.

    They start `every` so many frames, or end to end. ValueError if it is too short, or silent all through.
    """
    video, audio = decode_clip(path, media)
    need, sound = (m.edges[-1] for m in layout.modalities)  # seconds
    need, sound = seconds or need, seconds or sound
    frames, samples = round(need * media.fps), round(sound * media.sample_rate)
    starts = [(k, round(k / media.fps * media.sample_rate)) for k in range(0, len(video) - frames + 1, every or frames)]
    starts = [(frame, sample) for frame, sample in starts if sample + samples <= len(audio)]
    if not starts:
        have = min(len(video) / media.fps, len(audio) / media.sample_rate)
        raise ValueError(f"{have:.2f} s of picture and sound, {need:.2f} s are needed")
    if audio.abs().max() < 1e-4:
        raise ValueError("its sound is silent all through")
    return {
        "video": [video[frame : frame + frames] for frame, _ in starts],
        "audio": [audio[sample : sample + samples] for _, sample in starts],
    }


def usable(paths, read, map=map):
    """Yield (name, read(path)) of all files that can be read, and name the others on stderr. Shows progress."""

    def attempt(path):
        try:
            return read(path)
        except ValueError as why:
            return why

    for done, (path, clips) in enumerate(zip(paths, map(attempt, paths)), 1):
        if isinstance(clips, ValueError):
            print(f"skipped {path.name}: {clips}", file=sys.stderr)
        else:
            yield path.name, clips
        if sys.stdout.isatty() or done % 500 == 0:
            print(f"read {done} of {len(paths)}", end="\r" if sys.stdout.isatty() else "\n", flush=True)


def set_aside(names):
    """-> the held-out ones of a folder's usable files: a tenth, by a hash of the name, so that one more file moves no
    other. One at least, and not all; with a single file it is also trained on."""
    rank = {name: zlib.crc32(os.fsencode(name)) for name in names}
    held = sorted(name for name in names if rank[name] % 10 == 0)
    return held if 0 < len(held) < len(rank) else [min(names, key=rank.get)]


def chained(parts):
    """Dicts of lists -> the dict of the lists one after the other."""
    return {name: [x for part in parts for x in part[name]] for name in parts[0]}


def training_clips(data, layout, media):
    """-> clips to train on, names of the held-out files. Toy: 4096 clips, seed 0; a .npz: nine tenths of its clips; a
    folder: windows that begin at every frame, as lists of views."""
    if data == "toy":
        return toy_clips(4096, 0)[0], []
    if is_latents(data):
        latents, _ = read_latents(data)
        return {name: x[torch.arange(len(x)) % 10 > 0] for name, x in latents.items()}, []
    paths = sorted(path for path in Path(data).iterdir() if path.is_file() and not path.name.startswith("."))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # of threads that wait for an ffmpeg each
        parts = dict(usable(paths, lambda path: clip_windows(path, layout, media, every=1), pool.map))
    if not parts:
        raise ValueError(f"no usable clip among the {len(paths)} files of {data}")
    held = set_aside(parts)
    return chained([parts[name] for name in parts if name not in held or len(parts) == 1]), held


def held_clips(data, held, layout, media, count, seconds):
    """-> the first `count` held-out clips, `seconds` long. Toy: of 1024, seed 1; a .npz: every tenth clip, as it is;
    a folder: windows of the files that `held` names."""
    if data == "toy":
        return toy_clips(min(count, 1024), 1, round(seconds * media.fps))[0]
    if is_latents(data):
        return {name: x[::10][:count] for name, x in read_latents(data)[0].items()}
    parts, paths = [], [Path(data, name) for name in held]
    for _, clips in usable(paths, lambda path: clip_windows(path, layout, media, seconds)):
        parts.append(clips)
        if sum(len(part["video"]) for part in parts) >= count:
            break
    if not parts:
        raise ValueError(
            f"none of the {len(held)} files of {data} that were set aside can be used: --input names another"
        )
    return {name: torch.stack(x[:count]) for name, x in chained(parts).items()}


def read_latents(path):
    """-> latents, a dict of float32 (n, N_m, *grid, d_m), and their Layout. ValueError says what is wrong.

    Every pair of arrays X and X_edges is a modality. "video", or else the first, is the time reference.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as why:  # np.load raises many kinds on a file that is no .npz
        raise ValueError(f"{path} is no .npz of plain arrays ({why})") from None
    names = sorted((k for k in arrays if not k.endswith("_edges")), key=lambda name: name != "video")
    if not names or {*names, *(f"{name}_edges" for name in names)} != set(arrays):
        raise ValueError(f"{path} must hold pairs such as video and video_edges; it holds {', '.join(arrays)}")
    latents, modalities = {}, []
    for name in names:
        z, edges = arrays[name], arrays[f"{name}_edges"]
        if not name.isidentifier() or name in (*dir(nn.ParameterDict()), *dir(Tokenizers), "layout"):
            raise ValueError(f"{path}: {name!r} cannot be a modality's name")
        if z.dtype.kind not in "fiu" or edges.dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} and {name}_edges must hold real numbers, not {z.dtype} and {edges.dtype}")
        if z.ndim < 3 or len(z) != len(arrays[names[0]]) or edges.shape != (z.shape[1] + 1,):
            raise ValueError(f"{path}: {name} {z.shape} does not fit {name}_edges {edges.shape}, or {names[0]}'s clips")
        if len(z) < 2 or not z.size:
            raise ValueError(f"{path}: {name} {z.shape} is too little: two clips or more, and no axis of length 0")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named below
            z, edges = z.astype(np.float32), edges.astype(np.float64)
        if not (np.isfinite(z).all() and np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
            raise ValueError(f"{path}: {name} holds values that are not finite, or edges that do not rise")
        latents[name] = torch.from_numpy(z)
        modalities.append(Modality(name, z.shape[2:-1], z.shape[-1], tuple(edges.tolist())))
    return latents, Layout(modalities)


# --- What a training step sees: a function of (seed, step, position in the batch) alone -------------------------------
# A resumed run, another number of processes and another device see the batches they would have seen.


def draw(seed, step, examples, batch, mixture, layout, T):
    """-> index (B,) of the examples, t (B, S), and the coin of self-conditioning, true at the paper's 0.9 [App. B]."""
    word = np.random.SeedSequence([seed, step]).generate_state(1)  # torch's generator keeps 32 bits of a seed
    generator = torch.Generator().manual_seed(int(word[0]))
    index = torch.randint(examples, (batch,), generator=generator)
    t = sample_timesteps(mixture, layout, batch, T, generator)
    return index, t, torch.rand((), generator=generator).item() < 0.9


def draw_noise(seed, step, rows, E):
    """eps (len(rows), E) of these rows of the batch: a process draws its own rows, and none that others need."""
    words = np.random.SeedSequence([seed, step, 1]).generate_state(int(rows.max()) + 1)
    generators = [torch.Generator().manual_seed(int(words[row])) for row in rows.tolist()]
    return torch.stack([torch.randn(E, generator=generator) for generator in generators])
