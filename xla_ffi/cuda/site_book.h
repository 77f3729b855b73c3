// The names of a rank's call sites, for other processes of its host: what kernels write into each other's
// memory has no room for names, and an error should name both sides' calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "proxy/moe/wire.h"
#include "xla_ffi/cuda/memory.h"

namespace pplx::moe::cuda {

struct Site {
  Kind kind;
  uint64_t tag;
  std::string name;
};

// Entries in a file in memory, and how many of them there are.
class SiteBook {
 public:
  // Room for `most` sites. Throws kFabric.
  explicit SiteBook(size_t most);
  ~SiteBook();
  SiteBook(const SiteBook&) = delete;
  SiteBook& operator=(const SiteBook&) = delete;

  // By one thread at a time; beyond `most` they are left out.
  void add(const Site& site);
  OwnedFd share() const;

 private:
  const size_t most_;
  OwnedFd file_;
  std::byte* page_ = nullptr;
};

// Another process's book. What that process writes is read with care, and kept when it ends.
class SiteBookView {
 public:
  // Throws kPeer where the file is no book.
  explicit SiteBookView(const OwnedFd& file);
  ~SiteBookView();
  SiteBookView(const SiteBookView&) = delete;
  SiteBookView& operator=(const SiteBookView&) = delete;

  std::optional<Site> find(Kind kind, uint64_t tag) const;

 private:
  std::byte* page_ = nullptr;  // readable only
  size_t bytes_ = 0;
};

}  // namespace pplx::moe::cuda
