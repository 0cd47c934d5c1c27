// The inner loops of masked least squares on the CPU: Cholesky factor, solve and inverse of kLanes small matrices at once,
// one in each lane of a vector, so that no step crosses lanes. least_squares.cpp includes this file once per instruction
// set (so no include guard): FADE_SIMD names the namespace, FADE_TARGET the instruction set.
//
// A lower triangle [n, n], n a multiple of kBlock, is stored by rows; a row reaches to the end of its diagonal block.
// V: one number of each lane.

namespace fade::FADE_SIMD {

#define FADE_INLINE FADE_TARGET inline __attribute__((always_inline))

typedef double V __attribute__((vector_size(kLanes * sizeof(double)), aligned(sizeof(double)), may_alias));

FADE_INLINE V* row_of(double* triangle, int64_t i) {
  return reinterpret_cast<V*>(triangle + row_offset(i) * kLanes);
}

// The 4 x 4 block acc[a][b] -= sum over k in [begin, end) of left[a][k] right[b][k]: both by rows.
FADE_INLINE void subtract_rows(V (&acc)[kBlock][kBlock], V* const* left, V* const* right, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    V x[kBlock];
#pragma GCC unroll 4
    for (int b = 0; b < kBlock; ++b) x[b] = right[b][k];
#pragma GCC unroll 4
    for (int a = 0; a < kBlock; ++a) {
      const V l = left[a][k];
#pragma GCC unroll 4
      for (int b = 0; b < kBlock; ++b) acc[a][b] -= l * x[b];
    }
  }
}

// A = L Lᵀ in place, and the inverse of L's diagonal. smallest[lane]: the least of (pivot / A's own diagonal); a pivot
// that is not above `tolerance` times the diagonal is replaced by 1, so that nothing overflows.
FADE_TARGET void factor(double* triangle, int64_t n, double tolerance, double* inverse_diagonal, double* smallest) {
  V* const reciprocal = reinterpret_cast<V*>(inverse_diagonal);
  for (int lane = 0; lane < kLanes; ++lane) smallest[lane] = 1.0;
  for (int64_t i = 0; i < n; i += kBlock) {
    V* rows[kBlock];
    for (int a = 0; a < kBlock; ++a) rows[a] = row_of(triangle, i + a);
    for (int64_t j = 0; j < i; j += kBlock) {
      V* columns[kBlock];
      for (int b = 0; b < kBlock; ++b) columns[b] = row_of(triangle, j + b);
      V acc[kBlock][kBlock];
#pragma GCC unroll 4
      for (int a = 0; a < kBlock; ++a) {
#pragma GCC unroll 4
        for (int b = 0; b < kBlock; ++b) acc[a][b] = rows[a][j + b];
      }
      subtract_rows(acc, rows, columns, 0, j);
#pragma GCC unroll 4
      for (int a = 0; a < kBlock; ++a) {
        for (int b = 0; b < kBlock; ++b) {
          V sum = acc[a][b];
          for (int c = 0; c < b; ++c) sum -= acc[a][c] * columns[b][j + c];
          rows[a][j + b] = acc[a][b] = sum * reciprocal[j + b];
        }
      }
    }
    V acc[kBlock][kBlock];
#pragma GCC unroll 4
    for (int a = 0; a < kBlock; ++a) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlock; ++b) acc[a][b] = rows[a][i + b];
    }
    subtract_rows(acc, rows, rows, 0, i);
    for (int b = 0; b < kBlock; ++b) {
      V pivot = acc[b][b], root;
      for (int c = 0; c < b; ++c) pivot -= rows[b][i + c] * rows[b][i + c];
      for (int lane = 0; lane < kLanes; ++lane) {
        const double diagonal = rows[b][i + b][lane], ratio = pivot[lane] / diagonal;
        // Written so that NaN counts as not above.
        const bool above = pivot[lane] > tolerance * diagonal;
        smallest[lane] = above ? (ratio < smallest[lane] ? ratio : smallest[lane]) : -1.0;
        root[lane] = above ? __builtin_sqrt(pivot[lane]) : 1.0;
      }
      rows[b][i + b] = root;
      reciprocal[i + b] = 1.0 / root;
      for (int a = b + 1; a < kBlock; ++a) {
        V sum = acc[a][b];
        for (int c = 0; c < b; ++c) sum -= rows[a][i + c] * rows[b][i + c];
        rows[a][i + b] = sum * reciprocal[i + b];
      }
    }
  }
}

