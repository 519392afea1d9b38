"""Stable Diffusion XL: two text encoders, micro-conditioning, biased timesteps, another VAE, and what is refused.

What the machinery does for every script is tested with this one in test_processes.py, test_faults.py, test_cache.py and
test_lora.py.
"""

import json
import re
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tiny
import torch
from conftest import ROOT, command_line, reset_accelerate, run
from diffusers import (
    AutoencoderKL,
    AutoPipelineForText2Image,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from faults import largest_difference
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train_text_to_image
import train_text_to_image_sdxl
from train_text_to_image_sdxl import (
    RunError,
    draw_noise,
    encode_rows,
    parse_args,
    preprocess_train,
    random_generator,
    read_image,
    timestep_distribution,
    train_transforms,
    training_losses,
)

SCRIPT = "train_text_to_image_sdxl"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(folders):
    return folders[SCRIPT]["pretrained_model_name_or_path"]


@pytest.fixture
def flags(base, caption_lists_folder, tmp_path):
    """The flags of a short run on the tiny pipeline."""
    flags = {"pretrained_model_name_or_path": base, "train_data_dir": caption_lists_folder, "resolution": 32, "seed": 0}
    flags |= {"train_batch_size": 2, "max_train_steps": 1, "lr_warmup_steps": 0, "output_dir": tmp_path / "output"}
    return {**flags, "report_to": "none"}


def arguments(**flags):
    given = {"pretrained_model_name_or_path": "model", "train_data_dir": "images", "resolution": 32}
    return parse_args(command_line({**given, **flags}))


def rows_of(folder):
    """The rows of a folder of images, as `datasets` gives them."""
    lines = [json.loads(line) for line in (Path(folder) / "metadata.jsonl").read_text().splitlines()]
    return [{"image": {"bytes": None, "path": str(folder / line["file_name"])}, "text": line["text"]} for line in lines]


# The objective --------------------------------------------------------------------------------------------------------


def by_hand(pipeline, scheduler, args, row, example, position):
    """The loss of one example with the models called outside the script; from it are taken noise, timestep and crop."""
    *_, flip, choice, dropout = random_generator(0, 1, position).random(5)
    caption = "" if dropout < args.proportion_empty_prompts else row["text"][int(2 * choice)]
    image = PIL.Image.open(row["image"]["path"])
    height, width, top, left, *target = example["time_ids"].tolist()
    assert (height, width, target) == (image.height, image.width, [32, 32])
    image = image.resize([int(32 * side / min(image.size)) for side in image.size], PIL.Image.Resampling.LANCZOS)
    image = PIL.ImageOps.mirror(image) if flip < 0.5 else image  # before the crop, as upstream flips
    pixels = np.asarray(image.crop((left, top, left + 32, top + 32)), dtype=np.float32)
    posterior = pipeline.vae.encode(torch.from_numpy(pixels / 255 * 2 - 1).permute(2, 0, 1)[None]).latent_dist
    latents = 0.13025 * (posterior.mean + torch.exp(0.5 * posterior.logvar) * example["posterior_noise"])
    noise = (example["noise"] + args.noise_offset * example["offset_noise"])[None]
    states, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    options = {"dtype": torch.float32, "text_encoder_projection_dim": 20}
    time_ids = pipeline._get_add_time_ids((height, width), (top, left), (32, 32), **options)
    timestep = example["timesteps"][None]
    added = {"text_embeds": pooled, "time_ids": time_ids}
    noisy = scheduler.add_noise(latents, noise, timestep)
    prediction = pipeline.unet(noisy, timestep, states, added_cond_kwargs=added).sample
    velocity = scheduler.get_velocity(latents, noise, timestep)
    error = (prediction - (noise if scheduler.config.prediction_type == "epsilon" else velocity)).square().mean()
    if not args.snr_gamma:
        return error.item()
    snr = compute_snr(scheduler, timestep)
    divisor = snr + (scheduler.config.prediction_type == "v_prediction")
    return (error * snr.clamp(max=args.snr_gamma) / divisor).item()


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_training_loss(base, caption_lists_folder, prediction_type, snr_gamma):
    """From rows of the data set, with random crops, flips and captions, to the loss of each."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler", prediction_type=prediction_type)
    args = arguments(random_flip=True, proportion_empty_prompts=0.3, noise_offset=0.1, snr_gamma=snr_gamma)
    tokenizers, text_encoders = [
        [getattr(pipeline, f"{name}{n}") for n in ("", "_2")] for name in ("tokenizer", "text_encoder")
    ]
    distribution = timestep_distribution(args, 1000)
    rows = rows_of(caption_lists_folder)
    examples = [
        preprocess_train(args, tokenizers, (4, 8, 8), distribution, row, random_generator(0, 1, position))
        for position, row in enumerate(rows)
    ]
    batch = default_collate(examples)
    losses = training_losses(
        {**batch}, pipeline.unet, pipeline.vae, text_encoders, scheduler.alphas_cumprod, prediction_type, args
    )
    with torch.no_grad():
        expected = [
            by_hand(pipeline, scheduler, args, *pair, position)
            for position, pair in enumerate(zip(rows, examples, strict=True))
        ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert losses.mean().item() == pytest.approx(np.mean(expected), rel=1e-6)
    losses.mean().backward()
    assert all(parameter.grad is None for model in (pipeline.vae, *text_encoders) for parameter in model.parameters())


@pytest.mark.parametrize("center_crop", [False, True])
def test_the_crop_is_the_one_that_the_unet_is_told(center_crop):
    """The corner lies in the image as it is flipped, so that the told square of it is the example's pixels."""
    args, told = arguments(random_flip=True, center_crop=center_crop), set()
    for seed in range(40):
        width, height = ((32, 47), (47, 32))[seed % 2]
        image = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels, time_ids = train_transforms(args, image, random_generator(0, 1, seed))
        flipped = random_generator(0, 1, seed).random(3)[2] < 0.5
        whole = np.asarray(PIL.ImageOps.mirror(image) if flipped else image)
        top, left = time_ids[2:4].tolist()
        assert (whole[top : top + 32, left : left + 32] == pixels).all()
        assert time_ids.tolist() == [height, width, top, left, 32, 32]
        told.add((bool(flipped), top, left))
    assert len(told) == 4 if center_crop else len(told) > 20
    assert {flipped for flipped, *_ in told} == {True, False}


# Timesteps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "favoured"),
    [
        ({}, range(0)),
        ({"strategy": "earlier", "multiplier": 3.0}, range(250)),
        ({"strategy": "later", "multiplier": 0.5, "portion": 0.1}, range(900, 1000)),
        ({"strategy": "range", "multiplier": 2.0, "begin": 200, "end": 500}, range(200, 500)),
    ],
)
def test_timesteps_have_the_weights_that_the_flags_say(bias, favoured):
    """Exactly in their distribution, and in 4,000 examples to four standard deviations."""
    args = arguments(**{f"timestep_bias_{name}": value for name, value in bias.items()})
    weights = np.array([bias.get("multiplier", 1.0) if step in favoured else 1.0 for step in range(1000)])
    distribution = timestep_distribution(args, 1000)
    np.testing.assert_allclose(np.diff(distribution, prepend=0), weights / weights.sum(), rtol=1e-9)
    assert distribution[-1] == 1.0
    drawn = np.array(
        [draw_noise(args, (1, 1, 1), distribution, random_generator(0, 1, k))["timesteps"] for k in range(4000)]
    )
    assert drawn.dtype == np.int64
    for tenth in range(10):
        inside = slice(100 * tenth, 100 * tenth + 100)
        share = weights[inside].sum() / weights.sum()
        found = ((drawn >= inside.start) & (drawn < inside.stop)).mean()
        assert abs(found - share) < 4 * (share * (1 - share) / 4000) ** 0.5, tenth


