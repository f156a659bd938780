// Keyed dropout for CPU tensors: draws masks by Philox4x32-10, scales what is kept. Plain C ABI.
//
// Values are [samples, heads, queries, columns]; rows of features have one head. The random stream
// comes in blocks of eight 16-bit lanes, one counter a block. A column is one lane: its feature, its
// group of features, or its key position. A row brings key, row id, position, threshold and scale.
// For each stretch of a row: draw lanes into a small buffer, then mask and scale.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MASKLOCK_X86 1
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#include <immintrin.h>
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

// ---- what Python hands over: 64-bit words, in this order (cpu.py packs them) ---------------------

template <class Value>
struct Table {
    const Value* data;
    int64_t stride0, stride1;  // in elements; 0 where a value is shared
    Value at(int64_t i, int64_t j) const { return data[i * stride0 + j * stride1]; }
};

struct Call {
    const char* x;
    char* y;
    int64_t format, num_threads, head_offset, group;
    int64_t samples, heads, queries, columns;
    int64_t x_strides[3], y_strides[3];  // in elements; columns are adjacent
    Table<int64_t> keys, row_ids, positions, thresholds;  // by sample and query
    Table<float> scales;
    Table<int64_t> key_positions;  // by sample and column; no data: columns are features
};

enum Status { kDone, kBadKeyPosition, kBadPosition, kBadThreshold };  // a bad one stops its thread

// ---- Philox4x32-10 -------------------------------------------------------------------------------

constexpr int kRounds = 10, kLanes = 8;  // lanes a block
constexpr int kWindow = 2048;            // lanes a stretch may span: two buffers stay in the L1 cache
constexpr int kSpare = 64;               // drawing rounds up to whole vectors
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

struct Stream {  // all of a row's counters but the block number
    uint64_t key, row_id;
    uint32_t position, head;
};

void draw_portable(const Stream& stream, uint32_t first_block, int num_blocks, uint16_t* lanes) {
    for (int block = 0; block < num_blocks; ++block) {
        uint32_t k0 = uint32_t(stream.key), k1 = uint32_t(stream.key >> 32);
        uint32_t c0 = (stream.head << 20) | (first_block + block), c1 = stream.position;
        uint32_t c2 = uint32_t(stream.row_id), c3 = uint32_t(stream.row_id >> 32);
        for (int round = 0; round < kRounds; ++round, k0 += kWeyl0, k1 += kWeyl1) {
            const uint64_t p0 = uint64_t(c0) * kMultiplier0, p1 = uint64_t(c2) * kMultiplier1;
            c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
            c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
        }
        const uint32_t words[4] = {c0, c1, c2, c3};
        for (int lane = 0; lane < kLanes; ++lane)  // low half first, whatever the byte order
            lanes[block * kLanes + lane] = uint16_t(words[lane / 2] >> (lane % 2 * 16));
    }
}

#ifdef MASKLOCK_X86
// One counter in each 64-bit element: the product of the low halves is one instruction (g++ does not
// find it by itself), and what the upper halves hold meanwhile never reaches a result.
#define DEFINE_DRAW(NAME, TARGET, BYTES, MULTIPLY, ...)                                              \
    __attribute__((target(TARGET))) void NAME(const Stream& stream, uint32_t first_block,            \
                                              int num_blocks, uint16_t* lanes) {                     \
        typedef uint64_t Vector __attribute__((vector_size(BYTES)));                                 \
        constexpr int kWidth = BYTES / 8;                                                            \
        const Vector front = {__VA_ARGS__}, back = front + kWidth / 2;                               \
        const Vector zero = {}, m0 = zero + kMultiplier0, m1 = zero + kMultiplier1;                  \
        Vector count = zero + ((uint64_t(stream.head) << 20) | first_block);                         \
        for (int i = 0; i < kWidth; ++i) count[i] += i;                                              \
        for (int block = 0; block < num_blocks; block += kWidth, count += kWidth) {                  \
            uint32_t k0 = uint32_t(stream.key), k1 = uint32_t(stream.key >> 32);                     \
            Vector c0 = count, c1 = zero + stream.position;                                          \
            Vector c2 = zero + stream.row_id, c3 = c2 >> 32;                                         \
            _Pragma("GCC unroll 10") for (int round = 0; round < kRounds; ++round) {                 \
                const Vector p0 = MULTIPLY(c0, m0), p1 = MULTIPLY(c2, m1);                           \
                c0 = (p1 >> 32) ^ c1 ^ (zero + k0), c1 = p1;                                         \
                c2 = (p0 >> 32) ^ c3 ^ (zero + k1), c3 = p0;                                         \
                k0 += kWeyl0, k1 += kWeyl1;                                                          \
            }                                                                                        \
            const Vector low = (c0 & 0xFFFFFFFF) | (c1 << 32), high = (c2 & 0xFFFFFFFF) | (c3 << 32);\
            const Vector halves[2] = {__builtin_shuffle(low, high, front),                           \
                                      __builtin_shuffle(low, high, back)};                           \
            std::memcpy(lanes + block * kLanes, halves, sizeof halves);                              \
        }                                                                                            \
    }
