// Times the kernels alone, without JAX: a CUDA graph of many exchanges a device, new routing in each,
// replayed.
//
//   pplx_cuda_bench [--tokens 128,4096] [--quant none|fp8|fp8_ue8m0] [--dtype bf16|f16|f32] [--sms 8,16,24]
//                   [--hidden 7168] [--experts 256] [--topk 8] [--ranks 2] [--chunk 0] [--depth 1]
//                   [--iterations 20] [--replays 30] [--zero-tail] [--one-gpu]
//
// A line a configuration: median over replays of the slowest rank's time an exchange. Without --tokens and
// --quant: decode (128 tokens, fp8 there, bf16 back) and prefill (4096 tokens, bf16). With --one-gpu, or
// where there is only one, the ranks are streams of one GPU, which then has to hold all their blocks: those
// times show what kernels do, not what links do.
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <exception>
#include <numeric>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <string_view>

#include "xla_ffi/cuda/tests/cluster.h"

#ifdef PPLX_TRACE
namespace pplx::moe::cuda {
void print_dispatch_trace(int blocks);
void print_combine_trace(int blocks);
}  // namespace pplx::moe::cuda
#endif

namespace pplx::moe::cuda::testing {
namespace {

struct Options {
  std::vector<int> tokens, sms = {8, 16, 24, 48, 96};
  std::vector<Quant> quants;
  DType dtype = DType::kBFloat16;
  int hidden = 7168, experts = 256, top_k = 8, ranks = 2, chunk = 0, depth = 1;
  int iterations = 20, replays = 30;
  bool one_gpu = false, zero_tail = false;
};

struct Shape {
  int tokens;
  Quant quant;
};

constexpr const char* quant_name(Quant quant) {
  return quant == Quant::kNone ? "none" : quant == Quant::kFp8 ? "fp8" : "fp8_ue8m0";
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::vector<int> integers(const std::string& text) {
  std::vector<int> values;
  for (const std::string& part : split(text)) values.push_back(std::stoi(part));
  return values;
}

Quant quant_of(const std::string& name) {
  for (const Quant quant : {Quant::kNone, Quant::kFp8, Quant::kFp8Ue8m0}) {
    if (name == quant_name(quant)) return quant;
  }
  throw std::invalid_argument("--quant: none, fp8 or fp8_ue8m0, not " + name);
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--one-gpu") {
      options.one_gpu = true;
      continue;
    }
    if (i + 1 == count) throw std::invalid_argument(name + " needs a value, or is no option");
    const std::string value = arguments[++i];
    if (name == "--tokens") {
      options.tokens = integers(value);
    } else if (name == "--sms") {
      options.sms = integers(value);
    } else if (name == "--quant") {
      for (const std::string& part : split(value)) options.quants.push_back(quant_of(part));
    } else if (name == "--dtype") {
      if (value != "bf16" && value != "f16" && value != "f32")
        throw std::invalid_argument("--dtype: " + value);
      options.dtype = value == "f32" ? DType::kFloat32 : value == "f16" ? DType::kFloat16 : DType::kBFloat16;
    } else {
      int* const target = name == "--hidden"       ? &options.hidden
                          : name == "--experts"    ? &options.experts
                          : name == "--topk"       ? &options.top_k
                          : name == "--ranks"      ? &options.ranks
                          : name == "--chunk"      ? &options.chunk
                          : name == "--depth"      ? &options.depth
                          : name == "--iterations" ? &options.iterations
                          : name == "--replays"    ? &options.replays
                                                   : nullptr;
      if (target == nullptr) throw std::invalid_argument("no such option: " + name);
      *target = std::stoi(value);
    }
  }
  return options;
}

// One iteration's routing, and what its dispatch tells its combine.
struct Iteration {
  DeviceMemory indices, weights, home, source_slots, slot_start, slot_rows, ok, row_weights;

  Iteration(const MoeShape& shape, int tokens, int64_t rows)
      : indices(4 * int64_t{tokens} * shape.top_k),
        weights(4 * int64_t{tokens} * shape.top_k),
        home(4 * int64_t{tokens} * shape.top_k),
        source_slots(4 * int64_t{shape.rounds(tokens)} * shape.num_ranks),
        slot_start(4 * (int64_t{shape.num_ranks} * tokens + 1)),
        slot_rows(4 * int64_t{shape.num_ranks} * tokens * shape.entries()),
        ok(4),
        row_weights(4 * rows) {}

