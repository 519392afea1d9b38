"""--cache_encodings: the same training, with each encoding made once and none taken for another."""

import importlib
import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from conftest import launch, run
from PIL import Image
from safetensors.torch import load_file

import train_text_to_image
from train_text_to_image import RunError

TRAINED = {"train_text_to_image": "unet", "train_text_to_image_prior": "prior", "train_text_to_image_decoder": "unet"}
STABLE_DIFFUSION, PRIOR, DECODER = TRAINED

every_script = pytest.mark.parametrize("script", TRAINED)


@pytest.fixture
def cached(folders, tmp_path):
    """Function of a script to the flags of a run with the cache, everything random that goes with it switched on."""
    images = tiny.make_images(tmp_path / "images", caption_lists=True)

    def of_script(script):
        flags = {**folders[script], "train_data_dir": images, "output_dir": tmp_path / "output", "resolution": 32}
        flags |= {"train_batch_size": 3, "max_train_steps": 4, "learning_rate": 1e-3, "lr_warmup_steps": 0, "seed": 0}
        # With AdamW's own epsilon, a rounding error decides the sign of its first updates where the gradient is near 0.
        flags |= {"adam_epsilon": 1e-5, "use_ema": True, "proportion_empty_prompts": 0.3}
        if script == STABLE_DIFFUSION:
            flags |= {"center_crop": True, "random_flip": True, "noise_offset": 0.1}
        return {**flags, "cache_encodings": tmp_path / "cache"}

    return of_script


def difference(script, *outputs):
    """The largest difference between the trained weights of two runs."""
    file = "diffusion_pytorch_model.safetensors"
    one, other = (load_file(Path(output) / TRAINED[script] / file) for output in outputs)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def encoded(text):
    """How many rows a run has said that it encodes, and of how many."""
    (words,) = [line.split() for line in text.splitlines() if "--cache_encodings:" in line]
    return int(words[3]), int(words[5])


def parts(flags):
    return sorted(Path(flags["cache_encodings"]).glob("*/part-*.arrow"))


@every_script
def test_weights_are_those_of_a_run_without_the_cache(script, cached, tmp_path, capfd, monkeypatch):
    """To float32 rounding: the encoders see other batches. A second run does not need them, and gives the same bits."""
    flags = cached(script)
    run({**flags, "cache_encodings": None, "output_dir": tmp_path / "without"}, script)
    capfd.readouterr()
    run(flags, script)
    assert encoded(capfd.readouterr().err) == (8, 8)
    assert difference(script, tmp_path / "without", flags["output_dir"]) < 1e-5
    assert len(parts(flags)) == 1

    def refused(*_, **__):
        raise AssertionError("the encoders are not needed")

    monkeypatch.setattr(importlib.import_module(script), "encode", refused)
    run({**flags, "output_dir": tmp_path / "again", "dataloader_num_workers": 2}, script)
    assert encoded(capfd.readouterr().err) == (0, 8)
    assert difference(script, tmp_path / "again", flags["output_dir"]) == 0.0


def test_the_cache_is_read_and_not_only_written(cached, tmp_path, capfd):
    """Other encodings of the same rows, put in by hand, give other weights."""
    flags = cached(STABLE_DIFFUSION)
    run(flags)
    (path,) = parts(flags)
    part = datasets.Dataset.from_file(str(path)).to_dict()
    part["moments"] = part["moments"][1:] + part["moments"][:1]  # each row gets the next one's
    path.unlink()
    train_text_to_image.write_part(path.parent, part)
    run({**flags, "output_dir": tmp_path / "other"})
    assert difference(STABLE_DIFFUSION, tmp_path / "other", flags["output_dir"]) > 1e-4


