// The launches of a call.

#pragma once

#include <limits>
#include <mutex>
#include <set>
#include <utility>

#include "kernels.h"
#include "problem.h"
#include "product.h"

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

// Loads a kernel into a device, which is the current one, unless that was done: XLA asks before every execution. Its
// blocks may have `shared_bytes`, all that there are, as calls differ in what they need and may come at the same time.
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
    Check(what, LoadOnce(device_, reinterpret_cast<const void*>(kernel), shared_bytes_));
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

}  // namespace cuda
}  // namespace jax_dcn
