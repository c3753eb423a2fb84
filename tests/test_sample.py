"""sample.py: every flag has its effect, every file is right, long clips are windows after windows, mistakes are named."""

import math
import os
import shutil
import subprocess
import sys
import zlib
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import imageio
import numpy as np
import pytest
import soundfile
import torch
from PIL import ImageDraw
from test_data import CLIPS, latents_file, make_clip

import data
import sample
import train
from avdit import PRESETS, TASKS, AVDiT, Layout, NoiseSchedule, generate, task_mask

ROOT = Path(__file__).parents[1]
LAYOUT, CPU = Layout(PRESETS["toy"].modalities), torch.device("cpu")
GREY, GREEN, WHITE = (150, 150, 150), (60, 180, 75), (255, 255, 255)  # Fig. 9: given is grey, generated is green
SECONDS = {  # that a task gives of video and of audio, of 2.125
    "joint": (0, 0),
    "a2v": (0, 2.125),
    "v2a": (2.125, 0),
    "inpaint": (0.625, 0.625),
    "continue": (0.625, 0.625),
    "continue-2s": (0.125, 0.125),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a small model of the toy world, with random weights. Its average has others than its last step."""
    folder, toy_clips = tmp_path_factory.mktemp("model"), data.toy_clips
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "toy_clips", lambda n, *more: toy_clips(min(n, 32), *more))
        network = "--dim", "64", "--depth", "2", "--heads", "4", "--prediction", "v"
        patch.setattr(sys, "argv", ["train.py", *network, "--steps", "1", "--batch", "2", "--out", str(folder)])
        train.main()
    saved, generator = torch.load(folder / "ckpt.pt", weights_only=True), torch.Generator().manual_seed(0)
    for name in ("model", "ema"):
        saved[name] = {k: 0.1 * torch.randn(x.shape, generator=generator) for k, x in saved[name].items()}
    torch.save(saved, folder / "ckpt.pt")
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Without films and sheets and with two rounds of Griffin-Lim, all of which take most of the time."""
    monkeypatch.setattr(sample, "write_media", lambda *_, **__: None)
    griffin_lim = data.SpectrumTokenizer.griffin_lim
    monkeypatch.setattr(data.SpectrumTokenizer, "griffin_lim", lambda self, x: griffin_lim(self, x, rounds=2))


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of avdit.generate, by name."""
    calls = []

    def spy(model, schedule, layout, z0, given, **settings):
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        calls.append({"z0": z0, "given": given, "autocast": autocast, **settings})
        return generate(model, schedule, layout, z0, given, **settings)

    monkeypatch.setattr(sample, "generate", spy)
    return calls


def network_and_tokenizers(folder):
    """Of a checkpoint of the toy world: the network with averaged weights, and the tokenizers."""
    saved = torch.load(folder / "ckpt.pt", weights_only=True)
    network, tokenizers = AVDiT(LAYOUT, 64, 2, 4, "v"), data.media_tokenizers(LAYOUT, data.TOY, residual=False)
    network.load_state_dict(saved["ema"])
    tokenizers.load_state_dict(saved["tokenizers"])
    return network, tokenizers


def expected(folder, given, seed=0, n=2, steps=3, sampler="ddpm", **settings):
    """The clips that avdit.generate makes of the toy world's held-out clips 0 to n - 1."""
    network, tokenizers = network_and_tokenizers(folder)
    z0, generator = tokenizers.encode(data.toy_clips(n, 1)[0]), torch.Generator().manual_seed(seed)
    settings |= {"steps": steps, "sampler": sampler, "generator": generator}
    z = [generate(network, NoiseSchedule(), LAYOUT, part, given, **settings) for part in z0.split(64)]
    return {name: x.numpy() for name, x in tokenizers.decode(torch.cat(z)).items()}


def same(a, b):
    return all(
        a[name].shape == b[name].shape and np.allclose(a[name], b[name], atol=1e-5) for name in ("video", "audio")
    )


# --- Every flag has its effect ----------------------------------------------------------------------------------------

GUIDED = {"guidance": 2.0}
FLAGS = {
    "--steps 3": {},
    "--steps 2": {"steps": 2},
    "--steps 3 --sampler ddim": {"sampler": "ddim"},
    "--steps 3 --seed 5": {"seed": 5},
    "--steps 3 --n 3": {"n": 3},
    "--steps 3 --guidance 2": GUIDED,
    "--steps 3 --guidance 2 --guidance-drop audio": {**GUIDED, "guidance_drop": ["audio"]},
    "--steps 3 --guidance 2 --guidance-drop video": {**GUIDED, "guidance_drop": ["video"]},
    "--steps 3 --guidance 2 --guidance-drop video --guidance-drop audio": GUIDED,
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_reach_the_method(call, model, quick, tmp_path, flags):
    """The samples are those of avdit.generate with these settings, the averaged weights and the held-out clips."""
    status, _, err = call(sample, "--ckpt", model, "--task", "continue", "--n", 2, "--dtype", "fp32", *flags.split())
    assert status == 0, err
    out, given = np.load(tmp_path / "samples/continue/samples.npz"), task_mask("continue", LAYOUT)
    assert same(out, expected(model, given, **FLAGS[flags]))
    if FLAGS[flags]:
        assert not same(out, expected(model, given))


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 3), ("ddpm", 4)])
def test_the_preset_chooses_sampler_and_steps(call, model, quick, calls, monkeypatch, sampler, steps):
    preset = replace(PRESETS["toy"], sampler=sampler, sampling_steps=steps)
    monkeypatch.setitem(PRESETS, "toy", preset)
    assert call(sample, "--ckpt", model, "--task", "joint", "--n", 1)[0] == 0
    assert (calls[0]["sampler"], calls[0]["steps"]) == (sampler, steps)


@pytest.mark.parametrize("task", TASKS)
def test_task_chooses_what_is_given(call, model, quick, calls, tmp_path, task):
    assert call(sample, "--ckpt", model, "--task", task, "--n", 1, "--steps", 1)[0] == 0
    assert [path.name for path in (tmp_path / "samples").iterdir() if path.is_dir()] == [task]
    assert len(calls) == 1 and torch.equal(calls[0]["given"], task_mask(task, LAYOUT))


