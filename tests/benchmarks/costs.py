"""What an image costs in FLOPs, and how many FLOPs a second the device does in plain matrix products; as JSON.

    python tests/benchmarks/costs.py --size small --resolution 128

Printed: "flops", {name of the model: FLOPs per training image}, counted by `FlopCounterMode` on the meta device (a
multiply-add is 2; matrix products, convolutions and attention only); "trained", the name of the model that is trained,
whose backward pass is included; "matmul_flops_per_second" on one device, or null with --no_matmul; "device".
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import sizes
import torch
from torch.utils.flop_counter import FlopCounterMode

TOKENS = 77  # of a caption, padded


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(sizes.SIZES), default="small")
    parser.add_argument("--resolution", type=int, help="side of the images, in pixels; default: the size's own")
    parser.add_argument("--no_matmul", action="store_true", help="count only")
    return parser.parse_args(input_args)


def inputs_of(size, models, resolution):
    """What each model takes for one image: {name: (callable, its arguments)}, tensors on the meta device."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, timestep = empty(1, TOKENS, dtype=torch.long), empty(1, dtype=torch.long)
    image, clip_image = empty(1, 3, resolution, resolution), empty(1, 3, 224, 224)
    side = resolution // 8
    if size == "kandinsky-prior":
        width = models["prior"].config.embedding_dim
        mask = empty(1, TOKENS, dtype=torch.bool)
        states = {"proj_embedding": empty(1, width), "encoder_hidden_states": empty(1, TOKENS, width)}
        arguments = {"hidden_states": empty(1, width), "timestep": timestep, **states, "attention_mask": mask}
        calls = {"prior": (models["prior"], arguments), "image_encoder": (models["image_encoder"], [clip_image])}
        return {**calls, "text_encoder": (models["text_encoder"], [tokens])}
    if size == "kandinsky-decoder":
        condition = {"image_embeds": empty(1, models["unet"].config.encoder_hid_dim)}
        arguments = {"sample": empty(1, 4, side, side), "timestep": timestep, "encoder_hidden_states": None}
        calls = {"unet": (models["unet"], {**arguments, "added_cond_kwargs": condition})}
        return {
            **calls,
            "movq": (models["movq"].encode, [image]),
            "image_encoder": (models["image_encoder"], [clip_image]),
        }
    side = resolution // 2 ** (len(models["vae"].config.block_out_channels) - 1)
    states = empty(1, TOKENS, models["unet"].config.cross_attention_dim)
    return {
        "unet": (models["unet"], [empty(1, 4, side, side), timestep, states]),
        "vae": (models["vae"].encode, [image]),
        "text_encoder": (models["text_encoder"], [tokens]),
    }


def count_flops(size, resolution=None):
    """FLOPs per training image: ({name of the model: int}, name of the trained one)."""
    models = sizes.empty_models(size)
    trained, counts = next(iter(models)), {}
    for name, (call, arguments) in inputs_of(size, models, resolution or sizes.SIZES[size][1]).items():
        models[name].requires_grad_(name == trained)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(name == trained):
            output = call(**arguments) if isinstance(arguments, dict) else call(*arguments)
            if name == trained:
                output[0].sum().backward()
        counts[name] = counter.get_total_flops()
    return counts, trained


def matmul_rate(device, seconds=2.0):
    """Most FLOPs a second of a square matrix product: float32 on a CPU, bfloat16 on a GPU."""
    on_gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    repeats, best = 10 if on_gpu else 1, float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / repeats)
    return 2 * side**3 / best


def device_name(device):
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU, {os.cpu_count()} cores, {model or platform.processor() or platform.machine()}"


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts, trained = count_flops(args.size, args.resolution)
    rate = None if args.no_matmul else matmul_rate(device)
    found = {"flops": counts, "trained": trained, "matmul_flops_per_second": rate, "device": device_name(device)}
    print(json.dumps({**found, "device_type": device.type, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(parse_args())
