"""What a type checker sees of the public names: mypy checks it, and nothing runs it."""

from typing import assert_type

import jax
import numpy as np
from flax import linen, nnx

import jax_dcn
from jax_dcn import mmcv, models, plot

x, offset, mask, weight = (jax.numpy.ones(()) for _ in range(4))
rngs = nnx.Rngs(0)

assert_type(jax_dcn.deform_conv2d(x, offset, weight, 1, (1, 2), mask=mask, data_format="NHWC"), jax.Array)
assert_type(jax_dcn.modulated_deform_conv2d(x, offset, mask, weight, bias=None, precision="highest"), jax.Array)
assert_type(jax_dcn.deform_conv2d(np.ones(3), offset, weight, padding=[1, 1], bias=False), jax.Array)
assert_type(jax_dcn.deform_conv2d(x, offset, weight, padding=((0, 1), (1, 0))), jax.Array)
assert_type(jax_dcn.dcnv3(x, offset, mask, kernel_size=(3, 5), padding="SAME", groups=4), jax.Array)
assert_type(jax_dcn.dcnv4(x, offset, offset_scale=2, remove_center=True), jax.Array)
assert_type(jax_dcn.multi_scale_deformable_attention(x, ((9, 7), (5, 4)), offset, mask), jax.Array)
assert_type(jax_dcn.__version__, str)
assert_type(jax_dcn.show_config(), None)
jax_dcn.deform_conv(x, offset, weight)  # type: ignore[attr-defined]

for linen_layer in (
    jax_dcn.DeformConv2dPack(16, 8, 3, padding=1),
    jax_dcn.linen.ModulatedDeformConv2dPack(16, 8, (3, 5), dtype=jax.numpy.bfloat16, bias=False),
    jax_dcn.linen.DeformConv2dPack(16, 8, 3, padding="SAME", forward_mode=True),
):
    module: linen.Module = linen_layer
    assert_type(linen_layer(x), jax.Array)
assert_type(jax_dcn.ModulatedDeformConv2d(16, 8, 3)(x, offset, mask), jax.Array)

layer = jax_dcn.nnx.ModulatedDeformConv2dPack(16, 8, kernel_size=3, rngs=rngs)
assert_type(layer(x), jax.Array)
assert_type(jax_dcn.nnx.DeformConv2d(16, 8, 3, rngs=rngs)(x, offset), jax.Array)
layer.kernel[...] = x
layer.bias[...] = x
assert_type(layer.conv_offset, nnx.Conv)

attention = jax_dcn.nnx.MultiScaleDeformableAttention(64, num_levels=1, batch_first=True, rngs=rngs)
assert_type(attention(x, reference_points=offset, spatial_shapes=[(9, 7)]), jax.Array)
assert_type(jax_dcn.nnx.DCNv3(64, group=4, rngs=rngs)(x), jax.Array)
assert_type(jax_dcn.DCNv4(64, dw_kernel_size=3)(x), jax.Array)
assert_type(models.InternImage(depths=[4, 4, 18, 4], layer_scale=1.0, rngs=rngs).feature_maps(x), tuple[jax.Array, ...])

backbone = models.ResNet(50, dcn=dict(type="DCNv2", deform_groups=1), stage_with_dcn=(False, True), rngs=rngs)
assert_type(backbone(x), tuple[jax.Array, ...])
assert_type(models.FPN([256, 512], 256, 5, rngs=rngs)(backbone(x)), tuple[jax.Array, ...])

detector = models.CenterNet(dict(type="ResNet"), {}, {}, test_cfg={"topk": 50}, dtype=jax.numpy.bfloat16, rngs=rngs)
assert_type(detector(x), tuple[jax.Array, jax.Array, jax.Array])
assert_type(detector.predict(x), tuple[jax.Array, jax.Array, jax.Array])
targets = models.centernet_targets(x, offset, num_classes=80, size=(128, 128), image_size=[512, 512])
assert_type(targets.heatmap, jax.Array)
assert_type(models.centernet_loss(detector(x), targets, wh_weight=0.2), dict[str, jax.Array])

state_dict = mmcv.load_checkpoint("detector.pth", prefix="backbone.")
assert_type(state_dict, mmcv.StateDict)
assert_type(state_dict["conv1.weight"], np.ndarray)
assert_type(mmcv.to_state_dict(mmcv.load_into(backbone, state_dict)), dict[str, np.ndarray])
assert_type(mmcv.load_parts({"backbone.": backbone}, "detector.pth"), list[str])
mmcv.save_checkpoint(state_dict, "detector.safetensors")

assert_type(mmcv.nn.Conv2d(3, 8, 3, padding=1, rngs=rngs)(x), jax.Array)
assert_type(mmcv.nn.ConvModule(3, 8, 3, norm_cfg=dict(type="GN", num_groups=2), rngs=rngs)(x), jax.Array)
assert_type(mmcv.nn.interpolate(x, scale_factor=(2, 1.5), mode="bilinear"), jax.Array)
assert_type(mmcv.nn.adaptive_avg_pool2d(x, (None, 1)), jax.Array)
assert_type(mmcv.compare(backbone, "a torch.nn.Module", x), mmcv.Comparison)

points, weights = plot.sampling_coordinates(np.ones((18, 5, 5)), (2, 2), padding=["SAME"])
assert_type(points.ndim, int)
