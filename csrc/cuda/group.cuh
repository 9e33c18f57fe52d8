// The threads that share a row: one thread, a warp, or a block. Sums are formed in one fixed order,
// whatever the schedule. In a group some threads lead: they get the sums and do what is done once a
// row, in double, which a GPU has few units for; then they share the result.
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

template <int N>
__device__ __forceinline__ Doubles<N> in_double(const Floats<N>& x) {
  Doubles<N> result;
#pragma unroll
  for (int n = 0; n < N; ++n) result.v[n] = x.v[n];
  return result;
}

struct ThreadGroup {
  __device__ bool leads() const { return true; }
  template <int N>
  __device__ Doubles<N> sum(const Floats<N>& x) const {
    return in_double(x);
  }
  template <int Slot, int N>
  __device__ Floats<N> share(const Floats<N>& x) const {
    return x;
  }
};

constexpr int kWarpRows = 4;  // rows, and warps, of a block whose rows have a warp each

struct WarpGroup {
  static constexpr int kMaxThreads = kWarpRows * kWarp;

  __device__ i64 row() const {
    return static_cast<i64>(blockIdx.x) * kWarpRows + threadIdx.x / kWarp;
  }
  __device__ int thread() const { return threadIdx.x % kWarp; }
  __device__ int threads() const { return kWarp; }
  __device__ bool leads() const { return true; }
  __device__ bool is_first() const { return thread() == 0; }
  template <int N>
  __device__ Doubles<N> sum(const Floats<N>& x) const {
    return in_double(warp_sum(x));
  }
  template <int Slot, int N>
  __device__ Floats<N> share(const Floats<N>& x) const {
    return x;
  }
};

// The first warp leads.
struct BlockGroup {
  static constexpr int kMaxThreads = 512;
  static constexpr int kMaxSums = 4;
  static constexpr int kSlots = 3, kSlotFloats = 8;
  static constexpr int kPartials = kMaxThreads / kWarp * kMaxSums;
  using Memory = BlockMemory<(kPartials + kSlots * kSlotFloats) * sizeof(float)>;

  __device__ i64 row() const { return blockIdx.x; }
  __device__ int thread() const { return threadIdx.x; }
  __device__ int threads() const { return blockDim.x; }
  __device__ bool leads() const { return threadIdx.x < kWarp; }
  __device__ bool is_first() const { return threadIdx.x == 0; }

  // For the threads that lead. Between two sums there must be a share, whose barrier keeps the
  // second from overwriting what the first still reads.
  template <int N>
  __device__ Doubles<N> sum(const Floats<N>& x) const {
    static_assert(N <= kMaxSums, "room for partial sums");
    const Shared<float> partials = Memory::at<float>(0);
    const Floats<N> own = warp_sum(x);
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) partials.store(threadIdx.x / kWarp * N + n, own.v[n]);
    }
    block_barrier();
    Doubles<N> sum{};
    if (leads()) {
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
#pragma unroll
        for (int n = 0; n < N; ++n) sum.v[n] += partials.load(warp * N + n);
      }
    }
    return sum;
  }

  // What the first thread has. Each use in a kernel has a slot of its own: none is written while
  // another is still being read.
  template <int Slot, int N>
  __device__ Floats<N> share(const Floats<N>& x) const {
    static_assert(Slot < kSlots && N <= kSlotFloats, "room for what is shared");
    const Shared<float> slot = Memory::at<float>((kPartials + Slot * kSlotFloats) * sizeof(float));
    if (is_first()) {
#pragma unroll
      for (int n = 0; n < N; ++n) slot.store(n, x.v[n]);
    }
    block_barrier();
    Floats<N> shared;
#pragma unroll
    for (int n = 0; n < N; ++n) shared.v[n] = slot.load(n);
    return shared;
  }
};

}  // namespace cuda
}  // namespace oprd
