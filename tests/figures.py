"""The README's pictures: .github/idea.png from the core alone, .github/clips.gif from what sample.py wrote.

`python tests/figures.py` after the README's main command.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from avdit import MONL, PRESETS, TASKS, Layout, sample_timesteps, task_mask
from sample import film

FONT, SMALL = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
NAMES = {"vanilla": "Vanilla", "pt": "Pt: per time-segment", "pm": "Pm: per modality", "ptm": "Ptm: both"}
GIVEN = {
    "joint": "joint: nothing is given",
    "a2v": "a2v: the sound is given",
    "v2a": "v2a: the video is given",
    "inpaint": "inpaint: both ends are given",
    "continue": "continue: 0.625 s are given",
    "continue-2s": "continue-2s: 0.125 s are given",
}


def shade(t):
    """Colour of a timestep: t = 0 is white, t = 1000 dark green."""
    return tuple(round(255 - (255 - dark) * t / 1000) for dark in (10, 85, 60))


def panel(pen, x, y, title, t, layout, width=300):
    """One timestep vector, (S,), at (x, y): a row a modality, each segment as wide as it lasts; white is t = 0."""
    pen.text((x, y), title, fill="black", font=FONT)
    second = width / float(layout.ends.max())
    rows = {name: y + 24 + 30 * i for i, name in enumerate(layout.names)}
    row_of_segment = [rows[m.name] for m in layout.modalities for _ in range(m.N)]
    for n in range(layout.S):
        left, right = x + float(layout.starts[n]) * second, x + float(layout.ends[n]) * second
        top = row_of_segment[n]
        pen.rectangle((left, top, right, top + 26), fill=shade(t[n].item()), outline=(120, 120, 120))


def idea(path):
    """Left: one draw of t from each training strategy. Right: t at a moment of sampling, for every task."""
    layout = Layout(PRESETS["toy"].modalities)
    picture = Image.new("RGB", (1120, 470), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((70, 10), "Training: four ways to draw t", fill="black", font=FONT)
    pen.text((430, 10), "Sampling: t = 0 where given, t = tau (here 600) where wanted", fill="black", font=FONT)
    for i, name in enumerate(MONL):
        t = sample_timesteps(name, layout, 1, 1000, torch.Generator().manual_seed(7))[0]
        panel(pen, 70, 50 + 105 * i, NAMES[name], t, layout)
        pen.text((8, 82 + 105 * i), "video", fill="black", font=SMALL)
        pen.text((8, 112 + 105 * i), "sound", fill="black", font=SMALL)
    for i, task in enumerate(TASKS):
        t = torch.where(task_mask(task, layout), 0, 600)
        panel(pen, 430 + 345 * (i % 2), 50 + 105 * (i // 2), GIVEN[task], t, layout)
    for k in range(301):  # the scale
        pen.line((430 + k, 400, 430 + k, 420), fill=shade(1000 * k / 300))
    pen.rectangle((430, 400, 731, 420), outline=(120, 120, 120))
    pen.text((430, 425), "t = 0, clean", fill="black", font=SMALL)
    pen.text((655, 425), "t = T, noise", fill="black", font=SMALL)
    pen.text((775, 402), "time runs from left to right, 2.125 s", fill="black", font=SMALL)
    picture.save(path)


def moving(samples, path, tasks=("a2v", "v2a", "continue", "joint")):
    """One clip of each of these tasks, side by side: picture, tracks, and the spectrogram with the present moment."""
    titles = ("audio to video", "video to audio", "continue", "both from nothing")
    films = []
    for i, task in enumerate(tasks):  # a clip of its own for each
        out = np.load(samples / task / "samples.npz", allow_pickle=False)
        given = out["given_video"], out["given_audio"]
        films.append(film(out["video"][i], out["audio"][i], given, int(out["sample_rate"]), width=192))
    frames = []
    for row in zip(*films):
        gap = np.full((row[0].shape[0], 12, 3), 255, np.uint8)
        image = Image.fromarray(np.concatenate([x for frame in row for x in (frame, gap)][:-1], 1))
        page = Image.new("RGB", (image.width, image.height + 24), "white")
        page.paste(image, (0, 24))
        pen = ImageDraw.Draw(page)
        for i, title in enumerate(titles):
            pen.text((i * (192 + 12), 3), title, fill="black", font=FONT)
        frames.append(page)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=125, loop=0)


def faces(samples, path):
    """The sheets of two tasks, one below the other."""
    sheets = [Image.open(samples / task / "sheet.png").convert("RGB") for task in ("a2v", "continue")]
    Image.fromarray(np.concatenate([np.asarray(sheet) for sheet in sheets])).save(path, quality=85)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("`")[0])
    parser.add_argument("--samples", type=Path, default=Path("samples"), help="what sample.py wrote (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / ".github", help="folder of the pictures (%(default)s)")
    parser.add_argument("--faces", type=Path, help="what sample.py wrote of a model of real clips, for face.jpg")
    args = parser.parse_args()
    if args.faces:
        faces(args.faces, args.out / "face.jpg")
    else:
        idea(args.out / "idea.png")
        moving(args.samples, args.out / "clips.gif")


if __name__ == "__main__":
    main()
