// The host's side of a call: its work space and its launches.

#pragma once

#include <algorithm>
#include <limits>
#include <mutex>
#include <set>
#include <utility>

#include "kernels.h"
#include "problem.h"
#include "product.h"
#include "small_groups.h"

namespace jax_dcn {
namespace cuda {

// Makes a device current for as long as it lives. XLA, whose ordinals are CUDA's, has made its device so already, as a
// rule; then this changes nothing.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Loads a kernel into a device, which is the current one, unless that was done: XLA asks before every execution. A
// kernel always takes the same shared memory.
inline cudaError_t LoadOnce(int device, const void* kernel, int shared_bytes) {
  // They live as long as the process, as XLA's threads do.
  static std::mutex& mutex = *new std::mutex;
  static auto& loaded = *new std::set<std::pair<int, const void*>>;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (loaded.count({device, kernel}) != 0) return cudaSuccess;
  }
  // Without the lock, as it may wait for kernels that run.
  const cudaError_t error = Load(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  loaded.insert({device, kernel});
  return cudaSuccess;
}

// Launches on a stream of a device, or only loads the kernels, until something fails.
class Launcher {
 public:
  Launcher(int device, cudaStream_t stream, bool load_only)
      : device_(device), current_(device), stream_(stream), load_only_(load_only) {
    Check("the device", current_.error());
    Check("the shared memory's size", MostSharedBytes(device, &shared_bytes_));
  }

  // What a block may have of shared memory.
  int shared_bytes() const { return shared_bytes_; }

  // A block per `blocks`.
  template <class... Parameters, class... Arguments>
  void Run(const char* what, void (*kernel)(Parameters...), int64_t blocks, int shared_bytes,
           const Arguments&... arguments) {
    if (status_.error != cudaSuccess || blocks == 0) return;
    Check(what, LoadOnce(device_, reinterpret_cast<const void*>(kernel), shared_bytes));
    if (status_.error != cudaSuccess || load_only_) return;
    const bool fits = blocks <= std::numeric_limits<int32_t>::max();
    Check(what, fits
                    ? Launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, shared_bytes, stream_, arguments...)
                    : cudaErrorInvalidConfiguration);
  }

  // A thread per item.
  template <class... Parameters, class... Arguments>
  void RunForEach(const char* what, void (*kernel)(Parameters...), int64_t items, const Arguments&... arguments) {
    Run(what, kernel, CeilDiv(items, kThreads), 0, arguments...);
  }

  void Zero(const char* what, void* to, int64_t bytes) {
    if (status_.error == cudaSuccess && !load_only_) Check(what, ZeroAsync(to, bytes, stream_));
  }

  const Status& status() const { return status_; }

 private:
  void Check(const char* what, cudaError_t error) {
    if (status_.error == cudaSuccess && error != cudaSuccess) status_ = {error, what};
  }

  int device_;
  CurrentDevice current_;
  cudaStream_t stream_;
  bool load_only_;
  int shared_bytes_ = 0;
  Status status_;
};

// An element type and the kind of its products.
template <class T_, class Tag_>
struct Arithmetic {
  using T = T_;
  using Tag = Tag_;
  // The widest tiles whose sums leave registers for the rest. What is plain on every device holds operands in registers
  // too, doubles take two each, and products of TF32, transposed, load their operands word by word.
  static constexpr bool kPlain = sizeof(T) > 2 && std::is_same_v<T, Tag>;
  static constexpr int kColumns = sizeof(T) == 8 ? 64 : kPlain ? 128 : 256;
  static constexpr int kTransposedColumns = sizeof(T) == 8 ? 64 : sizeof(T) > 2 ? 128 : 256;
  static constexpr bool kSmallGroups = false;
};

// By the kernels of small_groups.h.
template <class A>
struct InSmallGroups : A {
  static constexpr bool kSmallGroups = true;
};

// Calls function(Arithmetic of the type, perhaps InSmallGroups).
template <class Function>
auto WithArithmetic(const Geometry& g, DType dtype, Precision precision, const Function& function) {
  const auto choose = [&](auto a) {
    return IsSmallGroup<decltype(a)>(g) ? function(InSmallGroups<decltype(a)>()) : function(a);
  };
  switch (dtype) {
    case DType::kBFloat16: return choose(Arithmetic<BFloat16, BFloat16>());
    case DType::kFloat16: return choose(Arithmetic<Float16, Float16>());
    case DType::kFloat64: return choose(Arithmetic<double, double>());
    case DType::kFloat32: break;
  }
  return precision == Precision::kHighest ? choose(Arithmetic<float, float>()) : choose(Arithmetic<float, TF32>());
}

// The problem as the kernels see it.
template <class A>
Problem ProblemOf(Geometry g) {
  if (A::kSmallGroups) g.groups = 1;
  return Problem(g, kChannelVector<typename A::T>);
}

// Columns of the tiles that share `total` of them: the widest, which make the fewest samples or loads, unless so few
// blocks came out that the processors stood idle (an H200 has 132). Half of the widest fit into any device's shared
// memory.
template <class T, int kMost, bool kTransposed>
int TileColumns(int total, int64_t other_blocks, int shared_bytes) {
  constexpr int64_t kBlocks = 128;
  int columns = kProductSharedBytes<T, kMost, kTransposed> <= shared_bytes ? kMost : kMost / 2;
  while (columns > 64 && (total <= columns / 2 || other_blocks * CeilDiv(total, columns) < kBlocks)) columns /= 2;
  return columns;
}

// Calls function(the number of columns as an std::integral_constant).
template <int kMost, class Function>
void WithColumns(int columns, const Function& function) {
  if constexpr (kMost > 64) {
    if (columns < kMost) return WithColumns<kMost / 2>(columns, function);
  }
  function(std::integral_constant<int, kMost>());
}

}  // namespace cuda
}  // namespace jax_dcn
