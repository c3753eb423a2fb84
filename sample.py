"""Sample a trained AVDiT on every task, see it and hear it [Sec. 3.3, 6.2]. `python sample.py --help`"""

import math
import sys
from pathlib import Path

import imageio
import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw

from avdit import PRESETS, SAMPLERS, TASKS, Layout, Modality, NoiseSchedule, generate, generate_baseline, task_mask
from data import Media, Tokenizers, clip_windows, held_clips, is_latents
from train import DEVICES, Parser, end_step, number, open_device, opened

METHODS = ("monl", "replacement", "reconstruction")
STRENGTH = 0.02  # of reconstruction guidance, in the paper


def make_parser(about, n):
    """The arguments of sample.py that tests/score.py has too."""
    parser = Parser(description=about)
    add = parser.add_argument
    add("--ckpt", default="runs/toy", help="a ckpt.pt, or its folder (%(default)s)")
    add("--task", default="all", choices=("all", *TASKS), help="what is given and what is generated (%(default)s)")
    add("--n", type=number(int, 1, 2**16), default=n, help="samples of each task (%(default)s)")
    add("--sampler", choices=SAMPLERS, help="how z steps down (as the preset says)")
    add("--steps", type=number(int, 1, 1000), help="sampling steps (as the preset says)")
    add("--guidance", type=number(float, -1000, 1000), default=0.0,
        help="s of Eq. 16, 0 is none; others write 1 + s (%(default)s)")  # fmt: skip
    add("--guidance-drop", nargs="+", action="extend", default=[], metavar="MODALITY",
        help="modalities that the unconditional pass does without (all that is given)")  # fmt: skip
    add("--method", default="monl", choices=METHODS,
        help="how the given part is held; not monl: for models that are not trained with it (%(default)s)")  # fmt: skip
    add("--strength", type=number(float, 0, 1000), default=STRENGTH, help="lambda of reconstruction (%(default)s)")
    add("--seconds", type=number(float, 0.01, 3600), help="go on to this length, window after window (one window)")
    add("--device", default="auto", choices=DEVICES, help="where to compute (%(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of the noise (%(default)s)")
    return parser


class Trained:
    """A checkpoint made ready: layout, network with averaged weights, tokenizers."""

    def __init__(self, path, device):
        path, self.device = Path(path), device
        path = path if path.suffix == ".pt" else path / "ckpt.pt"
        if not path.exists():
            raise ValueError(f"there is no checkpoint {path}: train.py writes one, --ckpt names it")
        with opened(path) as saved:
            config = saved["config"]
            self.data, self.preset, self.held = config["data"], PRESETS[config["preset"]], saved["held"]
            self.media = Media(config["fps"], config["size"], config["sample_rate"])
            self.layout = Layout([Modality(**m) for m in saved["modalities"]])
            self.model = self.preset.model(self.layout, config["prediction"])
            self.model.load_state_dict(saved["ema"])
            self.tokenizers = Tokenizers(self.data, self.layout, self.media)
            self.tokenizers.load_state_dict(saved["tokenizers"])
        self.model.to(device).eval()
        self.schedule = NoiseSchedule().to(device)
        self.decodes = not is_latents(self.data)  # to picture and sound, or only to latents?
        self.rates = {"video": self.media.fps, "audio": self.media.sample_rate}
        edges = self.layout.modalities[0].edges
        self.span = edges[-1]  # seconds of a window
        self.step = edges[-1] - edges[:3][-1]  # seconds from a window to the next, which starts with its last 5 frames
        self.shared = task_mask("continue", self.layout)  # (S,) what the two have in common

    def clips(self, path, count, seconds):
        """The clips that conditions are cut from: the one at `path`, or held-out ones, `seconds` long."""
        if not path:
            return held_clips(self.data, self.held, self.layout, self.media, count, seconds)
        try:
            return {name: x[0][None] for name, x in clip_windows(path, self.layout, self.media, seconds).items()}
        except ValueError as why:
            raise ValueError(f"--input {path}: {why}") from None

    def windows(self, seconds):
        """How many windows it takes to last that long; None: one."""
        return 1 + math.ceil((seconds - self.span) / self.step - 1e-6) if seconds else 1

    def cut(self, clips, start, end):
        """Seconds start to end of clips."""
        spans = {name: slice(round(start * rate), round(end * rate)) for name, rate in self.rates.items()}
        return {name: x[:, spans[name]] for name, x in clips.items()}

    def window(self, clips, k=0):
        """The k-th window of longer clips, which may end before it does: zeros follow."""
        if not self.decodes:
            return clips
        part = self.cut(clips, k * self.step, k * self.step + self.span)
        missing = {name: round(self.span * rate) - part[name].shape[1] for name, rate in self.rates.items()}
        return {name: torch.cat([x, x.new_zeros(len(x), missing[name], *x.shape[2:])], 1) for name, x in part.items()}

    def masks(self, given, windows, seconds):
        """What each window is given, a list of (S,): the first what the task gives, each other what the window before
        shares with it, and of its own part of the clip, `seconds` long, what the task gives there."""
        later = [self.shared | (given & self.layout.within(0, seconds - k * self.step)) for k in range(1, windows)]
        return [given, *later]

    def per_frame(self, given):
        """Mask (S,) -> masks of frames and of sound samples, {"video": bool (F,), "audio": bool (samples,)}."""
        durations = self.layout.split(self.layout.ends - self.layout.starts)
        masks = self.layout.split(given)
        repeats = {name: (durations[name] * rate).round().long() for name, rate in self.rates.items()}
        return {name: masks[name].repeat_interleave(repeats[name]) for name in self.rates}


