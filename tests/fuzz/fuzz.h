// What the fuzz targets share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

#include "proxy/bytes.h"

// Not an assert: it must hold in every build.
#define FUZZ_CHECK(condition)                                                            \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" int LLVMFuzzerInitialize(int* count, char*** arguments);

namespace pplx::fuzz {

inline std::span<const std::byte> bytes_of(const uint8_t* data, size_t size) {
  return std::as_bytes(std::span(data, size));
}

// The same bytes with a checksum that fits: a fuzzer would never find one, an adversary computes it.
inline std::vector<std::byte> with_checksum(std::span<const std::byte> body) {
  ByteWriter out;
  out.raw(body);
  out.checksum();
  return out.take();
}

// Takes an input apart; zeros once it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data, size) {}
  uint8_t byte() {
    if (data_.empty()) return 0;
    const uint8_t value = data_.front();
    data_ = data_.subspan(1);
    return value;
  }
  uint16_t word() {
    const uint16_t low = byte();
    return static_cast<uint16_t>(low | (byte() << 8));
  }
  bool done() const { return data_.empty(); }
  // Overwrites some bytes: a count, then offset and value of each.
  void damage(std::span<std::byte> bytes) {
    for (int left = byte() % 16; left > 0 && !bytes.empty(); --left) {
      const uint16_t offset = word();
      bytes[offset % bytes.size()] = static_cast<std::byte>(byte());
    }
  }
  std::span<const std::byte> rest() {
    const auto all = std::as_bytes(data_);
    data_ = {};
    return all;
  }

 private:
  std::span<const uint8_t> data_;
};

}  // namespace pplx::fuzz
