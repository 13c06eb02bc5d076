#include "model/sampler.h"

#include <algorithm>
#include <tuple>

#include "bindings/linear.h"

namespace tmac {
namespace {

using namespace py::literals;

// Called for every token: what is right is seen fast, what is wrong is explained.
const float* logits_data(const py::array& logits) {
  if (py::isinstance<py::array_t<float, py::array::c_style>>(logits) && logits.ndim() == 1) {
    return static_cast<const float*>(logits.data());
  }
  return array_data<float>(logits, "logits", {logits.size()}, "float32");
}

// Holds the sampler and the logits, whatever becomes of the list that they come in; and recent.
using Row = std::tuple<py::object, py::array, std::vector<int32_t>>;

// Tokens as (id, log probability), errors as their texts.
py::list choose_each(const std::vector<Row>& rows, ThreadPool& pool) {
  std::vector<SampledRow> sampled;
  for (const auto& [object, logits, recent] : rows) {
    auto* sampler = &object.cast<Sampler&>();
    const auto same = [&](const SampledRow& row) { return row.sampler == sampler; };
    check_argument(std::none_of(sampled.begin(), sampled.end(), same),
                   "two rows must not have the same sampler");
    sampled.push_back({sampler, logits_data(logits), logits.size(), recent});
  }
  {
    py::gil_scoped_release release;
    sample_rows(&sampled, pool);
  }
  py::list results;
  for (const SampledRow& row : sampled) {
    if (row.error.empty()) {
      results.append(py::make_tuple(row.token.id, row.token.logprob));
    } else {
      results.append(row.error);
    }
  }
  return results;
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace

void bind_sampler(py::module_& module) {
  py::class_<Sampler>(module, "Sampler",
                      "Chooses tokens. Holds the random state; one thread at a time.")
      .def(py::init([](double temperature, int64_t top_k, double top_p, double min_p,
                       float repeat_penalty, double presence_penalty, double frequency_penalty,
                       std::vector<std::pair<int32_t, float>> logit_bias,
                       const std::array<uint64_t, 2>& state,
                       const std::array<uint64_t, 2>& increment) {
             SamplerOptions options{temperature,
                                    top_k,
                                    top_p,
                                    min_p,
                                    repeat_penalty,
                                    presence_penalty,
                                    frequency_penalty,
                                    std::move(logit_bias)};
             const Pcg64 random({state[0], state[1]}, {increment[0], increment[1]});
             return Sampler(std::move(options), random);
           }),
           py::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repeat_penalty"_a,
           "presence_penalty"_a, "frequency_penalty"_a, "logit_bias"_a, "state"_a, "increment"_a,
           "state and increment of numpy.random.PCG64, each as (high, low) 64 bits.")
      .def(
          "sample",
          [](Sampler& self, const py::array& logits, const std::vector<int32_t>& recent) {
            const TokenLogprob token = self.sample(logits_data(logits), logits.size(), recent);
            return py::make_tuple(token.id, token.logprob);
          },
          "logits"_a, "recent"_a, "The next token and its log probability under the logits.")
      .def(
          "distribution",
          [](Sampler& self, const py::array& logits, const std::vector<int32_t>& recent) {
            const Distribution found =
                self.distribution(logits_data(logits), logits.size(), recent);
            return py::make_tuple(to_array(found.ids), to_array(found.shares));
          },
          "logits"_a, "recent"_a, "Ids that may come next, and the probability of each.")
      .def(
          "draw",
          [](Sampler& self, const py::array& shares) {
            const auto* data = array_data<double>(shares, "shares", {shares.size()}, "float64");
            std::vector<double> sums(data, data + shares.size());
            return self.draw(&sums);
          },
          "shares"_a, "A random index, by shares of any sum above 0.")
      .def("uniform", &Sampler::uniform, "A random number in [0, 1).");

  module.def("sample_rows", &choose_each, "rows"_a, "pool"_a,
             "The same for several rows (sampler, logits, recent), shared out among threads: each "
             "(id, log probability), or the text of its error.");
  module.def(
      "log_probability",
      [](const py::array& logits, int64_t id) {
        return log_probability(logits_data(logits), logits.size(), id);
      },
      "logits"_a, "id"_a, "The logarithm of a token's softmax.");
  module.def(
      "most_likely",
      [](const py::array& logits, int64_t k) {
        py::list tokens;
        for (const TokenLogprob& token : most_likely(logits_data(logits), logits.size(), k)) {
          tokens.append(py::make_tuple(token.id, token.logprob));
        }
        return tokens;
      },
      "logits"_a, "k"_a, "The k most likely tokens, likeliest first, with log probabilities.");
}

}  // namespace tmac
