// Run CUDA kernels on a host, block after block, so that sanitizers see every access.
//
// The threads of a block are fibers, which switch only at __syncthreads, in a fixed order, forwards or backwards.
// Shared memory is a heap block of the exact size for each declaration, allocated anew for each block of the grid and
// filled with NaN, so that a number that is read before it is written shows in the result. The program ends if a thread
// ends while others wait at a sync. ThreadSanitizer knows the fibers and that only a sync orders them: it finds a
// missing one although nothing here runs at the same time.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __syncthreads() host_gpu::sync()
#define SHARED(type, name, count) type* const name = host_gpu::shared<type>(count)
#define LAUNCH(kernel, blocks, threads, stream, ...) \
  host_gpu::launch((blocks), (threads), (stream), [&] { (kernel)(__VA_ARGS__); })

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace host_gpu {

// What a caller may choose before it launches a kernel.
struct Options {
  bool backwards = false;        // the order of the threads, and of the blocks
  int64_t most_blocks = 1 << 30; // the largest grid
  int64_t last_blocks = -1;      // run only this many at the end of the grid; -1: all
};
inline Options options;

// Tell ThreadSanitizer that everything before `release(at)` happens before everything after `acquire(at)`.
inline void release([[maybe_unused]] void* at) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(at);
#endif
}
inline void acquire([[maybe_unused]] void* at) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(at);
#endif
}

// A stack of its own, announced to the sanitizers.
class Fiber {
 public:
  Fiber() : memory_(new char[kStackSize]) {
    stack_ = memory_.get();
    size_ = kStackSize;
#ifdef __SANITIZE_THREAD__
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  // The stack that the program runs on.
  struct Main {};
  explicit Fiber(Main) {
#ifdef __SANITIZE_THREAD__
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // The next switch to this fiber starts `entry`, which must not return.
  void prepare(void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory_.get();
    context_.uc_stack.ss_size = kStackSize;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  // Switch from this fiber to another; `for_good`: it will not continue.
  __attribute__((no_sanitize("address", "thread"))) void leave_for(Fiber& other, [[maybe_unused]] bool for_good) {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(other.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, other.stack_, other.size_);
#endif
    swapcontext(&context_, &other.context_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // An entry must call this first; `from` is the fiber that switched to it.
  __attribute__((no_sanitize("address"))) static void arrive_from([[maybe_unused]] Fiber& from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &from.stack_, &from.size_);
#endif
  }

 private:
  static constexpr size_t kStackSize = 256 << 10;
  std::unique_ptr<char[]> memory_;
  const void* stack_ = nullptr;
  size_t size_ = 0;
  ucontext_t context_;
  void* fake_stack_ = nullptr;
  void* tsan_ = nullptr;
};

struct Thread {
  enum State { ready, waiting, ended };
  Fiber fiber;
  dim3 index;
  State state;
  int num_shared;  // declarations of shared memory passed
  int num_syncs;   // syncs passed
};

// The running block.
struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // kept for the next block
  std::vector<std::unique_ptr<char[]>> shared;
  Thread* current = nullptr;
  Fiber scheduler{Fiber::Main()};
  const std::function<void()>* kernel = nullptr;
  char begins, ends, allocates, syncs[2];  // places of `release` and `acquire`
};
inline Block block;

// For a thread's code that touches the scheduler's data: it is not part of the kernel.
#define OF_THE_SCHEDULER __attribute__((noinline, no_sanitize("thread")))

OF_THE_SCHEDULER inline void sync() {
  Thread& thread = *block.current;
  // Two places in turn: the first thread past a sync reaches the next one before others have left this one.
  char* place = &block.syncs[thread.num_syncs++ % 2];
  release(place);
  thread.state = Thread::waiting;
  thread.fiber.leave_for(block.scheduler, false);
  acquire(place);
}

template <class T>
OF_THE_SCHEDULER inline T* shared(size_t count) {
  const size_t number = block.current->num_shared++;
  acquire(&block.allocates);
  if (number == block.shared.size()) {
    block.shared.emplace_back(new char[count * sizeof(T)]);
    memset(block.shared.back().get(), 0xff, count * sizeof(T));
    release(&block.allocates);
  }
  return reinterpret_cast<T*>(block.shared[number].get());
}

OF_THE_SCHEDULER inline void run_thread() {
  Fiber::arrive_from(block.scheduler);
  acquire(&block.begins);
  (*block.kernel)();
  release(&block.ends);
  block.current->state = Thread::ended;
  block.current->fiber.leave_for(block.scheduler, true);
}

// Run each thread to its next sync or its end; return how many have ended.
OF_THE_SCHEDULER inline size_t take_turns(size_t num_threads) {
  size_t num_ended = 0;
  for (size_t turn = 0; turn < num_threads; turn++) {
    Thread& thread = *block.threads[options.backwards ? num_threads - 1 - turn : turn];
    block.current = &thread;
    threadIdx = thread.index;
    block.scheduler.leave_for(thread.fiber, false);
    num_ended += thread.state == Thread::ended;
  }
  return num_ended;
}

OF_THE_SCHEDULER inline void run_block(int64_t number) {
  blockIdx = dim3(static_cast<unsigned>(number), 0, 0);
  const size_t num_threads = size_t{blockDim.x} * blockDim.y * blockDim.z;
  while (block.threads.size() < num_threads) block.threads.emplace_back(new Thread);
  for (unsigned i = 0; i < num_threads; i++) {
    Thread& thread = *block.threads[i];
    thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    thread.num_shared = thread.num_syncs = 0;
    thread.fiber.prepare(run_thread);
  }
  release(&block.begins);
  for (size_t num_ended = 0; num_ended < num_threads;) {
    num_ended = take_turns(num_threads);
    if (num_ended > 0 && num_ended < num_threads) {
      fprintf(stderr, "%zu of %zu threads wait at __syncthreads, the others have ended\n", num_threads - num_ended,
              num_threads);
      abort();
    }
  }
  acquire(&block.ends);
  block.shared.clear();
}

inline void launch(int64_t num_blocks, dim3 threads, cudaStream_t, const std::function<void()>& kernel) {
  if (num_blocks < 1 || num_blocks > INT32_MAX || threads.x * threads.y * threads.z > 1024) {
    fprintf(stderr, "a grid of %lld blocks of %u x %u x %u threads cannot be launched\n",
            static_cast<long long>(num_blocks), threads.x, threads.y, threads.z);
    abort();
  }
  num_blocks = num_blocks < options.most_blocks ? num_blocks : options.most_blocks;
  const int64_t first = options.last_blocks < 0 || options.last_blocks > num_blocks ? 0
                                                                                  : num_blocks - options.last_blocks;
  blockDim = threads;
  gridDim = dim3(static_cast<unsigned>(num_blocks));
  block.kernel = &kernel;
  for (int64_t i = first; i < num_blocks; i++) run_block(options.backwards ? first + num_blocks - 1 - i : i);
}

}  // namespace host_gpu