@every_script
def test_what_has_changed_is_encoded_again_and_only_that(script, cached, tmp_path, capfd):
    flags = cached(script)
    run(flags, script)
    images = Path(flags["train_data_dir"])
    array = np.asarray(Image.open(images / "3.png"))
    Image.fromarray(255 - array).save(images / "3.png")
    capfd.readouterr()
    run({**flags, "output_dir": tmp_path / "image"}, script)
    assert encoded(capfd.readouterr().err) == (1, 8)
    lines = (images / "metadata.jsonl").read_text().replace("grey bars", "grey dots", 1)
    (images / "metadata.jsonl").write_text(lines)
    run({**flags, "output_dir": tmp_path / "caption"}, script)
    assert encoded(capfd.readouterr().err) == (0 if script == DECODER else 1, 8)
    stat = (images / "2.png").stat()  # as of another picture of the same size
    os.utime(images / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    run({**flags, "output_dir": tmp_path / "time"}, script)
    assert encoded(capfd.readouterr().err) == (1, 8)
    run({**flags, "cache_encodings": None, "output_dir": tmp_path / "without"}, script)
    assert difference(script, tmp_path / "caption", tmp_path / "without") < 1e-5


@every_script
def test_another_folder_of_the_same_names_sizes_and_times_is_another_one(script, cached, tmp_path, capfd):
    """As archives unpack them that give all files one time."""
    for name, red in {"first": 40, "second": 200}.items():
        (tmp_path / name).mkdir()
        rows = [{"file_name": f"{k}.bmp", "text": "dots"} for k in range(3)]
        (tmp_path / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for k, row in enumerate(rows):
            path = tmp_path / name / row["file_name"]
            Image.new("RGB", (32, 32), (red, k, 0)).save(path)
            os.utime(path, ns=(0, 0))
        capfd.readouterr()
        flags = {**cached(script), "train_data_dir": tmp_path / name, "output_dir": tmp_path / "output" / name}
        run({**flags, "max_train_steps": 1}, script)
        assert encoded(capfd.readouterr().err) == (3, 3)


@pytest.mark.parametrize("change", ["resolution", "image_interpolation_mode", "random_flip", "weights", "tokenizer"])
def test_what_decides_about_an_encoding_has_a_folder_of_its_own(change, cached, folders, tmp_path, capfd):
    flags = cached(STABLE_DIFFUSION)
    run(flags)
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
    capfd.readouterr()
    run(changed)
    assert encoded(capfd.readouterr().err) == (8, 8)
    assert len({path.parent for path in parts(flags)}) == 2
    noted = [json.loads((path.parent / "flags.json").read_text())["output_dir"] for path in parts(flags)]
    assert sorted(noted) == sorted([str(flags["output_dir"]), str(changed["output_dir"])])


def test_a_crash_while_encoding_loses_no_part_that_was_written(cached, capfd, monkeypatch):
    flags, write_part, written = cached(STABLE_DIFFUSION), train_text_to_image.write_part, itertools.count()

    def fail_at_the_third(folder, part):
        if next(written) == 2:
            raise KeyboardInterrupt
        write_part(folder, part)

    monkeypatch.setattr(train_text_to_image, "PART_BYTES", 0)
    monkeypatch.setattr(train_text_to_image, "write_part", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(flags)
    assert len(parts(flags)) == 2  # of 3 rows each
    capfd.readouterr()
    run(flags)
    assert encoded(capfd.readouterr().err) == (2, 8)


@every_script
@pytest.mark.parametrize("moment, left", [("encode", 5), ("write_part", 0)])  # in batches of 3; a part holds all
def test_a_signal_while_encoding_keeps_what_is_made(script, moment, left, cached, capfd, monkeypatch):
    module, flags = importlib.import_module(script), cached(script)
    function = getattr(module, moment)

    def signalled(*arguments, **models):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # a thread notes it
        return function(*arguments, **models)

    monkeypatch.setattr(module, moment, signalled)
    with pytest.raises(module.RunStopped, match="^stopped by SIGTERM while encoding; the same command goes on$") as end:
        run(flags, script)
    assert end.value.signum == signal.SIGTERM
    monkeypatch.setattr(module, moment, function)
    capfd.readouterr()
    run(flags, script)
    assert encoded(capfd.readouterr().err) == (left, 8)


def test_resumes_from_the_cache_to_the_same_bits(cached, tmp_path):
    flags = {**cached(STABLE_DIFFUSION), "max_train_steps": 12, "checkpointing_steps": 5}
    run(flags)
    parted = {**flags, "output_dir": tmp_path / "parted"}
    run({**parted, "max_train_steps": 5})
    run({**parted, "resume_from_checkpoint": True})
    assert difference(STABLE_DIFFUSION, tmp_path / "parted", flags["output_dir"]) == 0.0


def test_two_processes_fill_it_together(cached, tmp_path):
    flags = {**cached(STABLE_DIFFUSION), "train_batch_size": 2}
    run({**flags, "train_batch_size": 4, "cache_encodings": tmp_path / "alone"})
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    both = {**flags, "output_dir": tmp_path / "both"}
    alone = launch(both, launcher=torchrun)
    assert "error: each process would train alone: on CPUs set ACCELERATE_USE_CPU=true" in alone.stderr
    result = launch(both, launcher=torchrun, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert encoded(result.stderr) == (8, 8)
    rows = [len(datasets.Dataset.from_file(str(path))) for path in parts(flags)]
    assert sorted(rows) == [4, 5]  # 8 rows and the empty one
    assert difference(STABLE_DIFFUSION, tmp_path / "both", flags["output_dir"]) < 1e-5


def test_a_process_that_fails_while_encoding_ends_the_other_which_keeps_what_it_made(cached, tmp_path):
    """Process 1 at its first image, where process 0 has 1,500 to encode: that one is ended, and not waited for."""
    saved = tiny.save_rows(tmp_path / "saved", 3000, bad=1)
    flags = {**cached(STABLE_DIFFUSION), "train_data_dir": None, "dataset_name": saved}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = launch(flags, launcher=torchrun, ACCELERATE_USE_CPU="true")
    assert result.returncode == 1
    assert len(re.findall("error: row 1: image .*cannot be read", result.stderr)) == 1  # behind the other's bar
    assert "stopped by SIGTERM while encoding; the same command goes on" in result.stderr
    (made,) = (len(datasets.Dataset.from_file(str(path))) for path in parts(flags))
    assert 0 < made < 1500


def test_a_data_set_that_holds_its_images(cached, tmp_path, capfd):
    """No image has a file here; another data set under the same name is another one, also if its sizes are the same."""
    flags = {**cached(STABLE_DIFFUSION), "train_data_dir": None, "dataset_name": tmp_path / "saved"}
    rng = np.random.default_rng(0)
    for number in range(2):
        pixels = rng.integers(256, size=(8, 32, 32, 3), dtype=np.uint8)
        rows = {"image": [Image.fromarray(image) for image in pixels], "text": ["dots"] * 8}
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
        for again in range(2):
            capfd.readouterr()
            run({**flags, "output_dir": tmp_path / f"{number}-{again}"})
            assert encoded(capfd.readouterr().err) == ((8, 0)[again], 8)
        run({**flags, "cache_encodings": None, "output_dir": tmp_path / f"{number}-without"})
        assert difference(STABLE_DIFFUSION, tmp_path / f"{number}-1", tmp_path / f"{number}-without") < 1e-5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"center_crop": False}, "--cache_encodings: a random crop is another image each time; add --center_crop"),
        ({"cache_encodings": "output/cache", "output_dir": "output"}, "must not lie in --output_dir"),
        ({"cache_encodings": "images/cache", "train_data_dir": "images"}, "must not lie in --train_data_dir"),
        ({"cache_encodings": "images/cache", "dataset_name": "images"}, "must not lie in --dataset_name"),
        ({"cache_encodings": ""}, "argument --cache_encodings: expected a folder"),
    ],
)
def test_refused(changes, says, cached, capsys):
    with pytest.raises(SystemExit) as ended:
        run({**cached(STABLE_DIFFUSION), **changes})
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_file_is_named(cached):
    flags = cached(STABLE_DIFFUSION)
    run(flags)
    (path,) = parts(flags)
    path.write_bytes(path.read_bytes()[:100])
    again = {**flags, "output_dir": flags["output_dir"] / "other"}
    with pytest.raises(RunError, match=rf"{path.name} \(delete it, and its rows are encoded again\): "):
        run(again)
    path.unlink()
    (path.parent / "part-of-another-run.partial").symlink_to("gone meanwhile")
    run(again)
    assert len(parts(flags)) == 1


