"""DCNv3, DCNv4, the attention and InternImage in plain torch: their definitions, over torch's grid_sample."""

import math

import torch
from torch import nn
from torch.nn import functional


def sampled(images, locations):
    """Bilinear samples of images (B, C, H, W) at pixels (B, P, K, 2), each (x, y), as (B, C, P, K)."""
    size = torch.tensor([images.shape[3], images.shape[2]], dtype=images.dtype)
    return functional.grid_sample(images, (2 * locations + 1) / size - 1, align_corners=False)


def dcnv3(x, offset, mask, kernel_size, stride, pad, dilation, group, offset_scale, remove_center):
    """Of one number for both axes."""
    n, height, width, channels = x.shape
    half = dilation * (kernel_size - 1) // 2
    out_h, out_w = ((size + 2 * pad - dilation * (kernel_size - 1) - 1) // stride + 1 for size in (height, width))
    taps = [(i, j) for i in range(kernel_size) for j in range(kernel_size)]
    if remove_center:
        del taps[len(taps) // 2]
    grid = torch.tensor(taps, dtype=x.dtype) * dilation - half  # (K, 2) as (x, y)
    rows, columns = torch.meshgrid(torch.arange(out_h), torch.arange(out_w), indexing="ij")
    middles = torch.stack([columns, rows], -1) * stride - pad + half
    offset = offset.reshape(n, out_h * out_w, group, len(taps), 2)
    locations = middles.reshape(1, -1, 1, 1, 2) + offset_scale * (grid + offset)
    images = x.reshape(n, height, width, group, channels // group).permute(0, 3, 4, 1, 2).flatten(0, 1)
    samples = sampled(images, locations.transpose(1, 2).flatten(0, 1))
    weights = mask.reshape(n, out_h * out_w, group, len(taps)).transpose(1, 2).flatten(0, 1)
    y = (samples * weights[:, None]).sum(-1).reshape(n, channels, out_h, out_w)
    return y.permute(0, 2, 3, 1)


def attention(value, shapes, locations, weights):
    n, _, heads, depth = value.shape
    queries = locations.shape[1]
    y = 0
    for level, image in enumerate(value.split([h * w for h, w in shapes], 1)):
        height, width = shapes[level]
        image = image.permute(0, 2, 3, 1).reshape(n * heads, depth, height, width)
        pixels = locations[:, :, :, level] * torch.tensor([width, height]) - 0.5
        samples = sampled(image, pixels.transpose(1, 2).flatten(0, 1))
        y = y + (samples * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return y.reshape(n, heads * depth, queries).transpose(1, 2)


class Permuted(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


def to_last():
    return Permuted(0, 2, 3, 1)


def norm(channels, first=False, out_first=False):
    parts = [to_last()] * first + [nn.LayerNorm(channels, eps=1e-6)] + [Permuted(0, 3, 1, 2)] * out_first
    return nn.Sequential(*parts)


class Core(nn.Module):
    """What DCNv3 and DCNv4 have in common."""

    def blended(self, y, x, features):
        if not self.center_feature_scale:
            return y
        share = functional.linear(
            features, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        ).sigmoid()
        share = share.repeat_interleave(y.shape[-1] // share.shape[-1], -1)
        return y * (1 - share) + x * share

    def add_center(self, group, channels):
        if self.center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))


class DCNv3(Core):
    def __init__(
        self,
        channels,
        kernel_size=3,
        dw_kernel_size=None,
        stride=1,
        pad=1,
        dilation=1,
        group=4,
        offset_scale=1.0,
        act=nn.GELU,
        center_feature_scale=False,
        remove_center=False,
    ):
        super().__init__()
        taps = kernel_size**2 - remove_center
        dw = dw_kernel_size or kernel_size
        conv = nn.Conv2d(channels, channels, dw, stride, (dw - 1) // 2, groups=channels)
        self.dw_conv = nn.Sequential(conv, norm(channels, first=True), act())
        self.offset = nn.Linear(channels, group * taps * 2)
        self.mask = nn.Linear(channels, group * taps)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.group, self.taps, self.center_feature_scale = group, taps, center_feature_scale
        self.sizes = (kernel_size, stride, pad, dilation, group, offset_scale, remove_center)
        self.add_center(group, channels)

    def forward(self, x):
        features = self.dw_conv(x.permute(0, 3, 1, 2))
        mask = self.mask(features).unflatten(-1, (self.group, self.taps)).softmax(-1).flatten(-2)
        x = self.input_proj(x)
        y = dcnv3(x, self.offset(features), mask, *self.sizes)
        return self.output_proj(self.blended(y, x, features))


class DCNv4(Core):
    def __init__(
        self,
        channels,
        kernel_size=3,
        stride=1,
        pad=1,
        dilation=1,
        group=4,
        offset_scale=1.0,
        dw_kernel_size=None,
        center_feature_scale=False,
        remove_center=False,
        output_bias=True,
        without_pointwise=False,
    ):
        super().__init__()
        self.group, self.taps = group, kernel_size**2 - remove_center
        if dw_kernel_size:
            padding = (dw_kernel_size - 1) // 2
            self.offset_mask_dw = nn.Conv2d(channels, channels, dw_kernel_size, stride, padding, groups=channels)
        self.offset_mask = nn.Linear(channels, math.ceil(group * self.taps * 3 / 8) * 8)
        self.pointwise, self.center_feature_scale = not without_pointwise, center_feature_scale
        if self.pointwise:
            self.value_proj = nn.Linear(channels, channels)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias)
        self.sizes = (kernel_size, stride, pad, dilation, group, offset_scale, remove_center)
        self.add_center(group, channels)

    def forward(self, x):
        features, stride = x, self.sizes[1]
        if hasattr(self, "offset_mask_dw"):
            features = self.offset_mask_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            features = x[:, ::stride, ::stride]
        values = self.offset_mask(features)[..., : self.group * self.taps * 3].unflatten(-1, (self.group, -1))
        offset, mask = values.split([self.taps * 2, self.taps], -1)
        x = self.value_proj(x) if self.pointwise else x
        y = dcnv3(x, offset.flatten(-2), mask.flatten(-2), *self.sizes)
        y = self.blended(y, x, y)
        return self.output_proj(y) if self.pointwise else y


class MultiScaleDeformableAttention(nn.Module):
    """Batch first, without dropout."""

    def __init__(self, embed_dims, num_heads, num_levels, num_points, value_proj_ratio=1.0):
        super().__init__()
        samples, wide = num_heads * num_levels * num_points, int(embed_dims * value_proj_ratio)
        self.sampling_offsets = nn.Linear(embed_dims, samples * 2)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, wide)
        self.output_proj = nn.Linear(wide, embed_dims)
        self.sizes = (num_heads, num_levels, num_points)

    def forward(self, query, value, reference_points, shapes):
        heads, levels, points = self.sizes
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.sizes, 2))
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(-1)
        at = reference_points[:, :, None, :, None]
        if at.shape[-1] == 2:
            offsets = offsets / torch.tensor([(w, h) for h, w in shapes], dtype=query.dtype)[:, None]
        else:
            offsets = offsets / points * at[..., 2:] / 2
        value = self.value_proj(value).unflatten(-1, (heads, -1))
        y = attention(value, shapes, at[..., :2] + offsets, weights.unflatten(-1, (levels, points)))
        return self.output_proj(y) + query


class Layer(nn.Module):
    def __init__(self, dcn, channels, scale, post, res_post, fc2_bias):
        super().__init__()
        self.dcn, self.post, self.res_post, self.scale = dcn, post, res_post, scale
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.mlp = nn.Sequential()
        self.mlp.fc1 = nn.Linear(channels, 4 * channels)
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = nn.Linear(4 * channels, channels, bias=fc2_bias)
        if scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), scale))
            self.gamma2 = nn.Parameter(torch.full((channels,), scale))
        if res_post:
            self.res_post_norm1, self.res_post_norm2 = norm(channels), norm(channels)

    def forward(self, x):
        for i, branch in ((1, self.dcn), (2, self.mlp)):
            before = getattr(self, f"norm{i}")
            y = before(branch(x)) if self.post else branch(before(x))
            if self.scale is not None:
                y = getattr(self, f"gamma{i}") * y
            elif self.res_post and not self.post:
                y = getattr(self, f"res_post_norm{i}")(y)
            x = x + y
        return x


