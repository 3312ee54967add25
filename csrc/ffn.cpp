#include "ffn.h"

#include <algorithm>

#include "isa.h"
#include "packed.h"
#include "scratch.h"
#include "split.h"

namespace moert {
namespace {

constexpr int64_t kTokensAtOnce = 256;  // tokens whose products one thread holds
constexpr int64_t kMostTokens = 4096;   // of a part
// Bytes of weights below which waking another thread costs more than it saves.
constexpr int64_t kWorthSharing = 192 << 10;

constexpr int64_t kScratchBytes = int64_t{48} << 20;  // of a batch, unless one part alone needs more

// Rows of a task with that many tokens at once, so that their products stay in the second cache.
int64_t most_rows(int64_t tokens) {
    return std::clamp<int64_t>((int64_t{1} << 15) / tokens / 32 * 32, 128, kMostRows);
}

// Asks for the beginning of the rows from `row` on, which will be read soon: a kernel looks ahead within the rows that
// it is given, and each leap to others would wait for memory anew.
void announce(const Matrix& w, int64_t row) {
    if (w.transposed || row >= w.n) return;
    const auto fetch = [](const uint8_t* from, int64_t nbytes) {
        for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    };
    fetch(w.data + row * (weight_bytes(w) / w.n), 1024);
    if (w.group != 0 && w.format != Format::kFp8)
        fetch(w.scales + row * (w.k / w.group) * (w.format == Format::kMxfp4 ? 1 : 2), 128);
}

// Some tokens of a group, and where its packed x, h and packed h are in the scratch memory.
struct Part {
    const Group* group;
    int64_t first, tokens;
    const Kernel *up, *down;
    int64_t x_at = 0, h_at = 0, packed_at = 0;
    int64_t first_block = 0;  // among the blocks of its batch
    bool shares_x = false;    // its x is packed by an earlier part

    const int64_t* rows() const { return group->rows == nullptr ? nullptr : group->rows + first; }
    int64_t row(int64_t token) const { return group->rows == nullptr ? first + token : group->rows[first + token]; }
    int64_t out_row(int64_t token) const { return group->out_row < 0 ? row(token) : group->out_row + first + token; }
    float weight(int64_t token) const { return group->weights == nullptr ? 1.0f : group->weights[first + token]; }
};

// Parts that are computed together, in four phases: pack x, up and gate, pack h, down and sum.
struct Batch {
    std::vector<Part> parts;
    int64_t blocks = 0, nbytes = 0;
    std::vector<Rows> up, down;  // tasks
    bool is_packed = false;      // x is, already
};

class Ffn final : public Work {
  public:
    explicit Ffn(Step step) : step_(std::move(step)) {
        for (const Group& group : step_.groups)
            for (int64_t first = 0; first < group.tokens; first += kMostTokens)
                add(group, first, std::min(kMostTokens, group.tokens - first));
        int64_t most = 0;
        for (Batch& batch : batches_) {
            most = std::max(most, batch.nbytes);
            int64_t tokens = 1;
            for (const Part& part : batch.parts) tokens = std::max(tokens, std::min(part.tokens, kTokensAtOnce));
            const int64_t rows = most_rows(tokens);
            batch.up = share_out(static_cast<int64_t>(batch.parts.size()), step_.width, rows, threads());
            batch.down = share_out(1, step_.hidden, rows, threads());
        }
        scratch_ = std::make_unique<Scratch>(static_cast<size_t>(most));
        // A single token's x is packed sooner than another thread is told to.
        for (Batch& batch : batches_) {
            const auto packs = [](const Part& part) { return !part.shares_x; };
            if (std::count_if(batch.parts.begin(), batch.parts.end(), packs) > 1 || batch.parts[0].tokens > 1) continue;
            pack(batch, 0, false);
            batch.is_packed = true;
        }
    }

    int phases() const override { return static_cast<int>(batches_.size()) * 4; }

    int64_t tasks(int phase) const override {
        const Batch& batch = batches_[static_cast<size_t>(phase / 4)];
        switch (phase % 4) {
            case 1:
                return static_cast<int64_t>(batch.up.size());
            case 3:
                return static_cast<int64_t>(batch.down.size());
            case 0:
                return batch.is_packed ? 0 : batch.blocks;
            default:
                return batch.blocks;
        }
    }

    void run(int phase, int64_t task) override {
        const Batch& batch = batches_[static_cast<size_t>(phase / 4)];
        switch (phase % 4) {
            case 0:
                return pack(batch, task, false);
            case 1: {
                const Rows& rows = batch.up[static_cast<size_t>(task)];
                return up(batch.parts[static_cast<size_t>(rows.part)], rows.begin, rows.count);
            }
            case 2:
                return pack(batch, task, true);
            default:
                return down(batch, batch.down[static_cast<size_t>(task)]);
        }
    }

