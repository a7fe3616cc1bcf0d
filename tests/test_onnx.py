"""Export to ONNX: one node for each call, and in ONNX Runtime the numbers of the definition."""

import collections
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import cases
from support.cases import AWKWARD, Case, by_definition
from support.formats import in_format, to_nchw
from support.models_golden import GoldenModel
from support.processes import run_python
from support.tolerances import assert_close

import jax_dcn
from jax_dcn import linen, mmcv
from jax_dcn.mmcv.nn import adaptive_avg_pool2d, interpolate, max_pool2d
from jax_dcn.models import FPN, ResNet

pytest.importorskip("jax2onnx")

import onnx
import onnxruntime
from jax2onnx import to_onnx

import jax_dcn.onnx

SMALL = Case("small", padding=(1, 0), stride=(2, 1))


def exported(function, inputs, infer_shapes=lambda model: model, **options):
    """The model of a function of arrays, checked. An input is an array like it, or a shape of float32."""
    inputs = [x if isinstance(x, tuple) else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    with jax.numpy_rank_promotion("allow"):  # which jax2onnx relies on
        model = infer_shapes(to_onnx(function, inputs, **options))
    onnx.checker.check_model(model, full_check=True)
    return model


def any_size(channels, data_format="NCHW"):
    """The shape of images of which jax2onnx leaves everything else open."""
    return tuple({"N": "batch", "C": channels, "H": "height", "W": "width"}[axis] for axis in data_format)


def run(model, *arrays):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [graph_input.name for graph_input in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, arrays), strict=True)))


def sizes(value):
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


def nodes(model):
    return collections.Counter(node.op_type for node in model.graph.node)


def call(case, operands, data_format="NCHW", **arguments):
    """The call as a function of the arrays."""
    names = tuple(operands)

    def function(*arrays):
        return jax_dcn.deform_conv2d(
            **dict(zip(names, arrays, strict=True)), **case.arguments, data_format=data_format, **arguments
        )

    return function


# --- functions ---


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_numbers(case, data_format, dtype):
    operands = in_format(data_format, case.operands(dtype))
    model = exported(call(case, operands, data_format), operands.values(), enable_double_precision=dtype == "float64")
    (y,) = run(model, *operands.values())
    assert y.dtype == dtype
    assert_close(y if data_format == "NCHW" else to_nchw(y), cases.drawn_by_definition(case))
    images = sum(name in ("x", "offset", "mask") for name in operands)
    transposes = {} if data_format == "NCHW" else {"Transpose": images + 2}  # of the weight and the result too
    assert nodes(model) == {"DeformConv": 1, **transposes}


@pytest.mark.parametrize("dtype", cases.DTYPES_OF_16_BITS)
def test_results_of_16_bits_are_rounded_once(dtype):
    operands = SMALL.operands(dtype)
    # Images come and go as float32, for which NumPy and ONNX Runtime have the same name.
    function = call(SMALL, operands)
    model = exported(
        lambda *arrays: function(*(array.astype(dtype) for array in arrays)).astype(jnp.float32),
        SMALL.operands("float32").values(),
    )
    (y,) = run(model, *(operand.astype(np.float32) for operand in operands.values()))
    assert_close(y, by_definition(SMALL, operands), dtype)
    assert (y == y.astype(jnp.dtype(dtype)).astype(np.float32)).all()
    (node,) = (node for node in model.graph.node if node.op_type == "DeformConv")
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert types[node.output[0]] == onnx.TensorProto.FLOAT


def test_offset_and_mask_wider_than_x():
    operands = SMALL.operands("float32")
    operands |= {name: operands[name].astype(np.float16) for name in ("x", "weight", "bias")}
    model = exported(call(SMALL, operands), operands.values())
    (y,) = run(model, *operands.values())
    assert y.dtype == np.float16
    assert_close(y, by_definition(SMALL, operands))
    assert nodes(model) == {"DeformConv": 1, "Cast": 4}  # of three operands and the result


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_unusable_coordinates_contribute_zero(dtype):
    operands, _ = cases.unusable_coordinates(dtype)
    operands = {name: operand.astype(dtype) for name, operand in operands.items()}
    model = exported(call(cases.UNUSABLE, operands), operands.values(), enable_double_precision=dtype == "float64")
    assert_close(run(model, *operands.values())[0], by_definition(cases.UNUSABLE, operands))


def test_constants_and_any_size():
    constants = {name: operand for name, operand in SMALL.operands("float32").items() if name in ("weight", "bias")}

    def function(x, offset, mask):
        return jax_dcn.modulated_deform_conv2d(x, offset, mask, **constants, padding=1)

    model = exported(function, map(any_size, (4, 18, 9)))
    assert nodes(model) == {"DeformConv": 1}
    assert sizes(model.graph.output[0]) == ["batch", 3, "height", "width"]
    for batch, size in ((2, (6, 5)), (1, (3, 8))):
        case = Case("any_size", batch=batch, size=size)
        operands = case.operands("float32") | constants
        assert_close(run(model, *(operands[name] for name in cases.PER_IMAGE))[0], by_definition(case, operands))


