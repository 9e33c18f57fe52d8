// Forward of 16-bit states with a projection to r <= 16 dimensions, on tensor cores. H is loaded
// from global memory directly into the fragments of warp-wide products. P consists of two terms of
// H's type.
//
// A product covers 16 rows of H, 16 columns and 8 ranks. Lane 4 g + t holds columns 2 t, 2 t + 1,
// 2 t + 8 and 2 t + 9 of rows g and g + 8, and the same columns of rank g of P. The order of
// columns in a sum does not matter. Of 32 columns, lane t therefore takes the eight from 8 t on (16
// bytes), for two products.
#pragma once

#include "pair.cuh"
#include "projected_backward.cuh"

namespace oprd {
namespace cuda {

constexpr int kPrepareThreads = 256;

// The scratch of a layer holds, in order: two floats per rank and side (the factor of z, and P mu);
// the terms of the student's projector; the terms of the teacher's projector. All terms and ranks
// of kTermColumns columns are stored together.

// The number of stored columns, with zeros past the width: whole pairs of kTermColumns.
__device__ __forceinline__ int term_columns(int width) {
  return (width + 2 * kTermColumns - 1) / (2 * kTermColumns) * (2 * kTermColumns);
}

template <int Ranks>
struct TermsOf {
  double* at;
  int student_width;

  __device__ float* finish(bool teacher) const {
    return reinterpret_cast<float*>(at) + (teacher ? 2 * Ranks : 0);
  }
  __device__ std::uint16_t* terms(bool teacher) const {
    auto* begin = reinterpret_cast<std::uint16_t*>(at + 2 * Ranks);
    const i64 columns = term_columns(student_width);
    return begin + (teacher ? columns * Ranks * kTerms : 0);
  }
};

template <int Threads, class T, class Add>
__device__ T block_all(T own, int begin, Add add) {
  using Memory = BlockMemory<2 * Threads * static_cast<int>(sizeof(double))>;
  const Shared<T> all = Memory::template at<T>(begin);
  all.store(threadIdx.x, own);
  block_barrier();
  for (int half = Threads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) {
      all.store(threadIdx.x, add(all.load(threadIdx.x), all.load(threadIdx.x + half)));
    }
    block_barrier();
  }
  return all.load(0);
}

// One block per rank and side computes its terms, the factor that undoes their scale, and P mu in
// double.
template <DType D, int Ranks>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_terms(const __grid_constant__ Parameter<PrepareTerms> call) {
  using S = Storage<D>;
  const auto& layer = call.layers[blockIdx.y];
  const int k = blockIdx.x % Ranks;
  const bool teacher = blockIdx.x >= Ranks;
  const float* proj = teacher ? layer.teacher_proj : layer.student_proj;
  const float* mean = teacher ? layer.teacher_mean : nullptr;
  const int width = proj ? teacher ? layer.teacher_width : layer.student_width : 0;
  const bool there = proj && k < call.rank;
  const float* row = there ? proj + i64{k} * width : nullptr;
  float largest = 0.f;
  double product = 0.;
  for (int c = threadIdx.x; there && c < width; c += kPrepareThreads) {
    const float p = load(row + c), size = p < 0.f ? -p : p;
    if (size > largest) largest = size;
    if (mean) product += static_cast<double>(p) * load(mean + c);
  }
  float scale = 1.f;
  if (D == DType::kFloat16) {
    // Scale the largest element to [2^13, 2^14), so that no term overflows and the second term does
    // not underflow.
    largest = block_all<kPrepareThreads>(largest, 0, [](float a, float b) { return a > b ? a : b; });
    const int exponent = static_cast<int>(bits_of(largest) >> 23);
    if (exponent > 13 && exponent < 254) {
      scale = float_of(static_cast<std::uint32_t>(127 + 127 + 13 - exponent) << 23);
    }
  }
  product = block_all<kPrepareThreads>(product, kPrepareThreads * static_cast<int>(sizeof(double)),
                                       [](double a, double b) { return a + b; });
  const TermsOf<Ranks> to{layer.terms, layer.student_width};
  if (threadIdx.x == 0) {
    store(to.finish(teacher) + 2 * k, 1.f / scale);
    store(to.finish(teacher) + 2 * k + 1, static_cast<float>(product));
  }
  if (!proj) return;
  std::uint16_t* terms = to.terms(teacher);
  const int columns = term_columns(width);
  for (int c = threadIdx.x; c < columns; c += kPrepareThreads) {
    float rest = there && c < width ? load(row + c) * scale : 0.f;
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      const std::uint16_t rounded = S::put(rest);
      const i64 at = i64{c / kTermColumns} * kTerms * Ranks + term * Ranks + k;
      store(terms + at * kTermColumns + c % kTermColumns, rounded);
      const float value = S::get(rounded);
      rest = rest - value;
      if (!(rest - rest == 0.f)) rest = 0.f;  // no rest for infinity or NaN
    }
  }
}

