// Runs the CUDA kernels on the CPU once: arrays from standard input, results to standard output. test_cuda_on_cpu.py
// writes and reads them. Arguments: the seed of the order of blocks and threads, the device and, if wanted, the number
// of a Fault and its call.
//
// Every array is an allocation of its own of the exact size, so that AddressSanitizer sees what lies outside. Results
// and work space start as NaN.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "device_on_cpu.h"

namespace {

using namespace jax_dcn;

// What comes first on standard input. A dtype of -1: no such array.
struct Call {
  Geometry geometry;
  int64_t backward;
  int64_t dtype, offset_dtype, mask_dtype, bias;
  int64_t highest, deterministic;
  int64_t wanted[5];  // the gradients of x, offset, mask, weight and bias
};

int64_t Size(int64_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat64: return 8;
    case DType::kFloat32: return 4;
    default: return 2;
  }
}

void Read(void* to, size_t bytes) {
  if (bytes != 0 && std::fread(to, 1, bytes, stdin) != bytes) {
    std::fprintf(stderr, "standard input is too short\n");
    std::exit(2);
  }
}

// From the start of a line of memory on, as on a GPU.
void* Allocate(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 128, bytes) != 0) std::abort();
  return data;
}

class Allocations {
 public:
  ~Allocations() {
    for (const auto* list : {&inputs_, &outputs_}) {
      for (const auto& a : *list) std::free(a.data);
    }
  }

  Array Input(bool given, int64_t count, int64_t dtype) {
    if (!given) return {};
    const size_t bytes = count * Size(dtype);
    void* data = Allocate(bytes);
    Read(data, bytes);
    inputs_.push_back({data, bytes, std::string(static_cast<char*>(data), bytes)});
    return {data, static_cast<DType>(dtype)};
  }

  Array Output(bool wanted, int64_t count, int64_t dtype) {
    if (!wanted) return {};
    outputs_.push_back({Allocate(count * Size(dtype)), static_cast<size_t>(count * Size(dtype)), {}});
    std::memset(outputs_.back().data, 0xff, outputs_.back().bytes);
    return {outputs_.back().data, static_cast<DType>(dtype)};
  }

  void* Workspace(int64_t bytes) {
    void* data = Allocate(bytes);
    std::memset(data, 0xff, bytes);
    inputs_.push_back({data, 0, {}});
    return data;
  }

  bool InputsUnchanged() const {
    for (const auto& a : inputs_) {
      if (a.bytes != 0 && std::memcmp(a.data, a.before.data(), a.bytes) != 0) return false;
    }
    return true;
  }

  void Write() const {
    for (const auto& a : outputs_) std::fwrite(a.data, 1, a.bytes, stdout);
  }

 private:
  struct Allocation {
    void* data;
    size_t bytes;
    std::string before;
  };
  std::list<Allocation> inputs_, outputs_;
};

// Where the call runs; the current device is the first.
int device = 0;

// Loads the kernels twice, which must launch none and do so once, and runs the call, which must launch them and no
// others.
template <class Function>
cuda::Status LoadAndRun(cuda::Options options, const Function& function) {
  options.load_only = true;
  for (int i = 0; i < 2; ++i) {
    const cuda::Status status = function(options);
    if (status.error != cudaSuccess) return status;
  }
  std::set<const void*> loaded;
  for (const auto& [kernel, bytes] : cuda::on_cpu::loaded[device]) loaded.insert(kernel);
  const bool launched = !cuda::on_cpu::launched[device].empty();
  options.load_only = false;
  const cuda::Status result = function(options);
  if (result.error != cudaSuccess) return result;
  if (launched || loaded != cuda::on_cpu::launched[device]) {
    std::fprintf(stderr, "the kernels loaded are not those launched\n");
    std::exit(6);
  }
  if (cuda::on_cpu::loads != static_cast<int>(loaded.size()) || !cuda::on_cpu::loaded[1 - device].empty()) {
    std::fprintf(stderr, "kernels were loaded again or elsewhere\n");
    std::exit(7);
  }
  if (current_device != 0) {
    std::fprintf(stderr, "the call leaves another current device\n");
    std::exit(8);
  }
  return result;
}

