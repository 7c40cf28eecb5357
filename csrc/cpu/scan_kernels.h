// One scan of a block of kLanes channels, forward and backward. Each scan_<instruction set>.cpp includes this once.
//
// Channels are the vector lanes, so a token is one row of contiguous values on any path and B and C are broadcast
// scalars. The scan goes piece by piece (kCheckpoint tokens): the piece's rows become tiles of Real in the cache, steps
// are computed for the whole tile, then the tokens are walked with the states [N][kLanes] in the first-level cache.
//
// Backward, from the last piece to the first: the states of a piece are recomputed from the saved one and kept with
// their decays for at most kStateBlock states at a time, which bounds the memory for any N; then the tokens are walked
// backwards with the gradient of the state in `carry`.
#pragma once

#include <algorithm>
#include <type_traits>

#include "convert.h"
#include "vector_math.h"

namespace diffmf::cpu::DIFFMF_ISA {
namespace {

constexpr int kStateBlock = 16;
constexpr int64_t kTile = kCheckpoint * kLanes;
constexpr int64_t kRowsAhead = 16;  // fetched while others are added to

// Hands out consecutive parts of the workspace, each a multiple of kLanes and so aligned; also counts them (null base).
template <class Real>
struct Arena {
  Real* base;
  int64_t used = 0;
  Real* take(int64_t count) {
    Real* part = base ? base + used : nullptr;
    used += (count + kLanes - 1) / kLanes * kLanes;
    return part;
  }
};

// The block's parameters with the channels innermost, padded with zeros to kLanes.
template <class Real>
struct Parameters {
  Real *dt_weight, *dt_bias, *d;  // [rank][kLanes], [kLanes], [kLanes]
  Real *a, *scaled, *inverse;     // [states or 1][kLanes]: A, A * kDecayScale, 1 / A
  Real* bound;                    // [kLanes]: the step up to which decay() may be called as Bounded

  Parameters(Arena<Real>& arena, int states, int rank)
      : dt_weight(arena.take(rank * kLanes)),
        dt_bias(arena.take(kLanes)),
        d(arena.take(kLanes)),
        a(arena.take(states * kLanes)),
        scaled(arena.take(states * kLanes)),
        inverse(arena.take(states * kLanes)),
        bound(arena.take(kLanes)) {}

  static void transpose(const void* source, int lanes, int count, Real* target) {
    for (int i = 0; i < count * kLanes; ++i) target[i] = 0;
    if (!source) return;
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < count; ++i) {
        target[i * kLanes + lane] = static_cast<const Real*>(source)[static_cast<int64_t>(lane) * count + i];
      }
    }
  }

  void read(const Scan& scan) {
    const int decays = scan.shared_decay ? 1 : scan.states;
    transpose(scan.dt_weight, scan.lanes, scan.rank, dt_weight);
    transpose(scan.dt_bias, scan.lanes, 1, dt_bias);
    transpose(scan.d, scan.lanes, 1, d);
    transpose(scan.a, scan.lanes, decays, a);
    for (int i = 0; i < decays * kLanes; ++i) {
      scaled[i] = a[i] * kDecayScale<Real>;
      inverse[i] = 1 / a[i];
      const Real step = kDecayBound / std::fabs(scaled[i]);
      Real& smallest = bound[i % kLanes];
      if (i < kLanes || step < smallest || step != step) smallest = step;  // NaN stays: no step is below it
    }
  }
};

// A piece's rows as Real.
template <class Real>
struct Tiles {
  Real *x, *step, *slope;  // [tokens][kLanes]; slope: d step / d raw
  Real *dt, *bc;           // [tokens][rank], [tokens][2 states]
  bool bounded;            // every step is within Parameters::bound

  Tiles(Arena<Real>& arena, int states, int rank)
      : x(arena.take(kTile)),
        step(arena.take(kTile)),
        slope(arena.take(kTile)),
        dt(arena.take(kCheckpoint * rank)),
        bc(arena.take(kCheckpoint * 2 * states)) {}

