"""data.py: the toy world against its specification, tokenizers, folders, files, what a training step sees."""

import math
import subprocess
import zlib
from pathlib import Path

import imageio
import imageio_ffmpeg
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
    video = toy[0]["video"][:2].clone()
    video[:, 0] = 255 - video[:, 0]
    changed = (fitted["video"].encode(video) != z).flatten(2).any(-1)[0]
    assert changed.tolist() == [True, False, False, False, False]  # of the toy world nothing stays
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


def test_of_a_scene_that_stays_only_what_moves_is_in_the_later_segments():
    """Every clip has its own picture; a spot in it flickers a little."""
    g = torch.Generator().manual_seed(0)
    basis = torch.rand(6, 1, 1, 16, 16, 3, generator=g)  # of pictures, of 6 dimensions
    video = 20 + 30 * torch.einsum("nk,kfwhxc->nfhxc", torch.rand(400, 6, generator=g), basis)
    video = video.expand(-1, 9, -1, -1, -1).clone()
    flicker = 10 * torch.randn(400, 9, generator=g)
    video[:, :, 3:5, 3:5] += flicker[..., None, None, None]
    video = video.round().byte()
    modality = av_modalities(8, (1, 1), 24, 0.125, 8, frames=9)[0]
    explained = {}
    for stays in (True, False):
        tokenizer = data.PatchTokenizer(modality, 16, stays)
        tokenizer.fit(video)
        later = tokenizer.encode(video)[:, 1:].flatten(2).flatten(0, 1)
        assert (later.std(0) - 1).abs().max() < 1e-3 and later.mean(0).abs().max() < 1e-3
        x = torch.cat([flicker[:, 1:].reshape(800, 4), torch.ones(800, 1)], 1)
        left = later - x @ torch.linalg.lstsq(x, later).solution
        explained[stays] = 1 - (left.square().sum() / (later - later.mean(0)).square().sum()).item()
        error = (tokenizer.decode(tokenizer.encode(video)).float() - video.float()).abs()
        assert error.mean() < 1
        other = video.clone()
        other[:, 0] = 255 - other[:, 0]
        changed = (tokenizer.encode(other)[:, 1:] - tokenizer.encode(video)[:, 1:]).abs().max()
        assert (changed > 0.1) == stays  # causal either way: a later frame changes no earlier segment
    assert explained[True] > 2 * explained[False]


def test_the_order_of_clips_does_not_matter():
    """Colour after 1024 grey clips is still colour; a channel that moves only late in a file is not blown up."""
    colours = torch.zeros(2048, 5, 16, 16, 3, dtype=torch.uint8)
    light = torch.randint(0, 256, (2048, 1, 1, 1, 1), generator=torch.Generator().manual_seed(0)).byte()
    colours[:1200] = light[:1200]
    colours[1200:, ..., 2:] = light[1200:]
    layout = Layout(av_modalities(8, (1, 1), 3, 0.125, 3, frames=5))
    tokenizers = data.Tokenizers("folder", layout, data.Media(8, 16, 16000))
    sound = torch.randn(2048, 10000, generator=torch.Generator().manual_seed(1))
    tokenizers.fit({"video": colours, "audio": sound})
    back = tokenizers["video"].decode(tokenizers["video"].encode(colours[-9:]))
    assert (back.int() - colours[-9:].int()).abs().max() <= 2
    latents = {name: torch.randn(2048, *m.shape) for name, m in zip(layout.names, layout.modalities)}
    latents["audio"][:1200, ..., 0] = 3
    tokenizers = data.Tokenizers("x.npz", layout, data.TOY)
    tokenizers.fit(latents)
    for part in layout.unpack(tokenizers.encode(latents)).values():
        flat = part.flatten(0, -2)
        assert flat.mean(0).abs().max() < 1e-4 and (flat.std(0) - 1).abs().max() < 1e-4


def test_components_are_fitted_on_a_bounded_number_of_rows():
    x = torch.arange(900.0)[:, None]
    features = lambda part: part[:, None].expand(-1, 10, 6) + 1000 * torch.arange(10)[:, None]  # 9000 rows of 6
    every = data.rows(features, x)
    assert torch.equal(every, features(x).flatten(0, 1))
    assert len(data.rows(features, x, clips=70)) == 700
    few = data.rows(features, x, most=6 * 900)
    assert 700 < len(few) < 1100 and set(few[:, 0].tolist()) <= set(every[:, 0].tolist())
    clip, place = few[:, 0] % 1000, few[:, 0] // 1000  # of all clips and all places alike
    assert abs(clip.mean() - 450) < 50 and torch.bincount(place.long(), minlength=10).min() > 50


def test_constant_data_has_latents_of_zero():
    """Black pictures and silence: nothing to divide by, and they come back as they are."""
    layout = Layout(av_modalities(8, (2, 2), 12, 0.125, 8))
    for light, loud in ((0, 0.0), (77, 0.3), (255, -1.0)):
        clips = {"video": torch.full((9, 17, 32, 32, 3), light).byte(), "audio": torch.full((9, 34000), loud)}
        tokenizers = data.Tokenizers("folder", layout, data.Media(8, 32, 16000))
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


