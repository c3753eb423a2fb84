"""Nothing is lost: runs that are killed, stopped, out of disk or broken; checkpoints and flags that are wrong."""

import fcntl
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import latents_file
from test_train import checkpoint, equal

import data
import sample
import train
from avdit import PRESETS, Block

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A network that trains in milliseconds."""
    monkeypatch.setitem(PRESETS, "toy", replace(PRESETS["toy"], dim=32, depth=1, heads=2))


def one_line(err):
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


# --- Lives of a run that end early ------------------------------------------------------------------------------------

EVERY = 3  # steps between checkpoints
LIVES = {  # how a life ends: (the step from which on it may, the file that it leaves)
    "half of a checkpoint is written": (4, "ckpt.pt.partial"),
    "a checkpoint is not renamed yet": (7, "ckpt.pt.partial"),
    "a line of the log is not renamed yet": (10, "log.csv.partial"),
    "kill -9 at a random moment": (13, "ckpt.pt"),
    "Ctrl-C": (16, "ckpt.pt"),
    "done": (23, "ckpt.pt"),
}


def live(end, at):
    """train.py, until this end."""
    begun, draw, save, rename = [], train.draw, torch.save, os.replace

    def die_if(name):
        if name == end and begun and begun[-1] >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    def drawing(args, step, *more):
        number = {"kill -9 at a random moment": signal.SIGKILL, "Ctrl-C": signal.SIGINT}.get(end)
        if number and step == at:
            threading.Timer(random.Random(0).uniform(0, 0.02), os.kill, (os.getpid(), number)).start()
        begun.append(step)
        print("step", step, flush=True)
        return draw(args, step, *more)

    def saving(state, file):
        save(state, content := io.BytesIO())
        half = content.tell() // 2
        file.write(content.getvalue()[:half])
        file.flush()
        die_if("half of a checkpoint is written")
        file.write(content.getvalue()[half:])

    def renaming(old, new):
        die_if(f"{'a checkpoint' if new.suffix == '.pt' else 'a line of the log'} is not renamed yet")
        rename(old, new)

    train.Log.EVERY, train.draw, torch.save, os.replace = 4, drawing, saving, renaming
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    train.main()


def main(folder):
    """Run train.py once undisturbed and then all LIVES, each in a process forked from this one, which has torch loaded.
    -> JSON of what is left after each."""
    os.chdir(folder)
    latents_file("z.npz")
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads the rest
    left = []
    for out, end in [("whole", "done"), *(("killed", end) for end in LIVES)]:
        flags = ("--data", "z.npz", "--preset", "toy", "--batch", 2, "--dtype", "fp32", "--steps", 24)
        sys.argv = ["train.py", *map(str, flags), "--save-every", str(EVERY), "--out", out]
        child = os.fork()
        if not child:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            status = 1
            try:
                live(end, LIVES[end][0])
                status = 0
            except SystemExit as stop:
                status = stop.code
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        text = Path("stdout").read_text()
        begun = [int(line.split()[1]) for line in text.splitlines() if line.startswith("step") and "/" not in line]
        files = sorted(path.name for path in Path(out).iterdir())
        step = checkpoint(Path(out))["step"]
        left.append((end, status, begun, step, files, text, Path("stderr").read_text()))
    print(json.dumps(left))


def test_killed_and_stopped_at_any_moment(tmp_path):
    """After every end the same command goes on. At last it leaves, bit for bit, what an undisturbed run leaves."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, *lives = json.loads(done.stdout)
    before = 0
    for end, status, begun, step, files, text, err in lives:
        at, leaves = LIVES[end]
        assert begun == list(range(before, begun[-1] + 1)), end  # from the last checkpoint on, no step left out
        assert begun[-1] >= at and step in (begun[-1] // EVERY * EVERY, begun[-1] + 1), end
        assert (f"going on at step {before} of killed/ckpt.pt" in text) == (before > 0)
        assert {"ckpt.pt", "log.csv", leaves} <= {*files}
        if end == "done":
            assert (status, step, len(files)) == (0, 24, 2) and text.endswith("done: killed/ckpt.pt\n"), err
        elif end == "Ctrl-C":
            line = "stopped: the same command goes on or begins anew"
            assert (status, len(files)) == (130, 2) and one_line(err) == line
        else:
            assert status == -signal.SIGKILL
        before = step
    results = []
    for out in ("whole", "killed"):
        state = checkpoint(tmp_path / out)
        assert state["config"].pop("out") == out
        results.append((state, (tmp_path / out / "log.csv").read_bytes()))
    assert equal(*results)


def test_same_seed_same_bits(call, latents, tmp_path):
    for out in ("a", "b"):
        assert call(train, *latents, "--out", out)[0] == 0
    a, b = (checkpoint(tmp_path / out) for out in "ab")
    assert a["config"].pop("out") != b["config"].pop("out") and equal(a, b)
    assert (tmp_path / "a/log.csv").read_bytes() == (tmp_path / "b/log.csv").read_bytes()


def test_the_same_command_again_says_that_it_is_done(call, latents, tmp_path):
    assert call(train, *latents)[0] == 0
    before = (tmp_path / "runs/z/ckpt.pt").read_bytes()
    log = (tmp_path / "runs/z/log.csv").read_bytes()
    status, out, err = call(train, *latents)
    assert status == 0 and out.endswith("done: runs/z/ckpt.pt\n") and "steps/s" not in out and not err
    assert (tmp_path / "runs/z/ckpt.pt").read_bytes() == before and (tmp_path / "runs/z/log.csv").read_bytes() == log


def stopping_at(step, monkeypatch):
    """The run ends, as if by Ctrl-C, once it has saved this step."""
    save = train.Run.save

    def stop(self, now):
        save(self, now)
        if now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "save", stop)


