// Forward with a projection to r <= 16 dimensions, with FMA instructions: for float32 states, and
// for rows that can't be read in vectors. tensor_forward.cuh handles the others. H is read once,
// from global memory to registers. P is read once per block of rows, from L2 to shared memory, one
// slice of columns at a time.
//
// A warp has kRows rows. Each lane sums over its columns of all r products of these rows in
// registers. Then the warp adds the sums of its lanes.
#pragma once

#include "pair.cuh"
#include "projected_backward.cuh"
#include "tensor_forward.cuh"

namespace oprd {
namespace cuda {

// The columns of a slice. A lane has kUnits units, or kPerLane elements, of each row. In shared
// memory, a row of a slice of P is stored as kPerLane / 4 times 32 float4, one per lane.
template <DType D, bool Vector>
struct Slice {
  using U = Unit<D, Vector>;
  static constexpr int kUnits = Vector ? 1 : 4;
  static constexpr int kPerLane = kUnits * U::kElements;
  static constexpr int kColumns = kWarp * kPerLane;
  static constexpr int kVectors = kColumns / 4;  // float4 per row

  // Begins to copy vector n of a row of P, counted from column `begin` on, to row j of a slice.
  // Elements past the end are set to 0, so that they can't turn a product into NaN.
  __device__ static void bring(const Shared<float4>& slice, const float* row, int begin, int width,
                               int j, int n) {
    const int place = j * kVectors + n % (kPerLane / 4) * kWarp + n / (kPerLane / 4);
    if constexpr (Vector) {
      const int column = begin + 4 * n;
      if (column < width) {
        slice.copy_async(place, reinterpret_cast<const float4*>(row + column));
      } else {
        slice.store(place, float4{});
      }
    } else {
      const Shared<float> elements = slice.template as<float>();
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = begin + n + e * kWarp;
        if (column < width) {
          elements.copy_async(place * 4 + e, row + column);
        } else {
          elements.store(place * 4 + e, 0.f);
        }
      }
    }
  }
};

struct Four {
  float v[4];
};
__device__ __forceinline__ Four four(const float4& x) { return {{x.x, x.y, x.z, x.w}}; }

// One side (student or teacher) of the projection z = P (h - mean).
struct Side {
  Strided x;
  const i64* index;
  const float* proj;
  const float* mean;
  int width;
};

// At each step a lane gives its partner the half of its values that the partner keeps. After five
// steps, lane l has the warp's sums of values l * N / 32 and on. This takes 31 N / 32 shuffles per
// lane, where summing each value separately takes 5 N.
template <int Mask, int N, int All>
__device__ __forceinline__ void sum_and_deal(Floats<All>& x) {
  if constexpr (Mask > 0) {
    const bool upper = (threadIdx.x & Mask) != 0;
    Floats<N / 2> give;
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      give.v[n] = upper ? x.v[n] : x.v[n + N / 2];
      x.v[n] = upper ? x.v[n + N / 2] : x.v[n];
    }
    give = shuffle_xor(give, Mask);
#pragma unroll
    for (int n = 0; n < N / 2; ++n) x.v[n] += give.v[n];
    sum_and_deal<Mask / 2, N / 2>(x);
  }
}

// Ranks is r rounded up. A warp has kRows rows, and its lanes hold the sums of all products in
// registers. The launch chooses the number of warps of a block.
template <DType D, bool Vector, int Ranks>
struct ForwardTile {
  using S = Slice<D, Vector>;
  using U = Unit<D, Vector>;
  static constexpr int kRows = 4;
  static constexpr int kMaxWarps = Ranks == 16 ? 4 : 6;  // two blocks fill an SM's registers
  static constexpr int kMaxThreads = kMaxWarps * kWarp;
  static constexpr int kMaxBlockRows = kMaxWarps * kRows;
  static constexpr int kSums = kRows * Ranks;
  static constexpr int kAhead = 2;  // slices of H in registers

  // Shared memory holds, in order: two buffers for slices of P, with the mean as row Ranks; z of
  // both sides, with rows padded to avoid bank conflicts; the addresses of the rows of H.
  static constexpr int kBufferVectors = (Ranks + 1) * S::kVectors;
  static constexpr int kZStride = Ranks + 1;
  static constexpr int kZBegin = 2 * kBufferVectors * sizeof(float4);
  static constexpr int kRowsBegin = kZBegin + 2 * kMaxBlockRows * kZStride * sizeof(float);
  using Memory = BlockMemory<kRowsBegin + kMaxBlockRows * static_cast<int>(sizeof(void*))>;

  __device__ static int threads() { return blockDim.x; }
  __device__ static int block_rows() { return threads() / kWarp * kRows; }

  __device__ static Shared<float4> buffer(int n) {
    return Memory::template at<float4>(n * kBufferVectors * static_cast<int>(sizeof(float4)));
  }

  // Clears the rows of the buffers from `rank` on. Nothing reads the sums of these rows.
  __device__ static void clear_unused(int rank) {
    for (int n = rank * S::kVectors + threadIdx.x; n < Ranks * S::kVectors; n += threads()) {
      buffer(0).store(n, float4{});
      buffer(1).store(n, float4{});
    }
  }

