"""End to end on the tiny pipeline: what a run writes, logs and leaves behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from conftest import ROOT, command_line, launch, run
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextModel

from train_text_to_image import random_generator

SCRIPTS = ["train_text_to_image", "train_text_to_image_prior", "train_text_to_image_decoder"]
GOLDEN = Path(__file__).with_name("golden_losses.json")


def events_of(output_dir, project="text2image-fine-tune"):
    events = EventAccumulator(str(output_dir / "logs" / project))
    events.Reload()
    return events


def losses_of(output_dir):
    return [event.value for event in events_of(output_dir).Scalars("train_loss")]


def unet_of(folder):
    return load_file(Path(folder) / "unet" / "diffusion_pytorch_model.safetensors")


def picture(folder, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline("red dots", num_inference_steps=2, height=32, width=32, generator=generator).images[0]


# The result -----------------------------------------------------------------------------------------------------------


def test_the_result_is_a_pipeline_that_draws(flags, pipeline_folder):
    run(flags)
    assert np.asarray(picture(flags["output_dir"])).shape == (32, 32, 3)
    trained, before = unet_of(flags["output_dir"]), unet_of(pipeline_folder)
    assert trained.keys() == before.keys()
    assert not any(torch.equal(trained[name], before[name]) for name in trained if "weight" in name)
    for part in ("vae", "text_encoder"):  # frozen: the very same
        name = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        one, two = load_file(flags["output_dir"] / part / name), load_file(pipeline_folder / part / name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list(flags["output_dir"].rglob("*.bin"))


def test_loss_falls_when_one_image_is_learned_by_heart(flags, tmp_path):
    tiny.make_images(tmp_path / "one", number=1)
    flags |= {"train_data_dir": tmp_path / "one", "center_crop": True, "learning_rate": 3e-3, "max_train_steps": 80}
    run({**flags, "train_batch_size": 8})
    losses = losses_of(flags["output_dir"])
    assert len(losses) == 80
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_the_frozen_parts_keep_their_precision_in_a_bf16_run(flags, pipeline_folder, monkeypatch):
    """They train in bf16, beside a UNet in float32, and are saved as they were."""
    dtypes = []

    def noted(function):
        def note(self, *args, **kwargs):
            dtypes.append((type(self).__name__, self.dtype))
            return function(self, *args, **kwargs)

        return note

    for model_class, name in ((UNet2DConditionModel, "forward"), (AutoencoderKL, "encode"), (CLIPTextModel, "forward")):
        monkeypatch.setattr(model_class, name, noted(getattr(model_class, name)))
    run({**flags, "mixed_precision": "bf16"})
    frozen = {("AutoencoderKL", torch.bfloat16), ("CLIPTextModel", torch.bfloat16)}
    assert set(dtypes) == {("UNet2DConditionModel", torch.float32), *frozen}
    vae = load_file(flags["output_dir"] / "vae" / "diffusion_pytorch_model.safetensors")
    before = load_file(pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(vae[name], before[name]) for name in before)
    assert all(value.dtype == torch.float32 for value in unet_of(flags["output_dir"]).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"snr_gamma": 5.0, "noise_offset": 0.1, "input_perturbation": 0.1, "dream_training": True, "scale_lr": True},
        {"prediction_type": "v_prediction", "dream_training": True, "use_8bit_adam": True, "allow_tf32": True},
        {"prediction_type": "sample", "snr_gamma": 5.0, "resolution": 36, "max_train_samples": 3, "center_crop": True}
        | {"image_interpolation_mode": "bicubic", "max_grad_norm": 0.1, "foreach_ema": True}
        | {"lr_scheduler": "polynomial", "lr_warmup_steps": 1, "local_rank": 0, "dataloader_num_workers": 1},
        {"mixed_precision": "bf16", "validation_prompts": ["red dots"], "use_ema": True, "dream_training": True}
        | {"gradient_checkpointing": True, "max_grad_norm": "inf"},
    ],
    ids=range(4),
)
def test_flags_run(flags, changes):
    run({**flags, **changes})
    losses = losses_of(flags["output_dir"])
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_stable_diffusion_2_with_v_prediction(flags, tmp_path):
    tiny.make_stable_diffusion(tmp_path / "sd2", version=2, prediction_type="v_prediction")
    run({**flags, "pretrained_model_name_or_path": tmp_path / "sd2"})
    assert json.loads((flags["output_dir"] / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == (
        "v_prediction"
    )
    picture(flags["output_dir"])


def test_the_result_samples_by_the_prediction_type_it_was_trained_on(flags):
    run({**flags, "prediction_type": "v_prediction"})
    scheduler = json.loads((flags["output_dir"] / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["_class_name"] == "PNDMScheduler"


def test_weights_of_a_variant(flags, tmp_path, pipeline_folder):
    """A folder that holds only fp16 files: trained in float32 all the same."""
    StableDiffusionPipeline.from_pretrained(pipeline_folder, dtype=torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    run({**flags, "pretrained_model_name_or_path": tmp_path / "half", "variant": "fp16"})
    picture(flags["output_dir"])
    assert all(value.dtype == torch.float32 for value in unet_of(flags["output_dir"]).values())


def test_gradient_checkpointing_recomputes_and_changes_no_bit(flags, tmp_path, monkeypatch):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    run({**flags, "output_dir": tmp_path / "plain"})
    assert not calls
    run({**flags, "output_dir": tmp_path / "recomputed", "gradient_checkpointing": True})
    assert len(calls) >= 10
    plain, recomputed = unet_of(tmp_path / "plain"), unet_of(tmp_path / "recomputed")
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_accumulation_is_the_same_as_a_large_batch(flags, tmp_path):
    """Also across the ends of epochs: 6 x 4 examples of 8 images, where 3 x 4 end in the middle of one."""
    flags |= {"max_train_steps": 3, "gradient_accumulation_steps": 1, "train_batch_size": 6}
    run({**flags, "output_dir": tmp_path / "large"})
    run({**flags, "output_dir": tmp_path / "small", "train_batch_size": 2, "gradient_accumulation_steps": 3})
    np.testing.assert_allclose(losses_of(tmp_path / "large"), losses_of(tmp_path / "small"), rtol=1e-5)


def test_epochs_become_steps(flags):
    """3 passes over 8 images in batches of 2 x 2 are 6 updates; a last part of a batch is filled, not dropped."""
    run({**flags, "max_train_steps": None, "num_train_epochs": 3, "gradient_accumulation_steps": 2})
    assert len(losses_of(flags["output_dir"])) == 6
    run({**flags, "output_dir": flags["output_dir"].with_name("b"), "max_train_steps": None, "num_train_epochs": 1,
         "train_batch_size": 3})  # fmt: skip
    assert len(losses_of(flags["output_dir"].with_name("b"))) == 3


# Golden losses --------------------------------------------------------------------------------------------------------


def golden_run(script, output_dir):
    """A short run with everything on that enters the loss; its losses are compared with stored ones."""
    folder = output_dir.with_name("golden")
    tiny.make_images(folder / "images", caption_lists=True, seed=1)
    flags = {"train_data_dir": folder / "images", "seed": 1, "resolution": 32, "output_dir": output_dir}
    flags |= {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 6, "snr_gamma": 5.0}
    flags |= {"learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "proportion_empty_prompts": 0.2}
    if script == "train_text_to_image":
        tiny.make_stable_diffusion(folder / "model", seed=1)
        flags |= {"pretrained_model_name_or_path": folder / "model", "random_flip": True}
        flags |= {"noise_offset": 0.1, "input_perturbation": 0.1}
    else:
        tiny.make_kandinsky_prior(folder / "prior", seed=1)
        tiny.make_kandinsky_decoder(folder / "decoder", seed=1)
        flags |= {"pretrained_prior_model_name_or_path": folder / "prior"}
        flags |= {"pretrained_decoder_model_name_or_path": folder / "decoder"}
        # Nothing to resize: releases differ in how CLIP's image processor rounds.
        tiny.make_images(folder / "images", caption_lists=True, seed=1, largest=tiny.RESOLUTION)
    run(flags, script)
    return losses_of(output_dir)


@pytest.mark.parametrize("script", SCRIPTS)
def test_golden_losses(script, tmp_path):
    """After a wanted change, write them anew: PYTHONPATH=.:tests OMP_NUM_THREADS=1 python tests/test_training.py"""
    golden = json.loads(GOLDEN.read_text())["losses"]
    np.testing.assert_allclose(golden_run(script, tmp_path / "output"), golden[script], rtol=1e-4)


# EMA ------------------------------------------------------------------------------------------------------------------


def test_ema_is_the_average_that_its_formula_says(flags):
    """decay_t = min(0.9999, (1 + t) / (10 + t)) for t = 1, 2, ..., and the first update is copied."""
    run({**flags, "use_ema": True, "checkpointing_steps": 1, "max_train_steps": 4, "learning_rate": 1e-2})
    average = None
    for step in (1, 2, 3, 4):
        checkpoint = flags["output_dir"] / f"checkpoint-{step}"
        weights = {name: value.double() for name, value in unet_of(checkpoint).items()}
        decay = (1 + step - 1) / (10 + step - 1) if step > 1 else 0
        average = {n: decay * average[n] + (1 - decay) * weights[n] if average else weights[n] for n in weights}
        stored = load_file(checkpoint / "unet_ema" / "diffusion_pytorch_model.safetensors")
        for name in stored:
            torch.testing.assert_close(stored[name].double(), average[name], rtol=1e-5, atol=1e-6)


def test_offloading_the_ema_changes_no_bit(flags, tmp_path):
    run({**flags, "use_ema": True, "output_dir": tmp_path / "on"})
    run({**flags, "use_ema": True, "offload_ema": True, "output_dir": tmp_path / "off"})
    on, off = unet_of(tmp_path / "on"), unet_of(tmp_path / "off")
    assert all(torch.equal(on[name], off[name]) for name in on)


# Validation -----------------------------------------------------------------------------------------------------------


def test_validation_draws_when_it_is_due_and_changes_no_bit(flags, tmp_path):
    flags |= {"use_ema": True, "max_train_steps": 4}
    prompts = {"validation_prompts": ["red dots", "green bars"], "validation_steps": 2}
    run({**flags, "output_dir": tmp_path / "plain"})
    run({**flags, **prompts, "output_dir": tmp_path / "drawn"})
    plain, drawn = unet_of(tmp_path / "plain"), unet_of(tmp_path / "drawn")
    assert all(torch.equal(plain[name], drawn[name]) for name in plain)
    grids = sorted(path.name for path in (tmp_path / "drawn" / "validation").iterdir())
    assert grids == ["step-000002.png", "step-000004.png"]
    assert PIL.Image.open(tmp_path / "drawn" / "validation" / grids[0]).size == (2 * 34 + 2, 34 + 2)
    images = events_of(tmp_path / "drawn").Images("validation")
    assert [event.step for event in images] == [2, 4]


def test_validation_pictures_are_those_of_the_average(flags, tmp_path):
    """What the pipeline draws with the checkpoint's averaged weights, from the noise that belongs to each prompt."""
    prompts = ["red dots", "red dots"]
    flags |= {"use_ema": True, "learning_rate": 1e-2, "validation_prompts": prompts, "validation_steps": 2}
    run({**flags, "max_train_steps": 3, "checkpointing_steps": 2})
    grid = PIL.Image.open(flags["output_dir"] / "validation" / "step-000002.png")
    unet = UNet2DConditionModel.from_pretrained(flags["output_dir"] / "checkpoint-2" / "unet_ema")
    pipeline = StableDiffusionPipeline.from_pretrained(flags["pretrained_model_name_or_path"], unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    cells = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(int(random_generator(0, 2, index).integers(2**32)))
        options = {"num_inference_steps": 20, "generator": generator, "height": 32, "width": 32}
        cells.append(np.asarray(grid.crop((2 + 34 * index, 2, 34 + 34 * index, 34))).astype(int))
        assert np.abs(cells[-1] - np.asarray(pipeline(prompt, **options).images[0])).max() <= 1
    assert np.abs(cells[0] - cells[1]).max() > 1


def test_validation_by_epochs(flags, tmp_path):
    """8 images in batches of 2: an epoch ends at steps 4, 8 and 12."""
    flags |= {"validation_prompts": ["red dots"], "validation_epochs": 2, "max_train_steps": 13, "logging_steps": 5}
    run(flags)
    grids = sorted(path.name for path in (flags["output_dir"] / "validation").iterdir())
    assert grids == ["step-000008.png", "step-000013.png"]


def test_validation_takes_the_same_noise_every_time(flags):
    """With a learning rate that changes nothing, every grid is the same picture."""
    flags |= {"validation_prompts": ["red dots"], "validation_steps": 1, "learning_rate": 1e-30, "adam_weight_decay": 0}
    run(flags)
    first, second = (PIL.Image.open(path) for path in sorted((flags["output_dir"] / "validation").iterdir()))
    assert first.tobytes() == second.tobytes()


# The optimizer --------------------------------------------------------------------------------------------------------


def test_weight_decay_is_adamw_s(flags, tmp_path, pipeline_folder):
    """After one update, decay has taken learning rate x decay of the weight, and nothing else differs."""
    flags |= {"max_train_steps": 1, "learning_rate": 1e-2}
    run({**flags, "output_dir": tmp_path / "without", "adam_weight_decay": 0})
    run({**flags, "output_dir": tmp_path / "with", "adam_weight_decay": 0.5})
    before, without, with_ = (unet_of(folder) for folder in (pipeline_folder, tmp_path / "without", tmp_path / "with"))
    for name in before:
        torch.testing.assert_close(without[name] - with_[name], 5e-3 * before[name], rtol=0, atol=1e-6)


# Trackers -------------------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_update(flags):
    flags |= {"max_train_steps": 7, "logging_steps": 3, "lr_scheduler": "linear", "lr_warmup_steps": 2}
    run({**flags, "learning_rate": 1e-3})
    events = events_of(flags["output_dir"])
    for name in ("train_loss", "grad_norm", "lr", "examples_per_second", "data_wait"):
        assert [event.step for event in events.Scalars(name)] == list(range(1, 8)), name
    rates = [event.value for event in events.Scalars("lr")]
    np.testing.assert_allclose(rates, [0, 0.5e-3, 1e-3, 0.8e-3, 0.6e-3, 0.4e-3, 0.2e-3], rtol=1e-6)
    assert all(0 < event.value < 1 for event in events.Scalars("data_wait"))
    walltimes = [event.wall_time for event in events.Scalars("train_loss")]
    assert len(set(walltimes)) == 7  # each update at the time when it was made, not when it was written
    assert walltimes == sorted(walltimes)
    speeds = [event.value for event in events.Scalars("examples_per_second")]
    assert len(set(speeds[:3])) == len(set(speeds[3:6])) == 1  # one for each stretch between two readings
    seconds = 3 * 2 / speeds[3]  # of 3 updates of 2 images, from the wait for the first batch to the reading
    assert walltimes[5] - walltimes[3] < seconds + 1e-3
    assert seconds < walltimes[6] - walltimes[2] + 1e-3


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_schedule_counts_updates(flags, accumulation):
    run({**flags, "gradient_accumulation_steps": accumulation, "max_train_steps": 3, "lr_scheduler": "linear"})
    rates = [event.value for event in events_of(flags["output_dir"]).Scalars("lr")]
    np.testing.assert_allclose(rates, [1e-4, 1e-4 * 2 / 3, 1e-4 / 3], rtol=1e-6)


def test_scale_lr(flags):
    run({**flags, "scale_lr": True, "gradient_accumulation_steps": 3})
    assert events_of(flags["output_dir"]).Scalars("lr")[0].value == pytest.approx(1e-4 * 2 * 3)


def everything_written_below(folder):
    return b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())