  template <bool Slope>
  void read(const Scan& scan, const Parameters<Real>& parameters, const Piece& piece) {
    load_tile(scan.x, piece.first, piece.last, scan.lanes, kLanes, x);
    load_tile(scan.bc, piece.first, piece.last, 2 * scan.states, 2 * scan.states, bc);
    if (scan.rank) {
      load_tile(scan.dt, piece.first, piece.last, scan.rank, scan.rank, dt);
    } else {
      load_tile(scan.delta, piece.first, piece.last, scan.lanes, kLanes, step);
    }
    compute_steps<Slope>(scan, parameters, piece.last - piece.first);
  }

  template <bool Slope>
  __attribute__((noinline)) void compute_steps(const Scan& scan, const Parameters<Real>& parameters, int64_t tokens) {
    using Vec = Vector<Real>;
    decltype(Vec{} < Vec{}) out_of_bounds{};
    for (int64_t t = 0; t < tokens; ++t) {
      for (int i = 0; i < kLanes; i += kWidth<Real>) {
        Vec raw = load(parameters.dt_bias + i);
        if (!scan.rank) raw += load(step + t * kLanes + i);
        for (int r = 0; r < scan.rank; ++r) {
          raw += load(parameters.dt_weight + r * kLanes + i) * dt[t * scan.rank + r];
        }
        Vec derivative = broadcast<Real>(1);
        if (scan.softplus) raw = softplus<Slope>(raw, derivative);
        store(step + t * kLanes + i, raw);
        if (Slope) store(slope + t * kLanes + i, derivative);
        const Vec bound = load(parameters.bound + i);
        out_of_bounds |= ~((raw <= bound) & (raw >= -bound));
      }
    }
    bounded = true;
    for (int i = 0; i < kWidth<Real>; ++i) bounded = bounded && out_of_bounds[i] == 0;
  }
};

// What the inner loops know at compile time.
template <bool Zoh, bool Shared, bool Bounded>
struct Variant {
  static constexpr bool kZoh = Zoh, kShared = Shared, kBounded = Bounded;
};

template <bool Zoh, bool Shared, class Real, class Function>
inline void with_bounded(const Tiles<Real>& tiles, Function f) {
  // Double has no faster decay for bounded steps.
  if (std::is_same_v<Real, double> || tiles.bounded) {
    f(Variant<Zoh, Shared, true>());
  } else if constexpr (!std::is_same_v<Real, double>) {
    f(Variant<Zoh, Shared, false>());
  }
}

// Calls f with the Variant for a piece.
template <class Real, class Function>
inline void with_variant(const Scan& scan, const Tiles<Real>& tiles, Function f) {
  if (scan.zoh) {
    scan.shared_decay ? with_bounded<true, true>(tiles, f) : with_bounded<true, false>(tiles, f);
  } else {
    scan.shared_decay ? with_bounded<false, true>(tiles, f) : with_bounded<false, false>(tiles, f);
  }
}

// The rows of the piece that is scanned next.
struct PieceAhead {
  RowsAhead x, bc, step;
  int64_t tokens;
  PieceAhead(const Scan& scan, const Piece& piece)
      : x(scan.x, piece.first, scan.lanes),
        bc(scan.bc, piece.first, 2 * scan.states),
        step(scan.rank ? scan.dt : scan.delta, piece.first, scan.rank ? scan.rank : scan.lanes),
        tokens(piece.last - piece.first) {}
  void next() {
    if (tokens-- <= 0) return;
    x.next();
    bc.next();
    step.next();
  }
};

