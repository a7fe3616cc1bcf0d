"""What the CUDA lowering hands to its handler, and what the handler reads: checked where there is no GPU, too."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.cases import DTYPES_OF_16_BITS, OPERANDS, PER_IMAGE, TORCHVISION, Case, deform_conv2d, forward
from support.formats import in_format
from support.processes import run_python
from support.programs import Thunks
from support.tolerances import assert_close

import jax_dcn
from jax_dcn._operator import lowering, native
from jax_dcn._operator.geometry import Geometry
from jax_dcn._operator.operands import GRADIENTS

CASE = Case("small", c_in=8, c_out=4, size=(5, 6), groups=2, deform_groups=2)
TARGETS = (native.DEFORM_CONV2D, native.DEFORM_CONV2D_BACKWARD)

pytestmark = pytest.mark.usefixtures("cuda_kernels", "jax_defaults")


@pytest.fixture
def jax_defaults():
    """Without the precision that conftest.py asks for."""
    with jax.default_matmul_precision(None):
        yield


def operands(case=CASE, dtype="float32"):
    return {name: jnp.asarray(value) for name, value in case.operands(dtype).items()}


def lowered(function, *arguments):
    """The program for CUDA as text."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """Of every custom call, the target, the attributes and the types of operands and results."""
    pattern = r"custom_call @(\w+)\(.*?mhlo\.backend_config = \{(.*?)\}, .*?: \((.*?)\) -> (.*)"
    found = re.findall(pattern, text)
    assert len(found) == text.count("custom_call @jax_dcn")
    split = re.compile(r"(\w+) = ((?:dense<.*?> : \S+|array<.*?>|[^,]+))(?:, |$)")
    return [
        (
            target,
            dict(split.findall(attributes)),
            re.findall(r"tensor<(\S+?)>", given),
            re.findall(r"tensor<(\S+?)>", results),
        )
        for target, attributes, given, results in found
    ]


def sole_call(text):
    (call,) = calls(text)
    return call


def gradients(function, wanted):
    return lambda operands: jax.grad(lambda chosen: function({**operands, **chosen}).sum().astype(jnp.float32))(
        {name: operands[name] for name in wanted}
    )


# --- the call ---


def test_forward(data_format):
    target, attributes, given, results = sole_call(lowered(deform_conv2d(CASE, data_format), operands()))
    assert target == "jax_dcn_deform_conv2d"
    assert given == ["2x5x6x8xf32", "2x5x6x36xf32", "3x3x4x4xf32", "2x5x6x18xf32", "4xf32"]
    y, workspace = results
    assert y == "2x5x6x4xf32"
    assert re.fullmatch(r"\d+x16xui8", workspace)
    assert attributes == {
        "kernel": "dense<3> : tensor<2xi64>",
        "stride": "dense<1> : tensor<2xi64>",
        "padding": "dense<1> : tensor<2xi64>",
        "dilation": "dense<1> : tensor<2xi64>",
        "levels": "dense<> : tensor<0xi64>",
        "groups": "2 : i64",
        "deform_groups": "2 : i64",
        "nchw": "false",
        "x_first": "false",
        "has_weight": "true",
        "has_mask": "true",
        "highest_precision": "false",
        "deterministic": "false",
    }


def test_backward(data_format):
    function = gradients(deform_conv2d(CASE, data_format), OPERANDS)
    target, attributes, given, results = sole_call(lowered(function, operands()))
    assert target == "jax_dcn_deform_conv2d_backward"
    assert given == ["2x5x6x4xf32", "2x5x6x8xf32", "2x5x6x36xf32", "3x3x4x4xf32", "2x5x6x18xf32"]
    *gradient_types, workspace = results
    assert gradient_types == ["2x5x6x8xf32", "2x5x6x36xf32", "2x5x6x18xf32", "3x3x4x4xf32", "4xf32"]
    assert re.fullmatch(r"\d+x16xui8", workspace)
    assert all(attributes[f"grad_{name}"] == "true" for name in GRADIENTS)


def test_sums_are_wider_than_16_bits_and_gradients_not_wanted_are_left_out():
    arguments = operands(dtype="bfloat16") | {"offset": operands(dtype="float32")["offset"]}
    function = gradients(deform_conv2d(CASE), PER_IMAGE)
    _, attributes, _, results = sole_call(lowered(function, arguments))
    assert results[:-1] == ["2x5x6x8xf32", "2x5x6x36xf32", "2x5x6x18xbf16"]
    assert [attributes[f"grad_{name}"] for name in GRADIENTS] == ["true", "true", "true", "false", "false"]


def test_nhwc_is_not_transposed():
    nhwc = in_format("NHWC", operands())
    text = lowered(lambda o: jax_dcn.deform_conv2d(**o, **CASE.arguments, data_format="NHWC"), nhwc)
    assert "stablehlo.transpose" not in text
    assert len(calls(text)) == 1


def test_plain_xla_on_request(monkeypatch):
    monkeypatch.setenv("JAX_DCN_IMPLEMENTATION", "xla")
    assert calls(lowered(deform_conv2d(CASE), operands())) == []


# --- options ---


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (None, "false"),
        ("default", "false"),
        (lax.Precision.HIGH, "false"),
        ("tensorfloat32", "false"),
        ("TF32_TF32_F32", "false"),
        ("highest", "true"),
        (lax.Precision.HIGHEST, "true"),
        (("default", "highest"), "true"),
        ("float32", "true"),
        ("F32_F32_F32", "true"),
        ("TF32_TF32_F32_X3", "true"),
    ],
    ids=str,
)
def test_precision(precision, expected):
    def attribute(**arguments):
        return sole_call(lowered(deform_conv2d(CASE, **arguments), operands()))[1]["highest_precision"]

    assert attribute(precision=precision) == expected
    if precision is None or isinstance(precision, str):
        with jax.default_matmul_precision(precision):
            assert attribute() == expected
            assert attribute(precision="highest") == "true"


@pytest.mark.parametrize("dtype", ["float64", *DTYPES_OF_16_BITS])
def test_precision_is_float32s(dtype):
    _, attributes, _, _ = sole_call(lowered(deform_conv2d(CASE, precision="highest"), operands(dtype=dtype)))
    assert attributes["highest_precision"] == "false"


def test_the_gradient_keeps_the_precision():
    function = gradients(deform_conv2d(CASE, precision="highest"), ("x",))
    assert sole_call(lowered(function, operands()))[1]["highest_precision"] == "true"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", "false"),
        ("--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true", "true"),
        ("--xla_gpu_exclude_nondeterministic_ops", "true"),
        ("--xla_gpu_deterministic_ops=1 --xla_gpu_deterministic_ops=false", "false"),
    ],
)
def test_deterministic(flags, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    function = gradients(deform_conv2d(CASE), ("x",))
    assert sole_call(lowered(function, operands()))[1]["deterministic"] == expected


# --- the work space ---


def workspace_of(text):
    return 16 * int(sole_call(text)[3][-1].removesuffix("x16xui8"))


# Blocks share its stages where images are few and small.
MANY_CHANNELS = Case("many_channels", c_in=128, c_out=264)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("flags", ["", "--xla_gpu_deterministic_ops=true"])
@pytest.mark.parametrize("symbolic", ["n", "h, w", "n, h, w"])
@pytest.mark.parametrize("case", [CASE, TORCHVISION, MANY_CHANNELS], ids=str)
def test_workspace_for_any_sizes_is_enough_for_each(case, symbolic, flags, dtype, monkeypatch):
    """A program exported for any sizes has work space for those that it gets, not for the largest."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    arguments = in_format("NHWC", dataclasses.replace(case, bias=False).operands(dtype))
    geometry = Geometry(case.kernel, case.stride, case.sides, case.dilation, case.groups, case.deform_groups)

    def workspace(target, n, h, w):
        """Its size for images of these sizes."""
        sizes = {name: (n, *geometry.output_size(h, w)) for name in ("offset", "mask")} | {"x": (n, h, w)}
        shapes = {
            name: jax.ShapeDtypeStruct((*sizes[name], a.shape[3]) if name in sizes else a.shape, a.dtype)
            for name, a in arguments.items()
        }
        wanted = GRADIENTS if target == native.DEFORM_CONV2D_BACKWARD else None
        options = lowering._options(shapes, None, jnp.float32)
        attributes = native.attributes(shapes, geometry, wanted=wanted, **options)
        return native.cuda_workspace(target, shapes, attributes).shape[0]  # rows

    sizes = dict(zip("nhw", (case.batch, *case.size), strict=True))
    symbols = dict(zip(symbolic.split(", "), jax.export.symbolic_shape(symbolic), strict=True))
    for target in TARGETS:
        bound = workspace(target, **{**sizes, **symbols})
        allowed = []
        for values in itertools.product((0, 1, 2, 3, 7, 33, 1000, 12345), (4, 5, 37, 400), (3, 6, 41)):
            given = {name: value for name, value in zip("nhw", values, strict=True) if name in symbols}
            allowed.append(bound if isinstance(bound, int) else bound._evaluate(given))
            assert workspace(target, **{**sizes, **given}) <= allowed[-1], (target, given)
        if not isinstance(bound, int):
            assert min(allowed) < max(allowed)


