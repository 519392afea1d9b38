"""What each change to a training step brings on a GPU, on the bare loop: which of them are worth their lines.

    python tests/benchmarks/levers.py --pretrained_model_name_or_path=models --mixed_precision=bf16 --use_ema

Prints a line of JSON per lever: median seconds of a step, images per second, how many times as fast as the loop without
a lever, the peak of `torch.cuda.max_memory_allocated`, the loss after the same number of steps. A lever that fails
prints its error. With --profile, the kernels that take most of a step come last.
"""

import argparse
import contextlib
import functools
import gc
import json
import statistics
import time

import bare_loop
import torch
from torch.nn import functional


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--warmup", type=int, default=3, help="first steps of each, which are not measured")
    parser.add_argument("--steps", type=int, default=9, help="measured steps of each, in three windows")
    parser.add_argument("--profile", action="store_true", help="profile two steps of the loop without a lever")
    own, rest = parser.parse_known_args(input_args)
    return own, bare_loop.parse_args(rest)


@contextlib.contextmanager
def plain(loop):
    yield loop.step


@contextlib.contextmanager
def half_precision_norms(loop):
    """Norms in the precision of their input; autocast has them in float32."""
    own = {name: getattr(functional, name) for name in ("group_norm", "layer_norm")}

    def norm(name, x, shape_or_groups, weight=None, bias=None, eps=1e-5):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = (each if each is None else each.to(x.dtype) for each in (weight, bias))
            return own[name](x, shape_or_groups, weight, bias, eps)

    for name in own:
        setattr(functional, name, functools.partial(norm, name))
    try:
        yield loop.step
    finally:
        for name, norm in own.items():
            setattr(functional, name, norm)


@contextlib.contextmanager
def cudnn_benchmark(loop):
    """cuDNN tries its algorithms at the first call of each shape, and takes the fastest."""
    torch.backends.cudnn.benchmark = True
    try:
        yield loop.step
    finally:
        torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def contiguous(loop):
    """Weights in PyTorch's own order of dimensions, in place of channels-last."""
    loop.unet.to(memory_format=torch.contiguous_format)
    loop.optimizer = loop.make_optimizer()
    try:
        yield loop.step
    finally:
        loop.unet.to(memory_format=torch.channels_last)


@contextlib.contextmanager
def compiled(loop):
    """As --compile does it: block by block."""
    blocks = (*loop.unet.down_blocks, loop.unet.mid_block, *loop.unet.up_blocks)
    for block in blocks:
        block.compile()
    try:
        yield loop.step
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextlib.contextmanager
def optimizer_in_backward(loop):
    """Each weight is updated as soon as its gradient is there, which is then freed: no clipping by the norm of all."""
    hooks, optimizers = [], {}
    for parameter in loop.parameters:
        optimizers[parameter] = torch.optim.AdamW([parameter], lr=loop.args.learning_rate, fused=True)

        def update(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        hooks.append(parameter.register_post_accumulate_grad_hook(update))

    def step():
        loss = loop.loss()
        loss.backward()
        loop.average()
        return loss.detach()

    loop.optimizer = None
    try:
        yield step
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def cuda_graph(loop):
    """The whole step captured once and replayed, so that the CPU starts one graph and no single kernels."""
    loop.optimizer = loop.make_optimizer(capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loop.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loop.step()

    def step():
        graph.replay()
        return loss

    yield step


@contextlib.contextmanager
def both(first, second, loop):
    with first(loop), second(loop) as step:
        yield step


LEVERS = {
    "plain": plain,
    "half-precision-norms": half_precision_norms,
    "cudnn-benchmark": cudnn_benchmark,
    "cuda-graph": cuda_graph,
    "compile": compiled,
    "optimizer-in-backward": optimizer_in_backward,
    "contiguous": contiguous,
    "half-precision-norms cuda-graph": functools.partial(both, half_precision_norms, cuda_graph),
    "compile cuda-graph": functools.partial(both, compiled, cuda_graph),
    "plain again": plain,
}


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(loop, lever, warmup, steps):
    """The figures of a lever, a dict. The weights are what the levers before have left: only the time is compared."""
    on_gpu = loop.device.type == "cuda"
    loop.optimizer = loop.make_optimizer()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with lever(loop) as step:
        started = time.perf_counter()
        for _ in range(warmup):
            step()
        wait(loop.device)
        first = time.perf_counter() - started
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(steps // 3):
                loss = step()
            wait(loop.device)
            seconds.append((time.perf_counter() - started) / (steps // 3))
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        loss = loss.item()
    loop.optimizer = None
    gc.collect()
    median = statistics.median(seconds)
    figures = {"step_seconds": median, "images_per_second": loop.args.train_batch_size / median}
    return {**figures, "warmup_seconds": first, "peak_allocated_bytes": peak, "loss": loss}


def print_profile(loop, count=12):
    """The kernels that take most of two steps, by their own time."""
    loop.optimizer = loop.make_optimizer()
    loop.step()
    wait(loop.device)
    activities = torch.profiler.ProfilerActivity
    kinds = [activities.CPU] + [activities.CUDA] * (loop.device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(2):
            loop.step()
        wait(loop.device)
    key = "self_device_time_total" if loop.device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=count, max_name_column_width=90), flush=True)


def main(own, args):
    loop, base = bare_loop.BareLoop(args), None
    for name in own.levers:
        line = {"lever": name, "batch_size": args.train_batch_size}
        try:
            line |= measure(loop, LEVERS[name], own.warmup, own.steps)
            base = base or line["step_seconds"]
            line["times_plain"] = base / line["step_seconds"]
        except Exception as error:  # the other levers are still to be measured
            line["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        print(json.dumps(line), flush=True)
    if own.profile:
        print_profile(loop)


if __name__ == "__main__":
    main(*parse_args())
