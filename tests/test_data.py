"""From a data set's row to tensors: images of every kind, captions, crops, and the stream of positions."""

import argparse
import functools
import itertools
import json
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from conftest import reset_accelerate, run
from torchvision.transforms import functional as transforms

import train_text_to_image
from train_text_to_image import (
    ExampleStream,
    RunError,
    choose_caption,
    permutation,
    preprocess_train,
    random_generator,
    read_image,
    tokenize_captions,
    train_transforms,
)


def read_file(path):
    return read_image({"bytes": None, "path": str(path)})


# Images of every kind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("P", 7, None),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 257 * 99, (99, 99, 99)),
        ("F", 0.5, (128, 128, 128)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, value, expected):
    image = PIL.Image.new(mode, (5, 4), value)
    if mode == "P":
        image.putpalette([channel for index in range(256) for channel in (index, 2 * index % 256, 9)])
        expected = (7, 14, 9)
    path = tmp_path / ("image.tiff" if mode in ("F", "CMYK") else "image.png")
    image.save(path)
    assert read_file(path).mode == "RGB"
    assert read_file(path).size == (5, 4)
    assert read_file(path).getpixel((2, 2)) == expected


def test_transparent_palette_is_laid_on_white(tmp_path):
    image = PIL.Image.new("P", (2, 1), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "image.png", transparency=0)
    assert [read_file(tmp_path / "image.png").getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 200, 0)]


def test_transparent_colour_is_laid_on_white(tmp_path):
    image = PIL.Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "image.png", transparency=(1, 2, 3))
    assert [read_file(tmp_path / "image.png").getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 9, 9)]


def test_jpeg_in_cmyk(tmp_path):
    PIL.Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "image.jpg", quality=95)
    red, green, blue = read_file(tmp_path / "image.jpg").getpixel((8, 8))
    assert red < 10
    assert green > 245
    assert blue > 245


def test_exif_orientation_is_applied(tmp_path):
    image = PIL.Image.new("RGB", (6, 4))
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6  # the camera was turned: rotate by 90 degrees to see it upright
    image.save(tmp_path / "image.jpg", exif=exif)
    assert read_file(tmp_path / "image.jpg").size == (4, 6)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_an_image_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:  # half of a real one
        PIL.Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(RunError, match="broken.png cannot be read"):
        read_file(path)


# Transforms -----------------------------------------------------------------------------------------------------------