// A block has kRows rows. Its warps share the columns, 64 at a time, and add their sums.
template <DType D, int Ranks>
struct TensorTile {
  using type = typename Storage<D>::type;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = 32, kTiles = kRows / 16;
  static constexpr int kRankTiles = Ranks / 8;
  static constexpr int kHalves = 2;  // of kTermColumns each

  static constexpr int kZStride = Ranks + 1;
  static constexpr int kSums = 2 * kWarps * kRows * kZStride;  // [side][warp][row][rank]
  static constexpr int kRowsBegin = kSums * static_cast<int>(sizeof(float));
  using Memory =
      BlockMemory<kRowsBegin + 2 * kRows * static_cast<int>(sizeof(const type*))>;

  struct Fragments {
    Words<4> h[kHalves][kTiles][2];  // rows g and g + 8 of each tile
    Words<4> p[kHalves][kTerms][kRankTiles];
  };

  __device__ static Shared<float> sums(int side, int warp) {
    return Memory::template at<float>((side * kWarps + warp) * kRows * kZStride *
                                      static_cast<int>(sizeof(float)));
  }

  // Computes this warp's share of z of the block's rows on one side. A null row is masked or does
  // not exist; its z is 0.
  __device__ static void project(const Shared<const type*>& rows, const std::uint16_t* terms,
                                 int width, int side) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int g = lane / 4, t = lane % 4;
    const uint4* mine = reinterpret_cast<const uint4*>(terms) + lane;
    const type* row[kTiles][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      row[m][0] = rows.load(16 * m + g);
      row[m][1] = rows.load(16 * m + 8 + g);
    }
    const auto ask = [&](int pair, Fragments& f) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const int block = pair * kHalves + half, column = block * kTermColumns + 8 * t;
        const bool inside = column < width;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            f.h[half][m][i] =
                inside && row[m][i] ? load_words<4>(row[m][i] + column) : Words<4>{};
          }
        }
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n) {
            constexpr int kVectors = Ranks * kTermColumns / 8;  // per term
            const uint4 p = load(mine + i64{block} * (kTerms * kVectors) + (term * kVectors + 32 * n));
            f.p[half][term][n] = {{p.x, p.y, p.z, p.w}};
          }
        }
      }
    };
    Floats<4> z[kTiles][kRankTiles] = {};
    const auto multiply = [&](const Fragments& f) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int term = kTerms - 1; term >= 0; --term) {  // small terms first
#pragma unroll
          for (int n = 0; n < kRankTiles; ++n) {
            const Words<4>& p = f.p[half][term][n];
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
              const Words<4>&a = f.h[half][m][0], &b = f.h[half][m][1];
              tensor_product<D>(z[m][n].v, {a.v[0], b.v[0], a.v[1], b.v[1]}, {p.v[0], p.v[1]});
              tensor_product<D>(z[m][n].v, {a.v[2], b.v[2], a.v[3], b.v[3]}, {p.v[2], p.v[3]});
            }
          }
        }
      }
    };
    const int pairs = (width + kHalves * kTermColumns - 1) / (kHalves * kTermColumns);
    // While one pair of fragments is multiplied, the next is being loaded.
    Fragments now{}, next{};
    if (warp < pairs) ask(warp, now);
#pragma unroll 1
    for (int pair = warp; pair < pairs; pair += 2 * kWarps) {
      const bool more = pair + kWarps < pairs;
      if (more) ask(pair + kWarps, next);
      multiply(now);
      if (!more) break;
      if (pair + 2 * kWarps < pairs) ask(pair + 2 * kWarps, now);
      multiply(next);
    }
    const Shared<float> to = sums(side, warp);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to.store((16 * m + 8 * (i / 2) + g) * kZStride + 8 * n + 2 * t + i % 2, z[m][n].v[i]);
        }
      }
    }
  }
};

// z_S and z_T of a row in shared memory, read by one thread.
struct SharedPair {
  Shared<float> s, t;
  int begin, rank;

  template <class F>
  __device__ void each(F f) const {
    for (int k = 0; k < rank; ++k) f(0, s.load(begin + k), t.load(begin + k));
  }
};