def parse_given(spans, layout):
    """["video:0-0.625", ...] -> bool (S,); ValueError names the valid form."""
    given = torch.zeros(layout.S, dtype=torch.bool)
    for text in spans:
        name, _, span = text.partition(":")
        segments = layout.of([name])
        try:
            start, end = (float(x) for x in span.split("-"))
        except ValueError:
            raise ValueError(f"--given {text}: write MODALITY:START-END in seconds, as video:0-0.625") from None
        mask = segments & layout.within(start, end)
        if not mask.any():
            ends = ", ".join(f"{e:g}" for e in layout.ends[segments][:4])
            raise ValueError(f"--given {text} holds no whole segment; {name}'s segments end at {ends}, ... seconds")
        given |= mask
    return given


def sample(trained, args, z0, given, generator, label):
    """Generate the segments of z0 (n, E) that are not given -> (n, E). Progress goes to one line."""
    parts, shows = [], sys.stdout.isatty()

    def on_step(step, steps):
        end_step(trained.device)
        if shows:
            print(f"\r{label}: samples {64 * len(parts)}.. of {len(z0)}, step {step}/{steps}  ", end="", flush=True)

    common = {"steps": args.steps or trained.preset.sampling_steps, "sampler": args.sampler or trained.preset.sampler}
    common |= {"generator": generator, "on_step": on_step}
    for part in z0.split(64):
        inputs = trained.model, trained.schedule, trained.layout, part.to(trained.device), given
        if args.method == "monl":
            z = generate(*inputs, guidance=args.guidance, guidance_drop=args.guidance_drop or None, **common)
        else:
            strength = args.strength if args.method == "reconstruction" else 0.0
            z = generate_baseline(*inputs, strength=strength, **common)
        parts.append(z.cpu())
    print("\r" + " " * 60 + "\r" if shows else "", end="")
    return torch.cat(parts)


def make(trained, args, z0, given, label):
    """Sample and decode -> clips. z0 and given: lists of what each window holds, (n, E), and is given, (S,).

    Each window after the first also has the last 5 frames of the one before, and their sound. The frames are encoded
    anew, as the beginning of a window. Sound segments are all alike and move over as they are, so sound is decoded once
    and no seam is heard.
    """
    layout, tokenizers = trained.layout, trained.tokenizers
    generator = torch.Generator().manual_seed(args.seed)
    z = sample(trained, args, z0[0], given[0], generator, label)
    if len(z0) == 1:
        return tokenizers.decode(z)
    frames = int(trained.per_frame(trained.shared)["video"].sum())
    shift = {name: int(mask.sum()) for name, mask in layout.split(trained.shared).items()}
    latents = layout.unpack(z)
    video, audio = [tokenizers["video"].decode(latents["video"])], [latents["audio"]]
    for k in range(1, len(z0)):
        latents = {name: x.roll(shift[name], 1) for name, x in latents.items()}
        latents["video"][:, : shift["video"]] = tokenizers["video"].encode(video[-1][:, -frames:])
        z = torch.where(layout.per_element(trained.shared), layout.pack(latents), z0[k])
        z = sample(trained, args, z, given[k], generator, f"{label}, window {k + 1} of {len(z0)}")
        latents = layout.unpack(z)
        video.append(tokenizers["video"].decode(latents["video"])[:, frames:])
        audio.append(latents["audio"][:, shift["audio"] :])
    return {"video": torch.cat(video, 1), "audio": tokenizers["audio"].decode(torch.cat(audio, 1))}


# --- Pictures and sound -----------------------------------------------------------------------------------------------

