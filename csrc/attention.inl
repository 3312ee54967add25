// Attention of one query token, in the region of an instruction set after pointwise.inl and `multiply_add(a, b, c)`,
// which may round once or twice, and kHeadsTogether, the query heads whose sums the registers hold.

constexpr int64_t kLanes = 16;   // sums of a dot product, always as many, so that all instruction sets give the same
constexpr int64_t kAtOnce = 16;  // tokens whose dot products are made together
constexpr int64_t kAhead = 64;   // tokens whose keys are brought into the cache before their turn
constexpr int64_t kValues = 64;  // of a head, summed over all tokens before the next

inline int64_t in_lanes(int64_t n) {
    return (n + kLanes - 1) / kLanes * kLanes;
}

inline void widen_halves(const uint16_t* halves, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(halves[i]);
}

template <Number kNumber>
inline void widen_as(const uint8_t* from, float* to, int64_t n) {
    if (kNumber == Number::kFp32)
        __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
    else if (kNumber == Number::kFp16)
        widen_fp16(from, to, n);
    else
        widen_halves(reinterpret_cast<const uint16_t*>(from), to, n);
}

inline void bring(const uint8_t* from, int64_t nbytes) {
    for (int64_t at = 0; at < nbytes; at += 64) __builtin_prefetch(from + at, 0, 3);
}

// scores[token] = query . key of each of `n` tokens. `soon` are rows that are brought into the cache meanwhile.
template <Number kNumber>
void multiply_keys(const float* queries, int64_t count, int64_t width, const uint8_t* keys, int64_t step, int64_t n,
                   const uint8_t* soon, int64_t soon_step, int64_t soon_bytes, float* scores) {
    float key[kMostHeadWidth];
    const int64_t padded = in_lanes(width);
    for (int64_t i = width; i < padded; ++i) key[i] = 0;
    for (int64_t first = 0; first < n; first += kAtOnce) {
        const int64_t tokens = n - first < kAtOnce ? n - first : kAtOnce;
        float sums[kHeadsAtOnce][kAtOnce][kLanes];
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t at = first + token;
            if (at + kAhead < n) bring(keys + (at + kAhead) * step, width * bytes_of(kNumber));
            bring(soon + at * soon_step, soon_bytes);
            widen_as<kNumber>(keys + at * step, key, width);
            for (int64_t head = 0; head < count; ++head) {
                const float* query = queries + head * padded;
                float lanes[kLanes] = {};
                for (int64_t i = 0; i < padded; i += kLanes)
                    for (int64_t lane = 0; lane < kLanes; ++lane)
                        lanes[lane] = multiply_add(query[i + lane], key[i + lane], lanes[lane]);
                for (int64_t lane = 0; lane < kLanes; ++lane) sums[head][token][lane] = lanes[lane];
            }
        }
        for (int64_t head = 0; head < count; ++head) {
            for (int64_t token = 0; token < tokens; ++token) {
                float* lanes = sums[head][token];
                for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += lanes[lane + 8];
                for (int64_t lane = 0; lane < 4; ++lane) lanes[lane] += lanes[lane + 4];
                scores[head * kChunkTokens + first + token] = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
            }
        }
    }
}

void mask_scores(const Attention& of, const uint8_t* mask, int64_t n, float* scores) {
    for (int64_t token = 0; token < n; ++token, mask += of.mask.token_step) {
        if (of.mask_kind == Mask::kChosen) {
            if (*mask == 0) scores[token] = -__builtin_inff();
        } else {
            float added;
            widen(of.number, mask, &added, 1);
            scores[token] += added;
        }
    }
}

// Turns scores into weights; a share to which no token counts has a sum of 0.
void weigh(float* scores, int64_t n, float* share) {
    float highest = -__builtin_inff();
    for (int64_t i = 0; i < n; ++i) highest = scores[i] > highest ? scores[i] : highest;
    const float base = highest == -__builtin_inff() ? 0.0f : highest;
    for (int64_t i = 0; i < n; ++i) scores[i] = exponential(scores[i] - base);
    float sums[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) sums[i % kLanes] += scores[i];
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    share[0] = highest;
    share[1] = sums[0];
}