  private:
    void add(const Group& group, int64_t first, int64_t tokens) {
        Part part{&group, first, tokens, &find_kernel(group.expert.up, tokens),
                  &find_kernel(group.expert.down, tokens)};
        const int64_t x_bytes = blocks_of(tokens) * part.up->block_bytes(step_.hidden);
        const int64_t h_bytes = (tokens * step_.width * 4 + 63) / 64 * 64;
        const int64_t packed_bytes = blocks_of(tokens) * part.down->block_bytes(step_.width);
        const int64_t nbytes = x_bytes + h_bytes + packed_bytes;
        if (batches_.empty() || batches_.back().nbytes + nbytes > kScratchBytes) batches_.emplace_back();
        Batch& batch = batches_.back();
        part.first_block = batch.blocks;
        batch.blocks += blocks_of(tokens);
        // Experts of a single token mostly have the same one.
        if (!batch.parts.empty() && tokens == 1) {
            const Part& before = batch.parts.back();
            if (before.tokens == 1 && before.row(0) == part.row(0) && before.up == part.up) {
                part.shares_x = true;
                part.x_at = before.x_at;
            }
        }
        if (!part.shares_x) {
            part.x_at = batch.nbytes;
            batch.nbytes += x_bytes;
        }
        part.h_at = batch.nbytes;
        part.packed_at = part.h_at + h_bytes;
        batch.nbytes = part.packed_at + packed_bytes;
        batch.parts.push_back(part);
    }

    uint8_t* at(int64_t offset) const { return scratch_->data() + offset; }
    float* h_of(const Part& part) const { return reinterpret_cast<float*>(at(part.h_at)); }

    void pack(const Batch& batch, int64_t task, bool is_h) {
        const auto after = std::upper_bound(batch.parts.begin(), batch.parts.end(), task,
                                            [](int64_t block, const Part& part) { return block < part.first_block; });
        const Part& part = *(after - 1);
        const int64_t block = task - part.first_block;
        if (is_h)
            pack_block(*part.down, Number::kFp32, at(part.h_at), nullptr, part.tokens, step_.width, block,
                       at(part.packed_at));
        else if (!part.shares_x)
            pack_block(*part.up, step_.number,
                       step_.x + (part.rows() == nullptr ? part.first * step_.hidden * bytes_of(step_.number) : 0),
                       part.rows(), part.tokens, step_.hidden, block, at(part.x_at));
    }

    // Tokens per pass over a tile of `rows` rows; whole blocks, as packed x is found by the block.
    template <class Body>
    static void for_token_chunks(int64_t tokens, const Body& body) {
        for (int64_t token = 0; token < tokens; token += kTokensAtOnce)
            body(token, std::min(kTokensAtOnce, tokens - token));
    }

    void up(const Part& part, int64_t begin, int64_t count) {
        const int64_t width = step_.width;
        const Gate& gate = step_.gate;
        const Matrix& w = part.group->expert.up;
        const uint8_t* bias = part.group->expert.up_bias;
        const Pointwise& each = pointwise();
        const int64_t stride = 2 * count;
        float biases[2 * kMostRows];
        const auto load_bias = [&](int64_t from, int64_t n, float* to) {
            each.widen(step_.number, bias + from * bytes_of(step_.number), to, n);
        };
        const bool split = gate.gated && !gate.interleaved;
        if (bias != nullptr) {
            load_bias(gate.interleaved ? 2 * begin : begin, gate.interleaved ? 2 * count : count, biases);
            if (split) load_bias(width + begin, count, biases + count);
        }
        for_token_chunks(part.tokens, [&](int64_t token, int64_t tokens) {
            const uint8_t* x = at(part.x_at) + token / kTokenBlock * part.up->block_bytes(step_.hidden);
            float* y = thread_floats(static_cast<size_t>(tokens * stride));
            if (gate.interleaved) {
                part.up->rows(w, 2 * begin, 2 * (begin + count), x, tokens, y, stride);
            } else {
                if (split) announce(w, width + begin);
                part.up->rows(w, begin, begin + count, x, tokens, y, stride);
                if (split) part.up->rows(w, width + begin, width + begin + count, x, tokens, y + count, stride);
            }
            for (int64_t i = 0; i < tokens; ++i, y += stride) {
                if (bias != nullptr) {
                    each.add(y, biases, gate.interleaved ? 2 * count : count);
                    if (split) each.add(y + count, biases + count, count);
                }
                float* h = h_of(part) + (token + i) * width + begin;
                each.gate(gate, y, gate.interleaved ? y + 1 : y + count, gate.interleaved ? 2 : 1, h, count);
                each.round(h, step_.number, count);
            }
        });
    }

