// Backward with a projection: dH = (coefficient dz) P. The output has the size of H, so the kernel
// keeps all other memory traffic small. A thread holds all ranks of its columns of P in registers
// and iterates over rows. The dz of a row is the same for all threads.
#pragma once

#include "storage.cuh"

namespace oprd {
namespace cuda {

constexpr i64 kEnoughBlocks = 2 * 148;  // two per SM of a B200
constexpr int kBackwardWarps = 8;
constexpr int kBackwardRows = 64;    // the most rows of a block
constexpr int kBackwardAtATime = 4;  // rows whose old gradient is loaded together

inline bool is_aligned(const float* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

// The columns of a lane. With Vector they are kColumns neighbours, otherwise every kWarp-th column
// of the warp's.
template <DType D, bool Vector, int Ranks>
struct BackwardColumns {
  using S = Storage<D>;
  using type = typename S::type;
  // 16 bytes, unless that takes too many registers.
  static constexpr int kColumns = Vector && Ranks <= 8 ? 4 * S::kPerWord : 4;
  static constexpr int kOfWarp = kColumns * kWarp;
  static constexpr int kWords = kColumns / S::kPerWord;

  int first, width;

  __device__ explicit BackwardColumns(int warp, int width)
      : first(warp * kOfWarp + static_cast<int>(threadIdx.x) % kWarp * (Vector ? kColumns : 1)),
        width(width) {}

  __device__ bool has(int c) const { return (Vector ? first : first + c * kWarp) < width; }

  __device__ Floats<kColumns> of_proj(const float* row) const {
    Floats<kColumns> x{};
    if constexpr (Vector) {
      if (!has(0)) return x;
#pragma unroll
      for (int n = 0; n < kColumns / 4; ++n) {
        const float4 four = load(reinterpret_cast<const float4*>(row + first) + n);
        x.v[4 * n] = four.x;
        x.v[4 * n + 1] = four.y;
        x.v[4 * n + 2] = four.z;
        x.v[4 * n + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (has(c)) x.v[c] = load(row + first + c * kWarp);
      }
    }
    return x;
  }

  // Columns past the end are 0.
  __device__ Words<kWords> read(const type* row) const {
    Words<kWords> raw{};
    if constexpr (Vector) {
      if (has(0)) raw = load_words<kWords>(row + first);
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (has(c)) put_element<D>(raw, c, load(row + first + c * kWarp));
      }
    }
    return raw;
  }

  __device__ void write(type* row, const Floats<kColumns>& x) const {
    if constexpr (Vector) {
      if (has(0)) store_words<kWords>(row + first, packed<D>(x));
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (has(c)) store(row + first + c * kWarp, S::put(x.v[c]));
      }
    }
  }
};

// Block `job` processes the rows of tile job / slabs and the columns of slab job % slabs.
template <DType D, bool Vector, int Ranks>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 2)
    projected_backward(const __grid_constant__ Parameter<ProjectedBackward> call, int slabs,
                       int block_rows) {
  using Columns = BackwardColumns<D, Vector, Ranks>;
  using type = typename Columns::type;
  enum Fate : i64 { kLeftAlone, kZero, kSum };
  constexpr int kPlaces = kBackwardRows * Ranks * static_cast<int>(sizeof(float));
  using Memory = BlockMemory<kPlaces + kBackwardRows * 2 * static_cast<int>(sizeof(i64))>;
  const Shared<float> scaled = Memory::template at<float>(0);
  const Shared<i64> rows = Memory::template at<i64>(kPlaces);  // per row: offset in elements, fate

  const auto& layer = call.layers[blockIdx.y];
  const Batch& batch = call.batch;
  const int slab = static_cast<int>(blockIdx.x) % slabs, rank = call.rank;
  const i64 first_row = i64{static_cast<int>(blockIdx.x) / slabs} * block_rows;
  const int threads = blockDim.x;
  const float scale = load(call.scale);
  for (int n = threadIdx.x; n < block_rows; n += threads) {
    const i64 i = first_row + n;
    Fate fate = kLeftAlone;
    i64 offset = 0;
    float coefficient = 0.f;
    if (i < batch.rows) {
      const float w = weight(batch, i);
      const bool zero = w == 0.f || scale == 0.f;  // gradient 0, whatever dz holds
      fate = !zero ? kSum : call.accumulate ? kLeftAlone : kZero;
      if (!zero) coefficient = load(layer.grad_loss + i * call.grad_loss_stride) * scale * w;
      offset = row_of<type>(layer.grad, student_row(batch, i)) - static_cast<type*>(layer.grad.data);
    }
    rows.store(2 * n, offset);
    rows.store(2 * n + 1, fate);
#pragma unroll
    for (int k = 0; k < Ranks; ++k) {
      const bool there = fate == kSum && k < rank;
      scaled.store(n * Ranks + k, there ? coefficient * load(layer.dz + i * rank + k) : 0.f);
    }
  }
  const Columns columns(slab * (threads / kWarp) + static_cast<int>(threadIdx.x) / kWarp,
                        layer.width);
  Floats<Columns::kColumns> proj[Ranks];
#pragma unroll
  for (int k = 0; k < Ranks; ++k) {
    proj[k] = k < rank ? columns.of_proj(layer.proj + i64{k} * layer.width)
                       : Floats<Columns::kColumns>{};
  }
  block_barrier();
  const Shared<float4> four_ranks = scaled.template as<float4>();
#pragma unroll 1
  for (int begin = 0; begin < block_rows; begin += kBackwardAtATime) {
    Words<Columns::kWords> old[kBackwardAtATime];
    if (call.accumulate) {
#pragma unroll
      for (int n = 0; n < kBackwardAtATime; ++n) {
        const bool adds = rows.load(2 * (begin + n) + 1) != kLeftAlone;
        const type* row = static_cast<type*>(layer.grad.data) + rows.load(2 * (begin + n));
        old[n] = adds ? columns.read(row) : Words<Columns::kWords>{};
      }
    }
#pragma unroll
    for (int n = 0; n < kBackwardAtATime; ++n) {
      const i64 fate = rows.load(2 * (begin + n) + 1);
      if (fate == kLeftAlone) continue;
      Floats<Columns::kColumns> sum{};
#pragma unroll
      for (int k = 0; k < Ranks; k += 4) {
        const float4 dz = four_ranks.load(((begin + n) * Ranks + k) / 4);
#pragma unroll
        for (int c = 0; c < Columns::kColumns; ++c) {
          sum.v[c] = fma(dz.x, proj[k].v[c], sum.v[c]);
          sum.v[c] = fma(dz.y, proj[k + 1].v[c], sum.v[c]);
          sum.v[c] = fma(dz.z, proj[k + 2].v[c], sum.v[c]);
          sum.v[c] = fma(dz.w, proj[k + 3].v[c], sum.v[c]);
        }
      }
      if (fate == kZero) sum = {};  // P may hold NaN or infinity, whose product with 0 is NaN
      if (call.accumulate) {
        const auto before = unpacked<D>(old[n]);
#pragma unroll
        for (int c = 0; c < Columns::kColumns; ++c) sum.v[c] = before.v[c] + sum.v[c];
      }
      columns.write(static_cast<type*>(layer.grad.data) + rows.load(2 * (begin + n)), sum);
    }
  }
}

template <DType D, bool Vector, int Ranks>
void launch_backward_tiles(const ProjectedBackward& call, int width, Launch as) {
  constexpr int kOfWarp = BackwardColumns<D, Vector, Ranks>::kOfWarp;
  const int warps = (width + kOfWarp - 1) / kOfWarp;
  const int slabs = (warps + kBackwardWarps - 1) / kBackwardWarps;
  int block_rows = kBackwardRows;
  auto blocks = [&] { return (call.batch.rows + block_rows - 1) / block_rows * slabs; };
  while (block_rows > kBackwardAtATime && blocks() * as.layers < kEnoughBlocks) block_rows /= 2;
  as.blocks = blocks();
  as.threads = (warps + slabs - 1) / slabs * kWarp;
  launch(as, projected_backward<D, Vector, Ranks>, call, slabs, block_rows);
}

template <DType D>
void launch_projected_backward(const Problem* problems, const BackwardIn* ins, int layers,
                               const Stream& stream) {
  auto vectors = [&](int layer) {
    const Problem& p = problems[layer];
    return takes_vectors(ins[layer].grad, p.student_width) && is_aligned(p.student_proj);
  };
  auto same = [&](int a, int b) {
    return problems[a].rank == problems[b].rank && vectors(a) == vectors(b) &&
           problems[a].student_width == problems[b].student_width;
  };
  for_runs(layers, same, [&](int first, int count) {
    ProjectedBackward call;
    call.batch = batch(problems[first]);
    call.scale = ins[first].scale;
    call.grad_loss_stride = ins[first].grad_loss_stride;
    call.accumulate = ins[first].accumulate;
    call.rank = static_cast<std::int32_t>(problems[first].rank);
    for (int n = 0; n < count; ++n) {
      const BackwardIn& in = ins[first + n];
      const Problem& p = problems[first + n];
      call.layers[n] = {strided(in.grad), p.student_proj, in.dz, in.grad_loss,
                        static_cast<std::int32_t>(p.student_width)};
    }
    const int width = static_cast<int>(problems[first].student_width);
    const Launch as{"projected_backward", problems[first], stream, 0, 0, count};
    if (!vectors(first)) {
      launch_backward_tiles<D, false, 16>(call, width, as);
    } else if (call.rank <= 8) {
      launch_backward_tiles<D, true, 8>(call, width, as);
    } else {
      launch_backward_tiles<D, true, 16>(call, width, as);
    }
  });
}

}  // namespace cuda
}  // namespace oprd
