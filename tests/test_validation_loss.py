"""The loss of held-out examples: exact, of the weights that are saved, and what keeps the best checkpoint."""

import importlib
import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from conftest import launch, reset_accelerate, run
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from faults import state_of_run
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train_text_to_image import RunError, random_generator

QUARTERS = ["t000-249", "t250-499", "t500-749", "t750-999"]
TIMESTEPS = [62, 187, 312, 437, 562, 687, 812, 937]  # the middles of eight parts
TAGS = ["validation_loss", *(f"validation_loss/{quarter}" for quarter in QUARTERS)]


def logged(output_dir):
    """{tag: {step: value}} of the validation loss in the TensorBoard logs of all runs into a folder."""
    found = {tag: {} for tag in TAGS}
    for events in sorted((output_dir / "logs").glob("*/events*")):
        events = EventAccumulator(str(events)).Reload()
        for tag in set(TAGS) & set(events.Tags()["scalars"]):
            found[tag] |= {event.step: event.value for event in events.Scalars(tag)}
    return found


def history(output_dir, step):
    return state_of_run(output_dir / f"checkpoint-{step}")["validation"]


def largest_difference(one, other):
    """Of the numbers of two histories, of the same steps."""
    assert [entry["step"] for entry in one] == [entry["step"] for entry in other]
    return max(abs(a[tag] - b[tag]) for a, b in zip(one, other, strict=True) for tag in TAGS)


def trained(output_dir):
    return load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")


