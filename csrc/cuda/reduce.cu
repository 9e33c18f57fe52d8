// From row losses to the loss and the batch statistics, in double and in one fixed order: each
// block sums a fixed range of rows; if there are several, one more block sums what they found.

#include "storage.cuh"

namespace oprd {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr i64 kRowsPerBlock = 4096;
constexpr i64 kMaxParts = 256;

// What is summed over rows.
enum Sum { kLoss = 0, kCos = 1, kStudentNorm = 2, kTeacherNorm = 3, kRows = 4, kSums = 5 };

i64 parts(i64 rows) {
  const i64 wanted = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  return wanted < 1 ? 1 : wanted > kMaxParts ? kMaxParts : wanted;
}

// The sums over a block, for its first thread.
template <int N>
__device__ Doubles<N> block_sum(const Doubles<N>& x) {
  using Memory = BlockMemory<kThreads / kWarp * N * static_cast<int>(sizeof(double))>;
  const Shared<double> partials = Memory::template at<double>(0);
  const Doubles<N> own = warp_sum(x);
  if (threadIdx.x % kWarp == 0) {
    for (int n = 0; n < N; ++n) partials.store(threadIdx.x / kWarp * N + n, own.v[n]);
  }
  block_barrier();
  Doubles<N> sum{};
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
      for (int n = 0; n < N; ++n) sum.v[n] += partials.load(warp * N + n);
    }
  }
  return sum;
}

__device__ void put_result(const Doubles<kSums>& sum, float scale, float* loss, float* stats) {
  const double count = sum.v[kRows];
  const double per_row = count > 0 ? 1.0 / count : 0.0;
  // A denominator of 0 stands for "nothing to learn from": exactly 0, whatever the rows hold.
  if (loss) store(loss, scale == 0.f ? 0.f : static_cast<float>(sum.v[kLoss] * scale));
  store(stats + kMeanCos, static_cast<float>(sum.v[kCos] * per_row));
  store(stats + kMeanStudentNorm, static_cast<float>(sum.v[kStudentNorm] * per_row));
  store(stats + kMeanTeacherNorm, static_cast<float>(sum.v[kTeacherNorm] * per_row));
  store(stats + oprd::kCount, static_cast<float>(count));
  store(stats + kScale, scale);
}

__global__ void __launch_bounds__(kThreads)
    sum_rows(Problem p, ForwardOut out, Scale scale, i64 rows_per_block, float* loss, float* stats,
             double* partials) {
  const i64 begin = blockIdx.x * rows_per_block;
  const i64 end = begin + rows_per_block < p.rows ? begin + rows_per_block : p.rows;
  Doubles<kSums> sum{};
  for (i64 i = begin + threadIdx.x; i < end; i += kThreads) {
    const float w = weight(p, i), row_loss = load(out.row_loss + i);
    if (!loss) store(out.row_loss + i, row_loss * w);
    if (w == 0.f) continue;
    auto stat = [&](i64 which) { return load(out.row_stats + which * p.rows + i); };
    const float inv_s = stat(kInvStudentNorm), inv_t = stat(kInvTeacherNorm);
    sum.v[kLoss] += static_cast<double>(w) * row_loss;
    sum.v[kCos] += 1.0 - stat(kOneMinusCos);
    sum.v[kStudentNorm] += inv_s == 0.f ? 0.f : 1.f / inv_s;
    sum.v[kTeacherNorm] += 1.f / inv_t;
    sum.v[kRows] += 1.0;
  }
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    put_result(sum, value_of(scale), loss, stats);
  } else {
    for (int n = 0; n < kSums; ++n) store(partials + blockIdx.x * kSums + n, sum.v[n]);
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_parts(const double* partials, int parts, Scale scale, float* loss, float* stats) {
  Doubles<kSums> sum{};
  for (int part = threadIdx.x; part < parts; part += kThreads) {
    for (int n = 0; n < kSums; ++n) sum.v[n] += load(partials + part * kSums + n);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) put_result(sum, value_of(scale), loss, stats);
}

// 1 / sum of the weights (0 if that is 0), into `layers` places.
__global__ void __launch_bounds__(kThreads)
    sum_weights(Problem p, float* scale, i64 stride, int layers) {
  Doubles<1> sum{};
  for (i64 i = threadIdx.x; i < p.rows; i += kThreads) sum.v[0] += weight(p, i);
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  const float value = sum.v[0] == 0.0 ? 0.f : static_cast<float>(1.0 / sum.v[0]);
  for (int layer = 0; layer < layers; ++layer) store(scale + layer * stride, value);
}

}  // namespace

std::int64_t partial_sums(std::int64_t rows) {
  const i64 count = parts(rows);
  return count == 1 ? 0 : count * kSums;
}

void scale_by_weights(const Problem& problem, float* scale, i64 stride, int layers,
                      const Stream& stream) {
  launch({"sum_weights", problem, stream, 1, kThreads}, sum_weights, problem,
         scale, stride, layers);
}

void reduce(const Problem& problem, const ForwardOut& out, const Scale& scale, float* loss,
            float* stats, double* partials, const Stream& stream) {
  const i64 blocks = parts(problem.rows);
  const i64 rows_per_block = (problem.rows + blocks - 1) / blocks;
  launch({"sum_rows", problem, stream, blocks, kThreads}, sum_rows,
         problem, out, scale, rows_per_block, loss, stats, partials);
  if (blocks == 1) return;
  launch({"sum_parts", problem, stream, 1, kThreads}, sum_parts,
         static_cast<const double*>(partials), static_cast<int>(blocks), scale, loss, stats);
}

}  // namespace cuda
}  // namespace oprd
