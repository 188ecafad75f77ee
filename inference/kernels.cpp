// The two products that decide how fast a CPU generates: a few rows times a matrix of weights, and the attention of one
// new token for each request. inference/kernels.py compiles this file once for the CPU at hand and calls it; the same
// results in PyTorch, which the tests compare, are in inference/rounding.py and inference/kvcache.py.
//
// Decoding reads every weight once for each step, so memory decides its speed. The weights therefore lie in exactly the
// order in which they are read: tiles of 16 rows of the matrix (16 outputs), one column after another in each.
// A vector of 16 lanes then holds the sums of 16 outputs, and no lane is ever added to another.
//
// Weights of 8 and 4 bits are multiplied with activations of 8 bits, as llama.cpp does (ggml's q8_0): each row of
// activations is cut into groups of 32, each with a scale of its own. Four products of bytes are one instruction on
// CPUs with VNNI.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int TILE = 16;   // rows of a tile
constexpr int GROUP = 32;  // activations that share a scale
constexpr int MOST = 16;   // rows of activations that one reading of the weights serves
constexpr int AHEAD = 4096;  // bytes: a CPU's own prefetcher ends with the page of 4 KB, so the next one is asked for

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// The numbers of a tensor's dtype, as kernels.py passes them
enum Type { FLOAT32 = 0, BFLOAT16 = 1 };

template <class V>
static inline V load(const void *from) {
    V v;
    memcpy(&v, from, sizeof(V));
    return v;
}

static inline void store(float *to, Floats v) { memcpy(to, &v, sizeof(v)); }

static inline Floats all(float x) { return Floats{} + x; }

static inline float widen(float x) { return x; }

static inline float widen(uint16_t bfloat16) {
    uint32_t bits = uint32_t(bfloat16) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline void narrow(float x, float *to) { *to = x; }

static inline void narrow(float x, uint16_t *to) {  // to the nearest bfloat16, to the even one of two
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    *to = nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline Floats load16(const float *from) { return load<Floats>(from); }

static inline Floats load16(const uint16_t *from) {
    Words bits = __builtin_convertvector(load<Halves>(from), Words) << 16;
    return load<Floats>(&bits);
}

static inline Floats load16_half(const uint16_t *from) {  // IEEE half precision
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
    __m256 eights[2] = {_mm256_cvtph_ps(load<__m128i>(from)), _mm256_cvtph_ps(load<__m128i>(from + 8))};
    return load<Floats>(eights);
#else
    Floats v;
    for (int i = 0; i < TILE; i++) {
        uint32_t h = from[i], sign = (h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
        float x;
        if (exponent == 0) {
            x = mantissa * 0x1p-24f;
        } else {
            uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
            memcpy(&x, &bits, 4);
        }
        v[i] = sign ? -x : x;
    }
    return v;
#endif
}

// sums[i] += the four bytes of weights[4 i ..] times the four signed bytes of `x`, for each of the 16 lanes
static inline Ints dot4(Ints sums, Bytes weights, int32_t x) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    // without VNNI: even and odd bytes as 16-bit numbers, whose products are added in pairs without overflow
    int32_t even_x = uint16_t(int8_t(x)) | uint32_t(int8_t(x >> 16)) << 16;
    int32_t odd_x = uint16_t(int8_t(x >> 8)) | uint32_t(int8_t(x >> 24)) << 16;
#if defined(__AVX512BW__)
    __m512i even = _mm512_and_si512((__m512i)weights, _mm512_set1_epi16(0xff));
    __m512i odd = _mm512_srli_epi16((__m512i)weights, 8);
    sums += (Ints)_mm512_madd_epi16(even, _mm512_set1_epi32(even_x));
    sums += (Ints)_mm512_madd_epi16(odd, _mm512_set1_epi32(odd_x));
#else
    for (int half = 0; half < 2; half++) {
        __m256i w = load<__m256i>((char *)&weights + 32 * half);
        __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
        __m256i odd = _mm256_srli_epi16(w, 8);
        __m256i sum = load<__m256i>((char *)&sums + 32 * half);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, _mm256_set1_epi32(even_x)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_set1_epi32(odd_x)));
        memcpy((char *)&sums + 32 * half, &sum, 32);
    }
#endif
    return sums;
#else
    for (int j = 0; j < 4; j++) sums += (Ints)((Words)weights >> (8 * j) & 255) * int8_t(x >> 8 * j);
    return sums;
#endif
}

