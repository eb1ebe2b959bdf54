#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

// How long a thread without work looks for more before it sleeps: longer than what lies between two calls of a step.
constexpr auto kPatience = std::chrono::microseconds(300);
constexpr int kSpins = 64;  // looks between two at the clock

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  const std::function<void(int64_t)>& task;
  const int64_t count;
  std::vector<Part> parts;  // neighbouring tasks, those of one thread
  int64_t seated = 1;       // threads that came, the caller among them; under the crew's mutex
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;

  Job(int64_t count, int64_t threads, const std::function<void(int64_t)>& task)
      : task(task), count(count), parts(threads) {
    for (int64_t i = 0; i < threads; i++) {
      parts[i].next = count * i / threads;
      parts[i].end = count * (i + 1) / threads;
    }
  }

  // Works in its own part first. One that comes late finds nothing, and does not touch `task`, which may be gone.
  void work(int64_t seat) {
    const int64_t threads = int64_t(parts.size());
    int64_t mine = 0;
    for (int64_t p = 0; p < threads; p++) {
      Part& part = parts[(seat + p) % threads];
      for (int64_t i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end; mine++) task(i);
    }
    if (mine && done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(mutex);
      finished.notify_all();
    }
  }

  void wait() {
    for (int spins = 0; spins < 50000; spins++) {
      if (done.load(std::memory_order_acquire) == count) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return done.load() == count; });
  }
};

class Crew {
 public:
  void run(int64_t count, int64_t helpers, const std::function<void(int64_t)>& task) {
    const auto job = std::make_shared<Job>(count, helpers + 1, task);
    bool asleep;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int64_t(hired_) < helpers) {
        std::thread([this] { live(); }).detach();
        hired_++;
      }
      jobs_.push_back(job);
      posted_.fetch_add(1);
      asleep = sleeping_ > 0;
    }
    if (asleep) wake_.notify_all();
    job->work(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto at = std::find(jobs_.begin(), jobs_.end(), job);
      if (at != jobs_.end()) jobs_.erase(at);
    }
    job->wait();
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::shared_ptr<Job>> jobs_;  // that still want threads
  std::atomic<uint64_t> posted_{0};
  int64_t hired_ = 0, sleeping_ = 0;

  void live() {
    for (;;) {
      const uint64_t seen = posted_.load();
      while (help()) {
      }
      if (look(seen)) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_++;
      wake_.wait(lock, [&] { return posted_.load() != seen; });
      sleeping_--;
    }
  }

  bool help() {
    std::shared_ptr<Job> job;
    int64_t seat;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (jobs_.empty()) return false;
      job = jobs_.front();
      seat = job->seated++;
      if (job->seated == int64_t(job->parts.size())) jobs_.erase(jobs_.begin());
    }
    job->work(seat);
    return true;
  }

  // Whether another job came while it was looking. Yields, so that XLA's own threads find a core.
  bool look(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kPatience;
    do {
      for (int i = 0; i < kSpins; i++) {
        if (posted_.load(std::memory_order_relaxed) != seen) return true;
        pause();
      }
      std::this_thread::yield();
    } while (std::chrono::steady_clock::now() < until);
    return false;
  }
};

// Never destroyed: its threads live as long as the process.
Crew& crew() {
  static Crew* only = new Crew;
  return *only;
}

}  // namespace

void run_tasks(int64_t count, int64_t helpers, const std::function<void(int64_t)>& task) {
  crew().run(count, helpers, task);
}
