"""--cache_encodings: the same training, with each encoding made once and none taken for another.

How much is encoded is counted in images that pass through a frozen model, whatever the files of the cache look like.
"""

import importlib
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import diffusers
import numpy as np
import pyarrow
import pytest
import tiny
import torch
import transformers
from conftest import launch, launch_two, reset_accelerate
from conftest import run as run_once
from PIL import Image
from safetensors.torch import load_file

from train_text_to_image import RunError

SUFFIXES = {"": "unet", "_prior": "prior", "_decoder": "unet", "_sdxl": "unet"}
TRAINED = {f"train_text_to_image{suffix}": name for suffix, name in SUFFIXES.items()}
STABLE_DIFFUSION, PRIOR, DECODER, SDXL = TRAINED
MANY = 1100  # rows of more than one file
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")

every_script = pytest.mark.parametrize("script", TRAINED)


def run(flags, script=STABLE_DIFFUSION):
    run_once(flags, script)
    reset_accelerate()


@pytest.fixture
def cached(folders, tmp_path):
    """Function of a script to the flags of a run with the cache, everything random that goes with it switched on."""
    images = tiny.make_images(tmp_path / "images", caption_lists=True)

    def of_script(script=STABLE_DIFFUSION):
        flags = {**folders[script], "train_data_dir": images, "output_dir": tmp_path / "output", "resolution": 32}
        flags |= {"train_batch_size": 3, "max_train_steps": 4, "learning_rate": 1e-3, "lr_warmup_steps": 0, "seed": 0}
        # With AdamW's own epsilon, a rounding error decides the sign of its first updates where the gradient is near 0.
        flags |= {"adam_epsilon": 1e-5, "use_ema": True, "proportion_empty_prompts": 0.3}
        if script in (STABLE_DIFFUSION, SDXL):
            flags |= {"center_crop": True, "random_flip": True, "noise_offset": 0.1}
        return {**flags, "cache_encodings": tmp_path / "cache"}

    return of_script


class Encoded:
    """Counts the images that a frozen model is given, and calls `before(number)` before it encodes so many more."""

    def __init__(self):
        self.number, self.before = 0, lambda number: None

    def count(self, monkeypatch, owner, method):
        function = getattr(owner, method)

        def counting(model, pixel_values, *args, **kwargs):
            self.before(len(pixel_values))
            self.number += len(pixel_values)
            return function(model, pixel_values, *args, **kwargs)

        monkeypatch.setattr(owner, method, counting)

    def take(self):
        """The number since the last time."""
        number, self.number = self.number, 0
        return number


