"""Fixtures of several test files."""

import sys

import pytest
from test_data import latents_file


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The same in this process, which spares the start-up: -> exit status, stdout, stderr."""
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
