// How fabric "verbs" uses its NIC.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace pplx {

// What exceeds a device's limits is lowered to them.
struct VerbsConfig {
  int gid_index = -1;            // -1: chosen, RoCE v2 over IPv4 first
  int traffic_class = 0;         // of RoCE, 0..255: differentiated services and congestion notification
  int service_level = 0;         // 0..15
  uint32_t send_depth = 128;     // work requests that a queue pair holds
  uint32_t outstanding = 4096;   // work requests that all queue pairs hold together
  uint32_t receives = 4096;      // posted for arriving immediates
  int ack_timeout = 16;          // a packet is sent again after 4.096 us * 2^n, n in 1..31
  int retries = 7;               // so many times, 0..7
  bool relaxed_ordering = true;  // of PCIe, where the device has it
  // A NIC that answers no handshake for so long is gone.
  std::chrono::nanoseconds connect_timeout = std::chrono::seconds(10);
};

}  // namespace pplx
