#include "proxy/fabric/verbs_select.h"

#include <arpa/inet.h>

#include <algorithm>
#include <charconv>
#include <cstring>

#include "proxy/error.h"

namespace pplx {
namespace {

constexpr std::array<uint8_t, 12> kMapped = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

bool is_empty(const Gid& gid) {
  return std::all_of(gid.begin() + 8, gid.end(), [](uint8_t b) { return b == 0; });
}

std::optional<Gid> parse_address(const std::string& text) {
  Gid gid{};
  if (inet_pton(AF_INET6, text.c_str(), gid.data()) == 1) return gid;
  in_addr v4{};
  if (inet_pton(AF_INET, text.c_str(), &v4) != 1) return std::nullopt;
  std::copy(kMapped.begin(), kMapped.end(), gid.begin());
  std::memcpy(gid.data() + kMapped.size(), &v4, sizeof v4);
  return gid;
}

// Lower is better.
int rank_of(const GidEntry& entry) {
  if (entry.type != GidType::kRoceV2) return 3;
  if (is_ipv4(entry.gid)) return 0;
  return is_link_local(entry.gid) ? 2 : 1;
}

std::string listed(const std::vector<GidEntry>& table) {
  if (table.empty()) return "it has none (is an IP address configured on its network interface?)";
  std::string text = "it has ";
  for (const GidEntry& entry : table) {
    if (&entry != &table.front()) text += ", ";
    text += std::to_string(entry.index);
    text += ": ";
    text += to_text(entry.gid);
    text += " (" + to_text(entry.type) + ")";
  }
  return text;
}

}  // namespace

NicName parse_nic(const std::string& text) {
  NicName name;
  const size_t colon = text.find(':');
  name.device = text.substr(0, colon);
  if (colon == std::string::npos) return name;
  const char* begin = text.data() + colon + 1;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(begin, end, name.port);
  if (error != std::errc() || stop != end || name.port < 1 || name.port > 255 || name.device.empty()) {
    throw Error(ErrorKind::kInvalidArgument,
                "'" + text + "' names no RDMA device; write for example mlx5_0, or mlx5_0:1 for its port 1");
  }
  return name;
}

bool is_ipv4(const Gid& gid) { return std::equal(kMapped.begin(), kMapped.end(), gid.begin()); }
bool is_link_local(const Gid& gid) { return gid[0] == 0xfe && (gid[1] & 0xc0) == 0x80; }

std::string to_text(const Gid& gid) {
  char text[INET6_ADDRSTRLEN] = {};
  if (is_ipv4(gid)) {
    inet_ntop(AF_INET, gid.data() + kMapped.size(), text, sizeof text);
  } else {
    inet_ntop(AF_INET6, gid.data(), text, sizeof text);
  }
  return text;
}

std::string to_text(GidType type) {
  switch (type) {
    case GidType::kInfiniBand:
      return "InfiniBand";
    case GidType::kRoceV1:
      return "RoCE v1";
    case GidType::kRoceV2:
      return "RoCE v2";
  }
  return "unknown";
}

std::optional<GidType> parse_gid_type(std::string_view text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.remove_suffix(1);
  if (text == "RoCE v2") return GidType::kRoceV2;
  if (text == "IB/RoCE v1") return GidType::kRoceV1;  // the kernel has one word for both
  return std::nullopt;
}

GidEntry choose_gid(const std::vector<GidEntry>& table, const GidWish& wish, const std::string& port) {
  std::vector<GidEntry> fit;
  const auto wanted = wish.address.empty() ? std::nullopt : parse_address(wish.address);
  if (!wish.address.empty() && !wanted) {
    throw Error(ErrorKind::kInvalidArgument,
                "EngineConfig.bind_address '" + wish.address + "' is no IP address");
  }
  for (const GidEntry& entry : table) {
    if (is_empty(entry.gid)) continue;
    if (wish.index >= 0 && entry.index != wish.index) continue;
    if (wanted && entry.gid != *wanted) continue;
    if (wish.ethernet == (entry.type == GidType::kInfiniBand)) continue;
    fit.push_back(entry);
  }
  if (fit.empty()) {
    std::string what;
    if (wish.index >= 0) what += " with index " + std::to_string(wish.index);
    if (wanted) what += " of address " + wish.address;
    throw Error(ErrorKind::kFabric, "the RDMA port " + port + " has no GID" + what + "; " + listed(table));
  }
  if (!wish.ethernet) return fit.front();
  return *std::min_element(fit.begin(), fit.end(),
                           [](const GidEntry& a, const GidEntry& b) { return rank_of(a) < rank_of(b); });
}

}  // namespace pplx
