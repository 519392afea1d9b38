"""Runs of several processes, on one host and on two: they train as one does, and none is left behind by another."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import faults
import forks
import numpy as np
import PIL.Image
import pytest
import tiny
from conftest import ROOT, command_line, reset_accelerate, run
from faults import SCRIPTS, TRAINED, Process, largest_difference

STABLE_DIFFUSION, PRIOR, DECODER, FLAX, SDXL = SCRIPTS
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# Processes that made the checkpoint, and that go on from it. In JAX other numbers are tested by devices.
WAYS = {script: ("2 to 2",) if "flax" in script else ("2 to 2", "2 to 1", "1 to 2") for script in SCRIPTS}
PROMPTS = ["red dots", "green bars", "a picture of blue dots"]

every_script = pytest.mark.parametrize("script", SCRIPTS)
# The machinery is the same text in the PyTorch scripts.
either_framework = pytest.mark.parametrize("script", [STABLE_DIFFUSION, FLAX])

# Trains again and again, as one of several processes, and notes what this one draws and writes. A library may write by
# other means than Python's: files of process 0 can be read by all, those of the others not, by which they are known.
RECORDER = """
import functools, json, os, shutil, sys, time
from importlib import import_module
from pathlib import Path

folder, (runs, starts) = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
process = os.environ.get("RANK") or os.environ["JAX_PROCESS_ID"]
os.umask(0o022 if process == "0" else 0o027)
record = open(os.devnull, "w")

def note(event, what):
    print(json.dumps([event, what]), file=record, flush=True)

def note_file(event, arguments):
    changes = ("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if (writes or event in changes) and isinstance(arguments[0], (str, bytes, os.PathLike)):
        note("write", os.path.abspath(os.fsdecode(arguments[0])))

def copy_checkpoint(start, output_dir):
    copy = Path(output_dir, "checkpoint-2")
    if process == "0":
        shutil.copytree(Path(start, copy.name), copy.with_suffix(".copy"))
        copy.with_suffix(".copy").rename(copy)
    while not copy.exists():
        time.sleep(0.01)

def noted(call, event, position):
    @functools.wraps(call)
    def function(*arguments, **options):
        note(event, str(arguments[position]))
        return call(*arguments, **options)
    return function

import safetensors
serialize_file = noted(safetensors.serialize_file, "write", 1)  # written in Rust, for its owner alone
for name in ("safetensors", "safetensors.torch"):
    if name in sys.modules:
        sys.modules[name].serialize_file = serialize_file
if not any(script.endswith("flax") for script, *_ in runs):
    import diffusers
    kinds = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "KandinskyV22PriorPipeline")
    for drawing in (getattr(diffusers, kind) for kind in kinds):
        drawing.__call__ = noted(drawing.__call__, "draw", 1)
    import torch
    meet = torch.distributed.init_process_group
    def meet_and_note(*arguments, timeout, **options):
        note("wait", timeout.total_seconds())
        return meet(*arguments, timeout=timeout, **options)
    torch.distributed.init_process_group = meet_and_note
sys.addaudithook(note_file)
for script, name, words, port in runs:
    record = (folder / f"{script}-{name}-{process}.jsonl").open("w")
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}  # a meeting place for each run
    module = import_module(script)
    output_dir = words[words.index("--output_dir") + 1]
    if start := starts.get(output_dir):
        copy_checkpoint(start, output_dir)
    try:
        module.main(module.parse_args(words))
    except module.RunError as error:
        note("refused", str(error))
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
        sys.modules["accelerate.state"].GradientState._reset_state()
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def places_in_jax(address, processes=2):
    """The variables by which so many processes of the script in JAX find each other, of one after the other."""
    for index in range(processes):
        names = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": processes, "PROCESS_ID": index}
        yield {f"JAX_{name}": str(value) for name, value in names.items()}


