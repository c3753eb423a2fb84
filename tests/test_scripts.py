"""train.py and sample.py as a user runs them."""

import copy
import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import imageio
import numpy as np
import pytest
import score
import soundfile
import torch
from test_data import CLIPS, latents_file, make_clip

import data
import sample
import train
from avdit import MONL, PRESETS, Layout, NoiseSchedule, sample_timesteps, training_loss

ROOT = Path(__file__).parents[1]


def run(script, *arguments, cwd):
    """The script as a process of its own, as a user starts it."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def checkpoint(folder):
    return torch.load(folder / "runs/z/ckpt.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_samples_come_from_the_average_of_the_trained_weights(call, latents, tmp_path, monkeypatch):
    states, save = [], train.save
    monkeypatch.setattr(train, "save", lambda path, state: (states.append(copy.deepcopy(state)), save(path, state)))
    assert call(train, *latents, "--save-every", 1, "--lr", 1)[0] == 0  # so large that the average lags behind
    for name, average in states[0]["model"].items():  # of step 0
        for decay, state in zip((1 / 10, 2 / 11, 3 / 12, 4 / 13), states[1:]):
            average = decay * average + (1 - decay) * state["model"][name]
        assert name == "z_max" or not torch.equal(average, states[-1]["model"][name]) or not average.any()
        torch.testing.assert_close(states[-1]["ema"][name], average, atol=1e-6, rtol=1e-5)
        weights = sample.Trained("runs/z", torch.device("cpu")).model.state_dict()
        assert torch.equal(weights[name], states[-1]["ema"][name])


def test_the_average_of_a_long_run_has_the_presets_decay():
    slow, fast = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        slow.weight.fill_(1)
        fast.weight.fill_(0)
    train.average(slow, fast, 100_000, 0.999)
    assert slow.weight.item() == pytest.approx(0.999) and fast.weight.item() == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_at_its_learning_rate(name, call, latents, monkeypatch):
    rates = []
    for kind in (torch.optim.AdamW, train.Muon):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, step=step: (rates.extend(
            (type(self).__name__, group["lr"]) for group in self.param_groups), step(self))[1])  # fmt: skip
    assert call(train, *latents, "--optimizer", name)[0] == 0
    used = {"adamw": {"AdamW": 1}, "muon": {"AdamW": 1, "Muon": 2.5}}[name]
    peaks = [0.004 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]  # warm after a tenth of a run
    assert rates == [(kind, pytest.approx(scale * peak)) for peak in peaks for kind, scale in used.items()]
    model = PRESETS["toy"].model(Layout(PRESETS["toy"].modalities))
    groups = {k: o.param_groups for k, o in train.make_optimizers(name, model).items()}
    names = {id(p): n for n, p in model.named_parameters()}
    held = {k: {names[id(p)] for group in groups[k] for p in group["params"]} for k in groups}
    assert sum(map(len, held.values())) == len(names) and set.union(*held.values()) == set(names.values())
    weights = {"ada.weight", "qkv.weight", "attend.weight", "mlp.0.weight", "mlp.2.weight"}
    assert held.get("muon", set()) == {f"blocks.{i}.{w}" for i in range(4) for w in weights if name == "muon"}


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muon_is_torchs_in_float32(shape, monkeypatch):
    """Five steps against torch.optim.Muon, whose bf16 is made float64 here, as our own arithmetic is."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=g, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in "ab")
    group = {"params": [theirs], "scale": 2.5}
    optimizers = [
        train.Muon([ours]),
        torch.optim.Muon([group], weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
    ]
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # to torch 2.14
    monkeypatch.setattr(torch, "bfloat16", torch.float64)  # from 2.15
    for step in range(5):
        gradient = torch.randn(shape, generator=g, dtype=torch.float64)
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
    assert (ours - start).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_learning_rate_is_app_b(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "paper"])
    args = train.make_parser().parse_args()
    assert args.batch == 256 and args.steps == 400_000 and args.optimizer == "adamw" and args.prediction == "eps"
    rates = [train.learning_rate(args, step) for step in (0, 2499, 4999, 200_000, 399_999)]
    assert rates[0] == pytest.approx(1e-7) and rates[1] == pytest.approx(2.5e-4, rel=1e-3)
    assert rates[2] == pytest.approx(5e-4, rel=1e-3) and rates[3] == pytest.approx(2.5e-4) and rates[4] < 1e-12
    args.steps = 1000  # a short run is warm after a tenth of it
    rates = [train.learning_rate(args, step) for step in (0, 49, 99, 500)]
    warm = [0.5 * (1 + math.cos(math.pi * step / 1000)) for step in (0, 49, 99, 500)]
    assert rates == pytest.approx([5e-4 * share * x for share, x in zip((0.01, 0.5, 1, 1), warm)])


