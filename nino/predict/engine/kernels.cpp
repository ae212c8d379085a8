// The arithmetic on edges, with a few edges' hidden vectors kept in registers and in the first level of cache.
//
// What kernels.py computes tile by tile, computed edge by edge: HIDDEN is the width of the hidden vectors, a multiple
// of 16. Edges of a strip are counted row by row, e = i * sources + j; paired ones have a source of their own. Or the ends
// of every edge are listed.
// Sums are in float32, as are non-linearities; with BF16 the factors of H x H products are rounded to bfloat16.

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, EDGES = 6, COLUMNS = (HIDDEN % 64 == 0) ? 4 : (HIDDEN % 32 == 0) ? 2 : 1;
#else
constexpr int LANES = 8, EDGES = 4, COLUMNS = (HIDDEN % 16 == 0) ? 2 : 1;
#endif
constexpr int VECTORS = HIDDEN / LANES;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
inline Vector all(float value) { return Vector{} + value; }

// A polynomial for exp(x) between -ln(2) / 2 and ln(2) / 2, to the last place of float32.
inline Vector exponential_near_zero(Vector x) {
    Vector sum = all(1.9875691500e-4f);
    sum = sum * x + 1.3981999507e-3f;
    sum = sum * x + 8.3334519073e-3f;
    sum = sum * x + 4.1665795894e-2f;
    sum = sum * x + 1.6666665459e-1f;
    sum = sum * x + 5.0000001201e-1f;
    return sum * (x * x) + (x + 1.0f);
}

constexpr float PER_OCTAVE = 1.44269504088896341f, OCTAVE = 0.693359375f, OCTAVE_REST = -2.12194440e-4f;

#if defined(__AVX512F__)

// x / (1 + exp(-x)), with exp(y) = 2^n exp(y - n ln 2); beyond 87 it is held. The inverse is estimated, then improved.
inline Vector silu(Vector x) {
    const Vector power = (Vector)_mm512_min_ps((__m512)all(87.0f), (__m512)-x);  // NaN if x is
    const Vector whole = (Vector)_mm512_roundscale_ps((__m512)(power * PER_OCTAVE), 8);
    const Vector rest = power - whole * OCTAVE - whole * OCTAVE_REST;
    const Vector sum = 1.0f + (Vector)_mm512_scalef_ps((__m512)exponential_near_zero(rest), (__m512)whole);
    const Vector near = (Vector)_mm512_rcp14_ps((__m512)sum);
    return x * (near + near * (1.0f - sum * near));
}

#else

// x / (1 + exp(-x)); beyond 87 the exponential is held, where it does not matter any more.
inline Vector silu(Vector x) {
    Vector power = -x;
    power = power < -87.0f ? all(-87.0f) : power;
    power = power > 87.0f ? all(87.0f) : power;
    const Vector shifted = power * PER_OCTAVE + 12582912.0f;  // 1.5 * 2^23: its last bits are the nearest integer
    const Vector whole = shifted - 12582912.0f;
    Integers bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127 << 23);  // what of the shift is beyond 8 bits is pushed out
    Vector scale;
    std::memcpy(&scale, &bits, sizeof scale);
    const Vector rest = power - whole * OCTAVE - whole * OCTAVE_REST;
    return x / (1.0f + scale * exponential_near_zero(rest));
}

#endif

#if BF16
typedef uint16_t Stored;
inline void keep(Stored* to, Vector value) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(to, &rounded, sizeof rounded);
}
#else
typedef float Stored;
inline void keep(Stored* to, Vector value) { store(to, value); }
#endif

struct Strip {
    const float* values;     // [Q, edges]
    const float* at_source;  // [sources or edges, HIDDEN]: the sources' part of the first hidden vector
    const float* at_target;  // [targets, HIDDEN]
    const float* first;      // [Q, HIDDEN]
    int64_t num_values, num_edges, num_sources;
    int64_t is_paired;
    const int32_t *source, *target;  // of every edge; null if they are counted
};