GREY, GREEN = (150, 150, 150), (60, 180, 75)  # given, generated: the colours of the paper's Fig. 9


def track(given, width, height=8):
    """Bool (k,) -> uint8 (height, width, 3): grey where given, green where generated."""
    colours = np.where(given[:, None], GREY, GREEN).astype(np.uint8)
    return np.repeat(colours[np.arange(width) * len(given) // width][None], height, 0)


def spectrogram(sound, rate, width, height):
    """Samples -> uint8 (height, width, 3): magnitudes in decibels to 4 kHz, low tones at the bottom."""
    size, sound = 2 ** round(math.log2(rate / 32)), torch.from_numpy(sound)
    lines = torch.stft(sound, size, max(1, len(sound) // width), window=torch.hann_window(size), pad_mode="constant",
                       return_complex=True).abs()[: 1 + 4000 * size // rate]  # fmt: skip
    level = 255 + 255 / 60 * 20 * torch.log10(lines / (size / 4) + 1e-6)  # 60 dB below full scale is black
    image = Image.fromarray(level.clamp(0, 255).byte().flip(0).numpy())
    return np.repeat(np.array(image.resize((width, height)))[..., None], 3, -1)


def film(video, audio, given, rate, width=256):
    """A clip -> frames uint8 (F, height, width, 3): the picture; below it both tracks and the spectrogram, and a white
    line at the present moment.

    given  the masks of frames and of samples
    """
    zoom = max(1, width // video.shape[2])
    width = zoom * video.shape[2]
    gap = np.zeros((8, width, 3), np.uint8)
    below = [gap, track(given[0], width, 16), gap, spectrogram(audio, rate, width, 48), track(given[1], width, 16)]
    frames = []
    for i, frame in enumerate(video):
        strip = np.concatenate(below)
        at = i * width // len(video)
        strip[:, at : at + 2] = 255
        frames.append(np.concatenate([frame.repeat(zoom, 0).repeat(zoom, 1), strip]))
    return np.stack(frames)


def write_mp4(path, wav, frames, fps):
    sound = {"audio_path": str(wav), "audio_codec": "aac", "output_params": ["-b:a", "64k"]}
    with imageio.get_writer(path, fps=fps, macro_block_size=16, ffmpeg_log_level="error", **sound) as writer:
        for frame in frames:
            writer.append_data(frame)


def write_sheet(path, title, video, audio, given, rate, true=None, names=None):
    """One block per sample: its frames in a row over their track, the true frames, its spectrogram over its track."""
    every = math.ceil(video.shape[1] / 24)  # frame of a long clip
    video, true = video[:, ::every], None if true is None else true[:, ::every]
    names = names or [f"{i:02}" for i in range(len(video))]
    edge, margin = max(48, min(64, video.shape[2])), 64 + 6 * max(map(len, names))
    width = edge * video.shape[1]

    def row(clip):
        frames = np.zeros((edge, width, 3), np.uint8)  # the true clip may end before the generated one
        for k, frame in enumerate(clip):
            frames[:, k * edge : (k + 1) * edge] = np.array(Image.fromarray(frame).resize((edge, edge), Image.NEAREST))
        return frames

    rows = []  # label, pixels
    for i, name in enumerate(names):
        if true is not None:
            rows.append((f"{name} true video", row(true[i])))
        rows += [(f"{name} video", row(video[i])), ("", track(given[0], width))]
        rows += [(f"{name} audio", spectrogram(audio[i], rate, width, edge)), ("", track(given[1], width))]
        rows.append(("", np.zeros((10, width, 3), np.uint8)))
    sheet = Image.new("RGB", (width + margin, 20 + sum(len(pixels) for _, pixels in rows)))
    pen, y = ImageDraw.Draw(sheet), 20
    pen.text((margin, 4), f"{title}: grey = given, green = generated", fill="white")
    for label, pixels in rows:
        sheet.paste(Image.fromarray(pixels), (margin, y))
        pen.text((4, y + 2), label, fill="white")
        y += len(pixels)
    sheet.save(path)


def write_media(folder, task, out):
    """mp4 and WAV of every sample, and a sheet of the first 8."""
    rate, given = out["sample_rate"], (out["given_video"], out["given_audio"])
    for i, (video, audio) in enumerate(zip(out["video"], out["audio"])):
        wav = folder / f"{i:02}.wav"
        soundfile.write(wav, audio, rate)
        write_mp4(folder / f"{i:02}.mp4", wav, film(video, audio, given, rate), out["fps"])
    true = out["video_true"][:8] if "video_true" in out else None
    write_sheet(folder / "sheet.png", task, out["video"][:8], out["audio"][:8], given, rate, true)


# --- All of it --------------------------------------------------------------------------------------------------------


def check(args, trained):
    """-> the masks to sample, {task: bool (S,)}. ValueError where arguments contradict each other or the checkpoint."""
    mistakes = [
        (args.given and args.task != "all", "--given and --task each say what is given: use one"),
        (args.guidance_drop and not args.guidance, "--guidance-drop is for a --guidance other than 0"),
        (args.guidance and args.method != "monl",
         "--guidance takes the given part away at t = T: it needs --method monl"),
        (args.strength != STRENGTH and args.method != "reconstruction", "--strength is for --method reconstruction"),
        ((args.input or args.seconds) and not trained.decodes,
         "--input and --seconds need a tokenizer for clips: this checkpoint was trained on a .npz of latents"),
        (args.seconds and args.seconds < trained.span, f"--seconds must be {trained.span:g}, one window, or more"),
        (args.input and args.task == "joint", "--input is a clip to be given, but --task joint is given nothing"),
    ]  # fmt: skip
    for wrong, message in mistakes:
        if wrong:
            raise ValueError(message)
    trained.layout.of(args.guidance_drop)  # are they there?
    if args.given:
        return {"custom": parse_given(args.given, trained.layout)}
    tasks = TASKS if args.task == "all" else (args.task,)
    if args.task == "all" and not {"video", "audio"} <= {*trained.layout.names}:
        tasks = [task for task in TASKS if task not in ("a2v", "v2a")]
    return {task: task_mask(task, trained.layout) for task in tasks}


def package(trained, made, true, given, order):
    """Everything of one task as numpy arrays, the contents of samples.npz. given: of each window."""
    out = {name: x.numpy() for name, x in made.items()}
    if trained.decodes:
        masks = [trained.per_frame(mask) for mask in given]
        shared = trained.per_frame(trained.shared)
        for name in masks[0]:
            later = [mask[name][int(shared[name].sum()) :] for mask in masks[1:]]
            out[f"given_{name}"] = torch.cat([masks[0][name], *later])[: out[name].shape[1]].numpy()
        out.update(fps=trained.media.fps, sample_rate=trained.media.sample_rate)
    else:  # latents come back as they came in, with their edges
        out.update({f"given_{name}": mask.numpy() for name, mask in trained.layout.split(given[0]).items()})
        out.update({f"{m.name}_edges": np.array(m.edges) for m in trained.layout.modalities})
    if given[0].any():
        out.update({"condition": order.numpy(), **{f"{name}_true": x.numpy() for name, x in true.items()}})
    return out


def run(args):
    trained = Trained(args.ckpt, open_device(args.device))
    tasks = check(args, trained)
    windows, seconds = trained.windows(args.seconds), args.seconds or trained.span
    clips, z_clips = {}, [torch.zeros(1, trained.layout.E)] * windows  # where nothing is given: only the shape
    if any(given.any() for given in tasks.values()):
        # Where the windows after the first are given nothing of the clip, it need not last longer than the first.
        goes_on = trained.data == "toy" and not args.input
        lasts = goes_on or any((given & ~trained.shared).any() for given in tasks.values())
        clips = trained.clips(args.input, args.n, seconds if lasts else trained.span)
        z_clips = [trained.tokenizers.encode(trained.window(clips, k)) for k in range(windows)]
    order = torch.arange(args.n) % len(z_clips[0])
    for task, given in tasks.items():
        given = trained.masks(given, windows, seconds)
        made = make(trained, args, [z[order] for z in z_clips], given, task)
        true = {name: x[order] for name, x in clips.items()}
        if args.seconds:
            made, true = (trained.cut(x, 0, args.seconds) for x in (made, true))
        folder = Path(args.out) / task
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # a former run may have made more
            if path.suffix in (".mp4", ".wav", ".png") and (path.stem.isdecimal() or path.stem == "sheet"):
                path.unlink()
        out = package(trained, made, true, given, order)
        np.savez_compressed(folder / "samples.npz", **out)
        if trained.decodes:
            write_media(folder, task, out)
        print(f"wrote {folder}")


def main():
    parser = make_parser(__doc__.split("`")[0], n=8)
    parser.add_argument("--given", nargs="+", action="extend", default=[], metavar="SPAN",
                        help="in place of a task: spans that are given, as video:0-0.625 audio:0-2")  # fmt: skip
    parser.add_argument("--input", help="a clip to take the given part from (held-out clips)")
    parser.add_argument("--out", default="samples", help="folder to write to (%(default)s)")
    args = parser.parse_args()
    with parser.guarding("use a smaller --n or fewer --seconds"):
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
