#include "model/pass.h"

#include <algorithm>

#include "ops/rope.h"

namespace tmac {

// norm(x) of the tokens token_at(0 .. count) as tokens 0.. of the inputs. For one token the threads
// share the regions, and each computes the norm for itself.
template <typename TokenAt>
void Decoder::Pass::norm_into_inputs(const float* weight, Inputs& inputs, const InputPlan& plan,
                                     int64_t count, const TokenAt& token_at) {
  const int64_t parts = count == 1 ? team.threads() : 1;
  const int64_t n_regions = plan.regions(count).size();
  float* normed = a.normed.data() + team.thread() * hidden;
  team.parallel_for(count * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / parts, part = i % parts;
      isa.rms_norm(a.x.data() + token_at(t) * hidden, weight, hidden, config.rms_norm_eps, normed);
      inputs.build(plan, count, t, n_regions * part / parts, n_regions * (part + 1) / parts,
                   normed);
    }
  });
}

void Decoder::Pass::norm_into_inputs(const float* weight, const InputPlan& plan) {
  norm_into_inputs(weight, a.inputs, plan, n, [](int64_t t) { return t; });
}

void Decoder::Pass::embed() {
  team.parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      dequantize_row(weights.embed_tokens.spec, weights.embed_tokens.packed, tokens[t].id,
                     a.x.data() + t * hidden);
      rope_angles(tokens[t].pos, config.inv_freq.data(), half_dim, config.rope_attention_scale,
                  a.cosines.data() + t * half_dim, a.sines.data() + t * half_dim);
    }
  });
}

void Decoder::Pass::layer(size_t i) {
  const LayerWeights& w = weights.layers[i];
  const LayerPlans& plans = model.plans_[i];
  norm_into_inputs(w.input_norm, plans.qkv);
  multiply(a.inputs, plans.qkv, {{w.q, a.q.data()}, {w.k, a.k.data()}, {w.v, a.v.data()}}, n);
  store_keys_and_values(static_cast<int64_t>(i));
  attend(static_cast<int64_t>(i), plans.o);
  multiply_add(w.o, a.inputs, plans.o);
  norm_into_inputs(w.post_attention_norm, plans.gate_up);
  feed_forward(w, plans);
  multiply_add(w.down, a.down_inputs, plans.down);
}

void Decoder::Pass::head(const int64_t* outputs, int64_t count, int64_t first, float* logits) {
  if (count == 0) return;
  norm_into_inputs(weights.final_norm, a.head_inputs(), model.head_plan_, count,
                   [&](int64_t i) { return outputs[i] - first; });
  multiply(a.head_inputs(), model.head_plan_, {{weights.lm_head, logits}}, count);
}

// All products of one input, their tiles dealt out together.
void Decoder::Pass::multiply(Inputs& inputs, const InputPlan& plan,
                             std::initializer_list<Product> products, int64_t count) {
  const int64_t at_once = tiles_at_once(count);
  const auto pieces_of = [&](const Product& p) { return ceil_div(p.w.spec.n_tiles(), at_once); };
  int64_t pieces = 0;
  for (const Product& p : products) pieces += pieces_of(p);
  team.parallel_for(pieces, [&](int64_t begin, int64_t end) {
    size_t reader = 0;
    int64_t before = 0;  // pieces of earlier products
    for (const Product& p : products) {
      const int64_t here = pieces_of(p);
      const auto tile = [&](int64_t piece) {
        return std::min(std::clamp<int64_t>(piece - before, 0, here) * at_once, p.w.spec.n_tiles());
      };
      multiply_tiles(team, p.w, inputs, plan, reader++, count, tile(begin), tile(end), p.y,
                     p.w.spec.m);
      before += here;
    }
  });
}

// x += w . input
void Decoder::Pass::multiply_add(const Linear& w, Inputs& inputs, const InputPlan& plan) {
  for_tiles(team, w.spec.n_tiles(), tiles_at_once(n), [&](int64_t begin, int64_t end) {
    multiply_tiles(team, w, inputs, plan, 0, n, begin, end, a.delta.data(), hidden);
    const int64_t row = begin * kTileRows, row_end = std::min(end * kTileRows, hidden);
    for (int64_t t = 0; t < n; ++t) {
      isa.add(a.x.data() + t * hidden + row, a.delta.data() + t * hidden + row, row_end - row);
    }
  });
}

// silu(gate . x) * (up . x) as the inputs of `down`.
void Decoder::Pass::feed_forward(const LayerWeights& w, const LayerPlans& plans) {
  const int64_t width = w.gate.spec.m;
  const bool build_now = a.down_inputs.builds_early(plans.down, n);
  // As many tiles as make what is built at once of the next product's input.
  static_assert(kRowRegionsWeights % (kTilesAtOnce * kTileRows) == 0);
  const int64_t at_once = build_now ? weights_at_once(n) / kTileRows : tiles_at_once(n);
  for_tiles(team, w.gate.spec.n_tiles(), at_once, [&](int64_t begin, int64_t end) {
    multiply_tiles(team, w.gate, a.inputs, plans.gate_up, 0, n, begin, end, a.gate.data(), width);
    multiply_tiles(team, w.up, a.inputs, plans.gate_up, 1, n, begin, end, a.up.data(), width);
    const int64_t row = begin * kTileRows, row_end = std::min(end * kTileRows, width);
    for (int64_t t = 0; t < n; ++t) {
      isa.silu_multiply(a.gate.data() + t * width + row, a.up.data() + t * width + row,
                        row_end - row);
      if (build_now) {
        a.down_inputs.build_weights(plans.down, n, t, row, row_end, a.gate.data() + t * width);
      }
    }
  });
  if (!build_now) a.down_inputs.build_all(team, plans.down, n, a.gate.data(), width);
}

}  // namespace tmac