#define MULTIPLY_512(a, b) (Vector) _mm512_maskz_mul_epu32(0xFF, (__m512i)(a), (__m512i)(b))
#define MULTIPLY_256(a, b) (Vector) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
DEFINE_DRAW(draw_avx512, "avx512f", 64, MULTIPLY_512, 0, 8, 1, 9, 2, 10, 3, 11)
DEFINE_DRAW(draw_avx2, "avx2", 32, MULTIPLY_256, 0, 4, 1, 5)
#endif

struct Best {
    const char* instructions;
    decltype(&draw_portable) draw;
} const best = [] {
#ifdef MASKLOCK_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return Best{"avx512", draw_avx512};
    if (__builtin_cpu_supports("avx2")) return Best{"avx2", draw_avx2};
#endif
    return Best{"default", draw_portable};
}();

// ---- number formats: products are made wide and rounded to nearest even --------------------------

template <class To, class From>
INLINE To same_bits(From value) {
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
INLINE uint32_t bits(float value) { return same_bits<uint32_t>(value); }
INLINE float number(uint32_t value) { return same_bits<float>(value); }

template <class Number>
struct Native {
    using Stored = Number; using Wide = Number;
    static INLINE Number widen(Number value) { return value; }
    static INLINE Number narrow(Number value) { return value; }
};

struct BFloat16 {
    using Stored = uint16_t; using Wide = float;
    static INLINE Wide widen(Stored value) { return number(uint32_t(value) << 16); }
    static INLINE Stored narrow(Wide value) {
        const uint32_t all = bits(value), rounded = (all + 0x7FFF + ((all >> 16) & 1)) >> 16;
        return Stored(value != value ? 0x7FC0 : rounded);
    }
};

struct Float16 {  // by integers: compilers of this decade differ in what they know of half precision
    using Stored = uint16_t; using Wide = float;
    static INLINE Wide widen(Stored value) {
        const uint32_t moved = uint32_t(value & 0x7FFF) << 13, exponent = moved & 0x0F800000;
        const uint32_t normal = moved + 0x38000000, special = moved + 0x70000000;
        const uint32_t tiny = bits(number(moved + 0x38800000) - number(0x38800000));
        const uint32_t size = exponent == 0 ? tiny : exponent == 0x0F800000 ? special : normal;
        return number(size | uint32_t(value & 0x8000) << 16);
    }
    static INLINE Stored narrow(Wide value) {
        const uint32_t sign = (bits(value) >> 16) & 0x8000, size = bits(value) & 0x7FFFFFFF;
        const uint32_t normal = (size + 0xC8000FFF + ((size >> 13) & 1)) >> 13;
        const uint32_t tiny = bits(number(size) + 0.5f) - bits(0.5f);
        const uint32_t large = size > 0x7F800000 ? 0x7E00 : 0x7C00;
        const uint32_t result = size >= 0x47800000 ? large : size < 0x38800000 ? tiny : normal;
        return Stored(result | sign);
    }
};

struct Part {  // some neighbouring elements of one row
    const char* x; char* y; const uint16_t* lanes;
    int n;
    uint32_t threshold;
    float scale;
};

template <class Format>
INLINE void mask(const Part& part) {
    const auto* x = reinterpret_cast<const typename Format::Stored*>(part.x);
    auto* y = reinterpret_cast<typename Format::Stored*>(part.y);
    const typename Format::Wide scale = part.scale;
    for (int i = 0; i < part.n; ++i) {
        const auto product = Format::narrow(Format::widen(x[i]) * scale);
        y[i] = part.lanes[i] >= part.threshold ? product : 0;  // a choice: NaN times 0 is not 0
    }
}

CLONES void mask_float32(const Part& part) { mask<Native<float>>(part); }
CLONES void mask_bfloat16(const Part& part) { mask<BFloat16>(part); }
CLONES void mask_float16(const Part& part) { mask<Float16>(part); }
CLONES void mask_float64(const Part& part) { mask<Native<double>>(part); }

constexpr struct {
    void (*mask)(const Part&);
    int64_t bytes;
} kFormats[] = {{mask_float32, 4}, {mask_bfloat16, 2}, {mask_float16, 2}, {mask_float64, 8}};

// ---- columns: stretches whose lanes lie close together -------------------------------------------

struct Stretch {
    int64_t column, first_block;
    int num_blocks, num_columns, offset;
    bool contiguous;  // lanes follow one another from offset on; otherwise each is looked up
};

struct Columns {
    std::vector<Stretch> stretches;
    std::vector<uint16_t> lookup;  // of each column: its lane, counted from its stretch's first block
};

bool plan(const Call& call, int64_t sample, Columns& columns) {  // false: a bad key position
    const bool attention = call.key_positions.data;
    const int64_t max_lane = attention ? (1 << 23) - 1 : call.columns;
    const auto lane_of = [&](int64_t column) {
        if (attention) return call.key_positions.at(sample, column);
        return call.group == 1 ? column : column / call.group;
    };
    columns.lookup.resize(call.columns);
    for (int64_t column = 0; column < call.columns;) {
        const int64_t first = column, start = lane_of(first), base = start & ~int64_t(7);
        const int64_t end = std::min(call.columns, first + kWindow);
        int64_t last = start;
        bool contiguous = true;
        for (; column < end; ++column) {
            const int64_t lane = lane_of(column);
            if (lane < 0 || lane > max_lane) return false;
            if (lane < base || lane >= base + kWindow) break;
            contiguous = contiguous && lane == start + column - first;
            last = std::max(last, lane);
            columns.lookup[column] = uint16_t(lane - base);
        }
        columns.stretches.push_back({first, base / kLanes, int((last - base) / kLanes + 1),
                                     int(column - first), int(start - base), contiguous});
    }
    return true;
}

// ---- rows ----------------------------------------------------------------------------------------

struct Buffers {
    alignas(64) uint16_t drawn[kWindow + kSpare], picked[kWindow];
};

Status mask_row(const Call& call, const Columns& columns, int64_t sample, int64_t head,
                int64_t query, Buffers& buffers) {
    const int64_t position = call.positions.at(sample, query);
    const int64_t threshold = call.thresholds.at(sample, query);
    if (position < 0 || position > 0xFFFFFFFF) return kBadPosition;
    if (threshold < 0 || threshold > 0x10000) return kBadThreshold;
    const Stream stream = {uint64_t(call.keys.at(sample, query)),
                           uint64_t(call.row_ids.at(sample, query)), uint32_t(position),
                           uint32_t(head + call.head_offset)};
    const auto format = kFormats[call.format];
    const auto row = [&](const int64_t* strides) {
        return (sample * strides[0] + head * strides[1] + query * strides[2]) * format.bytes;
    };
    Part part = {nullptr, nullptr, nullptr, 0, uint32_t(threshold), call.scales.at(sample, query)};
    for (const Stretch& stretch : columns.stretches) {
        best.draw(stream, uint32_t(stretch.first_block), stretch.num_blocks, buffers.drawn);
        part.lanes = stretch.contiguous ? buffers.drawn + stretch.offset : buffers.picked;
        part.n = stretch.num_columns;
        for (int i = 0; i < part.n && !stretch.contiguous; ++i)
            buffers.picked[i] = buffers.drawn[columns.lookup[stretch.column + i]];
        part.x = call.x + row(call.x_strides) + stretch.column * format.bytes;
        part.y = call.y + row(call.y_strides) + stretch.column * format.bytes;
        format.mask(part);
    }
    return kDone;
}

Status mask_rows(const Call& call, const std::vector<Columns>& plans, int64_t begin, int64_t end) {
    Buffers buffers;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t query = i % call.queries, rest = i / call.queries;
        const int64_t head = rest % call.heads, sample = rest / call.heads;
        const Columns& columns = plans[plans.size() == 1 ? 0 : sample];
        if (Status bad = mask_row(call, columns, sample, head, query, buffers)) return bad;
    }
    return kDone;
}

}  // namespace

extern "C" {

const char* masklock_instructions() { return best.instructions; }
int64_t masklock_call_bytes() { return sizeof(Call); }  // a library of another version is told so
int masklock_apply(const void* packed) {
    Call call;
    std::memcpy(&call, packed, sizeof call);
    const bool own_columns = call.key_positions.data && call.key_positions.stride0;
    std::vector<Columns> plans(own_columns ? call.samples : 1);
    for (size_t sample = 0; sample < plans.size(); ++sample)
        if (!plan(call, int64_t(sample), plans[sample])) return kBadKeyPosition;
    const int64_t num_rows = call.samples * call.heads * call.queries, parts = call.num_threads;
    int status = kDone;
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1) reduction(max : status)
    for (int64_t part = 0; part < parts; ++part)
        status = mask_rows(call, plans, num_rows * part / parts, num_rows * (part + 1) / parts);
    return status;
}
}
