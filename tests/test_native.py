"""What the native module promises beyond numbers: that it is there, on every instruction set, deterministic, frugal.

These tests run in processes of their own, because threads, instruction set and peak memory belong to a process.
"""

import ast
from pathlib import Path

import numpy as np
import pytest
from support.processes import run_python
from support.tolerances import assert_close

from jax_dcn._operator import native

MIB = 2**20

# With the kernels, most of the time of a process is XLA's, for what lies around them.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

# Operands with several tiles, slices, blocks of taps and chunks of images, then the forward and all gradients of
# every dtype.
GRADIENTS = """
import hashlib, os, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
import jax_dcn

def gradients(data_format, dtype, batch, c_in, c_out, size, groups, deform_groups, kernel):
    rng = np.random.default_rng(7)
    taps = kernel * kernel * deform_groups
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    operands = dict(
        x=draw(batch, size, size + 3, c_in),
        offset=2 * draw(batch, size, size + 3, taps * 2),
        mask=draw(batch, size, size + 3, taps),
        weight=draw(kernel, kernel, c_in // groups, c_out) / np.sqrt(c_in * kernel * kernel / groups).astype(dtype),
        bias=draw(c_out),
    )
    grad_y = draw(batch, size, size + 3, c_out)
    if data_format == "NCHW":
        axes = {"weight": (3, 2, 0, 1), "bias": (0,)}
        operands = {name: a.transpose(axes.get(name, (0, 3, 1, 2))) for name, a in operands.items()}
        grad_y = grad_y.transpose(0, 3, 1, 2)
    def function(operands):
        return jax_dcn.deform_conv2d(
            **operands, padding=kernel // 2, groups=groups, deform_groups=deform_groups, data_format=data_format,
            precision=os.environ.get("PRECISION", "default"))
    @jax.jit
    def run(operands, grad_y):
        y, vjp = jax.vjp(function, operands)
        return {"y": y, **vjp(grad_y)[0]}
    return run(operands, grad_y)

def sums(dtype, batch, groups, channels, size, kernel):
    # Without a weight: DCNv3, or where the kernel is levels and points the attention.
    rng = np.random.default_rng(7)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    if isinstance(kernel, int):
        pixels, taps = (batch, size, size + 3), kernel * kernel
        operands = draw(*pixels, groups * channels), 2 * draw(*pixels, groups * taps * 2), draw(*pixels, groups * taps)
        function = lambda *a: jax_dcn.dcnv3(*a, kernel_size=kernel, padding=kernel // 2, groups=groups)
    else:
        levels, points = kernel
        taps, queries = (groups, len(levels), points), (batch, size * size)
        value = draw(batch, sum(h * w for h, w in levels), groups, channels)
        operands = value, 0.5 + draw(*queries, *taps, 2) / 3, draw(*queries, *taps)
        function = lambda v, *a: jax_dcn.multi_scale_deformable_attention(v, levels, *a)
    @jax.jit
    def run(*operands):
        y, vjp = jax.vjp(function, *operands)
        return dict(zip(("y", "x", "offset", "mask"), (y, *vjp(jnp.cos(y)))))
    return run(*operands)

# Every number of vectors of channels that are summed together, and parts of one; several tiles; deform groups cut and
# whole, by the number of threads; one image and several.
SUMS = [
    ("float32", 1, 18, 1, 13, 3), ("float32", 3, 3, 4, 12, 3), ("float32", 1, 5, 7, 13, 3), ("float32", 2, 2, 8, 13, 3),
    ("float32", 1, 4, 16, 13, 3), ("float32", 1, 3, 17, 12, 3), ("float32", 1, 2, 32, 13, 5),
    ("float32", 1, 1, 150, 9, 3), ("float64", 1, 3, 8, 12, 3), ("float64", 1, 2, 35, 11, 3), ("float64", 3, 5, 3, 7, 3),
    ("bfloat16", 1, 3, 16, 12, 3), ("bfloat16", 1, 2, 33, 11, 3), ("float16", 3, 4, 8, 7, 3),
    ("float16", 1, 2, 40, 11, 3), ("float32", 2, 4, 32, 14, (((9, 12), (5, 6), (1, 2)), 4)),
    ("bfloat16", 1, 3, 24, 12, (((7, 9), (4, 5)), 3)),
]

CASES = [
    ("float32", 1, 160, 48, 19, 1, 2, 3), ("float32", 5, 24, 40, 11, 4, 3, 3), ("float32", 3, 34, 34, 12, 17, 17, 3),
    ("float32", 1, 16, 7, 40, 1, 1, 7), ("float32", 4, 8, 8, 3, 8, 8, 1),
    ("float64", 5, 42, 23, 11, 1, 3, 3), ("float16", 3, 34, 34, 12, 17, 17, 3), ("bfloat16", 5, 24, 40, 11, 4, 3, 3),
    ("float32", 2, 64, 40, 11, 1, 8, 3), ("float32", 5, 80, 80, 11, 80, 1, 5), ("bfloat16", 1, 40, 40, 11, 40, 40, 3),
    ("bfloat16", 1, 160, 72, 7, 1, 2, 3), ("bfloat16", 3, 40, 28, 10, 2, 1, 3),
]
RESULTS = {
    f"{i} {case[0]} {data_format} {name}": value
    for i, case in enumerate(CASES)
    for data_format in (("NHWC", "NCHW") if i in (0, 1, 5, 7, 9, 11, 12) else ("NCHW",) if i % 2 else ("NHWC",))
    for name, value in gradients(data_format, *case).items()
}
RESULTS |= {
    f"{i} {case[0]} without_a_weight {name}": value
    for i, case in enumerate(SUMS)
    for name, value in sums(*case).items()
}
"""


