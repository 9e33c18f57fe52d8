// Storage types, the units that a thread reads at a time, and the positions of rows.
#pragma once

#include "group.cuh"

namespace oprd {
namespace cuda {

template <DType>
struct Storage;

template <>
struct Storage<DType::kFloat32> {
  using type = float;
  static constexpr int kPerWord = 1;
  __device__ static float get(float x) { return x; }
  __device__ static float put(float x) { return x; }
  __device__ static Floats<1> unpack(std::uint32_t word) { return {{float_of(word)}}; }
  __device__ static std::uint32_t pack(const Floats<1>& x) { return bits_of(x.v[0]); }
};

template <>
struct Storage<DType::kBFloat16> {
  using type = std::uint16_t;
  static constexpr int kPerWord = 2;
  __device__ static float get(std::uint16_t x) { return float_of(std::uint32_t{x} << 16); }
  __device__ static std::uint16_t put(float x) {
    return static_cast<std::uint16_t>(bf16_pair(x, 0.f));
  }
  __device__ static Floats<2> unpack(std::uint32_t word) {
    return {{float_of(word << 16), float_of(word & 0xffff0000u)}};
  }
  __device__ static std::uint32_t pack(const Floats<2>& x) { return bf16_pair(x.v[0], x.v[1]); }
};

template <>
struct Storage<DType::kFloat16> {
  using type = std::uint16_t;
  static constexpr int kPerWord = 2;
  __device__ static float get(std::uint16_t x) { return float_of_half(x); }
  __device__ static std::uint16_t put(float x) {
    return static_cast<std::uint16_t>(half_pair(x, 0.f));
  }
  __device__ static Floats<2> unpack(std::uint32_t word) {
    return {{float_of_half(static_cast<std::uint16_t>(word)),
             float_of_half(static_cast<std::uint16_t>(word >> 16))}};
  }
  __device__ static std::uint32_t pack(const Floats<2>& x) { return half_pair(x.v[0], x.v[1]); }
};

// Consecutive elements as they are stored in memory.
template <int N>
using Words = Array<std::uint32_t, N>;

template <int N, class T>
__device__ __forceinline__ Words<N> load_words(const T* p) {
  static_assert(N == 2 || N == 4, "8 or 16 bytes");
  if constexpr (N == 4) {
    const uint4 raw = load_once(reinterpret_cast<const uint4*>(p));
    return {{raw.x, raw.y, raw.z, raw.w}};
  } else {
    const uint2 raw = load(reinterpret_cast<const uint2*>(p));
    return {{raw.x, raw.y}};
  }
}
template <int N, class T>
__device__ __forceinline__ void store_words(T* p, const Words<N>& x) {
  static_assert(N == 2 || N == 4, "8 or 16 bytes");
  if constexpr (N == 4) {
    store_once(reinterpret_cast<uint4*>(p), uint4{x.v[0], x.v[1], x.v[2], x.v[3]});
  } else {
    store(reinterpret_cast<uint2*>(p), uint2{x.v[0], x.v[1]});
  }
}

template <DType D, int N>
__device__ __forceinline__ Words<N / Storage<D>::kPerWord> packed(const Floats<N>& x) {
  constexpr int kPer = Storage<D>::kPerWord;
  Words<N / kPer> words;
#pragma unroll
  for (int w = 0; w < N / kPer; ++w) {
    Floats<kPer> part;
#pragma unroll
    for (int n = 0; n < kPer; ++n) part.v[n] = x.v[w * kPer + n];
    words.v[w] = Storage<D>::pack(part);
  }
  return words;
}
template <DType D, int N>
__device__ __forceinline__ Floats<N * Storage<D>::kPerWord> unpacked(const Words<N>& words) {
  constexpr int kPer = Storage<D>::kPerWord;
  Floats<N * kPer> x;
#pragma unroll
  for (int w = 0; w < N; ++w) {
    const Floats<kPer> part = Storage<D>::unpack(words.v[w]);
#pragma unroll
    for (int n = 0; n < kPer; ++n) x.v[w * kPer + n] = part.v[n];
  }
  return x;
}
// Stores element n of words. The element must be 0 before.
template <DType D, int N>
__device__ __forceinline__ void put_element(Words<N>& words, int n, typename Storage<D>::type x) {
  constexpr int kPer = Storage<D>::kPerWord;
  if constexpr (kPer == 1) {
    words.v[n] = bits_of(x);
  } else {
    words.v[n / kPer] |= std::uint32_t{x} << (16 * (n % kPer));
  }
}

// The unit that a thread reads and writes at a time: a vector of 16 bytes, or one element if the
// width, the base address or the strides do not allow vectors.
template <DType D, bool Vector>
struct Unit;

template <DType D>
struct Unit<D, true> {
  using S = Storage<D>;
  using type = typename S::type;
  using Raw = Words<4>;
  static constexpr int kElements = 4 * S::kPerWord;

  __device__ static Raw load(const type* row, i64 u) {
    return load_words<4>(row + u * kElements);
  }
  __device__ static void store(type* row, i64 u, const Floats<kElements>& x) {
    store_words<4>(row + u * kElements, packed<D>(x));
  }
  __device__ static Floats<kElements> floats(const Raw& raw) { return unpacked<D>(raw); }
};

template <DType D>
struct Unit<D, false> {
  using S = Storage<D>;
  using type = typename S::type;
  using Raw = type;
  static constexpr int kElements = 1;

  __device__ static Raw load(const type* row, i64 u) { return cuda::load(row + u); }
  __device__ static void store(type* row, i64 u, const Floats<1>& x) {
    cuda::store(row + u, S::put(x.v[0]));
  }
  __device__ static Floats<1> floats(Raw raw) { return {{S::get(raw)}}; }
};

// Whether rows can be read in vectors of 16 bytes.
inline bool takes_vectors(const Rows& rows, i64 width) {
  const i64 element = rows.dtype == DType::kFloat32 ? 4 : 2;
  auto whole = [&](i64 elements) { return elements * element % 16 == 0; };
  return reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0 && whole(width) &&
         whole(rows.stride_inner) &&
         (rows.stride_outer == rows.inner * rows.stride_inner || whole(rows.stride_outer));
}

template <class T>
__device__ __forceinline__ T* row_of(const Strided& rows, i64 n) {
  T* data = static_cast<T*>(rows.data);
  if (rows.inner == 0) return data + n * rows.stride_inner;
  return data + n / rows.inner * rows.stride_outer + n % rows.inner * rows.stride_inner;
}

__device__ __forceinline__ i64 student_row(const Batch& b, i64 i) {
  return b.student_rows ? load(b.student_rows + i) : i;
}
__device__ __forceinline__ i64 teacher_row(const Batch& b, i64 i) {
  return b.teacher_rows ? load(b.teacher_rows + i) : i;
}
__device__ __forceinline__ float weight(const Batch& b, i64 i) {
  return b.weights ? load(b.weights + i) : 1.f;
}

// Resets the counter with which the reduction of the call counts its blocks.
__device__ __forceinline__ void reset_ticket(double* tickets) {
  if (tickets && blockIdx.x == 0 && threadIdx.x == 0) {
    store(reinterpret_cast<std::uint32_t*>(tickets + blockIdx.y), std::uint32_t{0});
  }
}

__device__ __forceinline__ float value_of(const Scale& scale) {
  if (!scale.device) return scale.value;
  const float value = load(scale.device);
  if (!scale.inverse) return value;
  return value == 0.f ? 0.f : 1.f / value;
}

}  // namespace cuda
}  // namespace oprd
