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

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import marks
from support.cases import OPERANDS, PER_IMAGE, Case
from support.formats import in_format
from support.processes import run_python
from support.tolerances import assert_trees_close

import jax_dcn

SHARES = 2  # of the images, and of the output channels or groups, on a mesh of 2 x 2 devices


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What the devices share, and how often they may talk. Nothing but all-reduces is ever allowed."""

    images: bool
    channels: bool  # output channels, or of several groups the units
    over_both_axes: bool = False  # the channels
    c_in: int = 4
    c_out: int = 8
    groups: int = 1
    deform_groups: int = 1
    gradient_all_reduces: int = 0

    @property
    def case(self):
        sizes = dict(batch=4, c_in=self.c_in, c_out=self.c_out, padding=((2, 0), (0, 2)))
        return Case("shared", **sizes, groups=self.groups, deform_groups=self.deform_groups)

    @property
    def shares(self):
        """Into how many parts the kernels' work is divided.

        What XLA counts here is mostly where the samples are, which every device that works on a deform group needs.
        """
        xla = os.environ["JAX_DCN_IMPLEMENTATION"] == "xla"
        channels = (1 + self.over_both_axes) * (self.channels and not (xla and self.deform_groups == 1))
        return SHARES ** (self.images + channels)


# One all-reduce sums the gradients of weight and bias over the images. With one group, each output channel reads all
# of x, offset and mask, so one all-reduce sums their gradients over the channels; with groups shared, only those
# operands need it that all groups read: offset and mask of a single deform group.
#
# Several groups are shared in units, whose borders are those of a group and of a deform group: two in most of these.
SHARINGS = {
    "images": Sharing(images=True, channels=False, gradient_all_reduces=1),
    "channels": Sharing(images=False, channels=True, gradient_all_reduces=1),
    "both": Sharing(images=True, channels=True, gradient_all_reduces=2),
    "groups": Sharing(images=True, channels=True, groups=2, deform_groups=2, gradient_all_reduces=1),
    "groups_of_one_deform_group": Sharing(images=False, channels=True, groups=2, gradient_all_reduces=1),
    "groups_within_deform_groups": Sharing(
        images=True, channels=True, c_in=8, groups=8, deform_groups=2, gradient_all_reduces=1
    ),
    "deform_groups_within_groups": Sharing(
        images=True, channels=True, groups=2, deform_groups=4, gradient_all_reduces=1
    ),
    "groups_across_deform_groups": Sharing(images=False, channels=True, c_in=12, c_out=12, groups=6, deform_groups=4),
    "four_units": Sharing(images=True, channels=True, c_in=8, groups=8, deform_groups=4, gradient_all_reduces=1),
    "four_units_over_both_axes": Sharing(
        images=False, channels=True, over_both_axes=True, c_in=8, groups=8, deform_groups=4
    ),
}


def run_on_four_devices(check, *arguments):
    run_python(
        f"import {check.__module__} as tests; tests.{check.__name__}(*{arguments!r})",
        Path(__file__).parent,
        # XLA ends the process where a busy machine lets a device wait for the others for 40 s.
        XLA_FLAGS="--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=600",
        JAX_DCN_IMPLEMENTATION=os.environ["JAX_DCN_IMPLEMENTATION"],
    )


def operands_of(case, data_format):
    """float32, in the data format."""
    # On the lattice lines rounding would decide between two derivatives.
    operands = in_format(data_format, case.smooth_operands("float32"))
    return {name: jnp.asarray(value) for name, value in operands.items()}


def function(case, data_format, **arguments):
    return lambda operands: jax_dcn.deform_conv2d(**operands, **case.arguments, data_format=data_format, **arguments)


def loss(f):
    return lambda operands: jnp.sin(f(operands)).sum()


def jvp(f):
    return lambda operands: jax.jvp(f, (operands,), (operands,))[1]


def hvp(f):
    return lambda operands: jax.jvp(jax.grad(loss(f)), (operands,), (operands,))[1]


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
    channels = ("images", "channels") if sharing.over_both_axes else "channels" if sharing.channels else None
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


@marks.implementations_and_formats
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


# --- what cannot be shared as it is placed ---


def on_one_axis(operands, data_format, names):
    """Shardings by name on a mesh of one axis: the images of these arrays, or their output channels."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    weight = P("d") if data_format == "NCHW" else P(None, None, None, "d")
    return {
        name: NamedSharding(mesh, P() if name not in names else weight if name == "weight" else P("d"))
        for name in operands
    }


