// Attention in one pass over keys and values, with a running maximum (Milakov and Gimelshein,
// Online normalizer calculation for softmax, 2018; Dao et al., FlashAttention, 2022).
//
// The order of sums depends on positions only, never on which queries share a pass over them:
//   score      4 chains over the dimensions i, i + 4, ... of a group, then (0 + 2) + (1 + 3), then
//              group after group
//   weights    of a block of 64 positions, 16 lanes, added up by halving
//   values     one position after another
//   blocks     one after another within a part of 256 positions; parts likewise (merge_attended)

// What a query has added up: its largest score, the sum of weights, the weighted values.
struct AttendState {
  explicit AttendState(float* state)
      : largest(state[0]), sum(state[1]), values(state + kStateHead) {}
  float& largest;
  float& sum;
  float* values;
};

// Positions [from, to) of a block that a query attends to, counted from the block's first.
struct Span {
  int64_t from, to;
  bool empty() const { return from >= to; }
};

// Keys or values of positions from some on: codes with their ranges, or fp16.
struct KvRun {
  KvType type;
  const uint8_t* data;
  const uint16_t* ranges;
  int64_t vector_bytes;

  KvRun(const KvShape& shape, KvType stored, const uint8_t* codes, const uint16_t* first_range,
        const uint8_t* nearest, bool near, int64_t pos)
      : type(near ? KvType::kF16 : stored), vector_bytes(shape.vector_bytes(type)) {
    const bool from_ring = near && kv_scaled(stored);
    data = from_ring ? nearest + pos % kNear * vector_bytes : codes + pos * vector_bytes;
    ranges = kv_scaled(type) ? first_range + pos : nullptr;
  }
};

inline KvRun keys_from(const KvShape& shape, const KvHead& head, int64_t near, int64_t pos) {
  return {shape, shape.keys, head.keys, head.key_ranges, head.near_keys, pos >= near, pos};
}

inline KvRun values_from(const KvShape& shape, const KvHead& head, int64_t near, int64_t pos) {
  return {shape, shape.values, head.values, head.value_ranges, head.near_values, pos >= near, pos};
}

// scores[query][0..16) = products of kQueries queries with the keys of one block of 16 positions,
// whose ranges begin at `ranges`. Scores of a query are kAttendBlock apart.
template <typename S, typename Kv, int kQueries>
inline void score_block(const KvShape& shape, const uint8_t* keys, const uint16_t* ranges,
                        int64_t capacity, const float* q, float* scores) {
  using F = typename S::F;
  const int64_t stride = shape.query_floats();
  for (int64_t lane = 0; lane < kKeyBlock; lane += S::kFloats) {
    F total[kQueries];
    for (F& t : total) t = S::set(0);
    for (int64_t group = 0; group < shape.groups(); ++group) {
      F sums[kQueries][4];
      for (auto& of_query : sums) {
        for (F& sum : of_query) sum = S::set(0);
      }
      const float* at = q + group * kKvGroup;
      for (int64_t i = 0; i < kKvGroup; i += 4) {
        F key[4];
        Kv::template keys<S>(keys, group * kKvGroup + i, lane, key);
        for (int n = 0; n < kQueries; ++n) {
          for (int j = 0; j < 4; ++j) {
            sums[n][j] = S::fma(S::set(at[n * stride + i + j]), key[j], sums[n][j]);
          }
        }
      }
      for (int n = 0; n < kQueries; ++n) {
        const F sum = S::add(S::add(sums[n][0], sums[n][2]), S::add(sums[n][1], sums[n][3]));
        if constexpr (Kv::kScaled) {
          const uint16_t* range = ranges + 2 * group * capacity + lane;
          const F of_low = S::set(q[n * stride + shape.dims() + group]);
          total[n] = S::fma(S::load_half(range), sum, total[n]);
          total[n] = S::fma(S::load_half(range + capacity), of_low, total[n]);
        } else {
          total[n] = S::add(total[n], sum);
        }
      }
    }
    for (int n = 0; n < kQueries; ++n) S::store_f(scores + n * kAttendBlock + lane, total[n]);
  }
}

