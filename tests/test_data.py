"""data.py: the toy world against its specification, tokenizers, folders, files, what a training step sees."""

import math
from pathlib import Path

import imageio
import numpy as np
import pytest
import soundfile
import torch

import data
from avdit import PRESETS, Layout, av_modalities

TOY = Layout(PRESETS["toy"].modalities)
CLIPS = Path(__file__).parents[2] / "shared" / "clips"


@pytest.fixture(scope="module")
def toy():
    return data.toy_clips(64, 1)


@pytest.fixture(scope="module")
def fitted():
    """Tokenizers of the toy preset, fitted on other clips."""
    clips, _ = data.toy_clips(512, 0)
    tokenizers = data.Tokenizers("toy", TOY, data.TOY)
    tokenizers.fit(clips)
    return tokenizers


def triangle(q):
    q = q % 2
    return q if q <= 1 else 2 - q


def test_toy_world_is_its_specification():
    """Pixels and samples of single clips, one at a time, from the world's own definition."""
    draws = np.random.default_rng(5).random((3, 6))
    clips, truth = data.render(torch.from_numpy(draws))
    for i, (px, py, vx, vy, h, start) in enumerate(draws):
        px, py, vx, vy = 2 * px, 2 * py, 2 * vx - 1, 2 * vy - 1
        for f in (0, 7, 16):
            x, y = triangle(px + vx * f / 8), triangle(py + vy * f / 8)
            np.testing.assert_allclose(truth["position"][i, f].numpy(), (x, y), atol=1e-6)
            for row, column in ((3, 28), (16, 16), (20, 9), (9, 21)):
                distance = math.hypot(column / 31 - 0.18 - 0.64 * x, row / 31 - 0.18 - 0.64 * y)
                light = 1 / (1 + math.exp(-30 * (0.16 - distance)))
                for c in range(3):
                    value = 255 * light * (0.5 + 0.5 * math.cos(2 * math.pi * (h + c / 3)))
                    assert abs(clips["video"][i, f, row, column, c].item() - value) < 0.51
        fine = np.arange(17000 * 8) / 64000  # the phase integral at eight times the rate
        q = (py + vy * fine) % 2
        f = 300 * 2 ** (1.5 * (1 - np.minimum(q, 2 - q)))
        phi = 2 * math.pi * (start + np.concatenate([[0], np.cumsum((f[1:] + f[:-1]) / 2 / 64000)]))[::8]
        c, s = (0.5 + 0.5 * fn(2 * math.pi * h) for fn in (math.cos, math.sin))
        sound = 0.8 * (0.5 * np.sin(phi) + 0.3 * c * np.sin(2 * phi) + 0.3 * s * np.sin(3 * phi))
        np.testing.assert_allclose(clips["audio"][i].numpy(), sound, atol=1e-3)


def test_toy_clips_are_a_fixed_set():
    (few, _), (many, _) = data.toy_clips(3, 0), data.toy_clips(300, 0)
    assert all(torch.equal(few[m], many[m][:3]) for m in few)  # clip i does not depend on how many are asked for
    assert not torch.equal(data.toy_clips(3, 1)[0]["video"], few["video"])
    assert few["video"].shape == (3, 17, 32, 32, 3) and few["audio"].shape == (3, 17000)


# --- Tokenizers -----------------------------------------------------------------------


def test_latents_have_zero_mean_and_unit_variance(fitted):
    clips, _ = data.toy_clips(512, 0)
    z = fitted.encode(clips)
    assert z.shape == (512, TOY.E) and z.isfinite().all()
    for name, part in TOY.unpack(z).items():
        part = part[:, 1:] if name == "video" else part  # the first frame's components are fitted on every frame
        flat = part.flatten(0, -2)
        assert flat.mean(0).abs().max() < 1e-3 and (flat.std(0) - 1).abs().max() < 1e-3


def test_video_latents_are_causal_and_patches_keep_their_place(toy, fitted):
    video = toy[0]["video"][:2].clone()
    z = fitted["video"].encode(video)
    video[:, 9:] = 255 - video[:, 9:]  # frames 9.. belong to segments 3 and 4
    changed = (fitted["video"].encode(video) != z).flatten(2).any(-1)[0]
    assert changed.tolist() == [False, False, False, True, True]
    one = toy[0]["video"][:1].clone()
    one[:, 5:9, :16, 16:] = 128  # the upper right patch of segment 2
    where = (fitted["video"].encode(one) != fitted["video"].encode(toy[0]["video"][:1])).any(-1)[0]
    assert where.nonzero().tolist() == [[2, 0, 1]]


