#include "memory.h"

#include <algorithm>

#include "machine.h"

namespace oprd {
namespace emulation {

Memory& memory() {
  static Memory memory;
  return memory;
}

// Splits an address into one index per dimension, the largest stride first.
bool Region::has(std::uintptr_t p, std::size_t bytes) const {
  if (p < address) return false;
  const std::int64_t offset = static_cast<std::int64_t>(p - address);
  if (offset % item_bytes != 0) return false;
  std::int64_t left = offset / item_bytes;
  std::int64_t room = 1;  // elements from here on that are contiguous
  for (const Dimension& d : dimensions) {
    if (d.size == 0) return false;
    if (d.stride == 0) continue;
    const std::int64_t index = std::min(left / d.stride, d.size - 1);
    left -= index * d.stride;
    if (d.stride == 1) room = d.size - index;
  }
  return left == 0 && static_cast<std::int64_t>(bytes) <= room * item_bytes;
}

void Memory::allow(std::vector<Region> regions) {
  regions_ = std::move(regions);
  for (Region& region : regions_) {
    std::stable_sort(
        region.dimensions.begin(), region.dimensions.end(),
        [](const auto& a, const auto& b) { return a.stride > b.stride; });
    region.traffic = &traffic_[region.kind];
  }
  last_region_ = 0;
  pages_.clear();
  last_page_ = nullptr;
}

const Region& Memory::region_of(std::uintptr_t p, std::size_t bytes) const {
  if (last_region_ < regions_.size() && regions_[last_region_].has(p, bytes)) {
    return regions_[last_region_];
  }
  for (std::size_t i = 0; i < regions_.size(); ++i) {
    if (regions_[i].has(p, bytes)) {
      last_region_ = i;
      return regions_[i];
    }
  }
  std::string text = "out of bounds: " + describe(now_) + " accesses " + std::to_string(bytes) +
                     " bytes of global memory that no tensor has";
  for (const Region& region : regions_) {
    const std::int64_t offset = static_cast<std::int64_t>(p) -
                                static_cast<std::int64_t>(region.address);
    text += "; " + std::to_string(offset) + " bytes from the start of " + region.kind + " (";
    for (const auto& d : region.dimensions) text += std::to_string(d.size) + ",";
    text += ")";
  }
  throw Fault(text);
}

void Memory::begin_block(std::int64_t block) {
  now_.block = block;
  shared_bytes_ = 0;
  meetings_.clear();
  now_.meetings = 0;
}

Granule& Memory::global_granule(std::uintptr_t index) {
  const std::uintptr_t number = index / kPage;
  if (!last_page_ || last_page_number_ != number) {
    std::unique_ptr<Granule[]>& page = pages_[number];
    if (!page) page.reset(new Granule[kPage]);
    last_page_ = page.get();
    last_page_number_ = number;
  }
  return last_page_[index % kPage];
}

std::string Memory::describe(const Access& access) const {
  return "thread " + std::to_string(access.thread) + " of block " + std::to_string(access.block);
}

bool Memory::precedes(const Access& past, const Access& now) {
  if (past.block_epoch != now.block_epoch) return past.block_epoch < now.block_epoch;
  if (past.spread >= Access::kBlock || past.thread / kWarp != now.thread / kWarp) return false;
  if (past.warp_epoch != now.warp_epoch) return past.warp_epoch < now.warp_epoch;
  return past.spread == Access::kThread && past.thread == now.thread &&
         past.meetings <= now.meetings;
}

// Whether an atomic counter orders an access of another block before the current access: the other
// block made an atomic access after it, and this block a later one to the same address.
bool Memory::met(const Access& past) const {
  if (past.spread == Access::kGrid) return false;
  for (const Meeting& meeting : meetings_) {
    if (!precedes(meeting.own, now_)) continue;
    for (const Access& release : meeting.before) {
      if (release.block == past.block && precedes(past, release)) return true;
    }
  }
  return false;
}

void Memory::touch(Granule& granule, bool write, const Region* region) {
  // Whether `past` is ordered before the current access.
  auto ordered = [&](const Access& past) {
    if (past.launch != now_.launch) return true;  // no access, or one of an earlier launch
    if (past.block != now_.block) return met(past);
    return past.spread != Access::kGrid && precedes(past, now_);
  };
  auto race = [&](const char* before, const Access& past) {
    const std::string where = region ? "global memory (" + region->kind + ")" : "shared memory";
    throw Fault("data race on " + where + ": " + describe(past) + " " + before + " what " +
                describe(now_) + (write ? " writes" : " reads") + ", with no barrier between");
  };
  if (!ordered(granule.written)) race("wrote", granule.written);
  if (write) {
    if (!ordered(granule.read)) race("read", granule.read);
    granule.written = now_;
    return;
  }
  const Access past = granule.read;
  granule.read = now_;
  if (past.launch != now_.launch) return;
  // Keep the access that any later write must be compared with.
  if (past.spread == Access::kGrid || past.block != now_.block) {
    granule.read.spread = Access::kGrid;
  } else if (past.block_epoch == now_.block_epoch) {
    if (past.spread == Access::kBlock || past.thread / kWarp != now_.thread / kWarp) {
      granule.read.spread = Access::kBlock;
    } else if (past.warp_epoch == now_.warp_epoch &&
               (past.spread == Access::kWarp || past.thread != now_.thread)) {
      granule.read.spread = Access::kWarp;
    }
  }
}

void Memory::ordered_access(std::uintptr_t p, std::size_t bytes) {
  const Region& region = region_of(p, bytes);
  if (region.mode == "r") throw Fault("write to read-only memory: " + describe(now_) + ", " + region.kind);
  std::vector<Access>& before = counted_[p];
  if (before.empty()) {  // global_access detects other accesses after the first atomic one
    for (std::uintptr_t at = p; at < p + bytes; at += kGlobalGranule) {
      const Granule& granule = global_granule(at / kGlobalGranule);
      if (region.mode == "w" && granule.written.launch == 0) {
        throw Fault("read of memory nobody wrote: " + describe(now_) + ", " + region.kind);
      }
      if (granule.written.launch == now_.launch || granule.read.launch == now_.launch) {
        throw Fault("data race on global memory (" + region.kind + "): " + describe(now_) +
                    " counts there, others access it in the same launch");
      }
    }
  }
  meetings_.push_back({now_, before});
  before.push_back(now_);
  ++now_.meetings;
}

void Memory::global_access(std::uintptr_t p, std::size_t bytes, bool write) {
  if (p % bytes != 0) {
    throw Fault("misaligned: " + describe(now_) + " accesses " + std::to_string(bytes) +
                " bytes of global memory at an address that is " + std::to_string(p % bytes) +
                " past a multiple of that");
  }
  const Region& region = region_of(p, bytes);
  if (write && region.mode == "r") {
    throw Fault("write to read-only memory: " + describe(now_) + ", " + region.kind);
  }
  const auto counted = counted_.lower_bound(p);
  if (counted != counted_.end() && counted->first < p + bytes) {
    throw Fault("data race on global memory (" + region.kind + "): " + describe(now_) +
                " accesses a counter of this launch, with no barrier between");
  }
  (write ? region.traffic->stored : region.traffic->loaded) += static_cast<std::int64_t>(bytes);
  for (std::uintptr_t at = p; at < p + bytes; at += kGlobalGranule) {
    Granule& granule = global_granule(at / kGlobalGranule);
    if (!write && region.mode == "w" && granule.written.launch == 0) {
      throw Fault("read of memory nobody wrote: " + describe(now_) + ", " +
                  region.kind);
    }
    touch(granule, write, &region);
  }
}

void* Memory::shared_access(std::int64_t offset, std::size_t bytes, int limit, bool write) {
  if (shared_bytes_ == 0) {
    shared_bytes_ = limit;
    shared_granules_.assign(limit / kSharedGranule + 1, Granule{});
    shared_.assign(limit / 16 + 1, Line{});
  }
  if (limit != shared_bytes_) throw Fault("one kernel has two different shared memories");
  if (offset % static_cast<std::int64_t>(bytes) != 0) {
    throw Fault("misaligned: " + describe(now_) + " accesses " + std::to_string(bytes) +
                " bytes of shared memory at offset " + std::to_string(offset));
  }
  if (offset < 0 || offset + static_cast<std::int64_t>(bytes) > shared_bytes_) {
    throw Fault("out of bounds: " + describe(now_) + " accesses " + std::to_string(bytes) +
                " bytes of shared memory at offset " + std::to_string(offset) + " of " +
                std::to_string(shared_bytes_));
  }
  const std::int64_t end = offset + static_cast<std::int64_t>(bytes);
  for (std::int64_t at = offset; at < end; at += kSharedGranule) {
    Granule& granule = shared_granules_[at / kSharedGranule];
    if (!write && granule.written.launch == 0) {
      throw Fault("read of memory nobody wrote: " + describe(now_) + ", shared memory at offset " +
                  std::to_string(at));
    }
    touch(granule, write, nullptr);
  }
  return reinterpret_cast<char*>(shared_.data()) + offset;
}

}  // namespace emulation
}  // namespace oprd
