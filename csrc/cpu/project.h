// z = P h for a few rows at a time, and its transpose dh = P^T dz, on register tiles.
#pragma once

#include "simd.h"

namespace oprd {
namespace {

constexpr int kTileRows = 4;  // rows of h that share every load of P
constexpr int kTileRanks = 3; // rows of P in registers at once: 4 x 3 accumulators
constexpr i64 kSlice = 512;   // elements of d at a time: tile and slice of P stay in L1

// acc[i][j] (8 lanes each) += h_i . P_j over d in [begin, end), a whole number of lanes.
// An element of z is the same sum in the same order whatever Rows and Ranks it is computed with.
template <int Rows_, int Ranks>
OPRD_INLINE void project_block(const float* const* h, const float* proj, i64 width, i64 begin,
                               i64 end, F8* acc, i64 acc_stride) {
  F8 sum[Rows_][Ranks];
  for (int i = 0; i < Rows_; ++i) {
    for (int j = 0; j < Ranks; ++j) sum[i][j] = acc[i * acc_stride + j];
  }
  for (i64 k = begin; k < end; k += kLanes) {
    F8 p[Ranks];
    for (int j = 0; j < Ranks; ++j) p[j] = Float::load(proj + j * width + k);
    for (int i = 0; i < Rows_; ++i) {
      const F8 x = Float::load(h[i] + k);
      for (int j = 0; j < Ranks; ++j) sum[i][j] = fma(x, p[j], sum[i][j]);
    }
  }
  for (int i = 0; i < Rows_; ++i) {
    for (int j = 0; j < Ranks; ++j) acc[i * acc_stride + j] = sum[i][j];
  }
}

// z (count, rank) = h (count, width) proj^T; acc: count * rank * kLanes floats of scratch.
template <int Count>
OPRD_INLINE void project_rows(const float* const* h, const float* proj, i64 width, i64 rank,
                              float* z, float* scratch) {
  F8* acc = reinterpret_cast<F8*>(scratch);
  for (i64 n = 0; n < Count * rank; ++n) acc[n] = F8{};
  const i64 lanes_end = width - width % kLanes;
  for (i64 begin = 0; begin < lanes_end; begin += kSlice) {
    const i64 end = lanes_end - begin < kSlice ? lanes_end : begin + kSlice;
    i64 j = 0;
    for (; j + kTileRanks <= rank; j += kTileRanks) {
      project_block<Count, kTileRanks>(h, proj + j * width, width, begin, end, acc + j, rank);
    }
    for (; j < rank; ++j) {
      project_block<Count, 1>(h, proj + j * width, width, begin, end, acc + j, rank);
    }
  }
  for (int i = 0; i < Count; ++i) {
    for (i64 j = 0; j < rank; ++j) {
      float tail = 0.f;
      for (i64 k = lanes_end; k < width; ++k) tail += h[i][k] * proj[j * width + k];
      z[i * rank + j] = sum_lanes(acc[i * rank + j]) + tail;
    }
  }
}

OPRD_INLINE void project(const float* const* h, int count, const float* proj, i64 width, i64 rank,
                         float* z, float* scratch) {
  switch (count) {
    case 1: return project_rows<1>(h, proj, width, rank, z, scratch);
    case 2: return project_rows<2>(h, proj, width, rank, z, scratch);
    case 3: return project_rows<3>(h, proj, width, rank, z, scratch);
    default: return project_rows<kTileRows>(h, proj, width, rank, z, scratch);
  }
}

// dh_i[k ..] = sum_j dz[i][j] P_j[k ..] for Rows_ rows and Vectors * kLanes columns from k on; dz is
// (Rows_, rank). An element is the same sum in the same order whatever Rows_ and Vectors.
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

// The same for one element: fma is a * b + c with one rounding where F8's has one.
OPRD_INLINE float unproject_element(const float* dz, const float* proj, i64 width, i64 rank,
                                    i64 k) {
  float sum = 0.f;
  for (i64 j = 0; j < rank; ++j) sum += dz[j] * proj[j * width + k];
  return sum;
}

}  // namespace
}  // namespace oprd
