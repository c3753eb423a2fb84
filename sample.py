"""Sample a trained AVDiT on every task, then see it and hear it [Sec. 3.3, Sec. 6.2]. See `python sample.py --help`.

sample() loads a checkpoint, chooses what is given, generates, decodes and writes. Below it stands what it uses: masks,
generation window after window, the checkpoint, pictures and sound, the command line."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import imageio
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from avdit import PRESETS, SAMPLERS, TASKS, Layout, Modality, NoiseSchedule, generate, task_mask
from data import Media, clip_windows, open_data
from train import DEVICES, DTYPES, Parser, end_step, number, open_device, opened, precision


def sample(args):
    """Write args.n samples of every task to args.out. Raises ValueError if the arguments are wrong."""
    trained, out = Trained(args.ckpt, open_device(args.device), args.seconds), Path(args.out)
    masks = choose_masks(args, trained)  # {task: bool (S,) of the whole clip}, True = given
    true, index = true_clips(trained, args, masks)  # where the given parts come from
    z_true = trained.encode(true, args.n)  # a list of (n, E), one per window
    if trained.data.decodes and true:
        write_media(out / "true", package(trained, true, torch.ones(trained.whole.S, dtype=torch.bool)))
    for task, given in masks.items():
        arrays = package(trained, generate_clips(trained, args, z_true, given, task), given)
        if given.any():
            arrays |= {"condition": index.numpy(), **{f"{name}_true": x.numpy() for name, x in true.items()}}
        (out / task).mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / task / "samples.npz", **arrays)
        if trained.data.decodes:
            write_media(out / task, arrays, sheet=task)
        print(f"wrote {out / task}")
    if trained.data.decodes:
        print(f"open {write_page(out, trained.whole, masks, args.n)} to see and hear them")


# --- What is given ----------------------------------------------------------------------------------------------------


def choose_masks(args, trained):
    """-> {task: bool (S,)} of the whole clip. ValueError if arguments contradict each other or the checkpoint."""
    mistakes = [
        (args.given and args.task != "all", "--given and --task each say what is given: use one"),
        (args.guidance_drop and not args.guidance, "--guidance-drop is for a --guidance other than 0"),
        (args.input and not trained.data.decodes, "--input needs clips, and this checkpoint was trained on latents"),
        (args.input and args.task == "joint", "--input is a clip to be given, but --task joint is given nothing"),
    ]
    for wrong, message in mistakes:
        if wrong:
            raise ValueError(message)
    trained.layout.of(args.guidance_drop)  # raises if one is unknown
    if args.given:
        return {"custom": parse_given(args.given, trained.whole)}
    tasks = TASKS if args.task == "all" else (args.task,)
    if args.task == "all" and not {"video", "audio"} <= {*trained.layout.names}:
        tasks = [task for task in TASKS if task not in ("a2v", "v2a")]
    return {task: task_mask(task, trained.whole) for task in tasks}


def parse_given(spans, layout):
    """["video:0-0.625", ...] -> bool (S,): the segments wholly inside a span. ValueError names the valid form."""
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


def true_clips(trained, args, masks):
    """-> the clips that given parts are cut from (n of them; {} if nothing is given), and the index of each (n,).

    They come from --input or from the held-out clips, and reach the last given segment at least."""
    ends = [trained.whole.ends[given].max().item() for given in masks.values() if given.any()]
    if not ends:
        return {}, torch.arange(0)
    seconds = max(trained.span, *ends)
    if args.input:
        try:
            clips = clip_windows(args.input, trained.layout, trained.media, seconds)
        except ValueError as why:
            raise ValueError(f"--input {args.input}: {why}") from None
        clips = {name: x[0][None] for name, x in clips.items()}
    else:
        clips = trained.data.held_out_clips(trained.held_out, args.n, seconds)
    index = torch.arange(args.n) % len(next(iter(clips.values())))
    return {name: x[index] for name, x in clips.items()}, index


# --- Generation, window after window ----------------------------------------------------------------------------------
# A clip longer than the model's window is made of windows that overlap by 5 frames (0.625 s), as task "continue" gives:
#
#     video segments of the whole clip   0  1  2  3  4  5  6  7  8  9  10
#     of window 0                        0  1  2  3  4
#     of window 1                                 0  1  2  3  4
#     of window 2                                          0  1  2  3  4
#
# A window after the first is given its first two segments: 5 frames, the last 5 frames of the window before.


def generate_clips(trained, args, z_true, given, label):
    """Generate what is not given, and decode -> clips. z_true: one (n, E) per window; given: (S,) of the whole clip.

    Shared frames are encoded anew, because a window's first segment is one frame alone. Shared sound keeps its latents,
    because its segments are equally long. So the sound is decoded once, and no seam is heard."""
    generator, tokenizers = torch.Generator().manual_seed(args.seed), trained.tokenizers
    skip, frames, latents, video, audio = trained.skip, trained.shared_frames, {}, [], []
    for k, (z, given_k) in enumerate(zip(z_true, trained.windows(given))):
        if k:
            before = {name: x.roll(skip[name], 1) for name, x in latents.items()}  # the shared segments come first now
            before["video"][:, : skip["video"]] = tokenizers["video"].encode(video[-1][:, -frames:])
            z = torch.where(trained.layout.per_element(trained.shared), trained.layout.pack(before), z)
            given_k = given_k | trained.shared
        z = denoise(trained, args, z, given_k, generator, f"{label}, window {k + 1} of {len(z_true)}")
        if len(z_true) == 1:
            return tokenizers.decode(z)
        latents = trained.layout.unpack(z)
        video.append(tokenizers["video"].decode(latents["video"])[:, frames * (k > 0) :])
        audio.append(latents["audio"][:, skip["audio"] * (k > 0) :])
    clips = {"video": torch.cat(video, 1), "audio": tokenizers["audio"].decode(torch.cat(audio, 1))}
    return trained.cut(clips, 0, trained.seconds)


def denoise(trained, args, z0, given, generator, label):
    """avdit.generate for the samples z0 (n, E), 64 at a time, with a progress line -> (n, E)."""
    parts, shows = [], sys.stdout.isatty()

    def on_step(step, steps):
        end_step(trained.device)
        if shows:
            print(f"\r{label}: samples {64 * len(parts)}.. of {len(z0)}, step {step}/{steps}  ", end="", flush=True)

    for part in z0.split(64):
        with precision(args.dtype, trained.device, trained.layout):
            z = generate(
                trained.model, trained.schedule, trained.layout, part.to(trained.device), given,
                steps=args.steps or trained.preset.sampling_steps, sampler=args.sampler or trained.preset.sampler,
                guidance=args.guidance, guidance_drop=args.guidance_drop or None, generator=generator, on_step=on_step,
            )  # fmt: skip
        parts.append(z.cpu())
    print("\r" + " " * 70 + "\r" if shows else "", end="")
    return torch.cat(parts)


class Trained:
    """A checkpoint ready to be sampled: the network with averaged weights, its tokenizers, its layout, its data.

    A window lasts `span` seconds; the next one starts `stride` seconds later. They share the segments `shared`, bool
    (S,): skip[name] segments of each modality, `shared_frames` frames. `count` windows make a clip of `seconds` with
    the layout `whole`, which goes on with segments as long as each modality's last."""

    def __init__(self, path, device, seconds=None):
        path, self.device = Path(path), device
        path = path if path.suffix == ".pt" else path / "ckpt.pt"
        if not path.exists():
            raise ValueError(f"there is no checkpoint {path}: train.py writes one, --ckpt names it")
        with opened(path) as saved:
            config = saved["config"]
            self.preset, self.held_out = PRESETS[config["preset"]], saved["held_out"]
            self.media = Media(config["fps"], config["size"], config["sample_rate"])
            self.layout = Layout([Modality(**m) for m in saved["modalities"]])
            self.data = open_data(config["data"], self.media, self.layout)
            self.model = self.preset.model(self.layout, config["prediction"])
            self.model.load_state_dict(saved["ema"])
            self.tokenizers = self.data.tokenizers()
            self.tokenizers.load_state_dict(saved["tokenizers"])
        self.model.to(device).eval()
        self.schedule = NoiseSchedule().to(device)
        self.rates = {"video": self.media.fps, "audio": self.media.sample_rate}
        edges, self.shared = self.layout.modalities[0].edges, task_mask("continue", self.layout)
        self.span, shared_end = edges[-1], edges[min(2, len(edges) - 1)]
        self.stride, self.shared_frames = self.span - shared_end, round(shared_end * self.media.fps)
        self.skip = {name: int(mask.sum()) for name, mask in self.layout.split(self.shared).items()}
        if seconds and (seconds < self.span or not self.data.decodes):
            raise ValueError(f"--seconds is for clips, and at least {self.span:g}, one window")
        self.seconds, longer = seconds or self.span, []
        self.count = 1 + math.ceil((seconds - self.span) / self.stride - 1e-6) if seconds else 1
        for m in self.layout.modalities:
            step = m.edges[-1] - m.edges[-2]
            count = int((self.seconds - m.edges[-1]) / step + 1e-6) if seconds else 0
            longer.append(replace(m, edges=(*m.edges, *(m.edges[-1] + step * (i + 1) for i in range(count)))))
        self.whole = Layout(longer)

    def windows(self, given):
        """Mask (S,) of the whole clip -> (count, S): what each window is given of it."""
        parts = []
        for m, mask in zip(self.layout.modalities, self.whole.split(given).values()):
            step = max(1, m.N - self.skip[m.name])
            parts.append(F.pad(mask, (0, m.N + (self.count - 1) * step - len(mask))).unfold(0, m.N, step))
        return torch.cat(parts, 1)

    def encode(self, clips, n):
        """Latents of each window of the clips, a list of (n, E); zeros if there are no clips."""
        if not clips:
            return [torch.zeros(n, self.layout.E)] * self.count
        parts = (self.window(clips, k) if self.data.decodes else clips for k in range(self.count))
        return [self.tokenizers.encode(part) for part in parts]

    def window(self, clips, k):
        """The k-th window of the clips. Zeros follow if they end before it does."""
        part = self.cut(clips, k * self.stride, k * self.stride + self.span)
        missing = {name: round(self.span * rate) - part[name].shape[1] for name, rate in self.rates.items()}
        return {name: torch.cat([x, x.new_zeros(len(x), missing[name], *x.shape[2:])], 1) for name, x in part.items()}

    def cut(self, clips, start, end):
        """Seconds `start` to `end` of the clips."""
        spans = {name: slice(round(start * rate), round(end * rate)) for name, rate in self.rates.items()}
        return {name: x[:, spans[name]] for name, x in clips.items()}

    def per_frame(self, given, layout):
        """Mask (S,) of this layout -> {"video": bool (frames,), "audio": bool (sound samples,)}."""
        masks, durations = layout.split(given), layout.split(layout.ends - layout.starts)
        repeats = {name: (durations[name] * rate).round().long() for name, rate in self.rates.items()}
        return {name: masks[name].repeat_interleave(repeats[name]) for name in self.rates}


