"""Sample a trained AVDiT on every task, see it, hear it, score it [Sec. 3.3, 6.2]. `python sample.py --help`"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import imageio
import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw

import data
import train
from avdit import (
    METHODS,
    PRESETS,
    SAMPLERS,
    TASKS,
    Modality,
    NoiseSchedule,
    check_choice,
    generate,
    span_mask,
    task_mask,
)
from train import DEVICES, SEEDS, end_step, fail, flag, load, open_device, out_of_memory, parse, reading


@dataclass
class Config:
    """Every setting of a call. None: as the checkpoint's preset says."""

    ckpt: str = flag("runs/toy", "folder of a ckpt.pt, or the file")
    task: str = flag("all", "what is given and what is generated", ("all", *TASKS))
    given: list = flag([], "in place of a task: spans that are given, as video:0-0.625 audio:0-2 (seconds)")
    input: str = flag(None, "a clip to take the given part from (default: held-out clips)")
    n: int = flag(8, "samples of each task; with --score only the first 8 become mp4 and WAV", within=(1, 2**16))
    sampler: str = flag(None, "how z steps down (default: the preset's)", tuple(SAMPLERS))
    steps: int = flag(None, "sampling steps (default: the preset's)", within=(1, 1000))
    guidance: float = flag(0.0, "s of Eq. 16; 0 is none, others write w = 1 + s", within=(-1000, 1000))
    guidance_drop: list = flag([], "modalities whose given part the unconditional pass noises (default: all)")
    method: str = flag("monl", "how the given part is held: for models not trained with MoNL the two others", METHODS)
    strength: float = flag(None, "lambda of reconstruction guidance (default 0.02)", within=(0, 1000))
    seconds: float = flag(None, "go on to this length, window after window (default: one window)", within=(0.01, 3600))
    score: bool = flag(False, "print a table of scores (toy world only)")
    device: str = flag("auto", "where to compute", DEVICES)
    seed: int = flag(0, "seed of the noise", within=SEEDS)
    out: str = flag("samples", "folder to write to")


class Trained:
    """A checkpoint made ready: settings, the network with averaged weights, tokenizers."""

    def __init__(self, path, device):
        path = Path(path)
        path = path / "ckpt.pt" if path.is_dir() else path
        state, self.device = load(path), device
        with reading(path):
            self.settings = train.Config(**state["config"])
            self.modalities = [Modality(**m) for m in state["modalities"]]
            self.preset = PRESETS[self.settings.preset]
            self.model = self.preset.model(self.modalities, self.settings.prediction)
            weights = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
            self.model.load_state_dict(weights)
            self.media = (self.settings.fps, self.settings.size, self.settings.sample_rate)
            self.tokenizers = data.make_tokenizers(self.settings.data, self.modalities, *self.media[1:])
            self.tokenizers.load_state_dict(state["tokenizers"])
        self.model.to(device).eval()
        self.schedule = NoiseSchedule().to(device)
        self.decodes = not data.is_latents(self.settings.data)  # to picture and sound, or only to latents?

    def encode(self, clips):
        return {m: data.in_chunks(self.tokenizers[m].encode, x) for m, x in clips.items()}

    def decode(self, z):
        return {m: data.in_chunks(self.tokenizers[m].decode, x) for m, x in z.items()}

    def clips(self, path, count, windows):
        """The clips that conditions are cut from: the one at `path`, or held-out ones; toy clips last all windows."""
        if path:
            try:
                return {m: x[:1] for m, x in data.clip_windows(path, self.modalities, *self.media).items()}
            except ValueError as why:
                raise ValueError(f"--input {path}: {why}") from None
        frames = round((self.span + (windows - 1) * self.step) * data.FPS) if windows > 1 else data.FRAMES
        return data.load_clips(self.settings.data, "held", self.modalities, *self.media, count, frames)

    @property
    def rates(self):
        return {"video": self.settings.fps, "audio": self.settings.sample_rate}

    def per_frame(self, given):
        """Masks of segments -> masks of frames and of sound samples, {"video": bool (F,), "audio": bool (samples,)}."""
        repeats = {m.name: torch.tensor(m.edges).diff().mul(self.rates[m.name]).round().long() for m in self.modalities}
        return {m: given[m].repeat_interleave(repeats[m]) for m in self.rates}

    @property
    def span(self):
        """Seconds of a window."""
        return self.modalities[0].edges[-1]

    @property
    def step(self):
        """Seconds from a window to the next, which starts with its last 5 frames."""
        return self.span - self.modalities[0].edges[2]

    def window(self, clips, k):
        """The k-th window of longer clips."""
        return self.cut(clips, k * self.step, k * self.step + self.span) if self.decodes else clips

    def cut(self, clips, start, end):
        """Seconds start to end of clips."""
        return {m: x[:, round(start * self.rates[m]) : round(end * self.rates[m])] for m, x in clips.items()}


