// Addresses and region descriptors: read, or refused as malformed; what is read is written as it came.
#include "proxy/fabric/address.h"
#include "tests/fuzz/fuzz.h"

namespace pplx::fuzz {
namespace {

template <typename Decode>
void check(std::span<const std::byte> bytes, const Decode& decode) {
  try {
    const auto fields = decode(bytes);
    const auto again = encode(fields);
    FUZZ_CHECK(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
  } catch (const Error& error) {
    FUZZ_CHECK(error.kind() == ErrorKind::kInvalidArgument);
  }
}

}  // namespace
}  // namespace pplx::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) { return 0; }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pplx;
  fuzz::Input input(data, size);
  const uint8_t mode = input.byte();
  const auto body = input.rest();
  std::vector<std::byte> bytes(body.begin(), body.end());
  if ((mode & 2) == 0) bytes = fuzz::with_checksum(body);
  if ((mode & 1) != 0) {
    fuzz::check(bytes, decode_address);
  } else {
    fuzz::check(bytes, decode_descriptor);
  }
  return 0;
}
