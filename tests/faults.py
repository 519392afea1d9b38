"""Kill a script at random moments, again and again: what it trains must not change by a bit.

    python tests/faults.py [--kills 30] [--seed 0] [script ...]

For each script: one run at a stretch, then one that is killed (kill -9, the whole process group) --kills times and gone
on with. Behind every kill each checkpoint has to be whole and the next start has to go on from the newest; at the end,
weights, averages and optimizer moments have to be those of the first run. `test_faults.py` is the short form.

    python tests/faults.py run-slowly SCRIPT FLAGS...

runs a script as its command line would, with pauses around what it writes, so that a kill can hit it there.
"""

import argparse
import functools
import importlib
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import forks

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [f"train_text_to_image{suffix}" for suffix in ("", "_prior", "_decoder", "_flax", "_sdxl")]
TRAINED = {script: "prior" if script.endswith("prior") else "unet" for script in SCRIPTS}
PAUSE = float(os.environ.get("FAULTS_PAUSE", "0.2"))  # seconds
# What is waited for before a kill, in turn. The last kill of all hits the saving of the result.
MOMENTS = ("save", "prune", "training", "start", "save", "training")
# Keeps a checkpoint for its validation loss, also one that is not due, besides the newest ones.
BEST = {"validation_rows": 2, "validation_steps": 3, "keep_best": True}
PLACES = {
    "start": "before training",
    "training": "in training",
    "save": "in a save",
    "prune": "in a prune",
    "result": "in the result",
}


# The launcher ---------------------------------------------------------------------------------------------------------


def slowly(function, pause=PAUSE, condition=lambda *args: True):
    """The function itself, with a pause before and behind it where the condition holds of its arguments."""

    @functools.wraps(function)
    def slow(*args, **kwargs):
        seconds = pause if condition(*args) else 0
        time.sleep(seconds)
        result = function(*args, **kwargs)
        time.sleep(seconds)
        return result

    return slow


def slow_down(script):
    """Put pauses around all that a script does to write and to remove checkpoints, to write its result, and, shorter
    ones, between updates, so that a run of the tiny models is not over before it can be hit.

    Slowed are the entry points of libraries and of Python itself, whatever functions of the script call them.
    """
    import tqdm.std

    places = [(Path, "rename", PAUSE), (shutil, "rmtree", PAUSE), (os, "fsync", PAUSE / 20)]
    places += [(os, "unlink", PAUSE / 10)]  # by which shutil.rmtree removes file after file
    if script.endswith("flax"):
        import orbax.checkpoint as ocp
        import safetensors.numpy

        places += [(ocp.CheckpointManager, "wait_until_finished", PAUSE)]
        places += [(ocp.StandardCheckpointer, "wait_until_finished", PAUSE), (safetensors.numpy, "save_file", PAUSE)]
    else:
        import diffusers
        import torch

        places += [(torch, "save", PAUSE), (diffusers.ModelMixin, "save_pretrained", PAUSE)]
    for owner, name, pause in places:
        setattr(owner, name, slowly(getattr(owner, name), pause))
    of_updates = lambda bar, *_: getattr(bar, "unit", "") == "step"  # noqa: E731  a hidden bar has none
    tqdm.std.tqdm.update = slowly(tqdm.std.tqdm.update, 0.05, of_updates)


def run_slowly(script, words):
    """Run a script as its command line would, slowed down."""
    slow_down(script)
    path = ROOT / f"{script}.py"
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


# Runs -----------------------------------------------------------------------------------------------------------------


def make_inputs(folder):
    """Write tiny models and images. Returns the flags that name them, {script: dict}."""
    import tiny

    tiny.make_stable_diffusion(folder / "pipeline", levels=1)
    tiny.make_stable_diffusion_xl(folder / "xl")
    tiny.make_kandinsky_prior(folder / "prior")
    tiny.make_kandinsky_decoder(folder / "decoder")
    data = {"train_data_dir": tiny.make_images(folder / "images", caption_lists=True), "resolution": tiny.RESOLUTION}
    kandinsky = {f"pretrained_{part}_model_name_or_path": folder / part for part in ("prior", "decoder")}
    stable_diffusion = {"pretrained_model_name_or_path": folder / "pipeline", "random_flip": True}
    xl = {**stable_diffusion, "pretrained_model_name_or_path": folder / "xl", "num_validation_images": 1}
    own = {script: kandinsky for script in SCRIPTS if re.search("prior|decoder", script)} | {SCRIPTS[-1]: xl}
    return {script: {**data, **own.get(script, stable_diffusion)} for script in SCRIPTS}


