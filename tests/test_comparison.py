"""jax_dcn.mmcv.compare: a port beside its original in torch."""

import concurrent.futures
import importlib.util
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.models_golden import GoldenModel

from jax_dcn import mmcv
from jax_dcn.mmcv.nn import BatchNorm2d, Conv2d, ConvModule, Linear, Scale, Sequential
from jax_dcn.mmcv.nn.parameters import freeze_parameters

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def seed():
    """torch's initial values are random."""
    torch.manual_seed(0)


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reppoints():
    """The port, the original with the same weights, and an input."""
    pytest.importorskip("matplotlib")
    golden = GoldenModel("reppoints")
    original = imported(ROOT / "tests" / "data" / "make_models.py").RepPoints(**golden.config)
    original.load_state_dict({key: torch.from_numpy(np.array(a)) for key, a in golden.state_dict.items()})
    build = imported(ROOT / "examples" / "reppoints.py").RepPointsHead
    head = build(**golden.config, rngs=nnx.Rngs(0))
    return mmcv.load_into(head, golden.state_dict), original, golden.inputs[0]


def test_a_port_agrees(reppoints):
    head, original, x = reppoints
    comparison = mmcv.compare(head, original, x)
    assert [row.name for row in comparison.outputs] == [
        *(f"{tower}_convs.{i}.{part}" for i in range(2) for tower in ("cls", "reg") for part in ("conv", "gn")),
        *("reppoints_pts_init_conv", "reppoints_pts_init_out"),
        *("reppoints_cls_conv", "reppoints_cls_out", "reppoints_pts_refine_conv", "reppoints_pts_refine_out"),
        *("[0]", "[1]", "[2]"),
    ]
    assert comparison.outputs[0].shape == (2, 16, 9, 13)
    assert max(row.error for row in comparison.outputs) < 1e-5
    assert {row.name for row in comparison.gradients} == {name for name, _ in original.named_parameters()}
    assert comparison.agrees, str(comparison)
    assert comparison.first is None


@pytest.mark.parametrize("mistake", ["epsilon", "order", "stride"])
def test_one_planted_mistake_is_named(reppoints, mistake):
    head, original, x = reppoints
    head = nnx.clone(head)
    if mistake == "epsilon":  # a hundred times larger than it is wrong in Flax's default, for small numbers here
        head.reg_convs[1].gn.epsilon, first = 1e-3, "reg_convs.1.gn"
    elif mistake == "order":
        pixels = nnx.Param(head.reppoints_pts_init_out.bias[...].reshape(9, 2)[:, ::-1].reshape(18))
        head.reppoints_pts_init_out.bias, first = pixels, "reppoints_pts_init_out"
    else:
        head.reppoints_cls_conv.dilation, first = (2, 2), "reppoints_cls_conv"
        head.reppoints_cls_conv.padding = (2, 2)
    comparison = mmcv.compare(head, original, x)
    assert not comparison.agrees
    assert comparison.first.name == first
    assert comparison.weights == (("reppoints_pts_init_out.bias",) if mistake == "order" else ())
    line = next(line for line in str(comparison).splitlines() if line.endswith("the first that differs"))
    assert line.startswith(f"* {first} ")
    later = [row for row in comparison.outputs if comparison.differs(row)]
    assert later[0] is comparison.first
    assert len(later) > 1


class Small(nnx.Module):
    def __init__(self, data_format="NHWC"):
        options = dict(data_format=data_format, rngs=nnx.Rngs(0))
        self.conv = Conv2d(3, 8, 3, padding=1, **options)
        self.bn = BatchNorm2d(8, **options)
        self.scale = Scale(1.5)
        self.data_format = data_format

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        return {"both": [x, self.scale(self.scale(x))]}


class TorchScale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return x * self.scale