// values[query] += weights[query][t] * group `group` of value t, t in [from, to). `values` begin at
// the block; rows of weights are kAttendBlock apart, those of sums `stride`.
template <typename S, typename Kv, int kQueries>
inline void weigh_values(const KvRun& values, int64_t group, const float* weights, int64_t from,
                         int64_t to, float* sums, int64_t stride) {
  using F = typename S::F;
  constexpr int kVectors = kKvGroup / S::kFloats;
  F acc[kQueries][kVectors];
  for (int n = 0; n < kQueries; ++n) {
    for (int i = 0; i < kVectors; ++i) acc[n][i] = S::load_f(sums + n * stride + i * S::kFloats);
  }
  for (int64_t t = from; t < to; ++t) {
    F value[kVectors];
    Kv::template values<S>(values.data + t * values.vector_bytes, group, value);
    for (int n = 0; n < kQueries; ++n) {
      const F weight = S::set(weights[n * kAttendBlock + t]);
      for (int i = 0; i < kVectors; ++i) acc[n][i] = S::fma(weight, value[i], acc[n][i]);
    }
  }
  for (int n = 0; n < kQueries; ++n) {
    for (int i = 0; i < kVectors; ++i) S::store_f(sums + n * stride + i * S::kFloats, acc[n][i]);
  }
}

// x[i] = value for i outside of the span, in those lanes of 16 that it touches.
inline void fill_outside(const Span& span, float value, float* x) {
  for (int64_t i = span.from / kLanes * kLanes; i < span.from; ++i) x[i] = value;
  for (int64_t i = span.to; i < round_up(span.to, kLanes); ++i) x[i] = value;
}

// body(i) at every vector of the lanes of 16 that the span touches.
template <typename S, typename Body>
inline void for_each_of(const Span& span, const Body& body) {
  for (int64_t i = span.from / kLanes * kLanes; i < round_up(span.to, kLanes); i += S::kFloats) {
    body(i);
  }
}

template <typename S>
inline float sum_of(const Span& span, const float* x) {
  using F = typename S::F;
  auto sums = Wide<S>::set(0);
  for (int64_t i = span.from / kLanes * kLanes; i < round_up(span.to, kLanes); i += kLanes) {
    sums.each([&](F& sum, int lane) { sum = S::add(sum, S::load_f(x + i + lane)); });
  }
  return sums.sum();
}

// Products of a query with the keys of a block -> weights relative to the largest score so far, 0
// outside of the span. What the state holds is brought down to that score.
template <typename S>
inline void weigh_scores(const AttendQueries& queries, const Span& span, int64_t dims,
                         float* scores, AttendState state) {
  using F = typename S::F;
  for_each_of<S>(span, [&](int64_t i) {
    S::store_f(scores + i, S::mul(S::load_f(scores + i), S::set(queries.scale)));
  });
  if (queries.softcap > 0) {
    const int64_t from = span.from / kLanes * kLanes;
    soft_cap<S>(scores + from, round_up(span.to, kLanes) - from, queries.softcap);
  }
  fill_outside(span, -__FLT_MAX__, scores);
  F most = S::set(state.largest);
  for_each_of<S>(span, [&](int64_t i) { most = S::max(most, S::load_f(scores + i)); });
  const float largest = S::largest(most);
  for_each_of<S>(span, [&](int64_t i) {
    S::store_f(scores + i, exponential<S>(S::sub(S::load_f(scores + i), S::set(largest))));
  });
  fill_outside(span, 0, scores);
  const float share = exponential_of<S>(state.largest - largest);
  state.sum = state.sum * share + sum_of<S>(span, scores);
  state.largest = largest;
  if (share == 1) return;
  for (int64_t i = 0; i < dims; i += S::kFloats) {
    S::store_f(state.values + i, S::mul(S::load_f(state.values + i), S::set(share)));
  }
}

