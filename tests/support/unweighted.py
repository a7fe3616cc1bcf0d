"""DCNv3 and the attention by their definition, in loops in float64, with nothing of jax_dcn: results and gradients."""

import math

import numpy as np


def _corners(y, x, height, width):
    """(row, column, weight, its derivative by y, by x to the right) of the corners in the image of a valid sample."""
    if not (y > -1 and x > -1 and y < height and x < width):
        return []
    top, left = math.floor(y), math.floor(x)
    ly, lx = y - top, x - left
    corners = (
        (top, left, (1 - ly) * (1 - lx), lx - 1, ly - 1),
        (top, left + 1, (1 - ly) * lx, -lx, 1 - ly),
        (top + 1, left, ly * (1 - lx), 1 - lx, -ly),
        (top + 1, left + 1, ly * lx, lx, ly),
    )
    return [corner for corner in corners if 0 <= corner[0] < height and 0 <= corner[1] < width]


def _sums(x, locations, factors, cotangent):
    """Of images (N, H, W, C), locations (N, P, G, K, 2) as (x, y) and factors (N, P, G, K): (N, P, C), gradients."""
    n, height, width, channels = x.shape
    groups = factors.shape[2]
    y = np.zeros((n, factors.shape[1], channels))
    grads = np.zeros_like(x), np.zeros_like(locations), np.zeros_like(factors)
    for image, p, g, k in np.ndindex(factors.shape):
        own = slice(g * (channels // groups), (g + 1) * (channels // groups))
        factor, sample = factors[image, p, g, k], 0
        ct = cotangent[image, p, own]
        at_x, at_y = locations[image, p, g, k]
        for row, column, weight, by_y, by_x in _corners(at_y, at_x, height, width):
            value = x[image, row, column, own]
            sample = sample + weight * value
            grads[0][image, row, column, own] += factor * weight * ct
            grads[1][image, p, g, k] += factor * (ct @ value) * np.array([by_x, by_y])
        if np.ndim(sample):
            y[image, p, own] += factor * sample
            grads[2][image, p, g, k] = ct @ sample
    return y, grads


def dcnv3(x, offset, mask, cotangent, *, kernel_size, stride, padding, dilation, groups, offset_scale, remove_center):
    """The result, and the gradients of x, offset and mask. Sizes are pairs, padding ((top, bottom), (left, right))."""
    x, offset, mask, cotangent = (np.asarray(array, np.float64) for array in (x, offset, mask, cotangent))
    n, h_out, w_out, _ = offset.shape
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    half_h, half_w = dh * (kh - 1) // 2, dw * (kw - 1) // 2
    taps = [(i, j) for i in range(kw) for j in range(kh)]
    if remove_center:
        taps.remove((kw // 2, kh // 2))
    delta = offset.reshape(n, h_out, w_out, groups, len(taps), 2)
    locations = np.empty_like(delta)
    for ho, wo, k in np.ndindex(h_out, w_out, len(taps)):
        i, j = taps[k]
        dx, dy = np.moveaxis(delta[:, ho, wo, :, k], -1, 0)
        locations[:, ho, wo, :, k, 0] = half_w - padding[1][0] + wo * sw + offset_scale * (i * dw - half_w + dx)
        locations[:, ho, wo, :, k, 1] = half_h - padding[0][0] + ho * sh + offset_scale * (j * dh - half_h + dy)
    flat = (n, h_out * w_out)
    y, (grad_x, grad_locations, grad_mask) = _sums(
        x,
        locations.reshape(*flat, groups, len(taps), 2),
        mask.reshape(*flat, groups, len(taps)),
        cotangent.reshape(*flat, x.shape[3]),
    )
    return y.reshape(cotangent.shape), (
        grad_x,
        (offset_scale * grad_locations).reshape(offset.shape),
        grad_mask.reshape(mask.shape),
    )


def attention(value, shapes, locations, weights, cotangent):
    """The result, and the gradients of value, locations and weights."""
    value, locations, weights, cotangent = (
        np.asarray(array, np.float64) for array in (value, locations, weights, cotangent)
    )
    n, _, heads, depth = value.shape
    y, grads = np.zeros_like(cotangent), [np.zeros_like(array) for array in (value, locations, weights)]
    start = 0
    for level, (height, width) in enumerate(shapes):
        of_level = slice(start, start := start + height * width)
        image = value[:, of_level].reshape(n, height, width, heads * depth)
        size = np.array([width, height])
        term, (grad_image, grad_pixels, grad_weights) = _sums(
            image, locations[:, :, :, level] * size - 0.5, weights[:, :, :, level], cotangent
        )
        y += term
        grads[0][:, of_level] = grad_image.reshape(n, height * width, heads, depth)
        grads[1][:, :, :, level] = grad_pixels * size
        grads[2][:, :, :, level] = grad_weights
    return y, tuple(grads)
