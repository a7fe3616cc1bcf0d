"""The CUDA kernels' own sources, run on the CPU with all of the harness's checks: the numbers.

See device_on_cpu.h. That the instructions do what they are documented to do, and how fast, only a GPU can show.
"""

import dataclasses

import numpy as np
import on_cpu
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import cases, unweighted
from support.cases import (
    AWKWARD,
    DTYPES,
    DTYPES_OF_16_BITS,
    ISLAND,
    OPERANDS,
    PER_IMAGE,
    SUBSETS,
    UNUSABLE,
    Case,
    by_definition,
    gradients_by_definition,
)
from support.formats import to_nhwc
from support.strategies import SETTINGS, geometries
from support.tolerances import TOLERANCES

# What the rounding of products' operands adds to the tolerances, relative to the sum of the terms' magnitudes: terms of
# few pixels may cancel. Samples are rounded to 8 bits in bfloat16 and to 11 in float16; TF32 has 11 bits, and both
# operands are rounded.
ROUNDED = {"tf32": 2**-9, "bfloat16": 2**-8, "float16": 2**-11}

# Most of the awkward geometries have groups so small that kernels of their own take them, and these have not.
LARGER_GROUPS = [
    dataclasses.replace(case, name=f"{case}_more_outputs", c_out=case.c_out + 17 * case.groups) for case in AWKWARD
]

# More groups than a block takes, more outputs than inputs and the reverse, groups across the borders of vectors and of
# deform groups, and more pixels than one part of the sums.
SMALL_GROUPS = [
    Case("depthwise_130", batch=1, c_in=130, c_out=130, groups=130, size=(7, 6)),
    Case("depthwise_deform_groups_3", c_in=24, c_out=24, groups=24, deform_groups=3, size=(7, 6), mask=False),
    Case("groups_of_3_and_5", c_in=36, c_out=60, groups=12, deform_groups=9),
    Case("groups_of_1_and_16", batch=1, c_in=5, c_out=80, groups=5),
    Case("groups_of_16_and_1", batch=1, c_in=160, c_out=10, groups=10, bias=False),
    Case("groups_of_7_and_16", batch=1, c_in=77, c_out=176, groups=11, deform_groups=7),
    Case("several_parts", batch=1, c_in=6, c_out=6, groups=6, size=(47, 45), kernel=(1, 2), padding=(0, 0)),
]

# Groups that blocks take several of: of one vector, two and four, by type; with a last bundle that is not full, with
# fewer outputs than inputs, of channels that are padded, and with several deform groups in a bundle.
BUNDLES = [
    Case("groups_of_4", batch=1, c_in=36, c_out=36, groups=9, deform_groups=3),
    Case("groups_of_8", c_in=72, c_out=72, groups=9, size=(7, 6)),
    Case("groups_of_8_deform_groups_of_16", batch=1, c_in=80, c_out=80, groups=10, deform_groups=5),
    Case("groups_of_8_and_5", batch=1, c_in=128, c_out=80, groups=16, kernel=(2, 2), padding=(0, 0), bias=False),
    Case("groups_of_8_and_5_of_few_taps", batch=1, c_in=72, c_out=45, groups=9, kernel=(1, 2), padding=(0, 0)),
    Case("groups_of_16", batch=1, c_in=80, c_out=80, groups=5, size=(14, 11), mask=False),
    Case("groups_of_15_and_13", batch=1, c_in=75, c_out=65, groups=5, deform_groups=5),
    Case("groups_of_32", batch=1, c_in=96, c_out=96, groups=3, deform_groups=2, stride=(2, 1)),
]

# The widest tiles are taken only where that leaves enough blocks for a GPU, and are not full here.
WIDE_TILES = [
    Case("128_columns", batch=1, c_in=40, c_out=100, size=(131, 129), kernel=(1, 2), padding=(0, 0), mask=False),
    Case("256_columns", batch=1, c_in=40, c_out=200, size=(131, 129), kernel=(1, 2), padding=(0, 0), mask=False),
]

SEVERAL_TILES = Case(
    "several_tiles", batch=1, c_in=70, c_out=270, size=(5, 6), kernel=(1, 2), padding=(0, 0), mask=False
)

TURING = [
    Case("larger_groups", c_in=36, c_out=70, groups=2, deform_groups=3, size=(7, 6)),
    SEVERAL_TILES,
    SMALL_GROUPS[0],
    *BUNDLES,
]

