// The inner loops of masked LoRA on the CPU, written with the compiler's vectors of 16 lanes. masked_lora_kernels.h
// includes this file once per instruction set (so no include guard): FADE_SIMD names the namespace, FADE_TARGET the
// instruction set, FADE_REGISTER_BYTES its vectors. target_clones would not do: it clones after the compiler has split
// the vectors.
//
// Names: x [T, K], dy [T, N], panel = a block of rows transposed to [columns, 16 * NV] so that one vector holds 16
// rows; offsets, columns, values = the mask as compressed sparse rows; a_t [K, rp] and b [N, rp] = factors with the
// rank padded to whole vectors.

namespace fade::FADE_SIMD {

#define FADE_INLINE FADE_TARGET inline __attribute__((always_inline))

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename Lanes<T>::Vector;

template <typename T>
FADE_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <typename T>
FADE_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<Vector<T>*>(to) = value;
}

template <typename T>
FADE_INLINE T horizontal_sum(Vector<T> v) {
  typedef T V8 __attribute__((vector_size(8 * sizeof(T))));
  typedef T V4 __attribute__((vector_size(4 * sizeof(T))));
  typedef T V2 __attribute__((vector_size(2 * sizeof(T))));
  const V8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const V4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  const V2 c = __builtin_shufflevector(b, b, 0, 1) + __builtin_shufflevector(b, b, 2, 3);
  return c[0] + c[1];
}

// The lanes that a pair of vectors exchanges in one step of a 16 x 16 transposition by butterflies.
#define FADE_LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define FADE_HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FADE_LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define FADE_HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define FADE_LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define FADE_HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define FADE_LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define FADE_HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

// Lane i of the result is the sum of v[i]'s lanes, v being 16 vectors: a transposition that adds as it goes, a third of
// the work of 16 sums of their own.
template <typename T>
FADE_INLINE Vector<T> horizontal_sums(Vector<T>* v) {
#define FADE_ADD(D, LOW, HIGH)                                                                               \
  for (int i = 0; i < D; ++i) {                                                                              \
    const Vector<T> a = v[i], b = v[i + D];                                                                  \
    v[i] = __builtin_shufflevector(a, b, LOW) + __builtin_shufflevector(a, b, HIGH);                         \
  }
#pragma GCC unroll 8
  FADE_ADD(8, FADE_LOW_8, FADE_HIGH_8)
#pragma GCC unroll 4
  FADE_ADD(4, FADE_LOW_4, FADE_HIGH_4)
#pragma GCC unroll 2
  FADE_ADD(2, FADE_LOW_2, FADE_HIGH_2)
  FADE_ADD(1, FADE_LOW_1, FADE_HIGH_1)
#undef FADE_ADD
  return v[0];
}

// ---- mask -----------------------------------------------------------------------------------------------------------

typedef uint32_t WordVector __attribute__((vector_size(kLanes * sizeof(uint32_t)), aligned(4), may_alias));

// counts[n] = bits set in row n; returns how many words hold any.
FADE_TARGET inline int64_t count_rows(const uint32_t* words, int64_t rows, int64_t width, int64_t* counts) {
  WordVector filled = {};
  int64_t occupied = 0;
  for (int64_t n = 0; n < rows; ++n, words += width) {
    WordVector sums = {};
    int64_t w = 0, sum = 0;
    for (; w + kLanes <= width; w += kLanes) {
      WordVector v = *reinterpret_cast<const WordVector*>(words + w);
      filled -= reinterpret_cast<WordVector>(v != 0);
      v -= (v >> 1) & 0x55555555u;  // sums of 2, 4, 8, 16, 32 neighbours
      v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
      v = (v + (v >> 4)) & 0x0F0F0F0Fu;
      v += v >> 8;
      v += v >> 16;
      sums += v & 0x3Fu;
    }
    if (w > 0) sum = horizontal_sum<uint32_t>(sums);
    for (; w < width; ++w) {
      sum += __builtin_popcount(words[w]);
      occupied += words[w] != 0;
    }
    counts[n] = sum;
  }
  return occupied + horizontal_sum<uint32_t>(filled);
}

// The words of a mask, in row-major order, that hold any bit, a chunk at a time. Which do is unpredictable, and so is
// where a row's last one stands: there is no branch on a word, and rows are not looked at one by one.
struct OccupiedWords {
  static constexpr int64_t kChunk = 256;
  uint32_t word[kChunk + kLanes];
  uint32_t column[kChunk + kLanes];  // that of the word's first bit

