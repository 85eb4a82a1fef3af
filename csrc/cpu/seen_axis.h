// The matrices that interpolate between a pyramid's cells, seen through the taps of a convolution.
#pragma once

#include "cpu_kernel.h"

namespace pspnet_fast::cpu {

// All matrices S_u A of one axis, side by side: a column is a cell of a level seen through a tap, a row a position.
// A row has at most two non-zeros a level and tap, a column one short run of them: both views are kept.
template <class acc_t>
struct SeenAxis {
  struct Column {
    int level, tap, cell;
    int64_t begin, end;      // where it is non-zero
    Scratch<acc_t> weights;  // there
  };
  struct Term {
    int column;
    acc_t weight;
  };
  Scratch<Column> columns;
  Scratch<Scratch<Term>> rows;
  int first[kMaxLevels];  // the column of (level, tap, cell) is first[level] + tap * bins + cell

  SeenAxis(const Levels& levels, const int* bins, int64_t size, int taps, int dilation, Interpolation interpolation)
      : rows(size) {
    for (int l = 0; l < levels.count; ++l) {
      first[l] = static_cast<int>(columns.size());
      const acc_t scale = source_scale<acc_t>(bins[l], size, interpolation);
      for (int tap = 0; tap < taps; ++tap) {
        const int base = static_cast<int>(columns.size());
        for (int cell = 0; cell < bins[l]; ++cell) columns.push_back({l, tap, cell, 0, 0, {}});
        for (int64_t at = 0; at < size; ++at) {
          const int64_t from = tap_pixel(at, tap, taps, dilation);
          if (from < 0 || from >= size) continue;
          const SourceIndex<acc_t> source = source_index(from, scale, bins[l], interpolation);
          const bool two = source.high > source.low;
          add(base + source.low, at, two ? acc_t(1) - source.lambda : acc_t(1));
          if (two) add(base + source.high, at, source.lambda);
        }
      }
    }
  }

  int count() const { return static_cast<int>(columns.size()); }

 private:
  void add(int column, int64_t at, acc_t weight) {
    Column& c = columns[column];
    if (c.weights.empty()) c.begin = at;
    c.end = at + 1;
    c.weights.push_back(weight);
    if (weight != acc_t(0)) rows[at].push_back({column, weight});
  }
};

}  // namespace pspnet_fast::cpu