def gradient_image(width, height):
    """Red grows to the right, green downwards, so that a crop tells where it was taken."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def test_transforms_range_shape_and_centre():
    pixels = train_transforms(gradient_image(64, 32), 32, "bilinear", True, False, random_generator(0))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert pixels.min() == 0
    red = pixels[0, :, 0]
    assert red[0].item() == pytest.approx(255 * 16 / 63, abs=1)  # the middle half of the width
    assert red[-1].item() == pytest.approx(255 * 47 / 63, abs=1)


def test_random_crops_reach_both_ends_and_flips_half():
    image = gradient_image(64, 32)
    lefts, flips = [], 0
    for seed in range(300):
        red = train_transforms(image, 32, "nearest", False, True, random_generator(seed))[0, :, 0]
        flips += bool(red[0] > red[-1])
        lefts.append(round(red.min().item() / 255 * 63))
    assert set(lefts) == set(range(33))
    assert 120 < flips < 180  # 150 expected, standard deviation 8.7


@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"])
def test_every_interpolation(mode):
    """As torchvision does it, which knows all of these names."""
    image = gradient_image(100, 70)
    pixels = train_transforms(image, 32, mode, True, False, random_generator(0))
    resized = transforms.resize(image, 32, transforms.InterpolationMode(mode.replace("_", "-")))
    np.testing.assert_array_equal(pixels, np.asarray(transforms.center_crop(resized, 32)))


def test_switching_a_flag_on_changes_no_other_draw():
    values = []
    for center_crop, random_flip in [(False, False), (True, True)]:
        rng = random_generator(3)
        train_transforms(gradient_image(40, 32), 32, "nearest", center_crop, random_flip, rng)
        choose_caption(["a", "b"], 0.5, rng)
        values.append(rng.random())
    assert values[0] == values[1]


# Captions -------------------------------------------------------------------------------------------------------------


def test_captions_are_drawn_evenly_and_dropped_in_the_given_share():
    rng = random_generator(0)
    drawn = [choose_caption(["one", "two", "three"], 0.25, rng) for _ in range(4000)]
    assert {caption: round(drawn.count(caption) / 1000) for caption in set(drawn)} == dict.fromkeys(set(drawn), 1)
    assert set(drawn) == {"one", "two", "three", ""}
    assert choose_caption("one", 0, rng) == "one"
    assert choose_caption("one", 1, rng) == ""


def test_tokens_are_clip_s(pipeline_folder):
    tokenizer = tiny.make_tokenizer(pipeline_folder / "tokenizer")
    tokens = tokenize_captions(["a picture of red dots"], tokenizer)
    ids = tokens.input_ids[0]
    words = ["<|startoftext|>", "a</w>", "picture</w>", "of</w>", "red</w>", "dots</w>", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(ids[:7]) == words
    assert tokens.attention_mask[0].tolist() == [1] * 7 + [0] * 70
    assert tokenize_captions(["a", "dots " * 100], tokenizer).input_ids.shape == (2, 77)


# Data sets ------------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """Carries the rows that a run would train on."""


@pytest.fixture
def load(flags, monkeypatch):
    """Function of flags to those rows. Raises RunError."""
    numbers = itertools.count()

    def reached(rows, *_):
        raise Reached(rows)

    def load(**changes):
        own = {**flags, "output_dir": flags["output_dir"] / str(next(numbers)), **changes}
        with monkeypatch.context() as patched:
            patched.setattr(train_text_to_image, "ExampleStream", reached)
            with pytest.raises(Reached) as caught:
                run(own)
        reset_accelerate()
        return caught.value.args[0]

    return load


def test_a_folder_a_saved_data_set_and_a_parquet_folder_are_the_same(load, images_folder, tmp_path):
    from_folder = load()
    images = datasets.load_dataset("imagefolder", data_files={"train": str(images_folder / "**")})
    images.save_to_disk(tmp_path / "dict")
    images["train"].save_to_disk(tmp_path / "split")
    (tmp_path / "parquet").mkdir()
    images["train"].to_parquet(tmp_path / "parquet" / "train.parquet")
    for name in ("dict", "split", "parquet"):
        dataset = load(train_data_dir=None, dataset_name=tmp_path / name)
        assert sorted(dataset["text"]) == sorted(from_folder["text"])
        assert read_image(dataset[0]["image"]).tobytes() == read_image(from_folder[0]["image"]).tobytes()


def test_a_folder_whose_name_looks_like_a_pattern_with_sub_folders(load, images_folder, tmp_path):
    folder = tmp_path / "my [best] images*"
    for name in ("train-1", "photos of a test"):  # names that `datasets` would take for splits
        shutil.copytree(images_folder, folder / name)
    assert len(load(train_data_dir=folder)) == 16


def test_max_train_samples_are_drawn_by_the_seed(load):
    drawn = [[row["image"]["path"] for row in load(max_train_samples=3, seed=seed)] for seed in (0, 0, 1)]
    assert [len(set(paths)) for paths in drawn] == [3, 3, 3]
    assert drawn[0] == drawn[1] != drawn[2]


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    for row in rows:
        PIL.Image.new("RGB", (32, 32)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["a", None], "row 1 is empty, of .*1.png"),
        ([["a"], []], "row 1 is empty, of .*1.png"),
        ([["a"], ["b", None]], "row 1 is empty, of .*1.png"),
        ([{"a": 1}, {"a": 2}], "holds "),
    ],
)
def test_captions_that_are_no_text_are_refused(load, tmp_path, captions, message):
    rows = [{"file_name": f"{index}.png", "text": caption} for index, caption in enumerate(captions)]
    with pytest.raises(RunError, match=f"--caption_column text: .*{message}"):
        load(train_data_dir=write_rows(tmp_path / "data", rows))


@pytest.mark.parametrize("last", [[["a"], []], [["a", None], ["b"]], [["a", "b"], None]])
def test_an_empty_caption_is_found_in_any_piece_of_a_column(load, tmp_path, last):
    """Also where a piece before it has other numbers of captions than rows."""
    captions = [["a"] * (1 + row % 3) for row in range(2500)] + last
    features = {"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}
    tiny.save_rows(tmp_path / "rows", len(captions), captions=captions, features=datasets.Features(features))
    assert datasets.load_from_disk(str(tmp_path / "rows")).data.column("text").num_chunks > 1
    row = 2500 if None in last[0] else 2501
    with pytest.raises(RunError, match=f"--caption_column text: row {row} is empty"):
        load(train_data_dir=None, dataset_name=tmp_path / "rows")


def test_a_column_that_is_not_there_lists_those_that_are(load):
    for flag in ("image_column", "caption_column"):
        with pytest.raises(RunError, match=f"--{flag} nothing: no such column.*image.*text"):
            load(**{flag: "nothing"})
    with pytest.raises(RunError, match="--image_column text: holds "):
        load(image_column="text")


# The stream of positions ----------------------------------------------------------------------------------------------


@pytest.fixture
def stream(caption_lists_folder, pipeline_folder):
    """The examples of a run by position, with everything random switched on."""
    settings = {"resolution": 32, "image_interpolation_mode": "lanczos", "center_crop": False, "random_flip": True}
    settings |= {"proportion_empty_prompts": 0.3, "noise_offset": 0.1, "input_perturbation": 0.1}
    arguments = argparse.Namespace(image_column="image", caption_column="text", **settings)
    dataset = datasets.load_dataset("imagefolder", data_files={"train": f"{caption_lists_folder}/**"}, split="train")
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    tokenizer = tiny.make_tokenizer(pipeline_folder / "tokenizer")
    preprocess = functools.partial(preprocess_train, arguments, tokenizer, (4, 8, 8), 1000)
    return ExampleStream(dataset, preprocess, 7)


def assert_equal_examples(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name


def test_a_position_is_the_same_example_whenever_it_is_asked_for(stream):
    whole = [stream[position] for position in range(30)]
    for position in (29, 13, 17):
        assert_equal_examples(whole[position], stream[position])


def test_the_same_image_is_another_example_in_the_next_epoch(stream):
    examples = [stream[position] for position in range(16)]
    for name in ("noise", "posterior_noise", "offset_noise", "perturbation_noise"):
        assert len({example[name].numpy().tobytes() for example in examples}) == 16
    assert len({example["timesteps"].item() for example in examples}) > 12


def test_workers_change_nothing(stream):
    options = {"sampler": range(5, 21), "batch_size": 3}
    loaders = [torch.utils.data.DataLoader(stream, **options, num_workers=number) for number in (0, 2)]
    for one, other in zip(*loaders, strict=True):
        assert_equal_examples(one, other)


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [permutation(0, epoch, 50) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    assert not np.array_equal(permutation(1, 0, 50), orders[0])
    assert np.array_equal(permutation(0, 0, 50), orders[0])


def test_timesteps_are_uniform_and_noise_is_normal(stream):
    examples = [stream[position] for position in range(400)]
    timesteps = torch.stack([example["timesteps"] for example in examples]).double()
    assert timesteps.mean().item() == pytest.approx(499.5, abs=4 * 288.7 / 20)  # four standard errors
    noise = torch.stack([example["noise"] for example in examples])
    assert noise.mean().item() == pytest.approx(0, abs=4 / noise.numel() ** 0.5)
    assert noise.std().item() == pytest.approx(1, abs=4 / (2 * noise.numel()) ** 0.5)


def test_seeds_that_differ_only_in_high_bits_differ():
    """`torch.Generator` would take these for the same seed."""
    assert random_generator(1, 1, 0).random() != random_generator(1 + 2**32, 1, 0).random()
    assert random_generator(1, 1, 0).random() != random_generator(1, 0, 0).random()
