// Work shared by the threads of XLA's intra-op pool and the calling thread.
#ifndef PERPARAM_PARALLEL_H_
#define PERPARAM_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include <xla/ffi/api/ffi.h>

namespace perparam {

// Calls body(i) once for each i in [0, count), on several threads, and returns when all have returned.
//
// The caller takes part and waits only for calls that have begun: if all threads of the pool are busy, or wait as this
// one does, it makes all the calls itself.
template <class Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count, &body] {  // `body` is used only while the caller waits
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      body(i);
      progress->done.fetch_add(1);
    }
  };
  int64_t helpers = std::min<int64_t>(count, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  for (int spins = 0; progress->done.load() < count; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

}  // namespace perparam

#endif
