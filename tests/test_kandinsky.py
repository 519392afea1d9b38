"""Kandinsky 2.2: the prior and the decoder, each by itself and both together, on tiny checkpoints."""

import importlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from conftest import ROOT, reset_accelerate, run
from diffusers import (
    AutoPipelineForText2Image,
    DDPMScheduler,
    DiffusionPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UNet2DConditionModel,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_checkpoints import largest_difference
from test_training import events_of, losses_of

PRIOR, DECODER = "train_text_to_image_prior", "train_text_to_image_decoder"
SCRIPTS = [PRIOR, DECODER]
TRAINED = {PRIOR: "prior", DECODER: "unet"}
BASE = {PRIOR: "pretrained_prior_model_name_or_path", DECODER: "pretrained_decoder_model_name_or_path"}
UPSTREAM = json.loads((ROOT / "tests" / "upstream_flags.json").read_text())

both = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture(scope="session")
def prior_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky") / "prior"
    tiny.make_kandinsky_prior(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky") / "decoder"
    tiny.make_kandinsky_decoder(folder)
    return folder


@pytest.fixture
def flags(prior_folder, decoder_folder, caption_lists_folder, tmp_path):
    return {
        "pretrained_prior_model_name_or_path": prior_folder,
        "pretrained_decoder_model_name_or_path": decoder_folder,
        "train_data_dir": caption_lists_folder,
        "resolution": tiny.RESOLUTION,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "lr_warmup_steps": 0,
        "seed": 0,
        "output_dir": tmp_path / "output",
    }


def weights_of(script, folder):
    return load_file(Path(folder) / TRAINED[script] / "diffusion_pytorch_model.safetensors")


def draw(pipeline, *inputs, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(*inputs, num_inference_steps=2, generator=generator, height=32, width=32, **options).images[0]


# The flags ------------------------------------------------------------------------------------------------------------


@both
def test_flags_of_upstream(script):
    """42 of 42 and 43 of 43: accepted with the same type and default."""
    parse_args = importlib.import_module(script).parse_args
    facts = UPSTREAM[f"{script}.py"]
    assert len(facts) == {PRIOR: 42, DECODER: 43}[script]
    defaults = vars(parse_args(["--train_data_dir", "images"]))
    for flag, fact in facts.items():
        name = flag.removeprefix("--")
        assert flag in ("--train_data_dir", "--dataloader_num_workers") or defaults[name] == fact["default"], flag
        words = {"flag": [], "int": ["3"], "float": ["0.25"], "str": ["constant"]}[fact["type"]]
        words = {"--report_to": ["wandb"], "--mixed_precision": ["bf16"]}.get(flag, words)
        value = vars(parse_args(["--train_data_dir", "images", flag, *words]))[name]
        kind = {"flag": bool, "int": int, "float": float, "str": str}[fact["type"]]
        assert isinstance(value[0] if fact.get("nargs") else value, kind), flag


# The objective against the models called by hand ----------------------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Arguments:
    snr_gamma = None


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_training_loss_of_the_prior(prior_folder, snr_gamma):
    from train_text_to_image_prior import training_losses

    pipeline = KandinskyV22PriorPipeline.from_pretrained(prior_folder)
    tokens = pipeline.tokenizer(["red dots", "blue"], padding="max_length", max_length=77, return_tensors="pt")
    batch = {"clip_pixel_values": normal(2, 3, 32, 32), "timesteps": torch.tensor([10, 900]), **tokens}
    batch["noise"] = normal(2, 16, seed=1)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    arguments = Arguments()
    arguments.snr_gamma = snr_gamma
    prior, models = pipeline.prior, (pipeline.prior, pipeline.image_encoder, pipeline.text_encoder)
    clip = (prior.clip_mean.detach(), prior.clip_std.detach())
    loss = training_losses({**batch}, *models, *clip, scheduler.alphas_cumprod, arguments).mean()

    with torch.no_grad():
        embeds = (pipeline.image_encoder(batch["clip_pixel_values"])[0] - 0.1) / 0.5  # as tiny.py sets mean and std
        prompt_embeds, states, mask = pipeline._encode_prompt(["red dots", "blue"], "cpu", 1, False)
        noisy = scheduler.add_noise(embeds, batch["noise"], batch["timesteps"])
        prediction = prior(noisy, batch["timesteps"], prompt_embeds, states, mask).predicted_image_embedding
        errors = (prediction - embeds).square().mean(1)
        if snr_gamma:
            alphas = scheduler.alphas_cumprod[batch["timesteps"]]
            errors = errors * (alphas / (1 - alphas)).clamp(max=snr_gamma)
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_training_loss_of_the_decoder(prior_folder, decoder_folder, snr_gamma):
    from train_text_to_image_decoder import training_losses

    prior_pipeline = KandinskyV22PriorPipeline.from_pretrained(prior_folder)
    pipeline = KandinskyV22Pipeline.from_pretrained(decoder_folder)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(256, size=(2, 3, 32, 32), dtype=np.uint8))
    batch = {"pixel_values": pixels, "clip_pixel_values": normal(2, 3, 32, 32, seed=1)}
    batch |= {"timesteps": torch.tensor([10, 900]), "noise": normal(2, 4, 8, 8, seed=2)}
    batch["dropped"] = torch.tensor([False, True])
    empty = prior_pipeline.get_zero_embed()
    arguments = Arguments()
    arguments.snr_gamma = snr_gamma
    models = (pipeline.unet, pipeline.movq, prior_pipeline.image_encoder)
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    loss = training_losses({**batch}, *models, empty, alphas_cumprod, "epsilon", arguments).mean()

    with torch.no_grad():
        latents = pipeline.movq.encode(pixels / 127.5 - 1).latents
        embeds = prior_pipeline.image_encoder(batch["clip_pixel_values"])[0]
        embeds = torch.cat([embeds[:1], prior_pipeline.get_zero_embed()])
        noisy = pipeline.scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
        prediction = pipeline.unet(noisy, batch["timesteps"], None, added_cond_kwargs={"image_embeds": embeds})[0]
        errors = (prediction[:, :4] - batch["noise"]).square().mean((1, 2, 3))
        if snr_gamma:
            alphas = alphas_cumprod[batch["timesteps"]]
            errors = errors * (snr_gamma / (alphas / (1 - alphas))).clamp(max=1)
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_square_transforms():
    from train_text_to_image_decoder import square_transforms

    x, y = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 48))
    image = PIL.Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    expected = image.crop((24, 0, 72, 48)).resize((32, 32), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(square_transforms(image, 32).permute(1, 2, 0), expected)


# Runs -----------------------------------------------------------------------------------------------------------------


@both
def test_a_run_with_everything(script, flags):
    flags |= {"use_ema": True, "gradient_accumulation_steps": 2, "max_train_steps": 4, "checkpointing_steps": 1}
    flags |= {"checkpoints_total_limit": 2, "validation_prompts": ["red dots", "blue bars"], "validation_steps": 2}
    flags |= {"proportion_empty_prompts": 0.3, "snr_gamma": 5.0, "mixed_precision": "bf16", "use_8bit_adam": True}
    run(flags, script)
    output_dir, name = flags["output_dir"], TRAINED[script]
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    model_class = {PRIOR: PriorTransformer, DECODER: UNet2DConditionModel}[script]
    average = model_class.from_pretrained(output_dir / "checkpoint-4" / f"{name}_ema").state_dict()
    result = model_class.from_pretrained(output_dir, subfolder=name).state_dict()
    assert all(torch.equal(average[key], result[key]) for key in result)
    weights = model_class.from_pretrained(output_dir / "checkpoint-4" / name).state_dict()
    assert not all(torch.equal(weights[key], result[key]) for key in result)
    assert sorted(p.name for p in (output_dir / "validation").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert np.isfinite(losses_of(output_dir)).all()
    assert [event.step for event in events_of(output_dir).Scalars("grad_norm")] == [1, 2, 3, 4]
    assert not list(output_dir.glob("*/*.bin"))[2:]  # only optimizer and schedule of the two checkpoints


@both
def test_only_weights_are_trained_and_all_of_them(script, flags, prior_folder):
    """Mean and deviation of CLIP's embeddings are stored as parameters, and are not trained."""
    run({**flags, "learning_rate": 1e-2, "adam_weight_decay": 0.1}, script)
    trained, before = weights_of(script, flags["output_dir"]), weights_of(script, flags[BASE[script]])
    changed = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert not {"clip_mean", "clip_std"} & changed
    assert len(trained) - len(changed) == (2 if script == PRIOR else 0)


@both
def test_frozen_parts_are_saved_as_they_were(script, flags):
    run({**flags, "mixed_precision": "bf16"}, script)
    for path in Path(flags[BASE[script]]).rglob("*.safetensors"):
        if path.parent.name == TRAINED[script]:
            continue
        before, after = load_file(path), load_file(flags["output_dir"] / path.relative_to(flags[BASE[script]]))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@both
def test_resume_is_exact(script, flags, tmp_path):
    flags |= {"use_ema": True, "gradient_accumulation_steps": 2, "proportion_empty_prompts": 0.2}
    flags |= {"max_train_steps": 6, "checkpointing_steps": 3, "lr_scheduler": "cosine", "learning_rate": 1e-3}
    run(flags, script)
    reset_accelerate()
    shutil.copytree(flags["output_dir"] / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    run({**flags, "resume_from_checkpoint": "latest", "output_dir": tmp_path / "resumed"}, script)
    name = TRAINED[script]
    one, other = (folder / "checkpoint-6" for folder in (flags["output_dir"], tmp_path / "resumed"))
    assert largest_difference(one, other, (name, f"{name}_ema")) == 0.0
    assert largest_difference(flags["output_dir"] / "checkpoint-3", one, (name, f"{name}_ema")) > 0.0


@both
def test_gradient_checkpointing_recomputes_and_changes_no_bit(script, flags, tmp_path, monkeypatch):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    run({**flags, "output_dir": tmp_path / "plain"}, script)
    assert not calls
    run({**flags, "output_dir": tmp_path / "recomputed", "gradient_checkpointing": True}, script)
    assert len(calls) >= 4
    plain, recomputed = weights_of(script, tmp_path / "plain"), weights_of(script, tmp_path / "recomputed")
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


# Results that draw ----------------------------------------------------------------------------------------------------


def test_the_pair_draws_together(flags, tmp_path):
    """A trained prior and a trained decoder, in every way that the published guide shows, from local paths."""
    run({**flags, "output_dir": tmp_path / "prior"}, PRIOR)
    run({**flags, "output_dir": tmp_path / "decoder", "checkpointing_steps": 2}, DECODER)

    prior_pipeline = DiffusionPipeline.from_pretrained(tmp_path / "prior")
    assert isinstance(prior_pipeline, KandinskyV22PriorPipeline)
    components = {f"prior_{name}": part for name, part in prior_pipeline.components.items()}
    pipeline = AutoPipelineForText2Image.from_pretrained(tmp_path / "decoder", **components)
    assert isinstance(pipeline, KandinskyV22CombinedPipeline)
    together = draw(pipeline, "red dots", prior_num_inference_steps=2)

    embeds = prior_pipeline("red dots", num_inference_steps=2, generator=torch.Generator().manual_seed(1))
    decoder = KandinskyV22Pipeline.from_pretrained(tmp_path / "decoder")
    assert draw(decoder, embeds.image_embeds, embeds.negative_image_embeds).size == (32, 32)

    unet = UNet2DConditionModel.from_pretrained(tmp_path / "decoder" / "checkpoint-2" / "unet")
    pipeline = AutoPipelineForText2Image.from_pretrained(
        flags["pretrained_decoder_model_name_or_path"], unet=unet, **components
    )
    assert draw(pipeline, "red dots", prior_num_inference_steps=2).tobytes() == together.tobytes()


def test_the_decoder_s_card_leads_to_its_prior(flags, monkeypatch, tmp_path):
    run(flags, DECODER)
    card = ModelCard.load(flags["output_dir"] / "README.md")
    assert card.data.prior == [str(flags["pretrained_prior_model_name_or_path"])]
    monkeypatch.chdir(tmp_path)
    assert draw(AutoPipelineForText2Image.from_pretrained("output"), "red dots", prior_num_inference_steps=2).size == (
        32,
        32,
    )


@both
def test_the_code_in_the_card_runs(script, flags, tmp_path):
    run({**flags, "hub_model_id": "somebody/something"}, script)
    card = ModelCard.load(flags["output_dir"] / "README.md")
    assert card.data.base_model is None
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    code = code.replace("somebody/something", str(flags["output_dir"]))
    code = code.replace('.save("', f'.save("{tmp_path}/')
    code = re.sub(
        r"^pipeline\(", "pipeline(num_inference_steps=2, height=32, width=32, prompt=", code, flags=re.MULTILINE
    )
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "picture.png").is_file()


@both
def test_validation_pictures_are_those_of_the_result(script, flags):
    """What the saved pair draws outside the script, from the noise that belongs to the prompt, at --resolution."""
    from train_text_to_image import random_generator

    run({**flags, "validation_prompts": ["red dots"], "resolution": 40, "use_ema": True, "learning_rate": 1e-2}, script)
    grid = PIL.Image.open(flags["output_dir"] / "validation" / "step-000002.png")
    halves = {PRIOR: flags[BASE[PRIOR]], DECODER: flags[BASE[DECODER]], script: flags["output_dir"]}
    prior, decoder = (DiffusionPipeline.from_pretrained(halves[name]) for name in SCRIPTS)
    for half in (prior, decoder):
        half.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(int(random_generator(0, 2, 0).integers(2**32)))
    embeds = prior("red dots", generator=generator)
    options = {"num_inference_steps": 20, "generator": generator, "height": 40, "width": 40}
    picture = decoder(embeds.image_embeds, embeds.negative_image_embeds, **options).images[0]
    assert np.abs(np.asarray(grid).astype(int) - np.asarray(picture)).max() <= 1


def test_the_prediction_type_is_the_decoder_s_own(flags, tmp_path):
    path = Path("scheduler") / "scheduler_config.json"
    shutil.copytree(flags[BASE[DECODER]], tmp_path / "velocity")
    config = json.loads((tmp_path / "velocity" / path).read_text())
    (tmp_path / "velocity" / path).write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    run({**flags, "output_dir": tmp_path / "a"}, DECODER)
    run({**flags, "output_dir": tmp_path / "b", BASE[DECODER]: tmp_path / "velocity"}, DECODER)
    assert losses_of(tmp_path / "a")[0] != pytest.approx(losses_of(tmp_path / "b")[0], rel=1e-3)
    zero = {**config, "rescale_betas_zero_snr": True}
    (tmp_path / "velocity" / path).write_text(json.dumps(zero))
    with pytest.raises(importlib.import_module(DECODER).RunError, match="zero terminal SNR"):
        run({**flags, BASE[DECODER]: tmp_path / "velocity"}, DECODER)


# The other half -------------------------------------------------------------------------------------------------------


@both
def test_a_missing_other_half_is_no_matter_without_prompts(script, flags):
    other = BASE[DECODER if script == PRIOR else PRIOR]
    if script == DECODER:  # the image encoder is needed, the rest of the prior is not
        folder = flags["output_dir"].with_name("half")
        for part in ("image_encoder", "image_processor"):
            shutil.copytree(flags[other] / part, folder / part)
        flags[other] = folder
    else:
        flags[other] = "nowhere"
    run(flags, script)
    assert (flags["output_dir"] / "model_index.json").is_file()


@both
def test_a_missing_other_half_is_an_error_at_step_0_with_prompts(script, flags):
    other = BASE[DECODER if script == PRIOR else PRIOR]
    folder = flags["output_dir"].with_name("half")
    shutil.copytree(flags[other], folder)
    shutil.rmtree(folder / {PRIOR: "movq", DECODER: "text_encoder"}[script])
    with pytest.raises(importlib.import_module(script).RunError, match=f"--{other} .*no file named"):
        run({**flags, other: folder, "validation_prompts": ["red dots"]}, script)
    assert not flags["output_dir"].exists()


@both
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "picture"}, "--image_column picture: no such column.*image"),
        ({"output_dir": "prior"}, "is the model to start from"),
    ],
)
def test_bad_input(script, flags, changes, message):
    module = importlib.import_module(script)
    if "output_dir" in changes:
        changes = {"output_dir": flags[BASE[script]]}
    with pytest.raises(module.RunError, match=message):
        run({**flags, **changes}, script)
    assert not flags["output_dir"].exists()


