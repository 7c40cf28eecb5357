// ss2d on the CPU: which scans run when, and in which order their results are added up.
//
// A scan is one (modality, batch item, path, block of kLanes channels); all scans of a few batch items (a wave) advance
// together, segment by segment of the sequence. After each segment the results that several scans share are merged:
// y and dx over the paths, dproj over the channel blocks (and the modalities that read it). So every sum has an order
// fixed by the problem alone, whatever the number of threads, and the memory is a segment per scan, not K L D. With
// several paths, and a dtype narrower than float, y and dx of the wave's items are summed in a float copy.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "scan.h"
#include "scratch.h"
#include "team.h"

namespace diffmf::cpu {
namespace {

template <class Real>
const Kernels<Real>& kernels();

template <>
const Kernels<float>& kernels<float>() {
  DIFFMF_SELECT(kernels_f32)
}
template <>
const Kernels<double>& kernels<double>() {
  DIFFMF_SELECT(kernels_f64)
}

// One scan: its coordinates, and its place among the scans of a wave.
struct ScanId {
  int64_t m, b;
  int k;
  int64_t block, index;
};

// Shapes and schedule shared by both directions.
template <class Real>
struct Plan {
  static constexpr int64_t kMaxSegmentPieces = 64, kMinSegmentPieces = 16, kSegmentElements = 1 << 18;

  const SS2DProblem& problem;
  const Kernels<Real>& kernels;
  int64_t tokens, pieces, blocks, item_scans;
  int64_t segment_pieces, segments;
  int threads;
  int64_t wave_items, wave_scans;

  // slot_width: elements of Real that a scan leaves behind for each token of a segment.
  Plan(const SS2DProblem& p, int64_t slot_width, int requested_threads)
      : problem(p), kernels(cpu::kernels<Real>()), tokens(p.tokens()), pieces(p.pieces(kCheckpoint)) {
    blocks = (p.channels + kLanes - 1) / kLanes;
    item_scans = p.modalities * p.paths * blocks;
    // About 16 segments, within a megabyte or so of slots per scan.
    segment_pieces = std::clamp(pieces / 16, kMinSegmentPieces, kMaxSegmentPieces);
    segment_pieces = std::min(segment_pieces, std::max<int64_t>(kSegmentElements / (kCheckpoint * slot_width), 1));
    segment_pieces = std::min(segment_pieces, pieces);
    segments = (pieces + segment_pieces - 1) / segment_pieces;
    // Starting a thread costs as much as about 2e5 steps of a state.
    const int64_t work = item_scans * p.batch * tokens * kLanes * p.states;
    const int64_t useful = std::min(item_scans * p.batch, 1 + work / 200000);
    threads = static_cast<int>(std::clamp<int64_t>(requested_threads, 1, useful));
    // Several scans a thread even out the load.
    wave_items = std::clamp<int64_t>((4 * threads + item_scans - 1) / item_scans, 1, p.batch);
    wave_scans = wave_items * item_scans;
  }

  int64_t slots() const { return segment_pieces * kCheckpoint; }
  int64_t segment_first(int64_t segment) const { return segment * segment_pieces; }
  int64_t segment_count(int64_t segment) const { return std::min(segment_pieces, pieces - segment * segment_pieces); }
  int lanes(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kLanes, problem.channels - block * kLanes));
  }
  bool column_major(int k) const { return problem.path[k] % 2 == 1; }
  bool reverse(int k) const { return problem.path[k] >= 2; }

  int64_t scan_index(int64_t item, int64_t m, int k, int64_t block) const {
    return ((item * problem.modalities + m) * problem.paths + k) * blocks + block;
  }
  ScanId scan_id(int64_t first_item, int64_t index) const {
    int64_t rest = index;
    ScanId id;
    id.index = index;
    id.block = rest % blocks;
    rest /= blocks;
    id.k = static_cast<int>(rest % problem.paths);
    rest /= problem.paths;
    id.m = rest % problem.modalities;
    id.b = first_item + rest / problem.modalities;
    return id;
  }

  Strides contiguous(int64_t channels, bool path_axis) const {
    const int64_t pixel = channels * (path_axis ? problem.paths : 1);
    return {problem.batch * tokens * pixel, tokens * pixel, problem.width * pixel, pixel, path_axis ? channels : 0};
  }

