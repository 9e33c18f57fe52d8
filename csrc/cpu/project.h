// z = P h for a few rows at a time, and its transpose dh = P^T dz, on tiles in registers.
#pragma once

#include "simd.h"

namespace oprd {
namespace {

constexpr int kTileRows = 4;   // rows of h that share every load of P
constexpr int kTileRanks = 3;  // rows of P in registers at once: 4 x 3 accumulators
constexpr i64 kSlice = 512;    // elements of d at a time: slices of the tile and of P stay in L1

// acc[i][j] (8 lanes each) += (h_i - mean) . P_j over elements [begin, end), a multiple of kStep.
// proj and mean are in the element order of S. An element of z is the same sum in the same order
// for all Rows_ and Ranks. The same elements of the rows that begin at fetch_a and fetch_b are
// prefetched.
template <class S, int Rows_, int Ranks, bool Mean>
OPRD_INLINE void project_block(const typename S::type* const* h, const float* proj,
                               const float* mean, i64 width, i64 begin, i64 end, F8* acc,
                               i64 acc_stride, const char* fetch_a, const char* fetch_b) {
  constexpr i64 kBytes = sizeof(typename S::type);
  F8 sum[Rows_][Ranks];
  for (int i = 0; i < Rows_; ++i) {
    for (int j = 0; j < Ranks; ++j) sum[i][j] = acc[i * acc_stride + j];
  }
  auto half = [&](i64 at, auto load) __attribute__((always_inline)) {
    F8 p[Ranks];
    for (int j = 0; j < Ranks; ++j) p[j] = Float::load(proj + j * width + at);
    for (int i = 0; i < Rows_; ++i) {
      F8 x = load(h[i]);
      if (Mean) x -= Float::load(mean + at);
      for (int j = 0; j < Ranks; ++j) sum[i][j] = fma(x, p[j], sum[i][j]);
    }
  };
  for (i64 k = begin; k < end; k += kStep) {
    prefetch(fetch_a + k * kBytes);
    prefetch(fetch_b + k * kBytes);
    half(k, [&](const typename S::type* row) __attribute__((always_inline)) {
      return S::template load_half<0>(row + k);
    });
    half(k + kLanes, [&](const typename S::type* row) __attribute__((always_inline)) {
      return S::template load_half<1>(row + k);
    });
  }
  for (int i = 0; i < Rows_; ++i) {
    for (int j = 0; j < Ranks; ++j) acc[i * acc_stride + j] = sum[i][j];
  }
}

// The inputs of a projection: rows of x, minus mean (unless null), times proj (rank, width). mean
// and proj are in the element order of x's storage type.
struct Projection {
  const Rows& x;
  const float* proj;
  const float* mean;
  i64 width, rank;
};

// Multiplies by rows of P from j on, Ranks at a time and then fewer. Each group prefetches two of
// the next rows, from `*next` on, so that prefetching is spread over the work. From `last` on no
// rows are left, and h[0], which is already in the cache, is used instead.
template <class S, int Count, int Ranks, bool Mean>
OPRD_INLINE void project_ranks(const typename S::type* const* h, const Projection& p, i64 begin,
                               i64 end, F8* acc, i64 j, const char* const* next,
                               const char* const* last) {
  if constexpr (Ranks > 0) {
    for (; j + Ranks <= p.rank; j += Ranks) {
      const char* here = reinterpret_cast<const char*>(h[0]);
      const char* fetch_a = next < last ? *next++ : here;
      const char* fetch_b = next < last ? *next++ : here;
      project_block<S, Count, Ranks, Mean>(h, p.proj + j * p.width, p.mean, p.width, begin, end,
                                           acc + j, p.rank, fetch_a, fetch_b);
    }
    project_ranks<S, Count, Ranks - 1, Mean>(h, p, begin, end, acc, j, next, last);
  }
}

template <class S, int Count, bool Mean>
OPRD_INLINE void project_slices(const Projection& p, const typename S::type* const* h,
                                const char* const* next, F8* acc) {
  const i64 whole = p.width - p.width % kStep;
  for (i64 begin = 0; begin < whole; begin += kSlice) {
    const i64 end = whole - begin < kSlice ? whole : begin + kSlice;
    project_ranks<S, Count, kTileRanks, Mean>(h, p, begin, end, acc, 0, next, next + kTileRows);
  }
}

// Computes z (Count, rank) of the rows h, and prefetches the kTileRows rows that begin at next[..].
// acc has space for Count * rank registers.
template <class S, int Count>
OPRD_INLINE void project_rows(const Projection& p, const typename S::type* const* h,
                              const char* const* next, float* z, F8* acc) {
  for (i64 n = 0; n < Count * p.rank; ++n) acc[n] = F8{};
  if (p.mean) {
    project_slices<S, Count, true>(p, h, next, acc);
  } else {
    project_slices<S, Count, false>(p, h, next, acc);
  }
  for (int i = 0; i < Count; ++i) {
    for (i64 j = 0; j < p.rank; ++j) {
      float tail = 0.f;
      for (i64 k = p.width - p.width % kStep; k < p.width; ++k) {
        const float x = S::get(h[i][k]) - (p.mean ? p.mean[k] : 0.f);
        tail += x * p.proj[j * p.width + k];
      }
      z[i * p.rank + j] = sum_lanes(acc[i * p.rank + j]) + tail;
    }
  }
}

template <class S, int Count = kTileRows>
OPRD_INLINE void project(const Projection& p, const typename S::type* const* h, int count,
                         const char* const* next, float* z, float* scratch) {
  if (count == Count) return project_rows<S, Count>(p, h, next, z, reinterpret_cast<F8*>(scratch));
  if constexpr (Count > 1) project<S, Count - 1>(p, h, count, next, z, scratch);
}

// dh_i[k ..] = sum_j dz[i][j] P_j[k ..] for Rows_ rows and Vectors * kLanes columns from k on. dz
// is (Rows_, rank). An element is the same sum in the same order for all Rows_ and Vectors.
template <int Rows_, int Vectors>
OPRD_INLINE void unproject_block(const float* dz, const float* proj, i64 width, i64 rank, i64 k,
                                 F8 (*sum)[Vectors]) {
  for (int i = 0; i < Rows_; ++i) {
    for (int v = 0; v < Vectors; ++v) sum[i][v] = F8{};
  }
  for (i64 j = 0; j < rank; ++j) {
    F8 p[Vectors];
    for (int v = 0; v < Vectors; ++v) p[v] = Float::load(proj + j * width + k + v * kLanes);
    for (int i = 0; i < Rows_; ++i) {
      const F8 x = broadcast(dz[i * rank + j]);
      for (int v = 0; v < Vectors; ++v) sum[i][v] = fma(x, p[v], sum[i][v]);
    }
  }
}

// The same for one element.
OPRD_INLINE float unproject_element(const float* dz, const float* proj, i64 width, i64 rank,
                                    i64 k) {
  float sum = 0.f;
  for (i64 j = 0; j < rank; ++j) sum += dz[j] * proj[j * width + k];
  return sum;
}

}  // namespace
}  // namespace oprd
