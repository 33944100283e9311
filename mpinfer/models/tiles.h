/* Products of float32 by a CPU's matrix unit (AMX). It takes bfloat16, of which three make up a float32 exactly: x = a + b
 * + c. Of the nine products of two such numbers six are summed, in float32; the others are below its rounding, so that
 * sums are as exact as those of float32 (Henry, Tang and Heinecke 2019, arXiv:1904.06376).
 *
 * A `left` factor lies in rows, [rows, depth], and a `right` one in pairs of rows, [depth / 2, columns, 2]; of both there
 * are PARTS, one after the other. Included by kernels.c, for CPUs that have such a unit.
 */
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bfloat;
#define PARTS 3
#define ALIGNED __attribute__((aligned(LINE)))
#define TILE 16  /* most rows of a tile */
#define PAIR 32  /* numbers of a row of a tile; and of two tiles' rows and columns, which are computed together */

static int tiles_allowed;

/* Linux gives a process the unit's registers when it asks for them. */
__attribute__((constructor)) static void ask_for_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    tiles_allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* What a thread does before tile_products, and _tile_release() afterwards: tiles of left factors and sums have so many
 * rows. */
static void configure_tiles(int rows)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++)
        tiles.bytes[i] = LINE, tiles.rows[i] = i < 6 ? rows : TILE;
    _tile_loadconfig(&tiles);
}

/* What is left of x when its first eight bits, as bfloat16 has them, are taken. */
INLINE __m512 without_top(__m512 x)
{
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0xFFFF0000))));
}

/* The parts of PAIR numbers of a left factor, which follow each other. */
INLINE void store_left(__m512 a, __m512 b, bfloat *parts, i64 part)
{
    static const uint16_t odd[PAIR] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i top = _mm512_loadu_si512(odd);
    for (int p = 0; p < PARTS; p++, a = without_top(a), b = without_top(b))
        _mm512_storeu_si512(parts + p * part,
                            _mm512_permutex2var_epi16(_mm512_castps_si512(a), top, _mm512_castps_si512(b)));
}

/* Those of a row, of a multiple of PAIR numbers, times a scale. */
INLINE void split_left(const float *x, float scale, bfloat *parts, i64 part, i64 count)
{
    for (i64 i = 0; i < count; i += PAIR)
        store_left(_mm512_loadu_ps(x + i) * scale, _mm512_loadu_ps(x + i + LANES) * scale, parts + i, part);
}

/* The first so many of two rows of a right factor, of a multiple of LANES columns. */
INLINE void split_right(const float *x, const float *y, bfloat *parts, i64 part, i64 columns, const int count)
{
    for (i64 i = 0; i < columns; i += LANES) {
        __m512 a = _mm512_loadu_ps(x + i), b = _mm512_loadu_ps(y + i);
        for (int p = 0; p < count; p++, a = without_top(a), b = without_top(b))
            _mm512_storeu_si512(parts + p * part + 2 * i,
                                _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(_mm512_castps_si512(a), 16),
                                                        _mm512_castps_si512(b)));
    }
}

/* sums [two tiles' rows, stride] = left * right, on top of what they have or of nothing at first, of PAIR columns; `left_row`
 * and `right_row` are the lengths of rows in memory. The right factor has only its first `count` parts, if others are zero.
 * Meanwhile so many lines of what is `ahead` are fetched for each PAIR of depth. */
INLINE void tile_products(const bfloat *left, i64 left_row, i64 left_part, const bfloat *right, i64 right_row,
                          i64 right_part, float *sums, i64 stride, i64 rows, i64 depth, int at_first, const int count,
                          const char *ahead, i64 lines)
{
    float *below = sums + rows * stride;
    __asm__ volatile("" : : : "memory"); /* compilers may not know that tiles are read from memory */
    if (at_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 4 * stride);
        _tile_loadd(1, sums + TILE, 4 * stride);
        _tile_loadd(2, below, 4 * stride);
        _tile_loadd(3, below + TILE, 4 * stride);
    }