  // The rows of path k's axis in a tensor, from its channel `channel` on.
  Rows rows(DType dtype, const void* tensor, const Strides& s, int64_t m, int64_t b, int k, int64_t channel) const {
    const int64_t offset = m * s.modality + b * s.batch + k * s.path + channel;
    Rows rows;
    rows.dtype = dtype;
    rows.base = const_cast<char*>(static_cast<const char*>(tensor)) + offset * element_size(dtype);
    rows.line = column_major(k) ? problem.height : problem.width;
    rows.line_stride = column_major(k) ? s.column : s.row;
    rows.token_stride = column_major(k) ? s.row : s.column;
    return rows;
  }

  Scan scan(const SS2DInputs& in, const void* saved, const ScanId& id) const {
    const int64_t channel = id.block * kLanes;
    // This block's first entry in the parameters [M, K, D, count].
    const auto parameter = [&](const void* tensor, int64_t count) -> const void* {
      if (!tensor) return nullptr;
      return static_cast<const Real*>(tensor) + ((id.m * problem.paths + id.k) * problem.channels + channel) * count;
    };
    Scan scan{};
    scan.tokens = tokens;
    scan.pieces = pieces;
    scan.reverse = reverse(id.k);
    scan.states = static_cast<int>(problem.states);
    scan.rank = static_cast<int>(problem.rank);
    scan.lanes = lanes(id.block);
    scan.zoh = problem.discretization == Discretization::zoh;
    scan.shared_decay = problem.shared_decay;
    scan.softplus = problem.softplus;
    scan.x = rows(problem.dtype, in.x, in.x_strides, id.m, id.b, id.k, channel);
    scan.dt = rows(problem.dtype, in.proj, in.proj_strides, id.m, id.b, id.k, 0);
    scan.bc = rows(problem.dtype, in.proj, in.proj_strides, problem.source(id.m), id.b, id.k, problem.rank);
    if (problem.rank == 0) scan.delta = rows(problem.dtype, in.delta, in.delta_strides, id.m, id.b, id.k, channel);
    scan.dt_weight = parameter(in.dt_weight, problem.rank);
    scan.dt_bias = parameter(in.dt_bias, 1);
    scan.a = parameter(in.a, problem.decays());
    scan.d = parameter(in.d, 1);
    scan.channels = problem.channels;
    if (saved) {
      const int64_t piece_rows = ((id.m * problem.batch + id.b) * problem.paths + id.k) * pieces * problem.states;
      scan.saved = const_cast<Real*>(static_cast<const Real*>(saved)) + piece_rows * problem.channels + channel;
    }
    return scan;
  }

  // f(piece, offset of its first slot) for every piece of a segment of path k.
  template <class Function>
  void for_pieces(int k, int64_t segment, Function f) const {
    for (int64_t i = 0; i < segment_count(segment); ++i) {
      f(scan_piece(tokens, pieces, reverse(k), segment_first(segment) + i), i * kCheckpoint);
    }
  }

  // Rows of dtype = the slots [slots][width] of a segment of path k.
  void store_segment(const Rows& rows, int k, int64_t segment, const Real* slots, int64_t width, int64_t count) const {
    for_pieces(k, segment, [&](const Piece& piece, int64_t slot) {
      const Real* source = slots + slot * width;
      kernels.store_sum(rows, piece.first, piece.last, &source, 1, width, count);
    });
  }
};

// Sums over the paths an image [M, B, H, W, D] of which every scan of a wave leaves its share, segment by segment.
template <class Real>
class PathSum {
 public:
  PathSum(const Plan<Real>& plan, void* image) : plan_(plan), image_(image) {
    const SS2DProblem& p = plan.problem;
    if (element_size(p.dtype) < static_cast<int64_t>(sizeof(Real))) {
      copy_ = allocate<Real>(plan.wave_items * p.modalities * plan.tokens * p.channels);
    }
    // Enough bands of rows for every thread to have something to add.
    const int64_t units = plan.wave_items * p.modalities * plan.blocks;
    bands_ = std::clamp<int64_t>((2 * plan.threads + units - 1) / units, 1, p.height);
  }

  void begin(Team& team, int64_t first_item, int64_t items) {
    first_item_ = first_item;
    const SS2DProblem& p = plan_.problem;
    const int64_t bytes = plan_.tokens * p.channels * sizeof(Real);
    team.for_each(items * p.modalities,
                  [&](int64_t i, int) { std::memset(sum_image(i / p.modalities, i % p.modalities), 0, bytes); });
  }

  int64_t units(int64_t items) const { return items * plan_.problem.modalities * plan_.blocks * bands_; }