  Route route(int64_t rows) const {
    return {.home = home.as<int32_t>(),
            .source_slots = source_slots.as<int32_t>(),
            .slot_start = slot_start.as<int32_t>(),
            .slot_rows = slot_rows.as<int32_t>(),
            .ok = ok.as<int32_t>(),
            .rows = rows};
  }
};

// One rank's buffers. Rows are those of the worst case, as in prefill with rows=None.
class Load {
 public:
  Load(const Problem& problem, const MoeShape& shape, int iterations, uint64_t seed)
      : tokens_(problem.max_tokens),
        rows_(problem.row_count(tokens_)),
        x_(tokens_ * shape.row_bytes()),
        num_tokens_(4),
        map_(4 * int64_t{shape.physical_experts()}),
        out_tokens_(rows_ * shape.token_bytes()),
        out_scales_(rows_ * shape.scale_bytes()),
        y_(rows_ * shape.row_bytes()),
        group_sizes_(4 * int64_t{shape.experts_per_rank}),
        counts_(8),
        out_(tokens_ * shape.row_bytes()) {
    std::mt19937_64 rng(seed);
    copy(num_tokens_, &tokens_, 4);
    const std::vector<int32_t> map = problem.map();
    copy(map_, map.data(), 4 * map.size());
    // Plain numbers between 1 and 2, in any of the dtypes.
    std::vector<uint16_t> x(tokens_ * shape.row_bytes() / 2);
    for (uint16_t& half : x) half = static_cast<uint16_t>(0x3f80 | (rng() & 0x7f));
    copy(x_, x.data(), 2 * x.size());
    for (int i = 0; i < iterations; ++i) {
      iterations_.emplace_back(shape, tokens_, rows_);
      std::vector<int32_t> experts(problem.experts), indices;
      std::iota(experts.begin(), experts.end(), 0);
      for (int t = 0; t < tokens_; ++t) {
        for (int k = 0; k < problem.top_k; ++k) {
          std::swap(experts[k], experts[k + rng() % (problem.experts - k)]);
        }
        indices.insert(indices.end(), experts.begin(), experts.begin() + problem.top_k);
        count_copies(shape, map, &indices[indices.size() - problem.top_k]);
      }
      const std::vector<float> weights(indices.size(), 1.0F / static_cast<float>(problem.top_k));
      copy(iterations_.back().indices, indices.data(), 4 * indices.size());
      copy(iterations_.back().weights, weights.data(), 4 * weights.size());
    }
    copies_ /= iterations;
    pairs_ = static_cast<double>(tokens_) * problem.top_k;
  }

  void dispatch(const KernelCall& call, int iteration) const {
    const Iteration& it = iterations_[iteration];
    const DispatchSend send{.x = x_.as(),
                            .scales = nullptr,
                            .indices = it.indices.as<int32_t>(),
                            .weights = it.weights.as<float>(),
                            .num_tokens = num_tokens_.as<int32_t>(),
                            .expert_map = map_.as<int32_t>(),
                            .home = it.home.as<int32_t>()};
    const DispatchRecv recv{.tokens = out_tokens_.as(),
                            .scales = out_scales_.as(),
                            .row_weights = it.row_weights.as<float>(),
                            .group_sizes = group_sizes_.as<int32_t>(),
                            .num_rows = counts_.as<int32_t>(),
                            .num_dropped = counts_.as<int32_t>() + 1,
                            .route = it.route(rows_)};
    PPLX_MUST(cuda::dispatch(call, send, recv));
  }
  void combine(const KernelCall& call, int iteration) const {
    const Iteration& it = iterations_[iteration];
    const CombineSend send{.y = y_.as(), .row_weights = it.row_weights.as<float>(), .route = it.route(rows_)};
    const CombineRecv recv{.home = it.home.as<int32_t>(), .accumulate = nullptr, .out = out_.as()};
    PPLX_MUST(cuda::combine(call, send, recv));
  }
  bool sound(int iteration) const {
    int32_t ok = 0;
    PPLX_MUST(cudaMemcpy(&ok, iterations_[iteration].ok.as(), 4, cudaMemcpyDeviceToHost));
    return ok == 1;
  }
  // Rows that leave this rank in an exchange; (token, expert) pairs, which a plain exchange would move.
  double copies() const { return copies_; }
  double pairs() const { return pairs_; }

