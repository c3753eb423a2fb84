"""The paper's Tables 1 and 7 on the toy world: train every model from every seed, score it, print the tables.

`--curve` asks what one model for everything costs: it trains larger networks, and for four times as long. Every score
goes to OUT/scores.csv as soon as it is known. The same command goes on where it stopped. A model that train.py has already
trained with the same arguments into OUT/<MODEL>-<SEED>-<STEPS> is only scored.
"""

import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import score

import sample
from avdit import TASKS, task_mask
from train import RECIPES, open_device

# name -> arguments of train.py. Vanilla also stands for Table 1's conditional model of joint generation.
MODELS = {
    **{task: ("--mixture", f"task:{task}") for task in TASKS if task != "joint"},
    "Pm": ("--mixture", "pm"),
    "Vanilla": ("--mixture", "vanilla"),
    "MoNL": ("--mixture", "monl"),
    "Pt": ("--mixture", "pt"),
    "Ptm": ("--mixture", "ptm"),
    "Pt/Pm/Ptm": ("--mixture", "pt+pm+ptm"),
    "recipe": ("--prediction", "eps", "--optimizer", "adamw", "--lr", "5e-4", "--warmup", "5000", "--ema", "0.9999"),
}
OF_TABLES = tuple(MODELS)
MODELS |= {  # of --curve alone
    "All tasks": ("--mixture", "+".join(f"task:{task}" for task in TASKS)),
    "MoNL, width 256": (*MODELS["MoNL"], "--dim", "256", "--heads", "8"),
    "MoNL, 8 layers": (*MODELS["MoNL"], "--depth", "8"),
}
# of --curve: model, multiples of --steps. A model of one task has in 1/6 as many examples of it as All tasks in 1.
CURVE = (
    *((task, times) for times in (1 / 6, 1) for task in ("inpaint", "continue")),
    *((model, times) for model in ("All tasks", "MoNL", "MoNL, width 256") for times in (1, 4)),
    ("MoNL, 8 layers", 1),
)
# row of a table -> (model, arguments of score.py). The row "Conditional" has one model per task, named after it.
WAYS = {
    **{name: (name, ()) for name in MODELS if name not in (*TASKS, "recipe")},
    "MoNL, the paper's recipe": ("recipe", ()),
    "Vanilla": ("Vanilla", ("--method", "replacement")),
    **{
        f"Vanilla, reconstruction {strength}": ("Vanilla", ("--method", "reconstruction", "--strength", strength))
        for strength in ("0.02", "3")
    },
}
PAPER_1 = {  # Table 1: FAD and FVD, in the order of FRECHET
    "Conditional": (7.1, 63.6, 49.4, 11.5, 5.3, 15.9, 7.4, 12.1, 7.8, 35.3),
    "Pm": (7.0, 84.4, 34.1, 4.7, 6.2, 213.6, 4.5, 92.1, 5.6, 106.1),
    "Vanilla": (7.1, 63.6, 53.3, 8.1, 8.1, 226.8, 6.1, 140.8, 7.4, 121.1),
    "MoNL": (6.4, 77.6, 40.2, 5.3, 4.6, 11.8, 3.1, 8.8, 4.9, 34.6),
    "Pt": (6.6, 96.3, 124.5, 12.1, 5.1, 28.2, 5.0, 72.3, 7.2, 80.3),
    "Ptm": (7.0, 84.5, 52.5, 5.9, 5.4, 22.9, 4.8, 61.2, 5.7, 55.3),
    "Pt/Pm/Ptm": (9.0, 90.1, 43.1, 5.1, 5.2, 13.4, 4.1, 16.9, 5.9, 40.9),
}
PAPER_7 = {
    "Conditional": (8.2, 117.3, 7.4, 12.1),
    "Pm": (5.8, 120.5, 4.5, 92.1),
    "Vanilla": (7.5, 142.6, 6.1, 140.8),
    "MoNL": (3.6, 12.9, 3.1, 8.8),
    "Pt": (6.7, 102.5, 5.0, 72.3),
    "Ptm": (5.8, 82.8, 4.8, 61.2),
    "Pt/Pm/Ptm": (4.1, 20.2, 4.1, 16.9),
}
# header -> the (task, score)s it averages
EXACT = {
    "joint align": [("joint", "align")],
    "a2v align": [("a2v", "align")],
    "v2a align": [("v2a", "align")],
    "inpaint path": [("inpaint", "path")],
    "continue path": [("continue", "path")],
}
EXACT["average"] = [pair for pairs in EXACT.values() for pair in pairs]
EXACT.update({f"{task} hue": [(task, "hue")] for task in ("a2v", "inpaint", "continue")})
FRECHET = {
    f"{task} {kind}": [(task, f"frechet_{kind}")]
    for task in ("joint", "a2v", "v2a", "inpaint", "continue")
    for kind in ("audio", "video")
    if (task, kind) not in (("a2v", "audio"), ("v2a", "video"))
}
FRECHET |= {
    f"average {kind}": [pair for k, pairs in FRECHET.items() if k.endswith(kind) for pair in pairs]
    for kind in ("audio", "video")
}
LESS = {
    f"{task} {name.removeprefix('frechet_')}": [(task, name)]
    for names in (("frechet_audio", "frechet_video"), ("path",))  # the paper has no path
    for task in ("continue-2s", "continue")
    for name in names
}
# of --curve
COLUMNS = {k: v for k, v in EXACT.items() if k != "average"} | {"a2v spread": [("a2v", "spread")]}

