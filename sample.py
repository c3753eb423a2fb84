"""Sample a trained AVDiT on every task, then see it and hear it [Sec. 3.3, Sec. 6.2]. See `python sample.py --help`.

Below sample() stands what it uses: the checkpoint, masks, windows, pictures and sound, the command line."""

import math
import sys
from io import BytesIO
from os.path import expanduser
from pathlib import Path

import imageio
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from avdit import PRESETS, SAMPLERS, TASKS, AVDiT, Layout, Modality, NoiseSchedule, generate, task_mask
from data import Media, clip_windows, in_chunks, kind_of
from train import DEVICES, DTYPES, Parser, alone, flush, number, open_device, opened, precision


def sample(args):
    """Write args.n samples of every task to args.out. Raises ValueError if the arguments are wrong."""
    trained, out = Trained(args.ckpt, open_device(args.device), args.data), Path(args.out).absolute()
    windows = Windows(trained, args.seconds)
    masks = choose_masks(args, trained, windows.whole)  # {task: bool (S,)}, True = given
    dropped = trained.layout.of(args.guidance_drop or trained.layout.names)  # raises if one is unknown
    true, index = true_clips(args, trained, windows, masks)  # where the given parts come from
    alone(out)
    if trained.data.decodes and any(given.any() for given in masks.values()):
        write_media(out / "true", package(trained, windows, windows.cut(true), torch.ones(windows.whole.S).bool()))
    for task, given in masks.items():
        if args.guidance and not (windows.masks(given) & dropped).any():
            print(f"{task} is not guided: it is given nothing that the unconditional pass could drop")
        arrays = package(trained, windows, generate_clips(args, trained, windows, true, given, task), given)
        if given.any():
            arrays |= {"condition": index.numpy(), **{f"{name}_true": x.numpy() for name, x in true.items()}}
        (out / task).mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / task / "samples.npz", **arrays)
        if trained.data.decodes:
            write_media(out / task, arrays, sheet=task)
        print(f"wrote {out / task}")
    if trained.data.decodes:
        print(f"open {write_page(out, windows.whole, masks, args.n)} to see and hear them")


class Trained:
    """A checkpoint ready to be sampled: the network with averaged weights, its layout, its tokenizers, its data."""

    def __init__(self, path, device, data=None):
        path, self.device = Path(path), device
        path = path / "ckpt.pt" if path.is_dir() else path
        if not path.exists():
            raise ValueError(f"there is no checkpoint {path}: train.py writes one, --ckpt names it")
        with opened(path) as saved:
            config = saved["config"]
            self.preset, self.held_out = PRESETS[config["preset"]], saved["held_out"]
            self.media = Media(config["fps"], config["size"], config["sample_rate"])
            self.layout = Layout([Modality(**m) for m in saved["modalities"]])
            self.data = kind_of(config["data"])(config["data"] if data is None else data, self.media, self.layout)
            self.model = AVDiT(self.layout, *(config[key] for key in ("dim", "depth", "heads", "prediction")))
            self.model.load_state_dict(saved["ema"])
            self.tokenizers = self.data.tokenizers()
            self.tokenizers.load_state_dict(saved["tokenizers"])
        self.model.to(device).eval()
        self.schedule = NoiseSchedule().to(device)


# --- What is given ----------------------------------------------------------------------------------------------------


def choose_masks(args, trained, whole):
    """-> {task: bool (S,)} of the whole clip. ValueError if arguments contradict each other or the checkpoint."""
    mistakes = [
        (args.given and args.task != "all", "--given and --task each say what is given: use one"),
        (args.guidance_drop and not args.guidance, "--guidance-drop is for a --guidance other than 0"),
        (args.data is not None and kind_of(args.data) is not type(trained.data), "training had another kind of --data"),
        (args.input and Path(args.input).resolve().parent.parent == Path(args.out).resolve(), "--input lies in --out"),
        (args.input and (args.task == "joint" or not trained.data.decodes), "--input is for clips with a given part"),
    ]
    for wrong, message in mistakes:
        if wrong:
            raise ValueError(message)
    if args.given:
        return {"custom": parse_given(args.given, whole)}
    possible = [task for task in TASKS if task not in ("a2v", "v2a") or {"video", "audio"} <= {*whole.names}]
    return {task: task_mask(task, whole) for task in (possible if args.task == "all" else [args.task])}


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


