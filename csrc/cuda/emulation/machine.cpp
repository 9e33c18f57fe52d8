#include "machine.h"

#include <algorithm>
#include <deque>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl oprd_switch_stack
.hidden oprd_switch_stack
.type oprd_switch_stack, @function
oprd_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size oprd_switch_stack, .-oprd_switch_stack
)");
#endif

namespace oprd {
namespace emulation {
namespace {

enum class Waits { kNo, kBlock, kWarp, kEnded };

struct Copy {
  std::int64_t to;
  std::size_t bytes;
  int limit;
  char value[16];
};

struct Thread {
  Fiber fiber;
  Waits waits = Waits::kNo;
  Site site{nullptr, 0};
  unsigned warp_epoch = 0;  // number of synchronisations of its warp so far
  // Its values in the last two shuffles. A lane may reach the next shuffle before another has read.
  std::vector<char> given[2];
  std::vector<Copy> copies;  // copies that were begun and not waited for
};

std::string describe(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

class Machine {
 public:
  void run(std::int64_t blocks, int layers, int threads, const std::function<void()>& body) {
    if (threads % kWarp != 0) throw Fault("blocks must be whole warps");
    body_ = &body;
    now_.blocks.x = static_cast<unsigned>(blocks);
    now_.blocks.y = static_cast<unsigned>(layers);
    now_.threads.x = static_cast<unsigned>(threads);
    count_ = threads;
    while (static_cast<int>(threads_.size()) < threads) threads_.emplace_back();
    memory().begin_launch();
    std::vector<std::int64_t> order(blocks * layers);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i);
    std::shuffle(order.begin(), order.end(), random_);
    for (const std::int64_t block : order) {
      now_.block.x = static_cast<unsigned>(block % blocks);
      now_.block.y = static_cast<unsigned>(block / blocks);
      memory().begin_block(block);
      run_block();
    }
  }

  void block_barrier(Site site) {
    wait(Waits::kBlock, site);
    memory().set_epochs(block_epoch_, threads_[running_].warp_epoch);
  }

  void warp_barrier(Site site) {
    wait(Waits::kWarp, site);
    // Only a barrier advances the epoch: a shuffle does not order accesses to memory.
    ++threads_[running_].warp_epoch;
    memory().set_epochs(block_epoch_, threads_[running_].warp_epoch);
  }

  void shuffle_xor(Site site, int mask, const void* value, void* result, std::size_t bytes) {
    give(site, value, bytes);
    take(running_ ^ mask, result, bytes);
  }

  void warp_gather(Site site, const void* value, void* all, std::size_t bytes) {
    give(site, value, bytes);
    const int first = running_ / kWarp * kWarp;
    for (int i = 0; i < kWarp; ++i) take(first + i, static_cast<char*>(all) + i * bytes, bytes);
  }

  void give(Site site, const void* value, std::size_t bytes) {
    Thread& own = threads_[running_];
    own.given[0].swap(own.given[1]);
    own.given[0].assign(static_cast<const char*>(value), static_cast<const char*>(value) + bytes);
    shuffles_[running_] += 1;
    wait(Waits::kWarp, site);
  }

  void take(int partner, void* result, std::size_t bytes) {
    // The partner may already be in the next shuffle.
    const int ahead = static_cast<int>(shuffles_[partner] - shuffles_[running_]);
    std::memcpy(result, threads_[partner].given[ahead].data(), bytes);
  }

  void copy_async(std::int64_t to, const void* value, std::size_t bytes, int limit) {
    Copy copy{to, bytes, limit, {}};
    std::memcpy(copy.value, value, bytes);
    threads_[running_].copies.push_back(copy);
  }

  void wait_for_copies() {
    for (const Copy& copy : threads_[running_].copies) {
      void* to = memory().shared_access(copy.to, copy.bytes, copy.limit, true);
      std::memcpy(to, copy.value, copy.bytes);
    }
    threads_[running_].copies.clear();
  }

  void seed(std::uint64_t value) { random_.seed(value); }
  Current& now() { return now_; }
  std::mutex& busy() { return busy_; }

 private:
  void run_block();
  void wait(Waits what, Site site);
  void arrive(int thread);
  void release(int first, int last);
  [[noreturn]] void report_divergence();
  static void entry();

  Current now_;
  const std::function<void()>* body_ = nullptr;
  int count_ = 0;
  int running_ = 0;
  unsigned block_epoch_ = 0;
  std::deque<Thread> threads_;  // a deque keeps their addresses stable
  std::vector<unsigned> shuffles_;
  std::vector<int> ready_;
  std::vector<int> waiting_in_warp_;
  int waiting_in_block_ = 0;
  std::exception_ptr error_;
  Fiber scheduler_;
  std::mt19937_64 random_{std::getenv("OPRD_CUDA_EMULATION_SEED")
                              ? std::strtoull(std::getenv("OPRD_CUDA_EMULATION_SEED"), nullptr, 10)
                              : 0};
  std::mutex busy_;
};

Machine& machine() {
  static Machine machine;
  return machine;
}

void Machine::entry() {
  Machine& m = machine();
  try {
    (*m.body_)();
  } catch (...) {
    m.error_ = std::current_exception();
  }
  Thread& own = m.threads_[m.running_];
  if (!m.error_ && !own.copies.empty()) {
    m.error_ = std::make_exception_ptr(Fault("a copy was begun and never waited for"));
  }
  own.waits = Waits::kEnded;
  own.fiber.switch_to(m.scheduler_);
}

void Machine::run_block() {
  block_epoch_ = 0;
  waiting_in_block_ = 0;
  waiting_in_warp_.assign(count_ / kWarp, 0);
  shuffles_.assign(count_, 0);
  ready_.clear();
  error_ = nullptr;
  for (int i = 0; i < count_; ++i) {
    Thread& thread = threads_[i];
    thread.fiber.begin(&Machine::entry);
    thread.waits = Waits::kNo;
    thread.warp_epoch = 0;
    thread.copies.clear();
    ready_.push_back(i);
  }
  int ended = 0;
  while (ended < count_) {
    if (ready_.empty()) report_divergence();
    std::swap(ready_[random_() % ready_.size()], ready_.back());
    running_ = ready_.back();
    ready_.pop_back();
    now_.thread.x = static_cast<unsigned>(running_);
    memory().set_thread(running_, block_epoch_, threads_[running_].warp_epoch);
    scheduler_.switch_to(threads_[running_].fiber);
    if (error_) std::rethrow_exception(error_);
    if (threads_[running_].waits == Waits::kEnded) {
      ++ended;
    } else {
      arrive(running_);
    }
  }
}

void Machine::wait(Waits what, Site site) {
  Thread& own = threads_[running_];
  own.waits = what;
  own.site = site;
  own.fiber.switch_to(scheduler_);
}

// Lets threads continue once all threads that must meet have arrived at the same location.
void Machine::arrive(int thread) {
  const bool whole_block = threads_[thread].waits == Waits::kBlock;
  int& waiting = whole_block ? waiting_in_block_ : waiting_in_warp_[thread / kWarp];
  if (++waiting < (whole_block ? count_ : kWarp)) return;
  waiting = 0;
  if (whole_block) {
    ++block_epoch_;
    release(0, count_);
  } else {
    release(thread / kWarp * kWarp, thread / kWarp * kWarp + kWarp);
  }
}

void Machine::release(int first, int last) {
  for (int i = first; i < last; ++i) {
    if (!same(threads_[i].site, threads_[first].site)) report_divergence();
  }
  for (int i = first; i < last; ++i) {
    threads_[i].waits = Waits::kNo;
    ready_.push_back(i);
  }
}

void Machine::report_divergence() {
  std::string text = "divergent synchronisation:";
  const char* separator = " thread ";
  for (int i = 0; i < count_; ++i) {
    const Thread& t = threads_[i];
    const bool like_the_one_before =
        i > 0 && t.waits == threads_[i - 1].waits &&
        (t.waits == Waits::kEnded || same(t.site, threads_[i - 1].site));
    if (like_the_one_before) continue;
    text += separator + std::to_string(i);
    if (t.waits == Waits::kEnded) {
      text += " on have ended";
    } else {
      text += std::string(" on wait for the ") + (t.waits == Waits::kBlock ? "block" : "warp") +
              " at " + describe(t.site);
    }
    separator = ", ";
  }
  throw Fault(text);
}

}  // namespace

Current& current() { return machine().now(); }

void copy_async(std::int64_t shared_offset, const void* value, std::size_t bytes, int limit) {
  machine().copy_async(shared_offset, value, bytes, limit);
}
void wait_for_copies() { machine().wait_for_copies(); }
void block_barrier(Site site) { machine().block_barrier(site); }
void warp_barrier(Site site) { machine().warp_barrier(site); }
void shuffle_xor(Site site, int mask, const void* value, void* result, std::size_t bytes) {
  machine().shuffle_xor(site, mask, value, result, bytes);
}
void warp_gather(Site site, const void* value, void* all, std::size_t bytes) {
  machine().warp_gather(site, value, all, bytes);
}
void global_access(const void* p, std::size_t bytes, bool write) {
  memory().global_access(reinterpret_cast<std::uintptr_t>(p), bytes, write);
}
void ordered_access(const void* p, std::size_t bytes) {
  memory().ordered_access(reinterpret_cast<std::uintptr_t>(p), bytes);
}
void* shared_access(std::int64_t offset, std::size_t bytes, int limit, bool write) {
  return memory().shared_access(offset, bytes, limit, write);
}

void run(std::int64_t blocks, int layers, int threads, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(machine().busy());
  machine().run(blocks, layers, threads, thread);
}

void seed(std::uint64_t value) { machine().seed(value); }

}  // namespace emulation
}  // namespace oprd