// -----------------------------------------------------------------------------
// Rows of activations as the products read them

struct Rows {
    int count, width;             // width: K, or K padded to whole groups
    std::vector<float> floats;    // (count, K), for weights of 32 bits
    std::vector<uint32_t> pairs;  // (count, K / 2) two bfloat16 numbers each
    std::vector<int32_t> fours;   // (count, K / 4) four signed bytes each
    std::vector<float> scales;    // (count, K / GROUP)
    std::vector<int32_t> sums;    // (count, K / GROUP) of the bytes of each group
};

template <class X>
static void round_row(const X *x, int K, int row, Rows &rows) {
    int groups = rows.width / GROUP;
    for (int g = 0; g < groups; g++) {
        float values[GROUP] = {};
        float largest = 0;
        float zero = 0;  // not a number if one of the values is none, or is infinite: then the results are none either
        for (int i = 0; i < GROUP && g * GROUP + i < K; i++) {
            values[i] = widen(x[g * GROUP + i]);
            largest = fmaxf(largest, fabsf(values[i]));
            zero += values[i] * 0.0f;
        }
        float inverse = largest > 0 ? 127.0f / largest : 0.0f;
        int8_t bytes[GROUP];
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) {
            bytes[i] = int8_t(nearbyintf(values[i] * inverse));
            sum += bytes[i];
        }
        memcpy(&rows.fours[(int64_t(row) * groups + g) * (GROUP / 4)], bytes, GROUP);
        rows.scales[row * groups + g] = largest / 127.0f + zero;
        rows.sums[row * groups + g] = sum;
    }
}

// -----------------------------------------------------------------------------
// One tile times some rows: out (M, 16)

struct Matrix {
    const void *codes;        // (tiles, columns, 16) in the order in which they are read
    const uint16_t *scales;   // half precision (tiles, groups, 16); null for floats
    const uint16_t *minimum;  // half precision (tiles, groups, 16); null: codes are symmetric about their middle
    int64_t outputs, inputs;  // N, K
    int64_t bits, group;      // 4, 8, 16 (bfloat16) or 32; weights that share a scale
};

template <int M, int BITS>
static inline void tile_of_bytes(const Matrix &w, const Rows &rows, int64_t tile, Floats *out) {
    int K = rows.width, groups = K / GROUP;
    int bytes_per_group = GROUP * TILE * BITS / 8;
    const uint8_t *codes = (const uint8_t *)w.codes + tile * groups * bytes_per_group;
    int share = w.group / GROUP;  // groups of activations for one scale of the weights
    int scale_groups = K / w.group;
    constexpr int MIDDLE = 1 << (BITS - 1);
    for (int m = 0; m < M; m++) out[m] = Floats{};
    for (int g = 0; g < groups; g++) {
        Ints sums[M];
        for (int m = 0; m < M; m++) {
            int32_t start = w.minimum ? 0 : -MIDDLE * rows.sums[m * groups + g];
            sums[m] = Ints{} + start;
        }
        const uint8_t *from = codes + int64_t(g) * bytes_per_group;
        for (int four = 0; four < GROUP / 4; four += 8 / BITS) {
            Bytes both = load<Bytes>(from);
            __builtin_prefetch(from + AHEAD);
            from += sizeof(Bytes);
            if (BITS == 8) {
                for (int m = 0; m < M; m++) {
                    const int32_t *x = &rows.fours[(m * groups + g) * (GROUP / 4) + four];
                    sums[m] = dot4(sums[m], both, x[0]);
                }
            } else {  // a byte has the code of one column in its low half, and in its high half that of four further
                Bytes low = both & 15;
                Bytes high = (Bytes)((Words)both >> 4) & 15;
                for (int m = 0; m < M; m++) {
                    const int32_t *x = &rows.fours[(m * groups + g) * (GROUP / 4) + four];
                    sums[m] = dot4(dot4(sums[m], low, x[0]), high, x[1]);
                }
            }
        }
        int64_t scale_at = (tile * scale_groups + g / share) * TILE;
        Floats scale = load16_half(w.scales + scale_at);
        for (int m = 0; m < M; m++)
            out[m] += __builtin_convertvector(sums[m], Floats) * (scale * rows.scales[m * groups + g]);
        if (w.minimum) {
            Floats minimum = load16_half(w.minimum + scale_at);
            for (int m = 0; m < M; m++) out[m] += minimum * (rows.scales[m * groups + g] * rows.sums[m * groups + g]);
        }
    }
}

