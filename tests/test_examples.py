"""The ports in examples/: the numbers of the PyTorch originals, and that they run."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.formats import to_nchw, to_nhwc
from support.models_golden import GoldenModel

from jax_dcn import mmcv
from jax_dcn.mmcv.nn import interpolate

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = Path(__file__).parent / "data"


def example(name):
    pytest.importorskip("matplotlib")
    pytest.importorskip("optax")
    pytest.importorskip("tqdm")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def load(golden, build):
    # As a detector's checkpoint has them.
    state_dict = {f"part.{key}": array for key, array in golden.state_dict.items()}
    model = mmcv.load_into(nnx.eval_shape(lambda: build(**golden.config, rngs=nnx.Rngs(0))), state_dict, prefix="part")
    assert all(np.array_equal(array, golden.state_dict[key]) for key, array in mmcv.to_state_dict(model).items())
    return model, [to_nhwc(jnp.asarray(x)) for x in golden.inputs]


def assert_close(actual, expected):
    actual = to_nchw(np.asarray(actual))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"relative error {error:.1e}")
    assert error < 1e-5


PORTS = ["dyhead", "edvr", "reppoints", "saconv"]


@pytest.mark.parametrize("name", ["deformable_detr", *PORTS])
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 150


def test_edvr():
    golden = GoldenModel("edvr")
    model, inputs = load(golden, example("edvr").PCDAlignment)
    assert_close(model(inputs[:3], inputs[3:]), golden.outputs[0])


def test_reppoints():
    golden = GoldenModel("reppoints")
    head, inputs = load(golden, example("reppoints").RepPointsHead)
    for actual, expected in zip(head(*inputs), golden.outputs, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("dyhead", lambda module: module.DyHead(24, 32, 2, rngs=nnx.Rngs(0))),
        ("saconv", lambda module: module.SAConv2d(24, 32, padding=1, rngs=nnx.Rngs(0))),
    ],
)
def test_mmdets_own_numbers(name, build):
    """Computed by mmdet 3.3.0's DyHead and mmcv 2.2.0's SAConv2d themselves, with random weights, in float32.

    With the gradient of every parameter and input.
    """
    with np.load(DATA / f"{name}.npz") as arrays:
        arrays = dict(arrays)

    def under(prefix):
        return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}

    model = mmcv.load_into(build(example(name)), under("state:"))
    inputs, cotangents = ([jnp.asarray(to_nhwc(a)) for a in under(prefix).values()] for prefix in ("in", "ct"))

    @nnx.jit
    def run(model, inputs):
        def loss(model, inputs):
            outs = model(inputs) if name == "dyhead" else (model(*inputs),)
            return sum((out * ct).sum() for out, ct in zip(outs, cotangents, strict=True)), outs

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, inputs)

    (grads, grads_of_inputs), outs = run(model, inputs)
    for actual, expected in zip(outs, under("out").values(), strict=True):
        assert_close(actual, expected)
    expected = under("grad:")
    for index, actual in enumerate(grads_of_inputs):
        assert_close(actual, expected.pop(f"in{index}"))
    actual = mmcv.to_state_dict(grads, like=model)
    assert set(actual) == set(expected)
    for key, grad in expected.items():
        np.testing.assert_allclose(actual[key], grad, rtol=0, atol=1e-5 * np.abs(grad).max(), err_msg=key)


@pytest.mark.parametrize("repair", ["stride", "resize"])
def test_repairs_of_offsets_of_another_level_are_wrong(repair, monkeypatch):
    """Of DyHead's, which mmcv reads from their beginning: every second one, or resized ones, are more than half off."""
    module = example("dyhead")
    repairs = {
        "stride": lambda maps, size: maps[:, ::2, ::2],
        "resize": lambda maps, size: interpolate(maps, size, mode="bilinear", align_corners=False),
    }
    monkeypatch.setattr(module, "reread", repairs[repair])
    with np.load(DATA / "dyhead.npz") as arrays:
        state_dict = {key.removeprefix("state:"): arrays[key] for key in arrays if key.startswith("state:")}
        levels = [jnp.asarray(to_nhwc(arrays[f"in{level}"])) for level in range(5)]
        expected = [arrays[f"out{level}"] for level in range(5)]
    outs = mmcv.load_into(module.DyHead(24, 32, 2, rngs=nnx.Rngs(0)), state_dict)(levels)
    for actual, right in zip(outs, expected, strict=True):
        assert np.abs(to_nchw(np.asarray(actual)) - right).max() > 0.5 * np.abs(right).max()