@both
def test_halves_that_do_not_fit(script, flags, tmp_path):
    """The trained half is checked always, the other with prompts, before anything is written."""
    tiny.make_kandinsky_decoder(tmp_path / "wide", embedding_dim=24)
    flags |= {BASE[DECODER]: tmp_path / "wide", "validation_prompts": ["red dots"]}
    with pytest.raises(importlib.import_module(script).RunError, match="embedding width.*(16, 24|24, 16)"):
        run(flags, script)
    assert not flags["output_dir"].exists()


def test_a_prior_without_its_vocabulary_is_found_before_the_decoder_trains(flags, tmp_path):
    shutil.copytree(flags[BASE[PRIOR]], tmp_path / "prior")
    for path in (tmp_path / "prior" / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    with pytest.raises(importlib.import_module(DECODER).RunError, match="tokenizer's tokens"):
        run({**flags, BASE[PRIOR]: tmp_path / "prior", "validation_prompts": ["red dots"]}, DECODER)


def test_a_checkpoint_of_the_other_script(flags, tmp_path):
    run({**flags, "output_dir": tmp_path / "output", "checkpointing_steps": 2}, PRIOR)
    reset_accelerate()
    with pytest.raises(importlib.import_module(DECODER).RunError, match="checkpoint-2"):
        run({**flags, "output_dir": tmp_path / "output", "resume_from_checkpoint": "latest"}, DECODER)


def test_a_resolution_that_the_decoder_cannot_take(flags):
    import train_text_to_image_decoder

    with pytest.raises(train_text_to_image_decoder.RunError, match="--resolution 30: .*8"):
        run({**flags, "resolution": 30}, DECODER)