  // Takes the words [first, last), at most kChunk, of rows of `width`; returns how many hold any bit.
  FADE_INLINE int64_t take(const uint32_t* words, int64_t first, int64_t last, int64_t width) {
    int64_t size = 0, w = first;
#if FADE_REGISTER_BYTES == 64
    const uint32_t row_end = static_cast<uint32_t>(width * kWordBits);
    const uint32_t step = static_cast<uint32_t>(kLanes % width * kWordBits);
    uint32_t begin[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) begin[i] = static_cast<uint32_t>((first + i) % width * kWordBits);
    __m512i at = _mm512_loadu_si512(begin);
    for (; w + kLanes <= last; w += kLanes) {
      const __m512i v = _mm512_loadu_si512(words + w);
      const __mmask16 any = _mm512_test_epi32_mask(v, v);
      _mm512_storeu_si512(word + size, _mm512_maskz_compress_epi32(any, v));
      _mm512_storeu_si512(column + size, _mm512_maskz_compress_epi32(any, at));
      size += __builtin_popcount(any);
      at = _mm512_add_epi32(at, _mm512_set1_epi32(static_cast<int32_t>(step)));
      const __m512i wrapped = _mm512_set1_epi32(static_cast<int32_t>(row_end));
      at = _mm512_mask_sub_epi32(at, _mm512_cmpge_epu32_mask(at, wrapped), at, wrapped);
    }
#endif
    for (int64_t in_row = w % width; w < last; ++w) {
      word[size] = words[w];
      column[size] = static_cast<uint32_t>(in_row * kWordBits);
      size += words[w] != 0;
      in_row = in_row + 1 == width ? 0 : in_row + 1;
    }
    return size;
  }
};

// columns[i] = column of the i-th of the `count` bits that the words [first, last) hold. How many a word holds is
// unpredictable, too: they are written kAtOnce at a time where they fit.
template <int kAtOnce>
FADE_TARGET void decode_words(const uint32_t* words, int64_t first, int64_t last, int64_t width, int64_t count,
                              int32_t* columns) {
  OccupiedWords occupied;
  int32_t* const end = columns + count;
  for (; first < last; first += OccupiedWords::kChunk) {
    const int64_t chunk_end = first + OccupiedWords::kChunk < last ? first + OccupiedWords::kChunk : last;
    const int64_t size = occupied.take(words, first, chunk_end, width);
    for (int64_t i = 0; i < size; ++i) {
      uint32_t word = occupied.word[i];
      const int32_t base = static_cast<int32_t>(occupied.column[i]);
      const int bits = __builtin_popcount(word);
      if (bits <= kAtOnce && end - columns >= kAtOnce) {
#pragma GCC unroll 8
        for (int j = 0; j < kAtOnce; ++j) {
          columns[j] = base + __builtin_ctz(word | 0x80000000u);  // past the last bit: overwritten by the next word
          word &= word - 1;
        }
        columns += bits;
      } else {
        for (; word != 0; word &= word - 1) *columns++ = base + __builtin_ctz(word);
      }
    }
  }
}

FADE_TARGET inline void decode(const uint32_t* words, int64_t first, int64_t last, int64_t width, int64_t count,
                               int32_t* columns) {
  if (count <= last - first) {
    decode_words<2>(words, first, last, width, count, columns);
  } else {
    decode_words<7>(words, first, last, width, count, columns);
  }
}

// Zero where the mask is not set.
template <typename T>
FADE_TARGET void clear_outside(const uint32_t* words, int64_t columns, T* row) {
  typedef std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> Bits;
  typedef Bits BitVector __attribute__((vector_size(kLanes * sizeof(T)), aligned(sizeof(T)), may_alias));
  const BitVector lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    const BitVector word = BitVector{} + static_cast<Bits>(words[k / kWordBits] >> (k % kWordBits));
    BitVector* at = reinterpret_cast<BitVector*>(row + k);
    *at &= -((word >> lane) & 1);
  }
  for (; k < columns; ++k) {
    if (!((words[k / kWordBits] >> (k % kWordBits)) & 1u)) row[k] = T(0);
  }
}

// row[columns[i]] += scale * values[i].
template <typename T>
FADE_TARGET void scatter_add_at(const int32_t* columns, int64_t count, const T* values, T scale, T* row) {
  for (int64_t i = 0; i < count; ++i) row[columns[i]] += scale * values[i];
}

