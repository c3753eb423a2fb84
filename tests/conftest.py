"""Fixtures of several test files."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_data import latents_file

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a script's main() in this process, which spares the start-up -> exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
        capsys.readouterr()
        try:
            status = script.main()
        except SystemExit as stop:
            status = stop.code
        return status or 0, *capsys.readouterr()

    return call


@pytest.fixture
def latents(tmp_path):
    """Arguments of a four-step run on a small file of latents."""
    latents_file(tmp_path / "z.npz")
    return ("--data", "z.npz", "--out", "runs/z", "--steps", 4, "--batch", 4, "--save-every", 2, "--dtype", "fp32")


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A model that has seen the toy world for about a minute. It serves every test of sampling, and one of learning."""
    folder = tmp_path_factory.mktemp("toy")
    command = [sys.executable, str(ROOT / "train.py"), "--steps", "300"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "runs/toy"
