#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <stdexcept>
#include <vector>

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kGuardBytes = 4096;  // behind a block's shared memory, to notice writes beyond it

struct Copy {
  unsigned char* to;
  const void* from;
  int bytes;
  bool valid;

  void run() const {
    if (valid) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
};

struct Thread {
  ucontext_t start;
  jmp_buf place;
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStackBytes);
  bool started, finished;
  const int* waits_for;  // a counter that must move on, or null
  int seen;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;
};

// Lanes (or threads) that have come to the same point, and how often all of them have.
struct Meeting {
  int arrived = 0;
  int rounds = 0;
  void (*execute)(void* const* lanes) = nullptr;
  void* operands[32];
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Meeting> warps;
  Meeting barrier;
  std::vector<unsigned char> memory;
  unsigned char* aligned = nullptr;
  int living = 0;
  Mode mode;
  void (*body)(void*);
  void* argument;
  const char* failure = nullptr;  // a fiber cannot throw into the scheduler's stack
};

Block block;
Thread* current = nullptr;
jmp_buf scheduler;

void enter() {
  block.body(block.argument);
  current->finished = true;
  --block.living;
  // Threads that have returned no longer count at a barrier.
  if (block.barrier.arrived > 0 && block.barrier.arrived == block.living) {
    block.barrier.arrived = 0;
    ++block.barrier.rounds;
  }
  _longjmp(scheduler, 1);
}

void wait_for(const int& rounds) {
  current->waits_for = &rounds;
  current->seen = rounds;
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

void resume(int index) {
  Thread& thread = *block.threads[index];
  current = &thread;
  threadIdx.x = index;
  thread.waits_for = nullptr;
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.start);
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Thread& thread = *block.threads[i];
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.data();
    thread.start.uc_stack.ss_size = thread.stack.size();
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, &enter, 0);
    thread.started = thread.finished = false;
    thread.waits_for = nullptr;
    thread.open.clear();
    thread.closed.clear();
  }
  block.warps.assign(threads / 32, Meeting());
  block.barrier = Meeting();
  block.living = threads;
  while (block.living > 0) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      const int index = block.mode.threads_reversed ? threads - 1 - i : i;
      const Thread& thread = *block.threads[index];
      if (thread.finished || (thread.waits_for && *thread.waits_for == thread.seen)) continue;
      resume(index);
      if (block.failure) throw std::runtime_error(block.failure);
      moved = true;
    }
    if (!moved) throw std::runtime_error("the threads of a block wait for each other forever");
  }
}

}  // namespace

void launch(int blocks, int threads, int shared_bytes, const Mode& mode, void (*body)(void*),
            void* argument) {
  while (int(block.threads.size()) < threads) {
    block.threads.push_back(std::make_unique<Thread>());
  }
  block.mode = mode;
  block.body = body;
  block.argument = argument;
  block.failure = nullptr;
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < unsigned(blocks); ++blockIdx.x) {
    // Not a number in every type: what is read before it is written shows.
    block.memory.assign(128 + shared_bytes + kGuardBytes, 0xff);
    const auto address = reinterpret_cast<uintptr_t>(block.memory.data());
    block.aligned = block.memory.data() + (128 - address % 128) % 128;
    run_block(threads);
    const unsigned char* end = block.aligned + shared_bytes;
    if (!std::all_of(end, end + kGuardBytes, [](unsigned char byte) { return byte == 0xff; })) {
      throw std::runtime_error("a write beyond shared memory");
    }
  }
}

void block_barrier() {
  Meeting& meeting = block.barrier;
  if (++meeting.arrived == block.living) {
    meeting.arrived = 0;
    ++meeting.rounds;
    return;
  }
  wait_for(meeting.rounds);
}

void together(void* operands, void (*execute)(void* const* lanes)) {
  Meeting& meeting = block.warps[threadIdx.x / 32];
  if (meeting.arrived > 0 && meeting.execute != execute) {
    block.failure = "the lanes of a warp are at different instructions";
  }
  meeting.execute = execute;
  meeting.operands[threadIdx.x % 32] = operands;
  if (++meeting.arrived == 32) {
    meeting.arrived = 0;
    execute(meeting.operands);
    ++meeting.rounds;
    return;
  }
  wait_for(meeting.rounds);
}

unsigned char* shared() { return block.aligned; }

void start_copy(unsigned char* to, const void* from, int bytes, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) {
    block.failure = "cp.async needs addresses that are aligned to its size";
    return;
  }
  const Copy copy{to, from, bytes, valid};
  if (block.mode.copies_at_once) {
    copy.run();
  } else {
    current->open.push_back(copy);
  }
}

void close_copies() {
  current->closed.push_back(std::move(current->open));
  current->open.clear();
}

void wait_for_copies(int pending) {
  while (int(current->closed.size()) > pending) {
    for (const Copy& copy : current->closed.front()) copy.run();
    current->closed.pop_front();
  }
}

}  // namespace emulation
