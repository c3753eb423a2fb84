"""--device xla on XLA's CPU backend: the CPU's losses, on one device or four; no new compilations; samples.

It runs where torch_xla is installed, which wants torch 2.9: an environment of its own.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
MIXTURES = ("monl", "vanilla", "pm", "pt", "ptm", "task:a2v", "task:inpaint+pt+pt")


def main(out, device):
    """Twenty toy steps and six with every other mixture, then in micro-batches, then samples. Notes how often it
    compiled."""
    sys.path.insert(0, str(ROOT))
    import sample
    import train

    counts, flush, draw = {}, train.flush, train.draw

    def count(device):  # the compilations after every step
        flush(device)
        if device.type == "xla":
            from torch_xla.debug import metrics

            counts[run].append(metrics.metric_data("CompileTime")[0])

    def changing(args, step, *more):
        return draw(SimpleNamespace(**{**vars(args), "mixture": MIXTURES[max(0, (step - 14) // 6)]}), step, *more)

    train.flush = sample.flush = count
    train.Log.EVERY = 1
    common = ["--device", device, "--dtype", "fp32"]
    for run, steps, more in (("mixtures", 14 + 6 * len(MIXTURES), []), ("accumulate", 8, ["--accumulate", "2"])):
        counts[run] = []
        train.draw = changing if run == "mixtures" else draw
        sys.argv = ["train.py", *common, "--optimizer", "adamw", "--steps", str(steps), "--out", f"{out}/{run}", *more]
        train.main()
    for run, guidance in (("joint", "0"), ("a2v", "1")):
        counts[run] = []
        ckpt = ["--ckpt", f"{out}/mixtures", "--out", f"{out}/samples"]
        sys.argv = ["sample.py", *common, *ckpt, "--task", run, "--n", "2", "--guidance", guidance]
        sample.main()
    Path(out, "compilations.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.exit()

pytest.importorskip("torch_xla")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the CPU's run, of XLA's on one device, on four."""
    folders = []
    for device, devices in (("cpu", "1"), ("xla", "1"), ("xla", "4")):
        folder = tmp_path_factory.mktemp(device + devices)
        environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": devices, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(folder), device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        folders.append(folder)
    return folders


PARTS = ("model", "ema", "tokenizers")


def losses(folder, run):
    rows = list(csv.reader((folder / run / "log.csv").open()))[1:]
    return np.array([[float(x) if x else np.nan for x in row] for row in rows])


@pytest.mark.parametrize("run", ["mixtures", "accumulate"])
def test_losses_and_weights_are_the_cpus(runs, run):
    cpu, one, four = runs
    for other in (one, four):
        worst = np.nanmax(np.abs(losses(other, run) - losses(cpu, run)))
        a, b = (torch.load(folder / run / "ckpt.pt", weights_only=True) for folder in (cpu, other))
        apart = {k: torch.cat([(b[k][n] - x).abs().flatten().double() for n, x in a[k].items()]).mean() for k in PARTS}
        print(f"\n{run}: losses differ by {worst:.0e}, weights by {apart['model']:.0e} on average")
        assert worst < 1e-4 and max(apart.values()) < 1e-6  # rounding as AdamW passes it on: see test_scale.py
    np.testing.assert_allclose(losses(four, run), losses(one, run), atol=1e-5)


def test_nothing_compiles_after_the_first_steps(runs):
    """Whatever the mixture, once both kinds of step are known, with self-conditioning and without."""
    from avdit import PRESETS, Layout
    from train import draw

    args, layout = SimpleNamespace(seed=0, batch=64, mixture="monl"), Layout(PRESETS["toy"].modalities)
    coins = [draw(args, step, 4096, layout, 1000)[2] for step in range(20)]
    assert coins[0] and not all(coins[:18])  # while the mixture was still the first one
    for folder in runs[1:]:
        counts = json.loads((folder / "compilations.json").read_text())
        assert len(counts["mixtures"]) == 2 * (14 + 6 * len(MIXTURES))  # two calls a step
        # In the last step 1 - learning rate x weight decay rounds to 1, which XLA takes as a constant.
        assert counts["mixtures"][2 * 18] == counts["mixtures"][-2] >= counts["mixtures"][-1] - 1
        for run in ("accumulate", "joint", "a2v"):
            assert counts[run][len(counts[run]) // 2] == counts[run][-1]


def test_samples_are_the_cpus(runs):
    for task in ("joint", "a2v"):
        for other in runs[1:]:
            a, b = (np.load(folder / "samples" / task / "samples.npz") for folder in (runs[0], other))
            assert np.abs(a["video"].astype(int) - b["video"]).mean() < 0.1 and a["video"].shape[0] == 2
            assert np.array_equal(a["given_audio"], b["given_audio"])
