// The small operations of a training step on a CPU, each in one pass over memory: RMSNorm, squared ReLU, the heads of
// attention (normalised, rotated, laid out for the products) and the causal softmax, forward and backward. fused.py
// compiles this file once for the CPU at hand and calls it. The same operations in PyTorch stand beside each call there.
//
// A tensor's numbers are float or bfloat16, all arithmetic is fp32. A row is computed by one thread from left to right
// in a fixed order, so the bits do not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t half;  // bfloat16: the upper half of a float

enum Type { FLOAT32 = 0, BFLOAT16 = 1 };

static inline float widen(float x) { return x; }

static inline float widen(half x) {
    uint32_t bits = uint32_t(x) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

static inline void narrow(float x, float *to) { *to = x; }

static inline void narrow(float x, half *to) {  // to the nearest bfloat16, to the even one of two
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *to = (bits & 0x7fffffff) > 0x7f800000 ? half(0x7fc0) : half(rounded);  // not a number stays not a number
}

constexpr int LANES = 16;  // partial sums of a row, so that the compiler can use vectors and the order stays fixed

// The sum of f(i) for i < n
template <class F>
static inline float sum_of(int64_t n, F f) {
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] += f(i + k);
    for (int k = 0; i < n; i++, k++) lanes[k] += f(i);
    for (int width = LANES / 2; width; width /= 2)
        for (int k = 0; k < width; k++) lanes[k] += lanes[k + width];
    return lanes[0];
}

// The largest x[i] for i < n. If one of them is not a number, any of them: the sums after it are not a number either
static inline float largest_of(const float *x, int64_t n) {
    float lanes[LANES];
    for (int k = 0; k < LANES; k++) lanes[k] = x[0];
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) lanes[k] = lanes[k] > x[i + k] ? lanes[k] : x[i + k];
    for (int k = 0; i < n; i++, k++) lanes[k] = lanes[k] > x[i] ? lanes[k] : x[i];
    for (int width = LANES / 2; width; width /= 2)
        for (int k = 0; k < width; k++) lanes[k] = lanes[k] > lanes[k + width] ? lanes[k] : lanes[k + width];
    return lanes[0];
}

// Calls body with a null pointer of each tensor's number type
template <class Body>
static void with_type(int type, Body body) {
    if (type == BFLOAT16)
        body((half *)nullptr);
    else
        body((float *)nullptr);
}

// -----------------------------------------------------------------------------
// RMSNorm without gain: y = x r with r = 1 / sqrt(mean(x^2) + eps)

template <class X, class Y>
static void rms_norm_rows(const X *x, Y *y, float *scale, int64_t rows, int64_t n, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const X *from = x + row * n;
        Y *to = y + row * n;
        float r = 1 / sqrtf(sum_of(n, [=](int64_t i) { float v = widen(from[i]); return v * v; }) / n + eps);
        scale[row] = r;
        for (int64_t i = 0; i < n; i++) narrow(widen(from[i]) * r, to + i);
    }
}

// Its gradient: r (g - x r^2 mean(g x))
template <class X, class G>
static void rms_norm_gradient(const G *g, const X *x, const float *scale, X *gx, int64_t rows, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        const X *from = x + row * n;
        const G *grad = g + row * n;
        X *to = gx + row * n;
        float r = scale[row];
        float mean = sum_of(n, [=](int64_t i) { return widen(grad[i]) * widen(from[i]); }) / n;
        float along = r * r * mean;
        for (int64_t i = 0; i < n; i++) narrow(r * (widen(grad[i]) - widen(from[i]) * along), to + i);
    }
}

// -----------------------------------------------------------------------------
// Squared ReLU

static inline float positive(float x) { return x < 0 ? 0 : x; }  // not a number stays not a number

template <class X>
static void relu_squared_all(const X *x, X *y, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        float v = positive(widen(x[i]));
        narrow(v * v, y + i);
    }
}

template <class X>
static void relu_squared_gradient(const X *g, const X *x, X *gx, int64_t n, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) narrow(2 * widen(g[i]) * positive(widen(x[i])), gx + i);
}