// Adds one group of the values of a block to the states, weighted. Positions that all the queries
// attend to are read once for all of them.
template <typename S, typename Kv, int kQueries>
inline void add_group(const KvRun& values, int64_t group, const Span (&spans)[kQueries],
                      const float* weights, float* states, int64_t stride) {
  float* sums = states + kStateHead + group * kKvGroup;
  const auto one = [&](int n, int64_t from, int64_t to) {
    if (from >= to) return;
    weigh_values<S, Kv, 1>(values, group, weights + n * kAttendBlock, from, to, sums + n * stride,
                           stride);
  };
  Span common = spans[0];
  for (const Span& span : spans) {
    common.from = span.from > common.from ? span.from : common.from;
    common.to = span.to < common.to ? span.to : common.to;
  }
  if (kQueries == 1 || common.empty()) {
    for (int n = 0; n < kQueries; ++n) one(n, spans[n].from, spans[n].to);
    return;
  }
  for (int n = 0; n < kQueries; ++n) one(n, spans[n].from, common.from);
  weigh_values<S, Kv, kQueries>(values, group, weights, common.from, common.to, sums, stride);
  for (int n = 0; n < kQueries; ++n) one(n, common.to, spans[n].to);
}

// weights * the scales of a group -> scaled, 0 outside of the span; weights * its lowest numbers
// are added to the group's sums.
template <typename S>
inline void scale_weights(const uint16_t* ranges, int64_t capacity, const Span& span,
                          const float* weights, float* scaled, float* sums) {
  if (span.empty()) return;
  const auto times = [&](const uint16_t* halves) {
    for_each_of<S>(span, [&](int64_t i) {
      S::store_f(scaled + i, S::mul(S::load_f(weights + i), S::load_half(halves + i)));
    });
    fill_outside(span, 0, scaled);
  };
  times(ranges + capacity);
  const auto lows = S::set(sum_of<S>(span, scaled));
  for (int64_t i = 0; i < kKvGroup; i += S::kFloats) {
    S::store_f(sums + i, S::add(S::load_f(sums + i), lows));
  }
  times(ranges);
}

template <typename S, typename Kv, int kQueries>
inline void add_values(const KvShape& shape, const KvRun& values, int64_t capacity,
                       const Span (&spans)[kQueries], const float* weights, float* states) {
  const int64_t stride = shape.state_floats();
  for (int64_t group = 0; group < shape.groups(); ++group) {
    if constexpr (!Kv::kScaled) {
      add_group<S, Kv, kQueries>(values, group, spans, weights, states, stride);
    } else {
      float scaled[kQueries * kAttendBlock];
      for (int n = 0; n < kQueries; ++n) {
        scale_weights<S>(values.ranges + 2 * group * capacity, capacity, spans[n],
                         weights + n * kAttendBlock, scaled + n * kAttendBlock,
                         states + n * stride + kStateHead + group * kKvGroup);
      }
      add_group<S, Kv, kQueries>(values, group, spans, scaled, states, stride);
    }
  }
}

// Asks for the keys and values of 16 positions: blocks of both take turns, so that what the
// processor foresees by itself ends with each.
template <typename S>
inline void prefetch_positions(const KvRun& keys, const KvRun& values) {
  const auto lines = [](const KvRun& run) {
    for (int64_t i = 0; i < kKeyBlock * run.vector_bytes; i += 64) S::prefetch(run.data + i);
  };
  lines(keys);
  lines(values);
}

