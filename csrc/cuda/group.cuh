// The threads that share a row: one thread, a warp, or a block. Sums are formed in one fixed order,
// whatever the schedule, and all threads get them, to the same bits.
#pragma once

#include "device.cuh"

namespace oprd {
namespace cuda {

template <class T, int N>
struct Array {
  T v[N];
};

template <int N>
using Floats = Array<float, N>;
template <int N>
using Doubles = Array<double, N>;

// The sums over a warp, to the same bits in all lanes: both partners add the same two values.
template <class T, int N>
__device__ __forceinline__ Array<T, N> warp_sum(Array<T, N> sum) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Array<T, N> other = shuffle_xor(sum, mask);
#pragma unroll
    for (int n = 0; n < N; ++n) sum.v[n] += other.v[n];
  }
  return sum;
}

// `Slot` tells one use of sum in a kernel from another.
struct ThreadGroup {
  template <int Slot, int N>
  __device__ Floats<N> sum(const Floats<N>& x) const {
    return x;
  }
};

constexpr int kWarpRows = 4;  // rows, and warps, of a block whose rows have a warp each

struct WarpGroup {
  static constexpr int kMaxThreads = kWarpRows * kWarp;
  // Their registers hold rows, and what is on its way to them keeps memory busy: that takes about 64
  // KB an SM.
  static constexpr int kMinBlocks = 5;

  __device__ i64 row() const {
    return static_cast<i64>(blockIdx.x) * kWarpRows + threadIdx.x / kWarp;
  }
  __device__ int warp() const { return 0; }
  __device__ int warps() const { return 1; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  __device__ bool is_first() const { return lane() == 0; }
  template <int Slot, int N>
  __device__ Floats<N> sum(const Floats<N>& x) const {
    return warp_sum(x);
  }
};

struct BlockGroup {
  static constexpr int kMaxThreads = 512, kMinBlocks = 1;
  static constexpr int kMaxSums = 4, kSlots = 3;
  static constexpr int kSlotFloats = kMaxThreads / kWarp * kMaxSums;
  using Memory = BlockMemory<kSlots * kSlotFloats * static_cast<int>(sizeof(float))>;

  __device__ i64 row() const { return blockIdx.x; }
  __device__ int warp() const { return threadIdx.x / kWarp; }
  __device__ int warps() const { return blockDim.x / kWarp; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  __device__ bool is_first() const { return threadIdx.x == 0; }

  // Every thread adds up the warps' sums: one barrier, where sharing a result would be a second. No
  // slot is written while another thread still reads it, as each is used once.
  template <int Slot, int N>
  __device__ Floats<N> sum(const Floats<N>& x) const {
    static_assert(Slot < kSlots && N <= kMaxSums, "room for the warps' sums");
    const Shared<float> slot = Memory::at<float>(Slot * kSlotFloats * static_cast<int>(sizeof(float)));
    const Floats<N> own = warp_sum(x);
    if (lane() == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) slot.store(warp() * N + n, own.v[n]);
    }
    block_barrier();
    Floats<N> sum{};
    for (int warp = 0; warp < warps(); ++warp) {
#pragma unroll
      for (int n = 0; n < N; ++n) sum.v[n] += slot.load(warp * N + n);
    }
    return sum;
  }
};

}  // namespace cuda
}  // namespace oprd
