"""Pipelines of random weights and synthetic captioned images, at the size that is asked for.

    python tests/benchmarks/sizes.py models --size sd15 --folder models
    python tests/benchmarks/sizes.py images --resolution 512 --rows 256 --folder images

`sd15`, `sd21`, `sdxl`, `kandinsky-prior` and `kandinsky-decoder` are the real architectures, from `model_configs.json`,
but for the text encoders' vocabulary, which is the tests' tokenizer's; a look-up costs nothing. `small` is for a CPU:
Stable Diffusion with fewer channels, whose VAE takes about as long to encode an image of 128 px as the UNet takes to
learn from it, on two CPU cores in batches of 4: there the VAE's wide convolutions do more than twice the FLOPs in a
second. `kandinsky-prior-small` and `kandinsky-decoder-small` are the real ones with fewer layers and channels, and with
about the same shares of the FLOPs. The speed of a step does not depend on the values of the weights.
"""

import argparse
import io
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tiny.py

SD_VAE = {
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OWN_CONFIGS = {
    "tiny": {
        "unet": {
            "sample_size": 4,
            "block_out_channels": [32, 32],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        },
        "vae": {**SD_VAE, "block_out_channels": [32] * 4, "layers_per_block": 1, "sample_size": 32},
        "text_encoder": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "quick_gelu",
        },
        "scheduler": SD_SCHEDULER,
    },
    "small": {
        "unet": {
            "sample_size": 16,
            "block_out_channels": [64, 128, 256, 256],
            "layers_per_block": 2,
            "cross_attention_dim": 128,
            "attention_head_dim": 8,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "vae": {**SD_VAE, "block_out_channels": [64, 128, 160, 192], "sample_size": 128},
        "text_encoder": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_act": "quick_gelu",
        },
        "scheduler": SD_SCHEDULER,
    },
}
# What is smaller than in the real models.
SMALLER = {
    "kandinsky-prior-small": {
        "prior": {"num_attention_heads": 8, "num_layers": 5, "embedding_dim": 320},
        "text_encoder": {
            "hidden_size": 320,
            "intermediate_size": 1280,
            "num_hidden_layers": 8,
            "num_attention_heads": 5,
            "projection_dim": 320,
        },
        "image_encoder": {
            "hidden_size": 416,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
            "projection_dim": 320,
        },
    },
    "kandinsky-decoder-small": {
        "unet": {
            "block_out_channels": [64, 128, 192, 256],
            "attention_head_dim": 32,
            "cross_attention_dim": 256,
            "encoder_hid_dim": 320,
            "layers_per_block": 2,
        },
        "movq": {"block_out_channels": [32, 32, 64, 64]},
        "image_encoder": {
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "projection_dim": 320,
        },
    },
}
# Of each size: the script that trains it, and the side of its images in pixels. The prior's is its image encoder's.
SIZES = {
    "tiny": ("train_text_to_image.py", 32),
    "small": ("train_text_to_image.py", 128),
    "sd15": ("train_text_to_image.py", 512),
    "sd21": ("train_text_to_image.py", 768),
    "sdxl": ("train_text_to_image_sdxl.py", 1024),
    "kandinsky-prior": ("train_text_to_image_prior.py", 224),
    "kandinsky-decoder": ("train_text_to_image_decoder.py", 768),
    "kandinsky-prior-small": ("train_text_to_image_prior.py", 224),
    "kandinsky-decoder-small": ("train_text_to_image_decoder.py", 128),
}
CROP = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}  # of CLIP's image processor
# What `model_index.json` says of a pipeline: its class, and the library and class of each part.
CLIP_TEXT = {"text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer")}
PIPELINES = {
    "stable-diffusion": {
        "_class_name": "StableDiffusionPipeline",
        **CLIP_TEXT,
        "vae": ("diffusers", "AutoencoderKL"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "scheduler": ("diffusers", "PNDMScheduler"),
        "safety_checker": (None, None),
        "feature_extractor": (None, None),
        "requires_safety_checker": False,
    },
    "stable-diffusion-xl": {
        "_class_name": "StableDiffusionXLPipeline",
        **CLIP_TEXT,
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "vae": ("diffusers", "AutoencoderKL"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "scheduler": ("diffusers", "EulerDiscreteScheduler"),
        "force_zeros_for_empty_prompt": True,
    },
    "prior": {
        "_class_name": "KandinskyV22PriorPipeline",
        **CLIP_TEXT,
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
        "image_processor": ("transformers", "CLIPImageProcessor"),
        "prior": ("diffusers", "PriorTransformer"),
        "scheduler": ("diffusers", "UnCLIPScheduler"),
    },
    "decoder": {
        "_class_name": "KandinskyV22Pipeline",
        "unet": ("diffusers", "UNet2DConditionModel"),
        "movq": ("diffusers", "VQModel"),
        "scheduler": ("diffusers", "DDPMScheduler"),
    },
}


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["models", "images"])
    parser.add_argument("--folder", type=Path, required=True, help="folder to make")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="of the models")
    parser.add_argument("--resolution", type=int, default=128, help="shortest side of the images, in pixels")
    parser.add_argument("--rows", type=int, default=256, help="images with captions")
    parser.add_argument("--saved", action="store_true", help="save a data set of `datasets`, not a folder of files")
    return parser.parse_args(input_args)


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def configs_of(size):
    """The configurations of a size: {name of the part: dict of its settings}."""
    if size in OWN_CONFIGS:
        return OWN_CONFIGS[size]
    facts = json.loads((Path(__file__).parent / "model_configs.json").read_text(encoding="utf-8"))
    if size == "sd15":
        return facts["stable-diffusion-1.5"]
    if size == "sd21":  # its VAE is that of 1.5
        return {"vae": facts["stable-diffusion-1.5"]["vae"], **facts["stable-diffusion-2.1"]}
    if size == "sdxl":
        return facts["stable-diffusion-xl"]
    parts = {**facts[f"kandinsky-2.2-{kind_of(size)}"], "image_encoder": facts["kandinsky-2.2-prior"]["image_encoder"]}
    smaller = SMALLER.get(size, {})
    return {name: {**config, **smaller.get(name, {})} for name, config in parts.items() if name != "parameters"}


