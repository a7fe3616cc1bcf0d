"""Pictures of where deformable convolutions sample. Needs matplotlib, and only to draw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_dcn._checks import CheckedPadding, PaddingLike, check_data_format, padded, to_padding, to_pair
from jax_dcn._operator.geometry import Geometry, Pair

Setting = int | Pair | list[int | Pair]  # a list has one for every layer

_LAYERS = 3  # more would be 9**4 points with a kernel of 3


def sampling_coordinates(
    offset: Any,
    pixel: Pair | None = None,
    *,
    mask: Any = None,
    kernel_size: Setting = 3,
    stride: Setting = 1,
    padding: PaddingLike | list[Any] = 1,
    dilation: Setting = 1,
    deform_group: int = 0,
    data_format: str = "NCHW",
) -> tuple[np.ndarray, np.ndarray]:
    """Where one output pixel samples, through one to three layers on top of one another.

    Each of the last layer's taps lies at a point of the layer before, which has taps of its own, and so on down to the
    first layer's input. A point between pixels takes the offset and the mask of the nearest one, and one outside that
    of the nearest on the border. Any further layers between are left out.

    Args:
      offset: of one layer, or a list from the first layer to the last. Each is an array of one image,
        (deform_groups*kh*kw*2, H_out, W_out), or with the channels last for NHWC, perhaps with a batch axis of 1.
      pixel: (row, column) of the last layer's output (default its centre).
      mask: None or, like the offset, (deform_groups*kh*kw, H_out, W_out) for each layer.
      kernel_size, stride, dilation: an int or a pair (height, width), for all layers, or a list with one for each.
      padding: an int, a pair, a tuple of pairs ((top, bottom), (left, right)) or a name, as in `jax_dcn.deform_conv2d`,
        for all layers, or a list with one for each. What "SAME" means with a stride depends on the size of the layer's
        input, which is not known of the first layer.
      deform_group: whose taps (default 0).
      data_format: "NCHW" (default) or "NHWC".

    Returns:
      The points (kh*kw * ... over the layers, 2) as (row, column) in pixels of the first layer's input, and the weights
      of the points, the products of their masks, or ones.

    Raises:
      TypeError, ValueError: arguments of the wrong type, or that do not fit one another.
    """
    name = "sampling_coordinates"
    check_data_format(name, data_format)
    offsets = list(offset) if isinstance(offset, (list, tuple)) else [offset]
    masks = [None] * len(offsets) if mask is None else list(mask) if isinstance(mask, (list, tuple)) else [mask]
    if not 1 <= len(offsets) <= _LAYERS or len(masks) != len(offsets):
        raise ValueError(f"{name}: got {len(offsets)} offsets and {len(masks)} masks, expected 1 to {_LAYERS} of each")
    pairs = [
        _for_layers(name, setting, value, len(offsets), functools.partial(to_pair, minimum=1))
        for setting, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    ]
    geometries = [Geometry(k, s, dilation=d) for k, s, d in zip(*pairs, strict=True)]
    paddings = _for_layers(name, "padding", padding, len(offsets), lambda name, _, value: to_padding(name, value))
    displacements: list[np.ndarray] = []
    starts = []
    for layer_offset, layer_padding, geometry in zip(offsets, paddings, geometries, strict=True):
        starts.append(_start(name, layer_padding, displacements[-1].shape[:2] if displacements else None, geometry))
        image = _image(name, "offset", layer_offset, data_format, 2 * geometry.taps, deform_group)
        displacements.append(image.reshape(*image.shape[:2], geometry.taps, 2))
    size = np.array(displacements[-1].shape[:2])
    centre = np.array(size // 2 if pixel is None else pixel)
    if centre.shape != (2,) or (centre < 0).any() or (centre >= size).any():
        raise ValueError(f"{name}: pixel is {pixel}, expected one of the output's {size[0]} x {size[1]}")
    points, weights = centre[None].astype(np.float64), np.ones(1)
    for layer in reversed(range(len(offsets))):
        geometry, taps = geometries[layer], geometries[layer].taps
        row, column = np.clip(np.rint(points).astype(int), 0, np.array(displacements[layer].shape[:2]) - 1).T
        regular = np.stack(np.meshgrid(*map(np.arange, geometry.kernel_size), indexing="ij"), -1).reshape(taps, 2)
        regular = starts[layer] + regular * geometry.dilation
        points = (points[:, None] * geometry.stride + regular + displacements[layer][row, column]).reshape(-1, 2)
        factors = np.ones((len(row), taps))
        if masks[layer] is not None:
            factors = _image(name, "mask", masks[layer], data_format, taps, deform_group)[row, column]
        weights = (weights[:, None] * factors).reshape(-1)
    return points, weights


def sampling_points(
    image: Any,
    offset: Any,
    pixel: Pair | None = None,
    *,
    scale: float = 1,
    axes: Any = None,
    **options: Any,
) -> Any:
    """Draws over an image where one output pixel samples, as the figures of Dai et al. 2017 do.

    The taps are points, larger where the mask is larger, and the pixel itself a square.

    Args:
      image: (H, W), or (H, W, 3) or (H, W, 4) of colours, as for matplotlib's imshow.
      offset, pixel, and the options mask, kernel_size, stride, padding, dilation, deform_group, data_format: as in
        `sampling_coordinates`, whose errors apply.
      scale: pixels of the image for one of the first layer's input (default 1), such as the stride of what lies below.
      axes: matplotlib's, to draw on (default: those of a new figure, which is not shown).

    Returns:
      The axes; `axes.figure.savefig("picture.png")` saves the figure.

    Raises:
      ImportError: matplotlib is missing.
    """
    points, weights = sampling_coordinates(offset, pixel, **options)
    plain = [_like_zeros(array) for array in (offset if isinstance(offset, (list, tuple)) else [offset])]
    regular, _ = sampling_coordinates(plain, pixel, **{**options, "mask": None})
    if axes is None:
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ImportError("jax_dcn.plot draws with matplotlib: pip install jax_dcn[plot]") from error
        axes = Figure(layout="constrained").subplots()
    image = np.asarray(image)
    height, width = image.shape[:2]
    axes.imshow(image, cmap="gray")
    sizes = 36 * np.abs(weights) / max(np.abs(weights).max(), 1e-9)
    axes.scatter(*scale * points.T[::-1], s=sizes, color="#d62728", linewidths=0)
    # The pixel lies where the taps of undeformed layers centre.
    axes.scatter(*scale * regular.mean(0)[::-1], s=60, marker="s", color="#1f77b4", edgecolors="white")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    return axes


def _like_zeros(array: Any) -> np.ndarray:
    return np.zeros(np.shape(array), np.float32)


def _for_layers(name: str, setting: str, value: Any, layers: int, convert: Callable[[str, str, Any], Any]) -> list[Any]:
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers:
        raise ValueError(f"{name}: {setting} has {len(values)} entries, expected {layers}, one for each layer")
    return [convert(name, setting, v) for v in values]


def _start(name: str, padding: CheckedPadding, size: Sequence[int] | None, geometry: Geometry) -> np.ndarray:
    """Where the first tap of the first output pixel stands in the layer's input, of this size if it is known."""
    if size is None and padding in ("SAME", "SAME_LOWER") and max(geometry.stride) > 1:
        raise ValueError(
            f"{name}: padding {padding!r} with stride {geometry.stride} depends on the size of the first layer's "
            "input, which is not known: give pairs ((top, bottom), (left, right)) instead"
        )
    return -np.array(padded(name, geometry, padding, size or (1, 1)).padding)[:, 0]


def _image(name: str, argument: str, array: Any, data_format: str, channels: int, group: int) -> np.ndarray:
    """The channels of a deform group, (H_out, W_out, channels)."""
    array = np.asarray(array, np.float64)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3:
        raise ValueError(f"{name}: {argument} has shape {array.shape}, expected that of one image")
    if data_format == "NCHW":
        array = np.moveaxis(array, 0, 2)
    if array.shape[2] % channels or not 0 <= group < array.shape[2] // channels:
        raise ValueError(
            f"{name}: {argument} has {array.shape[2]} channels, expected a multiple of {channels} that has "
            f"deform_group {group}"
        )
    return array[..., group * channels : (group + 1) * channels]