template <class Real, bool Zoh, bool Shared, bool Bounded>
__attribute__((noinline)) void forward_piece(const Scan& scan, const Parameters<Real>& parameters,
                                             const Tiles<Real>& tiles, PieceAhead ahead, int64_t tokens, Real* state,
                                             Real* y) {
  constexpr int V = kBlockVectors<Real>, W = kWidth<Real>;
  using Vec = Vector<Real>;
  const int states = scan.states;
  const Real *scaled = parameters.scaled, *inverse = parameters.inverse;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t t = scan.reverse ? tokens - 1 - i : i;
    const Real *b = tiles.bc + t * 2 * states, *c = b + states;
    ahead.next();
    Vec x[V], step[V], e[V], input[V], sum[V];
    for (int v = 0; v < V; ++v) {
      x[v] = load(tiles.x + t * kLanes + v * W);
      step[v] = load(tiles.step + t * kLanes + v * W);
      sum[v] = x[v] * load(parameters.d + v * W);
      Vec factor = step[v];
      if (Shared) e[v] = decay<Zoh, Bounded>(step[v], load(scaled + v * W), load(inverse + v * W), factor);
      input[v] = factor * x[v];
    }
    for (int n = 0; n < states; ++n) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = n * kLanes + v * W;
        if (!Shared) {
          Vec factor;
          e[v] = decay<Zoh, Bounded>(step[v], load(scaled + at), load(inverse + at), factor);
          if (Zoh) input[v] = factor * x[v];
        }
        const Vec h = e[v] * load(state + at) + input[v] * b[n];
        store(state + at, h);
        sum[v] += h * c[n];
      }
    }
    for (int v = 0; v < V; ++v) store(y + t * kLanes + v * W, sum[v]);
  }
}

template <class Real>
void save_state(const Scan& scan, const Piece& piece, const Real* state) {
  Real* saved = static_cast<Real*>(scan.saved) + piece.index * scan.states * scan.channels;
  for (int n = 0; n < scan.states; ++n) store_row(state + n * kLanes, scan.lanes, saved + n * scan.channels);
}

template <class Real>
void forward(const Scan& scan, int64_t first, int64_t count, Real* state, Real* y, Real* workspace) {
  const FlushSubnormals flush;
  Arena<Real> arena{workspace};
  Parameters<Real> parameters(arena, scan.states, scan.rank);
  Tiles<Real> tiles(arena, scan.states, scan.rank);
  parameters.read(scan);
  for (int64_t i = 0; i < count; ++i, y += kTile) {
    const Piece piece = scan_piece(scan.tokens, scan.pieces, scan.reverse, first + i);
    if (scan.saved) save_state(scan, piece, state);
    tiles.template read<false>(scan, parameters, piece);
    const int64_t later = std::min(first + i + 1, scan.pieces - 1);  // after the last, that one again
    const PieceAhead ahead(scan, scan_piece(scan.tokens, scan.pieces, scan.reverse, later));
    with_variant(scan, tiles, [&](auto variant) {
      using V = decltype(variant);
      forward_piece<Real, V::kZoh, V::kShared, V::kBounded>(scan, parameters, tiles, ahead, piece.last - piece.first,
                                                            state, y);
    });
  }
}

template <class Real>
int64_t forward_workspace(int states, int rank) {
  Arena<Real> arena{nullptr};
  Parameters<Real>(arena, states, rank);
  Tiles<Real>(arena, states, rank);
  return arena.used;
}

// What the backward pass keeps of a piece.
template <class Real>
struct History {
  Real* h;         // [1 + tokens][kStateBlock][kLanes], states before the first token and after each, in scan order
  Real *e, *bbar;  // [tokens][kStateBlock or 1][kLanes], in scan order
  Real* dy;        // [tokens][kLanes]
  Real* dinput;    // [tokens][kLanes] sum_n dh_n B_n, and times bbar_n when it differs between the states
  Real*
      dstep;   // [tokens][kLanes] gradient of the step through exp(step A_n) and bbar_n; with a shared decay, of step A
  Real* sums;  // [decays + rank + 2][kLanes] the piece's part of the gradients of the parameters
  Real *db, *dc;  // [kStateBlock][kWidth] rows to be summed over their lanes
  Real* mask;     // [kLanes] all bits set for the block's channels, none for the padding

