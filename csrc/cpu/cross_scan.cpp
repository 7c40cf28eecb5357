// Images are walked in square tiles, so that the transposed paths touch every cache line once on each side.
#include "diffmf/cross_scan.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#define DIFFMF_ISA baseline
#include "convert.h"
#include "team.h"

namespace diffmf::cpu {
namespace {

using namespace baseline;

constexpr int64_t kSide = 32;
constexpr int64_t kElementsPerThread = 1 << 16;  // fewer are not worth starting a thread

struct Tile {
  int64_t plane, top, bottom, left, right;  // plane = b * channels + c
};

// Where a path meets the pixels: l = start + row * row_step + column * column_step.
struct PathSteps {
  int64_t start, row, column;
};

PathSteps path_steps(const CrossScanProblem& p, int path) {
  const bool column_major = path % 2 == 1, reverse = path >= 2;
  const int64_t sign = reverse ? -1 : 1;
  return {reverse ? p.tokens() - 1 : 0, sign * (column_major ? 1 : p.width), sign * (column_major ? p.height : 1)};
}

template <class Function>
void for_tiles(const CrossScanProblem& p, int threads, Function f) {
  const int64_t down = (p.height + kSide - 1) / kSide, planes = p.batch * p.channels;
  const int64_t elements = planes * p.tokens() * p.paths;
  if (elements == 0) return;
  const int64_t useful = std::min(planes * down, 1 + elements / kElementsPerThread);
  Team team(static_cast<int>(std::clamp<int64_t>(threads, 1, useful)));
  team.for_each(planes * down, [&](int64_t unit, int) {
    const int64_t top = unit % down * kSide;
    for (int64_t left = 0; left < p.width; left += kSide) {
      f(Tile{unit / down, top, std::min(top + kSide, p.height), left, std::min(left + kSide, p.width)});
    }
  });
}

// The sequence of path k that belongs to a plane, in a tensor [B, K, C, H*W].
template <class Element>
Element* sequence(const CrossScanProblem& p, Element* sequences, int64_t plane, int k) {
  return sequences + ((plane / p.channels * p.paths + k) * p.channels + plane % p.channels) * p.tokens();
}

template <class Element>
void scan(const CrossScanProblem& p, const void* image, void* out, int threads) {
  for_tiles(p, threads, [&](const Tile& tile) {
    const Element* plane = static_cast<const Element*>(image) + tile.plane * p.tokens();
    for (int k = 0; k < p.paths; ++k) {
      const PathSteps steps = path_steps(p, p.path[k]);
      Element* target = sequence(p, static_cast<Element*>(out), tile.plane, k) + steps.start;
      // The inner loop follows the path, so that the writes are consecutive.
      if (p.path[k] % 2 == 0) {
        for (int64_t row = tile.top; row < tile.bottom; ++row) {
          for (int64_t column = tile.left; column < tile.right; ++column) {
            target[row * steps.row + column * steps.column] = plane[row * p.width + column];
          }
        }
      } else {
        for (int64_t column = tile.left; column < tile.right; ++column) {
          for (int64_t row = tile.top; row < tile.bottom; ++row) {
            target[row * steps.row + column * steps.column] = plane[row * p.width + column];
          }
        }
      }
    }
  });
}

template <class Real, class Element>
void merge(const CrossScanProblem& p, const void* y, void* out, int threads) {
  for_tiles(p, threads, [&](const Tile& tile) {
    Real sums[kSide][kSide] = {};
    for (int k = 0; k < p.paths; ++k) {
      const PathSteps steps = path_steps(p, p.path[k]);
      const Element* source = sequence(p, static_cast<const Element*>(y), tile.plane, k) + steps.start;
      const auto add = [&](int64_t row, int64_t column) {
        sums[row - tile.top][column - tile.left] += widen(source[row * steps.row + column * steps.column]);
      };
      if (p.path[k] % 2 == 0) {
        for (int64_t row = tile.top; row < tile.bottom; ++row) {
          for (int64_t column = tile.left; column < tile.right; ++column) add(row, column);
        }
      } else {
        for (int64_t column = tile.left; column < tile.right; ++column) {
          for (int64_t row = tile.top; row < tile.bottom; ++row) add(row, column);
        }
      }
    }
    Element* plane = static_cast<Element*>(out) + tile.plane * p.tokens();
    for (int64_t row = tile.top; row < tile.bottom; ++row) {
      store_row(sums[row - tile.top], tile.right - tile.left, plane + row * p.width + tile.left);
    }
  });
}

}  // namespace

void cross_scan(const CrossScanProblem& problem, int64_t element_bytes, const void* image, void* out, int threads) {
  switch (element_bytes) {
    case 1:
      return scan<uint8_t>(problem, image, out, threads);
    case 2:
      return scan<uint16_t>(problem, image, out, threads);
    case 4:
      return scan<uint32_t>(problem, image, out, threads);
    case 8:
      return scan<uint64_t>(problem, image, out, threads);
    default:
      throw std::invalid_argument("cross_scan: element_bytes is " + std::to_string(element_bytes) +
                                  ", expected 1, 2, 4 or 8");
  }
}

void cross_merge(const CrossScanProblem& problem, DType dtype, const void* y, void* out, int threads) {
  switch (dtype) {
    case DType::f32:
      return merge<float, float>(problem, y, out, threads);
    case DType::bf16:
      return merge<float, BFloat16>(problem, y, out, threads);
    case DType::f16:
      return merge<float, Half>(problem, y, out, threads);
    case DType::f64:
      return merge<double, double>(problem, y, out, threads);
  }
  throw std::invalid_argument("cross_merge: unknown dtype " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace diffmf::cpu
