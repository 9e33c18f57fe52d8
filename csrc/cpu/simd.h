// Vectors of eight floats, and the three storage types. One translation unit per instruction set
// includes this file, so everything here has internal linkage. Otherwise the linker could pick code
// compiled for AVX2 for a caller that runs on a machine without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../rep_loss.h"

#define OPRD_INLINE static inline __attribute__((always_inline))

namespace oprd {
namespace {

using i64 = std::int64_t;
typedef float F8 __attribute__((vector_size(32)));
typedef std::uint32_t U8 __attribute__((vector_size(32)));
typedef std::uint16_t H8 __attribute__((vector_size(16)));
constexpr i64 kLanes = 8;

// Sixteen elements in two registers, in an order that depends on the storage type. Any order works
// for sums, and for element-wise operations whose operands and result have one storage type.
// arrange puts floats into the same order.
struct F16 {
  F8 a, b;
};
constexpr i64 kStep = 16;

OPRD_INLINE F8 broadcast(float x) { return F8{x, x, x, x, x, x, x, x}; }

// a * b + c, with one rounding if the hardware has FMA. The compiler must not contract by itself
// (-ffp-contract=off): a contracted x * a - y * b is not 0 for equal products.
OPRD_INLINE F8 fma(F8 a, F8 b, F8 c) {
#if defined(__FMA__)
  return (F8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

OPRD_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

OPRD_INLINE float sum_lanes(F8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

OPRD_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

OPRD_INLINE float float_of(std::uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

OPRD_INLINE std::uint16_t bf16_of(float x) {
  const std::uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

OPRD_INLINE float float_of_half(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shift the bits to a float whose exponent is 112 too small, then multiply. This is exact for
  // subnormals too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

OPRD_INLINE std::uint16_t half_of(float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint16_t sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  const float magnitude = std::fabs(x);
  if (!(magnitude == magnitude)) {
    return static_cast<std::uint16_t>(sign | 0x7e00u | ((u >> 13) & 0x3ffu));
  }
  if (magnitude >= 65520.f) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f) {  // subnormal: the float adder rounds to a multiple of 2^-24
    return static_cast<std::uint16_t>(sign | (bits_of(magnitude + 0.5f) - bits_of(0.5f)));
  }
  const std::uint32_t m = bits_of(magnitude);
  return static_cast<std::uint16_t>(sign | ((m - (112u << 23) + 0xfffu + ((m >> 13) & 1u)) >> 13));
}

template <DType>
struct Storage;

template <>
struct Storage<DType::kFloat32> {
  static constexpr DType dtype = DType::kFloat32;
  using type = float;
  static float get(float x) { return x; }
  static float put(float x) { return x; }
  OPRD_INLINE F8 load(const float* p) {
    F8 v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  OPRD_INLINE void store(float* p, F8 v) { std::memcpy(p, &v, sizeof v); }
  template <int Half>
  OPRD_INLINE F8 load_half(const float* p) { return load(p + Half * kLanes); }
  OPRD_INLINE F16 load16(const float* p) { return {load(p), load(p + kLanes)}; }
  OPRD_INLINE void store16(float* p, F16 v) {
    store(p, v.a);
    store(p + kLanes, v.b);
  }
};

template <>
struct Storage<DType::kBFloat16> {
  static constexpr DType dtype = DType::kBFloat16;
  using type = std::uint16_t;
  static float get(std::uint16_t x) { return float_of(static_cast<std::uint32_t>(x) << 16); }
  static std::uint16_t put(float x) { return bf16_of(x); }
  OPRD_INLINE F8 load(const std::uint16_t* p) {
#if defined(__AVX2__)  // GCC compiles __builtin_convertvector to five instructions instead of one
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (F8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
    H8 h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<F8>(__builtin_convertvector(h, U8) << 16);
#endif
  }
  // Rounds to nearest, ties to even, into the upper half of each lane. The carry turns a NaN into a
  // number only if its payload has bits below those of bf16; rounded handles that case.
  OPRD_INLINE U8 rounded_bf16_nan(F8 v) {
    const U8 u = reinterpret_cast<U8>(v);
    return u + 0x7fffu + ((u >> 16) & 1u);
  }
  OPRD_INLINE U8 rounded(F8 v) {
    return rounded_bf16_nan(v) | (reinterpret_cast<U8>(v != v) & 0x7fc00000u);
  }
  OPRD_INLINE void store(std::uint16_t* p, F8 v) {
    const U8 bits = rounded(v) >> 16;
#if defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)bits, _mm256_setzero_si256());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    const H8 h = __builtin_convertvector(bits, H8);
    std::memcpy(p, &h, sizeof h);
#endif
  }
  // Loads the even or the odd elements with a shift or a mask. Widening in order would take
  // shuffles.
  template <int Half>
  OPRD_INLINE F8 load_half(const std::uint16_t* p) {
    U8 u;
    std::memcpy(&u, p, sizeof u);
    return reinterpret_cast<F8>(Half == 0 ? u << 16 : u & 0xffff0000u);
  }
  OPRD_INLINE F16 load16(const std::uint16_t* p) { return {load_half<0>(p), load_half<1>(p)}; }
  // NaNs from load16, from `plain_nan` and from arithmetic stay NaN when rounded.
  OPRD_INLINE void store16(std::uint16_t* p, F16 v) {
    const U8 even = rounded_bf16_nan(v.a) >> 16, odd = rounded_bf16_nan(v.b);
#if defined(__AVX2__)
    const U8 u = (U8)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
    const U8 u = even | (odd & 0xffff0000u);
#endif
    std::memcpy(p, &u, sizeof u);
  }
};

template <>
struct Storage<DType::kFloat16> {
  static constexpr DType dtype = DType::kFloat16;
  using type = std::uint16_t;
  static float get(std::uint16_t x) { return float_of_half(x); }
  static std::uint16_t put(float x) { return half_of(x); }
  OPRD_INLINE F8 load(const std::uint16_t* p) {
#if defined(__AVX2__)
    return (F8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    F8 v;
    for (int k = 0; k < kLanes; ++k) v[k] = get(p[k]);
    return v;
#endif
  }
  OPRD_INLINE void store(std::uint16_t* p, F8 v) {
#if defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
    for (int k = 0; k < kLanes; ++k) p[k] = put(v[k]);
#endif
  }
  template <int Half>
  OPRD_INLINE F8 load_half(const std::uint16_t* p) { return load(p + Half * kLanes); }
  OPRD_INLINE F16 load16(const std::uint16_t* p) { return {load(p), load(p + kLanes)}; }
  OPRD_INLINE void store16(std::uint16_t* p, F16 v) {
    store(p, v.a);
    store(p + kLanes, v.b);
  }
};

// Whether load16 of this type returns the even elements, then the odd ones.
template <class S>
constexpr bool kEvenOdd = S::dtype == DType::kBFloat16;

// Replaces NaN by a NaN that no later rounding turns into a number. Other values are unchanged.
OPRD_INLINE float plain_nan(float x) { return x == x ? x : __builtin_nanf(""); }

// Copies floats into the element order of S::load16 and makes NaNs plain. The elements after the
// last sixteen keep their places.
template <class S>
OPRD_INLINE void arrange(const float* from, i64 count, float* to) {
  i64 k = 0;
  for (; k + kStep <= count; k += kStep) {
    for (int n = 0; n < kLanes; ++n) {
      to[k + n] = plain_nan(from[k + (kEvenOdd<S> ? 2 * n : n)]);
      to[k + kLanes + n] = plain_nan(from[k + (kEvenOdd<S> ? 2 * n + 1 : kLanes + n)]);
    }
  }
  for (; k < count; ++k) to[k] = plain_nan(from[k]);
}

using Float = Storage<DType::kFloat32>;

// Calls f with the Storage of a run-time dtype.
template <class F>
OPRD_INLINE void with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(Storage<DType::kFloat32>{});
    case DType::kBFloat16: return f(Storage<DType::kBFloat16>{});
    case DType::kFloat16: return f(Storage<DType::kFloat16>{});
  }
}

OPRD_INLINE i64 row_offset(const Rows& rows, i64 n) {
  return (n / rows.inner) * rows.stride_outer + (n % rows.inner) * rows.stride_inner;
}

// Row n as floats: in place if it is contiguous float32, else converted into scratch.
OPRD_INLINE const float* load_row(const Rows& rows, i64 n, i64 width, float* scratch) {
  const i64 offset = row_offset(rows, n);
  if (rows.dtype == DType::kFloat32 && rows.stride_last == 1) {
    return static_cast<const float*>(rows.data) + offset;
  }
  with_storage(rows.dtype, [&](auto storage) {
    using S = decltype(storage);
    const auto* row = static_cast<const typename S::type*>(rows.data) + offset;
    i64 k = 0;
    if (rows.stride_last == 1) {
      for (; k + kLanes <= width; k += kLanes) Float::store(scratch + k, S::load(row + k));
    }
    for (; k < width; ++k) scratch[k] = S::get(row[k * rows.stride_last]);
  });
  return scratch;
}

// Writes a row, or adds to it in float. value8(k) returns eight elements from k on, value1(k) one.
template <class Value8, class Value1>
OPRD_INLINE void store_row(const Rows& rows, i64 n, i64 width, bool accumulate, Value8 value8,
                           Value1 value1) {
  const i64 offset = row_offset(rows, n);
  with_storage(rows.dtype, [&](auto storage) {
    using S = decltype(storage);
    auto* row = static_cast<typename S::type*>(rows.data) + offset;
    i64 k = 0;
    if (rows.stride_last == 1) {
      if (accumulate) {
        for (; k + kLanes <= width; k += kLanes) S::store(row + k, S::load(row + k) + value8(k));
      } else {
        for (; k + kLanes <= width; k += kLanes) S::store(row + k, value8(k));
      }
    }
    for (; k < width; ++k) {
      auto& element = row[k * rows.stride_last];
      element = S::put(accumulate ? S::get(element) + value1(k) : value1(k));
    }
  });
}

OPRD_INLINE i64 element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The address of row n, for prefetching. A row is prefetched line by line during the work on the
// row before it, so that memory is never idle.
OPRD_INLINE const char* row_begin(const Rows& rows, i64 n) {
  return static_cast<const char*>(rows.data) + row_offset(rows, n) * element_size(rows.dtype);
}

OPRD_INLINE void prefetch(const char* at) { __builtin_prefetch(at); }

}  // namespace
}  // namespace oprd
