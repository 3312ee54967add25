// Every kernel of every instruction set that this machine runs, against the
// meaning of the formats worked out in double. Prints a line for each
// instruction set and format; exits with 1 if a kernel is wrong. A kernel that
// reads or writes beyond its memory crashes.
#include <algorithm>
#include <cinttypes>
#include <map>
#include <set>
#include <sstream>
#include <thread>
#include <tuple>

#include "cases.h"
#include "cpu.h"
#include "guarded.h"
#include "isa.h"
#include "kernel.h"

using moert::Kernel;
using moert::kTokenBlock;

namespace {

constexpr double kUnit = 0x1p-24;  // the relative error of a rounding to fp32

// What a kernel makes of x before it multiplies.
enum class Rounding { kNone, kBf16, kInt8, kBf16Both };

Rounding rounding_of(const Kernel& kernel, const Variant& variant) {
    const std::string name = kernel.name;
    // Decoded to bf16, some rows at a time.
    if (variant.group != 0 && name.rfind("amx ", 0) == 0) return Rounding::kBf16Both;
    if (variant.is_quantised()) return Rounding::kInt8;
    // Dot products of bf16 pairs: those kernels say that packing rounds x.
    const bool pairs = name.rfind("avx512_bf16 ", 0) == 0 || name.rfind("amx ", 0) == 0;
    return variant.format == Format::kBf16 && pairs ? Rounding::kBf16 : Rounding::kNone;
}

double round_to_bf16(float value) {
    if (!std::isfinite(value)) return value;
    uint32_t bits = float_bits(value);
    bits += 0x7fff + ((bits >> 16) & 1);
    return decode(bits >> 16, 8, 7, true);
}

// A token's x as the kernel is to see it. `lost` takes the size of what it may
// take for zero.
std::vector<double> seen(const float* x, int64_t k, Rounding rounding, std::vector<double>* lost) {
    std::vector<double> result(x, x + k);
    lost->assign(static_cast<size_t>(k), 0);
    if (rounding == Rounding::kBf16 || rounding == Rounding::kBf16Both)
        for (int64_t i = 0; i < k; ++i) result[i] = round_to_bf16(x[i]);
    if (rounding != Rounding::kInt8) return result;
    for (int64_t first = 0; first < k; first += 32) {
        float amax = 0;
        bool nan = false;
        for (int64_t i = first; i < first + 32; ++i) {
            nan = nan || std::isnan(x[i]);
            amax = std::max(amax, std::fabs(x[i]));
        }
        for (int64_t i = first; i < first + 32; ++i) {
            if (nan || std::isinf(amax)) {
                result[i] = nan ? kNan : kInf;
            } else if (amax < 0x1p-119f) {
                (*lost)[i] = amax;
            } else {
                const float scale = amax / 127.0f, factor = 127.0f / amax;
                const float code = x[i] * factor;
                result[i] = std::nearbyint(code) * static_cast<double>(scale);
            }
        }
    }
    return result;
}

struct Expected {
    double value = 0, bound = 0;
    bool must_be_nan = false;
};

// [tokens, n]
std::vector<Expected> expect(const Case& which, Rounding rounding) {
    const Weight& weight = *which.weight;
    const int64_t n = weight.n, k = weight.k, tokens = static_cast<int64_t>(which.x.size()) / k;
    // Roundings on the way of one product into the sum: its own, those of the
    // additions, those of the scales.
    const double roundings = rounding == Rounding::kInt8 ? k / 32 + 16 : k + k / 128 + 5;
    std::vector<double> numbers;
    for (int64_t row = 0; row < n; ++row)
        for (int64_t i = 0; i < k; ++i) {
            const double number = weight.number(row, i);
            numbers.push_back(rounding == Rounding::kBf16Both ? round_to_bf16(static_cast<float>(number)) : number);
        }
    // What a product may lose to underflow; kernels may read fp8 as fp16, which
    // makes it smaller by 2^-8.
    const double least = weight.variant.format == Format::kFp8 ? 0x1p-140 : 0x1p-149;
    std::vector<Expected> expected;
    for (int64_t token = 0; token < tokens; ++token) {
        std::vector<double> lost;
        const std::vector<double> x = seen(&which.x[token * k], k, rounding, &lost);
        for (int64_t row = 0; row < n; ++row) {
            Expected one;
            double size = 0, absolute = static_cast<double>(k) * least;
            for (int64_t i = 0; i < k; ++i) {
                const double w = numbers[row * k + i];
                one.value += w * x[i];
                one.must_be_nan = one.must_be_nan || std::isnan(w) || std::isnan(x[i]);
                size += std::fabs(w * x[i]);
                absolute += std::fabs(w) * lost[i];
                // Products of bf16 pairs take subnormal numbers for zero.
                if (rounding == Rounding::kBf16 || rounding == Rounding::kBf16Both)
                    absolute += 0x1p-126 * (1 + std::fabs(w) + std::fabs(x[i]));
            }
            one.bound = size * roundings * kUnit / (1 - roundings * kUnit) + absolute;
            expected.push_back(one);
        }
    }
    return expected;
}

struct Report {
    int cases = 0, failures = 0;
    double worst = 0;