 private:
  static void copy(const DeviceMemory& to, const void* from, size_t bytes) {
    PPLX_MUST(cudaMemcpy(to.as(), from, bytes, cudaMemcpyHostToDevice));
  }
  void count_copies(const MoeShape& shape, const std::vector<int32_t>& map, const int32_t* indices) {
    std::vector<int32_t> home;
    for (int k = 0; k < shape.top_k; ++k) {
      home.push_back(static_cast<int32_t>(std::find(map.begin(), map.end(), indices[k]) - map.begin()));
    }
    int32_t ranks[kMaxTopK];
    const int count = destinations(home.data(), shape.top_k, shape.experts_per_rank, ranks);
    for (int i = 0; i < count; ++i) copies_ += ranks[i] != shape.rank;
  }

  int tokens_;
  int64_t rows_;
  DeviceMemory x_, num_tokens_, map_, out_tokens_, out_scales_, y_, group_sizes_, counts_, out_;
  std::vector<Iteration> iterations_;
  double copies_ = 0, pairs_ = 0;
};

enum class What { kDispatch, kCombine, kPair };

class Bench {
 public:
  Bench(const Options& options, const Shape& what, const std::vector<int>& devices, int sms)
      : options_(options),
        what_(what),
        sms_(sms),
        problem_(problem(options, what)),
        cluster_(problem_, {.num_sms = sms, .devices = devices, .adjust_shape = [&](MoeShape& shape) {
                              shape.zero_tail = options.zero_tail;
                            }}) {
    cluster_.each([&](int rank) {
      loads_.push_back(
          std::make_unique<Load>(problem_, cluster_[rank].shape(), options.iterations, 1 + rank));
    });
  }

  void print() {
    const double dispatch = microseconds(What::kDispatch), combine = microseconds(What::kCombine),
                 pair = microseconds(What::kPair);
    for (int rank = 0; rank < cluster_.size(); ++rank) {
      check(rank);
    }
    const MoeShape& shape = cluster_[0].shape();
    const double copies = mean(&Load::copies), pairs = mean(&Load::pairs);
    const double there = copies * static_cast<double>(shape.dispatch_stride());
    const double back = copies * static_cast<double>(shape.home_stride());
    std::printf("%7d %-9s %4d %10.1f %10.1f %10.1f %9.2f %9.2f %9.2f %8.1f %8.1f\n", what_.tokens,
                quant_name(what_.quant), sms_, dispatch, combine, pair, there / 1e6, back / 1e6,
                pairs * static_cast<double>(shape.token_bytes() + shape.row_bytes()) / 1e6,
                there / dispatch / 1e3, back / combine / 1e3);
    std::fflush(stdout);
#ifdef PPLX_TRACE
    for (int rank = 0; rank < cluster_.size(); ++rank) {
      PPLX_MUST(cudaSetDevice(cluster_.device(rank)));
      print_dispatch_trace(sms_);
      print_combine_trace(sms_);
    }
#endif
  }
  static void print_head() {
    std::printf("%7s %-9s %4s %10s %10s %10s %9s %9s %9s %8s %8s\n", "tokens", "quant", "sms", "dispatch us",
                "combine us", "pair us", "there MB", "back MB", "logical", "GB/s", "GB/s");
  }

 private:
  static Problem problem(const Options& options, const Shape& what) {
    return {.ranks = options.ranks,
            .experts = options.experts,
            .top_k = options.top_k,
            .hidden = options.hidden,
            .max_tokens = what.tokens,
            .chunk = options.chunk,
            .depth = options.depth,
            .dtype = options.dtype,
            .quant = what.quant};
  }

  void check(int rank) const {
    const FaultRecord& failure = cluster_[rank].host().failure;
    if (failure.complete != 0) {
      throw std::runtime_error("rank " + std::to_string(rank) + " failed: fault " +
                               std::to_string(static_cast<int>(failure.fault)) + ", culprit " +
                               std::to_string(failure.culprit));
    }
    for (int i = 0; i < options_.iterations; ++i) {
      if (!loads_[rank]->sound(i)) throw std::runtime_error("a dispatch is not ok");
    }
  }

  double mean(double (Load::*of)() const) const {
    double sum = 0;
    for (const auto& load : loads_) sum += ((*load).*of)();
    return sum / static_cast<double>(loads_.size());
  }

