"""tests/talking.py: readers of real clips against closed forms, and a made-up face that says what it hears."""

import math
from types import SimpleNamespace

import pytest
import score
import talking
import torch
from test_data import make_clip

import train
from data import Media

MEDIA = Media(8, 64, 16000)


def test_noise_is_the_power_of_white_noise():
    g = torch.Generator().manual_seed(0)
    still = torch.full((2, 3, 64, 64, 3), 128.0)
    grain = still + 10 * torch.randn(still.shape, generator=g)
    assert talking.noise(grain.round().byte()).mean() == pytest.approx(100 + 1 / 12, rel=0.02)
    ramp = still + torch.arange(64)[:, None, None] + torch.arange(64)[:, None]  # smooth in both directions
    assert talking.noise(ramp.byte()).abs().max() == 0
    grain[:, 1:] = still[:, 1:]
    assert (talking.noise(grain.round().byte()) > 0).tolist() == [[True, False, False]] * 2  # by frame


def test_identity_is_psnr_outside_the_mouth():
    true = torch.full((2, 3, 64, 64, 3), 100, dtype=torch.uint8)
    made = true.clone()
    made[1] += 10
    made[:, :, 42:62, 20:46] = 250  # the mouth may do what it likes
    dark, off = talking.identity(made, true).tolist()
    assert dark == pytest.approx(100) and off == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    made[0, 0, 41, 30] += 10  # a pixel above the mouth
    assert talking.identity(made, true)[0] < 80


def test_log_mel_finds_a_tone_and_distance_its_loudness():
    time = torch.arange(32000) / 16000
    tones = torch.stack([0.2 * torch.sin(2 * math.pi * hz * time) for hz in (300, 1000, 3000)])
    mel = talking.log_mel(tones, MEDIA)
    assert mel.shape == (3, 20, 2 * 8 * 4 + 1)
    top, bottom = (2595 * math.log10(1 + hz / 700) for hz in (8000, 80))
    for hz, band in zip((300, 1000, 3000), mel[:, :, 5:-5].mean(2).argmax(1).tolist()):
        centre = bottom + (band + 1) * (top - bottom) / 21
        assert abs(centre - 2595 * math.log10(1 + hz / 700)) <= (top - bottom) / 42 + 1
    g = torch.Generator().manual_seed(0)
    loud = 0.1 * torch.randn(2, 32000, generator=g)
    assert talking.sound_distance(loud, loud / 2, MEDIA).tolist() == pytest.approx([20 * math.log10(2)] * 2, abs=0.05)


def test_ridge_is_least_squares_with_more_rows():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=g), torch.randn(50, 2, generator=g)
    penalty = (0.3 * x.square().sum() / 6).sqrt() * torch.eye(6)
    want = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, torch.zeros(6, 2)])).solution
    torch.testing.assert_close(talking.ridge(x, y, 0.3), want, atol=1e-5, rtol=1e-4)


def speakers(n, seed):
    """Clips in which two parts of the mouth open with a low and a high tone, in a picture that also flickers. All begin
    silent and closed, and get louder."""
    g = torch.Generator().manual_seed(seed)
    opening = (0.3 + 0.7 * torch.rand(n, 2, 17, generator=g)) * torch.linspace(0, 1, 17)
    time, at = torch.arange(34000) / 16000, (torch.arange(34000) / 2000).long()
    tones = torch.stack([torch.sin(2 * math.pi * hz * time) for hz in (400, 2500)])
    sound = (0.3 * opening[..., at] * tones).sum(1) + 0.003 * torch.randn(n, 34000, generator=g)
    video = 60 + 20 * torch.rand(n, 17, 1, 1, 3, generator=g) + 2 * torch.randn(n, 17, 64, 64, 3, generator=g)
    for k, rows in enumerate((slice(44, 52), slice(52, 60))):
        video[:, :, rows, 24:42] += 100 * opening[:, k, :, None, None, None]
    return {"video": video.byte(), "audio": sound}