def test_export_with_a_symbolic_batch():
    (n,) = jax.export.symbolic_shape("n")
    shapes = {
        name: jax.ShapeDtypeStruct((n, *a.shape[1:]) if name in PER_IMAGE else a.shape, a.dtype)
        for name, a in operands().items()
    }
    exported = jax.export.export(
        jax.jit(gradients(deform_conv2d(CASE), ("x", "weight"))),
        platforms=("cuda",),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS],
    )(shapes)
    assert "custom_call @jax_dcn_deform_conv2d_backward" in exported.mlir_module()


# --- on a GPU ---


@pytest.fixture
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")


def test_float32_is_tf32_by_default(gpu):
    case = Case("wide", c_in=128, c_out=64, size=(9, 10))
    y = {name: forward(case, case.operands("float32"), precision=name) for name in ("default", "highest")}
    exact = forward(case, case.operands("float64"))
    assert_close(y["highest"], exact, "float32")
    assert_close(y["default"], exact, "tf32")
    capability = float(jax.devices()[0].compute_capability)
    assert np.array_equal(y["default"], y["highest"]) == (capability < 8)


def test_command_buffers_launch_the_kernels(gpu, tmp_path):
    """XLA captures the calls into CUDA graphs, and updates these when the buffers change."""
    code = """
import jax, jax.numpy as jnp, numpy as np, jax_dcn

@jax.jit
@jax.grad
def function(x, offset, weight):
    y = jax_dcn.deform_conv2d(jnp.tanh(x), offset, weight, padding=1, data_format="NHWC")
    y = jax_dcn.deform_conv2d(jnp.tanh(y), offset, weight[:, :, :1], padding=1, groups=16, data_format="NHWC")
    return jax_dcn.deform_conv2d(jnp.tanh(y), offset, weight, padding=1, data_format="NHWC").sum()

results = []
for seed in range(4):
    rng = np.random.default_rng(seed)
    x, offset, weight = (jnp.asarray(rng.standard_normal(shape, np.float32))
                         for shape in ((2, 9, 8, 16), (2, 9, 8, 18), (3, 3, 16, 16)))
    results.append(np.asarray(function(x, offset, weight)))
    kept = x  # so that the next one lies elsewhere
print(" ".join(result.tobytes().hex() for result in results))
"""
    flags = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_deterministic_ops=true"
    printed, calls = [], []
    for commands in ("", "FUSION,CUSTOM_CALL"):
        dumps = tmp_path / (commands or "none")
        options = f"{flags} --xla_gpu_enable_command_buffer={commands} --xla_dump_to={dumps}"
        printed.append(run_python(code, JAX_PLATFORMS="cuda", XLA_FLAGS=options))
        thunks = Thunks.dumped_to(dumps, "jit_function")
        calls.append((thunks.captured("kCustomCall"), thunks.outside("kCustomCall")))
    assert calls == [(0, 5), (5, 0)]  # three forward, of which the gradient needs two, and three backward
    assert printed[0] == printed[1]