template <DType D, int Ranks>
__global__ void __launch_bounds__(TensorTile<D, Ranks>::kThreads, Ranks == 8 ? 4 : 3)
    tensor_forward(const __grid_constant__ Parameter<ProjectedForward> call) {
  using Tile = TensorTile<D, Ranks>;
  using type = typename Tile::type;
  const auto& layer = call.layers[blockIdx.y];
  const Batch& batch = call.batch;
  const int rank = call.rank, thread = threadIdx.x;
  const i64 first_row = static_cast<i64>(blockIdx.x) * Tile::kRows;
  reset_ticket(call.tickets);
  const Shared<const type*> rows = Tile::Memory::template at<const type*>(Tile::kRowsBegin);
  const Shared<const type*> teacher_rows = Tile::Memory::template at<const type*>(
      Tile::kRowsBegin + Tile::kRows * static_cast<int>(sizeof(const type*)));
  if (thread < Tile::kRows) {
    const i64 i = first_row + thread;
    const bool wanted = i < batch.rows && weight(batch, i) != 0.f;
    rows.store(thread, wanted ? row_of<const type>(layer.student, student_row(batch, i)) : nullptr);
    teacher_rows.store(
        thread, wanted ? row_of<const type>(layer.teacher, teacher_row(batch, i)) : nullptr);
  }
  block_barrier();
  const TermsOf<Ranks> terms{layer.terms, layer.student_width};
  const bool projects = layer.teacher_proj != nullptr;
  Tile::project(rows, terms.terms(false), layer.student_width, 0);
  if (projects) Tile::project(teacher_rows, terms.terms(true), layer.teacher_width, 1);
  block_barrier();
  const Shared<float> z_s = Tile::sums(0, 0), z_t = Tile::sums(1, 0);
  for (int n = thread; n < Tile::kRows * Ranks; n += Tile::kThreads) {
    const int row = n / Ranks, k = n % Ranks, at = row * Tile::kZStride + k;
    float s = 0.f, t = 0.f;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; ++warp) {
      s += Tile::sums(0, warp).load(at);
      if (projects) t += Tile::sums(1, warp).load(at);
    }
    s *= load(terms.finish(false) + 2 * k);
    if (projects) {
      t = t * load(terms.finish(true) + 2 * k) - load(terms.finish(true) + 2 * k + 1);
    } else if (k < rank && teacher_rows.load(row)) {
      t = Storage<D>::get(load(teacher_rows.load(row) + k));
    }
    z_s.store(at, s);
    z_t.store(at, t);
  }
  block_barrier();
  const i64 i = first_row + thread;
  if (thread >= Tile::kRows || i >= batch.rows) return;
  float* dz = layer.dz + i * rank;
  if (weight(batch, i) == 0.f) {
    put_stats(layer.row_loss, layer.row_stats, batch.rows, i, PairStats{0.f, 0.f, 0.f, 0.f});
    for (int k = 0; k < rank; ++k) store(dz + k, 0.f);
    return;
  }
  const int begin = thread * Tile::kZStride;
  const SharedPair pair{z_s, z_t, begin, rank};
  const float inv_rank = 1.f / static_cast<float>(rank);
  const PairStats stats = pair_stats(pair, ThreadGroup{}, batch.kind, inv_rank);
  put_stats(layer.row_loss, layer.row_stats, batch.rows, i, stats);
  const PairGradient gradient(stats, batch.kind, inv_rank, 1.f);
  for (int k = 0; k < rank; ++k) {
    store(dz + k, gradient.of(z_s.load(begin + k), z_t.load(begin + k)));
  }
}

template <DType D, int Ranks>
void launch_tensor_forward(const ProjectedForward& call, Launch as) {
  PrepareTerms prepare;
  prepare.rank = call.rank;
  for (int n = 0; n < as.layers; ++n) {
    const auto& layer = call.layers[n];
    prepare.layers[n] = {layer.student_proj,  layer.teacher_proj,  layer.teacher_mean,
                         layer.terms,         layer.student_width, layer.teacher_width};
  }
  as.kernel = "prepare_terms";
  as.blocks = 2 * Ranks;
  as.threads = kPrepareThreads;
  launch(as, prepare_terms<D, Ranks>, prepare);
  using Tile = TensorTile<D, Ranks>;
  as.kernel = "tensor_forward";
  as.blocks = (call.batch.rows + Tile::kRows - 1) / Tile::kRows;
  as.threads = Tile::kThreads;
  launch(as, tensor_forward<D, Ranks>, call);
}

}  // namespace cuda
}  // namespace oprd
