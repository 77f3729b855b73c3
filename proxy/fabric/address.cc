#include "proxy/fabric/address.h"

#include <sys/stat.h>
#include <unistd.h>

#include <climits>
#include <fstream>
#include <random>

#include "proxy/bytes.h"
#include "proxy/error.h"

namespace pplx {
namespace {

constexpr uint32_t kAddressMagic = 0x41584c50;     // "PLXA"
constexpr uint32_t kDescriptorMagic = 0x44584c50;  // "PLXD"
constexpr uint16_t kVersion = 3;
constexpr size_t kMaxEndpoints = 64;

void put_header(ByteWriter& out, uint32_t magic) {
  out.put(magic);
  out.put(kVersion);
}

void check_header(ByteReader& in, uint32_t magic) {
  if (in.get<uint32_t>() != magic) in.malformed("its magic number is wrong");
  if (auto version = in.get<uint16_t>(); version != kVersion) {
    in.malformed("it has version " + std::to_string(version) + ", this build reads " +
                 std::to_string(kVersion));
  }
}

// The initial namespace has the same number on every machine, hence the boot id.
uint64_t pid_namespace() {
  struct stat ns {};
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  std::string id;
  if (stat("/proc/self/ns/pid", &ns) != 0 || !(boot >> id)) return 0;
  return fnv1a(std::as_bytes(std::span(id += std::to_string(ns.st_ino))));
}

EngineId random_id() {
  std::random_device device;
  EngineId id;
  for (auto& b : id) b = static_cast<std::byte>(device());
  return id;
}

}  // namespace

std::string PeerAddress::label() const {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string text = host + ":" + std::to_string(pid) + " (engine ";
  for (size_t i = 0; i < 4; ++i) {
    text += kHex[std::to_integer<unsigned>(engine[i] >> 4)];
    text += kHex[std::to_integer<unsigned>(engine[i] & std::byte{15})];
  }
  return text + ")";
}

PeerAddress PeerAddress::nic(size_t index) const {
  PeerAddress one = *this;
  one.further.clear();
  if (index > 0) one.endpoints = further.at(index - 1);
  return one;
}

PeerAddress make_address(std::string fabric, std::string provider) {
  PeerAddress address;
  address.fabric = std::move(fabric);
  address.provider = std::move(provider);
  address.engine = random_id();
  address.pid = static_cast<uint32_t>(getpid());
  address.pid_namespace = pid_namespace();
  char host[HOST_NAME_MAX + 1] = {};
  if (gethostname(host, sizeof host - 1) == 0) address.host = host;
  return address;
}

uint64_t job_hash(const std::string& token) {
  return token.empty() ? 0 : fnv1a(std::as_bytes(std::span(token)));
}

void check_job(const PeerAddress& ours, const PeerAddress& theirs) {
  if (ours.job == theirs.job) return;
  const auto of = [](const PeerAddress& one) {
    return one.label() + (one.job == 0 ? ", which has no job token" : "");
  };
  throw Error(ErrorKind::kPeer, "engines of different jobs refuse each other: " + of(ours) + ", and " +
                                    of(theirs) + " (EngineConfig.job, PPLX_JOB)");
}

std::vector<std::byte> encode(const PeerAddress& address) {
  ByteWriter out;
  put_header(out, kAddressMagic);
  out.text(address.fabric);
  out.text(address.provider);
  out.raw(address.engine);
  out.put(address.pid);
  out.put(address.pid_namespace);
  out.text(address.host);
  out.put(address.job);
  out.put(static_cast<uint16_t>(address.nics()));
  auto put = [&](const PeerAddress::Endpoints& endpoints) {
    out.put(static_cast<uint16_t>(endpoints.size()));
    for (const auto& name : endpoints) out.blob(name);
  };
  put(address.endpoints);
  for (const auto& endpoints : address.further) put(endpoints);
  out.checksum();
  return out.take();
}

PeerAddress decode_address(std::span<const std::byte> bytes) {
  ByteReader in(checked(bytes, "address"), "address");
  check_header(in, kAddressMagic);
  PeerAddress address;
  address.fabric = in.text();
  address.provider = in.text();
  std::memcpy(address.engine.data(), in.raw(address.engine.size()).data(), address.engine.size());
  address.pid = in.get<uint32_t>();
  address.pid_namespace = in.get<uint64_t>();
  address.host = in.text();
  address.job = in.get<uint64_t>();
  size_t nics = in.get<uint16_t>();
  if (nics == 0 || nics > kMaxNics) in.malformed("it names " + std::to_string(nics) + " NICs");
  auto endpoints = [&] {
    PeerAddress::Endpoints names;
    size_t count = in.get<uint16_t>();
    if (count == 0 || count > kMaxEndpoints) in.malformed("it names " + std::to_string(count) + " endpoints");
    for (size_t i = 0; i < count; ++i) {
      auto name = in.blob();
      names.emplace_back(name.begin(), name.end());
    }
    return names;
  };
  address.endpoints = endpoints();
  for (size_t i = 1; i < nics; ++i) address.further.push_back(endpoints());
  in.finish();
  return address;
}

std::vector<std::byte> encode(const DescriptorFields& descriptor) {
  ByteWriter out;
  put_header(out, kDescriptorMagic);
  out.blob(descriptor.address);
  out.put(descriptor.base);
  out.put(descriptor.length);
  out.put(static_cast<uint16_t>(descriptor.keys.size()));
  for (uint64_t key : descriptor.keys) out.put(key);
  out.checksum();
  return out.take();
}

DescriptorFields decode_descriptor(std::span<const std::byte> bytes) {
  ByteReader in(checked(bytes, "region descriptor"), "region descriptor");
  check_header(in, kDescriptorMagic);
  DescriptorFields descriptor;
  auto address = in.blob();
  descriptor.address.assign(address.begin(), address.end());
  descriptor.base = in.get<uint64_t>();
  descriptor.length = in.get<uint64_t>();
  if (descriptor.base + descriptor.length < descriptor.base) in.malformed("its range wraps around");
  size_t count = in.get<uint16_t>();
  if (count == 0 || count > kMaxNics) in.malformed("it has " + std::to_string(count) + " keys");
  for (size_t i = 0; i < count; ++i) descriptor.keys.push_back(in.get<uint64_t>());
  in.finish();
  return descriptor;
}

}  // namespace pplx
