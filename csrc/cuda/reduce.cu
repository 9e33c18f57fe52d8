// The reduction of row losses to the loss and the batch statistics, in double and in a fixed order.
// Each block sums a fixed range of rows. If a layer has several blocks, each stores its sums and
// then draws a ticket. The block with the last ticket adds all sums in the order of the rows, so
// the result does not depend on which block is last. The previous launch of the same call has reset
// the tickets to 0.

#include "storage.cuh"

namespace oprd {
namespace cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWeightThreads = 1024;
constexpr i64 kRowsOfOneBlock = 1024;
constexpr i64 kRowsPerBlock = 512;
constexpr i64 kMaxParts = 256;

// The quantities that are summed over rows.
enum Sum { kLoss, kCos, kStudentNorm, kTeacherNorm, kRows, kWeights, kSums };

i64 parts(i64 rows) {
  if (rows <= kRowsOfOneBlock) return 1;
  const i64 wanted = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  return wanted > kMaxParts ? kMaxParts : wanted;
}

template <int Threads, int N>
constexpr int kSumBytes = Threads / kWarp * N * static_cast<int>(sizeof(double));

// The sums over a block of at most Threads threads. Only its first thread gets them.
template <int Threads, int Bytes, int N>
__device__ Doubles<N> block_sum(const Doubles<N>& x) {
  static_assert(kSumBytes<Threads, N> <= Bytes, "room for the warps' sums");
  const Shared<double> partials = BlockMemory<Bytes>::template at<double>(0);
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

__device__ void put_result(const Doubles<kSums>& sum, const Reduce& call,
                           const ReduceLayer& layer) {
  const double count = sum.v[kRows];
  const double per_row = count > 0 ? 1.0 / count : 0.0;
  float scale;
  if (call.scale_in_stats) {
    scale = load(layer.stats + kScale);
  } else if (call.scale_of_weights) {
    scale = sum.v[kWeights] == 0.0 ? 0.f : static_cast<float>(1.0 / sum.v[kWeights]);
  } else {
    scale = value_of(call.scale);
  }
  // A denominator of 0 means that there is nothing to learn from. The loss is then exactly 0,
  // whatever the rows hold.
  if (layer.loss) store(layer.loss, scale == 0.f ? 0.f : static_cast<float>(sum.v[kLoss] * scale));
  store(layer.stats + kMeanCos, static_cast<float>(sum.v[kCos] * per_row));
  store(layer.stats + kMeanStudentNorm, static_cast<float>(sum.v[kStudentNorm] * per_row));
  store(layer.stats + kMeanTeacherNorm, static_cast<float>(sum.v[kTeacherNorm] * per_row));
  store(layer.stats + oprd::kCount, static_cast<float>(count));
  store(layer.stats + kScale, scale);
}

__global__ void __launch_bounds__(kThreads) sum_rows(const __grid_constant__ Parameter<Reduce> call) {
  constexpr int kLast = kSumBytes<kThreads, kSums>;
  constexpr int kBytes = kLast + 16;
  const Shared<std::uint32_t> last = BlockMemory<kBytes>::template at<std::uint32_t>(kLast);
  const ReduceLayer& layer = call.layers[blockIdx.y];
  const i64 rows = call.batch.rows, begin = blockIdx.x * call.rows_per_block;
  const i64 end = begin + call.rows_per_block < rows ? begin + call.rows_per_block : rows;
  Doubles<kSums> sum{};
#pragma unroll 2
  for (i64 i = begin + threadIdx.x; i < end; i += kThreads) {
    const float w = weight(call.batch, i), row_loss = load(layer.row_loss + i);
    const float inv_s = load(layer.row_stats + kInvStudentNorm * rows + i);
    const float inv_t = load(layer.row_stats + kInvTeacherNorm * rows + i);
    const float one_minus_cos = load(layer.row_stats + kOneMinusCos * rows + i);
    if (!layer.loss) store(layer.row_loss + i, row_loss * w);
    if (w == 0.f) continue;
    sum.v[kLoss] += static_cast<double>(w) * row_loss;
    sum.v[kCos] += 1.0 - one_minus_cos;
    sum.v[kStudentNorm] += inv_s == 0.f ? 0.f : 1.f / inv_s;
    sum.v[kTeacherNorm] += 1.f / inv_t;
    sum.v[kRows] += 1.0;
    sum.v[kWeights] += w;
  }
  sum = block_sum<kThreads, kBytes>(sum);
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) put_result(sum, call, layer);
    return;
  }
  double* partials = call.partials + blockIdx.y * gridDim.x * kSums;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int n = 0; n < kSums; ++n) store(partials + blockIdx.x * kSums + n, sum.v[n]);
    last.store(0, count_ordered(reinterpret_cast<std::uint32_t*>(call.tickets + blockIdx.y)));
  }
  block_barrier();
  if (last.load(0) != gridDim.x - 1) return;
  sum = {};
  for (unsigned part = threadIdx.x; part < gridDim.x; part += kThreads) {
#pragma unroll
    for (int n = 0; n < kSums; ++n) sum.v[n] += load_published(partials + part * kSums + n);
  }
  sum = block_sum<kThreads, kBytes>(sum);
  if (threadIdx.x == 0) put_result(sum, call, layer);
}