template <int M>
static inline void tile_of_bfloat16(const Matrix &w, const Rows &rows, int64_t tile, Floats *out) {
    int pairs = rows.width / 2;
    const uint32_t *codes = (const uint32_t *)w.codes + tile * pairs * TILE;
    for (int m = 0; m < M; m++) out[m] = Floats{};
    for (int k = 0; k < pairs; k++, codes += TILE) {
        Words both = load<Words>(codes);
        __builtin_prefetch((const char *)codes + AHEAD);
#if defined(__AVX512BF16__)
        for (int m = 0; m < M; m++) {
            __m512i x = _mm512_set1_epi32(rows.pairs[m * pairs + k]);
            out[m] = (Floats)_mm512_dpbf16_ps((__m512)out[m], (__m512bh)both, (__m512bh)x);
        }
#else
        Words even_bits = both << 16, odd_bits = both & 0xffff0000u;
        Floats even = load<Floats>(&even_bits), odd = load<Floats>(&odd_bits);
        for (int m = 0; m < M; m++) {
            uint32_t x = rows.pairs[m * pairs + k];
            out[m] += even * widen(uint16_t(x)) + odd * widen(uint16_t(x >> 16));
        }
#endif
    }
}

template <int M>
static inline void tile_of_floats(const Matrix &w, const Rows &rows, int64_t tile, Floats *out) {
    int K = rows.width;
    const float *codes = (const float *)w.codes + tile * K * TILE;
    for (int m = 0; m < M; m++) out[m] = Floats{};
    for (int k = 0; k < K; k++, codes += TILE) {
        Floats weights = load<Floats>(codes);
        __builtin_prefetch((const char *)codes + AHEAD);
        for (int m = 0; m < M; m++) out[m] += weights * rows.floats[m * K + k];
    }
}

template <class Y>
static void put(Floats sums, const float *bias, Y *y, int64_t first, int64_t outputs) {
    for (int i = 0; i < TILE && first + i < outputs; i++)
        narrow(sums[i] + (bias ? bias[first + i] : 0.0f), y + first + i);
}

#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_AMX 1

// Whether this process may use AMX: Linux wants to be asked, once for all threads
static bool may_use_amx() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool may = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return may;
}

