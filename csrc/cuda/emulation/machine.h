// A machine that runs CUDA kernels on one host thread, to detect their errors. The threads of a
// block are fibers, which run one at a time from one synchronisation to the next, in a random
// order. Blocks run one after the other, in a random order. memory.h checks memory accesses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace oprd {
namespace emulation {

constexpr int kWarp = 32;

// An error of a kernel.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};

// The built-in variables of the running thread.
struct Current {
  Dim thread, block;
  Dim threads{1, 1, 1}, blocks{1, 1, 1};
};
Current& current();

// A location in the source.
struct Site {
  const char* file;
  int line;
};

// The operations of kernels. Each throws Fault if the operation is invalid. `limit` is the number
// of bytes of shared memory of the kernel.
void global_access(const void* p, std::size_t bytes, bool write);
// An atomic read and write with acquire and release: accesses ordered before it are also ordered
// before those that follow a later atomic access to the same address.
void ordered_access(const void* p, std::size_t bytes);
void* shared_access(std::int64_t offset, std::size_t bytes, int limit, bool write);
void copy_async(std::int64_t shared_offset, const void* value, std::size_t bytes, int limit);
void wait_for_copies();
void block_barrier(Site site);
void warp_barrier(Site site);
void shuffle_xor(Site site, int mask, const void* value, void* result, std::size_t bytes);

// Collects the values of all lanes of the warp, in order.
void warp_gather(Site site, const void* value, void* all, std::size_t bytes);

// Runs a launch of blocks x layers blocks until its end, or until the first Fault of a thread.
void run(std::int64_t blocks, int layers, int threads, const std::function<void()>& thread);

// Sets the seed of the random orders.
void seed(std::uint64_t value);

}  // namespace emulation
}  // namespace oprd
