"""The README's recipe for latents of real tokenizers, on small random ones, where diffusers and transformers are."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import make_clip

import sample
import train

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LOOP, RECIPE = re.findall("```python\n(.*?)```", README, re.DOTALL)


def test_readmes_training_loop_learns_and_samples():
    """On latents that are all one clip the loss falls to a small part of what it was."""
    g = torch.Generator().manual_seed(0)
    clip = {"video": torch.randn(1, 5, 2, 2, 64, generator=g), "audio": torch.randn(1, 17, 64, generator=g)}
    losses, names = [], {"batches": [{name: x.expand(16, *x.shape[1:]) for name, x in clip.items()}] * 40}
    torch.manual_seed(0)
    loop = LOOP.replace("    optimizer.step()", "    optimizer.step()\n    losses.append(loss.item())")
    exec(loop, names | {"losses": losses})  # noqa: S102
    assert len(losses) == 40 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_readmes_recipe(call, tmp_path, monkeypatch):
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    vae = diffusers.AutoencoderKLWan(**shape, temperal_downsample=[False, True, True])
    codec = transformers.EncodecModel(transformers.EncodecConfig(num_filters=4))
    monkeypatch.setattr(diffusers.AutoencoderKLWan, "from_pretrained", lambda name, subfolder: vae)
    monkeypatch.setattr(transformers.EncodecModel, "from_pretrained", lambda name: codec)
    (tmp_path / "clips").mkdir()
    for i in range(3):
        make_clip(tmp_path / "clips" / f"{i}.mp4", tone=400 + 100 * i)
    names = {}
    exec(RECIPE, names)  # noqa: S102
    latents = np.load(tmp_path / "latents.npz")
    assert latents["video"].shape == (6, 5, 8, 8, 16) and latents["audio"].shape == (6, 159, 128)
    assert latents["video_edges"].tolist() == [0, 1 / 8, 5 / 8, 9 / 8, 13 / 8, 17 / 8]
    assert latents["audio_edges"] == pytest.approx(np.arange(160) / 75)
    other = names["encode"]({"video": torch.zeros(1, 16, 64, 64, 3), "audio": torch.zeros(1, 48000)})[0]
    assert other.shape[1] == 4  # 16 frames pass the tokenizer without a word, as 13 ...
    with pytest.raises(ValueError, match="16 frames are not 1 \\+ 4 k: use 13 or 17"):
        names["av_modalities"](8, (8, 8), 16, 1 / 75, 128, frames=16)  # ... but not here

    assert call(train, "--data", "latents.npz", "--out", "run", "--steps", 2, "--batch", 2)[0] == 0
    kept = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["tokenizers"]
    chosen = np.arange(6) % 10 > 0
    for m in ("video", "audio"):
        flat = latents[m][chosen].reshape(-1, latents[m].shape[-1])
        assert kept[f"{m}.mean"].numpy() == pytest.approx(flat.mean(0), abs=1e-4)
        assert kept[f"{m}.std"].numpy() == pytest.approx(flat.std(0, ddof=1), rel=1e-3, abs=1e-5)
    assert call(sample, "--ckpt", "run", "--n", 2, "--steps", 2)[0] == 0
    made = np.load(tmp_path / "samples/continue/samples.npz")
    np.testing.assert_allclose(made["video"][:, :2], made["video_true"][:, :2], atol=1e-3)  # the file's own scale
    video, sound = names["decode"](np.load(tmp_path / "samples/joint/samples.npz"))
    assert video.shape == (2, 17, 64, 64, 3) and video.dtype == np.uint8 and sound.shape == (2, 159 * 320)
    print("\n", {k: (v.shape, v.dtype) for k, v in made.items()})
