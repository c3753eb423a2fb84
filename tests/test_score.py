"""tests/score.py: readers against the toy world's truth, scores at their floor and at chance, the table."""

import math

import pytest
import score
import torch

import data
import sample
from avdit import task_mask


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
    """Of the thousands that Frechet distances and `nearest` look at, which take long to encode."""
    toy_clips = data.toy_clips
    monkeypatch.setattr(score, "toy_clips", lambda n, *a, **k: toy_clips(min(n, 64), *a, **k))


def test_a_minute_of_training_beats_chance(call, toy_run, few_clips):
    """The row of every task; on a2v the picture follows the sound's pitch and timbre, far better than chance."""
    status, out, err = call(score, "--ckpt", toy_run, "--n", 32)
    assert status == 0, err
    header, *rows = [line.split() for line in out.splitlines()[1:]]
    table = {name: dict(zip(header, values)) for name, *values in rows}
    assert list(table) == ["tokenizer", "joint", "a2v", "v2a", "inpaint", "continue", "continue-2s"]
    assert float(table["tokenizer"]["align"]) < 0.02
    assert float(table["a2v"]["align"]) < 0.33 / 3 and float(table["a2v"]["hue"]) < 0.25 / 3
    assert float(table["a2v"]["spread"]) > 0.3  # and it still invents x


def test_scores_of_real_clips_and_of_unrelated_ones(toy_run):
    """Real clips score what the readers err; clips answered with other clips score chance."""
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
    """Against the closed form for Gaussians with commuting covariances, and zero for one set with itself."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(40000, 64, generator=g, dtype=torch.float64)
    assert score.frechet(a, a) == pytest.approx(0, abs=1e-6)
    b = 2 * torch.randn(40000, 64, generator=g, dtype=torch.float64) + 1
    assert score.frechet(a, b) == pytest.approx(64 * (1 + (2 - 1) ** 2), rel=0.02)


def test_scores_by_window(call, toy_run, monkeypatch, few_clips):
    """A window is scored against the true clip at its own time: if the true clips are made, nothing is wrong."""
    truth = data.toy_clips(16, 1, frames=41)[0]
    monkeypatch.setattr(sample, "make", lambda *args: truth)
    status, out, err = call(score, "--ckpt", toy_run, "--task", "continue", "--n", 16, "--seconds", 5)
    assert status == 0, err
    header, _, *rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["continue", "1"], ["continue", "2"], ["continue", "3"]]
    for row in rows:
        scores = dict(zip(header, row[2:]))
        assert float(scores["path"]) == 0 and float(scores["hue"]) == 0 and float(scores["align"]) < 0.02
