"""Checkpoints: there whole or not at all, found, pruned, and resumed to the last bit."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import launch, reset_accelerate, run
from diffusers import UNet2DConditionModel
from faults import check_checkpoints, state_of_run
from safetensors.torch import load_file

from train_text_to_image import RunError, list_checkpoints


def make_folders(output_dir, *steps):
    """Folders of checkpoints' names, with nothing in them."""
    for step in steps:
        (output_dir / f"checkpoint-{step}").mkdir(parents=True)


# Finding --------------------------------------------------------------------------------------------------------------


def test_only_finished_checkpoints_are_listed_in_order_of_their_steps(tmp_path):
    make_folders(tmp_path, 900, 1000, 20, "2000.partial", "3000.removed", "best")
    (tmp_path / "checkpoint-4000").touch()  # a file
    assert [step for step, _ in list_checkpoints(tmp_path)] == [20, 900, 1000]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("wanted", ["checkpoint-7", "7", "nonsense"])
def test_a_checkpoint_that_is_not_there_is_named(flags, wanted):
    make_folders(flags["output_dir"], 5, 10)
    with pytest.raises(RunError, match=f"{wanted}: ") as error:
        run({**flags, "resume_from_checkpoint": wanted})
    assert "\n" not in str(error.value)
    assert names_in(flags["output_dir"]) == ["checkpoint-10", "checkpoint-5"]


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_finished_model_is_not_replaced(flags, resume):
    """One that has no checkpoint; of what has one, tests below."""
    flags["output_dir"].mkdir()
    (flags["output_dir"] / "model_index.json").touch()
    with pytest.raises(RunError, match=f"{flags['output_dir']}"):
        run({**flags, "resume_from_checkpoint": resume})
    assert [path.name for path in flags["output_dir"].iterdir()] == ["model_index.json"]


# Saving ---------------------------------------------------------------------------------------------------------------


