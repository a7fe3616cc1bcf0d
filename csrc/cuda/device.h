// What is special to the device, in thin wrappers: the kernels use nothing else of CUDA. With JAX_DCN_CUDA_ON_CPU the
// same names come from the test harness, which runs the kernels on the CPU.

#pragma once

#include <cstdint>

#define JAX_DCN_TARGET cuda

namespace jax_dcn {
namespace cuda {

// Scalar types of 16 bits. They also name the tensor core operations on them, and TF32 that on float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct TF32 {};

// The unit of wide loads and stores.
struct alignas(16) Vector16 {
  uint32_t word[4];
};
struct alignas(8) Vector8 {
  uint32_t word[2];
};

struct BlockIndices {
  int x, y, z;
};

inline constexpr int kWarp = 32;

// Turing has no cp.async, and its tensor cores multiply float16 only.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kTuring = true;
#else
inline constexpr bool kTuring = false;
#endif

// How far a loop of two rounds is unrolled that has few registers to spare: before sm_90 ptxas spills some if it is.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int kTightUnroll = 1;
#else
inline constexpr int kTightUnroll = 2;
#endif

}  // namespace cuda
}  // namespace jax_dcn

#ifdef JAX_DCN_CUDA_ON_CPU
#include "device_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define JAX_DCN_GLOBAL __global__
#define JAX_DCN_DEVICE __device__ __forceinline__
#define JAX_DCN_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
#error "jax_dcn's CUDA kernels need compute capability 7.5 or later"
#endif

