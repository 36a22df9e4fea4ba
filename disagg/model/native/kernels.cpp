// The decoder's forward pass on a CPU, compiled for the machine it runs on (see library.py).
//
// One call computes a whole step: a batch of chunks of sequences over the paged KV cache. All threads run
// the same function (`run`) and meet at a barrier between phases; they spin only inside a step and sleep
// between steps.
//
// Every output is a sum in one fixed order (over k, over keys), whatever the batch, the chunking or the
// number of threads. So the same tokens give the same bits when a prompt is cut into chunks, a sequence is
// preempted and recomputed, or its KV computed elsewhere.
//
// Weights [n, k] are stored in panels of 16 outputs, [ceil(n / 16)][k][16]: one pass over a panel is one
// sequential read. Blocking follows Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008), with A copied but not transposed; attention is tiled with an on-line softmax as
// in FlashAttention (Dao et al., 2022).
//
// Vectors are GCC/Clang vector extensions, so the source is the same for AVX2, AVX-512 and NEON.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <limits>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#include <sched.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int LANES = 8;
constexpr int NR = 16;        // outputs of a panel: two vectors
constexpr int MR = 6;         // rows of a tile: 12 accumulators, 2 loads, 1 broadcast fill 16 registers
constexpr int KC = 256;       // k of a block: KC x NR floats are half of a 32 KiB L1
constexpr int BLOCK_FLOATS = 96 * 1024;  // of a's rows that one pass over the panels serves: 384 KiB of L2
constexpr int CHUNK = 8;      // panels that a thread takes at a time
constexpr int AHEAD = 16;     // k by which a panel is fetched before it is used
constexpr int KEYS = 64;      // keys of an attention tile
constexpr int QUERY_ROWS = 96; // (token, head) rows that share one transposed key tile
constexpr int GROUP = 64;     // inputs that share a scale in int4 weights

typedef float vec __attribute__((vector_size(32)));
typedef int32_t ivec __attribute__((vector_size(32)));
typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));
typedef int8_t bytes8 __attribute__((vector_size(8)));

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
inline vec splat(float x) { return vec{x, x, x, x, x, x, x, x}; }

inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// Rows to columns of an 8 x 8 square, in three rounds of pairwise exchanges.
inline void transpose8(vec r[LANES]) {
    vec t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = i; j < i + 2; j++) {
            r[j] = __builtin_shufflevector(t[j], t[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            r[j + 2] = __builtin_shufflevector(t[j], t[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        t[j] = __builtin_shufflevector(r[j], r[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[j + 4] = __builtin_shufflevector(r[j], r[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int j = 0; j < LANES; j++) r[j] = t[j];
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// exp(x) to about 1 ulp for x <= 88, 0 far below: range reduction and Cephes' polynomial (expf.c).
inline vec exponential(vec x) {
    const vec lowest = splat(-87.0f);
    const ivec tiny = x < lowest;
    x = tiny ? lowest : x;
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec n = x * splat(1.44269504088896341f) + magic;
    const ivec exponent = reinterpret_cast<ivec>(n) << 23;
    n -= magic;
    x -= n * splat(0.693359375f);
    x -= n * splat(-2.12194440e-4f);
    vec p = splat(1.9875691500e-4f);
    p = p * x + splat(1.3981999507e-3f);
    p = p * x + splat(8.3334519073e-3f);
    p = p * x + splat(4.1665795894e-2f);
    p = p * x + splat(1.6666665459e-1f);
    p = p * x + splat(5.0000001201e-1f);
    p = p * x * x + x + splat(1.0f);
    const vec scaled = reinterpret_cast<vec>(reinterpret_cast<ivec>(p) + exponent);
    return tiny ? splat(0.0f) : scaled;
}

}  // namespace

// --- what Python fills in (library.py has the same fields in the same order) --------------------------

enum Kind : int32_t { F32 = 0, INT8 = 1, INT4 = 2 };

struct Weight {
    const void* data;    // panels of floats, of int8, or of two int4 a byte (k even: low half, k odd: high)
    const float* scale;  // int8: [n]; int4: [ceil(n / 16)][ceil(k / GROUP)][16]
    const float* bias;   // [n] or null
    int32_t n, k;        // n is a multiple of 16
    int32_t kind;
};

struct Layer {
    Weight qkv, o, gate_up, down;  // gate_up: gate's panels, then as many of up
    const float *input_norm, *mlp_norm, *q_norm, *k_norm;
    int32_t window;  // 0: none
};

struct Model {
    int32_t num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab;
    float eps;
    const Layer* layers;
    const float* norm;
    const float* embedding;  // [vocab, hidden], or null: rows are read from lm_head's panels
    Weight lm_head;
};

struct Cache {
    float* blocks;  // [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    int64_t block_stride;
    int32_t block_size;
};

struct Step {
    int32_t num_tokens, num_chunks, num_samples;
    const int64_t* token_ids;    // [num_tokens]
    const int64_t* positions;    // [num_tokens]
    const float *cos, *sin;      // [num_tokens, head_dim / 2]
    const int32_t* chunk_of;     // [num_tokens]
    const int32_t* first_row;    // [num_chunks + 1]
    const int64_t* table;        // block tables of all chunks, one after another
    const int64_t* table_start;  // [num_chunks]
    const int64_t* sample_rows;  // [num_samples]
    float* logits;               // [num_samples, vocab padded to 16]
};

namespace {

// --- matrix product -----------------------------------------------------------------------------------

// c[m, 0:16] (+)= sum over k of a[m, k] b[k, 0:16], in the order of k. Fetches what lies at `ahead` into the
// cache on the way, as much as b has.
template <int ROWS>
void tile(const float* a, long lda, const float* b, long ldb, float* c, long ldc, int depth, bool first,
          const float* ahead) {
    vec low[ROWS], high[ROWS];
    for (int m = 0; m < ROWS; m++) {
        low[m] = first ? splat(0.0f) : load(c + m * ldc);
        high[m] = first ? splat(0.0f) : load(c + m * ldc + LANES);
    }
    for (int k = 0; k < depth; k++, b += ldb, ahead += ldb) {
        if (ROWS > 1) __builtin_prefetch(ahead);  // one row is faster without
        const vec b0 = load(b), b1 = load(b + LANES);
        for (int m = 0; m < ROWS; m++) {
            const vec x = splat(a[m * lda + k]);
            low[m] += x * b0;
            high[m] += x * b1;
        }
    }
    for (int m = 0; m < ROWS; m++) {
        store(c + m * ldc, low[m]);
        store(c + m * ldc + LANES, high[m]);
    }
}

// Any number of rows over one block of a panel; `next` is the block that will be read after it. The first
// tile waits for memory (the prefetch of the CPU alone left a third of the bandwidth unused), the last one
// brings the next block in while it computes.
void rows_of_tiles(const float* a, long lda, const float* b, long ldb, float* c, long ldc, int rows,
                   int depth, bool first, const float* next) {
    const float* ahead = b + AHEAD * ldb;
    for (; rows >= MR; rows -= MR, a += MR * lda, c += MR * ldc) {
        tile<MR>(a, lda, b, ldb, c, ldc, depth, first, ahead);
        ahead = rows - MR > MR ? b : next;
    }
    switch (rows) {
        case 5: return tile<5>(a, lda, b, ldb, c, ldc, depth, first, ahead);
        case 4: return tile<4>(a, lda, b, ldb, c, ldc, depth, first, ahead);
        case 3: return tile<3>(a, lda, b, ldb, c, ldc, depth, first, ahead);
        case 2: return tile<2>(a, lda, b, ldb, c, ldc, depth, first, ahead);
        case 1: return tile<1>(a, lda, b, ldb, c, ldc, depth, first, ahead);
    }
}

inline ivec widen_bytes(const void* p) {
#if defined(__AVX2__)  // GCC makes 30 instructions of the portable form, and a tenth of the speed
    return reinterpret_cast<ivec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
    bytes8 narrow;
    memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, ivec);
#endif
}

inline vec widen(const int8_t* p) { return __builtin_convertvector(widen_bytes(p), vec); }
inline vec widen(const float* p) { return load(p); }

// As tile, reading floats or int8 weights (unscaled: the scale of an output is applied after the whole sum). Few
// rows would wait for their own last sums at every k, so PANELS panels, `stride` weights apart, go side by side.
template <int ROWS, int PANELS, typename Stored>
void tile_panels(const float* a, long lda, const Stored* b, long stride, float* c, long ldc, int depth, bool first) {
    vec acc[PANELS * 2][ROWS];
    for (int p = 0; p < PANELS * 2; p++)
        for (int m = 0; m < ROWS; m++) acc[p][m] = first ? splat(0.0f) : load(c + m * ldc + p * LANES);
    for (int k = 0; k < depth; k++, b += NR)
        for (int p = 0; p < PANELS; p++) {
            const vec b0 = widen(b + p * stride), b1 = widen(b + p * stride + LANES);
            for (int m = 0; m < ROWS; m++) {
                const vec x = splat(a[m * lda + k]);
                acc[p * 2][m] += x * b0;
                acc[p * 2 + 1][m] += x * b1;
            }
        }
    for (int p = 0; p < PANELS * 2; p++)
        for (int m = 0; m < ROWS; m++) store(c + m * ldc + p * LANES, acc[p][m]);
}

// 16 int4 pairs [16 bytes] to the floats of two successive k, times their scales.
inline void widen_int4(const uint8_t* p, vec s0, vec s1, vec out[4]) {
    for (int half = 0; half < 2; half++) {
        const ivec wide = widen_bytes(p + half * LANES);
        const vec scale = half ? s1 : s0;
        out[half] = __builtin_convertvector((wide << 28) >> 28, vec) * scale;
        out[2 + half] = __builtin_convertvector(wide >> 4, vec) * scale;
    }
}

// As tile_panels, reading int4 weights; `scale` is that of the first k, which starts a group.
template <int ROWS, int PANELS>
void tile_int4(const float* a, long lda, const uint8_t* b, long stride, const float* scale, long scale_stride,
               float* c, long ldc, int depth, bool first) {
    vec acc[PANELS * 2][ROWS];
    for (int p = 0; p < PANELS * 2; p++)
        for (int m = 0; m < ROWS; m++) acc[p][m] = first ? splat(0.0f) : load(c + m * ldc + p * LANES);
    for (int start = 0; start < depth; start += GROUP, scale += NR) {
        const int end = depth < start + GROUP ? depth : start + GROUP;
        for (int k = start; k < end; k += 2, b += NR)
            for (int p = 0; p < PANELS; p++) {
                vec w[4];
                const float* s = scale + p * scale_stride;
                widen_int4(b + p * stride, load(s), load(s + LANES), w);
                for (int m = 0; m < ROWS; m++) {
                    const vec x = splat(a[m * lda + k]);
                    acc[p * 2][m] += x * w[0];
                    acc[p * 2 + 1][m] += x * w[1];
                }
                if (k + 1 == end) continue;
                for (int m = 0; m < ROWS; m++) {
                    const vec x = splat(a[m * lda + k + 1]);
                    acc[p * 2][m] += x * w[2];
                    acc[p * 2 + 1][m] += x * w[3];
                }
            }
    }
    for (int p = 0; p < PANELS * 2; p++)
        for (int m = 0; m < ROWS; m++) store(c + m * ldc + p * LANES, acc[p][m]);
}

// One block (k0 .. k0 + depth) of a panel as floats [depth][16].
void unpack(const Weight& w, int panel, int k0, int depth, float* out) {
    if (w.kind == INT8) {
        const int8_t* b = static_cast<const int8_t*>(w.data) + (static_cast<long>(panel) * w.k + k0) * NR;
        for (int i = 0; i < depth * NR; i += LANES) store(out + i, widen(b + i));
        return;
    }
    const long pairs = (w.k + 1) / 2, groups = (w.k + GROUP - 1) / GROUP;
    const uint8_t* b = static_cast<const uint8_t*>(w.data) + (panel * pairs + k0 / 2) * NR;
    const float* scale = w.scale + (panel * groups + k0 / GROUP) * NR;
    for (int k = 0; k < depth; k += 2, b += NR) {
        const float* s = scale + k / GROUP * NR;
        vec wide[4];
        widen_int4(b, load(s), load(s + LANES), wide);
        for (int i = 0; i < (k + 1 < depth ? 4 : 2); i++) store(out + k * NR + i * LANES, wide[i]);
    }
}

template <int ROWS, int PANELS>
void few_rows(const Weight& w, int panel, int k0, const float* a, long lda, float* c, long ldc, int depth) {
    const bool first = k0 == 0;
    const long size = static_cast<long>(w.k) * NR, start = panel * size + k0 * NR;
    if (w.kind == F32)
        return tile_panels<ROWS, PANELS>(a, lda, static_cast<const float*>(w.data) + start, size, c, ldc, depth, first);
    if (w.kind == INT8)
        return tile_panels<ROWS, PANELS>(a, lda, static_cast<const int8_t*>(w.data) + start, size, c, ldc, depth, first);
    const long pairs = (w.k + 1) / 2, groups = (w.k + GROUP - 1) / GROUP;
    tile_int4<ROWS, PANELS>(a, lda, static_cast<const uint8_t*>(w.data) + (panel * pairs + k0 / 2) * NR,
                            pairs * NR, w.scale + (panel * groups + k0 / GROUP) * NR, groups * NR, c, ldc, depth,
                            first);
}

inline long lda_of(int depth) { return depth + NR; }  // no power of two: rows would share cache sets

// The panels [begin, end) times `rows` rows of a, into c (whose first column is that of panel 0). a lies in
// blocks of KC inputs, each [rows][lda]. Few rows read quantised weights straight from memory; more share
// one unpacked copy. Both multiply the same floats in the same order.
void panels_product(const Weight& w, int begin, int end, const float* a, float* c, long ldc, int rows,
                    float* unpacked) {
    for (int panel = begin; panel < end; panel++) {
        float* to = c + panel * NR;
        // One row of floats alone is as fast as memory is.
        const bool two = (rows == 2 || (rows == 1 && w.kind != F32)) && panel + 1 < end;
        const float* block = a;
        for (int k0 = 0; k0 < w.k; k0 += KC) {
            const int depth = w.k - k0 < KC ? w.k - k0 : KC;
            const long lda = lda_of(depth);
            if (w.kind == F32 && !two) {
                const float* b = static_cast<const float*>(w.data) + (static_cast<long>(panel) * w.k + k0) * NR;
                rows_of_tiles(block, lda, b, NR, to, ldc, rows, depth, k0 == 0, b + depth * NR);
            } else if (two) {
                rows == 1 ? few_rows<1, 2>(w, panel, k0, block, lda, to, ldc, depth)
                          : few_rows<2, 2>(w, panel, k0, block, lda, to, ldc, depth);
            } else if (rows <= 4) {
                rows == 1   ? few_rows<1, 1>(w, panel, k0, block, lda, to, ldc, depth)
                : rows == 2 ? few_rows<2, 1>(w, panel, k0, block, lda, to, ldc, depth)
                : rows == 3 ? few_rows<3, 1>(w, panel, k0, block, lda, to, ldc, depth)
                            : few_rows<4, 1>(w, panel, k0, block, lda, to, ldc, depth);
            } else {
                unpack(w, panel, k0, depth, unpacked);
                rows_of_tiles(block, lda, unpacked, NR, to, ldc, rows, depth, k0 == 0, unpacked);
            }
            block += rows * lda;
        }
        panel += two;
    }
}

// --- threads ------------------------------------------------------------------------------------------

class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        if (threads_ == 1) return;
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        // Where other work takes a core, its thread comes back only if this one lets go.
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
            spins < 4000 ? relax() : static_cast<void>(sched_yield());
    }

  private:
    const int threads_;
    std::atomic<int> arrived_{0}, round_{0};
};

struct Range {
    int begin, end;
};

Range share(int total, int thread, int threads) {
    return {static_cast<int>(static_cast<long>(total) * thread / threads),
            static_cast<int>(static_cast<long>(total) * (thread + 1) / threads)};
}

// --- the decoder --------------------------------------------------------------------------------------

struct Scratch {  // of one thread
    float few_scales[MR];
    std::vector<float> a;
    std::vector<float> unpacked = std::vector<float>(KC * NR);
    std::vector<float> keys, values, queries, scores, mixed, largest, total;
};

inline int padded(int n) { return (n + NR - 1) / NR * NR; }

class Decoder {
  public:
    Decoder(const Model& model, int threads) : model_(model), layers_(model.layers, model.layers + model.num_layers),
          threads_(threads), barrier_(threads), scratch_(threads), next_(model.num_layers * PHASES + 1) {
        const int dim = model.head_dim, wide = padded(dim);
        for (Scratch& s : scratch_) {
            s.keys.resize(KEYS * dim);
            s.values.resize(KEYS * wide);
            s.queries.resize(QUERY_ROWS * dim);
            s.scores.resize(MR * KEYS);
            s.mixed.resize(QUERY_ROWS * wide);
        }
        for (int thread = 1; thread < threads; thread++) pool_.emplace_back([this, thread] { serve(thread); });
    }

    ~Decoder() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closed_ = true;
        }
        wake_.notify_all();
        for (std::thread& thread : pool_) thread.join();
    }

    // Seconds of the first thread in each phase since the last call: what a profile of a step shows.
    enum Timed {
        EMBED_AND_HEAD, TIME_QKV, TIME_ROPE, TIME_ATTENTION, TIME_OUTPUT, TIME_GATE_UP, TIME_DOWN, WAITING, TIMED
    };
    void take_seconds(double* out) {
        memcpy(out, seconds_, sizeof seconds_);
        memset(seconds_, 0, sizeof seconds_);
    }

    void forward(const Cache& cache, const Step& step) {
        prepare(step);
        cache_ = &cache;
        step_ = &step;
        if (threads_ > 1) {
            {
                std::lock_guard<std::mutex> lock(mutex_);
                generation_++;
            }
            wake_.notify_all();
        }
        run(0);
        barrier_.wait();
    }

  private:
    void serve(int thread) {
        for (long seen = 0;; seen++) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return closed_ || generation_ != seen; });
                if (closed_) return;
            }
            run(thread);
            barrier_.wait();
        }
    }

    void prepare(const Step& step) {
        const size_t tokens = step.num_tokens, samples = step.num_samples;
        const size_t rows = tokens > samples ? tokens : samples;
        const auto grow = [](std::vector<float>& v, size_t size) { if (v.size() < size) v.resize(size); };
        grow(hidden_, rows * model_.hidden);
        grow(scale_, rows);
        grow(qkv_, tokens * layers_[0].qkv.n);
        grow(attended_, tokens * model_.num_heads * model_.head_dim);
        grow(gate_up_, tokens * layers_[0].gate_up.n);
        grow(projected_, tokens * layers_[0].o.n);
        grow(sampled_, samples * model_.hidden);
        for (auto& next : next_) next.store(0, std::memory_order_relaxed);
        items_.clear();
        const int per_token = model_.num_heads / model_.num_kv_heads;
        const int most = QUERY_ROWS / per_token > 0 ? QUERY_ROWS / per_token : 1;
        // The last tokens look at the most keys: they start first, so that no thread ends with a long one.
        for (int chunk = step.num_chunks - 1; chunk >= 0; chunk--)
            for (int end = step.first_row[chunk + 1]; end > step.first_row[chunk];) {
                const int begin = end - most > step.first_row[chunk] ? end - most : step.first_row[chunk];
                for (int head = 0; head < model_.num_kv_heads; head++) items_.push_back({begin, end, head});
                end = begin;
            }
    }

    enum Phase { QKV, ATTENTION, OUTPUT, GATE_UP, DOWN, PHASES };

    // Adds the time since the last call to a phase's; the first thread's clock stands for all.
    void lap(int thread, int phase) {
        if (thread != 0) return;
        const auto now = std::chrono::steady_clock::now();
        seconds_[phase] += std::chrono::duration<double>(now - last_lap_).count();
        last_lap_ = now;
    }

    void meet(int thread, int phase) {
        lap(thread, phase);
        barrier_.wait();
        lap(thread, WAITING);
    }

    void run(int thread) {
        const int rows = step_->num_tokens, mixed = model_.num_heads * model_.head_dim;
        if (thread == 0) last_lap_ = std::chrono::steady_clock::now();
        embed(thread);
        meet(thread, EMBED_AND_HEAD);
        for (int index = 0; index < model_.num_layers; index++) {
            const Layer& layer = layers_[index];
            std::atomic<int>* next = next_.data() + index * PHASES;
            rms(thread, hidden_.data(), rows);
            product(thread, next[QKV], layer.qkv, {hidden_.data(), model_.hidden, layer.input_norm}, rows,
                    qkv_.data());
            meet(thread, TIME_QKV);
            place(thread, layer, index);
            meet(thread, TIME_ROPE);
            attention(thread, next[ATTENTION], layer, index);
            meet(thread, TIME_ATTENTION);
            product(thread, next[OUTPUT], layer.o, {attended_.data(), mixed, nullptr}, rows, projected_.data(),
                    1, [&](const Task& task) { add(layer.o, task); });
            meet(thread, TIME_OUTPUT);
            rms(thread, hidden_.data(), rows);
            product(thread, next[GATE_UP], layer.gate_up, {hidden_.data(), model_.hidden, layer.mlp_norm}, rows,
                    gate_up_.data(), 2, [&](const Task& task) { swiglu(layer.gate_up, task); });
            meet(thread, TIME_GATE_UP);
            product(thread, next[DOWN], layer.down, {gate_up_.data(), layer.gate_up.n, nullptr}, rows,
                    projected_.data(), 1, [&](const Task& task) { add(layer.down, task); });
            meet(thread, TIME_DOWN);
        }
        head(thread);
        lap(thread, EMBED_AND_HEAD);
    }

    void embed(int thread) {
        const int size = model_.hidden;
        const Range own = share(step_->num_tokens, thread, threads_);
        for (int t = own.begin; t < own.end; t++) {
            const long token = step_->token_ids[t];
            float* out = hidden_.data() + static_cast<long>(t) * size;
            if (model_.embedding) {
                memcpy(out, model_.embedding + token * size, size * sizeof(float));
                continue;
            }
            const Weight& w = model_.lm_head;
            const long at = token / NR * w.k * NR + token % NR;
            for (int k = 0; k < size; k++)
                out[k] = w.kind == F32 ? static_cast<const float*>(w.data)[at + static_cast<long>(k) * NR]
                                       : static_cast<const int8_t*>(w.data)[at + static_cast<long>(k) * NR] *
                                             w.scale[token];
        }
    }

    // The factor of each row's RMSNorm. Every thread needs all of them and few are cheap: no barrier then.
    void rms(int thread, const float* x, int rows) {
        const int size = model_.hidden;
        const bool alone = rows <= MR;
        const Range own = alone ? Range{0, rows} : share(rows, thread, threads_);
        float* out = alone ? scratch_[thread].few_scales : scale_.data();
        for (int t = own.begin; t < own.end; t++) out[t] = inverse_rms(x + static_cast<long>(t) * size, size);
        if (!alone) barrier_.wait();
    }

    const float* scales(int thread, int rows) const {
        return rows <= MR ? scratch_[thread].few_scales : scale_.data();
    }

    float inverse_rms(const float* x, int size) const {
        vec squares = splat(0.0f);
        int k = 0;
        for (; k + LANES <= size; k += LANES) squares += load(x + k) * load(x + k);
        float total = sum(squares);
        for (; k < size; k++) total += x[k] * x[k];
        return 1.0f / std::sqrt(total / size + model_.eps);
    }

    struct Input {
        const float* x;
        long stride;
        const float* norm;  // of RMSNorm, whose factors rms() has left; null: none
    };

    struct Task {  // rows [begin, begin + count) of panels [first, last)
        int begin, count, first, last;
    };

    // `count` rows of the input from `begin`, normalised, in the layout of panels_product.
    void gather(int thread, const Input& in, int depth_total, int rows, int begin, int count) {
        float* a = scratch_[thread].a.data();
        const float* scale = in.norm ? scales(thread, rows) : nullptr;
        for (int k0 = 0; k0 < depth_total; k0 += KC) {
            const int depth = depth_total - k0 < KC ? depth_total - k0 : KC;
            for (int m = 0; m < count; m++, a += lda_of(depth)) {
                const float* from = in.x + (begin + m) * in.stride + k0;
                if (!in.norm) {
                    memcpy(a, from, depth * sizeof(float));
                    continue;
                }
                const float s = scale[begin + m];
                for (int k = 0; k < depth; k++) a[k] = from[k] * s * in.norm[k0 + k];
            }
        }
    }

    // out = in W^T (scaled, plus bias), one task after another; `done` sees each when it is whole. A step of
    // few rows is a read of the weights and is shared out evenly; of more rows a thread takes the next task
    // when it is ready, for other work on the machine slows threads unevenly. With `parts` of 2 a task's
    // panels are repeated in the second half of W.
    template <typename Done>
    void product(int thread, std::atomic<int>& next, const Weight& w, const Input& in, int rows, float* out,
                 int parts, Done done) {
        Scratch& scratch = scratch_[thread];
        const int panels = w.n / NR / parts, most = BLOCK_FLOATS / w.k / MR * MR;
        const int limit = most > 4 * MR ? most : 4 * MR, blocks = (rows + limit - 1) / limit;
        const int block = rows <= MR ? rows : ((rows + blocks - 1) / blocks + MR - 1) / MR * MR;
        const int chunks = rows <= MR ? threads_ : (panels + CHUNK - 1) / CHUNK;
        const size_t size = static_cast<size_t>(block) * (w.k + NR * ((w.k + KC - 1) / KC));
        if (scratch.a.size() < size) scratch.a.resize(size);
        int gathered = -1;
        for (int number = rows <= MR ? thread : next++; number < chunks * blocks;
             number = rows <= MR ? chunks * blocks : next++) {
            const int begin = number / chunks * block, chunk = number % chunks;
            const int count = rows - begin < block ? rows - begin : block;
            if (count <= 0) continue;
            const Range own = rows <= MR ? share(panels, chunk, chunks)
                                         : Range{chunk * CHUNK, std::min(panels, (chunk + 1) * CHUNK)};
            if (gathered != begin) gather(thread, in, w.k, rows, begin, count);
            gathered = begin;
            for (int part = 0; part < parts; part++) {
                const Task task{begin, count, own.begin + part * panels, own.end + part * panels};
                panels_product(w, task.first, task.last, scratch.a.data(), out + static_cast<long>(begin) * w.n,
                               w.n, count, scratch.unpacked.data());
                finish(w, out, task);
            }
            done(Task{begin, count, own.begin, own.end});
        }
    }

    void product(int thread, std::atomic<int>& next, const Weight& w, const Input& in, int rows, float* out) {
        product(thread, next, w, in, rows, out, 1, [](const Task&) {});
    }

    // Scale of int8 outputs, and bias.
    static void finish(const Weight& w, float* out, const Task& task) {
        if (w.kind != INT8 && !w.bias) return;
        for (int t = task.begin; t < task.begin + task.count; t++)
            for (int n = task.first * NR; n < task.last * NR; n += LANES) {
                float* at = out + static_cast<long>(t) * w.n + n;
                vec v = load(at);
                if (w.kind == INT8) v *= load(w.scale + n);
                if (w.bias) v += load(w.bias + n);
                store(at, v);
            }
    }

    // silu(gate) * up, in place of gate.
    void swiglu(const Weight& w, const Task& task) {
        const int half = w.n / 2;
        for (int t = task.begin; t < task.begin + task.count; t++)
            for (int n = task.first * NR; n < task.last * NR; n += LANES) {
                float* at = gate_up_.data() + static_cast<long>(t) * w.n + n;
                const vec gate = load(at);
                store(at, gate / (splat(1.0f) + exponential(-gate)) * load(at + half));
            }
    }

    // hidden += projected.
    void add(const Weight& w, const Task& task) {
        const int end = std::min(task.last * NR, model_.hidden);
        for (int t = task.begin; t < task.begin + task.count; t++)
            for (int n = task.first * NR; n < end; n++)
                hidden_[static_cast<long>(t) * model_.hidden + n] += projected_[static_cast<long>(t) * w.n + n];
    }

    float* cached(int index, int chunk, long position, int which, int head) const {
        const long block = step_->table[step_->table_start[chunk] + position / cache_->block_size];
        const long size = static_cast<long>(cache_->block_size) * model_.head_dim;
        const long row = (static_cast<long>(index) * 2 + which) * model_.num_kv_heads + head;
        return cache_->blocks + block * cache_->block_stride + row * size +
               position % cache_->block_size * model_.head_dim;
    }

    // Norms and rotates queries in place, keys into the cache, and copies values into the cache.
    void place(int thread, const Layer& layer, int index) {
        const int heads = model_.num_heads + 2 * model_.num_kv_heads, dim = model_.head_dim;
        const Range own = share(step_->num_tokens * heads, thread, threads_);
        for (int unit = own.begin; unit < own.end; unit++) {
            const int t = unit / heads, head = unit % heads, kv = head - model_.num_heads;
            float* x = qkv_.data() + static_cast<long>(t) * layer.qkv.n + head * dim;
            if (kv < 0) {
                rotate(x, x, t, layer.q_norm);
                continue;
            }
            const bool key = kv < model_.num_kv_heads;
            float* to = cached(index, step_->chunk_of[t], step_->positions[t], key ? 0 : 1,
                               key ? kv : kv - model_.num_kv_heads);
            if (key)
                rotate(x, to, t, layer.k_norm);
            else
                memcpy(to, x, dim * sizeof(float));
        }
    }

    void rotate(float* x, float* out, int token, const float* norm) const {
        const int dim = model_.head_dim, half = dim / 2;
        if (norm) {
            const float scale = inverse_rms(x, dim);
            for (int i = 0; i < dim; i++) x[i] = x[i] * scale * norm[i];
        }
        const float* cos = step_->cos + static_cast<long>(token) * half;
        const float* sin = step_->sin + static_cast<long>(token) * half;
        for (int i = 0; i < half; i++) {
            const float first = x[i], second = x[i + half];
            out[i] = first * cos[i] - second * sin[i];
            out[i + half] = second * cos[i] + first * sin[i];
        }
    }

    struct Item {  // rows [begin, end) of one chunk, all query heads of one KV head
        int begin, end, head;
    };

    void attention(int thread, std::atomic<int>& next, const Layer& layer, int index) {
        for (size_t item = next++; item < items_.size(); item = next++)
            attend(scratch_[thread], layer, index, items_[item]);
    }

    void attend(Scratch& s, const Layer& layer, int index, const Item& item) {
        const int dim = model_.head_dim, wide = padded(dim), per = model_.num_heads / model_.num_kv_heads;
        const int rows = (item.end - item.begin) * per;
        if (static_cast<size_t>(rows) * wide > s.mixed.size()) {  // more heads to a KV head than QUERY_ROWS
            s.queries.resize(static_cast<size_t>(rows) * dim);
            s.mixed.resize(static_cast<size_t>(rows) * wide);
        }
        const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
        s.largest.assign(rows, -std::numeric_limits<float>::infinity());
        s.total.assign(rows, 0.0f);
        for (int row = 0; row < rows; row++) {
            const int t = item.begin + row / per, head = item.head * per + row % per;
            const float* q = qkv_.data() + static_cast<long>(t) * layer.qkv.n + head * dim;
            for (int i = 0; i < dim; i++) s.queries[row * dim + i] = q[i] * scale;
        }
        memset(s.mixed.data(), 0, sizeof(float) * rows * wide);
        const long last = step_->positions[item.end - 1], first = step_->positions[item.begin];
        const long oldest = layer.window ? (first - layer.window + 1 > 0 ? first - layer.window + 1 : 0) : 0;
        // Tiles begin at multiples of KEYS, so that a row's sum has the same parts in every batch.
        for (long start = oldest / KEYS * KEYS; start <= last; start += KEYS) {
            const int keys = last + 1 - start < KEYS ? static_cast<int>(last + 1 - start) : KEYS;
            gather_keys(s, index, item, start, keys);
            for (int row = 0; row < rows; row += MR) {
                const int count = rows - row < MR ? rows - row : MR;
                attend_rows(s, layer, item, start, keys, row, count);
            }
        }
        for (int row = 0; row < rows; row++) {
            const int t = item.begin + row / per, head = item.head * per + row % per;
            float* out = attended_.data() + (static_cast<long>(t) * model_.num_heads + head) * dim;
            const float inverse = 1.0f / s.total[row];
            for (int i = 0; i < dim; i++) out[i] = s.mixed[row * wide + i] * inverse;
        }
    }

    // 8 keys' head_dim floats into 8 of the 16 columns of out [head_dim][16]; a null key gives zeros.
    static void transpose(const float* const keys[LANES], int dim, float* out) {
        int i = 0;
        for (; i + LANES <= dim; i += LANES) {
            vec rows[LANES];
            for (int r = 0; r < LANES; r++) rows[r] = keys[r] ? load(keys[r] + i) : splat(0.0f);
            transpose8(rows);
            for (int r = 0; r < LANES; r++) store(out + (i + r) * NR, rows[r]);
        }
        for (; i < dim; i++)
            for (int r = 0; r < LANES; r++) out[i * NR + r] = keys[r] ? keys[r][i] : 0.0f;
    }

    // A tile's keys transposed to [KEYS / 16][head_dim][16] and its values as [keys][head_dim padded].
    void gather_keys(Scratch& s, int index, const Item& item, long start, int keys) {
        const int dim = model_.head_dim, wide = padded(dim), chunk = step_->chunk_of[item.begin];
        for (int key = 0; key < padded(keys); key += LANES) {
            const float* some[LANES];
            for (int r = 0; r < LANES; r++)
                some[r] = key + r < keys ? cached(index, chunk, start + key + r, 0, item.head) : nullptr;
            transpose(some, dim, s.keys.data() + key / NR * dim * NR + key % NR);
        }
        for (int key = 0; key < keys; key++)
            memcpy(s.values.data() + key * wide, cached(index, chunk, start + key, 1, item.head),
                   dim * sizeof(float));
    }

    void attend_rows(Scratch& s, const Layer& layer, const Item& item, long start, int keys, int row,
                     int count) {
        const int dim = model_.head_dim, wide = padded(dim), per = model_.num_heads / model_.num_kv_heads;
        // Rows of the same token come together: the first row sees the fewest keys, the last the most.
        const long newest = step_->positions[item.begin + (row + count - 1) / per];
        if (newest < start) return;
        for (int panel = 0; panel * NR < keys; panel++)
            rows_of_tiles(s.queries.data() + row * dim, dim, s.keys.data() + panel * dim * NR, NR,
                          s.scores.data() + panel * NR, KEYS, count, dim, true, s.keys.data());
        int used = 0;
        for (int m = 0; m < count; m++) {
            const long position = step_->positions[item.begin + (row + m) / per];
            const int visible = static_cast<int>(position + 1 - start < keys ? position + 1 - start : keys);
            const long hidden = layer.window ? position - layer.window + 1 - start : 0;
            float* mixed = s.mixed.data() + (row + m) * wide;
            soften(s.scores.data() + m * KEYS, static_cast<int>(hidden > 0 ? hidden : 0), visible, mixed, wide,
                   s.largest[row + m], s.total[row + m]);
            used = visible > used ? visible : used;
        }
        for (int column = 0; column < wide; column += NR)
            rows_of_tiles(s.scores.data(), KEYS, s.values.data() + column, wide,
                          s.mixed.data() + row * wide + column, wide, count, used, false,
                          s.values.data() + column);
    }

    // Scores [KEYS] of one row to exp(score - largest), 0 outside [hidden, visible); rescales what is mixed.
    static void soften(float* scores, int hidden, int visible, float* mixed, int wide, float& largest,
                       float& total) {
        const float none = -std::numeric_limits<float>::infinity();
        for (int key = 0; key < KEYS; key++)
            if (key < hidden || key >= visible) scores[key] = none;
        vec most = splat(none);
        for (int key = 0; key < KEYS; key += LANES) {
            const vec v = load(scores + key);
            most = v > most ? v : most;
        }
        float peak = largest;
        for (int i = 0; i < LANES; i++) peak = most[i] > peak ? most[i] : peak;
        if (peak == none) {
            for (int key = 0; key < KEYS; key++) scores[key] = 0.0f;
            return;
        }
        vec parts = splat(0.0f);
        for (int key = 0; key < KEYS; key += LANES) {
            const vec e = exponential(load(scores + key) - splat(peak));
            store(scores + key, e);
            parts += e;
        }
        if (peak != largest) {
            const float shrink = largest == none ? 0.0f : exponential(splat(largest - peak))[0];
            for (int i = 0; i < wide; i += LANES) store(mixed + i, load(mixed + i) * splat(shrink));
            total *= shrink;
            largest = peak;
        }
        total += sum(parts);
    }

    void head(int thread) {
        const int rows = step_->num_samples, size = model_.hidden;
        if (rows == 0) return;
        const Range own = share(rows, thread, threads_);
        for (int row = own.begin; row < own.end; row++)
            memcpy(sampled_.data() + static_cast<long>(row) * size,
                   hidden_.data() + step_->sample_rows[row] * size, size * sizeof(float));
        barrier_.wait();
        rms(thread, sampled_.data(), rows);
        product(thread, next_.back(), model_.lm_head, {sampled_.data(), size, model_.norm}, rows, step_->logits);
    }

    const Model model_;
    const std::vector<Layer> layers_;
    const int threads_;
    Barrier barrier_;
    std::vector<Scratch> scratch_;
    std::vector<std::atomic<int>> next_;  // of each phase: the task to take, PHASES a layer and the head's
    std::vector<Item> items_;
    std::vector<float> hidden_, scale_, qkv_, attended_, gate_up_, projected_, sampled_;
    double seconds_[TIMED] = {};
    std::chrono::steady_clock::time_point last_lap_;
    const Cache* cache_ = nullptr;
    const Step* step_ = nullptr;
    std::vector<std::thread> pool_;
    std::mutex mutex_;
    std::condition_variable wake_;
    long generation_ = 0;
    bool closed_ = false;
};

}  // namespace

// Layout of the structures, for library.py to compare with its own before the first call.
EXPORT void disagg_sizes(int64_t out[5]) {
    const int64_t sizes[5] = {sizeof(Weight), sizeof(Layer), sizeof(Model), sizeof(Cache), sizeof(Step)};
    memcpy(out, sizes, sizeof sizes);
}

EXPORT void* disagg_decoder_create(const Model* model, int32_t threads) {
    try {
        return new Decoder(*model, threads);
    } catch (...) {  // out of memory or of threads; no exception may pass into Python
        return nullptr;
    }
}

EXPORT int32_t disagg_decoder_forward(void* decoder, const Cache* cache, const Step* step) {
    try {
        static_cast<Decoder*>(decoder)->forward(*cache, *step);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

EXPORT void disagg_decoder_seconds(void* decoder, double* out) { static_cast<Decoder*>(decoder)->take_seconds(out); }

EXPORT void disagg_decoder_destroy(void* decoder) { delete static_cast<Decoder*>(decoder); }
