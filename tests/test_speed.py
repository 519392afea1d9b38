"""What makes the scripts fast changes no result: each lever against the plain way."""

import functools
import importlib
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, reset_accelerate, run
from demo import KEEP_FREED_MEMORY
from diffusers.training_utils import EMAModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from train_text_to_image import training_losses, update_ema

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import memory


def test_the_average_is_diffusers_own():
    """One pass over all weights gives what `EMAModel.step` does."""
    torch.manual_seed(0)
    model, average = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    average.load_state_dict(model.state_dict())
    theirs = EMAModel(model.parameters(), foreach=True)
    for step in range(1, 21):
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape)
        update_ema(average, model, step)
        theirs.step(model.parameters())
    for mine, their in zip(average.parameters(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-6)


# Counted are pages that the system has to clear, of ten tensors of 64 MB, one after the other.
PAGES = """
import resource, torch

for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    cleared = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(cleared)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_taken_again_in_the_demo():
    """By the variables of its training's environment."""
    cleared = []
    for variables in ({}, KEEP_FREED_MEMORY):
        environment = {**os.environ, **variables}
        result = subprocess.run(
            [sys.executable, "-c", PAGES], env=environment, capture_output=True, text=True, check=True
        )
        cleared.append(int(result.stdout))
    assert cleared[0] > 300  # 163,840 of 4 KB each, or 320 of 2 MB
    assert cleared[1] < cleared[0] / 10


def test_pixels_are_exact_on_the_device():
    """uint8 made floats where the models are gives the bits that NumPy gives."""
    values = np.arange(256, dtype=np.uint8)

    class Seen(Exception):
        pass

    class Vae:
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, pixel_values):
            raise Seen(pixel_values)

    with pytest.raises(Seen) as seen:
        training_losses({"pixel_values": torch.from_numpy(values)}, None, Vae(), None, None, None, None)
    np.testing.assert_array_equal(seen.value.args[0].numpy(), values.astype(np.float32) / 255 * 2 - 1)


class CountedReads(TorchDispatchMode):
    """Counts how often tensors are read by Python or decide a shape: the CPU would wait for a GPU.

    Seen are operations of torch, and methods that copy nothing where the tensor is on the CPU already.
    """

    waiting = [torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select]
    methods = ["cpu", "tolist", "numpy"]

    def __init__(self, monkeypatch):
        super().__init__()
        self.number = 0
        for name in self.methods:
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        @functools.wraps(method)
        def counting(*args, **kwargs):
            self.number += 1
            return method(*args, **kwargs)

        return counting

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket in self.waiting
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "script, changes",
    [
        ("train_text_to_image", {}),
        ("train_text_to_image", {"offload_ema": True}),
        ("train_text_to_image", {"snr_gamma": 5.0, "proportion_empty_prompts": 0.5, "mixed_precision": "bf16"}),
        ("train_text_to_image_prior", {}),
        ("train_text_to_image_decoder", {}),
    ],
)
def test_no_value_is_read_between_two_logs(script, changes, flags_of, tmp_path, monkeypatch):
    """As many reads in 3 updates as in 9, in all of the run but for the logs, which come once in both."""
    flags, reads = {**flags_of(script), **changes, "logging_steps": 100}, []
    for steps in (3, 9):
        with monkeypatch.context() as patched, CountedReads(patched) as counted:
            run({**flags, "max_train_steps": steps, "output_dir": tmp_path / str(steps)}, script)
            reset_accelerate()
        reads.append(counted.number)
    assert reads[0] == reads[1] > 0


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: bool(tensor[0] > 0),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor.masked_select(tensor > 0),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.numpy(),
        lambda tensor: np.asarray(tensor),
    ],
)
def test_a_read_would_be_counted(read, monkeypatch):
    with CountedReads(monkeypatch) as counted:
        read(torch.ones(3))
    assert counted.number == 1


def scalars_of(output, name):
    """A value of every update, from the TensorBoard events of all runs into a folder."""
    found = {}
    for events in sorted((output / "logs").glob("*/events*")):
        found |= {event.step: event.value for event in EventAccumulator(str(events)).Reload().Scalars(name)}
    return [value for _, value in sorted(found.items())]


def losses_of(output):
    return scalars_of(output, "train_loss")


@pytest.fixture
def flags_of(folders, images_folder, tmp_path):
    """Function of a script to the flags of a run of four updates, with the average."""

    def of_script(script):
        flags = {**folders[script], "train_data_dir": images_folder, "output_dir": tmp_path / "plain", "seed": 0}
        flags |= {"train_batch_size": 2, "max_train_steps": 4, "lr_warmup_steps": 0, "use_ema": True}
        return {**flags, "resolution": 32, "learning_rate": 1e-3}

    return of_script


@pytest.mark.parametrize("script", ["train_text_to_image", "train_text_to_image_prior"])
def test_norms_in_half_precision_change_the_loss_by_a_rounding(script, flags_of, tmp_path):
    """Of group and layer norms: by less than a unit of bfloat16's last place, against norms as autocast has on GPUs."""
    flags = {**flags_of(script), "mixed_precision": "bf16"}
    with memory.norms_as_on_gpus():
        run(flags, script)
        run({**flags, "output_dir": tmp_path / "half", "half_precision_norms": True}, script)
    plain, half = np.array(losses_of(tmp_path / "plain")), np.array(losses_of(tmp_path / "half"))
    assert (half != plain).any()
    np.testing.assert_allclose(half, plain, rtol=2**-7)


def test_norms_in_half_precision_need_one(flags_of):
    module = importlib.import_module("train_text_to_image")
    with pytest.raises(module.RunError, match="^--half_precision_norms: needs --mixed_precision bf16 or fp16$"):
        run({**flags_of("train_text_to_image"), "half_precision_norms": True})


@pytest.mark.filterwarnings("ignore")
def test_compiled_the_losses_are_the_same(flags_of, tmp_path):
    """And so is what lies in a checkpoint: the compiled blocks keep their names."""
    script = "train_text_to_image_prior"
    flags = flags_of(script)
    run(flags, script)
    run({**flags, "compile": True, "output_dir": tmp_path / "compiled", "checkpointing_steps": 2}, script)
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)
    names = [sorted(path.name for path in (tmp_path / name / "prior").iterdir()) for name in ("plain", "compiled")]
    assert names[0] == names[1]
    run({**flags, "output_dir": tmp_path / "compiled", "resume_from_checkpoint": "checkpoint-2"}, script)
