"""Nothing is lost: a run that is killed, stopped, out of disk or broken; checkpoints and flags that are wrong."""

import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import latents_file
from test_scripts import equal

import data
import sample
import train

ROOT = Path(__file__).parents[1]

PROGRAM = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import train
train.Log.EVERY, draw = 4, train.draw
train.draw = lambda seed, step, *more: (print("step", step, flush=True), draw(seed, step, *more))[1]
sys.exit(train.main())
"""
FLAGS = ("--data", "z.npz", "--preset", "toy", "--out", "o", "--batch", 2, "--dtype", "fp32")


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


WHOLE, EVERY = ("--steps", 60, "--save-every", 3), 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves that nothing disturbed."""
    return finished(tmp_path_factory.mktemp("whole"), *WHOLE)


def test_killed_at_six_moments(whole, tmp_path):
    """kill -9, three times at a random moment and three times while a checkpoint is written, then to the end."""
    folder, reached, rng = tmp_path / "killed", 0, random.Random(0)
    partial = folder / "o/ckpt.pt.partial"
    for k in range(6):
        process, seen = start(folder, *WHOLE), []
        while not seen or seen[-1] < reached + EVERY:  # until it has saved more than the one before
            seen += steps(process.stdout.readline())
            assert process.poll() is None
        time.sleep(rng.uniform(0, 0.02))
        while k % 2 and not partial.exists():
            assert process.poll() is None
        process.kill()
        seen += steps(process.communicate()[0])
        assert process.returncode == -signal.SIGKILL
        assert reached - EVERY <= seen[0] <= reached + 1
        reached = seen[-1]
    assert equal(finished(folder, *WHOLE), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path, number):
    process = start(tmp_path / "stopped", *WHOLE)
    while process.stdout.readline() != "step 7\n":
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130 and "saved: the same command goes on" in one_line(err)
    state, _ = result(tmp_path / "stopped")
    assert state["step"] == (steps(out) or [7])[-1] + 1 < 60
    if number == signal.SIGINT:
        assert equal(finished(tmp_path / "stopped", *WHOLE), whole)


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), train.signals_noted() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_same_seed_same_bits(call, latents, tmp_path):
    for out in ("a", "b"):
        assert call(train, *latents, "--out", out)[0] == 0
    a, b = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True) for out in "ab")
    assert a["config"].pop("out") != b["config"].pop("out") and equal(a, b)
    assert (tmp_path / "a/log.csv").read_bytes() == (tmp_path / "b/log.csv").read_bytes()


def test_the_same_command_again_says_that_it_is_done(call, latents, tmp_path):
    assert call(train, *latents)[0] == 0
    before = (tmp_path / "runs/z/ckpt.pt").read_bytes()
    status, out, err = call(train, *latents)
    assert status == 0 and "done: runs/z/ckpt.pt" in out and "step" not in out and not err
    assert (tmp_path / "runs/z/ckpt.pt").read_bytes() == before


