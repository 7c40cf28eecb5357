// Uninitialized memory on a 64-byte boundary.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace diffmf::cpu {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;
template <class T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))));
}

// A piece for each thread.
class Scratch {
 public:
  Scratch(int threads, int64_t bytes) : stride_((bytes + 63) / 64 * 64), data_(allocate<char>(threads * stride_)) {}
  void* of(int thread) const { return data_.get() + thread * stride_; }

 private:
  int64_t stride_;
  Buffer<char> data_;
};

}  // namespace diffmf::cpu