def true_clips(args, trained, windows, masks):
    """-> the clips that given parts are cut from, n of them, and the index (n,) of each. They come from --input or from
    the held-out clips. They last one window at least, and cover every given segment."""
    given = torch.stack([*masks.values()]).any(0)  # in any task
    needed = [name for name, mask in windows.whole.split(given).items() if mask.any()]
    seconds = max(windows.span, min(windows.seconds, (given * windows.whole.ends).max().item()))
    if not needed:
        clips = trained.tokenizers.decode(torch.zeros(1, trained.layout.E))  # any: not looked at
    elif args.input is not None:
        try:
            clips = clip_windows(args.input, trained.layout, trained.media, seconds, needed=needed)
        except (ValueError, OSError) as why:
            raise ValueError(f"--input {args.input}: {why}") from None
        clips = {name: x[0][None] for name, x in clips.items()}
    else:
        clips = trained.data.held_out_clips(trained.held_out, args.n, seconds)
    index = torch.arange(args.n) % len(next(iter(clips.values())))
    return {name: x[index] for name, x in clips.items()}, index


# --- Generation, window after window ----------------------------------------------------------------------------------


class Windows:
    """How windows of the model's length make a clip of `seconds`. Each begins with the last 5 frames of the one before,
    which it is given, as in task "continue". Here for 5.125 s, a digit for each frame's video segment:

        of the whole clip   01111222233334444555566667777888899990000
        of window 0         01111222233334444
        of window 1                     01111222233334444
        of window 2                                 01111222233334444

    A window lasts `span` seconds, and the next one starts `stride` seconds later. They overlap in the segments
    `shared`, bool (S,), skip[name] of each modality. `whole` is the Layout of the whole clip."""

    def __init__(self, trained, seconds=None):
        self.layout, self.rates = trained.layout, {"video": trained.media.fps, "audio": trained.media.sample_rate}
        self.span, self.shared = self.layout.modalities[0].edges[-1], task_mask("continue", self.layout)
        self.skip = {name: int(mask.sum()) for name, mask in self.layout.split(self.shared).items()}
        self.stride = self.span - self.layout.ends[self.shared].max().item()
        if seconds and (seconds < self.span or not trained.data.decodes):
            raise ValueError(f"--seconds is for clips, and at least {self.span:g}, one window")
        self.seconds = seconds or self.span
        self.count = 1 + math.ceil((seconds - self.span) / self.stride - 1e-6) if seconds else 1
        self.whole = Layout([longer(m, seconds) for m in self.layout.modalities]) if seconds else self.layout

    def masks(self, given):
        """Mask (S,) of the whole clip -> (count, S): what each window is given; all but the first also `shared`."""
        parts = []  # of each modality: window k starts at segment k * step
        for m, mask in zip(self.layout.modalities, self.whole.split(given).values()):
            step = m.N - self.skip[m.name]
            parts.append(F.pad(mask, (0, m.N + (self.count - 1) * step - len(mask))).unfold(0, m.N, step))
        return torch.cat(parts, 1) | (self.shared & (torch.arange(self.count)[:, None] > 0))

    def window(self, clips, k):
        """The k-th window of the clips. The last frame and the last sound sample are repeated if they end earlier."""
        at = {n: round(k * self.stride * r) + torch.arange(round(self.span * r)) for n, r in self.rates.items()}
        return {name: x[:, at[name].clamp(max=x.shape[1] - 1)] for name, x in clips.items()}

    def cut(self, clips):
        """The clips without what follows `seconds`."""
        return {name: x[:, : round(self.seconds * self.rates[name])] for name, x in clips.items()}