def test_a_full_cache_may_be_on_a_read_only_disk(cached, monkeypatch):
    """What the system says of permissions is put on, since tests may be run by root, whom they do not bind."""
    flags, access = cached(STABLE_DIFFUSION), os.access
    run(flags)
    monkeypatch.setattr(os, "access", lambda path, mode: "cache" not in Path(path).parts and access(path, mode))
    run({**flags, "output_dir": flags["output_dir"] / "full"})
    flags |= {"image_interpolation_mode": "nearest", "output_dir": flags["output_dir"] / "other"}
    with pytest.raises(RunError, match=r"^--cache_encodings .*cache: no permission to write to .*cache$"):
        run(flags)


def test_a_disk_without_room_is_said_before_encoding(cached, monkeypatch):
    flags, usage = cached(STABLE_DIFFUSION), type("Usage", (), {"free": 50_000})
    monkeypatch.setattr(train_text_to_image.shutil, "disk_usage", lambda _: usage)
    says = r"^--cache_encodings .*: its disk has 0\.05 MB left, and the encodings need 0\.\d\d MB or more$"
    with pytest.raises(RunError, match=says):
        run(flags)
    assert parts(flags) == []


@every_script
def test_nothing_is_encoded_for_a_run_that_is_refused(script, cached):
    """Hours of encoding come after all that is refused in seconds: here no Hub can be reached."""
    flags = cached(script)
    with pytest.raises(importlib.import_module(script).RunError, match="--push_to_hub"):
        run({**flags, "push_to_hub": True, "hub_model_id": "somebody/something"}, script)
    assert not flags["cache_encodings"].exists()