// The same from the words of the row, for masks whose occupied words are well filled.
template <typename T>
FADE_TARGET void scatter_add(const uint32_t* words, int64_t width, const T* values, T scale, T* row) {
  for (int64_t w = 0; w < width; ++w) {
    T* out = row + w * kWordBits;
    if (words[w] == ~0u) {
      for (int64_t j = 0; j < kWordBits; j += kLanes) {
        store<T>(out + j, load<T>(out + j) + scale * load<T>(values + j));
      }
      values += kWordBits;
      continue;
    }
    for (uint32_t word = words[w]; word != 0; word &= word - 1) out[__builtin_ctz(word)] += scale * *values++;
  }
}

// ---- values of B A at the mask --------------------------------------------------------------------------------------

// values[i] = <b, A[:, columns[i]]>: one dot product for each position.
template <typename T>
FADE_TARGET void factor_values_at(const int32_t* columns, int64_t count, const T* a_t, const T* b, int64_t rp,
                                  T* values) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    Vector<T> sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = load<T>(a_t + columns[j + i] * rp) * load<T>(b);
    for (int64_t c = kLanes; c < rp; c += kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sums[i] += load<T>(a_t + columns[j + i] * rp + c) * load<T>(b + c);
    }
    store<T>(values + j, horizontal_sums<T>(sums));
  }
  for (; j < count; ++j) {
    const T* a = a_t + columns[j] * rp;
    Vector<T> sum = load<T>(a) * load<T>(b);
    for (int64_t i = kLanes; i < rp; i += kLanes) sum += load<T>(a + i) * load<T>(b + i);
    values[j] = horizontal_sum<T>(sum);
  }
}

// The same from the words of the row, for masks whose occupied words are well filled: all 32 columns of such a word at
// once. a_padded is [r, 32 * width].
template <typename T>
FADE_TARGET void factor_values(const uint32_t* words, int64_t width, const T* a_padded, const T* b, int64_t r,
                               T* values) {
  for (int64_t w = 0; w < width; ++w) {
    uint32_t word = words[w];
    if (word == 0) continue;
    const T* a = a_padded + w * kWordBits;
    Vector<T> low = b[0] * load<T>(a), high = b[0] * load<T>(a + kLanes);
    for (int64_t i = 1; i < r; ++i) {
      a += width * kWordBits;
      low += b[i] * load<T>(a);
      high += b[i] * load<T>(a + kLanes);
    }
    if (word == ~0u) {
      store<T>(values, low);
      store<T>(values + kLanes, high);
      values += kWordBits;
      continue;
    }
    T tile[kWordBits];
    store<T>(tile, low);
    store<T>(tile + kLanes, high);
    for (; word != 0; word &= word - 1) *values++ = tile[__builtin_ctz(word)];
  }
}

// ---- transposition --------------------------------------------------------------------------------------------------

// One butterfly step: exchanges the off-diagonal D x D blocks of every 2D x 2D block.
#define FADE_BUTTERFLY(D, LOW, HIGH)                   \
  for (int i = 0; i < kLanes; ++i) {                   \
    if (i & D) continue;                               \
    const Vector<float> a = rows[i], b = rows[i + D];  \
    rows[i] = __builtin_shufflevector(a, b, LOW);      \
    rows[i + D] = __builtin_shufflevector(a, b, HIGH); \
  }

FADE_INLINE void transpose_16x16(Vector<float>* rows) {
#pragma GCC unroll 16
  FADE_BUTTERFLY(8, FADE_LOW_8, FADE_HIGH_8)
#pragma GCC unroll 16
  FADE_BUTTERFLY(4, FADE_LOW_4, FADE_HIGH_4)
#pragma GCC unroll 16
  FADE_BUTTERFLY(2, FADE_LOW_2, FADE_HIGH_2)
#pragma GCC unroll 16
  FADE_BUTTERFLY(1, FADE_LOW_1, FADE_HIGH_1)
}
#undef FADE_BUTTERFLY

