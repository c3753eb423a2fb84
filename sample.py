"""Sample a trained AVDiT on every task, see it, hear it, score it [Sec. 3.3, 6.2]. `python sample.py --help`"""

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
from train import fail, flag, load, open_device, parse


@dataclass
class Config:
    """Every setting of a call. None: as the checkpoint's preset says."""

    ckpt: str = flag("runs/toy", "folder of a ckpt.pt, or the file")
    task: str = flag("all", "what is given and what is generated", ("all", *TASKS))
    given: list = flag([], "in place of a task: spans that are given, as video:0-0.625 audio:0-2 (seconds)")
    input: str = flag(None, "a clip to take the given part from (default: held-out clips)")
    n: int = flag(8, "samples of each task; with --score only the first 8 become mp4 and WAV")
    sampler: str = flag(None, "how z steps down (default: the preset's)", tuple(SAMPLERS))
    steps: int = flag(None, "sampling steps (default: the preset's)")
    guidance: float = flag(0.0, "s of Eq. 16; 0 is none, others write w = 1 + s")
    guidance_drop: list = flag([], "modalities whose given part the unconditional pass noises (default: all)")
    method: str = flag("monl", "how the given part is held: for models not trained with MoNL the two others", METHODS)
    strength: float = flag(0.02, "lambda of reconstruction guidance")
    score: bool = flag(False, "print a table of scores (toy world only)")
    device: str = flag("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    seed: int = flag(0, "seed of the noise")
    out: str = flag("samples", "folder to write to")


class Trained:
    """A checkpoint made ready: settings, the network with averaged weights, tokenizers."""

    def __init__(self, path, device):
        path = Path(path)
        state = load(path / "ckpt.pt" if path.is_dir() else path)
        self.settings, self.device = train.Config(**state["config"]), device
        self.modalities = [Modality(**m) for m in state["modalities"]]
        self.preset = PRESETS[self.settings.preset]
        self.model = self.preset.model(self.modalities, self.settings.prediction)
        weights = {k.removeprefix("module."): v for k, v in state["ema"].items() if k.startswith("module.")}
        self.model.load_state_dict(weights)
        self.model.to(device).eval()
        self.schedule = NoiseSchedule().to(device)
        self.media = (self.settings.fps, self.settings.size, self.settings.sample_rate)
        self.tokenizers = data.make_tokenizers(self.settings.data, self.modalities, *self.media[1:])
        self.tokenizers.load_state_dict(state["tokenizers"])
        self.decodes = not data.is_latents(self.settings.data)  # to picture and sound, or only to latents?

    def encode(self, clips):
        return {m: data.in_chunks(t.encode, clips[m]) for m, t in self.tokenizers.items()}

    def decode(self, z):
        return {m: data.in_chunks(self.tokenizers[m].decode, x) for m, x in z.items()}

    def clips(self, path=None, count=None):
        """The clips that conditions are cut from: the one at `path`, or held-out ones."""
        if path:
            try:
                return {m: x[:1] for m, x in data.clip_windows(path, self.modalities, *self.media).items()}
            except ValueError as why:
                raise ValueError(f"--input {path}: {why}") from None
        return data.load_clips(self.settings.data, "held", self.modalities, *self.media, count)

    def per_frame(self, given):
        """Masks of segments -> given_video (F,), given_audio (samples,), bool."""
        rates = {"video": self.settings.fps, "audio": self.settings.sample_rate}
        repeats = {m.name: torch.tensor(m.edges).diff().mul(rates[m.name]).round().long() for m in self.modalities}
        return [given[m].repeat_interleave(repeats[m]) for m in rates]


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


def sample(trained, config, given, z0, label):
    """Generate what z0, a dict of (n, ...), is not given -> dict of latents (n, ...). Progress goes to one line."""
    generator = torch.Generator().manual_seed(config.seed)
    z_max = {m: tokenizer.z_max.item() for m, tokenizer in trained.tokenizers.items()}
    steps = trained.preset.sampling_steps if config.steps is None else config.steps
    parts = []
    for start in range(0, config.n, 64):

        def progress(step, steps, start=start):
            print(f"\r{label}: samples {start}.. of {config.n}, step {step}/{steps}  ", end="", flush=True)

        z0_part = {m: z[start : start + 64].to(trained.device) for m, z in z0.items()}
        part = generate(
            trained.model, trained.schedule, z0_part, given,
            steps=steps, sampler=config.sampler or trained.preset.sampler, guidance=config.guidance,
            guidance_drop=config.guidance_drop or None, method=config.method, strength=config.strength, z_max=z_max,
            generator=generator, on_step=progress if sys.stdout.isatty() else None,
        )  # fmt: skip
        parts.append({m: z.cpu() for m, z in part.items()})
    print("\r" + " " * 60 + "\r" if sys.stdout.isatty() else "", end="")
    return {m: torch.cat([part[m] for part in parts]) for m in parts[0]}


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
    count, frames = video.shape[:2]
    names = names or [f"{i:02}" for i in range(count)]
    edge, margin = max(48, min(64, video.shape[2])), 64 + 6 * max(map(len, names))
    width = edge * frames

    def strip(clip):
        return np.concatenate([np.array(Image.fromarray(f).resize((edge, edge), Image.NEAREST)) for f in clip], 1)

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
    seen_given, heard_given = trained.per_frame(given)
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


def table_row(name, s):
    cells = (f"{float(s[k]):13.3f}" if k in s else f"{'-':>13}" for k in SCORES)
    return f"{name:12}" + "".join(cells)


def main():
    config = parse(Config, __doc__.split("`")[0])
    try:
        run(config)
    except (ValueError, OSError) as why:
        return fail(why)
    return 0


def check(config, trained):
    """-> the masks to sample, {task: mask}. ValueError where the settings contradict each other or the checkpoint."""
    if config.n < 1:
        raise ValueError(f"--n must be at least 1, not {config.n}")
    if config.score and (trained.settings.data != "toy" or config.n % 16 or config.input or config.given):
        raise ValueError("--score is for the toy world's own clips and tasks, and wants --n a multiple of 16")
    if config.input and not trained.decodes:
        raise ValueError("--input needs latents that can be encoded: this checkpoint was trained on a .npz")
    if config.given:
        return {"custom": parse_given(config.given, trained.modalities)}
    return {task: task_mask(task, trained.modalities) for task in (TASKS if config.task == "all" else [config.task])}


def package(trained, made, true, given, order):
    """Everything of one task as numpy arrays, the contents of samples.npz."""
    out = {m: x.numpy() for m, x in made.items()}
    if trained.decodes:
        out["given_video"], out["given_audio"] = (mask.numpy() for mask in trained.per_frame(given))
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
    if config.score or any(mask.any() for given in tasks.values() for mask in given.values()):
        clips = trained.clips(config.input, config.n)
        z_clips = trained.encode(clips)
    else:  # nothing is given: the latents only carry the shapes
        clips, z_clips = {}, {m.name: torch.zeros(1, *m.shape) for m in trained.modalities}
    if config.score:
        real, learned = (trained.encode(data.toy_clips(*which)[0]) for which in ((1024, 2), (4096, 0)))
        print(f"{config.n} samples a task; Frechet distances of latents to 1024 other clips, not FVD or FAD")
        print(" " * 12 + "".join(f"{k:>14}" for k in SCORES))
        nothing = task_mask("joint", trained.modalities)
        floor = score(trained, "tokenizer", trained.decode(z_clips), clips, nothing, real, learned)
        print(table_row("tokenizer", floor), flush=True)
    for task, given in tasks.items():
        order = torch.arange(config.n) % len(z_clips["video"])
        true = {m: x[order] for m, x in clips.items()}
        made = trained.decode(sample(trained, config, given, {m: x[order] for m, x in z_clips.items()}, task))
        if config.score:
            row = score(trained, task, made, true, given, real, learned)
            if task == "a2v":  # once more, 16 samples of every sound, to see how they spread
                z = sample(trained, config, given, {m: x[order // 16] for m, x in z_clips.items()}, task)
                row["spread"] = spread(trained.decode({"video": z["video"]})["video"], 16)
            print(table_row(task, row), flush=True)
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