def test_a_run_that_goes_on_keeps_its_tokenizers_and_its_log(call, latents, tmp_path, monkeypatch):
    """Elsewhere a fit may differ, and the weights have learned the first one's latents. log.csv comes from ckpt.pt."""
    monkeypatch.setattr(train.Log, "EVERY", 1)
    assert call(train, *latents, "--steps", 8)[0] == 0
    whole, log = checkpoint(tmp_path / "runs/z"), (tmp_path / "runs/z/log.csv").read_bytes()
    with monkeypatch.context() as patch:
        stopping_at(4, patch)
        assert call(train, *latents, "--steps", 8, "--out", "runs/y")[0] == 130
    monkeypatch.setattr(data.Standardize, "fit", None)
    (tmp_path / "runs/y/log.csv").write_text("1,2,torn")
    status, out, err = call(train, *latents, "--steps", 8, "--out", "runs/y")
    assert status == 0 and "going on at step 4" in out, err
    resumed = checkpoint(tmp_path / "runs/y")
    assert resumed["config"].pop("out") != whole["config"].pop("out") and equal(resumed, whole)
    assert (tmp_path / "runs/y/log.csv").read_bytes() == log and log.count(b"\n") == 9


def test_a_run_may_go_on_elsewhere(call, latents, tmp_path, monkeypatch):
    """On another device, compiled, in micro-batches, saved at other steps, and in a copy of the folder."""
    assert call(train, *latents, "--steps", 8)[0] == 0
    with monkeypatch.context() as patch:
        stopping_at(4, patch)
        assert call(train, *latents, "--steps", 8, "--out", "a")[0] == 130
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(Block, "compile", lambda block, fullgraph: None)
    flags = ("--out", "b", "--device", "cpu", "--compile", "--accumulate", 2, "--save-every", 7)
    status, out, err = call(train, *latents, "--steps", 8, *flags)
    assert status == 0 and "going on at step 4 of b/ckpt.pt" in out, err
    a, b = (checkpoint(tmp_path / out) for out in ("runs/z", "b"))
    for name, x in a["model"].items():
        torch.testing.assert_close(b["model"][name], x, atol=1e-4, rtol=1e-3)  # the sums of micro-batches round apart
    assert b["step"] == 8 and b["config"]["accumulate"] == 2


def test_stopped_before_a_step_nothing_is_written(call, latents, tmp_path, monkeypatch):

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.Latents, "training_clips", stop)
    status, _, err = call(train, *latents)
    assert status == 130 and "the same command goes on" in one_line(err) and not (tmp_path / "runs").exists()


# --- Disks and numbers that fail ------------------------------------------------------


@pytest.mark.parametrize("name", ["ckpt.pt", "log.csv"])
def test_a_full_disk_leaves_the_last_checkpoint(call, latents, tmp_path, monkeypatch, name):
    save = train.Run.save

    def then_full(self, step):
        save(self, step)
        if step == 2:
            (self.path.parent / f"{name}.partial").symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", then_full)
        status, _, err = call(train, *latents)
    assert status == 2 and "No space left" in one_line(err)
    assert sorted(x.name for x in (tmp_path / "runs/z").iterdir()) == ["ckpt.pt", "log.csv"]
    assert checkpoint(tmp_path / "runs/z")["step"] == 2
    assert call(train, *latents)[0] == 0 and call(train, *latents, "--out", "o")[0] == 0  # once there is space again
    assert (tmp_path / "runs/z/log.csv").read_bytes() == (tmp_path / "o/log.csv").read_bytes()


