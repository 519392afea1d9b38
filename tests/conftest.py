"""Fixtures: tiny checkpoints and images made once a session; the scripts run in this process or in a fresh one.

Nothing heavy is imported here, so that the tests which only read the scripts run without torch.
"""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # one for each process, and the same sums in every process
os.environ["JAX_PLATFORMS"] = "cpu"
# The tests compile much and compute little: in a third of the time with these.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import forks
import pytest

ROOT = Path(__file__).resolve().parents[1]


# The files that take longest begin first, so that pytest's processes end at about the same time.
SLOWEST = [
    "processes",
    "faults",
    "flax_training",
    "benchmarks",
    "flax_cache",
    "safety",
    "security",
    "cache",
    "flax_models",
]


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))  # stable: else in pytest's own order


def pytest_sessionfinish():
    """Data workers of runs in this process ignore SIGTERM: Python would wait for them when it ends."""
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Caches of data sets and of what JAX has compiled, of the session's own, also for the processes it starts."""
    folder = tmp_path_factory.mktemp("cache")
    if "datasets" in sys.modules:  # it has read the variable by now
        sys.modules["datasets"].config.HF_DATASETS_CACHE = folder
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    settings = {"jax_compilation_cache_dir": str(folder / "jax"), "jax_persistent_cache_min_compile_time_secs": 0.3}
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    for name, value in settings.items() if "jax" in sys.modules else ():  # likewise
        sys.modules["jax"].config.update(name, value)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    import tiny

    folder = tmp_path_factory.mktemp("pipeline")
    tiny.make_stable_diffusion(folder, levels=1)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory, pipeline_folder):
    """The folders of pipelines by the flag that names them, for each PyTorch script."""
    import tiny

    prior, decoder, xl = (tmp_path_factory.mktemp(name) for name in ("prior", "decoder", "xl"))
    tiny.make_stable_diffusion_xl(xl)
    tiny.make_kandinsky_prior(prior)
    tiny.make_kandinsky_decoder(decoder)
    of_prior = {"pretrained_prior_model_name_or_path": prior}
    return {
        "train_text_to_image": {"pretrained_model_name_or_path": pipeline_folder},
        "train_text_to_image_sdxl": {"pretrained_model_name_or_path": xl},
        "train_text_to_image_prior": of_prior,
        "train_text_to_image_decoder": {**of_prior, "pretrained_decoder_model_name_or_path": decoder},
    }


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory):
    import tiny

    return tiny.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def caption_lists_folder(tmp_path_factory):
    import tiny

    return tiny.make_images(tmp_path_factory.mktemp("caption_lists"), caption_lists=True)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate keeps its state per process; every run of a script in this process starts without it."""
    yield
    reset_accelerate()


def reset_accelerate():
    """For a further run of a script in the same test."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture
def flags(pipeline_folder, images_folder, tmp_path):
    """The flags of a short run on the tiny pipeline, as a dict; a value of True stands for a switch."""
    return {
        "pretrained_model_name_or_path": pipeline_folder,
        "train_data_dir": images_folder,
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "lr_warmup_steps": 0,
        "seed": 0,
        "output_dir": tmp_path / "output",
    }


# python -c IMPATIENT SCRIPT FLAGS: runs a script that does not wait long for anything.
IMPATIENT = """
import runpy, sys, time

sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.1))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command_line(flags):
    """Turn {"name": value} into the words of a command line; None and False leave a flag out."""
    words = []
    for name, value in flags.items():
        if value is True:
            words += [f"--{name}"]
        elif value is not None and value is not False:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(flags, script="train_text_to_image"):
    """Run a script's `main` in this process."""
    module = importlib.import_module(script)
    module.main(module.parse_args(command_line(flags)))


def launch(flags, launcher=(sys.executable,), script="train_text_to_image", **environment):
    """Run a script in a fresh process. Returns `subprocess.CompletedProcess` with stdout and stderr as text."""
    command = [*launcher, str(ROOT / f"{script}.py"), *command_line(flags)]
    if len(launcher) == 1 and not environment:  # libraries may read it when they are imported
        return forks.run(command[1:])
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def launch_two(flags, script="train_text_to_image", before=(), **environment):
    """Run a PyTorch script in two processes that train together, without a launcher. Returns both, as `launch` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    meeting = {**os.environ, **environment, **meeting, "ACCELERATE_USE_CPU": "true"}
    words = [*before, str(ROOT / f"{script}.py"), *command_line(flags)]
    with ThreadPoolExecutor() as pool:
        places = [{**meeting, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return list(pool.map(lambda place: forks.run(words, place), places))
