// A machine that runs CUDA kernels on one host thread, to find what is wrong with them. The threads
// of a block are fibers, which run one at a time from one synchronisation to the next, in a random
// order; blocks run one after the other, in a random order. Memory is watched by memory.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

namespace oprd {
namespace emulation {

constexpr int kWarp = 32;

// Something a kernel may not do.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};

// The built-in variables of the thread that runs.
struct Current {
  Dim thread, block;
  Dim threads{1, 1, 1}, blocks{1, 1, 1};
};
Current& current();

// A place in the source.
struct Site {
  const char* file;
  int line;
};

// What kernels do; each throws Fault if that is wrong.
void global_access(const void* p, std::size_t bytes, bool write);
// limit: the bytes of shared memory that the kernel has.
// An atomic read and write, with acquire and release: what is ordered before it is ordered before
// what comes after a later one to the same address.
void ordered_access(const void* p, std::size_t bytes);
void* shared_access(std::int64_t offset, std::size_t bytes, int limit, bool write);
void copy_async(std::int64_t shared_offset, const void* value, std::size_t bytes, int limit);
void wait_for_copies();
void block_barrier(Site site);
void warp_barrier(Site site);
void shuffle_xor(Site site, int mask, const void* value, void* result, std::size_t bytes);

// What every lane of the warp gives, in their order.
void warp_gather(Site site, const void* value, void* all, std::size_t bytes);

// Runs a launch of blocks x layers blocks to its end, or to the first Fault of a thread.
void run(std::int64_t blocks, int layers, int threads, const std::function<void()>& thread);

// Of the random orders.
void seed(std::uint64_t value);

}  // namespace emulation
}  // namespace oprd