static inline Words narrow_all(Floats x) {  // to bfloat16, in the low halves
    Words bits = load<Words>(&x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// A tile of 8 or 4 bits as pairs of bfloat16, in the order of a matrix of 16 bits
template <int BITS>
static void widen_tile(const Matrix &w, int64_t tile, int width, uint32_t *pairs) {
    constexpr int COLUMNS = 32 / BITS;  // that 64 bytes hold: a lane has as many codes of its output
    const uint8_t *codes = (const uint8_t *)w.codes + tile * width * TILE * BITS / 8;
    Floats scale = {}, minimum = {};
    for (int k = 0; k < width; k += COLUMNS, codes += 64) {
        if (k % w.group == 0) {
            int64_t at = (tile * (width / w.group) + k / w.group) * TILE;
            scale = load16_half(w.scales + at);
            minimum = w.minimum ? load16_half(w.minimum + at) : scale * -float(1 << (BITS - 1));
        }
        Words bits = load<Words>(codes), columns[COLUMNS];
        for (int i = 0; i < COLUMNS; i++) {  // with 4 bits the low halves of the bytes come first
            int shift = BITS == 8 ? 8 * i : i % 4 * 8 + i / 4 * 4;
            Ints values = (Ints)(bits >> shift & ((1 << BITS) - 1));
            columns[i] = narrow_all(__builtin_convertvector(values, Floats) * scale + minimum);
        }
        for (int i = 0; i < COLUMNS; i += 2, pairs += TILE) {
            Words both = columns[i] | columns[i + 1] << 16;
            memcpy(pairs, &both, sizeof(both));
        }
    }
}

// Products of bfloat16 with AMX: 32 inputs, 16 outputs and 16 rows at once. A tile of the weights is what AMX loads as
// it is. However many rows there are, the weights are read once.
template <class Y>
static void all_tiles_amx(const Matrix &w, const Rows &rows, const float *bias, Y *y) {
    int64_t tiles = (w.outputs + TILE - 1) / TILE;
    int M = rows.count, K = rows.width;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, zeros[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shapes;  // registers: 0 to 3 sums (rows, 16), 4 and 6 activations (rows, 32), 5 weights (32, 16)
    for (int i = 0; i < 7; i++) {
        shapes.bytes[i] = 64;
        shapes.rows[i] = i != 5 && M < MOST ? M : MOST;
    }
    _tile_loadconfig(&shapes);
    std::vector<uint32_t> widened(w.bits < 16 ? K / 2 * TILE : 0);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const char *weights = (const char *)w.codes + tile * K * TILE * 2;
        if (w.bits < 16) {
            if (w.bits == 8) widen_tile<8>(w, tile, K, widened.data());
            else widen_tile<4>(w, tile, K, widened.data());
            weights = (const char *)widened.data();
        }
        for (int first = 0; first < M; first += 4 * MOST) {
            // up to four times 16 rows for each loading of the weights, as AMX is slow to finish a single product
            int parts = (M - first + MOST - 1) / MOST;
            const char *codes = weights, *x = (const char *)&rows.pairs[int64_t(first) * (K / 2)];
            int64_t stride = K * 2, part = MOST * stride;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int k = 0; k < K; k += 32, codes += 1024, x += 64) {
                if (first == 0 && w.bits == 16)
                    for (int line = 0; line < 1024; line += 64) __builtin_prefetch(codes + AHEAD + line);
                _tile_loadd(5, codes, 64);
                _tile_loadd(4, x, stride);
                _tile_dpbf16ps(0, 4, 5);
                if (parts > 1) {
                    _tile_loadd(6, x + part, stride);
                    _tile_dpbf16ps(1, 6, 5);
                }
                if (parts > 2) {
                    _tile_loadd(4, x + 2 * part, stride);
                    _tile_dpbf16ps(2, 4, 5);
                }
                if (parts > 3) {
                    _tile_loadd(6, x + 3 * part, stride);
                    _tile_dpbf16ps(3, 6, 5);
                }
            }
            alignas(64) float sums[4 * MOST][TILE];
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + MOST, 64);
            _tile_stored(2, sums + 2 * MOST, 64);
            _tile_stored(3, sums + 3 * MOST, 64);
            for (int m = first; m < M && m < first + 4 * MOST; m++)
                put(load<Floats>(sums[m - first]), bias, y + m * w.outputs, tile * TILE, w.outputs);
        }
    }
    _tile_release();
}
#else
#define HAS_AMX 0
static bool may_use_amx() { return false; }
#endif

template <int M, class Y>
static void all_tiles(const Matrix &w, const Rows &rows, const float *bias, Y *y) {
    int64_t tiles = (w.outputs + TILE - 1) / TILE;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        Floats out[M];
        if (w.bits == 8) tile_of_bytes<M, 8>(w, rows, tile, out);
        else if (w.bits == 4) tile_of_bytes<M, 4>(w, rows, tile, out);
        else if (w.bits == 16) tile_of_bfloat16<M>(w, rows, tile, out);
        else tile_of_floats<M>(w, rows, tile, out);
        for (int m = 0; m < M; m++) put(out[m], bias, y + m * w.outputs, tile * TILE, w.outputs);
    }
}

