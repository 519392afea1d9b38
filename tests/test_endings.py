"""However a run ends, its data workers end with it, its status says so, and what a user can mend is one line."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import psutil
import pytest
import torch
from conftest import ROOT, command_line, run

import train_text_to_image

# Runs a script whose models raise: RAISE=CLASS:METHOD:CALL:EXCEPTION [RANK=number] python -c RUNNER SCRIPT FLAGS
RUNNER = """
import os, runpy, sys, diffusers, torch

name, method, call, exception = os.environ["RAISE"].split(":")
owner, calls = getattr(diffusers, name), []
original = getattr(owner, method)

def raising(self, *arguments, **options):
    calls.append(None)
    if len(calls) == int(call) and os.environ.get("RANK", "1") == "1":
        raise eval(exception)
    return original(self, *arguments, **options)

setattr(owner, method, raising)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPT = ROOT / "train_text_to_image.py"


@pytest.fixture
def with_workers(flags):
    return {**flags, "max_train_steps": 3000, "dataloader_num_workers": 2, "logging_steps": 1}


def start(flags, launcher=(), **environment):
    """Start a run in a process group of its own, at a terminal; `process.said()` is its stderr."""
    command = [*launcher, str(SCRIPT), *command_line(flags)]
    path = Path(flags["output_dir"]).with_name("stderr")
    environment = {**os.environ, **environment}
    with forks.Terminal(path) as terminal:
        if "torch.distributed.run" in launcher:
            command = [sys.executable, *command]
            process = subprocess.Popen(command, env=environment, stderr=terminal, start_new_session=True)
        else:
            process = forks.Popen(command, terminal, env=environment)

    def said():
        terminal.copy()
        return path.read_text()

    process.said = said
    return process


def until_first_update(process):
    while "1/3000" not in process.said():
        assert process.poll() is None
        time.sleep(0.05)


def end_of(process, seconds):
    """Wait for the process. Returns its status and stderr, and asserts that nothing of its group is left."""
    try:
        process.wait(timeout=seconds)
    finally:
        left = [p for p in psutil.process_iter() if p.pid != process.pid and group_of(p.pid) == process.pid]
        for each in left:
            each.kill()
    assert [p.pid for p in left] == []
    return process.returncode, process.said()


def group_of(pid):
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("UNet2DConditionModel:forward:3:ZeroDivisionError('unforeseen')", "ZeroDivisionError: unforeseen"),
        (
            # With a cause of the library's own, in which no line of the script stands.
            "UNet2DConditionModel:forward:3:"
            "[e for e in [torch.OutOfMemoryError('out of memory')] if not setattr(e, '__cause__', MemoryError())][0]",
            "error: out of memory while training, with --train_batch_size 2 and --resolution 32; these need less, "
            "cheapest first: smaller batches, with more --gradient_accumulation_steps, --mixed_precision, "
            "--cache_encodings, --use_8bit_adam, --gradient_checkpointing, --rank, a lower --resolution\n",
        ),
        (
            "UNet2DConditionModel:forward:3:OSError(28, 'No space left', 'a file')",
            "error: [Errno 28] No space left: 'a f",
        ),
        # As torch raises a worker's again, and without a number of the operating system.
        ("UNet2DConditionModel:forward:3:OSError('Caught in a worker')", "OSError: Caught in a worker"),
        ("StableDiffusionPipeline:__call__:1:ValueError('from a library')", "ValueError: from a library"),
    ],
)
def test_an_error_in_the_loop_ends_the_data_workers(place, expected, with_workers):
    flags = {**with_workers, "validation_prompts": ["red dots"], "validation_steps": 5}
    status, errors = end_of(start(flags, ("-c", RUNNER), RAISE=place), seconds=100)
    assert status == 1
    assert expected in errors
    assert ("Traceback" in errors) != ("error: " in expected)


@pytest.mark.parametrize("script", sorted(ROOT.glob("train_*.py")), ids=lambda path: path.stem)
def test_ctrl_c_while_the_libraries_are_imported(script):
    """Which takes seconds, in which nothing is there to resume."""
    words = ["--train_data_dir=nowhere", "--pretrained_model_name_or_path=nowhere"]
    words = words[: 1 if "prior" in script.stem or "decoder" in script.stem else 2]
    process = subprocess.Popen([sys.executable, script, *words], stderr=subprocess.PIPE, text=True)
    with process:
        while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "\nstopped\n"
    assert process.returncode == 130