def parse_given(spans, modalities):
    """["video:0-0.625", ...] -> mask as task_mask makes it; ValueError names the valid form."""
    by_name = {m.name: m for m in modalities}
    given = {m.name: torch.zeros(m.N, dtype=torch.bool) for m in modalities}
    for text in spans:
        name, _, span = text.partition(":")
        check_choice("modality in --given", name, by_name)
        try:
            start, end = (float(x) for x in span.split("-"))
        except ValueError:
            raise ValueError(f"--given {text}: write MODALITY:START-END in seconds, as video:0-0.625") from None
        mask = span_mask(by_name[name], start, end)
        if not mask.any():
            edges = ", ".join(f"{e:g}" for e in by_name[name].edges[:4])
            raise ValueError(f"--given {text} holds no whole segment; {name}'s segments end at {edges}, ... seconds")
        given[name] |= mask
    return given


def sample(trained, config, given, z0, generator, label):
    """Generate what z0, a dict of (n, ...), is not given -> dict of latents (n, ...). Progress goes to one line."""
    z_max = {m: tokenizer.z_max.item() for m, tokenizer in trained.tokenizers.items()}
    steps = trained.preset.sampling_steps if config.steps is None else config.steps
    parts = []
    for start in range(0, config.n, 64):

        def on_step(step, steps, start=start):
            end_step(trained.device)
            if sys.stdout.isatty():
                print(f"\r{label}: samples {start}.. of {config.n}, step {step}/{steps}  ", end="", flush=True)

        z0_part = {m: z[start : start + 64].to(trained.device) for m, z in z0.items()}
        part = generate(
            trained.model, trained.schedule, z0_part, given,
            steps=steps, sampler=config.sampler or trained.preset.sampler, guidance=config.guidance,
            guidance_drop=config.guidance_drop or None, method=config.method,
            strength=0.02 if config.strength is None else config.strength,
            z_max=z_max, generator=generator, on_step=on_step,
        )  # fmt: skip
        parts.append({m: z.cpu() for m, z in part.items()})
    print("\r" + " " * 60 + "\r" if sys.stdout.isatty() else "", end="")
    return {m: torch.cat([part[m] for part in parts]) for m in parts[0]}


def make(trained, config, given, z0, label, windows):
    """Sample and decode -> clips. Each further window is given the last 5 frames of the one before, and their sound.

    Sound segments are all alike and move over as they are, so sound is decoded once and no seam is heard. So does the
    last video segment; but the frame before it came from a segment of four, and becomes a segment of its own.
    """
    generator = torch.Generator().manual_seed(config.seed)
    z = sample(trained, config, given, z0, generator, label)
    video, sound = [trained.decode({"video": z["video"]})["video"]], [z["audio"]]
    given = task_mask("continue", trained.modalities)
    for k in range(1, windows):
        frames, segments = int(trained.per_frame(given)["video"].sum()), int(given["audio"].sum())
        z = {m: x.roll(int(given[m].sum()), 1) for m, x in z.items()}
        still = video[-1][:, -frames, None].expand_as(video[0])
        z["video"][:, :1] = trained.encode({"video": still})["video"][:, :1]
        z = sample(trained, config, given, z, generator, f"{label}, window {k + 1} of {windows}")
        video.append(trained.decode({"video": z["video"]})["video"][:, frames:])
        sound.append(z["audio"][:, segments:])
    return {"video": torch.cat(video, 1), **trained.decode({"audio": torch.cat(sound, 1)})}


# ---------------------------------------------------------------------------------------
# Pictures and sound
# ---------------------------------------------------------------------------------------

GREY, GREEN = (150, 150, 150), (60, 180, 75)  # given, generated: the colours of the paper's Fig. 9


