"""What a run is told before it harms: bad data, damaged or foreign checkpoints, losses that are no numbers, pickles.

All of it by the scripts themselves, on tiny models. What lies in all four is tested for all four.
"""

import importlib
import json
import os
import re
import runpy
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from conftest import ROOT, command_line, launch, run
from diffusers import DiffusionPipeline, PriorTransformer, UNet2DConditionModel
from safetensors.torch import load_file, save_file

SD, PRIOR = "train_text_to_image", "train_text_to_image_prior"
DECODER, FLAX = "train_text_to_image_decoder", "train_text_to_image_flax"
SCRIPTS, PYTORCH = [SD, PRIOR, DECODER, FLAX], [SD, PRIOR, DECODER]
TRAINED = {SD: "unet", PRIOR: "prior", DECODER: "unet", FLAX: "unet"}
MODEL = {SD: "pretrained_model_name_or_path", FLAX: "pretrained_model_name_or_path"}
MODEL |= {PRIOR: "pretrained_prior_model_name_or_path", DECODER: "pretrained_decoder_model_name_or_path"}
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="session")
def models(pipeline_folder, tmp_path_factory):
    """The flags that name the models to start from, {script: flags}."""
    folder = tmp_path_factory.mktemp("kandinsky")
    tiny.make_kandinsky_prior(folder / "prior")
    tiny.make_kandinsky_decoder(folder / "decoder")
    kandinsky = {MODEL[PRIOR]: folder / "prior", MODEL[DECODER]: folder / "decoder"}
    return dict.fromkeys((SD, FLAX), {MODEL[SD]: pipeline_folder}) | dict.fromkeys((PRIOR, DECODER), kandinsky)


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture
def flags(script, models, images_folder, tmp_path):
    """Three updates of two micro-steps each, and a checkpoint of each."""
    return {**models[script], **SHORT_RUN, "train_data_dir": images_folder, "output_dir": tmp_path / "output"}