def test_the_data_choose_the_preset(monkeypatch):
    """And the preset everything that is not said."""
    for arguments, preset in (
        ((), "toy"),
        (("--data", "folder"), "clips"),
        (("--data", "folder", "--preset", "toy"), "toy"),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1", *arguments])
        args, want = train.make_parser().parse_args(), PRESETS[preset]
        assert (args.preset, args.batch, args.steps, args.prediction) == (
            preset,
            want.batch,
            want.steps,
            want.prediction,
        )
        assert args.lr == 1 and args.size == (64 if arguments else 32)


def test_bf16_gradients_are_those_of_fp32():
    """The pass without gradient must not leave casts of the weights behind that cut the gradient of the next."""
    layout, schedule, grads = Layout(PRESETS["toy"].modalities), NoiseSchedule(), []
    g = torch.Generator().manual_seed(0)
    z0, eps = (torch.randn(4, layout.E, generator=g) for _ in "ab")
    t = sample_timesteps("ptm", layout, 4, 1000, g)
    model = PRESETS["toy"].model(layout)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=g)
    for dtype in ("fp32", "bf16"):
        model.zero_grad()
        with train.precision(dtype, torch.device("cpu")):
            loss, _ = training_loss(model, schedule, layout, z0, t, eps, self_conditioning=True)
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads):
        assert (a - b).norm() < 0.05 * a.norm()


def test_log_bins_by_modality_and_noise_level(tmp_path):
    layout = Layout(PRESETS["toy"].modalities)
    video, audio = (m.N * m.P * m.channels for m in layout.modalities)
    log = train.Log(tmp_path / "log.csv", layout, train.Machine("cpu"))
    log.start(0)
    is_video = layout.of(["video"])
    t = torch.full((2, layout.S), 1000)
    t[0, is_video] = 1  # one example's picture at the lowest level, the other's at the highest
    t[1, -1] = 0  # given: it does not count
    errors = torch.where(is_video, 1.0, 3.0).repeat(2, 1)
    errors[1, is_video] = 3
    errors[1, -1] = 99
    log.add(errors, t, 1000)
    log.write(5, 10)
    row = next(csv.DictReader((tmp_path / "log.csv").open()))
    assert float(row["video_t1_100"]) == 1 and float(row["video_t901_1000"]) == 3 and row["video_t101_200"] == ""
    assert float(row["video"]) == 2 and float(row["audio"]) == 3
    audio_twice = 2 * audio - layout.sizes[-1].item()
    assert float(row["loss"]) == pytest.approx((video * 4 + audio_twice * 3) / (2 * video + audio_twice), abs=1e-5)


@pytest.mark.parametrize("flags", [("--dtype", "bf16"), ("--prediction", "eps"), ("--mixture", "pt+task:v2a")])
def test_ways_to_train(call, latents, tmp_path, flags):
    assert call(train, *latents)[0] == 0
    plain = checkpoint(tmp_path)["model"]
    assert call(train, *latents, *flags, "--out", "runs/other")[0] == 0
    other = torch.load(tmp_path / "runs/other/ckpt.pt", weights_only=True)["model"]
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
        back = trained.tokenizers.decode(trained.tokenizers.encode(held))
        assert np.array_equal(out["video"][:, given], back["video"].numpy()[:, given])
        frames = imageio.v3.imread(folder / "01.mp4")
        assert len(frames) == 17 and frames[0].shape == (352, 256, 3)
        assert "Audio: aac" in data.ffmpeg(folder / "01.mp4")
        sound, rate = soundfile.read(folder / "01.wav")
        assert rate == 8000 and np.abs(sound - out["audio"][1]).max() < 1e-3
        assert (folder / "sheet.png").stat().st_size > 1000


def test_fewer_samples_leave_none_of_a_former_run(call, tiny_run, tmp_path):
    folder = tmp_path / "samples/joint"
    folder.mkdir(parents=True)
    for name in ("00.mp4", "07.mp4", "07.wav", "100.wav", "sheet.png"):
        (folder / name).write_text("old")
    (folder / "my 07.mp4").write_text("mine")
    assert call(sample, "--ckpt", tiny_run, "--task", "joint", "--n", 1, "--steps", 1)[0] == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00.mp4", "00.wav", "my 07.mp4", "samples.npz", "sheet.png"]
    assert all((folder / name).stat().st_size > 100 for name in ("00.mp4", "sheet.png"))


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


# --- Window after window ---------------------------------------------------------------


