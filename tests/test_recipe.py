"""Latents of SoundStream for `--data latents.npz`, from a folder of clips and back; and the README's training loop.

encode() and decode() are a recipe to copy and change. They need SoundStream's published weights [Sec. 4], which are
Lyra V2's: its two .tflite files in soundstream/; and `pip install ai-edge-litert pytest`. The picture goes through the
tokenizer of data.py. In the project's folder:

    PYTHONPATH=.:tests python -c "import test_recipe; test_recipe.encode('CLIPS')"
    python train.py --data latents.npz --out runs/mine
    python sample.py --ckpt runs/mine
    PYTHONPATH=.:tests python -c "import test_recipe; video, sound = test_recipe.decode('samples/a2v/samples.npz')"
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import avdit
import sample
import train
from avdit import Layout, av_modalities
from data import Folder, PatchTokenizer, clip_windows, in_chunks, joined

MEDIA = Folder.media  # 64 x 64 pixels at 8 frames per second, sound at 16 kHz
LAYOUT = Layout(av_modalities(MEDIA.fps, (2, 2), 192, 0.02, 64))  # 50 segments of sound per second, as SoundStream has


def soundstream(model, clips):
    """One .tflite file, segment by segment: float32 (n, segments, 320 or 64) -> (n, segments, 64 or 320)."""
    from ai_edge_litert.interpreter import Interpreter

    parts = []
    for clip in clips:
        network = Interpreter(f"soundstream/{model}.tflite")  # it remembers past segments, so each clip has its own
        network.allocate_tensors()
        source, target = network.get_input_details()[0], network.get_output_details()[0]
        for segment in clip:
            network.set_tensor(source["index"], segment.reshape(source["shape"]))
            network.invoke()
            parts.append(network.get_tensor(target["index"]).ravel())
    return np.stack(parts).reshape(len(clips), -1, parts[0].size)


def encode(folder):
    """Write latents.npz, for `--data`, and picture.pt, the tokenizer of the picture, for decode()."""
    clips = joined([clip_windows(path, LAYOUT, MEDIA) for path in sorted(Path(folder).iterdir())])
    tokenizer = PatchTokenizer(LAYOUT.modalities[0], MEDIA.size, residual=True)
    tokenizer.fit(clips["video"])
    torch.save(tokenizer.state_dict(), "picture.pt")
    video = in_chunks(tokenizer.encode, clips["video"]).numpy()
    audio = soundstream("soundstream_encoder", torch.stack(clips["audio"]).unflatten(1, (-1, 320)).numpy())
    np.savez("latents.npz", video=video, audio=audio, **{f"{m.name}_edges": m.edges for m in LAYOUT.modalities})


def decode(path):
    """samples.npz -> uint8 (n, 17, 64, 64, 3) and float32 (n, 33920), 2.12 s at 16 kHz."""
    tokenizer = PatchTokenizer(LAYOUT.modalities[0], MEDIA.size, residual=True)
    tokenizer.load_state_dict(torch.load("picture.pt", weights_only=True))
    made = np.load(path)
    video = tokenizer.decode(torch.from_numpy(made["video"])).numpy()
    return video, soundstream("lyragan", made["audio"]).reshape(len(video), -1)


# --- The tests --------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def test_soundstreams_latents(call, tmp_path):
    """SoundStream's latents go through a file, a model and samples of it, and become picture and sound again."""
    pytest.importorskip("ai_edge_litert")
    if not SHARED.is_dir():
        pytest.skip("SoundStream's files and the clips are not here")
    from talking import identity, sound_distance

    (tmp_path / "soundstream").symlink_to(SHARED / "soundstream")
    (tmp_path / "clips").mkdir()
    paths = sorted((SHARED / "grid").iterdir())[:12]
    for path in paths:
        (tmp_path / "clips" / path.name).symlink_to(path)
    encode("clips")
    latents = np.load("latents.npz")
    assert latents["video"].shape == (12, 5, 2, 2, 192) and latents["audio"].shape == (12, 106, 64)
    assert latents["video_edges"].tolist() == [0, 1 / 8, 5 / 8, 9 / 8, 13 / 8, 17 / 8]
    assert latents["audio_edges"] == pytest.approx(np.arange(107) / 50)

    assert call(train, "--data", "latents.npz", "--out", "run", "--preset", "toy", "--steps", 2, "--batch", 2)[0] == 0
    kept = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["tokenizers"]
    chosen = np.arange(12) % 10 > 0
    for m in ("video", "audio"):
        flat = latents[m][chosen].reshape(-1, latents[m].shape[-1])
        assert kept[f"{m}.mean"].numpy() == pytest.approx(flat.mean(0), abs=1e-4)
        assert kept[f"{m}.std"].numpy() == pytest.approx(flat.std(0, ddof=1), rel=1e-3, abs=1e-5)
    assert call(sample, "--ckpt", "run", "--n", 2, "--steps", 2)[0] == 0
    made = np.load("samples/continue/samples.npz")
    np.testing.assert_allclose(made["video"][:, :2], made["video_true"][:, :2], atol=1e-3)  # the file's own scale

    video, sound = decode("samples/a2v/samples.npz")  # held-out clips 0 and 10 with their own sound
    assert video.shape == (2, 17, 64, 64, 3) and video.dtype == np.uint8 and sound.shape == (2, 33920)
    clips = joined([clip_windows(paths[i], LAYOUT, MEDIA) for i in (0, 10)])
    clips = {name: torch.stack(x) for name, x in clips.items()}
    assert (sound_distance(torch.from_numpy(sound), clips["audio"], MEDIA) < 4).all()  # dB
    assert (sound_distance(torch.from_numpy(sound), clips["audio"].flip(0), MEDIA) > 8).all()
    np.savez("true.npz", **{m: latents[m][[0, 10]] for m in ("video", "audio")})
    assert (identity(torch.from_numpy(decode("true.npz")[0]), clips["video"]) > 28).all()


def test_readmes_training_loop_learns(monkeypatch):
    """On latents that are all one clip the loss falls to a small part of what it was."""
    blocks = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (loop,) = (block for block in blocks if "training_loss" in block)
    g, losses, training_loss = torch.Generator().manual_seed(0), [], avdit.training_loss
    clip = {"video": torch.randn(1, 5, 2, 2, 128, generator=g), "audio": torch.randn(1, 17, 64, generator=g)}

    def spy(*arguments, **named):
        loss, error = training_loss(*arguments, **named)
        losses.append(loss.item())
        return loss, error

    monkeypatch.setattr(avdit, "training_loss", spy)
    torch.manual_seed(0)
    exec(loop, {"batches": [{name: x.expand(4, *x.shape[1:]) for name, x in clip.items()}] * 24})  # noqa: S102
    assert len(losses) == 24 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
