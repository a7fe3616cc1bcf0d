"""Deformable convolution and its gradients by their definition: loops in float64, NCHW, nothing shared with jax_dcn."""

import math

import numpy as np


def _samples(x, offset, mask, kernel, *, stride, padding, dilation, deform_groups):
    """Yields every sample inside the image: its indices, its factor and its four corners.

    A corner is (row, column, weight, weight's derivative by y, by x), the derivatives taken to the right.
    """
    above, before = (p[0] if isinstance(p, tuple) else p for p in padding)
    _, c_in, height, width = x.shape
    n, _, h_out, w_out = offset.shape
    kh, kw = kernel
    for image, ho, wo, group, i, j in np.ndindex(n, h_out, w_out, deform_groups, kh, kw):
        tap = (group * kh + i) * kw + j
        y_at = ho * stride[0] - above + i * dilation[0] + float(offset[image, 2 * tap, ho, wo])
        x_at = wo * stride[1] - before + j * dilation[1] + float(offset[image, 2 * tap + 1, ho, wo])
        if not (y_at > -1 and x_at > -1 and y_at < height and x_at < width):
            continue
        top, left = math.floor(y_at), math.floor(x_at)
        ly, lx = y_at - top, x_at - left
        corners = [
            (row, column, *weights)
            for row, column, *weights in (
                (top, left, (1 - ly) * (1 - lx), -(1 - lx), -(1 - ly)),
                (top, left + 1, (1 - ly) * lx, -lx, 1 - ly),
                (top + 1, left, ly * (1 - lx), 1 - lx, -ly),
                (top + 1, left + 1, ly * lx, lx, ly),
            )
            if 0 <= row < height and 0 <= column < width
        ]
        factor = 1.0 if mask is None else float(mask[image, tap, ho, wo])
        size = c_in // deform_groups
        yield image, ho, wo, i, j, tap, slice(group * size, (group + 1) * size), factor, corners


def _full_weight(weight, groups):
    """The weight with a column for every input channel, zero outside its group."""
    weight = np.asarray(weight, np.float64)
    c_out, group_in, kh, kw = weight.shape
    full = np.zeros((c_out, group_in * groups, kh, kw))
    for o in range(c_out):
        group = o // (c_out // groups)
        full[o, group * group_in : (group + 1) * group_in] = weight[o]
    return full


def deform_conv2d(x, offset, weight, mask=None, bias=None, *, groups, **sizes):
    x = np.asarray(x, np.float64)
    weight = _full_weight(weight, groups)
    n, _, h_out, w_out = offset.shape
    y = np.zeros((n, weight.shape[0], h_out, w_out))
    if bias is not None:
        y += np.asarray(bias, np.float64)[:, None, None]
    for image, ho, wo, i, j, _, channels, factor, corners in _samples(x, offset, mask, weight.shape[2:], **sizes):
        sample = sum(w * x[image, channels, row, column] for row, column, w, _, _ in corners)
        y[image, :, ho, wo] += weight[:, channels, i, j] @ (factor * sample)
    return y


def deform_conv2d_backward(grad_y, x, offset, weight, mask=None, bias=None, *, groups, **sizes):
    """The gradients of sum(grad_y * y), by the names of the operands that are not None."""
    grad_y, x = np.asarray(grad_y, np.float64), np.asarray(x, np.float64)
    weight_shape, weight = weight.shape, _full_weight(weight, groups)
    grad_x, grad_weight = np.zeros_like(x), np.zeros_like(weight)
    grad_offset = np.zeros(offset.shape)
    grad_mask = None if mask is None else np.zeros(mask.shape)
    for image, ho, wo, i, j, tap, channels, factor, corners in _samples(x, offset, mask, weight.shape[2:], **sizes):
        gradient = weight[:, channels, i, j].T @ grad_y[image, :, ho, wo]  # of the modulated sample
        sample = np.zeros(gradient.shape)
        for row, column, w, w_by_y, w_by_x in corners:
            value = x[image, channels, row, column]
            sample += w * value
            grad_x[image, channels, row, column] += factor * w * gradient
            grad_offset[image, 2 * tap, ho, wo] += factor * w_by_y * (gradient @ value)
            grad_offset[image, 2 * tap + 1, ho, wo] += factor * w_by_x * (gradient @ value)
        grad_weight[:, channels, i, j] += np.outer(grad_y[image, :, ho, wo], factor * sample)
        if mask is not None:
            grad_mask[image, tap, ho, wo] = gradient @ sample

    c_out, group_in, *_ = weight_shape
    gradients = {"x": grad_x, "offset": grad_offset, "mask": grad_mask, "weight": np.zeros(weight_shape)}
    for o in range(c_out):
        group = o // (c_out // groups)
        gradients["weight"][o] = grad_weight[o, group * group_in : (group + 1) * group_in]
    gradients["bias"] = None if bias is None else grad_y.sum((0, 2, 3))
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}
