// The memory of the emulated machine, which records accesses and checks them. Global memory
// consists of the elements of allowed tensors, without their padding. Two accesses to a byte by
// different threads, one of them a write, are a race unless a barrier of both threads is between
// them. Threads of different blocks have no barrier, but may be ordered by an atomic counter.
// Reading memory that was never written is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace oprd {
namespace emulation {

struct Traffic {
  std::int64_t loaded = 0, stored = 0;  // bytes
};

// A tensor that the kernels of a call may access.
struct Region {
  struct Dimension {
    std::int64_t size, stride;  // in elements
  };

  std::string kind;  // the category in which bytes are counted: "activations", ..
  std::string mode;  // "r": read only; "w": written before it is read; "rw": both
  std::uintptr_t address = 0;
  std::int64_t item_bytes = 1;
  std::vector<Dimension> dimensions;
  Traffic* traffic = nullptr;

  bool has(std::uintptr_t p, std::size_t bytes) const;
};

// The last accesses to one granule of memory.
struct Access {
  std::uint32_t launch = 0;  // 0: none
  std::uint32_t block_epoch = 0, warp_epoch = 0;
  std::uint32_t meetings = 0;  // number of meetings of its block so far
  std::int64_t block = 0;
  std::int32_t thread = 0;
  // Reads of one epoch by several threads are recorded as one access.
  enum Spread : std::int8_t { kThread, kWarp, kBlock, kGrid } spread = kThread;
};
// An atomic access of one thread, and the earlier ones to the same address.
struct Meeting {
  Access own;
  std::vector<Access> before;
};
struct Granule {
  Access written, read;
};

class Memory {
 public:
  // Allows access to these regions only, and forgets all earlier accesses.
  void allow(std::vector<Region> regions);

  void begin_launch() {
    ++now_.launch;
    counted_.clear();
  }
  void begin_block(std::int64_t block);
  void set_thread(int thread, unsigned block_epoch, unsigned warp_epoch) {
    now_.thread = thread;
    set_epochs(block_epoch, warp_epoch);
  }
  void set_epochs(unsigned block_epoch, unsigned warp_epoch) {
    now_.block_epoch = block_epoch;
    now_.warp_epoch = warp_epoch;
  }

  void global_access(std::uintptr_t p, std::size_t bytes, bool write);
  std::uint32_t launches() const { return now_.launch; }

  void ordered_access(std::uintptr_t p, std::size_t bytes);
  void* shared_access(std::int64_t offset, std::size_t bytes, int limit, bool write);

  std::map<std::string, Traffic>& traffic() { return traffic_; }

 private:
  const Region& region_of(std::uintptr_t p, std::size_t bytes) const;
  Granule& global_granule(std::uintptr_t index);
  void touch(Granule& granule, bool write, const Region* region);  // null region: shared memory
  std::string describe(const Access& access) const;
  // Whether one access of a block is ordered before another, by a barrier or in the same thread.
  static bool precedes(const Access& past, const Access& now);
  bool met(const Access& past) const;

  std::vector<Region> regions_;
  mutable std::size_t last_region_ = 0;
  std::map<std::string, Traffic> traffic_;
  Access now_;
  std::map<std::uintptr_t, std::vector<Access>> counted_;  // atomic accesses of this launch
  std::vector<Meeting> meetings_;                          // atomic accesses of this block
  static constexpr std::uintptr_t kGlobalGranule = 2, kPage = 512;
  std::unordered_map<std::uintptr_t, std::unique_ptr<Granule[]>> pages_;
  std::uintptr_t last_page_number_ = 0;
  Granule* last_page_ = nullptr;
  static constexpr std::int64_t kSharedGranule = 4;
  std::vector<Granule> shared_granules_;
  struct alignas(16) Line {
    char bytes[16];
  };
  std::vector<Line> shared_;
  int shared_bytes_ = 0;  // 0: the block has not used shared memory yet
};

Memory& memory();

}  // namespace emulation
}  // namespace oprd
