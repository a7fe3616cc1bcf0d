"""Export to ONNX: once this is imported, the exporter jax2onnx makes one DeformConv node of each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_dcn._operator import primitives

try:
    import onnx
    import onnx_ir as ir
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive
except ModuleNotFoundError as error:
    raise ImportError("jax_dcn.onnx needs jax2onnx: pip install jax_dcn[onnx]") from error

__all__ = ["infer_shapes"]

_OPSET = 19  # the first with DeformConv
_INPUTS = ("x", "weight", "offset", "bias", "mask")  # in DeformConv's order


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an exported model whose shapes are those that follow from its nodes.

    Where jax2onnx removes the transposes around a BatchNorm, what comes after keeps the shapes of the other layout, and
    so do the model's results. ONNX Runtime then warns ("Error merging shape info") or refuses the model ("Incompatible
    dimensions").
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True, data_prop=True)


class _DeformConv2d(PrimitiveLeafPlugin):
    def lower(self, ctx: Any, eqn: Any) -> None:
        if ctx.opset < _OPSET:
            raise ValueError(f"deform_conv2d: ONNX has DeformConv from opset {_OPSET} on, got opset={ctx.opset}")

        def node(kind: str, *inputs: Any, dtype: ir.DataType, shape: Sequence[Any], **attributes: Any) -> ir.Value:
            dimensions = [size if isinstance(size, int) else str(size) for size in shape]
            output = ir.Value(name=ctx.fresh_name(kind), type=ir.TensorType(dtype), shape=ir.Shape(dimensions))
            return ctx.builder.op(kind, inputs, attributes, output=output)

        geometry = eqn.params["geometry"]
        if not geometry.has_grid:
            raise NotImplementedError(
                "multi_scale_deformable_attention: ONNX's DeformConv reads around a grid, so there is no export"
            )
        nhwc = geometry.data_format == "NHWC"
        variables = dict(zip(eqn.params["names"], eqn.invars, strict=True))
        values = {name: ctx.get_value_for_var(variable) for name, variable in variables.items()}
        # A DeformConv's operands have one type, in which it computes coordinates too, and ours are float32 at least.
        double = any(value.dtype == ir.DataType.DOUBLE for value in values.values())
        dtype, result_dtype = ir.DataType.DOUBLE if double else ir.DataType.FLOAT, values["x"].dtype
        for name, value in values.items():
            shape = variables[name].aval.shape
            if value.dtype != dtype:
                value = node("Cast", value, dtype=dtype, shape=shape, to=dtype)
            if nhwc and name != "bias":
                axes = (3, 2, 0, 1) if name == "weight" else (0, 3, 1, 2)
                value = node("Transpose", value, dtype=dtype, shape=[shape[axis] for axis in axes], perm=axes)
            values[name] = value
        if geometry.x_first:
            # Where each tap of a rows-first kernel is in the other order, then each (y, x) of its offset.
            taps = np.arange(geometry.mask_channels).reshape(-1, *geometry.kernel_size[::-1]).swapaxes(1, 2).ravel()
            for name, order in (("offset", np.stack([2 * taps + 1, 2 * taps], -1).ravel()), ("mask", taps)):
                index = ctx.builder.add_initializer_from_array(ctx.fresh_name("order"), order)
                shape = values[name].shape
                values[name] = node("Gather", values[name], index, dtype=dtype, shape=shape, axis=1)
        if "weight" not in values:  # of DCNv3, whose samples are added as they are
            ones = np.ones((geometry.groups, 1, *geometry.kernel_size), dtype.numpy())
            values["weight"] = ctx.builder.add_initializer_from_array(ctx.fresh_name("weight"), ones)

        inputs = [values.get(name) for name in _INPUTS]
        while inputs[-1] is None:
            inputs.pop()
        (out,) = eqn.outvars
        shape = out.aval.shape
        (top, bottom), (left, right) = geometry.padding
        y = node(
            "DeformConv",
            *inputs,
            dtype=dtype,
            shape=[shape[axis] for axis in (0, 3, 1, 2)] if nhwc else shape,
            kernel_shape=geometry.kernel_size,
            strides=geometry.stride,
            pads=(top, left, bottom, right),
            dilations=geometry.dilation,
            group=geometry.groups,
            offset_group=geometry.deform_groups,
        )
        if nhwc:
            y = node("Transpose", y, dtype=dtype, shape=shape, perm=(0, 2, 3, 1))
        if dtype != result_dtype:
            y = node("Cast", y, dtype=result_dtype, shape=shape, to=result_dtype)
        ctx.bind_value_for_var(out, y)


class _Derivative(PrimitiveLeafPlugin):
    def lower(self, ctx: Any, eqn: Any) -> None:
        raise NotImplementedError("deform_conv2d: ONNX has no derivative of DeformConv, so only the result is exported")


for _primitive, _plugin in (
    (primitives.deform_conv2d_p, _DeformConv2d),
    (primitives.deform_conv2d_tangent_p, _Derivative),
    (primitives.deform_conv2d_backward_p, _Derivative),
):
    register_primitive(jaxpr_primitive=_primitive.name, context="jax_dcn", component=_primitive.name)(_plugin)
