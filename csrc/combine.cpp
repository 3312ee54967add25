#include "combine.h"

#include <algorithm>

#include "pool.h"

namespace moert {
namespace {

constexpr int64_t kTaskNumbers = 1 << 14;

struct Rows {
    const float* held;
    const int64_t rows, width;
    const int64_t* to;
    const float* weights;
    float* out;

    void add(int64_t begin, int64_t end) const {
        for (int64_t row = begin; row < end; ++row) {
            const float* x = held + row * width;
            float* y = out + (to == nullptr ? row : to[row]) * width;
            const float weight = weights[row];
            for (int64_t i = 0; i < width; ++i) y[i] += weight * x[i];
        }
    }
};

class AddRows : public Work {
  public:
    explicit AddRows(const Rows& rows) : rows_(rows), task_rows_(std::max<int64_t>(1, kTaskNumbers / rows.width)) {}

    int phases() const override { return 1; }
    int64_t tasks(int) const override { return (rows_.rows + task_rows_ - 1) / task_rows_; }
    void run(int, int64_t task) override {
        rows_.add(task * task_rows_, std::min(rows_.rows, (task + 1) * task_rows_));
    }

  private:
    const Rows rows_;
    const int64_t task_rows_;
};

}  // namespace

void add_rows(const float* held, int64_t rows, int64_t width, const int64_t* to, const float* weights, float* out) {
    const Rows all{held, rows, width, to, weights, out};
    if (rows * width <= 2 * kTaskNumbers) return all.add(0, rows);
    AddRows work(all);
    run(work);
}

}  // namespace moert
