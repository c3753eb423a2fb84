"""data.py: the toy world against its specification, the tokenizers, the three kinds of data, and reading files."""

import math
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import imageio
import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch

import data
import sample
import train
from avdit import PRESETS, Layout, Modality, av_modalities

TOY = Layout(PRESETS["toy"].modalities)
CLIPS = Path(__file__).parents[2] / "shared" / "clips"


@pytest.fixture(scope="module")
def toy():
    return data.toy_clips(64, 1)


@pytest.fixture(scope="module")
def fitted():
    """Tokenizers of the toy world, fitted on other clips."""
    clips, _ = data.toy_clips(256, 0)
    tokenizers = data.open_data("toy", data.TOY).tokenizers()
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


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def test_standard_deviations_become_their_square_roots():
    """Two dozen components of deviation 16 and two dozen of 1: in z their variances are as 16 to 1, not 256 or 1."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(20000, 48, generator=g)
    x = (
        5
        + (scores * torch.tensor([16.0, 1.0]).repeat_interleave(24))
        @ torch.linalg.qr(torch.randn(48, 48, generator=g))[0]
    )
    components = data.Components(48, 64)
    components.fit(x)
    z = components.encode(x)
    share = torch.linalg.lstsq(scores, z).solution.square().sum(1)  # of the variance of z, by component
    assert share[:24].sum() / share[24:].sum() == pytest.approx(16, rel=0.1)
    assert (z[:, :48].std(0) - 1).abs().max() < 1e-2 and not z[:, 48:].any()  # no more channels than dimensions
    torch.testing.assert_close(components.decode(z), x, atol=1e-2, rtol=1e-3)


def test_components_are_the_same_after_a_second_fit():
    """Principal components have no sign of their own. Data in another order, and other random numbers, change none."""
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 5, 12)
    one, other = data.Components(12, 12), data.Components(12, 12)
    one.fit(x)
    torch.manual_seed(5)
    other.fit(x.flip(0))
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))  # no number was drawn
    torch.testing.assert_close(one.encode(x), other.encode(x), atol=1e-2, rtol=0)


def test_latents_have_zero_mean_and_unit_variance(fitted):
    clips, _ = data.toy_clips(256, 0)
    z = fitted.encode(clips)
    assert z.shape == (256, TOY.E) and z.isfinite().all()
    for name, part in TOY.unpack(z).items():
        part = part[:, 1:] if name == "video" else part  # first frames are fitted on every 4th frame
        flat = part.flatten(0, -2)
        assert flat.mean(0).abs().max() < 1e-3 and (flat.std(0) - 1).abs().max() < 1e-3


def test_video_latents_are_causal_and_patches_keep_their_place(toy, fitted):
    video = toy[0]["video"][:2].clone()
    z = fitted["video"].encode(video)
    video[:, 9:] = 255 - video[:, 9:]  # frames 9.. belong to segments 3 and 4
    changed = (fitted["video"].encode(video) != z).flatten(2).any(-1)[0]
    assert changed.tolist() == [False, False, False, True, True]
    video = toy[0]["video"][:2].clone()
    video[:, 0] = 255 - video[:, 0]
    changed = (fitted["video"].encode(video) != z).flatten(2).any(-1)[0]
    assert changed.tolist() == [True, False, False, False, False]  # the toy world has no residual
    one = toy[0]["video"][:1].clone()
    one[:, 5:9, :16, 16:] = 128  # the upper right patch of segment 2
    where = (fitted["video"].encode(one) != fitted["video"].encode(toy[0]["video"][:1])).any(-1)[0]
    assert where.nonzero().tolist() == [[2, 0, 1]]


def test_a_full_basis_loses_nothing():
    video = torch.randint(0, 256, (3, 5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokenizer = data.PatchTokenizer(av_modalities(8, (4, 4), 4 * 4 * 4 * 3, 0.125, 8, frames=5)[0], 16, residual=True)
    tokenizer.fit(video)
    assert torch.equal(tokenizer.decode(tokenizer.encode(video)), video)  # there are fewer patches than dimensions


def test_first_frames_are_fitted_on_every_fourth_frame():
    """A window may begin at any frame. Frame f has brightness f^2 here, so each choice of frames has its own mean."""
    video = torch.arange(9).square()[:, None, None, None].expand(20, 9, 16, 16, 3).byte()
    tokenizer = data.PatchTokenizer(av_modalities(8, (2, 2), 12, 0.125, 8, frames=9)[0], 16, residual=False)
    tokenizer.fit(video)
    torch.testing.assert_close(tokenizer.first.mean, torch.full((8 * 8 * 3,), (0 + 16 + 64) / 3 / 255))
    late = video[:, 8:]
    assert (tokenizer.decode(tokenizer.encode(late)).int() - late.int()).abs().max() <= 1


def test_decoded_pictures_are_within_bounds():
    """Brighter than white is white, darker than black is black."""
    modality = av_modalities(8, (2, 2), 12, 0.125, 8)[0]
    tokenizer, z = data.PatchTokenizer(modality, 16, residual=True), torch.zeros(1, *modality.shape)
    tokenizer.first.mean.fill_(1.1)
    tokenizer.later.mean.fill_(-0.1)
    video = tokenizer.decode(z)
    assert (video[:, :1] == 255).all() and (video[:, 1:] == 0).all()


def test_a_residual_leaves_what_moves_in_the_later_segments():
    """Every clip has its own picture, and a spot in it flickers a little."""
    g = torch.Generator().manual_seed(0)
    basis = torch.rand(6, 1, 1, 16, 16, 3, generator=g)  # of pictures, of 6 dimensions
    video = 20 + 30 * torch.einsum("nk,kfwhxc->nfhxc", torch.rand(400, 6, generator=g), basis)
    video = video.expand(-1, 9, -1, -1, -1).clone()
    flicker = 10 * torch.randn(400, 9, generator=g)
    video[:, :, 3:5, 3:5] += flicker[..., None, None, None]
    video = video.round().byte()
    modality = av_modalities(8, (1, 1), 24, 0.125, 8, frames=9)[0]
    explained = {}
    for residual in (True, False):
        tokenizer = data.PatchTokenizer(modality, 16, residual)
        tokenizer.fit(video)
        later = tokenizer.encode(video)[:, 1:].flatten(2).flatten(0, 1)
        assert (later.std(0) - 1).abs().max() < 1e-3 and later.mean(0).abs().max() < 1e-3
        x = torch.cat([flicker[:, 1:].reshape(800, 4), torch.ones(800, 1)], 1)
        left = later - x @ torch.linalg.lstsq(x, later).solution
        explained[residual] = 1 - (left.square().sum() / (later - later.mean(0)).square().sum()).item()
        error = (tokenizer.decode(tokenizer.encode(video)).float() - video.float()).abs()
        assert error.mean() < 1
        other = video.clone()
        other[:, 0] = 255 - other[:, 0]
        changed = (tokenizer.encode(other)[:, 1:] - tokenizer.encode(video)[:, 1:]).abs().max()
        assert (changed > 0.1) == residual
    assert explained[True] > 2 * explained[False]


def test_the_order_of_clips_does_not_matter():
    """Colour after 1200 grey clips is still colour. The same for a channel that moves late in a file."""
    colours = torch.zeros(2048, 5, 16, 16, 3, dtype=torch.uint8)
    light = torch.randint(0, 256, (2048, 1, 1, 1, 1), generator=torch.Generator().manual_seed(0)).byte()
    colours[:1200] = light[:1200]
    colours[1200:, ..., 2:] = light[1200:]
    layout = Layout(av_modalities(8, (1, 1), 3, 0.125, 3, frames=5))
    tokenizers = data.media_tokenizers(layout, data.Media(8, 16, 16000), residual=True)
    sound = torch.randn(2048, 10000, generator=torch.Generator().manual_seed(1))
    tokenizers.fit({"video": colours, "audio": sound})
    back = tokenizers["video"].decode(tokenizers["video"].encode(colours[-9:]))
    assert (back.int() - colours[-9:].int()).abs().max() <= 2
    latents = {name: torch.randn(2048, *m.shape) for name, m in zip(layout.names, layout.modalities)}
    latents["audio"][:1200, ..., 0] = 3
    tokenizers = data.Latents("x.npz", data.TOY, layout).tokenizers()
    tokenizers.fit(latents)
    for part in layout.unpack(tokenizers.encode(latents)).values():
        flat = part.flatten(0, -2)
        assert flat.mean(0).abs().max() < 1e-4 and (flat.std(0) - 1).abs().max() < 1e-4


def test_components_are_fitted_on_a_bounded_number_of_vectors():
    x = torch.arange(900.0)[:, None]
    features = lambda part: part[:, None].expand(-1, 10, 6) + 1000 * torch.arange(10)[:, None]  # 9000 vectors of 6
    every = data.features_of(features, x)
    assert torch.equal(every, features(x).flatten(0, 1))
    some = data.features_of(features, x, clips=70)
    assert len(some) == 700 and abs((some[:, 0] % 1000).mean() - 450) < 100  # random clips
    few = data.features_of(features, x, most=6 * 900)
    assert 700 < len(few) < 1100 and set(few[:, 0].tolist()) <= set(every[:, 0].tolist())
    clip, place = few[:, 0] % 1000, few[:, 0] // 1000  # all clips and all places are equally likely
    assert abs(clip.mean() - 450) < 50 and torch.bincount(place.long(), minlength=10).min() > 50


def test_constant_data_has_latents_of_zero():
    """Pictures of one colour and constant sound have no variance to divide by. They come back as they are."""
    layout = Layout(av_modalities(8, (2, 2), 12, 0.125, 8))
    for light, loud in ((0, 0.0), (77, 0.3), (255, -1.0)):
        clips = {"video": torch.full((9, 17, 32, 32, 3), light).byte(), "audio": torch.full((9, 34000), loud)}
        tokenizers = data.media_tokenizers(layout, data.Media(8, 32, 16000), residual=True)
        tokenizers.fit(clips)
        z = tokenizers.encode(clips)
        assert z.abs().max() < 0.01
        back = tokenizers.decode(z)
        assert torch.equal(back["video"], clips["video"]) and back["audio"].isfinite().all()


def test_istft_inverts_stft(fitted, toy):
    t, sound = fitted["audio"], toy[0]["audio"][:2, : 40 * 125 + 256 - 125]
    made = t.istft(t.stft(sound))
    torch.testing.assert_close(made[:, 2:-2], sound[:, 2:-2], atol=1e-4, rtol=1e-3)  # a Hann window ends in 0


def test_features_are_square_roots_of_magnitudes(fitted, toy):
    """One spectrum per hop, centred on it. The windows at the ends lie inside the clip."""
    t, sound = fitted["audio"], toy[0]["audio"][:2]
    frames = t.features(sound).unflatten(-1, (8, 129)).flatten(1, 2)
    assert frames.shape == (2, 17 * 8, 129)
    for k, start in ((0, 0), (1, 125 - 65), (77, 77 * 125 - 65), (134, 134 * 125 - 65), (135, 17000 - 256)):
        want = np.abs(np.fft.rfft(sound[:, start : start + 256].numpy() * np.hanning(257)[:-1])) ** 0.5
        np.testing.assert_allclose(frames[:, k].numpy(), want, atol=2e-3)


def test_decoded_sound_is_in_time():
    """Bursts of sound come back where they were, within a hundredth of the analysis window."""
    g, time = torch.Generator().manual_seed(0), torch.arange(17000) / 8000
    middle, pitch = 0.3 + 1.5 * torch.rand(6, 1, generator=g), 500 + 1000 * torch.rand(6, 1, generator=g)
    sound = 0.5 * torch.sin(2 * math.pi * pitch * time) * torch.exp(-(((time - middle) / 0.03) ** 2))
    t = data.SpectrumTokenizer(av_modalities(8, (2, 2), 12, 1 / 8, 64)[1], 8000)
    t.fit(sound)
    made = t.decode(t.encode(sound))
    assert made.shape == sound.shape
    when = lambda x: (x.square() * time).sum(1) / x.square().sum(1)
    assert (when(made) - when(sound)).abs().max() * 8000 < 2.5  # samples; the window has 256
    assert (made.square().sum(1) / sound.square().sum(1) - 1).abs().max() < 0.02


def test_decoded_sound_is_within_bounds():
    """A root below 0 means silence, and no sample is louder than 1."""
    t, z = data.SpectrumTokenizer(av_modalities(8, (2, 2), 12, 1 / 8, 8)[1], 8000), torch.zeros(1, 17, 8)
    t.bins.mean.fill_(-1)
    assert not t.decode(z).any()
    t.bins.mean.fill_(10)
    assert t.decode(z).abs().max() == 1


def test_no_seam_is_heard_between_windows(fitted):
    """Two windows of one sound are encoded apart and joined. Where they meet there is no click."""
    sound = data.toy_clips(16, 5, frames=29)[0]["audio"]  # its tones end at 2.6 kHz
    t = fitted["audio"]
    z = torch.cat([t.encode(sound[:, :17000]), t.encode(sound[:, 12000:])[:, 5:]], 1)
    made = t.decode(z)
    assert made.shape == sound.shape

    def loudness(x, at):
        lines = torch.fft.rfft(x[:, at - 100 : at + 100] * torch.hann_window(200)).abs()
        return (lines[:, 75:].norm(dim=1) / lines.norm(dim=1)).median()

    assert loudness(made, 17000) < 1e-4 and loudness(made, 17000) < 2 * loudness(made, 14500)
    cut = made.clone()
    cut[:, 17000:] *= 0.99  # a click is noticed
    assert loudness(cut, 17000) > 1e-4


@pytest.mark.parametrize("rate", [7997, 11025, 22050, 44100])
def test_any_sample_rate(rate):
    """A segment need not be a whole number of samples or hops."""
    t = data.SpectrumTokenizer(av_modalities(8, (2, 2), 12, 1 / 8, 8)[1], rate)
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


# --- The three kinds of data ------------------------------------------------------------------------------------------


def make_clip(path, seconds=5.0, fps=25, size=(48, 80), rate=22050, tone=440.0, sound=True):
    """A clip whose left half is red and right half blue, with one tone -> path."""
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


LAYOUT, MEDIA = Layout(av_modalities(8, (2, 2), 12, 0.125, 8)), data.Media(8, 32, 16000)


def folder(path):
    return data.open_data(path, MEDIA, LAYOUT)


def stacked(clips):
    return {name: torch.stack(x) for name, x in clips.items()}


def test_what_the_data_are(tmp_path):
    for path, kind in (("toy", data.ToyWorld), ("Z.NPZ", data.Latents), ("x", data.Folder), ("my/toy", data.Folder)):
        assert data.kind_of(path) is kind
    for path in ("toy", latents_file(tmp_path / "z.npz")):
        with pytest.raises(ValueError, match=f"are for a folder of clips, not for {path}"):
            data.open_data(path, data.Media(8, 64, 8000))
    for path in (tmp_path / "gone", ""):
        with pytest.raises(ValueError, match="neither toy nor a folder nor a .npz file"):
            data.open_data(path, data.Folder.media)
    assert data.open_data(tmp_path / "gone", data.Folder.media, LAYOUT).layout is LAYOUT  # a checkpoint's own
    for media, message in (((8, 72, 16000), "--size 72 is not a multiple of 32"), ((30, 64, 16000), "use 16080"),
                           ((240, 64, 1920), "use 15360")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            data.open_data(tmp_path, data.Media(*media))
    clips = data.open_data(tmp_path, data.Media(10, 96, 16000))
    layout, tokenizers = clips.layout, clips.tokenizers()
    assert [m.shape for m in layout.modalities] == [(5, 3, 3, 192), (17, 96)]
    assert (tokenizers["video"].residual, tokenizers["video"].patch, tokenizers["audio"].hop) == (True, 32, 200)
    assert layout.modalities[0].edges == pytest.approx((0, 0.1, 0.5, 0.9, 1.3, 1.7))
    assert layout.modalities[1].edges == pytest.approx(np.arange(18) / 10)


def test_the_toy_world_holds_out_other_clips(monkeypatch):
    asked = []

    def toy_clips(n, seed, frames=17):
        asked.append((n, seed, frames))
        return {"video": n}, "the truth"

    monkeypatch.setattr(data, "toy_clips", toy_clips)
    world = data.open_data("toy", data.TOY)
    assert world.training_clips() == ({"video": 4096}, [], 0)
    assert world.held_out_clips([], 7, 2.125) == {"video": 7} and world.held_out_clips([], 5000, 5) == {"video": 1024}
    assert asked == [(4096, 0, 17), (7, 1, 17), (1024, 1, 40)]


def test_training_windows_begin_at_every_frame(tmp_path):
    """A clip is bright and loud for a moment at 2 s. Each later window has that moment one frame earlier."""
    path = tmp_path / "flash.mp4"
    frames = np.zeros((24, 64, 64, 3), np.uint8)
    frames[16] = 255
    sound = np.full(48000, 0.001, np.float32)
    sound[32000:34000] = 0.5 * np.sin(np.arange(2000) / 3)
    soundfile.write(tmp_path / "x.wav", sound, 16000)
    with imageio.get_writer(path, fps=8, macro_block_size=1, audio_path=str(tmp_path / "x.wav")) as writer:
        for frame in frames:
            writer.append_data(frame)
    (tmp_path / "x.wav").unlink()
    clips, _, _ = folder(tmp_path).training_clips()
    assert len(clips["video"]) == len(clips["audio"]) == 8
    for k, (video, audio) in enumerate(zip(clips["video"], clips["audio"])):
        assert video.shape == (17, 32, 32, 3) and audio.shape == (34000,)
        assert video.float().mean((1, 2, 3)).argmax() == 16 - k
        assert abs(audio.abs().argmax().item() - 2000 * (16 - k) - 1000) < 1500
    for windows in clips.values():  # 17 times less memory
        assert len({x.untyped_storage().data_ptr() for x in windows}) == 1


def test_a_folder_skips_what_it_cannot_use(tmp_path, capsys):
    make_clip(tmp_path / "b_good.mp4")
    make_clip(tmp_path / "c_mute.mp4", sound=False)
    make_clip(tmp_path / "d_short.mp4", seconds=1.5)
    (tmp_path / "e_broken.mp4").write_bytes((tmp_path / "b_good.mp4").read_bytes()[:300])
    make_clip(tmp_path / "f_silent.mp4", tone=0)
    soundfile.write(tmp_path / "g_sound.wav", np.full(48000, 0.1), 16000)
    (tmp_path / "a_notes.txt").write_text("not a clip")
    (tmp_path / ".hidden.mp4").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/not_read.txt").write_text("")
    clips, held_out, _ = folder(tmp_path).training_clips()
    assert len(clips["video"]) == 24 and held_out == ["b_good.mp4"]
    wrong = ("a_notes.txt: ffmpeg's status is ", "c_mute.mp4: 5 s of picture and 0 s of sound, 2.125 s are needed",
             "d_short.mp4: 1.5 s of", "e_broken.mp4: ffmpeg's status is ",
             "f_silent.mp4: its sound is silent all through",
             "g_sound.wav: 0 s of picture and 3 s of sound")  # fmt: skip
    out, err = capsys.readouterr()
    assert out == "b_good.mp4 is the only usable file: it is trained on and held out\n"
    lines = err.splitlines()
    assert len(lines) == 6 and all(line.startswith(f"skipped {start}") for line, start in zip(lines, wrong)), lines
    assert "2.125 s are needed" in lines[2]
    (tmp_path / "b_good.mp4").unlink()
    with pytest.raises(ValueError, match="no usable clip among the 6 files of .*, without its subfolders"):
        folder(tmp_path).training_clips()


def test_a_folder_is_split_by_usable_file(tmp_path, monkeypatch, capsys):
    """Sampling decodes no more of the held-out files than it asks for clips, and can do without some of them."""
    for i in range(3):
        make_clip(tmp_path / f"{i}.mp4", tone=300 + 200 * i)
    (tmp_path / "0.txt").write_text("")
    monkeypatch.setattr(data, "held_out", lambda names: sorted(names)[:2])
    clips, names, _ = folder(tmp_path).training_clips()
    pitch = lambda x: torch.fft.rfft(x[:, :16000]).abs().argmax(-1).tolist()
    assert names == ["0.mp4", "1.mp4"] and pitch(torch.stack(clips["audio"])) == [700] * 24
    decoded, decode = [], data.decode_clip
    monkeypatch.setattr(data, "decode_clip", lambda path, media: (decoded.append(path.name), decode(path, media))[1])
    assert pitch(folder(tmp_path).held_out_clips(names, 1, 2.125)["audio"]) == [300]
    assert decoded == ["0.mp4"]
    clips = folder(tmp_path).held_out_clips(names, 3, 2.125)
    assert pitch(clips["audio"]) == [300, 300, 500] and clips["video"].shape == (3, 17, 32, 32, 3)
    (long,) = folder(tmp_path).held_out_clips(["gone.mp4", "1.mp4"], 3, 4.5)["video"]
    assert len(long) == 36
    with pytest.raises(ValueError, match="none of the 1 held-out files"):
        folder(tmp_path).held_out_clips(["gone.mp4"], 3, 4.5)
    assert capsys.readouterr().err.count("skipped gone.mp4: [Errno 2] No such file") == 2
    with pytest.raises(FileNotFoundError):
        folder(tmp_path / "gone").held_out_clips(names, 3, 4.5)


def test_a_folder_is_known_by_names_and_sizes(tmp_path):
    """Of the files that can be used, wherever the folder lies."""
    (tmp_path / "a").mkdir()
    for k in range(2):
        make_clip(tmp_path / f"a/{k}.mp4", tone=400 + 300 * k)
    sign = lambda path: folder(path).training_clips()[2]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/notes.txt").write_text("no clip")
    assert sign(tmp_path / "a") == sign(tmp_path / "b")
    make_clip(tmp_path / "b/1.mp4", tone=2000)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c/1.mp4").rename(tmp_path / "c/2.mp4")
    assert len({sign(tmp_path / name) for name in "abc"}) == 3


def test_one_more_file_moves_no_other():
    names = [f"clip {k}.mp4" for k in range(1000)]
    held_out = data.held_out(names)
    assert (
        held_out == sorted(name for name in names if zlib.crc32(name.encode()) % 10 == 0) and 60 < len(held_out) < 140
    )
    assert held_out == data.held_out(names[::-1])
    for more in ("a.mp4", "zebra.mkv", "caf\udce9.mp4"):  # the last name is no UTF-8
        assert set(data.held_out([more, *names])) - {more} == set(held_out)
    for k in range(1, 40):
        assert 0 < len(data.held_out(names[:k])) < max(2, k)
    assert (
        data.held_out(held_out[:4]) == [min(held_out[:4], key=lambda name: zlib.crc32(name.encode()))] != held_out[:1]
    )


def latents_file(path, **change):
    rng = np.random.default_rng(0)
    arrays = {
        "video": 3 * rng.standard_normal((12, 3, 2, 2, 4)) + 1,
        "audio": rng.standard_normal((12, 6, 5)),
        "video_edges": np.array([0, 0.1, 0.5, 0.9]),
        "audio_edges": np.linspace(0, 0.9, 7),
    }
    with zipfile.ZipFile(path, "w") as file:  # np.savez cannot write every name
        for name, x in {**arrays, **change}.items():
            if x is not None:
                with file.open(f"{name}.npy", "w", force_zip64=True) as part:
                    np.save(part, x)
    return str(path)


def test_latents_are_read_and_standardized(tmp_path):
    path = latents_file(tmp_path / "z.npz")
    latents, layout, checksum = data.read_latents(path)
    assert [(m.name, m.shape) for m in layout.modalities] == [("video", (3, 2, 2, 4)), ("audio", (6, 5))]
    assert layout.modalities[0].edges == (0, 0.1, 0.5, 0.9)
    file = data.open_data(path, data.TOY)
    clips, names, sign = file.training_clips()
    held_out = file.held_out_clips(names, 9, 1)
    for name, x in latents.items():
        assert torch.equal(clips[name], x[[1, 2, 3, 4, 5, 6, 7, 8, 9, 11]]) and torch.equal(held_out[name], x[[0, 10]])
    with pytest.raises(ValueError, match="does not hold the latents of the training"):
        file.held_out_clips([checksum + 1], 1, 1)
    assert names == [checksum] == [sign] and torch.equal(
        file.held_out_clips(names, 1, 1)["audio"], latents["audio"][:1]
    )
    tokenizers = file.tokenizers()
    tokenizers.fit(latents)
    z = tokenizers.encode(latents)
    for part in layout.unpack(z).values():
        flat = part.flatten(0, -2)
        assert flat.mean(0).abs().max() < 1e-5 and (flat.std(0) - 1).abs().max() < 1e-5
    back = tokenizers.decode(z)
    for name, x in latents.items():
        torch.testing.assert_close(back[name], x)


def test_a_constant_channel_becomes_zero():
    """A mean that is off by a rounding error would be divided by almost no deviation."""
    latents = torch.randn(1000, 7, 2, generator=torch.Generator().manual_seed(0))
    latents[..., 1] = 12.3456
    assert latents.mean((0, 1))[1] != latents[0, 0, 1]  # in float32
    standardize = data.Standardize(Modality("pose", (), 2, tuple(range(8))))
    standardize.fit(latents)
    z = standardize.encode(latents)
    assert not z[..., 1].any() and abs(z[..., 0].std() - 1) < 1e-4
    torch.testing.assert_close(standardize.decode(z), latents)


@pytest.mark.parametrize("scale", [1e-20, 1e-7, 1e7])
def test_latents_of_any_scale_have_unit_variance(scale):
    latents = scale * torch.randn(100, 7, 3, generator=torch.Generator().manual_seed(0))
    latents[..., 2] = 0
    standardize = data.Standardize(Modality("pose", (), 3, tuple(range(8))))
    standardize.fit(latents)
    z = standardize.encode(latents)
    assert z[..., :2].flatten(0, 1).std(0).numpy() == pytest.approx(1, abs=1e-3) and not z[..., 2].any()
    assert standardize.decode(z).numpy() == pytest.approx(latents.numpy(), rel=1e-4, abs=1e-6 * scale)


def test_any_modalities_are_read_and_video_is_the_time_reference(tmp_path):
    touch = {"touch": np.zeros((12, 4, 7, 2, 3, 1)), "touch_edges": np.arange(5)}
    _, layout, _ = data.read_latents(latents_file(tmp_path / "three.npz", **touch))
    assert [(m.name, m.grid, m.channels) for m in layout.modalities] == [
        ("video", (2, 2), 4), ("audio", (), 5), ("touch", (7, 2, 3), 1)]  # fmt: skip
    _, layout, _ = data.read_latents(latents_file(tmp_path / "two.npz", video=None, video_edges=None, **touch))
    assert layout.names == ["audio", "touch"]  # as they stand in the file
    np.savez(
        tmp_path / "last.npz", a=np.zeros((2, 1, 3)), a_edges=[0, 1], video=np.zeros((2, 1, 3)), video_edges=[0, 1]
    )
    assert data.read_latents(tmp_path / "last.npz")[1].names == ["video", "a"]


@pytest.fixture
def pose_and_touch(tmp_path):
    """Latents without video and audio."""
    pose, touch = 5 + np.random.default_rng(0).standard_normal((2, 12, 4, 3))
    edges = np.arange(5) / 2
    np.savez(tmp_path / "x.npz", pose=pose, pose_edges=edges, touch=touch[:, :2, None], touch_edges=edges[:3])
    return pose


def test_other_modalities_train_and_sample_with_default_flags(call, pose_and_touch):
    status, _, err = call(train, "--data", "x.npz", "--steps", 2, "--batch", 2)
    assert status == 0, err
    status, _, err = call(sample)
    assert status == 0, err
    assert sorted(path.name for path in Path("samples").iterdir()) == ["continue", "continue-2s", "inpaint", "joint"]
    for path in Path("samples").iterdir():
        made = np.load(path / "samples.npz")
        assert made["pose"].shape == (8, 4, 3) and made["touch"].shape == (8, 2, 1, 3)
        assert np.isfinite(made["pose"]).all() and np.isfinite(made["touch"]).all()
    made = np.load("samples/continue/samples.npz")
    assert made["condition"].tolist() == [0, 1] * 4  # of the held-out clips 0 and 10
    np.testing.assert_allclose(made["pose"][:2, :2], pose_and_touch[[0, 10], :2], atol=1e-4)


def test_a_mixture_of_absent_modalities_leaves_nothing_behind(call, pose_and_touch):
    status, _, err = call(train, "--data", "x.npz", "--steps", 2, "--batch", 2, "--mixture", "task:a2v")
    assert status == 2 and len(err.splitlines()) == 1 and "'audio'" in err and "pose, touch" in err
    assert [path.name for path in Path().iterdir()] == ["x.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": None}, "must hold pairs"),
        ({"audio_edges": None}, "must hold pairs"),
        ({name: None for name in ("video", "audio", "video_edges", "audio_edges")}, "must hold pairs"),
        ({"copy": np.zeros((12, 6, 5)), "copy_edges": np.arange(7)}, "cannot be a modality's name"),
        *(
            ({name: np.zeros((12, 6, 5)), f"{name}_edges": np.arange(7)}, f"'{name}' cannot be a modality's name")
            for name in ("a.b", "condition", "given_audio", "audio_true", "file", "allow_pickle")  # of samples.npz
        ),
        ({"video_edges": np.array([0, 0.1, 0.5])}, "the segments of video_edges"),
        ({"video_edges": np.array([0, 0.5, 0.1, 0.9])}, "do not rise"),
        ({"audio": np.full((12, 6, 5), np.nan)}, "not finite"),
        ({"audio_edges": np.array([0, 1, 2, 3, 4, 5, np.inf])}, "not finite"),
        ({"audio": np.zeros((12, 6, 5), complex)}, "must hold real numbers"),
        ({"audio_edges": np.array(["a"] * 7)}, "must hold real numbers"),
        ({"audio": np.zeros((11, 6, 5))}, "with the clips of video"),
        ({"audio": np.zeros((12, 30))}, "must be .clips, segments, ..., channels"),
        ({"audio": np.zeros((12, 6, 0))}, "must be .clips, segments, ..., channels"),
        ({"video": np.zeros((1, 3, 2, 2, 4)), "audio": np.zeros((1, 6, 5))}, "two at least"),
        ({"audio": np.array([{"code": 1}], dtype=object)}, "no .npz of plain arrays"),
    ],
)
def test_wrong_latents_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        data.read_latents(latents_file(tmp_path / "z.npz", **change))
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(ValueError, match="no .npz"):
        data.read_latents(tmp_path / "junk.npz")
    with pytest.raises(FileNotFoundError):
        data.read_latents(tmp_path / "gone.npz")


def test_a_checksum_tells_latents_apart(tmp_path):
    """Their numbers, shapes, names and edges count. How they are stored does not."""
    checksum = lambda **change: data.read_latents(latents_file(tmp_path / "z.npz", **change))[2]
    with np.load(latents_file(tmp_path / "z.npz")) as file:
        video, audio = file["video"], file["audio"]
    np.savez_compressed(tmp_path / "same.npz", **np.load(tmp_path / "z.npz"))
    first = checksum()
    assert first == data.read_latents(tmp_path / "same.npz")[2] == checksum(video=np.asfortranarray(video))
    renamed = {"sound": audio, "sound_edges": np.linspace(0, 0.9, 7), "audio": None, "audio_edges": None}
    changes = {"video": 2 * video}, {"video": video[::-1]}, {"video_edges": np.array([0, 0.1, 0.5, 0.8])}, renamed
    shaped = {"video": video.reshape(12, 3, 1, 4, 4)}
    assert len({first, *(checksum(**change) for change in (*changes, shaped))}) == 6


def test_a_file_that_cannot_be_opened_is_skipped(tmp_path, monkeypatch, capsys):
    for name in ("a.mp4", "b.mp4"):
        make_clip(tmp_path / name)

    def opens(path, mode):
        if path.name == "a.mp4":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    monkeypatch.setattr(data, "open", opens, raising=False)
    _, held_out, _ = folder(tmp_path).training_clips()
    assert held_out == ["b.mp4"] and "skipped a.mp4: [Errno 13] Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(("processes", "threads"), [(None, 8), ("1", 8), ("4", 2), ("16", 1)])
def test_processes_of_one_machine_share_its_cores(tmp_path, monkeypatch, processes, threads):
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    asked, pool = [], data.ThreadPoolExecutor
    monkeypatch.setattr(data.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(data, "ThreadPoolExecutor", lambda count: (asked.append(count), pool(count))[1])
    make_clip(tmp_path / "a.mp4")
    folder(tmp_path).training_clips()
    assert asked == [threads]


# --- Reading files ----------------------------------------------------------------------------------------------------


def test_a_clip_is_resampled_cropped_and_cut(tmp_path):
    for name, fps in (("plain.mp4", 25), ("-lead ing 'q\" ü.mkv", 10)):
        path = make_clip(tmp_path / name, fps=fps)
        clips = stacked(data.clip_windows(path, LAYOUT, MEDIA))
        assert clips["video"].shape == (2, 17, 32, 32, 3) and clips["audio"].shape == (2, 34000)
        left, right = (
            clips["video"][..., part, :].float().mean((0, 1, 2, 3)) for part in (slice(4, 12), slice(20, 28))
        )
        assert min(left[0], right[2]) > 150 and max(left[2], right[0]) < 50
        for window in clips["audio"]:
            line = torch.fft.rfft(window[4000:20000] * torch.hann_window(16000)).abs().argmax()
            assert abs(line - 440) <= 1  # one line per hertz
        video, audio = data.decode_clip(path, data.Media(5, 64, 24000))
        assert video.shape == (25, 64, 64, 3) and abs(len(audio) - 5 * 24000) < 1500


@pytest.mark.parametrize(("fps", "rate"), [(8, 16000), (30, 7997), (24, 22050)])
def test_sound_starts_with_its_frame(monkeypatch, fps, rate):
    """Frame k shows the instant k / fps. The sound of a window starts at the nearest sample."""
    video, every_sample = torch.arange(200)[:, None, None, None], torch.arange(250 * rate // fps).float()
    monkeypatch.setattr(data, "decode_clip", lambda path, media: (video, audio))
    layout, media = Layout(av_modalities(fps, (2, 2), 12, 1 / fps, 8)), data.Media(fps, 32, rate)
    cases = (None, 1, 17, 200), (None, 5, 17, 200), (None, None, 17, 200), (51 / fps, None, 51, 200), (None, 1, 17, 190)
    for seconds, every, frames, end in (*cases, (None, 1, 17, 250)):  # the sound ends with frame `end`, of 200
        audio = every_sample[: end * rate // fps]
        starts = [(k, round(Fraction(k * rate, fps))) for k in range(0, 200 - frames + 1, every or frames)]
        samples = round(Fraction(frames * rate, fps))
        starts = [(frame, sample) for frame, sample in starts if sample + samples <= len(audio)]
        clips = stacked(data.clip_windows("x", layout, media, seconds, every))
        assert list(zip(clips["video"][:, 0].flatten().tolist(), clips["audio"][:, 0].tolist())) == starts
        assert (clips["video"].diff(dim=1) == 1).all() and (clips["audio"].diff(dim=1) == 1).all()
        assert (clips["video"].shape[1], clips["audio"].shape[1]) == (frames, samples)
    audio = 0 * every_sample
    with pytest.raises(ValueError, match="silent all through"):
        data.clip_windows("x", layout, media)


def test_what_is_not_needed_goes_on_black_or_silent(monkeypatch):
    white, tone = torch.full((20, 32, 32, 3), 255).byte(), 0.5 * torch.ones(40000)
    for needed, video, audio in (
        (["video"], white, tone[:0]),
        (["video"], white, tone[:900]),
        (["video"], white, 0 * tone),
        (["audio"], white[:0], tone),
        (["audio"], white[:5], tone),
    ):
        monkeypatch.setattr(data, "decode_clip", lambda path, media, clip=(video, audio): clip)
        clips = data.clip_windows("x", LAYOUT, MEDIA, needed=needed)
        for name, x, length in (("video", video, 17), ("audio", audio, 34000)):
            there = x[:length]
            assert torch.equal(clips[name][0][: len(there)], there) and len(clips[name][0]) == length
            assert not clips[name][0][len(there) :].any()
        with pytest.raises(ValueError, match=r"2.125 s are needed|silent all through"):
            data.clip_windows("x", LAYOUT, MEDIA)


def produce(path, *arguments):
    """Let ffmpeg make a clip of its own sources -> path."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments), str(path)]
    subprocess.run(command, check=True)
    return path


