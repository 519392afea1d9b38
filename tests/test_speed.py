"""What makes the scripts fast changes no result: each lever against the plain way."""

import ctypes
import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, run
from diffusers.training_utils import EMAModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import train_text_to_image
from train_text_to_image import data_workers, update_ema

every_script = pytest.mark.parametrize(
    "script", ["train_text_to_image", "train_text_to_image_prior", "train_text_to_image_decoder"]
)


def test_the_average_is_diffusers_own():
    """One pass over all weights gives what `EMAModel.step` does."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (3,))]
    one, other = (EMAModel(parameters, foreach=True) for _ in range(2))
    for _ in range(20):
        for parameter in parameters:
            parameter.data += torch.randn(parameter.shape)
        update_ema(one, parameters)
        other.step(parameters)
    assert one.optimization_step == other.optimization_step == 20
    for mine, theirs in zip(one.shadow_params, other.shadow_params, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@every_script
def test_freed_memory_is_taken_again(script):
    """Counted in pages that the system has to clear, of ten tensors of 64 MB, one after the other."""
    code = """
import resource, sys, torch

script = __import__(sys.argv[1])
def pages_cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages_cleared())
script.keep_freed_memory()
pages_cleared()
print(pages_cleared())
"""
    result = subprocess.run([sys.executable, "-c", code, script], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert before > 300  # 163,840 of 4 KB each, or 320 of 2 MB
    assert after < before / 10


def test_workers_read_for_a_gpu(monkeypatch):
    class Arguments:
        dataloader_num_workers = None

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert data_workers(Arguments, cpu) == 0
    assert data_workers(Arguments, gpu) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert data_workers(Arguments, gpu) == 3
    Arguments.dataloader_num_workers = 2
    assert data_workers(Arguments, gpu) == data_workers(Arguments, cpu) == 2


def test_pixels_are_exact_on_the_device():
    """uint8 made floats where the models are gives the bits that NumPy gives."""
    seen = []

    class Posterior:
        parameters = None

    class Vae:
        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, pixel_values):
            seen.append(pixel_values)
            return type("Output", (), {"latent_dist": Posterior})

    values = np.arange(256, dtype=np.uint8)
    text_encoder = functools.partial(lambda _: type("Output", (), {"last_hidden_state": None}))
    train_text_to_image.encode({"pixel_values": torch.from_numpy(values), "input_ids": None}, Vae(), text_encoder)
    np.testing.assert_array_equal(seen[0].numpy(), values.astype(np.float32) / 255 * 2 - 1)


class CountedReads(TorchDispatchMode):
    """Counts how often a value of a tensor is read by Python, for which the CPU would wait for a GPU."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_no_value_is_read_between_two_logs(flags, tmp_path):
    """As many reads in 3 updates as in 9, in all of the run but for the logs, which come once in both."""
    reads = []
    for steps in (3, 9):
        with CountedReads() as counted:
            run(
                {
                    **flags,
                    "max_train_steps": steps,
                    "logging_steps": 100,
                    "use_ema": True,
                    "output_dir": tmp_path / str(steps),
                }
            )
        reads.append(counted.number)
    assert reads[0] == reads[1]


def test_a_read_would_be_counted():
    with CountedReads() as counted:
        torch.ones(()).item()
        bool(torch.ones(()) > 0)
    assert counted.number == 2


def losses_of(output):
    """The loss of every update, from the TensorBoard events of a run."""
    (events,) = (output / "logs").glob("*/events*")
    accumulator = EventAccumulator(str(events)).Reload()
    return [event.value for event in accumulator.Scalars("train_loss")]


@pytest.mark.filterwarnings("ignore")
def test_compiled_the_losses_are_the_same(images_folder, tmp_path):
    """And so is what lies in a checkpoint: the compiled blocks keep their names."""
    tiny.make_kandinsky_prior(tmp_path / "prior")
    flags = {"pretrained_prior_model_name_or_path": tmp_path / "prior", "train_data_dir": images_folder, "seed": 0}
    flags |= {"train_batch_size": 2, "max_train_steps": 4, "lr_warmup_steps": 0, "use_ema": True}
    run({**flags, "output_dir": tmp_path / "plain"}, "train_text_to_image_prior")
    compiled = {**flags, "output_dir": tmp_path / "compiled", "compile": True, "checkpointing_steps": 2}
    run(compiled, "train_text_to_image_prior")
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)
    names = [sorted(path.name for path in (tmp_path / name / "prior").iterdir()) for name in ("plain", "compiled")]
    assert names[0] == names[1]
    run(
        {**flags, "output_dir": tmp_path / "compiled", "resume_from_checkpoint": "checkpoint-2"},
        "train_text_to_image_prior",
    )
