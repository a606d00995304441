// The values of a dtype of one byte.

#ifndef PERPARAM_TABLE_H_
#define PERPARAM_TABLE_H_

#include <cstdint>

namespace perparam {

// The bfloat16 of each of the 256 bytes, in which the values are exact.
struct Table {
  alignas(64) uint8_t low[256], high[256];  // the bytes of each
  uint16_t whole[256 + 1];                  // one more, since they may be read as four bytes
  bool has_sign;                            // whether bit 7 is the sign, so that half of the table is enough

  explicit Table(const uint16_t* entries) : whole{}, has_sign(true) {
    for (int i = 0; i < 256; ++i) {
      whole[i] = entries[i];
      low[i] = entries[i] & 0xff;
      high[i] = entries[i] >> 8;
    }
    for (int i = 0; i < 128; ++i) has_sign = has_sign && (entries[i] ^ entries[i + 128]) == 0x8000;
  }
};

}  // namespace perparam

#endif