template <int M, class Y>
static void tiles_for(const Matrix &w, const Rows &rows, const float *bias, Y *y) {
    if (rows.count == M) all_tiles<M>(w, rows, bias, y);
    else if constexpr (M > 1) tiles_for<M - 1>(w, rows, bias, y);
}

// Round or widen the activations of one call, then multiply
template <class X>
static void linear_rows(const Matrix &w, const X *x, int M, const float *bias, X *y, bool amx, int threads) {
    int K = w.inputs;
    bool bytes = w.bits <= 8 && !amx, pairs = w.bits == 16 || amx;
    static thread_local Rows rows;  // its memory is used again by the next call
    rows.count = M;
    rows.width = w.bits <= 8 ? (K + w.group - 1) / w.group * w.group : w.bits == 16 ? K + K % 2 : K;
    int64_t padded = amx ? (M + MOST - 1) / MOST * MOST : M;
    if (bytes) {
        rows.fours.resize(int64_t(M) * rows.width / 4);
        rows.scales.resize(int64_t(M) * rows.width / GROUP);
        rows.sums.resize(int64_t(M) * rows.width / GROUP);
    } else if (pairs) {
        rows.pairs.resize(padded * rows.width / 2);
    } else {
        rows.floats.resize(int64_t(M) * K);
    }
    Rows &shared = rows;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int m = 0; m < M; m++) {
            const X *row = x + int64_t(m) * K;
            if (bytes) {
                round_row(row, K, m, shared);
            } else if (pairs) {
                uint16_t *to = (uint16_t *)&shared.pairs[int64_t(m) * shared.width / 2];
                for (int k = 0; k < K; k++) narrow(widen(row[k]), to + k);
                for (int k = K; k < shared.width; k++) to[k] = 0;
            } else {
                for (int k = 0; k < K; k++) shared.floats[int64_t(m) * K + k] = widen(row[k]);
            }
        }
#if HAS_AMX
        if (amx) all_tiles_amx(w, shared, bias, y);
        else
#endif
            tiles_for<MOST>(w, shared, bias, y);
    }
}

constexpr int AMX_FROM = 4;        // rows; for fewer, memory decides either way
constexpr int AMX_FROM_BYTES = 65;  // rows, one more than tiled.py's MOST_ROWS: fewer multiply as bytes

extern "C" int64_t has_amx() { return may_use_amx(); }

template <class X>
static void linear_of(const Matrix &w, const X *x, int64_t M, const float *bias, X *y, int threads) {
    bool whole = w.bits == 16 ? w.inputs % 32 == 0 : w.bits <= 8;
    if (whole && M >= (w.bits == 16 ? AMX_FROM : AMX_FROM_BYTES) && may_use_amx())
        return linear_rows(w, x, M, bias, y, true, threads);
    for (int64_t first = 0; first < M; first += MOST) {
        int rows = M - first < MOST ? M - first : MOST;
        linear_rows(w, x + first * w.inputs, rows, bias, y + first * w.outputs, false, threads);
    }
}

// y (M, N) = x (M, K) times the transposed matrix, plus bias (N,) fp32 or null; x and y are fp32 or bfloat16
extern "C" void linear(const Matrix *w, const void *x, int64_t M, const float *bias, void *y, int64_t type,
                       int64_t threads) {
    if (type == FLOAT32) linear_of(*w, (const float *)x, M, bias, (float *)y, threads);
    else linear_of(*w, (const uint16_t *)x, M, bias, (uint16_t *)y, threads);
}