  History(Arena<Real>& arena, int states, int rank)
      : h(arena.take((kCheckpoint + 1) * kStateBlock * kLanes)),
        e(arena.take(kCheckpoint * kStateBlock * kLanes)),
        bbar(arena.take(kCheckpoint * kStateBlock * kLanes)),
        dy(arena.take(kTile)),
        dinput(arena.take(kTile)),
        dstep(arena.take(kTile)),
        sums(arena.take((states + rank + 2) * kLanes)),
        db(arena.take(kStateBlock * kWidth<Real>)),
        dc(arena.take(kStateBlock * kWidth<Real>)),
        mask(arena.take(kLanes)) {}

  void clear(int lanes) {
    std::memset(db, 0, kStateBlock * kWidth<Real> * sizeof(Real));
    std::memset(dc, 0, kStateBlock * kWidth<Real> * sizeof(Real));
    std::memset(mask, 0, kLanes * sizeof(Real));
    std::memset(mask, 0xff, lanes * sizeof(Real));
  }
};

template <class Real>
struct Backward {
  const Scan& scan;
  const ScanGradients<Real>& gradients;
  Parameters<Real> parameters;
  Tiles<Real> tiles;
  History<Real> history;
  // The piece being worked on.
  int64_t tokens;
  Real* dproj;

  Backward(const Scan& scan_, const ScanGradients<Real>& gradients_, Arena<Real> arena)
      : scan(scan_),
        gradients(gradients_),
        parameters(arena, scan_.states, scan_.rank),
        tiles(arena, scan_.states, scan_.rank),
        history(arena, scan_.states, scan_.rank) {
    parameters.read(scan);
    history.clear(scan.lanes);
  }

  // The row in the tiles of the i-th token in scan order.
  int64_t row(int64_t i) const { return scan.reverse ? tokens - 1 - i : i; }
  int64_t width() const { return scan.rank + 2 * scan.states; }
  int decays() const { return scan.shared_decay ? 1 : scan.states; }

  template <bool Zoh, bool Shared, bool Bounded>
  void rebuild(int first_state, int count, const Real* saved);
  template <bool Zoh, bool Shared>
  void sweep(int first_state, int count);
  template <bool Zoh, bool Shared>
  void finish(Real* dx, Real* ddelta);
  void piece(int64_t scan_index, int64_t slot);
};

// Sums `count` (at most kStateBlock) rows over their lanes.
template <class Real>
inline void sum_lanes(const Real* rows, int count, Real* sums) {
  constexpr int W = kWidth<Real>;
  for (int i = 0; i < count; i += W) {
    Real group[W];
    row_sums(rows + i * W, group);
    for (int j = 0; j < W && i + j < count; ++j) sums[i + j] = group[j];
  }
}

// The states after every token of the piece, and the decays that led there.
template <class Real>
template <bool Zoh, bool Shared, bool Bounded>
__attribute__((noinline)) void Backward<Real>::rebuild(int first_state, int count, const Real* saved) {
  constexpr int V = kBlockVectors<Real>, W = kWidth<Real>;
  using Vec = Vector<Real>;
  const Real* scaled = parameters.scaled + (Shared ? 0 : first_state * kLanes);
  const Real* inverse = parameters.inverse + (Shared ? 0 : first_state * kLanes);
  for (int n = 0; n < count; ++n) {
    for (int lane = 0; lane < kLanes; ++lane) {
      history.h[n * kLanes + lane] = lane < scan.lanes ? saved[(first_state + n) * scan.channels + lane] : 0;
    }
  }
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t t = row(i);
    const Real* b = tiles.bc + t * 2 * scan.states + first_state;
    const Real* before = history.h + i * kStateBlock * kLanes;
    Real* after = history.h + (i + 1) * kStateBlock * kLanes;
    Real* e_row = history.e + i * (Shared ? 1 : kStateBlock) * kLanes;
    Real* bbar_row = history.bbar + i * (Shared ? 1 : kStateBlock) * kLanes;
    Vec x[V], step[V], e[V], input[V];
    for (int v = 0; v < V; ++v) {
      x[v] = load(tiles.x + t * kLanes + v * W);
      step[v] = load(tiles.step + t * kLanes + v * W);
      Vec factor = step[v];
      if (Shared) {
        e[v] = decay<Zoh, Bounded>(step[v], load(scaled + v * W), load(inverse + v * W), factor);
        store(e_row + v * W, e[v]);
        if (Zoh) store(bbar_row + v * W, factor);
      }
      input[v] = factor * x[v];
    }
    for (int n = 0; n < count; ++n) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = n * kLanes + v * W;
        if (!Shared) {
          Vec factor;
          e[v] = decay<Zoh, Bounded>(step[v], load(scaled + at), load(inverse + at), factor);
          store(e_row + at, e[v]);
          if (Zoh) {
            store(bbar_row + at, factor);
            input[v] = factor * x[v];
          }
        }
        store(after + at, e[v] * load(before + at) + input[v] * b[n]);
      }
    }
  }
}