// panel[k, t] = x[t, k] for rows t < tall; panel rows are `wide` >= tall elements, the rest is 0.
template <typename T>
FADE_TARGET void transpose_in(const T* x, int64_t stride, int64_t tall, int64_t columns, T* panel, int64_t wide) {
  for (int64_t t = 0; t < wide; t += kLanes) {
    const int64_t rows_here = tall - t < kLanes ? tall - t : kLanes;
    int64_t k = 0;
    if constexpr (sizeof(T) == sizeof(float)) {
      for (; rows_here == kLanes && k + kLanes <= columns; k += kLanes) {
        Vector<T> rows[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = load<T>(x + (t + i) * stride + k);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) __builtin_prefetch(x + (t + kLanes + i) * stride + k);
        transpose_16x16(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store<T>(panel + (k + i) * wide + t, rows[i]);
      }
    }
    for (; k < columns; ++k) {
      for (int64_t i = 0; i < kLanes; ++i) panel[k * wide + t + i] = i < rows_here ? x[(t + i) * stride + k] : T(0);
    }
  }
}

// y[t, n] += panel[n, t] for rows t < tall.
template <typename T>
FADE_TARGET void transpose_add(const T* panel, int64_t wide, int64_t tall, int64_t columns, T* y, int64_t stride) {
  for (int64_t t = 0; t < tall; t += kLanes) {
    const int64_t rows_here = tall - t < kLanes ? tall - t : kLanes;
    int64_t n = 0;
    if constexpr (sizeof(T) == sizeof(float)) {
      for (; rows_here == kLanes && n + kLanes <= columns; n += kLanes) {
        Vector<T> rows[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) __builtin_prefetch(y + (t + kLanes + i) * stride + n, 1);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = load<T>(panel + (n + i) * wide + t);
        transpose_16x16(rows);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          T* out = y + (t + i) * stride + n;
          store<T>(out, load<T>(out) + rows[i]);
        }
      }
    }
    for (; n < columns; ++n) {
      for (int64_t i = 0; i < rows_here; ++i) y[(t + i) * stride + n] += panel[n * wide + t + i];
    }
  }
}

// ---- gather: products with the sparse delta -------------------------------------------------------------------------