cuda::Status Forward(const Call& call, Allocations& arrays, cuda::Options options) {
  const Geometry& g = call.geometry;
  const int64_t taps = g.pixels() * g.mask_channels();
  ForwardArrays a;
  a.x = arrays.Input(true, g.batch * g.image() * g.c_in, call.dtype);
  a.offset = arrays.Input(true, 2 * taps, call.offset_dtype);
  a.mask = arrays.Input(call.mask_dtype >= 0, taps, call.mask_dtype);
  a.weight = arrays.Input(g.weighted, g.weights(), call.dtype);
  a.bias = arrays.Input(call.bias != 0, g.c_out, call.dtype);
  a.y = arrays.Output(true, g.pixels() * g.c_out, call.dtype);
  void* workspace = arrays.Workspace(cuda::ForwardWorkspace(g, a.x.dtype, options).bytes);
  return LoadAndRun(
      options, [&](cuda::Options o) { return cuda::Forward(g, a, workspace, o, device, &device_streams[device]); });
}

cuda::Status Backward(const Call& call, Allocations& arrays, cuda::Options options) {
  const Geometry& g = call.geometry;
  const int64_t taps = g.pixels() * g.mask_channels();
  const int64_t sums =
      static_cast<int64_t>(call.dtype == static_cast<int64_t>(DType::kFloat64) ? DType::kFloat64 : DType::kFloat32);
  BackwardArrays a;
  a.grad_y = arrays.Input(true, g.pixels() * g.c_out, call.dtype);
  a.x = arrays.Input(true, g.batch * g.image() * g.c_in, call.dtype);
  a.offset = arrays.Input(true, 2 * taps, call.offset_dtype);
  a.mask = arrays.Input(call.mask_dtype >= 0, taps, call.mask_dtype);
  a.weight = arrays.Input(g.weighted, g.weights(), call.dtype);
  a.grad_x = arrays.Output(call.wanted[0] != 0, g.batch * g.image() * g.c_in, sums);
  a.grad_offset = arrays.Output(call.wanted[1] != 0, 2 * taps, call.offset_dtype);
  a.grad_mask = arrays.Output(call.wanted[2] != 0, taps, call.mask_dtype);
  a.grad_weight = arrays.Output(call.wanted[3] != 0, g.weights(), sums);
  a.grad_bias = arrays.Output(call.wanted[4] != 0, g.c_out, sums);
  const WantedGradients wanted{call.wanted[0] != 0, call.wanted[1] != 0, call.wanted[2] != 0, call.wanted[3] != 0,
                               call.wanted[4] != 0};
  void* workspace = arrays.Workspace(cuda::BackwardWorkspace(g, wanted, a.x.dtype, options).bytes);
  return LoadAndRun(
      options, [&](cuda::Options o) { return cuda::Backward(g, a, workspace, o, device, &device_streams[device]); });
}

}  // namespace

int main(int count, char** arguments) {
  cuda::on_cpu::settings.seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 0;
  device = count > 2 ? std::atoi(arguments[2]) : 0;
  if (count > 4) {
    cuda::on_cpu::settings.fault = static_cast<cuda::on_cpu::Fault>(std::atoi(arguments[3]));
    cuda::on_cpu::settings.fault_call = std::atoi(arguments[4]);
  }
  Call call;
  Read(&call, sizeof(call));
  Allocations arrays;
  const cuda::Options options{call.highest != 0 ? cuda::Precision::kHighest : cuda::Precision::kDefault,
                              call.deterministic != 0};
  const cuda::Status status = (call.backward != 0 ? Backward : Forward)(call, arrays, options);
  if (status.error != cudaSuccess) {
    std::fprintf(stderr, "%s: %s\n", status.what, cudaGetErrorString(status.error));
    return 4;
  }
  if (!arrays.InputsUnchanged()) {
    std::fprintf(stderr, "an operand was written\n");
    return 5;
  }
  arrays.Write();
  return 0;
}
