"""The README's Python: its training loop, and its recipe for SoundStream's latents where its files are."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from talking import identity, sound_distance

import data
import sample
import train

SHARED = Path(__file__).parents[2] / "shared"
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LOOP, RECIPE = re.findall("```python\n(.*?)```", README, re.DOTALL)


def test_readmes_training_loop_learns_and_samples():
    """On latents that are all one clip the loss falls to a small part of what it was."""
    g = torch.Generator().manual_seed(0)
    clip = {"video": torch.randn(1, 5, 2, 2, 128, generator=g), "audio": torch.randn(1, 17, 64, generator=g)}
    losses, names = [], {"batches": [{name: x.expand(16, *x.shape[1:]) for name, x in clip.items()}] * 40}
    torch.manual_seed(0)
    loop = LOOP.replace("    optimizer.step()", "    optimizer.step()\n    losses.append(loss.item())")
    exec(loop, names | {"losses": losses})  # noqa: S102
    assert len(losses) == 40 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_readmes_recipe(call, tmp_path):
    """SoundStream's latents in and out, through a file, a model and samples of it."""
    pytest.importorskip("ai_edge_litert")
    if not SHARED.is_dir():
        pytest.skip("SoundStream's files and the clips are not here")
    (tmp_path / "soundstream").symlink_to(SHARED / "soundstream")
    (tmp_path / "clips").mkdir()
    for path in sorted((SHARED / "grid").iterdir())[:12]:
        (tmp_path / "clips" / path.name).symlink_to(path)
    names = {}
    exec(RECIPE, names)  # noqa: S102
    names["encode"]("clips")
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

    video, sound = names["decode"]("samples/a2v/samples.npz")  # held-out clips 0 and 10 with their own sound
    assert video.shape == (2, 17, 64, 64, 3) and video.dtype == np.uint8 and sound.shape == (2, 33920)
    layout, paths = names["layout"], sorted((tmp_path / "clips").iterdir())
    clips = data.chained([data.clip_windows(paths[i], layout, data.FOLDER) for i in (0, 10)])
    clips = {name: torch.stack(x) for name, x in clips.items()}
    assert (sound_distance(torch.from_numpy(sound), clips["audio"], data.FOLDER) < 4).all()  # dB
    mixed = sound_distance(torch.from_numpy(sound), clips["audio"].flip(0), data.FOLDER)
    assert (mixed > 8).all()
    np.savez("true.npz", **{m: latents[m][[0, 10]] for m in ("video", "audio")})
    assert (identity(torch.from_numpy(names["decode"]("true.npz")[0]), clips["video"]) > 28).all()