def test_a_long_clip_is_windows_that_share_five_frames(call, toy_run, tmp_path, monkeypatch):
    windows, sounds, seeds, draw = [], [], [], sample.sample

    def spy(trained, args, z0, given, generator, label):
        seeds.append(generator.get_state())
        made = draw(trained, args, z0, given, generator, label)
        windows.append((trained.layout.unpack(z0), trained.layout.unpack(made)))
        return made

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
    video, made = sample.Trained(toy_run, torch.device("cpu")).tokenizers["video"], [z for _, z in windows]
    pictures = [video.decode(z["video"]) for z in made]
    for before, shown, (given, _) in zip(made, pictures, windows[1:]):
        assert torch.equal(given["audio"][:, :5], before["audio"][:, 12:])
        again = torch.cat([shown[:, 12:], shown[:, :12]], 1)  # a frame of segment 3 is alone in segment 0 now
        assert torch.equal(given["video"][:, :2], video.encode(again)[:, :2])
    joined = torch.cat([pictures[0], *(picture[:, 5:] for picture in pictures[1:])], 1)
    assert np.array_equal(out["video"], joined[:, :44].numpy())
    assert len(sounds) == 1  # decoded once
    assert torch.equal(sounds[0], torch.cat([made[0]["audio"], *(z["audio"][:, 5:] for z in made[1:])], 1))
    held, _ = data.toy_clips(2, 1, frames=44)
    assert np.array_equal(out["video_true"], held["video"].numpy())  # the toy world goes on
    assert torch.equal(held["audio"][:, :17000], data.toy_clips(2, 1)[0]["audio"])


def test_each_window_takes_its_own_part_of_the_input(call, tiny_run, tmp_path, monkeypatch):
    """--task a2v --seconds 5.5 with a clip: its whole sound is given, and comes back as its tokenizer has it."""
    clip, shown, draw = make_clip(tmp_path / "long.mp4", seconds=6.3), [], sample.sample
    monkeypatch.setattr(sample, "sample", lambda trained, args, z0, given, *more: (
        shown.append(given), draw(trained, args, z0, given, *more))[1])  # fmt: skip
    sounds, decode = [], data.SpectrumTokenizer.decode
    monkeypatch.setattr(data.SpectrumTokenizer, "decode", lambda self, z: (sounds.append(z), decode(self, z))[1])
    arguments = ("--ckpt", tiny_run, "--n", 1, "--steps", 2, "--input", clip)
    wide = data.decode_clip(clip, data.TOY)[1]
    wide += 0.3 * torch.sin(torch.arange(len(wide)) ** 2 / 4e4)  # a rising tone, so that its parts can be told
    monkeypatch.setattr(data, "decode_clip", lambda path, media: (torch.zeros(50, 32, 32, 3).byte(), wide))
    assert call(sample, *arguments, "--task", "a2v", "--seconds", 5.5)[0] == 0
    out = np.load(tmp_path / "samples/a2v/samples.npz")
    assert out["given_audio"].all() and len(out["given_audio"]) == 44000
    assert out["given_video"].tolist() == [False] * 44
    trained = sample.Trained(tiny_run, torch.device("cpu"))
    layout, tokenizers = trained.layout, trained.tokenizers
    assert [layout.split(mask)["audio"].sum().item() for mask in shown] == [17, 17, 17, 8]  # 5.5 s end in window 4
    assert [layout.split(mask)["video"].tolist() for mask in shown] == [[False] * 5] + [[True] * 2 + [False] * 3] * 3

    lasting = torch.cat([wide[:44000], torch.zeros(9000)])
    z = [tokenizers["audio"].encode(lasting[None, k * 12000 : k * 12000 + 17000]) for k in range(4)]
    given = torch.cat([z[0], *(x[:, 5:] for x in z[1:])], 1)[:, :44]
    assert torch.equal(sounds[0][:, :44], given) and (given[:, :5] - given[:, 12:17]).abs().max() > 0.1
    status, _, err = call(sample, *arguments, "--task", "continue", "--seconds", 20)  # only its beginning is needed
    assert status == 0, err
    status, _, err = call(sample, *arguments, "--task", "v2a", "--seconds", 20)
    assert status == 2 and "6.25 s of picture and sound, 20.00 s are needed" in err


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


