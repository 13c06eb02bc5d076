// Runs test cases that tests/selftest_program.py wrote, so that the suite reaches instruction sets
// that only an emulator offers, builds with sanitizers, and kernels without a Python binding.
//
//   tmac_selftest isas                        the instruction sets that run here, one a line
//   tmac_selftest run ISA CASES RESULTS       every case of one file, results into another
//   tmac_selftest stress ROUNDS               the thread pool under stress
//
// CASES is a sequence of records: int64 fields, float fields, arrays, without padding, in the
// byte order of the machine (little-endian on all that we build for). RESULTS is the outputs.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "core/check.h"
#include "ops/linear.h"
#include "stress.h"

namespace tmac {
namespace {

class Reader {
 public:
  explicit Reader(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    require(file.good(), "cannot read " + path);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }

  bool done() const { return at_ == bytes_.size(); }
  int64_t integer() { return array<int64_t>(1)[0]; }
  float real() { return array<float>(1)[0]; }
  // A copy of its own, so that reads past its end are seen by AddressSanitizer.
  template <typename T>
  std::vector<T> array(int64_t n) {
    const size_t size = static_cast<size_t>(n) * sizeof(T);
    require(n >= 0 && size <= bytes_.size() - at_, "the file of cases is cut short");
    std::vector<T> out(static_cast<size_t>(n));
    if (size > 0) std::memcpy(out.data(), bytes_.data() + at_, size);
    at_ += size;
    return out;
  }

 private:
  std::vector<char> bytes_;
  size_t at_ = 0;
};

class Writer {
 public:
  explicit Writer(const std::string& path) : file_(path, std::ios::binary) {
    require(file_.good(), "cannot write " + path);
  }
  template <typename T>
  void array(const T* data, int64_t n) {
    file_.write(reinterpret_cast<const char*>(data),
                static_cast<std::streamsize>(n) * static_cast<std::streamsize>(sizeof(T)));
  }
  template <typename T>
  void array(const std::vector<T>& data) {
    array(data.data(), static_cast<int64_t>(data.size()));
  }
  void finish() {
    file_.close();
    require(file_.good(), "cannot write the results");
  }

 private:
  std::ofstream file_;
};

// A matrix as cases hold it: spec, codes [m, k], scales [m, n_groups, n_scales], offsets [m,
// n_groups].
struct Matrix {
  explicit Matrix(Reader& in) {
    spec.m = in.integer();
    spec.k = in.integer();
    spec.bits = static_cast<int>(in.integer());
    spec.encoding = static_cast<Encoding>(in.integer());
    spec.group_size = in.integer();
    spec.offset_kind = static_cast<OffsetKind>(in.integer());
    spec.zero = in.real();
    spec.scale_kind = static_cast<ScaleKind>(in.integer());
    spec.scale = in.real();
    check_spec(spec);
    const int64_t constants = spec.m * spec.n_groups();
    const bool has_offsets = spec.offset_kind != OffsetKind::kNone;
    codes = in.array<uint8_t>(spec.m * spec.k);
    scales = in.array<uint16_t>(constants * spec.n_scales());
    offsets = in.array<uint16_t>(has_offsets ? constants : 0);
    packed = AlignedBuffer<uint8_t>(spec.packed_bytes());
    pack(spec, codes.data(), scales.data(), offsets.data(), packed.data());
  }

