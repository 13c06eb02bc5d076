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

// How many bytes ahead of what is read cache lines are asked for: the next block into the
// second-level cache, what follows soon from there into the first. 0 where there is no next block.
struct Reach {
  static constexpr int64_t kNearBytes = 2048;
  int64_t far, near;

  Reach(const KvRun& run, bool goes_on)
      : far(goes_on ? kAttendBlock * run.vector_bytes : 0),
        near(far < kNearBytes ? far : kNearBytes) {}
  // Asks for what follows piece `index`, of kBytes bytes, at `from`.
  template <typename S, int64_t kBytes>
  void fetch(const uint8_t* from, int64_t index) const {
    constexpr int64_t kLine = 64, kPieces = kBytes < kLine ? kLine / kBytes : 1;
    if (far == 0 || index % kPieces != 0) return;
    for (int64_t i = 0; i < kBytes; i += kLine) {
      S::prefetch(from + far + index * kBytes + i);
      S::prefetch_near(from + near + index * kBytes + i);
    }
  }
};

// scores[query][0..16) = products of kQueries queries with the keys of one block of 16 positions,
// whose ranges begin at `ranges`. Scores of a query are kAttendBlock apart.
template <typename S, typename Kv, int kQueries>
inline void score_block(const KvShape& shape, const uint8_t* keys, const uint16_t* ranges,
                        int64_t capacity, const Reach& reach, const float* q, float* scores) {
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
        if (lane == 0) {
          reach.fetch<S, 4 * kKeyBlock * Kv::kBits / 8>(keys, (group * kKvGroup + i) / 4);
        }
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

// Weights of a block by which values of some groups are multiplied: of query n, group g and
// position t at[g * by_group + n * kAttendBlock + t].
struct GroupWeights {
  const float* at;
  int64_t by_group;  // 0: the same for all groups
};

// sums[query] += weights[query][t] * groups [group, group + kGroups) of value t, t in [from, to).
// `values` begin at the block; sums of queries are `stride` apart.
template <typename S, typename Kv, int kQueries, int kGroups>
inline void weigh_values(const KvRun& values, const Reach& reach, int64_t group,
                         const GroupWeights& weights, int64_t from, int64_t to, float* sums,
                         int64_t stride) {
  using F = typename S::F;
  constexpr int kVectors = kKvGroup / S::kFloats;
  F acc[kQueries][kGroups * kVectors];
  for (int n = 0; n < kQueries; ++n) {
    for (int i = 0; i < kGroups * kVectors; ++i) {
      acc[n][i] = S::load_f(sums + n * stride + i * S::kFloats);
    }
  }
  for (int64_t t = from; t < to; ++t) {
    const uint8_t* row = values.data + t * values.vector_bytes;
    for (int g = 0; g < kGroups; ++g) {
      F value[kVectors];
      Kv::template values<S>(row, group + g, value);
      reach.fetch<S, kKvGroup * Kv::kBits / 8>(row, group + g);
      for (int n = 0; n < kQueries; ++n) {
        const F weight = S::set(weights.at[g * weights.by_group + n * kAttendBlock + t]);
        for (int i = 0; i < kVectors; ++i) {
          F& sum = acc[n][g * kVectors + i];
          sum = S::fma(weight, value[i], sum);
        }
      }
    }
  }
  for (int n = 0; n < kQueries; ++n) {
    for (int i = 0; i < kGroups * kVectors; ++i) {
      S::store_f(sums + n * stride + i * S::kFloats, acc[n][i]);
    }
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

// Adds some groups of the values of a block to the sums of the queries, weighted. Positions that
// all the queries attend to are read once for all of them.
template <typename S, typename Kv, int kQueries, int kGroups>
inline void add_groups(const KvRun& values, const Reach& reach, int64_t group,
                       const Span (&spans)[kQueries], const GroupWeights& weights, float* sums,
                       int64_t stride) {
  const auto one = [&](int n, int64_t from, int64_t to) {
    if (from >= to) return;
    const GroupWeights its{weights.at + n * kAttendBlock, weights.by_group};
    weigh_values<S, Kv, 1, kGroups>(values, reach, group, its, from, to, sums + n * stride, stride);
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
  weigh_values<S, Kv, kQueries, kGroups>(values, reach, group, weights, common.from, common.to,
                                         sums, stride);
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

// Groups from `group` on, as many together as have their sums in registers, at most kGroups.
template <typename S, typename Kv, int kQueries, int kGroups>
inline void add_values(const KvShape& shape, const KvRun& values, const Reach& reach,
                       int64_t capacity, const Span (&spans)[kQueries], const float* weights,
                       float* states, int64_t group = 0) {
  const int64_t stride = shape.state_floats();
  for (; group + kGroups <= shape.groups(); group += kGroups) {
    float* sums = states + kStateHead + group * kKvGroup;
    if constexpr (!Kv::kScaled) {
      add_groups<S, Kv, kQueries, kGroups>(values, reach, group, spans, {weights, 0}, sums, stride);
    } else {
      float scaled[kGroups][kQueries * kAttendBlock];
      for (int g = 0; g < kGroups; ++g) {
        for (int n = 0; n < kQueries; ++n) {
          scale_weights<S>(values.ranges + 2 * (group + g) * capacity, capacity, spans[n],
                           weights + n * kAttendBlock, scaled[g] + n * kAttendBlock,
                           sums + n * stride + g * kKvGroup);
        }
      }
      add_groups<S, Kv, kQueries, kGroups>(values, reach, group, spans,
                                           {scaled[0], kQueries * kAttendBlock}, sums, stride);
    }
  }
  if constexpr (kGroups > 1) {
    add_values<S, Kv, kQueries, kGroups / 2>(shape, values, reach, capacity, spans, weights, states,
                                             group);
  }
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
  const bool goes_on = at == 0 && begin + kAttendBlock < queries.end[queries.count - 1];
  const KvRun keys = keys_from(shape, head, queries.near, begin);
  const Reach reach(keys, goes_on);
  with_format(keys.type, [&](auto format) {
    using Kv = decltype(format);
    for (int64_t t = all.from / kKeyBlock * kKeyBlock; t < all.to; t += kKeyBlock) {
      score_block<S, Kv, kQueries>(shape, keys.data + t * keys.vector_bytes,
                                   Kv::kScaled ? keys.ranges + t : nullptr, head.capacity, reach,
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
    constexpr int kFit = S::kAccumulators * S::kFloats / (kQueries * kKvGroup);
    constexpr int kGroups = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
    add_values<S, decltype(format), kQueries, kGroups>(shape, values, Reach(values, goes_on),
                                                       head.capacity, spans, weights, first_state);
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
