#include "xla_ffi/cuda/member.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <thread>
#include <utility>

#include "proxy/bytes.h"
#include "proxy/log.h"
#include "xla_ffi/cuda/device.h"

namespace pplx::moe::cuda {
namespace {

constexpr uint32_t kEndpointMagic = 0x47504d45;  // "EMPG"
// Milliseconds.
constexpr int kIdleLimit = 2000, kFinishLimit = 200, kFailureLimit = 1000;
constexpr int64_t kSharesAlignment = 16;
// A message that says nothing but its header; ExchangeGroup wants room for it.
constexpr size_t kHeaderOnly = 512;

GroupConfig with_buffers(GroupConfig config, const MoeShape& shape, bool proxies) {
  config.rank = static_cast<uint32_t>(shape.rank);
  config.num_ranks = static_cast<uint32_t>(shape.num_ranks);
  config.region_bytes = proxies ? buffer_sizes(shape).region_bytes : kHeaderOnly;
  config.staging_bytes = config.region_bytes * (proxies ? config.num_ranks : 1);
  // Kernels of several executions may be queued on a device; nothing here could tell them apart.
  config.launches = nullptr;
  return config;
}

uint64_t nanoseconds(Duration duration) {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count());
}

std::string alignment_problem(const MoeShape& shape) {
  const auto wrong = [&](const char* what, int64_t bytes) {
    return std::string(what) + " of hidden=" + std::to_string(shape.hidden) + " have " +
           std::to_string(bytes) + " bytes; on GPUs they must be multiples of 16: choose hidden= accordingly";
  };
  if (shape.row_bytes() % 16 != 0) return wrong("rows", shape.row_bytes());
  if (shape.token_bytes() % 16 != 0) return wrong("quantised rows", shape.token_bytes());
  return "";
}

}  // namespace

// What a rank tells of itself.
struct Member::Peer {
  Bytes group;
  std::string uuid, socket;
  Token token;
  uint64_t layout_bytes, mapped_bytes;
  uint32_t num_sms;
  uint32_t proxies;

  Bytes encode() const {
    ByteWriter out;
    out.put(kEndpointMagic);
    out.blob(group);
    out.text(uuid);
    out.text(socket);
    out.raw(token);
    out.put(layout_bytes);
    out.put(mapped_bytes);
    out.put(num_sms);
    out.put(proxies);
    out.checksum();
    return out.take();
  }

  static Peer decode(const Bytes& bytes) {
    ByteReader in(checked(bytes, "GPU endpoint"), "GPU endpoint");
    if (in.get<uint32_t>() != kEndpointMagic) in.malformed("it has another magic number");
    Peer peer{};
    const auto group = in.blob();
    peer.group = {group.begin(), group.end()};
    peer.uuid = in.text();
    peer.socket = in.text();
    const auto token = in.raw(sizeof(Token));
    std::copy(token.begin(), token.end(), peer.token.begin());
    peer.layout_bytes = in.get<uint64_t>();
    peer.mapped_bytes = in.get<uint64_t>();
    peer.num_sms = in.get<uint32_t>();
    peer.proxies = in.get<uint32_t>();
    in.finish();
    return peer;
  }
};

// --- open ------------------------------------------------------------------------------------------------