// Of kHeads heads, `size` <= kValues numbers of each.
template <Number kNumber, int64_t kHeads>
void add_block(const float* weights, const uint8_t* values, int64_t step, int64_t n, int64_t size, float* to,
               int64_t to_step) {
    float sums[kHeads][kValues] = {}, value[kValues] = {};
    const auto add_token = [&](int64_t token) {
        for (int64_t head = 0; head < kHeads; ++head) {
            const float weight = weights[head * kChunkTokens + token];
            for (int64_t i = 0; i < kValues; ++i) sums[head][i] = multiply_add(weight, value[i], sums[head][i]);
        }
    };
    if (size == kValues) {
        for (int64_t token = 0; token < n; ++token) {
            widen_as<kNumber>(values + token * step, value, kValues);
            add_token(token);
        }
    } else {
        for (int64_t token = 0; token < n; ++token) {
            widen_as<kNumber>(values + token * step, value, size);
            add_token(token);
        }
    }
    for (int64_t head = 0; head < kHeads; ++head)
        for (int64_t i = 0; i < size; ++i) to[head * to_step + i] = sums[head][i];
}

template <Number kNumber>
void add_values(const float* weights, int64_t count, const uint8_t* values, int64_t step, int64_t n, int64_t width,
                float* shares) {
    const int64_t share = kShareHead + width;
    for (int64_t begin = 0; begin < width; begin += kValues) {
        const int64_t size = width - begin < kValues ? width - begin : kValues;
        const uint8_t* at = values + begin * bytes_of(kNumber);
        int64_t head = 0;
        for (; head + kHeadsTogether <= count; head += kHeadsTogether)
            add_block<kNumber, kHeadsTogether>(weights + head * kChunkTokens, at, step, n, size,
                                               shares + head * share + kShareHead + begin, share);
        for (; head < count; ++head)
            add_block<kNumber, 1>(weights + head * kChunkTokens, at, step, n, size,
                                  shares + head * share + kShareHead + begin, share);
    }
}

template <Number kNumber>
void attend_as(const Attention& of, int64_t batch, int64_t head, int64_t count, int64_t begin, int64_t n,
               float* shares) {
    float queries[kHeadsAtOnce * kMostHeadWidth], scores[kHeadsAtOnce * kChunkTokens];
    const int64_t padded = in_lanes(of.width), kv_head = head / (of.heads / of.kv_heads);
    for (int64_t i = 0; i < count; ++i) {
        float* query = queries + i * padded;
        widen_as<kNumber>(of.q.data + batch * of.q.batch_step + (head + i) * of.q.head_step, query, of.width);
        for (int64_t at = 0; at < of.width; ++at) query[at] *= of.scale;
        for (int64_t at = of.width; at < padded; ++at) query[at] = 0;
    }
    const uint8_t* keys = of.k.data + batch * of.k.batch_step + kv_head * of.k.head_step + begin * of.k.token_step;
    const uint8_t* values = of.v.data + batch * of.v.batch_step + kv_head * of.v.head_step + begin * of.v.token_step;
    multiply_keys<kNumber>(queries, count, of.width, keys, of.k.token_step, n, values, of.v.token_step,
                           of.value_width * bytes_of(kNumber), scores);
    for (int64_t i = 0; i < count; ++i) {
        if (of.mask_kind != Mask::kNone)
            mask_scores(
                of,
                of.mask.data + batch * of.mask.batch_step + (head + i) * of.mask.head_step + begin * of.mask.token_step,
                n, scores + i * kChunkTokens);
        weigh(scores + i * kChunkTokens, n, shares + i * (kShareHead + of.value_width));
    }
    add_values<kNumber>(scores, count, values, of.v.token_step, n, of.value_width, shares);
}

void attend(const Attention& of, int64_t batch, int64_t head, int64_t count, int64_t begin, int64_t n, float* shares) {
    switch (of.number) {
        case Number::kFp32:
            return attend_as<Number::kFp32>(of, batch, head, count, begin, n, shares);
        case Number::kBf16:
            return attend_as<Number::kBf16>(of, batch, head, count, begin, n, shares);
        case Number::kFp16:
            return attend_as<Number::kFp16>(of, batch, head, count, begin, n, shares);
    }
}

void merge(const Attention& of, const float* shares, int64_t count, int64_t step, uint8_t* y) {
    float highest = -__builtin_inff(), sum = 0, values[kMostHeadWidth] = {};
    for (int64_t i = 0; i < count; ++i) highest = shares[i * step] > highest ? shares[i * step] : highest;
    for (int64_t i = 0; i < count; ++i) {
        const float* share = shares + i * step;
        if (share[1] == 0) continue;
        const float factor = share[0] == highest ? 1.0f : exponential(share[0] - highest);
        sum += share[1] * factor;
        add_weighted(values, share + kShareHead, factor, of.value_width);
    }
    if (sum != 0)
        for (int64_t i = 0; i < of.value_width; ++i) values[i] /= sum;
    narrow(values, of.number, y, of.value_width);
}
