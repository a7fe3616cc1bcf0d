"""The CUDA path from the public function to the kernels, with the kernels emulated: the tests of the operator itself,
run on it in a process of their own.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import pytest
from support.processes import python_path, run_python

TOP = Path(__file__).parents[2]

# Small ones of each kind: results and gradients in both formats and all dtypes, vmap, unusable coordinates, no images,
# tangents and second derivatives.
SMALL = "torchvision or no_images or one_pixel or depthwise or 16_bit"
TESTS = {
    "test_numbers.py": f"native and ({SMALL} or unusable or precision)",
    "test_gradients.py": f"native and ({SMALL} or asked or wanted)",
    "test_transformations.py": "native and (forward_mode or jacfwd or hessian or linear_transpose)",
    "test_unweighted.py": "native and (golden or 16_bits or hostile or removed)",
    "test_vmap.py": "native and mask and not any_number",  # which exports, and names the handlers
}


@pytest.fixture(scope="module")
def handlers(tmp_path_factory):
    """The Python module of the CUDA handlers with the kernels for the CPU."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    module = tmp_path_factory.mktemp("handlers") / "_native_cuda.so"
    includes = [jax.ffi.include_dir(), pybind11.get_include(), sysconfig.get_path("include")]
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-attributes", "-DJAX_DCN_CUDA_ON_CPU"]
    command += ["-fno-omit-frame-pointer"]
    command += [f"-I{TOP / 'tests/cuda'}", "-include", "stream_on_cpu.h"]
    command += [f"-isystem{include}" for include in includes]
    command += ["-xc++", *map(str, sorted((TOP / "csrc/cuda").glob("*.cu")))]
    command += [str(TOP / "csrc/ffi" / name) for name in ("module_cuda.cc", "cuda.cc")]
    command += [str(TOP / "tests/cuda" / name) for name in ("access_counts.cc", "device_on_cpu.cc")]
    command += ["-o", str(module), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return module


def emulated(module, **environment):
    """The environment in which handlers_on_cpu can be imported, and the smoke test."""
    path = python_path(TOP / "tests/cuda", TOP / "tests", TOP / "scripts")
    return {"CUDA_HANDLERS_ON_CPU": str(module), "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment}


@pytest.mark.parametrize("file", TESTS)
def test_operator_through_the_cuda_path(file, handlers):
    command = [Path(sys.executable).parent / "pytest", "-q", "-p", "handlers_on_cpu", "-p", "no:cacheprovider"]
    command += [f"--rootdir={TOP}", TOP / "tests" / file, "-k", TESTS[file]]
    environment = {**os.environ, **emulated(handlers)}
    done = subprocess.run(command, env=environment, cwd=handlers.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (calls,) = re.findall(r"CUDA handlers on the CPU: (\d+) calls lowered", done.stdout)
    assert int(calls) >= 5


def test_each_device_runs_its_own_kernels(handlers):
    """XLA names the device; the second one has less shared memory, and a stream that the first does not know."""
    code = """
import handlers_on_cpu, jax, jax.numpy as jnp, jax_dcn, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

rng = np.random.default_rng(0)
shapes = (2, 9, 8, 16), (2, 9, 8, 18), (3, 3, 16, 70)
operands = [rng.standard_normal(shape, np.float32) for shape in shapes]

@jax.jit
def gradients(*operands):
    loss = lambda *a: jnp.square(jax_dcn.deform_conv2d(*a, padding=1, data_format="NHWC")).sum()
    return jax.grad(loss, argnums=(0, 1, 2))(*operands)

first, second = jax.devices()
one = jax.block_until_ready(gradients(*(jax.device_put(a, second) for a in operands)))
assert all(a.devices() == {second} for a in one)
assert not handlers_on_cpu.launched(0) and handlers_on_cpu.launched(1)
mesh = jax.make_mesh((2,), ("n",))
shared = [jax.device_put(a, NamedSharding(mesh, P() if a.shape[0] == 3 else P("n"))) for a in operands]
for a, b in zip(jax.block_until_ready(gradients(*shared)), one):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
assert handlers_on_cpu.launched(0) == handlers_on_cpu.launched(1)
"""
    run_python(code, **emulated(handlers, XLA_FLAGS="--xla_force_host_platform_device_count=2"))


def test_a_program_for_any_size(handlers):
    """Exported with a work space whose size is a formula, it has the results of programs for one size."""
    code = """
import handlers_on_cpu, jax, jax.numpy as jnp, jax_dcn, numpy as np
from jax import export
from jax_dcn._operator import native

def gradients(x, offset, weight):
    options = dict(stride=2, padding=((0, 1), (2, 1)), groups=2, data_format="NHWC")
    return jax.value_and_grad(lambda *a: jnp.square(jax_dcn.deform_conv2d(*a, **options)).sum(), (0, 1, 2))(
        x, offset, weight)

def shapes(n, h, w):
    return (n, h, w, 6), (n, (h - 2) // 2 + 1, w // 2 + 1, 18), (3, 3, 3, 70)

symbolic = shapes(*export.symbolic_shape("n, h, w"))
targets = [f"{target}_on_cpu" for target in (native.DEFORM_CONV2D, native.DEFORM_CONV2D_BACKWARD)]
exported = export.export(
    jax.jit(gradients), platforms=["cpu"], disabled_checks=[export.DisabledSafetyCheck.custom_call(t) for t in targets]
)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in symbolic))
assert all(target in exported.mlir_module() for target in targets)
rng = np.random.default_rng(0)
for size in (1, 2, 1), (2, 9, 8), (33, 5, 12):
    operands = [rng.standard_normal(shape, np.float32) for shape in shapes(*size)]
    for a, b in zip(jax.tree.leaves(exported.call(*operands)), jax.tree.leaves(jax.jit(gradients)(*operands))):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(initial=1))
"""
    run_python(code, **emulated(handlers))


def test_the_smoke_test_runs_every_kernel(handlers):
    """scripts/gpu_smoke.py, which says on a GPU which kernels are wrong."""
    code = """
import handlers_on_cpu, jax, gpu_smoke
jax.config.update("jax_enable_x64", True)
for mode in gpu_smoke.MODES:
    reports = list(gpu_smoke.reports(mode, list(gpu_smoke.CHECKS)))
    assert len(reports) == len(gpu_smoke.CHECKS) and not any(report["wrong"] for report in reports), reports
print(*handlers_on_cpu.launched(), sep="\\n")
"""
    launched = set(run_python(code, **emulated(handlers, JAX_DISABLE_MOST_OPTIMIZATIONS="1")).split())
    symbols = subprocess.run(["nm", handlers], capture_output=True, text=True, check=True).stdout
    kernels = set(re.findall(r"^\S+ \w (_ZN7jax_dcn4cuda\d+[A-Za-z]+Kernel[IE]\w+)$", symbols, re.MULTILINE))
    assert len(kernels) > 50
    assert launched == kernels


@pytest.mark.parametrize("fault", ["results", "bits", "exception"])
def test_the_smoke_test_finds_faults(fault, handlers):
    code = f"""
import handlers_on_cpu, itertools, jax, gpu_smoke
from jax_dcn._operator import native

jax.config.update("jax_enable_x64", True)
call, runs, results = native.call, itertools.count(), gpu_smoke.results

def faulty(target, *arguments):
    first, *rest = call(target, *arguments)
    return first * (1.01 if target == native.DEFORM_CONV2D_BACKWARD else 1), *rest

def unsteady(program, *arguments):
    return {{key: value * (1 + 1e-12 * next(runs)) for key, value in results(program, *arguments).items()}}

def failing(*arguments):
    raise RuntimeError("an error of CUDA's")

if {fault!r} == "results":
    native.call = faulty
elif {fault!r} == "bits":
    gpu_smoke.results = unsteady
else:
    native.call = failing
for report in gpu_smoke.reports("float32", [gpu_smoke.Check("small_groups", deterministic=True)]):
    print(report["wrong"])
"""
    printed = run_python(code, **emulated(handlers, JAX_DISABLE_MOST_OPTIMIZATIONS="1"))
    expected = {
        "results": "['grad_x is off by ",
        "bits": "grad_weight has other bits",
        "exception": "RuntimeError: an err",
    }
    assert expected[fault] in printed


CHANGES = {
    "work space": "native.cuda_workspace = lambda *a, f=native.cuda_workspace: jax.ShapeDtypeStruct("
    "(f(*a).shape[0] - 1, 16), 'uint8')",
    "wrong shape": "native.attributes = lambda *a, f=native.attributes, **k: {**f(*a, **k), 'deform_groups': "
    "np.int64(2)}",
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_the_handler_refuses(message, handlers):
    code = f"""
import handlers_on_cpu, jax, jax.numpy as jnp, jax_dcn, numpy as np
from jax_dcn._operator import native

def call():
    x, offset, weight = jnp.ones((1, 4, 4, 4)), jnp.ones((1, 4, 4, 2)), jnp.ones((1, 1, 4, 4))
    return jax.block_until_ready(jax.jit(lambda *a: jax_dcn.deform_conv2d(*a, data_format="NHWC"))(x, offset, weight))

call()
{CHANGES[message]}
try:
    call()
except jax.errors.JaxRuntimeError as error:
    print(error)
"""
    printed = run_python(code, **emulated(handlers))
    assert message in printed, printed
