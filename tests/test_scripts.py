"""train.py and sample.py as a user runs them."""

import copy
import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import imageio
import numpy as np
import pytest
import soundfile
import torch
from test_data import CLIPS, make_clip

import data
import sample
import train
from avdit import PRESETS, STRATEGIES, NoiseSchedule, sample_timesteps, task_mask, training_loss

ROOT = Path(__file__).parents[1]


def run(script, *arguments, cwd):
    """The script as a process of its own, as a user starts it."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A model that has seen the toy world for about a minute. It serves every test of sampling, and one of learning."""
    folder = tmp_path_factory.mktemp("toy")
    done = run("train.py", "--steps", 400, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs/toy"


def checkpoint(folder):
    return torch.load(folder / "runs/z/ckpt.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_batches_depend_on_seed_step_and_position_alone():
    modalities = PRESETS["toy"].modalities
    config = train.Config(batch=6)
    train.complete(config)
    draws = [train.draw(config, modalities, 4096, 1000, step) for step in (7, 8, 7)]
    assert equal(draws[0], draws[2]) and not equal(draws[0][:2], draws[1][:2])
    every = torch.arange(6)
    whole, other = (train.draw_noise(config, modalities, step, every) for step in (7, 8))
    some = train.draw_noise(config, modalities, 7, torch.tensor([4, 1]))
    larger = train.draw_noise(train.Config(batch=9), modalities, 7, every)
    values = torch.cat([x.flatten() for x in whole.values()])
    assert len(values.unique()) > 0.99 * len(values)  # a few float32 coincide, but no two rows or modalities
    for m in whole:
        assert torch.equal(some[m], whole[m][[4, 1]]) and torch.equal(larger[m], whole[m])
        assert not (other[m] == whole[m]).any() and whole[m].std() == pytest.approx(1, abs=0.05)
    config.seed = 1
    assert not torch.equal(train.draw(config, modalities, 4096, 1000, 7)[0], draws[0][0])
    assert not torch.equal(train.draw_noise(config, modalities, 7, every)["video"], whole["video"])
    coins = [train.draw(config, modalities, 4096, 1000, step)[2] for step in range(600)]
    assert abs(sum(coins) / 600 - 0.9) < 4 * (0.09 / 600) ** 0.5


def test_samples_come_from_the_average_of_the_trained_weights(call, latents, tmp_path, monkeypatch):
    states, save = [], train.save
    monkeypatch.setattr(train, "save", lambda path, state: (states.append(copy.deepcopy(state)), save(path, state)))
    assert call(train, *latents, "--save-every", 1, "--lr", 1)[0] == 0  # so large that the average lags behind
    decay = PRESETS["toy"].ema
    for name, average in states[0]["model"].items():  # the first average is the first weights
        for state in states[1:]:
            average = decay * average + (1 - decay) * state["model"][name]
        assert not torch.equal(average, states[-1]["model"][name]) or not average.any()
        torch.testing.assert_close(states[-1]["ema"]["module." + name], average, atol=1e-6, rtol=1e-5)
        weights = sample.Trained("runs/z", torch.device("cpu")).model.state_dict()
        assert torch.equal(weights[name], states[-1]["ema"]["module." + name])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_at_its_learning_rate(name, call, latents, tmp_path, monkeypatch):
    rates = []
    for kind in (torch.optim.AdamW, torch.optim.Muon):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, step=step: (rates.extend(
            (type(self).__name__, group["lr"]) for group in self.param_groups), step(self))[1])  # fmt: skip
    assert call(train, *latents, "--optimizer", name)[0] == 0
    config = train.Config(**checkpoint(tmp_path)["config"])
    used = {"adamw": {"AdamW": 1}, "muon": {"AdamW": 1, "Muon": 2.5}}[name]
    peaks = [train.learning_rate(config, step) for step in range(config.steps)]
    assert rates == [(kind, scale * peak) for peak in peaks for kind, scale in used.items()]
    model = PRESETS["toy"].model()
    groups = {k: o.param_groups for k, o in train.make_optimizers(config, model, torch.device("cpu")).items()}
    names = {id(p): n for n, p in model.named_parameters()}
    held = {k: {names[id(p)] for group in groups[k] for p in group["params"]} for k in groups}
    assert sum(map(len, held.values())) == len(names) and set.union(*held.values()) == set(names.values())
    weights = {"ada.weight", "qkv.weight", "attend.weight", "mlp.0.weight", "mlp.2.weight"}
    assert held.get("muon", set()) == {f"blocks.{i}.{w}" for i in range(4) for w in weights if name == "muon"}


def test_learning_rate_is_app_b():
    config = train.Config(preset="paper")
    train.complete(config)
    assert config.batch == 256 and config.steps == 400_000
    rates = [train.learning_rate(config, step) for step in (0, 2499, 4999, 200_000, 399_999)]
    assert rates[0] == pytest.approx(1e-7) and rates[1] == pytest.approx(2.5e-4, rel=1e-3)
    assert rates[2] == pytest.approx(5e-4, rel=1e-3) and rates[3] == pytest.approx(2.5e-4) and rates[4] < 1e-12


def test_bf16_gradients_are_those_of_fp32():
    """The pass without gradient must not leave casts of the weights behind that cut the gradient of the next."""
    preset, schedule, grads = PRESETS["toy"], NoiseSchedule(), []
    g = torch.Generator().manual_seed(0)
    z0, eps = ({m.name: torch.randn(4, *m.shape, generator=g) for m in preset.modalities} for _ in "ab")
    t = sample_timesteps("ptm", preset.modalities, 4, 1000, g)
    model = preset.model()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=g)
    for dtype in ("fp32", "bf16"):
        model.zero_grad()
        with train.precision(dtype, torch.device("cpu")):
            loss = training_loss(model, schedule, z0, t, eps, self_conditioning=True)
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        assert (a - b).norm() < 0.05 * a.norm()