#define ABOVE(p) _tile_loadd(4, left + p * left_part, 2 * left_row);
#define BELOW(p) _tile_loadd(5, left + p * left_part + rows * left_row, 2 * left_row);
#define FIRST(p) _tile_loadd(6, right + p * right_part, 2 * right_row);
#define SECOND(p) _tile_loadd(7, right + p * right_part + PAIR, 2 * right_row);
#define ADD(sum, l, r) _tile_dpbf16ps(sum, l, r);
/* All four products, and next parts where they do not need one any more. */
#define NEXT_LEFT(p) ADD(0, 4, 6) ADD(1, 4, 7) ABOVE(p) ADD(2, 5, 6) ADD(3, 5, 7) BELOW(p)
#define NEXT_RIGHT(p) ADD(0, 4, 6) ADD(2, 5, 6) FIRST(p) ADD(1, 4, 7) ADD(3, 5, 7) SECOND(p)
    FIRST(0) SECOND(0) ABOVE(2) BELOW(2)
    for (i64 d = 0; d < depth; d += PAIR) {
        for (i64 line = 0; line < lines; line++, ahead += LINE)
            __builtin_prefetch(ahead, 0, 2);
        NEXT_LEFT(1) NEXT_LEFT(0)
        if (count > 2) {
            NEXT_RIGHT(2)
        }
        if (count > 1) {
            NEXT_RIGHT(1) NEXT_LEFT(1)
        }
        if (d + PAIR < depth)
            left += PAIR, right += TILE * right_row;
        ADD(0, 4, 6) ADD(2, 5, 6) FIRST(0) ADD(1, 4, 7) ABOVE(2) ADD(3, 5, 7) SECOND(0) BELOW(2)
    }
#undef NEXT_LEFT
#undef NEXT_RIGHT
#undef ABOVE
#undef BELOW
#undef FIRST
#undef SECOND
#undef ADD
    _tile_stored(0, sums, 4 * stride);
    _tile_stored(1, sums + TILE, 4 * stride);
    _tile_stored(2, below, 4 * stride);
    _tile_stored(3, below + TILE, 4 * stride);
}

#define TILE_DEPTH 768 /* inputs: the parts of such a piece of a panel stay in the second cache */

static int tiles_fit(i64 rows, i64 width) { return tiles_allowed && rows >= TILE_ROWS && width % PAIR == 0; }

/* All rows of a piece of a panel, of which so many columns are not padding, on top of what `base` has. The next piece comes
 * from memory meanwhile, evenly in the time of this one. */
INLINE void tiles_piece(const bfloat *left, i64 width, i64 part, const float *piece, bfloat *weights, const float *base,
                        i64 base_row, float *y, i64 y_row, i64 rows, i64 height, i64 depth, i64 columns, const int count)
{
    i64 pairs = (rows + 2 * height - 1) / (2 * height), lines = (PANEL * PAIR * 4 / LINE + 2 * pairs - 1) / (2 * pairs);
    const char *ahead = (const char *)(piece + depth * PANEL);
    float sums[PAIR * PAIR] ALIGNED;
    for (i64 d = 0; d < depth; d += 2)
        split_right(piece + d * PANEL, piece + (d + 1) * PANEL, weights + d * PANEL, depth * PANEL, PANEL, count);
    for (i64 top = 0; top < rows; top += 2 * height)
        for (i64 c = 0; c < PANEL; c += PAIR, ahead += lines * depth / PAIR * LINE) {
            i64 some = rows - top < 2 * height ? rows - top : 2 * height, whole = columns - c < PAIR ? columns - c : PAIR;
            tile_products(left + top * width, width, part, weights + 2 * c, 2 * PANEL, depth * PANEL, sums, PAIR, height, depth, 1,
                          count, ahead, lines);
            for (i64 r = 0; r < some; r++) {
                const float *under = base + (top + r) * base_row + c;
                float *to = y + (top + r) * y_row + c;
#pragma omp simd
                for (i64 i = 0; i < whole; i++)
                    to[i] = under[i] + sums[r * PAIR + i];
            }
        }
}

