// What the kernels need of a thread pool, and nothing of whose it is.

#pragma once

#include <cstdint>

namespace jax_dcn {

class Workers {
 public:
  virtual ~Workers() = default;

  // How many threads may run tasks at the same time. Results must not depend on it.
  virtual int count() const = 0;

  // Calls task(context, worker, i) for every i in [0, tasks), in any order, on up to count() threads, and returns
  // when all are done. `worker` is in [0, count()) and differs between calls that run at the same time. A task must
  // not throw and must not call Run.
  virtual void Run(int64_t tasks, void (*task)(void* context, int worker, int64_t i), void* context) noexcept = 0;
};

// Run for anything callable as task(worker, i).
template <class Task>
inline __attribute__((always_inline)) void ParallelFor(Workers& workers, int64_t tasks, const Task& task) {
  workers.Run(
      tasks, [](void* context, int worker, int64_t i) { (*static_cast<const Task*>(context))(worker, i); },
      const_cast<Task*>(&task));
}

}  // namespace jax_dcn
