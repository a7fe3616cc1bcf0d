// The device facilities of csrc/cuda/device.h on the CPU, so that the kernels' own sources run, and are checked, where
// there is no GPU.
//
// The threads of a block are fibers that run one at a time from one synchronisation to the next, in an order drawn at
// random. These end the process with a message that names the kernel, the block and the thread:
//  - a barrier or a warp collective that not all of its threads reach, or that they reach at different lines;
//  - an access to shared memory outside the launch's dynamic size, misaligned, of memory never written, or while a
//    CopyAsync16 may still write it;
//  - two threads at the same shared memory, one of them writing, without a SyncThreads, or within a warp a SyncWarp,
//    between them (other warp collectives exchange registers but do not order memory);
//  - a misaligned vector access to global memory;
//  - bank conflicts of LoadMatrix4.
// Accesses outside arrays in global memory are left to AddressSanitizer.
//
// If the environment variable JAX_DCN_ACCESS_COUNTS names a file, each launch adds to it the counts of access_counts.h.

#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <type_traits>

#include "../../csrc/cuda/device.h"  // the types of both sides

#define JAX_DCN_GLOBAL
#define JAX_DCN_DEVICE inline
#define JAX_DCN_LAUNCH_BOUNDS(threads, blocks)

namespace jax_dcn {
namespace cuda {

namespace on_cpu {

// Where in the sources a facility is called: as a default argument, where the function that has it is called.
struct Site {
  const char* file;
  int line;
  static constexpr Site Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Faults planted into the facilities, to see that they are found.
enum class Fault {
  kNone,
  kBarrier,       // a SyncThreads that does nothing
  kBarrierOfOne,  // ... in thread 0
  kWait,          // a CopyWait that does nothing
  kShared,        // a LoadMatrix4 from beyond the shared memory
  kGlobal,        // all vectors are loaded from the next address
};

struct Settings {
  uint64_t seed = 0;  // of the order of blocks and threads
  Fault fault = Fault::kNone;
  int fault_call = 0;  // which call of each thread, from 0 on
  const char* access_counts = std::getenv("JAX_DCN_ACCESS_COUNTS");
};
extern Settings settings;

[[noreturn]] void Fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The address of `bytes` of the running block's shared memory, after all checks of a read or write of them.
char* SharedBytes(ptrdiff_t offset, int bytes, int alignment, bool write);

// Waits for the other threads of the warp, each with an `operand`; the last one calls `all` with those of all lanes.
using Operands = void* [kWarp];
void Collective(const char* what, Site, void* operand, void (*all)(Operands&));

void CheckGlobal(const char* what, const void*, int alignment);
void CountGlobal(const char* what, const void*, int bytes);
template <class Vector>
Vector LoadGlobal(const char* what, const void* from) {
  CheckGlobal(what, from, sizeof(Vector));
  CountGlobal(what, from, sizeof(Vector));
  return static_cast<const Vector*>(from)[settings.fault == Fault::kGlobal];
}

enum class MatrixType { kFloat16, kBFloat16, kTF32 };
void MultiplyAccumulate(float* c, const uint32_t* a, const uint32_t* b, MatrixType, Site);
void LoadMatrix4(uint32_t* r, ptrdiff_t row, bool transposed, Site);
void CopyAsync16(ptrdiff_t to, const Vector16& value);
void CopyWait(int pending);

cudaError_t Run(void (*kernel)(), dim3 grid, int block, int shared_bytes, const std::function<void()>& thread);

// The kernels of each device that were loaded, with the shared memory that their blocks may have; how often any was;
// and those that were launched. Devices take turns.
extern std::mutex turn;
extern std::map<const void*, int> loaded[kDevices];
extern int loads;
extern std::set<const void*> launched[kDevices];

}  // namespace on_cpu

int ThreadIndex();
BlockIndices BlockIndex();

// A pointer into shared memory. Elements of a Shared<const T> are values; of a Shared<T>, references that read and
// write when converted and assigned.
template <class T>
class Shared {
  using Value = std::remove_const_t<T>;

