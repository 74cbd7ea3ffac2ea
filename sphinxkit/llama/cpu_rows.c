/* A few rows times a matrix on a CPU, with what stands before and behind the product in a decoder layer.

   Such a product reads each weight once and computes little, so it should take as long as the memory does. Each row of
   the matrix is read from its first number to its last, once. A single row of x takes the matrix's rows one by one;
   several make more work of each weight, so several rows of the matrix then share what is loaded of x: rows that lie far
   apart, as a processor fetches ahead along one line in each page of memory. bfloat16 is widened in registers: of a word
   of 32 bits that holds two, the upper is a float as it stands, and the lower is one after a shift. Sums are float32;
   all rounds where torch's operators round. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian processors"
#endif

#ifdef __AVX512F__
#define LANES 16
#define SUMS 24 /* of the 32 registers */
#else
#define LANES 8
#define SUMS 12
#endif
#define LINE (4 * LANES) /* bytes of a register */
#define MAX_ROWS 8
#define MAX_EACH 4
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#define EACH(rows) ((rows) < 3 ? 1 : SMALLER(SUMS / (rows), MAX_EACH)) /* rows of the matrix side by side */
#define PARTS(rows) ((rows) < 3 ? 2 : 1)                               /* sums of each product */
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(LINE)));
typedef uint32_t words __attribute__((vector_size(LINE)));

/* A product; x is as `prepare` leaves it. */
typedef struct {
    const char *x, *matrix;
    const void *residual;
    void *out;
    int64_t inputs, results; /* of each row */
    int gated;
} task;