def children_of(pid):
    """The ids of the processes that a process has started and that still run, and of theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found += [int(path.parent.name), *children_of(path.parent.name)]
    return found


def kill(process):
    """kill -9, with all that a `subprocess.Popen` has started: torchrun gives each worker a session of its own."""
    for pid in [*children_of(process.pid), process.pid] if process.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def finish(commands, environments, folder, seconds=300):
    """Run commands side by side. Returns [(status, what it said to stderr)]."""
    processes = []
    for index, (command, environment) in enumerate(zip(commands, environments, strict=True)):
        with (folder / f"stderr-{index}").open("w") as stderr:
            environment = {**os.environ, **environment}
            if command[0] == sys.executable and command[1] != "-m":
                processes.append(forks.Popen(command[1:], stderr=stderr, env=environment))
            else:
                processes.append(subprocess.Popen(command, stderr=stderr, env=environment, start_new_session=True))
    try:
        statuses = [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            kill(process)
    return [(status, (folder / f"stderr-{index}").read_text()) for index, status in enumerate(statuses)]


def run_two(runs, folder, starts):
    """Train by two processes on this host, again and again; runs: [(script, name, flags)]. All in JAX, or none.

    starts: {output_dir: that of the run whose checkpoint 2 it resumes from}.
    """
    folder.mkdir(exist_ok=True)
    (folder / "recorder.py").write_text(RECORDER)
    runs = [(script, name, command_line(flags), free_port()) for script, name, flags in runs]
    (folder / "runs.json").write_text(json.dumps([runs, starts]))
    program = [str(folder / "recorder.py"), str(folder), str(folder / "runs.json")]
    environment = {"PYTHONPATH": str(ROOT)}
    if runs[0][0] == FLAX:
        environments = [{**place, **environment} for place in places_in_jax(f"127.0.0.1:{free_port()}")]
        results = finish([[sys.executable, *program]] * 2, environments, folder)
    else:
        environment |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **environment} for rank in range(2)]
        results = finish([[sys.executable, *program]] * 2, places, folder)
    for status, said in results:
        assert status == 0, said


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The flags that name models and images, {script: dict}."""
    return faults.make_inputs(tmp_path_factory.mktemp("inputs"))