class TorchSmall(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.relu, self.scale = torch.nn.ReLU(inplace=True), TorchScale()

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return {"both": [x, self.scale(self.scale(x))]}


def ported(build, original):
    return mmcv.load_into(build(), {key: array.numpy() for key, array in original.state_dict().items()})


def small(data_format="NHWC"):
    original = TorchSmall()
    arrays = {key: array.numpy() for key, array in original.state_dict().items()}
    return mmcv.load_into(Small(data_format), arrays), original


X = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)


def test_gradients_and_calls(data_format):
    """Of images with as many channels as rows and columns, in which the layouts cannot be told by the shape."""
    module, original = small(data_format)
    comparison = mmcv.compare(module, original, X)
    assert comparison.agrees, str(comparison)
    assert [row.name for row in comparison.outputs] == [
        *("conv", "bn", "scale (call 1)", "scale (call 2)", "[both][0]", "[both][1]"),
    ]
    assert {row.name for row in comparison.gradients} == {
        "conv.weight",
        "conv.bias",
        "bn.weight",
        "bn.bias",
        "scale.scale",
    }
    assert comparison.unmatched == ("relu",)
    text = str(comparison)
    assert "submodules of torch without a counterpart here (1): relu" in text
    assert text.endswith("nothing differs")


def test_neither_is_changed():
    module, original = small()
    before = mmcv.to_state_dict(module)
    calls = {cls: cls.__call__ for cls in (Small, Conv2d, BatchNorm2d, Scale)}
    comparison = mmcv.compare(module, original, X, training=True)
    assert comparison.agrees, str(comparison)  # with the bias before the normalization, whose gradient is rounding
    after = mmcv.to_state_dict(module)
    assert all(np.array_equal(after[key], array) for key, array in before.items())
    assert original.bn.num_batches_tracked == 0
    assert original.training
    assert all(cls.__call__ is call for cls, call in calls.items())


def test_the_calls_come_back_after_an_error():
    module, _ = small()
    call = Conv2d.__call__
    with pytest.raises(ValueError, match="x has 5 channels"):
        mmcv.compare(module, torch.nn.Identity(), np.ones((1, 5, 4, 4), np.float32))
    assert Conv2d.__call__ is call


def test_training_is_another_comparison():
    module, original = small()
    evaluated, trained = (mmcv.compare(module, original, X, training=training) for training in (False, True))
    assert evaluated.agrees
    assert trained.agrees
    assert evaluated.gradients[0].shape == trained.gradients[0].shape
    module.bn.momentum = 0.5  # which only shows in the statistics afterwards
    module.bn.norm_eval = True
    assert mmcv.compare(module, original, X).agrees
    assert mmcv.compare(module, original, X, training=True).first.name == "bn"


def test_weights_that_were_not_loaded():
    comparison = mmcv.compare(Small(), TorchSmall(), X)
    assert comparison.weights == ("conv.weight", "conv.bias")
    assert "weights that differ, or that only one of them has (2): conv.weight, conv.bias" in str(comparison)


def test_a_gradient_that_is_wrong():
    """The outputs do not show it."""

    class Stopped(Small):
        def __call__(self, x):
            return super().__call__(jax.lax.stop_gradient(x)) | {"weight": jax.lax.stop_gradient(self.conv.bias[...])}

    class TorchNotStopped(TorchSmall):
        def forward(self, x):
            return super().forward(x) | {"weight": self.conv.bias}

    original = TorchNotStopped()
    module = ported(Stopped, original)
    comparison = mmcv.compare(module, original, X)
    assert comparison.first is None
    assert [row.name for row in comparison.gradients if comparison.differs(row)] == ["conv.bias"]


def test_other_shapes_and_other_counts():
    class Half(Small):
        def __call__(self, x):
            x = self.bn(self.conv(x))[:, ::2]
            return {"both": [nnx.relu(x), self.scale(x)]}

    _, original = small()
    module = ported(Half, original)
    comparison = mmcv.compare(module, original, X)
    notes = {row.name: row.note for row in comparison.outputs}
    assert notes["scale (call 1)"] == "shape (2, 4, 8, 8) here"
    assert notes["scale (call 2)"] == "not called here, or inside of a transformation"
    assert comparison.gradients == ()
    assert not comparison.agrees