def longer(m, seconds):
    """The modality with more segments as long as its last one, until `seconds` are covered."""
    end, step = m.edges[-1], m.edges[-1] - m.edges[-2]
    count = math.ceil((seconds - end) / step - 1e-6)
    return Modality(m.name, m.grid, m.channels, (*m.edges, *(end + step * (i + 1) for i in range(count))))


def generate_clips(args, trained, windows, true, given, label):
    """Generate what is not given, and decode -> clips. given: bool (S,) of the whole clip, its parts are in `true`.

    The shared frames are encoded anew: the first was the last of a segment of four, and is now a segment alone. The
    shared sound keeps its latents, because its segments are equally long, so that all sound is decoded at once."""
    generator, tokenizers, layout = torch.Generator().manual_seed(args.seed), trained.tokenizers, trained.layout
    if not trained.data.decodes:
        return tokenizers.decode(denoise(args, trained, tokenizers.encode(true), given, generator, label))
    frames, segments = round((windows.span - windows.stride) * trained.media.fps), windows.skip["audio"]  # shared
    video, audio = [], []  # of each window: frames, and latents of the sound
    for k, given_k in enumerate(windows.masks(given)):
        clips = windows.window(true, k)
        if k:
            clips["video"][:, :frames] = video[-1][:, -frames:]
        z_true = tokenizers.encode(clips)
        if k:
            layout.unpack(z_true)["audio"][:, :segments] = audio[-1][:, -segments:]  # writes into z_true
        z = denoise(args, trained, z_true, given_k, generator, f"{label}, window {k + 1} of {windows.count}")
        # A folder's later segments are residuals of the TRUE first frame. Decode given ones with it, not with another.
        shown = [in_chunks(tokenizers["video"].decode, layout.unpack(x)["video"]) for x in (z_true, z)]
        given_frames = per_frame(given_k, layout, trained.media)["video"]
        video.append(torch.where(given_frames[:, None, None, None], *shown))
        audio.append(layout.unpack(z)["audio"])
    video = torch.cat([video[0], *(x[:, frames:] for x in video[1:])], 1)
    audio = torch.cat([audio[0], *(x[:, segments:] for x in audio[1:])], 1)
    return windows.cut({"video": video, "audio": in_chunks(tokenizers["audio"].decode, audio)})


def denoise(args, trained, z0, given, generator, label):
    """avdit.generate for the samples z0 (n, E), 64 at a time, with a progress line -> (n, E)."""
    parts, shows = [], sys.stdout.isatty()

    def on_step(step, steps):
        flush(trained.device)
        if shows:
            print(f"\r{label}: samples {64 * len(parts)}.. of {len(z0)}, step {step}/{steps}  ", end="", flush=True)

    for x in z0.split(64):
        with precision(args.dtype, trained.device):
            z = generate(trained.model, trained.schedule, trained.layout, x.to(trained.device), given, on_step=on_step,
                steps=args.steps or trained.preset.sampling_steps, sampler=args.sampler or trained.preset.sampler,
                guidance=args.guidance, guidance_drop=args.guidance_drop or None, generator=generator)  # fmt: skip
        parts.append(z.cpu())
    print("\r" + " " * 70 + "\r" if shows else "", end="")
    return torch.cat(parts)


# --- Pictures and sound -----------------------------------------------------------------------------------------------


def per_frame(given, layout, media):
    """Mask (S,) of this layout -> {"video": bool (frames,), "audio": bool (sound samples,)}."""
    masks, durations = layout.split(given), layout.split(layout.ends - layout.starts)
    rates = {"video": media.fps, "audio": media.sample_rate}
    return {name: masks[name].repeat_interleave((durations[name] * rates[name]).round().long()) for name in rates}


