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


def inputs_of(size, models, resolution, batch_size=1, device="meta", dtype=torch.float32):
    """What each of the models takes for a batch of images: {name: (callable, its arguments)}, tensors without content.

    dtype: of images and embeddings.
    """

    def empty(*shape, dtype=dtype):
        return torch.empty((batch_size, *shape), dtype=dtype, device=device)

    def call(name, arguments):
        return {name: (getattr(models[name], "encode", models[name]), arguments)} if name in models else {}

    tokens, timestep = empty(TOKENS, dtype=torch.long), empty(dtype=torch.long)
    image, clip_image, side = empty(3, resolution, resolution), empty(3, 224, 224), resolution // 8
    if sizes.kind_of(size) == "prior":
        width = models["prior"].config.embedding_dim
        mask = empty(TOKENS, dtype=torch.bool)
        states = {"proj_embedding": empty(width), "encoder_hidden_states": empty(TOKENS, width)}
        arguments = {"hidden_states": empty(width), "timestep": timestep, **states, "attention_mask": mask}
        return {**call("prior", arguments), **call("image_encoder", [clip_image]), **call("text_encoder", [tokens])}
    if sizes.kind_of(size) == "decoder":
        condition = {"image_embeds": empty(models["unet"].config.encoder_hid_dim)}
        arguments = {"sample": empty(4, side, side), "timestep": timestep, "encoder_hidden_states": None}
        unet = call("unet", {**arguments, "added_cond_kwargs": condition})
        return {**unet, **call("movq", [image]), **call("image_encoder", [clip_image])}
    latents = empty(4, *[resolution // sizes.vae_factor(size)] * 2)
    states = empty(TOKENS, models["unet"].config.cross_attention_dim)
    unet = {"sample": latents, "timestep": timestep, "encoder_hidden_states": states}
    if sizes.kind_of(size) == "stable-diffusion-xl":
        width = sizes.configs_of(size)["text_encoder_2"]["projection_dim"]
        unet["added_cond_kwargs"] = {"text_embeds": empty(width), "time_ids": empty(6)}
    texts = {**call("text_encoder", [tokens]), **call("text_encoder_2", [tokens])}
    return {**call("unet", unet), **call("vae", [image]), **texts}


def called(function, arguments):
    """The function's result; its arguments are a list or, by name, a dict."""
    return function(**arguments) if isinstance(arguments, dict) else function(*arguments)


def count_flops(size, resolution=None):
    """FLOPs per training image: ({name of the model: int}, name of the trained one)."""
    models = sizes.empty_models(size)
    trained, counts = next(iter(models)), {}
    for name, (call, arguments) in inputs_of(size, models, resolution or sizes.SIZES[size][1]).items():
        models[name].requires_grad_(name == trained)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(name == trained):
            output = called(call, arguments)
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