def test_a_full_basis_loses_nothing():
    video = torch.randint(0, 256, (3, 5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokenizer = data.PatchTokenizer(av_modalities(8, (4, 4), 4 * 4 * 4 * 3, 0.125, 8, frames=5)[0], 16)
    tokenizer.fit(video)
    error = (tokenizer.decode(tokenizer.encode(video)).int() - video.int()).abs().max()
    assert error <= 1  # fewer patches than dimensions: the basis spans them all, the other channels stay zero


def test_istft_inverts_stft(fitted, toy):
    t, sound = fitted["audio"], toy[0]["audio"][:2, : 40 * 125 + 256 - 125]
    made = t.istft(t.stft(sound))
    torch.testing.assert_close(made[:, 2:-2], sound[:, 2:-2], atol=1e-4, rtol=1e-3)  # a Hann window ends in 0


def test_features_are_square_roots_of_magnitudes(fitted, toy):
    """One frame a hop, centred on it, but for those at the ends, which lie inside the clip."""
    t, sound = fitted["audio"], toy[0]["audio"][:2]
    frames = t.features(sound).unflatten(-1, (8, 129)).flatten(1, 2)
    assert frames.shape == (2, 17 * 8, 129)
    for k, start in ((0, 0), (1, 125 - 65), (77, 77 * 125 - 65), (134, 134 * 125 - 65), (135, 17000 - 256)):
        want = np.abs(np.fft.rfft(sound[:, start : start + 256].numpy() * np.hanning(257)[:-1])) ** 0.5
        np.testing.assert_allclose(frames[:, k].numpy(), want, atol=2e-3)


def test_no_seam_is_heard_between_windows(fitted):
    """Two windows of one sound, encoded apart and joined: no more energy at high tones there than elsewhere."""
    sound = data.toy_clips(64, 5, frames=29)[0]["audio"]  # its tones end at 2.6 kHz
    t = fitted["audio"]
    joined = torch.cat([t.encode(sound[:, :17000]), t.encode(sound[:, 12000:])[:, 5:]], 1)
    made = t.decode(joined)
    assert made.shape == sound.shape

    def loudness(x, at):
        lines = torch.fft.rfft(x[:, at - 100 : at + 100] * torch.hann_window(200)).abs()
        return (lines[:, 75:].norm(dim=1) / lines.norm(dim=1)).median()

    assert loudness(made, 17000) < 1e-4 and loudness(made, 17000) < 2 * loudness(made, 14500)
    cut = made.clone()
    cut[:, 17000:] *= 0.99  # that this would tell a click
    assert loudness(cut, 17000) > 1e-4


@pytest.mark.parametrize("rate", [7997, 11025, 22050, 44100])
def test_any_sample_rate(rate):
    """Segments that are no whole number of samples or hops."""
    modalities = av_modalities(8, (2, 2), 12, 1 / 8, 8)
    t = data.Tokenizers("folder", Layout(modalities), data.Media(8, 32, rate))["audio"]
    sound = 0.5 * torch.sin(2 * math.pi * 500 / rate * torch.arange(round(17 / 8 * rate))).expand(3, -1)
    t.fit(sound)
    made = t.decode(t.encode(sound))
    line = torch.fft.rfft(made[0] * torch.hann_window(made.shape[1])).abs().argmax() * rate / made.shape[1]
    assert (
        t.encode(sound).shape == (3, 17, 8) and abs(line - 500) < 5 and 0 <= sound.shape[1] - made.shape[1] < rate / 30
    )


def test_decoding_does_not_depend_on_the_batch(fitted, toy):
    z = fitted["audio"].encode(toy[0]["audio"][:4])
    torch.testing.assert_close(fitted["audio"].decode(z)[2:3], fitted["audio"].decode(z[2:3]), atol=1e-3, rtol=1e-2)


# --- Folders and files ----------------------------------------------------------------


def make_clip(path, seconds=5.0, fps=25, size=(48, 80), rate=22050, tone=440.0, sound=True):
    """A clip whose left half is red, right half blue, with one tone; -> path."""
    frame = np.zeros((*size, 3), np.uint8)
    frame[:, : size[1] // 2, 0] = frame[:, size[1] // 2 :, 2] = 200
    extra = {}
    if sound:
        wav = path.with_suffix(".tone.wav")
        soundfile.write(wav, 0.5 * np.sin(2 * math.pi * tone * np.arange(int(seconds * rate)) / rate), rate)
        extra = {"audio_path": str(wav), "audio_codec": "aac" if path.suffix == ".mp4" else None}
    with imageio.get_writer(path, fps=fps, macro_block_size=1, ffmpeg_log_level="error", **extra) as writer:
        for _ in range(round(seconds * fps)):
            writer.append_data(frame)
    if sound:
        wav.unlink()
    return path


FOLDER, MEDIA = Layout(av_modalities(8, (2, 2), 12, 0.125, 8)), data.Media(8, 32, 16000)


def test_a_clip_is_resampled_cropped_and_cut(tmp_path):
    for name, fps in (("plain.mp4", 25), ("-lead ing 'q\" ü.mkv", 10)):
        path = make_clip(tmp_path / name, fps=fps)
        clips = data.clip_windows(path, FOLDER, MEDIA)
        assert clips["video"].shape == (2, 17, 32, 32, 3) and clips["audio"].shape == (2, 34000)
        left, right = (
            clips["video"][..., part, :].float().mean((0, 1, 2, 3)) for part in (slice(4, 12), slice(20, 28))
        )
        assert min(left[0], right[2]) > 150 and max(left[2], right[0]) < 50
        for window in clips["audio"]:
            line = torch.fft.rfft(window[4000:20000] * torch.hann_window(16000)).abs().argmax()
            assert abs(line - 440) <= 1  # one line a hertz


def test_a_folder_skips_what_it_cannot_use(tmp_path, capsys):
    make_clip(tmp_path / "b_good.mp4")
    make_clip(tmp_path / "c_silent.mp4", sound=False)
    make_clip(tmp_path / "d_short.mp4", seconds=1.5)
    (tmp_path / "e_broken.mp4").write_bytes((tmp_path / "b_good.mp4").read_bytes()[:300])
    (tmp_path / "a_notes.txt").write_text("not a clip")
    clips = data.load_clips(str(tmp_path), "train", FOLDER, MEDIA)
    assert len(clips["video"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "skipped c_silent.mp4",
        "skipped d_short.mp4",
        "skipped e_broken.mp4",
    ]
    assert "no sound" in lines[0] and "2.12 s are needed" in lines[1]
    with pytest.raises(ValueError, match="no usable clip"):
        data.load_clips(str(tmp_path), "held", FOLDER, MEDIA)  # a_notes.txt is the file set aside


def test_a_folder_is_split_by_file(tmp_path):
    for i in range(3):
        make_clip(tmp_path / f"{i}.mp4", tone=300 + 200 * i)
    train, held = (data.load_clips(str(tmp_path), split, FOLDER, MEDIA) for split in ("train", "held"))
    pitch = lambda x: torch.fft.rfft(x[:, :16000]).abs().argmax(-1).tolist()
    assert pitch(held["audio"]) == [300, 300] and pitch(train["audio"]) == [500, 500, 700, 700]


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips beside the project")
def test_real_clips():
    for path in sorted(CLIPS.iterdir()):
        clips = data.clip_windows(path, FOLDER, MEDIA)
        assert len(clips["video"]) >= 2 and clips["video"].float().std() > 5 and clips["audio"].std() > 1e-3
    # the spacecraft film holds 320 x 180 with 8 kHz sound and 480 x 270 with 16 kHz sound
    assert data.best_streams(CLIPS / "nasa_13013.mp4") == ("0:3", "0:4")


def latents_file(path, **change):
    rng = np.random.default_rng(0)
    arrays = {
        "video": 3 * rng.standard_normal((12, 3, 2, 2, 4)) + 1,
        "audio": rng.standard_normal((12, 6, 5)),
        "video_edges": np.array([0, 0.1, 0.5, 0.9]),
        "audio_edges": np.linspace(0, 0.9, 7),
    }
    np.savez(path, **{k: v for k, v in {**arrays, **change}.items() if v is not None})
    return str(path)


def test_latents_are_read_and_standardized(tmp_path):
    path = latents_file(tmp_path / "z.npz")
    latents, layout = data.read_latents(path)
    assert [(m.name, m.shape) for m in layout.modalities] == [("video", (3, 2, 2, 4)), ("audio", (6, 5))]
    assert layout.modalities[0].edges == (0, 0.1, 0.5, 0.9)
    train, held = (data.load_clips(path, split, layout, data.TOY) for split in ("train", "held"))
    assert len(train["video"]) == 10 and torch.equal(held["audio"], latents["audio"][[0, 10]])
    tokenizers = data.Tokenizers(path, layout, data.TOY)
    tokenizers.fit(latents)
    z = tokenizers.encode(latents)
    for part in layout.unpack(z).values():
        flat = part.flatten(0, -2)
        assert flat.mean(0).abs().max() < 1e-5 and (flat.std(0) - 1).abs().max() < 1e-5
    back = tokenizers.decode(z)
    for name, x in latents.items():
        torch.testing.assert_close(back[name], x)


def test_any_modalities_are_read_and_video_is_the_time_reference(tmp_path):
    touch = {"touch": np.zeros((12, 4, 7, 2, 3, 1)), "touch_edges": np.arange(5)}
    _, layout = data.read_latents(latents_file(tmp_path / "three.npz", **touch))
    assert [(m.name, m.grid, m.channels) for m in layout.modalities] == [
        ("video", (2, 2), 4), ("audio", (), 5), ("touch", (7, 2, 3), 1)]  # fmt: skip
    _, layout = data.read_latents(latents_file(tmp_path / "two.npz", video=None, video_edges=None, **touch))
    assert layout.names == ["audio", "touch"]  # as they stand in the file
    np.savez(
        tmp_path / "last.npz", a=np.zeros((2, 1, 3)), a_edges=[0, 1], video=np.zeros((2, 1, 3)), video_edges=[0, 1]
    )
    assert data.read_latents(tmp_path / "last.npz")[1].names == ["video", "a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": None}, "must hold pairs"),
        ({"audio_edges": None}, "must hold pairs"),
        ({name: None for name in ("video", "audio", "video_edges", "audio_edges")}, "must hold pairs"),
        ({"copy": np.zeros((12, 6, 5)), "copy_edges": np.arange(7)}, "cannot be a modality's name"),
        ({"a.b": np.zeros((12, 6, 5)), "a.b_edges": np.arange(7)}, "cannot be a modality's name"),
        ({"video_edges": np.array([0, 0.1, 0.5])}, "does not fit"),
        ({"video_edges": np.array([0, 0.5, 0.1, 0.9])}, "do not rise"),
        ({"audio": np.full((12, 6, 5), np.nan)}, "not finite"),
        ({"audio": np.zeros((11, 6, 5))}, "does not fit"),
        ({"audio": np.array([{"code": 1}], dtype=object)}, "no .npz of plain arrays"),
    ],
)
def test_wrong_latents_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        data.read_latents(latents_file(tmp_path / "z.npz", **change))
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(ValueError, match="no .npz"):
        data.read_latents(tmp_path / "junk.npz")


# --- What a training step sees --------------------------------------------------------


def test_batches_depend_on_seed_step_and_position_alone():
    def draws(seed, step):
        return data.draw(seed, step, 4096, 6, "monl", TOY, 1000)

    def equal(a, b):
        return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]

    assert equal(draws(0, 7), draws(0, 7)) and not torch.equal(draws(0, 7)[0], draws(0, 8)[0])
    assert not torch.equal(draws(0, 7)[1], draws(0, 8)[1]) and not torch.equal(draws(1, 7)[0], draws(0, 7)[0])
    every = torch.arange(6)
    whole, other = (data.draw_noise(0, step, every, TOY.E) for step in (7, 8))
    assert whole.shape == (6, TOY.E) and abs(whole.std() - 1) < 0.05
    assert len(whole.unique()) > 0.99 * whole.numel()  # a few float32 coincide, but no two rows
    assert torch.equal(data.draw_noise(0, 7, torch.tensor([4, 1]), TOY.E), whole[[4, 1]])
    assert not (other == whole).any() and not torch.equal(data.draw_noise(1, 7, every, TOY.E), whole)
    coins = [draws(0, step)[2] for step in range(600)]
    assert abs(sum(coins) / 600 - 0.9) < 4 * (0.09 / 600) ** 0.5


def test_draws_do_not_follow_each_other():
    """Indices of examples and their timesteps are uniform and unrelated, over many steps."""
    draws = [data.draw(0, step, 1000, 32, "vanilla", TOY, 1000) for step in range(200)]
    index, t = torch.stack([d[0] for d in draws]).double(), torch.stack([d[1][:, 0] for d in draws]).double()
    assert abs(index.mean() - 499.5) < 5 * 289 / 80 and abs(t.mean() - 500.5) < 5 * 289 / 80  # 6400 draws
    assert abs(torch.stack([index.flatten(), t.flatten()]).corrcoef()[0, 1]) < 5 / 80
