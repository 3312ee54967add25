// How x is packed for quantised weights, for one instruction set. To be included within its target region and an
// anonymous namespace, which has at least AVX2, after a `struct Vec` (quantized_avx2.cpp shows what it offers).
//
// x is quantised to int8 in groups of 32 numbers. A vector of the weights' codes has 4 numbers in each of its 32-bit
// lanes; a span is kLanes groups, so that the scales of a span fill a vector.

enum class Kind { kInt8, kInt4, kInt4Zeros, kMxfp4 };

constexpr int kGroup = 32;
constexpr int kLanes = Vec::kLanes;
constexpr int kBytes = 4 * kLanes;      // of a vector
constexpr int kSpan = kGroup * kLanes;  // numbers
constexpr int kSteps = kGroup / 4;      // products of 4 numbers in a group
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr float kTiny = 0x1p-119f;  // groups of x below are taken for zeros: their scale would be subnormal

template <Kind kKind>
constexpr bool is_nibbles() {
    return kKind != Kind::kInt8;
}

// Unsigned codes stand for the numbers plus this, so the product of a group is short of bias * sum(x).
template <Kind kKind>
constexpr int bias() {
    return kKind == Kind::kInt8 ? 128 : kKind == Kind::kInt4 ? 8 : kKind == Kind::kInt4Zeros ? 1 : 12;
}

template <Kind kKind>
constexpr int lines() {  // vectors of codes of a row in a span
    return kSpan / (is_nibbles<kKind>() ? 2 : 1) / kBytes;
}

inline int64_t spans(int64_t k) {
    return (k + kSpan - 1) / kSpan;
}

struct XGroup {
    __m256i codes;
    float scale;
};

// 32 numbers of x as int8 codes, rounded to nearest even; a group that is not finite has the scale NaN and codes 0.
inline XGroup quantise(const float* x) {
    __m256i most = _mm256_setzero_si256();
    for (int i = 0; i < kGroup; i += 8) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
        most = _mm256_max_epu32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
    const bool finite = static_cast<uint32_t>(_mm_cvtsi128_si32(four)) < kInfinity;
    const float amax = _mm_cvtss_f32(_mm_castsi128_ps(four));
    if (!finite || amax < kTiny) return {_mm256_setzero_si256(), finite ? 0.0f : __builtin_nanf("")};

    const __m256 factor = _mm256_set1_ps(127.0f / amax);
    __m256i wide[4];
    for (int i = 0; i < 4; ++i) wide[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor));
    const __m256i codes =
        _mm256_packs_epi16(_mm256_packs_epi32(wide[0], wide[1]), _mm256_packs_epi32(wide[2], wide[3]));
    return {_mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)), amax / 127.0f};
}

// Those of even k in the low half, those of odd k in the high half.
inline __m256i even_and_odd(__m256i codes) {
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(codes, order), 0xd8);
}

// Sums of four codes in each lane, times `factor`.
inline __m256i sums_of_four(__m256i codes, int factor) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(static_cast<int16_t>(factor)));
}

inline __m128i add_halves(__m256i value) {
    return _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
}

inline void store_half(void* to, __m128i value) {
    _mm_storeu_si128(static_cast<__m128i*>(to), value);
}

// For few tokens lanes run along k. A token's span is
//   codes    the vectors the weights' vectors are multiplied with; for nibbles two each: those of even k, those of odd
//   k sums     int32, minus bias times the sum of the codes that each lane of such a product has seen scales   fp32,
//   one a group
template <Kind kKind>
constexpr int few_span_bytes() {
    return kSpan + lines<kKind>() * kBytes + kBytes;
}

template <Kind kKind>
int64_t few_token_bytes(int64_t k) {
    return spans(k) * few_span_bytes<kKind>();
}

template <Kind kKind>
int64_t few_block_bytes(int64_t k) {
    return kTokenBlock * few_token_bytes<kKind>(k);  // a multiple of 64, as there are 16 tokens
}