def test_log_bins_by_modality_and_noise_level(tmp_path):
    modalities = PRESETS["toy"].modalities
    log = train.Log(tmp_path / "log.csv", modalities, train.Machine("cpu"))
    log.open(0)
    t = {m.name: torch.full((2, m.N), 1000) for m in modalities}
    t["video"][0] = 100
    t["audio"][1] = 0  # given: in no bin
    errors = {m.name: torch.full((2, m.N), 3.0) for m in modalities}
    errors["video"][0] = 1.0
    errors["audio"][1] = 77.0
    log.add(errors, t, 1000)
    log.write(5, 10)
    row = next(csv.DictReader((tmp_path / "log.csv").open()))
    assert float(row["video_t1_100"]) == 1 and float(row["video_t901_1000"]) == 3 and row["video_t101_200"] == ""
    assert float(row["video"]) == 2 and float(row["audio"]) == 3
    video, audio = (m.N * m.P * m.channels for m in modalities)
    assert float(row["loss"]) == pytest.approx((video * 4 + audio * 3) / (2 * video + audio), abs=1e-5)
    log.add({m: e * float("nan") for m, e in errors.items()}, t, 1000)
    with pytest.raises(FloatingPointError, match="step 6"):
        log.gather(6)


@pytest.mark.parametrize("flags", [("--dtype", "bf16"), ("--prediction", "eps"), ("--mixture", "pt+task:v2a")])
def test_ways_to_train(call, latents, tmp_path, flags):
    assert call(train, *latents)[0] == 0
    plain = checkpoint(tmp_path)["model"]
    assert call(train, *latents, *flags)[0] == 0
    other = checkpoint(tmp_path)["model"]
    assert not equal(plain, other) and all(x.isfinite().all() for x in other.values())


# --- sample.py ------------------------------------------------------------------------