Member::Member(int64_t group, int device, const MoeShape& shape, GroupConfig config,
               const MemberOptions& options)
    : device_(device), shape_(shape), options_(options), token_(random_token()) {
  const auto refuse = [&](const std::string& why) {
    throw Error(ErrorKind::kInvalidArgument, "group '" + config.name + "': " + why);
  };
  if (const std::string problem = alignment_problem(shape); !problem.empty()) refuse(problem);
  if (shape.physical_experts() > kMaxExperts) {
    refuse(std::to_string(shape.physical_experts()) + " experts (with replicas); GPUs take at most " +
           std::to_string(kMaxExperts));
  }
  if (shape.max_tokens >= static_cast<int64_t>(kCountLimit)) {
    refuse("max_tokens is " + std::to_string(shape.max_tokens) + ", GPUs take less than " +
           std::to_string(kCountLimit));
  }
  if (int64_t{shape.chunk} * shape.num_ranks >= static_cast<int64_t>(kCountLimit)) {
    refuse("chunk times ranks is " + std::to_string(int64_t{shape.chunk} * shape.num_ranks) +
           ", GPUs take less than " + std::to_string(kCountLimit) + ": choose a smaller chunk");
  }
  if (options.nvlink.size() != static_cast<size_t>(shape.num_ranks) || !options.nvlink[shape.rank]) {
    refuse("the ranks to reach by NVLink are not those of the group");
  }
  if (options.num_sms < 1) refuse("num_sms is " + std::to_string(options.num_sms));
  int most = 0;
  {
    const OnDevice current(device);
    check(load_kernels(shape, &most), "loading kernels for " + std::to_string(shape.physical_experts()) +
                                          " experts on CUDA device " + std::to_string(device));
  }
  most = std::min(most, kMaxBlocks);
  if (options.num_sms > most) {
    refuse("num_sms is " + std::to_string(options.num_sms) + ", CUDA device " + std::to_string(device) +
           " runs at most " + std::to_string(most) + " of these blocks at a time: pass a lower num_sms=");
  }
  block_ = &control_block(group, device);
  const PlaceBuffers place = [this](TransferEngine& engine, size_t regions, size_t staging) {
    return place_buffers(proxy_memory_, device_, options_.regions, engine, regions, staging);
  };
  group_ = std::make_unique<ExchangeGroup>(with_buffers(std::move(config), shape, options.proxies),
                                           options.proxies ? place : PlaceBuffers());
  layout_ = {.lanes = static_cast<int32_t>(2 * group_->config().depth),
             .ranks = shape.num_ranks,
             .experts = shape.experts_per_rank,
             .chunk = shape.chunk,
             .region_bytes = static_cast<int64_t>(buffer_sizes(shape).region_bytes)};
  allocate();
}

void Member::allocate() {
  const GroupConfig& config = group_->config();
  const auto ranks = static_cast<size_t>(shape_.num_ranks);
  const auto lanes = static_cast<size_t>(layout_.lanes);
  regions_ = std::make_shared<DeviceRegions>(device_, static_cast<size_t>(layout_.bytes()),
                                             "the regions that peers write");
  LocalRegions::instance().put(token_, {regions_, &block_->sites});
  const size_t choices = lanes * static_cast<size_t>(shape_.max_tokens) * static_cast<size_t>(shape_.top_k);
  const size_t counts = ranks * static_cast<size_t>(shape_.experts_per_rank);
  const size_t shares = lanes * (ranks + counts) * kMaxBlocks;
  scratch_ = std::make_unique<DeviceRegions>(
      device_,
      ranks * sizeof(std::byte*) + (2 * choices + counts + shares) * sizeof(uint32_t) + kSharesAlignment,
      "scratch");
  pinned_ = std::make_unique<PinnedMemory>(device_, sizeof(HostControl) + lanes * ranks * sizeof(uint32_t));
  host().stall_ns = nanoseconds(config.stall_timeout);
  host().first_stall_ns = nanoseconds(config.first_stall_timeout);
  if (options_.proxies) {
    map_control();
    regions_placed_ =
        Placed{.memory = proxy_memory_.regions != nullptr ? "device" : "pinned", .why = proxy_memory_.why};
  }
  if (options_.proxies && proxy_memory_.regions == nullptr) {
    const auto regions = group_->regions(), staging = group_->staging();
    host_regions_ = std::make_unique<PinnedView>(device_, regions.data(), regions.size());
    host_staging_ = std::make_unique<PinnedView>(device_, staging.data(), staging.size());
  }
  if (options_.shares) {
    std::vector<OwnedFd> fds;
    fds.push_back(regions_->export_fd());
    fds.push_back(block_->sites.share());
    server_ = std::make_unique<FdServer>(std::move(fds), token_, static_cast<uint32_t>(shape_.rank));
  }
  shared_.resize(ranks);
  imported_.resize(ranks);
  books_.resize(ranks);
  peers_.resize(ranks);
}

// Words of the control block that kernels wait for, written by the host without the bus in between.
void Member::map_control() {
  try {
    window_ = std::make_unique<GdrWindow>(block_->control, ControlBlock::kBytes);
    flags_placed_ = Placed{.memory = "device", .why = "mapped by GDRCopy"};
  } catch (const Error& error) {
    flags_placed_ = Placed{.memory = "pinned", .why = error.what()};
  }
}

