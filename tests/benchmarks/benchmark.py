"""Measures how fast the scripts train, with and without what makes them faster, and against any other script.

    python tests/benchmarks/benchmark.py --size small --levers plain workers cache --versus tests/benchmarks/recipe.py
    python tests/benchmarks/benchmark.py --size sd15 --levers plain cache --versus ../diffusers/examples/.../script.py

Each run is a process of its own, as a user starts it, on random weights and synthetic images. In each round every lever
and every other script has its turn, in rotated order, so that what else the machine does falls on all alike, and ratios
are taken within a round. The README beside this file says what each number is.
"""

import argparse
import collections
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report
import sizes  # its import makes tests/ importable
import without
from freed_memory import KEEP_FREED_MEMORY

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAX = "train_text_to_image_flax.py"
SWEEPS = ("batch_sizes", "rows", "processes")
LARGEST_FOLDER = 5000  # rows; more are a data set saved by `datasets`
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "jax", "flax")

# What a lever adds to the plain run's flags. "without": what `without.py` takes away from it. "cached": the encoders do
# not run in a step, and a first run fills the cache, whose folder stands where {cache} does. A lever whose flag is not
# in the script's --help is skipped.
WORKERS = ["--dataloader_num_workers", str(min(8, os.cpu_count() or 1))]
CACHE = ["--cache_encodings", "{cache}"]
LEVERS = {
    "plain": {},
    "workers": {"flags": WORKERS},
    "cache": {"flags": CACHE, "cached": True},
    "cache-workers": {"flags": [*CACHE, *WORKERS], "cached": True},
    "compile": {"flags": ["--compile"]},
    "cache-compile": {"flags": [*CACHE, "--compile"], "cached": True},
    "cache-half-norms": {"flags": [*CACHE, "--half_precision_norms"], "cached": True},
    "gradient-checkpointing": {"flags": ["--gradient_checkpointing"]},
    "8-bit-adamw": {"flags": ["--use_8bit_adam"]},
    "offloaded-average": {"flags": ["--offload_ema"]},
    "memory-returned": {"memory_returned": True},  # without the variables of `freed_memory.py`, which others have
    # What has no flag: without all of it, and with one alone.
    "bare": {"without": list(without.LEVERS)},
    **{f"bare+{own}": {"without": [name for name in without.LEVERS if name != own]} for own in without.LEVERS},
}
ALONE = [name for name in LEVERS if name.startswith("bare")]

# A script with what is added to its flags, and taken away. known: the flags that its --help lists.
Versus = collections.namedtuple("Versus", "name path flags")
Variant = collections.namedtuple("Variant", "name kind script known flags cached without")
Point = collections.namedtuple("Point", "batch_size rows processes")
Outcome = collections.namedtuple(
    "Outcome", "status started output peak_resident_bytes peak_private_bytes peak_gpu_bytes"
)


class RunFailed(Exception):
    """A training process ended with an error, or logged too little to measure; says which and why in one line."""


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(input_args=None):
    raw, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s FLAGS (--help lists them)"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--size", choices=list(sizes.SIZES), default="small", help="which models, of random weights")
    add("--script", type=Path, help="what trains; default: the PyTorch script of the size")
    levers = "what to add to the script's flags, each; 'alone': what has no flag, taken away, and added one by one"
    add("--levers", nargs="+", choices=[*LEVERS, "alone"], default=["plain"], help=levers)
    versus = "other scripts that take the same flags, to compare with; as one word with more flags: 'script.py --flag'"
    add("--versus", nargs="+", type=shlex.split, default=[], help=versus)
    add("--rounds", type=int, default=3, help="runs of everything, in turns")
    add("--steps", type=int, help="updates of a run, warm-up among them; default: as --seconds says")
    add("--warmup", type=int, default=3, help="first updates that are not measured")
    add("--seconds", type=float, default=20, help="how long the measured part of a run is to take")
    add("--logging_steps", type=int, default=5, help="updates from one reading of the loss to the next, where known")
    add("--batch_sizes", nargs="+", type=int, default=[4], help="images per step and process; several: a sweep")
    add("--rows", nargs="+", type=int, default=[256], help="images in the data set; several: a sweep")
    add("--processes", nargs="+", type=int, default=[1], help="started by torchrun if more than 1; several: a sweep")
    add("--resolution", type=int, help="side of the images in pixels; default: the size's own")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="of every run")
    add("--use_ema", action="store_true", help="keep an average of the weights, in every run")
    add("--flags", default="", help='more flags of every run, as one word: --flags="--random_flip --snr_gamma 5"')
    add("--seed", type=int, default=0, help="of every run")
    add("--output", type=Path, default=HERE / "results", help="folder of the results; a report makes a folder in it")
    add("--name", help="of the report's folder; default: size, kind of device, and what is swept")
    here = "run all in this process, and save no result: quicker, and the peak of GPU memory is that of tensors alone"
    add("--here", action="store_true", help=here)
    add("--work_dir", type=Path, help="keep models, images and caches here for the next report; default: removed")
    args = parser.parse_args(input_args)
    args.levers = [own for name in args.levers for own in (ALONE if name == "alone" else [name])]
    args.versus = [Versus(" ".join([Path(path).stem, *flags]), Path(path), flags) for path, *flags in args.versus]
    check_args(parser, args)
    return args


