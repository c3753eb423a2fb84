"""Damaged and odd inputs: a few hundred clips, .npz files and checkpoints. Each is used or refused in one line."""

import io
import random
import resource
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from test_data import LAYOUT, latents_file
from test_train import equal

import data
import sample
import train

FLAGS, MEDIA = ("--size", 32, "--sample-rate", 8000), data.Media(8, 32, 8000)


def clip(path, *more, size="48x32", rate=10, seconds=2.3, audio=True):
    """A clip of ffmpeg's test picture, with a tone."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    command += ["-f", "lavfi", "-i", f"testsrc=size={size}:rate={rate}:duration={seconds}"]
    command += ["-f", "lavfi", "-i", f"sine=frequency=500:sample_rate=8000:duration={seconds}"] if audio else []
    subprocess.run([*command, *map(str, more), f"file:{path.absolute()}"], check=True)
    return path


def damaged(content, rng):
    """Endless variants of a file: cut short, bits flipped, a stretch zeroed, doubled or dropped."""
    while True:
        raw = bytearray(content)
        at, length = rng.randrange(len(raw)), rng.choice((1, 4, 64, 1000))
        kind = rng.choice(("cut", "flip", "flip", "flip head", "zero", "max", "double", "drop"))
        if kind == "cut":
            del raw[at:]
        elif kind == "flip":
            for _ in range(length):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif kind == "flip head":
            raw[rng.randrange(min(200, len(raw)))] ^= 1 << rng.randrange(8)
        elif kind == "double":
            raw[at:at] = raw[at : at + length]
        elif kind == "drop":
            del raw[at : at + length]
        else:
            raw[at : at + length] = (b"\0" if kind == "zero" else b"\xff") * len(raw[at : at + length])
        yield bytes(raw)


@pytest.fixture(autouse=True)
def bounded():
    """Each test has 4 minutes, and no decoder may use more than 2 GB of memory."""
    signal.alarm(240)
    yield
    signal.alarm(0)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2e6  # KiB


ODD_NAMES = (
    "two words.mp4", "quo'te\"s.mp4", "ünïcödé 猫.mp4", "-leading.mp4", "--help.mp4", "a:b.mp4", "%03d.mp4",
    "$(touch ran).mp4", "new\nline.mp4", "a|b;c&d.mp4", "no_ending", "wrong.txt", "[x]{1..3}*?.mp4",
)  # fmt: skip


def test_damaged_clips_are_used_or_skipped(tmp_path, capfd):
    """Every file of one folder is either decoded or named in a line."""
    rng, folder, good = random.Random(0), tmp_path / "clips", tmp_path / "good"
    folder.mkdir()
    good.mkdir()
    seeds = [
        clip(good / "a.mp4"),
        clip(good / "b.mkv"),
        clip(good / "c.avi"),
        clip(good / "d.mov", "-c:v", "rawvideo", "-pix_fmt", "rgb24"),
        clip(good / "e.wav", "-vn"),
    ]
    for seed in seeds:
        variants = damaged(seed.read_bytes(), rng)
        for k in range(30):
            (folder / f"{seed.stem}{k:02}{seed.suffix}").write_bytes(next(variants))
    wav = bytearray(seeds[-1].read_bytes())
    wav[24:28] = wav[40:44] = b"\xff\xff\xff\x7f"  # 2^31 - 1 samples per second, and bytes
    (folder / "huge.wav").write_bytes(wav)
    wide = bytearray(seeds[0].read_bytes())
    at = wide.index(b"avc1") + 28
    wide[at : at + 4] = b"\xff" * 4
    (folder / "wide.mp4").write_bytes(wide)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "playlist.m3u8").write_text("#EXTM3U\n#EXTINF:5,\nhttp://127.0.0.1:9/x.ts\n")
    (folder / "concat.txt").write_text(f"ffconcat version 1.0\nfile {seeds[0]}\n")
    clip(folder / "silent.mp4", audio=False)
    clip(folder / "one frame.mp4", "-frames:v", 1)
    clip(folder / "gap.mkv", "-vf", "setpts='if(gt(N,10),N+1e6,N)/10/TB'", "-fps_mode", "vfr")  # a gap of days
    used = [
        clip(folder / "variable.mkv", "-vf", "setpts='(N+N*N/23)/20/TB'", "-fps_mode", "vfr"),
        clip(folder / "odd.mkv", "-pix_fmt", "yuv444p", size="33x17"),
        clip(folder / "tiny.avi", "-c:v", "ffv1", size="2x2"),
        clip(folder / "tall.mkv", size="16x400"),
    ]
    for name in ODD_NAMES:
        used.append(Path(shutil.copy(seeds[0], folder / name)))
    files = sorted(path for path in folder.iterdir())
    assert len(files) >= 175
    decoded = []
    for path in files:
        capfd.readouterr()
        try:
            clips = data.clip_windows(path, LAYOUT, MEDIA)
        except ValueError as why:
            assert str(why) and path not in used, (path, why)
            continue
        video, audio = (torch.stack(clips[name]) for name in ("video", "audio"))
        assert video.shape[1:] == (17, 32, 32, 3) and audio.isfinite().all() and audio.abs().max() <= 1
        assert len(clips["video"]) <= 1700
        assert not any(capfd.readouterr())
        decoded.append(path)
    assert set(used) <= set(decoded) < set(files)
    print(f"\n{len(files)} clips, {len(files) - len(decoded)} refused")
    rest = [path for path in files if path not in decoded]
    for path in decoded:
        path.unlink()
    with pytest.raises(ValueError, match="no usable clip"):
        data.open_data(folder, MEDIA, LAYOUT).training_clips()
    skipped = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == len(rest)


def test_scripts_refuse_damaged_clips(call, tmp_path):
    """The scripts use a file with an odd name. A damaged one gets a result, or one line and status 2."""
    rng, folder = random.Random(1), tmp_path / "clips"
    folder.mkdir()
    seed = clip(folder / "0.mp4")
    for name in ODD_NAMES:
        shutil.copy(seed, folder / name)
    settings = ("--data", folder, "--preset", "toy", *FLAGS, "--steps", 2, "--batch", 2, "--out", tmp_path / "run")
    assert call(train, *settings)[0] == 0
    bad = tmp_path / "bad"
    bad.mkdir()
    variants, refused = damaged(seed.read_bytes(), rng), 0
    for k in range(12):
        (bad / "x.mp4").write_bytes(next(variants) if k else b"")
        out = tmp_path / f"out{k}"
        arguments = ("--ckpt", tmp_path / "run", "--task", "continue", "--n", 1, "--steps", 1, "--out", out)
        status, _, err = call(sample, *arguments, "--input", bad / "x.mp4")
        if status:
            refused += 1
            assert status == 2 and len(err.splitlines()) == 1 and "x.mp4: " in err and not out.exists(), err
            status, _, err = call(train, *settings[2:-1], out, "--data", bad)
            assert status == 2 and "no usable clip" in err.splitlines()[-1] and not out.exists()
            assert all(line.startswith("skipped x.mp4") for line in err.splitlines()[:-1])
        else:
            assert (out / "continue/samples.npz").exists()
    assert 3 < refused < 12
    for name in ODD_NAMES[::3]:
        assert call(sample, *arguments[:-1], tmp_path / name, "--input", folder / name)[0] == 0
    assert not Path("ran").exists()


def huge_header(shape):
    """A .npy file whose header claims an array of that shape. The numbers are missing."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(100)


