#include "model/decoder.h"

#include <pybind11/stl.h>

#include <memory>

#include "bindings/linear.h"
#include "model/step_times.h"

namespace tmac {
namespace {

using namespace py::literals;

// A decoder in Python's hands: keeps the matrices and norms alive that it reads.
struct PyDecoder {
  std::vector<py::object> keep_alive;
  std::unique_ptr<Decoder> decoder;
};

class WeightReader {
 public:
  explicit WeightReader(std::vector<py::object>* keep_alive) : keep_alive_(keep_alive) {}

  Linear linear(const py::handle& object) const {
    keep_alive_->push_back(py::reinterpret_borrow<py::object>(object));
    return object.cast<const PyLinear&>().linear;
  }
  const float* floats(const py::handle& object, const char* name,
                      std::initializer_list<int64_t> shape) const {
    const auto array = object.cast<py::array>();
    keep_alive_->push_back(array);
    return array_data<float>(array, name, shape, "float32");
  }
  // Null where the layer has none of that name.
  const float* optional(const py::dict& layer, const char* name, int64_t size) const {
    return layer.contains(name) ? floats(layer[name], name, {size}) : nullptr;
  }

 private:
  std::vector<py::object>* keep_alive_;
};

Activation parse_activation(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  check_argument(name == "relu2",
                 "activation must be 'silu', 'gelu_pytorch_tanh' or 'relu2', "
                 "not '",
                 name, "'");
  return Activation::kRelu2;
}

std::vector<float> read_frequencies(const py::object& object, int64_t rotary_dim) {
  if (object.is_none()) return {};
  const int64_t half = rotary_dim / 2;
  const auto* data = array_data<float>(object.cast<py::array>(), "inv_freq", {half}, "float32");
  return {data, data + half};
}

FeedForward read_feed_forward(const WeightReader& read, const py::dict& values) {
  FeedForward f;
  f.gate = read.linear(values["gate_proj"]);
  f.up = read.linear(values["up_proj"]);
  f.down = read.linear(values["down_proj"]);
  f.gate_bias = read.optional(values, "gate_bias", f.gate.spec.m);
  f.up_bias = read.optional(values, "up_bias", f.up.spec.m);
  f.down_bias = read.optional(values, "down_bias", f.down.spec.m);
  return f;
}

LayerWeights read_layer(const WeightReader& read, const py::dict& layer, int64_t hidden,
                        int64_t head_dim) {
  LayerWeights w;
  w.q = read.linear(layer["q_proj"]);
  w.k = read.linear(layer["k_proj"]);
  w.v = read.linear(layer["v_proj"]);
  w.o = read.linear(layer["o_proj"]);
  for (const py::handle& item : layer["feed_forwards"].cast<py::list>()) {
    w.feed_forwards.push_back(read_feed_forward(read, item.cast<py::dict>()));
  }
  check_argument(!w.feed_forwards.empty(), "a layer needs a feed-forward");
  if (layer.contains("router")) {
    const auto experts = static_cast<int64_t>(w.feed_forwards.size());
    w.router = read.floats(layer["router"], "router", {experts, hidden});
  }
  w.input_norm = read.floats(layer["input_norm"], "input_norm", {hidden});
  w.feed_forward_norm = read.floats(layer["feed_forward_norm"], "feed_forward_norm", {hidden});
  w.attention_out_norm = read.optional(layer, "attention_out_norm", hidden);
  w.feed_forward_out_norm = read.optional(layer, "feed_forward_out_norm", hidden);
  w.q_norm = read.optional(layer, "q_norm", head_dim);
  w.k_norm = read.optional(layer, "k_norm", head_dim);
  w.q_full_norm = read.optional(layer, "q_full_norm", w.q.spec.m);
  w.k_full_norm = read.optional(layer, "k_full_norm", w.k.spec.m);
  w.attn_sub_norm = read.optional(layer, "attn_sub_norm", w.o.spec.k);
  w.ffn_sub_norm = read.optional(layer, "ffn_sub_norm", w.feed_forwards[0].down.spec.k);
  w.q_bias = read.optional(layer, "q_bias", w.q.spec.m);
  w.k_bias = read.optional(layer, "k_bias", w.k.spec.m);
  w.v_bias = read.optional(layer, "v_bias", w.v.spec.m);
  w.o_bias = read.optional(layer, "o_bias", w.o.spec.m);
  w.sliding_window = layer["sliding_window"].cast<int64_t>();
  w.rope = layer["rope"].cast<int>();
  return w;
}

std::unique_ptr<PyDecoder> make_decoder(const py::object& embed_tokens, const py::object& lm_head,
                                        const py::object& final_norm, const py::list& layers,
                                        int64_t n_heads, int64_t n_kv_heads, int64_t head_dim,
                                        int64_t rotary_dim, float rms_norm_eps, float query_scalar,
                                        float attention_softcap, float logits_softcap,
                                        float embedding_scale, const std::string& activation,
                                        float clip_qkv, int64_t experts_per_token,
                                        bool normalize_experts, const py::list& ropes,
                                        const std::string& tables, const std::string& head_tables) {
  DecoderConfig config;
  config.n_heads = n_heads;
  config.n_kv_heads = n_kv_heads;
  config.head_dim = head_dim;
  config.rotary_dim = rotary_dim;
  config.rms_norm_eps = rms_norm_eps;
  config.query_scalar = query_scalar;
  config.attention_softcap = attention_softcap;
  config.logits_softcap = logits_softcap;
  config.embedding_scale = embedding_scale;
  config.activation = parse_activation(activation);
  config.clip_qkv = clip_qkv;
  config.experts_per_token = experts_per_token;
  config.normalize_experts = normalize_experts;
  for (const py::handle& item : ropes) {
    const auto rope = item.cast<py::dict>();
    config.ropes.push_back({read_frequencies(rope["inv_freq"], rotary_dim),
                            read_frequencies(rope["long_inv_freq"], rotary_dim),
                            rope["original_context"].cast<int64_t>(),
                            rope["attention_scale"].cast<float>()});
  }
  config.tables = parse_tables(tables);
  config.head_tables = parse_tables(head_tables);

  auto self = std::make_unique<PyDecoder>();
  const WeightReader read(&self->keep_alive);
  DecoderWeights weights;
  weights.embed_tokens = read.linear(embed_tokens);
  weights.lm_head = read.linear(lm_head);
  const int64_t hidden = weights.embed_tokens.spec.k;
  weights.final_norm = read.floats(final_norm, "final_norm", {hidden});
  for (const py::handle& item : layers) {
    weights.layers.push_back(read_layer(read, item.cast<py::dict>(), hidden, head_dim));
  }
  self->decoder = std::make_unique<Decoder>(std::move(config), std::move(weights));
  return self;
}

py::array_t<float> run(PyDecoder& self, const py::list& batch, ThreadPool& pool, Output output,
                       StepTimes* times) {
  std::vector<std::vector<int32_t>> ids;  // what is checked must not change afterwards
  std::vector<Sequence> sequences;
  int64_t rows = 0;
  for (const py::handle& item : batch) {
    const auto [array, cache] = item.cast<std::pair<py::array, KvCache*>>();
    const int64_t n = array.size();
    const auto* data = array_data<int32_t>(array, "ids", {n}, "int32");
    ids.emplace_back(data, data + n);
    sequences.push_back({ids.back().data(), n, cache});
    rows += output == Output::kLastLogits ? 1 : n;
  }
  py::array_t<float> out({rows, self.decoder->width(output)});
  float* data = out.mutable_data();
  py::gil_scoped_release release;
  self.decoder->forward(sequences, output, pool, data, times);
  return out;
}

py::array_t<float> forward(PyDecoder& self, const py::list& batch, ThreadPool& pool,
                           const std::string& logits, StepTimes* times) {
  check_argument(logits == "last" || logits == "all", "logits must be 'last' or 'all', not '",
                 logits, "'");
  const Output output = logits == "all" ? Output::kAllLogits : Output::kLastLogits;
  return run(self, batch, pool, output, times);
}

py::array_t<float> hidden_states(PyDecoder& self, const py::list& batch, ThreadPool& pool) {
  return run(self, batch, pool, Output::kHiddenStates, nullptr);
}

}  // namespace

void bind_decoder(py::module_& module) {
  py::class_<ThreadPool>(module, "ThreadPool", "A team of threads that models share.")
      .def(py::init<int>(), "threads"_a)
      .def_property_readonly("threads", &ThreadPool::threads);

  py::class_<StepTimes>(module, "StepTimes", "Adds up what the parts of steps take.")
      .def(py::init<>())
      .def_property_readonly(
          "seconds",
          [](const StepTimes& self) {
            py::dict seconds;
            for (size_t i = 0; i < self.seconds().size(); ++i) {
              seconds[StepTimes::kNames[i]] = self.seconds()[i];
            }
            return seconds;
          },
          "By name of the part, in order.");

  py::class_<PyDecoder>(module, "Decoder",
                        "Const weights of one model; shared by every cache and thread.")
      .def(py::init(&make_decoder), py::kw_only(), "embed_tokens"_a, "lm_head"_a, "final_norm"_a,
           "layers"_a, "n_heads"_a, "n_kv_heads"_a, "head_dim"_a, "rotary_dim"_a, "rms_norm_eps"_a,
           "query_scalar"_a, "attention_softcap"_a, "logits_softcap"_a, "embedding_scale"_a,
           "activation"_a, "clip_qkv"_a, "experts_per_token"_a, "normalize_experts"_a, "ropes"_a,
           "tables"_a, "head_tables"_a)
      .def_property_readonly("vocab_size",
                             [](const PyDecoder& self) { return self.decoder->vocab(); })
      .def("forward", &forward, "batch"_a, "pool"_a, py::kw_only(), "logits"_a = "last",
           "times"_a = py::none(),
           "Appends to each cache its ids; logits of the last of each, or of all ids.")
      .def("hidden_states", &hidden_states, "batch"_a, "pool"_a,
           "The same; hidden states of all ids after the final norm.");
}

}  // namespace tmac
