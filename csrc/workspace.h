// Arrays within a block of memory. In a namespace for each copy of the kernels, as in sampling.h.

#pragma once

#include <cstdint>

namespace jax_dcn {
namespace JAX_DCN_TARGET {

// Hands out consecutive arrays of a block of memory; without a block it only counts.
template <int64_t kAlignment>
class AlignedCarver {
 public:
  explicit AlignedCarver(void* block = nullptr) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* Take(int64_t count) {
    char* at = block_ == nullptr ? nullptr : block_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

}  // namespace JAX_DCN_TARGET
}  // namespace jax_dcn
