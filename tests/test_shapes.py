"""The demo's pictures, the check that judges them, and the small pipeline that the demo starts from."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageFilter
from safetensors.torch import load_file

PIPELINE = Path(__file__).parent / "assets" / "shapes-64"
ALL_SHAPES = (*shapes.SHAPES, shapes.NEW_SHAPE)
EXAMPLES = [example for shape in ALL_SHAPES for example in shapes.examples((shape,), 30, seed=11)]


def as_drawn(picture):
    return picture


def blurred_and_noisy(picture):
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float64)
    noise = np.random.default_rng(0).normal(0, 10, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [as_drawn, blurred_and_noisy])
def test_check_accepts_the_right_shape_and_no_other(change):
    confusion = np.zeros((len(ALL_SHAPES), len(ALL_SHAPES)), dtype=int)
    for shape, colour, background, seed in EXAMPLES:
        picture = change(shapes.draw(shape, colour, background, seed))
        row = ALL_SHAPES.index(shape)
        confusion[row] += [shapes.matches(picture, name, colour, background) for name in ALL_SHAPES]
    assert (confusion == 30 * np.eye(len(ALL_SHAPES), dtype=int)).all(), confusion


def test_check_refuses_other_colours_and_backgrounds():
    for shape, colour, background, seed in EXAMPLES[::7]:
        picture = shapes.draw(shape, colour, background, seed)
        for other in shapes.COLOURS.keys() - {colour}:
            assert shapes.mismatch(picture, shape, other, background) == "colour"
        for other in shapes.BACKGROUNDS.keys() - {background}:
            assert shapes.mismatch(picture, shape, colour, other) == "background colour"


def test_check_refuses_noise_blanks_fragments_and_pairs():
    blank = Image.new("RGB", (64, 64), "white")
    pair = blank.copy()
    circle = shapes.draw("circle", "red", "white", 0).resize((32, 32))
    pair.paste(circle, (0, 16))
    pair.paste(circle, (32, 16))
    half = shapes.draw("star", "red", "white", 0)
    half.paste((255, 255, 255), (0, 0, 64, 32))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    for picture in (blank, pair, half, noise):
        assert not any(shapes.matches(picture, shape, "red", "white") for shape in ALL_SHAPES)


def test_check_refuses_a_picture_that_is_not_square_rgb():
    for shape in ((64, 64), (64, 32, 3), (64, 64, 4)):
        with pytest.raises(ValueError, match="square RGB"):
            shapes.mismatch(np.zeros(shape), "circle", "red", "white")


def test_drawing_depends_on_the_seed_alone():
    for shape in ALL_SHAPES:
        first, again, other = (np.asarray(shapes.draw(shape, "red", "black", seed)) for seed in (3, 3, 4))
        assert (first == again).all()
        assert (first != other).any()
    assert shapes.examples(shapes.SHAPES, 60, 1) == shapes.examples(shapes.SHAPES, 60, 1)


def test_folder_is_an_imagefolder(tmp_path):
    captions = shapes.write_folder(tmp_path / "a", (shapes.NEW_SHAPE,), 12, seed=2)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == captions
    assert all(set(row) == {"file_name", "text"} for row in rows)
    assert all("star" in text for text in captions)
    for row in rows:
        with Image.open(tmp_path / "a" / row["file_name"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (64, 64))
    shapes.write_folder(tmp_path / "b", (shapes.NEW_SHAPE,), 12, seed=2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_pipeline_files_are_small_and_safe():
    files = [path for path in PIPELINE.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 8_000_000
    for path in files:
        if path.suffix == ".json":
            assert "/home/" not in path.read_text(encoding="utf-8")


def test_pipeline_models_are_what_they_claim():
    unet = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet")
    assert 1_000_000 <= unet.num_parameters() <= 2_000_000
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    assert (vae.config.latent_channels, len(vae.config.block_out_channels)) == (4, 3)


@torch.no_grad()
def test_autoencoder_reproduces_what_it_has_never_seen():
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    examples = shapes.examples((shapes.NEW_SHAPE,), 20, seed=5)
    pixels = torch.stack([torch.from_numpy(np.array(shapes.draw(*example))) for example in examples])
    pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    pictures = ((decoded + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    passed = sum(shapes.matches(picture, *example[:3]) for picture, example in zip(pictures, examples, strict=True))
    assert passed >= 18


def test_pipeline_draws_what_it_was_taught():
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    examples = shapes.examples(shapes.SHAPES, 30, seed=0)
    prompts = [f"a {colour} {shape} on {background}" for shape, colour, background, _ in examples]
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    pictures = pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    passed = sum(shapes.matches(picture, *example[:3]) for picture, example in zip(pictures, examples, strict=True))
    assert passed >= 0.7 * len(examples)


def test_the_text_encoder_s_tensors_have_the_names_that_every_release_reads():
    """A release of transformers that knows other names starts from random weights, with no more than a warning."""
    assert all(name.startswith("text_model.") for name in load_file(PIPELINE / "text_encoder" / "model.safetensors"))