def test_a_run_that_goes_on_keeps_its_tokenizers_and_its_log(call, latents, tmp_path, monkeypatch):
    """Elsewhere a fit may differ, and the weights have learned the first one's latents. log.csv comes from ckpt.pt."""
    monkeypatch.setattr(train.Log, "EVERY", 2)
    assert call(train, *latents, "--steps", 8)[0] == 0
    whole, log = torch.load(tmp_path / "runs/z/ckpt.pt", weights_only=True), (tmp_path / "runs/z/log.csv").read_bytes()
    save = train.save

    def stop(path, state):
        save(path, state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", stop)
    assert call(train, *latents, "--steps", 8, "--out", "runs/y")[0] == 130
    monkeypatch.setattr(train, "save", save)
    monkeypatch.setattr(data.Standardize, "fit", None)
    (tmp_path / "runs/y/log.csv").write_text("1,2,torn")
    status, out, err = call(train, *latents, "--steps", 8, "--out", "runs/y", "--accumulate", 1, "--save-every", 1)
    assert status == 0 and "going on at step 4" in out, err
    resumed = torch.load(tmp_path / "runs/y/ckpt.pt", weights_only=True)
    assert all(equal(resumed[part], whole[part]) for part in ("model", "ema", "adamw", "muon", "tokenizers"))
    assert (tmp_path / "runs/y/log.csv").read_bytes() == log and resumed["log"]["rows"] == whole["log"]["rows"]


def test_the_estimate_is_bounded_by_what_the_clips_reach(call, latents, tmp_path):
    """z_max of a modality is the largest |z| of the clips that are trained on."""
    assert call(train, *latents)[0] == 0
    trained = sample.Trained("runs/z", torch.device("cpu"))
    clips, _ = data.training_clips("z.npz", trained.layout, data.TOY)
    bounds = trained.layout.unpack(trained.model.z_max)
    for name, z in trained.layout.unpack(trained.tokenizers.encode(clips)).items():
        assert (bounds[name] == z.abs().max()).all()


def test_stopped_before_a_step_says_that_nothing_is_saved(call, latents, monkeypatch):

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "training_clips", stop)
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
        if state["step"] == 2:
            Path(f"{path}.partial").symlink_to("/dev/full")

    monkeypatch.setattr(train, "save", then_full)
    status, _, err = call(train, *latents)
    assert status == 2 and "No space left" in one_line(err)
    assert sorted(x.name for x in (tmp_path / "runs/z").iterdir()) == ["ckpt.pt", "log.csv"]
    assert torch.load(tmp_path / "runs/z/ckpt.pt", weights_only=True)["step"] == 2


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
        return value, errors * (float("inf") if len(count) >= 3 else 1)

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
    state = torch.load(tmp_path / "runs/z/ckpt.pt", weights_only=True)
    assert state["step"] == 2 and all(x.isfinite().all() for k, x in state["model"].items() if k != "z_max")


def test_too_large_a_batch_is_named(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 * 10**9, 3 * 10**9))\nsys.exit("
    process = start(tmp_path, "--batch", 2**14, "--steps", 1, program=PROGRAM.replace("sys.exit(", limit))
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
    "other file": (lambda path, state: path.write_bytes(b"junk"), "is no checkpoint"),
    "empty": (lambda path, state: path.write_bytes(b""), "damaged"),
    "truncated": (lambda path, state: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "damaged"),
    "code": (lambda path, state: torch.save({**state, "model": Bomb()}, path), "code, which is not run"),
    "other zip": (lambda path, state: zipfile.ZipFile(path, "w").writestr("a", "b"), "is no checkpoint"),
    "a tensor": (lambda path, state: torch.save(torch.zeros(3), path), "is no checkpoint"),
    "other program": (lambda path, state: torch.save({"model": state["model"]}, path), "is no checkpoint"),
    "older format": (lambda path, state: torch.save(without(state, "format"), path), "format"),
    "newer format": (lambda path, state: torch.save({**state, "format": 99}, path), "has format 99"),
    "no tokenizers": (lambda path, state: torch.save(without(state, "tokenizers"), path), "tokenizers"),
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
    change(path, torch.load(path, weights_only=True))
    before = path.read_bytes()
    for script, arguments in ((train, latents), (sample, ("--ckpt", "runs/z/ckpt.pt"))):
        status, _, err = call(script, *arguments)
        assert status == 2 and message in one_line(err) and "runs/z/ckpt.pt" in err
    assert not (tmp_path / "ran").exists() and path.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optimizer", "adamw"), "with --optimizer muon, not adamw"),
        (("--data", "other.npz"), "with --data z.npz, not other.npz"),
        (("--seed", 5), "with --seed 0, not 5"),
        (("--steps", 5), "with --steps 4, not 5"),
    ],
)
def test_another_command_into_the_same_folder_is_refused(call, latents, tmp_path, flags, message):
    latents_file(tmp_path / "other.npz")
    assert call(train, *latents)[0] == 0
    before = (tmp_path / "runs/z/ckpt.pt").read_bytes()
    status, _, err = call(train, *latents, *flags)
    assert status == 2 and message in one_line(err) and "use another --out" in err
    assert (tmp_path / "runs/z/ckpt.pt").read_bytes() == before


