"""The objective's functions against closed forms, and `training_losses` against the models called by hand."""

import argparse

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

from train_text_to_image import (
    add_noise,
    dream,
    min_snr_weight,
    predicted_noise,
    prediction_target,
    training_losses,
    weighted_squared_error,
)

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def scheduler():
    return DDPMScheduler(**SD_SCHEDULE)


@pytest.fixture
def clean_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)


TIMESTEPS = torch.tensor([0, 500, 999])


def alphas_of(scheduler, timesteps=TIMESTEPS):
    return scheduler.alphas_cumprod[timesteps, None, None, None]


def test_add_noise_is_the_scheduler_s(scheduler, clean_and_noise):
    expected = scheduler.add_noise(*clean_and_noise, TIMESTEPS)
    torch.testing.assert_close(add_noise(*clean_and_noise, alphas_of(scheduler)), expected)


def test_velocity_is_the_scheduler_s(scheduler, clean_and_noise):
    expected = scheduler.get_velocity(*clean_and_noise, TIMESTEPS)
    torch.testing.assert_close(prediction_target("v_prediction", *clean_and_noise, alphas_of(scheduler)), expected)


def test_targets_of_noise_and_sample(scheduler, clean_and_noise):
    clean, noise = clean_and_noise
    assert prediction_target("epsilon", clean, noise, alphas_of(scheduler)) is noise
    assert prediction_target("sample", clean, noise, alphas_of(scheduler)) is clean


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predicted_noise_inverts_the_target(scheduler, clean_and_noise, prediction_type):
    clean, noise = (tensor.double() for tensor in clean_and_noise)
    alphas = alphas_of(scheduler).double()
    target = prediction_target(prediction_type, clean, noise, alphas)
    torch.testing.assert_close(predicted_noise(prediction_type, target, add_noise(clean, noise, alphas), alphas), noise)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weight_is_the_papers_with_diffusers_snr(scheduler, gamma):
    scheduler.alphas_cumprod = alphas = scheduler.alphas_cumprod.double()
    snr = compute_snr(scheduler, torch.arange(1000)).double()  # it is rounded to float32 twice, and squared
    smaller = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64))
    torch.testing.assert_close(min_snr_weight("sample", alphas, gamma), smaller, rtol=4e-7, atol=0)
    torch.testing.assert_close(min_snr_weight("epsilon", alphas, gamma), smaller / snr, rtol=4e-7, atol=0)
    torch.testing.assert_close(min_snr_weight("v_prediction", alphas, gamma), smaller / (snr + 1), rtol=4e-7, atol=0)


def test_min_snr_weight_is_finite_where_the_ratio_is_not():
    alphas = torch.tensor([0.0, 1e-30, 1.0])  # SNR 0, 1e-30 and infinite
    assert min_snr_weight("epsilon", alphas, 5.0).tolist() == [1, 1, 0]
    assert min_snr_weight("v_prediction", alphas, 5.0).tolist() == [0, pytest.approx(1e-30), 0]
    assert min_snr_weight("sample", alphas, 5.0).tolist() == [0, pytest.approx(1e-30), 5]


def test_weights_of_all_predictions_mean_the_same_loss(scheduler, clean_and_noise):
    """A wrong x_0 by δ is a wrong ε by -δ√SNR and a wrong v by -δ√(SNR + 1): the paper's weights undo just that."""
    clean, noise = (tensor.double() for tensor in clean_and_noise)
    alphas = alphas_of(scheduler).double()
    noisy, wrong = add_noise(clean, noise, alphas), clean + 0.1
    wrong_noise = (noisy - alphas.sqrt() * wrong) / (1 - alphas).sqrt()
    losses = [
        weighted_squared_error(
            prediction_target(prediction_type, wrong, wrong_noise, alphas),
            prediction_target(prediction_type, clean, noise, alphas),
            min_snr_weight(prediction_type, alphas.flatten(), 5.0),
        ).mean()
        for prediction_type in PREDICTION_TYPES
    ]
    assert losses[0].item() == pytest.approx(losses[2].item(), rel=1e-3)  # the error itself is taken in float32
    assert losses[1].item() == pytest.approx(losses[2].item(), rel=1e-3)


def test_weighted_squared_error_by_hand():
    prediction, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert weighted_squared_error(prediction, target, torch.tensor([1.0, 10.0])).tolist() == [1 * 5, 10 * 2]


def test_dream_is_diffusers_(scheduler, clean_and_noise):
    clean, noise = clean_and_noise
    alphas = alphas_of(scheduler)
    noisy, prediction = add_noise(clean, noise, alphas), torch.full_like(noise, 0.25)
    unet = lambda *inputs: argparse.Namespace(sample=prediction)  # noqa: E731 - only the prediction matters here
    expected = compute_dream_and_update_latents(unet, scheduler, TIMESTEPS, noise, noisy, noise, None, 2.0)
    moved = dream(noisy, noise, prediction, alphas, 2.0)
    for tensor, reference in zip(moved, expected, strict=True):
        torch.testing.assert_close(tensor, reference)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_dream_leaves_a_perfect_prediction_alone(scheduler, clean_and_noise, prediction_type):
    clean, noise = (tensor.double() for tensor in clean_and_noise)
    alphas = alphas_of(scheduler).double()
    noisy = add_noise(clean, noise, alphas)
    predicted = predicted_noise(
        prediction_type, prediction_target(prediction_type, clean, noise, alphas), noisy, alphas
    )
    moved_noisy, moved_noise = dream(noisy, noise, predicted, alphas, 1.0)
    torch.testing.assert_close(moved_noisy, noisy)
    torch.testing.assert_close(moved_noise, noise)


