"""DCNv3, DCNv4 and multi-scale deformable attention as deformable convolutions without a weight, channels last."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_dcn._operator import differentiation
from jax_dcn._operator.geometry import MAX_LEVELS, Geometry, Pair
from jax_dcn._operator.partitioning import mesh_axes
from jax_dcn._operator.reference import accumulation_dtype

# The samples are to be rounded by no product: there is none.
_PRECISION = lax.Precision.HIGHEST


def dcnv3(
    x: jax.Array,  # (N, H, W, C)
    offset: jax.Array,  # (N, H_out, W_out, deform_groups*taps*2), each (x, y)
    mask: jax.Array,  # (N, H_out, W_out, deform_groups*taps)
    *,
    taps: int,
    geometry: Geometry,
    **options: Any,
) -> jax.Array:  # (N, H_out, W_out, C)
    """DCNv3 of operands that have been checked. One tap less than the kernel has is all but the middle one."""
    offset, mask = (_whole(array, 3, groups=geometry.deform_groups) for array in (offset, mask))
    by_tap = (*mask.shape[:3], geometry.deform_groups, taps)
    return _dcnv3(x, offset.reshape(*by_tap, 2), mask.reshape(by_tap), geometry=geometry, **options)


def dcnv4(
    x: jax.Array,  # (N, H, W, C)
    offset_mask: jax.Array,  # (N, H_out, W_out, at least deform_groups*taps*3)
    *,
    taps: int,
    geometry: Geometry,
    **options: Any,
) -> jax.Array:  # (N, H_out, W_out, C)
    """DCNv4 of operands that have been checked: DCNv3 of each group's offsets and, behind them, masks."""
    offset_mask = _whole(offset_mask, 3, groups=geometry.deform_groups)
    by_group = (*offset_mask.shape[:3], geometry.deform_groups, taps * 3)
    groups = offset_mask[..., : geometry.deform_groups * taps * 3].reshape(by_group)
    offset, mask = groups[..., : taps * 2], groups[..., taps * 2 :]
    return _dcnv3(x, offset.reshape(*by_group[:4], taps, 2), mask, geometry=geometry, **options)