SHORT_RUN = {
    **{"resolution": tiny.RESOLUTION, "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 3},
    **{"learning_rate": 1e-3, "lr_scheduler": "constant", "seed": 0, "use_ema": True, "checkpointing_steps": 1},
}


@pytest.fixture(scope="session")
def courses(models, images_folder, tmp_path_factory):
    """Function of a script to the output_dir of its short run, undisturbed and made once."""
    folders = {}

    def course(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("course") / "output"
            flags = {**models[script], **SHORT_RUN, "train_data_dir": images_folder}
            run({**flags, "output_dir": folders[script]}, script)
            reset_accelerate()
        return folders[script]

    return course


@pytest.fixture
def course(script, courses, flags):
    """The undisturbed run's output_dir, of which this test's own is a copy."""
    shutil.copytree(courses(script), flags["output_dir"])
    return courses(script)


def reset_accelerate():
    """As conftest.py does behind every test: for a further run in the same one."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def refusal(flags, script):
    """The line of the RunError that a run ends with."""
    with pytest.raises(importlib.import_module(script).RunError) as error:
        run(flags, script)
    reset_accelerate()
    assert "\n" not in str(error.value)
    return str(error.value)


def run_as_main(flags, script, monkeypatch):
    """Run a script with what stands under `if __name__ == "__main__"`, in this process. Returns the exit status."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *command_line(flags)])
    try:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code
    finally:
        reset_accelerate()
    return 0


def warnings_in(err):
    """The lines with WARNING on stderr, without the time; none of them has an escape sequence in it."""
    assert "\x1b[31m" not in err
    return [line.partition(" WARNING ")[2] for line in err.splitlines() if " WARNING " in line]


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state_of(script, checkpoint):
    """Every weight, averaged weight and optimizer moment of a checkpoint, {name: bytes}."""
    if script == FLAX:
        from test_flax_training import state_of

        return {name: array.tobytes() for name, array in state_of(checkpoint).items()}
    from test_checkpoints import tensors_of

    tensors = tensors_of(checkpoint, (TRAINED[script], f"{TRAINED[script]}_ema"))
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def assert_same_bits(script, one, other):
    one, other = state_of(script, one), state_of(script, other)
    assert one.keys() == other.keys()
    assert len(one) > 50
    assert [name for name in one if one[name] != other[name]] == []


# Images that can't be read --------------------------------------------------------------------------------------------


def write_image(path, width=64, height=64):
    PIL.Image.effect_noise((width, height), 50).convert("RGB").save(path)


def test_an_image_that_metadata_names_outside_of_the_folder(script, flags, tmp_path):
    folder = tiny.make_images(tmp_path / "data")
    write_image(tmp_path / "outside.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "../outside.png", "text": "grey dots"}\n')
    flags["train_data_dir"] = folder
    assert "outside.png" in refusal(flags, script)
    assert not flags["output_dir"].exists()


BAD = {1: b"", 4: b"no picture"}  # {row: content}


def with_bad_images(folder):
    tiny.make_images(folder)
    for row, content in BAD.items():
        (folder / f"{row}.png").write_bytes(content)
    return folder


def without_rows(folder, rows):
    """The data set as if somebody had removed the images, and their captions, by hand."""
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(line for row, line in enumerate(lines) if row not in rows))
    for row in rows:
        (folder / f"{row}.png").unlink()
    return folder


def test_bad_images_are_left_out_as_if_removed_by_hand(script, flags, tmp_path, capsys):
    """Epochs are permutations of the rows that are left: their count, digest and all that is trained are the same."""
    bad, by_hand = with_bad_images(tmp_path / "bad"), without_rows(tiny.make_images(tmp_path / "by_hand"), BAD)
    flags |= {"skip_bad_images": True, "max_train_steps": 2, "checkpointing_steps": 2}
    states = {}
    for name, folder, workers in (("one", bad, 2), ("by hand", by_hand, 0), ("no workers", bad, 0)):
        if script == FLAX and name == "no workers":
            continue  # each of its runs takes seconds to trace, and the two before differ in that too
        run(
            {**flags, "train_data_dir": folder, "dataloader_num_workers": workers, "output_dir": tmp_path / name},
            script,
        )
        reset_accelerate()
        err = capsys.readouterr().err
        said = [line.split(": image ")[0] for line in warnings_in(err)]
        rows = {} if name == "by hand" else BAD
        assert said == [f"left out: row {row}" for row in rows]
        assert all(f"{folder / f'{row}.png'} cannot be read" in err for row in rows)
        assert f"--skip_bad_images: {len(rows)} of {6 + len(rows)} images left out" in err
        checkpoint = tmp_path / name / "checkpoint-2"
        state = json.loads((checkpoint / "training_state.json").read_text())
        states[name] = {key: value for key, value in state.items() if key not in ("arguments", "files")}
        assert_same_bits(script, checkpoint, tmp_path / "one" / "checkpoint-2")
        assert states[name] == states["one"]
    assert states["one"]["rows"] == 6


def test_without_the_flag_a_bad_image_is_named_with_a_hint(script, flags, tmp_path):
    flags["train_data_dir"] = with_bad_images(tmp_path / "bad")
    line = refusal(flags, script)
    assert re.fullmatch(
        r"row 1: image \S+/bad/1\.png cannot be read: .*; --skip_bad_images leaves such images out", line
    )
    assert not flags["output_dir"].exists()


def test_nothing_is_left_without_bad_images(script, flags, tmp_path, capsys, monkeypatch):
    folder = with_bad_images(tmp_path / "bad")
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    flags |= {"train_data_dir": folder, "skip_bad_images": True}
    assert run_as_main(flags, script, monkeypatch) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: --skip_bad_images: none of the images can be read"
    assert not flags["output_dir"].exists()


# Symbolic links -------------------------------------------------------------------------------------------------------


def test_links_out_of_the_folder_are_warned_of(script, flags, tmp_path, capsys):
    """A file's and a folder's, but not one that stays inside, nor that to the folder itself.

    A bad image ends the run, behind the warning.
    """
    folder = tiny.make_images(tmp_path / "data")
    other = tiny.make_images(tmp_path / "other")
    (folder / "5.png").unlink()
    (folder / "5.png").symlink_to(other / "5.png")
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to("1.png")
    (folder / "more").symlink_to(other)
    (tmp_path / "link").symlink_to(folder)
    (folder / "0.png").write_bytes(b"no picture")
    flags["train_data_dir"] = tmp_path / "link"
    assert "row 0: image" in refusal(flags, script)
    (line,) = warnings_in(capsys.readouterr().err)
    links = f"2 symbolic links lead out of it, such as 5.png -> {other / '5.png'}"
    assert line == f"--train_data_dir {flags['train_data_dir']}: {links}; what they lead to may be trained on"


# Damaged checkpoints --------------------------------------------------------------------------------------------------


def cut_weights(checkpoint, script):
    """Leave half of the largest file of weights: a safetensors file, or one of Orbax's."""
    files = checkpoint.rglob("*.safetensors") if script != FLAX else (checkpoint / "train_state").rglob("*")
    path = max(files, key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(path, path.stat().st_size // 2)
    return f"{path.relative_to(checkpoint)} is {path.stat().st_size} bytes long, not "


def remove_a_file(checkpoint, script):
    path = checkpoint / ("train_state/_METADATA" if script == FLAX else f"{TRAINED[script]}_ema/config.json")
    path.unlink()
    return f"the checkpoint is damaged, {path.relative_to(checkpoint)} is missing"


def cut_state(checkpoint, script):
    path = checkpoint / "training_state.json"
    os.truncate(path, path.stat().st_size // 2)
    return "not a checkpoint of this script, training_state.json: "


DAMAGES = [cut_weights, remove_a_file, cut_state]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_latest_checkpoint_is_passed_over_and_kept(script, damage, course, flags, capsys):
    """The update is made again from the one before it, to the last bit. Nothing is deleted."""
    output = flags["output_dir"]
    if script == FLAX and damage != cut_weights:
        flags["max_train_steps"] = 2  # nothing is left to train, which would take seconds to trace
    problem = damage(output / "checkpoint-3", script)
    damaged = files_below(output / "checkpoint-3")
    run({**flags, "resume_from_checkpoint": True}, script)
    err = capsys.readouterr().err
    (warning,) = warnings_in(err)
    assert warning.startswith(f"{output / 'checkpoint-3'}: ")
    assert problem in warning
    assert warning.endswith("; going on from an earlier one")
    assert f"going on from {output / 'checkpoint-2'}" in err
    if flags["max_train_steps"] == 2:
        assert files_below(output / "checkpoint-3") == damaged
        return
    (aside,) = output.glob("set-aside-*-checkpoint-3")
    assert files_below(aside) == damaged
    assert_same_bits(script, output / "checkpoint-3", course / "checkpoint-3")
    trained = f"{TRAINED[script]}/diffusion_pytorch_model.safetensors"
    assert (output / trained).read_bytes() == (course / trained).read_bytes()


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error(script, course, flags):
    output = flags["output_dir"]
    before = files_below(course)
    for number, damage in enumerate(DAMAGES, 1):
        problem = damage(output / f"checkpoint-{number}", script)
        line = refusal({**flags, "resume_from_checkpoint": f"checkpoint-{number}"}, script)
        assert line.startswith(f"{output / f'checkpoint-{number}'}: ")
        assert problem in line
    # Now that all are: the newest's problem is named, and nothing starts anew.
    line = refusal({**flags, "resume_from_checkpoint": True}, script)
    newest = f"the newest: {output / 'checkpoint-3'}: "
    assert line.startswith(f"--resume_from_checkpoint: no checkpoint in {output} is whole; {newest}")
    assert problem in line
    assert files_below(output).keys() == before.keys() - {
        f"checkpoint-2/{'train_state/_METADATA' if script == FLAX else TRAINED[script] + '_ema/config.json'}"
    }


# Checkpoints of something else ----------------------------------------------------------------------------------------


def changed_configuration(part, **values):
    """A change of a pipeline's folder: another model, with random weights, in place of its `part`."""

    def change(folder):
        config = json.loads((folder / part / "config.json").read_text())
        model_class = {"prior": PriorTransformer, "unet": UNet2DConditionModel}[part]
        model_class.from_config({**config, **values}).save_pretrained(folder / part)

    return change


OTHERS = {
    SD: [("layers_per_block", 1, 2), ("use_linear_projection", False, True)],
    FLAX: [("block_out_channels", [16, 32], [16, 16]), ("layers_per_block", 1, 2)],
    PRIOR: [("num_layers", 2, 3), ("attention_head_dim", 8, 12)],
    DECODER: [("block_out_channels", [16, 32], [32, 32]), ("layers_per_block", 1, 2)],
}


@pytest.mark.parametrize("number", [0, 1])
def test_a_checkpoint_of_another_architecture(script, number, course, flags, tmp_path):
    field, before, now = OTHERS[script][number]
    model = shutil.copytree(flags[MODEL[script]], tmp_path / "model")
    changed_configuration(TRAINED[script], **{field: now})(model)
    files = files_below(flags["output_dir"])
    line = refusal({**flags, MODEL[script]: model, "resume_from_checkpoint": True}, script)
    checkpoint = flags["output_dir"] / "checkpoint-3"
    what = f"is of a model with another architecture: {field} {before} -> {now}"
    assert line == f"--resume_from_checkpoint {checkpoint}: {what}"
    assert files_below(flags["output_dir"]) == files


def edit_captions(folder):
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("red dots", "red bars"))


def replace_an_image(folder):
    write_image(folder / "3.png", 40, 90)


def add_an_image(folder):
    write_image(folder / "8.png")
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "8.png", "text": "grey bars"}\n')


def nothing(folder):
    pass


DIGEST, ROWS = "other captions, names or sizes of images in the data set", "another number of rows in the data set"
CHANGES = {
    "nothing": (nothing, {}, {}),
    "the folder was moved": (nothing, {}, {}),
    "another split of the batch": (nothing, {"train_batch_size": 1, "gradient_accumulation_steps": 4}, {}),
    "captions": (edit_captions, {}, {DIGEST: ...}),
    "an image": (replace_an_image, {}, {DIGEST: ...}),
    "one more image": (add_an_image, {}, {ROWS: "8, now 9", DIGEST: ...}),
    "the seed": (nothing, {"seed": 5}, {"another seed": "0, now 5"}),
    "the batch": (nothing, {"train_batch_size": 3}, {"another number of images per update": "4, now 6"}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_differs_from_the_checkpoint_s_run_is_warned_of(script, case, course, flags, tmp_path, capsys):
    """No update is left to do: only the start is looked at."""
    change, other_flags, expected = CHANGES[case]
    if case != "nothing":
        folder = shutil.copytree(flags["train_data_dir"], tmp_path / "moved" / "images")
        change(folder)
        flags["train_data_dir"] = folder
    if script == DECODER and case == "captions":
        expected = {}  # it does not read them
    run({**flags, **other_flags, "resume_from_checkpoint": True}, script)
    said = warnings_in(capsys.readouterr().err)
    assert len(said) == len(expected)
    start = f"{flags['output_dir'] / 'checkpoint-3'} was made with "
    end = "; the model will not be the one of a run without the interruption"
    for line in said:
        what, _, values = line.removeprefix(start).removesuffix(end).partition(": ")
        assert line == f"{start}{what}: {values}{end}"
        one, other = re.fullmatch(r"(\w+), now (\w+)", values).groups()
        assert one != other
        assert expected[what] in (..., values)


# Losses that are no numbers -------------------------------------------------------------------------------------------


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def timesteps_at(module, stream, positions, latents_shape=(8, 8, 4)):
    """The timesteps that belong to positions of a run's stream: of its examples, or drawn on the device by Flax's."""
    if module.__name__ != FLAX:
        return [int(stream[position - stream.first]["timesteps"]) for position in positions]
    key = module.random_generator(0, 4).integers(2**32, size=2, dtype=np.uint32)
    halves = np.array([[position >> 32, position & 0xFFFFFFFF] for position in positions], np.uint32)
    noise = module.draw_noise(halves, module.jax.random.wrap_key_data(key, impl="threefry2x32"), latents_shape, 1000)
    return noise["timesteps"].tolist()


def all_finite(script, checkpoint):
    return all(np.isfinite(np.frombuffer(data, np.float32)).all() for data in state_of(script, checkpoint).values())


def test_a_loss_that_is_not_finite_ends_the_run(script, course, flags, monkeypatch):
    """An update takes far too large a step, and the loss of the next is no number.

    The file names the examples of that update. From an older checkpoint a smaller rate trains as if nothing had been.
    """
    module, output, streams = importlib.import_module(script), flags["output_dir"], []

    class Recorded(module.ExampleStream):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            streams.append(self)

    monkeypatch.setattr(module, "ExampleStream", Recorded)
    shutil.rmtree(output / "checkpoint-3")
    before = files_below(output)
    flags |= {"resume_from_checkpoint": True, "max_train_steps": 9, "logging_steps": 10}
    line = refusal({**flags, "learning_rate": 1e30}, script)
    path = output / "nonfinite-step-4.json"
    assert line.startswith(f"step 4: the loss is not finite; {path} holds the examples, their timesteps and losses; ")
    assert "--resume_from_checkpoint" in line
    (update,) = strict_json(path)
    assert update["step"] == 4
    assert update["positions"] == list(range(12, 16))
    assert update["timesteps"] == timesteps_at(module, streams[-1], update["positions"])
    assert len(update["losses"]) == 4
    assert set(update["losses"]) <= {"nan", "inf"}
    assert update["gradient_norm"] in ("nan", "inf")
    after = files_below(output)
    assert {name: after[name] for name in before if name.startswith("checkpoint-")} == {
        name: data for name, data in before.items() if name.startswith("checkpoint-")
    }
    checkpoints = sorted(path.name for path in output.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert all_finite(script, output / "checkpoint-3")
    run({**flags, "resume_from_checkpoint": "checkpoint-2", "max_train_steps": 3}, script)
    assert_same_bits(script, output / "checkpoint-3", course / "checkpoint-3")


def test_a_finite_loss_whose_gradient_is_not_ends_the_run(script, flags, tmp_path):
    """A model whose last layer makes numbers so large that only their squares can still be written."""
    model = shutil.copytree(flags[MODEL[script]], tmp_path / "model")
    path = model / TRAINED[script] / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_to_clip_embeddings.weight" if script == PRIOR else "conv_out.weight"] *= 1e16
    save_file(tensors, path, metadata={"format": "pt"})
    line = refusal({**flags, MODEL[script]: model}, script)
    assert line.startswith("step 1: the gradient is not finite; ")
    (update,) = strict_json(flags["output_dir"] / "nonfinite-step-1.json")
    assert all(1e25 < loss < 1e38 for loss in update["losses"])
    assert update["gradient_norm"] in ("nan", "inf")
    assert list(flags["output_dir"].glob("checkpoint-*")) == []


@pytest.mark.parametrize("logging_steps", [1, 10])
def test_so_many_in_a_row_as_the_flag_says(script, logging_steps, flags):
    """However often the losses are read, the third in a row ends the run, and no checkpoint holds such weights."""
    flags |= {"learning_rate": 1e30, "max_nonfinite_steps": 3, "max_train_steps": 9, "logging_steps": logging_steps}
    assert refusal(flags, script).startswith("step 4: the loss is not finite")
    updates = strict_json(flags["output_dir"] / "nonfinite-step-4.json")
    assert [update["step"] for update in updates] == [2, 3, 4]
    assert [update["positions"] for update in updates] == [list(range(first, first + 4)) for first in (4, 8, 12)]
    for checkpoint in flags["output_dir"].glob("checkpoint-*"):
        assert all_finite(script, checkpoint), checkpoint.name


def test_a_run_that_ends_with_updates_that_are_not_finite_saves_no_model_of_them(script, flags):
    flags |= {"learning_rate": 1e30, "max_nonfinite_steps": 3, "max_train_steps": 2, "checkpointing_steps": 9}
    assert refusal(flags, script).startswith("step 2: the loss is not finite")
    assert not (flags["output_dir"] / "model_index.json").exists()
    assert not (flags["output_dir"] / TRAINED[script]).exists()


@pytest.mark.parametrize("script", [SD])
def test_two_processes_write_one_file_with_the_examples_of_both(flags):
    flags |= {"learning_rate": 1e30, "checkpointing_steps": 9}
    result = launch(flags, TWO_PROCESSES, ACCELERATE_USE_CPU="true")
    assert result.returncode == 1
    assert "error: step 2: the loss is not finite" in result.stderr
    (path,) = flags["output_dir"].glob("nonfinite-*")
    (update,) = strict_json(path)
    assert sorted(update["positions"]) == list(range(8, 16))
    assert len(update["timesteps"]) == len(update["losses"]) == 8
    assert not (flags["output_dir"] / "model_index.json").exists()


# Pickles --------------------------------------------------------------------------------------------------------------


class Bomb:
    """Writes a file as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def set_bomb(path, target):
    """Put one at `path`, in a form that whoever loads pickles has no qualms about."""
    torch.save({"weight": Bomb(target)}, path)


def test_the_bomb_explodes(tmp_path):
    """Otherwise the tests below would say nothing."""
    set_bomb(tmp_path / "weights.bin", tmp_path / "exploded")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "exploded").exists()


def pickled(path):
    """The name of a safetensors file's content in a pickle."""
    names = {"model.safetensors": "pytorch_model.bin"}
    return path.with_name(names.get(path.name, f"{path.stem}.bin"))


def test_weights_in_pickles_are_refused_with_a_way_to_convert_them(script, flags, tmp_path, monkeypatch):
    model = shutil.copytree(flags[MODEL[script]], tmp_path / "model")
    for path in model.rglob("*.safetensors"):
        torch.save(load_file(path), pickled(path))
        path.unlink()
    flags |= {"max_train_steps": 1, "checkpointing_steps": 9}
    line = refusal({**flags, MODEL[script]: model}, script)
    assert line.startswith((f"--{MODEL[script]} {model}: ", str(model)))
    (conversion,) = re.findall(r"if you trust them.*: (\S+)$", line)
    assert not flags["output_dir"].exists()
    names = {"folder": str(model), "new_folder": str(tmp_path / "converted"), "DiffusionPipeline": DiffusionPipeline}
    eval(conversion, names)
    run({**flags, MODEL[script]: tmp_path / "converted"}, script)
    assert (flags["output_dir"] / "model_index.json").is_file()


@pytest.mark.parametrize("beside", [True, False])
def test_no_pickle_of_a_model_is_opened(script, beside, flags, tmp_path):
    """Nor one of a part that is not trained; beside the safetensors or in their place."""
    model, target = shutil.copytree(flags[MODEL[script]], tmp_path / "model"), tmp_path / "exploded"
    for path in list(model.rglob("*.safetensors")):
        set_bomb(pickled(path), target)
        if not beside:
            path.unlink()
    flags |= {MODEL[script]: model, "max_train_steps": 1, "checkpointing_steps": 9}
    if beside:
        run(flags, script)
    else:
        assert ".bin" in refusal(flags, script) or "pickles" in refusal(flags, script)
    assert not target.exists()


@pytest.mark.parametrize("script", PYTORCH)
@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl", "scheduler.bin", "scaler.pt"])
def test_no_pickle_of_a_checkpoint_runs(script, file, course, flags, tmp_path):
    """One that was planted, and its size in the checkpoint's list changed to its own."""
    checkpoint, target = flags["output_dir"] / "checkpoint-3", tmp_path / "exploded"
    set_bomb(checkpoint / file, target)
    path = checkpoint / "training_state.json"
    state = json.loads(path.read_text())
    state["files"][file] = (checkpoint / file).stat().st_size
    path.write_text(json.dumps(state))
    flags |= {"max_train_steps": 4, "resume_from_checkpoint": True}
    if file == "optimizer.bin":  # nothing else is needed: random states are not, as all that is drawn has its own seed
        assert refusal(flags, script).startswith(f"{checkpoint}: the checkpoint is damaged: ")
    else:
        run(flags, script)
    assert not target.exists()
