"""Runs a PyTorch script without some of what makes it fast and has no flag, to measure what each of these brings.

    python tests/benchmarks/without.py fused-adamw,one-pass-average train_text_to_image.py --train_data_dir=images ...

Each is replaced by the plain way, in the loaded script: no file is changed.
"""

import importlib.util
import re
import sys
from pathlib import Path

# Each with the script's function that it stands in. seldom-reading stands in the loop, and has a flag's default.
LEVERS = {
    "fused-adamw": "make_optimizer",
    "one-pass-average": "update_ema",
    "channels-last": "to_device",
    "byte-pixels": "train_transforms",
    "seldom-reading": "training_losses",
}


def levers_of(script):
    """What can be taken away from a script (Path), a list of names; nothing from a script that is not in PyTorch."""
    defined = set(re.findall(r"^def (\w+)\(", script.read_text(encoding="utf-8"), re.MULTILINE))
    return [name for name, function in LEVERS.items() if function in defined] if "to_device" in defined else []


def switch_off(module, levers):
    """Replace the functions of a loaded script by plain ones. Returns the flags that have to be added."""
    import numpy as np
    import torch

    if "fused-adamw" in levers:
        adamw = torch.optim.AdamW
        torch.optim.AdamW = lambda parameters, **settings: adamw(parameters, **{**settings, "fused": False})
    if "one-pass-average" in levers:
        module.update_ema = update_by_tensor
    if "channels-last" in levers:
        module.to_device = lambda accelerator, model, trained=False: model.to(accelerator.device)
    if "byte-pixels" in levers:
        as_bytes = module.train_transforms
        module.train_transforms = lambda *arguments: as_bytes(*arguments).astype(np.float32)
    return ["--logging_steps", "1"] if "seldom-reading" in levers else []


def update_by_tensor(ema, model, step):
    """Do what `update_ema` does, one tensor after the other."""
    decay = min(0.9999, step / (9 + step)) if step > 1 else 0
    for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(weight.detach(), 1 - decay)  # ema's parameters need no gradient


def main(levers, path, *flags):
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(module.parse_args([*flags, *switch_off(module, levers.split(","))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