def stacked(clips):
    return {name: torch.stack(x) for name, x in clips.items()}


def test_a_clip_is_resampled_cropped_and_cut(tmp_path):
    for name, fps in (("plain.mp4", 25), ("-lead ing 'q\" ü.mkv", 10)):
        path = make_clip(tmp_path / name, fps=fps)
        clips = stacked(data.clip_windows(path, FOLDER, MEDIA))
        assert clips["video"].shape == (2, 17, 32, 32, 3) and clips["audio"].shape == (2, 34000)
        left, right = (
            clips["video"][..., part, :].float().mean((0, 1, 2, 3)) for part in (slice(4, 12), slice(20, 28))
        )
        assert min(left[0], right[2]) > 150 and max(left[2], right[0]) < 50
        for window in clips["audio"]:
            line = torch.fft.rfft(window[4000:20000] * torch.hann_window(16000)).abs().argmax()
            assert abs(line - 440) <= 1  # one line a hertz


def test_training_windows_begin_at_every_frame(tmp_path):
    """Bright and loud for a moment at 2 s: it wanders through the windows."""
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
    clips, _ = data.training_clips(tmp_path, FOLDER, MEDIA)
    assert len(clips["video"]) == len(clips["audio"]) == 8
    for k, (video, audio) in enumerate(zip(clips["video"], clips["audio"])):
        assert video.shape == (17, 32, 32, 3) and audio.shape == (34000,)
        assert video.float().mean((1, 2, 3)).argmax() == 16 - k
        assert abs(audio.abs().argmax().item() - 2000 * (16 - k) - 1000) < 1500


def test_a_folder_skips_what_it_cannot_use(tmp_path, capsys):
    make_clip(tmp_path / "b_good.mp4")
    make_clip(tmp_path / "c_mute.mp4", sound=False)
    make_clip(tmp_path / "d_short.mp4", seconds=1.5)
    (tmp_path / "e_broken.mp4").write_bytes((tmp_path / "b_good.mp4").read_bytes()[:300])
    make_clip(tmp_path / "f_silent.mp4", tone=0)
    (tmp_path / "a_notes.txt").write_text("not a clip")
    (tmp_path / ".hidden.mp4").write_text("")
    clips, held = data.training_clips(tmp_path, FOLDER, MEDIA)
    assert len(clips["video"]) == 24 and held == ["b_good.mp4"]  # one alone is trained on and held out
    wrong = ("a_notes.txt: ffmpeg finds", "c_mute.mp4: no sound", "d_short.mp4: 1.50 s of", "e_broken.mp4: ffmpeg",
             "f_silent.mp4: its sound is silent all through")  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith(f"skipped {start}") for line, start in zip(lines, wrong)), lines
    assert "2.12 s are needed" in lines[2]
    (tmp_path / "b_good.mp4").unlink()
    with pytest.raises(ValueError, match="no usable clip among the 5 files"):
        data.training_clips(tmp_path, FOLDER, MEDIA)


def test_a_folder_is_split_by_usable_file(tmp_path, monkeypatch):
    """Sampling decodes no more of the files set aside than it needs, and lives with some that are gone."""
    for i in range(3):
        make_clip(tmp_path / f"{i}.mp4", tone=300 + 200 * i)
    (tmp_path / "0.txt").write_text("")
    monkeypatch.setattr(data, "set_aside", lambda names: sorted(names)[:2])
    clips, held = data.training_clips(tmp_path, FOLDER, MEDIA)
    pitch = lambda x: torch.fft.rfft(x[:, :16000]).abs().argmax(-1).tolist()
    assert held == ["0.mp4", "1.mp4"] and pitch(torch.stack(clips["audio"])) == [700] * 24
    decoded, decode = [], data.decode_clip
    monkeypatch.setattr(data, "decode_clip", lambda path, media: (decoded.append(path.name), decode(path, media))[1])
    assert pitch(data.held_clips(tmp_path, held, FOLDER, MEDIA, 2, 2.125)["audio"]) == [300, 300]
    assert decoded == ["0.mp4"]
    assert pitch(data.held_clips(tmp_path, held, FOLDER, MEDIA, 3, 2.125)["audio"]) == [300, 300, 500]
    (long,) = data.held_clips(tmp_path, ["gone.mp4", "1.mp4"], FOLDER, MEDIA, 3, 4.5)["video"]
    assert len(long) == 36
    with pytest.raises(ValueError, match="none of the 1 files"):
        data.held_clips(tmp_path, ["gone.mp4"], FOLDER, MEDIA, 3, 4.5)


def test_one_more_file_moves_no_other():
    names = [f"clip {k}.mp4" for k in range(1000)]
    held = data.set_aside(names)
    assert 60 < len(held) < 140 and held == data.set_aside(names[::-1])
    for more in ("a.mp4", "zebra.mkv", "caf\udce9.mp4"):  # the last: a name that is no UTF-8
        assert set(data.set_aside([more, *names])) - {more} == set(held)
    for k in range(1, 40):
        assert 0 < len(data.set_aside(names[:k])) < max(2, k)
    assert data.set_aside(held[:3]) == [min(held[:3], key=lambda name: zlib.crc32(name.encode()))]


