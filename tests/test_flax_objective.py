"""The objective in JAX: against the PyTorch script's, on the same weights, batch, noise and timesteps."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from test_flax_training import load_models

import train_text_to_image
import train_text_to_image_flax as script

CASES = [(1, "epsilon"), (2, "v_prediction")]
FLAGS = ["--pretrained_model_name_or_path", "a", "--train_data_dir", "b", "--resolution", "32"]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"SD {case[0]}, {case[1]}")
def both(request, tmp_path_factory):
    """The same pipeline in PyTorch and in JAX: (pipeline, models, weights, scheduler's configuration).

    No weight is zero, as in a trained one: AdamW moves a weight whose gradient is rounding alone by up to the learning
    rate, and relative to nothing that would be all.
    """
    version, prediction_type = request.param
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = tiny.make_stable_diffusion(folder, version, prediction_type, levels=1)
    rng = np.random.default_rng(0)
    for parameter in pipeline.unet.parameters():
        parameter.data += torch.from_numpy(0.1 * rng.standard_normal(parameter.shape, np.float32))
    pipeline.unet.save_pretrained(folder / "unet")
    models, weights = load_models(folder)
    return pipeline, models, weights, json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


@pytest.fixture(scope="module")
def batch():
    """A batch of 3 in the layout of JAX."""
    rng = np.random.default_rng(0)
    normal = {name: rng.standard_normal((3, 8, 8, 4), np.float32) for name in ("posterior_noise", "noise")}
    return {
        **normal,
        "perturbation_noise": rng.standard_normal((3, 8, 8, 4), np.float32),
        "offset_noise": rng.standard_normal((3, 1, 1, 4), np.float32),
        "pixel_values": rng.integers(256, size=(3, 32, 32, 3), dtype=np.uint8),
        "input_ids": rng.integers(0, 500, (3, 77)),
        "timesteps": np.array([0, 400, 999]),
    }


def in_torch(batch):
    """The same batch, channels first."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {name: value.permute(0, 3, 1, 2) if value.ndim == 4 else value for name, value in tensors.items()}


def parsed(module, words):
    return module.parse_args([*FLAGS, *words])


def losses(both, batch, words):
    """(loss in PyTorch, with a graph; loss in JAX as a function of the UNet's weights; the weights)."""
    pipeline, models, weights, config = both
    prediction_type = config["prediction_type"]
    scheduler = DDPMScheduler.from_config(config)
    models_in_torch = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    loss = train_text_to_image.training_losses(
        in_torch(batch),
        *models_in_torch,
        scheduler.alphas_cumprod,
        prediction_type,
        parsed(train_text_to_image, words),
    ).mean()
    frozen = {part: jax.tree.map(jnp.asarray, weights[part]) for part in ("vae", "text_encoder")}
    alphas_cumprod = jnp.asarray(script.training_alphas_cumprod(config))
    args = parsed(script, words)

    def loss_in_jax(params, frozen=frozen, batch=batch, key=None):
        losses = script.training_losses(params, frozen, batch, models, alphas_cumprod, prediction_type, args)
        return losses.mean()

    return loss, loss_in_jax, frozen, args


VARIANTS = [
    [],
    ["--snr_gamma", "5.0"],
    ["--noise_offset", "0.1", "--input_perturbation", "0.1"],
    ["--dream_training", "--dream_detail_preservation", "0.5"],
]


@pytest.mark.parametrize("words", VARIANTS, ids=lambda words: " ".join(words) or "plain")
def test_the_loss_is_pytorch_s(both, batch, words):
    loss, loss_in_jax, _, _ = losses(both, batch, words)
    measured = jax.jit(loss_in_jax)(both[2]["unet"])
    print(f"relative difference of the loss: {abs(float(measured) / loss.item() - 1):.1e}")
    assert float(measured) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("words", VARIANTS[1:2], ids=" ".join)
def test_one_update_is_pytorch_s(both, batch, words):
    """Loss, gradient norm and all weights after one update by AdamW, with clipping and weight decay in effect."""
    words = [*words, "--max_grad_norm", "0.1", "--learning_rate", "1e-4", "--adam_weight_decay", "0.1"]
    pipeline, models, weights, _ = both
    unet, before = pipeline.unet, {name: p.detach().clone() for name, p in pipeline.unet.named_parameters()}
    loss, loss_in_jax, frozen, args = losses(both, batch, words)
    optimizer = train_text_to_image.make_optimizer(
        parsed(train_text_to_image, words), unet.parameters(), torch.device("cpu"), 1
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
    optimizer.step()
    after = {name: p.detach().clone() for name, p in unet.named_parameters()}
    unet.load_state_dict(before)
    unet.zero_grad()

    transform = script.make_optimizer_transform(args)
    state = script.initial_train_state(jax.tree.map(jnp.asarray, weights["unet"]), transform, vars(args))
    bound = {"losses": loss_in_jax, "transform": transform, "args": args}
    step = jax.jit(functools.partial(script.train_step, **bound))
    state, metrics = step(state, frozen, [batch], None, 1, args.learning_rate)
    assert norm > args.max_grad_norm
    assert float(metrics["train_loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)
    largest = 0
    for name, expected in after.items():
        path = models["unet"].paths[name]
        measured = script.to_checkpoint_layout(path, np.asarray(state["params"][name]))
        largest = max(largest, np.abs(measured - expected.numpy()).max() / np.abs(expected.numpy()).max())
        assert np.abs(measured - before[name].numpy()).max() > 0
    print(f"largest relative difference of a weight: {largest:.1e}")
    assert largest < 1e-4


def drawn_by_both(pipeline, models, weights, config, prompts):
    """Pictures of the prompts (b, height, width, 3) of 0 to 255, in PyTorch and in JAX, from the same latents."""
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    latents = np.random.default_rng(0).standard_normal((len(prompts), side, side, channels), np.float32)
    components = {**pipeline.components, "scheduler": DDIMScheduler.from_config(config, clip_sample=False)}
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 20, "guidance_scale": 7.5, "output_type": "np"}
    expected = pipeline(prompts, latents=torch.from_numpy(latents).permute(0, 3, 1, 2), **settings).images
    draw = script.make_sampler(models, config, config["prediction_type"], 20, jnp.float32)
    texts = (prompts, [""] * len(prompts))
    ids = np.stack([script.tokenize_captions(part, pipeline.tokenizer)["input_ids"] for part in texts])
    return (expected * 255).round().astype(int), np.asarray(draw(weights["unet"], weights, ids, latents)).astype(int)


def test_a_picture_drawn_in_jax_is_pytorch_s(both):
    """At most 2 of 255 apart in any pixel."""
    expected, measured = drawn_by_both(*both, ["red dots", "a picture of blue bars"])
    print(f"largest difference of a pixel: {np.abs(measured - expected).max()} of 255")
    assert measured.std() > 10  # not one flat colour
    assert np.abs(measured - expected).max() <= 2


def test_a_picture_of_trained_weights_drawn_in_jax_is_pytorch_s():
    folder = ROOT / "tests" / "assets" / "shapes-64"
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    prompts = ["a red circle on white", "a blue square on black"]
    expected, measured = drawn_by_both(pipeline, *load_models(folder), config, prompts)
    print(f"largest difference of a pixel: {np.abs(measured - expected).max()} of 255")
    assert np.abs(measured - expected).max() <= 2


SCHEDULERS = [
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    {"trained_betas": [0.1, 0.2, 0.3]},
]


@pytest.mark.parametrize("config", SCHEDULERS, ids=str)
def test_the_noise_schedule_is_diffusers_(config):
    expected = DDPMScheduler(**config).alphas_cumprod.numpy()
    # diffusers multiplies a thousand factors in float32, each rounded: relative 1000 · 2^-24. Near zero terminal SNR
    # small differences of numbers of size 1 are left.
    np.testing.assert_allclose(script.training_alphas_cumprod(config), expected, rtol=6e-5, atol=1e-7)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("number", [1, 7, 20, 1000])
def test_the_steps_of_drawing_are_ddim_s(spacing, set_alpha_to_one, number):
    config = {"timestep_spacing": spacing, "set_alpha_to_one": set_alpha_to_one, "steps_offset": 1}
    if number == 1000 and spacing == "leading":
        config["steps_offset"] = 0  # diffusers would look up a timestep that there is not
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(number)
    timesteps, _, after = script.ddim_steps(config, scheduler.alphas_cumprod.numpy(), number)
    np.testing.assert_array_equal(timesteps, scheduler.timesteps.numpy())
    before = scheduler.timesteps - 1000 // number
    expected = torch.where(before >= 0, scheduler.alphas_cumprod[before.clip(0)], scheduler.final_alpha_cumprod)
    np.testing.assert_array_equal(after, expected.numpy())


def test_zero_terminal_snr_is_drawn_from_its_last_timestep():
    """There the input is noise alone, which is what drawing starts with; with v-prediction all stays finite."""
    config = {**SCHEDULERS[3], "prediction_type": "v_prediction"}
    timesteps, alphas, _ = script.ddim_steps(config, script.training_alphas_cumprod(config), 20)
    assert (timesteps[0], alphas[0]) == (999, 0)
    noise, velocity = jnp.ones(3), jnp.full(3, 0.5)
    clean = script.predicted_clean("v_prediction", velocity, noise, alphas[0])
    np.testing.assert_array_equal(clean, -velocity)


def test_an_unknown_noise_schedule():
    with pytest.raises(script.RunError, match="beta_schedule sigmoid"):
        script.training_alphas_cumprod({"beta_schedule": "sigmoid"})