@pytest.mark.parametrize(
    ("transform", "note"),
    [
        (
            lambda module, x: jax.checkpoint(lambda x: module.bn(module.conv(x)))(x),
            "not seen, inside of a transformation",
        ),
        (
            lambda module, x: nnx.jit(lambda module, x: module.bn(module.conv(x)))(module, x),
            "not called here, or inside of a transformation",
        ),
    ],
)
def test_what_a_transformation_hides(transform, note):
    class Hidden(Small):
        def __call__(self, x):
            x = nnx.relu(transform(self, x))
            return {"both": [x, self.scale(self.scale(x))]}

    _, original = small()
    comparison = mmcv.compare(ported(Hidden, original), original, X)
    assert comparison.outputs[0].note == note
    assert comparison.outputs[-1].error < 1e-5
    assert not comparison.agrees


def test_a_layer_that_is_not_called_or_too_often():
    class Forgotten(Small):
        def __call__(self, x):
            x = nnx.relu(self.conv(x))
            return {"both": [x, self.scale(self.scale(self.scale(x)))]}

    _, original = small()
    comparison = mmcv.compare(ported(Forgotten, original), original, X)
    notes = {row.name: row.note for row in comparison.outputs}
    assert notes["bn"] == "not called here, or inside of a transformation"
    assert comparison.first.name == "bn"
    assert comparison.unmatched == ("relu",)
    assert [row.note for row in comparison.outputs if row.name == "scale (call 2)"] == [
        *("", "called 3 times here, 2 in torch"),
    ]

    class TorchForgot(TorchSmall):
        def forward(self, x):
            x = self.relu(self.conv(x))
            return {"both": [x, self.scale(self.scale(x))]}

    module, _ = small()
    comparison = mmcv.compare(module, TorchForgot(), X)
    assert [row.name for row in comparison.outputs if row.note == "not called in torch"] == ["bn"]


def test_an_error_of_the_port_says_what_came_before():
    class Broken(Small):
        def __call__(self, x):
            x = self.bn(self.conv(x[:, 1:]))
            raise ValueError("shapes do not fit")

    _, original = small()
    with pytest.raises(ValueError, match="shapes do not fit") as caught:
        mmcv.compare(ported(Broken, original), original, X)
    (note,) = caught.value.__notes__
    assert note.startswith("compare: this is the port's. What it had done before:")
    assert "* conv" in note
    assert "shape (2, 7, 8, 8) here, the first that differs" in note
    assert "scale" not in note


def test_an_error_in_the_middle_of_calls_and_without_weights():
    """A layer that is shared is compared as far as it was called, and what was not loaded is told."""

    class Broken(Small):
        def __call__(self, x):
            self.scale(nnx.relu(self.bn(self.conv(x))))
            raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        mmcv.compare(Broken(), TorchSmall(), X)
    (note,) = caught.value.__notes__
    assert "scale (call 2)" not in note
    assert "only one of them has (2): conv.weight, conv.bias" in note


def test_an_error_of_the_gradient_says_what_came_before():
    class Constant(Small):
        def __call__(self, x):
            return super().__call__(x) | {"more": jnp.asarray(np.asarray(self.conv(x)))}

    class TorchConstant(TorchSmall):
        def forward(self, x):
            return super().forward(x) | {"more": self.conv(x)}

    original = TorchConstant()
    with pytest.raises(jax.errors.TracerArrayConversionError) as caught:
        mmcv.compare(ported(Constant, original), original, X)
    note = next(note for note in caught.value.__notes__ if note.startswith("compare:"))  # among JAX's own
    assert note.startswith("compare: this is of the gradients. What came before:\noutputs")
    assert note.endswith("nothing differs")


