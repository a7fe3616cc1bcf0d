"""What the operator promises under JAX's transformations, apart from vmap and first gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from processes import run_python
from tolerances import assert_close

import jax_dcn

CASE = Case("small", c_in=4, c_out=4, size=(5, 6), groups=2, mask=True, bias=True)


def loss(operands):
    return (jax_dcn.deform_conv2d(**operands, **CASE.arguments) ** 2).sum()


@pytest.fixture
def operands(implementation):
    return {name: jnp.asarray(value) for name, value in CASE.operands("float64").items()}


def assert_equal_gradients(actual, expected):
    jax.tree.map(functools.partial(assert_close), actual, expected)


def test_checkpoint(operands):
    expected = jax.jit(jax.grad(lambda operands: loss(operands)))(operands)
    policy = jax.checkpoint_policies.dots_saveable
    rematerialised = jax.checkpoint(lambda operands: loss(operands), policy=policy)
    assert_equal_gradients(jax.jit(jax.grad(rematerialised))(operands), expected)


def test_scan(operands):
    def step(x, _):
        return jax_dcn.deform_conv2d(**{**operands, "x": x}, **CASE.arguments), None

    def scanned(x):
        return jax.lax.scan(step, x, None, length=3)[0].sum()

    def unrolled(x):
        return step(step(step(x, None)[0], None)[0], None)[0].sum()

    assert_close(jax.jit(jax.grad(scanned))(operands["x"]), jax.jit(jax.grad(unrolled))(operands["x"]))


def test_disable_jit_and_debug_nans(operands):
    expected = jax.jit(jax.grad(lambda operands: loss(operands)))(operands)
    with jax.disable_jit(), jax.debug_nans(True):
        assert_equal_gradients(jax.grad(lambda operands: loss(operands))(operands), expected)


def test_eval_shape(operands):
    y = jax.eval_shape(lambda operands: jax_dcn.deform_conv2d(**operands, **CASE.arguments), operands)
    assert (y.shape, y.dtype) == ((CASE.batch, CASE.c_out, *CASE.output_size), jnp.float64)


def test_export_with_a_symbolic_batch_for_all_platforms(operands):
    (n,) = jax.export.symbolic_shape("n")
    shapes = {
        name: jax.ShapeDtypeStruct((n, *value.shape[1:]) if name in ("x", "offset", "mask") else value.shape, "float64")
        for name, value in operands.items()
    }
    exported = jax.export.export(
        jax.jit(lambda operands: jax_dcn.deform_conv2d(**operands, **CASE.arguments)),
        platforms=("cpu", "cuda", "tpu", "rocm"),
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("jax_dcn_deform_conv2d")],
    )(shapes)
    expected = jax_dcn.deform_conv2d(**operands, **CASE.arguments)
    assert_close(exported.call(operands), expected)


def test_forward_mode_is_refused(operands):
    with pytest.raises(TypeError, match="can't apply forward-mode autodiff"):
        jax.jvp(lambda operands: loss(operands), (operands,), (operands,))


def test_second_order_is_refused(operands):
    with pytest.raises(NotImplementedError, match="Differentiation rule for 'deform_conv2d_backward'"):
        jax.grad(lambda x: jax.grad(lambda x: loss({**operands, "x": x}))(x).sum())(operands["x"])


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_the_batch(check_vma):
    """A replicated weight's gradient must be summed over the shards, whoever takes the gradient.

    With the check off nothing sums inside of shard_map, so there only the gradient from outside counts.
    """
    printed = run_python(
        """
import jax, jax.numpy as jnp, numpy as np, jax_dcn
from jax.sharding import Mesh, PartitionSpec as P

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
operands = dict(x=draw(4, 6, 5, 6), offset=draw(4, 18, 5, 6), mask=draw(4, 9, 5, 6), weight=draw(4, 6, 3, 3),
                bias=draw(4))
specs = {name: P() if name in ("weight", "bias") else P("i") for name in operands}
mesh = Mesh(np.array(jax.devices()), ("i",))
function = lambda operands: jax_dcn.deform_conv2d(**operands, padding=1)
loss = lambda operands: (function(operands) ** 2).sum()
expected = jax.jit(jax.grad(loss))(operands)

def shard_map(f, out_specs):
    return jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=CHECK)

outside = jax.jit(jax.grad(lambda operands: (shard_map(function, P("i"))(operands) ** 2).sum()))(operands)
results = [outside]
if CHECK:
    results.append(jax.jit(shard_map(jax.grad(loss), specs))(operands))
for result in results:
    for name in operands:
        print(name, float(jnp.abs(result[name] - expected[name]).max() / jnp.abs(expected[name]).max()))
""".replace("CHECK", str(check_vma)),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    errors = [(line.split()[0], float(line.split()[1])) for line in printed.splitlines()]
    assert len(errors) == (10 if check_vma else 5)
    for name, error in errors:
        assert_close(np.asarray(error), np.asarray(0.0), "float32", err_msg=name)