// Walks the piece's tokens backwards. dh is the gradient of a token's state; carry becomes that of the state before.
template <class Real>
template <bool Zoh, bool Shared>
__attribute__((noinline)) void Backward<Real>::sweep(int first_state, int count) {
  constexpr int V = kBlockVectors<Real>, W = kWidth<Real>;
  using Vec = Vector<Real>;
  const int states = scan.states;
  Real* carry = gradients.carry + first_state * kLanes;
  const Real *a = parameters.a + first_state * kLanes, *inverse = parameters.inverse + first_state * kLanes;
  Real* da = history.sums + first_state * kLanes;
  Real *db_rows = history.db, *dc_rows = history.dc;
  Vec mask[V];
  for (int v = 0; v < V; ++v) mask[v] = load(history.mask + v * W);
  for (int64_t i = tokens - 1; i >= 0; --i) {
    const int64_t t = row(i);
    const Real *b = tiles.bc + t * 2 * states + first_state, *c = b + states;
    const Real* before = history.h + i * kStateBlock * kLanes;
    const Real* after = before + kStateBlock * kLanes;
    const Real* e_row = history.e + i * (Shared ? 1 : kStateBlock) * kLanes;
    const Real* bbar_row = history.bbar + i * (Shared ? 1 : kStateBlock) * kLanes;
    Vec x[V], step[V], input[V], dy[V], dinput[V], dstep[V], e[V];
    for (int v = 0; v < V; ++v) {
      const int64_t at = t * kLanes + v * W;
      x[v] = load(tiles.x + at);
      step[v] = load(tiles.step + at);
      dy[v] = load(history.dy + at);
      dinput[v] = load(history.dinput + at);
      dstep[v] = load(history.dstep + at);
      if (Shared) e[v] = load(e_row + v * W);
      input[v] = (Zoh && Shared ? load(bbar_row + v * W) : step[v]) * x[v];
    }
    for (int n = 0; n < count; ++n) {
      Vec db{}, dc{};
      for (int v = 0; v < V; ++v) {
        const int64_t at = n * kLanes + v * W;
        Vec bbar{};
        if (!Shared) e[v] = load(e_row + at);
        if (Zoh && !Shared) {
          bbar = load(bbar_row + at);
          input[v] = bbar * x[v];
        }
        const Vec dh = load(carry + at) + dy[v] * c[n];
        dc += keep(load(after + at) * dy[v], mask[v]);
        db += keep(dh * input[v], mask[v]);
        const Vec through = dh * e[v];
        store(carry + at, through);
        const Vec dexponent = through * load(before + at);
        if (Shared) {
          dinput[v] += dh * b[n];
          dstep[v] += dexponent;
        } else if (Zoh) {
          const Vec dbbar = dh * b[n] * x[v];
          dinput[v] += dh * b[n] * bbar;
          dstep[v] += dexponent * load(a + at) + dbbar * e[v];
          store(da + at, load(da + at) + dexponent * step[v] +
                             dbbar * bbar_slope(step[v], load(a + at), load(inverse + at), e[v], bbar));
        } else {
          dinput[v] += dh * b[n];
          dstep[v] += dexponent * load(a + at);
          store(da + at, load(da + at) + dexponent * step[v]);
        }
      }
      store(db_rows + n * W, db);
      store(dc_rows + n * W, dc);
    }
    for (int v = 0; v < V; ++v) {
      store(history.dinput + t * kLanes + v * W, dinput[v]);
      store(history.dstep + t * kLanes + v * W, dstep[v]);
    }
    Real* drow = dproj + t * width() + scan.rank + first_state;
    sum_lanes(db_rows, count, drow);
    sum_lanes(dc_rows, count, drow + states);
  }
}