/* As `linear`, of at most TILE_BLOCK rows; `parts` are theirs, and have room for what fills up tiles. */
static void linear_tiles(const float *x, const float *panels, const float *bias, float *y, bfloat *parts, i64 rows, i64 width,
                         i64 outputs, i64 count)
{
    i64 pairs = (rows + PAIR - 1) / PAIR, height = (rows + 2 * pairs - 1) / (2 * pairs), part = 2 * pairs * height * width;
    i64 pieces = (width + TILE_DEPTH - 1) / TILE_DEPTH, most_depth = ((width + pieces - 1) / pieces + PAIR - 1) / PAIR * PAIR;
#pragma omp parallel
    {
        bfloat weights[PARTS * most_depth * PANEL] ALIGNED;
        configure_tiles(height);
#pragma omp for
        for (i64 row = 0; row < rows; row++)
            split_left(x + row * width, 1, parts + row * width, part, width);
#pragma omp for
        for (i64 column = 0; column < outputs; column += PANEL)
            for (i64 first = 0; first < width; first += most_depth) {
                i64 depth = width - first < most_depth ? width - first : most_depth, stride = first ? outputs : 0;
                const float *piece = panels + column * width + first * PANEL;
                float *to = y + column;
                const float *base = first ? to : bias + column;
#define PIECE(count) tiles_piece(parts + first, width, part, piece, weights, base, stride, to, outputs, rows, height, depth, outputs - column, count)
                if (count == 1)
                    PIECE(1);
                else if (count == 2)
                    PIECE(2);
                else
                    PIECE(PARTS);
#undef PIECE
            }
        _tile_release();
    }
}

#define TILE_KEYS 128   /* of a block */
#define TILE_QUERIES 512 /* of 64 numbers, which share the work of taking keys and values apart: most that a thread takes */

static int attention_tiles_fit(i64 queries, i64 size) { return tiles_allowed && queries >= TILE_ROWS && size % PAIR == 0; }

/* 2 ^ x, of an x that may be -INFINITY; see `exponential`. */
INLINE __m512 power_of_two(__m512 x)
{
    __m512 r = _mm512_reduce_ps(x, 0), p = _mm512_set1_ps(1.3276428e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6755410e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5507135e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022120e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314694e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, r));
}

/* What a block of keys weighs, of PAIR rows of scores: parts of 2 ^ (score - the most so far), and rows of sums and totals
 * made to fit. In steps of all rows, so that none waits for what its own has not finished. */
INLINE void weigh(const float *scores, i64 width, float *most, float *total, float *sums, i64 size, bfloat *weights)
{
    float peak[PAIR] ALIGNED, rescale[PAIR] ALIGNED;
    for (i64 r = 0; r < PAIR; r++) {
        __m512 high = _mm512_set1_ps(most[r]);
        for (i64 j = 0; j < width; j += LANES)
            high = _mm512_max_ps(high, _mm512_loadu_ps(scores + r * TILE_KEYS + j));
        peak[r] = _mm512_reduce_max_ps(high);
    }
    for (i64 r = 0; r < PAIR; r += LANES) {
        __m512 high = _mm512_loadu_ps(peak + r);
        _mm512_storeu_ps(rescale + r, power_of_two(_mm512_sub_ps(_mm512_loadu_ps(most + r), high)));
        _mm512_storeu_ps(most + r, high);
    }
    for (i64 r = 0; r < PAIR; r++) {
        __m512 high = _mm512_set1_ps(peak[r]), sum = _mm512_setzero_ps();
        for (i64 j = 0; j < width; j += PAIR) {
            const float *s = scores + r * TILE_KEYS + j;
            __m512 a = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(s), high));
            __m512 b = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(s + LANES), high));
            sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
            store_left(a, b, weights + r * TILE_KEYS + j, PAIR * TILE_KEYS);
        }
        total[r] = total[r] * rescale[r] + _mm512_reduce_add_ps(sum);
#pragma omp simd
        for (i64 i = 0; i < size; i++)
            sums[r * size + i] *= rescale[r];
    }
}