def names_in(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def test_checkpoints_of_a_run(flags):
    """Accumulation, EMA, the limit, and the layout that `from_pretrained` reads."""
    flags |= {"max_train_steps": 4, "gradient_accumulation_steps": 2, "checkpointing_steps": 1, "use_ema": True}
    (flags["output_dir"] / "checkpoint-3.partial").mkdir(parents=True)  # what a crash left
    run({**flags, "checkpoints_total_limit": 2})
    assert names_in(flags["output_dir"]) == ["checkpoint-3", "checkpoint-4"]
    checkpoint = flags["output_dir"] / "checkpoint-4"
    state = state_of_run(checkpoint)
    assert (state["step"], state["examples_seen"], state["seed"]) == (4, 16, 0)
    assert set(state["files"]) == {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {
        "training_state.json"
    }
    assert not list(checkpoint.rglob("*.pkl"))  # nothing is drawn from a global generator: there is no state to keep
    weights = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet").state_dict()
    average = UNet2DConditionModel.from_pretrained(checkpoint / "unet_ema").state_dict()
    result = UNet2DConditionModel.from_pretrained(flags["output_dir"], subfolder="unet").state_dict()
    assert all(torch.equal(average[name], result[name]) for name in result)
    assert not all(torch.equal(weights[name], result[name]) for name in result)


def test_a_failed_save_leaves_the_older_checkpoints_alone(flags, monkeypatch):
    """The disk is full when the second checkpoint is flushed: the first still stands, and only the first."""
    fsync = os.fsync

    def full_disk(descriptor):
        if "checkpoint-2.partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match="checkpoint-2 cannot be written.*No space left"):
        run({**flags, "checkpointing_steps": 1, "checkpoints_total_limit": 1})
    assert names_in(flags["output_dir"]) == ["checkpoint-1"]
    assert check_checkpoints("train_text_to_image", flags["output_dir"]) == [1]


# Resuming -------------------------------------------------------------------------------------------------------------


def tensors_of(checkpoint, models=("unet", "unet_ema")):
    """Every weight, EMA weight and optimizer moment in a checkpoint, {name: tensor}."""
    tensors = {}
    for name in models:
        for key, value in load_file(checkpoint / name / "diffusion_pytorch_model.safetensors").items():
            tensors[f"{name}.{key}"] = value
    moments = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    for index, state in moments.items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    return tensors


def largest_difference(one, other, models=("unet", "unet_ema")):
    one, other = tensors_of(one, models), tensors_of(other, models)
    assert one.keys() == other.keys()
    assert len(one) > 100
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def test_resume_is_exact(flags, caption_lists_folder, tmp_path):
    """6 steps at a stretch, and 3, a fresh process and 3 more, in the middle of an epoch: not a bit differs."""
    flags |= {"train_data_dir": caption_lists_folder, "use_ema": True, "random_flip": True, "lr_scheduler": "cosine"}
    flags |= {"gradient_accumulation_steps": 2, "proportion_empty_prompts": 0.2, "checkpointing_steps": 3}
    flags |= {"max_train_steps": 6, "noise_offset": 0.1, "learning_rate": 1e-3}  # 12 examples in 3 steps, of 8 images
    run(flags)
    reset_accelerate()
    whole = flags["output_dir"]

    halves = tmp_path / "halves"
    run({**flags, "output_dir": halves, "dataloader_num_workers": 2})
    reset_accelerate()
    assert largest_difference(whole / "checkpoint-3", halves / "checkpoint-3") == 0.0
    assert largest_difference(whole / "checkpoint-6", halves / "checkpoint-6") == 0.0  # with two data workers
    for path in (halves / "unet", halves / "checkpoint-6"):  # as if it had been stopped after step 3
        shutil.rmtree(path)
    second_half = launch({**flags, "output_dir": halves, "resume_from_checkpoint": True})
    assert second_half.returncode == 0, second_half.stderr
    assert str(halves / "checkpoint-3") in second_half.stderr
    assert largest_difference(whole / "checkpoint-6", halves / "checkpoint-6") == 0.0
    assert largest_difference(whole / "checkpoint-3", halves / "checkpoint-6") > 0.0
    results = [load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (whole, halves)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_resume_with_8_bit_adam_is_exact(flags, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, see requirements.txt")
    flags |= {"use_8bit_adam": True, "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-3}
    run(flags)
    expected = (flags["output_dir"] / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(flags["output_dir"] / "checkpoint-4")
    run({**flags, "resume_from_checkpoint": "latest"})
    assert (flags["output_dir"] / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == expected


def test_resume_keeps_a_seed_that_was_drawn(flags):
    run({**flags, "seed": None, "checkpointing_steps": 1, "max_train_steps": 1})
    run({**flags, "seed": None, "checkpointing_steps": 1, "max_train_steps": 2, "resume_from_checkpoint": "latest"})
    states = [state_of_run(flags["output_dir"] / f"checkpoint-{step}") for step in (1, 2)]
    assert states[0]["seed"] == states[1]["seed"]


def test_latest_with_no_checkpoint_starts_anew(flags, capsys):
    run({**flags, "resume_from_checkpoint": True, "max_train_steps": 1})
    assert "steps 0 to 1" in capsys.readouterr().err
    assert (flags["output_dir"] / "model_index.json").is_file()


def test_resume_at_or_past_the_last_step_only_saves_the_result(flags):
    """By any of the names of a checkpoint. Nothing is set aside: without an update to do there is no new course."""
    run({**flags, "checkpointing_steps": 1})
    result = flags["output_dir"] / "unet" / "diffusion_pytorch_model.safetensors"
    expected = result.read_bytes()
    weights = tensors_of(flags["output_dir"] / "checkpoint-1", ["unet"])
    for steps, name in (
        (2, "latest"),
        (1, "checkpoint-2"),
        (1, "checkpoint-1"),
        (1, f"{flags['output_dir']}/checkpoint-1"),
    ):
        result.unlink()
        run({**flags, "checkpointing_steps": 1, "max_train_steps": steps, "resume_from_checkpoint": name})
        if name.endswith("2") or name == "latest":
            assert result.read_bytes() == expected
        else:
            assert all(torch.equal(value, weights[f"unet.{key}"]) for key, value in load_file(result).items())
        assert sorted(path.name for path in flags["output_dir"].glob("*-*")) == ["checkpoint-1", "checkpoint-2"]


def test_resume_from_an_earlier_checkpoint_sets_the_later_ones_aside(flags, capsys):
    """They are no longer the latest, and not lost."""
    flags |= {"checkpointing_steps": 1, "max_train_steps": 3, "use_ema": True, "checkpoints_total_limit": 2}
    run({**flags, "checkpoints_total_limit": 3})
    before = tensors_of(flags["output_dir"] / "checkpoint-3")
    run({**flags, "resume_from_checkpoint": "checkpoint-1"})
    assert names_in(flags["output_dir"]) == ["checkpoint-2", "checkpoint-3"]  # the limit prunes none of the new ones
    for folder in (flags["output_dir"], *flags["output_dir"].glob("set-aside-*-checkpoint-3")):
        after = tensors_of(folder / "checkpoint-3" if folder == flags["output_dir"] else folder)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list(flags["output_dir"].glob("set-aside-*"))) == 2
    assert "set-aside-" in capsys.readouterr().err


def test_resume_with_another_split_of_the_same_batch_sees_the_same_examples(flags):
    """2 x 3 and 3 x 2 are the same global batch: equal but for the order of a float sum."""
    flags |= {"use_ema": True, "checkpointing_steps": 1, "max_train_steps": 4, "gradient_accumulation_steps": 3}
    run(flags)
    other = {**flags, "output_dir": flags["output_dir"].with_name("other")}
    run(other)  # to its end: in mid-run, accelerate has counted three micro-steps when checkpoint-1 is written
    run({**other, "train_batch_size": 3, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "checkpoint-1"})
    one, two = (load_file(f["output_dir"] / "unet" / "diffusion_pytorch_model.safetensors") for f in (flags, other))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_resume_with_other_settings_of_the_optimizer(flags, capsys):
    """The flags of the second command line hold, and the log says what changed."""
    from test_training import events_of

    run({**flags, "checkpointing_steps": 2, "learning_rate": 1e-3})
    changed = {"learning_rate": 1e-5, "adam_weight_decay": 0.5, "adam_beta1": 0.8, "max_train_steps": 4}
    run({**flags, "checkpointing_steps": 2, "resume_from_checkpoint": "latest", **changed})
    rates = {event.step: event.value for event in events_of(flags["output_dir"]).Scalars("lr")}
    assert rates == pytest.approx({1: 1e-3, 2: 1e-3, 3: 1e-5, 4: 1e-5})
    (group,) = torch.load(flags["output_dir"] / "checkpoint-4" / "optimizer.bin", weights_only=True)["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.8, 0.999))
    assert re.search(r"--learning_rate 1e-05 .*0\.001|--learning_rate 0\.001 .*1e-05", capsys.readouterr().err)


def test_resume_counts_epochs_from_the_start_of_the_run(flags):
    """8 images in batches of 2: two epochs are 8 steps, of which 4 are done."""
    flags |= {"max_train_steps": None, "checkpointing_steps": 4}
    run({**flags, "num_train_epochs": 1})
    run({**flags, "num_train_epochs": 2, "resume_from_checkpoint": "latest"})
    assert names_in(flags["output_dir"]) == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize("file", ["optimizer.bin", "training_state.json"])
def test_a_checkpoint_with_other_bytes_of_the_same_length(flags, file):
    run({**flags, "checkpointing_steps": 2})
    path = flags["output_dir"] / "checkpoint-2" / file
    path.write_bytes(b" " * path.stat().st_size if file == "optimizer.bin" else b"{}")
    with pytest.raises(RunError, match="checkpoint-2: the optimizer|--resume_from_checkpoint latest: .*no complete"):
        run({**flags, "max_train_steps": 3, "resume_from_checkpoint": "latest"})


def test_resume_with_the_other_kind_of_optimizer_is_an_error(flags):
    run({**flags, "checkpointing_steps": 2})
    with pytest.raises(RunError, match="checkpoint-2.*use_8bit_adam"):
        run({**flags, "max_train_steps": 3, "use_8bit_adam": True, "resume_from_checkpoint": "latest"})


def test_resume_with_ema_from_a_checkpoint_without_is_an_error(flags):
    run({**flags, "checkpointing_steps": 2})
    with pytest.raises(RunError, match="--output_dir .*--resume_from_checkpoint"):
        run(flags)  # over what is there
    with pytest.raises(RunError, match="checkpoint-2.*ema|ema.*checkpoint-2"):
        run({**flags, "max_train_steps": 3, "use_ema": True, "resume_from_checkpoint": "latest"})