@pytest.mark.parametrize("bounds", [(0, 1001), (500, 499)])
def test_a_range_that_is_none(bounds):
    args = arguments(timestep_bias_strategy="range", timestep_bias_begin=bounds[0], timestep_bias_end=bounds[1])
    with pytest.raises(RunError, match=f"--timestep_bias_begin {bounds[0]} --timestep_bias_end {bounds[1]}: .*1000"):
        timestep_distribution(args, 1000)


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(base, caption_lists_folder, tmp_path_factory):
    """The flags of a run of 6 updates at a stretch, 2 of them an epoch, with everything random and another VAE."""
    folder = tmp_path_factory.mktemp("sdxl")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    tiny.fill(vae, 100).save_pretrained(folder / "vae")
    flags = {"pretrained_model_name_or_path": base, "train_data_dir": caption_lists_folder, "resolution": 32, "seed": 0}
    flags |= {"pretrained_vae_model_name_or_path": folder / "vae", "use_ema": True, "random_flip": True}
    flags |= {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 6, "checkpointing_steps": 3}
    flags |= {"learning_rate": 1e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 0, "noise_offset": 0.1}
    flags |= {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0, "proportion_empty_prompts": 0.2}
    flags |= {"snr_gamma": 5.0, "output_dir": folder / "output", "validation_epochs": 10}
    run({**flags, "validation_prompts": ["red dots", "a picture"], "num_validation_images": 2}, SCRIPT)
    reset_accelerate()
    return flags