def same_weights(one, other):
    one, other = trained(one), trained(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve images with two captions each."""
    return tiny.make_images(tmp_path_factory.mktemp("twelve"), number=12, caption_lists=True)


@pytest.fixture(scope="module")
def common(pipeline_folder, images):
    """The flags of four updates of three images each; five of twelve rows are held out, in batches of two or three."""
    return {
        "pretrained_model_name_or_path": pipeline_folder,
        "train_data_dir": images,
        "resolution": 32,
        "center_crop": True,
        "train_batch_size": 3,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "learning_rate": 1e-3,
        "use_ema": True,
        "validation_rows": 5,
        "validation_steps": 2,
        "seed": 0,
    }


@pytest.fixture(scope="module")
def whole(common, tmp_path_factory):
    """The output folder of that run."""
    output_dir = tmp_path_factory.mktemp("whole") / "output"
    run({**common, "output_dir": output_dir})
    reset_accelerate()
    return output_dir


# The numbers ----------------------------------------------------------------------------------------------------------


def test_what_is_logged(whole):
    found = logged(whole)
    assert [list(values) for values in found.values()] == [[2, 4]] * 5
    entries = history(whole, 4)
    assert [[entry[tag] for tag in TAGS] for entry in entries] == [
        pytest.approx([found[tag][step] for tag in TAGS], rel=1e-6) for step in (2, 4)
    ]
    for entry in entries:
        assert entry["validation_loss"] == pytest.approx(np.mean([entry[tag] for tag in TAGS[1:]]), rel=1e-12)
    assert len({round(value, 3) for values in found.values() for value in values.values()}) == 10
    assert Image.open(whole / "validation" / "loss.png").size[0] > 300
    card = (whole / "README.md").read_text()
    assert "(validation/loss.png)" in card


def test_the_loss_of_the_average_computed_by_hand(common, pipeline_folder, tmp_path):
    """Row by row, without a batch; of flags that change the training's loss and examples nothing is to be seen."""
    folder, train = tiny.make_images(tmp_path / "held_out", number=3, seed=5), tmp_path / "output"
    changed = {"snr_gamma": 5.0, "noise_offset": 0.5, "input_perturbation": 0.5, "dream_training": True}
    changed |= {"random_flip": True, "center_crop": False, "proportion_empty_prompts": 0.9}
    flags = {**common, **changed, "validation_rows": None, "validation_data_dir": folder, "output_dir": train}
    run(flags)
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    scheduler = DDPMScheduler.from_pretrained(pipeline_folder, subfolder="scheduler")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    order = random_generator(2**64, 0, 0).permutation(3)
    losses = {2: [], 4: []}
    for position, row in enumerate(rows[index] for index in order):
        image = Image.open(folder / row["file_name"])
        image = image.resize([int(32 * side / min(image.size)) for side in image.size], Image.Resampling.LANCZOS)
        left, top = (round((side - 32) / 2) for side in image.size)
        pixels = np.array(image.crop((left, top, left + 32, top + 32)), np.float32)
        rng = random_generator(2**64, 1, position)
        rng.random(5)  # crop, flip, caption
        posterior_noise = torch.from_numpy(rng.standard_normal((4, 8, 8), dtype=np.float32))
        rng.integers(1000)
        noise = torch.from_numpy(rng.standard_normal((4, 8, 8), dtype=np.float32))[None]
        with torch.no_grad():
            posterior = pipeline.vae.encode(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist
            latents = 0.18215 * (posterior.mean + posterior.std * posterior_noise)
            ids = pipeline.tokenizer(row["text"], padding="max_length", max_length=77, return_tensors="pt").input_ids
            states = pipeline.text_encoder(ids)[0]
            for step in losses:
                unet = UNet2DConditionModel.from_pretrained(train / f"checkpoint-{step}" / "unet_ema")
                for timestep in TIMESTEPS:
                    noisy = scheduler.add_noise(latents, noise, torch.tensor([timestep]))
                    losses[step].append((unet(noisy, timestep, states).sample - noise).square().mean().item())
    for entry in history(train, 4):
        means = np.reshape(losses[entry["step"]], (3, 8)).mean(0)
        expected = [means.mean(), *means.reshape(4, 2).mean(1)]
        assert [entry[tag] for tag in TAGS] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("change", ["workers", "cached", "resumed"])
def test_the_same_numbers(common, whole, tmp_path, change):
    flags = {**common, "output_dir": tmp_path / "output"}
    if change == "resumed":
        flags["output_dir"].mkdir()
        shutil.copytree(whole / "checkpoint-2", flags["output_dir"] / "checkpoint-2")
        run({**flags, "resume_from_checkpoint": "latest"})
    else:
        run({**flags, **{"workers": {"dataloader_num_workers": 2}, "cached": {"cache_encodings": tmp_path}}[change]})
    difference = largest_difference(history(whole, 4), history(flags["output_dir"], 4))
    print(f"{change}: {difference:.1e}")
    assert difference < 1e-6
    if change in ("workers", "resumed"):
        assert history(whole, 4) == history(flags["output_dir"], 4)  # with the training loss that is plotted
        assert same_weights(whole, flags["output_dir"])


def test_held_out_rows_are_not_trained_on(common, whole, images, tmp_path):
    """Other images in their place change the validation loss, and no bit of the weights."""
    held_out = random_generator(0, 5).permutation(12)[:5]
    folder = shutil.copytree(images, tmp_path / "images")
    for row in held_out:
        Image.new("RGB", (40, 40), "red").save(folder / f"{row}.png")
    flags = {**common, "train_data_dir": folder, "num_train_epochs": 2, "output_dir": tmp_path / "output"}
    run({**flags, "max_train_steps": None})  # two epochs of seven images: five updates
    assert max(logged(flags["output_dir"])["validation_loss"]) == 5
    assert same_weights(whole / "checkpoint-4", flags["output_dir"] / "checkpoint-4")
    assert largest_difference(history(whole, 4), history(flags["output_dir"], 4)) > 1e-3
    assert sorted(path.name for path in flags["output_dir"].glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_run_without_held_out_rows_logs_none(common, whole, tmp_path):
    run({**common, "validation_rows": None, "output_dir": tmp_path / "output", "max_train_steps": 2})
    assert history(tmp_path / "output", 2) == []
    assert logged(tmp_path / "output") == {tag: {} for tag in TAGS}
    assert not (tmp_path / "output" / "validation").exists()


# The best checkpoint --------------------------------------------------------------------------------------------------


def checkpoints(output_dir):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*"))


def test_the_best_checkpoint_is_kept(common, tmp_path, capfd):
    """Of a run whose loss turns, through pruning and a resume; it was not due when it was written."""
    flags = {**common, "learning_rate": 0.05, "validation_steps": 1, "checkpointing_steps": 3, "use_ema": None}
    flags |= {"output_dir": tmp_path / "output", "keep_best": True, "checkpoints_total_limit": 1, "max_train_steps": 9}
    run(flags)
    reset_accelerate()
    entries = history(flags["output_dir"], 9)
    losses = {entry["step"]: entry["validation_loss"] for entry in entries}
    best = min(losses, key=losses.get)
    assert best % 3
    assert checkpoints(flags["output_dir"]) == [best, 9]
    said = f"; best validation loss {losses[best]:.4f}: checkpoint-{best}"
    assert f"{said}\n" in capfd.readouterr().err
    assert said in (flags["output_dir"] / "README.md").read_text()
    run({**flags, "max_train_steps": 12, "learning_rate": 1e-9, "resume_from_checkpoint": "latest"})
    reset_accelerate()
    assert checkpoints(flags["output_dir"]) == [best, 12]
    assert history(flags["output_dir"], 12)[:9] == entries
    assert f"{said}\n" in capfd.readouterr().err


def test_the_offloaded_average_has_the_same_norms(common, tmp_path):
    """Of --half_precision_norms, too."""
    flags = {**common, "mixed_precision": "bf16", "half_precision_norms": True, "max_train_steps": 2}
    run({**flags, "output_dir": tmp_path / "device"})
    reset_accelerate()
    run({**flags, "output_dir": tmp_path / "offloaded", "offload_ema": True})
    reset_accelerate()
    assert history(tmp_path / "device", 2) == history(tmp_path / "offloaded", 2)


@pytest.mark.parametrize("script", ["train_text_to_image", "train_text_to_image_flax"])
def test_a_plot_that_cannot_be_written_is_one_line(script, common, tmp_path):
    """As any error of the operating system."""
    plot = tmp_path / "output" / "validation" / "loss.png"
    plot.mkdir(parents=True)
    result = launch({**common, "output_dir": tmp_path / "output"}, script=script)
    assert result.returncode == 1
    assert f"error: [Errno 21] Is a directory: '{plot}'" in result.stderr.splitlines()
    assert "Traceback" not in result.stderr


# Refusals -------------------------------------------------------------------------------------------------------------


def refused(flags):
    with pytest.raises(RunError) as error:
        run(flags)
    reset_accelerate()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals(common, images, tmp_path):
    flags = {**common, "output_dir": tmp_path / "output"}
    for rows in (10, 12, 100):
        assert refused({**flags, "validation_rows": rows}).startswith(f"--validation_rows {rows}: ")
    folder = tmp_path / "uncaptioned"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "0.png")
    flags["validation_rows"] = None
    said = refused({**flags, "validation_data_dir": folder})
    assert said.startswith("--caption_column text: no such column in ")
    assert str(folder) in said
    assert (
        refused({**flags, "validation_data_dir": "nowhere"})
        == "--validation_data_dir nowhere: there is no such folder, or it is empty"
    )
    (images / "more").mkdir()
    shutil.copy(images / "0.png", images / "more" / "held-out.png")
    (images / "more" / "metadata.jsonl").write_text('{"file_name": "held-out.png", "text": "dots"}\n')
    said = refused({**flags, "validation_data_dir": images / "more"})
    shutil.rmtree(images / "more")
    assert said == f"--validation_data_dir {images / 'more'}: holds images to train on"
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--validation_rows", "-1"],
        ["--validation_rows", "2", "--validation_data_dir", "folder"],
        ["--keep_best"],
    ],
)
def test_refused_flags(words, capsys):
    for name in ("train_text_to_image", "train_text_to_image_flax"):
        parser = importlib.import_module(name).parse_args
        with pytest.raises(SystemExit):
            parser(["--pretrained_model_name_or_path", "p", "--train_data_dir", "d", *words])
        assert capsys.readouterr().err.splitlines()[-1].count(words[0]) == 1


