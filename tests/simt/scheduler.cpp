// The fibers, their scheduler, and the calls that the compiler makes before every memory access.
//
// This source alone is compiled without a sanitizer.
#include "scheduler.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(SIMT_CHECK_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

// Whether a thread of a kernel runs, and not the scheduler.
bool in_kernel = false;

std::string text(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

// An asynchronous copy to shared memory that has been asked for and is not done.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;  // how many times the thread had committed before
};

struct Fiber {
  enum State { Ready, Waiting, Returned };
  static constexpr size_t kStackBytes = 1 << 18;

  char* stack = nullptr;
  bool started = false;
  void* resume[5];  // of __builtin_setjmp
  ucontext_t start;
  int number = 0;
  uint3 index{};
  State state = Ready;
  Call call;
  int last_line = 0;  // of the last barrier or warp call
  uint64_t result = 0;
  std::deque<Copy> copies;
  int groups = 0;

  Fiber() {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE) != 0) throw std::bad_alloc();
    stack = static_cast<char*>(memory);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() { munmap(stack, kStackBytes); }
};

struct Moment {
  int thread = -1;
  uint32_t time = 0;
};

// Who touched a byte of shared memory last. Of the readers, the last two that differ.
struct Touched {
  Moment write, reads[2];
};

// One array of shared memory: exactly as long as declared, filled with NaN before every block.
struct SharedArray {
  int key;
  size_t bytes;
  std::unique_ptr<char[]> memory;  // aligned to 16, the alignment of `new`
  std::vector<Touched> touched;    // empty unless races are looked for
};

class Scheduler {
 public:
  static Scheduler& get() {
    static Scheduler scheduler;
    return scheduler;
  }