def test_other_modalities_into_the_same_folder_are_refused(call, latents, tmp_path):
    assert call(train, *latents)[0] == 0
    latents_file(tmp_path / "z.npz", audio=np.zeros((12, 6, 4)))
    status, _, err = call(train, *latents)
    assert status == 2 and "on other modalities" in one_line(err)


def test_changed_data_are_refused(call, latents, tmp_path):
    """The same path, other content: one number of one clip, their order, one clip more. The file itself may move."""
    assert call(train, *latents, "--save-every", 1)[0] == 0
    path, state = tmp_path / "runs/z/ckpt.pt", torch.load(tmp_path / "runs/z/ckpt.pt", weights_only=True)
    rng = np.random.default_rng(0)
    video, audio = 3 * rng.standard_normal((12, 3, 2, 2, 4)) + 1, rng.standard_normal((12, 6, 5))  # as latents_file has
    other = audio.copy()
    other[7, 3, 2] += 1
    more = {"video": np.concatenate([video, video[:2]]), "audio": np.concatenate([audio, audio[:2]])}
    torch.save({**state, "step": 3}, path)
    for change in ({"audio": other}, {"video": video[::-1], "audio": audio[::-1]}, more):
        latents_file(tmp_path / "z.npz", **change)
        status, _, err = call(train, *latents)
        assert (
            status == 2 and "is of a run on 10 clips" in err and "are not the same" in one_line(err.split("\n", 0)[-1])
        )
    latents_file(tmp_path / "z.npz", audio=audio * (1 + 1e-6))  # the rounding of another machine
    assert call(train, *latents)[0] == 0


def test_constant_data_are_named(call, latents, tmp_path):
    latents_file(tmp_path / "z.npz", audio=np.full((12, 6, 5), 4.0))
    status, _, err = call(train, *latents)
    assert status == 0 and one_line(err) == "audio is the same in all clips: there is nothing to learn of it"
    state = torch.load(tmp_path / "runs/z/ckpt.pt", weights_only=True)
    assert all(x.isfinite().all() for x in state["model"].values())


# --- Flags ----------------------------------------------------------------------------


def nonsense(parser):
    """(flag, a value that is wrong) for every flag that takes a value from a range or a list."""
    for action in parser._actions:
        name = action.option_strings[-1]
        if action.choices:
            yield from ((name, value) for value in ("x", "", "TOY", "0"))
        elif action.type:
            for value in ("x", "", "nan", "-inf", "-1", 10**30, "1" + "0" * 400, "1e400"):
                if (name, value) != ("--guidance", "-1"):
                    yield name, value
        elif action.nargs == 0:
            yield name + "=yes", ""


@pytest.mark.parametrize("script", [train, sample])
def test_every_flag_refuses_nonsense(call, latents, monkeypatch, script):
    assert call(train, *latents)[0] == 0
    parsers, parse = [], train.Parser.parse_args
    monkeypatch.setattr(train.Parser, "parse_args", lambda self: (parsers.append(self), parse(self))[1])
    common = latents if script is train else ("--ckpt", "runs/z", "--n", 1, "--steps", 1)
    assert call(script, *common)[0] == 0
    tried = set()
    for flag, value in nonsense(parsers[0]):
        status, _, err = call(script, *common, flag, value)
        assert status == 2 and len(one_line(err)) < 1200, (flag, value)
        tried.add(flag.split("=")[0])
    free = {train: "--data --mixture --out", sample: "--ckpt --given --input --guidance-drop --out"}[script]
    words = {action.option_strings[-1] for action in parsers[0]._actions} - tried
    assert words == {*free.split()}  # these take any text; see MISTAKES in test_scripts.py