// With the sums over the states complete: dx, the gradient of the raw step, and what that is spread over.
template <class Real>
template <bool Zoh, bool Shared>
__attribute__((noinline)) void Backward<Real>::finish(Real* dx, Real* ddelta) {
  constexpr int V = kBlockVectors<Real>, W = kWidth<Real>;
  using Vec = Vector<Real>;
  Real *da = history.sums, *ddt_weight = da + decays() * kLanes;
  Real *ddt_bias = ddt_weight + scan.rank * kLanes, *dd = ddt_bias + kLanes;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t t = row(i);
    Vec draw[V];
    for (int v = 0; v < V; ++v) {
      const int64_t lane = v * W, at = t * kLanes + lane;
      const Vec x = load(tiles.x + at), step = load(tiles.step + at), dy = load(history.dy + at);
      const Vec dinput = load(history.dinput + at);
      Vec dstep = load(history.dstep + at), factor = step;
      if (Shared) {
        const Vec a = load(parameters.a + lane), e = load(history.e + i * kLanes + lane), dexponent = dstep;
        Vec da_token = dexponent * step;
        dstep = dexponent * a + dinput * x * (Zoh ? e : broadcast<Real>(1));
        if (Zoh) {
          factor = load(history.bbar + i * kLanes + lane);
          da_token += dinput * x * bbar_slope(step, a, load(parameters.inverse + lane), e, factor);
        }
        store(da + lane, load(da + lane) + da_token);
      } else if (!Zoh) {
        dstep += dinput * x;
      }
      const Vec dx_input = Zoh && !Shared ? dinput : dinput * factor;
      store(dx + at, dx_input + load(parameters.d + lane) * dy);
      store(dd + lane, load(dd + lane) + dy * x);
      draw[v] = dstep * load(tiles.slope + at);
      store(ddt_bias + lane, load(ddt_bias + lane) + draw[v]);
      if (ddelta) store(ddelta + at, draw[v]);
    }
    for (int first = 0; first < scan.rank; first += kStateBlock) {
      const int count = scan.rank - first < kStateBlock ? scan.rank - first : kStateBlock;
      for (int r = 0; r < count; ++r) {
        const Real low_rank = tiles.dt[t * scan.rank + first + r];
        Vec sum{};
        for (int v = 0; v < V; ++v) {
          const int64_t at = (first + r) * kLanes + v * W;
          store(ddt_weight + at, load(ddt_weight + at) + draw[v] * low_rank);
          sum += keep(draw[v] * load(parameters.dt_weight + at), load(history.mask + v * W));
        }
        store(history.db + r * W, sum);
      }
      sum_lanes(history.db, count, dproj + t * width() + first);
    }
  }
}

