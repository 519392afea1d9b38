"""Fine-tunes Stable Diffusion by the mirrored script's recipe, to have something to measure against where it is not.

    python tests/benchmarks/recipe.py --pretrained_model_name_or_path=models --train_data_dir=images --output_dir=out

Written afresh from what that script does in a step, and with none of what makes ours fast: images are read by the
main process unless --dataloader_num_workers says otherwise, both encoders run in every step, AdamW and the average take
PyTorch's default implementation, the CPU waits for the device twice in every micro-step, no channels_last. It takes the
flags below as `train_text_to_image.py` does, and ignores the others. It is a stand-in: `benchmark.py --versus` takes
the real file from a checkout just as well, and that is the better comparison.
"""

import argparse
import math
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torchvision import transforms
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--dataset_name", help="folder saved by save_to_disk")
    parser.add_argument("--train_data_dir", help="folder of images with metadata.jsonl")
    parser.add_argument("--output_dir", default="sd-model-finetuned")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--center_crop", action="store_true")
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument("--image_interpolation_mode", default="lanczos")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--lr_warmup_steps", type=int, default=500)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"])
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--seed", type=int)
    return parser.parse_known_args(input_args)[0]


def load_data(args, tokenizer):
    """The data set, whose rows become {"pixel_values", "input_ids"} when they are read."""
    if args.dataset_name:
        dataset = datasets.load_from_disk(args.dataset_name)
    else:
        dataset = datasets.load_dataset("imagefolder", data_files={"train": f"{args.train_data_dir}/**"})["train"]
    size = args.resolution
    transform = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode[args.image_interpolation_mode.upper()]),
            transforms.CenterCrop(size) if args.center_crop else transforms.RandomCrop(size),
            transforms.RandomHorizontalFlip() if args.random_flip else transforms.Lambda(lambda image: image),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def preprocess(rows):
        captions = tokenizer(rows["text"], padding="max_length", truncation=True, return_tensors="pt")
        images = [transform(image.convert("RGB")) for image in rows["image"]]
        return {"pixel_values": images, "input_ids": list(captions.input_ids)}

    return dataset.with_transform(preprocess)


def collate(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "input_ids")}


def batch_loss(batch, unet, vae, text_encoder, noise_scheduler, weight_dtype):
    """The mean squared error of the predicted noise, or velocity, over a batch."""
    with torch.no_grad():
        latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.sample() * vae.config.scaling_factor
        states = text_encoder(batch["input_ids"], return_dict=False)[0]
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, latents.shape[:1], device=latents.device)
    target = noise
    if noise_scheduler.config.prediction_type == "v_prediction":
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, states, return_dict=False)[0]
    return F.mse_loss(model_pred.float(), target.float(), reduction="mean")


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, "logs"))),
    )
    if args.seed is not None:
        set_seed(args.seed)
    path = args.pretrained_model_name_or_path
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    noise_scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(path, subfolder="vae").requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet").train()
    ema_unet = EMAModel(unet.parameters()) if args.use_ema else None
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    dataset = load_data(args, tokenizer)
    dataloader = torch.utils.data.DataLoader(
        dataset,
        shuffle=True,
        collate_fn=collate,
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    processes = accelerator.num_processes
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, args.lr_warmup_steps * processes, args.max_train_steps * processes
    )
    unet, optimizer, dataloader, lr_scheduler = accelerator.prepare(unet, optimizer, dataloader, lr_scheduler)
    if ema_unet:
        ema_unet.to(accelerator.device)
    text_encoder.to(accelerator.device, dtype=weight_dtype)
    vae.to(accelerator.device, dtype=weight_dtype)
    if accelerator.is_main_process:
        accelerator.init_trackers("text2image-fine-tune", vars(args))

    step, train_loss = 0, 0.0
    progress_bar = tqdm(total=args.max_train_steps, disable=not accelerator.is_local_main_process)
    updates_per_epoch = max(1, math.ceil(len(dataloader) / args.gradient_accumulation_steps))
    for _ in range(math.ceil(args.max_train_steps / updates_per_epoch)):
        for batch in dataloader:
            with accelerator.accumulate(unet):
                loss = batch_loss(batch, unet, vae, text_encoder, noise_scheduler, weight_dtype)
                avg_loss = accelerator.gather(loss.repeat(args.train_batch_size)).mean()
                train_loss += avg_loss.item() / args.gradient_accumulation_steps  # waits for the device
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                if ema_unet:
                    ema_unet.step(unet.parameters())
                progress_bar.update(1)
                step += 1
                accelerator.log({"train_loss": train_loss}, step=step)
                train_loss = 0.0
            progress_bar.set_postfix(step_loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])  # waits again
            if step >= args.max_train_steps:
                break
    if accelerator.is_main_process:
        if ema_unet:
            ema_unet.copy_to(unet.parameters())
        accelerator.unwrap_model(unet).save_pretrained(Path(args.output_dir, "unet"))
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
