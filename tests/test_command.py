"""Laws of torch_utils/command.py that hold for every command."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import encode, files_up_to, noise_image, write_folder

import calc_metrics
import dataset_tool
import generate
import train
from dnnlib.console import MemoryFull, UserError
from dnnlib.files import append_line, cache_dir
from torch_utils import doctor
from torch_utils.errors import explain

COMMANDS = [train.main, generate.main, calc_metrics.main, dataset_tool.main, doctor.main]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_help_is_printed_on_any_console(monkeypatch, encoding):
    for command in COMMANDS:
        console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", console)
        with pytest.raises(SystemExit) as ended:
            command(["--help"])
        console.flush()
        assert ended.value.code == 0
        assert b"--" in console.buffer.getvalue()


def test_a_leading_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_folder(tmp_path / "in", {"a.png": encode(noise_image(0, 8, 8))})
    arguments = ["--source", "~/in", "--dest=~/out.zip"]
    assert CliRunner().invoke(dataset_tool.main, arguments).exit_code == 0
    assert CliRunner().invoke(dataset_tool.main, ["check", "~/out.zip"]).exit_code == 0
    result = CliRunner().invoke(train.main, ["--cfg=auto", "--outdir=~/runs", "-o", "data.path=~/no.zip"])
    assert f"{tmp_path}/no.zip does not exist" in result.output


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_a_closed_console_changes_nothing(tmp_path, monkeypatch, closed):
    source = write_folder(tmp_path / "in", {"a.png": encode(noise_image(0, 8, 8))})
    for stream in closed:
        monkeypatch.setattr(sys, stream, None)
    for arguments, code in ((["--source", source, "--dest", tmp_path / "x.zip"], 0), (["check", tmp_path / "gone"], 2)):
        with pytest.raises(SystemExit) as ended:
            dataset_tool.main([str(argument) for argument in arguments])
        assert ended.value.code == code
    assert (tmp_path / "x.zip").exists()


def test_help_on_a_full_disk_is_a_sentence(monkeypatch, capsys):
    for command in COMMANDS:
        with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            with pytest.raises(SystemExit) as ended:
                command(["--help"])
            assert ended.value.code == 2
        assert re.fullmatch("Error: .*No space left on device; free some space.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["train.py", "generate.py", "calc_metrics.py", "dataset_tool.py"])
def test_in_a_folder_that_has_been_removed_a_sentence_says_so(tmp_path, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'cd "$0" && rmdir "$0" && "$@"'
    words = ["sh", "-c", script, gone, sys.executable, Path(train.__file__).with_name(command), "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: the current folder has been removed; change to another one\n"


def test_without_a_home_directory_the_cache_must_be_named(monkeypatch):
    monkeypatch.delenv("CREPS_CACHE", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without a name
    with pytest.raises(UserError, match="set CREPS_CACHE"):
        cache_dir()


def test_a_file_that_is_too_large_is_a_mistake_that_can_be_fixed(tmp_path):
    with files_up_to(10), pytest.raises(OSError, match="too large") as caught:
        append_line(tmp_path / "x.jsonl", "x" * 11)
    assert str(explain(caught.value)) == (
        f"{tmp_path / 'x.jsonl'}: File too large; raise the limit (ulimit -f), or choose a disk that holds larger files"
    )


def test_a_name_that_is_not_utf8_is_a_mistake_that_can_be_fixed():
    with pytest.raises(UnicodeEncodeError) as caught:
        "caf\udce9".encode()
    assert isinstance(explain(caught.value), UserError)
    assert "is not UTF-8" in str(explain(caught.value))


def test_a_name_that_the_locale_lacks_is_a_mistake_that_can_be_fixed():
    with pytest.raises(UnicodeEncodeError) as caught:
        "狗/a.png".encode("ascii")
    assert isinstance(explain(caught.value), UserError)
    assert "ascii of this locale lacks letters of '狗/a.png'; set PYTHONUTF8=1" in str(explain(caught.value))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (generate.main, "--seeds=0 convert a.pkl b.safetensors"),
        (calc_metrics.main, "--mirror=1 plot runs"),
        (dataset_tool.main, "--seed=0 check x.zip"),
    ],
)
def test_options_before_a_subcommand_are_refused(command, words):
    result = CliRunner().invoke(command, words.split())
    assert result.exit_code == 2
    assert re.search(r"Error: --\w+ does not go with \w+; leave it out", result.output)


def test_flags_of_stylegan2_ada_without_a_counterpart_say_what_to_do():
    for flag in train.FORMER:
        result = CliRunner().invoke(train.main, [f"{flag}=1"])
        assert result.exit_code == 2
        assert train.FORMER[flag] in result.output


@pytest.mark.parametrize("allocate", [torch.empty, np.empty, bytearray])
def test_full_memory_of_the_machine_is_told_as_such(allocate):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate(2**50)
    assert "machine" in str(explain(caught.value))


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_full_memory_of_a_gpu_is_told_whichever_library_fails(message):
    mistake = explain(RuntimeError(message))
    assert isinstance(mistake, MemoryFull)
    assert "GPU" in str(mistake)