namespace jax_dcn {
namespace cuda {

// --- where a thread is, and its peers ---

JAX_DCN_DEVICE int ThreadIndex() { return static_cast<int>(threadIdx.x); }
JAX_DCN_DEVICE BlockIndices BlockIndex() {
  return {static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
}
JAX_DCN_DEVICE void SyncThreads() { __syncthreads(); }
JAX_DCN_DEVICE void SyncWarp() { __syncwarp(); }
template <class T>
JAX_DCN_DEVICE T ShuffleXor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// --- shared memory ---

// A pointer into shared memory, of which whole elements are read and written.
template <class T>
using Shared = T*;

// The block's dynamic shared memory from `byte` on, as elements of type T.
template <class T>
JAX_DCN_DEVICE Shared<T> SharedMemory(int byte) {
  extern __shared__ Vector16 shared_memory[];
  return reinterpret_cast<T*>(reinterpret_cast<char*>(shared_memory) + byte);
}

// The same memory as elements of another type.
template <class U, class T>
JAX_DCN_DEVICE Shared<U> SharedCast(Shared<T> from) {
  return reinterpret_cast<U*>(from);
}

JAX_DCN_DEVICE uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies 16 bytes from global to shared memory, or zeros if not `valid`. The copies between two commits are a group;
// CopyWait<n> waits until all of the thread's groups but the last n have arrived.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
JAX_DCN_DEVICE void CopyAsync16(Shared<Vector16> to, const void* from, bool valid) {
  const uint4 v = valid ? __ldg(static_cast<const uint4*>(from)) : uint4{};
  *to = {{v.x, v.y, v.z, v.w}};
}
JAX_DCN_DEVICE void CopyCommit() {}
template <int kPending>
JAX_DCN_DEVICE void CopyWait() {}
#else
JAX_DCN_DEVICE void CopyAsync16(Shared<Vector16> to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
JAX_DCN_DEVICE void CopyCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
JAX_DCN_DEVICE void CopyWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

// Loads four matrices of eight rows of 16 bytes, of which lane i names row i % 8 of matrix i / 8. Lane i receives word
// i % 4 of row i / 4 of each; transposed, the matrices are of 16-bit elements and lane i receives elements 2 * (i % 4)
// and the next of column i / 4.
JAX_DCN_DEVICE void LoadMatrix4(uint32_t (&to)[4], Shared<const Vector16> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(SharedAddress(row))
               : "memory");
}
JAX_DCN_DEVICE void LoadMatrix4Transposed(uint32_t (&to)[4], Shared<const Vector16> row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// --- tensor cores ---

// c += a * b of 16 x 32 bytes by 32 bytes x 8: mma.m16n8k16 of 16-bit types, mma.m16n8k8 of TF32.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// In two steps of eight k each; Turing multiplies float16 alone.
JAX_DCN_DEVICE void MultiplyAccumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
  for (int i = 0; i < 2; ++i) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
}
#else
#define JAX_DCN_MULTIPLY_ACCUMULATE(Tag, shape)                                                                \
  JAX_DCN_DEVICE void MultiplyAccumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tag) { \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"  \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                          \
  }
JAX_DCN_MULTIPLY_ACCUMULATE(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
JAX_DCN_MULTIPLY_ACCUMULATE(Float16, "m16n8k16.row.col.f32.f16.f16.f32")
JAX_DCN_MULTIPLY_ACCUMULATE(TF32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef JAX_DCN_MULTIPLY_ACCUMULATE
#endif

// --- global memory ---

// Loads of what no kernel writes while this one runs.
JAX_DCN_DEVICE Vector16 LoadGlobal16(const void* from) {
  const uint4 v = __ldg(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
JAX_DCN_DEVICE Vector8 LoadGlobal8(const void* from) {
  const uint2 v = __ldg(static_cast<const uint2*>(from));
  return {{v.x, v.y}};
}

template <class Real>
JAX_DCN_DEVICE void AtomicAdd(Real* to, Real value) {
  atomicAdd(to, value);
}
// Adds to four numbers, which begin at a multiple of 16 bytes.
JAX_DCN_DEVICE void AtomicAdd4(float* to, const float (&value)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value[0]), "f"(value[1]), "f"(value[2]),
               "f"(value[3])
               : "memory");
#else
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, value[i]);
#endif
}
JAX_DCN_DEVICE void AtomicAdd4(double* to, const double (&value)[4]) {
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, value[i]);
}

// --- conversions: to nearest, ties to even, but TF32, where ties go away from 0 ---

JAX_DCN_DEVICE float ToFloat(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
JAX_DCN_DEVICE float ToFloat(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
JAX_DCN_DEVICE void FromFloat(float value, BFloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
JAX_DCN_DEVICE void FromFloat(float value, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }

// Two elements in a word, the first in the low half.
JAX_DCN_DEVICE uint32_t PackPair(float first, float second, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
JAX_DCN_DEVICE uint32_t PackPair(float first, float second, Float16) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The nearest TF32, as a float; the value itself where there is no TF32.
JAX_DCN_DEVICE float RoundToTF32(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return value;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#endif
}

JAX_DCN_DEVICE uint32_t FloatBits(float value) { return __float_as_uint(value); }
JAX_DCN_DEVICE float BitsFloat(uint32_t bits) { return __uint_as_float(bits); }
JAX_DCN_DEVICE uint64_t DoubleBits(double value) { return static_cast<uint64_t>(__double_as_longlong(value)); }
JAX_DCN_DEVICE double BitsDouble(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }

// --- the host's side ---

inline cudaError_t ZeroAsync(void* to, int64_t bytes, cudaStream_t stream) {
  return bytes == 0 ? cudaSuccess : cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), stream);
}

// What a block may have of shared memory, in bytes: 64 KB on Turing, 99 KB and more since.
inline cudaError_t MostSharedBytes(int device, int* bytes) {
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Lets a kernel's blocks have that much shared memory on the current device, and loads it there: CUDA says of
// cudaFuncGetAttributes that it does, as the first launch would otherwise.
inline cudaError_t Load(const void* kernel, int shared_bytes) {
  constexpr int kDefaultSharedBytes = 48 << 10;  // what a block may have without asking
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

template <class... Parameters, class... Arguments>
cudaError_t Launch(void (*kernel)(Parameters...), dim3 grid, int block, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace cuda
}  // namespace jax_dcn

#endif  // JAX_DCN_CUDA_ON_CPU
