#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "model/decoder.h"
#include "model/routing.h"

namespace tmac {

// Work on attention is shared out by position as well where there would be fewer pieces than this
// for each thread.
constexpr int64_t kFewPieces = 4;

struct AttentionScratch {
  AttentionScratch(const DecoderConfig& config, int64_t threads, int64_t n_ctx)
      : shape{KvType::kF16, KvType::kF16, config.head_dim},
        head(threads * 2 * shape.dims()),
        queries(threads * kMostQueries * shape.query_floats()),
        states(threads * 2 * kMostQueries * shape.state_floats()),
        parts(kFewPieces * threads * ceil_div(n_ctx, kAttendPart) * kMostQueries *
              shape.state_floats()) {}

  KvShape shape;
  AlignedBuffer<float> head;     // [threads, 2, dims]
  AlignedBuffer<float> queries;  // [threads, kMostQueries, query_floats]
  AlignedBuffer<float> states;   // [threads, 2, kMostQueries, state_floats]
  AlignedBuffer<float> parts;    // [pieces, parts, kMostQueries, state_floats]
};

// Scratch of one decoder step: for up to `tokens` tokens at once, by `threads` threads, over up to
// `n_ctx` positions. Its sizes are those of one decoder.
struct Activations {
  Activations(const DecoderConfig& config, const DecoderWeights& weights, int64_t max_regions,
              int64_t n_tokens, int64_t n_threads, int64_t max_ctx)
      : tokens(n_tokens),
        threads(n_threads),
        n_ctx(max_ctx),
        x(tokens * weights.embed_tokens.spec.k),
        wave_room(room_of_experts(config, weights, tokens)),
        feed_forward_rows(std::max(tokens, wave_room.slots)),
        delta(feed_forward_rows * weights.embed_tokens.spec.k),
        q(tokens * config.n_heads * config.head_dim),
        k(tokens * config.n_kv_heads * config.head_dim),
        v(tokens * config.n_kv_heads * config.head_dim),
        attended(tokens * config.n_heads * config.head_dim),
        intermediate(widest_feed_forward(weights)),
        gate(feed_forward_rows * intermediate),
        up(feed_forward_rows * intermediate),
        cosines(static_cast<int64_t>(config.ropes.size()) * tokens * config.rotary_dim / 2),
        sines(static_cast<int64_t>(config.ropes.size()) * tokens * config.rotary_dim / 2),
        widest(std::max(
            {weights.embed_tokens.spec.k, config.n_heads * config.head_dim, intermediate})),
        normed(threads * widest),
        attention(config, threads, n_ctx),
        inputs(config.tables, max_regions, tokens, threads, wave_room.slots > 0 ? tokens : 0,
               wave_room.blocks),
        down_inputs(config.tables, max_regions, tokens, threads, wave_room.tables),
        probabilities(threads * most_experts(weights)),
        router(tokens, most_experts(weights), config.experts_per_token),
        slots(weights.layers.size()) {
    if (router.experts() > 0) mixed = AlignedBuffer<float>(tokens * weights.embed_tokens.spec.k);
    if (config.head_tables != config.tables) {
      own_head_inputs.emplace(config.head_tables, max_regions, tokens, threads);
    }
  }

  static int64_t widest_feed_forward(const DecoderWeights& weights) {
    int64_t widest = 0;
    for (const LayerWeights& w : weights.layers) {
      widest = std::max(widest, w.feed_forwards[0].gate.spec.m);
    }
    return widest;
  }
  static int64_t most_experts(const DecoderWeights& weights) {
    size_t most = 0;
    for (const LayerWeights& w : weights.layers) {
      if (w.router != nullptr) most = std::max(most, w.feed_forwards.size());
    }
    return static_cast<int64_t>(most);
  }
  // None if there are no experts.
  static WaveRoom room_of_experts(const DecoderConfig& config, const DecoderWeights& weights,
                                  int64_t tokens) {
    if (most_experts(weights) == 0) return {};
    const int64_t tables = std::min(tokens, kTableTokens) * config.experts_per_token;
    return {std::max(tokens, tables), tables, RowBlocks{tokens}.n_blocks()};
  }

  Inputs& head_inputs() { return own_head_inputs ? *own_head_inputs : inputs; }

  int64_t tokens, threads, n_ctx;
  AlignedBuffer<float> x;               // [tokens, hidden] the residual stream
  WaveRoom wave_room;                   // of experts
  int64_t feed_forward_rows;            // tokens, or tokens of experts worked on together
  AlignedBuffer<float> delta;           // [feed_forward_rows, hidden] what a product adds to it
  AlignedBuffer<float> mixed;           // [tokens, hidden] the sum of the experts, if there are any
  AlignedBuffer<float> q;               // [tokens, n_heads * head_dim]
  AlignedBuffer<float> k, v;            // [tokens, n_kv_heads * head_dim]
  AlignedBuffer<float> attended;        // [tokens, n_heads * head_dim]
  int64_t intermediate;                 // the largest of a layer
  AlignedBuffer<float> gate, up;        // [feed_forward_rows, intermediate]
  AlignedBuffer<float> cosines, sines;  // [ropes, tokens, rotary_dim / 2]
  int64_t widest;                       // of what norms see
  AlignedBuffer<float> normed;          // [threads, widest]
  AttentionScratch attention;
  Inputs inputs;
  std::optional<Inputs> own_head_inputs;
  Inputs down_inputs;                   // built tile by tile while gate and up still read `inputs`
  AlignedBuffer<double> probabilities;  // [threads, experts]
  Router router;
  std::vector<ExpertSlots> slots;  // [layers]
};

}  // namespace tmac