@dataclasses.dataclass(frozen=True)
class Fallback:
    """What is sharded over four devices, and all that they may exchange for it."""

    sharded: tuple[str, ...] = ("weight",)
    channels: int = 8
    groups: int = 1
    deform_groups: int = 1
    forward: dict[str, int] = dataclasses.field(default_factory=lambda: {"all-gather": 1})
    gradients: dict[str, int] = dataclasses.field(default_factory=lambda: {"all-gather": 1})

    @property
    def case(self):
        sizes = dict(batch=4, c_in=self.channels, c_out=self.channels)
        return Case("fallback", **sizes, groups=self.groups, deform_groups=self.deform_groups)


# The weight, and the bias where it is sharded too, are gathered once, for the forward and the backward together.
FALLBACKS = {
    "images_and_channels": Fallback(OPERANDS, forward={"all-gather": 2}, gradients={"all-gather": 2, "all-reduce": 1}),
    "images_and_groups": Fallback(
        OPERANDS, groups=4, forward={"all-gather": 2}, gradients={"all-gather": 2, "all-reduce": 1}
    ),
    # No unit is smaller than the whole.
    "groups_across_deform_groups": Fallback(channels=12, groups=4, deform_groups=3),
    # Units that four devices do not divide.
    "six_groups": Fallback(channels=12, groups=6),
    "two_groups": Fallback(groups=2),
    "two_groups_of_two_deform_groups": Fallback(groups=2, deform_groups=4),
    "two_deform_groups_of_two_groups": Fallback(groups=4, deform_groups=2),
}


@marks.implementations_and_formats
def test_fallbacks(implementation, data_format):
    run_on_four_devices(check_fallbacks, data_format)


def check_fallbacks(data_format):
    # Plain XLA is slow to compile, and these have what the others have.
    native = os.environ["JAX_DCN_IMPLEMENTATION"] == "native"
    for name in FALLBACKS if native else ("images_and_channels", "groups_across_deform_groups", "two_groups"):
        print(name)
        fallback = FALLBACKS[name]
        operands = operands_of(fallback.case, data_format)
        shardings = on_one_axis(operands, data_format, fallback.sharded)
        placed = jax.device_put(operands, shardings)
        f = function(fallback.case, data_format)
        gradient = jax.grad(loss(f))
        for transformed, out_shardings, exchanged in (
            (f, None, fallback.forward),
            (gradient, shardings, fallback.gradients),
        ):
            shared = jax.jit(transformed, out_shardings=out_shardings).lower(placed).compile()
            assert_trees_close(shared(placed), jax.jit(transformed)(operands))
            assert collectives(shared) == exchanged


@marks.implementations_and_formats
def test_uneven_shards(implementation, data_format):
    """XLA pads the last shard, with anything: it must not enter the sums over images or channels."""
    run_on_four_devices(check_uneven_shards, data_format)


def check_uneven_shards(data_format):
    jax.config.update("jax_disable_most_optimizations", True)  # only the numbers count
    cases_of = {groups: Case("uneven", batch=8, c_out=8, groups=groups) for groups in (1, 2)}
    spec = on_one_axis(operands_of(cases_of[1], data_format), data_format, OPERANDS)

    def images(start, stop):
        return lambda operands: operands | {name: operands[name][start:stop] for name in PER_IMAGE}

    def channels(operands):
        out_axis = 0 if data_format == "NCHW" else 3
        weight = jax.lax.slice_in_dim(operands["weight"], 0, 6, axis=out_axis)
        return operands | {"weight": weight, "bias": operands["bias"][:6]}

    def constrained(names, change):
        def changed(operands):
            operands = change(operands)
            return operands | {name: jax.lax.with_sharding_constraint(operands[name], spec[name]) for name in names}

        return changed

    changes = [
        (PER_IMAGE, images(0, 6), 1),
        (("weight", "bias"), channels, 1),
        ((), constrained(PER_IMAGE, images(0, 6)), 1),
        (PER_IMAGE, images(1, 8), 1),
        (("weight", "bias"), channels, 2),
        ((), constrained(("x",), images(0, 6)), 1),
        ((), constrained(("weight",), channels), 1),
    ]
    # Plain XLA is slow to compile, and the first have what the others have.
    for sharded, change, groups in changes[: 7 if os.environ["JAX_DCN_IMPLEMENTATION"] == "native" else 3]:
        case = cases_of[groups]
        operands = operands_of(case, data_format)
        placed = jax.device_put(operands, on_one_axis(operands, data_format, sharded))
        f = function(case, data_format)
        both = jax.value_and_grad(lambda operands, f=f, change=change: (f(change(operands)) ** 2).sum())
        assert_trees_close(jax.jit(both)(placed), jax.jit(both)(operands))


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


