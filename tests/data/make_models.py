"""Makes models.npz with torch, in float64: python tests/data/make_models.py

The models are written after mmdet 3.3.0 and BasicSR, with their names. Deformable convolution is made of torch's
grid_sample, which shares nothing with jax_dcn.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import models_golden


def deform_conv2d(x, offset, mask, weight, bias=None, *, stride=1, padding=1, dilation=1, groups=1, deform_groups=1):
    n, c_in, height, width = x.shape
    c_out, _, kh, kw = weight.shape
    h_out, w_out = offset.shape[2:]
    offset = offset.view(n, deform_groups, kh * kw, 2, h_out, w_out)
    rows = torch.arange(h_out, dtype=x.dtype)[:, None] * stride - padding
    columns = torch.arange(w_out, dtype=x.dtype)[None] * stride - padding
    groups_of_channels = x.view(n * deform_groups, c_in // deform_groups, height, width)
    taps = []
    for tap in range(kh * kw):
        y = rows + tap // kw * dilation + offset[:, :, tap, 0]
        x_ = columns + tap % kw * dilation + offset[:, :, tap, 1]
        # grid_sample counts from -1 at the left edge of the first pixel to 1 at the right edge of the last.
        grid = torch.stack([(2 * x_ + 1) / width - 1, (2 * y + 1) / height - 1], -1).flatten(0, 1)
        sample = F.grid_sample(groups_of_channels, grid, "bilinear", "zeros", align_corners=False)
        if mask is not None:
            sample = sample * mask.view(n * deform_groups, kh * kw, 1, h_out, w_out)[:, tap]
        taps.append(sample.view(n, groups, c_in // groups, h_out, w_out))
    weight = weight.view(groups, c_out // groups, c_in // groups, kh * kw)
    y = torch.einsum("goct,tngchw->ngohw", weight, torch.stack(taps)).reshape(n, c_out, h_out, w_out)
    return y if bias is None else y + bias.view(-1, 1, 1)


class DeformConv(nn.Module):
    """DCNv1 or, with 3 numbers a tap, DCNv2. Offsets come from conv_offset or are given."""

    def __init__(self, c_in, c_out, numbers=2, own=True, bias=False, groups=1, deform_groups=1, stride=1, dilation=1):
        super().__init__()
        self.options = dict(stride=stride, padding=dilation, dilation=dilation, deform_groups=deform_groups)
        self.groups, self.numbers = groups, numbers
        self.weight = nn.Parameter(torch.empty(c_out, c_in // groups, 3, 3))
        self.bias = nn.Parameter(torch.empty(c_out)) if bias else None
        if own:
            self.conv_offset = nn.Conv2d(c_in, deform_groups * numbers * 9, 3, stride, dilation, dilation)

    def forward(self, x, feature=None, offset=None):
        out = self.conv_offset(x if feature is None else feature) if offset is None else offset
        mask = None
        if self.numbers == 3:
            out, mask = out.tensor_split([out.shape[1] // 3 * 2], 1)
            mask = mask.sigmoid()
        return deform_conv2d(x, out, mask, self.weight, self.bias, groups=self.groups, **self.options)


# --- mmdet ---


def shortcut(c_in, c_out, stride):
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    def __init__(self, c_in, planes, stride, dilation):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, planes, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = shortcut(c_in, planes, stride)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.downsample(x)).relu()


class Bottleneck(nn.Module):
    def __init__(self, c_in, planes, width, stride, dilation, style, groups, dcn):
        super().__init__()
        stride1, stride2 = (1, stride) if style == "pytorch" else (stride, 1)
        self.conv1 = nn.Conv2d(c_in, width, 1, stride1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        if dcn:
            self.conv2 = DeformConv(
                *(width, width, {"DCN": 2, "DCNv2": 3}[dcn["type"]]),
                stride=stride2,
                dilation=dilation,
                groups=groups,
                deform_groups=dcn["deform_groups"],
            )
        else:
            self.conv2 = nn.Conv2d(width, width, 3, stride2, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.downsample = shortcut(c_in, planes * 4, stride)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ResNet(nn.Module):
    def __init__(
        self,
        *,
        model="ResNet",
        depth,
        base_channels,
        dcn=None,
        stage_with_dcn=(False,) * 4,
        style="pytorch",
        groups=1,
        base_width=4,
        strides=(1, 2, 2, 2),
        dilations=(1, 1, 1, 1),
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, base_channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_channels)
        channels = base_channels
        dcn = dict(dcn or {})
        for stage, count in enumerate(BLOCKS[depth]):
            planes = base_channels * 2**stage
            width = planes if groups == 1 else int(planes * (base_width / base_channels)) * groups
            blocks = []
            for block in range(count):
                stride = strides[stage] if block == 0 else 1
                if depth < 50:
                    blocks.append(BasicBlock(channels, planes, stride, dilations[stage]))
                    channels = planes
                    continue
                # As in mmdet: the entry is gone once it was read, and ResNeXt reads it too late.
                plain = not stage_with_dcn[stage] or (dcn.pop("fallback_on_stride", False) and model == "ResNet")
                options = width, stride, dilations[stage], style, groups, None if plain else dcn
                blocks.append(Bottleneck(channels, planes, *options))
                channels = planes * 4
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        maps = []
        for stage in self.layer1, self.layer2, self.layer3, self.layer4:
            x = stage(x)
            maps.append(x)
        return maps


def conv_module(c_in, c_out, kernel, stride=1):
    return nn.ModuleDict({"conv": nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2)})


class FPN(nn.Module):
    def __init__(
        self,
        *,
        in_channels,
        out_channels,
        num_outs,
        start_level=0,
        end_level=-1,
        add_extra_convs=False,
        relu_before_extra_convs=False,
    ):
        super().__init__()
        self.used = slice(start_level, len(in_channels) if end_level == -1 else end_level + 1)
        self.num_outs, self.extra, self.relu = num_outs, add_extra_convs, relu_before_extra_convs
        channels = in_channels[self.used]
        self.lateral_convs = nn.ModuleList(conv_module(c, out_channels, 1) for c in channels)
        self.fpn_convs = nn.ModuleList(conv_module(out_channels, out_channels, 3) for _ in channels)
        if self.extra:
            for i in range(num_outs - len(channels)):
                c_in = channels[-1] if i == 0 and self.extra == "on_input" else out_channels
                self.fpn_convs.append(conv_module(c_in, out_channels, 3, 2))

    def forward(self, *inputs):
        inputs = inputs[self.used]
        laterals = [module["conv"](x) for module, x in zip(self.lateral_convs, inputs, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], laterals[i - 1].shape[2:], mode="nearest")
        outs = [self.fpn_convs[i]["conv"](x) for i, x in enumerate(laterals)]
        while len(outs) < self.num_outs:
            if not self.extra:
                outs.append(F.max_pool2d(outs[-1], 1, 2))
                continue
            x = outs[-1]
            if len(outs) == len(laterals):
                x = {"on_input": inputs[-1], "on_lateral": laterals[-1], "on_output": x}[self.extra]
            elif self.relu:
                x = x.relu()
            outs.append(self.fpn_convs[len(outs)]["conv"](x))
        return outs


class RepPoints(nn.Module):
    """What mmdet's RepPointsHead computes of one map, with 9 points and its defaults."""

    def __init__(self, *, num_classes, in_channels, feat_channels, point_feat_channels, stacked_convs, num_groups):
        super().__init__()

        def tower():
            return nn.ModuleList(
                nn.ModuleDict(
                    {
                        "conv": nn.Conv2d(in_channels if i == 0 else feat_channels, feat_channels, 3, 1, 1, bias=False),
                        "gn": nn.GroupNorm(num_groups, feat_channels),
                    }
                )
                for i in range(stacked_convs)
            )

        self.cls_convs, self.reg_convs = tower(), tower()
        self.reppoints_cls_conv = DeformConv(feat_channels, point_feat_channels, own=False)
        self.reppoints_cls_out = nn.Conv2d(point_feat_channels, num_classes, 1)
        self.reppoints_pts_init_conv = nn.Conv2d(feat_channels, point_feat_channels, 3, 1, 1)
        self.reppoints_pts_init_out = nn.Conv2d(point_feat_channels, 18, 1)
        self.reppoints_pts_refine_conv = DeformConv(feat_channels, point_feat_channels, own=False)
        self.reppoints_pts_refine_out = nn.Conv2d(point_feat_channels, 18, 1)
        self.moment_transfer = nn.Parameter(torch.empty(2))

    def forward(self, x):
        cls_feat = pts_feat = x
        for cls, reg in zip(self.cls_convs, self.reg_convs, strict=True):
            cls_feat = cls["gn"](cls["conv"](cls_feat)).relu()
            pts_feat = reg["gn"](reg["conv"](pts_feat)).relu()
        points = self.reppoints_pts_init_out(self.reppoints_pts_init_conv(pts_feat).relu())
        grid = torch.tensor([(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], dtype=x.dtype).view(1, 18, 1, 1)
        fixed = points.detach()
        offset = 0.9 * fixed + 0.1 * points - grid
        cls_out = self.reppoints_cls_out(self.reppoints_cls_conv(cls_feat, offset=offset).relu())
        refined = self.reppoints_pts_refine_conv(pts_feat, offset=offset).relu()
        return cls_out, points, self.reppoints_pts_refine_out(refined) + fixed


# --- BasicSR ---


class PCDAlignment(nn.Module):
    def __init__(self, *, num_feat, deform_groups):
        super().__init__()

        def conv(c_in):
            return nn.Conv2d(c_in, num_feat, 3, 1, 1)

        def dcn():
            return DeformConv(num_feat, num_feat, 3, bias=True, deform_groups=deform_groups)

        self.offset_conv1 = nn.ModuleDict({level: conv(num_feat * 2) for level in ("l3", "l2", "l1")})
        self.offset_conv2 = nn.ModuleDict({"l3": conv(num_feat), "l2": conv(num_feat * 2), "l1": conv(num_feat * 2)})
        self.offset_conv3 = nn.ModuleDict({level: conv(num_feat) for level in ("l2", "l1")})
        self.dcn_pack = nn.ModuleDict({level: dcn() for level in ("l3", "l2", "l1")})
        self.feat_conv = nn.ModuleDict({level: conv(num_feat * 2) for level in ("l2", "l1")})
        self.cas_offset_conv1, self.cas_offset_conv2 = conv(num_feat * 2), conv(num_feat)
        self.cas_dcnpack = dcn()

    def forward(self, *features):
        neighbour, reference = features[:3], features[3:]

        def lrelu(x):
            return F.leaky_relu(x, 0.1)

        def up(x):
            return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

        offset = feature = None
        for i, level in ((2, "l3"), (1, "l2"), (0, "l1")):
            below, feature_below = offset, feature
            offset = lrelu(self.offset_conv1[level](torch.cat([neighbour[i], reference[i]], 1)))
            if below is not None:
                offset = torch.cat([offset, up(below) * 2], 1)
            offset = lrelu(self.offset_conv2[level](offset))
            if below is not None:
                offset = lrelu(self.offset_conv3[level](offset))
            feature = self.dcn_pack[level](neighbour[i], offset)
            if below is not None:
                feature = self.feat_conv[level](torch.cat([feature, up(feature_below)], 1))
            if i:
                feature = lrelu(feature)
        offset = lrelu(self.cas_offset_conv1(torch.cat([feature, reference[0]], 1)))
        return [lrelu(self.cas_dcnpack(feature, lrelu(self.cas_offset_conv2(offset))))]


IMAGE = [(2, 3, 61, 75)]
LAST_STAGES = (False, True, True, True)
MAPS = [(1, 8, 25, 33), (1, 12, 13, 17), (1, 16, 7, 9), (1, 20, 4, 5)]
PYRAMID = [(2, 16, 16, 24), (2, 16, 8, 12), (2, 16, 4, 6)]


def resnet(depth=50, dcn_type="DCNv2", deform_groups=1, fallback_on_stride=False, stages=LAST_STAGES, **config):
    dcn = dict(type=dcn_type, deform_groups=deform_groups, fallback_on_stride=fallback_on_stride)
    return ResNet, dict(depth=depth, base_channels=8, dcn=dcn, stage_with_dcn=stages, **config), IMAGE


def fpn(**config):
    return FPN, dict(in_channels=[8, 12, 16, 20], out_channels=8, **config), MAPS


HEAD = dict(num_classes=5, in_channels=16, feat_channels=16, point_feat_channels=8, stacked_convs=2, num_groups=4)
CASES = {
    "resnet18": (ResNet, dict(depth=18, base_channels=8), IMAGE),
    "resnet34-dilated": (ResNet, dict(depth=34, base_channels=8, strides=(1, 2, 1, 2), dilations=(1, 1, 2, 3)), IMAGE),
    "resnet50-v1": resnet(dcn_type="DCN"),
    "resnet50-caffe-group4": resnet(deform_groups=4, style="caffe"),
    "resnet50-fallback": resnet(fallback_on_stride=True),
    "resnet50-dilated": resnet(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)),
    "resnet101-c4-c5-caffe": resnet(101, style="caffe", stages=(False, False, True, True)),
    "resnet152-c5": resnet(152, stages=(False, False, False, True)),
    "resnext50-v1": resnet(model="ResNeXt", dcn_type="DCN", groups=4, base_width=4),
    "resnext50-fallback": resnet(model="ResNeXt", groups=2, base_width=8, fallback_on_stride=True),
    "fpn": fpn(num_outs=5),
    "fpn-on_input": fpn(num_outs=5, start_level=1, add_extra_convs="on_input"),
    "fpn-on_lateral": fpn(num_outs=6, start_level=1, add_extra_convs="on_lateral", relu_before_extra_convs=True),
    "fpn-on_output": fpn(num_outs=5, start_level=1, add_extra_convs="on_output", relu_before_extra_convs=True),
    "fpn-end_level": fpn(num_outs=2, start_level=1, end_level=2),
    "reppoints": (RepPoints, HEAD, [(2, 16, 9, 13)]),
    "edvr": (PCDAlignment, dict(num_feat=16, deform_groups=4), PYRAMID * 2),
}


def main():
    arrays = {}
    for name, (model, config, shapes) in CASES.items():
        torch_model = model(**config).double().eval()
        keys = {key: list(value.shape) for key, value in torch_model.state_dict().items()}
        weights = {key: torch.from_numpy(value) for key, value in models_golden.random_state_dict(keys).items()}
        torch_model.load_state_dict(weights)
        inputs = [torch.from_numpy(x).double() for x in models_golden.random_inputs(name, shapes)]
        with torch.no_grad():
            outputs = [y.numpy().astype(np.float32) for y in torch_model(*inputs)]
        description = dict(config=config, shapes=keys, inputs=shapes, outputs=len(outputs))
        arrays[name] = np.array(json.dumps(description))
        arrays.update({f"{name}/{i}": y for i, y in enumerate(outputs)})
        print(name, *(f"{y.shape} {np.abs(y).max():.2g}" for y in outputs), sep="\n  ")
    np.savez_compressed(models_golden.PATH, **arrays)


if __name__ == "__main__":
    main()
