"""Nothing is lost: a run that is killed, stopped, out of disk or broken; checkpoints and flags that are wrong."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from test_data import latents_file
from test_scripts import equal

import data
import sample
import train
from avdit import PRESETS

ROOT = Path(__file__).parents[1]

PROGRAM = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import train
train.Log.EVERY, draw = 4, train.draw
train.draw = lambda config, *more: (print("step", more[-1], flush=True), draw(config, *more))[1]
sys.exit(train.main())
"""
FLAGS = ("--data", "z.npz", "--out", "o", "--batch", 2, "--dtype", "fp32", "--resume")


def start(folder, *flags, program=PROGRAM):
    """train.py in a process of its own that says which step it begins."""
    folder.mkdir(exist_ok=True)
    latents_file(folder / "z.npz")
    (folder / "program.py").write_text(program)
    command = [sys.executable, "program.py", *map(str, (*FLAGS, *flags))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def steps(out):
    return [int(line.split()[1]) for line in out.splitlines() if line.startswith("step") and "/" not in line]


def result(folder):
    """Everything a run leaves."""
    return torch.load(folder / "o/ckpt.pt", weights_only=True), (folder / "o/log.csv").read_bytes()


def finished(folder, *flags):
    out, err = start(folder, *flags).communicate()
    assert "done: o/ckpt.pt" in out, err
    return result(folder)


def test_killed_at_twenty_moments(tmp_path):
    """kill -9, ten times at a random moment and ten times while a checkpoint is written, then to the end."""
    flags, every, rng = ("--steps", 150, "--save-every", 3), 3, random.Random(0)
    whole = finished(tmp_path / "whole", *flags)
    folder, reached = tmp_path / "killed", None
    ckpt, partial = folder / "o/ckpt.pt", folder / "o/ckpt.pt.partial"
    for k in range(20):
        process = start(folder, *flags)
        line = ""
        while not (line.startswith("step") and ckpt.exists()):  # it trains, and there is something to resume from
            line = process.stdout.readline()
            assert process.poll() is None
        time.sleep(rng.uniform(0, 0.1))
        while k % 2 and not partial.exists():
            assert process.poll() is None
        process.kill()
        seen = steps(line + process.communicate()[0])
        assert process.returncode == -signal.SIGKILL
        if reached is not None:
            first = int(line.split()[1])
            assert 0 < first and reached - first <= every
        reached = seen[-1]
    assert equal(finished(folder, *flags), whole)


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """What forty steps leave that nothing disturbed."""
    return finished(tmp_path_factory.mktemp("forty"), *FORTY)


FORTY = ("--steps", 40, "--save-every", 1000)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_resume(forty, tmp_path, number):
    process = start(tmp_path / "stopped", *FORTY)
    while process.stdout.readline() != "step 7\n":
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130 and "saved: the same command with --resume" in one_line(err)
    state, _ = result(tmp_path / "stopped")
    assert state["step"] == (steps(out) or [7])[-1] + 1 < 40
    assert equal(finished(tmp_path / "stopped", *FORTY), forty)


def test_same_seed_same_bits(forty, tmp_path):
    assert equal(finished(tmp_path, *FORTY), forty)


def test_a_resumed_run_keeps_its_tokenizers(call, latents, tmp_path, monkeypatch):
    """Elsewhere a fit may differ, and the weights have learned the first one's latents."""
    assert call(train, *latents, "--steps", 8)[0] == 0
    whole = train.load(tmp_path / "runs/z/ckpt.pt")
    save = train.save

    def stop(path, state):
        save(path, state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", stop)
    assert call(train, *latents, "--steps", 8)[0] == 130
    monkeypatch.setattr(train, "save", save)
    monkeypatch.setattr(data.Standardize, "fit", None)
    status, _, err = call(train, *latents, "--steps", 8, "--resume", "--accumulate", 1, "--save-every", 1)
    assert status == 0, err
    resumed = train.load(tmp_path / "runs/z/ckpt.pt")
    assert all(equal(resumed[part], whole[part]) for part in ("model", "ema", "adamw", "muon", "tokenizers"))


def test_a_torn_line_of_the_log_is_dropped(tmp_path):
    """A line of step 1950 of which only 195 or less reached the disk is none of step 195."""
    log = train.Log(tmp_path / "log.csv", PRESETS["toy"].modalities, train.Machine("cpu"))
    row = lambda step: ",".join([str(step), *["0.5"] * (len(log.header) - 1)])
    for torn in ("1", "195", "1950,0.5,0.", "", row(1950)[:-2], row(1950)):
        (tmp_path / "log.csv").write_text("\n".join([",".join(log.header), row(50), row(100), torn]))
        log.open(1900)
        assert (tmp_path / "log.csv").read_text().split() == [",".join(log.header), row(50), row(100)]
    (tmp_path / "log.csv").unlink()
    log.open(1900)  # someone took it away: the run goes on
    assert (tmp_path / "log.csv").read_text().split() == [",".join(log.header)]


def test_stopped_before_a_step_says_that_nothing_is_saved(call, latents, monkeypatch):
    """Not even where an earlier run left a checkpoint."""
    assert call(train, *latents)[0] == 0

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", stop)
    status, _, err = call(train, *latents)
    assert status == 130 and "nothing new was saved" in one_line(err)


# --- Disks and numbers that fail ------------------------------------------------------


def one_line(err):
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


def test_a_full_disk_leaves_the_last_checkpoint(call, latents, tmp_path, monkeypatch):
    save = train.save

    def then_full(path, state):
        save(path, state)
        Path(f"{path}.partial").symlink_to("/dev/full")

    monkeypatch.setattr(train, "save", then_full)
    status, _, err = call(train, *latents)
    assert status == 2 and "No space left" in one_line(err)
    assert sorted(x.name for x in (tmp_path / "runs/z").iterdir()) == ["ckpt.pt", "log.csv"]
    assert train.load(tmp_path / "runs/z/ckpt.pt")["step"] == 2


@pytest.mark.parametrize("out", ["/proc/none", "file/x", "file"])
def test_a_folder_that_cannot_be_written(call, latents, tmp_path, out):
    (tmp_path / "file").write_text("")
    status, _, err = call(train, *latents, "--out", out)
    assert status == 2 and out in one_line(err)
    assert call(train, *latents)[0] == 0
    status, _, err = call(sample, "--ckpt", "runs/z", "--n", 1, "--steps", 1, "--out", out)
    assert status == 2 and out in one_line(err)


@pytest.mark.parametrize(("broken", "every", "step"), [("loss", 50, 4), ("loss", 1, 3), ("gradient", 50, 4)])
def test_broken_numbers_stop_the_run_and_are_not_saved(call, latents, tmp_path, monkeypatch, broken, every, step):
    """A loss that is not finite from step 3 on is seen at the next log line or save; a gradient, at the save."""
    loss, clip, count = train.training_loss, torch.nn.utils.clip_grad_norm_, []

    def bad_loss(*args, **kwargs):
        count.append(1)
        value, errors = loss(*args, **kwargs)
        return value, {m: e * (float("inf") if len(count) >= 3 else 1) for m, e in errors.items()}

    def bad_gradient(parameters, norm):
        parameters = list(parameters)
        count.append(1)
        if len(count) == 4:
            parameters[7].grad[0] = float("nan")
        return clip(parameters, norm)

    if broken == "loss":
        monkeypatch.setattr(train, "training_loss", bad_loss)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", bad_gradient)
    monkeypatch.setattr(train.Log, "EVERY", every)
    status, _, err = call(train, *latents)
    assert status == 1 and f"at step {step}; the last good checkpoint is runs/z/ckpt.pt" in one_line(err)
    state = train.load(tmp_path / "runs/z/ckpt.pt")
    assert state["step"] == 2 and all(x.isfinite().all() for x in state["model"].values())


def test_an_earlier_runs_checkpoint_is_kept(call, latents, tmp_path):
    assert call(train, *latents, "--seed", 1)[0] == 0
    before = (tmp_path / "runs/z/ckpt.pt").read_bytes()
    status, out, _ = call(train, *latents)
    assert status == 0 and "earlier-1.pt" in out
    log = (tmp_path / "runs/z/log.csv").read_bytes()
    assert call(train, *latents, "--seed", 2)[0] == 0
    assert (tmp_path / "runs/z/earlier-1.pt").read_bytes() == before
    assert (tmp_path / "runs/z/earlier-2.csv").read_bytes() == log
    assert call(sample, "--ckpt", "runs/z/earlier-2.pt", "--n", 1, "--steps", 1)[0] == 0


def test_too_large_a_batch_is_named(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, 6 * 10**9))\nsys.exit("
    process = start(tmp_path, "--batch", 2**16, "--steps", 1, program=PROGRAM.replace("sys.exit(", limit))
    _, err = process.communicate()
    assert process.returncode == 2 and "out of memory: use a smaller --batch" in one_line(err)


# --- Checkpoints that are wrong -------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def in_config(state, **change):
    return {**state, "config": {**state["config"], **change}}


WRONG = {  # name: (what is made of a good checkpoint, what the line says)
    "other file": (lambda path, state: path.write_bytes(b"junk"), "another kind of file"),
    "empty": (lambda path, state: path.write_bytes(b""), "damaged"),
    "truncated": (lambda path, state: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "damaged"),
    "code": (lambda path, state: torch.save({**state, "model": Bomb()}, path), "code, which is not run"),
    "other zip": (lambda path, state: zipfile.ZipFile(path, "w").writestr("a", "b"), "cannot be read"),
    "a tensor": (lambda path, state: torch.save(torch.zeros(3), path), "not a checkpoint of train.py"),
    "other program": (lambda path, state: torch.save({"model": state["model"]}, path), "not a checkpoint of train.py"),
    "older format": (lambda path, state: torch.save(without(state, "format"), path), "has format None"),
    "newer format": (lambda path, state: torch.save({**state, "format": 99}, path), "has format 99"),
    "no tokenizers": (lambda path, state: torch.save(without(state, "tokenizers"), path), "tokenizers"),
    "odd setting": (lambda path, state: torch.save(in_config(state, colour="red"), path), "colour"),
    "odd preset": (lambda path, state: torch.save(in_config(state, preset="huge"), path), "huge"),
    "half of the weights": (
        lambda path, state: torch.save({**state, **{k: dict(list(state[k].items())[:9]) for k in ("ema", "model")}}, path),
        "damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_gets_one_line(call, latents, tmp_path, name):
    assert call(train, *latents)[0] == 0
    path = tmp_path / "runs/z/ckpt.pt"
    change, message = WRONG[name]
    change(path, train.load(path))
    before = path.read_bytes()
    for script, arguments in ((train, (*latents, "--resume")), (sample, ("--ckpt", "runs/z/ckpt.pt"))):
        if name == "odd setting" and script is train:
            continue  # only what it asks for must agree
        status, _, err = call(script, *arguments)
        assert status == 2 and message in one_line(err) and "runs/z/ckpt.pt" in err
    assert not (tmp_path / "ran").exists() and path.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preset", "paper", "--optimizer", "muon", "--prediction", "v"), "trained with preset toy, not paper"),
        (("--data", "other.npz"), "trained with data z.npz, not other.npz"),
        (("--seed", 5), "trained with seed 0, not 5"),
    ],
)
def test_resume_with_other_settings_is_refused(call, latents, tmp_path, flags, message):
    latents_file(tmp_path / "other.npz")
    assert call(train, *latents)[0] == 0
    status, _, err = call(train, *latents, "--resume", *flags)
    assert status == 2 and message in one_line(err)


def test_resume_with_other_modalities_is_refused(call, latents, tmp_path):
    import numpy as np

    assert call(train, *latents)[0] == 0
    latents_file(tmp_path / "z.npz", audio=np.zeros((12, 6, 4)))
    status, _, err = call(train, *latents, "--resume")
    assert status == 2 and "trained on other modalities" in one_line(err)


# --- Flags ----------------------------------------------------------------------------


def nonsense(script):
    """(flag, a value that is wrong) for every flag that takes a value from a range or a list."""
    for f in dataclasses.fields(script.Config):
        name, within = "--" + f.name.replace("_", "-"), f.metadata["within"]
        if within:
            low, high = within
            for value in ("x", "", "nan", "-inf", low - 1, low - high, high * 2, 10**30, "1" + "0" * 400, "1e400"):
                yield name, value
        elif f.metadata["choices"]:
            yield from ((name, value) for value in ("x", "", "TOY", "0"))
        elif f.type is bool:
            yield name + "=yes", ""


@pytest.mark.parametrize("script", [train, sample])
def test_every_flag_refuses_nonsense(call, latents, script):
    assert call(train, *latents)[0] == 0
    common = latents if script is train else ("--ckpt", "runs/z")
    tried = set()
    for flag, value in nonsense(script):
        status, _, err = call(script, *common, flag, value)
        assert status == 2 and len(one_line(err)) < 1200, (flag, value)
        tried.add(flag.split("=")[0])
    words = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(script.Config)} - tried
    free = {train: "--data --mixture --out", sample: "--ckpt --given --input --guidance-drop --out"}[script]
    assert words == set(free.split())  # these take any text; see MISTAKES in test_scripts.py