def test_lip_sync_knows_who_says_what():
    sync, clips, frames = talking.LipSync(speakers(60, 0), MEDIA), speakers(20, 1), torch.ones(17, dtype=torch.bool)
    own, others = sync(clips["video"], clips["audio"], frames)
    assert own > 0.8 and abs(others) < 0.1
    by_hand = [sync(clips["video"], clips["audio"].roll(k, 0), frames)[0] for k in range(1, 9)]
    assert others.item() == pytest.approx(float(sum(by_hand)) / 8, abs=1e-5)
    assert max(map(abs, by_hand)) < 0.2 and abs(by_hand[0]) < 0.15
    still = clips["video"][:, :1].expand(-1, 17, -1, -1, -1)  # as good as no mouth at all
    assert abs(sync(still, clips["audio"], frames)[0]) < 1e-3
    late, _ = sync(clips["video"].roll(2, 1), clips["audio"], frames)
    assert late < 0.5
    some, wrong = frames.clone(), clips["video"].clone()
    some[:5], wrong[:10, :5] = False, 255  # only these frames count, also for a clip's mean
    assert sync(wrong, clips["audio"], some)[0] > 0.75


def test_scores_of_real_clips_and_of_mixed_ones(monkeypatch):
    """Real clips score what the words mean; and other clips' sounds, pictures and noise show."""
    learned, clips = speakers(480, 0), speakers(20, 1)  # of which it takes every eighth
    encode = lambda clips: clips["audio"][:, :5]
    trained = SimpleNamespace(data=SimpleNamespace(training_clips=lambda: (learned, [], 0)), layout=None, media=MEDIA,
                              tokenizers=SimpleNamespace(encode=encode))  # fmt: skip
    monkeypatch.setattr(talking, "per_frame", lambda given, *_: {"video": given[:17], "audio": given[17:]})
    scores, nothing = talking.Scores(trained, lambda z, others: z.sum(1)), torch.zeros(34017, dtype=torch.bool)
    real = scores("", clips, clips, nothing)
    assert real["sync"] > 0.8 and abs(real["sync_other"]) < 0.1
    assert real["identity"] == 100 and real["sound"] == 0 and abs(real["noise"] - 1) < 0.3
    assert real["nearest"] == pytest.approx(encode(clips).sum(1).mean().item())
    grain = clips["video"].float()
    grain[:, 0] += 30 * torch.randn(grain[:, 0].shape, generator=torch.Generator().manual_seed(0))
    made, sound = {"video": grain.clamp(0, 255).byte(), "audio": clips["audio"].flip(0)}, nothing.clone()
    sound[17:] = True
    joint, a2v = scores("joint", made, clips, nothing), scores("a2v", made, clips, sound)
    assert joint["noise_first"] > 5 * real["noise_first"] and joint["noise"] < 0.5 * joint["noise_first"]
    assert abs(joint["sync"]) < 0.2 and "identity" not in joint and "sound" not in joint and "sound" not in a2v
    given = nothing.clone()
    given[:5] = True
    later = scores("continue", made, clips, given)  # the noisy frame is given
    assert "noise_first" not in later and abs(later["noise"] - real["noise"]) < 0.1 and later["sound"] > 3


def test_table_of_a_folder(call, tmp_path):
    """A row for real clips, for the tokenizers and for every task; no score where it means nothing."""
    (tmp_path / "clips").mkdir()
    for i in range(3):
        make_clip(tmp_path / "clips" / f"{i}.mp4", tone=400 + 100 * i)
    small = ("--preset", "toy", "--steps", 1, "--batch", 2)
    assert call(train, "--data", "clips", "--out", "run", *small)[0] == 0
    status, out, err = call(score, "--ckpt", "run", "--n", 4, "--steps", 2)
    assert status == 0, err
    header, *rows = [line.split() for line in out.splitlines() if line[:1].isalpha() or line[:4] == "    "][-10:]
    rows = {name: dict(zip(talking.SCORES, values)) for name, *values in rows}
    assert tuple(header) == talking.SCORES
    assert list(rows) == ["real", "still", "tokenizer", "joint", "a2v", "v2a", "inpaint", "continue", "continue-2s"]
    assert rows["real"]["identity"] == "100.000" and rows["real"]["sound"] == "0.000"
    assert rows["joint"]["identity"] == rows["a2v"]["sound"] == rows["v2a"]["noise"] == "-"
    assert rows["continue"]["noise_first"] == "-" != rows["continue"]["noise"]
    assert float(rows["tokenizer"]["identity"]) > 30  # still clips of one colour a side
    status, _, err = call(score, "--ckpt", "run", "--task", "continue", "--seconds", 5)
    assert status == 2 and "of the toy world" in err