def check_args(parser, args):
    """End with status 2 and one line for what can't be run."""
    for name in ("rounds", "steps", "warmup", "seconds", "logging_steps", "resolution"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"argument --{name}: must be larger than 0, not {getattr(args, name)}")
    for name in SWEEPS:
        if min(getattr(args, name)) < 1:
            parser.error(f"argument --{name}: must be larger than 0, not {min(getattr(args, name))}")
    if len(swept := [name for name in SWEEPS if len(getattr(args, name)) > 1]) > 1:
        parser.error(f"several values for one flag at a time, not for --{' and --'.join(swept)}")
    for path in (args.script, *(other.path for other in args.versus)):
        if path and not path.is_file():
            parser.error(f"{path}: there is no such script")
    if script_of(args).name == FLAX and max(args.processes) > 1:
        parser.error(f"argument --processes: torchrun starts no processes of {FLAX}")
    if "plain" not in args.levers:
        parser.error("argument --levers: 'plain' has to be among them, it is what the others are compared with")
    if args.here and (max(args.processes) > 1 or any(LEVERS[name].get("without") for name in args.levers)):
        parser.error("argument --here: several processes, and what is taken away from a script, need processes")
    names = [*args.levers, *(other.name for other in args.versus)]
    if len(set(names)) < len(names):
        parser.error(f"two runs of one name: {' '.join(names)}")
    if args.steps and args.steps < (least := first_mark(args) + args.logging_steps):
        parser.error(f"argument --steps: with this --warmup and --logging_steps at least {least}, not {args.steps}")


def script_of(args):
    return (args.script or ROOT / sizes.SIZES[args.size][0]).resolve()


def first_mark(args):
    """The update at whose end the measured part begins: see `report.marks`."""
    return math.ceil((args.warmup - 1) / args.logging_steps) * args.logging_steps + 1


# ----------------------------------------------------------------------------------------------------------------------
# One training run
# ----------------------------------------------------------------------------------------------------------------------