// Stores 1 / the sum of the weights (0 if the sum is 0) in `layers` places.
__global__ void __launch_bounds__(kWeightThreads)
    sum_weights(const float* weights, i64 rows, float* scale, i64 stride, int layers) {
  Doubles<1> sum{};
#pragma unroll 8
  for (i64 i = threadIdx.x; i < rows; i += kWeightThreads) sum.v[0] += load(weights + i);
  sum = block_sum<kWeightThreads, kSumBytes<kWeightThreads, 1>>(sum);
  if (threadIdx.x != 0) return;
  const float value = sum.v[0] == 0.0 ? 0.f : static_cast<float>(1.0 / sum.v[0]);
  for (int layer = 0; layer < layers; ++layer) store(scale + layer * stride, value);
}

}  // namespace

// One ticket per layer, then the sums of the parts.
i64 partial_sums(i64 rows, i64 layers) {
  const i64 count = parts(rows);
  return count == 1 ? 0 : (layers * (1 + count * kSums) + 1) / 2 * 2;  // the terms need 16 bytes
}

std::int64_t scratch(std::int64_t rows, std::int64_t layers, std::int64_t rank,
                     std::int64_t student_width, std::int64_t teacher_width, DType dtype) {
  const bool terms = rank > 0 && dtype != DType::kFloat32;
  return partial_sums(rows, layers) +
         (terms ? layers * terms_size(rank, student_width, teacher_width) : 0);
}

double* tickets(const Reduction& reduction, i64 rows) {
  return parts(rows) == 1 ? nullptr : reduction.scratch;
}

void scale_by_weights(const Problem& problem, float* scale, i64 stride, int layers,
                      const Stream& stream) {
  launch({"sum_weights", problem, stream, 1, kWeightThreads}, sum_weights, problem.weights,
         problem.rows, scale, stride, layers);
}

void reduce(const Problem* problems, const ForwardOut* outs, int layers, const Scale& scale,
            bool scale_of_weights, bool scale_in_stats, const Reduction& reduction,
            const Stream& stream) {
  const i64 rows = problems->rows, blocks = parts(rows);
  for_runs(layers, [](int, int) { return true; }, [&](int first, int count) {
    Reduce call;
    call.batch = batch(problems[first]);
    call.scale = scale;
    call.scale_of_weights = scale_of_weights;
    call.scale_in_stats = scale_in_stats;
    call.rows_per_block = (rows + blocks - 1) / blocks;
    call.tickets = reduction.scratch + first;
    call.partials = reduction.scratch + layers + first * blocks * kSums;
    for (int n = 0; n < count; ++n) {
      const ForwardOut& out = outs[first + n];
      call.layers[n] = {out.row_loss, out.row_stats,
                        reduction.each ? nullptr : reduction.losses + first + n,
                        reduction.stats + (first + n) * reduction.stats_stride};
    }
    launch({"sum_rows", problems[first], stream, blocks, kThreads, count}, sum_rows, call);
  });
}

}  // namespace cuda
}  // namespace oprd
