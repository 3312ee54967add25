// Products of int8 weights and int8 x. To be included, within a target region and a namespace of its own, after
//   product(Codes w, Codes x)   four sums whose sum is the product of a group

// Up to four rows; where there are fewer, the last is computed again in place of the others.
template <Kind kKind, int kTokens>
inline void int8_block(const Matrix& w, int64_t first, int rows, const uint8_t* packed, float* y, int64_t y_stride) {
    constexpr int64_t kGroupBytes = kKind == Kind::kInt8 ? 32 : 16;
    constexpr int64_t kScaleBytes = kKind == Kind::kMxfp4 ? 1 : 2;
    const int64_t groups = w.k / kGroup, scales = w.k / w.group, groups_of_scale = w.group / kGroup;
    const uint8_t *codes[kRowBlock], *row_scales[kRowBlock], *row_zeros[kRowBlock];
    for (int row = 0; row < kRowBlock; ++row) {
        const int64_t there = first + (row < rows ? row : rows - 1);
        codes[row] = w.data + there * groups * kGroupBytes;
        row_scales[row] = w.scales + there * scales * kScaleBytes;
        row_zeros[row] = w.zeros == nullptr ? nullptr : w.zeros + there * scales;
    }
    float32x4_t sums[kTokens];
    for (int token = 0; token < kTokens; ++token) sums[token] = vdupq_n_f32(0);
    for (int64_t scale = 0; scale < scales; ++scale) {
        const float32x4_t w_scales = load_scales<kKind>(row_scales, scale);
        int32x4_t zeros = vdupq_n_s32(8);
        if (kKind == Kind::kInt4 && w.zeros != nullptr) zeros = load_zeros(row_zeros, scale);
        for (int64_t group = scale * groups_of_scale; group < (scale + 1) * groups_of_scale; ++group) {
            Codes row_codes[kRowBlock];
            for (int row = 0; row < kRowBlock; ++row) {
                const uint8_t* at = codes[row] + group * kGroupBytes;
                __builtin_prefetch(at + kPrefetchBytes);
                row_codes[row] = load_codes<kKind>(at);
            }
            for (int token = 0; token < kTokens; ++token) {
                const PackedGroup& x = reinterpret_cast<const PackedGroup*>(packed + token * token_bytes(w.k))[group];
                const Codes x_codes = {vld1q_s8(x.codes), vld1q_s8(x.codes + 16)};
                int32x4_t products =
                    vpaddq_s32(vpaddq_s32(product(row_codes[0], x_codes), product(row_codes[1], x_codes)),
                               vpaddq_s32(product(row_codes[2], x_codes), product(row_codes[3], x_codes)));
                if (kKind == Kind::kInt4) products = vmlsq_n_s32(products, zeros, x.sum);
                sums[token] = vfmaq_f32(sums[token], vcvtq_f32_s32(products), vmulq_n_f32(w_scales, x.scale));
            }
        }
    }
    for (int token = 0; token < kTokens; ++token) {
        const float32x4_t sum = kKind == Kind::kMxfp4 ? vmulq_n_f32(sums[token], 0.5f) : sums[token];
        store_rows(y + token * y_stride, sum, rows);
    }
}

template <Kind kKind>
struct Int8Product {
    static int64_t x_bytes(int64_t k) { return token_bytes(k); }

    template <int kTokens>
    static void block(const Matrix& w, int64_t first, int rows, const uint8_t* packed, float* y, int64_t y_stride) {
        int8_block<kKind, kTokens>(w, first, rows, packed, y, y_stride);
    }
};