@pytest.mark.parametrize(("name", "data_format"), [("images_and_channels", "NCHW"), ("two_groups", "NHWC")])
def test_explicit_fallbacks(implementation, name, data_format):
    run_on_four_devices(check_explicit_fallbacks, name, data_format)


def check_explicit_fallbacks(name, data_format):
    """An axis that both images and channels have is the images'. A bias need not be sharded as the weight is."""
    fallback = FALLBACKS[name]
    operands = operands_of(fallback.case, data_format)
    f = function(fallback.case, data_format)
    expected = jax.jit(f)(operands), jax.jit(jax.grad(loss(f)))(operands)
    specs = {name: sharding.spec for name, sharding in on_one_axis(operands, data_format, fallback.sharded).items()}
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(operand, NamedSharding(mesh, specs[name])) for name, operand in operands.items()}
        forward = jax.jit(f).lower(placed).compile()
        gradient = jax.jit(jax.grad(loss(f))).lower(placed).compile()
        actual = forward(placed), gradient(placed)
    assert_trees_close(actual, expected)
    if name == "images_and_channels":
        assert (collectives(forward), collectives(gradient)) == (fallback.forward, fallback.gradients)
        assert actual[0].sharding.is_equivalent_to(NamedSharding(mesh, P("d")), 4)
    for name, operand in placed.items():
        assert actual[1][name].sharding.is_equivalent_to(operand.sharding, operand.ndim), name


# --- a mesh that no argument is sharded over ---


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_arguments_of_no_mesh(implementation, axis_type):
    run_on_four_devices(check_arguments_of_no_mesh, axis_type)


def check_arguments_of_no_mesh(axis_type):
    """Under `jax.set_mesh`, as where a model is initialised, or where the program itself shards its arguments."""
    operands = operands_of(SHARINGS["images"].case, "NHWC")
    both = jax.value_and_grad(loss(function(SHARINGS["images"].case, "NHWC")))
    expected = both(operands)
    shard = jax.lax.with_sharding_constraint if axis_type == "Auto" else jax.sharding.reshard

    def sharding(operands):
        return both({name: shard(operand, P("d" if name in PER_IMAGE else None)) for name, operand in operands.items()})

    with jax.set_mesh(jax.make_mesh((4,), ("d",), axis_types=(getattr(AxisType, axis_type),))):
        for actual in (both(operands), jax.jit(both)(operands)):
            assert_trees_close(actual, expected)
        compiled = jax.jit(sharding).lower(operands).compile()
        assert_trees_close(compiled(operands), expected)
    assert not collectives(compiled).keys() - {"all-reduce"}


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


@pytest.mark.parametrize("manual", [("images", "channels"), ("images",)], ids="-".join)
def test_shard_map_shares_the_work(implementation, manual):
    run_on_four_devices(check_shard_map_shares_the_work, manual)


def check_shard_map_shares_the_work(manual):
    sharing = SHARINGS["images"]
    operands = operands_of(sharing.case, "NCHW")
    shardings, of_y = sharded(sharing, operands, "NCHW")
    specs = {name: sharding.spec for name, sharding in shardings.items()}
    f = function(sharing.case, "NCHW")
    mapped = jax.shard_map(f, mesh=of_y.mesh, in_specs=(specs,), out_specs=of_y.spec, axis_names=set(manual))
    placed = jax.device_put(operands, shardings)
    for shared, alone, exchanged in (
        (mapped, f, {}),
        (jax.grad(loss(mapped)), jax.grad(loss(f)), {"all-reduce": 1}),
    ):
        shared = jax.jit(shared).lower(placed).compile()
        assert collectives(shared) == exchanged
        # XLA has some of it on every device, such as the pixels' own places.
        assert 0 < work(shared) <= 1.2 * work(jax.jit(alone).lower(operands).compile()) / sharing.shares