@pytest.mark.parametrize("size", [400_000, 700_000, 1_000_000])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(latents, tmp_path, size):
    """torch.save may end with an error of its own, after the system's."""
    command = f"ulimit -f {size // 1024}; trap '' XFSZ; exec '{sys.executable}' '{ROOT / 'train.py'}' "
    command += " ".join(map(str, latents)).replace("--steps 4", "--steps 1")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "File too large" in one_line(done.stderr)


def test_a_log_that_cannot_be_written_is_no_damaged_checkpoint(call, latents, tmp_path):
    assert call(train, *latents)[0] == 0
    (tmp_path / "runs/z/log.csv").unlink()
    (tmp_path / "runs/z/log.csv").mkdir()
    status, _, err = call(train, *latents)
    assert status == 2 and "log.csv" in one_line(err) and "damaged" not in err


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(call, latents, monkeypatch):
    """Or a power cut could leave the new name with none of its content."""
    done, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), done.append("on disk"))[0])
    monkeypatch.setattr(os, "replace", lambda a, b: (rename(a, b), done.append(Path(b).name))[0])
    assert call(train, *latents)[0] == 0
    assert done[done.index("ckpt.pt") - 1] == "on disk" and done.count("ckpt.pt") == done.count("on disk") == 3


@pytest.mark.parametrize("out", ["/proc/none", "file/x", "file"])
def test_a_folder_that_cannot_be_written(call, latents, tmp_path, out):
    (tmp_path / "file").write_text("")
    status, _, err = call(train, *latents, "--out", out)
    assert status == 2 and out in one_line(err)
    assert call(train, *latents)[0] == 0
    status, _, err = call(sample, "--ckpt", "runs/z", "--n", 1, "--steps", 1, "--out", out)
    assert status == 2 and out in one_line(err)


@pytest.mark.parametrize(
    ("broken", "every", "step"),
    [("error", 50, 4), ("error", 1, 3), ("loss", 50, 4), ("loss", 1, 3), ("gradient", 50, 4)],
)
def test_broken_numbers_stop_the_run_and_are_not_saved(call, latents, tmp_path, monkeypatch, broken, every, step):
    """What is not finite from step 3 or 4 on is seen at the next log line or save."""
    training_loss, clip, calls = train.training_loss, torch.nn.utils.clip_grad_norm_, []

    def bad_loss(*args):
        calls.append(1)
        loss, error = training_loss(*args)
        bad = float("nan") if len(calls) >= 3 else 1
        return (loss, error * bad) if broken == "error" else (loss * bad, error)

    def bad_gradient(parameters, norm):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 4:
            parameters[7].grad[0] = float("nan")
        return clip(parameters, norm)

    if broken == "gradient":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", bad_gradient)
    else:
        monkeypatch.setattr(train, "training_loss", bad_loss)
    monkeypatch.setattr(train.Log, "EVERY", every)
    status, _, err = call(train, *latents)
    assert status == 2 and f"at step {step}: the last good checkpoint is runs/z/ckpt.pt" in one_line(err)
    state = checkpoint(tmp_path / "runs/z")
    assert state["step"] == 2 and all(x.isfinite().all() for part in ("model", "ema") for x in state[part].values())
    assert "nan" not in (tmp_path / "runs/z/log.csv").read_text()


def no_memory():
    raise torch.OutOfMemoryError("as a GPU's allocator says it")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: np.empty(2**50), no_memory])
def test_too_large_a_batch_is_named(call, latents, monkeypatch, allocate):
    monkeypatch.setattr(train, "training_loss", lambda *_: allocate())
    status, _, err = call(train, *latents)
    assert status == 2 and "out of memory: use a smaller --batch" in one_line(err)


@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_not_taken_for_damage(call, latents, monkeypatch, kind):
    def full(*_, **__):
        raise kind

    assert call(train, *latents)[0] == 0
    monkeypatch.setattr(torch, "load", full)
    for script, arguments in ((train, latents), (sample, ("--ckpt", "runs/z"))):
        status, _, err = call(script, *arguments)
        assert status == 2 and "out of memory: use" in one_line(err)