def test_a_killed_data_worker_ends_the_run(with_workers):
    process = start(with_workers)
    until_first_update(process)
    worker = psutil.Process(process.pid).children()[-1]
    worker.kill()
    status, errors = end_of(process, seconds=60)
    assert status == 1
    assert "error: a data worker has ended" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(subprocess.call(["unshare", "-m", "true"]) != 0, reason="needs the right to mount a file system")
def test_a_full_shared_memory_ends_the_run(with_workers):
    """One of 2 MB, and batches of 6 MB."""
    flags = {**with_workers, "resolution": 512, "train_batch_size": 8}
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "
    command = mount + shlex.join([sys.executable, str(SCRIPT), *command_line(flags)])
    result = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "error: a data worker has ended: no memory, or no room in /dev/shm"
    )
    assert "Traceback" not in result.stderr
    assert str(flags["output_dir"]) not in "".join(
        " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])
    )


def test_a_second_signal_leaves_no_data_worker(with_workers):
    process = start(with_workers)
    until_first_update(process)
    process.send_signal(signal.SIGSTOP)  # so that the first signal cannot end it before the second
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    status, _ = end_of(process, seconds=60)
    assert status == 128 + signal.SIGTERM


def test_an_error_of_one_process_ends_them_all(with_workers):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", sys.executable)
    place = "UNet2DConditionModel:forward:3:ZeroDivisionError('unforeseen')"
    started = time.monotonic()
    process = start(with_workers, (*launcher, "-c", RUNNER), RAISE=place, ACCELERATE_USE_CPU="true")
    status, errors = end_of(process, seconds=150)
    assert status == 1
    assert "ZeroDivisionError: unforeseen" in errors
    assert time.monotonic() - started < 120


def test_moments_take_the_layout_of_the_weights_they_are_loaded_for(flags, tmp_path):
    """A checkpoint of a GPU has them channels-last, and the fused optimizer pairs elements by their order in memory."""
    run({**flags, "max_train_steps": 2, "checkpointing_steps": 2, "output_dir": tmp_path / "plain"})
    run({**flags, "max_train_steps": 2, "checkpointing_steps": 2, "output_dir": tmp_path / "turned"})
    path = tmp_path / "turned" / "checkpoint-2" / "optimizer.bin"
    saved = torch.load(path, weights_only=True)
    for state in saved["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].ndim == 4:
                state[name] = state[name].contiguous(memory_format=torch.channels_last)
    size = path.stat().st_size
    torch.save(saved, path)
    assert path.stat().st_size == size
    for name in ("plain", "turned"):
        more = {"max_train_steps": 4, "resume_from_checkpoint": "latest", "output_dir": tmp_path / name}
        run({**flags, **more})
    weights = [
        train_text_to_image.UNet2DConditionModel.from_pretrained(tmp_path / name / "unet").state_dict()
        for name in ("plain", "turned")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_files_have_the_mode_of_the_umask(flags):
    before = os.umask(0o027)
    try:
        run({**flags, "checkpointing_steps": 2})
    finally:
        os.umask(before)
    files = list(flags["output_dir"].rglob("*.safetensors"))
    assert len(files) > 3
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_no_default_data_workers_in_a_small_shared_memory(monkeypatch, flags, caplog):
    """Docker gives a container 64 MB."""
    args = train_text_to_image.parse_args(command_line(flags))

    class Accelerator:
        device = torch.device("cuda")

        def prepare_data_loader(self, dataloader):
            return [dataloader]

    def workers(total):
        usage = type("Usage", (), {"total": total})
        monkeypatch.setattr(train_text_to_image.shutil, "disk_usage", lambda _: usage)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        (dataloader,) = train_text_to_image.make_batches(Accelerator(), args, [], range(4))
        return dataloader.num_workers

    assert workers(2**26) == 0
    assert workers(2**34) == 3