# Without a weight: deform groups of all sizes around vectors, alone and side by side.
DEFORM_GROUPS = [
    Case(f"{groups}_groups_of_{size}", batch=1, c_in=groups * size, deform_groups=groups)
    for size in (1, 2, 3, 4, 5, 16, 17)
    for groups in (1, 3)
]

# More channels than a block owns; groups that have more vectors than a warp, and than a block, has threads; more pairs,
# and more taps of a single pair, than a block locates at a time.
SUMS = [
    Case("group_of_300", batch=1, c_in=300, size=(3, 2), kernel=(2, 2), padding=(0, 0), mask=False),
    Case("group_of_1040", batch=1, c_in=1040, size=(3, 2), kernel=(2, 2), padding=(0, 0)),
    Case("130_groups_of_2", batch=2, c_in=260, size=(3, 2), kernel=(1, 2), padding=(0, 0), deform_groups=130),
    Case("kernel_40x40", batch=1, c_in=12, size=(41, 40), kernel=(40, 40), padding=(0, 0), deform_groups=3),
    Case("kernel_7x7", batch=1, c_in=24, kernel=(7, 7), padding=(3, 3), deform_groups=6, mask=False),
    Case("several_blocks", c_in=20, size=(14, 11), stride=(1, 2), padding=((2, 1), (0, 3)), deform_groups=5),
    Case("dilation", c_in=8, size=(9, 8), kernel=(2, 3), stride=(2, 3), padding=(2, 1), dilation=(3, 2)),
]


def assert_close(mode, actual, expected, name, magnitude, rounded=ROUNDED):
    """To the tolerances of the largest value, and of the largest `magnitude` where products' operands were rounded."""
    sums = "float64" if mode == "float64" else "float32"
    tolerance = max(TOLERANCES[actual.dtype.name], TOLERANCES[sums])
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    atol = tolerance * np.abs(expected).max(initial=1) + rounded.get(mode, 0) * np.max(magnitude, initial=1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=f"{mode} {name}")


def absolute(operands):
    """Operands that give the sum of the terms' magnitudes: interpolation weights are not negative."""
    return {name: a if name == "offset" else np.abs(a) for name, a in operands.items()}


def check(programs, case, mode, operands, given=None, rounded=ROUNDED, **arguments):
    """The result and all gradients against the definition. The kernels may be `given` other operands."""
    given = given or operands
    y = on_cpu.run(programs, case, mode, given, **arguments)
    assert_close(mode, y, by_definition(case, operands), "y", by_definition(case, absolute(operands)), rounded)
    cotangent = case.cotangent(y.dtype)
    gradients = on_cpu.run(programs, case, mode, given, cotangent, **arguments)
    expected = gradients_by_definition(case, operands, cotangent)
    magnitude = gradients_by_definition(case, absolute(operands), np.abs(cotangent))
    # Differences of x have either sign, so magnitudes of x do not tell that of the gradient of offset.
    magnitude["offset"] = 2 * np.abs(expected["offset"])
    assert gradients.keys() == given.keys()
    for name, gradient in gradients.items():
        assert_close(mode, gradient, expected[name], name, magnitude[name], rounded)


def of_sums(case):
    """The case without a weight, and so without products: each channel by itself, and no bias."""
    return dataclasses.replace(case, c_out=case.c_in, groups=case.c_in, bias=False)


def without_weight(operands):
    return {name: operands[name] for name in PER_IMAGE if name in operands}


def check_sums(programs, case, mode, operands, given=None, **arguments):
    """The same of a call without a weight, whose definition has one of ones."""
    case = of_sums(case)
    ones = np.ones((case.c_in, 1, *case.kernel), operands["x"].dtype)
    given = without_weight(given or operands)
    check(programs, case, mode, {**without_weight(operands), "weight": ones}, given, rounded={}, **arguments)


@pytest.mark.parametrize("mode", on_cpu.MODES)
@pytest.mark.parametrize("case", [*AWKWARD, *LARGER_GROUPS, *SMALL_GROUPS, *BUNDLES, SEVERAL_TILES], ids=str)
def test_awkward_geometries(programs, case, mode):
    check(programs, case, mode, case.operands(on_cpu.dtype_of(mode)))


