#include "faulty.h"

#include "device.cuh"

namespace oprd {
namespace cuda {
namespace {

constexpr int kThreads = 64;
using Memory = BlockMemory<kThreads * sizeof(float)>;

// Each element becomes its neighbour's within the block: right, if `with_barrier`.
void rotate(float* data, int n, bool with_barrier) {
  const Shared<float> shared = Memory::at<float>(0);
  const int i = threadIdx.x, at = blockIdx.x * kThreads + i;
  if (at < n) shared.store(i, load(data + at));
  if (with_barrier) block_barrier();
  const float neighbour = shared.load((i + 1) % kThreads);
  if (at < n) store(data + at, neighbour);
}

void correct(float* data, int n) { rotate(data, n, true); }
void missing_barrier(float* data, int n) { rotate(data, n, false); }

void warp_barrier_across_warps(float* data, int) {
  const Shared<float> shared = Memory::at<float>(0);
  const int i = threadIdx.x;
  shared.store(i, load(data + i));
  warp_barrier();
  store(data + i, shared.load((i + kWarp) % kThreads));
}

void race_between_blocks(float* data, int) { store(data + threadIdx.x, 1.f); }

void past_the_end(float* data, int n) {
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at <= n) store(data + at, 1.f);  // <
}

void past_the_shared_end(float*, int) { Memory::at<float>(0).store(threadIdx.x + 1, 1.f); }

void unwritten_shared(float* data, int) {
  store(data + threadIdx.x, Memory::at<float>(0).load(threadIdx.x));
}

void misaligned_vector(float* data, int) {
  if (threadIdx.x == 0) load(reinterpret_cast<const float4*>(data + 1));
}

void divergent_barrier(float*, int) {
  if (threadIdx.x < kWarp) block_barrier();
}

void two_barriers_for_one(float*, int) {
  if (threadIdx.x < kWarp) {
    block_barrier();
  } else {
    block_barrier();
  }
}

void divergent_shuffle(float* data, int) {
  if (threadIdx.x % 2 == 0) store(data + threadIdx.x, shuffle_xor(1.f, 1));
}

// What each block wrote, in another's place: right, if the one that comes last reads it after the
// barrier, and if it was written before its block was counted.
enum class Mistake { kNone, kReadsBeforeBarrier, kWritesAfterCounting, kDoesNotCount };

void gather(float* data, int n, Mistake mistake) {
  std::uint32_t* counter = reinterpret_cast<std::uint32_t*>(data);
  const Shared<std::uint32_t> shared = Memory::at<std::uint32_t>(0);
  const int blocks = gridDim.x, own = n / 2 + blockIdx.x;
  if (threadIdx.x == 0) {
    if (mistake != Mistake::kWritesAfterCounting) store(data + own, 1.f);
    const bool counts = mistake != Mistake::kDoesNotCount;
    shared.store(0, counts ? count_ordered(counter) : static_cast<std::uint32_t>(blocks - 1));
    if (mistake == Mistake::kWritesAfterCounting) store(data + own, 1.f);
  }
  if (mistake == Mistake::kReadsBeforeBarrier && threadIdx.x == 1) {
    load_published(data + n / 2 + (blockIdx.x + 1) % blocks);
  }
  block_barrier();
  if (shared.load(0) % blocks + 1 != static_cast<std::uint32_t>(blocks)) return;  // run again, too
  if (static_cast<int>(threadIdx.x) < blocks) {
    store(data + 2 + threadIdx.x, load_published(data + n / 2 + threadIdx.x));
  }
}

void gathers(float* data, int n) { gather(data, n, Mistake::kNone); }
void reads_before_barrier(float* data, int n) { gather(data, n, Mistake::kReadsBeforeBarrier); }
void writes_after_counting(float* data, int n) { gather(data, n, Mistake::kWritesAfterCounting); }
void does_not_count(float* data, int n) { gather(data, n, Mistake::kDoesNotCount); }
void reads_the_counter(float* data, int n) {
  gather(data, n, Mistake::kNone);
  load(data);
}

void run_kernel(const std::string& name, float* data, int n) {
  void (*kernel)(float*, int) = nullptr;
#define OPRD_FAULTY(k) \
  if (name == #k) kernel = k
  OPRD_FAULTY(correct);
  OPRD_FAULTY(missing_barrier);
  OPRD_FAULTY(warp_barrier_across_warps);
  OPRD_FAULTY(race_between_blocks);
  OPRD_FAULTY(past_the_end);
  OPRD_FAULTY(past_the_shared_end);
  OPRD_FAULTY(unwritten_shared);
  OPRD_FAULTY(misaligned_vector);
  OPRD_FAULTY(divergent_barrier);
  OPRD_FAULTY(two_barriers_for_one);
  OPRD_FAULTY(divergent_shuffle);
  OPRD_FAULTY(gathers);
  OPRD_FAULTY(reads_before_barrier);
  OPRD_FAULTY(writes_after_counting);
  OPRD_FAULTY(does_not_count);
  OPRD_FAULTY(reads_the_counter);
#undef OPRD_FAULTY
  if (!kernel) throw std::invalid_argument("no faulty kernel " + name);
  Problem problem;
  problem.rows = n;
  const Stream stream;
  const i64 blocks = (n + kThreads - 1) / kThreads;
  launch({name.c_str(), problem, stream, blocks, kThreads}, kernel,
         data, n);
}

}  // namespace
}  // namespace cuda

void emulation::run_faulty(const std::string& name, float* data, int n) {
  cuda::run_kernel(name, data, n);
}

}  // namespace oprd
