"""Score a model of the toy world: compare what its decoded pixels and sound show with what is true.

`python tests/score.py --ckpt runs/toy --n 256` prints one row per task; `--task continue --seconds 15.625` prints one row
per window. First stand the readers, which see only pixels and sound and never latents. Then come the scores, the
baselines and the table.
"""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import talking
from baselines import generate_baseline

import sample
from avdit import task_mask
from data import FRAMES, PIXELS, THIRDS, TOY, ToyWorld, mirror, toy_clips
from train import number, open_device

FPS, RATE = TOY.fps, TOY.sample_rate
RADIUS = 0.1258  # rms radius of a real ball, as read_video reads it
SCORES = ("align", "path", "hue", "hue_heard", "shape", "motion", "spread", "frechet_video", "frechet_audio", "nearest")


# --- Readers ----------------------------------------------------------------------------------------------------------


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
    audio = torch.nn.functional.pad(audio, (size // 2, size))
    window = torch.hann_window(size)
    return torch.stft(audio, size, hop, window=window, center=False, return_complex=True).abs().mT[:, :count]


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


# --- Scores -----------------------------------------------------------------------------------------------------------


def frechet(a, b):
    """Frechet distance of two sets of vectors (n, D) as Gaussians, after one fixed projection to 64 dimensions."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(a.shape[1], 64, dtype=torch.float64, generator=g))[0]
    a, b = a.double() @ basis, b.double() @ basis
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()  # trace of (A B)^(1/2)
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


def nearest(z, others):
    """(n,) distance of every clip's latents (n, E) to the nearest of the others, root mean square over all elements."""
    return torch.cdist(z, others).amin(1) / z.shape[1] ** 0.5


def spread(video, group):
    """Standard deviation of x over every `group` clips, as a share of the world's, where x is uniform."""
    return read_video(video)[0][..., 0].unflatten(0, (-1, group)).std(1).mean() * 12**0.5


def score(trained, task, clips, true, given, real, learned):
    """-> dict of the scores that mean something for the task.

    clips, true    raw clips of one window; true[i] gave clips[i] its given part, the segments of the mask `given`
    real, learned  latents of other real clips and of the training clips
    Scores run over the generated frames and the sound at them; motion, spread and nearest over the whole clip.
    """
    seen_given, heard_given = sample.per_frame(given, trained.layout, trained.media).values()
    at_frame = torch.arange(FRAMES) * RATE // FPS
    frames = ~(seen_given & heard_given[at_frame])
    position, hue, radius = read_video(clips["video"])
    height = read_height(clips["audio"])
    true_position, true_hue, _ = read_video(true["video"])
    makes_video, makes_audio = not seen_given.all(), not heard_given.all()
    seen = read_video(clips["video"][:, ~seen_given])[1] if makes_video else hue
    heard = read_timbre(clips["audio"][:, ~heard_given] if makes_audio else clips["audio"])
    s = {"align": (position[..., 1] - height)[:, frames].abs().mean()}
    if makes_video and seen_given.any():
        s["path"] = (position - true_position)[:, ~seen_given].abs().mean()
    elif makes_audio and not makes_video:
        s["path"] = (height - true_position[..., 1]).abs().mean()
    if makes_video and task != "joint":
        s["hue"] = circular(seen, true_hue).mean()
    s["hue_heard"] = circular(heard, seen if task == "joint" else true_hue).mean()
    if makes_video:
        s["shape"] = (radius[:, ~seen_given] / RADIUS - 1).abs().mean()
        s["motion"] = read_motion(position).mean()
    if task == "joint":
        s["spread"] = spread(clips["video"], len(clips["video"]))
    z, wanted = trained.tokenizers.encode(clips), trained.layout.per_element(~given)
    for name in trained.layout.names:
        elements = wanted & trained.layout.per_element(trained.layout.of([name]))
        if elements.any():
            s[f"frechet_{name}"] = frechet(z[:, elements], real[:, elements])
    s["nearest"] = nearest(z, learned).mean()
    return s


# --- The baselines ----------------------------------------------------------------------------------------------------

METHODS = ("monl", "replacement", "reconstruction")


def method(args):
    """While this context lasts, sample.py generates by args.method, where "monl" is avdit.generate itself."""
    if args.method == "monl":
        return nullcontext()

    def generate(*inputs, guidance, guidance_drop, **settings):
        strength = args.strength if args.method == "reconstruction" else 0.0
        return generate_baseline(*inputs, strength=strength, **settings)

    return mock.patch.object(sample, "generate", generate)


# --- The table --------------------------------------------------------------------------------------------------------


def toy_scores(trained):
    """-> score() as a function of (task, clips, true, given)."""
    real, learned = (trained.tokenizers.encode(toy_clips(*which)[0]) for which in ((1024, 2), (4096, 0)))
    return lambda *what: score(trained, *what, real, learned)


def table(args, trained, windows, tasks):
    """Print one row per task, or one row per window of a longer clip. The first row is real clips, encoded and decoded."""
    windows.seconds = windows.span + (windows.count - 1) * windows.stride  # whole windows are scored
    toy = isinstance(trained.data, ToyWorld)
    clips = trained.data.held_out_clips(trained.held_out, args.n, windows.seconds)
    first = windows.window(clips, 0)
    measure = toy_scores(trained) if toy else talking.Scores(trained, nearest)
    names, nothing = SCORES if toy else talking.SCORES, task_mask("joint", trained.layout)

    def row(name, task, made, true, given):
        s = measure(task, made, true, given)
        if toy and task == "a2v":  # once more, 16 samples of every sound, to see how they spread
            same = {name: x[torch.arange(args.n) // 16] for name, x in clips.items()}
            again = sample.generate_clips(args, trained, windows, same, given, task)
            s["spread"] = spread(again["video"], 16)
        cells = (f"{float(s[k]):14.3f}" if k in s else f"{'-':>14}" for k in names)
        print(f"{name:12}" + "".join(cells), flush=True)

    frechet_is = "; Frechet distances of latents to 1024 other clips, not FVD or FAD" if toy else ""
    print(f"{len(first['video'])} samples per task{frechet_is}")
    print(" " * 12 + "".join(f"{k:>14}" for k in names))
    if not toy:
        row("real", "", first, first, nothing)
        still = {name: x.clone() for name, x in first.items()}  # the last given frame stands still
        still["video"][:, 5:] = still["video"][:, 4:5]
        row("still", "continue", still, first, task_mask("continue", trained.layout))
    row("tokenizer", "", trained.tokenizers.decode(trained.tokenizers.encode(first)), first, nothing)
    for task, given in tasks.items():
        made = sample.generate_clips(args, trained, windows, clips, given, task)
        for k, mask in enumerate(windows.masks(given)):
            name = f"{task} {k + 1}" if windows.count > 1 else task
            row(name, task, windows.window(made, k), windows.window(clips, k), mask)


def make_parser():
    parser = sample.make_parser(__doc__.split("`")[0], n=256)
    add = parser.add_argument
    add("--method", default="monl", choices=METHODS, help="monl, or a baseline for models with one t (%(default)s)")
    add("--strength", type=number(float, 0, 1000), default=0.02, help="lambda of reconstruction (%(default)s)")
    parser.set_defaults(given=[], input=None)
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    with parser.guarding("use a smaller --n"):
        trained = sample.Trained(args.ckpt, open_device(args.device), args.data)
        windows = sample.Windows(trained, args.seconds)
        tasks, toy = sample.choose_masks(args, trained, windows.whole), isinstance(trained.data, ToyWorld)
        mistakes = [
            (not trained.data.decodes, "scores are for the toy world and for folders of clips, not for files of latents"),
            (toy and (args.n % 16 or args.n > 1024), "--n must be a multiple of 16 up to 1024"),
            (args.guidance and args.method != "monl", "--guidance is for --method monl"),
            (args.strength != 0.02 and args.method != "reconstruction", "--strength is for --method reconstruction"),
            (args.seconds and (not toy or args.task != "continue"),
             "--seconds is scored with --task continue of the toy world, where there is one right answer"),
        ]  # fmt: skip
        for wrong, message in mistakes:
            if wrong:
                parser.error(message)
        with method(args):
            table(args, trained, windows, tasks)


if __name__ == "__main__":
    main()