    void down(const Batch& batch, const Rows& rows) {
        const int64_t begin = rows.begin, count = rows.count;
        const Pointwise& each = pointwise();
        for (size_t i = 0; i < batch.parts.size(); ++i) {
            const Part& part = batch.parts[i];
            if (i + 1 < batch.parts.size()) announce(batch.parts[i + 1].group->expert.down, begin);
            const uint8_t* bias = part.group->expert.down_bias;
            float biases[kMostRows];
            if (bias != nullptr) each.widen(step_.number, bias + begin * bytes_of(step_.number), biases, count);
            for_token_chunks(part.tokens, [&](int64_t token, int64_t tokens) {
                const uint8_t* h = at(part.packed_at) + token / kTokenBlock * part.down->block_bytes(step_.width);
                float* y = thread_floats(static_cast<size_t>(tokens * count));
                part.down->rows(part.group->expert.down, begin, begin + count, h, tokens, y, count);
                for (int64_t i = 0; i < tokens; ++i, y += count) {
                    if (bias != nullptr) each.add(y, biases, count);
                    each.add_weighted(step_.out + part.out_row(token + i) * step_.hidden + begin, y,
                                      part.weight(token + i), count);
                }
            });
        }
    }

    const Step step_;
    std::vector<Batch> batches_;
    std::unique_ptr<Scratch> scratch_;
};

class Linear final : public Work {
  public:
    explicit Linear(const Product& product)
        : product_(product),
          kernel_(find_kernel(product.w, product.tokens)),
          scratch_(static_cast<size_t>(blocks_of(product.tokens) * kernel_.block_bytes(product.w.k))) {
        if (product.tokens == 1) run(0, 0);  // sooner done than another thread is told to
    }

    int phases() const override { return 2; }

    int64_t tasks(int phase) const override {
        return phase == 0 ? (product_.tokens == 1 ? 0 : blocks_of(product_.tokens))
                          : static_cast<int64_t>(tasks_.size());
    }

    void run(int phase, int64_t task) override {
        const Matrix& w = product_.w;
        if (phase == 0)
            return pack_block(kernel_, product_.number, product_.x, nullptr, product_.tokens, w.k, task,
                              scratch_.data());
        const auto [part, begin, count] = tasks_[static_cast<size_t>(task)];
        const int64_t size = bytes_of(product_.number);
        const Pointwise& each = pointwise();
        float biases[kMostRows];
        if (product_.bias != nullptr) each.widen(product_.number, product_.bias + begin * size, biases, count);
        for (int64_t token = 0; token < product_.tokens; token += kTokensAtOnce) {
            const int64_t tokens = std::min(kTokensAtOnce, product_.tokens - token);
            float* y = thread_floats(static_cast<size_t>(tokens * count));
            kernel_.rows(w, begin, begin + count, scratch_.data() + token / kTokenBlock * kernel_.block_bytes(w.k),
                         tokens, y, count);
            for (int64_t i = 0; i < tokens; ++i, y += count) {
                if (product_.bias != nullptr) each.add(y, biases, count);
                each.narrow(y, product_.number, product_.y + ((token + i) * w.n + begin) * size, count);
            }
        }
    }

  private:
    const Product product_;
    const Kernel& kernel_;
    const std::vector<Rows> tasks_ =
        share_out(1, product_.w.n, most_rows(std::min(product_.tokens, kTokensAtOnce)), threads());
    const Scratch scratch_;
};

}  // namespace

std::unique_ptr<Work> make_ffn(Step step) {
    return std::make_unique<Ffn>(std::move(step));
}

std::unique_ptr<Work> make_linear(const Product& product) {
    return std::make_unique<Linear>(product);
}

int64_t weight_bytes(const Matrix& w) {
    const int64_t numbers = w.n * w.k;
    switch (w.format) {
        case Format::kFp32:
            return numbers * 4;
        case Format::kBf16:
        case Format::kFp16:
            return numbers * 2;
        case Format::kInt4:
        case Format::kMxfp4:
            return numbers / 2;
        default:
            return numbers;
    }
}

void run_reading(int64_t nbytes, Work& work) {
    if (nbytes >= kWorthSharing)
        run(work);
    else
        run_alone(work);
}

}  // namespace moert