  __device__ static void bring(const Side& side, int rank, int begin, int to) {
#pragma unroll 1  // unrolling would take registers for addresses from the sums
    for (int n = threadIdx.x; n < rank * S::kVectors; n += threads()) {
      const int j = n / S::kVectors;
      S::bring(buffer(to), side.proj + i64{j} * side.width, begin, side.width, j, n % S::kVectors);
    }
    if (!side.mean) return;
#pragma unroll 1
    for (int n = threadIdx.x; n < S::kVectors; n += threads()) {
      S::bring(buffer(to), side.mean, begin, side.width, Ranks, n);
    }
  }

  // sums[i][j] += (h_i - mean) . P_j over this lane's columns of a slice.
  __device__ static void multiply(const typename U::Raw (&raw)[kRows][S::kUnits], bool mean,
                                  const Shared<float4>& slice, Floats<kSums>& sums) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int quarter = 0; quarter < S::kPerLane / 4; ++quarter) {
      Four h[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = quarter * 4 + e;
          h[i].v[e] = U::floats(raw[i][n / U::kElements]).v[n % U::kElements];
        }
      }
      if (mean) {
        const Four m = four(slice.load(Ranks * S::kVectors + quarter * kWarp + lane));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) h[i].v[e] -= m.v[e];
        }
      }
#pragma unroll
      for (int j = 0; j < Ranks; ++j) {
        const Four proj = four(slice.load(j * S::kVectors + quarter * kWarp + lane));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sums.v[i * Ranks + j] = fma(h[i].v[e], proj.v[e], sums.v[i * Ranks + j]);
          }
        }
      }
    }
  }

  // Stores z of the block's rows in shared memory. z is 0 for rows that are masked or do not exist.
  __device__ static void project(const Batch& batch, const Side& side, int rank, i64 first_row,
                                 int z_begin) {
    using type = typename U::type;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    // The addresses are in shared memory because registers are scarce here.
    const Shared<const type*> rows = Memory::template at<const type*>(kRowsBegin);
    block_barrier();  // rows and buffers may still be read for the other side
    const int thread = threadIdx.x;
    if (thread < block_rows()) {
      const i64 n = first_row + thread;
      const bool wanted = n < batch.rows && weight(batch, n) != 0.f;
      rows.store(thread, wanted ? row_of<const type>(side.x, side.index ? load(side.index + n) : n)
                                : nullptr);
    }
    Floats<kSums> sums{};
    block_barrier();
    bring(side, rank, 0, 0);
    const int units = side.width / U::kElements;
    const type* row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = rows.load(warp * kRows + i);
    const auto ask = [&](int begin, typename U::Raw(&raw)[kRows][S::kUnits]) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int n = 0; n < S::kUnits; ++n) {
          const int u = begin / U::kElements + n * kWarp + lane;
          raw[i][n] = row[i] && u < units ? U::load(row[i], u) : typename U::Raw{};
        }
      }
    };
    // While one slice is multiplied, the next kAhead slices are being loaded.
    typename U::Raw raw[kAhead][kRows][S::kUnits];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) ask(n * S::kColumns, raw[n]);
    int now = 0;
    for (int first = 0; first < side.width; first += kAhead * S::kColumns) {
#pragma unroll
      for (int n = 0; n < kAhead; ++n, now = 1 - now) {
        const int begin = first + n * S::kColumns;
        if (begin >= side.width) break;
        wait_for_copies();
        block_barrier();  // this slice is complete, and the previous one has been used
        if (begin + S::kColumns < side.width) bring(side, rank, begin + S::kColumns, 1 - now);
        multiply(raw[n], side.mean != nullptr, buffer(now), sums);
        ask(begin + kAhead * S::kColumns, raw[n]);
      }
    }
    sum_and_deal<kWarp / 2, kSums>(sums);
    const Shared<float> z = Memory::template at<float>(z_begin);
#pragma unroll
    for (int n = 0; n < kSums / kWarp; ++n) {
      const int at = lane * (kSums / kWarp) + n;
      z.store((warp * kRows + at / Ranks) * kZStride + at % Ranks, sums.v[n]);
    }
  }

  // Stores the block's rows of a teacher that is already r wide.
  __device__ static void copy(const Batch& batch, const Strided& teacher, int rank, i64 first_row,
                              int z_begin) {
    using type = typename U::type;
    const Shared<float> z = Memory::template at<float>(z_begin);
    for (int at = threadIdx.x; at < block_rows() * rank; at += threads()) {
      const i64 n = first_row + at / rank;
      float value = 0.f;
      if (n < batch.rows && weight(batch, n) != 0.f) {
        value = Storage<D>::get(
            load(row_of<const type>(teacher, teacher_row(batch, n)) + at % rank));
      }
      z.store(at / rank * kZStride + at % rank, value);
    }
  }
};