 public:
  class Reference {
   public:
    explicit Reference(ptrdiff_t offset) : offset_(offset) {}
    operator Value() const { return Read(offset_); }
    Value operator=(Value value) const {
      std::memcpy(on_cpu::SharedBytes(offset_, sizeof(T), alignof(T), true), &value, sizeof(T));
      return value;
    }
    Value operator=(const Reference& other) const { return *this = static_cast<Value>(other); }
    Value operator+=(Value value) const { return *this = static_cast<Value>(*this) + value; }

   private:
    ptrdiff_t offset_;
  };
  using Element = std::conditional_t<std::is_const_v<T>, Value, Reference>;

  Shared() = default;
  explicit Shared(ptrdiff_t offset) : offset_(offset) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  Shared(Shared<U> other) : offset_(other.offset()) {}

  ptrdiff_t offset() const { return offset_; }
  Shared operator+(ptrdiff_t i) const { return Shared(offset_ + i * ptrdiff_t{sizeof(T)}); }
  Shared& operator+=(ptrdiff_t i) { return *this = *this + i; }
  Element operator*() const { return (*this)[0]; }
  Element operator[](ptrdiff_t i) const {
    const ptrdiff_t at = (*this + i).offset_;
    if constexpr (std::is_const_v<T>) {
      return Read(at);
    } else {
      return Reference(at);
    }
  }

 private:
  static Value Read(ptrdiff_t offset) {
    Value value;
    std::memcpy(&value, on_cpu::SharedBytes(offset, sizeof(T), alignof(T), false), sizeof(T));
    return value;
  }