@pytest.fixture
def encoded(request, monkeypatch):
    """Of the model that sees every image once: the decoder's image encoder sees an empty one besides."""
    counter, script = (
        Encoded(),
        request.node.callspec.params.get("script") if hasattr(request.node, "callspec") else None,
    )
    if script == PRIOR:
        counter.count(monkeypatch, transformers.CLIPVisionModelWithProjection, "forward")
    else:
        counter.count(monkeypatch, diffusers.VQModel if script == DECODER else diffusers.AutoencoderKL, "encode")
    return counter


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A saved data set of MANY rows."""
    return tiny.save_rows(tmp_path_factory.mktemp("many") / "saved", MANY)


def difference(script, *outputs):
    """The largest difference between the trained weights of two runs."""
    file = "diffusion_pytorch_model.safetensors"
    one, other = (load_file(Path(output) / TRAINED[script] / file) for output in outputs)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def files_of(flags):
    return sorted(path for path in Path(flags["cache_encodings"]).rglob("*") if path.is_file())


def arrow_files(flags):
    return [path for path in files_of(flags) if path.suffix == ".arrow"]


# The same weights -----------------------------------------------------------------------------------------------------


@every_script
def test_weights_are_those_of_a_run_without_the_cache(script, cached, encoded, tmp_path):
    """To float32 rounding: the encoders see other batches. A second run does not need them, and gives the same bits."""
    flags = cached(script)
    run({**flags, "cache_encodings": None, "output_dir": tmp_path / "without"}, script)
    assert encoded.take() == 4 * 3  # every image of every update
    run(flags, script)
    assert encoded.take() == (2 if script in (STABLE_DIFFUSION, SDXL) else 1) * 8  # both flips of each
    assert difference(script, tmp_path / "without", flags["output_dir"]) < 1e-5
    run({**flags, "output_dir": tmp_path / "again", "dataloader_num_workers": 2}, script)
    assert encoded.take() == 0
    assert difference(script, tmp_path / "again", flags["output_dir"]) == 0.0


def test_the_cache_is_read_and_not_only_written(cached, tmp_path):
    """Other encodings of the same rows, put in by hand, give other weights."""
    flags = cached()
    run(flags)
    for path in arrow_files(flags):
        with pyarrow.memory_map(str(path)) as source:
            table = pyarrow.ipc.open_stream(source).read_all()
            rotated = table.take([*range(1, len(table)), 0])  # each row gets the next one's
            copy = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(copy, rotated.schema) as writer:
                writer.write_table(rotated)
        path.write_bytes(copy.getvalue())
    run({**flags, "output_dir": tmp_path / "other"})
    assert difference(STABLE_DIFFUSION, tmp_path / "other", flags["output_dir"]) > 1e-4


def test_resumes_from_the_cache_to_the_same_bits(cached, tmp_path):
    flags = {**cached(), "checkpointing_steps": 3, "max_train_steps": 6}
    run(flags)
    parted = {**flags, "output_dir": tmp_path / "parted"}
    run({**parted, "max_train_steps": 3})
    run({**parted, "resume_from_checkpoint": True})
    assert difference(STABLE_DIFFUSION, tmp_path / "parted", flags["output_dir"]) == 0.0


# What belongs to what -------------------------------------------------------------------------------------------------


@every_script
def test_what_has_changed_is_encoded_again(script, cached, encoded, tmp_path):
    flags = cached(script)
    run(flags, script)
    encoded.take()
    images = Path(flags["train_data_dir"])
    array = np.asarray(Image.open(images / "3.png"))
    Image.fromarray(255 - array).save(images / "3.png")
    run({**flags, "output_dir": tmp_path / "image"}, script)
    assert encoded.take() > 0
    lines = (images / "metadata.jsonl").read_text().replace("grey bars", "grey dots", 1)
    (images / "metadata.jsonl").write_text(lines)
    run({**flags, "output_dir": tmp_path / "caption"}, script)
    assert (encoded.take() > 0) == (script != DECODER)  # which has no captions
    run({**flags, "cache_encodings": None, "output_dir": tmp_path / "without"}, script)
    assert difference(script, tmp_path / "caption", tmp_path / "without") < 1e-5


def test_an_image_of_another_time_is_another_one(cached, encoded, tmp_path):
    """As another picture of the same size."""
    flags = cached()
    run(flags)
    encoded.take()
    stat = (flags["train_data_dir"] / "2.png").stat()
    os.utime(flags["train_data_dir"] / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    run({**flags, "output_dir": tmp_path / "time"})
    assert encoded.take() > 0


def test_another_folder_of_the_same_names_sizes_and_times_is_another_one(cached, encoded, tmp_path):
    """As archives unpack them that give all files one time."""
    for name, red in {"first": 40, "second": 200}.items():
        (tmp_path / name).mkdir()
        rows = [{"file_name": f"{k}.bmp", "text": "dots"} for k in range(3)]
        (tmp_path / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for k, row in enumerate(rows):
            path = tmp_path / name / row["file_name"]
            Image.new("RGB", (32, 32), (red, k, 0)).save(path)
            os.utime(path, ns=(0, 0))
        flags = {**cached(), "train_data_dir": tmp_path / name, "output_dir": tmp_path / "output" / name}
        run({**flags, "max_train_steps": 1})
        assert encoded.take() == 2 * 3


@pytest.mark.parametrize("change", ["resolution", "image_interpolation_mode", "random_flip", "weights", "tokenizer"])
def test_what_decides_about_an_encoding_is_part_of_its_name(change, cached, encoded, tmp_path):
    flags = {**cached(), "max_train_steps": 1}
    run(flags)
    before = {path: path.read_bytes() for path in arrow_files(flags)}
    other = {"resolution": 48, "image_interpolation_mode": "nearest", "random_flip": False}
    changed = {**flags, "output_dir": tmp_path / "other"}
    if change in other:
        changed[change] = other[change]
    else:
        pipeline = tiny.make_stable_diffusion(tmp_path / "pipeline")
        changed["pretrained_model_name_or_path"] = tmp_path / "pipeline"
        if change == "weights":
            next(pipeline.text_encoder.parameters()).data[0] += 1e-3
        else:
            pipeline.tokenizer.model_max_length = 76
        pipeline.save_pretrained(tmp_path / "pipeline")
    encoded.take()
    run(changed)
    assert encoded.take() == (8 if change == "random_flip" else 16)
    assert {path: path.read_bytes() for path in before} == before
    assert len(arrow_files(flags)) == 2 * len(before)


def test_a_data_set_that_holds_its_images(cached, encoded, tmp_path):
    """No image has a file here; another data set under the same name is another one, also if its sizes are the same."""
    flags = {**cached(), "train_data_dir": None, "dataset_name": tmp_path / "saved"}
    for number, colour in enumerate(("red", "blue")):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        tiny.save_rows(tmp_path / "saved", 8, colour=colour)
        for again in range(2 - number):
            run({**flags, "output_dir": tmp_path / f"{number}-{again}"})
            assert encoded.take() == (0 if again else 16)
    run({**flags, "cache_encodings": None, "output_dir": tmp_path / "without"})
    assert difference(STABLE_DIFFUSION, tmp_path / "1-0", tmp_path / "without") < 1e-5


# Crashes, signals and processes ---------------------------------------------------------------------------------------


def interrupt(encoded, action):
    """Let `action` happen once, when all but the last few of MANY rows are encoded."""

    def before(number):
        if encoded.number + number > MANY - 4:
            encoded.before = lambda number: None
            action()

    encoded.before = before


def test_a_crash_while_encoding_loses_no_file_that_was_written(cached, many, encoded):
    flags = {**cached(), "train_data_dir": None, "dataset_name": many, "random_flip": False, "train_batch_size": 50}
    flags |= {"max_train_steps": 1}

    def crash():
        raise KeyboardInterrupt

    interrupt(encoded, crash)
    with pytest.raises(KeyboardInterrupt):
        run(flags)
    reset_accelerate()
    assert encoded.take() > 1000
    run(flags)
    assert 0 < encoded.take() < MANY
    assert files_of(flags) == arrow_files(flags)  # nothing half written is left


def test_a_signal_while_encoding_keeps_what_is_made(cached, many, encoded, capfd):
    flags = {**cached(), "train_data_dir": None, "dataset_name": many, "random_flip": False, "train_batch_size": 50}
    flags |= {"max_train_steps": 1}
    interrupt(encoded, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(BaseException) as end:
        run(flags)
    said = f"{end.value}\n{capfd.readouterr().err}"
    assert re.search("stopped by SIGTERM while encoding; the same command ", said)
    reset_accelerate()
    encoded.take()
    run(flags)
    assert encoded.take() < MANY


def test_two_processes_fill_it_together(cached, many, encoded, tmp_path):
    """And what they made is what one process makes."""
    flags = {**cached(), "train_data_dir": None, "dataset_name": many, "random_flip": False, "train_batch_size": 50}
    flags |= {"max_train_steps": 2}
    for result in launch_two({**flags, "output_dir": tmp_path / "both"}):
        assert result.returncode == 0, result.stderr
    run({**flags, "train_batch_size": 100, "output_dir": tmp_path / "one"})
    assert encoded.take() == 0
    run({**flags, "train_batch_size": 100, "cache_encodings": tmp_path / "alone", "output_dir": tmp_path / "alone-"})
    assert encoded.take() == MANY
    assert difference(STABLE_DIFFUSION, tmp_path / "one", tmp_path / "both") < 1e-5
    assert difference(STABLE_DIFFUSION, tmp_path / "one", tmp_path / "alone-") < 1e-5


def test_a_process_that_fails_while_encoding_ends_the_other(cached, tmp_path):
    saved = tiny.save_rows(tmp_path / "saved", MANY, bad=MANY - 1)
    flags = {**cached(), "train_data_dir": None, "dataset_name": saved}
    result = launch(flags, TORCHRUN, ACCELERATE_USE_CPU="true")
    assert result.returncode == 1
    assert len(re.findall(rf"error: .*image (.*{MANY - 1}|of row {MANY - 1}).*cannot be read", result.stderr)) in (
        1,
        2,
    )  # behind a bar
    assert not (flags["output_dir"] / "model_index.json").exists()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"center_crop": False}, "argument --cache_encodings: .*random crop.* add --center_crop"),
        (
            {"cache_encodings": "output/cache", "output_dir": "output"},
            "argument --cache_encodings: must not .*--output_dir",
        ),
    ],
)
def test_refused(changes, says, cached, capsys):
    with pytest.raises(SystemExit) as ended:
        run({**cached(), **changes})
    assert ended.value.code == 2
    assert re.search(says, capsys.readouterr().err.splitlines()[-1])


def test_a_damaged_file_is_named(cached):
    flags = {**cached(), "max_train_steps": 1}
    run(flags)
    path = arrow_files(flags)[0]
    path.write_bytes(path.read_bytes()[:100])
    again = {**flags, "output_dir": flags["output_dir"] / "other"}
    with pytest.raises(RunError, match=rf"^--cache_encodings .*{path.name}"):
        run(again)
    path.unlink()
    run(again)


def test_nothing_is_encoded_for_a_run_that_is_refused(cached):
    """Hours of encoding come after all that is refused in seconds: here no Hub can be reached."""
    flags = cached()
    with pytest.raises(RunError, match="--push_to_hub"):
        run({**flags, "push_to_hub": True, "hub_model_id": "somebody/something"})
    assert not flags["cache_encodings"].exists()


@every_script
def test_encoders_that_fail_are_one_line(script, cached, encoded):
    def fail(number):
        raise RuntimeError("a kernel has failed")

    encoded.before = fail
    with pytest.raises(importlib.import_module(script).RunError, match="^--cache_encodings.*: .*a kernel has failed$"):
        run(cached(script), script)


def test_a_cache_that_cannot_be_written_is_one_line(cached, tmp_path):
    (tmp_path / "file").write_text("a user's")
    with pytest.raises(RunError, match=r"^--cache_encodings .*file"):
        run({**cached(), "cache_encodings": tmp_path / "file" / "cache"})


def test_a_bad_image_is_named_before_the_training(cached, encoded):
    flags = {**cached(), "max_train_steps": 1}
    (flags["train_data_dir"] / "5.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"image .*5\.png cannot be read"):
        run(flags)
    encoded.take()
    run({**flags, "skip_bad_images": True, "resume_from_checkpoint": True})
    assert 0 < encoded.take() <= 2 * 7


def test_the_encoders_are_on_the_device_only_to_encode_and_to_draw(cached, monkeypatch):
    """Their moves are counted: the one there and the one back."""
    moves, move = [], diffusers.AutoencoderKL.to

    def moved(self, *args, **kwargs):
        moves.extend(value for value in (*args, *kwargs.values()) if isinstance(value, (torch.device, str)))
        return move(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.AutoencoderKL, "to", moved)
    flags = {**cached(), "max_train_steps": 1}
    for name, prompts, expected in (("made", None, 2), ("read", None, 0), ("drawn", ["red dots"], 2)):
        moves.clear()
        run({**flags, "validation_prompts": prompts, "output_dir": flags["output_dir"] / name})
        assert len(moves) == expected, (name, moves)