def flags_of_run(inputs, steps):
    """The flags of a run of `steps` updates that saves every other one and goes on from what is there."""
    flags = {"train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_steps": steps, "use_ema": True}
    flags |= {"learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 0, "seed": 0, "logging_steps": 5}
    flags |= {"checkpointing_steps": 2, "checkpoints_total_limit": 2, "resume_from_checkpoint": True}
    return {**inputs, **flags}


class Process:
    """A script in a fresh process and process group, at a terminal whose text is in the file `stderr` at all times."""

    def __init__(self, script, flags, stderr, slow=False, launcher=(sys.executable,), **environment):
        from conftest import command_line

        program = [str(Path(__file__)), "run-slowly", script] if slow else [str(ROOT / f"{script}.py")]
        command = [*launcher, *program, *command_line(flags)]
        self.stderr, self.output_dir = Path(stderr), Path(flags["output_dir"])
        environment = {**os.environ, **environment}
        with forks.Terminal(stderr) as self.terminal:
            if len(launcher) == 1:
                self.popen = forks.Popen(command[1:], stderr=self.terminal, env=environment)
            else:
                self.popen = subprocess.Popen(command, stderr=self.terminal, env=environment, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def said(self):
        """All it has written to stderr, each state of the progress bar on a line of its own."""
        self.terminal.copy()
        return self.stderr.read_text(errors="replace").replace("\r", "\n")

    def first_step(self):
        """The update it goes on from, as its log says when the loop begins; None before."""
        found = re.search(r" images, \d+ per step, steps (\d+) to", self.said())
        return found and int(found[1])

    def in_loop(self):
        return self.first_step() is not None

    def step(self):
        """The last update that its progress bar has shown, 0 before."""
        return max((int(step) for step in re.findall(r"(\d+)/\d+ \[[^\]\n]*step", self.said())), default=0)

    def names(self, kind):
        """The steps of half checkpoints in output_dir: "partial", or "removed" if a newer one stands beside it."""
        names = [path.name for path in self.output_dir.glob("checkpoint*")]
        whole = [int(name.removeprefix("checkpoint-")) for name in names if re.fullmatch(r"checkpoint-\d+", name)]
        halves = [re.match(r"checkpoint.(\d+)\.(?:partial|removed|orbax-checkpoint-tmp)", name) for name in names]
        steps = [int(match[1]) for match in halves if match]
        return [step for step in steps if (step < max(whole, default=0)) == (kind == "removed")]

    def until(self, condition, seconds=180):
        """Wait until the condition holds. Returns False if the process ends before; an error or a hang is one here."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.popen.poll() is not None:
                assert self.popen.returncode == 0, self.said()
                return bool(condition())
            assert time.monotonic() < deadline, f"nothing happens:\n{self.said()}"
            time.sleep(0.01)
        return True

    def wait(self, seconds=300):
        return self.popen.wait(timeout=seconds)

    def kill(self):
        """kill -9, the whole process group, if it still runs."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()


def jax_places():
    """The environments of two JAX processes that meet on the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [{**meeting, "JAX_PROCESS_ID": str(index)} for index in range(2)]


# Killing --------------------------------------------------------------------------------------------------------------


def wait_for(moment, process, trained, rng, start_seconds):
    """Wait for a random time of the kind `moment`. Returns False if the process has ended by then."""
    if moment == "start":
        time.sleep(rng.uniform(0, start_seconds))
        return process.popen.poll() is None
    if not process.until(process.in_loop):
        return False
    first, later = process.first_step(), rng.randint(1, 4)
    if moment == "training":  # between two saves
        process.until(lambda: process.step() >= first + later)
    here = {
        "training": lambda: not process.names("partial") and not process.names("removed"),
        "save": lambda: max(process.names("partial"), default=0) > first + (2 if later > 2 else 0),
        "prune": lambda: process.names("removed"),
        "result": lambda: (process.output_dir / trained).is_dir(),
    }[moment]
    while process.until(here) and process.popen.poll() is None:
        time.sleep(rng.uniform(0, (0.5 if moment == "training" else 2) * PAUSE))
        if here() and process.popen.poll() is None:
            return True
    return False


def place_of(process, trained):
    """Where a process was killed, by what it has left behind. What an earlier one left, it removes before its loop."""
    if not process.in_loop():
        return "start"
    for kind, place in (("partial", "save"), ("removed", "prune")):
        if process.names(kind):
            return place
    return "result" if (process.output_dir / trained).is_dir() else "training"


def state_of_run(checkpoint):
    """What the JSON file of a checkpoint says: "step", "seed", "files" and others."""
    return json.loads((checkpoint / "training_state.json").read_text())


def check_checkpoints(script, output_dir):
    """Every checkpoint that the script would find is whole: the files it lists have their sizes. Returns the steps.

    The one that is kept for its loss, by what the newest one says, is among them.
    """
    checkpoints = importlib.import_module(script).list_checkpoints(output_dir)
    for step, path in checkpoints:
        state = state_of_run(path)
        assert state["step"] == step
        assert state["files"]
        for name, size in state["files"].items():
            assert (path / name).stat().st_size == size, f"{path / name}"
    steps = [step for step, _ in checkpoints]
    if checkpoints:
        assert {entry["step"] for entry in state["best"]} <= set(steps), (state["best"], steps)
    return steps


def kill_again_and_again(script, flags, moments, seed, folder, say=lambda line: None):
    """Run a script to its end through a kill at each of the `moments`. Returns how many there were of each place.

    folder: for what it says. Raises AssertionError, or the script's RunError, if a kill did harm.
    """
    places, rng, start_seconds, steps = Counter(), random.Random(f"{script} {seed}"), 5.0, []
    output_dir, trained = flags["output_dir"], TRAINED[script]
    for number, moment in enumerate(moments):
        started = time.monotonic()
        with Process(script, flags, folder / f"stderr-{number}", slow=True) as process:
            if moment != "start" and process.until(process.in_loop):
                start_seconds = time.monotonic() - started
                assert process.first_step() == max(steps, default=0), process.said()  # not from an older one
            alive = wait_for(moment, process, trained, rng, start_seconds)
        if not alive:
            say(f"{script}: at its end before kill {number + 1}")
            break
        place = place_of(process, trained)
        left = sorted(path.name for path in output_dir.glob("checkpoint-*"))
        steps = check_checkpoints(script, output_dir)
        places[place] += 1
        say(f"{script}: kill {number + 1} {PLACES[place]}, which left {', '.join(left) or 'no checkpoint'}")
    with Process(script, flags, folder / "stderr-last") as process:
        assert process.wait() == 0, process.said()
        assert process.first_step() == max(steps, default=0), process.said()
    return places


# Comparing ------------------------------------------------------------------------------------------------------------


def tensors_in(folder):
    """Every tensor of a checkpoint or of a model's folder, {name: NumPy array}."""
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for path in folder.rglob("*.safetensors"):
        tensors |= {f"{path.relative_to(folder)} {name}": value.numpy() for name, value in load_file(path).items()}
    if (folder / "optimizer.bin").exists():
        moments = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
        for index, state in moments.items():
            tensors |= {f"optimizer {index} {name}": torch.as_tensor(value).numpy() for name, value in state.items()}
    for metadata in folder.rglob("_METADATA"):  # Orbax's, of the arrays that JAX trains
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as reader:
            tree = reader.restore(metadata.parent)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        tensors |= {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return tensors


def largest_difference(one, other):
    """The largest difference of a number in two folders; 0.0 only if no bit differs, not even of what is no number."""
    one, other = tensors_in(one), tensors_in(other)
    assert one.keys() == other.keys()
    assert one
    largest = 0.0
    for name, value in one.items():
        if value.tobytes() != other[name].tobytes():
            difference = abs(value.astype("float64") - other[name].astype("float64")).max()
            largest = max(largest, float(difference) or sys.float_info.min, key=lambda x: math.inf if x != x else x)
    return largest


def difference_of_runs(script, one, other, steps):
    """The largest difference between two runs: of their results, and of all that their last checkpoints hold.

    Raises AssertionError if they kept other checkpoints or had other validation losses.
    """
    assert check_checkpoints(script, one) == check_checkpoints(script, other)
    histories = [state_of_run(output / f"checkpoint-{steps}")["validation"] for output in (one, other)]
    assert histories[0] == histories[1]
    folders = (TRAINED[script], f"checkpoint-{steps}")
    return max(largest_difference(one / folder, other / folder) for folder in folders)


# The long form --------------------------------------------------------------------------------------------------------


def moments_of(kills):
    return [*(MOMENTS[number % len(MOMENTS)] for number in range(kills - 1)), "result"]


def kill_all(script, inputs, kills, seed, folder):
    """Do all that the docstring above says, for one script, and print a line about it. Returns whether it held."""
    steps = 2 * kills + 10  # a kill lets through 2 updates on average, and 6 at most
    flags = {**flags_of_run(inputs, steps), **BEST, "output_dir": folder / "killed"}
    with Process(script, {**flags, "output_dir": folder / "whole"}, folder / "stderr-whole") as process:
        assert process.wait(seconds=900) == 0, process.said()
    say = functools.partial(print, flush=True)
    places = kill_again_and_again(script, flags, moments_of(kills), seed, folder, say)
    difference = difference_of_runs(script, folder / "whole", folder / "killed", steps)
    counts = ", ".join(f"{places[place]} {name}" for place, name in PLACES.items())
    say(f"{script}: {places.total()} kills in {steps} updates ({counts}), largest difference {difference}")
    return difference == 0.0


def main(input_args=None):
    usage = "%(prog)s [--kills 30] [--seed 0] [script ...]"
    parser = argparse.ArgumentParser(description=__doc__, usage=usage, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how often to kill each script; at least 3")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, metavar="script", help=", ".join(SCRIPTS))
    args = parser.parse_args(input_args)
    scripts = [Path(script).stem for script in args.scripts]
    if unknown := set(scripts) - set(SCRIPTS):
        parser.error(f"no such script: {', '.join(sorted(unknown))}")
    if args.kills < 3:
        parser.error("argument --kills: must be at least 3")

    import conftest  # noqa: F401  it sets what every test's process runs with

    sys.path.insert(0, str(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache" / "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    inputs = make_inputs(folder)
    held = []
    for script in scripts:
        (folder / script).mkdir()
        held.append(kill_all(script, inputs[script], args.kills, args.seed, folder / script))
    if not all(held):
        sys.exit(f"the trained weights differ; the runs are kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run-slowly"]:
        run_slowly(sys.argv[2], sys.argv[3:])
    else:
        main()