# --- the module and its handlers ---


def test_import_leaves_cuda_alone():
    """Neither the driver nor JAX's GPU backend is touched before something is computed."""
    code = (
        "import jax_dcn; from jax_dcn._operator import native; native.cuda_architectures()\n"
        "print(sorted({line.split('/')[-1].strip() for line in open('/proc/self/maps') if 'libcuda.so' in line}))"
    )
    assert run_python(code).strip() == "[]"


def test_show_config_names_the_architectures(capsys):
    native.show_config()
    assert f"architectures {native.cuda_architectures()}" in capsys.readouterr().out


@pytest.mark.parametrize("target", TARGETS)
def test_the_handler_decodes_what_the_lowering_passes(target):
    """Called on the CPU, a CUDA handler misses the stream, and nothing else: no operand, result or attribute."""
    code = f"""
import jax, jax.numpy as jnp
from jax_dcn._operator import lowering, native
from jax_dcn._operator.geometry import Geometry
from jax_dcn._operator.operands import GRADIENTS

target = {target!r}
jax.ffi.register_ffi_target("on_cpu", native._native_cuda.handlers()[target], platform="cpu")
native.call = lambda target, results, operands, attributes: jax.ffi.ffi_call("on_cpu", results)(
    *operands.values(), **attributes)
params = dict(geometry=Geometry((3, 3), padding=((1, 1), (1, 1))), precision=None)
operands = dict(x=jnp.ones((2, 6, 5, 8)), offset=jnp.ones((2, 6, 5, 18)), weight=jnp.ones((3, 3, 8, 4)),
                mask=jnp.ones((2, 6, 5, 9)))
if target == native.DEFORM_CONV2D:
    operands["bias"] = jnp.ones(4)
    rule = lowering.deform_conv2d_cuda
else:
    operands = dict(grad_y=jnp.ones((2, 6, 5, 4)), **operands)
    rule = lowering.deform_conv2d_backward_cuda
    params["wanted"] = GRADIENTS
names = tuple(operands)
try:
    jax.block_until_ready(jax.jit(lambda *a: rule(dict(zip(names, a)), **params))(*operands.values()))
except jax.errors.JaxRuntimeError as error:
    print(error)
"""
    error = run_python(code, JAX_PLATFORMS="cpu")
    assert "(bad operands at: 0)" in error
    assert "Failed to get platform stream" in error