  ptrdiff_t offset_ = 0;
};

template <class T>
Shared<T> SharedMemory(int byte) {
  return Shared<T>(byte);
}

template <class U, class T>
Shared<U> SharedCast(Shared<T> from) {
  return Shared<U>(from.offset());
}

void SyncThreads(on_cpu::Site = on_cpu::Site::Here());
void SyncWarp(on_cpu::Site = on_cpu::Site::Here());

template <class T>
T Shuffle(const char* what, T value, int (*source)(int lane, int argument), int argument, on_cpu::Site site) {
  struct Operand {
    T value, result;
    int (*source)(int, int);
    int argument;
  } operand{value, value, source, argument};
  on_cpu::Collective(what, site, &operand, [](on_cpu::Operands& operands) {
    for (int lane = 0; lane < kWarp; ++lane) {
      Operand& own = *static_cast<Operand*>(operands[lane]);
      const int from = own.source(lane, own.argument);
      if (from < kWarp) own.result = static_cast<Operand*>(operands[from])->value;
    }
  });
  return operand.result;
}

template <class T>
T ShuffleXor(T value, int lane_mask, on_cpu::Site site = on_cpu::Site::Here()) {
  return Shuffle("ShuffleXor", value, [](int lane, int mask) { return lane ^ mask; }, lane_mask, site);
}

template <class T>
T ShuffleDown(T value, int delta, on_cpu::Site site = on_cpu::Site::Here()) {
  return Shuffle("ShuffleDown", value, [](int lane, int delta) { return lane + delta; }, delta, site);
}

inline void CopyAsync16(Shared<Vector16> to, const void* from, bool valid) {
  on_cpu::CheckGlobal("CopyAsync16", from, 16);
  if (valid) on_cpu::CountGlobal("CopyAsync16", from, 16);
  on_cpu::CopyAsync16(to.offset(), valid ? *static_cast<const Vector16*>(from) : Vector16{});
}
void CopyCommit();
template <int kPending>
void CopyWait() {
  on_cpu::CopyWait(kPending);
}

inline void LoadMatrix4(uint32_t (&to)[4], Shared<const Vector16> row, on_cpu::Site site = on_cpu::Site::Here()) {
  on_cpu::LoadMatrix4(to, row.offset(), false, site);
}
inline void LoadMatrix4Transposed(uint32_t (&to)[4], Shared<const Vector16> row,
                                  on_cpu::Site site = on_cpu::Site::Here()) {
  on_cpu::LoadMatrix4(to, row.offset(), true, site);
}

template <class Tag>
void MultiplyAccumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tag,
                        on_cpu::Site site = on_cpu::Site::Here()) {
  static_assert(!kTuring || std::is_same_v<Tag, Float16>);
  constexpr auto type = std::is_same_v<Tag, Float16>    ? on_cpu::MatrixType::kFloat16
                        : std::is_same_v<Tag, BFloat16> ? on_cpu::MatrixType::kBFloat16
                                                        : on_cpu::MatrixType::kTF32;
  on_cpu::MultiplyAccumulate(c, a, b, type, site);
}

inline Vector16 LoadGlobal16(const void* from) { return on_cpu::LoadGlobal<Vector16>("LoadGlobal16", from); }
inline Vector8 LoadGlobal8(const void* from) { return on_cpu::LoadGlobal<Vector8>("LoadGlobal8", from); }

// Blocks run one after another, so plain additions will do.
template <class Real>
void AtomicAdd(Real* to, Real value) {
  *to += value;
}
template <class Real>
void AtomicAdd4(Real* to, const Real (&value)[4]) {
  on_cpu::CheckGlobal("AtomicAdd4", to, 16);
  on_cpu::CountGlobal("AtomicAdd4", to, sizeof(value));
  for (int i = 0; i < 4; ++i) to[i] += value[i];
}

template <class To, class From>
To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline uint32_t FloatBits(float value) { return BitCast<uint32_t>(value); }
inline float BitsFloat(uint32_t bits) { return BitCast<float>(bits); }
inline uint64_t DoubleBits(double value) { return BitCast<uint64_t>(value); }
inline double BitsDouble(uint64_t bits) { return BitCast<double>(bits); }

inline float ToFloat(BFloat16 value) { return BitsFloat(static_cast<uint32_t>(value.bits) << 16); }
inline float ToFloat(Float16 value) { return static_cast<float>(BitCast<_Float16>(value)); }
inline void FromFloat(float value, BFloat16& to) {
  const uint32_t bits = FloatBits(value);
  to.bits = std::isnan(value) ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void FromFloat(float value, Float16& to) { to = BitCast<Float16>(static_cast<_Float16>(value)); }

template <class T>
uint32_t PackPair(float first, float second, T) {
  T pair[2];
  FromFloat(first, pair[0]);
  FromFloat(second, pair[1]);
  return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
}

inline float RoundToTF32(float value) {
  return !kTuring && std::isfinite(value) ? BitsFloat((FloatBits(value) + 0x1000) & 0xffffe000) : value;
}

// What a block may have: on the devices of 7.5, all of them; since, the first is of 9.0 in this, and the second of 8.6,
// 8.9 and 12.0, which have the least.
inline constexpr int kMostSharedBytes = kTuring ? 64 << 10 : 227 << 10;
inline constexpr int kSecondSharedBytes = kTuring ? 64 << 10 : 99 << 10;

inline cudaError_t MostSharedBytes(int device, int* bytes) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  *bytes = device == 0 ? kMostSharedBytes : kSecondSharedBytes;
  return cudaSuccess;
}

inline cudaError_t ZeroAsync(void* to, int64_t bytes, cudaStream_t stream) {
  return bytes == 0 ? cudaSuccess : cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), stream);
}

inline cudaError_t Load(const void* kernel, int shared_bytes) {
  int most = 0;
  MostSharedBytes(current_device, &most);
  if (shared_bytes > most) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> lock(on_cpu::turn);
  on_cpu::loaded[current_device][kernel] = shared_bytes;
  ++on_cpu::loads;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, int block, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (stream->device != current_device) return cudaErrorInvalidResourceHandle;
  const std::lock_guard<std::mutex> lock(on_cpu::turn);
  const void* address = reinterpret_cast<const void*>(kernel);
  const auto loaded = on_cpu::loaded[current_device].find(address);
  if (loaded == on_cpu::loaded[current_device].end()) on_cpu::Fail("a kernel is launched that was not loaded");
  if (shared_bytes > loaded->second) return cudaErrorInvalidValue;
  on_cpu::launched[current_device].insert(address);
  const std::tuple<Parameters...> parameters(arguments...);
  return on_cpu::Run(reinterpret_cast<void (*)()>(kernel), grid, block, shared_bytes,
                     [&] { std::apply(kernel, parameters); });
}

}  // namespace cuda
}  // namespace jax_dcn