// x = (L Lᵀ)⁻¹ x in place.
FADE_TARGET void solve(double* triangle, int64_t n, const double* inverse_diagonal, double* x) {
  const V* const reciprocal = reinterpret_cast<const V*>(inverse_diagonal);
  V* const at = reinterpret_cast<V*>(x);
  for (int64_t i = 0; i < n; i += kBlock) {
    V *rows[kBlock], acc[kBlock];
    for (int a = 0; a < kBlock; ++a) rows[a] = row_of(triangle, i + a);
#pragma GCC unroll 4
    for (int a = 0; a < kBlock; ++a) acc[a] = at[i + a];
    for (int64_t k = 0; k < i; ++k) {
      const V known = at[k];
#pragma GCC unroll 4
      for (int a = 0; a < kBlock; ++a) acc[a] -= rows[a][k] * known;
    }
    for (int a = 0; a < kBlock; ++a) {
      for (int c = 0; c < a; ++c) acc[a] -= rows[a][i + c] * at[i + c];
      at[i + a] = acc[a] * reciprocal[i + a];
    }
  }
  for (int64_t i = n - kBlock; i >= 0; i -= kBlock) {
    V *rows[kBlock], found[kBlock];
    for (int a = 0; a < kBlock; ++a) rows[a] = row_of(triangle, i + a);
    for (int a = kBlock - 1; a >= 0; --a) {
      V sum = at[i + a];
      for (int c = a + 1; c < kBlock; ++c) sum -= rows[c][i + a] * found[c];
      at[i + a] = found[a] = sum * reciprocal[i + a];
    }
    for (int64_t k = 0; k < i; ++k) {
      V sum = at[k];
#pragma GCC unroll 4
      for (int a = 0; a < kBlock; ++a) sum -= rows[a][k] * found[a];
      at[k] = sum;
    }
  }
}

// L -> X = L⁻¹ in place, and diagonal[j] = ((L Lᵀ)⁻¹)[j, j] = the sum over i of X[i, j]². A block of X takes the place of
// the block of L that nothing after it reads.
FADE_TARGET void inverse_diagonal_of(double* triangle, int64_t n, const double* inverse_diagonal, double* diagonal) {
  const V* const reciprocal = reinterpret_cast<const V*>(inverse_diagonal);
  V* const sums = reinterpret_cast<V*>(diagonal);
  for (int64_t j = 0; j < n; ++j) sums[j] = V{};
  for (int64_t i = 0; i < n; i += kBlock) {
    V *rows[kBlock], corner[kBlock][kBlock];  // corner: the inverse of the diagonal block
    for (int a = 0; a < kBlock; ++a) rows[a] = row_of(triangle, i + a);
    for (int b = 0; b < kBlock; ++b) {
      for (int a = 0; a < b; ++a) corner[a][b] = V{};
      corner[b][b] = reciprocal[i + b];
      for (int a = b + 1; a < kBlock; ++a) {
        V sum = V{};
        for (int c = b; c < a; ++c) sum -= rows[a][i + c] * corner[c][b];
        corner[a][b] = sum * reciprocal[i + a];
      }
    }
    for (int64_t j = 0; j < i; j += kBlock) {
      V acc[kBlock][kBlock];
#pragma GCC unroll 4
      for (int a = 0; a < kBlock; ++a) {
#pragma GCC unroll 4
        for (int b = 0; b < kBlock; ++b) acc[a][b] = V{};
      }
      for (int64_t k = j; k < i; ++k) {
        const V* const x = row_of(triangle, k) + j;
        V right[kBlock];
#pragma GCC unroll 4
        for (int b = 0; b < kBlock; ++b) right[b] = x[b];
#pragma GCC unroll 4
        for (int a = 0; a < kBlock; ++a) {
          const V l = rows[a][k];
#pragma GCC unroll 4
          for (int b = 0; b < kBlock; ++b) acc[a][b] -= l * right[b];
        }
      }
      for (int b = 0; b < kBlock; ++b) {
        V sum = sums[j + b];
        for (int a = 0; a < kBlock; ++a) {
          V x = V{};
          for (int c = 0; c <= a; ++c) x += corner[a][c] * acc[c][b];
          rows[a][j + b] = x;
          sum += x * x;
        }
        sums[j + b] = sum;
      }
    }
    for (int b = 0; b < kBlock; ++b) {
      for (int a = 0; a < kBlock; ++a) {
        rows[a][i + b] = corner[a][b];
        sums[i + b] += corner[a][b] * corner[a][b];
      }
    }
  }
}

#undef FADE_INLINE

}  // namespace fade::FADE_SIMD
