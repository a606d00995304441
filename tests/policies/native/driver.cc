// Runs the functions of an instruction set on operands from standard input, for tests of processors in an emulator.
//
// Without input it prints the name of the set in use, its width, most rows and whether it takes pairs. Else each request
// is seven int32 (values, rounding, pairs, rows, columns, bytes of a value, whether there are scales of x) and arrays:
// the table, uint16 [256]; the weights [width][128]; their scales, float32 [width]; x [rows][128]; its scales [rows].
// The answer is the panel, the totals of `multiply`, and the totals of `multiply_few` if there are 128 columns and few rows;
// and the last totals, rounded to bfloat16.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "isa.h"

using namespace perparam;

template <class T>
static std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (count && fread(values.data(), sizeof(T), count, stdin) != count) throw "the input ends";
  return values;
}

template <class T>
static void write(const T* values, size_t count) {
  fwrite(values, sizeof(T), count, stdout);
}

int main(int count, char**) {
  const Isa* set = isa();
  if (!set) return 2;
  if (count > 1) {
    printf("%s %d %d %d\n", set->name, set->width, set->rows, set->pairs);
    return 0;
  }
  int32_t request[7];
  while (fread(request, sizeof(request), 1, stdin) == 1) {
    auto [values, rounding, pairs, rows, columns, bytes, scaled] = request;
    const Table table(read<uint16_t>(256).data());
    auto weights = read<uint8_t>(set->width * kRun * bytes);
    auto scales = read<float>(set->width);
    auto x = read<uint8_t>(rows * kRun * (pairs ? 2 : 4));
    auto x_scales = read<float>(scaled ? rows : 0);

    Source source{weights.data(), kRun, kRun * bytes, Values(values), &table, Rounding(rounding), scales.data()};
    alignas(64) static char panel[kMaxWidth * kRun * 4];
    set->pack(source, pairs, panel);
    write(panel, set->width * kRun * (pairs ? 2 : 4));

    std::vector<float> ones(set->width, 1.0f), totals(rows * set->width);
    Rows of{rows, x.data(), kRun, scaled ? x_scales.data() : nullptr, 1, rounding ? ones.data() : scales.data(), nullptr};
    of.totals = totals.data();
    set->multiply(of, pairs, panel, columns);
    write(totals.data(), totals.size());
    if (rows <= kFewRows && columns == kRun) {
      std::fill(totals.begin(), totals.end(), 0.0f);
      set->multiply_few(of, pairs, source);
      write(totals.data(), totals.size());
    }
    std::vector<uint16_t> rounded(totals.size());
    for (size_t at = 0; at < totals.size(); at += set->width) set->round(&totals[at], &rounded[at]);
    write(rounded.data(), rounded.size());
  }
}