// -----------------------------------------------------------------------------
// The heads of attention

// qkv (B, T, heads, D): queries, then keys, then values. cosines and sines (T, D), or none; they rotate queries and keys
// after these are normalised, if `normalised`.
struct Heads {
    int64_t B, T, n_q, n_kv, D;
    const float *cosines, *sines;
    float eps;
    int64_t normalised;
};

constexpr int MOST = 256;  // channels of a head

// Where head h of token t in row b goes: q and k are (B, their heads, T, D), v as well
template <class X>
static inline X *place(const Heads &c, X *q, X *k, X *v, int64_t b, int64_t t, int64_t h) {
    if (h < c.n_q) return q + ((b * c.n_q + h) * c.T + t) * c.D;
    h -= c.n_q;
    if (h < c.n_kv) return k + ((b * c.n_kv + h) * c.T + t) * c.D;
    return v + ((b * c.n_kv + h - c.n_kv) * c.T + t) * c.D;
}

template <class X>
static void split_heads_all(const Heads &c, const X *qkv, X *q, X *k, X *v, float *scale, int threads) {
    int64_t heads = c.n_q + 2 * c.n_kv, D = c.D;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < c.B * c.T; token++) {
        int64_t b = token / c.T, t = token % c.T;
        float x[MOST];
        for (int64_t h = 0; h < heads; h++) {
            const X *from = qkv + (token * heads + h) * D;
            X *to = place(c, q, k, v, b, t, h);
            if (h >= c.n_q + c.n_kv) {
                memcpy(to, from, D * sizeof(X));
                continue;
            }
            for (int64_t i = 0; i < D; i++) x[i] = widen(from[i]);
            if (c.normalised) {
                float r = 1 / sqrtf(sum_of(D, [&](int64_t i) { return x[i] * x[i]; }) / D + c.eps);
                scale[token * (c.n_q + c.n_kv) + h] = r;
                for (int64_t i = 0; i < D; i++) x[i] *= r;
            }
            if (!c.cosines) {
                for (int64_t i = 0; i < D; i++) narrow(x[i], to + i);
                continue;
            }
            const float *cosine = c.cosines + t * D, *sine = c.sines + t * D;
            int64_t half_D = D / 2;
            for (int64_t i = 0; i < half_D; i++) narrow(x[i] * cosine[i] + x[i + half_D] * sine[i], to + i);
            for (int64_t i = half_D; i < D; i++) narrow(x[i] * cosine[i] + x[i - half_D] * sine[i], to + i);
        }
    }
}

template <class X>
static void split_heads_gradient(const Heads &c, const X *gq, const X *gk, const X *gv, const X *qkv,
                                 const float *scale, X *g, int threads) {
    int64_t heads = c.n_q + 2 * c.n_kv, D = c.D;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < c.B * c.T; token++) {
        int64_t b = token / c.T, t = token % c.T;
        float grad[MOST];
        for (int64_t h = 0; h < heads; h++) {
            const X *from = place(c, gq, gk, gv, b, t, h);
            const X *x = qkv + (token * heads + h) * D;
            X *to = g + (token * heads + h) * D;
            if (h >= c.n_q + c.n_kv) {
                memcpy(to, from, D * sizeof(X));
                continue;
            }
            if (c.cosines) {
                const float *cosine = c.cosines + t * D, *sine = c.sines + t * D;
                int64_t half_D = D / 2;
                for (int64_t i = 0; i < half_D; i++)
                    grad[i] = widen(from[i]) * cosine[i] + widen(from[i + half_D]) * sine[i + half_D];
                for (int64_t i = half_D; i < D; i++)
                    grad[i] = widen(from[i]) * cosine[i] + widen(from[i - half_D]) * sine[i - half_D];
            } else {
                for (int64_t i = 0; i < D; i++) grad[i] = widen(from[i]);
            }
            if (c.normalised) {
                float r = scale[token * (c.n_q + c.n_kv) + h];
                float mean = sum_of(D, [&](int64_t i) { return grad[i] * widen(x[i]); }) / D;
                float along = r * r * mean;
                for (int64_t i = 0; i < D; i++) narrow(r * (grad[i] - widen(x[i]) * along), to + i);
            } else {
                for (int64_t i = 0; i < D; i++) narrow(grad[i], to + i);
            }
        }
    }
}