// The first hidden vectors of N edges.
template <int N>
inline void first_hidden(const Strip& strip, int64_t edge, const int64_t* source, const int64_t* target,
                         float* hidden, Stored* stored) {
    for (int n = 0; n < N; n++) {
        const float* from = strip.at_source + source[n] * HIDDEN;
        const float* to = strip.at_target + target[n] * HIDDEN;
        for (int start = 0; start < VECTORS; start += COLUMNS) {
            Vector sum[COLUMNS];
            for (int v = 0; v < COLUMNS; v++)
                sum[v] = load(from + (start + v) * LANES) + load(to + (start + v) * LANES);
            const float* value = strip.values + edge + n;
            const float* weight = strip.first + start * LANES;
            for (int64_t q = 0; q < strip.num_values; q++, value += strip.num_edges, weight += HIDDEN)
                for (int v = 0; v < COLUMNS; v++) sum[v] += *value * load(weight + v * LANES);
            for (int v = 0; v < COLUMNS; v++) {
                const Vector found = silu(sum[v]);
                if (hidden) store(hidden + n * HIDDEN + (start + v) * LANES, found);
                keep(stored + n * HIDDEN + (start + v) * LANES, found);
            }
        }
    }
}

// N rows of hidden [N, HIDDEN] times weight [HIDDEN, HIDDEN], some columns; weight is laid out column block by column
// block (and in pairs of rows for bfloat16), so that it is read in order.
template <int N>
inline void product(const Stored* hidden, const Stored* weight, Vector (&sum)[N][COLUMNS]) {
#if BF16
    for (int k = 0; k < HIDDEN / 2; k++, weight += 2 * COLUMNS * LANES) {
        __m512bh column[COLUMNS];
        for (int v = 0; v < COLUMNS; v++) std::memcpy(&column[v], weight + 2 * v * LANES, sizeof column[v]);
        for (int n = 0; n < N; n++) {
            int32_t pair;
            std::memcpy(&pair, hidden + n * HIDDEN + 2 * k, sizeof pair);
            const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < COLUMNS; v++)
                sum[n][v] = (Vector)_mm512_dpbf16_ps((__m512)sum[n][v], factor, column[v]);
        }
    }
#else
    for (int k = 0; k < HIDDEN; k++, weight += COLUMNS * LANES) {
        Vector column[COLUMNS];
        for (int v = 0; v < COLUMNS; v++) column[v] = load(weight + v * LANES);
        for (int n = 0; n < N; n++) {
            const float factor = hidden[n * HIDDEN + k];
            for (int v = 0; v < COLUMNS; v++) sum[n][v] += factor * column[v];
        }
    }
#endif
}

template <int N>
inline void ends_of(const Strip& strip, int64_t edge, int64_t* source, int64_t* target) {
    if (strip.target) {
        for (int n = 0; n < N; n++) source[n] = strip.source[edge + n], target[n] = strip.target[edge + n];
        return;
    }
    int64_t i = edge / strip.num_sources, j = edge % strip.num_sources;
    for (int n = 0; n < N; n++) {
        target[n] = i;
        source[n] = strip.is_paired ? i : j;
        if (++j == strip.num_sources) j = 0, i++;
    }
}

template <int N>
inline void messages_of(const Strip& strip, int64_t edge, const float* as_source, const Stored* scale,
                        const float* bias, float* hidden_sums, float* scaled_sums) {
    int64_t source[N], target[N];
    float hidden[N * HIDDEN];
    Stored stored[N * HIDDEN];
    ends_of<N>(strip, edge, source, target);
    first_hidden<N>(strip, edge, source, target, hidden, stored);
    for (int start = 0; start < VECTORS; start += COLUMNS) {
        Vector sum[N][COLUMNS];
        for (int n = 0; n < N; n++)
            for (int v = 0; v < COLUMNS; v++) sum[n][v] = load(bias + (start + v) * LANES);
        product<N>(stored, scale + start * LANES * HIDDEN, sum);
        for (int n = 0; n < N; n++)
            for (int v = 0; v < COLUMNS; v++) {
                const int64_t at = (start + v) * LANES, to = target[n] * HIDDEN + at;
                store(scaled_sums + to, load(scaled_sums + to) + sum[n][v] * load(as_source + source[n] * HIDDEN + at));
                store(hidden_sums + to, load(hidden_sums + to) + load(hidden + n * HIDDEN + at));
            }
    }
}

