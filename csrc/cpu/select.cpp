// Exact global top-k on the CPU: two histogram passes over all score tensors where they lie (no concatenation, no sort)
// give the k-th largest value, a third pass packs the masks, ties at the threshold go to the first in (tensor, flat index)
// order. Definition: fade_kernels/reference.py; digits and validity of a float: common/radix.h.
#include <algorithm>
#include <mutex>

#include "common/bitmask.h"
#include "common/radix.h"
#include "cpu/kernel.h"

namespace fade {
namespace {

// Histograms alive at a time, 256 KiB each; more threads than this only wait for memory.
constexpr int64_t kMaxHistogramTasks = 32;
// A 32-bit bin must not overflow within a task.
constexpr int64_t kMaxTaskElements = int64_t{1} << 31;
constexpr int64_t kBlockWords = 2048;

struct Scores {
  Tensor dense;
  const uint32_t* bits;
  int64_t rows, columns, width;  // width: mask words per row
  int64_t numel() const { return rows * columns; }
};

Scores as_scores(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "scores must be float32");
  STD_TORCH_CHECK(tensor.dim() >= 2, "scores must have at least two dimensions");
  const int64_t columns = flat_columns(tensor);
  const Tensor dense = as_dense(tensor);
  return Scores{dense, read<uint32_t>(dense), tensor.size(0), columns, words_per_row(columns)};
}

// The histogram loops are bound by scattered increments, not by arithmetic: no clones for wider vectors.
void count_high_digits(const uint32_t* bits, int64_t n, uint32_t* histogram) {
  for (int64_t i = 0; i < n; ++i) ++histogram[high_digit(bits[i])];
}

// Low digits of the values whose high digit is the threshold's. Those are rare, so whole probes are skipped.
FADE_CPU_CLONES void count_low_digits(const uint32_t* bits, int64_t n, uint32_t digit, uint32_t* histogram) {
  constexpr int64_t kProbe = 32;
  const auto count = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t key = selection_key(bits[i]);
      if (high_digit(key) == digit) ++histogram[low_digit(key)];
    }
  };
  int64_t i = 0;
  for (; i + kProbe <= n; i += kProbe) {
    uint32_t found = 0;
    for (int64_t j = 0; j < kProbe; ++j) found |= high_digit(selection_key(bits[i + j])) == digit;
    if (found != 0) count(i, i + kProbe);
  }
  count(i, n);
}

// One histogram over all tensors: slices of the concatenation that is never made, one private histogram per slice.
template <typename Count>
std::vector<uint64_t> histogram_of(const std::vector<Scores>& scores, int64_t total, Count count) {
  std::vector<uint64_t> histogram(kDigits, 0);
  std::mutex mutex;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), kMaxHistogramTasks);
  const int64_t tasks = std::max({int64_t{1}, std::min(threads, total / kGrainSize), total / kMaxTaskElements + 1});
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last_task) {
    std::vector<uint32_t> local(kDigits);
    for (int64_t task = first_task; task < last_task; ++task) {
      std::fill(local.begin(), local.end(), 0u);
      // Without 128-bit products: slice boundaries at task * total / tasks.
      const int64_t begin = total / tasks * task + std::min(task, total % tasks);
      const int64_t end = begin + total / tasks + (task < total % tasks);
      int64_t offset = 0;
      for (const Scores& s : scores) {
        const int64_t low = std::max(begin - offset, int64_t{0}), high = std::min(end - offset, s.numel());
        if (low < high) count(s.bits + low, high - low, local.data());
        offset += s.numel();
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (uint32_t digit = 0; digit < kDigits; ++digit) histogram[digit] += local[digit];
    }
  });
  return histogram;
}

// The digit of the k-th largest (k >= 1); takes from k what lies above it.
uint32_t digit_of_kth(const std::vector<uint64_t>& histogram, uint64_t& k) {
  uint32_t digit = kDigits - 1;
  while (histogram[digit] < k) k -= histogram[digit--];
  return digit;
}

// Index of the first tensor that holds NaN or a negative value, -1 if there is none.
int64_t first_invalid(const std::vector<Scores>& scores) {
  for (size_t i = 0; i < scores.size(); ++i) {
    const uint32_t* bits = scores[i].bits;
    if (!std::all_of(bits, bits + scores[i].numel(), [](uint32_t b) { return is_selectable(b); })) return i;
  }
  return -1;
}

// The word of one run of up to 32 scores: bit j is set where key j is above the threshold; ties are counted.
struct Packed {
  uint32_t above;
  uint32_t ties;
};

FADE_HOST_DEVICE Packed pack_word(const uint32_t* bits, int64_t n, uint32_t threshold) {
  Packed word{0, 0};
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t key = selection_key(bits[j]);
    word.above |= static_cast<uint32_t>(key > threshold) << j;
    word.ties |= static_cast<uint32_t>(key == threshold) << j;
  }
  return word;
}

// Words of one run within a row; returns the number of ties, which stay unset.
FADE_CPU_CLONES int64_t pack_run(const uint32_t* bits, int64_t n, uint32_t threshold, uint32_t* words) {
  int64_t ties = 0;
  int64_t w = 0;
  for (; (w + 1) * kWordBits <= n; ++w) {
    uint32_t above = 0, tie_count = 0;
    for (int64_t j = 0; j < kWordBits; ++j) {
      const uint32_t key = selection_key(bits[w * kWordBits + j]);
      above |= static_cast<uint32_t>(key > threshold) << j;
      tie_count += key == threshold;
    }
    words[w] = above;
    ties += tie_count;
  }
  if (w * kWordBits < n) {
    const Packed word = pack_word(bits + w * kWordBits, n - w * kWordBits, threshold);
    words[w] = word.above;
    ties += __builtin_popcount(word.ties);
  }
  return ties;
}