  // Adds one band of one block of channels, path after path; slots [scans of the wave][slots][kLanes].
  void add(int64_t unit, int64_t segment, const Real* slots) const {
    const SS2DProblem& p = plan_.problem;
    const int64_t band = unit % bands_, block = unit / bands_ % plan_.blocks;
    const int64_t m = unit / bands_ / plan_.blocks % p.modalities, item = unit / bands_ / plan_.blocks / p.modalities;
    const int64_t top = p.height * band / bands_, bottom = p.height * (band + 1) / bands_;
    Real* image = sum_image(item, m) + block * kLanes;
    const DType dtype = sizeof(Real) == 8 ? DType::f64 : DType::f32;
    for (int k = 0; k < p.paths; ++k) {
      const Rows rows = plan_.rows(dtype, image, plan_.contiguous(p.channels, false), 0, 0, k, 0);
      const Real* scan_slots = slots + plan_.scan_index(item, m, k, block) * plan_.slots() * kLanes;
      const auto add_tokens = [&](const Piece& piece, int64_t slot, int64_t first, int64_t last) {
        first = std::max(first, piece.first);
        last = std::min(last, piece.last);
        if (first >= last) return;
        plan_.kernels.add(rows, first, last, scan_slots + (slot + first - piece.first) * kLanes, kLanes,
                          plan_.lanes(block));
      };
      plan_.for_pieces(k, segment, [&](const Piece& piece, int64_t slot) {
        if (!plan_.column_major(k)) return add_tokens(piece, slot, top * p.width, bottom * p.width);
        for (int64_t column = piece.first / p.height; column * p.height < piece.last; ++column) {
          add_tokens(piece, slot, column * p.height + top, column * p.height + bottom);
        }
      });
    }
  }

  void end(Team& team, int64_t items) const {
    if (!copy_) return;
    constexpr int64_t kChunk = 1024;
    const SS2DProblem& p = plan_.problem;
    const int64_t chunks = (plan_.tokens + kChunk - 1) / kChunk;
    team.for_each(items * p.modalities * chunks, [&](int64_t i, int) {
      const int64_t item = i / chunks / p.modalities, m = i / chunks % p.modalities;
      const int64_t first = i % chunks * kChunk, last = std::min(first + kChunk, plan_.tokens);
      const Real* source = sum_image(item, m) + first * p.channels;
      Rows rows;
      rows.dtype = p.dtype;
      rows.base = static_cast<char*>(image_) + image_offset(item, m) * element_size(p.dtype);
      rows.line = plan_.tokens;
      rows.line_stride = 0;
      rows.token_stride = p.channels;
      plan_.kernels.store_sum(rows, first, last, &source, 1, p.channels, p.channels);
    });
  }

 private:
  int64_t image_offset(int64_t item, int64_t m) const {
    const SS2DProblem& p = plan_.problem;
    return (m * p.batch + first_item_ + item) * plan_.tokens * p.channels;
  }
  Real* sum_image(int64_t item, int64_t m) const {
    const SS2DProblem& p = plan_.problem;
    if (copy_) return copy_.get() + (item * p.modalities + m) * plan_.tokens * p.channels;
    return static_cast<Real*>(image_) + image_offset(item, m);
  }

  const Plan<Real>& plan_;
  void* image_;
  Buffer<Real> copy_;
  int64_t bands_, first_item_ = 0;
};

template <class Real>
void forward(const SS2DProblem& p, const SS2DInputs& in, const SS2DOutputs& out, int threads) {
  const Plan<Real> plan(p, kLanes, threads);
  const int64_t state_size = p.states * kLanes, slot_size = plan.slots() * kLanes;
  const int64_t workspace_size = plan.kernels.forward_workspace(static_cast<int>(p.states), static_cast<int>(p.rank));
  const Buffer<Real> state = allocate<Real>(plan.wave_scans * state_size);
  const Buffer<Real> slots = allocate<Real>(plan.wave_scans * slot_size);
  const Buffer<Real> workspace = allocate<Real>(plan.threads * workspace_size);
  std::unique_ptr<PathSum<Real>> y;
  if (p.paths > 1) y = std::make_unique<PathSum<Real>>(plan, out.y);
  Team team(plan.threads);

  for (int64_t first_item = 0; first_item < p.batch; first_item += plan.wave_items) {
    const int64_t items = std::min(plan.wave_items, p.batch - first_item), scans = items * plan.item_scans;
    std::memset(state.get(), 0, scans * state_size * sizeof(Real));
    if (y) y->begin(team, first_item, items);
    for (int64_t segment = 0; segment < plan.segments; ++segment) {
      team.for_each(scans, [&](int64_t i, int thread) {
        const ScanId id = plan.scan_id(first_item, i);
        Real* scan_slots = slots.get() + i * slot_size;
        plan.kernels.forward(plan.scan(in, out.states, id), plan.segment_first(segment), plan.segment_count(segment),
                             state.get() + i * state_size, scan_slots, workspace.get() + thread * workspace_size);
        if (y) return;
        const Rows rows =
            plan.rows(p.dtype, out.y, plan.contiguous(p.channels, false), id.m, id.b, 0, id.block * kLanes);
        plan.store_segment(rows, 0, segment, scan_slots, kLanes, plan.lanes(id.block));
      });
      if (y) team.for_each(y->units(items), [&](int64_t unit, int) { y->add(unit, segment, slots.get()); });
    }
    if (y) y->end(team, items);
    if (!out.last_state) continue;
    for (int64_t i = 0; i < scans; ++i) {
      const ScanId id = plan.scan_id(first_item, i);
      Real* last = static_cast<Real*>(out.last_state) +
                   ((id.m * p.batch + id.b) * p.paths + id.k) * p.states * p.channels + id.block * kLanes;
      for (int64_t n = 0; n < p.states; ++n) {
        std::copy_n(state.get() + i * state_size + n * kLanes, plan.lanes(id.block), last + n * p.channels);
      }
    }
  }
}

