#include "model/pass.h"

#include <algorithm>

#include "ops/rope.h"

namespace tmac {

// norm(x) of all tokens as `inputs`.
void Decoder::Pass::norm_into_inputs(const float* x, const float* weight, int64_t width,
                                     const InputPlan& plan, Inputs& inputs) {
  norm_into_inputs(x, weight, width, plan, inputs, n, [](int64_t t) { return t; });
}

void Decoder::Pass::embed() {
  team.parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* x = a.x.data() + t * hidden;
      dequantize_row(weights.embed_tokens.spec, weights.embed_tokens.packed, tokens[t].id, x);
      if (config.embedding_scale != 1) {
        for (int64_t i = 0; i < hidden; ++i) x[i] *= config.embedding_scale;
      }
      for (size_t i = 0; i < config.ropes.size(); ++i) {
        const Rope& rope = config.ropes[i];
        const bool is_long = !rope.long_inv_freq.empty() && tokens[t].cache->long_rope();
        const std::vector<float>& inv_freq = is_long ? rope.long_inv_freq : rope.inv_freq;
        rope_angles(tokens[t].pos, inv_freq.data(), half_rotary, rope.attention_scale,
                    a.cosines.data() + rope_at(i, t), a.sines.data() + rope_at(i, t));
      }
    }
  });
  ended(Part::kEmbed);
}

void Decoder::Pass::layer(size_t i) {
  const LayerWeights& w = weights.layers[i];
  const LayerPlans& plans = model.plans_[i];
  norm_into_inputs(a.x.data(), w.input_norm, hidden, plans.qkv, a.inputs);
  ended(Part::kInputs);
  multiply(a.inputs, plans.qkv,
           {{w.q, w.q_bias, a.q.data()}, {w.k, w.k_bias, a.k.data()}, {w.v, w.v_bias, a.v.data()}},
           n);
  ended(Part::kQkv);
  norm_and_clip(w);
  store_keys_and_values(static_cast<int64_t>(i));
  ended(Part::kStore);
  attend(static_cast<int64_t>(i), plans.o);
  ended(Part::kAttention);
  multiply_add(w.o, w.o_bias, w.attention_out_norm, a.inputs, plans.o);
  ended(Part::kOut);
  if (w.router == nullptr) {
    feed_forward(w, plans);
  } else {
    mix_experts(i);
    ended(Part::kExperts);
  }
}

void Decoder::Pass::head(const int64_t* outputs, int64_t count, int64_t first, float* logits) {
  if (count == 0) return;
  norm_into_inputs(a.x.data(), weights.final_norm, hidden, model.head_plan_, a.head_inputs(), count,
                   [&](int64_t i) { return outputs[i] - first; });
  ended(Part::kInputs);
  multiply(a.head_inputs(), model.head_plan_, {{weights.lm_head, nullptr, logits}}, count);
  if (config.logits_softcap > 0) {
    constexpr int64_t kPiece = 4096;
    const int64_t size = count * weights.lm_head.spec.m;
    team.parallel_for(ceil_div(size, kPiece), [&](int64_t begin, int64_t end) {
      isa.soft_cap(logits + begin * kPiece, std::min(end * kPiece, size) - begin * kPiece,
                   config.logits_softcap);
    });
  }
  ended(Part::kHead);
}

void Decoder::Pass::final_norm(const int64_t* outputs, int64_t count, int64_t first,
                               float* normed) {
  team.parallel_for(count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      isa.rms_norm(a.x.data() + (outputs[i] - first) * hidden, weights.final_norm, hidden,
                   config.rms_norm_eps, normed + i * hidden);
    }
  });
  ended(Part::kInputs);
}

// y[t, begin..end) += bias[begin..end); rows of y are `stride` apart.
void Decoder::Pass::add_bias(const float* bias, int64_t count, int64_t begin, int64_t end, float* y,
                             int64_t stride) {
  if (bias == nullptr) return;
  for (int64_t t = 0; t < count; ++t) isa.add(y + t * stride + begin, bias + begin, end - begin);
}

// All products of one input, their tiles dealt out together.
void Decoder::Pass::multiply(Inputs& inputs, const InputPlan& plan,
                             std::initializer_list<Product> products, int64_t count) {
  const int64_t at_once = plan.tiles_at_once(count);
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
      const int64_t m = p.w.spec.m, first = tile(begin), last = tile(end);
      multiply_tiles(team, p.w, inputs, plan, reader++, count, first, last, p.y, m);
      add_bias(p.bias, count, first * kTileRows, std::min(last * kTileRows, m), p.y, m);
      before += here;
    }
  });
}

// x += w . input + bias, or the norm of that.
void Decoder::Pass::multiply_add(const Linear& w, const float* bias, const float* out_norm,
                                 Inputs& inputs, const InputPlan& plan) {
  for_tiles(team, w.spec.n_tiles(), plan.tiles_at_once(n), [&](int64_t begin, int64_t end) {
    multiply_tiles(team, w, inputs, plan, 0, n, begin, end, a.delta.data(), hidden);
    const int64_t row = begin * kTileRows, row_end = std::min(end * kTileRows, hidden);
    add_bias(bias, n, row, row_end, a.delta.data(), hidden);
    for (int64_t t = 0; out_norm == nullptr && t < n; ++t) {
      isa.add(a.x.data() + t * hidden + row, a.delta.data() + t * hidden + row, row_end - row);
    }
  });
  if (out_norm == nullptr) return;
  float* normed = a.normed.data() + team.thread() * a.widest;
  team.parallel_for(n, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      isa.rms_norm(a.delta.data() + t * hidden, out_norm, hidden, config.rms_norm_eps, normed);
      isa.add(a.x.data() + t * hidden, normed, hidden);
    }
  });
}

}  // namespace tmac