def test_an_infinite_gradient_hides_no_other():
    class Rooted(Small):
        def __call__(self, x):
            y = self.conv(x)
            return 0.1 * y + jax.lax.stop_gradient(0.9 * y), jnp.sqrt(self.scale.scale[...])

    class TorchRooted(TorchSmall):
        def forward(self, x):
            return self.conv(x), self.scale.scale.sqrt()

    original = TorchRooted()
    original.scale.scale.data.zero_()
    comparison = mmcv.compare(ported(Rooted, original), original, X)
    errors = {row.name: row.error for row in comparison.gradients}
    np.testing.assert_allclose(errors["conv.weight"], 0.9, rtol=1e-4)
    assert errors["scale.scale"] == 0


def test_a_container_that_only_one_side_calls():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = Sequential(Linear(4, 5, rngs=nnx.Rngs(0)), Linear(5, 2, rngs=nnx.Rngs(1)))

        def __call__(self, x):
            return self.layers(x)

    class Original(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Loop(Model):
        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    class Whole(Original):
        def forward(self, x):
            return self.layers(x)

    x = np.ones((3, 4), np.float32)
    for build, original, unmatched in ((Model, Original(), ()), (Loop, Whole(), ("layers",))):
        comparison = mmcv.compare(ported(build, original), original, x)
        assert comparison.agrees, str(comparison)
        assert comparison.unmatched == unmatched


def test_layers_in_several_places():
    """Of both, or of the port alone, whose second name is told once."""

    class Model(nnx.Module):
        def __init__(self):
            self.first = Linear(4, 4, rngs=nnx.Rngs(0))
            self.second = self.first

        def __call__(self, x):
            return self.second(self.first(x))

    class Original(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.first(self.first(x))

    original, x = Original(), np.ones((3, 4), np.float32)
    module = ported(Model, original)
    comparison = mmcv.compare(module, original, x)
    assert comparison.agrees, str(comparison)
    assert len(comparison.gradients) == 4
    del original.second
    comparison = mmcv.compare(module, original, x)
    assert set(comparison.weights) == {"second.weight", "second.bias"}
    assert not any(map(comparison.differs, comparison.outputs + comparison.gradients))


def test_what_torch_does_not_train():
    module, original = small()
    original.bn.weight.requires_grad_(False)
    comparison = mmcv.compare(module, original, X)
    assert {row.name: row.note for row in comparison.gradients if row.note} == {"bn.weight": "not trained in torch"}
    freeze_parameters(module.conv)
    comparison = mmcv.compare(module, original.requires_grad_(True), X)
    assert {row.name: row.note for row in comparison.gradients if row.note} == {
        "conv.weight": "not trained here",
        "conv.bias": "not trained here",
    }


def test_a_bare_conv_module_of_either_format(data_format):
    original = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3))
    module = ConvModule(3, 5, 3, act_cfg=None, data_format=data_format, rngs=nnx.Rngs(0))
    mmcv.load_into(module, {f"conv.{key}": a.numpy() for key, a in original[0].state_dict().items()})
    comparison = mmcv.compare(module, original, X)
    assert comparison.outputs[-1].error < 1e-5


@torch.no_grad()
def test_gradients_are_compared_whatever_torchs_mode():
    module, original = small()
    assert len(mmcv.compare(module, original, X).gradients) == 5


def test_infinities():
    """As in masked scores: where they are in both, the others are compared."""

    class Masked(Small):
        def __call__(self, x):
            return jnp.where(jnp.arange(8).reshape(1, 1, 1, 8) < 3, -jnp.inf, self.conv(x))

    class TorchMasked(TorchSmall):
        def forward(self, x):
            return self.conv(x).masked_fill(torch.arange(8).reshape(1, 8, 1, 1) < 3, -torch.inf)

    original = TorchMasked()
    module = ported(Masked, original)
    assert mmcv.compare(module, original, X).outputs[-1].error < 1e-5
    module.conv.bias[...] = module.conv.bias[...] + 1
    assert mmcv.compare(module, original, X).outputs[-1].error > 0.01