@every_script
def test_encoders_that_fail_are_not_taken_for_a_disk_that_does(script, cached, monkeypatch):
    def out_of_memory(batch, **models):
        raise torch.OutOfMemoryError("out of memory")

    module = importlib.import_module(script)
    monkeypatch.setattr(module, "encode", out_of_memory)
    with pytest.raises(module.RunError, match="^--cache_encodings: the images cannot be encoded: out of memory$"):
        run(cached(script), script)


@every_script
def test_a_cache_that_cannot_be_written_is_refused_first(script, cached, tmp_path):
    (tmp_path / "file").write_text("a user's")
    with pytest.raises(importlib.import_module(script).RunError, match=r"^--cache_encodings .*file is a file, not a"):
        run({**cached(script), "cache_encodings": tmp_path / "file" / "cache"}, script)
    assert not (tmp_path / "output").exists()


def test_a_bad_image_is_named_before_the_training(cached, capfd):
    flags = cached(STABLE_DIFFUSION)
    (flags["train_data_dir"] / "5.png").write_bytes(b"no image")
    with pytest.raises(RunError, match=r"row 5: image .*5\.png cannot be read"):
        run(flags)
    capfd.readouterr()
    run({**flags, "skip_bad_images": True})
    assert encoded(capfd.readouterr().err) == (4, 7)  # the batch of 3 before it is there


@every_script
def test_the_encoders_are_on_the_device_only_to_encode_and_to_draw(script, cached, folders, monkeypatch):
    """With a device that only notes who visits it, the models' own moves are counted."""
    module, flags = importlib.import_module(script), cached(script)
    visits, visiting = [], module.visiting

    def noted(accelerator, *models):
        visits.append([type(model).__name__ for model in models])
        return visiting(accelerator, *models)

    moved, to_device = [], module.to_device
    monkeypatch.setattr(module, "visiting", noted)
    monkeypatch.setattr(
        module, "to_device", lambda accelerator, model: moved.append(model) or to_device(accelerator, model)
    )
    run(flags, script)
    assert len(visits) == 1  # to encode
    assert len(moved) == 3  # the two of them, and what is trained
    run({**flags, "output_dir": flags["output_dir"] / "again"}, script)
    assert len(visits) == 1
    assert len(moved) == 4
    drawing = {**folders[DECODER], **flags} if script == PRIOR else flags
    run({**drawing, "validation_prompts": ["red dots"], "output_dir": flags["output_dir"] / "drawn"}, script)
    assert len(visits) == 2  # the picture at the end
