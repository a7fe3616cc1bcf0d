"""What CenterNet is trained with, as mmdet has it: targets and losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_dcn._checks import check_array, check_data_format, to_array, to_count, to_pair

# mmdet's: the least overlap with the object, as intersection over union, of a box whose corners are off by the radius.
_OVERLAP = 0.3


_Maps = tuple[jax.Array, jax.Array]


class CenterNetTargets(NamedTuple):
    """What `CenterNet` should return, in its data format, here NCHW.

    heatmap: (N, num_classes, H, W), 1 at the centres of objects, and a Gaussian around each;
    wh: (N, 2, H, W), at the centres width and height, else 0;
    offset: (N, 2, H, W), at the centres (x, y) from the pixel to the centre, else 0;
    weight: (N, 1, H, W), 1 at the centres, else 0.
    """

    heatmap: jax.Array
    wh: jax.Array
    offset: jax.Array
    weight: jax.Array


def centernet_targets(
    boxes: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    size: Sequence[int],
    image_size: Sequence[int],
    data_format: str = "NCHW",
) -> CenterNetTargets:
    """The targets of `CenterNet` (Zhou et al. 2019, https://arxiv.org/abs/1904.07850), for `centernet_loss`.

    An object belongs to the pixel of the map in which its centre lies. Where two have the same, the later one gives
    width, height and offset.

    Args:
      boxes: (N, objects, 4), (x1, y1, x2, y2) in pixels of the image.
      labels: (N, objects), integers, the class from 0. Any other number, -1 say, is no object, and neither is one whose
        centre is outside the image: so images can have different numbers of them in arrays of one shape.
      num_classes: number of classes.
      size: (H, W) of the maps.
      image_size: (height, width) of the images.
      data_format: "NCHW" (default) or "NHWC".

    Returns:
      The targets, of boxes' dtype, but float32 at least.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """
    name = "centernet_targets"
    check_data_format(name, data_format)
    check_array(name, "boxes", boxes)
    check_array(name, "labels", labels)
    if boxes.ndim != 3 or boxes.shape[2] != 4 or labels.shape != boxes.shape[:2]:
        raise ValueError(
            f"{name}: boxes and labels have shapes {boxes.shape} and {labels.shape}, expected (N, objects, 4) and "
            "(N, objects)"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name}: labels have dtype {labels.dtype}, expected integers")
    classes = to_count(name, "num_classes", num_classes)
    height, width = to_pair(name, "size", size, 1)
    image_height, image_width = to_pair(name, "image_size", image_size, 1)
    boxes, labels = jnp.asarray(boxes), jnp.asarray(labels)
    dtype = jnp.promote_types(boxes.dtype, jnp.float32)
    if labels.dtype.itemsize < 8:
        labels = labels.astype(jnp.int32)  # which num_classes, for no object, must fit into
    scale = jnp.array([[width / image_width, height / image_height]], dtype)
    rows, columns = jnp.arange(height).reshape(-1, 1), jnp.arange(width).reshape(1, -1)

    def add(maps: _Maps, thing: tuple[jax.Array, ...]) -> tuple[_Maps, None]:
        heatmap, values = maps
        (column, row), radius, label, own = thing
        dy, dx = rows - row, columns - column
        sigma = (2 * radius + 1) / 6
        gaussian = jnp.exp(-(dy**2 + dx**2) / (2 * sigma**2))
        near = (jnp.abs(dy) <= radius) & (jnp.abs(dx) <= radius)
        heatmap = heatmap.at[label].max(jnp.where(near, gaussian, 0), mode="drop")
        here = (dy == 0) & (dx == 0) & (label < classes)
        return (heatmap, jnp.where(here[None], own.reshape(-1, 1, 1), values)), None

    def of_image(boxes: jax.Array, labels: jax.Array) -> _Maps:
        first, last = boxes[:, :2], boxes[:, 2:]
        centre, wh = (first + last) * scale / 2, (last - first) * scale
        pixel = jnp.floor(centre)
        radius = jnp.maximum(jnp.floor(_radius(wh[:, 1], wh[:, 0])), 0)
        there = (labels >= 0) & ((pixel >= 0) & (pixel < jnp.array([[width, height]]))).all(1)
        own = jnp.concatenate([wh, centre - pixel, jnp.ones_like(wh[:, :1])], 1)
        maps = (jnp.zeros((classes, height, width), dtype), jnp.zeros((5, height, width), dtype))
        things = (pixel.astype(jnp.int32), radius, jnp.where(there, labels, classes), own)
        return lax.scan(add, maps, things)[0]

    heatmap, values = jax.vmap(of_image)(boxes.astype(dtype), labels)
    if data_format == "NHWC":
        heatmap, values = jnp.moveaxis(heatmap, 1, 3), jnp.moveaxis(values, 1, 3)
    return CenterNetTargets(heatmap, *jnp.split(values, [2, 4], axis=data_format.index("C")))


def _radius(height: jax.Array, width: jax.Array) -> jax.Array:
    """How far both corners of a box may be off, along both axes, for `_OVERLAP` with the right one, of this size.

    Law and Deng 2018 (https://arxiv.org/abs/1808.01244), with mmdet's corrections: the least of the radii for a box
    that is as large, one that is smaller, and one that is larger.
    """

    def root(a: float, b: jax.Array, c: jax.Array) -> jax.Array:  # the lower r with a * r**2 - b * r + c = 0
        return (b - jnp.sqrt(b**2 - 4 * a * c)) / (2 * a)

    total, area = height + width, height * width
    as_large = root(1, total, area * (1 - _OVERLAP) / (1 + _OVERLAP))
    smaller = root(4, 2 * total, area * (1 - _OVERLAP))
    larger = -root(4 * _OVERLAP, 2 * _OVERLAP * total, area * (_OVERLAP - 1))
    return jnp.minimum(jnp.minimum(as_large, smaller), larger)


def gaussian_focal_loss(heatmap: jax.Array, target: jax.Array) -> jax.Array:
    """The loss of every pixel of a heatmap (Law and Deng 2018, https://arxiv.org/abs/1808.01244), as mmdet has it.

    Args:
      heatmap: probabilities, such as `CenterNet` returns.
      target: of the same shape, from 0 to 1, where 1 is an object; the nearer to 1, the less an error counts.

    Returns:
      An array of the same shape, float32 at least.

    Raises:
      TypeError, ValueError: arguments of another dtype than the operators', or of different shapes.
    """
    name = "gaussian_focal_loss"
    heatmap, target = _with_target(name, "heatmap", heatmap, to_array(name, "target", target))
    # mmdet adds 1e-12. XLA may add it to the 1 first, where it is lost, and the logarithm of a sure error is infinite.
    there = -jnp.log(jnp.maximum(heatmap, 1e-12)) * (1 - heatmap) ** 2
    elsewhere = -jnp.log(jnp.maximum(1 - heatmap, 1e-12)) * heatmap**2 * (1 - target) ** 4
    return jnp.where(target == 1, there, elsewhere)


def _with_target(name: str, argument: str, value: Any, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A prediction and its target, float32 at least."""
    value = to_array(name, argument, value)
    if value.shape != target.shape:
        raise ValueError(f"{name}: {argument} has shape {value.shape}, expected its target's, {target.shape}")
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    return value.astype(dtype), target.astype(dtype)


def centernet_loss(
    outputs: tuple[jax.Array, jax.Array, jax.Array],
    targets: CenterNetTargets,
    *,
    heatmap_weight: float = 1.0,
    wh_weight: float = 0.1,
    offset_weight: float = 1.0,
) -> dict[str, jax.Array]:
    """The losses of `CenterNet` (Zhou et al. 2019, https://arxiv.org/abs/1904.07850), as mmdet has them.

    All are sums over the batch divided by the number of objects, under `jit` those of all devices.

    Args:
      outputs: what the model returns.
      targets: of `centernet_targets`, in the same data format.
      heatmap_weight, wh_weight, offset_weight: mmdet's loss_weight of each (defaults 1, 0.1 and 1).

    Returns:
      loss_center_heatmap, by `gaussian_focal_loss`, and loss_wh and loss_offset, the mean absolute errors at the
      centres: scalars, float32 at least, to be added up.

    Raises:
      TypeError, ValueError: outputs of another dtype than the operators', or that do not have the targets' shapes.
    """
    name = "centernet_loss"
    if len(outputs) != 3:
        raise ValueError(f"{name}: got {len(outputs)} outputs, expected 3, heatmap, wh and offset")
    heatmap, wh, offset = outputs
    objects = jnp.maximum((targets.heatmap == 1).sum(), 1)

    def error(argument: str, value: jax.Array, target: jax.Array) -> jax.Array:
        value, target = _with_target(name, argument, value, target)
        return (jnp.abs(value - target) * targets.weight).sum() / (2 * objects)

    return {
        "loss_center_heatmap": heatmap_weight * gaussian_focal_loss(heatmap, targets.heatmap).sum() / objects,
        "loss_wh": wh_weight * error("wh", wh, targets.wh),
        "loss_offset": offset_weight * error("offset", offset, targets.offset),
    }