def test_statistics_after_training():
    module, original = small()
    module.bn.momentum = 0.5
    assert mmcv.compare(module, original, X).agrees
    assert mmcv.compare(module, original, X, training=True).weights == ("bn.running_mean", "bn.running_var")


def test_named_tuples_and_the_order_of_dicts():
    class Pair(typing.NamedTuple):
        a: typing.Any
        b: typing.Any

    class Model(Small):
        def __call__(self, pair):
            return {"z": self.conv(pair.a), "y": self.conv(pair.b)}

    class Original(TorchSmall):
        def forward(self, pair):
            return {"y": self.conv(pair.b), "z": self.conv(pair.a)}

    original = Original()
    comparison = mmcv.compare(ported(Model, original), original, Pair(X, X + 1))
    assert [row.name for row in comparison.outputs] == ["conv (call 1)", "conv (call 2)", "[y]", "[z]"]
    assert {row.name for row in comparison.outputs if comparison.differs(row)} == {"conv (call 1)", "conv (call 2)"}


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_inputs_take_the_dtype_of_torchs_parameters(dtype):
    module, original = small()
    assert mmcv.compare(module, original, X.astype(dtype)).agrees


def test_bfloat16():
    module, original = small()
    x = torch.from_numpy(X).bfloat16()
    comparison = mmcv.compare(module, original.bfloat16(), x)
    # A few roundings of 2^-8. Where one takes a value past the ReLU's zero, the gradients part company.
    assert max(row.error for row in comparison.outputs) < 2**-6
    assert all(np.isfinite(row.error) for row in comparison.gradients)
    assert len(comparison.gradients) == 5


def test_threads():
    call = Conv2d.__call__
    module, original = small()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        comparisons = [*pool.map(lambda _: mmcv.compare(module, original, X), range(8))]
    assert all(comparison.agrees for comparison in comparisons)
    assert Conv2d.__call__ is call


def test_a_result_without_arrays():
    class Original(torch.nn.Module):
        def forward(self, x):
            return "nothing"

    with pytest.raises(TypeError, match="compare: torch_module must return arrays"):
        mmcv.compare(small()[0], Original(), X)


def test_containers_of_inputs_and_sequential():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.Sequential(Linear(4, 5, rngs=nnx.Rngs(0)), nnx.relu, Linear(5, 2, rngs=nnx.Rngs(1)))

        def __call__(self, xs, options, factor):
            return tuple(self.layers(x) * factor + options["shift"] for x in xs)

    class Original(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))

        def forward(self, xs, options, factor):
            return tuple(self.layers(x) * factor + options["shift"] for x in xs)

    original = Original()
    module = ported(Model, original)
    xs = [np.ones((3, 4), np.float32), torch.ones(1, 4)]
    comparison = mmcv.compare(module, original, xs, {"shift": jnp.ones((1, 2), jnp.float32)}, 2.0)
    assert comparison.agrees, str(comparison)
    names = ["layers.0", "layers.2", "layers"]
    assert [row.name for row in comparison.outputs] == [
        *(f"{name} (call {call})" for call in (1, 2) for name in names),
        *("[0]", "[1]"),
    ]


def test_nan_differs():
    module, original = small()
    module.conv.bias[...] = module.conv.bias[...].at[0].set(jnp.nan)
    assert mmcv.compare(module, original, X).first.name == "conv"


def test_what_is_no_module():
    module, original = small()
    with pytest.raises(TypeError, match=r"^compare: module must be an nnx module, got TorchSmall$"):
        mmcv.compare(original, original, X)
    with pytest.raises(TypeError, match=r"^compare: torch_module must be a torch\.nn\.Module, got Small$"):
        mmcv.compare(module, module, X)
    with pytest.raises(ValueError, match=r"^compare: data_format must be one of"):
        mmcv.compare(module, original, X, data_format="CHW")