FLASH = "color=black:size=64x64:rate=25:duration={0},drawbox=color=white:t=fill:enable='between(t,{1},{1}+0.3)'"
BEEP = "aevalsrc='0.5*sin(2*PI*1000*t)*between(t,{1},{1}+0.3)':s=16000:d={0}"


@pytest.mark.parametrize("container", ["mkv", "mp4", "ts", "mpg"])
@pytest.mark.parametrize("late", ["picture", "sound"])
def test_picture_and_sound_that_start_apart_stay_together(tmp_path, container, late):
    """A flash and a beep come at 1.5 s. One stream begins a second after the other."""
    flash, beep = (source.format(3, 0.5) if late == word else source.format(4, 1.5)
                   for source, word in ((FLASH, "picture"), (BEEP, "sound")))  # fmt: skip
    delay = {late: ["-itsoffset", 1]}
    codecs = ["-c:v", "mpeg2video", "-c:a", "mp2"] if container in ("ts", "mpg") else []
    path = produce(tmp_path / f"x.{container}", *delay.get("picture", []), "-f", "lavfi", "-i", flash,
                   *delay.get("sound", []), "-f", "lavfi", "-i", beep, *codecs)  # fmt: skip
    video, audio = data.decode_clip(path, MEDIA)
    assert (video.float().mean((1, 2, 3)) > 128).nonzero()[0] == 12  # eighths of a second
    assert abs((audio.abs() > 0.1).nonzero()[0] / 16000 - 1.5) < 0.05 and len(video) >= 31


