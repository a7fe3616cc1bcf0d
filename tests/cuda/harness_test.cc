// Small kernels for test_harness.py: each of the faults that the harness must find, products by the warp instructions
// in the way that GPUs are used, and accesses to count.

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "device_on_cpu.h"

namespace jax_dcn {
namespace cuda {

constexpr int kThreads = 64;
constexpr int kBytes = kThreads * 16;  // of shared memory

// On the first device.
template <class... Parameters, class... Arguments>
cudaError_t LoadAndLaunch(void (*kernel)(Parameters...), dim3 grid, int block, int shared_bytes,
                          const Arguments&... arguments) {
  const cudaError_t error = Load(reinterpret_cast<const void*>(kernel), shared_bytes);
  return error != cudaSuccess ? error : Launch(kernel, grid, block, shared_bytes, &device_streams[0], arguments...);
}

// Each thread writes an element and reads its neighbour's.
struct Exchange {
  int apart = 1;  // the neighbour
  bool barrier = true, warp_barrier = false;
  int shift = 0;  // of what is read
};

void ExchangeKernel(Exchange e, float* out) {
  const int i = ThreadIndex();
  Shared<float> s = SharedMemory<float>(0);
  s[i] = static_cast<float>(i);
  if (e.barrier) SyncThreads();
  if (e.warp_barrier) SyncWarp();
  out[i] = s[(i ^ e.apart) + e.shift];
}

// A write after another thread's read.
void OverwriteKernel(bool barrier, float* out) {
  const int i = ThreadIndex();
  Shared<float> s = SharedMemory<float>(0);
  s[i] = 1;
  SyncThreads();
  out[i] = s[kThreads - 1 - i] + s[i];
  if (barrier) SyncThreads();
  s[i] = 2;
}

void CopyKernel(bool wait, const float* in, float* out) {
  const int i = ThreadIndex();
  const Shared<float> s = SharedMemory<float>(0);
  CopyAsync16(SharedMemory<Vector16>(0) + i, in + 4 * i, i % 2 == 0);
  CopyCommit();
  if (wait) CopyWait<0>();
  out[i] = s[4 * i + 3];
  CopyWait<0>();
}

void DivergentKernel(int kind) {
  const int i = ThreadIndex();
  if (kind == 0 && i == 5) return;
  if (kind == 1 && i < 32) SyncThreads();
  if (kind == 2 && i % 2 == 0) ShuffleXor(1.0f, 1);
  if (kind == 3) i < 7 ? ShuffleXor(i, 1) : ShuffleDown(i, 1);
  if (kind == 4) i < 7 ? SyncWarp() : SyncThreads();
  SyncThreads();
}

void GlobalKernel(const float* in, float* out) { out[ThreadIndex()] = in[ThreadIndex()]; }

void MisalignedKernel(const float* in) { LoadGlobal16(in + 1); }

void BankKernel(int pitch) {
  const int i = ThreadIndex();
  SharedMemory<Vector16>(0)[i] = Vector16{};
  SyncThreads();
  uint32_t words[4];
  LoadMatrix4(words, SharedMemory<Vector16>(0) + i * pitch % kThreads);
}

// Each lane below `lanes` accesses an Element, `pitch` Elements after that of the lane before.
enum class Access { kRead, kWrite, kCopy, kLoadMatrix, kLoadGlobal, kAtomicAdd };
constexpr int kAccessBytes = 16 << 10;

template <class Element>
void AccessKernel(Access access, int pitch, int lanes, float* memory) {
  const int i = ThreadIndex();
  const Shared<Element> shared = SharedMemory<Element>(0) + i * pitch;
  Element* const global = reinterpret_cast<Element*>(memory) + i * pitch;
  if (access == Access::kRead || access == Access::kLoadMatrix) {
    for (int j = i; j < kAccessBytes / 16; j += kWarp) SharedMemory<Vector16>(0)[j] = Vector16{};
    SyncThreads();
  }
  if (access == Access::kLoadMatrix) {
    uint32_t words[4];
    LoadMatrix4(words, SharedCast<const Vector16>(Shared<const Element>(shared)));
  }
  if (i >= lanes) return;
  if (access == Access::kRead) static_cast<Element>(*shared);
  if (access == Access::kWrite) *shared = Element{};
  if (access == Access::kCopy) {
    CopyAsync16(SharedCast<Vector16>(shared), global, true);
    CopyCommit();
    CopyWait<0>();
  }
  if (access == Access::kLoadGlobal) sizeof(Element) == 16 ? (void)LoadGlobal16(global) : (void)LoadGlobal8(global);
  if (access == Access::kAtomicAdd) AtomicAdd4(reinterpret_cast<float*>(global), {1.0f, 1.0f, 1.0f, 1.0f});
}

// Copies of rows of 64 bytes by four lanes each.
void CopyRowsKernel(int pitch, const float* in) {
  const int i = ThreadIndex();
  CopyAsync16(SharedMemory<Vector16>(0) + (i / 4 * pitch + i % 4), in + 4 * i, true);
  CopyCommit();
  CopyWait<0>();
}

// What lanes of a warp do not do together are instructions of their own, until they meet again.
void ApartKernel() {
  const int i = ThreadIndex();
  const Shared<float> s = SharedMemory<float>(0);
  if (i % 2 == 0) {
    s[i] = 0;
  } else {
    s[i] = 1;
  }
  SyncWarp();
  for (int round = 0; round < 3; ++round) {
    if (round > 0 || i < 8) s[i] = 2;
    SyncWarp();
  }
}

void ShuffleKernel(float* out) {
  const int i = ThreadIndex();
  float sum = static_cast<float>(i);
  for (int delta = 16; delta > 0; delta /= 2) sum += ShuffleXor(sum, delta);
  out[i] = sum + ShuffleDown(sum, 1) + 1000 * ShuffleDown(static_cast<float>(i), 2);
}

// c (16, 8) = a (16, 32 bytes of k) * b (8, 32 bytes of k)^T, or from a (k, 16) and b (k, 8).
template <class Type, class T>
void ProductKernel(bool transposed, const T* a, const T* b, float* c) {
  constexpr int kDepth = 32 / sizeof(T), kPitch = 48 / sizeof(T), kPitchTransposed = 24;
  const int lane = ThreadIndex();
  Shared<T> s = SharedMemory<T>(0);
  const int pitch = transposed ? kPitchTransposed : kPitch;
  for (int i = lane; i < 24 * kDepth; i += 32) {
    const int column = i % 24, k = i / 24;  // column: of a, then of b
    const T value = transposed ? column < 16 ? a[k * 16 + column] : b[k * 8 + column - 16]
                               : (column < 16 ? a + column * kDepth : b + (column - 16) * kDepth)[k];
    s[transposed ? k * pitch + column : column * pitch + k] = value;
  }
  SyncThreads();
  uint32_t a_words[4], b_words[4];
  const Shared<const Vector16> rows = SharedMemory<const Vector16>(0);  // of 3 vectors
  if (transposed) {
    LoadMatrix4Transposed(a_words, rows + (lane % 8 + lane / 16 * 8) * 3 + lane / 8 % 2);
    LoadMatrix4Transposed(b_words, rows + (lane % 16) * 3 + 2);
  } else {
    LoadMatrix4(a_words, rows + (lane % 16) * 3 + lane / 16);
    LoadMatrix4(b_words, rows + (16 + lane % 8) * 3 + lane / 8 % 2);
  }
  float sums[4] = {1, 1, 1, 1};
  MultiplyAccumulate(sums, a_words, {b_words[0], b_words[1]}, Type());
  for (int i = 0; i < 4; ++i) c[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

namespace {

uint16_t Bits16(float value, bool half) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (!half) return static_cast<uint16_t>(bits >> 16);
  const _Float16 narrow = static_cast<_Float16>(value);
  uint16_t result;
  std::memcpy(&result, &narrow, 2);
  return result;
}

// Small integers, whose products and sums are exact.
template <class Type, class T>
bool ProductIsRight(bool transposed) {
  constexpr int kDepth = 32 / sizeof(T);
  std::mt19937 random(1);
  std::vector<T> a(16 * kDepth), b(8 * kDepth);
  std::vector<float> c(16 * 8), expected(16 * 8, 1.0f);
  std::vector<float> values(24 * kDepth);
  for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 31)) - 15;
  for (int i = 0; i < 24 * kDepth; ++i) {
    T& to = i < 16 * kDepth ? a[i] : b[i - 16 * kDepth];
    // TF32 does not see the last 13 bits.
    if constexpr (sizeof(T) == 4) {
      std::memcpy(&to, &values[i], 4);
      reinterpret_cast<uint32_t&>(to) |= 0x1fff;
    } else {
      to = {Bits16(values[i], std::is_same_v<Type, Float16>)};
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < kDepth; ++k) {
        expected[m * 8 + n] += values[transposed ? k * 16 + m : m * kDepth + k] *
                               values[16 * kDepth + (transposed ? k * 8 + n : n * kDepth + k)];
      }
    }
  }
  LoadAndLaunch(ProductKernel<Type, T>, 1, 32, 2048, transposed, a.data(), b.data(), c.data());
  return c == expected;
}

// Of a warp, for the counts.
void RunAccess(const std::string& name, int element_bytes, int pitch, int lanes) {
  alignas(128) static float memory[kAccessBytes / sizeof(float)];
  const auto run = [&](auto kernel, auto... arguments) { LoadAndLaunch(kernel, 1, kWarp, kAccessBytes, arguments...); };
  if (name == "rows") return run(CopyRowsKernel, pitch, memory);
  if (name == "apart") return run(ApartKernel);
  const auto access = name == "read"     ? Access::kRead
                      : name == "write"  ? Access::kWrite
                      : name == "copy"   ? Access::kCopy
                      : name == "matrix" ? Access::kLoadMatrix
                      : name == "global" ? Access::kLoadGlobal
                                         : Access::kAtomicAdd;
  const auto kernel = element_bytes == 2   ? AccessKernel<BFloat16>
                      : element_bytes == 4 ? AccessKernel<float>
                      : element_bytes == 8 ? AccessKernel<Vector8>
                                           : AccessKernel<Vector16>;
  run(kernel, access, pitch, lanes, memory);
}

int Main(const std::string& name) {
  std::vector<float> in(4 * kThreads, 3.0f), out(kThreads);
  const auto exchange = [&](Exchange e, int bytes = kThreads* 4) {
    return LoadAndLaunch(ExchangeKernel, 2, kThreads, bytes, e, out.data());
  };
  const auto run = [&](auto kernel, auto... arguments) {
    return LoadAndLaunch(kernel, 2, kThreads, kBytes, arguments...);
  };
  if (name == "sound") {
    exchange({});
    for (int i = 0; i < kThreads; ++i) {
      if (out[i] != static_cast<float>(i ^ 1)) return 1;
    }
    exchange({33});
    exchange({1, false, true});
    run(OverwriteKernel, true, out.data());
    run(CopyKernel, true, in.data(), out.data());
    for (int i = 0; i < kThreads; ++i) {
      if (out[i] != (i % 2 == 0 ? 3 : 0)) return 1;
    }
    run(DivergentKernel, -1);
    run(BankKernel, 5);
    run(ShuffleKernel, out.data());
    return out[33] != 2 * 1520 + 35000;
  }
  if (name == "products") {
    return !(ProductIsRight<Float16, Float16>(false) && ProductIsRight<Float16, Float16>(true) &&
             ProductIsRight<BFloat16, BFloat16>(false) && ProductIsRight<BFloat16, BFloat16>(true) &&
             ProductIsRight<TF32, float>(false));
  }
  if (name == "launches") {
    return exchange({}, kMostSharedBytes + 4) == cudaSuccess ||
           LoadAndLaunch(DivergentKernel, dim3(1, 65536), 32, 0, -1) == cudaSuccess ||
           LoadAndLaunch(DivergentKernel, 1, 1056, 0, -1) == cudaSuccess ||
           Launch(DivergentKernel, 1, 32, 8, &device_streams[0], -1) == cudaSuccess ||
           Launch(DivergentKernel, 1, 32, 0, &device_streams[1], -1) == cudaSuccess;
  }
  if (name == "not_loaded") {
    cudaSetDevice(1);
    Launch(DivergentKernel, 1, 32, 0, &device_streams[1], -1);
  }
  if (name == "no_barrier") exchange({33, false});
  if (name == "no_warp_barrier") exchange({1, false});
  if (name == "warp_barrier_between_warps") exchange({33, false, true});
  if (name == "no_barrier_before_write") run(OverwriteKernel, false, out.data());
  if (name == "beyond_shared") exchange({1, true, false, 1});
  if (name == "never_written") exchange({1, true, false, 1}, kBytes);
  if (name == "no_wait") run(CopyKernel, false, in.data(), out.data());
  if (name == "ended_thread") run(DivergentKernel, 0);
  if (name == "divergent_barrier") run(DivergentKernel, 1);
  if (name == "divergent_shuffle") run(DivergentKernel, 2);
  if (name == "two_shuffles") run(DivergentKernel, 3);
  if (name == "two_barriers") run(DivergentKernel, 4);
  if (name == "bank_conflict") run(BankKernel, 4);
  if (name == "misaligned") run(MisalignedKernel, in.data());
  if (name == "beyond_global") {
    std::vector<float> few(kThreads - 1);
    run(GlobalKernel, few.data(), out.data());
  }
  return 0;
}

}  // namespace
}  // namespace cuda
}  // namespace jax_dcn

int main(int count, char** arguments) {
  if (count != 3 && count != 6) return 2;
  jax_dcn::cuda::on_cpu::settings.seed = std::strtoull(arguments[2], nullptr, 10);
  if (count == 6) {
    jax_dcn::cuda::RunAccess(arguments[1], std::atoi(arguments[3]), std::atoi(arguments[4]), std::atoi(arguments[5]));
    return 0;
  }
  return jax_dcn::cuda::Main(arguments[1]);
}
