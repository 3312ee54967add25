#include "norm.h"

#include <algorithm>

#include "pool.h"

namespace moert {
namespace {

constexpr int64_t kTaskNumbers = 1 << 15;  // some microseconds

class NormWork : public Work {
  public:
    NormWork(const Norm& norm, const uint8_t* x, int64_t x_stride, uint8_t* y, int64_t y_stride, int64_t rows)
        : norm_(norm),
          x_(x),
          y_(y),
          x_stride_(x_stride),
          y_stride_(y_stride),
          rows_(rows),
          task_rows_(std::max<int64_t>(1, kTaskNumbers / norm.width)) {}

    int phases() const override { return 1; }
    int64_t tasks(int) const override { return (rows_ + task_rows_ - 1) / task_rows_; }
    void run(int, int64_t task) override {
        const Pointwise& of = pointwise();
        const int64_t end = std::min(rows_, (task + 1) * task_rows_);
        for (int64_t row = task * task_rows_; row < end; ++row)
            of.normalise(norm_, x_ + row * x_stride_, y_ + row * y_stride_);
    }

  private:
    const Norm norm_;
    const uint8_t* x_;
    uint8_t* y_;
    const int64_t x_stride_, y_stride_, rows_, task_rows_;
};

}  // namespace

bool is_shared_out(const Norm& norm, int64_t rows) {
    return rows > 1 && rows * norm.width > 2 * kTaskNumbers;
}

void normalise_rows(const Norm& norm, const uint8_t* x, int64_t x_stride, uint8_t* y, int64_t y_stride, int64_t rows) {
    if (is_shared_out(norm, rows)) {
        NormWork work(norm, x, x_stride, y, y_stride, rows);
        return run(work);
    }
    const Pointwise& of = pointwise();
    for (int64_t row = 0; row < rows; ++row) of.normalise(norm, x + row * x_stride, y + row * y_stride);
}

}  // namespace moert