def test_a_late_picture_is_preceded_by_its_first_frame(tmp_path):
    """White lasts from 0.33 s to 0.45 s. It is the frame of the instant 3 / 8, and of those before."""
    white = "color=black:size=64x64:rate=25:duration=3,drawbox=color=white:t=fill:enable='lt(n,3)'"
    path = produce(tmp_path / "x.mkv", "-itsoffset", 0.33, "-f", "lavfi", "-i", white, "-f", "lavfi", "-i",
                   BEEP.format(3, 1))  # fmt: skip
    video, _ = data.decode_clip(path, MEDIA)
    assert (video.float().mean((1, 2, 3)) > 128).nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_gaps_stay_gaps(tmp_path):
    """A second is missing in both streams. The flash and the beep after it are still at 2.5 s."""
    flash, beep = FLASH.format(4, 2.5) + ",select='not(between(t,1,2))'", BEEP.format(4, 2.5)
    path = produce(tmp_path / "x.mkv", "-f", "lavfi", "-i", flash, "-f", "lavfi", "-i", beep, "-fps_mode", "vfr",
                   "-af", "aselect='not(between(t,1,2))'", "-c:a", "pcm_s16le")  # fmt: skip
    video, audio = data.decode_clip(path, MEDIA)
    assert (video.float().mean((1, 2, 3)) > 128).nonzero()[0] == 20  # eighths of a second
    assert abs((audio.abs() > 0.1).nonzero()[0] / 16000 - 2.5) < 0.05


