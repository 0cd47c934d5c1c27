// Exact global top-k on CUDA: three histogram passes over all score tensors where they lie (no concatenation, no sort)
// narrow the k-th largest value down digit by digit, a fourth packs the masks, ties at the threshold go to the first in
// (tensor, flat index) order. What one pass finds stays on the device for the next: nothing waits for the host, and
// every sum is an integer, so the result is the same each time. Definition: fade_kernels/reference.py; digits and
// validity of a float: common/radix.h.
#include "common/bitmask.h"
#include "common/radix.h"
#include "cuda/kernel.h"

namespace fade {
namespace {

// Elements that a block counts at a time.
constexpr int kCountElements = 16384;
// Mask words that a block packs, and each of its warps: the unit whose ties are counted and taken.
constexpr int kPackWords = 512;
constexpr int kWarpPackWords = kPackWords / kWarps;
// Copies of the histogram in shared memory, one for every kCopies-th lane: the exponents of saliency are so much alike
// that lanes of one warp meet in the same bins. 32 KiB for 2048 bins.
constexpr int kCopies = 4;
constexpr int kScanThreads = 1024;

struct Scores {
  const uint32_t* bits;
  uint32_t* words;
  int64_t elements, columns, width;  // width: mask words per row
  int64_t tensor;                    // index among all
  int64_t end;                       // of Table
};

struct CountPass {
  Digit digit;
  bool first;  // nothing is known yet; scores that are not selectable are looked for
};

// What the passes know, and how they hand it on. All zeros before the first.
struct State {
  unsigned long long needed;   // how many of the scores that share the prefix are selected
  unsigned long long invalid;  // ~(index of the first tensor with NaN or a negative value), 0 if there is none
  uint32_t prefix;             // the digits of the k-th largest score found so far
  int32_t above;               // after the last pass: keys above it are selected
  int32_t tie;                 // and as many keys equal to it as are needed; -1: no key is
  unsigned long long bins[kMaxBins];
};

// A thread's view of the histogram. Equal digits in a row become one addition: a tensor of zeros costs no atomics.
struct Counter {
  uint32_t* bins;
  uint32_t digit = 0, run = 0;
  __device__ void add(uint32_t next) {
    if (next != digit) {
      flush();
      digit = next;
    }
    ++run;
  }
  __device__ void flush() {
    if (run != 0) atomicAdd(bins + digit * kCopies, run);
    run = 0;
  }
};

__device__ __forceinline__ void count_one(uint32_t bits, const CountPass& pass, uint32_t prefix, Counter& counter,
                                          bool& selectable) {
  const uint32_t key = selection_key(bits);
  if (pass.first) selectable &= is_selectable(bits);
  if (pass.digit.follows(key, prefix)) counter.add(pass.digit.of(key));
}

// Adds the digits of all scores that share the prefix to state->bins. Blocks loop over chunks of elements; a bin of a
// block holds 32 bits, enough for 2^32 elements a block.
__global__ void __launch_bounds__(kThreads)
    count_digits(const __grid_constant__ Table<Scores> table, State* state, CountPass pass) {
  __shared__ uint32_t histogram[kMaxBins * kCopies];
  const int bins = 1 << pass.digit.bits;
  for (int i = threadIdx.x; i < bins * kCopies; i += kThreads) histogram[i] = 0;
  __syncthreads();

  const uint32_t prefix = state->prefix;
  Counter counter{histogram + threadIdx.x % kCopies};
  for (int64_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int64_t i = table.find(chunk);
    const Scores& scores = table.entries[i];
    const int64_t begin = (chunk - table.begin(i)) * kCountElements;
    const uint32_t* bits = scores.bits + begin;
    const int n = static_cast<int>(min(scores.elements - begin, static_cast<int64_t>(kCountElements)));
    const int head = min(n, static_cast<int>(-reinterpret_cast<uintptr_t>(bits) / sizeof(uint32_t) % 4));
    const int vectors = (n - head) / 4, tail = head + vectors * 4;
    const auto* quads = reinterpret_cast<const uint4*>(bits + head);

    bool selectable = true;
    const int t = threadIdx.x;
    if (t < head) count_one(bits[t], pass, prefix, counter, selectable);
    if (tail + t < n) count_one(bits[tail + t], pass, prefix, counter, selectable);
#pragma unroll 4
    for (int v = t; v < vectors; v += kThreads) {
      const uint4 quad = quads[v];
      count_one(quad.x, pass, prefix, counter, selectable);
      count_one(quad.y, pass, prefix, counter, selectable);
      count_one(quad.z, pass, prefix, counter, selectable);
      count_one(quad.w, pass, prefix, counter, selectable);
    }
    if (!selectable) atomicMax(&state->invalid, ~static_cast<unsigned long long>(scores.tensor));
  }
  counter.flush();
  __syncthreads();

  for (int bin = threadIdx.x; bin < bins; bin += kThreads) {
    unsigned long long sum = 0;
    for (int copy = 0; copy < kCopies; ++copy) sum += histogram[bin * kCopies + copy];
    if (sum != 0) atomicAdd(state->bins + bin, sum);
  }
}

// Finds the digit of the k-th largest score: the bin in which the counts from the top reach state->needed. Leaves the
// bins at 0 for the next pass. One block.
__global__ void __launch_bounds__(kThreads)
    find_digit(State* state, CountPass pass, unsigned long long k, float* threshold, int64_t* invalid) {
  constexpr int kShare = kMaxBins / kThreads;
  const unsigned long long needed = pass.first ? k : state->needed;
  // Thread t holds bins top, top - 1, ..., top - kShare + 1. Those beyond a shorter digit hold 0.
  const int top = kMaxBins - 1 - static_cast<int>(threadIdx.x) * kShare;
  unsigned long long counts[kShare], sum = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    counts[i] = state->bins[top - i];
    state->bins[top - i] = 0;
    sum += counts[i];
  }
  unsigned long long above = block_exclusive_scan(sum);
  const bool last = pass.digit.shift == 0;
  if (above < needed && needed <= above + sum) {  // one thread
    int skipped = 0;
    bool reached = false, all_ties = false;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (reached) continue;
      reached = needed <= above + counts[i];
      all_ties = needed == above + counts[i];
      if (!reached) above += counts[i], ++skipped;
    }
    const uint32_t key = state->prefix | static_cast<uint32_t>(top - skipped) << pass.digit.shift;
    state->prefix = key;
    state->needed = needed - above;
    if (last) {
      state->above = static_cast<int32_t>(key) - (all_ties ? 1 : 0);
      state->tie = all_ties ? -1 : static_cast<int32_t>(key);
      *threshold = bit_cast<float>(key);
    }
  }
  if (!last) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    *invalid = state->invalid == 0 ? -1 : static_cast<int64_t>(~state->invalid);
    if (state->invalid != 0) {
      *threshold = 0.0f;
      state->above = 0x7FFFFFFF;  // above every key: the masks stay empty
      state->tie = -1;
    }
  }
}