struct Head {
    const float *at_source, *at_target;  // of the second hidden vector
    const Stored *second, *third;
    const float *third_bias, *weight, *bias;  // weight [F, HIDDEN]
    int64_t num_features;
};

inline float sum_of(Vector value) {
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}

template <int N>
inline void movements_of(const Strip& strip, int64_t edge, const Head& head, float* movement) {
    int64_t source[N], target[N];
    float last[N * HIDDEN];
    Stored one[N * HIDDEN], two[N * HIDDEN];
    ends_of<N>(strip, edge, source, target);
    first_hidden<N>(strip, edge, source, target, nullptr, one);
    for (int start = 0; start < VECTORS; start += COLUMNS) {
        Vector sum[N][COLUMNS];
        for (int n = 0; n < N; n++)
            for (int v = 0; v < COLUMNS; v++) {
                const int64_t at = (start + v) * LANES;
                sum[n][v] = load(head.at_source + source[n] * HIDDEN + at) + load(head.at_target + target[n] * HIDDEN + at);
            }
        product<N>(one, head.second + start * LANES * HIDDEN, sum);
        for (int n = 0; n < N; n++)
            for (int v = 0; v < COLUMNS; v++) keep(two + n * HIDDEN + (start + v) * LANES, silu(sum[n][v]));
    }
    for (int start = 0; start < VECTORS; start += COLUMNS) {
        Vector sum[N][COLUMNS];
        for (int n = 0; n < N; n++)
            for (int v = 0; v < COLUMNS; v++) sum[n][v] = load(head.third_bias + (start + v) * LANES);
        product<N>(two, head.third + start * LANES * HIDDEN, sum);
        for (int n = 0; n < N; n++)
            for (int v = 0; v < COLUMNS; v++) store(last + n * HIDDEN + (start + v) * LANES, silu(sum[n][v]));
    }
    for (int64_t f = 0; f < head.num_features; f++)
        for (int n = 0; n < N; n++) {
            Vector sum = {};
            for (int v = 0; v < VECTORS; v++)
                sum += load(last + n * HIDDEN + v * LANES) * load(head.weight + f * HIDDEN + v * LANES);
            movement[f * strip.num_edges + edge + n] = sum_of(sum) + head.bias[f];
        }
}

typedef double Doubles __attribute__((vector_size(64), aligned(8)));
constexpr int DOUBLES = 8, MOST_SNAPSHOTS = 8;

inline double sum_of(Doubles value) {
    double sum = 0.0;
    for (int lane = 0; lane < DOUBLES; lane++) sum += value[lane];
    return sum;
}

// Some elements of a snapshot, the rest filled up; differences are rounded to float32, as the plain form does.
inline void differences(const float* from, int64_t count, const float* to, float otherwise, Doubles* found) {
    for (int lane = 0; lane < DOUBLES; lane++)
        (*found)[lane] = lane < count ? double(from[lane] - (to ? to[lane] : otherwise)) : 0.0;
}

}  // namespace