def test_a_third_modality_from_file_to_samples(call, latents, tmp_path):
    """README, fork: a .npz may hold any modalities. Nothing of touch is lost from training to samples.npz."""
    touch = np.random.default_rng(1).standard_normal((12, 4, 2, 3)) * 5 - 2
    latents_file(tmp_path / "z.npz", touch=touch, touch_edges=np.array([0, 0.2, 0.4, 0.6, 0.9]))
    assert call(train, *latents)[0] == 0
    assert next(csv.reader((tmp_path / "runs/z/log.csv").open()))[2:5] == ["video", "audio", "touch"]
    status, _, err = call(sample, "--ckpt", "runs/z", "--n", 2, "--steps", 2)
    assert status == 0, err
    out = np.load(tmp_path / "samples/continue/samples.npz")
    assert out["touch"].shape == (2, 4, 2, 3) and out["touch_edges"].tolist() == [0, 0.2, 0.4, 0.6, 0.9]
    assert out["given_touch"].tolist() == [True, True, False, False]  # video's first two segments end at 0.5
    np.testing.assert_allclose(out["touch"][:, :2], touch[[0, 10], :2], atol=1e-4)  # held-out clips 0 and 10
    assert not np.isclose(out["touch"][:, 2:], touch[[0, 10], 2:]).any()
    assert call(sample, "--ckpt", "runs/z", "--n", 2, "--steps", 2, "--given", "touch:0-0.9")[0] == 0
    out = np.load(tmp_path / "samples/custom/samples.npz")
    assert out["given_touch"].all() and not out["given_video"].any()


def test_latents_without_sound_have_the_tasks_that_are_left(call, latents, tmp_path):
    latents_file(tmp_path / "z.npz", audio=None, audio_edges=None)
    assert call(train, *latents)[0] == 0
    assert call(sample, "--ckpt", "runs/z", "--n", 1, "--steps", 1)[0] == 0
    made = sorted(folder.name for folder in (tmp_path / "samples").iterdir())
    assert made == ["continue", "continue-2s", "inpaint", "joint"]
    status, _, err = call(sample, "--ckpt", "runs/z", "--task", "a2v")
    assert status == 2 and "unknown modality 'audio': use video" in err


# --- Mistakes -------------------------------------------------------------------------


MISTAKES = (
    (train, "--preset huge", "toy"),
    (train, "--mixture mono", "use monl, vanilla"),
    (train, "--data nowhere", "neither toy nor a folder"),
    (train, "--data none.npz", "none.npz"),
    (train, "--data .", "no usable clip"),
    (train, "--size 64", "for a folder"),
    (train, "--data . --size 72", "multiple of 32"),
    (train, "--data . --fps 240 --sample-rate 8000", "use 15360"),
    (train, "--data . --fps 24 --sample-rate 22050", "use 22080"),
    (train, "--compile --device xla", "for other devices"),
    (train, "--batch 4 --accumulate 3", "is not a multiple"),
    (train, "--stpes 3", "unrecognized"),
    (sample, "--ckpt nowhere", "nowhere"),
    (sample, "--ckpt junk.pt", "junk.pt"),
    (sample, "--ckpt CKPT --task a2a", "a2v"),
    (sample, "--ckpt CKPT --given smell:0-1", "use video, audio"),
    (sample, "--ckpt CKPT --given video:zero", "MODALITY:START-END"),
    (sample, "--ckpt CKPT --given video:0-0.01", "no whole segment"),
    (score, "--ckpt CKPT --n 5", "multiple of 16"),
    (sample, "--ckpt CKPT --guidance 1 --method replacement", "needs --method monl"),
    (sample, "--ckpt CKPT --guidance-drop smell --guidance 1", "use video, audio"),
    (sample, "--ckpt CKPT --guidance-drop audio", "other than 0"),
    (sample, "--ckpt CKPT --strength 1", "for --method reconstruction"),
    (sample, "--ckpt CKPT --given video:0-1 --task joint", "use one"),
    (sample, "--ckpt CKPT --task joint --input a.mp4", "given nothing"),
    (sample, "--ckpt CKPT --seconds 2", "must be 2.125"),
    (score, "--ckpt CKPT --seconds 9", "with --task continue"),
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


def test_the_tour_shows_strategies_and_presets(tmp_path):
    done = run("avdit.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"  {strategy} " in done.stdout for strategy in MONL)
    assert "preset toy: 1.2 M parameters" in done.stdout and "preset paper: 411.7 M parameters" in done.stdout


def test_a_checkpoint_with_code_in_it_is_not_run(call, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Bomb()}, tmp_path / "ckpt.pt")
    status, _, err = call(sample, "--ckpt", tmp_path)
    assert status == 2 and len(err.splitlines()) == 1 and not (tmp_path / "ran").exists()


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips beside the project")
def test_a_real_clip_is_an_input(call, toy_run):
    clip = CLIPS / "vas_dog_02677.mp4"
    status, _, err = call(sample, "--ckpt", toy_run, "--task", "v2a", "--n", 1, "--steps", 1, "--input", clip)
    assert status == 0, err
