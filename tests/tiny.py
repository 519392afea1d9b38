"""Random tiny checkpoints and captioned images, made offline in a second, for tests of what does not depend on size."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

RESOLUTION = 32
WORDS = ["red", "green", "blue", "grey", "dots", "bars", "of", "a", "picture"]


def make_tokenizer(folder):
    """Write a CLIP tokenizer that knows WORDS as whole tokens, and spells out any other text in bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + index) for index in range(256 - len(printable))]  # the byte-level alphabet of GPT-2 and CLIP
    alphabet = [chr(byte) for byte in printable] + others
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    merges = list(dict.fromkeys(merges))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def fill(model, seed):
    """Set all weights by NumPy: a library's own initialisation may change from one release to the next."""
    rng = np.random.default_rng(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            values = np.full(parameter.shape, float("norm" in name and name.endswith("weight")))
        else:
            values = rng.standard_normal(parameter.shape) / parameter[0].numel() ** 0.5
        parameter.data.copy_(torch.from_numpy(values))
    return model


def make_stable_diffusion(folder, version=1, prediction_type="epsilon", zero_terminal_snr=False, seed=0, levels=2):
    """Write a Stable Diffusion pipeline of random weights, in the layout of SD 1.x or 2.x (`version`), and return it.

    Its VAE shrinks 4 times; it draws RESOLUTION px. The weights are a function of `seed`. levels: of the UNet, 2, or 1
    with attention in the middle only and a text encoder of one layer, which XLA compiles in a third of the time.
    """
    tokenizer = make_tokenizer(Path(folder) / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=levels,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if version == 1 else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=RESOLUTION,
        scaling_factor=0.18215,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(16, 32)[:levels],
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D")[-levels:],
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")[:levels],
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2 if version == 1 else (2, 4)[:levels],
        use_linear_projection=version == 2,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        skip_prk_steps=True,
        steps_offset=1,
    )
    if zero_terminal_snr:
        scheduler.register_to_config(rescale_betas_zero_snr=True)
    pipeline = StableDiffusionPipeline(
        vae=fill(vae, seed),
        text_encoder=fill(CLIPTextModel(text_config), seed + 1),
        tokenizer=tokenizer,
        unet=fill(unet, seed + 2),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def make_stable_diffusion_xl(folder, prediction_type="epsilon", seed=0):
    """Write a pipeline of random weights in the layout of Stable Diffusion XL's base model, and return it.

    Its VAE shrinks 4 times; the two text encoders differ in width, and their tokenizers in padding.
    """
    tokenizer, tokenizer_2 = (make_tokenizer(Path(folder) / name) for name in ("tokenizer", "tokenizer_2"))
    tokenizer_2.pad_token = "!"
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 77}
    size |= {"vocab_size": len(tokenizer), "intermediate_size": 32, "projection_dim": 20}
    size |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=RESOLUTION,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = StableDiffusionXLPipeline(
        vae=fill(vae, seed),
        text_encoder=fill(CLIPTextModel(CLIPTextConfig(**size, hidden_size=16, hidden_act="quick_gelu")), seed + 1),
        text_encoder_2=fill(CLIPTextModelWithProjection(CLIPTextConfig(**size, hidden_size=24)), seed + 2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=fill(unet, seed + 3),
        scheduler=EulerDiscreteScheduler(**schedule, prediction_type=prediction_type, steps_offset=1),
    )
    pipeline.save_pretrained(folder)
    return pipeline


def make_kandinsky_prior(folder, seed=0):
    """Write a prior pipeline of random weights in the layout of Kandinsky 2.2, and return it."""
    tokenizer = make_tokenizer(Path(folder) / "tokenizer")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text_config = CLIPTextConfig(
        **size,
        vocab_size=len(tokenizer),
        projection_dim=16,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision_config = CLIPVisionConfig(**size, projection_dim=16, image_size=32, patch_size=8, hidden_act="gelu")
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=77
    )
    fill(prior, seed)
    prior.clip_mean.data.fill_(0.1)
    prior.clip_std.data.fill_(0.5)
    crop = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    pipeline = KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=fill(CLIPVisionModelWithProjection(vision_config), seed + 1),
        text_encoder=fill(CLIPTextModelWithProjection(text_config), seed + 2),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000),
        image_processor=CLIPImageProcessor(**crop),
    )
    pipeline.save_pretrained(folder)
    return pipeline


def make_kandinsky_decoder(folder, seed=0, embedding_dim=16):
    """Write a decoder pipeline of random weights in the layout of Kandinsky 2.2, and return it; it shrinks 4 times."""
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=embedding_dim,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        attention_head_dim=4,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        layers_per_block=1,
        norm_num_groups=4,
    )
    movq = VQModel(
        block_out_channels=(32, 32, 32),  # its spatial norm has 32 groups
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=16,
        vq_embed_dim=4,
        norm_type="spatial",
        layers_per_block=1,
        sample_size=RESOLUTION,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False)
    pipeline = KandinskyV22Pipeline(unet=fill(unet, seed), scheduler=scheduler, movq=fill(movq, seed + 1))
    pipeline.save_pretrained(folder)
    return pipeline


def make_images(folder, number=8, caption_lists=False, seed=0, largest=2 * RESOLUTION):
    """Write `number` PNG images with sides from RESOLUTION to `largest`, and captions, strings or lists of them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        width, height = rng.integers(RESOLUTION, largest, 2, endpoint=largest == RESOLUTION)
        name, colour = ("red", "green", "blue", "grey")[index % 4], rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colour).resize((int(width), int(height)), Image.Resampling.NEAREST).save(
            folder / f"{index}.png"
        )
        caption = f"a picture of {name} dots"
        rows.append({"file_name": f"{index}.png", "text": [caption, f"{name} bars"] if caption_lists else caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_rows(folder, number, bad=None, colour="red", captions=None, features=None):
    """Save a data set that holds its images itself: `number` squares, number `bad` is none. Returns `folder`.

    captions: of each row, of a type that `features` (`datasets.Features`) names if it is not text.
    """
    image = io.BytesIO()
    Image.new("RGB", (RESOLUTION, RESOLUTION), colour).save(image, "PNG")
    rows = {
        "image": [{"bytes": image.getvalue(), "path": None}] * number,
        "text": captions or [f"{colour} dots"] * number,
    }
    if bad is not None:
        rows["image"][bad] = {"bytes": b"no picture", "path": None}
    features = features or datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder
