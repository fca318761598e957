"""The commands work without what only some systems have."""

import ast
import os
import sys
from pathlib import Path

from click.testing import CliRunner

import generate

ROOT = Path(__file__).parents[1]
POSIX_ONLY = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios"}
FUNCTIONS = ("posix_fallocate", "pread", "pwrite", "sched_getaffinity", "sync", "sysconf", "killpg", "fork")


def test_no_module_needs_one_of_another_system_to_be_imported():
    files = [
        *ROOT.glob("*.py"),
        *(f for d in ("dnnlib", "metrics", "rendering", "torch_utils", "training") for f in (ROOT / d).rglob("*.py")),
    ]
    assert len(files) > 50
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10)).body:
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            )
            assert not POSIX_ONLY.intersection(names), file


def test_training_and_rendering_work_without_them(tiny, tmp_path, monkeypatch):
    expected = tmp_path / "here" / "seed0000.png"
    arguments = ["--network=letters", "--seeds=0", "--class=2", "--size=16x16"]
    CliRunner().invoke(generate.main, [*arguments, f"--outdir={expected.parent}"])
    for name in POSIX_ONLY:
        monkeypatch.setitem(sys.modules, name, None)
    for name in FUNCTIONS:
        monkeypatch.delattr(os, name, raising=False)
    result = CliRunner().invoke(generate.main, [*arguments, f"--outdir={tmp_path / 'there'}"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "there" / "seed0000.png").read_bytes() == expected.read_bytes()
    tiny.run("--kimg=0.008")
    result = tiny.call(*tiny.new("--batch-gpu=auto"))
    assert "set train.batch_gpu to a number" in result.output