extern "C" {

// Adds to the sums [targets, HIDDEN] what the edges first to last send to their targets; bias is added to every scale.
void message_sums(const Strip* strip, int64_t first, int64_t last, const float* as_source, const Stored* scale,
                  const float* bias, float* hidden_sums, float* scaled_sums) {
    int64_t edge = first;
    for (; edge + EDGES <= last; edge += EDGES)
        messages_of<EDGES>(*strip, edge, as_source, scale, bias, hidden_sums, scaled_sums);
    for (; edge < last; edge++) messages_of<1>(*strip, edge, as_source, scale, bias, hidden_sums, scaled_sums);
}

// The same of edges that are linear in their values: adds to scaled_sums [targets, HIDDEN] the sources' vectors, each
// scaled by what `first` makes of the edge's values, and to value_sums [targets, Q] the values. Ends are listed.
void linear_sums(const Strip* strip, int64_t first, int64_t last, const float* as_source, float* scaled_sums,
                 float* value_sums) {
    for (int64_t edge = first; edge < last; edge++) {
        const int64_t source = strip->source[edge], target = strip->target[edge];
        for (int64_t q = 0; q < strip->num_values; q++)
            value_sums[target * strip->num_values + q] += strip->values[q * strip->num_edges + edge];
        for (int start = 0; start < VECTORS; start += COLUMNS) {
            Vector sum[COLUMNS];
            for (int v = 0; v < COLUMNS; v++) sum[v] = load(strip->at_target + target * HIDDEN + (start + v) * LANES);
            const float* weight = strip->first + start * LANES;
            for (int64_t q = 0; q < strip->num_values; q++, weight += HIDDEN)
                for (int v = 0; v < COLUMNS; v++)
                    sum[v] += strip->values[q * strip->num_edges + edge] * load(weight + v * LANES);
            for (int v = 0; v < COLUMNS; v++) {
                const int64_t at = (start + v) * LANES;
                float* to = scaled_sums + target * HIDDEN + at;
                store(to, load(to) + sum[v] * load(as_source + source * HIDDEN + at));
            }
        }
    }
}

// Of some snapshots [C, total] the elements start to stop: a centre, sums of the differences from it and of their
// squares, then [C - 1, C - 1] sums of products of the differences of the earlier snapshots from the last one.
void measure(const float* snapshots, int64_t num_snapshots, int64_t total, int64_t start, int64_t stop, double* found) {
    const float* last = snapshots + (num_snapshots - 1) * total;
    Doubles sum = {}, squares = {}, products[MOST_SNAPSHOTS][MOST_SNAPSHOTS] = {}, moves[MOST_SNAPSHOTS];
    for (int64_t at = start; at < stop; at += DOUBLES) {
        Doubles away;
        differences(snapshots + at, stop - at, nullptr, snapshots[start], &away);
        sum += away;
    }
    const float centre = float(double(snapshots[start]) + sum_of(sum) / double(stop - start));
    sum = Doubles{};
    for (int64_t at = start; at < stop; at += DOUBLES) {
        for (int64_t c = 0; c < num_snapshots; c++) {
            Doubles away;
            differences(snapshots + c * total + at, stop - at, nullptr, centre, &away);
            sum += away;
            squares += away * away;
        }
        for (int64_t a = 0; a + 1 < num_snapshots; a++) {
            differences(snapshots + a * total + at, stop - at, last + at, 0.0f, &moves[a]);
            for (int64_t b = 0; b <= a; b++) products[a][b] += moves[a] * moves[b];
        }
    }
    *found++ = centre;
    *found++ = sum_of(sum);
    *found++ = sum_of(squares);
    for (int64_t a = 0; a + 1 < num_snapshots; a++)
        for (int64_t b = 0; b + 1 < num_snapshots; b++) *found++ = sum_of(products[a > b ? a : b][a > b ? b : a]);
}

// Writes the movements [F, edges] of the edges first to last.
void movements(const Strip* strip, int64_t first, int64_t last, const Head* head, float* movement) {
    int64_t edge = first;
    for (; edge + EDGES <= last; edge += EDGES) movements_of<EDGES>(*strip, edge, *head, movement);
    for (; edge < last; edge++) movements_of<1>(*strip, edge, *head, movement);
}

// How many columns of an H x H matrix are laid out together.
int64_t columns() { return COLUMNS * LANES; }
}