INLINE float widen(uint16_t number) {
    uint32_t bits = (uint32_t)number << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

INLINE uint16_t narrow(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return number != number ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE float get(const void *numbers, int64_t index, int half) {
    return half ? widen(((const uint16_t *)numbers)[index]) : ((const float *)numbers)[index];
}

INLINE void put(void *numbers, int64_t index, float number, int half) {
    if (half)
        ((uint16_t *)numbers)[index] = narrow(number);
    else
        ((float *)numbers)[index] = number;
}

INLINE float rounded(float number, int half) { return half ? widen(narrow(number)) : number; }

INLINE floats load(const void *from) {
    floats found;
    memcpy(&found, from, sizeof found);
    return found;
}

INLINE float total(floats lanes) {
    float parts[LANES];
    memcpy(parts, &lanes, sizeof parts);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) parts[lane] += parts[lane + width];
    return parts[0];
}

/* A line of weights times as much of x. */
INLINE floats add_products(floats sum, const char *weights, const char *x, int half) {
    if (!half) return sum + load(weights) * load(x);
    words first = (words)load(weights), second = (words)load(x);
    sum += (floats)(first << 16) * (floats)(second << 16);
    return sum + (floats)(first & 0xffff0000u) * (floats)(second & 0xffff0000u);
}

/* Where a number of x lies: a line of one row, then one of the next. Rows of a power of two, one after the other, would
   all want the same places of the processor's cache. */
INLINE int64_t place_of(int64_t index, int row, int rows, int half) {
    const int64_t line = LINE / (half ? 2 : 4);
    return (index / line * rows + row) * line + index % line;
}

/* Row `row` of x, normed if there is a norm. */
INLINE void prepare(void *to, const void *x, const void *norm, float eps, int64_t inputs, int row, int rows, int half) {
    const int64_t start = row * inputs;
    float factor = 1;
    if (norm) {
        double squares = 0;
        for (int64_t i = 0; i < inputs; i++) squares += (double)get(x, start + i, half) * get(x, start + i, half);
        factor = 1 / sqrtf((float)(squares / inputs) + eps);
    }
    for (int64_t i = 0; i < inputs; i++) {
        float number = get(x, start + i, half);
        if (norm) number = rounded(rounded(number * factor, half) * get(norm, i, half), half);
        put(to, place_of(i, row, rows, half), number, half);
    }
}

/* Rows of the matrix, from `row` on and `apart` from each other, times each row of x. None lies behind `last`, which is
   read instead. */
INLINE void multiply(float found[][MAX_ROWS], const task *job, int64_t row, int64_t apart, int64_t last, int rows,
                     int half) {
    const int each = EACH(rows), parts = PARTS(rows);
    const int64_t inputs = job->inputs, bytes = half ? 2 : 4, step = parts * LINE / bytes;
    const char *weights[MAX_EACH];
    floats sums[MAX_EACH][2][MAX_ROWS];
    for (int e = 0; e < each; e++) {
        weights[e] = job->matrix + SMALLER(row + e * apart, last) * inputs * bytes;
        for (int p = 0; p < parts; p++)
            for (int r = 0; r < rows; r++) sums[e][p][r] = (floats){0};
    }
    int64_t i = 0;
    for (; i + step <= inputs; i += step) {
        const char *x = job->x + i * rows * bytes;
        for (int p = 0; p < parts; p++)
            for (int r = 0; r < rows; r++)
                for (int e = 0; e < each; e++)
                    sums[e][p][r] = add_products(sums[e][p][r], weights[e] + i * bytes + p * LINE,
                                                 x + (p * rows + r) * LINE, half);
    }
    for (int e = 0; e < each; e++)
        for (int r = 0; r < rows; r++) {
            float sum = total(parts == 2 ? sums[e][0][r] + sums[e][1][r] : sums[e][0][r]);
            for (int64_t rest = i; rest < inputs; rest++)
                sum += get(job->x, place_of(rest, r, rows, half), half) * get(weights[e], rest, half);
            found[e][r] = rounded(sum, half);
        }
}

/* Results from `start` to `end` of each row. */
INLINE void work(const task *job, int64_t start, int64_t end, int rows, int half) {
    const int each = EACH(rows);
    const int64_t apart = (end - start + each - 1) / each, results = job->results;
    float found[2][MAX_EACH][MAX_ROWS]; /* the gates' values last */
    for (int64_t o = start; o < start + apart; o++) {
        for (int part = 0; part <= job->gated; part++)
            multiply(found[part], job, part * results + o, apart, part * results + end - 1, rows, half);
        for (int e = 0; e < each && o + e * apart < end; e++)
            for (int r = 0; r < rows; r++) {
                const int64_t place = r * results + o + e * apart;
                float number = found[0][e][r];
                if (job->gated) number = rounded(number / (1 + expf(-number)), half) * found[1][e][r];
                if (job->residual) number += get(job->residual, place, half);
                put(job->out, place, number, half);
            }
    }
}

#define WORK(NAME, ROWS, HALF) \
    static void NAME##ROWS(const task *job, int64_t start, int64_t end) { work(job, start, end, ROWS, HALF); }
#define WORKS(NAME, HALF) \
    WORK(NAME, 1, HALF) WORK(NAME, 2, HALF) WORK(NAME, 3, HALF) WORK(NAME, 4, HALF) \
    WORK(NAME, 5, HALF) WORK(NAME, 6, HALF) WORK(NAME, 7, HALF) WORK(NAME, 8, HALF) \
    static void (*const NAME[])(const task *, int64_t, int64_t) = { \
        NAME##1, NAME##2, NAME##3, NAME##4, NAME##5, NAME##6, NAME##7, NAME##8};
WORKS(bfloat16, 1)
WORKS(float32, 0)

/* x (rows, inputs), matrix (outputs, inputs), norm (inputs), residual and out (rows, outputs, or half of them if gated),
   all bfloat16 if `half`, else float32. No norm or residual: null. Gives 0, or 1 where memory is lacking. */
int linear_rows(const void *x, const void *matrix, const void *norm, const void *residual, void *out, int64_t outputs,
                int64_t inputs, float eps, int rows, int half, int gated, int threads) {
    const int64_t bytes = inputs * (half ? 2 : 4);
    char *given = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE * rows); /* a load across two lines is slow */
    if (!given) return 1;
    for (int row = 0; row < rows; row++) {
        if (half)
            prepare(given, x, norm, eps, inputs, row, rows, 1);
        else
            prepare(given, x, norm, eps, inputs, row, rows, 0);
    }
    const task job = {given, matrix, residual, out, inputs, gated ? outputs / 2 : outputs, gated};
#pragma omp parallel num_threads(threads)
    {
        const int64_t mine = omp_get_thread_num(), all = omp_get_num_threads();
        (half ? bfloat16 : float32)[rows - 1](&job, job.results * mine / all, job.results * (mine + 1) / all);
    }
    free(given);
    return 0;
}