def test_lists_of_other_files_are_refused(tmp_path):
    """Whatever they name, even a good clip beside them."""
    produce(tmp_path / "good.ts", "-f", "lavfi", "-i", FLASH.format(4, 1), "-f", "lavfi", "-i", BEEP.format(4, 1))
    good = (tmp_path / "good.ts").absolute()
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXTINF:4.0,\n"
    lists = {
        "relative.m3u8": f"{head}good.ts\n#EXT-X-ENDLIST\n",
        "absolute.m3u8": f"{head}{good}\n#EXT-X-ENDLIST\n",
        "file.m3u8": f"{head}file://{good}\n#EXT-X-ENDLIST\n",
        "endless.m3u8": f"{head}{good}\n",
        "list.ffconcat": "ffconcat version 1.0\nfile good.ts\n",
        "list.mp4": f"ffconcat version 1.0\nfile 'file:{good}'\n",
    }
    assert len(data.clip_windows(good, LAYOUT, MEDIA)["video"]) == 1
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=r"ffmpeg|no "):
            data.clip_windows(tmp_path / name, LAYOUT, MEDIA)


def test_ffmpeg_has_limits(tmp_path, monkeypatch):
    """It opens one file, and takes a bounded block of memory, an hour of picture and an hour of sound."""
    path, run, change, opened = make_clip(tmp_path / "x.mkv"), subprocess.run, {}, []

    def spy(command, stdin, **options):
        at = command.index("-i")
        before = dict(pairwise(command[:at]))
        assert before["-protocol_whitelist"] == "fd" and before["-max_alloc"] == "500000000"
        assert "-nostdin" in command  # or it would take bytes of the file for keys
        assert command[at + 1] == "fd:"
        opened.append(Path(stdin.name))
        return run([change.get(word, word) for word in command], stdin=stdin, **options)

    monkeypatch.setattr(subprocess, "run", spy)
    video, audio = data.decode_clip(path, MEDIA)
    assert len(video) == 40 and abs(len(audio) - 80000) < 2000
    assert opened[0] == path and opened[1] == opened[2] and opened[1].parent.parent == Path(tempfile.gettempdir())
    assert not opened[1].parent.exists()
    change["3600"] = "2"  # seconds
    video, audio = data.decode_clip(path, MEDIA)
    assert len(video) == 16 and len(audio) == 32000
    change["500000000"] = "1000"  # bytes
    with pytest.raises(ValueError, match="Cannot allocate memory"):
        data.decode_clip(path, MEDIA)


FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (f'ulimit -f 8; exec "{FFMPEG}" "$@"', "status is"),  # little room for temporary files
        ("kill -SEGV $$", "status is -11: $"),
        (
            "echo '[error] before' >&2; echo '[fatal] Unrecognized option' >&2; exit 8",
            "is 8: .error. before ... .fatal. Unrecognized",
        ),
    ],
)
def test_an_ffmpeg_that_fails_is_believed(tmp_path, monkeypatch, script, message):
    """It may have written a part of the clip. Its own last line says what was wrong."""
    path = make_clip(tmp_path / "x.mkv", seconds=30)
    (tmp_path / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "ffmpeg"))
    with pytest.raises(ValueError, match=message):
        data.decode_clip(path, MEDIA)


PARTS = {  # channels, picture size and sample rate of two parts
    "channels": ((1, "64x48", 44100), (2, "64x48", 44100)),
    "size": ((1, "64x48", 44100), (1, "80x64", 44100)),
    "rate": ((1, "64x48", 44100), (1, "64x48", 48000)),
}


@pytest.mark.parametrize("what", PARTS)
def test_a_stream_that_changes_on_the_way_stays_in_time(tmp_path, what):
    """Four parts of 3 s, of two formats in turn, with a flash and a beep in the second second of each."""
    parts = []
    for k, (channels, size, rate) in enumerate(PARTS[what]):
        flash, beep = FLASH.format(3, 1).replace("64x64", size), BEEP.format(3, 1).replace("16000", str(rate))
        parts.append(produce(tmp_path / f"{k}.ts", "-f", "lavfi", "-i", flash, "-f", "lavfi", "-i", beep,
                             "-ac", channels, "-c:v", "mpeg2video", "-c:a", "aac", "-t", 3))  # fmt: skip
    (tmp_path / "list").write_text("".join(f"file {part}\n" for part in 2 * parts))
    path = produce(tmp_path / "x.ts", "-f", "concat", "-safe", 0, "-i", tmp_path / "list", "-c", "copy")
    video, audio = data.decode_clip(path, MEDIA)
    begins = lambda loud: (loud[1:] & ~loud[:-1]).nonzero().flatten() + 1
    flashes = begins(video.float().mean((1, 2, 3)) > 128) / MEDIA.fps
    beeps = begins(audio.abs().unfold(0, 800, 800).max(1).values > 0.1) / 20
    for found in (flashes, beeps):
        np.testing.assert_allclose(found.numpy(), [1, 4, 7, 10], atol=0.15)


