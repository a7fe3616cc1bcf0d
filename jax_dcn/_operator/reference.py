"""Deformable convolution in plain jax.numpy, NHWC.

The lowering where there is no kernel, what `JAX_DCN_IMPLEMENTATION=xla` selects, and the first oracle of the
tests. It gathers the four corners of every sample, so it stores N * H_out * W_out * kh * kw * C_in values.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jax_dcn._operator.geometry import Geometry


def accumulation_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of coordinates, interpolation weights and sums: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def coordinates(
    offset: jax.Array,  # (N, H_out, W_out, deform_groups*kh*kw*2)
    geometry: Geometry,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:  # y and x, each (N, H_out, W_out, kh*kw, deform_groups)
    """Where every tap samples the image, in pixels."""
    n, h_out, w_out, _ = offset.shape
    kh, kw = geometry.kernel_size

    def regular(size: int, taps: int, axis: int) -> jax.Array:  # (size, taps)
        start = jnp.arange(size) * geometry.stride[axis] - geometry.padding[axis][0]
        return (start[:, None] + jnp.arange(taps)[None, :] * geometry.dilation[axis]).astype(dtype)

    shift = offset.astype(dtype)
    if geometry.x_first:
        shift = shift.reshape(n, h_out, w_out, geometry.deform_groups, kw, kh, 2).swapaxes(4, 5)[..., ::-1]
    shift = shift.reshape(n, h_out, w_out, geometry.deform_groups, kh, kw, 2)
    y = regular(h_out, kh, 0)[None, :, None, None, :, None] + shift[..., 0]
    x = regular(w_out, kw, 1)[None, None, :, None, None, :] + shift[..., 1]

    def taps_before_groups(a: jax.Array) -> jax.Array:
        return a.reshape(n, h_out, w_out, geometry.deform_groups, geometry.taps).swapaxes(3, 4)

    return taps_before_groups(y), taps_before_groups(x)


def sample(
    x: jax.Array,  # (N, H, W, C_in)
    offset: jax.Array,  # (N, H_out, W_out, deform_groups*kh*kw*2)
    mask: jax.Array | None,  # (N, H_out, W_out, deform_groups*kh*kw)
    geometry: Geometry,
) -> jax.Array:  # (N, H_out, W_out, kh*kw, C_in)
    """The modulated bilinear samples, in the accumulation dtype."""
    n, height, width, c_in = x.shape
    dtype = accumulation_dtype(x.dtype)
    # In two steps, each of which JAX shards on a mesh with explicit axes.
    image = x.astype(dtype).reshape(n, height * width, c_in)
    image = image.reshape(n, height * width, geometry.deform_groups, c_in // geometry.deform_groups)

    y_at, x_at = coordinates(offset, geometry, dtype)
    valid = (y_at > -1) & (x_at > -1) & (y_at < height) & (x_at < width)  # False for NaN
    y_at = jnp.where(valid, y_at, 0)
    x_at = jnp.where(valid, x_at, 0)
    y_low, x_low = jnp.floor(y_at), jnp.floor(x_at)
    ly, lx = y_at - y_low, x_at - x_low
    y_low, x_low = y_low.astype(jnp.int32), x_low.astype(jnp.int32)

    out = valid.shape  # (N, H_out, W_out, kh*kw, deform_groups)
    rows_at = jax.vmap(
        jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"), in_axes=(1, 3), out_axes=3)
    )

    def corner(dy: int, dx: int, weight: jax.Array) -> jax.Array:
        row, column = y_low + dy, x_low + dx
        inside = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index = jnp.where(inside, row * width + column, 0)
        return jnp.where(inside[..., None], rows_at(image, index), 0) * weight[..., None]

    samples = (
        corner(0, 0, (1 - ly) * (1 - lx))
        + corner(0, 1, (1 - ly) * lx)
        + corner(1, 0, ly * (1 - lx))
        + corner(1, 1, ly * lx)
    )
    if mask is not None:
        by_group = (*out[:3], geometry.deform_groups, geometry.taps)
        if geometry.x_first:
            mask = mask.reshape(*by_group[:4], *geometry.kernel_size[::-1]).swapaxes(4, 5)
        factor = mask.astype(dtype).reshape(by_group).swapaxes(3, 4)
        # A tap outside the image contributes 0 whatever its mask, even an infinite one.
        samples = samples * jnp.where(valid, factor, 0)[..., None]
    return samples.reshape(*out[:4], c_in)


def deform_conv2d(
    x: jax.Array,  # (N, H, W, C_in)
    offset: jax.Array,  # (N, H_out, W_out, deform_groups*kh*kw*2)
    mask: jax.Array | None,  # (N, H_out, W_out, deform_groups*kh*kw)
    weight: jax.Array | None,  # (kh, kw, C_in/groups, C_out)
    bias: jax.Array | None,  # (C_out,)
    *,
    geometry: Geometry,
    precision: lax.PrecisionLike = None,
) -> jax.Array:  # (N, H_out, W_out, C_out)
    """Deformable convolution, v1 without a mask and v2 with one; without a weight the samples' sums over the taps."""
    if weight is None:
        terms = [sample(*level).sum(3) for level in _levels(x, offset, mask, geometry)]
        return sum(terms[1:], terms[0]).astype(x.dtype)
    samples = sample(x, offset, mask, geometry)
    kh, kw, group_in, c_out = weight.shape
    groups = geometry.groups
    dtype = accumulation_dtype(x.dtype)
    y = jnp.einsum(
        "npqtgc,tcgo->npqgo",
        samples.reshape(*samples.shape[:4], groups, group_in),
        weight.astype(dtype).reshape(kh * kw, group_in, groups, c_out // groups),
        precision=precision,
    ).reshape(*samples.shape[:3], c_out)
    if bias is not None:
        y = y + bias.astype(dtype)[None, None, None, :]
    return y.astype(x.dtype)


def _levels(
    x: jax.Array, offset: jax.Array, mask: jax.Array | None, geometry: Geometry
) -> list[tuple[jax.Array, jax.Array, jax.Array | None, Geometry]]:
    """The operands and the geometry of each image in x."""
    if not geometry.levels:
        return [(x, offset, mask, geometry)]
    dtype = accumulation_dtype(x.dtype)
    points, _ = geometry.kernel_size
    by_level = (*offset.shape[:3], geometry.deform_groups, len(geometry.levels), points)
    fractions = offset.astype(dtype).reshape(*by_level, 2)
    factors = None if mask is None else mask.reshape(by_level)
    row = lax.squeeze(x, (1,))
    of_level = dataclasses.replace(geometry, kernel_size=(points, 1), levels=())
    found: list[tuple[jax.Array, jax.Array, jax.Array | None, Geometry]] = []
    start = 0
    for level, (height, width) in enumerate(geometry.levels):
        image = lax.slice_in_dim(row, start, start + height * width, axis=1)
        pixels = fractions[..., level, :, :] * jnp.asarray([width, height], dtype)[None, None, None, None, None] - 0.5
        image = image.reshape(x.shape[0], height, width, x.shape[3])
        pixels = pixels.reshape(*offset.shape[:3], of_level.offset_channels)
        if factors is not None:
            mask = factors[..., level, :].reshape(*offset.shape[:3], of_level.mask_channels)
        found.append((image, pixels, mask, of_level))
        start += height * width
    return found


def deform_conv2d_backward(
    grad_y: jax.Array,  # (N, H_out, W_out, C_out)
    x: jax.Array,
    offset: jax.Array,
    mask: jax.Array | None,
    weight: jax.Array | None,
    *,
    geometry: Geometry,
    precision: lax.PrecisionLike = None,
) -> dict[str, jax.Array]:
    """The gradients of `deform_conv2d` by the names of its operands, of their dtypes."""

    def forward(x, offset, mask, weight):
        return deform_conv2d(x, offset, mask, weight, None, geometry=geometry, precision=precision)

    _, vjp = jax.vjp(forward, x, offset, mask, weight)
    grad_bias = grad_y.sum((0, 1, 2), dtype=accumulation_dtype(x.dtype)).astype(x.dtype)
    return dict(zip(("x", "offset", "mask", "weight"), vjp(grad_y), strict=True), bias=grad_bias)