def test_the_native_module_is_loaded():
    assert native.MISSING is None
    assert "baseline" in native.cpu_isas()


@pytest.mark.parametrize("module", ["_native", "_native_cuda"])
def test_the_stub_names_what_the_module_has(module):
    if (loaded := getattr(native, module)) is None:
        pytest.skip(native.CUDA_MISSING)
    stub = ast.parse(Path(native.__file__).with_name(f"{module}.pyi").read_text())
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert functions == {name for name in dir(loaded) if not name.startswith("_")}


def test_show_config_names_the_kernels(capsys):
    native.show_config()
    assert f"kernels for {native.cpu_isa()}" in capsys.readouterr().out


def test_results_do_not_depend_on_the_number_of_threads():
    code = GRADIENTS + (
        "for name, value in RESULTS.items():\n"
        "    print(name, hashlib.sha256(np.asarray(value).tobytes()).hexdigest())\n"
    )
    outputs = {threads: run_python(code, NPROC=str(threads), **QUICK) for threads in (1, 2, 7)}
    assert len(outputs[1].splitlines()) == (13 + 7) * 6 + 17 * 4
    assert len(set(outputs.values())) == 1


def saved_gradients(path: Path, **environment: str) -> dict[str, np.ndarray]:
    code = GRADIENTS + "np.savez(os.environ['OUTPUT'], **{k: np.asarray(v, np.float64) for k, v in RESULTS.items()})"
    run_python(code, OUTPUT=str(path), **environment)
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def xla_gradients(tmp_path_factory):
    return saved_gradients(tmp_path_factory.mktemp("xla") / "xla.npz", JAX_DCN_IMPLEMENTATION="xla")


@pytest.mark.parametrize(
    ("isa", "precision"),
    [
        (isa, precision)
        for isa in (native.cpu_isas())
        for precision in (("default", "highest") if isa == "avx512bf16" else ("default",))
    ],
)
def test_every_instruction_set_agrees_with_plain_xla(isa, precision, xla_gradients, tmp_path):
    chosen = run_python("from jax_dcn._operator import native; print(native.cpu_isa())", JAX_DCN_CPU_ISA=isa)
    if chosen.strip() != isa:
        pytest.skip(f"this processor has no {isa}")
    gradients = saved_gradients(tmp_path / "native.npz", JAX_DCN_CPU_ISA=isa, PRECISION=precision, **QUICK)
    assert gradients.keys() == xla_gradients.keys()
    for name, expected in xla_gradients.items():
        _, dtype, _, array = name.split()
        pairs = (isa, precision, dtype) == ("avx512bf16", "default", "bfloat16") and array in ("y", "weight")
        assert_close(gradients[name], expected, "bfloat16 samples" if pairs else dtype, err_msg=name, both_rounded=True)


def test_an_unknown_instruction_set_is_an_error():
    code = (
        "import jax.numpy as jnp, jax, jax_dcn\n"
        "try:\n"
        "    jax_dcn.deform_conv2d(jnp.ones((1, 1, 1, 1)), jnp.ones((1, 2, 1, 1)), jnp.ones((1, 1, 1, 1)))\n"
        "except jax.errors.JaxRuntimeError as error:\n"
        "    print(error)\n"
    )
    assert "JAX_DCN_CPU_ISA names an instruction set that was not built" in run_python(code, JAX_DCN_CPU_ISA="z80")


MEMORY = """
import os, jax, jax.numpy as jnp, numpy as np, jax_dcn

def kilobytes(key):
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith(key)))

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
operands = dict(x=draw(1, 180, 320, 128), offset=draw(1, 180, 320, 144), mask=draw(1, 180, 320, 72))
grad_y = draw(1, 180, 320, 128)

def forward(operands, grad_y):
    return FUNCTION

def backward(operands, grad_y):
    return jax.vjp(lambda operands: forward(operands, grad_y), operands)[1](grad_y)

call = jax.jit(DIRECTION).lower(operands, grad_y).compile()
jax.block_until_ready((operands, grad_y))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is in use
before = kilobytes("VmRSS")
results = jax.block_until_ready(call(operands, grad_y))
outputs = sum(r.nbytes for r in jax.tree.leaves(results))
print((kilobytes("VmHWM") - before) * 1024 - outputs)
"""


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("function", "allowed"),
    [
        # In a CPU's cache: a packed copy of the weight (0.6 MB) and what the threads work on.
        (
            "jax_dcn.deform_conv2d(**operands, weight=jnp.ones((3, 3, 128, 128)), padding=1, deform_groups=8, "
            'data_format="NHWC")',
            8,
        ),
        ("jax_dcn.dcnv3(**operands, padding=1, groups=8)", 1),
    ],
    ids=["deform_conv2d", "dcnv3"],
)
def test_memory_is_bounded(function, allowed, direction):
    """No column buffer: for 128 channels at 180 x 320 it would be 265 MB. So many MiB per thread are allowed."""
    for threads in (1, 2):
        code = MEMORY.replace("FUNCTION", function).replace("DIRECTION", direction)
        extra = int(run_python(code, NPROC=str(threads)))
        assert extra < allowed * MIB * threads, f"{extra / MIB:.1f} MiB on {threads} threads"
