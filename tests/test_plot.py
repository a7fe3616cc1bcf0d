"""The sampling points: by hand, against the operator, and drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.formats import DATA_FORMATS, to_nhwc

import jax_dcn
from jax_dcn import plot


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_regular_grid():
    points, weights = plot.sampling_coordinates(np.zeros((18, 5, 6)), (2, 3))
    assert points.tolist() == [[y, x] for y in (1, 2, 3) for x in (2, 3, 4)]
    assert weights.tolist() == [1] * 9


@pytest.mark.parametrize(
    ("stride", "padding"),
    [((2, 1), (1, 2)), ((2, 1), ((2, 0), (1, 3))), ((2, 1), "VALID"), (1, "same"), (1, "SAME_LOWER")],
)
def test_points_are_the_operators(stride, padding):
    """The operator samples an image of row numbers, and one of column numbers, at the points."""
    rows, columns = np.meshgrid(np.arange(20.0), np.arange(30.0), indexing="ij")
    x = jnp.asarray(np.stack([rows, columns])[:, None], jnp.float32)
    options = dict(stride=stride, padding=padding, dilation=(2, 3))
    # Both deform groups see the same image.
    x = jnp.tile(x, (1, 2, 1, 1))
    weight = jnp.eye(2, dtype=jnp.float32)[:, :, None, None] * jnp.ones((1, 1, 3, 2), jnp.float32)
    layer = jax_dcn.linen.DeformConv2dPack(2, 2, (3, 2), **options, deform_groups=2)
    out = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape[2:]
    offset, mask = normal(2 * 12, *out), np.abs(normal(2 * 6, *out, seed=1))
    both = jnp.broadcast_to(offset, (2, *offset.shape))
    y = jax_dcn.deform_conv2d(
        x, both, weight, **options, deform_groups=2, mask=jnp.broadcast_to(mask, (2, *mask.shape))
    )
    for group in 0, 1:
        points, weights = plot.sampling_coordinates(
            offset, (4, 12), mask=mask, kernel_size=(3, 2), deform_group=group, **options
        )
        np.testing.assert_allclose(weights @ points, y[:, group, 4, 12], rtol=1e-5)


def test_same_padding_of_later_layers():
    """With a stride it depends on the size of the layer's input, which the offset of the layer before tells."""
    first, second = np.zeros((18, 8, 9)), np.zeros((18, 4, 5))
    points, _ = plot.sampling_coordinates([first, second], (0, 0), stride=[1, 2], padding="SAME")
    assert (points.min(0).tolist(), points.max(0).tolist()) == ([-1, -2], [3, 2])  # 8 rows need no padding on top
    with pytest.raises(ValueError, match=r"padding 'SAME' with stride \(2, 2\) depends on the size of the first"):
        plot.sampling_coordinates([first, second], stride=2, padding="SAME")


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_layers_are_composed(data_format):
    first, second = np.zeros((1, 18, 9, 9)), np.zeros((1, 18, 5, 5))
    second[0, 0::2, 2, 2], first[0, 1::2] = 1.3, 0.5  # a row and a bit down, then half a pixel to the right
    masks = [np.full((1, 9, 9, 9), 0.5), np.full((1, 9, 5, 5), 0.25)]
    if data_format == "NHWC":
        first, second = to_nhwc(first), to_nhwc(second)
        masks = [to_nhwc(mask) for mask in masks]
    points, weights = plot.sampling_coordinates(
        [first, second], (2, 2), mask=masks, stride=[1, 2], data_format=data_format
    )
    assert points.shape == (81, 2)
    np.testing.assert_allclose(points.mean(0), [4 + 1.3, 4 + 0.5])
    np.testing.assert_allclose(np.ptp(points, 0), [4, 4])
    assert weights.tolist() == [0.125] * 81


def test_three_layers_and_no_more():
    offset = np.zeros((18, 7, 7))
    assert plot.sampling_coordinates([offset] * 3)[0].shape == (729, 2)
    with pytest.raises(ValueError, match="got 4 offsets and 4 masks, expected 1 to 3"):
        plot.sampling_coordinates([offset] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pixel=(7, 0)), r"pixel is \(7, 0\), expected one of the output's 7 x 7"),
        (dict(kernel_size=5), "offset has 18 channels, expected a multiple of 50 that has deform_group 0"),
        (dict(deform_group=1), "offset has 18 channels, expected a multiple of 18 that has deform_group 1"),
        (dict(stride=[1, 1]), "stride has 2 entries, expected 1"),
        (dict(mask=np.zeros((2, 9, 7, 7))), r"mask has shape \(2, 9, 7, 7\), expected that of one image"),
        (dict(data_format="CHW"), "data_format must be one of"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=f"^sampling_coordinates: {message}"):
        plot.sampling_coordinates(np.zeros((18, 7, 7)), **options)


def test_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    axes = plot.sampling_points(normal(14, 14), normal(18, 7, 7), (3, 4), mask=np.abs(normal(9, 7, 7)), scale=2)
    taps, pixel = axes.collections
    points, _ = plot.sampling_coordinates(normal(18, 7, 7), (3, 4))
    np.testing.assert_allclose(taps.get_offsets(), 2 * points[:, ::-1])
    np.testing.assert_allclose(pixel.get_offsets(), [[8, 6]])
    axes.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert plot.sampling_points(normal(14, 14, 3), normal(18, 7, 7), axes=axes) is axes