def package(trained, clips, given):
    """Clips and masks as numpy arrays: the contents of samples.npz, but for the true clips."""
    out = {name: x.numpy() for name, x in clips.items()}
    if trained.data.decodes:
        for name, mask in trained.per_frame(given, trained.whole).items():
            out[f"given_{name}"] = F.pad(mask, (0, out[name].shape[1] - len(mask))).numpy()  # may end inside a segment
        return out | {"fps": trained.media.fps, "sample_rate": trained.media.sample_rate}
    out |= {f"given_{name}": mask.numpy() for name, mask in trained.layout.split(given).items()}
    return out | {f"{m.name}_edges": np.array(m.edges) for m in trained.layout.modalities}


# --- Pictures and sound -----------------------------------------------------------------------------------------------

GREY, GREEN = (150, 150, 150), (60, 180, 75)  # given, generated: the colours of the paper's Fig. 9


def track(given, width, height=8):
    """bool (k,) -> uint8 (height, width, 3): grey where given, green where generated."""
    colours = np.where(given[:, None], GREY, GREEN).astype(np.uint8)
    return np.repeat(colours[np.arange(width) * len(given) // width][None], height, 0)


def spectrogram(sound, rate, width, height):
    """Sound (samples,) -> uint8 (height, width, 3): decibels, from 0 Hz at the bottom to 4 kHz (or rate / 2)."""
    size, sound = 2 ** round(math.log2(rate / 32)), torch.from_numpy(sound)
    lines = torch.stft(sound, size, max(1, len(sound) // width), window=torch.hann_window(size), pad_mode="constant",
                       return_complex=True).abs()[: 1 + 4000 * size // rate]  # fmt: skip
    level = 255 + 255 / 60 * 20 * torch.log10(lines / (size / 4) + 1e-6)  # 60 dB below full scale is black
    image = Image.fromarray(level.clamp(0, 255).byte().flip(0).numpy())
    return np.repeat(np.array(image.resize((width, height)))[..., None], 3, -1)


def film(video, audio, given, rate, width=256):
    """One clip -> frames uint8 (F, height, width, 3): the picture above its track, and the spectrogram above its track,
    with a white line at the present moment. given: the masks of frames and of sound samples."""
    zoom = max(1, width // video.shape[2])
    width = zoom * video.shape[2]
    gap, frames = np.zeros((8, width, 3), np.uint8), []
    below = [gap, track(given[0], width, 16), gap, spectrogram(audio, rate, width, 48), track(given[1], width, 16)]
    for i, frame in enumerate(video):
        strip = np.concatenate(below)
        at = i * width // len(video)
        strip[:, at : at + 2] = 255
        frames.append(np.concatenate([frame.repeat(zoom, 0).repeat(zoom, 1), strip]))
    return np.stack(frames)


def write_sheet(path, title, video, audio, given, rate, true=None, names=None):
    """One block per sample: the true frames, the sample's frames above their track, its spectrogram above its track."""
    every = math.ceil(video.shape[1] / 24)  # of a long clip, one in so many frames
    video, true = video[:, ::every], None if true is None else true[:, ::every]
    names = names or [f"{i:02}" for i in range(len(video))]
    edge, margin = max(48, min(64, video.shape[2])), 64 + 6 * max(map(len, names))
    width = edge * video.shape[1]

    def row(clip):
        frames = [np.array(Image.fromarray(frame).resize((edge, edge), Image.NEAREST)) for frame in clip]
        return np.pad(np.concatenate(frames, 1), ((0, 0), (0, width - edge * len(clip)), (0, 0)))  # it may end earlier

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


def write_media(folder, out, sheet=None):
    """An mp4 and a WAV of every sample, and a sheet of the first 8 if it has a title."""
    rate, given = out["sample_rate"], (out["given_video"], out["given_audio"])
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # an earlier run may have made more samples
        if path.suffix in (".mp4", ".wav", ".png") and (path.stem.isdecimal() or path.stem == "sheet"):
            path.unlink()
    for i, (video, audio) in enumerate(zip(out["video"], out["audio"])):
        wav = folder / f"{i:02}.wav"
        soundfile.write(wav, audio, rate)
        sound = {"audio_path": str(wav), "audio_codec": "aac", "output_params": ["-b:a", "64k"]}
        settings = {"fps": out["fps"], "macro_block_size": 16, "ffmpeg_log_level": "error", **sound}
        imageio.mimwrite(folder / f"{i:02}.mp4", film(video, audio, given, rate), **settings)
    if sheet:
        write_sheet(folder / "sheet.png", sheet, out["video"][:8], out["audio"], given, rate, out.get("video_true"))


def write_page(out, layout, masks, n):
    """Write OUT/index.html: every task, what is given, its clips beside the true ones, its sheet -> its path."""
    seconds = layout.ends - layout.starts
    style = "body {font-family: sans-serif; margin: 1.5em} div {display: flex; flex-wrap: wrap; gap: 1em}"
    page = ["<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>AVDiT</title>",
            f"<style>{style} figure {{margin: 0; max-width: 45%}} img, video {{max-width: 100%}}</style>",
            "<p>Grey was given, green was generated.</p>"]  # fmt: skip
    for task, given in masks.items():
        spans = {name: seconds[given & layout.of([name])].sum() for name in layout.names}
        spans = [f"{x:g} s of {name}" for name, x in spans.items() if x]
        page.append(f"<h2>{task}</h2><p>Given: {' and '.join(spans) or 'nothing'}.</p><div>")
        for i in range(n):
            for folder in (task, "true") if given.any() else (task,):
                clip = f"<video controls width=256 src='{folder}/{i:02}.mp4'></video>"
                page.append(f"<figure>{clip}<figcaption>{folder} {i:02}</figcaption></figure>")
        page.append(f"</div><p><a href='{task}/sheet.png'><img src='{task}/sheet.png' alt='frames of {task}'></a></p>")
    (out / "index.html").write_text("\n".join(page))
    return out / "index.html"


# --- The command line -------------------------------------------------------------------------------------------------


def make_parser(about, n):
    """The arguments that tests/score.py shares."""
    parser = Parser(description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", default="runs/toy", help="a ckpt.pt, or its folder (%(default)s)")
    add("--task", default="all", choices=("all", *TASKS), help="what is given and what is generated (%(default)s)")
    add("--n", type=number(int, 1, 2**16), default=n, help="samples of each task (%(default)s)")
    add("--sampler", choices=SAMPLERS, help="how z steps down (the preset's)")
    add("--steps", type=number(int, 1, 1000), help="sampling steps (the preset's)")
    add("--guidance", type=number(float, -1000, 1000), default=0.0, help="guidance scale s of Eq. 16 (%(default)s)")
    add("--guidance-drop", nargs="+", action="extend", default=[], metavar="MODALITY",
        help="modalities that the unconditional pass drops (all that is given)")  # fmt: skip
    add("--seconds", type=number(float, 0.01, 3600), help="length of the clips, window after window (one window)")
    add("--device", default="auto", choices=DEVICES, help="where to compute (%(default)s)")
    add("--dtype", default="auto", choices=DTYPES, help="auto: bf16 if the chip has it (%(default)s)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the noise (%(default)s)")
    return parser


def main():
    parser = make_parser(__doc__.split(" See")[0], n=8)
    parser.add_argument("--given", nargs="+", action="extend", default=[], metavar="SPAN",
                        help="spans that are given, in place of a task: video:0-0.625 audio:0-2")  # fmt: skip
    parser.add_argument("--input", help="a clip whose parts are given (held-out clips)")
    parser.add_argument("--out", default="samples", help="folder to write to (%(default)s)")
    args = parser.parse_args()
    with parser.guarding("use a smaller --n or fewer --seconds"):
        sample(args)


if __name__ == "__main__":
    main()