def test_other_held_out_rows_at_a_resume(common, whole, tmp_path):
    """They would be some that the checkpoint was trained on."""
    output_dir = tmp_path / "output"
    output_dir.mkdir()
    shutil.copytree(whole / "checkpoint-2", output_dir / "checkpoint-2")
    for change in ({"seed": 1}, {"validation_rows": 4}, {"max_train_samples": 11}):
        said = refused({**common, **change, "output_dir": output_dir, "resume_from_checkpoint": "latest"})
        assert "--validation_rows" in said
    assert [path.name for path in output_dir.iterdir()] == ["checkpoint-2"]


# The other scripts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [f"train_text_to_image_{model}" for model in ("sdxl", "prior", "decoder")])
def test_another_script(common, folders, script, tmp_path):
    """With and without cached encodings, and resumed."""
    flags = {
        name: value for name, value in common.items() if name not in ("center_crop", "pretrained_model_name_or_path")
    }
    flags |= {**folders[script], "output_dir": tmp_path / "whole", "snr_gamma": 5.0, "keep_best": True}
    flags |= {"resolution": 64} if "decoder" in script else {}
    flags |= {"center_crop": True} if "sdxl" in script else {}
    run(flags, script)
    reset_accelerate()
    entries = history(tmp_path / "whole", 4)
    assert [entry["step"] for entry in entries] == [2, 4]
    assert (
        f"; best validation loss {min(entry['validation_loss'] for entry in entries):.4f}: "
        in (tmp_path / "whole" / "README.md").read_text()
    )
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    cached = {"cache_encodings": tmp_path / "cache", "resume_from_checkpoint": "latest"}
    run({**flags, **cached, "output_dir": tmp_path / "resumed"}, script)
    assert largest_difference(entries, history(tmp_path / "resumed", 4)) < 1e-6


def test_an_adapter(common, tmp_path):
    """Its loss after no change is the base model's."""
    flags = {**common, "output_dir": tmp_path / "output", "rank": 2, "keep_best": True, "offload_ema": True}
    run(flags)
    entries = history(tmp_path / "output", 4)
    assert entries[1]["validation_loss"] < entries[0]["validation_loss"]