template <Kind kKind>
void few_pack(const float* x, int tokens, int64_t k, uint8_t* block) {
    for (int token = 0; token < tokens; ++token, x += k, block += few_token_bytes<kKind>(k)) {
        for (int64_t span = 0; span < spans(k); ++span) {
            uint8_t* codes = block + span * few_span_bytes<kKind>();
            int32_t* sums = reinterpret_cast<int32_t*>(codes + kSpan);
            float* scales = reinterpret_cast<float*>(sums + lines<kKind>() * kLanes);
            for (int group = 0; group < kLanes; ++group) {
                const int64_t first = span * kSpan + group * kGroup;
                const XGroup q = first < k ? quantise(x + first) : XGroup{_mm256_setzero_si256(), 0};
                scales[group] = q.scale;
                if (is_nibbles<kKind>()) {
                    constexpr int kHalf = kGroup / 2, kGroupsOfLine = kBytes / kHalf;
                    uint8_t* even = codes + group / kGroupsOfLine * 2 * kBytes + group % kGroupsOfLine * kHalf;
                    const __m256i split = even_and_odd(q.codes);
                    store_half(even, _mm256_castsi256_si128(split));
                    store_half(even + kBytes, _mm256_extracti128_si256(split, 1));
                    store_half(sums + group * kSteps / 2, add_halves(sums_of_four(split, -bias<kKind>())));
                } else {
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + group * kGroup), q.codes);
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + group * kSteps),
                                        sums_of_four(q.codes, -bias<kKind>()));
                }
            }
        }
    }
}

// For many tokens lanes run along the rows of the weight. A block's tokens are dealt out to as few tiles of at most
// kTile tokens as will do. A tile's span is, for its tokens side by side,
//   codes    4 of them for each of the kSteps products of each group; for nibbles in turn 4 of even k, 4 of odd k
//   sums     int32, minus bias times the sum of the codes of each group
//   scales   fp32, one a group
constexpr int kTile = Vec::kManyTile;
constexpr int kManyCodes = kSpan * kTile;
constexpr int kManyNumbers = kLanes * kTile * 4;
constexpr int kManySpanBytes = kManyCodes + 2 * kManyNumbers;

inline int tile_tokens(int tokens) {
    const int tiles = (tokens + kTile - 1) / kTile;
    return (tokens + tiles - 1) / tiles;
}

inline int64_t many_tile_bytes(int64_t k) {
    return spans(k) * kManySpanBytes;
}

int64_t many_block_bytes(int64_t k) {
    return kTokenBlock / kTile * many_tile_bytes(k);
}

template <Kind kKind>
void many_pack_tile(const float* x, int tokens, int64_t k, uint8_t* tile) {
    for (int64_t first = 0; first < k; first += kGroup) {
        uint8_t* span = tile + first / kSpan * kManySpanBytes;
        const int group = static_cast<int>(first % kSpan / kGroup);
        int32_t* codes = reinterpret_cast<int32_t*>(span) + group * kSteps * kTile;
        int32_t* sums = reinterpret_cast<int32_t*>(span + kManyCodes) + group * kTile;
        float* scales = reinterpret_cast<float*>(span + kManyCodes + kManyNumbers) + group * kTile;
        for (int token = 0; token < tokens; ++token) {
            const XGroup q = quantise(x + token * k + first);
            scales[token] = q.scale;
            __m128i sum = add_halves(sums_of_four(q.codes, -bias<kKind>()));
            sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
            sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
            sums[token] = _mm_cvtsi128_si32(sum);

            alignas(32) int32_t steps[kSteps];
            if (is_nibbles<kKind>()) {
                const __m256i split = even_and_odd(q.codes);
                const __m128i even = _mm256_castsi256_si128(split), odd = _mm256_extracti128_si256(split, 1);
                store_half(steps, _mm_unpacklo_epi32(even, odd));
                store_half(steps + kSteps / 2, _mm_unpackhi_epi32(even, odd));
            } else {
                _mm256_store_si256(reinterpret_cast<__m256i*>(steps), q.codes);
            }
            for (int step = 0; step < kSteps; ++step) codes[step * kTile + token] = steps[step];
        }
    }
}

template <Kind kKind>
void many_pack(const float* x, int tokens, int64_t k, uint8_t* block) {
    const int each = tile_tokens(tokens);
    for (int first = 0; first < tokens; first += each, block += many_tile_bytes(k))
        many_pack_tile<kKind>(x + first * k, first + each < tokens ? each : tokens - first, k, block);
}
