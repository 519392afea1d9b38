"""How much GPU memory a training step needs at real size, from the shapes of its tensors alone: no GPU is needed.

    python tests/benchmarks/memory.py --size sd15

A step of the script is gone through in bfloat16 with tensors that have a shape but no content, and the bytes of all
that are there at a time are added up: weights, gradients, moments, average, what the backward pass needs, frozen
models. What a GPU takes on top is not in it: CUDA's own half gigabyte or so, work space of kernels, and gaps between
tensors. The norms' inputs are kept in float32, as autocast has them on GPUs.
"""

import argparse
import contextlib
import functools
import math
import re
import sys
import tempfile
import weakref
from pathlib import Path

import costs
import sizes
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

GIB = 2**30

# The flags of a run, with what they do here.
RUNS = {
    "--use_ema": {},
    "--use_ema --cache_encodings": {"cached": True},
    "--use_ema --gradient_checkpointing": {"recomputed": True},
    "--use_ema --gradient_checkpointing --use_8bit_adam": {"recomputed": True, "bytes_of_moments": 2},
    "--use_ema --offload_ema --gradient_checkpointing --use_8bit_adam": {
        "recomputed": True,
        "bytes_of_moments": 2,
        "average": False,
    },
    "--use_ema --rank 16": {"rank": 16},
    "--use_ema --rank 16 --cache_encodings --gradient_checkpointing": {"rank": 16, "cached": True, "recomputed": True},
}


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made while it is on, for as long as they are there."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return made


def recompute(size, model):
    """--gradient_checkpointing, as the scripts do it."""
    if sizes.kind_of(size) != "prior":
        model.enable_gradient_checkpointing()
        return
    for block in model.transformer_blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


@contextlib.contextmanager
def norms_as_on_gpus():
    """Have autocast compute norms in float32 on a CPU as well, which it does on GPUs."""
    own = {name: getattr(functional, name) for name in ("group_norm", "layer_norm")}
    try:
        for name, norm in own.items():
            setattr(functional, name, functools.partial(norm_in_float32, norm))
        yield
    finally:
        for name, norm in own.items():
            setattr(functional, name, norm)


def norm_in_float32(norm, *arguments, **named):
    """`norm`, a function of `torch.nn.functional`, as autocast computes it on GPUs."""
    if not torch.is_autocast_enabled("cpu"):
        return norm(*arguments, **named)
    with torch.autocast("cpu", enabled=False):
        arguments = [value.float() if isinstance(value, torch.Tensor) else value for value in arguments]
        named = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in named.items()}
        return norm(*arguments, **named)


class Adapted(torch.nn.Module):
    """A linear layer with an adapter beside it, as peft computes it; peft itself takes no tensors without content."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x.float()))


def add_adapter(model, rank):
    """--rank, as the scripts do it: all else is frozen in bfloat16."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(weight.to(torch.bfloat16), requires_grad=False))
    layers = [name for name, _ in model.named_modules() if re.search(r"\.(to_q|to_k|to_v|to_out\.0)$", name)]
    for name in layers:
        model.set_submodule(name, Adapted(model.get_submodule(name), rank))


def peak_bytes(
    size, batch_size=1, resolution=None, *, cached=False, recomputed=False, bytes_of_moments=8, average=True, rank=None
):
    """The most bytes that are there at a time in a training step of a size, in bfloat16.

    cached: the frozen models are elsewhere; bytes_of_moments: for each weight; average: it is on the device; rank: of
    an adapter that is trained in place of the model.
    """
    with FakeTensorMode(), LiveBytes() as live, norms_as_on_gpus():
        models = sizes.empty_models(size, device="cpu", frozen_dtype=torch.bfloat16, only_trained=cached)
        shape = {"batch_size": batch_size, "device": "cpu", "dtype": torch.bfloat16}
        calls = costs.inputs_of(size, models, resolution or sizes.SIZES[size][1], **shape)
        trained = next(iter(models))
        model, frozen = models[trained].train(), [call for name, call in calls.items() if name != trained]
        if rank:
            add_adapter(model, rank)
            live.peak = live.now  # the step's, not that of the change of type
        if recomputed:
            recompute(size, model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kept = [torch.empty_like(parameter) for parameter in parameters if average]
        kept += [torch.empty(bytes_of_moments * p.numel(), dtype=torch.uint8) for p in parameters]
        for _ in range(2):
            with torch.no_grad():
                made = [costs.called(*call) for call in frozen]
            with torch.autocast("cpu", torch.bfloat16):
                loss = costs.called(*calls[trained])[0].float().square().mean()
            del made
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for parameter in parameters:
                parameter.grad = None
        del kept, norm
    return live.peak


def measured_bytes(size, flags, batch_size, resolution, work):
    """The peak of `torch.cuda.max_memory_allocated` in three steps of the script. work: Path with models and images."""
    import benchmark

    script, side = sizes.SIZES[size]
    images = next(work.glob(f"images-{side}-*"))
    command = [sys.executable, benchmark.ROOT / script, "--train_data_dir", images, "--resolution", resolution or side]
    for name, folder in benchmark.model_flags(size, work / f"models-{size}").items():
        command += [name, folder]
    command += ["--train_batch_size", batch_size, "--max_train_steps", 3, "--mixed_precision", "bf16"]
    command += ["--center_crop", "--report_to", "none"]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        flags = flags.replace("--cache_encodings", f"--cache_encodings {scratch}/cache").split()
        command += [*flags, "--output_dir", f"{scratch}/output"]
        return benchmark.launch_here([str(word) for word in command], {"HF_HUB_OFFLINE": "1"}, None).peak_gpu_bytes


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [size for size in sizes.SIZES if size not in {**sizes.OWN_CONFIGS, **sizes.SMALLER}]
    parser.add_argument("--size", nargs="+", choices=list(sizes.SIZES), default=real, help="which models")
    parser.add_argument("--batch_size", type=int, default=1, help="images per step and GPU")
    parser.add_argument("--resolution", type=int, help="side of the images, in pixels; default: the size's own")
    measure = "also measure on a GPU, with the models and images that benchmark.py has left in this --work_dir"
    parser.add_argument("--work_dir", type=Path, help=measure)
    args = parser.parse_args(input_args)
    for name in ("batch_size", "resolution"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"argument --{name}: must be larger than 0, not {getattr(args, name)}")
    return args


def main(args):
    """Print a table of the sizes."""
    images = f"{args.batch_size} image{'s' * (args.batch_size > 1)}"
    measured = "; measured / computed" if args.work_dir else ""
    print(f"GiB of all tensors of a step with {images}, bfloat16, AdamW{measured}.\n")
    print(f"| flags | {' | '.join(args.size)} |")
    print("|---|" + "---|" * len(args.size))
    for flags, run in RUNS.items():
        cells = []
        for size in args.size:
            known = "--offload_ema" not in flags or sizes.kind_of(size).startswith("stable-diffusion")
            peak = peak_bytes(size, args.batch_size, args.resolution, **run) if known else None
            cells.append(f"{peak / GIB:.1f}" if peak else "no such flag")
            if peak and args.work_dir:
                found = measured_bytes(size, flags, args.batch_size, args.resolution, args.work_dir.resolve())
                cells[-1] = f"{found / GIB if found else math.nan:.1f} / {cells[-1]}"
        print(f"| `{flags}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(parse_args())
