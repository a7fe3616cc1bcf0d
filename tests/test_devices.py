"""The operator on a mesh of four devices: the numbers, what the devices exchange, and how much each computes.

The functions called `check_...` run in a process of their own that has four devices, where XLA optimises as for a
user: what the devices exchange is read off the compiled program.
"""

import dataclasses
import functools
import math
import os
import re
from collections import Counter
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import run_python
from tolerances import assert_close

import jax_dcn

SHARES = 2  # of the images, and of the output channels or groups, on a mesh of 2 x 2 devices


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What the devices share, and how often they may talk. Nothing but all-reduces is ever allowed."""

    images: bool
    channels: bool  # output channels, or with groups these
    groups: int = 1
    deform_groups: int = 1
    gradient_all_reduces: int = 0

    @property
    def case(self):
        return Case("shared", batch=4, c_out=8, size=(6, 5), groups=self.groups, deform_groups=self.deform_groups)

    @property
    def shares(self):
        """Into how many parts the kernels' work is divided.

        What XLA counts here is mostly where the samples are, which every device that works on a deform group needs.
        """
        xla = os.environ["JAX_DCN_IMPLEMENTATION"] == "xla"
        return SHARES ** (self.images + (self.channels and not (xla and self.deform_groups == 1)))


# One all-reduce sums the gradients of weight and bias over the images. With one group, each output channel reads all
# of x, offset and mask, so one all-reduce sums their gradients over the channels; with groups shared, only those
# operands need it that all groups read: offset and mask of a single deform group.
SHARINGS = {
    "images": Sharing(images=True, channels=False, gradient_all_reduces=1),
    "channels": Sharing(images=False, channels=True, gradient_all_reduces=1),
    "both": Sharing(images=True, channels=True, gradient_all_reduces=2),
    "groups": Sharing(images=True, channels=True, groups=2, deform_groups=2, gradient_all_reduces=1),
    "groups_of_one_deform_group": Sharing(images=False, channels=True, groups=2, gradient_all_reduces=1),
}


def run_on_four_devices(check, *arguments):
    run_python(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import {check.__module__} as tests; tests.{check.__name__}(*{arguments!r})",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_DCN_IMPLEMENTATION=os.environ["JAX_DCN_IMPLEMENTATION"],
    )


def operands_of(case, data_format):
    """float32, in the data format."""
    operands = case.operands("float32")
    operands["offset"] += 1 / 2048  # off the lattice lines, where rounding decides between two derivatives
    if data_format == "NHWC":
        operands |= {name: np.moveaxis(operands[name], 1, 3) for name in ("x", "offset", "mask")}
        operands["weight"] = operands["weight"].transpose(2, 3, 1, 0)
    return {name: jnp.asarray(value) for name, value in operands.items()}


def function(case, data_format, **arguments):
    return lambda operands: jax_dcn.deform_conv2d(**operands, **case.arguments, data_format=data_format, **arguments)


def loss(f):
    return lambda operands: jnp.sin(f(operands)).sum()


def jvp(f):
    return lambda operands: jax.jvp(f, (operands,), (operands,))[1]


def hvp(f):
    return lambda operands: jax.jvp(jax.grad(loss(f)), (operands,), (operands,))[1]


def assert_trees_close(actual, expected):
    jax.tree.map(assert_close, actual, expected)


def collectives(compiled):
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter|ragged-all-to-all"
    return Counter(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text()))


def work(compiled):
    """How much one device computes: the elements of y and grad_y in the kernels' calls, or XLA's count."""
    if os.environ["JAX_DCN_IMPLEMENTATION"] == "xla":
        return compiled.cost_analysis()["flops"]
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="jax_dcn_deform_conv2d' in line]
    shapes = [
        # y is the only result of the forward, grad_y the first operand of the backward.
        re.search(r"constraints={\w+\[([\d,]+)\]" if "_backward" in call else r"= \(?\w+\[([\d,]+)\]", call)[1]
        for call in calls
    ]
    return sum(math.prod(map(int, shape.split(","))) for shape in shapes)


# --- jit over a mesh ---


def sharded(sharing, operands, data_format):
    """The shardings of the operands by name, and that of y."""
    mesh = jax.make_mesh((SHARES, SHARES), ("images", "channels"), axis_types=(AxisType.Auto,) * 2)
    images = "images" if sharing.images else None
    channels = "channels" if sharing.channels else None
    channel_axis, out_axis = (1, 0) if data_format == "NCHW" else (3, 3)

    def spec(name):
        if name in ("weight", "bias"):
            along = [None] * operands[name].ndim
            along[out_axis if name == "weight" else 0] = channels
            return P(*along)
        along = [images, None, None, None]
        if name == "y" or (sharing.groups > 1 and (name == "x" or sharing.deform_groups > 1)):
            along[channel_axis] = channels
        return P(*along)

    return {name: NamedSharding(mesh, spec(name)) for name in operands}, NamedSharding(mesh, spec("y"))


@cases.implementations_and_formats
def test_jit_over_a_mesh(implementation, data_format):
    run_on_four_devices(check_jit_over_a_mesh, data_format)


def check_jit_over_a_mesh(data_format):
    # Plain XLA is slow to compile, and these two have what the others have.
    native = os.environ["JAX_DCN_IMPLEMENTATION"] == "native"
    for name in SHARINGS if native else ("both", "groups"):
        print(name)
        check_sharing(SHARINGS[name], data_format)


def check_sharing(sharing, data_format):
    operands = operands_of(sharing.case, data_format)
    shardings, of_y = sharded(sharing, operands, data_format)
    f, g = (function(sharing.case, data_format, forward_mode=forward_mode) for forward_mode in (False, True))

    placed = jax.device_put(operands, shardings)
    for transformed, result_shardings, all_reduces in (
        (f, of_y, 0),
        (jax.grad(loss(f)), shardings, sharing.gradient_all_reduces),
        (jvp(g), of_y, 0),
    ):
        alone = jax.jit(transformed).lower(operands).compile()
        shared = jax.jit(transformed, out_shardings=result_shardings).lower(placed).compile()
        assert_trees_close(shared(placed), alone(operands))
        assert collectives(shared) == Counter({"all-reduce": all_reduces} if all_reduces else {})
        # XLA has some of it on every device, such as the pixels' own places.
        allowed = 1 if os.environ["JAX_DCN_IMPLEMENTATION"] == "native" else 1.2
        assert 0 < work(shared) <= allowed * work(alone) / sharing.shares, (work(shared), work(alone))


# --- explicit axes ---


@pytest.mark.parametrize(("name", "data_format"), [("images", "NHWC"), ("both", "NCHW")])
def test_explicit_mesh(implementation, name, data_format):
    """The types say how the results are sharded: y as x and weight, each gradient as its operand."""
    run_on_four_devices(check_explicit_mesh, name, data_format)


def check_explicit_mesh(name, data_format):
    sharing = SHARINGS[name]
    operands = operands_of(sharing.case, data_format)
    f = function(sharing.case, data_format)
    expected = jax.jit(f)(operands), jax.jit(jax.grad(loss(f)))(operands), jax.jit(hvp(f))(operands)
    shardings, of_y = sharded(sharing, operands, data_format)
    mesh = jax.make_mesh((SHARES, SHARES), ("images", "channels"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(operand, NamedSharding(mesh, shardings[name].spec))
            for name, operand in operands.items()
        }
        gradient = jax.jit(jax.grad(loss(f))).lower(placed).compile()
        actual = jax.jit(f)(placed), gradient(placed), jax.jit(hvp(f))(placed)
    assert_trees_close(actual, expected)
    assert collectives(gradient) == {"all-reduce": sharing.gradient_all_reduces}
    assert actual[0].sharding.is_equivalent_to(NamedSharding(mesh, of_y.spec), 4)
    for name, operand in placed.items():
        assert actual[1][name].sharding.is_equivalent_to(operand.sharding, operand.ndim), name


# --- shard_map ---


@pytest.mark.parametrize(
    ("implementation", "manual", "check_vma"),
    [
        ("native", ("images", "channels"), True),
        ("native", ("images", "channels"), False),
        ("native", ("images",), True),
        ("native", ("images",), False),
        ("xla", ("images", "channels"), True),
        ("xla", ("images",), False),
    ],
    indirect=["implementation"],
)
def test_shard_map(implementation, manual, check_vma):
    """A replicated weight's gradient must be summed over the shards, whoever takes the gradient.

    With the check off nothing sums inside of shard_map, so there only the gradient from outside counts.
    """
    run_on_four_devices(check_shard_map, manual, check_vma)


def check_shard_map(manual, check_vma):
    jax.config.update("jax_disable_most_optimizations", True)  # only the numbers count
    case = SHARINGS["images"].case
    operands = operands_of(case, "NCHW")
    mesh = jax.make_mesh((SHARES, SHARES), ("images", "channels"), axis_types=(AxisType.Auto,) * 2)
    specs = {name: P() if name in ("weight", "bias") else P("images") for name in operands}
    shard_map = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs,), check_vma=check_vma, axis_names=set(manual)
    )
    f, g = (function(case, "NCHW", forward_mode=forward_mode) for forward_mode in (False, True))
    mapped = [shard_map(f, out_specs=P("images")) for f in (f, g)]

    def from_outside(f, g):
        return f(operands), jax.grad(loss(f))(operands), hvp(f)(operands), jvp(g)(operands)

    assert_trees_close(jax.jit(lambda: from_outside(*mapped))(), jax.jit(lambda: from_outside(f, g))())
    if check_vma:
        inside = shard_map(jax.grad(loss(f)), out_specs=specs)
        assert_trees_close(jax.jit(inside)(operands), jax.jit(jax.grad(loss(f)))(operands))