WEIGHTLESS = {
    **dict(x=(1, 1, 8, 8), offset=(1, 1, 5, 18), weight=(), has_weight=False, x_first=True, groups=8),
    **dict(stride=(0, 0), padding=(0, 0), dilation=(0, 0), levels=(2, 2, 1, 3, 1, 1)),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": (1, 8, 8, 6)}, "weight must have C_in / groups input channels"),
        ({"groups": 3}, "channels must be multiples of the groups"),
        ({"kernel": (0, 3)}, "sizes and groups must be positive"),
        ({"stride": (-1, 1)}, "strides, paddings and dilations must not be negative"),
        ({"dtype": "int32"}, "unsupported type int32"),
        ({"padding": (2**31, 0)}, "an image and the grid on it must be smaller than 2\\^31 pixels"),
        ({"offset": (1, 2**16, 8, 18), "stride": (2**16, 1)}, "an image and the grid on it must be smaller"),
        ({"stride": (1, 1, 1)}, "kernel, stride, padding and dilation must be pairs"),
        ({"offset": (1, 0, 8, 18)}, "the output has no pixels"),
        ({"x": (-1, 8, 8, 8)}, "the batch, the output, strides"),
        ({"offset": (8, 8, 18)}, "x and offset must have rank 4"),
        ({"weight": ()}, "weight must have rank 4"),
        ({"x": (1, 8, 8, 2**32), "weight": (3, 3, 2**32, 4)}, "taps times channels must be less than 2\\^27"),
        ({"weight": (3, 3, 8, 2**40)}, "taps times channels must be less than 2\\^27"),
        ({"x": (1, None, None, 8), "kernel": (2**14, 2**14)}, "taps times channels must be less than 2\\^27"),
        ({"x_first": True}, "x_first and levels are for calls without a weight"),
        ({"levels": (2, 4)}, "x_first and levels are for calls without a weight"),
        ({**WEIGHTLESS, "groups": 1}, "without a weight each NHWC channel is a group"),
        ({**WEIGHTLESS, "nchw": True, "groups": 1}, "without a weight each NHWC channel is a group"),
        ({**WEIGHTLESS, "levels": (2, 4, 1)}, "8 levels, each a pair"),
        ({**WEIGHTLESS, "levels": (1, 1) * 9}, "8 levels, each a pair"),
        ({**WEIGHTLESS, "levels": (2, 4, 0, 3)}, "levels must be in x"),
        ({**WEIGHTLESS, "levels": (2, 2**40)}, "levels must be in x"),
        ({**WEIGHTLESS, "levels": (2, 4, 2, 2)}, "levels must fill x"),
        ({**WEIGHTLESS, "levels": (1, 4, 1, 1, 1, 1, 1, 2)}, "levels must fill x and have taps"),
        ({**WEIGHTLESS, "levels": (1, 8), "stride": (1, 1)}, "levels have no grid"),
    ],
    ids=str,
)
def test_workspace_of_an_impossible_geometry(changes, message):
    arguments = dict(x=(1, 8, 8, 8), offset=(1, 8, 8, 18), weight=(3, 3, 8, 4), dtype="float32", kernel=(3, 3))
    arguments |= dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), levels=(), groups=1, deform_groups=1)
    arguments |= dict(nchw=False, x_first=False, has_weight=True, has_mask=False)
    arguments |= dict(highest_precision=False, deterministic=False)

    def size(**arguments):
        arrays = {
            name: np.array(arguments.pop(name), np.int64)
            for name in ("kernel", "stride", "padding", "dilation", "levels")
        }
        return native._native_cuda.forward_workspace(**arguments, **arrays)

    size(**arguments)
    size(**{**arguments, **WEIGHTLESS})
    with pytest.raises(ValueError, match=message):
        size(**{**arguments, **changes})
