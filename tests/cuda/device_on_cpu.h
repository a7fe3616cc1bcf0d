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
//  - a misaligned 16-byte access to global memory.
// Accesses outside arrays in global memory are left to AddressSanitizer.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#define JAX_DCN_GLOBAL
#define JAX_DCN_DEVICE inline
#define JAX_DCN_LAUNCH_BOUNDS(threads, blocks)

namespace jax_dcn {
namespace cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct TF32 {};

namespace on_cpu {

inline constexpr int kWarp = 32;

// Where in the sources a facility is called: as a default argument, where the function that has it is called.
struct Site {
  const char* file;
  int line;
  static constexpr Site Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Settings {
  uint64_t seed = 0;  // of the order of blocks and threads
  // A fault planted into the facilities, to see that it is found: the name and which call of each thread.
  const char* fault = "";
  int fault_call = 0;
};
extern Settings settings;

[[noreturn]] void Fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The address of `bytes` of the running block's shared memory, after all checks of a read or write of them.
char* SharedBytes(ptrdiff_t offset, int bytes, int alignment, bool write);

// Waits for the other threads of the warp, each with an `operand`; the last one calls `all` with those of all lanes.
using Operands = void* [kWarp];
void Collective(const char* what, Site, void* operand, void (*all)(Operands&));

void CheckGlobal(const char* what, const void*, int alignment);

enum class MatrixType { kHalf, kBFloat16, kTF32 };
void MultiplyAccumulate(float* c, const uint32_t* a, const uint32_t* b, MatrixType, Site);
void LoadMatrix4(uint32_t* r, ptrdiff_t row, bool transposed, Site);
void CopyAsync16(ptrdiff_t to, const void* from, bool valid);
void CopyWait(int pending);

cudaError_t Run(void (*kernel)(), dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

}  // namespace on_cpu

struct Index3 {
  int x, y, z;
};
int ThreadIndex();
Index3 BlockIndex();

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
Shared<T> SharedMemory() {
  return Shared<T>(0);
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
    for (int lane = 0; lane < on_cpu::kWarp; ++lane) {
      Operand& own = *static_cast<Operand*>(operands[lane]);
      const int from = own.source(lane, own.argument);
      if (from < on_cpu::kWarp) own.result = static_cast<Operand*>(operands[from])->value;
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

template <class T, class U>
void CopyAsync16(Shared<T> to, const U* from, bool valid = true) {
  on_cpu::CopyAsync16(to.offset(), from, valid);
}
void CopyCommit();
template <int kPending>
void CopyWait() {
  on_cpu::CopyWait(kPending);
}

template <class T>
void LoadMatrix4(uint32_t (&r)[4], Shared<T> row, on_cpu::Site site = on_cpu::Site::Here()) {
  on_cpu::LoadMatrix4(r, row.offset(), false, site);
}
template <class T>
void LoadMatrix4Transposed(uint32_t (&r)[4], Shared<T> row, on_cpu::Site site = on_cpu::Site::Here()) {
  on_cpu::LoadMatrix4(r, row.offset(), true, site);
}

template <class Type>
void MultiplyAccumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Type,
                        on_cpu::Site site = on_cpu::Site::Here()) {
  constexpr auto type = std::is_same_v<Type, Half>       ? on_cpu::MatrixType::kHalf
                        : std::is_same_v<Type, BFloat16> ? on_cpu::MatrixType::kBFloat16
                                                         : on_cpu::MatrixType::kTF32;
  on_cpu::MultiplyAccumulate(c, a, b, type, site);
}

// Blocks run one after another, so plain additions will do.
template <class T>
void AtomicAdd(T* to, T value) {
  *to += value;
}
template <class Vector>
void AtomicAdd4(float* to, const Vector& value) {
  static_assert(sizeof(Vector) == 4 * sizeof(float));
  on_cpu::CheckGlobal("AtomicAdd4", to, 16);
  float values[4];
  std::memcpy(values, &value, sizeof(values));
  for (int i = 0; i < 4; ++i) to[i] += values[i];
}

inline uint4 LoadGlobal16(const void* from) {
  on_cpu::CheckGlobal("LoadGlobal16", from, 16);
  const auto* words = static_cast<const unsigned*>(from) + 4 * (std::strcmp(on_cpu::settings.fault, "load") == 0);
  return {words[0], words[1], words[2], words[3]};
}

template <class... Parameters, class... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  const std::tuple<Parameters...> parameters(arguments...);
  return on_cpu::Run(reinterpret_cast<void (*)()>(kernel), grid, block, shared_bytes,
                     [&] { std::apply(kernel, parameters); });
}

}  // namespace cuda
}  // namespace jax_dcn
