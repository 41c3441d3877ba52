// Tasks over PyTorch's threads, and memory for them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "call.h"
#include "gemm.h"

namespace structattn {

// Freed memory, kept for the next call: the kernel would clear pages anew each time the system hands them out, which
// costs a tenth of a call. Where another thread has hold of it, or it is full, memory goes to and from the system.
class Pool {
 public:
  static Pool& shared() {
    static Pool* pool = new Pool;  // never destroyed: threads may outlive static objects
    return *pool;
  }

  struct Piece {
    void* memory;
    size_t bytes;
  };

  // Memory of at least that size.
  Piece take(size_t bytes) {
    if (std::unique_lock lock(mutex_, std::try_to_lock); lock) {
      const auto fits = [&](const Piece& piece) { return piece.bytes >= bytes && piece.bytes <= 2 * bytes; };
      if (const auto found = std::find_if(pieces_.begin(), pieces_.end(), fits); found != pieces_.end()) {
        const Piece piece = *found;
        kept_ -= piece.bytes;
        pieces_.erase(found);
        return piece;
      }
    }
    void* memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    return {memory, bytes};
  }

  void give(Piece piece) {
    if (std::unique_lock lock(mutex_, std::try_to_lock); lock && kept_ + piece.bytes <= kMost && piece.bytes >= kLeast) {
      pieces_.push_back(piece);
      kept_ += piece.bytes;
    } else {
      std::free(piece.memory);
    }
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kMost = 0;  // each piece from the system, with its own guarded edges
#else
  static constexpr size_t kMost = size_t{64} << 20;
#endif
  static constexpr size_t kLeast = size_t{64} << 10;
  std::mutex mutex_;
  std::vector<Piece> pieces_;
  size_t kept_ = 0;
};

// Memory for `count` elements, not initialised, on a cache line's edge.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : piece_(Pool::shared().take((std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Pool::shared().give(piece_); }

  T* get() const { return static_cast<T*>(piece_.memory); }
  operator T*() const { return get(); }

 private:
  Pool::Piece piece_;
};

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Runs worker(task) for every task, in order of their numbers, on whichever thread is free. Each thread makes its own
// worker, which holds its scratch memory. `cheap` tasks stay on the calling thread.
template <class MakeWorker>
void for_each_task(int64_t tasks, bool cheap, const MakeWorker& make_worker) {
  std::atomic<int64_t> next{0};
  const int64_t threads = cheap ? 1 : std::min<int64_t>(num_threads(), tasks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto worker = make_worker();
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) worker(task);
    release_products();
  });
}

// Heads go through in waves, each wave's packed tensors in the same memory: a few MB however large the batch, unless
// one head per thread needs more.
constexpr int64_t kWaveBytes = int64_t{32} << 20;

inline int64_t heads_per_wave(int64_t heads, int64_t bytes_per_head) {
  const int64_t threads = num_threads();
  const int64_t fit = std::max<int64_t>(kWaveBytes / std::max<int64_t>(bytes_per_head, 1) / threads, 1) * threads;
  const int64_t waves = std::max<int64_t>((heads + fit - 1) / fit, 1);
  const int64_t even = (heads + waves - 1) / waves;  // waves of one size leave no thread idle in the last
  return std::min(heads, (even + threads - 1) / threads * threads);
}

// Calls of so few multiply-adds stay on the calling thread: to wake another takes longer.
constexpr int64_t kCheap = int64_t{1} << 21;

inline bool is_cheap(const Call& call) {
  return call.batch * call.heads * call.query_length * call.key_length * (call.rank + call.value_width) <= kCheap;
}

}  // namespace structattn
