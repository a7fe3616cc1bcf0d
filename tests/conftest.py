"""Settings and fixtures of the whole suite.

The library reads JAX_DCN_IMPLEMENTATION while a function is traced, and JAX keeps traces by the identity of the
Python function. So a test that uses the `implementation` fixture must jit a function of its own, never one that
lives longer than the test.

Where JAX_DCN_ALLOWED_SKIPS is set, a test that skips for a reason that does not match this regular expression fails.
What fails is also written at once to the file that JAX_DCN_FAILURES names, for a run that may be cut short.
"""

import os
import re

# Nearly all of the time goes into compiling small programs, which XLA's optimisations double.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# On GPUs float32 may mean TF32, in JAX's own operations too. And several processes share the GPU's memory.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from support.formats import DATA_FORMATS

from jax_dcn._operator import native

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")


def fail_if_skipped_for_another_reason(report):
    allowed = os.environ.get("JAX_DCN_ALLOWED_SKIPS")
    if allowed is not None and report.skipped:
        _, _, reason = report.longrepr
        if not re.search(allowed, reason):
            report.outcome = "failed"
            report.longrepr = f"{reason}, which JAX_DCN_ALLOWED_SKIPS={allowed} does not allow"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Of a file, which may skip as a whole."""
    report = yield
    fail_if_skipped_for_another_reason(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    fail_if_skipped_for_another_reason(report)
    if report.failed and (path := os.environ.get("JAX_DCN_FAILURES")):
        with open(path, "a") as file:
            file.write(f"{report.nodeid}, {report.when}\n{report.longreprtext}\n")
    return report


@pytest.fixture(params=["native", "xla"])
def implementation(request, monkeypatch):
    """Runs a test on the native kernels and on plain XLA, on JAX's default device.

    A missing native module, the CUDA one where that device is a GPU, fails the native leg.
    """
    missing = native.CUDA_MISSING if jax.default_backend() == "gpu" else native.MISSING
    if request.param == "native" and missing is not None:
        pytest.fail(f"there are no kernels: {missing}")
    monkeypatch.setenv("JAX_DCN_IMPLEMENTATION", request.param)
    return request.param


@pytest.fixture(params=DATA_FORMATS)
def data_format(request):
    return request.param


@pytest.fixture
def cuda_kernels():
    """The CUDA kernels, loaded, with or without a GPU."""
    if native.CUDA_MISSING is not None:
        pytest.skip(native.CUDA_MISSING)
