#include "team.h"

#include <algorithm>
#include <system_error>
#include <utility>

namespace diffmf::cpu {

Team::Team(int threads) {
  workers_.reserve(std::max(threads - 1, 0));
  try {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) {  // a limit on threads; fewer give the same bits
  }
}

Team::~Team() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Team::take_indices(int thread) {
  try {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*body_)(i, thread);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    next_ = count_;
  }
}

void Team::work(int thread) {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
    if (stopping_) return;
    seen = round_;
    lock.unlock();
    take_indices(thread);
    lock.lock();
    if (--busy_ == 0) done_.notify_one();
  }
}

void Team::for_each(int64_t count, const std::function<void(int64_t, int)>& body) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    body_ = &body;
    count_ = count;
    next_ = 0;
    busy_ = size() - 1;
    ++round_;
  }
  wake_.notify_all();
  take_indices(0);
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return busy_ == 0; });
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace diffmf::cpu
