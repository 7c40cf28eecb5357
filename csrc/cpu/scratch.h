// A piece of uninitialized memory per thread, each on a 64-byte boundary.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace diffmf::cpu {

class Scratch {
 public:
  Scratch(int threads, int64_t bytes)
      : stride_((bytes + 63) / 64 * 64),
        data_(static_cast<char*>(::operator new(threads * stride_, std::align_val_t(64)))) {}
  void* of(int thread) const { return data_.get() + thread * stride_; }

 private:
  struct Delete {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  int64_t stride_;
  std::unique_ptr<char, Delete> data_;
};

}  // namespace diffmf::cpu
