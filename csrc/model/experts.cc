// The feed-forward of a layer that has several and chooses among them for each token (mixture of
// experts; Shazeer et al., 2017, arXiv 1701.06538).
#include <algorithm>

#include "model/pass.h"

namespace tmac {

// x += sum over the chosen experts, in rising order, of their weight times what they give.
void Decoder::Pass::mix_experts(size_t layer) {
  const LayerWeights& w = weights.layers[layer];
  const LayerPlans& plans = model.plans_[layer];
  ExpertSlots& slots = a.slots[layer];
  route(w, plans, &slots);
  if (plans.feed_forwards.size() == 1) {
    if (n > kTableTokens) build_shared_inputs(w, plans.feed_forwards[0].gate_up, slots);
    for (size_t wave = 0; wave + 1 < slots.waves.size(); ++wave) {
      run_wave(w, plans.feed_forwards[0], slots, wave);
    }
  } else {
    for (size_t group = 0; group < slots.used.size(); ++group) run_expert(w, plans, slots, group);
    team.parallel_for(n, [&](int64_t begin, int64_t end) {
      isa.add(a.x.data() + begin * hidden, a.mixed.data() + begin * hidden, (end - begin) * hidden);
    });
  }
}

// Chooses the experts of each token; builds the tables of few tokens if experts share them. The
// slots of a layer stay as they are until the job is done: a thread that comes late to it counts
// its phases by them.
void Decoder::Pass::route(const LayerWeights& w, const LayerPlans& plans, ExpertSlots* slots) {
  const int64_t experts = a.router.experts();
  const bool builds_inputs = plans.feed_forwards.size() == 1 && n <= kTableTokens;
  const InputPlan& plan = plans.feed_forwards[0].gate_up;
  norm_tokens(
      a.x.data(), w.feed_forward_norm, hidden, n, [](int64_t t) { return t; },
      [&](int64_t t, int64_t part, int64_t parts, const float* normed) {
        if (builds_inputs) build_part(plan, a.inputs, n, t, part, parts, normed);
        float* logits = a.router.logits(t);
        for (int64_t e = experts * part / parts; e < experts * (part + 1) / parts; ++e) {
          logits[e] = dot(normed, w.router + e * hidden, hidden);
        }
      });
  double* scratch = a.probabilities.data() + team.thread() * experts;
  team.parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      a.router.choose(t, config.normalize_experts, scratch);
      std::fill_n(a.mixed.data() + t * hidden, hidden, 0.0f);
    }
  });
  team.parallel_for(1, [&](int64_t, int64_t) { a.router.fill(n, a.wave_room, slots); });
}

// The integers of all tokens, which experts gather, and the tables that those of few tokens read.
void Decoder::Pass::build_shared_inputs(const LayerWeights& w, const InputPlan& plan,
                                        const ExpertSlots& slots) {
  norm_tokens(
      a.x.data(), w.feed_forward_norm, hidden, n, [](int64_t t) { return t; },
      [&](int64_t t, int64_t part, int64_t parts, const float* normed) {
        build_part(plan, a.inputs, n, t, part, parts, normed);
        if (slots.looks_up[static_cast<size_t>(t)] != 0) {
          build_part(plan, a.inputs, {1, t}, 0, part, parts, normed);
        }
      });
}

// The integers of the groups [begin, end) that multiply them, behind those of all tokens.
void Decoder::Pass::gather_inputs(const InputPlan& plan, const ExpertSlots& slots, size_t begin,
                                  size_t end) {
  int64_t blocks = 0;
  for (size_t group = begin; group < end; ++group) {
    if (slots.count(group) <= kTableTokens) continue;
    blocks = slots.inputs_at[group] + RowBlocks{slots.count(group)}.n_blocks();
  }
  team.parallel_for(blocks, [&](int64_t first, int64_t last) {
    for (size_t group = begin; group < end; ++group) {
      const TokenSet tokens = slots.inputs(group);
      if (tokens.n <= kTableTokens) continue;
      const int32_t* chosen = slots.token.data() + slots.first[group];
      const int64_t from = std::max<int64_t>(first - tokens.first, 0);
      const int64_t to = std::min(last - tokens.first, RowBlocks{tokens.n}.n_blocks());
      for (int64_t block = from; block < to; ++block) {
        a.inputs.gather_block(plan, n, chosen, behind_all(tokens), block);
      }
    }
  });
}

