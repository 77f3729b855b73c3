// Length-checked little-endian reading and writing of the byte strings that cross processes.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "proxy/error.h"

namespace pplx {

static_assert(std::endian::native == std::endian::little, "wire formats are little-endian");

// FNV-1a. Not a defence against an adversary: it tells damaged descriptors from good ones (any one damaged
// byte changes it).
inline uint64_t fnv1a(std::span<const std::byte> bytes, uint64_t hash = 0xcbf29ce484222325ULL) {
  for (std::byte b : bytes) hash = (hash ^ static_cast<uint64_t>(b)) * 0x100000001b3ULL;
  return hash;
}

// Orders byte strings, for use as keys. (The vector's own operator< sets off a false warning of g++ 12.)
struct BytesLess {
  bool operator()(const std::vector<std::byte>& a, const std::vector<std::byte>& b) const {
    auto view = [](const auto& v) {
      return std::string_view(reinterpret_cast<const char*>(v.data()), v.size());
    };
    return view(a) < view(b);
  }
};

class ByteWriter {
 public:
  template <typename T>
  requires std::is_integral_v<T>
  void put(T value) { raw({reinterpret_cast<const std::byte*>(&value), sizeof value}); }
  void raw(std::span<const std::byte> bytes) {
    bytes_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  void blob(std::span<const std::byte> bytes) {
    if (bytes.size() > UINT16_MAX) throw Error(ErrorKind::kInvalidArgument, "a field exceeds 65535 bytes");
    put(static_cast<uint16_t>(bytes.size()));
    raw(bytes);
  }
  void text(std::string_view text) { blob(std::as_bytes(std::span(text))); }
  void checksum() { put(fnv1a(std::as_bytes(std::span(bytes_)))); }
  std::vector<std::byte> take() const {
    const auto bytes = std::as_bytes(std::span(bytes_));
    return {bytes.begin(), bytes.end()};
  }

 private:
  std::string bytes_;  // g++ 12 warns wrongly of overflows in a vector's insert and resize
};

// Throws kInvalidArgument, naming `what`, when the bytes end early.
class ByteReader {
 public:
  ByteReader(std::span<const std::byte> bytes, const char* what) : bytes_(bytes), what_(what) {}

  template <typename T>
  requires std::is_integral_v<T> T get() {
    T value;
    std::memcpy(&value, raw(sizeof value).data(), sizeof value);
    return value;
  }
  std::span<const std::byte> raw(size_t size) {
    if (size > bytes_.size()) malformed("it ends early");
    auto field = bytes_.first(size);
    bytes_ = bytes_.subspan(size);
    return field;
  }
  std::span<const std::byte> blob() { return raw(get<uint16_t>()); }
  std::string text() {
    auto field = blob();
    return {reinterpret_cast<const char*>(field.data()), field.size()};
  }
  std::span<const std::byte> rest() { return raw(bytes_.size()); }
  void finish() const {
    if (!bytes_.empty()) malformed("it has trailing bytes");
  }
  [[noreturn]] void malformed(const std::string& why) const {
    throw Error(ErrorKind::kInvalidArgument, std::string("malformed ") + what_ + ": " + why);
  }

 private:
  std::span<const std::byte> bytes_;
  const char* what_;
};

// The bytes without their trailing checksum; throws kInvalidArgument when it does not match.
inline std::span<const std::byte> checked(std::span<const std::byte> bytes, const char* what) {
  ByteReader reader(bytes, what);
  if (bytes.size() < sizeof(uint64_t)) reader.malformed("it ends early");
  auto body = reader.raw(bytes.size() - sizeof(uint64_t));
  if (reader.get<uint64_t>() != fnv1a(body)) reader.malformed("its checksum does not match");
  return body;
}

}  // namespace pplx
