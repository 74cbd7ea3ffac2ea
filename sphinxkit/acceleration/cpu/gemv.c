/* A few rows times a matrix on a CPU, with what stands before and behind the product in a decoder layer.

   Such a product reads each weight once and computes little, so it should take as long as the memory does. Each row of
   the matrix is read from its first number to its last; several of them, as registers allow, share what is loaded of x:
   rows that lie far apart, as a processor fetches ahead along one line in each page of memory only. Where x has more
   rows than there are registers for, groups of them read a chunk of the matrix one after another, all but the first
   from a cache. Sums are float32; all rounds where torch's operators round.

   HALF: the numbers are bfloat16, else float32. Where the processor has no instruction for products of bfloat16, they
   are widened in registers: of a word of 32 bits that holds two, the upper is a float as it stands, and the lower is
   one after a shift.

   CODES: the matrix has 8-bit codes and a scale for each row, and stretches of x become whole numbers of 16 bits with a
   factor of their own. That rounds to 2^-16 of a stretch's largest number, where a code is rounded to 2^-8 of its
   row's. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __clang__
#error "clang brings another OpenMP than torch's, whose threads would get in each other's way; gcc does not"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian processors"
#endif

#ifdef __AVX512F__
#define LANES 16
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#define SUMS 24 /* of the 32 registers */
#else
#define LANES 8
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#define SUMS 12
#endif
#define LINE (4 * LANES) /* bytes of a register */
#define GROUP 8 /* rows of x at a time */
#define MAX_EACH 4
#define CHUNK (256 << 10) /* bytes of the matrix, in the second cache: our choice */
#define CHUNK_ROWS 12     /* a multiple of so many, so that they are shared out without a rest */
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
/* Rows of the matrix at a time. From MANY_ROWS of x on, the matrix is asked for ahead by so many bytes, into the second
   cache: what waits for the memory in a processor's queues would keep it from computing and from looking ahead on its
   own. For fewer, more streams and more to do are slower. Measured on one processor (Zen 4): our choice. */
#define MANY_ROWS 3
#define EACH(rows) ((rows) < MANY_ROWS ? 2 : SMALLER(SUMS / (rows), MAX_EACH))
#define AHEAD 3072
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(LINE)));
typedef uint32_t words __attribute__((vector_size(LINE)));
#if HALF
typedef uint16_t number;
#else
typedef float number;
#endif
#if CODES
typedef int8_t weight;
typedef int16_t given;
typedef int32_t sums_of_products __attribute__((vector_size(LINE)));
#define STRETCH 2048 /* so few products add up to less than 2^31, in 8 lanes or more; our choice */
#define SMALLEST 1e-30f /* what is less counts as 0: 32767 divided by it stays finite */
#else
typedef number weight, given;
typedef floats sums_of_products;
#define STRETCH INT64_MAX
#endif
#define IN_LINE (LINE / (int64_t)sizeof(given))
typedef weight weights_in_line __attribute__((vector_size(IN_LINE * sizeof(weight))));
typedef given line __attribute__((vector_size(LINE)));

/* A product; x and factors are as `prepare` leaves them, scales are of the matrix's rows. */
typedef struct {
    const given *x;
    const float *factors;
    const weight *matrix;
    const number *scales;
    number *out;
    int64_t inputs, results; /* of each row */
    int gated;
} task;