def kind_of(size):
    """Which of the pipelines' models a size has."""
    if size == "sdxl":
        return "stable-diffusion-xl"
    return next((kind for kind in ("prior", "decoder") if size.startswith(f"kandinsky-{kind}")), "stable-diffusion")


def vae_factor(size):
    """Pixels along a side of one latent's, of a Stable Diffusion size."""
    return 2 ** (len(configs_of(size)["vae"]["block_out_channels"]) - 1)


def empty_models(size, vocab_size=49408, device="meta", frozen_dtype=None, only_trained=False):
    """The models of a size without weights: {name: torch.nn.Module}, the trained one first, in float32."""
    import diffusers
    import torch
    import transformers

    models, configs = {}, configs_of(size)
    names = {"prior": ["prior", "text_encoder", "image_encoder"], "decoder": ["unet", "movq", "image_encoder"]}
    names["stable-diffusion-xl"] = ["unet", "vae", "text_encoder", "text_encoder_2"]
    for name in names.get(kind_of(size), ["unet", "vae", "text_encoder"])[: 1 if only_trained else None]:
        config = {key: value for key, value in configs[name].items() if key != "_class_name"}
        kind = "stable-diffusion" if name == "unet" else "prior" if name == "image_encoder" else kind_of(size)
        library, class_name = PIPELINES[kind][name]
        torch.set_default_dtype(frozen_dtype if models and frozen_dtype else torch.float32)
        with torch.device(device):
            if library == "transformers":
                if name.startswith("text_encoder"):
                    config |= {"vocab_size": vocab_size, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
                model_class = getattr(transformers, class_name)
                models[name] = model_class(model_class.config_class(**config))
            else:
                models[name] = getattr(diffusers, class_name)(**config)
        torch.set_default_dtype(torch.float32)
        models[name].requires_grad_(len(models) == 1)
    return models


def fill(model, seed):
    """Give a model of the meta device weights on the CPU: norms 1, biases 0, the rest normal with variance 1 / fan-in,
    so that activations and loss are finite at any depth."""
    import torch

    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
            elif name in ("clip_mean", "clip_std"):
                parameter.fill_({"clip_mean": 0.1, "clip_std": 0.5}[name])
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model


def write_index(folder, kind):
    """Write `model_index.json` of a pipeline whose parts lie in `folder` (Path)."""
    (folder / "model_index.json").write_text(json.dumps(PIPELINES[kind], indent=2) + "\n", encoding="utf-8")


def make_models(size, folder):
    """Write what the script of a size starts from to `folder` (Path): a Stable Diffusion pipeline, or `prior/` and
    `decoder/`. One model is in memory at a time."""
    import diffusers
    import transformers
    from tiny import make_tokenizer

    kind = kind_of(size)
    own = folder if kind.startswith("stable-diffusion") else folder / kind
    clip = folder / "prior" if kind == "decoder" else own  # the decoder's image encoder is the prior pipeline's
    tokenizer = make_tokenizer(clip / "tokenizer")
    if kind == "stable-diffusion-xl":
        make_tokenizer(own / "tokenizer_2")
    for seed, (name, model) in enumerate(empty_models(size, len(tokenizer)).items()):
        fill(model, seed).save_pretrained((clip if name.endswith("encoder") else own) / name)
        model.to("meta")
    if not kind.startswith("stable-diffusion"):
        transformers.CLIPImageProcessor(**CROP).save_pretrained(clip / "image_processor")
    if kind == "prior":
        scheduler = diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample")
    else:
        scheduler_class = getattr(diffusers, PIPELINES[kind]["scheduler"][1])
        config = {key: value for key, value in configs_of(size)["scheduler"].items() if key != "_class_name"}
        more = {"skip_prk_steps": True, "steps_offset": 1} if kind == "stable-diffusion" else {}
        scheduler = scheduler_class(**config, **more)
    scheduler.save_pretrained(own / "scheduler")
    write_index(own, kind)


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def encoded_images(number, resolution, seed=0):
    """`number` JPEG files, as bytes, of smooth random pictures with sides from `resolution` to twice that."""
    import numpy as np
    from PIL import Image

    rng, files = np.random.default_rng(seed), []
    for _ in range(number):
        width, height = (int(side) for side in rng.integers(resolution, 2 * resolution, 2, endpoint=True))
        colour = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        colour.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def caption_of(row):
    return f"a picture of {('red', 'green', 'blue', 'grey')[row % 4]} {('dots', 'bars')[row // 4 % 2]} {row}"


def make_image_folder(folder, rows, resolution):
    """Write `rows` images, of 64 different ones, to `folder` (Path), and their captions to its metadata.jsonl."""
    files = encoded_images(min(rows, 64), resolution)
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for row in range(rows):
            name = f"{row:06d}.jpg"
            (folder / name).write_bytes(files[row % len(files)])
            metadata.write(json.dumps({"file_name": name, "text": caption_of(row)}) + "\n")


def make_saved_dataset(folder, rows, resolution):
    """Write a data set of `rows` rows as `datasets.Dataset.save_to_disk` does, to `folder` (Path).

    The first thousand rows are made by `datasets` and the same record batch is written over and over, so that a million
    rows take seconds.
    """
    import datasets
    import pyarrow as pa

    files, first = encoded_images(min(rows, 64), resolution), min(rows, 1000)
    columns = {
        "image": [{"bytes": files[row % len(files)], "path": None} for row in range(first)],
        "text": [caption_of(row) for row in range(first)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).save_to_disk(folder)
    (path,) = folder.glob("*.arrow")
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    with pa.OSFile(str(path) + ".all", "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        for start in range(0, rows, first):
            stream.write_table(table.slice(0, min(first, rows - start)))
    os.replace(str(path) + ".all", path)


def main(args):
    """Make `args.folder` whole or not at all: it is written beside its final name."""
    partial = args.folder.with_name(args.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was interrupted
    if args.what == "models":
        make_models(args.size, partial)
    else:
        (make_saved_dataset if args.saved else make_image_folder)(partial, args.rows, args.resolution)
    partial.rename(args.folder)


if __name__ == "__main__":
    main(parse_args())