def _dcnv3(
    x: jax.Array,
    offset: jax.Array,  # (N, H_out, W_out, deform_groups, taps, 2), each (x, y)
    mask: jax.Array,  # (N, H_out, W_out, deform_groups, taps)
    *,
    offset_scale: float,
    geometry: Geometry,
    **options: Any,
) -> jax.Array:
    """The offsets are scaled with the grid around the kernel's middle."""
    if offset_scale != 1:
        dtype = accumulation_dtype(x.dtype)
        places = _grid(geometry)
        if offset.shape[4] < geometry.taps:
            places = np.delete(places, geometry.taps // 2, axis=0)
        grid = jnp.asarray(places, dtype)[None, None, None, None]
        offset = (offset.astype(dtype) + grid) * jnp.asarray(offset_scale, dtype) - grid
    if offset.shape[4] < geometry.taps:
        # No image has a pixel there, so that the tap is 0 whatever its mask and the image hold.
        offset = _insert(offset, jnp.inf)
        mask = _insert(mask, 0)
    return _deform_conv2d(x, offset, mask, geometry, **options)


def _grid(geometry: Geometry) -> np.ndarray:
    """Where the taps stand, (x, y) in pixels from the kernel's middle: (K, 2)."""
    (kh, kw), (dh, dw) = geometry.kernel_size, geometry.dilation
    i, j = np.meshgrid(np.arange(kw), np.arange(kh), indexing="ij")
    return np.stack([i * dw - dw * (kw - 1) // 2, j * dh - dh * (kh - 1) // 2], -1).reshape(kh * kw, 2)


def _insert(array: jax.Array, value: float) -> jax.Array:
    """The array with a tap of this value in the middle."""
    before, after = jnp.split(array, 2, 4)
    return jnp.concatenate([before, jnp.full_like(before[:, :, :, :, :1], value), after], 4)


def multi_scale_deformable_attention(
    value: jax.Array,  # (N, S, heads, D)
    sampling_locations: jax.Array,  # (N, Q, heads, levels, K, 2), each (x, y)
    attention_weights: jax.Array,  # (N, Q, heads, levels, K)
    *,
    spatial_shapes: tuple[Pair, ...],  # of the levels
    **options: Any,
) -> jax.Array:  # (N, Q, heads*D)
    """The attention of operands that have been checked, in as few calls as there may be."""
    value = _whole(value, 1, 3).reshape(*value.shape[:2], value.shape[2] * value.shape[3])
    sampling_locations, attention_weights = (_whole(a, 3, 4, 5) for a in (sampling_locations, attention_weights))
    static = all(isinstance(size, int) for level in spatial_shapes for size in level)
    together = MAX_LEVELS if static else 1
    dtype = value.dtype
    if len(spatial_shapes) > together:
        # In the type of the sums, so that the sum of the terms is rounded but once.
        value = value.astype(accumulation_dtype(dtype))
    terms = []
    start = 0
    for first in range(0, len(spatial_shapes), together):
        of_call = slice(first, first + together)
        levels = spatial_shapes[of_call]
        end = start + sum(height * width for height, width in levels)
        terms.append(
            _attention(
                lax.slice_in_dim(value, start, end, axis=1),
                sampling_locations[:, :, :, of_call],
                attention_weights[:, :, :, of_call],
                levels if static else (),
                levels[0],
                **options,
            )
        )
        start = end
    return sum(terms[1:], terms[0]).astype(dtype)


def _attention(
    value: jax.Array,  # (N, pixels, heads*D)
    locations: jax.Array,  # (N, Q, heads, levels, K, 2), each (x, y)
    weights: jax.Array,  # (N, Q, heads, levels, K)
    levels: tuple[Pair, ...],
    size: tuple[Any, Any],  # of the only level, where there are no `levels`
    **options: Any,
) -> jax.Array:  # (N, Q, heads*D)
    """A row of queries, whose taps are the points of all levels."""
    n, _, channels = value.shape
    _, _, heads, count, points = weights.shape
    if levels:
        x = value[:, None]
    else:
        x = value.reshape(n, *size, channels)
        dtype = accumulation_dtype(value.dtype)
        scale = jnp.stack([jnp.asarray(side, dtype) for side in size[::-1]])[None, None, None, None, None]
        locations = locations.astype(dtype) * scale - 0.5
    geometry = Geometry(
        (points, count),
        stride=(0, 0),
        dilation=(0, 0),
        groups=channels,
        deform_groups=heads,
        x_first=True,
        levels=levels,
    )
    return _deform_conv2d(x, locations[:, None], weights[:, None], geometry, **options)[:, 0]


def _whole(array: jax.Array, *axes: int, groups: int = 1) -> jax.Array:
    """The array, on a mesh with explicit axes whole along these of its axes unless its shards hold whole groups.

    There JAX cuts, joins and slices only axes whose parts stay where they are. Elsewhere it finds out by itself.
    """
    sharding = jax.typeof(array).sharding
    mesh = sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return array
    parts = [math.prod(mesh.shape[name] for name in mesh_axes(entry)) for entry in sharding.spec]
    spec = [None if axis in axes and groups % parts[axis] else entry for axis, entry in enumerate(sharding.spec)]
    if spec == list(sharding.spec):
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*spec)))


def _deform_conv2d(
    x: jax.Array,
    offset: jax.Array,  # (N, H_out, W_out, ...), each (x, y)
    mask: jax.Array,  # (N, H_out, W_out, ...)
    geometry: Geometry,
    **options: Any,
) -> jax.Array:
    offset = offset.reshape(*offset.shape[:3], geometry.offset_channels)
    mask = mask.reshape(*mask.shape[:3], geometry.mask_channels)
    return differentiation.deform_conv2d(
        x, offset, mask, None, None, geometry=geometry, precision=_PRECISION, **options
    )
