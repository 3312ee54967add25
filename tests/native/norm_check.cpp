// Norms of every instruction set that this machine runs, against double precision and against one another. Prints a
// line for each; exits with 1 if one is wrong. A norm that reads or writes beyond its memory crashes.
#include <cmath>
#include <cstdio>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "half.h"
#include "guarded.h"
#include "isa.h"
#include "norm.h"

using moert::Norm;
using moert::Number;
using moert::Scale;

namespace {

constexpr float kEps = 1e-5f;
constexpr int64_t kRows = 3;

uint16_t narrow(Number number, double value) {
    const float rounded = static_cast<float>(value);
    return number == Number::kBf16 ? moert::float_to_bf16(rounded) : moert::float_to_fp16(rounded);
}

double widen(Number number, uint16_t half) {
    return number == Number::kBf16 ? moert::bf16_to_float(half) : moert::fp16_to_float(half);
}

struct Case {
    Number number;
    Scale scale;
    int64_t width;
    std::vector<uint16_t> x, weight;
    std::vector<double> expected;  // rounded no more than the kernel may
};

Case make_case(Number number, Scale scale, int64_t width) {
    std::mt19937 random(static_cast<unsigned>(width));
    std::normal_distribution<double> normal;
    Case made{number, scale, width, {}, {}, {}};
    for (int64_t i = 0; i < width; ++i) made.weight.push_back(narrow(number, normal(random)));
    for (int64_t i = 0; i < kRows * width; ++i) made.x.push_back(narrow(number, normal(random)));
    for (int64_t row = 0; row < kRows; ++row) {
        double squares = 0;
        for (int64_t i = 0; i < width; ++i) squares += std::pow(widen(number, made.x[row * width + i]), 2);
        const double factor = 1 / std::sqrt(squares / static_cast<double>(width) + kEps);
        for (int64_t i = 0; i < width; ++i) {
            const double weight = widen(number, made.weight[i]) + (scale == Scale::kOnePlus ? 1 : 0);
            made.expected.push_back(widen(number, made.x[row * width + i]) * factor * weight);
        }
    }
    return made;
}

// How many numbers are further from the exact ones than the roundings explain.
int64_t check(const Case& of, Place place, std::vector<uint16_t>* written) {
    const size_t row_bytes = static_cast<size_t>(of.width) * 2;
    GuardedCopy weight(reinterpret_cast<const uint8_t*>(of.weight.data()), row_bytes, 2, place);
    GuardedCopy x(reinterpret_cast<const uint8_t*>(of.x.data()), kRows * row_bytes, 2, place);
    Guarded y(kRows * row_bytes, 2, place);
    Norm norm;
    norm.scale = of.scale;
    norm.number = of.number;
    norm.eps = kEps;
    norm.width = of.width;
    norm.weight = weight.data();
    const int64_t stride = static_cast<int64_t>(row_bytes);
    moert::normalise_rows(norm, x.data(), stride, y.data(), stride, kRows);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(y.data());
    written->assign(halves, halves + kRows * of.width);
    const double unit = of.number == Number::kBf16 ? 0x1p-8 : 0x1p-11;
    const double smallest = of.number == Number::kBf16 ? 0x1p-133 : 0x1p-24;
    int64_t wrong = 0;
    for (size_t i = 0; i < of.expected.size(); ++i) {
        const double bound = (of.scale == Scale::kAfterRounding ? 2.01 : 1.01) * unit * std::fabs(of.expected[i]);
        wrong += !(std::fabs(widen(of.number, (*written)[i]) - of.expected[i]) <= bound + 2 * smallest);
    }
    return wrong;
}

}  // namespace

int main() {
    std::vector<Case> cases;
    for (Number number : {Number::kBf16, Number::kFp16})
        for (Scale scale : {Scale::kAfterRounding, Scale::kBeforeRounding, Scale::kOnePlus})
            for (int64_t width : {1, 2, 15, 16, 17, 31, 32, 33, 63, 255, 256, 257, 300, 2048, 2051})
                cases.push_back(make_case(number, scale, width));
    std::vector<std::vector<uint16_t>> first(cases.size());
    std::istringstream names(moert::isa_names(true));
    bool failed = false;
    for (std::string name; names >> name;) {
        moert::use_isa(name.c_str());
        int64_t wrong = 0, different = 0;
        for (size_t i = 0; i < cases.size(); ++i) {
            for (Place place : {Place::kBeforeGuard, Place::kOdd}) {
                std::vector<uint16_t> written;
                wrong += check(cases[i], place, &written);
                if (first[i].empty()) first[i] = written;
                different += first[i] != written;
            }
        }
        failed = failed || wrong > 0 || different > 0;
        std::printf("%-12s norms: %zu cases, %lld numbers wrong, %lld unlike the first instruction set's\n",
                    name.c_str(), cases.size(), static_cast<long long>(wrong), static_cast<long long>(different));
    }
    return failed ? 1 : 0;
}