Bytes Member::endpoint() const {
  return Peer{.group = group_->endpoint(),
              .uuid = device_uuid(device_),
              .socket = server_ != nullptr ? server_->name() : "",
              .token = token_,
              .layout_bytes = static_cast<uint64_t>(layout_.bytes()),
              .mapped_bytes = regions_->bytes(),
              .num_sms = static_cast<uint32_t>(options_.num_sms),
              .proxies = options_.proxies ? 1U : 0U}
      .encode();
}

void Member::connect(const std::vector<Bytes>& endpoints) {
  mark_.require("the group");
  std::vector<Peer> peers;
  std::vector<Bytes> groups;
  for (const Bytes& endpoint : endpoints) {
    peers.push_back(Peer::decode(endpoint));
    groups.push_back(peers.back().group);
  }
  group_->connect(groups);
  const auto deadline = Clock::now() + group_->config().timeout;
  const auto own = static_cast<uint32_t>(shape_.rank);
  for (uint32_t rank = 0; rank < peers.size(); ++rank) {
    const auto differs = [&](const char* what, uint64_t ours, uint64_t theirs) {
      if (ours == theirs) return;
      throw Error(ErrorKind::kMismatch, "group '" + name() + "': " + what + " is " + std::to_string(ours) +
                                            " on " + group_->rank_name(own) + " and " +
                                            std::to_string(theirs) + " on " + group_->rank_name(rank) +
                                            ": give every rank the same arguments");
    };
    differs("num_sms", static_cast<uint64_t>(options_.num_sms), peers[rank].num_sms);
    differs("whether NVLink reaches all ranks", options_.proxies ? 1 : 0, peers[rank].proxies);
    differs("the number of bytes of the regions", static_cast<uint64_t>(layout_.bytes()),
            peers[rank].layout_bytes);
    if (options_.nvlink[rank]) reach(rank, peers[rank], deadline);
  }
}

void Member::reach(uint32_t rank, const Peer& peer, Clock::time_point deadline) {
  if (rank == static_cast<uint32_t>(shape_.rank)) {
    peers_[rank] = regions_->data();
    return;
  }
  try {
    if (LocalRank local = LocalRegions::instance().find(peer.token); local.regions != nullptr) {
      DeviceRegions& regions = *local.regions;
      if (regions.device() == device_ || !peer_access(device_, regions.device())) {
        throw Error(ErrorKind::kFabric, "CUDA devices " + std::to_string(device_) + " and " +
                                            std::to_string(regions.device()) + " have no peer access");
      }
      regions.allow(device_);
      peers_[rank] = regions.data();
      shared_[rank] = std::move(local);
      return;
    }
    if (peer.mapped_bytes < peer.layout_bytes || peer.mapped_bytes > peer.layout_bytes + (1ULL << 30)) {
      throw Error(ErrorKind::kPeer, "it announces " + std::to_string(peer.mapped_bytes) + " bytes");
    }
    const std::vector<OwnedFd> fds = fetch_fds(peer.socket, peer.token, rank, 2, deadline);
    imported_[rank] = std::make_unique<ImportedRegions>(device_, fds[0], peer.mapped_bytes);
    books_[rank] = std::make_unique<SiteBookView>(fds[1]);
    peers_[rank] = imported_[rank]->data();
  } catch (const Error& error) {
    throw Error(error.kind() == ErrorKind::kTimeout ? ErrorKind::kTimeout : ErrorKind::kFabric,
                "group '" + name() + "': GPU memory of " + group_->rank_name(rank) + ", on GPU " + peer.uuid +
                    " of this host, cannot be used from CUDA device " + std::to_string(device_) + ": " +
                    error.what() +
                    ". Pass nvlink=False, or a node_size= that parts the two ranks, to go through the host");
  }
}

FindSite Member::site_of_peer() const {
  return [this](uint32_t rank, Kind kind, uint64_t tag) -> std::optional<Site> {
    if (rank >= shared_.size()) return std::nullopt;
    if (books_[rank] != nullptr) return books_[rank]->find(kind, tag);
    return shared_[rank].sites != nullptr ? shared_[rank].sites->find(kind, tag) : std::nullopt;
  };
}