def test_transformers_own_numbers():
    """Computed by transformers 5.24.0's DeformableDetrEncoderLayer with random weights, in float32."""
    with np.load(DATA / "deformable_detr.npz") as arrays:
        arrays = dict(arrays)
    module = example("deformable_detr")
    state_dict = {key.removeprefix("state:"): array for key, array in arrays.items() if key.startswith("state:")}
    layer = mmcv.load_into(module.EncoderLayer(**module.SIZES, rngs=nnx.Rngs(0)), state_dict)
    layer.eval()
    x, mask, positions, points, _, shapes, _ = module.random_inputs()

    @nnx.jit
    def run(layer, x, positions):
        def loss(layer, x, positions):
            out = layer(x, mask, positions, points, spatial_shapes_list=shapes)
            return (out * arrays["ct"]).sum(), out

        return nnx.grad(loss, argnums=(0, 1, 2), has_aux=True)(layer, x, positions)

    (grads, grad_x, grad_positions), out = run(layer, jnp.asarray(x), jnp.asarray(positions))
    actual = {"in0": grad_x, "in2": grad_positions, **mmcv.to_state_dict(grads, like=layer)}
    expected = {key.removeprefix("grad:"): array for key, array in arrays.items() if key.startswith("grad:")}
    assert set(actual) == set(expected)
    expected["out"], actual["out"] = arrays["out"], out
    for key, array in expected.items():
        np.testing.assert_allclose(actual[key], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=key)


def test_transformers_itself(capsys):
    """The example beside its original: all rows that both have are equal."""
    pytest.importorskip("torch", reason="there is no torch")
    pytest.importorskip("transformers", reason="there is no transformers")
    with jax.numpy_rank_promotion("allow"):
        example("deformable_detr").main([])
    out = capsys.readouterr().out
    assert "weights that differ" not in out
    errors = {line.split()[0]: float(line.split()[-1]) for line in out.splitlines() if re.search(r"\de-\d\d$", line)}
    assert {"(the", "self_attn.output_proj", "mlp", "self_attn.sampling_offsets.weight"} <= set(errors)
    assert max(errors.values()) < 1e-5


def test_deformable_detr_runs_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with jax.numpy_rank_promotion("allow"):
        example("deformable_detr").main([])
    assert "Not compared with its original" in capsys.readouterr().out


def test_saconvs_names_are_mmcvs():
    with np.load(DATA / "saconv.npz") as arrays:
        names = {key.removeprefix("state:") for key in arrays if key.startswith("state:")}
    assert set(mmcv.to_state_dict(example("saconv").SAConv2d(4, 4, rngs=nnx.Rngs(0)))) == names


def test_boxes_of_points():
    build = example("reppoints").RepPointsHead
    head = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    head.moment_transfer.set_value(jnp.log(jnp.array([2.0, 3.0])))  # of the width, of the height
    points = np.random.default_rng(0).normal(size=(2, 9, 2))
    y, x = points[..., 0], points[..., 1]
    half_x, half_y = 2 * x.std(1, ddof=1), 3 * y.std(1, ddof=1)
    expected = np.stack([x.mean(1) - half_x, y.mean(1) - half_y, x.mean(1) + half_x, y.mean(1) + half_y], 1)
    np.testing.assert_allclose(head.boxes(jnp.asarray(points.reshape(2, 18))), expected, rtol=1e-5)


def test_reppoints_gradient_of_points():
    """A tenth of the convolutions' gradient reaches the points."""
    golden = GoldenModel("reppoints")
    head, (x,) = load(golden, example("reppoints").RepPointsHead)

    def gradient(gradient_mul):
        head.gradient_mul = gradient_mul
        grads = nnx.grad(lambda head: head(x)[0].sum())(head)
        return grads["reppoints_pts_init_out"]["bias"][...]

    np.testing.assert_allclose(gradient(0.1), gradient(1.0) / 10, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PORTS)
def test_an_example_runs(name, tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "picture.png")] + ["--steps", "2"] * (name == "edvr")
    with jax.numpy_rank_promotion("allow"):
        example(name).main(arguments)
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert "picture.png" in capsys.readouterr().out