  LinearSpec spec;
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales, offsets;
  AlignedBuffer<uint8_t> packed;
};

// -> y [n, m]
void run_linear(Reader& in, Writer& out) {
  const Matrix w(in);
  const auto tables = static_cast<Tables>(in.integer());
  ThreadPool pool(static_cast<int>(in.integer()));
  const int64_t n = in.integer();
  const auto x = in.array<float>(n * w.spec.k);
  std::vector<float> y(static_cast<size_t>(n * w.spec.m));
  linear_forward({w.spec, w.packed.data()}, tables, x.data(), n, y.data(), pool);
  out.array(y);
}

// -> codes [m, k], scales, offsets [m, n_groups] after packing and unpacking; weights [m, k]
void run_layout(Reader& in, Writer& out) {
  const Matrix w(in);
  std::vector<uint8_t> codes(w.codes.size());
  std::vector<uint16_t> scales(w.scales.size()), offsets(w.offsets.size());
  unpack(w.spec, w.packed.data(), codes.data(), scales.data(), offsets.data());
  out.array(codes);
  out.array(scales);
  out.array(offsets);
  std::vector<float> row(static_cast<size_t>(w.spec.k));
  for (int64_t r = 0; r < w.spec.m; ++r) {
    dequantize_row(w.spec, w.packed.data(), r, row.data());
    out.array(row);
  }
}

void run_rms_norm(Reader& in, Writer& out) {
  const int64_t n = in.integer();
  const float eps = in.real();
  const auto x = in.array<float>(n), weight = in.array<float>(n);
  std::vector<float> y(x.size());
  vector_kernels().rms_norm(x.data(), weight.data(), n, eps, y.data());
  out.array(y);
}

using Gated = void (*)(float* gate, const float* up, int64_t n);

template <Gated VectorKernels::* kMember>
void run_gated(Reader& in, Writer& out) {
  const int64_t n = in.integer();
  auto gate = in.array<float>(n);
  const auto up = in.array<float>(n);
  (vector_kernels().*kMember)(gate.data(), up.data(), n);
  out.array(gate);
}

void run_soft_cap(Reader& in, Writer& out) {
  const int64_t n = in.integer();
  const float cap = in.real();
  auto x = in.array<float>(n);
  vector_kernels().soft_cap(x.data(), n, cap);
  out.array(x);
}

void run_add(Reader& in, Writer& out) {
  const int64_t n = in.integer();
  auto x = in.array<float>(n);
  const auto y = in.array<float>(n);
  vector_kernels().add(x.data(), y.data(), n);
  out.array(x);
}

void run_sum_exponentials(Reader& in, Writer& out) {
  const int64_t n = in.integer();
  const float largest = in.real();
  const auto x = in.array<float>(n);
  const float sum = vector_kernels().sum_exponentials(x.data(), n, largest);
  out.array(&sum, 1);
}

// The cache of one head.
struct HeadCache {
  HeadCache(KvType keys_type, KvType values_type, int64_t n, int64_t head_dim)
      : shape{keys_type, values_type, head_dim},
        capacity(round_up(n, kAttendBlock)),
        keys(static_cast<size_t>(capacity * shape.vector_bytes(keys_type))),
        values(static_cast<size_t>(capacity * shape.vector_bytes(values_type))),
        key_ranges(static_cast<size_t>(capacity * shape.ranges(keys_type))),
        value_ranges(static_cast<size_t>(capacity * shape.ranges(values_type))),
        near_keys(static_cast<size_t>(kNear * shape.near_bytes(keys_type))),
        near_values(static_cast<size_t>(kNear * shape.near_bytes(values_type))),
        scratch(static_cast<size_t>(shape.dims())) {}

  KvHead head() {
    return {keys.data(),       values.data(),       near_keys.data(), near_values.data(),
            key_ranges.data(), value_ranges.data(), capacity};
  }