Control Member::control_values() {
  Control control{};
  control.open = 1;
  control.lanes = static_cast<uint32_t>(layout_.lanes);
  control.host = reinterpret_cast<HostControl*>(pinned_->device_data());
  control.host_slots = reinterpret_cast<uint32_t*>(pinned_->device_data() + sizeof(HostControl));
  if (proxy_memory_.regions != nullptr) {
    control.host_regions = proxy_memory_.regions->data();
    control.host_staging = proxy_memory_.staging->data();
  } else if (host_regions_ != nullptr) {
    control.host_regions = host_regions_->device_data();
    control.host_staging = host_staging_->device_data();
  }
  control.told_here = window_ != nullptr ? 1 : 0;
  const size_t choices =
      size_t{control.lanes} * static_cast<size_t>(shape_.max_tokens) * static_cast<size_t>(shape_.top_k);
  std::byte* at = scratch_->data();
  control.peers = reinterpret_cast<std::byte* const*>(at);
  at += peers_.size() * sizeof(std::byte*);
  control.ordinals = reinterpret_cast<uint32_t*>(at);
  at += choices * sizeof(uint32_t);
  control.slots = reinterpret_cast<int32_t*>(at);
  at += choices * sizeof(int32_t);
  control.counts = reinterpret_cast<uint32_t*>(at);
  at += static_cast<size_t>(shape_.physical_experts()) * sizeof(uint32_t);
  at = scratch_->data() + round_up(at - scratch_->data(), kSharesAlignment);
  control.shares = reinterpret_cast<uint32_t*>(at);
  return control;
}

void Member::publish() {
  const std::lock_guard guard(lifetime_);
  if (closed_ || published_) return;
  server_.reset();  // everybody has what it hands out
  // Kernels of an equal group that was closed are still queued, and would see this one's block change.
  if (block_->used && !wait_idle(device_, kIdleLimit)) {
    throw Error(ErrorKind::kFabric,
                "group '" + name() + "': CUDA device " + std::to_string(device_) +
                    " still runs programs of the equal group that was closed before: wait "
                    "for their results before you connect");
  }
  block_->used = true;
  const Control values = control_values();
  {
    const OnDevice current(device_);
    const Stream stream(device_);
    check(cudaMemcpyAsync(scratch_->data(), peers_.data(), peers_.size() * sizeof(std::byte*),
                          cudaMemcpyHostToDevice, stream.get()),
          "writing a group's table of peers");
    stream.wait("writing a group's table of peers");
  }
  block_->write(values);
  std::vector<bool> by_proxy = options_.nvlink;
  by_proxy.flip();
  courier_ = std::make_unique<Courier>(CourierConfig{
      .group = *group_,
      .shape = shape_,
      .sites = block_->sites,
      .host = host(),
      .slots = reinterpret_cast<const uint32_t*>(pinned_->data() + sizeof(HostControl)),
      .by_proxy = std::move(by_proxy),
      .site_of_peer = site_of_peer(),
      .arrived_near = window_ != nullptr ? window_->at<uint64_t>(offsetof(Control, relayed)) : nullptr});
  published_ = true;
  if (!options_.proxies) return;
  log(LogLevel::kInfo, Field("group", name()), ' ', Field("rank", group_->config().rank), ' ',
      Field("event", "memory"), ' ', Field("regions", regions_placed_->memory), ' ',
      Field("regions_why", regions_placed_->why), ' ', Field("flags", flags_placed_->memory), ' ',
      Field("flags_why", flags_placed_->why));
}

// --- use -------------------------------------------------------------------------------------------------

KernelCall Member::call(Kind kind, uint64_t tag, std::string_view site, int64_t tokens) {
  mark_.require("the group");
  if (closed_) {
    throw Error(ErrorKind::kClosed, "group '" + name() +
                                        "' was closed; open it again with the same arguments (no "
                                        "recompilation is needed) before running " +
                                        std::string(site));
  }
  if (const auto failed = group_->failure()) throw Error(*failed);
  return {.control = block_->control,
          .shape = shape_,
          .layout = layout_,
          .kind = kind,
          .site = block_->sites.index(kind, tag, site),
          .tag = tag,
          .tokens = static_cast<int32_t>(tokens),
          .num_sms = options_.num_sms};
}

void Member::fail(const std::string& why) {
  group_->fail(Error(ErrorKind::kPeer, why), static_cast<uint32_t>(shape_.rank));
  const std::lock_guard guard(lifetime_);
  if (pinned_ != nullptr) std::atomic_ref(host().abort).store(1, std::memory_order_release);
}

std::optional<Error> Member::failure() const {
  const std::lock_guard guard(lifetime_);
  // What a kernel has recorded is the courier's to tell; it looks every few milliseconds.
  const auto limit = Clock::now() + std::chrono::milliseconds(kFailureLimit);
  while (courier_ != nullptr && !group_->failure() && read_fault(host().failure) && Clock::now() < limit) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return group_->failure();
}