def test_named_padding():
    operands = SMALL.operands("float32")
    x, weight = operands["x"], operands["weight"]
    offset = np.zeros((2, 18, 3, 3), np.float32)
    function = functools.partial(jax_dcn.deform_conv2d, stride=2, padding="SAME")  # none on top, 1 on the left
    model = exported(function, [x, offset, weight])
    expected = jax.lax.conv_general_dilated(x, weight, (2, 2), "SAME", precision="highest")
    assert_close(run(model, x, offset, weight)[0], expected)


def test_leading_axes_of_a_layer():
    layer = nnx_layer("ModulatedDeformConv2dPack", "NCHW")
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 9, 8)).astype(np.float32)
    model = exported(layer, [x])
    assert nodes(model)["DeformConv"] == 1
    assert_close(run(model, x)[0], layer(x))


def test_lowest_opset():
    operands = SMALL.operands("float32")
    function = call(SMALL, operands)
    model = exported(function, operands.values(), opset=19)
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [19]
    assert_close(run(model, *operands.values())[0], by_definition(SMALL, operands))
    with pytest.raises(ValueError, match="deform_conv2d: ONNX has DeformConv from opset 19 on, got opset=18"):
        exported(function, operands.values(), opset=18)


def test_vmap():
    operands = SMALL.operands("float32")
    function = call(SMALL, operands)
    outer = {"x": 0, "weight": 0, "bias": 0}
    mapped = jax.vmap(jax.vmap(function, (0, None, None, None, None)), [outer.get(name) for name in operands])
    arrays = [
        np.stack([SMALL.operands("float32", seed)[name] for seed in range(2)]) if name in outer else operand
        for name, operand in operands.items()
    ]
    arrays[0] = np.stack([arrays[0], arrays[0] + 1], 1)
    model = exported(mapped, arrays)
    assert nodes(model)["DeformConv"] == 1
    assert_close(run(model, *arrays)[0], mapped(*arrays))


def test_the_implementation_does_not_matter(implementation):
    operands = SMALL.operands("float32")
    for arguments in ({}, {"forward_mode": True}):
        model = exported(call(SMALL, operands, **arguments), operands.values())
        assert nodes(model) == {"DeformConv": 1}
        assert_close(run(model, *operands.values())[0], by_definition(SMALL, operands))


def test_derivatives_are_refused():
    operands = SMALL.operands("float32")

    def backward(*arrays):
        return jax.grad(lambda *arrays: call(SMALL, operands)(*arrays).sum())(*arrays)

    def tangent(x, *others):
        return jax.jvp(lambda x: call(SMALL, operands, forward_mode=True)(x, *others), [x], [x])

    for derivative in (backward, tangent):
        with pytest.raises(NotImplementedError, match="deform_conv2d: ONNX has no derivative of DeformConv"):
            exported(derivative, operands.values())


# --- layers ---


def random_parameters(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), tree)