  KvShape shape;
  int64_t capacity;
  std::vector<uint8_t> keys, values;
  std::vector<uint16_t> key_ranges, value_ranges;
  std::vector<uint8_t> near_keys, near_values;
  std::vector<float> scratch;
};

// -> x as a cache of halves stores it
void run_to_half(Reader& in, Writer& out) {
  const int64_t n = in.integer();
  const auto x = in.array<float>(n);
  HeadCache cache(KvType::kF16, KvType::kF16, 1, n);
  vector_kernels().store_value(cache.shape, cache.head(), 0, x.data(), cache.scratch.data());
  out.array(reinterpret_cast<const uint16_t*>(cache.values.data()), n);
}

// -> [queries, head_dim]
void run_attend(Reader& in, Writer& out) {
  const VectorKernels& isa = vector_kernels();
  const auto keys_type = static_cast<KvType>(in.integer());
  const auto values_type = static_cast<KvType>(in.integer());
  const int64_t n = in.integer(), head_dim = in.integer(), count = in.integer();
  const int64_t near = in.integer();
  const float scale = in.real(), softcap = in.real();
  const auto first = in.array<int64_t>(count), end = in.array<int64_t>(count);
  const auto q = in.array<float>(count * head_dim);
  const auto keys = in.array<float>(n * head_dim), values = in.array<float>(n * head_dim);

  HeadCache cache(keys_type, values_type, n, head_dim);
  const KvShape& shape = cache.shape;
  for (int64_t t = 0; t < n; ++t) {
    isa.store_key(shape, cache.head(), t, keys.data() + t * head_dim, cache.scratch.data());
    isa.store_value(shape, cache.head(), t, values.data() + t * head_dim, cache.scratch.data());
  }
  std::vector<float> asked(static_cast<size_t>(count * shape.query_floats()));
  for (int64_t i = 0; i < count; ++i) {
    isa.prepare_query(shape, q.data() + i * head_dim, asked.data() + i * shape.query_floats());
  }
  const AttendQueries queries{count, asked.data(), first.data(), end.data(), near, scale, softcap};
  std::vector<float> states(static_cast<size_t>(count * shape.state_floats())), following = states;
  for (int64_t begin = first[0] / kAttendPart * kAttendPart; begin < n; begin += kAttendPart) {
    const bool is_first = begin <= first[0];
    float* into = is_first ? states.data() : following.data();
    isa.attend(shape, cache.head(), queries, begin, std::min(begin + kAttendPart, n), into);
    for (int64_t i = 0; i < count && !is_first; ++i) {
      const int64_t at = i * shape.state_floats();
      isa.merge_attended(shape, states.data() + at, following.data() + at);
    }
  }
  std::vector<float> y(static_cast<size_t>(head_dim));
  for (int64_t i = 0; i < count; ++i) {
    isa.finish_attended(shape, states.data() + i * shape.state_floats(), y.data());
    out.array(y);
  }
}

void run_cases(const std::string& isa, const std::string& cases, const std::string& results) {
  const std::map<std::string, void (*)(Reader&, Writer&)> operations = {
      {"linear", run_linear},
      {"layout", run_layout},
      {"rms_norm", run_rms_norm},
      {"silu_multiply", run_gated<&VectorKernels::silu_multiply>},
      {"gelu_tanh_multiply", run_gated<&VectorKernels::gelu_tanh_multiply>},
      {"relu2_multiply", run_gated<&VectorKernels::relu2_multiply>},
      {"soft_cap", run_soft_cap},
      {"add", run_add},
      {"sum_exponentials", run_sum_exponentials},
      {"to_half", run_to_half},
      {"attend", run_attend}};
  use_isa(isa);
  require(kernels().name == isa, isa + " did not become active");
  Reader in(cases);
  Writer out(results);
  while (!in.done()) {
    const auto name = in.array<char>(in.integer());
    operations.at(std::string(name.begin(), name.end()))(in, out);
  }
  out.finish();
}

void print_isas() {
  for (const IsaInfo& info : isas()) {
    if (info.usable) std::cout << info.name << '\n';
  }
}

}  // namespace
}  // namespace tmac

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::string command = arguments.empty() ? "" : arguments[0];
  try {
    if (command == "isas" && arguments.size() == 1) {
      tmac::print_isas();
    } else if (command == "run" && arguments.size() == 4) {
      tmac::run_cases(arguments[1], arguments[2], arguments[3]);
    } else if (command == "stress" && arguments.size() == 2) {
      tmac::stress_thread_pool(std::atoi(arguments[1].c_str()));
    } else {
      std::cerr << "usage: tmac_selftest isas | run ISA CASES RESULTS | stress ROUNDS\n";
      return 2;
    }
  } catch (const std::exception& error) {
    std::cerr << "tmac_selftest: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
