"""train.py on several processes and in micro-batches: the same batches, losses and weights."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_data import latents_file

from avdit import PRESETS, AVDiT, Layout, NoiseSchedule, sample_timesteps, training_loss
from train import learning_rate

ROOT = Path(__file__).parents[1]
LR = 5e-4
# With a given part, not every example has the same number of elements in its loss.
FLAGS = ("--preset", "toy", "--lr", LR, "--optimizer", "adamw", "--mixture", "monl+task:a2v", "--warmup", 100)

# train.py with a line in log.csv for every step, and the norm of every step's gradient in a file of its own. Before the
# step STOP it ends as if by Ctrl-C.
PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, data, train
rank, fit, draw, clip = int(os.environ.get("RANK", 0)), data.Standardize.fit, train.draw, torch.nn.utils.clip_grad_norm_
norms = open(f"norms{{rank}}", "a", buffering=1)

def drawing(args, step, *more):
    if step == int(os.environ["STOP"]):
        raise KeyboardInterrupt
    return draw(args, step, *more)

def clipping(parameters, most):
    norm = clip(parameters, most)
    print(norm.item(), file=norms)

data.Standardize.fit = lambda self, z: fit(self, z * (1 + rank))  # another process must take the first one's fit
torch.nn.utils.clip_grad_norm_, train.draw, train.Log.EVERY = clipping, drawing, 1
train.main()
"""


def run(folder, *flags, processes=1, stop=20):
    """-> the lines of log.csv, norms of the gradients, the checkpoint."""
    folder.mkdir(exist_ok=True)
    latents_file(folder / "z.npz")
    (folder / "program.py").write_text(PROGRAM)
    many = ("-m", "torch.distributed.run", "--nproc_per_node", processes) if processes > 1 else ()
    flags = ("--data", "z.npz", "--out", "o", "--steps", 20, "--batch", 8, "--dtype", "fp32", *FLAGS, *flags)
    command = [sys.executable, *map(str, (*many, "program.py", *flags, "--save-every", 10))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "STOP": str(stop)}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode == 0) == (stop == 20) and "FutureWarning" not in done.stderr, done.stderr
    assert done.stdout.count("reading z.npz") == 1 and done.stdout.count("done: o/ckpt.pt") == (stop == 20)
    assert sorted(path.name for path in (folder / "o").iterdir()) == ["ckpt.pt", "log.csv"]
    rows = list(csv.reader((folder / "o/log.csv").open()))[1:]
    norms = [[float(x) for x in (folder / f"norms{rank}").read_text().split()] for rank in range(processes)]
    assert all(x == norms[0] for x in norms)  # every process has the gradient of the whole batch
    return rows, norms[0], torch.load(folder / "o/ckpt.pt", weights_only=True)


def test_parts_of_a_batch_average_to_the_batch(tmp_path):
    """Twenty steps in whole batches. The same in micro-batches: ten by two processes, then ten by one that goes on.

    Sums in another order change a gradient by about r = 1e-6 of its usual size. AdamW turns that into r lr of its step,
    but for gradients below r of the usual size, a share of about r, into any step of up to 2 lr. So on average weights
    may differ by 3 r times the sum of learning rates, each by twice that sum. Half a batch differs by a thousand times.
    """
    rows, norms, alone = run(tmp_path / "alone")
    two_rows, two_norms, two = run(tmp_path / "parts", "--accumulate", 2, processes=2, stop=10)
    assert two["step"] == len(two_rows) == len(two_norms) == 10
    other_rows, other_norms, other = run(tmp_path / "parts", "--accumulate", 4)
    assert len(rows) == len(other_rows) == 20 and other_rows[:10] == two_rows
    assert [[x == "" for x in row] for row in rows] == [[x == "" for x in row] for row in other_rows]
    assert len(norms) == 20 and norms == pytest.approx(other_norms, rel=1e-5)
    distance = torch.cat([(other["model"][k] - x).abs().flatten() for k, x in alone["model"].items()])
    rates = sum(learning_rate(SimpleNamespace(warmup=100, lr=LR, steps=20), step) for step in range(20))
    losses = max(abs(float(x) - float(y)) for a, b in zip(rows, other_rows) for x, y in zip(a, b) if x)
    print(f"\nlosses differ by {losses:.0e}, weights by {distance.mean():.0e} on average")
    assert losses < 1e-5 and distance.mean() < 3e-6 * rates and distance.max() < 2 * rates
    for state, accumulate in ((two, 2), (other, 4)):
        assert state["config"] == {**alone["config"], "accumulate": accumulate}


@pytest.mark.parametrize("prediction", ["eps", "z0"])
def test_losses_of_equal_parts_average_to_that_of_the_batch(prediction):
    """Although given segments and loss weights make examples weigh unequally inside."""
    g, layout, schedule = torch.Generator().manual_seed(0), Layout(PRESETS["toy"].modalities), NoiseSchedule()
    model = AVDiT(layout, 32, 1, 2, prediction)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=g)
    z0, eps = (torch.randn(6, layout.E, generator=g) for _ in "ab")
    z0[0], eps[0] = 3 * z0[0], 3 * eps[0]
    t = sample_timesteps("ptm+task:continue", layout, 6, 1000, g)
    whole = training_loss(model, schedule, layout, z0, t, eps)[0].item()
    for size in (1, 2, 3):
        parts = zip(*(x.split(size) for x in (z0, t, eps)))
        losses = [training_loss(model, schedule, layout, *part)[0].item() for part in parts]
        assert sum(losses) / len(losses) == pytest.approx(whole, rel=1e-5) and max(losses) > 1.1 * min(losses)