class InternImage(nn.Module):
    """In evaluation: without stochastic depth."""

    def __init__(
        self,
        core_op="DCNv3",
        channels=16,
        depths=(1, 1, 2, 1),
        groups=(2, 4, 8, 16),
        num_classes=5,
        layer_scale=None,
        offset_scale=1.0,
        post_norm=False,
        dw_kernel_size=None,
        level2_post_norm=False,
        level2_post_norm_block_ids=None,
        res_post_norm=False,
        center_feature_scale=False,
    ):
        super().__init__()
        flash = core_op == "DCNv4"
        self.patch_embed = nn.Sequential()
        self.patch_embed.conv1 = nn.Conv2d(3, channels // 2, 3, 2, 1)
        self.patch_embed.norm1 = norm(channels // 2, first=True, out_first=True)
        self.patch_embed.act = nn.GELU()
        self.patch_embed.conv2 = nn.Conv2d(channels // 2, channels, 3, 2, 1)
        self.patch_embed.norm2 = norm(channels, first=True)
        self.ids = level2_post_norm_block_ids if level2_post_norm else None
        self.levels = nn.ModuleList()
        for i, (depth, group) in enumerate(zip(depths, groups, strict=True)):
            wide = channels * 2**i
            common = dict(group=group, offset_scale=offset_scale, dw_kernel_size=dw_kernel_size)
            level = nn.Module()
            level.blocks = nn.ModuleList()
            for _ in range(depth):
                if flash:
                    dcn = DCNv4(wide, output_bias=False, **common)
                else:
                    dcn = DCNv3(wide, center_feature_scale=center_feature_scale, **common)
                level.blocks.append(Layer(dcn, wide, layer_scale, post_norm, res_post_norm, not flash))
            if not post_norm or center_feature_scale:
                level.norm = norm(wide)
            if i == 2 and self.ids is not None:
                level.post_norms = nn.ModuleList([norm(wide) for _ in self.ids])
            if i < len(depths) - 1:
                level.downsample = nn.Sequential(Permuted(0, 3, 1, 2))
                level.downsample.conv = nn.Conv2d(wide, 2 * wide, 3, 2, 1, bias=False)
                level.downsample.norm = norm(2 * wide, first=True)
            self.levels.append(level)
        hidden = int(wide * 1.5)
        self.conv_head = nn.Sequential(
            nn.Conv2d(wide, hidden, 1, bias=False), nn.Sequential(nn.BatchNorm2d(hidden)), nn.GELU()
        )
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x):
        x = self.patch_embed(x)
        maps = []
        for i, level in enumerate(self.levels):
            for j, block in enumerate(level.blocks):
                x = block(x)
                if i == 2 and self.ids is not None and j in self.ids:
                    x = level.post_norms[self.ids.index(j)](x)
            x = level.norm(x) if hasattr(level, "norm") else x
            maps.append(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.head(self.conv_head(x.permute(0, 3, 1, 2)).mean((2, 3))), maps
