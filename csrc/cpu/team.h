// A few threads that live as long as one operator call and share its loops.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace diffmf::cpu {

class Team {
 public:
  // The calling thread counts as one; has fewer threads where no more can be started.
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // body(index, thread) for every index below count, in any order; returns when all are done. An exception of the body
  // skips the indices not yet begun and is rethrown here.
  void for_each(int64_t count, const std::function<void(int64_t index, int thread)>& body);

 private:
  void work(int thread);
  void take_indices(int thread);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  uint64_t round_ = 0;  // of for_each; the workers wait for the next
  int busy_ = 0;        // workers that have not finished the round
  bool stopping_ = false;
  std::exception_ptr error_;
  const std::function<void(int64_t, int)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
};

}  // namespace diffmf::cpu
