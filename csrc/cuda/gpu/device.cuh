// The interface of the kernels to the device. The emulation has a header of the same name and
// interface, which runs the kernels on the host and checks every access. Kernels access memory only
// through this interface.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace oprd {
namespace cuda {

constexpr int kWarp = 32;

// A parameter of a kernel, passed by value. In the emulation it is a reference, which avoids a copy
// for each thread.
template <class T>
using Parameter = T;

// Global memory. T is an element or a 16-byte vector (uint4, float4).
template <class T>
__device__ __forceinline__ T load(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store(T* p, T value) {
  *p = value;
}

// Access to vectors that a kernel reads or writes once, so they need not be in the first-level
// cache. OPRD_HINTS selects the instructions: 0 plain ones, 1 loads that do not allocate in L1, 2
// accesses that are also evicted first from L2.
#if !defined(OPRD_HINTS)
#define OPRD_HINTS 1
#endif
__device__ __forceinline__ uint4 load_once(const uint4* p) {
#if OPRD_HINTS == 0
  return *p;
#elif OPRD_HINTS == 1
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
#else
  return __ldcs(p);
#endif
}
__device__ __forceinline__ void store_once(uint4* p, const uint4& value) {
#if OPRD_HINTS == 2
  __stcs(p, value);
#else
  *p = value;
#endif
}

// Adds 1 and returns the previous value. Writes that this thread made or observed before are
// visible to any thread that counts later, and to the threads that a barrier orders after that
// thread.
__device__ __forceinline__ std::uint32_t count_ordered(std::uint32_t* counter) {
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}
// Loads a value that another block wrote before it counted, past L1.
template <class T>
__device__ __forceinline__ T load_published(const T* p) {
  return __ldcg(p);
}

// Elements of T in the block's shared memory.
template <class T>
class Shared {
 public:
  __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}
  __device__ __forceinline__ T load(int i) const { return data_[i]; }
  __device__ __forceinline__ void store(int i, T value) const { data_[i] = value; }
  // Begins a copy from global memory, which wait_for_copies completes.
  __device__ __forceinline__ void copy_async(int i, const T* from) const {
    __pipeline_memcpy_async(data_ + i, from, sizeof(T));
  }
  // The same memory as elements of another type.
  template <class Other>
  __device__ __forceinline__ Shared<Other> as() const {
    return Shared<Other>(reinterpret_cast<Other*>(data_));
  }

 private:
  T* data_;
};

// The whole shared memory of a kernel, of `Bytes` bytes.
template <int Bytes>
class BlockMemory {
 public:
  template <class T>
  __device__ __forceinline__ static Shared<T> at(int byte_offset) {
    return Shared<T>(reinterpret_cast<T*>(begin() + byte_offset));
  }

 private:
  __device__ __forceinline__ static unsigned char* begin() {
    __shared__ __align__(16) unsigned char memory[Bytes];
    return memory;
  }
};

// Waits for the copies that this thread has begun. A barrier then makes them visible to other
// threads.
__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`. All lanes must take part. T
// must consist of 32-bit words.
template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int mask) {
  constexpr int kWords = sizeof(T) / sizeof(std::uint32_t);
  std::uint32_t words[kWords];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(0xffffffffu, words[i], mask);
  T result;
  memcpy(&result, words, sizeof result);
  return result;
}

// a * b + c with one rounding. The compiler contracts nothing itself (-fmad=false).
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ __forceinline__ float rsqrt_rn(float x) { return __frsqrt_rn(x); }

// The operands that a lane contributes to a warp-wide product of 16 x 16 by 16 x 8 elements. The
// product is summed in float32 into c, of which lane 4 g + t holds rows g and g + 8 and columns 2 t
// and 2 t + 1.
struct TensorRows {
  std::uint32_t v[4];
};
struct TensorColumns {
  std::uint32_t v[2];
};
template <DType D>
__device__ __forceinline__ void tensor_product(float (&c)[4], const TensorRows& a,
                                               const TensorColumns& b) {
  static_assert(D != DType::kFloat32, "16-bit elements");
  if constexpr (D == DType::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b.v[0]), "r"(b.v[1]));
  }
}

__device__ __forceinline__ std::uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(std::uint32_t u) { return __uint_as_float(u); }
__device__ __forceinline__ float float_of_half(std::uint16_t h) {
  return __half2float(__ushort_as_half(h));
}

// Two floats rounded to nearest even, the first in the low half.
__device__ __forceinline__ std::uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  std::uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ __forceinline__ std::uint32_t half_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  std::uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (how.blocks > kMaxBlocks) fail(how, "more blocks than a launch may have");
  const dim3 grid(static_cast<unsigned>(how.blocks), static_cast<unsigned>(how.layers));
  kernel<<<grid, how.threads, 0, static_cast<cudaStream_t>(how.stream.handle)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) fail(how, cudaGetErrorString(error));
}

}  // namespace cuda
}  // namespace oprd