def test_damaged_latents_are_refused_in_one_line(call, tmp_path):
    rng, path, good = random.Random(2), tmp_path / "x.npz", Path(latents_file(tmp_path / "good.npz"))
    video, audio = np.zeros((12, 3, 2, 2, 4)), np.zeros((12, 6, 5))
    wrong = [
        {"video": np.zeros((0, 3, 2, 2, 4)), "audio": np.zeros((0, 6, 5))},
        {"video": video[:1], "audio": audio[:1]},
        {"video": video[..., :0]},
        {"video": video[0]},
        {"video": np.float64(3)},
        {"video": video.astype("U5")},
        {"video": video.astype(complex)},
        {"video": video > 0},
        {"video": video + 1e300},
        {"video": video * np.nan},
        {"audio": audio + np.inf},
        {"audio": None},
        {"audio_edges": np.array(["a"] * 7)},
        {"audio_edges": np.array([0, 1, 2, 3, 4, 5, np.inf])},
        {"audio_edges": np.full(7, np.nan)},
        {"audio_edges": np.zeros((7, 1))},
        {"video_edges": np.zeros(4)},
        {"video_edges": np.float64(1)},
    ]
    contents = []
    for change in wrong:
        with np.errstate(invalid="ignore"):
            contents.append((Path(latents_file(path, **change)).read_bytes(), True))
    for shape in ((12, 3, 2, 2, 10**9), (2**62, 3, 2, 2, 4), (12, 3, 2, 2, 5), (10**4, 10**4, 10**4, 2, 4)):
        with zipfile.ZipFile(path, "w") as file:
            for name, array in np.load(good).items():
                with file.open(f"{name}.npy", "w") as member:
                    if name == "video":
                        member.write(huge_header(shape))
                    else:
                        np.lib.format.write_array(member, array)
        contents.append((path.read_bytes(), True))
    variants = damaged(good.read_bytes(), rng)
    contents += [(b"", True), (b"PK\3\4", True), (np.zeros(3).tobytes(), True)]
    contents += [(next(variants), None) for _ in range(150)]
    fine = 0
    for k, (content, must_fail) in enumerate(contents):
        path.write_bytes(content)
        out = tmp_path / f"out{k}"
        status, _, err = call(train, "--data", path, "--preset", "toy", "--steps", 1, "--batch", 2, "--out", out)
        assert status == 2 or (status == 0 and not must_fail), (k, err)
        if status:
            assert len(err.splitlines()) == 1 and "x.npz" in err, (k, err)
            assert not out.exists() or not list(out.iterdir())
        fine += not status
    print(f"\n{len(contents)} files of latents, {len(contents) - fine} refused")
    assert fine < len(contents) / 3


def test_damaged_checkpoints_are_refused_in_one_line(call, tmp_path):
    """The checksums of the file notice every flipped bit."""
    latents_file(tmp_path / "z.npz")
    flags = ("--data", "z.npz", "--preset", "toy", "--out", "o", "--steps", 1, "--batch", 2)
    assert call(train, *flags)[0] == 0
    path, rng = tmp_path / "o/ckpt.pt", random.Random(3)
    variants, good, refused = damaged(path.read_bytes(), rng), torch.load(path, weights_only=True), 0
    for k in range(60):
        path.write_bytes(next(variants))
        for script, arguments in ((train, flags), (sample, ("--ckpt", "o", "--n", 1, "--steps", 1))):
            status, _, err = call(script, *arguments)
            if status == 0:
                assert equal(torch.load(path, weights_only=True), good), k  # what changed is not read
            else:
                assert status == 2 and len(err.splitlines()) == 1 and "o/ckpt.pt" in err, (k, err)
            refused += status == 2
    assert refused > 60