def known_flags(script):
    """The flags that a script's --help lists, as a set of str."""
    command = [sys.executable, str(script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    if result.returncode:
        raise RunFailed(f"{script.name} --help: {last_line(result.stderr)}")
    return set(re.findall(r"(?<![\w-])--[a-zA-Z0-9][\w-]*", result.stdout))


def last_line(text):
    """The line of an output that says why a process ended: the last error in it, or else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?(error|[\w.]*(Error|Exception)\b).*: ", line)]
    return (errors or lines or ["no output"])[-1]


def model_flags(size, folder):
    """The flags that name the models of a size, which lie in `folder` (Path)."""
    if sizes.kind_of(size).startswith("stable-diffusion"):
        return {"--pretrained_model_name_or_path": folder}
    flags = {"--pretrained_prior_model_name_or_path": folder / "prior"}
    if sizes.kind_of(size) == "decoder":
        flags["--pretrained_decoder_model_name_or_path"] = folder / "decoder"
    return flags


def training_command(args, variant, point, steps, folders):
    """The command of a run, a list of str. folders: {"models", "images", "cache", "output"}: Path."""
    data = "--dataset_name" if (folders["images"] / "state.json").exists() else "--train_data_dir"
    flags = {
        **model_flags(args.size, folders["models"]),
        data: folders["images"],
        "--output_dir": folders["output"],
        "--resolution": args.resolution or sizes.SIZES[args.size][1],
        "--center_crop": None,
        "--train_batch_size": point.batch_size,
        "--max_train_steps": steps,
        "--learning_rate": 1e-4,
        "--lr_scheduler": "constant",
        "--lr_warmup_steps": 0,
        "--mixed_precision": args.mixed_precision,
        "--seed": args.seed,
        "--checkpointing_steps": 10**9,  # none: the disk is not what is measured
        "--logging_steps": args.logging_steps,
        "--report_to": "tensorboard",
        **({"--use_ema": None} if args.use_ema else {}),
    }
    words = [str(HERE / "without.py"), ",".join(variant.without)] if variant.without else []
    words.append(str(variant.script))
    for name, value in flags.items():
        if name in variant.known:
            words += [name] if value is None else [name, str(value)]
    words += [word.replace("{cache}", str(folders["cache"])) for word in (*variant.flags, *shlex.split(args.flags))]
    if point.processes == 1:
        return [sys.executable, *words]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={point.processes}",
        *words,
    ]


def environment_of(variant, point):
    """The environment of a run: the CPU's cores are shared out over the processes, unless OMP_NUM_THREADS is set."""
    threads = str(max(1, (os.cpu_count() or 1) // point.processes))
    device = {} if shutil.which("nvidia-smi") else {"ACCELERATE_USE_CPU": "true"}  # else each would train alone there
    memory = {} if LEVERS.get(variant.name, {}).get("memory_returned") else KEEP_FREED_MEMORY
    return {"OMP_NUM_THREADS": threads, **device, **os.environ, **memory, "HF_HUB_OFFLINE": "1"}


def private_bytes(process):
    """Resident bytes that are no pages of files, of a process (its id) or the largest of those that it has started.

    0 if the process has ended, and where the system is not Linux.
    """
    folder = Path(f"/proc/{process}")
    try:
        status = (folder / "status").read_text()
        started = (folder / f"task/{process}/children").read_text().split()  # torchrun's are those that train
    except OSError:
        return 0
    own = sum(int(kibibytes) * 1024 for kibibytes in re.findall(r"Rss(?:Anon|Shmem):\s*(\d+) kB", status))
    return max([own, *map(private_bytes, started)])


def launch(command, environment, log):
    """Run a command to its end, with its output in the file `log` (Path). Returns an `Outcome`.

    This process stays small, and imports no torch: the system counts the memory of the process that starts another one
    to the peak of that, too.
    """
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=250"]
    samples = log.with_suffix(".gpu")  # a line per GPU and sample, in MiB
    peak_private, ended = 0, 0
    with log.open("wb") as output, samples.open("wb") as used:
        watcher = subprocess.Popen(query, stdout=used, stderr=subprocess.DEVNULL) if shutil.which(query[0]) else None
        started = time.time()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while not ended:
                peak_private = max(peak_private, private_bytes(process.pid))
                time.sleep(0.25)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            for own in filter(None, (process, watcher)):
                if own.poll() is None:
                    own.terminate()
                    own.wait()
    mebibytes = [int(line) for line in samples.read_text().splitlines() if line.strip().isdigit()]
    text = log.read_text(encoding="utf-8", errors="replace")
    peak_gpu = max(mebibytes) * 2**20 if mebibytes else None
    return Outcome(process.returncode, started, text, usage.ru_maxrss * 1024, peak_private or None, peak_gpu)


def launch_here(command, environment, log):
    """As `launch`, in this process and without saving the result. Raises RunFailed."""
    script, *flags = command[1:]
    os.environ.update(environment)
    spec = importlib.util.spec_from_file_location(Path(script).stem, script)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    torch = sys.modules.get("torch")  # not in the first run
    if torch and torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.time()
    try:
        spec.loader.exec_module(module)
        for name in ("save_result", "save_frozen_parts"):
            if hasattr(module, name):
                setattr(module, name, lambda *arguments, **named: None)
        module.main(module.parse_args(flags))
    except (Exception, SystemExit) as error:
        raise RunFailed(f"{Path(script).name}: {type(error).__name__}: {last_line(str(error))}") from None
    finally:
        if state := sys.modules.get("accelerate.state"):
            state.AcceleratorState._reset_state(reset_partial_state=True)
            state.GradientState._reset_state()
        del module, sys.modules[spec.name]
        gc.collect()
    torch = sys.modules.get("torch")
    peak = torch.cuda.max_memory_allocated() or None if torch else None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Outcome(0, started, "", resident, None, peak)


def public_command(command, variant, work):
    """A command as one line without the folders of this machine: WORK stands for `work` (Path)."""
    line = shlex.join(command).replace(sys.executable, "python").replace(str(work), "WORK")
    return line.replace(f"{HERE}{os.sep}", "").replace(f"{variant.script.parent}{os.sep}", "")


def read_through(folder):
    """Read all files in `folder` (Path), so that the system has as much of them in memory as it can hold."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file, open(os.devnull, "wb") as nowhere:
                shutil.copyfileobj(file, nowhere)


def train(args, variant, point, steps, folders):
    """One training run. Returns what was measured, a dict, with every update's loss. Raises RunFailed."""
    with tempfile.TemporaryDirectory(dir=folders["work"]) as scratch:
        folders = {**folders, "output": Path(scratch, "output")}
        command = training_command(args, variant, point, steps, folders)
        read_through(folders["images"])
        read_through(folders["cache"])
        start = launch_here if args.here else launch
        outcome = start(command, environment_of(variant, point), Path(scratch, "log.txt"))
        if outcome.status:
            raise RunFailed(f"{variant.name}: exit status {outcome.status}: {last_line(outcome.output)}")
        updates = report.read_updates(folders["output"] / "logs")
    window = args.logging_steps if "--logging_steps" in variant.known else 1
    marks = report.marks(updates, args.warmup, window)
    if len(marks) < 2:
        raise RunFailed(f"{variant.name}: {len(updates)} updates are too few to measure")
    return {
        **report.speed(marks, point.batch_size * point.processes),
        "first_step_seconds": updates[0][1] - outcome.started,
        "peak_resident_bytes": outcome.peak_resident_bytes,
        "peak_private_bytes": outcome.peak_private_bytes,
        "peak_gpu_bytes": outcome.peak_gpu_bytes,
        "steps": steps,
        "losses": [[step, loss] for step, _, loss in updates],
        "command": public_command(command, variant, folders["work"]),
    }


# ----------------------------------------------------------------------------------------------------------------------
# A report
# ----------------------------------------------------------------------------------------------------------------------


def helper(name, *words):
    """Run one of the files beside this one in a process of its own; returns its standard output."""
    command = [sys.executable, str(HERE / name), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RunFailed(f"{name}: {last_line(result.stderr)}")
    return result.stdout


def prepare(args, work):
    """Make models and images in `work` (Path) where they are not there yet, and ask each script for its flags.

    Returns the folders of the models and, by number of rows, of the images; and {script: its flags}.
    """
    resolution = args.resolution or sizes.SIZES[args.size][1]
    models, saved = work / f"models-{args.size}", max(args.rows) > LARGEST_FOLDER
    images = {rows: work / f"images-{resolution}-{rows}{'-saved' * saved}" for rows in args.rows}
    tasks = [] if models.exists() else [("models", "--size", args.size, "--folder", models)]
    for rows, folder in images.items():
        if not folder.exists():
            words = ("images", "--resolution", resolution, "--rows", rows, "--folder", folder)
            tasks.append(words + ("--saved",) * saved)
    scripts = [script_of(args), *(other.path.resolve() for other in args.versus)]
    with ThreadPoolExecutor(2) as executor:
        made = [executor.submit(helper, "sizes.py", *words) for words in tasks]
        flags = dict(zip(scripts, executor.map(known_flags, scripts), strict=True))
        for task in made:
            task.result()
    return models, images, flags


def variants_of(args, known):
    """The variants to run, and the names of the levers that the script has no flag for: (list, list of str).

    known: {script: its flags}.
    """
    script, variants, skipped = script_of(args), [], []
    own_levers = without.levers_of(script)
    for name in args.levers:
        lever = LEVERS[name]
        flags, taken = lever.get("flags", []), [word for word in lever.get("without", []) if word in own_levers]
        missing = [word for word in flags if word.startswith("--") and word not in known[script]]
        missing += [word for word in [name.partition("+")[2]] if word and word not in own_levers]
        if missing or (name == "bare" and not taken):
            skipped.append(f"{name}: skipped, {script.name} has no {' '.join(missing) or 'such levers'}")
            continue
        variants.append(Variant(name, "lever", script, known[script], flags, lever.get("cached", False), taken))
    for name, path, flags in args.versus:
        variants.append(Variant(name, "versus", path.resolve(), known[path.resolve()], flags, False, []))
    return variants, skipped


def planned_steps(args, estimate):
    """Updates of a run, whose measured part lasts --seconds at the speed of `estimate` (dict)."""
    if args.steps:
        return args.steps
    windows = max(2, math.ceil(args.seconds / estimate["step_seconds"] / args.logging_steps))
    return first_mark(args) + windows * args.logging_steps


def versions():
    """{package: version} of those installed, with Python's."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit():
    """The commit of this repository, with -dirty if files differ from it; None outside one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or None


def write_line(path, line):
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def work_shares(costs, variant, point, images_per_second, more_flags=""):
    """FLOPs per image of a run, and the share of the device's matmul rate that it reaches."""
    cached = variant.cached or variant.name == "bare_loop" or "--cache_encodings" in more_flags
    flops = costs["flops"][costs["trained"]] if cached else sum(costs["flops"].values())
    devices = point.processes if costs["device_type"] == "cuda" else 1  # processes on a CPU share it
    share = flops * images_per_second / (costs["matmul_flops_per_second"] * devices)
    return {"flops_per_image": flops, "share_of_matmul_rate": share}


def run_point(args, point, variants, folders, record, costs):
    """All runs of one point of a sweep: estimates and fills, then the rounds. Returns the lines of what failed.

    record: a function that writes a line of the report.
    """
    failures, steps = [], {}
    cache = "-".join(["cache", args.size, *map(str, point)])  # of each lever its own, except --here

    def cache_of(variant):
        return folders["work"] / (f"{cache}-here" if args.here else f"{cache}-{variant.name}")

    def attempt(variant, steps, **what):
        try:
            own = {**folders, "cache": cache_of(variant)}
            measured = train(args, variant, point, steps, own)
        except RunFailed as failure:
            failures.append(str(failure))
            record(**what, **point._asdict(), variant=variant.name, kind=variant.kind, failed=str(failure))
            print(f"failed: {failure}", flush=True)
            return None
        shares = work_shares(costs, variant, point, measured["images_per_second"], args.flags)
        record(**what, **point._asdict(), variant=variant.name, kind=variant.kind, **shares, **measured)
        print(
            f"{what['purpose']:<8} {what.get('round', ''):<2} {variant.name:<22} {measured['images_per_second']:8.2f} "
            f"images/s, first step after {measured['first_step_seconds']:.1f} s",
            flush=True,
        )
        return measured

    least = first_mark(args) + args.logging_steps
    for variant in variants:
        filled = variant.cached and args.here and cache_of(variant).exists()
        if variant.cached and not filled:  # what an earlier report has left would make the filling look quick
            shutil.rmtree(cache_of(variant), ignore_errors=True)
        estimate, fills = None, variant.cached and not filled
        if fills or not args.steps:
            estimate = attempt(variant, least, purpose="fill" if fills else "estimate")
        if estimate or (args.steps and not fills):
            steps[variant.name] = planned_steps(args, estimate)
    for number in range(args.rounds):
        turn = [variant for variant in variants if variant.name in steps]
        for variant in turn[number % len(turn) :] + turn[: number % len(turn)] if turn else ():
            if attempt(variant, steps[variant.name], purpose="measure", round=number) is None:
                del steps[variant.name]
    return failures


def report_name(args, device_type):
    swept = [name for name in SWEEPS if len(getattr(args, name)) > 1]
    script = ["flax"] if script_of(args).name == FLAX else []
    return args.name or "-".join([args.size, device_type, *script, *swept])


def make_report(args, work):
    """Run everything and write the report. Returns its folder and the lines of what failed."""
    models, images, known = prepare(args, work)
    variants, skipped = variants_of(args, known)
    words = ["--size", args.size] + (["--resolution", args.resolution] if args.resolution else [])
    costs = json.loads(helper("costs.py", *words).splitlines()[-1])
    folder = args.output / report_name(args, costs["device_type"])
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "runs.jsonl"
    common = {
        "size": args.size,
        "script": script_of(args).name,
        "resolution": args.resolution or sizes.SIZES[args.size][1],
        "mixed_precision": args.mixed_precision,
        "use_ema": args.use_ema,
        "more_flags": args.flags,
        "warmup": args.warmup,
        "costs": costs,
        "commit": commit(),
        "versions": versions(),
    }
    lines.unlink(missing_ok=True)

    def record(**line):
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_line(lines, {"date": date, **common, **line})

    for line in skipped:
        print(line, flush=True)
        record(purpose="skipped", variant=line.partition(":")[0], skipped=line)
    failures = []
    for batch_size in args.batch_sizes:
        for rows in args.rows:
            for processes in args.processes:
                point, folders = Point(batch_size, rows, processes), {"work": work, "models": models}
                folders |= {"images": images[rows]}
                failures += run_point(args, point, variants, folders, record, costs)
    report.write(folder)
    return folder, failures


def main(args):
    if args.work_dir:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        folder, failures = make_report(args, args.work_dir.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
            folder, failures = make_report(args, Path(work))
    print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}\nReport: {folder}")
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training process ends, and its folder goes
    try:
        sys.exit(main(parse_args()))
    except (RunFailed, report.NothingMeasured) as error:
        sys.exit(f"benchmark: {error}")