// dproj of one piece of one (item, modality, path): the sum over the channel blocks, and for B and C over the
// modalities that read them.
template <class Real>
void store_dproj(const Plan<Real>& plan, const SS2DGradients& gradients, const Real* slots, int64_t first_item,
                 int64_t segment, int64_t unit) {
  const SS2DProblem& p = plan.problem;
  const int64_t width = p.rank + 2 * p.states, count = plan.segment_count(segment);
  const int64_t i = unit % count;
  const int k = static_cast<int>(unit / count % p.paths);
  const int64_t m = unit / count / p.paths % p.modalities, item = unit / count / p.paths / p.modalities;
  const Piece piece = scan_piece(plan.tokens, plan.pieces, plan.reverse(k), plan.segment_first(segment) + i);
  std::vector<const Real*> shares;
  const auto store = [&](int64_t channel, int64_t channels) {
    const Rows rows =
        plan.rows(p.dtype, gradients.dproj, plan.contiguous(width, true), m, first_item + item, k, channel);
    plan.kernels.store_sum(rows, piece.first, piece.last, shares.data(), static_cast<int>(shares.size()), width,
                           channels);
  };
  const auto share = [&](int64_t reader, int64_t block, int64_t channel) {
    const int64_t scan = plan.scan_index(item, reader, k, block);
    shares.push_back(slots + (scan * plan.slots() + i * kCheckpoint) * width + channel);
  };
  for (int64_t block = 0; block < plan.blocks; ++block) share(m, block, 0);
  store(0, p.rank);
  shares.clear();
  for (int64_t reader = 0; reader < p.modalities; ++reader) {
    if (p.source(reader) != m) continue;
    for (int64_t block = 0; block < plan.blocks; ++block) share(reader, block, p.rank);
  }
  store(p.rank, 2 * p.states);
}

// The sums [parameter_rows][kLanes] of one scan of every batch item to the parameter gradients.
template <class Real>
void store_parameters(const Plan<Real>& plan, const SS2DGradients& gradients, const ScanId& id, const double* sums) {
  const SS2DProblem& p = plan.problem;
  const int64_t channel = (id.m * p.paths + id.k) * p.channels + id.block * kLanes;
  const auto store = [&](void* tensor, int64_t count) {
    if (tensor) {
      Real* target = static_cast<Real*>(tensor) + channel * count;
      for (int lane = 0; lane < plan.lanes(id.block); ++lane) {
        for (int64_t i = 0; i < count; ++i) target[lane * count + i] = static_cast<Real>(sums[i * kLanes + lane]);
      }
    }
    sums += count * kLanes;
  };
  store(gradients.da, p.decays());
  store(gradients.ddt_weight, p.rank);
  store(gradients.ddt_bias, 1);
  store(gradients.dd, 1);
}