def assert_wandb_has_everything(folder):
    """In `folder`/wandb lies one run, with all that a run logs."""
    (log,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    for name in (b"train_loss", b"grad_norm", b"examples_per_second", b"data_wait", b"validation", b"learning_rate"):
        assert name in content, name
    assert list(log.parent.glob("files/media/images/validation*.png"))


def test_wandb_offline_and_no_token_anywhere(flags, tmp_path):
    token = "hf_NotToBeSeenAnywhere"
    flags |= {"report_to": "wandb", "hub_token": token, "validation_prompts": ["red dots"], "logging_steps": 1}
    result = launch(flags, WANDB_DIR=str(tmp_path), WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert_wandb_has_everything(tmp_path)
    written = everything_written_below(tmp_path) + (result.stdout + result.stderr).encode()
    assert b"red dots" in written
    assert token.encode() not in written


# The model card -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [None, ["red dots", 'a "quoted" | prompt: #1']])
def test_the_model_card_is_always_written_and_true(flags, prompts):
    from huggingface_hub import ModelCard

    run({**flags, "validation_prompts": prompts, "hub_model_id": "somebody/something", "hub_token": "hf_secret"})
    card = ModelCard.load(flags["output_dir"] / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.base_model is None  # a local folder, which is nothing to the Hub
    assert "# somebody/something" in card.text
    assert "hf_secret" not in card.content
    assert ("validation/step-000002.png" in card.text) == bool(prompts)
    for path in re.findall(r"\]\(([^)]*)\)", card.text):
        assert (flags["output_dir"] / path).is_file()
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    code = code.replace("somebody/something", str(flags["output_dir"])).replace(
        '].save("', f'].save("{flags["output_dir"]}/'
    )
    code = code.replace("pipeline(", "pipeline(num_inference_steps=1, height=32, width=32, prompt=")
    exec(compile(code, "card", "exec"), {})
    assert (flags["output_dir"] / "picture.png").is_file()
    recorded = json.loads(re.findall(r"```json\n(.*?)```", card.text, re.DOTALL)[-1])
    assert recorded["resolution"] == 32
    assert "max_train_samples" not in recorded  # was not given


def test_the_model_card_of_a_local_run_names_its_folder(flags):
    run({**flags, "seed": None})
    text = (flags["output_dir"] / "README.md").read_text()
    assert f'from_pretrained("{flags["output_dir"]}")' in text
    assert re.search("^# .*output$", text, re.MULTILINE)
    assert re.search(r'"seed": \d+,', text)  # drawn, and not lost


def test_the_model_card_shows_the_pictures_of_its_own_run(flags):
    """Not those of a longer one that was resumed from an earlier checkpoint."""
    flags |= {"validation_prompts": ["red dots"], "validation_epochs": 100, "checkpointing_steps": 1}
    run({**flags, "max_train_steps": 3})
    run({**flags, "max_train_steps": 2, "resume_from_checkpoint": "checkpoint-1"})
    assert "validation/step-000002.png" in (flags["output_dir"] / "README.md").read_text()


# Launchers ------------------------------------------------------------------------------------------------------------


def test_accumulation_of_the_launcher_does_not_count(flags, tmp_path, monkeypatch):
    """`accelerate launch --gradient_accumulation_steps=4` sets it; what counts is the script's own flag, here 1."""
    run({**flags, "output_dir": tmp_path / "plain"})
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run(flags)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() == (flags["output_dir"] / weights).read_bytes()


NOTEBOOK = """
from accelerate.utils import write_basic_config
write_basic_config()

from accelerate import notebook_launcher
from train_text_to_image import main, parse_args
notebook_launcher(main, (parse_args({words}),), num_processes=1)
"""


def test_notebook_launcher_after_write_basic_config(flags, tmp_path):
    code = NOTEBOOK.format(words=command_line({**flags, "max_train_steps": 1}))
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "accelerate" / "default_config.yaml").is_file()
    assert (flags["output_dir"] / "model_index.json").is_file()


if __name__ == "__main__":
    import importlib.metadata
    import tempfile

    losses = {}
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            losses[script] = golden_run(script, Path(folder) / "output")
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "torchvision", "diffusers", "transformers")
    }
    GOLDEN.write_text(json.dumps({"versions": versions, "losses": losses}, indent=2) + "\n")