    void fail(const Case& which, int tokens, const Kernel& kernel, const std::string& why) {
        if (++failures > 5) return;
        std::printf("  WRONG: %s, %s: %s, n %" PRId64 ", k %" PRId64 ", %d tokens: %s\n", kernel.name,
                    which.weight->variant.name().c_str(), which.what.c_str(), which.weight->n, which.weight->k, tokens,
                    why.c_str());
    }
};

constexpr uint32_t kUnwritten = 0x7fa5c3e1;  // a NaN that no arithmetic gives

bool same(float a, float b) {
    return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b));
}

// The weight in memory at one place, and products with it.
class Placed {
  public:
    Placed(const Weight& weight, Place place)
        : place_(place),
          data_(copy(weight.data_bytes(), weight.variant.element_bytes(), place)),
          scales_(copy(weight.scale_bytes(), weight.variant.scale_bytes(), place)),
          zeros_(copy(weight.zero_bytes(), 1, place)) {
        matrix_.format = weight.variant.format;
        matrix_.transposed = weight.variant.transposed;
        matrix_.group = weight.variant.group;
        matrix_.n = weight.n;
        matrix_.k = weight.k;
        matrix_.data = data_->data();
        matrix_.scales = scales_->data();
        matrix_.zeros = zeros_->data();
    }
    const Matrix& matrix() const { return matrix_; }

    // y [tokens, n]; `cut` rows are computed by one thread and the rest by
    // another, or all by this one if it is 0. Says in `wrong` what was written
    // that should not have been, or was not.
    std::vector<float> product(const Kernel& kernel, const float* x, int tokens, int64_t cut,
                               std::string* wrong) const {
        const int64_t n = matrix_.n, k = matrix_.k, block_bytes = kernel.block_bytes(k);
        const int64_t blocks = (tokens + kTokenBlock - 1) / kTokenBlock;
        if (block_bytes % 64 != 0) *wrong = "block_bytes is no multiple of 64";
        Guarded packed(static_cast<size_t>(blocks * block_bytes), 64, place_);
        std::memset(packed.data(), 0xff, static_cast<size_t>(blocks * block_bytes));
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * kTokenBlock;
            const int count = static_cast<int>(std::min<int64_t>(kTokenBlock, tokens - first));
            const GuardedCopy part(reinterpret_cast<const uint8_t*>(x + first * k),
                                   static_cast<size_t>(count * k) * sizeof(float), sizeof(float), place_);
            kernel.pack(reinterpret_cast<const float*>(part.data()), count, k, packed.data() + block * block_bytes);
        }
        const int64_t border = place_ == Place::kOdd ? 3 : 0, stride = n + border;
        Guarded y(static_cast<size_t>(tokens * stride) * sizeof(float), sizeof(float), place_);
        uint32_t* bits = reinterpret_cast<uint32_t*>(y.data());
        std::fill(bits, bits + tokens * stride, kUnwritten);
        if (cut == 0) {
            kernel.rows(matrix_, 0, n, packed.data(), tokens, y.floats(), stride);
        } else {
            std::thread other([&] { kernel.rows(matrix_, 0, cut, packed.data(), tokens, y.floats(), stride); });
            kernel.rows(matrix_, cut, n, packed.data(), tokens, y.floats() + cut, stride);
            other.join();
        }
        std::vector<float> result;
        for (int64_t token = 0; token < tokens; ++token) {
            for (int64_t row = 0; row < stride; ++row) {
                const bool unwritten = bits[token * stride + row] == kUnwritten;
                if (unwritten != (row >= n)) *wrong = unwritten ? "y is not written" : "written beyond y";
                if (row < n) result.push_back(y.floats()[token * stride + row]);
            }
        }
        return result;
    }

  private:
    static std::unique_ptr<GuardedCopy> copy(const std::vector<uint8_t>& bytes, size_t element, Place place) {
        return std::make_unique<GuardedCopy>(bytes.data(), bytes.size(), element, place);
    }

    Place place_;
    std::unique_ptr<GuardedCopy> data_, scales_, zeros_;
    Matrix matrix_;
};