def test_every_task_writes_picture_and_sound(toy_run, tmp_path):
    done = run("sample.py", "--ckpt", toy_run, "--n", 2, "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = sample.Trained(toy_run, torch.device("cpu"))
    held, _ = data.toy_clips(2, 1)
    for task in ("joint", "a2v", "v2a", "inpaint", "continue", "continue-2s"):
        folder = tmp_path / "samples" / task
        out = np.load(folder / "samples.npz", allow_pickle=False)
        assert out["video"].shape == (2, 17, 32, 32, 3) and out["video"].dtype == np.uint8
        assert out["audio"].shape == (2, 17000) and out["audio"].dtype == np.float32
        assert out["fps"] == 8 and out["sample_rate"] == 8000
        seconds = {"continue": 0.625, "continue-2s": 0.125}.get(task)
        if seconds:
            assert out["given_video"].tolist() == [i / 8 < seconds for i in range(17)]
            assert out["given_audio"].sum() == 8000 * seconds and out["given_audio"][: int(8000 * seconds)].all()
        if task == "joint":
            assert "condition" not in out and not out["given_video"].any()
        else:
            assert out["condition"].tolist() == [0, 1] and np.array_equal(out["video_true"], held["video"].numpy())
        given = out["given_video"]  # the given frames are the tokenizer's version of the truth
        z = trained.encode(held)
        assert np.array_equal(out["video"][:, given], trained.decode(z)["video"].numpy()[:, given])
        frames = imageio.v3.imread(folder / "01.mp4")
        assert len(frames) == 17 and frames[0].shape[1] == 256
        assert "Audio: aac" in data.ffmpeg(folder / "01.mp4")[1]
        sound, rate = soundfile.read(folder / "01.wav")
        assert rate == 8000 and np.abs(sound - out["audio"][1]).max() < 1e-3
        assert (folder / "sheet.png").stat().st_size > 1000


def test_the_tracks_show_what_is_given(tmp_path):
    given = np.array([True] * 4 + [False] * 12)
    bar = sample.track(given, 64)
    assert (bar[:, :16] == sample.GREY).all() and (bar[:, 16:] == sample.GREEN).all()


def test_given_spans_and_guidance(call, toy_run, tmp_path):
    arguments = ("--given", "video:0-0.625", "audio:0-2.125", "--n", 1, "--steps", 2, "--guidance", 2)
    status, _, err = call(sample, "--ckpt", toy_run, *arguments, "--guidance-drop", "audio")
    assert status == 0, err
    out = np.load(tmp_path / "samples/custom/samples.npz")
    assert out["given_video"].sum() == 5 and out["given_audio"].all()


@pytest.fixture
def few_clips(monkeypatch):
    """Of the thousands that Frechet distances and `nearest` look at, which take long to encode."""
    toy_clips = data.toy_clips
    monkeypatch.setattr(data, "toy_clips", lambda n, *a, **k: toy_clips(min(n, 64), *a, **k))


def test_a_minute_of_training_beats_chance(call, toy_run, few_clips):
    """The row of every task; on a2v the picture follows the sound's pitch and timbre, far better than chance."""
    status, out, err = call(sample, "--ckpt", toy_run, "--n", 32, "--steps", 20, "--score")
    assert status == 0, err
    header, *rows = [line.split() for line in out.splitlines()[1:]]
    table = {name: dict(zip(header, values)) for name, *values in rows}
    assert list(table) == ["tokenizer", "joint", "a2v", "v2a", "inpaint", "continue", "continue-2s"]
    assert float(table["tokenizer"]["align"]) < 0.02
    assert float(table["a2v"]["align"]) < 0.33 / 3 and float(table["a2v"]["hue"]) < 0.25 / 3
    assert float(table["a2v"]["spread"]) > 0.6  # and it still invents x


def test_scores_of_real_clips_and_of_unrelated_ones(toy_run):
    """Real clips score what the readers err; clips answered with other clips score chance."""
    trained = sample.Trained(toy_run, torch.device("cpu"))
    (real, _), (other, _) = data.toy_clips(256, 21), data.toy_clips(256, 22)
    z_other = trained.encode(other)
    given = task_mask("continue", trained.modalities)
    good = sample.score(trained, "continue", real, real, given, z_other, z_other)
    assert good["align"] < 0.012 and good["path"] == 0 and good["hue"] < 1e-4 and good["hue_heard"] < 0.003
    assert good["shape"] < 0.002 and good["motion"] < 0.007
    bad = sample.score(trained, "continue", other, real, given, z_other, z_other)
    assert abs(bad["path"] - 1 / 3) < 0.03 and abs(bad["hue"] - 0.25) < 0.03 and abs(bad["hue_heard"] - 0.25) < 0.03
    mixed, nothing = {"video": real["video"], "audio": other["audio"]}, task_mask("joint", trained.modalities)
    joint = sample.score(trained, "joint", mixed, real, nothing, z_other, z_other)
    assert abs(joint["align"] - 1 / 3) < 0.03
    assert abs(joint["spread"] - 1) < 0.1 and abs(sample.spread(real["video"], 16) - 1) < 0.1  # spread as the world is
    assert sample.spread(real["video"][:16].repeat_interleave(16, 0), 16) < 0.01


def test_nearest_tells_a_learned_clip_from_a_new_one(toy_run):
    z = {"video": torch.zeros(2, 1, 3), "audio": torch.tensor([[[0.0]], [[1.0]]])}
    others = {"video": torch.full((3, 1, 3), 2.0), "audio": torch.tensor([[[0.0]], [[2.0]], [[5.0]]])}
    want = [math.sqrt(12 / 4), math.sqrt((12 + 1) / 4)]  # by hand: both modalities count, element by element
    assert sample.nearest(z, others).tolist() == pytest.approx(want)
    trained = sample.Trained(toy_run, torch.device("cpu"))
    learned, new = (trained.encode(data.toy_clips(64, seed)[0]) for seed in (21, 22))
    copies = trained.encode(trained.decode(learned))
    assert sample.nearest(copies, learned).mean() < 0.25 * sample.nearest(new, learned).mean()


def test_frechet_distance():
    """Against the closed form for Gaussians with commuting covariances, and zero for one set with itself."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(40000, 64, generator=g, dtype=torch.float64)
    assert sample.frechet(a, a) == pytest.approx(0, abs=1e-6)
    b = 2 * torch.randn(40000, 64, generator=g, dtype=torch.float64) + 1
    assert sample.frechet(a, b) == pytest.approx(64 * (1 + (2 - 1) ** 2), rel=0.02)


# --- Window after window ---------------------------------------------------------------


def test_a_long_clip_is_windows_that_share_five_frames(call, toy_run, tmp_path, monkeypatch):
    windows, sounds, seeds, draw = [], [], [], sample.sample

    def spy(*args):
        seeds.append(args[4].get_state())
        windows.append((args, draw(*args)))
        return windows[-1][1]

    monkeypatch.setattr(sample, "sample", spy)
    decode = data.SpectrumTokenizer.decode
    monkeypatch.setattr(data.SpectrumTokenizer, "decode", lambda self, z: (sounds.append(z), decode(self, z))[1])
    arguments = ("--task", "continue", "--n", 2, "--steps", 3, "--seconds", 5.5, "--seed", 3)
    status, _, err = call(sample, "--ckpt", toy_run, *arguments)
    assert status == 0, err
    out = np.load(tmp_path / "samples/continue/samples.npz")
    assert out["video"].shape == (2, 44, 32, 32, 3) and out["audio"].shape == (2, 44000)
    assert out["given_video"].tolist() == [True] * 5 + [False] * 39 and out["given_audio"].sum() == 5000
    assert len(imageio.v3.imread(tmp_path / "samples/continue/00.mp4")) == 44
    assert len(windows) == 4  # 2.125 s, and 1.5 s with each of three more
    assert len(torch.stack(seeds).unique(dim=0)) == 4  # each with noise of its own
    trained, latents = sample.Trained(toy_run, torch.device("cpu")), [z for _, z in windows]
    pictures = [trained.decode({"video": z["video"]})["video"] for z in latents]
    for before, shown, (_, after) in zip(latents, pictures, windows[1:]):
        assert torch.equal(after["audio"][:, :5], before["audio"][:, 12:])
        assert torch.equal(after["video"][:, 1], before["video"][:, 4])
        still = shown[:, 12:13].expand(-1, 17, -1, -1, -1)  # a frame of segment 3, alone in segment 0 now
        assert torch.equal(after["video"][:, 0], trained.encode({"video": still})["video"][:, 0])
    joined = torch.cat([pictures[0], *(picture[:, 5:] for picture in pictures[1:])], 1)
    assert np.array_equal(out["video"], joined[:, :44].numpy())
    assert len(sounds) == 1  # decoded once
    assert torch.equal(sounds[0], torch.cat([latents[0]["audio"], *(z["audio"][:, 5:] for z in latents[1:])], 1))
    held, _ = data.toy_clips(2, 1, frames=44)
    assert np.array_equal(out["video_true"], held["video"].numpy())  # the toy world goes on
    assert torch.equal(held["audio"][:, :17000], data.toy_clips(2, 1)[0]["audio"])


def test_scores_by_window(call, toy_run, monkeypatch, few_clips):
    """A window is scored against the true clip at its own time: if the true clips are made, nothing is wrong."""
    truth = data.toy_clips(16, 1, frames=41)[0]
    monkeypatch.setattr(sample, "make", lambda *args: truth)
    status, out, err = call(sample, "--ckpt", toy_run, "--task", "continue", "--n", 16, "--score", "--seconds", 5)
    assert status == 0, err
    header, _, *rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["continue", "1"], ["continue", "2"], ["continue", "3"]]
    for row in rows:
        scores = dict(zip(header, row[2:]))
        assert float(scores["path"]) == 0 and float(scores["hue"]) == 0 and float(scores["align"]) < 0.02


# --- Other data -----------------------------------------------------------------------


def test_folder_to_samples(call, tmp_path):
    (tmp_path / "clips").mkdir()
    for i in range(2):
        make_clip(tmp_path / "clips" / f"{i}.mp4", tone=400 + 100 * i, seconds=2.4)
    arguments = ("--data", "clips", "--size", 32, "--sample-rate", 8000, "--out", "runs/f", "--steps", 2, "--batch", 2)
    status, _, err = call(train, *arguments)
    assert status == 0, err
    arguments = ("--task", "continue", "--n", 1, "--steps", 2, "--input", "clips/1.mp4")
    status, _, err = call(sample, "--ckpt", "runs/f", *arguments)
    assert status == 0, err
    out = np.load(tmp_path / "samples/continue/samples.npz")
    error = np.abs(out["video"][0, :5].astype(int) - out["video_true"][0, :5]).mean()
    assert error < 4  # it trained on this clip: the given frames come back nearly as they are


def test_latents_to_latents(call, latents, tmp_path):
    assert call(train, *latents)[0] == 0
    assert call(sample, "--ckpt", "runs/z", "--task", "continue", "--n", 2, "--steps", 2)[0] == 0
    out = np.load(tmp_path / "samples/continue/samples.npz")
    assert out["video"].shape == (2, 3, 2, 2, 4) and out["video_edges"].tolist() == [0, 0.1, 0.5, 0.9]
    np.testing.assert_allclose(out["video"][:, :2], out["video_true"][:, :2], atol=1e-4)  # in the file's own scale
    for flags in (("--input", "clip.mp4"), ("--seconds", 9)):
        status, _, err = call(sample, "--ckpt", "runs/z", *flags)
        assert status == 2 and "trained on a .npz" in err


# --- Mistakes -------------------------------------------------------------------------


MISTAKES = (
    (train, "--preset huge", "toy"),
    (train, "--mixture mono", "use monl, vanilla"),
    (train, "--data nowhere", "neither toy nor a folder"),
    (train, "--data none.npz", "none.npz"),
    (train, "--data .", "no usable clip"),
    (train, "--size 64", "for a folder"),
    (train, "--data . --size 72", "multiple of 16"),
    (train, "--data . --fps 240 --sample-rate 8000", "does not divide by 8 x --fps 240: use 15360"),
    (train, "--data . --fps 24 --sample-rate 22050", "use 22080"),
    (train, "--compile --device xla", "for other devices"),
    (train, "--batch 4 --accumulate 3", "does not divide"),
    (train, "--stpes 3", "unrecognized"),
    (sample, "--ckpt nowhere", "nowhere"),
    (sample, "--ckpt junk.pt", "junk.pt"),
    (sample, "--ckpt CKPT --task a2a", "a2v"),
    (sample, "--ckpt CKPT --given smell:0-1", "use video, audio"),
    (sample, "--ckpt CKPT --given video:zero", "MODALITY:START-END"),
    (sample, "--ckpt CKPT --given video:0-0.01", "no whole segment"),
    (sample, "--ckpt CKPT --score --n 5", "multiple of 16"),
    (sample, "--ckpt CKPT --guidance 1 --method replacement", "use method monl"),
    (sample, "--ckpt CKPT --guidance-drop smell --guidance 1", "use video, audio"),
    (sample, "--ckpt CKPT --guidance-drop audio", "other than 0"),
    (sample, "--ckpt CKPT --strength 1", "for --method reconstruction"),
    (sample, "--ckpt CKPT --given video:0-1 --task joint", "use one"),
    (sample, "--ckpt CKPT --task joint --input a.mp4", "given nothing"),
    (sample, "--ckpt CKPT --seconds 2", "must be 2.125"),
    (sample, "--ckpt CKPT --seconds 9 --score --n 16", "for --task continue"),
    (sample, "--ckpt CKPT --score --n 16 --input a.mp4", "the toy world's own"),
    (sample, "--ckpt CKPT --input nowhere.mp4", "nowhere.mp4"),
)


@pytest.mark.parametrize(("script", "arguments", "message"), MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(call, toy_run, tmp_path, script, arguments, message):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    status, _, err = call(script, *(str(toy_run) if word == "CKPT" else word for word in arguments.split()))
    lines = [line for line in err.splitlines() if not line.startswith("skipped")]
    assert status == 2 and len(lines) == 1 and message in lines[0], (status, err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device here")
def test_an_absent_device_is_named(call, latents):
    status, _, err = call(train, *latents, "--device", "cuda")
    assert status == 2 and "no cuda here: use" in err


def test_a_checkpoint_with_code_in_it_is_not_run(call, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Bomb()}, tmp_path / "ckpt.pt")
    status, _, err = call(sample, "--ckpt", tmp_path)
    assert status == 2 and len(err.splitlines()) == 1 and not (tmp_path / "ran").exists()


def test_the_tour_finds_every_equation_and_algorithm(tmp_path):
    done = run("avdit.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("where in the paper")[1]
    for i in range(3, 18):  # Eq. 1 and 2 are Eq. 6 with one timestep for everything
        assert re.search(rf"Eq\. (\d+, )*{i}\b", table), f"Eq. {i}"
    for i in range(1, 5):
        assert f"Alg. {i}" in table
    assert all(f"  {strategy} " in done.stdout for strategy in STRATEGIES)


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips beside the project")
def test_a_real_clip_is_an_input(call, toy_run):
    clip = CLIPS / "vas_dog_02677.mp4"
    status, _, err = call(sample, "--ckpt", toy_run, "--task", "v2a", "--n", 1, "--steps", 1, "--input", clip)
    assert status == 0, err
