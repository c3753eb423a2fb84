"""Readers and scores of real clips of one talking face, for tests/score.py: closed forms, fitted on the training clips.

The picture is a crop of the face, as in the GRID corpus: what moves with speech lies in MOUTH, the rest tells who it is.
"""

import math

import torch
import torch.nn.functional as F

from sample import per_frame

SCORES = ("noise_first", "noise", "sync", "sync_other", "identity", "sound", "nearest")
MOUTH = (0.65, 0.97, 0.31, 0.72)  # top, bottom, left, right, as shares of the picture
BANDS, STEPS = 20, 4  # of log_mel: bands, steps a frame of video


def mouth_mask(size):
    """(size, size) bool."""
    top, bottom, left, right = (round(size * x) for x in MOUTH)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def noise(video):
    """uint8 (n, F, H, W, 3) -> (n, F): mean square of the highest spatial band, the diagonal one of Haar's transform."""
    x = video.float()
    diagonal = x[:, :, ::2, ::2] - x[:, :, ::2, 1::2] - x[:, :, 1::2, ::2] + x[:, :, 1::2, 1::2]
    return (diagonal / 2).square().mean((2, 3, 4))


def identity(video, true):
    """uint8 (n, F, H, W, 3) each -> (n,): PSNR in dB of what lies outside the mouth."""
    error = (video.float() - true.float())[:, :, ~mouth_mask(video.shape[2])]
    return -10 * torch.log10((error / 255).square().mean((1, 2, 3)) + 1e-10)


def log_mel(sound, media):
    """float32 (n, samples) -> (n, BANDS, STEPS k + 1): natural logarithm of mel energies, 80 Hz up, STEPS a frame."""
    size, hop = 2 ** round(math.log2(0.032 * media.sample_rate)), media.sample_rate // (STEPS * media.fps)
    spectrum = torch.stft(sound, size, hop, window=torch.hann_window(size), return_complex=True).abs().square()

    def mel(hz):
        return 2595 * torch.log10(1 + torch.as_tensor(hz) / 700)

    lines = mel(torch.linspace(0, media.sample_rate / 2, size // 2 + 1))
    edges = torch.linspace(mel(80), lines[-1], BANDS + 2)
    rise = (lines - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - lines) / (edges[2:] - edges[1:-1])[:, None]
    return (torch.minimum(rise, fall).clamp(min=0) @ spectrum + 1e-5).log()


def sound_distance(sound, true, media):
    """(n,): root mean square difference of log_mel, in dB. Sound is compared with sound, whatever its phase."""
    error = log_mel(sound, media) - log_mel(true, media)
    return 10 / math.log(10) * error.square().mean((1, 2)).sqrt()


def ridge(x, y, strength):
    """W (D, K) with x W close to y, rows of (n, D) and (n, K): least squares plus strength |x|^2 / D |W|^2."""
    gram = x.T @ x
    return torch.linalg.solve(gram + strength * gram.trace() / len(gram) * torch.eye(len(gram)), x.T @ y)


class LipSync:
    """How well a mouth moves with a sound: the correlation of what is seen with what the sound lets one expect.

    A ridge regression from log_mel within 0.25 s of a frame to 16 principal components of the mouth, over real training
    clips; then the two directions in which it expects most movement. Movement is what differs from the clip's own mean
    and from what all clips do at that time, so that neither the pose nor the common beginning counts.
    """

    def __init__(self, clips, media):
        self.media = media
        heard, seen = self.heard(clips["audio"]), self.seen(clips["video"])
        self.scale = heard.std((0, 1)).clamp(min=1e-6)
        x, y = ((part - part.mean(0)).flatten(0, 1) for part in (heard / self.scale, seen))
        basis = torch.svd_lowrank(y, 32, niter=4)[2][:, :16]
        weight = ridge(x, y @ basis, 0.03)
        best = torch.linalg.svd(x @ weight, full_matrices=False)[2][:2].T
        self.into, self.weight = basis @ best, weight @ best

    def heard(self, sound):
        """-> (n, F, features), the clip's mean removed."""
        mel, reach = log_mel(sound, self.media), round(0.25 * self.media.fps * STEPS)
        around = F.pad(mel, (reach, reach), mode="replicate").unfold(2, 2 * reach + 1, STEPS)[..., ::2]
        x = around.movedim(1, 2).flatten(2)[:, : sound.shape[1] * self.media.fps // self.media.sample_rate]
        return x - x.mean(1, keepdim=True)

    def seen(self, video):
        """-> (n, F, pixels), the clip's mean removed."""
        x = video[:, :, mouth_mask(video.shape[2])].float().mean(-1)
        return x - x.mean(1, keepdim=True)

    def __call__(self, video, sound, frames):
        """Correlation over all clips and the given frames, bool (F,), mean of the two directions; and that with the
        sounds of other clips, mean of eight."""
        expected, moved = self.heard(sound) / self.scale @ self.weight, self.seen(video) @ self.into
        expected, moved = (x - x.mean(0) for x in (expected, moved))
        expected, moved = (x[:, frames] - x[:, frames].mean(1, keepdim=True) for x in (expected, moved))
        expected, moved = (x / x.square().sum((0, 1)).sqrt().clamp(min=1) for x in (expected, moved))  # grey levels
        own, *others = ((expected.roll(k, 0) * moved).sum((0, 1)).mean() for k in range(9))
        return own, sum(others) / len(others)


class Scores:
    """What score.py prints of a model of real clips."""

    def __init__(self, trained, nearest):
        learned, _, _ = trained.data.training_clips()
        self.trained, self.nearest, self.media = trained, nearest, trained.media
        self.z = trained.tokenizers.encode(learned)
        apart = {name: torch.stack([*x[::8]]) for name, x in learned.items()}  # its windows overlap by all but a frame
        self.sync, self.real = LipSync(apart, self.media), noise(apart["video"]).mean(0)  # (F,)

    def __call__(self, task, clips, true, given):
        """As score.score: over generated frames and the sound at them.

        noise       energy in the highest spatial band, as a multiple of real clips'; noise_first: of the first frame
        sync        correlation of the mouth with the sound; sync_other: with other clips' sounds
        identity    PSNR outside the mouth, where a part of the picture was given
        sound       distance from the true clip's sound in dB
        """
        seen_given, heard_given = per_frame(given, self.trained.layout, self.trained.media).values()
        makes_video, makes_audio = not seen_given.all(), not heard_given.all()
        frames = ~seen_given if makes_video else torch.ones_like(seen_given)
        s = dict(zip(("sync", "sync_other"), self.sync(clips["video"], clips["audio"], frames)))
        if makes_video:
            ratio = noise(clips["video"]).mean(0) / self.real
            s["noise"] = ratio[frames].mean()
            if frames[0]:
                s["noise_first"] = ratio[0]
            if task not in ("joint", "a2v"):
                s["identity"] = identity(clips["video"][:, frames], true["video"][:, frames]).mean()
        if makes_audio and task != "joint":
            s["sound"] = sound_distance(clips["audio"], true["audio"], self.media).mean()
        s["nearest"] = self.nearest(self.trained.tokenizers.encode(clips), self.z).mean()
        return s
