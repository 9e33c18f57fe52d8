// Turns a call into launches on the caller's stream: checks it, determines the source of the
// reduction's factor, and launches the layers of one storage type together.

#include <algorithm>
#include <stdexcept>

#include "kernels.h"

namespace oprd {
namespace cuda {
namespace {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
  }
  return "unknown dtype";
}

constexpr i64 kMaxWidth = i64{1} << 30;  // columns are counted in int

void check(const Problem& p, const Rows& grad) {
  const bool reads_rows = p.rank == 0 || p.student_proj;
  if (p.rank > kMaxRank || !reads_rows) throw std::invalid_argument("cuda: rank out of range");
  if (p.student_width > kMaxWidth || p.teacher_width > kMaxWidth) {
    throw std::invalid_argument("cuda: rows wider than 2^30");
  }
  const bool alike = p.student.dtype == p.teacher.dtype &&
                     (!grad.data || grad.dtype == p.student.dtype);
  if (!alike) throw std::invalid_argument("cuda: student, teacher and gradient differ in dtype");
}

}  // namespace

void fail(const Launch& launch, const std::string& reason) {
  const Problem& p = launch.problem;
  throw std::runtime_error(
      std::string("oprd CUDA kernel ") + launch.kernel + " on " + std::to_string(p.rows) +
      " rows of " + name_of(p.student.dtype) + ", student " + std::to_string(p.student_width) +
      " wide, teacher " + std::to_string(p.teacher_width) + ", rank " + std::to_string(p.rank) +
      " (" + std::to_string(launch.blocks) + " blocks of " + std::to_string(launch.threads) +
      " threads, device " + std::to_string(launch.stream.device) + "): " + reason);
}

void forward(const Problem* problems, const ForwardOut* outs, int layers,
             const Reduction& reduction, const Stream& stream) {
  const DeviceGuard guard(stream.device);
  const i64 rows = problems->rows;
  const bool needs_scale = std::any_of(outs, outs + layers, [](const ForwardOut& out) {
    return out.grad.data != nullptr;
  });
  Scale scale{1.f, nullptr, false};
  bool of_weights = false, in_stats = false;
  if (reduction.mean && reduction.denominator) {
    scale = {1.f, reduction.denominator, true};
  } else if (reduction.mean && problems->weights) {
    of_weights = !needs_scale;  // a gradient in forward needs the factor before the reduction
    in_stats = needs_scale;
    if (needs_scale) {
      scale = {1.f, reduction.stats + kScale, false};
      scale_by_weights(*problems, reduction.stats + kScale, reduction.stats_stride, layers, stream);
    }
  } else if (reduction.mean) {
    scale.value = rows == 0 ? 0.f : static_cast<float>(1.0 / static_cast<double>(rows));
  }
  for (int layer = 0; layer < layers; ++layer) check(problems[layer], outs[layer].grad);
  double* const counters = tickets(reduction, rows);
  Room terms{reduction.scratch ? reduction.scratch + partial_sums(rows, layers) : nullptr, 0};
  i64 student_width = 0, teacher_width = 0;
  for (int layer = 0; layer < layers; ++layer) {
    const Problem& p = problems[layer];
    student_width = std::max(student_width, p.student_width);
    if (p.teacher_proj) teacher_width = std::max(teacher_width, p.teacher_width);
  }
  terms.size = terms_size(problems->rank, student_width, teacher_width);
  auto same = [&](int a, int b) { return problems[a].student.dtype == problems[b].student.dtype; };
  if (rows > 0) {
    for_runs(layers, same, [&](int first, int count) {
      const auto run = [&](auto forward_rows) {
        forward_rows(problems + first, outs + first, count, scale,
                     counters ? counters + first : nullptr,
                     {terms.at + first * terms.size, terms.size}, stream);
      };
      switch (problems[first].student.dtype) {
        case DType::kFloat32: return run(forward_rows<DType::kFloat32>);
        case DType::kBFloat16: return run(forward_rows<DType::kBFloat16>);
        case DType::kFloat16: return run(forward_rows<DType::kFloat16>);
      }
    });
  }
  reduce(problems, outs, layers, scale, of_weights, in_stats, reduction, stream);
}

void backward(const Problem* problems, const BackwardIn* ins, int layers, const Stream& stream) {
  if (problems->rows == 0) return;
  const DeviceGuard guard(stream.device);
  for (int layer = 0; layer < layers; ++layer) check(problems[layer], ins[layer].grad);
  auto same = [&](int a, int b) { return ins[a].grad.dtype == ins[b].grad.dtype; };
  for_runs(layers, same, [&](int first, int count) {
    const auto run = [&](auto backward_rows) {
      backward_rows(problems + first, ins + first, count, stream);
    };
    switch (ins[first].grad.dtype) {
      case DType::kFloat32: return run(backward_rows<DType::kFloat32>);
      case DType::kBFloat16: return run(backward_rows<DType::kBFloat16>);
      case DType::kFloat16: return run(backward_rows<DType::kFloat16>);
    }
  });
}

}  // namespace cuda
}  // namespace oprd