template <DType D, bool Vector, int Ranks>
__global__ void __launch_bounds__(ForwardTile<D, Vector, Ranks>::kMaxThreads, 2)
    projected_forward(const __grid_constant__ Parameter<ProjectedForward> call) {
  using Tile = ForwardTile<D, Vector, Ranks>;
  constexpr int kTeacherZ =
      Tile::kZBegin + Tile::kMaxBlockRows * Tile::kZStride * static_cast<int>(sizeof(float));
  const i64 first_row = static_cast<i64>(blockIdx.x) * Tile::block_rows();
  const auto& layer = call.layers[blockIdx.y];
  const Batch& batch = call.batch;
  const int rank = call.rank;
  reset_ticket(call.tickets);
  Tile::clear_unused(rank);
  Tile::project(batch, {layer.student, batch.student_rows, layer.student_proj, nullptr,
                        layer.student_width},
                rank, first_row, Tile::kZBegin);
  if (layer.teacher_proj) {
    // Subtracted after the product instead of before, the mean would make z_T a difference of large
    // sums.
    Tile::project(batch, {layer.teacher, batch.teacher_rows, layer.teacher_proj,
                          layer.teacher_mean, layer.teacher_width},
                  rank, first_row, kTeacherZ);
  } else {
    Tile::copy(batch, layer.teacher, rank, first_row, kTeacherZ);
  }
  block_barrier();
  const int thread = threadIdx.x;
  const i64 i = first_row + thread;
  if (thread >= Tile::block_rows() || i >= batch.rows) return;
  float* dz = layer.dz + i * rank;
  if (weight(batch, i) == 0.f) {
    put_stats(layer.row_loss, layer.row_stats, batch.rows, i, PairStats{0.f, 0.f, 0.f, 0.f});
    for (int k = 0; k < rank; ++k) store(dz + k, 0.f);
    return;
  }
  const int begin = thread * Tile::kZStride;
  SharedPair pair{Tile::Memory::template at<float>(Tile::kZBegin),
                           Tile::Memory::template at<float>(kTeacherZ), begin, rank};
  const float inv_rank = 1.f / static_cast<float>(rank);
  const PairStats stats = pair_stats(pair, ThreadGroup{}, batch.kind, inv_rank);
  put_stats(layer.row_loss, layer.row_stats, batch.rows, i, stats);
  const PairGradient gradient(stats, batch.kind, inv_rank, 1.f);
  for (int k = 0; k < rank; ++k) {
    store(dz + k, gradient.of(pair.s.load(begin + k), pair.t.load(begin + k)));
  }
}

template <DType D, bool Vector, int Ranks>
void launch_projected_tiles(const ProjectedForward& call, Launch as) {
  using Tile = ForwardTile<D, Vector, Ranks>;
  const i64 rows = call.batch.rows;
  int warps = Tile::kMaxWarps;
  auto blocks = [&] { return (rows + warps * Tile::kRows - 1) / (warps * Tile::kRows); };
  // With few rows, loading P more often is better than idle SMs. No result depends on the choice.
  while (warps > 2 && blocks() * as.layers < kEnoughBlocks) warps = (warps + 1) / 2;
  as.blocks = blocks();
  as.threads = warps * kWarp;
  launch(as, projected_forward<D, Vector, Ranks>, call);
}

// Without vectors (odd widths), all ranks use one variant.
template <DType D>
void launch_projected_forward(const Problem* problems, const ForwardOut* outs, int layers,
                              double* tickets, const Room& terms, const Stream& stream) {
  auto vectors = [&](int layer) {
    const Problem& p = problems[layer];
    return takes_vectors(p.student, p.student_width) && is_aligned(p.student_proj) &&
           (!p.teacher_proj || (takes_vectors(p.teacher, p.teacher_width) &&
                                is_aligned(p.teacher_proj) && is_aligned(p.teacher_mean)));
  };
  auto same = [&](int a, int b) {
    return problems[a].rank == problems[b].rank && vectors(a) == vectors(b);
  };
  for_runs(layers, same, [&](int first, int count) {
    ProjectedForward call;
    call.batch = batch(problems[first]);
    call.tickets = tickets ? tickets + first : nullptr;
    call.rank = static_cast<std::int32_t>(problems[first].rank);
    for (int n = 0; n < count; ++n) {
      const Problem& p = problems[first + n];
      const ForwardOut& out = outs[first + n];
      call.layers[n] = {strided(p.student), strided(p.teacher), p.student_proj, p.teacher_proj,
                        p.teacher_mean, out.row_loss, out.row_stats, out.dz,
                        terms.at + (first + n) * terms.size,
                        static_cast<std::int32_t>(p.student_width),
                        static_cast<std::int32_t>(p.teacher_width)};
    }
    const Launch as{"projected_forward", problems[first], stream, 0, 0, count};
    if (!vectors(first)) {
      launch_projected_tiles<D, false, 16>(call, as);
    } else if constexpr (D == DType::kFloat32) {
      if (call.rank <= 8) {
        launch_projected_tiles<D, true, 8>(call, as);
      } else {
        launch_projected_tiles<D, true, 16>(call, as);
      }
    } else if (call.rank <= 8) {
      launch_tensor_forward<D, 8>(call, as);
    } else {
      launch_tensor_forward<D, 16>(call, as);
    }
  });
}

}  // namespace cuda
}  // namespace oprd