// The weight (N, K) row after row, fp32 or bfloat16: a prompt's many rows are quicker as a product of floats
template <class Y>
static void unpack_tiles(const Matrix &w, Y *y, int threads) {
    int64_t N = w.outputs, K = w.inputs, tiles = (N + TILE - 1) / TILE;
    int64_t width = w.bits <= 8 ? (K + w.group - 1) / w.group * w.group : w.bits == 16 ? K + K % 2 : K;
    float middle = w.bits <= 8 ? float(1 << (w.bits - 1)) : 0.0f;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < tiles; tile++) {
        int rows = N - tile * TILE < TILE ? N - tile * TILE : TILE;
        for (int64_t k = 0; k < K; k++) {
            float column[TILE];
            if (w.bits == 32) {
                memcpy(column, (const float *)w.codes + (tile * width + k) * TILE, sizeof(column));
            } else if (w.bits == 16) {
                const uint16_t *pair = (const uint16_t *)w.codes + (tile * width + k / 2 * 2) * TILE;
                for (int i = 0; i < TILE; i++) column[i] = widen(pair[2 * i + k % 2]);
            } else {
                int64_t scale_at = (tile * (width / w.group) + k / w.group) * TILE;
                Floats scale = load16_half(w.scales + scale_at), codes;
                const uint8_t *bytes = (const uint8_t *)w.codes;
                if (w.bits == 8) {
                    bytes += (tile * width + k / 4 * 4) * TILE;
                    for (int i = 0; i < TILE; i++) codes[i] = bytes[4 * i + k % 4];
                } else {
                    bytes += (tile * width + k / 8 * 8) * TILE / 2;
                    for (int i = 0; i < TILE; i++) codes[i] = bytes[4 * i + k % 4] >> (k % 8 / 4 * 4) & 15;
                }
                Floats weights = (codes - middle) * scale;
                if (w.minimum) weights = codes * scale + load16_half(w.minimum + scale_at);
                store(column, weights);
            }
            for (int i = 0; i < rows; i++) narrow(column[i], y + (tile * TILE + i) * K + k);
        }
    }
}

extern "C" void unpack(const Matrix *w, void *y, int64_t type, int64_t threads) {
    if (type == FLOAT32) unpack_tiles(*w, (float *)y, threads);
    else unpack_tiles(*w, (uint16_t *)y, threads);
}

// -----------------------------------------------------------------------------
// Attention of one new token for each request

static inline float sum_of(Floats v) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight halves[2];
    memcpy(halves, &v, sizeof(v));
    Eight eight = halves[0] + halves[1];
    Four quarters[2];
    memcpy(quarters, &eight, sizeof(eight));
    Four four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

template <class T>
static inline float dot(const float *q, const T *k, int D) {
    Floats sums = {};
    int d = 0;
    for (; d + 16 <= D; d += 16) sums += load<Floats>(q + d) * load16(k + d);
    float sum = sum_of(sums);
    for (; d < D; d++) sum += q[d] * widen(k[d]);
    return sum;
}

template <class T>
static inline void add(float *y, float p, const T *v, int D) {
    int d = 0;
    for (; d + 16 <= D; d += 16) store(y + d, load<Floats>(y + d) + all(p) * load16(v + d));
    for (; d < D; d++) y[d] += p * widen(v[d]);
}

// e to the x, for x <= 0: 2 to the whole part times a polynomial of the rest (Cephes' coefficients), relative 2e-7
static inline Floats exp_of(Floats x) {
    Floats low = x < -87.0f ? all(-87.0f) : x;
    Ints whole = __builtin_convertvector(low * 1.44269504f - 0.5f, Ints);
    Floats n = __builtin_convertvector(whole, Floats);
    Floats r = low - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints bits = (whole + 127) << 23;
    Floats power = load<Floats>(&bits);
    Floats y = p * power;
    return x < -87.0f ? Floats{} : y;
}

// The pool of one layer: keys and values (n_kv, slots, D), fp32 or bfloat16
struct Batch {
    int64_t requests, heads, kv_heads, head_dim;
    int64_t slots;               // tokens that the pool has room for
    int64_t block;               // tokens in a block
    int64_t table_width;
    const int32_t *table;        // (requests, table_width) blocks of each request
    const int32_t *lengths;      // (requests,) tokens that each request sees
    const int64_t *new_slots;    // (requests,) where the new keys and values go
};

