// How the channels and the taps are cut into pieces.

#pragma once

#include "../geometry.h"
#include "integers.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// The input channels [begin, end): a part of one weight group, or `groups` whole ones.
struct Slice {
  int64_t index;
  int64_t begin, end;
  int64_t first_group, groups;
  int64_t group_channels;  // of each group, in this slice
  int64_t group_begin;     // its first channel, counted within the group

  int64_t channels() const { return end - begin; }
  Range of_group() const { return {group_begin, group_begin + group_channels}; }
};

// Cuts the input channels into slices of about `target` channels.
class Slices {
 public:
  Slices(const Geometry& g, int64_t target, int64_t lanes) : groups_(g.groups), group_in_(g.group_in()) {
    if (group_in_ > target) {
      // Whole vectors, as far as possible.
      size_ = CeilDiv(CeilDiv(group_in_, CeilDiv(group_in_, target)), lanes) * lanes;
      pieces_ = CeilDiv(group_in_, size_);
      count_ = groups_ * pieces_;
    } else {
      groups_per_slice_ = Min(groups_, target / group_in_);
      count_ = CeilDiv(groups_, groups_per_slice_);
    }
  }

  int64_t count() const { return count_; }
  int64_t max_channels() const { return pieces_ > 1 ? size_ : groups_per_slice_ * group_in_; }
  int64_t max_groups() const { return groups_per_slice_; }

  Slice operator[](int64_t i) const {
    Slice s;
    s.index = i;
    s.first_group = i / pieces_ * groups_per_slice_;
    s.groups = Min(groups_per_slice_, groups_ - s.first_group);
    s.group_begin = i % pieces_ * size_;
    s.group_channels = pieces_ > 1 ? Min(size_, group_in_ - s.group_begin) : group_in_;
    s.begin = s.first_group * group_in_ + s.group_begin;
    s.end = s.begin + s.groups * s.group_channels;
    return s;
  }

 private:
  int64_t groups_, group_in_;
  int64_t size_ = 0, pieces_ = 1;  // channels of a slice, slices of a group
  int64_t groups_per_slice_ = 1;
  int64_t count_;
};

// The most values of one pixel that are sampled before they are multiplied: 384 as the depth of a product lets the
// register block of C be loaded and stored once in 384 steps, and 112 x 384 floats stay in the L2 cache.
inline constexpr int64_t kMaxDepth = 384;

// Cuts the taps into blocks that, with `channels` channels, keep within kMaxDepth.
class TapBlocks {
 public:
  TapBlocks(const Geometry& g, int64_t channels)
      : taps_(g.taps()), count_(CeilDiv(taps_, Max<int64_t>(1, kMaxDepth / channels))) {}

  int64_t count() const { return count_; }
  int64_t max_taps() const { return CeilDiv(taps_, count_); }

  Range operator[](int64_t i) const { return Range::Piece(taps_, count_, i); }

 private:
  int64_t taps_, count_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
