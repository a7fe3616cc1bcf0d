"""What XLA's GPU compiler makes of programs with the operator: for an H100, without one.

Needs the CUDA kernels and jax's CUDA plugin (pip install "jax[cuda13-local]"), but none of CUDA's libraries.
tests/data/h100.txtpb describes the GPU as XLA writes it into its dumps.
"""

import functools
import importlib.util
import os
import re
from pathlib import Path

# Without it the plugin, which is loaded with jax's first use, looks for cuDNN and others.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from support.cases import DTYPES, DTYPES_OF_16_BITS
from support.formats import to_nchw, to_nhwc
from support.programs import Thunks

import jax_dcn
from jax_dcn._operator import native

nnx = pytest.importorskip("flax.nnx")
if importlib.util.find_spec("jax_cuda13_plugin") is None:
    pytest.skip("no CUDA plugin of jax", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("cuda_kernels", "as_users_compile")

TARGET = (Path(__file__).parents[1] / "data" / "h100.txtpb").read_text()

# Of small programs too, which XLA would not find worth a CUDA graph.
CAPTURE = {"xla_gpu_graph_min_graph_size": 1}

# What a program of the operator runs: kernels of XLA's own, ours, and CUDA graphs of them. No copies to or from the
# host, no loops, no library's convolution.
KINDS = {"kCommandBuffer", "kCustomCall", "kCustomKernel", "kKernel"}


@pytest.fixture
def as_users_compile():
    """Without what conftest.py asks for."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.default_matmul_precision(None):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def devices(count):
    topology = topologies.get_topology_desc("h100", "cuda", target_config=TARGET, topology=f"1x1x{count}")
    return topology.devices


class Program:
    def __init__(self, function, arguments, folder, **options):
        lowered = jax.jit(function).lower(*arguments)
        self.compiled = lowered.compile({"xla_dump_to": str(folder), **CAPTURE, **options})
        self.text = self.compiled.as_text()
        self.thunks = Thunks.dumped_to(folder)

    def count(self, operation):
        """How many such operations there are in the optimised program, fusions included."""
        return len(re.findall(rf" {operation}(?:-start)?\(", self.text))

    def calls(self):
        """The handlers that the program calls, in order; XLA's own for libraries have names with a $."""
        targets = re.findall(r'custom_call_target="([^"]+)"', self.text)
        return [target for target in targets if "$" not in target]

    def workspaces(self):
        return [16 * int(rows) for rows in re.findall(r"u8\[(\d+),16\]\S*\) custom-call", self.text)]

    @property
    def temporary_bytes(self):
        return self.compiled.memory_analysis().temp_size_in_bytes


def compile_for_gpu(folder, function, *arguments, **options):
    """The program of a function of arguments of these shapes and dtypes."""
    sharding = SingleDeviceSharding(devices(1)[0])
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    return Program(function, placed, folder, **options)


@pytest.fixture
def compiled(tmp_path):
    return functools.partial(compile_for_gpu, tmp_path)


def shapes(data_format, batch=4, channels=64, size=(32, 40), dtype="bfloat16"):
    """x, offset, mask and weight of a 3 x 3 convolution."""

    def image(channels, dtype):
        order = (batch, *size, channels) if data_format == "NHWC" else (batch, channels, *size)
        return jax.ShapeDtypeStruct(order, dtype)

    kernel = (3, 3, channels, channels) if data_format == "NHWC" else (channels, channels, 3, 3)
    return image(channels, dtype), image(18, "float32"), image(9, "float32"), jax.ShapeDtypeStruct(kernel, dtype)


def operator(data_format, **arguments):
    return lambda x, offset, mask, weight: jax_dcn.modulated_deform_conv2d(
        x, offset, mask, weight, padding=1, data_format=data_format, **arguments
    )


def gradients(function, argnums=(0, 1, 2, 3)):
    """All gradients, those of a sum weighed by the result itself, so that there is a forward pass too."""
    return jax.grad(lambda *a: jnp.square(function(*a).astype(jnp.float32)).sum(), argnums)


FORWARD, BACKWARD = native.DEFORM_CONV2D, native.DEFORM_CONV2D_BACKWARD
PROGRAMS = {
    "forward": (lambda f: f, [FORWARD]),
    "gradients": (gradients, [FORWARD, BACKWARD]),
    "tangent": (lambda f: lambda x, *rest: jax.jvp(lambda x: f(x, *rest), (x,), (x,))[1], [FORWARD]),
}


def program(name, data_format):
    transform, calls = PROGRAMS[name]
    return transform(operator(data_format, forward_mode=name == "tangent")), calls


# --- one device ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_handlers_are_found_and_nothing_else_is_run(compiled, name, dtype):
    """But for the gradients: the cotangent, and the rounding of those of x and the weight."""
    function, calls = program(name, "NHWC")
    found = compiled(function, *shapes("NHWC", dtype=dtype))
    assert found.calls() == calls
    assert found.thunks.kinds() <= KINDS
    rounds = dtype in DTYPES_OF_16_BITS
    assert found.thunks.captured("kCustomKernel") == (1 + 2 * rounds if name == "gradients" else 0)
    assert found.thunks.outside("kCustomKernel") == 0


def test_a_handler_that_is_missing_is_an_error(compiled):
    x = shapes("NHWC")[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="No FFI handler registered for jax_dcn_missing"):
        compiled(lambda x: jax.ffi.ffi_call("jax_dcn_missing", x)(x), x)


@pytest.mark.parametrize("name", PROGRAMS)
def test_nhwc_has_no_transposes_and_no_copies(compiled, name):
    function, _ = program(name, "NHWC")
    found = compiled(function, *shapes("NHWC"))
    assert (found.count("transpose"), found.count("copy")) == (0, 0)


# The arrays that the program takes and gives: x (which is its own tangent here), offset, mask and weight, and y or the
# four gradients.
@pytest.mark.parametrize(("name", "arrays"), [("forward", 5), ("gradients", 4 + 4), ("tangent", 5)])
def test_nchw_transposes_what_the_program_takes_and_gives_once(compiled, name, arrays):
    function, _ = program(name, "NCHW")
    found = compiled(function, *shapes("NCHW"))
    assert (found.count("transpose"), found.count("copy")) == (arrays, 0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_calls_lie_in_command_buffers(compiled, name):
    function, calls = program(name, "NHWC")
    found = compiled(function, *shapes("NHWC"))
    assert found.thunks.captured("kCustomCall") == len(calls)
    assert found.thunks.outside("kCustomCall") == 0


def test_calls_outside_of_command_buffers_are_seen(compiled):
    found = compiled(operator("NHWC"), *shapes("NHWC"), xla_gpu_enable_command_buffer="")
    assert found.thunks.captured("kCustomCall") == 0
    assert found.thunks.outside("kCustomCall") == 1


@pytest.mark.parametrize("backward", [False, True])
def test_work_space_is_reused(compiled, backward):
    """Layers in a row take turns. The arrays that live beside it are small here."""

    def layers(x, offset, mask, weight):
        for _ in range(4):
            x = operator("NHWC")(x, offset, mask, weight)
        return x

    function = gradients(layers, argnums=0) if backward else layers
    found = compiled(function, *shapes("NHWC", batch=1, channels=256, size=(8, 8)))
    workspaces = found.workspaces()
    assert len(workspaces) == (8 if backward else 4)
    # The packed weight, sums of nine parts of the stages for a tile of 128 pixels, and a pixel of zeros.
    assert min(workspaces) < 2 * 9 * 256 * 256 + 4 * 9 * 128 * 256 + 1024
    assert max(workspaces) <= found.temporary_bytes < 1.5 * max(workspaces)


@pytest.mark.parametrize(
    ("mapped", "transposes"),
    [("x", 0), ("x offset mask", 0), ("weight", 1), ("x offset mask weight", 4)],
)
def test_vmap_is_one_call(compiled, mapped, transposes):
    """Images are folded into the batch; weights become groups, laid side by side along the channels."""
    names = ("x", "offset", "mask", "weight")
    in_axes = tuple(0 if name in mapped.split() else None for name in names)
    arguments = [
        jax.ShapeDtypeStruct((3, *a.shape) if name in mapped.split() else a.shape, a.dtype)
        for name, a in zip(names, shapes("NHWC"), strict=True)
    ]
    found = compiled(jax.vmap(operator("NHWC"), in_axes), *arguments)
    assert found.calls() == [FORWARD]
    if mapped == "weight":  # outputs of one convolution: x is not repeated
        assert "operand_layout_constraints={bf16[4,32,40,64]{" in found.text
    assert found.thunks.kinds() <= KINDS
    # Of the operands; that of the result may be fused with what follows.
    assert transposes <= found.count("transpose") <= transposes + 1


# --- two devices ---


@pytest.mark.parametrize("name", PROGRAMS)
def test_mesh_shares_the_images(tmp_path, name):
    """No device sees another's images, and only the weight's gradient is exchanged."""
    mesh = Mesh(np.array(devices(2)), ("n",))
    arguments = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P() if a.shape[0] == 3 else P("n")))
        for a in shapes("NHWC")
    ]
    function, calls = program(name, "NHWC")
    found = Program(function, arguments, tmp_path)
    assert found.calls() == calls
    assert "bf16[2,32,40,64]" in found.text and "bf16[4,32,40,64]" not in found.text
    collectives = {kind: found.count(kind) for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute")}
    assert collectives == {
        "all-reduce": int(name == "gradients"),
        "all-gather": 0,
        "all-to-all": 0,
        "collective-permute": 0,
    }
    if name == "gradients":  # as the parameter is kept
        assert re.search(r"bf16\[36864\]\S* all-reduce(-start)?\(", found.text)
    assert found.thunks.outside("kCustomCall") == 0


# --- a network ---


class Network(nnx.Module):
    """A deformable layer between plain ones, which are NHWC as all of Flax's."""

    def __init__(self, data_format, dtype, rngs):
        self.data_format = data_format
        options = dict(padding=1, dtype=dtype, rngs=rngs)
        self.first = nnx.Conv(16, 64, (3, 3), **options)
        self.deformable = jax_dcn.nnx.ModulatedDeformConv2dPack(64, 64, 3, data_format=data_format, **options)
        self.last = nnx.Conv(64, 16, (3, 3), **options)

    def __call__(self, x):  # (N, H, W, 16)
        x = nnx.relu(self.first(x))
        if self.data_format == "NCHW":
            x = to_nhwc(self.deformable(to_nchw(x)))
        else:
            x = self.deformable(x)
        return self.last(nnx.relu(x))


def network(data_format, dtype, train):
    graph, parameters = nnx.split(nnx.eval_shape(lambda: Network(data_format, dtype, nnx.Rngs(0))))

    def forward(parameters, x):
        return nnx.merge(graph, parameters)(x)

    function = gradients(forward, argnums=0) if train else forward
    return function, parameters, jax.ShapeDtypeStruct((4, 32, 40, 16), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", [False, True])
def test_network_transposes_weights_alone(compiled, train, dtype):
    """cuDNN wants them in another order than Flax. Images, offsets and masks stay where they are."""
    found = compiled(*network("NHWC", jnp.dtype(dtype), train))
    assert found.calls() == ([FORWARD, BACKWARD] if train else [FORWARD])
    transposed = re.findall(r"= \w+\[([\d,]+)\]\S* transpose\(", found.text)
    transposed = [sorted(int(size) for size in shape.split(",") if size != "1") for shape in transposed]
    channels = {16, 27, 64}  # and two axes of the kernel's three taps, or their product
    assert all(set(shape) <= channels | {3, 9} for shape in transposed), transposed
    assert found.thunks.kinds() <= KINDS | {"kConvolution"}


@pytest.mark.parametrize("train", [False, True])
def test_network_in_nchw_is_the_same_program(tmp_path, train):
    """XLA moves the layer's transposes into those around it."""
    nhwc, nchw = (
        compile_for_gpu(tmp_path / data_format, *network(data_format, jnp.dtype("bfloat16"), train))
        for data_format in ("NHWC", "NCHW")
    )
    assert nhwc.thunks.text == nchw.thunks.text