// -----------------------------------------------------------------------------
// Causal softmax of scores (matrices, T, T), in place: softmax(factor * score) over the keys up to the query

// e^x for x <= 0, so that the compiler can use vectors: 2^n times a polynomial, right to 2 units in the last place
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;  // e^-87 is the least that is worth a bit
    float n = floorf(x * 1.44269504f + 0.5f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;  // x - n ln 2, in two steps
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

constexpr int MOST_KEYS = 512;  // fused.py has the same number

template <class X>
static void causal_softmax_all(X *scores, int64_t matrices, int64_t T, float factor, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < matrices * T; row++) {
        int64_t keys = row % T + 1;
        X *s = scores + row * T;
        float x[MOST_KEYS];
        for (int64_t i = 0; i < keys; i++) x[i] = widen(s[i]) * factor;
        float largest = largest_of(x, keys);
        for (int64_t i = 0; i < keys; i++) x[i] = exponential(x[i] - largest);
        float share = 1 / sum_of(keys, [&](int64_t i) { return x[i]; });
        for (int64_t i = 0; i < keys; i++) narrow(x[i] * share, s + i);
        memset(s + keys, 0, (T - keys) * sizeof(X));
    }
}

// The gradient of the scores, in place of that of the probabilities: factor * p (g - sum(g p))
template <class X>
static void causal_softmax_gradient(X *g, const X *probabilities, int64_t matrices, int64_t T, float factor,
                                    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < matrices * T; row++) {
        int64_t keys = row % T + 1;
        const X *p = probabilities + row * T;
        X *grad = g + row * T;
        float sum = sum_of(keys, [=](int64_t i) { return widen(grad[i]) * widen(p[i]); });
        for (int64_t i = 0; i < keys; i++) narrow(factor * widen(p[i]) * (widen(grad[i]) - sum), grad + i);
        memset(grad + keys, 0, (T - keys) * sizeof(X));
    }
}

// -----------------------------------------------------------------------------
// Cross-entropy: logits (rows, n), of which the first `vocabulary` count, become the gradient of their loss, in place

template <class X>
static void softmax_gradient_rows(X *logits, const int64_t *targets, float *losses, int64_t rows, int64_t n,
                                  int64_t vocabulary, float softcap, int threads) {
    constexpr int64_t BLOCK = 1024;  // numbers that are summed in fp32, the sums of blocks in fp64
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        X *z = logits + row * n;
        float x[BLOCK];
        float largest = -INFINITY;
        auto read = [&](int64_t from, int64_t count) {
            for (int64_t i = 0; i < count; i++) x[i] = widen(z[from + i]);
            if (softcap)
                for (int64_t i = 0; i < count; i++) x[i] = softcap * tanhf(x[i] / softcap);
        };
        for (int64_t from = 0; from < vocabulary; from += BLOCK) {
            int64_t count = vocabulary - from < BLOCK ? vocabulary - from : BLOCK;
            read(from, count);
            float block = largest_of(x, count);
            largest = largest > block ? largest : block;
        }
        double sum = 0;
        for (int64_t from = 0; from < vocabulary; from += BLOCK) {
            int64_t count = vocabulary - from < BLOCK ? vocabulary - from : BLOCK;
            read(from, count);
            for (int64_t i = 0; i < count; i++) x[i] = exponential(x[i] - largest);
            sum += sum_of(count, [&](int64_t i) { return x[i]; });
        }
        int64_t target = targets[row];
        float raw = widen(z[target]);
        float capped = softcap ? softcap * tanhf(raw / softcap) : raw;
        float log_probability = capped - largest - float(log(sum));
        losses[row] = -log_probability;
        float share = float(1 / sum);
        for (int64_t from = 0; from < vocabulary; from += BLOCK) {
            int64_t count = vocabulary - from < BLOCK ? vocabulary - from : BLOCK;
            read(from, count);
            if (softcap)
                for (int64_t i = 0; i < count; i++) {
                    float slope = 1 - x[i] / softcap * (x[i] / softcap);
                    narrow(exponential(x[i] - largest) * share * slope, z + from + i);
                }
            else
                for (int64_t i = 0; i < count; i++) narrow(exponential(x[i] - largest) * share, z + from + i);
        }
        float slope = softcap ? 1 - capped / softcap * (capped / softcap) : 1;
        narrow(expm1f(log_probability) * slope, z + target);  // probability - 1, to all its digits
        for (int64_t i = vocabulary; i < n; i++) narrow(0.0f, z + i);
    }
}

