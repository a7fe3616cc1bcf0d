"""Multi-scale deformable attention: the arguments of the layer, and all of its work that needs no Flax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.typing import DTypeLike

from jax_dcn._checks import check_array, check_bool, to_array, to_count, to_scale, to_spatial_shapes
from jax_dcn._layers.arguments import MmcvArguments
from jax_dcn._layers.parts import Built, Linear, Part, softmax
from jax_dcn.functional import checked_attention


# Flax's modules bring their own comparison and representation.
@dataclasses.dataclass(eq=False, repr=False)
class MultiScaleDeformableAttention(MmcvArguments):
    """The work of the layer that `jax_dcn.linen.MultiScaleDeformableAttention` documents."""

    # By the names of Deformable DETR's own layer.
    _OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        "d_model": "embed_dims",
        "n_heads": "num_heads",
        "n_levels": "num_levels",
        "n_points": "num_points",
    }

    embed_dims: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int = 4
    im2col_step: int = 64
    dropout: Any = 0.1  # a number; in nnx the attribute is a layer
    batch_first: bool = False
    norm_cfg: Any = None
    init_cfg: Any = None
    value_proj_ratio: float = 1.0
    _: dataclasses.KW_ONLY
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: Any = None  # a lax.PrecisionLike
    forward_mode: bool = False

    @property
    def _name(self) -> str:
        """With which errors begin."""
        return type(self).__name__

    def _check_arguments(self, dropout: Any) -> None:
        """Checks the arguments. nnx's layer takes `dropout` and keeps a layer of that name, so it is given."""
        name = self._name
        for argument in ("embed_dims", "num_heads", "num_levels", "num_points"):
            setattr(self, argument, to_count(name, argument, getattr(self, argument)))
        for argument in ("batch_first", "forward_mode"):
            check_bool(name, argument, getattr(self, argument))
        if not 0 <= to_scale(name, "dropout", dropout) <= 1:
            raise ValueError(f"{name}: dropout must be from 0 to 1, got {dropout!r}")
        self.norm_cfg = self.init_cfg = None  # a dict could not be hashed
        self.value_proj_ratio = to_scale(name, "value_proj_ratio", self.value_proj_ratio)
        for argument, size in (("embed_dims", self.embed_dims), ("embed_dims * value_proj_ratio", self._value_dims)):
            if size < 1 or size % self.num_heads:
                raise ValueError(
                    f"{name}: {argument} ({size}) must be a positive multiple of num_heads ({self.num_heads})"
                )

    @property
    def _smallest_inputs(self) -> tuple[Any, ...]:
        """The arguments as they may be, for whoever only wants the shapes of the parameters."""
        axes = (1, self.num_levels) if self.batch_first else (self.num_levels, 1)
        query = jax.ShapeDtypeStruct((*axes, self.embed_dims), self.param_dtype)
        points = jax.ShapeDtypeStruct((1, self.num_levels, self.num_levels, 2), self.param_dtype)
        return query, None, None, None, None, None, points, ((1, 1),) * self.num_levels

    @property
    def _value_dims(self) -> int:
        return int(self.embed_dims * self.value_proj_ratio)

    @property
    def _parts(self) -> dict[str, Part]:
        zeros = initializers.zeros
        samples = self.num_heads * self.num_levels * self.num_points
        return {
            "sampling_offsets": Linear(self.embed_dims, samples * 2, kernel_init=zeros, bias_init=self._rays),
            "attention_weights": Linear(self.embed_dims, samples, kernel_init=zeros),
            "value_proj": Linear(self.embed_dims, self._value_dims),
            "output_proj": Linear(self._value_dims, self.embed_dims),
        }

    def _rays(self, key: Any, shape: Any, dtype: Any = float, out_sharding: Any = None) -> jax.Array:
        """The first offsets: each head looks in a direction of its own, each point a pixel further."""
        del key, out_sharding
        angles = jnp.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        rays = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)
        rays = rays / jnp.abs(rays).max(-1, keepdims=True)
        steps = jnp.arange(1, self.num_points + 1).astype(rays.dtype)
        offsets = rays[:, None, None, :] * steps[None, None, :, None]
        return jnp.repeat(offsets, self.num_levels, 1).reshape(shape).astype(dtype)

    def _like_query(self, argument: str, value: Any, query: jax.Array) -> jax.Array:
        """What is added to something of the query's shape."""
        check_array(self._name, argument, value)
        if value.shape != query.shape:
            raise ValueError(f"{self._name}: {argument} has shape {value.shape}, expected query's, {query.shape}")
        return value

    def _run(
        self,
        parts: Built,
        query: jax.Array,
        value: jax.Array | None,
        query_pos: jax.Array | None,
        key_padding_mask: jax.Array | None,
        reference_points: jax.Array | None,
        spatial_shapes: Sequence[Sequence[int]] | None,
    ) -> jax.Array:
        """The attention of the query, before dropout and identity, in the query's order of axes."""
        name = self._name
        shapes = to_spatial_shapes(name, spatial_shapes)
        if len(shapes) != self.num_levels:
            raise ValueError(
                f"{name}: spatial_shapes has {len(shapes)} levels, expected {self.num_levels} = num_levels"
            )
        value = query if value is None else value
        for argument, array in (("query", query), ("value", value)):
            check_array(name, argument, array)
            if array.ndim != 3 or array.shape[2] != self.embed_dims:
                order = "(N, length, embed_dims)" if self.batch_first else "(length, N, embed_dims)"
                raise ValueError(
                    f"{name}: {argument} has shape {array.shape}, expected {order} with embed_dims {self.embed_dims}"
                )
        if query_pos is not None:
            query = query + self._like_query("query_pos", query_pos, query)
        if not self.batch_first:
            query, value = jnp.swapaxes(query, 0, 1), jnp.swapaxes(value, 0, 1)
        batch, queries, _ = query.shape
        if value.shape[0] != batch:
            raise ValueError(f"{name}: value has batch size {value.shape[0]}, expected query's, {batch}")
        points = to_array(name, "reference_points", reference_points)
        expected = [(batch, queries, self.num_levels, size) for size in (2, 4)]
        if points.shape not in expected:
            raise ValueError(
                f"{name}: reference_points has shape {points.shape}, expected {expected[0]} or {expected[1]} = "
                f"(N, queries, num_levels, 2 or 4), with batch_first={self.batch_first}"
            )

        value = parts["value_proj"](value)
        if key_padding_mask is not None:
            check_array(name, "key_padding_mask", key_padding_mask)
            if key_padding_mask.shape != value.shape[:2]:
                raise ValueError(
                    f"{name}: key_padding_mask has shape {key_padding_mask.shape}, expected {value.shape[:2]} = "
                    "(N, the length of value)"
                )
            value = jnp.where(key_padding_mask.astype(bool)[:, :, None], 0, value)
        value = value.reshape(*value.shape[:2], self.num_heads, self._value_dims // self.num_heads)
        by_head = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        weights = parts["attention_weights"](query).reshape(*by_head[:3], self.num_levels * self.num_points)
        offsets = parts["sampling_offsets"](query).reshape(*by_head, 2)

        # 16 bits would place a sample to a few tenths of a pixel.
        points = points.astype(jnp.promote_types(points.dtype, jnp.float32))[:, :, None, :, None]
        offsets = offsets.astype(points.dtype)
        if points.shape[-1] == 4:
            offsets = offsets / self.num_points * points[..., 2:] * 0.5
        else:
            sizes = jnp.stack([jnp.stack([jnp.asarray(width), jnp.asarray(height)]) for height, width in shapes])
            offsets = offsets / sizes.astype(points.dtype)[None, None, None, :, None]
        y = checked_attention(
            *(name, value, shapes, points[..., :2] + offsets, softmax(weights).reshape(by_head)),
            forward_mode=self.forward_mode,
        )
        y = parts["output_proj"](y)
        return y if self.batch_first else jnp.swapaxes(y, 0, 1)