// Sets the first `quota` ties of one run; returns how many of the quota are left.
int64_t take_ties(const uint32_t* bits, int64_t n, uint32_t threshold, int64_t quota, uint32_t* words) {
  for (int64_t w = 0; w * kWordBits < n && quota > 0; ++w) {
    const uint32_t ties = pack_word(bits + w * kWordBits, std::min(kWordBits, n - w * kWordBits), threshold).ties;
    words[w] |= lowest_bits(ties, quota);
    quota -= std::min<int64_t>(quota, __builtin_popcount(ties));
  }
  return quota;
}

// A block is a range of mask words of one tensor, in flat-index order: the unit of parallel packing.
struct Block {
  size_t tensor;
  int64_t begin, end;
  int64_t ties = 0;
};

std::vector<Block> blocks_of(const std::vector<Scores>& scores) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < scores.size(); ++i) {
    const int64_t words = scores[i].rows * scores[i].width;
    for (int64_t w = 0; w < words; w += kBlockWords) blocks.push_back({i, w, std::min(words, w + kBlockWords)});
  }
  return blocks;
}

// Calls run(first score, number of scores, first word) for the part of each row that a block holds.
template <typename Run>
void for_each_run(const Block& block, const Scores& s, Run run) {
  for (int64_t w = block.begin; w < block.end;) {
    const int64_t row = w / s.width, column = (w - row * s.width) * kWordBits;
    const int64_t stop = std::min(block.end, (row + 1) * s.width);
    run(s.bits + row * s.columns + column, std::min(s.columns - column, (stop - w) * kWordBits), w);
    w = stop;
  }
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> select_top_k(std::vector<Tensor> tensors, int64_t k) {
  std::vector<Scores> scores;
  std::vector<Tensor> words;
  std::vector<uint32_t*> targets;
  int64_t total = 0;
  STD_TORCH_CHECK(!tensors.empty(), "there are no scores to select from");
  for (const Tensor& tensor : tensors) {
    const Scores s = scores.emplace_back(as_scores(tensor));
    words.push_back(torch::stable::new_empty(tensor, {s.rows, s.width}, ScalarType::Int));
    targets.push_back(write<uint32_t>(words.back()));
    total += s.numel();
  }
  STD_TORCH_CHECK(k >= 1 && k <= total, "k must be between 1 and ", total, ", not ", k);
  const Tensor threshold = torch::stable::new_empty(tensors[0], std::vector<int64_t>{}, ScalarType::Float);
  const Tensor invalid = torch::stable::new_empty(tensors[0], std::vector<int64_t>{}, ScalarType::Long);

  std::vector<uint64_t> histogram = histogram_of(scores, total, count_high_digits);
  bool suspicious = false;
  for (uint32_t digit = 0; digit < kDigits; ++digit) suspicious |= is_suspicious(digit) && histogram[digit] != 0;
  *write<int64_t>(invalid) = suspicious ? first_invalid(scores) : -1;
  if (*write<int64_t>(invalid) >= 0) {
    for (Tensor& w : words) torch::stable::zero_(w);
    *write<uint32_t>(threshold) = 0;
    return {words, threshold, invalid};
  }
  // What is left in the bins of negative values are zeros with a sign.
  histogram[0] += histogram[high_digit(kSignBit)];
  histogram[high_digit(kSignBit)] = 0;

  uint64_t needed = k;  // of the values in the bin of the threshold, then of those equal to it
  const uint32_t high = digit_of_kth(histogram, needed);
  const auto count_low = [high](const uint32_t* bits, int64_t n, uint32_t* h) { count_low_digits(bits, n, high, h); };
  const uint32_t low = digit_of_kth(histogram_of(scores, total, count_low), needed);
  const uint32_t key = high << kDigitBits | low;
  *write<uint32_t>(threshold) = key;

  std::vector<Block> blocks = blocks_of(scores);
  torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const size_t i = blocks[b].tensor;
      for_each_run(blocks[b], scores[i], [&](const uint32_t* bits, int64_t n, int64_t word) {
        blocks[b].ties += pack_run(bits, n, key, targets[i] + word);
      });
    }
  });
  // From here `ties` is the block's share of them: all of its own until none is needed any more.
  for (Block& block : blocks) {
    block.ties = std::min<int64_t>(block.ties, needed);
    needed -= block.ties;
  }
  torch::stable::parallel_for(0, blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const size_t i = blocks[b].tensor;
      int64_t quota = blocks[b].ties;
      if (quota == 0) continue;
      for_each_run(blocks[b], scores[i], [&](const uint32_t* bits, int64_t n, int64_t word) {
        quota = take_ties(bits, n, key, quota, targets[i] + word);
      });
    }
  });
  return {words, threshold, invalid};
}

}  // namespace
}  // namespace fade

STABLE_TORCH_LIBRARY_IMPL(fade_kernels, CPU, m) { m.impl("select_top_k", TORCH_BOX(&fade::select_top_k)); }