void compare(const Case& which, int tokens, const Kernel& kernel, const std::vector<Expected>& expected,
             const std::vector<float>& y, Report* report) {
    for (size_t i = 0; i < y.size(); ++i) {
        const Expected& want = expected[i];
        bool right;
        if (want.must_be_nan) {
            right = std::isnan(y[i]);
        } else if (!std::isfinite(want.value)) {
            right = which.weight->variant.is_quantised() && std::string(kernel.name).rfind("amx ", 0) != 0
                        ? !std::isfinite(y[i])
                        : same(y[i], static_cast<float>(want.value));
        } else {
            const double error = std::fabs(y[i] - want.value);
            right = error <= want.bound;
            if (right && want.bound > 0) report->worst = std::max(report->worst, error / want.bound);
        }
        if (right) continue;
        std::ostringstream why;
        why << "token " << i / static_cast<size_t>(which.weight->n) << ", row "
            << i % static_cast<size_t>(which.weight->n) << " is " << y[i] << ", not " << want.value << " +- "
            << want.bound;
        return report->fail(which, tokens, kernel, why.str());
    }
}

void check(const Case& which, int tokens, const Kernel& kernel, const Placed& before_guard, const Placed& odd,
           const std::vector<Expected>& expected, Report* report) {
    ++report->cases;
    const Weight& weight = *which.weight;
    std::string wrong;
    const std::vector<float> y = before_guard.product(kernel, which.x.data(), tokens, 0, &wrong);
    compare(which, tokens, kernel, expected, y, report);

    const bool other_way = !moert::reads_one_stream();
    moert::use_one_stream(&other_way);
    const std::vector<float> read_otherwise = before_guard.product(kernel, which.x.data(), tokens, 0, &wrong);
    moert::use_one_stream(nullptr);
    if (!std::equal(y.begin(), y.end(), read_otherwise.begin(), same))
        wrong = "other bits with the rows read otherwise";

    const int64_t cut = weight.n * (tokens % 5 + 1) / 7;
    const std::vector<float> elsewhere = odd.product(kernel, which.x.data(), tokens, cut, &wrong);
    if (!std::equal(y.begin(), y.end(), elsewhere.begin(), same))
        wrong = "other bits at another address, or with the rows in two parts";

    std::vector<float> reversed;
    for (int64_t token = tokens - 1; token >= 0; --token)
        reversed.insert(reversed.end(), &which.x[token * weight.k], &which.x[token * weight.k] + weight.k);
    const std::vector<float> backwards = odd.product(kernel, reversed.data(), tokens, 0, &wrong);
    for (int64_t token = 0; token < tokens; ++token)
        if (!std::equal(&y[token * weight.n], &y[token * weight.n] + weight.n,
                        &backwards[(tokens - 1 - token) * weight.n], same))
            wrong = "other bits with the tokens in another order";
    if (!wrong.empty()) report->fail(which, tokens, kernel, wrong);
}

}  // namespace

int main() {
    std::vector<std::string> isas;
    std::istringstream names(moert::isa_names(true));
    for (std::string name; names >> name;) isas.push_back(name);

    std::map<std::pair<std::string, size_t>, Report> reports;
    const std::vector<Variant> variants = all_variants();
    for (size_t variant = 0; variant < variants.size(); ++variant) {
        for (const Case& which : all_cases(variants[variant])) {
            const Placed before_guard(*which.weight, Place::kBeforeGuard), odd(*which.weight, Place::kOdd);
            std::map<Rounding, std::vector<Expected>> expected;
            // A level without a kernel of its own takes the next one's, which then
            // needs no second look.
            std::set<std::pair<const Kernel*, int>> seen_kernels;
            for (const std::string& isa : isas) {
                if (!moert::use_isa(isa.c_str()) || isa != moert::isa()) {
                    std::printf("%s is said to be usable, and is not\n", isa.c_str());
                    return 1;
                }
                for (int tokens : which.tokens) {
                    const Kernel& kernel = moert::find_kernel(before_guard.matrix(), tokens);
                    if (!seen_kernels.insert({&kernel, tokens}).second) continue;
                    const Rounding rounding = rounding_of(kernel, variants[variant]);
                    std::vector<Expected>& wanted = expected[rounding];
                    if (wanted.empty()) wanted = expect(which, rounding);
                    const std::string name = kernel.name;
                    Report& report = reports[{name.substr(0, name.find(' ')), variant}];
                    check(which, tokens, kernel, before_guard, odd, wanted, &report);
                }
            }
        }
    }
    bool failed = false;
    for (const auto& [key, report] : reports) {
        failed = failed || report.failures > 0;
        std::printf("%-12s %-20s %5d cases, worst error %.3f of the bound, %d wrong\n", key.first.c_str(),
                    variants[key.second].name().c_str(), report.cases, report.worst, report.failures);
    }
    return failed ? 1 : 0;
}