def nnx_layer(name, data_format):
    layer = getattr(jax_dcn.nnx, name)(4, 6, 3, padding=1, deform_groups=2, data_format=data_format, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(layer)
    return nnx.merge(graph, random_parameters(parameters))


def linen_layer(name, data_format):
    layer = getattr(linen, name)(4, 6, 3, padding=1, deform_groups=2, data_format=data_format)
    x = jnp.zeros((1, 4, 5, 5) if data_format == "NCHW" else (1, 5, 5, 4), jnp.float32)
    parameters = random_parameters(jax.eval_shape(layer.init, jax.random.key(0), x))
    return lambda x: layer.apply(parameters, x)


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
@pytest.mark.parametrize("flax", [nnx_layer, linen_layer])
def test_layers(flax, name, data_format):
    layer = flax(name, data_format)
    model = exported(layer, [any_size(4, data_format)])
    assert nodes(model)["DeformConv"] == nodes(model)["Conv"] == 1
    rng = np.random.default_rng(1)
    for shape in ((2, 4, 9, 8), (1, 4, 5, 6)):
        x = in_format(data_format, {"x": rng.normal(size=shape).astype(np.float32)})["x"]
        assert_close(run(model, x)[0], layer(x))


def test_a_pack_without_padding():
    layer = jax_dcn.nnx.DeformConv2dPack(4, 6, 3, rngs=nnx.Rngs(0))
    model = exported(layer, [any_size(4)])
    x = np.random.default_rng(1).normal(size=(2, 4, 9, 8)).astype(np.float32)
    assert_close(run(model, x)[0], layer(x))


@pytest.mark.parametrize("options", [{}, dict(offset_scale=0.5, remove_center=True, stride=2)], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dcnv3(options, dtype):
    """Its samples are summed without a weight, for which DeformConv takes ones."""
    rng = np.random.default_rng(0)
    height, width = (4, 3) if options else (7, 6)
    taps = 8 if options else 9
    sizes = (2, 7, 6, 4), (2, height, width, 2 * taps * 2), (2, height, width, 2 * taps)
    arrays = [rng.normal(size=size).astype(dtype) for size in sizes]
    function = functools.partial(jax_dcn.dcnv3, padding=1, groups=2, **options)
    model = exported(function, arrays, enable_double_precision=dtype == np.float64)
    assert nodes(model)["DeformConv"] == 1
    assert_close(run(model, *arrays)[0], function(*arrays))


@pytest.mark.parametrize("name", ["DCNv3", "DCNv4"])
@pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning")
def test_layers_without_a_weight(name):
    graph, parameters = nnx.split(getattr(jax_dcn.nnx, name)(8, group=2, dw_kernel_size=3, rngs=nnx.Rngs(0)))
    layer = nnx.merge(graph, random_parameters(parameters))
    x = np.random.default_rng(1).normal(size=(2, 9, 7, 8)).astype(np.float32)
    model = exported(layer, [x])
    assert nodes(model)["DeformConv"] == 1
    assert_close(run(model, x)[0], layer(x))


def test_attention_is_refused():
    shapes = (1, 6, 2, 4), (1, 5, 2, 1, 3, 2), (1, 5, 2, 1, 3)
    value, locations, weights = (np.ones(shape, np.float32) for shape in shapes)

    def function(value, locations, weights):
        return jax_dcn.multi_scale_deformable_attention(value, [(2, 3)], locations, weights)

    with pytest.raises(NotImplementedError, match="multi_scale_deformable_attention: ONNX's DeformConv"):
        exported(function, (value, locations, weights))


# --- models ---


def relative_errors(actual, expected):
    """Of each array, relative to its largest value."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        yield np.abs(a - e).max() / np.abs(e).max()


# jax2onnx's own, for a BatchNorm.
@pytest.mark.filterwarnings("ignore:'.value' access is now deprecated:DeprecationWarning")
@pytest.mark.parametrize(("name", "data_format"), [("resnet50-v1", "NHWC"), ("resnet50-caffe-group4", "NCHW")])
def test_resnet(name, data_format):
    golden = GoldenModel(name)
    x = in_format(data_format, {"x": golden.inputs[0]})["x"]
    abstract = nnx.eval_shape(lambda: ResNet(**golden.config, data_format=data_format, rngs=nnx.Rngs(0)))
    resnet = mmcv.load_into(abstract, golden.state_dict)
    resnet.eval()
    pixels = tuple(map(data_format.index, "HW"))

    def with_pooled(x):
        maps = resnet(x)
        return *maps, maps[-1].mean(pixels)

    model = exported(with_pooled, [any_size(3, data_format)], jax_dcn.onnx.infer_shapes)
    assert nodes(model)["DeformConv"] == 13
    *maps, pooled = run(model, x)
    for output, y in zip(model.graph.output[:-1], maps, strict=True):
        known = [size if isinstance(size, int) else None for size in sizes(output)]
        assert known == [size if axis == "C" else None for axis, size in zip(data_format, y.shape, strict=True)]
    maps = maps if data_format == "NCHW" else map(to_nchw, maps)
    expected = (*golden.outputs, golden.outputs[-1].mean((2, 3)))
    assert max(relative_errors((*maps, pooled), expected)) < 1e-5


def test_fpn():
    golden = GoldenModel("fpn-on_output")
    fpn = mmcv.load_into(FPN(**golden.config, rngs=nnx.Rngs(0)), golden.state_dict)
    model = exported(lambda *maps: fpn(maps), golden.inputs)
    assert max(relative_errors(run(model, *golden.inputs), golden.outputs)) < 1e-5


@pytest.mark.parametrize(
    "function",
    [
        lambda x: interpolate(x, (13, 20)),
        lambda x: interpolate(x, scale_factor=2),
        lambda x: interpolate(x, (13, 20), mode="bilinear", align_corners=True),
        lambda x: max_pool2d(x, 3, 2, 1),
        lambda x: adaptive_avg_pool2d(x, (3, 4)),
    ],
)
def test_functions_of_images(function):
    x = np.random.default_rng(0).normal(size=(1, 7, 9, 4)).astype(np.float32)
    assert_close(run(exported(function, [x]), x)[0], function(x))


# --- the module ---


def test_importing_it_again_is_harmless():
    importlib.reload(jax_dcn.onnx)
    operands = SMALL.operands("float32")
    assert nodes(exported(call(SMALL, operands), operands.values())) == {"DeformConv": 1}


def test_without_jax2onnx():
    run_python("""
import sys
sys.modules["jax2onnx"] = None
import jax_dcn
try:
    jax_dcn.onnx
except ImportError as error:
    assert "pip install jax_dcn[onnx]" in str(error), error
    assert isinstance(error.__cause__, ModuleNotFoundError)
else:
    raise AssertionError("jax_dcn.onnx")
""")
