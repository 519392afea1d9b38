"""What a run is told before it harms: bad data, damaged or foreign checkpoints, losses that are no numbers, pickles.

All of it by the scripts themselves, on tiny models: PyTorch's machinery, which is one text, by one of its scripts.
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
from accelerate import Accelerator
from conftest import ROOT, command_line, reset_accelerate, run
from diffusers import DiffusionPipeline, PriorTransformer, UNet2DConditionModel
from safetensors.torch import load_file, save_file

SD, PRIOR = "train_text_to_image", "train_text_to_image_prior"
DECODER, FLAX = "train_text_to_image_decoder", "train_text_to_image_flax"
SCRIPTS = [SD, PRIOR, DECODER, FLAX]
TRAINED = {SD: "unet", PRIOR: "prior", DECODER: "unet", FLAX: "unet"}
MODEL = {SD: "pretrained_model_name_or_path", FLAX: "pretrained_model_name_or_path"}
MODEL |= {PRIOR: "pretrained_prior_model_name_or_path", DECODER: "pretrained_decoder_model_name_or_path"}


@pytest.fixture(scope="session")
def models(pipeline_folder, tmp_path_factory):
    """The flags that name the models to start from, {script: flags}."""
    folder = tmp_path_factory.mktemp("kandinsky")
    tiny.make_kandinsky_prior(folder / "prior")
    tiny.make_kandinsky_decoder(folder / "decoder")
    kandinsky = {MODEL[PRIOR]: folder / "prior", MODEL[DECODER]: folder / "decoder"}
    return dict.fromkeys((SD, FLAX), {MODEL[SD]: pipeline_folder}) | dict.fromkeys((PRIOR, DECODER), kandinsky)


@pytest.fixture(params=[SD, FLAX])
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


def write_image(path, width=64, height=64):
    PIL.Image.effect_noise((width, height), 50).convert("RGB").save(path)


# Images that can't be read --------------------------------------------------------------------------------------------

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
        rows = {} if name == "by hand" else BAD
        assert re.findall(r"WARNING .*\brow (\d+): image", err) == [str(row) for row in rows]
        assert all(f"{folder / f'{row}.png'} cannot be read" in err for row in rows)
        assert " 6 images, " in err
        checkpoint = tmp_path / name / "checkpoint-2"
        state = json.loads((checkpoint / "training_state.json").read_text())
        states[name] = {key: value for key, value in state.items() if key not in ("arguments", "files", "data")}
        assert_same_bits(script, checkpoint, tmp_path / "one" / "checkpoint-2")
        assert states[name] == states["one"]
    assert states["one"]["rows"] == 6


def test_without_the_flag_a_bad_image_is_named_with_a_hint(script, flags, tmp_path):
    flags["train_data_dir"] = with_bad_images(tmp_path / "bad")
    line = refusal(flags, script)
    assert re.fullmatch(r"row 1: image \S+/bad/1\.png cannot be read: .*; --skip_bad_images .*", line)
    assert not flags["output_dir"].exists()


@pytest.mark.parametrize("script", [SD])
def test_nothing_is_left_without_bad_images(script, flags, tmp_path, capsys, monkeypatch):
    folder = with_bad_images(tmp_path / "bad")
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    flags |= {"train_data_dir": folder, "skip_bad_images": True}
    assert run_as_main(flags, script, monkeypatch) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "error: no images are left to train on"
    assert not flags["output_dir"].exists()


# Damaged checkpoints --------------------------------------------------------------------------------------------------


def cut_weights(checkpoint, script):
    """Leave half of the largest file: a safetensors file, or one of Orbax's. Returns the names of which one is told."""
    path = max(
        checkpoint.rglob("*.safetensors" if script != FLAX else "*"), key=lambda p: p.is_file() and p.stat().st_size
    )
    os.truncate(path, path.stat().st_size // 2)
    return path.relative_to(checkpoint)


def remove_a_file(checkpoint, script):
    path = next(checkpoint.rglob("_METADATA")) if script == FLAX else checkpoint / f"{TRAINED[script]}_ema/config.json"
    path.unlink()
    return path.relative_to(checkpoint)


def cut_state(checkpoint, script):
    path = checkpoint / "training_state.json"
    os.truncate(path, path.stat().st_size // 2)
    return "not a"


DAMAGES = [cut_weights, remove_a_file, cut_state]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_latest_checkpoint_is_passed_over_and_kept(script, damage, course, flags, capsys):
    """The update is made again from the one before it, to the last bit. Nothing is deleted."""
    output = flags["output_dir"]
    if script == FLAX and damage != cut_weights:
        flags["max_train_steps"] = 2  # nothing is left to train, which would take seconds to trace
    file = damage(output / "checkpoint-3", script)
    damaged = files_below(output / "checkpoint-3")
    run({**flags, "resume_from_checkpoint": True}, script)
    err = capsys.readouterr().err
    (warning,) = warnings_in(err)
    assert warning.startswith(f"{output / 'checkpoint-3'}: ")
    assert str(file) in warning
    assert f"{output / 'checkpoint-2'}" in err
    if flags["max_train_steps"] == 2:
        assert files_below(output / "checkpoint-3") == damaged
        return
    (aside,) = output.glob("set-aside-*-checkpoint-3")
    assert files_below(aside) == damaged
    assert_same_bits(script, output / "checkpoint-3", course / "checkpoint-3")
    trained = f"{TRAINED[script]}/diffusion_pytorch_model.safetensors"
    assert (output / trained).read_bytes() == (course / trained).read_bytes()


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error(script, course, flags, capsys):
    output, files = flags["output_dir"], []
    for number, damage in enumerate(DAMAGES, 1):
        files.append(damage(output / f"checkpoint-{number}", script))
        capsys.readouterr()
        line = refusal({**flags, "resume_from_checkpoint": f"checkpoint-{number}"}, script)
        assert f"checkpoint-{number}" in line
        assert str(files[-1]) in line + capsys.readouterr().err
    # Now that all are, nothing starts anew.
    line = refusal({**flags, "resume_from_checkpoint": True}, script)
    assert line.startswith("--resume_from_checkpoint")
    assert str(output) in line
    assert files_below(output).keys() == files_below(course).keys() - {f"checkpoint-2/{files[1]}"}


# Checkpoints of something else ----------------------------------------------------------------------------------------


def changed_configuration(part, **values):
    """A change of a pipeline's folder: another model, with random weights, in place of its `part`."""

    def change(folder):
        config = json.loads((folder / part / "config.json").read_text())
        model_class = {"prior": PriorTransformer, "unet": UNet2DConditionModel}[part]
        model_class.from_config({**config, **values}).save_pretrained(folder / part)

    return change


OTHERS = [
    (FLAX, "block_out_channels", [16], [32]),
]


@pytest.mark.parametrize(("script", "field", "before", "now"), OTHERS)
def test_a_checkpoint_of_another_architecture(script, field, before, now, course, flags, tmp_path):
    model = shutil.copytree(flags[MODEL[script]], tmp_path / "model")
    changed_configuration(TRAINED[script], **{field: now})(model)
    files = files_below(flags["output_dir"])
    line = refusal({**flags, MODEL[script]: model, "resume_from_checkpoint": True}, script)
    assert str(flags["output_dir"] / "checkpoint-3") in line
    assert re.search(rf"architecture.*{field}.*{re.escape(str(before))}.*{re.escape(str(now))}", line)
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


# {case: (change of the data, flags, what the warnings tell)}
CHANGES = {
    "nothing": (nothing, {}, []),
    "another split of the batch": (nothing, {"train_batch_size": 1, "gradient_accumulation_steps": 4}, []),
    "captions": (edit_captions, {}, [r"data"]),
    "an image": (replace_an_image, {}, [r"data"]),
    "one more image": (add_an_image, {}, [r"rows.*8.*9", r"data"]),
    "the seed": (nothing, {"seed": 5}, [r"seed.*0.*5"]),
    "the batch": (nothing, {"train_batch_size": 3}, [r"4.*6"]),
}


@pytest.mark.parametrize(("script", "case"), [*((SD, case) for case in CHANGES), (FLAX, "nothing"), (FLAX, "the seed")])
def test_what_differs_from_the_checkpoint_s_run_is_warned_of(script, case, courses, flags, tmp_path, capsys):
    """No update is left to do: only the start is looked at."""
    change, other_flags, expected = CHANGES[case]
    if change is nothing:
        shutil.copytree(courses(script), flags["output_dir"])
    else:  # what is changed must not be another test's
        flags |= {"train_data_dir": tiny.make_images(tmp_path / "images"), "max_train_steps": 1}
        run(flags, script)
        reset_accelerate()
        change(flags["train_data_dir"])
    capsys.readouterr()
    run({**flags, **other_flags, "resume_from_checkpoint": True}, script)
    said = warnings_in(capsys.readouterr().err)
    assert len(said) == len(expected), said
    newest = max(flags["output_dir"].glob("checkpoint-*")).name
    assert all(newest in line for line in said)
    assert all(any(re.search(pattern, line) for line in said) for pattern in expected), said


# Losses that are no numbers -------------------------------------------------------------------------------------------


def all_finite(script, checkpoint):
    return all(np.isfinite(np.frombuffer(data, np.float32)).all() for data in state_of(script, checkpoint).values())


@pytest.mark.parametrize("logging_steps", [1, 10])
def test_a_loss_that_is_not_finite_ends_the_run(script, logging_steps, course, flags):
    """An update takes far too large a step, and the loss of the next is no number: no checkpoint is written of that.

    From an older checkpoint a smaller rate trains as if nothing had been.
    """
    output = flags["output_dir"]
    shutil.rmtree(output / "checkpoint-3")
    before = files_below(output)
    flags |= {"resume_from_checkpoint": True, "max_train_steps": 9, "logging_steps": logging_steps}
    line = refusal({**flags, "learning_rate": 1e30}, script)
    assert re.match(r"step 4: .*loss (is )?(nan|inf|not finite).*gradient", line)
    after = files_below(output)
    assert {name: after[name] for name in before if name.startswith("checkpoint-")} == {
        name: data for name, data in before.items() if name.startswith("checkpoint-")
    }
    checkpoints = sorted(path.name for path in output.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert all_finite(script, output / "checkpoint-3")
    if logging_steps == 10:
        run({**flags, "resume_from_checkpoint": "checkpoint-2", "max_train_steps": 3}, script)
        assert_same_bits(script, output / "checkpoint-3", course / "checkpoint-3")


def test_a_finite_loss_whose_gradient_is_not_ends_the_run(script, flags, tmp_path):
    """A model whose last layer makes numbers so large that only their squares can still be written."""
    model = shutil.copytree(flags[MODEL[script]], tmp_path / "model")
    path = model / TRAINED[script] / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.weight"] *= 1e16
    save_file(tensors, path, metadata={"format": "pt"})
    line = refusal({**flags, MODEL[script]: model}, script)
    loss = float(re.match(r"step 1: .*?loss ([\d.e+]+)", line)[1])
    assert 1e25 < loss < 1e38
    assert re.search(r"gradient.*(nan|inf)", line)
    assert list(flags["output_dir"].glob("checkpoint-*")) == []


def test_a_run_that_ends_with_an_update_that_is_not_finite_saves_no_model_of_it(script, flags):
    flags |= {"learning_rate": 1e30, "max_train_steps": 2, "checkpointing_steps": 9, "logging_steps": 9}
    assert refusal(flags, script).startswith("step 2: ")
    assert not (flags["output_dir"] / "model_index.json").exists()
    assert not (flags["output_dir"] / TRAINED[script]).exists()


def use_scaler(monkeypatch):
    """That of fp16: a CPU has no fp16, but a scaler."""
    initialise = Accelerator.__init__

    def initialise_with_scaler(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(Accelerator, "__init__", initialise_with_scaler)


@pytest.mark.parametrize("script", [SD])
def test_fp16_resumes_from_a_run_without_it(script, flags, monkeypatch):
    """Its checkpoint has no loss scale: a new one starts, which the next checkpoint has."""
    flags |= {"max_train_steps": 2, "gradient_accumulation_steps": 1, "checkpointing_steps": 1}
    run(flags, script)
    assert not (flags["output_dir"] / "checkpoint-2" / "scaler.pt").exists()
    reset_accelerate()
    use_scaler(monkeypatch)
    run({**flags, "max_train_steps": 3, "resume_from_checkpoint": "latest"}, script)
    assert torch.load(flags["output_dir"] / "checkpoint-3" / "scaler.pt")["scale"] > 0


@pytest.mark.parametrize("script", [SD])
def test_with_fp16_the_twentieth_in_a_row_ends_the_run(script, flags, monkeypatch):
    """Its scaler finds the loss scale by updates that overflow, and skips them."""
    use_scaler(monkeypatch)
    flags |= {"learning_rate": 1e30, "max_train_steps": 40, "gradient_accumulation_steps": 1, "checkpointing_steps": 10}
    assert refusal(flags, script).startswith("step 21: ")
    assert not (flags["output_dir"] / "model_index.json").exists()
    assert all_finite(script, flags["output_dir"] / "checkpoint-20")


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
    (conversion,) = re.findall(r"(?:if you trust them|with PyTorch): (\S+)$", line)
    assert not flags["output_dir"].exists()
    names = {"folder": str(model), "new_folder": str(tmp_path / "converted"), "DiffusionPipeline": DiffusionPipeline}
    eval(conversion, names)
    run({**flags, MODEL[script]: tmp_path / "converted"}, script)
    assert (flags["output_dir"] / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("script", "beside"), [(SD, True), (PRIOR, True), (DECODER, True), *((script, False) for script in SCRIPTS)]
)
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
        assert "safetensors" in refusal(flags, script)
    assert not target.exists()


@pytest.mark.parametrize("script", [SD])
@pytest.mark.parametrize("files", [["optimizer.bin"], ["random_states_0.pkl", "scheduler.bin", "scaler.pt"]], ids=len)
def test_no_pickle_of_a_checkpoint_runs(script, files, course, flags, tmp_path):
    """Of those that were planted, and their sizes put in the checkpoint's list."""
    checkpoint, target = flags["output_dir"] / "checkpoint-3", tmp_path / "exploded"
    path = checkpoint / "training_state.json"
    state = json.loads(path.read_text())
    for file in files:
        set_bomb(checkpoint / file, target)
        state["files"][file] = (checkpoint / file).stat().st_size
    path.write_text(json.dumps(state))
    flags |= {"max_train_steps": 4, "resume_from_checkpoint": True}
    if files == ["optimizer.bin"]:  # nothing else is needed: all that is drawn has its own seed
        assert refusal(flags, script).startswith(f"{checkpoint}: ")
    else:
        run(flags, script)
    assert not target.exists()
