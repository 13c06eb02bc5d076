// The part of a layer that works on each token by itself.
#include <algorithm>

#include "model/pass.h"

namespace tmac {

// x += down . (act(gate . y) * (up . y)) with y = norm(x), and the biases and norms there are.
void Decoder::Pass::feed_forward(const LayerWeights& w, const LayerPlans& layer_plans) {
  const FeedForward& f = w.feed_forwards[0];
  const FeedForwardPlans& plans = layer_plans.feed_forwards[0];
  norm_into_inputs(a.x.data(), w.feed_forward_norm, hidden, plans.gate_up, a.inputs);
  ended(Part::kInputs);
  multiply_gated(f, plans, w.ffn_sub_norm, n);
  ended(Part::kGateUp);
  multiply_add(f.down, f.down_bias, w.feed_forward_out_norm, a.down_inputs, plans.down);
  ended(Part::kDown);
}

// act(gate . y) * (up . y), or the norm of that, of `count` tokens y as inputs of down.
void Decoder::Pass::multiply_gated(const FeedForward& f, const FeedForwardPlans& plans,
                                   const float* sub_norm, int64_t count) {
  const int64_t width = f.gate.spec.m;
  const bool build_now = sub_norm == nullptr && a.down_inputs.builds_early(plans.down, count);
  // As many tiles as make what is built at once of the next product's input.
  static_assert(kRowRegionsWeights % (kTilesAtOnce * kTileRows) == 0);
  const int64_t at_once = build_now ? plans.down.weights_at_once(count) / kTileRows
                                    : plans.gate_up.tiles_at_once(count);
  for_tiles(team, f.gate.spec.n_tiles(), at_once, [&](int64_t begin, int64_t end) {
    const int64_t row = begin * kTileRows, row_end = std::min(end * kTileRows, width);
    multiply_tiles(team, f.gate, a.inputs, plans.gate_up, 0, count, begin, end, a.gate.data(),
                   width);
    add_bias(f.gate_bias, count, row, row_end, a.gate.data(), width);
    multiply_tiles(team, f.up, a.inputs, plans.gate_up, 1, count, begin, end, a.up.data(), width);
    add_bias(f.up_bias, count, row, row_end, a.up.data(), width);
    for (int64_t t = 0; t < count; ++t) {
      activate(a.gate.data() + t * width + row, a.up.data() + t * width + row, row_end - row);
      if (build_now) {
        a.down_inputs.build_weights(plans.down, count, t, row, row_end, a.gate.data() + t * width);
      }
    }
  });
  if (sub_norm != nullptr) {
    norm_into_inputs(a.gate.data(), sub_norm, width, plans.down, a.down_inputs);
  } else if (!build_now) {
    a.down_inputs.build_all(team, plans.down, count, a.gate.data(), width);
  }
}

// gate[i] = act(gate[i]) * up[i]
void Decoder::Pass::activate(float* gate, const float* up, int64_t size) const {
  switch (config.activation) {
    case Activation::kGeluTanh:
      return isa.gelu_tanh_multiply(gate, up, size);
    case Activation::kRelu2:
      return isa.relu2_multiply(gate, up, size);
    default:
      return isa.silu_multiply(gate, up, size);
  }
}

}  // namespace tmac
