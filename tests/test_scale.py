"""train.py on several processes and in parts of a batch: the same batches, losses and weights."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_data import latents_file
from test_method import TOY

from avdit import AVDiT, NoiseSchedule, loss_weights, sample_timesteps, training_loss
from train import Log, learning_rate

ROOT = Path(__file__).parents[1]
LR = 5e-4

# train.py with a line in log.csv for every step, and the norm of every step's gradient in a file of its own
PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, data, train
fit = data.Standardize.fit  # another machine may fit the tokenizers otherwise, and must take the first one's
data.Standardize.fit = lambda self, z: fit(self, z * (1 + int(os.environ.get("RANK", "0"))))
clip, norms = torch.nn.utils.clip_grad_norm_, []
torch.nn.utils.clip_grad_norm_ = lambda *args: norms.append(clip(*args).item())
train.Log.EVERY = 1
status = train.main()
print(*norms, file=open("norms" + os.environ.get("RANK", ""), "w"))
sys.exit(status)
"""


def run(folder, *flags, processes=1):
    """-> losses of all steps by modality and noise level, norms of the gradients, the checkpoint."""
    folder.mkdir()
    latents_file(folder / "z.npz")
    (folder / "program.py").write_text(PROGRAM)
    many = ("-m", "torch.distributed.run", "--nproc_per_node", processes) if processes > 1 else ()
    flags = ("--data", "z.npz", "--out", "o", "--steps", 20, "--batch", 8, "--dtype", "fp32", *flags)
    command = [sys.executable, *map(str, (*many, "program.py", *flags))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: o/ckpt.pt") == 1  # one process speaks for all
    rows = list(csv.reader((folder / "o/log.csv").open()))[1:]
    norms = [float(x) for x in (folder / ("norms0" if processes > 1 else "norms")).read_text().split()]
    return rows, norms, torch.load(folder / "o/ckpt.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone") / "run", *FLAGS)


# A preset whose network has a peak, which processes must know; a given part: not every example weighs the same.
FLAGS = ("--preset", "clips", "--lr", LR, "--optimizer", "adamw", "--mixture", "monl+task:a2v")


@pytest.mark.parametrize(("flags", "processes"), [(("--accumulate", 4), 1), (("--accumulate", 2), 2)])
def test_parts_of_a_batch_add_up_to_the_batch(alone, tmp_path, flags, processes):
    """Twenty steps in one piece and in parts: losses, gradients, weights.

    Sums in another order change a gradient by about r = 1e-6 of its usual size. AdamW turns that into r lr of its step,
    but for gradients below r of the usual size, a share of about r, into any step of up to 2 lr. So on average weights
    may differ by 3 r times the sum of learning rates, each by twice that sum. Half a batch differs by a thousand times.
    """
    rows, norms, state = run(tmp_path / "run", *FLAGS, *flags, processes=processes)
    assert len(rows) == len(alone[0]) == 20
    assert [[x == "" for x in row] for row in rows] == [[x == "" for x in row] for row in alone[0]]
    assert norms == pytest.approx(alone[1], rel=1e-5)
    distance = torch.cat([(state["model"][k] - x).abs().flatten() for k, x in alone[2]["model"].items()])
    how = SimpleNamespace(preset="clips", lr=LR, steps=20)
    rates = sum(learning_rate(how, step) for step in range(20))
    losses = max(abs(float(x) - float(y)) for a, b in zip(rows, alone[0]) for x, y in zip(a, b) if x)
    print(
        f"\n{processes} processes {flags}: losses differ by {losses:.0e}, weights by {distance.mean():.0e} on average"
    )
    assert losses < 1e-5 and distance.mean() < 3e-6 * rates and distance.max() < 2 * rates
    assert state["config"] == {**alone[2]["config"], "accumulate": state["config"]["accumulate"]}


def test_a_resumed_log_counts_once(tmp_path):
    """What was gathered from all processes goes back to the first alone; on a pod, where all hold everything, to all."""
    for part, share in ((0, 1), (1, 0)):
        log = Log(tmp_path / "log.csv", TOY, SimpleNamespace(part=part, device="cpu"))
        log.load_state_dict({"sums": torch.ones(2, TOY.S, 10), "rows": []})
        assert (log.sums == share).all()


def test_losses_of_parts_add_up():
    """The normalizer is the whole batch's: given parts and weights make parts of equal size weigh unequally."""
    g = torch.Generator().manual_seed(0)
    model, schedule = AVDiT(TOY, 32, 1, 2), NoiseSchedule()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=g)
    z0, eps = (torch.randn(6, TOY.E, generator=g) for _ in "ab")
    t = sample_timesteps("ptm+task:continue", TOY, 6, 1000, g)
    for power in (0, 1):
        weight = loss_weights(schedule, TOY, t, power)
        parts = [
            (z0[rows], t[rows], eps[rows], weight[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6))
        ]
        *losses, whole = (training_loss(model, schedule, TOY, *part)[0].item() for part in parts)
        assert sum(losses) == pytest.approx(whole, rel=1e-5)