def test_a_resume_in_mid_epoch_changes_no_bit(whole, tmp_path):
    """Weights, averages and moments, with random crops."""
    shutil.copytree(whole["output_dir"] / "checkpoint-3", tmp_path / "output" / "checkpoint-3")
    run({**whole, "output_dir": tmp_path / "output", "resume_from_checkpoint": "latest"}, SCRIPT)
    folders = [folder / "checkpoint-6" for folder in (whole["output_dir"], tmp_path / "output")]
    assert largest_difference(*folders) == 0.0
    assert largest_difference(folders[0], whole["output_dir"] / "checkpoint-3") > 0.0


def test_the_result_draws_the_validation_pictures(whole):
    """Loaded in both ways, from the noise that belongs to each picture; it holds the VAE that it was trained with."""
    output, pictures = whole["output_dir"], []
    grid = PIL.Image.open(output / "validation" / "step-000006.png")
    for pipeline_class in (StableDiffusionXLPipeline, AutoPipelineForText2Image):
        pipeline = pipeline_class.from_pretrained(output)
        assert isinstance(pipeline, StableDiffusionXLPipeline)
        pipeline.set_progress_bar_config(disable=True)
        for index in range(4) if not pictures else ():
            generator = torch.Generator().manual_seed(int(random_generator(0, 2, index).integers(2**32)))
            options = {"num_inference_steps": 25, "generator": generator, "height": 32, "width": 32}
            picture = np.asarray(pipeline(["red dots", "a picture"][index // 2], **options).images[0])
            cell = np.asarray(grid.crop((2 + 34 * index, 2, 34 + 34 * index, 34)))
            assert np.abs(picture.astype(int) - cell).max() <= 1
            pictures.append(picture)
    assert len({picture.tobytes() for picture in pictures}) == 4
    for part, folder in (
        ("vae", whole["pretrained_vae_model_name_or_path"]),
        ("unet", output / "checkpoint-6" / "unet_ema"),
    ):
        one, two = load_file(output / part / WEIGHTS), load_file(folder / WEIGHTS)
        assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_code_in_the_card_runs(whole, tmp_path, monkeypatch):
    card = ModelCard.load(whole["output_dir"] / "README.md")
    assert "stable-diffusion-xl" in card.data.tags
    assert f'with the VAE `"{whole["pretrained_vae_model_name_or_path"]}"`' in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    small = "pipeline(num_inference_steps=2, height=32, width=32, prompt="
    exec(compile(re.sub(r"^pipeline\(", small, code, flags=re.MULTILINE), "card", "exec"), {})
    assert (tmp_path / "picture.png").is_file()


def test_a_velocity_is_sampled_as_it_was_trained(flags):
    run({**flags, "prediction_type": "v_prediction"}, SCRIPT)
    pipeline = StableDiffusionXLPipeline.from_pretrained(flags["output_dir"])
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


# The cache ------------------------------------------------------------------------------------------------------------


def test_the_size_of_a_cached_row(base, images_folder):
    """By its shapes; the README says that of the real model in bf16, at its resolution."""

    def size(channels, side, width, pooled, bytes_of_a_number):
        return (2 * channels * side**2 + 77 * width + pooled) * bytes_of_a_number

    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    rows = rows_of(images_folder)[:2]
    columns = {"image": [read_image(row["image"]) for row in rows], "text": [row["text"] for row in rows]}
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    args = arguments(center_crop=True, cache_encodings="cache")
    models = (pipeline.vae, [pipeline.text_encoder, pipeline.text_encoder_2])
    with ThreadPool(1) as threads:
        encodings = encode_rows(args, tokenizers, *models, columns, threads)
    assert sum(value.nbytes for value in load(encodings[0]).values()) == size(4, 8, 16 + 24, 20, 4) + 2 * 8
    assert f"{size(4, 128, 768 + 1280, 1280, 2) / 1e6:.2f} MB" in (ROOT / "README.md").read_text()


# Real widths ----------------------------------------------------------------------------------------------------------


def fill_fast(model):
    """Weights of about the right size, of a stretch of numbers that repeats: 0.4 billion new ones take long."""
    stretch = torch.randn(2**20 - 3, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0
        values = stretch.repeat(-(-parameter.numel() // len(stretch)))[: parameter.numel()]
        parameter.data.copy_((values * scale + ("norm" in name and name.endswith("weight"))).reshape(parameter.shape))
    return model


def test_an_update_at_the_real_widths(base, images_folder, tmp_path):
    """Of an adapter, with one layer per block in all models: widths, heads and conditions of the real model fit."""
    configs = json.loads((ROOT / "tests" / "benchmarks" / "model_configs.json").read_text())["stable-diffusion-xl"]
    fewer = {"unet": {"layers_per_block": 1, "transformer_layers_per_block": 1}, "vae": {"layers_per_block": 1}}
    folder = shutil.copytree(base, tmp_path / "model")
    vocabulary = json.loads((base / "text_encoder" / "config.json").read_text())["vocab_size"]
    for part, model_class in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        with torch.device("meta"):
            model = model_class.from_config({**configs[part], **fewer[part]})
        fill_fast(model.to_empty(device="cpu")).half().save_pretrained(folder / part)  # half the disk
    for part, model_class in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        config = {name: value for name, value in configs[part].items() if name != "_class_name"}
        config |= {"vocab_size": vocabulary, "num_hidden_layers": 1, "eos_token_id": vocabulary - 1}
        tiny.fill(model_class(CLIPTextConfig(**config)), 0).save_pretrained(folder / part)
    flags = {"pretrained_model_name_or_path": folder, "train_data_dir": images_folder, "resolution": 64, "rank": 4}
    flags |= {"train_batch_size": 1, "max_train_steps": 1, "lr_warmup_steps": 0, "seed": 0, "learning_rate": 1e-2}
    run({**flags, "output_dir": tmp_path / "output", "report_to": "none"}, SCRIPT)
    adapter = load_file(tmp_path / "output" / "pytorch_lora_weights.safetensors")
    changed = [value for name, value in adapter.items() if "lora_B" in name]
    assert len(changed) == len(adapter) / 2 > 30
    assert all(value.isfinite().all() and value.any() for value in changed)


# What is refused ------------------------------------------------------------------------------------------------------


def refusal(flags, script=SCRIPT):
    """The one line that a run ends with, before it writes anything."""
    module = {SCRIPT: train_text_to_image_sdxl, "train_text_to_image": train_text_to_image}[script]
    with pytest.raises(module.RunError) as error:
        run(flags, script)
    assert "\n" not in str(error.value)
    assert not flags["output_dir"].exists()
    return str(error.value)


# fp16 -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """A CPU in the role of a GPU, on which alone accelerate allows fp16: autocast and the scaler are the real ones."""
    make_accelerator = train_text_to_image_sdxl.make_accelerator

    def make_fp16_accelerator(args):
        accelerator = make_accelerator(args)
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1)
        return accelerator

    monkeypatch.setattr(train_text_to_image_sdxl, "make_accelerator", make_fp16_accelerator)


def loss_and_picture(flags):
    """Of a run: the first update's loss, and the picture of its only prompt as floats."""
    run({**flags, "report_to": "tensorboard"}, SCRIPT)
    reset_accelerate()
    (events,) = (flags["output_dir"] / "logs").glob("*/events*")
    (loss,) = EventAccumulator(str(events)).Reload().Scalars("train_loss")
    return loss.value, np.asarray(PIL.Image.open(flags["output_dir"] / "validation" / "step-000001.png"), np.float32)


def test_with_fp16_a_vae_that_overflows_is_run_in_float32(flags, base, tmp_path, request):
    """Where its configuration says so (force_upcast), also for the pictures."""
    folder = shutil.copytree(base, tmp_path / "base")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    for half in (vae.encoder, vae.decoder):
        half.conv_in.weight.data *= 1e6  # above 65,504, until a norm
    vae.save_pretrained(folder / "vae")
    flags |= {"pretrained_model_name_or_path": folder, "center_crop": True, "validation_prompts": ["red dots"]}
    expected, drawn = loss_and_picture({**flags, "output_dir": tmp_path / "float32"})
    request.getfixturevalue("fp16_on_a_cpu")
    loss, picture = loss_and_picture({**flags, "output_dir": tmp_path / "fp16"})
    assert loss == pytest.approx(expected, rel=2e-3)
    assert loss != expected
    assert np.abs(picture - drawn).mean() < 2
    cached, _ = loss_and_picture({**flags, "cache_encodings": tmp_path / "cache", "output_dir": tmp_path / "cached"})
    assert cached == pytest.approx(expected, rel=2e-3)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    loss, picture = loss_and_picture({**flags, "output_dir": tmp_path / "overflow"})
    assert not np.isfinite(loss)
    assert np.abs(picture - drawn).mean() > 20


def test_the_other_script_s_models_are_refused_with_its_name(flags, pipeline_folder):
    start = f"--pretrained_model_name_or_path {pipeline_folder}: "
    line = refusal({**flags, "pretrained_model_name_or_path": pipeline_folder})
    assert line == f"{start}not Stable Diffusion XL; train_text_to_image.py trains Stable Diffusion 1.x and 2.x"
    reset_accelerate()
    line = refusal(flags, "train_text_to_image")
    assert line == "not Stable Diffusion 1.x or 2.x but XL, which train_text_to_image_sdxl.py trains"


def test_the_refiner_is_refused_with_the_reason(flags, base, tmp_path):
    refiner = shutil.copytree(base, tmp_path / "refiner", ignore=lambda *_: ("text_encoder", "tokenizer"))
    index = json.loads((refiner / "model_index.json").read_text())
    absent = {"text_encoder": [None, None], "tokenizer": [None, None]}
    (refiner / "model_index.json").write_text(json.dumps({**index, **absent, "requires_aesthetics_score": True}))
    line = refusal({**flags, "pretrained_model_name_or_path": refiner})
    assert line.startswith(f"--pretrained_model_name_or_path {refiner}: SDXL's refiner, which has one text encoder; ")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"cross_attention_dim": 24}),
        ("unet", {"in_channels": 9}),
        ("unet", {"projection_class_embeddings_input_dim": 5 * 8 + 20}),
        ("vae", {"latent_channels": 8}),
    ],
)
def test_parts_that_do_not_fit_together(part, change, flags, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "model")
    config = json.loads((folder / part / "config.json").read_text())
    model_class = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    model_class.from_config({**config, **change}).save_pretrained(folder / part)
    line = refusal({**flags, "pretrained_model_name_or_path": folder})
    assert line.startswith("not a complete Stable Diffusion XL: ")
    assert "do not match" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_npu_flash_attention": True}, "--enable_npu_flash_attention: .*torch_npu"),
        (
            {"pretrained_vae_model_name_or_path": "/nowhere"},
            "--pretrained_vae_model_name_or_path /nowhere: there is no",
        ),
        ({"pretrained_vae_model_name_or_path": "nobody/vae"}, "--pretrained_vae_model_name_or_path nobody/vae: "),
        ({"resolution": 30}, "--resolution 30: must be a multiple of 4"),
        ({"timestep_bias_strategy": "range", "timestep_bias_end": 2000}, "--timestep_bias_end 2000: not in 0 to 1000"),
    ],
)
def test_bad_input(change, message, flags):
    assert re.search(message, refusal({**flags, **change}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train_text_encoder", "--train_text_encoder, --debug_loss: only the UNet is trained"),
        ("--debug_loss", "--train_text_encoder, --debug_loss: .* updates are logged"),
        ("--timestep_bias_multiplier 0", "--timestep_bias_multiplier: must be larger than 0, not 0"),
        ("--timestep_bias_portion 1.5", "--timestep_bias_portion: must be from 0 to 1, not 1.5"),
        ("--timestep_bias_strategy most", "--timestep_bias_strategy: invalid choice"),
    ],
)
def test_a_value_that_cannot_be_right(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--pretrained_model_name_or_path=a", "--train_data_dir=b", *words.split()])
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
