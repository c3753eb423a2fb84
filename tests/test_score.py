"""tests/score.py: readers against the toy world's truth, scores at their floor and at chance, the baselines, the table;
and tests/tables.py: which models it trains, and the tables that it prints."""

import math
import sys
from pathlib import Path

import baselines
import pytest
import score
import tables
import torch

import data
import sample
from avdit import TASKS, task_mask


@pytest.fixture(scope="module")
def toy():
    return data.toy_clips(64, 1)


def test_readers_on_real_clips(toy):
    clips, truth = toy
    position, hue, radius = score.read_video(clips["video"])
    assert (position - truth["position"]).abs().mean() < 2e-4
    assert score.circular(hue, truth["hue"]).mean() < 5e-5
    assert abs(radius.mean() - 0.126) < 5e-4
    assert (score.read_height(clips["audio"]) - truth["position"][..., 1]).abs().mean() < 0.012
    assert score.circular(score.read_timbre(clips["audio"]), truth["hue"]).mean() < 0.003
    assert score.read_motion(position).mean() < 0.007


def test_readers_at_chance():
    """Unrelated clips score what the world's uniform draws say: 1/3 for two heights, 1/4 for two hues."""
    (a, ta), (b, _) = data.toy_clips(400, 11), data.toy_clips(400, 12)
    assert abs((score.read_height(b["audio"]) - ta["position"][..., 1]).abs().mean() - 1 / 3) < 0.03
    assert abs(score.circular(score.read_video(a["video"])[1], score.read_timbre(b["audio"])).mean() - 0.25) < 0.03


def test_motion_sees_a_jump():
    time = torch.arange(17) / 8
    line = data.mirror(0.3 + 0.8 * time)
    jump = line.clone()
    jump[8:] = data.mirror(1.1 + 0.8 * time[8:])
    residual = score.read_motion(torch.stack([line, jump], -1)[None])[0]
    assert residual[0] < 0.003 and residual[1] > 0.1


def test_toy_tokenizers_floor(toy, toy_run):
    (clips, truth), tokenizers = toy, sample.Trained(toy_run, torch.device("cpu")).tokenizers
    back = tokenizers.decode(tokenizers.encode(clips))
    assert back["video"].dtype == torch.uint8 and back["audio"].shape == (64, 17000)
    position, hue, radius = score.read_video(back["video"])
    assert (position - truth["position"]).abs().mean() < 0.01
    assert score.circular(hue, truth["hue"]).mean() < 0.005
    assert (radius / 0.1258 - 1).abs().mean() < 0.07
    assert (score.read_height(back["audio"]) - truth["position"][..., 1]).abs().mean() < 0.015
    assert score.circular(score.read_timbre(back["audio"]), truth["hue"]).mean() < 0.05


@pytest.fixture
def few_clips(monkeypatch):
    """Only 64 of the thousands of clips that Frechet distances and `nearest` look at, which take long to encode."""
    toy_clips = data.toy_clips
    monkeypatch.setattr(score, "toy_clips", lambda n, *a, **k: toy_clips(min(n, 64), *a, **k))


def test_a_minute_of_training_beats_chance(call, toy_run, few_clips):
    """There is a row for every task. On a2v the picture follows the sound's pitch and timbre far better than chance."""
    status, out, err = call(score, "--ckpt", toy_run, "--n", 32)
    assert status == 0, err
    header, *rows = [line.split() for line in out.splitlines()[1:]]
    table = {name: dict(zip(header, values)) for name, *values in rows}
    assert list(table) == ["tokenizer", "joint", "a2v", "v2a", "inpaint", "continue", "continue-2s"]
    assert float(table["tokenizer"]["align"]) < 0.02
    assert float(table["a2v"]["align"]) < 0.33 / 3 and float(table["a2v"]["hue"]) < 0.25 / 3
    assert float(table["a2v"]["spread"]) > 0.3  # and it still invents x


def test_scores_of_real_clips_and_of_unrelated_ones(toy_run):
    """Real clips score the error of the readers. Clips answered with other clips score chance."""
    trained = sample.Trained(toy_run, torch.device("cpu"))
    (real, _), (other, _) = data.toy_clips(256, 21), data.toy_clips(256, 22)
    z_other = trained.tokenizers.encode(other)
    given = task_mask("continue", trained.layout)
    good = score.score(trained, "continue", real, real, given, z_other, z_other)
    assert good["align"] < 0.012 and good["path"] == 0 and good["hue"] < 1e-4 and good["hue_heard"] < 0.003
    assert good["shape"] < 0.002 and good["motion"] < 0.007
    bad = score.score(trained, "continue", other, real, given, z_other, z_other)
    assert abs(bad["path"] - 1 / 3) < 0.03 and abs(bad["hue"] - 0.25) < 0.03 and abs(bad["hue_heard"] - 0.25) < 0.03
    mixed, nothing = {"video": real["video"], "audio": other["audio"]}, task_mask("joint", trained.layout)
    joint = score.score(trained, "joint", mixed, real, nothing, z_other, z_other)
    assert abs(joint["align"] - 1 / 3) < 0.03
    assert abs(joint["spread"] - 1) < 0.1 and abs(score.spread(real["video"], 16) - 1) < 0.1  # spread as the world is
    assert score.spread(real["video"][:16].repeat_interleave(16, 0), 16) < 0.01


