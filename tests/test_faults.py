"""Runs that are killed, stopped by a signal, or out of disk: nothing is lost, and the weights do not change by a bit.

`make faults` kills each script many times more.
"""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
import torch
from conftest import ROOT, command_line, reset_accelerate, run
from faults import (
    SCRIPTS,
    TRAINED,
    Process,
    check_checkpoints,
    difference_of_runs,
    flags_of_run,
    jax_places,
    largest_difference,
)

STABLE_DIFFUSION, PRIOR, DECODER, FLAX, SDXL = SCRIPTS
STEPS = 12

# The machinery is the same text in the PyTorch scripts.
either_framework = pytest.mark.parametrize("script", [STABLE_DIFFUSION, FLAX])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function of a script to its run of STEPS updates at a stretch: its flags and output_dir."""
    folder = tmp_path_factory.mktemp("faults")
    inputs = faults.make_inputs(folder)

    @functools.cache
    def of_script(script):
        flags = {**flags_of_run(inputs[script], STEPS), "output_dir": folder / script}
        run(flags, script)
        reset_accelerate()
        return SimpleNamespace(flags=flags, output=flags["output_dir"])

    return of_script


def names_in(folder):
    """What lies in an output_dir of checkpoints, whole or not."""
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def assert_one_line_of_full_disk(said, name):
    """About the checkpoint `name`, and no traceback."""
    lines = re.findall(r"^error: .*", said, re.MULTILINE)
    assert len(lines) == 1, said
    assert name in lines[0]
    assert "No space left on device" in lines[0]
    assert "Traceback" not in said


def assert_resumes(script, flags, whole_run, capfd):
    """The run goes on from its newest checkpoint and ends with the same bits as the one at a stretch."""
    newest = max(check_checkpoints(script, flags["output_dir"]))
    run(flags, script)
    assert str(flags["output_dir"] / f"checkpoint-{newest}") in capfd.readouterr().err
    results = [output / TRAINED[script] for output in (whole_run.output, flags["output_dir"])]
    assert largest_difference(*results) == 0.0


# kill -9 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "moments"),
    [(STABLE_DIFFUSION, ["save", "prune", "result"]), (SDXL, ["save"]), (FLAX, ["save", "prune", "result"])],
)
def test_killed_inside_a_save_a_prune_and_the_result(script, moments, whole, tmp_path):
    """And gone on with each time: results and last checkpoints do not differ by a bit."""
    at_a_stretch = whole(script)
    if script == STABLE_DIFFUSION:  # JAX would compile the validation loss for seconds: `make faults`
        at_a_stretch = SimpleNamespace(flags={**at_a_stretch.flags, **faults.BEST, "output_dir": tmp_path / "whole"})
        run(at_a_stretch.flags, script)
        reset_accelerate()
    flags = {**at_a_stretch.flags, "output_dir": tmp_path / "killed"}
    places = faults.kill_again_and_again(script, flags, moments, 0, tmp_path, print)
    assert places.total() == len(moments)
    assert places["save"] >= 1
    assert difference_of_runs(script, at_a_stretch.flags["output_dir"], flags["output_dir"], STEPS) == 0.0


# A full disk ----------------------------------------------------------------------------------------------------------

# As root in a mount namespace, as anyone else in a user namespace as well: nothing stays mounted, whatever happens.
NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
ON_SMALL_DISK = """
disk=$1 copy=$2 size=$3; shift 3
mount -t tmpfs -o size=$size tmpfs "$disk" || exit 99
"$@"
status=$?
cp -a "$disk/." "$copy"
exit $status
"""


def small_disk(size, folder):
    """The words in front of a command that has a disk of so many bytes at folder/disk, copied to folder/copy after."""
    for name in ("disk", "copy"):
        (folder / name).mkdir(exist_ok=True)
    shell = [*NAMESPACE, "sh", "-c", ON_SMALL_DISK, "sh"]
    return [*shell, str(folder / "disk"), str(folder / "copy"), str(size)]


@pytest.fixture
def can_mount(tmp_path):
    try:
        refused = subprocess.run([*small_disk("1m", tmp_path), "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare, of util-linux")
    if refused.returncode:
        pytest.skip(f"needs to mount a file system of its own: {refused.stderr.strip()}")


def size_on_disk(*paths):
    """Bytes that files, and all files in folders, take of a file system with pages of 4 KiB."""
    files = [path for folder in paths for path in (folder, *folder.rglob("*")) if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def sizes_of(whole_run):
    """The bytes of a checkpoint, and those of all that a run writes besides checkpoints and logs."""
    others = [path for path in whole_run.output.iterdir() if not re.match("checkpoint-|logs", path.name)]
    return max(map(size_on_disk, whole_run.output.glob("checkpoint-*"))), size_on_disk(*others)


def run_on_small_disk(script, flags, size, folder):
    """Train with output_dir on a disk of `size` bytes. Returns (status, what it said); the copy is folder/copy."""
    flags = {**flags, "output_dir": folder / "disk" / "output"}
    command = [*small_disk(size, folder), sys.executable, str(ROOT / f"{script}.py"), *command_line(flags)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", timeout=300)
    assert result.returncode != 99, result.stderr
    return result.returncode, result.stderr.replace("\r", "\n")


def size_before_checkpoints(script, result):
    """Bytes that a script writes to output_dir before its first checkpoint: the logs, and in JAX most of the result."""
    return (result if script == FLAX else 0) + 64 * 1024


@either_framework
def test_a_disk_that_is_full_at_the_second_checkpoint(script, whole, can_mount, tmp_path, capfd):
    """One line, the earlier checkpoint whole and nothing of the next; with room again it goes on to the same bits."""
    checkpoint, result = sizes_of(whole(script))
    # Orbax writes up to half as much again as it keeps.
    size = size_before_checkpoints(script, result) + int((1.75 if script == FLAX else 1.5) * checkpoint)
    flags = {**whole(script).flags, "checkpoints_total_limit": None}
    status, said = run_on_small_disk(script, flags, size, tmp_path)
    print(f"{script}: checkpoint {checkpoint} bytes, result {result} bytes, disk {size} bytes, ended with {status}")
    assert_one_line_of_full_disk(said, "checkpoint-")
    assert status == 1
    output = tmp_path / "copy" / "output"
    failed = int(re.search(r"^error: .*?/checkpoint-(\d+)", said, re.MULTILINE)[1])  # Orbax's sizes vary
    assert failed == 4 or (script == FLAX and failed == 6)
    assert names_in(output) == [f"checkpoint-{step}" for step in range(2, failed, 2)]
    assert check_checkpoints(script, output) == list(range(2, failed, 2))
    assert_resumes(script, {**flags, "output_dir": output}, whole(script), capfd)


# Signals --------------------------------------------------------------------------------------------------------------


def send_in_loop(process, number, pid=None):
    """Send a signal to a process, or to `pid`, when an update is done. Returns the update that was shown by then."""
    assert process.until(process.in_loop)
    assert process.until(lambda: process.step() >= 1)
    os.kill(pid or process.popen.pid, number)
    return process.step()


def step_of_stop(said, number):
    """The update after which a process says that a signal has stopped it, in one line."""
    pattern = rf"^[\d:]+ WARNING stopped by {signal.Signals(number).name} after step (\d+); .*--resume_from_checkpoint"
    (step,) = re.findall(pattern, said, re.MULTILINE)
    return int(step)


@either_framework
def test_a_signal_ends_a_run_with_a_checkpoint(script, whole, tmp_path, capfd):
    """Of the next update, which is not one of --checkpointing_steps; no result is saved; the rest has the same bits."""
    flags, number = (
        {**whole(script).flags, "checkpointing_steps": 1000, "output_dir": tmp_path / "output"},
        signal.SIGTERM,
    )
    with Process(script, flags, tmp_path / "stderr", slow=True) as process:
        shown = send_in_loop(process, number)
        assert process.wait() == 128 + number, process.said()
    step = step_of_stop(process.said(), number)
    assert shown <= step < STEPS
    assert "Traceback" not in process.said()
    assert names_in(tmp_path / "output") == [f"checkpoint-{step}"]
    assert not (tmp_path / "output" / "model_index.json").exists()
    assert not (tmp_path / "output" / TRAINED[script]).exists()
    assert_resumes(script, flags, whole(script), capfd)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_the_other_signals_end_a_run_likewise(number, whole, tmp_path, monkeypatch, capfd):
    """Sent in this process, during the third update."""
    flags = {**whole(STABLE_DIFFUSION).flags, "checkpointing_steps": 1000, "output_dir": tmp_path / "output"}
    updates, step = [], torch.optim.AdamW.step

    def step_and_signal(self, *args, **kwargs):
        updates.append(step(self, *args, **kwargs))
        if len(updates) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim.AdamW, "step", step_and_signal)
    with pytest.raises(BaseException) as end:
        run(flags)
    said = f"{end.value}\n{capfd.readouterr().err}"
    assert re.search(rf"stopped by {number.name} after step 3; .*--resume_from_checkpoint", said)
    assert check_checkpoints(STABLE_DIFFUSION, tmp_path / "output") == [3]


@either_framework
def test_a_second_signal_ends_a_run_at_once(script, whole, tmp_path):
    """It comes while the checkpoint for the first is written, which pauses of 3 s keep from being done soon."""
    flags = {**whole(script).flags, "checkpointing_steps": 1000, "output_dir": tmp_path / "output"}
    with Process(script, flags, tmp_path / "stderr", slow=True, FAULTS_PAUSE="3") as process:
        send_in_loop(process, signal.SIGTERM)
        process.until(lambda: process.names("partial"))
        time.sleep(1.5)  # within a second it is taken for the first, which launchers pass on
        sent = time.monotonic()
        os.kill(process.popen.pid, signal.SIGTERM)
        assert process.wait(seconds=20) == 128 + signal.SIGTERM
        assert time.monotonic() - sent < 2
    assert check_checkpoints(script, tmp_path / "output") == []


def worker_of(launcher, rank):
    """The process id of one of torchrun's workers, which it tells their rank by the environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    raise AssertionError(f"no worker of rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the worker in /proc")
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(whole, tmp_path):
    """Of torchrun, to the one that does not speak."""
    flags = {**whole(STABLE_DIFFUSION).flags, "checkpointing_steps": 1000, "output_dir": tmp_path / "output"}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    environment = {"ACCELERATE_USE_CPU": "true"}
    with Process(STABLE_DIFFUSION, flags, tmp_path / "stderr", True, torchrun, **environment) as process:
        assert process.until(process.in_loop)
        send_in_loop(process, signal.SIGTERM, worker_of(process.popen.pid, rank=1))
        assert process.wait() != 0  # torchrun has a status of its own
    steps = re.findall(r"WARNING stopped by SIGTERM after step (\d+); ", process.said(), re.MULTILINE)
    assert len(steps) in (1, 2)
    assert len(set(steps)) == 1
    assert names_in(tmp_path / "output") == [f"checkpoint-{steps[0]}"]
    assert check_checkpoints(STABLE_DIFFUSION, tmp_path / "output") == [int(steps[0])]
    assert not (tmp_path / "output" / "model_index.json").exists()


def test_a_signal_to_one_of_two_processes_in_jax_stops_both_after_the_same_step(whole, tmp_path):
    flags = {**whole(FLAX).flags, "checkpointing_steps": 1000, "output_dir": tmp_path / "output"}
    processes = [Process(FLAX, flags, tmp_path / f"stderr-{k}", True, **place) for k, place in enumerate(jax_places())]
    with processes[0] as first, processes[1] as second:
        send_in_loop(first, signal.SIGTERM, second.popen.pid)
        statuses = [process.wait() for process in processes]
    assert statuses == [128 + signal.SIGTERM] * 2, first.said() + second.said()
    steps = re.findall(r"WARNING stopped by SIGTERM after step (\d+); ", first.said() + second.said(), re.MULTILINE)
    assert len(steps) in (1, 2)
    assert len(set(steps)) == 1
    assert names_in(tmp_path / "output") == [f"checkpoint-{steps[0]}"]
    assert check_checkpoints(FLAX, tmp_path / "output") == [int(steps[0])]
    assert not (tmp_path / "output" / "model_index.json").exists()
