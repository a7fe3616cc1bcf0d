// The memory that the kernels work in.

#pragma once

#include <cstdlib>

#include "../workspace.h"
#include "integers.h"

namespace jax_dcn {
namespace JAX_DCN_TARGET {

inline constexpr int64_t kAlignment = 64;  // a cache line

using Carver = AlignedCarver<kAlignment>;

// `count` blocks of memory, each carved into the arrays of Arrays(owner, carver).
template <class Arrays, class Owner>
class WorkSpace {
 public:
  WorkSpace(const Owner& owner, int64_t count) : owner_(owner) {
    Carver counter;
    Arrays(owner, counter);
    size_ = counter.used();
    // aligned_alloc wants a multiple of the alignment, and may return null for 0.
    block_ = static_cast<char*>(std::aligned_alloc(kAlignment, static_cast<size_t>(Max(kAlignment, size_ * count))));
  }
  ~WorkSpace() { std::free(block_); }
  WorkSpace(const WorkSpace&) = delete;
  WorkSpace& operator=(const WorkSpace&) = delete;

  explicit operator bool() const { return block_ != nullptr; }

  Arrays operator[](int64_t i) const {
    Carver carver(block_ + i * size_);
    return Arrays(owner_, carver);
  }

 private:
  const Owner& owner_;
  int64_t size_;
  char* block_;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
