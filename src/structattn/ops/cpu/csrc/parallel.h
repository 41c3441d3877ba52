// Tasks over PyTorch's threads, and memory for them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace structattn {

// Memory for `count` elements, not initialised, on a cache line's edge.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
    memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
  }
  T* get() const { return memory_.get(); }
  operator T*() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
};

// Runs worker(task) for every task, in order of their numbers, on whichever thread is free. Each thread makes its own
// worker, which holds its scratch memory. Calls of `cheap` tasks stay on the calling thread.
template <class MakeWorker>
void for_each_task(int64_t tasks, bool cheap, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  const int64_t threads = cheap ? 1 : std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) worker(task);
#if defined(__AVX512BF16__)
    at::native::cpublas::brgemm_release(true);  // gives up the tile registers that AMX may have configured
#endif
  });
}

// Heads go through in waves, each wave's packed tensors in the same memory: a few MB however large the batch, unless one
// head per thread needs more.
constexpr int64_t kWaveBytes = int64_t{32} << 20;

inline int64_t heads_per_wave(int64_t heads, int64_t bytes_per_head) {
  const int64_t threads = at::get_num_threads();
  const int64_t fit = kWaveBytes / std::max<int64_t>(bytes_per_head, 1);
  return std::min(heads, std::max<int64_t>(fit / threads, 1) * threads);
}

// Calls of so few pairs of tiles stay on the calling thread: to wake another takes longer.
constexpr int64_t kCheapPairs = 4;

}  // namespace structattn
