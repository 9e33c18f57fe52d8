// Selects the instruction set, splits the rows over threads, and reduces in row order.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "kernels.h"

namespace oprd {
namespace cpu {
namespace {

const Kernels& choose() {
#if defined(OPRD_HAVE_AVX2)
  const char* wanted = std::getenv("OPRD_CPU");
  const bool portable = wanted && std::strcmp(wanted, "portable") == 0;
  if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return kAvx2;
  }
#endif
  return kPortable;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

std::unique_ptr<float, Free> scratch_floats(std::int64_t floats) {
  const std::size_t bytes = (static_cast<std::size_t>(floats) * sizeof(float) / 64 + 1) * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<float, Free>(static_cast<float*>(p));
}

// Calls run(layer, begin, end, scratch) so that every row of every layer is in exactly one call.
// Each thread takes an equal contiguous share of all rows. A row's result does not depend on its
// neighbours, so the split does not change a bit.
template <class Run>
void split_rows(std::int64_t rows, int layers, std::int64_t elements_per_row, int max_threads,
                std::int64_t scratch_per_thread, Run run) {
  constexpr std::int64_t kMinElementsPerThread = 1 << 15;
  const std::int64_t total = rows * layers;
  if (total == 0) return;
  std::int64_t threads = total * elements_per_row / kMinElementsPerThread;
  threads = threads > max_threads ? max_threads : threads;
  threads = threads > total ? total : threads;
  threads = threads < 1 ? 1 : threads;
  const auto scratch = scratch_floats(scratch_per_thread * threads);
  const std::int64_t share = (total + threads - 1) / threads;
  auto part = [&](std::int64_t thread) {
    const std::int64_t end = (thread + 1) * share < total ? (thread + 1) * share : total;
    for (std::int64_t at = thread * share; at < end;) {
      const std::int64_t layer = at / rows, first = at % rows;
      const std::int64_t last = first + (end - at) < rows ? first + (end - at) : rows;
      run(static_cast<int>(layer), first, last, scratch.get() + thread * scratch_per_thread);
      at += last - first;
    }
  };
  if (threads == 1) return part(0);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(threads)) schedule(static, 1)
#endif
  for (std::int64_t thread = 0; thread < threads; ++thread) part(thread);
}

std::int64_t work_per_row(const Problem& problem) {
  return (problem.student_width + problem.teacher_width) * (1 + problem.rank / 2);
}

// Rounds up to whole cache lines, so that no two threads write to the same line.
std::int64_t line_padded(std::int64_t floats) { return (floats + 15) / 16 * 16; }

// Runs a kernel over the rows of all layers, with the scratch and the split of the most demanding
// layer.
template <class Run>
void split_layers(const Problem* problems, int layers, std::int64_t (*scratch_of)(const Problem&),
                  Run run) {
  std::int64_t scratch = 0, elements = 0;
  for (int layer = 0; layer < layers; ++layer) {
    scratch = std::max(scratch, line_padded(scratch_of(problems[layer])));
    elements = std::max(elements, work_per_row(problems[layer]));
  }
  split_rows(problems->rows, layers, elements, problems->threads, scratch, run);
}

}  // namespace

const char* simd_name() { return kernels().name; }

void forward(const Problem* problems, const ForwardOut* outs, int layers) {
  split_layers(problems, layers, kernels().forward_scratch,
               [&](int layer, std::int64_t begin, std::int64_t end, float* own) {
                 kernels().forward(problems[layer], outs[layer], begin, end, own);
               });
}

void backward(const Problem* problems, const BackwardIn* ins, int layers) {
  split_layers(problems, layers, kernels().backward_scratch,
               [&](int layer, std::int64_t begin, std::int64_t end, float* own) {
                 kernels().backward(problems[layer], ins[layer], begin, end, own);
               });
}

void gather(const Rows& x, const std::int64_t* index, std::int64_t first, std::int64_t count,
            std::int64_t width, const float* mean, float* out, int threads) {
  split_rows(count, 1, width, threads, 0,
             [&](int, std::int64_t begin, std::int64_t end, float*) {
               kernels().gather(x, index, first + begin, first + end, width, mean,
                                out + begin * width);
             });
}

void scatter(const Problem& problem, const float* values, std::int64_t first, std::int64_t count,
             const Rows& grad, bool accumulate) {
  const std::int64_t width = problem.student_width;
  split_rows(count, 1, width, problem.threads, 0,
             [&](int, std::int64_t begin, std::int64_t end, float*) {
               kernels().scatter(problem, values + begin * width, first + begin, first + end, grad,
                                 accumulate);
             });
}

float reduction_scale(const Problem& problem, const float* denominator, bool mean) {
  if (!mean) return 1.f;
  double divisor = static_cast<double>(problem.rows);
  if (denominator) {
    divisor = *denominator;
  } else if (problem.weights) {
    divisor = 0.0;
    for (std::int64_t i = 0; i < problem.rows; ++i) divisor += problem.weights[i];
  }
  return divisor == 0.0 ? 0.f : static_cast<float>(1.0 / divisor);
}

void reduce(const Problem& problem, const ForwardOut& out, float scale, float* loss,
            float* stats) {
  double sum = 0, cos = 0, student_norm = 0, teacher_norm = 0;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < problem.rows; ++i) {
    const float weight = problem.weights ? problem.weights[i] : 1.f;
    if (!loss) out.row_loss[i] *= weight;
    if (weight == 0.f) continue;
    auto stat = [&](std::int64_t which) { return out.row_stats[which * problem.rows + i]; };
    ++count;
    sum += static_cast<double>(weight) * out.row_loss[i];
    cos += 1.0 - stat(kOneMinusCos);
    student_norm += stat(kInvStudentNorm) == 0.f ? 0.0 : 1.0 / stat(kInvStudentNorm);
    teacher_norm += 1.0 / stat(kInvTeacherNorm);
  }
  const double per_row = count ? 1.0 / static_cast<double>(count) : 0.0;
  // A denominator of 0 means that there is nothing to learn from. The loss is then exactly 0,
  // whatever the rows hold.
  if (loss) *loss = scale == 0.f ? 0.f : static_cast<float>(sum * scale);
  stats[kMeanCos] = static_cast<float>(cos * per_row);
  stats[kMeanStudentNorm] = static_cast<float>(student_norm * per_row);
  stats[kMeanTeacherNorm] = static_cast<float>(teacher_norm * per_row);
  stats[kCount] = static_cast<float>(count);
  stats[kScale] = scale;
}

}  // namespace cpu
}  // namespace oprd
