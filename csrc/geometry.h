// The sizes of a deformable convolution.

#pragma once

#include <cstdint>

namespace jax_dcn {

// Images that lie one after another in the pixels of x, which is then a single row. A count of 0: x is one image.
inline constexpr int kMaxLevels = 8;
struct Levels {
  int count;
  int32_t height[kMaxLevels], width[kMaxLevels];
  int32_t first[kMaxLevels];  // its first pixel in x
};

struct Geometry {
  int64_t batch, height, width, c_in;
  int64_t h_out, w_out, c_out;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;  // before the first row and column; that after the last only makes h_out and w_out
  int64_t dilation_h, dilation_w;
  int64_t groups, deform_groups;
  bool weighted;  // else the samples of a channel are summed over the taps, and there are as many groups as channels
  bool x_first;   // the taps run down the kernel's columns, and offsets are (x, y); else along its rows, and (y, x)
  Levels levels;  // each has as many taps of its own, level by level, whose offsets are fractions of its size

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t mask_channels() const { return deform_groups * taps(); }
  int64_t group_in() const { return c_in / groups; }
  int64_t group_out() const { return c_out / groups; }
  bool depthwise() const { return groups == c_in && groups == c_out; }  // each channel by itself
  int64_t deform_in() const { return c_in / deform_groups; }
  int64_t image() const { return height * width; }        // pixels of one image
  int64_t image_out() const { return h_out * w_out; }     // output pixels of one image
  int64_t pixels() const { return batch * image_out(); }  // output pixels of all images
  int64_t weights() const { return weighted ? taps() * group_in() * c_out : 0; }
};

}  // namespace jax_dcn