def track(given, width, height=8):
    """Bool (k,) -> uint8 (height, width, 3): grey where given, green where generated."""
    colours = np.where(given[:, None], GREY, GREEN).astype(np.uint8)
    return np.repeat(colours[np.arange(width) * len(given) // width][None], height, 0)


def spectrogram(sound, rate, width, height):
    """Samples -> uint8 (height, width): magnitudes in decibels to 4 kHz, low tones at the bottom."""
    size = 2 ** round(np.log2(rate / 32))
    magnitude = data.spectrum(torch.from_numpy(sound)[None], size, max(1, len(sound) // width), width)[0]
    magnitude = magnitude[:, : 1 + 4000 * size // rate]
    level = 255 + 255 / 60 * 20 * torch.log10(magnitude / (size / 4) + 1e-6)  # 60 dB below full scale is black
    image = Image.fromarray(level.clamp(0, 255).byte().T.flip(0).numpy())
    return np.array(image.resize((width, height)))


def write_mp4(path, wav, video, given, fps):
    """Picture over one track per modality, a white line at the present moment, with the sound of `wav`."""
    zoom = max(1, 256 // video.shape[1])
    width = video.shape[2] * zoom
    bars = [b for g in given for b in (np.zeros((8, width, 3), np.uint8), track(g, width, 16))]
    sound = {"audio_path": str(wav), "audio_codec": "aac", "output_params": ["-b:a", "64k"]}
    with imageio.get_writer(path, fps=fps, macro_block_size=16, ffmpeg_log_level="error", **sound) as writer:
        for i, frame in enumerate(video):
            below = np.concatenate(bars)
            at = i * width // len(video)
            below[:, at : at + 2] = 255
            writer.append_data(np.concatenate([frame.repeat(zoom, 0).repeat(zoom, 1), below]))


def write_sheet(path, title, video, audio, given, rate, true=None, names=None):
    """One block per sample: its frames in a row over their track, the true frames, its spectrogram over its track."""
    every = math.ceil(video.shape[1] / 24)  # frame of a long clip
    video, true = video[:, ::every], None if true is None else true[:, ::every]
    count, frames = video.shape[:2]
    names = names or [f"{i:02}" for i in range(count)]
    edge, margin = max(48, min(64, video.shape[2])), 64 + 6 * max(map(len, names))
    width = edge * frames

    def strip(clip):
        row = np.zeros((edge, width, 3), np.uint8)  # the true clip may end before the generated one
        for k, frame in enumerate(clip):
            row[:, k * edge : (k + 1) * edge] = np.array(Image.fromarray(frame).resize((edge, edge), Image.NEAREST))
        return row

    blocks, labels, y = [], [], 20
    for i in range(count):
        sound = np.repeat(spectrogram(audio[i], rate, width, edge)[..., None], 3, -1)
        bars = [("", track(mask, width)) for mask in given]
        rows = [("video", strip(video[i])), bars[0], ("audio", sound), bars[1]]
        if true is not None:
            rows.insert(0, ("true video", strip(true[i])))
        for name, row in [*rows, ("", np.zeros((10, width, 3), np.uint8))]:
            labels.append((y + 2, f"{names[i]} {name}" if name else ""))
            blocks.append(row)
            y += len(row)
    sheet = Image.new("RGB", (width + margin, y))
    sheet.paste(Image.fromarray(np.concatenate(blocks)), (margin, 20))
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, 4), f"{title}: grey = given, green = generated", fill="white")
    for at, label in labels:
        pen.text((4, at), label, fill="white")
    sheet.save(path)


def write_media(folder, task, out, count):
    """mp4 and WAV of the first `count` samples, and a sheet of the first 8."""
    fps, rate, given = out["fps"], out["sample_rate"], (out["given_video"], out["given_audio"])
    for i in range(count):
        wav = folder / f"{i:02}.wav"
        soundfile.write(wav, out["audio"][i], rate)
        write_mp4(folder / f"{i:02}.mp4", wav, out["video"][i], given, fps)
    true = out["video_true"][:8] if "video_true" in out else None
    write_sheet(folder / "sheet.png", task, out["video"][:8], out["audio"][:8], given, rate, true)


# ---------------------------------------------------------------------------------------
# Scores of the toy world: from decoded pixels and waveform, against the given clip
# ---------------------------------------------------------------------------------------

SCORES = ("align", "path", "hue", "hue_heard", "shape", "motion", "spread", "frechet_video", "frechet_audio", "nearest")
RADIUS = 0.1258  # rms radius of a real ball, as read_video reads it


def frechet(a, b):
    """Frechet distance of two sets of vectors (n, D) as Gaussians, after one fixed projection to 64 dimensions."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(a.shape[1], 64, dtype=torch.float64, generator=g))[0]
    a, b = a.double() @ basis, b.double() @ basis
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # trace of (A B)^(1/2)
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def nearest(z, others):
    """(n,) distance of every clip's latents to the nearest of the others, root mean square over all elements."""
    a, b = (torch.cat([x[m].flatten(1) for m in z], 1) for x in (z, others))
    return torch.cdist(a, b).amin(1) / a.shape[1] ** 0.5


def spread(video, group):
    """Standard deviation of x over every `group` clips, as a share of the world's, where x is uniform."""
    return data.read_video(video)[0][..., 0].unflatten(0, (-1, group)).std(1).mean() * 12**0.5


def score(trained, task, clips, true, given, real, learned):
    """-> dict of the scores that mean something for the task.

    clips, true    raw clips; true[i] gave clips[i] its given part, the segments of the masks `given`
    real, learned  latents of other real clips and of the training clips
    Scores run over the generated frames and the sound at them, motion and nearest over the whole clip. See the README.
    """
    seen_given, heard_given = trained.per_frame(given).values()
    at_frame = torch.arange(data.FRAMES) * data.RATE // data.FPS
    frames = ~(seen_given & heard_given[at_frame])
    position, hue, radius = data.read_video(clips["video"])
    height = data.read_height(clips["audio"])
    true_position, true_hue, _ = data.read_video(true["video"])
    makes_video, makes_audio = not seen_given.all(), not heard_given.all()
    seen = data.read_video(clips["video"][:, ~seen_given])[1] if makes_video else hue
    heard = data.read_timbre(clips["audio"][:, ~heard_given] if makes_audio else clips["audio"])
    s = {"align": (position[..., 1] - height)[:, frames].abs().mean()}
    if makes_video and seen_given.any():
        s["path"] = (position - true_position)[:, ~seen_given].abs().mean()
    elif makes_audio and not makes_video:
        s["path"] = (height - true_position[..., 1]).abs().mean()
    if makes_video and task != "joint":
        s["hue"] = data.circular(seen, true_hue).mean()
    s["hue_heard"] = data.circular(heard, seen if task == "joint" else true_hue).mean()
    if makes_video:
        s["shape"] = (radius[:, ~seen_given] / RADIUS - 1).abs().mean()
        s["motion"] = data.read_motion(position).mean()
    if task == "joint":
        s["spread"] = spread(clips["video"], len(clips["video"]))
    latents = trained.encode(clips)
    for m in latents:
        if not given[m].all():
            s[f"frechet_{m}"] = frechet(*(z[m][:, ~given[m]].flatten(1) for z in (latents, real)))
    s["nearest"] = nearest(latents, learned).mean()
    return s


class Scores:
    """The table of --score, printed row by row; the first one is real clips, encoded and decoded."""

    def __init__(self, trained, config, clips, z_clips):
        self.trained, self.config, self.z_clips = trained, config, z_clips
        self.real, self.learned = (trained.encode(data.toy_clips(*which)[0]) for which in ((1024, 2), (4096, 0)))
        print(f"{config.n} samples a task; Frechet distances of latents to 1024 other clips, not FVD or FAD")
        print(" " * 12 + "".join(f"{k:>14}" for k in SCORES))
        nothing = task_mask("joint", trained.modalities)
        self.row("tokenizer", "tokenizer", trained.decode(z_clips), trained.window(clips, 0), nothing)

    def task(self, task, made, true, given, windows):
        """The row of a task, or of every window of clips that were continued."""
        names = [f"{task} {k + 1}" for k in range(windows)] if windows > 1 else [task]
        for k, name in enumerate(names):
            self.row(name, task, *(self.trained.window(x, k) for x in (made, true)), given)
            given = task_mask("continue", self.trained.modalities)

    def row(self, name, task, clips, true, given):
        s = score(self.trained, task, clips, true, given, self.real, self.learned)
        if task == "a2v":  # once more, 16 samples of every sound, to see how they spread
            z0 = {m: z[torch.arange(self.config.n) // 16] for m, z in self.z_clips.items()}
            s["spread"] = spread(make(self.trained, self.config, given, z0, task, 1)["video"], 16)
        cells = (f"{float(s[k]):13.3f}" if k in s else f"{'-':>13}" for k in SCORES)
        print(f"{name:12}" + "".join(cells), flush=True)


def main():
    config = parse(Config, __doc__.split("`")[0])
    try:
        run(config)
    except (ValueError, OSError) as why:
        return fail(why)
    except (MemoryError, RuntimeError) as why:
        return out_of_memory(why, "use a smaller --n or fewer --seconds")
    return 0


def check(config, trained):
    """-> the masks to sample, {task: mask}. ValueError where the settings contradict each other or the checkpoint."""
    toy = trained.settings.data == "toy"
    mistakes = [
        (config.given and config.task != "all", "--given and --task each say what is given: use one"),
        (config.guidance_drop and not config.guidance, "--guidance-drop is for a --guidance other than 0"),
        (config.strength is not None and config.method != "reconstruction",
         "--strength is for --method reconstruction"),
        ((config.input or config.seconds) and not trained.decodes,
         "--input and --seconds need a tokenizer for clips: this checkpoint was trained on a .npz of latents"),
        (config.seconds and config.seconds < trained.span, f"--seconds must be {trained.span:g}, one window, or more"),
        (config.score and (not toy or config.n % 16 or config.input or config.given),
         "--score is for the toy world's own clips and tasks, and wants --n a multiple of 16"),
        (config.score and config.seconds and config.task != "continue",
         "--score with --seconds is for --task continue, where there is one right answer"),
    ]  # fmt: skip
    for wrong, message in mistakes:
        if wrong:
            raise ValueError(message)
    if config.given:
        return {"custom": parse_given(config.given, trained.modalities)}
    tasks = {task: task_mask(task, trained.modalities) for task in (TASKS if config.task == "all" else [config.task])}
    if config.input and list(tasks) == ["joint"]:
        raise ValueError("--input is a clip to be given, but --task joint is given nothing")
    return tasks


def package(trained, made, true, given, order):
    """Everything of one task as numpy arrays, the contents of samples.npz."""
    out = {m: x.numpy() for m, x in made.items()}
    if trained.decodes:
        for m, mask in trained.per_frame(given).items():  # of the first window: what follows is generated
            out[f"given_{m}"] = np.pad(mask.numpy(), (0, out[m].shape[1]))[: out[m].shape[1]]
        out.update(fps=trained.settings.fps, sample_rate=trained.settings.sample_rate)
    else:  # latents come back as they came in, with their edges
        out.update({f"given_{m}": mask.numpy() for m, mask in given.items()})
        out.update({f"{m.name}_edges": np.array(m.edges) for m in trained.modalities})
    if any(mask.any() for mask in given.values()):
        out.update({"condition": order.numpy(), **{f"{m}_true": x.numpy() for m, x in true.items()}})
    return out


def run(config):
    trained = Trained(config.ckpt, open_device(config.device))
    tasks = check(config, trained)
    windows = 1 + math.ceil((config.seconds - trained.span) / trained.step - 1e-6) if config.seconds else 1
    if config.score or any(mask.any() for given in tasks.values() for mask in given.values()):
        clips = trained.clips(config.input, config.n, windows)
        z_clips = trained.encode(trained.window(clips, 0))
    else:  # nothing is given: the latents only carry the shapes
        clips, z_clips = {}, {m.name: torch.zeros(1, *m.shape) for m in trained.modalities}
    scores = Scores(trained, config, clips, z_clips) if config.score else None
    for task, given in tasks.items():
        order = torch.arange(config.n) % len(z_clips["video"])
        true = {m: x[order] for m, x in clips.items()}
        made = make(trained, config, given, {m: x[order] for m, x in z_clips.items()}, task, windows)
        if scores:
            scores.task(task, made, true, given, windows)
        if config.seconds:
            made, true = (trained.cut(x, 0, config.seconds) for x in (made, true))
        folder = Path(config.out) / task
        folder.mkdir(parents=True, exist_ok=True)
        out = package(trained, made, true, given, order)
        np.savez_compressed(folder / "samples.npz", **out)
        if trained.decodes:
            write_media(folder, task, out, min(config.n, 8) if config.score else config.n)
        if not config.score:
            print(f"wrote {folder}")


if __name__ == "__main__":
    sys.exit(main())
