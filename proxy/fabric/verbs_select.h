// Which device, port and GID an engine uses.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace pplx {

using Gid = std::array<uint8_t, 16>;

enum class GidType : uint8_t { kInfiniBand, kRoceV1, kRoceV2 };

struct GidEntry {
  int index = 0;
  GidType type = GidType::kInfiniBand;
  Gid gid{};
};

// "mlx5_0" or "mlx5_0:2"; port 0 is any. Throws kInvalidArgument.
struct NicName {
  std::string device;  // empty: any
  int port = 0;
};
NicName parse_nic(const std::string& text);

bool is_ipv4(const Gid& gid);        // mapped, ::ffff:a.b.c.d
bool is_link_local(const Gid& gid);  // fe80::/10
std::string to_text(const Gid& gid);
std::string to_text(GidType type);

struct GidWish {
  int index = -1;         // -1: choose
  std::string address{};  // IP address that the GID must stand for; empty: any
  bool ethernet = true;
};

// RoCEv2 over IPv4, then over global IPv6, then link-local, then RoCEv1: what routers pass, first. On
// InfiniBand the first entry. Throws kFabric that lists what there is when nothing fits.
GidEntry choose_gid(const std::vector<GidEntry>& table, const GidWish& wish, const std::string& port);

// Contents of .../gid_attrs/types/N in sysfs; nullopt for anything else.
std::optional<GidType> parse_gid_type(std::string_view text);

}  // namespace pplx