def flags_of(inputs, script):
    """Of 4 updates of 4 images each, with a checkpoint in the middle.

    AdamW's first updates are g / (|g| + epsilon): of a g near 0, the sign of a rounding error. A larger
    epsilon damps it.
    """
    flags = {**inputs[script], "max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "seed": 0}
    flags |= {"shard_params": True} if script == FLAX else {}
    flags |= {"learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 0, "adam_epsilon": 1e-6}
    return {**flags, "proportion_empty_prompts": 0.2, "validation_rows": 3, "validation_steps": 2}


ONE = {"train_batch_size": 2, "gradient_accumulation_steps": 2}  # 1 process x 2 steps x 2 images
TWO = {"train_batch_size": 1, "gradient_accumulation_steps": 2}  # 2 processes x 2 steps x 1 image
ONE_MORE = {"train_batch_size": 1, "gradient_accumulation_steps": 4}  # 1 process x 4 steps x 1 image
TWO_MORE = {"train_batch_size": 2, "gradient_accumulation_steps": 1}  # 2 processes x 1 step x 2 images


@pytest.fixture(scope="module")
def both_ways(inputs, tmp_path_factory):
    """A function of a script to its runs by one and by two processes, and those that go on from checkpoint 2 of them.

    Of each run its output_dir; and `folder`, where the recorder has noted what the two processes did. The Kandinsky
    scripts and SDXL's, whose checkpoints are made by the same machinery, have but the runs "two" and "one", of the seed
    that "two" has drawn.
    """

    @functools.cache
    def of_kind(scripts):
        folder, runs, flags, starts = tmp_path_factory.mktemp("processes"), [], {}, {}
        for script in scripts:
            of_script = {**flags_of(inputs, script), "validation_prompts": PROMPTS, "validation_steps": 2}
            flags[script] = {
                name: {**of_script, "output_dir": folder / script / name} for name in ("one", "two", *WAYS[script])
            }
            for way in WAYS[script]:
                start = folder / script / ("one" if way == "1 to 2" else "two")
                flags[script][way] |= {"resume_from_checkpoint": "latest", "validation_prompts": None}
                starts[folder / script / way] = start
            if script in (PRIOR, DECODER, SDXL):
                runs.append((script, "two", {**flags[script]["two"], **TWO, "seed": None}))
                continue
            train_by_one({**flags[script]["one"], **ONE}, script)
            shapes = {"two": TWO, "2 to 2": TWO, "1 to 2": TWO_MORE}
            names = [name for name in shapes if name in flags[script]]
            runs += [(script, name, {**flags[script][name], **shapes[name]}) for name in names]
        if STABLE_DIFFUSION in scripts:
            images = tiny.make_images(folder / "broken")
            (images / "5.png").write_bytes(b"no picture")
            refused = {**flags[STABLE_DIFFUSION]["two"], **TWO, "train_data_dir": images}
            runs.append((STABLE_DIFFUSION, "refused", {**refused, "output_dir": folder / "refused"}))
        # The others go on from the checkpoints of "two", so that it has to end first; all by the same two processes.
        run_two(runs, folder, {str(way): str(start) for way, start in starts.items()})
        for script in scripts:
            if script in (PRIOR, DECODER, SDXL):
                seed = faults.state_of_run(folder / script / "two" / "checkpoint-4")["seed"]
                train_by_one({**flags[script]["one"], **ONE, "seed": seed}, script)
            elif "2 to 1" in WAYS[script]:
                shutil.copytree(folder / script / "two" / "checkpoint-2", folder / script / "2 to 1" / "checkpoint-2")
                train_by_one({**flags[script]["2 to 1"], **ONE_MORE}, script)
        return {
            script: {"folder": folder} | {name: folder / script / name for name in ("one", "two", *WAYS[script])}
            for script in scripts
        }

    return lambda script: of_kind((FLAX,) if script == FLAX else (STABLE_DIFFUSION, PRIOR, DECODER, SDXL))[script]


def train_by_one(flags, script):
    run(flags, script)
    reset_accelerate()


def noted(runs, script, process, name="two"):
    """What the recorder has noted of a process in a run by two, [(event, path or prompt)]."""
    text = (runs["folder"] / f"{script}-{name}-{process}.jsonl").read_text()
    return [tuple(json.loads(line)) for line in text.splitlines()]


# The same weights -----------------------------------------------------------------------------------------------------


def difference(script, one, other, step=4):
    """The largest difference of a weight, and of an averaged one, between two runs' checkpoints of the same update."""
    if script == FLAX:
        return largest_difference_of_states(one / f"checkpoint-{step}", other / f"checkpoint-{step}")
    names = (TRAINED[script], f"{TRAINED[script]}_ema")
    return max(largest_difference(one / f"checkpoint-{step}" / n, other / f"checkpoint-{step}" / n) for n in names)


def largest_difference_of_states(one, other, parts=("params", "ema")):
    """Of what checkpoints of JAX hold, whatever number of processes has written them."""
    import jax
    import orbax.checkpoint as ocp

    def read(checkpoint):
        (metadata,) = checkpoint.rglob("_METADATA")
        with ocp.StandardCheckpointer() as reader:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            like = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
                dict(reader.metadata(metadata.parent).item_metadata.tree),
            )
            tree = reader.restore(metadata.parent, like)
        return jax.tree.leaves({name: tree[name] for name in parts})

    pairs = list(zip(map(np.asarray, read(one)), map(np.asarray, read(other)), strict=True))
    if all(a.tobytes() == b.tobytes() for a, b in pairs):
        return 0.0
    return max(float(abs(a.astype(np.float64) - b).max()) for a, b in pairs)


@every_script
def test_two_processes_train_as_one_does(script, both_ways):
    runs = both_ways(script)
    largest = max(difference(script, runs["one"], runs["two"], step) for step in (2, 4))
    print(f"{script}: 1 and 2 processes: {largest:.1e}")
    assert largest <= 1e-5


@every_script
def test_the_validation_loss_is_that_of_one_process(script, both_ways):
    """Of 3 rows: one of two processes repeats one, or all of a batch."""
    runs = both_ways(script)
    losses = {}
    for name in ("one", "two", *WAYS[script]):
        if (runs[name] / "checkpoint-4").exists():
            entries = faults.state_of_run(runs[name] / "checkpoint-4")["validation"]
            losses[name] = [entry[tag] for entry in entries for tag in entry if tag.startswith("validation_loss")]
    assert len(losses) == (2 if script in (PRIOR, DECODER, SDXL) else 2 + len(WAYS[script]))
    assert all(len(values) == 10 for values in losses.values())  # of two evaluations: all timesteps, and four quarters
    difference = max(np.abs(np.divide(values, losses["one"]) - 1).max() for values in losses.values())
    print(f"{script}: {difference:.1e}")
    assert difference <= 1e-6


@either_framework
def test_a_checkpoint_goes_on_with_as_many_and_with_another_number_of_processes(script, both_ways):
    """As many: to the bit. Another number, and accumulation: but for the order of float sums."""
    runs = both_ways(script)
    ways = {way: difference(script, runs["one" if way == "1 to 2" else "two"], runs[way]) for way in WAYS[script]}
    print(f"{script}: " + ", ".join(f"{way}: {largest:.1e}" for way, largest in ways.items()))
    assert ways["2 to 2"] == 0.0
    assert max(ways.values()) <= 1e-5
    if script == FLAX:
        checkpoints = [runs[name] / "checkpoint-4" for name in ("two", "2 to 2")]
        assert largest_difference_of_states(*checkpoints, parts=("params", "ema", "optimizer")) == 0.0
    else:
        moments = [faults.tensors_in(runs[name] / "checkpoint-4") for name in ("two", "2 to 2")]
        assert all(value.tobytes() == moments[1][name].tobytes() for name, value in moments[0].items())


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [STABLE_DIFFUSION, PRIOR, DECODER, SDXL])
def test_prompts_are_shared_out_and_the_picture_is_that_of_one_process(script, both_ways, inputs, tmp_path):
    """3 prompts on 2 processes: each draws two, one of them for nothing, so that all take part in every drawing.

    Compared is the picture of the result with what one process draws that goes on from the last checkpoint, and so has
    nothing left to train: the prior's magnifies differences of 1e-7 between weights to 9 of 255.
    """
    runs = both_ways(script)
    seed = faults.state_of_run(runs["two"] / "checkpoint-4")["seed"]
    drawn = [[what for event, what in noted(runs, script, process) if event == "draw"] for process in range(2)]
    assert [len(prompts) for prompts in drawn] == [2 * 2] * 2
    assert {*drawn[0], *drawn[1]} == set(PROMPTS)
    shutil.copytree(runs["two"] / "checkpoint-4", tmp_path / "drawn" / "checkpoint-4")
    resumed = {"resume_from_checkpoint": "latest", "output_dir": tmp_path / "drawn", "seed": seed}
    run({**flags_of(inputs, script), **ONE, **resumed, "validation_prompts": PROMPTS}, script)
    name = Path("validation", "step-000004.png")
    one, two = (np.asarray(PIL.Image.open(folder / name)).astype(int) for folder in (tmp_path / "drawn", runs["two"]))
    print(f"{script}: pictures of 1 and 2 processes: {abs(one - two).max()} of 255")
    assert abs(one - two).max() <= 1
    assert two.std() > 10  # there is something in it


