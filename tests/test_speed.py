"""What makes the scripts fast changes no result: each lever against the plain way."""

import ctypes
import functools
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, run
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import train_text_to_image
from train_text_to_image import data_workers, update_ema

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

from without import norms_as_on_gpus

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
        ("train_text_to_image", {"optimizer_in_backward": True, "max_grad_norm": "inf"}),
        ("train_text_to_image", {"snr_gamma": 5.0, "proportion_empty_prompts": 0.5}),
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{"compile": True}, {"compile": "reduce-overhead", "optimizer_in_backward": True}])
def test_compiled_the_losses_are_the_same(changes, flags_of, tmp_path):
    """And so is what lies in a checkpoint: the compiled blocks keep their names."""
    script = "train_text_to_image_prior"
    flags = {**flags_of(script), "max_grad_norm": "inf"}
    run(flags, script)
    compiled = {**flags, **changes, "output_dir": tmp_path / "compiled", "checkpointing_steps": 2}
    run(compiled, script)
    assert losses_of(tmp_path / "compiled") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)
    names = [sorted(path.name for path in (tmp_path / name / "prior").iterdir()) for name in ("plain", "compiled")]
    assert names[0] == names[1]
    run({**flags, "output_dir": tmp_path / "compiled", "resume_from_checkpoint": "checkpoint-2"}, script)


def trained(output):
    """{name: tensor} of the weights and averages in a run's last checkpoint, and the state of its optimizer."""
    (checkpoint,) = output.glob("checkpoint-4")
    weights = {str(path.relative_to(checkpoint)): load_file(path) for path in checkpoint.rglob("*.safetensors")}
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    return weights | {f"optimizer {number}": tensors for number, tensors in state.items()}


@every_script
@pytest.mark.parametrize("use_8bit_adam", [False, True])
def test_updates_in_the_backward_pass_are_the_same_to_the_bit(script, use_8bit_adam, flags_of, tmp_path, monkeypatch):
    """Also of a run that has gone on from a checkpoint, and one that recomputes activations."""
    monkeypatch.setattr(importlib.import_module(script).StepInBackward, "enough", 4096)  # so that there are many steps
    flags = {**flags_of(script), "use_8bit_adam": use_8bit_adam, "max_grad_norm": "inf", "checkpointing_steps": 2}
    run(flags, script)
    own = {**flags, "output_dir": tmp_path / "own", "optimizer_in_backward": True, "gradient_checkpointing": True}
    run({**own, "max_train_steps": 2}, script)
    run({**own, "resume_from_checkpoint": "latest"}, script)
    for name, expected in trained(tmp_path / "plain").items():
        for key, value in trained(tmp_path / "own")[name].items():
            torch.testing.assert_close(
                value, expected[key], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert losses_of(tmp_path / "own") == losses_of(tmp_path / "plain")
    norms = [scalars_of(tmp_path / name, "grad_norm") for name in ("own", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert min(norms[0]) > 0


@every_script
def test_gradients_are_freed_while_the_backward_pass_goes_on(script):
    """At the most 64 MB and the one that makes them so many; the optimizer has all its parameters afterwards."""
    module = importlib.import_module(script)
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(12)])  # 16 MB each
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    in_backward, alive = module.StepInBackward(optimizer), []
    for parameter in model.parameters():
        parameter.register_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.ones(1, 2048)).sum().backward()
    assert alive == [0, 1, 2, 3] * 3
    norm = in_backward.finish()
    changes = [old - new for old, new in zip(before, model.parameters(), strict=True)]
    expected = torch.linalg.vector_norm(torch.stack([change.norm() for change in changes]))
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)
    assert all(change.any() for change in changes)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


@every_script
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--half_precision_norms --mixed_precision no", "--half_precision_norms: needs --mixed_precision bf16 or fp16"),
        ("--optimizer_in_backward", "--optimizer_in_backward: nothing can be clipped by then; add --max_grad_norm=inf"),
        ("--optimizer_in_backward --max_grad_norm inf --gradient_accumulation_steps 2", "leaves no gradient to"),
        ("--optimizer_in_backward --max_grad_norm inf --mixed_precision fp16", "does not work with fp16"),
    ],
)
def test_levers_that_exclude_each_other(script, words, message, flags_of, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as exit_:
        module.parse_args([*command_line(flags_of(script)), *words.split()])
    assert exit_.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert message in line


@every_script
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"half_precision_norms": True}, "NO"),
        ({"optimizer_in_backward": True, "max_grad_norm": "inf"}, "MULTI_CPU"),
        ({"compile": "reduce-overhead"}, "FSDP"),
    ],
)
def test_levers_that_accelerate_s_configuration_excludes(script, changes, kind, flags_of, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(module.Accelerator, "distributed_type", module.DistributedType[kind])
    monkeypatch.setattr(module.Accelerator, "is_fsdp2", True)
    with pytest.raises(module.RunError, match="^--" + next(iter(changes))):
        run({**flags_of(script), **changes}, script)


@every_script
def test_weights_have_the_layout_in_which_bitsandbytes_leaves_them(script, flags_of, monkeypatch):
    """Else the first update would change it behind what is compiled, and behind the average."""
    module, flags = importlib.import_module(script), command_line(flags_of(script))
    model = torch.nn.Conv2d(8, 8, 3)
    monkeypatch.setattr(
        module, "to_device", lambda _, model: model.to(memory_format=torch.channels_last)
    )  # as on a GPU
    module.prepare_for_training(None, module.parse_args(flags), model, ())
    assert not model.weight.is_contiguous()
    module.prepare_for_training(None, module.parse_args([*flags, "--use_8bit_adam"]), model, ())
    assert model.weight.is_contiguous()


@every_script
@pytest.mark.parametrize("norm", [torch.nn.GroupNorm(4, 8), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8, bias=False)])
def test_norms_in_half_precision(script, norm):
    """Within half a unit of bfloat16's last place, of 8 bits, of what float32 gives; and float32 without autocast."""
    module = importlib.import_module(script)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, 8, generator=generator).bfloat16()
    expected = norm(hidden.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = module.norm_in_half_precision(norm, hidden)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=2**-16)
    assert torch.equal(module.norm_in_half_precision(norm, hidden.float()), expected)


@every_script
def test_norms_in_half_precision_change_the_loss_by_a_rounding_error(script, flags_of, tmp_path):
    """Against norms in float32, as autocast has them on GPUs: by less than a unit of bfloat16's last place."""
    flags = {**flags_of(script), "mixed_precision": "bf16"}
    with norms_as_on_gpus():
        run(flags, script)
        run({**flags, "output_dir": tmp_path / "half", "half_precision_norms": True}, script)
    plain, half = np.array(losses_of(tmp_path / "plain")), np.array(losses_of(tmp_path / "half"))
    assert (half != plain).any()
    np.testing.assert_allclose(half, plain, rtol=2**-7)
