// A GPU on the CPU: programs, the threads of which are fibers on one core, run in random order
// between the points where they must wait for each other, one warp far ahead of the others.
//
// Broken rules throw std::runtime_error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulated {

inline void require(bool condition, const char* rule) {
  if (!condition) throw std::runtime_error(std::string("emulated GPU: ") + rule);
}

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 18;

// What lanes of a warp hand to each other at one meeting.
struct Meeting {
  std::array<std::array<uint64_t, 12>, kWarp> given;
  std::array<const char*, kWarp> what;
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Copy {
  char* to;
  std::array<char, 16> bytes;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  const unsigned* waits_for;  // to be another number than
  unsigned seen;
  unsigned meetings;
  std::vector<std::vector<Copy>> groups;  // of copies on their way, the last one still open
  bool done;
};

class Gpu {
 public:
  std::mt19937 random{0};
  size_t shared_bytes = 0;
  // What happens by itself: copies that arrive, at any time.
  void later(std::function<void()> event) {
    events_.push_back({random() % 2 == 0, std::move(event)});
  }
  bool has_events() const { return !events_.empty(); }
  void drop_events() { events_.clear(); }

  // Runs `body` as every thread of one program.
  void run_program(unsigned count, const std::function<void()>& body) {
    body_ = &body;
    error_ = nullptr;
    if (threads_.size() < count) threads_.resize(count);
    count_ = count;
    warps_.assign((count + kWarp - 1) / kWarp, {});
    all_ = {};
    for (unsigned i = 0; i < count; ++i) start(i);
    std::vector<unsigned> ready;
    unsigned ahead = 0;
    while (true) {
      ready.clear();
      unsigned left = 0;
      for (unsigned i = 0; i < count; ++i) {
        Thread& thread = threads_[i];
        if (thread.done) continue;
        ++left;
        if (!thread.waits_for || thread.seen != *thread.waits_for) ready.push_back(i);
      }
      if (left == 0) return;
      if ((ready.empty() || random() % 8 == 0) && happen(ready.empty())) continue;
      require(!ready.empty(), "threads wait for others that never come");
      // One warp goes ahead as far as it can, so that warps are as far apart as barriers allow.
      const auto is_ahead = [&](unsigned i) { return i / kWarp == ahead; };
      if (random() % 64 == 0 || std::none_of(ready.begin(), ready.end(), is_ahead)) {
        ahead = ready[random() % ready.size()] / kWarp;
      }
      ready.erase(std::stable_partition(ready.begin(), ready.end(), is_ahead), ready.end());
      std::shuffle(ready.begin(), ready.end(), random);
      for (const unsigned i : ready) {
        current_ = i;
        threadIdx.x = i;
        swapcontext(&scheduler_, &threads_[i].context);
        if (error_) std::rethrow_exception(error_);
      }
    }
  }

  Thread& thread() { return threads_[current_]; }
  unsigned lane() const { return current_ % kWarp; }

  unsigned index() const { return current_; }

  void wait_for_all() { wait(all_, count_); }

  void wait_for_change(const unsigned& number) {
    Thread& mine = thread();
    mine.waits_for = &number;
    mine.seen = number;
    swapcontext(&mine.context, &scheduler_);
    mine.waits_for = nullptr;
  }

  // Lets others go first, sometimes.
  void dawdle() {
    if (random() % 2) swapcontext(&thread().context, &scheduler_);
  }

  // Hands `given` to the other lanes and returns what all have given. Two of these are in use in
  // turn: nobody can be two meetings ahead.
  const Meeting& meet(const char* what, const std::array<uint64_t, 12>& given) {
    Warp& warp = warps_[current_ / kWarp];
    Meeting& meeting = warp.meetings[thread().meetings++ % 2];
    meeting.given[lane()] = given;
    meeting.what[lane()] = what;
    wait(warp.barrier, kWarp);
    for (const char* other : meeting.what) require(other == what, "lanes meet for other things");
    return meeting;
  }

 private:
  struct Warp {
    Barrier barrier;
    std::array<Meeting, 2> meetings;
  };

  void start(unsigned i) {
    Thread& thread = threads_[i];
    if (!thread.stack) thread.stack = std::make_unique<char[]>(kStack);
    thread.waits_for = nullptr;
    thread.meetings = 0;
    thread.groups.assign(1, {});
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler_;
    makecontext(&thread.context, reinterpret_cast<void (*)()>(&Gpu::enter), 0);
  }

  static void enter();

  void wait(Barrier& barrier, unsigned count) {
    if (++barrier.arrived == count) {
      barrier.arrived = 0;
      ++barrier.generation;
      return;
    }
    wait_for_change(barrier.generation);
  }

  // One event, if there is one; a late one only where nothing else can be done.
  bool happen(bool nothing_else) {
    std::shuffle(events_.begin(), events_.end(), random);
    const auto soon = [](const Event& event) { return !event.late; };
    auto found = std::find_if(events_.begin(), events_.end(), soon);
    if (found == events_.end() && nothing_else) found = events_.begin();
    if (found == events_.end()) return false;
    const auto event = std::move(found->happens);
    events_.erase(found);
    event();
    return true;
  }

  struct Event {
    bool late;
    std::function<void()> happens;
  };

  std::vector<Event> events_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier all_;
  ucontext_t scheduler_;
  unsigned count_ = 0, current_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
};

inline Gpu gpu;

// What the kernels' sizes() say.
inline int64_t programs_at_a_time = 3;

inline void Gpu::enter() {
  try {
    (*gpu.body_)();
  } catch (...) {
    gpu.error_ = std::current_exception();
  }
  gpu.thread().done = true;
}

inline uint64_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint64_t bits) {
  const auto low = static_cast<uint32_t>(bits);
  float x;
  std::memcpy(&x, &low, sizeof x);
  return x;
}

}  // namespace emulated