def test_given_chooses_spans(call, model, quick, calls, tmp_path):
    spans = ("--given", "video:0-0.625", "audio:0.5-1.02", "--given", "audio:2-2.125")
    assert call(sample, "--ckpt", model, *spans, "--n", 1, "--steps", 1)[0] == 0
    masks = LAYOUT.split(calls[0]["given"])
    assert len(calls) == 1 and masks["video"].tolist() == [True, True, False, False, False]
    assert masks["audio"].nonzero().flatten().tolist() == [4, 5, 6, 7, 16]  # segments of 0.125 s, only whole ones
    out = np.load(tmp_path / "samples/custom/samples.npz")
    assert out["given_video"].nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    assert out["given_audio"].nonzero()[0].tolist() == [*range(4000, 8000), *range(16000, 17000)]


def test_many_samples_are_made_64_at_a_time_with_noise_of_their_own(model, monkeypatch):
    sizes = []

    def noise(network, schedule, layout, z0, given, generator, **settings):
        sizes.append(len(z0))
        return z0 + torch.randn(z0.shape, generator=generator)

    monkeypatch.setattr(sample, "generate", noise)
    trained, args = sample.Trained(model, CPU), sample.make_parser("", 1).parse_args([])
    z0, (a, b) = torch.arange(66.0)[:, None].repeat(1, LAYOUT.E), (torch.Generator().manual_seed(7) for _ in "ab")
    made = sample.denoise(args, trained, z0, task_mask("joint", LAYOUT), a, "")
    want = torch.cat([torch.randn(n, LAYOUT.E, generator=b) for n in (64, 2)])
    assert sizes == [64, 2]
    torch.testing.assert_close(made - z0, want, atol=1e-4, rtol=0)


def test_dtype_is_that_of_products(call, model, quick, calls, monkeypatch):
    asked, precision = [], train.precision
    monkeypatch.setattr(sample, "precision", lambda *what: (asked.append(what), precision(*what))[1])
    for dtype in ("fp32", "bf16", "auto"):
        flags = ("--seconds", 3) if dtype == "auto" else ("--dtype", dtype)
        assert call(sample, "--ckpt", model, "--task", "joint", "--n", 1, "--steps", 1, *flags)[0] == 0
        assert asked[-1] == (dtype, CPU)
    assert [c["autocast"] for c in calls[:2]] == [False, torch.bfloat16]


def test_device_is_where_the_method_runs(call, model, quick, monkeypatch):
    """On the meta device, which holds shapes only, as on any other."""
    asked, seen = [], []

    def spy(network, schedule, layout, z0, given, **settings):
        seen.extend([z0.device, schedule.a.device, *(p.device for p in network.parameters())])
        return torch.zeros(z0.shape)

    monkeypatch.setattr(sample, "open_device", lambda name: (asked.append(name), torch.device("meta"))[1])
    monkeypatch.setattr(sample, "generate", spy)
    monkeypatch.setattr(sample, "precision", lambda *_: nullcontext())  # autocast knows no meta device
    for flags, name in (((), "auto"), (("--device", "cpu"), "cpu"), (("--device", "xla"), "xla")):
        status, _, err = call(sample, "--ckpt", model, "--task", "continue", "--n", 1, "--dtype", "fp32", *flags)
        assert status == 0 and asked[-1] == name, err
    assert {device.type for device in seen} == {"meta"}