  void record(int rank, What what) const {
    const KernelCall there = cluster_[rank].call(Kind::kDispatch, what_.tokens);
    const KernelCall back = cluster_[rank].call(Kind::kCombine, what_.tokens);
    for (int i = 0; i < options_.iterations; ++i) {
      if (what != What::kCombine) loads_[rank]->dispatch(there, i);
      if (what != What::kDispatch) loads_[rank]->combine(back, i);
    }
  }

  // Of one exchange (or pair), in the middle of many.
  double microseconds(What what) const {
    std::barrier start(cluster_.size());
    std::vector<std::vector<float>> times(cluster_.size(), std::vector<float>(options_.replays));
    std::vector<std::exception_ptr> errors(cluster_.size());
    std::vector<std::thread> threads;
    for (int rank = 0; rank < cluster_.size(); ++rank) {
      threads.emplace_back([&, rank] {
        try {
          measure(rank, what, start, times[rank]);
        } catch (...) {
          // Those at the barrier must not wait for this one.
          errors[rank] = std::current_exception();
          start.arrive_and_drop();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& error : errors) {
      if (error) std::rethrow_exception(error);
    }
    std::vector<float> slowest;
    for (int replay = 0; replay < options_.replays; ++replay) {
      float most = 0;
      for (const auto& of_rank : times) most = std::max(most, of_rank[replay]);
      slowest.push_back(most);
    }
    std::nth_element(slowest.begin(), slowest.begin() + slowest.size() / 2, slowest.end());
    return 1000.0 * slowest[slowest.size() / 2] / options_.iterations;
  }

  void measure(int rank, What what, std::barrier<>& start, std::vector<float>& times) const {
    PPLX_MUST(cudaSetDevice(cluster_.device(rank)));
    const cudaStream_t stream = cluster_[rank].stream();
    const Graph graph(stream, [&] { record(rank, what); });
    const Event began, ended;
    PPLX_MUST(cudaStreamSynchronize(stream));
    for (int replay = -3; replay < options_.replays; ++replay) {
      start.arrive_and_wait();
      PPLX_MUST(cudaEventRecord(began.get(), stream));
      graph.launch(stream);
      PPLX_MUST(cudaEventRecord(ended.get(), stream));
      PPLX_MUST(cudaStreamSynchronize(stream));
      if (replay >= 0) PPLX_MUST(cudaEventElapsedTime(&times[replay], began.get(), ended.get()));
    }
  }

  const Options& options_;
  Shape what_;
  int sms_;
  Problem problem_;
  Cluster cluster_;
  std::vector<std::unique_ptr<Load>> loads_;
};

std::vector<Shape> shapes(const Options& options) {
  if (options.tokens.empty() && options.quants.empty()) return {{128, Quant::kFp8}, {4096, Quant::kNone}};
  std::vector<Shape> all;
  const auto tokens = options.tokens.empty() ? std::vector<int>{128, 4096} : options.tokens;
  const auto quants = options.quants.empty() ? std::vector<Quant>{Quant::kNone} : options.quants;
  for (const int count : tokens) {
    for (const Quant quant : quants) all.push_back({count, quant});
  }
  return all;
}

int run(const Options& options) {
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) {
    std::fprintf(stderr, "pplx_cuda_bench: there is no GPU here\n");
    return 77;
  }
  std::vector<int> devices(options.ranks, 0);
  const bool spread = !options.one_gpu && gpus >= options.ranks;
  if (spread) std::iota(devices.begin(), devices.end(), 0);
  cudaDeviceProp properties;
  PPLX_MUST(cudaGetDeviceProperties(&properties, 0));
  std::printf("%d ranks on %d x %s, hidden %d, top-%d of %d, medians of %d replays of %d exchanges\n",
              options.ranks, spread ? options.ranks : 1, properties.name, options.hidden, options.top_k,
              options.experts, options.replays, options.iterations);
  Bench::print_head();
  for (const Shape& shape : shapes(options)) {
    for (const int sms : options.sms) {
      if (!spread && sms * options.ranks > properties.multiProcessorCount) continue;
      Bench(options, shape, devices, sms).print();
    }
  }
  return 0;
}

}  // namespace
}  // namespace pplx::moe::cuda::testing

int main(int count, char** arguments) {
  // A queue for each stream: a rank's kernel behind another's would never start.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  try {
    return pplx::moe::cuda::testing::run(pplx::moe::cuda::testing::parse(count, arguments));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pplx_cuda_bench: %s\n", error.what());
    return 1;
  }
}