def test_a_recording_of_two_programmes_is_refused(tmp_path):
    """ffmpeg would show the picture of one to the sound of the other."""
    sources = [FLASH.format(3, 1), BEEP.format(3, 1), FLASH.format(3, 2).replace("64x64", "128x128"), BEEP.format(3, 2)]
    inputs = [x for source in sources for x in ("-f", "lavfi", "-i", source)]
    arguments = [*inputs, *(x for k in range(4) for x in ("-map", k)), "-c:v", "mpeg2video", "-c:a", "mp2"]
    one, two = "title=one:st=0:st=1", "title=two:st=2:st=3"
    path = produce(tmp_path / "x.ts", *arguments, "-program", one, "-program", two)
    with pytest.raises(ValueError, match="several programmes"):
        data.decode_clip(path, MEDIA)
    few = [*inputs[:8], "-map", 0, "-map", 1, *arguments[-4:]]
    path = produce(tmp_path / "y.ts", *few, "-program", one, "-program", "title=empty")
    assert len(data.decode_clip(path, MEDIA)[0]) == 24


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67", "bt709"])
def test_colours_of_hdr_are_not_washed_out(tmp_path, transfer):
    """HDR10, HLG as phones record it, and the usual BT.709."""
    space, matrix = ("bt709", "bt709") if transfer == "bt709" else ("bt2020", "bt2020nc")
    convert = (
        f"scale=in_primaries=bt709:in_transfer=bt709:out_primaries={space}:out_transfer={transfer}:out_color_matrix"
    )
    for colour, want in (("white", (255, 255, 255)), ("red", (255, 15, 2)), ("gray", (128, 128, 128))):
        path = produce(tmp_path / "x.mkv", "-f", "lavfi", "-i", f"color={colour}:size=64x64:rate=8:duration=1",
                       "-vf", f"format=gbrp,{convert}={matrix},format=yuv420p10le", "-c:v", "ffv1",
                       "-color_primaries", space, "-color_trc", transfer, "-colorspace", matrix)  # fmt: skip
        pixel = data.decode_clip(path, MEDIA)[0][4, 16, 16]
        np.testing.assert_allclose(pixel.int().numpy(), want, atol=18, err_msg=colour)