/* Heads that share keys of some tokens of a sequence, as rows: blocks of keys, with a running maximum. */
INLINE void attend_block(const float *query, i64 stride, const float *keys, const float *values, float *output,
                         i64 output_stride, i64 position, i64 tokens, i64 group, i64 size, i64 window, float scaling)
{
    const i64 count = tokens * group, rows = (count + PAIR - 1) / PAIR * PAIR, part = rows * size;
    bfloat queries[PARTS * part] ALIGNED, own[PARTS * TILE_KEYS * size] ALIGNED, turned[PARTS * TILE_KEYS * size] ALIGNED;
    bfloat weights[PARTS * PAIR * TILE_KEYS] ALIGNED;
    float sums[rows * size] ALIGNED, scores[PAIR * TILE_KEYS] ALIGNED, most[rows], total[rows];
    for (i64 r = 0; r < rows; r++) {
        i64 row = r < count ? r : 0; /* what is left of a tile does the first one's work again */
        const float *from = query + row / group * stride + row % group * size;
        split_left(from, scaling * 1.44269504088896341f, queries + r * size, part, size); /* for powers of two */
        most[r] = -1e30f, total[r] = 0;
    }
    memset(sums, 0, sizeof sums);
    i64 end = position + tokens, begin = window && window <= position ? position + 1 - window : 0;
    for (i64 first = begin; first < end; first += TILE_KEYS) {
        i64 some = end - first < TILE_KEYS ? end - first : TILE_KEYS, width = (some + PAIR - 1) / PAIR * PAIR;
        const float *k = keys + first * size, *v = values + first * size;
        float none[size];
        memset(none, 0, sizeof none);
        for (i64 j = 0; j < width; j++)
            split_left(j < some ? k + j * size : none, 1, own + j * size, TILE_KEYS * size, size);
        for (i64 p = 0; p < PARTS; p++)
            turn((float *)(own + p * TILE_KEYS * size), (float *)(turned + p * TILE_KEYS * size), width, size / 2);
        for (i64 j = 0; j < width; j += 2) /* the values, in the place of keys */
            split_right(j < some ? v + j * size : none, j + 1 < some ? v + (j + 1) * size : none, own + j * size,
                        TILE_KEYS * size, size, PARTS);
        for (i64 top = 0; top < rows; top += PAIR) {
            /* Of this block, the keys of the first of these rows and the last: those between have keys between. */
            i64 oldest = position + top / group - first, youngest = position + (top + PAIR - 1) / group - first;
            i64 wide = youngest < width ? youngest / PAIR * PAIR + PAIR : width; /* so many keys are looked at */
            if (youngest < 0 || (window && oldest - window >= some))
                continue;
            for (i64 j = 0; j < wide; j += PAIR)
                tile_products(queries + top * size, size, part, turned + 2 * j, 2 * width, TILE_KEYS * size, scores + j,
                              TILE_KEYS, TILE, size, 1, PARTS, 0, 0);
            if (oldest < wide - 1 || (window && youngest >= window))
                for (i64 r = 0; r < PAIR; r++) {
                    i64 at = position + (top + r) / group - first, from = window ? at - window : -1;
#pragma omp simd
                    for (int32_t j = 0; j < wide; j++)
                        scores[r * TILE_KEYS + j] = j <= at && j > from ? scores[r * TILE_KEYS + j] : -INFINITY;
                }
            weigh(scores, wide, most + top, total + top, sums + top * size, size, weights);
            for (i64 i = 0; i < size; i += PAIR)
                tile_products(weights, TILE_KEYS, PAIR * TILE_KEYS, own + 2 * i, 2 * size, TILE_KEYS * size,
                              sums + top * size + i, size, TILE, wide, 0, PARTS, 0, 0);
        }
    }
    for (i64 r = 0; r < count; r++)
        for (i64 i = 0; i < size; i++)
            output[r / group * output_stride + r % group * size + i] = sums[r * size + i] / total[r];
}

/* As `attend_chunk`. */
static void attend_tiles(const float *query, i64 stride, const float *keys, const float *values, float *output, i64 position,
                         i64 tokens, i64 heads, i64 kv_heads, i64 size, i64 capacity, i64 window, float scaling)
{
    i64 sharing = heads / kv_heads, tasks = 2 * omp_get_max_threads(), most = TILE_QUERIES * 64 / size / sharing;
    i64 fair = tokens * kv_heads / tasks, step = fair < most ? fair : most, least = (PAIR + sharing - 1) / sharing;
    step = step < least ? least : step;
#pragma omp parallel
    {
        configure_tiles(TILE);
#pragma omp for collapse(2) schedule(dynamic)
        for (i64 block = (tokens - 1) / step; block >= 0; block--) /* the longest first */
            for (i64 kv = 0; kv < kv_heads; kv++) {
                i64 token = block * step, count = tokens - token < step ? tokens - token : step, offset = kv * sharing * size;
                const float *q = query + token * stride + offset, *k = keys + kv * capacity * size;
                const float *v = values + kv * capacity * size;
                float *to = output + token * heads * size + offset;
                if (size == 64)
                    attend_block(q, stride, k, v, to, heads * size, position + token, count, sharing, 64, window, scaling);
                else
                    attend_block(q, stride, k, v, to, heads * size, position + token, count, sharing, size, window, scaling);
            }
        _tile_release();
    }
}
