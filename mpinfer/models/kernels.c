/* What torch does on a CPU in many small operations, each in one. See kernels.py.
 *
 * All numbers are float32. Loops are plain: the compiler makes vectors of them for the CPU it runs on. Every row is
 * computed by itself: what else is in a step changes nothing but how it is rounded, where many rows are computed in
 * another way than few (tiles.h).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
#define INLINE static inline __attribute__((always_inline))
#define LINE 64     /* bytes that memory gives at a time */
#define ALONE 32768 /* values: for fewer it does not pay to wake other threads */

INLINE float dot(const float *restrict a, const float *restrict b, i64 n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

/* exp(x), as a power of two: its whole part goes into the exponent, the rest into a polynomial (minimax, to 1e-7). Of x
 * below -87 and above 88 it is what those have: 1e-38 for -INFINITY. */
INLINE float exponential(float x)
{
    float t = x * 1.44269504088896341f;
    t = t < -126.0f ? -126.0f : t > 127.0f ? 127.0f : t;
    float n = __builtin_rintf(t), r = t - n;
    float p = 1.3276428e-3f;
    p = p * r + 9.6755410e-3f;
    p = p * r + 5.5507135e-2f;
    p = p * r + 2.4022120e-1f;
    p = p * r + 6.9314694e-1f;
    p = p * r + 1.0f;
    union { float f; int32_t i; } power = {p};
    power.i += (int32_t)n << 23;
    return power.f;
}

INLINE void normalize(const float *x, const float *restrict weight, float *y, i64 width, float epsilon)
{
    float scale = 1.0f / sqrtf(dot(x, x, width) / width + epsilon);
#pragma omp simd
    for (i64 i = 0; i < width; i++)
        y[i] = x[i] * scale * weight[i];
}

/* y = weight * x / sqrt(mean(x * x) + epsilon), of every row. */
void rms_norm(const float *x, const float *weight, float *y, i64 rows, i64 width, float epsilon)
{
#pragma omp parallel for if (rows * width > ALONE)
    for (i64 row = 0; row < rows; row++)
        normalize(x + row * width, weight, y + row * width, width, epsilon);
}

/* y = activation(gate) * up, where a row is a gate and an up side by side. */
void gated(const float *gate_up, float *y, i64 rows, i64 width, int gelu)
{
#pragma omp parallel for if (rows * width > ALONE)
    for (i64 row = 0; row < rows; row++) {
        const float *restrict gate = gate_up + 2 * row * width, *restrict up = gate + width;
        float *restrict to = y + row * width;
        if (gelu) /* x * (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) */
#pragma omp simd
            for (i64 i = 0; i < width; i++)
                to[i] = gate[i] / (1 + exponential(-1.5957691216057308f * (gate[i] + 0.044715f * gate[i] * gate[i] * gate[i]))) * up[i];
        else /* silu */
#pragma omp simd
            for (i64 i = 0; i < width; i++)
                to[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
    }
}

/* One head, each number of its first half together with that of its second. */
INLINE void rotate(const float *x, const float *restrict cosines, const float *restrict sines, float *restrict y, i64 size)
{
    i64 half = size / 2;
#pragma omp simd
    for (i64 i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        y[i] = a * cosines[i] - b * sines[i];
        y[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

/* Rotary embeddings of queries and keys, after their norms if they have any; keys and values go to their places. */
void rotate_and_store(const float *projected, const float *cosines, const float *sines, const float *query_norm,
                      const float *key_norm, float epsilon, float *query, float *keys, float *values,
                      const i64 *places, i64 capacity, i64 tokens, i64 heads, i64 kv_heads, i64 size)
{
    i64 stride = (heads + 2 * kv_heads) * size;
#pragma omp parallel for if (tokens * stride > ALONE)
    for (i64 token = 0; token < tokens; token++) {
        const float *from = projected + token * stride, *c = cosines + token * size, *s = sines + token * size;
        float normal[size];
        for (i64 head = 0; head < heads + kv_heads; head++, from += size) {
            i64 kv = head - heads;
            const float *weight = kv < 0 ? query_norm : key_norm, *x = from;
            if (weight) {
                normalize(from, weight, normal, size, epsilon);
                x = normal;
            }
            rotate(x, c, s, kv < 0 ? query + (token * heads + head) * size : keys + (places[token] + kv * capacity) * size, size);
        }
        for (i64 kv = 0; kv < kv_heads; kv++, from += size)
            memcpy(values + (places[token] + kv * capacity) * size, from, size * sizeof(float));
    }
}

#define BLOCK 128 /* keys that are looked at before sums are rescaled */
#define GROUP 16  /* heads that share a key, at most */
#define AHEAD 16  /* keys that are fetched before they are needed */

/* Of one token the heads that share keys, with a running maximum (as in FlashAttention). */
INLINE void attend_one(const float *query, const float *keys, const float *values, float *output, i64 length, i64 group,
                       i64 size, float scaling)
{
    float scores[GROUP][BLOCK], most[GROUP], sums[GROUP];
    for (i64 g = 0; g < group; g++)
        most[g] = -INFINITY, sums[g] = 0;
    memset(output, 0, group * size * sizeof(float));
    for (i64 first = 0; first < length; first += BLOCK) {
        i64 count = length - first < BLOCK ? length - first : BLOCK;
        const float *k = keys + first * size, *v = values + first * size;
        for (i64 j = 0; j < count; j++) {
            for (i64 i = 0; i < size; i += LINE / 4) { /* memory's own foresight ends with each page */
                __builtin_prefetch(k + (j + AHEAD) * size + i);
                __builtin_prefetch(v + j * size + i);
            }
            for (i64 g = 0; g < group; g++)
                scores[g][j] = dot(query + g * size, k + j * size, size) * scaling;
        }
        for (i64 g = 0; g < group; g++) {
            float high = most[g], sum = 0;
#pragma omp simd reduction(max : high)
            for (i64 j = 0; j < count; j++)
                high = scores[g][j] > high ? scores[g][j] : high;
            float rescale = exponential(most[g] - high);
#pragma omp simd reduction(+ : sum)
            for (i64 j = 0; j < count; j++)
                sum += scores[g][j] = exponential(scores[g][j] - high);
            most[g] = high;
            sums[g] = sums[g] * rescale + sum;
            if (first)
                for (i64 i = 0; i < size; i++)
                    output[g * size + i] *= rescale;
        }
        i64 j = 0;
        for (; j + 4 <= count; j += 4) { /* four at a time: sums are read and written a quarter as often */
            const float *restrict r = v + j * size;
            for (i64 g = 0; g < group; g++) {
                float *restrict to = output + g * size, *s = scores[g] + j;
                float a = s[0], b = s[1], c = s[2], d = s[3];
#pragma omp simd
                for (i64 i = 0; i < size; i++)
                    to[i] += a * r[i] + b * r[size + i] + c * r[2 * size + i] + d * r[3 * size + i];
            }
        }
        for (; j < count; j++)
            for (i64 g = 0; g < group; g++)
#pragma omp simd
                for (i64 i = 0; i < size; i++)
                    output[g * size + i] += scores[g][j] * v[j * size + i];
    }
    for (i64 g = 0; g < group; g++)
        for (i64 i = 0; i < size; i++)
            output[g * size + i] /= sums[g];
}

/* Every token to itself and those before it, of a layer's cache [slots, kv_heads, capacity, size]. */
void attend_tokens(const float *query, i64 stride, const float *keys, const float *values, const i64 *places,
            const i64 *positions, float *output, i64 rows, i64 heads, i64 kv_heads, i64 size, i64 capacity, i64 window,
            float scaling)
{
    i64 sharing = heads / kv_heads;
#pragma omp parallel for collapse(2) schedule(dynamic) if (rows * heads * size > 1024)
    for (i64 row = 0; row < rows; row++)
        for (i64 kv = 0; kv < kv_heads; kv++) {
            i64 length = positions[row] + 1, skipped = window && window < length ? length - window : 0;
            i64 start = (places[row] - positions[row] + skipped + kv * capacity) * size;
            length -= skipped;
            for (i64 first = 0; first < sharing; first += GROUP) {
                i64 group = sharing - first < GROUP ? sharing - first : GROUP, head = kv * sharing + first;
                const float *q = query + row * stride + head * size;
                float *to = output + (row * heads + head) * size;
                if (size == 64) /* sizes known at compile time are faster */
                    attend_one(q, keys + start, values + start, to, length, group, 64, scaling);
                else if (size == 128)
                    attend_one(q, keys + start, values + start, to, length, group, 128, scaling);
                else
                    attend_one(q, keys + start, values + start, to, length, group, size, scaling);
            }
        }
}

/* Vectors of the CPU, and how many of them, for each of SIX rows, its registers hold. */
#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4
#elif defined(__AVX__)
#define LANES 8
#define WIDE 2
#else
#define LANES 4
#define WIDE 4
#endif
#define SIX 6
#define PANEL (LANES * WIDE) /* columns that are computed together */
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t indices __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Some rows of x, `x_row` apart and their inputs `x_step`, times some vectors of a panel's piece, on top of what `base` has;
 * so many bytes of what is ahead are on their way to the cache meanwhile, for each input. */
INLINE void linear_tile(const float *x, i64 x_row, i64 x_step, const float *piece, const float *base, i64 base_row, float *y,
                        i64 y_row, i64 depth, const char *ahead, const int rows, const int vectors, const int fetched)
{
    vector sums[SIX][WIDE];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = *(const vector *)(base + r * base_row + v * LANES);
    for (i64 d = 0; d < depth; d++) {
        for (int byte = 0; byte < fetched; byte += LINE)
            __builtin_prefetch(ahead + d * fetched + byte);
        vector weights[WIDE];
        for (int v = 0; v < vectors; v++)
            weights[v] = *(const vector *)(piece + d * PANEL + v * LANES);
        for (int r = 0; r < rows; r++) /* outside, so that one number of x at a time takes a register */
            for (int v = 0; v < vectors; v++)
                sums[r][v] += x[r * x_row + d * x_step] * weights[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            *(vector *)(y + r * y_row + v * LANES) = sums[r][v];
}

INLINE void linear_rows(const float *x, i64 x_row, i64 x_step, const float *piece, const float *base, i64 base_row, float *y,
                        i64 y_row, i64 depth, const char *ahead, i64 rows, const int vectors, const int fetched)
{
    switch (rows) {
    case 1: linear_tile(x, x_row, x_step, piece, base, base_row, y, y_row, depth, ahead, 1, vectors, fetched); break;
    case 2: linear_tile(x, x_row, x_step, piece, base, base_row, y, y_row, depth, ahead, 2, vectors, fetched); break;
    case 3: linear_tile(x, x_row, x_step, piece, base, base_row, y, y_row, depth, ahead, 3, vectors, fetched); break;
    case 4: linear_tile(x, x_row, x_step, piece, base, base_row, y, y_row, depth, ahead, 4, vectors, fetched); break;
    case 5: linear_tile(x, x_row, x_step, piece, base, base_row, y, y_row, depth, ahead, 5, vectors, fetched); break;
    default: linear_tile(x, x_row, x_step, piece, base, base_row, y, y_row, depth, ahead, SIX, vectors, fetched);
    }
}

static const float zeros[PANEL];
static const indices lane = {
    0, 1, 2, 3,
#if LANES > 4
    4, 5, 6, 7,
#endif
#if LANES > 8
    8, 9, 10, 11, 12, 13, 14, 15,
#endif
};

/* What rows of x make of some vectors of a panel, on top of what y [rows, PANEL] has, or nothing at first. */
INLINE void multiply(const float *x, i64 x_row, i64 x_step, const float *panel, float *y, i64 depth, i64 rows,
                     const int vectors, const int at_first)
{
    i64 tiles = (rows + SIX - 1) / SIX;
    for (i64 tile = 0; tile < tiles; tile++) {
        i64 row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
        const float *from = x + row * x_row;
        float *to = y + row * PANEL;
        const float *base = at_first ? zeros : to;
        linear_rows(from, x_row, x_step, panel, base, at_first ? 0 : PANEL, to, PANEL, depth, 0, count, vectors, 0);
    }
}

/* to [columns, rows] = from [rows, columns] */
INLINE void turn(const float *from, float *to, i64 rows, i64 columns)
{
    if (rows % LANES || columns % LANES) {
        for (i64 r = 0; r < rows; r++)
            for (i64 c = 0; c < columns; c++)
                to[c * rows + r] = from[r * columns + c];
        return;
    }
    for (i64 r = 0; r < rows; r += LANES)
        for (i64 c = 0; c < columns; c += LANES) {
            vector square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                square[i] = *(const vector *)(from + (r + i) * columns + c);
            for (int bit = 1; bit < LANES; bit *= 2) { /* lanes and rows that differ in it change places */
                indices set = (lane & bit) != 0; /* -1 where it is */
                indices low = lane + (set & (LANES - bit)), high = lane + (set & LANES) + (~set & bit);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    if (!(i & bit)) {
                        vector a = square[i], b = square[i + bit];
                        square[i] = __builtin_shuffle(a, b, low), square[i + bit] = __builtin_shuffle(a, b, high);
                    }
            }
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                *(vector *)(to + (c + i) * rows + r) = square[i];
        }
}

#define TILE_ROWS 64   /* of fewer, taking weights apart takes longer than tiles win */
#define TILE_BLOCK 256 /* rows whose parts stay in the second cache */
#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__linux__)
#include "tiles.h"
#else
static int tiles_fit(i64 rows, i64 width) { return 0 * rows * width; }
static void linear_tiles(const float *x, const float *panels, const float *bias, float *y, void *parts, i64 rows, i64 width,
                         i64 outputs, i64 count)
{
}
static int attention_tiles_fit(i64 queries, i64 size) { return 0 * queries * size; }
static void attend_tiles(const float *query, i64 stride, const float *keys, const float *values, float *output, i64 position,
                         i64 tokens, i64 heads, i64 kv_heads, i64 size, i64 capacity, i64 window, float scaling)
{
}
#endif

#define KEYS 96 /* of a block: with a panel of queries their scores stay in the first cache; more than a panel's columns */

/* Some tokens of a sequence, in a row, times heads that share keys, at most a panel of them: blocks of keys, with a running
 * maximum. Queries lie in columns, so that keys and values are taken as they are. */
INLINE void attend_tile(const float *query, i64 stride, const float *keys, const float *values, float *output,
                        i64 output_stride, i64 position, i64 tokens, i64 group, i64 size, i64 window, float scaling,
                        const int vectors)
{
    const i64 columns = vectors * LANES;
    float rows[PANEL * size], queries[size * PANEL], sums[size * PANEL], scores[KEYS * PANEL];
    float most[PANEL], total[PANEL];
    int32_t last[PANEL]; /* key that a column looks at */
    for (i64 c = 0; c < columns; c++) {
        i64 own = c < tokens * group ? c : 0; /* what is left of a panel does the first one's work again */
        const float *from = query + own / group * stride + own % group * size;
        for (i64 i = 0; i < size; i++)
            rows[c * size + i] = from[i] * scaling;
        last[c] = position + own / group, most[c] = -1e30f, total[c] = 0;
    }
    turn(rows, queries, PANEL, size);
    memset(sums, 0, sizeof sums);
    i64 end = position + tokens, begin = window && window <= position ? position + 1 - window : 0;
    for (i64 first = begin; first < end; first += KEYS) {
        i64 count = end - first < KEYS ? end - first : KEYS;
        multiply(keys + first * size, size, 1, queries, scores, size, count, vectors, 1);
        if (first + count - 1 > position || (window && first + window < end))
            for (int32_t j = 0; j < count; j++)
#pragma omp simd
                for (i64 c = 0; c < columns; c++) {
                    int32_t back = last[c] - (int32_t)first - j;
                    float *score = scores + j * PANEL + c;
                    *score = back >= 0 && (!window || back < window) ? *score : -INFINITY;
                }
        float peak[PANEL], rescale[PANEL];
        memcpy(peak, most, sizeof peak);
        for (i64 j = 0; j < count; j++)
#pragma omp simd
            for (i64 c = 0; c < columns; c++)
                peak[c] = scores[j * PANEL + c] > peak[c] ? scores[j * PANEL + c] : peak[c];
#pragma omp simd
        for (i64 c = 0; c < columns; c++) {
            rescale[c] = exponential(most[c] - peak[c]);
            total[c] *= rescale[c];
        }
        memcpy(most, peak, sizeof most);
        for (i64 i = 0; i < size; i++)
#pragma omp simd
            for (i64 c = 0; c < columns; c++)
                sums[i * PANEL + c] *= rescale[c];
        for (i64 j = 0; j < count; j++)
#pragma omp simd
            for (i64 c = 0; c < columns; c++)
                total[c] += scores[j * PANEL + c] = exponential(scores[j * PANEL + c] - peak[c]);
        multiply(values + first * size, 1, size, scores, sums, count, size, vectors, 0);
    }
    turn(sums, rows, size, PANEL);
    for (i64 c = 0; c < tokens * group; c++)
        for (i64 i = 0; i < size; i++)
            output[c / group * output_stride + c % group * size + i] = rows[c * size + i] / total[c];
}

/* Tokens of one sequence, the first of which stands at `position`, to themselves and those before them. */
void attend_chunk(const float *query, i64 stride, const float *keys, const float *values, float *output, i64 position,
                  i64 tokens, i64 heads, i64 kv_heads, i64 size, i64 capacity, i64 window, float scaling)
{
    i64 sharing = heads / kv_heads, group = sharing < PANEL ? sharing : PANEL, step = PANEL / group;
    if (attention_tiles_fit(tokens * sharing, size)) {
        attend_tiles(query, stride, keys, values, output, position, tokens, heads, kv_heads, size, capacity, window, scaling);
        return;
    }
#pragma omp parallel for collapse(2) schedule(dynamic) if (tokens * heads * size > ALONE)
    for (i64 tile = (tokens - 1) / step; tile >= 0; tile--) /* the longest first */
        for (i64 kv = 0; kv < kv_heads; kv++) {
            i64 token = tile * step, count = tokens - token < step ? tokens - token : step;
            for (i64 head = 0; head < sharing; head += group) {
                i64 some = sharing - head < group ? sharing - head : group, offset = (kv * sharing + head) * size;
                const float *q = query + token * stride + offset, *k = keys + kv * capacity * size;
                const float *v = values + kv * capacity * size;
                float *to = output + token * heads * size + offset;
                i64 at = position + token;
                int half = count * some <= PANEL / 2; /* of a panel is enough */
#define ATTEND(size, vectors) attend_tile(q, stride, k, v, to, heads * size, at, count, some, size, window, scaling, vectors)
                if (size == 64)
                    half ? ATTEND(64, WIDE / 2) : ATTEND(64, WIDE);
                else
                    half ? ATTEND(size, WIDE / 2) : ATTEND(size, WIDE);
#undef ATTEND
            }
        }
}

#define DEPTH 96      /* inputs: such a piece of a panel stays in the first cache for all rows */
#define FETCH(run) /* a piece's bytes, PANEL * 4 for each input or four codes, in the time of one, two or four tiles */ \
    if (tiles == 1)                                                                                               \
        run(PANEL * 4);                                                                                           \
    else if (tiles < 4 && tile < 2)                                                                               \
        run(PANEL * 2);                                                                                           \
    else if (tiles >= 4 && tile < 4)                                                                              \
        run(PANEL);                                                                                               \
    else                                                                                                          \
        run(0);
#define MOST_ROWS 512 /* whose sums lie on the stack */

i64 panel_columns(void) { return PANEL; }

/* All rows of a piece of a panel, on top of what `base` has. The next piece comes from memory in their time, evenly in that
 * of the first tiles: of more at once a CPU cannot keep track, and would wait. */
INLINE void linear_piece(const float *x, i64 width, const float *piece, const float *base, i64 base_row, float *y,
                         i64 y_row, i64 depth, i64 rows)
{
    i64 tiles = (rows + SIX - 1) / SIX;
    const char *ahead = (const char *)(piece + depth * PANEL);
    for (i64 tile = 0; tile < tiles; tile++) {
        i64 row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
        const float *from = x + row * width, *under = base + row * base_row;
        float *to = y + row * y_row;
#define LINEAR(fetched) linear_rows(from, width, 1, piece, under, base_row, to, y_row, depth, ahead + tile * depth * fetched, count, WIDE, fetched)
        FETCH(LINEAR)
#undef LINEAR
    }
}

/* Floats that each row takes, of this width or a smaller one, where tiles are computed: PARTS * 2 bytes an input, and what
 * fills up tiles. */
i64 linear_scratch(i64 width) { return tiles_fit(TILE_ROWS, TILE_ROWS) ? 2 * width : 0; }

/* y [rows, outputs] = x [rows, width] * weights + bias, of weights in panels [panels, width, PANEL], padded as the bias
 * is; scratch is of `linear_scratch`. Weights have only so many `parts` of eight bits each (tiles.h). */
void linear(const float *x, const float *panels, const float *bias, float *y, void *scratch, i64 rows, i64 width,
            i64 outputs, i64 parts)
{
    if (tiles_fit(rows, width)) {
        i64 blocks = (rows + TILE_BLOCK - 1) / TILE_BLOCK;
        for (i64 block = 0; block < blocks; block++) {
            i64 row = rows * block / blocks, count = rows * (block + 1) / blocks - row;
            linear_tiles(x + row * width, panels, bias, y + row * outputs, scratch, count, width, outputs, parts);
        }
        return;
    }
#pragma omp parallel for
    for (i64 column = 0; column < outputs; column += PANEL)
        for (i64 start = 0; start < rows; start += MOST_ROWS) {
            i64 some = rows - start < MOST_ROWS ? rows - start : MOST_ROWS, whole = column + PANEL <= outputs;
            float part[whole ? 1 : some * PANEL]; /* of a last panel with padding */
            float *own = y + start * outputs + column, *to = whole ? own : part;
            for (i64 first = 0; first < width; first += DEPTH) {
                i64 depth = width - first < DEPTH ? width - first : DEPTH, stride = whole ? outputs : PANEL;
                const float *from = x + start * width + first, *piece = panels + column * width + first * PANEL;
                linear_piece(from, width, piece, first ? to : bias + column, first ? stride : 0, to, stride, depth, some);
            }
            for (i64 row = 0; row < some && !whole; row++)
                memcpy(own + row * outputs, part + row * PANEL, (outputs - column) * sizeof(float));
        }
}

/* x plus or minus its partner, `distance` lanes away. */
INLINE vector butterfly(vector x, int distance)
{
    indices upper = (lane & distance) != 0;
    vector sign = __builtin_convertvector(upper * 2 + 1, vector);
    return __builtin_shuffle(x, lane ^ distance) + sign * x;
}

/* The product with the Hadamard matrix of that many rows, a power of two, times the root of its size. */
INLINE void hadamard(float *x, i64 size)
{
    if (size == 64) { /* in registers */
        enum { COUNT = 64 / LANES };
        vector v[COUNT];
        memcpy(v, x, sizeof v);
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 4
            for (int distance = 1; distance < LANES; distance *= 2)
                v[i] = butterfly(v[i], distance);
#pragma GCC unroll 4
        for (int distance = 1; distance < COUNT; distance *= 2)
#pragma GCC unroll 16
            for (int i = 0; i < COUNT; i++)
                if (!(i & distance)) {
                    vector a = v[i], b = v[i + distance];
                    v[i] = a + b, v[i + distance] = a - b;
                }
        memcpy(x, v, sizeof v);
        return;
    }
    for (i64 distance = 1; distance < size; distance *= 2)
        for (i64 i = 0; i < size; i += 2 * distance)
            for (i64 j = i; j < i + distance; j++) {
                float a = x[j], b = x[j + distance];
                x[j] = a + b, x[j + distance] = a - b;
            }
}

/* Inputs of a linear layer whose codes share a step, and weights a scale. With 64 the kernel takes 5 % longer. */
#define INT8_GROUP 192
#define ZERO 128 /* of weights, since instructions want one of two factors without a sign */

/* Codes of inputs go from -LEVELS to LEVELS, in steps of a group's largest number, or sum where QUADS is 2: there four
 * products meet in 16 bits, of inputs 0, 1, 4, 5 or 2, 3, 6, 7 of eight. 255 times the sum of 126, and of four errors of
 * rounding, at most 128, has no more. */
#if defined(__AVX512VNNI__)
#define LEVELS 127
#define QUADS 1
#define INT8_ROWS SIX
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define LEVELS 126
#define QUADS 2
#define INT8_ROWS 5 /* so that a register is left for ones */
#endif

#ifdef LEVELS
/* As many as linear_int8 expects, or 0 where there are no instructions for int8 that pay. */
i64 int8_group(void) { return INT8_GROUP; }

/* For tests. */
i64 int8_levels(void) { return LEVELS; }
i64 int8_quads(void) { return QUADS; }

INLINE vector larger(vector a, vector b)
{
    indices first = a > b;
    return (vector)(((indices)a & first) | ((indices)b & ~first));
}

/* Of numbers, behind which zeros fill up a vector, the largest or the largest sum of those of one sign that meet. */
INLINE float largest(const float *x, i64 count)
{
    vector most = (vector){} + 1e-30f;
    for (i64 i = 0; i < count; i += LANES) {
        vector v = *(const vector *)(x + i), up = larger(v, (vector){}), down = up - v;
        if (QUADS == 2) {
            up += __builtin_shuffle(up, lane ^ 1), down += __builtin_shuffle(down, lane ^ 1);
            up += __builtin_shuffle(up, lane ^ 4), down += __builtin_shuffle(down, lane ^ 4);
        }
        most = larger(most, larger(up, down));
    }
    float result = most[0];
    for (int i = 1; i < LANES; i++)
        result = most[i] > result ? most[i] : result;
    return result;
}

/* Codes of every row, turned block by block; for each group of a row what a step is worth, and the sum of the codes. */
static void quantize(const float *x, int8_t *codes, float *steps, int32_t *sums, i64 rows, i64 width, i64 block)
{
    float root = 1.0f / sqrtf(block);
    i64 groups = (width + INT8_GROUP - 1) / INT8_GROUP;
#pragma omp parallel for if (rows * width > ALONE)
    for (i64 row = 0; row < rows; row++) {
        float turned[width + LANES];
        memcpy(turned, x + row * width, width * sizeof(float));
        memset(turned + width, 0, LANES * sizeof(float));
        for (i64 i = 0; i < width; i += block)
            hadamard(turned + i, block);
        for (i64 g = 0; g < groups; g++) {
            i64 start = g * INT8_GROUP, stop = start + INT8_GROUP < width ? start + INT8_GROUP : width;
            float most = largest(turned + start, stop - start);
            float inverse = LEVELS / most;
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (i64 i = start; i < stop; i++) {
                int32_t value = (int32_t)__builtin_rintf(turned[i] * inverse);
                sum += value;
                codes[row * width + i] = value;
            }
            steps[row * groups + g] = most * root / LEVELS;
            sums[row * groups + g] = sum;
        }
    }
}

/* sum += codes * weights, of QUADS times four inputs, the weights PANEL * 4 apart; in assembler, since of intrinsics
 * compilers keep more at hand than registers hold. */
INLINE void int8_add(indices *sum, const int8_t *codes, const uint8_t *weights)
{
    indices first = *(const indices *)weights;
#if QUADS == 1
    int32_t four;
    memcpy(&four, codes, 4);
    __asm__("vpdpbusd %1, %2, %0" : "+v"(*sum) : "v"(four - (indices){}), "v"(first));
#else
    static const int16_t ones[2 * LANES] __attribute__((aligned(4 * LANES))) = {[0 ... 2 * LANES - 1] = 1};
    indices second = *(const indices *)(weights + PANEL * 4), x, y;
    __asm__("vpbroadcastd %3, %1\n\tvpbroadcastd %4, %2\n\t"
            "vpmaddubsw %1, %5, %1\n\tvpmaddubsw %2, %6, %2\n\t"
            "vpaddw %2, %1, %1\n\tvpmaddwd %7, %1, %1\n\tvpaddd %1, %0, %0"
            : "+v"(*sum), "=&v"(x), "=&v"(y)
            : "m"(*(const int32_t *)codes), "m"(*(const int32_t *)(codes + 4)), "v"(first), "v"(second), "v"(*(const indices *)ones));
#endif
}

/* As linear_tile, of a group's inputs, four at a time; `steps` and `codes_sum` are of rows that have `groups`. */
INLINE void int8_tile(const int8_t *codes, i64 width, const float *steps, const int32_t *codes_sum, i64 groups,
                      const uint8_t *piece, const float *scales, const float *base, i64 base_row, float *y, i64 y_row,
                      i64 quads, const char *ahead, const int rows, const int fetched)
{
    indices totals[INT8_ROWS][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < WIDE; v++)
            totals[r][v] = (indices){} - ZERO * codes_sum[r * groups];
    for (i64 q = 0; q < quads; q += QUADS) {
        for (int byte = 0; byte < QUADS * fetched; byte += LINE)
            __builtin_prefetch(ahead + q * fetched + byte);
#pragma GCC unroll 8
        for (int v = 0; v < WIDE; v++)
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++)
                int8_add(&totals[r][v], codes + r * width + q * 4, piece + (q * PANEL + v * LANES) * 4);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < WIDE; v++) {
            vector worth = steps[r * groups] * *(const vector *)(scales + v * LANES);
            *(vector *)(y + r * y_row + v * LANES) = *(const vector *)(base + r * base_row + v * LANES) +
                                                     __builtin_convertvector(totals[r][v], vector) * worth;
        }
}

INLINE void int8_rows(const int8_t *codes, i64 width, const float *steps, const int32_t *codes_sum, i64 groups,
                      const uint8_t *piece, const float *scales, const float *base, i64 base_row, float *y, i64 y_row,
                      i64 quads, const char *ahead, i64 rows, const int fetched)
{
    switch (rows) {
    case 1: int8_tile(codes, width, steps, codes_sum, groups, piece, scales, base, base_row, y, y_row, quads, ahead, 1, fetched); break;
    case 2: int8_tile(codes, width, steps, codes_sum, groups, piece, scales, base, base_row, y, y_row, quads, ahead, 2, fetched); break;
    case 3: int8_tile(codes, width, steps, codes_sum, groups, piece, scales, base, base_row, y, y_row, quads, ahead, 3, fetched); break;
    case 4: int8_tile(codes, width, steps, codes_sum, groups, piece, scales, base, base_row, y, y_row, quads, ahead, 4, fetched); break;
    case 5: int8_tile(codes, width, steps, codes_sum, groups, piece, scales, base, base_row, y, y_row, quads, ahead, 5, fetched); break;
    default: int8_tile(codes, width, steps, codes_sum, groups, piece, scales, base, base_row, y, y_row, quads, ahead, INT8_ROWS, fetched);
    }
}

/* As linear_piece. */
INLINE void int8_piece(const int8_t *codes, i64 width, const float *steps, const int32_t *codes_sum, i64 groups,
                       const uint8_t *piece, const float *scales, const float *base, i64 base_row, float *y, i64 y_row,
                       i64 quads, i64 rows)
{
    i64 tiles = (rows + INT8_ROWS - 1) / INT8_ROWS;
    const char *ahead = (const char *)piece + quads * PANEL * 4;
    for (i64 tile = 0; tile < tiles; tile++) {
        i64 row = rows * tile / tiles, count = rows * (tile + 1) / tiles - row;
        const int8_t *from = codes + row * width;
        const float *worth = steps + row * groups, *under = base + row * base_row;
        const int32_t *sum = codes_sum + row * groups;
        float *to = y + row * y_row;
#define INT8(fetched) int8_rows(from, width, worth, sum, groups, piece, scales, under, base_row, to, y_row, quads, ahead + tile * quads * fetched, count, fetched)
        FETCH(INT8)
#undef INT8
    }
}

/* Floats that a token takes while it is quantized. */
i64 int8_scratch(i64 width) { return (width + 3) / 4 + 2 * (width / INT8_GROUP + 1); }

/* y [rows, outputs] = x [rows, width] * weights + bias, of x and weights turned block by block, and in groups. Weights are
 * in panels [panels, width / 4, PANEL, 4] of codes plus ZERO, with scales [panels, groups, PANEL]; scratch is of `int8_scratch`. */
void linear_int8(const float *x, i64 block, const uint8_t *panels, const float *scales, const float *bias, float *y,
                 void *scratch, i64 rows, i64 width, i64 outputs)
{
    i64 groups = (width + INT8_GROUP - 1) / INT8_GROUP;
    float *steps = scratch;
    int32_t *codes_sum = (int32_t *)(steps + rows * groups);
    int8_t *codes = (int8_t *)(codes_sum + rows * groups);
    quantize(x, codes, steps, codes_sum, rows, width, block);
#pragma omp parallel for
    for (i64 column = 0; column < outputs; column += PANEL)
        for (i64 start = 0; start < rows; start += MOST_ROWS) {
            i64 some = rows - start < MOST_ROWS ? rows - start : MOST_ROWS, whole = column + PANEL <= outputs;
            float part[whole ? 1 : some * PANEL]; /* of a last panel with padding */
            float *own = y + start * outputs + column, *to = whole ? own : part;
            for (i64 group = 0; group < groups; group++) {
                i64 first = group * INT8_GROUP, place = start * groups + group, stride = whole ? outputs : PANEL;
                i64 quads = (width - first < INT8_GROUP ? width - first : INT8_GROUP) / 4;
                const int8_t *from = codes + start * width + first;
                const float *worth = steps + place, *scale = scales + column * groups + group * PANEL;
                const int32_t *sum = codes_sum + place;
                const uint8_t *piece = panels + column * width + first * PANEL;
                int8_piece(from, width, worth, sum, groups, piece, scale, group ? to : bias + column, group ? stride : 0, to,
                           stride, quads, some);
            }
            for (i64 row = 0; row < some && !whole; row++)
                memcpy(own + row * outputs, part + row * PANEL, (outputs - column) * sizeof(float));
        }
}
#else
i64 int8_group(void) { return 0; }
i64 int8_levels(void) { return 0; }
i64 int8_quads(void) { return 0; }
i64 int8_scratch(i64 width) { return 0 * width; }
void linear_int8(const float *x, i64 block, const uint8_t *panels, const float *scales, const float *bias, float *y,
                 void *scratch, i64 rows, i64 width, i64 outputs)
{
}
#endif

/* A linear layer as it is packed: of float32 in so many parts or, where `block` is not 0, of int8 codes with scales. */
struct linear {
    const void *panels;
    const float *bias;
    i64 width, outputs, parts, block;
    const float *scales;
};

/* None where it has no weights. */
struct norm {
    const float *weight;
    float epsilon;
};

/* Of a decoder: x += attention(x), x += mlp(x), each between norms. */
struct layer {
    struct linear projections, output, gates, down; /* queries, keys and values side by side; gate and up side by side */
    struct norm before_attention, query, key, after_attention, before_mlp, after_mlp;
    i64 heads, kv_heads, size, window, gelu;
    float scaling;
};

/* Tokens of sequences, in rows: first those that are alone, then chunks, of each its first row, tokens, slot, position;
 * places and positions of all. */
struct step {
    i64 tokens, alone, chunks;
    const i64 *places, *positions, *chunk;
};

static void apply(const struct linear *l, const float *x, float *y, i64 rows, void *scratch)
{
    if (l->block)
        linear_int8(x, l->block, l->panels, l->scales, l->bias, y, scratch, rows, l->width, l->outputs);
    else
        linear(x, l->panels, l->bias, y, scratch, rows, l->width, l->outputs, l->parts);
}

static void apply_norm(const struct norm *n, const float *x, float *y, i64 rows, i64 width)
{
    if (n->weight)
        rms_norm(x, n->weight, y, rows, width, n->epsilon);
    else if (x != y)
        memcpy(y, x, rows * width * sizeof(float));
}

/* sum += x */
static void add(float *sum, const float *x, i64 count)
{
#pragma omp parallel for simd if (count > ALONE)
    for (i64 i = 0; i < count; i++)
        sum[i] += x[i];
}

INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }

/* Floats that a layer's halves need for each token. */
i64 layer_scratch(const struct layer *l)
{
    i64 hidden = l->output.outputs, query = l->heads * l->size, inner = l->down.width;
    i64 first = hidden + l->projections.outputs + 2 * query, second = hidden + 3 * inner;
    i64 widest = most(hidden, most(query, inner));
    return most(first, second) + most(int8_scratch(widest), linear_scratch(widest));
}

/* What one layer needs besides hidden states. Where there is a `late` step, for the rows `kept`, the others of a last
 * layer are not used. Keys and values have `capacity` tokens for each head of a slot. */
struct pass {
    const struct layer *layer;
    const struct step *step, *late;
    const i64 *kept;
    const float *cosines, *sines;
    float *keys, *values;
    i64 capacity;
};

/* The first half of a layer, without the sum: the residual is x, which may lie in the same place, and what is to be added
 * to it the attention's output. Both have one row for each token, or for each of the rows kept. */
void layer_attention(const struct pass *p, const float *x, float *residual, float *added, float *scratch)
{
    const struct layer *l = p->layer;
    const struct step *s = p->step;
    i64 tokens = s->tokens, hidden = l->output.outputs, width = l->heads * l->size;
    float *normal = scratch, *projected = normal + tokens * l->projections.width;
    float *query = projected + tokens * l->projections.outputs, *attended = query + tokens * width;
    float *rest = attended + tokens * width;

    apply_norm(&l->before_attention, x, normal, tokens, hidden);
    apply(&l->projections, normal, projected, tokens, rest);
    rotate_and_store(projected, p->cosines, p->sines, l->query.weight, l->key.weight, l->query.epsilon, query, p->keys,
                     p->values, s->places, p->capacity, tokens, l->heads, l->kv_heads, l->size);
    if (p->late) {
        s = p->late, tokens = s->tokens;
        for (i64 row = 0; row < tokens; row++) { /* kept[row] >= row */
            memmove(query + row * width, query + p->kept[row] * width, width * sizeof(float));
            memmove(residual + row * hidden, x + p->kept[row] * hidden, hidden * sizeof(float));
        }
    } else if (residual != x)
        memcpy(residual, x, tokens * hidden * sizeof(float));
    attend_tokens(query, width, p->keys, p->values, s->places, s->positions, attended, s->alone, l->heads, l->kv_heads,
                  l->size, p->capacity, l->window, l->scaling);
    for (const i64 *c = s->chunk; c < s->chunk + 4 * s->chunks; c += 4) {
        i64 slot = c[2] * l->kv_heads * p->capacity * l->size;
        attend_chunk(query + c[0] * width, width, p->keys + slot, p->values + slot, attended + c[0] * width, c[3], c[1],
                     l->heads, l->kv_heads, l->size, p->capacity, l->window, l->scaling);
    }
    apply(&l->output, attended, added, tokens, rest);
}

/* The second half: takes what the first one adds, and leaves what is to be added in the end. */
void layer_mlp(const struct layer *l, i64 tokens, float *residual, float *added, float *scratch)
{
    i64 hidden = l->output.outputs, inner = l->down.width;
    float *normal = scratch, *gates = normal + tokens * hidden, *active = gates + 2 * tokens * inner;
    float *rest = active + tokens * inner;

    apply_norm(&l->after_attention, added, added, tokens, hidden);
    add(residual, added, tokens * hidden);
    apply_norm(&l->before_mlp, residual, normal, tokens, hidden);
    apply(&l->gates, normal, gates, tokens, rest);
    gated(gates, active, tokens, inner, l->gelu);
    apply(&l->down, active, added, tokens, rest);
}

void layer_end(const struct layer *l, i64 tokens, float *residual, float *added)
{
    i64 hidden = l->output.outputs;
    apply_norm(&l->after_mlp, added, added, tokens, hidden);
    add(residual, added, tokens * hidden);
}

/* Where the shards of a layer sum up, as transport/shared_memory.py has it laid out. */
struct sums {
    i64 shards, place, spins;
    i64 *state;           /* the turn, what this shard has said, and the numbers it has summed here */
    i64 *const *counters; /* what each shard has said */
    float *const *slots;  /* of each shard in the first turn, then in the second */
    int (*wait)(void);    /* until all have said as much as this one; not 0 if that failed */
};

/* The sum over the shards in the place of each one's values, at most those of a slot; in order, so that all get the same. */
int sum_shards(const struct sums *s, float *values, i64 n)
{
    i64 turn = s->state[0] = 1 - s->state[0], said = s->state[1] += 1;
    float *const *slots = s->slots + turn * s->shards;
    memcpy(slots[s->place], values, n * sizeof(float));
    __atomic_store_n(s->counters[s->place], said, __ATOMIC_RELEASE);
    for (i64 shard = 0; shard < s->shards; shard++)
        for (i64 spins = s->spins; __atomic_load_n(s->counters[shard], __ATOMIC_ACQUIRE) < said; spins--)
            if (spins <= 0 && s->wait())
                return 1;
    memcpy(values, slots[0], n * sizeof(float));
    for (i64 shard = 1; shard < s->shards; shard++)
        add(values, slots[shard], n);
    s->state[2] += n;
    return 0;
}

/* Layers one after another, of a shard with `sums`; `progress` is called before each. Not 0 if one of those failed. */
int decoder_layers(const struct pass *passes, i64 count, const float *x, float *residual, float *added, float *scratch,
                   const struct sums *sums, int (*progress)(void))
{
    for (const struct pass *p = passes; p < passes + count; p++, x = residual) {
        i64 tokens = p->late ? p->late->tokens : p->step->tokens, n = tokens * p->layer->output.outputs;
        if (progress())
            return 1;
        layer_attention(p, x, residual, added, scratch);
        if (sums && sum_shards(sums, added, n))
            return 1;
        layer_mlp(p->layer, tokens, residual, added, scratch);
        if (sums && sum_shards(sums, added, n))
            return 1;
        layer_end(p->layer, tokens, residual, added);
    }
    return 0;
}