def test_pixels_that_are_not_square(tmp_path):
    """A disc is stored at half its width or height."""
    disc = "color=black:size=128x128:rate=8:duration=3,geq=lum='255*lt(hypot(X-64,Y-64),40)':cb=128:cr=128"
    for squeeze in ("scale=64:128,setsar=2", "scale=128:64,setsar=1/2", "scale=128:128,setsar=1"):
        path = produce(tmp_path / "x.mkv", "-f", "lavfi", "-i", f"{disc},{squeeze}",
                       "-f", "lavfi", "-i", BEEP.format(3, 1), "-c:v", "ffv1")  # fmt: skip
        light = data.decode_clip(path, MEDIA)[0][10, ..., 1] > 128  # (32, 32)
        assert [light.any(axis).sum().item() for axis in (0, 1)] == pytest.approx([20, 20], abs=1), squeeze


@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_the_default_streams_are_read(tmp_path, container):
    """Another picture is larger, and another sound has a higher sample rate and more channels."""
    tone = "aevalsrc='0.3*sin(2*PI*{0}*t){1}':s={2}:d=3"
    sources = ["color=red:size=128x128:rate=25:duration=3", "color=blue:size=64x64:rate=10:duration=3",
               tone.format(1000, "|0.3*sin(2*PI*1000*t)", 48000), tone.format(300, "", 8000)]  # fmt: skip
    arguments = [x for source in sources for x in ("-f", "lavfi", "-i", source)]
    arguments += [x for k in range(4) for x in ("-map", k)]
    for stream, default in (("v:0", 0), ("v:1", "default"), ("a:0", 0), ("a:1", "default")):
        arguments += [f"-disposition:{stream}", default]
    video, audio = data.decode_clip(produce(tmp_path / f"x.{container}", *arguments), MEDIA)
    assert video.float().mean((0, 1, 2)).argmax() == 2  # blue
    assert abs(torch.fft.rfft(audio[8000:24000]).abs().argmax() - 300) <= 1  # one line per hertz