// Where a warp of a packing block works: its words of one tensor, in flat-index order.
struct WarpWords {
  const Scores& scores;
  int64_t begin, end;
};

__device__ __forceinline__ WarpWords words_of_warp(const Table<Scores>& table) {
  const int64_t i = table.find(blockIdx.x);
  const Scores& scores = table.entries[i];
  const int64_t words = scores.elements / scores.columns * scores.width;
  const int64_t warp = (blockIdx.x - table.begin(i)) * kWarps + threadIdx.x / kWarpSize;
  return {scores, min(words, warp * kWarpPackWords), min(words, (warp + 1) * kWarpPackWords)};
}

// The key of this lane's column in a word; beyond the end of the row -2, which is neither above a threshold nor a tie.
__device__ __forceinline__ int32_t key_of_lane(const Scores& scores, const WordCursor& at) {
  const int64_t column = at.word * kWordBits + threadIdx.x % kWarpSize;
  if (column >= scores.columns) return -2;
  return static_cast<int32_t>(selection_key(scores.bits[at.row * scores.columns + column]));
}

// Writes the words of all scores above the threshold and counts the ties of each block.
__global__ void __launch_bounds__(kThreads)
    pack_above(const __grid_constant__ Table<Scores> table, const State* state, int64_t* ties) {
  __shared__ int block_ties;
  if (threadIdx.x == 0) block_ties = 0;
  __syncthreads();
  const int32_t above = state->above, tie = state->tie;
  const WarpWords own = words_of_warp(table);
  WordCursor at(own.begin, own.scores.width);
  int count = 0;
#pragma unroll 4
  for (int64_t w = own.begin; w < own.end; ++w, at.next()) {
    const int32_t key = key_of_lane(own.scores, at);
    const uint32_t word = __ballot_sync(kAllLanes, key > above);
    if (threadIdx.x % kWarpSize == 0) own.scores.words[w] = word;
    count += key == tie;
  }
  count = warp_sum(count);
  if (threadIdx.x % kWarpSize == 0 && count != 0) atomicAdd(&block_ties, count);
  __syncthreads();
  if (threadIdx.x == 0) ties[table.first_chunk + blockIdx.x] = block_ties;
}

// ties[b] becomes the number of ties in the blocks before b. One block: every thread sums a range, the block scans the
// sums, every thread fills in its range.
__global__ void __launch_bounds__(kScanThreads) scan_ties(const State* state, int64_t* ties, int64_t blocks) {
  if (state->tie < 0) return;
  const int64_t share = (blocks + kScanThreads - 1) / kScanThreads;
  const int64_t begin = min(blocks, threadIdx.x * share), end = min(blocks, begin + share);
  int64_t sum = 0;
  for (int64_t b = begin; b < end; ++b) sum += ties[b];
  int64_t before = block_exclusive_scan(sum);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t count = ties[b];
    ties[b] = before;
    before += count;
  }
}

