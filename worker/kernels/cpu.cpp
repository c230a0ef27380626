// Group normalisation with what surrounds it in a UNet, and softmax, of images in NHWC on CPUs.
//
// A sample's numbers are computed by the same instructions in the same order whatever else is in the batch, whatever
// its place there, and however many threads share the work: sums run over blocks of PIXELS pixels, whose partial sums
// are added in the order of the blocks. Sums and statistics are float; tensors are float or bfloat16.
//
// Letters: B = samples, P = pixels of one, C = channels (whole vectors of LANES), G = groups, N = numbers of a row,
// W = vectors of neighbouring channels that stay in registers while pixels pass by. Tensors are dense.

#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr long PIXELS = 64;
constexpr long LANES = 16;

struct Bf16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(Bf16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }

inline void put(float& to, float value) { to = value; }

inline void put(Bf16& to, float value) {  // the nearest, ties to even; what is no number stays none
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Lanes lanes_of(const float* from) {
    Lanes lanes;
    __builtin_memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

inline Lanes lanes_of(const Bf16* from) {
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
}

inline void put_lanes(float* to, Lanes lanes) { __builtin_memcpy(to, &lanes, sizeof lanes); }

inline void put_lanes(Bf16* to, Lanes lanes) {  // as put() does; the instruction makes zeros of subnormal numbers
#ifdef __AVX512BF16__
    __m256bh halves = _mm512_cvtneps_pbh(lanes);
#else
    Bits bits = (Bits)lanes;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = (bits & 0x7fffffff) > 0x7f800000 ? Bits{} + 0x7fc0 : rounded;
    Halves halves = __builtin_convertvector(rounded, Halves);
#endif
    __builtin_memcpy(to, &halves, sizeof halves);
}

// Below are x within bounds (what is no number stays none), the whole number nearest to x (of |x| < 2^22), p 2^n for
// whole n, and a first guess at 1 / x of a positive x: single instructions where there are such.
#ifdef __AVX512F__
constexpr bool GUESSES_WELL = true;  // to 2^-14

inline Lanes clamped(Lanes x, float lowest, float highest) {
    return _mm512_max_ps(Lanes{} + lowest, _mm512_min_ps(Lanes{} + highest, x));
}

inline Lanes whole(Lanes x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }

inline Lanes times_power_of_two(Lanes p, Lanes n) { return _mm512_scalef_ps(p, n); }

inline Lanes guessed_inverse(Lanes x) { return _mm512_rcp14_ps(x); }
#else
constexpr bool GUESSES_WELL = false;

inline Lanes clamped(Lanes x, float lowest, float highest) {
    x = x > highest ? Lanes{} + highest : x;
    return x < lowest ? Lanes{} + lowest : x;
}

inline Lanes whole(Lanes x) { return (x + 12582912.0f) - 12582912.0f; }

inline Lanes times_power_of_two(Lanes p, Lanes n) {
    return p * (Lanes)((__builtin_convertvector(n, Ints) + 127) << 23);
}

inline Lanes guessed_inverse(Lanes x) { return (Lanes)(0x7ef311c7 - (Ints)x); }
#endif

// Elementary functions as exact as T can tell.
template <typename T>
struct Exactly;

template <>
struct Exactly<float> {
    // 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf), to 2e-7.
    static Lanes exp(Lanes x) {
        x = clamped(x, -87.0f, 88.0f);
        Lanes n = whole(x * 1.44269504f);
        Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
        Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        return times_power_of_two(p * r * r + r + 1.0f, n);
    }

    static Lanes inverse(Lanes x) { return 1.0f / x; }
};

template <>
struct Exactly<Bf16> {
    // 2^n times a polynomial of the least greatest error on [-1/2, 1/2], to 5e-6.
    static Lanes exp(Lanes x) {
        Lanes t = clamped(x * 1.44269504f, -126.0f, 126.0f);
        Lanes n = whole(t), r = t - n;
        Lanes p = 0.009570102f * r + 0.055917863f;
        p = p * r + 0.240247443f;
        p = p * r + 0.693121791f;
        p = p * r + 0.999999285f;
        return times_power_of_two(p, n);
    }

    // Of a positive number, to 6e-5 at worst: steps of second and third order after a rough guess.
    static Lanes inverse(Lanes x) {
        Lanes r = guessed_inverse(x);
        if (GUESSES_WELL) return r;
        r += r * (1.0f - x * r);
        Lanes e = 1.0f - x * r;
        return r + r * (e + e * e);
    }
};

// z and what is made of it: z itself, or SiLU(z) = z sigmoid(z).
template <typename T>
struct Same {
    static Lanes of(Lanes z) { return z; }
    static Lanes slope(Lanes) { return Lanes{} + 1.0f; }
};

template <typename T>
struct Silu {
    static Lanes sigmoid(Lanes z) { return Exactly<T>::inverse(1.0f + Exactly<T>::exp(-z)); }
    static Lanes of(Lanes z) { return z * sigmoid(z); }
    static Lanes slope(Lanes z) {
        Lanes s = sigmoid(z);
        return s + z * s * (1.0f - s);
    }
};

template <int W>
struct Vectors {
    static constexpr int num = W;
};

// One call: y = act(gamma (x + shift - mean) rstd + beta), statistics over a group's channels and all pixels.
template <typename T, template <typename> typename Activation>
struct GroupNorm {
    using Act = Activation<T>;
    long B, P, C, G;
    const T* x;          // [B][P][C]
    const float* shift;  // [B][C], or null
    const float* gamma;  // [C]
    const float* beta;   // [C]
    float* stats;        // [B][2][G]: mean and 1 / deviation
    float* room;         // [B][rows()][C]

    long blocks() const { return (P + PIXELS - 1) / PIXELS; }
    long rows() const { return 3 * blocks() + 5; }
    float* coefficients(long b) const { return room + b * rows() * C; }
    float* partial(long b, long block) const { return coefficients(b) + (5 + 3 * block) * C; }
    long first(long block) const { return block * PIXELS; }
    long last(long block) const { return block + 1 == blocks() ? P : (block + 1) * PIXELS; }
    float shifted(long b, long c) const { return shift ? shift[b * C + c] : 0.0f; }

    // Each sample on one thread; where there are fewer samples than threads, blocks are shared out instead. The two ways
    // stand apart, as libgomp starts new threads for a region inside another one, even if the outer one has one thread.
    template <typename First, typename Between, typename Second>
    void two_passes(int threads, First first_pass, Between between, Second second_pass) const {
        if (B < threads && blocks() > 1) {
            for (long b = 0; b < B; b++) {
#pragma omp parallel for schedule(static) num_threads(threads)
                for (long block = 0; block < blocks(); block++) first_pass(b, block);
                between(b);
#pragma omp parallel for schedule(static) num_threads(threads)
                for (long block = 0; block < blocks(); block++) second_pass(b, block);
            }
            return;
        }
#pragma omp parallel for schedule(static) num_threads(threads) if (B > 1 && threads > 1)
        for (long b = 0; b < B; b++) {
            for (long block = 0; block < blocks(); block++) first_pass(b, block);
            between(b);
            for (long block = 0; block < blocks(); block++) second_pass(b, block);
        }
    }

    void add_up(long b, long num) const {
        float* __restrict total = partial(b, 0);
        for (long block = 1; block < blocks(); block++) {
            const float* __restrict more = partial(b, block);
            for (long c = 0; c < num * C; c++) total[c] += more[c];
        }
    }

    // Calls f(W, c) for strips of W vectors of channels from c on, which cover all.
    template <typename Each>
    void strips(Each each) const {
        long c = 0;
        for (; c + 2 * LANES <= C; c += 2 * LANES) each(Vectors<2>{}, c);
        for (; c < C; c += LANES) each(Vectors<1>{}, c);
    }

    // Of x less the sample's first pixel, so that a mean far from zero does not cost the variance its digits.
    void sums(long b, long block) const {
        strips([&](auto vectors, long c) {
            constexpr int W = vectors.num;
            const T* from = x + b * P * C + c;
            Lanes origin[W], sum[W] = {}, square[W] = {};
            for (int w = 0; w < W; w++) origin[w] = lanes_of(from + w * LANES);
            for (long p = first(block); p < last(block); p++)
                for (int w = 0; w < W; w++) {
                    Lanes distance = lanes_of(from + p * C + w * LANES) - origin[w];
                    sum[w] += distance;
                    square[w] += distance * distance;
                }
            float* to = partial(b, block) + c;
            for (int w = 0; w < W; w++) put_lanes(to + w * LANES, sum[w]), put_lanes(to + C + w * LANES, square[w]);
        });
    }

    void statistics(long b, float eps) const {
        add_up(b, 2);
        const T* origin = x + b * P * C;
        const float *sum = partial(b, 0), *square = sum + C;
        auto mean_of = [&](long c) { return double(widen(origin[c])) + shifted(b, c) + double(sum[c]) / P; };
        long width = C / G;
        for (long g = 0; g < G; g++) {
            double mean = 0.0, spread = 0.0;
            for (long c = g * width; c < (g + 1) * width; c++) mean += mean_of(c);
            mean /= width;
            for (long c = g * width; c < (g + 1) * width; c++) {
                double beside = mean_of(c) - mean;
                spread += square[c] - double(sum[c]) * sum[c] / P + P * beside * beside;
            }
            double variance = spread / (double(P) * width);
            stats[(2 * b) * G + g] = float(mean);
            stats[(2 * b + 1) * G + g] = float(1.0 / __builtin_sqrt((variance < 0.0 ? 0.0 : variance) + eps));
        }
    }

    // Rows of coefficients: the normalised value is rstd x + away.
    void recall(long b) const {
        float *rstd = coefficients(b), *away = rstd + C;
        long width = C / G;
        for (long c = 0; c < C; c++) {
            rstd[c] = stats[(2 * b + 1) * G + c / width];
            away[c] = (shifted(b, c) - stats[(2 * b) * G + c / width]) * rstd[c];
        }
    }

    void apply(long b, long block, T* y) const {
        strips([&](auto vectors, long c) {
            constexpr int W = vectors.num;
            Lanes factor[W], addend[W];
            for (int w = 0; w < W; w++) {
                const float* rstd = coefficients(b) + c + w * LANES;
                factor[w] = lanes_of(rstd) * lanes_of(gamma + c + w * LANES);
                addend[w] = lanes_of(rstd + C) * lanes_of(gamma + c + w * LANES) + lanes_of(beta + c + w * LANES);
            }
            const T* from = x + b * P * C + c;
            T* to = y + b * P * C + c;
            for (long p = first(block); p < last(block); p++)
                for (int w = 0; w < W; w++)
                    put_lanes(to + p * C + w * LANES,
                              Act::of(lanes_of(from + p * C + w * LANES) * factor[w] + addend[w]));
        });
    }

    void forward(T* y, float eps, int threads) const {
        two_passes(
            threads, [&](long b, long block) { sums(b, block); },
            [&](long b) { statistics(b, eps), recall(b); }, [&](long b, long block) { apply(b, block, y); });
    }

    // By channel: of the slope by z, of its product with the normalised value, and of that value. The slopes by z
    // stay in dx, as exact as dy is.
    void slope_sums(long b, long block, const T* dy, T* dx) const {
        strips([&](auto vectors, long c) {
            constexpr int W = vectors.num;
            Lanes rstd[W], away[W], scale[W], offset[W], sum[W] = {}, product[W] = {}, value[W] = {};
            for (int w = 0; w < W; w++) {
                const float* coefficient = coefficients(b) + c + w * LANES;
                rstd[w] = lanes_of(coefficient), away[w] = lanes_of(coefficient + C);
                scale[w] = lanes_of(gamma + c + w * LANES), offset[w] = lanes_of(beta + c + w * LANES);
            }
            for (long p = first(block); p < last(block); p++)
                for (int w = 0; w < W; w++) {
                    long place = (b * P + p) * C + c + w * LANES;
                    Lanes normal = lanes_of(x + place) * rstd[w] + away[w];
                    Lanes slope = lanes_of(dy + place) * Act::slope(normal * scale[w] + offset[w]);
                    put_lanes(dx + place, slope);
                    sum[w] += slope;
                    product[w] += slope * normal;
                    value[w] += normal;
                }
            for (int w = 0; w < W; w++) {
                float* to = partial(b, block) + c + w * LANES;
                put_lanes(to, sum[w]), put_lanes(to + C, product[w]), put_lanes(to + 2 * C, value[w]);
            }
        });
    }

    // Of the loss by gamma and beta ([B][2][C], for each sample) and by shift; and the rest of the coefficients:
    // the slope by x is by_slope * slope + by_normal * normal + constant.
    void parameter_slopes(long b, float* dgamma_dbeta, float* dshift) const {
        add_up(b, 3);
        const float *sum = partial(b, 0), *product = sum + C, *value = product + C, *rstd = coefficients(b);
        float *by_slope = coefficients(b) + 2 * C, *by_normal = by_slope + C, *constant = by_normal + C;
        long width = C / G;
        for (long g = 0; g < G; g++) {
            double mean = 0.0, along = 0.0;
            for (long c = g * width; c < (g + 1) * width; c++) {
                mean += double(gamma[c]) * sum[c];
                along += double(gamma[c]) * product[c];
            }
            for (long c = g * width; c < (g + 1) * width; c++) {
                by_slope[c] = rstd[c] * gamma[c];
                by_normal[c] = -rstd[c] * float(along / (double(P) * width));
                constant[c] = -rstd[c] * float(mean / (double(P) * width));
            }
        }
        for (long c = 0; c < C; c++) {
            dgamma_dbeta[(2 * b) * C + c] = product[c];
            dgamma_dbeta[(2 * b + 1) * C + c] = sum[c];
            if (dshift) dshift[b * C + c] = by_slope[c] * sum[c] + by_normal[c] * value[c] + P * constant[c];
        }
    }

    void slopes(long b, long block, T* dx) const {
        strips([&](auto vectors, long c) {
            constexpr int W = vectors.num;
            Lanes by_slope[W], by_x[W], constant[W];
            for (int w = 0; w < W; w++) {
                const float* coefficient = coefficients(b) + c + w * LANES;
                by_slope[w] = lanes_of(coefficient + 2 * C);
                by_x[w] = lanes_of(coefficient + 3 * C) * lanes_of(coefficient);
                constant[w] = lanes_of(coefficient + 3 * C) * lanes_of(coefficient + C) + lanes_of(coefficient + 4 * C);
            }
            for (long p = first(block); p < last(block); p++)
                for (int w = 0; w < W; w++) {
                    long place = (b * P + p) * C + c + w * LANES;
                    put_lanes(dx + place,
                              by_slope[w] * lanes_of(dx + place) + by_x[w] * lanes_of(x + place) + constant[w]);
                }
        });
    }

    void backward(const T* dy, T* dx, float* dgamma_dbeta, float* dshift, int threads) const {
        for (long b = 0; b < B; b++) recall(b);
        two_passes(
            threads, [&](long b, long block) { slope_sums(b, block, dy, dx); },
            [&](long b) { parameter_slopes(b, dgamma_dbeta, dshift); },
            [&](long b, long block) { slopes(b, block, dx); });
    }
};

// Of the lanes, always in the same order.
inline float summed(Lanes lanes) {
    float sum = 0.0f;
    for (long lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

// softmax(scale x) of each row; `room` is for N numbers.
template <typename T>
void softmax_row(long N, const T* x, float scale, T* y, float* room) {
    long even = N - N % LANES;
    Lanes highest = Lanes{} + widen(x[0]) * scale;
    for (long n = 0; n < even; n += LANES) {
        Lanes value = lanes_of(x + n) * scale;
        highest = value > highest ? value : highest;
    }
    float top = highest[0];
    for (long lane = 1; lane < LANES; lane++) top = highest[lane] > top ? highest[lane] : top;
    for (long n = even; n < N; n++) top = widen(x[n]) * scale > top ? widen(x[n]) * scale : top;
    Lanes sums{};
    for (long n = 0; n < even; n += LANES) {
        Lanes value = Exactly<T>::exp(lanes_of(x + n) * scale - top);
        put_lanes(room + n, value);
        sums += value;
    }
    float sum = summed(sums);
    for (long n = even; n < N; n++) sum += room[n] = Exactly<T>::exp(Lanes{} + (widen(x[n]) * scale - top))[0];
    float share = 1.0f / sum;
    for (long n = 0; n < even; n += LANES) put_lanes(y + n, lanes_of(room + n) * share);
    for (long n = even; n < N; n++) put(y[n], room[n] * share);
}

// From y and the slope by y to that by x.
template <typename T>
void softmax_slopes(long N, const T* y, const T* dy, float scale, T* dx) {
    long even = N - N % LANES;
    Lanes sums{};
    for (long n = 0; n < even; n += LANES) sums += lanes_of(y + n) * lanes_of(dy + n);
    float sum = summed(sums);
    for (long n = even; n < N; n++) sum += widen(y[n]) * widen(dy[n]);
    for (long n = 0; n < even; n += LANES)
        put_lanes(dx + n, scale * lanes_of(y + n) * (lanes_of(dy + n) - sum));
    for (long n = even; n < N; n++) put(dx[n], scale * widen(y[n]) * (widen(dy[n]) - sum));
}

template <typename T>
void softmaxes(long rows, long N, const void* x, float scale, void* y, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* room = static_cast<float*>(__builtin_alloca(N * sizeof(float)));
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            softmax_row(N, static_cast<const T*>(x) + row * N, scale, static_cast<T*>(y) + row * N, room);
    }
}

template <typename T>
void softmaxes_backward(long rows, long N, const void* y, const void* dy, float scale, void* dx, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row++)
        softmax_slopes(N, static_cast<const T*>(y) + row * N, static_cast<const T*>(dy) + row * N, scale,
                       static_cast<T*>(dx) + row * N);
}

template <typename T, template <typename> typename Act>
void norm(const long* shape, const void* x, const float* shift, const float* gamma, const float* beta, void* y,
          float* stats, float* room, float eps, int threads) {
    GroupNorm<T, Act>{shape[0], shape[1], shape[2], shape[3], static_cast<const T*>(x), shift, gamma, beta, stats, room}
        .forward(static_cast<T*>(y), eps, threads);
}

template <typename T, template <typename> typename Act>
void norm_backward(const long* shape, const void* x, const float* shift, const float* gamma, const float* beta,
                   float* stats, float* room, const void* dy, void* dx, float* dgamma_dbeta, float* dshift,
                   int threads) {
    GroupNorm<T, Act>{shape[0], shape[1], shape[2], shape[3], static_cast<const T*>(x), shift, gamma, beta, stats, room}
        .backward(static_cast<const T*>(dy), static_cast<T*>(dx), dgamma_dbeta, dshift, threads);
}

}  // namespace

// shape: B, P, C, G. kind: 1 for bfloat16 instead of float, plus 2 for SiLU.
EXPORT void group_norm(int kind, const long* shape, const void* x, const float* shift, const float* gamma,
                       const float* beta, void* y, float* stats, float* room, float eps, int threads) {
    auto call = kind & 2 ? (kind & 1 ? norm<Bf16, Silu> : norm<float, Silu>)
                         : (kind & 1 ? norm<Bf16, Same> : norm<float, Same>);
    call(shape, x, shift, gamma, beta, y, stats, room, eps, threads);
}

EXPORT void group_norm_backward(int kind, const long* shape, const void* x, const float* shift, const float* gamma,
                                const float* beta, float* stats, float* room, const void* dy, void* dx,
                                float* dgamma_dbeta, float* dshift, int threads) {
    auto call = kind & 2 ? (kind & 1 ? norm_backward<Bf16, Silu> : norm_backward<float, Silu>)
                         : (kind & 1 ? norm_backward<Bf16, Same> : norm_backward<float, Same>);
    call(shape, x, shift, gamma, beta, stats, room, dy, dx, dgamma_dbeta, dshift, threads);
}

// x, y: [rows][N]. kind: 1 for bfloat16 instead of float.
EXPORT void softmax(int kind, long rows, long N, const void* x, float scale, void* y, int threads) {
    (kind & 1 ? softmaxes<Bf16> : softmaxes<float>)(rows, N, x, scale, y, threads);
}

EXPORT void softmax_backward(int kind, long rows, long N, const void* y, const void* dy, float scale, void* dx,
                             int threads) {
    (kind & 1 ? softmaxes_backward<Bf16> : softmaxes_backward<float>)(rows, N, y, dy, scale, dx, threads);
}