# --- Checkpoints that are wrong -------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def flip(path, tensor):
    """Change one bit of a tensor in the file."""
    content = bytearray(path.read_bytes())
    content[content.index(tensor.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def in_config(state, **change):
    return {**state, "config": {**state["config"], **change}}


WRONG = {  # name: (what is made of a good checkpoint, what the line says)
    "other file": (lambda path, state: path.write_bytes(b"junk"), "is no checkpoint"),
    "one bit": (lambda path, state: flip(path, state["ema"]["embed.0.weight"]), "a checksum is wrong"),
    "empty": (lambda path, state: path.write_bytes(b""), "damaged"),
    "truncated": (lambda path, state: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "damaged"),
    "code": (lambda path, state: torch.save({**state, "model": Bomb()}, path), "code, which is not run"),
    "other zip": (lambda path, state: zipfile.ZipFile(path, "w").writestr("a", "b"), "is no checkpoint"),
    "a tensor": (lambda path, state: torch.save(torch.zeros(3), path), "is no checkpoint"),
    "other program": (lambda path, state: torch.save({"model": state["model"]}, path), "is no checkpoint"),
    "older format": (lambda path, state: torch.save(without(state, "format"), path), "format"),
    "newer format": (lambda path, state: torch.save({**state, "format": 99}, path), "has format 99"),
    "other settings": (lambda path, state: torch.save({**state, "config": {}}, path), "is no checkpoint"),
    "no tokenizers": (lambda path, state: torch.save(without(state, "tokenizers"), path), "tokenizers"),
    "odd preset": (lambda path, state: torch.save(in_config(state, preset="huge"), path), "huge"),
    "half the weights": (
        lambda path, state: torch.save({**state, **{k: dict([*state[k].items()][:9]) for k in ("ema", "model")}}, path),
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


OTHER = {"preset": "clips", "mixture": "pm", "prediction": "v", "dim": 64, "depth": 2, "heads": 4,
         "batch": 8, "steps": 5, "optimizer": "adamw", "lr": 0.5, "warmup": 7, "ema": 0.5,
         "dtype": "bf16", "seed": 5}  # fmt: skip
FORMAT = {"fps": 9, "size": 96, "sample_rate": 16000}


def test_another_command_into_the_same_folder_is_refused(call, latents, tmp_path):
    """Every setting but those in FREE."""
    assert call(train, *latents)[0] == 0
    path = tmp_path / "runs/z/ckpt.pt"
    before, state = path.read_bytes(), torch.load(path, weights_only=True)
    for name, value in OTHER.items():
        status, _, err = call(train, *latents, "--" + name, value)
        message = f"runs/z/ckpt.pt is of a run with --{name} {state['config'][name]}, not {value}: use another --out"
        assert status == 2 and one_line(err) == f"train.py: {message}" and path.read_bytes() == before
    assert {*OTHER, *FORMAT, *train.FREE} == {*state["config"]}


@pytest.mark.parametrize("name", FORMAT)
def test_clips_in_another_format_are_refused(call, latents, tmp_path, name):
    """Only a folder of clips has a choice of format: here the checkpoint is what differs."""
    assert call(train, *latents)[0] == 0
    path = tmp_path / "runs/z/ckpt.pt"
    state = torch.load(path, weights_only=True)
    torch.save(in_config(state, **{name: FORMAT[name]}), path)
    status, _, err = call(train, *latents)
    assert status == 2 and f"with --{name.replace('_', '-')} {FORMAT[name]}, not " in one_line(err)


def test_other_modalities_into_the_same_folder_are_refused(call, latents, tmp_path):
    assert call(train, *latents)[0] == 0
    latents_file(tmp_path / "z.npz", audio=np.zeros((12, 6, 4)))
    status, _, err = call(train, *latents)
    assert status == 2 and "on other modalities" in one_line(err)


def test_more_clips_are_refused(call, latents, tmp_path):
    """The same path with other content. A run that is unfinished must not go on with other batches."""
    with np.load(tmp_path / "z.npz") as file:
        more = {name: np.concatenate([file[name], file[name][:2]]) for name in ("video", "audio")}
    assert call(train, *latents)[0] == 0
    before = (tmp_path / "runs/z/ckpt.pt").read_bytes()
    latents_file(tmp_path / "z.npz", **more)
    status, _, err = call(train, *latents)
    assert status == 2 and "runs/z/ckpt.pt is of other clips than z.npz: use another --out" in one_line(err)
    assert (tmp_path / "runs/z/ckpt.pt").read_bytes() == before


def test_two_runs_into_one_folder(call, latents, tmp_path):
    """The second one is refused and writes nothing, whether it is new or goes on."""
    assert call(train, *latents)[0] == 0
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "runs/z/ckpt.pt", tmp_path / "old")
    lock = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(); input()"
    for name, files in (("new", []), ("old", ["ckpt.pt"])):
        command = [sys.executable, "-uc", lock, tmp_path / name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            status, _, err = call(train, *latents, "--out", name)
            assert status == 2 and f"another run writes to {tmp_path / name}: use another --out" in one_line(err)
            assert [path.name for path in (tmp_path / name).iterdir()] == files
            status, _, err = call(sample, "--ckpt", "runs/z", "--n", 1, "--steps", 1, "--out", name)
            assert status == 2 and f"another run writes to {tmp_path / name}" in one_line(err)
            assert [path.name for path in (tmp_path / name).iterdir()] == files
            other.kill()
        assert call(train, *latents, "--out", name)[0] == 0  # the system has freed it


def test_a_run_that_begins_late_overwrites_nothing(call, latents, tmp_path, monkeypatch):
    """Another run begins and ends while this one reads its clips."""
    read, begun = data.Latents.training_clips, []

    def reading(self):
        if not begun:
            begun.append(1)
            assert call(train, *latents)[0] == 0
        return read(self)

    monkeypatch.setattr(data.Latents, "training_clips", reading)
    status, _, err = call(train, *latents)
    assert status == 2 and "another run has written runs/z/ckpt.pt in the meantime" in one_line(err)
    assert checkpoint(tmp_path / "runs/z")["step"] == 4 and not (tmp_path / "runs/z/ckpt.pt.partial").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_that_cannot_be_printed_end_nothing(tmp_path, encoding):
    """From the folder of clips to samples, with another encoding than the names' on standard output."""
    name = "\u65e5\u672c " + os.fsdecode(b"\xff")
    (tmp_path / name).mkdir()
    latents_file(tmp_path / name / "z.npz")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    for script, *flags in (
        (
            "train.py",
            "--data",
            f"{name}/z.npz",
            "--preset",
            "toy",
            "--steps",
            "1",
            "--batch",
            "2",
            "--out",
            f"{name}/r",
        ),
        ("sample.py", "--ckpt", f"{name}/r", "--n", "1", "--steps", "1", "--task", "a2v", "--out", f"{name}/s"),
    ):
        command = [sys.executable, str(ROOT / script), *flags]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
        assert done.returncode == 0 and b"\\u65e5" in done.stdout, done.stderr
    assert (tmp_path / name / "s/a2v/samples.npz").exists()


def test_home_is_expanded(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    latents_file(tmp_path / "home/z.npz")
    flags = ("--preset", "toy", "--steps", 1, "--batch", 2, "--out=~/r")
    assert call(train, "--data=~/z.npz", *flags)[0] == 0
    assert (tmp_path / "home/r/ckpt.pt").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_standard_output_may_be_closed(tmp_path, script):
    command = f"'{sys.executable}' '{ROOT / script}' --device nowhere --out x >&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice" in one_line(done.stderr)
    command = command.replace("--device nowhere", "--data nowhere" if script == "train.py" else "--ckpt nowhere")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "nowhere" in one_line(done.stderr)


def test_a_file_system_without_locks(call, latents, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    train.alone.cache_clear()
    monkeypatch.setattr(fcntl, "flock", flock)
    assert call(train, *latents)[0] == 0


def test_constant_data_break_nothing(call, latents, tmp_path):
    latents_file(tmp_path / "z.npz", audio=np.full((12, 6, 5), 4.0))
    assert call(train, *latents)[0] == 0
    state = checkpoint(tmp_path / "runs/z")
    assert all(x.isfinite().all() for x in state["model"].values())


# --- Flags ----------------------------------------------------------------------------


def nonsense(parser):
    """(flag, a value that is wrong) for every flag that takes a value from a range or a list."""
    for action in parser._actions:
        name = action.option_strings[-1]
        if action.choices:
            yield from ((name, value) for value in ("x", "", "TOY", "0"))
        elif action.type not in (None, os.path.expanduser):
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
    free = {train: "--data --mixture --out", sample: "--ckpt --data --given --input --guidance-drop --out"}[script]
    words = {action.option_strings[-1] for action in parsers[0]._actions} - tried
    assert words == {*free.split()}  # these take any text; see MISTAKES in test_train.py and test_sample.py


if __name__ == "__main__":
    main(*sys.argv[1:])