#if HALF
INLINE float get(number half) {
    uint32_t bits = (uint32_t)half << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

INLINE number put(float wide) {
    uint32_t bits;
    memcpy(&bits, &wide, 4);
    return wide != wide ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
INLINE float get(number given) { return given; }
INLINE number put(float given) { return given; }
#endif

INLINE float rounded(float given) { return get(put(given)); }

INLINE line load(const given *from) {
    line found;
    memcpy(&found, from, sizeof found);
    return found;
}

INLINE line load_weights(const weight *from) {
    weights_in_line found;
    memcpy(&found, from, sizeof found);
    return __builtin_convertvector(found, line);
}

/* A line of weights times as much of x. */
INLINE sums_of_products add_products(sums_of_products sum, line weights, line x) {
#if CODES && defined __AVX512VNNI__
    return (sums_of_products)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#elif CODES && defined __AVX512BW__
    return sum + (sums_of_products)_mm512_madd_epi16((__m512i)weights, (__m512i)x);
#elif CODES && LANES == 8 && defined __AVX2__
    return sum + (sums_of_products)_mm256_madd_epi16((__m256i)weights, (__m256i)x);
#elif CODES /* of two numbers in 32 bits, each is what is left after shifts */
    const sums_of_products first = (sums_of_products)weights, second = (sums_of_products)x;
    sum += (first << 16 >> 16) * (second << 16 >> 16);
    return sum + (first >> 16) * (second >> 16);
#elif HALF && defined __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
#elif HALF
    const words first = (words)weights, second = (words)x;
    sum += (floats)(first << 16) * (floats)(second << 16);
    return sum + (floats)(first & 0xffff0000u) * (floats)(second & 0xffff0000u);
#else
    return sum + weights * x;
#endif
}

/* What each of the first `count` registers comes to, LANES of them at most, in one register: halves of two are added,
   then quarters of two of those. One without another gets its own other half. */
INLINE floats totals(floats *sums, int count) {
    const words lane = LANE_NUMBERS;
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2) {
        const words lower = lane + (lane & half) * (LANES / half - 1), upper = lower + half;
#pragma GCC unroll 8
        for (int s = 0; s < SMALLER(half, count); s++) {
            const floats other = sums[s + half < count ? s + half : s];
            sums[s] = __builtin_shuffle(sums[s], other, lower) + __builtin_shuffle(sums[s], other, upper);
        }
    }
    return sums[0];
}

/* Where a number of x lies: a line of one row, then one of the next. Rows of a power of two, one after the other, would
   all want the same places of the processor's cache. */
INLINE int64_t place_of(int64_t column, int row, int rows) {
    return (column / IN_LINE * rows + row) * IN_LINE + column % IN_LINE;
}

/* A row of x, normed if there is a norm. */
static void prepare(given *to, float *factors, const number *x, const number *norm, float eps, int64_t inputs, int row,
                    int rows) {
    float factor = 1, values[CODES ? STRETCH : IN_LINE];
    if (norm) {
        double squares = 0;
        for (int64_t i = 0; i < inputs; i++) squares += (double)get(x[i]) * get(x[i]);
        factor = 1 / sqrtf((float)(squares / inputs) + eps);
    }
    const int64_t step = sizeof values / sizeof *values;
    for (int64_t start = 0; start < inputs; start += step) {
        const int64_t size = SMALLER(step, inputs - start);
        for (int64_t i = 0; i < size; i++) {
            const float given = get(x[start + i]);
            values[i] = norm ? rounded(rounded(given * factor) * get(norm[start + i])) : given;
        }
#if CODES
        float largest = 0, faults = 0; /* no number if there is one in the stretch, or an infinite one */
        for (int64_t i = 0; i < size; i++) {
            largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
            faults += values[i] * 0;
        }
        factors[start / STRETCH * rows + row] = largest / 32767 + faults;
        const float inverse = largest > SMALLEST && faults == 0 ? 32767 / largest : 0;
        for (int64_t i = 0; i < size; i++)
            to[place_of(start + i, row, rows)] = inverse > 0 ? rintf(values[i] * inverse) : 0;
#else
        for (int64_t i = 0; i < size; i++) to[place_of(start, row, rows) + i] = put(values[i]);
        (void)factors;
#endif
    }
}

/* Rows of the matrix, from `row` on and `apart` from each other, times each row of x. None lies behind `last`, which is
   read instead. */
INLINE void multiply(float *found, const task *job, int64_t row, int64_t apart, int64_t last, int rows) {
    const int each = EACH(rows), all = each * rows;
    const int64_t inputs = job->inputs;
    const weight *weights[MAX_EACH];
    floats sums[SUMS];
    for (int e = 0; e < each; e++) weights[e] = job->matrix + SMALLER(row + e * apart, last) * inputs;
    for (int s = 0; s < all; s++) sums[s] = (floats){0};
    int64_t i = 0;
    while (i + IN_LINE <= inputs) {
        const int64_t end = inputs - i > STRETCH ? i + STRETCH : inputs;
        sums_of_products parts[SUMS];
        for (int s = 0; s < all; s++) parts[s] = (sums_of_products){0};
        for (; i + IN_LINE <= end; i += IN_LINE) {
            line lines[MAX_EACH];
            for (int e = 0; e < each; e++) {
                lines[e] = load_weights(weights[e] + i);
                if (rows >= MANY_ROWS) __builtin_prefetch((const char *)(weights[e] + i) + AHEAD, 0, 2);
            }
            for (int r = 0; r < rows; r++) {
                const line of_x = load(job->x + i * rows + r * IN_LINE);
                for (int e = 0; e < each; e++) parts[e * rows + r] = add_products(parts[e * rows + r], lines[e], of_x);
            }
        }
        for (int s = 0; s < all; s++)
#if CODES
            sums[s] += __builtin_convertvector(parts[s], floats) * job->factors[(i - 1) / STRETCH * rows + s % rows];
#else
            sums[s] = parts[s];
#endif
    }
    for (int first = 0; first < all; first += LANES) {
        const floats sum = totals(sums + first, all - first);
        memcpy(found + first, &sum, sizeof sum);
    }
    for (int s = 0; s < all; s++) {
        const int e = s / rows, r = s % rows;
#if CODES
        for (int64_t rest = i; rest < inputs; rest++)
            found[s] += job->factors[rest / STRETCH * rows + r] * job->x[place_of(rest, r, rows)] * weights[e][rest];
        found[s] *= get(job->scales[SMALLER(row + e * apart, last)]);
#else
        for (int64_t rest = i; rest < inputs; rest++)
            found[s] += get(job->x[place_of(rest, r, rows)]) * get(weights[e][rest]);
#endif
        found[s] = rounded(found[s]);
    }
}

/* Results from `start` to `end` of each row. */
INLINE void work(const task *job, int64_t start, int64_t end, int rows) {
    const int each = EACH(rows);
    const int64_t apart = (end - start + each - 1) / each, results = job->results;
    float found[2][SUMS + LANES]; /* what is gated last */
    for (int64_t o = start; o < start + apart; o++) {
        for (int part = 0; part <= job->gated; part++)
            multiply(found[part], job, part * results + o, apart, part * results + end - 1, rows);
        for (int e = 0; e < each && o + e * apart < end; e++)
            for (int r = 0; r < rows; r++) {
                float result = found[0][e * rows + r];
                if (job->gated) result = rounded(result / (1 + expf(-result))) * found[1][e * rows + r];
                job->out[r * results + o + e * apart] = put(result);
            }
    }
}

#define WORK(ROWS) \
    static void work_##ROWS(const task *job, int64_t start, int64_t end) { work(job, start, end, ROWS); }
WORK(1) WORK(2) WORK(3) WORK(4) WORK(5) WORK(6) WORK(7) WORK(8)
static void (*const WORKS[])(const task *, int64_t, int64_t) = {work_1, work_2, work_3, work_4,
                                                                 work_5, work_6, work_7, work_8};

/* x (rows, inputs), matrix (outputs, inputs), scales (outputs) if it has codes, norm (inputs) or null, out (rows,
   outputs, or half of them if gated). Gives 0, or 1 where memory is lacking. */
int gemv(const number *x, const weight *matrix, const number *scales, const number *norm, number *out,
                int64_t outputs, int64_t inputs, float eps, int rows, int gated, int threads) {
    const int64_t results = gated ? outputs / 2 : outputs, row_bytes = inputs * sizeof(weight) * (1 + gated);
    const int64_t size = (inputs + IN_LINE - 1) / IN_LINE * IN_LINE, stretches = (inputs - 1) / STRETCH + 1;
    /* aligned: a load across two lines is slow */
    given *all_x = aligned_alloc(LINE, size * sizeof(given) * rows);
    float *factors = malloc(stretches * sizeof(float) * rows);
    if (!all_x || !factors) {
        free(all_x);
        free(factors);
        return 1;
    }
    const int64_t chunk = rows > GROUP ? (CHUNK / row_bytes / CHUNK_ROWS + 1) * CHUNK_ROWS : results;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int row = 0; row < rows; row++) {
            const int first = row / GROUP * GROUP;
            prepare(all_x + first * size, factors + first * stretches, x + row * inputs, norm, eps, inputs, row - first,
                    SMALLER(rows - first, GROUP));
        }
        const int64_t mine = omp_get_thread_num(), all = omp_get_num_threads();
        const int64_t end = results * (mine + 1) / all;
        for (int64_t start = results * mine / all; start < end; start += chunk)
            for (int first = 0; first < rows; first += GROUP) {
                const task job = {all_x + first * size, factors + first * stretches, matrix, scales,
                                  out + first * results, inputs, results, gated};
                WORKS[SMALLER(rows - first, GROUP) - 1](&job, start, SMALLER(start + chunk, end));
            }
    }
    free(all_x);
    free(factors);
    return 0;
}