  void launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned seed,
              const std::function<void()>& kernel) {
    check_limits(grid, block, shared_bytes);
    seed_ = seed;
    random_.seed(seed);
    patience_ = 1;
    kernel_ = &kernel;
    gridDim = grid;
    blockDim = block;
    shared_.clear();
    shared(kDynamic, shared_bytes);
    std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    arrange(order);
    for (uint64_t number : order) {
      blockIdx = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                  unsigned(number / grid.x / grid.y)};
      run_block(int(block.x * block.y * block.z));
    }
    shared_.clear();
  }

  static constexpr int kDynamic = -1;

  // The array of shared memory of that key, made on first use.
  char* shared(int key, size_t bytes) {
    const bool before = std::exchange(in_kernel, false);
    auto found = std::find_if(shared_.begin(), shared_.end(),
                              [&](const SharedArray& array) { return array.key == key; });
    if (found == shared_.end()) {
      shared_.push_back({key, bytes, std::unique_ptr<char[]>(new char[bytes]), {}});
      found = shared_.end() - 1;
#if defined(SIMT_CHECK_RACES)
      found->touched.resize(bytes);
#endif
      std::memset(found->memory.get(), 0xff, bytes);
      size_t total = 0;
      for (const SharedArray& array : shared_) total += array.bytes;
      if (key != kDynamic && total > kMaxSharedBytes) {
        fail("asks for " + std::to_string(total) + " bytes of shared memory, more than " +
             std::to_string(kMaxSharedBytes));
      }
    }
    in_kernel = before;
    return found->memory.get();
  }

  char* dynamic_shared() { return shared_.front().memory.get(); }

  // Waits until every thread that the call concerns makes it; returns what the thread asked for.
  uint64_t wait(const Call& call) {
    in_kernel = false;
    Fiber& fiber = *current_;
    fiber.call = call;
    fiber.state = Fiber::Waiting;
    if (call.mask != kBlock && (call.mask >> fiber.number % warpSize & 1) == 0) {
      fail(std::string(call.name) + " with a mask that lacks the calling lane");
    }
    if (call.mask == kBlock) {
      release_block();
    } else {
      release_warp(fiber.number / warpSize * warpSize);
    }
    to_scheduler();
    fiber.last_line = call.line;
    in_kernel = true;
    return fiber.result;
  }

  // What every lane of the warp brings, in order: see scheduler.h.
  void exchange(const void* own, size_t bytes, void* all) {
    in_kernel = false;
    const size_t lane = current_->number % warpSize, first = current_->number - lane;
    if (exchanged_.size() < threads_ * bytes) exchanged_.resize(threads_ * bytes);
    std::memcpy(&exchanged_[(first + lane) * bytes], own, bytes);
    wait({"exchange", 0, 0xffffffffu, 0, kAll, false});
    in_kernel = false;
    std::memcpy(all, &exchanged_[first * bytes], warpSize * bytes);
    wait({"exchange", 0, 0xffffffffu, 0, kAll, false});
  }

  // Copies when `wait_copies` asks for it, or at a random moment before.
  void copy_later(void* to, const void* from, size_t bytes) {
    in_kernel = false;
    if (uintptr_t(to) % bytes != 0 || uintptr_t(from) % bytes != 0) {
      fail("copies " + std::to_string(bytes) + " bytes from or to a misaligned address");
    }
    touch_bytes(to, bytes, true);
    current_->copies.push_back({to, from, bytes, current_->groups});
    if (seed_ > 2 && random_() % 4 == 0) copy_now(current_->copies.size());
    in_kernel = true;
  }

  void commit_copies() { ++current_->groups; }

  // Until all but the last `pending` groups of the thread's copies are done.
  void wait_copies(int pending) {
    in_kernel = false;
    std::deque<Copy>& copies = current_->copies;
    copy_now(std::count_if(copies.begin(), copies.end(), [&](const Copy& copy) {
      return copy.group < current_->groups - pending;
    }));
    in_kernel = true;
  }

  // Called before every memory access of the kernels.
  void access(const void* address, size_t bytes, bool write) {
    if (seed_ > 1 && seed_ % 2 == 1 && --patience_ <= 0) {
      patience_ = 1 + int(random_() % 64);
      ready_.push_back(current_->number);
      to_scheduler();
      in_kernel = false;
    }
    touch_bytes(address, bytes, write);
  }

 private:
  // What a kernel gets without asking for more, and what one that asks gets on every GPU since
  // compute capability 8.0, of dynamic shared memory.
  static constexpr size_t kMaxSharedBytes = 48 << 10, kMaxDynamicBytes = 99 << 10;

  static void check_limits(dim3 grid, dim3 block, size_t shared_bytes) {
    const auto inside = [](dim3 d, uint64_t x, uint64_t y, uint64_t z) {
      return d.x >= 1 && d.y >= 1 && d.z >= 1 && d.x <= x && d.y <= y && d.z <= z;
    };
    const auto shape = [](dim3 d) { return text(uint3{d.x, d.y, d.z}); };
    if (!inside(grid, 0x7fffffff, 65535, 65535)) {
      throw std::runtime_error("a grid of " + shape(grid) + " cannot be launched");
    }
    if (!inside(block, 1024, 1024, 64) || uint64_t(block.x) * block.y * block.z > 1024) {
      throw std::runtime_error("blocks of " + shape(block) + " threads cannot be launched");
    }
    if (shared_bytes > kMaxDynamicBytes) {
      throw std::runtime_error(std::to_string(shared_bytes) +
                               " bytes of shared memory are too many");
    }
  }

  // Puts what runs one after another in the order of the seed.
  template <class T>
  void arrange(std::vector<T>& order) {
    if (seed_ == 1) std::reverse(order.begin(), order.end());
    if (seed_ > 1) std::shuffle(order.begin(), order.end(), random_);
  }

  void run_block(int threads) {
    while (int(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    threads_ = live_ = threads;
    barrier_time_ = ++clock_;
    for (SharedArray& array : shared_) std::memset(array.memory.get(), 0xff, array.bytes);
    warp_times_.assign((threads + warpSize - 1) / warpSize, clock_);
    std::vector<int> order(threads);
    std::iota(order.begin(), order.end(), 0);
    for (int i : order) {
      Fiber& fiber = *fibers_[i];
      fiber.number = i;
      fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      fiber.state = Fiber::Ready;
      fiber.last_line = 0;
      fiber.copies.clear();
      fiber.groups = 0;
    }
    arrange(order);
    ready_.assign(order.begin(), order.end());
    while (!ready_.empty() && error_.empty()) {
      current_ = fibers_[ready_.front()].get();
      ready_.pop_front();
      to_fiber(*current_);
    }
    if (error_.empty() && live_ > 0) error_ = describe_deadlock();
    if (!error_.empty()) {
      for (auto& fiber : fibers_) fiber->started = false;  // those in the middle are lost
      throw std::runtime_error("block " + text(blockIdx) + ": " + std::exchange(error_, ""));
    }
  }

  // -- switching ----------------------------------------------------------------------------------

  [[gnu::noinline]] static void jump(void** to) { __builtin_longjmp(to, 1); }

  [[gnu::noinline]] static void enter(Fiber& fiber) {
    if (fiber.started) jump(fiber.resume);
    fiber.started = true;
#if defined(SIMT_CHECK_ADDRESS)
    __asan_unpoison_memory_region(fiber.stack, Fiber::kStackBytes);
#endif
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = Fiber::kStackBytes;
    makecontext(&fiber.start, &Scheduler::fiber_main, 0);
    setcontext(&fiber.start);
  }

  [[gnu::noinline]] void to_fiber(Fiber& fiber) {
    threadIdx = fiber.index;
    in_kernel = true;
#if defined(SIMT_CHECK_ADDRESS)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, Fiber::kStackBytes);
#endif
    if (__builtin_setjmp(resume_) == 0) enter(fiber);
#if defined(SIMT_CHECK_ADDRESS)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    in_kernel = false;
  }

  [[gnu::noinline]] void to_scheduler() {
#if defined(SIMT_CHECK_ADDRESS)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, stack_bytes_);
#endif
    if (__builtin_setjmp(current_->resume) == 0) jump(resume_);
    entered();
  }

  [[gnu::noinline]] void entered() {
#if defined(SIMT_CHECK_ADDRESS)
    __sanitizer_finish_switch_fiber(nullptr, &stack_, &stack_bytes_);
#endif
  }

  [[gnu::noinline]] static void fiber_main() {
    Scheduler& scheduler = get();
    scheduler.entered();
    for (;;) {
      (*scheduler.kernel_)();
      scheduler.returned();
    }
  }

  void returned() {
    in_kernel = false;
    copy_now(current_->copies.size());
    current_->state = Fiber::Returned;
    --live_;
    if (live_ > 0) release_block();
    release_warp(current_->number / warpSize * warpSize);
    to_scheduler();
  }

  // -- barriers and warp calls --------------------------------------------------------------------

  void copy_now(size_t count) {
    for (; count > 0; --count) {
      const Copy copy = current_->copies.front();
      current_->copies.pop_front();
      touch_bytes(copy.to, copy.bytes, true);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }

  void fail(const std::string& what) {
    error_ = "thread " + text(current_->index) + " " + what;
    to_scheduler();  // and never back
  }

  void make_ready(std::vector<int>& numbers) {
    arrange(numbers);
    for (int i : numbers) {
      fibers_[i]->state = Fiber::Ready;
      ready_.push_back(i);
    }
  }

  // If all live threads wait at a barrier: lets them go on.
  void release_block() {
    std::vector<int> numbers;
    for (int i = 0; i < threads_; ++i) {
      const Fiber& fiber = *fibers_[i];
      if (fiber.state == Fiber::Returned) continue;
      if (fiber.state == Fiber::Ready || fiber.call.mask != kBlock) return;
      numbers.push_back(i);
    }
    const Fiber& first = *fibers_[numbers.front()];
    uint64_t sum = 0;
    for (int i : numbers) {
      const Fiber& fiber = *fibers_[i];
      sum += fiber.call.bits;
      if (fiber.call.line != first.call.line || fiber.call.name != first.call.name) {
        fail("is the last at a divergent barrier: " + where(first) + ", but " + where(fiber));
      }
    }
    for (int i : numbers) fibers_[i]->result = sum;
    barrier_time_ = ++clock_;
    make_ready(numbers);
  }

  // Lets those lanes of a warp go on whose call all live lanes in its mask have made.
  void release_warp(int first) {
    const int lanes = std::min(warpSize, threads_ - first);
    for (int lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = *fibers_[first + lane];
      if (fiber.state == Fiber::Waiting && fiber.call.mask != kBlock &&
          complete(fiber.call, first, lanes)) {
        deliver(fiber.call, first, lanes);
      }
    }
  }

  bool complete(const Call& call, int first, int lanes) const {
    for (int lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = *fibers_[first + lane];
      if ((call.mask >> lane & 1) == 0 || fiber.state == Fiber::Returned) continue;
      if (fiber.state != Fiber::Waiting || fiber.call.mask != call.mask ||
          fiber.call.name != call.name) {
        return false;
      }
    }
    return true;
  }

  void deliver(const Call& call, int first, int lanes) {
    std::vector<int> numbers;
    uint64_t all = 0;
    uint32_t live = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      const Fiber& fiber = *fibers_[first + lane];
      if (fiber.state == Fiber::Returned) continue;
      live |= 1u << lane;
      if ((call.mask >> lane & 1) == 0) continue;
      numbers.push_back(first + lane);
      all |= fiber.call.bits;
    }
    for (int i : numbers) {
      Fiber& fiber = *fibers_[i];
      const int source = fiber.call.source;
      if (source != kAll && (call.mask & live & 1u << source) == 0) {
        error_ = where(fiber) + " and reads lane " + std::to_string(source) +
                 ", which takes no part in it";
        break;
      }
      fiber.result = source == kAll ? all : fibers_[first + source]->call.bits;
    }
    if (!error_.empty()) to_scheduler();  // and never back
    if ((live & ~call.mask) == 0 && call.orders_memory) warp_times_[first / warpSize] = ++clock_;
    make_ready(numbers);
  }

  static std::string where(const Fiber& fiber) {
    return "thread " + text(fiber.index) + " waits in " + fiber.call.name + " at line " +
           std::to_string(fiber.call.line);
  }

  std::string describe_deadlock() const {
    std::string found =
        std::to_string(live_) + " of " + std::to_string(threads_) + " threads wait for ever: ";
    const Fiber* before = nullptr;
    for (int i = 0; i < threads_; ++i) {
      const Fiber& fiber = *fibers_[i];
      if (fiber.state != Fiber::Waiting) continue;
      const bool same = before != nullptr && before->call.line == fiber.call.line &&
                        before->call.name == fiber.call.name &&
                        before->call.mask == fiber.call.mask;
      if (!same) found += (before ? "; " : "") + where(fiber);
      before = &fiber;
    }
    return found;
  }

  // -- races --------------------------------------------------------------------------------------

  // Whether another thread's access is not ordered before what the current thread does now.
  bool races(const Moment& other) const {
    const int mine = current_->number;
    if (other.thread < 0 || other.thread == mine || other.time < barrier_time_) return false;
    const bool same_warp = other.thread / warpSize == mine / warpSize;
    return !same_warp || other.time >= warp_times_[mine / warpSize];
  }

  void touch_bytes(const void* address, size_t bytes, bool write) {
    for (SharedArray& array : shared_) {
      const ptrdiff_t offset = static_cast<const char*>(address) - array.memory.get();
      if (array.touched.empty() || offset < 0 || offset >= ptrdiff_t(array.bytes)) continue;
      for (size_t i = offset; i < std::min(offset + bytes, array.bytes); ++i) {
        touch(array.touched[i], write);
      }
    }
  }

  void touch(Touched& byte, bool write) {
    const Moment now{current_->number, clock_};
    const auto report = [&](const Moment& other, const char* before) {
      fail(std::string(write ? "writes" : "reads") + " shared memory that thread " +
           text(fibers_[other.thread]->index) + " " + before +
           " with no barrier in between (this thread's last one: line " +
           std::to_string(current_->last_line) + ")");
    };
    if (races(byte.write)) report(byte.write, "wrote");
    if (write) {
      for (const Moment& read : byte.reads) {
        if (races(read)) report(read, "read");
      }
      byte.write = now;
    } else {
      if (byte.reads[0].thread != now.thread) byte.reads[1] = byte.reads[0];
      byte.reads[0] = now;
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<SharedArray> shared_;
  std::deque<int> ready_;
  std::vector<uint32_t> warp_times_;
  const std::function<void()>* kernel_ = nullptr;
  Fiber* current_ = nullptr;
  std::vector<char> exchanged_;
  std::string error_;
  std::mt19937 random_;
  uint32_t clock_ = 0, barrier_time_ = 0;  // clock_ counts barriers
  unsigned seed_ = 0;
  int threads_ = 0, live_ = 0, patience_ = 1;
  void* resume_[5];
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
};

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, unsigned seed,
              const std::function<void()>& kernel) {
  Scheduler::get().launch(grid, block, shared_bytes, seed, kernel);
}

uint64_t wait(const Call& call) { return Scheduler::get().wait(call); }
char* shared(int key, size_t bytes) { return Scheduler::get().shared(key, bytes); }
char* dynamic_shared() { return Scheduler::get().dynamic_shared(); }
void exchange(const void* own, size_t bytes, void* all) {
  Scheduler::get().exchange(own, bytes, all);
}
void copy_later(void* to, const void* from, size_t bytes) {
  Scheduler::get().copy_later(to, from, bytes);
}
void commit_copies() { Scheduler::get().commit_copies(); }
void wait_copies(int pending) { Scheduler::get().wait_copies(pending); }

namespace {

void on_access(const void* address, size_t bytes, bool write) {
  if (!in_kernel) return;
  in_kernel = false;
  Scheduler::get().access(address, bytes, write);
  in_kernel = true;
}

}  // namespace
}  // namespace simt

// -- the compiler's calls before every memory access ---------------------------------------------
//
// -fsanitize=address, told to call functions, checks the bounds of all memory here.
// -fsanitize=thread, without its runtime library, finds races on shared memory here: two accesses
// by two threads, one of them a write, with no barrier in between, whatever the schedule.

#define SIMT_HOOK extern "C" void

#if defined(SIMT_CHECK_ADDRESS)

extern "C" void __asan_report_load_n(void* address, size_t bytes);
extern "C" void __asan_report_store_n(void* address, size_t bytes);

#define SIMT_ACCESS(kind, write, bytes)                       \
  simt::on_access(address, bytes, write);                     \
  if (__asan_region_is_poisoned(address, bytes) != nullptr) { \
    __asan_report_##kind##_n(address, bytes);                 \
  }
#define SIMT_HOOKS(bytes)                                                             \
  SIMT_HOOK __asan_load##bytes(void* address){                                        \
      SIMT_ACCESS(load, false, bytes)} SIMT_HOOK __asan_store##bytes(void* address) { \
    SIMT_ACCESS(store, true, bytes)                                                   \
  }