// -----------------------------------------------------------------------------
// What fused.py calls

extern "C" {

void rms_norm(const void *x, void *y, float *scale, int64_t rows, int64_t n, double eps, int64_t x_type, int64_t y_type,
              int64_t threads) {
    with_type(x_type, [&](auto *X) {
        with_type(y_type, [&](auto *Y) {
            rms_norm_rows((decltype(X))x, (decltype(Y))y, scale, rows, n, eps, threads);
        });
    });
}

void rms_norm_backward(const void *g, const void *x, const float *scale, void *gx, int64_t rows, int64_t n,
                       int64_t x_type, int64_t g_type, int64_t threads) {
    with_type(x_type, [&](auto *X) {
        with_type(g_type, [&](auto *G) {
            rms_norm_gradient((decltype(G))g, (decltype(X))x, scale, (decltype(X))gx, rows, n, threads);
        });
    });
}

void relu_squared(const void *x, void *y, int64_t n, int64_t type, int64_t threads) {
    with_type(type, [&](auto *X) { relu_squared_all((decltype(X))x, (decltype(X))y, n, threads); });
}

void relu_squared_backward(const void *g, const void *x, void *gx, int64_t n, int64_t type, int64_t threads) {
    with_type(type, [&](auto *X) {
        relu_squared_gradient((decltype(X))g, (decltype(X))x, (decltype(X))gx, n, threads);
    });
}

void split_heads(const Heads *heads, const void *qkv, void *q, void *k, void *v, float *scale, int64_t type,
                 int64_t threads) {
    with_type(type, [&](auto *X) {
        typedef decltype(X) P;
        split_heads_all(*heads, (P)qkv, (P)q, (P)k, (P)v, scale, threads);
    });
}

void split_heads_backward(const Heads *heads, const void *gq, const void *gk, const void *gv, const void *qkv,
                          const float *scale, void *g, int64_t type, int64_t threads) {
    with_type(type, [&](auto *X) {
        typedef decltype(X) P;
        split_heads_gradient(*heads, (P)gq, (P)gk, (P)gv, (P)qkv, scale, (P)g, threads);
    });
}

void causal_softmax(void *scores, int64_t matrices, int64_t T, double factor, int64_t type, int64_t threads) {
    with_type(type, [&](auto *X) { causal_softmax_all((decltype(X))scores, matrices, T, factor, threads); });
}

void causal_softmax_backward(void *g, const void *probabilities, int64_t matrices, int64_t T, double factor,
                             int64_t type, int64_t threads) {
    with_type(type, [&](auto *X) {
        causal_softmax_gradient((decltype(X))g, (decltype(X))probabilities, matrices, T, factor, threads);
    });
}

void softmax_gradient(void *logits, const int64_t *targets, float *losses, int64_t rows, int64_t n, int64_t vocabulary,
                      double softcap, int64_t type, int64_t threads) {
    with_type(type, [&](auto *X) {
        softmax_gradient_rows((decltype(X))logits, targets, losses, rows, n, vocabulary, softcap, threads);
    });
}

}  // extern "C"
