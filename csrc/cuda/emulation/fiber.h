// A fiber: a stack, and the position from which it continues. On x86-64, a switch saves and
// restores the registers that the calling convention preserves, which takes a few nanoseconds.
// Other platforms use ucontext, which costs a system call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace oprd {
namespace emulation {

constexpr std::size_t kStackBytes = 128 * 1024;

#if defined(__x86_64__)

extern "C" void oprd_switch_stack(void** save, void* to);

class Fiber {
 public:
  // Makes the fiber start in `entry`, which must never return. A second call starts it again.
  void begin(void (*entry)()) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    auto top = reinterpret_cast<std::uintptr_t>(stack_.get() + kStackBytes) & ~std::uintptr_t{63};
    // Six saved registers, then the return address: at entry the stack looks as after a call.
    auto* frame = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    place_ = frame;
  }
  void switch_to(Fiber& other) { oprd_switch_stack(&place_, other.place_); }

 private:
  std::unique_ptr<char[]> stack_;
  void* place_ = nullptr;
};

#else

class Fiber {
 public:
  void begin(void (*entry)()) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Fiber& other) { swapcontext(&context_, &other.context_); }

 private:
  std::unique_ptr<char[]> stack_;
  ucontext_t context_;
};

#endif

}  // namespace emulation
}  // namespace oprd
