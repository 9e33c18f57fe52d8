// The interface of gpu/device.cuh, on the host. Every memory access and every synchronisation goes
// through the emulated machine, which checks it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../cpu/simd.h"
#include "kernels.h"
#include "machine.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// CUDA's built-in variables of a thread, and its vector types.
#define threadIdx (::oprd::emulation::current().thread)
#define blockIdx (::oprd::emulation::current().block)
#define blockDim (::oprd::emulation::current().threads)
#define gridDim (::oprd::emulation::current().blocks)

struct alignas(8) uint2 {
  std::uint32_t x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace oprd {
namespace cuda {

constexpr int kWarp = emulation::kWarp;

template <class T>
using Parameter = const T&;

template <class T>
T load(const T* p) {
  emulation::global_access(p, sizeof(T), false);
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class T>
void store(T* p, T value) {
  emulation::global_access(p, sizeof(T), true);
  std::memcpy(p, &value, sizeof value);
}

inline uint4 load_once(const uint4* p) { return load(p); }
inline void store_once(uint4* p, const uint4& value) { store(p, value); }

inline std::uint32_t count_ordered(std::uint32_t* counter) {
  emulation::ordered_access(counter, sizeof *counter);
  return (*counter)++;
}
template <class T>
T load_published(const T* p) {
  return load(p);
}

template <class T>
class Shared {
 public:
  Shared(std::int64_t begin, int limit) : begin_(begin), limit_(limit) {}
  T load(int i) const {
    T value;
    std::memcpy(&value, emulation::shared_access(at(i), sizeof(T), limit_, false), sizeof value);
    return value;
  }
  void store(int i, T value) const {
    std::memcpy(emulation::shared_access(at(i), sizeof(T), limit_, true), &value, sizeof value);
  }
  // The copy arrives as late as possible: at wait_for_copies.
  void copy_async(int i, const T* from) const {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "what cp.async takes");
    const T value = cuda::load(from);
    emulation::copy_async(at(i), &value, sizeof value, limit_);
  }
  template <class Other>
  Shared<Other> as() const {
    return Shared<Other>(begin_, limit_);
  }

 private:
  std::int64_t at(int i) const { return begin_ + std::int64_t{i} * sizeof(T); }
  std::int64_t begin_;
  int limit_;
};

template <int Bytes>
struct BlockMemory {
  static_assert(Bytes <= 48 * 1024, "static shared memory");
  template <class T>
  static Shared<T> at(int byte_offset) {
    return Shared<T>(byte_offset, Bytes);
  }
};

inline void wait_for_copies() { emulation::wait_for_copies(); }

// The location in the source distinguishes barriers.
inline void block_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::block_barrier({file, line});
}
inline void warp_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::warp_barrier({file, line});
}

template <class T>
T shuffle_xor(const T& value, int mask, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  static_assert(sizeof(T) % sizeof(std::uint32_t) == 0, "made of words");
  T result;
  emulation::shuffle_xor({file, line}, mask, &value, &result, sizeof(T));
  return result;
}

// This fma rounds once. oprd::fma of csrc/cpu/simd.h may round twice.
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

struct TensorRows {
  std::uint32_t v[4];
};
struct TensorColumns {
  std::uint32_t v[2];
};
// Products of 16-bit elements are exact in float32. They are added in the order of the columns, and
// each addition rounds. The hardware instead aligns several products and truncates.
template <DType D>
void tensor_product(float (&c)[4], const TensorRows& a, const TensorColumns& b,
                    const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  struct Given {
    TensorRows a;
    TensorColumns b;
  };
  const Given own{a, b};
  Given all[kWarp];
  emulation::warp_gather({file, line}, &own, all, sizeof own);
  auto element = [](std::uint32_t word, int k) {
    const auto half = static_cast<std::uint16_t>(k % 2 ? word >> 16 : word);
    return D == DType::kBFloat16 ? float_of(std::uint32_t{half} << 16) : float_of_half(half);
  };
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;  // the lane of four that has column k
      const float x = element(all[4 * g + from].a.v[2 * (k / 8) + i / 2], k);
      const float y = element(all[4 * (2 * t + i % 2) + from].b.v[k / 8], k);
      c[i] += x * y;
    }
  }
}

inline float rsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }

inline std::uint32_t bf16_pair(float low, float high) {
  return bf16_of(low) | std::uint32_t{bf16_of(high)} << 16;
}
inline std::uint32_t half_pair(float low, float high) {
  return half_of(low) | std::uint32_t{half_of(high)} << 16;
}

template <class... Parameters, class... Arguments>
void launch(const Launch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (how.blocks > kMaxBlocks) fail(how, "more blocks than a launch may have");
  try {
    emulation::run(how.blocks, how.layers, how.threads, [&] { kernel(arguments...); });
  } catch (const emulation::Fault& fault) {
    fail(how, fault.what());
  }
}

}  // namespace cuda
}  // namespace oprd
