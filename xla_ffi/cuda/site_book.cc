#include "xla_ffi/cuda/site_book.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

#include "proxy/error.h"

namespace pplx::moe::cuda {
namespace {

constexpr uint32_t kBookMagic = 0x42505058;  // "XPPB"
// Nobody may take pages away from under a reader.
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

struct Entry {
  uint64_t tag;
  uint32_t kind;
  char name[84];  // zero-terminated, maybe cut off
};
static_assert(sizeof(Entry) == 96);

struct Header {
  uint32_t magic;
  uint32_t count;  // written last
};
static_assert(sizeof(Header) % alignof(Entry) == 0);

size_t bytes_of(size_t entries) { return sizeof(Header) + entries * sizeof(Entry); }
Header& header_of(std::byte* page) { return *reinterpret_cast<Header*>(page); }

[[noreturn]] void fail(const char* what) {
  throw Error(ErrorKind::kFabric, std::string("sharing the names of calls with ranks of this host: ") + what +
                                      ": " + std::strerror(errno));
}

}  // namespace

SiteBook::SiteBook(size_t most)
    : most_(most), file_(memfd_create("pplx-sites", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
  if (file_.get() < 0) fail("memfd_create");
  if (ftruncate(file_.get(), static_cast<off_t>(bytes_of(most))) != 0) fail("ftruncate");
  if (fcntl(file_.get(), F_ADD_SEALS, kSeals) != 0) fail("F_ADD_SEALS");
  void* page = mmap(nullptr, bytes_of(most), PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0);
  if (page == MAP_FAILED) fail("mmap");
  page_ = static_cast<std::byte*>(page);
  header_of(page_).magic = kBookMagic;
}

SiteBook::~SiteBook() {
  if (page_ != nullptr) munmap(page_, bytes_of(most_));
}

void SiteBook::add(const Site& site) {
  const uint32_t count = header_of(page_).count;
  if (count >= most_) return;
  Entry entry{.tag = site.tag, .kind = static_cast<uint32_t>(site.kind), .name = {}};
  std::memcpy(entry.name, site.name.data(), std::min(site.name.size(), sizeof(entry.name) - 1));
  std::memcpy(page_ + bytes_of(count), &entry, sizeof(entry));
  std::atomic_ref(header_of(page_).count).store(count + 1, std::memory_order_release);
}

OwnedFd SiteBook::share() const {
  OwnedFd copy(fcntl(file_.get(), F_DUPFD_CLOEXEC, 0));
  if (copy.get() < 0) fail("F_DUPFD_CLOEXEC");
  return copy;
}

SiteBookView::SiteBookView(const OwnedFd& file) {
  const auto refuse = [](const std::string& why) {
    throw Error(ErrorKind::kPeer, "what should be the names of a rank's calls is not: " + why);
  };
  const int seals = fcntl(file.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) refuse("the file may shrink");
  struct stat found {};
  if (fstat(file.get(), &found) != 0) fail("fstat");
  if (found.st_size < static_cast<off_t>(sizeof(Header)) || found.st_size > off_t{64} << 20) {
    refuse("the file has " + std::to_string(found.st_size) + " bytes");
  }
  bytes_ = static_cast<size_t>(found.st_size);
  void* page = mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file.get(), 0);
  if (page == MAP_FAILED) fail("mmap");
  page_ = static_cast<std::byte*>(page);
  if (header_of(page_).magic == kBookMagic) return;
  munmap(page, bytes_);
  refuse("it has another magic number");
}

SiteBookView::~SiteBookView() { munmap(page_, bytes_); }

std::optional<Site> SiteBookView::find(Kind kind, uint64_t tag) const {
  const size_t announced = std::atomic_ref(header_of(page_).count).load(std::memory_order_acquire);
  const size_t entries = std::min(announced, (bytes_ - sizeof(Header)) / sizeof(Entry));
  for (size_t i = 0; i < entries; ++i) {
    Entry entry;
    std::memcpy(&entry, page_ + bytes_of(i), sizeof(entry));
    if (entry.tag != tag || entry.kind != static_cast<uint32_t>(kind)) continue;
    return Site{.kind = kind, .tag = tag, .name = {entry.name, strnlen(entry.name, sizeof(entry.name))}};
  }
  return std::nullopt;
}

}  // namespace pplx::moe::cuda