// y_panel[n - begin] = sum_i values[i] * x_panel[columns[i]] over row n's positions.
template <typename T, int NV>
FADE_TARGET void product_rows(const T* x_panel, int64_t begin, int64_t end, const int64_t* offsets,
                              const int32_t* columns, const T* values, T* y_panel) {
  constexpr int64_t wide = NV * kLanes;
  for (int64_t n = begin; n < end; ++n) {
    Vector<T> sum[NV] = {};
    for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) {
      const T* x = x_panel + columns[i] * wide;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[v] += values[i] * load<T>(x + v * kLanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<T>(y_panel + (n - begin) * wide + v * kLanes, sum[v]);
  }
}

// ---- gradient at the mask's positions -------------------------------------------------------------------------------

// gradient[i] += <dy_panel[n - begin], x_panel[columns[i]]> for rows n in [begin, end): a sampled dense-dense product.
// Walks the columns in blocks of `block`, so that the block of x stays in the first-level cache while dy streams past
// it; cursor remembers where each row stands.
template <typename T, int NV>
FADE_TARGET void sampled_rows(const T* dy_panel, const T* x_panel, int64_t begin, int64_t end, int64_t k, int64_t block,
                              const int64_t* offsets, const int32_t* columns, int64_t* cursor, T* gradient) {
  constexpr int64_t wide = NV * kLanes;
  for (int64_t n = begin; n < end; ++n) cursor[n - begin] = offsets[n];
  for (int64_t limit = block; limit < k + block; limit += block) {
    for (int64_t n = begin; n < end; ++n) {
      int64_t i = cursor[n - begin];
      const int64_t last = offsets[n + 1];
      if (i == last || columns[i] >= limit) continue;
      Vector<T> dy[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) dy[v] = load<T>(dy_panel + (n - begin) * wide + v * kLanes);
      do {
        const T* x = x_panel + columns[i] * wide;
        Vector<T> even = dy[0] * load<T>(x), odd = {};
#pragma GCC unroll 8
        for (int v = 1; v < NV; ++v) (v & 1 ? odd : even) += dy[v] * load<T>(x + v * kLanes);
        gradient[i] += horizontal_sum<T>(even + odd);
        ++i;
      } while (i < last && columns[i] < limit);
      cursor[n - begin] = i;
    }
  }
}

// tile[n, k] += sum_t dy[t, n] x[t, k] for a 32 x 32 tile: dy is packed [tall, 32], x has rows of `stride`.
template <typename T>
FADE_TARGET void outer_product_tile(const T* dy, const T* x, int64_t stride, int64_t tall, T* tile) {
  constexpr int kRows =
      sizeof(Vector<T>) <= FADE_REGISTER_BYTES ? 8 : 2;  // 2 columns of vectors x kRows stay in registers
  for (int64_t n = 0; n < kTile; n += kRows) {
    Vector<T> low[kRows], high[kRows];
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
      low[j] = load<T>(tile + (n + j) * kTile);
      high[j] = load<T>(tile + (n + j) * kTile + kLanes);
    }
    for (int64_t t = 0; t < tall; ++t) {
      const Vector<T> x_low = load<T>(x + t * stride), x_high = load<T>(x + t * stride + kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) {
        low[j] += dy[t * kTile + n + j] * x_low;
        high[j] += dy[t * kTile + n + j] * x_high;
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
      store<T>(tile + (n + j) * kTile, low[j]);
      store<T>(tile + (n + j) * kTile + kLanes, high[j]);
    }
  }
}

// db [32, rp] += tile a_t,  da_t [wide, rp] += tile^T b  for a masked 32 x 32 tile of the gradient: a_t [wide, rp] and
// b [32, rp] are the factors' rows at the tile. Two sums each, because one would wait for its own last addition.
template <typename T>
FADE_TARGET void contract_tile(const T* tile, int64_t wide, const T* a_t, const T* b, int64_t rp, T* db, T* da_t) {
  for (int64_t c = 0; c < rp; c += kLanes) {
    for (int64_t n = 0; n < kTile; ++n) {
      Vector<T> even = load<T>(db + n * rp + c), odd = {};
      for (int64_t k = 0; k + 1 < wide; k += 2) {
        even += tile[n * kTile + k] * load<T>(a_t + k * rp + c);
        odd += tile[n * kTile + k + 1] * load<T>(a_t + (k + 1) * rp + c);
      }
      if (wide & 1) even += tile[n * kTile + wide - 1] * load<T>(a_t + (wide - 1) * rp + c);
      store<T>(db + n * rp + c, even + odd);
    }
    for (int64_t k = 0; k < wide; ++k) {
      Vector<T> even = load<T>(da_t + k * rp + c), odd = {};
      for (int64_t n = 0; n < kTile; n += 2) {
        even += tile[n * kTile + k] * load<T>(b + n * rp + c);
        odd += tile[(n + 1) * kTile + k] * load<T>(b + (n + 1) * rp + c);
      }
      store<T>(da_t + k * rp + c, even + odd);
    }
  }
}

// db[n] += sum_i g[i] a_t[columns[i]],  da_t[columns[i]] += g[i] b[n]  over the rows [begin, end).
template <typename T>
FADE_TARGET void contract_rows(int64_t begin, int64_t end, const int64_t* offsets, const int32_t* columns,
                               const T* gradient, const T* a_t, const T* b, int64_t rp, T* db, T* da_t) {
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t c = 0; c < rp; c += kLanes) {
      const Vector<T> b_row = load<T>(b + n * rp + c);
      Vector<T> sum = {};
      for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) {
        const int64_t at = columns[i] * rp + c;
        sum += gradient[i] * load<T>(a_t + at);
        store<T>(da_t + at, load<T>(da_t + at) + gradient[i] * b_row);
      }
      store<T>(db + n * rp + c, sum);
    }
  }
}

template <typename T>
const Kernels<T>& table() {
  static const Kernels<T> kernels = {
      count_rows,
      decode,
      clear_outside<T>,
      scatter_add_at<T>,
      scatter_add<T>,
      factor_values_at<T>,
      factor_values<T>,
      transpose_in<T>,
      transpose_add<T>,
      {product_rows<T, 1>, product_rows<T, 2>, product_rows<T, 4>, product_rows<T, 8>},
      {sampled_rows<T, 1>, sampled_rows<T, 2>, sampled_rows<T, 4>, sampled_rows<T, 8>},
      outer_product_tile<T>,
      contract_tile<T>,
      contract_rows<T>,
  };
  return kernels;
}

#undef FADE_LOW_8
#undef FADE_HIGH_8
#undef FADE_LOW_4
#undef FADE_HIGH_4
#undef FADE_LOW_2
#undef FADE_HIGH_2
#undef FADE_LOW_1
#undef FADE_HIGH_1
#undef FADE_INLINE
}  // namespace fade::FADE_SIMD