// Sets the ties that are still needed, in order: blocks whose predecessors hold enough of them have nothing to do.
__global__ void __launch_bounds__(kThreads)
    take_ties(const __grid_constant__ Table<Scores> table, const State* state, const int64_t* ties) {
  const int32_t tie = state->tie;
  if (tie < 0) return;
  const int64_t before = ties[table.first_chunk + blockIdx.x];
  int64_t quota = static_cast<int64_t>(state->needed) - before;
  if (quota <= 0) return;

  __shared__ uint32_t tie_words[kPackWords];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  uint32_t* own_ties = tie_words + warp * kWarpPackWords;
  const WarpWords own = words_of_warp(table);
  WordCursor at(own.begin, own.scores.width);
  int count = 0;
  for (int64_t w = own.begin; w < own.end; ++w, at.next()) {
    const uint32_t word = __ballot_sync(kAllLanes, key_of_lane(own.scores, at) == tie);
    if (lane == 0) own_ties[w - own.begin] = word;
    count += __popc(word);
  }
  // Every lane of a warp holds the warp's count: one lane of each enters the scan, and all read the first lane's sum.
  const int earlier = block_exclusive_scan(lane == 0 ? count : 0);
  quota -= __shfl_sync(kAllLanes, earlier, 0);
  if (lane != 0) return;
  for (int64_t w = own.begin; w < own.end && quota > 0; ++w) {
    const uint32_t word = own_ties[w - own.begin];
    if (word != 0) own.scores.words[w] |= lowest_bits(word, quota);
    quota -= __popc(word);
  }
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> select_top_k(std::vector<Tensor> tensors, int64_t k) {
  STD_TORCH_CHECK(!tensors.empty(), "there are no scores to select from");
  const Device device(tensors[0]);
  std::vector<Tensor> dense, words;
  std::vector<Scores> scores;
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "scores[", i, "] must be float32");
    STD_TORCH_CHECK(tensor.dim() >= 2, "scores[", i, "] must have at least two dimensions");
    STD_TORCH_CHECK(same_cuda_device(tensor, tensors[0]), "scores[", i, "] and scores[0] are not on one CUDA device");
    const int64_t columns = flat_columns(tensor), width = words_per_row(columns);
    dense.push_back(as_dense(tensor));
    words.push_back(torch::stable::new_empty(tensor, {tensor.size(0), width}, ScalarType::Int));
    scores.push_back({read<uint32_t>(dense[i]), write<uint32_t>(words[i]), tensor.numel(), columns, width,
                      static_cast<int64_t>(i), 0});
    total += tensor.numel();
  }
  STD_TORCH_CHECK(k >= 1 && k <= total, "k must be between 1 and ", total, ", not ", k);
  const Tensor threshold = torch::stable::new_empty(tensors[0], std::vector<int64_t>{}, ScalarType::Float);
  const Tensor invalid = torch::stable::new_empty(tensors[0], std::vector<int64_t>{}, ScalarType::Long);
  Tensor memory = torch::stable::new_empty(tensors[0], {sizeof(State) / sizeof(int64_t)}, ScalarType::Long);
  auto* state = reinterpret_cast<State*>(write<int64_t>(torch::stable::zero_(memory)));

  const auto count_chunks = [](const Scores& s) { return (s.elements + kCountElements - 1) / kCountElements; };
  const std::vector<Table<Scores>> count_tables = make_tables(scores, count_chunks);
  // About two waves: every block merges its histogram once, and the last ones to start are few.
  const int64_t blocks = device.multiprocessors() * 16;
  for (int pass = 0; pass < kPasses; ++pass) {
    const CountPass count{kPassDigits[pass], pass == 0};
    for (const Table<Scores>& table : count_tables) {
      device.launch("select_top_k, histogram", count_digits, std::min(blocks, table.chunks()), kThreads, table, state,
                    count);
    }
    device.launch("select_top_k, digit", find_digit, 1, kThreads, state, count, k, write<float>(threshold),
                  write<int64_t>(invalid));
  }

  const auto pack_blocks = [](const Scores& s) {
    return s.elements == 0 ? 0 : (s.elements / s.columns * s.width + kPackWords - 1) / kPackWords;
  };
  const std::vector<Table<Scores>> pack_tables = make_tables(scores, pack_blocks);
  const int64_t all_blocks = pack_tables.back().first_chunk + pack_tables.back().chunks();
  const Tensor ties = torch::stable::new_empty(tensors[0], {all_blocks}, ScalarType::Long);
  for (const Table<Scores>& table : pack_tables) {
    device.launch("select_top_k, pack", pack_above, table.chunks(), kThreads, table, state, write<int64_t>(ties));
  }
  device.launch("select_top_k, ties", scan_ties, 1, kScanThreads, state, write<int64_t>(ties), all_blocks);
  for (const Table<Scores>& table : pack_tables) {
    device.launch("select_top_k, take ties", take_ties, table.chunks(), kThreads, table, state, read<int64_t>(ties));
  }
  return {words, threshold, invalid};
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CUDA, m) { m.impl("select_top_k", TORCH_BOX(&fade::select_top_k)); }