def test_nearest_tells_a_learned_clip_from_a_new_one(toy_run):
    z = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 1]])
    others = torch.tensor([[2.0, 2, 2, 0], [2, 2, 2, 2], [2, 2, 2, 5]])
    want = [math.sqrt(12 / 4), math.sqrt((12 + 1) / 4)]  # by hand
    assert score.nearest(z, others).tolist() == pytest.approx(want)
    trained = sample.Trained(toy_run, torch.device("cpu"))
    learned, new = (trained.tokenizers.encode(data.toy_clips(64, seed)[0]) for seed in (21, 22))
    copies = trained.tokenizers.encode(trained.tokenizers.decode(learned))
    assert score.nearest(copies, learned).mean() < 0.25 * score.nearest(new, learned).mean()


def test_frechet_distance():
    """The closed form for Gaussians whose covariances commute, and zero for one set with itself."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(40000, 64, generator=g, dtype=torch.float64)
    assert score.frechet(a, a) == pytest.approx(0, abs=1e-6)
    b = 2 * torch.randn(40000, 64, generator=g, dtype=torch.float64) + 1
    assert score.frechet(a, b) == pytest.approx(64 * (1 + (2 - 1) ** 2), rel=0.02)


def test_scores_by_window(call, toy_run, monkeypatch, few_clips):
    """A window is scored against the true clip at its own time: if the true clips are made, nothing is wrong."""
    seen, truth = [], data.toy_clips(16, 1, frames=41)[0]
    monkeypatch.setattr(sample, "generate_clips", lambda *what: (seen.append(what), truth)[1])
    arguments = ("--ckpt", toy_run, "--task", "continue", "--n", 16)
    status, out, err = call(score, *arguments, "--seconds", 5)
    assert status == 0, err
    header, _, *rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["continue", "1"], ["continue", "2"], ["continue", "3"]]
    for row in rows:
        scores = dict(zip(header, row[2:]))
        assert float(scores["path"]) == 0 and float(scores["hue"]) == 0 and float(scores["align"]) < 0.02
    ((_, _, _, true, given, task),) = seen
    assert torch.equal(true["video"], truth["video"]) and given.sum() == 2 + 5 and task == "continue"
    late = {name: x.roll(1, 1) for name, x in truth.items()}
    monkeypatch.setattr(sample, "generate_clips", lambda *_: late)
    _, out, _ = call(score, *arguments, "--seconds", 5)
    paths = [float(line.split()[3]) for line in out.splitlines()[3:]]
    assert len(paths) == 3 and min(paths) > 0.02


# --- Baselines --------------------------------------------------------------------------------------------------------


def test_method_and_strength_choose_who_generates(call, toy_run, monkeypatch):
    """score.py samples with a baseline if --method says so, and only until the table is printed."""
    seen = []

    def baseline(*inputs, strength, steps, sampler, generator, on_step):
        seen.append((strength, steps, sampler))
        return inputs[3]

    def table(args, trained, windows, tasks):
        given = tasks["v2a"]
        sample.denoise(args, trained, torch.zeros(1, trained.layout.E), given, torch.Generator(), "v2a")

    assert score.generate_baseline is baselines.generate_baseline
    monkeypatch.setattr(score, "generate_baseline", baseline)
    monkeypatch.setattr(score, "table", table)
    monkeypatch.setattr(sample, "generate", lambda *inputs, **_: (seen.append("generate"), inputs[3])[1])
    ours, arguments = sample.generate, ("--ckpt", toy_run, "--n", 16, "--steps", 2, "--task", "v2a")
    for flags, want in (
        ((), "generate"),
        (("--method", "monl"), "generate"),
        (("--method", "replacement"), (0, 2, "ddpm")),
        (("--method", "reconstruction"), (0.02, 2, "ddpm")),
        (("--method", "reconstruction", "--strength", "3", "--sampler", "ddim"), (3, 2, "ddim")),
    ):
        status, _, err = call(score, *arguments, *flags)
        assert status == 0, err
        assert seen == [want] and sample.generate is ours, flags
        seen.clear()


MISTAKES = (
    ("--n 5", "multiple of 16"),
    ("--n 1040", "multiple of 16"),
    ("--guidance 1 --method replacement", "--guidance is for --method monl"),
    ("--strength 1", "for --method reconstruction"),
    ("--strength 1 --method replacement", "for --method reconstruction"),
    ("--method ddim", "replacement"),
    ("--seconds 9", "with --task continue"),
    ("--seconds 9 --task a2v", "with --task continue"),
    ("--seconds 2 --task continue", "at least 2.125"),
    ("--given audio:0-1", "unrecognized"),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(call, toy_run, arguments, message):
    status, _, err = call(score, "--ckpt", toy_run, *arguments.split())
    assert status == 2 and len(err.splitlines()) == 1 and message in err, (status, err)


# --- tests/tables.py --------------------------------------------------------------------------------------------------


def test_tables_train_what_is_missing_and_print_what_is_there(monkeypatch, tmp_path, capsys):
    """With a stand-in for both scripts: the commands, the folders, and the tables with gaps."""
    commands = []

    def run(name, *arguments, log):
        commands.append((name, *map(str, arguments)))
        which = arguments[arguments.index("--task") + 1] if "--task" in arguments else "all"
        tasks = TASKS if which == "all" else (which,)
        rows = [f"{task} " + " ".join(["0.250"] * 5 + ["-"] * 5) for task in ("tokenizer", *tasks)]
        return "\n".join(["16 samples per task", " ".join(score.SCORES), *rows])

    monkeypatch.setattr(tables, "run", run)
    monkeypatch.setattr(tables, "figure", lambda *_: None)

    def main(*arguments):
        commands.clear()
        monkeypatch.setattr(
            sys, "argv", ["tables.py", "--out", str(tmp_path), "--steps", "20", "--jobs", "1", *arguments]
        )
        tables.main()
        return capsys.readouterr().out

    out = main("--only", "recipe", "Pt/Pm/Ptm", "continue")
    trained = {command[command.index("--out") + 1]: command for command in commands if command[0] == "train.py"}
    assert {Path(folder).name for folder in trained} == {"recipe-0-20", "Pt-Pm-Ptm-0-20", "continue-0-20"}
    assert " ".join(trained[str(tmp_path / "recipe-0-20")][1:11]) == (
        "--prediction eps --optimizer adamw --lr 5e-4 --warmup 5000 --ema 0.9999"
    )
    scored = [command for command in commands if command[0] == "tests/score.py"]
    assert [command[command.index("--task") + 1] for command in scored] == ["continue", "all", "all"]
    lines = {line.split(" | ")[0][2:]: line for line in out.split("\nTable 1, F")[0].splitlines() if line[:2] == "| "}
    assert lines["Pt/Pm/Ptm"].split(" | ")[1:6] == ["0.250"] * 5 and lines["Vanilla"].split(" | ")[1:6] == ["-"] * 5
    assert lines["Conditional"].split(" | ")[1:6] == ["-"] * 4 + ["0.250"]
    assert "±" not in out
    assert [command[0] for command in commands].count("train.py") == 3
    main("--only", "recipe", "continue")
    assert commands == []  # all is there
    out = main("--only", "recipe", "--seeds", "2")
    assert len(commands) == 2 and "0.250 ± 0.000" in out
    main("--only", "All tasks")
    assert commands == []  # it is for the curve
    out = main("--curve", "--only", "inpaint", "MoNL", "MoNL, width 256")
    trained = {command[command.index("--out") + 1]: command for command in commands if command[0] == "train.py"}
    names = " ".join(Path(folder).name for folder in trained)
    assert names == "inpaint-0-3 inpaint-0-20 MoNL-0-20 MoNL-0-80 MoNL--width-256-0-20 MoNL--width-256-0-80"
    wide = " ".join(trained[str(tmp_path / "MoNL--width-256-0-80")][1:9])
    assert wide == "--mixture monl --dim 256 --heads 8 --steps 80"
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:6] for line in out.splitlines() if line[:2] == "| "}
    assert lines["Conditional, width 128, 20 steps"] == ["-"] * 3 + ["0.250"] * 2
    assert lines["MoNL, width 256, 80 steps"] == ["0.250"] * 5 and lines["MoNL, 8 layers, 20 steps"] == ["-"] * 5
    assert (tmp_path / "curve.png").exists()


def test_ways_of_vanilla_are_baselines():
    """Every row of a table names a model, and score.py knows its arguments."""
    for model, arguments in tables.WAYS.values():
        assert model in tables.MODELS
        args = score.make_parser().parse_args(arguments)
        assert args.method == ("monl" if model != "Vanilla" else args.method)
    ways = {way: tables.WAYS[way][1] for way in tables.WAYS if way.startswith("Vanilla")}
    assert ways == {
        "Vanilla": ("--method", "replacement"),
        "Vanilla, reconstruction 0.02": ("--method", "reconstruction", "--strength", "0.02"),
        "Vanilla, reconstruction 3": ("--method", "reconstruction", "--strength", "3"),
    }