def package(trained, windows, clips, given):
    """Clips and masks as numpy arrays, for samples.npz; sample() adds the true clips if anything is given."""
    arrays = {name: x.numpy() for name, x in clips.items()}
    if trained.data.decodes:
        masks = per_frame(given, windows.whole, trained.media)  # the last segment may end later than the clip
        arrays |= {f"given_{name}": mask[: arrays[name].shape[1]].numpy() for name, mask in masks.items()}
        return arrays | {"fps": trained.media.fps, "sample_rate": trained.media.sample_rate}
    arrays |= {f"given_{name}": mask.numpy() for name, mask in trained.layout.split(given).items()}
    return arrays | {f"{m.name}_edges": np.array(m.edges) for m in trained.layout.modalities}


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
    return np.array(Image.fromarray(level.clamp(0, 255).byte().flip(0).numpy()).resize((width, height)).convert("RGB"))


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
    every, names = math.ceil(video.shape[1] / 24), names or [f"{i:02}" for i in range(len(video))]  # a frame in so many
    video, true = video[:, ::every], None if true is None else true[:, ::every]
    edge, margin = max(48, min(64, video.shape[2])), 64 + 6 * max(map(len, names))
    width = edge * video.shape[1]

    def row(clip):
        frames = [np.array(Image.fromarray(frame).resize((edge, edge), Image.NEAREST)) for frame in clip]
        return np.pad(np.concatenate(frames, 1), ((0, 0), (0, width - edge * len(clip)), (0, 0)))  # it may end earlier

    rows = []  # label, pixels
    for i, name in enumerate(names):
        rows += [] if true is None else [(f"{name} true video", row(true[i]))]
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


def write_media(folder, made, sheet=None):
    """An mp4 and a WAV of every sample, and a sheet of the first 8 if it has a title."""
    rate, given = made["sample_rate"], (made["given_video"], made["given_audio"])
    folder.mkdir(parents=True, exist_ok=True)
    more = len(made["video"])
    while (folder / f"{more:02}.mp4").exists():  # an earlier run made more samples
        (folder / f"{more:02}.mp4").unlink()
        (folder / f"{more:02}.wav").unlink(missing_ok=True)
        more += 1
    for i, (video, audio) in enumerate(zip(made["video"], made["audio"])):
        soundfile.write(buffer := BytesIO(), audio, rate, format="WAV")  # not to the file: its errors are the system's
        (wav := folder / f"{i:02}.wav").write_bytes(buffer.getvalue())
        sound = {"audio_path": str(wav), "audio_codec": "aac", "output_params": ["-b:a", "64k"]}
        settings = {"fps": made["fps"], "macro_block_size": 16, "ffmpeg_log_level": "error", **sound}
        imageio.mimwrite(folder / f"{i:02}.mp4", film(video, audio, given, rate), **settings)
    if sheet:
        write_sheet(folder / "sheet.png", sheet, made["video"][:8], made["audio"], given, rate, made.get("video_true"))


def write_page(out, layout, masks, n):
    """Write OUT/index.html: every task, what is given, its clips beside the true ones, its sheet -> its path."""
    seconds = layout.ends - layout.starts
    page = ["<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>AVDiT</title>",
            "<style>body {font-family: sans-serif} div {display: flex; flex-wrap: wrap; gap: 1em} figure {margin: 0;",
            "max-width: 45%} img, video {max-width: 100%}</style><p>Grey was given, green was generated."]  # fmt: skip
    for task, given in masks.items():
        spans = [f"{x:g} s of {m}" for m in layout.names if (x := seconds[given & layout.of([m])].sum())]
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
    add("--ckpt", default="runs/toy", type=expanduser, help="a ckpt.pt, or its folder (%(default)s)")
    add("--data", type=expanduser, help="where the training data are, if they have moved")
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
    parser.add_argument("--input", type=expanduser, help="a clip whose parts are given (held-out clips)")
    parser.add_argument("--out", default="samples", type=expanduser, help="folder to write to (%(default)s)")
    args = parser.parse_args()
    with parser.guarding("use a smaller --n or fewer --seconds"):
        sample(args)


if __name__ == "__main__":
    main()