@pytest.mark.parametrize("mode", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", WIDE_TILES, ids=str)
@pytest.mark.parametrize("architecture", [750, 900])
def test_wide_tiles(programs, case, mode, architecture):
    operands = case.operands(on_cpu.dtype_of(mode))
    y = on_cpu.run(programs, case, mode, operands, architecture=architecture)
    assert_close(mode, y, by_definition(case, operands), "y", by_definition(case, absolute(operands)))


@pytest.mark.parametrize("groups", [1, 4])
def test_tf32_operands_are_rounded_to_nearest(programs, groups):
    """Tensor cores would truncate them. Samples are pixels here, and groups of eight channels are in bundles."""
    case = Case("tf32", c_in=32, c_out=32, groups=groups, kernel=(1, 1), padding=(0, 0), mask=False)
    operands, cotangent = case.operands("float32"), case.cotangent("float32")
    operands["offset"][:] = 0

    def nearest(a):
        return ((a.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)

    rounded = {**operands, "x": nearest(operands["x"]), "weight": nearest(operands["weight"])}
    y = on_cpu.run(programs, case, "tf32", operands)
    np.testing.assert_array_equal(y, on_cpu.run(programs, case, "tf32", rounded))
    wanted = ("x", "weight")
    gradients = on_cpu.run(programs, case, "tf32", operands, cotangent, wanted)
    expected = on_cpu.run(programs, case, "tf32", rounded, nearest(cotangent), wanted)
    for name in wanted:
        np.testing.assert_array_equal(gradients[name], expected[name], err_msg=name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mode", on_cpu.MODES)
@pytest.mark.parametrize("case", TURING, ids=str)
def test_turing(programs, case, mode, deterministic):
    """Tensor cores for float16 only, no TF32, and narrower tiles in less shared memory."""
    rounded = {name: ROUNDED[name] for name in DTYPES_OF_16_BITS}
    operands = case.operands(on_cpu.dtype_of(mode))
    check(programs, case, mode, operands, rounded=rounded, deterministic=deterministic, architecture=750)


@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", TURING, ids=str)
def test_second_device(programs, case, mode):
    """It has less shared memory than the first, which is the current one."""
    check(programs, case, mode, case.operands(on_cpu.dtype_of(mode)), device=1)
    for wide in WIDE_TILES:
        y = {d: on_cpu.run(programs, wide, mode, wide.operands(on_cpu.dtype_of(mode)), device=d) for d in (0, 1)}
        np.testing.assert_array_equal(y[0], y[1])


@pytest.mark.parametrize("backward", [False, True])
def test_a_device_that_is_not_there_is_an_error(programs, backward):
    operands = SEVERAL_TILES.operands("float32")
    cotangent = SEVERAL_TILES.cotangent("float32") if backward else None
    with pytest.raises(on_cpu.Failure, match="exit status 4\nthe device: invalid device ordinal"):
        on_cpu.run(programs, SEVERAL_TILES, "float32", operands, cotangent, device=2)


@settings(
    SETTINGS,
    # `programs` is of the session, but tests/conftest.py's fixtures are not asked for.
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    case=geometries(),
    mode=st.sampled_from(on_cpu.MODES),
    displacement_dtype=st.sampled_from(["float32", None]),
    offset_scale=st.sampled_from([0, 0.25, 1, 8]),
    deterministic=st.booleans(),
    kind=st.sampled_from(["any", "larger_groups", "bundles"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_geometries(programs, case, mode, displacement_dtype, offset_scale, deterministic, kind, seed):
    if kind == "larger_groups":
        case = dataclasses.replace(case, c_out=case.c_out + 16 * case.groups)
    if kind == "bundles":
        case = dataclasses.replace(case, c_in=24 * 4 * case.groups, groups=3 * case.groups, c_out=3 * case.c_out)
    operands = case.operands(on_cpu.dtype_of(mode), seed)
    operands["offset"] *= offset_scale
    for name in {"offset", "mask"} & operands.keys():
        operands[name] = operands[name].astype(displacement_dtype or operands[name].dtype)
    check(programs, case, mode, operands, deterministic=deterministic, seed=seed)


@pytest.mark.parametrize("mode", on_cpu.MODES)
@pytest.mark.parametrize("groups", [2, 20])
def test_same_bits_in_any_order(programs, mode, groups):
    """Whatever the order of blocks and threads. grad_x is summed atomically unless asked otherwise."""
    case = Case("several_blocks", c_in=20, c_out=40, size=(14, 11), groups=groups, deform_groups=5)
    operands, cotangent = case.operands(on_cpu.dtype_of(mode)), case.cotangent(on_cpu.dtype_of(mode))
    results, gradients = [], []
    for seed in range(3):
        results.append(on_cpu.run(programs, case, mode, operands, seed=seed))
        gradients.append(on_cpu.run(programs, case, mode, operands, cotangent, seed=seed, deterministic=True))
    for other in (1, 2):
        np.testing.assert_array_equal(results[0], results[other])
        for name, gradient in gradients[0].items():
            np.testing.assert_array_equal(gradient, gradients[other][name], err_msg=name)
    default = on_cpu.run(programs, case, mode, operands, cotangent)
    for name in default.keys() - {"x"}:
        np.testing.assert_array_equal(gradients[0][name], default[name], err_msg=name)


@pytest.mark.parametrize("groups", [2, 12])
@pytest.mark.parametrize("wanted", [(name,) for name in OPERANDS] + [("x", "mask"), ("offset", "weight")], ids=str)
def test_gradients_alone(programs, wanted, groups):
    case = Case("alone", c_in=12, c_out=36, groups=groups, deform_groups=3)
    operands, cotangent = case.operands("float32"), case.cotangent("float32")
    everything = on_cpu.run(programs, case, "float32", operands, cotangent, deterministic=True)
    alone = on_cpu.run(programs, case, "float32", operands, cotangent, wanted=wanted, deterministic=True)
    assert alone.keys() == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(alone[name], everything[name])


@pytest.mark.parametrize("check", [check, check_sums])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unusable_coordinates(programs, dtype, check):
    operands, _ = cases.unusable_coordinates(dtype)
    check(programs, UNUSABLE, "float32", operands)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("check", [check, check_sums])
def test_pixels_that_no_sample_touches_do_not_leak(programs, check, value, deterministic):
    operands, untouched = cases.island()
    x = operands["x"].copy()
    x[:, :, untouched] = value
    check(programs, ISLAND, "float64", operands, {**operands, "x": x}, deterministic=deterministic)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("check", [check, check_sums])
def test_mask_of_a_tap_outside_the_image_is_not_read(programs, check, value):
    case = Case("outside", batch=1, padding=(2, 2))
    operands = case.operands()
    operands["offset"].reshape(-1, 2, *case.output_size)[4] = -50
    operands["mask"][:, 4] = 0
    mask = operands["mask"].copy()
    mask[:, 4] = value
    check(programs, case, "float64", operands, {**operands, "mask": mask})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("weighted", [True, False])
def test_values_that_are_not_finite_reach_what_they_touch(programs, weighted, value, deterministic):
    """One such number in grad_y, so that grad_x is not finite exactly where the samples of its pixel lie."""
    case = Case("not_finite", kernel=(1, 1), padding=(0, 0), mask=False)
    case = case if weighted else of_sums(case)
    operands, cotangent = case.operands("float32"), case.cotangent("float32")
    operands["offset"][:] = 0.25
    if not weighted:
        operands = without_weight(operands)
    cotangent[0, 1, 2, 3] = value
    gradients = on_cpu.run(programs, case, "float32", operands, cotangent, deterministic=deterministic)
    reached = np.zeros(operands["x"].shape, bool)
    reached[0, slice(None) if weighted else 1, 2:4, 3:5] = True
    np.testing.assert_array_equal(np.isfinite(gradients["x"]), ~reached)


@pytest.mark.parametrize("mode", on_cpu.MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("channels", [1, 8, 16])
def test_values_that_are_not_finite_stay_in_their_group(programs, channels, value, mode):
    """Groups that share blocks and vectors, or bundles."""
    outputs = 2 if channels == 1 else channels
    case = Case("not_finite", batch=1, c_in=12 * channels, c_out=12 * outputs, groups=12)
    own_in, own_out = slice(5 * channels, 6 * channels), slice(5 * outputs, 6 * outputs)
    operands, cotangent = case.operands(on_cpu.dtype_of(mode)), case.cotangent(on_cpu.dtype_of(mode))
    y = on_cpu.run(programs, case, mode, operands)
    gradients = on_cpu.run(programs, case, mode, operands, cotangent, wanted=("weight",))
    operands["x"][:, own_in] = value
    changed = on_cpu.run(programs, case, mode, operands)
    changed_gradients = on_cpu.run(programs, case, mode, operands, cotangent, wanted=("weight",))
    assert not np.isfinite(np.asarray(changed[:, own_out], np.float32)).all()
    np.testing.assert_array_equal(np.delete(changed, own_out, 1), np.delete(y, own_out, 1))
    others = [np.delete(g["weight"], own_out, 0) for g in (gradients, changed_gradients)]
    np.testing.assert_array_equal(*others)

    operands = case.operands(on_cpu.dtype_of(mode))
    gradients = on_cpu.run(programs, case, mode, operands, cotangent, wanted=("x",), deterministic=True)
    operands["weight"][own_out] = value
    changed_gradients = on_cpu.run(programs, case, mode, operands, cotangent, wanted=("x",), deterministic=True)
    assert not np.isfinite(changed_gradients["x"][:, own_in]).all()
    others = [np.delete(g["x"], own_in, 1) for g in (gradients, changed_gradients)]
    np.testing.assert_array_equal(*others)


# --- without a weight ---


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("case", [*DEFORM_GROUPS, *SUMS, *AWKWARD], ids=str)
def test_sums(programs, case, mode):
    check_sums(programs, case, mode, case.operands(mode))


@pytest.mark.parametrize(("architecture", "device", "deterministic"), [(900, 0, True), (750, 0, False), (900, 1, True)])
@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums_in_order_and_elsewhere(programs, case, mode, architecture, device, deterministic):
    where = dict(architecture=architecture, device=device, deterministic=deterministic)
    check_sums(programs, case, mode, case.operands(mode), **where)


@settings(SETTINGS, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=geometries(),
    channels=st.integers(1, 20),
    mode=st.sampled_from(DTYPES),
    displacement_dtype=st.sampled_from(["float32", None]),
    offset_scale=st.sampled_from([0, 0.25, 1, 8]),
    deterministic=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_sums(programs, case, channels, mode, displacement_dtype, offset_scale, deterministic, seed):
    case = dataclasses.replace(case, c_in=channels * case.deform_groups, c_out=1, groups=1)
    operands = case.operands(mode, seed)
    operands["offset"] *= offset_scale
    for name in {"offset", "mask"} & operands.keys():
        operands[name] = operands[name].astype(displacement_dtype or mode)
    check_sums(programs, case, mode, operands, deterministic=deterministic, seed=seed)


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("case", [SUMS[0], SUMS[2], SUMS[5]], ids=str)
def test_same_bits_of_sums_in_any_order(programs, case, mode):
    case = of_sums(case)
    operands, cotangent = without_weight(case.operands(mode)), case.cotangent(mode)
    results, gradients = [], []
    for seed in range(3):
        results.append(on_cpu.run(programs, case, mode, operands, seed=seed))
        gradients.append(on_cpu.run(programs, case, mode, operands, cotangent, seed=seed, deterministic=True))
    default = on_cpu.run(programs, case, mode, operands, cotangent)
    for other in (1, 2):
        np.testing.assert_array_equal(results[0], results[other])
        for name, gradient in gradients[0].items():
            np.testing.assert_array_equal(gradient, gradients[other][name], err_msg=name)
    for name in default.keys() - {"x"}:
        np.testing.assert_array_equal(gradients[0][name], default[name], err_msg=name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wanted", [s for s in SUBSETS if set(s) < set(PER_IMAGE)], ids=str)
@pytest.mark.parametrize("channels", [4, 5])
def test_gradients_of_sums_alone(programs, channels, wanted, deterministic):
    """With and without padding, which has work space for grad_x only if that is wanted."""
    case = of_sums(Case("alone", c_in=3 * channels, deform_groups=3))
    operands, cotangent = without_weight(case.operands("float32")), case.cotangent("float32")
    everything = on_cpu.run(programs, case, "float32", operands, cotangent, deterministic=True)
    alone = on_cpu.run(programs, case, "float32", operands, cotangent, wanted=wanted, deterministic=deterministic)
    assert alone.keys() == set(wanted)
    for name in wanted:
        atol = 0 if deterministic or name != "x" else 1e-5
        np.testing.assert_allclose(alone[name], everything[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("mode", DTYPES)
def test_taps_down_the_columns(programs, mode):
    """The same samples in another order, in which they are summed."""
    case = of_sums(Case("down", c_in=10, kernel=(2, 3), stride=(2, 1), dilation=(1, 2), deform_groups=2))
    operands, cotangent = without_weight(case.operands(mode)), case.cotangent(mode)

    def turned(name, array, kernel=case.kernel):
        if name == "x":
            return array
        by_tap = array.reshape(case.batch, case.deform_groups, *kernel, -1, *case.output_size).swapaxes(2, 3)
        return by_tap[:, :, :, :, ::-1].reshape(array.shape)

    down = {name: turned(name, array) for name, array in operands.items()}
    y, y_down = (on_cpu.run(programs, case, mode, a, x_first=a is down) for a in (operands, down))
    assert_close(mode, y_down, y, "y", 0, {})
    gradients = on_cpu.run(programs, case, mode, operands, cotangent)
    of_down = on_cpu.run(programs, case, mode, down, cotangent, x_first=True)
    assert_close(mode, of_down["x"], gradients["x"], "x", 0, {})
    for name in ("offset", "mask"):
        np.testing.assert_array_equal(turned(name, of_down[name], case.kernel[::-1]), gradients[name], err_msg=name)


@dataclasses.dataclass(frozen=True)
class Attention(Case):
    """As the public function calls the kernels: a row of pixels and one of queries, whose taps the points are."""

    levels: tuple = ()
    points: int = 1
    queries: int = 1

    def __post_init__(self):
        row = (1, sum(h * w for h, w in self.levels))
        none = dict(stride=(0, 0), padding=(0, 0), dilation=(0, 0))
        derived = dict(none, size=row, kernel=(self.points, len(self.levels)), c_out=self.c_in, groups=self.c_in)
        for name, value in {**derived, "bias": False}.items():
            object.__setattr__(self, name, value)

    @property
    def output_size(self):
        return 1, self.queries


ATTENTION = [
    Attention("detr", c_in=24, deform_groups=3, levels=((6, 5), (3, 3), (2, 1), (1, 1)), points=4, queries=9),
    Attention("one_level", c_in=10, deform_groups=2, levels=((1, 7),), points=3, queries=50, mask=False),
    Attention("eight_levels", batch=1, c_in=5, levels=((2, 3),) * 7 + ((4, 1),), queries=40),
    Attention("windows", batch=1, c_in=1040, levels=((3, 4), (5, 2)), points=600),
    Attention("no_queries", c_in=8, deform_groups=2, levels=((2, 3), (1, 2)), points=2, queries=0),
    Attention("no_images", batch=0, c_in=8, levels=((2, 3), (1, 2)), points=2, queries=3),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_levels(programs, case, mode, deterministic):
    """Locations are multiples of 1/64, some of them on borders and outside, and some lead nowhere."""
    operands, cotangent = without_weight(case.operands(mode)), case.cotangent(mode)
    rng = np.random.default_rng(3)
    locations = rng.integers(-16, 80, operands["offset"].shape) / 64
    if locations.size:
        locations.flat[rng.choice(locations.size, 3, replace=False)] = np.nan, np.inf, -1e30
    with np.errstate(over="ignore"):
        operands["offset"] = locations.astype(operands["offset"].dtype)
    call = dict(x_first=True, levels=case.levels)
    y = on_cpu.run(programs, case, mode, operands, **call)
    gradients = on_cpu.run(programs, case, mode, operands, cotangent, deterministic=deterministic, **call)

    n, _, (_, pixels), heads = case.batch, case.c_in, case.size, case.deform_groups
    by_point = (n, case.queries, heads, len(case.levels), case.points)
    shapes = {"x": (n, pixels, heads, case.c_in // heads), "offset": (*by_point, 2), "mask": by_point}
    arrays = {name: to_nhwc(array).reshape(shapes[name]) for name, array in operands.items()}
    arrays.setdefault("mask", np.ones(by_point))
    of_y = (n, case.queries, case.c_in)
    expected_y, expected = unweighted.attention(
        arrays["x"], case.levels, arrays["offset"], arrays["mask"], to_nhwc(cotangent).reshape(of_y)
    )
    assert_close(mode, to_nhwc(y).reshape(of_y), expected_y, "y", 0, {})
    assert gradients.keys() == operands.keys()
    for name, gradient in zip(PER_IMAGE, expected, strict=True):
        if name in gradients:
            assert_close(mode, to_nhwc(gradients[name]).reshape(shapes[name]), gradient, name, 0, {})