# training_losses, with the models -------------------------------------------------------------------------------------


@pytest.fixture
def models(pipeline_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    return pipeline.unet, pipeline.vae, pipeline.text_encoder


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "pixel_values": torch.randint(256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "input_ids": torch.randint(0, 500, (2, 77), generator=generator),
        "posterior_noise": normal(2, 4, 8, 8),
        "timesteps": torch.tensor([10, 999]),
        "noise": normal(2, 4, 8, 8),
        "offset_noise": normal(2, 4, 1, 1),
        "perturbation_noise": normal(2, 4, 8, 8),
    }


def arguments(**changes):
    defaults = {"noise_offset": 0, "input_perturbation": 0, "snr_gamma": None, "dream_training": False}
    return argparse.Namespace(**{**defaults, "dream_detail_preservation": 1.0, **changes})


def by_hand(models, batch, scheduler):
    """What upstream libraries give for the same batch: latents, text states and the UNet as a function."""
    unet, vae, text_encoder = models
    with torch.no_grad():
        posterior = vae.encode(batch["pixel_values"] / 127.5 - 1).latent_dist
        latents = 0.18215 * (posterior.mean + torch.exp(0.5 * posterior.logvar) * batch["posterior_noise"])
        states = text_encoder(batch["input_ids"])[0]
    return latents, lambda noisy: unet(noisy, batch["timesteps"], states).sample


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_training_loss(models, batch, scheduler, prediction_type, snr_gamma):
    loss = training_losses(
        {**batch}, *models, scheduler.alphas_cumprod, prediction_type, arguments(snr_gamma=snr_gamma)
    ).mean()
    latents, predict = by_hand(models, batch, scheduler)
    noise, timesteps = batch["noise"], batch["timesteps"]
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    errors = (predict(scheduler.add_noise(latents, noise, timesteps)) - target).square().mean((1, 2, 3))
    if snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        errors = errors * snr.clamp(max=snr_gamma) / divisor
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for model in models[1:] for parameter in model.parameters())


@pytest.mark.parametrize(("offset", "perturbation"), [(0.5, 0), (0, 0.1), (0.5, 0.1)])
def test_noise_offset_and_input_perturbation(models, batch, scheduler, offset, perturbation):
    changed = arguments(noise_offset=offset, input_perturbation=perturbation)
    loss = training_losses({**batch}, *models, scheduler.alphas_cumprod, "epsilon", changed).mean()
    latents, predict = by_hand(models, batch, scheduler)
    noise = batch["noise"] + offset * batch["offset_noise"]
    noisy = scheduler.add_noise(latents, noise + perturbation * batch["perturbation_noise"], batch["timesteps"])
    expected = torch.nn.functional.mse_loss(predict(noisy), noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("detail_preservation", [1.0, 2.5])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_dream_training(models, batch, scheduler, prediction_type, detail_preservation):
    """Against diffusers' function, which knows epsilon only: it is given the ε that the model's prediction means."""
    changed = arguments(dream_training=True, dream_detail_preservation=detail_preservation)
    loss = training_losses({**batch}, *models, scheduler.alphas_cumprod, prediction_type, changed).mean()
    latents, predict = by_hand(models, batch, scheduler)
    noise, timesteps = batch["noise"], batch["timesteps"]
    alphas = alphas_of(scheduler, timesteps)

    def noise_of(noisy, timesteps, states):
        prediction = predict(noisy)
        if prediction_type == "v_prediction":
            prediction = alphas.sqrt() * prediction + (1 - alphas).sqrt() * noisy
        elif prediction_type == "sample":
            prediction = (noisy - alphas.sqrt() * prediction) / (1 - alphas).sqrt()
        return argparse.Namespace(sample=prediction)

    noisy = scheduler.add_noise(latents, noise, timesteps)
    noisy, noise = compute_dream_and_update_latents(
        noise_of, scheduler, timesteps, noise, noisy, noise, None, detail_preservation
    )
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction_type]
    assert loss.item() == pytest.approx(torch.nn.functional.mse_loss(predict(noisy), target).item(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_training_loss_is_finite_at_zero_terminal_snr(models, batch, prediction_type):
    scheduler = DDPMScheduler(**SD_SCHEDULE, rescale_betas_zero_snr=True)
    for changes in ({}, {"snr_gamma": 5.0}, {"snr_gamma": 5.0, "dream_training": True}):
        loss = training_losses(
            {**batch}, *models, scheduler.alphas_cumprod, prediction_type, arguments(**changes)
        ).mean()
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in models[0].parameters())
