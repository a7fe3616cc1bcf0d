"""A layer of Deformable DETR's encoder (Zhu et al. 2020, https://arxiv.org/abs/2010.04159) with jax_dcn.

That of transformers 5: every pixel of a pyramid looks at some places of all its levels. Names and arguments are
transformers', so its weights load, and it can be run beside its original:

    pip install torch transformers
    python examples/deformable_detr.py

That prints how far the outputs and gradients of both are apart. Without these packages only the port runs. The weights
are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_dcn import mmcv
from jax_dcn.mmcv.nn import LayerNorm, Linear
from jax_dcn.nnx import MultiScaleDeformableAttention

SIZES = dict(d_model=32, encoder_attention_heads=4, num_feature_levels=3, encoder_n_points=2, encoder_ffn_dim=48)
SHAPES = [(7, 10), (4, 5), (2, 3)]  # of the levels


class MLP(nnx.Module):
    def __init__(self, d_model: int, hidden: int, dropout: float, *, rngs: nnx.Rngs):
        self.fc1 = Linear(d_model, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, d_model, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.fc2(nnx.relu(self.fc1(x))))


class EncoderLayer(nnx.Module):
    """transformers' DeformableDetrEncoderLayer, by the names in its config, with ReLU."""

    def __init__(
        self,
        d_model: int = 256,
        encoder_attention_heads: int = 8,
        num_feature_levels: int = 4,
        encoder_n_points: int = 4,
        encoder_ffn_dim: int = 1024,
        dropout: float = 0.1,
        *,
        rngs: nnx.Rngs,
    ):
        self.self_attn = MultiScaleDeformableAttention(
            d_model,
            encoder_attention_heads,
            num_feature_levels,
            encoder_n_points,
            dropout=dropout,
            batch_first=True,
            rngs=rngs,
        )
        self.self_attn_layer_norm = LayerNorm(d_model, rngs=rngs)
        self.mlp = MLP(d_model, encoder_ffn_dim, dropout, rngs=rngs)
        self.final_layer_norm = LayerNorm(d_model, rngs=rngs)

    def __call__(
        self,
        hidden_states: jax.Array,  # (N, S, d_model), the pixels of all levels one after another
        attention_mask: jax.Array | None = None,  # (N, S), False where an image is padded
        spatial_position_embeddings: jax.Array | None = None,  # (N, S, d_model)
        reference_points: jax.Array | None = None,  # (N, S, levels, 2), (x, y) from 0 to 1
        spatial_shapes: Any = None,  # here and below: the original's, which has them as tensors too
        spatial_shapes_list: Sequence[tuple[int, int]] | None = None,
        level_start_index: Any = None,
    ) -> jax.Array:
        # mmcv's attention adds the positions to the query only, and the query to its result, as is done around
        # transformers'. Its mask says what is padding.
        x = self.self_attn(
            hidden_states,
            query_pos=spatial_position_embeddings,
            key_padding_mask=None if attention_mask is None else ~attention_mask,
            reference_points=reference_points,
            spatial_shapes=spatial_shapes_list,
        )
        x = self.self_attn_layer_norm(x)
        return self.final_layer_norm(x + self.mlp(x))


def reference_points(shapes: Sequence[tuple[int, int]], batch: int) -> jax.Array:
    """Where every pixel of every level is, in each level: (N, S, levels, 2)."""
    centres = []
    for height, width in shapes:
        y, x = jnp.meshgrid((jnp.arange(height) + 0.5) / height, (jnp.arange(width) + 0.5) / width, indexing="ij")
        centres.append(jnp.stack([x.ravel(), y.ravel()], -1))
    points = jnp.concatenate(centres).astype(jnp.float32)
    return jnp.broadcast_to(points[None, :, None], (batch, len(points), len(shapes), 2))


def random_inputs(batch: int = 2) -> tuple[Any, ...]:
    """The layer's arguments, of which the last quarter of the pixels of the first image are padding."""
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *(height * width for height, width in SHAPES)])
    x, positions = rng.normal(size=(2, batch, starts[-1], SIZES["d_model"])).astype(np.float32)
    mask = np.ones((batch, starts[-1]), bool)
    mask[0, starts[-1] * 3 // 4 :] = False
    points = np.asarray(reference_points(SHAPES, batch))
    return x, mask, positions, points, np.array(SHAPES), SHAPES, starts[:-1]


def original() -> Any:
    """transformers' layer with random weights."""
    import torch
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrEncoderLayer

    torch.manual_seed(0)
    layer = DeformableDetrEncoderLayer(DeformableDetrConfig(**SIZES, backbone_config={"model_type": "resnet"}))
    return layer.eval()


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    layer, inputs = EncoderLayer(**SIZES, rngs=nnx.Rngs(0)), random_inputs()
    layer.eval()
    try:
        torch_layer = original()
    except ModuleNotFoundError as error:
        print("output", layer(*inputs).shape)
        print(f"Not compared with its original: there is no {error.name}.")
        return
    mmcv.load_into(layer, torch_layer.state_dict())
    # The points have four axes, but are no image whose channels were to be moved.
    comparison = mmcv.compare(layer, torch_layer, *inputs, data_format="NCHW")
    print(comparison)
    print("self_attn is another part: here it adds the query, there it returns the attention's weights too.")
    compared = [row.error for row in comparison.outputs + comparison.gradients if not row.note]
    print(f"largest relative error of the others {max(compared):.1e}")


if __name__ == "__main__":
    main()