std::optional<std::pair<Error, bool>> Member::take_data_error() {
  const std::lock_guard guard(lifetime_);
  if (pinned_ == nullptr) return std::nullopt;
  const auto record = read_fault(host().data_error);
  if (!record) return std::nullopt;
  // In this order: a kernel that sees the count may write the next record.
  std::atomic_ref(host().data_error.complete).store(0, std::memory_order_release);
  std::atomic_ref(host().data_errors_taken).fetch_add(1, std::memory_order_release);
  const FindSite find = site_of_peer();
  return std::pair(fault_error({*group_, shape_, block_->sites, find}, *record),
                   record->culprit == static_cast<uint32_t>(shape_.rank));
}

MemberStats Member::stats() const {
  const std::lock_guard guard(lifetime_);
  const auto bytes = [](const auto& memory) { return memory != nullptr ? memory->bytes() : 0; };
  MemberStats stats{};
  stats.group = group_->stats();
  stats.nvlink = options_.nvlink;
  stats.num_sms = options_.num_sms;
  // Where all ranks are on NVLink kernels count alone.
  uint64_t exchanges = exchanges_;
  if (courier_ != nullptr && !closed_ && !group_->failure()) exchanges = block_->next();
  stats.group.exchanges = std::max(stats.group.exchanges, exchanges);
  if (courier_ != nullptr) stats.courier = courier_->stats();
  stats.device_bytes =
      bytes(regions_) + bytes(scratch_) + bytes(proxy_memory_.regions) + bytes(proxy_memory_.staging);
  stats.pinned_bytes = bytes(pinned_) + bytes(host_regions_) + bytes(host_staging_);
  stats.regions = regions_placed_;
  stats.flags = flags_placed_;
  return stats;
}

// --- close -----------------------------------------------------------------------------------------------

Member::~Member() {
  close();
  if (stuck_) static_cast<void>(group_.release());
}

void Member::close() {
  const std::lock_guard guard(lifetime_);
  if (closed_.exchange(true)) return;
  if (mark_.forked()) {
    // The parent's: neither its threads nor its context are here.
    static_cast<void>(server_.release());
    static_cast<void>(courier_.release());
    static_cast<void>(window_.release());
    release(false);
    return;
  }
  server_.reset();
  bool idle = true;
  if (published_) {
    // What is under way is given the time that it may need; what waits for peers then ends.
    static_cast<void>(wait_idle(device_, kFinishLimit));
    std::atomic_ref(host().abort).store(1, std::memory_order_release);
    try {
      // Kernels that start from here on only poison: those before them are waited for once more.
      block_->shut();
      idle = wait_idle(device_, kIdleLimit);
      if (idle) {
        exchanges_ = block_->next();
        courier_->drain(exchanges_, Clock::now() + std::chrono::milliseconds(kIdleLimit));
        group_->count_sent(exchanges_);
      }
    } catch (const std::exception& error) {
      idle = false;
      log(LogLevel::kWarn, Field("event", "close"), ' ', Field("group", name()), ' ',
          Field("message", error.what()));
    }
  }
  courier_.reset();
  window_.reset();
  group_->close();
  release(idle);
}

// Memory that kernels may still use stays: they are told to end, and read that in it.
void Member::release(bool idle) {
  stuck_ = !idle;
  if (idle) {
    proxy_memory_.regions.reset();
    proxy_memory_.staging.reset();
    host_staging_.reset();
    host_regions_.reset();
    imported_.clear();
    for (LocalRank& rank : shared_) rank.regions.reset();
    scratch_.reset();
    regions_.reset();
    pinned_.reset();
    return;
  }
  static_cast<void>(proxy_memory_.regions.release());
  static_cast<void>(proxy_memory_.staging.release());
  static_cast<void>(host_staging_.release());
  static_cast<void>(host_regions_.release());
  for (auto& imported : imported_) static_cast<void>(imported.release());
  static auto* leaked = new std::vector<std::shared_ptr<DeviceRegions>>;
  static auto* mutex = new std::mutex;
  const std::lock_guard guard(*mutex);
  leaked->push_back(std::move(regions_));
  for (LocalRank& rank : shared_) leaked->push_back(std::move(rank.regions));
  static_cast<void>(scratch_.release());
  static_cast<void>(pinned_.release());
}

}  // namespace pplx::moe::cuda
