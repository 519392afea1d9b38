"""JAX and XLA as on GPUs where cuDNN computes the attention, on CPUs: import this, and then run the Flax script.

JAX checks shapes and types, differentiates, and splits the attention over the devices by its own rules; XLA partitions
and optimizes what each device is to run. What ends it is that a CPU has no such call: "No registered implementation".
"""

from types import SimpleNamespace

from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.interpreters import mlir

import train_text_to_image_flax as script

splits = []  # (batch, length, heads, head) of query, key and value: an axis of the mesh, or None


def noted(query, key, value, *rest, rule=fused._check_qkv_bias_mask_spec):
    splits.append([query, key, value])
    rule(query, key, value, *rest)


def kernel_of_a_gpu(device, *rest, rule=script.attention_kernel):
    return rule(SimpleNamespace(platform="gpu", compute_capability="9.0"), *rest)


script.attention_kernel = kernel_of_a_gpu
fused._check_qkv_bias_mask_spec = noted
fused.check_cudnn_version = lambda: 91100
for primitive, lowering in (
    (fused._dot_product_attention_fwd_p, fused._dot_product_attention_fwd_cuda_lowering),
    (fused._dot_product_attention_bwd_p, fused._dot_product_attention_bwd_cuda_lowering),
):
    mlir.register_lowering(primitive, lowering, platform="cpu")