SIMT_HOOK __asan_loadN(void* address, size_t bytes){SIMT_ACCESS(load, false, bytes)} SIMT_HOOK
    __asan_storeN(void* address, size_t bytes){SIMT_ACCESS(store, true, bytes)}

#elif defined(SIMT_CHECK_RACES)

#define SIMT_ACCESS(write, bytes) simt::on_access(address, bytes, write);
#define SIMT_HOOKS(bytes)                                                                 \
  SIMT_HOOK __tsan_read##bytes(void* address){                                            \
      SIMT_ACCESS(false, bytes)} SIMT_HOOK __tsan_write##bytes(void* address){            \
      SIMT_ACCESS(true, bytes)} SIMT_HOOK __tsan_unaligned_read##bytes(void* address){    \
      SIMT_ACCESS(false, bytes)} SIMT_HOOK __tsan_unaligned_write##bytes(void* address) { \
    SIMT_ACCESS(true, bytes)                                                              \
  }

SIMT_HOOK __tsan_read_range(void* address, size_t bytes){SIMT_ACCESS(false, bytes)} SIMT_HOOK
    __tsan_write_range(void* address, size_t bytes){SIMT_ACCESS(true, bytes)} SIMT_HOOK
    __tsan_vptr_update(void**, void*) {}
SIMT_HOOK __tsan_vptr_read(void**) {}
SIMT_HOOK __tsan_func_entry(void*) {}
SIMT_HOOK __tsan_func_exit() {}
SIMT_HOOK __tsan_init() {}

#endif

SIMT_HOOKS(1) SIMT_HOOKS(2) SIMT_HOOKS(4) SIMT_HOOKS(8) SIMT_HOOKS(16)