template <class X, class T>
static void attend_batch(const Batch &b, const X *q, const X *k, const X *v, T *keys, T *values, X *y, int64_t q_stride,
                         int64_t k_stride, int64_t v_stride, float scale, int threads) {
    int D = b.head_dim, group = b.heads / b.kv_heads;
    int per_task = b.requests * b.kv_heads >= threads ? group : 1;  // query heads that one thread takes together
    int tasks_per_request = b.heads / per_task;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < b.requests * b.kv_heads; i++) {
            int64_t request = i / b.kv_heads, head = i % b.kv_heads;
            int64_t to = (head * b.slots + b.new_slots[request]) * D;
            for (int d = 0; d < D; d++) {
                narrow(widen(k[request * k_stride + head * D + d]), keys + to + d);
                narrow(widen(v[request * v_stride + head * D + d]), values + to + d);
            }
        }
        std::vector<float> scores, query(per_task * D), sum(per_task * D);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < b.requests * tasks_per_request; task++) {
            int64_t request = task / tasks_per_request;
            int64_t first_head = task % tasks_per_request * per_task;
            int64_t kv_head = first_head / group;
            int64_t length = b.lengths[request];
            int64_t padded = (length + 15) / 16 * 16;
            const int32_t *table = b.table + request * b.table_width;
            const T *all_keys = keys + kv_head * b.slots * D, *all_values = values + kv_head * b.slots * D;
            scores.resize(per_task * padded);
            for (int i = 0; i < per_task * D; i++)
                query[i] = widen(q[request * q_stride + first_head * D + i]) * scale;
            for (int64_t t = 0; t < length; t++) {
                const T *key = all_keys + (int64_t(table[t / b.block]) * b.block + t % b.block) * D;
                for (int h = 0; h < per_task; h++) scores[h * padded + t] = dot(&query[h * D], key, D);
            }
            for (int h = 0; h < per_task; h++) {
                float *row = &scores[h * padded];
                float largest = row[0];
                for (int64_t t = 1; t < length; t++) largest = row[t] > largest ? row[t] : largest;
                for (int64_t t = length; t < padded; t++) row[t] = -INFINITY;
                Floats total = {};
                for (int64_t t = 0; t < padded; t += 16) {
                    Floats e = exp_of(load<Floats>(row + t) - largest);
                    store(row + t, e);
                    total += e;
                }
                float inverse = 1.0f / sum_of(total);
                for (int64_t t = 0; t < length; t++) row[t] *= inverse;
            }
            for (float &s : sum) s = 0;
            for (int64_t t = 0; t < length; t++) {
                const T *value = all_values + (int64_t(table[t / b.block]) * b.block + t % b.block) * D;
                for (int h = 0; h < per_task; h++) add(&sum[h * D], scores[h * padded + t], value, D);
            }
            for (int i = 0; i < per_task * D; i++) narrow(sum[i], y + (request * b.heads + first_head) * D + i);
        }
    }
}

// Store the new keys and values, then attend: q (requests, heads, D), k and v (requests, n_kv, D), rows `stride` apart
extern "C" void attend(const Batch *b, const void *q, const void *k, const void *v, void *keys, void *values, void *y,
                       int64_t q_stride, int64_t k_stride, int64_t v_stride, double scale, int64_t type,
                       int64_t cache_type, int64_t threads) {
#define ATTEND(X, T)                                                                                                  \
    attend_batch(*b, (const X *)q, (const X *)k, (const X *)v, (T *)keys, (T *)values, (X *)y, q_stride, k_stride,    \
                 v_stride, scale, threads)
    if (type == FLOAT32 && cache_type == FLOAT32) ATTEND(float, float);
    else if (type == FLOAT32) ATTEND(float, uint16_t);
    else if (cache_type == FLOAT32) ATTEND(uint16_t, float);
    else ATTEND(uint16_t, uint16_t);
}

// Reads all of some memory and returns a number that depends on it: the speed that decoding could reach at most
extern "C" int64_t read_all(const void *from, int64_t bytes, int64_t threads) {
    int64_t vectors = bytes / sizeof(Ints), total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int64_t piece = 0; piece < vectors / 64; piece++) {
        const char *at = (const char *)from + piece * 64 * sizeof(Ints);
        Ints sums[4] = {};
        for (int i = 0; i < 64; i++) {
            __builtin_prefetch(at + AHEAD);
            sums[i % 4] ^= load<Ints>(at);
            at += sizeof(Ints);
        }
        Ints sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
        total += sum[0] ^ sum[7] ^ sum[15];
    }
    return total;
}