# Files ----------------------------------------------------------------------------------------------------------------


def paths_below(folder, paths):
    """Those of `paths` (str) that lie in `folder`, seen from there, in a checkpoint by the names it has in the end."""
    inside = {os.path.relpath(path, folder) for path in paths if Path(path).is_relative_to(folder)}
    return {re.sub(r"\.partial|\.orbax-checkpoint-tmp", "", path) for path in inside}


@either_framework
def test_only_one_process_writes_files(script, both_ways):
    """The second of JAX but its part of the checkpoints; by what Python opens, and by whose files there are."""
    runs = both_ways(script)
    output = runs["two"]
    written = [
        paths_below(output, [what for event, what in noted(runs, script, k) if event == "write"]) for k in (0, 1)
    ]
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert {"README.md", *(name for name in files if name.endswith(".safetensors"))} <= written[0]
    # Orbax: each process writes the arrays' parts that it holds, in a folder of its own.
    own = re.compile(r"checkpoint-\d/\w+/(array_metadatas/process_1|ocdbt\.process_1/.*)")
    assert [name for name in written[1] if script != FLAX or not own.fullmatch(name)] == []


# Two hosts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_hosts(tmp_path):
    """Two network namespaces that see each other and nothing else: the words in front of a command to run in each.

    The name of the host leads to its address there, by which gloo lets others find it, as on real hosts.
    """
    names = [f"tests-{os.getpid()}-{k}" for k in (1, 2)]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}"]
    for k, name in enumerate(names, 1):
        commands += [f"-n {name} address add 10.77.0.{k}/24 dev veth0", f"-n {name} link set veth0 up"]
        commands += [f"-n {name} link set lo up"]
    try:
        for command in commands:
            try:
                subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("needs ip, of iproute2")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"needs to make network namespaces: {error.stderr.strip()}")
        prefixes = []
        for k, name in enumerate(names, 1):
            (tmp_path / f"hosts-{k}").write_text(f"127.0.0.1 localhost\n10.77.0.{k} {socket.gethostname()}\n")
            shell = ["sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', str(tmp_path / f"hosts-{k}")]
            prefixes.append(["ip", "netns", "exec", name, *shell])  # which has mounts of its own
        yield prefixes
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_hosts_train_as_one_process_does(two_hosts, both_ways, inputs, tmp_path):
    """By the command of the README, on CPUs. In JAX the address of a host is but a variable, as on one host."""
    flags = {**flags_of(inputs, STABLE_DIFFUSION), **TWO, "output_dir": tmp_path / "output"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=2"]
    launch += ["--num_processes=2", "--main_process_ip=10.77.0.1", "--main_process_port=29500"]
    program = [str(ROOT / f"{STABLE_DIFFUSION}.py"), *command_line(flags)]
    commands = [[*host, *launch, f"--machine_rank={k}", *program] for k, host in enumerate(two_hosts)]
    for status, said in finish(commands, [{"ACCELERATE_USE_CPU": "true"}] * 2, tmp_path):
        assert status == 0, said
    assert difference(STABLE_DIFFUSION, both_ways(STABLE_DIFFUSION)["one"], tmp_path / "output") <= 1e-5


def test_accelerate_launch_that_would_train_alone_on_each_host_is_refused(inputs, tmp_path):
    """Without --multi_gpu it starts one process that knows of no other, where a host has one GPU or none."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=2", "--machine_rank=0"]
    launch += ["--num_processes=2", "--main_process_ip=127.0.0.2", f"--main_process_port={free_port()}"]
    flags = {**flags_of(inputs, STABLE_DIFFUSION), "output_dir": tmp_path / "output"}
    command = [*launch, str(ROOT / f"{STABLE_DIFFUSION}.py"), *command_line(flags)]
    ((status, said),) = finish([command], [{"ACCELERATE_USE_CPU": "true"}], tmp_path)
    assert status == 1
    assert len(re.findall("^error: accelerate launch: .*--multi_gpu", said, re.MULTILINE)) == 1, said
    assert not (tmp_path / "output").exists()


# A process that fails -------------------------------------------------------------------------------------------------


def worker_of(launcher, process):
    """The process id of one of torchrun's workers, which it tells their number by the environment."""
    for pid in children_of(launcher):
        if f"RANK={process}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no worker {process}")


@contextlib.contextmanager
def two_started(script, flags, folder, launcher=TORCHRUN):
    """Two processes, slowed down, within the block; what stands for them: [torchrun], or the two of JAX."""
    if script == FLAX:
        places = places_in_jax(f"127.0.0.1:{free_port()}")
        processes = [Process(script, flags, folder / f"stderr-{k}", True, **place) for k, place in enumerate(places)]
    else:
        processes = [Process(script, flags, folder / "stderr-0", True, launcher, ACCELERATE_USE_CPU="true")]
    try:
        yield processes
    finally:
        for process in processes:
            kill(process.popen)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the worker in /proc")
@either_framework
def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on(script, inputs, tmp_path):
    flags = {**flags_of(inputs, script), **TWO, "max_train_steps": 400, "output_dir": tmp_path / "output"}
    with two_started(script, flags, tmp_path) as processes:
        first = processes[0]
        assert first.until(first.in_loop)
        assert first.until(lambda: faults.check_checkpoints(script, tmp_path / "output"))  # in JAX written meanwhile
        killed = time.monotonic()
        os.kill(worker_of(first.popen.pid, 1) if script != FLAX else processes[1].popen.pid, signal.SIGKILL)
        assert first.wait(seconds=60) != 0
        print(f"{script}: the other one ended after {time.monotonic() - killed:.1f} s, with {first.popen.returncode}")
    (*_, newest) = faults.check_checkpoints(script, tmp_path / "output")
    run({**flags, **ONE, "max_train_steps": newest + 1, "resume_from_checkpoint": True}, script)
    assert (tmp_path / "output" / "model_index.json").is_file()


def make_rows_with_a_bad_one(folder, script):
    """Write a data set of 1,200 rows, of which one that is not checked at the start is bad and in process 1's share.

    Returns its row. The processes take turns in the order of the examples, one row at a time.
    """
    order = importlib.import_module(script).permutation(0, 0, 1200)
    row = next(int(order[position]) for position in range(5, 1200, 2) if order[position] >= 1000)
    png = io.BytesIO()
    PIL.Image.new("RGB", (tiny.RESOLUTION, tiny.RESOLUTION), "red").save(png, "PNG")
    images = [{"bytes": b"no picture" if k == row else png.getvalue(), "path": f"{k}.png"} for k in range(1200)]
    rows = datasets.Dataset.from_dict({"image": images, "text": ["red dots"] * 1200})
    rows.cast_column("image", datasets.Image()).save_to_disk(folder)
    return row


def test_processes_wait_two_hours_for_one_that_works_on(both_ways):
    """It may look through a million images, or encode larger ones. accelerate gives it ten minutes on GPUs."""
    runs = both_ways(STABLE_DIFFUSION)
    waits = [[what for event, what in noted(runs, STABLE_DIFFUSION, k) if event == "wait"] for k in range(2)]
    assert waits == [[7200], [7200]]


def test_a_process_that_fails_alone_says_why_and_ends_the_other(inputs, tmp_path):
    """That of JAX does so while it encodes, in test_flax_cache.py."""
    row = make_rows_with_a_bad_one(tmp_path / "rows", STABLE_DIFFUSION)
    flags = {**flags_of(inputs, STABLE_DIFFUSION), **TWO, "max_train_steps": 400, "output_dir": tmp_path / "output"}
    flags |= {"train_data_dir": None, "dataset_name": tmp_path / "rows", "validation_rows": None}
    with two_started(STABLE_DIFFUSION, flags, tmp_path) as processes:
        assert all(process.wait(seconds=120) != 0 for process in processes)
        said = "".join(process.said() for process in processes)
    assert len(re.findall(rf"error: row {row}: image {row}\.png cannot be read: ", said)) == 1, said


def test_what_only_the_first_process_looks_for_is_told_by_both(both_ways):
    runs = both_ways(STABLE_DIFFUSION)
    said = [dict(noted(runs, STABLE_DIFFUSION, process, "refused"))["refused"] for process in range(2)]
    assert said[0] == said[1]
    assert re.match(r"row 5: image .*5\.png cannot be read", said[0])
    assert not (runs["folder"] / "refused").exists()


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the worker in /proc")
def test_a_signal_to_torchrun_alone_stops_both_processes_with_a_checkpoint(inputs, tmp_path):
    """It passes on SIGTERM and SIGINT, and of others only those that it is told of."""
    flags = {**flags_of(inputs, STABLE_DIFFUSION), **TWO, "max_train_steps": 400, "output_dir": tmp_path / "output"}
    flags["checkpointing_steps"] = 1000
    launcher = (*TORCHRUN, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1")
    with two_started(STABLE_DIFFUSION, flags, tmp_path, launcher) as (process,):
        assert process.until(lambda: process.step() >= 1)
        os.kill(process.popen.pid, signal.SIGUSR1)
        assert process.wait(seconds=60) == 1  # torchrun's own
    (step,) = re.findall(r"stopped by SIGUSR1 after step (\d+); ", process.said())
    assert faults.check_checkpoints(STABLE_DIFFUSION, tmp_path / "output") == [int(step)]
    assert not (tmp_path / "output" / "model_index.json").exists()


def test_a_signal_to_accelerate_launch_and_its_process_stops_with_a_checkpoint(inputs, tmp_path):
    """To the group, as a scheduler may send it. The launcher ends at once, and does not wait for the save."""
    flags = {**flags_of(inputs, STABLE_DIFFUSION), **ONE, "max_train_steps": 400, "output_dir": tmp_path / "output"}
    flags["checkpointing_steps"] = 1000
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu")
    with two_started(STABLE_DIFFUSION, flags, tmp_path, launcher) as (process,):
        assert process.until(lambda: process.step() >= 1)
        workers = children_of(process.popen.pid)
        os.killpg(process.popen.pid, signal.SIGTERM)
        assert process.wait(seconds=60) != 0
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    (step,) = re.findall(r"stopped by SIGTERM after step (\d+); ", process.said())
    assert faults.check_checkpoints(STABLE_DIFFUSION, tmp_path / "output") == [int(step)]