def test_channels_become_one(tmp_path):
    """Two may be alike, or one may be silent. There may be one, or six. The mean of two in opposite phase is silent."""
    for expression, loud in (("{0}|{0}", 1), ("{0}|-{0}", 0), ("{0}", 1), ("{0}|0", 0.5), ("0|-{0}", 0.5)):
        source = "aevalsrc='" + expression.format("0.5*sin(2*PI*440*t)") + "':s=16000:d=3"
        path = produce(tmp_path / "x.mkv", "-f", "lavfi", "-i", FLASH.format(3, 1), "-f", "lavfi", "-i", source,
                       "-c:a", "pcm_s16le")  # fmt: skip
        _, audio = data.decode_clip(path, MEDIA)
        assert audio.abs().max() == pytest.approx(0.5 * loud, rel=0.01), expression
    path = produce(tmp_path / "six.mkv", "-i", path, "-af", "pan=5.1|FC=c1", "-c:a", "pcm_s16le")  # front centre alone
    _, audio = data.decode_clip(path, MEDIA)
    assert audio.shape == (48000,) and audio.abs().max() > 0.1
    path = produce(tmp_path / "loud.mkv", "-f", "lavfi", "-i", "aevalsrc='" + "|".join(["0.5"] * 6) + "':c=5.1:d=3")
    _, audio = data.decode_clip(path, MEDIA)
    assert audio[8000:40000].numpy() == pytest.approx(0.5, abs=0.01)  # all channels have the same level


def test_sound_is_finite_and_at_most_one(tmp_path):
    """A file of floats may hold anything."""
    samples = (1.7 * np.sin(np.arange(48000) / 6)).astype(np.float32)
    samples[1000:1100], samples[2000], samples[2001] = np.nan, np.inf, -np.inf
    soundfile.write(tmp_path / "x.wav", samples, 16000, subtype="FLOAT")
    path = produce(
        tmp_path / "x.mkv", "-f", "lavfi", "-i", FLASH.format(3, 1), "-i", tmp_path / "x.wav", "-c:a", "copy"
    )
    _, audio = data.decode_clip(path, MEDIA)
    np.testing.assert_array_equal(audio.numpy(), np.clip(np.nan_to_num(samples), -1, 1))


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips beside the project")
def test_real_clips():
    for path in sorted(CLIPS.iterdir()):
        clips = stacked(data.clip_windows(path, LAYOUT, MEDIA))
        assert len(clips["video"]) >= 2 and clips["video"].float().std() > 5 and clips["audio"].std() > 1e-3