template <class Real>
void backward(const SS2DProblem& p, const SS2DInputs& in, const SS2DGradients& out, int threads) {
  const int64_t width = p.rank + 2 * p.states, delta_width = p.rank ? 0 : kLanes;
  const Plan<Real> plan(p, kLanes + delta_width + width, threads);
  const int64_t state_size = p.states * kLanes, parameter_size = parameter_rows(p) * kLanes;
  const int64_t workspace_size = plan.kernels.backward_workspace(static_cast<int>(p.states), static_cast<int>(p.rank));
  const Buffer<Real> carry = allocate<Real>(plan.wave_scans * state_size);
  const Buffer<double> parameters = allocate<double>(plan.wave_scans * parameter_size);
  std::vector<double> parameter_sums(plan.item_scans * parameter_size);  // of all batch items
  const Buffer<Real> dx_slots = allocate<Real>(plan.wave_scans * plan.slots() * kLanes);
  const Buffer<Real> ddelta_slots = allocate<Real>(plan.wave_scans * plan.slots() * delta_width);
  const Buffer<Real> dproj_slots = allocate<Real>(plan.wave_scans * plan.slots() * width);
  const Buffer<Real> workspace = allocate<Real>(plan.threads * workspace_size);
  std::unique_ptr<PathSum<Real>> dx;
  if (!out.x_per_path && p.paths > 1) dx = std::make_unique<PathSum<Real>>(plan, out.dx);
  Team team(plan.threads);

  const auto scan_segment = [&](int64_t first_item, int64_t segment, int64_t i, int thread) {
    const ScanId id = plan.scan_id(first_item, i);
    const int64_t channel = id.block * kLanes;
    ScanGradients<Real> gradients{};
    gradients.dy = plan.rows(p.dtype, out.dy, plan.contiguous(p.channels, false), id.m, id.b, id.k, channel);
    gradients.carry = carry.get() + i * state_size;
    gradients.dx = dx_slots.get() + i * plan.slots() * kLanes;
    gradients.ddelta = p.rank ? nullptr : ddelta_slots.get() + i * plan.slots() * kLanes;
    gradients.dproj = dproj_slots.get() + i * plan.slots() * width;
    gradients.parameters = parameters.get() + i * parameter_size;
    plan.kernels.backward(plan.scan(in, out.states, id), gradients, plan.segment_first(segment),
                          plan.segment_count(segment), workspace.get() + thread * workspace_size);
    const auto store = [&](void* tensor, bool path_axis, const Real* slots) {
      const Rows rows = plan.rows(p.dtype, tensor, plan.contiguous(p.channels, path_axis), id.m, id.b, id.k, channel);
      plan.store_segment(rows, id.k, segment, slots, kLanes, plan.lanes(id.block));
    };
    if (!dx) store(out.dx, out.x_per_path, gradients.dx);
    if (gradients.ddelta) store(out.ddelta, true, gradients.ddelta);
  };

  for (int64_t first_item = 0; first_item < p.batch; first_item += plan.wave_items) {
    const int64_t items = std::min(plan.wave_items, p.batch - first_item), scans = items * plan.item_scans;
    std::memset(carry.get(), 0, scans * state_size * sizeof(Real));
    std::memset(parameters.get(), 0, scans * parameter_size * sizeof(double));
    if (dx) dx->begin(team, first_item, items);
    for (int64_t segment = plan.segments - 1; segment >= 0; --segment) {
      team.for_each(scans, [&](int64_t i, int thread) { scan_segment(first_item, segment, i, thread); });
      const int64_t dx_units = dx ? dx->units(items) : 0;
      const int64_t dproj_units = items * p.modalities * p.paths * plan.segment_count(segment);
      team.for_each(dx_units + dproj_units, [&](int64_t unit, int) {
        if (unit < dx_units) {
          dx->add(unit, segment, dx_slots.get());
        } else {
          store_dproj(plan, out, dproj_slots.get(), first_item, segment, unit - dx_units);
        }
      });
    }
    if (dx) dx->end(team, items);
    for (int64_t i = 0; i < scans * parameter_size; ++i) parameter_sums[i % parameter_sums.size()] += parameters[i];
  }
  for (int64_t i = 0; i < plan.item_scans; ++i) {
    store_parameters(plan, out, plan.scan_id(0, i), parameter_sums.data() + i * parameter_size);
  }
}

}  // namespace

void ss2d_forward(const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DOutputs& outputs, int threads) {
  if (problem.batch == 0) return;
  problem.dtype == DType::f64 ? forward<double>(problem, inputs, outputs, threads)
                              : forward<float>(problem, inputs, outputs, threads);
}

void ss2d_backward(const SS2DProblem& problem, const SS2DInputs& inputs, const SS2DGradients& gradients, int threads) {
  if (problem.batch == 0) return;
  problem.dtype == DType::f64 ? backward<double>(problem, inputs, gradients, threads)
                              : backward<float>(problem, inputs, gradients, threads);
}

}  // namespace diffmf::cpu