// Queries [at, at + kQueries) over the block of positions [begin, end).
template <typename S, int kQueries>
inline void attend_block(const KvShape& shape, const KvHead& head, const AttendQueries& queries,
                         int64_t at, int64_t begin, int64_t end, float* states) {
  Span spans[kQueries], all = {kAttendBlock, 0};
  for (int n = 0; n < kQueries; ++n) {
    const int64_t first = queries.first[at + n], last = queries.end[at + n];
    spans[n] = {(first > begin ? first : begin) - begin, (last < end ? last : end) - begin};
    if (spans[n].empty()) continue;
    all.from = spans[n].from < all.from ? spans[n].from : all.from;
    all.to = spans[n].to > all.to ? spans[n].to : all.to;
  }
  if (all.empty()) return;
  float weights[kQueries * kAttendBlock];
  const KvRun keys = keys_from(shape, head, queries.near, begin);
  with_format(keys.type, [&](auto format) {
    using Kv = decltype(format);
    for (int64_t t = all.from / kKeyBlock * kKeyBlock; t < all.to; t += kKeyBlock) {
      const int64_t next = begin + t + kAttendBlock;
      if (at == 0 && next < queries.end[queries.count - 1]) {
        prefetch_positions<S>(keys_from(shape, head, queries.near, next),
                              values_from(shape, head, queries.near, next));
      }
      score_block<S, Kv, kQueries>(shape, keys.data + t * keys.vector_bytes,
                                   Kv::kScaled ? keys.ranges + t : nullptr, head.capacity,
                                   queries.q + at * shape.query_floats(), weights + t);
    }
  });
  float* first_state = states + at * shape.state_floats();
  for (int n = 0; n < kQueries; ++n) {
    if (spans[n].empty()) continue;
    weigh_scores<S>(queries, spans[n], shape.dims(), weights + n * kAttendBlock,
                    AttendState(first_state + n * shape.state_floats()));
  }
  const KvRun values = values_from(shape, head, queries.near, begin);
  with_format(values.type, [&](auto format) {
    add_values<S, decltype(format), kQueries>(shape, values, head.capacity, spans, weights,
                                              first_state);
  });
}

// Queries from `at` on, as many together as there are registers for.
template <typename S, int kQueries>
inline void attend_queries(const KvShape& shape, const KvHead& head, const AttendQueries& queries,
                           int64_t at, int64_t begin, int64_t end, float* states) {
  for (; at + kQueries <= queries.count; at += kQueries) {
    attend_block<S, kQueries>(shape, head, queries, at, begin, end, states);
  }
  if constexpr (kQueries > 1) {
    attend_queries<S, kQueries / 2>(shape, head, queries, at, begin, end, states);
  }
}

template <typename S>
void attend(const KvShape& shape, const KvHead& head, const AttendQueries& queries, int64_t begin,
            int64_t end, float* states) {
  for (int64_t n = 0; n < queries.count; ++n) {
    float* state = states + n * shape.state_floats();
    for (int64_t i = 0; i < shape.state_floats(); ++i) state[i] = 0;
    AttendState(state).largest = -__FLT_MAX__;
  }
  for (int64_t block = begin; block < end; block += kAttendBlock) {
    const int64_t block_end = block + kAttendBlock < end ? block + kAttendBlock : end;
    attend_queries<S, S::kFloats == 16 ? 4 : 2>(shape, head, queries, 0, block, block_end, states);
  }
}

template <typename S>
void merge_attended(const KvShape& shape, float* state, const float* following) {
  AttendState a(state);
  const float largest = following[0], sum = following[1];
  if (sum == 0) return;  // no positions
  const float most = largest > a.largest ? largest : a.largest;
  const float keep = exponential_of<S>(a.largest - most), take = exponential_of<S>(largest - most);
  a.largest = most;
  a.sum = a.sum * keep + sum * take;
  for (int64_t i = 0; i < shape.dims(); i += S::kFloats) {
    const auto kept = S::mul(S::load_f(a.values + i), S::set(keep));
    S::store_f(a.values + i, S::fma(S::load_f(following + kStateHead + i), S::set(take), kept));
  }
}

template <typename S>
void finish_attended(const KvShape& shape, float* state, float* out) {
  AttendState a(state);
  const float share = 1 / a.sum;
  for (int64_t i = 0; i < shape.head_dim; ++i) out[i] = a.values[i] * share;
  if (kv_scaled(shape.values)) rotate(out, shape.head_dim);
}
