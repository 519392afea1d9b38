"""Read a Flax pipeline by the libraries that defined its format: for a Python with diffusers 0.39, transformers 4.57
and flax, the last that have one. `test_flax_models.py` runs it.

    python diffusers_039.py FOLDER INPUTS.npz OUTPUTS.npz

FOLDER is a pipeline with .msgpack files. INPUTS has "latents" (b, c, h, w), "timesteps" (b,), "states" (b, n, d) and
"input_ids" (b, n). OUTPUTS gets all weights, as part/name/.../name, and what the models make of the inputs.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from diffusers import FlaxStableDiffusionPipeline
from flax.traverse_util import flatten_dict


def main(folder, inputs, outputs):
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    wanted = {  # what the classes themselves would initialise for the configuration
        "unet": jax.eval_shape(pipeline.unet.init_weights, jax.random.PRNGKey(0)),
        "vae": jax.eval_shape(pipeline.vae.init_weights, jax.random.PRNGKey(0)),
        "text_encoder": pipeline.text_encoder.params_shape_tree,
    }
    shapes = {part: jax.tree_util.tree_map(lambda leaf: list(leaf.shape), dict(tree)) for part, tree in wanted.items()}
    Path(outputs).with_suffix(".json").write_text(json.dumps(shapes, separators=(",", ":"), sort_keys=True))
    made = {f"{part}/" + "/".join(key): leaf for part in wanted for key, leaf in flatten_dict(params[part]).items()}

    given = np.load(inputs)
    unet, vae = {"params": params["unet"]}, {"params": params["vae"]}
    made["states"] = pipeline.text_encoder(given["input_ids"], params=params["text_encoder"])[0]
    timesteps = jax.numpy.asarray(given["timesteps"])  # of arrays, it knows only its own
    made["prediction"] = pipeline.unet.apply(unet, given["latents"], timesteps, given["states"]).sample
    made["pixels"] = pipeline.vae.apply(vae, given["latents"], method=pipeline.vae.decode).sample
    prompt = pipeline.prepare_inputs(["a picture of red dots"])
    drawn = pipeline(prompt, params, jax.random.PRNGKey(0), num_inference_steps=3, height=32, width=32)
    np.savez(outputs, image=drawn.images, **{name: np.asarray(array) for name, array in made.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
