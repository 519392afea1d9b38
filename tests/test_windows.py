"""On a Python without what Windows and macOS lack, a script trains to checkpoints, resumes and saves its result."""

import os
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import ROOT, command_line
from safetensors.torch import load_file

RUNNER = """
import runpy, sys

sys.path.insert(0, sys.argv.pop(1))
import windows

windows.take_away()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds open files in /proc")


def run_without(flags, script):
    """Run a script in a fresh process that lacks what Windows lacks."""
    return forks.run(["-c", RUNNER, ROOT / "tests", ROOT / f"{script}.py", *command_line(flags)])


@pytest.mark.parametrize("script", ["train_text_to_image", "train_text_to_image_flax"])
def test_a_run_a_resume_and_the_result(script, flags, tmp_path):
    """From cached encodings, by a data worker; older checkpoints are removed, also the one that was resumed from."""
    flags |= {"center_crop": True, "cache_encodings": tmp_path / "cache", "checkpointing_steps": 1, "use_ema": True}
    first = run_without(flags, script)
    assert first.returncode == 0, first.stderr
    flags |= {"max_train_steps": 3, "checkpoints_total_limit": 1, "dataloader_num_workers": 1}
    flags |= {"resume_from_checkpoint": True, "offload_ema": script == "train_text_to_image"}
    second = run_without(flags, script)
    assert second.returncode == 0, second.stderr
    assert "checkpoint-2; changed: --checkpoints_total_limit 1" in second.stderr
    assert [path.name for path in flags["output_dir"].glob("checkpoint-*")] == ["checkpoint-3"]
    weights = load_file(flags["output_dir"] / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    names = [path.name for path in flags["output_dir"].rglob("*")]
    assert len(names) > 20
    assert [name for name in names if re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', name)] == []


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_in_a_pipe(script):
    """There Python writes the code page of Windows, which has no Greek letters."""
    command, environment = [sys.executable, str(ROOT / script), "--help"], {**os.environ, "PYTHONIOENCODING": "cp1252"}
    said = subprocess.run(command, env=environment, capture_output=True, check=True).stdout.decode("cp1252")
    assert script in said
    assert "--train_data_dir" in said


def test_what_is_taken_away(tmp_path):
    """Each line of the code raises, as on Windows."""
    lines = """
        signal.SIGUSR1
        os.sched_getaffinity(0)
        os.fork()
        os.open(".", os.O_RDONLY)
        os.fsync(os.open("file", os.O_RDONLY))
        os.rename("file", "other")
        open_file = open("file"); os.unlink("file")
        open_file = open("folder/file"); os.rename("folder", "moved")
        open_file = open("folder/file"); shutil.rmtree("folder")
        print("ᾱ")
    """
    (tmp_path / "folder").mkdir()
    for name in ("file", "other", "folder/file"):
        (tmp_path / name).touch()
    code = "import os, shutil, signal, sys\nsys.path.insert(0, sys.argv[1])\nimport windows\nwindows.take_away()\n"
    code += (
        "for line in sys.argv[2:]:\n    try:\n        exec(line)\n    except (OSError, AttributeError, ValueError):\n"
    )
    code += "        print('raised', flush=True)\n    open_file = None\n"
    lines = [line.strip() for line in lines.strip().splitlines()]
    command = [sys.executable, "-c", code, str(ROOT / "tests"), *lines]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["raised"] * len(lines)
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "other", "folder"}
