"""Fixtures of several test files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import latents_file

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)  # the tensors are small, and the toy run below uses the other core


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(script, *arguments) runs its main() in this process, in tmp_path -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            assert not script.main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def latents(tmp_path):
    """Arguments of a four-step run on a small file of latents."""
    latents_file(tmp_path / "z.npz")
    data = ("--data", "z.npz", "--preset", "toy", "--out", "runs/z")
    return (*data, "--steps", 4, "--batch", 4, "--save-every", 2, "--dtype", "fp32")


@pytest.fixture(scope="session", autouse=True)
def toy_training(request, tmp_path_factory):
    """Starts a short run of the toy world if a test needs it. It runs in another process beside the first tests."""
    if not any("toy_run" in item.fixturenames for item in request.session.items):
        yield
        return
    folder, one_thread = tmp_path_factory.mktemp("toy"), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), "--steps", "350"]
    with subprocess.Popen(
        command, cwd=folder, env=one_thread, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process, folder / "runs/toy"
        process.kill()


@pytest.fixture(scope="session")
def toy_run(toy_training):
    """Folder of a model of the toy world after 350 steps."""
    process, folder = toy_training
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder
