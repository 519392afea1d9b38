"""Runs a PyTorch script without some of what makes it fast and has no flag, to measure what each of these brings.

    python tests/benchmarks/without.py fused-adamw,one-pass-average train_text_to_image.py --train_data_dir=images ...

Each is replaced by the plain way, in the loaded script: no file is changed.
"""

import contextlib
import functools
import importlib.util
import re
import sys
from pathlib import Path

# Each with the script's function that it stands in. seldom-reading stands in the loop, and has a flag's default.
LEVERS = {
    "fused-adamw": "make_optimizer",
    "one-pass-average": "update_ema",
    "channels-last": "to_device",
    "kept-memory": "keep_freed_memory",
    "byte-pixels": "train_transforms",
    "seldom-reading": "training_losses",
}
# What makes no script faster by itself. norms-of-cpus: on a CPU, autocast leaves norms in half precision.
OTHERS = {"norms-of-cpus": "norm_in_half_precision"}


def levers_of(script):
    """What can be taken away from a script (Path), a list of names; nothing from a script that is not in PyTorch."""
    defined = set(re.findall(r"^def (\w+)\(", script.read_text(encoding="utf-8"), re.MULTILINE))
    levers = {**LEVERS, **OTHERS}
    return [name for name, function in levers.items() if function in defined] if "to_device" in defined else []


def switch_off(module, levers):
    """Replace the functions of a loaded script by plain ones. Returns the flags that have to be added."""
    import numpy as np
    import torch

    if "fused-adamw" in levers:
        adamw = torch.optim.AdamW
        torch.optim.AdamW = lambda parameters, **settings: adamw(parameters, **{**settings, "fused": False})
    if "one-pass-average" in levers:
        module.update_ema = step_average
    if "channels-last" in levers:
        module.to_device = lambda accelerator, model: model.to(accelerator.device)
    if "kept-memory" in levers:
        module.keep_freed_memory = lambda: None
    if "byte-pixels" in levers:
        as_bytes = module.train_transforms
        module.train_transforms = lambda *arguments: as_bytes(*arguments).astype(np.float32)
    return ["--logging_steps", "1"] if "seldom-reading" in levers else []


def step_average(ema, parameters):
    """Take `parameters` into the average one tensor after the other, as `EMAModel` does by itself."""
    ema.foreach = False
    ema.step(parameters)


@contextlib.contextmanager
def norms_as_on_gpus():
    """Have autocast compute norms in float32 on a CPU as well, which it does on GPUs."""
    from torch.nn import functional

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
    import torch

    if not torch.is_autocast_enabled("cpu"):
        return norm(*arguments, **named)
    with torch.autocast("cpu", enabled=False):
        arguments = [value.float() if isinstance(value, torch.Tensor) else value for value in arguments]
        named = {key: value.float() if isinstance(value, torch.Tensor) else value for key, value in named.items()}
        return norm(*arguments, **named)


def main(levers, path, *flags):
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    levers = levers.split(",")
    with norms_as_on_gpus() if "norms-of-cpus" in levers else contextlib.nullcontext():
        module.main(module.parse_args([*flags, *switch_off(module, levers)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