template <class Real>
void Backward<Real>::piece(int64_t scan_index, int64_t slot) {
  const Piece piece = scan_piece(scan.tokens, scan.pieces, scan.reverse, scan_index);
  const Real* saved = static_cast<const Real*>(scan.saved) + piece.index * scan.states * scan.channels;
  tokens = piece.last - piece.first;
  dproj = gradients.dproj + slot * width();
  tiles.template read<true>(scan, parameters, piece);
  load_tile(gradients.dy, piece.first, piece.last, scan.lanes, kLanes, history.dy);
  const int sums = (decays() + scan.rank + 2) * kLanes;
  std::memset(history.dinput, 0, kTile * sizeof(Real));
  std::memset(history.dstep, 0, kTile * sizeof(Real));
  std::memset(history.sums, 0, sums * sizeof(Real));
  with_variant(scan, tiles, [&](auto variant) {
    using V = decltype(variant);
    for (int n = 0; n < scan.states; n += kStateBlock) {
      const int count = scan.states - n < kStateBlock ? scan.states - n : kStateBlock;
      rebuild<V::kZoh, V::kShared, V::kBounded>(n, count, saved);
      sweep<V::kZoh, V::kShared>(n, count);
    }
    finish<V::kZoh, V::kShared>(gradients.dx + slot * kLanes,
                                gradients.ddelta ? gradients.ddelta + slot * kLanes : nullptr);
  });
  // Long sums in double: a million tokens in float would cost digits.
  for (int i = 0; i < sums; ++i) gradients.parameters[i] += history.sums[i];
}

template <class Real>
void backward(const Scan& scan, const ScanGradients<Real>& gradients, int64_t first, int64_t count, Real* workspace) {
  const FlushSubnormals flush;
  Backward<Real> pass(scan, gradients, Arena<Real>{workspace});
  for (int64_t i = count - 1; i >= 0; --i) pass.piece(first + i, i * kCheckpoint);
}

template <class Real>
int64_t backward_workspace(int states, int rank) {
  Arena<Real> arena{nullptr};
  Parameters<Real>(arena, states, rank);
  Tiles<Real>(arena, states, rank);
  History<Real>(arena, states, rank);
  return arena.used;
}

template <class Real>
void add(const Rows& rows, int64_t first, int64_t last, const Real* slots, int64_t stride, int64_t width) {
  const auto add_row = [&](int64_t i, Real* row, int64_t count) {
    const Real* __restrict slot = slots + i * stride;
    Real* __restrict sum = row;
    for (int64_t j = 0; j < count; ++j) sum[j] += slot[j];
  };
  if (width != kLanes) return for_rows<Real>(rows, first, last, [&](int64_t i, Real* row) { add_row(i, row, width); });
  RowsAhead ahead(rows, first, width);
  for (int64_t i = std::min(kRowsAhead, last - first); i > 0; --i) ahead.next();
  for_rows<Real>(rows, first, last, [&](int64_t i, Real* row) {
    if (first + i + kRowsAhead < last) ahead.next();
    add_row(i, row, kLanes);
  });
}

template <class Real>
void store_sum(const Rows& rows, int64_t first, int64_t last, const Real* const* slots, int count, int64_t stride,
               int64_t width) {
  constexpr int64_t kChunk = 64;
  with_element(rows.dtype, Real(), [&](auto* element) {
    using Element = std::remove_pointer_t<decltype(element)>;
    for_rows<Element>(rows, first, last, [&](int64_t i, Element* row) {
      for (int64_t start = 0; start < width; start += kChunk) {
        const int64_t length = width - start < kChunk ? width - start : kChunk;
        Real sum[kChunk];
        for (int64_t j = 0; j < length; ++j) sum[j] = count ? slots[0][i * stride + start + j] : 0;
        for (int k = 1; k < count; ++k) {
          const Real* slot = slots[k] + i * stride + start;
          for (int64_t j = 0; j < length; ++j) sum[j] += slot[j];
        }
        store_row(sum, length, row + start);
      }
    });
  });
}

template <class Real>
constexpr Kernels<Real> kKernels = {
    forward_workspace<Real>, backward_workspace<Real>, forward<Real>, backward<Real>, add<Real>, store_sum<Real>};

}  // namespace

const Kernels<float> kernels_f32 = kKernels<float>;
const Kernels<double> kernels_f64 = kKernels<double>;

}  // namespace diffmf::cpu::DIFFMF_ISA