def produce(path, *arguments):
    """Let ffmpeg make a clip of its own sources."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments), str(path)]
    subprocess.run(command, check=True)
    return path


FLASH = "color=black:size=64x64:rate=25:duration={0},drawbox=color=white:t=fill:enable='between(t,{1},{1}+0.3)'"
BEEP = "aevalsrc='0.5*sin(2*PI*1000*t)*between(t,{1},{1}+0.3)':s=16000:d={0}"


@pytest.mark.parametrize("container", ["mkv", "mp4", "ts", "mpg"])
@pytest.mark.parametrize("late", ["picture", "sound"])
def test_picture_and_sound_that_start_apart_stay_together(tmp_path, container, late):
    """A flash and a beep at 1.5 s; one stream begins a second after the other."""
    flash, beep = (source.format(3, 0.5) if late == word else source.format(4, 1.5)
                   for source, word in ((FLASH, "picture"), (BEEP, "sound")))  # fmt: skip
    delay = {late: ["-itsoffset", 1]}
    codecs = ["-c:v", "mpeg2video", "-c:a", "mp2"] if container in ("ts", "mpg") else []
    path = produce(tmp_path / f"x.{container}", *delay.get("picture", []), "-f", "lavfi", "-i", flash,
                   *delay.get("sound", []), "-f", "lavfi", "-i", beep, *codecs)  # fmt: skip
    video, audio = data.decode_clip(path, MEDIA)
    assert (video.float().mean((1, 2, 3)) > 128).nonzero()[0] == 12  # eighths
    assert abs((audio.abs() > 0.1).nonzero()[0] / 16000 - 1.5) < 0.05 and len(video) >= 31


def test_lists_of_other_files_are_refused(tmp_path):
    """Whatever they name, and be it a good clip beside them."""
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
    assert len(data.clip_windows(good, FOLDER, MEDIA)["video"]) == 1
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=r"ffmpeg|no "):
            data.clip_windows(tmp_path / name, FOLDER, MEDIA)


def test_pixels_that_are_not_square(tmp_path):
    """A disc stored at half its width, shown at its full."""
    disc = "color=black:size=128x128:rate=8:duration=3,geq=lum='255*lt(hypot(X-64,Y-64),40)':cb=128:cr=128"
    for squeeze in ("scale=64:128,setsar=2", "scale=128:64,setsar=1/2", "scale=128:128,setsar=1"):
        path = produce(tmp_path / "x.mkv", "-f", "lavfi", "-i", f"{disc},{squeeze}",
                       "-f", "lavfi", "-i", BEEP.format(3, 1), "-c:v", "ffv1")  # fmt: skip
        light = data.decode_clip(path, MEDIA)[0][10, ..., 1] > 128  # (32, 32)
        assert [light.any(axis).sum().item() for axis in (0, 1)] == pytest.approx([20, 20], abs=1), squeeze


def test_metadata_that_looks_like_a_stream(tmp_path):
    lie = "Stream #0:7: Video: h264, 4000x4000"
    path = produce(tmp_path / "x.mkv", "-f", "lavfi", "-i", FLASH.format(3, 1), "-f", "lavfi", "-i", BEEP.format(3, 1),
                   "-metadata", f"title={lie}", "-metadata", f"comment=a\n  {lie}", "-metadata:s:v", f"title={lie}",
                   "-metadata", f"{lie}=x")  # fmt: skip
    assert lie in data.ffmpeg(path) and data.best_streams(path) == ("0:0", "0:1")


def test_channels_become_one(tmp_path):
    """Also where one mirrors the other, where there is one, and where there are six."""
    for expression, loud in (("{0}|{0}", 1), ("{0}|-{0}", 1), ("{0}", 1), ("{0}|0", 0.5), ("0|-{0}", 0.5)):
        source = "aevalsrc='" + expression.format("0.5*sin(2*PI*440*t)") + "':s=16000:d=3"
        path = produce(tmp_path / "x.mkv", "-f", "lavfi", "-i", FLASH.format(3, 1), "-f", "lavfi", "-i", source,
                       "-c:a", "pcm_s16le")  # fmt: skip
        _, audio = data.decode_clip(path, MEDIA)
        assert audio.abs().max() == pytest.approx(0.5 * loud, rel=0.01), expression
    path = produce(tmp_path / "six.mkv", "-i", path, "-af", "aformat=channel_layouts=5.1", "-c:a", "pcm_s16le")
    _, audio = data.decode_clip(path, MEDIA)
    assert audio.shape == (48000,) and audio.std() > 0.01


@pytest.mark.skipif(not CLIPS.is_dir(), reason="no real clips beside the project")
def test_real_clips():
    for path in sorted(CLIPS.iterdir()):
        clips = stacked(data.clip_windows(path, FOLDER, MEDIA))
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
    train, held = data.training_clips(path, layout, data.TOY)[0], data.held_clips(path, [], layout, data.TOY, 9, 1)
    assert len(train["video"]) == 10 and torch.equal(held["audio"], latents["audio"][[0, 10]])
    assert data.is_latents("Z.NPZ")
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