LOCK = Lock()  # of scores.csv
TABLE_1 = list(PAPER_1)
TABLES = (
    ("Table 1, by what is true", TABLE_1, EXACT, 3, {}),
    ("Table 1, Frechet distances (in brackets the paper's FAD and FVD)", TABLE_1, FRECHET, 2, PAPER_1),
    ("Table 7 (in brackets the paper's FAD and FVD)", TABLE_1, LESS, 2, PAPER_7),
    ("Table 2's method: reconstruction guidance", [w for w in WAYS if w[:7] == "Vanilla"] + ["MoNL"], EXACT, 3, {}),
    ("The defaults of train.py and the paper's recipe", ["MoNL", "MoNL, the paper's recipe"], EXACT, 3, {}),
)


def folder_name(*names):
    return "".join(c if c.isalnum() else "-" for c in " ".join(map(str, names)))


def run(script, *arguments, log):
    """Run one of our scripts as a user does, on one thread; its output goes to `log` -> that output."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: see {log}")
    return done.stdout


def read(path):
    """scores.csv -> {(way, seed, steps): {(task, score): value}}"""
    found = {}
    if path.exists():
        for row in csv.DictReader(path.open()):
            key = row["way"], int(row["seed"]), int(row["steps"])
            found.setdefault(key, {})[row["task"], row["score"]] = float(row["value"])
    return found


def job(model, seed, steps, args, ready):
    """Train one model from one seed, sample and score it in every way that is missing, append to scores.csv."""
    folder = args.out / folder_name(model, seed, steps)
    folder.mkdir(parents=True, exist_ok=True)
    if model in TASKS:
        task, ways = model, {"Conditional": ()}
    else:
        task, ways = "all", {way: extra for way, (of, extra) in WAYS.items() if of == model}
    last = TASKS[-1] if task == "all" else task
    missing = [way for way in ways if not any(done == last for done, _ in ready.get((way, seed, steps), ()))]
    common = ("--seed", seed, "--device", args.device)
    if missing:
        more = ("--steps", steps, "--out", folder, *common)
        run("train.py", *MODELS[model], *more, log=folder / "train.txt")
    for way in missing:
        more = ("--task", task, "--n", args.n, *common)
        log = folder / f"{folder_name(way)}.txt"
        lines = run("tests/score.py", "--ckpt", folder, *ways[way], *more, log=log).splitlines()
        rows = []
        for name, *values in map(str.split, lines):
            if name in (*TASKS, "tokenizer"):
                pairs = zip(score.SCORES, values)
                rows += [(way, seed, steps, name, which, value) for which, value in pairs if value != "-"]
        scores = args.out / "scores.csv"
        with LOCK, scores.open("a", newline="") as file:
            writer = csv.writer(file)
            writer.writerows(
                rows if scores.stat().st_size else [("way", "seed", "steps", "task", "score", "value"), *rows]
            )
        print(f"{len(rows)} scores of {way}, {model}, seed {seed}, {steps} steps", flush=True)


def over_seeds(found, way, steps, pairs):
    """One value per seed: the mean of these (task, score)s."""
    runs = [scores for (name, _, at), scores in found.items() if (name, at) == (way, steps)]
    return [statistics.mean(scores[p] for p in pairs) for scores in runs if all(p in scores for p in pairs)]


def table(found, rows, columns, digits, paper):
    """Print a Markdown table: mean and standard deviation over seeds, "-" where there is no model, and the paper's own
    figure in brackets. rows: {label: (way, steps)}."""
    print("\n| | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for label, (way, steps) in rows.items():
        cells = []
        for i, pairs in enumerate(columns.values()):
            values = over_seeds(found, way, steps, pairs)
            cell = f"{statistics.mean(values):.{digits}f}" if values else "-"
            cell += f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(cell + (f" ({paper[way][i]})" if i < len(paper.get(way, ())) else ""))
        print(f"| {label} | " + " | ".join(cells) + " |")


def plot(found, rows, path):
    """path of inpaint and of continue by training steps, both scales logarithmic: a colour per network, a dot per seed,
    a line through their medians. rows: as for table()."""
    left, top, edge, least, most = 40, 30, 260, 0.004, 0.1
    picture = Image.new("RGB", (2 * (left + edge) + 170, top + edge + 20), "white")
    pen = ImageDraw.Draw(picture)
    networks = {way: label.rsplit(", ", 1)[0] for label, (way, _) in rows.items()}
    first, *_, last = every = sorted({steps for _, steps in rows.values()})
    across = {steps: edge * (0.1 + 0.8 * math.log(steps / first) / math.log(last / first)) for steps in every}
    colours = dict(zip(networks, ("red", "green", "cornflowerblue", "darkblue", "darkorange")))
    for row, (way, colour) in enumerate(colours.items()):
        pen.text((2 * (left + edge) + 15, top + 10 + 16 * row), networks[way], fill=colour)
    for panel, (title, pairs) in enumerate((k, COLUMNS[k]) for k in ("inpaint path", "continue path")):
        x0 = left + panel * (left + edge)

        def height(value):
            return top + edge * math.log(most / value) / math.log(most / least)

        pen.text((x0, 10), title, fill="black")
        pen.rectangle((x0, top, x0 + edge, top + edge), outline="black")
        for value in (0.005, 0.01, 0.02, 0.04, 0.08):
            pen.line((x0, height(value), x0 + edge, height(value)), fill="lightgrey")
            pen.text((x0 - 32, height(value) - 6), f"{value:g}", fill="black")
        for steps, x in across.items():
            pen.text((x0 + x, top + edge + 4), f"{steps} steps", fill="black", anchor="mt")
        for row, (way, colour) in enumerate(colours.items()):
            line = []
            for steps, x in across.items():
                values = over_seeds(found, way, steps, pairs)
                at = x0 + x + 5 * (row - 2)  # side by side
                for y in map(height, values):
                    pen.ellipse((at - 3, y - 3, at + 3, y + 3), fill=colour)
                line += [(at, height(statistics.median(values)))] if values else []
            pen.line(line, fill=colour, width=2)
    picture.save(path)


def figure(args, found, path):
    """One held-out clip continued by every row of Table 1 that has a model, under the true clip."""
    rows = {}
    for way in TABLE_1:
        if ("continue", "path") not in found.get((way, 0, args.steps), ()):
            continue
        model, extra = ("continue", ()) if way == "Conditional" else WAYS[way]
        trained = sample.Trained(args.out / folder_name(model, 0, args.steps), open_device(args.device))
        settings = score.make_parser().parse_args(extra)
        given = task_mask("continue", trained.layout)
        windows = sample.Windows(trained)
        clips = trained.data.held_out_clips(trained.held_out, args.clip + 1, windows.span)
        true = {name: x[args.clip :] for name, x in clips.items()}
        with score.method(settings):
            made = sample.generate_clips(settings, trained, windows, true, given, way)
        rows |= {"true": true, way: made}
    if rows:
        video, audio = (torch.cat([row[name] for row in rows.values()]).numpy() for name in ("video", "audio"))
        masks = [mask.numpy() for mask in sample.per_frame(given, trained.layout, trained.media).values()]
        title = "continue, one held-out clip, the truth on top"
        sample.write_sheet(path, title, video, audio, masks, trained.media.sample_rate, names=list(rows))


def plan(args):
    """-> the (model, seed, steps) that are needed, the first ones first."""
    models = CURVE if args.curve else [(model, 1) for model in OF_TABLES]
    return [(model, seed, round(args.steps * times)) for seed in range(args.seeds) for model, times in models
            if not args.only or model in args.only]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("`")[0])
    add = parser.add_argument
    add("--steps", type=int, default=RECIPES["toy"]["steps"], help="training steps of every model (%(default)s)")
    add("--curve", action="store_true", help="train larger networks, and four times as long")
    add("--seeds", type=int, default=1, help="models of each kind (%(default)s)")
    add("--only", nargs="+", choices=MODELS, metavar="MODEL", help=f"train and score only some of {', '.join(MODELS)}")
    add("--n", type=int, default=256, help="samples per task, a multiple of 16 (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (one per core)")
    add("--device", default="auto", help="as in train.py (%(default)s)")
    add("--out", type=Path, default=Path("runs/tables"), help="folder of this --n (%(default)s)")
    add("--clip", type=int, default=0, help="held-out clip of strategies.png (%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    ready = read(args.out / "scores.csv")
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(job, *which, args, ready) for which in plan(args)]:
            done.result()
    found = read(args.out / "scores.csv")
    spread = f", {args.seeds} seeds: mean ± standard deviation" if args.seeds > 1 else ""
    print(f"{args.steps} steps, {args.n} samples per task{spread}")
    if args.curve:
        rows = {}
        for model, times in CURVE:
            way, steps = "Conditional" if model in TASKS else model, round(times * args.steps)
            rows[f"{way if ', ' in way else f'{way}, width 128'}, {steps} steps"] = way, steps
        table(found, rows, COLUMNS, 3, {})
        plot(found, rows, args.out / "curve.png")
        return
    for seed in range(args.seeds):  # Vanilla also stands for the conditional model of joint generation
        vanilla = found.get(("Vanilla", seed, args.steps), {})
        joint = {pair: value for pair, value in vanilla.items() if pair[0] == "joint"}
        found.setdefault(("Conditional", seed, args.steps), {}).update(joint)
    for title, ways, columns, digits, paper in TABLES:
        print(f"\n{title}")
        table(found, {way: (way, args.steps) for way in ways}, columns, digits, paper)
    figure(args, found, args.out / "strategies.png")


if __name__ == "__main__":
    main()