// Some experts, which share the inputs of tokens: few phases whatever their number.
void Decoder::Pass::run_wave(const LayerWeights& w, const FeedForwardPlans& plans,
                             const ExpertSlots& slots, size_t wave) {
  const size_t begin_group = slots.waves[wave], end_group = slots.waves[wave + 1];
  const int64_t begin_slot = slots.first[begin_group];
  const int64_t width = w.feed_forwards[0].gate.spec.m;
  const int64_t n_tiles = w.feed_forwards[0].gate.spec.n_tiles();
  const bool build_now =
      a.down_inputs.builds_early(plans.down, 1) && a.down_inputs.builds_early(plans.down, n);
  const int64_t at_once = plans.gate_up.weights_at_once(n) / kTileRows;
  const int64_t pieces = ceil_div(n_tiles, at_once);
  const auto groups = static_cast<int64_t>(end_group - begin_group);
  gather_inputs(plans.gate_up, slots, begin_group, end_group);
  team.parallel_for(groups * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const size_t group = begin_group + static_cast<size_t>(piece / pieces);
      const FeedForward& f = w.feed_forwards[slots.used[group]];
      const int64_t tile = piece % pieces * at_once, tile_end = std::min(tile + at_once, n_tiles);
      const int64_t row = tile * kTileRows, row_end = std::min(tile_end * kTileRows, width);
      const TokenSet inputs = slots.inputs(group);
      const int64_t first = (slots.first[group] - begin_slot) * width;
      float* gate = a.gate.data() + first;
      float* up = a.up.data() + first;
      if (inputs.n <= kTableTokens) {
        const int32_t* tokens = slots.token.data() + slots.first[group];
        look_up_tiles(f.gate, a.inputs, plans.gate_up, 0, tokens, inputs.n, tile, tile_end, gate,
                      width);
        look_up_tiles(f.up, a.inputs, plans.gate_up, 1, tokens, inputs.n, tile, tile_end, up,
                      width);
      } else {
        const TokenSet gathered = behind_all(inputs);
        multiply_tiles(team, f.gate, a.inputs, plans.gate_up, 0, gathered, tile, tile_end, gate,
                       width);
        multiply_tiles(team, f.up, a.inputs, plans.gate_up, 1, gathered, tile, tile_end, up, width);
      }
      for (int64_t t = 0; t < inputs.n; ++t, gate += width, up += width) {
        activate(gate + row, up + row, row_end - row);
        if (build_now) a.down_inputs.build_weights(plans.down, inputs, t, row, row_end, gate);
      }
    }
  });
  if (!build_now) build_down_inputs(plans.down, slots, begin_group, end_group);
  const bool last = wave + 2 == slots.waves.size();
  for_tiles(team, ceil_div(hidden, kTileRows), plans.down.tiles_at_once(n),
            [&](int64_t begin, int64_t end) {
              const int64_t row = begin * kTileRows, row_end = std::min(end * kTileRows, hidden);
              for (size_t group = begin_group; group < end_group; ++group) {
                const int64_t first = slots.first[group] - begin_slot;
                multiply_tiles(team, w.feed_forwards[slots.used[group]].down, a.down_inputs,
                               plans.down, 0, slots.inputs(group), begin, end,
                               a.delta.data() + first * hidden, hidden);
                add_weighed(slots, group, first, row, row_end);
              }
              for (int64_t t = 0; last && t < n; ++t) {
                isa.add(a.x.data() + t * hidden + row, a.mixed.data() + t * hidden + row,
                        row_end - row);
              }
            });
}

// Where gate and up do not build them part by part.
void Decoder::Pass::build_down_inputs(const InputPlan& plan, const ExpertSlots& slots, size_t begin,
                                      size_t end) {
  const int64_t begin_slot = slots.first[begin];
  team.parallel_for(slots.first[end] - begin_slot, [&](int64_t first, int64_t last) {
    size_t group = begin;
    for (int64_t i = first; i < last; ++i) {
      while (begin_slot + i >= slots.first[group + 1]) ++group;
      const TokenSet inputs = slots.inputs(group);
      a.down_inputs.build(plan, inputs, begin_slot + i - slots.first[group], 0,
                          plan.regions(inputs.n).size(), a.gate.data() + i * plan.k());
    }
  });
}

// One expert for all tokens that chose it: its weights are read once.
void Decoder::Pass::run_expert(const LayerWeights& w, const LayerPlans& layer_plans,
                               const ExpertSlots& slots, size_t group) {
  const size_t expert = slots.used[group];
  const FeedForward& f = w.feed_forwards[expert];
  const FeedForwardPlans& plans = layer_plans.of_expert(expert);
  const int64_t count = slots.count(group);
  const int32_t* its_tokens = slots.token.data() + slots.first[group];
  norm_into_inputs(a.x.data(), w.feed_forward_norm, hidden, plans.gate_up, a.inputs, count,
                   [&](int64_t i) { return its_tokens[i]; });
  multiply_gated(f, plans, nullptr, count);
  for_tiles(team, f.down.spec.n_tiles(), plans.down.tiles_at_once(count),
            [&](int64_t begin, int64_t end) {
              multiply_tiles(team, f.down, a.down_inputs, plans.down, 0, count, begin, end,
                             a.delta.data(), hidden);
              add_weighed(slots, group, 0, begin * kTileRows, std::min(end * kTileRows, hidden));
            });
}

// Rows [begin, end) of mixed += weight * delta for the tokens of a group, which begin at that row
// of delta.
void Decoder::Pass::add_weighed(const ExpertSlots& slots, size_t group, int64_t first_delta,
                                int64_t begin, int64_t end) {
  for (int64_t i = 0; i < slots.count(group); ++i) {
    const auto slot = static_cast<size_t>(slots.first[group] + i);
    const float weight = slots.weight[slot];
    const float* delta = a.delta.data() + (first_delta + i) * hidden;
    float* mixed = a.mixed.data() + slots.token[slot] * hidden;
    for (int64_t row = begin; row < end; ++row) mixed[row] += weight * delta[row];
  }
}

}  // namespace tmac