def test_ckpt_and_out_name_folders(call, model, quick, tmp_path):
    """Without them, what train.py writes is read and samples/ is written."""
    other, arguments = tmp_path / "runs/toy", ("--task", "a2v", "--n", 1, "--steps", 1, "--dtype", "fp32")
    other.mkdir(parents=True)
    saved = torch.load(model / "ckpt.pt", weights_only=True)
    torch.save(saved | {"ema": saved["model"]}, other / "ckpt.pt")
    made = []
    for flags in (("--out", "one"), ("--out", "two/deep", "--ckpt", model), ("--ckpt", model / "ckpt.pt")):
        assert call(sample, *arguments, *flags)[0] == 0
        made.append(np.load(tmp_path / (flags[1] if "--out" in flags else "samples") / "a2v/samples.npz"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "runs", "samples", "two"]
    want = [expected(folder, task_mask("a2v", LAYOUT), n=1, steps=1) for folder in (other, model, model)]
    assert all(map(same, made, want)) and not same(*made[:2])


def test_input_is_the_clip_that_is_given(call, model, quick, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", tone=700, seconds=3)
    arguments = ("--task", "inpaint", "--n", 2, "--steps", 1, "--input", clip)
    status, _, err = call(sample, "--ckpt", model, *arguments)
    assert status == 0, err
    out = np.load(tmp_path / "samples/inpaint/samples.npz")
    video, audio = data.decode_clip(clip, data.TOY)
    true = {"video": video[None, :17], "audio": audio[None, :17000]}
    assert out["condition"].tolist() == [0, 0]
    assert (out["video_true"] == true["video"].numpy()).all() and (out["audio_true"] == true["audio"].numpy()).all()
    _, tokenizers = network_and_tokenizers(model)
    back, at = tokenizers.decode(tokenizers.encode(true))["video"].numpy(), [0, 13, 14, 15, 16]
    assert (out["video"][:, at] == back[:, at]).all() and (out["video"][:, 1:13] != back[:, 1:13]).any()


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Folder of what a user gets: two samples of every task."""
    folder = tmp_path_factory.mktemp("written")
    command = [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(model), "--n", "2", "--steps", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"open {folder / 'samples/index.html'} to see and hear them" in done.stdout
    return folder / "samples"


@pytest.mark.parametrize("task", TASKS)
def test_samples_npz_has_clips_masks_and_true_clips(written, model, task):
    out, (true, _) = np.load(written / task / "samples.npz", allow_pickle=False), data.toy_clips(2, 1)
    assert out["video"].shape == (2, 17, 32, 32, 3) and out["video"].dtype == np.uint8
    assert out["audio"].shape == (2, 17000) and out["audio"].dtype == np.float32
    assert out["fps"] == 8 and out["sample_rate"] == 8000
    time, sound_time = np.arange(17) / 8, np.arange(17000) / 8000
    for name, at, seconds in (("given_video", time, SECONDS[task][0]), ("given_audio", sound_time, SECONDS[task][1])):
        want = (at < 0.125) | (at >= 1.625) if task == "inpaint" else at < seconds
        assert (out[name] == want).all()
    if task == "joint":
        assert not {"condition", "video_true", "audio_true"} & {*out}
        return
    assert out["condition"].tolist() == [0, 1]
    assert (out["video_true"] == true["video"].numpy()).all() and (out["audio_true"] == true["audio"].numpy()).all()
    _, tokenizers = network_and_tokenizers(model)
    back, given = tokenizers.decode(tokenizers.encode(true))["video"].numpy(), out["given_video"]
    assert (out["video"][:, given] == back[:, given]).all()  # given frames are the tokenizer's version of the truth


def likeness(a, b):
    """Correlation of two sounds, cut to the shorter one."""
    n = min(len(a), len(b))
    return np.corrcoef(a[:n], b[:n])[0, 1]


@pytest.mark.parametrize("folder", ["joint", "a2v", "true"])
def test_mp4_and_wav_show_and_play_the_clip_of_their_number(written, folder):
    task = "a2v" if folder == "true" else folder
    out = np.load(written / task / "samples.npz")
    videos, sounds = (out[name + "_true" * (folder == "true")] for name in ("video", "audio"))
    for i in range(2):
        sound, rate = soundfile.read(written / folder / f"{i:02}.wav")
        assert rate == 8000 and np.abs(sound - sounds[i]).max() < 1e-3
        frames = imageio.v3.imread(written / folder / f"{i:02}.mp4")
        assert frames.shape == (17, 352, 256, 3)
        picture = frames[:, 4:256:8, 4:256:8].astype(int)
        own, other = (np.abs(picture - videos[k]).mean() for k in (i, 1 - i))
        assert own < 10 < other
        _, messages = data.ffmpeg(written / folder / f"{i:02}.mp4", "-f", "null", "-")
        assert " 8 fps" in messages and "Audio: aac" in messages
        _, played = data.decode_clip(written / folder / f"{i:02}.mp4", data.TOY)
        assert abs(len(played) / 8000 - 2.125) < 0.1
        assert likeness(played, sounds[i]) > 0.9 and abs(likeness(played, sounds[1 - i])) < 0.5


def test_the_film_of_a_true_clip_says_that_all_is_given(written):
    for i in range(2):
        last = imageio.v3.imread(written / "true" / f"{i:02}.mp4")[-1].astype(int)
        for rows in (slice(266, 278), slice(338, 350)):
            assert np.abs(last[rows, 2:230] - GREY).mean() < 8


class Links(HTMLParser):
    """A page's headings, its paragraphs, and what it shows below each heading."""

    def __init__(self, page):
        super().__init__()
        self.shown, self.texts, self.tag = {}, [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tag, attributes = tag, dict(attributes)
        for link in (attributes.get("src"), attributes.get("href")):
            if link:
                self.shown[self.heading].append(link)

    def handle_data(self, text):
        if self.tag == "h2" and text.strip():
            self.heading = text
            self.shown[text] = []
        self.texts.append((self.tag, text.strip()))


def test_the_page_links_every_clip_beside_the_true_one(written):
    page = Links((written / "index.html").read_text())
    assert list(page.shown) == list(TASKS)
    for task, links in page.shown.items():
        clips = [f"{task}/00.mp4", "true/00.mp4", f"{task}/01.mp4", "true/01.mp4"]
        clips = [clip for clip in clips if task != "joint" or "true" not in clip]  # joint has none
        assert links == [*clips, f"{task}/sheet.png", f"{task}/sheet.png"]
        assert all((written / link).stat().st_size > 1000 for link in links)
    given = [text for tag, text in page.texts if tag == "p" and text.startswith("Given")]
    assert given == [
        "Given: nothing.",
        "Given: 2.125 s of audio.",
        "Given: 2.125 s of video.",
        "Given: 0.625 s of video and 0.625 s of audio.",
        "Given: 0.625 s of video and 0.625 s of audio.",
        "Given: 0.125 s of video and 0.125 s of audio.",
    ]
    captions = [text for tag, text in page.texts if tag == "figcaption" and text]
    assert captions == [link[:-4].replace("/", " ") for links in page.shown.values() for link in links[:-2]]
    assert ("p", "Grey was given, green was generated.") in page.texts


def shown(row, frames):
    """Whether a row of the sheet shows these frames of 32 x 32 pixels, enlarged to 48 x 48. Where a new pixel lies between
    two old ones, it may be either."""
    clear = np.arange(48) % 3 != 1
    at = ((np.arange(48) + 0.5) * 32 / 48).astype(int)[clear]
    row = row.reshape(48, -1, 48, 3)[clear][:, :, clear]
    return row.shape[1] == len(frames) and (row == frames[:, at][:, :, at].swapaxes(0, 1)).all()


@pytest.mark.parametrize("task", ["joint", "continue", "v2a"])
def test_the_sheet_has_a_block_per_sample(written, task):
    """From the top: true frames, frames, their track, spectrogram, its track, a gap."""
    out, sheet = np.load(written / task / "samples.npz"), imageio.v3.imread(written / task / "sheet.png")
    margin, y = 76, 20
    assert sheet.shape[1] == margin + 17 * 48
    for i in range(2):
        for name in ("video_true", "video"):
            if name in out:
                assert shown(sheet[y : y + 48, margin:], out[name][i])
                assert sheet[y : y + 48, :margin].max() > 200  # a label
                y += 48
        assert (sheet[y : y + 8, margin:] == per_pixel(out["given_video"], 17 * 48)).all()
        picture = sample.spectrogram(out["audio"][i], 8000, 17 * 48, 48)
        assert (sheet[y + 8 : y + 56, margin:] == picture).all()
        assert (sheet[y + 56 : y + 64, margin:] == per_pixel(out["given_audio"], 17 * 48)).all()
        assert not sheet[y + 64 : y + 74, margin:].any()
        y += 74
    assert len(sheet) == y


def per_pixel(given, width):
    """The colours of a track: pixel x shows the moment x / width."""
    return np.array([GREY if given[int(len(given) * x / width)] else GREEN for x in range(width)])


def test_a_sheet_has_at_most_8_samples_and_24_frames(tmp_path, monkeypatch):
    labels, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, at, label, *more, **how: (
        labels.append(label), text(self, at, label, *more, **how)))  # fmt: skip
    monkeypatch.setattr(sample.imageio, "mimwrite", lambda *_, **__: None)
    video = np.random.default_rng(0).integers(0, 256, (9, 50, 32, 32, 3), np.uint8)
    out = {"video": video, "video_true": video[:, :20], "audio": np.zeros((9, 50000), np.float32), "fps": 8}
    out |= {"given_video": np.arange(50) < 10, "given_audio": np.arange(50000) < 20000, "sample_rate": 8000}
    sample.write_media(tmp_path, out, sheet="some task")
    sheet = imageio.v3.imread(tmp_path / "sheet.png")
    assert sheet.shape == (20 + 8 * 170, 76 + 17 * 48, 3)  # every third frame of 50
    assert shown(sheet[68:116, 76:], video[0, ::3]) and shown(sheet[20:68, 76 : 76 + 7 * 48], video[0, :20:3])
    assert not sheet[20:68, 76 + 7 * 48 :].any()  # the true clip has ended
    assert labels[0] == "some task: grey = given, green = generated"
    assert [label for label in labels[1:] if label] == [
        f"{i:02} {kind}" for i in range(8) for kind in ("true video", "video", "audio")
    ]
    assert len([*tmp_path.glob("*.wav")]) == 9


def test_fewer_samples_leave_none_of_a_former_run(call, model, tmp_path):
    """And nothing else is deleted."""
    for folder in ("samples/a2v", "samples/true"):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("00.mp4", "01.mp4", "01.wav", "02.mp4", "02.wav", "2023.mp4", "my 01.mp4"):
            (tmp_path / folder / name).write_text("old")
    assert call(sample, "--ckpt", model, "--task", "a2v", "--n", 1, "--steps", 1)[0] == 0
    for folder, more in (("samples/a2v", ["samples.npz", "sheet.png"]), ("samples/true", [])):
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert names == ["00.mp4", "00.wav", "2023.mp4", "my 01.mp4", *more]


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_a_track_is_grey_where_given():
    given = np.array([True] * 4 + [False] * 12)
    bar = sample.track(given, 64, 5)
    assert bar.shape == (5, 64, 3) and (bar[:, :16] == GREY).all() and (bar[:, 16:] == GREEN).all()
    assert (sample.track(~given, 64)[:, :16] == GREEN).all() and (sample.track(~given, 64)[:, 16:] == GREY).all()
    assert (sample.track(np.arange(17000) >= 8500, 100)[0] == [GREEN] * 50 + [GREY] * 50).all()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("hz", [250, 1000, 3000])
def test_a_spectrogram_shows_low_tones_at_the_bottom(rate, hz):
    """From 0 Hz to 4 kHz, and time runs from left to right."""
    time = np.arange(2 * rate) / rate
    sound = (np.sin(2 * math.pi * hz * time) * (time < 1)).astype(np.float32)
    picture = sample.spectrogram(sound, rate, 400, 200)
    assert picture.shape == (200, 400, 3) and picture.dtype == np.uint8
    column = picture[:, 100, 0].astype(int)
    assert abs(column.argmax() + 0.5 - 200 * (1 - hz / 4000)) < 4 and column.max() > 240
    assert picture[:, :190].max(0).min() > 200 and picture[:, 210:].max() == 0


def test_a_spectrograms_grey_is_60_decibels():
    time = np.arange(16000) / 8000
    tone = np.sin(2 * math.pi * 1000 * time).astype(np.float32)
    for decibels, grey in ((0, 255), (-20, 170), (-40, 85), (-60, 0), (-80, 0)):
        assert sample.spectrogram(10 ** (decibels / 20) * tone, 8000, 200, 129)[:, 100].max() == pytest.approx(
            grey, abs=3
        )


def test_a_films_white_line_is_the_present_moment():
    video = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
    given = np.arange(16) < 4, np.arange(16000) < 8000
    frames = sample.film(video, np.zeros(16000, np.float32), given, 8000)
    assert frames.shape == (16, 352, 256, 3) and frames.dtype == np.uint8
    for i, frame in enumerate(frames):
        assert (frame[:256] == video[i].repeat(8, 0).repeat(8, 1)).all()
        below = frame[256:].copy()
        assert (below[:, 16 * i : 16 * i + 2] == WHITE).all()
        below[:, 16 * i : 16 * i + 2] = 7
        assert not (below == WHITE).all(-1).any()
        rest = np.arange(256) // 2 != 8 * i  # not the white line
        for rows, pixels in (
            (slice(0, 8), (0, 0, 0)),
            (slice(8, 24), per_pixel(given[0], 256)[rest]),
            (slice(24, 32), (0, 0, 0)),
            (slice(32, 80), (0, 0, 0)),  # silence
            (slice(80, 96), per_pixel(given[1], 256)[rest]),
        ):
            assert (below[rows, rest] == pixels).all()
    tone = np.sin(2 * math.pi * 1000 / 8000 * np.arange(16000)).astype(np.float32)
    assert (
        sample.film(video, tone, given, 8000)[0, 288:336, 4:] == sample.spectrogram(tone, 8000, 256, 48)[:, 4:]
    ).all()
    assert sample.film(video, tone, given, 8000, width=64).shape == (16, 160, 64, 3)


# --- Window after window ----------------------------------------------------------------------------------------------


@pytest.fixture
def windows(monkeypatch):
    """What each call of sample.denoise gets and returns: (z0, given, state of the generator, z)."""
    windows, denoise = [], sample.denoise

    def spy(args, trained, z0, given, generator, label):
        state = generator.get_state()
        z = denoise(args, trained, z0, given, generator, label)
        windows.append((z0, given, state, z))
        return z

    monkeypatch.setattr(sample, "denoise", spy)
    return windows


@pytest.fixture
def sounds(monkeypatch):
    """The latents of every sound that is decoded."""
    sounds, decode = [], data.SpectrumTokenizer.decode
    monkeypatch.setattr(data.SpectrumTokenizer, "decode", lambda self, z: (sounds.append(z), decode(self, z))[1])
    return sounds


def test_a_long_clip_is_windows_that_share_five_frames(call, model, windows, sounds, tmp_path):
    arguments = ("--task", "continue", "--n", 2, "--steps", 2, "--seconds", 5.5, "--seed", 3)
    status, _, err = call(sample, "--ckpt", model, *arguments)
    assert status == 0, err
    out = np.load(tmp_path / "samples/continue/samples.npz")
    assert out["video"].shape == (2, 44, 32, 32, 3) and out["audio"].shape == (2, 44000)
    assert out["given_video"].tolist() == [True] * 5 + [False] * 39
    assert out["given_audio"].sum() == 5000 and out["given_audio"][:5000].all()
    assert len(imageio.v3.imread(tmp_path / "samples/continue/00.mp4")) == 44
    assert len(windows) == 4  # 2.125 s, and 1.5 s with each of three more
    assert len(torch.stack([state for _, _, state, _ in windows]).unique(dim=0)) == 4  # each with noise of its own
    assert torch.equal(windows[0][2], torch.Generator().manual_seed(3).get_state())
    assert all(torch.equal(given, task_mask("continue", LAYOUT)) for _, given, _, _ in windows)
    _, tokenizers = network_and_tokenizers(model)
    video, made = tokenizers["video"], [LAYOUT.unpack(z) for _, _, _, z in windows]
    pictures = [video.decode(z["video"]) for z in made]
    for before, shown, (z0, _, _, _) in zip(made, pictures, windows[1:]):
        z0 = LAYOUT.unpack(z0)
        assert torch.equal(z0["audio"][:, :5], before["audio"][:, 12:])
        again = torch.cat([shown[:, 12:], shown[:, :12]], 1)  # a frame of segment 3 is alone in segment 0 now
        assert torch.equal(z0["video"][:, :2], video.encode(again)[:, :2])
    joined = torch.cat([pictures[0], *(picture[:, 5:] for picture in pictures[1:])], 1)
    assert np.array_equal(out["video"], joined[:, :44].numpy())
    assert len(sounds) == 1  # decoded once
    joined = torch.cat([made[0]["audio"], *(z["audio"][:, 5:] for z in made[1:])], 1)
    assert torch.equal(sounds[0], joined)
    np.testing.assert_allclose(out["audio"], tokenizers["audio"].decode(joined)[:, :44000].numpy(), atol=1e-5)


@pytest.mark.parametrize(("seconds", "count"), [(2.125, 1), (2.2, 2), (3.625, 2), (3.7, 3), (15.625, 10)])
def test_seconds_is_the_length_of_the_clips(call, model, quick, monkeypatch, tmp_path, seconds, count):
    labels = []
    monkeypatch.setattr(
        sample, "denoise", lambda args, trained, z0, given, generator, label: (labels.append(label), z0)[1]
    )
    status, _, err = call(sample, "--ckpt", model, "--task", "v2a", "--n", 1, "--seconds", seconds)
    assert status == 0, err
    assert labels == [f"v2a, window {k + 1} of {count}" for k in range(count)]
    out = np.load(tmp_path / "samples/v2a/samples.npz")
    assert out["video"].shape[1] == round(8 * seconds) and out["audio"].shape[1] == round(8000 * seconds)
    assert len(out["given_video"]) == out["video"].shape[1] and len(out["given_audio"]) == out["audio"].shape[1]
    assert out["given_video"].all() and not out["given_audio"].any()  # to the last frame, also of a part of a segment


def longer(tokenizers, clips, frames):
    """Latents of each window of clips that last that many frames; the last frame and sample go on where they end."""
    z = []
    for start in range(0, frames - 5, 12):
        video, audio = clips["video"][:, start : start + 17], clips["audio"][:, 1000 * start : 1000 * (start + 17)]
        video = torch.cat([video] + (17 - video.shape[1]) * [video[:, -1:]], 1)
        audio = torch.cat([audio, audio[:, -1:].expand(-1, 17000 - audio.shape[1])], 1)
        z.append(tokenizers.encode({"video": video, "audio": audio}))
    return z


def segments(given):
    return {name: mask.nonzero().flatten().tolist() for name, mask in LAYOUT.split(given).items()}


def test_one_mask_lies_over_the_whole_clip(call, model, quick, windows, sounds, tmp_path):
    """--given audio:3-4 --seconds 5 gives the fourth second once, and each window its own part of the true sound."""
    status, _, err = call(sample, "--ckpt", model, "--given", "audio:3-4", "--n", 2, "--steps", 1, "--seconds", 5)
    assert status == 0, err
    out = np.load(tmp_path / "samples/custom/samples.npz")
    assert out["given_audio"].nonzero()[0].tolist() == [*range(24000, 32000)] and len(out["given_audio"]) == 40000
    assert out["given_video"].tolist() == [False] * 40
    shared = [*range(5)]
    assert [segments(given) for _, given, _, _ in windows] == [
        {"video": [], "audio": []},  # of 0 to 2.125 s
        {"video": [0, 1], "audio": [*shared, 12, 13, 14, 15, 16]},  # of 1.5 to 3.625 s
        {"video": [0, 1], "audio": [*shared, 5, 6, 7]},  # of 3 to 5.125 s
    ]
    _, tokenizers = network_and_tokenizers(model)
    true = data.toy_clips(2, 1, frames=40)[0]
    z = [LAYOUT.unpack(x)["audio"] for x in longer(tokenizers, true, 40)]
    want = torch.cat([z[1][:, 12:], z[2][:, 5:7]], 1)
    torch.testing.assert_close(sounds[-1][:, 24:31], want, atol=1e-5, rtol=1e-5)
    assert (sounds[-1][:, 31] - z[2][:, 7]).abs().mean() < 0.2  # its last spectrum may reach past the true clip's end
    assert (sounds[-1][:, 23] - z[1][:, 11]).abs().max() > 0.1 and (sounds[-1][:, 32] - z[2][:, 8]).abs().max() > 0.1


def test_inpaint_of_a_long_clip_has_its_two_ends(call, model, quick, windows, tmp_path):
    assert call(sample, "--ckpt", model, "--task", "inpaint", "--n", 2, "--steps", 1, "--seconds", 5)[0] == 0
    out = np.load(tmp_path / "samples/inpaint/samples.npz")
    assert out["given_video"].nonzero()[0].tolist() == [0, 37, 38, 39]  # of 1 + 4 x 10 frames, the last is cut off
    assert out["given_audio"].nonzero()[0].tolist() == [*range(1000), *range(37000, 40000)]
    assert [segments(given)["video"] for _, given, _, _ in windows] == [[0], [0, 1], [0, 1, 4]]
    _, tokenizers = network_and_tokenizers(model)
    true = data.toy_clips(2, 1, frames=40)[0]
    back = tokenizers["video"].decode(LAYOUT.unpack(longer(tokenizers, true, 40)[2])["video"]).numpy()
    assert (out["video"][:, 37:] == back[:, 13:16]).all() and (out["video"][:, 36] != back[:, 12]).any()
    assert out["video_true"].shape[1] == 40


def test_a2v_of_a_long_clip_has_all_sound(call, model, quick, windows, sounds, tmp_path):
    """And gives each window its own part of --input."""
    clip = tmp_path / "rising.mp4"
    make_clip(clip, seconds=6.3)
    wide = data.decode_clip(clip, data.TOY)[1]
    wide += 0.3 * torch.sin(torch.arange(len(wide)) ** 2 / 4e4)  # a rising tone, so that its parts can be told
    arguments = ("--ckpt", model, "--n", 1, "--steps", 1, "--input", clip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "decode_clip", lambda path, media: (torch.zeros(50, 32, 32, 3).byte(), wide))
        status, _, err = call(sample, *arguments, "--task", "a2v", "--seconds", 5.5)
    assert status == 0, err
    out = np.load(tmp_path / "samples/a2v/samples.npz")
    assert out["given_audio"].all() and len(out["given_audio"]) == 44000 and not out["given_video"].any()
    assert [len(segments(given)["audio"]) for _, given, _, _ in windows] == [17, 17, 17, 8]  # 5.5 s end in window 4
    assert [segments(given)["video"] for _, given, _, _ in windows] == [[], [0, 1], [0, 1], [0, 1]]
    _, tokenizers = network_and_tokenizers(model)
    true = {"video": torch.zeros(1, 44, 32, 32, 3, dtype=torch.uint8), "audio": wide[None, :44000]}
    z = [LAYOUT.unpack(x)["audio"] for x in longer(tokenizers, true, 44)]
    want = torch.cat([z[0], *(x[:, 5:] for x in z[1:])], 1)[:, :44]
    torch.testing.assert_close(sounds[0][:, :44], want, atol=1e-5, rtol=1e-5)
    assert (want[:, :5] - want[:, 12:17]).abs().max() > 0.1


def test_a_clip_needs_to_reach_its_last_given_segment_only(call, model, quick, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", seconds=4.2)
    arguments = ("--ckpt", model, "--n", 1, "--steps", 1, "--input", clip, "--seconds", 8)
    for flags, message in (
        (("--task", "continue"), ""),
        (("--given", "audio:3-4"), ""),
        (("--given", "audio:3-4.4"), "4.375 s are needed"),
        (("--task", "v2a"), "8 s are needed"),
        (("--task", "a2v"), "8 s are needed"),
    ):
        status, _, err = call(sample, *arguments, *flags)
        assert (status, message in err) == (2 if message else 0, True), (flags, err)


# --- Other data -------------------------------------------------------------------------------------------------------


def test_a_folders_held_out_clip_is_sampled(call, quick, tmp_path):
    """The file that training did not see, window by window."""
    (tmp_path / "clips").mkdir()
    for i in range(2):
        make_clip(tmp_path / "clips" / f"{i}.mp4", tone=400 + 300 * i)
    flags = ("--data", "clips", "--size", 32, "--sample-rate", 8000, "--preset", "toy", "--out", "runs/f")
    status, _, err = call(train, *flags, "--steps", 1, "--batch", 2)
    assert status == 0, err
    assert call(sample, "--ckpt", "runs/f", "--task", "continue", "--n", 3, "--steps", 1)[0] == 0
    out = np.load(tmp_path / "samples/continue/samples.npz")
    held_out = min(("0.mp4", "1.mp4"), key=lambda name: zlib.crc32(name.encode()))  # neither is one of ten
    video, audio = data.decode_clip(tmp_path / "clips" / held_out, data.TOY)
    assert out["condition"].tolist() == [0, 1, 0]  # two windows of 17 frames fit in 40
    for true, start in zip(out["video_true"], (0, 17, 0)):
        assert (true == video[start : start + 17].numpy()).all()
    for true, start in zip(out["audio_true"], (0, 17000, 0)):
        assert (true == audio[start : start + 17000].numpy()).all()
    error = np.abs(out["video"][:, :5].astype(int) - out["video_true"][:, :5]).mean()
    assert error < 4  # both clips have the same picture, so the tokenizer knows it


def test_given_frames_are_shown_right_where_the_first_frame_is_generated(call, quick, tmp_path, monkeypatch):
    """A folder's later segments are residuals of the first frame: of the true one in the first window, of a generated
    one in the second."""
    (tmp_path / "clips").mkdir()
    for i in range(8):
        (tmp_path / f"clips/{i}.mp4").touch()
    scenes = torch.rand(4, 32, 32, 3, generator=torch.Generator().manual_seed(0))

    def decode_clip(path, media):  # every clip shows four still scenes, each in a brightness of its own
        generator = torch.Generator().manual_seed(1 + int(path.stem))
        video = (120 * torch.rand(40, 4, generator=generator) @ scenes.flatten(1)).clamp(max=255).byte()
        return video.view(40, 32, 32, 3), torch.rand(40000, generator=generator)

    monkeypatch.setattr(data, "decode_clip", decode_clip)
    flags = ("--data", "clips", "--size", 32, "--sample-rate", 8000, "--preset", "toy", "--out", "runs/f")
    assert call(train, *flags, "--steps", 1, "--batch", 2)[0] == 0
    spans = ("--given", "video:1.625-2.125", "video:3.125-3.625", "--seconds", 3.625)
    status, _, err = call(sample, "--ckpt", "runs/f", *spans, "--n", 1, "--steps", 2)
    assert status == 0, err
    out = np.load(tmp_path / "samples/custom/samples.npz")
    assert out["given_video"].nonzero()[0].tolist() == [*range(13, 17), *range(25, 29)]
    error = np.abs(out["video"].astype(int) - out["video_true"])[0].mean((1, 2, 3))
    assert error[out["given_video"]].max() < 1 and error[~out["given_video"]].min() > 5, error.round(1)


def test_latents_to_latents(call, latents, tmp_path):
    assert call(train, *latents)[0] == 0
    assert call(sample, "--ckpt", "runs/z", "--task", "continue", "--n", 3, "--steps", 2)[0] == 0
    out, file = np.load(tmp_path / "samples/continue/samples.npz"), np.load(tmp_path / "z.npz")
    assert out["video"].shape == (3, 3, 2, 2, 4) and out["video_edges"].tolist() == [0, 0.1, 0.5, 0.9]
    assert out["condition"].tolist() == [0, 1, 0]  # held-out clips 0 and 10 of 12
    for name, given in (("video", 2), ("audio", 3)):
        np.testing.assert_allclose(out[f"{name}_true"], file[name][[0, 10, 0]], rtol=1e-6)
        np.testing.assert_allclose(out[name][:, :given], out[f"{name}_true"][:, :given], atol=1e-4)  # in its own scale
        assert not np.isclose(out[name][:, given:], out[f"{name}_true"][:, given:]).any()
        assert out[f"given_{name}"].sum() == given
    for flags in (("--input", "clip.mp4"), ("--seconds", 9)):
        status, _, err = call(sample, "--ckpt", "runs/z", *flags)
        assert status == 2 and len(err.splitlines()) == 1 and flags[0] in err and "clips" in err


@pytest.mark.parametrize("change", ["scale", "edges", "one more"])
def test_other_latents_do_not_pass_for_held_out_ones(call, latents, tmp_path, change):
    assert call(train, *latents)[0] == 0
    with np.load(tmp_path / "z.npz") as file:
        video, audio = file["video"], file["audio"]
    changes = {"scale": {"video": 2 * video}, "edges": {"audio_edges": np.linspace(0, 0.8, 7)},
               "one more": {"video": video[[3, *range(12)]], "audio": audio[[3, *range(12)]]}}  # fmt: skip
    latents_file(tmp_path / "z.npz", **changes[change])
    for script, arguments in ((sample, ("--ckpt", "runs/z", "--n", 1, "--steps", 1)), (train, latents)):
        status, _, err = call(script, *arguments)
        assert status == 2 and len(err.splitlines()) == 1 and ("z.npz" in err or "other modalities" in err), err
    assert not (tmp_path / "samples").exists()


def test_data_that_have_moved(call, quick, latents, tmp_path):
    """sample.py is told where they are, and train.py goes on with them."""
    (tmp_path / "clips").mkdir()
    for i in range(2):
        make_clip(tmp_path / f"clips/{i}.mp4", tone=400 + 300 * i)
    clips = ("--size", 32, "--sample-rate", 8000, "--preset", "toy", "--out", "runs/f", "--steps", 1, "--batch", 2)
    assert call(train, "--data", "clips", *clips)[0] == 0 and call(train, *latents)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    for old, new in (("clips", "elsewhere/clips"), ("z.npz", "elsewhere/y.npz")):
        (tmp_path / old).rename(tmp_path / new)
    for name, arguments, moved in (("f", clips, "elsewhere/clips/"), ("z", latents[2:], tmp_path / "elsewhere/y.npz")):
        where = ("--ckpt", f"runs/{name}", "--n", 1, "--steps", 1, "--task", "continue")
        status, _, err = call(sample, *where)
        assert status == 2 and len(err.splitlines()) == 1, err
        assert call(sample, *where, "--data", moved)[0] == 0
        status, out, err = call(train, "--data", moved, *arguments)
        assert status == 0 and f"going on at step {arguments[arguments.index('--steps') + 1]}" in out, err


def test_a_third_modality_from_file_to_samples(call, latents, tmp_path):
    """README, fork: a .npz may hold any modalities. Nothing of touch is lost from training to samples.npz."""
    touch = np.random.default_rng(1).standard_normal((12, 4, 2, 3)) * 5 - 2
    latents_file(tmp_path / "z.npz", touch=touch, touch_edges=np.array([0, 0.2, 0.4, 0.6, 0.9]))
    assert call(train, *latents)[0] == 0
    status, _, err = call(sample, "--ckpt", "runs/z", "--n", 2, "--steps", 2)
    assert status == 0, err
    out = np.load(tmp_path / "samples/continue/samples.npz")
    assert out["touch"].shape == (2, 4, 2, 3) and out["touch_edges"].tolist() == [0, 0.2, 0.4, 0.6, 0.9]
    assert out["given_touch"].tolist() == [True, True, False, False]  # video's first two segments end at 0.5
    np.testing.assert_allclose(out["touch"][:, :2], touch[[0, 10], :2], atol=1e-4)
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


@pytest.mark.parametrize("count", [1, 2])
def test_latents_of_few_segments(call, latents, tmp_path, count):
    video, edges = np.random.default_rng(0).standard_normal((12, count, 2, 4)), np.linspace(0, 0.9, count + 1)
    latents_file(tmp_path / "z.npz", video=video, video_edges=edges)
    assert call(train, *latents)[0] == 0
    status, _, err = call(sample, "--ckpt", "runs/z", "--n", 2, "--steps", 1)
    assert status == 0, err
    out = np.load(tmp_path / "samples/continue-2s/samples.npz")
    assert out["given_video"].tolist() == [True, False][:count] and out["video"].shape == (2, count, 2, 4)
    np.testing.assert_allclose(out["video"][:, :1], video[[0, 10], :1], atol=1e-4)


def test_where_nothing_is_given_no_data_are_read(call, latents, tmp_path):
    assert call(train, *latents)[0] == 0
    (tmp_path / "z.npz").unlink()
    status, _, err = call(sample, "--ckpt", "runs/z", "--task", "joint", "--n", 1, "--steps", 1)
    assert status == 0, err
    assert np.load(tmp_path / "samples/joint/samples.npz")["video"].shape == (1, 3, 2, 2, 4)
    status, _, err = call(sample, "--ckpt", "runs/z", "--task", "a2v", "--n", 1, "--steps", 1)
    assert status == 2 and len(err.splitlines()) == 1 and "z.npz" in err


def test_only_what_is_given_has_to_be_there(call, model, quick, tmp_path):
    """Sound alone is enough for a2v, and a silent film for v2a. In place of the rest there is black, or silence."""
    sound = 0.5 * np.sin(np.arange(24000) / 3)
    soundfile.write(tmp_path / "x.wav", sound, 8000)
    film = make_clip(tmp_path / "x.mp4", sound=False, seconds=3)
    short = make_clip(tmp_path / "short.mp4", seconds=1)
    arguments = ("--ckpt", model, "--n", 1, "--steps", 1, "--input")
    assert call(sample, *arguments, tmp_path / "x.wav", "--task", "a2v")[0] == 0
    made = np.load(tmp_path / "samples/a2v/samples.npz")
    np.testing.assert_allclose(made["audio_true"][0], sound[:17000], atol=1e-3)
    assert not made["video_true"].any() and made["video_true"].shape == (1, 17, 32, 32, 3)
    assert call(sample, *arguments, film, "--task", "v2a", "--seconds", 2.5)[0] == 0
    made = np.load(tmp_path / "samples/v2a/samples.npz")
    assert (made["video_true"][0] == data.decode_clip(film, data.TOY)[0][:20].numpy()).all()
    assert not made["audio_true"].any() and made["audio_true"].shape == (1, 20000)
    assert call(sample, *arguments, short, "--given", "video:0-0.625")[0] == 2  # a window is needed of what is given
    for path, task in ((tmp_path / "x.wav", "v2a"), (film, "a2v"), (film, "all"), (tmp_path / "x.wav", "continue")):
        status, _, err = call(sample, *arguments, path, "--task", task)
        assert status == 2 and len(err.splitlines()) == 1 and "2.125 s are needed" in err, err


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips beside the project")
def test_a_real_clip_is_an_input(call, model):
    clip = CLIPS / "vas_dog_02677.mp4"
    status, _, err = call(sample, "--ckpt", model, "--task", "v2a", "--n", 1, "--steps", 1, "--input", clip)
    assert status == 0, err


# --- Mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = (
    ("--ckpt nowhere", "there is no checkpoint"),
    ("--ckpt junk.pt", "junk.pt is no checkpoint of this version"),
    ("--ckpt CKPT --task a2a", "a2v"),
    ("--ckpt CKPT --sampler euler", "ddpm"),
    ("--ckpt CKPT --steps 0", "from 1 to 1000"),
    ("--ckpt CKPT --steps 1001", "from 1 to 1000"),
    ("--ckpt CKPT --n 0", "from 1 to"),
    ("--ckpt CKPT --seed -1", "from 0 to"),
    ("--ckpt CKPT --dtype fp16", "bf16"),
    ("--ckpt CKPT --device gpu", "cuda"),
    ("--ckpt CKPT --guid 1", "unrecognized"),
    ("--ckpt CKPT --given smell:0-1", "use video, audio"),
    ("--ckpt CKPT --given video:zero", "MODALITY:START-END"),
    ("--ckpt CKPT --given video", "MODALITY:START-END"),
    ("--ckpt CKPT --given video:0-0.01", "no whole segment; video's segments end at 0.125, 0.625, 1.125, 1.625, ..."),
    ("--ckpt CKPT --given video:0-1 --task joint", "use one"),
    ("--ckpt CKPT --guidance-drop smell --guidance 1", "use video, audio"),
    ("--ckpt CKPT --guidance-drop audio", "other than 0"),
    ("--ckpt CKPT --task joint --input a.mp4", "with a given part"),
    ("--ckpt CKPT --data clips", "training had another kind of --data"),
    ("--ckpt CKPT --seconds 2", "at least 2.125"),
    ("--ckpt CKPT --input nowhere.mp4", "--input nowhere.mp4: [Errno 2] No such file"),
    ("--ckpt CKPT --input junk.pt", "--input junk.pt: "),
)


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(call, model, tmp_path, arguments, message):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    status, _, err = call(sample, *(str(model) if word == "CKPT" else word for word in arguments.split()))
    assert status == 2 and len(err.splitlines()) == 1 and message in err, (status, err)
    assert not (tmp_path / "samples").exists()


def test_a_checkpoint_with_code_in_it_is_not_run(call, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Bomb()}, tmp_path / "ckpt.pt")
    status, _, err = call(sample, "--ckpt", tmp_path)
    assert status == 2 and len(err.splitlines()) == 1 and not (tmp_path / "ran").exists()


def test_an_input_is_not_overwritten(call, model, quick, tmp_path):
    for folder, status in (("samples/true", 2), ("samples/a2v", 2), ("samples", 0), ("", 0)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        clip = make_clip(tmp_path / folder / "00.mp4", seconds=3)
        before = clip.read_bytes()
        found, _, err = call(sample, "--ckpt", model, "--n", 1, "--steps", 1, "--task", "a2v", "--input", clip)
        assert found == status and ("--input lies in --out" in err) == (status == 2) and clip.read_bytes() == before, (
            err
        )


@pytest.mark.parametrize("flag", ["--input", "--data"])
def test_an_empty_path_is_no_default(call, model, flag):
    """As of a shell's variable that is not set."""
    status, _, err = call(sample, "--ckpt", model, "--n", 1, "--steps", 1, "--task", "a2v", flag, "")
    assert status == 2 and len(err.splitlines()) == 1


def test_a_checkpoint_has_any_name(call, model, quick, tmp_path):
    shutil.copy(model / "ckpt.pt", tmp_path / "best")
    (tmp_path / "run.pt").mkdir()
    shutil.copy(model / "ckpt.pt", tmp_path / "run.pt")
    for name in ("best", "run.pt"):
        assert call(sample, "--ckpt", name, "--n", 1, "--steps", 1, "--task", "joint")[0] == 0


def test_a_folder_whose_name_is_no_text(call, model, tmp_path):
    name = os.fsdecode(b"w\xe9rk")
    status, _, err = call(sample, "--ckpt", model, "--n", 1, "--steps", 1, "--task", "a2v", "--out", name)
    assert status == 0, err
    assert {"00.mp4", "00.wav", "sheet.png"} <= {path.name for path in (tmp_path / name / "a2v").iterdir()}


def test_a_full_disk_gets_one_line(call, model, tmp_path):
    (tmp_path / "samples/a2v").mkdir(parents=True)
    (tmp_path / "samples/a2v/00.wav").symlink_to("/dev/full")
    status, _, err = call(sample, "--ckpt", model, "--n", 1, "--steps", 1, "--task", "a2v")
    assert status == 2 and len(err.splitlines()) == 1 and "No space left" in err


def test_what_is_not_guided_is_named(call, model, quick):
    """Guidance drops what is given. Where that is nothing, it changes nothing."""
    arguments = ("--ckpt", model, "--n", 1, "--steps", 1, "--guidance", 2)
    note = "is not guided: it is given nothing that the unconditional pass could drop"
    lines = call(sample, *arguments)[1].splitlines()
    assert [line for line in lines if note in line] == [f"joint {note}"]
    for task, drop, noted in (("a2v", "video", 1), ("a2v", "audio", 0), ("continue", "video", 0), ("v2a", "audio", 1)):
        out = call(sample, *arguments, "--task", task, "--guidance-drop", drop)[1]
        assert out.count(note) == noted, (task, drop)
    assert note not in call(sample, *arguments[:-2])[1]
    assert note not in call(sample, *arguments, "--task", "joint", "--seconds", 3)[1]  # window 2 is given shared frames


def test_ctrl_c_gets_one_line(call, model, quick, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", stop)
    status, _, err = call(sample, "--ckpt", model, "--n", 1)
    assert status == 130 and err == "stopped: the same command goes on or begins anew\n"


@pytest.mark.parametrize("out", ["a:b", "pipe:1", "%d", "-y"])
def test_a_folder_of_any_name_is_written(call, model, tmp_path, out):
    """Of some names ffmpeg would make a protocol, a pattern or an option."""
    status, _, err = call(sample, "--ckpt", model, "--n", 1, "--steps", 1, "--task", "a2v", f"--out={out}")
    assert status == 0, err
    for folder in ("a2v", "true"):
        assert len(imageio.v3.imread(tmp_path / out / folder / "00.mp4")) == 17


def test_home_is_expanded_in_every_path(call, model, quick, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    make_clip(tmp_path / "home/x.mp4", seconds=3)
    (tmp_path / "home/model").symlink_to(model)
    flags = ("--ckpt=~/model", "--input=~/x.mp4", "--task", "a2v", "--n", 1, "--steps", 1, "--out=~/s")
    assert call(sample, *flags)[0] == 0 and (tmp_path / "home/s/a2v/samples.npz").exists()
    assert not (tmp_path / "~").exists()


def test_progress_is_printed_on_a_terminal(call, model, quick, monkeypatch):
    arguments = ("--ckpt", model, "--task", "a2v", "--n", 1, "--steps", 2)
    assert "step" not in call(sample, *arguments)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    out = call(sample, *arguments)[1]
    assert all(f"a2v, window 1 of 1: samples 0.. of 1, step {k}/2" in out for k in (1, 2))
