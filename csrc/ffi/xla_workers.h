// XLA's thread pool as the kernels' Workers.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "../cpu/workers.h"
#include "xla/ffi/api/ffi.h"

namespace jax_dcn {

// Runs tasks on the calling thread.
class SerialWorkers final : public Workers {
 public:
  int count() const override { return 1; }
  void Run(int64_t tasks, void (*task)(void*, int, int64_t), void* context) noexcept override {
    for (int64_t i = 0; i < tasks; ++i) task(context, 0, i);
  }
};

// The caller may be a thread of the pool itself, so waiting for scheduled work could wait for ever: all threads of
// the pool might be doing the same. Hence the caller takes tasks like everybody else and only waits for those that
// another thread has begun. Nothing may unwind meanwhile, hence noexcept. Helpers that come too late find nothing left,
// and touch nothing but the shared state.
class XlaWorkers final : public Workers {
 public:
  explicit XlaWorkers(const xla::ffi::ThreadPool& pool)
      : pool_(pool), count_(static_cast<int>(std::max<int64_t>(1, pool_.num_threads()))) {}

  int count() const override { return count_; }

  void Run(int64_t tasks, void (*task)(void*, int, int64_t), void* context) noexcept override {
    const int64_t threads = std::min<int64_t>(count_, tasks);
    if (threads <= 1) return SerialWorkers().Run(tasks, task, context);
    const auto state = std::make_shared<State>();
    state->tasks = tasks;
    state->task = task;
    state->context = context;
    for (int64_t i = 1; i < threads; ++i) {
      pool_.Schedule([state] { state->TakeTasks(); });
    }
    state->TakeTasks();
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_done.wait(lock, [&] { return state->done == tasks; });
  }

 private:
  struct State {
    int64_t tasks;
    void (*task)(void*, int, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;  // under the mutex

    void TakeTasks() {
      int64_t i = next.fetch_add(1);
      if (i >= tasks) return;
      const int worker = workers.fetch_add(1);
      int64_t finished = 0;
      for (; i < tasks; i = next.fetch_add(1), ++finished) task(context, worker, i);
      const std::lock_guard<std::mutex> lock(mutex);
      done += finished;
      if (done == tasks) all_done.notify_all();
    }
  };

  xla::ffi::ThreadPool pool_;
  int count_;
};

}  // namespace jax_dcn
